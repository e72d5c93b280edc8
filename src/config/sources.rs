//! Where values come from: flags override the environment, and that overrides the file.

use std::{error::Error, ffi::OsString, fs, path::Path};

use clap::{
    ArgMatches, Command, FromArgMatches,
    builder::{Resettable, ValueParser},
    error::{ContextKind, ContextValue},
    parser::ValueSource,
};
use toml::{Table, Value};

use super::Problems;

/// What was given by command line, environment and settings file, before it is typed.
pub struct Given {
    command: Command,
    matches: ArgMatches,
    /// All settings of the subcommand; none where it has no settings.
    pub settings: Vec<GivenSetting>,
}

/// What was given for a setting.
pub struct GivenSetting {
    /// Its key in the settings file.
    pub key: String,
    /// Its value, given or default.
    pub value: Option<OsString>,
    /// Where the value comes from: flag, environment, file or default.
    pub source: &'static str,
    /// Whether the value must never be shown.
    pub is_secret: bool,
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
    /// Reads the command line, the environment and the settings file. `with_settings` names the
    /// subcommands that have settings. Help and wrong usage end the program here.
    pub fn read(
        command: &Command,
        with_settings: &[&str],
        line: &[OsString],
    ) -> Result<Self, Problems> {
        let mut untyped = with_settings.iter().fold(command.clone(), |cli, name| {
            cli.mut_subcommand(name, |command| {
                command.mut_args(|arg| arg.value_parser(ValueParser::os_string()))
            })
        });
        // Types bring possible values, which help shows.
        let mut matches = (untyped.clone().try_get_matches_from(line))
            .unwrap_or_else(|_| command.clone().get_matches_from(line));
        let mut in_file = Vec::new();
        let file = matches.subcommand().and_then(|(name, values)| {
            let path: &OsString = values.try_get_one("config").ok()??;
            Some((name.to_owned(), path.clone()))
        });
        if let Some((name, path)) = file {
            let arguments = untyped.find_subcommand(&name).into_iter();
            let arguments = arguments.flat_map(Command::get_arguments);
            let keys: Vec<_> = arguments.map(|arg| arg.get_id().to_string()).collect();
            for (key, value) in read_file(Path::new(&path), &keys)? {
                untyped = untyped.mut_subcommand(&name, |command| {
                    command.mut_arg(&key, |arg| arg.default_value(value))
                });
                in_file.push(key);
            }
            matches = untyped.clone().get_matches_from(line);
        }
        let subcommand = matches.subcommand();
        let subcommand = subcommand.filter(|(name, _)| with_settings.contains(name));
        let arguments = subcommand.and_then(|(name, _)| untyped.find_subcommand(name));
        let settings = arguments
            .into_iter()
            .flat_map(Command::get_arguments)
            .map(|arg| {
                let key = arg.get_id().to_string();
                let values = subcommand.map(|(_, values)| values);
                GivenSetting {
                    value: values
                        .and_then(|values| Some(values.get_raw(&key)?.next_back()?.to_owned())),
                    source: match values.and_then(|values| values.value_source(&key)) {
                        Some(ValueSource::CommandLine) => "flag",
                        Some(ValueSource::EnvVariable) => "environment",
                        Some(_) if in_file.contains(&key) => "file",
                        _ => "default",
                    },
                    is_secret: arg.is_hide_env_values_set(),
                    key,
                }
            });
        let settings = settings.collect();
        Ok(Given {
            command: command.clone(),
            matches,
            settings,
        })
    }

    /// The arguments with their types. clap stops at the first invalid value; so each one is
    /// noted and left to its default, until the rest is valid.
    pub fn typed<C: FromArgMatches>(&self) -> (C, Vec<BadValue>) {
        let typed = |matches| C::from_arg_matches(matches).unwrap_or_else(|error| error.exit());
        let mut bad_values = Vec::new();
        let Some((name, _)) = self
            .matches
            .subcommand()
            .filter(|_| !self.settings.is_empty())
        else {
            return (typed(&self.matches), bad_values);
        };
        let flag = |setting: &GivenSetting| {
            let mut flag = OsString::from(format!("--{}=", setting.key.replace('_', "-")));
            flag.push(setting.value.as_ref()?);
            Some(flag)
        };
        let mut flags: Vec<OsString> = self.settings.iter().filter_map(flag).collect();
        let command = self.command.clone().mut_subcommand(name, |command| {
            command.mut_args(|arg| arg.env(Resettable::Reset)) // its value is among the flags
        });
        loop {
            let line = ["".into(), name.into()]
                .into_iter()
                .chain(flags.iter().cloned());
            let error = match command.clone().try_get_matches_from(line) {
                Ok(matches) => return (typed(&matches), bad_values),
                Err(error) => error,
            };
            let Some(bad) = BadValue::from(&error) else {
                error.exit()
            };
            let given = flags.len();
            let start = format!("{}=", bad.flag);
            flags.retain(|flag| !flag.as_encoded_bytes().starts_with(start.as_bytes()));
            if flags.len() == given {
                error.exit();
            }
            bad_values.push(bad);
        }
    }
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
fn read_file(path: &Path, settings: &[String]) -> Result<Vec<(String, String)>, Problems> {
    let shown = path.display();
    let table = read_table(path).map_err(|problem| vec![format!("{shown}: {problem}")])?;
    let mut problems = Vec::new();
    let mut values = Vec::new();
    for (key, value) in table {
        match text(&value) {
            _ if key == "config" || !settings.contains(&key) => {
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
