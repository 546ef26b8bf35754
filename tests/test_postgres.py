"""A record in a PostgreSQL database says what one in a file says, keeps silent drivers out, and bears a bad server."""

from __future__ import annotations

import json
import shutil
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import optuna
import psycopg
import pytest
from hand_driven import ASHA, HandDriven, toy_spec
from optuna.storages import RDBStorage
from postgres_server import PASSWORD, Server

from tune_service import database
from tune_service import postgres as pg
from tune_service.check import Check, run_checks
from tune_service.driver import Driver
from tune_service.errors import LeaseLostError, RecordUnavailableError, StorageError
from tune_service.lease import Lease
from tune_service.machine import Machine
from tune_service.record import Record
from tune_service.status import StudyStatus
from tune_service.storage import Storage
from tune_service.study import delete_study

TABLES = "studies study_directions study_user_attributes trials trial_params trial_values trial_user_attributes".split()


@pytest.fixture
def url(postgres: Server) -> str:
    """A database of the test's own."""
    return postgres.database(f"test-{uuid.uuid4().hex[:8]}")


class Study(HandDriven):
    """Hand-driven, in a database, by a driver with a lease."""

    def __init__(self, root: Path, url: str | None, **sections: Any) -> None:
        super().__init__(root, record=url, **sections)
        self.kill()
        self.lease = self.take_over()

    def take_over(self) -> Lease:
        """As another process that drives the study from now on; the record is opened anew."""
        lease = self._lease.enter_context(self.folder.driving())
        self.record = Record.open(self.folder, self._sampler(), lease)
        self.driver = Driver(self.spec, self.record, self.told.append)
        return lease


def plain(status: StudyStatus) -> Any:
    """Without times and paths."""
    document = status.to_json()
    for trial in document["trials"]:
        trial.update(started_at=bool(trial["started_at"]), ended_at=bool(trial["ended_at"]), checkpoint=None)
    return document


def rows(server: Server, url: str) -> dict[str, int]:
    name = url.rpartition("/")[2]
    return {table: server.sql(name, f"SELECT count(*) FROM {table}")[0][0] for table in TABLES}


def check_of(url: str, folder: Path) -> Check:
    machine = Machine(cpus=2, gpus=0, memory_bytes=4 * 2**30)
    found = run_checks(toy_spec(folder, record=url), Storage(folder / "studies"), machine)
    return next(check for check in found if check.name == "record")


# ---- the same as in a file


def test_a_record_in_a_database_says_what_one_in_a_file_says(url: str, tmp_path: Path) -> None:
    def story(record: str | None, folder: Path) -> tuple[Any, Any]:
        study = HandDriven(folder, record=record, scheduler=ASHA, sampler={"name": "tpe", "seed": 3})
        study.run(0.3, 0.2, 0.9)
        study.run(0.5, 0.6, 0.4, num_bytes=10)
        study.crash("an egg was bad")
        number = study.begin()
        study.report(number, 1, 0.8, train_loss=float("inf"))
        study.report(study.begin(), 1, 0.7)
        study.driver.ask()
        study.record.request_stop(True)
        study.end()
        ended = plain(study.record.status())
        study.resume(budget=20)
        study.run(0.99)
        return ended, plain(study.record.status())

    in_file, in_database = story(None, tmp_path / "file"), story(url, tmp_path / "database")
    assert in_database == in_file
    assert in_file[0]["state"] == "stopped" and len(in_file[0]["trials"]) == 6


def test_optunas_own_tools_read_it(url: str, tmp_path: Path) -> None:
    study = Study(tmp_path, url)
    study.begin()
    study.report(0, 1, 0.5)
    study.finish(0)
    pointer = json.loads((tmp_path / "studies/toy/record.json").read_text())
    assert pointer["url"] == url and pointer["study"].startswith("toy-")
    storage = RDBStorage(url)
    (trial,) = optuna.load_study(study_name=pointer["study"], storage=storage).trials
    assert (trial.value, trial.intermediate_values) == (0.5, {1: 0.5})
    assert trial.user_attrs["report:1"]["metrics"] == {"score": 0.5}


