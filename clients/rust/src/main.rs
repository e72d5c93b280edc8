//! Creates a batch through the gateway: create-batch [ADDRESS [DATASET_ID [EXTERNAL_ID]]]

use std::{env, error::Error, process::ExitCode, time::Duration};

use create_batch::{
    code_name, outcome, retrying,
    v1::{BatchStatus, CreateBatchRequest, batch_service_client::BatchServiceClient},
};
use tonic::{Request, Status, transport::Endpoint};
use tonic_types::StatusExt;

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let address = arguments.next().unwrap_or("127.0.0.1:50051".to_owned());
    let dataset_id = arguments
        .next()
        .unwrap_or("5c8c3c555033b814b69f947f".to_owned());

    let mut message = Request::new(CreateBatchRequest {
        dataset_id,
        external_id: arguments.next(),
        ..Default::default()
    });
    let token = format!("Bearer {}", environment("AEP_TOKEN", "demo"));
    for (name, value) in [
        ("authorization", token),
        ("x-api-key", environment("AEP_API_KEY", "demo")),
        (
            "x-gw-ims-org-id",
            environment("AEP_ORG_ID", "demo@AdobeOrg"),
        ),
        ("x-sandbox-name", environment("AEP_SANDBOX", "prod")),
    ] {
        message.metadata_mut().insert(name, value.parse()?);
    }
    let channel = Endpoint::from_shared(format!("http://{address}"))?.connect_lazy();
    let batches = BatchServiceClient::new(channel);
    // Waits longer than the gateway does, which then can say what happened.
    let answer = retrying(Duration::from_secs(40), |left| {
        let (metadata, message) = (message.metadata().clone(), message.get_ref().clone());
        let mut request = Request::from_parts(metadata, Default::default(), message);
        request.set_timeout(left);
        let mut batches = batches.clone();
        async move { batches.create_batch(request).await }
    });
    match answer.await {
        Ok(answer) => {
            let batch = answer.into_inner().batch.unwrap_or_default();
            let status = BatchStatus::try_from(batch.status).unwrap_or_default();
            println!("{} {}", batch.id, status.as_str_name());
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => {
            explain(&error);
            Ok(ExitCode::FAILURE)
        }
    }
}

/// Says what failed, whether a batch exists, and what to do.
fn explain(error: &Status) {
    let (code, outcome) = (code_name(error.code()), outcome(error));
    let reason = error
        .get_details_error_info()
        .map_or(String::new(), |info| info.reason);
    eprintln!("{code} {reason} {outcome}: {}", error.message());
    for violation in error
        .get_details_bad_request()
        .into_iter()
        .flat_map(|bad| bad.field_violations)
    {
        eprintln!("  {}: {}", violation.field, violation.description);
    }
    if let Some(delay) = error
        .get_details_retry_info()
        .and_then(|info| info.retry_delay)
    {
        eprintln!("  try again in {}s", delay.as_secs_f64());
    }
    eprintln!(
        "{}",
        match outcome.as_str() {
            "NOT_APPLIED" => "Nothing was created: the call may be repeated.",
            "APPLIED" => "The batch exists: do not create it again.",
            _ => "A batch may exist: look for it before you repeat the call.",
        }
    );
}

fn environment(name: &str, fallback: &str) -> String {
    env::var(name).unwrap_or(fallback.to_owned())
}
