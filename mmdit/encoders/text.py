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
from typing import Any

import torch
from torch import Tensor

from mmdit.config import EncodersConfig
from mmdit.denoiser import Conditioning, Streams
from mmdit.encoders.axes import (
    Absent,
    Encoded,
    Null,
    Padding,
    Pooled,
    PooledAt,
    TextLayout,
    join,
    pooled_encoders,
    zeros,
)
from mmdit.encoders.axes import apply_padding as apply_padding
from mmdit.encoders.axes import drop_captions as drop_captions
from mmdit.encoders.axes import resize_streams as resize_streams
from mmdit.encoders.families import CLIPS, FAMILIES, NUM_SIZES, SIZE_WIDTH, embed_sizes
from mmdit.encoders.released import load_released
from mmdit.encoders.running import clip_lengths, run_rows, t5_lengths
from mmdit.encoders.tokenizers import (
    CLIP_END,
    CLIP_LENGTH,
    T5_PAD,
    TINY,
    ReleasedT5Tokenizer,
    T5Tokenizer,
    pad,
)
from mmdit.encoders.towers import Tower, load_tiny, pooled_width
from mmdit.registry import lookup

CLIP_PAD = {"clip_l": CLIP_END, "clip_g": 0}  # sd3-ref pads the second tower with id 0
T5_HINT = (
    ". T5 reads google/t5-v1_1-xxl's spiece.model or tokenizer.json (a release's folder tokenizer_3): put it beside "
    "the weights, pass tokenizers={'t5': PATH}, or leave T5 out with use=('clip_l', 'clip_g')"
)


