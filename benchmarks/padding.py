"""Time the three paddings of text against each other: `attend`, `mask` and `trim`, forward and train step.

Captions are those of the quickstart, encoded by its tiny encoders. Contestants hold the same weights and take turns,
round by round: trust the ratios. The table also says how far the trimmed output is from the masked one, in float32.

    python benchmarks/padding.py --threads 1 --out results/benchmarks/padding.json     measures, and writes docs/text.md
    python benchmarks/padding.py --table                                               writes docs/text.md alone
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any, get_args

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from mmdit_eval.readme import rewrite  # noqa: E402

from benchmarks.backbones import Contestant, fill, measure, stamp  # noqa: E402
from mmdit.config import load_config, model_config  # noqa: E402
from mmdit.data import make_dataset  # noqa: E402
from mmdit.denoiser import Conditioning  # noqa: E402
from mmdit.encoders.axes import Padding  # noqa: E402
from mmdit.encoders.text import load_run_text  # noqa: E402
from mmdit.models import build_denoiser  # noqa: E402

BASE, PAGE = ROOT / "configs/train/quickstart.yaml", ROOT / "docs/text.md"
STORED = ROOT / "results/benchmarks/padding.json"
ROWS = ("mmdit", "crossdit", "unet")


def conditionings(batch_size: int) -> dict[str, Conditioning]:
    """Encode the first captions of the quickstart's validation split under each padding."""
    config = load_config(BASE)
    text, captions = load_run_text(config.encoders), make_dataset(config.data, "val").captions(range(batch_size))
    return {padding: text.encode(captions, padding=padding) for padding in get_args(Padding)}


def contestants(backbone: str, texts: dict[str, Conditioning]) -> list[Contestant]:
    """One network under each padding; what `measure` hands over as conditioning is not used."""
    context = texts["mask"]
    assert context.pooled is not None
    widths = {"in_channels": 16, "out_channels": 16}
    widths |= {"context_dim": context.context.shape[2], "pooled_dim": context.pooled.shape[1]}
    denoiser = build_denoiser(model_config(backbone, "tiny", **widths))
    fill(denoiser)
    return [
        Contestant(backbone, padding, denoiser, lambda x, t, _, text=text: denoiser(x, t, text))
        for padding, text in texts.items()
    ]


def markdown(found: dict[str, Any]) -> str:
    """Return what was measured as a table."""
    lines = ["| | text tokens | forward, x `mask` | train step, x `mask` | from the masked output |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for row in found["rows"]:
        ratios = " | ".join(f"{row[f'{what}_speed_up']:.2f}" for what in ("forward", "train"))
        apart = f"{row['output_difference']:.0e}" if row["padding"] == "trim" else "–"
        lines.append(f"| {row['backbone']}, `{row['padding']}` | {row['tokens']} | {ratios} | {apart} |")
    return "\n".join(lines)


def main(batch_size: int = 64, rounds: int = 5, threads: int = 1, out: Path | None = None, table: bool = False) -> None:
    """Time the paddings and print a table.

    Args:
        batch_size: images a batch.
        rounds: turns of each contestant; the median counts.
        threads: compute threads.
        out: JSON file for the numbers and where they come from; docs/text.md is written too.
        table: measure nothing; write docs/text.md from what is stored.
    """
    if table:
        PAGE.write_text(rewrite(PAGE.read_text("utf-8"), markdown(json.loads(STORED.read_text("utf-8"))), "padding"))
        return
    torch.set_num_threads(threads)
    texts = conditionings(batch_size)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch_size, 16, 8, 8, generator=generator)
    batch = (latents, torch.rand(batch_size, generator=generator) * 1000, texts["mask"])
    command = f"python benchmarks/padding.py --batch-size {batch_size} --rounds {rounds} --threads {threads}"
    found: dict[str, Any] = {"command": command, "environment": stamp(threads), "precision": "bf16", "rows": []}
    for backbone in ROWS:
        ways = contestants(backbone, texts)
        with torch.no_grad():
            outputs = {way.implementation: way.call(*batch) for way in ways}
        medians = {}
        for what, train in (("forward", False), ("train", True)):
            seconds = measure(ways, batch, train=train, bf16=True, rounds=rounds)
            medians[what] = {way.implementation: statistics.median(s) for way, s in zip(ways, seconds, strict=True)}
        for padding, text in texts.items():
            found["rows"].append({
                "backbone": backbone, "padding": padding, "tokens": text.context.shape[1],
                "output_difference": float((outputs[padding] - outputs["mask"]).abs().max()),
                **{f"{what}_seconds": medians[what][padding] for what in medians},
                **{f"{what}_speed_up": medians[what]["mask"] / medians[what][padding] for what in medians},
            })  # fmt: skip
    print(markdown(found))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(rewrite(PAGE.read_text("utf-8"), markdown(found), "padding"), encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
