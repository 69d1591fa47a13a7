"""The VAE equals diffusers' on random weights; its latents are shifted and scaled; the tiny one is as good as said."""

import json

import pytest
import torch

from mmdit.config import ShapesConfig, VAEConfig
from mmdit.data import make_dataset
from mmdit.encoders.vae import TINY, AutoencoderKL, load_vae, sample, to_images, to_pixels, vae_loss
from mmdit.train.tiny_vae import Stage, draw_batch, latent_statistics, outline_weight, psnr, train_stage
from mmdit.weights.vae import to_diffusers

SMALL = {"block_channels": (8, 16, 16), "norm_groups": 4, "num_res_blocks": 1}


def build(**fields):
    """A small VAE; every parameter is redrawn, since a fresh norm (weight 1, bias 0) would hide a swapped one."""
    torch.manual_seed(0)
    vae = AutoencoderKL(VAEConfig(**{**SMALL, **fields})).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1.0 if parameter.ndim == 1 else 0.0) * 0.5)
    return vae


@pytest.mark.parametrize(("channels", "quant"), [(16, False), (4, True)])
@pytest.mark.parametrize("sides", [(32, 32), (24, 40)])
def test_it_equals_diffusers_on_random_weights(channels, quant, sides):
    from diffusers import AutoencoderKL as Theirs

    vae = build(latent_channels=channels, use_quant_conv=quant, shift=0.1, scale=0.7)
    theirs = Theirs(
        block_out_channels=SMALL["block_channels"],
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=channels,
        layers_per_block=1,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    ).eval()
    theirs.load_state_dict(to_diffusers(vae.state_dict()))
    pixels = torch.rand(2, 3, *sides) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(pixels).latent_dist
        mean, logvar = vae.moments(pixels)
        torch.testing.assert_close(mean, posterior.mean, atol=5e-5, rtol=0)
        torch.testing.assert_close(logvar, posterior.logvar, atol=5e-5, rtol=0)
        latents = vae.encode(pixels)
        torch.testing.assert_close(latents, (posterior.mean - 0.1) * 0.7, atol=5e-5, rtol=0)
        expected = theirs.decode(latents / 0.7 + 0.1).sample
        torch.testing.assert_close(vae.decode(latents), expected, atol=5e-5, rtol=0)
    assert latents.shape == (2, channels, sides[0] // 4, sides[1] // 4)
    assert expected.std() > 0.05  # not a comparison of zeros


def test_shift_and_scale_may_differ_by_channel_and_decode_undoes_them():
    shift, scale = tuple(0.1 * i for i in range(16)), tuple(1.0 + 0.1 * i for i in range(16))
    vae = build(shift=shift, scale=scale)
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    mean, _ = vae.moments(pixels)
    latents = vae.encode(pixels)
    torch.testing.assert_close(latents[0, 3], (mean[0, 3] - 0.3) * 1.3)
    torch.testing.assert_close(vae.denormalise(latents), mean)
    torch.testing.assert_close(vae.decode(latents), vae.decode_raw(mean), atol=1e-5, rtol=0)


def test_given_noise_draws_from_the_posterior_with_its_deviation():
    vae = build(shift=0.0, scale=2.0)
    pixels, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 16, 4, 4)
    mean, logvar = vae.moments(pixels)
    torch.testing.assert_close(vae.encode(pixels, noise), 2 * (mean + (logvar / 2).exp() * noise))
    torch.testing.assert_close(sample(mean, logvar, torch.zeros_like(noise)), mean)


def test_the_log_variance_is_clamped_as_in_the_releases():
    vae = build()
    with torch.no_grad():
        vae.encoder.conv_out.bias[16:24] = 1e4
        vae.encoder.conv_out.bias[24:] = -1e4
    _, logvar = vae.moments(torch.zeros(1, 3, 16, 16))
    assert logvar[:, :8].unique().tolist() == [20.0]
    assert logvar[:, 8:].unique().tolist() == [-30.0]


def test_the_kl_term_is_the_closed_form():
    vae = build()
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, logvar = vae.moments(pixels)
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    loss = vae_loss(vae, pixels, torch.zeros_like(mean))
    torch.testing.assert_close(loss.kl, expected)
    error = vae.decode_raw(mean) - pixels
    torch.testing.assert_close(loss.total, 10 * error.square().mean() + error.abs().mean() + 1e-4 * expected)
    doubled = vae_loss(vae, pixels, torch.zeros_like(mean), torch.full((2, 1, 16, 16), 2.0))
    torch.testing.assert_close(doubled.squared, 2 * loss.squared)


@pytest.mark.parametrize("fields", [{}, {"stem_patch": 2, "mid_attention": False}, {"use_quant_conv": True}])
def test_every_parameter_has_a_gradient(fields):
    vae = build(**fields)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    noise = torch.randn_like(vae.moments(pixels)[0])
    vae_loss(vae, pixels, noise).total.backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_pictures_of_a_batch_do_not_see_each_other():
    vae = build(stem_patch=2)
    pixels = torch.rand(3, 3, 32, 48) * 2 - 1
    together = vae.decode(vae.encode(pixels))
    assert together.shape == pixels.shape
    torch.testing.assert_close(together[1:2], vae.decode(vae.encode(pixels[1:2])), atol=1e-5, rtol=1e-5)


def test_only_a_vae_that_says_so_clamps_its_pixels():
    latents = 100 * torch.randn(1, 16, 4, 4)
    free, clamped = build(), build(clamp=True)
    assert free.decode(latents).abs().max() > 1.0
    torch.testing.assert_close(clamped.decode(latents), free.decode(latents).clamp(-1, 1))


