"""Time distances between sets against their peers: torch-fidelity, torchmetrics, and pytorch-fid's formula.

All contestants run in one process and take turns, round by round, so that a busy machine slows all of them alike:
trust the ratios. On one thread they are ratios of processor time, which other programs lengthen by what they take of
the caches alone; on several they are ratios of the time that passes, for a thread that waits spends processor time too,
and nothing else should run. Memory once taken is kept between turns: a virtual machine may give pages that a process
frees back to its host, and fetching them anew, turn by turn, took a third of the arithmetic's time. The error of each
is taken to a slow reference of orthogonal factors and singular values; memory is what a fresh child of the process
needs above what it began with, told on one thread alone: a child of a process of several has none of them and would
wait for them for ever.

    OMP_NUM_THREADS=1 python benchmarks/distances.py --out results/benchmarks/distances.json
    OMP_NUM_THREADS=2 python benchmarks/distances.py --only Fréchet --no-slow --rounds 5 --out (the same)
    python benchmarks/distances.py --table                                 # writes the table of docs/metrics.md anew
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import torch
import torch_fidelity.metric_fid
import torch_fidelity.metric_kid
import torch_fidelity.metric_prc
import tyro
from mmdit_eval import Moments, frechet_distance, kernel_distance, precision_recall
from mmdit_eval.frechet import frechet_from_statistics
from mmdit_eval.readme import rewrite
from mmdit_eval.statistics import frechet_interval
from rich.console import Console
from rich.table import Table

from mmdit.train.tracking import describe_environment

ROOT = Path(__file__).resolve().parents[1]
PAGE, STORED = ROOT / "docs" / "metrics.md", ROOT / "results" / "benchmarks" / "distances.json"

Call = Callable[[], float]


class Contest(NamedTuple):
    """One job and who does it; ratios are taken to the first. `truth` is slow and runs once; None: no error column."""

    job: str
    calls: dict[str, Call]
    truth: float | None = None


def features(n: int, d: int, seed: int) -> np.ndarray:
    """Correlated features whose variances fall as 1/j, float64 [n, d]."""
    random = np.random.default_rng(seed)
    turned = scipy.linalg.qr(np.random.default_rng(99).normal(size=(d, d)))[0]
    return (random.normal(size=(n, d)) * np.arange(1, d + 1) ** -0.5) @ turned + 0.4 + 0.01 * seed


def exact(a: np.ndarray, b: np.ndarray) -> float:
    """The distance by orthogonal factors of the centred features and singular values of their product."""
    factors = [np.linalg.qr(x - x.mean(0), mode="r") / np.sqrt(len(x) - 1) for x in (a, b)]
    root = scipy.linalg.svdvals(factors[0] @ factors[1].T).sum()
    traces = sum(float((factor**2).sum()) for factor in factors)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + traces - 2 * root)


def frechet_contest(n: int, d: int, slow: bool) -> Contest:
    """The step from means and covariances; below N = d ours begins at the features it has kept until then."""
    a, b = features(n, d, 0), features(n, d, 1)
    mean, cov = [x.mean(0) for x in (a, b)], [np.cov(x, rowvar=False) for x in (a, b)]
    stats = [{"mu": m, "sigma": c} for m, c in zip(mean, cov, strict=True)]
    tensors = [torch.from_numpy(x) for x in (mean[0], cov[0], mean[1], cov[1])]

    def fidelity() -> float:
        found = torch_fidelity.metric_fid.fid_statistics_to_metric(*stats, verbose=False)
        return float(found["frechet_inception_distance"])

    def by_sqrtm() -> float:
        root = np.real(scipy.linalg.sqrtm(cov[0] @ cov[1]))
        return float(((mean[0] - mean[1]) ** 2).sum() + np.trace(cov[0]) + np.trace(cov[1]) - 2 * np.trace(root))

    calls: dict[str, Call] = {"torch-fidelity": fidelity}
    try:
        from torchmetrics.image.fid import _compute_fid

        calls["torchmetrics"] = lambda: float(_compute_fid(*tensors))
    except ImportError:
        pass
    if slow:
        calls["sqrtm (pytorch-fid, clean-fid)"] = by_sqrtm
    if n > d:
        calls["ours"] = lambda: frechet_from_statistics(mean[0], cov[0], mean[1], cov[1])
    else:
        kept = Moments.of(a), Moments.of(b)
        calls["ours"] = lambda: frechet_distance(*kept)
    calls["ours, with its interval"] = lambda: frechet_interval(a, b)["value"]
    return Contest(f"Fréchet step, {n} x {d}", calls, exact(a, b))


def moments_contest(n: int, d: int) -> Contest:
    """Covariance of a stream of batches of 256."""
    x = features(n, d, 0).astype(np.float32)
    batches = [x[i : i + 256] for i in range(0, n, 256)]

    def per_batch() -> float:
        total, outer = np.zeros(d), np.zeros((d, d))
        for batch in batches:
            rows = batch.astype(np.float64)
            total += rows.sum(0)
            outer += rows.T @ rows
        mean = total / n
        return float(np.trace((outer - n * np.outer(mean, mean)) / (n - 1)))

    def streaming() -> float:
        moments = Moments()
        for batch in batches:
            moments.update(batch)
        return float(np.trace(moments.covariance))

    calls: dict[str, Call] = {
        "numpy.cov of stored features": lambda: float(np.trace(np.cov(np.concatenate(batches), rowvar=False))),
        "sums of outer products per batch (torchmetrics)": per_batch,
        "ours": streaming,
    }
    return Contest(f"covariance of {n} x {d}", calls, float(x.astype(np.float64).var(0, ddof=1).sum()))


def kernel_contest(n: int, d: int, subsets: int) -> Contest:
    """KID over the same random subsets of half the set."""
    a, b, size = features(n, d, 0), features(n, d, 1), n // 2
    random = np.random.RandomState(2020)
    rows = [(random.choice(n, size, False), random.choice(n, size, False)) for _ in range(subsets)]
    tensors = torch.from_numpy(a), torch.from_numpy(b)

    def fidelity() -> float:
        found = torch_fidelity.metric_kid.kid_features_to_metric(
            *tensors, kid_subsets=subsets, kid_subset_size=size, rng_seed=2020, verbose=False
        )
        return float(found["kernel_inception_distance_mean"])

    calls: dict[str, Call] = {"torch-fidelity": fidelity, "ours": lambda: kernel_distance(a, b, subsets=rows)}
    return Contest(f"KID, {subsets} subsets of {size} x {d}", calls, fidelity())


def neighbours_contest(n: int, d: int) -> Contest:
    """Precision and recall."""
    a, b = features(n, d, 0), features(n, d, 1)
    tensors = torch.from_numpy(a), torch.from_numpy(b)

    def fidelity() -> float:
        found = torch_fidelity.metric_prc.prc_features_to_metric(
            *tensors, prc_neighborhood=3, prc_batch_size=10_000, save_cpu_ram=False, verbose=False
        )
        return float(found["precision"])

    calls: dict[str, Call] = {"torch-fidelity": fidelity, "ours": lambda: precision_recall(b, a).precision}
    return Contest(f"precision and recall, {n} x {d}", calls, fidelity())


def keep_memory(kept: bool) -> None:
    """Tell the allocator to keep what is freed, or to give it back at once (glibc; elsewhere nothing changes)."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is None:
        return
    most_mapped, trim_above = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD
    mallopt(most_mapped, 0 if kept else 65_536)
    mallopt(trim_above, 2**31 - 1 if kept else 0)
    if not kept:
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(call: Call) -> float | None:
    """MiB that a child of this process needs for the call above what it began with (Linux, one thread)."""
    if not Path("/proc/self/clear_refs").exists() or torch.get_num_threads() > 1:
        return None
    gc.collect()
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            keep_memory(False)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            start = _status("VmRSS")
            call()
            os.write(write, str((_status("VmHWM") - start) / 1024).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return float(text) if text else None


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1])


