"""A tokenizer that its model cannot take is refused at once; its identity is what the files hold."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.complaints import refused
from harness.models import TINY, VOCABULARY, save_byte_tokenizer
from harness.spoiling import cut, text
from harness.tokenizers import save_byte_pairs, save_chatml, save_llama_json, train_sentencepiece
from harness.workspace import Workspace
from tokenizers import AddedToken

from adept_ds.base.errors import InputError
from adept_ds.base.files import write_json
from adept_ds.models.directory import ModelDirectory
from adept_ds.models.family_table import FAMILIES
from adept_ds.models.tokenizer_files import TokenizerFiles, check_tokenizer, tokenizer_fingerprint

ROWS = 500
"""More than any of the small tokenizers needs."""


def check(directory: Path, bos: str = "auto", model_type: str = "llama", **config: Any) -> None:
    """As `adept show` does, for a model of which nothing but config.json is read."""
    entries = {"model_type": model_type, "vocab_size": ROWS} | config
    write_json(directory / "config.json", entries)
    seq_lens = {"data.seq_len": 1024, "probe.seq_len": 256}
    check_tokenizer(ModelDirectory(directory, entries, FAMILIES[model_type], 5), bos, seq_lens)


def assert_one_line(words: list[str], directory: Path, **options: Any) -> None:
    with pytest.raises(InputError) as refusal:
        check(directory, **options)
    message = str(refusal.value)
    assert "\n" not in message
    assert len(message) < 600
    for word in words:
        assert word in message, message


SAVES: dict[str, Callable[[Path], Any]] = {
    "json": save_llama_json,
    "chatml": save_chatml,
    "sentencepiece": train_sentencepiece,
    "byte pairs": save_byte_pairs,
}


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES.keys())
def test_a_tokenizer_of_each_format_that_fits_is_taken(tmp_path: Path, save: Callable[[Path], Any]) -> None:
    save(tmp_path)
    check(tmp_path)
    tokens = TokenizerFiles.read(tmp_path).vocabulary
    check(tmp_path, vocab_size=max(tokens.values()) + 1)
    assert_one_line(["vocab_size", f"({max(tokens.values())})"], tmp_path, vocab_size=max(tokens.values()))


def test_an_embedding_of_unknown_size_is_not_judged(tmp_path: Path) -> None:
    save_llama_json(tmp_path)
    check(tmp_path, vocab_size=None)


# --- none, or damaged -------------------------------------------------------------------------------------------------


def test_a_model_without_a_tokenizer_is_refused_by_what_it_lacks(tmp_path: Path) -> None:
    words = [
        "model: ",
        str(tmp_path),
        "has no tokenizer",
        "tokenizer.json, tokenizer.model, or vocab.json with merges.txt",
    ]
    assert_one_line([*words, "copy its files"], tmp_path)
    save_byte_pairs(tmp_path)
    (tmp_path / "merges.txt").unlink()
    assert_one_line(words, tmp_path)
    (tmp_path / "tokenizer.json").mkdir()
    assert_one_line(words, tmp_path)


DAMAGED: list[tuple[str, str, Callable[[Path], Any]]] = [
    ("json", "tokenizer.json", cut("tokenizer.json")),
    ("json", "tokenizer.json", text("tokenizer.json", "")),
    ("json", "tokenizer.json", text("tokenizer.json", "{}")),
    ("json", "tokenizer.json", text("tokenizer.json", "[" * 100_000)),
    ("json", "tokenizer.json", text("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}')),
    ("json", "tokenizer.json", lambda directory: (directory / "tokenizer.json").write_bytes(b"\xff\xfe\x00")),
    ("sentencepiece", "tokenizer.model", cut("tokenizer.model")),
    ("sentencepiece", "tokenizer.model", text("tokenizer.model", "")),
    ("sentencepiece", "tokenizer.model", text("tokenizer.model", "IQ== 0\nIg== 1\nIw== 2\n")),  # tiktoken's
    ("byte pairs", "vocab.json", text("vocab.json", "[]")),
    ("byte pairs", "vocab.json", text("vocab.json", '{"a": "1"}')),
    ("byte pairs", "merges.txt", text("merges.txt", "#version: 0.2\nhe\n")),
    ("byte pairs", "merges.txt", text("merges.txt", "#version: 0.2\nh xyz\n")),
    ("json", "tokenizer_config.json", cut("tokenizer_config.json")),
    ("json", "tokenizer_config.json", text("tokenizer_config.json", "null")),
    ("json", "tokenizer_config.json", text("tokenizer_config.json", '{"bos_token": 5}')),
    ("json", "tokenizer_config.json", text("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}')),
    ("sentencepiece", "tokenizer_config.json", text("added_tokens.json", '{"a": -1}')),
    ("sentencepiece", "added_tokens.json", text("added_tokens.json", "{" * 100_000)),
    ("json", "added_tokens.json", text("added_tokens.json", r'{"\ud83d<extra>": 355}')),
    ("json", "special_tokens_map.json", text("special_tokens_map.json", r'{"bos_token": "\ud83d"}')),
]


@pytest.mark.parametrize(("kind", "name", "spoil"), DAMAGED)
def test_a_damaged_file_is_named(tmp_path: Path, kind: str, name: str, spoil: Callable[[Path], Any]) -> None:
    SAVES[kind](tmp_path)
    spoil(tmp_path)
    assert_one_line(["model: ", f"{name}' cannot be used", "copy it again"], tmp_path)


# --- tokens without rows ----------------------------------------------------------------------------------------------


def added(token: str, special: bool) -> Callable[[Path], Any]:
    return lambda directory: save_chatml(directory, AddedToken(token, special=special))


def with_settings(save: Callable[[Path], Any], name: str, settings: dict[str, Any]) -> Callable[[Path], Any]:
    def saved(directory: Path) -> None:
        save(directory)
        write_json(directory / name, settings)

    return saved


BEYOND: dict[str, tuple[Callable[[Path], Any], str, int]] = {
    "a word": (added("theorem", False), "theorem", 258),
    "a special token": (added("<|tool|>", True), "<|tool|>", 258),
    "a role": (with_settings(save_chatml, "tokenizer_config.json", {"pad_token": "<pad>"}), "<pad>", 258),
    "declared": (
        with_settings(save_chatml, "tokenizer_config.json", {"added_tokens_decoder": {"258": {"content": "<|tool|>"}}}),
        "<|tool|>",
        258,
    ),
    "added to SentencePiece": (
        with_settings(train_sentencepiece, "added_tokens.json", {"<|im_end|>": 9000}),
        "<|im_end|>",
        9000,
    ),
    "added to byte pairs": (
        with_settings(save_byte_pairs, "added_tokens.json", {"<|im_end|>": 9000}),
        "<|im_end|>",
        9000,
    ),
}


@pytest.mark.parametrize(("save", "token", "number"), BEYOND.values(), ids=BEYOND.keys())
def test_a_token_beyond_the_embedding_is_named(
    tmp_path: Path, save: Callable[[Path], Any], token: str, number: int
) -> None:
    save(tmp_path)
    rows = min(number, ROWS)
    assert_one_line([f"token '{token}' ({number})", f"has {rows} rows", "resize"], tmp_path, vocab_size=rows)


def test_an_end_of_text_that_only_the_configuration_knows_needs_a_row_too(tmp_path: Path) -> None:
    save_llama_json(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert_one_line(["eos_token_id", "(501)"], tmp_path, eos_token_id=501)
    check(tmp_path, eos_token_id=[2, 501])


def test_a_published_tokenizer_with_a_token_for_images_is_taken_with_its_text_model(tmp_path: Path) -> None:
    """The 1B of Gemma 3 has 262144 rows, and a token '<image_soft_token>' of that number."""
    save_chatml(tmp_path, AddedToken("<image_soft_token>", special=True))
    check(tmp_path, model_type="gemma3_text", vocab_size=258)
    assert_one_line(["'<image_soft_token>' (258)"], tmp_path, model_type="gemma2", vocab_size=258)


# --- positions, and where texts begin ---------------------------------------------------------------------------------


def test_learned_positions_have_an_end_and_computed_ones_have_none(tmp_path: Path) -> None:
    save_byte_pairs(tmp_path)
    check(tmp_path, model_type="gpt2")
    check(tmp_path, model_type="gpt2", n_positions=1024)
    assert_one_line(
        ["data.seq_len: 1024", "1023 positions (n_positions)"], tmp_path, model_type="gpt2", n_positions=1023
    )
    assert_one_line(["data.seq_len: 1024", "use 255 or fewer"], tmp_path, model_type="gpt2", n_positions=255)
    check(tmp_path, model_type="llama", max_position_embeddings=128)
    check(tmp_path, model_type="gpt_neox", max_position_embeddings=128)


def test_a_longer_probe_is_named_by_its_own_key(tmp_path: Path) -> None:
    save_byte_pairs(tmp_path)
    model = ModelDirectory(tmp_path, {"n_positions": 128, "vocab_size": ROWS}, FAMILIES["gpt2"], 5)
    check_tokenizer(model, "auto", {"data.seq_len": 128})
    with pytest.raises(InputError, match=r"^probe\.seq_len: 129 tokens, but .* use 128 or fewer$"):
        check_tokenizer(model, "auto", {"data.seq_len": 128, "probe.seq_len": 129})


def test_always_is_refused_where_there_is_no_such_token(tmp_path: Path) -> None:
    for bos in ("auto", "never"):
        save_chatml(tmp_path)
        check(tmp_path, bos)
    assert_one_line(["data.bos: always", "no beginning-of-sequence token", "auto or never"], tmp_path, bos="always")
    save_chatml(tmp_path, bos=True)
    check(tmp_path, "always")


def test_only_the_families_that_need_it_begin_every_block() -> None:
    assert {name for name, family in FAMILIES.items() if family.bos_per == "block"} == {
        "gemma",
        "gemma2",
        "gemma3_text",
    }


# --- by the command line ----------------------------------------------------------------------------------------------


WORDS = ("one", "two", "three", "four", "five", "six")


@pytest.mark.parametrize(
    ("spoil", "overrides", "words"),
    [
        (lambda model: (model / "tokenizer.json").unlink(), [], ["has no tokenizer"]),
        (cut("tokenizer.json"), [], ["tokenizer.json' cannot be used"]),
        (lambda model: save_chatml(model, *map(AddedToken, WORDS)), [], ["token 'five' (262) and 1 more", "262 rows"]),
        (lambda model: None, ["data.bos=always"], ["data.bos: always"]),
    ],
    ids=["none", "damaged", "beyond the embedding", "no beginning"],
)
def test_show_and_run_refuse_before_anything_heavy(
    workspace: Workspace, tmp_path: Path, spoil: Callable[[Path], Any], overrides: list[str], words: list[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(workspace.model, model)
    spoil(model)
    config = workspace.config(tmp_path / "run", model=str(model))
    for command in ("show", "run"):
        refused([command, config, *overrides], words)
    assert not (tmp_path / "run").exists()


# --- identity ---------------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_of_what_the_files_hold_not_of_where_and_when(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "elsewhere" / "second"
    save_byte_tokenizer(first)
    write_json(first / "config.json", TINY | {"model_type": "llama"})
    before = tokenizer_fingerprint(first)
    shutil.copytree(first, second)
    for file in second.iterdir():
        os.utime(file, (time.time() + 1000,) * 2)
    (second / "model.safetensors").write_text("no part of a tokenizer")
    write_json(second / "config.json", TINY | {"model_type": "llama", "num_hidden_layers": 9})
    assert tokenizer_fingerprint(second) == before
    assert tokenizer_fingerprint(second.rename(tmp_path / "third")) == before


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer.model",
        "spiece.model",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
    ],
)
def test_every_file_that_tokenising_depends_on_is_in_it(tmp_path: Path, name: str) -> None:
    save_byte_tokenizer(tmp_path)
    prints = [tokenizer_fingerprint(tmp_path)]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for content in ("{ }", "{  }"):
        path.write_text(content)
        prints.append(tokenizer_fingerprint(tmp_path))
    assert len(set(prints)) == 3


def test_so_is_what_the_models_configuration_decides(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path)
    prints = set()
    for config in ({"model_type": "llama"}, {"model_type": "qwen2"}, {"model_type": "llama", "vocab_size": VOCABULARY}):
        write_json(tmp_path / "config.json", config)
        prints.add(tokenizer_fingerprint(tmp_path))
    assert len(prints) == 3
