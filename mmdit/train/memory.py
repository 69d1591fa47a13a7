"""A memory that is full, told as what it is, with what would help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# CUDA has a class of its own; the CPU's allocator raises a RuntimeError, in these words on Linux and elsewhere
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")


class OutOfMemoryError(RuntimeError):
    """Something did not fit into memory; the last checkpoint is untouched."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell a full memory from other errors."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in _WORDS)


@contextmanager
def memory_told(tell: Callable[[BaseException], str]) -> Iterator[None]:
    """Turn a full memory into `OutOfMemoryError`; other errors, and one that was told already, pass.

    Args:
        tell: what to say, given the error.
    """
    try:
        yield
    except OutOfMemoryError:
        raise
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(tell(error)) from error


def first_line(error: BaseException) -> str:
    """Return the beginning of an error's message, or its name where it has none."""
    return next(iter(str(error).splitlines()), "")[:200] or type(error).__name__
