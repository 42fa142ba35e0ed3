"""The model card says what was done, for every task and method, and nothing that was not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kasa_runtime.adapter.kasa import TruncationRule
from kasa_runtime.training.card import command_line, render, summary
from kasa_runtime.training.config import (
    DataSection,
    EvalSection,
    MethodSection,
    ModelSection,
    OutputSection,
    Preset,
    Quantization,
    RunConfig,
    TaskKind,
    TrainSection,
)
from kasa_runtime.training.facts import Facts
from kasa_runtime.training.initialisation import DiagInit
from kasa_runtime.training.loss import OrthoForm
from kasa_runtime.types import AdapterMethod

FACTS = Facts(
    num_train_rows=1000,
    num_train_sequences=1000,
    num_train_tokens=20_000,
    num_too_long=0,
    num_test_rows=50,
    num_all_test_rows=50,
    num_steps=125,
    kept_step=125,
    num_processes=1,
    train_seconds=130.0,
    num_parameters=12_345,
    num_modules=14,
    trained_whole=(),
    labels=(),
    final_losses={"L1": 0.5, "L2": 8.0, "L3": 4.0},
    metrics={"base": {"exact_match": 1.0}, "adapter": {"exact_match": 70.25}},
    example=("red =>", "stop"),
)


def card(facts: Facts = FACTS, **sections: Any) -> str:
    config = RunConfig(
        DataSection(Path("rows.jsonl"), prompt="{q} =>", completion=" {a}"),
        OutputSection(Path("out/colours")),
        eval=EvalSection(metrics=("exact_match",)),
        path=Path("run.toml"),
    )
    return render(replace(config, **sections), facts)


def of_task(task: TaskKind, **data: Any) -> DataSection:
    return DataSection(Path("rows.jsonl"), task=task, **data)


def test_a_completion_run_shows_prompt_results_and_settings() -> None:
    text = card()
    for part in (
        "# colours", "A KaSA adapter (rank 8) for `smollm2-135m`", "    {q} =>\n",
        "begins with a space", "    red =>\n    -> stop", "In percent, on all 50 test rows",
        "| base | 1.0 |", "| adapter | 70.2 |", "truncation: rule min_dim, rank 8",
        "125 steps of 16 rows", "2 minutes of training", "the run made 2.0 passes over them",
    ):  # fmt: skip
        assert part in text, part
    assert "was kept" not in text and "preset" not in text


def test_perplexity_is_not_called_a_percentage() -> None:
    metrics = {"base": {"perplexity": 21.3456}, "adapter": {"perplexity": 5.4321}}
    text = card(
        replace(FACTS, metrics=metrics, example=None),
        data=of_task(TaskKind.TEXT),
        eval=EvalSection(metrics=("perplexity",)),
    )
    assert "percent" not in text and "greedy" not in text
    assert "| adapter | 5.432 |" in text
    assert "there is no form of a prompt" in text


def test_mixed_metrics_name_the_one_that_is_no_percentage() -> None:
    metrics = {"adapter": {"pearson": 91.0, "mse": 0.12345}}
    text = card(
        replace(FACTS, metrics=metrics, trained_whole=("classifier",)),
        data=of_task(TaskKind.REGRESSION, text="{a}", text_pair="{b}", label="score"),
        eval=EvalSection(metrics=("pearson", "mse")),
    )
    assert "In percent but for mean squared error" in text
    assert "Its output is the number `score`" in text
    assert "`{a}` and, as its pair, `{b}`" in text
    assert "The trained head (classifier) is stored with the adapter" in text


def test_a_classification_names_its_labels_and_the_untrained_head_of_the_base() -> None:
    metrics = {"base": {"accuracy": 50.0}, "adapter": {"accuracy": 90.0}}
    text = card(
        replace(FACTS, metrics=metrics, labels=("bad", "good"), trained_whole=("classifier",)),
        data=of_task(TaskKind.CLASSIFICATION),
        eval=EvalSection(metrics=("accuracy",)),
    )
    assert "the labels bad and good, in this order" in text
    assert "The base model has a new head with random weights" in text
    assert "Decode greedily" not in text and "greedy decoding" not in text


def test_a_choice_says_how_labels_are_scored() -> None:
    metrics = {"adapter": {"accuracy": 90.0}}
    text = card(
        replace(FACTS, metrics=metrics, labels=("no", "yes")),
        data=of_task(TaskKind.CHOICE, prompt="{q}?", completion=" {label_name}"),
        eval=EvalSection(metrics=("accuracy",)),
    )
    assert "the likeliest of the labels no and yes" in text
    assert "scored by its log-probability" in text
    assert "greedy" not in text.lower()


def test_the_step_that_was_kept_is_named() -> None:
    text = card(replace(FACTS, kept_step=80), train=TrainSection(best_metric="loss"))
    assert "of which step 80 was kept, the best in loss" in text


@pytest.mark.parametrize(
    ("method", "part"),
    [
        (MethodSection(preset=Preset.PAPER), "preset: paper"),
        (MethodSection(diag_init=DiagInit.TAIL), "first singular values: tail"),
        (MethodSection(diag=False), "no learnable singular values"),
        (MethodSection(ortho_form=OrthoForm.QR), "made orthonormal by QR after each step"),
        (MethodSection(ortho_form=OrthoForm.NONE), "orthogonality: none"),
        (MethodSection(rank_pattern={"q_proj": 4}), "other r: 4 in `q_proj`"),
        (MethodSection(rank_pattern={"q_proj": 4}), "rank 8 or each layer's own r"),
        (MethodSection(alpha_pattern={"q_proj": 4}), "other alpha: 4 in `q_proj`"),
        (MethodSection(use_rslora=True), "rank-stabilised scaling"),
        (MethodSection(truncation_rank=3), "rule min_dim, rank 3"),
        (
            MethodSection(truncation_rule=TruncationRule.IN_FEATURES),
            "truncation: rule in_features, rank 8",
        ),
        (MethodSection(init_from=Path("/data/first")), "begun from the adapter first"),
        (MethodSection(target_modules=("q_proj", "v_proj")), "target modules: q_proj, v_proj"),
    ],
)
def test_every_option_of_the_method_is_told(method: MethodSection, part: str) -> None:
    text = card(method=method)
    assert part in text
    assert "/data" not in text


def test_plain_lora_tells_nothing_of_kasa() -> None:
    text = card(method=MethodSection(kind=AdapterMethod.LORA))
    assert "A LoRA adapter" in text
    assert "truncation" not in text and "beta" not in text


def test_a_quantised_base_is_said_to_be_one() -> None:
    model = ModelSection(quantization=Quantization.NF4)
    assert "base weights in 4 bits (nf4), computed with in float32" in card(model=model)


def test_packed_sequences_and_devices_are_counted() -> None:
    facts = replace(FACTS, num_train_sequences=100, num_processes=2, num_steps=8)
    text = card(facts, data=of_task(TaskKind.TEXT, packing=True))
    assert "8 steps of 32 sequences on 2 devices" in text
    assert "made 2.0 passes" in text


def test_paths_of_this_machine_are_not_in_the_command() -> None:
    config = RunConfig(
        DataSection(Path("x")),
        OutputSection(Path("y")),
        path=Path("/srv/runs/run.toml"),
        overrides=("data.train=/srv/rows.jsonl", "train.epochs=2"),
    )
    assert command_line(config) == (
        "kasa train run.toml --set data.train=PATH --set train.epochs=2"
    )


def test_the_summary_has_the_same_in_short() -> None:
    config = RunConfig(DataSection(Path("x")), OutputSection(Path("y")))
    found = summary(config, FACTS)
    assert found["adapter"] == "exact match 70.2"
    assert found["steps"] == "125 steps of 16 rows"
