"""The sections of a run.toml: one frozen dataclass each, with defaults, meaning and bounds.

`reader.load` makes a RunConfig of a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kasa_runtime.adapter.kasa import TruncationRule
from kasa_runtime.training.initialisation import DiagInit
from kasa_runtime.training.loss import OrthoForm, RegReduction
from kasa_runtime.types import AdapterMethod

ALL_LINEAR = "all-linear"


class Dtype(StrEnum):
    """Names of the dtypes that weights may have."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Quantization(StrEnum):
    """How the frozen base is held in memory; other than `none` needs bitsandbytes."""

    NONE = "none"
    NF4 = "nf4"
    FP4 = "fp4"


class Schedule(StrEnum):
    """How the learning rate goes from its peak after the warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


class TaskKind(StrEnum):
    """What the rows are, and so what is learnt."""

    COMPLETION = "completion"  # prompt -> completion; the loss is on the completion
    CHAT = "chat"  # messages through the chat template; the loss is on assistant turns
    TEXT = "text"  # plain text; the loss is on all of it
    CHOICE = "choice"  # prompt -> one of `labels`, scored by log-probability
    CLASSIFICATION = "classification"  # an encoder with a trained head, one of `labels`
    REGRESSION = "regression"  # an encoder with a trained head, a number

    @property
    def has_head(self) -> bool:
        """Whether the model gets a new head, which is trained whole."""
        return self in (TaskKind.CLASSIFICATION, TaskKind.REGRESSION)


class Preset(StrEnum):
    """Published forms of the method; each is a set of defaults of `[method]`."""

    NONE = "none"
    PAPER = "paper"  # the authors' code
    PEFT = "peft"  # PEFT 0.21


PRESETS: Mapping[Preset, Mapping[str, Any]] = MappingProxyType(
    {
        Preset.NONE: {},
        Preset.PAPER: {
            "truncation_rule": "in_features",
            "ortho_form": "gram_n",
            "reg_reduction": "mean",
            "beta": 1e-4,
            "gamma": 1e-3,
        },
        Preset.PEFT: {
            "truncation_rule": "min_dim",
            "ortho_form": "gram_r",
            "reg_reduction": "sum",
            "beta": 1e-4,
            "gamma": 1e-3,
        },
    }
)


def _number(
    default: float | None,
    *,
    low: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A field with bounds: value >= low, value > above, value < below."""
    bounds = {"low": low, "above": above, "below": below}
    return field(default=default, metadata={k: v for k, v in bounds.items() if v is not None})


@dataclass(frozen=True, slots=True)
class ModelSection:
    """`[model]`: the base model, and the dtype its frozen weights have during training."""

    name: str = "smollm2-135m"
    dtype: Dtype = Dtype.FLOAT32
    quantization: Quantization = Quantization.NONE


@dataclass(frozen=True, slots=True)
class DataSection:
    """`[data]`: where the rows are, and what is made of a row.

    A source is a file (.jsonl, .json, .csv, .tsv, .parquet), or "datasets:NAME[:CONFIG]:SPLIT" with
    whatever the package `datasets` can load; SPLIT may be a part, such as train[:1000]. Templates
    name columns in braces."""

    train: Path | str
    eval: Path | str | None = None  # measured during training
    test: Path | str | None = None  # the metrics of the model card
    columns: tuple[str, ...] = ()  # names for the columns of .csv and .tsv files without a header
    task: TaskKind = TaskKind.COMPLETION
    prompt: str = "{prompt}"
    completion: str = "{completion}"  # of `choice`: may use {label_name}
    chat: bool = False  # the prompt becomes a user message of the model's chat template
    system: str = ""  # system message, with `chat`
    messages: str = "messages"  # of `chat` tasks: the column with [{role, content}, ...]
    text: str = "{text}"  # of `text`, `classification` and `regression`
    text_pair: str = ""  # of `classification` and `regression`: the second text
    label: str = "label"  # column of the label, or of the number
    labels: tuple[str, ...] = ()  # its values, in order; (): those of the training rows, sorted
    label_names: tuple[str, ...] = ()  # what they are called; (): as the values
    # Tokens of a row. Longer rows are left out and counted; plain text is cut into pieces, and
    # what an encoder reads is cut off.
    max_length: int = _number(512, low=2)
    packing: bool = False  # of causal tasks: several rows in one sequence of max_length tokens
    limit: int = _number(0, low=0)  # use the first n training rows after the shuffle; 0: all


