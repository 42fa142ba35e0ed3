"""A call without stubs: everything is learned from the server."""

from __future__ import annotations

import asyncio

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)


def generate_without_stubs(address: str) -> tuple[set[str], str]:
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = set(database.get_services())
        pool = DescriptorPool(database)
        method = pool.FindServiceByName("kasa.v1.GenerationService").FindMethodByName("Generate")
        request = GetMessageClass(method.input_type)(prompt="one two")
        call = channel.unary_unary(
            "/kasa.v1.GenerationService/Generate",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        return services, call(request).text


async def test_call_built_from_reflection(served):
    services, text = await asyncio.to_thread(generate_without_stubs, served.address)
    assert {
        "kasa.v1.GenerationService",
        "kasa.v1.AdapterService",
        "kasa.v1.ModelService",
        "grpc.health.v1.Health",
    } <= services
    assert text == "one two "
