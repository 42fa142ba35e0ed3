"""Adapter directories: the one reader and the one writer of the format.

    <name>/adapter_config.json          PEFT's LoraConfig, with `kasa_config` for KaSA
    <name>/adapter_model.safetensors    base_model.model.<layer>.lora_A.weight (r, in),
                                        .lora_B.weight (out, r) and .lora_diag (r,);
                                        base_model.model.<tensor> of modules trained whole
    <name>/kasa_meta.json               our sidecar, optional
    <name>/README.md                    model card, optional

Read: what PEFT writes (KaSA and plain LoRA), what the authors' code writes (`lora_diag` and no
`kasa_config`; the core may be a dense (r, r) matrix), and our own. An adapter is applied whole or
refused whole; the message says what is wrong.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.config import (
    AdapterConfig,
    AdapterMeta,
    config_json,
    meta_json,
    parse_config,
    parse_meta,
)
from kasa_runtime.adapter.kasa import TruncationRule, truncation_count
from kasa_runtime.adapter.lora import Adapter, ModuleWeights, is_finite
from kasa_runtime.adapter.saved import check_saved
from kasa_runtime.adapter.skeleton import LinearShape
from kasa_runtime.background import give_way
from kasa_runtime.errors import AdapterInvalid, BaseMismatch
from kasa_runtime.types import AdapterMethod

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
META_FILE = "kasa_meta.json"
CARD_FILE = "README.md"
FILES = (CONFIG_FILE, WEIGHTS_FILE, META_FILE, CARD_FILE)
REQUIRED_FILES = (CONFIG_FILE, WEIGHTS_FILE)

PREFIX = "base_model.model."
"""Before every module path in the tensors' names."""

MAX_JSON_BYTES = 1 << 20

_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_diag)"
)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read(directory: Path, base: BaseModel, *, to_serve: bool = False) -> Adapter:
    """The adapter in `directory`, checked against `base`; tensors in float32 on the CPU. `to_serve`
    refuses what an engine cannot apply: modules that were trained whole.

    Raises AdapterInvalid (cannot be read or applied exactly) or BaseMismatch (made for other
    weights)."""
    tensors = _read_tensors(directory)
    has_diagonal = any(name.endswith(".lora_diag") for name in tensors)
    raw = _read_json(directory / CONFIG_FILE)
    config = parse_config(raw, has_diagonal=has_diagonal)
    if to_serve and config.modules_to_save:
        raise AdapterInvalid(
            f"holds modules that were trained whole ({', '.join(config.modules_to_save)}), as a "
            "classifier's head is; a server generates text and has no use for them: `kasa adapters "
            "export` writes the adapter for other tools"
        )
    meta = _read_meta(directory, raw, has_diagonal=has_diagonal)
    if meta.base_fingerprint and meta.base_fingerprint != base.fingerprint:
        raise BaseMismatch(
            f"made for a base with fingerprint {meta.base_fingerprint[:16]}… "
            f"({config.base_model_name or 'no name'}), this base is {base.fingerprint[:16]}… "
            f"({base.directory.name}); serve it on the base it was trained on"
        )
    saved = {
        name: tensors.pop(key)
        for key in list(tensors)
        if key.startswith(PREFIX)
        and not _TENSOR.fullmatch(key)
        and config.saves((name := key.removeprefix(PREFIX)).rpartition(".")[0])
    }
    modules = {
        name: _module_weights(name, parts, config, base)
        for name, parts in _by_module(tensors).items()
    }
    _require_every_target(config, modules, base)
    check_saved(saved, config, base)
    truncation = {name: _truncation(config, meta, name, base.modules[name]) for name in modules}
    transposed = any(base.modules[name].transposed for name in modules)
    config = replace(config, fan_in_fan_out=transposed)
    return Adapter(config, meta, modules, truncation, saved)


def task_type(directory: Path) -> str:
    """PEFT's name for what the adapter in `directory` was trained for, "" where it does not say.
    Raises AdapterInvalid."""
    return str(_read_json(directory / CONFIG_FILE).get("task_type") or "")


