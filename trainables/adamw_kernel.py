"""AdamW's update of all tensors as one kernel and one pass over memory. Needs Triton, which comes with torch for GPUs.

torch's fused kernel reads and writes the weights and both moments, some tensors at a time, and that is all it does:
clipping, decay and bf16 copies of the weights are passes more. A step of a small transformer spent a quarter of its
time on those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 1024
"""Elements that one program updates. Of 1,024 to 4,096 the fastest (H200)."""
ALIGNMENT = 16
"""Bytes. Where all tensors begin at a multiple, a thread takes four neighbours. (Views of DDP's buckets do not.)"""


@triton.jit  # type: ignore[untyped-decorator]
def _update(  # type: ignore[no-untyped-def]  # Triton compiles it, and reads types of its own
    tensors,
    gradients,
    parts,
    scalars,
    corrections,
    beta1: tl.constexpr,
    beta2: tl.constexpr,
    eps: tl.constexpr,
    alignment: tl.constexpr,
    block: tl.constexpr,
):
    number = tl.load(parts + tl.program_id(0) * 2)
    address = tl.load(gradients + number)
    if address == 0:
        return
    row = tensors + number * 6
    count = tl.load(row + 4)
    part = tl.load(parts + tl.program_id(0) * 2 + 1).to(tl.int64)
    # Four neighbours a thread, where Triton takes eight by itself, as many bf16 as fit into one access: that is slower.
    places = tl.max_contiguous(tl.multiple_of(part * block + tl.arange(0, block), 4), 4)
    correction = corrections + number * 2
    if (part + 1) * block <= count:
        _update_part(row, address, places, None, scalars, correction, beta1, beta2, eps, alignment)
    else:  # a mask makes each access one of a single element: 0.96 ms for GPT-2 124M instead of 0.85, if all had one
        _update_part(row, address, places, places < count, scalars, correction, beta1, beta2, eps, alignment)


@triton.jit  # type: ignore[untyped-decorator]
def _update_part(  # type: ignore[no-untyped-def]
    row,
    address,
    places,
    inside,
    scalars,
    correction,
    beta1: tl.constexpr,
    beta2: tl.constexpr,
    eps: tl.constexpr,
    alignment: tl.constexpr,
):
    weight = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), alignment)
    mean = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.float32)), alignment)
    square = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.float32)), alignment)
    copy, decays = tl.load(row + 3), tl.load(row + 5)
    if address % 2 == 1:
        half = tl.multiple_of((address - 1).to(tl.pointer_type(tl.bfloat16)), alignment)
        g = tl.load(half + places, mask=inside).to(tl.float32)
    else:
        g = tl.load(tl.multiple_of(address.to(tl.pointer_type(tl.float32)), alignment) + places, mask=inside)
    rate, decay, clip = tl.load(scalars), tl.where(decays != 0, tl.load(scalars + 1), 1.0), tl.load(scalars + 2)
    step_size = rate / tl.load(correction)
    root = tl.sqrt(tl.load(correction + 1))
    g = g * clip
    m = beta1 * tl.load(mean + places, mask=inside) + (1 - beta1) * g
    v = beta2 * tl.load(square + places, mask=inside) + (1 - beta2) * g * g
    w = tl.load(weight + places, mask=inside) * decay - step_size * m / (tl.sqrt(v) / root + eps)
    tl.store(weight + places, w, mask=inside)
    tl.store(mean + places, m, mask=inside)
    tl.store(square + places, v, mask=inside)
    if copy != 0:
        half = tl.multiple_of(copy.to(tl.pointer_type(tl.bfloat16)), alignment)
        tl.store(half + places, w.to(tl.bfloat16), mask=inside)


class OnePass:
    """The update of some fp32 tensors, which stay where they are. It may be captured as a part of a CUDA graph."""

    def __init__(
        self, weights: Sequence[torch.Tensor], means: Sequence[torch.Tensor], squares: Sequence[torch.Tensor]
    ) -> None:
        device, counts = weights[0].device, [weight.numel() for weight in weights]
        self._held = list(zip(weights, means, squares, strict=True))  # an address alone keeps nothing alive
        self._copies: dict[int, torch.Tensor] = {}
        self._order = [_order(weight) for weight in weights]
        for order, tensors in zip(self._order, self._held, strict=True):
            assert all(each.dtype == torch.float32 and _order(each) == order for each in tensors)
        addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in self._held]
        self._is_aligned = all(address % ALIGNMENT == 0 for row in addresses for address in row)
        rows = [
            [*row, 0, count, int(weight.ndim >= 2)]
            for row, count, weight in zip(addresses, counts, weights, strict=True)
        ]
        self._tensors = torch.tensor(rows, device=device)
        """Of each tensor: addresses of weights, both moments and copy (0: none), elements, whether it decays."""
        num_parts = torch.tensor([triton.cdiv(count, BLOCK) for count in counts], device=device)
        numbers = torch.repeat_interleave(torch.arange(len(counts), device=device), num_parts)
        starts = num_parts.cumsum(0) - num_parts
        parts = torch.arange(len(numbers), device=device) - starts[numbers]
        self._parts = torch.stack([numbers, parts], dim=1).int()
        """Of each program: the number of its tensor, and of its block there."""
        self._gradients = torch.zeros(len(counts), dtype=torch.int64, device=device)
        self._cells = list(self._gradients.unbind())

    def set_copy(self, number: int, copy: torch.Tensor) -> None:
        """From now on a step also writes the tensor's new weights to `copy`, in bf16: also one captured before."""
        assert _order(copy) == self._order[number] and copy.dtype == torch.bfloat16
        assert copy.data_ptr() % ALIGNMENT == 0, "torch begins each tensor at a multiple of 512"
        self._copies[number] = copy
        self._tensors[number, 3] = copy.data_ptr()

    def __call__(
        self,
        gradients: Sequence[torch.Tensor | None],
        scalars: torch.Tensor,
        corrections: torch.Tensor,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        """One step, in place; all of it on the device. A tensor without a gradient stays what it is.

        `gradients` are fp32 or bf16. `scalars`: learning rate, what the decay leaves of a matrix, what clipping leaves
        of the gradients. `corrections`, shape (tensors, 2): 1 - beta ** step of both betas.
        """
        addresses = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
        is_aligned = self._is_aligned and all(address % ALIGNMENT == 0 for address in addresses)
        for number, gradient in enumerate(gradients):
            if gradient is not None:
                assert _order(gradient) == self._order[number] and gradient.dtype in (torch.float32, torch.bfloat16)
                addresses[number] += gradient.dtype == torch.bfloat16  # all addresses are even
        # Numbers in the arguments of a kernel: a capture keeps them, where it cannot hold a copy from the host.
        self._gradients.zero_()
        torch._foreach_add_(self._cells, addresses)
        alignment, grid = ALIGNMENT if is_aligned else 2, (len(self._parts),)
        arguments: Any = self._tensors, self._gradients, self._parts, scalars, corrections
        _update[grid](*arguments, *betas, eps, alignment, BLOCK, num_warps=4)


def _order(tensor: torch.Tensor) -> list[int]:
    """The strides of its dimensions, but for those of size 1. Its elements lie in memory without a gap."""
    found = [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    expected = 1
    for stride, size in sorted(found):
        assert stride == expected, "a tensor without a gap"
        expected *= size
    return [stride for stride, _ in found]