def test_two_studies_of_one_name_share_a_database(url: str, tmp_path: Path) -> None:
    first, second = HandDriven(tmp_path / "a", record=url), HandDriven(tmp_path / "b", record=url)
    first.run(0.5)
    assert (len(first.record.trials()), len(second.record.trials())) == (1, 0)


def test_a_display_hears_of_what_changed_and_of_nothing_else(url: str, tmp_path: Path) -> None:
    study = Study(tmp_path, url)
    for _ in range(3):
        study.begin()
    seen_by_driver, seen_by_other = study.record, Record.open(study.folder)
    for view in (seen_by_driver, seen_by_other):
        news, moment = view.changed([])
        assert [trial.number for trial in news] == [0, 1, 2]
        assert view.changed(moment)[0] == []
        study.report(1, len(study.trial(1).reports) + 1, 0.5)
        news, moment = view.changed(moment)
        assert [trial.number for trial in news] == [1]
        assert view.changed(moment)[0] == []


def test_deleting_a_study_leaves_no_row_of_it_and_all_of_the_others(postgres: Server, url: str, tmp_path: Path) -> None:
    other = HandDriven(tmp_path / "other", record=url)
    other.run(0.5)
    before = rows(postgres, url)
    study = HandDriven(tmp_path / "doomed", record=url)
    study.run(0.5, 0.6)
    study.end()
    assert rows(postgres, url)["trials"] == 2
    delete_study("toy", study.storage)
    assert rows(postgres, url) == before
    assert not study.folder.path.exists() and other.record.status().best is not None


