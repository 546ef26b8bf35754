"""A model and its optimizer as a warm process keeps them: the next trial resets them in place and finds all else ready.

What was captured or compiled for one trial reads and writes these very tensors, so that it serves the next one too.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from trainables.config import ModelConfig
from trainables.model import build_model
from trainables.optimizer import AdamW
from trainables.parallel import Parallel

Ready = TypeVar("Ready")

DYNAMIC: bool | None = True
MAX_READY = 4
"""So many combinations of batch size, `max_length` and so on are kept ready at once: their graphs take memory."""


class Learner:
    """One model configuration on one rank, for any number of trials one after the other."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: PreTrainedTokenizerFast,
        label_names: Sequence[str],
        device: torch.device,
        seed: int,
        compiles: bool,
    ) -> None:
        self._config, self._tokenizer, self._label_names, self._device = config, tokenizer, label_names, device
        self._compiles = compiles
        network = self._build(seed)
        self.network = network.to(device)
        if compiles:
            compile_blocks(network)
        self.optimizer = AdamW(self.network)
        self.parallel = Parallel(self.network, self.optimizer)
        self._ready: OrderedDict[Hashable, Any] = OrderedDict()

    @property
    def key(self) -> Hashable:
        return learner_key(self._config, self._label_names, self._device, self._compiles)

    def reset(self, seed: int) -> None:
        """Makes it what a new one with this seed would be, bit by bit."""
        if seed != self._seed:
            self._build(seed)
        with torch.no_grad():
            for name, tensor in self.network.state_dict().items():
                tensor.copy_(self._fresh[name])
        self.optimizer.reset()
        self.optimizer.zero_grad()

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
        network = build_model(self._config, self._tokenizer, self._label_names)
        self._seed = seed
        is_shared = self._device.type == "cpu"  # `to` makes no copy then
        self._fresh = {name: tensor.clone() if is_shared else tensor for name, tensor in network.state_dict().items()}
        return network


def learner_key(config: ModelConfig, label_names: Sequence[str], device: torch.device, compiles: bool) -> Hashable:
    """What two trials must have in common to use one learner."""
    return config.model_dump_json(), tuple(label_names), device, compiles


def compile_blocks(network: nn.Module) -> None:
    """Has torch compile the layers of a transformer, each as it runs first: they are alike, and so one compilation."""
    for stack in network.modules():
        if isinstance(stack, nn.ModuleList):
            for block in stack:
                block.compile(dynamic=DYNAMIC)


_kept: dict[Hashable, Learner] = {}
"""The learner of the trial before; empty while a trial has it."""


def take(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    label_names: Sequence[str],
    device: torch.device,
    seed: int,
    compiles: bool,
) -> Learner:
    """A learner as new; the one of the trial before where the model is the same. `give_back` ends its use."""
    key = learner_key(config, label_names, device, compiles)
    learner = _kept.pop(key, None)
    if learner is None:
        # The new model needs the memory of the one before.
        _kept.clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        learner = Learner(config, tokenizer, label_names, device, seed, compiles)
    learner.reset(seed)
    return learner


def give_back(learner: Learner) -> None:
    _kept.clear()
    _kept[learner.key] = learner
