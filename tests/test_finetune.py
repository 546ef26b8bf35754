"""Fine-tuning of tiny models, on one rank here and on two ranks in processes of their own."""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainables import Context, Report
from trainables.checkpoint import CheckpointStore
from trainables.config import DataConfig
from trainables.errors import TrialError, UserError
from trainables.glue import TASKS, metric_names
from trainables.worker import RankWorker, Task
from tune_service.demo import write_pairs, write_tokenizer

ANSWER_WITHIN_S = 200
CLOCK = {"epoch_s", "tokens_per_s"}
"""Metrics that no seed fixes."""

Curve = list[dict[str, float]]


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu() -> Iterator[None]:
    """This process is a rank without a GPU, with one thread, and leaves its process group at the end."""
    environment = dict(os.environ)
    os.environ |= {"TUNE_SERVICE_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    import torch
    import torch.distributed as dist

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Film reviews: `data` of 96 and 41 rows, `odd` of 97, `tokenizer`."""
    folder = tmp_path_factory.mktemp("inputs")
    write_pairs(folder / "data", num_train=96, num_validation=41)
    write_pairs(folder / "odd", num_train=97, num_validation=41)
    write_tokenizer(folder / "tokenizer")
    return folder


Settings = dict[str, Any]


@pytest.fixture
def settings(inputs: Path) -> Callable[..., Settings]:
    """The settings of a tiny GPT-2 with dropout 0 and fp32; keywords change `training`, data or model."""

    def make(data: dict[str, Any] | None = None, config: dict[str, Any] | None = None, **training: Any) -> Settings:
        sizes = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 64, "dropout": 0.0}
        fixed = {"max_epochs": 3, "batch_size": 32, "max_length": 32, "learning_rate": 3e-3, "precision": "fp32"}
        return {
            "model": {"name": str(inputs / "tokenizer"), "from_scratch": True, "config": sizes | (config or {})},
            "data": data or {"path": str(inputs / "data"), "text": ["sentence1", "sentence2"]},
            "training": fixed | training,
        }

    return make


def reports_of(settings: Settings, resume_from: Path | None = None, seed: int = 42) -> Iterator[Report]:
    from trainables.finetune import finetune

    max_epochs = settings["training"]["max_epochs"]
    return finetune(Context({}, seed=seed, max_epochs=max_epochs, settings=settings, resume_from=resume_from))


def without_clock(metrics: Any) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name not in CLOCK}


def curve(settings: Settings, **options: Any) -> Curve:
    return [without_clock(report.metrics) for report in reports_of(settings, **options)]


def saved(settings: Settings, epoch: int, folder: Path, **options: Any) -> Report:
    """Runs up to an epoch and writes its checkpoint."""
    for report in reports_of(settings, **options):
        if report.epoch == epoch:
            assert report.save is not None
            folder.mkdir(parents=True, exist_ok=True)
            report.save(folder)
            return report
    raise AssertionError(f"no epoch {epoch}")


# ---- ranks in processes of their own


def serve(connection: Connection, rank: int, world_size: int) -> None:
    """One rank: does what it is asked until it is killed."""
    worker = RankWorker(rank, world_size, uses_gpu=False)
    while True:
        name, arguments = connection.recv()
        try:
            connection.send((getattr(worker, name)(*arguments), None))
        except TrialError as error:
            connection.send((None, str(error)))


class Ranks:
    """A worker group as it is without Ray: spawned processes, which stay warm."""

    def __init__(self, world_size: int, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        spawn = multiprocessing.get_context("spawn")
        pipes = [spawn.Pipe() for _ in range(world_size)]
        self._pipes = [pipe[0] for pipe in pipes]
        self.processes = [
            spawn.Process(target=serve, args=(pipe[1], rank, world_size), daemon=True)
            for rank, pipe in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        self._rendezvous = world_size > 1

    def ask(self, name: str, *arguments: Any) -> list[Any]:
        """The answers of all ranks, asked together."""
        for pipe in self._pipes:
            pipe.send((name, arguments))
        answers = []
        for pipe in self._pipes:
            assert pipe.poll(ANSWER_WITHIN_S), f"no answer to {name}"
            answer, error = pipe.recv()
            assert error is None, error
            answers.append(answer)
        return answers

    def curve(self, settings: Settings, resume_from: Path | None = None, save: tuple[int, Path] | None = None) -> Curve:
        """What rank 0 reports, after every rank has reported the same; `save` is (epoch, folder)."""
        if self._rendezvous:
            self._pipes[0].send(("listen", ("127.0.0.1",)))
            port, _ = self._pipes[0].recv()
            self.ask("rendezvous", "127.0.0.1", port)
            self._rendezvous = False
        self._number += 1
        task = Task(
            number=self._number,
            trainable="finetune",
            params={},
            seed=42,
            max_epochs=settings["training"]["max_epochs"],
            logs=str(self._folder),
            checkpoints="",
            settings=settings,
            resume_from=str(resume_from) if resume_from else None,
        )
        self.ask("begin", task)
        found: Curve = []
        while (reports := self.ask("next_report"))[0] is not None:
            metrics = [without_clock(report.metrics) for report in reports]
            assert all(each == metrics[0] for each in metrics)
            found.append(metrics[0])
            if save is not None and save[0] == reports[0].epoch:
                save[1].mkdir(parents=True)
                self.ask("save", str(save[1]))
        return found

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Ranks]]:
    """World size -> its ranks. Started together, since each imports torch."""
    started = {size: Ranks(size, tmp_path_factory.mktemp(f"logs-{size}")) for size in (1, 2)}
    yield started
    for ranks in started.values():
        ranks.end()


@pytest.fixture
def two(processes: dict[int, Ranks]) -> Ranks:
    return processes[2]


def assert_close(found: Curve, expected: Curve, tolerance: float = 1e-4) -> None:
    assert [each.keys() for each in found] == [each.keys() for each in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=tolerance)


# ---- what training does


def test_an_epoch_does_what_a_plain_loop_of_torchs_own_parts_does(settings: Callable[..., Settings]) -> None:
    import torch
    from torch.nn.utils import clip_grad_norm_
    from torch.nn.utils.rnn import pad_sequence

    from trainables.batches import epoch_batches
    from trainables.config import FinetuneConfig
    from trainables.finetune import Run

    chosen = settings(max_epochs=1, warmup_fraction=0.0, weight_decay=0.1, max_grad_norm=0.5)
    run = Run(Context({}, seed=42, max_epochs=1, settings=chosen), FinetuneConfig(**chosen))
    rows, labels, plain = run.data.train, run.data.train_labels, copy.deepcopy(run.learner.network).train()
    decaying, other = ([each for each in plain.parameters() if (each.ndim > 1) is wanted] for wanted in (True, False))
    optimizer = torch.optim.AdamW([{"params": decaying, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}])
    for step, batch in enumerate(epoch_batches(rows.lengths, 32, seed=42, epoch=1)):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 3)
        texts = [torch.from_numpy(rows.ids[rows.offsets[row] : rows.offsets[row + 1]]).long() for row in batch]
        ids = pad_sequence(texts, batch_first=True, padding_value=run.tokenizer.pad_token_id)
        mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        optimizer.zero_grad()
        plain(input_ids=ids, attention_mask=mask, labels=labels[batch]).loss.backward()
        clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
    run.train_epoch(1)
    for (name, ours), theirs in zip(run.learner.network.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5), name
    run.close()


# ---- the same curve


def test_a_seed_gives_the_same_curve_warm_and_in_a_fresh_process(
    settings: Callable[..., Settings], processes: dict[int, Ranks]
) -> None:
    dropout = settings(config={"dropout": 0.1})
    first = curve(dropout)
    assert curve(dropout) == first
    assert processes[1].curve(dropout) == first
    assert processes[1].curve(dropout) == first
    assert curve(dropout, seed=43) != first
    assert len(first) == 3 and first[2]["train_loss"] < first[0]["train_loss"]  # and something was learnt


@pytest.mark.parametrize(
    ("data", "training"),
    [
        ("data", {}),  # 3 steps of 32 rows
        ("odd", {}),  # a last step of 1 row: the second rank has none
        ("odd", {"batch_size": 10}),  # a last step of 7 rows, 4 on the first rank and 3 on the second
        ("odd", {"batch_size": 10, "micro_batch_size": 2}),  # 5 rows a rank in 3 forward passes
    ],
)
def test_two_ranks_give_the_curve_of_one(
    settings: Callable[..., Settings], inputs: Path, two: Ranks, data: str, training: dict[str, Any]
) -> None:
    source = {"task": "mrpc", "path": str(inputs / data)}
    assert_close(two.curve(settings(source, **training)), curve(settings(source, **training)))


def test_micro_batches_give_the_curve_of_the_whole_batch(settings: Callable[..., Settings], inputs: Path) -> None:
    source = {"task": "mrpc", "path": str(inputs / "odd")}
    whole = curve(settings(source))
    for size in (5, 32, 64):
        assert_close(curve(settings(source, micro_batch_size=size)), whole)


def test_every_training_row_counts_once_also_in_a_last_batch_of_another_size(
    settings: Callable[..., Settings], inputs: Path
) -> None:
    """With a learning rate of next to nothing, the mean loss over 97 rows does not depend on how they are cut."""
    source = {"task": "mrpc", "path": str(inputs / "odd")}
    losses = [
        curve(settings(source, batch_size=size, learning_rate=1e-12, max_epochs=1))[0]["train_loss"]
        for size in (10, 32, 97, 200)
    ]
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-5)


def test_the_learning_rate_follows_the_schedule_whatever_the_world_size(
    settings: Callable[..., Settings], two: Ranks
) -> None:
    linear = settings(warmup_fraction=0.0, learning_rate=0.009)
    # 9 steps; the last of each epoch is step 2, 5 and 8 from 0: 7/9, 4/9 and 1/9 of the peak.
    expected = pytest.approx([0.007, 0.004, 0.001])
    assert [each["learning_rate"] for each in curve(linear)] == expected
    assert [each["learning_rate"] for each in two.curve(linear)] == expected


def test_the_schedule_counts_the_smaller_last_batch_of_each_epoch(
    settings: Callable[..., Settings], inputs: Path
) -> None:
    odd = settings({"task": "mrpc", "path": str(inputs / "odd")}, warmup_fraction=0.0, learning_rate=0.012)
    # 12 steps; the last of each epoch is step 3, 7 and 11 from 0.
    assert [each["learning_rate"] for each in curve(odd)] == pytest.approx([0.009, 0.005, 0.001])


def test_the_seed_of_training_orders_the_rows(settings: Callable[..., Settings]) -> None:
    first, other = (curve(settings(seed=seed, max_epochs=1)) for seed in (42, 43))  # of the same weights
    assert first != other


# ---- evaluation and export


def plain_logits(model_folder: Path, data: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """The logits of an exported model, one row at a time as anybody would ask for them, and the labels."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from trainables.data import read_texts

    model = AutoModelForSequenceClassification.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    split = read_texts(data).splits["validation"]
    with torch.inference_mode():
        rows = [model(**tokenizer(*texts, truncation=True, return_tensors="pt")).logits[0] for texts in split.texts]
    return torch.stack(rows).numpy().astype(np.float64), split.labels


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float((np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]).mean())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_exported_model_scores_exactly_what_was_reported(
    settings: Callable[..., Settings], inputs: Path, two: Ranks, tmp_path: Path, world_size: int, precision: str
) -> None:
    from trainables.score import score

    source = {"task": "mrpc", "path": str(inputs / "odd")}
    folder = tmp_path / "checkpoint"
    if world_size == 2:
        metrics = two.curve(settings(source, precision=precision), save=(2, folder))[1]
    else:
        metrics = without_clock(saved(settings(source, precision=precision), 2, folder).metrics)
    logits, labels = plain_logits(folder / "model", DataConfig(**source))
    predicted = logits.argmax(axis=1)
    assert metrics["eval_accuracy"] == score(str(folder / "model"), DataConfig(**source))
    assert metrics["eval_accuracy"] == float((predicted == labels).mean())
    right, named = ((predicted == 1) & (labels == 1)).sum(), (predicted == 1).sum() + (labels == 1).sum()
    assert metrics["eval_f1"] == pytest.approx(2 * right / named)
    assert metrics["eval_loss"] == pytest.approx(cross_entropy(logits, labels), abs=1e-5)
    assert 0 < predicted.mean() < 1  # a model that always says the same would prove little


