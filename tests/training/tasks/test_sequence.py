"""Classification and regression by an encoder with a new head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from kasa_runtime.errors import ConfigError, DataError, ModelError
from kasa_runtime.training.config import (
    DataSection,
    EvalSection,
    MethodSection,
    ModelSection,
    OutputSection,
    RunConfig,
    TaskKind,
    TrainSection,
)
from kasa_runtime.training.examples import Collator
from kasa_runtime.training.run import train

from ..making import WriteRows, make_encoder, make_encoder_tokenizer, make_model
from .conftest import MakeTask, row

ROWS = [row(text="ab", label="0"), row(text="a longer text", label="1"), row(text="c", label="1")]
CLASSES: dict[str, Any] = {"task": "classification", "labels": ("0", "1")}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_encoder_tokenizer()


def test_texts_and_pairs_of_them_are_encoded_as_the_tokenizer_does(make: MakeTask) -> None:
    task = make(**CLASSES)
    (example,) = task.encode(ROWS[:1]).examples
    assert (len(example), example.labels, example.token_type_ids) == (4, 0, ())
    task = make(text_pair="{b}", **CLASSES)
    (example,) = task.encode([row(text="ab", b="c", label=1)]).examples
    assert task.tokenizer.decode(example.input_ids) == "[CLS]ab[SEP]c[SEP]"
    assert example.token_type_ids == (0, 0, 0, 0, 1, 1)


def test_long_texts_are_cut_off(make: MakeTask) -> None:
    long = [row(text="x" * 500, label=1)]
    assert len(make(max_length=10, **CLASSES).encode(long).examples[0]) == 10
    assert len(make(max_length=512, **CLASSES).encode(long).examples[0]) == 128


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": " ", "label": "0"}, r"the text '\{text\}' is empty"),
        ({"text": "x", "b": "", "label": "0"}, r"the text '\{b\}' is empty"),
        ({"text": "x", "b": "y", "label": "2"}, r"label: want one of 0, 1, got '2'"),
        ({"text": "x"}, r"no field 'label'; has b, text"),
    ],
)
def test_bad_rows_are_named(make: MakeTask, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl:7: {message}"):
        make(text_pair="{b}", **CLASSES).encode([row(**{"b": "y"} | fields)])


@pytest.mark.parametrize("value", ["high", "", "nan", float("inf"), [1]])
def test_a_number_is_wanted_for_regression(make: MakeTask, value: object) -> None:
    task = make(task="regression")
    assert task.encode([row(text="x", label="2.5")]).examples[0].labels == 2.5
    with pytest.raises(DataError, match=r"rows.jsonl:7: label: want a number, got"):
        task.encode([row(text="x", label=value)])


def test_head_is_new_and_the_body_that_of_the_files(make: MakeTask, encoder_dir: Path) -> None:
    task = make(**CLASSES)
    torch.manual_seed(3)
    model = task.load_model(encoder_dir, torch.float32)
    assert isinstance(model, BertForSequenceClassification)
    assert task.trained_whole == ("classifier",)
    assert model.classifier.out_features == 2
    body = make_encoder().state_dict()
    assert all(torch.equal(value, body[name]) for name, value in model.bert.state_dict().items())
    torch.manual_seed(3)
    again = task.load_model(encoder_dir, torch.float32)
    assert torch.equal(model.classifier.weight, again.classifier.weight)


def test_whatever_the_files_lack_is_trained_whole(make: MakeTask, tmp_path: Path) -> None:
    """A body saved without its pooler; it would be random in every process."""
    encoder = make_encoder()
    encoder.pooler = None
    encoder.save_pretrained(tmp_path)
    task = make(**CLASSES)
    task.load_model(tmp_path, torch.float32)
    assert task.trained_whole == ("bert.pooler.dense", "classifier")


def test_heads_of_several_layers_are_named_layer_by_layer(make: MakeTask, tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=130, pad_token_id=0,
    )  # fmt: skip
    RobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    task = make(**CLASSES)
    task.load_model(tmp_path, torch.float32)
    assert task.trained_whole == ("classifier.dense", "classifier.out_proj")


def test_decoders_get_a_head_too(make: MakeTask, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    task = make(**CLASSES)
    model = task.load_model(tmp_path, torch.float32)
    assert task.trained_whole == ("score",)
    assert task.predict(model, ROWS).shape == (3, 2)


def test_files_without_layers_are_refused(make: MakeTask, tmp_path: Path) -> None:
    encoder = make_encoder()
    del encoder.encoder.layer[1]
    encoder.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has no weights for bert.encoder.layer.1"):
        make(**CLASSES).load_model(tmp_path, torch.float32)


def test_max_length_above_the_models_positions_is_refused(
    make: MakeTask, encoder_dir: Path
) -> None:
    careless = make_encoder_tokenizer()
    careless.model_max_length = 10**30  # as tokenizers say that know no limit
    task = make(tokenizer=careless, max_length=200, **CLASSES)
    with pytest.raises(ConfigError, match=r"max_length must be at most 128, .* got 200"):
        task.load_model(encoder_dir, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_do_not_change_what_is_predicted(
    make: MakeTask, encoder_dir: Path, dtype: torch.dtype
) -> None:
    task = make(**CLASSES)
    model = task.load_model(encoder_dir, dtype)
    assert model.classifier.weight.dtype is torch.float32
    together = task.predict(model, ROWS)
    alone = torch.cat([task.predict(model, [each]) for each in ROWS])
    assert together.dtype is torch.float32
    assert torch.allclose(together, alone, atol=1e-5 if dtype is torch.float32 else 2e-2)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_loss_is_that_of_the_model(make: MakeTask, encoder_dir: Path, kind: str) -> None:
    task = make(ROWS, task=kind)
    model = task.load_model(encoder_dir, torch.float32).eval()
    examples = task.encode(ROWS)
    batch = Collator(task.pad_id)([examples[i] for i in range(3)])
    with torch.no_grad():
        got, want = task.loss(model, batch), model(**batch).loss
        assert got.count == 3
        torch.testing.assert_close(got.total / got.count, want)
        assert task.held_out(model, ROWS)["loss"] == pytest.approx(want.item(), rel=1e-5)


def test_measures_are_the_same_during_training_and_after(make: MakeTask, encoder_dir: Path) -> None:
    pytest.importorskip("sklearn")
    task = make(eval_metrics=("accuracy", "matthews", "f1"), label_names=("no", "yes"), **CLASSES)
    model = task.load_model(encoder_dir, torch.float32)
    outcome = task.measure(model, ROWS)
    during = task.held_out(model, ROWS)
    assert {name: during[name] for name in outcome.metrics} == outcome.metrics
    predicted = task.predict(model, ROWS).argmax(1).tolist()
    assert outcome.predictions == [("no", "yes")[i] for i in predicted]


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_metrics_of_the_other_kind_are_refused(make: MakeTask, kind: str) -> None:
    other = "pearson" if kind == "classification" else "accuracy"
    with pytest.raises(ConfigError, match=f"no metric '{other}' for task = {kind}; known: "):
        make(ROWS, task=kind, eval_metrics=(other,))


def test_a_run_learns_and_saves_its_head(
    encoder_dir: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    pytest.importorskip("sklearn")
    words = {"good": "1", "fine": "1", "bad": "0", "poor": "0"}
    data = write_rows("train.jsonl", [{"text": w, "label": label} for w, label in words.items()])
    config = RunConfig(
        path=tmp_path / "run.toml",
        model=ModelSection(name=str(encoder_dir)),
        data=DataSection(train=data, test=data, eval=data, task=TaskKind.CLASSIFICATION),
        method=MethodSection(r=4, alpha=8),
        train=TrainSection(max_steps=60, batch_size=4, learning_rate=1e-2),
        eval=EvalSection(metrics=("accuracy",)),
        output=OutputSection(dir=tmp_path / "words", work_dir=tmp_path / "work"),
    )
    facts = train(config, Console(quiet=True))
    assert facts.metrics["adapter"]["accuracy"] == 100
    assert "base, untrained head" in facts.metrics
    tensors = load_file(tmp_path / "words" / "adapter_model.safetensors")
    head = {name for name in tensors if "classifier" in name}
    assert head == {f"base_model.model.classifier.{part}" for part in ("weight", "bias")}
    written = json.loads((tmp_path / "words" / "adapter_config.json").read_text())
    assert (written["task_type"], written["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