@dataclass(frozen=True, slots=True)
class MethodSection:
    """`[method]`: what is trained. `lora` uses neither truncation nor diagonal nor penalties."""

    kind: AdapterMethod = AdapterMethod.KASA
    preset: Preset = Preset.NONE  # other defaults for the keys below
    init_from: Path | None = None  # train this adapter further; its shape is not set here
    r: int = _number(8, low=1)
    alpha: float = _number(16.0, above=0)
    # A list: ends of module paths. A text: a regular expression for whole paths, or "all-linear".
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    # r and alpha of single layers, by regular expressions for the ends of their paths, as in PEFT.
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    dropout: float = _number(0.0, low=0, below=1)
    use_rslora: bool = False
    truncation_rule: TruncationRule = TruncationRule.MIN_DIM
    truncation_rank: int | None = _number(None, low=0)  # None: each layer's r
    diag: bool = True  # false: no learnable singular values
    diag_init: DiagInit = DiagInit.NORMAL
    beta: float = _number(1e-4, low=0)
    gamma: float = _number(1e-3, low=0)
    ortho_form: OrthoForm = OrthoForm.GRAM_R
    reg_reduction: RegReduction = RegReduction.MEAN

    @property
    def is_kasa(self) -> bool:
        return self.kind is AdapterMethod.KASA


@dataclass(frozen=True, slots=True)
class TrainSection:
    """`[train]`: optimisation. One step is `batch_size * accumulation` rows on each device."""

    epochs: float = _number(1.0, above=0)
    max_steps: int = _number(0, low=0)  # 0: as many as `epochs` needs
    batch_size: int = _number(16, low=1)
    accumulation: int = _number(1, low=1)
    learning_rate: float = _number(5e-4, above=0)
    schedule: Schedule = Schedule.COSINE
    warmup_ratio: float = _number(0.06, low=0, below=1)  # of all steps
    weight_decay: float = _number(0.0, low=0)
    max_grad_norm: float = _number(1.0, low=0)  # 0: gradients are not clipped
    gradient_checkpointing: bool = False  # less memory, a third more time
    seed: int = _number(0, low=0)
    log_steps: int = _number(10, low=1)
    save_steps: int = _number(0, low=0)  # 0: no checkpoints
    keep_checkpoints: int = _number(2, low=1)
    eval_steps: int = _number(0, low=0)  # measure on `data.eval`; 0: after each epoch
    best_metric: str = ""  # keep the adapter that was best in it; "": the last one
    patience: int = _number(0, low=0)  # stop after so many measurements without a better one; 0: no
    resume: bool = False  # go on from the newest checkpoint, if there is one
    threads: int = _number(0, low=0)  # 0: torch's default


@dataclass(frozen=True, slots=True)
class EvalSection:
    """`[eval]`: what is measured on `data.test` of the base model and of the adapter."""

    metrics: tuple[str, ...] = ()
    references: str = ""  # field of a test row: a text or a list of texts; "": the completion
    rows: int = _number(0, low=0)  # a seeded sample of so many rows; 0: all
    batch_size: int = _number(32, low=1)
    max_new_tokens: int = _number(96, low=1)
    baselines: bool = True  # measure the base model too
    few_shot: int = _number(4, low=0)  # training rows before the prompt; 0: no few-shot baseline
    instruction: str = ""  # tells the zero-shot base model the task, through its chat template


@dataclass(frozen=True, slots=True)
class OutputSection:
    """`[output]`: where the adapter goes, and what its model card says."""

    dir: Path
    dtype: Dtype = Dtype.BFLOAT16
    work_dir: Path | None = None  # curves, checkpoints; None: `runs/<name>` beside run.toml
    title: str = ""
    description: str = ""  # what the adapter does, and how it is asked
    data: str = ""  # the data set, its source, and which part of it was used
    licence: str = ""  # of the data


@dataclass(frozen=True, slots=True)
class RunConfig:
    """A whole run.toml. `path` is the file, `overrides` what `--set` changed."""

    data: DataSection
    output: OutputSection
    model: ModelSection = field(default_factory=ModelSection)
    method: MethodSection = field(default_factory=MethodSection)
    train: TrainSection = field(default_factory=TrainSection)
    eval: EvalSection = field(default_factory=EvalSection)
    path: Path = Path("run.toml")
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The adapter's name: its directory's."""
        return self.output.dir.name

    @property
    def work_dir(self) -> Path:
        return self.output.work_dir or self.path.parent / "runs" / self.name
