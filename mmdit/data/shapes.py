"""Procedural scenes with exact ground truth: coloured shapes, counts and relations, 64 px.

A scene is a pure function of (seed, split, index). Captions say less than the scene holds (sizes are mentioned only
sometimes), and a scene records what its caption said, so that the oracle in `mmdit_eval.composition` scores nothing
else. Two kinds of combinations never occur in training and make up the split `heldout`:

- `binding`: a (colour, shape) that no training scene contains, although its colour and its shape each occur often;
- `pair`: one tenth of all (object, relation, object) triples, chosen by hash, their objects each known from training.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from mmdit import rng
from mmdit.config import ShapesConfig
from mmdit.data import captions as words

SPLITS: tuple[str, ...] = ("train", "val", "seen", "heldout")

RESOLUTION = 64  # R, pixels
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (224, 36, 44),
    "orange": (255, 138, 16),
    "yellow": (252, 228, 50),
    "green": (38, 170, 62),
    "cyan": (70, 214, 226),
    "blue": (44, 88, 246),
    "purple": (164, 58, 206),
    "white": (246, 246, 246),
}
BACKGROUND = (12, 12, 12)
GAP = 3.0  # pixels between the boxes of two objects: scenes whose objects touch cannot be read back
MARGIN = 0.5  # pixels between an object's box and the border
DOMINANCE = 6.0  # pixels by which a relation's axis exceeds the other one

# colours and shapes whose combination training never shows; each colour and each shape stands in it at most once
HELDOUT_BINDINGS: frozenset[tuple[str, str]] = frozenset(
    {("red", "star"), ("blue", "circle"), ("green", "cross"), ("yellow", "square")}
)
EVALUATION_SCENES = 10_000  # length of val, seen and heldout; they are drawn on demand and cost nothing
_VERSION = 4  # raise whenever a scene, its picture or its caption changes


class Spacing(NamedTuple):
    """How large objects are and where they may stand: radius from and to, and the lattice of centres, in pixels."""

    small: tuple[float, float]
    large: tuple[float, float]
    lattice: float


# A denoiser learns one and two objects in minutes because they are large and their centres lie on corners of the 8 x 8
# pixels that one latent stands for, so that a shape has few codes. After 40,000 images a U-Net got 45 % of such scenes
# right, 11 % with centres anywhere, 5 % with objects of 6 and 9 pixels (tried, one run each, files not kept).
ROOMY = Spacing(small=(7.5, 7.5), large=(13.0, 13.0), lattice=8.0)
CROWDED = Spacing(small=(5.5, 6.5), large=(8.75, 9.5), lattice=0.125)


def spacing_of(number: int) -> Spacing:
    """Return the sizes and places of scenes of `number` objects."""
    return ROOMY if number <= 2 else CROWDED


def _star() -> list[tuple[float, float]]:
    points = []
    for k in range(10):
        radius = 1.0 if k % 2 == 0 else 0.44
        points.append((radius * math.sin(k * math.pi / 5), -radius * math.cos(k * math.pi / 5)))
    return points


# outlines in a box of [-1, 1]², y down; the circle is drawn as an ellipse
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": [(0.92 * math.cos(k * math.pi / 32), 0.92 * math.sin(k * math.pi / 32)) for k in range(64)],
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0.0, -0.92), (1.0, 0.82), (-1.0, 0.82)],
    "star": _star(),
    "cross": [
        (-0.32, -0.96), (0.32, -0.96), (0.32, -0.32), (0.96, -0.32), (0.96, 0.32), (0.32, 0.32),
        (0.32, 0.96), (-0.32, 0.96), (-0.32, 0.32), (-0.96, 0.32), (-0.96, -0.32), (-0.32, -0.32),
    ],
    "diamond": [(0.0, -1.0), (0.86, 0.0), (0.0, 1.0), (-0.86, 0.0)],
}  # fmt: skip
SHAPES: tuple[str, ...] = tuple(_OUTLINES)


@dataclass(frozen=True)
class SceneObject:
    """One object: what it is, where its centre lies (pixels, y down), its radius (pixels), what the caption says."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float
    size_mentioned: bool


