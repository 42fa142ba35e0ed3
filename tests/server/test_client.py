from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from conftest import CONFIG
from fake_runtime import MODEL, FakeRuntime
from kasa.v1 import adapters_pb2, generation_pb2, model_pb2

from kasa_runtime import errors
from kasa_runtime.client import AsyncClient, Client
from kasa_runtime.client_channel import RETRIED
from kasa_runtime.types import (
    AdapterState,
    AdapterTier,
    ChatMessage,
    FinishReason,
    Mode,
    SamplingParams,
    StructuredOutput,
    TokenChunk,
    TokenLogprobs,
)
from server.app import Edge, Server


@pytest.fixture
async def client(served) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(served.address) as client:
        yield client


@pytest.fixture
def adapter_dir(tmp_path):
    directory = tmp_path / "fresh"
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 10_000)
    (directory / "kasa_meta.json").write_text("{}")
    (directory / "optimizer.pt").write_text("not to be sent")
    return directory


async def in_thread(served, use, **options):
    """What `use` returns when it is given a `Client`."""

    def run():
        with Client(served.address, **options) as client:
            return use(client)

    return await asyncio.to_thread(run)


async def test_both_clients_return_the_same(served, client):
    options = {"adapter": "style", "sampling": SamplingParams(logprobs=2), "prompt_logprobs": 1}
    ours = await client.generate("one two", **options)
    assert ours == await in_thread(served, lambda c: c.generate("one two", **options))
    assert ours.text == "one two "
    assert ours.finish_reason is FinishReason.STOP
    assert ours.mode is Mode.BATCHED
    assert ours.adapter == "style@abc123"
    assert ours.logprobs[1].top == ((1, -0.5), (7, -1.5))
    assert ours.prompt_logprobs == (None, TokenLogprobs(1, -0.25, ((1, -0.25),)))
    assert await client.get_model() == await in_thread(served, lambda c: c.get_model())
    assert await client.get_model() == served.runtime.model
    listed = await client.list_adapters()
    assert listed == await in_thread(served, lambda c: c.list_adapters())
    assert [info.name for info in listed] == ["broken", "style"]


async def test_a_stream_tells_of_the_prompt_once(client):
    chunks = [chunk async for chunk in client.stream("one two three", prompt_logprobs=0)]
    told = [chunk.prompt_logprobs for chunk in chunks if chunk.prompt_logprobs]
    assert [[entry and entry.token_id for entry in entries] for entries in told] == [[None, 1, 2]]
    assert chunks[0].prompt_logprobs


async def test_adapter_survives_the_wire(served, client):
    assert await client.get_adapter("style") == served.runtime.find("style")


async def test_request_arrives_as_it_was_given(served, client):
    sampling = SamplingParams(max_tokens=3, temperature=0.7, top_p=0.9, seed=0, stop=("a",))
    messages = [ChatMessage("user", "hi")]
    await client.generate(messages=messages, sampling=sampling, timeout_s=30, request_id="mine")
    await client.generate(token_ids=[1, 2], cache_salt="tenant")
    first, second = served.runtime.requests
    assert first.sampling == sampling
    assert first.messages == tuple(messages)
    assert first.deadline_s is not None
    assert first.request_id.startswith("mine/")
    assert second.token_ids == (1, 2)
    assert (first.cache_salt, second.cache_salt) == ("", "tenant")
    assert second.sampling == SamplingParams()


@pytest.mark.parametrize(
    "form",
    [
        StructuredOutput(json_schema="{}"),
        StructuredOutput(regex=""),
        StructuredOutput(choice=("a", "b")),
        StructuredOutput(grammar="start: /a/"),
    ],
)
async def test_a_structured_output_arrives_as_it_was_given(served, client, form):
    await client.generate("a", structured_output=form)
    await in_thread(served, lambda c: list(c.stream("a", structured_output=form)))
    assert [request.structured_output for request in served.runtime.requests] == [form, form]


