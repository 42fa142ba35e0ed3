"""Adapters that come, change and go under load: no request gets anything but its version's tokens.

A few hundred requests; `make soak` runs thousands.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from engine.making import require_openvino

from kasa_runtime.types import FinishReason
from oracle.reference import Reference
from oracle.run import play
from oracle.schedule import Kind, make_schedule


@pytest.fixture(scope="module")
def reference(tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tiny_chat_model, tmp_path_factory.mktemp("contents"))


@pytest.mark.parametrize(
    ("executor", "mode", "num_requests"),
    [("torch", "manual", 300), ("torch", "auto", 200), ("openvino", "manual", 200)],
)
async def test_every_request_gets_what_its_version_gives_alone(
    tiny_chat_model: Path, reference: Reference, executor: str, mode: str, num_requests: int
) -> None:
    if executor == "openvino":
        require_openvino()
    seed = 20
    settings = {"seed": seed, "num_requests": num_requests, "mode": mode}
    outcome = await play(tiny_chat_model, reference, executor, **settings)
    counts = outcome.counts
    print(f"seed {seed}: {dict(counts)}")
    if outcome.wrong:
        print(*make_schedule(seed, num_requests), sep="\n")
    assert not outcome.wrong, "\n".join(outcome.wrong)
    num_finished = counts[FinishReason.LENGTH] + counts[FinishReason.STOP]
    assert num_finished > num_requests / 2
    assert counts["requests with a tie"] <= num_finished / 50
    assert all(counts[kind] for kind in Kind if kind is not Kind.REQUEST)
    assert counts["cancelled by its reader"] and counts["not found"]
    assert bool(counts["auto merge"]) is (mode == "auto")


def test_a_seed_is_a_schedule() -> None:
    assert make_schedule(1, 50) == make_schedule(1, 50) != make_schedule(2, 50)


def test_the_reference_tells_versions_apart(reference: Reference) -> None:
    prompt = list(range(3, 40))
    model = {version: reference.check(version, prompt, [7]) for version in reference.versions}
    assert all(verdict.wrong for verdict in model.values())
    first_choices = {verdict.wrong.partition("want ")[2] for verdict in model.values()}
    assert len(first_choices) == len(reference.versions)
