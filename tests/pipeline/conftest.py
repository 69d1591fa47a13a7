"""Tiny random releases: whole pipelines of diffusers, saved in its own layout, one per family."""

import shutil
from types import SimpleNamespace

import pytest
import torch

CLIP_L = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
          "projection_dim": 32, "hidden_act": "quick_gelu", "eos_token_id": 2, "pad_token_id": 1}  # fmt: skip
CLIP_G = CLIP_L | {"hidden_size": 64, "intermediate_size": 96, "projection_dim": 64, "hidden_act": "gelu"}
T5 = {"d_model": 128, "d_kv": 16, "d_ff": 96, "num_heads": 2, "num_layers": 2, "vocab_size": 1104,
      "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}  # fmt: skip


def shaken(module, seed):
    """Fill every parameter with small random numbers: zero gates would hide the text."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def copied_clip_tokenizer(folder, pad=None):
    """A tokenizer of its own: the package's is shared, and setting its padding would change it for all."""
    from transformers import CLIPTokenizer

    clip_tokenizer_folder = folder / f"tokenizer-{pad}"
    from mmdit.encoders.tokenizers import _clip_from_package

    _clip_from_package().save_pretrained(clip_tokenizer_folder)
    tokenizer = CLIPTokenizer.from_pretrained(str(clip_tokenizer_folder), local_files_only=True)
    tokenizer.model_max_length = 77
    if pad is not None:
        tokenizer.pad_token = pad
    return tokenizer


def t5_tokenizer(folder):
    from transformers import T5TokenizerFast

    from mmdit.encoders.tokenizers import TINY

    (folder / "t5").mkdir(exist_ok=True)
    shutil.copy(TINY / "spiece.model", folder / "t5" / "spiece.model")
    return T5TokenizerFast.from_pretrained(str(folder / "t5"), local_files_only=True)


def tiny_vae(latent_channels, scale, shift, quant):
    from diffusers import AutoencoderKL

    kind = {n: (f"{n}EncoderBlock2D",) * 4 for n in ("Down", "Up")}
    return shaken(
        AutoencoderKL(
            down_block_types=kind["Down"],
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 32, 32, 32),
            layers_per_block=1,
            latent_channels=latent_channels,
            scaling_factor=scale,
            shift_factor=shift,
            use_quant_conv=quant,
            use_post_quant_conv=quant,
        ),
        1,
    )


def sd3_pipeline(folder, medium35=False):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    clip_l = shaken(CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_L)), 2)
    with torch.no_grad():
        clip_l.text_projection.weight.copy_(torch.eye(32))  # as SD3's diffusers folder has it
    return StableDiffusion3Pipeline(
        transformer=shaken(
            SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=16,
                out_channels=16,
                num_layers=3,
                attention_head_dim=64,
                num_attention_heads=2,
                caption_projection_dim=128,
                joint_attention_dim=128,
                pooled_projection_dim=96,
                pos_embed_max_size=12,
                qk_norm="rms_norm" if medium35 else None,
                dual_attention_layers=(0, 1) if medium35 else (),
            ),
            3,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(16, 1.5305, 0.0609, quant=False),
        text_encoder=clip_l,
        text_encoder_2=shaken(CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G)), 4),
        text_encoder_3=shaken(T5EncoderModel(T5Config(**T5)), 5),
        tokenizer=copied_clip_tokenizer(folder),
        tokenizer_2=copied_clip_tokenizer(folder, "!"),
        tokenizer_3=t5_tokenizer(folder),
    )


def sd15_pipeline(folder):
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    return StableDiffusionPipeline(
        unet=shaken(
            UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(32, 64),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=32,
                attention_head_dim=8,
            ),
            3,
        ),
        scheduler=EulerDiscreteScheduler(**SD_CHAIN),
        vae=tiny_vae(4, 0.18215, None, quant=True),
        text_encoder=shaken(CLIPTextModel(CLIPTextConfig(**CLIP_L)), 2),
        tokenizer=copied_clip_tokenizer(folder),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_pipeline(folder):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    return StableDiffusionXLPipeline(
        unet=shaken(
            UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(64, 128),
                layers_per_block=1,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2),
                cross_attention_dim=96,
                attention_head_dim=(1, 2),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=64 + 6 * 256,
            ),
            3,
        ),
        scheduler=EulerDiscreteScheduler(**SD_CHAIN),
        vae=tiny_vae(4, 0.13025, None, quant=True),
        text_encoder=shaken(CLIPTextModel(CLIPTextConfig(**CLIP_L)), 2),
        text_encoder_2=shaken(CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G)), 4),
        tokenizer=copied_clip_tokenizer(folder),
        tokenizer_2=copied_clip_tokenizer(folder, "!"),
    )


SD_CHAIN = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
            "timestep_spacing": "leading", "steps_offset": 1, "prediction_type": "epsilon"}  # fmt: skip
PIPELINES = {
    "sd3": sd3_pipeline,
    "sd3.5_medium": lambda folder: sd3_pipeline(folder, medium35=True),
    "sd1.5": sd15_pipeline,
    "sdxl": sdxl_pipeline,
}


