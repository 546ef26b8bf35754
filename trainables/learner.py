"""A model and its optimizer as a warm process keeps them: the next trial resets them in place and finds all else ready.

What was captured or compiled for one trial reads and writes these very tensors, so that it serves the next one too.
"""

from __future__ import annotations

import gc
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from trainables import optimizer, products
from trainables.config import ModelConfig
from trainables.model import build_model
from trainables.parallel import Parallel, largest_over_ranks

if TYPE_CHECKING:
    from trainables.adamw_kernel import OnePass

Ready = TypeVar("Ready")

MAX_READY = 4
"""So many combinations of batch size, `max_length` and so on are kept ready at once: their graphs take memory."""


@dataclass(frozen=True)
class Kind:
    """What two trials must have in common to use one learner."""

    model: ModelConfig
    label_names: tuple[str, ...]
    device: torch.device
    compiles: bool


class Learner:
    """A model of one kind on one rank, for any number of trials one after the other."""

    def __init__(self, kind: Kind, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.kind, self._tokenizer = kind, tokenizer
        self.network = self._build(seed).to(kind.device)
        if kind.compiles:
            compile_layers(self.network)
        elif kind.device.type == "cuda":  # inductor does as much by itself
            products.sum_by_products(self.network)
        self.optimizer = optimizer.AdamW(self.network, _one_pass(kind.device))
        self.parallel = Parallel(self.network, self.optimizer)
        self._ready: OrderedDict[Hashable, Any] = OrderedDict()
        self._on_host: dict[str, torch.Tensor] = {}

    def reset(self, seed: int) -> None:
        """Makes it what a new one with this seed would be, bit by bit."""
        if seed != self._seed:
            self._build(seed)
        with torch.no_grad():
            for name, tensor in self.network.state_dict().items():
                tensor.copy_(self._fresh[name])
        self.optimizer.reset()
        self.optimizer.zero_grad()

    def bf16_copies(self) -> dict[str, torch.Tensor]:
        """Copies of the weights that matrix products use, NAME -> copy, for training with bf16 autocast.

        Autocast makes them at every step, and casts each gradient back. Used in the weights' place they give the same
        gradients, in bf16, and the optimizer brings them up to date in passing. Empty where DDP has the model, which
        averages gradients of its parameters.
        """
        weights = {} if self.parallel.is_wrapped else products.autocast_weights(self.network)
        return {name: self.optimizer.copy_of(weight) for name, weight in weights.items()}

    def state_on_host(self) -> dict[str, torch.Tensor]:
        """The network's state in host memory: as it is there, or copied to where it stays until this is called again.

        To get new memory for each copy takes the system six times as long as to fill it (GPT-2, H200: 0.28 s, 0.04 s).
        """
        state: dict[str, torch.Tensor] = self.network.state_dict()
        if self.kind.device.type == "cpu":
            return state
        self._on_host = self._on_host or like_on_host(state)
        for name, tensor in state.items():
            self._on_host[name].copy_(tensor)
        return dict(self._on_host)

    def uncompiled(self) -> AbstractContextManager[Any]:
        """Goes round an evaluation: it runs as the exported model would."""
        return torch.compiler.set_stance("force_eager") if self.kind.compiles else nullcontext()

    def ready(self, key: Hashable, make: Callable[[], Ready]) -> Ready:
        """What `make` gave when this key was asked for first."""
        found: Ready = self._ready.pop(key) if key in self._ready else make()
        self._ready[key] = found
        if len(self._ready) > MAX_READY:
            self._ready.popitem(last=False)
        return found

    def _build(self, seed: int) -> PreTrainedModel:
        """A new network on the CPU. Its weights stay in host memory, where they take nothing from what trains."""
        torch.manual_seed(seed)
        network = build_model(self.kind.model, self._tokenizer, self.kind.label_names)
        self._seed = seed
        is_shared = self.kind.device.type == "cpu"  # `to` makes no copy then
        self._fresh = {name: tensor.clone() if is_shared else tensor for name, tensor in network.state_dict().items()}
        return network


def like_on_host(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors without values in host memory for those of `state`, NAME -> tensor: names that are tied share one."""
    made: dict[Hashable, torch.Tensor] = {}
    for tensor in state.values():
        made.setdefault(_place(tensor), torch.empty_like(tensor, device="cpu"))
    return {name: made[_place(tensor)] for name, tensor in state.items()}


def _place(tensor: torch.Tensor) -> Hashable:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _one_pass(device: torch.device) -> type[OnePass] | None:
    """The optimizer's kernel where all ranks can: others round otherwise, and nothing would bring the weights of the
    ranks together again."""
    found = optimizer.one_pass_on(device)
    return None if largest_over_ranks(torch.tensor(float(found is None))) else found


def compile_layers(network: nn.Module) -> None:
    """Has inductor compile the layers of a transformer, in training alone.

    The layers are alike and so one compilation, for all widths. What was compiled is kept for other processes. Comes
    before `boost`, which then sees the gradients of one layer after the other.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(caches / "tune-service" / "inductor"))
    for stack in network.modules():
        if isinstance(stack, nn.ModuleList):
            for layer in stack:
                layer.compile(dynamic=True)


_kept: list[Learner] = []
"""The learner of the trial before; empty while a trial has it."""


def take(kind: Kind, tokenizer: PreTrainedTokenizerFast, seed: int) -> Learner:
    """A learner as new; the one of the trial before where that is of this kind. `give_back` ends its use."""
    learner = _kept.pop() if _kept else None
    if learner is None or learner.kind != kind:
        learner = None  # the new model needs its memory
        gc.collect()
        if kind.device.type == "cuda":
            torch.cuda.empty_cache()
        learner = Learner(kind, tokenizer, seed)
    learner.reset(seed)
    return learner


def give_back(learner: Learner) -> None:
    _kept[:] = [learner]