def write(
    directory: Path,
    adapter: Adapter,
    *,
    dtype: torch.dtype = torch.float32,
    readme: str | None = None,
) -> None:
    """Write `adapter` as an adapter directory, each file by rename. PEFT reads it where PEFT can
    express it. `dtype` is of the low-rank factors; modules that were trained whole stay float32."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, weights in sorted(adapter.modules.items()):
        prefix = f"{PREFIX}{name}"
        tensors[f"{prefix}.lora_A.weight"] = weights.a
        tensors[f"{prefix}.lora_B.weight"] = weights.b
        if weights.diag is not None:
            tensors[f"{prefix}.lora_diag"] = weights.diag
    tensors = {key: _stored(tensor, dtype) for key, tensor in tensors.items()}
    tensors |= {f"{PREFIX}{k}": _stored(v, torch.float32) for k, v in adapter.saved.items()}
    payload = save(tensors, {"format": "pt"})
    _write_file(directory / WEIGHTS_FILE, payload)
    config = config_json(adapter.config, peft_can_serve=peft_can_serve(adapter))
    _write_file(directory / CONFIG_FILE, config.encode())
    _write_file(directory / META_FILE, meta_json(adapter.meta).encode())
    if readme is not None:
        _write_file(directory / CARD_FILE, readme.encode())


def peft_can_serve(adapter: Adapter) -> bool:
    """Whether PEFT, which always truncates r components by `min_dim` and knows no KaSA of weights
    that are stored (in, out), would apply this adapter exactly."""
    if adapter.method is AdapterMethod.LORA:
        return True
    if adapter.config.fan_in_fan_out:
        return False
    meta = adapter.meta
    return meta.truncation_rule is TruncationRule.MIN_DIM and all(
        meta.truncation_rank_of(name, adapter.config.rank_of(name)) == adapter.config.rank_of(name)
        for name in adapter.modules
    )


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        pickles = [
            p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")
        ]
        found = (
            f"found {pickles[0]}, a pickle, which is never loaded: save as safetensors"
            if pickles
            else "it is missing"
        )
        raise AdapterInvalid(f"want {WEIGHTS_FILE}, {found}")
    try:
        # Bytes, not a memory map: a file that is overwritten in place would change under the map,
        # and one that is cut short would kill the process.
        tensors = load(path.read_bytes())
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise AdapterInvalid(
            f"{WEIGHTS_FILE} is torn or not a safetensors file: {error}"
        ) from error
    if not tensors:
        raise AdapterInvalid(f"{WEIGHTS_FILE} holds no tensors")
    return {key: _finite_float32(key, tensor) for key, tensor in tensors.items()}


def _finite_float32(key: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in _DTYPES:
        raise AdapterInvalid(
            f"{key} has dtype {tensor.dtype}, want one of {[str(d) for d in _DTYPES]}"
        )
    give_way()
    tensor = tensor.to(torch.float32)
    if not is_finite(tensor):
        raise AdapterInvalid(
            f"{key} holds NaN or infinite values; the training diverged or the file is damaged"
        )
    return tensor


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise AdapterInvalid(f"{path.name} is larger than {MAX_JSON_BYTES} bytes")
        raw = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(raw, ensure_ascii=False).encode()  # half a surrogate pair fits no message
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterInvalid(f"{path.name} is missing or not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise AdapterInvalid(f"{path.name}: want a JSON object, got {type(raw).__name__}")
    return raw


def _read_meta(directory: Path, config: Mapping[str, Any], *, has_diagonal: bool) -> AdapterMeta:
    path = directory / META_FILE
    raw = _read_json(path) if path.exists() else None
    if raw is None and config.get("peft_type") == "KASA":
        raise AdapterInvalid(
            f'peft_type "KASA" needs {META_FILE}, which holds the truncation; it is missing'
        )
    has_kasa_config = config.get("kasa_config") is not None
    return parse_meta(raw, has_kasa_config=has_kasa_config, has_diagonal=has_diagonal)


def _by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(tensors.items()):  # the first error is the same every time
        match = _TENSOR.fullmatch(key)
        if match is None:
            raise AdapterInvalid(
                f"unknown tensor {key}; want base_model.model.<layer>.lora_A.weight, "
                ".lora_B.weight or .lora_diag, and what is not understood is not dropped"
            )
        modules.setdefault(match["module"], {})[match["part"]] = tensor
    return modules


def _module_weights(
    name: str, parts: Mapping[str, Tensor], config: AdapterConfig, base: BaseModel
) -> ModuleWeights:
    """One layer's tensors, present and of the right shapes; a dense core D is folded into A,
    exactly."""
    shape = base.modules.get(name)
    if shape is None:
        raise AdapterInvalid(
            f"the base has no linear layer {name}; was the adapter made for another architecture?"
        )
    wanted = {"lora_A.weight", "lora_B.weight"} | (
        {"lora_diag"} if config.method is AdapterMethod.KASA else set()
    )
    if missing := sorted(wanted - parts.keys()):
        raise AdapterInvalid(f"{name}: {', '.join(missing)} is missing; half a layer is not served")
    r = config.rank_of(name)
    a, b, diag = parts["lora_A.weight"], parts["lora_B.weight"], parts.get("lora_diag")
    _require_shape(f"{name}.lora_A.weight", a, (r, shape.in_features), r)
    _require_shape(f"{name}.lora_B.weight", b, (shape.out_features, r), r)
    if diag is not None and diag.ndim == 2:
        _require_shape(f"{name}.lora_diag", diag, (r, r), r)
        return ModuleWeights(diag @ a, b, torch.ones(r))  # (r, r) @ (r, in)
    if diag is not None:
        _require_shape(f"{name}.lora_diag", diag, (r,), r)
    return ModuleWeights(a, b, diag)


def _require_shape(key: str, tensor: Tensor, want: tuple[int, ...], r: int) -> None:
    if tuple(tensor.shape) != want:
        raise AdapterInvalid(
            f"{key} has shape {tuple(tensor.shape)}, want {want} for r = {r}; is "
            "adapter_config.json of another adapter, or the base another model?"
        )


def _require_every_target(
    config: AdapterConfig, modules: Mapping[str, Any], base: BaseModel
) -> None:
    absent = [name for name in base.modules if name not in modules and config.targets(name)]
    if absent:
        raise AdapterInvalid(
            f"target_modules names {len(absent)} layers that have no tensors, the first is "
            f"{absent[0]}; the file is incomplete"
        )


def _truncation(config: AdapterConfig, meta: AdapterMeta, name: str, shape: LinearShape) -> int:
    if config.method is AdapterMethod.LORA:
        return _no_truncation(meta)
    t = meta.truncation_rank_of(name, config.rank_of(name))
    try:
        return truncation_count(meta.truncation_rule, t, shape.out_features, shape.in_features)
    except ValueError as error:
        raise AdapterInvalid(f"{name}: {error}") from error


def _no_truncation(meta: AdapterMeta) -> int:
    if meta.truncation_rule is not TruncationRule.NONE:
        raise AdapterInvalid(
            f"{META_FILE} says truncation_rule {meta.truncation_rule}, {CONFIG_FILE} and the "
            "tensors a plain LoRA, which has none; are they of the same adapter?"
        )
    return 0


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()


def _write_file(path: Path, data: bytes) -> None:
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    with staged.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    staged.replace(path)
