"""Time FID's Inception: ours against torch-fidelity's and torchmetrics', images a second, memory, and distance.

All contestants hold the same weights (random ones unless a file is given), run in one process and take turns, round
by round, so that a busy machine slows all of them alike: trust the ratios. On a CPU with one thread they are ratios of
processor time, which other programs lengthen by what they take of the caches alone. Times include each one's own
resizing to 299 pixels. Memory is the peak above the weights of one batch in a process of its own.

    OMP_NUM_THREADS=1 python benchmarks/extractors.py --threads 1 --out results/benchmarks/extractors.json
    python benchmarks/extractors.py --table                                # writes the table of docs/metrics.md anew

torchmetrics is not needed: where it is not installed, its line is left out and the file says so.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from mmdit_eval.features import load_extractor
from mmdit_eval.inception import CLASSES, FEATURES, convolutions
from mmdit_eval.readme import rewrite
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmdit.train.tracking import describe_environment

ROOT = Path(__file__).resolve().parents[1]
PAGE, STORED = ROOT / "docs" / "metrics.md", ROOT / "results" / "benchmarks" / "extractors.json"

Call = Callable[[np.ndarray], Tensor]  # images uint8 [B, R, R, 3] to features [B, 2048]


def random_weights(path: Path) -> None:
    """Write a state dict whose activations stay of order one through all 94 convolutions."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"fc.weight": 0.02 * normal(CLASSES, FEATURES), "fc.bias": 0.1 * normal(CLASSES)}
    for name, shape in convolutions().items():
        tensors[f"{name}.conv.weight"] = normal(*shape) * (2 / np.prod(shape[1:])) ** 0.5
        for part, centre in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0)):
            tensors[f"{name}.bn.{part}"] = centre + 0.1 * normal(shape[0])
        tensors[f"{name}.bn.running_var"] = 1 + 0.2 * torch.rand(shape[0], generator=generator)
        tensors[f"{name}.bn.num_batches_tracked"] = torch.tensor(1)
    torch.save(tensors, path)


