"""AdamW's kernel on the CPU, by Triton's interpreter, beside torch's own: `python tests/interpreted_kernel.py`.

Prints each case that came out right. A program of its own: Triton reads its variables when it is loaded, and torch does
other things where it finds it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "1"
if "TUNE_SERVICE_TEST_TRITON" in os.environ:
    sys.path.append(os.environ["TUNE_SERVICE_TEST_TRITON"])

import torch
from torch import nn

from trainables.adamw_kernel import OnePass
from trainables.optimizer import AdamW, rates_of

Gradient = Callable[[int, torch.Tensor, int], torch.Tensor | None]
"""Of a parameter's number, the parameter, and the step."""


def network() -> nn.Module:
    torch.manual_seed(0)
    some = nn.Linear(33, 40), nn.LayerNorm(40), nn.Linear(40, 50), nn.Linear(50, 1), nn.Linear(1, 3)
    return nn.Sequential(*some, nn.Linear(64, 32))  # the last one's weights are two blocks of the kernel exactly


def normal(number: int, parameter: torch.Tensor, step: int) -> torch.Tensor:
    return torch.randn_like(parameter)


def some_missing(number: int, parameter: torch.Tensor, step: int) -> torch.Tensor | None:
    return None if (number + step) % 3 == 0 else torch.randn_like(parameter)


def unaligned(number: int, parameter: torch.Tensor, step: int) -> torch.Tensor:
    return torch.randn(parameter.numel() + 1)[1:].view(parameter.shape)


def one_nan(number: int, parameter: torch.Tensor, step: int) -> torch.Tensor:
    return torch.full_like(parameter, torch.nan) if number == 2 else torch.randn_like(parameter)


CASES: dict[str, tuple[Gradient, float | None, range]] = {
    "clipped": (normal, 0.5, range(0)),
    "not clipped": (normal, None, range(0)),
    "some parameters without a gradient": (some_missing, 1.0, range(0)),
    "bf16 gradients of some copies": (normal, 0.5, range(0, 10, 2)),
    "bf16 gradients of copies that some steps do not use": (some_missing, 0.5, range(10)),
    "gradients at odd places": (unaligned, 1.0, range(0)),
    "a gradient that is not a number": (one_nan, 1.0, range(0)),
}


def trained(gradient: Gradient, max_norm: float | None, copied: range, one_pass: type[OnePass] | None) -> AdamW:
    optimizer = AdamW(network(), one_pass)
    optimizer.rates.copy_(torch.tensor(rates_of(0.01, 0.1, max_norm)))
    copies = {number: optimizer.copy_of(optimizer._parameters[number]) for number in copied}
    for step in range(4):
        torch.manual_seed(step)
        for number, parameter in enumerate(optimizer._parameters):
            found = gradient(number, parameter, step)
            if found is not None and number in copies:
                copies[number].grad = found.bfloat16()
            else:
                parameter.grad = found
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def compare(case: str) -> None:
    found, expected = trained(*CASES[case], OnePass), trained(*CASES[case], None)
    for mine, reference in zip(found._parameters, expected._parameters, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-6, equal_nan=True)
    for name, tensor in found.tensors().items():
        torch.testing.assert_close(tensor, expected.tensors()[name], rtol=1e-6, atol=1e-7, equal_nan=True)
    for parameter, copy in found._copies.items():
        # The interpreter cuts what a GPU rounds.
        torch.testing.assert_close(copy.float(), parameter.detach(), rtol=2**-7, atol=0.0)


if __name__ == "__main__":
    for case in CASES:
        compare(case)
        print(case)
