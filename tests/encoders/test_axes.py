"""The text axes: which encoders speak, what is pooled and where, what dropping does; zeros in place of the absent."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from mmdit.config import CaptionDropoutConfig, EncodersConfig
from mmdit.data.shapes import draw_scene
from mmdit.encoders.axes import drop_captions, join
from mmdit.encoders.text import TextEncoders, load_run_text, load_text_encoders

PROMPTS = ["a red circle", "", "a small blue square left of a large green star"]
ENCODERS = ("clip_l", "clip_g", "t5")
SUBSETS = [subset for n in range(4) for subset in combinations(ENCODERS, n)]
LATE = "a red circle and " * 30 + "a white star"


@pytest.fixture(scope="module")
def tiny():
    return load_text_encoders("tiny")


def features(name):
    """Where an encoder's numbers lie: tokens and features of the untrimmed context, and its part of [L ; G ; T5]."""
    return {
        "clip_l": (slice(0, 77), slice(0, 96), slice(0, 96)),
        "clip_g": (slice(0, 77), slice(96, 224), slice(96, 224)),
        "t5": (slice(77, 154), slice(0, 256), slice(224, 480)),
    }[name]


@pytest.mark.parametrize("padding", ["mask", "attend"])
@pytest.mark.parametrize("use", SUBSETS, ids=lambda use: "+".join(use) or "none")
def test_encoders_in_use_say_what_they_say_and_the_others_zeros(tiny, use, padding):
    whole = tiny.under(None, "clip+t5").encode(PROMPTS, padding)
    text = tiny.under(use, "clip+t5")
    encoded = text.encode(PROMPTS, padding)
    assert encoded.context.shape == whole.context.shape == (3, 154, 256)
    assert encoded.pooled.shape == (3, 480) == (3, text.pooled_dim)
    assert (text.context_dim, text.clip_l_width, text.streams) == (256, 96, tiny.streams)
    for name in ENCODERS:
        tokens, width, pooled = features(name)
        for ours, theirs in (
            (encoded.context[:, tokens, width], whole.context[:, tokens, width]),
            (encoded.pooled[:, pooled], whole.pooled[:, pooled]),
        ):
            torch.testing.assert_close(ours, theirs if name in use else torch.zeros_like(theirs), atol=1e-6, rtol=0)


@pytest.mark.parametrize("use", SUBSETS, ids=lambda use: "+".join(use) or "none")
def test_a_stream_of_which_nobody_is_left_keeps_one_attended_token(tiny, use):
    text = tiny.under(use)
    mask = text.encode(PROMPTS, "mask").context_mask
    clip, t5 = mask[:, :77].sum(dim=1), mask[:, 77:].sum(dim=1)
    everything = tiny.encode(PROMPTS, "mask").context_mask
    assert torch.equal(clip, everything[:, :77].sum(dim=1) if {"clip_l", "clip_g"} & {*use} else torch.ones(3).long())
    assert torch.equal(t5, everything[:, 77:].sum(dim=1) if "t5" in use else torch.ones(3).long())
    trimmed = text.encode(PROMPTS, "trim")
    assert trimmed.context_mask.sum() == mask.sum()
    null = text.null(2, "empty_caption" if use else "zeros", padding="trim")
    assert (null.context_mask.sum(dim=1) >= 2).all()


def test_no_encoder_at_all_is_an_unconditional_run(tiny):
    text = tiny.under(())
    encoded = text.encode(PROMPTS, "trim")
    assert encoded.context.shape == (3, 2, 256)
    assert encoded.context.abs().max() == encoded.pooled.abs().max() == 0
    null = text.null(3, padding="trim")
    assert torch.equal(null.context, encoded.context)
    assert torch.equal(null.context_mask, encoded.context_mask)
    assert text.null(1, "empty_caption", padding="trim").context.abs().max() == 0


ONE_STREAM = [use for use in SUBSETS if use and len({"t5" in name for name in use}) == 1]


