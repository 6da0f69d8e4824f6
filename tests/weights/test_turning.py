"""Models at positions of the dial, written from files to files: the base's function at 0, what was trained at 1, and
in between what torch computes."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from harness.domains import adapt, all_tensors, content, load, logits, save_base
from harness.families import MOSTLY_SLOW_FAMILIES
from safetensors.torch import save_file

from adept_ds.base.errors import InputError
from adept_ds.base.outputs import OutputMark
from adept_ds.models.family_table import FAMILIES
from adept_ds.weights.expansion import Expansion
from adept_ds.weights.tensor_files import read_header, turned_tensor, write_tensors
from adept_ds.weights.turning import write_turned

LAYERS = [1, 3]
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def adapted(folder: Path, model: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """A base of several files, and a model with two copies that hold random numbers."""
    base = save_base(folder / "base", model, "20KB" if model == "llama" else None, dtype)
    return base, adapt(base, folder / "adapted", LAYERS, seed=1)


# --- single tensors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trained", "origin"), itertools.product(FLOATS, (*FLOATS, None)), ids=str)
def test_a_tensor_in_between_is_what_torch_computes_in_fp32_and_rounds_once(
    tmp_path: Path, trained: torch.dtype, origin: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, for every pair of dtypes, in several chunks; the origin may be one value, such as -1."""
    monkeypatch.setattr("adept_ds.weights.tensor_files._TURNED_ELEMENTS", 64)
    noise = torch.Generator().manual_seed(3)
    ends = {
        "trained": torch.randn(17, 13, generator=noise).to(trained),
        "origin": (3 * torch.randn(17, 13, generator=noise)).to(origin or torch.float32),
    }
    save_file(ends, tmp_path / "ends.safetensors")
    stored = read_header(tmp_path / "ends.safetensors")
    start = ends["origin"].float() if origin else torch.full((17, 13), -1.0)
    for number, alpha in enumerate((0.25, 0.3, 0.999)):
        content = turned_tensor(stored["trained"], stored["origin"] if origin else -1.0, alpha)
        out = tmp_path / f"{number}.safetensors"
        digests = write_tensors(out, {"x": content})
        wanted = (start + alpha * (ends["trained"].float() - start)).to(trained)
        found = all_tensors_of(out)["x"]
        assert found.dtype == trained and torch.equal(found, wanted)
        assert len(digests["x"]) == 64