async def test_streams(served, client):
    served.runtime.delay_s = 0.005
    chunks = [chunk async for chunk in client.stream("one two three")]
    assert "".join(chunk.text for chunk in chunks) == "one two three "
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason is FinishReason.STOP
    sync = await in_thread(served, lambda c: list(c.stream("one two three")))
    assert "".join(chunk.text for chunk in sync) == "one two three "


async def test_closing_a_stream_cancels(served, client):
    served.runtime.delay_s = 0.01
    stream = client.stream("word " * 1000)
    assert isinstance(await anext(stream), TokenChunk)
    await stream.aclose()
    await asyncio.wait_for(served.runtime.ended.wait(), 2)
    served.runtime.ended.clear()
    await in_thread(served, lambda c: next(c.stream("word " * 1000)))
    await asyncio.wait_for(served.runtime.ended.wait(), 2)


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_upload(served, client, adapter_dir, kind):
    seen = []
    options = {"progress": lambda sent, size: seen.append((sent, size))}
    if kind == "sync":
        info = await in_thread(served, lambda c: c.upload(adapter_dir, **options))
    else:
        info = await client.upload(adapter_dir, **options)
    assert info.name == "fresh"
    sent = {path.name: path.read_bytes() for path in adapter_dir.iterdir()}
    del sent["optimizer.pt"]
    assert served.runtime.uploaded == sent
    total = sum(map(len, sent.values()))
    assert seen[-1] == (total, total)
    assert len(seen) == 5  # config, three chunks of weights, meta


async def test_refused_upload_raises_what_the_server_raised(served, client, adapter_dir):
    options = {"name": "style", "expected_version": ""}
    with pytest.raises(errors.VersionConflict) as caught:
        await client.upload(adapter_dir, **options)
    assert caught.value.name == "style"
    with pytest.raises(errors.VersionConflict):
        await in_thread(served, lambda c: c.upload(adapter_dir, **options))
    with pytest.raises(errors.InvalidRequest, match=r"manifest\.name"):
        await client.upload(adapter_dir, name="../up")


async def test_directory_that_is_no_adapter_is_not_sent(client, tmp_path):
    with pytest.raises(errors.AdapterInvalid, match=r"has no adapter_config\.json"):
        await client.upload(tmp_path)


async def test_file_that_cannot_be_read_is_no_adapter(client, adapter_dir):
    weights = adapter_dir / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(
        "/proc/self/mem"
    )  # a file that nobody, root neither, can read from its start
    with pytest.raises(
        errors.AdapterInvalid, match=r"adapter_model.* cannot be read: Input/output"
    ):
        await client.upload(adapter_dir)


async def test_file_that_goes_while_others_are_sent_is_no_adapter(served, client, adapter_dir):
    def remove(sent, size):
        (adapter_dir / "kasa_meta.json").unlink(missing_ok=True)

    with pytest.raises(errors.AdapterInvalid, match=r"kasa_meta.json cannot be read: No such file"):
        await client.upload(adapter_dir, progress=remove)
    assert served.runtime.uploaded == {}


async def test_what_progress_raises_ends_the_upload(served, client, adapter_dir):
    def stop(sent, size):
        if sent == size:
            raise ZeroDivisionError("enough")

    with pytest.raises(ZeroDivisionError, match="enough"):
        await client.upload(adapter_dir, progress=stop)
    assert served.runtime.uploaded == {}


async def test_adapter_methods(client):
    loaded = await client.load_adapter("style")
    assert (loaded.state, loaded.tier) == (AdapterState.RESIDENT, AdapterTier.SLOT)
    assert not loaded.pinned
    assert (await client.load_adapter("style", pin=True)).pinned
    assert (await client.merge_adapter("style")).state is AdapterState.MERGED
    with pytest.raises(errors.AdapterInUse):
        await client.delete_adapter("style")
    await client.unmerge_adapter()
    unloaded = await client.unload_adapter("style")
    assert (unloaded.state, unloaded.tier) == (AdapterState.READY, AdapterTier.DISK)
    assert not unloaded.pinned
    assert (await client.rollback_adapter("style", "abc")).version == "abc"
    await client.delete_adapter("style")
    with pytest.raises(errors.AdapterNotFound):
        await client.get_adapter("style")


