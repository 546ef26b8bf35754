"""A PostgreSQL server with records: how it is reached, how a record is made and removed, what can be wrong, in words.

The password is libpq's business: PGPASSWORD, ~/.pgpass, or the service file that PGSERVICE names an entry of.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.study import StudyDirection
from sqlalchemy import delete, select, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session

from trainables.errors import Problem
from tune_service.errors import RecordUnavailableError
from tune_service.record_url import Pointer

CONNECT_TIMEOUT_S = 8
_CONNECTING = {
    "connect_timeout": CONNECT_TIMEOUT_S,
    "tcp_user_timeout": 10_000,  # a dead host answers nothing: an error after so many ms
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "fallback_application_name": "tune-service",
    "client_encoding": "utf8",  # where the database has none, texts would come as bytes
}
_SETTINGS = (
    "SET idle_in_transaction_session_timeout = '10s';"  # a frozen driver lets go of its locks
    "SET lock_timeout = '20s';"
    "SET statement_timeout = '30s'"
)
_IDLE_TIMEOUT = "25P03"
"""What a driver is told that was frozen within a transaction."""
_HOME = "home"
"""The attribute of a study that holds the folder that it was made in."""
_MAKING_TABLES = text(f"SELECT pg_advisory_xact_lock({0x74756E65})")
"""Two who make the tables at once would fail both."""
_ADVICE = {
    "cleartext": "PGREQUIREAUTH=password, which shows the server the password itself; best with sslmode=verify-full",
    "password": "the right password in PGPASSWORD, or in ~/.pgpass as host:port:database:user:password (mode 600)",
    "authentication": "a role that may log in from here",
    "database": "a database that is there: `createdb` makes one",
    "role": "a role that is there: `createuser` makes one",
    "permission denied": "a role that may write all tables there, or make them: `GRANT CREATE ON SCHEMA public`",
    "must be owner": "a role that may write all tables there, or make them: `GRANT CREATE ON SCHEMA public`",
    "read-only": "a server that takes writes, no copy of one",
    "optuna version": "`optuna storage upgrade --storage URL`, or a database of its own",
    "relation": "the tables that Optuna makes, in a database of its own",
}
"""What helps, by a word of what the server said; the first that fits. A server may speak another language."""
_shared: dict[str, RDBStorage] = {}
_refused: dict[str, tuple[float, RecordUnavailableError]] = {}
_REFUSED_AGE_S = 10.0
DATABASE_ERRORS = (SQLAlchemyError, StorageInternalError)


def opened(url: str, make_tables: bool = False) -> RDBStorage:
    """A connection of its own to a database with Optuna's tables. RecordUnavailableError."""
    try:
        if not make_tables:
            return RDBStorage(url, _engine_settings(), skip_table_creation=True)
        with _engine(url).begin() as connection:
            connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
            connection.execute(_MAKING_TABLES)
            return RDBStorage(url, _engine_settings())
    except (*DATABASE_ERRORS, RuntimeError) as error:  # the latter when the tables are another version's
        raise refusal(url, error) from error


def shared(url: str) -> RDBStorage:
    """The same for all readers of this process. Who cannot be reached is not tried again for each study of a list."""
    refused_at, refused = _refused.get(url, (0.0, None))
    if refused is not None and time.monotonic() - refused_at < _REFUSED_AGE_S:
        raise refused
    if url not in _shared:
        try:
            _shared[url] = opened(url)
        except RecordUnavailableError as error:
            _refused[url] = time.monotonic(), error
            raise
    return _shared[url]


def look(url: str) -> str:
    """What is there, in words, for a record that will be: RecordUnavailableError unless it can be written now.

    Writes for that, and takes it back before anybody can see it.
    """
    try:
        with _engine(url).connect() as connection:
            version = connection.execute(text("SHOW server_version")).scalar_one()
            connection.execute(_MAKING_TABLES)
            is_new = not sqlalchemy.inspect(connection).has_table("alembic_version")
            models.BaseModel.metadata.create_all(connection)
            connection.execute(sqlalchemy.insert(models.StudyModel).values(study_name=f"check-{secrets.token_hex(8)}"))
            connection.rollback()
            number = 0 if is_new else connection.execute(text("SELECT count(*) FROM studies")).scalar_one()
    except DATABASE_ERRORS as error:
        raise refusal(url, error) from error
    if not is_new:
        opened(url).engine.dispose()  # knows whether the tables are another version's
    return f"PostgreSQL {version} at {url} can be written; {number} {'study' if number == 1 else 'studies'} in it"


