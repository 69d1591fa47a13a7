"""Time our backbones against diffusers' same networks: forward and train step, float32 and bf16 autocast.

All contestants run in one process and take turns, round by round, so that a busy machine slows all of them alike:
trust the ratios, and compare no milliseconds between two runs. Each pair holds the same weights, and the table shows
how far the outputs are apart. The U-Net of diffusers has feed-forwards of four times the width and nothing else, so
the pair is the preset `tiny` with `ff_mult=4`; the preset as it is trained runs beside it.

    OMP_NUM_THREADS=1 python benchmarks/backbones.py --threads 1 --out results/benchmarks/backbones.json
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import diffusers
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mmdit.config import UNetConfig, model_config
from mmdit.denoiser import Conditioning
from mmdit.models import build_denoiser
from mmdit.train.tracking import describe_environment
from mmdit.weights import sd3, unet_keys

WIDTHS = {"in_channels": 16, "out_channels": 16, "context_dim": 256, "pooled_dim": 224}


class Contestant(NamedTuple):
    """One implementation of one backbone; `call` runs it on a batch. Ratios are taken to the first of a backbone."""

    backbone: str
    implementation: str
    module: nn.Module
    call: Callable[[Tensor, Tensor, Conditioning], Tensor]


def fill(module: nn.Module) -> None:
    """Random numbers in every parameter: a zero-initialised network would agree with anything."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def mmdit_contestants() -> list[Contestant]:
    """MMDiT `tiny` and SD3Transformer2DModel of the same shape."""
    ours = build_denoiser(model_config("mmdit", "tiny", **WIDTHS))
    fill(ours)
    config = ours.config
    theirs = diffusers.SD3Transformer2DModel(
        sample_size=config.pos_embed_base_size * config.patch_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.width // config.num_heads,
        joint_attention_dim=config.context_dim,
        caption_projection_dim=config.width,
        pooled_projection_dim=config.pooled_dim,
        pos_embed_max_size=config.pos_embed_max_size,
    )
    theirs.load_state_dict(sd3.to_diffusers(ours.state_dict()), strict=True)

    def call(latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return theirs(latents, conditioning.context, conditioning.pooled, timestep).sample

    return [Contestant("mmdit", "diffusers", theirs, call), Contestant("mmdit", "ours", ours, ours)]


def unet_contestants() -> list[Contestant]:
    """U-Net `tiny` with `ff_mult=4`, UNet2DConditionModel of the same shape in both layouts, and `tiny` itself."""
    ours = build_denoiser(model_config("unet", "tiny", **WIDTHS, ff_mult=4.0))
    fill(ours)
    tiny = build_denoiser(model_config("unet", "tiny", **WIDTHS))
    contestants = []
    for implementation, layout in (
        ("diffusers", torch.contiguous_format),
        ("diffusers, channels_last", torch.channels_last),
    ):
        theirs = diffusers_unet(ours.config)
        state = unet_keys.to_diffusers(ours.state_dict(), ours.config)
        renamed = {key.replace("add_embedding.", "class_embedding."): value for key, value in state.items()}
        theirs.load_state_dict(renamed, strict=True)
        call = _unet_call(theirs.to(memory_format=layout), layout)
        contestants.append(Contestant("unet", implementation, theirs, call))
    return [
        *contestants,
        Contestant("unet", "ours", ours, ours),
        Contestant("unet", "ours, preset tiny (ff_mult 1.5)", tiny, tiny),
    ]


def diffusers_unet(config: UNetConfig) -> nn.Module:
    """UNet2DConditionModel of our shape; its `attention_head_dim` is the number of heads, by an old mistake."""
    widths = [config.model_channels * mult for mult in config.channel_mult]
    return diffusers.UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=widths,
        layers_per_block=config.num_res_blocks,
        down_block_types=["CrossAttnDownBlock2D"] * len(widths),
        up_block_types=["CrossAttnUpBlock2D"] * len(widths),
        transformer_layers_per_block=list(config.transformer_depth),
        attention_head_dim=[width // config.head_dim for width in widths],
        cross_attention_dim=config.context_dim,
        use_linear_projection=config.linear_projection,
        norm_num_groups=config.norm_groups,
        class_embed_type="projection",  # the same two layers as our label_emb
        projection_class_embeddings_input_dim=config.pooled_dim,
    )


def _unet_call(unet: nn.Module, layout: torch.memory_format) -> Callable[[Tensor, Tensor, Conditioning], Tensor]:
    def call(latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        latents = latents.contiguous(memory_format=layout)
        return unet(latents, timestep, conditioning.context, class_labels=conditioning.pooled).sample

    return call


def measure(
    contestants: list[Contestant], batch: tuple[Any, ...], *, train: bool, bf16: bool, rounds: int
) -> list[list[float]]:
    """Return seconds per round of each contestant; one more round before these is not counted."""
    latents, timestep, conditioning = batch
    optimizers = [torch.optim.AdamW(c.module.parameters(), lr=1e-6, fused=True) for c in contestants]
    seconds: list[list[float]] = [[] for _ in contestants]
    for turn in range(rounds + 1):
        for contestant, optimizer, spent in zip(contestants, optimizers, seconds, strict=True):
            start = time.perf_counter()
            with torch.set_grad_enabled(train), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                output = contestant.call(latents, timestep, conditioning)
            if train:
                (output.float() - latents).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            if turn:
                spent.append(time.perf_counter() - start)
    return seconds


def stamp(threads: int) -> dict[str, Any]:
    """Say on what, with what and by which command the numbers were made."""
    return {
        **describe_environment(),
        "diffusers": diffusers.__version__,
        "threads": threads,
        "load_average_before": os.getloadavg(),  # above the number of cores: read the ratios only
    }


def main(
    batch_size: int = 32,
    size: int = 8,
    tokens: int = 20,
    rounds: int = 5,
    threads: int = 1,
    backbones: tuple[Literal["mmdit", "unet"], ...] = ("mmdit", "unet"),
    out: Path | None = None,
) -> None:
    """Time the backbones and print a table.

    Args:
        batch_size: images a batch.
        size: height and width of the latents.
        tokens: text tokens.
        rounds: turns of each contestant in each table row; the median counts.
        threads: compute threads.
        backbones: which to time.
        out: JSON file for the numbers and where they come from.
    """
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch_size, 16, size, size, generator=generator)
    timestep = torch.rand(batch_size, generator=generator) * 1000
    context = torch.randn(batch_size, tokens, 256, generator=generator)
    batch = (latents, timestep, Conditioning(context, torch.randn(batch_size, 224, generator=generator)))
    result: dict[str, Any] = {
        "environment": stamp(threads),
        "batch_size": batch_size,
        "latents": [16, size, size],
        "tokens": tokens,
        "rounds": rounds,
        "rows": [],
    }
    table = Table("backbone", "implementation", "parameters", "what", "ms", "best ms", "images/s", "x diffusers", "|d|")
    builders = {"mmdit": mmdit_contestants, "unet": unet_contestants}
    for contestants in (builders[name]() for name in backbones):
        with torch.no_grad():
            outputs = [contestant.call(*batch) for contestant in contestants]
        for what, train, bf16 in (
            ("forward fp32", False, False),
            ("forward bf16", False, True),
            ("train step fp32", True, False),
            ("train step bf16", True, True),
        ):
            seconds = measure(contestants, batch, train=train, bf16=bf16, rounds=rounds)
            medians = [statistics.median(spent) for spent in seconds]
            for contestant, output, spent, median in zip(contestants, outputs, seconds, medians, strict=True):
                same = "preset" not in contestant.implementation
                row = {
                    "backbone": contestant.backbone,
                    "implementation": contestant.implementation,
                    "parameters": sum(p.numel() for p in contestant.module.parameters()),
                    "what": what,
                    "seconds": spent,
                    "images_per_second": batch_size / median,
                    "speed_up": medians[0] / median,
                    "output_difference": float((output - outputs[0]).abs().max()) if same else None,
                }
                result["rows"].append(row)
                difference = row["output_difference"]
                table.add_row(
                    row["backbone"],
                    row["implementation"],
                    f"{row['parameters']:,}",
                    what,
                    f"{1e3 * median:.1f}",
                    f"{1e3 * min(spent):.1f}",
                    f"{row['images_per_second']:.0f}",
                    f"{row['speed_up']:.2f}",
                    "" if difference is None else f"{difference:.0e}",
                )
    Console(width=150).print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
