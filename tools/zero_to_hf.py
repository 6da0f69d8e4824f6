"""Make a Hugging Face directory of a training checkpoint, of any ZeRO stage and any number of ranks, by streaming.

    python tools/zero_to_hf.py runs/math OUT                                  # a run: what it exports itself, its base
    python tools/zero_to_hf.py runs/math OUT --step 100
    python tools/zero_to_hf.py some/output/global_step100 OUT --base MODEL    # what DeepSpeed wrote by itself
    python tools/zero_to_hf.py some/output trained.safetensors --tensors-only

CHECKPOINT is a run directory, a checkpoint's directory, or the directory above it with its `latest` file. A checkpoint
holds trained tensors, and frozen ones only if it was saved with them; without a configuration and a tokenizer it is no
model. `--base`, the model that training started from, is joined to it; a run knows it. What its methods learned
otherwise than in place (adapters, consolidated units) is merged into it. No accelerator is needed, nor a launcher.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from conversions import parser_of, run

from adept_ds.base.errors import InputError
from adept_ds.base.outputs import check_output
from adept_ds.base.terminal import Terminal
from adept_ds.models.directory import check_model_dir


def convert(arguments: argparse.Namespace, terminal: Terminal) -> None:
    out, base, overwrite = arguments.out, arguments.base, arguments.overwrite
    if arguments.tensors_only and (base is not None or overwrite):
        raise InputError("--tensors-only writes a new file, of the checkpoint alone; leave --base and --overwrite out")
    if base is not None:
        check_model_dir("--base", base)
        check_output(out, "export", {"CHECKPOINT": arguments.checkpoint, "--base": base}, overwrite=overwrite)
    from adept_ds.run.conversion import find_checkpoint
    from adept_ds.run.export import export_learned
    from adept_ds.weights.export import write_tensors_alone

    found = find_checkpoint(arguments.checkpoint, arguments.step)
    if arguments.tensors_only:
        with terminal.progress("reading") as bar:
            count = write_tensors_alone(found.directory, out, bar)
        terminal.say(f"{count} tensors of {found.directory} in {out}, which are no model by themselves")
        return
    start = base or found.start()
    with terminal.progress("exporting") as bar:
        trained = export_learned(start, found.directory, out, arguments.dtype, bar, overwrite=overwrite)
    terminal.say(f"{trained} trained tensors of {found.directory}, joined to {start}; model in {out}")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a run, or a DeepSpeed checkpoint")
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="the new directory; with --tensors-only a new .safetensors file"
    )
    parser.add_argument("--base", type=Path, help="the model that training started from: expanded, or the base")
    parser.add_argument(
        "--step",
        type=int,
        help="of a run's checkpoint; by default the newest, or the best where the guard has ended training",
    )
    parser.add_argument("--dtype", choices=["source", "float32", "bfloat16"], default="source")
    parser.add_argument("--tensors-only", action="store_true", help="what the checkpoint holds, as one file")
    parser.add_argument("--overwrite", action="store_true", help="replace the directory of an earlier export")
    run(parser, convert)


if __name__ == "__main__":
    main()
