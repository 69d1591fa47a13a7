"""Shards: every item once an epoch, each process its own files, an exact place to go on from, bad files in words."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from mmdit.config import ShardsConfig
from mmdit.data import make_dataset
from mmdit.data.images import DataError
from mmdit.data.shards import ShardsDataset, _units


@pytest.fixture(autouse=True)
def fresh():
    _units.cache_clear()


def png(number):
    data = io.BytesIO()
    Image.new("RGB", (20, 16), (number, 255 - number, 7)).save(data, "PNG")
    return data.getvalue()


def add(archive, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write_tars(folder, counts, broken=(), caption=lambda n: f"item {n} &amp; more"):
    """Write shards of so many items, numbered throughout; captions as .txt in even shards, .json in odd ones."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, count in enumerate(counts):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as archive:
            for _ in range(count):
                key = f"{shard:03d}/{number:05d}"
                add(archive, f"{key}.png", b"broken" if number in broken else png(number))
                if shard % 2:
                    add(archive, f"{key}.json", json.dumps({"text": caption(number)}).encode())
                else:
                    add(archive, f"{key}.txt", caption(number).encode())
                number += 1
    return folder


def dataset(folder, split="train", **changes):
    given = {"source": str(folder), "resolution": 8, "val_fraction": 0.0, "lanes": 4, **changes}
    return make_dataset(ShardsConfig(**given), split)


def test_every_item_is_its_own_picture_and_caption(tmp_path):
    data = dataset(write_tars(tmp_path / "s", [5, 3, 4]))
    assert len(data) == 12
    assert data.captions(range(12)) == [f"item {n} & more" for n in range(12)]
    pixels = data.pixels(range(12))
    assert pixels.shape == (12, 8, 8, 3)
    assert [int(p[0, 0, 0]) for p in pixels] == list(range(12))
    raw = dataset(tmp_path / "s", clean_captions=False)
    assert raw.captions([11]) == ["item 11 &amp; more"]
    assert raw.fingerprint != data.fingerprint


def test_an_epoch_shows_every_item_once_and_the_next_in_another_order(tmp_path):
    data = dataset(write_tars(tmp_path / "s", [9, 7, 8, 16]))
    stream = data.order(3, np.arange(80), 8).reshape(2, 40)
    assert [sorted(epoch) for epoch in stream.tolist()] == [list(range(40))] * 2
    assert not np.array_equal(stream[0], stream[1])
    assert not np.array_equal(data.order(4, np.arange(40), 8), stream[0])
    picked = np.array([79, 3, 41, 17])
    assert np.array_equal(data.order(3, picked, 8), stream.reshape(-1)[picked])


def test_what_does_not_fill_the_lanes_sits_out_and_comes_another_time(tmp_path):
    data = dataset(write_tars(tmp_path / "s", [9, 5]))  # 14 items in 4 lanes of 3
    seen = set()
    for epoch in data.order(0, np.arange(12 * 12), 4).reshape(12, 12):
        assert len(set(epoch.tolist())) == 12
        seen |= set(epoch.tolist())
    assert seen == set(range(14))


