"""Resize rules against the programs they come from."""

import numpy as np
import pytest
import torch
from mmdit_eval.resizing import (
    bicubic_weights,
    check_images,
    normalise,
    resize_clean,
    resize_pillow,
    resize_shorter_side,
    resize_tensorflow1,
    to_tensor,
)
from PIL import Image


def pictures(height, width, count=2):
    return np.random.default_rng(height * width).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (299, 299), (512, 340), (1, 1), (700, 5)])
def test_tensorflow_bilinear_gives_the_same_floats_as_torch_fidelity(size):
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    pixels = to_tensor(pictures(*size))
    theirs = interpolate_bilinear_2d_like_tensorflow1x(pixels, size=(299, 299), align_corners=False)
    assert torch.equal(resize_tensorflow1(pixels, 299), theirs)


@pytest.mark.parametrize("size", [(64, 64), (512, 340), (299, 299), (310, 1024), (7, 300)])
def test_clean_resize_is_pillows_on_the_cpu_and_its_matrices_elsewhere(size):
    images = pictures(*size, count=1)
    found = resize_clean(images, 299)
    channel = Image.fromarray(images[0, ..., 1].astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
    assert torch.equal(found[0, 1], torch.from_numpy(np.asarray(channel).clip(0, 255)))
    down, across = (bicubic_weights(n, 299) for n in size)
    elsewhere = (down @ (to_tensor(images) @ across.T)).clamp(0, 255)
    assert float((elsewhere - found).abs().max()) < 1e-3
    assert found.min() >= 0
    assert found.max() <= 255


def test_clean_resize_averages_what_tensorflows_rule_aliases():
    lines = np.zeros((1, 598, 598, 3), dtype=np.uint8)
    lines[:, :, ::2] = 255  # stripes of one pixel: grey when halved
    assert float((resize_clean(lines, 299)[0, :, 20:-20, 20:-20] - 127.5).abs().max()) < 8
    assert float(resize_tensorflow1(to_tensor(lines), 299).min()) == 255.0


def test_pillow_and_clip_resizing_equal_torchvisions_transform():
    from torchvision.transforms import v2

    image = pictures(90, 130, count=1)
    picture = Image.fromarray(image[0])
    square = v2.Resize((224, 224), v2.InterpolationMode.BICUBIC)(picture)
    assert np.array_equal(resize_pillow(image, 224, 224)[0], np.asarray(square))
    shorter = v2.CenterCrop(64)(v2.Resize(64, v2.InterpolationMode.BICUBIC)(picture))
    assert np.array_equal(resize_shorter_side(image, 64)[0], np.asarray(shorter))


def test_normalising_is_affine_per_channel_and_other_arrays_are_refused():
    image = pictures(4, 5, count=1)
    found = normalise(image, (0.1, 0.2, 0.3), (0.5, 1.0, 2.0), "cpu")
    assert found[0, 2, 3, 4] == pytest.approx((image[0, 3, 4, 2] / 255 - 0.3) / 2.0, abs=1e-6)
    with pytest.raises(ValueError, match=r"uint8 \[N, R, R, 3\], got float64 \[2, 4, 4, 3\]"):
        check_images(np.zeros((2, 4, 4, 3)))
