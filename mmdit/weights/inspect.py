"""What is in a file of weights, as a table: parts, family, dtypes, parameters, and what is missing or not known."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from mmdit.config import VAEConfig
from mmdit.encoders.autoencoder import AutoencoderKL
from mmdit.encoders.released import tower_config, tower_shapes
from mmdit.encoders.towers import build_tower
from mmdit.weights import text, vae
from mmdit.weights.denoiser import FOLDERS, find_sources, open_denoiser, stored_shapes
from mmdit.weights.detect import Detected, Part, detect
from mmdit.weights.empty import empty_denoiser
from mmdit.weights.files import WeightFiles, open_weights
from mmdit.weights.fit import Shapes
from mmdit.weights.text import ENCODERS
from mmdit.weights.text_files import TextPart

_SUBFOLDERS = (*FOLDERS, "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
_SHORT = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8_e4m3",
    torch.float8_e5m2: "fp8_e5m2",
}


@dataclass(frozen=True)
class Row:
    """One part of a file.

    Attributes:
        where: the folder of a pipeline it lies in, or its prefix.
        kind: layout and backbone.
        dtypes: of its tensors, with their counts.
        notes: what is missing, unexpected or of another shape, or that this was not compared.
    """

    name: str
    where: str
    kind: str
    tensors: int
    parameters: int
    nbytes: int
    dtypes: str
    notes: str


@dataclass(frozen=True)
class Inspection:
    """The table of a file or folder: `family` as `detect` says, None where it is not known."""

    path: Path
    family: str | None
    rows: tuple[Row, ...]


def inspect_weights(path: str | Path) -> Inspection:
    """Read the headers of a file, a sharded set or a diffusers pipeline's folders.

    Raises:
        FileNotFoundError, WeightsError: as `open_weights`.
    """
    path = Path(path)
    places = [path / name for name in _SUBFOLDERS if (path / name).is_dir()] if path.is_dir() else []
    rows: list[Row] = []
    family = None
    for place in places or [path]:
        files = open_weights(place)
        detected = detect(files)
        family = family or detected.family
        rows += _rows(files, detected, place.name if places else None)
    return Inspection(path, family, tuple(rows))


def _rows(files: WeightFiles, detected: Detected, folder: str | None) -> list[Row]:
    rows = []
    for part in detected.parts.values():
        kind = " ".join(filter(None, (part.layout if part.name in ("denoiser", "vae") else "", part.backbone)))
        notes = _fit(files, part)
        rows.append(_row(files, part.name, folder or part.prefix or "(no prefix)", kind, part.keys, notes))
    for name, keys in (("leftovers", detected.leftovers), ("not known", detected.unknown)):
        if keys:
            rows.append(_row(files, name, folder or "", "", keys, _first(keys)))
    return rows


def _row(files: WeightFiles, name: str, where: str, kind: str, keys: Iterable[str], notes: str) -> Row:
    keys = list(keys)
    counts = Counter(_SHORT.get(files.dtype(key), str(files.dtype(key)).removeprefix("torch.")) for key in keys)
    dtypes = ", ".join(f"{dtype} x {count}" if len(counts) > 1 else dtype for dtype, count in counts.most_common())
    parameters = sum(math.prod(files.shape(key)) for key in keys)
    return Row(name, where, kind, len(keys), parameters, sum(map(files.nbytes, keys)), dtypes, notes)


def _fit(files: WeightFiles, part: Part) -> str:
    """Compare a part with the network its shapes describe; the EMA's copy and ControlNets are not compared."""
    compared = {"denoiser": _denoiser_shapes, "vae": _vae_shapes} | dict.fromkeys(ENCODERS, _text_shapes)
    if part.name not in compared:
        return ""
    try:
        needed, there = compared[part.name](files, part)
    except ValueError as error:
        return str(error)
    faults = {
        "missing": [key for key in needed if key not in there],
        "unexpected": [key for key in there if key not in needed],
        "of another shape": [key for key in needed if there.get(key, needed[key]) != needed[key]],
    }
    return "; ".join(f"{len(keys)} {what}: {_first(keys)}" for what, keys in faults.items() if keys) or "complete"


def _denoiser_shapes(files: WeightFiles, part: Part) -> tuple[Shapes, Shapes]:
    """Return the shapes a network needs and those that are there, under the file's names."""
    opened, found, config = open_denoiser(files.path, part.prefix if part.layout == "original" else None)
    expected = empty_denoiser(config).state_dict()
    return stored_shapes(opened, found, expected, find_sources(expected, found, config))


def _vae_shapes(files: WeightFiles, part: Part) -> tuple[Shapes, Shapes]:
    """Return the shapes needed and there, under the original names."""
    there = {name: vae.original_shape(name, files.shape(key)) for name, key in vae.name_sources(files).items()}
    fields = vae.infer_fields(there, family="sd3")  # neither its scale nor its norm groups leave shapes
    with torch.device("meta"):
        network = AutoencoderKL(VAEConfig(**{**fields, "norm_groups": 1}))
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}, there


def _text_shapes(files: WeightFiles, part: Part) -> tuple[Shapes, Shapes]:
    """Return the shapes needed and there, under our names."""
    sources = text.name_sources(part.name, part.keys, part.prefix)
    found = TextPart(part.name, files, sources)
    heads = {} if part.name == "t5" else {"num_heads": 1}  # they leave no shapes
    with torch.device("meta"):
        projected = part.name == "clip_g" or text.PROJECTION in sources
        network = build_tower(part.name, tower_config(found, heads), projected=projected)
    return tower_shapes(network), found.shapes


def _first(keys: Iterable[str], count: int = 3) -> str:
    keys = list(keys)
    return ", ".join(keys[:count]) + (f" and {len(keys) - count} more" if len(keys) > count else "")


def print_inspection(inspection: Inspection) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    family = inspection.family or "not a released one"
    table = Table("part", "where", "layout", "tensors", "parameters", "MB", "dtypes")
    for row in inspection.rows:
        numbers = (f"{row.tensors:,}", f"{row.parameters:,}", f"{row.nbytes / 1e6:,.1f}")
        table.add_row(row.name, row.where, row.kind, *numbers, row.dtypes)
    print(f"{inspection.path}\nfamily: {family}")
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for row in inspection.rows:
        if row.notes:
            print(f"{row.name}: {row.notes}")
