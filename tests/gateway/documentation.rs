//! The README and the pages that are generated from the code.

use std::{env, fs, path::Path};

use aep_batch_gateway::{cli, status};
use clap::Arg;

fn readme() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    fs::read_to_string(path).unwrap()
}

#[test]
fn every_reason_is_documented() {
    let readme = readme();
    let proto = include_str!("../../proto/aep/ingestion/v1/batch_service.proto");
    for row in status::TABLE {
        let code = code_name(row.code);
        let line = format!("| `{}` | {code} | {} |", row.reason, row.outcome);
        assert!(readme.contains(&line), "the README lacks {line}");
        let item = format!("{} ({code})", row.reason);
        assert!(proto.contains(&item), "the proto lacks {item}");
    }
    let outcomes = ["NOT_APPLIED |", "UNKNOWN |", "APPLIED |"];
    let documented = readme
        .lines()
        .filter(|line| line.starts_with("| `") && outcomes.iter().any(|o| line.contains(o)));
    assert_eq!(documented.count(), status::TABLE.len());
}

/// `InvalidArgument` → `INVALID_ARGUMENT`.
fn code_name(code: tonic::Code) -> String {
    let mut name = String::new();
    for c in format!("{code:?}").chars() {
        if c.is_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(c.to_ascii_uppercase());
    }
    name
}

/// Compares a generated page with the code. With `UPDATE_DOCS=1` it writes the page instead.
fn check_page(name: &str, generated: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("docs")
        .join(name);
    if env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, generated).unwrap();
    }
    let page = fs::read_to_string(&path).unwrap_or_default();
    let hint = "run: UPDATE_DOCS=1 cargo test --test gateway documentation";
    assert!(
        page == generated,
        "{} is out of date; {hint}",
        path.display()
    );
}

const CONFIGURATION: &str = "\
# Configuration

<!-- Generated: UPDATE_DOCS=1 cargo test --test gateway documentation -->

`serve`, `demo` and `config` take the same settings. Each is a flag
(`--request-timeout`), an environment variable (`AEP_GATEWAY_REQUEST_TIMEOUT`)
and a key of the TOML file that `--config` names (`request_timeout`):

```toml
listen = \"0.0.0.0:50051\"
request_timeout = \"30s\"
max_in_flight = 500
forward_metadata = [\"x-tenant\", \"x-correlation-id\"]
```

Flags override the environment, and the environment overrides the file.

`aep-batch-gateway config` checks the settings and prints each one with its
source; secrets are redacted. If anything is invalid, the gateway lists every
problem and exits with code 2. The log warns about each variable that begins
with `AEP_GATEWAY_` and is not a setting.

The gateway also reads `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`
(`config` shows the proxy of each URL), and OpenTelemetry's variables for
[tracing](operations.md).
";

#[test]
fn the_configuration_page_is_up_to_date() {
    let command = cli::command();
    let settings = command.find_subcommand("serve").unwrap();
    let mut page = CONFIGURATION.to_owned();
    let mut heading = None;
    for arg in settings.get_arguments() {
        if arg.get_help_heading() != heading {
            heading = arg.get_help_heading();
            page += &format!("\n## {}\n", heading.unwrap_or("Other"));
        }
        page += &documented(arg);
    }
    for name in ["simulate", "healthcheck", "descriptor"] {
        let command = command.find_subcommand(name).unwrap();
        page += &format!(
            "\n## The command `{name}`\n\n{}.\n",
            command.get_about().unwrap()
        );
        page.extend(command.get_arguments().map(documented));
    }
    check_page("configuration.md", &page);
}

/// The paragraph about a flag.
fn documented(arg: &Arg) -> String {
    let quoted = |values: Vec<String>| {
        let values: Vec<_> = values.iter().map(|value| format!("`{value}`")).collect();
        (!values.is_empty()).then(|| values.join(", "))
    };
    let help = arg.get_long_help().or(arg.get_help()).unwrap();
    let values = arg.get_possible_values();
    let values = values.iter().map(|value| value.get_name().to_owned());
    let defaults = arg.get_default_values().iter();
    let defaults = defaults.map(|value| value.to_str().unwrap().to_owned());
    let variable = arg.get_env().map(|name| name.to_str().unwrap().to_owned());
    let key = variable.as_ref().map(|_| arg.get_id().to_string());
    let facts = [
        ("Values", quoted(values.collect())),
        (
            "Default",
            quoted(defaults.filter(|value| !value.is_empty()).collect()),
        ),
        ("Variable", quoted(variable.into_iter().collect())),
        (
            "Key",
            quoted(key.into_iter().filter(|key| key != "config").collect()),
        ),
    ];
    let facts = facts.map(|(name, fact)| fact.map(|fact| format!("{name}: {fact}")));
    let facts: Vec<_> = facts.into_iter().flatten().collect();
    let flag = arg.get_long().unwrap();
    let value = arg
        .get_value_names()
        .filter(|_| arg.get_action().takes_values());
    let value = value.map_or_else(String::new, |names| format!(" <{}>", names[0]));
    let help = help.to_string().replace('\n', " ");
    match facts.is_empty() {
        true => format!("\n### `--{flag}{value}`\n\n{help}.\n"),
        false => format!(
            "\n### `--{flag}{value}`\n\n{help}.\n\n{}\n",
            facts.join(" · ")
        ),
    }
}
