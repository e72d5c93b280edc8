//! Where values come from: flags override the environment, and that overrides the file.

use std::{
    error::Error,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use clap::{
    Arg, ArgMatches, Command,
    builder::{Resettable, ValueParser},
    error::{ContextKind, ContextValue},
    parser::ValueSource,
};
use toml::{Table, Value};

use super::Problems;

/// What was given by command line, environment and settings file.
pub struct Given {
    /// The values. Settings with an invalid value have their default.
    pub matches: ArgMatches,
    /// What is wrong with single values.
    pub bad_values: Vec<BadValue>,
    in_file: Vec<String>,
}

/// An invalid value.
#[derive(Clone, Debug)]
pub struct BadValue {
    /// The flag that sets it.
    pub flag: String,
    /// What is wrong.
    pub problem: String,
}

impl Given {
    /// Reads all sources. Help and wrong usage end the program here.
    pub fn read(command: &Command, line: &[OsString]) -> Result<Self, Problems> {
        let mut given = Self::parse(command, command.clone(), line);
        let subcommand = given.matches.subcommand();
        let file = subcommand.and_then(|(name, values)| {
            let path: &PathBuf = values.try_get_one("config").ok()??;
            Some((path, command.find_subcommand(name)?))
        });
        if let Some((path, subcommand)) = file {
            let (mut in_file, mut with_file) = (Vec::new(), command.clone());
            for (key, value) in read_file(path, subcommand)? {
                // The values of the file are the defaults of the flags.
                with_file = with_file.mut_subcommand(subcommand.get_name(), |subcommand| {
                    subcommand.mut_arg(&key, |arg| arg.default_value(value))
                });
                in_file.push(key);
            }
            given = Self::parse(command, with_file, line);
            given.in_file = in_file;
        }
        Ok(given)
    }

    /// clap stops at the first invalid value. So each one is noted and passed to an argument
    /// that takes anything, while the setting keeps its default, until the rest is valid.
    fn parse(defaults: &Command, mut command: Command, line: &[OsString]) -> Self {
        let mut bad_values = Vec::new();
        let name = line
            .get(1)
            .map_or("", |name| name.to_str().unwrap_or_default());
        loop {
            let error = match command.clone().try_get_matches_from(line) {
                Ok(matches) => {
                    return Given {
                        matches,
                        bad_values,
                        in_file: Vec::new(),
                    };
                }
                Err(error) => error,
            };
            let bad = BadValue::from(&error);
            let setting = bad
                .as_ref()
                .and_then(|bad| setting(defaults, name, &bad.flag));
            let (Some(bad), Some(setting)) = (bad, setting) else {
                error.exit();
            };
            let variable = setting.get_env().unwrap_or_default().to_owned();
            let taker = Arg::new(format!("invalid {}", bad.flag))
                .long(bad.flag.trim_start_matches('-').to_owned())
                .env(variable)
                .num_args(0..=1)
                .value_parser(ValueParser::os_string());
            let setting = setting
                .clone()
                .long(taker.get_id().to_string())
                .env(Resettable::Reset);
            command = command.mut_subcommand(name, |subcommand| {
                subcommand
                    .mut_arg(setting.get_id(), |_| setting.clone())
                    .arg(taker)
            });
            bad_values.push(bad);
        }
    }

    /// Where the value of a setting comes from.
    pub fn source(&self, key: &str) -> &'static str {
        let values = self.matches.subcommand().map(|(_, values)| values);
        match values.and_then(|values| values.value_source(key)) {
            Some(ValueSource::CommandLine) => "flag",
            Some(ValueSource::EnvVariable) => "environment",
            Some(_) if self.in_file.iter().any(|known| known == key) => "file",
            _ => "default",
        }
    }
}

/// The setting with this flag, if the subcommand has settings: one of them names the file.
fn setting<'a>(command: &'a Command, subcommand: &str, flag: &str) -> Option<&'a Arg> {
    let subcommand = command.find_subcommand(subcommand)?;
    let find = |long| {
        subcommand
            .get_arguments()
            .find(|arg| arg.get_long() == Some(long))
    };
    find("config").and_then(|_| find(flag.strip_prefix("--")?))
}

impl BadValue {
    /// The value is quoted only where the error names the possible ones: another may hold a
    /// secret.
    fn from(error: &clap::Error) -> Option<Self> {
        let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg) else {
            return None;
        };
        let problem = match error.source() {
            Some(why) => format!("invalid value for '{argument}': {why}"),
            None => {
                let text = error.to_string();
                let lines = text
                    .lines()
                    .map(str::trim)
                    .take_while(|line| !line.is_empty());
                let lines: Vec<_> = lines.collect();
                lines.join(" ").trim_start_matches("error: ").to_owned()
            }
        };
        let flag = argument.split(' ').next()?.to_owned();
        Some(BadValue { flag, problem })
    }
}

/// The keys and values of a settings file.
fn read_file(path: &Path, command: &Command) -> Result<Vec<(String, String)>, Problems> {
    let shown = path.display();
    let table = read_table(path).map_err(|problem| vec![format!("{shown}: {problem}")])?;
    let is_setting = |key: &str| command.get_arguments().any(|arg| arg.get_id() == key);
    let mut problems = Vec::new();
    let mut values = Vec::new();
    for (key, value) in table {
        match text(&value) {
            _ if key == "config" || !is_setting(&key) => {
                problems.push(format!("{shown}: {key} is not a setting"));
            }
            Some(value) => values.push((key, value)),
            None => problems.push(format!(
                "{shown}: {key} must be a string, a number, a boolean or a list of strings"
            )),
        }
    }
    match problems.is_empty() {
        true => Ok(values),
        false => Err(problems),
    }
}

fn read_table(path: &Path) -> Result<Table, String> {
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
