"""Metrics by numbers a reader can check by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trainables.glue import TASKS, default_metric, eval_metrics, majority_baseline, metric_names


def logits_of(*classes: int, num_classes: int = 2) -> np.ndarray:
    """Logits that choose these classes."""
    return np.eye(num_classes)[list(classes)] * 4.0


def test_all_nine_tasks_are_there_with_glues_own_class_order() -> None:
    assert sorted(TASKS) == ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"]
    assert TASKS["rte"].labels == TASKS["qnli"].labels == ("entailment", "not_entailment")
    assert TASKS["wnli"].labels == ("not_entailment", "entailment")
    assert TASKS["mnli"].labels == ("entailment", "neutral", "contradiction")
    assert TASKS["mrpc"].labels == ("not_equivalent", "equivalent")
    assert TASKS["stsb"].is_regression


def test_only_mnli_has_two_validation_splits() -> None:
    assert {task.name: task.validation for task in TASKS.values() if task.validation != ("validation",)} == {
        "mnli": ("validation_matched", "validation_mismatched")
    }


def test_default_metric_follows_the_task() -> None:
    names = {task: default_metric(task) for task in (*TASKS, None)}
    assert names.pop("stsb") == "eval_pearson"
    assert names.pop("cola") == "eval_matthews"
    assert set(names.values()) == {"eval_accuracy"}


def test_every_default_metric_is_among_the_reported_ones() -> None:
    assert all(default_metric(task) in metric_names(task) for task in (*TASKS, None))


def test_metric_names_are_the_contracts_in_its_order() -> None:
    common = ["train_loss", "train_accuracy", "eval_loss", "eval_accuracy", "learning_rate", "epoch_s", "tokens_per_s"]
    assert list(metric_names(None)) == common
    assert list(metric_names("sst2")) == common
    assert list(metric_names("mrpc")) == [*common, "eval_f1"]
    assert list(metric_names("cola")) == [*common, "eval_matthews"]
    assert list(metric_names("mnli")) == [*common, "eval_accuracy_mismatched"]


def test_stsb_reports_correlations_and_no_accuracies() -> None:
    expected = ["train_loss", "eval_loss", "learning_rate", "epoch_s", "tokens_per_s", "eval_pearson", "eval_spearman"]
    assert list(metric_names("stsb")) == expected


def test_loss_of_equal_logits_is_log_of_the_number_of_classes() -> None:
    assert eval_metrics("mnli", np.zeros((5, 3)), np.array([0, 1, 2, 0, 1]))["eval_loss"] == pytest.approx(math.log(3))


def test_loss_is_the_mean_cross_entropy_of_the_rows() -> None:
    # Softmax of (log 3, 0) is (3/4, 1/4).
    logits = np.array([[math.log(3), 0.0], [math.log(3), 0.0]])
    values = eval_metrics("sst2", logits, np.array([0, 1]))
    assert values == pytest.approx({"eval_loss": -(math.log(3 / 4) + math.log(1 / 4)) / 2, "eval_accuracy": 0.5})


def test_huge_logits_do_not_overflow() -> None:
    values = eval_metrics("sst2", np.array([[30000.0, -30000.0]], dtype=np.float16), np.array([1]))
    assert values["eval_loss"] == pytest.approx(60000.0, rel=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("task", ["mrpc", "cola", None])
def test_a_logit_that_is_not_finite_gives_nan_everywhere_and_no_exception(task: str | None, bad: float) -> None:
    values = eval_metrics(task, np.array([[bad, 0.0], [0.0, 4.0]]), np.array([0, 1]))
    assert values and all(math.isnan(value) for value in values.values())


def test_f1_is_of_class_one() -> None:
    # Two hits, one miss, one false alarm: precision 2/3, recall 2/3.
    values = eval_metrics("mrpc", logits_of(1, 1, 0, 1, 0), np.array([1, 1, 1, 0, 0]))
    assert values["eval_f1"] == pytest.approx(2 / 3)
    assert values["eval_accuracy"] == pytest.approx(3 / 5)


def test_f1_without_any_positive_is_zero() -> None:
    assert eval_metrics("qqp", logits_of(0, 0), np.array([0, 0]))["eval_f1"] == 0.0


def test_matthews_by_hand() -> None:
    # tp 2, tn 1, fp 1, fn 1: (2*1 - 1*1) / sqrt(3*3*2*2) = 1/6.
    values = eval_metrics("cola", logits_of(1, 1, 0, 1, 0), np.array([1, 1, 0, 0, 1]))
    assert values["eval_matthews"] == pytest.approx(1 / 6)


def test_matthews_of_one_predicted_class_is_zero() -> None:
    assert eval_metrics("cola", logits_of(1, 1, 1), np.array([1, 1, 0]))["eval_matthews"] == 0.0


def test_matthews_does_not_overflow_on_many_rows() -> None:
    labels = np.tile([0, 1], 200_000)
    assert eval_metrics("cola", logits_of(*labels), labels)["eval_matthews"] == pytest.approx(1.0)


def test_stsb_metrics_by_hand() -> None:
    # Ranks (1, 2, 3) against (1, 3, 2): Spearman 1/2. Pearson of (0, 1, 2) and (0, 4, 2) is also 1/2.
    values = eval_metrics("stsb", np.array([[0.0], [1.0], [2.0]]), np.array([0.0, 4.0, 2.0], dtype=np.float32))
    assert values == pytest.approx({"eval_loss": 3.0, "eval_pearson": 0.5, "eval_spearman": 0.5})


def test_spearman_sees_the_order_and_pearson_the_distances() -> None:
    values = eval_metrics("stsb", np.array([[1.0], [10.0], [1000.0]]), np.array([0.0, 1.0, 5.0]))
    assert values["eval_spearman"] == pytest.approx(1.0)
    assert values["eval_pearson"] < 0.99
    values = eval_metrics("stsb", np.array([[0.0], [1.0], [2.0]]), np.array([0.0, 0.1, 5.0]))
    assert values["eval_spearman"] == pytest.approx(1.0)
    assert values["eval_pearson"] < 0.99


def test_spearman_gives_ties_their_mean_rank() -> None:
    # Ranks (1.5, 1.5, 3) against (1, 2, 3): covariance 1.5, variances 1.5 and 2.
    values = eval_metrics("stsb", np.array([[1.0], [1.0], [9.0]]), np.array([0.0, 1.0, 2.0]))
    assert values["eval_spearman"] == pytest.approx(1.5 / math.sqrt(1.5 * 2))


def test_a_regressor_that_collapsed_is_bad_but_not_diverged() -> None:
    values = eval_metrics("stsb", np.full((3, 1), 0.1), np.array([0.0, 4.0, 2.0]))
    assert (values["eval_pearson"], values["eval_spearman"]) == (0.0, 0.0)
    assert math.isfinite(values["eval_loss"])


def test_a_regressor_that_diverged_gives_nan_everywhere() -> None:
    values = eval_metrics("stsb", np.array([[math.inf], [1.0]]), np.array([0.0, 1.0]))
    assert all(math.isnan(value) for value in values.values())


def test_the_second_mnli_split_adds_its_accuracy_only() -> None:
    logits = logits_of(0, 1, 2, 2, num_classes=3)
    assert list(eval_metrics("mnli", logits, np.array([0, 1, 2, 0]))) == ["eval_loss", "eval_accuracy"]
    assert eval_metrics("mnli", logits, np.array([0, 1, 2, 0]), suffix="_mismatched") == {
        "eval_accuracy_mismatched": 0.75
    }


def test_data_of_ones_own_has_loss_and_accuracy() -> None:
    values = eval_metrics(None, logits_of(4, 0, num_classes=5), np.array([4, 1]))
    assert list(values) == ["eval_loss", "eval_accuracy"]
    assert values["eval_accuracy"] == 0.5


def test_majority_baseline_is_the_share_of_the_commonest_class() -> None:
    assert majority_baseline(np.array([1, 1, 0, 2])) == 0.5
