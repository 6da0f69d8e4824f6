"""A run whose disk is full in the middle of a checkpoint, on real ranks, and what it needs to go on."""

from __future__ import annotations

import re
from pathlib import Path

from harness.launching import adept, start
from harness.small_disk import small_disk
from harness.workspace import Workspace

from adept_ds.base.files import read_json_lines
from adept_ds.base.run_dir import RunDirectory, checkpoint_steps

PROGRAM = """
import sys
from pathlib import Path
from adept_ds.cli.app import main
from adept_ds.training import trainer

whole_save, ballast = trainer.Trainer._save, Path(sys.argv.pop(1))

def filled(training, step):
    if step == 4 and training.ranks.is_main:
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                file.truncate(file.tell() - 5 * 4096)  # some files of it can be written
    training.ranks.barrier()
    whole_save(training, step)

trainer.Trainer._save = filled
main()
"""


def test_it_ends_in_one_line_and_goes_on_when_there_is_room(workspace: Workspace, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 32 << 20) as small:
        run, ballast = RunDirectory(small.folder / "run"), small.folder / "ballast"
        config = workspace.config(
            run.root,
            expand={"k": None, "layers": [1]},
            train={"steps": 6, "checkpoint_every": 2, "eval_every": 0},
            importance={"initial": "ones", "every": 100},
        )
        processes = start(2, ["-c", PROGRAM, str(ballast), "run", str(config)])
        try:
            said = [process.communicate(timeout=240)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [4, 4], said
        (line,) = "".join(said).splitlines()
        assert re.fullmatch(
            f"adept: no space left on '{run.root}/.+'; make room there, and run the same command again", line
        ), line
        assert checkpoint_steps(run.checkpoints) == [2]
        assert (run.checkpoints / "latest").read_text() == "step_2"
        assert not [path for path in run.root.rglob("*") if re.search(r"\.(tmp|lock)$", path.name)]

        ballast.unlink()
        again = adept(2, "run", config)
        assert again.returncode == 0, again.stderr
        assert "resuming after step 2" in again.stdout
        assert [record["step"] for record in read_json_lines(run.metrics) if "loss" in record] == [1, 2, 3, 4, 5, 6]
        assert (run.export / "config.json").is_file()
