"""The optimizer's rules, on networks small enough to compute by hand, and the learning rate's schedule."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from trainables.optimizer import AdamW, _norm, lr_lambda, one_pass_on, one_pass_soon, rates_of


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float | None, steps: int = 5) -> None:
    for step in range(steps):
        inputs = torch.full((2, 3), 1.0 + step)
        (100.0 * net(inputs)).square().sum().backward()
        if not isinstance(optimizer, AdamW) and max_norm is not None:
            nn.utils.clip_grad_norm_(net.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("max_norm", [None, 0.5, 1e9])
def test_it_does_what_torchs_adamw_with_clipping_does(max_norm: float | None) -> None:
    ours, theirs = network(), network()
    optimizer = AdamW(ours)
    optimizer.rates.copy_(torch.tensor(rates_of(0.01, 0.1, max_norm)))
    train(ours, optimizer, max_norm)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    train(theirs, torch.optim.AdamW(groups, lr=0.01), max_norm)
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)


def test_only_matrices_decay() -> None:
    net = network()
    optimizer = AdamW(net)
    optimizer.rates.copy_(torch.tensor(rates_of(0.1, 0.5, None)))
    before = [parameter.detach().clone() for parameter in net.parameters()]
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, old in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), old * 0.95 if old.ndim >= 2 else old, rtol=1e-6, atol=0.0)


def test_a_weight_that_took_no_part_stays_what_it_is() -> None:
    net = network()
    optimizer = AdamW(net)
    optimizer.rates.copy_(torch.tensor(rates_of(0.1, 0.5, 1.0)))
    before = net[2].weight.detach().clone()
    net[0](torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(net[2].weight, before)


def test_after_a_reset_it_trains_as_a_new_one_bit_by_bit() -> None:
    fresh, used = network(), network()
    first, second = AdamW(fresh), AdamW(used)
    for optimizer in (first, second):
        optimizer.rates.copy_(torch.tensor(rates_of(0.01, 0.1, 1.0)))
    train(fresh, first, None)
    train(used, second, None, steps=3)
    second.reset()
    used.load_state_dict(network().state_dict())
    train(used, second, None)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), used.parameters(), strict=True))


def test_its_state_is_loaded_into_the_tensors_it_has() -> None:
    net, other = network(), network()
    optimizer, source = AdamW(net), AdamW(other)
    source.rates.copy_(torch.tensor(rates_of(0.01, 0.0, None)))
    train(other, source, None)
    places = [tensor.data_ptr() for tensor in optimizer.tensors().values()]
    optimizer.load(source.tensors())
    assert [tensor.data_ptr() for tensor in optimizer.tensors().values()] == places
    assert all(torch.equal(tensor, source.tensors()[name]) for name, tensor in optimizer.tensors().items())
    assert optimizer.tensors()["0.step"] == 5


def test_a_weight_follows_the_bf16_gradients_of_its_copy_and_the_copy_follows_the_weight() -> None:
    net, reference = network(), network()
    optimizer, other = AdamW(net), AdamW(reference)
    for each in (optimizer, other):
        each.rates.copy_(torch.tensor(rates_of(0.01, 0.1, 0.5)))
    copies = [optimizer.copy_of(parameter) for parameter in net.parameters()]
    for step in range(3):
        for copy, parameter in zip(copies, reference.parameters(), strict=True):
            copy.grad = torch.full_like(copy, 0.1 * (step + 1))
            parameter.grad = copy.grad.float()
        for each in (optimizer, other):
            each.step()
            each.zero_grad()
        assert all(copy.grad is None for copy in copies)
    for copy, mine, theirs in zip(copies, net.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(copy, mine.detach().bfloat16())


def test_copies_are_renewed_after_something_else_changed_the_weights() -> None:
    net = network()
    optimizer = AdamW(net)
    copies = [optimizer.copy_of(parameter) for parameter in net.parameters()]
    with torch.no_grad():
        net[0].weight.add_(1.0)
    assert not torch.equal(copies[0], net[0].weight.detach().bfloat16())
    optimizer.renew_copies()
    for copy, parameter in zip(copies, net.parameters(), strict=True):
        assert torch.equal(copy, parameter.detach().bfloat16())


def test_several_tensors_of_two_types_have_one_norm_in_fp32() -> None:
    found = _norm([torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.bfloat16), torch.full((4,), 6.0)])
    assert (found.dtype, float(found)) == (torch.float32, 13.0)


def shares(schedule: str, total_steps: int, warmup_fraction: float) -> list[float]:
    share = lr_lambda(schedule, total_steps, warmup_fraction)  # type: ignore[arg-type]
    return [share(step) for step in range(total_steps + 2)]


def test_linear_rises_over_the_warmup_and_falls_to_zero() -> None:
    assert shares("linear", 6, 1 / 3) == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0])


def test_cosine_is_half_way_down_in_the_middle() -> None:
    assert shares("cosine", 4, 0.0) == pytest.approx([1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0, 0])


def test_constant_stays_after_the_warmup() -> None:
    assert shares("constant", 4, 0.5) == [0, 0.5, 1, 1, 1, 1]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_schedule_of_warmup_only_or_of_one_step_has_no_division_by_zero(schedule: str) -> None:
    assert shares(schedule, 2, 1.0)[:2] == [0, 0.5]
    assert shares(schedule, 1, 0.1)[0] == 1.0
    assert all(0 <= share <= 1 for share in shares(schedule, 0, 0.1))


def test_a_look_for_the_kernel_that_ran_out_of_memory_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def full(*_: object, **__: object) -> None:
        looks.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "full", full)
    one_pass_soon(torch.device("cuda"))
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            one_pass_on(torch.device("cuda"))
    assert len(looks) >= 2
    assert one_pass_on(torch.device("cpu")) is None
