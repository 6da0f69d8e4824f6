"""Commands on plain directories; a model that is probed or evaluated has the numbers of a run, and nothing is left."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from harness.complaints import assert_one_line, files_under
from harness.fresh_process import run_fresh
from harness.launching import adept, free_port, rank_environment
from harness.made_up_run import write_importance
from harness.marks import slow
from harness.rank_processes import RankProcess
from harness.workspace import Workspace, write_corpus

from adept_ds.base.files import read_json, write_json

PATIENCE = 100.0
"""Seconds until something that takes a few must have happened."""

PROGRAM = """
import runpy, sys, tempfile
tempfile.tempdir = None  # the process that this one was forked from may have asked for it before
{}
sys.argv[0] = "adept"
runpy.run_module("adept_ds", run_name="__main__", alter_sys=True)
"""


@dataclass
class Place:
    """Where commands run: an empty current directory, and a temporary directory of their own."""

    cwd: Path
    tmp: Path
    started: list[RankProcess] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    before: set[str] = field(default_factory=set)
    """In memory already when a port was taken: of whoever had the same port earlier and was killed."""

    def start(self, *arguments: object, ranks: int = 1, before: str = "", **env: str) -> list[RankProcess]:
        """`adept ARGUMENTS`; `before`: Python to run first."""
        words = ["-c", PROGRAM.format(before), *map(str, arguments)]
        port, env = free_port(), {"TMPDIR": str(self.tmp)} | env
        self.before |= in_memory(port)
        self.ports.append(port)
        processes = [RankProcess(words, rank_environment(rank, ranks, port) | env, self.cwd) for rank in range(ranks)]
        self.started += processes
        return processes

    def run(self, *arguments: object, **options: Any) -> tuple[list[int | None], str, str]:
        """Exit codes of all ranks, and what rank 0 wrote to stdout and all wrote to stderr."""
        return ended(self.start(*arguments, **options))

    def results(self, *arguments: object, **options: Any) -> Any:
        codes, out, err = self.run(*arguments, "--json", **options)
        assert set(codes) == {0}, err
        return json.loads(out)

    def left(self) -> set[str]:
        """On disk, or in memory that outlives a process.

        Torch makes a directory among temporary files, once for all processes of a user.
        """
        shared = set().union(*map(in_memory, self.ports)) - self.before
        found = {path for path in files_under(self.cwd, self.tmp) if not Path(path).name.startswith("torchinductor_")}
        return found | shared


def in_memory(port: int) -> set[str]:
    """Memory that DeepSpeed shares among the ranks that meet at a port of this host."""
    return {str(path) for path in Path("/dev/shm").glob(f"*_127.0.0.1_{port}_*")}


def ended(processes: list[RankProcess]) -> tuple[list[int | None], str, str]:
    output = [process.communicate(timeout=PATIENCE) for process in processes]
    return [process.returncode for process in processes], output[0][0], "".join(err for _, err in output)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path / "cwd", tmp_path / "tmp")
    place.cwd.mkdir()
    place.tmp.mkdir()
    yield place
    for process in place.started:
        process.kill()


@dataclass(frozen=True)
class Form:
    """A command on a plain model, and the options it gets."""

    command: str
    text: str
    """Option that names the text."""
    options: tuple[str, ...]

    def arguments(self, model: Path, text: Path) -> list[object]:
        return [self.command, model, self.text, text, *self.options]


PROBE = Form("probe", "--corpus", ("-k", "2", "--sequences", "7", "--seq-len", "24"))
EVAL = Form("eval", "--text", ("--seq-len", "32"))
BOTH = pytest.mark.parametrize("form", [PROBE, EVAL], ids=lambda form: form.command)


@pytest.fixture(scope="module")
def by_run(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the commands find with a configuration that says the same and nothing else."""
    run_dir, text = tmp_path_factory.mktemp("by_run") / "run", [str(workspace.root / "general.jsonl")]
    tree = {
        "model": str(workspace.model),
        "run_dir": str(run_dir),
        "probe": {"corpus": text, "sequences": 7, "seq_len": 24},
        "expand": {"k": 2},
        "data": {"domain_eval": text, "seq_len": 32},
    }
    config = run_dir.with_suffix(".yaml")
    write_json(config, tree)  # JSON is YAML
    shutil.copytree(workspace.model, run_dir / "export")  # what an evaluation wants to compare with
    found = {}
    for command in ("probe", "eval"):
        result = adept(1, command, config, "--json")
        assert result.returncode == 0, result.stderr
        found[command] = json.loads(result.stdout)
    return found


