"""What DeepSpeed's file says and the run's own configuration too: said once, or twice the same, else it is a mistake.

A file for Hugging Face's Trainer has the word "auto" wherever the Trainer's arguments decide, and it means the same
here: what the run's configuration says, and for three sizes of ZeRO the Trainer's formulas of the model's width
(transformers 5, integrations/deepspeed.py: HfTrainerDeepSpeedConfig). Imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from adept_ds.base.errors import InputError
from adept_ds.config.deepspeed import check_deepspeed_file
from adept_ds.config.deepspeed_keys import AUTO, without_auto
from adept_ds.config.mistakes import nearest, shown
from adept_ds.config.schema import Config
from adept_ds.config.train_sections import TrainSection
from adept_ds.models.directory import ModelDirectory


class _Own(NamedTuple):
    """What the run has to say about a key of DeepSpeed's."""

    values: tuple[Any, ...]
    """Those that mean the same; the first is the run's."""
    because: str
    """Where it is said, with its value, in words."""
    remedy: str = 'make both the same, or write "auto" there'


def deepspeed_of_run(config: Config, model: ModelDirectory, num_ranks: int, steps: int | None) -> dict[str, Any]:
    """DeepSpeed's file with every "auto" filled in and without what the run's configuration says anyway.

    Args:
        num_ranks: that share the model.
        steps: micro-batches of a rank in an optimizer step, the anchor's apart; None where nothing is trained.

    Returns:
        `zero_optimization` and what else only this file can say; of the sections of precision, how losses are scaled
        and what `check_precision` has to look at. Plain ZeRO-3 without a file.

    Raises:
        InputError: see `check_deepspeed_file`; or both say something, and not the same: one line with both values and
            both places.
    """
    path, train = config.deepspeed, config.train
    user = check_deepspeed_file(path)
    if path is None:
        return user
    _compare_all(path, user, "", _of_the_whole(train, num_ranks, steps))
    _check_optimizer(path, user.get("optimizer", {}), train)
    _check_scheduler(path, user.get("scheduler", {}), train)
    if train.precision != AUTO:
        check_precision(path, user, train.precision, train.precision)
    zero = without_auto(_with_sizes(path, user["zero_optimization"], model))
    _check_groups(path, zero, num_ranks)
    _check_rhythm(path, user.get("steps_per_print"))
    others = {key: value for key, value in user.items() if key not in _SAID_BY_THE_RUN}
    for section in _PRECISIONS.keys() & others.keys():
        others[section] = without_auto(others[section])
    return others | {"zero_optimization": zero}


_SAID_BY_THE_RUN = frozenset(
    (
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        *("optimizer", "scheduler", "communication_data_type", "data_types"),
        *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    )
)
"""Every engine is given these by what builds it (`zero.build`)."""


_PRECISIONS = {"fp16": "fp16", "bf16": "bf16", "bfloat16": "bf16"}
"""Sections of DeepSpeed's file, and the `train.precision` that each switches on."""


def check_precision(path: Path, tree: Mapping[str, Any], precision: str, said: str) -> None:
    """The file switches nothing on or off that is not so.

    Args:
        precision: fp32, bf16 or fp16.
        said: what `train.precision` says of it.

    Raises:
        InputError: it does.
    """
    for section, switches_on in _PRECISIONS.items():
        enabled = tree.get(section, {}).get("enabled", AUTO)
        own = _Own((precision == switches_on,), f"train.precision is {said}")
        if enabled != AUTO:
            _compare(path, f"{section}.enabled", enabled, own)


def _of_the_whole(train: TrainSection, num_ranks: int, steps: int | None) -> dict[str, _Own]:
    """By dotted key."""
    size, micro = train.global_batch_size, train.micro_batch_size
    ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
    own = {
        "train_batch_size": _Own((size,), f"train.global_batch_size is {size}"),
        "train_micro_batch_size_per_gpu": _Own((micro,), f"train.micro_batch_size is {micro}"),
        "gradient_clipping": _Own((train.clip_grad_norm,), f"train.clip_grad_norm is {train.clip_grad_norm}"),
    }
    if steps is not None:
        batch = f"train.global_batch_size: {size} on {ranks} with train.micro_batch_size: {micro} makes {steps}"
        own["gradient_accumulation_steps"] = _Own((steps,), batch)
    exact = "gradients are averaged and added up in fp32, since importances are differences of small numbers"
    return own | {
        "communication_data_type": _Own(("fp32", "float32"), exact, "remove it"),
        "data_types.grad_accum_dtype": _Own(("fp32", "float32", None), exact, "remove it"),
        "bf16.check_grad_overflow": _ASKED_ONCE,
        "bfloat16.check_grad_overflow": _ASKED_ONCE,
        "fp16.auto_cast": _Own((False,), "inputs are tokens, which nothing casts", "remove it"),
        "zero_allow_untested_optimizer": _Own((True,), "training steps with an optimizer of its own", "remove it"),
        "zero_force_ds_cpu_optimizer": _Own((False,), "training steps with an optimizer of its own", "remove it"),
    }


_ASKED_ONCE = _Own((False,), "whether a gradient is a number is asked anyway (train.max_skipped)", "remove it")


