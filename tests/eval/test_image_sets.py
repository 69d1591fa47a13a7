"""Sets of pictures from every kind of source, and their features kept by content."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from mmdit_eval import feature_cache
from mmdit_eval.feature_cache import extract_set
from mmdit_eval.features import Extractor, load_extractor
from mmdit_eval.image_sets import from_array, load_captions, open_images
from PIL import Image

from mmdit.data.images import DataError


def pictures(count=6, side=16):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Six pictures in a tree, written in another order than their paths sort."""
    for i, image in reversed(list(enumerate(pictures()))):
        path = tmp_path / "set" / ("b" if i > 2 else "a") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "set" / "notes.md").write_text("not a picture")
    return tmp_path / "set"


def whole(images):
    return np.stack([image for batch in images.batches(4) for image in batch])


def test_a_folder_is_read_recursively_in_the_order_of_its_paths(folder):
    images = open_images(folder)
    assert images.names == ("a/0.png", "a/1.png", "a/2.png", "b/3.png", "b/4.png", "b/5.png")
    assert np.array_equal(whole(images), pictures())
    assert len(images.head(2)) == 2
    assert [len(batch) for batch in images.batches(4)] == [4, 2]


def test_a_list_a_table_and_arrays_give_the_same_pictures(folder, tmp_path):
    import datasets

    (tmp_path / "list.txt").write_text("\n".join(f"set/{name}" for name in open_images(folder).names) + "\n")
    rows = [(folder / name).read_bytes() for name in open_images(folder).names]
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": row, "path": None} for row in rows], "words": list("abcdef")}
    )
    table.cast_column("image", datasets.Image(decode=False)).to_parquet(tmp_path / "t.parquet")
    np.save(tmp_path / "a.npy", pictures())
    np.savez(tmp_path / "a.npz", arr_0=pictures(), arr_1=np.zeros(6))
    for source in ("list.txt", "t.parquet", "a.npy", "a.npz"):
        assert np.array_equal(whole(open_images(tmp_path / source)), pictures()), source
    assert open_images(tmp_path / "t.parquet", caption_column="words").captions == tuple("abcdef")
    assert np.array_equal(whole(from_array(pictures())), pictures())


def test_sizes_that_differ_are_refused_by_name_left_alone_or_cut_square(folder):
    Image.fromarray(np.zeros((20, 30, 3), dtype=np.uint8)).save(folder / "b" / "4.png")
    with pytest.raises(DataError, match=r"1 of 6 pictures differ.*a/0.png has 16 x 16 pixels, b/4.png 20 x 30"):
        open_images(folder)
    assert open_images(folder, sizes="any").picture(4).shape == (20, 30, 3)
    assert whole(open_images(folder, sizes="8")).shape == (6, 8, 8, 3)
    with pytest.raises(ValueError, match="sizes must be"):
        open_images(folder, sizes="all")


def test_a_turned_photograph_counts_upright(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pictures(1, 16)[0, :, :8]).save(folder / "a" / "0.png", exif=exif)
    with pytest.raises(DataError, match=r"a/0\.png has 8 x 16 pixels"):
        open_images(folder)
    assert open_images(folder, sizes="any").picture(0).shape == (8, 16, 3)