def test_probing_a_model_finds_what_a_run_finds_on_any_number_of_ranks(
    workspace: Workspace, by_run: dict[str, Any], place: Place
) -> None:
    """The loss of a sequence is summed in fp32, of sequences in fp64: bit for bit on one process, where it is the same
    computation, else to fp64's rounding."""
    arguments = PROBE.arguments(workspace.model, workspace.root / "general.jsonl")
    expected = by_run["probe"]
    assert place.results(*arguments) == expected
    found = place.results(*arguments, ranks=2)
    for key in ("selected", "tokens", "sequences", "method", "sources", "measures"):
        assert found[key] == expected[key]
    for layer, other in zip(found["layers"], expected["layers"], strict=True):
        assert layer["loss"] == pytest.approx(other["loss"], rel=1e-12)
    assert found["base_loss"] == pytest.approx(expected["base_loss"], rel=1e-12)
    assert place.left() == set()


def test_evaluating_a_model_finds_what_a_run_finds_on_any_number_of_ranks(
    workspace: Workspace, by_run: dict[str, Any], place: Place
) -> None:
    """Equal as for a probe."""
    arguments = EVAL.arguments(workspace.model, workspace.root / "general.jsonl")
    expected = by_run["eval"]["base"]["domain"]
    assert by_run["eval"]["adapted"]["domain"] == expected, "it is the same model"
    assert place.results(*arguments) == {"model": {"text": expected}}
    found = place.results(*arguments, ranks=2)["model"]["text"]
    assert found == expected | {
        "loss": pytest.approx(expected["loss"], rel=1e-12),
        "sources": {"general": expected["sources"]["general"] | {"loss": pytest.approx(expected["loss"], rel=1e-12)}},
    }
    assert place.left() == set()


def test_methods_are_compared_on_a_model_too(workspace: Workspace, place: Place) -> None:
    arguments = PROBE.arguments(workspace.model, workspace.root / "general.jsonl")
    found = place.results(*arguments, "--method", "all")
    assert found["methods"].keys() == {"mask", "taylor", "gradient", "fisher"}
    assert found["spearman"].keys() < found["methods"].keys()
    assert place.results(*arguments, "--method", "fisher")["method"] == "fisher"
    assert place.left() == set()


@pytest.mark.parametrize("form", [PROBE, slow(EVAL)], ids=lambda form: form.command)
def test_two_at_the_same_time_do_not_disturb_each_other(form: Form, workspace: Workspace, place: Place) -> None:
    """On different texts, of the same length: what one packed would fit the other."""
    texts = [workspace.root / f"{name}.jsonl" for name in ("general", "domain")]
    alone = [place.results(*form.arguments(workspace.model, text)) for text in texts]
    assert alone[0] != alone[1]
    work = place.cwd / "work"
    together = [
        place.start(*form.arguments(workspace.model, text), "--work-dir", work, "--json", ranks=2) for text in texts
    ]
    found = [ended(processes) for processes in together]
    assert [codes for codes, _, _ in found] == [[0, 0], [0, 0]], found
    on_two = [place.results(*form.arguments(workspace.model, text), ranks=2) for text in texts]
    assert [json.loads(out) for _, out, _ in found] == on_two
    assert place.left() == {str(work)}


# --- what is left behind -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_result_is_all_that_stands_beside_out(ranks: int, workspace: Workspace, place: Place) -> None:
    out = place.cwd / "results" / "layers.json"
    arguments = PROBE.arguments(workspace.model, workspace.root / "general.jsonl")
    found = place.results(*arguments, "--out", out, ranks=ranks)
    assert read_json(out) == found
    assert place.left() == {str(out), str(out.parent)}


def test_out_may_be_a_name_in_the_current_directory(workspace: Workspace, place: Place) -> None:
    arguments = PROBE.arguments(workspace.model, workspace.root / "general.jsonl")
    assert place.results(*arguments, "--out", "layers.json") == read_json(place.cwd / "layers.json")
    assert place.left() == {str(place.cwd / "layers.json")}


