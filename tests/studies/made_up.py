"""A made-up study on disk: numbers, logs and pictures as a study leaves them, and no network behind them."""

import json

import numpy as np
from mmdit_eval.statistics import jackknife_interval, mean_interval, wilson_interval
from PIL import Image

from mmdit.config import StudyConfig, to_tree

SUITE = {"name": "tiny", "num_images": 40, "snapshot_images": 16, "grid_prompts": 2}
STAMP = {"protocol": {"version": 1, "seed": 1}, "inference": {"sampling.num_steps": 20}}


def measured(random, rate, count):
    hits = [float(hit) for hit in random.random(count) < rate]
    features = random.normal(size=count)
    return {
        "num_images": count,
        "scores": {
            "all_correct": wilson_interval(hits),
            "clip_score": mean_interval(20 + features, draws=50),
            "frechet": jackknife_interval(lambda rows: float(1 - rate + 0.1 * features[rows].mean()), count),
        },
        "per_image": {"all_correct": hits},
        "chance": {},
        "details": {"levels": [0.25, 0.5, 0.75, 1.0], "loss_by_level": [1.2 - rate, 0.5, 0.4, 0.6]},
    }


def write_cell(folder, row, rate, speed, seed=0):
    name = f"{row}-s{seed}"
    random = np.random.default_rng([seed, len(row)])
    run = folder / name
    (run / "eval").mkdir(parents=True)
    for step in (1, 2, 3):
        images, final = 1000 * step, step == 3
        splits = {
            s: measured(random, rate * step / 3 - (s == "heldout") / 10, 40 if final else 16)
            for s in ("seen", "heldout")
        }
        prefix = {s: measured(random, rate, 16) for s in splits} if final else {}
        result = {
            "suite": "tiny", "run": name, "images_seen": images, "stamp": STAMP, "splits": splits, "prefix": prefix,
            "samples": [], "prompts": {s: ["a red circle", "a <b>blue</b> star & more"] for s in splits},
            "drawn_per_second": speed / 10, "environment": {"torch": "2"}, "seconds": {"total": 1.0},
            "checkpoint_sha256": "0",
        }  # fmt: skip
        (run / "eval" / f"tiny-{images:012d}.json").write_text(json.dumps(result))
    with (run / "metrics.jsonl").open("w") as log:
        for images in range(100, 3001, 100):
            record = {"kind": "train", "images_seen": images, "seconds": images / speed, "loss": 1 / (1 + images / 500)}
            log.write(json.dumps({**record, "step": images // 100, "images_per_second": speed}) + "\n")
        log.write('{"kind": "train", "images_se')  # killed while writing
    pictures = run / "samples" / "tiny-000000003000"
    pictures.mkdir(parents=True)
    for split in ("seen", "heldout"):
        for i in range(2):
            Image.new("RGB", (8, 8), (255 * i, 60, 60)).save(pictures / f"{split}-{i:03d}.png")


def write_study(folder, seeds=(0,), failed=None):
    rows = {"mmdit": {"model": {"name": "mmdit"}}, "unet": {"model": {"name": "unet"}}}
    study = StudyConfig(name="pretend", base="base.yaml", rows=rows, seeds=seeds, suite=SUITE)
    cells = {}
    for row, rate, speed in (("mmdit", 0.9, 700), ("unet", 0.6, 350)):
        for seed in seeds:
            name = f"{row}-s{seed}"
            cells[name] = {"row": row, "seed": seed, "status": "done", "reason": ""}
            if name == failed:
                cells[name].update(status="failed", reason="training ended with exit code 1")
            else:
                write_cell(folder, row, rate, speed, seed)
    costs = {row: {"parameters": 10_000_000 + i, "flops": 300_000_000, "tokens": 20} for i, row in enumerate(rows)}
    book = {"study": to_tree(study), "command": "python scripts/ablate.py x.yaml", "rows": costs, "cells": cells}
    (folder / "study.json").write_text(json.dumps({**book, "started": "2026-01-01T00:00:00Z"}))
    random = np.random.default_rng(9)
    ceiling = {"splits": {s: measured(random, 1.0, 40) for s in ("seen", "heldout")}}
    (folder / "ceiling.json").write_text(json.dumps(ceiling))
    return folder


def widen(folder, count):
    """Give a made-up study more rows: copies of its first one under other names."""
    book = json.loads((folder / "study.json").read_text())
    seeds = book["study"]["seeds"]
    for i in range(2, count):
        row = f"row_{i}"
        book["study"]["rows"][row] = {"model": {"name": "mmdit", "depth": i}}
        book["rows"][row] = book["rows"]["mmdit"]
        for seed in seeds:
            book["cells"][f"{row}-s{seed}"] = {"row": row, "seed": seed, "status": "done", "reason": ""}
            write_cell(folder, row, 0.5 + i / 40, 500, seed)
    (folder / "study.json").write_text(json.dumps(book))
    return folder
