//! Log lines: what they look like, and which are written.

use std::{
    io, panic,
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
};

use clap::ValueEnum;
use tracing::Level;
use tracing_subscriber::{
    Registry,
    filter::{LevelFilter, Targets},
    fmt::layer,
    layer::SubscriberExt,
    reload,
    util::SubscriberInitExt,
};

use super::{access, log_queue};

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One JSON object to a line.
    Json,
    /// For people.
    Text,
}

/// Which log lines are written, as it was given: a level, or directives like
/// `info,h2=debug`.
///
/// No regular expressions and no fields of spans: one such filter can cost
/// seconds and hundreds of megabytes.
#[derive(Clone, Debug)]
pub struct LogFilter {
    given: String,
    targets: Targets,
}

impl FromStr for LogFilter {
    type Err = String;

    fn from_str(given: &str) -> Result<Self, String> {
        let given = given.trim();
        let mut targets = Targets::new();
        let mut named = Vec::new();
        let directives = given.split(',').map(str::trim).filter(|d| !d.is_empty());
        for directive in directives.clone() {
            match directive.split_once('=') {
                None => targets = ours(level(directive)?),
                Some((target, of)) if is_target(target) => named.push((target, level(of)?)),
                Some((target, _)) => return Err(format!("{target:?} is not a target")),
            }
        }
        if directives.count() == 0 {
            return Err(format!("it is empty: {LEVELS}"));
        }
        Ok(LogFilter {
            given: given.to_owned(),
            targets: targets.with_targets(named),
        })
    }
}

const LEVELS: &str = "use off, error, warn, info, debug, trace, or directives such as \
    info,h2=debug";

fn level(word: &str) -> Result<LevelFilter, String> {
    let is_word = word.starts_with(|c: char| c.is_ascii_alphabetic());
    let level = word.parse().ok().filter(|_| is_word);
    level.ok_or_else(|| format!("{word:?} is not a level: {LEVELS}"))
}

fn is_target(name: &str) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || "_-:.".contains(c);
    !name.is_empty() && name.chars().all(known)
}

/// A level says it of the gateway's own lines. Libraries then tell errors alone,
/// as callers can make them write a line for every frame; but who asks for `debug`
/// or `trace` wants all.
fn ours(level: LevelFilter) -> Targets {
    let libraries = match level >= Level::DEBUG {
        true => level,
        false => level.min(LevelFilter::ERROR),
    };
    let own = [env!("CARGO_CRATE_NAME"), access::TARGET];
    Targets::new()
        .with_default(libraries)
        .with_targets(own.map(|target| (target, level)))
}

/// Sends log lines, and panics, to standard error from now on.
pub fn start_logs(format: LogFormat, filter: LogFilter) -> io::Result<LogLevel> {
    log_queue::start()?;
    let LogFilter { given, targets } = filter;
    let (targets, handle) = reload::Layer::new(targets);
    let lines = tracing_subscriber::registry().with(targets);
    let layer = layer().with_writer(|| log_queue::Lines);
    // Fails where a test has started logs already.
    let _ = match format {
        LogFormat::Json => lines.with(layer.json().flatten_event(true)).try_init(),
        LogFormat::Text => lines.with(layer.with_ansi(false)).try_init(),
    };
    // The default one writes to standard error by itself, and may wait there.
    panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
    Ok(LogLevel {
        handle,
        given: Arc::new(Mutex::new(given)),
    })
}

/// Which log lines are written. Can be changed while the gateway runs.
#[derive(Clone, Debug)]
pub struct LogLevel {
    handle: reload::Handle<Targets, Registry>,
    given: Arc<Mutex<String>>,
}

impl LogLevel {
    /// The filter that holds, as it was given.
    pub fn get(&self) -> String {
        let given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        given.clone()
    }

    /// Another filter from now on. Fails with what is wrong with it.
    pub fn set(&self, filter: &str) -> Result<(), String> {
        let LogFilter { given, targets } = filter.parse()?;
        let mut shown = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        let reloaded = self.handle.reload(targets);
        reloaded.map_err(|error| error.to_string())?;
        *shown = given;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_filter_lets_through() {
        const OURS: &str = "aep_batch_gateway::server::listener";
        for (filter, target, least) in [
            ("info", OURS, Some(Level::INFO)),
            ("info", "access", Some(Level::INFO)),
            ("info", "h2::proto", Some(Level::ERROR)),
            ("WARN", OURS, Some(Level::WARN)),
            ("error", "h2", Some(Level::ERROR)),
            ("off", OURS, None),
            ("off", "h2", None),
            ("debug", "h2", Some(Level::DEBUG)),
            ("trace", "hyper", Some(Level::TRACE)),
            ("info,h2=debug", "h2::proto", Some(Level::DEBUG)),
            ("h2=debug, warn ,", "h2::proto", Some(Level::DEBUG)),
            ("h2=debug, warn ,", OURS, Some(Level::WARN)),
            ("info,access=off", "access", None),
            ("info,access=off", OURS, Some(Level::INFO)),
            ("h2=warn", "h2", Some(Level::WARN)),
            ("h2=warn", OURS, None),
        ] {
            let targets = filter.parse::<LogFilter>().expect(filter).targets;
            for level in [
                Level::ERROR,
                Level::WARN,
                Level::INFO,
                Level::DEBUG,
                Level::TRACE,
            ] {
                let wanted = least.is_some_and(|least| level <= least);
                let passes = targets.would_enable(target, &level);
                assert_eq!(passes, wanted, "{filter} {target} {level}");
            }
        }
    }

    #[test]
    fn what_is_no_filter_is_refused() {
        for (filter, told) in [
            ("", "it is empty"),
            (" , ", "it is empty"),
            ("warning", "not a level"),
            ("inof", "not a level"),
            ("h2", "not a level"),
            ("3", "not a level"),
            ("info debug", "not a level"),
            ("info,verbose", "not a level"),
            ("h2=", "not a level"),
            ("h2=loud", "not a level"),
            ("a=b=c", "not a level"),
            ("=info", "not a target"),
            ("[span]=info", "not a target"),
            ("a[b{c=\"(x+)+\"}]=trace", "not a target"),
            ("a b=info", "not a target"),
        ] {
            let problem = filter.parse::<LogFilter>().expect_err(filter);
            assert!(problem.contains(told), "{filter}: {problem}");
        }
    }
}
