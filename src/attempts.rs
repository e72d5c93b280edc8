//! Which try of a call this is, as far as clients and meshes say so.

use http::HeaderMap;

/// The number of this try: 1 for a first try, or for one that says nothing.
///
/// - `grpc-previous-rpc-attempts`: earlier tries, by gRPC libraries (gRFC A6)
/// - `x-envoy-attempt-count`: this try, by Envoy and Istio
/// - `x-retry-attempty`: earlier tries, by go-grpc-middleware (spelt so)
///
/// Garbage is ignored: it must not make a call fail.
pub fn number(metadata: &HeaderMap) -> u32 {
    let number = |name: &str| -> Option<u32> {
        let values = metadata.get_all(name).iter();
        values
            .filter_map(|value| value.to_str().ok()?.trim().parse().ok())
            .max()
    };
    let earlier = |name: &str| number(name).map_or(1, |earlier| earlier.saturating_add(1));
    earlier("grpc-previous-rpc-attempts")
        .max(earlier("x-retry-attempty"))
        .max(number("x-envoy-attempt-count").unwrap_or(1))
        .max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_number_counts() {
        let of = |pairs: &[(&'static str, &'static str)]| {
            let mut map = HeaderMap::new();
            for (name, value) in pairs {
                map.append(*name, http::HeaderValue::from_static(value));
            }
            number(&map)
        };
        assert_eq!(of(&[]), 1);
        assert_eq!(of(&[("grpc-previous-rpc-attempts", "1")]), 2);
        assert_eq!(of(&[("x-envoy-attempt-count", "1")]), 1);
        assert_eq!(of(&[("x-envoy-attempt-count", "2")]), 2);
        assert_eq!(of(&[("x-retry-attempty", "1")]), 2);
        assert_eq!(
            of(&[("x-retry-attempty", "0"), ("x-envoy-attempt-count", "3")]),
            3
        );
        for garbage in ["", "-1", "two", "1e9", "99999999999999999999"] {
            assert_eq!(of(&[("x-envoy-attempt-count", garbage)]), 1, "{garbage}");
        }
        assert_eq!(
            of(&[("grpc-previous-rpc-attempts", "4294967295")]),
            u32::MAX
        );
    }
}