def test_images_and_pixels_turn_into_each_other_exactly():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 8, 32, 1).expand(1, 8, 32, 3).numpy()
    assert (to_images(to_pixels(images)) == images).all()
    assert to_images(torch.tensor([[[[-3.0]], [[0.0]], [[3.0]]]])).tolist() == [[[[0, 128, 255]]]]


def test_wrong_shapes_are_refused_in_words():
    vae = build()
    with pytest.raises(ValueError, match=r"multiples of 4, got \[1, 3, 18, 16\]"):
        vae.encode(torch.zeros(1, 3, 18, 16))
    with pytest.raises(ValueError, match=r"latents \[B, 16, H, W\], got \[1, 4, 4, 4\]"):
        vae.decode(torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match="norm_groups"):
        VAEConfig(block_channels=(10,), norm_groups=4)
    with pytest.raises(ValueError, match="3 numbers for 16 latent channels"):
        VAEConfig(shift=(0.0, 0.0, 0.0))


# --- the embedded one -------------------------------------------------------------------------------------------


def test_the_tiny_vae_reconstructs_shapes_as_well_as_its_record_says():
    vae = load_vae("tiny")
    record = json.loads(TINY.with_suffix(".json").read_text(encoding="utf-8"))
    images = make_dataset(ShapesConfig(seed=99), "heldout").pixels(range(32))
    with torch.no_grad():
        latents = vae.encode(to_pixels(images))
        pixels = vae.decode(latents)
    assert latents.shape == (32, 16, 8, 8)
    assert pixels.abs().max() <= 1.0
    error = ((pixels - to_pixels(images)) / 2).square().mean(dim=(1, 2, 3))
    assert (-10 * error.log10()).mean() > 33.0
    assert record["quality"]["shapes_seen"]["psnr_mean_over_images"] >= 34.0
    assert record["quality"]["emoji_heldout"]["psnr_mean_over_images"] >= 28.0
    for split in ("shapes_seen", "shapes_heldout"):
        assert record["quality"][split]["oracle"]["all_correct"]["value"] >= 0.98


def test_the_tiny_vae_has_latents_of_mean_zero_and_deviation_one():
    vae = load_vae("tiny")
    images = make_dataset(ShapesConfig(max_objects=6), "train").pixels(range(64))
    with torch.no_grad():
        latents = vae.encode(to_pixels(images))
    assert latents.mean().abs() < 0.3  # shapes alone; shift and scale are those of shapes and emoji together
    assert 0.5 < latents.std() < 1.5


def test_the_tiny_vae_is_small_and_what_its_record_names():
    import hashlib

    record = json.loads(TINY.with_suffix(".json").read_text(encoding="utf-8"))
    assert TINY.stat().st_size <= 3_500_000
    assert hashlib.sha256(TINY.read_bytes()).hexdigest() == record["sha256"]
    assert load_vae("tiny").config == VAEConfig(**record["config"])


# --- the recipe -------------------------------------------------------------------------------------------------


def test_outlines_weigh_more_and_emoji_stay_as_they_are():
    pixels = torch.full((2, 3, 16, 16), -0.9)
    pixels[:, 0, 8, 8] = 0.9
    weight = outline_weight(pixels, shapes=1, outline=7.0)
    assert weight.shape == (2, 1, 16, 16)
    assert weight[0, 0, 6:11, 6:11].unique().tolist() == [8.0]
    assert weight[0].sum() == 16 * 16 + 7 * 25
    assert weight[1].unique().tolist() == [1.0]
    assert outline_weight(pixels, shapes=1, outline=0.0) is None


def test_a_batch_is_a_function_of_seed_and_step():
    arrays = [torch.randint(0, 256, (9, 8, 8, 3), dtype=torch.uint8).numpy() for _ in range(2)]
    first = draw_batch(arrays, (2, 3), seed=0, step=5)
    assert first.shape == (5, 3, 8, 8)
    assert torch.equal(first, draw_batch(arrays, (2, 3), seed=0, step=5))
    assert not torch.equal(first, draw_batch(arrays, (2, 3), seed=0, step=6))


def test_a_stage_learns_and_its_file_is_read_back(tmp_path):
    shapes = make_dataset(ShapesConfig(), "train").pixels(range(8))[:, 16:48, 16:48]
    config = VAEConfig(**SMALL, stem_patch=2, mid_attention=False, shift=0.0, scale=1.0)
    torch.manual_seed(0)
    stage = Stage(images=240, schedule_images=240, lr=3e-3, batch_shapes=2, batch_emoji=2, outline=1.0)
    vae = AutoencoderKL(config)
    before = psnr(vae, shapes)[0]
    average, curve = train_stage(vae, [shapes, shapes], stage, number=0, seed=0, snapshot=tmp_path, snapshot_every=30)
    assert [line["step"] for line in curve] == [30, 60]
    assert psnr(average, shapes)[0] > before + 3.0
    loaded = load_vae(tmp_path / "vae.safetensors")
    assert loaded.config == config
    assert all(torch.equal(a.half().float(), b) for a, b in zip(average.parameters(), loaded.parameters(), strict=True))


def test_statistics_bring_posterior_samples_to_mean_zero_and_deviation_one():
    vae = build(shift=0.0, scale=1.0)
    images = torch.randint(0, 256, (40, 16, 16, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8).numpy()
    shift, scale = latent_statistics(vae, [images[:16], images[16:]], posterior=True)
    ready = build(shift=shift, scale=scale)
    noise = torch.randn(40, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    latents = ready.encode(to_pixels(images), noise)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.15
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(16), atol=0.15, rtol=0)
