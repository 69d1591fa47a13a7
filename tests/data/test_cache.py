"""The cache: the same batches as the live path, shared, rebuilt when anything that decides its content changes."""

import json
import re
import threading
import time

import numpy as np
import pytest
import torch

import mmdit.data.cache as room
from mmdit.config import ConfigError, EncodersConfig, ShapesConfig
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
    assert [len(rows) for rows in cached.texts.values()] == [2, 2, 2]
    for rows in cached.texts.values():
        (arrays,) = rows.parts
        assert arrays["states"].dtype == np.float16
        assert len(arrays["states"]) == arrays["real"].sum()  # real tokens and no padding
    assert cached.images.parts[0]["latents"].dtype == np.float16
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
        ({"data": {"seed": 1}}, 5),
        ({"data": {"num_images": 11}}, 5),
        ({"posterior": "sample"}, 1),
        ({"precision": "bf16"}, 1),  # of the VAE
        ({"t5_length": 16}, 1),
    ],
    ids=str,
)
def test_whatever_decides_the_content_makes_another_cache_and_nothing_else_does(
    dataset, vae, text, tmp_path, change, new
):
    precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, precision="fp32", progress=False)
    assert len(folders(tmp_path)) == 5  # captions, latents, CLIP-L, CLIP-G, T5
    other = make_dataset(ShapesConfig(**{"num_images": 12, **change.get("data", {})}), "train")
    named = {key: change[key] for key in ("padding", "posterior") if key in change}
    config = EncodersConfig(t5_length=change.get("t5_length", 32), **named)
    if config.t5_length != 32:
        text = load_run_text(config)
    cached = precompute(
        other, vae, text, config, cache_dir=tmp_path, precision=change.get("precision", "fp32"), progress=False
    )
    assert len(folders(tmp_path)) == 5 + new
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


def store_of(path, array):
    """The folder that holds an array of this name."""
    return next(p for p in folders(path) if (p / f"00000.{array}.npy").is_file())


@pytest.mark.parametrize("damage", ["truncated", "one bit", "no record", "torn record", "other key"])
def test_a_damaged_part_is_encoded_anew_and_said(dataset, vae, text, tmp_path, damage, capsys):
    whole = precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, progress=False)
    expected = whole.batch(INDICES)[0].clone()
    folder = store_of(tmp_path, "latents")
    array, record = folder / "00000.latents.npy", folder / "00000.json"
    if damage in ("truncated", "one bit"):
        content = bytearray(array.read_bytes())
        content[-5] ^= 1
        array.unlink()  # the first cache still has it mapped
        array.write_bytes(content[:-10] if damage == "truncated" else content)
    elif damage == "no record":
        record.unlink()
    elif damage == "torn record":
        record.write_text(record.read_text()[:20])
    else:
        head = json.loads((folder / "parts.json").read_text())
        head["key"]["data"] = "something else"
        (folder / "parts.json").write_text(json.dumps(head))
    again = precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, progress=True)
    assert torch.equal(again.batch(INDICES)[0], expected)
    said = {"truncated": "another size", "one bit": "SHA-256 differs", "torn record": "damaged record"}
    assert said.get(damage, "") in capsys.readouterr().out


def test_verification_can_be_left_out(dataset, vae, text, tmp_path, monkeypatch):
    precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, progress=False)
    monkeypatch.setattr(room.parts, "_sha256", lambda path: pytest.fail("was read"))
    precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, progress=False, verify=False)


