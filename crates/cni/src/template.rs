//! Templates of configurations, in the part of Go's text/template that templates for containerd use: values
//! (`{{.PodCIDR}}`, `{{$v}}`, `{{.}}`), `range` with or without variables, `if`, `else`, `end`, comments, and `-` that
//! trims the blanks beside an action. Anything else is an error that names it.

/// Biggest text that comes out, in bytes.
const MAX_OUTPUT: usize = 1 << 20;
/// Deepest nesting.
const MAX_DEPTH: usize = 16;

/// Fills a template in with the node's ranges for pods. There are `.PodCIDR` (the first), `.PodCIDRRanges` and
/// `.Routes` (the default route of each range's family). The error is the reason.
pub(crate) fn render(template: &str, cidrs: &[String]) -> Result<String, String> {
    let routes = cidrs.iter().map(|cidr| if cidr.contains(':') { "::/0" } else { "0.0.0.0/0" }.to_owned());
    let data = Data {
        first: cidrs.first().cloned().unwrap_or_default(),
        ranges: cidrs.to_vec(),
        routes: routes.collect(),
    };
    let tokens = tokens(template)?;
    let mut parser = Parser { tokens: &tokens, at: 0 };
    let (nodes, end) = parser.nodes(0)?;
    if let Some(end) = end {
        return Err(format!("{{{{{end}}}}} without a beginning"));
    }
    let mut output = String::new();
    evaluate(&nodes, &data, &mut Vec::new(), &mut output)?;
    Ok(output)
}

struct Data {
    first: String,
    ranges: Vec<String>,
    routes: Vec<String>,
}

#[derive(Debug, PartialEq)]
enum Token<'a> {
    Text(&'a str),
    Action(&'a str),
}

fn tokens(template: &str) -> Result<Vec<Token<'_>>, String> {
    let mut tokens = Vec::new();
    let mut rest = template;
    let mut trim = false;
    while let Some((before, after)) = rest.split_once("{{") {
        let (inside, after) = after.split_once("}}").ok_or("\"{{\" without \"}}\"")?;
        let trim_before = inside.starts_with("- ");
        let text = if trim { before.trim_start() } else { before };
        tokens.push(Token::Text(if trim_before { text.trim_end() } else { text }));
        trim = inside.ends_with(" -");
        let inside = inside.strip_prefix('-').filter(|_| trim_before).unwrap_or(inside);
        let inside = inside.strip_suffix('-').filter(|_| trim).unwrap_or(inside).trim();
        if !(inside.starts_with("/*") && inside.ends_with("*/")) {
            tokens.push(Token::Action(inside));
        }
        rest = after;
    }
    tokens.push(Token::Text(if trim { rest.trim_start() } else { rest }));
    Ok(tokens)
}

#[derive(Debug)]
enum Value<'a> {
    First,
    Ranges,
    Routes,
    /// `.` in a range.
    Dot,
    Variable(&'a str),
}

#[derive(Debug)]
enum Node<'a> {
    Text(&'a str),
    Value(Value<'a>),
    Range {
        index: Option<&'a str>,
        item: Option<&'a str>,
        list: Value<'a>,
        body: Vec<Node<'a>>,
        none: Vec<Node<'a>>,
    },
    If {
        condition: Value<'a>,
        body: Vec<Node<'a>>,
        none: Vec<Node<'a>>,
    },
}

struct Parser<'t, 'a> {
    tokens: &'t [Token<'a>],
    at: usize,
}

impl<'a> Parser<'_, 'a> {
    /// Up to the end, an `else` or an `end`, which is given back.
    fn nodes(&mut self, depth: usize) -> Result<(Vec<Node<'a>>, Option<&'a str>), String> {
        if depth > MAX_DEPTH {
            return Err(format!("is nested deeper than {MAX_DEPTH}"));
        }
        let mut nodes = Vec::new();
        while let Some(token) = self.tokens.get(self.at) {
            self.at += 1;
            let action = match token {
                Token::Text(text) => {
                    nodes.push(Node::Text(text));
                    continue;
                }
                Token::Action(action) => *action,
            };
            match action.split_once(char::is_whitespace).map_or((action, ""), |(a, b)| (a, b.trim())) {
                ("end" | "else", "") => return Ok((nodes, Some(action))),
                ("range", what) => {
                    let (variables, list) = match what.split_once(":=") {
                        Some((variables, list)) => (variables.trim(), list.trim()),
                        None => ("", what),
                    };
                    let variable = |text: &'a str| {
                        let text = text.trim();
                        let good = text.len() > 1 && text.starts_with('$');
                        if good {
                            Ok(Some(text))
                        } else {
                            Err(format!("{{{{{action}}}}}: {text:?} is no variable"))
                        }
                    };
                    let (index, item) = match variables.split_once(',') {
                        Some((index, item)) => (variable(index)?, variable(item)?),
                        None if variables.is_empty() => (None, None),
                        None => (None, variable(variables)?),
                    };
                    let list = value(list)?;
                    if !matches!(list, Value::Ranges | Value::Routes) {
                        return Err(format!("{{{{{action}}}}}: that is no list"));
                    }
                    let (body, none) = self.bodies(depth, action)?;
                    nodes.push(Node::Range { index, item, list, body, none });
                }
                ("if", what) => {
                    let condition = value(what)?;
                    let (body, none) = self.bodies(depth, action)?;
                    nodes.push(Node::If { condition, body, none });
                }
                _ => nodes.push(Node::Value(value(action)?)),
            }
        }
        Ok((nodes, None))
    }

    /// What is between an action and its end, and what is after an `else`.
    fn bodies(&mut self, depth: usize, action: &str) -> Result<(Vec<Node<'a>>, Vec<Node<'a>>), String> {
        let lacks = || format!("{{{{{action}}}}} without {{{{end}}}}");
        let (body, end) = self.nodes(depth + 1)?;
        match end.ok_or_else(lacks)? {
            "end" => Ok((body, Vec::new())),
            _ => {
                let (none, end) = self.nodes(depth + 1)?;
                if end != Some("end") {
                    return Err(lacks());
                }
                Ok((body, none))
            }
        }
    }
}

