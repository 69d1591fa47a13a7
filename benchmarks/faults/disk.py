"""Every operation on files that Python makes below a folder, one by one: to die at, to fail at, to lose in a power cut.

    disk = Disk(run_dir, journal, act); disk.install()      # in a forked process only: it is never taken away again

`act(number, kind, path)` is called before each operation and may end the process or raise OSError; kinds are open
(made or cut to nothing), write, fsync, mkdir, rename, unlink, rmdir. Of a write it may return how many bytes still go
through before `act` is called again with kind `torn`. safetensors writes from Rust: its bytes go through Python here.

A power cut keeps of the files what a disk owes: content that was fsynced, and names in the order they were given, at
least up to the last one whose folder was fsynced (as journals do); or only those whose own folder was fsynced.
`power_cut` makes such a folder from what a killed process left and its journal: contents not fsynced vanish, are
cut, or become zeros; names given later are taken back.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Act = Callable[[int, str, Path], int | None]
_REAL = {name: getattr(os, name) for name in ("fsync", "mkdir", "rename", "replace", "unlink", "remove", "rmdir")}
_REAL_OPEN = io.open


class Disk:
    """Stands between this process and the files below `root`.

    Args:
        root: only what lies below is watched.
        journal: a file elsewhere; one JSON line an operation. Beside it a folder keeps what was removed.
        act: called before each operation.
    """

    def __init__(self, root: Path, journal: Path, act: Act) -> None:
        self.root, self.act, self.count = os.path.realpath(root), act, 0
        self.kept = journal.with_suffix(".removed")
        os.makedirs(self.kept, exist_ok=True)
        self._journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def install(self) -> None:
        """Take the place of open, os.fsync, os.rename and the like, and of safetensors' writer."""
        import safetensors.torch

        import mmdit.checkpoint as room

        def save_file(tensors: Any, path: Any, metadata: Any = None) -> None:
            with open(path, "wb") as file:
                file.write(safetensors.torch.save(tensors, metadata))

        room.save_file = save_file
        builtins.open = io.open = self._open  # type: ignore[assignment]
        os.fsync = self._fsync  # type: ignore[assignment]
        for name, kind in (("mkdir", "mkdir"), ("unlink", "unlink"), ("remove", "unlink"), ("rmdir", "rmdir")):
            setattr(os, name, self._one_path(_REAL[name], kind))
        for name in ("rename", "replace"):
            setattr(os, name, self._two_paths(_REAL[name]))

    def before(self, kind: str, path: str, **more: Any) -> int | None:
        """Note an operation that is about to be made, and let `act` do what it wants."""
        self.count += 1
        answer = self.act(self.count, kind, Path(path))
        line = json.dumps({"n": self.count, "kind": kind, "path": path, **more})
        os.write(self._journal, line.encode() + b"\n")
        return answer

    def watches(self, path: Any, dir_fd: int | None = None) -> str | None:
        """Return the full path where it is below the root."""
        if not isinstance(path, str | bytes | os.PathLike):
            return None
        name = os.fsdecode(path)
        if dir_fd is not None:
            name = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), name)
        full = os.path.abspath(name)
        return full if full == self.root or full.startswith(self.root + os.sep) else None

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
              newline: Any = None, *rest: Any, **named: Any) -> Any:  # fmt: skip
        path = self.watches(file)
        if path is None or not set(mode) & set("wax+"):
            return _REAL_OPEN(file, mode, buffering, encoding, errors, newline, *rest, **named)
        existed = os.path.exists(path)
        if not existed or "w" in mode:
            self.before("open", path, existed=existed, inode=os.stat(path).st_ino if existed else None)
        raw = _File(path, mode.replace("b", "").replace("t", ""), self)
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return raw if buffering == 0 else buffered
        return io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline, line_buffering=buffering == 1)

    def _fsync(self, descriptor: int) -> None:
        path = self.watches(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path is not None:
            status = os.fstat(descriptor)
            self.before("fsync", path, inode=status.st_ino, size=status.st_size, folder=os.path.isdir(path))
        _REAL["fsync"](descriptor)

    def _one_path(self, real: Callable[..., None], kind: str) -> Callable[..., None]:
        def call(path: Any, *rest: Any, dir_fd: int | None = None, **named: Any) -> None:
            watched = self.watches(path, dir_fd)
            if watched is not None:
                self.before(kind, watched)
                if kind == "unlink" and os.path.lexists(watched):
                    os.link(watched, self.kept / str(self.count))
            real(path, *rest, dir_fd=dir_fd, **named) if dir_fd is not None else real(path, *rest, **named)

        return call

    def _two_paths(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(source: Any, target: Any, **named: Any) -> None:
            here, there = self.watches(source), self.watches(target)
            if here is not None and there is not None:
                over = os.path.isfile(there)
                self.before("rename", here, to=there, over=over)
                if over:
                    os.link(there, self.kept / str(self.count))
            real(source, target, **named)

        return call


class _File(io.FileIO):
    """A file each of whose writes is an operation."""

    def __init__(self, path: str, mode: str, disk: Disk) -> None:
        super().__init__(path, mode)
        self._path, self._disk = path, disk

    def write(self, data: Any) -> int:
        allowed = self._disk.before("write", self._path, inode=os.fstat(self.fileno()).st_ino)
        if allowed is not None:
            super().write(memoryview(data).cast("B")[:allowed])
            self._disk.act(self._disk.count, "torn", Path(self._path))
        return super().write(data)


def refusing(code: int, since: int, until: int | None, kinds: frozenset[str]) -> Act:
    """Return what makes operations fail: from number `since`, up to `until` (None: for good)."""

    def act(number: int, kind: str, path: Path) -> int | None:
        if kind in kinds and number >= since and (until is None or number <= until):
            raise OSError(code, os.strerror(code), str(path))
        return None

    return act


FULL_DISK, NO_PERMISSION, IO_ERROR = errno.ENOSPC, errno.EACCES, errno.EIO


# --- loss of power ------------------------------------------------------------------------------------------------


@dataclass
class _Owed:
    """What the journal says a disk owes."""

    durable: int = 0  # names given up to this operation are kept
    synced: dict[int, int] = field(default_factory=dict)  # inode: bytes
    written: set[int] = field(default_factory=set)  # inodes
    names: list[dict[str, Any]] = field(default_factory=list)  # operations on names, in order


def _owed(journal: Path) -> _Owed:
    owed = _Owed()
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.is_file() else ():
        entry = json.loads(line)
        if entry["kind"] in ("open", "write") and entry["inode"]:
            owed.written.add(entry["inode"])
        if entry["kind"] == "open" and entry["existed"]:
            owed.synced.pop(entry["inode"], None)  # cut to nothing
        elif entry["kind"] in ("open", "mkdir", "unlink", "rmdir", "rename"):
            owed.names.append(entry)
        elif entry["kind"] == "fsync" and entry["folder"]:
            for name in owed.names:
                if entry["path"] in (os.path.dirname(name["path"]), os.path.dirname(name.get("to", ""))):
                    name["synced"] = True
                    owed.durable = max(owed.durable, name["n"])
        elif entry["kind"] == "fsync":
            owed.synced[entry["inode"]] = entry["size"]
    return owed


def power_cut(root: Path, journal: Path, target: Path, chance: random.Random, before: set[int]) -> None:
    """Write into `target` what could be found of `root` after the power came back.

    Args:
        root: the folder as the killed process left it (the page cache, as it were).
        journal: of its `Disk`.
        target: made here.
        chance: which of the possible outcomes.
        before: inodes that were on the disk before the process began, whose content counts as fsynced.
    """
    owed, removed = _owed(journal), journal.with_suffix(".removed")
    shutil.copytree(root, target, symlinks=True)
    inode = {str(p.relative_to(root)): p.stat().st_ino for p in root.rglob("*") if p.is_file()}
    pending = [entry for entry in owed.names if entry["n"] > owed.durable]
    lost = chance.choice([0, len(pending), chance.randint(0, len(pending))])
    if chance.random() < 0.3:  # a disk that keeps no order: what it owes is each folder's names at its last fsync
        pending = [entry for entry in owed.names if not entry.get("synced")]
        lost = len(pending)
    where = lambda path: target / os.path.relpath(path, os.path.realpath(root))  # noqa: E731
    for entry in reversed(pending[len(pending) - lost :]):
        _undo(entry, where, removed / str(entry["n"]), inode, root)
    for path in [p for p in target.rglob("*") if p.is_file()]:
        number = inode.get(str(path.relative_to(target)))
        if number in before and number not in owed.written:
            continue
        _forget(path, owed.synced.get(number or -1, 0), chance)


def _undo(entry: dict[str, Any], where: Callable[[str], Path], kept: Path, inode: dict[str, int], root: Path) -> None:
    """Take one operation on names back, where it was made at all."""
    path, key = where(entry["path"]), lambda p: os.path.relpath(p, os.path.realpath(root))
    if not path.parent.is_dir():  # its folder is gone for good
        return
    if entry["kind"] == "open" and not entry["existed"]:
        path.unlink(missing_ok=True)
    elif entry["kind"] == "mkdir" and path.is_dir():
        shutil.rmtree(path)
    elif entry["kind"] == "rmdir":
        path.mkdir(exist_ok=True)
    elif entry["kind"] == "rename" and where(entry["to"]).exists() and not path.exists():
        os.rename(where(entry["to"]), path)
        prefix = key(entry["to"])
        for name in [n for n in inode if n == prefix or n.startswith(prefix + os.sep)]:
            inode[key(entry["path"]) + name[len(prefix) :]] = inode.pop(name)
        if kept.is_file():
            shutil.copyfile(kept, where(entry["to"]))
            inode[prefix] = kept.stat().st_ino
    elif entry["kind"] == "unlink" and kept.is_file() and not path.exists():
        shutil.copyfile(kept, path)
        inode[key(entry["path"])] = kept.stat().st_ino


def _forget(path: Path, synced: int, chance: random.Random) -> None:
    """Lose what of a file was not fsynced: all, a part of it, or its content but not its length."""
    size = path.stat().st_size
    if size <= synced:
        return
    kind, keep = chance.choice(["cut", "torn", "zeros", "kept"]), synced
    if kind == "kept":
        return
    if kind == "torn":
        keep = chance.randint(synced, size)
    os.truncate(path, keep)
    if kind == "zeros":
        os.truncate(path, size)
