"""Trackers get what metrics.jsonl has, once and in its order, whatever they do; their libraries read it back."""

from __future__ import annotations

import math
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.waiting import until
from harness.wandb_files import history as history_of
from harness.workspace import Workspace

from adept_ds.base.run_dir import RunDirectory
from adept_ds.base.run_records import log_line
from adept_ds.config.loading import parse_config
from adept_ds.training import follower, tracking
from adept_ds.training.follower import Job, Known, Memory, Tail, Telling, begun
from adept_ds.training.trackers import How, Prometheus, Records, Tracker, flat
from adept_ds.training.tracking import Tracking

STRANGE = 'a "quoted" \\ name\nin two lines'
"""Of a corpus: a file's name may be anything."""


def step_line(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 3.0 / step, "lr": 1e-3, "tokens": 100 * step, "tokens_per_second": 50.0 + step}


def write(run: RunDirectory, *records: dict[str, Any]) -> None:
    run.root.mkdir(exist_ok=True)
    with run.metrics.open("a") as file:
        file.write("".join(map(log_line, records)))


# --- in order, once, whatever a tracker does ------------------------------------------------------------------------


class Moody(Tracker):
    """Fails at these calls of `begin` and `send`, counted from 1, and remembers what it took."""

    name = "moody"

    def __init__(self, fails: set[int]) -> None:
        super().__init__("target", "run", Path(), {}, 0)
        self.fails, self.calls = fails, 0
        self.took: list[tuple[int, str]] = []
        self.names: list[str] = []
        self.ended: list[How] = []

    def begin(self, name: str) -> str:
        self._call()
        self.names.append(name)
        return name or "its own name"

    def send(self, records: Records) -> None:
        self._call()
        kinds = ("loss", "refresh_seconds", "eval")
        self.took += [(record["step"], next(kind for kind in kinds if kind in record)) for record in records]

    def end(self, how: How) -> None:
        self.ended.append(how)

    def _call(self) -> None:
        self.calls += 1
        if self.calls in self.fails:
            raise ConnectionError("nobody is there\nand so on")


def job_of(run: RunDirectory, first_step: int = 0, lr: float = 1e-3, digest: str = "a" * 64) -> Job:
    return Job(
        run_dir=str(run.root),
        title="math",
        config={},
        config_digest=digest,
        first_step=first_step,
        lr=lr,
        steps=10,
        targets={},
        patience=1.0,
    )


LINES: list[dict[str, Any]] = [
    {"step": 0, "refresh_seconds": 0.1},
    {"step": 0, "eval": {"domain": {"loss": 3.0}}},
    step_line(1),
    step_line(2),
    {"step": 2, "refresh_seconds": 0.1},
    {"step": 2, "eval": {"domain": {"loss": 2.0}}},
    step_line(3),
]
NAMES = [(0, "refresh_seconds"), (0, "eval"), (1, "loss"), (2, "loss"), (2, "refresh_seconds"), (2, "eval")]
NAMES += [(3, "loss")]


def tell_all(run: RunDirectory, tracker: Moody, job: Job, how: How = "finished") -> list[str]:
    """Everything that is there, in one go; what the user is told."""
    said, ended = list[str](), threading.Event()
    telling = Telling(tracker, job, follower._Notes(run.tracking), said.append)
    thread = threading.Thread(target=telling.run, args=(ended, lambda: how))
    thread.start()
    until(lambda: len(tracker.took) > 0 or tracker.calls > 3 or not run.metrics.is_file())
    ended.set()
    thread.join(60)
    return said


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "_LOOKS", 0.01)
    monkeypatch.setattr(follower, "_RECORDS", 2)


@pytest.mark.parametrize("fails", [set(), {1}, {2}, {1, 3, 4}])
def test_a_tracker_that_fails_now_and_then_gets_every_line_once_and_in_order(tmp_path: Path, fails: set[int]) -> None:
    run, tracker = RunDirectory(tmp_path), Moody(fails)
    write(run, *LINES)
    said, ended = list[str](), threading.Event()
    telling = Telling(tracker, job_of(run), follower._Notes(run.tracking), said.append)
    thread = threading.Thread(target=telling.run, args=(ended, lambda: "finished"))
    thread.start()
    until(lambda: len(tracker.took) == len(LINES))
    write(run, step_line(4))
    ended.set()
    thread.join(60)
    assert tracker.took == [*NAMES, (4, "loss")]
    assert tracker.ended == ["finished"]
    complaints = [line for line in said if "nobody is there" in line]
    assert bool(complaints) == bool(fails)
    assert all("and so on" not in line for line in said), "one line each"


