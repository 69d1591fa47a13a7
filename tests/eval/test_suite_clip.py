"""Runs judged by a CLIP pair of the user's choice, and looks shared between processes."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdit_eval import drawn as looking
from mmdit_eval import features, metrics, suite
from mmdit_eval.clip_score import caption_embeds, clip_scores
from mmdit_eval.comparison import compare
from mmdit_eval.distribution import Share, join
from mmdit_eval.drawn import Drawn, Reference, look_together, training_features
from mmdit_eval.features import extract, load_extractor
from mmdit_eval.judge import judge
from mmdit_eval.metrics import METRICS, Measured, looks_of, stamp_of_judges
from mmdit_eval.suite import check_suite, evaluate_run, load_references, measure

from mmdit.checkpoint import save_checkpoint, tensors_of
from mmdit.config import ConfigError, SuiteConfig, resolve
from mmdit.models import build_denoiser
from mmdit.pipeline import TextToImage

SMALL = {"name": "s", "metrics": ("clip_score", "retrieval"), "splits": ("seen",), "num_images": 7, "batch_size": 3,
         "extractor": "pixel_statistics", "grid_prompts": 1}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random CLIP in the transformers layout."""
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, "eos_token_id": 49407},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    folder = tmp_path_factory.mktemp("pair") / "clip"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    return f"clip:{folder}"


@pytest.fixture
def run(tmp_path, micro):
    """A run folder with one checkpoint."""
    config = micro({"data": {"num_images": 10}})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        denoiser = build_denoiser(config.model)
        for parameter in denoiser.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tensors = {"model": tensors_of(denoiser), "ema": tensors_of(denoiser)}
    save_checkpoint(tmp_path / "run", 48, tensors, {"images_seen": 48, "complete": True, "seconds": 1.0}, config)
    return tmp_path / "run"


def silent(text):
    pass


def test_a_run_is_judged_by_the_pair_its_suite_names(run, pair, monkeypatch):
    seen = []
    monkeypatch.setattr(suite, "measure", lambda drawn: seen.append(drawn) or measure(drawn))
    result = evaluate_run(run, SuiteConfig(**SMALL, clip=pair), say=silent)
    extractor = load_extractor(pair)
    text, _ = caption_embeds(seen[0].reference.captions, extractor.text)
    expected = clip_scores(extract(extractor, seen[0].images), text)
    split = result["splits"]["seen"]
    assert split["per_image"]["clip_score"] == pytest.approx(expected, abs=1e-4)
    assert split["scores"]["r_at_1"]["n"] == 7
    assert result["stamp"]["protocol"]["judges"]["clip_score"] == extractor.describe()
    assert result["stamp"]["protocol"]["judges"]["retrieval"]["hash"] == extractor.hash
    assert result["settings"]["clip"] == pair
    tiny = evaluate_run(run, SuiteConfig(**{**SMALL, "name": "tiny"}), say=silent)
    assert tiny["splits"]["seen"]["per_image"]["clip_score"] != split["per_image"]["clip_score"]
    with pytest.raises(ValueError, match=r"protocol\.judges\.clip_score"):
        compare(result, tiny)


def test_the_tiny_pair_is_stamped_as_before_there_was_a_choice():
    clip = features.tiny_clip()
    before = f"{features.hash_tensors(clip.image.state_dict())}-{clip.text.fingerprint[:16]}"
    metrics = ("frechet", "clip_score", "retrieval")
    assert stamp_of_judges(SuiteConfig(metrics=metrics[:2]), "shapes") == {"clip_score": before}
    of_emoji = features.hash_tensors(judge().tower.state_dict())
    assert stamp_of_judges(SuiteConfig(metrics=metrics), "emoji") == {"clip_score": before, "retrieval": of_emoji}


def test_one_pair_as_extractor_and_judge_looks_once_at_each_picture(run, pair, monkeypatch):
    looked = []
    build = features.load_extractor

    def counted(name, **options):
        extractor = build(name, **options)
        inner = extractor.network
        object.__setattr__(extractor, "network", lambda pixels: looked.append(len(pixels)) or inner(pixels))
        return extractor

    features.load_clip.cache_clear()
    monkeypatch.setattr(features, "load_extractor", counted)
    fields = {**SMALL, "metrics": ("frechet", "clip_score", "retrieval"), "extractor": pair, "clip": pair}
    evaluate_run(run, SuiteConfig(**fields), say=silent)
    features.load_clip.cache_clear()
    assert sum(looked) == 2 * 7  # drawn and true


def test_a_pair_that_cannot_judge_is_refused_before_drawing(run, pair, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "draw", None)  # must not come so far
    with pytest.raises(ConfigError, match=r"suite\.clip must be tiny_clip, clip:FOLDER or openclip:NAME@FILE"):
        evaluate_run(run, SuiteConfig(**SMALL, clip="inception_fid"), say=silent)
    with pytest.raises(FileNotFoundError, match="no CLIP in"):
        evaluate_run(run, SuiteConfig(**SMALL, clip=f"clip:{tmp_path}"), say=silent)
    photographs = resolve({"data": {"name": "images", "source": "folder", "resolution": 64}})
    with pytest.raises(ConfigError, match="knows shapes and emoji only"):
        check_suite(SuiteConfig(metrics=("retrieval",)), photographs)
    check_suite(SuiteConfig(metrics=("retrieval",), clip=pair), photographs)


