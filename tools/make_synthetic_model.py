"""Write a model of random weights, of any supported family and size, with a tokenizer of bytes.

    python tools/make_synthetic_model.py OUT --family llama --parameters 100M
    python tools/make_synthetic_model.py OUT --family qwen3_moe --parameters 70B --shard-gib 4      # larger than memory
    python tools/make_synthetic_model.py OUT --family gemma2 --parameters 1M --set sliding_window=16 --seed 7

For tests and measurements at sizes for which there is no download. Width and depth follow from the number of
parameters; `--set` changes any key of the configuration. The same seed gives the same tensors, however they fall on
files. Numbers are made as they are written: next to no memory is needed.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from conversions import parser_of, run

from adept_ds.base.errors import InputError
from adept_ds.base.terminal import Terminal
from adept_ds.config.yaml_text import YamlMistakeError, read_yaml

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def make(arguments: argparse.Namespace, terminal: Terminal) -> None:
    from adept_ds.weights.synthetic import Synthetic, write_synthetic

    model = Synthetic(
        family=arguments.family,
        parameters=_parse_count(arguments.parameters),
        vocabulary=arguments.vocabulary,
        options=dict(map(_parse_option, arguments.set)),
        seed=arguments.seed,
        dtype=arguments.dtype,
        shard_bytes=_parse_gib(arguments.shard_gib),
    )
    with terminal.progress("writing") as bar:
        count = write_synthetic(model, arguments.out, bar, overwrite=arguments.overwrite)
    terminal.say(f"{arguments.family} of {count:,} parameters in {arguments.out}")


def _parse_count(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text)
    if match is None:
        raise InputError(f"--parameters: '{text}' is no number; write for example 135M, 1.1B or 500000")
    return int(float(match[1]) * _UNITS[match[2]])


def _parse_gib(gib: float) -> int:
    if not 0 < gib < 1 << 20:
        raise InputError(f"--shard-gib: {gib} is no size of a file; write for example 4 or 0.5")
    return int(gib * 2**30)


def _parse_option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    try:
        if equals and key:
            return key, read_yaml(value)
    except YamlMistakeError:
        pass
    raise InputError(f"--set: '{text}' is no KEY=VALUE; write for example --set hidden_size=256")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("out", metavar="OUT", type=Path, help="the new directory")
    parser.add_argument("--family", default="llama", help="model_type of config.json")
    parser.add_argument("--parameters", default="1M", help="about so many: 500K, 135M, 1.1B")
    parser.add_argument("--vocabulary", type=int, default=512, help="rows of the embedding")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="a key of config.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", help="float32, bfloat16 or float16")
    parser.add_argument("--shard-gib", type=float, default=4.0, help="largest size of a weight file")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier synthetic model")
    run(parser, make)


if __name__ == "__main__":
    main()