fn value(text: &str) -> Result<Value<'_>, String> {
    let word = |text: &str| text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    Ok(match text {
        ".PodCIDR" => Value::First,
        ".PodCIDRRanges" => Value::Ranges,
        ".Routes" => Value::Routes,
        "." => Value::Dot,
        _ if text.len() > 1 && text.starts_with('$') && text.get(1..).is_some_and(word) => {
            Value::Variable(text)
        }
        _ => {
            return Err(format!(
                "{{{{{text}}}}} is not known; there are .PodCIDR, .PodCIDRRanges and .Routes"
            ));
        }
    })
}

/// `.`, or a variable, and what it stands for.
type Binding<'a> = (&'a str, String);

fn lookup(value: &Value<'_>, data: &Data, bindings: &[Binding<'_>]) -> Result<String, String> {
    let name = match value {
        Value::First => return Ok(data.first.clone()),
        // As Go prints a list.
        Value::Ranges => return Ok(format!("[{}]", data.ranges.join(" "))),
        Value::Routes => return Ok(format!("[{}]", data.routes.join(" "))),
        Value::Dot => ".",
        Value::Variable(name) => name,
    };
    let found = bindings.iter().rev().find(|(bound, _)| *bound == name);
    found.map(|(_, text)| text.clone()).ok_or_else(|| format!("{{{{{name}}}}} is not set here"))
}

fn evaluate<'a>(
    nodes: &[Node<'a>],
    data: &Data,
    bindings: &mut Vec<Binding<'a>>,
    output: &mut String,
) -> Result<(), String> {
    for node in nodes {
        match node {
            Node::Text(text) => output.push_str(text),
            Node::Value(value) => output.push_str(&lookup(value, data, bindings)?),
            Node::If { condition, body, none } => {
                let text = lookup(condition, data, bindings)?;
                // As in Go: the empty string, the empty list and the number 0 are false. A variable is an index
                // or a range, and no range is "0".
                let holds = !matches!(text.as_str(), "" | "0" | "[]");
                evaluate(if holds { body } else { none }, data, bindings, output)?;
            }
            Node::Range { index, item, list, body, none } => {
                let list = if matches!(list, Value::Ranges) { &data.ranges } else { &data.routes };
                for (number, text) in list.iter().enumerate() {
                    let before = bindings.len();
                    bindings.push((".", text.clone()));
                    bindings.extend(index.map(|name| (name, number.to_string())));
                    bindings.extend(item.map(|name| (name, text.clone())));
                    evaluate(body, data, bindings, output)?;
                    bindings.truncate(before);
                }
                if list.is_empty() {
                    evaluate(none, data, bindings, output)?;
                }
            }
        }
        if output.len() > MAX_OUTPUT {
            return Err(format!("makes more than {MAX_OUTPUT} bytes"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> Vec<String> {
        ["10.1.0.0/24", "fd00::/64"].map(str::to_owned).to_vec()
    }

    #[test]
    fn what_templates_for_containerd_have() {
        let ranges =
            r#"[{{range $i, $range := .PodCIDRRanges}}{{if $i}}, {{end}}[{"subnet": "{{$range}}"}]{{end}}]"#;
        let expected = r#"[[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd00::/64"}]]"#;
        assert_eq!(render(ranges, &two()).unwrap(), expected);
        let routes = r#"{{range $i, $route := .Routes}}{{if $i}}, {{end}}{"dst": "{{$route}}"}{{end}}"#;
        assert_eq!(render(routes, &two()).unwrap(), r#"{"dst": "0.0.0.0/0"}, {"dst": "::/0"}"#);
        assert_eq!(render("{{.PodCIDR}} {{ .PodCIDR }}", &two()).unwrap(), "10.1.0.0/24 10.1.0.0/24");
        assert_eq!(
            render("a {{- /* no */ -}} b{{range .Routes}}<{{.}}>{{else}}none{{end}}", &[]).unwrap(),
            "abnone"
        );
        assert_eq!(render("{{range $r := .Routes}}{{$r}}{{end}}", &two()).unwrap(), "0.0.0.0/0::/0");
        assert_eq!(render("{{if .PodCIDR}}y{{else}}n{{end}}", &[]).unwrap(), "n");
        assert_eq!(render("plain", &[]).unwrap(), "plain");
    }

    #[test]
    fn anything_else_is_named() {
        for (bad, word) in [
            ("{{.Node}}", ".Node"),
            ("{{printf \"x\"}}", "printf"),
            ("{{range .PodCIDR}}{{end}}", "no list"),
            ("{{range x := .Routes}}{{end}}", "no variable"),
            ("{{if .PodCIDR}}", "without {{end}}"),
            ("{{end}}", "without a beginning"),
            ("{{$x}}", "$x"),
            ("{{.}}", "not set"),
            ("{{", "without"),
        ] {
            let error = render(bad, &two()).unwrap_err();
            assert!(error.contains(word), "{bad}: {error}");
        }
        let deep = "{{range .Routes}}".repeat(100) + &"{{end}}".repeat(100);
        assert!(render(&deep, &two()).unwrap_err().contains("deeper"));
        let big = "{{range .Routes}}".repeat(16) + &"x".repeat(1000) + &"{{end}}".repeat(16);
        assert!(render(&big, &two()).unwrap_err().contains("more than"));
    }
}