def run(contest: Contest, rounds: int) -> list[dict[str, Any]]:
    """Let everyone take turns; one more round before these is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contest.calls}
    passed: dict[str, list[float]] = {name: [] for name in contest.calls}
    values: dict[str, float] = {}
    for turn in range(rounds + 1):
        for name, call in contest.calls.items():
            begun, clock = time.process_time(), time.perf_counter()
            values[name] = call()
            if turn:
                seconds[name].append(time.process_time() - begun)
                passed[name].append(time.perf_counter() - clock)
    rows: list[dict[str, Any]] = [
        {
            "job": contest.job,
            "threads": torch.get_num_threads(),
            "implementation": name,
            "processor_seconds": seconds[name],
            "seconds": passed[name],
            "relative_error": None if contest.truth is None else abs(values[name] / contest.truth - 1),
            "peak_mib": peak_memory(call),
        }
        for name, call in contest.calls.items()
    ]
    first, *_ = medians = [statistics.median(clocked(row)) for row in rows]
    return [{**row, "speed_up": first / median} for row, median in zip(rows, medians, strict=True)]


def main(
    width: int = 2_048,
    many: int = 10_000,
    few: int = 2_000,
    rounds: int = 3,
    slow: bool = True,
    only: str = "",
    out: Path | None = None,
    table: bool = False,
) -> None:
    """Run every contest and print a table.

    Args:
        width: features a sample.
        many: samples above the width.
        few: samples below it.
        rounds: turns of each contestant; the median counts.
        slow: also pytorch-fid's matrix root, a quarter of torch-fidelity's speed.
        only: part of the name of the jobs to run; with `out`, the others' rows stay as they are.
        out: JSON file for the numbers and where they come from.
        table: write the table of docs/metrics.md from results/benchmarks/distances.json, and measure nothing.
    """
    if table:
        text = rewrite(PAGE.read_text("utf-8"), markdown(json.loads(STORED.read_text("utf-8"))), "distances")
        PAGE.write_text(text, encoding="utf-8")
        return
    keep_memory(True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    shown = Table("job", "implementation", "s", "best s", "x first", "rel. error", "peak MiB")
    contests: dict[str, Callable[[], Contest]] = {
        f"Fréchet step, {many} x {width}": lambda: frechet_contest(many, width, slow),
        f"Fréchet step, {few} x {width}": lambda: frechet_contest(few, width, slow),
        f"covariance of {many} x {width}": lambda: moments_contest(many, width),
        f"KID, 10 subsets of {few // 2} x {width}": lambda: kernel_contest(few, width, 10),
        f"precision and recall, {few} x {width}": lambda: neighbours_contest(few, width),
    }
    chosen = [job for job in contests if only in job]
    if not chosen:
        raise SystemExit(f"no job is called so: {only!r}; there are {', '.join(contests)}")
    rows = []
    for job in chosen:
        load = os.getloadavg()
        for row in run(contests[job](), rounds):
            rows.append({**row, "load_average_before": load})
            cells = (
                f"{statistics.median(clocked(row)):.3f}",
                f"{min(clocked(row)):.3f}",
                f"{row['speed_up']:.2f}",
                f"{row['relative_error']:.0e}",
                "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
            )
            shown.add_row(row["job"], row["implementation"], *cells)
    Console(width=140).print(shown)
    if out is not None:
        write(out, rows, rounds, list(contests))


def clocked(row: dict[str, Any]) -> list[float]:
    """The seconds of each turn, by the clock that the number of threads asks for."""
    return row["seconds"] if row["threads"] > 1 else row["processor_seconds"]


def write(out: Path, rows: list[dict[str, Any]], rounds: int, jobs: list[str]) -> None:
    """Write rows, each with the commit it was measured at; rows of what did not run now stay."""
    stamp = describe_environment()
    rows = [{**row, "rounds": rounds, "commit": stamp["commit"]} for row in rows]
    ran = {(row["job"], row["threads"]) for row in rows}
    if out.is_file():
        stored = json.loads(out.read_text())["rows"]
        rows += [row for row in stored if (row["job"], row["threads"]) not in ran and row["job"] in jobs]
    rows.sort(key=lambda row: (jobs.index(row["job"]), row["threads"]))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"environment": stamp, "rows": rows}, indent=1) + "\n")


def markdown(result: dict[str, Any]) -> str:
    """Return the table of docs/metrics.md."""
    heads = "job", "threads", "who", "seconds", "times the first", "relative error", "peak MiB"
    lines = [f"| {' | '.join(heads)} |", "|---|---:|---|---:|---:|---:|---:|"]
    for row in result["rows"]:
        seconds = f"{statistics.median(clocked(row)):.2f}"
        memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        error = "" if row["relative_error"] is None else f"{row['relative_error']:.0e}"
        cells = row["job"], str(row["threads"]), row["implementation"], seconds, f"{row['speed_up']:.2f}", error, memory
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(main)
