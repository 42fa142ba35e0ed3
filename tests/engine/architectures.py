"""Tiny configurations of architectures that the torch executor serves, and of some it refuses."""

from __future__ import annotations

from transformers import (
    BloomConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MiniMaxConfig,
    MistralConfig,
    MixtralConfig,
    OpenAIGPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RecurrentGemmaConfig,
    StableLmConfig,
    XGLMConfig,
)

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FLAT = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
WINDOW = 8

SERVED: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "mistral": MistralConfig(**SIZES, sliding_window=WINDOW),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "gemma2": Gemma2Config(
        **SIZES,
        head_dim=16,
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        query_pre_attn_scalar=16,
    ),
    "gemma3": Gemma3TextConfig(
        **SIZES,
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=16,
    ),
    "gpt2": GPT2Config(
        vocab_size=128,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=2,
    ),
}

REFUSED: dict[str, PreTrainedConfig] = {
    "positions from the attention scores": BloomConfig(
        vocab_size=128, hidden_size=64, n_layer=2, n_head=4
    ),
    "positions of its own": XGLMConfig(
        vocab_size=128,
        d_model=64,
        ffn_dim=96,
        num_layers=2,
        attention_heads=4,
        max_position_embeddings=128,
    ),
    "attention of its own": OpenAIGPTConfig(
        vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=128
    ),
    "state beside attention": FalconH1Config(
        **SIZES, head_dim=16, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16
    ),
    "state in some layers": RecurrentGemmaConfig(
        **{**SIZES, "num_hidden_layers": 3}, head_dim=16, lru_width=64, attention_window_size=64
    ),
    "linear attention": MiniMaxConfig(**SIZES, head_dim=16, num_local_experts=2),
    "no attention": MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=8),
    "attention sinks": GptOssConfig(
        **SIZES, head_dim=16, num_local_experts=2, num_experts_per_tok=1
    ),
    "arguments not passed on": StableLmConfig(**SIZES),
}
