"""Released pipelines against diffusers': the same weights, prompts and first noise give the same latents."""

import json
import shutil

import pytest
import torch

from mmdit import rng
from mmdit.pipeline import Sizes, TextToImage
from mmdit.pipeline.request import check_sizes, check_skip
from mmdit.sampling import SkipLayerGuidance

PROMPT, NEGATIVE = "a red circle above a blue square, 3 stars!", "blurry"
SIZE = (64, 96)
STEPS = 4


def load(release, **options):
    # 8 heads of 4 channels: shapes tell neither, and a folder's config does
    return TextToImage.load(release.folder, family=release.family, dtype="fp32", device="cpu", **options)


def noise(pipeline, indices=(0,), size=SIZE):
    channels = pipeline.vae.config.latent_channels
    return torch.from_numpy(rng.normal(7, "sample_noise", list(indices), (channels, size[0] // 8, size[1] // 8)))


def ours(pipeline, prompts=(PROMPT,), negative=None, size=SIZE, sizes=None, skip_layer=False, **changes):
    """Latents of our pipeline, by the road that `images` takes."""
    config = pipeline._settings(**{"num_steps": STEPS, "guidance_scale": 3.0} | changes)
    told = check_sizes(sizes, size, pipeline.release)
    texts = pipeline.encode_texts(list(prompts), [negative] * len(prompts), config, told)
    indices = list(range(len(prompts)))
    return pipeline.latents(texts, indices, 7, config, size, skip_layer=check_skip(skip_layer, pipeline.release))


def theirs(release, pipeline, prompts=(PROMPT,), negative=None, size=SIZE, guidance_scale=3.0, **options):
    return release.pipe(
        prompt=list(prompts),
        negative_prompt=None if negative is None else [negative] * len(prompts),
        height=size[0],
        width=size[1],
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        latents=noise(pipeline, range(len(prompts)), size),
        output_type="latent",
        **options,
    ).images


def assert_same(a, b, tolerance=2e-5):
    error = float((a.double() - b.double()).norm() / b.double().norm())
    assert error < tolerance, error


FAMILIES = ["sd3", "sd3.5_medium", "sd1.5", "sdxl"]
EXTRA = {"sd3": {"max_sequence_length": 77}, "sd3.5_medium": {"max_sequence_length": 77}}


@pytest.mark.parametrize(
    ("family", "negative"),
    [("sd3", None), ("sd3.5_medium", NEGATIVE), ("sd1.5", None), ("sdxl", None), ("sdxl", NEGATIVE)],
)
def test_a_diffusers_folder_gives_diffusers_latents(tiny_release, family, negative):
    release = tiny_release(family)
    pipeline = load(release)
    options = {"sampler": "euler"}
    expected = theirs(release, pipeline, negative=negative, **EXTRA.get(family, {}))
    assert_same(ours(pipeline, negative=negative, **options), expected)
    other = ours(pipeline, prompts=["two white stars"], negative=negative, **options)
    assert float((other - expected).norm() / expected.norm()) > 1e-3  # the text matters


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_gives_the_same_latents(tiny_release, single_file, family):
    release = tiny_release(family)
    path, overrides = single_file(family)
    extra = {"spiece": release.folder / "tokenizer_3"} if family.startswith("sd3") else {}
    pipeline = TextToImage.load(path, dtype="fp32", device="cpu", overrides=overrides, **extra)
    assert pipeline.release.name == family
    expected = theirs(release, pipeline, negative=NEGATIVE, **EXTRA.get(family, {}))
    assert_same(ours(pipeline, negative=NEGATIVE, sampler="euler"), expected)


def test_several_prompts_have_their_own_noise_and_the_null_is_one_for_all(tiny_release):
    release = tiny_release("sd3")
    pipeline = load(release)
    prompts = [PROMPT, "two stars", ""]
    expected = theirs(release, pipeline, prompts=prompts, max_sequence_length=77)
    assert_same(ours(pipeline, prompts=prompts), expected)


def test_t5_length_and_a_missing_t5_are_diffusers(tiny_release, tmp_path):
    release = tiny_release("sd3")
    longer = load(release, t5_length=128)
    expected = theirs(release, longer, max_sequence_length=128)
    assert_same(ours(longer), expected)
    clips = {"clip_l": release.folder / "text_encoder", "clip_g": release.folder / "text_encoder_2"}
    without = load(release, text=clips, overrides={"t5": {"d_model": 128}})
    pipe = release.pipe
    third = pipe.text_encoder_3, pipe.tokenizer_3
    try:
        pipe.text_encoder_3 = pipe.tokenizer_3 = None
        expected = theirs(release, without, max_sequence_length=77)
    finally:
        pipe.text_encoder_3, pipe.tokenizer_3 = third
    assert_same(ours(without), expected)


def test_skip_layer_guidance_is_diffusers_formula_on_the_same_steps(tiny_release):
    release = tiny_release("sd3.5_medium")
    pipeline = load(release)
    skip = SkipLayerGuidance(scale=2.5, layers=(1,), start=0.01, end=0.7)
    expected = theirs(
        release, pipeline, max_sequence_length=77, skip_guidance_layers=[1], skip_layer_guidance_scale=2.5,
        skip_layer_guidance_start=0.01, skip_layer_guidance_stop=0.7,
    )  # fmt: skip
    result = ours(pipeline, sampler="euler", skip_layer=skip)
    assert_same(result, expected)
    assert float((result - ours(pipeline, sampler="euler")).norm() / expected.norm()) > 1e-3


def test_turbo_draws_without_guidance_in_four_steps(tiny_release):
    release = tiny_release("sd3")
    pipeline = TextToImage.load(release.folder, family="sd3.5_large_turbo", dtype="fp32", device="cpu")
    expected = theirs(release, pipeline, guidance_scale=1.0, max_sequence_length=77)
    assert_same(ours(pipeline, num_steps=None, guidance_scale=None), expected)


def test_sdxl_is_told_original_size_crop_and_target(tiny_release):
    release = tiny_release("sdxl")
    pipeline = load(release)
    told = Sizes(original=(512, 640), crop=(8, 32), target=(128, 64))
    expected = theirs(release, pipeline, original_size=(512, 640), crops_coords_top_left=(8, 32), target_size=(128, 64))
    result = ours(pipeline, sizes=told)
    assert_same(result, expected)
    assert float((result - ours(pipeline)).norm() / expected.norm()) > 1e-4


def test_sd15_equals_ddim_of_diffusers_up_to_its_last_step(tiny_release):
    from diffusers import DDIMScheduler

    release = tiny_release("sd1.5")
    pipeline = load(release)
    chain = {**release.pipe.scheduler.config, "set_alpha_to_one": True, "clip_sample": False}
    euler, release.pipe.scheduler = release.pipe.scheduler, DDIMScheduler.from_config(chain)
    try:
        expected = theirs(release, pipeline)
    finally:
        release.pipe.scheduler = euler
    assert pipeline.sampling.sampler == "ddim"
    assert_same(ours(pipeline), expected)


def test_a_folder_that_states_v_prediction_or_another_shift_is_followed(tiny_release, tmp_path):
    for family, change in (("sd1.5", {"prediction_type": "v_prediction"}), ("sd3", {"shift": 1.5})):
        release = tiny_release(family)
        folder = shutil.copytree(release.folder, tmp_path / family)
        file = folder / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        pipeline = TextToImage.load(folder, dtype="fp32", device="cpu")
        before = release.pipe.scheduler
        release.pipe.scheduler = type(before).from_config({**before.config, **change})
        try:
            expected = theirs(release, pipeline, **EXTRA.get(family, {}))
        finally:
            release.pipe.scheduler = before
        assert_same(ours(pipeline, sampler="euler"), expected)
        file.write_text(json.dumps({"prediction_type": "flow", "use_dynamic_shifting": family == "sd3"}))
        with pytest.raises(ValueError, match=r"not known here|Known: epsilon"):
            TextToImage.load(folder, device="cpu")


@pytest.mark.parametrize("family", ["sd3", "sdxl"])
def test_pictures_are_those_of_diffusers(tiny_release, family):
    import numpy as np

    release = tiny_release(family)
    pipeline = load(release)
    images = pipeline([PROMPT], seed=7, size=SIZE, num_steps=STEPS, guidance_scale=3.0)
    expected = release.pipe(
        prompt=[PROMPT], height=64, width=96, num_inference_steps=STEPS, guidance_scale=3.0, latents=noise(pipeline),
        output_type="np", **EXTRA.get(family, {}),
    ).images  # fmt: skip
    assert images.shape == (1, 64, 96, 3)
    assert np.abs(images - expected * 255).max() <= 1
