"""Whether memory ran out, and how much is in use. Imports no torch: its error is told by its name."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from trainables.errors import text_of

CUDA_BYTES = 512 * 1024**2
"""About what CUDA takes of a GPU in each process, which torch does not count."""
_COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))
_WORDS = re.compile(
    r"out of memory|can't allocate memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED", re.IGNORECASE
)
"""cuBLAS has words of its own, the last where a neighbour on the GPU left no room to begin in."""


def is_out_of_memory(error: BaseException) -> bool:
    """Of the GPU (torch.OutOfMemoryError), or of the machine."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or (
        isinstance(error, RuntimeError) and bool(_WORDS.search(text_of(error)))
    )


def tells_of_memory(message: str) -> bool:
    """Whether Ray says that its own monitor ended a process for want of memory.

    Not by the word OOM, which Ray's message on any dead process has among the common causes.
    """
    return "running low on memory" in message or "memory usage threshold" in message


def gpu_memory_share() -> float:
    """The most that this process has held of its GPU's memory so far, over all of it; 0 where it uses none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0.0
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return float((torch.cuda.max_memory_reserved() + CUDA_BYTES) / total)


def num_oom_kills() -> int:
    """How many processes of this container, or machine, the kernel has killed for want of memory since its start."""
    for counter in _COUNTERS:
        try:
            lines = counter.read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        found = [line.split() for line in lines]
        counts = [int(words[1]) for words in found if len(words) == 2 and words[0] == "oom_kill"]
        if counts:
            return counts[0]
    return 0
