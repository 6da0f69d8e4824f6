"""Parts of the training loop that need no engine: schedule, operation count, checkpoint listing, run log."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, save_tiny_model

from adept_ds.base.errors import InputError
from adept_ds.base.files import read_json_lines, write_json
from adept_ds.config.schema import TrainSection
from adept_ds.models.family_table import FAMILIES
from adept_ds.models.flops import count_step_flops
from adept_ds.training.checkpoint import Manifest, check_resumable, checkpoint_steps, read_manifest
from adept_ds.training.run_log import RunLog
from adept_ds.training.step import lr_factor
from adept_ds.units.registry import Unit

# --- learning-rate schedule ----------------------------------------------------------------------------------------


def factors(**options: Any) -> list[float]:
    train = TrainSection(**options)
    return [lr_factor(step, train) for step in range(train.steps)]


def test_warmup_rises_in_equal_steps_and_reaches_1() -> None:
    curve = factors(steps=100, warmup_ratio=0.1)
    assert curve[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert curve[10] == 1.0
    assert max(curve) == 1.0


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    # Of the 90 steps after warmup the last has 89/90 behind it: cos gives 0.5 * (1 + cos(pi * 89 / 90)) = 3.05e-4.
    [("cosine", 0.5, 3.0459e-4), ("linear", 0.5, 1 / 90), ("constant", 1.0, 1.0)],
)
def test_after_warmup_the_schedule_runs_to_the_end(schedule: str, middle: float, last: float) -> None:
    curve = factors(steps=100, warmup_ratio=0.1, schedule=schedule)
    assert curve[55] == pytest.approx(middle)  # halfway between step 10 and step 100
    assert curve[-1] == pytest.approx(last, rel=1e-4)
    assert all(later <= earlier for earlier, later in pairwise(curve[10:]))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_step_of_a_short_run_moves(schedule: str, warmup_ratio: float, steps: int) -> None:
    assert all(0.0 < factor <= 1.0 for factor in factors(steps=steps, warmup_ratio=warmup_ratio, schedule=schedule))


# --- operations ----------------------------------------------------------------------------------------------------


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


# --- checkpoints ---------------------------------------------------------------------------------------------------

MANIFEST = Manifest(step=20, world_size=2, zero_stage=3, fingerprint="f", settings={"train.lr": 0.1, "train.steps": 50})


def make_checkpoint(directory: Path, step: int) -> None:
    write_json(directory / f"step_{step}" / "manifest.json", vars(MANIFEST) | {"step": step})


def test_only_complete_checkpoints_are_listed_and_in_numerical_order(tmp_path: Path) -> None:
    for step in (100, 20, 9):
        make_checkpoint(tmp_path, step)
    (tmp_path / "step_200").mkdir()  # without a manifest: never finished
    (tmp_path / "step_200" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"half")
    write_json(tmp_path / ".step_300.tmp" / "manifest.json", {})  # killed just before it took its name
    write_json(tmp_path / "step_best" / "manifest.json", {})  # a copy that the user made
    assert checkpoint_steps(tmp_path) == [9, 20, 100]


def test_without_a_directory_there_are_no_checkpoints(tmp_path: Path) -> None:
    assert checkpoint_steps(tmp_path / "nothing") == []


def test_a_manifest_is_read_back_the_same(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 20)
    assert read_manifest(tmp_path, 20) == MANIFEST
    check_resumable(tmp_path, MANIFEST)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"world_size": 4}, ["2 ranks", "has 4"], id="ranks"),
        pytest.param({"zero_stage": 1}, ["ZeRO stage 3", "deepspeed"], id="stage"),
        pytest.param({"fingerprint": "g"}, ["another expanded checkpoint"], id="expansion"),
        pytest.param({"settings": {"train.lr": 0.2, "train.steps": 50}}, ["train.lr", "0.1", "0.2"], id="setting"),
        pytest.param({"settings": {"train.steps": 50}}, ["train.lr", "0.1"], id="setting gone"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_a_remedy(
    tmp_path: Path, change: dict[str, Any], words: list[str]
) -> None:
    make_checkpoint(tmp_path, 20)
    with pytest.raises(InputError, match="run_dir") as caught:
        check_resumable(tmp_path, Manifest(**(vars(MANIFEST) | change)))
    for word in [*words, "step_20"]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


# --- run log -------------------------------------------------------------------------------------------------------


UNITS = [Unit("layers.1.a", "matrix", 1, "a", 6), Unit("layers.1.b", "norm", 1, "b", 2)]


def write_log(run_dir: Path, first_step: int, steps: range) -> None:
    log = RunLog(run_dir, first_step, "model: m")
    if first_step == 0:
        log.refresh(0, UNITS, [1.0, 2.0], [2.0, 0.0], 0.0)
        log.evaluation(0, {"domain": {"loss": 3.0, "tokens": 5}})
    for step in steps:
        log.step({"step": step, "loss": float(step), "run": first_step})
        if step % 2 == 0:
            log.refresh(step, UNITS, [1.0, 2.0], [2.0, 0.0], 0.5)
            log.evaluation(step, {"domain": {"loss": 3.0, "tokens": 5}})
    log.close()


def test_records_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    write_log(tmp_path, 0, range(1, 8))  # crashed after step 7; the last checkpoint was step 4
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # in the middle of a line
    write_log(tmp_path, 4, range(5, 11))
    records = read_json_lines(tmp_path / "metrics.jsonl")
    steps = [(record["step"], record["run"]) for record in records if "loss" in record]
    assert steps == [(step, 0) for step in range(1, 5)] + [(step, 4) for step in range(5, 11)]
    assert [record["step"] for record in records if "eval" in record] == [0, 2, 4, 6, 8, 10]
    refreshes = read_json_lines(tmp_path / "unit_importance.jsonl")
    assert [record["step"] for record in refreshes] == [0, 2, 4, 6, 8, 10]


def test_a_run_from_the_start_keeps_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    write_log(tmp_path, 0, range(1, 8))
    write_log(tmp_path, 0, range(1, 3))
    records = read_json_lines(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == [1, 2]
    assert [record["step"] for record in records if "eval" in record] == [0, 2]
    assert [record["step"] for record in read_json_lines(tmp_path / "unit_importance.jsonl")] == [0, 2]


def test_a_refresh_is_written_as_the_design_says(tmp_path: Path) -> None:
    write_log(tmp_path, 0, range(1, 2))
    (line,) = (tmp_path / "unit_importance.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "step": 0,
        "units": [
            {"unit": "layers.1.a", "importance": 1.0, "multiplier": 2.0},
            {"unit": "layers.1.b", "importance": 2.0, "multiplier": 0.0},
        ],
    }


def test_tensorboard_has_the_same_numbers_and_the_configuration(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_log(tmp_path, 0, range(1, 5))
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(s, float(s)) for s in range(1, 5)]
    assert [event.step for event in board.Scalars("eval/domain_loss")] == [0, 2, 4]
    assert [event.value for event in board.Scalars("multiplier/layers.1.a")] == [2.0, 2.0, 2.0]
    assert "model: m" in board.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def test_neurons_of_a_layer_are_one_curve_and_a_histogram_in_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    neurons = [Unit(f"layers.2.mlp.neuron.{number}", "neuron", 2, "mlp.neuron", 3) for number in range(40)]
    log = RunLog(tmp_path, 0, "model: m")
    log.refresh(0, [*UNITS, *neurons], [1.0] * 42, [2.0, 0.5, *(0.1 * n for n in range(40))], 0.0)
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    curves = {tag: board.Scalars(tag)[0].value for tag in board.Tags()["scalars"] if tag.startswith("multiplier/")}
    assert curves == pytest.approx(
        {"multiplier/layers.1.a": 2.0, "multiplier/layers.1.b": 0.5, "multiplier/layers.2.mlp.neuron": 1.95}
    )
    assert board.Tags()["histograms"] == ["multiplier/layers.2.mlp.neuron"]
    assert len(read_json_lines(tmp_path / "unit_importance.jsonl")[0]["units"]) == 42
