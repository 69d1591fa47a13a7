"""The oracle: read pictures of shapes back into objects, and score them against what their captions said.

Reading: distance from the background -> connected components -> nearest palette colour of the core, up to its
coverage -> coverage mask -> the shape whose template of equal area and centroid overlaps best -> radius from the area.
Scoring: the best assignment of objects to the caption's slots; only mentioned attributes count. What cannot be read
counts as wrong and is reported apart as `unreadable`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from mmdit.data.shapes import COLOURS, SHAPES, Scene, mask, spacing_of

METRICS = ("colour", "shape", "size", "count", "relation", "late", "early", "all_correct", "unreadable")

_DISTANCE = 45.0  # least distance of an object's pixel from the background, of 441; noise of 10 / 255 stays below 40
_EDGE = 0.4  # part of the brightest neighbour's distance at which an object ends: parts blurred neighbours
_NEIGHBOURHOOD = 5  # pixels; objects lie 3 apart, so no pixel of one looks at another's
_SPECK = 10.0  # pixels; the smallest true object covers 39
_COLOUR_LIMIT = 70.0  # farther from every palette colour: unreadable
_OVERLAP_LIMIT = 0.6  # least intersection over union with the best template
_MAX_OBJECTS = 16  # more components than this is texture, not a scene
_PALETTE = np.array(list(COLOURS.values()), dtype=np.float64)


@dataclass(frozen=True)
class ReadObject:
    """One object as read: None where no colour or shape is near enough; centre and radius in pixels.

    Whether it is large depends on the scene that was asked for: the fuller, the smaller its objects.
    """

    colour: str | None
    shape: str | None
    x: float
    y: float
    radius: float
    overlap: float

    @property
    def readable(self) -> bool:
        return self.colour is not None and self.shape is not None


def read_scene(image: np.ndarray) -> list[ReadObject]:
    """Read a picture back into objects; an empty list where there are none or more than a scene can hold.

    Args:
        image: uint8 [64, 64, 3].
    """
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
        raise ValueError(f"the oracle reads one uint8 image [R, R, 3], got {image.dtype} {list(image.shape)}")
    pixels = image.astype(np.float64)
    background = np.median(pixels.reshape(-1, 3), axis=0)  # objects cover less than half of any scene
    offset = pixels - background
    distance = np.sqrt((offset**2).sum(axis=-1))
    brightest = ndimage.maximum_filter(distance, size=_NEIGHBOURHOOD)
    foreground = distance > np.maximum(_DISTANCE, _EDGE * brightest)
    labels, number = ndimage.label(foreground, structure=np.ones((3, 3)))
    if number == 0:
        return []
    areas = np.bincount(labels.ravel())[1:]
    kept = [label for label in range(1, number + 1) if areas[label - 1] >= _SPECK]
    if len(kept) > _MAX_OBJECTS:
        return []
    boxes = ndimage.find_objects(labels)
    return [_read_object(offset, background, distance, labels, label, boxes[label - 1]) for label in kept]


def _read_object(
    offset: np.ndarray,
    background: np.ndarray,
    distance: np.ndarray,
    labels: np.ndarray,
    label: int,
    box: tuple[slice, slice],
) -> ReadObject:
    """Read one component."""
    rows = slice(max(box[0].start - 3, 0), box[0].stop + 3)
    columns = slice(max(box[1].start - 3, 0), box[1].stop + 3)
    here = labels[rows, columns] == label
    near, far = offset[rows, columns], distance[rows, columns]

    core = here & (far >= 0.8 * np.quantile(far[here], 0.9))
    colour, error, direction = _nearest_colour(np.median(near[core], axis=0), background)
    # the part of each pixel that the object covers; its blurred rim lies up to 2 pixels outside the component
    reach = ndimage.binary_dilation(here, iterations=2, structure=np.ones((3, 3)))
    reach &= ~ndimage.binary_dilation((labels[rows, columns] > 0) & ~here, structure=np.ones((3, 3)))
    cover = np.where(reach, near @ direction / max(float(direction @ direction), 1.0), 0.0)
    if cover.max() <= 0.0:  # no palette colour lies in this direction, as in pictures of an untrained denoiser
        cover = here.astype(np.float64)

    area = float(cover.sum())
    weights = np.clip(cover, 0.0, 1.0)
    y, x = (float(c) + 0.5 for c in ndimage.center_of_mass(weights))  # pixel (0, 0) has its centre at 0.5, 0.5
    best = max((_overlap(weights, shape, area, x, y) for shape in SHAPES), key=lambda found: found[0])
    overlap, shape, radius, (x, y) = best
    return ReadObject(
        colour=colour if error <= _COLOUR_LIMIT else None,
        shape=shape if overlap >= _OVERLAP_LIMIT else None,
        x=x + columns.start,
        y=y + rows.start,
        radius=radius,
        overlap=overlap,
    )


def _nearest_colour(offset: np.ndarray, background: np.ndarray) -> tuple[str, float, np.ndarray]:
    """Find the palette colour nearest to a core pixel, which blur may have mixed with up to 40 % background.

    Returns:
        (name, remaining distance, palette colour minus background).
    """
    directions = _PALETTE - background
    share = np.clip((directions @ offset) / np.maximum((directions**2).sum(axis=1), 1.0), 0.6, 1.05)
    errors = np.sqrt(((offset - share[:, None] * directions) ** 2).sum(axis=1))
    best = int(errors.argmin())
    return tuple(COLOURS)[best], float(errors[best]), directions[best]


@cache
def _unit(shape: str) -> tuple[float, float, float]:
    """Area of a shape of radius 1, and its centroid relative to its centre, measured on a large mask."""
    cover = mask(shape, 60.0, 0.0, 0.0).astype(np.float64)
    y, x = ndimage.center_of_mass(cover)
    half = cover.shape[0] // 2
    return float(cover.sum()) / 3600.0, (x + 0.5 - half) / 60.0, (y + 0.5 - half) / 60.0


@lru_cache(maxsize=32_768)
def _template(shape: str, radius: float, dx: float, dy: float, blurred: bool) -> np.ndarray:
    cover = np.pad(mask(shape, radius, dx, dy), 2).astype(np.float64)
    return ndimage.gaussian_filter(cover, 1.0) if blurred else cover


def _overlap(
    cover: np.ndarray, shape: str, area: float, x: float, y: float
) -> tuple[float, str, float, tuple[float, float]]:
    """Intersection over union with a template of equal area and centroid, sharp or blurred, whichever is better.

    Returns:
        (overlap, shape, radius, (x, y) of the shape's centre within `cover`).
    """
    unit_area, unit_x, unit_y = _unit(shape)
    radius = float(np.sqrt(max(area, 1.0) / unit_area))
    x, y = x - unit_x * radius, y - unit_y * radius
    near_x, near_y = round(4 * x) / 4, round(4 * y) / 4  # quarter pixels keep the number of templates small
    column, row = int(np.floor(near_x)), int(np.floor(near_y))
    best = 0.0
    for blurred in (False, True):
        template = _template(shape, max(round(4 * radius) / 4, 0.5), near_x - column, near_y - row, blurred)
        half = template.shape[0] // 2
        top, left = row - half, column - half
        inside = template[max(-top, 0) : max(cover.shape[0] - top, 0), max(-left, 0) : max(cover.shape[1] - left, 0)]
        window = cover[max(top, 0) : max(top, 0) + inside.shape[0], max(left, 0) : max(left, 0) + inside.shape[1]]
        both = float(np.minimum(window, inside).sum())
        union = float(cover.sum() + template.sum()) - both
        best = max(best, both / union if union > 0 else 0.0)
    return best, shape, radius, (x, y)


# --- scoring ----------------------------------------------------------------------------------------------------


def _size(found: ReadObject, scene: Scene) -> str:
    """Say whether an object is small or large for a scene of so many objects."""
    space = spacing_of(len(scene.objects))
    return "small" if found.radius < (space.small[1] + space.large[0]) / 2 else "large"


def _mistakes(found: ReadObject, scene: Scene, slot: int) -> float:
    wanted = scene.objects[slot]
    size = 0.5 if wanted.size_mentioned and _size(found, scene) != wanted.size else 0.0
    return float(found.colour != wanted.colour) + float(found.shape != wanted.shape) + size


def _stands(first: ReadObject, second: ReadObject, relation: str) -> bool:
    """Say whether the relation holds: order of the centres on the axis along which they are farther apart."""
    dx, dy = second.x - first.x, second.y - first.y
    return bool(dx > abs(dy)) if relation == "left" else bool(dy > abs(dx))


def _assign(found: Sequence[ReadObject], scene: Scene) -> dict[int, ReadObject]:
    """Give slots the objects that fit them with the fewest mistakes; in a pair, ties go to the true relation."""
    slots = range(len(scene.objects))
    if not found:
        return {}
    if scene.relation is not None and len(found) >= 2:

        def cost(chosen: Sequence[ReadObject]) -> tuple[float, bool]:
            total = sum(_mistakes(item, scene, slot) for slot, item in enumerate(chosen))
            return total, not _stands(chosen[0], chosen[1], str(scene.relation))

        best = min(itertools.permutations(found, 2), key=cost)
        return {0: best[0], 1: best[1]}
    costs = np.array([[_mistakes(item, scene, slot) for item in found] for slot in slots])
    rows, columns = linear_sum_assignment(costs)
    return {int(row): found[int(column)] for row, column in zip(rows, columns, strict=True)}


def score_image(image: np.ndarray, scene: Scene, long_caption: bool = False) -> dict[str, Any]:
    """Score one picture against its scene.

    Args:
        image: uint8 [64, 64, 3].
        long_caption: the caption was `scene.long()`, so accuracy on early and late objects is reported apart.

    Returns:
        colour, shape, size: every slot right (size: among slots whose size was mentioned; None where none was).
        count: as many objects as the scene has. relation: None outside pairs; False where an object is missing.
        late, early: all late (early) objects have their colour, shape and mentioned size; None for short captions.
        all_correct: every one of the first five that applies. unreadable: nothing found, or a thing that is no
        known colour or shape. Besides: objects (found), expected, heldout_kind, kind.
    """
    found = read_scene(image)
    chosen = _assign(found, scene)
    right: list[dict[str, bool | None]] = []
    for slot, wanted in enumerate(scene.objects):
        item = chosen.get(slot)
        right.append(
            {
                "colour": item is not None and item.colour == wanted.colour,
                "shape": item is not None and item.shape == wanted.shape,
                "size": (item is not None and _size(item, scene) == wanted.size) if wanted.size_mentioned else None,
            }
        )
    relation: bool | None = None
    if scene.relation is not None:
        relation = len(chosen) == 2 and _stands(chosen[0], chosen[1], scene.relation)
    result: dict[str, Any] = {
        "colour": _all(slot["colour"] for slot in right),
        "shape": _all(slot["shape"] for slot in right),
        "size": _all(slot["size"] for slot in right),
        "count": len(found) == len(scene.objects),
        "relation": relation,
    }
    # None means "does not apply"; anything else must be true (comparing with `is False` lets numpy's bools through)
    result["all_correct"] = all(value is None or bool(value) for value in result.values())
    whole = [_all(slot.values()) for slot in right]
    late = scene.late
    result["late"] = _all(whole[slot] for slot in late) if long_caption else None
    result["early"] = _all(w for slot, w in enumerate(whole) if slot not in late) if long_caption else None
    result["unreadable"] = not found or not all(item.readable for item in found)
    result.update(objects=len(found), expected=len(scene.objects), kind=scene.kind, heldout_kind=scene.heldout_kind)
    return result


def _all(values: Any) -> bool | None:
    """Say whether all that apply are true; None where none applies."""
    applying = [bool(value) for value in values if value is not None]
    return all(applying) if applying else None


def summarise(per_image: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | int]]:
    """Average per-image results: {metric: {"value": in [0, 1], "n": images to which it applies}}."""
    summary = {}
    for metric in METRICS:
        applying = [bool(result[metric]) for result in per_image if result[metric] is not None]
        if applying:
            summary[metric] = {"value": float(np.mean(applying)), "n": len(applying)}
    return summary


def score_composition(
    images: np.ndarray, scenes: Sequence[Scene], long_captions: bool | Sequence[bool] = False
) -> dict[str, Any]:
    """Score pictures against the scenes whose captions they were made from.

    Args:
        images: uint8 [N, 64, 64, 3].
        scenes: N scenes.
        long_captions: whether the captions were the long ones, for all or one by one.

    Returns:
        {"per_image": N results of `score_image`, "summary": `summarise` of all, "by_heldout_kind": {kind: summary},
        "by_kind": {scene kind: summary}}.
    """
    if len(images) != len(scenes):
        raise ValueError(f"{len(images)} images for {len(scenes)} scenes")
    long_form = [long_captions] * len(scenes) if isinstance(long_captions, bool) else list(long_captions)
    per_image = [
        score_image(image, scene, bool(is_long))
        for image, scene, is_long in zip(images, scenes, long_form, strict=True)
    ]
    return {
        "per_image": per_image,
        "summary": summarise(per_image),
        "by_heldout_kind": _by(per_image, "heldout_kind"),
        "by_kind": _by(per_image, "kind"),
    }


def _by(per_image: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    names = sorted({result[key] for result in per_image if result[key] is not None})
    return {name: summarise([result for result in per_image if result[key] == name]) for name in names}
