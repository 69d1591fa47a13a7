"""The contrastive loss against its closed form; the tiny CLIP pair as a judge."""

import json
import math

import numpy as np
import pytest
import torch

from mmdit.encoders.clip import TOWERS, ImageTower, contrastive_loss, images_to_pixels, load_tiny_clip
from mmdit.encoders.tokenizers import TINY


def _by_hand(images, texts, scale, image_keys, text_keys):
    """Radford et al. 2021, figure 3, in float64 and loops; equal keys share the target."""
    images, texts = (np.asarray(x, dtype=np.float64) for x in (images, texts))
    images = images / np.linalg.norm(images, axis=1, keepdims=True)
    texts = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    logits, batch, total = scale * images @ texts.T, len(images), 0.0
    for i in range(batch):
        positives = [j for j in range(len(texts)) if text_keys[j] == image_keys[i]]
        total += np.mean([np.log(np.exp(logits[i]).sum()) - logits[i, j] for j in positives])
        column = logits[:, i]
        positives = [j for j in range(batch) if image_keys[j] == text_keys[i]]
        total += np.mean([np.log(np.exp(column).sum()) - column[j] for j in positives])
    return total / (2 * batch)


def test_the_loss_equals_the_closed_form_in_float64():
    random = np.random.default_rng(0)
    images, texts = random.standard_normal((5, 7)), random.standard_normal((8, 7))
    image_keys, text_keys = [0, 1, 2, 1, 3], [0, 1, 2, 1, 3, 4, 5, 0]
    ours = contrastive_loss(
        torch.tensor(images), torch.tensor(texts), torch.tensor(1.7), torch.tensor(image_keys), torch.tensor(text_keys)
    )
    expected = _by_hand(images, texts, math.exp(1.7), image_keys, text_keys)
    assert ours.item() == pytest.approx(expected, abs=1e-6)


def test_without_keys_each_image_has_its_own_caption():
    random = np.random.default_rng(1)
    images, texts = random.standard_normal((4, 6)), random.standard_normal((4, 6))
    ours = contrastive_loss(torch.tensor(images), torch.tensor(texts), torch.tensor(0.5))
    assert ours.item() == pytest.approx(_by_hand(images, texts, math.exp(0.5), range(4), range(4)), abs=1e-6)


def test_indistinguishable_pairs_cost_log_of_the_batch():
    embeds = torch.ones(6, 3, dtype=torch.float64)
    assert contrastive_loss(embeds, embeds, torch.tensor(2.0)).item() == pytest.approx(math.log(6), abs=1e-6)


def test_a_wrong_caption_costs_more_the_nearer_it_comes():
    images, texts = torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    losses = []
    for nearness in (0.0, 0.5, 0.9):
        wrong = nearness * images[:1] + (1 - nearness) * torch.tensor([[0.5, -0.5, 0.5, -0.5]], dtype=torch.float64)
        losses.append(contrastive_loss(images, torch.cat([texts, wrong]), torch.tensor(1.0)).item())
    assert losses[0] < losses[1] < losses[2]


def test_the_temperature_learns_and_is_clamped_at_one_hundredth():
    embeds = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    other = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    scale = torch.tensor(1.0, requires_grad=True)
    contrastive_loss(embeds, other, scale).backward()
    assert scale.grad.abs() > 0
    at_limit, beyond = (contrastive_loss(embeds, other, torch.tensor(v)).item() for v in (math.log(100), 9.0))
    assert at_limit == pytest.approx(beyond, abs=1e-6)


def test_the_image_tower_learns_in_every_parameter():
    torch.manual_seed(0)
    tower = ImageTower(width=32, depth=1, num_heads=2, projections={"clip_l": 6, "clip_g": 8})
    features = tower(torch.rand(3, 3, 64, 64) * 2 - 1)
    assert features.shape == (3, 32)
    losses = [
        contrastive_loss(tower.projections[name](features), torch.randn(3, size), tower.log_scales[name])
        for name, size in (("clip_l", 6), ("clip_g", 8))
    ]
    sum(losses).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tower.parameters())


