"""Text encoders go back into every released layout bit for bit, and transformers reads what we write."""

import pytest
import torch
from safetensors.torch import load_file

from mmdit.encoders.saving import save_text_encoders
from mmdit.encoders.text import load_text_encoders
from mmdit.encoders.tokenizers import TINY
from tests.weights import tiny_text as tiny

PROMPTS = ["a photo of a cat!", "", "Tom &amp; Jerry"]
FAMILIES = ("sd3", "sd1.5", "sdxl")
OPTIONS = {
    "sd3": {**tiny.WIDTHS, "tokenizers": TINY / "spiece.model"},
    "sdxl": tiny.WIDTHS,
    "sd1.5": {"clip_l": {"num_heads": 1}},
}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """{family: (all-in-one file made by hand, the encoders loaded from it)}."""
    found = {}
    for family in FAMILIES:
        path = tiny.write_original(tmp_path_factory.mktemp("release"), family, tiny.build(family))
        found[family] = path, load_text_encoders(path, **OPTIONS[family])
    return found


def encode(text):
    return text.encode(PROMPTS, sizes=torch.ones(1, 6) if text.family == "sdxl" else None)


def assert_same(ours, theirs):
    a, b = encode(ours), encode(theirs)
    assert torch.equal(a.context, b.context)
    assert (a.pooled is None and b.pooled is None) or torch.equal(a.pooled, b.pooled)
    assert ours.family == theirs.family


@pytest.mark.parametrize("family", FAMILIES)
def test_the_original_layout_comes_back_bit_for_bit(released, tmp_path, family):
    path, text = released[family]
    save_text_encoders(text, tmp_path / "again.safetensors")
    first, again = load_file(path), load_file(tmp_path / "again.safetensors")
    beside = ("position_ids", "logit_scale", "model.diffusion_model.other")
    first = {key: tensor for key, tensor in first.items() if not key.endswith(beside)}
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], first[key]) for key in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_through_diffusers_folders_and_back_nothing_changes(released, tmp_path, family):
    _, text = released[family]
    save_text_encoders(text, tmp_path / "folder", "diffusers", shard_size="300KB")
    loaded = load_text_encoders(tmp_path / "folder")  # heads, tokenizers and family: all in the folder
    assert_same(loaded, text)
    save_text_encoders(loaded, tmp_path / "a.safetensors")
    save_text_encoders(text, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_transformers_reads_our_folders(released, tmp_path):
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel
    from transformers import T5Tokenizer as Reference

    _, text = released["sd3"]
    save_text_encoders(text, tmp_path, "diffusers")
    for folder, kind in (
        ("text_encoder", CLIPTextModelWithProjection),
        ("text_encoder_2", CLIPTextModelWithProjection),
    ):
        module, info = kind.from_pretrained(str(tmp_path / folder), output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        ids = text.tokenize(PROMPTS)["clip_l" if folder == "text_encoder" else "clip_g"]
        pooled = encode(text).pooled
        part = pooled[:, :64] if folder == "text_encoder" else pooled[:, 64:]
        with torch.no_grad():
            torch.testing.assert_close(module.eval()(ids).text_embeds, part, atol=1e-5, rtol=0)
    module, info = T5EncoderModel.from_pretrained(str(tmp_path / "text_encoder_3"), output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        states = module.eval()(text.tokenize(PROMPTS)["t5"]).last_hidden_state
    torch.testing.assert_close(states, encode(text).context[:, 77:], atol=1e-5, rtol=0)
    clip = CLIPTokenizer.from_pretrained(str(tmp_path / "tokenizer"))
    assert clip("a cat", padding="max_length")["input_ids"] == text.tokenize(["a cat"])["clip_l"][0].tolist()
    second = CLIPTokenizer.from_pretrained(str(tmp_path / "tokenizer_2"))
    assert second("a cat", padding="max_length")["input_ids"] == text.tokenize(["a cat"])["clip_g"][0].tolist()
    third = Reference.from_pretrained(str(tmp_path / "tokenizer_3"))
    assert (
        third("a cat", padding="max_length", max_length=77)["input_ids"] == text.tokenize(["a cat"])["t5"][0].tolist()
    )
    assert {file.name for file in (tmp_path / "tokenizer").iterdir()} >= {"vocab.json", "merges.txt", "tokenizer.json"}


def test_separate_files_are_sd3s(released, tmp_path):
    _, text = released["sd3"]
    files = save_text_encoders(text, tmp_path / "text_encoders")
    assert [file.name for file in files] == ["clip_l.safetensors", "clip_g.safetensors", "t5xxl.safetensors"]
    assert_same(load_text_encoders(tmp_path, **OPTIONS["sd3"]), text)
    assert {"shared.weight", "encoder.embed_tokens.weight"} <= load_file(files[2]).keys()
    with pytest.raises(ValueError, match=r"not released in separate files"):
        save_text_encoders(released["sdxl"][1], tmp_path / "other")


def test_a_dtype_is_converted_once(released, tmp_path):
    path, text = released["sd3"]
    save_text_encoders(text, tmp_path / "half.safetensors", dtype=torch.bfloat16)
    first, half = load_file(path), load_file(tmp_path / "half.safetensors")
    assert all(torch.equal(tensor, first[key].bfloat16()) for key, tensor in half.items())


def test_what_no_layout_can_say_is_refused(tmp_path):
    with pytest.raises(ValueError, match="standardised"):
        save_text_encoders(load_text_encoders("tiny"), tmp_path / "x.safetensors")
    modules = tiny.build("sd3")
    with torch.no_grad():
        modules["clip_l"].text_projection.weight.normal_()
    tiny.write_diffusers(tmp_path / "folder", modules)
    text = load_text_encoders(tmp_path / "folder")
    with pytest.raises(ValueError, match=r"not the identity.*layout='diffusers'"):
        save_text_encoders(text, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="did you mean 'original'"):
        save_text_encoders(text, tmp_path / "x.safetensors", "orginal")
    assert not (tmp_path / "x.safetensors").exists()
