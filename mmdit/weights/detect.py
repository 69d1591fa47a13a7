"""What is in a file of weights: its parts, their layouts, and the released family they belong to.

    detected = detect(open_weights("sd3_medium_incl_clips.safetensors"))
    detected.family                     # "sd3"
    detected.parts["denoiser"].prefix   # "model.diffusion_model."

Keys and shapes decide, never a file's name; the one exception is SD3.5-large-turbo, whose tensors have the names and
shapes of SD3.5-large.

Source: the key lists of the releases (tests/weights/keys).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mmdit.weights import sd3, unet_keys
from mmdit.weights.files import WeightFiles
from mmdit.weights.header import WeightsError

Layout = Literal["original", "diffusers"]

_BLOCKS = 200  # numbers of blocks that are plausible in any file
_DIMENSIONS = {  # of the tensors whose shapes tell an architecture, by the ends of their names
    "x_embedder.proj.weight": 4, "pos_embed.proj.weight": 4, "input_blocks.0.0.weight": 4, "conv_in.weight": 4,
    "out.2.weight": 4, "conv_out.weight": 4, "in_layers.2.weight": 4, "conv1.weight": 4, "pos_embed": 3,
    ".qkv.weight": 2, ".to_q.weight": 2, ".to_k.weight": 2, ".fc1.weight": 2, ".ff.net.0.proj.weight": 2,
    "context_embedder.weight": 2, "y_embedder.mlp.0.weight": 2, "label_emb.0.0.weight": 2, "linear_1.weight": 2,
}  # fmt: skip

# A key that only a denoiser of this backbone and layout has, at the end of whatever prefix.
_ANCHORS: tuple[tuple[str, Layout, str], ...] = (
    ("mmdit", "original", "joint_blocks.0.x_block.attn.qkv.weight"),
    ("mmdit", "diffusers", "transformer_blocks.0.norm1_context.linear.weight"),
    ("unet", "original", "input_blocks.0.0.weight"),
    ("unet", "diffusers", "down_blocks.0.resnets.0.time_emb_proj.weight"),
)
_CONTROLNET = ("controlnet_", "zero_convs.", "input_hint_block.", "control_model.")
_LORA = re.compile(r"lora_(?:down|up|A|B|unet|te\d?)|\.lora\.|\.(?:hada|lokr)_")
# Parts of all-in-one files by prefix; the first that fits counts.
_PARTS = (
    ("vae", "first_stage_model."),
    ("vae", "vae."),
    ("clip_l", "text_encoders.clip_l.transformer."),
    ("clip_g", "text_encoders.clip_g.transformer."),
    ("t5", "text_encoders.t5xxl.transformer."),
    ("clip_l", "cond_stage_model.transformer."),
    ("clip_l", "conditioner.embedders.0.transformer."),
    ("clip_g", "conditioner.embedders.1.model."),
    ("ema", "model_ema."),
    ("controlnet", "control_model."),
)
# Parts of files that hold one thing: a key that tells it, and its width where that matters.
_ALONE = (
    ("vae", "decoder.conv_in.weight", None),
    ("clip_l", "text_model.embeddings.token_embedding.weight", 768),
    ("clip_g", "text_model.embeddings.token_embedding.weight", 1280),
    ("clip_l", "embeddings.token_embedding.weight", 768),
    ("clip_g", "embeddings.token_embedding.weight", 1280),
    ("clip_g", "transformer.resblocks.0.attn.in_proj_weight", None),
    ("t5", "encoder.block.0.layer.0.SelfAttention.q.weight", None),
)
# Tables, marks and leftovers of training that releases carry along; no network reads them. CLIP's scale of logits, and
# its projection, stand outside the tower in files that ComfyUI wrote.
_LEFTOVERS = re.compile(
    r"(loss\..*|betas|alphas_cumprod(_prev)?|(sqrt|log)_.*|posterior_.*|logvar|lvlb_weights|scale_factor|global_step|"
    r"denoiser\.sigmas|model_sampling\..*|v_pred|ztsnr|edm_.*|"
    r"(cond_stage_model|conditioner\.embedders\.\d|text_encoders\.\w+)\.(logit_scale|text_projection))"
)
_REFINER_POOLED = 1280 + 5 * 256  # of SDXL's refiner: its text and five numbers, one of them an aesthetic score


@dataclass(frozen=True)
class Part:
    """One network in a file.

    Attributes:
        name: denoiser, vae, clip_l, clip_g, t5, ema or controlnet.
        prefix: what stands before the network's own names.
        keys: the full names in the file.
        layout: of a denoiser or VAE; text encoders have one only.
        backbone: of a denoiser: mmdit or unet.
    """

    name: str
    prefix: str
    keys: tuple[str, ...]
    layout: Layout = "original"
    backbone: str | None = None

    def shapes(self, files: WeightFiles) -> dict[str, tuple[int, ...]]:
        """Return {name without prefix: shape}."""
        return {key[len(self.prefix) :]: files.shape(key) for key in self.keys}


@dataclass(frozen=True)
class Detected:
    """What `detect` found.

    Attributes:
        family: sd3, sd3.5_medium, sd3.5_large, sd3.5_large_turbo, sd1.5, sdxl, or None where the denoiser is of none
            of these or the file has none.
        parts: {name: part}.
        leftovers: keys that no network reads (noise tables, losses).
        unknown: keys of no part.
        fields: of the denoiser's config, as far as shapes tell.
    """

    family: str | None
    parts: Mapping[str, Part]
    leftovers: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)


def detect(files: WeightFiles) -> Detected:
    """Say what is in opened weights; reads headers only and never fails on what it does not know."""
    parts: dict[str, Part] = {}
    rest = list(files.keys())
    candidates = denoiser_parts(files)
    if candidates:
        parts["denoiser"] = candidates[0]
        taken = set(candidates[0].keys)
        rest = [key for key in rest if key not in taken]
    for name, prefix in _PARTS:
        keys = tuple(key for key in rest if key.startswith(prefix))
        if keys and name not in parts:
            parts[name] = Part(name, prefix, keys, _vae_layout(keys, prefix))
            rest = [key for key in rest if not key.startswith(prefix)]
    leftovers = tuple(key for key in rest if _LEFTOVERS.fullmatch(key))
    rest = [key for key in rest if not _LEFTOVERS.fullmatch(key)]
    alone = next((n for n, key, width in _ALONE if key in rest and width in (None, *files.shape(key)[-1:])), None)
    if alone is not None and alone not in parts:
        parts[alone] = Part(alone, "", tuple(rest), _vae_layout(rest, ""))
        rest = []
    fields: dict[str, Any] = {}
    if "denoiser" in parts:
        fields = infer_fields(parts["denoiser"], files)
    return Detected(_family(parts.get("denoiser"), fields, files), parts, leftovers, tuple(rest), fields)


def infer_fields(part: Part, files: WeightFiles) -> dict[str, Any]:
    """Tell the fields of a denoiser's config from its shapes.

    Raises:
        WeightsError: shapes or numbers of blocks that no network has.
    """
    room, shapes = sd3 if part.backbone == "mmdit" else unet_keys, part.shapes(files)
    refuse_far_blocks(files, shapes)
    try:
        return room.infer_fields(shapes, part.layout)
    except (IndexError, ZeroDivisionError, ValueError) as error:
        wanted = {key: next((n for end, n in _DIMENSIONS.items() if key.endswith(end)), None) for key in shapes}
        odd = [
            f"{key} {list(shape)}"
            for key, shape in shapes.items()
            if wanted[key] is not None and (len(shape) != wanted[key] or 0 in shape)
        ]
        raise WeightsError(
            f"{files.path} holds the names of a denoiser with shapes that none has ({', '.join(odd[:3]) or error}); "
            f"it is damaged, or compressed in a way that is not read here"
        ) from error


def refuse_far_blocks(files: WeightFiles, keys: Iterable[str]) -> None:
    """Refuse keys that number a block far beyond what the file can hold: a network of that depth would be built.

    Raises:
        WeightsError: which key.
    """
    most = max(_BLOCKS, len(files))
    far = next(
        (key for key in keys if any(n.isdigit() and (len(n) > 9 or int(n) > most) for n in key.split("."))), None
    )
    if far is not None:
        raise WeightsError(f"{files.path} holds {far!r}, but only {len(files)} tensors: it is damaged or made up")


def denoiser_parts(files: WeightFiles) -> list[Part]:
    """Return the denoisers in a file, the released prefix first; without ControlNets and without the EMA's copy."""
    found: dict[str, Part] = {}
    for backbone, layout, anchor in _ANCHORS:
        for key in files:
            prefix = key[: -len(anchor)]
            if not key.endswith(anchor) or (prefix and not prefix.endswith(".")) or prefix in found:
                continue
            keys = tuple(other for other in files if other.startswith(prefix) and (prefix or not _of_a_part(other)))
            names = [other[len(prefix) :] for other in keys]
            if not prefix.startswith("control_model.") and not any(name.startswith(_CONTROLNET) for name in names):
                found[prefix] = Part("denoiser", prefix, keys, layout, backbone)
    return sorted(found.values(), key=lambda part: part.prefix != sd3.PREFIX)


