"""Packages and the dial: they hold what was trained, say what is recommended, and are applied at any position."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.domains import Domains, all_tensors, content, load, logits, run_dir
from harness.launching import adept
from harness.spoiling import assert_refused, changed_json

from adept_ds.base.dial_record import DialPosition, DialRecord, HalfLosses, LossChange
from adept_ds.deltas.operations import apply_packages, pack_copies, strip_copies
from adept_ds.deltas.package import Package
from adept_ds.weights.expansion import Expansion
from adept_ds.weights.turning import write_turned

CHOSEN = (0.5, 1.0)


def record(chosen: tuple[float, ...]) -> DialRecord:
    change = LossChange(loss=2.0, rise=-0.1, limit=-0.05, tokens=10, documents=5)
    half = HalfLosses(general={"wiki": change}, domain=change)
    position = DialPosition(alphas=chosen, tried_as="single", validation=half, test=half, keeps=True, seconds=1.0)
    return DialRecord(
        kind="copies",
        sources=(1, 3),
        max_general_rise=0.0,
        confidence=0.95,
        samples=10_000,
        positions=(position,),
        chosen=chosen,
        reason="it is the best",
        promise="general text: no worse than the base",
        seconds=1.0,
    )


@pytest.fixture
def run(llama: Domains, tmp_path: Path) -> Path:
    """What a run with a dial leaves behind."""
    directory = run_dir(llama, tmp_path / "run")
    shutil.move(directory / "export", directory / "trained")
    write_turned(directory / "trained", directory / "export", CHOSEN)
    record(CHOSEN).save(directory / "dial.json")
    return directory


def test_a_package_is_what_was_trained_and_recommends_what_the_dial_chose(
    llama: Domains, run: Path, tmp_path: Path
) -> None:
    manifest = pack_copies(run, tmp_path / "d")
    assert manifest.metrics.alphas == list(CHOSEN)
    plain = pack_copies(llama.math, tmp_path / "plain", name="run")
    assert manifest.fingerprint == plain.fingerprint and plain.metrics.alphas == []
    assert (tmp_path / "d" / "delta.safetensors").read_bytes() == (
        tmp_path / "plain" / "delta.safetensors"
    ).read_bytes()


def test_it_is_applied_as_recommended_or_as_asked_for(llama: Domains, run: Path, tmp_path: Path) -> None:
    """As recommended it is the export; with alpha 1 what was trained; with alpha 0 the base's function."""
    pack_copies(run, tmp_path / "d")
    positions: dict[str, Any] = {"recommended": None, "whole": [1.0], "base": [0.0], "own": [0.25, 0.75]}
    for name, alphas in positions.items():
        apply_packages(llama.base, [tmp_path / "d"], tmp_path / name, alphas=alphas)
    for name, wanted in (("recommended", run / "export"), ("whole", run / "trained")):
        found = content(tmp_path / name)
        assert {file for file, of in content(wanted).items() if found[file] != of} <= {"expansion.json"}
    assert torch.equal(logits(load(tmp_path / "base")), logits(load(llama.base)))
    assert [Expansion.read(tmp_path / name).alphas for name in positions] == [CHOSEN, None, (0.0, 0.0), (0.25, 0.75)]
    write_turned(run / "trained", tmp_path / "wanted", [0.25, 0.75])
    own, wanted_tensors = all_tensors(tmp_path / "own"), all_tensors(tmp_path / "wanted")
    assert all(torch.equal(own[name], tensor) for name, tensor in wanted_tensors.items())
    strip_copies(tmp_path / "own", tmp_path / "back")
    assert content(tmp_path / "back") == content(llama.base)


def test_of_several_packages_each_is_as_it_recommends_or_all_as_asked_for(
    llama: Domains, run: Path, tmp_path: Path
) -> None:
    """Copies of layers 1 (math), 1 (law), 3 (math) and 4 (law), lowest first."""
    pack_copies(run, tmp_path / "d", name="math")
    pack_copies(llama.law, tmp_path / "d_law", name="law")
    packages = [tmp_path / "d", tmp_path / "d_law"]
    assert apply_packages(llama.base, packages, tmp_path / "both").alphas == (0.5, 1.0, 1.0, 1.0)
    own = apply_packages(llama.base, packages, tmp_path / "own", alphas=[0.1, 0.2, 0.3, 0.4])
    assert own.alphas == (0.1, 0.2, 0.3, 0.4)
    assert_refused(
        tmp_path,
        ["--alpha: 2 positions for 4 copies"],
        lambda out: apply_packages(llama.base, packages, out, alphas=[0.1, 0.2]),
    )


def test_what_is_turned_down_is_packed_by_nobody(llama: Domains, run: Path, tmp_path: Path) -> None:
    for source in (run / "export", tmp_path / "applied"):
        if source.name == "applied":
            pack_copies(run, tmp_path / "d")
            apply_packages(llama.base, [tmp_path / "d"], source)
        words = [str(source), "is turned down (alpha 0.5, 1)", "--alpha 1"]
        assert_refused(tmp_path, words, lambda out, source=source: pack_copies(source, out))  # type: ignore[misc]
    apply_packages(llama.base, [tmp_path / "d"], tmp_path / "whole", alphas=[1.0])
    pack_copies(tmp_path / "whole", tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / "d"), "the recommendation comes along"


def test_an_export_that_the_dial_has_not_seen_has_no_recommendation(run: Path, tmp_path: Path) -> None:
    """A later one, as it was trained."""
    shutil.rmtree(run / "export")
    shutil.copytree(run / "trained", run / "export")
    assert pack_copies(run, tmp_path / "d").metrics.alphas == []
    record((1.0, 1.0)).save(run / "dial.json")
    assert pack_copies(run, tmp_path / "d1").metrics.alphas == [1.0, 1.0]


def test_a_manifest_recommends_for_every_copy_or_for_none(run: Path, tmp_path: Path) -> None:
    pack_copies(run, tmp_path / "d")

    def shorten(tree: dict[str, Any]) -> None:
        tree["metrics"]["alphas"] = [0.5]

    changed_json(tmp_path / "d" / "delta.json", shorten)
    assert_refused(tmp_path, ["1 positions of the dial for 2 copies"], lambda _: Package.load(tmp_path / "d"))


def test_the_commands_say_at_which_position_it_is(llama: Domains, run: Path, tmp_path: Path) -> None:
    pack_copies(run, tmp_path / "d")
    for arguments, words in (
        ((), "at alpha 0.5, 1 (as recommended; --alpha 1 gives them as they were trained)"),
        (("--alpha", "0.5"), "at alpha 0.5 (as asked for)"),
        (("--alpha", "1"), ""),
    ):
        result = adept(1, "delta", "apply", llama.base, tmp_path / "d", tmp_path / "out", "--overwrite", *arguments)
        assert result.returncode == 0, result.stderr
        assert words in result.stdout and ("at alpha" in result.stdout) == bool(words)
    result = adept(1, "delta", "apply", llama.base, tmp_path / "d", tmp_path / "json", "--alpha", "0.5", "--json")
    assert json.loads(result.stdout)["alphas"] == [0.5, 0.5]
