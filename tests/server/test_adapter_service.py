from __future__ import annotations

import asyncio
import hashlib

import grpc
import pytest
from kasa.v1 import adapters_pb2 as pb
from kasa.v1 import adapters_pb2_grpc

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights" * 100}


def manifest_of(files=FILES, **fields):
    entries = [
        pb.UploadFile(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        for path, data in files.items()
    ]
    manifest = pb.UploadManifest(**{"name": "fresh", "files": entries, **fields})
    return pb.UploadAdapterRequest(manifest=manifest)


def chunk_of(path="adapter_config.json", offset=0, data=b"{}"):
    return pb.UploadAdapterRequest(chunk=pb.UploadChunk(path=path, offset=offset, data=data))


async def upload(served, messages):
    """Not with grpc.aio, whose client often sees INTERNAL when a server refuses early."""

    def send():
        with grpc.insecure_channel(served.address) as channel:
            return adapters_pb2_grpc.AdapterServiceStub(channel).UploadAdapter(iter(messages))

    return await asyncio.to_thread(send)


async def refused(call):
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return caught.value


async def test_upload_publishes_what_was_sent(served):
    half = len(FILES["adapter_model.safetensors"]) // 2
    weights = FILES["adapter_model.safetensors"]
    messages = [
        manifest_of(),
        chunk_of(),
        chunk_of("adapter_model.safetensors", 0, weights[:half]),
        chunk_of("adapter_model.safetensors", half, weights[half:]),
    ]
    response = await upload(served, messages)
    assert response.adapter.name == "fresh"
    assert served.runtime.uploaded == FILES
    listed = await served.adapters.ListAdapters(pb.ListAdaptersRequest())
    assert [adapter.name for adapter in listed.adapters] == ["broken", "fresh", "style"]


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "manifest"),
        ([chunk_of()], "manifest"),
        ([manifest_of(), manifest_of()], "chunk"),
        ([manifest_of(name="../up")], "manifest.name"),
        ([manifest_of(name="")], "manifest.name"),
        ([manifest_of(files={})], "manifest.files"),
        ([manifest_of({"../../etc/passwd": b""})], "manifest.files[0].path"),
        ([manifest_of({"a": b"", "sub/b": b""})], "manifest.files[1].path"),
        ([manifest_of({"/etc/passwd": b""})], "manifest.files[0].path"),
        ([manifest_of({".hidden": b""})], "manifest.files[0].path"),
        ([manifest_of(expected_version="NOT HEX")], "manifest.expected_version"),
        ([manifest_of(), chunk_of(path="other.bin")], "chunk.path"),
        ([manifest_of(), chunk_of(offset=1)], "chunk.offset"),
        ([manifest_of(), chunk_of(data=bytes(4 * 2**20 + 1))], "chunk.data"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_upload_out_of_protocol_names_the_field(served, details, messages, field):
    error = await refused(upload(served, messages))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(error)["BadRequest"].field_violations[0].field == field
    assert served.runtime.uploaded == {}


async def test_upload_with_a_bad_digest_in_the_manifest(served, details):
    request = manifest_of()
    request.manifest.files[1].sha256 = "0" * 63
    error = await refused(upload(served, [request]))
    violation = details(error)["BadRequest"].field_violations[0]
    assert violation.field == "manifest.files[1].sha256"


async def test_upload_that_names_a_file_twice(served, details):
    request = manifest_of()
    request.manifest.files.append(request.manifest.files[0])
    error = await refused(upload(served, [request]))
    assert details(error)["BadRequest"].field_violations[0].field == "manifest.files"


async def test_upload_with_other_bytes_is_data_loss(served, details):
    messages = [manifest_of(), chunk_of(data=b"[]")]
    error = await refused(upload(served, messages))
    assert error.code() is grpc.StatusCode.DATA_LOSS
    assert details(error)["ErrorInfo"].reason == "DIGEST_MISMATCH"
    assert served.runtime.uploaded == {}


async def test_upload_that_breaks_off_publishes_nothing(served):
    async def messages():
        yield manifest_of()
        yield chunk_of()
        call.cancel()

    call = served.adapters.UploadAdapter(messages())
    with pytest.raises(BaseException):  # noqa: B017 - CancelledError or its RpcError
        await call
    assert served.runtime.uploaded == {}


@pytest.mark.parametrize(
    ("expected", "code"), [(None, None), ("", "ABORTED"), ("abc123", None), ("ffff", "ABORTED")]
)
async def test_upload_onto_the_expected_version_only(served, expected, code):
    fields = {} if expected is None else {"expected_version": expected}
    weights = chunk_of("adapter_model.safetensors", 0, FILES["adapter_model.safetensors"])
    messages = [manifest_of(name="style", **fields), chunk_of(), weights]
    call = upload(served, messages)
    if code is None:
        assert (await call).adapter.version != "abc123"
    else:
        assert (await refused(call)).code().name == code


async def test_get_shows_every_field(served):
    response = await served.adapters.GetAdapter(pb.GetAdapterRequest(name="style@abc123"))
    adapter = response.adapter
    assert adapter.method == pb.ADAPTER_METHOD_KASA
    assert adapter.truncation.rule == pb.TRUNCATION_RULE_MIN_DIM
    assert adapter.truncation.rank == 8
    assert adapter.state == pb.ADAPTER_STATE_READY
    assert adapter.create_time.ToMilliseconds() == 1_700_000_000_500
    assert list(adapter.target_modules) == ["q_proj", "v_proj"]


async def test_quarantined_adapter_is_shown_with_its_reason(served):
    adapter = (await served.adapters.GetAdapter(pb.GetAdapterRequest(name="broken"))).adapter
    assert adapter.state == pb.ADAPTER_STATE_QUARANTINED
    assert adapter.reason == "adapter_config.json: no r"
    assert adapter.method == pb.ADAPTER_METHOD_UNSPECIFIED
    assert not adapter.HasField("truncation")


async def test_pages_hold_every_adapter_once_and_in_order(served):
    names, token = [], ""
    while True:
        request = pb.ListAdaptersRequest(page_size=1, page_token=token)
        page = await served.adapters.ListAdapters(request)
        assert len(page.adapters) == 1
        names.append(page.adapters[0].name)
        token = page.next_page_token
        if not token:
            break
    assert names == ["broken", "style"]


@pytest.mark.parametrize("token", ["!!!", "a", "Li4vLi4=", "\u00e9"])
async def test_page_token_that_no_page_gave_is_refused(served, details, token):
    request = pb.ListAdaptersRequest(page_token=token)
    error = await refused(served.adapters.ListAdapters(request))
    assert details(error)["BadRequest"].field_violations[0].field == "page_token"


async def test_load_merge_unmerge_rollback_delete(served):
    stub = served.adapters
    loaded = await stub.LoadAdapter(pb.LoadAdapterRequest(name="style"))
    assert loaded.adapter.state == pb.ADAPTER_STATE_RESIDENT
    merged = await stub.MergeAdapter(pb.MergeAdapterRequest(name="style"))
    assert merged.adapter.state == pb.ADAPTER_STATE_MERGED
    error = await refused(stub.DeleteAdapter(pb.DeleteAdapterRequest(name="style")))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    await stub.UnmergeAdapter(pb.UnmergeAdapterRequest())
    unloaded = await stub.UnloadAdapter(pb.UnloadAdapterRequest(name="style"))
    assert unloaded.adapter.state == pb.ADAPTER_STATE_READY
    rolled = await stub.RollbackAdapter(pb.RollbackAdapterRequest(name="style"))
    assert rolled.adapter.version == "0ld"
    await stub.DeleteAdapter(pb.DeleteAdapterRequest(name="style"))
    error = await refused(stub.GetAdapter(pb.GetAdapterRequest(name="style")))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_versions(served):
    request = pb.ListAdapterVersionsRequest(name="style")
    current, older = (await served.adapters.ListAdapterVersions(request)).versions
    assert (current.version, current.current, current.in_flight) == ("abc123", True, 2)
    assert (current.state, current.tier) == (pb.ADAPTER_STATE_READY, pb.ADAPTER_TIER_DISK)
    assert (older.version, older.current, older.size_bytes) == ("0ld", False, 1024)
    assert older.create_time.ToMicroseconds() == 500_000
    request = pb.ListAdapterVersionsRequest(name="nobody")
    error = await refused(served.adapters.ListAdapterVersions(request))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_requests_about_all_versions_take_none_in_the_name(served, details):
    for method, request in (
        ("DeleteAdapter", pb.DeleteAdapterRequest(name="style@abc123")),
        ("ListAdapterVersions", pb.ListAdapterVersionsRequest(name="style@abc123")),
        ("RollbackAdapter", pb.RollbackAdapterRequest(name="style@abc123")),
    ):
        error = await refused(getattr(served.adapters, method)(request))
        assert details(error)["BadRequest"].field_violations[0].field == "name"
