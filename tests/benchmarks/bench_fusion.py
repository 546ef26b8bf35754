"""What K trials of one model would give in one process, their weights stacked so that each kernel does the work of K.

    python tests/benchmarks/bench_fusion.py [--trials 1 4 16]

The product does not do this; here is why. GPT-2 124M, batch 32, 64 tokens a row, no dropout, written out with stacked
weights: `full` trains all of them, `lora` the classifier and adapters of rank 8 on a frozen base that all trials share.
A step is one CUDA graph (forward, backward, fused AdamW with one rate for all, no clipping: a real one would do more).
First each trial's losses must be those that it has alone (fp32, a small model, three steps).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from machine import has_gpu, show
from torch import Tensor, nn
from torch.nn import functional

ROWS, WIDTH, RANK = 32, 64, 8
REPLAYS = 20


@dataclass(frozen=True)
class Sizes:
    vocabulary: int
    width: int
    layers: int
    heads: int


GPT2 = Sizes(50_259, 768, 12, 12)
SMALL = Sizes(200, 64, 2, 4)


class Stacked(nn.Module):
    """K sequence classifiers with GPT-2's layers. Every tensor has K in front, or 1 where all share it."""

    def __init__(self, sizes: Sizes, trials: int, adapts: bool, device: str) -> None:
        super().__init__()
        self.sizes, self.trials, self.adapts = sizes, trials, adapts
        width, base = sizes.width, 1 if adapts else trials
        self.weights = nn.ParameterDict()

        def add(name: str, *shape: int, scale: float = 0.02, shift: float = 0.0, own: bool = False) -> None:
            tensor = torch.randn(trials if own else base, *shape, device=device) * scale + shift
            self.weights[name] = nn.Parameter(tensor, requires_grad=own or not adapts)

        add("tokens", sizes.vocabulary, width)
        add("places", 1024, width)
        for layer in range(sizes.layers):
            for norm in ("before", "between"):
                add(f"{layer}_{norm}_scale", 1, width, scale=0.0, shift=1.0)
                add(f"{layer}_{norm}_shift", 1, width, scale=0.0)
            for name, outputs, inputs in (("qkv", 3, 1), ("out", 1, 1), ("up", 4, 1), ("down", 1, 4)):
                add(f"{layer}_{name}", inputs * width, outputs * width)
                add(f"{layer}_{name}_bias", 1, outputs * width, scale=0.0)
            if adapts:
                add(f"{layer}_a", width, RANK, own=True)
                add(f"{layer}_b", RANK, 3 * width, own=True)
        add("last_scale", 1, width, scale=0.0, shift=1.0)
        add("last_shift", 1, width, scale=0.0)
        add("classes", width, 2, own=True)

    def one(self, trial: int) -> Stacked:
        """A copy of one of the trials."""
        found = Stacked(self.sizes, 1, self.adapts, str(self.weights["tokens"].device))
        with torch.no_grad():
            for name, weight in found.weights.items():
                weight.copy_(self.weights[name][trial % len(self.weights[name]) :][:1])
        return found

    def forward(self, ids: Tensor) -> Tensor:
        """Logits, shape (K, rows, 2), of token ids, shape (K, rows, width)."""
        weights, width = self.weights, self.sizes.width
        trials, rows, length = ids.shape
        table = weights["tokens"]
        shift = torch.arange(trials, device=ids.device)[:, None, None] * self.sizes.vocabulary
        x = functional.embedding(ids if len(table) == 1 else ids + shift, table.flatten(0, 1))
        x = (x + weights["places"][:, None, :length]).flatten(1, 2)  # (K, rows * length, width)
        for layer in range(self.sizes.layers):
            y = self._norm(x, f"{layer}_before")
            qkv = self._product(y, f"{layer}_qkv")
            if self.adapts:
                qkv = qkv + torch.bmm(torch.bmm(y, weights[f"{layer}_a"]), weights[f"{layer}_b"])
            heads = qkv.view(trials * rows, length, 3, self.sizes.heads, -1).permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
            x = x + self._product(y.transpose(1, 2).reshape(trials, rows * length, width), f"{layer}_out")
            y = functional.gelu(self._product(self._norm(x, f"{layer}_between"), f"{layer}_up"), approximate="tanh")
            x = x + self._product(y, f"{layer}_down")
        last = self._norm(x, "last").view(trials, rows, length, width)[:, :, -1]
        return torch.bmm(last, weights["classes"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale, shift = self.weights[f"{name}_scale"], self.weights[f"{name}_shift"]
        if len(scale) == 1:
            return functional.layer_norm(x, [self.sizes.width], scale[0, 0], shift[0, 0])
        found: Tensor = functional.layer_norm(x, [self.sizes.width]) * scale + shift
        return found

    def _product(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[name], self.weights[f"{name}_bias"]
        if len(weight) == 1:
            return torch.addmm(bias[0], x.flatten(0, 1), weight[0]).view(*x.shape[:2], -1)
        return torch.baddbmm(bias, x, weight)


def optimizer_of(model: Stacked) -> torch.optim.Optimizer:
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    is_on_gpu = trained[0].device.type == "cuda"
    return torch.optim.AdamW(trained, lr=1e-4, fused=True, capturable=is_on_gpu)


def losses_of(model: Stacked, ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(ids).float()
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(1)


def train(model: Stacked, ids: Tensor, labels: Tensor, steps: int) -> list[list[float]]:
    """Each step's losses of all trials."""
    optimizer, found = optimizer_of(model), []
    for _ in range(steps):
        losses = losses_of(model, ids, labels)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        found.append(losses.tolist())
    return found


def worst_difference(adapts: bool, device: str) -> float:
    """Between a trial's losses in a stack of four and alone."""
    torch.manual_seed(0)
    stacked = Stacked(SMALL, 4, adapts, device)
    ids = torch.randint(SMALL.vocabulary, (4, 8, 16), device=device)
    labels = torch.randint(2, (4, 8), device=device)
    alone = [train(stacked.one(k), ids[k : k + 1], labels[k : k + 1], steps=3) for k in range(4)]
    together = train(stacked, ids, labels, steps=3)
    return max(abs(together[step][k] - alone[k][step][0]) for step in range(3) for k in range(4))


def steps_per_s(trials: int, adapts: bool) -> float:
    """Steps a second of all trials together, bf16 autocast, on the GPU."""
    torch.cuda.empty_cache()
    model = Stacked(GPT2, trials, adapts, "cuda")
    optimizer = optimizer_of(model)
    ids = torch.randint(GPT2.vocabulary, (trials, ROWS, WIDTH), device="cuda")
    labels = torch.randint(2, (trials, ROWS), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = losses_of(model, ids, labels).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
        graph.replay()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
        taken_s = time.perf_counter() - started
    return trials * REPLAYS / taken_s


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, nargs="+", default=[1, 4, 16])
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for mode in ("full", "lora"):
        difference = worst_difference(mode == "lora", "cuda" if has_gpu() else "cpu")
        results[f"{mode}: worst difference of a loss"] = difference
        if not difference <= 1e-5:
            sys.exit(f"bench_fusion: {mode}: a trial in a stack trains otherwise than alone, by {difference}")
        if has_gpu():
            found = {trials: round(steps_per_s(trials, mode == "lora"), 1) for trials in options.trials}
            results[f"{mode}: steps/s of all"] = found
            print(mode, json.dumps(found), file=sys.stderr, flush=True)
    show("fusion", **results)
