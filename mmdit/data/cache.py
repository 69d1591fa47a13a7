"""Latents and text states computed once, and the live path that gives the same batches.

    source = precompute(dataset, vae, text, config.encoders, cache_dir=...)  # or LiveBatches(...)
    latents, conditioning = source.batch(indices)

Encoding every step would cost 7 to 9 times the training step of a small denoiser. A cache holds the latents of each
image (the mean of the VAE's posterior, fp16) and the text states of each *distinct* caption (fp16, real tokens only,
in padded arrays with lengths; with padding `attend` all tokens, because there they are read). Both paths round to fp16,
so whether a run caches does not change what it learns from. Caption dropout is not in here: it is drawn per step.

A cache is a folder named by the fingerprint of everything that decides its content; rows of a study share it. It is
built under a lock in a temporary folder and renamed, so a second process waits and then reads.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mmdit.config import EncodersConfig
from mmdit.denoiser import Conditioning
from mmdit.encoders.text import TextEncoders, apply_padding, clip_lengths, resize_streams, t5_lengths
from mmdit.encoders.vae import AutoencoderKL, to_pixels

_FORMAT = 1
_IMAGES = 64  # encoded at once: the VAE's activations then stay in the CPU's cache, 1.5 times the speed of 256
_CAPTIONS = 4096


class Stream(NamedTuple):
    """One encoder stream of all distinct captions: states fp16 [captions, longest, width]; lengths int64 [captions]."""

    name: str
    states: np.ndarray
    lengths: np.ndarray


class CachedLatents:
    """Batches by index out of arrays, in memory or memory-mapped.

    Args:
        arrays: as `precompute` writes them: latents fp16 [n, C, H, W], caption_ids [n], pooled, and per stream
            `<name>.states` and `<name>.lengths`.
        padding: the run's policy, applied in `batch`.
        context_dim: E; narrower streams are zero-padded to it.
        full_lengths: tokens of each untrimmed stream, by name, in order.
    """

    def __init__(
        self, arrays: dict[str, np.ndarray], padding: str, context_dim: int, full_lengths: dict[str, int]
    ) -> None:
        self.latents, self.caption_ids = arrays["latents"], arrays["caption_ids"]
        self.pooled = arrays.get("pooled")
        self.streams = [Stream(n, arrays[f"{n}.states"], arrays[f"{n}.lengths"]) for n in full_lengths]
        self.padding, self.context_dim, self.full_lengths = padding, context_dim, full_lengths

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """C, H, W."""
        return tuple(self.latents.shape[1:])

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Conditioning]:
        """Return latents float32 [B, C, H, W] and the Conditioning of their captions, the padding policy applied."""
        indices = np.asarray(indices)
        latents = _widened(self.latents[indices])
        captions = np.asarray(self.caption_ids[indices])
        contexts, masks, layout, place = [], [], [], 0
        for name, states, lengths in self.streams:
            real = np.asarray(lengths[captions])
            longest = int(real.max())
            part = _widened(states[captions, :longest])  # [B, longest, width]
            contexts.append(F.pad(part, (0, self.context_dim - part.shape[2])))
            masks.append(torch.from_numpy(np.arange(longest)[None] < real[:, None]))
            layout.append((name, place, place + longest, part.shape[2]))
            place += longest
        pooled = None if self.pooled is None else _widened(self.pooled[captions])
        conditioning = Conditioning(torch.cat(contexts, dim=1), pooled, torch.cat(masks, dim=1), tuple(layout))
        if self.padding == "mask":
            conditioning = resize_streams(conditioning, list(self.full_lengths.values()))
        return latents, apply_padding(conditioning, self.padding)  # type: ignore[arg-type]


def _widened(half: np.ndarray) -> Tensor:
    """Turn a copy in fp16 into float32; torch converts several times faster than numpy."""
    return torch.from_numpy(half).float()


class LiveBatches:
    """The same batches, encoded anew each time: for data that is too large to cache, and to test the cache against."""

    def __init__(
        self,
        dataset: Any,
        vae: AutoencoderKL,
        text: TextEncoders,
        encoders: EncodersConfig,
        *,
        precision: str = "bf16",
        count: int | None = None,
    ) -> None:
        self.dataset, self.vae, self.text, self.encoders, self.precision = dataset, vae, text, encoders, precision
        self.count = min(count or len(dataset), len(dataset))

    def __len__(self) -> int:
        return self.count

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """C, H, W."""
        return tuple(self.batch([0])[0].shape[1:])

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Conditioning]:
        """As `CachedLatents.batch`."""
        latents = encode_images(self.vae, self.dataset.pixels(np.asarray(indices)), self.precision).float()
        padding = self.encoders.padding
        conditioning = self.text.encode(self.dataset.captions(np.asarray(indices)), padding=padding).to("cpu")
        return latents, conditioning.map(lambda x: x.half().float() if x.is_floating_point() else x)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: np.ndarray, precision: str = "bf16") -> Tensor:
    """Return the latents (posterior mean, shifted and scaled) of images uint8 [B, R, R, 3]: fp16 [B, C, H, W], CPU."""
    device = next(vae.parameters()).device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        latents = vae.encode(to_pixels(images).to(device))
    return latents.half().cpu().contiguous()


def precompute(
    dataset: Any,
    vae: AutoencoderKL,
    text: TextEncoders,
    encoders: EncodersConfig,
    *,
    cache_dir: str | Path | None = None,
    count: int | None = None,
    precision: str = "bf16",
    progress: bool = True,
    label: str = "encoding images",
) -> CachedLatents:
    """Encode a data set once, or open the cache of an earlier run that encoded the same.

    Args:
        dataset: gives pixels, captions and a fingerprint.
        vae, text: frozen encoders.
        encoders: padding and t5_length of the run.
        cache_dir: where caches are kept; None keeps this one in memory.
        count: encode the first `count` items only.
        precision: `bf16` or `fp32`, of the VAE.

    Raises:
        ValueError: the text encoders were built with another t5_length than the config's.
    """
    if text.t5_length != encoders.t5_length:
        raise ValueError(f"the text encoders have t5_length {text.t5_length}, the config says {encoders.t5_length}")
    count = min(count or len(dataset), len(dataset))
    key = {
        "format": _FORMAT,
        "data": dataset.fingerprint,
        "count": count,
        "vae": vae_fingerprint(vae),
        "text": text.fingerprint,
        "padding": "attend" if encoders.padding == "attend" else "real tokens",  # mask and trim store the same
        "t5_length": encoders.t5_length,
        "precision": precision,
    }
    full = {name: stop - start for name, start, stop, _ in text.streams}
    if cache_dir is None:
        arrays = _encode(dataset, vae, text, encoders, count, precision, None, progress, label)
        return CachedLatents(arrays, encoders.padding, text.context_dim, full)
    folder = Path(cache_dir) / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if not _is_whole(folder, key):
            for stale in folder.parent.glob(f".tmp-{folder.name}-*"):  # of a killed process: we hold the lock
                shutil.rmtree(stale, ignore_errors=True)
            temporary = folder.with_name(f".tmp-{folder.name}-{uuid.uuid4().hex[:8]}")
            temporary.mkdir()
            try:
                arrays = _encode(dataset, vae, text, encoders, count, precision, temporary, progress, label)
                for array in arrays.values():
                    array.flush()  # type: ignore[attr-defined]
                sizes = {p.name: p.stat().st_size for p in sorted(temporary.iterdir())}
                (temporary / "cache.json").write_text(json.dumps({"key": key, "sizes": sizes}, indent=1))
                shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    stored = {p.stem: np.load(p, mmap_mode="r") for p in sorted(folder.glob("*.npy"))}
    return CachedLatents(stored, encoders.padding, text.context_dim, full)


def vae_fingerprint(vae: AutoencoderKL) -> str:
    """Hash of a VAE's weights and config: two with the same one give the same latents."""
    digest = hashlib.sha256(vae.config.model_dump_json().encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _is_whole(folder: Path, key: dict[str, Any]) -> bool:
    """Say whether the folder holds a finished cache of this key; anything else is built again."""
    try:
        stored = json.loads((folder / "cache.json").read_text())
        return stored["key"] == key and all((folder / n).stat().st_size == s for n, s in stored["sizes"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the cache's lock; a process that died holding it has released it. One process at a time builds."""
    import fcntl

    with folder.with_name(f".lock-{folder.name}").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def _encode(
    dataset: Any,
    vae: AutoencoderKL,
    text: TextEncoders,
    encoders: EncodersConfig,
    count: int,
    precision: str,
    folder: Path | None,
    progress: bool,
    label: str,
) -> dict[str, np.ndarray]:
    """Fill the arrays of a cache, in memory or in files of `folder`."""

    def allocate(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        if folder is None:
            return np.zeros(shape, dtype)
        return np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)

    arrays: dict[str, np.ndarray] = {}
    chunks = [np.arange(start, min(start + _IMAGES, count)) for start in range(0, count, _IMAGES)]
    captions: list[str] = []
    # drawing or decoding pictures is Python and Pillow, the VAE is compiled code: they overlap in two threads
    with ThreadPoolExecutor(1) as pool, tqdm(total=count, desc=label, unit=" images", disable=not progress) as bar:
        following = pool.submit(dataset.pixels, chunks[0])
        for i, rows in enumerate(chunks):
            images = following.result()
            if i + 1 < len(chunks):
                following = pool.submit(dataset.pixels, chunks[i + 1])
            latents = encode_images(vae, images, precision).numpy()
            if "latents" not in arrays:
                arrays["latents"] = allocate("latents", (count, *latents.shape[1:]), np.float16)
            arrays["latents"][rows] = latents
            captions += dataset.captions(rows)
            bar.update(len(rows))

    numbers: dict[str, int] = {}
    ids = [numbers.setdefault(caption, len(numbers)) for caption in captions]
    arrays["caption_ids"] = allocate("caption_ids", (count,), np.int64)
    arrays["caption_ids"][:] = ids
    _encode_captions(list(numbers), text, encoders.padding, allocate, arrays)
    return arrays


def _encode_captions(captions: list[str], text: TextEncoders, padding: str, allocate: Any, arrays: Any) -> None:
    """Encode distinct captions in chunks of like length, so that a chunk's own trimming cuts most of its padding."""
    tokens = text.tokenize(captions)
    attend = padding == "attend"
    clip = [clip_lengths(tokens[name]) for name in ("clip_l", "clip_g") if name in tokens]
    lengths = {
        "clip": torch.stack(clip).amax(0) if clip else torch.ones(len(captions), dtype=torch.long),
        "t5": t5_lengths(tokens["t5"]) if "t5" in tokens else torch.ones(len(captions), dtype=torch.long),
    }
    for name, start, stop, width in text.streams:
        real = torch.full_like(lengths[name], stop - start) if attend else lengths[name].clamp(min=1)
        arrays[f"{name}.lengths"] = allocate(f"{name}.lengths", (len(captions),), np.int64)
        arrays[f"{name}.lengths"][:] = real.numpy()
        shape = (len(captions), int(real.max()), width)
        arrays[f"{name}.states"] = allocate(f"{name}.states", shape, np.float16)
    if text.pooled_dim:
        arrays["pooled"] = allocate("pooled", (len(captions), text.pooled_dim), np.float16)
    for chunk in torch.argsort(lengths["t5"], stable=True).split(_CAPTIONS):
        rows = chunk.sort().values.numpy()
        encoded = text.encode_ids({n: i[rows] for n, i in tokens.items()}, "attend" if attend else "trim").to("cpu")
        for name, start, stop, width in encoded.streams or ():
            arrays[f"{name}.states"][rows, : stop - start] = encoded.context[:, start:stop, :width].half().numpy()
        if encoded.pooled is not None:
            arrays["pooled"][rows] = encoded.pooled.half().numpy()
