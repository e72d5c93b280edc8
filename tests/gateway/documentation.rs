//! The pages that are generated from the code, and the links of all pages.

use std::{env, fs, path::Path};

use aep_batch_gateway::{
    api::{self, Safety},
    cli,
    failure::Reason,
    status,
};
use clap::Arg;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn every_link_leads_somewhere() {
    let mut pages = vec![root().join("clients/README.md")];
    for folder in ["", "docs"] {
        let files = fs::read_dir(root().join(folder)).unwrap();
        pages.extend(files.map(|file| file.unwrap().path()));
    }
    pages.retain(|page| page.extension().is_some_and(|extension| extension == "md"));
    assert!(pages.len() > 10);
    for page in pages {
        let text = fs::read_to_string(&page).unwrap();
        for link in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
        {
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            if link.contains("://") || link.contains('\n') {
                continue;
            }
            let target = page.parent().unwrap().join(path);
            let target = if path.is_empty() {
                page.clone()
            } else {
                target
            };
            assert!(target.exists(), "{}: {link}", page.display());
            let found = anchor.is_empty() || anchors(&target).any(|heading| heading == anchor);
            assert!(found, "{}: {link}", page.display());
        }
    }
}

/// The anchors that a page's headings get when it is rendered.
fn anchors(page: &Path) -> impl Iterator<Item = String> {
    let text = fs::read_to_string(page).unwrap();
    let headings: Vec<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix('#'))
        .map(|heading| heading.trim_start_matches('#').trim().to_lowercase())
        .collect();
    headings.into_iter().map(|heading| {
        let kept = heading
            .chars()
            .filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        kept.collect::<String>().replace(' ', "-")
    })
}

const ERRORS: &str = r#"# Errors

<!-- Generated: UPDATE_DOCS=1 cargo test --test gateway documentation -->

Every failed call carries a `google.rpc.Status` in `grpc-status-details-bin`. Its
`ErrorInfo` has the domain `aep-batch-gateway`, a `reason` that never changes its
meaning, and metadata. The *outcome* says whether the call changed anything; it stands
in `ErrorInfo.metadata["outcome"]` and, in plain text, in the call's metadata
`aep-batch-outcome`:

| outcome | means | what to do |
|---|---|---|
| `NOT_APPLIED` | certainly nothing was created | fix the cause, or repeat the call |
| `UNKNOWN` | a batch may have been created | [look for it](operations.md#find-a-batch-whose-outcome-is-unknown) before you repeat the call |
| `APPLIED` | the batch was created, but the response could not be used | continue with `batchId`, if it is there |

Calls that change nothing (`GetBatch`, `ListBatches`) have no outcome.

Where the gateway says UNAVAILABLE, repeating the call does no harm: it carries
`aep-batch-retry: safe`. UNAVAILABLE without that comes from a library or a proxy, and
the outcome of a create is then unknown.

## Reasons

"#;

const ERROR_DETAILS: &str = r#"
## Details

Further keys of `ErrorInfo.metadata`, where they are known: `httpStatus`,
`upstreamErrorCode`, `upstreamTitle`, `upstreamDetail`, `upstreamReport`,
`upstreamRequestId`, `externalId`, `batchId`, `location`, `redirectHost`.

Other messages in the status: `BadRequest` names the field that is wrong, `RetryInfo` and
`QuotaFailure` come with a rate limit, `RequestInfo` has the request id, `Help` has links.
All metadata of an error together stays below 8 KiB.

If the caller cancels before anything was sent, nothing was created; the caller's own
library reports CANCELLED.
"#;

#[test]
fn the_errors_page_is_up_to_date() {
    let mut page = ERRORS.to_owned();
    page += "| reason | code | outcome | what happened |\n|---|---|---|---|\n";
    for reason in Reason::ALL {
        let mut code = code_name(status::code(*reason, Safety::NotIdempotent));
        let of_reads = code_name(status::code(*reason, Safety::Safe));
        if of_reads != code {
            code += &format!("; of reads {of_reads}");
        }
        let outcome = reason.effect().as_str();
        let meaning = reason.meaning();
        page += &format!("| `{reason}` | {code} | {outcome} | {meaning} |\n");
    }
    check_page("docs/errors.md", &(page + ERROR_DETAILS));
}

#[test]
fn the_service_config_is_up_to_date() {
    let config = format!("{:#}\n", api::service_config());
    check_page("proto/aep/ingestion/v1/grpc_service_config.json", &config);
}

#[test]
fn the_proto_explains_every_reason() {
    let proto = include_str!("../../proto/aep/ingestion/v1/batch_service.proto");
    let comment: Vec<_> = proto
        .lines()
        .map_while(|line| line.strip_prefix("service").is_none().then_some(line))
        .flat_map(|line| line.trim_start_matches("//").split_whitespace())
        .collect();
    let comment = comment.join(" ");
    for reason in Reason::ALL {
        let item = format!("{reason}: {}.", reason.meaning().replace('`', ""));
        assert!(comment.contains(&item), "the proto lacks: {item}");
    }
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
    let path = root().join(name);
    if env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, generated).unwrap();
    }
    let page = fs::read_to_string(&path).unwrap_or_default();
    assert!(page == generated, "{name} is out of date: run make docs");
}

/// The same for the part of a page between `<!-- NAME … -->` and `<!-- end -->`.
pub(crate) fn check_section(name: &str, section: &str, generated: &str) {
    let page = fs::read_to_string(root().join(name)).unwrap();
    let begin = page.find(&format!("<!-- {section}")).unwrap();
    let begin = begin + page[begin..].find("-->\n\n").unwrap() + "-->\n\n".len();
    let end = begin + page[begin..].find("\n<!-- end -->").unwrap();
    let page = format!("{}{generated}{}", &page[..begin], &page[end..]);
    check_page(name, &page);
}

const CONFIGURATION: &str = "\
# Configuration

<!-- Generated by make docs. -->

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
    check_page("docs/configuration.md", &page);
}

/// The paragraphs about a flag.
fn documented(arg: &Arg) -> String {
    let takes_value = arg.get_action().takes_values();
    let values = arg
        .get_possible_values()
        .into_iter()
        .filter(|_| takes_value);
    let defaults = arg
        .get_default_values()
        .iter()
        .filter(|value| !value.is_empty());
    let key = arg.get_help_heading().map(|_| arg.get_id().to_string()); // settings have headings
    let facts = [
        (
            "Values",
            values.map(|value| value.get_name().to_owned()).collect(),
        ),
        (
            "Default",
            defaults.map(|value| value.display().to_string()).collect(),
        ),
        (
            "Variable",
            arg.get_env()
                .iter()
                .map(|name| name.display().to_string())
                .collect(),
        ),
        ("Key", Vec::from_iter(key)),
    ];
    let facts = facts.iter().filter(|(_, values)| !values.is_empty());
    let facts: Vec<_> = facts
        .map(|(name, values)| format!("{name}: `{}`", values.join("`, `")))
        .collect();
    let value = arg.get_value_names().filter(|_| takes_value);
    let value = value.map_or_else(String::new, |names| format!(" <{}>", names[0]));
    let help = arg.get_long_help().or(arg.get_help()).unwrap().to_string();
    let mut text = format!(
        "\n### `--{}{value}`\n\n{}.\n",
        arg.get_long().unwrap(),
        help.replace('\n', " ")
    );
    if !facts.is_empty() {
        text += &format!("\n{}\n", facts.join(" · "));
    }
    text
}
