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
    assert [len(stream.states) for stream in cached.streams] == [2, 2]
    assert all(s.states.dtype == np.float16 and s.states.shape[1] == s.lengths.max() for s in cached.streams)
    assert cached.latents.dtype == np.float16
    _, short = cached.batch([1, 3])
    _, long = cached.batch([1, 2])
    assert short.context.shape[1] < long.context.shape[1]


def test_a_second_run_opens_the_cache_and_encodes_nothing(dataset, vae, text, tmp_path, monkeypatch):
    first = precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, progress=False)
    monkeypatch.setattr(room, "_encode", lambda *a: pytest.fail("encoded again"))
    second = precompute(dataset, vae, text, encoders(padding="mask"), cache_dir=tmp_path, progress=False)
    assert torch.equal(first.batch(INDICES)[0], second.batch(INDICES)[0])


@pytest.mark.parametrize(
    "change",
    [{"padding": "attend"}, {"data": {"seed": 1}}, {"data": {"num_images": 11}}, {"precision": "bf16"}],
    ids=str,
)
def test_whatever_decides_the_content_makes_another_cache(dataset, vae, text, tmp_path, change):
    precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, precision="fp32", progress=False)
    other = make_dataset(ShapesConfig(**{"num_images": 12, **change.get("data", {})}), "train")
    padding = change.get("padding", "trim")
    precision = change.get("precision", "fp32")
    precompute(other, vae, text, encoders(padding=padding), cache_dir=tmp_path, precision=precision, progress=False)
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 2


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
    folder = next(p for p in tmp_path.iterdir() if p.is_dir())
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
    built, original = [], room._encode

    def encode(*args):
        built.append(1)
        return original(*args)

    monkeypatch.setattr(room, "_encode", encode)
    work = lambda: precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, progress=False)  # noqa: E731
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_an_interrupted_build_leaves_nothing_that_counts(dataset, vae, text, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def dying(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(room, "_encode_captions", dying)
        with pytest.raises(Killed):
            precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, progress=False)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    assert len(precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, progress=False)) == 12


def test_what_a_killed_build_left_is_swept(dataset, vae, text, tmp_path):
    precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, progress=False)
    folder = next(p for p in tmp_path.iterdir() if p.is_dir())
    (folder / "cache.json").unlink()
    (tmp_path / f".tmp-{folder.name}-0123").mkdir()
    precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, progress=False)
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == [folder]


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
