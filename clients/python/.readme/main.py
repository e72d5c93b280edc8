import grpc
from aep.ingestion.v1 import batch_service_pb2, batch_service_pb2_grpc

credentials = [("authorization", "Bearer demo"), ("x-api-key", "demo"),
               ("x-gw-ims-org-id", "demo@AdobeOrg"), ("x-sandbox-name", "prod")]
with grpc.insecure_channel("127.0.0.1:44815") as channel:
    batches = batch_service_pb2_grpc.BatchServiceStub(channel)
    request = batch_service_pb2.CreateBatchRequest(dataset_id="5c8c3c555033b814b69f947f")
    print(batches.CreateBatch(request, timeout=30, metadata=credentials).batch.id)