@dataclass(frozen=True)
class Scene:
    """Ground truth of one picture.

    Attributes:
        kind: single | pair (two objects and their relation) | count (n equal objects) | list (several groups).
        objects: in a pair, objects[0] is the left one or the upper one.
        relation: "left" or "above" (objects[0] with respect to objects[1]); None outside pairs. "right" and "below"
            are the other wording of the same scene.
        heldout_kind: None in train, val, seen; else "pair" or "binding".
        wording: 0 names objects[0] first, 1 names objects[1] first; which one `short()` uses.
    """

    index: int
    kind: str
    objects: tuple[SceneObject, ...]
    relation: str | None
    heldout_kind: str | None
    wording: int
    filler: int  # keys the filler clauses of the long caption

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Indices of equal objects (colour, shape), in the order they are named."""
        found: dict[tuple[str, str], list[int]] = {}
        for i, item in enumerate(self.objects):
            found.setdefault((item.colour, item.shape), []).append(i)
        return tuple(tuple(group) for group in found.values())

    @property
    def late(self) -> tuple[int, ...]:
        """Indices of objects that the long caption describes only after CLIP's 77th token."""
        return words.late_objects(self)

    def short(self, wording: int | None = None) -> str:
        """Return the caption in one phrase: "a small red circle left of a blue square"."""
        return words.short_caption(self, self.wording if wording is None else wording)

    def long(self) -> str:
        """Return the caption in several sentences; the objects in `late` are described only at its end."""
        return words.long_caption(self)


