"""Proof that an expanded checkpoint computes the function of its source: by its bytes, and by its logits."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adept_ds.base.errors import InputError
from adept_ds.base.progress import ProgressCallback
from adept_ds.base.run_dir import EXPANSION_NAME
from adept_ds.models.directory import ModelDirectory
from adept_ds.weights.expansion import Expansion, plan_expansion
from adept_ds.weights.hf_directory import stored_tensors

_ROWS, _TOKENS = 2, 32


_MEMORY_PER_BYTE = 1.5
"""Room for loading a checkpoint and one forward pass; a model of 135 M parameters took 1.34 in fp32."""


@dataclass(frozen=True)
class Verified:
    """What was found equal."""

    tensors: int
    num_bytes: int
    logits: bool
    """Whether logits were compared too, bit for bit."""


def verify_expansion(
    source: Path, expanded: Path, progress: ProgressCallback | None = None, *, logits: bool | None = None
) -> Verified:
    """Compare every tensor of an expanded checkpoint with what it must be, streaming; and logits on random tokens.

    Args:
        logits: compare them; None: where either model fits into the memory that is free.

    Raises:
        InputError: naming the first difference.
    """
    expansion = Expansion.read(expanded)
    plan = plan_expansion(source, expansion.source_indices)
    if plan.expansion.copies != expansion.copies:
        raise InputError(
            f"'{expanded / EXPANSION_NAME}' has a copy that is not above its source; expand '{source}' again"
        )
    _compare_config(expanded, plan.config)
    wanted = {name: content for contents in plan.files.values() for name, content in contents.items()}
    stored = stored_tensors(expanded)
    odd = sorted(wanted.keys() ^ stored.keys())
    if odd:
        raise InputError(f"'{odd[0]}' is only in one of '{source}' and '{expanded}'; expand '{source}' again")
    done = 0
    for name, content in wanted.items():
        found = stored[name]
        same_kind = (content.dtype, content.shape, content.num_bytes) == (found.dtype, found.shape, found.num_bytes)
        if not same_kind or any(a != b for a, b in zip(content.chunks(), found.chunks(), strict=True)):
            raise InputError(f"'{name}' of '{expanded}' is not what '{source}' says; expand it again")
        done += content.num_bytes
        if progress:
            progress(done / plan.num_bytes, name)
    if logits is None:
        logits = _fits_into_memory(plan.num_bytes)
    if logits:
        _compare_logits(source, expanded)
    return Verified(len(wanted), done, logits)


def _compare_config(expanded: Path, wanted: dict[str, Any]) -> None:
    found, plain = ModelDirectory.read(expanded).config, json.loads(json.dumps(wanted, default=str))
    for key in sorted(found.keys() | plain.keys()):
        if found.get(key) != plain.get(key):
            raise InputError(f"config.json of '{expanded}' has {key}={found.get(key)!r}; {plain.get(key)!r} is right")


def _fits_into_memory(num_bytes: int) -> bool:
    from adept_ds.models.device import free_host_memory_bytes

    return _MEMORY_PER_BYTE * num_bytes < free_host_memory_bytes()


def _compare_logits(source: Path, expanded: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from adept_ds.models.loading import check_architecture

    outputs = []
    for directory in (source, expanded):
        check_architecture(ModelDirectory.read(directory))
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype="auto", local_files_only=True, use_safetensors=True, trust_remote_code=False
        ).eval()
        tokens = torch.randint(model.config.vocab_size, (_ROWS, _TOKENS), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            outputs.append(model(input_ids=tokens, use_cache=False).logits)
        del model
        gc.collect()
    if not torch.equal(*outputs):
        difference = float((outputs[0].float() - outputs[1].float()).abs().max())
        raise InputError(f"logits of '{expanded}' differ from those of '{source}' by up to {difference:.3g}")
