//! The TOML file: each key is a flag with underscores, and its value is the
//! flag's default.

use std::{fs, path::Path, path::PathBuf};

use clap::{ArgMatches, Command};
use toml::{Table, Value};

use crate::config::Problems;

/// The command that is run and the settings file it names, if it does.
pub(super) fn of(matches: &ArgMatches) -> Option<(String, PathBuf)> {
    let (name, matches) = matches.subcommand()?;
    Some((name.to_owned(), path_in(matches)?.clone()))
}

/// The keys in the settings file that a command names.
pub(super) fn keys(matches: &ArgMatches) -> Vec<String> {
    let table = path_in(matches).and_then(|path| read(path).ok());
    table
        .unwrap_or_default()
        .into_iter()
        .map(|(key, _)| key)
        .collect()
}

fn path_in(matches: &ArgMatches) -> Option<&PathBuf> {
    matches.try_get_one("config").ok().flatten()
}

/// Makes the values of the file the defaults of the flags of a command.
pub(super) fn apply(cli: Command, name: &str, path: &Path) -> Result<Command, Problems> {
    let shown = path.display();
    let table = read(path).map_err(|problem| vec![format!("{shown}: {problem}")])?;
    let known = |key: &str| {
        let command = cli.find_subcommand(name);
        let mut args = command.into_iter().flat_map(Command::get_arguments);
        key != "config" && args.any(|arg| arg.get_id() == key)
    };
    let mut problems = Vec::new();
    let mut values = Vec::new();
    for (key, value) in table {
        match text(&value) {
            _ if !known(&key) => problems.push(format!("{shown}: no setting is called {key}")),
            Some(value) => values.push((key, value)),
            None => problems.push(format!(
                "{shown}: {key} must be text, a number, true or false, or a list of texts"
            )),
        }
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    Ok(cli.mut_subcommand(name, |command| {
        values.into_iter().fold(command, |command, (key, value)| {
            command.mut_arg(key, |arg| arg.default_value(value))
        })
    }))
}

fn read(path: &Path) -> Result<Table, String> {
    let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    text.parse().map_err(|error: toml::de::Error| {
        // The error's own text would quote the line, which may hold a secret.
        let line = error.span().map_or(1, |span| {
            let before = text.as_bytes().iter().take(span.start);
            1 + before.filter(|&&byte| byte == b'\n').count()
        });
        format!("line {line}: {}", error.message())
    })
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        Value::Float(number) => Some(number.to_string()),
        Value::Boolean(boolean) => Some(boolean.to_string()),
        Value::Array(list) => {
            let texts: Option<Vec<_>> = list.iter().map(Value::as_str).collect();
            Some(texts?.join(","))
        }
        Value::Datetime(_) | Value::Table(_) => None,
    }
}
