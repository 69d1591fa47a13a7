"""Captions longer than a CLIP tower reads: cut and said, refused, or read in pieces; never silently cut."""

import logging

import numpy as np
import pytest
from mmdit_eval.clip_score import caption_embeds
from mmdit_eval.features import load_extractor

SHORT = "a red circle above a blue square"
LONG = "a red circle " * 40


class Words:
    """A tower of six tokens, one a word besides start and end; an embedding is the count of each letter read."""

    limit = 6

    def lengths(self, captions):
        return [len(caption.split()) + 2 for caption in captions]

    def embed(self, captions):
        read = [" ".join(caption.split()[:4]) for caption in captions]
        return [[text.count("a"), text.count("b"), 1.0] for text in read]


def test_short_captions_are_embedded_alike_under_every_policy():
    tower = load_extractor("tiny_clip").text
    plain = np.asarray(tower.embed([SHORT, "a star"]), dtype=np.float64)
    for policy in ("truncate", "error", "chunk"):
        found, over = caption_embeds([SHORT, "a star"], tower, policy)
        assert over == 0
        assert found == pytest.approx(plain, abs=1e-6)
    assert caption_embeds(["b"] * 70, Words(), batch_size=16)[0].shape == (70, 3)


def test_cutting_is_said_and_counted(caplog):
    tower = load_extractor("tiny_clip").text
    with caplog.at_level(logging.WARNING):
        found, over = caption_embeds([LONG, SHORT], tower)
    assert over == 1
    assert "1 of 2 captions are longer than 77 tokens" in caplog.text
    assert found[0] == pytest.approx(np.asarray(tower.embed([LONG]), dtype=np.float64)[0], abs=1e-6)


def test_long_captions_may_be_refused_by_number():
    with pytest.raises(ValueError, match=r"1 of 2 captions are longer than the 6 tokens.*first number 1: 'a b c d e'"):
        caption_embeds(["a", "a b c d e"], Words(), "error")
    with pytest.raises(ValueError, match="did you mean 'truncate'"):
        caption_embeds(["a"], Words(), "truncat")


def test_pieces_fit_and_their_normalised_embeddings_are_averaged():
    captions = ["a", "a a a b b b b b a", "b b"]
    found, over = caption_embeds(captions, Words(), "chunk", batch_size=2)
    assert over == 1
    pieces = np.array([[3, 1, 1], [0, 4, 1], [1, 0, 1]], dtype=float)  # "a a a b", "b b b b", "a"
    pieces /= np.linalg.norm(pieces, axis=1, keepdims=True)
    assert found[1] == pytest.approx(pieces.mean(0))
    assert found[0] == pytest.approx(np.array([1, 0, 1]) / np.sqrt(2))
    assert found[2] == pytest.approx(np.array([0, 2, 1]) / np.sqrt(5))


def test_the_end_of_a_long_caption_counts_in_pieces_and_not_when_cut():
    tower = load_extractor("tiny_clip").text
    other = LONG + "a green star"
    cut, pieces = (
        [caption_embeds([text], tower, policy)[0] for text in (LONG, other)] for policy in ("truncate", "chunk")
    )
    assert np.allclose(*cut, atol=1e-6)
    assert not np.allclose(*pieces, atol=1e-3)


def test_a_single_word_over_the_limit_is_named():
    with pytest.raises(ValueError, match="the word 'xxxx"):
        caption_embeds(["x" * 3000], load_extractor("tiny_clip").text, "chunk")