def test_a_run_that_goes_on_is_the_same_run_there_and_is_told_nothing_twice(tmp_path: Path) -> None:
    """Killed after step 3, whose checkpoint was that of step 1: it computes steps 2 and 3 once more, alike."""
    run, first, second = RunDirectory(tmp_path), Moody(set()), Moody(set())
    write(run, *LINES)
    tell_all(run, first, job_of(run), "killed")
    run.metrics.unlink()
    write(run, *LINES, step_line(4))
    tell_all(run, second, job_of(run, first_step=1))
    assert first.took == NAMES
    assert (second.names, second.took) == (["its own name"], [(4, "loss")])
    known = Memory.load(run.tracking).trackers["moody"]
    assert (known.step, known.kind, known.ended) == (4, 0, "finished")


KNOWN = Known(target="target", name="x", config_digest="a" * 64, lr=1e-3, step=7, kind=0, ended="stopped")


@pytest.mark.parametrize(
    ("first_step", "lr", "digest", "found"),
    [
        (0, 1e-3, "a", ("x", 7, 0)),  # from the start, since there was no checkpoint yet
        (5, 1e-3, "b", ("x", 7, 0)),  # with other ranks, or another micro-batch
        (0, 1e-3, "b", ("", 0, -1)),  # another training, in the place of one that left no checkpoint
        (5, 1e-4, "b", ("x", 5, 3)),  # a lower rate after it broke down: what is not as it was told is told again
    ],
)
def test_what_is_another_training_begins_under_another_name(
    tmp_path: Path, first_step: int, lr: float, digest: str, found: tuple[str, int, int]
) -> None:
    known = begun(job_of(RunDirectory(tmp_path), first_step, lr, digest * 64), Moody(set()), KNOWN)
    assert (known.name, known.step, known.kind) == found
    assert known.ended is None


def test_another_target_is_told_from_the_start(tmp_path: Path) -> None:
    elsewhere = KNOWN.model_copy(update={"target": "another"})
    assert begun(job_of(RunDirectory(tmp_path), 5), Moody(set()), elsewhere).name == ""


def test_a_line_is_taken_when_it_is_whole(tmp_path: Path) -> None:
    run, text = RunDirectory(tmp_path), log_line(step_line(1)) + log_line(step_line(2))
    tail, seen = Tail(run.metrics), list[int]()
    for end in range(len(text) + 1):
        run.metrics.write_text(text[:end])
        seen += [record["step"] for record in tail.new()]
        assert seen == [1] * (end >= text.index("\n") + 1) + [2] * (end == len(text))


def test_what_is_damaged_is_passed_over_however_long_it_is(tmp_path: Path) -> None:
    run, changed = RunDirectory(tmp_path), log_line(step_line(1)).replace('"loss": 3.0', '"loss": 9.0')
    run.metrics.write_text("\0" * (3 << 20) + "\n" + changed + log_line(step_line(2)))
    assert [record["step"] for record in Tail(run.metrics).new()] == [2]


# --- the process ----------------------------------------------------------------------------------------------------


@pytest.fixture
def make(workspace: Workspace, tmp_path: Path) -> Iterator[Callable[..., Tracking]]:
    """A `Tracking` of a run in RUN, with these targets."""
    said = list[str]()

    def made(first_step: int = 0, **logging: object) -> Tracking:
        targets = {key: str(target) for key, target in logging.items()}
        tree = workspace.tree(tmp_path / "run", logging=targets)
        made.said = said  # type: ignore[attr-defined]
        return Tracking(parse_config(tree), RunDirectory(tmp_path / "run"), first_step, said.append)

    yield made


def follow(track: Tracking, run: RunDirectory, *records: dict[str, Any], how: How = "finished") -> None:
    run.root.mkdir(exist_ok=True)
    track.start()
    write(run, *records)
    track.finish(how)