@pytest.mark.parametrize("padding", ["mask", "trim", "attend"])
@pytest.mark.parametrize("use", SUBSETS[1:], ids="+".join)
def test_absent_nothing_takes_the_silent_stream_away_and_changes_nothing_else(tiny, use, padding):
    zeros, nothing = tiny.under(use, "clip+t5"), tiny.under(use, "clip+t5", silent="nothing")
    dropout = CaptionDropoutConfig(caption=0.3, **dict.fromkeys(use, 0.5))
    uniforms = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))

    def dropped(text):
        conditioning, null = text.encode(PROMPTS, padding), text.null(1, padding=padding)
        absent = [name for name in ENCODERS if name not in use]
        layout = {"clip_l_width": text.clip_l_width, "pooled": text.layout.pooled}
        return conditioning, null, drop_captions(conditioning, null, dropout, uniforms, absent=absent, **layout)

    for whole, left in zip(dropped(zeros), dropped(nothing), strict=True):
        spoken = [s for s in whole.streams if any(name == s[0] or name.startswith(s[0]) for name in use)]
        assert [(name, stop - start, width) for name, start, stop, width in left.streams] == [
            (name, stop - start, width) for name, start, stop, width in spoken
        ]
        places = torch.cat([torch.arange(start, stop) for _, start, stop, _ in spoken])
        assert torch.equal(left.context, whole.context[:, places])
        assert torch.equal(left.pooled, whole.pooled)
        assert (left.context_mask is None) == (padding == "attend")
        assert padding == "attend" or torch.equal(left.context_mask, whole.context_mask[:, places])
    assert len(nothing.streams) == (1 if use in ONE_STREAM else 2)


def test_absent_nothing_leaves_a_token_to_attend_to_wherever_captions_are_dropped(tiny):
    text = tiny.under(["t5"], silent="nothing")
    for null in ("zeros", "empty_caption"):
        assert text.null(2, null, padding="trim").context_mask.any(dim=1).all()
    with pytest.raises(ValueError, match="leaves no text at all"):
        tiny.under([], silent="nothing")


# --- pooled ---------------------------------------------------------------------------------------------------------


def test_the_mean_of_clip_is_that_of_its_final_states_projected(tiny):
    ids = tiny.tokenize(PROMPTS)
    expected = []
    for name in ("clip_l", "clip_g"):
        module = tiny.towers[name].module
        with torch.no_grad():
            last = module(input_ids=ids[name]).last_hidden_state
            rows = []
            for i, length in enumerate(tiny.real_lengths(name, ids[name]).tolist()):
                mean = last[i, :length].double().mean(dim=0).float()
                rows.append(module.text_projection(mean) if name == "clip_g" else mean)
        expected.append(torch.stack(rows))
    for padding in ("mask", "trim", "attend"):
        pooled = tiny.under(None, "clip", "mean").encode(PROMPTS, padding).pooled
        torch.testing.assert_close(pooled, torch.cat(expected, dim=1), atol=2e-5, rtol=1e-4)
    assert (pooled - tiny.encode(PROMPTS).pooled).abs().max() > 0.1


