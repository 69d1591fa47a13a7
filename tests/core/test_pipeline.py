"""Prompts to images: noise belongs to the image, and what is asked wrongly is answered in words."""

import numpy as np
import pytest
import torch

from mmdit.checkpoint import CheckpointError, save_checkpoint
from mmdit.config import SamplingConfig
from mmdit.diffusion import build_schedule
from mmdit.pipeline import Stopped, TextToImage, configure_cpu, image_grid, save_image, to_pil

PROMPTS = [
    "a red circle",
    "a large blue square left of a small orange star",
    "a white triangle",
    "two red stars",
]


def shaken(config, seed=3):
    """A denoiser whose zero-initialised gates are open, so that text and noise matter."""
    from mmdit.models import build_denoiser

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = build_denoiser(config.model)
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return denoiser.eval()


@pytest.fixture
def pipeline(micro, vae, text):
    config = micro()
    return TextToImage(
        shaken(config), vae, text, build_schedule(config.diffusion.schedule), "velocity",
        SamplingConfig(num_steps=3, guidance_scale=2.0), config.encoders, precision="fp32",
    )  # fmt: skip


def near(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_an_image_depends_neither_on_batch_size_nor_on_its_place(pipeline):
    together = pipeline(PROMPTS, seed=4)
    assert together.shape == (4, 64, 64, 3)
    assert together.dtype == np.uint8
    assert near(together, pipeline(PROMPTS, seed=4, batch_size=1))
    assert near(together, pipeline(PROMPTS, seed=4, batch_size=3))
    assert near(together[2:3], pipeline(PROMPTS[2:3], seed=4, indices=[2]))
    turned = pipeline(PROMPTS[::-1], seed=4, indices=[3, 2, 1, 0])
    assert near(together, turned[::-1])


def test_seed_prompt_index_and_negative_prompt_each_matter(pipeline):
    base = pipeline(PROMPTS[:1], seed=0)
    for other in (
        pipeline(PROMPTS[:1], seed=1),
        pipeline(PROMPTS[:1], seed=0, indices=[1]),
        pipeline(PROMPTS[1:2], seed=0),
        pipeline(PROMPTS[:1], "a blue square", seed=0),
        pipeline(PROMPTS[:1], seed=0, guidance_scale=1.0),
    ):
        assert not np.array_equal(base, other)


def test_negative_prompts_may_differ_and_may_be_absent(pipeline):
    mixed = pipeline(PROMPTS[:3], ["a blue square", None, "a star"], seed=2)
    assert near(mixed[1:2], pipeline(PROMPTS[1:2], seed=2, indices=[1]))
    assert near(mixed[:1], pipeline(PROMPTS[:1], "a blue square", seed=2))


@pytest.mark.parametrize("sampler", ["euler", "heun", "ddim", "dpmpp_2m"])
def test_samplers_can_be_chosen_per_call(pipeline, sampler):
    assert pipeline(PROMPTS[:1], sampler=sampler, num_steps=2).shape == (1, 64, 64, 3)


def test_sizes_are_multiples_of_the_grain(pipeline):
    assert pipeline.grain == 16
    assert pipeline(PROMPTS[:1], size=(32, 96), num_steps=1).shape == (1, 32, 96, 3)
    with pytest.raises(ValueError, match="not a multiple of 16 pixels; the nearest is 96x64"):
        pipeline(PROMPTS[:1], size=(100, 64))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda p: p("a red circle"), "must be a list"),
        (lambda p: p([]), "no prompts"),
        (lambda p: p(PROMPTS, indices=[0]), "indices has 1 entries for 4 prompts"),
        (lambda p: p(PROMPTS, ["x"]), "negative_prompts has 1 entries"),
        (lambda p: p(PROMPTS, sampler="eular"), "did you mean 'euler'"),
        (lambda p: p(PROMPTS, grid="liner"), "did you mean 'linear'"),
    ],
)
def test_wrong_calls_are_answered_in_words(pipeline, call, told):
    with pytest.raises(ValueError, match=told):
        call(pipeline)


def test_sampling_stops_between_steps_when_asked(pipeline):
    asked = iter([False, True, True, True])
    with pytest.raises(Stopped, match="step 2 of 3"):
        pipeline(PROMPTS[:1], should_stop=lambda: next(asked))


def test_batches_come_one_by_one_and_progress_counts_images(pipeline):
    counts = []
    sizes = [len(b) for b in pipeline.images(PROMPTS, batch_size=3, num_steps=1, progress=counts.append)]
    assert sizes == counts == [3, 1]


def test_a_run_loads_with_average_or_raw_weights(tmp_path, micro, vae, text):
    config = micro()
    model, ema = shaken(config, 1), shaken(config, 2)
    tensors = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": {}}
    path = save_checkpoint(tmp_path, 48, tensors, {}, config)
    for weights, expected in (("ema", ema), ("raw", model)):
        loaded = TextToImage.load(tmp_path, weights, text=text)
        assert all(torch.equal(p, q) for p, q in zip(loaded.denoiser.parameters(), expected.parameters(), strict=True))
        assert loaded.provenance["checkpoint"] == "000000000048"
    images = TextToImage.load(path, vae=vae, text=text)(PROMPTS[:2])
    assert near(images, TextToImage.load(tmp_path, text=text)(PROMPTS[:2], seed=0))
    with pytest.raises(ValueError, match="did you mean 'ema'"):
        TextToImage.load(tmp_path, "emma")
    with pytest.raises(FileNotFoundError, match="no run"):
        TextToImage.load(tmp_path / "nothing")
    (path / "ema.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        TextToImage.load(path)


def test_grids_and_files(tmp_path):
    from PIL import Image

    images = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    canvas = image_grid(images)
    assert canvas.shape == (10, 10, 3)
    assert np.array_equal(canvas[6:, :4], images[2])
    assert (canvas[6:, 6:] == 255).all()
    save_image(images[0], tmp_path / "a" / "b.png", {"prompt": "ein roter Kreis ○", "seed": 3})
    with Image.open(tmp_path / "a" / "b.png") as picture:
        assert np.array_equal(np.asarray(picture), images[0])
        assert picture.text == {"prompt": "ein roter Kreis ○", "seed": "3"}
    assert [p.size for p in to_pil(images)] == [(4, 4)] * 3


def test_the_chosen_matrix_product_is_true_float32():
    chosen = configure_cpu()
    a = torch.randn(200, 300, generator=torch.Generator().manual_seed(1))
    exact = a.double() @ a.double().T
    assert float(((a @ a.T).double() - exact).norm() / exact.norm()) < 2e-6
    assert chosen["threads"] == torch.get_num_threads()