class TextEncoders:
    """Text encoders behind one call; any may be missing and then contributes zeros, as SD3 does without T5, or nothing.

    Args:
        towers: by name, a subset of the family's encoders.
        tokenizers: by name; an encoder without one still takes ids.
        context_dim: E, T5's width where there is a T5.
        t5_length: tokens of the T5 stream.
        padding: default policy of `encode`; see the module's text.
        family: whose rules join the states, a name in `FAMILIES`.
        absent: {name: (width, pooled width)} of CLIP towers that are left out but whose features stay, as zeros; one
            that is in neither has no features at all.
        pooled, pooled_at: what stands in the pooled vector, and where CLIP's is taken; see `encoders.axes`.
        silent: what a stream leaves of which no encoder is there.

    Raises:
        ValueError: a tower the family does not have, widths that do not fit into `context_dim`, a `pooled` that the
            family cannot give, no stream at all.
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
        pooled: Pooled = "clip",
        pooled_at: PooledAt = "end",
        silent: Absent = "zeros",
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
        self.pooled, self.pooled_at, self.silent = pooled, pooled_at, silent
        if silent == "nothing" and not towers:
            raise ValueError("encoders.absent 'nothing' leaves no text at all, for no encoder is in use; use 'zeros'")
        self._pooled_encoders = pooled_encoders(pooled, self.rules.pooled, "t5" in self.rules.encoders)
        if pooled == "none" and self.rules.sizes:
            raise ValueError(f"encoders.pooled 'none' would drop the sizes that {family} is told in its pooled vector")
        for tower in self.towers.values():
            tower.module.eval().requires_grad_(False)
        self._fingerprint: str | None = None

    def _width(self, name: str) -> int:
        return self.towers[name].width if name in self.towers else self._absent.get(name, (0, 0))[0]

    def _pooled_width(self, name: str) -> int:
        if name == "t5":
            return self.context_dim
        if name in self.towers:
            return pooled_width(self.towers[name].module)
        return self._absent.get(name, (0, 0))[1]

    @property
    def device(self) -> torch.device:
        """Where conditionings are made: the encoders' device, the CPU where there are none."""
        return next((tower.state_mean.device for tower in self.towers.values()), torch.device("cpu"))

    @property
    def layout(self) -> TextLayout:
        """How this family's encoders are joined, absent ones included but for streams that leave nothing."""
        speaking = self.rules.encoders if self.silent == "zeros" else tuple(self.towers)
        has_clip, has_t5 = any(name in speaking for name in CLIPS), "t5" in speaking
        return TextLayout(
            clip=tuple((name, self._width(name)) for name in CLIPS) if has_clip else (),
            t5=has_t5,
            pooled=tuple((name, self._pooled_width(name)) for name in self._pooled_encoders),
            pooled_at=self.pooled_at,
            context_dim=self.context_dim,
            lengths=(*([CLIP_LENGTH] if has_clip else []), *([self.t5_length] if has_t5 else [])),
        )

    @property
    def clip_l_width(self) -> int:
        """Where CLIP-L ends and CLIP-G begins, in the features of the CLIP stream."""
        return self.layout.clip_l_width

    @property
    def pooled_dim(self) -> int:
        """G; 0 where there is no pooled vector."""
        return self.layout.pooled_dim + (NUM_SIZES * SIZE_WIDTH if self.rules.sizes else 0)

    @property
    def streams(self) -> Streams:
        """Where each stream lies in an untrimmed context: (name, start, stop, width)."""
        return self.layout.streams()

    def under(
        self,
        use: Sequence[str] | None = None,
        pooled: Pooled = "clip",
        pooled_at: PooledAt = "end",
        silent: Absent = "zeros",
    ) -> TextEncoders:
        """Return these encoders under other axes, see `encoders.axes`; towers are shared.

        Args:
            use: who speaks; the others leave zeros of the same shapes. None: all that are here.
            silent: `nothing`: a stream of which nobody speaks is not there at all.

        Raises:
            ValueError: a name that is not here, a `pooled` that the family cannot give, no stream at all.
        """
        use = list(self.towers) if use is None else use
        missing = [name for name in use if name not in self.towers]
        if missing:
            raise ValueError(
                f"encoders.use names {', '.join(missing)}, but there are only {', '.join(self.towers) or 'none'} here"
            )
        widths = {name: (self._width(name), self._pooled_width(name)) for name in CLIPS}
        return TextEncoders(
            {name: tower for name, tower in self.towers.items() if name in use},
            {name: tokenizer for name, tokenizer in self.tokenizers.items() if name in use},
            context_dim=self.context_dim,
            t5_length=self.t5_length,
            padding=self.padding,
            family=self.family,
            absent={name: pair for name, pair in widths.items() if pair != (0, 0)},
            pooled=pooled,
            pooled_at=pooled_at,
            silent=silent,
        )

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

    def _encode_ids(self, ids: Mapping[str, Tensor], padding: Padding | None, batch: int) -> Conditioning:
        padding = padding or self.padding
        self._check_ids(ids)
        parts = {name: self.run_encoder(name, ids[name], padding) for name in self.towers}
        layout = self.layout
        lengths = [*layout.lengths[:-1], ids["t5"].shape[1]] if "t5" in self.towers else layout.lengths
        return join(layout, parts, padding, batch, lengths=lengths, device=self.device)

    @torch.no_grad()
    def run_encoder(self, name: str, ids: Tensor, padding: Padding) -> Encoded:
        """Run one encoder on its ids int64 [B, L]; `mask` and `trim` give the same, see the module's text."""
        real = self.real_lengths(name, ids)
        return run_rows(self.towers[name], ids.to(self.device), real, padding == "attend", self.rules.states)

    def real_lengths(self, name: str, ids: Tensor) -> Tensor:
        """Count the real tokens of an encoder's ids [B, L]: int64 [B], on the CPU."""
        return (t5_lengths if name == "t5" else clip_lengths)(ids)

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
        conditioning = zeros(self.layout, batch, padding, self.device)
        return self._with_sizes(conditioning, sizes)

    @property
    def fingerprint(self) -> str:
        """Hash of all weights, vocabularies and rules: two encoders with the same one give the same states."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            if self.family != "sd3" or self._absent:
                digest.update(f"{self.family} {sorted(self._absent.items())}".encode())
            for name in sorted(self.towers):
                self._hash_tower(digest, name)
            self._hash_vocabulary(digest)
            if not all(self._cleaned(name) for name in CLIPS):
                digest.update(b"prompts are read as released")
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def fingerprint_of(self, name: str) -> str:
        """Hash of one encoder: with the same one `run_encoder` gives the same, whatever stands beside it."""
        digest = hashlib.sha256(f"{name} {'last' if name == 't5' else self.rules.states}".encode())
        self._hash_tower(digest, name)
        if name == "t5":
            self._hash_vocabulary(digest)
        elif not self._cleaned(name):
            digest.update(b"prompts are read as released")
        return digest.hexdigest()

    def _cleaned(self, name: str) -> bool:
        """Whether a CLIP tokenizer cleans prompts as open_clip does; where there is none, nothing differs."""
        return bool(getattr(self.tokenizers.get(name), "cleaned", True))

    def _hash_tower(self, digest: Any, name: str) -> None:
        tower = self.towers[name]
        tensors = {**tower.module.state_dict(), "state_mean": tower.state_mean, "state_std": tower.state_std}
        for key, tensor in sorted(tensors.items()):
            digest.update(f"{name}.{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())

    def _hash_vocabulary(self, digest: Any) -> None:
        t5 = self.tokenizers.get("t5")
        if isinstance(t5, T5Tokenizer | ReleasedT5Tokenizer):
            digest.update(t5.fingerprint.encode())


def _check_prompts(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of strings, got the string {prompts!r}; write [{prompts!r}]")
    if len(prompts) == 0:
        raise ValueError('got no prompts; pass at least one, the empty caption is [""]')


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


def load_run_text(config: EncodersConfig) -> TextEncoders:
    """Load the text encoders of a run under its axes: those in use, its pooled vector, its T5 length.

    Raises:
        ValueError: `use` names an encoder that is not there, or `pooled` needs one that the family does not have.
    """
    text = load_text_encoders(config.text, t5_length=config.t5_length, use=config.use)
    return text.under(config.use, config.pooled, config.pooled_at, config.absent)