def test_deleting_a_copy_of_a_study_leaves_the_studys_own_rows(
    postgres: Server, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = HandDriven(tmp_path, record=url)
    study.run(0.5)
    study.end()
    before = rows(postgres, url)
    copies = Storage(tmp_path / "copies")
    shutil.copytree(study.folder.path, copies.root / "toy")
    delete_study("toy", copies)
    assert copies.studies() == [] and rows(postgres, url) == before
    assert "was not made in" in capsys.readouterr().err


def test_a_study_whose_rows_are_gone_says_so_and_can_be_deleted(url: str, tmp_path: Path) -> None:
    study = HandDriven(tmp_path, record=url)
    study.kill()
    study.folder.erase_record()
    with pytest.raises(StorageError, match=r"none named toy-\w+ in postgresql:"):
        Record.open(study.folder)
    delete_study("toy", study.storage)
    assert study.storage.studies() == []


# ---- one driver


def test_the_database_refuses_every_write_of_a_driver_that_was_taken_over(
    postgres: Server, url: str, tmp_path: Path
) -> None:
    """Also between its look at the lease file and its write, which the file alone cannot tell."""
    study = Study(tmp_path, url)
    study.begin()
    silent = study.record
    study.lease.check = lambda: None  # type: ignore[method-assign]  # it has looked already, and was frozen then
    study.kill()
    study.take_over()
    before = rows(postgres, url), plain(Record.open(study.folder).status())
    writes = [
        lambda: silent.report(0, 1, {"score": 0.5}, lambda: None),
        lambda: silent.start(0),
        lambda: silent.complete(0),
        lambda: silent.fail(0, "an egg was bad"),
        lambda: silent.pause(0, "an egg was bad"),
        lambda: silent.ask({}, lambda number: {}),
        lambda: silent.set_budget(99),
        lambda: silent._study.enqueue_trial({}),
    ]
    for write in writes:
        with pytest.raises(LeaseLostError, match="another one has taken the study over"):
            write()
    assert (rows(postgres, url), plain(Record.open(study.folder).status())) == before
    assert study.record.report(0, 1, {"score": 0.5}, lambda: None) is None


@pytest.mark.slow
def test_a_driver_that_is_frozen_within_a_write_keeps_nobody_out(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(tmp_path, url)
    study.begin()
    frozen, thaws, is_within = study.record, threading.Event(), threading.Event()
    errors: list[BaseException] = []

    whole, freezes = pg._put, iter([True])

    def freeze(*arguments: Any) -> None:
        whole(*arguments)
        if next(freezes, False):
            is_within.set()
            thaws.wait(60)

    monkeypatch.setattr(pg, "_put", freeze)

    def write() -> None:
        try:
            frozen.report(0, 1, {"score": 0.25}, lambda: None)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    assert is_within.wait(10)
    study.kill()
    started = time.monotonic()
    study.take_over()
    study.record.report(0, 1, {"score": 0.75}, lambda: None)
    assert time.monotonic() - started < 15
    thaws.set()
    thread.join(30)
    assert [type(error) for error in errors] == [LeaseLostError], errors
    assert Record.open(study.folder).trials()[0].reports[0].metrics == {"score": 0.75}


# ---- a bad server


def test_a_connection_cut_within_a_report_loses_nothing_and_doubles_nothing(
    postgres: Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(tmp_path, url)
    study.begin()
    whole, cuts = pg._put, iter([False, True])

    def cut(session: Any, *arguments: Any) -> None:
        if next(cuts, False):
            postgres.sql("postgres", f"SELECT pg_terminate_backend({backend_of(session)})")
        whole(session, *arguments)

    monkeypatch.setattr(pg, "_put", cut)
    assert study.report(0, 1, 0.5)
    assert next(cuts, None) is None
    assert [report.metrics for report in Record.open(study.folder).trials()[0].reports] == [{"score": 0.5}]


def backend_of(session: Any) -> int:
    return int(session.connection().connection.dbapi_connection.info.backend_pid)


@pytest.mark.parametrize(("doing", "commit"), [("create", 1), ("end", 3), ("ask again", 2)])
def test_a_commit_whose_answer_was_lost_is_not_done_twice(
    doing: str, commit: int, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`commit`: which one of what is done so, the one that cannot be done twice."""
    study = Study(tmp_path, url, budget={"trials": 2})
    if doing != "create":
        study.begin()
    if doing == "ask again":
        study.record.pause_all("interrupted")
    losses = iter([number == commit for number in range(1, commit + 1)])

    dialect = study.record._storage._backend.engine.dialect  # type: ignore[union-attr]
    whole = dialect.do_commit

    def lose(connection: Any) -> None:
        whole(connection)
        if next(losses, False):
            raise psycopg.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(dialect, "do_commit", lose)
    if doing == "end":
        study.record.fail(0, "an egg was bad")
        assert [trial.state for trial in study.record.trials()] == ["failed"]
    else:
        asked = study.record.ask(study.driver._distributions, lambda number: {})
        assert asked is not None and asked.number == 0
        assert len(Record.open(study.folder).trials()) == 1
    assert next(losses, None) is None


def test_a_server_that_is_away_is_waited_for_and_then_told_of(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pg, "PATIENCE_S", 1.0)
    server = Server()
    try:
        study = Study(tmp_path, server.database("tune"))
        study.begin()
        server.stop()
        started = time.monotonic()
        with pytest.raises(RecordUnavailableError, match="Connection refused"):
            study.record.report(0, 1, {"score": 0.5}, lambda: None)
        assert 1.0 < time.monotonic() - started < 5.0
        with pytest.raises(RecordUnavailableError):  # at once: whoever ends now writes what it can
            study.record.pause_all("interrupted")
        assert time.monotonic() - started < 6.0
        server.start()
        study.record.report(0, 1, {"score": 0.5}, lambda: None)
        assert len(study.record.trials()[0].reports) == 1
    finally:
        server.close()


def test_a_check_of_a_new_database_leaves_nothing_in_it(postgres: Server, url: str, tmp_path: Path) -> None:
    found = check_of(url, tmp_path)
    assert found.ok and found.found.startswith("PostgreSQL ") and f"at {url} can be written; 0 studies" in found.found
    assert postgres.sql(url.rpartition("/")[2], "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == [(0,)]
    HandDriven(tmp_path / "made", record=url)
    assert check_of(url, tmp_path).found.endswith("; 1 study in it")
    assert rows(postgres, url)["studies"] == 1


@pytest.mark.parametrize(
    ("url_of", "found", "advice"),
    [
        (lambda server: "postgresql://x@127.0.0.1:1/tune", "Connection refused", "a PostgreSQL server"),
        (lambda server: "postgresql://x@no.such.host/tune", "failed to resolve host", "a PostgreSQL server"),
        (lambda server: server.url("nowhere"), 'database "nowhere" does not exist', "createdb"),
        (lambda server: server.url("postgres", "nobody"), 'role "nobody" does not exist', "createuser"),
        (lambda server: server.url("postgres", "baker"), "password", "PGPASSWORD, or in ~/.pgpass"),
        (lambda server: server.url("postgres", "clear"), "cleartext", "PGREQUIREAUTH=password"),
    ],
)
def test_a_database_that_cannot_be_used_is_told_with_what_helps(
    url_of: Any, found: str, advice: str, postgres: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", "Stale-loaf-of-bread")
    check = check_of(url_of(postgres), tmp_path)
    assert not check.ok and found in check.found and advice in check.advice
    assert [problem.place for problem in check.problems] == ["record"]
    assert "Stale" not in str(check) and "\n" not in check.found


def test_the_password_comes_from_the_environment_or_from_pgpass_and_goes_nowhere(
    postgres: Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = url.rpartition("/")[2]
    postgres.sql(name, "GRANT CREATE ON SCHEMA public TO baker")
    passwords = tmp_path / "pgpass"
    passwords.write_text(f"127.0.0.1:{postgres.port}:*:baker:{PASSWORD}\n")
    passwords.chmod(0o600)
    for variable, value in (("PGPASSFILE", str(passwords)), ("PGPASSWORD", PASSWORD)):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            folder = tmp_path / variable
            study = HandDriven(folder, record=postgres.url(name, "baker"))
            study.run(0.5)
            assert Record.open(study.folder).status().best is not None
            database._shared.clear()
            kept = [path for path in folder.rglob("*") if path.is_file() and path.name != "pgpass"]
            assert kept and all(PASSWORD not in path.read_text(errors="replace") for path in kept)
    assert not any(PASSWORD in row[0] for row in postgres.sql(name, "SELECT value_json FROM study_user_attributes"))


def test_a_role_that_may_only_read_looks_at_studies_and_drives_none(
    postgres: Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = HandDriven(tmp_path, record=url)
    study.run(0.5)
    study.kill()
    name = url.rpartition("/")[2]
    postgres.sql(name, "GRANT SELECT ON ALL TABLES IN SCHEMA public TO baker")
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    path = study.folder.pointer
    path.write_text(path.read_text().replace("postgres@", "baker@"))
    assert Record.open(study.folder).status().best is not None
    check = check_of(postgres.url(name, "baker"), tmp_path)
    assert "permission denied" in check.found and "GRANT" in check.advice
    with study.folder.driving() as lease, pytest.raises(RecordUnavailableError, match="permission denied"):
        Record.open(study.folder, study._sampler(), lease)


def test_tables_of_another_version_of_optuna_are_told(postgres: Server, url: str, tmp_path: Path) -> None:
    study = HandDriven(tmp_path, record=url)
    study.kill()
    postgres.sql(url.rpartition("/")[2], "UPDATE alembic_version SET version_num = 'v3.0.0.d'")
    check = check_of(url, tmp_path)
    assert "no longer compatible" in check.found and "optuna storage upgrade" in check.advice
    with pytest.raises(RecordUnavailableError, match="no longer compatible"), study.folder.driving() as lease:
        Record.open(study.folder, None, lease)


def test_a_list_waits_once_for_a_host_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def away(url: str) -> RDBStorage:
        tried.append(url)
        raise database.refusal(url, RuntimeError("timeout expired"))

    monkeypatch.setattr(database, "opened", away)
    for _ in range(3):
        with pytest.raises(RecordUnavailableError, match="timeout expired"):
            database.shared("postgresql://nowhere/tune")
    assert tried == ["postgresql://nowhere/tune"]


def test_a_database_without_an_encoding_serves_as_well(postgres: Server, tmp_path: Path) -> None:
    postgres.sql("postgres", "CREATE DATABASE plain TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'")
    study = HandDriven(tmp_path, record=postgres.url("plain"), search_space={"größe": {"choice": ["süß", 1]}})
    study.run(0.5)
    assert "größe" in study.params()[0]
