"""Feature networks of other libraries: DINOv2 and any model by timm, CLIP by transformers, OpenCLIP.

Each resizes as its own literature does. The libraries are imported when a tower is built; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from mmdit_eval.extractor_weights import (
    KNOWN,
    WORKS_WITHOUT,
    KnownFile,
    find_weights,
    hash_tensors,
    hash_weights,
    read_tensors,
)
from mmdit_eval.features import Extractor, Options, TextTower
from mmdit_eval.resizing import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    normalise,
    resize_pillow,
    resize_shorter_side,
)

_TIMM_NAMES = {
    "dinov2_vits14": "vit_small_patch14_dinov2",
    "dinov2_vitb14": "vit_base_patch14_dinov2",
    "dinov2_vitl14": "vit_large_patch14_dinov2",
}
_DINO_SIDE = 224


def dinov2(name: str, options: Options) -> Extractor:
    """Build DINOv2: the class token of a ViT with patches of 14, as FD-DINOv2 uses it (there: ViT-L).

    Source: Oquab et al. 2023, arXiv:2304.07193; Stein et al. 2023, arXiv:2306.04675 (as a feature space for
    distances; 224 x 224 by Pillow's bicubic in uint8, ImageNet's mean and deviation). The position table of the
    release, made for 518 pixels, is brought to 224 as the release does it.

    Raises:
        FileNotFoundError, ValueError: no weights, or another network's.
    """
    import timm

    path = find_weights(name, KNOWN[name], options.weights)
    tensors = read_tensors(path)
    fingerprint = hash_weights(path, tensors, KNOWN[name])
    model = timm.create_model(_TIMM_NAMES[name], pretrained=False, img_size=_DINO_SIDE, num_classes=0)
    fitted = {key: value for key, value in tensors.items() if key != "mask_token"}
    if "pos_embed" in fitted:
        fitted["pos_embed"] = resample_positions(fitted["pos_embed"], _DINO_SIDE // 14)
    _load_strictly(model, fitted, f"{path}: these are not the weights of {name}")
    model = _frozen(model, options)
    return Extractor(
        name=name,
        width=int(model.num_features),
        hash=fingerprint,
        resize="Pillow bicubic, uint8, to 224 x 224; ImageNet mean and deviation",
        prepare=lambda images: normalise(
            resize_pillow(images, _DINO_SIDE, _DINO_SIDE), IMAGENET_MEAN, IMAGENET_STD, options.place
        ),
        network=lambda pixels: model(pixels.to(options.dtype)),
        precision=options.precision,
    )


def resample_positions(table: Tensor, side: int) -> Tensor:
    """Bring a position table [1, 1 + n², D], class token first, to side² patches: [1, 1 + side², D].

    Bicubic without antialiasing at the scale (side + 0.1) / n, as DINOv2's release does; timm antialiases instead
    and gives other features.
    """
    count = round((table.shape[1] - 1) ** 0.5)
    if count == side:
        return table
    grid = rearrange(table[:, 1:].float(), "one (h w) D -> one D h w", h=count)
    scale = (side + 0.1) / count
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([table[:, :1].float(), rearrange(grid, "one D h w -> one (h w) D")], dim=1)


def timm_model(options: Options) -> Extractor:
    """Build any timm model as `timm:NAME@WEIGHTS`: its pooled features before the classifier.

    Without `@WEIGHTS` a file NAME.safetensors or NAME.pth is looked for in the usual places.

    Raises:
        ValueError: timm knows no such model, or the weights are another's.
        FileNotFoundError: no weights.
    """
    import timm

    from mmdit.registry import unknown

    name = options.argument
    if not timm.is_model(name):
        raise ValueError(unknown("timm model", name, _similar(name, timm.list_models())))
    files = (f"{name}.safetensors", f"{name}.pth", f"{name}.bin")
    path = find_weights(f"timm:{name}", KnownFile(files, None, 0, "wherever this model is published"), options.weights)
    tensors = read_tensors(path)
    model = timm.create_model(name, pretrained=False, num_classes=0)
    # timm's own loader only warns where nothing fits; the classifier has no place without classes
    heads = model.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    kept = {key: tensor for key, tensor in tensors.items() if not any(key.startswith(f"{head}.") for head in heads)}
    _load_strictly(model, kept, f"{path}: these are not the weights of timm's {name} in timm's layout")
    model = _frozen(model, options)
    data = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**data, is_training=False)
    side = data["input_size"][-1]
    return Extractor(
        name=f"timm:{name}",
        width=int(model.num_features),
        hash=hash_weights(path, tensors),
        resize=f"timm: {data['interpolation']}, uint8, crop {data['crop_pct']} {data['crop_mode']}, to {side}",
        prepare=lambda images: _transformed(images, transform).to(options.place),
        network=lambda pixels: model(pixels.to(options.dtype)),
        precision=options.precision,
    )


def clip(options: Options) -> Extractor:
    """Build a CLIP pair from a transformers folder, `clip:FOLDER`: projected image and text embeddings.

    Source: Radford et al. 2021, arXiv:2103.00020: shorter side by bicubic, middle square, CLIP's mean and deviation.
    CMMD uses ViT-L/14 at 336 pixels (Jayasumana et al. 2024, arXiv:2401.09603).

    Raises:
        FileNotFoundError: no such folder. ValueError: weights with missing tensors.
    """
    from transformers import CLIPModel

    from mmdit.encoders.tokenizers import CLIP_END, ClipTokenizer

    folder = Path(options.argument).expanduser()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no CLIP in {folder}: a folder in the transformers layout (config.json, model.safetensors) is needed; "
            f"nothing is downloaded. {WORKS_WITHOUT}"
        )
    model, report = CLIPModel.from_pretrained(
        str(folder), dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    if report["missing_keys"] or report["mismatched_keys"]:
        missing = sorted(report["missing_keys"])[:3]
        raise ValueError(f"{folder}: the CLIP lacks {len(report['missing_keys'])} tensors, among them {missing}")
    fingerprint = hash_tensors(model.state_dict())
    model = _frozen(model, options)
    side, limit = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings
    own = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    tokenizer = ClipTokenizer(folder if own else None)

    def embed(captions: Sequence[str]) -> Tensor:
        rows = [row if len(row) <= limit else [*row[: limit - 1], CLIP_END] for row in tokenizer(captions)]
        ids = torch.full((len(rows), limit), CLIP_END)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        pooled = model.text_model(input_ids=ids.to(options.place)).pooler_output
        return model.text_projection(pooled).float().cpu()

    def network(pixels: Tensor) -> Tensor:
        return model.visual_projection(model.vision_model(pixel_values=pixels.to(options.dtype)).pooler_output)

    return Extractor(
        name=f"clip:{folder.name}",
        width=int(model.config.projection_dim),
        hash=fingerprint,
        resize=f"Pillow bicubic, uint8, shorter side to {side}, middle square; CLIP mean and deviation",
        prepare=lambda images: normalise(resize_shorter_side(images, side), CLIP_MEAN, CLIP_STD, options.place),
        network=network,
        precision=options.precision,
        text=TextTower(torch.inference_mode()(embed), lambda features: features, tokenizer.lengths, limit),
    )


def openclip(options: Options) -> Extractor:
    """Build an OpenCLIP pair, `openclip:NAME@WEIGHTS`, with open_clip's own transform and tokenizer.

    Raises:
        ModuleNotFoundError: open_clip is not installed.
        ValueError: an unknown name, or weights of another model. FileNotFoundError: no weights.
    """
    try:
        import open_clip
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("extractor 'openclip:' needs open_clip: pip install open_clip_torch") from error
    from mmdit.registry import unknown

    name = options.argument
    if name not in open_clip.list_models():
        raise ValueError(unknown("OpenCLIP model", name, _similar(name, open_clip.list_models())))
    files = (f"{name}.safetensors", f"{name}.bin", f"{name}.pt")
    known = KnownFile(files, None, 0, "the releases of open_clip")
    path = find_weights(f"openclip:{name}", known, options.weights)
    try:
        model = open_clip.create_model(name, pretrained=str(path), precision="fp32")
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{path}: these are not the weights of OpenCLIP's {name} ({error!s:.300})") from error
    fingerprint = hash_tensors(model.state_dict())
    model = _frozen(model, options)
    settings = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
    transform = open_clip.transform.image_transform_v2(settings, is_train=False)
    tokenizer, limit = open_clip.get_tokenizer(name), int(model.context_length)

    @torch.inference_mode()
    def embed(captions: Sequence[str]) -> Tensor:
        return model.encode_text(tokenizer(list(captions), limit).to(options.place)).float().cpu()

    return Extractor(
        name=f"openclip:{name}",
        width=int(model.visual.output_dim),
        hash=fingerprint,
        resize=f"open_clip: {settings.interpolation}, uint8, {settings.resize_mode} to {settings.size}",
        prepare=lambda images: _transformed(images, transform).to(options.place),
        network=lambda pixels: model.encode_image(pixels.to(options.dtype)),
        precision=options.precision,
        text=TextTower(
            embed,
            lambda features: features,
            lambda captions: openclip_lengths(tokenizer, captions),
            limit,
        ),
    )


def openclip_lengths(tokenizer: Any, captions: Sequence[str]) -> list[int]:
    """Return the tokens of each caption, its marks included, by whichever tokenizer open_clip chose for the model.

    CLIP's own counts without start and end; those of SigLIP and of multilingual models wrap one of transformers.
    """
    if hasattr(tokenizer, "encode"):
        return [len(tokenizer.encode(caption)) + 2 for caption in captions]
    clean = getattr(tokenizer, "clean_fn", str)
    return [len(tokenizer.tokenizer(clean(caption)).input_ids) for caption in captions]


def _frozen(model: Any, options: Options) -> Any:
    return model.eval().requires_grad_(False).to(options.place, options.dtype)


def _load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], complaint: str) -> None:
    try:
        model.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise ValueError(f"{complaint} ({error!s:.300})") from None


def _transformed(images: np.ndarray, transform: Any) -> Tensor:
    return torch.stack([transform(Image.fromarray(image)) for image in images])


def _similar(name: str, names: Sequence[str]) -> list[str]:
    """Return up to eight names like this one; the whole list is a thousand long."""
    import difflib

    return difflib.get_close_matches(name, list(names), n=8, cutoff=0.3)
