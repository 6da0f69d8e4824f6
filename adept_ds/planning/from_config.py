"""From a configuration to what a plan is about. Of the model, config.json alone is read."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adept_ds.base.errors import InputError
from adept_ds.base.terminal import OutputCapture
from adept_ds.config.checks import accumulation_steps, check_num_copies, check_replay
from adept_ds.config.deepspeed_keys import AUTO
from adept_ds.config.deepspeed_merge import check_precision, deepspeed_of_run
from adept_ds.config.layer_sections import ExpandSection
from adept_ds.config.schema import Config
from adept_ds.methods.shape import Start, method_of
from adept_ds.models.directory import ModelDirectory
from adept_ds.planning.candidates import Task
from adept_ds.planning.contentless import contentless_shapes
from adept_ds.planning.recording import outline_of
from adept_ds.planning.zero_settings import settings_by_stage
from adept_ds.probing.selection import layers_without_probe

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_COPIES_OF_AUTO = 4


@dataclass(frozen=True)
class Planned:
    """A training, as far as it can be known before it runs."""

    task: Task
    layers: tuple[int, ...]
    """Of the base: those that are copied, or trained in place."""
    guessed: str
    """What is not known yet, and was taken for what; '' if all is known."""


def planned(config: Config, gpus: int) -> Planned:
    """Raises `InputError`: a key, config.json or DeepSpeed's file is at fault, or batches do not divide evenly."""
    model = model_config_only(config.model)
    if config.method.chooses_layers:
        check_num_copies(config, model)
    precision = "bf16" if config.train.precision == "auto" else config.train.precision
    config.method.check_model(model, lambda: contentless_shapes(model))
    accumulation_steps(config.train.model_copy(update={"micro_batch_size": 1}), gpus)
    merged = _first_taken(config, model, gpus, precision)
    shipped = config.model_copy(update={"deepspeed": None})  # its files go with every run
    own_stage = merged["zero_optimization"]["stage"] if config.deepspeed else None
    settings = settings_by_stage(merged, str(config.deepspeed)) if config.deepspeed else settings_by_stage(None)
    layers, guessed = _layers(config, model)
    start = _start(config, model, layers)
    trains = method_of(config).trains(config, start)

    def run_takes(stage: int, rows: int, batch: int, ranks: int) -> bool:
        try:
            _as_run(config if stage == own_stage else shipped, model, rows, batch, ranks)
        except InputError:
            return False
        return True

    keep = config.train.keep_gathered_gib
    outline = replace(
        outline_of(start.model, trains, _DTYPES[precision], config.data.seq_len),
        kept_per_element=config.method.kept_per_element,
        sets_gradients_aside=config.refreshes and config.importance.source == "online",
    )
    task = Task(
        outline,
        config.train.global_batch_size,
        None if keep == "auto" else keep * 2.0**30,
        precision,
        settings,
        run_takes,
    )
    return Planned(task, layers, guessed)


def _first_taken(config: Config, model: ModelDirectory, gpus: int, precision: str) -> dict[str, Any]:
    """DeepSpeed's file as a run has it that takes the smallest micro-batches of all that it takes.

    Raises:
        InputError: a run takes none; why not the smallest of all.
    """
    file, batch = config.deepspeed, config.train.global_batch_size
    share, refusal = batch // gpus, None
    for rows in (rows for rows in range(1, share + 1) if share % rows == 0):
        try:
            merged = _as_run(config, model, rows, batch, gpus)
        except InputError as error:
            refusal = refusal or error
            continue
        if file is not None:
            _check_file(file, merged, config.train.precision, precision)
        return merged
    assert refusal is not None
    raise refusal


def _as_run(config: Config, model: ModelDirectory, rows: int, batch: int, ranks: int) -> dict[str, Any]:
    """DeepSpeed's file merged with a configuration that has micro-batches of `rows` sequences.

    Raises:
        InputError: a run refuses one of both.
    """
    train = config.train.model_copy(update={"micro_batch_size": rows, "global_batch_size": batch})
    stepped = config.model_copy(update={"train": train})
    merged = deepspeed_of_run(stepped, model, ranks, accumulation_steps(train, ranks))
    check_replay(stepped, ranks)
    return merged


def _check_file(file: Path, merged: dict[str, Any], said: str, precision: str) -> None:
    """What a run checks on its device, which here is a GPU that trains in `precision`."""
    if said == AUTO:
        check_precision(file, merged, precision, f"auto, which is {precision} in a plan")
    silence = OutputCapture(Path(os.devnull), is_main=False)  # DeepSpeed's import speaks to the terminal
    try:
        from adept_ds.zero.user_config import check_on_any_device

        check_on_any_device(file, merged)
    finally:
        silence.restore()


def model_config_only(model: str) -> ModelDirectory:
    """A directory that holds config.json, or the hub's, of which nothing else is fetched.

    Raises:
        InputError: neither is to be had.
    """
    path = Path(model).expanduser()
    if path.is_file():
        raise InputError(f"model: '{model}' is a file; give a directory with it as config.json")
    if not path.is_dir():
        path = _from_hub(model)
    if not (path / "config.json").is_file():
        raise InputError(f"model: '{path}' has no config.json; give a Hugging Face model directory")
    return ModelDirectory.read(path)


def _from_hub(model: str) -> Path:
    if model.count("/") != 1 or model.startswith((".", "~", "/")):
        raise InputError(f"model: '{model}' does not exist; give a directory with a config.json")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["config.json"]))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"model: '{model}' is no directory and not to be had from the hub ({reason}); "
            "give a directory with a config.json"
        ) from None


def _layers(config: Config, model: ModelDirectory) -> tuple[tuple[int, ...], str]:
    expand = config.expand
    if not config.method.chooses_layers:
        return tuple(range(model.num_layers)), ""
    if not expand.needs_probe:
        return tuple(layers_without_probe(expand, model.num_layers, config.probe.seed)), ""
    count = expand.num_copies or min(_COPIES_OF_AUTO, model.num_layers - expand.spare_top)
    spread = ExpandSection(k=count, choose="uniform", spare_top=expand.spare_top)
    layers = tuple(layers_without_probe(spread, model.num_layers, config.probe.seed))
    how_many = f"k: auto taken for {count}, " if expand.num_copies is None else ""
    listed = ",".join(map(str, layers))
    return layers, f"which layers the probe will choose: {how_many}evenly spread, expand.layers=[{listed}]"


def _start(config: Config, base: ModelDirectory, layers: tuple[int, ...]) -> Start:
    """As `run.start` finds it once it is there."""
    if not config.method.makes_copies:
        return Start(base, layers, base, layers)
    origins = [origin for layer in range(base.num_layers) for origin in [layer] * (1 + (layer in layers))]
    copies = tuple(i for i, origin in enumerate(origins) if i and origins[i - 1] == origin)
    expanded = replace(base, config=base.family.expand_config(base.config, origins), num_layers=len(origins))
    return Start(expanded, copies, base, layers)
