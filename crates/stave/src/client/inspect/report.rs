//! The report: sections of rows, each with what was asked for and what the kernel has.

use std::fmt;

use serde::Serialize;

use super::super::humanise::short_id;
use super::super::table::{Table, printable};

/// One thing to compare.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Row {
    pub(crate) what: String,
    /// None: nothing was asked for, so nothing can differ.
    pub(crate) asked: Option<String>,
    pub(crate) kernel: String,
    /// More of what the kernel has, which is not compared.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) detail: String,
    pub(crate) differs: bool,
}

impl Row {
    /// Differs where the two are not the same text.
    pub(crate) fn compare(
        what: impl Into<String>,
        asked: impl Into<String>,
        kernel: impl Into<String>,
    ) -> Self {
        let (asked, kernel) = (asked.into(), kernel.into());
        let differs = asked != kernel;
        Self { what: what.into(), asked: Some(asked), kernel, detail: String::new(), differs }
    }

    /// Something that only the kernel knows.
    pub(crate) fn tell(what: impl Into<String>, kernel: impl Into<String>) -> Self {
        Self { what: what.into(), asked: None, kernel: kernel.into(), detail: String::new(), differs: false }
    }

    /// [`Row::compare`] where something was asked for, else [`Row::tell`].
    pub(crate) fn maybe(what: impl Into<String>, asked: Option<String>, kernel: impl Into<String>) -> Self {
        match asked {
            Some(asked) => Self::compare(what, asked, kernel),
            None => Self::tell(what, kernel),
        }
    }

    pub(crate) fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = detail.into();
        self
    }

    /// Sets whether it differs, where the texts alone don't tell.
    pub(crate) fn differs(mut self, differs: bool) -> Self {
        self.differs = differs;
        self
    }
}

/// Rows of one kind.
#[derive(Debug, Serialize)]
pub(crate) struct Section {
    pub(crate) title: &'static str,
    pub(crate) rows: Vec<Row>,
}

/// What `stave inspect` prints.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) container: String,
    /// POD/CONTAINER.
    pub(crate) name: String,
    pub(crate) pod: String,
    pub(crate) state: &'static str,
    pub(crate) pid: i32,
    /// What made it: the built-in executor, or a program.
    pub(crate) runtime: String,
    pub(crate) bundle: String,
    /// Below the root of each cgroup hierarchy.
    pub(crate) cgroup: String,
    /// How many rows differ.
    pub(crate) differences: usize,
    pub(crate) sections: Vec<Section>,
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { container, name, state, pid, runtime, bundle, cgroup, differences, .. } = self;
        let id = short_id(container);
        writeln!(out, "Container {} ({id}), {state}, pid {pid}", printable(name))?;
        writeln!(out, "Runtime {}", printable(runtime))?;
        writeln!(out, "Bundle {}", printable(bundle))?;
        writeln!(out, "Cgroup {}", printable(cgroup))?;
        for section in &self.sections {
            let title = section.title.to_uppercase();
            let mut table = Table::new(&["", &title, "ASKED", "KERNEL", ""]);
            for row in &section.rows {
                let mark = if row.differs { "!" } else { "" };
                let asked = row.asked.as_deref().unwrap_or("-");
                table.row([mark, &row.what, asked, &row.kernel, &row.detail]);
            }
            write!(out, "\n{table}")?;
        }
        match differences {
            0 => writeln!(out, "\nNothing differs."),
            1 => writeln!(out, "\nOne line differs (marked with \"!\")."),
            many => writeln!(out, "\n{many} lines differ (marked with \"!\")."),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_marked() {
        let rows = vec![Row::compare("a", "1", "1"), Row::compare("b", "1", "2"), Row::tell("c", "3")];
        let report = Report {
            container: "0123456789abcdef".into(),
            name: "pod/main".into(),
            pod: "p".into(),
            state: "running",
            pid: 7,
            runtime: "stave".into(),
            bundle: "/b".into(),
            cgroup: "/c".into(),
            differences: 1,
            sections: vec![Section { title: "limits", rows }],
        };
        let text = report.to_string();
        let lines: Vec<_> = text.lines().collect();
        assert!(lines.iter().any(|line| line.starts_with("!  b") && line.ends_with('2')), "{text}");
        assert!(lines.iter().any(|line| line.starts_with("   a")), "{text}");
        assert!(lines.iter().any(|line| line.starts_with("   c") && line.contains(" -  ")), "{text}");
        assert!(text.ends_with("One line differs (marked with \"!\").\n"), "{text}");
    }
}
