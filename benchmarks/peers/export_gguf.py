"""A Llama model as llama.cpp reads it, in float32 and without a tokenizer: the driver sends ids.

python -m benchmarks.peers.export_gguf MODEL_DIR OUTPUT.gguf float32
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open


def main(model_dir: str, output: str, precision: str) -> None:
    config = json.loads(Path(model_dir, "config.json").read_text())
    if config["model_type"] != "llama" or precision != "float32":
        raise SystemExit(f"want a llama in float32, got a {config['model_type']} in {precision}")
    writer = gguf.GGUFWriter(output, "llama")
    _write_config(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for path in sorted(Path(model_dir).glob("*.safetensors")):
        with safe_open(path, "np") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no dictionary
                found = names.get_name(name, try_suffixes=(".weight",))
                tensor = _for_interleaved_rope(name, weights.get_tensor(name), config)
                writer.add_tensor(found, np.ascontiguousarray(tensor, np.float32))
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