def find_denoiser(files: WeightFiles, prefix: str | None = None) -> Part:
    """Return the denoiser of a file, under `prefix` where given.

    Raises:
        WeightsError: there is none, or none under this prefix, or several; what the file seems to be is said.
    """
    parts = denoiser_parts(files)
    if prefix is not None:
        parts, elsewhere = [part for part in parts if part.prefix == prefix], parts
        if not parts and elsewhere:
            there = " and ".join(repr(part.prefix) for part in elsewhere)
            raise WeightsError(
                f"{files.path} has no denoiser under the prefix {prefix!r}; it has one under {there}: leave `prefix` "
                f"out, or give that one"
            )
    if not parts:
        raise WeightsError(f"{files.path} holds no denoiser (MMDiT or U-Net): {_what_else(files)}")
    if len(parts) > 1 and parts[0].prefix != sd3.PREFIX:
        raise WeightsError(
            f"{files.path} holds {len(parts)} denoisers, under {', '.join(repr(part.prefix) for part in parts)}; "
            f"choose one with prefix="
        )
    return parts[0]


def _of_a_part(key: str) -> bool:
    """Whether a key without a denoiser's prefix belongs to something else of an all-in-one file."""
    return key.startswith(tuple(prefix for _, prefix in _PARTS)) or _LEFTOVERS.fullmatch(key) is not None


