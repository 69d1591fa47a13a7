"""What this machine offers: threads, and the matrix product that is both fast and true float32."""

from __future__ import annotations

import os
from typing import Any

import torch


def configure_cpu() -> dict[str, Any]:
    """Choose threads and the matrix multiplication of this machine; return what was chosen.

    Threads: OMP_NUM_THREADS where it is set, else the cores this process may use. On CPUs where MKL is slow (AMD),
    "medium" routes float32 products through oneDNN, twice as fast; on others the same word may mean bfloat16, so the
    error of one product against float64 is measured first, and only true float32 is accepted.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, len(os.sched_getaffinity(0)) // local))
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    error = float(((a @ b).double() - exact).norm() / exact.norm())
    if error > 2e-6:
        torch.set_float32_matmul_precision(before)
    return {
        "threads": threads,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "gemm_relative_error_medium": error,
    }
