"""`adapter_config.json` (PEFT's format) and `kasa_meta.json` (our sidecar), parsed and checked key
by key.

Whatever would change the adapter's meaning and is not applied here exactly is refused by name: an
unknown key with a value, DoRA, a trained bias, an initialisation that rewrote the base.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import regex

from kasa_runtime.adapter.kasa import TruncationRule, scaling
from kasa_runtime.errors import AdapterInvalid
from kasa_runtime.types import AdapterMethod

PATTERN_TIMEOUT_S = 0.2
"""An adapter may bring regular expressions; one that backtracks for longer is refused."""

# Keys that say nothing about what the tensors mean at inference.
_IGNORED = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "loftq_config", "lora_dropout",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
_UNDERSTOOD = {
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "kasa_config",
    "layers_to_transform", "lora_alpha", "modules_to_save", "peft_type", "r", "rank_pattern",
    "target_modules", "use_rslora",
}  # fmt: skip
# Initialisations after which the adapter belongs to a base whose weights they rewrote.
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """What `adapter_config.json` says. `target_modules` is a regular expression when it is a
    string."""

    r: int
    lora_alpha: float
    target_modules: str | tuple[str, ...]
    method: AdapterMethod = AdapterMethod.KASA
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    beta: float = 1e-4
    gamma: float = 1e-3
    lora_dropout: float = 0.0
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    modules_to_save: tuple[str, ...] = ()  # trained whole: ends of module paths
    fan_in_fan_out: bool = False  # the base stores its weights (in, out): it says so, not the file
    base_model_name: str = ""
    task_type: str = "CAUSAL_LM"

    def rank_of(self, module: str) -> int:
        """r of one layer. Raises AdapterInvalid (as all methods here) on a pattern that is no
        regular expression."""
        return int(_lookup(self.rank_pattern, module, self.r))

    def scaling_of(self, module: str) -> float:
        alpha = float(_lookup(self.alpha_pattern, module, self.lora_alpha))
        return scaling(alpha, self.rank_of(module), self.use_rslora)

    def targets(self, module: str) -> bool:
        """Whether PEFT would adapt a layer of this path."""
        if self.saves_exactly(module):
            return False
        if _matches(self.exclude_modules, module) or not _matches(self.target_modules, module):
            return False
        if not self.layers_to_transform:
            return True
        index = regex.search(r"\.(?:layers|h|blocks?)\.(\d+)\.", f".{module}.")
        return index is not None and int(index[1]) in self.layers_to_transform

    def saves(self, path: str) -> bool:
        """Whether PEFT would take what is at this path for a module that was trained whole, or a
        part of one: for `classifier` also `pre_classifier`."""
        return any(f"{name}." in f"{path}." for name in self.modules_to_save)

    def saves_exactly(self, path: str) -> bool:
        """Whether `modules_to_save` has the name of the module at this path, or of one that it is
        in."""
        return any(f".{name}." in f".{path}." for name in self.modules_to_save)


@dataclass(frozen=True)
class AdapterMeta:
    """What `kasa_meta.json` says, or what stands for it where there is none.

    `truncation_rank` None: each layer's t is its r. `truncation_ranks` overrides single layers by
    their path."""

    truncation_rule: TruncationRule
    truncation_rank: int | None = None
    truncation_ranks: Mapping[str, int] = field(default_factory=dict)
    ortho_form: str = "gram_r"
    reg_reduction: str = "mean"
    base_fingerprint: str = ""  # "": unknown, only shapes can be checked
    training: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = 1

    def truncation_rank_of(self, module: str, r: int) -> int:
        default = r if self.truncation_rank is None else self.truncation_rank
        return self.truncation_ranks.get(module, default)


def parse_config(raw: Mapping[str, Any], *, has_diagonal: bool) -> AdapterConfig:
    """`adapter_config.json` as a checked value. `has_diagonal`: the tensors include a `lora_diag`,
    which makes an adapter without `kasa_config` one of the authors' code. Raises AdapterInvalid."""
    _refuse_unsupported(raw)
    kasa = raw.get("kasa_config")
    if kasa is not None and not isinstance(kasa, Mapping):
        raise AdapterInvalid(f"adapter_config.json: kasa_config must be an object, got {kasa!r}")
    regularisers = kasa or {}
    ranks, alphas = _object(raw, "rank_pattern"), _object(raw, "alpha_pattern")
    is_kasa = kasa is not None or has_diagonal
    return AdapterConfig(
        r=_integer(raw, "r", 1),
        lora_alpha=_number(raw.get("lora_alpha", raw["r"]), "lora_alpha"),
        target_modules=_names(raw.get("target_modules"), "target_modules"),
        method=AdapterMethod.KASA if is_kasa else AdapterMethod.LORA,
        rank_pattern={k: _integer(ranks, k, 1) for k in ranks},
        alpha_pattern={k: _number(v, f"alpha_pattern.{k}") for k, v in alphas.items()},
        use_rslora=_flag(raw.get("use_rslora"), "use_rslora"),
        beta=_number(regularisers.get("beta", 1e-4), "kasa_config.beta"),
        gamma=_number(regularisers.get("gamma", 1e-3), "kasa_config.gamma"),
        lora_dropout=_number(raw.get("lora_dropout") or 0.0, "lora_dropout"),
        exclude_modules=_names(raw.get("exclude_modules") or (), "exclude_modules"),
        layers_to_transform=_layer_indices(raw.get("layers_to_transform")),
        modules_to_save=_module_names(raw.get("modules_to_save")),
        base_model_name=str(raw.get("base_model_name_or_path") or ""),
        task_type=str(raw.get("task_type") or "CAUSAL_LM"),
    )  # fmt: skip


