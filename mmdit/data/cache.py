"""Latents and text states computed once, and the live path that gives the same batches.

    source = precompute(dataset, vae, text, config.encoders, cache_dir=...)  # or LiveBatches(...)
    latents, conditioning = source.batch(indices)

Encoding every step would cost 7 to 9 times the training step of a small denoiser. A cache holds the latents of each
image (the mean of the VAE's posterior, and its deviation where a run draws from it, fp16) and the text states of each
*distinct* caption (fp16, real tokens only; with padding `attend` all tokens, because there they are read). Both paths
round to fp16, so whether a run caches does not change what it learns from. Caption dropout is not in here: it is drawn
per step.

Latents, captions and each encoder's states are stores of their own (`mmdit.data.parts`), in folders named by the
fingerprint of everything that decides their content: a run with another T5 length encodes T5 anew and nothing else, and
a run that uses fewer encoders, or pools otherwise, encodes nothing. Rows of a study share them; several processes that
encode the same share the work.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdit.config import ConfigError, EncodersConfig
from mmdit.data import parts
from mmdit.data.parts import Arrays, Rows
from mmdit.denoiser import Conditioning
from mmdit.encoders.axes import Encoded, Padding, TextLayout, join
from mmdit.encoders.text import TextEncoders
from mmdit.encoders.vae import AutoencoderKL, to_pixels
from mmdit.untrusted import read_json

_FORMAT = 3
_IMAGES = 64  # encoded at once: the VAE's activations then stay in the CPU's cache, 1.5 times the speed of 256
_CAPTIONS = 4096
PART_IMAGES = 8192  # rows of a part; what a killed process loses at most
PART_CAPTIONS = 16384

Draw = Callable[[tuple[int, ...]], np.ndarray]  # shape of one image's latents -> standard normal [B, C, H, W]


class CachedLatents:
    """Batches by index out of arrays, in memory or memory-mapped.

    Args:
        images: latents fp16 [n, C, H, W]; `deviation` of the same shape where the run draws from the posterior.
        caption_ids: int64 [n], which of the distinct captions belongs to each image.
        texts: by encoder, of all distinct captions: states fp16, ragged, [tokens, width]; real int64; end (CLIP) and
            mean fp16 [captions, G].
        layout: how the encoders are joined.
        padding: the run's policy.
    """

    def __init__(
        self,
        images: Rows,
        caption_ids: np.ndarray,
        texts: Mapping[str, Rows],
        layout: TextLayout,
        padding: Padding,
    ) -> None:
        self.images, self.caption_ids = images, np.asarray(caption_ids)
        self.texts, self.layout, self.padding = dict(texts), layout, padding

    def __len__(self) -> int:
        return len(self.images)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """C, H, W."""
        return self.images.shape("latents")

    def batch(self, indices: Sequence[int] | np.ndarray, draw: Draw | None = None) -> tuple[Tensor, Conditioning]:
        """Return latents float32 [B, C, H, W] and the Conditioning of their captions, the padding policy applied.

        Args:
            draw: noise for latents drawn from the VAE's posterior; None gives its mean.
        """
        indices = np.asarray(indices)
        captions = self.caption_ids[indices]
        latents = _widened(self.images.take("latents", indices))
        if draw is not None and "deviation" in self.images:
            latents = latents + _widened(self.images.take("deviation", indices)) * torch.from_numpy(
                draw(self.latent_shape)
            )
        encoded = {name: _encoded(rows, captions) for name, rows in self.texts.items()}
        return latents, join(self.layout, encoded, self.padding, len(indices))


def _encoded(rows: Rows, captions: np.ndarray) -> Encoded:
    states, _ = rows.take_ragged("states", captions)
    return Encoded(
        _widened(states),  # [B, longest, width]
        torch.from_numpy(rows.take("real", captions)),
        _widened(rows.take("end", captions)) if "end" in rows else None,
        _widened(rows.take("mean", captions)),
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

    def batch(self, indices: Sequence[int] | np.ndarray, draw: Draw | None = None) -> tuple[Tensor, Conditioning]:
        """As `CachedLatents.batch`."""
        drawing = draw is not None and self.encoders.posterior == "sample"
        mean, deviation = encode_images(self.vae, self.dataset.pixels(np.asarray(indices)), self.precision, drawing)
        latents = mean.float()
        if draw is not None and deviation is not None:
            latents = latents + deviation.float() * torch.from_numpy(draw(tuple(latents.shape[1:])))
        padding = self.encoders.padding
        conditioning = self.text.encode(self.dataset.captions(np.asarray(indices)), padding=padding).to("cpu")
        return latents, conditioning.map(lambda x: x.half().float() if x.is_floating_point() else x)


@torch.no_grad()
def encode_images(
    vae: AutoencoderKL, images: np.ndarray, precision: str = "bf16", deviation: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Encode images uint8 [B, R, R, 3]: mean of the posterior, and if asked its deviation, fp16 [B, C, H, W], CPU.

    Both are in the units of latents: shifted and scaled, the deviation scaled.
    """
    device = next(vae.parameters()).device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        mean, logvar = vae.moments(to_pixels(images).to(device))
        latents = vae.normalise(mean)
    spread = None
    if deviation:
        raw = torch.exp(0.5 * logvar.float())
        scaled = vae.normalise(raw) - vae.normalise(torch.zeros_like(raw))
        spread = scaled.half().cpu().contiguous()
    return latents.half().cpu().contiguous(), spread


