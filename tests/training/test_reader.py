"""run.toml: what is read, what is refused, and what the message says."""

from __future__ import annotations

from pathlib import Path

import pytest

from kasa_runtime.adapter.kasa import TruncationRule
from kasa_runtime.errors import ConfigError
from kasa_runtime.training.config import PRESETS, RunConfig
from kasa_runtime.training.loss import OrthoForm, RegReduction
from kasa_runtime.training.reader import load
from kasa_runtime.types import AdapterMethod

MINIMAL = '[data]\ntrain = "train.jsonl"\n[output]\ndir = "out/mine"\n'


def read(tmp_path: Path, text: str = MINIMAL, *overrides: str) -> RunConfig:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return load(path, overrides)


def test_defaults_and_paths_relative_to_the_file(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert config.data.train == tmp_path / "train.jsonl"
    assert config.output.dir == tmp_path / "out" / "mine"
    assert config.name == "mine"
    assert config.work_dir == tmp_path / "runs" / "mine"
    assert config.method.kind is AdapterMethod.KASA
    assert (config.method.r, config.method.truncation_rank) == (8, None)


def test_overrides_take_toml_values_bare_words_and_paths_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = read(
        tmp_path,
        MINIMAL,
        "method.kind=lora",
        "method.truncation_rank=0",
        "train.epochs=2",
        'method.target_modules=["q_proj", "v_proj"]',
        "data.train=mine.jsonl",
    )
    assert config.method.kind is AdapterMethod.LORA
    assert config.method.truncation_rank == 0
    assert config.train.epochs == 2.0
    assert config.method.target_modules == ("q_proj", "v_proj")
    assert config.data.train == tmp_path / "elsewhere" / "mine.jsonl"
    assert config.output.dir == tmp_path / "out" / "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tain]\n", r"unknown section \[tain\]; did you mean 'train'\?"),
        ("train = 3\n", r"train must be a section \[train\], got 3"),
        ("[train]\nepoch = 1\n", r"\[train\] unknown key 'epoch'; did you mean 'epochs'"),
        ("[train]\nepochs = 'x'\n", r"\[train\] epochs must be a number, got 'x'"),
        ("[train]\nbatch_size = 1.5\n", r"batch_size must be an integer, got 1.5"),
        ("[train]\nbatch_size = 0\n", r"batch_size must be at least 1, got 0"),
        ("[train]\nlearning_rate = inf\n", r"learning_rate must be more than 0, got inf"),
        ("[train]\nresume = 1\n", r"resume must be true or false, got 1"),
        ("[method]\ndropout = 1.0\n", r"dropout must be less than 1, got 1.0"),
        ("[method]\nkind = 'dora'\n", r"kind must be one of kasa, lora, got 'dora'"),
        ("[method]\ntarget_modules = [1]\n", r"target_modules must be a list of strings"),
        ("[method]\ntarget_modules = ''\n", r"target_modules must be a list of strings, got ''"),
        ("[method]\nrank_pattern = 3\n", r"rank_pattern must be a table, got 3"),
        ("[method]\nrank_pattern = {q = 0}\n", r"rank_pattern.q must be a number above 0, got 0"),
        ("[method]\nrank_pattern = {q = 1.5}\n", r"rank_pattern.q must be a number above 0"),
        ("[method]\npreset = 'mine'\n", r"preset must be one of none, paper, peft, got 'mine'"),
        ("[method]\npreset = []\n", r"preset must be one of none, paper, peft, got \[\]"),
        ("[method]\ninit_from = 3\n", r"init_from must be a path, got 3"),
        ("[eval]\nmetrics = [\n", "not valid TOML"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_what_was_wanted(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text if text.startswith("train =") else MINIMAL + text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs=1", "want section.key=value"),
        ("train.epochs", "want section.key=value"),
        ("trian.epochs=1", "did you mean 'train'"),
        ("train.epoch=1", "did you mean 'epochs'"),
    ],
)
def test_mistakes_in_overrides_are_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, MINIMAL, override)


def test_required_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[output\] needs the key 'dir'"):
        read(tmp_path, '[data]\ntrain = "x"\n')


def test_presets_fill_in_what_the_file_does_not_say(tmp_path: Path) -> None:
    paper = read(tmp_path, MINIMAL + '[method]\npreset = "paper"\ngamma = 0.5\n').method
    assert paper.truncation_rule is TruncationRule.IN_FEATURES
    assert (paper.ortho_form, paper.reg_reduction) == (OrthoForm.GRAM_N, RegReduction.MEAN)
    assert (paper.beta, paper.gamma) == (1e-4, 0.5)
    peft = read(tmp_path, MINIMAL, "method.preset=peft", "method.reg_reduction=mean").method
    assert peft.truncation_rule is TruncationRule.MIN_DIM
    assert (peft.ortho_form, peft.reg_reduction) == (OrthoForm.GRAM_R, RegReduction.MEAN)


