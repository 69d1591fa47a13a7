"""The cache: the same batches as the live path, shared, rebuilt when anything that decides its content changes."""

import json
import threading

import numpy as np
import pytest
import torch

import mmdit.data.cache as room
from mmdit.config import EncodersConfig, ShapesConfig
from mmdit.data import make_dataset
from mmdit.data.cache import LiveBatches, precompute
from mmdit.data.order import data_order
from mmdit.encoders.text import load_run_text

INDICES = [5, 0, 11, 5, 3]


@pytest.fixture(scope="module")
def dataset():
    return make_dataset(ShapesConfig(num_images=12), "train")


def encoders(**changes):
    return EncodersConfig(t5_length=32, **changes)


@pytest.mark.parametrize("padding", ["trim", "mask", "attend"])
@pytest.mark.parametrize("kept", ["memory", "files"])
def test_cached_batches_equal_live_ones(dataset, vae, text, tmp_path, padding, kept):
    config = encoders(padding=padding)
    where = tmp_path if kept == "files" else None
    cached = precompute(dataset, vae, text, config, cache_dir=where, precision="fp32", progress=False)
    live = LiveBatches(dataset, vae, text, config, precision="fp32")
    assert len(cached) == len(live) == 12
    assert cached.latent_shape == live.latent_shape == (4, 8, 8)
    (latents, ours), (live_latents, theirs) = cached.batch(INDICES), live.batch(INDICES)
    torch.testing.assert_close(latents, live_latents, rtol=2e-3, atol=2e-3)
    assert ours.streams == theirs.streams
    assert ours.context.shape == theirs.context.shape
    torch.testing.assert_close(ours.pooled, theirs.pooled, rtol=2e-3, atol=2e-3)
    if padding == "attend":
        assert ours.context_mask is None
        assert theirs.context_mask is None
        torch.testing.assert_close(ours.context, theirs.context, rtol=2e-3, atol=4e-3)
    else:
        assert torch.equal(ours.context_mask, theirs.context_mask)
        real = ours.context_mask
        torch.testing.assert_close(ours.context[real], theirs.context[real], rtol=2e-3, atol=4e-3)
        assert not ours.context[~real].any()


def test_an_image_has_the_same_latents_in_every_batch(dataset, vae, text):
    cached = precompute(dataset, vae, text, encoders(), progress=False)
    alone, _ = cached.batch([7])
    among, _ = cached.batch([1, 7, 2])
    assert torch.equal(alone[0], among[1])


def test_captions_are_stored_once_and_trimmed(dataset, vae, text):
    class Repeating:
        fingerprint = "repeating"

        def __len__(self):
            return 12

        def pixels(self, indices):
            return dataset.pixels(indices)

        def captions(self, indices):
            return ["a red circle" if i % 2 else "a blue square above a red circle" for i in indices]

    cached = precompute(Repeating(), vae, text, encoders(), progress=False)
    assert list(cached.texts) == ["clip_l", "clip_g", "t5"]
    assert [len(arrays["states"]) for arrays in cached.texts.values()] == [2, 2, 2]
    assert all(a["states"].dtype == np.float16 for a in cached.texts.values())
    assert all(a["states"].shape[1] == a["real"].max() for a in cached.texts.values())
    assert cached.latents.dtype == np.float16
    _, short = cached.batch([1, 3])
    _, long = cached.batch([1, 2])
    assert short.context.shape[1] < long.context.shape[1]


def folders(path):
    return sorted(p for p in path.iterdir() if p.is_dir())


def encode_nothing(monkeypatch, *names):
    for name in names or ("_encode_images", "_encode_texts"):
        monkeypatch.setattr(room, name, lambda *a: pytest.fail("encoded again"))


def test_a_second_run_opens_the_cache_and_encodes_nothing(dataset, vae, text, tmp_path, monkeypatch):
    first = precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, progress=False)
    encode_nothing(monkeypatch)
    second = precompute(dataset, vae, text, encoders(padding="mask"), cache_dir=tmp_path, progress=False)
    assert torch.equal(first.batch(INDICES)[0], second.batch(INDICES)[0])


@pytest.mark.parametrize(
    ("change", "new"),
    [
        ({"padding": "attend"}, 3),  # each encoder's states
        ({"data": {"seed": 1}}, 4),
        ({"data": {"num_images": 11}}, 4),
        ({"precision": "bf16"}, 1),  # of the VAE
        ({"t5_length": 16}, 1),
    ],
    ids=str,
)
def test_whatever_decides_the_content_makes_another_cache_and_nothing_else_does(
    dataset, vae, text, tmp_path, change, new
):
    precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, precision="fp32", progress=False)
    assert len(folders(tmp_path)) == 4  # latents, CLIP-L, CLIP-G, T5
    other = make_dataset(ShapesConfig(**{"num_images": 12, **change.get("data", {})}), "train")
    config = EncodersConfig(t5_length=change.get("t5_length", 32), padding=change.get("padding", "trim"))
    if config.t5_length != 32:
        text = load_run_text(config)
    cached = precompute(
        other, vae, text, config, cache_dir=tmp_path, precision=change.get("precision", "fp32"), progress=False
    )
    assert len(folders(tmp_path)) == 4 + new
    live = LiveBatches(other, vae, text, config, precision=change.get("precision", "fp32"))
    ours, theirs = cached.batch(INDICES[:2])[1], live.batch(INDICES[:2])[1]
    assert ours.streams == theirs.streams
    torch.testing.assert_close(ours.context, theirs.context, rtol=2e-3, atol=4e-3)


