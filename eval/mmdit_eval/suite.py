"""A suite on a run: draw pictures for the prompts of each split, measure them, write one JSON with a stamp.

    python scripts/evaluate.py runs/quickstart/mmdit-s0 --suite configs/eval/quickstart.yaml

The stamp decides what may be compared. `protocol` must be equal for any comparison; `inference` must be equal unless
a study says that it varies the field. The version of the code is recorded beside it and never compared; a change of
this package that changes numbers raises `PROTOCOL_VERSION`.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mmdit import rng
from mmdit.checkpoint import checkpoint_hash, find_checkpoint, weights_stem
from mmdit.config import COMBINATIONS, ConfigError, EncodersConfig, RunConfig, SuiteConfig, load_config, to_tree
from mmdit.data import make_dataset
from mmdit.diffusion import build_schedule
from mmdit.encoders.text import TextEncoders, load_run_text
from mmdit.encoders.vae import AutoencoderKL, load_run_vae, to_images, to_pixels
from mmdit.pipeline import TextToImage, configure_cpu, save_image
from mmdit.registry import lookup
from mmdit_eval.comparison import compare, read_result, write_result
from mmdit_eval.distance_metrics import DISTANCES
from mmdit_eval.distribution import Share, draw_batches, forget
from mmdit_eval.drawn import Drawn, Reference, look_together, training_features
from mmdit_eval.features import Extractor, hash_tensors, load_clip, load_extractor
from mmdit_eval.metrics import METRICS, TINY, looks_of, stamp_of_judges

__all__ = ["check_suite", "compare", "evaluate_ceiling", "evaluate_run", "evaluate_snapshots", "load_references"]

PROTOCOL_VERSION = 3
Say = Callable[[str], None]


def check_suite(suite: SuiteConfig, config: RunConfig) -> SuiteConfig:
    """Return the suite with what the run's data decide filled in; refuse one that they cannot serve.

    Raises:
        ConfigError: an unknown metric, one that needs other data, a split that the data do not have, or a CLIP pair
            that cannot serve it.
    """
    suite = suite.for_data(config.data.name)
    if "heldout" in suite.splits and config.data.name not in COMBINATIONS:
        raise ConfigError(
            f"suite.splits: 'heldout' needs data whose combinations are known (data.name {', '.join(COMBINATIONS)}), "
            f"the run has {config.data.name!r}; leave suite.splits out, or set it to [seen]: the pictures of "
            f"data.val_fraction, which training does not see"
        )
    if suite.clip != TINY and suite.clip.partition(":")[0] not in ("clip", "openclip"):
        raise ConfigError(f"suite.clip must be {TINY}, clip:FOLDER or openclip:NAME@FILE, got {suite.clip!r}")
    if "retrieval" in suite.metrics and suite.clip == TINY and config.data.name not in ("shapes", "emoji"):
        raise ConfigError(
            f"suite.metrics: 'retrieval' by {TINY} knows shapes and emoji only, the run has data.name "
            f"{config.data.name!r}; name a pair, suite.clip: clip:FOLDER or openclip:NAME@FILE, or leave it out"
        )
    distances = [name for name in suite.metrics if name in DISTANCES]
    for field in ("num_images", "snapshot_images"):
        if distances and getattr(suite, field) == 1:
            raise ConfigError(f"suite.{field}: {distances[0]!r} is a distance between sets, which 1 picture is not")
    for name in suite.metrics:
        try:
            metric = lookup(METRICS, name, "metric")
        except ValueError as error:
            raise ConfigError(f"suite.metrics: {error}") from None
        needed = metric.data
        if metric.logits and not suite.extractor.startswith("inception"):
            raise ConfigError(
                f"suite.metrics: {name!r} needs the logits of a classifier, which suite.extractor {suite.extractor!r} "
                "has not; take inception_fid or inception_clean, or leave it out"
            )
        if needed is not None and needed != config.data.name:
            raise ConfigError(
                f"suite.metrics: {name!r} needs data.name {needed!r}, the run has {config.data.name!r}; leave it out, "
                f"or leave suite.metrics out: then it is {list(SuiteConfig().for_data(config.data.name).metrics)}"
            )
    return suite


def evaluate_run(
    run_dir: str | Path,
    suite: SuiteConfig | None = None,
    checkpoint: str | Path | None = None,
    *,
    num_images: int | None = None,
    references: Mapping[str, Reference] | None = None,
    out: str | Path | None = None,
    name: str | None = None,
    share: Share | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Judge one checkpoint of a run; a result with the same stamp and weights that is already there is returned.

    Args:
        run_dir: the run; its result is written to `<run_dir>/eval/<suite>-<images_seen>.json`.
        out, name: another folder and name for the result, where one run is judged under several samplings.
        checkpoint: one checkpoint of it; None: its newest.
        num_images: per split, instead of `suite.num_images` (snapshots).
        references: of `load_references`, to share them between runs of equal data.
        share: this process of several; each draws its batches and runs the networks that judge on them, the first one
            measures, all return the result. Finished batches stand in `<run_dir>/eval/.drawn` until the result is
            written, so an interrupted call goes on.

    Raises:
        FileNotFoundError, CheckpointError: no run, no whole checkpoint.
        ConfigError: a metric the run's data cannot serve.
    """
    suite, share = suite or SuiteConfig(), share or Share()
    path = Path(checkpoint) if checkpoint is not None else find_checkpoint(run_dir)
    run_dir = Path(out or run_dir)
    config = load_config(path / "config.yaml")
    suite = check_suite(suite, config)
    references = references or load_references(config, suite)
    count = num_images or suite.num_images
    used = {split: reference.head(count) for split, reference in references.items()}
    stamp = make_stamp(config, suite, used)
    file = run_dir / "eval" / f"{suite.name}-{path.name}.json"
    weights_hash = checkpoint_hash(path, weights_stem(suite.weights))
    known = read_result(file)
    same = known is not None and known["stamp"] == stamp and known["checkpoint_sha256"] == weights_hash
    if known is not None and same and _is_whole(known, run_dir, suite, used):
        return known

    started = time.perf_counter()
    configure_cpu()
    vae, text = _encoders(config.encoders)
    pipeline = TextToImage.load(path, suite.weights, vae=vae, text=text)
    drawing, scoring = 0.0, 0.0
    splits: dict[str, Any] = {}
    prefix: dict[str, Any] = {}
    samples = []
    unfinished = run_dir / "eval" / ".drawn" / f"{file.stem}-{_digest(json.dumps([stamp, weights_hash]).encode())}"
    for split, reference in used.items():
        begun = time.perf_counter()
        ids, own = _draw_own(pipeline, reference, suite, unfinished / split, share)
        drawing += time.perf_counter() - begun
        begun = time.perf_counter()
        drawn = _look(own, ids, reference, share)
        if drawn is None:  # the first process has them
            continue
        splits[split] = measure(drawn)
        if 0 < suite.snapshot_images < len(drawn.images):  # for curves: distances depend on N, so all points share one
            prefix[split] = measure(drawn.head(suite.snapshot_images))
        scoring += time.perf_counter() - begun
        for i in range(min(suite.grid_prompts, len(drawn.images))):
            sample = Path("samples") / f"{suite.name}-{path.name}" / f"{split}-{i:03d}.png"
            save_image(drawn.images[i], run_dir / sample, {"prompt": reference.captions[i], "seed": suite.seed})
            samples.append(str(sample))
    if not share.first:
        return dict(share.broadcast(None))
    result: dict[str, Any] = {
        "suite": suite.name,
        "run": name or config.name,
        "data": config.data.name,
        "images_seen": int(path.name),
        "checkpoint_sha256": weights_hash,
        "stamp": stamp,
        "settings": to_tree(suite),
        "splits": splits,
        "prefix": prefix,
        "samples": samples,
        "prompts": {split: reference.captions[: suite.grid_prompts] for split, reference in used.items()},
        "seconds": {
            "drawing": round(drawing, 2),
            "scoring": round(scoring, 2),
            "total": round(time.perf_counter() - started, 2),
        },
        "drawn_per_second": round(sum(len(r.indices) for r in used.values()) / max(drawing, 1e-9), 2),
        "environment": environment(),
    }
    write_result(file, result)
    forget(unfinished)
    share.broadcast(result)
    say(f"{run_dir.name} at {int(path.name):,} images: {_in_one_line(splits)}  ({result['seconds']['total']:.0f} s)")
    return result


