"""Latents and text states computed once, and the live path that gives the same batches.

    source = precompute(dataset, vae, text, config.encoders, cache_dir=...)  # or LiveBatches(...)
    latents, conditioning = source.batch(indices)

Encoding every step would cost 7 to 9 times the training step of a small denoiser. A cache holds the latents of each
image (the mean of the VAE's posterior, fp16) and the text states of each *distinct* caption (fp16, real tokens only,
in padded arrays with lengths; with padding `attend` all tokens, because there they are read). Both paths round to fp16,
so whether a run caches does not change what it learns from. Caption dropout is not in here: it is drawn per step.

Latents and each encoder's states are caches of their own, folders named by the fingerprint of everything that decides
their content: a run with another T5 length encodes T5 anew and nothing else, and a run that uses fewer encoders, or
pools otherwise, encodes nothing. Rows of a study share them. A folder is built under a lock in a temporary one and
renamed, so a second process waits and then reads.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mmdit.config import EncodersConfig
from mmdit.denoiser import Conditioning
from mmdit.encoders.axes import Encoded, Padding, TextLayout, join
from mmdit.encoders.text import TextEncoders
from mmdit.encoders.vae import AutoencoderKL, to_pixels

_FORMAT = 2
_IMAGES = 64  # encoded at once: the VAE's activations then stay in the CPU's cache, 1.5 times the speed of 256
_CAPTIONS = 4096


Arrays = dict[str, np.ndarray]
Allocate = Callable[[str, tuple[int, ...], Any], np.ndarray]


class CachedLatents:
    """Batches by index out of arrays, in memory or memory-mapped.

    Args:
        images: latents fp16 [n, C, H, W] and caption_ids int64 [n].
        texts: by encoder, of all distinct captions: states fp16 [captions, longest, width], real int64 [captions],
            end (CLIP) and mean fp16 [captions, G].
        layout: how the encoders are joined.
        padding: the run's policy.
    """

    def __init__(self, images: Arrays, texts: Mapping[str, Arrays], layout: TextLayout, padding: Padding) -> None:
        self.latents, self.caption_ids = images["latents"], images["caption_ids"]
        self.texts, self.layout, self.padding = dict(texts), layout, padding

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """C, H, W."""
        return tuple(self.latents.shape[1:])

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Conditioning]:
        """Return latents float32 [B, C, H, W] and the Conditioning of their captions, the padding policy applied."""
        indices = np.asarray(indices)
        captions = np.asarray(self.caption_ids[indices])
        parts = {name: self._encoded(arrays, captions) for name, arrays in self.texts.items()}
        return _widened(self.latents[indices]), join(self.layout, parts, self.padding, len(indices))

    def _encoded(self, arrays: Arrays, captions: np.ndarray) -> Encoded:
        real = np.asarray(arrays["real"][captions])
        longest = arrays["states"].shape[1] if self.padding == "attend" else int(real.max())
        return Encoded(
            _widened(arrays["states"][captions, :longest]),  # [B, longest, width]
            torch.from_numpy(real),
            _widened(arrays["end"][captions]) if "end" in arrays else None,
            _widened(arrays["mean"][captions]),
        )


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
        if count is None and hasattr(dataset, "order"):  # shards have an order that suits disks
            self.order = dataset.order

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
    data = {"format": _FORMAT, "data": dataset.fingerprint, "count": count}

    def kept(key: dict[str, Any], encode: Callable[[Allocate], None]) -> Arrays:
        return _in_memory(encode) if cache_dir is None else _on_disk(Path(cache_dir), data | key, encode)

    images = kept(
        {"vae": vae_fingerprint(vae), "precision": precision},
        lambda allocate: _encode_images(dataset, vae, count, precision, allocate, progress, label),
    )
    attend = encoders.padding == "attend"

    @cache
    def tokens() -> dict[str, Tensor]:
        return text.tokenize(_distinct(dataset, images["caption_ids"]))

    texts = {}
    for name in text.towers:
        key = {
            "encoder": name,
            "weights": text.fingerprint_of(name),
            "padding": "attend" if attend else "real tokens",  # mask and trim store the same
            "length": encoders.t5_length if name == "t5" else None,
        }
        texts[name] = kept(key, lambda allocate, name=name: _encode_texts(text, name, tokens()[name], attend, allocate))  # type: ignore[misc]
    return CachedLatents(images, texts, text.layout, encoders.padding)


def _in_memory(encode: Callable[[Allocate], None]) -> Arrays:
    arrays: Arrays = {}

    def allocate(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        arrays[name] = np.zeros(shape, dtype)
        return arrays[name]

    encode(allocate)
    return arrays


def _on_disk(cache_dir: Path, key: dict[str, Any], encode: Callable[[Allocate], None]) -> Arrays:
    """Open the folder of this key, built before where it is not there or not whole."""
    folder = cache_dir / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if not _is_whole(folder, key):
            for stale in cache_dir.glob(f".tmp-{folder.name}-*"):  # of a killed process: we hold the lock
                shutil.rmtree(stale, ignore_errors=True)
            temporary = folder.with_name(f".tmp-{folder.name}-{uuid.uuid4().hex[:8]}")
            temporary.mkdir()
            try:
                _build(temporary, key, encode)
                shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return {p.stem: np.load(p, mmap_mode="r") for p in sorted(folder.glob("*.npy"))}


def _build(folder: Path, key: dict[str, Any], encode: Callable[[Allocate], None]) -> None:
    """Fill memory-mapped arrays of a folder, and record what they are."""
    opened: list[Any] = []

    def allocate(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        opened.append(np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape))
        return opened[-1]

    encode(allocate)
    for array in opened:
        array.flush()
    sizes = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
    (folder / "cache.json").write_text(json.dumps({"key": key, "sizes": sizes}, indent=1))


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


def _encode_images(
    dataset: Any, vae: AutoencoderKL, count: int, precision: str, allocate: Allocate, progress: bool, label: str
) -> None:
    """Fill `latents`, and `caption_ids`: captions numbered in the order in which they first appear."""
    latents: np.ndarray | None = None
    numbers: dict[str, int] = {}
    ids: list[int] = []
    chunks = [np.arange(start, min(start + _IMAGES, count)) for start in range(0, count, _IMAGES)]
    # drawing or decoding pictures is Python and Pillow, the VAE is compiled code: they overlap in two threads
    with ThreadPoolExecutor(1) as pool, tqdm(total=count, desc=label, unit=" images", disable=not progress) as bar:
        following = pool.submit(dataset.pixels, chunks[0])
        for i, rows in enumerate(chunks):
            images = following.result()
            if i + 1 < len(chunks):
                following = pool.submit(dataset.pixels, chunks[i + 1])
            encoded = encode_images(vae, images, precision).numpy()
            if latents is None:
                latents = allocate("latents", (count, *encoded.shape[1:]), np.float16)
            latents[rows] = encoded
            ids += [numbers.setdefault(caption, len(numbers)) for caption in dataset.captions(rows)]
            bar.update(len(rows))
    allocate("caption_ids", (count,), np.int64)[:] = ids


def _distinct(dataset: Any, caption_ids: np.ndarray) -> list[str]:
    """Return the distinct captions in the order of their numbers."""
    _, first_places = np.unique(np.asarray(caption_ids), return_index=True)
    captions: list[str] = dataset.captions(first_places)
    return captions


def _encode_texts(text: TextEncoders, name: str, ids: Tensor, attend: bool, allocate: Allocate) -> None:
    """Run one encoder over distinct captions, in chunks of like length: a chunk's own trimming cuts most padding."""
    real = text.real_lengths(name, ids)
    allocate("real", (len(ids),), np.int64)[:] = real.numpy()
    arrays: Arrays = {}
    for chunk in torch.argsort(real, stable=True).split(_CAPTIONS):
        rows = chunk.sort().values.numpy()
        encoded = text.run_encoder(name, ids[rows], "attend" if attend else "mask")
        if not arrays:
            longest = ids.shape[1] if attend else max(1, int(real.max()))
            arrays["states"] = allocate("states", (len(ids), longest, encoded.states.shape[2]), np.float16)
            for field in ("end", "mean"):
                vectors = getattr(encoded, field)
                if vectors is not None:
                    arrays[field] = allocate(field, (len(ids), vectors.shape[1]), np.float16)
        arrays["states"][rows, : encoded.states.shape[1]] = encoded.states.half().cpu().numpy()
        for field in ("end", "mean"):
            if field in arrays:
                arrays[field][rows] = getattr(encoded, field).half().cpu().numpy()