def test_a_cache_in_many_parts_gives_the_batches_of_one(dataset, vae, text, tmp_path, monkeypatch):
    for padding in ("trim", "attend"):
        one = precompute(dataset, vae, text, encoders(padding=padding), precision="fp32", progress=False)
        with monkeypatch.context() as patch:
            patch.setattr(room, "PART_IMAGES", 5)
            patch.setattr(room, "PART_CAPTIONS", 4)
            many = precompute(
                dataset, vae, text, encoders(padding=padding), cache_dir=tmp_path, precision="fp32", progress=False
            )
        assert len(many.images.parts) == 3
        assert all(len(rows.parts) == 3 for rows in many.texts.values())
        for indices in (INDICES, [11], list(range(12))):
            (latents, ours), (whole, theirs) = many.batch(indices), one.batch(indices)
            torch.testing.assert_close(latents, whole, rtol=0, atol=1e-5)
            torch.testing.assert_close(ours.context, theirs.context, rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(ours.pooled, theirs.pooled, rtol=2e-3, atol=2e-3)
            assert (ours.context_mask is None) or torch.equal(ours.context_mask, theirs.context_mask)


def test_two_at_once_share_the_parts(dataset, vae, text, tmp_path, monkeypatch):
    built, original = [], room._encode_images

    def encode_images(dataset, vae, rows, *rest):
        built.append((threading.current_thread().name, int(rows[0])))
        time.sleep(0.2)
        return original(dataset, vae, rows, *rest)

    monkeypatch.setattr(room, "_encode_images", encode_images)
    monkeypatch.setattr(room, "PART_IMAGES", 2)
    work = lambda: precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, progress=False)  # noqa: E731
    threads = [threading.Thread(target=work, name=str(i)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(part for _, part in built) == [0, 2, 4, 6, 8, 10]  # each once
    assert {name for name, _ in built} == {"0", "1"}


def test_a_killed_build_costs_the_part_it_was_at(dataset, vae, text, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    monkeypatch.setattr(room, "PART_IMAGES", 4)
    original, built = room._encode_images, []

    def encode_images(dataset, vae, rows, *rest):
        built.append(int(rows[0]))
        if len(built) == 2:
            raise Killed
        return original(dataset, vae, rows, *rest)

    monkeypatch.setattr(room, "_encode_images", encode_images)
    with pytest.raises(Killed):
        precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, progress=False)
    assert len(precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, progress=False)) == 12
    assert built == [0, 4, 4, 8]


def test_what_it_takes_is_said_before_and_refused_where_there_is_no_room(
    dataset, vae, text, tmp_path, monkeypatch, capsys
):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(room.shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, 1000))
        encode_nothing(patch)
        with pytest.raises(ConfigError, match=r"the cache needs 0\.00 GiB.*choose another train\.cache_dir"):
            precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, progress=True)
    told = dict(re.findall(r"to encode: (.*), ([\d.]+) MiB", capsys.readouterr().out))
    assert list(told) == [
        "12 images to latents of (4, 8, 8)",
        *(f"12 captions by {n}" for n in ("clip_l", "clip_g", "t5")),
    ]
    precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, progress=False)
    taken = [p.stat().st_size for array in ("latents", "states") for p in tmp_path.glob(f"*/*.{array}.npy")]
    assert sum(float(size) for size in told.values()) == pytest.approx(sum(taken) / 2**20, abs=0.2)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"t5_length": 16}, "t5 was made with another length"), ({"precision": "bf16"}, "another precision"),
     ({"padding": "attend"}, "made with another padding"), ({"seed": 1}, "another data")],
    ids=str,
)  # fmt: skip
def test_a_required_cache_of_other_settings_is_refused_by_name(
    dataset, vae, text, tmp_path, monkeypatch, change, words
):
    precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, precision="fp32", progress=False)
    encode_nothing(monkeypatch)
    precompute(dataset, vae, text, encoders(), cache_dir=tmp_path, precision="fp32", progress=False, require=True)
    other = make_dataset(ShapesConfig(num_images=12, seed=change.get("seed", 0)), "train")
    config = EncodersConfig(t5_length=change.get("t5_length", 32), padding=change.get("padding", "trim"))
    text = load_run_text(config) if config.t5_length != 32 else text
    with pytest.raises(ConfigError, match=words):
        precompute(
            other, vae, text, config, cache_dir=tmp_path, precision=change.get("precision", "fp32"), progress=False,
            require=True,
        )  # fmt: skip


def test_latents_drawn_from_the_posterior_have_its_mean_and_deviation(dataset, vae, text, tmp_path):
    from mmdit.encoders.vae import to_pixels

    config = encoders(posterior="sample")
    cached = precompute(dataset, vae, text, config, cache_dir=tmp_path, precision="fp32", progress=False)
    live = LiveBatches(dataset, vae, text, config, precision="fp32")
    noise = np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float32)
    with torch.no_grad():
        exact = vae.encode(to_pixels(dataset.pixels([2, 5, 9])), torch.from_numpy(noise))
    for source in (cached, live):
        drawn, _ = source.batch([2, 5, 9], lambda shape: noise)
        torch.testing.assert_close(drawn, exact, rtol=2e-3, atol=2e-3)
        mean, _ = source.batch([2, 5, 9])
        assert not torch.allclose(drawn, mean, atol=1e-2)


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