def test_what_cannot_be_read_is_named(folder, tmp_path):
    whole_file = (folder / "a" / "1.png").read_bytes()
    (folder / "a" / "1.png").write_bytes(whole_file[: len(whole_file) // 2])
    images = open_images(folder)  # its head is whole
    with pytest.raises(DataError, match=r"a/1\.png"):
        whole(images)
    (folder / "a" / "2.png").write_bytes(b"hello")
    (folder / "b" / "3.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 6 pictures cannot be read:\n  a/2.png: not a picture\n  b/3.png"):
        open_images(folder)
    (tmp_path / "list.txt").write_text("set/a/0.png\nset/none.png\n")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 files are not there, first set/none\.png"):
        open_images(tmp_path / "list.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures"):
        open_images(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        open_images(tmp_path / "nothing.parquet")
    np.savez(tmp_path / "s.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(DataError, match="holds statistics"):
        open_images(tmp_path / "s.npz")
    np.save(tmp_path / "f.npy", np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"uint8 \[N, H, W, 3\], got float64 \[2, 4, 4, 3\]"):
        open_images(tmp_path / "f.npy")


def test_captions_come_by_line_or_by_name_and_must_fit(folder, tmp_path):
    images = open_images(folder)
    wanted = [f"number {i}" for i in range(6)]
    (tmp_path / "c.txt").write_text("\n".join(wanted) + "\n")
    by_name = dict(reversed(list(zip(images.names, wanted, strict=True))))
    (tmp_path / "c.json").write_text(json.dumps({name.removesuffix(".png"): text for name, text in by_name.items()}))
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"file_name": n, "text": t}) for n, t in by_name.items()))
    (tmp_path / "c.csv").write_text("file_name,caption\n" + "\n".join(f"{n},{t}" for n, t in by_name.items()))
    for name in ("c.txt", "c.json", "c.jsonl", "c.csv"):
        assert load_captions(tmp_path / name, images) == wanted, name
    (tmp_path / "c.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError, match="2 captions for 6 pictures"):
        load_captions(tmp_path / "c.txt", images)
    (tmp_path / "c.json").write_text(json.dumps({**by_name, "b/9.png": "spare"}))
    with pytest.raises(DataError, match=r"1 captions belong to no picture.*b/9\.png"):
        load_captions(tmp_path / "c.json", images)
    (tmp_path / "c.json").write_text(json.dumps({n: t for n, t in by_name.items() if n != "a/1.png"}))
    with pytest.raises(DataError, match=r"1 of 6 pictures have no caption, first a/1\.png"):
        load_captions(tmp_path / "c.json", images)
    (tmp_path / "c.csv").write_text("name,text\na/0.png,x\n")
    with pytest.raises(DataError, match="a row has no 'file_name'"):
        load_captions(tmp_path / "c.csv", images)
    (tmp_path / "c.json").write_text(json.dumps({**by_name, "a/1.png": None}))
    with pytest.raises(DataError, match=r"1 of 6 pictures have no caption, first a/1\.png"):
        load_captions(tmp_path / "c.json", images)


def test_no_caption_is_lost_or_given_to_another_picture(tmp_path):
    """Names that differ after a dot, or in their suffix alone; and names that stand there twice."""
    names = ("v1.5.png", "v1.6.png", "v1.png", "a.png", "a.jpg")
    images = replace(from_array(np.zeros((5, 2, 2, 3), dtype=np.uint8)), names=names)
    file = tmp_path / "c.json"
    whole = {"v1.5": "five", "v1.6": "six", "v1": "one", "a.png": "png", "a.jpg": "jpg"}
    file.write_text(json.dumps(whole))
    assert load_captions(file, images) == list(whole.values())
    for spare in ("a.png", "a"):
        file.write_text(json.dumps({"v1.5": "five", "v1.6": "six", "v1": "one", spare: "whose?"}))
        with pytest.raises(DataError, match=r"of 5 pictures have no caption, first a\."):
            load_captions(file, images)
    file.write_text('{"v1": "first", "v1": "second"}')
    with pytest.raises(DataError, match="1 names stand there more than once, first v1"):
        load_captions(file, images)
    rows = tmp_path / "c.jsonl"
    rows.write_text("\n".join(json.dumps({"file_name": n, "text": "x"}) for n in (*names, "a.png")))
    with pytest.raises(DataError, match=r"more than once, first a\.png"):
        load_captions(rows, images)
    rows.write_text("\n".join(json.dumps({"file_name": n, "text": "x\u2028y"}, ensure_ascii=False) for n in names))
    assert load_captions(rows, images) == ["x\u2028y"] * 5
    file.write_text("[1]")
    with pytest.raises(DataError, match="no object of name: caption"):
        load_captions(file, images)


def counting(monkeypatch, chunk=4):
    """An extractor that counts the pictures it was shown."""
    monkeypatch.setattr(feature_cache, "CHUNK", chunk)
    base, seen = load_extractor("pixel_statistics"), []

    def prepare(images):
        seen.append(len(images))
        return base.prepare(images)

    return Extractor("counting", base.width, base.hash, base.resize, prepare, base.network), seen


def test_a_second_look_reads_and_only_new_pictures_are_computed(folder, tmp_path, monkeypatch):
    extractor, seen = counting(monkeypatch)
    cache = tmp_path / "cache"
    first, ids = extract_set(extractor, open_images(folder), batch_size=3, cache=cache)
    assert ids.tolist() == list(range(6))
    assert first == pytest.approx(extract_set(extractor, from_array(pictures()))[0], abs=1e-6)
    seen.clear()
    again, _ = extract_set(extractor, open_images(folder), batch_size=2, cache=cache)
    assert np.array_equal(again, first)
    assert seen == []
    (folder / "b" / "5.png").rename(folder / "b" / "6.png")  # names do not count
    extract_set(extractor, open_images(folder), cache=cache)
    assert seen == []
    Image.fromarray(255 - pictures()[5]).save(folder / "b" / "6.png")
    changed, _ = extract_set(extractor, open_images(folder), cache=cache)
    assert sum(seen) == 2  # the chunk of two that holds it
    assert np.array_equal(changed[:5], first[:5])
    assert not np.allclose(changed[5], first[5])
    other = Extractor("counting", 51, extractor.hash, "another rule", extractor.prepare, extractor.network)
    seen.clear()
    extract_set(other, open_images(folder), cache=cache)
    assert sum(seen) == 6
    extract_set(extractor, open_images(folder, sizes="8"), cache=cache)
    assert sum(seen) == 12


def test_damaged_files_of_the_cache_are_computed_again(folder, tmp_path, monkeypatch, caplog):
    extractor, _ = counting(monkeypatch)
    images = open_images(folder)
    first, _ = extract_set(extractor, images, cache=tmp_path)
    files = sorted(file for file in tmp_path.glob("??/*.safetensors"))
    assert len(files) == 2
    data = bytearray(files[0].read_bytes())
    data[-3] ^= 1  # one bit of a number: the file still loads
    files[0].write_bytes(data)
    files[1].write_bytes(files[1].read_bytes()[:50])
    with caplog.at_level(logging.WARNING):
        again, _ = extract_set(extractor, images, cache=tmp_path)
    assert np.array_equal(again, first)
    assert caplog.text.count("are damaged") == 2
    caplog.clear()
    extract_set(extractor, images, cache=tmp_path)
    assert "damaged" not in caplog.text


def test_many_writers_of_one_cache_leave_whole_files(folder, tmp_path, monkeypatch):
    extractor, _ = counting(monkeypatch, chunk=2)
    expected, _ = extract_set(extractor, open_images(folder))
    with ThreadPoolExecutor(8) as pool:
        results = list(
            pool.map(lambda _: extract_set(extractor, open_images(folder), cache=tmp_path / "c")[0], range(24))
        )
    assert all(np.array_equal(result, expected) for result in results)
    assert len([file for file in (tmp_path / "c").rglob("*") if file.is_file()]) == 3


def test_features_that_are_not_finite_are_refused(folder):
    base = load_extractor("pixel_statistics")
    broken = Extractor("broken", 51, "", "", base.prepare, lambda x: x * torch.nan)
    with pytest.raises(ValueError, match="'broken' gave values that are not finite"):
        extract_set(broken, open_images(folder))
