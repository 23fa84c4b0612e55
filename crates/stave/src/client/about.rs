//! `stave version`, `stave info`

use std::collections::BTreeMap;

use clap::Args;
use serde::Serialize;
use serde_json::Value;
use stave_cri_proto::v1::{StatusRequest, VersionRequest};

use super::connection::{Client, plain};
use super::output::{self, Format};
use super::table::Table;

#[derive(Debug, Args)]
pub(crate) struct VersionArgs {
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Serialize)]
struct Versions {
    client: &'static str,
    runtime_name: String,
    runtime_version: String,
    cri: String,
}

pub(crate) async fn version(mut client: Client, args: VersionArgs) -> anyhow::Result<()> {
    let answer = client
        .runtime
        .version(VersionRequest { version: "v1".to_owned() })
        .await
        .map_err(plain)?
        .into_inner();
    let versions = Versions {
        client: env!("CARGO_PKG_VERSION"),
        runtime_name: answer.runtime_name,
        runtime_version: answer.runtime_version,
        cri: answer.runtime_api_version,
    };
    if args.output == Format::Json {
        return output::print_json(&versions);
    }
    let mut table = Table::new(&["PART", "VERSION"]);
    table.row(["client", versions.client]);
    table.row([&format!("daemon ({})", versions.runtime_name), &versions.runtime_version]);
    table.row(["CRI", &versions.cri]);
    output::print(&table.to_string())
}

#[derive(Serialize)]
struct Condition {
    r#type: String,
    status: bool,
    reason: String,
    message: String,
}

#[derive(Serialize)]
struct Info {
    conditions: Vec<Condition>,
    runtime_handlers: Vec<String>,
    /// The verbose part, decoded where it is JSON.
    info: BTreeMap<String, Value>,
}

pub(crate) async fn info(mut client: Client, args: InfoArgs) -> anyhow::Result<()> {
    let answer = client.runtime.status(StatusRequest { verbose: true }).await.map_err(plain)?.into_inner();
    let info = Info {
        conditions: answer
            .status
            .unwrap_or_default()
            .conditions
            .into_iter()
            .map(|condition| Condition {
                r#type: condition.r#type,
                status: condition.status,
                reason: condition.reason,
                message: condition.message,
            })
            .collect(),
        runtime_handlers: answer.runtime_handlers.into_iter().map(|handler| handler.name).collect(),
        info: answer
            .info
            .into_iter()
            .map(|(key, text)| (key, serde_json::from_str(&text).unwrap_or(Value::String(text))))
            .collect(),
    };
    if args.output == Format::Json {
        return output::print_json(&info);
    }
    let mut table = Table::new(&["WHAT", "STATE", "REASON", "MESSAGE"]);
    for condition in &info.conditions {
        let state = if condition.status { "yes" } else { "no" };
        table.row([&condition.r#type, state, &condition.reason, &condition.message]);
    }
    let handlers: Vec<&str> =
        info.runtime_handlers.iter().map(|name| if name.is_empty() { "(default)" } else { name }).collect();
    let mut text = table.to_string();
    if !handlers.is_empty() {
        text += &format!("\nRuntime handlers: {}\n", handlers.join(", "));
    }
    for (key, value) in &info.info {
        text += &format!("\n{key}: {}\n", serde_json::to_string_pretty(value)?);
    }
    output::print(&text)
}
