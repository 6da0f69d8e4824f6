"""Operations of a training step, against a hand count and against what PyTorch does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.models import TINY, save_tiny_model

from adept_ds.models.directory import ModelDirectory
from adept_ds.models.family_table import FAMILIES
from adept_ds.models.flops import count_anchor_flops, count_step_flops, planned_step_flops
from adept_ds.probing.model_size import model_size
from adept_ds.weights.expansion import expand_checkpoint


def test_the_operation_count_is_that_of_a_hand_count(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model"))
    model.requires_grad_(False)
    model.model.layers[2].requires_grad_(True)
    seq_len, dim, mlp, vocab, layers, head_dim, heads, kv_heads = 16, 20, 37, 262, 5, 10, 2, 1
    assert (TINY["hidden_size"], TINY["intermediate_size"], TINY["vocab_size"]) == (dim, mlp, vocab)
    matrices = dim * head_dim * (heads + kv_heads + kv_heads + heads) + 3 * dim * mlp  # q, k, v, o; gate, up, down
    norms = 2 * dim
    layer = 2 * (matrices + norms)  # a multiplication and an addition per weight and token
    scores = 4 * seq_len * dim / 2  # q @ k and probabilities @ v, half of them behind the causal mask
    head = 2 * dim * vocab
    flops = count_step_flops(model, FAMILIES["llama"], seq_len)
    assert flops.forward == layers * (layer + scores) + head
    # The gradient runs from the head down to layer 2: layers 2, 3 and 4. Attention's backward is twice its forward.
    assert flops.backward_inputs == 3 * (layer + 2 * scores) + head
    assert flops.backward_weights == layer
    assert flops.total == flops.forward + flops.backward_inputs + flops.backward_weights
    model.model.layers[4].requires_grad_(True)
    around = count_step_flops(model, FAMILIES["llama"], seq_len, bypassed={2})  # now it runs down to layer 4
    assert around.forward == (layers - 1) * (layer + scores) + head
    assert around.backward_inputs == layer + 2 * scores + head
    assert around.backward_weights == layer


def test_scores_are_counted_by_the_width_of_all_heads_and_not_of_the_stream(tmp_path: Path) -> None:
    """As in Qwen3, whose heads are wider together than what passes between layers: 4 of 10 in a stream of 20."""
    from transformers import AutoModelForCausalLM

    source = save_tiny_model(tmp_path / "model", "qwen3", num_attention_heads=4, head_dim=10)
    assert model_size(ModelDirectory.read(source)).attention_width == 40
    model, layers = AutoModelForCausalLM.from_pretrained(source), 5
    long, short = (count_step_flops(model, FAMILIES["qwen3"], length).forward for length in (32, 16))
    assert long - short == layers * 4 * (32 - 16) * 40 / 2


def test_operations_of_an_anchor_are_those_of_a_hand_count(tmp_path: Path) -> None:
    """Copies are layers 1 and 3 of five."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model"))
    layer = 2 * (20 * 10 * (2 + 1 + 1 + 2) + 3 * 20 * 37 + 2 * 20)
    scores, head, passes = 4 * 16 * 20 / 2, 2 * 20 * 262, {"kl": 4, "neutral": 3}  # layers 1 to 4, and 1 to 3
    for kind, layers in passes.items():
        forward, backward = layers * (layer + scores), layers * (layer + 2 * scores)
        heads = 3 * head if kind == "kl" else 0
        found = count_anchor_flops(model, FAMILIES["llama"], 16, [1, 3], kind)  # type: ignore[arg-type]
        assert found == forward + backward + 2 * layer + heads


def adapted_queries(model: Any) -> None:
    """A frozen model with a pair of small matrices beside the queries' projection of layer 2."""
    model.requires_grad_(False)
    projection = model.model.layers[2].self_attn.q_proj
    projection.down, projection.up = torch.nn.Linear(20, 3, bias=False), torch.nn.Linear(3, 20, bias=False)
    projection.register_forward_hook(lambda module, inputs, output: output + module.up(module.down(*inputs)))


@pytest.mark.parametrize(
    ("model_type", "prepare"),
    [
        pytest.param("llama", lambda model: model.requires_grad_(True), id="all, a tied head"),
        pytest.param("phi3", lambda model: model.requires_grad_(True), id="all, a head of its own"),
        pytest.param("llama", adapted_queries, id="adapters"),
        pytest.param("gpt2", lambda model: model.transformer.wpe.requires_grad_(True), id="positions alone"),
    ],
)
def test_products_of_a_whole_step_are_those_that_pytorch_does(
    model_type: str, prepare: Callable[[Any], object], tmp_path: Path
) -> None:
    """Forward and backward, at one token, against PyTorch's own counter; 7 % are norms, biases and half attention.

    What gradients do not reach is no smaller share: two fifths of the layers, or the head's own gradient.
    """
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model", model_type))
    model.requires_grad_(False)
    prepare(model)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False).logits.sum().backward()
    counted = count_step_flops(model, FAMILIES[model_type], 1).total
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.07)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", "mixtral", "qwen2_moe"])
def test_counted_products_are_those_that_pytorch_does(model_type: str, tmp_path: Path) -> None:
    """Weights only (seq_len 1 makes attention negligible), against PyTorch's own counter of a forward pass.

    A token passes two of three experts.
    """
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    options = {"experts_implementation": "eager"} if "mi" in model_type or "moe" in model_type else {}
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model", model_type), **options)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
    counted = count_step_flops(model, FAMILIES[model_type], 1).forward
    # Norms and biases (2 * 40 of 6920 per layer in Llama, 2 * 257 of 6637 in GPT-2) and rounding of the half attention
    # are in ours and not in PyTorch's.
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.07 if model_type == "gpt2" else 0.03)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "mixtral", "qwen2_moe"])
def test_a_planned_step_costs_what_the_step_of_the_real_model_will(model_type: str, tmp_path: Path) -> None:
    """Copies of two layers, one of them without experts in Qwen2-MoE; and the same layers trained in place."""
    from transformers import AutoModelForCausalLM

    source = save_tiny_model(tmp_path / "model", model_type)
    expand_checkpoint(source, tmp_path / "expanded", [2, 4])
    size = model_size(ModelDirectory.read(source))
    for copied, directory, trained in ((True, tmp_path / "expanded", (3, 6)), (False, source, (2, 4))):
        model = AutoModelForCausalLM.from_pretrained(directory)
        model.requires_grad_(False)
        layers = FAMILIES[model_type].layer_modules(model)
        for layer in trained:
            layers[layer].requires_grad_(True)
        planned = planned_step_flops(
            size.layer_passed, [4, 2], size.attention_width, size.head_passed, 16, copied=copied
        )
        counted = count_step_flops(model, FAMILIES[model_type], 16)
        for part in ("forward", "backward_inputs", "backward_weights"):
            assert getattr(planned, part) == pytest.approx(getattr(counted, part), rel=1e-9), part
