"""Convert a training checkpoint to a Hugging Face directory, or to one safetensors file of trained tensors.

    python tools/checkpoint_to_hf.py runs/math/checkpoints/step_100 OUT --base runs/math/expanded
    python tools/checkpoint_to_hf.py some/deepspeed_output trained.safetensors

The first form is `adept export` on plain directories. The second reads any raw ZeRO checkpoint that DeepSpeed wrote
(a tag, or the directory above it with its `latest` file), with or without frozen parameters, and needs no base.
Neither needs an accelerator, a launcher, or the number of ranks that wrote the checkpoint.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from adept_ds.base.errors import EXIT_BAD_INPUT, InputError
from adept_ds.base.files import sync
from adept_ds.base.outputs import check_new_file
from adept_ds.run.export import export_learned
from adept_ds.weights.export import read_zero_checkpoint


def convert(checkpoint: Path, out: Path, base: Path | None, dtype: str, *, overwrite: bool = False) -> str:
    """Write `out`; returns a sentence about it.

    Args:
        overwrite: an earlier export in its place may be replaced; a file never is.

    Raises:
        InputError: input that cannot be converted, or an output that holds something else.
    """
    if not checkpoint.is_dir():
        raise InputError(f"'{checkpoint}' does not exist; give a checkpoint directory such as run/checkpoints/step_100")
    if base is not None:
        trained = export_learned(base, checkpoint, out, dtype, overwrite=overwrite)
        return f"{trained} trained tensors; model in {out}"
    if out.suffix != ".safetensors":
        raise InputError(f"'{out}' is no .safetensors file; name one, or give --base for a Hugging Face directory")
    check_new_file(out)
    # Tied parameters share memory, which safetensors refuses.
    tensors = {name: tensor.clone().contiguous() for name, tensor in read_zero_checkpoint(checkpoint).items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        temporary = Path(folder) / out.name
        save_file(tensors, temporary, metadata={"format": "pt"})
        sync(temporary)
        temporary.replace(out)
    sync(out.parent)
    return f"{len(tensors)} tensors in {out}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a DeepSpeed checkpoint: its tag, or the directory above it")
    parser.add_argument("out", type=Path, help="Hugging Face directory (with --base), or a .safetensors file")
    parser.add_argument("--base", type=Path, help="the model that training started from: expanded, or the base")
    parser.add_argument("--dtype", choices=["source", "float32", "bfloat16"], default="source")
    parser.add_argument("--overwrite", action="store_true", help="replace the directory of an earlier export")
    arguments = parser.parse_args()
    try:
        said = convert(
            arguments.checkpoint, arguments.out, arguments.base, arguments.dtype, overwrite=arguments.overwrite
        )
        print(said)
    except InputError as error:
        print(f"checkpoint_to_hf: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    main()
