"""F7 and F8: evaluation shared out over processes, and metrics against other implementations."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.faults import Outcome

COUNTS, WORLDS, BATCHES = (1, 2, 3, 7, 101, 256), (1, 2, 3, 4), (1, 8)


def run_sharing(folder: Path, full: bool) -> Outcome:
    """F7: real processes (gloo) draw, extract and gather every count in every batch size."""
    counts = COUNTS if full else COUNTS[:4]
    alone = _with_processes(folder, 1, counts)
    wrong, tried, worst = [], 0, 0.0
    for world in WORLDS if full else (1, 3):
        found = alone if world == 1 else _with_processes(folder, world, counts)
        for case, result in found.items():
            tried += 1
            name = f"{case} on {world} processes"
            if result.get("problem"):
                wrong.append(f"{name}: {result['problem']}")
                continue
            for metric, value in result["metrics"].items():
                expected = alone[f"{case.split()[0]} images in batches of 1"]["metrics"][metric]
                error = abs(value - expected) / max(abs(expected), 1e-3)
                worst = max(worst, error)
                if not error <= 1e-6:
                    wrong.append(f"{name}: {metric} {value!r} instead of {expected!r}")
    return Outcome(
        not wrong,
        f"{tried - len(wrong)} of {tried} splits whole and once; Fréchet, kernel distance and CLIP-score within "
        f"{worst:.0e} of one process's",
        {"splits": tried, "worst_relative_difference": worst, "wrong": wrong},
    )


def _with_processes(folder: Path, world: int, counts: tuple[int, ...]) -> dict[str, Any]:
    """Start the processes, let them meet, and read what the first one gathered."""
    place = folder / f"world{world}"
    place.mkdir()
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _judge(place, rank, world, counts)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    answer = place / "found.json"
    if any(statuses) or not answer.is_file():
        return {"all": {"problem": f"the processes ended with {statuses}"}}
    return json.loads(answer.read_text())


def _judge(place: Path, rank: int, world: int, counts: tuple[int, ...]) -> None:
    """Do one process's part of every case; the first writes what came of them."""
    from mmdit_eval import feature_cache
    from mmdit_eval.distribution import Share, draw_batches
    from mmdit_eval.image_sets import from_array

    feature_cache.CHUNK = 16  # so that small sets are shared out at all
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=world)
    share, extractor, found = Share(rank, world), Means(), {}
    for count, batch in ((count, batch) for count in counts for batch in BATCHES):
        pictures = np.random.default_rng(count).integers(0, 256, (count, 12, 12, 3), dtype=np.uint8)
        drawn = draw_batches(lambda rows, p=pictures: p[rows], count, batch, place / f"{count}-{batch}", share)
        gathered = share.gather(drawn[0], [drawn[1]], count)
        features, ids = feature_cache.extract_set(
            extractor, from_array(pictures), batch_size=batch, rank=rank, world=world
        )
        joined = share.gather(ids, [features], count)
        if gathered is not None and joined is not None:
            problem = "" if np.array_equal(gathered[0], pictures) else "the gathered pictures are others"
            metrics = {} if problem else _metrics(joined[0])
            found[f"{count} images in batches of {batch}"] = {"problem": problem, "metrics": metrics}
    share.meet()
    if share.first:
        (place / "found.json").write_text(json.dumps(found))


class Means:
    """A feature network without weights: means over cells of 3 x 3 pixels, float32, one picture at a time."""

    width, classes, precision = 48, 0, "fp32"

    def describe(self) -> dict[str, str]:
        """What a cache is keyed by."""
        return {"name": "means"}

    def __call__(self, pictures: list[np.ndarray]) -> torch.Tensor:
        """Return [B, 48]."""
        cells = [p.reshape(4, 3, 4, 3, 3).mean((1, 3)).reshape(-1) / 255 for p in pictures]
        return torch.tensor(np.array(cells), dtype=torch.float32)


def _metrics(features: np.ndarray) -> dict[str, float]:
    """Return the metrics of features [N, 48] against a fixed reference; sets of one have no distance."""
    from mmdit_eval import clip_score, frechet_distance, kernel_distance

    reference = np.random.default_rng(7).random((300, features.shape[1]))
    texts = np.random.default_rng(8).standard_normal((len(features), features.shape[1]))
    found = {"clip_score": float(np.mean(np.asarray(clip_score(torch.tensor(features), torch.tensor(texts).float()))))}
    if len(features) >= 2:
        found["frechet"] = float(frechet_distance(features, reference))
        found["kernel"] = float(kernel_distance(features, reference))
    else:
        with contextlib.suppress(ValueError):
            frechet_distance(features, reference)
            found["frechet of one sample"] = float("nan")
    return found


