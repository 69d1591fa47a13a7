"""Cost per image against the number of processes, what a checkpoint holds up, and memory on paper: docs/scaling.md.

    python benchmarks/scaling.py --out results/benchmarks/scaling.json     # measures; minutes
    python benchmarks/scaling.py --table                                   # writes the tables of docs/scaling.md anew

The runs are real ones of the command line, over gloo, one thread a process, in turns. Two processes on the cores of one
machine show what talking costs, not what another machine gains. Memory is counted by `mmdit.train.state_memory`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from mmdit_eval.readme import rewrite

from mmdit.config import RunConfig, TrainConfig, model_config, resolve, to_yaml
from mmdit.models import build_denoiser
from mmdit.train.run import count_parameters
from mmdit.train.state_memory import StateMemory, checkpoint_memory, state_memory
from mmdit.train.tracking import describe_environment, read_metrics

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "results" / "benchmarks" / "scaling.json"
PAGE = ROOT / "docs" / "scaling.md"
GIB = 2**30
WAYS = (("one process", 1, "none"), ("DDP", 2, "none"), ("FSDP2", 2, "fsdp2"))
MODELS = (("SD3-medium", "sd3_medium"), ("SD3.5-large", "sd3.5_large"))
# processes, sharding, shard_size: what configs/hardware/ has files for, and 1,024
PLANS = (
    (1, "none", None), (8, "fsdp2", None), (32, "hsdp", 8), (64, "fsdp2", None), (1024, "hsdp", 8),
    (1024, "hsdp", 64), (1024, "fsdp2", None),
)  # fmt: skip


# --- cost per image ------------------------------------------------------------------------------------------------


def run_config(preset: str, images: int, batch_size: int, cache: Path, **train: Any) -> RunConfig:
    """Return a run on scenes that are encoded once for all runs here."""
    return resolve(
        {
            "name": "scaling",
            "model": {"name": "mmdit", "preset": preset},
            "data": {"name": "shapes", "num_images": 2048},
            "train": {
                "images": images, "batch_size": batch_size, "lr": 1e-4, "warmup_images": batch_size, "val_images": 8,
                "cache_dir": str(cache), "log_every": batch_size, "validate_every": 0, "sample_every": 0,
                "checkpoint_every": 0, "tensorboard": False, **train,
            },
        },
        source="benchmarks/scaling.py",
    )  # fmt: skip


def train_in_processes(config: RunConfig, run_dir: Path) -> list[dict[str, Any]]:
    """Train by the command line; return the records of the updates.

    Raises:
        RuntimeError: the run failed; with the end of what it said.
    """
    file = run_dir.with_suffix(".yaml")
    file.write_text(to_yaml(config), encoding="utf-8")
    processes = config.train.num_processes
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    command = [sys.executable, *launcher, "-m", "mmdit.train", str(file), "--out", str(run_dir), "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return [record for record in read_metrics(run_dir / "metrics.jsonl") if record["kind"] == "train"]


def measure_cost(root: Path, preset: str, batch_size: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Return a record per way: images/s, and the seconds of one core that an image costs; medians over all updates.

    The first three updates of a run warm it up and are left out.
    """
    steps_of: dict[str, list[float]] = {name: [] for name, *_ in WAYS}
    losses: dict[str, list[float]] = {}
    for turn in range(rounds):
        for name, processes, sharding in WAYS:
            config = run_config(
                preset, steps * batch_size, batch_size, root / "cache", num_processes=processes, sharding=sharding
            )
            records = train_in_processes(config, root / f"{name.replace(' ', '-')}-{turn}")
            steps_of[name] += [batch_size / record["images_per_second"] for record in records[3:]]
            losses[name] = [record["loss"] for record in records]
    found = []
    for name, processes, sharding in WAYS:
        median = statistics.median(steps_of[name])
        apart = [abs(a - b) / abs(b) for a, b in zip(losses[name], losses[WAYS[0][0]], strict=True)]
        found.append(
            {
                "way": name, "processes": processes, "sharding": sharding,
                "images_per_second": round(batch_size / median, 2),
                "core_seconds_per_image": round(processes * median / batch_size, 5),
                "step_seconds": [round(s, 5) for s in steps_of[name]],
                "largest_relative_difference_of_losses": max(apart),
            }
        )  # fmt: skip
    for record in found:
        record["relative_cost"] = round(record["core_seconds_per_image"] / found[0]["core_seconds_per_image"], 3)
    return found


# --- checkpoints ---------------------------------------------------------------------------------------------------


def measure_checkpoints(root: Path, preset: str, batch_size: int, every: int, count: int) -> dict[str, Any]:
    """Return the seconds that checkpoints hold the training up, written in the step and by a thread.

    The first of a thread allocates its copy and is told apart. Then `every` updates follow, in which it is written.
    """
    import mmdit.train.trainer as room

    original, found = room.save_or_go_on, {}
    for name, switch in (("in the step", False), ("by a thread", True)):
        held: list[float] = []

        def timed(run: Any, held: list[float] = held) -> None:
            began = time.perf_counter()
            original(run)
            held.append(time.perf_counter() - began)

        config = run_config(
            preset, (every * count + 1) * batch_size, batch_size, root / "cache", checkpoint_every=every * batch_size,
            async_checkpoints=switch, keep_checkpoints=1,
        )  # fmt: skip
        run_dir = root / name.replace(" ", "-")
        room.save_or_go_on = timed
        try:
            began = time.perf_counter()
            room.train(config, run_dir, progress=False)
            seconds = time.perf_counter() - began
        finally:
            room.save_or_go_on = original
        size = sum(file.stat().st_size for file in next(iter((run_dir / "checkpoints").iterdir())).iterdir())
        found[name] = {"held_up_seconds": [round(s, 4) for s in held], "session_seconds": round(seconds, 2)}
    medians = [statistics.median(entry["held_up_seconds"][1:]) for entry in found.values()]
    return {
        "checkpoint_bytes": size,
        "updates_between": every,
        **found,
        "times_less": round(medians[0] / medians[1], 1),
    }


