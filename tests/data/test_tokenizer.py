"""Text becomes the tokens of the model's own tokenizer; special tokens that a text spells are letters."""

from __future__ import annotations

import json
import math
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.launching import ROOT
from harness.models import save_byte_tokenizer, save_tiny_model
from harness.packing import byte_ids
from harness.tokenizers import (
    TEXTS,
    save_byte_pairs,
    save_chatml,
    save_llama_json,
    save_unigrams,
    train_sentencepiece,
)
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer

from adept_ds.base.errors import InputError
from adept_ds.base.files import write_json
from adept_ds.data.tokenizer import TextTokenizer
from adept_ds.models.tokenizer_files import TokenizerFiles

SETTINGS: dict[str, Any] = {"bos": "auto", "special_tokens_in_text": "text", "bos_per": "document"}


def tokenizer_of(directory: Path, **settings: Any) -> TextTokenizer:
    return TextTokenizer(directory, **(SETTINGS | settings))


def ids_of(tokenizer: TextTokenizer, text: str) -> list[int]:
    """Checks on the way that both ways to tokenise agree, and that tokens start in their order and in the text."""
    (ids,) = tokenizer.encode([text])
    again, starts = tokenizer.encode_with_offsets(text)
    assert ids.dtype == again.dtype == np.int32
    assert ids.tolist() == again.tolist()
    assert len(starts) == len(ids)
    assert (np.diff(starts) >= 0).all()
    assert all(0 <= start <= len(text) for start in starts)
    return ids.tolist()


# --- a SentencePiece model alone --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama-bpe", "llama-unigram", "gemma-bpe", "gemma-unigram"])
def sentencepiece_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    style, algorithm = request.param.split("-")
    return train_sentencepiece(tmp_path_factory.mktemp(request.param) / "model", style, algorithm)


