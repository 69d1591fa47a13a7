"""Images a second of each way to feed a training step, the loader's share of a small step, and the gain of a cache.

The same pictures (smooth 640 x 480 JPEGs with captions) lie as a folder, as tar shards, as parquet and in a cache. All
ways are read in one process and take turns, batch by batch, so that a busy machine slows all of them alike: trust the
ratios. Every way is read once before, so files are in the page cache: this is decoding and Python, not a disk.

    taskset -c 0 python benchmarks/data.py --out results/benchmarks/data.json
    python benchmarks/data.py --table                                      # writes the table of docs/scaling.md anew

Then one small MMDiT is trained twice, from the cache and with live encoders: the same losses, images/s of both, and how
long the steps waited for data.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from mmdit_eval.readme import markers, rewrite
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from mmdit.config import ImagesConfig, RunConfig, ShardsConfig, resolve
from mmdit.data import make_dataset
from mmdit.data.cache import LiveBatches, precompute
from mmdit.data.order import data_order
from mmdit.diffusion import build_schedule
from mmdit.encoders.text import TextEncoders
from mmdit.pipeline import load_encoders
from mmdit.train.step import BatchDrawer
from mmdit.train.tracking import describe_environment, read_metrics
from mmdit.train.trainer import train

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "results" / "benchmarks" / "data.json"
PAGE = ROOT / "docs" / "scaling.md"
MARKS = markers("feeding")
WIDTH, HEIGHT, QUALITY = 640, 480, 90
SUBJECTS = ("a lighthouse", "two bicycles", "an old map", "a bowl of cherries", "a heron", "rain on a window")


class Way(NamedTuple):
    """One way to a batch: what it is called, what it yields, and how to get the batch of some items."""

    name: str
    gives: str
    batch: Callable[[np.ndarray], Any]


# --- the pictures --------------------------------------------------------------------------------------------------


def draw_picture(index: int) -> bytes:
    """Encode a picture with structure at every scale, so that its JPEG is about as large as a photograph's."""
    generator = np.random.default_rng(index)
    picture = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for side, weight in ((4, 90.0), (16, 50.0), (64, 25.0), (256, 12.0)):
        coarse = generator.uniform(-1, 1, (side * HEIGHT // WIDTH, side, 3)).astype(np.float32)
        planes = [Image.fromarray(coarse[..., c]).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC) for c in range(3)]
        picture += weight * np.stack([np.asarray(plane) for plane in planes], axis=-1)
    stored = io.BytesIO()
    Image.fromarray(np.clip(128 + picture, 0, 255).astype(np.uint8)).save(stored, "JPEG", quality=QUALITY)
    return stored.getvalue()


def make_sets(root: Path, count: int, shards: int = 4) -> int:
    """Write the pictures as a folder, as tar shards and as parquet; return the mean size of a JPEG."""
    import pyarrow
    import pyarrow.parquet

    pictures = [draw_picture(i) for i in range(count)]
    captions = [f"{SUBJECTS[i % 6]}, photographed from {2 + i // 6} steps away" for i in range(count)]
    for folder in ("folder", "tar", "parquet"):
        (root / folder).mkdir()
    for i, (data, caption) in enumerate(zip(pictures, captions, strict=True)):
        (root / "folder" / f"{i:06d}.jpg").write_bytes(data)
        (root / "folder" / f"{i:06d}.txt").write_text(caption)
    for number, part in enumerate(np.array_split(np.arange(count), shards)):
        with tarfile.open(root / "tar" / f"{number:05d}.tar", "w") as tar:
            for i in part:
                for suffix, data in ((".jpg", pictures[i]), (".txt", captions[i].encode())):
                    entry = tarfile.TarInfo(f"{i:06d}{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
        columns = {"image": [pictures[i] for i in part], "text": [captions[i] for i in part]}
        pyarrow.parquet.write_table(
            pyarrow.table(columns), root / "parquet" / f"{number:05d}.parquet", row_group_size=64
        )
    return sum(map(len, pictures)) // count


# --- the ways ------------------------------------------------------------------------------------------------------


class NaiveFolder(Dataset):
    """What most training scripts begin with: open, convert, cut, resize, to float, tokenise, one picture at a time."""

    def __init__(self, folder: Path, resolution: int, text: TextEncoders) -> None:
        self.files, self.resolution, self.text = sorted(folder.glob("*.jpg")), resolution, text

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        picture = Image.open(self.files[index]).convert("RGB")
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
        picture = picture.resize((self.resolution, self.resolution), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
        ids = self.text.tokenize([self.files[index].with_suffix(".txt").read_text()])
        return {"pixels": pixels, **{name: rows[0] for name, rows in ids.items()}}


class NpzFiles(Dataset):
    """A cache with one .npz per picture: latents and text states."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        with np.load(self.files[index]) as stored:
            return {name: torch.from_numpy(stored[name]).float() for name in stored.files}


def loader_batch(dataset: Dataset, indices: np.ndarray) -> Any:
    """Take one batch through torch's DataLoader, in this process."""
    return next(iter(DataLoader(dataset, batch_size=len(indices), sampler=indices.tolist(), num_workers=0)))


def pixels_and_tokens(dataset: Any, text: TextEncoders, indices: np.ndarray) -> Any:
    """Take pixels and tokens from one of our data sets."""
    return dataset.pixels(indices), text.tokenize(dataset.captions(indices))


def make_ways(root: Path, config: RunConfig, encoders: tuple[Any, Any]) -> tuple[list[Way], int, dict[str, Any]]:
    """Open everything; return the ways, how many items all of them have, and what stands in the result about them."""
    vae, text = encoders
    resolution = config.data.resolution
    folder = make_dataset(ImagesConfig(source=str(root / "folder"), resolution=resolution, val_fraction=0.0))
    tars = make_dataset(ShardsConfig(source=str(root / "tar"), resolution=resolution, val_fraction=0.0))
    parquet = make_dataset(ShardsConfig(source=str(root / "parquet"), resolution=resolution, val_fraction=0.0))
    live = LiveBatches(folder, vae, text, config.encoders)
    began = time.perf_counter()
    cached = precompute(folder, vae, text, config.encoders, cache_dir=root / "cache", progress=False)
    encoding = time.perf_counter() - began
    drawer = BatchDrawer(cached, text, build_schedule(config.diffusion.schedule), config)
    (root / "npz").mkdir()
    files = []
    for start in range(0, len(cached), 64):
        rows = np.arange(start, min(start + 64, len(cached)))
        latents, conditioning = cached.batch(rows)
        context = torch.nn.functional.pad(conditioning.context, (0, 0, 0, 154 - conditioning.context.shape[1]))
        for i, row in enumerate(rows):
            files.append(root / "npz" / f"{row:06d}.npz")
            arrays = {"latents": latents[i], "context": context[i], "pooled": conditioning.pooled[i]}
            np.savez(files[-1], **{name: tensor.half() for name, tensor in arrays.items()})
    inputs, batch = "pixels, tokens", "latents, text states"
    naive, npz = NaiveFolder(root / "folder", resolution, text), NpzFiles(files)
    ways = [
        Way("naive: JPEG folder, DataLoader", inputs, partial(loader_batch, naive)),
        Way("JPEG folder (data: images)", inputs, partial(pixels_and_tokens, folder, text)),
        Way("tar shards (data: shards)", inputs, partial(pixels_and_tokens, tars, text)),
        Way("parquet shards (data: shards)", inputs, partial(pixels_and_tokens, parquet, text)),
        Way("JPEG folder, live VAE and text encoders", batch, live.batch),
        Way("one .npz a picture, DataLoader", batch, partial(loader_batch, npz)),
        Way("cache, batched index", batch, cached.batch),
        Way("cache, and the step's noise, t, dropout", "a training batch", drawer.draw),
    ]
    size = sum(file.stat().st_size for file in (root / "cache").rglob("*.npy"))
    about = {"encoding_seconds": round(encoding, 2), "cache_bytes_per_image": size // len(cached)}
    return ways, len(cached), about


def measure(ways: list[Way], count: int, batch_size: int, rounds: int) -> list[list[float]]:
    """Return seconds a batch of each way; cheap ways take many batches a turn, one more turn is not counted."""
    seconds: list[list[float]] = [[] for _ in ways]
    repeats = [1] * len(ways)
    for turn in range(rounds + 1):
        for number, way in enumerate(ways):
            batches = [data_order(turn, count, np.arange(batch_size) + i * batch_size) for i in range(repeats[number])]
            began = time.perf_counter()
            for indices in batches:
                way.batch(indices)
            spent = (time.perf_counter() - began) / len(batches)
            if turn:
                seconds[number].append(spent)
            else:  # a turn lasts about a quarter of a second
                repeats[number] = max(1, min(200, round(0.25 / spent)))
    return seconds


# --- training ------------------------------------------------------------------------------------------------------


def run_config(root: Path, resolution: int, batch_size: int, steps: int, precompute: bool = True) -> RunConfig:
    """Return a short run of the tiny MMDiT on the folder."""
    return resolve(
        {
            "name": "data",
            "model": {"name": "mmdit", "preset": "tiny"},
            "data": {"name": "images", "source": str(root / "folder"), "resolution": resolution},
            "train": {
                "images": steps * batch_size, "batch_size": batch_size, "lr": 1e-3, "warmup_images": 4 * batch_size,
                "precision": "fp32", "precompute": precompute, "cache_dir": str(root / "cache"), "val_images": 1,
                "log_every": batch_size, "validate_every": 0, "sample_every": 0, "checkpoint_every": 0,
                "tensorboard": False,
            },
        },
        source="benchmarks/data.py",
    )  # fmt: skip


def train_both_ways(root: Path, resolution: int, batch_size: int, steps: int) -> dict[str, Any]:
    """Train from the cache and live; return losses' difference, images/s and the share of waiting.

    The first two updates warm up and the last has nothing left to prefetch: they are left out of speed and share.
    """
    found: dict[str, Any] = {}
    losses = {}
    for name, switch in (("cached", True), ("live", False)):
        config = run_config(root, resolution, batch_size, steps, switch)
        train(config, root / name, progress=False)
        records = [r for r in read_metrics(root / name / "metrics.jsonl") if r["kind"] == "train"]
        losses[name] = [r["loss"] for r in records]
        steady = records[2:-1]
        seconds = [batch_size / r["images_per_second"] for r in steady]
        waited = sum(r["data_wait"] * s for r, s in zip(steady, seconds, strict=True))
        found[name] = {
            "images_per_second": round(batch_size / statistics.median(seconds), 2),
            "step_seconds": [round(s, 4) for s in seconds],
            "data_wait_share": round(waited / sum(seconds), 5),
        }
    apart = [abs(a - b) / abs(b) for a, b in zip(losses["cached"], losses["live"], strict=True)]
    found["largest_relative_difference_of_losses"] = max(apart)
    found["updates"] = steps
    found["gain"] = round(found["cached"]["images_per_second"] / found["live"]["images_per_second"], 2)
    return found


# --- report --------------------------------------------------------------------------------------------------------


def rows_of(ways: list[Way], seconds: list[list[float]], batch_size: int) -> Iterator[dict[str, Any]]:
    """Yield a record per way; `speed_up` is over the first, by medians of the rounds."""
    first = statistics.median(seconds[0])
    for way, spent in zip(ways, seconds, strict=True):
        median = statistics.median(spent)
        yield {
            "way": way.name,
            "gives": way.gives,
            "images_per_second": round(batch_size / median, 1),
            "best_images_per_second": round(batch_size / min(spent), 1),
            "speed_up": round(first / median, 2),
            "seconds_per_batch": [round(s, 6) for s in spent],
        }


def report(stored: dict[str, Any]) -> str:
    """Return what docs/scaling.md says of a measurement, as Markdown."""
    lines = ["| | gives | images/s | to the naive way |", "|---|---|---|---|"]
    for row in stored["rows"]:
        lines.append(f"| {row['way']} | {row['gives']} | {row['images_per_second']:,.0f} | {row['speed_up']:,.1f} |")
    training = stored["training"]
    cached, live, resolution = training["cached"], training["live"], stored["pictures"]["resolution"]
    apart = training["largest_relative_difference_of_losses"]
    differ = f"apart by {apart:.0e} relative" if apart else "the same to the last digit"
    found = (
        f"images/s from the cache and with live encoders: {cached['images_per_second']:.1f} and "
        f"{live['images_per_second']:.1f}, {training['gain']:.2f} times as many",
        f"losses of the two, step by step: {differ}",
        f"time that steps from the cache waited for data: {cached['data_wait_share']:.2%}",
        f"drawing a batch's noise, were it not done ahead: {training['drawing_share_of_a_step']:.2%} of a step",
    )
    lines += ["", f"The tiny MMDiT trained at {resolution} pixels, {training['updates']} updates:", ""]
    return "\n".join([*lines, *(f"- {line}" for line in found)])


def write_report(page: Path, stored: dict[str, Any]) -> None:
    """Put it between its markers.

    Raises:
        ValueError: the markers are not there.
    """
    page.write_text(rewrite(page.read_text(encoding="utf-8"), report(stored), "feeding"), encoding="utf-8")


def main(
    count: int = 1024,
    resolution: int = 256,
    batch_size: int = 32,
    rounds: int = 7,
    steps: int = 12,
    train_batch: int = 16,
    threads: int = 1,
    out: Path | None = None,
    table: bool = False,
) -> None:
    """Time the ways, train both ways, print a table.

    Args:
        count: pictures.
        resolution: pixels a side, after cutting and resizing.
        batch_size: pictures a batch of the comparison.
        rounds: turns of each way; the median counts.
        steps: updates of each training.
        train_batch: pictures an update.
        threads: compute threads.
        out: JSON file for the numbers and where they come from.
        table: write the table of docs/scaling.md from results/benchmarks/data.json, and measure nothing.
    """
    if table:
        write_report(PAGE, json.loads(STORED.read_text(encoding="utf-8")))
        return
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="data-bench-") as folder:
        root = Path(folder)
        stored = make_sets(root, count)
        config = run_config(root, resolution, train_batch, steps)
        load = os.getloadavg()
        ways, items, about = make_ways(root, config, load_encoders(config))
        seconds = measure(ways, items, batch_size, rounds)
        training = train_both_ways(root, resolution, train_batch, steps)
    rows = list(rows_of(ways, seconds, batch_size))
    drawing = statistics.median(seconds[-1]) / batch_size * train_batch
    step = statistics.median(training["cached"]["step_seconds"])
    training["drawing_share_of_a_step"] = round(drawing / step, 4)  # were it not done ahead, in a thread
    result = {
        "environment": {**describe_environment(), "threads": threads, "load_average_before": load},
        "pictures": {"count": count, "size": [WIDTH, HEIGHT], "jpeg_bytes": stored, "resolution": resolution, **about},
        "batch_size": batch_size,
        "rounds": rounds,
        "rows": rows,
        "training": training,
    }
    shown = Table("way", "gives", "images/s", "best", "x naive")
    for row in rows:
        speeds = f"{row['images_per_second']:,.0f}", f"{row['best_images_per_second']:,.0f}", f"{row['speed_up']:.1f}"
        shown.add_row(row["way"], row["gives"], *speeds)
    Console(width=120).print(shown)
    Console(width=120).print({k: v for k, v in training.items() if k not in ("cached", "live")})
    for name in ("cached", "live"):
        found = training[name]
        print(f"{name}: {found['images_per_second']} images/s, waiting {found['data_wait_share']:.2%}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
