"""Keys of DeepSpeed's file: the known ones are those that DeepSpeed reads, and all others are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.launching import ROOT

from adept_ds.base.errors import InputError
from adept_ds.config.deepspeed import UNSUPPORTED, check_deepspeed_file
from adept_ds.config.deepspeed_keys import SECTIONS, Keys


def _check(tmp_path: Path, text: str) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(text)
    return check_deepspeed_file(path)


def _dotted(keys: Keys, prefix: str = "") -> Iterator[str]:
    for key, inner in keys.items():
        yield f"{prefix}{key}"
        if isinstance(inner, dict):
            yield from _dotted(inner, f"{prefix}{key}.")


@pytest.fixture(scope="module")
def sources() -> str:
    import deepspeed

    return "\n".join(path.read_text() for path in Path(deepspeed.__file__).parent.glob("**/*.py"))


@pytest.mark.parametrize("key", _dotted(SECTIONS))
def test_every_known_key_is_one_that_deepspeed_reads(key: str, sources: str) -> None:
    assert re.search(rf"""["']{key.rpartition(".")[2]}["']""", sources)


def test_every_key_at_the_top_that_deepspeed_reads_is_known() -> None:
    """Its configuration is made of getters; what they look up are constants, or written out."""
    from deepspeed.runtime import config
    from deepspeed.runtime.config import DeepSpeedConfig

    text = Path(config.__file__).read_text()
    constants = re.findall(r"get_scalar_param\(param_dict, ([A-Z_]+)", text)
    constants += re.findall(r"param_dict\.get\(([A-Z_]+)", text)
    names = {str(getattr(config, constant)) for constant in constants}
    names |= set(re.findall(r"""param_dict\.get\(["'](\w+)""", text))
    assert len(names) > 20
    assert DeepSpeedConfig.__name__ in text
    refused = {feature.key.split(".")[0] for feature in UNSUPPORTED}
    assert names <= SECTIONS.keys() | refused


UNKNOWN: dict[str, tuple[dict[str, Any], str]] = {
    "zero_optimisation": ({"zero_optimisation": {"stage": 3}}, "did you mean 'zero_optimization'?"),
    "wall_clock_breakdwn": ({"wall_clock_breakdwn": True}, "did you mean 'wall_clock_breakdown'?"),
    "flops_profiler.enable": ({"flops_profiler": {"enable": True}}, "did you mean 'flops_profiler.enabled'?"),
    "checkpoint.writer.typ": ({"checkpoint": {"writer": {"typ": "fast"}}}, "did you mean 'checkpoint.writer.type'?"),
    "timers.speed": ({"timers": {"speed": {}}}, "valid keys here: throughput"),
    "everything": ({"everything": 1}, "valid keys here: activation_checkpointing, "),
}


@pytest.mark.parametrize("key", UNKNOWN)
def test_an_unknown_key_is_refused_with_the_nearest(key: str, tmp_path: Path) -> None:
    section, remedy = UNKNOWN[key]
    with pytest.raises(InputError, match=r"^deepspeed: '.*ds\.json': unknown key") as refusal:
        _check(tmp_path, json.dumps({"zero_optimization": {"stage": 3}} | section))
    assert f"'{key}'; {remedy}" in str(refusal.value)


WRONG = [
    {"wall_clock_breakdown": "yes"},
    {"wall_clock_breakdown": 1},
    {"prescale_gradients": []},
    {"gradient_predivide_factor": True},
    {"vocabulary_size": 1.5},
    {"log_level": "loud"},
    {"log_level": ["info"]},
    {"flops_profiler": 3},
    {"flops_profiler": {"profile_step": "1"}},
    {"aio": {"block_size": True}},
    {"comet": None},
    {"timers": {"throughput": None}},
    {"autotuning": 3},
    {"checkpoint": {"writer": "fast"}},
    {"zero_optimization": []},
    {"zero_optimization": {"stage": True}},
    {"zero_optimization": {"stage": "3"}},
    {"zero_optimization": {"stage": 4}},
    {"zero_optimization": None},
]


@pytest.mark.parametrize("section", WRONG, ids=json.dumps)
def test_a_value_of_another_kind_is_refused(section: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^deepspeed: ") as refusal:
        _check(tmp_path, json.dumps({"zero_optimization": {"stage": 3}} | section))
    assert next(iter(section)) in str(refusal.value)


ODD_TEXTS = {
    "brackets": ("[" * 100_000, "nested too deeply"),
    "objects in objects": ('{"a":' * 100_000, "nested too deeply"),
    "a number without end": ('{"zero_optimization": {"stage": ' + "9" * 5000 + "}}", "5000 digits"),
    "a number without measure": ('{"zero_optimization": {"stage": 1e999}}', "infinity"),
    "a key twice": ('{"zero_optimization": {"stage": 3, "stage": 2}}', "the key 'stage' stands twice"),
    "half of it": ('{"zero_optimization": {"stage": 3', "not valid JSON"),
    "more than it": ('{"zero_optimization": {"stage": 3}} {}', "not valid JSON"),
    "NUL": ("\0", "no JSON object"),
    "nothing": ("", "stage is None"),
    "a text": ('"zero"', "no JSON object"),
}


@pytest.mark.parametrize("name", ODD_TEXTS)
def test_an_odd_text_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    text, words = ODD_TEXTS[name]
    with pytest.raises(InputError, match=r"^deepspeed: ") as refusal:
        _check(tmp_path, text)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_configuration_has_known_keys_only(path: Path) -> None:
    check_deepspeed_file(path)
