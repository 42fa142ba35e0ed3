"""A tiny random llama, and the GGUF that llama.cpp's converter would make of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import dequantize, quantize
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# one of each kind that matters here: two block formats, a half, and the float of the norms
TYPES = {
    "token_embd.weight": GGMLQuantizationType.Q8_0,
    "attn_q.weight": GGMLQuantizationType.Q4_1,
    "attn_k.weight": GGMLQuantizationType.Q8_0,
    "attn_v.weight": GGMLQuantizationType.F16,
}
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def vocabulary() -> list[str]:
    return [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "He"]


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(vocabulary()),
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    *,
    pre: str = "smollm",
    add_bos: bool = False,
    extra: dict[str, np.ndarray] | None = None,
    leave_out: str = "",
) -> Path:
    """Write `model` and set its weights to what the file's quantisation keeps of them."""
    writer = GGUFWriter(path, "llama")
    _write_metadata(writer, model.config)
    _write_tokenizer(writer, pre, add_bos)
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            if name == "lm_head.weight" or name == leave_out:
                continue
            _write_tensor(writer, _gguf_name(name), tensor, model.config)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_metadata(writer: GGUFWriter, config: LlamaConfig) -> None:
    writer.add_name("Tiny Random")
    writer.add_string("general.license", "apache-2.0")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)


def _write_tokenizer(writer: GGUFWriter, pre: str, add_bos: bool) -> None:
    tokens = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    kinds = [TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in tokens]
    writer.add_token_types(kinds)
    writer.add_token_merges(["1 2", "H e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template(CHAT_TEMPLATE)


def _write_tensor(writer: GGUFWriter, name: str, tensor: torch.Tensor, config: LlamaConfig) -> None:
    weight = tensor.numpy().astype(np.float32)
    kind = TYPES.get(name, TYPES.get(name.split(".", 2)[-1], GGMLQuantizationType.F32))
    stored = quantize(weight, kind)
    tensor.copy_(torch.from_numpy(np.array(dequantize(stored, kind))).reshape(tensor.shape))
    if "attn_q" in name:  # blocks lie within rows, so rows may be exchanged after quantising
        stored = _permute(stored, config.num_attention_heads)
    if "attn_k" in name:
        stored = _permute(stored, config.num_key_value_heads)
    writer.add_tensor(name, stored, raw_dtype=kind)


def _permute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp rotates pairs, transformers halves: (heads, 2, half) -> (heads, half, 2)."""
    half = rows.shape[0] // num_heads // 2
    return np.ascontiguousarray(
        rows.reshape(num_heads, 2, half, -1).swapaxes(1, 2).reshape(rows.shape)
    )


def _gguf_name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, index, rest = name.split(".", 3)
    return f"blk.{index}.{NAMES[rest.removesuffix('.weight')]}.weight"
