"""Batches that are cut on the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainables.batches import Encoded
from trainables.errors import ModelError
from trainables.steps import DeviceRows, Graphs


@pytest.mark.parametrize("has_types", [False, True])
def test_a_batch_is_padded_on_the_right_and_masked(has_types: bool) -> None:
    types = np.array([1, 0, 1, 1], dtype=np.int32) if has_types else None
    encoded = Encoded(ids=np.array([5, 6, 7, 8], dtype=np.int32), offsets=np.array([0, 1, 4]), token_type_ids=types)
    rows = DeviceRows(encoded, pad_token_id=9, device=torch.device("cpu"))
    batch = rows.inputs(torch.tensor([1, 0, 1]), width=4)
    expected = {
        "input_ids": [[6, 7, 8, 9], [5, 9, 9, 9], [6, 7, 8, 9]],
        "attention_mask": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 0]],
    }
    if has_types:
        expected["token_type_ids"] = [[0, 1, 1, 0], [1, 0, 0, 0], [0, 1, 1, 0]]
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_without_graphs_every_run_is_a_run() -> None:
    calls: list[int] = []
    graphs = Graphs(enabled=False, num_eager=0)
    for _ in range(3):
        graphs.run(8, lambda: calls.append(1))
    assert len(calls) == 3


def test_a_function_is_captured_when_it_has_run_once_and_enough_has_run_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order alone; what a capture does needs a GPU: tests/gpu/check_steps.py."""
    log: list[str] = []

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name = name

        def replay(self) -> None:
            log.append(f"replay {self.name}")

    def capture(self: Graphs, function: object) -> Recorded:
        log.append("capture")
        return Recorded("graph")

    monkeypatch.setattr(Graphs, "_capture", capture)
    graphs = Graphs(enabled=True, num_eager=3)
    for key in (8, 8, 16, 8, 16, 24, 8):
        graphs.run(key, lambda key=key: log.append(f"run {key}"))  # type: ignore[misc]
    graph = ["capture", "replay graph"]
    assert log == ["run 8", "run 8", "run 16", *graph, *graph, "run 24", "replay graph"]


class BrokenCapture:
    """A CUDA graph that was invalidated: its end says so, whatever the reason was."""

    def capture_begin(self, **options: object) -> None:
        return None

    def capture_end(self) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize(
    ("reason", "raised", "says"),
    [
        (RuntimeError("a copy to the host\nand more"), ModelError, "found a copy to the host; expected compile: off"),
        (torch.OutOfMemoryError("no memory"), torch.OutOfMemoryError, "no memory"),
    ],
)
def test_a_step_that_cannot_be_captured_says_why(
    monkeypatch: pytest.MonkeyPatch, reason: Exception, raised: type[Exception], says: str
) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", BrokenCapture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def fails() -> None:
        raise reason

    with pytest.raises(raised, match=says):
        Graphs(enabled=True, num_eager=0)._capture(fails)