def all_tensors_of(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def test_numbers_that_are_no_weights_stay(tmp_path: Path) -> None:
    save_file({"ids": torch.arange(5), "origin": torch.zeros(5, dtype=torch.int64)}, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors")
    assert turned_tensor(stored["ids"], stored["origin"], 0.5) is stored["ids"]


def test_weights_that_cannot_be_computed_with_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(4, dtype=torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors")["x"]
    with pytest.raises(InputError, match="F8_E4M3, which cannot be turned down; convert the model"):
        turned_tensor(stored, 0.0, 0.5)
    assert turned_tensor(stored, stored, 0.0) is stored


# --- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MOSTLY_SLOW_FAMILIES)
def test_at_0_it_computes_the_base_bit_for_bit_and_at_1_what_was_trained(tmp_path: Path, model: str) -> None:
    """In every family: logits of models as transformers loads them."""
    base, trained = adapted(tmp_path, model)
    for alpha in (0.0, 1.0, 0.5):
        write_turned(trained, tmp_path / f"at_{alpha}", [alpha])
    assert torch.equal(logits(load(tmp_path / "at_0.0")), logits(load(base)))
    assert torch.equal(logits(load(tmp_path / "at_1.0")), logits(load(trained)))
    half = logits(load(tmp_path / "at_0.5"))
    assert not torch.equal(half, logits(load(base))) and not torch.equal(half, logits(load(trained)))
    assert content(tmp_path / "at_1.0") == content(trained), "every file, byte for byte"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_copy_is_where_it_was_asked_to_be_and_nothing_else_moved(tmp_path: Path, dtype: torch.dtype) -> None:
    _, trained = adapted(tmp_path, dtype=dtype)
    assert write_turned(trained, tmp_path / "out", [0.25, 1.0]) == (0.25, 1.0)
    before, after, family = all_tensors(trained), all_tensors(tmp_path / "out"), FAMILIES["llama"]
    first = Expansion.read(trained).copy_indices[0]
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        place = family.split_name(name)
        writes = place is not None and place[0] == first and family.writes_residual(place[1])
        wanted = (0.25 * tensor.float()).to(dtype) if writes else tensor
        assert torch.equal(after[name], wanted), name
    record = Expansion.read(tmp_path / "out")
    assert record.alphas == (0.25, 1.0) and Expansion.read(trained).alphas is None
    assert record.model_copy(update={"alphas": None}) == Expansion.read(trained)
    assert OutputMark.load(tmp_path / "out" / ".adept_output.json").command == "export"


def test_what_is_turned_twice_is_turned_by_the_product(tmp_path: Path) -> None:
    """Powers of 2, which round nothing."""
    _, trained = adapted(tmp_path)
    write_turned(trained, tmp_path / "half", [0.5])
    write_turned(tmp_path / "half", tmp_path / "quarter", [0.5, 1.0])
    write_turned(trained, tmp_path / "at_once", [0.25, 0.5])
    assert Expansion.read(tmp_path / "quarter").alphas == (0.25, 0.5)
    assert content(tmp_path / "quarter") == content(tmp_path / "at_once")


def test_without_copies_all_weights_are_interpolated_with_the_base(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", "20KB")
    trained = save_base(tmp_path / "trained", "llama", "20KB")
    for file in trained.glob("*.safetensors"):
        tensors = {name: tensor + 0.1 * torch.ones_like(tensor) for name, tensor in all_tensors_of(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    for alpha in (0.0, 0.3, 1.0):
        write_turned(trained, tmp_path / f"at_{alpha}", [alpha], base)
    ends, between = [all_tensors(base), all_tensors(trained)], all_tensors(tmp_path / "at_0.3")
    for name, tensor in between.items():
        assert torch.equal(tensor, ends[0][name] + 0.3 * (ends[1][name] - ends[0][name])), name
    assert torch.equal(logits(load(tmp_path / "at_0.0")), logits(load(base)))
    assert content(tmp_path / "at_1.0") == content(trained)


def test_a_model_with_copies_that_was_trained_in_place_is_interpolated_with_what_it_was(tmp_path: Path) -> None:
    """Its copies were another run's: they are weights like all others now."""
    _, base = adapted(tmp_path)
    trained = tmp_path / "in_place"
    shutil.copytree(base, trained)
    for file in trained.glob("*.safetensors"):
        save_file({n: tensor + 0.1 for n, tensor in all_tensors_of(file).items()}, file, metadata={"format": "pt"})
    write_turned(trained, tmp_path / "out", [0.5], base)
    first, last, between = all_tensors(base), all_tensors(trained), all_tensors(tmp_path / "out")
    assert between.keys() == last.keys()
    for name, tensor in between.items():
        assert torch.equal(tensor, first[name] + 0.5 * (last[name] - first[name])), name
    assert Expansion.read(tmp_path / "out") == Expansion.read(base), "the same copies, as far turned as before"


def test_what_cannot_be_turned_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    base, trained = adapted(tmp_path)
    other = save_base(tmp_path / "other", "llama", None)
    bigger = save_base(tmp_path / "bigger", "gpt2", None)
    out = tmp_path / "out"
    for complaint, arguments in {
        "--alpha: 3 positions for 2 copies; give one for all, or one for each": (trained, out, [0.1, 0.2, 0.3]),
        "--base is missing; .* has no copies": (base, out, [0.5]),
        "--alpha: 2 positions for a model without copies": (base, out, [0.5, 0.5], other),
        "which the base lacks; .* or none where copies of layers were trained": (trained, out, [0.5], base),
        "--base: .* which the base lacks; give the model that was adapted": (base, out, [0.5], bigger),
        "OUT: .* is ADAPTED": (trained, trained, [0.5]),
    }.items():
        with pytest.raises(InputError, match=complaint):
            write_turned(*arguments)  # type: ignore[arg-type]
    assert not out.exists()
