"""Contracts of every extractor that needs weights, their files, hashes and errors."""

import json
import logging

import numpy as np
import pytest
import torch
from mmdit_eval import extractor_weights
from mmdit_eval.extractor_weights import KNOWN, find_weights, hash_weights, read_tensors
from mmdit_eval.features import EXTRACTORS, extract, load_extractor
from mmdit_eval.towers import resample_positions

CAPTIONS = ["a red circle", "a blue square left of a green star"]


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (3, 72, 56, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with small random networks of every family."""
    import open_clip
    import timm
    from safetensors.torch import save_file
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("towers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = timm.create_model("vit_small_patch14_dinov2", img_size=518, num_classes=0)
        state = {"mask_token": torch.zeros(1, 384), **vit.state_dict()}
        for key in state:
            if key.endswith("gamma"):  # at initialisation 1e-5, which hides the blocks
                state[key] = torch.ones_like(state[key])
        state["pos_embed"] = torch.randn_like(state["pos_embed"])
        torch.save(state, folder / "dinov2_vits14_pretrain.pth")
        save_file(timm.create_model("test_vit").state_dict(), folder / "test_vit.safetensors")
        tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = CLIPConfig(
            text_config={**tower, "eos_token_id": 49407},
            vision_config={**tower, "image_size": 32, "patch_size": 8},
            projection_dim=24,
        )
        CLIPModel(config).save_pretrained(folder / "clip")
        torch.save(open_clip.create_model("ViT-S-32-alt").state_dict(), folder / "openclip.pt")
    return folder


@pytest.fixture
def build(weights, inception_file, monkeypatch):
    """A function of a table key giving that extractor."""
    monkeypatch.setenv("MMDIT_EVAL_WEIGHTS", str(weights))
    names = {
        "timm:": "timm:test_vit",
        "clip:": f"clip:{weights / 'clip'}",
        "openclip:": f"openclip:ViT-S-32-alt@{weights / 'openclip.pt'}",
        "inception_fid": f"inception_fid@{inception_file}",
        "inception_clean": f"inception_clean@{inception_file}",
    }
    return lambda key: load_extractor(names.get(key, key))


@pytest.mark.parametrize("key", [key for key in EXTRACTORS if key not in ("dinov2_vitb14", "dinov2_vitl14")])
def test_an_extractor_gives_its_width_whatever_the_batch_and_the_sizes(key, build, images):
    extractor = build(key)
    features = extract(extractor, images)
    assert features.shape == (3, extractor.width)
    assert np.isfinite(features).all()
    assert features.std(0).max() > 0
    assert extract(extractor, images, batch_size=2) == pytest.approx(features, rel=1e-5, abs=1e-5)
    mixed = extractor([images[0], images[1, :40, :48], images[2]])[:, : extractor.width].numpy()
    assert mixed[[0, 2]] == pytest.approx(features[[0, 2]], rel=1e-5, abs=1e-5)
    assert len(extractor.hash) == 16
    assert build(key).hash == extractor.hash
    if extractor.text is not None:
        assert extractor.text.lengths(["a red circle", "red " * 200]) == [5, 202]
        text = extractor.text.embed(CAPTIONS)
        assert text.shape == extractor.text.image_embeds(torch.from_numpy(features[:2]).float()).shape
        assert not torch.allclose(text[0], text[1])


def test_dinov2_equals_transformers_implementation(weights, images):
    from transformers import Dinov2Config, Dinov2Model

    state = torch.load(weights / "dinov2_vits14_pretrain.pth", weights_only=True)
    extractor = load_extractor("dinov2_vits14", weights=str(weights))
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4, image_size=224, patch_size=14
    )
    theirs = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.mask_token": state["mask_token"],
        "embeddings.position_embeddings": resample_positions(state["pos_embed"], 16),
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    for i in range(12):
        for part in ("weight", "bias"):
            for name, tensor in zip(
                ("q_proj", "k_proj", "v_proj"), state[f"blocks.{i}.attn.qkv.{part}"].chunk(3), strict=True
            ):
                theirs[f"encoder.layer.{i}.attention.{name}.{part}"] = tensor
            theirs[f"encoder.layer.{i}.attention.o_proj.{part}"] = state[f"blocks.{i}.attn.proj.{part}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                theirs[f"encoder.layer.{i}.{name}.{part}"] = state[f"blocks.{i}.{name}.{part}"]
        for j in (1, 2):
            theirs[f"encoder.layer.{i}.layer_scale{j}.lambda1"] = state[f"blocks.{i}.ls{j}.gamma"]
    model = Dinov2Model(config).eval()
    if "encoder.layer.0.attention.q_proj.weight" not in model.state_dict():  # an older transformers
        former = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
        former["o_proj"] = "output.dense"
        for new, old in former.items():
            theirs = {key.replace(f"attention.{new}", f"attention.{old}"): value for key, value in theirs.items()}
    model.load_state_dict(theirs)
    with torch.no_grad():
        expected = model(pixel_values=extractor.prepare(images)).pooler_output
    assert float((extractor(images) - expected).norm() / expected.norm()) < 1e-5


def test_dinov2s_positions_are_resampled_as_its_release_does():
    table = torch.randn(1, 1 + 37 * 37, 8, generator=torch.Generator().manual_seed(0))
    found = resample_positions(table, 16)
    assert found.shape == (1, 257, 8)
    assert torch.equal(found[:, 0], table[:, 0])
    grid = table[:, 1:].reshape(1, 37, 37, 8).permute(0, 3, 1, 2)
    # the cubic kernel (a = -0.75) by hand, at the place of patch (5, 9): scale (16 + 0.1) / 37
    step = 37 / 16.1

    def taps(place):
        source = (place + 0.5) * step - 0.5
        first, share = int(np.floor(source)), source - np.floor(source)
        x = np.array([1 + share, share, 1 - share, 2 - share])
        near, far = (1.25 * x - 2.25) * x * x + 1, ((-0.75 * x + 3.75) * x - 6) * x + 3
        return range(first - 1, first + 3), np.where(x <= 1, near, far)

    rows, columns = taps(5), taps(9)
    expected = sum(
        a * b * grid[0, :, i, j].double() for i, a in zip(*rows, strict=True) for j, b in zip(*columns, strict=True)
    )
    assert found[0, 1 + 5 * 16 + 9].double() == pytest.approx(expected, abs=1e-5)
    assert resample_positions(found, 16) is found


@pytest.mark.parametrize("name", ["dinov2_vitb14", "dinov2_vitl14"])
def test_the_large_dinov2_networks_exist_in_timm_with_the_widths_of_the_release(name):
    import timm
    from mmdit_eval.towers import _TIMM_NAMES

    with torch.device("meta"):
        model = timm.create_model(_TIMM_NAMES[name], num_classes=0, img_size=224)
    assert model.num_features == {"dinov2_vitb14": 768, "dinov2_vitl14": 1024}[name]
    assert len(KNOWN[name].sha256) == 64


def test_clip_equals_transformers_own_preprocessing_and_embeddings(weights, images):
    from transformers import CLIPImageProcessorPil, CLIPModel

    from mmdit.encoders.tokenizers import ClipTokenizer

    extractor = load_extractor(f"clip:{weights / 'clip'}")
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = processor(list(images), return_tensors="pt")["pixel_values"]
    assert extractor.prepare(images) == pytest.approx(pixels, abs=1e-6)
    model = CLIPModel.from_pretrained(weights / "clip", dtype=torch.float32).eval()
    ids = ClipTokenizer()(CAPTIONS)
    length = max(map(len, ids))
    padded = torch.tensor([row + [49407] * (length - len(row)) for row in ids])
    with torch.no_grad():
        whole = model(input_ids=padded, pixel_values=pixels)
    image, text = extractor(images), extractor.text.embed(CAPTIONS)
    assert torch.nn.functional.normalize(image) == pytest.approx(whole.image_embeds, abs=1e-5)
    assert torch.nn.functional.normalize(text) == pytest.approx(whole.text_embeds, abs=1e-5)


def test_missing_weights_are_named_with_hash_place_and_what_works_without(tmp_path, monkeypatch):
    monkeypatch.setattr(extractor_weights, "hub_folder", lambda: tmp_path / "hub")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MMDIT_EVAL_WEIGHTS", raising=False)
    with pytest.raises(FileNotFoundError) as error:
        load_extractor("inception_fid")
    for part in ("weights-inception-2015-12-05-6726825d.pth", "95,628,359 bytes", "SHA-256 6726825d0af5f729",
                 str(tmp_path / "cache" / "mmdit-lab" / "weights"), "--extractor-weights", "'tiny_clip'"):  # fmt: skip
        assert part in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"test_vit\.safetensors"):
        load_extractor("timm:test_vit")
    with pytest.raises(FileNotFoundError, match=r"no CLIP in .* Works without: the extractor 'tiny_clip'"):
        load_extractor(f"clip:{tmp_path}")


def test_unknown_names_get_the_nearest_one():
    with pytest.raises(ValueError, match="did you mean 'inception_fid'"):
        load_extractor("inceptionfid")
    with pytest.raises(ValueError, match="did you mean 'test_vit"):
        load_extractor("timm:test_vitt")
    with pytest.raises(ValueError, match="did you mean 'ViT-B-32"):
        load_extractor("openclip:ViTB32")
    with pytest.raises(ValueError, match="must follow the colon"):
        load_extractor("timm:")


def test_tokenizers_of_other_libraries_count_their_own_marks():
    """Those of SigLIP and of multilingual models have no `encode`."""
    from types import SimpleNamespace

    from mmdit_eval.towers import openclip_lengths

    def wrapped(text):
        return SimpleNamespace(input_ids=[*text.split(), "end"])

    cleaning = SimpleNamespace(tokenizer=wrapped, clean_fn=lambda text: text.replace("-", " "))
    assert openclip_lengths(cleaning, ["a red-circle", "x"]) == [4, 2]
    assert openclip_lengths(SimpleNamespace(tokenizer=wrapped), ["a red-circle"]) == [3]
    assert openclip_lengths(SimpleNamespace(encode=list), ["abc"]) == [5]


def test_weights_are_found_by_file_folder_variable_and_in_safetensors(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    tensors = {"a": torch.randn(3, 4), "b": torch.ones(2)}
    known = extractor_weights.KnownFile(("net.pth",), "0" * 64, 0, "nowhere")
    torch.save({"state_dict": tensors}, tmp_path / "net.pth")
    monkeypatch.setenv("MMDIT_EVAL_WEIGHTS", str(tmp_path))
    assert find_weights("x", known) == find_weights("x", known, tmp_path) == tmp_path / "net.pth"
    first = hash_weights(tmp_path / "net.pth", read_tensors(tmp_path / "net.pth"))
    (tmp_path / "net.pth").unlink()
    save_file(tensors, tmp_path / "net.safetensors")
    assert find_weights("x", known) == tmp_path / "net.safetensors"
    assert hash_weights(tmp_path / "net.safetensors", read_tensors(tmp_path / "net.safetensors")) == first


def test_the_hash_is_kept_beside_the_file_until_the_file_changes(tmp_path, monkeypatch, caplog):
    path = tmp_path / "net.pth"
    known = extractor_weights.KnownFile(("net.pth",), "0" * 64, 0, "nowhere")
    torch.save({"a": torch.ones(3)}, path)
    with caplog.at_level(logging.WARNING):
        first = hash_weights(path, read_tensors(path), known)
    assert "do not compare with published ones" in caplog.text
    kept = json.loads((tmp_path / "net.pth.hash.json").read_text())
    assert kept["tensors"] == first
    monkeypatch.setattr(extractor_weights, "hash_tensors", lambda tensors: "again")
    assert hash_weights(path, {}, known) == first
    torch.save({"a": torch.ones(4)}, path)
    assert hash_weights(path, {}, known) == "again"
    (tmp_path / "net.pth.hash.json").write_text("{ half")
    assert hash_weights(path, {}, known) == "again"


def test_pickles_that_run_code_and_files_without_tensors_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "bad.safetensors").write_bytes(b"12345678abcdef")
    for name, message in (
        ("evil.pth", "cannot be read as weights"),
        ("list.pth", "holds a list, not a dictionary of tensors"),
        ("bad.safetensors", "cannot be read as safetensors"),
    ):
        with pytest.raises(ValueError, match=message):
            read_tensors(tmp_path / name)


def test_weights_of_another_network_are_refused_by_every_family(weights, inception_file):
    for name in ("dinov2_vits14", "timm:test_vit", "openclip:ViT-S-32-alt"):
        with pytest.raises(ValueError, match="not the weights of"):
            load_extractor(name, weights=str(inception_file))
