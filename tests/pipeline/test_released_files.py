"""Released files as they really are: keys that no network reads, marks of other noise, parts in wrong places."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdit.pipeline import TextToImage, sample_to_folder
from mmdit.pipeline.sources import find_sources
from mmdit.weights.convert import convert
from mmdit.weights.detect import detect
from mmdit.weights.files import open_weights

# beside the networks: Stable Diffusion's tables and EMA's counters, losses, what ComfyUI writes, buffers of CLIP
_TABLES = ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
           "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "logvar",
           "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
           "lvlb_weights", "scale_factor")  # fmt: skip
BESIDE = {
    "sd1.5": (*_TABLES, "cond_stage_model.transformer.text_model.embeddings.position_ids", "model_ema.decay",
              "model_ema.num_updates", "model_ema.diffusion_modelinput_blocks00weight", "first_stage_model.loss.logvar",
              "first_stage_model.model_ema.decay", "cond_stage_model.logit_scale"),
    "sdxl": ("denoiser.sigmas", "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
             "conditioner.embedders.1.model.attn_mask", "conditioner.embedders.0.logit_scale",
             "conditioner.embedders.0.transformer.text_projection.weight", "conditioner.embedders.0.text_projection",
             "first_stage_model.loss.discriminator.main.0.weight"),
    "sd3": ("text_encoders.clip_l.transformer.text_model.embeddings.position_ids", "text_encoders.clip_l.logit_scale",
            "text_encoders.clip_g.transformer.text_model.embeddings.position_ids", "text_encoders.clip_g.logit_scale",
            "text_encoders.clip_l.transformer.text_projection.weight", "text_encoders.clip_l.transformer.logit_scale",
            "text_encoders.t5xxl.transformer.spiece_model", "text_encoders.t5xxl.logit_scale", "model_sampling.sigmas"),
}  # fmt: skip


def changed(path, folder, more=(), drop=(), metadata=None):
    """Return a copy of a file with more tensors, and without those that begin so."""
    state = {key: tensor for key, tensor in load_file(path).items() if not key.startswith(tuple(drop) or ("?",))}
    save_file({**state, **dict(more)}, folder / "changed.safetensors", metadata=metadata)
    return folder / "changed.safetensors"


def pictures(path, overrides, **options):
    pipeline = TextToImage.load(path, dtype="fp32", device="cpu", overrides=overrides, **options)
    return pipeline(["a red star"], "a circle", seed=3, size=64, num_steps=2)


@pytest.mark.parametrize("family", BESIDE)
def test_keys_that_no_network_reads_change_nothing(family, single_file, tiny_release, tmp_path):
    path, overrides = single_file(family)
    spiece = {"spiece": tiny_release("sd3").folder / "tokenizer_3"} if family == "sd3" else {}
    whole = changed(path, tmp_path, {key: torch.full((3, 3), 7.0) for key in BESIDE[family]})
    assert detect(open_weights(whole)).unknown == ()
    assert np.array_equal(pictures(whole, overrides, **spiece), pictures(path, overrides, **spiece))
    counted, expected = (
        {name: part.parameters for name, part in find_sources(place, overrides=overrides).parts.items()}
        for place in (whole, path)
    )
    assert counted == expected


def test_a_single_file_marked_for_v_prediction_is_followed_and_one_of_other_noise_refused(single_file, tmp_path):
    path, overrides = single_file("sdxl")
    mark = {"v_pred": torch.empty(0)}
    sources = find_sources(changed(path, tmp_path, mark), overrides=overrides)
    assert sources.release.diffusion.prediction == "v"
    assert sources.release.diffusion.schedule == find_sources(path, overrides=overrides).release.diffusion.schedule
    assert not np.array_equal(pictures(changed(path, tmp_path, mark), overrides), pictures(path, overrides))
    spec = changed(path, tmp_path, metadata={"modelspec.prediction_type": "v"})
    assert find_sources(spec, overrides=overrides).release.diffusion.prediction == "v"
    for name in ("ztsnr", "edm_vpred.sigma_max"):
        with pytest.raises(ValueError, match=rf"changed\.safetensors is marked '{name}' \(noise"):
            find_sources(changed(path, tmp_path, {**mark, name: torch.empty(0)}), overrides=overrides)


def test_a_denoiser_and_text_encoders_that_do_not_fit_are_refused_from_headers(single_file, tiny_release, tmp_path):
    path, overrides = single_file("sdxl")
    narrow = {key: tensor[:, :32].clone() for key, tensor in load_file(path).items() if "token_embedding" in key}
    text = changed(path, tmp_path, narrow)
    with pytest.raises(ValueError, match=r"reads text 96 wide; .* \(clip_l, clip_g\) give 64\. It is of another"):
        find_sources(path, text=text, overrides=overrides)
    with pytest.raises(ValueError, match=r"holds a denoiser of sdxl, which is no sd3: one is an MMDiT, the other a"):
        find_sources(path, family="sd3", overrides=overrides)
    with pytest.raises(ValueError, match=r"the text encoders of sd1\.5, not of sdxl; give those of sdxl"):
        find_sources(path, text=single_file("sd1.5")[0], overrides=overrides)


def test_the_refiner_is_not_taken_for_the_base(single_file, tmp_path):
    path, overrides = single_file("sdxl")
    mark = {"conditioner.embedders.0.model.ln_final.weight": torch.zeros(3)}
    refiner = changed(path, tmp_path, mark, drop=("conditioner.",))
    with pytest.raises(ValueError, match="of no released family"):
        find_sources(refiner, text=path, overrides=overrides)
    wide = {"model.diffusion_model.label_emb.0.0.weight": torch.zeros(256, 2560)}
    assert detect(open_weights(changed(path, tmp_path, wide))).family is None


STATED = {
    "trained_betas": ("sd1.5", [0.1, 0.2], r"states trained_betas \(a table"),
    "num_train_timesteps": ("sd1.5", 500, "states num_train_timesteps 500; every"),
    "beta_schedule": ("sd1.5", "lineal", r"scheduler_config\.json: unknown beta_schedule 'lineal'; did you mean"),
    "beta_end": ("sd1.5", "much", "states beta_end 'much', which is no number"),
    "beta_start": ("sd1.5", 2.0, "states noise that makes no sense"),
    "prediction_type": ("sd1.5", "flow", r"scheduler_config\.json: unknown prediction_type 'flow'"),
    "_class_name": ("sd1.5", "EDMEulerScheduler", "noise scaled as in EDM"),
    "shift": ("sd3", "three", "states shift 'three', which is no number"),
    "use_dynamic_shifting": ("sd3", True, "a shift that grows with the picture"),
}


@pytest.mark.parametrize("name", STATED)
def test_a_folder_that_states_unknown_noise_is_refused_by_field(name, tiny_release, tmp_path):
    family, value, message = STATED[name]
    shutil.copytree(tiny_release(family).folder, tmp_path / "folder")
    file = tmp_path / "folder" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=message):
        find_sources(tmp_path / "folder")


def test_the_cosine_betas_of_a_folder_are_those_of_diffusers(tiny_release, tmp_path):
    from diffusers import DDPMScheduler

    from mmdit.diffusion import build_schedule

    shutil.copytree(tiny_release("sd1.5").folder, tmp_path / "folder")
    theirs = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    theirs.save_pretrained(tmp_path / "folder" / "scheduler")
    schedule = build_schedule(find_sources(tmp_path / "folder").release.diffusion.schedule)
    t = schedule.t_from_timestep(torch.tensor([0.0, 400.0, 999.0], dtype=torch.float64))
    assert torch.allclose(schedule.alpha(t) ** 2, theirs.alphas_cumprod.double()[[0, 400, 999]], rtol=1e-4, atol=1e-9)


def test_the_vae_of_a_folder_states_its_scale(tiny_release, tmp_path):
    shutil.copytree(tiny_release("sd1.5").folder, tmp_path / "folder")
    file = tmp_path / "folder" / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": 0.5}))
    assert TextToImage.load(tmp_path / "folder", device="cpu").vae.config.scale == 0.5


@pytest.fixture
def separate(single_file, tmp_path):
    """The release's folder text_encoders, of the tiny SD3."""
    state = load_file(single_file("sd3")[0])
    (tmp_path / "text_encoders").mkdir()
    for name in ("clip_l", "clip_g", "t5xxl"):
        prefix = f"text_encoders.{name}.transformer."
        own = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        save_file(own, tmp_path / "text_encoders" / f"{name}.safetensors")
    return tmp_path / "text_encoders"


