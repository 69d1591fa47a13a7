"""F3: checkpoints that something has happened to: none may load, and the one before is taken."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.faults import Outcome
from mmdit.checkpoint import (
    MANIFEST,
    CheckpointError,
    fingerprint,
    latest_checkpoint,
    load_checkpoint,
    manifest_text,
    save_checkpoint,
)
from mmdit.config import load_config

CONFIG = load_config(None, {"name": "mutated"})
Mutation = Callable[[Path, random.Random], None]


def run_mutations(folder: Path, full: bool) -> Outcome:
    """F3: `count` mutations of whole and of sharded checkpoints, and those whose manifest was written anew."""
    chance = random.Random(3)
    whole, sharded = _whole(folder / "whole"), _sharded(folder / "sharded")
    count = 1000 if full else 120
    silent, other, slowest, kinds, not_back = [], [], 0.0, Counter(), []
    trial, mutations = 0, list(MUTATIONS.items())
    while sum(kinds.values()) < count:
        trial += 1
        kind, mutate = mutations[trial // 2 % len(mutations)]
        source = sharded if trial % 2 else whole
        label = f"{trial} {kind} of a {'sharded' if trial % 2 else 'whole'} one"
        path = _copy(source, folder / "run")
        if not _changed(path, mutate, chance):
            continue
        kinds[kind] += 1
        began = time.process_time()
        problem = _load(path)
        slowest = max(slowest, time.process_time() - began)
        if problem is None:
            silent.append(label)
        elif problem != "CheckpointError":
            other.append(f"{label}: {problem}")
        elif latest_checkpoint(folder / "run") != folder / "run" / "checkpoints" / BEFORE:
            not_back.append(label)
    forged, forged_wrong = _forged(folder, whole, sharded, chance)
    done = sum(kinds.values())
    return Outcome(
        not (silent or other or not_back or forged_wrong) and slowest < 1,
        f"{done:,} mutations: {len(silent)} silent loads, {len(other)} other errors, {len(not_back)} without the way "
        f"back, at most {slowest:.2f} s (CPU); {forged} under a manifest made to fit: {len(forged_wrong)} other "
        f"errors",
        {
            "mutations": done, "kinds": dict(sorted(kinds.items())), "silent": silent, "other_errors": other,
            "not_fallen_back": not_back, "slowest_seconds": round(slowest, 3), "forged": forged,
            "forged_other_errors": forged_wrong,
        },
    )  # fmt: skip


# --- what is mutated --------------------------------------------------------------------------------------------

BEFORE, NEWEST = "000000000008", "000000000016"


def _whole(run: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tables = {
        stem: {f"block.{i}.weight": torch.randn(24, 16, generator=generator) for i in range(4)}
        for stem in ("model", "ema", "optimizer")
    }
    for images_seen in (8, 16):
        save_checkpoint(run, images_seen, tables, {"step": images_seen // 8}, CONFIG)
    return run


def _sharded(run: Path) -> Path:
    """Two processes' shards as torch.distributed.checkpoint writes them: each tensor cut along its first axis."""
    _whole(run)
    for path in (run / "checkpoints").iterdir():
        for stem in ("model", "ema", "optimizer"):
            tables = load_checkpoint(path, [stem]).tensors[stem]
            (path / stem).mkdir()
            for rank in range(2):
                pieces = {name: tensor[rank * 12 : rank * 12 + 12].clone() for name, tensor in tables.items()}
                places = {name: {"saved_offsets": [rank * 12, 0]} for name in pieces}
                file = path / stem / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
                save_file(pieces, file, metadata={"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0"})
            (path / f"{stem}.safetensors").unlink()
            rewrite_manifest(path)
        load_checkpoint(path)
    return run


