"""No command that writes a directory takes anything of the user's away with it, and each says what to do instead."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from harness.complaints import refused
from harness.domains import Domains, make
from harness.launching import adept
from harness.tool_runs import run_tool
from harness.workspace import Workspace

from adept_ds.base.outputs import MARK_NAME

COMMANDS: dict[str, Sequence[str]] = {
    "expand": ("expand", "{base}", "OUT", "--layers", "1"),
    "expand --dry-run": ("expand", "{base}", "OUT", "--layers", "1", "--dry-run"),
    "export": ("export", "{checkpoint}", "OUT", "--base", "{base}"),
    "delta pack": ("delta", "pack", "{math}", "OUT", "--base", "{base}"),
    "delta apply": ("delta", "apply", "{base}", "{d_math}", "OUT"),
    "delta strip": ("delta", "strip", "{math}", "OUT"),
}
"""What each reads, and where it writes."""

READ = [(name, part.strip("{}")) for name, parts in COMMANDS.items() for part in parts if part.startswith("{")]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Domains:
    """A base, an adapted model, a package of it, and a directory that stands for a training checkpoint."""
    domains = make(tmp_path_factory.mktemp("domains"), "llama")
    domains.packages(domains.root)
    (domains.root / "checkpoint").mkdir()
    (domains.root / "checkpoint" / "weights.pt").touch()
    return domains


@pytest.fixture
def place(original: Domains, tmp_path: Path) -> Path:
    return shutil.copytree(original.root, tmp_path / "place")


def command(name: str, place: Path, out: object, *options: str) -> list[str]:
    inputs = {path.name: path for path in place.iterdir()}
    return [str(out) if part == "OUT" else part.format(**inputs) for part in COMMANDS[name]] + [*options]


def stamps(root: Path) -> dict[Path, tuple[int, int, int]]:
    found = {path: path.lstat() for path in root.rglob("*")}
    return {path: (of.st_ino, of.st_size, of.st_mtime_ns) for path, of in found.items()}


@pytest.mark.parametrize("options", [(), ("--overwrite",)], ids=["", "overwrite"])
@pytest.mark.parametrize("name", COMMANDS)
def test_notes_in_out_stay(name: str, options: Sequence[str], place: Path) -> None:
    thesis = place.parent / "thesis"
    thesis.mkdir()
    (thesis / "notes.txt").write_text("x")
    before = stamps(place.parent)
    refused(
        command(name, place, thesis, *options), ["OUT", f"'{thesis}'", "'notes.txt'", "the name of a new directory"]
    )
    assert stamps(place.parent) == before


@pytest.mark.parametrize(("name", "read"), READ)
def test_out_that_is_an_input_or_holds_one_or_lies_in_one_is_refused(name: str, read: str, place: Path) -> None:
    before = stamps(place.parent)
    for out, word in {place / read: "is", place: "holds", place / read / "out": "lies in"}.items():
        refused(command(name, place, out, "--overwrite"), [f"OUT: '{out}' {word} ", "is read; give the name of a new"])
    assert stamps(place.parent) == before


@pytest.mark.parametrize("out", [".", "..", "/", "~", "file", "link", "nothing", "file/out", "a" * 300])
def test_out_that_is_no_name_of_a_new_directory_is_refused(out: str, place: Path) -> None:
    (place / "file").write_text("x")
    (place / "link").symlink_to(place / "math")
    (place / "nothing").symlink_to(place / "nowhere")
    before = stamps(place.parent)
    given = out if out in (".", "..", "/") else Path.home() if out == "~" else place / out
    refused(command("expand", place, given, "--overwrite"), ["OUT: '", "give" if "/" not in out[1:] else "choose"])
    assert stamps(place.parent) == before


# --- earlier outputs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("export", "expand --dry-run")])
def test_an_earlier_output_is_replaced_by_overwrite_alone(name: str, place: Path) -> None:
    out = place / "out"
    assert adept(1, *command(name, place, out)).returncode == 0
    first = (out / MARK_NAME).stat().st_ino
    refused(command(name, place, out), [f"OUT: '{out}' was written by `adept {name}` before; add --overwrite, or give"])
    result = adept(1, *command(name, place, out, "--overwrite"))
    assert result.returncode == 0, result.stderr
    assert (out / MARK_NAME).stat().st_ino != first
    (out / "notes.txt").write_text("x")
    refused(command(name, place, out, "--overwrite"), [f"'{out}' holds 'notes.txt', which adept did not write", "move"])
    assert (out / "notes.txt").read_text() == "x"
    (out / "notes.txt").unlink()
    other = "delta strip" if name != "delta strip" else "expand"
    refused(command(other, place, out, "--overwrite"), [f"was written by `adept {name}`, not by `adept {other}`"])


def test_a_dry_run_says_what_would_be_replaced(place: Path) -> None:
    out = place / "out"
    assert adept(1, *command("expand", place, out)).returncode == 0
    before = stamps(place)
    refused(command("expand --dry-run", place, out), ["was written by `adept expand` before; add --overwrite"])
    result = adept(1, *command("expand --dry-run", place, out, "--overwrite", "--json"))
    there = sorted(path.name for path in out.iterdir())
    assert json.loads(result.stdout)["replaces"] == there
    result = adept(1, *command("expand --dry-run", place, out, "--overwrite"))
    assert f"{len(there)} files that `adept expand` wrote there before" in result.stdout
    result = adept(1, *command("expand --dry-run", place, place / "new", "--json"))
    assert json.loads(result.stdout)["replaces"] == []
    assert stamps(place) == before


def test_the_converter_refuses_as_the_command_does(place: Path) -> None:
    (place / "thesis").mkdir()
    (place / "thesis" / "notes.txt").write_text("x")
    before = stamps(place)
    for out, words in {place / "thesis": "'notes.txt'", place / "base": "is --base", place: "holds CHECKPOINT"}.items():
        arguments = (place / "checkpoint", out, "--base", place / "base", "--overwrite")
        result = run_tool("tools/zero_to_hf.py", *arguments)
        assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
        assert result.stderr.startswith("zero_to_hf: OUT: ") and words in result.stderr
    assert stamps(place) == before


@pytest.mark.parametrize(
    "content", ["x", "{}", '{"text": "one"}\n', "[" * 100_000, None], ids=lambda text: str(text)[:9]
)
def test_a_result_of_a_probe_replaces_nothing_but_an_earlier_one(content: str | None, place: Path) -> None:
    """The corpus itself, for example."""
    out = place / "general.jsonl"
    if content is None:
        out.mkdir()
    else:
        out.write_text(content)
    before = stamps(place)
    words = [f"--out: '{out}' exists; give the name of a new file"]
    refused(["probe", place / "base", "--corpus", out, "--out", out], words)
    assert stamps(place) == before


def test_an_earlier_result_of_a_probe_is_replaced(workspace: Workspace, tmp_path: Path) -> None:
    out = tmp_path / "layers.json"
    arguments = ["probe", workspace.model, "--corpus", workspace.root / "general.jsonl", "--out", out]
    options = ["--sequences", "4", "--seq-len", "24", "-k"]
    for k in (1, 2):
        result = adept(1, *arguments, *options, k)
        assert result.returncode == 0, result.stderr
        assert len(json.loads(out.read_text())["selected"]) == k
