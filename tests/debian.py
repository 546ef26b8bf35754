"""Programs of Debian's that tests need, installed where that may be done."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path


def install(*packages: str) -> str | None:
    """Why they cannot be installed; None: they are. Not two at a time: apt refuses the second."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return f"{', '.join(packages)} cannot be installed: that takes root and apt-get"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # starts no service
    with Path(tempfile.gettempdir(), "tune-service-tests-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (["update"], ["-y", "--no-install-recommends", "install", *packages]):
            apt = ["apt-get", "-qq", *command]
            run = subprocess.run(apt, capture_output=True, text=True, env=environment, timeout=400, check=False)
            if run.returncode != 0:
                return f"{', '.join(packages)} cannot be installed: {' '.join(apt)}: {run.stderr.strip()[-500:]}"
    return None
