"""What changes the weights: AdamW, and the learning rate's schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

Schedule = Literal["linear", "cosine", "constant"]


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, which a trial steers through tensors and the next trial starts afresh.

    Matrices decay, biases and norms do not: by shape, since names differ (a filter on `LayerNorm.weight` misses GPT-2's
    `ln_1`, `ln_2` and `ln_f`). Learning rate, decay and clipping differ from trial to trial; a captured step reads them
    from `rates` and stays what it is. The kernel takes no tensor for the decay, so that is a step of its own, as
    AdamW defines it. The state exists from the start, where torch makes it at the first step: `reset` and `load`
    write into it.
    """

    def __init__(self, network: nn.Module) -> None:
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
        self._parameters = matrices + [parameter for parameter in parameters if parameter.ndim < 2]
        device = self._parameters[0].device
        self.rates = torch.zeros(3, device=device)
        """Learning rate, what a step's decay leaves of a matrix, largest norm of the gradients: see `rates_of`."""
        super().__init__(
            self._parameters, lr=self.rates[0], weight_decay=0.0, fused=True, capturable=device.type == "cuda"
        )
        # torch warns of every step outside a capture; a step of a new shape is one, on purpose.
        self._warned_capturable_if_run_uncaptured = True
        for parameter in self._parameters:
            self.state[parameter] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Clips the gradients, decays the matrices, follows the gradients. Never waits for the device."""
        used = [parameter for parameter in self._parameters if parameter.grad is not None]
        gradients = [parameter.grad for parameter in used if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, (self.rates[2] / (norm + 1e-6)).clamp(max=1.0))
        torch._foreach_mul_([parameter for parameter in used if parameter.ndim >= 2], self.rates[1])
        super().step()

    def reset(self) -> None:
        """As before the first step."""
        for tensor in self.tensors().values():
            tensor.zero_()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state itself, `PARAMETER.KEY` -> tensor; parameters are numbered, matrices first."""
        states = [self.state[parameter] for parameter in self._parameters]
        return {f"{number}.{key}": tensor for number, state in enumerate(states) for key, tensor in state.items()}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes over what `tensors` gave. The tensors stay where they are."""
        own = self.tensors()
        assert own.keys() == tensors.keys(), "the state of another model"
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def rates_of(learning_rate: float, weight_decay: float, max_grad_norm: float | None) -> tuple[float, float, float]:
    """One step's `AdamW.rates`; a `max_grad_norm` of None: no clipping."""
    return learning_rate, 1.0 - learning_rate * weight_decay, math.inf if max_grad_norm is None else max_grad_norm


def lr_lambda(schedule: Schedule, total_steps: int, warmup_fraction: float) -> Callable[[int], float]:
    """The share of the peak learning rate at a step, counted from 0: from 0 up to 1, then as `schedule` says, to 0."""
    warmup_steps = round(warmup_fraction * total_steps)

    def share(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        match schedule:
            case "linear":
                return 1.0 - progress
            case "cosine":
                return 0.5 * (1.0 + math.cos(math.pi * progress))
            case "constant":
                return 1.0

    return share
