"""Our own checkpoints: a folder of safetensors, JSON and YAML, checksummed, and either whole or not there.

    runs/<...>/checkpoints/<images_seen, 12 digits>/
        model.safetensors  ema.safetensors  optimizer.safetensors   state.json   config.yaml   manifest.json

(of a run sharded over processes folders model/, ema/, optimizer/ instead, with a file a process).

A checkpoint is written into a temporary folder beside its place, every file is fsynced, the manifest (size and
SHA-256 of each file) comes last, then one rename makes it visible. Old ones are pruned only after the new one has
been read back and verified. Loading verifies first: safetensors itself does not notice a flipped bit (164 of 167
flips loaded silently, results/ and the facts behind this design). Nothing here pickles.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmdit.config import ConfigError, RunConfig, read_yaml, resolve, to_yaml
from mmdit.registry import lookup
from mmdit.untrusted import TABLE_BYTES, read_json, read_text

MANIFEST = "manifest.json"
STATE = "state.json"
CONFIG = "config.yaml"
TEMPORARY = ".tmp-"
_ASIDE = ".old-"
_CHUNK = 1 << 20
_FILE_NAME = re.compile(r"([\w-]+/)?[\w-]+(\.[\w-]+)*")  # in the folder or one below, nowhere else


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used or written: which, why, and what to do next."""

    def __init__(self, path: str | Path, reason: str, next_step: str) -> None:
        super().__init__(f"checkpoint {path}: {reason}. {next_step}")
        self.path, self.reason, self.next_step = Path(path), reason, next_step


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: `tensors` is {file stem: {name: tensor}}, `state` the counters, `config` the run's config."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    config: RunConfig


def save_checkpoint(
    run_dir: str | Path,
    images_seen: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    config: RunConfig,
) -> Path:
    """Write one checkpoint, all or nothing, and read it back.

    Args:
        run_dir: the run's folder.
        images_seen: names the folder.
        tensors: {file stem: {name: tensor}}; moved to the CPU and made contiguous here.
        state: JSON types; `images_seen` is added.
        config: the run's config; makes the checkpoint usable alone.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: the disk is full or refuses, or what was read back is not what was written.
    """
    folder = Path(run_dir) / "checkpoints"
    path = folder / f"{images_seen:012d}"
    temporary = folder / f"{TEMPORARY}{images_seen:012d}-{uuid.uuid4().hex[:8]}"
    try:
        make_folder(folder)
        temporary.mkdir()
        for stem, table in tensors.items():
            contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in table.items()}
            save_file(contiguous, temporary / f"{stem}.safetensors")
        write_text(temporary / STATE, json.dumps({**state, "images_seen": images_seen}, indent=1, sort_keys=True))
        write_text(temporary / CONFIG, to_yaml(config))
        files = sorted(p for p in temporary.iterdir())
        for file in files:
            sync(file)
        write_text(temporary / MANIFEST, manifest_text({p.name: fingerprint(p) for p in files}))
        sync(temporary / MANIFEST)
        sync(temporary)
        put_in_place(temporary, path)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            path,
            f"could not be written ({error})",
            "Free disk space or choose another run folder; the checkpoints before it are untouched",
        ) from error
    verify_checkpoint(path)
    return path


def load_checkpoint(path: str | Path, stems: Iterable[str] | None = None, *, verified: bool = False) -> Checkpoint:
    """Verify a checkpoint against its manifest and read it.

    Args:
        path: folder of one checkpoint.
        stems: which tensor files to read, by default all; verification always covers all.
        verified: it has just been; only presence and sizes are looked at again.

    Raises:
        CheckpointError: anything missing, changed or unreadable.
    """
    path = Path(path)
    files = verify_checkpoint(path, only=lambda name: not verified)
    tensor_files = [name for name in files if name.endswith(".safetensors")]
    present = list(dict.fromkeys(name.partition("/")[0].removesuffix(".safetensors") for name in tensor_files))
    wanted = present if stems is None else list(stems)
    missing = [stem for stem in wanted if stem not in present]
    if missing:
        raise CheckpointError(path, f"holds no {', '.join(missing)}", f"It holds {', '.join(present)}")
    try:
        tensors = {stem: _read_stem(path, stem, tensor_files) for stem in wanted}
        state = read_json(path / STATE)
        if not isinstance(state, dict):
            raise ValueError(f"{STATE} holds a {type(state).__name__}, not a table")
        tree = read_yaml(path / CONFIG)
        if not tree:
            raise ValueError(f"{CONFIG} is empty")
        config = resolve(tree, source=str(path / CONFIG))
    except (OSError, SafetensorError, ValueError, TypeError, LookupError, RuntimeError) as error:
        hint = (
            "It was written by another version of this project; use that one"
            if isinstance(error, ConfigError)
            else _HINT
        )
        raise CheckpointError(path, f"cannot be read ({type(error).__name__}: {error})", hint) from error
    return Checkpoint(path, tensors, state, config)