def parse_meta(
    raw: Mapping[str, Any] | None, *, has_kasa_config: bool, has_diagonal: bool
) -> AdapterMeta:
    """The sidecar as a checked value; without one, the rule that the other files imply. Raises
    AdapterInvalid."""
    if raw is None:
        if has_kasa_config:
            return AdapterMeta(TruncationRule.MIN_DIM)
        return AdapterMeta(TruncationRule.IN_FEATURES if has_diagonal else TruncationRule.NONE)
    version = raw.get("format_version")
    if version != 1:
        raise AdapterInvalid(
            f"kasa_meta.json: want format_version 1, got {version!r}; a newer kasa-runtime wrote "
            "it, upgrade this one"
        )
    known = {f for f in AdapterMeta.__dataclass_fields__}
    if unknown := sorted(set(raw) - known):
        raise AdapterInvalid(
            f"kasa_meta.json: unknown keys {unknown}, want some of {sorted(known)}"
        )
    rules, rule = [rule.value for rule in TruncationRule], raw.get("truncation_rule")
    if rule not in rules:
        raise AdapterInvalid(
            f"kasa_meta.json: truncation_rule must be one of {rules}, got {rule!r}"
        )
    rank = None if raw.get("truncation_rank") is None else _integer(raw, "truncation_rank", 0)
    ranks = _object(raw, "truncation_ranks")
    return AdapterMeta(
        truncation_rule=TruncationRule(rule),
        truncation_rank=rank,
        truncation_ranks={k: _integer(ranks, k, 0) for k in ranks},
        ortho_form=str(raw.get("ortho_form", "gram_r")),
        reg_reduction=str(raw.get("reg_reduction", "mean")),
        base_fingerprint=str(raw.get("base_fingerprint") or ""),
        training=_object(raw, "training"),
    )


def config_json(config: AdapterConfig, *, peft_can_serve: bool) -> str:
    """`adapter_config.json` as PEFT 0.21 writes it.

    PEFT derives the truncation from r alone, and from no weight that is stored (in, out). What it
    would not apply exactly has the `peft_type` "KASA", which it refuses, rather than "LORA", with
    which it would apply the wrong truncation without a word."""
    kasa = config.method is AdapterMethod.KASA
    names = config.target_modules
    raw = {
        "peft_type": "LORA" if peft_can_serve else "KASA",
        "task_type": config.task_type or None,
        "base_model_name_or_path": config.base_model_name or None,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": _plain_number(config.lora_alpha),
        "lora_dropout": config.lora_dropout,
        "target_modules": names if isinstance(names, str) else sorted(names),
        "exclude_modules": config.exclude_modules or None,
        "layers_to_transform": list(config.layers_to_transform) or None,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {k: _plain_number(v) for k, v in config.alpha_pattern.items()},
        "use_rslora": config.use_rslora,
        "bias": "none",
        "fan_in_fan_out": config.fan_in_fan_out,
        "init_lora_weights": True,
        "modules_to_save": list(config.modules_to_save) or None,
        "use_dora": False,
        "kasa_config": {"beta": config.beta, "gamma": config.gamma} if kasa else None,
    }
    return json.dumps(raw, indent=2) + "\n"


