"""Matrix products in training: other ways to the gradients of plain modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForSequenceClassification
from transformers.pytorch_utils import Conv1D

from trainables import products
from trainables.products import autocast_weights, sum_by_products


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.GELU(), Conv1D(4, 8), nn.Linear(4, 1, bias=False))


def gradients(net: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    net(inputs).square().sum().backward()
    return [parameter.grad for parameter in net.parameters() if parameter.grad is not None]


def test_a_bias_summed_by_a_product_gives_the_gradients_of_plain_modules() -> None:
    plain, quick = network(), network()
    sum_by_products(quick)
    inputs = torch.randn(2, 5, 3)
    expected, found = gradients(plain, inputs), gradients(quick, inputs)
    assert len(expected) == 5
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)
        assert mine.stride() == reference.stride()


def test_the_gradient_of_what_goes_in_is_that_of_plain_modules_too() -> None:
    plain, quick = network(), network()
    sum_by_products(quick)
    first, second = torch.randn(2, 5, 3).requires_grad_(), torch.empty(0)
    second = first.detach().clone().requires_grad_()
    gradients(plain, first)
    gradients(quick, second)
    assert first.grad is not None
    torch.testing.assert_close(second.grad, first.grad, rtol=1e-5, atol=1e-6)


def test_outside_training_a_module_does_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, quick = network().eval(), network().eval()
    sum_by_products(quick)
    monkeypatch.delattr(products, "_Product")
    inputs = torch.randn(7, 3)
    assert torch.equal(quick(inputs), plain(inputs))
    assert list(quick.state_dict()) == list(plain.state_dict())


def test_autocast_weights_are_those_of_products_and_no_others() -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    names = autocast_weights(BertForSequenceClassification(BertConfig(vocab_size=20, **sizes)))
    assert "bert.encoder.layer.0.attention.self.query.weight" in names
    assert "bert.encoder.layer.0.output.dense.bias" in names
    assert not [name for name in names if "LayerNorm" in name or "embeddings" in name]
    assert len(names) == 2 * 8  # six products of the layer, the pooler, the classifier


def test_a_family_that_looks_at_the_types_of_weights_has_none() -> None:
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    assert autocast_weights(T5ForSequenceClassification(config)) == {}


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_product_without_a_bias_stays_as_it_is(has_bias: bool) -> None:
    module = nn.Linear(3, 4, bias=has_bias)
    sum_by_products(module)
    assert ("forward" in vars(module)) == has_bias
