"""Small random text encoders of every family, made by transformers, and their files in every released layout."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from mmdit.encoders.tokenizers import TINY, ClipTokenizer

CLIP_L = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 1,
          "projection_dim": 64, "hidden_act": "quick_gelu"}  # fmt: skip
CLIP_G = {**CLIP_L, "hidden_size": 128, "num_attention_heads": 2, "projection_dim": 128, "hidden_act": "gelu"}
T5 = {"vocab_size": 1200, "d_model": 256, "d_kv": 16, "num_heads": 4, "d_ff": 64, "num_layers": 2,
      "feed_forward_proj": "gated-gelu"}  # fmt: skip
WIDTHS = {"clip_l": {"num_heads": 1}, "clip_g": {"num_heads": 2}}


def build(family):
    """Return {encoder: module}, every parameter redrawn: a fresh norm would hide a swapped one."""
    torch.manual_seed(0)
    first = CLIPTextModelWithProjection if family == "sd3" else CLIPTextModel
    modules = {"clip_l": first(CLIPTextConfig(**CLIP_L))}
    if family != "sd1.5":
        modules["clip_g"] = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G))
    if family == "sd3":
        modules["t5"] = T5EncoderModel(T5Config(**T5))
    with torch.no_grad():
        for module in modules.values():
            for name, parameter in module.named_parameters():
                scale = 1.0 if "token_embedding" in name or "shared" in name else parameter[0].numel() ** -0.5
                parameter.copy_(
                    torch.randn_like(parameter) * scale if parameter.ndim > 1 else torch.rand_like(parameter)
                )
            module.eval()
        if family == "sd3":  # what the release's folder holds
            modules["clip_l"].text_projection.weight.copy_(torch.eye(64))
    return modules


def original(family, modules):
    """Return the tensors of an all-in-one file, renamed here by hand and not by the library."""
    out = {}
    for encoder, module in modules.items():
        state = {key: tensor.clone() for key, tensor in module.state_dict().items()}
        if encoder == "t5":
            out |= {f"text_encoders.t5xxl.transformer.{key}": tensor for key, tensor in state.items()}
            continue
        state = {key if key.startswith("text_") else f"text_model.{key}": tensor for key, tensor in state.items()}
        if encoder == "clip_l":
            state.pop("text_projection.weight", None)
        prefix = {"sd3": f"text_encoders.{encoder}.transformer.", "sd1.5": "cond_stage_model.transformer."}.get(family)
        if family == "sdxl" and encoder == "clip_l":
            prefix = "conditioner.embedders.0.transformer."
        if family == "sdxl" and encoder == "clip_g":
            prefix, state = "conditioner.embedders.1.model.", open_clip_names(state)
        out |= {f"{prefix}{key}": tensor for key, tensor in state.items()}
    if family == "sd1.5":
        out["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    out["model.diffusion_model.other"] = torch.zeros(1)
    return out


def open_clip_names(state):
    out = {
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": state["text_model.final_layer_norm.weight"],
        "ln_final.bias": state["text_model.final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
        "logit_scale": torch.tensor(4.6),
    }
    for i in range(3):
        ours, theirs = f"text_model.encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            packed = [state[f"{ours}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            out[f"{theirs}attn.in_proj_{kind}"] = torch.cat(packed)
            for a, b in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                         ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):  # fmt: skip
                out[f"{theirs}{b}.{kind}"] = state[f"{ours}{a}.{kind}"]
    return out


def write_original(folder, family, modules, dtype=None):
    tensors = {key: tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
               for key, tensor in original(family, modules).items()}  # fmt: skip
    save_file(tensors, folder / "release.safetensors")
    return folder / "release.safetensors"


def write_separate(folder, modules):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("clip_l", "clip_g", "t5xxl_fp16"):
        prefix = f"text_encoders.{name.removesuffix('_fp16')}.transformer."
        tensors = {k.removeprefix(prefix): v for k, v in original("sd3", modules).items() if k.startswith(prefix)}
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


def write_diffusers(folder, modules, shard_t5=False):
    """As diffusers saves them, and a T5 in shards; tokenizer_3 is our spiece.model."""
    for encoder, name in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2"), ("t5", "text_encoder_3")):
        if encoder in modules:
            size = {"max_shard_size": "400KB"} if shard_t5 and encoder == "t5" else {}
            modules[encoder].save_pretrained(str(folder / name), **size)
    clip_tokenizer("<|endoftext|>").save_pretrained(str(folder / "tokenizer"))
    if "clip_g" in modules:
        clip_tokenizer("!").save_pretrained(str(folder / "tokenizer_2"))
    if "t5" in modules:
        (folder / "tokenizer_3").mkdir()
        (folder / "tokenizer_3" / "spiece.model").write_bytes((TINY / "spiece.model").read_bytes())
    return folder


def clip_tokenizer(pad_token):
    from transformers import CLIPTokenizer

    model = json.loads(ClipTokenizer()._tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, pad_token=pad_token, model_max_length=77)


def t5_tokenizer():
    from transformers import T5Tokenizer

    return T5Tokenizer.from_pretrained(str(TINY))


def pipeline(family, modules):
    """The diffusers pipeline around the encoders, without denoiser and VAE: for its encode_prompt."""
    from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

    first = {"text_encoder": modules["clip_l"], "tokenizer": clip_tokenizer("<|endoftext|>"), "vae": None}
    if family == "sd1.5":
        rest = {"unet": None, "safety_checker": None, "feature_extractor": None, "scheduler": None}
        return StableDiffusionPipeline(**first, **rest, requires_safety_checker=False)
    second = {"text_encoder_2": modules["clip_g"], "tokenizer_2": clip_tokenizer("!"), "scheduler": None}
    if family == "sdxl":
        return StableDiffusionXLPipeline(**first, **second, unet=None)
    return StableDiffusion3Pipeline(
        **first, **second, transformer=None, text_encoder_3=modules["t5"], tokenizer_3=t5_tokenizer()
    )
