"""Classification by the likeliest label."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from kasa_runtime.errors import ConfigError, DataError

from .conftest import MakeTask, row

FORM: dict[str, Any] = {
    "task": "choice",
    "prompt": "{q} =>",
    "completion": " {label_name}",
    "labels": ("0", "1", "2"),
    "label_names": ("a", "ab", "something longer"),
}
ROWS = [row(q="one", label=0), row(q="a longer question", label=1), row(q="x", label=2)]


def test_scores_are_the_log_probabilities_of_whole_labels(
    make: MakeTask, model: LlamaForCausalLM
) -> None:
    """One forward pass a label, its end included; labels have one token, two and many."""
    task = make(**FORM)
    want = torch.zeros(3, 3)
    for i, each in enumerate(ROWS):
        prompt = task.tokenizer(f"{each.fields['q']} =>")["input_ids"]
        for j, name in enumerate(FORM["label_names"]):
            answer = [*task.tokenizer(f" {name}")["input_ids"], 0]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0]
            at = logits[len(prompt) - 1 : -1].log_softmax(-1)
            want[i, j] = at.gather(1, torch.tensor(answer)[:, None]).sum()
    assert torch.allclose(task.scores(model, ROWS), want, atol=1e-4)
    narrow = make(eval_batch_size=2, **FORM)  # labels of one row in several batches
    assert torch.allclose(narrow.scores(model, ROWS), want, atol=1e-4)


def test_the_likeliest_label_is_the_answer(
    make: MakeTask, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    task = make(eval_metrics=("accuracy",), **FORM)
    scores = torch.tensor([[-1.0, -2, -3], [-3, -2, -1], [-3, -2, -1]])
    monkeypatch.setattr(task, "scores", lambda *_: scores)
    outcome = task.measure(model, ROWS)
    assert outcome.predictions == ["a", "something longer", "something longer"]
    assert outcome.metrics == {"accuracy": 66.67}


def test_labels_are_trained_like_completions(make: MakeTask) -> None:
    task = make(**FORM)
    (example,) = task.encode(ROWS[1:2]).examples
    assert task.tokenizer.decode(example.input_ids) == "a longer question => ab<|end|>"
    assert [label for label in example.labels if label >= 0] == list(example.input_ids[-4:])


def test_rows_report_how_many_are_done(make: MakeTask, model: LlamaForCausalLM) -> None:
    seen: list[tuple[int, int]] = []
    task = make(eval_batch_size=4, **FORM)
    task.scores(model, ROWS, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_label_outside_the_set_is_named_before_training(make: MakeTask) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:7: label: want one of 0, 1, 2, got '3'"):
        make(**FORM).check([row(q="one", label=3)])


def test_texts_cannot_be_measured(make: MakeTask) -> None:
    with pytest.raises(ConfigError, match=r"no metric 'bleu' for task = choice; known: accuracy"):
        make(eval_metrics=("bleu",), **FORM)
