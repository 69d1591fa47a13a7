"""The text stack: SD3's layout, padding policies, nulls, dropout, and loading."""

import json

import pytest
import torch

from mmdit.config import CaptionDropoutConfig
from mmdit.encoders.text import (
    TextEncoders,
    apply_padding,
    clip_lengths,
    drop_captions,
    load_text_encoders,
    resize_streams,
    t5_lengths,
)
from mmdit.encoders.tokenizers import CLIP_END, TINY
from mmdit.encoders.towers import Tower, build_tower, expand_rows, load_strictly

PROMPTS = ["a red circle", "", "a small blue square left of a large green star"]


@pytest.fixture(scope="module")
def text():
    return load_text_encoders("tiny")


@pytest.fixture(scope="module")
def encoded(text):
    return text.encode(PROMPTS)


def test_the_layout_is_sd3s(text, encoded):
    assert encoded.context.shape == (3, 154, 256)
    assert encoded.pooled.shape == (3, 224)
    assert encoded.streams == (("clip", 0, 77, 224), ("t5", 77, 154, 256)) == text.streams
    assert (text.context_dim, text.pooled_dim, text.clip_l_width) == (256, 224, 96)
    assert encoded.context[:, :77, 224:].abs().max() == 0  # CLIP is zero-padded to T5's width