def test_t5_without_its_vocabulary_is_told_before_anything_is_read(single_file, tiny_release, separate, monkeypatch):
    import mmdit.pipeline.released as room

    path, overrides = single_file("sd3", ("denoiser", "vae"))
    with monkeypatch.context() as patch:
        patch.setattr(room, "load_denoiser", None)
        patch.setattr(room, "load_vae", None)
        with pytest.raises(ValueError, match=r"T5's vocabulary.*--spiece.*--text clip_l=PATH clip_g=PATH"):
            TextToImage.load(path, text=separate, device="cpu", overrides=overrides)
        with pytest.raises(FileNotFoundError, match=r"no T5 vocabulary no/spiece\.model"):
            TextToImage.load(path, text=separate, device="cpu", overrides=overrides, spiece="no/spiece.model")
    shutil.copytree(tiny_release("sd3").folder / "tokenizer_3", separate.parent / "tokenizer_3")
    assert pictures(path, overrides, text=separate).shape == (1, 64, 64, 3)


def test_encoders_may_be_named_in_an_all_in_one_file(single_file, separate, tiny_release):
    whole, overrides = single_file("sd3")
    path, _ = single_file("sd3", ("denoiser", "vae"))
    clips = {"clip_l": whole, "clip_g": whole}
    overrides = overrides | {"t5": {"d_model": 128}}
    apart = {name: separate / f"{name}.safetensors" for name in clips}
    assert np.array_equal(pictures(path, overrides, text=clips), pictures(path, overrides, text=apart))


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("vae", "holds no denoiser (MMDiT or U-Net): it holds vae; the denoiser is in another file"),
        ("scheduler", "holds no .safetensors file"),
        ("no/such/folder", "no file or folder"),
        ("model.gguf", "is a GGUF file"),
        ("pickles", "is a pickle"),
        ("run", "is a run of ours, not released weights: give it without --weights"),
    ],
)
def test_weights_that_are_none_are_told_for_what_they_are(place, told, tiny_release, tmp_path, capsys):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(20))
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "model.bin").write_bytes(b"\x80\x02")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    here = tmp_path if (tmp_path / place).exists() else tiny_release("sd3").folder
    for more in ({}, {"dry_run": True}):
        assert sample_to_folder(None, ["a"], weights=str(here / place), device="cpu", out=tmp_path / "out", **more) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(("family", "stated"), [("sd1.5", True), ("sd1.5", False), ("sdxl", False), ("sd3", False)])