def build(name: str, weights: Path, device: str) -> Call | None:
    """Return one contestant, or None where its library is not installed."""
    if name.startswith("ours"):
        precision: Literal["fp32", "bf16"] = "bf16" if "bf16" in name else "fp32"
        kind = "inception_clean" if "clean" in name else "inception_fid"
        extractor = load_extractor(kind, weights=str(weights), device=device, precision=precision)
        return lambda images: extractor(images)[:, :FEATURES]
    try:
        if name == "torch-fidelity":
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Network

            network = Network("x", ["2048"], feature_extractor_weights_path=str(weights)).to(device)
        else:
            from torchmetrics.image.fid import NoTrainInceptionV3

            network = NoTrainInceptionV3("x", ["2048"], feature_extractor_weights_path=str(weights)).to(device)
    except ModuleNotFoundError:
        return None

    @torch.no_grad()
    def call(images: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
        found = network(pixels)
        return (found[0] if isinstance(found, tuple) else found).reshape(len(images), -1).cpu()

    return call


CONTESTANTS = ("torch-fidelity", "torchmetrics", "ours", "ours, clean-fid's resizing", "ours, bf16")


def peak_memory(name: str, weights: Path, images: np.ndarray, device: str) -> float:
    """MiB that one batch takes above the loaded network; on CUDA the allocator's peak."""
    call = build(name, weights, device)
    assert call is not None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(images)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak, which loading the weights has set
    before = resident("VmRSS")
    call(images)
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """MiB of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 2**10


def memory_of(name: str, weights: Path, arguments: list[str]) -> float:
    """Measure a contestant's memory in a process of its own, where nobody else's peak hides it."""
    command = [sys.executable, __file__, *arguments, "--weights", str(weights), "--memory-of-one", name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main(
    rounds: int = 5,
    batch_size: int = 8,
    size: int = 256,
    threads: int = 1,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    weights: Path | None = None,
    memory: bool = True,
    memory_of_one: str | None = None,
    out: Path | None = None,
    table: bool = False,
) -> None:
    """Run the benchmark.

    Args:
        rounds: each contestant runs once a round; the median counts.
        size: pixels a side of the images.
        weights: published file; default: random weights.
        memory: also measure memory, one process a contestant.
        memory_of_one: what that process is started with: a contestant's name.
        out: JSON file for the results.
        table: write the table of docs/metrics.md from results/benchmarks/extractors.json, and measure nothing.
    """
    if table:
        text = rewrite(PAGE.read_text("utf-8"), markdown(json.loads(STORED.read_text("utf-8"))), "extractors")
        PAGE.write_text(text, encoding="utf-8")
        return
    torch.set_num_threads(threads)
    images = np.random.default_rng(0).integers(0, 256, (batch_size, size, size, 3), dtype=np.uint8)
    if memory_of_one is not None and weights is not None:
        print(peak_memory(memory_of_one, weights, images, device))
        return
    with tempfile.TemporaryDirectory() as folder:
        if weights is None:
            weights = Path(folder) / "weights-inception-2015-12-05-6726825d.pth"
            random_weights(weights)
        calls = {name: call for name in CONTESTANTS if (call := build(name, weights, device)) is not None}
        shared = ["--batch-size", str(batch_size), "--size", str(size), "--threads", str(threads), "--device", device]
        mebibytes = {name: memory_of(name, weights, shared) for name in calls} if memory else {}
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        found: dict[str, Tensor] = {}
        clock = time.process_time if device == "cpu" and threads == 1 else time.perf_counter
        for turn in range(rounds + 1):  # the first round warms up
            for name, call in calls.items():
                started = clock()
                found[name] = call(images)
                if turn:
                    seconds[name].append(clock() - started)
    rows = [_row(name, batch_size, seconds, found, mebibytes) for name in calls]
    result: dict[str, Any] = {
        "command": f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')} python benchmarks/extractors.py "
        f"--rounds {rounds} {' '.join(shared)}",
        "environment": describe_environment(),
        "clock": clock.__name__,
        "missing": [name for name in CONTESTANTS if name not in calls],
        "rows": rows,
    }
    _print(rows)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _row(
    name: str, count: int, seconds: dict[str, list[float]], found: dict[str, Tensor], mebibytes: dict[str, float]
) -> dict[str, Any]:
    """Median speed, its ratio round by round, and the distance from torch-fidelity's features."""
    base = "torch-fidelity"
    ratios = [theirs / mine for theirs, mine in zip(seconds[base], seconds[name], strict=True)]
    error = (found[name].double() - found[base].double()).norm() / found[base].double().norm()
    return {
        "name": name,
        "images_per_second": round(count / statistics.median(seconds[name]), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "relative_error": float(f"{float(error):.3g}"),
        "memory_mib": round(mebibytes[name], 1) if name in mebibytes else None,
    }


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(title="FID's Inception, features of 2,048")
    for column in ("implementation", "images/s", "x torch-fidelity", "relative error", "MiB a batch"):
        table.add_column(column, justify="left" if column == "implementation" else "right")
    for row in rows:
        low, high = row["ratio_range"]
        ratio = f"{row['ratio']:.2f} [{low:.2f} – {high:.2f}]"
        memory = "" if row["memory_mib"] is None else f"{row['memory_mib']:.0f}"
        table.add_row(row["name"], f"{row['images_per_second']:.1f}", ratio, f"{row['relative_error']:.1e}", memory)
    Console(width=None if Console().is_terminal else 100).print(table)


def markdown(result: dict[str, Any]) -> str:
    """Return the table of docs/metrics.md."""
    lines = ["| who | images/s | times torch-fidelity | relative error | MiB a batch |", "|---|---:|---:|---:|---:|"]
    for row in result["rows"]:
        memory = "" if row["memory_mib"] is None else f"{row['memory_mib']:.0f}"
        speed = f"{row['images_per_second']:.1f} | {row['ratio']:.2f}"
        lines.append(f"| {row['name']} | {speed} | {row['relative_error']:.0e} | {memory} |")
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(main)