def test_states_are_those_of_the_transformers_modules(text):
    """SD3: penultimate states without the final norm, the end token's pooled state, T5's last states."""
    ids = text.tokenize(PROMPTS)
    ours = text.encode_ids(ids, padding="attend")
    modules = {name: tower.module for name, tower in text.towers.items()}
    with torch.no_grad():
        low = modules["clip_l"](ids["clip_l"], output_hidden_states=True)
        big = modules["clip_g"](ids["clip_g"], output_hidden_states=True)
        t5 = modules["t5"](ids["t5"]).last_hidden_state
    expected = []
    for name, states in (("clip_l", low.hidden_states[-2]), ("clip_g", big.hidden_states[-2]), ("t5", t5)):
        tower = text.towers[name]
        expected.append((states - tower.state_mean) / tower.state_std)
    clip = torch.nn.functional.pad(torch.cat(expected[:2], dim=2), (0, 32))
    torch.testing.assert_close(ours.context, torch.cat([clip, expected[2]], dim=1), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(
        ours.pooled, torch.cat([low.pooler_output, big.text_embeds], dim=1), atol=2e-5, rtol=1e-4
    )
    assert ours.context_mask is None


def test_the_mask_is_true_up_to_the_end_token(text, encoded):
    ids = text.tokenize(PROMPTS)
    clip, t5 = encoded.context_mask[:, :77], encoded.context_mask[:, 77:]
    assert clip.sum(dim=1).tolist() == clip_lengths(ids["clip_l"]).tolist()
    assert clip.sum(dim=1)[:2].tolist() == [5, 2]
    assert t5.sum(dim=1).tolist() == t5_lengths(ids["t5"]).tolist()
    assert t5.sum(dim=1)[1] == 1
    assert encoded.context[~encoded.context_mask].abs().max() == 0


def test_padding_does_not_change_real_tokens(text):
    alone = text.encode(PROMPTS[:1], "trim")
    beside = apply_padding(text.encode(PROMPTS), "trim").index([0])
    real = alone.context_mask[0]
    for (_, a, b, _), (_, c, _, _) in zip(alone.streams, beside.streams, strict=True):
        torch.testing.assert_close(beside.context[0, c : c + b - a], alone.context[0, a:b], atol=2e-5, rtol=1e-4)
    assert real.all()
    longer = load_text_encoders("tiny", t5_length=154).encode(PROMPTS, "trim")
    torch.testing.assert_close(longer.context, text.encode(PROMPTS, "trim").context, atol=2e-5, rtol=1e-4)


def test_attending_to_padding_changes_t5_and_not_clip(text, encoded):
    attended = text.encode(PROMPTS, "attend")
    real = encoded.context_mask
    change = (attended.context - encoded.context).abs().amax(dim=2)
    assert change[:, :77][real[:, :77]].max() < 2e-5
    assert change[0, 77:][real[0, 77:]].max() > 1e-2


def test_rows_do_not_depend_on_the_batch_nor_on_its_order(text, encoded):
    back = text.encode([*PROMPTS[::-1], PROMPTS[0]])
    torch.testing.assert_close(back.context[[2, 1, 0]], encoded.context, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(back.pooled[[2, 1, 0]], encoded.pooled, atol=2e-5, rtol=1e-4)
    assert torch.equal(back.context[3], back.context[2])


def test_trim_cuts_each_stream_to_its_longest_row(text, encoded):
    trimmed = apply_padding(encoded, "trim")
    assert trimmed.streams[0][2] == int(encoded.context_mask[:, :77].sum(dim=1).max())
    assert trimmed.context.shape[1] == trimmed.streams[1][2] < 60
    assert trimmed.context_mask.sum() == encoded.context_mask.sum()
    direct = text.encode(PROMPTS, "trim")
    assert trimmed.streams == direct.streams
    assert torch.equal(trimmed.context_mask, direct.context_mask)
    assert torch.equal(trimmed.context, direct.context)
    assert apply_padding(encoded, "mask") is encoded
    assert apply_padding(encoded, "attend").context_mask is None


def test_padding_without_a_mask_is_refused(text):
    with pytest.raises(ValueError, match="padding='mask'"):
        apply_padding(text.encode(["a"], "attend"), "trim")
    with pytest.raises(ValueError, match="unknown padding"):
        apply_padding(text.encode(["a"]), "cut")


def test_resized_streams_are_padded_with_masked_zeros(encoded):
    long = resize_streams(resize_streams(encoded, [40, 30]), [77, 77])
    assert long.streams == encoded.streams
    assert torch.equal(long.context, encoded.context)
    assert torch.equal(long.context_mask, encoded.context_mask)


@pytest.mark.parametrize("padding", ["attend", "mask", "trim"])
def test_the_zero_null_keeps_one_attended_token_per_stream(text, padding):
    null = text.null(2, "zeros", padding=padding)
    assert null.context.abs().max() == 0
    assert null.pooled.shape == (2, 224)
    assert null.pooled.abs().max() == 0
    if padding == "attend":
        assert null.context_mask is None
    else:
        assert [int(null.context_mask[0, a:b].sum()) for _, a, b, _ in null.streams] == [1, 1]


def test_the_empty_caption_null_is_the_encoded_empty_caption(text, encoded):
    null = text.null(2, "empty_caption")
    torch.testing.assert_close(null.context[1], encoded.context[1], atol=2e-5, rtol=1e-4)
    assert torch.equal(null.context_mask[1], encoded.context_mask[1])
    with pytest.raises(ValueError, match="empty_caption"):
        text.null(1, "nothing")


ALL = CaptionDropoutConfig(caption=0.1, clip_l=0.4, clip_g=0.4, t5=0.4)


def _drop(text, conditioning, row, null="zeros", dropout=ALL, padding="trim"):
    uniforms = torch.full((3, 4), 0.99)
    uniforms[0] = torch.tensor(row)
    return drop_captions(conditioning, text.null(1, null, padding=padding), dropout, uniforms, clip_l_width=96)


@pytest.mark.parametrize("null", ["zeros", "empty_caption"])
def test_a_dropped_caption_is_the_null(text, null):
    conditioning = text.encode(PROMPTS, "trim")
    dropped = _drop(text, conditioning, [0.05, 0.9, 0.9, 0.9], null)
    expected = resize_streams(text.null(1, null, padding="trim"), [b - a for _, a, b, _ in dropped.streams])
    assert torch.equal(dropped.context[:1], expected.context)
    assert torch.equal(dropped.pooled[:1], expected.pooled)
    assert torch.equal(dropped.context_mask[:1], expected.context_mask)
    assert torch.equal(dropped.context[1:], conditioning.context[1:])
    assert torch.equal(dropped.context_mask[1:], conditioning.context_mask[1:])
    assert torch.equal(dropped.pooled[1:], conditioning.pooled[1:])


def test_a_dropped_t5_keeps_one_null_token_and_leaves_clip_alone(text):
    conditioning = text.encode(PROMPTS, "trim")
    dropped = _drop(text, conditioning, [0.9, 0.9, 0.9, 0.1])
    cut = conditioning.streams[0][2]
    assert torch.equal(dropped.context[0, :cut], conditioning.context[0, :cut])
    assert dropped.context[0, cut:].abs().max() == 0
    assert dropped.context_mask[0, cut:].sum() == 1
    assert torch.equal(dropped.pooled, conditioning.pooled)


def test_dropping_one_clip_tower_zeroes_its_features_and_keeps_the_stream(text):
    conditioning = text.encode(PROMPTS, "trim")
    cut = conditioning.streams[0][2]
    low = _drop(text, conditioning, [0.9, 0.1, 0.9, 0.9])
    assert low.context[0, :cut, :96].abs().max() == 0
    assert torch.equal(low.context[0, :cut, 96:], conditioning.context[0, :cut, 96:])
    assert low.pooled[0, :96].abs().max() == 0
    assert torch.equal(low.pooled[0, 96:], conditioning.pooled[0, 96:])
    assert torch.equal(low.context_mask, conditioning.context_mask)
    big = _drop(text, conditioning, [0.9, 0.9, 0.1, 0.9])
    assert big.context[0, :cut, 96:].abs().max() == 0
    assert big.pooled[0, 96:].abs().max() == 0
    assert torch.equal(big.pooled[0, :96], conditioning.pooled[0, :96])


def test_dropping_both_clip_towers_leaves_one_null_token(text):
    conditioning = text.encode(PROMPTS, "trim")
    cut = conditioning.streams[0][2]
    dropped = _drop(text, conditioning, [0.9, 0.1, 0.1, 0.9])
    assert dropped.context_mask[0, :cut].sum() == 1
    assert torch.equal(dropped.context_mask[0, cut:], conditioning.context_mask[0, cut:])
    assert torch.equal(dropped.context[0, cut:], conditioning.context[0, cut:])


def test_dropping_works_where_padding_is_attended(text):
    conditioning = text.encode(PROMPTS, "attend")
    dropped = _drop(text, conditioning, [0.05, 0.9, 0.9, 0.9], "empty_caption", padding="attend")
    assert dropped.context_mask is None
    torch.testing.assert_close(dropped.context[0], conditioning.context[1], atol=1e-5, rtol=1e-4)


def test_dropping_everything_never_leaves_a_row_without_tokens(text):
    conditioning = text.encode(PROMPTS, "trim")
    everything = CaptionDropoutConfig(caption=1.0)
    dropped = drop_captions(conditioning, text.null(1, padding="trim"), everything, torch.zeros(3, 4))
    assert dropped.context_mask.sum(dim=1).tolist() == [2, 2, 2]


def test_dropping_refuses_what_does_not_fit(text):
    conditioning = text.encode(PROMPTS, "trim")
    with pytest.raises(ValueError, match=r"\[B, 4\]"):
        drop_captions(conditioning, text.null(1), CaptionDropoutConfig(), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="clip_l_width"):
        drop_captions(conditioning, text.null(1), ALL, torch.zeros(3, 4))
    with pytest.raises(ValueError, match="context_mask"):
        drop_captions(conditioning, text.null(1, padding="attend"), CaptionDropoutConfig(), torch.zeros(3, 4))


def test_one_string_is_refused_and_the_remedy_named(text):
    with pytest.raises(ValueError, match=r"\['a cat'\]"):
        text.encode("a cat")
    with pytest.raises(ValueError, match="no prompts"):
        text.encode([])


def test_ids_may_come_from_outside_and_missing_ones_are_named(text, encoded):
    ids = text.tokenize(PROMPTS)
    assert {name: tuple(value.shape) for name, value in ids.items()} == {
        "clip_l": (3, 77),
        "clip_g": (3, 77),
        "t5": (3, 77),
    }
    assert ids["clip_l"][0, -1] == CLIP_END
    assert ids["clip_g"][0, -1] == 0
    assert torch.equal(text.encode_ids(ids).context, encoded.context)
    with pytest.raises(ValueError, match="t5"):
        text.encode_ids({name: ids[name] for name in ("clip_l", "clip_g")})


def test_a_missing_encoder_contributes_zeros(text):
    towers = {name: text.towers[name] for name in ("clip_l", "clip_g")}
    without = TextEncoders(towers, text.tokenizers, context_dim=256)
    encoded = without.encode(PROMPTS)
    assert encoded.context.shape == (3, 154, 256)
    assert encoded.context[:, 77:].abs().max() == 0
    assert encoded.context_mask[:, 77:].sum(dim=1).tolist() == [1, 1, 1]
    only_t5 = TextEncoders({"t5": text.towers["t5"]}, text.tokenizers, context_dim=256).encode(PROMPTS)
    assert only_t5.pooled is None
    assert only_t5.context[:, :77].abs().max() == 0


def test_an_encoder_without_tokenizer_loads_and_only_tokenising_fails(text):
    bare = TextEncoders(text.towers, {"clip_l": text.tokenizers["clip_l"]}, context_dim=256)
    with pytest.raises(ValueError, match="clip_g, t5"):
        bare.encode(PROMPTS)
    bare.encode_ids(text.tokenize(PROMPTS))


def test_states_have_unit_scale(text):
    captions = ["a red circle", "a small blue square above a cyan star", "two green crosses", "cat face", "red heart"]
    encoded = text.encode(captions)
    for _, start, stop, width in encoded.streams:
        states = encoded.context[:, start:stop, :width][encoded.context_mask[:, start:stop]]
        assert 0.5 < states.std() < 2.0
    assert 0.3 < encoded.pooled.std() < 3.0


def test_nothing_in_the_encoders_trains(text):
    assert not any(p.requires_grad for tower in text.towers.values() for p in tower.module.parameters())


def test_fingerprints_tell_encoders_apart(text):
    again = load_text_encoders("tiny")
    assert again.fingerprint == text.fingerprint
    with torch.no_grad():
        next(iter(again.towers["t5"].module.parameters()))[0, 0] += 1e-3
    again._fingerprint = None
    assert again.fingerprint != text.fingerprint


def test_unknown_ids_share_one_row(text):
    ids = torch.tensor([5, 7])
    table = expand_rows(ids, torch.tensor([[1.0], [2.0], [9.0]]))
    assert table.shape == (49_408, 1)
    assert table[[5, 7, 0, 49_407], 0].tolist() == [1.0, 2.0, 9.0, 9.0]
    strange = text.encode(["xylophone quetzalcoatl"])
    assert strange.context.isfinite().all()


def test_the_shipped_text_and_image_files_stay_under_their_budget():
    files = [TINY / name for name in ("clip_l.safetensors", "clip_g.safetensors", "t5.safetensors", "spiece.model")]
    files.append(TINY / "clip_image.safetensors")
    assert sum(file.stat().st_size for file in files) <= 7.8e6
    weights = [file for file in TINY.iterdir() if file.suffix == ".safetensors"]
    assert sum(file.stat().st_size for file in weights) < 12e6


def test_the_recorded_quality_passes_the_gate():
    quality = json.loads((TINY / "text.json").read_text())["quality"]
    short = quality["t5"]["short, 1-2 objects"]
    assert short["worst, pair"] >= 98
    assert min(value for name, value in short.items() if "word ->" in name) >= 98
    assert min(value for name, value in short.items() if name.startswith("mean") and name.endswith("all")) >= 98
    assert quality["t5"]["cosine"]["paraphrase"] >= 0.9
    assert quality["t5"]["cosine"]["order swapped"] <= 0.6


def test_a_folder_in_the_hugging_face_layout_gives_the_same_states(text, tmp_path):
    text.towers["clip_l"].module.save_pretrained(str(tmp_path / "text_encoder"))
    text.towers["clip_g"].module.save_pretrained(str(tmp_path / "text_encoder_2"))
    text.towers["t5"].module.save_pretrained(str(tmp_path / "text_encoder_3"))
    (tmp_path / "tokenizer_3").mkdir()
    (tmp_path / "tokenizer_3" / "spiece.model").write_bytes((TINY / "spiece.model").read_bytes())
    loaded = load_text_encoders(tmp_path)
    assert loaded.padding == "attend"  # what releases do
    ours, theirs = text.encode(PROMPTS, "attend"), loaded.encode(PROMPTS)
    scale = torch.cat([text.towers[name].state_std for name in ("clip_l", "clip_g")])
    shift = torch.cat([text.towers[name].state_mean for name in ("clip_l", "clip_g")])
    torch.testing.assert_close(
        theirs.context[:, :77, :224], ours.context[:, :77, :224] * scale + shift, atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(theirs.pooled, ours.pooled, atol=1e-5, rtol=1e-4)
    assert theirs.context_mask is None


def test_a_folder_without_t5_and_tokenizers_loads(text, tmp_path):
    text.towers["clip_l"].module.save_pretrained(str(tmp_path / "text_encoder"))
    loaded = load_text_encoders(tmp_path, family="sd3")  # a CLIP-L alone is SD1.5's, unless said
    encoded = loaded.encode(["a cat"])
    assert encoded.context.shape == (1, 154, 4096)
    assert encoded.pooled.shape == (1, 96 + 1280)  # the towers left out are zeros of the released widths
    assert encoded.pooled[:, 96:].abs().max() == 0
    assert loaded.clip_l_width == 96
    assert load_text_encoders(tmp_path).family == "sd1.5"


def test_missing_encoders_and_lengths_are_refused_in_words(text, tmp_path):
    with pytest.raises(FileNotFoundError, match="text_encoder"):
        load_text_encoders(tmp_path)
    with pytest.raises(ValueError, match="t5_length"):
        load_text_encoders("tiny", t5_length=0)
    with pytest.raises(ValueError, match="context_dim"):
        TextEncoders(text.towers, {}, context_dim=100)


def test_weights_that_do_not_fit_are_listed():
    module = build_tower("t5", {"vocab_size": 8, "d_model": 8, "d_kv": 4, "num_heads": 2, "d_ff": 8, "num_layers": 1})
    tensors = {key: value for key, value in module.state_dict().items() if "final_layer_norm" not in key}
    with pytest.raises(ValueError, match="final_layer_norm"):
        load_strictly(module, {**tensors, "strange": torch.zeros(1)}, "file")
    with pytest.raises(ValueError, match="strange"):
        load_strictly(module, {**module.state_dict(), "strange": torch.zeros(1)}, "file")


def test_either_prefix_of_clip_loads(text):
    module = text.towers["clip_l"].module
    tensors = {key.removeprefix("text_model."): value for key, value in module.state_dict().items()}
    for names in (tensors, {f"text_model.{key}": value for key, value in tensors.items()}):
        load_strictly(module, names, "file")


def test_a_longer_t5_length_reads_further():
    caption = "a red circle and " * 30 + "a white star"
    short, long = (load_text_encoders("tiny", t5_length=n).encode([caption]) for n in (77, 154))
    assert short.context_mask[0, 77:].sum() == 77
    assert 77 < long.context_mask[0, 77:].sum() <= 154
    assert long.context.shape == (1, 231, 256)


def test_towers_move(text):
    tower = text.towers["t5"]
    assert Tower(tower.module, tower.state_mean, tower.state_std).width == 256
    assert text.to("cpu") is text
