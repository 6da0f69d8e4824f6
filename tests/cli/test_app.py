"""The `adept` command: how it is started, what it ends with, and what it has to load for that."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from harness.fresh_process import run_fresh
from harness.launching import ROOT, rank_environment
from harness.rank_processes import RankProcess
from harness.workspace import Workspace

import adept_ds
from adept_ds.base.errors import EXIT_BAD_INPUT, EXIT_STOPPED

# --- how it is started ---------------------------------------------------------------------------------------------


def output_of(*command: str) -> str:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return result.stdout


def test_the_command_the_module_and_the_package_are_one_program() -> None:
    command = str(Path(sys.executable).with_name("adept"))
    helps = [output_of(command, "--help"), output_of(sys.executable, "-m", "adept_ds", "--help")]
    as_command, as_module = (text.partition("[OPTIONS]")[2].split() for text in helps)  # before it stands its name
    assert as_command == as_module
    assert {"run", "probe", "expand", "verify", "train", "eval", "export", "report", "show", "delta"} <= set(as_module)
    assert output_of(command, "version").strip() == adept_ds.__version__ == importlib.metadata.version("adept-ds")


def test_the_package_offers_what_serves_alone_and_loads_it_at_first_use() -> None:
    program = "import sys, adept_ds; print('torch' in sys.modules, adept_ds.UnitLR, 'torch' in sys.modules)"
    assert output_of(sys.executable, "-c", program).split() == [
        "False",
        "<class",
        "'adept_ds.units.unit_lr.UnitLR'>",
        "True",
    ]


def test_the_names_of_the_package_are_those_of_its_modules() -> None:
    from adept_ds import UnitAdamW, UnitLR
    from adept_ds.units import adamw, unit_lr

    assert (UnitLR, UnitAdamW) == (unit_lr.UnitLR, adamw.UnitAdamW)
    assert {"UnitLR", "UnitAdamW"} <= set(adept_ds.__all__)
    assert all(hasattr(adept_ds, name) for name in adept_ds.__all__)
    with pytest.raises(AttributeError, match="UnitSGD"):
        _ = adept_ds.UnitSGD


def test_the_argument_that_the_deepspeed_launcher_adds_is_ignored() -> None:
    process = RankProcess(["-m", "adept_ds", "--local_rank=0", "version"], rank_environment(0, 1, 0), ROOT)
    assert process.communicate(timeout=60) == (f"{adept_ds.__version__}\n", "")
    assert process.returncode == 0


# --- what it ends with ---------------------------------------------------------------------------------------------

RAISING = """
import sys, typer
import adept_ds.cli.app as command
from adept_ds.base import errors
def app(*arguments, **options):
    raise {}
command.app = app
command.main()
"""


def ended_by(error: str, **env: str) -> tuple[int | None, str]:
    """The exit code, and what stands on stderr, of a command in which this is raised."""
    process = RankProcess(["-c", RAISING.format(error)], rank_environment(0, 1, 0) | env, ROOT)
    out, err = process.communicate(timeout=60)
    assert out == ""
    return process.returncode, err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        ("errors.InputError('train.lr: 0; raise it')", 2, "adept: train.lr: 0; raise it\n"),
        (
            "errors.StopRequestedError('stopped while probing')",
            3,
            "adept: stopped while probing; run the same command again to go on\n",
        ),
        ("errors.UnitMismatchError('ranks disagree')", 1, "adept: ranks disagree\n"),
        ("errors.LayoutError('unknown partition')", 1, "adept: unknown partition\n"),
        ("typer.Exit(0)", 0, ""),
        ("typer.Abort()", 130, ""),
    ],
)
def test_each_way_to_end_has_its_code_and_at_most_a_line(error: str, code: int, line: str) -> None:
    assert ended_by(error) == (code, line)


@pytest.mark.parametrize("typed", ["--no\nsuch", "--\x1b[31mred", "--" + "x" * 5000], ids=["lines", "colours", "long"])
def test_a_usage_error_is_one_short_printable_line_whatever_was_typed(typed: str) -> None:
    command = [sys.executable, "-m", "adept_ds", "show", "c.yaml", typed]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("adept: ")
    assert result.stderr.endswith("see `adept --help`\n")
    assert result.stderr.removesuffix("\n").isprintable()
    assert len(result.stderr) < 1100


def test_the_codes_are_those_that_the_documentation_lists() -> None:
    page = (ROOT / "docs" / "launching.md").read_text(encoding="utf-8")
    assert f"| {EXIT_BAD_INPUT} | bad input" in page
    assert f"| {EXIT_STOPPED} | stopped on request" in page
    assert ended_by("errors.InputError('a')")[0] == EXIT_BAD_INPUT
    assert ended_by("errors.StopRequestedError('a')")[0] == EXIT_STOPPED


def test_a_bug_has_another_code_and_shows_where_it_is() -> None:
    code, err = ended_by("RuntimeError('boom')")
    assert code == 1
    assert err.startswith("adept: unexpected RuntimeError\nTraceback")
    assert "boom" in err


@pytest.mark.parametrize(
    ("error", "code", "start"),
    [("errors.InputError('a')", 2, ""), ("RuntimeError('a')", 1, "adept[rank 1]: unexpected RuntimeError")],
)
def test_ranks_of_a_host_repeat_no_mistake_but_each_shows_its_own_bug(error: str, code: int, start: str) -> None:
    found, err = ended_by(error, RANK="1", LOCAL_RANK="1", WORLD_SIZE="2")
    assert found == code
    assert err.startswith(start) and bool(err) == bool(start)


# --- what it loads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["run", "{config}", "train.global_batch_size=5"], 2),
        (["show", "{config}"], 0),
        (["show", "{config}", "--json"], 0),
        (["expand", "{ws}/model", "{run}/out", "--layers", "1", "--dry-run"], 0),
        (["probe", "{config}", "--seq-len", "16"], 2),
        (["--help"], 0),
        (["version"], 0),
        (["probe", "--help"], 0),
        (["report", "--help"], 0),
        (["delta", "--help"], 0),
        (["delta", "apply", "--help"], 0),
    ],
)
def test_mistakes_and_plans_are_shown_without_importing_torch(
    arguments: list[str], code: int, workspace: Workspace, tmp_path: Path
) -> None:
    """What makes half a second of it: a command that computes nothing has not loaded torch or DeepSpeed."""
    run_dir = tmp_path / "run"
    places = {"config": workspace.config(run_dir), "ws": workspace.root, "run": run_dir}
    ended = run_fresh(*(argument.format(**places) for argument in arguments))
    assert (ended.code, ended.loaded) == (code, set()), ended.err
