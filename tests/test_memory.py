"""How a lack of memory is told from other ends."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainables import memory


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (MemoryError(), True),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 280 MiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`"), False),
        (RuntimeError("a matrix of the wrong shape"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_an_error_tells_of_memory_by_its_class_or_words(error: Exception, is_it: bool) -> None:
    assert memory.is_out_of_memory(error) is is_it


def test_rays_message_on_any_dead_process_is_no_word_of_memory() -> None:
    usual = "Some common causes include: (1) the process was killed by the OOM killer due to high memory usage"
    assert not memory.tells_of_memory(usual)
    assert memory.tells_of_memory("1 worker(s) were killed due to the node running low on memory.")


def test_the_kernels_kills_are_counted_in_the_container_before_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, machine = tmp_path / "memory.events", tmp_path / "vmstat"
    monkeypatch.setattr(memory, "_COUNTERS", (own, machine))
    assert memory.num_oom_kills() == 0
    machine.write_text("nr_free_pages 12\noom_kill 5\n")
    assert memory.num_oom_kills() == 5
    own.write_text("low 0\noom 3\noom_kill 2\noom_group_kill 1\n")
    assert memory.num_oom_kills() == 2


class Card:
    """What torch.cuda says of a card of 80 GiB of which this process has held 20 at most."""

    def __init__(self, is_initialized: bool) -> None:
        self.is_initialized = lambda: is_initialized

    def current_device(self) -> int:
        return 0

    def get_device_properties(self, device: int) -> SimpleNamespace:
        return SimpleNamespace(total_memory=80 * 2**30)

    def max_memory_reserved(self) -> int:
        return 20 * 2**30


def test_the_share_of_a_gpu_counts_half_a_gib_for_cuda_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=Card(is_initialized=True)))
    assert memory.gpu_memory_share() == 20.5 / 80


def test_who_uses_no_gpu_has_no_share_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=Card(is_initialized=False)))
    assert memory.gpu_memory_share() == 0.0
    monkeypatch.delitem(sys.modules, "torch")
    assert memory.gpu_memory_share() == 0.0
    assert "torch" not in sys.modules, "asking does not import it"