def test_every_preset_is_a_set_of_valid_keys(tmp_path: Path) -> None:
    for preset, values in PRESETS.items():
        method = read(tmp_path, MINIMAL, f"method.preset={preset}").method
        assert {key: getattr(method, key) for key in values} == dict(values)


def test_tables_give_single_layers_another_rank(tmp_path: Path) -> None:
    text = MINIMAL + "[method.rank_pattern]\nq_proj = 4\n[method.alpha_pattern]\nq_proj = 8\n"
    method = read(tmp_path, text).method
    assert method.rank_pattern == {"q_proj": 4}
    assert method.alpha_pattern == {"q_proj": 8.0}
    again = read(tmp_path, MINIMAL, "method.rank_pattern={'layers.0.*' = 2}").method
    assert again.rank_pattern == {"layers.0.*": 2}


def test_target_modules_are_a_pattern_or_a_list(tmp_path: Path) -> None:
    def targets(value: str) -> str | tuple[str, ...]:
        return read(tmp_path, MINIMAL, f"method.target_modules={value}").method.target_modules

    assert targets("all-linear") == "all-linear"
    assert targets('".*q_proj"') == ".*q_proj"
    assert targets('["q_proj"]') == ("q_proj",)


def test_sources_are_files_or_names_of_datasets(tmp_path: Path) -> None:
    text = MINIMAL.replace("train.jsonl", "datasets:glue:cola:train")
    data = read(tmp_path, text, "data.test=datasets:glue:cola:validation").data
    assert data.train == "datasets:glue:cola:train"
    assert data.test == "datasets:glue:cola:validation"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("data.system=Brief.", r"\[data\] system needs chat = true"),
        ("data.chat=true data.task=text", r"\[data\] chat is for task = completion and choice"),
        ("data.packing=true data.task=regression", r"packing is for language models"),
        ("data.text_pair={b}", r"text_pair is for task = classification and regression, not compl"),
        ("data.labels=['a','b']", r"labels and label_names are for choice and classification"),
        ("data.task=choice", r"needs a completion with \{label_name\}.* got '\{completion\}'"),
        ("data.columns=['a']", r"columns names the columns of .csv and .tsv files"),
        ("model.quantization=nf4 data.task=regression", r"quantization is for language models"),
        ("method.target_modules=[]", r"target_modules is empty"),
        ("method.preset=paper method.kind=lora", r"preset = paper is a form of kind = kasa"),
        ("method.ortho_form=qr", r"ortho_form = qr needs diag_init = zeros: .* got normal"),
        ("method.ortho_form=qr method.diag=false", r"qr needs kind = kasa and diag = true"),
        ("train.patience=2", r"\[train\] patience needs best_metric"),
        ("train.best_metric=loss", r"\[train\] best_metric needs \[data\] eval"),
        ("train.eval_steps=5", r"\[train\] eval_steps needs \[data\] eval"),
        ("data.eval=e.jsonl data.test=t.jsonl eval.metrics=['bleu'] train.best_metric=bleu",
         r"best_metric must be measured during training: one of loss, perplexity, got 'bleu'"),
        ("data.task=classification data.eval=e.jsonl train.best_metric=matthews",
         r"one of loss, got 'matthews'"),
        ("eval.metrics=['bleu']", r"\[eval\] metrics needs \[data\] test"),
        ("eval.references=r data.task=text", r"\[eval\] references are texts"),
    ],
)  # fmt: skip
def test_keys_that_do_not_go_together_are_refused(
    tmp_path: Path, overrides: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"run.toml: .*{message}"):
        read(tmp_path, MINIMAL, *overrides.split())


@pytest.mark.parametrize(
    "overrides",
    [
        ("method.ortho_form=qr", "method.diag_init=zeros"),
        ("data.train=a.tsv", "data.columns=['a']"),
        ("data.task=choice", "data.completion= {label_name}", "data.labels=['a', 'b']"),
        ("data.eval=e.jsonl", "train.best_metric=perplexity", "train.patience=2"),
        (
            "data.eval=e.tsv",
            "data.task=regression",
            "eval.metrics=['mse']",
            "train.best_metric=mse",
        ),
        ("data.chat=true", "data.system=Be brief.", "data.packing=true"),
    ],
)
def test_keys_that_go_together_are_taken(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    assert read(tmp_path, MINIMAL, *overrides).overrides == overrides


def test_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "none.toml")


@pytest.mark.parametrize("name", ["cola", "e2e", "snips", "sst2", "tickets"])
def test_shipped_examples_are_valid(name: str) -> None:
    examples = Path(__file__).parents[2] / "examples"
    config = load(examples / name / "run.toml")
    assert config.name == name
    assert Path(config.data.train).is_relative_to(examples / name)
