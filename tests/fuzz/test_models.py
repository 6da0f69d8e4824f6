"""What others publish: a model's configuration, index, weights and tokenizer."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from harness.fuzzing import Fuzzing, Kind, Sandbox, file_kind
from harness.models import save_tiny_model
from harness.mutations import Draw, changed_json, changed_safetensors, spoiled
from harness.tokenizers import save_byte_pairs, save_chatml, save_llama_json, save_unigrams, train_sentencepiece
from hypothesis import strategies as st

from adept_ds.data.tokenizer import TextTokenizer
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.loading import check_architecture
from adept_ds.models.tokenizer_files import check_tokenizer
from adept_ds.weights.expansion import describe_expansion, expand_checkpoint
from adept_ds.weights.fingerprints import config_digest, fingerprint_of, hash_tensors
from adept_ds.weights.hf_directory import stored_tensors

FAMILIES = ("llama", "gpt2", "qwen3_moe", "gemma3_text")
TINY: dict[str, Any] = {"num_hidden_layers": 2, "n_layer": 2}
TEXTS = ["hello world", "<s> Über\x00 東京 🙂\n\n<|im_end|>", "", " "]


def prepare(sandbox: Sandbox) -> Sandbox:
    for family in FAMILIES:
        save_tiny_model(sandbox.inputs / family, family, **TINY)
    sharded = sandbox.inputs / "sharded"
    save_tiny_model(sharded, "llama", **TINY)
    split(sharded)
    for name, save in TOKENIZERS.items():
        save(sandbox.inputs / name)
        family = "gpt2" if name == "pairs" else "llama"
        config = {"model_type": family, "vocab_size": 70_000, "num_hidden_layers": 2, "n_layer": 2}
        (sandbox.inputs / name / "config.json").write_text(json.dumps(config))
    for file, tree in OLDER_SETTINGS.items():
        (sandbox.inputs / "letters" / file).write_text(json.dumps(tree))
    return sandbox


OLDER_SETTINGS: dict[str, Any] = {
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}},
    "added_tokens.json": {"<extra>": 355},
}
"""Files beside a tokenizer that older versions of transformers wrote."""


def split(model: Path) -> None:
    """One weight file into two with an index, without the help of the program."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, model / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


TOKENIZERS: dict[str, Callable[[Path], object]] = {
    "bytes": save_chatml,
    "letters": save_llama_json,
    "unigrams": save_unigrams,
    "pairs": save_byte_pairs,
    "sentencepiece": train_sentencepiece,
}


def read_model(sandbox: Sandbox, name: str) -> ModelDirectory:
    """As every command does, and as those do that work on its files."""
    model = ModelDirectory.resolve("model", str(sandbox.inputs / name))
    config_digest(model.config)
    describe_expansion(model.path, sandbox.out / "new", [0])
    return model


def expand_model(sandbox: Sandbox, name: str) -> None:
    model = read_model(sandbox, name)
    fingerprint_of(hash_tensors(stored_tensors(model.path)))
    expand_checkpoint(model.path, sandbox.out / "new", [0])
    if (sandbox.out / "new").stat().st_size > 1 << 30:
        raise AssertionError("larger than its source allows")


def load_architecture(sandbox: Sandbox, name: str) -> None:
    check_architecture(read_model(sandbox, name))


def use_tokenizer(sandbox: Sandbox, name: str) -> None:
    directory = sandbox.inputs / name
    check_tokenizer(ModelDirectory.read(directory), "auto", {"data.seq_len": 32})
    both: tuple[Literal["text", "parse"], ...] = ("text", "parse")
    for letters in both:
        tokenizer = TextTokenizer(directory, bos="auto", special_tokens_in_text=letters, bos_per="document")
        tokenizer.fingerprint()
        assert tokenizer.eos_id is None or tokenizer.eos_id >= 0
        tokenizer.encode(TEXTS)
        tokenizer.encode_with_offsets(TEXTS[1])


def changed_proto(content: bytes) -> st.SearchStrategy[bytes]:
    """A SentencePiece model: its pieces and settings, or bytes."""
    from sentencepiece import sentencepiece_model_pb2 as library

    @st.composite
    def changed(draw: Draw) -> bytes:
        model = library.ModelProto.FromString(content)
        piece = model.pieces[draw(st.integers(0, len(model.pieces) - 1))]
        which = draw(st.integers(0, 3))
        if which == 0:
            piece.piece = draw(st.sampled_from(("", "<s>", "a" * 5000, "\0", "▁", model.pieces[-1].piece)))
        if which == 1:
            piece.score = draw(st.sampled_from((0.0, float("nan"), float("inf"), -1e38)))
        if which == 2:
            piece.type = draw(st.sampled_from((1, 2, 3, 4, 5, 6)))
        spec = model.trainer_spec
        for key in ("bos_id", "eos_id", "unk_id", "pad_id", "vocab_size"):
            if draw(st.integers(0, 9)) == 0:
                setattr(spec, key, draw(st.sampled_from((-1, 0, 7, 2**31 - 1, -(2**31)))))
        if draw(st.integers(0, 9)) == 0:
            spec.model_type = draw(st.sampled_from((1, 2, 3, 4)))
        if draw(st.integers(0, 9)) == 0:
            model.normalizer_spec.precompiled_charsmap = draw(st.binary(max_size=40))
        if draw(st.integers(0, 19)) == 0:
            del model.pieces[draw(st.integers(0, len(model.pieces))) :]
        return bytes(model.SerializeToString())

    return st.one_of(changed(), changed(), spoiled(content))


def header_only(content: bytes) -> st.SearchStrategy[bytes]:
    """A header of any form before the data of a valid file."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    return changed_json(header.rstrip()).map(lambda text: struct.pack("<Q", len(text)) + text + data)


_NAMES = ("model:", "MODEL", "OUT:")
_TOKENIZER_NAMES = ("model:", "data.bos")


def model_kind(file: str, change: Any, read: Callable[[Sandbox, str], object], **more: Any) -> Kind:
    """Of a file in the directory of a model, which is read."""
    model = file.partition("/")[0]
    return file_kind(file, change, lambda sandbox: read(sandbox, model), names=_NAMES, **more)


def tokenizer_kind(name: str, file: str, change: Any = changed_json, weight: float = 0.4, **more: Any) -> Kind:
    use = partial(use_tokenizer, name=name)
    return file_kind(f"{name}/{file}", change, use, names=_TOKENIZER_NAMES, weight=weight, **more)


KINDS = [
    *(
        model_kind(f"{family}/config.json", changed_json, load_architecture, weight=0.3, messages=5)
        for family in FAMILIES
    ),
    model_kind("sharded/model.safetensors.index.json", changed_json, read_model),
    model_kind("gpt2/model.safetensors", changed_safetensors, expand_model),
    model_kind("sharded/model-00001-of-00002.safetensors", header_only, read_model),
    tokenizer_kind("bytes", "tokenizer.json"),
    tokenizer_kind("letters", "tokenizer.json"),
    tokenizer_kind("unigrams", "tokenizer.json"),
    tokenizer_kind("letters", "tokenizer_config.json"),
    tokenizer_kind("letters", "special_tokens_map.json"),
    tokenizer_kind("letters", "added_tokens.json"),
    tokenizer_kind("pairs", "vocab.json"),
    tokenizer_kind("pairs", "merges.txt", spoiled),
    tokenizer_kind("sentencepiece", "tokenizer.model", changed_proto),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_published_file_is_taken_or_refused(kind: Kind, sandbox: Sandbox, fuzzing: Fuzzing) -> None:
    fuzzing(kind, sandbox)
