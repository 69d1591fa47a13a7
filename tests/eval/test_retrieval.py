"""R@1 and R@5 of captions: ranks against a plain count, equal captions, ties, folders by the command line."""

import json

import numpy as np
import pytest
from mmdit_eval import retrieval
from mmdit_eval.alignment import retrieve_captions
from mmdit_eval.clip_score import Texts, caption_embeds
from mmdit_eval.commands import main
from mmdit_eval.features import load_extractor, tiny_clip
from mmdit_eval.image_sets import from_array
from mmdit_eval.retrieval import retrieval_ranks
from mmdit_eval.set_comparison import SetOptions, evaluate_images
from PIL import Image

from mmdit.config import ShapesConfig
from mmdit.data import make_dataset

COUNT = 24


def texts(captions, embeds):
    return Texts(list(captions), np.asarray(embeds, dtype=np.float64), "truncate", 77, 0)


@pytest.mark.parametrize("block", [4, 1024])
def test_ranks_equal_a_plain_count(monkeypatch, block):
    monkeypatch.setattr(retrieval, "BLOCK", block)
    random = np.random.default_rng(0)
    queries, candidates = random.normal(size=(11, 5)), 3 * random.normal(size=(9, 5))
    names, have = random.integers(0, 4, 11), np.array([0, 1, 2, 3, 0, 1, 2, 3, 3])
    for i, rank in enumerate(retrieval_ranks(queries, candidates, names, have)):
        near = [
            np.dot(queries[i], row) / np.linalg.norm(queries[i]) / np.linalg.norm(row) for row in candidates
        ]  # one by one
        best = max(value for value, name in zip(near, have, strict=True) if name == names[i])
        assert rank == sum(value > best for value, name in zip(near, have, strict=True) if name != names[i])


def test_what_rounding_alone_tells_apart_is_a_tie_and_counts_against():
    caption = np.random.default_rng(0).normal(size=16)
    cut_alike = np.stack([caption, caption * (1 + 1e-8), -caption])
    assert retrieval_ranks(cut_alike, cut_alike, range(3), range(3)).tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("queries", "candidates", "names", "have", "message"),
    [
        (np.eye(3), np.eye(4), [0, 1, 2], [0, 1, 2, 3], "differ"),
        (np.eye(3), np.eye(3), [0, 1], [0, 1, 2], "got 2 names for 3 queries"),
        (np.eye(3), np.eye(3), [0, 1, 2], [0, 1, 1], "no right candidate, the first is named 2"),
        (np.zeros((3, 3)), np.eye(3), [0, 1, 2], [0, 1, 2], "queries hold an embedding"),
        (np.eye(3), np.eye(3) * np.nan, [0, 1, 2], [0, 1, 2], "candidates hold an embedding"),
    ],
)
def test_what_cannot_be_ranked_is_refused(queries, candidates, names, have, message):
    with pytest.raises(ValueError, match=message):
        retrieval_ranks(queries, candidates, names, have)


def test_equal_captions_are_one_candidate_and_their_pictures_all_right():
    captions = ["a", "b", "a", "c"]
    embeds = np.eye(3)[[0, 1, 0, 2]]
    found = retrieve_captions(np.eye(3)[[0, 0, 0, 2]], texts(captions, embeds))
    assert found.per_image["r_at_1"] == [1.0, 0.0, 1.0, 1.0]
    assert found.per_image["r_at_5"] == [1.0] * 4
    assert found.scores["r_at_1"]["value"] == 0.75
    assert found.chance == {"r_at_1": pytest.approx(1 / 3), "r_at_5": 1.0}
    # the picture of "b" is as near to "a" as those of "a", and no nearer to "b" than any: only "c" finds its own
    assert found.details["retrieval"]["text_to_image_r_at_1"] == pytest.approx(1 / 3)
    with pytest.warns(UserWarning, match="two different captions"):
        assert not retrieve_captions(np.eye(2), texts(["a", "a"], np.eye(2))).scores


def test_random_embeddings_are_found_by_chance_and_the_interval_holds_it():
    random = np.random.default_rng(1)
    found = retrieve_captions(
        random.normal(size=(1000, 32)), texts(map(str, range(1000)), random.normal(size=(1000, 32)))
    )
    for score in ("r_at_1", "r_at_5"):
        estimate = found.scores[score]
        assert estimate["low"] <= found.chance[score] <= estimate["high"]


def test_intervals_cover_what_other_pictures_and_captions_would_give():
    random = np.random.default_rng(0)
    values, covers = [], []
    for _ in range(200):
        captions = random.normal(size=(120, 16))
        pictures = captions + 1.2 * random.normal(size=captions.shape)
        estimate = retrieve_captions(pictures, texts(map(str, range(120)), captions)).scores["r_at_1"]
        values.append(estimate["value"])
        covers.append((estimate["low"], estimate["high"]))
    mean = np.mean(values)
    assert 0.3 < mean < 0.8
    assert 0.92 <= np.mean([low <= mean <= high for low, high in covers]) <= 0.985


@pytest.fixture(scope="module")
def scenes():
    dataset = make_dataset(ShapesConfig(), "seen")
    return dataset.pixels(np.arange(COUNT)), dataset.captions(np.arange(COUNT))


def test_folders_with_captions_are_asked_for_them(tmp_path, scenes, capsys):
    images, captions = scenes
    for i, image in enumerate(images):
        (tmp_path / "fake").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "fake" / f"{i:03d}.png")
    (tmp_path / "captions.txt").write_text("\n".join(captions) + "\n")
    words = ["images", str(tmp_path / "fake"), "--against", str(tmp_path / "fake"), "--extractor", "pixel_statistics"]
    words += ["--quiet", "--no-cache", "--out", str(tmp_path / "out.json"), "--metrics", "retrieval"]
    assert main([*words, "--captions", str(tmp_path / "captions.txt"), "--clip", "tiny_clip"]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    tower = load_extractor("tiny_clip").text
    near = tiny_clip().image_embeds(images).double().numpy() @ caption_embeds(captions, tower)[0].T
    expected = [float((row > row[i]).sum() == 0) for i, row in enumerate(near)]
    split = result["splits"]["images"]
    assert split["per_image"]["r_at_1"] == expected
    assert 0.5 < split["scores"]["r_at_1"]["value"] <= split["scores"]["r_at_5"]["value"]
    assert split["chance"]["r_at_1"] == pytest.approx(1 / len(set(captions)))
    assert result["stamp"]["protocol"]["clip"]["name"] == "tiny_clip"
    assert "R@1" in capsys.readouterr().out
    assert main(words) == 2
    assert "retrieval needs captions" in capsys.readouterr().err
    assert main([*words, "--captions", str(tmp_path / "captions.txt")]) == 2
    assert "retrieval: the extractor 'pixel_statistics' has no text tower" in capsys.readouterr().err


def test_one_caption_for_all_is_refused_before_any_picture_is_seen(scenes):
    options = SetOptions("tiny_clip", metrics=("retrieval",), progress=False)
    with pytest.raises(ValueError, match="at least two different captions"):
        evaluate_images(from_array(scenes[0]), from_array(scenes[0]), options, captions=["a star"] * COUNT)