def read_state(path: str | Path) -> dict[str, Any]:
    """Return the counters of a checkpoint without reading its tensors; the manifest is verified all the same."""
    return load_checkpoint(path, stems=()).state


def _read_stem(path: Path, stem: str, files: Sequence[str]) -> dict[str, Tensor]:
    """Read the tensors of one stem, from those files alone that the manifest lists: one, or shards put together."""
    if f"{stem}.safetensors" in files:
        return load_file(path / f"{stem}.safetensors")
    pieces: dict[str, list[tuple[list[int], Tensor]]] = {}
    for file in sorted(name for name in files if name.startswith(f"{stem}/")):
        with safe_open(path / file, framework="pt") as reader:
            places = json.loads((reader.metadata() or {})["DCP_SHARDING_INFO"])
            for name in reader.keys():  # noqa: SIM118 (no mapping)
                pieces.setdefault(name, []).append((places[name]["saved_offsets"], reader.get_tensor(name)))
    return {name: _join(parts) for name, parts in pieces.items()}


def _join(parts: Sequence[tuple[list[int], Tensor]]) -> Tensor:
    """Put the pieces of a tensor in their places; together they cover it.

    Raises:
        ValueError: they do not.
    """
    for offsets, piece in parts:
        if len(offsets) != piece.ndim or not all(type(offset) is int and offset >= 0 for offset in offsets):
            raise ValueError(f"a shard of shape {list(piece.shape)} is said to lie at {offsets}")
    shape = [max(start + size for start, size in zip(*axis, strict=True)) for axis in _axes(parts)]
    held = sum(piece.numel() for _, piece in parts)
    if held != math.prod(shape):
        raise ValueError(f"the shards of a tensor hold {held} of {math.prod(shape)} numbers")
    if len(parts) == 1:
        return parts[0][1]
    whole = parts[0][1].new_empty(shape)
    for offsets, piece in parts:
        whole[tuple(slice(o, o + n) for o, n in zip(offsets, piece.shape, strict=True))] = piece
    return whole


def _axes(parts: Sequence[tuple[list[int], Tensor]]) -> list[tuple[list[int], list[int]]]:
    """Return starts and sizes of all pieces, axis by axis."""
    return [
        ([offsets[axis] for offsets, _ in parts], [piece.shape[axis] for _, piece in parts])
        for axis in range(parts[0][1].ndim)
    ]


def verify_checkpoint(path: str | Path, only: Callable[[str], bool] = lambda name: True) -> list[str]:
    """Compare every file with the manifest and return their names.

    Args:
        path: folder of one checkpoint.
        only: which files' content to read, by name; the others need only be there at their size.

    Raises:
        CheckpointError: no manifest, a file missing, truncated, grown or changed, or a manifest that was edited.
    """
    path = Path(path)
    manifest = path / MANIFEST
    if not path.is_dir():
        raise CheckpointError(path, "does not exist", "See the run's checkpoints/ for those there are")
    if not manifest.is_file():
        raise CheckpointError(path, f"has no {MANIFEST}: it was never finished", _HINT)
    try:
        text = read_text(manifest, TABLE_BYTES)
        files = json.loads(text)["files"]
        # our own spelling, byte for byte: so an edit that JSON would forgive (a duplicate key) shows as well
        if manifest_text(files) != text:
            raise ValueError("it is not as it was written")
        entries = {str(name): (entry["size"], entry["sha256"]) for name, entry in files.items()}
        if not all(type(size) is int and isinstance(digest, str) for size, digest in entries.values()):
            raise ValueError("a size or a hash is none")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(path, f"has a damaged {MANIFEST} ({error})", _HINT) from error
    for name, (size, digest) in entries.items():
        file = path / name
        if not _FILE_NAME.fullmatch(name) or file.is_symlink() or not file.is_file():
            raise CheckpointError(path, f"lacks its file {name!r}", _HINT)
        if file.stat().st_size != size:
            raise CheckpointError(path, f"{name} has {file.stat().st_size} bytes, written were {size}", _HINT)
        if only(name) and _sha256(file) != digest:
            raise CheckpointError(path, f"{name} has changed since it was written (SHA-256 differs)", _HINT)
    for name in (STATE, CONFIG):
        if name not in entries:
            raise CheckpointError(path, f"lacks its file {name!r}", _HINT)
    stranger = _stranger(path, entries)
    if stranger is not None:
        raise CheckpointError(path, f"holds {stranger!r}, which was not written with it", "Move it elsewhere")
    return list(entries)