def create_record(url: str, path: Path, direction: StudyDirection, attrs: Mapping[str, Any]) -> None:
    """A study in the database, in one transaction, and then the pointer to it: whoever finds that finds it whole."""
    pointer = Pointer(url, f"{path.parent.name}-{secrets.token_hex(4)}")
    storage = opened(url, make_tables=True)
    values = {**attrs, _HOME: str(path.parent)}
    rows = [models.StudyUserAttributeModel(key=name, value_json=json.dumps(value)) for name, value in values.items()]
    directions = [models.StudyDirectionModel(objective=0, direction=direction)]
    try:
        with Session(storage.engine) as session, session.begin():
            session.add(models.StudyModel(study_name=pointer.study, directions=directions, user_attributes=rows))
    except DATABASE_ERRORS as error:
        raise refusal(url, error) from error
    finally:
        storage.engine.dispose()
    pointer.write(path)


def erase(path: Path) -> None:
    """Removes the rows of the study that the pointer at `path` names, however many of them are left.

    Not those of a study that was made elsewhere: a folder may be a copy, or a stranger's that names what is yours.
    """
    pointer = Pointer.read(path)
    trials = (
        select(models.TrialModel.trial_id).join(models.StudyModel).where(models.StudyModel.study_name == pointer.study)
    )
    studies = select(models.StudyModel.study_id).where(models.StudyModel.study_name == pointer.study)
    engine = opened(pointer.url).engine
    attribute = models.StudyUserAttributeModel
    home = select(attribute.value_json).where(attribute.key == _HOME, attribute.study_id.in_(studies))
    try:
        with Session(engine) as session, session.begin():
            if session.execute(studies).first() is None:  # this was called before, and cut off after that
                return
            if session.execute(home).scalar() != json.dumps(str(path.parent)):
                here = f"study {pointer.study} of {pointer.url} was not made in {path.parent}"
                print(f"{here}: its rows stay; `optuna delete-study` removes them", file=sys.stderr)
                return
            for table in reversed(models.BaseModel.metadata.sorted_tables):  # those that name others come first
                column = table.c.get("trial_id") if table.name != "trials" else None
                if column is not None:
                    session.execute(delete(table).where(column.in_(trials)))
                elif "study_id" in table.c:
                    session.execute(delete(table).where(table.c.study_id.in_(studies)))
    except DATABASE_ERRORS as error:
        raise refusal(pointer.url, error) from error
    finally:
        engine.dispose()


def may_pass(error: BaseException) -> bool:
    """Whether the same may succeed a little later: the connection was cut, the server is starting, a lock was taken."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if not isinstance(cause, DBAPIError):
        return False
    is_cut = cause.connection_invalidated or getattr(cause.orig, "sqlstate", None) == _IDLE_TIMEOUT
    return is_cut or isinstance(cause, OperationalError | InterfaceError)


def refusal(url: str, error: BaseException) -> RecordUnavailableError:
    """What went wrong with a database, in one line, and what helps."""
    cause = error.__cause__ or error if isinstance(error, StorageInternalError) else error
    said = str(getattr(cause, "orig", None) or cause).strip()
    said = (said.splitlines() or [type(cause).__name__])[0].removeprefix("connection failed: ")
    default = "a PostgreSQL server that takes connections and writes"
    advice = next((advice for word, advice in _ADVICE.items() if word in said.lower()), default)
    rule = "the database that holds the study's record can be reached and written"
    return RecordUnavailableError(Problem("record", rule, f"{url}: {said[:500]}", advice))


def _engine(url: str) -> sqlalchemy.Engine:
    """For one connection, which is closed after use."""
    return sqlalchemy.create_engine(url, **_engine_settings(), poolclass=sqlalchemy.NullPool)


def _engine_settings() -> dict[str, Any]:
    # No server is shown the password in clear unless the user says so: a URL may come with a stranger's study.
    auth = {"require_auth": os.environ.get("PGREQUIREAUTH", "!password")}
    return {
        "pool_events": [(_settle, "connect")],
        "connect_args": _CONNECTING | auth,
    }


def _settle(connection: Any, _: object) -> None:
    """Not by the connection's `options`: the user's own PGOPTIONS would be lost."""
    connection.execute(_SETTINGS)
    connection.commit()
