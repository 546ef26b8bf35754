"""How a lack of memory is told from other ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainables import memory


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (MemoryError(), True),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 280 MiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
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
