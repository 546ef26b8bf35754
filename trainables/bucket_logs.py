"""The log files of a trial whose study lies in a bucket: written on this node, put there whole when they have grown.

A rank's log is small, a few lines an epoch, so an object is put anew with all of it; the longer that takes, the rarer.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from trainables.bucket import Bucket, is_url
from trainables.far import own_files
from trainables.log_names import prefix_of

PAUSE_S = 5.0


class TrialLogs:
    """Where the ranks of one trial write. For a study in a folder that is the study's own."""

    def __init__(self, where: str, trial: int) -> None:
        self._where, self._prefix = where, prefix_of(trial)
        self._bucket = Bucket.open(where) if is_url(where) else None
        self._folder: Path | None = None
        self._sizes: dict[str, int] = {}
        """Bytes of each file that are in the bucket."""
        self._next_s = 0.0

    def folder(self) -> Path:
        """The folder for this node's files. What an earlier supervisor of the trial has put away is there again."""
        if self._bucket is None:
            return Path(self._where)
        if self._folder is None:
            folder = own_files.emptied("logs")
            for name, found in self._bucket.objects().items():
                if name.startswith(self._prefix) and "/" not in name:
                    self._bucket.get_file(name, folder / name)
                    self._sizes[name] = found.num_bytes
            self._folder = folder
        return self._folder

    def put(self, in_time: bool = False) -> None:
        """Puts away what is new; when there is time for it, not each time. A store that is away says so elsewhere."""
        if self._bucket is None or self._folder is None or (in_time and time.monotonic() < self._next_s):
            return
        began_s = time.monotonic()
        with suppress(OSError):
            for path in sorted(self._folder.glob(f"{self._prefix}*.log")):
                size = path.stat().st_size
                if size != self._sizes.get(path.name):
                    self._bucket.put_file(path.name, path)
                    self._sizes[path.name] = size
        now_s = time.monotonic()
        self._next_s = now_s + max(PAUSE_S, 10 * (now_s - began_s))
