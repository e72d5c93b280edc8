//! Any failure → its status, as it goes over the wire and is read again.
#![no_main]

use std::time::Duration;

use aep_batch_gateway::{
    credentials,
    outcome::{
        ApiError, Failure, LookUpFailure, NeverSent, Outcome, Refusal, UnusableAnswer, Violation,
    },
    quote::Quote,
    status::{self, CallNames},
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
        metadata.insert(credentials::REQUEST_ID, id);
    }
    let external_id: Option<&str> = input.arbitrary()?;
    let failure = match input.ratio(1, 4)? {
        true => Failure::LookUp(Box::new(LookUpFailure {
            cause: failure(input)?,
            is_retry: input.arbitrary()?,
        })),
        false => failure(input)?,
    };

    let row = status::row(&failure);
    assert!(row.code != Code::Unavailable || row.outcome == Outcome::NotApplied);
    let call = CallNames {
        request_id: &credentials::request_id(&metadata),
        external_id,
        time_left: None,
    };
    let response = status::from_failure(&failure, call).into_http::<()>();

    // As HTTP/2 counts it (RFC 9113, section 6.5.2).
    let headers = response.headers();
    let size: usize = headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + 32)
        .sum();
    assert!(size < 8 * 1024, "{size} bytes of metadata: {failure:?}");
    assert_eq!(headers[status::OUTCOME], row.outcome.as_str());

    let read = Status::from_header_map(headers).expect("a status");
    assert_eq!(read.code(), row.code);
    assert!(!read.message().is_empty());
    let details = read.check_error_details().expect("details");
    let info = details.error_info().expect("ErrorInfo");
    assert_eq!(info.reason, row.reason);
    assert_eq!(info.domain, status::DOMAIN);
    assert_eq!(info.metadata["outcome"], row.outcome.as_str());
    Ok(())
}

fn failure(input: &mut Unstructured<'_>) -> Result<Failure> {
    Ok(match input.int_in_range(0..=18)? {
        0 => Failure::Invalid(violations(input)?),
        1 => Failure::NoCredentials(violations(input)?),
        2 => Failure::NeverSent(NeverSent::Dns(input.arbitrary()?)),
        3 => Failure::NeverSent(NeverSent::Connect(input.arbitrary()?)),
        4 => Failure::NeverSent(NeverSent::ConnectTimeout),
        5 => Failure::NeverSent(NeverSent::Tls(input.arbitrary()?)),
        6 => Failure::NeverSent(NeverSent::Unprocessed(input.arbitrary()?)),
        7 => Failure::NeverSent(NeverSent::Overloaded),
        8 => Failure::NeverSent(NeverSent::Stopping),
        9 => Failure::DeadlineBeforeSending,
        10 => Failure::DeadlineAfterSending,
        11 => Failure::TimedOut(duration(input)?),
        12 => Failure::ConnectionLost(input.arbitrary()?),
        13 => Failure::ExternalIdTaken {
            batch_id: input.arbitrary()?,
        },
        14 => match input.int_in_range(0..=2)? {
            0 => Failure::DeadlineUnsettled,
            1 => Failure::Stopped,
            _ => Failure::Panicked,
        },
        15..=17 => Failure::Refused(Box::new(Refusal {
            status: http_status(input, 300..=999)?,
            outcome: match input.arbitrary()? {
                true => Outcome::NotApplied,
                false => Outcome::Unknown,
            },
            error: ApiError {
                is_adobes: input.arbitrary()?,
                code: text(input)?,
                title: text(input)?,
                detail: text(input)?,
                report: text(input)?,
            },
            retry_after: match input.arbitrary()? {
                true => Some(duration(input)?),
                false => None,
            },
            request_id: text(input)?,
            redirect_host: text(input)?,
        })),
        _ => Failure::Unusable(Box::new(UnusableAnswer {
            status: http_status(input, 200..=299)?,
            outcome: match input.arbitrary()? {
                true => Outcome::Applied,
                false => Outcome::Unknown,
            },
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
    Ok(text.map(|text| Quote::default().text(text, 1024)))
}

/// One for each name at most: there is no more to complain about.
fn violations(input: &mut Unstructured<'_>) -> Result<Vec<Violation>> {
    let names = &credentials::NAMES;
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
