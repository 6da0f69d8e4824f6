"""Training speed beside a plain PyTorch loop that does the same work, measured in turns in one run.

    python tools/bench_training.py --model demo_data/model

Both train five evenly spaced copies on blocks of 256 tokens, micro-batch 2, four blocks per optimizer step:

    plain     one process, two threads: Hugging Face's forward and loss, backward, fused AdamW
    adept     `adept train` as a user starts it: two ranks of one thread each under ZeRO-3
    gathering the same with train.keep_gathered_gib=0: every frozen weight is gathered before each use, as in ZeRO-3
              without adept-ds

The measurement alternates between them, so that a slow minute of the machine hits all; medians of all steps after
the first two of each turn are compared. Peak memory of a process is reported beside it, and the floor: the speed at
which nothing but the step's matrix products would be done, in two processes of one thread and in one of two (see
`matrix_floor`).
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

from matrix_floor import floor_of

from adept_ds.base.files import read_json, read_json_lines
from adept_ds.base.run_dir import EXPANSION_NAME, RunDirectory

ROOT = Path(__file__).resolve().parent.parent
SEQ_LEN, MICRO_BATCH, GLOBAL_BATCH, WARM_UP = 256, 2, 4, 2


def even_layers(num_layers: int, copies: int) -> list[int]:
    """The top layer of each of `copies` equal parts: 30 layers, 5 copies -> 5, 11, 17, 23, 29."""
    return [num_layers * (part + 1) // copies - 1 for part in range(copies)]


def plain_model(expanded: Path) -> Any:
    """Only copies train."""
    import torch
    from transformers import AutoModelForCausalLM

    copies = {copy["index"] for copy in read_json(expanded / EXPANSION_NAME)["copies"]}
    model: Any = AutoModelForCausalLM.from_pretrained(expanded, dtype=torch.float32)
    model.requires_grad_(False)
    for index in copies:
        model.model.layers[index].requires_grad_(True)
    return model


def run_plain(expanded: Path, steps: int) -> None:
    """The child process of the plain loop: prints a JSON line."""
    import torch

    model = plain_model(expanded)
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


def run_floor(expanded: Path) -> None:
    """The child process of a floor: prints a JSON line."""
    import torch

    model = plain_model(expanded)
    tokens = torch.randint(model.config.vocab_size, (MICRO_BATCH, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    floor = floor_of(lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward())
    sys.stdout.write(json.dumps({"speed": tokens.numel() / floor.seconds, "rate": floor.operations / floor.seconds}))


def start_child(way: str, expanded: Path, steps: int, threads: int) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--child", way, str(expanded), "--steps", str(steps)]
    return subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, stdout=subprocess.PIPE, text=True
    )


def ended(child: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = child.communicate()
    if child.returncode:
        raise SystemExit(child.returncode)
    return dict(json.loads(out.splitlines()[-1]))


def measure_floors(expanded: Path) -> dict[str, float]:
    """Tokens per second of the products alone, of two threads in one process and in two."""
    together = ended(start_child("floor", expanded, 0, threads=2))
    apart = [ended(child) for child in [start_child("floor", expanded, 0, threads=1) for _ in range(2)]]
    for what, rate in (("one process", together["rate"]), ("two processes", sum(child["rate"] for child in apart))):
        print(f"floor, {what}: {rate / 1e9:.0f} GFLOP/s", flush=True)
    return {"together": together["speed"], "apart": sum(child["speed"] for child in apart)}


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
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        way, expanded = arguments.child
        if way == "plain":
            run_plain(Path(expanded), arguments.steps)
        else:
            run_floor(Path(expanded))
        return
    if arguments.model is None:
        parser.error("--model is missing; `make demo` prepares demo_data/model")
    measured: dict[str, list[float]] = {"plain": [], "adept": [], "gathering": []}
    peaks: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        config, run_dir = write_inputs(arguments.model.resolve(), Path(folder), arguments.steps, arguments.deepspeed)
        floors = measure_floors(run_dir.expanded)
        for _ in range(arguments.turns):
            for name in measured:
                if name == "plain":
                    result = ended(start_child("plain", run_dir.expanded, arguments.steps, threads=2))
                else:
                    overrides = ["train.keep_gathered_gib=0"] if name == "gathering" else []
                    result = measure_adept(config, run_dir, *overrides)
                measured[name] += result["speeds"][WARM_UP:]
                peaks[name] = result["peaks"]
                print(f"{name}: " + " ".join(f"{speed:.0f}" for speed in result["speeds"]) + " tokens/s", flush=True)
    medians = {name: statistics.median(speeds) for name, speeds in measured.items()}
    for name, median in medians.items():
        memory = ", ".join(f"{peak / 2**30:.2f}" for peak in peaks[name])
        ratio, floor = median / medians["plain"], floors["together" if name == "plain" else "apart"]
        speed = f"{median:6.1f} tokens/s ({ratio:.2f} x plain, {median / floor:.2f} of the floor's {floor:.0f})"
        print(f"{name:<9} {speed}   peak memory {memory} GiB")


if __name__ == "__main__":
    main()