def test_images_of_other_sizes_are_resized_and_other_types_refused():
    images = np.full((2, 128, 96, 3), 255, dtype=np.uint8)
    pixels = images_to_pixels(images, 64)
    assert pixels.shape == (2, 3, 64, 64)
    torch.testing.assert_close(pixels, torch.ones_like(pixels))
    assert images_to_pixels(np.zeros((1, 64, 64, 3), dtype=np.uint8), 64).max() == -1
    with pytest.raises(ValueError, match="uint8"):
        images_to_pixels(np.zeros((1, 64, 64, 3), dtype=np.float32), 64)
    with pytest.raises(ValueError, match="uint8"):
        images_to_pixels(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), 64)


@pytest.fixture(scope="module")
def clip():
    return load_tiny_clip("tiny")


def _scenes(count):
    from mmdit.data.shapes import draw_scene, render

    scenes = [draw_scene(777, i, "seen", 2) for i in range(count)]
    return scenes, np.stack([render(scene) for scene in scenes])


def test_features_and_embeddings_have_their_shapes_and_norms(clip):
    scenes, images = _scenes(5)
    assert clip.image_features(images).shape == (5, 128)
    embeds, text = clip.image_embeds(images), clip.text_embeds([scene.short() for scene in scenes])
    assert embeds.shape == text.shape == (5, 224)
    torch.testing.assert_close(embeds.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(text.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(clip.image_features(torch.from_numpy(images)), clip.image_features(images))


def test_the_product_of_embeddings_is_the_mean_cosine_of_both_towers(clip):
    scenes, images = _scenes(3)
    captions = [scene.short() for scene in scenes]
    features, pooled = clip.image_features(images), clip.text.encode(captions).pooled
    cosines = [
        torch.nn.functional.cosine_similarity(clip.image.projections[name](features), part, dim=1)
        for name, part in zip(TOWERS, pooled.split([96, 128], dim=1), strict=True)
    ]
    product = (clip.image_embeds(images) * clip.text_embeds(captions)).sum(dim=1)
    torch.testing.assert_close(product, torch.stack(cosines).mean(dim=0), atol=1e-5, rtol=1e-4)


def test_a_picture_does_not_depend_on_its_batch(clip):
    _, images = _scenes(6)
    torch.testing.assert_close(clip.image_embeds(images)[4:5], clip.image_embeds(images[4:5]), atol=1e-5, rtol=1e-4)


def test_the_shipped_pair_finds_captions_and_tells_swapped_orders_apart(clip):
    """The recorded quality measures thousands; this shows that the shipped files are the measured ones."""
    from mmdit.train.scene_labels import canonical_list, swapped_scenes

    scenes, images = _scenes(80)
    chosen = list({canonical_list(scene): i for i, scene in enumerate(scenes)}.values())
    captions = [scenes[i].short() for i in chosen]
    cosines = clip.image_embeds(images[chosen]) @ clip.text_embeds(captions).T
    right = torch.arange(len(chosen))
    assert (cosines.argmax(dim=1) == right).float().mean() > 0.8
    assert (cosines.argmax(dim=0) == right).float().mean() > 0.8
    pairs = [i for i, scene in enumerate(scenes) if "order" in swapped_scenes(scene, heldout=True)]
    embeds = clip.image_embeds(images[pairs])
    true = (embeds * clip.text_embeds([scenes[i].short() for i in pairs])).sum(dim=1)
    swapped = [swapped_scenes(scenes[i], heldout=True)["order"].short() for i in pairs]
    assert (true > (embeds * clip.text_embeds(swapped)).sum(dim=1)).float().mean() > 0.75


def test_the_recorded_quality_reaches_what_was_asked():
    quality = json.loads((TINY / "text.json").read_text())["quality"]["clip"]
    for name in ("top-1 of 64, 1-2 objects", "top-1 of 64, 1-4 objects"):
        assert min(quality[name].values()) >= 90
    for kind in ("order", "colour", "shape"):
        assert quality["minimal pairs, seen"][kind] >= 80


def test_a_missing_image_tower_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="--part clip"):
        load_tiny_clip(tmp_path)
