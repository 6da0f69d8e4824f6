"""What was saved is read back the same; whatever else is found in its place is refused in one line."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, PositiveInt, ValidationError, model_validator

from adept_ds.base.errors import InputError
from adept_ds.base.records import Record
from adept_ds.deltas.package import PackageManifest
from adept_ds.probing.result import LayerImportance
from adept_ds.training.checkpoint import CheckpointManifest
from adept_ds.weights.base_files import BaseFiles
from adept_ds.weights.expansion import Expansion


class Person(Record):
    name: str
    age: PositiveInt
    height: float
    is_tall: bool
    nickname: str | None = None


class Team(Record):
    """With all that records are made of."""

    members: tuple[Person, ...]
    scores: dict[str, tuple[float, ...]]
    motto: str = Field(alias="words")
    notes: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def remedy(cls) -> str:
        return "draw lots again"

    @model_validator(mode="after")
    def _names_differ(self) -> Team:
        names = [member.name for member in self.members]
        if len(set(names)) != len(names):
            raise ValueError(f"two are called the same:\n{names}")
        return self


ANN: dict[str, Any] = {"name": "Ann", "age": 40, "height": 1.75, "is_tall": True, "nickname": None}
TEAM: dict[str, Any] = {
    "members": [ANN, ANN | {"name": 'Böb "the\u2028line"\n', "age": 10**30, "height": 1e-300, "nickname": ""}],
    "scores": {"first": [0.1, 2.0, -0.0], "none": []},
    "words": "",
    "notes": {"nested": [{"a": [1, 2.5, None, True, "x"]}]},
}
"""As it stands in the file."""


def as_file(value: Any) -> str:
    """The oracle of the format."""
    return json.dumps(value, indent=2) + "\n"


def refusal_of(record: type[Record], path: Path) -> str:
    """The complaint about a file, which always has one line and names the file and the remedy."""
    with pytest.raises(InputError) as refusal:
        record.load(path)
    message = str(refusal.value)
    assert len(message.splitlines()) == 1, message
    assert message.startswith(f"'{path}' ")
    assert message.endswith(f"; {record.remedy()}")
    return message


# --- any record ----------------------------------------------------------------------------------------------------


def test_what_was_saved_is_read_back_the_same(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "team.json"
    team = Team.model_validate_json(json.dumps(TEAM))
    team.save(path)
    assert Team.load(path) == team
    assert [member.age for member in Team.load(path).members] == [40, 10**30]


def test_a_saved_record_is_byte_for_byte_indented_json(tmp_path: Path) -> None:
    path = tmp_path / "team.json"
    Team.model_validate_json(json.dumps(TEAM)).save(path)
    assert path.read_bytes() == as_file(TEAM).encode("ascii")


def test_in_a_program_a_record_has_the_names_of_its_fields_and_in_a_file_their_aliases() -> None:
    team = Team(members=(), scores={}, motto="all")
    assert team.to_json() == {"members": [], "scores": {}, "words": "all", "notes": {}}


def test_a_record_does_not_change_once_it_is_made() -> None:
    team = Team(members=(), scores={}, motto="all")
    with pytest.raises(ValidationError, match="frozen"):
        team.motto = "none"  # type: ignore[misc]
    assert team.motto == "all"


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content, encoding="utf-8")


def changed(*keys: Any, value: Any) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        tree = copy.deepcopy(TEAM)
        at = tree
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value
        path.write_text(json.dumps(tree), encoding="utf-8")

    return change


def nothing(_: Path) -> None:
    pass


def without(key: str) -> Callable[[Path], object]:
    return text(json.dumps({name: value for name, value in TEAM.items() if name != key}))


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (nothing, "cannot be read (No such file or directory)"),
    "a directory": (Path.mkdir, "cannot be read (Is a directory)"),
    "empty": (text(""), "is damaged ('the file': Invalid JSON: EOF"),
    "cut short": (text(as_file(TEAM)[:-20]), "is damaged ('the file': Invalid JSON: EOF"),
    "more behind it": (text(as_file(TEAM) + "{}"), "Invalid JSON: trailing characters"),
    "no UTF-8": (lambda path: path.write_bytes(as_file(TEAM).replace("Ann", "\xff").encode("latin-1")), "Invalid JSON"),
    "UTF-16": (lambda path: path.write_text(as_file(TEAM), encoding="utf-16"), "Invalid JSON"),
    "half a character": (text(as_file(TEAM).replace("Ann", r"\ud800")), "Invalid JSON"),
    "nested deeply": (text("[" * 100_000), "Invalid JSON: recursion limit exceeded"),
    "nested deeply in a free part": (
        text(as_file(TEAM).replace('"nested": ', '"nested": ' + "[" * 100_000)),
        "Invalid JSON: recursion limit exceeded",
    ),
    "a list": (text("[1, 2]"), "is damaged ('the file': Input should be an object"),
    "null": (text("null"), "is damaged ('the file': Input should be an object"),
    "an unknown key": (changed("colour", value="red"), "('colour': Extra inputs are not permitted)"),
    "an unknown key inside": (changed("members", 1, "colour", value=1), "('members.1.colour': Extra inputs"),
    "an unknown key with line breaks": (changed("a\nb\u2028c", value=1), r"('a\nb\u2028c': Extra inputs"),
    "a very long key": (changed("x" * 10_000, value=1), f"('{'x' * 100}': Extra inputs"),
    "a missing key": (without("scores"), "('scores': Field required)"),
    "a missing key of another name": (without("words"), "('words': Field required)"),
    "text for a number": (
        changed("members", 0, "age", value="40"),
        "('members.0.age': Input should be a valid integer",
    ),
    "a fraction": (changed("members", 0, "age", value=40.0), "('members.0.age': Input should be a valid integer"),
    "yes for a number": (changed("members", 0, "age", value=True), "('members.0.age': Input should be a valid integer"),
    "a number for yes": (
        changed("members", 0, "is_tall", value=1),
        "('members.0.is_tall': Input should be a valid boolean",
    ),
    "a number for text": (changed("members", 0, "name", value=1), "('members.0.name': Input should be a valid string"),
    "text for a fraction": (
        changed("scores", "first", 1, value="1.0"),
        "('scores.first.1': Input should be a valid number",
    ),
    "null for text": (changed("members", 0, "name", value=None), "('members.0.name': Input should be a valid string"),
    "text for a list": (changed("members", value="Ann"), "('members': Input should be a valid array"),
    "an object for a list": (changed("members", value={"0": ANN}), "('members': Input should be a valid array"),
    "a list for an object": (changed("scores", value=[["first", 1.0]]), "('scores': Input should be an object"),
    "too small": (changed("members", 0, "age", value=0), "('members.0.age': Input should be greater than 0)"),
    "not a number": (
        changed("members", 0, "height", value=float("nan")),
        "('members.0.height': Input should be a finite number",
    ),
    "infinity": (
        changed("scores", "first", 0, value=float("inf")),
        "('scores.first.0': Input should be a finite number",
    ),
    "beyond a double": (
        text(as_file(TEAM).replace("1.75", "1e999")),
        "('members.0.height': Input should be a finite number",
    ),
    "what does not go together": (changed("members", value=[ANN, ANN]), "('the file': two are called the same: ['Ann'"),
}


@pytest.mark.parametrize("mistake", BAD_FILES)
def test_a_file_that_is_no_such_record_is_refused_in_one_line(tmp_path: Path, mistake: str) -> None:
    spoil, words = BAD_FILES[mistake]
    path = tmp_path / "team.json"
    spoil(path)
    message = refusal_of(Team, path)
    assert words in message
    assert len(message) < len(str(path)) + 400, "a line for people"


# --- those that stand in files -------------------------------------------------------------------------------------

DIGEST = "0123456789abcdef" * 4
COPIES = [{"source": 1, "index": 2}, {"source": 3, "index": 5}]


@dataclass(frozen=True)
class FileFormat:
    """What a kind of record looks like in its file; places in it are dotted: 'copies.0.source'."""

    record: type[Record]
    example: dict[str, Any]
    optional: frozenset[str] = frozenset()
    """Keys that files may lack."""
    nullable: frozenset[str] = frozenset()
    """Places that may hold null."""
    tables: frozenset[str] = frozenset()
    """Objects whose keys are data, so that one of them may be absent."""
    free: frozenset[str] = frozenset()
    """Objects of anything."""


FORMATS = {
    "expansion.json": FileFormat(
        Expansion,
        {
            "source_layers": 5,
            "copies": COPIES,
            "zeroed": ["model.layers.2.mlp.down_proj.weight"],
            "fingerprint": DIGEST,
            "deltas": [{"name": "math", "fingerprint": DIGEST, "copies": [2, 5], "metrics": {"losses": {}}}],
            "base_fingerprint": DIGEST,
        },
        optional=frozenset({"deltas", "base_fingerprint"}),
        nullable=frozenset({"base_fingerprint"}),
        free=frozenset({"deltas.0.metrics"}),
    ),
    "base_files.json": FileFormat(
        BaseFiles,
        {"format": 1, "texts": {"config.json": "{}"}, "headers": {"model.safetensors": "{}"}},
        optional=frozenset({"format"}),
    ),
    "delta.json": FileFormat(
        PackageManifest,
        {
            "format": 1,
            "name": "math",
            "created_by": "adept-ds 1",
            "base": {"fingerprint": DIGEST, "config": DIGEST, "model_type": "llama", "layers": 5},
            "copies": COPIES,
            "tensors": {"weight": {"sha256": DIGEST, "dtype": "F32", "shape": [3, 4]}},
            "metrics": {"losses": {"base": {"general": 2.5}}, "training": {"steps": 7, "seconds": 1.5}},
        },
        optional=frozenset({"metrics.losses", "metrics.training"}),
        tables=frozenset({"tensors", "metrics.losses", "metrics.losses.base", "metrics.training"}),
    ),
    "manifest.json": FileFormat(
        CheckpointManifest,
        {"check": None, "step": 3, "world_size": 2, "zero_stage": 3, "offload": "both", "precision": "bfloat16"}
        | {"adept_ds": "1", "fingerprint": DIGEST, "settings": {"train.lr": 0.001}, "id": DIGEST[:32]}
        | {"files": {"states.pt": 6}},
        optional=frozenset({"id", "files", "offload", "precision", "adept_ds", "check"}),
        nullable=frozenset({"id", "offload", "precision", "adept_ds", "check"}),
        tables=frozenset({"files"}),
        free=frozenset({"settings"}),
    ),
    "layer_importance.json": FileFormat(
        LayerImportance,
        {
            "method": "mask",
            "base_loss": 2.5,
            "tokens": 100,
            "layers": [{"index": 0, "loss": 2.75, "delta": 0.25, "standard_error": 0.125}],
            "selected": [0],
            "sequences": 7,
            "sources": [{"name": "general", "weight": 1.5, "sequences": 7, "tokens": 100}],
            "selection": {
                "k": 1,
                "choose": "lowest",
                "rule": "knee",
                "reason": "the knee",
                "rules": {"knee": 1},
                "within_noise": [0],
                "tie_break": None,
            },
            "stability": {
                "against": "halves",
                "name": "",
                "selected": [[0], [0]],
                "jaccard": 0.5,
                "kendall_tau": 0.5,
            },
            "measures": "delta loss",
        },
        optional=frozenset(
            {
                "sequences",
                "sources",
                "selection",
                "selection.tie_break",
                "stability",
                "measures",
                "layers.0.standard_error",
            }
        ),
        nullable=frozenset(
            {
                "layers.0.loss",
                "layers.0.standard_error",
                "selection",
                "selection.rule",
                "selection.tie_break",
                "stability",
                "stability.kendall_tau",
            }
        ),
        tables=frozenset({"selection.rules"}),
    ),
}

OTHERS: dict[type, list[Any]] = {
    type(None): [None],
    bool: [True],
    int: [7],
    float: [7.5, 7.0],
    str: ["7", "text"],
    list: [[], [7]],
    dict: [{}, {"a": 7}],
}
"""Values of every type of JSON."""


def places_in(tree: Any, free: frozenset[str], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every place below the top and what it holds; of lists all elements, of free parts nothing."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        place = (*above, str(key))
        yield place, value
        if ".".join(place) not in free:
            yield from places_in(value, free, place)


def changed_at(tree: Any, place: tuple[str, ...], change: Callable[[Any, Any], None]) -> Any:
    """A copy; `change` gets what holds the place, and the key in it."""
    tree = copy.deepcopy(tree)
    at = tree
    for key in place[:-1]:
        at = at[int(key)] if isinstance(at, list) else at[key]
    change(at, int(place[-1]) if isinstance(at, list) else place[-1])
    return tree


def replaced_by(value: Any) -> Callable[[Any, Any], None]:
    def replace(at: Any, key: Any) -> None:
        at[key] = value

    return replace


def removals(form: FileFormat) -> Iterator[tuple[str, Any]]:
    for place, _ in places_in(form.example, form.free):
        name, above, key = ".".join(place), ".".join(place[:-1]), place[-1]
        if name not in form.optional and above not in form.tables and not key.isdigit():
            yield name, changed_at(form.example, place, lambda at, key: at.pop(key))


def replacements(form: FileFormat) -> Iterator[tuple[str, Any]]:
    for place, value in places_in(form.example, form.free):
        name = ".".join(place)
        fitting = {type(value)} | ({type(None)} if name in form.nullable else set())
        # A whole number is a fraction too, and training facts may be either; a literal 1 may be written as true.
        fitting |= {int} if type(value) is float else {float} if name == "metrics.training.steps" else set()
        fitting |= {bool} if name == "format" else set()
        for kind, values in OTHERS.items():
            for other in values if kind not in fitting else ():
                yield f"{name} = {other!r}", changed_at(form.example, place, replaced_by(other))


def additions(form: FileFormat) -> Iterator[tuple[str, Any]]:
    for place, value in [((), form.example), *places_in(form.example, form.free)]:
        if isinstance(value, dict) and ".".join(place) not in form.free:
            # Tables take any key, but not this value.
            where = (*place, "unknown")
            yield ".".join(where), changed_at(form.example, where, replaced_by(["?"]))


@pytest.mark.parametrize("name", FORMATS)
def test_an_example_of_every_format_is_read_and_written_as_it_stands(tmp_path: Path, name: str) -> None:
    form, path = FORMATS[name], tmp_path / name
    path.write_text(as_file(form.example), encoding="utf-8")
    form.record.load(path).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_may_lack_what_older_ones_lack(tmp_path: Path, name: str) -> None:
    form, path = FORMATS[name], tmp_path / name
    for optional in form.optional:
        less = changed_at(form.example, tuple(optional.split(".")), lambda at, key: at.pop(key))
        assert less != form.example
        path.write_text(as_file(less), encoding="utf-8")
        form.record.load(path)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("mutants", [removals, replacements, additions], ids=lambda mutants: mutants.__name__)
def test_a_field_that_is_missing_of_another_type_or_unknown_is_refused(
    tmp_path: Path, name: str, mutants: Callable[[FileFormat], Iterator[tuple[str, Any]]]
) -> None:
    form, path = FORMATS[name], tmp_path / name
    accepted, count = [], 0
    for change, mutant in mutants(form):
        count += 1
        path.write_text(as_file(mutant), encoding="utf-8")
        try:
            form.record.load(path)
            accepted.append(change)
        except InputError:
            message = refusal_of(form.record, path)
            assert re.search(r" is damaged \('[^\n]+': [^\n]+\); ", message), message
    assert accepted == []
    assert count > 0
