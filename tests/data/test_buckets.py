"""Aspect-ratio buckets: who goes where, in which order, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from mmdit.config import ConfigError, ImagesConfig
from mmdit.data import make_dataset
from mmdit.data.buckets import bucket_order, bucket_sizes, nearest_bucket
from mmdit.train.tracking import read_metrics
from mmdit.train.trainer import train
from mmdit.train.validation import shares


def test_sizes_have_about_one_area_and_sides_of_whole_steps():
    sizes = bucket_sizes(1024, 64)
    assert (1024, 1024) in sizes
    assert {(768, 1344), (1344, 768), (832, 1216), (1216, 832), (896, 1152)} <= set(sizes)  # SDXL's, its appendix I
    for height, width in sizes:
        assert height % 64 == width % 64 == 0
        assert 0.8 * 1024**2 < height * width <= 1024**2
        assert max(height / width, width / height) <= 2


def test_a_picture_goes_to_the_nearest_ratio():
    sizes = [(64, 64), (64, 96), (96, 64)]
    assert nearest_bucket(100, 100, sizes) == 0
    assert nearest_bucket(300, 200, sizes) == 1
    assert nearest_bucket(200, 300, sizes) == 2
    assert nearest_bucket(1225, 1000, sizes) == 1  # the border is the geometric mean of the ratios, 1.2247
    assert nearest_bucket(1224, 1000, sizes) == 0


def test_every_batch_lies_in_one_bucket_and_an_epoch_repeats_nothing():
    counts, batch = [17, 0, 8, 40], 8
    per_epoch = (17 // 8 + 1 + 5) * 8
    stream = bucket_order(3, counts, batch, np.arange(4 * per_epoch))
    starts = np.cumsum([0, *counts])
    buckets = np.searchsorted(starts, stream, side="right") - 1
    assert (buckets.reshape(-1, batch) == buckets.reshape(-1, batch)[:, :1]).all()
    for epoch in stream.reshape(4, per_epoch):
        assert len(set(epoch.tolist())) == per_epoch
    assert set(stream.tolist()) == set(range(65))  # over epochs everybody has a turn
    # a position's item does not depend on which positions are asked for with it, so any process may ask for its share
    picked = np.array([5, 77, 130, 11])
    assert np.array_equal(bucket_order(3, counts, batch, picked), stream[picked])
    assert not np.array_equal(bucket_order(4, counts, batch, np.arange(64)), stream[:64])


def test_a_bucket_smaller_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="bucket 1 has 3, less than a batch of 8"):
        bucket_order(0, [16, 3], 8, [0])


def test_all_processes_make_equally_many_forwards_and_count_every_item_once():
    class Source:
        groups = [np.arange(0, 5), np.arange(5, 18)]  # noqa: RUF012

    for world in (1, 2, 3, 4):
        found = [list(shares(Source(), 4, rank, world)) for rank in range(world)]
        assert len({len(rounds) for rounds in found}) == 1
        counted = np.concatenate([indices for rounds in found for indices, counts in rounds if counts])
        assert sorted(counted.tolist()) == list(range(18))
        for rounds in found:
            assert all(len({bool(i < 5) for i in indices}) == 1 for indices, _ in rounds)


@pytest.fixture
def pictures(tmp_path):
    """24 pictures of three shapes, each with a grey of its own and one broken caption."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for i in range(24):
        size = [(96, 96), (144, 96), (96, 150)][i % 3]
        Image.new("RGB", size, (10 * i, 255 - 10 * i, 80)).save(folder / f"{i:02d}.png")
        lines.append(json.dumps({"file_name": f"{i:02d}.png", "text": f"colour {i} &amp; more"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def images(pictures, **changes):
    given = {"source": str(pictures), "resolution": 64, "val_fraction": 0.0, **changes}
    return ImagesConfig(**given)


def test_a_view_holds_the_pictures_of_its_ratio_whole(pictures):
    dataset = make_dataset(images(pictures, buckets=((64, 64), (64, 96), (96, 64), (32, 96))))
    views = dataset.by_bucket()
    assert [(view.size, len(view)) for view in views] == [((64, 64), 8), ((64, 96), 8), ((96, 64), 8)]
    for view in views:
        assert view.pixels([0, 7]).shape == (2, *view.size, 3)
        numbers = [int(caption.split()[1]) for caption in view.captions(range(8))]
        for pixels, number in zip(view.pixels(range(8)), numbers, strict=True):
            assert (pixels == np.array([10 * number, 255 - 10 * number, 80])).all()
    assert len({view.fingerprint for view in views}) == 3
    assert views[0].captions([0]) == ["colour 0 & more"]
    raw = make_dataset(images(pictures, clean_captions=False))
    assert raw.captions([0]) == ["colour 0 &amp; more"]


BUCKETS = {"buckets": [[64, 64], [64, 96], [96, 64]]}


def bucketed(micro, pictures, changes=None, **data):
    tree = {"name": "images", "source": str(pictures), "resolution": 64, "val_fraction": 0.3, **BUCKETS, **data}
    train_tree = {"batch_size": 4, "images": 24, "warmup_images": 4, "val_images": 6, "validate_every": 8}
    from mmdit.config import load_config, merge, to_tree

    base = {**to_tree(micro()), "data": tree}
    return load_config(None, merge(merge(base, {"train": train_tree}), changes or {}))


@pytest.mark.parametrize("precompute", [True, False])
def test_a_run_on_buckets_trains_validates_and_goes_on_to_the_same_bits(tmp_path, micro, pictures, precompute):
    import torch

    from mmdit.checkpoint import latest_checkpoint, load_checkpoint

    base = {"train": {"precompute": precompute, "lr_schedule": "constant", "checkpoint_every": 8}}
    assert train(bucketed(micro, pictures, base), tmp_path / "whole", progress=False).complete
    for count in (12, 24):
        short = {"train": {**base["train"], "images": count}}
        train(bucketed(micro, pictures, short), tmp_path / "legs", progress=False)
    a, b = (load_checkpoint(latest_checkpoint(tmp_path / n)).tensors["model"] for n in ("whole", "legs"))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    validation = [r for r in read_metrics(tmp_path / "whole" / "metrics.jsonl") if r["kind"] == "validation"]
    assert [r["images_seen"] for r in validation] == [8, 16, 24]


def test_buckets_that_cannot_work_are_refused_before_anything_is_encoded(tmp_path, micro, pictures):
    for data, message in (
        ({"buckets": [[64, 64], [40, 96]]}, r"40x96: sides must be multiples of 16"),
        ({"buckets": [[64, 64], [64, 256]]}, r"64x256: the position table ends at 128 pixels"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(bucketed(micro, pictures, **data), tmp_path / "run", progress=False)
    many = {"train": {"batch_size": 16, "images": 32}}
    with pytest.raises(ConfigError, match=r"64x64 \(\d+\).*fewer pictures than a batch of 16"):
        train(bucketed(micro, pictures, many), tmp_path / "run", progress=False)
    with pytest.raises(ConfigError, match="lists a size twice"):
        bucketed(micro, pictures, buckets=[[64, 64], [64, 64]])
