"""Secrets are told by the names of variables and keys and by their looks, and plain words are left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from hand_driven import HandDriven

from trainables.errors import Problem
from trainables.redaction import names_secret, redacted, secret_places
from tune_service.errors import SpecError
from tune_service.spec import load_spec, parse_spec

LOOKS = [
    "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ01234567",
    "sk-proj-aBcDeFgHiJkLmNoPqRsT",
    "sk-aBcDeFgHiJkLmNoPqRsT012345",
    "ghp_aBcDeFgHiJkLmNoPqRsTuVwXyZ0123456789",
    "AKIAIOSFODNN7EXAMPLE",
    "https://someone:passw0rd@example.org/data",
    "postgresql://someone:pass/w0rd@example.org/data",
]


@pytest.mark.parametrize(
    "name",
    "token hf_token HF_TOKEN authToken api_key API_KEY openai-api-key aws_secret_access_key password db_password"
    " client_secret private_key credentials PGPASSWORD sslpassword".split(),
)
def test_a_key_that_is_plainly_one_of_a_secret(name: str) -> None:
    assert names_secret(name)


@pytest.mark.parametrize(
    "name",
    "pad_token eos_token mask_token max_tokens num_tokens tokens_per_s tokenizer token_ids sort_key key num_keys"
    " secretary x author monkey".split(),
)
def test_a_key_that_is_none(name: str) -> None:
    assert not names_secret(name)


@pytest.mark.parametrize("secret", LOOKS)
def test_what_looks_like_a_secret_is_hidden_and_the_rest_stays(secret: str) -> None:
    hidden = redacted(f"403 for {secret} at epoch 2")
    assert hidden.startswith("403 for ") and hidden.endswith(" at epoch 2") and "***" in hidden
    assert "passw0rd" not in hidden and secret not in hidden


@pytest.mark.parametrize(
    "text",
    ["hf_checkpoint_v2", "sk-learn", "risk-adjusted", "https://example.org:8080/a@b", "AKIA", "gpt2", "/data/hf_hub"],
)
def test_what_only_begins_like_one_stays(text: str) -> None:
    assert redacted(text) == text


def test_values_of_variables_with_a_secrets_name_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "plainlookingvalue")
    monkeypatch.setenv("MY_OTHER_TOKEN", "plainlookingvalue-and-more")
    monkeypatch.setenv("DB_PASSWORD", "short")
    monkeypatch.setenv("MAX_TOKENS", "123456789")
    monkeypatch.setenv("AUTH_TOKEN_PATH", "/home/someone/token")
    text = "plainlookingvalue, plainlookingvalue-and-more, short, 123456789, /home/someone/token"
    assert redacted(text) == "***, ***, short, 123456789, /home/someone/token"


def test_a_problem_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "0123456789abcdef")
    problem = Problem("trainable", "can be imported", "ValueError: bad key 0123456789abcdef", "another")
    assert problem.to_json()["found"] == "ValueError: bad key ***"


@pytest.mark.parametrize("way", ["complete", "pruned", "failed", "paused", "study"])
def test_no_reason_in_the_record_holds_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setenv("SOME_API_KEY", "0123456789abcdef")
    study = HandDriven(tmp_path, faults={"restarts_per_trial": 0})
    reason = "rank 0 raised HTTPError: 401 for 0123456789abcdef"
    number = study.begin()
    if way == "pruned":
        study.record.prune(number, reason)
    elif way == "failed":
        study.fail(number, reason)
    elif way == "study":
        study.record.set_failure(reason)
    else:
        study.end(reason)
    text = study.folder.journal.read_text()
    assert "401 for ***" in text and "0123456789abcdef" not in text


# ---- specs

SPEC = """
name: toy
trainable: toy_module:train
training: {{max_epochs: 2, {training}}}
search_space: {{x: {{uniform: [0.0, 1.0]}}}}
objective: {{metric: score}}
"""


def problems_of(tmp_path: Path, training: str, *overrides: str) -> tuple[Problem, ...]:
    file = tmp_path / "spec.yaml"
    file.write_text(SPEC.format(training=training))
    with pytest.raises(SpecError) as refusal:
        load_spec(file, overrides)
    return refusal.value.problems


@pytest.mark.parametrize(
    "training",
    ["api_key: abc-123", "inner: {hf_token: abc-123}", "passwords: 1, password: [x, abc-123]"]
    + [f"note: '{looks}'" for looks in LOOKS],
)
def test_a_spec_with_a_secret_is_refused_without_a_word_of_the_secret(tmp_path: Path, training: str) -> None:
    problems = problems_of(tmp_path, training)
    assert {problem.rule for problem in problems} == {"a spec holds no secret: its study keeps and exports it"}
    assert "environment variable" in problems[0].expected
    assert "spec.yaml:4 training." in problems[0].place
    for part in ("abc-123", "passw0rd", "aBcDeF", "AKIAIO"):
        assert part not in str(problems)


def test_no_other_fault_of_the_spec_shows_the_secret_either(tmp_path: Path) -> None:
    problems = problems_of(tmp_path, "x: 1", "model.api_key=abc-123", "budget=[{password: abc-123}]", "bogus=1")
    assert "abc-123" not in str(problems)
    shown = [problem.found for problem in problems if problem.rule == "`budget` is a mapping"]
    assert shown == ['[{"password": "***"}]']


def test_a_value_of_the_environment_is_no_less_a_secret_in_a_spec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "plainlookingvalue")
    (problem,) = problems_of(tmp_path, "greeting: 'use plainlookingvalue here'")
    assert "training.greeting" in problem.place and "plainlooking" not in str(problem)


def test_a_spec_of_a_record_is_not_looked_through_again(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"name": "toy", "trainable": "a:b", "search_space": {"x": {"uniform": [0.0, 1.0]}}}
    spec["training"] = {"max_epochs": 2, "greeting": "plainlookingvalue"}
    monkeypatch.setenv("SOME_API_KEY", "plainlookingvalue")
    assert parse_spec(spec, here=False).training_values["greeting"] == "plainlookingvalue"
    with pytest.raises(SpecError):
        parse_spec(spec)


def test_places_are_found_in_lists_and_in_lists_that_hold_themselves() -> None:
    around: list[object] = ["fine", {"secret": "x"}]
    around.append(around)
    assert list(secret_places({"a": around})) == ["a[1].secret"]
