"""What a trial on a GPU does to those beside it under the Multi-Process Service. Prints each check; 1 if one failed.

    TUNE_SERVICE_TEST_DATA=DATA python tests/gpu/check_neighbours.py

DATA holds gpt2-tokenizer/ and glue/mrpc. A process trains GPT-2 124M while others beside it are killed in mid-epoch,
frozen, out of memory, ended by a device assert, and at last write to an address that is nobody's. Up to there its train
losses must be those of the same process alone. What the last one does is told, not checked: it ended all (H200).
Nothing may be left of the service then.
"""

from __future__ import annotations

import atexit
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

EPOCHS = 5
PATIENCE_S = 90.0
SERVERS = ("nvidia-cuda-mps", "nvidia-cuda-mps-server", "nvidia-cuda-mps-control")
failed: list[str] = []


def train(does: str) -> None:
    """A line for each epoch, for ever; after the first one it waits for a line of standard input, and `does` that."""
    from bench_finetune_gpu import settings

    from trainables import Context
    from trainables.finetune import finetune

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for report in finetune(Context({}, device=device, max_epochs=150, settings=settings(150))):
        print("LOSS " + json.dumps(report.metrics["train_loss"]), flush=True)
        if does != "train" and report.epoch == 1:
            sys.stdin.readline()
            harm(does)


def harm(does: str) -> None:
    """Ends this process, one way or another."""
    if does == "memory":
        kept = []
        while True:
            kept.append(torch.empty(2**30, dtype=torch.uint8, device="cuda"))
    elif does == "assert":
        torch.zeros(10, device="cuda")[torch.tensor([10**6], device="cuda")].sum().item()
    elif does == "address":
        # A kernel does it: the driver refuses.
        write[(1,)](0x10, torch.zeros(1, dtype=torch.int64, device="cuda"))
        torch.cuda.synchronize()
    raise SystemExit(f"{does} ended nothing")


@triton.jit
def write(address, offset):  # type: ignore[no-untyped-def]  # Triton compiles it
    tl.store((address + tl.load(offset)).to(tl.pointer_type(tl.int32)), 1)


class Client:
    """A process that trains."""

    def __init__(self, does: str = "train") -> None:
        self.losses: list[float] = []
        self._process = subprocess.Popen(
            [sys.executable, __file__, does], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self._process.kill)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            if line.startswith("LOSS "):
                self.losses.append(json.loads(line.removeprefix("LOSS ")))

    def trains_on(self, epochs: int) -> bool:
        """Whether it finishes so many more epochs."""
        return self.reaches(len(self.losses) + epochs)

    def reaches(self, epoch: int) -> bool:
        end = time.monotonic() + PATIENCE_S
        while len(self.losses) < epoch and self._process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        return len(self.losses) >= epoch

    def go(self) -> int:
        """Has it do what it was made for; its exit code."""
        self._process.communicate("go\n", timeout=PATIENCE_S)
        return self._process.returncode

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)
        if number == signal.SIGKILL:
            self._process.wait()


def check(name: str, ok: bool, found: Any = None) -> None:
    if not ok:
        failed.append(name)
    print(json.dumps({"check": name, "ok": ok, "found": found}), flush=True)


def neighbours() -> None:
    from tune_service.mps import side_by_side

    alone = Client()
    check("one trains alone", alone.reaches(EPOCHS))
    alone.send(signal.SIGKILL)
    with tempfile.TemporaryDirectory() as folder, side_by_side(Path(folder) / "mps", ["0"], 8) as shared:
        check("the service has started", shared.why_not is None, shared.why_not)
        others = {does: Client(does) for does in ("memory", "assert", "address")}
        one, killed, frozen = Client(), Client(), Client()
        check("six train side by side", all(each.reaches(1) for each in (*others.values(), one, killed, frozen)))
        killed.send(signal.SIGKILL)
        check("one goes on beside one that was killed", one.trains_on(1))
        frozen.send(signal.SIGSTOP)
        check("one goes on beside one that is frozen", one.trains_on(1))
        frozen.send(signal.SIGKILL)
        for does in ("memory", "assert"):
            code = others[does].go()
            check(f"one goes on beside one that ended by {does}", code != 0 and one.trains_on(1), code)
        check(
            "its losses are those of one alone",
            one.reaches(EPOCHS) and one.losses[:EPOCHS] == alone.losses[:EPOCHS],
            one.losses[:EPOCHS],
        )
        code = others["address"].go()
        print(json.dumps({"address": code, "one goes on": one.trains_on(1)}), flush=True)
        one.send(signal.SIGKILL)
    left = [process.info["name"] for process in psutil.process_iter(["name"]) if process.info["name"] in SERVERS]
    check("nothing is left of the service", not left, left)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(sys.argv[1])
    else:
        print(torch.cuda.get_device_name(), torch.__version__)
        neighbours()
        sys.exit(len(failed) > 0)
