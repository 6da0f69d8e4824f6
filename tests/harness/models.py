"""Tiny models of every family, and a tokenizer of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 262
"""256 bytes, five added tokens and one: not a multiple of 2 or 3, so that partitions need padding."""

TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 20,
    "intermediate_size": 37,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "max_position_embeddings": 128,
    "eos_token_id": 256,
    "bos_token_id": 256,
    "pad_token_id": 256,
    "tie_word_embeddings": False,
}
FEW_EXPERTS: dict[str, Any] = {  # torch's grouped matrix product wants rows of 16 bytes, in bf16 too
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "hidden_size": 24,
    "moe_intermediate_size": 16,
}
FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "sliding_window": 16, "final_logit_softcapping": 2.0},
    "gemma3_text": {"tie_word_embeddings": True, "sliding_window": 16, "sliding_window_pattern": 2},
    "gpt2": {"tie_word_embeddings": True, "n_embd": 20, "n_layer": 5, "n_head": 2, "n_inner": 37, "n_positions": 128},
    "gpt_neox": {},
    "granite": {"residual_multiplier": 0.3, "embedding_multiplier": 5.0, "logits_scaling": 2.0},
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 16},
    "mixtral": FEW_EXPERTS | {"num_local_experts": 3, "intermediate_size": 32, "sliding_window": 16},
    "olmo2": {},
    "olmo3": {"sliding_window": 16},
    "phi3": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3},
    "qwen2_moe": FEW_EXPERTS
    | {"shared_expert_intermediate_size": 13, "mlp_only_layers": [1, 4]}
    | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3},
    "qwen3": {},
    "qwen3_moe": FEW_EXPERTS | {"decoder_sparse_step": 3},
    "smollm3": {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 16},
}


def save_tiny_model(directory: Path, model_type: str = "llama", **options: Any) -> Path:
    """A randomly initialised model with large enough weights that every layer matters, and a byte tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(TINY | FAMILY_OPTIONS[model_type] | options))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norm gains away from 1 and biases away from 0, so that a forgotten one shows.
            parameter.add_(torch.randn_like(parameter) * 0.08)
    model.save_pretrained(directory)
    save_byte_tokenizer(directory)
    return directory


def save_byte_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(directory)
