//! What the README says is what the program does.

use std::{fs, path::Path};

use aep_batch_gateway::status;

use crate::support::Gateway;

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

#[tokio::test]
async fn every_flag_is_documented() {
    let readme = readme();
    for command in ["serve", "simulate", "healthcheck", "descriptor"] {
        let output = Gateway::command(&[command, "--help"])
            .output()
            .await
            .unwrap();
        let help = String::from_utf8(output.stdout).unwrap();
        let flags: Vec<_> = help
            .split_whitespace()
            .filter(|word| word.starts_with("--") && *word != "--help")
            .map(|word| word.trim_end_matches(','))
            .collect();
        assert!(!flags.is_empty());
        for flag in flags {
            let flag = flag.split_terminator(['[', '=']).next().unwrap();
            assert!(
                readme.contains(&format!("`{flag}")),
                "the README lacks {flag} of {command}"
            );
        }
    }
}

#[tokio::test]
async fn every_default_is_documented() {
    let readme = readme();
    let output = Gateway::command(&["config"]).output().await.unwrap();
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        let Some((setting, _)) = line.split_once(" # default") else {
            continue;
        };
        let (key, value) = setting.split_once(" = ").unwrap();
        let flag = format!("| `--{}", key.replace('_', "-"));
        let row = readme.lines().find(|row| row.starts_with(&flag));
        let row = row.unwrap_or_else(|| panic!("the README has no row for {key}"));
        let value = value.trim_matches('"');
        assert!(
            value.is_empty() || row.contains(&format!("`{value}`")),
            "{row} lacks {value}"
        );
    }
}
