"""Creates a batch through the gateway: create_batch.py [ADDRESS [DATASET_ID]]"""

import json
import os
import sys

import grpc
from aep.ingestion.v1 import batch_service_pb2, batch_service_pb2_grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

# The gateway says UNAVAILABLE only if nothing was created. It may look the same, and is
# repeated too, if the connection to the gateway itself breaks in the middle of a call.
RETRY = {
    "maxAttempts": 3,
    "initialBackoff": "0.5s",
    "maxBackoff": "5s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
METHODS = {"name": [{"service": "aep.ingestion.v1.BatchService"}], "retryPolicy": RETRY}
OPTIONS = [("grpc.service_config", json.dumps({"methodConfig": [METHODS]}))]
ADVICE = {
    "NOT_CREATED": "Nothing was created: the call may be repeated.",
    "UNKNOWN": "A batch may exist: look for it before you repeat the call.",
    "CREATED": "The batch exists: do not create it again.",
}

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
dataset_id = sys.argv[2] if len(sys.argv) > 2 else "5c8c3c555033b814b69f947f"
metadata = [
    ("authorization", "Bearer " + os.environ.get("AEP_TOKEN", "demo")),
    ("x-api-key", os.environ.get("AEP_API_KEY", "demo")),
    ("x-gw-ims-org-id", os.environ.get("AEP_ORG_ID", "demo@AdobeOrg")),
    ("x-sandbox-name", os.environ.get("AEP_SANDBOX", "prod")),
]
request = batch_service_pb2.CreateBatchRequest(dataset_id=dataset_id)
with grpc.insecure_channel(address, OPTIONS) as channel:
    stub = batch_service_pb2_grpc.BatchServiceStub(channel)
    try:  # Waits longer than the gateway does, which then can say what happened.
        batch = stub.CreateBatch(request, timeout=40, metadata=metadata).batch
    except grpc.RpcError as error:
        status = rpc_status.from_call(error)
        info = error_details_pb2.ErrorInfo()  # Stays empty if the gateway never answered.
        for detail in status.details if status else []:
            detail.Unpack(info)  # Does nothing if the detail is of another type.
        outcome = info.metadata.get("outcome", "UNKNOWN")
        what = f"{error.code().name} {info.reason} {outcome}: {error.details()}"
        sys.exit(f"{what}\n{ADVICE[outcome]}")
print(batch.id, batch_service_pb2.BatchStatus.Name(batch.status))
