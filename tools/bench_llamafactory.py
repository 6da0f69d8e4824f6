"""Training speed beside LLaMA-Factory at the same work, measured in turns in one run.

    python3.11 -m venv llamafactory
    llamafactory/bin/pip install torch==2.13.0 llamafactory==0.9.5 deepspeed==0.19.8
    python tools/bench_llamafactory.py --model demo_data/model --python llamafactory/bin/python

LLaMA-Factory has an environment of its own, because it asks for other versions of transformers and datasets. It also
installs torchvision and torchaudio; where these do not fit torch, uninstall them, and put an empty package in
torchaudio's place, which is imported and, for text, not used.

Both start from the same expanded model (`adept expand`, five even copies: LLaMA-Pro's places) and train its copies
alone, on two ranks of one thread each under the same DeepSpeed configuration, in fp32, on packed blocks of 256 tokens,
micro-batch 2, one micro-batch a step, with AdamW, and without recomputing activations, which LLaMA-Factory does by
default. The median of all steps is compared, without the first two of each turn.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from bench_training import GLOBAL_BATCH, MICRO_BATCH, ROOT, SEQ_LEN, WARM_UP, measure_adept, write_inputs

from adept_ds.base.files import write_json
from adept_ds.config.deepspeed import read_deepspeed_config

RANKS, COPIES = 2, 5


def write_rival_config(folder: Path, expanded: Path, corpus: Path, deepspeed: dict[str, Any], steps: int) -> Path:
    """What `llamafactory-cli train` reads: continual pretraining of the same layers."""
    write_json(folder / "dataset_info.json", {"text": {"file_name": str(corpus), "columns": {"prompt": "text"}}})
    write_json(folder / "deepspeed.json", deepspeed | {
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto", "zero_allow_untested_optimizer": True,
    })  # fmt: skip
    tree = {
        "model_name_or_path": str(expanded),
        "stage": "pt",
        "do_train": True,
        "finetuning_type": "freeze",
        "freeze_trainable_layers": COPIES,
        "use_llama_pro": True,
        "dataset": "text",
        "dataset_dir": str(folder),
        "cutoff_len": SEQ_LEN,
        "packing": True,
        "output_dir": str(folder / "rival"),
        "overwrite_output_dir": True,
        "per_device_train_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": GLOBAL_BATCH // (MICRO_BATCH * RANKS),
        "max_steps": steps,
        "learning_rate": 1e-4,
        "disable_gradient_checkpointing": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "deepspeed": str(folder / "deepspeed.json"),
    }
    config = folder / "rival.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return config


def measure_rival(python: Path, config: Path) -> list[float]:
    """Tokens per second of every step, by the time between the lines that rank 0 prints for two steps."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(RANKS), "DISABLE_VERSION_CHECK": "1",
        "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    command = [str(python.parent / "llamafactory-cli"), "train", str(config)]
    times, lines = [], []
    with subprocess.Popen(
        command, env=environment, cwd=config.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            lines.append(line)
            if "'loss'" in line:
                times.append(time.perf_counter())
    if child.returncode or len(times) < WARM_UP:
        raise SystemExit("LLaMA-Factory failed:\n" + "".join(lines[-120:]))
    print(
        "LLaMA-Factory: "
        + next(line[line.index("trainable") :].strip() for line in lines if "trainable params:" in line)
    )
    return [GLOBAL_BATCH * SEQ_LEN / (after - before) for before, after in itertools.pairwise(times)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory, for example demo_data/model")
    parser.add_argument("--python", type=Path, required=True, help="of the environment that has LLaMA-Factory")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of a turn, two of them warm-up")
    parser.add_argument("--turns", type=int, default=3, help="how often each is measured")
    parser.add_argument("--deepspeed", default="ds_configs/zero3.json")
    arguments = parser.parse_args()
    measured: dict[str, list[float]] = {"LLaMA-Factory": [], "adept-ds": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config, run_dir = write_inputs(arguments.model.resolve(), folder, arguments.steps, arguments.deepspeed)
        deepspeed = read_deepspeed_config(ROOT / arguments.deepspeed)
        rival = write_rival_config(folder, run_dir.expanded, folder / "text.jsonl", deepspeed, arguments.steps)
        for _ in range(arguments.turns):
            for who in measured:
                if who == "adept-ds":
                    speeds = measure_adept(config, run_dir)["speeds"]
                else:
                    speeds = measure_rival(arguments.python.absolute(), rival)
                measured[who] += speeds[WARM_UP:]
                print(f"{who}: " + " ".join(f"{speed:.0f}" for speed in speeds) + " tokens/s", flush=True)
    medians = {who: statistics.median(speeds) for who, speeds in measured.items()}
    for who, median in medians.items():
        print(f"{who:<13} {median:6.1f} tokens/s ({median / medians['LLaMA-Factory']:.2f} x)")


if __name__ == "__main__":
    main()
