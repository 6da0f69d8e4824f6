"""Small tokenizers as models ship them. Those of tokenizer.json know letters, so that a test knows every token."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from harness.models import VOCABULARY
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from adept_ds.base.files import write_json

LETTERS = [chr(code) for code in range(33, 127)] + ["▁"]
"""What the tokenizers of '▁' know beside their special tokens; a space is written so."""

TEXTS = (
    "hello world",
    " a space before",
    "two  spaces and three   of them",
    "trailing ",
    "",
    "Über naïve 東京 🙂",
    "lines\nand\n\nmore\tof them",
    "12 345.6e7",
    "e\u0301 \ufb01 \uff11\uff12",
    "<0x41> and <s> and </s>",
)
"""What tokenizers differ in."""

Style = Literal["llama", "gemma"]

_TRAINING: dict[Style, dict[str, Any]] = {
    "llama": {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1},
    "gemma": {
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "bos_piece": "<bos>",
        "eos_piece": "<eos>",
        "add_dummy_prefix": False,
        "allow_whitespace_only_pieces": True,
        "user_defined_symbols": ["<table>", "<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "▁▁"],
    },
}


def train_sentencepiece(directory: Path, style: Style = "llama", algorithm: Literal["bpe", "unigram"] = "bpe") -> Path:
    """tokenizer.model alone, trained with that library by the settings of Llama 2, or of Gemma."""
    import sentencepiece

    directory.mkdir(parents=True, exist_ok=True)
    words = [
        "the",
        "of",
        "sum",
        "matrix",
        "Norm",
        "is",
        "zero",
        "layer",
        "proof",
        "hello",
        "spaces",
        "Über",
        "東京",
        "12",
    ]
    lines = [" ".join(words[(start * step) % len(words)] for step in range(1, 12)) for start in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(directory / "tokenizer"),
        model_type=algorithm,
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **_TRAINING[style],
    )
    (directory / "tokenizer.vocab").unlink()
    return directory


def save_llama_json(directory: Path, *, bos_by_itself: bool = True, **settings: Any) -> Path:
    """Letters and bytes, a space put before every text, and merges that end in '<s>'.

    Args:
        bos_by_itself: the post-processor puts '<s>' before a text.
        settings: of tokenizer_config.json.
    """
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS, "<s"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = models.BPE(
        vocab=vocabulary,
        merges=[("<", "s"), ("<s", ">")],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    if bos_by_itself:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _save(directory, tokenizer, bos_token="<s>", eos_token="</s>", **settings)


def save_unigrams(directory: Path) -> Path:
    """Unigrams: '<s>' is a string of its vocabulary like any other, and the best there is for these letters."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -3.0) for letter in [*LETTERS, "\n"])]
    tokenizer = Tokenizer(models.Unigram(vocab=pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return _save(directory, tokenizer, bos_token="<s>", eos_token="</s>")


def save_chatml(directory: Path, *added: AddedToken, bos: bool = False) -> Path:
    """Bytes; an end of a turn that swallows the spaces around it, and `added`.

    Args:
        bos: begins a text with a token of its own (258), as Llama 3 does.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", AddedToken("<|im_end|>", lstrip=True, rstrip=True)])
    for token in added:
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    if bos:
        tokenizer.add_special_tokens(["<|begin|>"])
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 258)]
        )
    return _save(directory, tokenizer, eos_token="<|endoftext|>", bos_token="<|begin|>" if bos else None)


def save_byte_pairs(directory: Path) -> Path:
    """vocab.json and merges.txt, as GPT-2 was published; 'he' and 'll' are the only pairs."""
    directory.mkdir(parents=True, exist_ok=True)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "<|endoftext|>"]
    write_json(directory / "vocab.json", {token: number for number, token in enumerate(tokens)})
    (directory / "merges.txt").write_text("#version: 0.2\nh e\nl l\n", encoding="utf-8")
    write_json(directory / "config.json", {"model_type": "gpt2", "vocab_size": VOCABULARY})
    return directory


def _save(directory: Path, tokenizer: Tokenizer, **settings: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | settings)
    return directory
