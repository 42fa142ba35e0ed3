"""The OpenVINO graph of a base model: made once (`tracing.py`), kept on disk and read from there.

It is stored open: instead of attention it has, per layer, outputs for queries, keys and values and
an input for what attention makes of them. `attention.py` closes it with the runtime's paged
attention, which the graph's file format cannot hold. transformers' own code computes everything
else, so rotary variants, norms and experts are whatever the architecture says.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from kasa_runtime.adapter.fingerprint import fingerprint
from kasa_runtime.base_model.cache import build_once
from kasa_runtime.engine.native.decoder import DecoderInfo
from kasa_runtime.engine.native.openvino import compression
from kasa_runtime.errors import ModelError
from kasa_runtime.home import kasa_home

logger = logging.getLogger(__name__)

VERSION = 1
"""Of what is stored; raise it when that changes."""

Probe: TypeAlias = tuple[NDArray[np.int64], NDArray[np.float32]]


@dataclass(frozen=True)
class AttentionLayer:
    """One layer's attention, as the architecture calls it. `sinks`: a logit per head, or none."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scaling: float
    sliding_window: int  # 0: none
    sinks: tuple[float, ...] = ()


@dataclass
class ConvertedModel:
    """An open graph and what belongs to it. `probe`: token ids (tokens,) and transformers' logits
    (rows, vocab) of the last of them. `directory`: where it is kept."""

    graph: Any
    info: DecoderInfo
    layers: list[AttentionLayer]
    modules: dict[str, tuple[int, int]]  # linear layers: (out, in)
    probe: Probe
    directory: Path = Path()


def converted(model_dir: Path, core: Any, quantization: str = "none") -> ConvertedModel:
    """The model of the directory, from the cache under KASA_HOME if it is there. One with a
    quantization is made from the float32 one, which is then in the cache too. Raises ModelError for
    one that cannot be converted, ConfigError where NNCF is needed and missing."""
    key = _key(model_dir, quantization)

    def build(to: Path) -> None:
        from kasa_runtime.engine.native.openvino import tracing  # transformers: seconds of import

        if quantization == "none":
            model = tracing.convert(model_dir)
        else:
            compression.require_nncf(quantization)
            model = tracing.compressed(model_dir, converted(model_dir, core), quantization)
        _write(model, to)

    return _cached(key, build, core)


def is_converted(model_dir: Path, quantization: str = "none") -> bool:
    """Whether the cache has it, so that `converted` only reads. Raises ModelError."""
    return (kasa_home() / "openvino" / _key(model_dir, quantization)).is_dir()


def _cached(key: str, build: Callable[[Path], None], core: Any) -> ConvertedModel:
    """What `build` makes in a directory, read from the one that it has made already if it can
    be."""
    final = kasa_home() / "openvino" / key
    is_built = final.is_dir()
    build_once(final, build, is_complete=Path.is_dir, say=logger.info)
    try:
        return _read(final, core)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if not is_built:
            raise ModelError(f"{final}: cannot read back what was converted: {error}") from error
        logger.warning("%s: unreadable (%s), converting this model again", final, error)
    build_once(final, build, is_complete=lambda _: False, say=logger.info)
    return _read(final, core)


def _key(model_dir: Path, quantization: str) -> str:
    digest = hashlib.sha256()
    for name in ("config.json", "generation_config.json"):
        path = model_dir / name
        digest.update(path.read_bytes() if path.is_file() else b"-")
    versions = [ov.__version__.split("-")[0], version("transformers"), str(VERSION)]
    if quantization != "none":
        versions += [quantization, str(compression.VERSION)]
    return "-".join((fingerprint(model_dir)[:32], digest.hexdigest()[:12], *versions))


def _write(model: ConvertedModel, to: Path) -> None:
    ov.save_model(model.graph, to / "model.xml", compress_to_fp16=False)
    about = {
        "info": {**asdict(model.info), "eos_ids": sorted(model.info.eos_ids)},
        "layers": [asdict(layer) for layer in model.layers],
        "modules": model.modules,
    }
    (to / "model.json").write_text(json.dumps(about))
    token_ids, logits = model.probe
    save_file({"token_ids": token_ids, "logits": logits}, to / "probe.safetensors")


def _read(directory: Path, core: Any) -> ConvertedModel:
    about = json.loads((directory / "model.json").read_text())
    info = {**about["info"], "eos_ids": frozenset(about["info"]["eos_ids"])}
    layers = [AttentionLayer(**{**x, "sinks": tuple(x["sinks"])}) for x in about["layers"]]
    modules = {name: (out, in_) for name, (out, in_) in about["modules"].items()}
    probe = load_file(directory / "probe.safetensors")
    graph = core.read_model(directory / "model.xml")
    return ConvertedModel(
        graph,
        DecoderInfo(**info),
        layers,
        modules,
        (probe["token_ids"], probe["logits"]),
        directory,
    )
