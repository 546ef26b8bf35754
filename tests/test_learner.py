"""What a warm process keeps from trial to trial, and that a trial cannot tell it from new."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from trainables import Context, Report, learner, optimizer, products
from trainables.finetune import Run, finetune
from tune_service.demo import write_pairs, write_tokenizer

Settings = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu() -> Iterator[None]:
    environment, threads = dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    learner._kept.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Settings]:
    folder = tmp_path_factory.mktemp("inputs")
    write_pairs(folder / "data", num_train=70, num_validation=20)
    write_tokenizer(folder / "tokenizer")

    def make(dropout: float = 0.1, **training: Any) -> Settings:
        sizes = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "dropout": dropout}
        fixed = {"max_epochs": 2, "batch_size": 16, "max_length": 32, "learning_rate": 3e-3, "precision": "fp32"}
        return {
            "model": {"name": str(folder / "tokenizer"), "from_scratch": True, "config": sizes},
            "data": {"path": str(folder / "data"), "text": ["sentence1", "sentence2"]},
            "training": fixed | training,
        }

    return make


def reports(settings: Settings, seed: int = 42) -> Iterator[Report]:
    return finetune(Context({}, seed=seed, max_epochs=settings["training"]["max_epochs"], settings=settings))


def curve(settings: Settings, seed: int = 42) -> list[dict[str, float]]:
    clock = ("epoch_s", "tokens_per_s")
    return [{k: v for k, v in report.metrics.items() if k not in clock} for report in reports(settings, seed)]


def as_new(settings: Settings, seed: int = 42) -> list[dict[str, float]]:
    learner._kept.clear()
    return curve(settings, seed)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a model is built."""
    calls: list[int] = []
    build = learner.build_model
    monkeypatch.setattr(learner, "build_model", lambda *arguments: calls.append(1) or build(*arguments))
    return calls


def test_the_next_trial_builds_nothing_and_gives_what_a_new_model_gives_bit_by_bit(
    settings: Callable[..., Settings], built: list[int]
) -> None:
    others = [
        {"learning_rate": 1e-3, "weight_decay": 0.3, "warmup_fraction": 0.5, "max_grad_norm": None},
        {"batch_size": 8},
        {"max_length": 24},
        {"precision": "bf16"},
    ]
    expected = [as_new(settings(**other)) for other in others]
    first = as_new(settings())
    built.clear()
    assert [curve(settings(**other)) for other in others] == expected
    assert curve(settings()) == first
    assert built == []


def test_bf16_copies_of_weights_change_no_number_of_a_trial(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[bool, bool]] = []
    step = optimizer.AdamW.step

    def noting(self: optimizer.AdamW) -> None:
        trained.extend((copy.grad is not None, weight.grad is not None) for weight, copy in self._copies.items())
        step(self)

    monkeypatch.setattr(optimizer.AdamW, "step", noting)
    found = as_new(settings(precision="bf16"))
    assert set(trained) == {(True, False)}, "gradients of copies, and none of what they are copies of"
    monkeypatch.setattr(products, "autocast_weights", lambda network: {})
    expected = as_new(settings(precision="bf16"))
    for mine, reference in zip(found, expected, strict=True):
        assert mine == pytest.approx(reference, rel=1e-4)  # the norm is summed up in another order
    assert not learner._kept[0].optimizer._copies


def test_bf16_copies_are_those_of_the_trial_whatever_ran_before(settings: Callable[..., Settings]) -> None:
    first = as_new(settings(precision="bf16"))
    others = [{"precision": "fp32"}, {"precision": "bf16", "micro_batch_size": 4}, {"learning_rate": 0.1}]
    for other in others:
        curve(settings(**other), seed=5)
        assert curve(settings(precision="bf16")) == first


@pytest.mark.parametrize("is_warm", [True, False])
def test_a_trial_with_bf16_copies_goes_on_as_if_it_had_not_been_cut(
    settings: Callable[..., Settings], tmp_path: Path, is_warm: bool
) -> None:
    spec = settings(precision="bf16", max_epochs=3)
    learner._kept.clear()
    losses = []
    for report in reports(spec):
        losses.append(report.metrics["train_loss"])
        if report.epoch == 1 and report.save is not None:
            report.save(tmp_path)
    if not is_warm:
        learner._kept.clear()
    resumed = finetune(Context({}, seed=42, max_epochs=3, settings=spec, resume_from=tmp_path))
    assert [report.metrics["train_loss"] for report in resumed] == losses[1:]


