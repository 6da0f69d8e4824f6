"""The scaling study of docs/scaling.md says what the planner says today."""

from __future__ import annotations

import pytest
from harness.launching import ROOT
from plot_scaling import FIXED_BATCH, MODELS, ROWS_EACH, SIZES, cluster_of, points, table, task_of

from adept_ds.models import head_chunks
from adept_ds.planning import candidates


@pytest.mark.parametrize("name", MODELS)
def test_its_tables_are_those_that_the_planner_gives(name: str) -> None:
    """Line by line; after a change of the planner, `python tools/plot_scaling.py docs/scaling` makes them anew."""
    written = (ROOT / "docs" / "scaling" / "tables.md").read_text(encoding="utf-8")
    task = task_of(MODELS[name])
    assert "\n".join(table(name, points(task, lambda gpus: ROWS_EACH * gpus))) in written


def test_a_fixed_batch_ends_where_gpus_have_no_sequence() -> None:
    found = points(task_of(MODELS["Qwen3-8B"]), lambda gpus: FIXED_BATCH)
    assert [point.gpus for point in found] == [size for size in SIZES if size <= FIXED_BATCH]
    assert cluster_of(8).bandwidth == 450e9
    assert cluster_of(16).bandwidth == 400e9


def test_a_chunk_of_logits_has_the_share_of_memory_that_the_head_gives_it() -> None:
    assert candidates._LOGITS_SHARE == head_chunks._SHARE