def test_what_is_exported_scores_the_same_after_dropout_and_cuts_texts_as_training_did(
    settings: Callable[..., Settings], inputs: Path, tmp_path: Path
) -> None:
    source, folder = {"task": "mrpc", "path": str(inputs / "odd")}, tmp_path / "checkpoint"
    metrics = saved(settings(source, config={"dropout": 0.5}, max_length=8), 2, folder).metrics
    logits, labels = plain_logits(folder / "model", DataConfig(**source))
    assert metrics["eval_loss"] == pytest.approx(cross_entropy(logits, labels), abs=1e-5)


def test_scores_are_evaluated_exactly_over_ranks_too(
    settings: Callable[..., Settings], two: Ranks, tmp_path: Path
) -> None:
    data = rows("stsb", tmp_path, num_validation=7)
    assert_close(two.curve(settings(data)), curve(settings(data)))


# ---- checkpoints


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_run_gives_the_epochs_of_the_undisturbed_one_with_dropout(
    settings: Callable[..., Settings], two: Ranks, tmp_path: Path, world_size: int
) -> None:
    dropout = settings(config={"dropout": 0.2}, max_epochs=4)
    if world_size == 2:
        undisturbed = two.curve(dropout, save=(2, tmp_path / "epoch-2"))
        resumed = two.curve(dropout, resume_from=tmp_path / "epoch-2")
        states = [(tmp_path / "epoch-2" / f"rng-{rank}.safetensors").read_bytes() for rank in (0, 1)]
        assert states[0] != states[1]  # each rank draws masks of its own
    else:
        undisturbed = curve(dropout)
        saved(dropout, 2, tmp_path / "epoch-2")
        resumed = curve(dropout, resume_from=tmp_path / "epoch-2")
    assert resumed == undisturbed[2:] and len(resumed) == 2


