//! Any failure → its status, as it goes over the wire and is read again.
#![no_main]

use std::time::Duration;

use aep_batch_gateway::{
    api::{Safety, methods},
    call::request_id,
    failure::{
        ApiError, Effect, ErrorBody, Failure, InvalidResponse, Kind, NotSent, Reason, Retry,
        Violation,
    },
    headers::{CREDENTIALS, REQUEST_ID},
    redact::Redactor,
    status::{self, About},
};
use http::{HeaderMap, HeaderValue, StatusCode};
use libfuzzer_sys::{
    arbitrary::{Result, Unstructured},
    fuzz_target,
};
use tonic::{Code, Status};
use tonic_types::StatusExt;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Unstructured::new(bytes);
    // Too little input for a failure is no failure of the gateway.
    let _ = send(&mut input);
});

fn send(input: &mut Unstructured<'_>) -> Result<()> {
    let mut metadata = HeaderMap::new();
    if let Ok(id) = HeaderValue::from_bytes(input.arbitrary()?) {
        metadata.insert(REQUEST_ID, id);
    }
    let external_id: Option<&str> = input.arbitrary()?;
    let failure = match input.ratio(1, 4)? {
        true => Failure {
            kind: Kind::Lookup(Box::new(failure(input)?)),
            ..failure(input)?
        },
        false => failure(input)?,
    };
    let request_id = request_id::of_call(&metadata);
    for method in methods() {
        let about = About {
            method: Some(method),
            request_id: Some(&request_id),
            external_id,
            deadline: None,
        };
        let reason = failure.reason();
        let code = status::code(reason, method.safety);
        if method.safety == Safety::NotIdempotent && reason.effect() != Effect::NotApplied {
            assert_ne!(code, Code::Unavailable);
        }
        let response = status::of_failure(&failure, about).into_http::<()>();

        // As HTTP/2 counts it (RFC 9113, section 6.5.2).
        let headers = response.headers();
        let size: usize = headers
            .iter()
            .map(|(name, value)| name.as_str().len() + value.len() + 32)
            .sum();
        assert!(size < 8 * 1024, "{size} bytes of metadata: {failure:?}");
        let outcome = status::outcome(&failure, method).map(Effect::as_str);
        let told = headers.get(status::OUTCOME);
        assert_eq!(told.map(HeaderValue::as_bytes), outcome.map(str::as_bytes));

        let read = Status::from_header_map(headers).expect("a status");
        assert_eq!(read.code(), code);
        assert!(!read.message().is_empty());
        let details = read.check_error_details().expect("details");
        let info = details.error_info().expect("ErrorInfo");
        assert_eq!(info.reason, reason.as_str());
        assert_eq!(info.domain, status::DOMAIN);
        let told = info.metadata.get("outcome");
        assert_eq!(told.map(String::as_str), outcome);
    }
    Ok(())
}

fn failure(input: &mut Unstructured<'_>) -> Result<Failure> {
    Ok(Failure {
        kind: kind(input)?,
        effect: *input.choose(&Effect::ALL)?,
        retry: match input.int_in_range(0..=2)? {
            0 => Retry::Never,
            1 => Retry::Backoff,
            _ => Retry::After(duration(input)?),
        },
    })
}

fn kind(input: &mut Unstructured<'_>) -> Result<Kind> {
    Ok(match input.int_in_range(0..=19)? {
        0 => Kind::InvalidRequest(violations(input)?),
        1 => Kind::CredentialsMissing(violations(input)?),
        2 => Kind::NotSent(NotSent::Dns(input.arbitrary()?)),
        3 => Kind::NotSent(NotSent::Connect(input.arbitrary()?)),
        4 => Kind::NotSent(NotSent::ConnectTimeout),
        5 => Kind::NotSent(NotSent::Tls(input.arbitrary()?)),
        6 => Kind::NotSent(NotSent::Unprocessed(input.arbitrary()?)),
        7 => Kind::NotSent(NotSent::Overloaded),
        8 => Kind::NotSent(NotSent::ShuttingDown),
        9 => Kind::DeadlineBeforeSending,
        10 => Kind::DeadlineAfterSending,
        11 => Kind::UpstreamTimeout(duration(input)?),
        12 => Kind::ConnectionLost(input.arbitrary()?),
        13 => Kind::ExternalIdTaken {
            batch_id: input.arbitrary()?,
        },
        14 => match input.int_in_range(0..=3)? {
            0 => Kind::DeadlineUnsettled,
            1 => Kind::ShutDown,
            2 => Kind::BatchNotFound,
            _ => Kind::Internal,
        },
        15 => Kind::RefusedByServer(*input.choose(Reason::ALL)?, input.arbitrary()?),
        16..=18 => Kind::Api(Box::new(ApiError {
            reason: *input.choose(Reason::ALL)?,
            status: http_status(input, 300..=999)?,
            body: ErrorBody {
                is_adobes: input.arbitrary()?,
                code: text(input)?,
                title: text(input)?,
                detail: text(input)?,
                report: text(input)?,
            },
            request_id: text(input)?,
            redirect_host: text(input)?,
        })),
        _ => Kind::InvalidResponse(Box::new(InvalidResponse {
            reason: *input.choose(Reason::ALL)?,
            status: http_status(input, 200..=299)?,
            problem: input.arbitrary()?,
            beginning: text(input)?.unwrap_or_default(),
            location: text(input)?,
            batch_id: text(input)?,
            request_id: text(input)?,
        })),
    })
}

/// Text from upstream, which is always quoted so.
fn text(input: &mut Unstructured<'_>) -> Result<Option<String>> {
    let text: Option<&str> = input.arbitrary()?;
    Ok(text.map(|text| Redactor::default().text(text, 1024)))
}

/// One for each name at most: there is no more to complain about.
fn violations(input: &mut Unstructured<'_>) -> Result<Vec<Violation>> {
    let names = &CREDENTIALS;
    let count = input.int_in_range(0..=names.len())?;
    let violation = |name: &http::HeaderName| {
        let description = "must be visible ASCII characters without blanks";
        Violation::new(name.as_str(), description)
    };
    Ok(names[..count].iter().map(violation).collect())
}

fn duration(input: &mut Unstructured<'_>) -> Result<Duration> {
    Ok(Duration::from_millis(input.int_in_range(0..=86_400_000)?))
}

fn http_status(
    input: &mut Unstructured<'_>,
    range: std::ops::RangeInclusive<u16>,
) -> Result<StatusCode> {
    let number = input.int_in_range(range)?;
    Ok(StatusCode::from_u16(number).expect("three digits"))
}
