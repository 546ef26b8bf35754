"""The process group of one trial, through ColossalAI. The only file that names it.

`colossalai.launch` is not used: it takes no timeout (gloo's is then 30 minutes) and its store listens on every
interface. What else it does is done here: the process group, the device, LOCAL_RANK. Facts that shaped this file:
Booster's own "bf16" precision cannot be instantiated in ColossalAI 0.5.0, so autocast goes round the forward pass, and
HybridAdam needs a CUDA build, so the optimizer is torch's.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, TCPStore

from trainables.worker import LISTENER

if os.environ.get("TUNE_SERVICE_DEVICE") == "cpu":
    # ColossalAI takes CUDA whenever it sees it, and its import opens a context there.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

if TYPE_CHECKING:
    from colossalai.booster import Booster
    from colossalai.booster.plugin import TorchDDPPlugin


def _colossalai() -> tuple[type[Booster], type[TorchDDPPlugin]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from colossalai.booster import Booster
        from colossalai.booster.plugin import TorchDDPPlugin
        from colossalai.logging import disable_existing_loggers

    disable_existing_loggers()
    logging.getLogger("colossalai").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    return Booster, TorchDDPPlugin


if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    # A rank alone does without: the import takes seconds. Where there are more it is a part of the cold start, which
    # has a deadline of its own, and sets variables that CUDA reads once.
    _colossalai()

GROUP_TIMEOUT = timedelta(days=1)
"""The last resort for a rank whose peer is stuck. The supervisor kills both by its deadline, five times the slowest
epoch: a shorter time here would fail a rank whose peer downloads, or scores, for long."""
BOOST_ONE_RANK = False
"""Whether one rank alone is boosted too, for measurements."""
DDP_TIMED_STEPS = 10
"""DDP times so many steps with events that it waits for, which a CUDA graph cannot hold."""


def launch(rank: int, world_size: int, device: torch.device) -> None:
    """Joins the trial's process group, or keeps it when this process is in it already (a warm worker group).

    Reads MASTER_ADDR and MASTER_PORT. One rank needs no port at all.
    """
    if dist.is_initialized():
        assert (dist.get_rank(), dist.get_world_size()) == (rank, world_size), "a worker group keeps its size"
        return
    os.environ["LOCAL_RANK"] = "0"  # each rank sees its own GPU only, as device 0
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # All work of this thread: the default stream cannot be captured, and DDP keeps to the stream it was made on.
        torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    if host == "127.0.0.1":
        # Otherwise gloo and NCCL take the interface that the host name points to: reachable from outside.
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = _store(rank, world_size, host) if world_size > 1 else HashStore()
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT)


def _store(rank: int, world_size: int, host: str) -> TCPStore:
    """A TCP store that listens on `host` alone (torch's own choice is every interface)."""
    port = int(os.environ["MASTER_PORT"])
    if rank:
        return TCPStore(host, port, world_size, is_master=False, timeout=GROUP_TIMEOUT)
    held = os.environ.pop(LISTENER, None)
    descriptor = int(held) if held else socket.create_server((host, port)).detach()  # the store closes it
    return TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        timeout=GROUP_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=descriptor,
    )


class Parallel:
    """A model and its optimizer, boosted by TorchDDPPlugin over the process group that `launch` joined.

    One rank alone has nobody to average its gradients with. Its model stays unwrapped: the numbers are the same, and
    DDP's copies of every gradient are saved.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.model: Callable[..., Any] = model
        self._optimizer: Any = optimizer
        self._booster: Booster | None = None
        self.is_wrapped = self.world_size > 1 or BOOST_ONE_RANK
        self.num_eager_steps = 0
        """Steps to run before one is captured."""
        if self.is_wrapped:
            booster, plugin = _colossalai()
            # Buffers are constants in these models.
            self._booster = booster(plugin=plugin(broadcast_buffers=False, gradient_as_bucket_view=True))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.model, self._optimizer, *_ = self._booster.boost(model, optimizer)
            self.num_eager_steps = DDP_TIMED_STEPS + 1
            # Else it times every 100th step too.
            cast(Any, self.model).module._set_ddp_runtime_logging_sample_rate(2**31 - 1)

    def gradients(self, sync: bool) -> AbstractContextManager[Any]:
        """Goes round forward and backward: gradients are averaged over the ranks in it only when `sync`."""
        if sync or self._booster is None:
            return nullcontext()
        return cast(AbstractContextManager[Any], self._booster.no_sync(self.model, self._optimizer))

    def backward(self, loss: torch.Tensor) -> None:
        if self._booster is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self._booster.backward(loss, self._optimizer)

    def step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The element-wise sum over all ranks, on every rank."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def largest_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The element-wise maximum over all ranks, on every rank; of a tensor on any device."""
    if dist.get_world_size() > 1:
        shared = value.cuda() if dist.get_backend() == "nccl" else value
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return shared.cpu()
    return value


def barrier() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()