# --- memory on paper -----------------------------------------------------------------------------------------------


def plan_memory() -> Iterator[dict[str, Any]]:
    """Yield what each model takes in each plan, bf16 autocast with float32 masters, one average."""
    for title, preset in MODELS:
        with torch.device("meta"):
            denoiser = build_denoiser(model_config("mmdit", preset))
        for processes, sharding, size in PLANS:
            config = TrainConfig(
                num_processes=processes, batch_size=processes, images=processes, sharding=sharding, shard_size=size,
                precision="bf16",
            )  # fmt: skip
            memory: StateMemory = state_memory(denoiser, config)
            yield {
                "model": title, "parameter_count": count_parameters(denoiser), "processes": processes,
                "sharding": sharding, "shard_size": size, **memory._asdict(), "total": memory.total,
                "host_copy": checkpoint_memory(denoiser, config),
            }  # fmt: skip


# --- tables --------------------------------------------------------------------------------------------------------


def tables(stored: dict[str, Any]) -> dict[str, str]:
    """Return the tables of docs/scaling.md by name, as Markdown."""
    cost = [
        "| | processes | update, median | fastest | images/s | core-seconds an image | to one process | losses apart |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in stored.get("cost", {}).get("rows", ()):
        cost.append(
            f"| {row['way']} | {row['processes']} | {statistics.median(row['step_seconds']):.3f} s | "
            f"{min(row['step_seconds']):.3f} s | {row['images_per_second']:.0f} | "
            f"{row['core_seconds_per_image']:.4f} | {row['relative_cost']:.2f} | "
            f"{row['largest_relative_difference_of_losses']:.0e} |"
        )
    checkpoint = ["| written | held up, median | first | longest after it |", "|---|---|---|---|"]
    for name in ("in the step", "by a thread"):
        first, *later = stored["checkpoint"][name]["held_up_seconds"] if "checkpoint" in stored else [0.0, 0.0]
        checkpoint.append(f"| {name} | {statistics.median(later):.3f} s | {first:.3f} s | {max(later):.3f} s |")
    memory = [
        "| model | GPUs | sharding | parameters | gradients | moments | average | copies | **GiB a GPU** | host copy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in plan_memory():
        sharding = {"none": "none", "fsdp2": "FSDP2", "hsdp": f"HSDP, {row['shard_size']} a shard"}[row["sharding"]]
        parts = (row[name] / GIB for name in ("parameters", "gradients", "moments", "averages", "copies"))
        memory.append(
            f"| {row['model']}, {row['parameter_count'] / 1e9:.2f} billion | {row['processes']:,} | {sharding} | "
            + " | ".join(f"{part:.2f}" for part in parts)
            + f" | **{row['total'] / GIB:.1f}** | {row['host_copy'] / GIB:.1f} |"
        )
    return {"cost": "\n".join(cost), "checkpoint": "\n".join(checkpoint), "memory": "\n".join(memory)}


def write_tables(page: Path, stored: dict[str, Any]) -> None:
    """Put the tables between their markers.

    Raises:
        ValueError: a marker is not there.
    """
    text = page.read_text(encoding="utf-8")
    for name, table in tables(stored).items():
        text = rewrite(text, table, name)
    page.write_text(text, encoding="utf-8")


def main(
    batch_size: int = 32,
    steps: int = 15,
    rounds: int = 3,
    preset: str = "tiny",
    checkpoint_preset: str = "S",
    parts: tuple[Literal["checkpoint", "cost"], ...] = ("checkpoint", "cost"),
    out: Path | None = None,
    table: bool = False,
) -> None:
    """Measure, or write the tables.

    Args:
        batch_size: images an update, over all processes.
        steps: updates a run.
        rounds: turns of each way.
        preset: MMDiT of the cost per image.
        checkpoint_preset: MMDiT of the checkpoints.
        parts: what to measure; the other part stays as it is in `out`.
        out: JSON file for the numbers and where they come from.
        table: write the tables of docs/scaling.md from results/benchmarks/scaling.json, and measure nothing.
    """
    if table:
        write_tables(PAGE, json.loads(STORED.read_text(encoding="utf-8")))
        return
    torch.set_num_threads(1)
    stored = out is not None and out.is_file()
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if stored and out is not None else {}
    with tempfile.TemporaryDirectory(prefix="scaling-bench-") as folder:
        for part in parts:
            environment = {**describe_environment(), "load_average_before": os.getloadavg(), "threads_a_process": 1}
            if part == "cost":
                rows = measure_cost(Path(folder), preset, batch_size, steps, rounds)
                about = {"preset": preset, "batch_size": batch_size, "steps": steps, "rounds": rounds, "rows": rows}
            else:
                about = {
                    "preset": checkpoint_preset,
                    **measure_checkpoints(Path(folder), checkpoint_preset, batch_size=8, every=8, count=4),
                }
            result[part] = {"environment": environment, **about}
    result["memory"] = list(plan_memory())
    for name, text in tables(result).items():
        print(f"\n{name}\n{text}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