def test_a_checkpoint_holds_tensors_and_text_alone(settings: Callable[..., Settings], tmp_path: Path) -> None:
    saved(settings(), 1, tmp_path / "checkpoint")
    files = {str(path.relative_to(tmp_path / "checkpoint")) for path in (tmp_path / "checkpoint").rglob("*.*")}
    assert {
        "progress.json",
        "optimizer.safetensors",
        "rng-0.safetensors",
        "model/model.safetensors",
        "model/config.json",
        "model/tokenizer.json",
    } <= files
    assert {Path(name).suffix for name in files} <= {".json", ".safetensors"}


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize(
    "name", ["model/model.safetensors", "optimizer.safetensors", "rng-0.safetensors", "progress.json"]
)
def test_a_pickle_in_a_checkpoint_is_refused_and_never_executed(
    settings: Callable[..., Settings], tmp_path: Path, name: str
) -> None:
    folder, marker = tmp_path / "checkpoint", tmp_path / "executed"
    saved(settings(), 1, folder)
    (folder / name).write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(Exception):  # noqa: B017  (whatever safetensors or json say)
        next(reports_of(settings(), resume_from=folder))
    assert not marker.exists()


def test_a_run_that_was_left_in_the_middle_does_not_disturb_the_next(settings: Callable[..., Settings]) -> None:
    undisturbed = curve(settings())
    left = reports_of(settings(config={"n_embd": 16}))
    next(left)
    left.close()
    assert curve(settings()) == undisturbed