def library(directory: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


CONFIGS: list[tuple[str, dict[str, Any] | None]] = [
    ("llama", None),
    ("llama", {"tokenizer_class": "LlamaTokenizer"}),
    ("llama", {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "bos_token": "<s>"}),
    ("mistral", None),
    ("mistral", {"tokenizer_class": "LlamaTokenizer", "legacy": False, "sp_model_kwargs": {}}),
    ("phi3", {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": None}),
    ("gemma", None),
    ("gemma2", {"tokenizer_class": "GemmaTokenizer"}),
    ("gemma3_text", {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True}),
]


@pytest.mark.parametrize(("model_type", "config"), CONFIGS)
def test_a_sentencepiece_model_alone_gives_the_tokens_of_that_library(
    sentencepiece_dir: Path, tmp_path: Path, model_type: str, config: dict[str, Any] | None
) -> None:
    """Whatever stands in the files beside it, or is missing there."""
    expected = library(sentencepiece_dir)
    (tmp_path / "tokenizer.model").write_bytes((sentencepiece_dir / "tokenizer.model").read_bytes())
    write_json(tmp_path / "config.json", {"model_type": model_type})
    if config is not None:
        write_json(tmp_path / "tokenizer_config.json", config)
    tokenizer = tokenizer_of(tmp_path)
    for text in TEXTS:
        assert ids_of(tokenizer, text) == expected.encode(text), text
    assert (tokenizer.bos_id, tokenizer.eos_id) == (expected.bos_id(), expected.eos_id())


@pytest.mark.parametrize(
    ("config", "bos", "begins"),
    [
        ({}, "auto", True),
        ({"add_bos_token": False}, "auto", False),
        ({"add_bos_token": False}, "always", True),
        ({"bos_token": None}, "auto", False),
        ({}, "never", False),
    ],
)
def test_it_begins_a_text_as_its_classes_do_unless_it_is_told_not_to(
    tmp_path: Path, config: dict[str, Any], bos: str, begins: bool
) -> None:
    train_sentencepiece(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", config)
    assert tokenizer_of(tmp_path, bos=bos).bos_id == (1 if begins else None)


def test_tokens_that_were_added_to_a_sentencepiece_model_are_there(tmp_path: Path) -> None:
    """Words count in any text, special ones where they are parsed; a piece for later use can have got a name."""
    plain = library(train_sentencepiece(tmp_path, "gemma"))
    size = plain.get_piece_size()
    write_json(tmp_path / "added_tokens.json", {"theorem": size + 1})
    write_json(
        tmp_path / "tokenizer_config.json",
        {
            "added_tokens_decoder": {
                str(size): {"content": "<|im_end|>", "special": True},
                str(plain.piece_to_id("<table>")): {"content": "<lemma>", "special": False},
            }
        },
    )
    text, parse = tokenizer_of(tmp_path), tokenizer_of(tmp_path, special_tokens_in_text="parse")
    around = [plain.encode("the "), plain.encode(" is")]
    for tokenizer in (text, parse):
        assert ids_of(tokenizer, "the theorem is") == [*around[0], size + 1, *around[1]]
        assert ids_of(tokenizer, "the <lemma> is") == [*around[0], plain.piece_to_id("<table>"), *around[1]]
    assert ids_of(text, "the <|im_end|> is") == plain.encode("the <|im_end|> is")
    assert ids_of(parse, "the <|im_end|> is") == [*around[0], size, *around[1]]


def test_a_prefix_space_that_is_switched_off_stays_off(tmp_path: Path) -> None:
    plain = library(train_sentencepiece(tmp_path))
    write_json(tmp_path / "tokenizer_config.json", {"add_prefix_space": False})
    assert plain.decode(ids_of(tokenizer_of(tmp_path), "the sum")) == "the sum"
    assert plain.id_to_piece(ids_of(tokenizer_of(tmp_path), "the sum")[0]) != "▁the"
    assert plain.id_to_piece(plain.encode("the sum")[0]) == "▁the"


# --- tokenizer.json, and byte pairs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [save_llama_json, save_unigrams, save_chatml])
def test_every_step_of_a_tokenizer_file_counts_as_it_stands(tmp_path: Path, save: Callable[[Path], Path]) -> None:
    """Normalizer, splits and prefix space; but a length at which it cuts or to which it pads is no part of a text."""
    file = save(tmp_path) / "tokenizer.json"
    expected = Tokenizer.from_file(str(file))
    cuts_and_pads = Tokenizer.from_file(str(file))
    cuts_and_pads.enable_truncation(4)
    cuts_and_pads.enable_padding(length=64)
    cuts_and_pads.save(str(file))
    tokenizer = tokenizer_of(tmp_path, special_tokens_in_text="parse", bos="never")
    for text in TEXTS:
        assert ids_of(tokenizer, text) == expected.encode(text, add_special_tokens=False).ids, text


def test_tokens_that_only_the_settings_declare_are_added_as_transformers_adds_them(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_chatml(tmp_path)
    added = {"258": {"content": "theorem", "special": False}, "259": {"content": "<|tool|>", "special": True}}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|begin|>"}
    write_json(tmp_path / "tokenizer_config.json", settings | {"added_tokens_decoder": added})
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "a theorem <|tool|> and <|begin|>"
    assert ids_of(tokenizer_of(tmp_path, special_tokens_in_text="parse"), text) == theirs(text)["input_ids"]
    assert tokenizer_of(tmp_path, bos="always").bos_id == theirs.bos_token_id == 260


def test_byte_pairs_alone_are_split_as_their_class_splits_them(tmp_path: Path) -> None:
    save_byte_pairs(tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    tokenizer = tokenizer_of(tmp_path)
    assert ids_of(tokenizer, "hell he") == [vocabulary[token] for token in ("he", "ll", "Ġ", "he")]
    assert tokenizer.eos_id == vocabulary["<|endoftext|>"]
    assert tokenizer.bos_id is None, "GPT-2 begins no text with it"
    assert tokenizer_of(tmp_path, bos="always").bos_id == vocabulary["<|endoftext|>"]


@pytest.mark.parametrize("save", [save_llama_json, train_sentencepiece], ids=["json", "sentencepiece"])
def test_tokenising_loads_no_torch_so_that_processes_start_at_once(
    tmp_path: Path, save: Callable[[Path], Path]
) -> None:
    save(tmp_path)
    program = (
        "import sys; from pathlib import Path; from adept_ds.data.tokenizer import TextTokenizer as T;"
        f"t = T(Path({str(tmp_path)!r}), **{SETTINGS!r}); assert t.encode(['x']) and t.bos_id == 1;"
        "print(sorted({'torch', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.stdout == "[]\n", result.stderr


# --- where a text begins ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("bos_by_itself", [True, False])
def test_auto_puts_a_token_where_the_models_own_tokenizer_does(
    tmp_path: Path, bos_by_itself: bool, add_bos_token: bool | None
) -> None:
    from transformers import AutoTokenizer

    settings = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    save_llama_json(tmp_path, bos_by_itself=bos_by_itself, **settings)
    tokenizer = tokenizer_of(tmp_path)
    put = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    assert put + ids_of(tokenizer, "a word") == AutoTokenizer.from_pretrained(tmp_path)("a word")["input_ids"]
    assert tokenizer_of(tmp_path, bos="always").bos_id == 1
    assert tokenizer_of(tmp_path, bos="never").bos_id is None


def test_always_needs_a_tokenizer_that_has_such_a_token(tmp_path: Path) -> None:
    save_chatml(tmp_path)
    assert tokenizer_of(tmp_path).bos_id is None
    with pytest.raises(InputError, match=r"^data\.bos: always, but the tokenizer of '.*' has no beginning-of-sequence"):
        assert tokenizer_of(tmp_path, bos="always").bos_id


@pytest.mark.parametrize("save", [save_llama_json, train_sentencepiece], ids=["json", "sentencepiece"])
def test_a_text_that_spells_its_beginning_does_not_get_two(tmp_path: Path, save: Callable[[Path], Path]) -> None:
    save(tmp_path)
    parse = tokenizer_of(tmp_path, special_tokens_in_text="parse")
    assert ids_of(parse, "<s>the sum") == ids_of(parse, "the sum")
    assert ids_of(parse, "<s><s>the sum") == [1, *ids_of(parse, "the sum")], "only the one that packing puts"
    unasked = tokenizer_of(tmp_path, special_tokens_in_text="parse", bos="never")
    assert ids_of(unasked, "<s>the sum") == [1, *ids_of(parse, "the sum")]


# --- special tokens that a text spells --------------------------------------------------------------------------------


def save_special(directory: Path, kind: str) -> Path:
    """A tokenizer that knows a special token of this kind."""
    saved: dict[str, Callable[[], Path]] = {
        "llama": lambda: save_llama_json(directory),
        "unigrams": lambda: save_unigrams(directory),
        "chatml": lambda: save_chatml(directory),
        "llama.model": lambda: train_sentencepiece(directory, "llama", "bpe"),
        "llama-unigram.model": lambda: train_sentencepiece(directory, "llama", "unigram"),
        "gemma.model": lambda: train_sentencepiece(directory, "gemma", "bpe"),
        "gemma-unigram.model": lambda: train_sentencepiece(directory, "gemma", "unigram"),
        "byte pairs": lambda: save_byte_pairs(directory),
    }
    return saved[kind]()


SPELLED = [
    ("llama", "<s>"),
    ("llama", "</s>"),
    ("unigrams", "<s>"),
    ("chatml", "<|im_end|>"),
    ("chatml", "<|endoftext|>"),
    ("llama.model", "<s>"),
    ("llama-unigram.model", "</s>"),
    ("gemma.model", "<start_of_turn>"),
    ("gemma.model", "<bos>"),
    ("gemma-unigram.model", "<end_of_turn>"),
    ("byte pairs", "<|endoftext|>"),
]
AROUND = ["{}", "a {} b", "a  {}  b", "a{}b{}c", "\n{}\n"]


def decoded(directory: Path, ids: list[int]) -> str:
    """By the library, with special tokens as it has them."""
    if (directory / "tokenizer.model").is_file():
        return str(library(directory).decode(ids))
    tokens = {number: token for token, number in TokenizerFiles.read(directory).vocabulary.items()}
    file = directory / "tokenizer.json"
    if file.is_file():
        return str(Tokenizer.from_file(str(file)).decode(ids, skip_special_tokens=False))
    return "".join(tokens[number] for number in ids).replace("Ġ", " ").replace("Ċ", "\n")


@pytest.mark.parametrize(("kind", "token"), SPELLED)
def test_a_special_token_in_a_text_is_letters_and_spaces_around_it_stay(tmp_path: Path, kind: str, token: str) -> None:
    directory = save_special(tmp_path, kind)
    number = TokenizerFiles.read(directory).vocabulary[token]
    tokenizer = tokenizer_of(directory)
    for around in AROUND:
        text = around.replace("{}", token)
        ids = ids_of(tokenizer, text)
        assert number not in ids
        assert decoded(directory, ids).removeprefix(" ") == text


@pytest.mark.parametrize(("kind", "token"), SPELLED)
def test_it_can_be_parsed_or_refused_instead(tmp_path: Path, kind: str, token: str) -> None:
    directory = save_special(tmp_path, kind)
    number = TokenizerFiles.read(directory).vocabulary[token]
    parse = tokenizer_of(directory, special_tokens_in_text="parse", bos="never")
    for around in AROUND:
        assert ids_of(parse, around.replace("{}", token)).count(number) == around.count("{}")
    error = tokenizer_of(directory, special_tokens_in_text="error")
    for encode in (lambda text: error.encode(["fine", text]), error.encode_with_offsets):
        with pytest.raises(ValueError, match=r"^special token '.*' \(data\.special_tokens_in_text: error\)$") as why:
            encode(f"a {token} b")
        assert f"'{token}'" in str(why.value)
        assert not isinstance(why.value, InputError), "it is the text's fault"
    assert ids_of(error, "a b") == ids_of(tokenizer_of(directory), "a b")


def test_letters_of_a_special_token_are_the_tokens_of_these_letters(tmp_path: Path) -> None:
    """Known one by one: no merge, and no unigram, makes more of them."""
    for kind in ("llama", "unigrams"):
        directory = save_special(tmp_path / kind, kind)
        vocabulary = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
        tokens = list(vocabulary) if kind == "llama" else [token for token, _ in vocabulary]
        letters = {token: number for number, token in enumerate(tokens)}
        pieces = ["▁", "a", "▁", "<s", ">", "▁", "b"] if kind == "llama" else list("▁a▁<s>▁b")
        assert ids_of(tokenizer_of(directory), "a <s> b") == [letters[piece] for piece in pieces]
    ids = byte_ids(save_special(tmp_path / "chatml", "chatml"))
    assert ids_of(tokenizer_of(tmp_path / "chatml"), "a  <|im_end|> b") == [ids[x] for x in "a  <|im_end|> b"]


def test_a_token_is_special_too_if_only_the_settings_call_it_so(tmp_path: Path) -> None:
    save_chatml(tmp_path, AddedToken("<|user|>", special=False), AddedToken("<|tool|>", special=False))
    listed = {"additional_special_tokens": ["<|user|>"], "pad_token": {"content": "<|tool|>", "__type": "AddedToken"}}
    write_json(tmp_path / "tokenizer_config.json", listed)
    for token, number in (("<|user|>", 258), ("<|tool|>", 259)):
        assert ids_of(tokenizer_of(tmp_path, special_tokens_in_text="parse"), f"a {token}").count(number) == 1
        assert max(ids_of(tokenizer_of(tmp_path), f"a {token}")) < 256
        with pytest.raises(ValueError, match=re.escape(f"'{token}'")):
            tokenizer_of(tmp_path, special_tokens_in_text="error").encode([f"a {token}"])


def test_tokens_that_are_not_special_count_in_every_text(tmp_path: Path) -> None:
    save_chatml(tmp_path, AddedToken("<tool_call>", special=False))
    ids = byte_ids(tmp_path)
    for mode in ("text", "parse", "error"):
        assert ids_of(tokenizer_of(tmp_path, special_tokens_in_text=mode), "a<tool_call>") == [ids["a"], 258]


def test_a_special_token_that_the_model_has_no_row_for_is_not_parsed(tmp_path: Path) -> None:
    save_chatml(tmp_path, AddedToken("<image_soft_token>", special=True))
    write_json(tmp_path / "config.json", {"model_type": "gemma3_text", "vocab_size": 258})
    parse = tokenizer_of(tmp_path, special_tokens_in_text="parse")
    assert ids_of(parse, "<|im_end|>") == [257]
    with pytest.raises(ValueError, match=r"^special token '<image_soft_token>', which the model has no row for"):
        parse.encode(["an <image_soft_token>"])
    assert max(ids_of(tokenizer_of(tmp_path), "an <image_soft_token>")) < 256


# --- settings ---------------------------------------------------------------------------------------------------------


def test_a_tokenizer_travels_as_its_settings(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path)
    tokenizer = tokenizer_of(tmp_path, bos_per="block")
    expected = ids_of(tokenizer, "hello")
    message = pickle.dumps(tokenizer)
    assert len(message) < 1000
    again = pickle.loads(message)
    assert again == tokenizer
    assert again.per_block
    assert ids_of(again, "hello") == expected


def test_its_fingerprint_knows_settings_and_files(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path)
    changed = {"bos": "never", "special_tokens_in_text": "parse", "bos_per": "block"}
    prints = {tokenizer_of(tmp_path, **{key: value}).fingerprint() for key, value in changed.items()}
    prints.add(tokenizer_of(tmp_path).fingerprint())
    assert len(prints) == 4
    assert tokenizer_of(tmp_path).fingerprint() in prints
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_of(tmp_path).fingerprint() not in prints


# --- what it is for ---------------------------------------------------------------------------------------------------


def test_a_model_that_was_trained_with_the_beginning_token_needs_it(tmp_path: Path) -> None:
    """Where `bos: auto` would put a token and there is none, the model is at a loss.

    A tiny Llama learns a stream of texts as its tokenizer begins and ends them, then reads others with and without the
    beginnings. Texts begin with one of six letters, so ln 6 = 1.79 nats is the least that the first of them can cost.
    Measured, and the same each time on a CPU: 1.84 and 8.85 nats.
    """
    directory = save_tiny_model(tmp_path / "model")
    save_chatml(directory, bos=True)
    auto, never = tokenizer_of(directory), tokenizer_of(directory, bos="never")
    model = trained_model(directory, stream(auto, seed=0))
    with_it, without = (first_letter_loss(model, stream(tokenizer, seed=1)) for tokenizer in (auto, never))
    assert math.log(6) - 0.05 < with_it < 2.2
    assert without > with_it + 3


def stream(tokenizer: TextTokenizer, seed: int) -> list[list[int]]:
    """Made-up texts with what packing puts around each."""
    generator = torch.Generator().manual_seed(seed)
    words = ["matrix", "sum", "norm", "zero", "layer", "proof"]
    picks = torch.randint(len(words), (400, 3), generator=generator).tolist()
    texts = tokenizer.encode([" ".join(words[pick] for pick in row) for row in picks])
    before, after = ([] if token is None else [token] for token in (tokenizer.bos_id, tokenizer.eos_id))
    return [[*before, *ids.tolist(), *after] for ids in texts]


def blocks(texts: list[list[int]], size: int = 64) -> torch.Tensor:
    """[blocks, size]"""
    flat = [token for text in texts for token in text]
    return torch.tensor(flat[: len(flat) // size * size]).view(-1, size)


def trained_model(directory: Path, texts: list[list[int]]) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(6):
        for batch in blocks(texts).split(8):
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


@torch.no_grad()
def first_letter_loss(model: torch.nn.Module, texts: list[list[int]]) -> float:
    """Mean loss, in nats, of the letters that texts begin with; of those that do not begin a block."""
    ids = blocks(texts)
    logits = model(input_ids=ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    ends = [256, 258]
    follows = torch.isin(ids[:, :-1], torch.tensor(ends)) & ~torch.isin(ids[:, 1:], torch.tensor(ends))
    return float(losses[follows].mean())


def test_a_tokenizer_that_fails_on_a_text_is_the_models_fault_not_the_texts(tmp_path: Path) -> None:
    """Unigrams without a token for what they do not know: said in one line, and no record is skipped for it."""
    save_unigrams(tmp_path)
    path = tmp_path / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["model"]["unk_id"] = None
    path.write_text(json.dumps(tree))
    with pytest.raises(InputError, match=r"the tokenizer fails: .*unk_id"):
        tokenizer_of(tmp_path).encode(["\u4e16"])