def _check_optimizer(path: Path, section: Mapping[str, Any], train: TrainSection) -> None:
    kind = section.get("type", "AdamW")
    if kind.lower() not in ("adam", "adamw"):  # DeepSpeed's Adam is AdamW unless adam_w_mode says otherwise
        _refuse(path, "optimizer.type", kind, "training steps with AdamW", "write AdamW, or remove the section")
    adamw = "training steps with AdamW as it was published"
    own = {
        "lr": _Own((train.lr,), f"train.lr is {train.lr}"),
        "betas": _Own((list(train.betas),), f"train.betas is {list(train.betas)}"),
        "eps": _Own((train.eps,), f"train.eps is {train.eps}"),
        "weight_decay": _Own((train.weight_decay,), f"train.weight_decay is {train.weight_decay}"),
        "adam_w_mode": _Own((True,), adamw, "remove it"),
        "bias_correction": _Own((True,), adamw, "remove it"),
        "amsgrad": _Own((False,), adamw, "remove it"),
        "fp32_optimizer_states": _Own((True,), "the optimizer's states are fp32", "remove it"),
        "torch_adam": _Own((True, False), "no kernel of DeepSpeed's is used", "remove it"),
    }
    _check_parameters(path, "optimizer.params", section.get("params", {}), own)


_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
"""DeepSpeed's schedules, and the `train.schedule` that each is."""


def _check_scheduler(path: Path, section: Mapping[str, Any], train: TrainSection) -> None:
    kind, schedule = section.get("type"), f"train.schedule is {train.schedule}"
    if kind is not None and kind not in _SCHEDULES:
        _refuse(path, "scheduler.type", kind, f"{schedule}, and none of its kinds is that", "remove the section")
    if kind is not None and _SCHEDULES[kind] != train.schedule:
        remedy = f"set train.schedule: {_SCHEDULES[kind]}, which it stands for, or remove the section"
        _refuse(path, "scheduler.type", kind, schedule, remedy)
    warmup = train.num_warmup_steps
    said = f"train.warmup_steps is {warmup}"
    if train.warmup_steps is None:
        said = f"train.warmup_ratio: {train.warmup_ratio} of train.steps: {train.steps} is {warmup}"
    rises, falls = "a warmup rises from 0 in equal steps", "the cosine ends at 0"
    own = {
        "warmup_min_lr": _Own((0,), rises, "remove it"),
        "warmup_max_lr": _Own((train.lr,), f"train.lr is {train.lr}"),
        "warmup_num_steps": _Own((warmup, max(1, warmup)), said),  # DeepSpeed knows no warmup of 0 steps
        "warmup_type": _Own(("linear",), rises, "remove it"),
        "warmup_min_ratio": _Own((0,), rises, "remove it"),
        "cos_min_ratio": _Own((0,), falls, "remove it"),
        "total_num_steps": _Own((train.steps,), f"train.steps is {train.steps}"),
        "last_batch_iteration": _Own((-1,), "where a run goes on is in its checkpoints", "remove it"),
    }
    _check_parameters(path, "scheduler.params", section.get("params", {}), own)


def _check_parameters(path: Path, name: str, parameters: Mapping[str, Any], own: Mapping[str, _Own]) -> None:
    for key in parameters:
        if key not in own:
            raise InputError(f"deepspeed: '{path}': unknown key '{name}.{key}'; {nearest(key, list(own), name)}")
    _compare_all(path, parameters, f"{name}.", own)


def _compare_all(path: Path, tree: Mapping[str, Any], prefix: str, own: Mapping[str, _Own]) -> None:
    for key, said_by_run in own.items():
        section, _, leaf = key.rpartition(".")
        values: Mapping[str, Any] = tree.get(section, {}) if section else tree
        if leaf in values and values[leaf] != AUTO:
            _compare(path, f"{prefix}{key}", values[leaf], said_by_run)


def _compare(path: Path, key: str, value: Any, own: _Own) -> None:
    if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in own.values):
        _refuse(path, key, value, own.because, own.remedy)


def _refuse(path: Path, key: str, value: Any, because: str, remedy: str) -> NoReturn:
    raise InputError(f"deepspeed: '{path}' says {key}: {shown(value)}, but {because}; {remedy}")


_SIZES: dict[str, tuple[Callable[[int], int], tuple[int, ...]]] = {
    "reduce_bucket_size": (lambda width: width * width, (1, 2, 3)),
    "stage3_prefetch_bucket_size": (lambda width: int(0.9 * width * width), (3,)),
    "stage3_param_persistence_threshold": (lambda width: 10 * width, (3,)),
}
"""By key: elements, from the width of the residual stream, and the stages at which the Trainer fills them in."""


def _with_sizes(path: Path, zero: Mapping[str, Any], model: ModelDirectory) -> dict[str, Any]:
    filled = dict(zero)
    for key, (elements, stages) in _SIZES.items():
        if zero.get(key) != AUTO or zero["stage"] not in stages:
            continue
        width = model.config.get("hidden_size") or model.config.get("n_embd")
        if width is None:
            raise InputError(
                f"deepspeed: '{path}' says zero_optimization.{key}: 'auto', but '{model.path}/config.json' has no "
                "hidden_size to compute it from; write a number"
            )
        filled[key] = elements(width)
    return filled


def _check_groups(path: Path, zero: Mapping[str, Any], num_ranks: int) -> None:
    """hpZ: every host has as many ranks as its group."""
    size = zero.get("zero_hpz_partition_size", 1)
    if isinstance(size, int) and size > 1 and num_ranks % min(size, num_ranks):
        because = f"{num_ranks} ranks are no whole number of such groups"
        _refuse(path, "zero_optimization.zero_hpz_partition_size", size, because, "write the number of ranks of a host")


def _check_rhythm(path: Path, steps_per_print: int | None) -> None:
    if steps_per_print is not None and steps_per_print < 1:
        raise InputError(
            f"deepspeed: '{path}' says steps_per_print: {steps_per_print}, which is no number of steps; remove it"
        )