def rewrite_manifest(path: Path) -> None:
    """Make the manifest of a checkpoint fit what lies in it, as somebody would who wants it to load."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != MANIFEST)
    (path / MANIFEST).write_text(manifest_text({p.relative_to(path).as_posix(): fingerprint(p) for p in files}))


def _copy(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target / "checkpoints" / NEWEST


def _changed(path: Path, mutate: Mutation, chance: random.Random) -> bool:
    """Mutate; say whether anything is different from before."""
    before = _content(path)
    mutate(path, chance)
    return _content(path) != before


def _content(path: Path) -> dict[str, Any]:
    return {
        p.relative_to(path).as_posix(): p.read_bytes() if p.is_file() else "folder" for p in sorted(path.rglob("*"))
    }


def _load(path: Path) -> str | None:
    """Return the class of what is raised, with the message where it is not ours; None: it loaded."""
    try:
        load_checkpoint(path)
    except CheckpointError:
        return "CheckpointError"
    except BaseException as error:  # whatever comes is the finding
        return f"{type(error).__name__}: {error!s:.100}"
    return None


# --- mutations --------------------------------------------------------------------------------------------------


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file())


def _bytes(change: Callable[[bytearray, random.Random], bytes | bytearray]) -> Mutation:
    def mutate(path: Path, chance: random.Random) -> None:
        file = chance.choice(_files(path))
        file.write_bytes(change(bytearray(file.read_bytes()), chance))

    return mutate


def _flip(content: bytearray, chance: random.Random) -> bytearray:
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return content


def _zero_range(content: bytearray, chance: random.Random) -> bytearray:
    start = chance.randrange(len(content))
    stop = min(len(content), start + chance.choice((1, 16, 512)))
    content[start:stop] = bytes(stop - start)
    return content


def _insert(content: bytearray, chance: random.Random) -> bytearray:
    place = chance.randrange(len(content) + 1)
    return content[:place] + chance.randbytes(chance.choice((1, 8))) + content[place:]


def _two_swapped(path: Path, chance: random.Random) -> None:
    a, b = chance.sample(_files(path), 2)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second), b.write_bytes(first)


def _older_file(path: Path, chance: random.Random) -> None:
    """A file of another training under the same name and of the same size."""
    file = chance.choice([f for f in _files(path) if f.suffix == ".safetensors"])
    content = bytearray(file.read_bytes())
    content[-64:] = chance.randbytes(64)
    file.write_bytes(content)


def _double_key(path: Path, chance: random.Random) -> None:
    file = chance.choice([f for f in _files(path) if f.suffix == ".json"])
    text = file.read_text()
    key = text.partition('"')[2].partition('"')[0]
    file.write_text(text.replace("{", f'{{"{key}": 1, ', 1))


def _deleted(path: Path, chance: random.Random) -> None:
    chance.choice(_files(path)).unlink()


def _renamed(path: Path, chance: random.Random) -> None:
    file = chance.choice(_files(path))
    file.rename(file.with_name(f"{file.name}.bak"))


def _link(path: Path, chance: random.Random) -> None:
    file = chance.choice(_files(path))
    elsewhere = path.parent.parent / "elsewhere"
    file.rename(elsewhere), file.symlink_to(elsewhere)


def _folder(path: Path, chance: random.Random) -> None:
    file = chance.choice(_files(path))
    file.unlink(), file.mkdir()


def _stranger(path: Path, chance: random.Random) -> None:
    """Tensors that nobody wrote: one more shard in a stem's folder, or a folder beside the file of a stem."""
    file = chance.choice([f for f in _files(path) if f.suffix == ".safetensors"])
    place = file.parent / "shard-00009-model-00001-of-00001.safetensors"
    if file.parent == path:
        (path / file.stem).mkdir()
        place = path / file.stem / place.name
    names = [f"block.{i}.weight" for i in range(4)]
    info = {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": [0, 0]} for name in names})}
    save_file({name: torch.zeros(24, 16) for name in names}, place, metadata=info)


def _edited_manifest(path: Path, chance: random.Random) -> None:
    """Another size, hash, name or shape of the manifest."""
    file = path / MANIFEST
    table = json.loads(file.read_text())["files"]
    name = chance.choice(sorted(table))
    kind = chance.randrange(6)
    if kind == 0:
        table[name]["size"] += 1
    elif kind == 1:
        table[name]["sha256"] = table[name]["sha256"][::-1]
    elif kind == 2:
        table[f"../{BEFORE}/{name}"] = table.pop(name)
    elif kind == 3:
        table[name] = None
    elif kind == 4:
        table[name]["size"] = str(table[name]["size"])
    text = manifest_text(table) if kind < 5 else "[" * 100_000
    file.write_text(text)


MUTATIONS: dict[str, Mutation] = {
    "truncated": _bytes(lambda content, chance: content[: chance.randrange(len(content))]),
    "emptied": _bytes(lambda content, chance: b""),
    "bit flipped": _bytes(_flip),
    "range zeroed": _bytes(_zero_range),
    "bytes appended": _bytes(lambda content, chance: content + chance.choice((b"\n", b"\0" * 8, b"}"))),
    "bytes inserted": _bytes(_insert),
    "random bytes": _bytes(lambda content, chance: chance.randbytes(len(content))),
    "files swapped": _two_swapped,
    "other weights of the same size": _older_file,
    "key twice": _double_key,
    "file deleted": _deleted,
    "file renamed": _renamed,
    "file a link": _link,
    "file a folder": _folder,
    "tensors that nobody wrote": _stranger,
    "manifest edited": _edited_manifest,
}


# --- with a manifest that fits ------------------------------------------------------------------------------------


def _forged(folder: Path, whole: Path, sharded: Path, chance: random.Random) -> tuple[int, list[str]]:
    """Damage the content and make the manifest fit: hashes cannot tell; whatever does not load is a CheckpointError."""
    wrong = []
    cases = [(source, name) for source in (whole, sharded) for name in FORGERIES]
    for source, name in cases:
        path = _copy(source, folder / "run")
        FORGERIES[name](path)
        rewrite_manifest(path)
        problem = _load(path)
        if problem != "CheckpointError":
            wrong.append(f"{name} ({source.name}): {problem or 'loaded'}")
    return len(cases), wrong


def _in_tensors(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def forge(path: Path) -> None:
        file = next(f for f in _files(path) if f.suffix == ".safetensors")
        file.write_bytes(change(file.read_bytes()))

    return forge


def _with_header(header: Any, body: bytes = b"") -> Callable[[bytes], bytes]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda content: len(text).to_bytes(8, "little") + text + body


def _in_metadata(places: Any) -> Callable[[Path], None]:
    """Say something else about where the pieces of a tensor lie; of a whole checkpoint, make one stem a folder."""

    def forge(path: Path) -> None:
        file = next(f for f in _files(path) if f.suffix == ".safetensors")
        if file.parent == path:
            (path / file.stem).mkdir()
            file = file.rename(path / file.stem / file.name)
        names = [f"block.{i}.weight" for i in range(4)]
        metadata = None if places is None else {"DCP_SHARDING_INFO": places(names)}
        save_file({name: torch.zeros(12, 16) for name in names}, file, metadata=metadata)

    return forge


def _offsets(offsets: Sequence[Any]) -> Callable[[list[str]], str]:
    return lambda names: json.dumps({name: {"saved_offsets": list(offsets)} for name in names})


def _state(text: str, name: str = "state.json") -> Callable[[Path], None]:
    return lambda path: (path / name).write_text(text) and None


FORGERIES: dict[str, Callable[[Path], None]] = {
    "header length 2^63": _in_tensors(lambda content: (2**63).to_bytes(8, "little") + content[8:]),
    "header length 10^8 + 1": _in_tensors(lambda content: (10**8 + 1).to_bytes(8, "little") + content[8:]),
    "header deep": _in_tensors(_with_header(b"[" * 50_000)),
    "shape of 4 TB": _in_tensors(_with_header({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})),
    "unknown dtype": _in_tensors(_with_header({"x": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}, b"1234")),
    "overlap": _in_tensors(
        _with_header({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in ("a", "b")}, b"1234")
    ),
    "pickle": _in_tensors(lambda content: b"\x80\x02cposix\nsystem\n(S'true'\ntR."),
    "empty": _in_tensors(lambda content: b""),
    "no places": _in_metadata(None),
    "places no JSON": _in_metadata(lambda names: "{"),
    "places deep": _in_metadata(lambda names: "[" * 50_000),
    "places of nothing": _in_metadata(lambda names: "{}"),
    "places a list": _in_metadata(lambda names: "[1]"),
    "places far away": _in_metadata(_offsets([2**50, 0])),
    "places below zero": _in_metadata(_offsets([-12, 0])),
    "places of other rank": _in_metadata(_offsets([0])),
    "places words": _in_metadata(_offsets(["a", "b"])),
    "state deep": _state("[" * 50_000),
    "state no JSON": _state("{"),
    "state a list": _state("[1]"),
    "state latin-1": lambda path: (path / "state.json").write_bytes(b"\xe9") and None,
    "config code": _state("!!python/object/apply:os.system ['true']", "config.yaml"),
    "config a list": _state("[1, 2]", "config.yaml"),
    "config a word": _state("fast", "config.yaml"),
    "config empty": _state("", "config.yaml"),
    "config deep": _state("[" * 5_000, "config.yaml"),
    "config of a field unknown": _state("name: x\nnmae: y\n", "config.yaml"),
    "config bomb": _state(
        "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)),
        "config.yaml",
    ),
}

RUNS = {"F3": run_mutations}
