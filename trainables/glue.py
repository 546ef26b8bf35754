"""The nine GLUE tasks: their columns, classes and metrics. No torch here, so a study can ask without loading it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np


@dataclass(frozen=True)
class Task:
    """How one GLUE task looks on disk. An integer label is a position in `labels`."""

    name: str
    text: tuple[str, ...]
    """One or two text columns."""
    labels: tuple[str, ...]
    """Class names in GLUE's own order; empty for a regression."""
    validation: tuple[str, ...] = ("validation",)
    """Validation splits; the first one is the one that `eval_accuracy` speaks of."""

    @property
    def is_regression(self) -> bool:
        return not self.labels


_SENTENCES = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            Task("cola", ("sentence",), ("unacceptable", "acceptable")),
            Task("sst2", ("sentence",), ("negative", "positive")),
            Task("mrpc", _SENTENCES, ("not_equivalent", "equivalent")),
            Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate")),
            Task("stsb", _SENTENCES, ()),
            Task(
                "mnli",
                ("premise", "hypothesis"),
                ("entailment", "neutral", "contradiction"),
                ("validation_matched", "validation_mismatched"),
            ),
            Task("qnli", ("question", "sentence"), _ENTAILMENT),
            Task("rte", _SENTENCES, _ENTAILMENT),
            Task("wnli", _SENTENCES, ("not_entailment", "entailment")),  # the other way round than rte: GLUE's choice
        )
    }
)

_EXTRA_METRICS: Mapping[str, tuple[str, ...]] = {
    "mrpc": ("eval_f1",),
    "qqp": ("eval_f1",),
    "cola": ("eval_matthews",),
    "mnli": ("eval_accuracy_mismatched",),
    "stsb": ("eval_pearson", "eval_spearman"),
}


def default_metric(task: str | None) -> str:
    """The objective's metric where a spec names none. Larger is always better."""
    return {"stsb": "eval_pearson", "cola": "eval_matthews"}.get(task or "", "eval_accuracy")


def metric_names(task: str | None) -> tuple[str, ...]:
    """Every metric that `finetune` reports for a task; None stands for a data set of the user's own."""
    accuracies = () if task == "stsb" else ("accuracy",)
    train = ("train_loss", *(f"train_{name}" for name in accuracies))
    evaluation = ("eval_loss", *(f"eval_{name}" for name in accuracies))
    return (*train, *evaluation, "learning_rate", "epoch_s", "tokens_per_s", *_EXTRA_METRICS.get(task or "", ()))


def eval_metrics(task: str | None, logits: np.ndarray, labels: np.ndarray, suffix: str = "") -> dict[str, float]:
    """The metrics of one whole validation split, from `logits` (rows, classes) and its labels.

    `suffix` is for mnli's second split: with `_mismatched`, only the metrics that the task reports with that ending.
    A logit that is not finite makes all of them nan: the trial has diverged, and a score of 0 would beat lower ones.
    """
    assert len(logits) == len(labels) > 0, "metrics need one label for each row, and at least one row"
    logits = np.asarray(logits, dtype=np.float64)
    if task and TASKS[task].is_regression:
        values = _regression_metrics(logits.reshape(len(labels)), np.asarray(labels, dtype=np.float64))
    else:
        values = _class_metrics(logits, np.asarray(labels, dtype=np.int64))
    reported = metric_names(task)
    return {name + suffix: value for name, value in values.items() if name + suffix in reported}


def majority_baseline(labels: np.ndarray) -> float:
    """Accuracy of always answering the commonest class: what a model must beat to have learnt anything."""
    return float(np.unique(labels, return_counts=True)[1].max() / len(labels))


def _class_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    if not np.isfinite(logits).all():
        return dict.fromkeys(("eval_loss", "eval_accuracy", "eval_f1", "eval_matthews"), math.nan)
    predicted = logits.argmax(axis=1)
    return {
        "eval_loss": _cross_entropy(logits, labels),
        "eval_accuracy": float((predicted == labels).mean()),
        "eval_f1": _f1(predicted, labels),
        "eval_matthews": _matthews(predicted, labels),
    }


def _cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_partition = np.log(np.exp(shifted).sum(axis=1))
    return float((log_partition - shifted[np.arange(len(labels)), labels]).mean())


def _f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1; 0 where neither the labels nor the predictions know that class."""
    true_positives = int(((predicted == 1) & (labels == 1)).sum())
    named = int((predicted == 1).sum() + (labels == 1).sum())
    return 2 * true_positives / named if named else 0.0


def _matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation of two classes; 0 where one class alone was predicted (0/0), as everyone reports it."""
    tp, tn, fp, fn = (
        float(((predicted == said) & (labels == true)).sum()) for said, true in ((1, 1), (0, 0), (1, 0), (0, 1))
    )
    scale = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(scale) if scale else 0.0


def _regression_metrics(predicted: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    if not np.isfinite(predicted).all():
        return dict.fromkeys(("eval_loss", "eval_pearson", "eval_spearman"), math.nan)
    return {
        "eval_loss": float(np.square(predicted - scores).mean()),
        "eval_pearson": _pearson(predicted, scores),
        "eval_spearman": _pearson(_ranks(predicted), _ranks(scores)),
    }


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share their mean rank, as Spearman's coefficient has it."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = np.cumsum(counts) - (counts - 1) / 2
    return ranks[places]


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation; 0 where either side is constant.

    The quotient is 0/0 there. A regressor that always says the same has learnt nothing, which is a poor result but a
    result: nan would call the trial diverged.
    """
    a, b = a - a.mean(), b - b.mean()
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.clip(a @ b / math.sqrt((a @ a) * (b @ b)), -1.0, 1.0))
