"""The rules of each family's text: which states, which widths, what is pooled, what "no text" is, SDXL's sizes."""

import pytest
import torch

from mmdit.encoders.families import FAMILIES, embed_sizes
from mmdit.encoders.text import TextEncoders, drop_captions, load_text_encoders

PROMPTS = ["a red circle", "", "a small blue square"]
SIZES = torch.tensor([[512, 640, 0, 8, 1024, 768], [64, 64, 3, 0, 64, 64], [1, 2, 3, 4, 5, 6]])


@pytest.fixture(scope="module")
def tiny():
    return load_text_encoders("tiny")


def of_family(tiny, family, context_dim, **options):
    towers = {name: tower for name, tower in tiny.towers.items() if name in FAMILIES[family].encoders}
    return TextEncoders(towers, tiny.tokenizers, context_dim=context_dim, family=family, padding="attend", **options)


@pytest.fixture(scope="module")
def sdxl(tiny):
    return of_family(tiny, "sdxl", 224)


@pytest.fixture(scope="module")
def sd15(tiny):
    return of_family(tiny, "sd1.5", 96)


def test_sd15_takes_the_last_states_behind_the_final_norm_and_nothing_pooled(tiny, sd15):
    encoded = sd15.encode(PROMPTS)
    tower = tiny.towers["clip_l"]
    with torch.no_grad():
        out = tower.module(input_ids=tiny.tokenize(PROMPTS)["clip_l"], output_hidden_states=True)
    expected = (out.last_hidden_state - tower.state_mean) / tower.state_std
    torch.testing.assert_close(encoded.context, expected, atol=1e-5, rtol=0)
    assert (out.last_hidden_state - out.hidden_states[-2]).abs().max() > 0.1  # the other states would fail
    assert encoded.pooled is None
    assert sd15.pooled_dim == 0
    assert encoded.streams == (("clip", 0, 77, 96),) == sd15.streams


def test_sdxl_joins_penultimate_states_without_padding_and_pools_clip_g_alone(tiny, sdxl):
    encoded, as_sd3 = sdxl.encode(PROMPTS, sizes=SIZES), tiny.encode(PROMPTS, "attend")
    torch.testing.assert_close(encoded.context, as_sd3.context[:, :77, :224], atol=1e-6, rtol=0)
    torch.testing.assert_close(encoded.pooled[:, :128], as_sd3.pooled[:, 96:], atol=1e-6, rtol=0)
    assert encoded.pooled.shape == (3, sdxl.pooled_dim) == (3, 128 + 1536)
    assert torch.equal(encoded.pooled[:, 128:], embed_sizes(SIZES, 3))


def test_sizes_are_embedded_as_diffusers_embeds_them():
    from diffusers.models.embeddings import Timesteps

    theirs = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(SIZES.flatten()).reshape(3, 1536)
    torch.testing.assert_close(embed_sizes(SIZES, 3), theirs, atol=1e-5, rtol=0)
    assert torch.equal(embed_sizes(SIZES[:1], 2)[1], embed_sizes(SIZES[:1], 1)[0])


def test_sizes_follow_their_row_where_prompts_are_equal(sdxl):
    encoded = sdxl.encode(["a", "b", "a"], sizes=SIZES)
    assert torch.equal(encoded.pooled[:, 128:], embed_sizes(SIZES, 3))
    assert torch.equal(encoded.pooled[0, :128], encoded.pooled[2, :128])


@pytest.mark.parametrize("null", ["zeros", "empty_caption"])
def test_the_null_of_sdxl_keeps_the_sizes(sdxl, null):
    nulls = sdxl.null(3, null, sizes=SIZES)
    assert torch.equal(nulls.pooled[:, 128:], embed_sizes(SIZES, 3))
    assert (nulls.context.abs().max() == 0) == (null == "zeros") == (nulls.pooled[:, :128].abs().max() == 0)
    assert nulls.context.shape == (3, 77, 224)


def test_sizes_are_asked_for_and_refused_in_words(tiny, sdxl):
    with pytest.raises(ValueError, match=r"pass sizes=\[B, 6\]"):
        sdxl.encode(PROMPTS)
    with pytest.raises(ValueError, match=r"got \[2, 6\]"):
        sdxl.encode(PROMPTS, sizes=SIZES[:2])
    with pytest.raises(ValueError, match="sd3 has none"):
        tiny.encode(PROMPTS, sizes=SIZES)
    with pytest.raises(ValueError, match=r"sd1\.5 has no encoder clip_g, t5"):
        TextEncoders(tiny.towers, {}, context_dim=256, family="sd1.5")
    with pytest.raises(ValueError, match=r"did you mean 'sdxl'"):
        TextEncoders({}, {}, context_dim=256, family="sdxxl")


@pytest.mark.parametrize("padding", ["mask", "trim"])
def test_families_with_one_stream_know_the_padding_policies(sd15, padding):
    encoded, attended = sd15.encode(PROMPTS, padding), sd15.encode(PROMPTS)
    assert encoded.context_mask.sum(dim=1).tolist() == [5, 2, 6]
    assert encoded.context.shape[1] == (77 if padding == "mask" else 6)
    torch.testing.assert_close(encoded.context[0, :5], attended.context[0, :5], atol=2e-5, rtol=0)
    dropped = drop_captions(
        encoded, sd15.null(1, padding=padding), _always(), torch.zeros(3, 4), clip_l_width=sd15.clip_l_width
    )
    assert dropped.context.abs().max() == 0
    assert encoded.context.abs().max() > 0


def _always():
    from mmdit.config import CaptionDropoutConfig

    return CaptionDropoutConfig(caption=1.0)


def test_a_tower_left_out_leaves_zeros_in_its_place(tiny):
    absent = {"clip_l": (96, 96)}
    towers = {name: tiny.towers[name] for name in ("clip_g", "t5")}
    without = TextEncoders(towers, tiny.tokenizers, context_dim=256, absent=absent)
    encoded, whole = without.encode(PROMPTS), tiny.encode(PROMPTS)
    assert encoded.context[:, :77, :96].abs().max() == 0
    torch.testing.assert_close(encoded.context[:, :, 96:], whole.context[:, :, 96:], atol=1e-6, rtol=0)
    assert (without.clip_l_width, without.pooled_dim, without.streams) == (96, 224, tiny.streams)
    assert encoded.pooled[:, :96].abs().max() == 0
    torch.testing.assert_close(encoded.pooled[:, 96:], whole.pooled[:, 96:], atol=1e-6, rtol=0)
    assert without.null(2).pooled.shape == (2, 224)


def test_fingerprints_tell_the_rules_apart(tiny, sdxl):
    low = {"clip_l": tiny.towers["clip_l"]}
    texts = [TextEncoders(low, {}, context_dim=96, family=family) for family in FAMILIES]
    texts.append(TextEncoders(low, {}, context_dim=256, absent={"clip_g": (128, 128)}))
    assert len({text.fingerprint for text in texts}) == 4


def test_ids_beyond_a_vocabulary_are_refused(tiny):
    ids = tiny.tokenize(["a"])
    ids["t5"][0, 0] = 5_000
    with pytest.raises(ValueError, match="t5 got the id 5000"):
        tiny.encode_ids(ids)
