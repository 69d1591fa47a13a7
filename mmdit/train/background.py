"""Checkpoints written while training goes on (`train.async_checkpoints`).

The step pays for one copy of the state into host memory; files, fsync, hashes, the read back and the pruning are a
thread's work. At most one checkpoint is in flight, so the copy is made once and its memory used again. Under FSDP2 the
threads of all processes write together and agree over a gloo group of their own: collectives of the training step and
theirs cannot get into each other's order.

Known from: torchtitan and torch.distributed.checkpoint's `async_save`, which stage and write alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mmdit.train.sharding import local

Tables = dict[str, dict[str, Tensor]]


class Background:
    """One thread, the state it writes from, and what became of it.

    Attributes:
        images_seen: of the checkpoint in flight; None where there is none. The same in every process.
    """

    def __init__(self) -> None:
        self.images_seen: int | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._future: Future[None] | None = None
        self._staged: Tables = {}
        self._group: Any = None

    def stage(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> Tables:
        """Copy tensors (or this process's shards of them) into host memory, into that of the last time if there is one.

        Call it only while nothing is in flight.
        """
        assert self._future is None, "the state of the checkpoint in flight would be overwritten"
        for stem, table in tensors.items():
            kept = self._staged.setdefault(stem, {})
            for name, tensor in table.items():
                if name in kept:
                    local(kept[name]).copy_(local(tensor.detach()))
                else:  # `copy`, since a tensor of a run on a CPU is host memory already, and the next step changes it
                    kept[name] = tensor.detach().to("cpu", copy=True)
        return {stem: {name: self._staged[stem][name] for name in table} for stem, table in tensors.items()}

    def group(self, timeout: int) -> Any:
        """Return the process group of the threads; the first time every process must ask at the same point.

        Args:
            timeout: seconds a thread waits for the others.
        """
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        return self._group

    def begin(self, images_seen: int, write: Callable[[], None] | None) -> None:
        """Let the thread write a checkpoint; None in a process that has no part in it."""
        assert self._future is None, "one checkpoint at a time"
        self.images_seen = images_seen
        if write is None:
            self._future = Future()
            self._future.set_result(None)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._future = self._pool.submit(write)

    def finished(self) -> bool:
        """Say whether this process's part of the checkpoint in flight is done, well or badly."""
        return self._future is None or self._future.done()

    def result(self) -> BaseException | None:
        """Wait for this process's part and return what went wrong; after this nothing is in flight."""
        future, self._future, self.images_seen = self._future, None, None
        return None if future is None else future.exception()

    def close(self) -> BaseException | None:
        """Wait, stop the thread and let go of the memory; return what went wrong."""
        error = self.result()
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        self._pool, self._staged = None, {}
        return error