def test_the_checkpoint_of_an_epoch_goes_through_the_store(settings: Callable[..., Settings], tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "store")
    report = saved(settings(), 1, store.stage(0, 1))
    store.commit(0, 1, report.metrics)
    assert store.latest(0) is not None
    assert curve(settings(), resume_from=store.folder(0, 1)) == curve(settings())[1:]


def test_the_model_alone_is_what_best_hands_out(settings: Callable[..., Settings], tmp_path: Path) -> None:
    whole, alone = tmp_path / "whole", tmp_path / "alone"
    whole.mkdir(), alone.mkdir()
    report = next(reports := reports_of(settings()))
    assert report.save is not None and report.save_model is not None
    report.save(whole), report.save_model(alone)
    written = sum(path.stat().st_size for path in whole.rglob("*.safetensors") if not path.name.startswith("rng-"))
    assert report.num_bytes < written < report.num_bytes + 20_000, "but for the files' headers"
    reports.close()
    files = {path.relative_to(alone): path.read_bytes() for path in alone.rglob("*") if path.is_file()}
    assert Path("model/model.safetensors") in files and {path.parts[0] for path in files} == {"model"}
    assert all((whole / path).read_bytes() == content for path, content in files.items())


# ---- every task


WORDS = "bold brave bright calm awful bland bleak boring acting camera dialogue film".split()


