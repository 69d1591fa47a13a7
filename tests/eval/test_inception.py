"""FID's Inception against torch-fidelity's, with random weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from mmdit_eval.feature_cache import _key
from mmdit_eval.features import load_extractor
from mmdit_eval.image_sets import from_array
from mmdit_eval.inception import Inception, convolutions, legacy_pixels
from mmdit_eval.metrics import METRICS
from mmdit_eval.resizing import to_tensor
from mmdit_eval.set_comparison import SetOptions, evaluate_images


@pytest.fixture(scope="module")
def theirs(inception_file):
    """torch-fidelity's network with the same weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    return FeatureExtractorInceptionV3(
        "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_file)
    )


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 80, 64, 3), dtype=np.uint8)


def test_features_and_logits_equal_torch_fidelitys(inception_file, theirs, images):
    """The Inception score's code multiplies by the last weight and adds no bias; so does torch-fidelity by default."""
    assert theirs.get_default_feature_layer_for_metric("isc") == "logits_unbiased"
    tensors = torch.load(inception_file, weights_only=True)
    uint8 = torch.from_numpy(images).permute(0, 3, 1, 2)
    features, logits = Inception(tensors)(legacy_pixels(to_tensor(images)))
    for ours, other in zip((features, logits), theirs(uint8), strict=True):
        assert float((ours - other).norm() / other.norm()) < 1e-6
        assert float(other.std(0).mean()) > 1e-3  # random weights must not have died


def test_the_extractors_give_them_under_both_resize_rules(inception_file, theirs, images):
    fid = load_extractor(f"inception_fid@{inception_file}")
    clean = load_extractor("inception_clean", weights=str(inception_file.parent))
    expected = torch.cat(theirs(torch.from_numpy(images).permute(0, 3, 1, 2)), dim=1)
    found = fid(images)
    assert found.shape == (3, 2048 + 1008)
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    assert float((clean(images) - expected).norm() / expected.norm()) > 1e-3
    assert fid.hash == clean.hash
    assert fid.resize != clean.resize
    assert fid.describe() != clean.describe()


def test_bfloat16_is_near_and_says_so(inception_file, images):
    exact = load_extractor("inception_fid", weights=str(inception_file))
    fast = load_extractor("inception_fid", weights=str(inception_file), precision="bf16")
    error = (fast(images[:1]) - exact(images[:1])).norm() / exact(images[:1]).norm()
    assert 1e-5 < float(error) < 0.05
    assert fast.describe()["precision"] == "bf16"
    assert "precision" not in exact.describe()


def test_the_network_has_the_94_convolutions_of_the_graph():
    shapes = convolutions()
    assert len(shapes) == 94
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 21_751_136
    assert shapes["Mixed_7c.branch3x3dbl_3b"] == (384, 384, 3, 1)


def test_torchvisions_network_and_broken_files_are_refused(tmp_path, inception_file):
    tensors = torch.load(inception_file, weights_only=True)
    tensors["fc.weight"] = torch.zeros(1000, 2048)
    del tensors["Mixed_5b.branch1x1.bn.bias"]
    with pytest.raises(ValueError, match=r"1 missing \['Mixed_5b.branch1x1.bn.bias'\].*fc.weight \[1000, 2048\]"):
        Inception(tensors)
    broken = tmp_path / "broken.pth"
    broken.write_bytes(inception_file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"broken\.pth cannot be read as weights"):
        load_extractor("inception_fid", weights=str(broken))


def test_a_score_of_logits_with_the_bias_compares_with_none_of_these(inception_file, images, tmp_path):
    """Neither by its stamp nor by features kept from before."""
    sets = from_array(images), from_array(images[::-1].copy())
    stamps = [
        evaluate_images(*sets, SetOptions(f"inception_fid@{inception_file}", metrics=metrics, progress=False))["stamp"]
        for metrics in (("inception_score",), ("frechet",))
    ]
    assert [stamp["protocol"].get("logits") for stamp in stamps] == ["without bias", None]
    assert METRICS["inception_score"].judge() == "logits without bias"
    fid = load_extractor(f"inception_fid@{inception_file}")
    assert _key(fid, sets[0], range(3)) != _key(replace(fid, classes=0), sets[0], range(3))
