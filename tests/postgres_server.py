"""A PostgreSQL server of the tests' own, on a loopback port of its own, with its files in a folder of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import psycopg
import pytest
from debian import install
from free_port import free_port

PASSWORD = "Loaf-of-bread-77"
"""Of the role `baker`; the owner `postgres` needs none."""
_PROGRAMS = Path("/usr/lib/postgresql")  # where Debian keeps them, out of PATH


class Server:
    """Running once it is made; `close` leaves nothing of it."""

    def __init__(self) -> None:
        self._programs = _find_programs()
        self._folder = Path(tempfile.mkdtemp(prefix="ts-pg-", dir="/tmp"))
        self._user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None  # initdb refuses root
        if self._user is not None:
            os.chown(self._folder, self._user.pw_uid, self._user.pw_gid)
        self._data = self._folder / "data"
        self.port = free_port()
        self._program("initdb", "-D", str(self._data), "-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8")
        rules = "host all baker 127.0.0.1/32 scram-sha-256\nhost all clear 127.0.0.1/32 password\n"
        hba = self._data / "pg_hba.conf"
        hba.write_text(rules + hba.read_text())
        self.start()
        for role in ("baker", "clear"):
            self.sql("postgres", f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'")

    def start(self) -> None:
        settings = f"-p {self.port} -k {self._folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        log = str(self._folder / "log")
        self._program("pg_ctl", "-D", str(self._data), "-o", settings, "-l", log, "-w", "start")

    def stop(self) -> None:
        """At once: what was not committed is lost, and every connection is cut."""
        self._program("pg_ctl", "-D", str(self._data), "-m", "immediate", "-w", "stop")

    def database(self, name: str) -> str:
        """A new database. Returns its URL, for its owner."""
        self.sql("postgres", f'CREATE DATABASE "{name}"')
        return self.url(name)

    def url(self, database: str, role: str = "postgres") -> str:
        return f"postgresql://{role}@127.0.0.1:{self.port}/{database}"

    def sql(self, database: str, statement: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            found = connection.execute(statement)  # type: ignore[call-overload]
            return found.fetchall() if found.description else []

    def close(self) -> None:
        if (self._data / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self._folder)

    def _program(self, name: str, *arguments: str) -> None:
        user = {} if self._user is None else {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": ()}
        command = [str(self._programs / name), *arguments]
        output = self._folder / "output"  # no pipe: the server would keep it open
        with output.open("w") as file:
            run = subprocess.run(command, stdout=file, stderr=file, cwd="/", timeout=120, check=False, **user)
        assert run.returncode == 0, output.read_text()


def _find_programs() -> Path:
    found = _installed()
    why_not = install("postgresql") if found is None else None
    found = found or _installed()
    if found is None:
        pytest.skip(f"a record in a database needs initdb and pg_ctl: {why_not}")
    return found


def _installed() -> Path | None:
    own = shutil.which("initdb")
    places = [Path(own).parent] if own else []
    places += sorted(_PROGRAMS.glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    return next((place for place in places if (place / "initdb").exists() and (place / "pg_ctl").exists()), None)