def _is_whole(known: Mapping[str, Any], run_dir: Path, suite: SuiteConfig, used: Mapping[str, Reference]) -> bool:
    """Say whether a result has its pictures, and was measured on as few, too, as the snapshots: a curve has one N."""
    few = suite.snapshot_images
    long = [split for split, reference in used.items() if 0 < few < len(reference.indices)]
    counted = all(known["prefix"].get(split, {}).get("num_images") == few for split in long)
    return counted and all((run_dir / sample).is_file() for sample in known["samples"])


def evaluate_snapshots(
    run_dir: str | Path, suite: SuiteConfig, *, references: Mapping[str, Reference] | None = None, say: Say = print
) -> list[dict[str, Any]]:
    """Judge the earlier kept checkpoints of a run with `suite.snapshot_images` pictures a split, oldest first."""
    from mmdit.checkpoint import CheckpointError, list_checkpoints

    results = []
    for path in list_checkpoints(run_dir)[:-1] if suite.snapshot_images else []:
        try:
            result = evaluate_run(
                run_dir, suite, path, num_images=suite.snapshot_images, references=references, say=say
            )
        except CheckpointError as error:  # a damaged snapshot costs its point of the curve, not the report
            say(f"left out of the curves: {error}")
            continue
        results.append(result)
    return results


