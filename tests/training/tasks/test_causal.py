"""Completions and plain text: what has a loss, how it is measured, and what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch.nn import functional
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kasa_runtime.errors import ConfigError, DataError, ModelError
from kasa_runtime.training.examples import IGNORED, Collator, Example
from kasa_runtime.training.generate import generate
from kasa_runtime.training.rows import Row
from kasa_runtime.training.tasks import causal

from ..making import make_encoder, make_tokenizer
from .conftest import MakeTask, row

FORM = {"prompt": "{q} =>", "completion": " {a}"}
END = 0


def learnt(tokenizer: PreTrainedTokenizerFast, example: Example) -> tuple[str, str]:
    """All of it, and what has a loss, as texts."""
    assert isinstance(example.labels, tuple)
    kept = [label for label in example.labels if label != IGNORED]
    return tokenizer.decode(example.input_ids), tokenizer.decode(kept)


def only(task: Any, *rows: Row) -> Example:
    (example,) = task.encode(rows).examples
    return example


def with_bos() -> PreTrainedTokenizerFast:
    """A tokenizer that begins every text with a special token."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    return tokenizer


def test_loss_is_on_the_completion_and_the_end_token(
    make: MakeTask, tokenizer: PreTrainedTokenizerFast
) -> None:
    example = only(make(**FORM), row(q="one", a="1"))
    assert learnt(tokenizer, example) == ("one => 1<|end|>", " 1<|end|>")


def test_chat_wraps_the_prompt_as_a_user_message(
    make: MakeTask, tokenizer: PreTrainedTokenizerFast
) -> None:
    task = make(prompt="{q}", completion="{a}", chat=True, system="Count.")
    all_of_it, kept = learnt(tokenizer, only(task, row(q="one", a="1")))
    assert all_of_it == "<|system|>Count.\n<|user|>one\n<|assistant|>1<|end|>"
    assert kept == "1<|end|>"


