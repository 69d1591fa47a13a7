"""The towers behind `encoders.text`: transformers modules, built from a config, a tiny file or a released folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mmdit.encoders.tokenizers import CLIP_VOCAB_SIZE, ClipTokenizer, T5Tokenizer

States = Literal["penultimate", "last"]
ENCODERS = ("clip_l", "clip_g", "t5")
_TOKEN_TABLE = "text_model.embeddings.token_embedding.weight"


class Tower(NamedTuple):
    """One text encoder: a transformers module, and what its states are standardised with.

    Attributes:
        module: CLIPTextModel, CLIPTextModelWithProjection or T5EncoderModel.
        state_mean, state_std: [width]; states become (state - mean) / std. Zeros and ones for released encoders.
    """

    module: nn.Module
    state_mean: Tensor
    state_std: Tensor

    @property
    def width(self) -> int:
        return self.state_mean.shape[0]


class TowerOutput(NamedTuple):
    """What a family may take from one transformers module, before standardisation.

    Attributes:
        states: [B, L, width]: CLIP's, of the layer asked for; T5's last.
        end: [B, G], CLIP's state at the end token after the final layer norm, projected where the module projects;
            None for T5.
        last: [B, L, width], the final states, behind the final layer norm; not projected.
    """

    states: Tensor
    end: Tensor | None
    last: Tensor


def run_tower(module: nn.Module, ids: Tensor, mask: Tensor | None, which: States = "penultimate") -> TowerOutput:
    """Run one transformers module.

    Args:
        ids: [B, L].
        mask: bool [B, L] for T5, None to attend to padding; CLIP needs none.
        which: of CLIP: `penultimate` states, without the final layer norm, or the `last` ones, behind it.
    """
    if _is_clip(module):
        out = module(input_ids=ids, output_hidden_states=True)
        end = out.text_embeds if hasattr(module, "text_projection") else out.pooler_output
        states = out.hidden_states[-2] if which == "penultimate" else out.last_hidden_state
        return TowerOutput(states, end, out.last_hidden_state)
    # transformers builds an all-ones mask where none is given, which attends to padding as the releases do.
    states = module(input_ids=ids, attention_mask=None if mask is None else mask.long()).last_hidden_state
    return TowerOutput(states, None, states)


def tower_states(
    module: nn.Module, ids: Tensor, mask: Tensor | None, which: States = "penultimate"
) -> tuple[Tensor, Tensor | None]:
    """Return states and end of `run_tower`."""
    return run_tower(module, ids, mask, which)[:2]


def mean_state(states: Tensor, real: Tensor) -> Tensor:
    """Return the mean over real tokens, [B, L, width] and bool [B, L] -> float32 [B, width]; zeros of no tokens."""
    weights = real.float()[:, :, None]
    return (states.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def projected(module: Any, vectors: Tensor) -> Tensor:
    """Project vectors as a CLIP tower projects its pooled state; as they are where it has no projection."""
    if not hasattr(module, "text_projection"):
        return vectors
    return module.text_projection(vectors.to(module.text_projection.weight.dtype))


def _is_clip(module: Any) -> bool:
    return module.config.model_type.startswith("clip")


def pooled_width(module: Any) -> int:
    return int(module.config.projection_dim if hasattr(module, "text_projection") else module.config.hidden_size)


def build_tower(name: str, config: Mapping[str, Any], *, projected: bool | None = None) -> nn.Module:
    """Build one transformers module with random weights; `name` is one of `ENCODERS`.

    Args:
        projected: whether a CLIP tower projects its pooled vector; None: CLIP-G does, CLIP-L does not.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    if name == "t5":
        return T5EncoderModel(T5Config(**config))
    # CLIP-L is used unprojected: SD3's folder carries an identity there.
    projected = name == "clip_g" if projected is None else projected
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(CLIPTextConfig(**config))


def load_tiny(folder: Path, overrides: Mapping[str, Any]) -> tuple[dict[str, Tower], dict[str, Any], int]:
    from safetensors.torch import load_file

    description = json.loads((folder / "text.json").read_text(encoding="utf-8"))
    towers: dict[str, Tower] = {}
    clip = ClipTokenizer()
    tokenizers: dict[str, Any] = {"clip_l": clip, "clip_g": clip, "t5": T5Tokenizer(folder)}
    for name in ENCODERS:
        module = build_tower(name, {**description["encoders"][name], **(overrides[name] or {})})
        tensors = {key: value.float() for key, value in load_file(folder / f"{name}.safetensors").items()}
        mean, std = tensors.pop("state_mean"), tensors.pop("state_std")
        if name != "t5":
            tensors[_TOKEN_TABLE] = expand_rows(tensors.pop("token_ids").long(), tensors.pop("token_rows"))
        load_strictly(module, tensors, f"{folder / name}.safetensors")
        towers[name] = Tower(module, mean, std)
    return towers, tokenizers, int(description["encoders"]["t5"]["d_model"])


def expand_rows(token_ids: Tensor, token_rows: Tensor) -> Tensor:
    """Rebuild CLIP's table of 49,408 rows: `token_rows[i]` for `token_ids[i]`, the last row for every other id."""
    table = token_rows[-1:].repeat(CLIP_VOCAB_SIZE, 1)
    table[token_ids] = token_rows[:-1]
    return table


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load released names into a transformers module, with or without its `text_model.` prefix.

    transformers 5.6 took that prefix from CLIPTextModel but left it on CLIPTextModelWithProjection; tied copies of
    T5's table are filled in.

    Raises:
        ValueError: lists missing and unexpected names.
    """
    wanted = module.state_dict()
    renamed = {}
    for key, value in tensors.items():
        short = key.removeprefix("text_model.")
        renamed[next((k for k in (key, short, f"text_model.{short}") if k in wanted), key)] = value
    if "shared.weight" in renamed and "encoder.embed_tokens.weight" in wanted:
        renamed.setdefault("encoder.embed_tokens.weight", renamed["shared.weight"])
    missing, unexpected = sorted(set(wanted) - set(renamed)), sorted(set(renamed) - set(wanted))
    if missing or unexpected:
        raise ValueError(f"{source} does not fit its config: missing {missing}, unexpected {unexpected}")
    module.load_state_dict(renamed)


def save_tower(folder: Path, name: str, tower: Tower, token_ids: Tensor | None = None) -> None:
    """Write one tiny tower in fp16.

    Args:
        token_ids: int64 [K], CLIP only: the ids of the first K rows of its table; the row after them is the shared one.
    """
    from safetensors.torch import save_file

    tensors = dict(tower.module.state_dict())
    if name == "t5":
        tensors.pop("encoder.embed_tokens.weight", None)  # tied to `shared.weight`; safetensors refuses the copy
    else:
        assert token_ids is not None
        tensors = {key if key.startswith("text_") else f"text_model.{key}": value for key, value in tensors.items()}
        tensors |= {"token_ids": token_ids.to(torch.int32), "token_rows": tensors.pop(_TOKEN_TABLE)}
    tensors |= {"state_mean": tower.state_mean, "state_std": tower.state_std}
    save_file(
        {key: (value.half() if value.is_floating_point() else value).contiguous() for key, value in tensors.items()},
        folder / f"{name}.safetensors",
    )