def test_a_model_on_a_gpu_is_saved_from_host_memory_that_stays_and_tied_weights_stay_tied(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner._kept.clear()
    next(reports(settings()))
    found = learner._kept[0]
    monkeypatch.setattr(found, "kind", replace(found.kind, device=torch.device("cuda")))
    embeddings = found.network.transformer.wte
    monkeypatch.setattr(found.network, "twin", embeddings, raising=False)
    first = found.state_on_host()
    assert first.keys() == found.network.state_dict().keys()
    assert first["twin.weight"] is first["transformer.wte.weight"]
    with torch.no_grad():
        embeddings.weight[0] = 7.0
    assert not (first["twin.weight"][0] == 7.0).any(), "a copy"
    second = found.state_on_host()
    assert all(second[name] is tensor for name, tensor in first.items()), "the same memory"
    assert all(torch.equal(second[name], tensor) for name, tensor in found.network.state_dict().items())


def test_what_is_saved_of_a_model_is_its_state_on_the_host(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state_of = learner.Learner.state_on_host
    halves = lambda found: {name: tensor / 2 for name, tensor in state_of(found).items()}  # noqa: E731
    trial = reports(settings())
    report = next(trial)
    assert report.save_model is not None
    report.save_model(tmp_path / "as-it-is")
    monkeypatch.setattr(learner.Learner, "state_on_host", halves)
    report.save_model(tmp_path / "halves")
    whole, half = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("as-it-is", "halves"))
    assert whole.keys() == half.keys() and all(torch.equal(half[name], whole[name] / 2) for name in whole)


def test_micro_batches_add_up_gradients_in_fp32(settings: Callable[..., Settings]) -> None:
    as_new(settings(precision="bf16", micro_batch_size=4))
    assert not learner._kept[0].optimizer._copies


def test_a_trial_that_was_left_leaves_nothing_behind(settings: Callable[..., Settings], built: list[int]) -> None:
    first = as_new(settings())
    built.clear()
    left = reports(settings(learning_rate=0.1))
    next(left)
    left.close()  # type: ignore[attr-defined]
    assert curve(settings()) == first
    assert built == []


def test_another_seed_draws_new_weights_into_the_same_tensors(
    settings: Callable[..., Settings], built: list[int]
) -> None:
    expected = as_new(settings(), seed=7)
    assert as_new(settings()) != expected
    places = [parameter.data_ptr() for parameter in learner._kept[0].network.parameters()]
    built.clear()
    assert curve(settings(), seed=7) == expected
    assert [parameter.data_ptr() for parameter in learner._kept[0].network.parameters()] == places
    assert built == [1]


def test_another_dropout_is_another_model(settings: Callable[..., Settings]) -> None:
    expected = as_new(settings(dropout=0.5))
    assert as_new(settings()) != expected
    assert curve(settings(dropout=0.5)) == expected


def test_two_trials_at_once_in_a_process_do_not_share_a_model(settings: Callable[..., Settings]) -> None:
    expected = as_new(settings(dropout=0.0))
    one, two = reports(settings(dropout=0.0)), reports(settings(dropout=0.0))
    both = [(next(one).metrics["train_loss"], next(two).metrics["train_loss"]) for _ in range(2)]
    assert both == [(each["train_loss"], each["train_loss"]) for each in expected]


def test_few_shapes_of_batches_are_kept(settings: Callable[..., Settings]) -> None:
    learner._kept.clear()
    for size in range(8, 8 + learner.MAX_READY + 2):
        curve(settings(batch_size=size, max_epochs=1))
    kept = learner._kept[0]
    assert len(kept._ready) == learner.MAX_READY
    for key in range(learner.MAX_READY):
        kept.ready(key, lambda: "made first")
    kept.ready(0, lambda: "made again"), kept.ready("one more", lambda: "made first")
    assert [kept.ready(key, lambda: "made again") for key in (0, 2, 1)] == ["made first", "made first", "made again"]


@pytest.mark.parametrize(
    ("device", "num_steps", "choice", "compiles"),
    [
        ("cuda", 1_000, "auto", False),
        ("cuda", 60_000, "auto", True),
        ("cuda", 1_000, "on", True),
        ("cuda", 60_000, "off", False),
        ("cpu", 60_000, "auto", False),
    ],
)
def test_auto_compiles_where_one_trial_is_long_enough_to_pay(
    settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    num_steps: int,
    choice: str,
    compiles: bool,
) -> None:
    from trainables.config import FinetuneConfig

    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    run = object.__new__(Run)
    run.config = FinetuneConfig(**settings(compile=choice))
    run.device = torch.device(device)
    assert run._compiles(num_steps) is compiles


@pytest.mark.slow
def test_compiled_layers_train_as_plain_ones_do(settings: Callable[..., Settings]) -> None:
    plain = as_new(settings(dropout=0.0))
    for ours, theirs in zip(as_new(settings(dropout=0.0, compile="on")), plain, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
