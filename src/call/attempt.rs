//! Which try of a call this is, as far as clients and meshes say so.

use http::{HeaderMap, HeaderName};

const GRPC: HeaderName = HeaderName::from_static("grpc-previous-rpc-attempts");
const MIDDLEWARE: HeaderName = HeaderName::from_static("x-retry-attempty");
const ENVOY: HeaderName = HeaderName::from_static("x-envoy-attempt-count");

/// The attempts that were counted on the way here. Each counter starts again below
/// the one outside of it: for every try of a client, Envoy counts from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attempt {
    /// [`GRPC`]: earlier tries, by gRPC libraries (gRFC A6).
    grpc: Option<u32>,
    /// [`MIDDLEWARE`]: earlier tries, by go-grpc-middleware (spelt so).
    middleware: Option<u32>,
    /// [`ENVOY`]: this try, by Envoy and Istio.
    envoy: Option<u32>,
}

impl Attempt {
    /// Reads a call's counters. Garbage is ignored: it must not make a call
    /// fail.
    pub fn of_call(metadata: &HeaderMap) -> Self {
        let number = |name: HeaderName| {
            let values = metadata.get_all(name).iter();
            values
                .filter_map(|value| value.to_str().ok()?.trim().parse().ok())
                .max()
        };
        Attempt {
            grpc: number(GRPC),
            middleware: number(MIDDLEWARE),
            envoy: number(ENVOY),
        }
    }

    /// Whether the call is known to have been tried before.
    pub fn is_retry(self) -> bool {
        self.grpc.unwrap_or(0) > 0
            || self.middleware.unwrap_or(0) > 0
            || self.envoy.unwrap_or(1) > 1
    }

    /// Whether `earlier` was the try just before this one, so that none can
    /// have been made between them: the innermost counter went up by one, and
    /// those outside of it did not move.
    pub fn follows(self, earlier: Attempt) -> bool {
        let next = |now: Option<u32>, before: u32| now.is_some() && now == before.checked_add(1);
        let same_outside = self.middleware == earlier.middleware;
        match (self.envoy, earlier.envoy) {
            (now, Some(before)) => next(now, before) && self.grpc == earlier.grpc && same_outside,
            (None, None) => {
                let by_grpc = next(self.grpc, earlier.grpc.unwrap_or(0)) && same_outside;
                let by_middleware = self.grpc.is_none()
                    && earlier.grpc.is_none()
                    && next(self.middleware, earlier.middleware.unwrap_or(0));
                by_grpc || by_middleware
            }
            (Some(_), None) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt(pairs: &[(HeaderName, &'static str)]) -> Attempt {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(name, http::HeaderValue::from_static(value));
        }
        Attempt::of_call(&map)
    }

    #[test]
    fn retries_are_known() {
        for first in [
            &[][..],
            &[(GRPC, "0")],
            &[(ENVOY, "1")],
            &[(MIDDLEWARE, "0")],
        ] {
            assert!(!attempt(first).is_retry(), "{first:?}");
        }
        for retry in [
            (GRPC, "1"),
            (ENVOY, "2"),
            (MIDDLEWARE, "1"),
            (GRPC, "4294967295"),
        ] {
            assert!(
                attempt(std::slice::from_ref(&retry)).is_retry(),
                "{retry:?}"
            );
        }
        for garbage in ["", "-1", "two", "1e9", "99999999999999999999"] {
            assert!(
                !attempt(&[(ENVOY, garbage), (GRPC, garbage)]).is_retry(),
                "{garbage}"
            );
        }
    }

    #[test]
    fn a_try_follows_only_the_one_just_before() {
        let first = attempt(&[]);
        let grpc = attempt(&[(GRPC, "1")]);
        assert!(grpc.follows(first));
        assert!(attempt(&[(GRPC, "2")]).follows(grpc));
        assert!(attempt(&[(MIDDLEWARE, "1")]).follows(first));
        assert!(!first.follows(first));
        assert!(!attempt(&[(GRPC, "2")]).follows(first));
        assert!(!attempt(&[(GRPC, "1"), (MIDDLEWARE, "1")]).follows(first));

        let envoy = attempt(&[(ENVOY, "1")]);
        assert!(attempt(&[(ENVOY, "2")]).follows(envoy));
        assert!(!attempt(&[(ENVOY, "3")]).follows(envoy));
        // Between two tries of a client, Envoy may have made tries of its own.
        assert!(!attempt(&[(GRPC, "1"), (ENVOY, "1")]).follows(envoy));
        assert!(!attempt(&[(GRPC, "1"), (ENVOY, "2")]).follows(envoy));
        assert!(!attempt(&[(ENVOY, "2")]).follows(first));
        let last = attempt(&[(GRPC, "4294967295")]);
        assert!(!first.follows(last));
    }
}