def rows(task: str, folder: Path, num_train: int = 13, num_validation: int = 5) -> dict[str, Any]:
    """Made-up rows in the shape of a GLUE task; the `data` section that reads them."""
    rng = np.random.default_rng(5)
    shape = TASKS[task]
    target = folder / task
    target.mkdir(exist_ok=True)
    for split, size in (("train", num_train), *((split, num_validation) for split in shape.validation)):
        columns: dict[str, Any] = {
            name: [" ".join(rng.choice(WORDS, size=rng.integers(1, 9))) for _ in range(size)] for name in shape.text
        }
        if shape.is_regression:
            columns["label"] = pa.array(rng.uniform(0, 5, size), pa.float32())
        else:
            columns["label"] = [number % len(shape.labels) for number in range(size)]
        pq.write_table(pa.table(columns), target / f"{split}.parquet")
    return {"task": task, "path": str(target)}


@pytest.mark.parametrize("task", sorted(TASKS))
def test_a_task_reports_exactly_the_metrics_of_the_contract(
    settings: Callable[..., Settings], tmp_path: Path, task: str
) -> None:
    (report,) = reports_of(settings(rows(task, tmp_path), max_epochs=1, batch_size=4))
    assert set(report.metrics) == set(metric_names(task))
    assert all(type(value) is float and math.isfinite(value) for value in report.metrics.values())
    assert report.metrics["epoch_s"] > 0 and report.metrics["tokens_per_s"] > 0


def test_a_regression_learns_scores(settings: Callable[..., Settings], tmp_path: Path) -> None:
    data = rows("stsb", tmp_path)
    losses = [each["train_loss"] for each in curve(settings(data, max_epochs=6, batch_size=4, learning_rate=0.01))]
    assert losses[-1] < 0.5 * losses[0]


def test_a_loss_that_is_not_finite_is_reported_and_not_hidden(settings: Callable[..., Settings]) -> None:
    report = next(reports_of(settings(learning_rate=1e30, warmup_fraction=0.0, max_grad_norm=None)))
    assert not math.isfinite(report.metrics["train_loss"]) or not math.isfinite(report.metrics["eval_loss"])


