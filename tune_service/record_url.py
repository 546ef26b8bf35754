"""Where a record lies that is in a database: what such a URL may say, and the file in the study's folder that holds it.

A URL says no password, which libpq finds by itself. Neither may it name a file or a program: it can be a stranger's.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

from trainables.checkpoint import fsync, write_json
from trainables.errors import Problem
from tune_service.errors import StorageError

EXAMPLE = "postgresql://user@host:5432/database"
NO_PASSWORD = f"{EXAMPLE}, and the password in PGPASSWORD or ~/.pgpass (host:port:database:user:password, mode 600)"
FORMAT = 1
_PARAMETERS = ("host", "sslmode", "target_session_attrs")
_URL = re.compile(
    r"postgresql://(?:[^\s:@/?#{}]+@)?(?:[\w.-]*|\[[0-9a-fA-F:.]+\])(?::\d{1,5})?/[\w.$-]+(?:\?(?P<query>[^\s#{}]*))?",
    re.ASCII,
)


@dataclass(frozen=True)
class UrlFault:
    """What is wrong with a URL; of one with a password, `found` does not show it."""

    rule: str
    found: object
    expected: str


def fault_of(url: object) -> UrlFault | None:
    """None when a record may lie there, as far as the URL tells."""
    found = _URL.fullmatch(url) if isinstance(url, str) else None
    if isinstance(url, str) and re.search(r"//[^@]*:[^@]*@|pass\w*=", url):
        return UrlFault("a record's URL holds no password: its study keeps it", "one (not shown)", NO_PASSWORD)
    if found is None:
        return UrlFault("a record is null (a file in the storage) or a PostgreSQL database", url, f"null, or {EXAMPLE}")
    others = [name for name, _ in parse_qsl(found["query"] or "", True) if name not in _PARAMETERS]
    if others:
        expected = f"{', '.join(_PARAMETERS)}; for all else libpq's own PG... variables"
        return UrlFault("a record's URL has only some of libpq's parameters", others[0], expected)
    return None


@dataclass(frozen=True)
class Pointer:
    """Which study of which database a record is."""

    url: str
    study: str

    def write(self, path: Path) -> None:
        """Whole or absent, and on the disk."""
        unfinished = path.with_suffix(".new")
        write_json(unfinished, {"format": FORMAT, "url": self.url, "study": self.study})
        fsync(unfinished)
        unfinished.replace(path)
        fsync(path.parent)

    @staticmethod
    def read(path: Path) -> Pointer:
        """StorageError when it is not what this version writes."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            version, url, study = document["format"], document["url"], document["study"]
            whole = version == FORMAT and fault_of(url) is None and isinstance(study, str)
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            found = f"{path}: {type(error).__name__}: {error}"
            raise StorageError(
                Problem(path.parent.name, "says where its record lies", found, "a whole file")
            ) from error
        if not whole:
            found = f"{path} of format {version} with {url!r}"
            expected = f"format {FORMAT}, and {EXAMPLE}"
            raise StorageError(Problem(path.parent.name, "says where its record lies", found, expected))
        return Pointer(url, study)
