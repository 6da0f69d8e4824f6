"""README, CONTRIBUTING and docs say what is so: their commands are taken, their files exist, their example runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from harness.launching import ROOT
from harness.models import save_tiny_model
from harness.workspace import write_corpus

from adept_ds.cli.app import app

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PREFIXES = ("", "launch/local.sh 8 ", "launch/multinode.sh hostfile ", "deepspeed --module adept_ds ")


def documented_commands() -> Iterator[tuple[str, str]]:
    """(page, `adept ...`) of every line of a code block, and of every piece of code in a text, that starts so."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        blocks = re.findall(r"```.*?\n(.*?)```", text, flags=re.DOTALL)
        indented = re.findall(r"^ {4}(adept .*)$", text, flags=re.MULTILINE)
        inline = re.findall(r"`(adept [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for line in [*"\n".join(blocks).splitlines(), *indented, *inline]:
            if line.startswith("adept ") and "=" * 3 not in line:
                yield page.name, line


def test_every_documented_command_is_one_that_the_program_takes() -> None:
    """Its name and its options, as the command line itself reads them; values are not looked at."""
    group, seen = typer.main.get_command(app), 0
    for page, line in documented_commands():
        words = shlex.split(line, comments=True)[1:]
        command, names = group, []
        while words and words[0] in getattr(command, "commands", {}):
            names.append(words.pop(0))
            command = command.commands[names[-1]]  # type: ignore[attr-defined]
        assert names, f"{page}: '{line}' names no command"
        flags = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for word in words:
            if word.startswith("-"):
                assert word.partition("=")[0] in flags | {"--help", "-h"}, (
                    f"{page}: '{line}' has an unknown option {word}"
                )
        seen += 1
    assert seen > 20, "the pages hold many commands; if none is found, they are looked for in a wrong way"


def test_every_file_that_the_documentation_names_exists() -> None:
    """Paths below the repository or below adept_ds, and links."""
    pattern = r"`((?:adept_ds|tests|tools|docs|launch|ds_configs)/[\w./]+|\w+(?:/\w+)*/\w+\.py)"
    found = [(page.name, path) for page in PAGES for path in re.findall(pattern, page.read_text(encoding="utf-8"))]
    links = [
        (page.name, str((page.parent / target).resolve().relative_to(ROOT)))
        for page in PAGES
        for target in re.findall(r"\]\(([\w./]+)\)", page.read_text(encoding="utf-8"))
    ]
    assert len(found) > 10
    assert len(links) > 10
    places = (ROOT, ROOT / "adept_ds")
    missing = [(page, path) for page, path in found + links if not any((place / path).exists() for place in places)]
    assert missing == []


@pytest.fixture
def users_folder(tmp_path: Path) -> Path:
    """What the example of the README supposes: a model, and text."""
    save_tiny_model(tmp_path / "path" / "to" / "hf_model", num_hidden_layers=10)
    for seed, name in enumerate(("domain", "domain_heldout", "general", "general_heldout")):
        write_corpus(tmp_path / f"{name}.jsonl", seed, documents=300)
    for name in ("launch", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_the_readmes_own_example_runs(users_folder: Path) -> None:
    """Its configuration as it stands, and its commands; a thousand steps of 64 sequences become two of four."""
    (block,) = re.findall(
        r"```\n(pip install -e .*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    writes_config = block[block.index("cat > math.yaml") : block.index("\nEOF\n") + len("\nEOF\n")]
    small = "data.seq_len=32 train.steps=2 train.global_batch_size=4 train.micro_batch_size=2"
    small += " eval.diagnose=never data.eval_sequences=48 anchor.sequences=8 dial.per_copy=false"
    commands = [line for line in block.splitlines() if re.match(r"(adept|launch/local\.sh) ", line)]
    assert [command.split()[:2] for command in commands] == [
        ["adept", "show"],
        ["launch/local.sh", "8"],
        ["adept", "run"],
    ]
    show, local, run = (command.partition("#")[0].strip() for command in commands)
    script = [
        "set -eu",
        writes_config,
        show,
        f"{local.replace('local.sh 8', 'local.sh 2')} {small} run_dir=runs/two",
        f"{run} {small}",
    ]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "ADEPT_PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    result = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=users_folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "# 3. train to step 1000" in result.stdout, "what show says of the configuration as it stands"
    for name in ("two", "math"):
        assert (users_folder / "runs" / name / "report.html").is_file()
        assert (users_folder / "runs" / name / "export" / "model.safetensors").is_file()
