//! What an HTTP response proves about a request that must not be made twice.
//!
//! A status line may come from anybody on the way: Adobe's backend, Adobe's API
//! gateway, or any cache, CDN, proxy or filter in between. Those often answer
//! *after* the request was processed: a lost response of the backend becomes
//! their own 503, in HTML or as problem+json, with or without `Retry-After`. So
//! an outcome needs proof, and where there is none it is unknown.

use http::StatusCode;

use crate::failure::{Effect, ErrorBody, Reason};

/// What a status proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Proves {
    /// The batch was created.
    Applied,
    /// The batch was created, if the response names it.
    AppliedIfNamed,
    /// Nothing was created: the request was refused before it was processed.
    NotApplied,
    /// Nothing was created, if the API itself wrote the response.
    NotAppliedIfByApi,
    /// Nothing was created, if the body has a code that Adobe's API gateway
    /// writes before it calls the backend.
    NotAppliedIfByGateway,
}

/// The rule, for every status from 100 to 999. Numbers without another source
/// are RFC 9110's.
pub(super) fn proves(status: StatusCode) -> Proves {
    match status.as_u16() {
        // The documented response (Batch Ingestion API reference, "Create a new batch").
        201 => Proves::Applied,

        // A filter's block page and a login page come as 200, too.
        200 | 202..=299 => Proves::AppliedIfNamed,

        // Send the same request elsewhere. After the other redirects a client goes on with GET,
        // so they may follow on a request that was processed.
        307 | 308 => Proves::NotApplied,

        // The request itself was refused: its syntax, address, method, size, type or conditions.
        400 | 404 | 405 | 410 | 411 | 413 | 414 | 415 | 417 | 421 | 422 | 428 | 431 => {
            Proves::NotApplied
        }

        // Who sends it was refused: no or bad credentials, no payment, a proxy's or a network's
        // login (511: RFC 6585).
        401 | 402 | 407 | 511 => Proves::NotApplied,

        // How it was sent was refused: the protocol, its version, a method nobody knows.
        426 | 501 | 505 => Proves::NotApplied,

        // Too many requests (RFC 6585): counted before they are processed.
        429 => Proves::NotApplied,

        // A filter that inspects responses says 403 after the fact; the two others may be about
        // what the request has just made.
        403 | 409 | 412 => Proves::NotAppliedIfByApi,

        // All else: time-outs (408, 499, 504, 524), lost responses (444, 460, 502, 503, 520 to
        // 523), redirects to a GET (303), and numbers that nobody has defined.
        _ => Proves::NotAppliedIfByGateway,
    }
}

/// What became of the request, by a response that is no success.
pub(super) fn effect_of_error(status: StatusCode, body: &ErrorBody) -> Effect {
    let by_gateway = body.code.as_deref().is_some_and(is_gateway_code);
    let proven = match proves(status) {
        Proves::NotApplied => true,
        Proves::NotAppliedIfByApi => by_gateway || body.is_adobes,
        Proves::NotAppliedIfByGateway => by_gateway && status.as_u16() >= 400,
        Proves::Applied | Proves::AppliedIfNamed => false, // no error
    };
    match proven {
        true => Effect::NotApplied,
        false => Effect::Unknown,
    }
}

/// The codes of Adobe's API gateway. It validates requests in nginx's access
/// phase, so before the backend is called (adobe-apiplatform/
/// api-gateway-request-validation: README, `validatorsHandlerErrorDecorator.lua`;
/// 403025: "Experience Platform troubleshooting guide: Request header errors").
#[rustfmt::skip]
const GATEWAY_CODES: [&str; 25] = [
    "403000", "403003", "503000", // the API key; the last: it could not be validated
    "403010", "403011", "401013", "401014", "401015", "503010", // the token
    "403020", "403023", "403024", "403025", "503020", // the token's profile
    "403030", "403033", "503030", "400001", "400002", // a signature
    "403012", "403013", // the caller's address
    "400003", // a header
    "429001", "429002", "429050", // limits
];

