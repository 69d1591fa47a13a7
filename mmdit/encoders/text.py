"""Captions to Conditioning: CLIP-L, CLIP-G and T5 joined as in SD3, or as the U-Net releases do.

    lg      = [CLIP-L penultimate states ; CLIP-G penultimate states]   by feature, zero-padded to T5's width
    context = [lg ; T5 last states]                                     by token, 77 + t5_length
    pooled  = [CLIP-L state at the end token ; CLIP-G's, projected]

Source: Esser et al. 2024, arXiv:2403.03206v1, section 4 and B.3, and the released sd3-ref. The tiny encoders that are
shipped and released ones take this same road; only sizes differ. SD1.5 and SDXL have CLIP's stream alone, under the
rules of `encoders.families`.

Padding. `attend` is what the releases do: T5 reads its padding, and the context carries no mask. Under `mask` and
`trim` T5 runs with an attention mask, so that what a token becomes does not depend on how much padding stands behind
it; states of padding are zero and masked. (CLIP is causal: padding after the end token changes nothing before it.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.config import CaptionDropoutConfig
from mmdit.denoiser import Conditioning, Streams
from mmdit.encoders.families import CLIPS, FAMILIES, NUM_SIZES, SIZE_WIDTH, embed_sizes
from mmdit.encoders.released import load_released
from mmdit.encoders.tokenizers import (
    CLIP_END,
    CLIP_LENGTH,
    T5_END,
    T5_PAD,
    TINY,
    ReleasedT5Tokenizer,
    T5Tokenizer,
    pad,
)
from mmdit.encoders.towers import States, Tower, load_tiny, pooled_width, tower_states
from mmdit.registry import lookup

Padding = Literal["attend", "mask", "trim"]
Null = Literal["zeros", "empty_caption"]
CLIP_PAD = {"clip_l": CLIP_END, "clip_g": 0}  # sd3-ref pads the second tower with id 0
T5_HINT = (
    ". T5 reads google/t5-v1_1-xxl's spiece.model or tokenizer.json (a release's folder tokenizer_3): put it beside "
    "the weights, pass tokenizers={'t5': PATH}, or leave T5 out with use=('clip_l', 'clip_g')"
)
_BATCH = 512  # rows run through a tower at once


class TextEncoders:
    """Text encoders behind one call; any may be missing and then contributes zeros, as SD3 does without T5.

    Args:
        towers: by name, a subset of the family's encoders.
        tokenizers: by name; an encoder without one still takes ids.
        context_dim: E, T5's width where there is a T5.
        t5_length: tokens of the T5 stream.
        padding: default policy of `encode`; see the module's text.
        family: whose rules join the states, a name in `FAMILIES`.
        absent: {name: (width, pooled width)} of CLIP towers that are left out but whose features stay, as zeros; one
            that is in neither has no features at all.

    Raises:
        ValueError: a tower the family does not have, or widths that do not fit into `context_dim`.
    """

    def __init__(
        self,
        towers: Mapping[str, Tower],
        tokenizers: Mapping[str, Any],
        *,
        context_dim: int,
        t5_length: int = 77,
        padding: Padding = "mask",
        family: str = "sd3",
        absent: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        if t5_length < 1:
            raise ValueError(f"t5_length must be at least 1 token, got {t5_length}")
        self.rules = lookup(FAMILIES, family, "family of text encoders")
        strange = [name for name in towers if name not in self.rules.encoders]
        if strange:
            raise ValueError(f"{family} has no encoder {', '.join(strange)}; it has {', '.join(self.rules.encoders)}")
        self.family, self.towers, self.tokenizers = family, dict(towers), dict(tokenizers)
        self.context_dim, self.t5_length, self.padding = context_dim, t5_length, padding
        self._absent = {name: widths for name, widths in (absent or {}).items() if name not in self.towers}
        self._clip_width = sum(self._width(name) for name in CLIPS)
        if self._clip_width > context_dim:
            raise ValueError(f"CLIP states of width {self._clip_width} do not fit into context_dim {context_dim}")
        for tower in self.towers.values():
            tower.module.eval().requires_grad_(False)
        self._fingerprint: str | None = None

    def _width(self, name: str) -> int:
        return self.towers[name].width if name in self.towers else self._absent.get(name, (0, 0))[0]

    def _pooled_width(self, name: str) -> int:
        if name in self.towers:
            return pooled_width(self.towers[name].module)
        return self._absent.get(name, (0, 0))[1]

    @property
    def device(self) -> torch.device:
        """Where conditionings are made: the encoders' device, the CPU where there are none."""
        return next((tower.state_mean.device for tower in self.towers.values()), torch.device("cpu"))

    @property
    def clip_l_width(self) -> int:
        """Where CLIP-L ends and CLIP-G begins, in the features of the CLIP stream and of `pooled`."""
        return self._width("clip_l")

    @property
    def pooled_dim(self) -> int:
        """G; 0 where the family has no pooled vector."""
        sizes = NUM_SIZES * SIZE_WIDTH if self.rules.sizes else 0
        return sum(self._pooled_width(name) for name in self.rules.pooled) + sizes

    @property
    def streams(self) -> Streams:
        """Where each stream lies in an untrimmed context: (name, start, stop, width)."""
        return self._streams([CLIP_LENGTH, self.t5_length])

    def _streams(self, lengths: Sequence[int]) -> Streams:
        clip = ("clip", 0, lengths[0], self._clip_width)
        if "t5" not in self.rules.encoders:
            return (clip,)
        return (clip, ("t5", lengths[0], lengths[0] + lengths[1], self.context_dim))

    def to(self, device: torch.device | str) -> TextEncoders:
        """Move the encoders; conditionings are then made there."""
        for name, (module, mean, std) in self.towers.items():
            self.towers[name] = Tower(module.to(device), mean.to(device), std.to(device))
        return self

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return padded ids: {"clip_l": int64 [B, 77], "clip_g": [B, 77], "t5": [B, t5_length]}.

        Only encoders whose tokenizer is present appear.

        Raises:
            ValueError: `prompts` is one string, or empty; pass a list.
        """
        _check_prompts(prompts)
        ids = {}
        rows: dict[int, list[list[int]]] = {}  # the two CLIP towers usually share one tokenizer
        for name, value in CLIP_PAD.items():
            if name in self.tokenizers:
                tokenizer = self.tokenizers[name]
                if id(tokenizer) not in rows:
                    rows[id(tokenizer)] = tokenizer(prompts)
                ids[name] = pad(rows[id(tokenizer)], value, CLIP_LENGTH)
        if "t5" in self.tokenizers:
            ids["t5"] = pad(self.tokenizers["t5"](prompts, self.t5_length), T5_PAD, self.t5_length)
        return ids

    def encode(
        self, prompts: Sequence[str], padding: Padding | None = None, *, sizes: Tensor | None = None
    ) -> Conditioning:
        """Encode prompts, equal ones once; see `encode_ids`.

        Raises:
            ValueError: an encoder has no tokenizer; give `encode_ids` its ids.
        """
        self._check_sizes(sizes)
        return self._with_sizes(self._encode(prompts, padding), sizes)

    def _encode(self, prompts: Sequence[str], padding: Padding | None) -> Conditioning:
        missing = [name for name in self.towers if name not in self.tokenizers]
        if missing:
            hint = T5_HINT if "t5" in missing else ""
            raise ValueError(
                f"no tokenizer for {', '.join(missing)}: add its folder, or call encode_ids with ids{hint}"
            )
        _check_prompts(prompts)
        places = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        encoded = self._encode_ids(self.tokenize(list(places)), padding, len(places))
        if len(places) == len(prompts):
            return encoded
        return encoded.index(torch.tensor([places[prompt] for prompt in prompts], device=self.device))

    def encode_ids(
        self, ids: Mapping[str, Tensor], padding: Padding | None = None, *, sizes: Tensor | None = None
    ) -> Conditioning:
        """Encode ids as `tokenize` gives them.

        Equal rows are computed once and rows of like length together, so 32,000 short captions cost seconds.

        Args:
            ids: int64 [B, 77] for `clip_l`, `clip_g`; [B, L] for `t5`.
            padding: `attend`: untrimmed, no mask; `mask`: untrimmed, `context_mask` True on real tokens (the end token
                is the last one); `trim`: as `mask`, cut to the longest row of each stream.
            sizes: int [B, 6] in pixels, SDXL's alone, see `families.embed_sizes`; they end `pooled`.

        Returns:
            context [B, 77 + L, E] (77 where the family has no T5), pooled [B, G], context_mask as above, streams.

        Raises:
            ValueError: ids are missing or beyond an encoder's vocabulary; sizes are missing, or given where there are
                none.
        """
        self._check_sizes(sizes)
        if not ids:
            raise ValueError(f"encode_ids got no ids; expected {', '.join(self.towers) or 'at least one row'}")
        return self._with_sizes(self._encode_ids(ids, padding, next(iter(ids.values())).shape[0]), sizes)

    @torch.no_grad()
    def _encode_ids(self, ids: Mapping[str, Tensor], padding: Padding | None, batch: int) -> Conditioning:
        padding = padding or self.padding
        self._check_ids(ids)
        keep = padding == "attend"
        clip, clip_real, pooled = self._clip_stream(ids, batch, keep)
        parts, reals = [clip], [clip_real]
        if "t5" in self.rules.encoders:
            states, real = self._t5_stream(ids, batch, keep)
            parts, reals = [clip, states], [clip_real, real]
        reals = [real.clamp(min=1) for real in reals]  # a missing encoder keeps one null token
        lengths = [CLIP_LENGTH, ids["t5"].shape[1] if "t5" in self.towers else self.t5_length]
        if padding == "trim":
            lengths = [int(real.max()) for real in reals]
        context = torch.cat([_lengthen(part, n) for part, n in zip(parts, lengths, strict=False)], dim=1)
        mask = None
        if padding != "attend":
            mask = torch.cat([_first(real, n) for real, n in zip(reals, lengths, strict=False)], dim=1).to(self.device)
        return Conditioning(context, pooled, mask, self._streams(lengths))

    def _clip_stream(self, ids: Mapping[str, Tensor], batch: int, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return CLIP's states [B, l, E], their counts of real tokens [B] and the pooled vectors [B, G]."""
        states, vectors, reals = {}, {}, [torch.zeros(batch, dtype=torch.long)]
        for name in CLIPS:
            if name in self.towers:
                reals.append(clip_lengths(ids[name]))
                states[name], vectors[name] = _run(
                    self.towers[name], ids[name].to(self.device), reals[-1].to(self.device), keep, self.rules.states
                )
        length = max([part.shape[1] for part in states.values()], default=CLIP_LENGTH)
        features = [
            _lengthen(states[name], length)
            if name in states
            else torch.zeros(batch, length, self._width(name), device=self.device)
            for name in CLIPS
        ]
        joined = torch.cat(features, dim=2)  # [B, l, clip_width]
        pooled = [
            vectors[name] if name in vectors else torch.zeros(batch, self._pooled_width(name), device=self.device)
            for name in self.rules.pooled
        ]
        vector = torch.cat(pooled, dim=1) if pooled else None
        real = torch.stack(reals).amax(dim=0)
        return (
            F.pad(joined, (0, self.context_dim - joined.shape[2])),  # [B, l, E]
            real,
            vector if vector is not None and vector.shape[1] else None,
        )

    def _t5_stream(self, ids: Mapping[str, Tensor], batch: int, keep: bool) -> tuple[Tensor, Tensor]:
        """Return T5's states [B, l, E] and their counts of real tokens [B]; zeros where there is no T5."""
        if "t5" not in self.towers:
            zeros = torch.zeros(batch, self.t5_length, self.context_dim, device=self.device)
            return zeros, torch.zeros(batch, dtype=torch.long)
        real = t5_lengths(ids["t5"])
        states, _ = _run(self.towers["t5"], ids["t5"].to(self.device), real.to(self.device), keep)
        return states, real

    def _check_ids(self, ids: Mapping[str, Tensor]) -> None:
        absent = [name for name in self.towers if name not in ids]
        if absent:
            raise ValueError(f"encode_ids got no ids for {', '.join(absent)}; got {', '.join(ids) or 'none'}")
        for name, tower in self.towers.items():
            largest, size = int(ids[name].max()), int(tower.module.config.vocab_size)
            if largest >= size:
                raise ValueError(
                    f"{name} got the id {largest}, its vocabulary has {size}: this tokenizer belongs to another encoder"
                )

    def _check_sizes(self, sizes: Tensor | None) -> None:
        if self.rules.sizes and sizes is None:
            raise ValueError(
                f"{self.family} is told six sizes in pixels beside the text: pass sizes=[B, 6], original height and "
                "width, crop top and left, target height and width, such as [[1024, 1024, 0, 0, 1024, 1024]]"
            )
        if sizes is not None and not self.rules.sizes:
            raise ValueError(f"sizes belong to SDXL; {self.family} has none, leave them out")

    def _with_sizes(self, conditioning: Conditioning, sizes: Tensor | None) -> Conditioning:
        if sizes is None:
            return conditioning
        assert conditioning.pooled is not None
        embedded = embed_sizes(torch.as_tensor(sizes).to(self.device), conditioning.pooled.shape[0])
        return conditioning._replace(pooled=torch.cat([conditioning.pooled, embedded], dim=1))

    def null(
        self, batch: int, null: Null = "zeros", padding: Padding | None = None, *, sizes: Tensor | None = None
    ) -> Conditioning:
        """Return what stands for "no text", `batch` equal rows; training dropout and guidance both use it.

        `zeros`: zero context and pooled, one attended token in each stream. `empty_caption`: the encoded "". SDXL's
        sizes, [B, 6] or [1, 6], are no text: they stay in both.
        """
        padding = padding or self.padding
        self._check_sizes(sizes)
        if null == "empty_caption":
            return self._with_sizes(self._encode([""], padding).repeat(batch), sizes)
        if null != "zeros":
            raise ValueError(f"unknown null {null!r}; use 'zeros' or 'empty_caption'")
        lengths = [1, 1] if padding == "trim" else [CLIP_LENGTH, self.t5_length]
        streams = self._streams(lengths)
        mask = None
        if padding != "attend":
            mask = torch.cat([_first(torch.ones(batch), stop - start) for _, start, stop, _ in streams], dim=1)
        pooled = sum(self._pooled_width(name) for name in self.rules.pooled)
        conditioning = Conditioning(
            torch.zeros(batch, streams[-1][2], self.context_dim, device=self.device),
            torch.zeros(batch, pooled, device=self.device) if pooled else None,
            mask if mask is None else mask.to(self.device),
            streams,
        )
        return self._with_sizes(conditioning, sizes)

    @property
    def fingerprint(self) -> str:
        """Hash of all weights, vocabularies and rules: two encoders with the same one give the same states."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            if self.family != "sd3" or self._absent:
                digest.update(f"{self.family} {sorted(self._absent.items())}".encode())
            for name, tower in sorted(self.towers.items()):
                tensors = {**tower.module.state_dict(), "state_mean": tower.state_mean, "state_std": tower.state_std}
                for key, tensor in sorted(tensors.items()):
                    digest.update(f"{name}.{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
                    digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            t5 = self.tokenizers.get("t5")
            if isinstance(t5, T5Tokenizer | ReleasedT5Tokenizer):
                digest.update(t5.fingerprint.encode())
            if not all(getattr(self.tokenizers.get(name), "cleaned", True) for name in CLIPS):
                digest.update(b"prompts are read as released")
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


def _check_prompts(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of strings, got the string {prompts!r}; write [{prompts!r}]")
    if len(prompts) == 0:
        raise ValueError('got no prompts; pass at least one, the empty caption is [""]')


def clip_lengths(ids: Tensor) -> Tensor:
    """Count real tokens, the first end token included: int64 [B]; rows without an end token are real throughout."""
    ends = ids == CLIP_END
    return torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, ids.shape[1]).cpu()


def t5_lengths(ids: Tensor) -> Tensor:
    """Count real tokens, the end token included: int64 [B]; without one, up to the last that is not padding."""
    ends = ids == T5_END
    places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    unpadded = torch.where(ids != T5_PAD, places, 0).amax(dim=1)
    return torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, unpadded).cpu()


def _first(counts: Tensor, length: int) -> Tensor:
    """True on the first counts[i] of `length` places: bool [B, length]."""
    return torch.arange(length)[None] < counts.cpu()[:, None]


def _lengthen(states: Tensor, length: int) -> Tensor:
    """Zero-pad (or cut) [B, l, width] to [B, length, width]."""
    return F.pad(states[:, :length], (0, 0, 0, max(0, length - states.shape[1])))


def _run(
    tower: Tower, ids: Tensor, real: Tensor, keep: bool, which: States = "penultimate"
) -> tuple[Tensor, Tensor | None]:
    """Run one tower over distinct rows, sorted by length.

    Args:
        ids: [B, L].
        real: [B] real tokens.
        keep: run at full length without a mask and keep the states of padding; else they are zero.
        which: states of CLIP, see `tower_states`.

    Returns:
        Standardised states [B, longest, width], longest = L with `keep`; pooled [B, G] for a CLIP tower, None for T5.
    """
    ids, inverse = torch.unique(ids, dim=0, return_inverse=True)
    real = real.new_zeros(ids.shape[0]).scatter_(0, inverse, real)  # equal rows have equal length
    length = ids.shape[1] if keep else max(1, int(real.max()))
    states = torch.zeros(ids.shape[0], length, tower.width, device=ids.device)
    pooled = None
    for rows in torch.argsort(real, stable=True).split(_BATCH):
        stop = length if keep else max(1, int(real[rows].max()))
        mask = None if keep else _first(real[rows], stop).to(ids.device)
        out, vector = tower_states(tower.module, ids[rows, :stop], mask, which)
        out = (out.float() - tower.state_mean) / tower.state_std
        states[rows, :stop] = out if mask is None else out * mask[:, :, None]
        if vector is not None:
            if pooled is None:
                pooled = torch.zeros(ids.shape[0], vector.shape[1], device=ids.device)
            pooled[rows] = vector.float()
    return states[inverse], None if pooled is None else pooled[inverse]


# --- what training and guidance do with a Conditioning --------------------------------------------------------------


def apply_padding(conditioning: Conditioning, padding: Padding) -> Conditioning:
    """Apply a padding policy to encoded captions; which one a run uses is a config field, because it changes results.

    `attend` drops the mask (for states that were encoded with padding `attend`), `mask` keeps everything, `trim` cuts
    each stream to its longest row in this batch.

    Raises:
        ValueError: `mask` or `trim` without a `context_mask`.
    """
    if padding == "attend":
        return conditioning._replace(context_mask=None)
    if padding not in ("mask", "trim"):
        raise ValueError(f"unknown padding {padding!r}; use 'attend', 'mask' or 'trim'")
    if conditioning.context_mask is None:
        raise ValueError(f"padding {padding!r} needs a context_mask; encode with padding='mask', not 'attend'")
    if padding == "mask":
        return conditioning
    places = torch.arange(conditioning.context.shape[1], device=conditioning.context.device)
    last = (places * conditioning.context_mask).amax(dim=0)  # a column's own index where any row attends to it, else 0
    lengths = [max(1, int(last[start:stop].max()) - start + 1) for _, start, stop, _ in _streams(conditioning)]
    return resize_streams(conditioning, lengths)


def resize_streams(conditioning: Conditioning, lengths: Sequence[int]) -> Conditioning:
    """Cut or zero-pad each stream to `lengths` tokens; what is added is masked where there is a mask."""
    contexts, masks, streams, place = [], [], [], 0
    for (name, start, stop, width), length in zip(_streams(conditioning), lengths, strict=True):
        missing = max(0, length - (stop - start))
        end = min(stop, start + length)
        contexts.append(F.pad(conditioning.context[:, start:end], (0, 0, 0, missing)))
        if conditioning.context_mask is not None:
            masks.append(F.pad(conditioning.context_mask[:, start:end], (0, missing)))
        streams.append((name, place, place + length, width))
        place += length
    mask = torch.cat(masks, dim=1) if masks else None
    return conditioning._replace(context=torch.cat(contexts, dim=1), context_mask=mask, streams=tuple(streams))


def drop_captions(
    conditioning: Conditioning,
    null_conditioning: Conditioning,
    dropout: CaptionDropoutConfig,
    uniforms: Tensor,
    *,
    clip_l_width: int | None = None,
) -> Conditioning:
    """Replace whole captions, or single encoders' parts of them, by the run's null.

    A dropped encoder's slice of the context and of `pooled` becomes the null's. The two CLIP towers share one stream:
    when both are dropped (or the caption) the stream's mask becomes the null's too, which attends to at least one
    token; when one is dropped, only its features change.

    Args:
        conditioning: streams ("clip", ...), ("t5", ...), or the first alone; trimmed or not.
        null_conditioning: one row, or B.
        dropout: probabilities.
        uniforms: [B, 4] in [0, 1): caption, clip_l, clip_g, t5; below its probability = dropped.
        clip_l_width: `TextEncoders.clip_l_width`; needed where `clip_l` or `clip_g` has a probability of its own.

    Raises:
        ValueError: shapes that do not fit, or `clip_l_width` missing.
    """
    batch = conditioning.context.shape[0]
    uniforms = torch.as_tensor(uniforms, device=conditioning.context.device)
    if uniforms.shape != (batch, 4):
        raise ValueError(f"uniforms must be [B, 4] = [{batch}, 4], got {list(uniforms.shape)}")
    if (dropout.clip_l or dropout.clip_g) and clip_l_width is None:
        raise ValueError("dropping clip_l or clip_g alone needs clip_l_width (TextEncoders.clip_l_width)")
    if (conditioning.context_mask is None) != (null_conditioning.context_mask is None):
        raise ValueError("conditioning and null_conditioning must both have a context_mask or both have none")
    whole = uniforms[:, 0] < dropout.caption
    clip_l, clip_g, t5 = (
        whole | (uniforms[:, i] < p) for i, p in ((1, dropout.clip_l), (2, dropout.clip_g), (3, dropout.t5))
    )

    null = null_conditioning
    if null.context.shape[0] == 1:
        null = null.repeat(batch)
    ours, theirs = (
        _real_lengths(conditioning),
        _real_lengths(apply_padding(null, "trim") if null.context_mask is not None else null),
    )
    lengths = [max(a, b) for a, b in zip(ours, theirs, strict=True)]
    conditioning, null = resize_streams(conditioning, lengths), resize_streams(null, lengths)

    context, pooled, mask = conditioning.context.clone(), conditioning.pooled, conditioning.context_mask
    spans = [slice(start, stop) for _, start, stop, _ in _streams(conditioning)]
    split = clip_l_width if clip_l_width is not None else 0  # without it both towers fall together
    clip_tokens, t5_tokens = spans[0], spans[1] if len(spans) > 1 else slice(0, 0)
    parts = (
        (clip_l, clip_tokens, slice(0, split)),
        (clip_g, clip_tokens, slice(split, None)),
        (t5, t5_tokens, slice(None)),
    )
    for dropped, tokens, features in parts:
        context[:, tokens, features] = torch.where(
            dropped[:, None, None], null.context[:, tokens, features].to(context.dtype), context[:, tokens, features]
        )
    if pooled is not None and null.pooled is not None:
        from_l = torch.arange(pooled.shape[1], device=pooled.device) < split  # [G]
        dropped = torch.where(from_l[None], clip_l[:, None], clip_g[:, None])  # [B, G]
        pooled = torch.where(dropped, null.pooled.to(pooled.dtype), pooled)
    if mask is not None and null.context_mask is not None:
        dropped_streams = zip((clip_l & clip_g, t5), lengths, strict=False)
        gone = torch.cat([dropped[:, None].expand(-1, n) for dropped, n in dropped_streams], dim=1)  # [B, L]
        mask = torch.where(gone, null.context_mask, mask)
    return conditioning._replace(context=context, pooled=pooled, context_mask=mask)


def _streams(conditioning: Conditioning) -> Streams:
    if conditioning.streams is None:
        raise ValueError("this Conditioning has no streams; encode with TextEncoders, which sets them")
    return conditioning.streams


def _real_lengths(conditioning: Conditioning) -> list[int]:
    return [stop - start for _, start, stop, _ in _streams(conditioning)]


# --- loading ----------------------------------------------------------------------------------------------------------


def load_text_encoders(
    path: str | Path | Mapping[str, str | Path] = "tiny",
    *,
    family: str | None = None,
    clip_l: Mapping[str, Any] | None = None,
    clip_g: Mapping[str, Any] | None = None,
    t5: Mapping[str, Any] | None = None,
    t5_length: int = 77,
    padding: Padding | None = None,
    use: Sequence[str] | None = None,
    tokenizers: str | Path | Mapping[str, str | Path] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> TextEncoders:
    """Load text encoders, in evaluation mode.

    Args:
        path: `tiny` for the embedded default, or a folder that holds such files (`text.json` and safetensors);
            released ones: an all-in-one .safetensors file of SD3, SD1.5 or SDXL; a folder of separate files (`clip_l*`,
            `clip_g*`, `t5xxl*`, also below text_encoders/) or {"clip_l": PATH, "clip_g": PATH, "t5": PATH}; a diffusers
            folder (`text_encoder`, `text_encoder_2`, `text_encoder_3`); or one encoder's own file or folder. fp32,
            fp16, bf16 and unscaled fp8 files.
        family: `sd3`, `sd1.5` or `sdxl`, whose rules join the states. None: what the files tell; encoders in separate
            files are taken for SD3's.
        clip_l, clip_g, t5: overrides of the encoder's config, such as {"num_heads": 2}; of one that is left out only
            its width ("hidden_size", "d_model") is read.
        t5_length: tokens of the T5 stream; longer prompts are cut. sd3-ref: 77; diffusers' pipeline: 256.
        padding: default policy of `encode`. None: `mask` for tiny encoders, which were trained so, `attend` for
            released ones.
        use: the encoders to load; None: all that are there. One that is left out contributes zeros of its width, as
            SD3 does without T5.
        tokenizers: where they are not beside the weights: T5's spiece.model or tokenizer.json, a folder with it or with
            `tokenizer`, `tokenizer_2`, `tokenizer_3`, or {encoder: PATH}. CLIP falls back on the packaged vocabulary.
        dtype: of released encoders' weights; None: float32. In float16 T5's output matrices stay float32.
        device: where to load to; None: the CPU.

    Raises:
        FileNotFoundError: no encoders there, or a shard of them is missing.
        ValueError: files that do not fit their config, hold no text encoders or are damaged (WeightsError); an encoder
            or family that is not known.
    """
    overrides = {"clip_l": clip_l, "clip_g": clip_g, "t5": t5}
    ours = TINY if isinstance(path, str) and path == "tiny" else path
    if isinstance(ours, str | Path) and (Path(ours) / "text.json").is_file():
        text = _load_tiny(Path(ours), overrides, family, use, t5_length, padding or "mask")
        return text.to(device) if device is not None else text
    towers, readers, family, context_dim, absent = load_released(
        ours, family, overrides=overrides, use=use, tokenizers=tokenizers, dtype=dtype, device=device
    )
    return TextEncoders(
        towers,
        readers,
        context_dim=context_dim,
        t5_length=t5_length,
        padding=padding or "attend",
        family=family,
        absent=absent,
    )


def _load_tiny(
    folder: Path,
    overrides: Mapping[str, Mapping[str, Any] | None],
    family: str | None,
    use: Sequence[str] | None,
    t5_length: int,
    padding: Padding,
) -> TextEncoders:
    """Load our own encoders, which follow SD3's rules; those left out by `use` leave zeros."""
    if family not in (None, "sd3"):
        raise ValueError(f"the encoders at {folder} follow the rules of sd3, not of {family}; leave `family` out")
    towers, tokenizers, context_dim = load_tiny(folder, overrides)
    for name in use or ():
        lookup(towers, name, "text encoder")
    left = {name: tower for name, tower in towers.items() if use is None or name in use}
    absent = {n: (towers[n].width, pooled_width(towers[n].module)) for n in CLIPS if n not in left}
    return TextEncoders(left, tokenizers, context_dim=context_dim, t5_length=t5_length, padding=padding, absent=absent)
