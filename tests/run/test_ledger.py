"""What a run need not do again, decided by rank 0 for all."""

from __future__ import annotations

import json
import os
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from harness.launching import launch

from adept_ds.base.errors import InputError
from adept_ds.base.files import write_json
from adept_ds.base.outputs import new_output
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.unfinished import Unfinished
from adept_ds.run.ledger import Ledger, Stage


class Made:
    """A stage that copies its input, and counts how often."""

    def __init__(self, folder: Path) -> None:
        self.source, self.output, self.count = folder / "in", folder / "out", 0
        self.source.write_text("a")
        self.said: list[str] = []
        self.ledger = Ledger(
            folder / "stages.json", Ranks(), say=lambda stage, line: self.said.append(f"{stage} {line}")
        )
        self.stage = Stage("copy", self.output, lambda: {"text": self.source.read_text(), "sizes": (1, 2)})

    def make(self) -> None:
        self.count += 1
        self.output.write_text(self.source.read_text())

    def once(self) -> bool:
        return self.ledger.once(self.stage, lambda _: self.make())


def test_a_stage_is_made_once_while_its_inputs_and_its_output_are_the_same(tmp_path: Path) -> None:
    made = Made(tmp_path)
    assert [made.once(), made.once()] == [True, False]
    made.source.write_text("b")
    assert [made.once(), made.once()] == [True, False]
    made.output.unlink()
    assert [made.once(), made.once(), made.count] == [True, False, 3]


def test_stages_do_not_disturb_each_other(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.once()
    other = Stage("other", made.output, lambda: 1)
    assert made.ledger.once(other, lambda _: None)
    assert not made.once()
    digests = {"out": sha256(b"a").hexdigest()}
    assert json.loads((tmp_path / "stages.json").read_text()) == {
        "copy": {"made_of": {"text": "a", "sizes": [1, 2]}, "sha256": digests},
        "other": {"made_of": 1, "sha256": digests},
    }


def test_an_output_that_was_changed_is_made_again_with_a_line(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.once()
    made.output.write_text("b")
    assert [made.once(), made.once()] == [True, False]
    (line,) = made.said
    assert line.startswith("copy '") and line.endswith(
        "out' is not as it was written (its SHA-256 is another): made again"
    )
    assert made.output.read_text() == "a"


def test_a_directory_says_itself_whether_it_was_changed(tmp_path: Path) -> None:
    made = Made(tmp_path)
    out, count = tmp_path / "model", 0

    def make(_: Unfinished) -> None:
        nonlocal count
        count += 1
        with new_output(out, "export", overwrite=True) as folder:
            (folder / "weights").write_text("1")

    stage = Stage("export", out, lambda: 1)
    assert [made.ledger.once(stage, make) for _ in range(2)] == [True, False]
    times = (out / "weights").stat()
    (out / "weights").write_text("2")
    os.utime(out / "weights", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert [made.ledger.once(stage, make) for _ in range(2)] == [True, False]
    assert "weights' is not as it was written" in made.said[0] and count == 2


def test_a_stage_that_an_older_program_recorded_is_known_by_its_inputs(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.output.write_text("of then")
    write_json(tmp_path / "stages.json", {"copy": {"text": "a", "sizes": [1, 2]}})
    assert not made.once()


def test_what_fails_is_not_recorded(tmp_path: Path) -> None:
    made = Made(tmp_path)

    def fail(_: Unfinished) -> None:
        made.output.write_text("half")
        raise InputError("no")

    with pytest.raises(InputError):
        made.ledger.once(made.stage, fail)
    assert made.once()


def test_inputs_that_change_while_a_stage_runs_make_it_run_again(tmp_path: Path) -> None:
    """What is recorded are the inputs that were looked at before."""
    made = Made(tmp_path)

    def make_slowly(_: Unfinished) -> None:
        made.make()
        made.source.write_text("changed meanwhile")

    made.ledger.once(made.stage, make_slowly)
    assert made.once()


@pytest.mark.parametrize(
    "damage",
    ["", "[]", "[1, 2]", '[["copy", 1]]', '{"copy": ', "nonsense", '{"copy": NaN}', "[" * 100_000, "\xff", "\ufeff{}"],
)
def test_a_damaged_record_is_put_aside_with_a_line_and_stages_are_done_again(tmp_path: Path, damage: str) -> None:
    made = Made(tmp_path)
    (tmp_path / "stages.json").write_text(damage, encoding="utf-16" if damage == "\xff" else "utf-8")
    before = (tmp_path / "stages.json").read_bytes()
    assert [made.once(), made.once()] == [True, False]
    (line,) = made.said
    assert re.fullmatch(
        r"stages '.*stages\.json' is damaged \(.*\): kept as 'stages\.json\.damaged1'; .*, once more", line
    )
    assert line.isprintable()
    assert (tmp_path / "stages.json.damaged1").read_bytes() == before


LAGGING = """
import os, sys
from pathlib import Path
from adept_ds.ranks.groups import join, leave
from adept_ds.ranks.launchers import rank_from_environment
from adept_ds.run.ledger import Ledger, Stage

ranks = join(rank_from_environment(os.environ))
folder = Path(sys.argv[1]) if ranks.is_main else Path("/nowhere")  # as a network file system that lags shows it

def look():
    assert ranks.is_main, "another rank looks at the disk"
    return (folder / "in").read_text()

ledger = Ledger(folder / "stages.json", ranks)
stage = Stage("copy", folder / "out", look)
made = []
for _ in range(2):
    made.append(ledger.once(stage, lambda _: ranks.on_main(lambda: (folder / "out").write_text("x"))))
print(ranks.gather(made))
leave()
"""


def test_rank_0_alone_looks_at_the_disk_and_decides_for_all(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("a")
    result = launch(2, ["-c", LAGGING, str(tmp_path)], timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str([[True, False]] * 2)


def test_the_record_holds_what_json_holds(tmp_path: Path) -> None:
    """Tuples and integer keys come back as they are compared."""
    ledger, values = Ledger(tmp_path / "stages.json", Ranks()), dict[Any, Any]({1: (2, 3)})
    (tmp_path / "out").write_text("x")
    stage = Stage("s", tmp_path / "out", lambda: values)
    assert [ledger.once(stage, lambda _: None) for _ in range(2)] == [True, False]
