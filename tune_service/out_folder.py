"""The folder of `--out`: new or empty before, and then whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainables.checkpoint import fsync_tree
from trainables.errors import BucketError, Problem
from tune_service.errors import CommandError, OutputNotEmptyError

_LEFTOVER = ".export.partial"
_LAST = "metrics.json"


def check_out(out: Path) -> None:
    """OutputNotEmptyError unless `out` is a new or an empty folder, or holds only what a killed export left."""
    if out.exists() and not (out.is_dir() and all(path.name == _LEFTOVER for path in out.iterdir())):
        found = f"{out} holds something" if out.is_dir() else f"{out} is a file"
        raise OutputNotEmptyError(Problem("--out", "is a new or an empty folder", found, "a new name"))


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A folder to fill, whose content is that of `out` once the block ends without an error, and else is removed.

    The folder around it is on the same disk, and goes in the end: for what the block needs and `out` does not.

    A new `out` comes into being by one rename: it is whole or absent whenever this process is killed. An empty one
    stays the folder that it is, for it may be a mount point, or where a shell stands: what goes into it is written to a
    hidden folder inside and then moves up, `metrics.json` last. So an `out` with that file is whole, and one with the
    hidden folder alone, of a killed export, counts as empty. Where `out` is a link, all this is about where it leads.

    Raises CommandError when `out` cannot be written, and OutputNotEmptyError when something has come into it meanwhile.
    """
    out = Path(os.path.realpath(out))  # unlike `resolve` no error where a link leads to itself
    is_new = not out.exists()
    partial = out.with_name(f".{out.name}.partial") if is_new else out / _LEFTOVER
    whole = partial / "whole"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        whole.mkdir(parents=True)
        yield whole
        fsync_tree(whole)
        if is_new:
            whole.replace(out)
        else:
            check_out(out)
            _move_up(whole, out)
    except BucketError:  # an OSError too, but not of this disk
        raise
    except OSError as error:
        expected = "a folder on a disk with room"
        raise CommandError(Problem("--out", "can be written", f"{type(error).__name__}: {error}", expected)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move_up(whole: Path, out: Path) -> None:
    moved = list[Path]()
    try:
        for path in sorted(whole.iterdir(), key=lambda path: path.name == _LAST):
            moved.append(path.replace(out / path.name))
    except BaseException:
        for path in moved:
            path.replace(whole / path.name)
        raise
