"""transformers' `generate` on the base model."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from benchmarks.peers.child import Arrivals, Peer, serve


class Transformers(Peer):
    packages: tuple[str, ...] = ("transformers", "torch")

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
        self._model = model.eval()

    def run(self, prompts: list[list[int]], adapters: list[str], tokens: int) -> Arrivals:
        ids = torch.tensor(prompts)
        arrivals = Arrivals(len(prompts))
        clock = Clock()
        with torch.inference_mode():
            generated = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([clock]),
                **self._adapter_options(adapters),
            )
        for i, row in enumerate(generated[:, ids.shape[1] :].tolist()):
            for token_id, at_s in zip(row, clock.steps_s, strict=True):
                arrivals.add(i, [token_id], at_s)
        return arrivals

    def _adapter_options(self, adapters: list[str]) -> dict[str, Any]:
        return {}


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Never stops; notes when it was asked, which is once per step."""

    def __init__(self) -> None:
        self.steps_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.steps_s.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


if __name__ == "__main__":
    serve(Transformers)
