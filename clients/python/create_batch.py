"""Creates a batch through the gateway: create_batch.py [ADDRESS [DATASET_ID [EXTERNAL_ID]]]"""

import os
import sys
from pathlib import Path

import grpc
from aep.ingestion.v1 import batch_service_pb2, batch_service_pb2_grpc
from google.protobuf import json_format
from google.rpc import error_details_pb2
from grpc_status import rpc_status

# As `aep-batch-gateway descriptor --service-config` prints it: UNAVAILABLE is retried, and
# only that. The gateway says it only if nothing was created. It may look the same, and is
# repeated too, if the connection to the gateway itself breaks in the middle of a call.
SERVICE_CONFIG = Path(__file__).with_name("service-config.json").read_text()
ADVICE = {
    "NOT_APPLIED": "Nothing was created: the call may be repeated.",
    "UNKNOWN": "A batch may exist: look for it before you repeat the call.",
    "APPLIED": "The batch exists: do not create it again.",
}


def detail(error: grpc.RpcError, message):
    """The error's detail of the message's type, or the message as it is."""
    status = rpc_status.from_call(error)
    any(packed.Unpack(message) for packed in (status.details if status else []))
    return message


def outcome(error: grpc.RpcError) -> str:
    """Whether a batch exists. A retry of your own repeats only what is NOT_APPLIED: an error
    without the gateway's ErrorInfo comes from the library or from somebody in between, and
    whatever its code is, it proves nothing."""
    info = detail(error, error_details_pb2.ErrorInfo())
    return info.metadata["outcome"] if info.domain == "aep-batch-gateway" else "UNKNOWN"


def explain(error: grpc.RpcError) -> str:
    """What failed, whether a batch exists, and what to do."""
    info = detail(error, error_details_pb2.ErrorInfo())
    bad = detail(error, error_details_pb2.BadRequest())
    retry = detail(error, error_details_pb2.RetryInfo())
    lines = [f"{error.code().name} {info.reason} {outcome(error)}: {error.details()}"]
    lines += [f"  {violation.field}: {violation.description}" for violation in bad.field_violations]
    if retry.HasField("retry_delay"):
        lines.append(f"  try again in {json_format.MessageToDict(retry)['retryDelay']}")
    return "\n".join([*lines, ADVICE[outcome(error)]])


def main() -> None:
    address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
    dataset_id = sys.argv[2] if len(sys.argv) > 2 else "5c8c3c555033b814b69f947f"
    external_id = sys.argv[3] if len(sys.argv) > 3 else None
    metadata = [
        ("authorization", "Bearer " + os.environ.get("AEP_TOKEN", "demo")),
        ("x-api-key", os.environ.get("AEP_API_KEY", "demo")),
        ("x-gw-ims-org-id", os.environ.get("AEP_ORG_ID", "demo@AdobeOrg")),
        ("x-sandbox-name", os.environ.get("AEP_SANDBOX", "prod")),
    ]
    request = batch_service_pb2.CreateBatchRequest(dataset_id=dataset_id, external_id=external_id)
    options = [("grpc.service_config", SERVICE_CONFIG)]
    with grpc.insecure_channel(address, options) as channel:
        batches = batch_service_pb2_grpc.BatchServiceStub(channel)
        try:  # Waits longer than the gateway does, which then can say what happened.
            batch = batches.CreateBatch(request, timeout=40, metadata=metadata).batch
        except grpc.RpcError as error:
            sys.exit(explain(error))
    print(batch.id, batch_service_pb2.BatchStatus.Name(batch.status))


if __name__ == "__main__":
    main()