@pytest.fixture(scope="session")
def tiny_release(tmp_path_factory):
    """A function of a family's name: (diffusers' pipeline, the folder it was saved to), made once."""
    made = {}

    def build(family):
        if family not in made:
            work = tmp_path_factory.mktemp(family.replace(".", "_"))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                pipe = PIPELINES[family](work)
            pipe.set_progress_bar_config(disable=True)
            pipe.save_pretrained(work / "folder")
            if family != "sd1.5":  # the packaged vocabulary, the same for every CLIP, is read once
                for name in ("tokenizer", "tokenizer_2"):
                    shutil.rmtree(work / "folder" / name)
            made[family] = SimpleNamespace(pipe=pipe, folder=work / "folder", family=family)
        return made[family]

    return build


def _clip_keys(state):
    """Names with `text_model.`, which transformers took from CLIPTextModel in 5.6."""
    return {k if k.startswith("text_") else f"text_model.{k}": v for k, v in state.items() if "position_ids" not in k}


def open_clip(state):
    """A Hugging Face CLIP text tower in the names and packing of OpenCLIP, as SDXL's single file has it."""
    state = _clip_keys(state)
    out = {
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": state["text_model.final_layer_norm.weight"],
        "ln_final.bias": state["text_model.final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
        "logit_scale": torch.zeros(()),
    }
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
    layers = 1 + max(int(k.split(".")[3]) for k in state if ".layers." in k)
    for i in range(layers):
        ours, theirs = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            out |= {f"{theirs}.{b}.{kind}": state[f"{ours}.{a}.{kind}"] for a, b in names.items()}
            packed = [state[f"{ours}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            out[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(packed)
    return out


def original_parts(release):
    """{part: tensors under the names of the release's single file} of a tiny release."""
    from mmdit.config import UNetConfig
    from mmdit.weights import sd3, unet_keys
    from mmdit.weights import vae as vae_keys

    pipe = release.pipe
    parts = {"vae": {f"first_stage_model.{k}": v for k, v in vae_keys.to_original(pipe.vae.state_dict()).items()}}
    if release.family.startswith("sd3"):
        denoiser = sd3.from_diffusers(pipe.transformer.state_dict())
        clip_l, clip_g = _clip_keys(pipe.text_encoder.state_dict()), _clip_keys(pipe.text_encoder_2.state_dict())
        del clip_l["text_projection.weight"]  # the release's file has none
        texts = {"clip_l": clip_l, "clip_g": clip_g, "t5xxl": pipe.text_encoder_3.state_dict()}
        parts |= {
            name.replace("t5xxl", "t5"): {f"text_encoders.{name}.transformer.{k}": v for k, v in state.items()}
            for name, state in texts.items()
        }
    else:
        config = UNetConfig(**UNETS[release.family])
        denoiser = unet_keys.from_diffusers(pipe.unet.state_dict(), config)
        first = _clip_keys(pipe.text_encoder.state_dict())
        if release.family == "sd1.5":
            parts["clip_l"] = {f"cond_stage_model.transformer.{k}": v for k, v in first.items()}
        else:
            second = open_clip(pipe.text_encoder_2.state_dict())
            parts["clip_l"] = {f"conditioner.embedders.0.transformer.{k}": v for k, v in first.items()}
            parts["clip_g"] = {f"conditioner.embedders.1.model.{k}": v for k, v in second.items()}
    parts["denoiser"] = {f"model.diffusion_model.{k}": v for k, v in denoiser.items()}
    return parts


UNETS = {
    "sd1.5": {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "transformer_depth": (1, 0),
              "middle_transformer_depth": 1, "num_heads": 8, "context_dim": 32},
    "sdxl": {"model_channels": 64, "channel_mult": (1, 2), "num_res_blocks": 1, "transformer_depth": (0, 2),
             "middle_transformer_depth": 2, "head_dim": 64, "linear_projection": True, "context_dim": 96,
             "pooled_dim": 64 + 6 * 256, "size_embed_dim": 256},
}  # fmt: skip
# what shapes cannot tell of networks this small; the releases' own numbers are known
OVERRIDES = {
    "clip_l": {"num_attention_heads": 2},
    "clip_g": {"num_attention_heads": 2},
    "t5": {"num_heads": 2, "d_kv": 16},
}


@pytest.fixture(scope="session")
def single_file(tiny_release, tmp_path_factory):
    """A function of a family and of parts: (path of one .safetensors in the release's own layout, overrides)."""
    from safetensors.torch import save_file

    made = {}

    def build(family, parts=None, dtype=torch.float32):
        key = (family, parts, dtype)
        if key not in made:
            whole = original_parts(tiny_release(family))
            chosen = whole if parts is None else {name: whole[name] for name in parts}
            tensors = {k: v.to(dtype).contiguous().clone() for part in chosen.values() for k, v in part.items()}
            path = tmp_path_factory.mktemp("single") / f"{'-'.join(chosen)}.safetensors"
            save_file(tensors, path)
            made[key] = path
        heads = {"denoiser": {"num_heads": 8}} if family == "sd1.5" else {}
        return made[key], OVERRIDES | heads

    return build
