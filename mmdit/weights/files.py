"""Files of weights, opened without being read: one .safetensors file, a sharded set, a diffusers folder.

    files = open_weights("sd3_medium.safetensors")
    files.shape("model.diffusion_model.pos_embed")             # from the header alone
    files.read_into("first_stage_model.encoder.conv_in.weight", parameter.data)

Every header is checked first (`mmdit.weights.header`), so a bad file is refused before anything is built. Tensors are
read one by one with plain reads into their destination, converted in pieces of 4 MiB: no mapped pages count towards
the process, so loading costs the memory of what is loaded and little more.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdit.registry import nearest
from mmdit.untrusted import read_json
from mmdit.weights.header import PICKLES, Entry, WeightsError, pickle_error, read_header

__all__ = ["WeightFiles", "WeightsError", "open_weights"]

SUFFIX = ".safetensors"
DTYPES = {  # by the format's names
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
STANDARD = ("diffusion_pytorch_model", "model")  # the names diffusers and transformers give
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<variant>\.\w+)?")  # without .safetensors
_PIECE = 1 << 22  # bytes read at once where they are converted
_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")  # beside a scaled fp8 weight


class WeightFiles:
    """Tensors on disk by name; headers are in memory, tensors are not.

    Attributes:
        path: what was opened, as given.
        files: the .safetensors files behind it.
        metadata: of the first file's header.
    """

    def __init__(self, path: str | Path, files: Sequence[Path]) -> None:
        self.path, self.files = Path(path), tuple(files)
        self.metadata: dict[str, str] = {}
        self._entries: dict[str, Entry] = {}
        for file in reversed(self.files):
            entries, self.metadata = read_header(file)
            twice = next((key for key in entries if key in self._entries), None)
            if twice is not None:
                raise WeightsError(f"{twice!r} is in {file} and in {self._entries[twice].file.name}; keep one of them")
            self._entries = {**entries, **self._entries}

    def keys(self) -> list[str]:
        """Return the names of all tensors, in the files' order."""
        return list(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"WeightFiles({str(self.path)!r}, {len(self)} tensors in {len(self.files)} file(s))"

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._entry(key).shape

    def dtype(self, key: str) -> torch.dtype:
        """Return a tensor's dtype as it is stored."""
        return DTYPES[self._entry(key).dtype]

    def nbytes(self, key: str) -> int:
        """Return a tensor's bytes on disk."""
        entry = self._entry(key)
        return entry.stop - entry.start

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The config.json beside the files, None where there is none.

        Raises:
            WeightsError: it is there and is not a table in JSON.
        """
        file = self.files[0].parent / "config.json"
        return _read_json(file) if file.is_file() else None

    def read(self, key: str, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        """Read one tensor; by default in its stored dtype, on the CPU.

        Raises:
            WeightsError: no such tensor, the file has changed since it was opened, or a scaled fp8 weight.
        """
        target = torch.empty(self.shape(key), dtype=dtype or self.dtype(key), device=device or "cpu")
        return self.read_into(key, target)

    def read_into(self, key: str, target: Tensor) -> Tensor:
        """Read one tensor into `target` of the same shape, converting to its dtype, and return it.

        Raises:
            WeightsError: as `read`; or the shapes differ.
        """
        entry, stored = self._entry(key), self.dtype(key)
        if tuple(target.shape) != entry.shape:
            raise WeightsError(f"{key!r} is {list(entry.shape)} in {entry.file}, expected {list(target.shape)}")
        if target.is_floating_point() and not stored.is_floating_point:
            raise WeightsError(
                f"{entry.file} holds {key!r} as whole numbers ({stored}): weights quantised to int8 or uint8 are not "
                f"read; use the fp16 or bf16 file of the release"
            )
        self.refuse_scaled([key])
        if not target.is_contiguous():
            target.copy_(self.read(key, target.dtype))
            return target
        flat = target.detach().view(-1)
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.start)
            if target.dtype == stored and target.device.type == "cpu":
                _fill(file, flat, entry)
                return target
            step = _PIECE // stored.itemsize
            if flat.numel() == 0:
                return target
            # pages of its own: taken from the heap, it left holes between the weights of half their size
            pages = mmap.mmap(-1, min(step, flat.numel()) * stored.itemsize)
            piece = torch.frombuffer(pages, dtype=stored)
            for start in range(0, flat.numel(), step):
                part = piece[: min(step, flat.numel() - start)]
                _fill(file, part, entry)
                flat[start : start + len(part)].copy_(part)
        return target

    def refuse_scaled(self, keys: Sequence[str]) -> None:
        """Refuse fp8 weights that are stored with a scale: without it their numbers are wrong.

        Raises:
            WeightsError: one of `keys` is an fp8 tensor with a scale beside it, or the file says so of all.
        """
        for key in keys:
            if self.dtype(key) not in (torch.float8_e4m3fn, torch.float8_e5m2):
                continue
            stem = key.rpartition(".")[0]
            scale = next((name for name in _SCALES if f"{stem}.{name}" in self._entries), None)
            if scale is not None:
                raise WeightsError(
                    f"{self.path} holds {key!r} as scaled fp8 (its scale is {stem}.{scale}); only unscaled fp8 is "
                    f"read: use the fp16 or bf16 file, or the plain fp8_e4m3fn one"
                )

    def _entry(self, key: str) -> Entry:
        if key not in self._entries:
            guess = nearest(key, self._entries)
            hint = f"; did you mean {guess!r}?" if guess else ""
            raise WeightsError(f"{self.path} has no tensor {key!r}{hint}")
        return self._entries[key]


def open_weights(path: str | Path, subfolders: Sequence[str] = ()) -> WeightFiles:
    """Open weights by path, reading and checking headers only.

    Args:
        path: a .safetensors file; a sharded set's `*.safetensors.index.json`; or a folder that holds either.
        subfolders: names tried in this order below `path` where the folder itself holds no weights, such as
            ("transformer", "unet") for a diffusers pipeline.

    Raises:
        FileNotFoundError: nothing there, or a shard of the set is missing.
        WeightsError: a damaged file, a pickle, one shard of a set, or a folder in which the choice is not clear.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, subfolders)
    if path.name.endswith(".json"):
        return WeightFiles(path, _indexed(path))
    if path.suffix in PICKLES and path.is_file():
        raise pickle_error(path)
    shard = SHARD.fullmatch(path.name.removesuffix(SUFFIX))
    if shard and int(shard["count"]) > 1 and path.is_file():
        raise WeightsError(
            f"{path} is part {int(shard['number'])} of {int(shard['count'])} of a sharded set; give the folder, or "
            f"{shard['stem']}{SUFFIX}.index.json"
        )
    if not path.exists():
        raise FileNotFoundError(f"no file or folder {path}{_near(path)}")
    return WeightFiles(path, [path])


