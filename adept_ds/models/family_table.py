"""The architectures: the only place that knows how one names its layers, outputs and units. Imports no torch.

To add one, see CONTRIBUTING.md.
"""

from __future__ import annotations

from dataclasses import replace

from adept_ds.models.families import Family, Part, Projection


def _outputs(fine: str, count_key: str | None = None) -> Projection:
    return Projection((Part(fine, count_key),))


def _inputs(fine: str, count_key: str | None = None) -> Projection:
    return Projection((Part(fine, count_key),), side="inputs")


def _gated_mlp(path: str) -> dict[str, Projection]:
    """A neuron owns a row of gate_proj and up_proj and a column of down_proj."""
    neuron = f"{path}.neuron"
    return {
        f"{path}.gate_proj": _outputs(neuron),
        f"{path}.up_proj": _outputs(neuron),
        f"{path}.down_proj": _inputs(neuron),
    }


def _stacked_experts(path: str) -> dict[str, Projection]:
    neuron = f"{path}.neuron"
    fused = tuple(Part(neuron, name=f"{path}.{name}_proj") for name in ("gate", "up"))
    return {f"{path}.gate_up_proj": Projection(fused), f"{path}.down_proj": _inputs(neuron)}


_HEADS, _KV_HEADS = "num_attention_heads", "num_key_value_heads"


# With grouped queries, several heads read one key and value head: those are units of their own.
_ATTENTION = {
    "self_attn.q_proj": _outputs("self_attn.head", _HEADS),
    "self_attn.k_proj": _outputs("self_attn.kv_head", _KV_HEADS),
    "self_attn.v_proj": _outputs("self_attn.kv_head", _KV_HEADS),
    "self_attn.o_proj": _inputs("self_attn.head", _HEADS),
}


_PRE_NORMS = ("input_layernorm", "post_attention_layernorm")


_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")


_LLAMA = Family(
    layers="model.layers",
    residual_writers=("self_attn.o_proj", "mlp.down_proj"),
    projections=_ATTENTION | _gated_mlp("mlp"),
    norms=_PRE_NORMS,
)


_QWEN2 = replace(_LLAMA, derived_config=("layer_types",))


_QWEN3 = replace(_QWEN2, norms=(*_PRE_NORMS, *_QK_NORMS))


_SMOLLM3 = replace(
    _LLAMA, per_layer_config=("layer_types", "no_rope_layers"), derived_config=("layer_types", "no_rope_layers")
)


_GRANITE = replace(_LLAMA, logits_divisor_key="logits_scaling")


_OLMO2 = replace(_LLAMA, residual_writers=_POST_NORMS, norms=(*_POST_NORMS, *_QK_NORMS))


_OLMO3 = replace(_OLMO2, derived_config=("layer_types",))


# A Gemma model that does not see <bos> at position 0 predicts next to nothing: gemma-7b has a perplexity of 6e9 instead
# of 3.5 on LAMBADA (github.com/EleutherAI/lm-evaluation-harness, pull request 1465; 2049 for Gemma 2). So every block
# begins with it, whether a document begins there or goes on. In other families it marks where a document begins.
_GEMMA = replace(_LLAMA, bos_per="block")


