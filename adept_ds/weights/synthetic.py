"""Models of random weights, of any family and size, written without ever holding one in memory.

The numbers of a tensor come from a stream of their own, which the seed and the tensor's name begin: they are the same
in whatever files, and in whatever order, tensors are written. What is constant in a fresh model of the family (gains of
norms, biases) is so here; transformers itself is asked, by a narrow model. Everything else is normally distributed,
with `initializer_range` of the configuration.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adept_ds.base.errors import InputError
from adept_ds.base.files import write_json
from adept_ds.base.outputs import check_output, new_output
from adept_ds.base.progress import Meter, ProgressCallback
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.families import Family, module_path
from adept_ds.models.family_table import FAMILIES
from adept_ds.models.loading import check_architecture
from adept_ds.models.weight_files import INDEX_NAME, SINGLE_NAME
from adept_ds.weights.tensor_files import MadeTensor, encoded, in_library_order, write_tensors

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

TOKENS = 257
"""Of the tokenizer: bytes, and one that ends a document."""

_END = 256

_PIECE = 1 << 20
"""Elements that are made at once."""

_HEAD_DIM, _EXPERTS = 64, 8

_NARROW = 16

_WIDTHS = (16, 32, *range(64, 1 << 15, 64))
"""From which a width is chosen."""


@dataclass(frozen=True)
class Synthetic:
    """A model to be written."""

    family: str
    """`model_type`."""
    parameters: int
    """About so many; exact numbers follow from width and depth."""
    vocabulary: int = 512
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keys of config.json that are set whatever follows from the size."""
    seed: int = 0
    dtype: str = "bfloat16"
    shard_bytes: int = 4 << 30
    """No file has more, but for one whose only tensor has."""


def write_synthetic(
    model: Synthetic, destination: Path, progress: ProgressCallback | None = None, *, overwrite: bool = False
) -> int:
    """Write it to `destination`, with a tokenizer of bytes; returns the number of its parameters.

    Args:
        overwrite: an earlier one in its place may be replaced (see `outputs.check_output`).

    Raises:
        InputError: there is no such family, dtype or option, no model of it is so small, or `destination` is no place
            for a new directory.
    """
    check_output(destination, "make_synthetic_model.py", {}, overwrite=overwrite)
    _check(model)
    options = _sized(model) | {_keys(model.family)[key]: value for key, value in model.options.items()}
    built = _contentless(model.family, options)
    family, std = FAMILIES[model.family], float(getattr(built.config, "initializer_range", 0.02))
    constants = _constants(model.family, options)
    contents: dict[str, MadeTensor] = {}
    for name, parameter in built.named_parameters():
        constant = constants.get(_without_number(name))
        for stored, shape in _stored(family, name, tuple(parameter.shape)).items():
            make = partial(_numbers, f"{model.seed}/{stored}", int(np.prod(shape)), constant, std, DTYPES[model.dtype])
            contents[stored] = MadeTensor(DTYPES[model.dtype], shape, make)
    total = sum(content.num_bytes for content in contents.values())
    meter = Meter(total, progress)
    with new_output(destination, "make_synthetic_model.py", overwrite=overwrite) as folder:
        shards = _shards(contents, model.shard_bytes)
        for name, tensors in shards.items():
            write_tensors(folder / name, in_library_order(tensors), partial(meter.advance, text=name), digested=False)
        if len(shards) > 1:
            weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
            write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _write_tokenizer(folder)
        built.config.architectures, built.config.dtype = [type(built).__name__], model.dtype
        built.config.save_pretrained(folder)
        check_architecture(ModelDirectory.read(folder))
    return sum(parameter.numel() for parameter in built.parameters())


def _check(model: Synthetic) -> None:
    if model.family not in FAMILIES:
        raise InputError(f"--family: '{model.family}' is none that is known; choose one of {', '.join(FAMILIES)}")
    if model.dtype not in DTYPES:
        raise InputError(f"--dtype: '{model.dtype}' is not possible; choose one of {', '.join(DTYPES)}")
    if model.vocabulary < TOKENS:
        raise InputError(f"--vocabulary: {model.vocabulary} is too small; the tokenizer of bytes has {TOKENS} tokens")
    known = _keys(model.family)
    for key in model.options:
        if key not in known:
            close = get_close_matches(key, known, n=1)
            meant = f"'{close[0]}'" if close else "one that config.json of such a model has"
            raise InputError(f"--set: '{key}' is no key of a {model.family} configuration; give {meant}")