def test_special_tokens_stand_before_the_prompt_alone(make: MakeTask) -> None:
    tokenizer = with_bos()
    example = only(make(tokenizer=tokenizer, **FORM), row(q="one", a="1"))
    assert learnt(tokenizer, example) == ("<|begin|>one => 1<|end|>", " 1<|end|>")
    text = only(make(tokenizer=tokenizer, task="text"), row(text="one"))
    assert learnt(tokenizer, text) == ("<|begin|>one<|end|>", "one<|end|>")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"q": "x"}, r"rows.jsonl:7: no field 'a', which ' \{a\}' needs; has q"),
        ({"q": "x", "a": " "}, r"rows.jsonl:7: the completion ' \{a\}' is empty"),
        ({"q": None, "a": "1"}, r"rows.jsonl:7: field 'q' is null"),
    ],
)
def test_bad_rows_are_named(make: MakeTask, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(**FORM).encode([row(**fields)])


def test_empty_prompt_is_refused(make: MakeTask) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:7: the prompt '\{q\}' is empty"):
        make(prompt="{q}").encode([row(q="", completion="x")])


def test_rows_that_are_too_long_are_counted(make: MakeTask) -> None:
    rows = [row(q="x" * 50, a="1"), row(q="one", a="1")]
    examples = make(max_length=20, **FORM).encode(rows)
    assert (len(examples), examples.num_rows, examples.num_too_long) == (1, 1, 1)
    with pytest.raises(DataError, match=r"all 2 rows are longer than max_length = 5 .* has 9"):
        make(max_length=5, **FORM).encode(rows)


def test_plain_text_is_cut_so_that_every_token_is_told_once(make: MakeTask) -> None:
    examples = make(task="text", max_length=5).encode([row(text="abcdefgh")]).examples
    task = make(task="text")
    ids = [*task.tokenizer("abcdefgh")["input_ids"], END]
    assert [list(e.input_ids) for e in examples] == [ids[0:5], ids[4:9]]
    told = [label for e in examples for label in e.labels if label != IGNORED]
    assert told == ids[1:]
    with pytest.raises(DataError, match=r"rows.jsonl:7: the text '\{text\}' is empty"):
        task.encode([row(text=" \n")])


def test_text_that_ends_itself_gets_no_second_end(make: MakeTask) -> None:
    (example,) = make(task="text").encode([row(text="ab<|end|>")]).examples
    assert example.input_ids.count(END) == 1


def test_loss_is_that_of_the_model(make: MakeTask, model: LlamaForCausalLM) -> None:
    """Ours feeds only the completions' positions to the output embeddings; theirs feeds all."""
    task = make(**FORM)
    examples = task.encode([row(q="a long question", a="1"), row(q="b", a="two")])
    batch = Collator(task.pad_id)([examples[0], examples[1]])
    with torch.no_grad():
        got, want = task.loss(model, batch), model(**batch).loss
    torch.testing.assert_close(got.total / got.count, want)
    assert got.count == 3 + 5
    assert model(batch["input_ids"]).logits.ndim == 3, "the hook is still there"


def test_perplexity_is_that_of_a_plain_loop(make: MakeTask, model: LlamaForCausalLM) -> None:
    rows = [row(q="red", a="stop"), row(q="a longer one", a="go on"), row(q="b", a="c")]
    task = make(eval_metrics=("perplexity",), eval_batch_size=2, **FORM)
    losses = []
    for each in rows:
        example = task.encode([each]).examples[0]
        with torch.no_grad():
            logits = model(torch.tensor([example.input_ids])).logits[0, :-1]
        targets = torch.tensor(example.labels[1:])
        losses += functional.cross_entropy(logits, targets, reduction="none")[targets >= 0].tolist()
    want = sum(losses) / len(losses)
    assert task.held_out(model, rows)["loss"] == pytest.approx(want, rel=1e-5)
    outcome = task.measure(model, rows)
    assert outcome.metrics["perplexity"] == pytest.approx(math.exp(want), rel=1e-4)
    assert outcome.predictions == []


def test_packing_does_not_change_the_loss(make: MakeTask, model: LlamaForCausalLM) -> None:
    rows = [row(q="q" * n, a="a" * (9 - n)) for n in range(1, 9)]
    apart = make(**FORM).held_out(model, rows)
    packed = make(packing=True, max_length=40, eval_batch_size=2, **FORM)
    assert len(packed.encode(rows)) == 4
    assert packed.held_out(model, rows)["loss"] == pytest.approx(apart["loss"], rel=1e-5)


def test_batched_generation_equals_one_by_one(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Prompts of other lengths beside it, and the padding they bring, change nothing."""
    prompts = [tokenizer(text)["input_ids"] for text in ("a long prompt", "b", "three", "to")]

    def run(some: Sequence[Sequence[int]], size: int) -> list[str]:
        return generate(model, tokenizer, some, max_new_tokens=10, batch_size=size)

    assert run(prompts, 4) == run(prompts, 2) == [run([prompt], 1)[0] for prompt in prompts]


def test_generation_is_greedy_whatever_the_model_says_of_itself(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    own = GenerationConfig(do_sample=True, temperature=2.0, repetition_penalty=9.0)
    model.generation_config = own
    prompt = ids = tokenizer("some text")["input_ids"]
    got = generate(model, tokenizer, [prompt], max_new_tokens=6, batch_size=1)
    assert model.generation_config is own
    with torch.no_grad():
        for _ in range(6):
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    assert got == [tokenizer.decode(ids[-6:], skip_special_tokens=True).strip()]


def test_generation_stops_at_the_ends_that_the_model_names(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = tokenizer("some text")["input_ids"]
    first = generate(model, tokenizer, [prompt], max_new_tokens=6, batch_size=1)[0]
    with torch.no_grad():
        token = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [END, token]
    stopped = generate(model, tokenizer, [prompt], max_new_tokens=6, batch_size=1)[0]
    assert stopped == tokenizer.decode([token]).strip() != first


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The prompts, as text, that reach generation."""
    seen: list[str] = []

    def fake(_model: Any, _tokenizer: Any, prompts: Sequence[Sequence[int]], **_: Any) -> list[str]:
        seen.extend(tokenizer.decode(prompt) for prompt in prompts)
        return ["1"] * len(prompts)

    monkeypatch.setattr(causal, "generate", fake)
    return seen


class Progress:
    """A report that nobody sees."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> Any:
        return lambda done, total: None

    def __exit__(self, *error: object) -> None: ...


def test_each_way_to_ask_has_its_prompt(
    asked: list[str], make: MakeTask, model: LlamaForCausalLM
) -> None:
    settings = {"eval_metrics": ("exact_match",), "eval_few_shot": 1, "eval_instruction": "Count."}
    task = make(**settings, **FORM)
    rows, shots = [row(q="one", a="1")], [row(q="two", a="2"), row(q="six", a="6")]
    outcomes = {"adapter": task.measure(model, rows)}
    outcomes |= task.measure_base(model, rows, shots, Progress)
    assert dict(zip(outcomes, asked, strict=True)) == {
        "adapter": "one =>",
        "base, zero-shot": "<|user|>Count.\n\none =>\n<|assistant|>",
        "base, 1-shot": "two => 2\none =>",
    }
    assert [outcome.metrics for outcome in outcomes.values()] == [{"exact_match": 100.0}] * 3


def test_base_without_chat_template_is_asked_plainly(
    asked: list[str], make: MakeTask, model: LlamaForCausalLM
) -> None:
    plain = copy.deepcopy(make_tokenizer())
    plain.chat_template = None
    task = make(tokenizer=plain, eval_metrics=("exact_match",), eval_few_shot=0, **FORM)
    assert list(task.measure_base(model, [row(q="one", a="1")], [], Progress)) == [
        "base, zero-shot"
    ]
    assert asked == ["one =>"]


@pytest.mark.parametrize("refs", [None, [], [1], 3])
def test_bad_references_are_named_before_training(make: MakeTask, refs: object) -> None:
    task = make(eval_metrics=("exact_match",), eval_references="refs", **FORM)
    task.check([row(q="one", refs=["fine"])])  # no completion, and none is needed
    with pytest.raises(DataError, match=r"rows.jsonl:7: .*want a text or a list of texts"):
        task.check([row(q="one", refs=refs)])


def test_perplexity_needs_the_completion_of_test_rows(make: MakeTask) -> None:
    task = make(eval_metrics=("perplexity",), **FORM)
    with pytest.raises(DataError, match=r"rows.jsonl:7: no field 'a'"):
        task.check([row(q="one")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_metrics": ("blue",)}, r"no metric 'blue' for task = completion; known: .*bleu"),
        ({"eval_metrics": ("matthews",)}, r"no metric 'matthews' for task = completion"),
        ({"task": "text", "eval_metrics": ("bleu",)}, r"no metric 'bleu' .*known: perplexity$"),
    ],
)
def test_metrics_of_another_task_are_refused(
    make: MakeTask, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**settings)


def test_tokenizers_need_an_end_and_for_chats_a_template(make: MakeTask) -> None:
    plain = make_tokenizer()
    plain.chat_template = None
    with pytest.raises(ConfigError, match="need a tokenizer with a chat template"):
        make(tokenizer=plain, chat=True)
    endless = SimpleNamespace(eos_token_id=None, chat_template=None)
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        make(tokenizer=endless)


def test_question_is_what_a_person_would_read(make: MakeTask) -> None:
    assert make(**FORM).question(row(q="one", a="1")) == "one =>"
    assert make(task="text").question(row(text="all")) == "all"


def test_packing_is_proven_when_the_model_is_loaded(make: MakeTask, model_dir: Path) -> None:
    make(packing=True).load_model(model_dir, torch.float32)
    with pytest.raises(ConfigError, match="does not keep packed rows apart"):
        make(packing=True).load_model(model_dir, torch.float32, attn_implementation="leaky")


@pytest.fixture(autouse=True)
def leaky_attention() -> None:
    """An attention function that sees everything, as one without a mask would."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def leaky(module: Any, q: Any, k: Any, v: Any, mask: Any, **rest: Any) -> Any:
        return sdpa_attention_forward(module, q, k, v, None, **rest)

    AttentionInterface.register("leaky", leaky)
    AttentionMaskInterface.register("leaky", lambda **_: None)


def test_a_model_whose_head_would_be_random_is_refused(make: MakeTask, tmp_path: Path) -> None:
    make_encoder().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lacks \d+ tensors of .*; want a model that generates"):
        make(**FORM).load_model(tmp_path, torch.float32)