async def test_adapter_methods_of_the_sync_client(served):
    def use(client):
        states = [client.load_adapter("style", pin=True).state, client.merge_adapter("style").state]
        client.unmerge_adapter()
        states.append(client.unload_adapter("style").state)
        assert client.rollback_adapter("style").version == "0ld"
        assert client.get_adapter("broken").reason
        client.delete_adapter("style")
        assert client.tokenize("a bc") == [1, 2]
        return states

    states = [AdapterState.RESIDENT, AdapterState.MERGED, AdapterState.READY]
    assert await in_thread(served, use) == states


async def test_versions_survive_the_wire(served, client):
    versions = await client.list_adapter_versions("style")
    assert versions == await served.runtime.list_adapter_versions("style")
    assert versions == await in_thread(served, lambda c: c.list_adapter_versions("style"))


async def test_tokenize(client):
    assert await client.tokenize("a bc") == [1, 2]
    assert await client.tokenize(messages=[ChatMessage("user", "abc")]) == [3]


ERRORS = [
    errors.Overloaded("the queue is full", retry_after_s=2.5),
    errors.LimitExceeded("has its tokens", retry_after_s=0.5, name="style"),
    errors.AdapterQuarantined("was refused", name="style"),
    errors.BaseMismatch("another base", name="style"),
    errors.CapacityExceeded("rank 64 does not fit"),
    errors.EngineDead("the step thread has ended"),
    errors.InvalidRequest("prompt", "is too long"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_errors_come_back_as_they_were_raised(served, error):
    served.runtime.error = error
    client = AsyncClient(served.address, max_attempts=1)
    with pytest.raises(type(error)) as caught:
        await client.generate("one")
    assert str(caught.value) == str(error)
    assert vars(caught.value) == vars(error)
    with pytest.raises(type(error)):
        await anext(client.stream("one"))
    with pytest.raises(type(error)):
        await in_thread(served, lambda c: list(c.stream("one")), max_attempts=1)
    await client.close()


async def test_deadline_is_a_timeout_error(served, client):
    served.runtime.delay_s = 0.05
    with pytest.raises(TimeoutError):
        await client.generate("word " * 100, timeout_s=0.1)


@pytest.mark.parametrize("inputs", [{}, {"prompt": "a", "token_ids": [1]}])
async def test_exactly_one_input(client, inputs):
    with pytest.raises(errors.InvalidRequest, match="give one of prompt, messages, token_ids"):
        await client.generate(**inputs)


def fail_at_first(served, num_failures, error):
    """Have the first generations fail, before their first token."""
    generate, tries = served.runtime.generate, []

    def generate_later(request):
        tries.append(request.request_id)
        served.runtime.error = error if len(tries) <= num_failures else None
        return generate(request)

    served.runtime.generate = generate_later
    return tries


SHUTTING_DOWN = errors.ShuttingDown("draining", retry_after_s=1.0)


async def test_generations_are_tried_again_before_their_first_token(served, client):
    tries = fail_at_first(served, 2, SHUTTING_DOWN)
    assert (await client.generate("one two", request_id="mine")).text == "one two "
    assert [each.partition("/")[0] for each in tries] == ["mine"] * 3
    tries.clear()
    assert "".join([chunk.text async for chunk in client.stream("one two")]) == "one two "
    assert len(tries) == 3
    tries.clear()
    assert (await in_thread(served, lambda c: c.generate("one two"))).text == "one two "
    tries.clear()
    chunks = await in_thread(served, lambda c: list(c.stream("one two")))
    assert ("".join(chunk.text for chunk in chunks), len(tries)) == ("one two ", 3)


async def test_no_generation_is_tried_again_after_its_first_token(served, client):
    generate, tries = served.runtime.generate, []

    async def break_off(request):
        tries.append(request)
        async for chunk in generate(request):
            yield chunk
            await asyncio.sleep(0.05)  # so that it was sent
            raise errors.EngineDead("it has ended")

    served.runtime.generate = break_off
    stream = client.stream("one two")
    assert (await anext(stream)).text == "one "
    with pytest.raises(errors.EngineDead):
        await anext(stream)
    assert len(tries) == 1


async def test_not_tried_again_are_other_errors_and_what_must_not_happen_twice(served, client):
    tries = fail_at_first(served, 1, errors.Overloaded("the queue is full", retry_after_s=1))
    with pytest.raises(errors.Overloaded):
        await client.generate("one")
    assert len(tries) == 1
    deleted = []

    async def delete(name):
        deleted.append(name)
        raise SHUTTING_DOWN

    served.runtime.delete_adapter = delete
    with pytest.raises(errors.ShuttingDown):
        await client.delete_adapter("style")
    assert deleted == ["style"]


def test_all_other_methods_are_tried_again():
    files = (adapters_pb2, generation_pb2, model_pb2)
    services = [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]
    methods = {(service.name, method.name) for service in services for method in service.methods}
    retried = {(service, method) for service, names in RETRIED.items() for method in names}
    not_retried = {"UploadAdapter", "DeleteAdapter", "RollbackAdapter"}
    assert methods - retried == {("AdapterService", method) for method in not_retried}
    assert retried < methods


async def test_attempts_have_a_limit(served):
    tries = fail_at_first(served, 5, SHUTTING_DOWN)
    async with AsyncClient(served.address, max_attempts=1) as client:
        with pytest.raises(errors.ShuttingDown):
            await client.generate("one")
        assert len(tries) == 1
    async with AsyncClient(served.address, max_attempts=3) as client:
        with pytest.raises(errors.ShuttingDown):
            await client.generate("one")
        assert len(tries) == 4
    for wrong in (0, 6):
        with pytest.raises(errors.ConfigError, match="must be 1 to 5"):
            Client(served.address, max_attempts=wrong)


async def test_a_server_that_is_restarted_is_waited_for():
    edge = Edge(CONFIG)
    async with Server(FakeRuntime(edge), edge, CONFIG) as server:
        config = replace(CONFIG, grpc_port=server.grpc_port)
        client = AsyncClient(f"127.0.0.1:{server.grpc_port}")
        await client.get_model()
    asked = asyncio.create_task(client.get_model())
    await asyncio.sleep(0.2)
    assert not asked.done()
    edge = Edge(config)
    async with Server(FakeRuntime(edge), edge, config):
        assert await asked == MODEL
        await client.close()


async def test_timeout_of_all_calls(served):
    served.runtime.delay_s = 0.05
    async with AsyncClient(served.address, timeout_s=0.1) as client:
        with pytest.raises(TimeoutError):
            await client.generate("word " * 100)
        with pytest.raises(TimeoutError):
            async for _ in client.stream("word " * 100):
                pass
        assert (await client.generate("word " * 4, timeout_s=60)).finish_reason is FinishReason.STOP
    with pytest.raises(TimeoutError):
        await asyncio.to_thread(Client("192.0.2.1:1", timeout_s=0.1).get_model)


async def test_no_server_says_what_to_do():
    def use():
        with Client("127.0.0.1:1", max_attempts=2) as client:
            for call in (client.get_model, lambda: list(client.stream("one"))):
                with pytest.raises(errors.Unreachable, match=r"127\.0\.0\.1:1.*`kasa serve`"):
                    call()

    await asyncio.to_thread(use)
    async with AsyncClient("127.0.0.1:1", max_attempts=2) as client:
        with pytest.raises(errors.Unreachable, match="kasa serve"):
            await client.get_model()
        with pytest.raises(errors.Unreachable, match="kasa serve"):
            await anext(client.stream("one"))
