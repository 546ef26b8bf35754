"""A study that is followed from afar: what is put together is what is there, and little of it travels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hand_driven import HandDriven

from tune_service.status import Moment
from tune_service.studies import is_in, to_ranges
from tune_service.views import FarStudy, ViewNews


def carried(document: dict[str, Any] | None) -> dict[str, Any]:
    assert document is not None, "there is something new"
    found: dict[str, Any] = json.loads(json.dumps(document))
    return found


def test_the_far_view_is_the_study_at_every_moment_and_says_what_changed(tmp_path: Path) -> None:
    study, far = HandDriven(tmp_path), FarStudy()
    news = ViewNews()
    moment: Moment = ()
    expected: list[list[int]] = [[0], [0], [1], [0, 1], [1]]
    number = study.begin()
    for step, changed in enumerate(expected):
        view = far.take(carried(news.of(study.record)))
        assert view.status() == study.record.status()
        now, moment = view.changed(moment)
        assert [trial.number for trial in now] == changed
        assert news.of(study.record) is None  # nothing has happened meanwhile
        match step:
            case 0:
                study.report(number, 1, 0.5, num_bytes=10)
            case 1:
                study.begin()
            case 2:
                study.report(number, 2, 0.6, num_bytes=10)
                study.report(1, 1, 0.1, num_bytes=10)
            case 3:
                study.report(1, 2, 0.2, num_bytes=10)


def test_a_new_question_goes_on_from_what_is_known(tmp_path: Path) -> None:
    study, far = HandDriven(tmp_path, budget={"trials": 200}), FarStudy()
    for _ in range(120):
        study.run(0.5)
    far.take(carried(ViewNews().of(study.record)))
    assert [len(digest) for digest in far.known()] == [16] * 3
    again = carried(ViewNews(far.known()).of(study.record))
    assert again["trials"] == []
    assert far.take(again).status() == study.record.status()
    study.run(0.7)
    again = carried(ViewNews(far.known()).of(study.record))
    assert [trial["number"] for trial in again["trials"]] == list(range(100, 121))  # its block
    assert far.take(again).status() == study.record.status()


def test_a_study_that_was_deleted_and_made_anew_is_shown_without_the_old_ones_trials(tmp_path: Path) -> None:
    old, new, far = HandDriven(tmp_path / "old"), HandDriven(tmp_path / "new"), FarStudy()
    for _ in range(5):
        old.run(0.5)
    assert len(far.take(carried(ViewNews().of(old.record))).trials()) == 5
    new.run(0.7)
    new.begin()
    view = far.take(carried(ViewNews(far.known()).of(new.record)))
    assert view.status() == new.record.status()
    assert len(view.trials()) == 2


@pytest.mark.slow
def test_following_a_study_of_a_thousand_trials_sends_them_once(tmp_path: Path) -> None:
    study, far = HandDriven(tmp_path, budget={"trials": 1010}, sampler={"name": "random"}), FarStudy()
    for _ in range(1000):
        study.run(0.5, 0.6, 0.7)
    news = ViewNews()
    whole = carried(news.of(study.record))
    assert len(json.dumps(whole)) > 300_000
    far.take(whole)
    number, sent = study.begin(), 0
    for epoch in range(1, 10):
        study.report(number, epoch, 0.8)
        sent += len(json.dumps(carried(news.of(study.record))))
    assert sent < 20_000  # nine changes
    assert len(json.dumps(carried(ViewNews(far.known()).of(study.record)))) < 50_000  # a new question
    assert len(json.dumps(far.known())) < 500  # and what it takes along


def test_ranges_stay_short_however_many_trials_have_ended() -> None:
    assert to_ranges([3, 1, 2, 7, 9, 8]) == [[1, 3], [7, 9]]
    assert to_ranges(range(5000)) == [[0, 4999]]
    assert to_ranges([]) == []
    assert [is_in([[1, 3], [7, 9]], number) for number in (0, 1, 3, 4, 8)] == [False, True, True, False, True]
