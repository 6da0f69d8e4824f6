"""Give the base back out of a model with copies of layers: the same files, byte for byte.

    python tools/expanded_to_hf.py runs/math/expanded OUT
    python tools/expanded_to_hf.py ADAPTED OUT --base MODEL    # make sure that it is this very model
    python tools/expanded_to_hf.py runs/math OUT               # out of what a run exported

Training never moves the base, so it can be taken out of an expanded model and of an adapted one alike. What is read is
held against its proofs first, the base's tensors against the fingerprint that expanding recorded, and what was written
is read again. The copies themselves are what `adept delta pack` keeps; with them in it, an expanded model is a Hugging
Face directory already.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from conversions import parser_of, run

from adept_ds.base.terminal import Terminal


def convert(arguments: argparse.Namespace, terminal: Terminal) -> None:
    from adept_ds.run.conversion import give_base_back, model_in

    adapted = model_in(arguments.adapted)
    with terminal.progress("removing copies") as bar:
        given = give_base_back(adapted, arguments.out, bar, base=arguments.base, overwrite=arguments.overwrite)
    proofs = " and ".join(given.proved_by) or "nothing: an older program wrote it without"
    terminal.say(f"base of {adapted} in {arguments.out}, without copies of layers {given.copies}")
    terminal.say(f"fingerprint {given.fingerprint}, known by {proofs}")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("adapted", metavar="ADAPTED", type=Path, help="an expanded or adapted model, or a run")
    parser.add_argument("out", metavar="OUT", type=Path, help="the new directory")
    parser.add_argument("--base", type=Path, help="the model that it must be")
    parser.add_argument("--overwrite", action="store_true", help="replace the directory of an earlier removal")
    run(parser, convert)


if __name__ == "__main__":
    main()