def evaluate_ceiling(
    config: RunConfig,
    suite: SuiteConfig,
    out: str | Path,
    *,
    references: Mapping[str, Reference] | None = None,
    vae: AutoencoderKL | None = None,
) -> dict[str, Any]:
    """Judge true pictures passed through the VAE: what no denoiser behind this VAE can be expected to beat.

    The pictures are the reference's own, since rows draw from those pictures' captions. Other true pictures, of other
    captions, are farther from the reference than what a good denoiser draws (seen: Fréchet 10.9 against 2.5). Stored in
    `out` (JSON) with the pictures beside it.
    """
    suite = check_suite(suite, config)
    references = references or load_references(config, suite)
    vae = vae or load_run_vae(config.encoders)
    used = {split: reference.head(suite.num_images) for split, reference in references.items()}
    protocol = make_stamp(config, suite, used)["protocol"]
    key = {"protocol": protocol, "vae": hash_tensors(vae.state_dict()), "metrics": list(suite.metrics)}
    out = Path(out)
    known = read_result(out)
    if known and known["key"] == json.loads(json.dumps(key)):
        return known
    splits: dict[str, Any] = {}
    files: dict[str, list[str]] = {"true": [], "ceiling": []}
    for split, reference in used.items():
        images = np.concatenate(
            [
                through_vae(vae, reference.images[i : i + suite.batch_size])
                for i in range(0, len(reference.images), suite.batch_size)
            ]
        )
        splits[split] = measure(Drawn(images, reference, suite))
        shown = reference.images[: suite.grid_prompts]
        for kind, pictures in (("true", shown), ("ceiling", through_vae(vae, shown))):
            for i, picture in enumerate(pictures):
                file = Path(out.stem) / f"{kind}-{split}-{i:03d}.png"
                save_image(picture, out.parent / file, {"prompt": reference.captions[i]})
                files[kind].append(str(file))
    result = {"key": key, "splits": splits, "samples": files, "environment": environment()}
    write_result(out, result)
    return result


@lru_cache(maxsize=1)
def _encoders(config: EncodersConfig) -> tuple[AutoencoderKL, TextEncoders]:
    """Load VAE and text encoders once for all checkpoints that share them."""
    return load_run_vae(config), load_run_text(config)


def load_references(config: RunConfig, suite: SuiteConfig) -> dict[str, Reference]:
    """Load the items of each split that the suite looks at: a fixed random choice, equal for equal data and seed."""
    found: dict[str, Reference] = {}
    suite = suite.for_data(config.data.name)
    extractor = load_clip(suite.clip) if suite.extractor == suite.clip else load_extractor(suite.extractor)
    for split in suite.splits:
        dataset = make_dataset(config.data, split)
        found[split] = _reference(dataset, split, _items(dataset, split, suite, suite.num_images), suite, extractor)
    return found


def _items(dataset: Any, split: str, suite: SuiteConfig, count: int) -> np.ndarray:
    order = rng.generator(suite.seed, "metric", 0).permutation(len(dataset))
    if len(order) < 2:
        raise ConfigError(too_few(split, len(order)))
    return order[:count]


def too_few(split: str, count: int) -> str:
    """Say that a split cannot be judged."""
    return f"the split {split!r} has {count} item(s), a suite needs at least 2; raise data.val_fraction"


def _reference(dataset: Any, split: str, indices: np.ndarray, suite: SuiteConfig, extractor: Extractor) -> Reference:
    captions, images = dataset.captions(indices), dataset.pixels(indices)
    return Reference(split, dataset, indices, captions, images, extractor, suite.batch_size)


def _draw_own(
    pipeline: TextToImage, reference: Reference, suite: SuiteConfig, folder: Path, share: Share
) -> tuple[np.ndarray, Drawn]:
    """Draw this process's batches; return their places in the split and the pictures with their items."""
    count = len(reference.indices)
    with tqdm(total=count, unit=" images", desc=f"drawing {reference.split}", disable=None, leave=False) as bar:
        ids, images = draw_batches(
            lambda rows: draw(pipeline, reference.part(rows), suite), count, suite.batch_size, folder, share, bar.update
        )
    share.meet()
    return ids, Drawn(images, reference.part(ids) if share.world > 1 else reference, suite, pipeline)


