"""Answers in a job's log."""

from __future__ import annotations

from tune_service.frames import decode, encode, newest


def test_an_answer_is_told_from_what_libraries_print() -> None:
    log = "noise without an end" + encode("word", 1, {"a": "\n"}) + 'other {"b": 1}\n word 2' + encode("word", 2, [1])
    assert decode("word", log) == ([{"a": "\n"}, [1]], 2)


def test_an_answer_that_is_not_whole_yet_comes_with_the_next_look() -> None:
    log = encode("word", 1, "a") + encode("word", 2, "b")
    for cut in range(len(log) + 1):
        first, number = decode("word", log[:cut])
        assert first + decode("word", log, number)[0] == ["a", "b"]


def test_the_end_of_a_log_gives_what_follows_on_and_nothing_after_a_gap() -> None:
    frames = [encode("word", number, number) for number in range(1, 5)]
    assert decode("word", "".join(frames[2:]), after=2) == ([3, 4], 4)
    assert decode("word", "".join(frames[2:]), after=1) == ([], 1)
    assert decode("word", "".join(frames), after=3) == ([4], 4)


def test_the_last_line_tells_whether_there_is_anything_new() -> None:
    log = encode("word", 7, {"much": "x" * 1000})
    assert newest("word", log.splitlines()[-1] + "\n") == 7
    assert newest("word", log + "noise\n") is None
    assert newest("other", log) is None
    assert newest("word", "") is None
