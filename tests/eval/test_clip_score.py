"""CLIP-score and retrieval on embeddings with known angles."""

import numpy as np
import pytest
from mmdit_eval import clip_score, retrieval_at_1
from mmdit_eval.clip_score import clip_scores
from mmdit_eval.retrieval import retrieval_hits


def test_equal_directions_score_a_hundred_whatever_their_length():
    a = np.random.default_rng(0).normal(size=(7, 5))
    assert clip_score(a, 3.0 * a) == pytest.approx(100.0, rel=1e-12)


def test_a_known_angle_and_a_negative_one():
    image = np.array([[1.0, 0.0], [1.0, 0.0]])
    text = np.array([[1.0, 1.0], [-1.0, 0.2]])
    assert clip_scores(image, text) == pytest.approx([100 / np.sqrt(2), 0.0])
    assert clip_score(image, text) == pytest.approx(50 / np.sqrt(2))
    text[1] = -0.2, 1.0
    assert clip_score(image, text, clamp="mean") == pytest.approx(50 / np.sqrt(2) - 10 / np.sqrt(1.04), rel=1e-12)
    assert clip_score(image, -image, clamp="mean") == 0.0
    with pytest.raises(ValueError, match="clamp must be 'each' or 'mean', got 'none'"):
        clip_score(image, text, clamp="none")


def test_embeddings_that_do_not_pair_are_refused():
    a = np.ones((3, 4))
    with pytest.raises(ValueError, match="one N"):
        clip_score(a, a[:2])
    with pytest.raises(ValueError, match="length zero"):
        clip_score(a, np.zeros((3, 4)))
    with pytest.raises(ValueError, match="not finite"):
        clip_score(a * np.nan, a)


def test_retrieval_of_identical_pairs_is_perfect_and_of_shifted_pairs_fails():
    a = np.eye(8)
    assert retrieval_at_1(a, a, group_size=4) == 1.0
    assert retrieval_at_1(a, np.roll(a, 1, axis=0), group_size=8) == 0.0


def test_the_last_pictures_have_as_many_rivals_as_the_others():
    """A lone last one had none and was always right."""
    a = np.eye(9)
    assert retrieval_at_1(a, -a, group_size=4) == 0.0
    assert retrieval_at_1(a, a, group_size=4) == 1.0
    assert retrieval_at_1(a[:3], -a[:3], group_size=4) == 0.0


def test_a_tie_is_a_miss_and_a_lone_candidate_a_hit():
    same = np.ones((2, 3))
    assert not retrieval_hits(same, same, [0, 1], [[0, 1], [0, 1]]).any()
    assert retrieval_hits(same, same, [0, 1], [[0], [1]]).all()


def test_equal_captions_tie_whatever_the_round_off():
    """Two products of equal rows may differ in the last bit, which let a quarter of these through."""
    random = np.random.default_rng(0)
    captions = random.normal(size=(40, 512))
    queries = captions + random.normal(size=captions.shape)
    assert not retrieval_hits(queries, np.concatenate([captions] * 2), range(40), [range(80)] * 40).any()
    assert retrieval_hits(queries, captions, range(40), [range(40)] * 40).all()


def test_embeddings_that_are_no_numbers_are_no_misses():
    a = np.eye(4)
    broken = a.copy()
    broken[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"queries hold values that are not finite in 1 row.*first is row 2"):
        retrieval_hits(broken, a, range(4), [range(4)] * 4)
    with pytest.raises(ValueError, match="candidates hold"):
        retrieval_hits(a, broken, range(4), [range(4)] * 4)


def test_retrieval_at_random_is_chance():
    random = np.random.default_rng(0)
    queries, candidates = random.normal(size=(2000, 16)), random.normal(size=(2000, 16))
    assert retrieval_at_1(queries, candidates, group_size=10) == pytest.approx(0.1, abs=0.02)


def test_a_set_without_its_truth_is_refused():
    with pytest.raises(ValueError, match="does not contain"):
        retrieval_hits(np.eye(2), np.eye(2), [0, 1], [[1], [1]])
