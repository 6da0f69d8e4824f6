"""Fixtures: tiny models of every family, tiny corpora, and real ranks.

Ranks are real processes with the environment that a launcher gives them. Everything runs in fp32 on the CPU, one
thread per rank, so that sums are formed in a fixed order.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rank_processes import RankProcess

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 262
"""256 bytes, five added tokens and one: not a multiple of 2 or 3, so that partitions need padding."""

TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 20,
    "intermediate_size": 37,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "max_position_embeddings": 128,
    "eos_token_id": 256,
    "bos_token_id": 256,
    "pad_token_id": 256,
    "tie_word_embeddings": False,
}
FEW_EXPERTS: dict[str, Any] = {  # torch's grouped matrix product wants rows of 16 bytes, in bf16 too
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "hidden_size": 24,
    "moe_intermediate_size": 16,
}
FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "sliding_window": 16, "final_logit_softcapping": 2.0},
    "gemma3_text": {"tie_word_embeddings": True, "sliding_window": 16, "sliding_window_pattern": 2},
    "gpt2": {"tie_word_embeddings": True, "n_embd": 20, "n_layer": 5, "n_head": 2, "n_inner": 37, "n_positions": 128},
    "gpt_neox": {},
    "granite": {"residual_multiplier": 0.3, "embedding_multiplier": 5.0, "logits_scaling": 2.0},
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 16},
    "mixtral": FEW_EXPERTS | {"num_local_experts": 3, "intermediate_size": 32, "sliding_window": 16},
    "olmo2": {},
    "olmo3": {"sliding_window": 16},
    "phi3": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3},
    "qwen2_moe": FEW_EXPERTS
    | {"shared_expert_intermediate_size": 13, "mlp_only_layers": [1, 4]}
    | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3},
    "qwen3": {},
    "qwen3_moe": FEW_EXPERTS | {"decoder_sparse_step": 3},
    "smollm3": {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 16},
}


def save_tiny_model(directory: Path, model_type: str = "llama", **options: Any) -> Path:
    """A randomly initialised model with large enough weights that every layer matters, and a byte tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(TINY | FAMILY_OPTIONS[model_type] | options))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norm gains away from 1 and biases away from 0, so that a forgotten one shows.
            parameter.add_(torch.randn_like(parameter) * 0.08)
    model.save_pretrained(directory)
    save_byte_tokenizer(directory)
    return directory


def save_byte_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(directory)


def write_corpus(path: Path, seed: int, documents: int = 60) -> Path:
    """JSON lines of made-up sentences that a tiny model can learn something from."""
    generator = torch.Generator().manual_seed(seed)
    words = ["matrix", "sum", "the", "of", "norm", "x", "is", "zero", "layer", "seven", "and", "proof"]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(documents):
            picks = torch.randint(len(words), (12,), generator=generator).tolist()
            file.write(json.dumps({"text": " ".join(words[pick] for pick in picks)}) + "\n")
    return path


@dataclass(frozen=True)
class Workspace:
    """A directory with a tiny model and corpora, and the configuration tree of a run on them."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    def tree(self, run_dir: Path, **sections: dict[str, Any]) -> dict[str, Any]:
        """A small complete run; `sections` are merged over it."""
        tree: dict[str, Any] = {
            "model": str(self.model),
            "run_dir": str(run_dir),
            "data": {
                "seq_len": 32,
                "domain": [str(self.root / "domain.jsonl")],
                "general_eval": [str(self.root / "general_heldout.jsonl")],
                "domain_eval": [str(self.root / "domain_heldout.jsonl")],
                "eval_blocks": 7,
            },
            "probe": {
                "corpus": [str(self.root / "general.jsonl")],
                "sequences": 7,
                "seq_len": 24,
                "max_stack_tokens": 60,
            },
            "expand": {"k": 2},
            "importance": {"every": 2, "sequences": 7, "batch_sequences": 5},
            "train": {
                "steps": 7,
                "lr": 1e-2,
                "global_batch_size": 12,
                "micro_batch_size": 2,
                "checkpoint_every": 3,
                "keep_checkpoints": 3,
                "eval_every": 4,
                "warmup_ratio": 0.3,
                "weight_decay": 0.1,
                "clip_grad_norm": 0.5,
            },
        }
        for section, values in sections.items():
            tree[section] = tree.get(section, {}) | values if isinstance(values, dict) else values
        return tree

    def config(self, run_dir: Path, **sections: dict[str, Any]) -> Path:
        """The same as a file beside the run directory."""
        path = run_dir.with_suffix(".yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(self.tree(run_dir, **sections)), encoding="utf-8")
        return path


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = tmp_path_factory.mktemp("workspace")
    save_tiny_model(root / "model")
    for seed, name in enumerate(("general", "general_heldout", "domain", "domain_heldout")):
        write_corpus(root / f"{name}.jsonl", seed)
    return Workspace(root)


Launch = Callable[..., subprocess.CompletedProcess[str]]


def launch(world_size: int, arguments: Sequence[str], timeout: float = 600.0) -> subprocess.CompletedProcess[str]:
    """Start `python ARGUMENTS` on `world_size` real ranks; the result of the first rank that failed, else of rank 0."""
    processes = start(world_size, arguments)
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            results.append(subprocess.CompletedProcess(list(arguments), process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return next((result for result in results if result.returncode != 0), results[0])


def start(world_size: int, arguments: Sequence[str]) -> list[RankProcess]:
    """Start `python ARGUMENTS` on real ranks and leave them running."""
    port = free_port()
    return [RankProcess(arguments, rank_environment(rank, world_size, port), ROOT) for rank in range(world_size)]


def adept(world_size: int, *arguments: str | Path, timeout: float = 600.0) -> subprocess.CompletedProcess[str]:
    """`adept ARGUMENTS` on real ranks."""
    return launch(world_size, ["-m", "adept_ds", *map(str, arguments)], timeout)


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    launcher = (
        {}
        if world_size == 1
        else {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "LOCAL_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    )
    return os.environ | launcher | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
