"""Pictures from folders and tables: decoding by our rules, bad items found before a run begins."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mmdit.data.images as images
from mmdit.config import ImagesConfig
from mmdit.data import make_dataset
from mmdit.data.images import DataError, decode, square


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keep `datasets` out of the home folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    images._check.cache_clear()


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def coloured(index: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    return Image.new("RGB", size, ((37 * index) % 256, (91 * index) % 256, 50))


def sidecars(folder: Path, count: int = 12) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        coloured(i).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"colour {i}\n", encoding="utf-8")
    return folder


def config(source: Path | str, **fields) -> ImagesConfig:
    return ImagesConfig(**{"source": str(source), "resolution": 8, "val_fraction": 0.25, **fields})


def both_splits(settings: ImagesConfig) -> dict[str, tuple[int, ...]]:
    """Caption -> middle pixel, over train and val."""
    found = {}
    for split in ("train", "val"):
        data = make_dataset(settings, split)
        middles = data.pixels(range(len(data)))[:, 4, 4]
        found.update(zip(data.captions(range(len(data))), (tuple(m.tolist()) for m in middles), strict=True))
    return found


WANTED = {f"colour {i}": coloured(i).getpixel((0, 0)) for i in range(12)}


def test_a_folder_of_pictures_and_text_files_is_read(tmp_path):
    assert both_splits(config(sidecars(tmp_path / "d"))) == WANTED


def test_a_folder_with_metadata_is_read(tmp_path):
    with (tmp_path / "metadata.jsonl").open("w") as lines:
        for i in range(12):
            coloured(i).save(tmp_path / f"{i}.png")
            lines.write(json.dumps({"file_name": f"{i}.png", "text": f"colour {i}"}) + "\n")
    assert both_splits(config(tmp_path)) == WANTED


@pytest.mark.parametrize("form", ["parquet file", "parquet folder", "saved", "saved splits"])
def test_tables_are_read(tmp_path, form):
    import datasets

    table = datasets.Dataset.from_dict(
        {"image": [coloured(i) for i in range(12)], "text": [f" colour {i} " for i in range(12)]},
        features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )
    if form.startswith("parquet"):
        (tmp_path / "p").mkdir()
        table.to_parquet(tmp_path / "p" / "a.parquet")
        source = tmp_path / "p" / "a.parquet" if form == "parquet file" else tmp_path / "p"
    else:
        holder = table if form == "saved" else datasets.DatasetDict({"train": table})
        holder.save_to_disk(tmp_path / "s")
        source = tmp_path / "s"
    assert both_splits(config(source)) == WANTED


def test_a_caption_of_which_cleaning_leaves_nothing_is_left_out(tmp_path):
    folder = sidecars(tmp_path / "d")
    (folder / "03.txt").write_text("\x07\x08")
    with pytest.raises(DataError, match=r"03\.png: caption is empty once it is cleaned"):
        make_dataset(config(folder), "train")


@pytest.mark.parametrize("suffix", [".pandas", ".pkl", ".zip", ".py", ".unknown"])
def test_a_file_that_is_no_table_is_refused_before_a_reader_that_unpickles_gets_it(tmp_path, suffix):
    """`datasets` has a reader called pandas, which unpickles; a name it does not know it asks the hub for."""
    canary = tmp_path / "ran"
    (tmp_path / f"x{suffix}").write_bytes(f"cos\nsystem\n(S'touch {canary}'\ntR.".encode())
    with pytest.raises(DataError, match=r"no table that is read here; known: \.parquet"):
        make_dataset(config(tmp_path / f"x{suffix}"), "train")
    assert not canary.exists()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16"])
def test_pictures_converted_strip_by_strip_are_those_converted_whole(mode):
    values = np.random.default_rng(1).integers(0, 256, (600, 7, 4), dtype=np.uint8)  # more than two strips
    picture = Image.fromarray(values)
    if mode == "I;16":
        numbers = values.view(np.uint16)[..., 0]
        expected = np.repeat(np.rint(numbers / 257).astype(np.uint8)[..., None], 3, axis=2)
        assert np.array_equal(np.asarray(images.to_rgb(Image.fromarray(numbers))), expected)
        return
    picture = picture.quantize(64) if mode == "P" else picture.convert(mode)
    if mode == "P":
        picture.info["transparency"] = 3
    white = Image.new("RGBA", picture.size, "white")
    expected = np.asarray(Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB"))
    assert np.array_equal(np.asarray(images.to_rgb(picture)), expected)


def test_the_split_is_by_content_and_does_not_move_when_the_data_grows(tmp_path):
    data = make_dataset(config(sidecars(tmp_path / "a")), "val")
    before = set(data.captions(range(len(data))))
    data = make_dataset(config(sidecars(tmp_path / "b", 40)), "val")
    after = set(data.captions(range(len(data))))
    assert before == {caption for caption in after if caption in WANTED}
    assert 2 <= len(after) <= 20


def test_a_small_data_set_keeps_one_item_for_validation(tmp_path):
    data = make_dataset(config(sidecars(tmp_path / "d", 3), val_fraction=1e-9), "val")
    assert len(data) == 1
    with pytest.raises(DataError, match="split 'val' is empty"):
        make_dataset(config(tmp_path / "d", val_fraction=0.0), "val")
    assert len(make_dataset(config(tmp_path / "d", val_fraction=0.0), "train")) == 3


def test_bad_items_stop_the_build_and_are_all_named(tmp_path):
    folder = sidecars(tmp_path / "d")
    whole = (folder / "03.png").read_bytes()
    (folder / "03.png").write_bytes(whole[: len(whole) // 2])
    (folder / "04.png").write_bytes(b"<html>not found</html>")
    (folder / "05.png").write_bytes(b"")
    (folder / "06.txt").write_text("  \n")
    (folder / "07.txt").unlink()
    (folder / "08.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(DataError) as caught:
        make_dataset(config(folder), "train")
    message = str(caught.value)
    assert "6 of 12 items cannot be used" in message
    assert "03.png: " in message
    assert "04.png: not a picture (begins with b'<html>no')" in message
    assert "05.png: not a picture (empty)" in message
    assert "06.png: caption is empty: 06.txt" in message
    assert "07.png: no caption" in message
    assert "08.png: 08.txt is not UTF-8 at byte 3" in message


def test_skipping_leaves_bad_items_out_and_says_how_many(tmp_path, caplog):
    folder = sidecars(tmp_path / "d")
    (folder / "04.png").write_bytes(b"rubbish")
    (folder / "06.txt").write_text("")
    with caplog.at_level(logging.WARNING):
        found = both_splits(config(folder, on_error="skip"))
    assert found == {k: v for k, v in WANTED.items() if k not in ("colour 4", "colour 6")}
    assert "2 of 12 items left out" in caplog.text
    assert "04.png" in caplog.text


def test_a_long_list_of_bad_items_is_cut_with_a_count(tmp_path):
    folder = sidecars(tmp_path / "d", 30)
    for file in folder.glob("*.txt"):
        file.unlink()
    with pytest.raises(DataError, match=r"30 of 30 items(.|\n)*and 10 more"):
        make_dataset(config(folder), "train")
    with pytest.raises(DataError, match="no usable item among 30"):
        make_dataset(config(folder, on_error="skip"), "train")


def test_small_images_are_enlarged_with_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        data = make_dataset(config(sidecars(tmp_path / "d", 4), resolution=32), "train")
    assert data.pixels([0]).shape == (1, 32, 32, 3)
    assert "4 of 4 images are smaller than 32 pixels" in caplog.text


def test_exif_orientation_is_obeyed():
    picture = Image.new("RGB", (6, 4), "black")
    picture.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    upright = decode(encoded(picture, exif=exif))
    assert upright.size == (4, 6)
    assert upright.getpixel((3, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled_not_cut_off():
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    got = np.asarray(decode(encoded(Image.fromarray(values))))
    assert got[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_transparency_lies_on_white():
    rgba = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    rgba.putpixel((1, 0), (200, 0, 0, 255))
    assert list(np.asarray(decode(encoded(rgba)))[0].ravel()) == [255, 255, 255, 200, 0, 0]
    grey = Image.new("LA", (1, 1), (0, 51))
    assert decode(encoded(grey)).getpixel((0, 0)) == (204, 204, 204)
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    got = np.asarray(decode(encoded(palette, transparency=0)))[0]
    assert got.tolist() == [[255, 255, 255], [40, 50, 60]]


def test_cmyk_and_bilevel_become_rgb():
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = np.asarray(decode(encoded(ink, "TIFF")))[4, 4]
    assert red.tolist() == [255, 0, 0]
    assert decode(encoded(Image.new("1", (2, 2), 1))).getpixel((0, 0)) == (255, 255, 255)


def test_modes_without_a_known_range_are_refused():
    with pytest.raises(ValueError, match="mode F"):
        decode(encoded(Image.new("F", (2, 2), 0.5), "TIFF"))


def test_decompression_bombs_and_unknown_formats_are_refused(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="20 x 16 pixels are more than 100"):
        decode(encoded(coloured(1)))
    with pytest.raises(ValueError, match="not a picture"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_any_truncation_is_a_clean_error(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    for part in range(1, 10):
        with pytest.raises(ValueError, match=r"."):
            decode(data[: len(data) * part // 12])


def test_the_middle_square_is_cut_and_shrunk_without_aliasing():
    stripes = np.zeros((64, 128, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    stripes[:, :32] = stripes[:, 96:] = 7  # outside the middle square
    got = square(Image.fromarray(stripes), 16)
    assert got.shape == (16, 16, 3)
    assert np.abs(got[:, 2:-2].astype(int) - 127).max() <= 3  # stripes of one pixel become grey


def test_an_unknown_column_split_or_place_is_explained(tmp_path):
    with (tmp_path / "metadata.jsonl").open("w") as lines:
        coloured(0).save(tmp_path / "0.png")
        lines.write(json.dumps({"file_name": "0.png", "caption": "a"}) + "\n")
    with pytest.raises(ValueError, match="unknown column 'captions'; did you mean 'caption'"):
        make_dataset(config(tmp_path, caption_column="captions"), "train")
    with pytest.raises(ValueError, match="unknown split 'heldout' of images"):
        make_dataset(config(tmp_path), "heldout")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        make_dataset(config(tmp_path / "nowhere"), "train")


def test_a_hub_name_without_network_says_so(monkeypatch):
    import datasets

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(FileNotFoundError, match=r"'someone/pictures' is neither a local path.*needs the network"):
        make_dataset(config("someone/pictures"), "train")


def test_the_fingerprint_follows_pictures_captions_and_resolution(tmp_path):
    folder = sidecars(tmp_path / "d")
    first = make_dataset(config(folder), "train").fingerprint
    assert make_dataset(config(folder, resolution=16), "train").fingerprint != first
    images._check.cache_clear()
    for file in folder.glob("*.txt"):
        file.write_text("other words")
    assert make_dataset(config(folder), "train").fingerprint != first


def test_validation_writes_every_bad_item_with_its_reason(tmp_path):
    import json

    from mmdit.train.__main__ import main

    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    (folder / "1.png").write_bytes(b"<!DOCTYPE html>")
    (folder / "2.txt").unlink()
    words = ["--data.name", "images", "--data.source", str(folder), "--data.resolution", "16"]
    config = tmp_path / "c.yaml"
    config.write_text("name: c\n")
    assert main([str(config), "--out", str(tmp_path / "run"), "--validate", *words]) == 1
    found = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert [item["item"] for item in found] == ["1.png", "2.png"]
    assert "not a picture" in found[0]["reason"]
    assert "no caption" in found[1]["reason"]
    assert main([str(config), "--validate"]) == 2