def _stranger(path: Path, listed: Iterable[str]) -> str | None:
    """Return a file of tensors, or a folder, that no manifest speaks of: readers of shards take all that they find."""
    files = set(listed)
    folders = {name.partition("/")[0] for name in files if "/" in name}
    for entry in path.rglob("*"):
        name = entry.relative_to(path).as_posix()
        if (entry.is_dir() and name not in folders) or (entry.suffix == ".safetensors" and name not in files):
            return name
    return None


def weights_stem(weights: str) -> str:
    """Return the file stem of a kind of weights: `ema` (the average), `ema-<name>` (a further one), `raw`.

    Raises:
        ValueError: no such kind.
    """
    if weights.startswith("ema-"):
        return weights
    return lookup({"ema": "ema", "raw": "model"}, weights, "kind of weights")


def checkpoint_hash(path: str | Path, stem: str = "ema") -> str:
    """Return the SHA-256 of a checkpoint's weights as its manifest gives it; of shards, that of their hashes."""
    files = json.loads((Path(path) / MANIFEST).read_text(encoding="utf-8"))["files"]
    whole = files.get(f"{stem}.safetensors")
    if whole is not None:
        return str(whole["sha256"])
    parts = [entry["sha256"] for name, entry in sorted(files.items()) if name.startswith(f"{stem}/")]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first, unverified."""
    folder = Path(run_dir) / "checkpoints"
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(p for p in found if p.is_dir() and re.fullmatch(r"\d{12}", p.name))


def latest_checkpoint(run_dir: str | Path, report: Callable[[str], None] | None = None) -> Path | None:
    """Return the newest checkpoint that verifies; damaged ones are passed over and named to `report`."""
    for path in reversed(list_checkpoints(run_dir)):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            if report is not None:
                report(f"passed over: {error}")
            continue
        return path
    return None


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint meant by `path`: itself, or the newest verified one of a run folder.

    A newer one that is damaged is passed over with a warning: what is drawn or judged is not the end of that run.

    Raises:
        FileNotFoundError: no such run; the message lists the runs there are.
        CheckpointError: the run has no checkpoint that verifies.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    if not path.is_dir():
        runs = list_runs(path.parent) or list_runs("runs")
        there = f"runs found: {', '.join(map(str, runs))}" if runs else "no runs found; train one with scripts/train.py"
        raise FileNotFoundError(f"no run {path}; {there}")
    problems: list[str] = []
    latest = latest_checkpoint(path, problems.append)
    if latest is None:
        if problems:
            raise CheckpointError(path, "no checkpoint of this run verifies", "\n".join(problems))
        raise CheckpointError(
            path,
            "no checkpoint has been written yet",
            f"Go on training: python scripts/train.py {path / CONFIG} --out {path}",
        )
    if problems:
        warnings.warn(f"{path}: {latest.name} is taken, not the newest checkpoint; {'; '.join(problems)}", stacklevel=2)
    return latest


def list_runs(folder: str | Path) -> list[Path]:
    """Return the run folders below `folder` (those with a config.yaml and checkpoints), at most three levels deep."""
    folder = Path(folder)
    found = (c.parent for depth in ("*", "*/*", "*/*/*") for c in folder.glob(f"{depth}/checkpoints"))
    return sorted(run for run in found if (run / CONFIG).is_file())


def prune_checkpoints(
    run_dir: str | Path,
    keep: int,
    kept: Callable[[int], bool] = lambda images_seen: False,
    newest: int | None = None,
) -> None:
    """Remove all but the newest `keep`; those for which `kept(images_seen)` holds stay whatever their age.

    Args:
        newest: images_seen of the one that was just written and verified. Those beyond it were passed over as damaged
            when the run was resumed: they neither count nor go, else the good one would go for a damaged one's sake.
    """
    known = [path for path in list_checkpoints(run_dir) if newest is None or int(path.name) <= newest]
    for path in known[:-keep]:
        if not kept(int(path.name)):
            shutil.rmtree(path, ignore_errors=True)


def thin_checkpoint(path: str | Path, stems: Sequence[str]) -> int:
    """Leave a checkpoint nothing but some of its weights; return how many bytes that freed.

    It is written anew beside its place, as any checkpoint is, so it is whole at every moment. Sampling and evaluation
    work from it; training cannot go on from it, which `state["weights_only"]` says.

    Args:
        path: folder of one checkpoint.
        stems: the tensor files to keep, such as ["ema"].

    Raises:
        CheckpointError: it does not verify, holds no such weights, or cannot be written; it is left as it was.
    """
    path = Path(path)
    names = verify_checkpoint(path)
    tensor_files = [name for name in names if name.endswith(".safetensors")]
    kept = [name for name in tensor_files if name.partition("/")[0].removesuffix(".safetensors") in stems]
    if not kept:
        raise CheckpointError(path, f"holds no {', '.join(stems)}", "Nothing was removed")
    dropped = [name for name in tensor_files if name not in kept]
    if not dropped:
        return 0
    freed = sum((path / name).stat().st_size for name in dropped)
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}")
    entries = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    try:
        for name in names:
            if name not in dropped:
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                _link(path / name, temporary / name)
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        (temporary / STATE).unlink()  # a link: writing into it would change the old one too
        write_text(temporary / STATE, json.dumps({**state, "weights_only": True}, indent=1, sort_keys=True))
        sync(temporary / STATE)
        own = {name: entries[name] for name in names if name not in dropped}
        write_text(temporary / MANIFEST, manifest_text({**own, STATE: fingerprint(temporary / STATE)}))
        for place in (temporary / MANIFEST, *(p for p in temporary.iterdir() if p.is_dir()), temporary):
            sync(place)  # folders of shards, too: the new names in them are not yet on the disk
        put_in_place(temporary, path)
        sync(path.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(path, f"could not be thinned ({error})", "It is as it was") from error
    return freed


def _link(source: Path, target: Path) -> None:
    """Give a file a second name; where the file system knows no links, copy it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(target)