def test_the_end_token_stays_what_releases_pool(tiny):
    with torch.no_grad():
        module = tiny.towers["clip_g"].module
        expected = module(input_ids=tiny.tokenize(PROMPTS)["clip_g"]).text_embeds
    assert torch.equal(tiny.under(None, "clip", "end").encode(PROMPTS).pooled, tiny.encode(PROMPTS).pooled)
    torch.testing.assert_close(tiny.encode(PROMPTS).pooled[:, 96:], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("pooled_at", ["end", "mean"])
def test_clip_and_t5_appends_the_mean_of_real_t5_tokens(tiny, pooled_at):
    encoded = tiny.under(None, "clip+t5", pooled_at).encode(PROMPTS, "mask")
    states, mask = encoded.context[:, 77:], encoded.context_mask[:, 77:]
    expected = torch.stack([row[real].mean(dim=0) for row, real in zip(states, mask, strict=True)])
    torch.testing.assert_close(encoded.pooled[:, 224:], expected, atol=1e-5, rtol=1e-4)
    clip = tiny.under(None, "clip", pooled_at).encode(PROMPTS, "mask").pooled
    assert torch.equal(encoded.pooled[:, :224], clip)


def test_pooled_none_gives_no_vector_anywhere(tiny):
    text = tiny.under(None, "none")
    assert text.encode(PROMPTS).pooled is None
    assert text.null(2).pooled is None
    assert text.null(2, "empty_caption").pooled is None
    assert text.pooled_dim == 0
    assert torch.equal(text.encode(PROMPTS).context, tiny.encode(PROMPTS).context)


def test_what_is_not_there_cannot_be_used_or_pooled(tiny):
    clips = tiny.under(("clip_l", "clip_g"))
    with pytest.raises(ValueError, match="names t5, but there are only clip_l, clip_g"):
        clips.under(("clip_l", "t5"))
    low = TextEncoders({"clip_l": tiny.towers["clip_l"]}, {}, context_dim=96, family="sd1.5")
    with pytest.raises(ValueError, match="needs a T5"):
        low.under(None, "clip+t5")
    with pytest.raises(ValueError, match="would drop the sizes"):
        TextEncoders({}, {}, context_dim=256, family="sdxl").under(None, "none")
    with pytest.raises(ValueError, match=r"unknown encoders\.pooled 'clips'"):
        tiny.under(None, "clips")


def test_a_runs_config_is_followed():
    text = load_run_text(EncodersConfig(use=("clip_g", "t5"), pooled="clip+t5", pooled_at="mean", t5_length=154))
    assert list(text.towers) == ["clip_g", "t5"]
    assert (text.pooled, text.pooled_at, text.t5_length, text.pooled_dim) == ("clip+t5", "mean", 154, 480)


@pytest.mark.parametrize("t5_length", [77, 154, 256, 512])
def test_t5_reads_as_far_as_its_length_and_clip_does_not(tiny, t5_length):
    text = load_run_text(EncodersConfig(t5_length=t5_length))
    captions = [f"{LATE} and {LATE}", "a cat"]
    long = text.encode(captions, "mask")
    assert long.context.shape[1] == 77 + t5_length
    needed = len(tiny.tokenizers["t5"](captions, 10_000)[0])
    assert 256 < needed < 512
    assert long.context_mask[0, 77:].sum() == min(t5_length, needed)
    assert long.context_mask[0, :77].sum() == 77
    assert torch.equal(long.context[:, :77], tiny.encode(captions, "mask").context[:, :77])
    short = text.encode(["a cat"], "trim").context
    torch.testing.assert_close(short, tiny.encode(["a cat"], "trim").context, atol=2e-5, rtol=1e-4)


# --- dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["trim", "mask", "attend"])
@pytest.mark.parametrize("dropped", SUBSETS, ids=lambda use: "+".join(use) or "none")
def test_dropping_an_encoder_is_not_having_it(tiny, dropped, padding):
    """With the null of zeros a dropped encoder leaves what an absent one leaves, pooled T5 included."""
    text = tiny.under(None, "clip+t5")
    conditioning = text.encode(PROMPTS, padding)
    uniforms = torch.tensor([[0.9, *(0.1 if name in dropped else 0.9 for name in ENCODERS)]]).expand(3, 4)
    dropout = CaptionDropoutConfig(caption=0.1, clip_l=0.5, clip_g=0.5, t5=0.5)
    got = drop_captions(
        conditioning, text.null(1, padding=padding), dropout, uniforms,
        clip_l_width=text.clip_l_width, pooled=text.layout.pooled,
    )  # fmt: skip
    left = [name for name in ENCODERS if name not in dropped]
    expected = text.under(left, "clip+t5").encode(PROMPTS, "attend" if padding == "attend" else "mask")
    assert_same_text(got, expected)


def assert_same_text(got, expected):
    """Equal in what is attended to, stream by stream, whatever the padding behind it."""
    torch.testing.assert_close(got.pooled, expected.pooled, atol=1e-6, rtol=0)
    for (_, a, b, _), (_, c, d, _) in zip(got.streams, expected.streams, strict=True):
        if got.context_mask is None:
            torch.testing.assert_close(got.context[:, a:b], expected.context[:, c:d], atol=2e-5, rtol=1e-4)
            continue
        for i in range(len(got.context)):
            ours = got.context[i, a:b][got.context_mask[i, a:b]]
            theirs = expected.context[i, c:d][expected.context_mask[i, c:d]]
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_the_last_speaker_of_a_stream_leaves_one_null_token_when_dropped(tiny):
    """CLIP-L is not there: dropping CLIP-G must not leave the length of the caption in the mask."""
    text = tiny.under(("clip_g", "t5"))
    conditioning, null = text.encode(PROMPTS, "trim"), text.null(1, padding="trim")
    uniforms = torch.tensor([[0.9, 0.9, 0.1, 0.9]]).expand(3, 4)
    dropout = CaptionDropoutConfig(caption=0.0, clip_g=0.5)
    got = drop_captions(
        conditioning, null, dropout, uniforms,
        clip_l_width=text.clip_l_width, pooled=text.layout.pooled, absent=("clip_l",),
    )  # fmt: skip
    cut = got.streams[0][2]
    assert got.context_mask[:, :cut].sum(dim=1).tolist() == [1, 1, 1]
    assert_same_text(got, tiny.under(("t5",)).encode(PROMPTS, "mask"))


def test_joining_keeps_the_order_of_rows_and_the_streams(tiny):
    ids = tiny.tokenize(PROMPTS)
    parts = {name: tiny.run_encoder(name, ids[name], "trim") for name in ENCODERS}
    joined, direct = join(tiny.layout, parts, "trim", 3), tiny.encode(PROMPTS, "trim")
    assert torch.equal(joined.context, direct.context)
    assert torch.equal(joined.pooled, direct.pooled)
    assert joined.streams == direct.streams


# --- captions beyond what an encoder reads --------------------------------------------------------------------------


def long_pair(index, max_objects):
    """A long caption of a scene, and one with other colours of the late objects; None where those make other groups."""
    scene = draw_scene(0, index, "train", max_objects)
    other = {"red": "cyan", "cyan": "red"}
    objects = tuple(
        replace(item, colour=other.get(item.colour, "red")) if i in scene.late else item
        for i, item in enumerate(scene.objects)
    )
    changed = replace(scene, objects=objects)
    return (scene.long(), changed.long()) if changed.groups == scene.groups else None


@pytest.mark.parametrize("max_objects", [1, 2, 6])
def test_late_objects_are_told_by_a_t5_of_154_tokens_alone(tiny, max_objects):
    """What a study of T5's length rests on: 77 tokens, of CLIP or of T5, say nothing of the late objects."""
    pairs = [pair for i in range(40) if (pair := long_pair(i, max_objects)) is not None]
    assert len(pairs) > 30
    first, second = zip(*pairs, strict=True)
    assert all(a != b for a, b in pairs)
    short = tiny.under(None, "clip+t5", "mean")
    a, b = short.encode(first, "mask"), short.encode(second, "mask")
    assert torch.equal(a.context, b.context)
    assert torch.equal(a.pooled, b.pooled)
    long = load_run_text(EncodersConfig(t5_length=154))
    a, b = long.encode(first, "mask"), long.encode(second, "mask")
    assert torch.equal(a.context[:, :77], b.context[:, :77])
    assert ((a.context - b.context).abs().amax(dim=(1, 2)) > 0.1).all()
    assert a.context_mask[:, 77:].sum(dim=1).max() <= 154  # and none of them is cut
    ends = [len(row) for row in long.tokenizers["t5"](list(first), 10_000)]
    assert max(ends) <= 154
