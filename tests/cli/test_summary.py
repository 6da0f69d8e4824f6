"""What a run shows at its end, of whatever it knows of itself."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from harness.made_up_run import make_run

from adept_ds.base.errors import InputError
from adept_ds.base.run_dir import RunDirectory
from adept_ds.base.terminal import Terminal
from adept_ds.cli.summary import print_summary

WHOLE: dict[str, Any] = {
    "trainable_parameters": 10_000_000,
    "total_parameters": 40_000_000,
    "world_size": 2,
    "tokens": 20_000,
    "seconds": 124.4,
    "tokens_per_second": 171.6,
    "peak_memory_bytes": [3 << 30, 2 << 30],
}
LINES = {
    "trainable": "10.0 M of 40.0 M parameters (25.0%)",
    "speed": "172 tokens/s on 2 ranks, 20 k tokens in 124 s",
    "peak memory": "3.00 GiB, 2.00 GiB per rank",
}


def shown(run_dir: Path, summary: object) -> str:
    (run_dir / "summary.json").write_text(json.dumps(summary))
    out = io.StringIO()
    print_summary(RunDirectory(run_dir), Terminal(out))
    return out.getvalue()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path / "[bold]run[/]")


def test_a_whole_run_is_summed_up(run_dir: Path) -> None:
    text = shown(run_dir, WHOLE)
    for name, line in LINES.items():
        assert f"{name} " in text and line in text, text
    assert "12, 17, 20, 21 (of 30)" in text
    assert "general (8192 tokens)" in text
    assert "[bold]run[/]" in text.replace("\n", ""), "a path is no markup"


@pytest.mark.parametrize("missing", [*WHOLE, None], ids=str)
def test_what_it_does_not_know_is_left_out(run_dir: Path, missing: str | None) -> None:
    text = shown(run_dir, {key: value for key, value in WHOLE.items() if missing not in (key, None)})
    assert "layers copied" in text and "report.html" in text.replace("\n", "")
    assert "None" not in text


@pytest.mark.parametrize(
    "damaged", [[], 3, WHOLE | {"tokens": "many"}, WHOLE | {"seconds": -1}], ids=["list", "number", "text", "less"]
)
def test_a_damaged_summary_is_named(run_dir: Path, damaged: object) -> None:
    with pytest.raises(InputError, match=r"summary\.json' is damaged .*move it away; only this overview is lost"):
        shown(run_dir, damaged)
