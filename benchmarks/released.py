"""Load a released denoiser at full size and sample with it: seconds and peak memory, each dtype in its own process.

    python scripts/make_random_release.py /path/sd3_medium.safetensors          # or a real file
    python benchmarks/released.py /path/sd3_medium.safetensors --threads 2 --out results/benchmarks/released.json

Peak memory is that of the process above what it had after its imports (CPU), or the allocator's peak (CUDA), beside the
bytes of the weights in their target dtype. The second loading finds the file in the page cache; the first may not.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from mmdit import rng
from mmdit.config import RectifiedFlowConfig
from mmdit.denoiser import Conditioning
from mmdit.diffusion import build_schedule
from mmdit.sampling import GRIDS, SAMPLERS, guided_denoise
from mmdit.train.tracking import describe_environment
from mmdit.weights.denoiser import load_denoiser

GIB = 2**30


def peak_bytes(device: str) -> int:
    """Return the most memory this process has had: resident on the CPU, allocated on the GPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def measure(path: Path, dtype: str, device: str, size: int, steps: int, guidance_scale: float) -> dict[str, Any]:
    """Load and sample once in this process.

    Args:
        size: pixels a side.
        steps: of Euler on the release's grid with shift 3.
        guidance_scale: 1 runs one row a step, others two.
    """
    before = peak_bytes(device)
    start = time.perf_counter()
    denoiser = load_denoiser(path, dtype=getattr(torch, dtype), device=device)
    loaded = time.perf_counter() - start
    weights = sum(tensor.nbytes for tensor in denoiser.state_dict().values())
    peak_of_loading = peak_bytes(device) - before

    def draw(index: int, *shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(0, "sample_noise", [index], shape)).to(device)

    config = denoiser.config
    texts = [
        Conditioning(draw(2 * i + 1, 154, config.context_dim), draw(2 * i + 2, config.pooled_dim)) for i in range(2)
    ]
    schedule = build_schedule(RectifiedFlowConfig(shift=3.0))
    denoise = guided_denoise(denoiser, schedule, "velocity", *texts, guidance_scale)
    noise, grid = draw(0, config.in_channels, size // 8, size // 8), GRIDS["release"](schedule, steps)
    start = time.perf_counter()
    with torch.no_grad():
        latents = SAMPLERS["euler"](denoise, noise, schedule, grid)
        finite = bool(torch.isfinite(latents).all())  # waits for the GPU
    sampled = time.perf_counter() - start
    peak = peak_bytes(device) - before
    return {
        "dtype": dtype,
        "weights_gib": weights / GIB,
        "load_seconds": loaded,
        "load_peak_gib": peak_of_loading / GIB,
        "load_peak_over_weights": peak_of_loading / weights,
        "sample_seconds": sampled,
        "seconds_per_step": sampled / steps,
        "peak_gib": peak / GIB,
        "finite": finite,
    }


def main(
    path: Annotated[Path, tyro.conf.Positional],
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("bfloat16", "float32"),
    device: str = "cpu",
    size: int = 512,
    steps: int = 1,
    guidance_scale: float = 1.0,
    threads: int = 2,
    out: Path | None = None,
    worker: bool = False,
) -> None:
    """Measure each dtype in a process of its own and print a table.

    Args:
        path: a file of SD3 or SD3.5.
        dtypes: of the weights.
        device: cpu or cuda.
        size: pixels a side.
        steps: of sampling.
        guidance_scale: 1 runs one row a step, others two.
        threads: compute threads.
        out: JSON file for the numbers and where they come from.
        worker: measure in this process and print JSON.
    """
    torch.set_num_threads(threads)
    if worker:
        print(json.dumps(measure(path, dtypes[0], device, size, steps, guidance_scale)))
        return
    settings = {"device": device, "size": size, "steps": steps, "guidance_scale": guidance_scale, "threads": threads}
    result: dict[str, Any] = {
        "environment": {**describe_environment(), "load_average_before": os.getloadavg()},
        "file": path.name,
        "file_bytes": sum(f.stat().st_size for f in ([path] if path.is_file() else path.rglob("*.safetensors"))),
        **settings,
        "rows": [],
    }
    result["environment"]["command"] = [Path(sys.argv[0]).name, path.name, *sys.argv[2:]]
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    table = Table("dtype", "weights GiB", "load s", "load peak GiB", "x weights", "s per step", "peak GiB", "finite")
    for dtype in dtypes:
        command = [sys.executable, __file__, str(path), "--worker", "--dtypes", dtype, *flags]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        result["rows"].append(row)
        numbers = (
            "weights_gib",
            "load_seconds",
            "load_peak_gib",
            "load_peak_over_weights",
            "seconds_per_step",
            "peak_gib",
        )
        table.add_row(dtype, *(f"{row[name]:.2f}" for name in numbers), str(row["finite"]))
    Console(width=120).print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