def _open_folder(folder: Path, subfolders: Sequence[str]) -> WeightFiles:
    parts = [folder / name for name in subfolders]
    pipeline = (folder / "model_index.json").is_file()  # diffusers': its parts lie in folders, whatever else is there
    ambiguous = {}
    for place in [*parts, folder] if pipeline else [folder, *parts]:
        sets = _sets(place) if place.is_dir() else {}
        if len(sets) > 1:
            sets = {stem: files for stem, files in sets.items() if stem in STANDARD} or sets
        if len(sets) == 1:
            return WeightFiles(folder, next(iter(sets.values())))
        ambiguous.update({place: sets} if sets else {})
    for place, sets in ambiguous.items():
        raise WeightsError(f"{place} holds {len(sets)} sets of weights ({', '.join(sorted(sets))}); give one's path")
    pickles = sorted(file for file in folder.rglob("*") if file.suffix in PICKLES)
    if pickles:
        raise pickle_error(pickles[0])
    below = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and any(entry.glob(f"*{SUFFIX}")))
    hint = f"; its folders {', '.join(below)} do: give one of them" if below else ""
    tried = f" nor do {', '.join(subfolders)} below it" if subfolders else ""
    raise FileNotFoundError(f"{folder} holds no .safetensors file{tried}{hint}")