BOOM = """
import adept_ds.run.{module} as module
def boom(*arguments, **options):
    raise RuntimeError("boom")
module.{function} = boom
"""


@pytest.mark.parametrize("ranks", [slow(1), 2])
@pytest.mark.parametrize(
    ("form", "module", "function"), [(PROBE, "probe", "_passes"), (EVAL, "evaluate", "document_losses")]
)
def test_nothing_but_logs_is_left_of_a_command_that_crashes(
    form: Form, module: str, function: str, ranks: int, workspace: Workspace, place: Place
) -> None:
    """But what libraries said, which a run keeps in its logs: where that is stands beside the traceback."""
    arguments = form.arguments(workspace.model, workspace.root / "general.jsonl")
    codes, _, err = place.run(*arguments, ranks=ranks, before=BOOM.format(module=module, function=function))
    assert codes == [1] * ranks
    assert "unexpected RuntimeError" in err and "boom" in err and "Traceback" in err
    logs = re.findall(r"^adept: what libraries said is in (.+)$", err, flags=re.MULTILINE)
    assert len(logs) == ranks
    assert place.left() == {*logs, *(f"{folder}/log" for folder in logs)}


@BOTH
@pytest.mark.parametrize("ranks", [1, slow(2)])
def test_nothing_is_left_of_a_command_that_meets_bad_input(
    form: Form, ranks: int, workspace: Workspace, place: Place, tmp_path: Path
) -> None:
    """Seen when the text is packed, in the middle of the work."""
    text = tmp_path / "malformed.jsonl"
    text.write_text('{"text": "fine"}\n{"text": "cut sho\n')
    codes, out, err = place.run(*form.arguments(workspace.model, text), ranks=ranks)
    assert (codes, out) == ([2] * ranks, "")
    assert_one_line(err, ["malformed.jsonl' line 2"])
    assert place.left() == set()