def sweep_temporaries(run_dir: str | Path) -> int:
    """Remove what an interrupted save has left; return how many. Only for the process that owns the run."""
    folder = Path(run_dir) / "checkpoints"
    swept = 0
    for path in folder.glob(f"{_ASIDE}*") if folder.is_dir() else ():
        whole = folder / path.name.removeprefix(_ASIDE).partition("-")[0]
        if not whole.exists():  # killed between the two renames of a replacement: the old one is still the good one
            path.rename(whole)
    for path in [*folder.glob(f"{TEMPORARY}*"), *folder.glob(f"{_ASIDE}*")] if folder.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)
        swept += 1
    return swept


def tensors_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return a module's state dict for `save_checkpoint`.

    Raises:
        ValueError: a tensor holds NaN or Inf; such a state must never replace a good checkpoint.
    """
    state = module.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds non-finite numbers; the checkpoint is not written")
    return state


_HINT = "Use an earlier checkpoint of the run (training resumes from the newest whole one by itself) or train again"


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename; a folder of the same name (the same images_seen, saved again) is moved aside first."""
    if not path.exists():
        temporary.rename(path)
        return
    aside = path.with_name(f"{_ASIDE}{path.name}-{uuid.uuid4().hex[:8]}")
    path.rename(aside)
    temporary.rename(path)
    sync(path.parent)  # else a power cut may keep the removal below and take the renames back
    shutil.rmtree(aside, ignore_errors=True)


def manifest_text(files: Mapping[str, Any]) -> str:
    return json.dumps({"files": dict(files)}, indent=1, sort_keys=True)


def fingerprint(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that it is the old one or the new one whatever happens, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write_text(temporary, text)
        sync(temporary)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def make_folder(path: Path) -> None:
    """Make a folder, with those above it, whose name outlives a loss of power."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    with suppress(PermissionError):  # a folder one may write into and not read
        sync(path.parent)


def sync(path: Path) -> None:
    """Push a file or a folder's entries to the disk; without it a power loss leaves empty files under good names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