def test_emoji_are_asked_by_their_judge_and_by_a_pair_that_is_named(pair, monkeypatch):
    asked = Measured({"same_base": {"value": 1.0}}, {"same_base": [1.0] * 4}, chance={"same_base": 0.5})
    monkeypatch.setattr(metrics, "_emoji_questions", lambda drawn: asked)
    dataset = SimpleNamespace(config=SimpleNamespace(name="emoji"))
    pictures = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    reference = Reference("seen", dataset, np.arange(4), ["hand", "foot", "sun", "moon"], pictures, None)
    found = METRICS["retrieval"].function(Drawn(pictures, reference, SuiteConfig()))
    assert set(found.scores) == {"same_base"}
    suite = SuiteConfig(metrics=("retrieval",), clip=pair)
    reference = replace(reference, extractor=load_extractor("pixel_statistics"))
    found = METRICS["retrieval"].function(Drawn(pictures, reference, suite))
    assert set(found.scores) == set(found.per_image) == set(found.chance) == {"same_base", "r_at_1", "r_at_5"}
    stamp = stamp_of_judges(suite, "emoji")["retrieval"]
    assert stamp["hash"] == load_extractor(pair).hash
    assert stamp["emoji"] == features.hash_tensors(judge().tower.state_dict())
    assert looks_of(SuiteConfig(metrics=("retrieval",)), "emoji") == []
    assert looks_of(suite, "emoji") == ["clip_embeds"]


class Kept(Share):
    """One process of several that hands over what it would send."""

    def gather(self, ids, values, count):
        raise StopIteration((ids, list(values)))


def sent(work):
    try:
        work()
    except StopIteration as stopped:
        return stopped.value
    raise AssertionError("nothing was gathered")


def test_looks_do_not_depend_on_the_number_of_processes(run):
    metrics = ("clip_score", "frechet", "kernel", "validation_loss", "common_loss", "retrieval", "memorisation")
    config = SuiteConfig(**{**SMALL, "metrics": metrics, "num_images": 11, "batch_size": 2})
    pipeline = TextToImage.load(run / "checkpoints" / "000000000048", "ema")
    reference = load_references(suite.load_config(run / "checkpoints/000000000048/config.yaml"), config)["seen"]
    pictures = np.roll(reference.images, 1, axis=0)
    names = looks_of(config, "shapes")
    assert set(names) == {"features", "true_features", "clip_embeds", "losses", "common_losses"}
    alone = look_together(Drawn(pictures, reference, config, pipeline), np.arange(11), reference, names, Share())
    lazily = measure(Drawn(pictures, reference, config, pipeline))
    expected = measure(alone)
    for name, estimate in lazily["scores"].items():
        assert expected["scores"][name]["value"] == pytest.approx(estimate["value"], rel=1e-6, abs=1e-9)
    for world in (2, 3, 4, 8):
        parts = []
        for rank in range(world):
            starts = range(0, 11, 2)[rank::world]
            ids = np.concatenate([np.empty(0, int), *[np.arange(s, min(s + 2, 11)) for s in starts]]).astype(int)
            own = Drawn(pictures[ids], reference.part(ids), config, pipeline)
            share = Kept(rank, world)
            parts.append(sent(lambda own=own, ids=ids, share=share: look_together(own, ids, reference, names, share)))
        whole = join(parts, 11)
        assert np.array_equal(whole[0], pictures)
        for name, rows in zip(names, whole[1:], strict=True):
            assert np.array_equal(rows, alone.looks[name]), name
    assert len(parts[7][1]) == 1  # more processes than batches: nothing to look at


def test_training_features_are_split_and_kept(run):
    reference = Reference("seen", None, np.arange(2), ["a", "b"], np.zeros((2, 8, 8, 3), np.uint8), None)
    assert reference.part(np.array([1])).captions == ["b"]
    config = suite.load_config(run / "checkpoints/000000000048/config.yaml").data
    extractor = load_extractor("pixel_statistics")
    whole = training_features(config, extractor, 3)
    parts = []
    for rank in range(3):
        looking.training_features.cache_clear()
        parts.append(sent(lambda rank=rank: training_features(config, extractor, 3, Kept(rank, 3))))
    assert np.array_equal(join(parts, 10)[0], whole)
    assert training_features(config, extractor, 3) is training_features(config, extractor, 3)


def test_a_result_of_before_is_not_made_again(run):
    """The new field has a default that leaves the stamp as it was."""
    first = evaluate_run(run, SuiteConfig(**SMALL), say=silent)
    file = run / "eval" / "s-000000000048.json"
    stored = json.loads(file.read_text())
    del stored["settings"]["clip"]
    file.write_text(json.dumps(stored))
    assert "clip" not in evaluate_run(run, SuiteConfig(**SMALL), say=silent)["settings"]
    assert first["stamp"] == stored["stamp"]
