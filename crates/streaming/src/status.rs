//! What the error stream says at the end of an exec or attach: plain text up to protocol version 3, a `Status` of the
//! Kubernetes API as JSON from version 4 on.

use serde_json::{Value, json};

use crate::SessionError;

/// How an exec or attach ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The command's exit code.
    Exited(i32),
    /// The session could not start or broke.
    Failed(SessionError),
}

/// What was asked for; the text of errors differs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Kind {
    Exec,
    Attach,
}

/// The content of the error stream. Empty text means success to every client, and so must not be sent for a failure.
pub(crate) fn error_stream(outcome: &Outcome, kind: Kind, as_json: bool) -> String {
    let (message, rest) = match outcome {
        // An attachment that ended is a success, whatever the container's exit code.
        Outcome::Exited(code) if *code == 0 || kind == Kind::Attach => {
            return if as_json {
                json!({"metadata": {}, "status": "Success"}).to_string()
            } else {
                String::new()
            };
        }
        Outcome::Exited(code) => (
            format!("command terminated with non-zero exit code: exit code {code}"),
            json!({
                "reason": "NonZeroExitCode",
                "details": {"causes": [exit_code_cause(*code)]},
            }),
        ),
        Outcome::Failed(error) => {
            let what = match kind {
                Kind::Exec => "executing command in container",
                Kind::Attach => "attaching to container",
            };
            let text = json!({"message": format!("error {what}: {error}")});
            // First, where Python's client looks for it.
            let code = error.exit_code().map(exit_code_cause);
            let causes: Vec<_> = code.into_iter().chain([text]).collect();
            (
                format!("Internal error occurred: error {what}: {error}"),
                json!({"reason": "InternalError", "details": {"causes": causes}, "code": 500}),
            )
        }
    };
    if !as_json {
        return message;
    }
    let mut status = rest;
    status["metadata"] = json!({});
    status["status"] = json!("Failure");
    status["message"] = json!(message);
    status.to_string()
}

fn exit_code_cause(code: i32) -> Value {
    json!({"reason": "ExitCode", "message": code.to_string()})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(outcome: Outcome, kind: Kind) -> Value {
        serde_json::from_str(&error_stream(&outcome, kind, true)).unwrap()
    }

    #[test]
    fn success() {
        assert_eq!(parsed(Outcome::Exited(0), Kind::Exec)["status"], "Success");
        assert_eq!(parsed(Outcome::Exited(9), Kind::Attach)["status"], "Success");
        assert_eq!(error_stream(&Outcome::Exited(0), Kind::Exec, false), "");
    }

    #[test]
    fn exit_codes() {
        let status = parsed(Outcome::Exited(3), Kind::Exec);
        assert_eq!(status["status"], "Failure");
        assert_eq!(status["reason"], "NonZeroExitCode");
        assert_eq!(status["details"]["causes"][0], json!({"reason": "ExitCode", "message": "3"}));
        let text = "command terminated with non-zero exit code: exit code 3";
        assert_eq!(status["message"], text);
        assert_eq!(error_stream(&Outcome::Exited(3), Kind::Exec, false), text);
    }

    #[test]
    fn failures() {
        let status = parsed(Outcome::Failed(SessionError::new("no such user \"x\"")), Kind::Attach);
        assert_eq!(status["reason"], "InternalError");
        assert_eq!(status["code"], 500);
        assert_eq!(
            status["message"],
            "Internal error occurred: error attaching to container: no such user \"x\""
        );
        assert_eq!(status["details"]["causes"].as_array().unwrap().len(), 1);
        let missing = SessionError::new("exec: \"x\": not there").with_exit_code(127);
        let status = parsed(Outcome::Failed(missing), Kind::Exec);
        assert_eq!(status["reason"], "InternalError");
        assert_eq!(status["details"]["causes"][0], json!({"reason": "ExitCode", "message": "127"}));
        let text = error_stream(&Outcome::Failed(SessionError::new("gone")), Kind::Exec, false);
        assert_eq!(text, "Internal error occurred: error executing command in container: gone");
    }
}
