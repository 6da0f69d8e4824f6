"""What is asked of the device: memory left over, precision."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adept_ds.base.errors import InputError
from adept_ds.models import device
from adept_ds.models.device import Stopwatch, free_in_cgroups, free_memory_bytes, host_copy, resolve_precision


def _group(folder: Path, limit: str, used: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(limit + "\n")
    (folder / "memory.current").write_text(f"{used}\n")


def test_the_tightest_control_group_around_a_process_counts(tmp_path: Path) -> None:
    """A Slurm step without a limit of its own, inside a job that has one."""
    own = tmp_path / "cgroup"
    own.write_text("0::/slurm/job_7/step_0\n")
    _group(tmp_path / "fs/slurm/job_7/step_0", "max", 50)
    _group(tmp_path / "fs/slurm/job_7", "1000", 400)
    _group(tmp_path / "fs/slurm", "9000", 1000)
    assert free_in_cgroups(tmp_path / "fs", own) == 600
    _group(tmp_path / "fs/slurm/job_7", "1000", 1400)
    assert free_in_cgroups(tmp_path / "fs", own) == 0


def test_without_control_groups_nothing_is_limited(tmp_path: Path) -> None:
    assert free_in_cgroups(tmp_path, tmp_path / "missing") == sys.maxsize


def test_ranks_of_a_host_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_uses_cuda", lambda: False)
    monkeypatch.setattr(device.psutil, "virtual_memory", lambda: SimpleNamespace(available=1200))
    monkeypatch.setattr(device, "free_in_cgroups", lambda: 1000)
    assert [free_memory_bytes(ranks) for ranks in (1, 2, 3)] == [1000, 500, 333]
    monkeypatch.setattr(device, "free_in_cgroups", lambda: 5000)
    assert free_memory_bytes(4) == 300


def test_a_rank_has_its_accelerator_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_uses_cuda", lambda: True)
    monkeypatch.setattr(device.torch.cuda, "mem_get_info", lambda: (700, 1000))
    assert free_memory_bytes(1) == free_memory_bytes(8) == 700


def test_fp16_is_refused_where_deepspeed_does_not_train_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator

    accelerator = type(get_accelerator())
    monkeypatch.setattr(accelerator, "is_fp16_supported", lambda _: False)
    with pytest.raises(InputError, match=r"train\.precision: .*fp16.*use bf16 or fp32"):
        resolve_precision("fp16")
    monkeypatch.setattr(accelerator, "is_fp16_supported", lambda _: True)
    assert str(resolve_precision("fp16")) == "torch.float16"


def test_a_host_copy_keeps_what_the_tensor_held() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    copied = host_copy(tensor)
    tensor.zero_()
    assert copied.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copied.device.type == "cpu"


def test_a_stopwatch_on_the_host_counts_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is a device that is not used: its events would tell nothing of the host's work."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", None)
    watch = Stopwatch()
    watch.stop()
    first = watch.seconds()
    assert first >= 0
    assert watch.seconds() == first, "it has been stopped"


def test_a_stopwatch_on_a_device_waits_only_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("synchronize")

        def elapsed_time(self, end: Event) -> float:
            assert end is not self
            return 1500.0  # milliseconds

    monkeypatch.setattr(device, "_uses_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch()
    watch.stop()
    assert calls == ["record", "record"]
    assert watch.seconds() == 1.5
    assert calls == ["record", "record", "synchronize"]
