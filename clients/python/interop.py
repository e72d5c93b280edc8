"""Makes the calls that tests/e2e/clients asks for: a line of JSON in, a line out."""

import json
import sys
from pathlib import Path

import grpc
from aep.ingestion.v1 import batch_service_pb2 as pb
from aep.ingestion.v1 import batch_service_pb2_grpc
from google.protobuf import descriptor_pb2, descriptor_pool, json_format
from google.rpc import error_details_pb2  # noqa: F401 (so that details are known by name)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_status import rpc_status

SERVICE_CONFIG = Path(__file__).with_name("service-config.json").read_text()
COMPRESSIONS = {"gzip": grpc.Compression.Gzip, "deflate": grpc.Compression.Deflate}
channels: dict[tuple, grpc.Channel] = {}


def channel(order: dict) -> grpc.Channel:
    key = (order["address"], order.get("keepalive"))
    if key not in channels:
        options = [("grpc.service_config", SERVICE_CONFIG)]
        if key[1]:
            options += [
                ("grpc.keepalive_time_ms", key[1] * 1000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.max_pings_without_data", 0),
            ]
        channels[key] = grpc.insecure_channel(key[0], options)
    return channels[key]


def call(order: dict) -> dict:
    request, response = (getattr(pb, order["method"] + kind) for kind in ("Request", "Response"))
    if "path" in order:
        method = channel(order).unary_unary(
            order["path"],
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
    else:
        stub = batch_service_pb2_grpc.BatchServiceStub(channel(order))
        method = getattr(stub, order["method"])
    call = method.future(
        json_format.ParseDict(order["request"], request()),
        timeout=order["seconds"],
        metadata=[tuple(pair) for pair in order["metadata"]],
        compression=COMPRESSIONS.get(order.get("compression")),
    )
    if "cancelAfter" in order:
        try:
            call.result(timeout=order["cancelAfter"])
        except grpc.FutureTimeoutError:
            call.cancel()
    told = {"code": call.code().name, "message": call.details() or ""}
    if call.code() == grpc.StatusCode.OK:
        told["answer"] = json_format.MessageToDict(call.result())
    elif not call.cancelled() and (status := rpc_status.from_call(call)):
        told["status"] = json_format.MessageToDict(status)
    for name, metadata in [
        ("headers", () if call.cancelled() else call.initial_metadata()),
        ("trailers", () if call.cancelled() else call.trailing_metadata()),
    ]:
        told[name] = {key: value for key, value in metadata or () if isinstance(value, str)}
    return told


def check(order: dict) -> dict:
    stub = health_pb2_grpc.HealthStub(channel(order))
    request = health_pb2.HealthCheckRequest(service=order["service"])
    answer = stub.Check(request, timeout=order["seconds"])
    return json_format.MessageToDict(answer)


def watch(order: dict) -> dict:
    stub = health_pb2_grpc.HealthStub(channel(order))
    request = health_pb2.HealthCheckRequest(service=order["service"])
    answers = stub.Watch(request, timeout=order["seconds"])
    first = next(answers)
    answers.cancel()
    return json_format.MessageToDict(first)


def reflect(order: dict) -> dict:
    assert order["version"] == "v1alpha", "grpcio-reflection has no other version"
    database = ProtoReflectionDescriptorDatabase(channel(order))
    service = descriptor_pool.DescriptorPool(database).FindServiceByName(order["service"])
    methods = [method.name for method in service.methods]
    return {"services": list(database.get_services()), "methods": methods}


def load(order: dict) -> dict:
    """Adds a descriptor set's files to those of the generated code, if they are not there."""
    pool = descriptor_pool.Default()
    for file in descriptor_pb2.FileDescriptorSet.FromString(Path(order["set"]).read_bytes()).file:
        try:
            pool.FindFileByName(file.name)
        except KeyError:
            pool.AddSerializedFile(file.SerializeToString())
    return {name: pool.FindFileContainingSymbol(name).name for name in order["names"]}


DO = {"call": call, "check": check, "watch": watch, "reflect": reflect, "load": load}
for line in sys.stdin:
    order = json.loads(line)
    try:
        told = DO[order["do"]](order)
    except grpc.RpcError as error:
        told = {"code": error.code().name, "message": error.details()}
    print(json.dumps(told), flush=True)