def _look(own: Drawn, ids: np.ndarray, reference: Reference, share: Share) -> Drawn | None:
    """Run the networks that judge, by all processes; the first one gets all pictures, the others None."""
    suite, config = own.suite, reference.dataset.config
    training = None
    if "memorisation" in suite.metrics:
        training = training_features(config, reference.extractor, suite.batch_size, share)
    drawn = look_together(own, ids, reference, looks_of(suite, config.name), share)
    return drawn and replace(drawn, training=training)


def draw(pipeline: TextToImage, reference: Reference, suite: SuiteConfig) -> np.ndarray:
    """Draw one picture a caption, uint8 [N, R, R, 3]; its noise is keyed by (suite.seed, index of the item)."""
    previous = pipeline.sampling
    pipeline.sampling = suite.sampling or previous
    try:
        return pipeline(
            reference.captions, seed=suite.seed, indices=reference.indices.tolist(), batch_size=suite.batch_size
        )
    finally:
        pipeline.sampling = previous


@torch.inference_mode()
def through_vae(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """Encode and decode images uint8 [B, R, R, 3]."""
    device = next(vae.parameters()).device
    return np.asarray(to_images(vae.decode(vae.encode(to_pixels(images).to(device)))))


def measure(drawn: Drawn) -> dict[str, Any]:
    """Apply the suite's metrics to the pictures of one split."""
    found: dict[str, Any] = {
        "num_images": len(drawn.images),
        "scores": {},
        "per_image": {},
        "influence": {},
        "chance": {},
        "details": {},
    }
    for name in drawn.suite.metrics:
        measured = lookup(METRICS, name, "metric").function(drawn)
        for part in ("scores", "per_image", "influence", "chance", "details"):
            found[part].update(getattr(measured, part))
    return found


# --- stamps -----------------------------------------------------------------------------------------------------


def make_stamp(config: RunConfig, suite: SuiteConfig, references: Mapping[str, Reference]) -> dict[str, Any]:
    """Say what a number depends on besides the trained weights; `inference` in the config's own dotted names."""
    extractor = next(iter(references.values())).extractor
    sampling = suite.sampling or config.sampling
    protocol = {
        "version": PROTOCOL_VERSION,
        "metrics": list(suite.metrics),
        "extractor": extractor.describe(),
        "judges": stamp_of_judges(suite, config.data.name),
        "references": {
            split: {
                "num_images": len(reference.indices),
                "pictures": _digest(reference.images.tobytes()),
                "captions": _digest("\n".join(reference.captions).encode()),
            }
            for split, reference in references.items()
        },
        "resolution": config.data.resolution,
        "seed": suite.seed,
        "noise": "keyed by (seed, item)",
        "path": "uint8 in memory, no file format between",
        "precision": config.train.precision,
        "weights": suite.weights,
    }
    if suite.long_captions != "truncate":  # which goes without saying, as in results from before there was a choice
        protocol["long_captions"] = suite.long_captions
    inference = {
        **{f"sampling.{name}": value for name, value in sampling.in_effect().items()},
        "diffusion.schedule": build_schedule(config.diffusion.schedule).describe(),
        "diffusion.prediction": config.diffusion.prediction,
        "encoders.padding": config.encoders.padding,
        "encoders.null": config.encoders.null,
        # validation losses are in units of the latents
        "encoders.latent_shift": config.encoders.latent_shift,
        "encoders.latent_scale": config.encoders.latent_scale,
    }
    return json.loads(json.dumps({"protocol": protocol, "inference": inference}))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


# --- files ------------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """What may change speed, and last bits: recorded, never compared."""
    from mmdit import __version__

    return {
        "mmdit_lab": __version__,
        "code": _code_hash(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
    }


@lru_cache(maxsize=1)
def _code_hash() -> str:
    """Hash of every source file of both packages: tells two versions apart with or without git."""
    import mmdit
    import mmdit_eval

    digest = hashlib.sha256()
    for package in (mmdit, mmdit_eval):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _in_one_line(splits: Mapping[str, Any]) -> str:
    parts = []
    for split, found in splits.items():
        scores = found["scores"]
        name = next((n for n in ("all_correct", "same_base", "clip_score") if n in scores), next(iter(scores), None))
        if name:
            parts.append(f"{name} {split} {scores[name]['value']:.3f}")
    return ", ".join(parts)
