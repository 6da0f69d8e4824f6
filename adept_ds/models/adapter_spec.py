"""What is known of adapters without loading a model: their kinds, which projections get one, and what cannot work.

An adapter is a small trainable addition to a frozen projection; `adapters` attaches it, `weights.merging` merges it
into the projection's weight. Imports no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from adept_ds.base.errors import InputError
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.families import Family
from adept_ds.models.weight_files import Shapes

Targets = Literal["all"] | tuple[str, ...]
"""Projections by their path in a decoder layer ('self_attn.q_proj'); 'all': each that can have an adapter."""


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): W + scale B A, where B begins as zero.

    With `dora` (Liu et al. 2024, arXiv 2402.09353) the rows of that sum are brought to a length that is trained too:
    m (W + scale B A) / |W + scale B A|, where m begins as |W|, the length of each row.
    """

    rank: int = 16
    """Rows of A [rank, inputs] and columns of B [outputs, rank]."""
    alpha: float = 32.0
    """Numerator of the scale: alpha / rank, or alpha / sqrt(rank) with `rank_stabilised`."""
    dropout: float = 0.0
    """Of the adapter's input while it trains."""
    dora: bool = False
    rank_stabilised: bool = False
    """Kalajdzievski 2023, arXiv 2312.03732."""
    targets: Targets = "all"


@dataclass(frozen=True)
class OftSpec:
    """Orthogonal fine-tuning (Qiu et al. 2023, arXiv 2306.07280): the projection's input is rotated, block by block.

    Each block's rotation is the Cayley transform of a skew-symmetric matrix that begins as zero, in five terms of its
    Neumann series (arXiv 2506.19847), as is the default of peft.
    """

    block_size: int = 32
    """Inputs that one rotation mixes; it has to divide the inputs of every target."""
    targets: Targets = "all"


AdapterSpec = LoraSpec | OftSpec


def adaptable_projections(family: Family) -> list[str]:
    """Those that can have an adapter: single matrices, in the order of the family's table.

    Not stacks of experts, which are no modules of their own, and not what chooses among experts or weighs one: a
    handful of outputs each.
    """
    return [path for path, of in family.projections.items() if of.parts and not _is_stack(family, path)]


def target_projections(targets: Targets, family: Family) -> list[str]:
    """The paths that `targets` stands for, in the order of the family's table.

    Raises:
        InputError: none, or one that the family has not, or that cannot have an adapter.
    """
    possible = adaptable_projections(family)
    if targets == "all":
        return possible
    if not targets:
        raise InputError("method.targets: [] leaves nothing to train; name a projection, or write all")
    for path in targets:
        if path in possible:
            continue
        if path in family.projections:
            kind = "a stack of experts" if _is_stack(family, path) else "what weighs experts"
            raise InputError(
                f"method.targets: '{path}' is {kind}, which takes no adapter; choose from {', '.join(possible)}"
            )
        near = max(possible, key=lambda known: _likeness(path, known))
        raise InputError(f"method.targets: '{path}' is no projection of this architecture; did you mean '{near}'?")
    return [path for path in possible if path in targets]


def check_adapters(spec: AdapterSpec, model: ModelDirectory, shapes: Shapes) -> None:
    """What the model is told by its configuration, and by the shapes of its tensors.

    Raises:
        InputError: the model lacks a target that was named, or its shape does not fit the adapter.
    """
    paths = target_projections(spec.targets, model.family)
    inputs = _inputs_by_path(model.family, shapes)
    absent = [path for path in paths if path not in inputs]
    if spec.targets != "all" and absent:
        raise InputError(
            f"method.targets: '{absent[0]}' is in no layer of '{model.path}'; choose from {', '.join(sorted(inputs))}"
        )
    if isinstance(spec, OftSpec):
        _check_rotations(spec, model, {path: inputs[path] for path in paths if path in inputs})


def adapter_units(family: Family, names: Iterable[str]) -> dict[str, str]:
    """Name of an adapter's parameter -> unit; other parameters are left out.

    A unit is one factor of one projection in one layer: 'layers.3.self_attn.q_proj.lora_B'. Factors are lora_A and
    lora_B, with DoRA lora_magnitude_vector, and oft_R.
    """
    units = {}
    for name in names:
        parts, place = split_adapter_name(name), family.split_name(name)
        if parts and place:
            path = parts[0].rpartition(f".{place[0]}.")[2]
            units[name] = f"layers.{place[0]}.{path}.{parts[1]}"
    return units


def adapter_multipliers(units: Iterable[str], ratio: float) -> dict[str, float]:
    """Multipliers of LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns `ratio` times as fast as all else."""
    return {unit: ratio if unit.endswith(".lora_B") else 1.0 for unit in units}


def split_adapter_name(parameter: str) -> tuple[str, str] | None:
    """'model.layers.3.mlp.up_proj.lora_A.default.weight' -> ('model.layers.3.mlp.up_proj', 'lora_A'); else None."""
    match = _ADAPTER_NAME.fullmatch(parameter)
    return (match[1], match[2]) if match else None


_ADAPTER_NAME = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector|oft_R)\.default\.weight")
"""As peft calls them; 'default' is its name of an adapter that is the only one."""


def _is_stack(family: Family, path: str) -> bool:
    return any("*" in stored for stored in family.stored_as.get(path, ()))


def _likeness(path: str, known: str) -> tuple[bool, float]:
    """People leave out the module that a projection is in, or take that of another architecture."""
    same_last = path.rpartition(".")[2] == known.rpartition(".")[2]
    return same_last, difflib.SequenceMatcher(None, path, known).ratio()


def _inputs_by_path(family: Family, shapes: Shapes) -> dict[str, int]:
    """Adaptable projections that some layer has -> the number of their inputs."""
    possible, inputs = adaptable_projections(family), {}
    for name, shape in shapes.items():
        _, inner = family.split_name(name) or (0, "")
        path, _, last = inner.rpartition(".")
        if path in possible and last == "weight":
            inputs[path] = shape[0 if family.transposed else 1]
    return inputs


def _check_rotations(spec: OftSpec, model: ModelDirectory, inputs: dict[str, int]) -> None:
    """Raises `InputError`: blocks do not divide the inputs of a target, or peft has no rotation for this family."""
    if model.family.transposed:
        kind = model.config.get("model_type")
        raise InputError(f"method.name: oft is not possible for '{kind}', whose weights lie transposed; choose lora")
    for path, count in inputs.items():
        if count % spec.block_size:
            sizes = _common_divisors(list(inputs.values()))
            near = min(sizes, key=lambda size: abs(size - spec.block_size), default=None)
            remedy = f"take {near}" if near else "name fewer method.targets, whose inputs have a divisor in common"
            raise InputError(
                f"method.block_size: {spec.block_size} does not divide the {count} inputs of '{path}'; {remedy}"
            )


def _common_divisors(numbers: Sequence[int]) -> list[int]:
    """From 2 up: a rotation of one input is none."""
    return [size for size in range(2, min(numbers) + 1) if not any(number % size for number in numbers)]