def test_no_score_is_reported_of_weights_that_are_none(settings: Callable[..., Settings]) -> None:
    """A score of 0 would be the best where others are below it, and the model of that epoch handed out."""
    (first,) = curve(settings(max_epochs=1, learning_rate=1e35))
    scores = ("train_loss", "train_accuracy", "eval_loss", "eval_accuracy")
    assert [name for name in scores if not math.isnan(first[name])] == []


def test_bf16_trains_and_saves_whole_precision(settings: Callable[..., Settings], tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    report = saved(settings(precision="bf16", max_epochs=1), 1, tmp_path / "checkpoint")
    assert math.isfinite(report.metrics["eval_loss"])
    tensors = load_file(tmp_path / "checkpoint" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}


def test_longer_texts_than_the_model_has_positions_are_refused_before_training(
    settings: Callable[..., Settings],
) -> None:
    with pytest.raises(UserError, match="at most 64"):
        next(reports_of(settings(max_length=65)))


# ---- real data and a real model


def cut(source: Path, target: Path, **sizes: int) -> None:
    """The first rows of a data set's splits."""
    target.mkdir(parents=True)
    for split, size in sizes.items():
        pq.write_table(pq.read_table(source / f"{split}.parquet").slice(0, size), target / f"{split}.parquet")


def test_a_data_set_of_ones_own_trains_with_its_own_classes(
    settings: Callable[..., Settings], data_dir: Path, tmp_path: Path
) -> None:
    table = pq.read_table(data_dir / "glue" / "trec" / "train.parquet")
    (tmp_path / "trec").mkdir()
    pq.write_table(table.slice(0, 64), tmp_path / "trec" / "train.parquet")
    pq.write_table(table.slice(64, 32), tmp_path / "trec" / "validation.parquet")
    data = {"path": str(tmp_path / "trec"), "text": ["sentence"]}
    report = saved(settings(data, max_epochs=1), 1, tmp_path / "checkpoint")
    assert set(report.metrics) == set(metric_names(None))
    logits, labels = plain_logits(tmp_path / "checkpoint" / "model", DataConfig(**data))
    assert logits.shape == (32, 6)
    assert report.metrics["eval_accuracy"] == float((logits.argmax(axis=1) == labels).mean())


def test_a_pretrained_model_trains_on_real_pairs(data_dir: Path, models_dir: Path, tmp_path: Path) -> None:
    cut(data_dir / "glue" / "mrpc", tmp_path / "mrpc", train=64, validation=16)
    settings = {
        "model": {"name": str(models_dir / "minilm")},
        "data": {"task": "mrpc", "path": str(tmp_path / "mrpc")},
        "training": {"max_epochs": 1, "batch_size": 16, "max_length": 64, "precision": "fp32"},
    }
    report = saved(settings, 1, tmp_path / "checkpoint")
    assert set(report.metrics) == set(metric_names("mrpc"))
    assert report.metrics["train_loss"] < 0.8  # ln 2 = 0.69 for a coin
    logits, labels = plain_logits(tmp_path / "checkpoint" / "model", DataConfig(**settings["data"]))
    assert report.metrics["eval_accuracy"] == float((logits.argmax(axis=1) == labels).mean())
    assert report.metrics["eval_loss"] == pytest.approx(cross_entropy(logits, labels), abs=1e-5)
    shutil.rmtree(tmp_path / "checkpoint")


# ---- the process group


@pytest.mark.parametrize("world_size", [1, 2])
def test_no_port_of_a_group_can_be_reached_from_another_machine(
    settings: Callable[..., Settings], processes: dict[int, Ranks], world_size: int
) -> None:
    ranks = processes[world_size]
    ranks.curve(settings(max_epochs=1))
    listening = [
        ip_address(connection.laddr.ip.removeprefix("::ffff:"))
        for process in ranks.processes
        for connection in psutil.Process(process.pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= world_size  # gloo's, and the rendezvous
    assert [address for address in listening if not address.is_loopback] == []
