"""The whole server on a tiny model, spoken to over the wire: what clients see when all goes well,
and when it does not."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from adapter.making import make_adapter
from click.testing import CliRunner
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from kasa.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2, generation_pb2_grpc

from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.upload import MAX_UPLOAD_BYTES
from kasa_runtime.cli import cli
from kasa_runtime.client import AsyncClient
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.errors import AdapterNotFound, VersionConflict
from kasa_runtime.limits import LimitsConfig
from kasa_runtime.runtime import Runtime
from kasa_runtime.runtime_config import RuntimeConfig
from kasa_runtime.types import AdapterState, FinishReason, Mode, SamplingParams
from server.app import Edge, Server
from server.config import ServerConfig

LAYERS = ("q_proj", "k_proj", "down_proj")
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
SERVER = ServerConfig(grpc_port=0, http_port=0, drain_s=1.0)


@dataclass
class Live:
    """A running server, a client, and raw stubs."""

    client: AsyncClient
    channel: Any
    adapters_dir: Path
    address: str
    url: str

    async def fails(self, call: Any) -> tuple[grpc.StatusCode, dict[str, Any]]:
        """The code of a call that must fail, and its details by type."""
        with pytest.raises(grpc.RpcError) as caught:
            await call
        details = {}
        status = rpc_status.from_call(caught.value)
        assert status is not None
        for packed in status.details:
            name = packed.TypeName().removeprefix("google.rpc.")
            details[name] = getattr(error_details_pb2, name)()
            packed.Unpack(details[name])
        return caught.value.code(), details

    def generate(self, **fields: Any) -> Any:
        message = generation_pb2.GenerateRequest(**fields)
        return generation_pb2_grpc.GenerationServiceStub(self.channel).Generate(message)

    def on_adapter(self, method: str, **fields: Any) -> Any:
        message = getattr(adapters_pb2, f"{method}Request")(**fields)
        return getattr(adapters_pb2_grpc.AdapterServiceStub(self.channel), method)(message)

    def upload(self, messages: Iterator[Any]) -> Any:
        """From a thread: grpc.aio clients lose the status of an upload that is refused early."""

        def call() -> Any:
            with grpc.insecure_channel(self.address) as channel:
                return adapters_pb2_grpc.AdapterServiceStub(channel).UploadAdapter(messages)

        return asyncio.to_thread(call)


def write_adapter(directory: Path, model: Path, *, seed: int = 0, **options: Any) -> Path:
    base = BaseModel(model)
    options = {"base_fingerprint": base.fingerprint, **options}
    checkpoint.write(directory, make_adapter(base, LAYERS, seed=seed, **options))
    return directory


@pytest.fixture
def limits() -> LimitsConfig:
    return LimitsConfig()


@pytest.fixture
def read_only() -> bool:
    return False


@pytest.fixture
async def live(
    tiny_chat_model: Path, tmp_path: Path, limits: LimitsConfig, read_only: bool
) -> AsyncIterator[Live]:
    adapters_dir = tmp_path / "adapters"
    write_adapter(adapters_dir / "first", tiny_chat_model, seed=1)
    write_adapter(adapters_dir / "second", tiny_chat_model, seed=2, kasa=False)
    if read_only:  # whoever runs the tests may write anywhere, but not below a file
        (adapters_dir / ".kasa").touch()
    native = EngineConfig(threads=1, max_num_seqs=4, max_queue=4, max_slots=4)
    config = RuntimeConfig(
        str(tiny_chat_model), adapters_dir, poll_interval_s=0.05, limits=limits, native=native
    )
    edge = Edge(SERVER)
    runtime = await Runtime.create(config, edge)
    try:
        async with Server(runtime, edge, SERVER) as server:
            address = f"127.0.0.1:{server.grpc_port}"
            url = f"http://127.0.0.1:{server.http_port}"
            async with (
                AsyncClient(address) as client,
                grpc.aio.insecure_channel(address) as channel,
            ):
                yield Live(client, channel, adapters_dir, address, url)
    finally:
        await runtime.close()


async def eventually(condition: Any) -> None:
    """Until `condition()` (a coroutine function) is true, at most ten seconds."""
    async with asyncio.timeout(10):
        while not await condition():
            await asyncio.sleep(0.02)


async def states_of(live: Live, name: str) -> set[AdapterState]:
    """Of a name whose directory was refused while an older version is served, there are two."""
    return {i.state for i in await live.client.list_adapters() if i.name == name}


async def test_one_batch_of_base_and_adapters_answers_each_as_alone(live: Live) -> None:
    names = ["", "first", "second", "first"]
    alone = [await live.client.generate("the fox", adapter=n, sampling=GREEDY) for n in names]
    together = await asyncio.gather(
        *(live.client.generate("the fox", adapter=n, sampling=GREEDY) for n in names)
    )
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert len({a.token_ids for a in alone}) == 3  # the adapters change something
    assert together[1].adapter.startswith("first@")
    assert together[1].mode is Mode.BATCHED
    assert together[0].mode is Mode.BASE


async def test_a_directory_copied_in_is_served_without_restart(
    live: Live, tiny_chat_model: Path
) -> None:
    source = write_adapter(live.adapters_dir.parent / "elsewhere", tiny_chat_model, seed=3)
    shutil.copytree(source, live.adapters_dir / "third")
    await eventually(lambda: _is(live, "third", AdapterState.READY))
    answer = await live.client.generate("the fox", adapter="third", sampling=GREEDY)
    assert answer.adapter.startswith("third@")


async def _is(live: Live, name: str, state: AdapterState) -> bool:
    return state in await states_of(live, name)


async def test_a_torn_directory_is_quarantined_and_nothing_else_suffers(
    live: Live, tiny_chat_model: Path
) -> None:
    torn = write_adapter(live.adapters_dir.parent / "torn", tiny_chat_model, seed=3)
    weights = torn / checkpoint.WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(torn, live.adapters_dir / "torn")
    await eventually(lambda: _is(live, "torn", AdapterState.QUARANTINED))
    (info,) = [i for i in await live.client.list_adapters() if i.name == "torn"]
    assert "torn or not a safetensors file" in info.reason
    code, _ = await live.fails(live.generate(adapter="torn", prompt="the fox"))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert (await live.client.generate("the fox", adapter="first", sampling=GREEDY)).token_ids


async def test_overwriting_with_a_torn_file_leaves_the_old_version_served(
    live: Live,
) -> None:
    before = await live.client.generate("the fox", adapter="first", sampling=GREEDY)
    weights = live.adapters_dir / "first" / checkpoint.WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-100])
    await eventually(lambda: _is(live, "first", AdapterState.QUARANTINED))
    after = await live.client.generate("the fox", adapter="first", sampling=GREEDY)
    assert (after.token_ids, after.adapter) == (before.token_ids, before.adapter)


async def test_upload_replace_rollback_delete(live: Live, tiny_chat_model: Path) -> None:
    scratch = live.adapters_dir.parent
    one = write_adapter(scratch / "one", tiny_chat_model, seed=4)
    two = write_adapter(scratch / "two", tiny_chat_model, seed=5)
    first = await live.client.upload(one, name="up", expected_version="")
    second = await live.client.upload(two, name="up", expected_version=first.version)
    assert first.version != second.version
    new = await live.client.generate("the fox", adapter="up", sampling=GREEDY)
    pinned = f"up@{first.version}"
    old = await live.client.generate("the fox", adapter=pinned, sampling=GREEDY)
    assert (new.adapter, old.adapter) == (f"up@{second.version}", pinned)
    assert new.token_ids != old.token_ids
    kept = await live.client.list_adapter_versions("up")
    assert [version.version for version in kept] == [second.version, first.version]
    assert (await live.client.rollback_adapter("up")).version == first.version
    kept = await live.client.list_adapter_versions("up")
    assert [version.version for version in kept if version.current] == [first.version]
    again = await live.client.generate("the fox", adapter="up", sampling=GREEDY)
    assert again.token_ids == old.token_ids
    await live.client.delete_adapter("up")
    assert not await states_of(live, "up")


async def test_load_on_all_adapters(live: Live, tmp_path: Path) -> None:
    file, page = tmp_path / "load.json", tmp_path / "load.html"
    arguments = ["bench", "--address", live.address, "--adapters", "-,first,second", "--ignore-eos"]
    arguments += ["--rate", "40", "--requests", "12", "--max-tokens", "5"]
    arguments += ["--json", str(file), "--html", str(page)]
    result = await asyncio.to_thread(CliRunner().invoke, cli, arguments)
    report = json.loads(file.read_text())
    # At most four are queued: what more came was refused, and is counted so.
    assert report["errors"].keys() <= {"OVERLOADED"}
    num_failed = sum(report["errors"].values())
    assert result.exit_code == (1 if num_failed else 0), result.output
    good = report["all"]["num_requests"] - num_failed
    assert report["all"]["num_requests"] == 12 and good > 0
    assert report["all"]["output_tokens"] == 5 * good
    assert 0 < report["all"]["ttft_s"]["p50"] < report["all"]["e2e_s"]["p50"]
    assert {each["adapter"] for each in report["adapters"]} <= {"", "first", "second"}
    assert "<svg" in page.read_text()


async def test_merge_and_unmerge_while_others_are_served(live: Live) -> None:
    names = ["", "first", "second"]
    before = [await live.client.generate("the fox", adapter=n, sampling=GREEDY) for n in names]
    await live.client.merge_adapter("first")
    merged = await asyncio.gather(
        *(live.client.generate("the fox", adapter=n, sampling=GREEDY) for n in names)
    )
    assert [a.token_ids for a in merged] == [a.token_ids for a in before]
    assert [a.mode for a in merged] == [Mode.BASE, Mode.MERGED, Mode.BATCHED]
    await live.client.unmerge_adapter()
    assert await states_of(live, "first") == {AdapterState.RESIDENT}


async def test_unknown_adapter_is_not_found_and_named(live: Live) -> None:
    code, details = await live.fails(live.generate(adapter="nobody", prompt="the fox"))
    assert code is grpc.StatusCode.NOT_FOUND
    assert details["ResourceInfo"].resource_name == "nobody"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x", "sampling": {"temperature": -1.0}}, "sampling.temperature"),
        ({"prompt": "x", "sampling": {"temperature": float("nan")}}, "sampling.temperature"),
        ({"prompt": "x", "sampling": {"top_p": 1.5}}, "sampling.top_p"),
        ({"prompt": "x", "sampling": {"max_tokens": 100_000}}, "sampling.max_tokens"),
        ({"tokens": {"ids": [100_000]}}, "tokens.ids"),
        ({"prompt": "x" * 1000}, "prompt"),
        ({"prompt": "x", "adapter": "../../etc"}, "adapter"),
    ],
)
async def test_a_bad_field_is_named(live: Live, fields: dict[str, Any], field: str) -> None:
    code, details = await live.fails(live.generate(**fields))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = details["BadRequest"].field_violations
    assert violation.field == field
    assert violation.description


async def test_a_full_queue_says_when_to_retry(live: Live) -> None:
    long = {"prompt": "the fox", "sampling": {"max_tokens": 100, "ignore_eos": True}}
    running = [asyncio.ensure_future(live.generate(**long)) for _ in range(8)]
    await eventually(lambda: _in_flight(live, 8))
    code, details = await live.fails(live.generate(**long))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details["RetryInfo"].retry_delay.ToTimedelta().total_seconds() > 0
    answers = await asyncio.gather(*running)
    assert all(a.usage.completion_tokens == 100 for a in answers)


@pytest.mark.parametrize("limits", [LimitsConfig(adapter_limit=("first=1", "second=:1"))])
async def test_an_adapter_at_its_limit_says_when_to_retry(live: Live) -> None:
    long = {"prompt": "the fox", "sampling": {"max_tokens": 100, "ignore_eos": True}}
    both = [asyncio.ensure_future(live.generate(**long, adapter="first")) for _ in range(2)]
    await asyncio.wait(both)
    [refused] = [call for call in both if call.exception()]
    refusals = {"first": await live.fails(refused)}
    await live.generate(**long, adapter="second")
    refusals["second"] = await live.fails(live.generate(**long, adapter="second"))
    for name, (code, details) in refusals.items():
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details["ErrorInfo"].reason == "LIMIT_EXCEEDED"
        assert details["ErrorInfo"].metadata["adapter"] == name
        assert 0 < details["RetryInfo"].retry_delay.ToTimedelta().total_seconds() < 103
    await live.generate(**long)
    await live.generate(**long, adapter="first")


async def _in_flight(live: Live, count: int) -> bool:
    async with httpx.AsyncClient() as http:
        text = (await http.get(f"{live.url}/metrics")).text
    names = ("kasa_num_requests_running", "kasa_num_requests_waiting")
    values = [float(line.split()[1]) for line in text.splitlines() if line.startswith(names)]
    return sum(values) >= count


async def test_an_adapter_of_another_base_is_refused(live: Live, tiny_chat_model: Path) -> None:
    scratch = live.adapters_dir.parent / "foreign"
    write_adapter(scratch, tiny_chat_model, base_fingerprint="ab" * 32)
    code, details = await live.fails(live.upload(messages(scratch, "foreign")))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert details["PreconditionFailure"].violations[0].type == "BASE_MISMATCH"
    assert not await states_of(live, "foreign")


async def test_a_wrong_digest_is_data_loss(live: Live, tiny_chat_model: Path) -> None:
    directory = write_adapter(live.adapters_dir.parent / "lost", tiny_chat_model)
    sent = messages(directory, "lost", digest="0" * 64)
    code, _ = await live.fails(live.upload(sent))
    assert code is grpc.StatusCode.DATA_LOSS
    assert not await states_of(live, "lost")


@pytest.mark.parametrize("name", ["../escape", "UPPER", "a/b", ".kasa", "", "x" * 64])
async def test_a_bad_name_is_refused(live: Live, tiny_chat_model: Path, name: str) -> None:
    directory = write_adapter(live.adapters_dir.parent / "named", tiny_chat_model)
    code, _ = await live.fails(live.upload(messages(directory, name)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_path_that_leaves_the_directory_is_refused(
    live: Live, tiny_chat_model: Path
) -> None:
    directory = write_adapter(live.adapters_dir.parent / "path", tiny_chat_model)
    sent = messages(directory, "path", rename={checkpoint.CARD_FILE: "../../escape.md"})
    code, _ = await live.fails(live.upload(sent))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert not (live.adapters_dir.parent.parent / "escape.md").exists()


# --- refusals while requests run ------------------------------------------------------------------

TAKE_VERSIONS = ("GetAdapter", "LoadAdapter", "UnloadAdapter", "MergeAdapter")
TAKE_NAMES = ("DeleteAdapter", "RollbackAdapter")


@asynccontextmanager
async def under_load(live: Live) -> AsyncIterator[None]:
    """Meanwhile the base and both adapters are asked again and again, and answer as before; in the
    end there are the same adapters as before, and nothing is left of what was refused."""
    names = ("", "first", "second")

    async def ask(name: str) -> tuple[int, ...]:
        answer = await live.client.generate("the fox", adapter=name, sampling=GREEDY)
        return answer.token_ids

    expected = {name: await ask(name) for name in names}
    before = {info.name: info.version for info in await live.client.list_adapters()}
    over = asyncio.Event()

    async def keep_asking(name: str) -> None:
        while True:
            assert await ask(name) == expected[name]
            if over.is_set():
                return

    tasks = [asyncio.create_task(keep_asking(name), name=f"ask {name}") for name in names]
    try:
        yield
    finally:
        over.set()
        await asyncio.gather(*tasks)
    assert {info.name: info.version for info in await live.client.list_adapters()} == before
    assert not list(live.adapters_dir.glob(".kasa/staging/*"))


async def test_names_and_versions_that_are_not_there_or_not_legal(live: Live) -> None:
    other = {info.name: info.version for info in await live.client.list_adapters()}["second"]
    of_another = f"first@{other}"
    unknown = [(method, {"name": "nobody"}) for method in (*TAKE_VERSIONS, *TAKE_NAMES)]
    unknown += [(method, {"name": of_another}) for method in TAKE_VERSIONS]
    unknown += [("RollbackAdapter", {"name": "first", "version": other})]
    async with under_load(live):
        for method, fields in unknown:
            code, details = await live.fails(live.on_adapter(method, **fields))
            assert (method, code) == (method, grpc.StatusCode.NOT_FOUND)
            name = fields["name"].partition("@")[0]
            assert details["ResourceInfo"].resource_name == name
        illegal = [
            *((m, n) for m in (*TAKE_VERSIONS, *TAKE_NAMES) for n in ("", "UPPER", "../up", "a b")),
            *((method, of_another) for method in TAKE_NAMES),
            *((method, "first@LATEST") for method in TAKE_VERSIONS),
        ]
        for method, name in illegal:
            code, details = await live.fails(live.on_adapter(method, name=name))
            assert (method, name, code) == (method, name, grpc.StatusCode.INVALID_ARGUMENT)
            assert details["BadRequest"].field_violations[0].field == "name"
        call = live.on_adapter("RollbackAdapter", name="first", version="LATEST")
        assert (await live.fails(call))[1]["BadRequest"].field_violations[0].field == "version"
        code, _ = await live.fails(live.on_adapter("RollbackAdapter", name="first"))
        assert code is grpc.StatusCode.NOT_FOUND  # it never had another version


async def test_what_is_merged_is_neither_deleted_nor_unloaded(live: Live) -> None:
    async with under_load(live):
        await live.client.merge_adapter("first")
        for method in ("DeleteAdapter", "UnloadAdapter"):
            code, details = await live.fails(live.on_adapter(method, name="first"))
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert details["PreconditionFailure"].violations[0].type == "ADAPTER_IN_USE"
        assert await states_of(live, "first") == {AdapterState.MERGED}
        await live.client.unmerge_adapter()


@pytest.mark.parametrize("read_only", [True])
async def test_a_directory_that_cannot_be_written_is_served_and_not_changed(
    live: Live, tiny_chat_model: Path
) -> None:
    directory = write_adapter(live.adapters_dir.parent / "new", tiny_chat_model, seed=3)
    version = (await live.client.get_adapter("first")).version
    async with under_load(live):
        for call in (
            live.upload(messages(directory, "new")),
            live.on_adapter("DeleteAdapter", name="first"),
            live.on_adapter("RollbackAdapter", name="first", version=version),
        ):
            code, details = await live.fails(call)
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert details["ErrorInfo"].reason == "STORE_READ_ONLY"


async def test_uploads_that_are_not_what_they_announced(live: Live, tiny_chat_model: Path) -> None:
    directory = write_adapter(live.adapters_dir.parent / "new", tiny_chat_model, seed=3)
    sound = list(messages(directory, "new"))
    config, weights = (
        next(i for i, m in enumerate(sound) if m.chunk.path == path)
        for path in (checkpoint.CONFIG_FILE, checkpoint.WEIGHTS_FILE)
    )

    def changed(index: int, **chunk: Any) -> list[Any]:
        other = [adapters_pb2.UploadAdapterRequest.FromString(m.SerializeToString()) for m in sound]
        for field, value in chunk.items():
            setattr(other[index].chunk, field, value)
        return other

    data = sound[weights].chunk.data
    huge = changed(0)
    huge[0].manifest.files[0].size = MAX_UPLOAD_BYTES + 1
    refused = [
        (huge, "INVALID_REQUEST"),
        (changed(weights, data=data[:-1]), "DIGEST_MISMATCH"),
        (changed(weights, data=data + b"0"), "DIGEST_MISMATCH"),
        (changed(weights, data=bytes([data[0] ^ 1]) + data[1:]), "DIGEST_MISMATCH"),
        (changed(weights, offset=1), "INVALID_REQUEST"),
        (changed(config, path="other.json"), "INVALID_REQUEST"),
        ([m for i, m in enumerate(sound) if i != weights], "DIGEST_MISMATCH"),
        (sound[:1], "DIGEST_MISMATCH"),
    ]
    async with under_load(live):
        for sent, reason in refused:
            _, details = await live.fails(live.upload(iter(sent)))
            assert details["ErrorInfo"].reason == reason
        await _break_off(live, sound[: weights + 1])
        code, _ = await live.fails(live.on_adapter("GetAdapter", name="new"))
        assert code is grpc.StatusCode.NOT_FOUND
        await eventually(lambda: _nothing_staged(live))


async def _break_off(live: Live, sent: list[Any]) -> None:
    """Send some messages of an upload and vanish, once the server has begun with them."""

    async def begun() -> bool:
        return not await _nothing_staged(live)

    async def begin() -> AsyncIterator[Any]:
        for message in sent:
            yield message
        await eventually(begun)
        call.cancel()

    call = adapters_pb2_grpc.AdapterServiceStub(live.channel).UploadAdapter(begin())
    with pytest.raises((asyncio.CancelledError, grpc.RpcError)):
        await call


async def _nothing_staged(live: Live) -> bool:
    return not list(live.adapters_dir.glob(".kasa/staging/*"))


async def test_an_upload_onto_another_version_than_expected(
    live: Live, tiny_chat_model: Path
) -> None:
    directory = write_adapter(live.adapters_dir.parent / "new", tiny_chat_model, seed=3)
    async with under_load(live):
        for expected in ("", "0123456789abcdef"):
            sent = messages(directory, "first", expected_version=expected)
            code, details = await live.fails(live.upload(sent))
            assert code is grpc.StatusCode.ABORTED
            assert details["ErrorInfo"].reason == "VERSION_CONFLICT"


async def test_an_upload_to_a_name_that_is_being_deleted(live: Live, tiny_chat_model: Path) -> None:
    scratch = live.adapters_dir.parent
    old = write_adapter(scratch / "old", tiny_chat_model, seed=3)
    new = write_adapter(scratch / "new", tiny_chat_model, seed=4)
    async with under_load(live):
        for _ in range(10):
            version = (await live.client.upload(old, name="up")).version
            uploaded, deleted = await asyncio.gather(
                live.client.upload(new, name="up", expected_version=version),
                live.client.delete_adapter("up"),
                return_exceptions=True,
            )
            assert deleted is None
            assert isinstance(uploaded, VersionConflict) or uploaded.name == "up"
            with pytest.raises(AdapterNotFound):  # the deletion was the last, or the only one
                await live.client.generate("the fox", adapter="up", sampling=GREEDY)


async def test_a_cancelled_stream_frees_its_cache_at_once(live: Live) -> None:
    sampling = SamplingParams(max_tokens=110, ignore_eos=True)
    stream = live.client.stream("the fox", adapter="first", sampling=sampling)
    first = await anext(stream)
    assert first.finish_reason is None
    await stream.aclose()
    await eventually(lambda: _idle(live))


async def _idle(live: Live) -> bool:
    async with httpx.AsyncClient() as http:
        text = (await http.get(f"{live.url}/metrics")).text
    busy = ("kasa_num_requests_running", "kasa_num_requests_waiting", "kasa_kv_cache_usage_ratio")
    values = [float(line.split()[1]) for line in text.splitlines() if line.startswith(busy)]
    return len(values) == 3 and not any(values)


async def test_a_deadline_ends_a_generation(live: Live) -> None:
    with pytest.raises(TimeoutError):
        await live.client.generate(
            "the fox", sampling=SamplingParams(max_tokens=115, ignore_eos=True), timeout_s=0.05
        )
    await eventually(lambda: _idle(live))


async def test_streams_say_how_they_ended(live: Live) -> None:
    chunks = [c async for c in live.client.stream("the fox", adapter="first", sampling=GREEDY)]
    whole = await live.client.generate("the fox", adapter="first", sampling=GREEDY)
    assert "".join(c.text for c in chunks) == whole.text
    assert chunks[-1].finish_reason is FinishReason.LENGTH
    assert chunks[-1].usage == whole.usage


async def test_probes_and_per_adapter_latency_over_http(live: Live) -> None:
    await live.client.generate("the fox", adapter="first", sampling=GREEDY)
    async with httpx.AsyncClient() as http:
        assert (await http.get(f"{live.url}/healthz")).status_code == 200
        assert (await http.get(f"{live.url}/readyz")).status_code == 200
        text = (await http.get(f"{live.url}/metrics")).text
    assert 'kasa_time_to_first_token_seconds_count{adapter="first"} 1.0' in text
    assert 'kasa_adapter_resident{adapter="first",tier="slot"} 1.0' in text


def messages(
    directory: Path,
    name: str,
    *,
    digest: str = "",
    rename: dict[str, str] | None = None,
    expected_version: str | None = None,
) -> Iterator[Any]:
    """An upload by hand: the manifest, then each file as one chunk. `digest` replaces the true
    ones; `rename` adds files under other paths."""
    paths = {p.name: p.read_bytes() for p in sorted(directory.iterdir())}
    for target in (rename or {}).values():
        paths[target] = b"text"
    files = [
        adapters_pb2.UploadFile(
            path=path, size=len(data), sha256=digest or hashlib.sha256(data).hexdigest()
        )
        for path, data in paths.items()
    ]
    manifest = adapters_pb2.UploadManifest(
        name=name, files=files, expected_version=expected_version
    )
    yield adapters_pb2.UploadAdapterRequest(manifest=manifest)
    for path, data in paths.items():
        chunk = adapters_pb2.UploadChunk(path=path, offset=0, data=data)
        yield adapters_pb2.UploadAdapterRequest(chunk=chunk)
