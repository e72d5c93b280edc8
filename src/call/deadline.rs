//! How long a call may take: `grpc-timeout` (the gRPC over HTTP/2 protocol), and
//! what an Envoy in front will wait (`x-envoy-expected-rq-timeout-ms`).

use std::time::Duration;

use http::{HeaderMap, HeaderName};
use tokio::time::Instant;

use crate::failure::{Failure, Kind, Violation};

const TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
const EXPECTED: HeaderName = HeaderName::from_static("x-envoy-expected-rq-timeout-ms");

/// The moment at which the caller must have its answer, if there is one: the
/// least of its own deadline and Envoy's, less a margin in which the answer
/// travels.
pub fn of_call(metadata: &HeaderMap, arrived: Instant) -> Result<Option<Instant>, Failure> {
    let timeouts = [callers(metadata)?, envoys(metadata)];
    let least = timeouts.into_iter().flatten().min();
    Ok(least.and_then(|timeout| arrived.checked_add(timeout - margin(timeout))))
}

fn callers(metadata: &HeaderMap) -> Result<Option<Duration>, Failure> {
    let mut values = metadata.get_all(TIMEOUT).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    let timeout = value.to_str().ok().and_then(parse);
    match (timeout, values.next()) {
        (Some(timeout), None) => Ok(Some(timeout)),
        _ => Err(Failure::refused(Kind::InvalidRequest(vec![
            Violation::new(
                TIMEOUT.as_str(),
                "must be one value of at most 8 digits and one of the units H, M, S, m, u, n",
            ),
        ]))),
    }
}

/// When Envoy gives a try up: it then says UNAVAILABLE or tries again, although
/// a batch may exist. Garbage is ignored, since the caller could not help it,
/// and so is 0, which is Envoy's word for no limit.
fn envoys(metadata: &HeaderMap) -> Option<Duration> {
    let values = metadata.get_all(EXPECTED).iter();
    values
        .filter_map(|value| value.to_str().ok()?.trim().parse().ok())
        .filter(|milliseconds| *milliseconds > 0)
        .map(Duration::from_millis)
        .min()
}

/// A tenth of short deadlines, 100 ms of long ones: enough for our answer to be
/// there before the caller's own clock, or a proxy's, ends the call.
fn margin(timeout: Duration) -> Duration {
    (timeout / 10).min(Duration::from_millis(100))
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
        const ENVOY: &str = "x-envoy-expected-rq-timeout-ms";
        const GRPC: &str = "grpc-timeout";
        let ms = |ms| Ok(Some(Duration::from_millis(ms)));
        let bad = Err(());
        let now = Instant::now();
        for (metadata, expected) in [
            (&[][..], Ok(None)),
            (&[(GRPC, "1S")], ms(900)),
            (&[(GRPC, "10m")], ms(9)),
            (&[(GRPC, "0n")], ms(0)),
            (&[(GRPC, "soon")], bad),
            (&[(GRPC, "1S"), (GRPC, "1S")], bad),
            (&[(ENVOY, "1000")], ms(900)),
            (&[(ENVOY, "10")], ms(9)),
            (&[(ENVOY, "10"), (GRPC, "1S")], ms(9)),
            (&[(ENVOY, "1000"), (GRPC, "10m")], ms(9)),
            (&[(ENVOY, "1000"), (GRPC, "soon")], bad),
            // One for each Envoy on the way.
            (&[(ENVOY, "1000"), (ENVOY, "10")], ms(9)),
            (&[(ENVOY, "0"), (GRPC, "1S")], ms(900)),
            (&[(ENVOY, "0")], Ok(None)),
            (&[(ENVOY, "soon")], Ok(None)),
            (&[(ENVOY, "")], Ok(None)),
            (&[(ENVOY, "-1")], Ok(None)),
            (&[(ENVOY, "1.5")], Ok(None)),
            (&[(ENVOY, "18446744073709551616")], Ok(None)),
            (&[(ENVOY, "\u{e9}")], Ok(None)),
            (&[(ENVOY, "soon"), (ENVOY, "10")], ms(9)),
        ] {
            let mut map = HeaderMap::new();
            for (name, value) in metadata {
                let value = http::HeaderValue::from_bytes(value.as_bytes()).expect("a value");
                map.append(*name, value);
            }
            let deadline = of_call(&map, now).map_err(|failure| {
                assert!(matches!(failure.kind, Kind::InvalidRequest(_)));
            });
            let after = deadline.map(|deadline| deadline.map(|deadline| deadline - now));
            assert_eq!(after, expected, "{metadata:?}");
        }
    }
}
