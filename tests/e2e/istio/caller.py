"""Makes calls from inside a pod, and prints them as JSON. Started by mesh.Caller."""

import argparse
import asyncio
import dataclasses
import json
import uuid

import grpc
from aep.ingestion.v1 import batch_service_pb2_grpc

from harness.load import Load, client_retries

HEALTH = "/grpc.health.v1.Health/Check"
REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"


class PodLoad(Load):
    """With external ids of its own: gateways outlive a test, and know what they have seen."""

    def __init__(self, address, external_ids, retries):
        super().__init__(address, external_ids, client_retries("UNAVAILABLE") if retries else None)
        if address.startswith("xds:"):
            self.channel = grpc.aio.secure_channel(address, grpc.xds_channel_credentials())
            self.stub = batch_service_pb2_grpc.BatchServiceStub(self.channel)
        create, run = self.stub.CreateBatch, uuid.uuid4().hex

        def create_batch(request, **options):
            if request.external_id:
                request.external_id = f"{run}-{request.external_id}"
            return create(request, **options)

        self.stub.CreateBatch = create_batch


async def paths(channel):
    """The code with which each of these paths is answered."""
    found = {}
    for path in [HEALTH, REFLECTION]:
        try:
            await channel.unary_unary(path)(b"", timeout=5)
            found[path] = "OK"
        except grpc.aio.AioRpcError as error:
            found[path] = error.code().name
    return found


async def main(options):
    load = PodLoad(options.address, options.ids, options.retries)
    if options.paths:
        print(json.dumps(await paths(load.channel)))
        return
    if options.wait:
        await asyncio.wait_for(load.channel.channel_ready(), 20)
        # Until a client has connections to all gateways, not only to the first.
        await asyncio.sleep(0.5)
    if options.per_second:
        await load.steady_for(options.per_second, options.count / options.per_second)
    else:
        await load.many(options.count, options.at_once, hurry=options.hurry)
    ended = await load.ended()
    for call in ended:
        # Bytes are no JSON.
        call.metadata = {k: v for k, v in call.metadata.items() if isinstance(v, str)}
    print(json.dumps([dataclasses.asdict(call) for call in ended]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=100)
    parser.add_argument("--per-second", type=int)
    parser.add_argument("--hurry", type=float)
    parser.add_argument("--ids", action="store_true")
    parser.add_argument("--retries", action="store_true")
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("--paths", action="store_true")
    asyncio.run(main(parser.parse_args()))
