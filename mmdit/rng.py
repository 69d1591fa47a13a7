"""Every random draw is a function of (seed, purpose, index, step): the one home of randomness.

Noise belongs to an image, not to a batch: image 7 gets the same noise alone, in a batch of 64, on the second of
four GPUs, or after a resume. Draws are made on the CPU with the counter-based Philox generator, keyed by a hash, so
they are equal on every machine. Source of the generator: Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3".
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

Purpose = Literal[
    "init",  # parameters of a denoiser; index 0
    "data_order",  # permutation of one epoch; index = epoch
    "data",  # anything a data set draws for item `index`
    "train_noise",  # training noise; index = position in the stream of training samples
    "train_t",  # training time, likewise
    "caption_dropout",  # which encoders are dropped, likewise
    "val_noise",  # validation noise; index = validation sample, step = level
    "sample_noise",  # initial noise of a generated image; index = image
    "step_noise",  # noise a stochastic sampler adds; index = image, step = sampler step
    "encode",  # draw from the VAE's posterior; index = position in the stream of training samples
    "metric",  # subsets and bootstraps in evaluation
]

_PURPOSES = get_args(Purpose)


def generator(seed: int, purpose: Purpose, index: int = 0, step: int = 0) -> np.random.Generator:
    """Return the generator of one (seed, purpose, index, step).

    Raises:
        ValueError: `purpose` is not in the table above.
    """
    if purpose not in _PURPOSES:
        raise ValueError(f"unknown purpose {purpose!r} of a random draw; known: {', '.join(_PURPOSES)}")
    digest = hashlib.blake2b(f"{seed}|{purpose}|{index}|{step}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def normal(
    seed: int, purpose: Purpose, indices: Sequence[int] | np.ndarray, shape: Sequence[int], step: int = 0
) -> np.ndarray:
    """Draw standard normal noise, float32, [len(indices), *shape]; row i depends on indices[i] alone."""
    out = np.empty((len(indices), *shape), dtype=np.float32)
    for row, index in enumerate(indices):
        generator(seed, purpose, int(index), step).standard_normal(dtype=np.float32, out=out[row])
    return out


def uniform(
    seed: int, purpose: Purpose, indices: Sequence[int] | np.ndarray, shape: Sequence[int] = (), step: int = 0
) -> np.ndarray:
    """Draw uniforms in [0, 1), float64, [len(indices), *shape]; row i depends on indices[i] alone."""
    out = np.empty((len(indices), *shape), dtype=np.float64)
    for row, index in enumerate(indices):
        out[row] = generator(seed, purpose, int(index), step).random(tuple(shape))
    return out


def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """Return the order of epoch `epoch` of a data set of `length` items, int64 [length]."""
    return generator(seed, "data_order", epoch).permutation(length)


def integer_seed(seed: int, purpose: Purpose, index: int = 0) -> int:
    """Return a 63-bit seed for libraries that only take a number (torch.manual_seed)."""
    return int(generator(seed, purpose, index).integers(0, 2**63 - 1))