def test_a_process_stays_on_its_own_lanes_and_opens_few_shards(tmp_path):
    """16 shards, 4 lanes, 2 processes with the trainer's cut of each batch: about half of the shards each."""
    data = dataset(write_tars(tmp_path / "s", [8] * 16))
    epoch = np.arange(128).reshape(-1, 2, 4)  # batches of 8, cut for two processes
    shards = [set((data.order(1, epoch[:, rank].reshape(-1), 8) // 8).tolist()) for rank in (0, 1)]
    assert len(shards[0] & shards[1]) <= 1
    assert len(shards[0]) <= 9
    # within a lane neighbours come from the same shard
    lane = data.order(1, np.arange(0, 128, 8), 8) // 8
    assert len(set(lane.tolist())) <= 5


def test_parquet_row_groups_are_units_too(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "s").mkdir()
    for shard in range(2):
        numbers = range(10 * shard, 10 * shard + 10)
        images = [{"bytes": png(n), "path": None} for n in numbers] if shard else [png(n) for n in numbers]
        table = pa.table({"image": images, "text": [f"item {n}" for n in numbers]})
        pq.write_table(table, tmp_path / "s" / f"{shard}.parquet", row_group_size=4)
    data = dataset(tmp_path / "s", lanes=2)
    assert len(data) == 20
    assert data.captions(range(20)) == [f"item {n}" for n in range(20)]
    assert [int(p[0, 0, 0]) for p in data.pixels(range(20))] == list(range(20))
    assert sorted(data.order(0, np.arange(20), 4).tolist()) == list(range(20))
    with pytest.raises(DataError, match=r"no column caption; it has image, text"):
        dataset(tmp_path / "s", caption_column="caption")


def test_training_and_validation_share_nothing_and_a_new_shard_moves_nobody(tmp_path):
    folder = write_tars(tmp_path / "s", [30, 30])
    parts = {s: set(dataset(folder, s, val_fraction=0.3).captions(range(len(dataset(folder, s, val_fraction=0.3)))))
             for s in ("train", "val")}  # fmt: skip
    assert not parts["train"] & parts["val"]
    assert len(parts["train"] | parts["val"]) == 60
    write_tars(folder, [30, 30, 10])
    _units.cache_clear()
    later = dataset(folder, "val", val_fraction=0.3)
    assert parts["val"] <= set(later.captions(range(len(later))))


def test_the_index_is_kept_and_made_anew_when_the_shard_changes_or_it_is_torn(tmp_path, monkeypatch):
    import mmdit.data.shards as room

    folder = write_tars(tmp_path / "s", [4])
    scans, original = [], room._scan_tar
    monkeypatch.setattr(room, "_scan_tar", lambda file: scans.append(file) or original(file))
    dataset(folder)
    _units.cache_clear()
    dataset(folder)
    assert len(scans) == 1
    index = next(folder.glob("*.index.npz"))
    index.write_bytes(index.read_bytes()[:50])
    _units.cache_clear()
    assert len(dataset(folder)) == 4
    write_tars(folder, [6])
    _units.cache_clear()
    assert len(dataset(folder)) == 6
    assert len(scans) == 3
    _units.cache_clear()
    dataset(folder, index=tmp_path / "elsewhere")
    assert len(list((tmp_path / "elsewhere").glob("*.npz"))) == 1


def test_a_bad_picture_is_named_or_the_next_item_stands_in_with_its_own_caption(tmp_path):
    folder = write_tars(tmp_path / "s", [6], broken=(2, 3))
    with pytest.raises(DataError, match=r"000\.tar: 000/00002: not a picture.*on_error: skip"):
        dataset(folder).pixels([2])
    data = dataset(folder, on_error="skip")
    assert data.captions([1, 2, 3]) == ["item 1 & more", "item 4 & more", "item 4 & more"]
    assert [int(p[0, 0, 0]) for p in data.pixels([1, 2, 3])] == [1, 4, 4]


def test_bad_shards_are_listed(tmp_path):
    folder = write_tars(tmp_path / "s", [3, 3])
    (folder / "zz.tar").write_bytes(b"<html>")
    with tarfile.open(folder / "yy.tar", "w") as archive:
        add(archive, "a.png", png(1))
    with pytest.raises(DataError, match=r"2 of 4 shards cannot be used") as caught:
        dataset(folder)
    assert "no .txt or .json beside them, the first is 'a'" in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"no \.tar or \.parquet shards"):
        dataset(tmp_path / "nothing" / "*.tar")
    for name in ("zz.tar", "yy.tar"):
        (folder / name).unlink()
    _units.cache_clear()
    assert len(dataset(folder / "*.tar")) == 6
    with pytest.raises(DataError, match=r"lanes 4 must divide train\.batch_size 6"):
        dataset(folder).order(0, np.arange(6), 6)
    _units.cache_clear()
    empty = dataset(write_tars(tmp_path / "e", [2], caption=lambda n: ""))
    with pytest.raises(DataError, match="caption is empty"):
        empty.captions([0])


@pytest.mark.parametrize("precompute", [False, True])
def test_a_run_on_shards_goes_on_to_the_same_bits(tmp_path, micro, precompute):
    import torch

    from mmdit.checkpoint import latest_checkpoint, load_checkpoint
    from mmdit.config import load_config, merge, to_tree
    from mmdit.train.trainer import train

    folder = write_tars(tmp_path / "s", [12, 9, 10])
    source = {"name": "shards", "source": str(folder), "resolution": 64, "val_fraction": 0.2, "lanes": 4}
    base = {**to_tree(micro()), "data": source}
    changes = {"train": {"lr_schedule": "constant", "checkpoint_every": 8, "precompute": precompute, "val_images": 4}}

    def config(images):
        return load_config(None, merge(merge(base, changes), {"train": {"images": images}}))

    train(config(48), tmp_path / "whole", progress=False)
    for images in (16, 40, 48):
        train(config(images), tmp_path / "legs", progress=False)
    a, b = (load_checkpoint(latest_checkpoint(tmp_path / n)).tensors["model"] for n in ("whole", "legs"))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_shards_are_read_in_place_without_holding_more_files_than_lanes_need(tmp_path):
    data: ShardsDataset = dataset(write_tars(tmp_path / "s", [2] * 30), lanes=2)
    data.pixels(range(60))
    assert len(data._files) <= 4


def test_lanes_that_do_not_fit_the_batch_are_refused_at_start_with_exit_code_2(tmp_path, micro, capsys):
    from mmdit.config import to_tree
    from mmdit.train.__main__ import main

    folder = write_tars(tmp_path / "s", [12, 9])
    tree = {**to_tree(micro()), "data": {"name": "shards", "source": str(folder), "resolution": 64, "lanes": 3}}
    tree["train"] = {**tree["train"], "precompute": False}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(tree, default=str))
    assert main([str(path), "--out", str(tmp_path / "run")]) == 2
    assert "data.lanes 3 must divide train.batch_size 8" in capsys.readouterr().err
