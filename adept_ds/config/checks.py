"""What is refused before anything heavy starts: inputs that are not there, and settings that cannot work together.

Like `config`, this module imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adept_ds.base.errors import InputError
from adept_ds.config.deepspeed import check_deepspeed_config
from adept_ds.config.schema import Config, CorpusSource, Stability, TrainSection, corpus_files
from adept_ds.models.directory import family_of, layer_count, read_model_config, resolve_model_dir
from adept_ds.models.families import Family


def check_run(config: Config, num_ranks: int) -> tuple[Path, Family]:
    """Everything that a whole run needs; returns the model's directory and family.

    Raises:
        InputError: one line naming the key, the value and the remedy.
    """
    model_dir, family = check_model(config)
    if config.expand.needs_probe:
        check_probe(config)
    elif config.lr_policy.map != "constant" and config.importance.source == "probe":
        check_files("probe.corpus", config.probe.corpus)
    check_training_inputs(config, num_ranks)
    return model_dir, family


def check_model(config: Config) -> tuple[Path, Family]:
    """The model can be read, its family is known, and it has the layers that are to be copied."""
    model_dir = resolve_model_dir("model", config.model)
    family = family_of(model_dir)
    num_layers = layer_count(model_dir)
    if config.expand.num_copies is not None and config.expand.num_copies > num_layers:
        raise InputError(
            f"expand.k: {config.expand.num_copies} is more than the {num_layers} layers of '{config.model}'; "
            f"choose at most {num_layers}"
        )
    check_layers(model_dir, config.expand.layers or [])
    return model_dir, family


def check_layers(model_dir: Path, layers: Sequence[int]) -> None:
    """Every listed layer exists in the model."""
    num_layers = layer_count(model_dir)
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise InputError(f"expand.layers: {layer} is no layer of '{model_dir}'; it has 0 to {num_layers - 1}")


def check_training_inputs(config: Config, num_ranks: int) -> None:
    """Corpora, DeepSpeed's configuration and batch sizes."""
    check_files("data.domain", config.data.domain)
    if config.data.replay:
        check_files("data.replay", config.data.replay)
    if config.data.general_eval:
        check_files("data.general_eval", config.data.general_eval)
    if config.data.domain_eval:
        check_files("data.domain_eval", config.data.domain_eval)
    check_deepspeed_config(config)
    accumulation_steps(config.train, num_ranks)
    _check_replay(config, num_ranks)


def _check_replay(config: Config, num_ranks: int) -> None:
    """A batch holds replayed and domain sequences; with online importance, both fill whole micro-batches."""
    if not config.data.replay:
        return
    size, replayed = config.train.global_batch_size, config.replayed
    unit = config.train.micro_batch_size * num_ranks if config.importance.source == "online" else 1
    if 0 < replayed < size and replayed % unit == 0:
        return
    what = f"data.replay_share: {config.data.replay_share} replays {replayed} of the {size} sequences of a batch"
    if unit > 1:
        what += (
            f", no multiple of train.micro_batch_size ({config.train.micro_batch_size}) times the number of ranks "
            f"({num_ranks}), which importance.source: online needs"
        )
    if size < 2 * unit:
        raise InputError(f"{what}; raise train.global_batch_size to at least {2 * unit}, to have room for both texts")
    nearest = min(max(1, round(replayed / unit)) * unit, size - unit)
    raise InputError(f"{what}; use {nearest / size:.6g}, which replays {nearest}")


def accumulation_steps(train: TrainSection, num_ranks: int) -> int:
    """Micro-batches per rank and optimizer step. Raises `InputError` when the batch does not divide evenly."""
    size, micro = train.global_batch_size, train.micro_batch_size
    if size < num_ranks:
        raise InputError(
            f"train.global_batch_size: {size} blocks per step cannot feed {num_ranks} ranks; "
            f"set it to at least {num_ranks} or start fewer ranks"
        )
    if size % (micro * num_ranks):
        nearest = max(1, round(size / (micro * num_ranks))) * micro * num_ranks
        raise InputError(
            f"train.global_batch_size: {size} is not a multiple of train.micro_batch_size ({micro}) times the number "
            f"of ranks ({num_ranks}); use {nearest}"
        )
    return size // (micro * num_ranks)


def check_probe(config: Config) -> None:
    """What stage one reads: the corpus, and what the choice of layers is compared with."""
    check_files("probe.corpus", config.probe.corpus)
    stability = config.probe.stability
    if not isinstance(stability, Stability):
        return
    if stability.corpus is not None:
        check_files("probe.stability.corpus", stability.corpus)
    if stability.model is not None:
        model_dir = resolve_model_dir("model", config.model)
        other_dir = resolve_model_dir("probe.stability.model", stability.model)
        own, other = read_model_config(model_dir), read_model_config(other_dir)
        for key in ("model_type", family_of(model_dir).layer_count_key, "vocab_size"):
            if own.get(key) != other.get(key):
                raise InputError(
                    f"probe.stability.model: '{stability.model}' has {key} {other.get(key)!r}, but '{config.model}' "
                    f"has {own.get(key)!r}; give another checkpoint of the same architecture"
                )


def check_files(name: str, corpus: Sequence[Path | CorpusSource]) -> None:
    """Every file of key `name` exists and is not empty."""
    if not corpus:
        raise InputError(f"{name}: no corpus given; list one or more files of {{'text': ...}} lines")
    for path in corpus_files(corpus):
        if not path.is_file():
            raise InputError(f"{name}: '{path}' does not exist; give a .jsonl or .txt file")
        if path.stat().st_size == 0:
            raise InputError(f"{name}: '{path}' is empty; give a file with at least one text")
