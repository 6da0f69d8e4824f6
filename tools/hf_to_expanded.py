"""Insert identity copies of layers into a model, and prove that what was written is the same function.

    python tools/hf_to_expanded.py MODEL OUT --layers 12,17
    python tools/hf_to_expanded.py runs/math OUT               # the model of a run, with the layers that the run copied

Every tensor that was written is read again and compared with what it must be. `adept expand` writes the same bytes;
`adept verify` compares logits too. `tools/expanded_to_hf.py` gives MODEL back.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from conversions import parser_of, run

from adept_ds.base.terminal import Terminal
from adept_ds.cli.model_files import parse_layers


def convert(arguments: argparse.Namespace, terminal: Terminal) -> None:
    from adept_ds.run.conversion import expand_and_verify, find_model

    asked = None if arguments.layers is None else parse_layers(arguments.layers)
    model, layers = find_model(arguments.model, asked)
    with terminal.progress("expanding and comparing") as bar:
        expansion, verified = expand_and_verify(model, arguments.out, layers, bar, overwrite=arguments.overwrite)
    terminal.say(
        f"{expansion.source_layers} + {len(expansion.copies)} layers in {arguments.out}; {verified.tensors} tensors "
        "are what they must be, bit for bit"
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("model", metavar="MODEL", type=Path, help="a Hugging Face directory, or a run")
    parser.add_argument("out", metavar="OUT", type=Path, help="the new directory")
    parser.add_argument("--layers", help="layers to copy, for example 12,17; of a run, by default those that it copied")
    parser.add_argument("--overwrite", action="store_true", help="replace the directory of an earlier expansion")
    run(parser, convert)


if __name__ == "__main__":
    main()
