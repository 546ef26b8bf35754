"""AdamW as one kernel does what torch's kernels do. (On a GPU `tests/gpu/check_steps.py` trains models with it.)"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "interpreted_kernel.py"


def test_the_kernel_changes_weights_moments_and_copies_as_torch_does() -> None:
    if "TUNE_SERVICE_TEST_TRITON" not in os.environ:
        pytest.skip("TUNE_SERVICE_TEST_TRITON names no folder with Triton, which torch brings along for GPUs only")
    environment = os.environ | {"PYTHONPATH": f"{PROGRAM.parent.parent}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, str(PROGRAM)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [
        "clipped",
        "not clipped",
        "some parameters without a gradient",
        "bf16 gradients of some copies",
        "bf16 gradients of copies that some steps do not use",
        "gradients at odd places",
        "a gradient that is not a number",
    ]
