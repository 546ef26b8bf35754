"""What changes the weights: AdamW, and the learning rate's schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from threading import Lock, Thread
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from trainables.memory import is_out_of_memory

if TYPE_CHECKING:
    from trainables.adamw_kernel import OnePass

Schedule = Literal["linear", "cosine", "constant"]


class AdamW(torch.optim.AdamW):
    """torch's AdamW, which a trial steers through tensors and the next trial starts afresh.

    Matrices decay, biases and norms do not: by shape, since names differ (a filter on `LayerNorm.weight` misses GPT-2's
    `ln_1`, `ln_2` and `ln_f`). Learning rate, decay and clipping differ from trial to trial; a captured step reads them
    from `rates` and stays what it is. The state exists from the start, where torch makes it at the first step: `reset`
    and `load` write into it.

    On a GPU a step is one pass over memory where Triton can compile that; else it is torch's fused kernel, which takes
    no tensor for the decay, so that this is a step of its own, as AdamW defines it. Their results differ by rounding.
    """

    def __init__(self, network: nn.Module, one_pass: type[OnePass] | None = None) -> None:
        """`one_pass`: see `one_pass_on`."""
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
        self._parameters = matrices + [parameter for parameter in parameters if parameter.ndim < 2]
        device = self._parameters[0].device
        self.rates = torch.zeros(3, device=device)
        """Learning rate, what a step's decay leaves of a matrix, largest norm of the gradients: see `rates_of`."""
        self._copies: dict[nn.Parameter, torch.Tensor] = {}
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
        states = [self.state[parameter] for parameter in self._parameters]
        means, squares = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
        self._one_pass = None if one_pass is None else one_pass(self._parameters, means, squares)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Clips the gradients, decays the matrices, follows the gradients. Never waits for the device."""
        gradients = [self._gradient(parameter) for parameter in self._parameters]
        clip = (self.rates[2] / (_norm([found for found in gradients if found is not None]) + 1e-6)).clamp(max=1.0)
        if self._one_pass is None:
            self._step_by_torch(gradients, clip)
        else:
            states = [self.state[parameter] for parameter in self._parameters]
            used = [state["step"] for state, found in zip(states, gradients, strict=True) if found is not None]
            torch._foreach_add_(used, 1)
            steps = torch.stack([state["step"] for state in states]).double()
            betas, eps = self.defaults["betas"], self.defaults["eps"]
            corrections = torch.stack([1 - beta**steps for beta in betas], dim=1).float()
            self._one_pass(gradients, torch.cat([self.rates[:2], clip[None]]), corrections, betas, eps)

    def _gradient(self, parameter: nn.Parameter) -> torch.Tensor | None:
        copy = self._copies.get(parameter)
        return parameter.grad if copy is None or copy.grad is None else copy.grad

    def _step_by_torch(self, gradients: list[torch.Tensor | None], clip: torch.Tensor) -> None:
        for parameter, found in zip(self._parameters, gradients, strict=True):
            parameter.grad = None if found is None else found.float()
        used = {parameter: parameter.grad for parameter in self._parameters if parameter.grad is not None}
        torch._foreach_mul_(list(used.values()), clip)
        torch._foreach_mul_([parameter for parameter in used if parameter.ndim >= 2], self.rates[1])
        super().step()
        self.renew_copies()

    def copy_of(self, parameter: nn.Parameter) -> torch.Tensor:
        """A bf16 copy of a weight, which a step renews. The weight follows the copy's gradient if it has one.

        It stays, also for trials that do not use it.
        """
        if parameter not in self._copies:
            copy = self._copies[parameter] = parameter.detach().bfloat16().requires_grad_()
            if self._one_pass is not None:
                number = next(i for i, each in enumerate(self._parameters) if each is parameter)
                self._one_pass.set_copy(number, copy)
        return self._copies[parameter]

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for copy in self._copies.values():
            copy.grad = None

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

    @torch.no_grad()
    def renew_copies(self) -> None:
        """After the weights were changed by other things than a step."""
        if self._copies:
            torch._foreach_copy_(list(self._copies.values()), list(self._copies))


def _norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Of all together, in fp32. By type: torch takes many tensors at once where they have the same."""
    by_type: dict[torch.dtype, list[torch.Tensor]] = {}
    for gradient in gradients:
        by_type.setdefault(gradient.dtype, []).append(gradient)
    norms = [norm for group in by_type.values() for norm in torch._foreach_norm(group, dtype=torch.float32)]
    found: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return found


def one_pass_on(device: torch.device) -> type[OnePass] | None:
    """`OnePass`, where it runs: that takes an NVIDIA or AMD GPU, Triton, a C compiler and Python's headers."""
    with _looking:
        return _one_pass_that_runs(device)


def one_pass_soon(device: torch.device) -> None:
    """Begins to look for it, in a thread: where Triton has yet to compile the kernel that takes seconds."""

    def look() -> None:
        with suppress(Exception):  # whoever needs it looks again
            one_pass_on(device)

    if device.type == "cuda":
        Thread(target=look, name="one-pass", daemon=True).start()


_looking = Lock()


@lru_cache
def _one_pass_that_runs(device: torch.device) -> type[OnePass] | None:
    if device.type != "cuda":
        return None
    weight, mean, square, ones = (torch.full((1,), value, device=device) for value in (0.0, 0.0, 0.0, 1.0))
    try:
        from trainables.adamw_kernel import OnePass

        corrections = torch.tensor([[0.1, 0.001]], device=device)
        OnePass([weight], [mean], [square])([ones], torch.ones(3, device=device), corrections, (0.9, 0.999), 1e-8)
        if abs(float(weight) + 1) > 1e-4:  # the first step is the learning rate
            raise RuntimeError(f"a step from 0 to -1 led to {float(weight)}")
    # Whatever Triton, a compiler or a linker has to say: torch's own kernels do the same work.
    except Exception as error:
        if is_out_of_memory(error):  # a neighbour may have filled the card, for a moment
            raise
        torch.cuda.synchronize()  # raises where the device itself is at fault
        reason = str(error).strip().partition("\n")[0]
        print(f"AdamW by torch's kernels, for {type(error).__name__}: {reason}", flush=True)
        return None
    return OnePass


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
