"""Judge pictures against pictures, without a run: what `scripts/evaluate.py images` and `statistics` do.

    python scripts/evaluate.py images drawn/ --against photos/ --extractor inception_fid --metrics frechet kernel

The result has the form of a run's (`splits`, `scores`, `per_image`, a stamp), so `compare` reads both. Works under
torchrun: each process computes the features of its chunks.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mmdit.data.archives import array_names
from mmdit.registry import lookup
from mmdit_eval.comparison import check_place, write_result
from mmdit_eval.distribution import Share
from mmdit_eval.extrapolation import SPLITS
from mmdit_eval.feature_cache import default_cache, extract_set
from mmdit_eval.features import Extractor, Precision, load_extractor
from mmdit_eval.image_sets import ImageSet, load_captions, open_images
from mmdit_eval.set_metrics import OF_CAPTIONS, SET_METRICS, Pair

SET_PROTOCOL_VERSION = 1


@dataclass(frozen=True)
class SetOptions:
    """How sets of pictures are judged.

    Attributes:
        extractor, clip: names for `load_extractor`; `clip` is that of CLIP-score and retrieval, None: the
            extractor itself.
        weights: file or folder of the extractor's weights.
        sizes: `equal`, `any` or a number of pixels, for the pictures to be judged; `against_sizes` for the others.
        split, image_column: of tables; `caption_column`, of the table of the pictures to be judged: their captions.
        cache: folder of kept features; None: keep none.
    """

    extractor: str = "inception_fid"
    weights: str | None = None
    precision: Precision = "fp32"
    clip: str | None = None
    metrics: tuple[str, ...] = ("frechet", "kernel")
    long_captions: str = "truncate"
    sizes: str = "equal"
    against_sizes: str = "equal"
    split: str = "train"
    image_column: str = "image"
    caption_column: str | None = None
    batch_size: int = 64
    seed: int = 0
    cache: Path | None = None
    progress: bool = True


def evaluate_images(
    fake: str | Path | ImageSet,
    against: str | Path | ImageSet,
    options: SetOptions | None = None,
    *,
    captions: str | Path | Sequence[str] | None = None,
    train: str | Path | ImageSet | None = None,
    out: str | Path | None = None,
    share: Share | None = None,
) -> dict[str, Any] | None:
    """Judge the pictures `fake` against the pictures, or statistics, `against`.

    Args:
        fake, against: as `open_images`; `against` may be an .npz of `mu` and `sigma`.
        captions: of `fake`: a file as for `load_captions`, or a list.
        train: the pictures of the training, for `memorisation`.
        out: JSON file to write.

    Returns:
        The result; None in processes other than the first.

    Raises:
        ValueError: unknown metric or extractor, too few pictures, statistics of another extractor, captions that do
            not fit, a place where `out` cannot be written.
        FileNotFoundError, DataError: pictures or weights that are not there or cannot be read.
    """
    options, share, started = options or SetOptions(), share or Share(), time.perf_counter()
    metrics = {name: lookup(SET_METRICS, name, "metric") for name in options.metrics}
    if out is not None:
        check_place(Path(out))
    judged = _open(fake, options, options.sizes, options.caption_column)
    words = _captions(captions, judged)
    if "memorisation" in metrics and train is None:
        raise ValueError("memorisation needs the pictures of the training: --train FOLDER; --against then names others")
    of_captions = [name for name in OF_CAPTIONS if name in metrics]
    if of_captions and words is None:
        raise ValueError(
            f"{of_captions[0]} needs captions, and {judged.source} comes without; give --captions FILE, or "
            "--caption-column NAME of a table"
        )
    if "retrieval" in metrics and len(set(words or ())) < 2:
        raise ValueError(f"retrieval needs at least two different captions; those of {judged.source} are all the same")
    other = against if is_statistics(against) else _open(against, options, options.against_sizes)
    _check_counts(judged, *([other] if isinstance(other, ImageSet) else []))

    extractor = load_extractor(options.extractor, weights=options.weights, precision=options.precision)
    if "frechet_infinity" in metrics:
        _check_extrapolation(extractor, judged, *([other] if isinstance(other, ImageSet) else []))
    clip = _clip_of(options, extractor, of_captions[0]) if of_captions else None
    if not isinstance(other, ImageSet):  # a file that cannot be used is refused before the networks run
        reference, stated = _reference(other, extractor, options, share)
    found = features_of(judged, extractor, options, share)
    if isinstance(other, ImageSet):
        reference, stated = _reference(other, extractor, options, share)
    trained = None
    if train is not None and "memorisation" in metrics:
        trained, stated["train"] = _reference(_open(train, options, options.against_sizes), extractor, options, share)
    seen = found
    if clip is not None and clip is not extractor:
        seen = features_of(judged, clip, options, share)
    if found is None or seen is None:
        return None
    pair = Pair(
        fake=found[:, : extractor.width].astype(np.float64),
        real=reference,
        logits=found[:, extractor.width :].astype(np.float64),
        extractor=extractor,
        captions=words,
        clip_features=seen[:, : clip.width].astype(np.float64) if clip is not None else None,
        clip=clip,
        long_captions=options.long_captions,
        seed=options.seed,
        train=trained,
    )
    split: dict[str, Any] = {
        "num_images": len(judged),
        "scores": {},
        "per_image": {},
        "influence": {},
        "chance": {},
        "details": {},
    }
    for function in metrics.values():
        measured = function(pair)
        for part in ("scores", "per_image", "influence", "chance", "details"):
            split[part].update(getattr(measured, part))
    result = {
        "kind": "images",
        "run": judged.source,
        "against": str(other.source if isinstance(other, ImageSet) else other),
        "pictures": set_digest(judged),
        "stamp": _stamp(pair, options, stated),
        "splits": {"images": split},
        "seconds": {"total": round(time.perf_counter() - started, 2)},
        "environment": _environment(),
    }
    if out is not None:
        write_result(Path(out), result)
    return result


def _reference(
    other: str | Path | ImageSet, extractor: Extractor, options: SetOptions, share: Share
) -> tuple[Any, dict[str, Any]]:
    """Return the features (or moments) that pictures are judged against, and what a stamp says of them."""
    if isinstance(other, ImageSet):
        whole = features_of(other, extractor, options, share)
        features = whole[:, : extractor.width].astype(np.float64) if whole is not None else None
        return features, {
            "num_images": len(other), "pictures": set_digest(other), "sizes": options.against_sizes
        }  # fmt: skip
    from mmdit_eval.moments import Moments

    moments = Moments.load(other, extractor.describe())
    if moments.width != extractor.width:
        raise ValueError(
            f"{other} holds statistics of {moments.width} features, the extractor {extractor.name!r} gives "
            f"{extractor.width}; name the extractor they come from with --extractor"
        )
    return moments, {"num_images": moments.count, "statistics": _file_digest(Path(other))}


def _stamp(pair: Pair, options: SetOptions, reference: dict[str, Any]) -> dict[str, Any]:
    """Say what the numbers depend on besides the pictures that are judged."""
    words = "\n".join(pair.captions).encode() if pair.captions is not None else None
    protocol = {
        "version": SET_PROTOCOL_VERSION,
        "num_images": len(pair.fake),
        "sizes": options.sizes,
        "extractor": {**pair.extractor.describe(), "precision": pair.extractor.precision},
        "reference": reference,
        "captions": hashlib.sha256(words).hexdigest()[:16] if words is not None else None,
        "clip": pair.clip.describe() if pair.clip is not None else None,
        "long_captions": options.long_captions if pair.clip is not None else None,
        "seed": options.seed,
    }
    if "inception_score" in options.metrics:
        protocol["logits"] = "without bias"
    stamp: dict[str, Any] = json.loads(json.dumps({"protocol": protocol, "inference": {}}))
    return stamp


def save_statistics(
    images: str | Path | ImageSet, out: str | Path, options: SetOptions | None = None, *, share: Share | None = None
) -> int:
    """Write mean and covariance of a set's features as .npz, readable by other tools; return the number of pictures.

    Raises:
        As `evaluate_images`.
    """
    from mmdit_eval.moments import Moments

    options, share = options or SetOptions(), share or Share()
    check_place(Path(out))
    opened = _open(images, options, options.sizes)
    _check_counts(opened)
    extractor = load_extractor(options.extractor, weights=options.weights, precision=options.precision)
    found = features_of(opened, extractor, options, share)
    if found is not None:
        Moments.of(found[:, : extractor.width].astype(np.float64)).save(out, extractor.describe())
    return len(opened)


def features_of(images: ImageSet, extractor: Extractor, options: SetOptions, share: Share) -> np.ndarray | None:
    """Return features float32 [N, d + classes], in the first process; the others compute their part and get None."""
    with tqdm(total=len(images), unit=" images", disable=not (options.progress and share.first)) as bar:
        bar.set_description(f"{extractor.name} on {Path(images.source).name}")
        values, ids = extract_set(
            extractor,
            images,
            batch_size=options.batch_size,
            cache=options.cache,
            progress=bar.update,
            rank=share.rank,
            world=share.world,
        )
        gathered = share.gather(ids, [values], len(images))
    return gathered[0] if gathered is not None else None


def is_statistics(source: Any) -> bool:
    """Say whether a source is an .npz of `mu` and `sigma`."""
    if isinstance(source, ImageSet) or Path(source).suffix != ".npz" or not Path(source).is_file():
        return False
    try:
        return not {"mu", "sigma"}.isdisjoint(array_names(source))
    except ValueError:  # told where it is read as pictures
        return False


def set_digest(images: ImageSet) -> str:
    """Return a short hash of all pictures in their order."""
    digest = hashlib.sha256()
    for i in range(len(images)):
        digest.update(images.digest(i))
    return digest.hexdigest()[:16]


def _open(
    source: str | Path | ImageSet, options: SetOptions, sizes: str, caption_column: str | None = None
) -> ImageSet:
    if isinstance(source, ImageSet):
        return source
    return open_images(
        source, sizes=sizes, split=options.split, image_column=options.image_column, caption_column=caption_column
    )


def _captions(captions: str | Path | Sequence[str] | None, images: ImageSet) -> list[str] | None:
    if captions is None:
        return list(images.captions) if images.captions is not None else None
    if isinstance(captions, str | Path):
        return load_captions(captions, images)
    if len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} pictures of {images.source}")
    return list(captions)


def _check_counts(*sets: ImageSet) -> None:
    for images in sets:
        if len(images) < 2:
            raise ValueError(f"{images.source} has {len(images)} picture; a distance between sets needs at least 2")


def _check_extrapolation(extractor: Extractor, *sets: ImageSet) -> None:
    """Refuse before the networks run what the extrapolation would refuse after them."""
    needed, fewest = SPLITS * (extractor.width + 1), min(sets, key=len)
    if len(fewest) < needed:
        raise ValueError(
            f"frechet_infinity needs {needed:,} pictures a set for {extractor.width:,} features ({extractor.name}), "
            f"{fewest.source} has {len(fewest):,}; leave it out, or take kernel, which has no bias"
        )


def _clip_of(options: SetOptions, extractor: Extractor, metric: str) -> Extractor:
    clip = extractor if options.clip is None else load_extractor(options.clip, precision=options.precision)
    if clip.text is None:
        raise ValueError(
            f"{metric}: the extractor {clip.name!r} has no text tower; name one by --clip clip:FOLDER or "
            f"--clip openclip:NAME@FILE (tiny_clip knows shapes and emoji only)"
        )
    return clip


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _environment() -> dict[str, Any]:
    from mmdit_eval.suite import environment

    return environment()


def cache_folder(given: Path | None, kept: bool) -> Path | None:
    """Return the folder of the feature cache: the one given, the default one, or none."""
    return (given or default_cache()) if kept else None
