"""How many reports a second a record holds, each durable (synced to the disk) before the next, beside its peers.

    python tests/benchmarks/bench_record.py [--reports 1000] [--folder DIR]

A report is an epoch's 7 metrics and its objective. Ours keeps both with one append. The peers do what Optuna's own API
does for the same: a user attribute and an intermediate value, in a JournalFileBackend with its default lock and in an
SQLite RDBStorage. `append_and_fsync` is the same number of bytes appended to a bare file: the disk's own limit.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from machine import show
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from search_spaces import parse_domain
from tune_service.record import Record, direction_of
from tune_service.searcher import StudySampler, distributions
from tune_service.storage import Storage

EPOCHS = 10
METRICS = dict.fromkeys(("train_loss", "train_accuracy", "eval_loss", "eval_accuracy", "epoch_s", "tokens_per_s"), 0.51)
METRICS["score"] = 0.5
DOMAINS = {"x": {"uniform": [0.0, 1.0]}}
optuna.logging.set_verbosity(optuna.logging.ERROR)


def ours(folder: Path, reports: int) -> Callable[[], None]:
    spec = {"objective": {"metric": "score", "mode": "max"}, "search_space": DOMAINS, "budget": {"trials": reports}}
    record = Record.create(Storage(folder).create("ours"), spec, StudySampler("random", 0, direction_of("max")))
    space = distributions({name: parse_domain(domain) for name, domain in DOMAINS.items()})  # type: ignore[arg-type]
    for number in range(reports // EPOCHS):
        record.ask(space, lambda _: {})
        record.start(number)

    def write() -> None:
        for number in range(reports // EPOCHS):
            for epoch in range(1, EPOCHS + 1):
                record.report(number, epoch, METRICS, lambda: None)

    return write


def peer(storage: BaseStorage, reports: int) -> Callable[[], None]:
    study = optuna.create_study(storage=storage)
    trials = [study.ask() for _ in range(reports // EPOCHS)]

    def write() -> None:
        for trial in trials:
            for epoch in range(1, EPOCHS + 1):
                trial.set_user_attr(f"report:{epoch}", {"metrics": METRICS})
                trial.report(METRICS["score"], epoch)

    return write


def bare(file: Path, num_bytes: int, reports: int) -> Callable[[], None]:
    def write() -> None:
        with file.open("ab") as out:
            for _ in range(reports):
                out.write(b"x" * num_bytes)
                out.flush()
                os.fsync(out.fileno())

    return write


def per_second(write: Callable[[], None], reports: int) -> float:
    started = time.perf_counter()
    write()
    return round(reports / (time.perf_counter() - started), 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        root, count = Path(temporary), options.reports
        num_bytes = len(json.dumps(METRICS)) + 400
        journal = JournalStorage(JournalFileBackend(str(root / "optuna.journal")))
        sqlite = RDBStorage(f"sqlite:///{root / 'optuna.db'}")
        found: dict[str, Any] = {
            "append_and_fsync": per_second(bare(root / "bare", num_bytes, count), count),
            "ours": per_second(ours(root, count), count),
            "optuna_journal": per_second(peer(journal, count), count),
            "optuna_sqlite": per_second(peer(sqlite, min(count, 200)), min(count, 200)),
        }
        ratios = {f"ours_over_{name}": round(found["ours"] / found[name], 2) for name in found if name != "ours"}
        show("record", reports=count, reports_per_s=found, **ratios)
