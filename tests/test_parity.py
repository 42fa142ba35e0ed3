"""Parity with PEFT and transformers on a real model: the same logits, the same tokens.

The references are PEFT's own KaSA and LoRA, the authors' formula evaluated directly, and the bare
transformers model; each runs alone, on its own copy of the weights. The engine serves all of them
at once from one copy.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.making import require_openvino
from safetensors.torch import save_file
from torch import Tensor, nn

from kasa_runtime.adapter import checkpoint
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.lora import AdapterWeights, fold
from kasa_runtime.adapter.tails import TailCache
from kasa_runtime.engine.base import EngineRequest
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.engine.factory import make_executor
from kasa_runtime.engine.native.engine import NativeEngine
from kasa_runtime.engine.native.executor import NO_SLOT, PackedBatch, SequenceSlice
from kasa_runtime.types import SamplingParams

pytestmark = pytest.mark.real_model

TOLERANCE = 1e-3
NUM_TOKENS = 32
LOGIT_PROMPTS = 8  # of the 16: logits at every position of the first so many
MERGED_PROMPTS = 4
BATCH = 8

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain why the sky is blue in one sentence.",
    "List three fruits that are red.",
    "How do I boil an egg?",
    "Translate to Spanish: the cat sleeps.",
    "Who wrote Hamlet?",
    "Give me a synonym of happy.",
]
BEGINNINGS = [
    "Once upon a time, in a village by the river,",
    "The three most important ideas of physics are",
    "def fibonacci(n):\n    ",
    "Dear Sir or Madam,\n\nI am writing to",
    "Ingredients: flour, eggs, milk.\n\nMethod: First,",
    "In 1969, the first humans landed on",
    "The difference between a frog and a toad is that",
    "Breaking news: scientists have discovered",
]


@dataclass(frozen=True)
class Served:
    """What one adapter (or the base, "") gives: `logits` per prompt, (tokens, vocab) each."""

    logits: list[Tensor]
    token_ids: list[list[int]]


@dataclass(frozen=True)
class Found:
    """The engine's answers, by adapter: its rows alone, among others, and while one is merged."""

    alone: dict[str, Served]
    mixed: dict[str, Served]
    merged: dict[str, Served]


# --- the adapters and their references -----------------------------------------------------------

PEFT_ADAPTERS: dict[str, dict[str, Any]] = {
    "square": {  # truncation of square weights
        "target_modules": ["q_proj", "o_proj"],
        "r": 8,
        "lora_alpha": 16,
        "kasa_config": {},
    },
    # Middle layers: where the first ones, which make the huge activations of a prompt's beginning,
    # are cut in all their weights, float32 itself is off by 1e-3 there, in PEFT as in the engine.
    "rectangular": {
        "target_modules": ["k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
        "layers_to_transform": [3, 10, 17, 24],
        "r": 8,
        "lora_alpha": 16,
        "kasa_config": {},
    },
    "patterns": {
        "target_modules": "all-linear",
        "exclude_modules": r".*\.layers\.([0-9]|1[0-9]|2[0-6])\..*",
        "r": 8,
        "lora_alpha": 16,
        "rank_pattern": {"q_proj": 4, "layers.28.mlp.down_proj": 16, "v_proj": 12},
        "alpha_pattern": {"k_proj": 24, "layers.29.mlp.up_proj": 8},
        "kasa_config": {},
    },
    "lora": {"target_modules": "all-linear", "r": 16, "lora_alpha": 16},
}
AUTHORS_LAYERS = (3, 14, 25)
AUTHORS_RANK, AUTHORS_ALPHA = 8, 16
NAMES = ["", *PEFT_ADAPTERS, "authors"]
B_SCALE = {"square": 0.02, "rectangular": 0.02, "patterns": 0.02, "lora": 0.01, "authors": 0.02}


def load_base(model_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def make_with_peft(model_dir: Path, directory: Path, name: str) -> Any:
    """Let PEFT make and save an adapter whose B is not zero; the model that has it."""
    from peft import KasaConfig, LoraConfig, get_peft_model

    options = dict(PEFT_ADAPTERS[name])
    if "kasa_config" in options:
        options["kasa_config"] = KasaConfig(**options["kasa_config"])
    torch.manual_seed(0)
    model = get_peft_model(
        load_base(model_dir), LoraConfig(task_type="CAUSAL_LM", **options)
    ).eval()
    for key, parameter in model.named_parameters():
        if ".lora_B." in key:
            nn.init.normal_(parameter, std=B_SCALE[name])
    model.save_pretrained(directory)
    return model


@torch.no_grad()
def make_as_the_authors(model_dir: Path, directory: Path) -> Any:
    """Save an adapter as the authors' code does (no kasa_config), and evaluate their formula:
    W = U[:, :n-r] S[:n-r] V[:, :n-r]^T + s B diag(d) A, with n = in_features."""
    model = load_base(model_dir)
    r, s = AUTHORS_RANK, AUTHORS_ALPHA / AUTHORS_RANK
    draw = torch.Generator().manual_seed(5)
    tensors: dict[str, Tensor] = {}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or name.rpartition(".")[2] not in targets:
            continue
        if int(name.split(".")[2]) not in AUTHORS_LAYERS:
            continue
        a = (2 * torch.rand(r, layer.in_features, generator=draw) - 1) / layer.in_features**0.5
        b = B_SCALE["authors"] * torch.randn(layer.out_features, r, generator=draw)
        d = torch.randn(r, generator=draw)
        prefix = f"base_model.model.{name}"
        tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
        tensors[f"{prefix}.lora_diag"] = d
        u, sigma, vt = torch.linalg.svd(layer.weight.double(), full_matrices=False)
        n = layer.in_features - r  # more than there are where the weight is wide: nothing is cut
        world = (u[:, :n] * sigma[:n]) @ vt[:n]
        layer.weight.copy_(world + s * (b * d).double() @ a.double())
    directory.mkdir()
    save_file(tensors, directory / checkpoint.WEIGHTS_FILE)
    raw = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": AUTHORS_ALPHA,
        "target_modules": targets,
        "layers_to_transform": list(AUTHORS_LAYERS),
    }
    (directory / checkpoint.CONFIG_FILE).write_text(json.dumps(raw))
    return model


@torch.inference_mode()
def reference(model: Any, prompts: Sequence[Sequence[int]]) -> Served:
    """transformers' logits, prompt by prompt, and its greedy tokens, in a batch padded left."""
    logits = [model(input_ids=torch.tensor([list(p)])).logits[0] for p in prompts[:LOGIT_PROMPTS]]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=NUM_TOKENS
    )
    return Served(logits, [until_end(row) for row in out[:, longest:].tolist()])


