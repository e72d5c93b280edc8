//! How long a call may take: `grpc-timeout` (the gRPC over HTTP/2 protocol).

use std::time::Duration;

use http::HeaderMap;
use tokio::time::Instant;

use crate::outcome::{Failure, Violation};

/// The moment at which the caller must have its answer, if it set one: its
/// deadline less a margin in which the answer travels.
pub fn of_call(metadata: &HeaderMap, arrived: Instant) -> Result<Option<Instant>, Failure> {
    let mut values = metadata.get_all("grpc-timeout").iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    let timeout = value.to_str().ok().and_then(parse);
    match (timeout, values.next()) {
        (Some(timeout), None) => Ok(arrived.checked_add(timeout - margin(timeout))),
        _ => Err(Failure::Invalid(vec![Violation::new(
            "grpc-timeout",
            "must be one value of at most 8 digits and one of the units H, M, S, m, u, n",
        )])),
    }
}

/// A tenth of short deadlines, 20 ms of long ones: enough for our answer to be
/// there before the caller's own clock, or a proxy's, ends the call.
fn margin(timeout: Duration) -> Duration {
    (timeout / 10).min(Duration::from_millis(20))
}

fn parse(value: &str) -> Option<Duration> {
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if !(1..=8).contains(&digits.len()) || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(amount * 3600),
        "M" => Duration::from_secs(amount * 60),
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_timeouts() {
        for (value, expected) in [
            ("1H", Some(Duration::from_secs(3600))),
            ("2M", Some(Duration::from_secs(120))),
            ("3S", Some(Duration::from_secs(3))),
            ("40m", Some(Duration::from_millis(40))),
            ("5u", Some(Duration::from_micros(5))),
            ("0n", Some(Duration::ZERO)),
            ("99999999H", Some(Duration::from_secs(99_999_999 * 3600))),
            ("123456789n", None),
            ("S", None),
            ("", None),
            ("1", None),
            ("1s", None),
            ("-1S", None),
            ("1.5S", None),
            ("1 S", None),
            ("1é", None),
        ] {
            assert_eq!(parse(value), expected, "{value}");
        }
    }

    #[test]
    fn a_deadline_is_the_least_that_helps() {
        let now = Instant::now();
        let of = |values: &[&'static str]| {
            let mut map = HeaderMap::new();
            for value in values {
                map.append("grpc-timeout", http::HeaderValue::from_static(value));
            }
            of_call(&map, now)
        };
        assert_eq!(of(&[]).expect("none"), None);
        let second = now + Duration::from_millis(980);
        assert_eq!(of(&["1S"]).expect("one"), Some(second));
        assert_eq!(
            of(&["10m"]).expect("one"),
            Some(now + Duration::from_millis(9))
        );
        assert!(matches!(of(&["soon"]), Err(Failure::Invalid(_))));
        assert!(matches!(of(&["1S", "1S"]), Err(Failure::Invalid(_))));
    }
}
