//! The `info` maps of verbose answers: JSON text by key, for people and `crictl inspect`.

use std::collections::HashMap;

use serde::Serialize;
use tonic::Status;

/// One entry under the key that people look for.
pub(crate) fn info(value: &impl Serialize) -> Result<HashMap<String, String>, Status> {
    Ok(HashMap::from([("info".to_owned(), json(value)?)]))
}

pub(crate) fn json(value: &impl Serialize) -> Result<String, Status> {
    serde_json::to_string(value).map_err(|e| Status::internal(format!("verbose info: {e}")))
}
