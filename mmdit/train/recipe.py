"""The loop that trains the tiny text towers, and the record it leaves beside their weights."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdit.train.tracking import processor


def run_recipe(
    losses_of: Callable[[int], dict[str, Tensor]],
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    lr: float,
    steps: int,
    seconds: float | None = None,
    warmup: int = 50,
    log: Callable[[str], None] = print,
    after: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Minimise the sum of named losses under bf16 autocast; warm-up, then a cosine down to a fiftieth.

    Args:
        losses_of: step -> losses.
        optimizer: its groups carry `factor`, by which their learning rate exceeds `lr`.
        seconds: stop after this many seconds instead of `steps` (then not reproducible step by step).
        after: called with the number of steps done, after each.

    Returns:
        Steps, seconds, and the losses' running means: what `write_description` stores as "training".
    """
    started, step = time.perf_counter(), 0
    average: dict[str, float] = {}
    while True:
        elapsed = time.perf_counter() - started
        progress = step / steps if seconds is None else elapsed / seconds
        if progress >= 1:
            break
        rate = lr * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * rate
        with torch.autocast("cpu", torch.bfloat16):
            losses = losses_of(step)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for name, loss in losses.items():
            value = float(loss.detach())
            average[name] = 0.95 * average.get(name, value) + 0.05 * value
        step += 1
        if after is not None:
            after(step)
        if step % 50 == 0:
            log(f"step {step} {elapsed:.0f} s " + " ".join(f"{name} {value:.3f}" for name, value in average.items()))
    return {
        "seconds": round(time.perf_counter() - started),
        "steps": step,
        "lr_schedule_by": "steps" if seconds is None else "seconds",
        "lr": lr,
        "threads": torch.get_num_threads(),
        "hardware": processor(),
        "torch": torch.__version__,
        "loss": {name: round(value, 4) for name, value in average.items()},
    }


def write_description(out: Path, part: str, result: dict[str, Any]) -> None:
    """Merge one part's config, training record and quality into text.json."""
    file = out / "text.json"
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    content.setdefault("encoders", {}).update(result["config"])
    content.setdefault("training", {})[part] = result["training"]
    content.setdefault("quality", {})[part] = result["quality"]
    temporary = file.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(file)
