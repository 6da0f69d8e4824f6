"""The section `logging`: what is refused before anything heavy, and what never stands in config.yaml."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from harness.fresh_process import run_fresh
from harness.workspace import Workspace

from adept_ds.base.errors import InputError
from adept_ds.config.loading import parse_config
from adept_ds.config.logging_section import LoggingSection
from adept_ds.config.trackers import check_trackers


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No package of a tracker is installed; not even where a folder has its name."""

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("adept_ds.config.trackers.importlib.metadata.version", version)


@pytest.mark.parametrize(
    ("logging", "package", "extra"),
    [
        ({"wandb": "math"}, "wandb", "adept-ds[tracking]"),
        ({"mlflow": "mlruns"}, "mlflow-skinny", "adept-ds[tracking]"),
        ({"mlflow": "http://tracker:5000"}, "mlflow-skinny", "adept-ds[tracking]"),
        ({"mlflow": "sqlite:///runs.db"}, "mlflow", "pip install mlflow,"),
    ],
)
@pytest.mark.usefixtures("bare")
def test_a_package_that_is_missing_is_named(logging: dict[str, str], package: str, extra: str) -> None:
    with pytest.raises(InputError) as refusal:
        check_trackers(LoggingSection.model_validate(logging))
    (key, value), *_ = logging.items()
    assert str(refusal.value).startswith(f"logging.{key}: '{value}' ")
    assert f" needs the package {package}, which is not installed" in str(refusal.value)
    assert extra in str(refusal.value)


def test_a_missing_package_is_said_before_anything_heavy(workspace: Workspace, tmp_path: Path) -> None:
    """Where the packages are there, another mistake of the section stands in for it."""
    installed = True
    try:
        importlib.metadata.version("wandb")
    except importlib.metadata.PackageNotFoundError:
        installed = False
    section = {"prometheus": str(tmp_path / "none" / "a.prom")} if installed else {"wandb": "math"}
    ended = run_fresh("run", workspace.config(tmp_path / "run", logging=section))
    assert (ended.code, ended.loaded) == (2, set())
    (line,) = ended.err.splitlines()
    assert line.startswith("adept: logging.")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none/a.prom", "is no directory; give a file in the one that node_exporter reads"),
        ("users.prom", "is there, and adept did not write it; give another name"),
        ("folder.prom", "is there, and adept did not write it; give another name"),
    ],
)
def test_a_file_for_prometheus_replaces_nothing_of_the_users(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "users.prom").write_text("node_temperature 7\n")
    (tmp_path / "folder.prom").mkdir()
    with pytest.raises(InputError, match=r"^logging\.prometheus: ") as refusal:
        check_trackers(LoggingSection(prometheus=tmp_path / name))
    assert words in str(refusal.value)
    assert (tmp_path / "users.prom").read_text() == "node_temperature 7\n"


def test_a_file_that_adept_wrote_is_written_again(tmp_path: Path) -> None:
    (tmp_path / "a.prom").write_text("# HELP adept_train_up 1 while\n")
    check_trackers(LoggingSection(prometheus=tmp_path / "a.prom"))


@pytest.mark.parametrize(
    ("logging", "words"),
    [
        ({"wandb": ""}, "write PROJECT or ENTITY/PROJECT"),
        ({"wandb": "a/b/c"}, "write PROJECT or ENTITY/PROJECT"),
        ({"wandb": "what?"}, "write PROJECT or ENTITY/PROJECT"),
        ({"mlflow": "  "}, "is no path; write one"),
        ({"prometheus": "adept.txt"}, "does not end in .prom"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(
    workspace: Workspace, tmp_path: Path, logging: dict[str, str], words: str
) -> None:
    with pytest.raises(InputError) as refusal:
        parse_config(workspace.tree(tmp_path / "run", logging=logging))
    assert words in str(refusal.value)
    assert f"logging.{next(iter(logging))}" in str(refusal.value)


@pytest.mark.parametrize(
    "address",
    [
        "https://anna:s3cret@tracker.org/mlflow",
        "http://s3cret@tracker.org",
        "postgresql://anna:s3cret@db/mlflow",
        "https://tracker.org/?token=s3cret",
    ],
)
def test_a_secret_is_refused_and_not_repeated(workspace: Workspace, tmp_path: Path, address: str) -> None:
    with pytest.raises(InputError) as refusal:
        parse_config(workspace.tree(tmp_path / "run", logging={"mlflow": address}))
    assert "s3cret" not in str(refusal.value)
    assert "MLFLOW_TRACKING_PASSWORD" in str(refusal.value)
