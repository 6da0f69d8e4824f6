"""Inputs that are not there, and settings that cannot work together: refused before anything heavy starts.

Imports neither torch nor DeepSpeed. Each function raises `InputError`: one line naming the key, the value and the
remedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adept_ds.base.errors import InputError
from adept_ds.config.corpus_entries import CorpusFiles, corpus_sources
from adept_ds.config.corpus_files import find_files
from adept_ds.config.schema import Config
from adept_ds.config.train_sections import TrainSection
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.tokenizer_files import TokenizerFiles


def check_num_copies(config: Config, model: ModelDirectory) -> None:
    """The model has the layers that are to be copied."""
    copies, spared = config.expand.num_copies, config.expand.spare_top
    places = model.num_layers - spared
    if places < 1:
        raise InputError(
            f"expand.spare_top: {spared} leaves none of the {model.num_layers} layers of '{config.model}'; lower it"
        )
    if copies is not None and copies > places:
        without = f" without the {spared} of expand.spare_top" if spared else ""
        raise InputError(
            f"expand.k: {copies} is more than the {places} layers of '{config.model}'{without}; choose at most {places}"
        )
    check_layers(config.expand.layers or [], model)
    if copies is not None and config.expand.by_gain:
        check_room(copies, config.expand.min_distance, places)


def check_room(copies: int, distance: int, num_layers: int) -> None:
    """So many copies have room with `distance` layers from one to the next (`expand.min_distance`)."""
    room = -(-num_layers // distance)
    if copies > room:
        raise InputError(
            f"expand.min_distance: {distance} leaves room for {room} of the {copies} copies of expand.k in "
            f"{num_layers} layers; lower one of both"
        )


def check_layers(layers: Sequence[int], model: ModelDirectory) -> None:
    """Every listed layer exists in the model."""
    for layer in layers:
        if not 0 <= layer < model.num_layers:
            raise InputError(
                f"expand.layers: {layer} is no layer of '{model.path}'; it has 0 to {model.num_layers - 1}"
            )


def check_same_architecture(config: Config, model: ModelDirectory, name: str, reference: ModelDirectory) -> None:
    """Layers of `probe.stability.model` correspond to those of the model, and its tokens too."""
    for key in ("model_type", model.family.layer_count_key, "vocab_size"):
        if model.config.get(key) != reference.config.get(key):
            raise InputError(
                f"probe.stability.model: '{name}' has {key} {reference.config.get(key)!r}, but "
                f"'{config.model}' has {model.config.get(key)!r}; give another checkpoint of the same architecture"
            )


def check_replay(config: Config, num_ranks: int) -> None:
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
    """Micro-batches per rank and optimizer step, where the batch divides evenly."""
    size, micro = train.global_batch_size, train.micro_batch_size
    if size < num_ranks:
        raise InputError(
            f"train.global_batch_size: {size} sequences per step cannot feed {num_ranks} ranks; "
            f"set it to at least {num_ranks} or start fewer ranks"
        )
    if size % (micro * num_ranks):
        nearest = max(1, round(size / (micro * num_ranks))) * micro * num_ranks
        raise InputError(
            f"train.global_batch_size: {size} is not a multiple of train.micro_batch_size ({micro}) times the number "
            f"of ranks ({num_ranks}); use {nearest}"
        )
    return size // (micro * num_ranks)


def anchor_shape(config: Config, num_ranks: int) -> tuple[int, int]:
    """Micro-batches per rank and optimizer step that anchor sequences make, and the rows of each.

    As few micro-batches as `train.micro_batch_size` allows, of as few rows as hold them: what is left over are rows
    that count nothing, so that all ranks make the same passes.
    """
    share = -(-config.anchored // num_ranks)
    if not share:
        return 0, 0
    micro_batches = -(-share // config.train.micro_batch_size)
    return micro_batches, -(-share // micro_batches)


def check_anchor(config: Config, model: ModelDirectory) -> None:
    """Text can be sampled from the model, if that is asked for."""
    if config.anchor and config.anchor.text == "sampled" and first_token(model) is None:
        raise InputError(
            f"anchor.text: sampled, but the tokenizer of '{config.model}' has no token that a text begins or ends "
            "with, which the first would follow; use text: corpus"
        )


def first_token(model: ModelDirectory) -> int | None:
    """What a text that the model writes by itself begins behind: the token that begins texts, or that ends them."""
    files = TokenizerFiles.read(model.path)
    begins = files.token_id("bos_token")
    return files.token_id("eos_token") if begins is None else begins


def check_files(key: str, corpus: Sequence[Path | CorpusFiles]) -> None:
    """The files of `key` are there; what is in them is not looked at."""
    if not corpus:
        raise InputError(f"{key}: no corpus given; list one or more files of {{'text': ...}} lines")
    for source in corpus_sources(corpus):
        find_files(key, source.files)