def wait_for(something: Callable[[], object], processes: list[RankProcess]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not something():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("moment", ["packing", "computing"])
@pytest.mark.parametrize(
    ("form", "ranks", "options", "where"),
    [
        (PROBE, 2, [], "tmp"),
        slow(PROBE, 1, ["--out", "results/layers.json"], "cwd/results"),
        (PROBE, 1, ["--out", "results/layers.json", "--work-dir", "work"], "cwd/work"),
        slow(EVAL, 2, ["--work-dir", "work"], "cwd/work"),
        slow(EVAL, 1, [], "tmp"),
    ],
)
def test_nothing_is_left_of_a_command_that_is_stopped(
    form: Form,
    ranks: int,
    options: list[str],
    where: str,
    moment: str,
    workspace: Workspace,
    place: Place,
    tmp_path: Path,
) -> None:
    """By SIGTERM, while its work lies where it should and nowhere else. There is more of both kinds of work than is
    done while this test looks."""
    text = write_corpus(tmp_path / "long.jsonl", 0, documents=20_000)
    arguments = [form.command, workspace.model, form.text, text, *options]
    if form is PROBE:
        arguments += ["--sequences", "30000", "--seq-len", "24", "-k", "2"]
    sign = ".adept_*/cache/" + ("tokens/*/manifest.json" if moment == "computing" else "unfinished/tokens/*")
    processes = place.start(*arguments, ranks=ranks)
    wait_for(lambda: list((tmp_path / where).glob(sign)), processes)
    (work,) = (path for path in tmp_path.rglob(".adept_*") if path.is_dir())
    assert work.parent == tmp_path / where
    assert work.stat().st_mode & 0o077 == 0, "others on this host could read the text"
    for process in processes:
        process.send_signal(signal.SIGTERM)
    codes, out, err = ended(processes)
    assert (codes, out) == ([3] * ranks, ""), err
    assert_one_line(err, ["stopped while", "run the same command again"])
    assert place.left() <= {str(place.cwd / name) for name in ("results", "work")}


# --- several hosts -------------------------------------------------------------------------------------------------

ONE_OF_TWO_HOSTS = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


@BOTH
def test_on_several_hosts_without_a_place_that_all_see_it_is_refused_at_once(form: Form, workspace: Workspace) -> None:
    """Ranks on the others would look for packed text on a disk that they do not have."""
    found = run_fresh(*form.arguments(workspace.model, workspace.root / "general.jsonl"), **ONE_OF_TWO_HOSTS)
    assert (found.code, found.loaded) == (2, set())
    assert_one_line(found.err, ["--work-dir is missing", "several hosts", "give"])


@pytest.mark.parametrize(
    ("form", "options"),
    [slow(PROBE, ["--work-dir", "w"]), (PROBE, ["--out", "w/layers.json"]), slow(EVAL, ["--work-dir", "w"])],
)
def test_on_several_hosts_with_such_a_place_it_does_what_it_does_on_one(
    form: Form, options: list[str], workspace: Workspace, place: Place
) -> None:
    """Two ranks that each are the only one of their host, as far as the environment says."""
    arguments = form.arguments(workspace.model, workspace.root / "general.jsonl")
    expected = place.results(*arguments, ranks=2)
    found = place.results(*arguments, *options, ranks=2, LOCAL_RANK="0", LOCAL_SIZE="1")
    assert found == expected
    assert place.left() - {str(place.cwd / "w"), str(place.cwd / "w" / "layers.json")} == set()


def test_a_place_that_cannot_be_written_is_named(workspace: Workspace, place: Place) -> None:
    (place.cwd / "file").touch()
    arguments = EVAL.arguments(workspace.model, workspace.root / "general.jsonl")
    codes, _, err = place.run(*arguments, "--work-dir", place.cwd / "file" / "below")
    assert codes == [2]
    assert_one_line(err, ["--work-dir", str(place.cwd / "file" / "below"), "cannot be written", "another"])


# --- other directories ---------------------------------------------------------------------------------------------


def test_a_model_is_expanded_without_a_run_and_verified(workspace: Workspace, place: Place) -> None:
    out = place.cwd / "out"
    found = place.results("expand", workspace.model, out, "--layers", "3,1")
    assert [copy["source"] for copy in found["copies"]] == [1, 3]
    assert found == read_json(out / "expansion.json")
    assert place.results("verify", workspace.model, out)["logits"] is True
    names = {path.name for path in place.cwd.iterdir()}
    assert names == {"out"} and not list(place.tmp.iterdir())


def test_a_report_is_written_by_configuration_or_by_directory(workspace: Workspace, place: Place) -> None:
    run_dir = place.cwd / "run"
    config = workspace.config(run_dir)
    run_dir.mkdir()
    write_importance(run_dir)
    for target in (config, run_dir):
        codes, out, err = place.run("report", target)
        assert (codes, out, err) == ([0], f"{run_dir / 'report.html'}\n", "")
        (run_dir / "report.html").unlink()


def test_what_other_users_left_among_temporary_files_does_no_harm(workspace: Workspace, place: Place) -> None:
    """Theirs can be neither locked nor removed; here because there is no file to lock, which holds for root as well."""
    name = f".adept_work.{'0' * 32}"
    (place.tmp / f"{name}.tmp").mkdir()
    (place.tmp / f"{name}.lock").mkdir()
    before = place.left()
    assert place.results(*EVAL.arguments(workspace.model, workspace.root / "general.jsonl"))
    assert place.left() == before


def test_a_second_interrupt_ends_it_at_once_and_leaves_nothing(workspace: Workspace, place: Place) -> None:
    """The first one would end it at its next step of progress, which never comes here."""
    before = BOOM.replace('raise RuntimeError("boom")', "import time; time.sleep(1000)")
    arguments = EVAL.arguments(workspace.model, workspace.root / "general.jsonl")
    processes = place.start(*arguments, before=before.format(module="evaluate", function="document_losses"))
    wait_for(lambda: list(place.tmp.glob(".adept_*/cache/tokens/[!.]*/manifest.json")), processes)
    for _ in range(2):
        time.sleep(0.5)
        processes[0].send_signal(signal.SIGINT)
    codes, out, _ = ended(processes)
    assert (codes, out) == ([130], "")
    assert place.left() == set()


def test_an_interrupt_of_work_on_files_is_no_success(workspace: Workspace, place: Place) -> None:
    """A script that goes on after `adept expand` must not go on after Ctrl-C."""
    before = """
import adept_ds.weights.expansion as user
def interrupted(*arguments, **options):
    raise KeyboardInterrupt
user.write_tensors = interrupted
"""
    codes, out, err = place.run("expand", workspace.model, place.cwd / "out", "--layers", "1", before=before)
    assert (codes, out, err) == ([130], "", "")
    assert place.left() == set()
