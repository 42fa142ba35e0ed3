"""The sections of a run.toml: one frozen dataclass each, with defaults, meaning and bounds.

`reader.load` makes a RunConfig of a file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from kasa_runtime.adapter.kasa import TruncationRule
from kasa_runtime.training.loss import OrthoForm, RegReduction
from kasa_runtime.types import AdapterMethod

ALL_LINEAR = "all-linear"


class Dtype(StrEnum):
    """Names of the dtypes that weights may have."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Schedule(StrEnum):
    """How the learning rate goes from its peak after the warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


def _number(
    default: float,
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


@dataclass(frozen=True, slots=True)
class DataSection:
    """`[data]`: JSONL files, and the templates that make a prompt and a completion of a row."""

    train: Path
    eval: Path | None = None  # its loss is logged during training
    test: Path | None = None  # the metrics of the model card
    prompt: str = "{prompt}"
    completion: str = "{completion}"
    chat: bool = False  # the prompt becomes a user message of the model's chat template
    system: str = ""  # system message, with `chat`
    # Tokens of prompt and completion; longer rows are left out and counted.
    max_length: int = _number(512, low=2)
    limit: int = _number(0, low=0)  # use the first n training rows after the shuffle; 0: all


@dataclass(frozen=True, slots=True)
class MethodSection:
    """`[method]`: what is trained. `lora` uses neither truncation nor diagonal nor penalties."""

    kind: AdapterMethod = AdapterMethod.KASA
    r: int = _number(8, low=1)
    alpha: float = _number(16.0, above=0)
    target_modules: tuple[str, ...] = (ALL_LINEAR,)  # ends of module paths, or "all-linear"
    dropout: float = _number(0.0, low=0, below=1)
    use_rslora: bool = False
    truncation_rule: TruncationRule = TruncationRule.MIN_DIM
    truncation_rank: int | None = _number(None, low=0)  # type: ignore[arg-type]  # None: r
    beta: float = _number(1e-4, low=0)
    gamma: float = _number(1e-3, low=0)
    ortho_form: OrthoForm = OrthoForm.GRAM_R
    reg_reduction: RegReduction = RegReduction.MEAN

    @property
    def t(self) -> int:
        """The truncation rank."""
        return self.r if self.truncation_rank is None else self.truncation_rank


@dataclass(frozen=True, slots=True)
class TrainSection:
    """`[train]`: optimisation. One step is `batch_size * accumulation` rows."""

    epochs: float = _number(1.0, above=0)
    max_steps: int = _number(0, low=0)  # 0: as many as `epochs` needs
    batch_size: int = _number(16, low=1)
    accumulation: int = _number(1, low=1)
    learning_rate: float = _number(5e-4, above=0)
    schedule: Schedule = Schedule.COSINE
    warmup_ratio: float = _number(0.06, low=0, below=1)  # of all steps
    weight_decay: float = _number(0.0, low=0)
    max_grad_norm: float = _number(1.0, above=0)
    seed: int = _number(0, low=0)
    log_steps: int = _number(10, low=1)
    save_steps: int = _number(0, low=0)  # 0: no checkpoints
    eval_steps: int = _number(0, low=0)  # 0: no loss on `data.eval` during training
    resume: bool = False  # go on from the newest checkpoint
    threads: int = _number(0, low=0)  # 0: torch's default


@dataclass(frozen=True, slots=True)
class EvalSection:
    """`[eval]`: generation on `data.test` by the base model and by the adapter."""

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
    work_dir: Path | None = None  # checkpoints, results.json; None: `runs/<name>` beside run.toml
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