def _sets(folder: Path) -> dict[str, list[Path]]:
    """Group the weights of a folder: {stem: files}, shards together, in order.

    Raises:
        FileNotFoundError: a set is not complete.
    """
    indices = sorted(file for file in folder.glob("*.json") if f"{SUFFIX}.index" in file.name)
    sets = {index.name.partition(SUFFIX)[0] + _variant(index): _indexed(index) for index in indices}
    listed = {file for files in sets.values() for file in files}
    loose: dict[str, dict[int, Path]] = {}
    counts: dict[str, int] = {}
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        shard = SHARD.fullmatch(file.name.removesuffix(SUFFIX))
        if file in listed:
            continue
        if shard is None:
            sets[file.name.removesuffix(SUFFIX)] = [file]
        else:
            stem = shard["stem"] + (shard["variant"] or "")
            loose.setdefault(stem, {})[int(shard["number"])] = file
            counts[stem] = int(shard["count"])
    for stem, files in loose.items():
        missing = [number for number in range(1, counts[stem] + 1) if number not in files]
        if missing:
            raise FileNotFoundError(
                f"{folder} holds {len(files)} of the {counts[stem]} parts of {stem}; missing: part "
                f"{', '.join(map(str, missing))}. Download them, and {stem}{SUFFIX}.index.json"
            )
        sets[stem] = list(files.values())
    return sets


def _variant(index: Path) -> str:
    """Return `.fp16` of `model.safetensors.index.fp16.json`, else nothing."""
    return index.name.partition(f"{SUFFIX}.index")[2].removesuffix(".json")


def _indexed(index: Path) -> list[Path]:
    """Return the files of a sharded set, by its index."""
    if not index.is_file():
        raise FileNotFoundError(f"no index {index}{_near(index)}")
    table = _read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise WeightsError(f"{index} has no weight_map from tensor to file; download it again")
    names = sorted(set(table.values()))
    strange = [name for name in names if Path(name).name != name or not name.endswith(SUFFIX)]
    if strange:
        raise WeightsError(f"{index} names {strange[0]!r}; every part must be a .safetensors file beside the index")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index.parent} lacks {len(missing)} of the {len(names)} parts that {index.name} lists: "
            f"{', '.join(missing)}; download them"
        )
    files = [index.parent / name for name in names]
    _check_index(index, table, files)
    return files


def _check_index(index: Path, table: Mapping[str, str], files: Sequence[Path]) -> None:
    held = {key: file.name for file in files for key in read_header(file)[0]}
    wrong = [key for key, name in table.items() if held.get(key) != name]
    if wrong:
        raise WeightsError(
            f"{index} and its parts do not belong together: {len(wrong)} tensors are not where it says, first "
            f"{wrong[0]!r} in {table[wrong[0]]}; download the set again"
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        table = read_json(file)
    except ValueError as error:
        raise WeightsError(f"{error}; download it again") from error
    if not isinstance(table, dict):
        raise WeightsError(f"{file} is a {type(table).__name__}, not a table; download it again")
    return table


def _near(path: Path) -> str:
    """Name the most similar neighbour of a path that is not there."""
    there = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    guess = nearest(path.name, there)
    return f"; did you mean {path.parent / guess}?" if guess else ""


def _fill(file: Any, target: Tensor, entry: Entry) -> None:
    """Fill a contiguous CPU tensor from the file's position."""
    if target.numel() == 0:
        return
    view = memoryview(target.view(torch.uint8).numpy())
    while view:
        count = file.readinto(view)
        if not count:
            raise WeightsError(f"{entry.file} has become shorter since it was opened; is it being written?")
        view = view[count:]
