"""What the commands on a configuration need of the stages before them: looked at before anything takes time.

Imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

from pathlib import Path

from adept_ds.base.errors import InputError
from adept_ds.base.guard_record import GuardStop
from adept_ds.base.run_dir import EXPANSION_NAME, RunDirectory, checkpoint_steps
from adept_ds.config.decaying import OPTION
from adept_ds.config.resolved import Purpose, corpora_read
from adept_ds.config.schema import Config
from adept_ds.data.documents import check_corpus
from adept_ds.data.task_files import check_tasks
from adept_ds.methods.shape import method_of
from adept_ds.weights.expansion import is_turned


def check_ready(config: Config, purpose: Purpose, step: int | None = None) -> None:
    """The files that a command begins with are there.

    Args:
        step: of the checkpoint that is exported; None: as `exported_step` chooses.

    Raises:
        InputError: they are not; the message names the command that makes them.
    """
    run = RunDirectory(config.run_dir)
    expands = method_of(config).makes_copies
    if purpose == "expand":
        check_expands(config)
    if purpose == "expand" or (purpose == "train" and not expands):
        check_probed(config)
    if purpose == "train" and expands and not run.expansion.is_file():
        raise InputError(f"train: '{run.expansion}' does not exist; run `adept expand CONFIG` first")
    if purpose in ("export", "dial"):
        exported_step(config, step)
    if purpose == "eval" and not (run.export / "config.json").is_file():
        makes = "export" if config.dial is None else "dial"
        raise InputError(f"eval: '{run.export}' holds no model; run `adept {makes} CONFIG` first")


def check_diagnosable(config: Config) -> None:
    """There is a trained run to look into. Raises `InputError`, naming the command that makes what is missing."""
    run = RunDirectory(config.run_dir)
    if not run.unit_movement.is_file():
        raise InputError(f"diagnose: '{run.unit_movement}' does not exist; run `adept run CONFIG` first")
    model = trained_model(config)
    if method_of(config).makes_copies and not (model / EXPANSION_NAME).is_file():
        raise InputError(f"diagnose: '{model}' holds no adapted model; run `adept export CONFIG` first")


def trained_model(config: Config) -> Path:
    """The adapted model as it was trained, whatever the dial or `adept export --alpha` makes of it."""
    run = RunDirectory(config.run_dir)
    return run.export if config.dial is None and not is_turned(run.export) else run.trained


def check_expands(config: Config) -> None:
    """Raises `InputError`: the method makes no copies."""
    if not method_of(config).makes_copies:
        raise InputError(
            f"method: {config.method.name} trains the model in place and expands nothing; run `adept train CONFIG`"
        )


def check_probed(config: Config) -> None:
    """Raises `InputError`: layers are to be chosen by a probe that is not there."""
    run = RunDirectory(config.run_dir)
    found = run.place_benefits if config.weighs_places else run.layer_importance
    if config.needs_probe and not found.is_file():
        raise InputError(f"expand: '{found}' does not exist; run `adept probe CONFIG` first, or set expand.layers")


def check_texts(config: Config, purpose: Purpose) -> None:
    """The corpora that a command reads begin with texts, and there are tasks where some are asked for.

    Raises:
        InputError: as `check_corpus` and `check_tasks`.
    """
    for key, corpus in corpora_read(config, purpose).items():
        check_corpus(key, corpus, config.data)
    if purpose in ("run", "eval"):
        check_tasks(config.eval, config.data)


def check_decays(trunk: Config, step: int) -> None:
    """There is a checkpoint of step `step` to decay from. Raises `InputError`, naming those that there are."""
    checkpoints = RunDirectory(trunk.run_dir).checkpoints
    steps = checkpoint_steps(checkpoints)
    if step in steps:
        return
    train = trunk.train
    flat = [known for known in steps if train.num_warmup_steps <= known <= train.flat_until]
    there = f"choose one of {flat}, or" if flat else "there is none where the learning rate is flat;"
    raise InputError(
        f"{OPTION}: '{checkpoints}' has no checkpoint of step {step}; {there} train with a train.checkpoint_every "
        f"(now {train.checkpoint_every}) that writes it and a train.keep_checkpoints (now {train.keep_checkpoints}) "
        "that keeps it"
    )


def exported_step(config: Config, step: int | None = None) -> int:
    """The step of the checkpoint that is exported: the newest, or the best where the guard has ended training, or the
    one that is asked for.

    Raises:
        InputError: there is none, or the best one is gone: those that are left are others, and where the guard ended
            training general text was forgotten.
    """
    run, stop = RunDirectory(config.run_dir), guard_stop(config)
    checkpoints = run.checkpoints
    steps = checkpoint_steps(checkpoints)
    if not steps:
        raise InputError(f"export: '{checkpoints}' has no checkpoint; run `adept train CONFIG` first")
    if step is not None and step not in steps:
        raise InputError(f"--step: '{checkpoints}' has no checkpoint of step {step}; choose one of {steps}")
    if step is not None or stop is None:
        return steps[-1] if step is None else step
    if stop.best not in steps:
        raise InputError(
            f"export: '{checkpoints}' lacks the checkpoint of step {stop.best}, which is the result since the guard "
            f"ended training after step {stop.step}; copy it there again, or put those of later steps and "
            f"'{run.guard}' aside and run `adept train CONFIG`, which makes it again, or choose one of {steps} with "
            "`adept export CONFIG --step`"
        )
    return stop.best


def guard_stop(config: Config) -> GuardStop | None:
    """Whether the guard has ended training, by its settings of now. Without any checkpoint training is not begun.

    Raises:
        InputError: it has, and nothing was good.
    """
    guard = config.guard
    if guard is None or guard.action != "stop":
        return None
    run = RunDirectory(config.run_dir)
    if not checkpoint_steps(run.checkpoints):
        return None
    return GuardStop.of(run.guard, guard.max_general_rise, guard.confidence)
