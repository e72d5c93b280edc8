"""Creates a batch through the gateway: create_batch.py [ADDRESS [DATASET_ID]]"""
import json
import os
import sys

import grpc
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

from aep.ingestion.v1 import batch_service_pb2 as pb, batch_service_pb2_grpc as pb_grpc

ADVICE = {
    "NOT_CREATED": "No batch was created: the call may be repeated.",
    "UNKNOWN": "A batch may have been created: look for it before you repeat the call.",
    "CREATED": "The batch was created: do not create it again.",
}
RETRY = {"maxAttempts": 3, "initialBackoff": "0.5s", "maxBackoff": "5s", "backoffMultiplier": 2}
RETRY["retryableStatusCodes"] = ["UNAVAILABLE"]  # Nothing was created; of no other code is it sure.
SERVICE = {"service": "aep.ingestion.v1.BatchService"}
SERVICE_CONFIG = json.dumps({"methodConfig": [{"name": [SERVICE], "retryPolicy": RETRY}]})

address, dataset, *_ = sys.argv[1:] + ["127.0.0.1:50051", "5c8c3c555033b814b69f947f"][len(sys.argv) - 1 :]
metadata = [
    ("authorization", "Bearer " + os.environ.get("AEP_TOKEN", "demo")),
    ("x-api-key", os.environ.get("AEP_API_KEY", "demo")),
    ("x-gw-ims-org-id", os.environ.get("AEP_ORG_ID", "demo@AdobeOrg")),
    ("x-sandbox-name", os.environ.get("AEP_SANDBOX", "prod")),
]
with grpc.insecure_channel(address, [("grpc.service_config", SERVICE_CONFIG)]) as channel:
    request = pb.CreateBatchRequest(dataset_id=dataset)
    try:
        # Longer than the gateway waits for the API, so that the gateway can say what happened.
        answer = pb_grpc.BatchServiceStub(channel).CreateBatch(request, timeout=40, metadata=metadata)
    except grpc.RpcError as error:
        info = ErrorInfo()  # Stays empty where the error is not the gateway's own.
        status = rpc_status.from_call(error)
        any(detail.Unpack(info) for detail in (status.details if status else []))
        outcome = info.metadata.get("outcome", "UNKNOWN")
        sys.exit(f"{error.code().name} {info.reason} {outcome}: {error.details()}\n{ADVICE[outcome]}")
    print(answer.batch.id, pb.BatchStatus.Name(answer.batch.status))