def _vae_layout(keys: Iterable[str], prefix: str) -> Layout:
    return "diffusers" if any(key.startswith(f"{prefix}decoder.up_blocks.") for key in keys) else "original"


def _what_else(files: WeightFiles) -> str:
    """Say what a file without a denoiser probably is."""
    keys = files.keys()
    loras = sum(_LORA.search(key) is not None for key in keys)
    if loras:
        return f"it is a LoRA ({loras} of its {len(keys)} keys are); load the base model it was trained on"
    if any(key.startswith(_CONTROLNET) for key in keys):
        return "it is a ControlNet; load the base model it belongs to"
    averaged = sum(key.startswith("model_ema.") for key in keys)
    if averaged:
        return (
            f"it holds the EMA's copy alone ({averaged} keys under 'model_ema.', whose names have lost their dots); "
            f"take the file with the weights themselves (such as v1-5-pruned-emaonly.safetensors)"
        )
    if any(re.search(r"(double|single)_(transformer_)?blocks\.", key) for key in keys):
        return "it is of another family (its blocks are those of FLUX); SD3, SD3.5, SD1.x and SDXL are read"
    detected = detect(files)
    rest = detected.unknown  # a VAE has down_blocks, too
    blocks = [key for key in rest if re.search(r"(joint_blocks|transformer_blocks|input_blocks|down_blocks)\.\d+", key)]
    if blocks or any(key.endswith(("proj_out.weight", "out.2.weight", "final_layer.linear.weight")) for key in rest):
        return (
            "it has blocks of one but not the first: it is a part of a sharded set (give the folder, or the "
            "index.json), or of another family"
        )
    if detected.parts:
        return f"it holds {' and '.join(detected.parts)}; the denoiser is in another file of the release"
    return f"its {len(keys)} keys are of no known network, the first is {keys[0]!r}" if keys else "it is empty"


def _family(part: Part | None, fields: Mapping[str, Any], files: WeightFiles) -> str | None:
    """Tell the released family of a denoiser by what distinguishes the releases, whatever its size."""
    if part is None:
        return None
    if part.backbone == "mmdit":
        if fields["dual_attention_layers"]:
            return "sd3.5_medium"
        if fields.get("qk_norm") is None:
            return "sd3"
        return "sd3.5_large_turbo" if _says_turbo(files) else "sd3.5_large"
    if fields["pooled_dim"] is not None:
        refiner = fields["pooled_dim"] == _REFINER_POOLED
        return None if refiner or any(key.startswith("conditioner.embedders.0.model.") for key in files) else "sdxl"
    return None if fields.get("linear_projection") else "sd1.5"  # Linear without pooled: SD2


def _says_turbo(files: WeightFiles) -> bool:
    """Look for "turbo" in the names of the file and its two folders, and in its metadata."""
    places = [files.path.name, *(parent.name for parent in list(files.path.absolute().parents)[:2])]
    places += [file.name for file in files.files] + list(files.metadata.values())
    return any("turbo" in place.lower() for place in places)