def meta_json(meta: AdapterMeta) -> str:
    raw = asdict(meta)
    raw["truncation_rule"] = meta.truncation_rule.value
    return json.dumps({"format_version": raw.pop("format_version"), **raw}, indent=2) + "\n"


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    if raw.get("peft_type") not in ("LORA", "KASA"):
        raise AdapterInvalid(
            f'adapter_config.json: want peft_type "LORA", got {raw.get("peft_type")!r}'
        )
    bias = raw.get("bias")
    if bias not in ("none", None):
        raise AdapterInvalid(f'adapter_config.json: want bias "none", got {bias!r}; train without')
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_REWRITES_BASE):
        raise AdapterInvalid(
            f"adapter_config.json: init_lora_weights = {init!r} rewrote the base weights, so this "
            "adapter is wrong on the original base; convert it to a plain LoRA with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    for key in raw.keys() - _IGNORED - _UNDERSTOOD:
        if raw[key] not in (None, False, [], {}, "", ()):
            raise AdapterInvalid(
                f"adapter_config.json: {key} = {raw[key]!r} cannot be applied exactly, so none of "
                "the adapter is served"
            )


def _lookup(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the path's end."""
    for pattern, value in patterns.items():
        if _fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _matches(names: str | tuple[str, ...], module: str) -> bool:
    if names == "all-linear":
        return not module.endswith("lm_head")
    if isinstance(names, str):
        return _fullmatch(names, module)
    return any(module == name or module.endswith(f".{name}") for name in names)


def _fullmatch(pattern: str, text: str) -> bool:
    try:
        return regex.fullmatch(pattern, text, timeout=PATTERN_TIMEOUT_S) is not None
    except (regex.error, RecursionError) as error:
        raise AdapterInvalid(
            f"adapter_config.json: {pattern!r} is not a regular expression: {error}"
        ) from error
    except TimeoutError as error:
        raise AdapterInvalid(
            f"adapter_config.json: the regular expression {pattern!r} takes too long"
        ) from error


def _integer(raw: Mapping[str, Any], key: str, low: int) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= 65536:
        raise AdapterInvalid(
            f"adapter configuration: {key} must be an integer from {low}, got {value!r}"
        )
    return value


def _number(value: Any, key: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:  # NaN is not <= either
        raise AdapterInvalid(f"adapter configuration: {key} must be a finite number, got {value!r}")
    return float(value)


def _flag(value: Any, key: str) -> bool:
    if value not in (None, False, True):
        raise AdapterInvalid(f"adapter configuration: {key} must be true or false, got {value!r}")
    return bool(value)


def _object(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, Mapping):
        raise AdapterInvalid(f"adapter configuration: {key} must be an object, got {value!r}")
    return value


def _names(value: Any, key: str) -> str | tuple[str, ...]:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, Iterable) and all(isinstance(v, str) for v in value):
        return tuple(sorted(value))
    raise AdapterInvalid(
        f"adapter_config.json: {key} must be a string or a list of strings, got {value!r}"
    )


def _module_names(value: Any) -> tuple[str, ...]:
    if not isinstance(value or [], list):
        raise AdapterInvalid(
            f"adapter_config.json: modules_to_save must be a list of strings, got {value!r}"
        )
    return tuple(_names(value or [], "modules_to_save"))


def _layer_indices(value: Any) -> tuple[int, ...]:
    indices = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in indices):
        raise AdapterInvalid(
            f"adapter_config.json: layers_to_transform must be integers, got {value!r}"
        )
    return tuple(indices)


def _plain_number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