# --- F8 ---------------------------------------------------------------------------------------------------------


def run_gold(folder: Path, full: bool) -> Outcome:
    """F8."""
    from mmdit_eval import frechet_distance, kernel_distance

    worst = {"torch-fidelity": 0.0, "torchmetrics": 0.0, "scipy": 0.0, "kernel, closed form": 0.0}
    sets = 20 if full else 5
    for a, b in _sets(sets):
        ours = float(frechet_distance(a, b))
        theirs = {
            "torch-fidelity": _torch_fidelity(a, b), "torchmetrics": _torchmetrics(a, b), "scipy": _scipy(a, b),
        }  # fmt: skip
        for name, value in theirs.items():
            worst[name] = max(worst[name], abs(ours - value) / abs(value)) if value is not None else float("nan")
        expected = _kernel(a, b)
        worst["kernel, closed form"] = max(
            worst["kernel, closed form"], abs(float(kernel_distance(a, b)) - expected) / abs(expected)
        )
    identical, singular = 0.0, []
    for a, _ in _sets(sets):
        identical = max(identical, abs(float(frechet_distance(a, a.copy()))))
        few = a[: max(2, a.shape[1] // 3)]
        flat = a.copy()
        flat[:, 0] = 1.0
        singular += [float(frechet_distance(few, a)), float(frechet_distance(flat, a))]
    finite = all(np.isfinite(value) and value >= 0 for value in singular)
    missing = [name for name, value in worst.items() if np.isnan(value)]
    good = all(value <= 1e-6 for name, value in worst.items() if name not in missing)
    listed = ", ".join(f"{name} {'not installed' if name in missing else f'{v:.0e}'}" for name, v in worst.items())
    return Outcome(
        good and identical < 1e-6 and finite and "torch-fidelity" not in missing,
        f"{sets} sets, largest relative difference: {listed}; identical sets {identical:.0e}; "
        f"{len(singular)} singular ones {'finite' if finite else 'NOT finite'}",
        {"sets": sets, "worst": worst, "identical": identical, "singular": singular},
    )


def _sets(count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs of features float64 of many widths, scales, correlations and sizes."""
    for i in range(count):
        random = np.random.default_rng(i)
        width = (4, 16, 64, 128)[i % 4]
        mix = random.standard_normal((width, width)) / np.sqrt(width)
        scale = 10.0 ** random.uniform(-2, 2)
        first = random.standard_normal((width * (3 + i % 5), width)) @ mix * scale
        second = (random.standard_normal((width * 4 + 7, width)) @ mix.T + random.uniform(0, 1)) * scale
        yield first, second


def _torch_fidelity(a: np.ndarray, b: np.ndarray) -> float:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(torch.tensor(x)) for x in (a, b)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"])


def _torchmetrics(a: np.ndarray, b: np.ndarray) -> float | None:
    try:
        from torchmetrics.image.fid import _compute_fid
    except ImportError:
        return None
    means, covariances = [torch.tensor(x.mean(0)) for x in (a, b)], [torch.tensor(np.cov(x.T)) for x in (a, b)]
    return float(_compute_fid(means[0], covariances[0], means[1], covariances[1]))


def _scipy(a: np.ndarray, b: np.ndarray) -> float:
    """Heusel et al. 2017, arXiv:1706.08500, with a matrix square root."""
    import scipy.linalg

    first, second = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(first @ second)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root.real))


def _kernel(a: np.ndarray, b: np.ndarray) -> float:
    """Binkowski et al. 2018, arXiv:1801.01401, Eq. 4, with the cubic kernel, written out."""
    width = a.shape[1]

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / width + 1) ** 3

    within = [(kernel(x, x).sum() - np.trace(kernel(x, x))) / (len(x) * (len(x) - 1)) for x in (a, b)]
    return float(sum(within) - 2 * kernel(a, b).mean())


RUNS = {"F7": run_sharing, "F8": run_gold}
