"""The judge asks among the right relatives, counts as it says, and is as good as its record says."""

import hashlib
import json

import numpy as np
import pytest
import torch
from mmdit_eval.judge import QUESTIONS, WEIGHTS, Bank, Judge, Tower, load_judge, retrieval_scores
from mmdit_eval.judge_training import draw_rows, handle

from mmdit.data.emoji import EmojiRecord

TONES = ("", "light", "medium", "dark")


def record(base, tone, gender=""):
    return EmojiRecord(f"{gender} {base}: {tone}", "", "", base, tone, gender, "seen", f"{gender}|{base}|{tone}")


RECORDS = [record("hand", tone) for tone in TONES] + [
    record(base, tone, gender) for base in ("cook", "judge") for gender in ("man", "woman") for tone in TONES
]


class ColourJudge:
    """Embeds a picture by the colour of its first pixel: one-hot of the record painted there."""

    def embed(self, images):
        return np.eye(len(RECORDS), dtype=np.float32)[images[:, 0, 0, 0]]


def painted(rows):
    images = np.zeros((len(rows), 8, 8, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = rows
    return images


@pytest.fixture
def bank():
    return Bank(RECORDS, np.eye(len(RECORDS), dtype=np.float32))


def names(bank, rows):
    return sorted((bank.records[i].base, bank.records[i].gender, bank.records[i].tone) for i in rows)


def test_relatives_differ_in_one_property_only(bank):
    found = bank.relatives(record("cook", "dark", "woman"))
    assert names(bank, found["same_base"]) == sorted(("cook", "woman", tone) for tone in TONES)
    assert names(bank, found["same_tone"]) == [("cook", "woman", "dark"), ("judge", "woman", "dark")]
    assert names(bank, found["same_gender"]) == [("cook", "man", "dark"), ("cook", "woman", "dark")]


def test_a_question_without_an_alternative_is_not_asked(bank):
    assert set(bank.relatives(record("hand", "dark"))) == {"same_base"}
    assert bank.relatives(record("hand", "")) == {}


def test_scores_count_hits_by_question_beside_chance(bank):
    asked = [record("cook", "dark", "woman"), record("cook", "light", "man"), record("hand", "medium"), RECORDS[0]]
    wrong_tone = bank.row(record("cook", "medium", "man"))
    images = painted([bank.row(asked[0]), wrong_tone, bank.row(asked[2]), 0])
    scores = retrieval_scores(images, asked, bank, ColourJudge())
    assert tuple(scores) == QUESTIONS
    assert scores["same_base"]["hits"] == [True, False, True, None]
    assert scores["same_base"]["n"] == 3
    assert scores["same_base"]["accuracy"] == pytest.approx(2 / 3)
    assert scores["same_base"]["chance"] == pytest.approx(1 / 4)
    assert scores["same_tone"]["chance"] == pytest.approx(1 / 2)
    # the wrong tone's one-hot is equally far from every candidate of these sets: a tie is a miss
    assert scores["same_gender"]["hits"] == [True, False, None, None]


def test_questions_nobody_can_be_asked_have_no_score(bank):
    scores = retrieval_scores(painted([0]), [RECORDS[0]], bank, ColourJudge())
    assert all(score["accuracy"] is None and score["chance"] is None and score["n"] == 0 for score in scores.values())


def test_a_record_the_bank_lacks_and_wrong_lengths_are_refused(bank):
    with pytest.raises(ValueError, match="has no 'woman pilot: dark'"):
        bank.row(record("pilot", "dark", "woman"))
    with pytest.raises(ValueError, match="1 images for 2 records"):
        retrieval_scores(painted([0]), RECORDS[:2], bank, ColourJudge())


def test_embeddings_have_length_one_and_do_not_depend_on_the_batch():
    judge = load_judge()
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    together = judge.embed(images)
    assert together.shape == (5, 128)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(judge.embed(images, batch_size=2), together, atol=1e-5)
    assert judge.embed(images[:, ::2, ::2]).shape == (5, 128)
    assert judge.embed(images[:0]).shape == (0, 128)
    with pytest.raises(ValueError, match="uint8"):
        judge.embed(images.astype(np.float32))


def test_the_shipped_judge_is_small_and_its_record_holds_what_is_asked():
    record = json.loads(WEIGHTS.with_suffix(".json").read_text(encoding="utf-8"))
    assert WEIGHTS.stat().st_size <= 600_000
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == record["sha256"]
    for split in ("seen", "heldout"):
        for question in QUESTIONS:
            assert record["quality"]["through_vae"][split][question]["accuracy"] >= 0.97, (split, question)
            assert record["quality"]["handled"][split][question]["accuracy"] >= 0.97, (split, question)


def test_a_missing_judge_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="judge_training"):
        load_judge(tmp_path / "none.safetensors")


def test_rough_handling_changes_a_picture_but_keeps_it_white_outside():
    pixels = torch.ones(4, 3, 64, 64)
    pixels[:, :, 20:40, 20:40] = -1.0
    rough = handle(pixels, torch.Generator().manual_seed(0))
    assert rough.shape == pixels.shape
    assert rough.abs().max() <= 1.0
    assert rough[:, :, :8].mean() > 0.8
    assert rough[:, :, 26:34, 26:34].mean() < -0.7
    assert (rough[0] - rough[1]).abs().mean() > 0.01


def test_a_blank_shift_of_handling_moves_the_middle_by_less_than_four_pixels():
    pixels = torch.ones(64, 3, 64, 64)
    pixels[:, :, 31:33, 31:33] = -1.0
    dark = (1.0 - handle(pixels, torch.Generator().manual_seed(1)).mean(1)).clamp(min=0.3) - 0.3
    middle = (dark.sum(1) * torch.arange(64.0)).sum(1) / dark.sum((1, 2)).clamp(min=1e-6)
    assert (middle - 31.5).abs().max() < 4.0
    assert middle.std() > 0.5


def test_half_of_a_batch_are_whole_families_and_no_row_stands_twice():
    families = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    rows = draw_rows(families, 1000, 16, np.random.default_rng(0))
    assert len(rows) == len(set(rows.tolist())) == 16
    whole = [family for family in families if set(family) <= set(rows.tolist())]
    assert len(whole) >= 2


def test_the_tower_keeps_positions():
    torch.manual_seed(0)
    judge = Judge(Tower())
    images = np.zeros((2, 64, 64, 3), dtype=np.uint8)
    images[0, 4:12, 4:12], images[1, 52:60, 52:60] = 255, 255
    embeddings = judge.embed(images)
    assert embeddings[0] @ embeddings[1] < 0.9999