def precompute(
    dataset: Any,
    vae: AutoencoderKL,
    text: TextEncoders,
    encoders: EncodersConfig,
    *,
    cache_dir: str | Path | None = None,
    count: int | None = None,
    precision: str = "bf16",
    verify: bool = True,
    require: bool = False,
    progress: bool = True,
    label: str = "encoding images",
) -> CachedLatents:
    """Encode a data set once, or open the cache of an earlier run that encoded the same.

    Args:
        dataset: gives pixels, captions and a fingerprint.
        vae, text: frozen encoders.
        encoders: padding, t5_length and posterior of the run.
        cache_dir: where caches are kept; None keeps this one in memory.
        count: encode the first `count` items only.
        precision: `bf16` or `fp32`, of the VAE.
        verify: compare what is there with its SHA-256; a part that differs is encoded anew.
        require: encode nothing; a cache that is not there, or not whole, is an error.

    Raises:
        ValueError: the text encoders were built with another t5_length than the config's.
        ConfigError: the disk has no room for it; or `require`, and something is missing: says what is there instead.
    """
    if text.t5_length != encoders.t5_length:
        raise ValueError(f"the text encoders have t5_length {text.t5_length}, the config says {encoders.t5_length}")
    count = min(count or len(dataset), len(dataset))
    places = _Places(cache_dir, {"format": _FORMAT, "data": dataset.fingerprint, "count": count}, verify, progress)
    attend, drawing = encoders.padding == "attend", encoders.posterior == "sample"
    image_key = {"vae": vae_fingerprint(vae), "precision": precision, "posterior": encoders.posterior}
    text_keys = {name: _text_key(text, name, encoders) for name in text.towers}
    if require:
        places.require([image_key, *text_keys.values()])

    ids = places.open({"captions": "numbers"}, count, count, lambda rows: _number_captions(dataset, rows)).parts[0]
    caption_ids = np.asarray(ids["caption_ids"])
    absent = [name for name, key in text_keys.items() if not places.has(key)]
    captions = _distinct(dataset, caption_ids) if absent else []
    tokens = text.tokenize(captions) if absent else {}
    distinct = int(caption_ids.max()) + 1
    if not places.has(image_key):
        one = dataset.pixels(np.arange(1)).shape
        shape = (vae.config.latent_channels, one[1] // vae.config.factor, one[2] // vae.config.factor)
        places.announce(f"{count:,} images to latents of {shape}", 2 * count * int(np.prod(shape)) * (1 + drawing))
    for name in absent:
        real = tokens[name].shape[1] * distinct if attend else int(text.real_lengths(name, tokens[name]).sum())
        places.announce(f"{distinct:,} captions by {name}", 2 * real * text.towers[name].width)
    places.check_room()
    images = places.open(
        image_key, count, PART_IMAGES,
        lambda rows: _encode_images(dataset, vae, rows, precision, drawing), label,
    )  # fmt: skip
    texts = {
        name: places.open(
            key, distinct, PART_CAPTIONS,
            lambda rows, name=name: _encode_texts(text, name, tokens[name][rows], attend),  # type: ignore[misc]
        )
        for name, key in text_keys.items()
    }  # fmt: skip
    return CachedLatents(images, caption_ids, texts, text.layout, encoders.padding)


class _Places:
    """Where the stores of one data set lie, or memory; and how much room those will take that are not there yet."""

    def __init__(self, cache_dir: str | Path | None, data: dict[str, Any], verify: bool, progress: bool) -> None:
        self.root = None if cache_dir is None else Path(cache_dir)
        self.data, self.verify, self.progress = data, verify, progress
        self.wanted = 0
        self._verified: set[Path] = set()

    def folder(self, key: dict[str, Any]) -> Path:
        assert self.root is not None
        return self.root / hashlib.sha256(json.dumps(self.data | key, sort_keys=True).encode()).hexdigest()[:20]

    def has(self, key: dict[str, Any]) -> bool:
        """Say whether a store is complete and, where it is looked at, whole."""
        if self.root is None:
            return False
        folder = self.folder(key)
        if folder not in self._verified and parts.is_complete(folder, self.data | key, self.verify):
            self._verified.add(folder)
        return folder in self._verified

    def open(self, key: dict[str, Any], count: int, part_rows: int, encode: parts.Encode, label: str = "") -> Rows:
        """Open a store, or make it."""
        if self.root is None:
            return parts.in_memory(count, encode)
        self.root.mkdir(parents=True, exist_ok=True)
        again = self.verify and self.folder(key) not in self._verified
        return parts.build(
            self.folder(key), self.data | key, count, part_rows, encode, verify=again, progress=self.progress,
            label=label or " ".join(map(str, list(key.values())[:1])), say=self._say,
        )  # fmt: skip

    def announce(self, what: str, size: int) -> None:
        """Note what will be encoded, and say how much disk it takes."""
        self.wanted += size
        if self.root is not None:
            self._say(f"to encode: {what}, {size / 2**20:,.1f} MiB under {self.root}")

    def check_room(self) -> None:
        """Refuse to begin what the disk cannot hold.

        Raises:
            ConfigError: how much is missing.
        """
        if self.root is None or not self.wanted:
            return
        self.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root).free
        if free < 1.02 * self.wanted:
            raise ConfigError(
                f"the cache needs {self.wanted / 2**30:.2f} GiB, {self.root} has {free / 2**30:.2f} free; choose "
                f"another train.cache_dir, or train.precompute false"
            )

    def require(self, keys: Sequence[dict[str, Any]]) -> None:
        """Refuse to go on where a store is missing, naming what differs in those that are there.

        Raises:
            ConfigError: which setting the nearest store was made with.
        """
        missing = [key for key in keys if self.root is None or not self.has(key)]
        if not missing:
            return
        problems = []
        for key in missing:
            wanted = self.data | key
            others = [k for k in self._stored() if set(k) == set(wanted)]
            nearest = min(others, key=lambda k: sum(k[n] != wanted[n] for n in wanted), default=None)
            name = wanted.get("encoder", "latents")
            if nearest is None:
                problems.append(f"no cache of {name}")
            else:
                differing = [n for n in wanted if nearest[n] != wanted[n]]
                problems.append(f"the cache of {name} was made with another {', '.join(differing) or 'content'}")
        raise ConfigError(
            f"train.require_cache: {'; '.join(problems)} in {self.root}; make it with `python scripts/cache.py "
            f"CONFIG`, or set --train.require_cache false"
        )

    def _stored(self) -> list[dict[str, Any]]:
        found = []
        for path in self.root.glob("*/parts.json") if self.root is not None and self.root.is_dir() else ():
            try:
                found.append(read_json(path)["key"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return found

    def _say(self, line: str) -> None:
        if self.progress:
            print(line, flush=True)


def _text_key(text: TextEncoders, name: str, encoders: EncodersConfig) -> dict[str, Any]:
    return {
        "encoder": name,
        "weights": text.fingerprint_of(name),
        "padding": "attend" if encoders.padding == "attend" else "real tokens",  # mask and trim store the same
        "length": encoders.t5_length if name == "t5" else None,
    }


def vae_fingerprint(vae: AutoencoderKL) -> str:
    """Hash of a VAE's weights and config: two with the same one give the same latents."""
    digest = hashlib.sha256(vae.config.model_dump_json().encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _number_captions(dataset: Any, rows: np.ndarray) -> Arrays:
    """Number captions in the order in which they first appear: caption_ids int64 [n]."""
    numbers: dict[str, int] = {}
    ids: list[int] = []
    for chunk in np.array_split(rows, max(1, len(rows) // _CAPTIONS)):
        ids += [numbers.setdefault(caption, len(numbers)) for caption in dataset.captions(chunk)]
    return {"caption_ids": np.array(ids, dtype=np.int64)}


def _encode_images(dataset: Any, vae: AutoencoderKL, rows: np.ndarray, precision: str, deviation: bool) -> Arrays:
    """Encode some items: `latents` and, if asked, `deviation`."""
    chunks = [rows[start : start + _IMAGES] for start in range(0, len(rows), _IMAGES)]
    found: dict[str, list[np.ndarray]] = {"latents": [], "deviation": []}
    # drawing or decoding pictures is Python and Pillow, the VAE is compiled code: they overlap in two threads
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(dataset.pixels, chunks[0])
        for i in range(len(chunks)):
            images = following.result()
            if i + 1 < len(chunks):
                following = pool.submit(dataset.pixels, chunks[i + 1])
            for name, tensor in zip(found, encode_images(vae, images, precision, deviation), strict=True):
                if tensor is not None:
                    found[name].append(tensor.numpy())
    return {name: np.concatenate(arrays) for name, arrays in found.items() if arrays}


def _distinct(dataset: Any, caption_ids: np.ndarray) -> list[str]:
    """Return the distinct captions in the order of their numbers."""
    _, first_places = np.unique(caption_ids, return_index=True)
    captions: list[str] = dataset.captions(first_places)
    return captions


def _encode_texts(text: TextEncoders, name: str, ids: Tensor, attend: bool) -> Arrays:
    """Run one encoder over distinct captions, in chunks of like length: a chunk's own trimming cuts most padding."""
    real = text.real_lengths(name, ids)
    kept = torch.full_like(real, ids.shape[1]) if attend else real
    states: list[np.ndarray] = [np.empty(0)] * len(ids)
    vectors: dict[str, np.ndarray] = {}
    for chunk in torch.argsort(real, stable=True).split(_CAPTIONS):
        rows = chunk.sort().values.numpy()
        encoded = text.run_encoder(name, ids[rows], "attend" if attend else "mask")
        for row, out in zip(rows, encoded.states.half().cpu().numpy(), strict=True):
            states[row] = out[: int(kept[row])]
        for field in ("end", "mean"):
            values = getattr(encoded, field)
            if values is not None:
                vectors.setdefault(field, np.empty((len(ids), values.shape[1]), np.float16))
                vectors[field][rows] = values.half().cpu().numpy()
    counts = {"states.count": kept.numpy(), "real": real.numpy()}
    return {"states": np.concatenate(states), **counts, **vectors}
