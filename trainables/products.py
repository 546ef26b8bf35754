"""A transformer's matrix products in training: what makes their gradients cheaper and leaves what they are."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

PRODUCTS = (nn.Linear, Conv1D)
"""Conv1D is GPT-2's linear layer, with its matrix the other way round."""
AUTOCAST_FAMILIES = ("gpt2", "bert", "roberta", "distilbert", "electra", "llama", "mistral", "qwen2", "qwen3")
"""Model types that leave every product to the autocast round them, and look at no weight's type."""


def autocast_weights(network: Any) -> dict[str, nn.Parameter]:
    """What products use of a network and autocast would cast at every step, NAME -> weight or bias.

    Empty for families that may look at the type of a weight.
    """
    if network.config.model_type not in AUTOCAST_FAMILIES:
        return {}
    products = {name for name, module in network.named_modules() if type(module) in PRODUCTS}
    weights = network.named_parameters()
    return {name: each for name, each in weights if name.rpartition(".")[0] in products and each.requires_grad}


def sum_by_products(network: nn.Module) -> None:
    """Has products on a GPU get the gradient of their bias, a sum over all rows, by a product with ones.

    It takes 6 us where torch's sum takes 9 and a launch more (2,048 rows, H200). There is one for each layer of a
    transformer and each of its four products.
    """
    for module in network.modules():
        if type(module) in PRODUCTS and module.bias is not None:
            module.forward = partial(_forward, module)


def _forward(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    if not module.training:
        plain: torch.Tensor = type(module).forward(module, inputs)
        return plain
    rows = inputs.reshape(-1, inputs.shape[-1])
    product: Any = _Product
    found: torch.Tensor = product.apply(rows, module.weight, module.bias, type(module) is nn.Linear)
    return found.view(*inputs.shape[:-1], found.shape[-1])


class _Product(torch.autograd.Function):
    """rows @ weight + bias, or its transpose where the matrix is `nn.Linear`'s."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.bfloat16)  # type: ignore[untyped-decorator]
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, is_linear: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.is_linear = is_linear
        return functional.linear(rows, weight, bias) if is_linear else torch.addmm(bias, rows, weight)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        bias_gradient = torch.mv(gradient.t(), _ones(len(gradient), gradient.dtype, gradient.device))
        if ctx.is_linear:
            return gradient @ weight, gradient.t() @ rows, bias_gradient, None
        return gradient @ weight.t(), rows.t() @ gradient, bias_gradient, None


@cache
def _ones(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Never freed: a captured step reads it. (The same step before the capture makes it.)"""
    return torch.ones(count, dtype=dtype, device=device)