AXES = [
    {"use": ["t5"]},
    {"use": ["clip_g"]},
    {"use": ["clip_l", "t5"], "pooled": "clip+t5"},
    {"use": []},
    {"pooled": "clip+t5", "pooled_at": "mean"},
    {"pooled": "none"},
    {"pooled_at": "mean"},
]


@pytest.mark.parametrize("padding", ["trim", "mask", "attend"])
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_text_axes_encode_nothing_anew_and_read_what_the_live_path_gives(
    dataset, vae, text, tmp_path_factory, monkeypatch, axes, padding
):
    shared = tmp_path_factory.getbasetemp() / f"axes-{padding}"
    precompute(dataset, vae, text, encoders(padding=padding), cache_dir=shared, precision="fp32", progress=False)
    config = encoders(padding=padding, **axes)
    under = text.under(config.use, config.pooled, config.pooled_at)
    encode_nothing(monkeypatch)
    cached = precompute(dataset, vae, under, config, cache_dir=shared, precision="fp32", progress=False)
    ours = cached.batch(INDICES)[1]
    theirs = LiveBatches(dataset, vae, under, config, precision="fp32").batch(INDICES)[1]
    assert ours.streams == theirs.streams
    torch.testing.assert_close(ours.context, theirs.context, rtol=2e-3, atol=4e-3)
    assert (ours.context_mask is None) == (padding == "attend") == (theirs.context_mask is None)
    if padding != "attend":
        assert torch.equal(ours.context_mask, theirs.context_mask)
    assert (ours.pooled is None) == (axes.get("pooled") == "none") == (theirs.pooled is None)
    if ours.pooled is not None:
        torch.testing.assert_close(ours.pooled, theirs.pooled, rtol=2e-3, atol=4e-3)


def test_other_weights_make_another_cache(dataset, vae, text, tmp_path):
    before = room.vae_fingerprint(vae)
    weight = next(vae.parameters())
    with torch.no_grad():
        weight[0, 0, 0, 0] += 1e-3
        changed = room.vae_fingerprint(vae)
        weight[0, 0, 0, 0] -= 1e-3
    assert changed != before


@pytest.mark.parametrize("damage", ["truncated", "no record", "other key"])
def test_a_damaged_cache_is_built_again(dataset, vae, text, tmp_path, damage):
    whole = precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, progress=False)
    expected = whole.batch(INDICES)[0].clone()
    folder = next(p for p in folders(tmp_path) if (p / "latents.npy").is_file())
    if damage == "truncated":
        content = (folder / "latents.npy").read_bytes()
        (folder / "latents.npy").unlink()
        (folder / "latents.npy").write_bytes(content[:-10])
    elif damage == "no record":
        (folder / "cache.json").unlink()
    else:
        record = json.loads((folder / "cache.json").read_text())
        record["key"]["data"] = "something else"
        (folder / "cache.json").write_text(json.dumps(record))
    again = precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, progress=False)
    assert torch.equal(again.batch(INDICES)[0], expected)


def test_two_at_once_build_one_cache(dataset, vae, text, tmp_path, monkeypatch):
    built, images, texts = [], room._encode_images, room._encode_texts

    def encode_images(*args):
        built.append("images")
        return images(*args)

    def encode_texts(*args):
        built.append(args[1])
        return texts(*args)

    monkeypatch.setattr(room, "_encode_images", encode_images)
    monkeypatch.setattr(room, "_encode_texts", encode_texts)
    work = lambda: precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, progress=False)  # noqa: E731
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(built) == ["clip_g", "clip_l", "images", "t5"]


def test_an_interrupted_build_leaves_nothing_that_counts(dataset, vae, text, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def dying(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(room, "_encode_texts", dying)
        with pytest.raises(Killed):
            precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, progress=False)
    (whole,) = folders(tmp_path)
    assert (whole / "cache.json").is_file()  # the latents were finished and need not be encoded again
    encode_nothing(monkeypatch, "_encode_images")
    assert len(precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, progress=False)) == 12


def test_what_a_killed_build_left_is_swept(dataset, vae, text, tmp_path):
    precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, progress=False)
    before = folders(tmp_path)
    (before[0] / "cache.json").unlink()
    (tmp_path / f".tmp-{before[0].name}-0123").mkdir()
    precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, progress=False)
    assert folders(tmp_path) == before


def test_encoders_of_another_length_are_refused(dataset, vae, text):
    with pytest.raises(ValueError, match="t5_length 32, the config says 77"):
        precompute(dataset, vae, text, EncodersConfig(), progress=False)


def test_each_epoch_is_its_own_permutation():
    epochs = data_order(3, 10, np.arange(30)).reshape(3, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert np.array_equal(data_order(3, 10, [25, 4, 11]), epochs.reshape(-1)[[25, 4, 11]])
    assert not np.array_equal(data_order(4, 10, np.arange(10)), epochs[0])
    with pytest.raises(ValueError, match="empty"):
        data_order(0, 0, [0])