def pair_is_heldout(first: tuple[str, str], relation: str, second: tuple[str, str]) -> bool:
    """Say whether (colour, shape) left of | above (colour, shape) is one of the tenth kept out of training."""
    key = "|".join((*first, relation, *second)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") % 10 == 0


def draw_scene(seed: int, index: int, split: str, max_objects: int = 2) -> Scene:
    """Return scene `index` of a split: a pure function of its arguments.

    Args:
        max_objects: 1 draws single objects; 2 draws single objects (a quarter) and pairs; 3 to 6 add counts and lists.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of shapes; known: {', '.join(SPLITS)}")
    # SPLITS' position as `step` gives each split its own stream of scenes
    random = rng.generator(seed, "data", index, step=SPLITS.index(split))
    heldout = None
    if split == "heldout":
        heldout = "binding" if max_objects == 1 or random.random() < 0.5 else "pair"
    if max_objects == 1:
        kind = "single"
    elif heldout == "pair":
        kind = "pair"
    elif max_objects == 2:
        kind = ("single", "pair", "pair", "pair")[int(random.integers(4))]
    else:
        kind = ("single", "pair", "count", "list")[int(random.integers(4))]

    relation: str | None = None
    if kind == "pair":
        relation = ("left", "above")[int(random.integers(2))]
        while True:
            first, second = _look(random), _look(random)
            if heldout == "binding":  # one object new, the other known
                new = tuple(sorted(HELDOUT_BINDINGS))[int(random.integers(len(HELDOUT_BINDINGS)))]
                first, second = (new, second) if random.random() < 0.5 else (first, new)
            if first == second or (pair_is_heldout(first, relation, second) != (heldout == "pair")):
                continue
            break
        looks = [first, second]
    else:
        groups = int(random.integers(2, 4)) if kind == "list" else 1
        total = {"single": 1, "count": int(random.integers(2, max(max_objects, 2) + 1))}.get(kind, 0)
        if kind == "list":
            total = int(random.integers(max(3, groups), max_objects + 1))
        distinct: list[tuple[str, str]] = []
        while len(distinct) < groups:
            look = _look(random)
            if look not in distinct:
                distinct.append(look)
        if heldout == "binding":
            new = tuple(sorted(HELDOUT_BINDINGS))[int(random.integers(len(HELDOUT_BINDINGS)))]
            distinct[int(random.integers(groups))] = new
        counts = [1] * groups
        for _ in range(total - groups):
            counts[int(random.integers(groups))] += 1
        looks = [look for look, count in zip(distinct, counts, strict=True) for _ in range(count)]

    chosen: dict[tuple[str, str], tuple[str, bool]] = {}
    for look in looks:  # equal objects are equally large: "three small red circles"
        if look not in chosen:
            chosen[look] = (("small", "large")[int(random.integers(2))], bool(random.random() < 0.5))
    space = spacing_of(len(looks))
    radius_of = {look: _eighth(random.uniform(*getattr(space, size))) for look, (size, _) in chosen.items()}
    radii = [radius_of[look] for look in looks]
    centres = _place(random, radii, relation, space.lattice)
    objects = tuple(
        SceneObject(look[0], look[1], chosen[look][0], x, y, radius, chosen[look][1])
        for look, radius, (x, y) in zip(looks, radii, centres, strict=True)
    )
    return Scene(
        index=index,
        kind=kind,
        objects=objects,
        relation=relation,
        heldout_kind=heldout,
        wording=int(random.integers(2)),
        filler=int(random.integers(2**31)),
    )


def _look(random: np.random.Generator) -> tuple[str, str]:
    """Draw a (colour, shape) that training may show."""
    while True:
        look = tuple(COLOURS)[int(random.integers(len(COLOURS)))], SHAPES[int(random.integers(len(SHAPES)))]
        if look not in HELDOUT_BINDINGS:
            return look


def _eighth(value: float) -> float:
    """Round to eighths of a pixel: coarse enough to keep drawn masks."""
    return round(8 * value) / 8


def _place(
    random: np.random.Generator, radii: Sequence[float], relation: str | None, lattice: float
) -> list[tuple[float, float]]:
    """Draw centres whose boxes keep their distance; two always stand left and right or above and below each other."""
    if len(radii) == 2:
        axis = relation or ("left", "above")[int(random.integers(2))]
        return _place_pair(random, (radii[0], radii[1]), axis, lattice)
    for _ in range(60):
        centres = [(_coordinate(random, r, lattice), _coordinate(random, r, lattice)) for r in radii]
        if _apart(centres, radii):
            return centres
    return _grid(random, radii)


def _place_pair(
    random: np.random.Generator, radii: tuple[float, float], relation: str, lattice: float
) -> list[tuple[float, float]]:
    """Draw two centres: along the relation's axis they share what room is left, across it they stand freely."""
    first, second = (_edge(radius, lattice) for radius in radii)
    apart = lattice * math.ceil((sum(radii) + GAP) / lattice)
    room = int((RESOLUTION - first - second - apart) // lattice)
    before, after = sorted(random.integers(0, room + 1, 2).tolist())
    along = first + lattice * before, first + apart + lattice * after
    while True:
        across = _coordinate(random, radii[0], lattice), _coordinate(random, radii[1], lattice)
        if along[1] - along[0] >= abs(across[1] - across[0]) + DOMINANCE:
            break
    centres = list(zip(along, across, strict=True))
    return centres if relation == "left" else [(y, x) for x, y in centres]


def _edge(radius: float, lattice: float) -> float:
    """Return the least coordinate of a centre; the largest is as far from the other border."""
    return lattice * math.ceil((radius + MARGIN) / lattice)


def _coordinate(random: np.random.Generator, radius: float, lattice: float) -> float:
    """Draw a coordinate of a centre anywhere within the picture."""
    edge = _edge(radius, lattice)
    return edge + lattice * int(random.integers(0, int((RESOLUTION - 2 * edge) // lattice) + 1))


def _apart(centres: Sequence[tuple[float, float]], radii: Sequence[float]) -> bool:
    """Say whether all boxes are at least GAP pixels apart."""
    for i, (x, y) in enumerate(centres):
        for j in range(i):
            needed = radii[i] + radii[j] + GAP
            if abs(x - centres[j][0]) < needed and abs(y - centres[j][1]) < needed:
                return False
    return True


def _grid(random: np.random.Generator, radii: Sequence[float]) -> list[tuple[float, float]]:
    """Place objects where random tries failed: in a shuffled 3 x 3 grid."""
    lines = (10.0, 32.0, 54.0)  # 22 pixels apart: two of the largest radius keep their gap
    cells = random.permutation(9)[: len(radii)].tolist()
    shake = random.uniform(-1, 1, (len(radii), 2)).tolist()
    room = [CROWDED.large[1] - radius for radius in radii]
    return [
        (_eighth(lines[cell % 3] + r * u), _eighth(lines[cell // 3] + r * v))
        for cell, r, (u, v) in zip(cells, room, shake, strict=True)
    ]


@lru_cache(maxsize=16_384)
def mask(shape: str, radius: float, dx: float, dy: float) -> np.ndarray:
    """Draw one shape's coverage, float32 in [0, 1], [S, S] with S = 2 ceil(radius) + 3.

    Args:
        radius: pixels; the outline lies in a box of this half-width.
        dx, dy: pixels from the middle pixel's corner to the centre, in [0, 1).
    """
    side, scale = 2 * math.ceil(radius) + 3, 8  # 8 x 8 samples a pixel
    canvas = Image.new("L", (side * scale, side * scale), 0)
    centre = side // 2
    outline = [
        ((centre + dx + radius * u) * scale - 0.5, (centre + dy + radius * v) * scale - 0.5)
        for u, v in _OUTLINES[shape]
    ]
    ImageDraw.Draw(canvas).polygon(outline, fill=255)
    return np.asarray(canvas.reduce(scale), dtype=np.float32) / np.float32(255)


def render(scene: Scene) -> np.ndarray:
    """Draw a scene, antialiased: uint8 [64, 64, 3]."""
    pad = 2
    image = np.empty((RESOLUTION + 2 * pad, RESOLUTION + 2 * pad, 3), dtype=np.float32)
    image[:] = BACKGROUND
    for item in scene.objects:
        column, row = math.floor(item.x), math.floor(item.y)
        cover = mask(item.shape, item.radius, item.x - column, item.y - row)
        half = cover.shape[0] // 2
        top, left = row - half + pad, column - half + pad
        window = image[top : top + cover.shape[0], left : left + cover.shape[1]]
        window += cover[..., None] * (np.asarray(COLOURS[item.colour], dtype=np.float32) - window)
    return (image[pad:-pad, pad:-pad] + np.float32(0.5)).astype(np.uint8)


class ShapesDataset:
    """Scenes of one split, drawn on demand.

    `train`, `val` and `seen` share their combinations, and pictures too: of single objects there are but 3,256, of
    pairs over a million. `heldout` holds held-out combinations only, so none of its pictures is in `train`.
    """

    def __init__(self, config: ShapesConfig, split: str = "train") -> None:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r} of shapes; known: {', '.join(SPLITS)}")
        self.config = config
        self.split = split
        self._scene = lru_cache(maxsize=65_536)(self._draw)

    def __len__(self) -> int:
        return self.config.num_images if self.split == "train" else EVALUATION_SCENES

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides pixels and captions."""
        key = f"shapes|{_VERSION}|{self.split}|{len(self)}|{self.config.model_dump_json()}"
        return hashlib.sha256(key.encode()).hexdigest()[:32]

    def _draw(self, index: int) -> Scene:
        return draw_scene(self.config.seed, index, self.split, self.config.max_objects)

    def scene(self, index: int) -> Scene:
        """Return the ground truth of item `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} of a split of {len(self)}")
        return self._scene(int(index))

    def scenes(self, indices: Sequence[int] | np.ndarray) -> list[Scene]:
        """Return the ground truth of several items."""
        return [self.scene(int(i)) for i in indices]

    def pixels(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Draw items: uint8 [B, 64, 64, 3]."""
        if len(indices) == 0:
            return np.empty((0, RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
        return np.stack([render(self.scene(int(i))) for i in indices])

    def long_form(self, index: int) -> bool:
        """Say whether item `index` has the long caption; with `captions: both`, one in two has."""
        if self.config.captions == "both":
            return bool(self.scene(index).filler % 2)
        return self.config.captions == "long"

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """Return the captions of items, in the form the config asks for."""
        out = []
        for i in indices:
            scene = self.scene(int(i))
            out.append(scene.long() if self.long_form(int(i)) else scene.short())
        return out