/// Whether Adobe's API gateway writes this code before the backend is called.
fn is_gateway_code(code: &str) -> bool {
    GATEWAY_CODES.contains(&code)
}

/// What a response that is no success means. Who wrote it is not known: the API,
/// or a proxy in front of it that did not let the request through.
pub(super) fn reason(status: StatusCode, body: &ErrorBody, effect: Effect) -> Reason {
    let status = status.as_u16();
    if effect != Effect::NotApplied {
        return match status {
            408 | 499 | 500..=599 => Reason::UpstreamFailed,
            _ => Reason::UpstreamUnproven,
        };
    }
    match body.code.as_deref() {
        Some(code) if means_no_credentials(code) => return Reason::ApiUnauthenticated,
        Some(code) if means_unavailable(code) => return Reason::ApiUnavailable,
        _ => {}
    }
    match status {
        307 | 308 => Reason::ApiRedirected,
        400 | 411 | 413 | 414 | 415 | 422 | 431 => Reason::ApiInvalidRequest,
        401 => Reason::ApiUnauthenticated,
        403 => Reason::ApiPermissionDenied,
        404 => Reason::ApiNotFound,
        405 | 501 => Reason::ApiNotImplemented,
        409 => Reason::ApiConflict,
        412 => Reason::ApiPreconditionFailed,
        429 => Reason::ApiRateLimited,
        _ => Reason::ApiRefused,
    }
}

/// The codes that say "no or bad token or key". 403025 says that the token is
/// good but has no right, and is not one of them.
fn means_no_credentials(code: &str) -> bool {
    matches!(
        code,
        "403000" | "403003" | "403010" | "403020" | "401013" | "401014" | "401015"
    )
}

/// The codes that say that the gateway could not validate the key, the token,
/// its profile or a signature just now. (The third comes with HTTP 403.)
fn means_unavailable(code: &str) -> bool {
    matches!(code, "503000" | "503010" | "503020" | "503030")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(status: u16, error: &ErrorBody) -> Effect {
        let status = StatusCode::from_u16(status).expect("three digits");
        effect_of_error(status, error)
    }

    fn error(code: Option<&str>, is_adobes: bool) -> ErrorBody {
        ErrorBody {
            code: code.map(str::to_owned),
            is_adobes,
            ..Default::default()
        }
    }

    /// The lists of the design, number by number.
    #[test]
    fn every_status_from_100_to_999_is_decided() {
        let refused_before_processing = [
            307, 308, 400, 401, 402, 404, 405, 407, 410, 411, 413, 414, 415, 417, 421, 422, 426,
            428, 429, 431, 501, 505, 511,
        ];
        for number in (100..=999).filter(|number| !(200..=299).contains(number)) {
            let nobodys = outcome(number, &error(None, false));
            let adobes = outcome(number, &error(None, true));
            let gateways = outcome(number, &error(Some("503010"), true));
            let expected = match number {
                _ if refused_before_processing.contains(&number) => [Effect::NotApplied; 3],
                403 | 409 | 412 => [Effect::Unknown, Effect::NotApplied, Effect::NotApplied],
                400..=999 => [Effect::Unknown, Effect::Unknown, Effect::NotApplied],
                _ => [Effect::Unknown; 3],
            };
            assert_eq!([nobodys, adobes, gateways], expected, "{number}");
        }
        for number in 200..=299 {
            let status = StatusCode::from_u16(number).expect("three digits");
            let expected = match number {
                201 => Proves::Applied,
                _ => Proves::AppliedIfNamed,
            };
            assert_eq!(proves(status), expected, "{number}");
        }
    }

    #[test]
    fn only_codes_of_the_gateways_validation_prove_anything() {
        for code in ["503", "503001", "invalid_client", "503010 ", ""] {
            assert_eq!(outcome(503, &error(Some(code), true)), Effect::Unknown);
        }
        for code in GATEWAY_CODES {
            assert_eq!(outcome(503, &error(Some(code), true)), Effect::NotApplied);
        }
    }
}