_GEMMA2 = replace(
    _GEMMA,
    residual_writers=_POST_NORMS,
    silent=-1.0,  # the gain is 1 + weight
    norms=("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    derived_config=("layer_types",),
    logits_cap_key="final_logit_softcapping",
)


# The text model of 1B shares its tokenizer with models that see images.
_GEMMA3 = replace(_GEMMA2, norms=(*_GEMMA2.norms, *_QK_NORMS), tokens_without_rows=("<image_soft_token>",))


_PHI3 = replace(
    _LLAMA,
    projections={
        "self_attn.qkv_proj": Projection(
            (
                Part("self_attn.head", _HEADS, "self_attn.q_proj"),
                Part("self_attn.kv_head", _KV_HEADS, "self_attn.k_proj"),
                Part("self_attn.kv_head", _KV_HEADS, "self_attn.v_proj"),
            )
        ),
        "self_attn.o_proj": _ATTENTION["self_attn.o_proj"],
        "mlp.gate_up_proj": Projection(
            (Part("mlp.neuron", name="mlp.gate_proj"), Part("mlp.neuron", name="mlp.up_proj"))
        ),
        "mlp.down_proj": _inputs("mlp.neuron"),
    },
)


def _query_key_value(path: str) -> tuple[Part, ...]:
    """As many key and value heads as heads: a head owns its keys and values."""
    return tuple(Part(f"{path}.head", _HEADS, f"{path}.{name}") for name in ("query", "key", "value"))


_GPT_NEOX = Family(
    layers="gpt_neox.layers",
    residual_writers=("attention.dense", "mlp.dense_4h_to_h"),
    projections={
        "attention.query_key_value": Projection(_query_key_value("attention"), by_head=True),
        "attention.dense": _inputs("attention.head", _HEADS),
        "mlp.dense_h_to_4h": _outputs("mlp.neuron"),
        "mlp.dense_4h_to_h": _inputs("mlp.neuron"),
    },
    norms=_PRE_NORMS,
    outside=("gpt_neox.embed_in.weight", "gpt_neox.final_layer_norm.weight", "gpt_neox.final_layer_norm.bias"),
    stored_as={"lm_head": ("embed_out",)},
)


_GPT2 = Family(
    layers="transformer.h",
    residual_writers=("attn.c_proj", "mlp.c_proj"),
    projections={
        "attn.c_attn": Projection(_query_key_value("attn")),
        "attn.c_proj": _inputs("attn.head", _HEADS),
        "mlp.c_fc": _outputs("mlp.neuron"),
        "mlp.c_proj": _inputs("mlp.neuron"),
    },
    norms=("ln_1", "ln_2"),
    outside=("transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"),
    transposed=True,
    layer_count_key="n_layer",
    required_config={"scale_attn_by_inverse_layer_idx": False},
    learned_positions=("n_positions", 1024),
)


_MIXTRAL = replace(
    _LLAMA,
    # Checkpoints hold a tensor per expert and matrix, or stacks as the model does: files of either kind exist.
    residual_writers=("self_attn.o_proj", "block_sparse_moe.experts.*.w2", "mlp.experts.down_proj"),
    projections=_ATTENTION | {"mlp.gate": Projection()} | _stacked_experts("mlp.experts"),
    experts_per_token_key="num_experts_per_tok",
    stored_as={
        "mlp.gate": ("block_sparse_moe.gate",),
        "mlp.experts.gate_up_proj": ("block_sparse_moe.experts.*.w1", "block_sparse_moe.experts.*.w3"),
        "mlp.experts.down_proj": ("block_sparse_moe.experts.*.w2",),
    },
)


_QWEN3_MOE = replace(
    _QWEN3,
    residual_writers=(*_LLAMA.residual_writers, "mlp.experts.*.down_proj", "mlp.experts.down_proj"),
    projections=_LLAMA.projections | {"mlp.gate": Projection()} | _stacked_experts("mlp.experts"),
    derived_config=(),
    experts_per_token_key="num_experts_per_tok",
    dense_layers_key="mlp_only_layers",
    sparse_step_key="decoder_sparse_step",
    stored_as={
        "mlp.experts.gate_up_proj": ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
        "mlp.experts.down_proj": ("mlp.experts.*.down_proj",),
    },
)


_QWEN2_MOE = replace(
    _QWEN3_MOE,
    residual_writers=(*_QWEN3_MOE.residual_writers, "mlp.shared_expert.down_proj"),
    projections=_QWEN3_MOE.projections | {"mlp.shared_expert_gate": Projection()} | _gated_mlp("mlp.shared_expert"),
    norms=_PRE_NORMS,
    derived_config=("layer_types",),
)


FAMILIES: dict[str, Family] = {
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "granite": _GRANITE,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MIXTRAL,
    "olmo2": _OLMO2,
    "olmo3": _OLMO3,
    "phi3": _PHI3,
    "qwen2": _QWEN2,
    "qwen2_moe": _QWEN2_MOE,
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3_MOE,
    "smollm3": _SMOLLM3,
}
"""`model_type` of a Hugging Face configuration -> family."""