def test_a_converted_release_is_a_pipeline_of_diffusers(family, stated, tiny_release, tmp_path):
    from diffusers import DiffusionPipeline

    release = tiny_release(family)
    source = shutil.copytree(release.folder, tmp_path / "source")
    if not stated:  # as of a single file: nothing says which pipeline and noise
        (source / "model_index.json").unlink()
        shutil.rmtree(source / "scheduler")
    convert(source, tmp_path / "out", "diffusers", part="all")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert type(pipe) is type(release.pipe)
    pipe.set_progress_bar_config(disable=True)
    if not stated and family == "sd1.5":  # DDIM, where the tiny one has Euler
        assert pipe.scheduler.config.prediction_type == "epsilon"
        assert torch.equal(pipe.scheduler.betas, release.pipe.scheduler.betas)
        pipe.scheduler = release.pipe.scheduler
    options = {"height": 64, "width": 64, "num_inference_steps": 1, "output_type": "np"}
    drawn = [p("a star", generator=torch.Generator().manual_seed(1), **options).images for p in (pipe, release.pipe)]
    assert np.allclose(drawn[0], drawn[1], atol=1e-5)
    assert find_sources(tmp_path / "out").release.diffusion == find_sources(release.folder).release.diffusion


def test_a_denoiser_alone_is_no_pipeline_and_marks_of_v_prediction_are_stated(single_file, tiny_release, tmp_path):
    path, _ = single_file("sd3", ("denoiser",))
    convert(path, tmp_path / "alone", "diffusers", part="all")
    assert [file.name for file in (tmp_path / "alone").iterdir()] == ["transformer"]
    source = shutil.copytree(tiny_release("sdxl").folder, tmp_path / "source")
    (source / "model_index.json").unlink()
    unet = source / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(unet), unet, metadata={"modelspec.prediction_type": "v"})
    convert(source, tmp_path / "out", "diffusers", part="all")
    assert find_sources(tmp_path / "out").release.diffusion.prediction == "v"