def test_the_process_writes_what_prometheus_reads_and_ends_with_training(
    tmp_path: Path, make: Callable[..., Tracking]
) -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="pip install prometheus-client")
    run, file = RunDirectory(tmp_path / "run"), tmp_path / "adept.prom"
    lines = [*LINES, {"step": 3, "eval": {STRANGE: {"loss": 1.5}, "domain": {"loss": 1.25}}}]
    lines += [{"step": 3, "guard": {"general": {"web": {"rise": 0.25, "lower": 0.125, "upper": 0.5}}}}]
    lines += [step_line(4) | {"loss": math.nan, "skipped": "loss", "skipped_steps": 1}]
    follow(make(prometheus=file), run, *lines)
    families = {family.name: family for family in parser.text_string_to_metric_families(file.read_text())}
    found = {
        (sample.name, sample.labels.get("corpus") or sample.labels.get("source")): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert all(sample.labels["run"] == "run" for family in families.values() for sample in family.samples)
    assert all(family.documentation for family in families.values())
    assert math.isnan(found.pop(("adept_train_loss", None)))
    assert found.pop(("adept_train_told_timestamp_seconds", None)) > 1.7e9
    assert found == {
        ("adept_train_up", None): 0.0,
        ("adept_train_step", None): 4.0,
        ("adept_train_steps", None): 7.0,
        ("adept_train_learning_rate", None): 1e-3,
        ("adept_train_tokens_total", None): 400.0,
        ("adept_train_tokens_per_second", None): 54.0,
        ("adept_train_skipped_steps", None): 1.0,
        ("adept_train_held_out_loss", "domain"): 1.25,
        ("adept_train_held_out_loss", STRANGE): 1.5,
        ("adept_train_general_rise", "web"): 0.25,
        ("adept_train_general_rise_lower", "web"): 0.125,
    }
    assert families["adept_train_tokens"].type == "counter"
    assert make.said == []  # type: ignore[attr-defined]
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_the_file_for_prometheus_says_that_training_goes_on_while_it_does(
    tmp_path: Path, make: Callable[..., Tracking]
) -> None:
    run, file = RunDirectory(tmp_path / "run"), tmp_path / "adept.prom"
    run.root.mkdir()
    track = make(prometheus=file)
    track.start()
    write(run, step_line(1))
    until(lambda: file.is_file() and 'adept_train_step{run="run"} 1' in file.read_text())
    assert 'adept_train_up{run="run"} 1.0\n' in file.read_text()
    write(run, step_line(2))
    until(lambda: 'adept_train_step{run="run"} 2' in file.read_text())
    track.finish("stopped")
    assert 'adept_train_up{run="run"} 0.0\n' in file.read_text()


def test_without_a_key_no_process_is_started(tmp_path: Path, make: Callable[..., Tracking]) -> None:
    track = make()
    track.start()
    assert track._process is None
    track.finish("finished")


def test_a_process_that_dies_is_said_and_nothing_else_happens(tmp_path: Path, make: Callable[..., Tracking]) -> None:
    run = RunDirectory(tmp_path / "run")
    run.root.mkdir()
    track = make(prometheus=tmp_path / "adept.prom")
    track.start()
    assert track._process is not None
    track._process.kill()
    until(lambda: len(make.said) == 1)  # type: ignore[attr-defined]
    assert "nobody is told any more, since that process ended with -9" in make.said[0]  # type: ignore[attr-defined]
    track.finish("finished")


def test_a_server_that_never_answers_holds_up_the_end_for_no_longer_than_its_patience(
    tmp_path: Path, make: Callable[..., Tracking], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the connection and says nothing, as behind a firewall; the other tracker gets everything meanwhile."""
    pytest.importorskip("mlflow", reason="pip install 'adept-ds[tracking]'")
    monkeypatch.setattr(tracking, "PATIENCE", 2.0)
    run, file = RunDirectory(tmp_path / "run"), tmp_path / "adept.prom"
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        track = make(mlflow=address, prometheus=file)
        run.root.mkdir()
        track.start()
        assert track._process is not None
        process = track._process
        write(run, *LINES)
        until(lambda: file.is_file() and 'adept_train_step{run="run"} 3' in file.read_text())
        track.finish("finished")
    assert 'adept_train_up{run="run"} 0.0\n' in file.read_text()
    assert process.poll() is not None
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert "logging.mlflow: has not taken everything yet" in make.said[-1]  # type: ignore[attr-defined]


def test_a_tracker_that_cannot_be_reached_is_told_the_rest_by_the_same_command(
    tmp_path: Path, make: Callable[..., Tracking], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training is over, and its folder can be written only now."""
    mlflow = pytest.importorskip("mlflow", reason="pip install 'adept-ds[tracking]'")
    monkeypatch.setattr(tracking, "PATIENCE", 10.0)
    run, folder = RunDirectory(tmp_path / "run"), tmp_path / "mlruns"
    folder.write_text("in the way")
    follow(make(mlflow=folder), run, *LINES)
    assert any(line.startswith("logging.mlflow: ") for line in make.said)  # type: ignore[attr-defined]
    folder.unlink()
    make(7, mlflow=folder).tell_the_rest()
    assert history(mlflow, folder, run) == [(1, 3.0), (2, 1.5), (3, 1.0)]
    before = run.tracking.read_bytes()
    make(7, mlflow=folder).tell_the_rest()
    assert run.tracking.read_bytes() == before, "it has been told everything"


# --- their libraries ------------------------------------------------------------------------------------------------


def history(mlflow: Any, folder: Path, run: RunDirectory, key: str = "train/loss") -> list[tuple[int, float]]:
    name = Memory.load(run.tracking).trackers["mlflow"].name
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    client = mlflow.MlflowClient(tracking_uri=str(folder))
    return [(metric.step, metric.value) for metric in client.get_metric_history(name, key)]


def test_mlflow_has_numbers_settings_and_how_it_ended_and_goes_on_with_the_same_run(
    tmp_path: Path, make: Callable[..., Tracking]
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="pip install 'adept-ds[tracking]'")
    run, folder = RunDirectory(tmp_path / "run"), tmp_path / "mlruns"
    follow(make(mlflow=folder), run, *LINES, how="stopped")
    name = Memory.load(run.tracking).trackers["mlflow"].name
    client = mlflow.MlflowClient(tracking_uri=str(folder))
    assert client.get_run(name).info.status == "KILLED"
    follow(make(3, mlflow=folder), run, step_line(4), {"step": 4, "eval": {STRANGE: {"loss": 1.5}}})
    assert make.said == []  # type: ignore[attr-defined]
    found = client.get_run(name)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    assert history(mlflow, folder, run) == [(1, 3.0), (2, 1.5), (3, 1.0), (4, 0.75)]
    assert history(mlflow, folder, run, "eval/domain_loss") == [(0, 3.0), (2, 2.0)]
    assert [key for key in found.data.metrics if "quoted" in key] == ["eval/a _quoted_ _ name_in two lines_loss"]
    assert found.data.params["train.global_batch_size"] == "12"
    assert found.data.params["method"] == "adept"
    (experiment,) = (e for e in client.search_experiments() if e.name == "adept-ds")
    assert [of.info.run_id for of in client.search_runs([experiment.experiment_id])] == [name]


def test_wandb_offline_has_the_same_numbers_and_goes_on_with_the_same_run(
    tmp_path: Path, make: Callable[..., Tracking], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="pip install 'adept-ds[tracking]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = RunDirectory(tmp_path / "run")
    follow(make(wandb="entity/math"), run, *LINES, how="stopped")
    follow(make(3, wandb="entity/math"), run, step_line(4))
    assert make.said == []  # type: ignore[attr-defined]
    files = sorted(run.root.glob("wandb/offline-run-*/*.wandb"))
    name = Memory.load(run.tracking).trackers["wandb"].name
    assert [file.name for file in files] == [f"run-{name}.wandb"] * 2
    rows = [row for file in files for row in history_of(file)]
    steps = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert steps == [(1, 3.0), (2, 1.5), (3, 1.0), (4, 0.75)]
    held_out = [(row["step"], row["eval/domain_loss"]) for row in rows if "eval/domain_loss" in row]
    assert held_out == [(0, 3.0), (2, 2.0)]


def test_settings_are_flat_as_on_a_command_line() -> None:
    tree = {"train": {"lr": 1e-3, "betas": [0.9, 0.95]}, "method": {"name": "adept"}, "dial": None, "model": "m"}
    assert dict(flat(tree)) == {
        "train.lr": "0.001",
        "train.betas": "[0.9, 0.95]",
        "method.name": "adept",
        "model": "m",
    }


def test_a_file_that_prometheus_reads_is_replaced_whole(tmp_path: Path) -> None:
    """Whoever has it open keeps the old one: it is another file, under the same name."""
    file = tmp_path / "adept.prom"
    tracker = Prometheus(str(file), "math", tmp_path, {}, 10)
    tracker.begin("")
    with file.open() as old:
        tracker.send([step_line(1)])
        assert "adept_train_step{" not in old.read()
    assert "adept_train_step{" in file.read_text()
