"""The engine under a flood for one adapter."""

from __future__ import annotations

import asyncio
from pathlib import Path

from engine.making import MemoryTails, collect, prompt, request, running, until
from kasa_runtime.adapter.lora import AdapterWeights
from kasa_runtime.engine.base import EngineOutput, EngineRequest
from kasa_runtime.engine.native.engine import NativeEngine

NUM_OUTPUTS = 8
PLACES = 8


def record_steps(engine: NativeEngine) -> list[list[str]]:
    """Which requests got tokens, step by step from now on."""
    steps: list[list[str]] = []
    step = engine.step

    def recorded() -> list[EngineOutput]:
        outputs = step()
        steps.append([output.request_id for output in outputs])
        return outputs

    engine.step = recorded  # type: ignore[method-assign]
    return steps


async def test_five_requests_after_a_flood_of_two_hundred_are_served_at_once(
    tiny_llama: Path, adapters: list[AdapterWeights], tails: MemoryTails
) -> None:
    def ask(adapter: AdapterWeights, client: str, i: int) -> EngineRequest:
        name = f"{client}{i}"
        return request(name, prompt(5, i), NUM_OUTPUTS, adapter.key, client=client, ignore_eos=True)

    flood = [ask(adapters[0], "a", i) for i in range(200)]
    few = [ask(adapters[1], "b", i) for i in range(5)]
    arrival: list[int] = []
    async with running(tiny_llama, tails, adapters[:2], max_num_seqs=PLACES) as engine:
        steps = record_steps(engine)
        flooding = [asyncio.create_task(collect(engine, wanted)) for wanted in flood]
        await until(lambda: len(steps) > 20)
        engine._inbox.put(lambda: arrival.append(len(steps)))
        results = await asyncio.gather(*(collect(engine, wanted) for wanted in few))
        await asyncio.gather(*flooding)
    assert [len(result.token_ids) for result in results] == [NUM_OUTPUTS] * 5
    for wanted in few:
        first = next(i for i, names in enumerate(steps) if wanted.request_id in names)
        # By then every place was given back once; in the order of arrival it would be some 180.
        assert first - arrival[0] <= 2 * NUM_OUTPUTS