def until_end(token_ids: list[int], eos: int = 2) -> list[int]:
    return token_ids[: token_ids.index(eos) + 1] if eos in token_ids else token_ids


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[list[int]]:
    from kasa_runtime.tokenizer import Tokenizer
    from kasa_runtime.types import ChatMessage

    tokenizer = Tokenizer(smollm2)
    chats = [tokenizer.encode_chat([ChatMessage("user", q)]) for q in QUESTIONS]
    plain = [tokenizer.encode(b) for b in BEGINNINGS]
    return [p for pair in zip(chats, plain, strict=True) for p in pair]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def wanted(smollm2: Path, prompts: list[list[int]], trained: Path) -> dict[str, Served]:
    """The references, by adapter. Leaves the adapters in `trained`."""
    torch.set_num_threads(1)
    answers = {"": reference(load_base(smollm2), prompts)}
    for name in PEFT_ADAPTERS:
        answers[name] = reference(make_with_peft(smollm2, trained / name, name), prompts)
    answers["authors"] = reference(make_as_the_authors(smollm2, trained / "authors"), prompts)
    return answers


# --- the engine ----------------------------------------------------------------------------------


class Serving:
    """One engine, with all adapters loaded, and its executor."""

    def __init__(
        self, model_dir: Path, trained: Path, prompts: list[list[int]], executor: Any
    ) -> None:
        settings = EngineConfig(
            executor=executor,
            threads=1,
            device="cpu",
            dtype="float32",
            max_num_seqs=16,
            prefix_caching=False,  # `_logits` writes into blocks without asking the block manager
        )
        self._prompts = prompts
        self._base = BaseModel(model_dir)
        self._tails = TailCache(self._base)
        self._trained = trained
        self._executor = make_executor(model_dir, settings)
        self._engine = NativeEngine(settings, lambda: self._executor, self._tails)
        self._slots = {"": NO_SLOT}

    async def run(self) -> Found:
        await self._engine.start()
        try:
            for name in NAMES[1:]:
                await self._engine.load_adapter(self._read(name))
                self._slots[name] = len(self._slots) - 1
            pairs = [(name, i) for i in range(len(self._prompts)) for name in NAMES]
            alone: dict[str, Served] = {}
            for name in NAMES:
                alone |= await self._serve([pair for pair in pairs if pair[0] == name], 2 * BATCH)
            mixed = await self._serve(pairs, BATCH)
            await self._engine.merge_adapter("patterns")
            merged = await self._serve(pairs[: len(NAMES) * MERGED_PROMPTS], BATCH)
        finally:
            await self._engine.close()
        return Found(alone, mixed, merged)

    def _read(self, name: str) -> AdapterWeights:
        return fold(checkpoint.read(self._trained / name, self._base), name)

    async def _serve(self, pairs: Sequence[tuple[str, int]], together: int) -> dict[str, Served]:
        """Logits and tokens of (adapter, prompt) pairs, so many `together` and in this order, so
        that neighbours share steps."""
        logits: dict[tuple[str, int], Tensor] = {}
        in_logits = [pair for pair in pairs if pair[1] < LOGIT_PROMPTS]
        for first in range(0, len(in_logits), together):
            logits |= self._logits(in_logits[first : first + together])
        places = asyncio.Semaphore(together)
        tokens = await asyncio.gather(*(self._generate(places, *pair) for pair in pairs))
        by_pair = dict(zip(pairs, tokens, strict=True))
        return {
            name: Served(
                [logits[pair] for pair in in_logits if pair[0] == name],
                [by_pair[pair] for pair in pairs if pair[0] == name],
            )
            for name in dict.fromkeys(name for name, _ in pairs)
        }

    def _logits(self, pairs: Sequence[tuple[str, int]]) -> dict[tuple[str, int], Tensor]:
        """One step of whole prompts."""
        parts, block, block_size = [], 0, self._executor.block_size
        for name, i in pairs:
            num_blocks = -(-len(self._prompts[i]) // block_size)
            table = range(block, block + num_blocks)
            parts.append(SequenceSlice(len(self._prompts[i]), 0, table, self._slots[name]))
            block += num_blocks
        token_ids = [token for _, i in pairs for token in self._prompts[i]]
        batch = PackedBatch.pack(token_ids, parts, list(range(len(token_ids))))
        rows = self._executor.run(batch).clone().split([part.num_tokens for part in parts])
        return dict(zip(pairs, rows, strict=True))

    async def _generate(self, places: asyncio.Semaphore, name: str, i: int) -> list[int]:
        sampling = SamplingParams(max_tokens=NUM_TOKENS)
        request = EngineRequest(f"{name}/{i}", tuple(self._prompts[i]), sampling, name or None)
        async with places:
            return [t async for o in self._engine.generate(request) for t in o.token_ids]


@pytest.fixture(scope="module", params=["torch", "openvino"])
def found(
    smollm2: Path,
    trained: Path,
    prompts: list[list[int]],
    wanted: dict[str, Served],
    request: pytest.FixtureRequest,
) -> Found:
    """Of each executor in turn."""
    if request.param == "openvino":
        require_openvino()
    return asyncio.run(Serving(smollm2, trained, prompts, request.param).run())


# --- the comparison ------------------------------------------------------------------------------


def largest_difference(one: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", NAMES[1:])
def test_the_adapter_changes_the_logits_visibly(
    name: str, wanted: dict[str, Served], record_property: Callable[[str, object], None]
) -> None:
    effect = largest_difference(wanted[name].logits, wanted[""].logits)
    record_property("effect", effect)
    print(f"\n{name}: changes logits by up to {effect:.2f}")
    assert effect > 0.1
    assert wanted[name].token_ids != wanted[""].token_ids


@pytest.mark.parametrize("how", ["alone", "mixed", "merged"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_reference(
    name: str,
    how: str,
    found: Found,
    wanted: dict[str, Served],
    record_property: Callable[[str, object], None],
) -> None:
    """`mixed`: rows of the base and of all adapters in one step. `merged`: likewise, while the
    adapter "patterns" is in the weights."""
    answers: dict[str, Served] = getattr(found, how)
    logits = answers[name].logits
    difference = largest_difference(logits, wanted[name].logits[: len(logits)])
    record_property("max_logit_difference", difference)
    print(f"\n{name or 'base'}, {how}: max |logit difference| {difference:.1e}")
    assert difference <= TOLERANCE


@pytest.mark.parametrize("how", ["alone", "mixed", "merged"])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_the_reference(
    name: str, how: str, found: Found, wanted: dict[str, Served]
) -> None:
    answers: dict[str, Served] = getattr(found, how)
    tokens = answers[name].token_ids
    assert len(tokens) == (MERGED_PROMPTS if how == "merged" else 16)
    assert tokens == wanted[name].token_ids[: len(tokens)]
    assert sum(map(len, tokens)) > 20 * len(tokens), "most answers are long"