@cache
def _keys(family: str) -> dict[str, str]:
    """Names of the configuration's keys -> the one of several by which it keeps the value."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(family)
    return {key: config.attribute_map.get(key, key) for key in (*config.to_dict(), *config.attribute_map)}


def _sized(model: Synthetic) -> dict[str, Any]:
    """The widest model that is deep enough for its width, a layer for every 64 of it.

    Raises:
        InputError: even the narrowest has more parameters.
    """

    def depth(width: int) -> int:
        one, two = (_count(model, _shaped(model, width, layers)) for layers in (1, 2))
        return round((model.parameters - one) / (two - one)) + 1

    low, high = 0, len(_WIDTHS) - 1
    while low < high:
        middle = (low + high + 1) // 2
        deep_enough = depth(_WIDTHS[middle]) >= max(2, _WIDTHS[middle] // _HEAD_DIM)
        low, high = (middle, high) if deep_enough else (low, middle - 1)
    layers = depth(_WIDTHS[low])
    if layers < 1:
        fewest = _count(model, _shaped(model, _WIDTHS[0], 1))
        raise InputError(f"--parameters: {model.parameters} is too few for {model.family}; give {fewest} or more")
    return _shaped(model, _WIDTHS[low], layers)


def _shaped(model: Synthetic, width: int, layers: int) -> dict[str, Any]:
    """Those keys of a model of this width and depth that its family has."""
    heads = max(1, width // _HEAD_DIM)
    shape = {
        **dict.fromkeys(("hidden_size", "n_embd", "moe_intermediate_size", "shared_expert_intermediate_size"), width),
        **dict.fromkeys(("intermediate_size", "n_inner"), 4 * width),
        **dict.fromkeys(("num_hidden_layers", "n_layer"), layers),
        **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads"), heads),
        **dict.fromkeys(("num_experts", "num_local_experts"), _EXPERTS),
        **dict.fromkeys(("max_position_embeddings", "n_positions"), 2048),
        "head_dim": width // heads,
        "num_experts_per_tok": 2,
        "vocab_size": model.vocabulary,
    }
    known = _keys(model.family)
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _END)
    return {known[key]: value for key, value in shape.items() if key in known} | tokens


def _count(model: Synthetic, options: Mapping[str, Any]) -> int:
    return sum(parameter.numel() for parameter in _contentless(model.family, options).parameters())


def _contentless(family: str, options: Mapping[str, Any]) -> Any:
    """The model itself, with no memory behind its parameters."""
    with torch.device("meta"):
        return _built(family, options)


def _built(family: str, options: Mapping[str, Any]) -> Any:
    """Raises `InputError`: transformers makes no model of these options."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    except Exception as error:  # of any kind, by the values that it was given
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(f"--set: transformers makes no {family} model of this ({reason}); change the values") from None


def _constants(family: str, options: dict[str, Any]) -> dict[str, float]:
    """Parameter, without the number of its layer -> the one value that all of its elements begin with."""
    known = _keys(family)
    narrow = {
        **dict.fromkeys(("hidden_size", "n_embd", "intermediate_size", "n_inner"), _NARROW),
        **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), _NARROW),
        **dict.fromkeys(("num_attention_heads", "n_head", "num_experts", "num_local_experts"), 2),
        "num_key_value_heads": 1,
        "head_dim": _NARROW // 2,
        "num_experts_per_tok": 1,
        "vocab_size": TOKENS,
    }
    torch.manual_seed(0)
    fresh = _built(family, options | {known[key]: value for key, value in narrow.items() if key in known})
    found: dict[str, float] = {}
    for name, parameter in fresh.named_parameters():
        low, high = (float(bound) for bound in parameter.detach().float().aminmax())
        if low == high:
            found[_without_number(name)] = low
    return found


def _without_number(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _stored(family: Family, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The tensors that a parameter of the model consists of in a file, as checkpoints of the family have them."""
    place = family.split_name(name)
    prefix, inner = (f"{family.layers}.{place[0]}.", place[1]) if place else ("", name)
    paths = family.stored_as.get(module_path(inner))
    if paths is None:
        return {name: shape}
    if "*" not in paths[0]:
        return {f"{prefix}{path}.weight": (shape[0] // len(paths), *shape[1:]) for path in paths}
    experts, rows, *rest = shape
    return {
        f"{prefix}{path.replace('*', str(expert))}.weight": (rows // len(paths), *rest)
        for expert in range(experts)
        for path in paths
    }


def _numbers(stream: str, count: int, constant: float | None, std: float, dtype: str) -> Iterator[bytes]:
    key = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:16], "little")
    generator = np.random.Generator(np.random.Philox(key=key))
    for start in range(0, count, _PIECE):
        size = min(_PIECE, count - start)
        if constant is None:
            yield encoded(generator.standard_normal(size, np.float32) * np.float32(std), dtype)
        else:
            yield encoded(np.full(size, constant, np.float32), dtype)


def _shards(contents: Mapping[str, MadeTensor], most: int) -> dict[str, dict[str, MadeTensor]]:
    """Weight files, none of more bytes than `most`, with their tensors."""
    shards: list[dict[str, MadeTensor]] = [{}]
    filled = 0
    for name, content in contents.items():
        if shards[-1] and filled + content.num_bytes > most:
            shards.append({})
            filled = 0
        shards[-1][name] = content
        filled += content.num_bytes
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": of for number, of in enumerate(shards, start=1)}


def _write_tokenizer(folder: Path) -> None:
    """A token for each byte, and one that ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    assert len(whole) == TOKENS
    whole.save_pretrained(folder)
