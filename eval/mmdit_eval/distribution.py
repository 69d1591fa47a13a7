"""Judging with several processes: work is split by sample id, gathered with the ids, and must come out whole.

    torchrun --nproc_per_node 4 scripts/evaluate.py runs/mine --suite configs/eval/quickstart.yaml

What a sample gets (noise, prompt, features) depends on its id alone, so the number of processes changes nothing.
Nothing is padded and nothing is drawn twice: where ids are missing or double after gathering, the result is refused.
Frameworks that pad the last batch of each process count some samples twice (facts: mseitzer/pytorch-fid#73,
huggingface/accelerate#575).
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed

_LOG = logging.getLogger(__name__)
_PATIENCE = datetime.timedelta(days=1)  # how long a process waits for the slowest one


@dataclass(frozen=True)
class Share:
    """One process of several; `Share()` is the only one.

    Attributes:
        rank: 0 ... world - 1; rank 0 writes results.
        world: how many processes there are.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> Share:
        """Read RANK and WORLD_SIZE, as torchrun sets them, and meet the other processes (gloo).

        Raises:
            ValueError: values that make no sense, or no address to meet at.
        """
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if world < 1 or not 0 <= rank < world:
            raise ValueError(f"RANK is {rank} and WORLD_SIZE {world}; rank must lie in 0 ... world size - 1")
        if world > 1 and not torch.distributed.is_initialized():
            if "MASTER_ADDR" not in os.environ:
                raise ValueError(
                    f"WORLD_SIZE is {world} but MASTER_ADDR is not set: start with torchrun --nproc_per_node {world}"
                )
            torch.distributed.init_process_group("gloo", timeout=_PATIENCE)
            if torch.cuda.is_available():  # "cuda" then means this process's own device
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        return cls(rank, world)

    @property
    def first(self) -> bool:
        """Whether this process writes results and speaks."""
        return self.rank == 0

    def of(self, items: Sequence[Any]) -> list[Any]:
        """Return this process's items: number rank, rank + world, ..."""
        return list(items[self.rank :: self.world])

    def gather(self, ids: np.ndarray, values: Sequence[np.ndarray], count: int) -> list[np.ndarray] | None:
        """Bring together what all processes have: rank 0 gets whole arrays, the others None.

        Args:
            ids: int [n], the samples of this process.
            values: arrays [n, ...], one row a sample.
            count: N, how many samples there are in all.

        Raises:
            RuntimeError: a sample is missing or there twice.
        """
        if self.world == 1:
            return join([(ids, values)], count)
        parts: list[Any] | None = [None] * self.world if self.first else None
        torch.distributed.gather_object((ids, list(values)), parts, dst=0)
        return join(parts, count) if parts is not None else None

    def meet(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            torch.distributed.barrier()

    def broadcast(self, value: Any) -> Any:
        """Return what the first process has, in every process."""
        if self.world == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]


def join(parts: Sequence[tuple[np.ndarray, Sequence[np.ndarray]]], count: int) -> list[np.ndarray]:
    """Sort the rows of several processes by id, and insist on exactly 0 ... count - 1.

    Raises:
        RuntimeError: a sample is missing, there twice, or none of these samples.
    """
    ids = np.concatenate([np.asarray(part[0], dtype=np.int64) for part in parts])
    order = np.argsort(ids, kind="stable")
    if not np.array_equal(ids[order], np.arange(count)):
        missing = sorted(set(range(count)) - set(ids.tolist()))
        values, times = np.unique(ids, return_counts=True)
        raise RuntimeError(
            f"gathered {len(ids)} samples for {count}: {len(missing)} missing {missing[:5]}, "
            f"{int((times > 1).sum())} there more than once {values[times > 1][:5].tolist()}"
        )
    columns = zip(*(part[1] for part in parts if len(part[0])), strict=True)  # the shape of nothing is not known
    return [np.concatenate(column)[order] for column in columns]


def draw_batches(
    draw: Callable[[slice], np.ndarray],
    count: int,
    batch_size: int,
    folder: Path,
    share: Share,
    progress: Callable[[int], object] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw this process's batches; each is stored when it is finished, and taken from there when the work is resumed.

    Batches are cut from the whole list of samples, so that they are the same whatever the number of processes.

    Args:
        draw: rows of the whole list to pictures uint8 [b, H, W, 3].
        folder: where finished batches stand, one .npy each; its name must say what they depend on.
        progress: called with the size of each batch that is done.

    Returns:
        (ids int64 [n], pictures uint8 [n, H, W, 3]).
    """
    ids, pictures = [np.empty(0, dtype=np.int64)], []
    for start in share.of(range(0, count, batch_size)):
        rows = slice(start, min(start + batch_size, count))
        path = folder / f"{rows.start:09d}-{rows.stop:09d}.npy"
        found = _read(path, rows)
        if found is None:
            found = draw(rows)
            _write(path, found)
        ids.append(np.arange(rows.start, rows.stop))
        pictures.append(found)
        if progress is not None:
            progress(len(found))
    if not pictures:  # more processes than batches
        return ids[0], np.empty((0, 0, 0, 3), dtype=np.uint8)
    return np.concatenate(ids), np.concatenate(pictures)


def _read(path: Path, rows: slice) -> np.ndarray | None:
    if not path.is_file():
        return None
    try:
        found = np.load(path, allow_pickle=False)
        if found.ndim != 4 or found.dtype != np.uint8 or len(found) != rows.stop - rows.start:
            raise ValueError(f"{found.dtype} {list(found.shape)}")
    except (OSError, ValueError, EOFError) as error:
        _LOG.warning("finished batch %s is damaged (%s) and will be drawn again", path, error)
        return None
    return np.asarray(found)


def _write(path: Path, pictures: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            np.save(file, pictures)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def forget(folder: Path) -> None:
    """Remove finished batches whose result is stored, and the folder around them where nothing else is unfinished."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()
