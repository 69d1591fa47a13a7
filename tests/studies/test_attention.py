"""Attention maps of words: the right tokens of every encoder, and what a network with a known attention would give."""

import json

import numpy as np
import pytest
import torch
from mmdit_eval.attention import SIDE, attention_maps, word_positions, write_attention
from mmdit_eval.metrics import Reference
from mmdit_eval.words import chosen_words, repeated, shown_words

from mmdit.config import AttentionConfig
from mmdit.data import make_dataset
from mmdit.pipeline import TextToImage


def test_words_that_say_something_are_chosen_unless_some_are_named():
    assert chosen_words("a large green diamond above a red circle")[:3] == ["large", "green", "diamond"]
    assert chosen_words("a green star", ("star", "moon")) == ["star"]


def test_a_figure_has_room_for_eight_words_those_that_say_what_is_in_the_picture():
    short = "a large green diamond above a red circle"
    assert shown_words(short) == (["large", "green", "diamond", "above", "red", "circle"], 0)
    filler = "nothing overlaps and nothing is cut off by any border here"
    assert shown_words(f"{filler}. two small red stars left of a white circle") == (
        ["two", "small", "red", "stars", "left", "white", "circle"], 8,
    )  # fmt: skip
    colours = "red orange yellow green cyan blue purple white circle square"  # the first and the last
    assert shown_words(colours) == (["red", "orange", "yellow", "green", "purple", "white", "circle", "square"], 2)
    assert shown_words("one old man walks his dog by many rivers daily") == (
        ["one", "old", "man", "walks", "by", "many", "rivers", "daily"], 2,
    )  # fmt: skip
    assert shown_words(colours, ("square", "red", "moon")) == (["square", "red"], 0)
    assert shown_words(colours, colours.split()) == (colours.split()[:8], 2)
    assert repeated("a red star and a red circle", ["red", "star"]) == ["red"]


def test_the_tokens_of_a_word_are_found_in_every_encoder_also_at_the_end(text):
    caption = "a large green diamond"
    for place, word in enumerate(caption.split()):
        assert word_positions(text, caption, word) == {"clip_l": [place + 1], "clip_g": [place + 1], "t5": [place]}
    assert word_positions(text, caption, "circle") == {}


def test_maps_are_the_recorded_weights_of_the_words_tokens(micro, vae, text, tmp_path):
    from mmdit.diffusion import build_schedule
    from mmdit.models import build_denoiser

    config = micro()
    torch.manual_seed(0)
    denoiser = build_denoiser(config.model).eval()
    schedule = build_schedule(config.diffusion.schedule)
    pipeline = TextToImage(
        denoiser, vae, text, schedule, "velocity", config.sampling, config.encoders, precision="fp32"
    )
    dataset = make_dataset(config.data, "val")
    indices = np.arange(2)
    reference = Reference("val", dataset, indices, dataset.captions(indices), dataset.pixels(indices), None)
    found = attention_maps(pipeline, reference, 0, AttentionConfig())
    assert set(found["maps"]) == set(chosen_words(reference.captions[0]))
    maps = np.array(list(found["maps"].values()))
    assert maps.shape[1:] == (SIDE, SIDE)
    assert maps.min() > 0
    assert maps.sum(0).max() < 1  # words share an image token's attention with articles, padding and the image
    out = tmp_path / "attention.json"
    write_attention(tmp_path / "000000000048", reference, AttentionConfig(prompts=2), out, pipeline)
    stored = json.loads(out.read_text())
    assert [prompt["caption"] for prompt in stored["prompts"]] == reference.captions
    assert stored["prompts"][0]["maps"] == found["maps"]
    before = out.stat().st_mtime_ns
    write_attention(tmp_path / "000000000048", reference, AttentionConfig(prompts=2), out, pytest.fail)  # kept
    assert out.stat().st_mtime_ns == before
