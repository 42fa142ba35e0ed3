"""A Llama model, and LoRA adapters for it, as llama.cpp reads them: in float32 and without a
tokenizer, for the driver sends ids.

python -m benchmarks.peers.export_gguf MODEL_DIR OUTPUT.gguf float32
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open


def main(model_dir: str, output: str, precision: str) -> None:
    config = _config(model_dir)
    if config["model_type"] != "llama" or precision != "float32":
        raise SystemExit(f"want a llama in float32, got a {config['model_type']} in {precision}")
    writer = gguf.GGUFWriter(output, "llama")
    _write_config(writer, config)
    for path in sorted(Path(model_dir).glob("*.safetensors")):
        for name, tensor in _tensors(path):
            _add(writer, name, _for_interleaved_rope(name, tensor, config), config)
    _write(writer)


def write_adapter(adapter_dir: Path, model_dir: str, output: Path) -> None:
    """A LoRA adapter in PEFT's format. Of q and k, the rows of B are rows of the weight."""
    config = _config(model_dir)
    writer = gguf.GGUFWriter(output, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    adapter = json.loads((adapter_dir / "adapter_config.json").read_text())
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter["lora_alpha"])
    for key, tensor in _tensors(adapter_dir / "adapter_model.safetensors"):
        module, factor = key.removeprefix("base_model.model.").rsplit(".lora_")
        name = f"{module}.weight"
        if factor == "A.weight":
            _add(writer, name, tensor, config, ".lora_a")
        else:
            _add(writer, name, _for_interleaved_rope(name, tensor, config), config, ".lora_b")
    _write(writer)


def _config(model_dir: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(Path(model_dir, "config.json").read_text())
    return config


def _tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    with safe_open(path, "np") as weights:
        for name in weights.keys():  # noqa: SIM118 - it is no dictionary
            yield name, weights.get_tensor(name)


def _add(
    writer: gguf.GGUFWriter,
    name: str,
    tensor: np.ndarray,
    config: dict[str, Any],
    suffix: str = "",
) -> None:
    """Under llama.cpp's name for the weight that transformers calls `name`."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    found = names.get_name(name, try_suffixes=(".weight",))
    writer.add_tensor(f"{found}{suffix}", np.ascontiguousarray(tensor, np.float32))


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters") or config
    if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise SystemExit("want plain rotary embeddings; this model scales them")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)


def _for_interleaved_rope(name: str, tensor: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """transformers rotates (i, i + d/2) of a head, llama.cpp (2i, 2i + 1): rows in that order."""
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        key = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
        halves = tensor.reshape(config[key], 2, -1, tensor.shape[1])  # (heads, 2, d/2, in)
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    return tensor


if __name__ == "__main__":
    main(*sys.argv[1:])
