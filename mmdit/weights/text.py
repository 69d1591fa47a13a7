"""Key names of text encoders, where they lie in released files, and what their shapes tell of the config.

Inside, CLIP has transformers' names with the prefix `text_model.` (as in the SD3 files) and T5 those of its encoder.
SDXL's files hold CLIP-G with OpenCLIP's names: queries, keys and values in one packed matrix, the projection stored
transposed. Unpacking and transposing move bits and change none.

Source: the key lists of the releases (tests/weights/keys/clip_l, clip_g, t5xxl), transformers and open_clip, by name
only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmdit.weights.files import WeightFiles
from mmdit.weights.header import WeightsError

ENCODERS = ("clip_l", "clip_g", "t5")
FOLDERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5": "text_encoder_3"}  # of diffusers' layout
PREFIXES = {  # of all-in-one files
    "sd3": {
        "clip_l": "text_encoders.clip_l.transformer.",
        "clip_g": "text_encoders.clip_g.transformer.",
        "t5": "text_encoders.t5xxl.transformer.",
    },
    "sd1.5": {"clip_l": "cond_stage_model.transformer."},
    "sdxl": {"clip_l": "conditioner.embedders.0.transformer.", "clip_g": "conditioner.embedders.1.model."},
}
FILES = {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5xxl"}  # how separate files' names begin
TOKEN_TABLE = "text_model.embeddings.token_embedding.weight"
PROJECTION = "text_projection.weight"
T5_TABLE = "shared.weight"
T5_COPY = "encoder.embed_tokens.weight"  # tied to the table; released files hold both

# what a file may hold beside the text tower: buffers, the image tower of a whole CLIP, the decoder of a whole T5
_BESIDE = re.compile(
    r"(.*\.)?position_ids|logit_(scale|bias)|(vision_model|visual|visual_projection|decoder|lm_head)\..*|spiece_model"
)
_OPEN_CLIP = (  # outside the blocks, then inside: (OpenCLIP's, transformers')
    ("token_embedding.weight", TOKEN_TABLE),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.weight", "text_model.final_layer_norm.weight"),
    ("ln_final.bias", "text_model.final_layer_norm.bias"),
)
_OPEN_CLIP_BLOCK = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)
_UNWRAPPED = ("embeddings.", "encoder.", "final_layer_norm.")
_QKV = ("q_proj", "k_proj", "v_proj")
_OPEN_CLIP_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")
_HF_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


class Source(NamedTuple):
    """Where one tensor lies: a key of a file, of which a third may be meant, or the transpose."""

    key: str
    third: int | None = None
    transposed: bool = False

    def shape(self, files: WeightFiles) -> tuple[int, ...]:
        """Return the tensor's shape as it will be read."""
        shape = files.shape(self.key)
        if self.transposed:
            return shape[::-1]
        return shape if self.third is None else (shape[0] // 3, *shape[1:])

    def read(self, files: WeightFiles, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Read the tensor."""
        tensor = files.read(self.key, dtype, device)
        if self.transposed:
            return tensor.T.contiguous()
        return tensor if self.third is None else tensor.chunk(3)[self.third].clone()


def is_open_clip(names: Iterable[str]) -> bool:
    """Say whether names (without prefix) are OpenCLIP's."""
    return any(name.startswith(("transformer.resblocks.", "text.transformer.resblocks.")) for name in names)


def name_sources(encoder: str, keys: Iterable[str], prefix: str = "") -> dict[str, Source]:
    """Map our names to what holds them; a key that is not understood keeps its own name, for the check to refuse.

    Args:
        encoder: a name in `ENCODERS`.
        keys: full names in the file; those without `prefix` are left out.
    """
    short = {key[len(prefix) :]: key for key in keys if key.startswith(prefix)}
    if encoder != "t5" and is_open_clip(short):
        return _from_open_clip({name.removeprefix("text."): key for name, key in short.items()})
    found: dict[str, Source] = {}
    for name, key in short.items():
        if _BESIDE.fullmatch(name) or (name == T5_COPY and T5_TABLE in short):
            continue
        if name == T5_COPY:
            name = T5_TABLE
        elif encoder != "t5" and name.startswith(_UNWRAPPED):  # transformers 5.6 took `text_model.` from CLIPTextModel
            name = f"text_model.{name}"
        found[name] = Source(key)
    return found


def _from_open_clip(short: Mapping[str, str]) -> dict[str, Source]:
    outside, inside = dict(_OPEN_CLIP), dict(_OPEN_CLIP_BLOCK)
    found: dict[str, Source] = {}
    for name, key in short.items():
        layer = _OPEN_CLIP_LAYER.fullmatch(name)
        if name in outside:
            found[outside[name]] = Source(key)
        elif name == "text_projection":
            found[PROJECTION] = Source(key, transposed=True)
        elif name == PROJECTION:  # a Linear, in OpenCLIP's newer towers
            found[PROJECTION] = Source(key)
        elif layer and layer[2] == "attn.in_proj":
            for i, part in enumerate(_QKV):
                found[f"text_model.encoder.layers.{layer[1]}.self_attn.{part}.{layer[3]}"] = Source(key, third=i)
        elif layer and layer[2] in inside:
            found[f"text_model.encoder.layers.{layer[1]}.{inside[layer[2]]}.{layer[3]}"] = Source(key)
        elif not _BESIDE.fullmatch(name) and name != "attn_mask":
            found[name] = Source(key)
    return found


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and pack our names as OpenCLIP's: what SDXL's files hold of CLIP-G."""
    outside, inside = ({ours: theirs for theirs, ours in table} for table in (_OPEN_CLIP, _OPEN_CLIP_BLOCK))
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer = _HF_LAYER.fullmatch(name)
        if name in outside:
            out[outside[name]] = tensor
        elif name == PROJECTION:
            out["text_projection"] = tensor.T.contiguous()
        elif layer and layer[2] in inside:
            out[f"transformer.resblocks.{layer[1]}.{inside[layer[2]]}.{layer[3]}"] = tensor
        elif layer and layer[2] == "self_attn.q_proj":
            parts = [state[name.replace("q_proj", part)] for part in _QKV]
            out[f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"] = torch.cat(parts)
    return out


# --- what shapes tell -------------------------------------------------------------------------------------------


def infer_config(encoder: str, shapes: Mapping[str, tuple[int, ...]], source: object) -> dict[str, Any]:
    """Tell transformers' config from shapes under our names.

    The heads of CLIP are 64 wide in every release; where the width is no multiple of 64 they must be told.

    Raises:
        WeightsError: tensors that tell the architecture are missing, or the heads cannot be told.
    """
    try:
        return _t5_config(shapes) if encoder == "t5" else _clip_config(encoder, shapes)
    except KeyError as error:
        raise WeightsError(
            f"{source} does not hold {encoder} whole: {error.args[0]!r} is missing; its names begin with "
            f"{list(shapes)[:3]}"
        ) from None


def _clip_config(encoder: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    vocabulary, width = shapes[TOKEN_TABLE]
    config = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "num_hidden_layers": _count(r"text_model\.encoder\.layers\.(\d+)\.", shapes),
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "projection_dim": shapes.get(PROJECTION, (width,))[0],
        "hidden_act": "quick_gelu" if encoder == "clip_l" else "gelu",  # OpenAI's towers, OpenCLIP's bigG
        "bos_token_id": 49_406,
        "eos_token_id": 49_407,
    }
    return config | ({"num_attention_heads": width // 64} if width % 64 == 0 else {})


def _t5_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    first = "encoder.block.0.layer.{}"
    buckets, heads = shapes[first.format("0.SelfAttention.relative_attention_bias.weight")]
    gated = first.format("1.DenseReluDense.wi_0.weight") in shapes
    return {
        "vocab_size": shapes[T5_TABLE][0],
        "d_model": shapes[T5_TABLE][1],
        "d_kv": shapes[first.format("0.SelfAttention.q.weight")][0] // heads,
        "num_heads": heads,
        "num_layers": _count(r"encoder\.block\.(\d+)\.", shapes),
        "d_ff": shapes[first.format(f"1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight")][0],
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if gated else "relu",  # v1.1, and the T5 of 2019
        "is_encoder_decoder": False,
        "use_cache": False,
    }


def _count(pattern: str, names: Iterable[str]) -> int:
    return max((int(match[1]) for match in (re.match(pattern, name) for name in names) if match), default=-1) + 1
