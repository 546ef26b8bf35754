"""Whether captured steps on a GPU train as plain ones do. Prints each check, and ends with 1 if one failed.

    TUNE_SERVICE_TEST_DATA=DATA python tests/gpu/check_steps.py [PART ...]

PARTs are the functions below. DATA holds gpt2-tokenizer/, glue/mrpc and glue/sst2; the models are small and start from
random weights.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from trainables import Context, Report, learner, optimizer, parallel, products
from trainables.finetune import finetune

DATA = Path(os.environ["TUNE_SERVICE_TEST_DATA"])
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 3, "n_embd": 192, "n_head": 3},
    "bert": {"num_hidden_layers": 3, "hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "llama": {"num_hidden_layers": 3, "hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 512},
}
MRPC = {"task": "mrpc", "path": str(DATA / "glue" / "mrpc")}
NOTHING: Any = (lambda device: None, lambda network: {}, lambda network: None)
failed: list[str] = []


def reports(family: str, data: dict[str, Any], resume_from: Path | None = None, **options: Any) -> Iterator[Report]:
    dropout, seed = options.pop("dropout", 0.0), options.pop("seed", 42)
    # 28 divides the 3,668 rows: the smaller batch at the end, which a captured step fills up, rounds differently.
    fixed = {"max_epochs": 2, "learning_rate": 3e-4, "precision": "fp32", "max_length": 96, "batch_size": 28}
    training: dict[str, Any] = fixed | options
    config = FAMILIES[family] | {"model_type": family} | ({} if family == "llama" else {"dropout": dropout})
    settings = {
        "model": {"name": str(DATA / "gpt2-tokenizer"), "from_scratch": True, "config": config},
        "data": data,
        "training": training,
    }
    context = Context({}, device="cuda", seed=seed, max_epochs=training["max_epochs"], settings=settings)
    return finetune(Context(**(vars(context) | {"resume_from": resume_from})))


def losses(*arguments: Any, **options: Any) -> list[float]:
    return [report.metrics["train_loss"] for report in reports(*arguments, **options)]


def check(name: str, found: list[float], expected: list[float], tolerance: float) -> None:
    worst = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    if not worst <= tolerance:
        failed.append(name)
    print(json.dumps({"check": name, "ok": worst <= tolerance, "found": found, "expected": expected}), flush=True)


def num_graphs() -> int:
    (kept,) = learner._kept
    return sum(graph is not None for ready in kept._ready.values() for graph in ready.steps._graphs._graphs.values())


def same_losses() -> None:
    for family in FAMILIES:
        check(f"{family}: captured as plain", losses(family, MRPC), losses(family, MRPC, compile="off"), 1e-5)
    check("gpt2: compiled as plain", losses("gpt2", MRPC, compile="on"), losses("gpt2", MRPC), 1e-3)
    micro = {"micro_batch_size": 12, "learning_rate": 3e-6}
    check("gpt2: micro batches", losses("gpt2", MRPC, **micro), losses("gpt2", MRPC, learning_rate=3e-6), 1e-5)
    plain = losses("gpt2", MRPC)
    parallel.BOOST_ONE_RANK = True
    learner._kept.clear()
    check("gpt2: under TorchDDPPlugin", losses("gpt2", MRPC), plain, 1e-5)
    parallel.BOOST_ONE_RANK = False
    learner._kept.clear()


def plain_ways() -> None:
    """Without the optimizer's kernel, without bf16 copies of weights, with torch's own gradients of biases.

    bf16 at a small rate: at 3e-4 whatever rounds otherwise (micro batches, a CPU) moves GPT-2's losses by some 1e-4.
    """
    quick = optimizer.one_pass_on, products.autocast_weights, products.sum_by_products
    for family in FAMILIES:
        for precision, rate, tolerance in (("fp32", 3e-4, 1e-5), ("bf16", 3e-5, 1e-4)):
            name, options = f"{family}, {precision}", {"precision": precision, "learning_rate": rate}
            learner._kept.clear()
            found = losses(family, MRPC, **options)
            used = learner._kept[0].optimizer
            check(f"{name}: bf16 copies", [len(used._copies) > 0], [precision == "bf16"], 0)
            check(f"{name}: the optimizer's kernel", [used._one_pass is not None], [True], 0)
            learner._kept.clear()
            optimizer.one_pass_on, products.autocast_weights, products.sum_by_products = NOTHING
            check(f"{name}: as the plain ways", found, losses(family, MRPC, **options), tolerance)
            optimizer.one_pass_on, products.autocast_weights, products.sum_by_products = quick
    learner._kept.clear()


def next_trials() -> None:
    first = losses("gpt2", MRPC)
    losses("gpt2", MRPC)  # a width that came once is captured now
    graphs = num_graphs()
    losses("gpt2", MRPC, learning_rate=1e-4, weight_decay=0.1, warmup_fraction=0.3, max_grad_norm=None, seed=7)
    check("gpt2: another rate, decay, warm-up, clipping and seed captures nothing", [num_graphs()], [graphs], 0)
    check("gpt2: a reset model is as new", losses("gpt2", MRPC), first, 1e-5)
    learner._kept.clear()
    first = losses("gpt2", MRPC, precision="bf16")
    others: list[dict[str, Any]] = [{"precision": "fp32"}, {"micro_batch_size": 14}, {"seed": 7}]
    for other in others:
        losses("gpt2", MRPC, **{"precision": "bf16"} | other)
        check(f"gpt2, bf16: as new after {other}", losses("gpt2", MRPC, precision="bf16"), first, 1e-5)


def resumed() -> None:
    for precision in ("fp32", "bf16"):
        options: dict[str, Any] = {"max_epochs": 3, "dropout": 0.1, "precision": precision}
        with tempfile.TemporaryDirectory() as folder:
            undisturbed = []
            for report in reports("gpt2", MRPC, **options):
                undisturbed.append(report.metrics["train_loss"])
                if report.epoch <= 2 and report.save is not None:  # the second takes the place of the first
                    report.save(Path(folder))
            again = losses("gpt2", MRPC, Path(folder), **options)
            name = f"gpt2, {precision}: a resumed trial goes on as if it had not been cut, with dropout"
            check(name, again, undisturbed[2:], 1e-4)


def masks() -> None:
    """Dropout that hid the same all the time would be learned round: the loss would fall faster."""
    found = {
        compile_: [losses("gpt2", MRPC, compile=compile_, dropout=0.3, seed=seed)[-1] for seed in (1, 2, 3)]
        for compile_ in ("auto", "off")
    }
    means = [sum(values) / len(values) for values in found.values()]
    spread = max(max(values) - min(values) for values in found.values())
    print(json.dumps(found), flush=True)
    check("gpt2: dropout under captured steps as under plain ones", [means[0]], [means[1]], max(spread, 0.005))


def accuracies() -> None:
    """Three seeds on 8,000 sentences of SST-2 in bf16 with dropout."""
    with tempfile.TemporaryDirectory() as folder:
        for split, size in (("train", 8000), ("validation", 872)):
            table = pq.read_table(DATA / "glue" / "sst2" / f"{split}.parquet")
            pq.write_table(table.slice(0, size), Path(folder) / f"{split}.parquet")
        data = {"task": "sst2", "path": folder}
        found: dict[str, list[float]] = {"auto": [], "off": []}
        for compile_, values in found.items():
            for seed in (1, 2, 3):
                options: dict[str, Any] = {
                    "compile": compile_,
                    "precision": "bf16",
                    "dropout": 0.1,
                    "max_epochs": 3,
                    "max_length": 64,
                    "batch_size": 32,
                }
                *_, last = reports("gpt2", data, seed=seed, **options)
                values.append(round(last.metrics["eval_accuracy"], 4))
        spread = max(max(values) - min(values) for values in found.values())
        means = [sum(values) / len(values) for values in found.values()]
        print(json.dumps(found), flush=True)
        check("sst2: final accuracy within the spread of seeds", [means[0]], [means[1]], max(spread, 0.01))


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), torch.__version__)
    parts = {part.__name__: part for part in (same_losses, plain_ways, next_trials, resumed, masks, accuracies)}
    for part in (parts[name] for name in sys.argv[1:] or parts):
        started = time.perf_counter()
        part()
        print(f"{part.__name__}: {time.perf_counter() - started:.1f} s", flush=True)
    sys.exit(len(failed) > 0)
