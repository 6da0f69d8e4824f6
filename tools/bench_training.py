"""Training speed beside a plain PyTorch loop that does the same work, measured in turns in one run.

    python tools/bench_training.py --model demo_data/model

Both train five evenly spaced copies on blocks of 256 tokens, micro-batch 2, four blocks per optimizer step:

    plain     one process, two threads: Hugging Face's forward and loss, backward, fused AdamW
    adept     `adept train` as a user starts it: two ranks of one thread each under ZeRO-3
    gathering the same with train.keep_gathered_gib=0: every frozen weight is gathered before each use, as in ZeRO-3
              without adept-ds

The measurement alternates between them, so that a slow minute of the machine hits all; medians of all steps after
the first two of each turn are compared. Peak memory of a process is reported beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from adept_ds.base.files import read_json, read_json_lines
from adept_ds.base.run_dir import EXPANSION_NAME, RunDirectory

ROOT = Path(__file__).resolve().parent.parent
SEQ_LEN, MICRO_BATCH, GLOBAL_BATCH, WARM_UP = 256, 2, 4, 2


def even_layers(num_layers: int, copies: int) -> list[int]:
    """The top layer of each of `copies` equal parts: 30 layers, 5 copies -> 5, 11, 17, 23, 29."""
    return [num_layers * (part + 1) // copies - 1 for part in range(copies)]


def run_plain(expanded: Path, steps: int) -> None:
    """The child process of the plain loop: prints a JSON line."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    copies = {copy["index"] for copy in read_json(expanded / EXPANSION_NAME)["copies"]}
    model: Any = AutoModelForCausalLM.from_pretrained(expanded, dtype=torch.float32)
    model.requires_grad_(False)
    for index in copies:
        model.model.layers[index].requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    tokens = torch.randint(
        0, model.config.vocab_size, (GLOBAL_BATCH, SEQ_LEN), generator=torch.Generator().manual_seed(0)
    )
    speeds = []
    for _ in range(steps):
        start = time.perf_counter()
        for batch in tokens.split(MICRO_BATCH):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            (loss * len(batch) / GLOBAL_BATCH).backward()
        optimizer.step()
        optimizer.zero_grad()
        speeds.append(tokens.numel() / (time.perf_counter() - start))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.stdout.write(json.dumps({"speeds": speeds, "peaks": [peak]}) + "\n")


def measure_plain(expanded: Path, steps: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--plain-child", str(expanded), "--steps", str(steps)]
    result = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True, check=True
    )
    return dict(json.loads(result.stdout.splitlines()[-1]))


def measure_adept(config: Path, run_dir: RunDirectory, *overrides: str) -> dict[str, Any]:
    """`adept train` on two ranks, from the start each time."""
    shutil.rmtree(run_dir.checkpoints, ignore_errors=True)
    for file in (run_dir.metrics, run_dir.summary):
        file.unlink(missing_ok=True)
    environment = os.environ | {"ADEPT_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [str(ROOT / "launch/local.sh"), "2", "train", str(config), *overrides], env=environment, check=True, cwd=ROOT
    )
    records = read_json_lines(run_dir.metrics)
    speeds = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    return {"speeds": speeds, "peaks": read_json(run_dir.summary)["peak_memory_bytes"]}


def write_inputs(model: Path, folder: Path, steps: int, deepspeed: str) -> tuple[Path, RunDirectory]:
    """The configuration of the measured run and its directory, with the expanded model in it."""
    import yaml

    corpus, run_dir = folder / "text.jsonl", RunDirectory(folder / "run")
    text = " ".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "adept_ds").rglob("*.py")))
    corpus.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    num_layers = read_json(model / "config.json")["num_hidden_layers"]
    tree = {
        "model": str(model),
        "run_dir": str(run_dir.root),
        "deepspeed": deepspeed,
        "data": {"seq_len": SEQ_LEN, "domain": [str(corpus)]},
        "probe": {"corpus": [str(corpus)]},
        "expand": {"layers": even_layers(num_layers, 5)},
        "importance": {"initial": "ones"},
        "train": {"steps": steps, "global_batch_size": GLOBAL_BATCH, "micro_batch_size": MICRO_BATCH},
    }
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "adept_ds", "expand", str(config)], check=True, cwd=ROOT)
    return config, run_dir


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="Hugging Face directory, for example demo_data/model")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of a turn, two of them warm-up")
    parser.add_argument("--turns", type=int, default=2, help="how often each is measured")
    parser.add_argument("--deepspeed", default="ds_configs/zero3.json")
    parser.add_argument("--plain-child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain_child:
        run_plain(arguments.plain_child, arguments.steps)
        return
    if arguments.model is None:
        parser.error("--model is missing; `make demo` prepares demo_data/model")
    measured: dict[str, list[float]] = {"plain": [], "adept": [], "gathering": []}
    peaks: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        config, run_dir = write_inputs(arguments.model.resolve(), Path(folder), arguments.steps, arguments.deepspeed)
        for _ in range(arguments.turns):
            for name in measured:
                if name == "plain":
                    result = measure_plain(run_dir.expanded, arguments.steps)
                else:
                    overrides = ["train.keep_gathered_gib=0"] if name == "gathering" else []
                    result = measure_adept(config, run_dir, *overrides)
                measured[name] += result["speeds"][WARM_UP:]
                peaks[name] = result["peaks"]
                print(f"{name}: " + " ".join(f"{speed:.0f}" for speed in result["speeds"]) + " tokens/s", flush=True)
    medians = {name: statistics.median(speeds) for name, speeds in measured.items()}
    for name, median in medians.items():
        memory = ", ".join(f"{peak / 2**30:.2f}" for peak in peaks[name])
        ratio = median / medians["plain"]
        print(f"{name:<9} {median:6.1f} tokens/s ({ratio:.2f} x plain)   peak memory {memory} GiB")


if __name__ == "__main__":
    main()
