"""Folders against folders by the command line: what is printed, stored, compared and refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdit_eval import set_comparison
from mmdit_eval.commands import main
from mmdit_eval.comparison import compare
from mmdit_eval.features import extract, load_extractor
from mmdit_eval.frechet import frechet_distance
from mmdit_eval.image_sets import from_array
from mmdit_eval.kernel import kernel_distance
from mmdit_eval.set_comparison import SetOptions, evaluate_images
from PIL import Image

from mmdit.config import ShapesConfig
from mmdit.data import make_dataset

COUNT = 24


@pytest.fixture(scope="module")
def scenes():
    """Pictures and captions: true ones, and the same with noise."""
    dataset = make_dataset(ShapesConfig(), "seen")
    rows = np.arange(COUNT)
    images = dataset.pixels(rows)
    noise = np.random.default_rng(0).normal(0, 25, images.shape)
    return images, (images + noise).clip(0, 255).astype(np.uint8), dataset.captions(rows)


@pytest.fixture
def folders(tmp_path, scenes, monkeypatch):
    """Folders real and fake, and captions.txt; no cache outside."""
    monkeypatch.setenv("MMDIT_EVAL_CACHE", str(tmp_path / "cache"))
    for name, images in zip(("real", "fake"), scenes[:2], strict=True):
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{i:03d}.png")
    (tmp_path / "captions.txt").write_text("\n".join(scenes[2]) + "\n")
    return tmp_path


def words(folder, *more, out="out.json", fake="fake"):
    head = ["images", str(folder / fake), "--against", str(folder / "real"), "--extractor", "tiny_clip", "--quiet"]
    return [*head, "--out", str(folder / out), *more]


def test_a_folder_is_judged_against_a_folder(folders, scenes, capsys):
    metrics = ["--metrics", "frechet", "kernel", "clip_score", "--captions", str(folders / "captions.txt")]
    assert main(words(folders, *metrics)) == 0
    result = json.loads((folders / "out.json").read_text())
    scores = result["splits"]["images"]["scores"]
    fake, real = (extract(load_extractor("tiny_clip"), images) for images in (scenes[1], scenes[0]))
    assert scores["frechet"]["value"] == pytest.approx(frechet_distance(fake, real), rel=1e-5)
    assert scores["kernel"]["value"] == pytest.approx(kernel_distance(fake, real), rel=1e-4)
    assert len(result["splits"]["images"]["per_image"]["clip_score"]) == COUNT
    assert result["stamp"]["protocol"]["extractor"]["precision"] == "fp32"
    assert result["splits"]["images"]["details"]["long_captions"]["policy"] == "truncate"
    printed = capsys.readouterr().out
    assert "24 pictures of" in printed
    heading = next(line for line in printed.splitlines() if "score" in line)
    assert [word.strip() for word in heading.strip("┃").split("┃")] == ["score", "value", "interval"]
    assert "Fréchet" in printed
    assert "bicubic, antialiased, float, to 64" in printed


def test_two_sets_are_compared_picture_by_picture_and_unlike_ones_are_refused(folders, capsys):
    metrics = ["--metrics", "frechet", "kernel", "cmmd", "clip_score", "--captions", str(folders / "captions.txt")]
    main(words(folders, *metrics, out="a.json", fake="real"))
    main(words(folders, *metrics, out="b.json"))
    assert main(["compare", str(folders / "a.json"), str(folders / "b.json"), "--out", str(folders / "d.json")]) == 0
    difference = json.loads((folders / "d.json").read_text())["differences"]["images"]["clip_score"]
    a, b = (json.loads((folders / f"{name}.json").read_text()) for name in "ab")
    values = [side["splits"]["images"]["scores"]["clip_score"]["value"] for side in (a, b)]
    assert difference["value"] == pytest.approx(values[0] - values[1], abs=1e-3)
    assert difference["low"] < difference["value"] < difference["high"]
    assert "a − b" in capsys.readouterr().out
    distance = json.loads((folders / "d.json").read_text())["differences"]["images"]["frechet"]
    values = [side["splits"]["images"]["scores"]["frechet"]["value"] for side in (a, b)]
    assert distance["value"] == pytest.approx(values[0] - values[1])
    assert distance["high"] - distance["value"] < 2 * (distance["value"] - distance["low"])  # it has one
    assert distance["method"] == "paired delta, at this N, reference fixed"
    for name, method in (("kernel", "reference fixed"), ("cmmd", "at this N, reference fixed")):
        found = json.loads((folders / "d.json").read_text())["differences"]["images"][name]
        values = [side["splits"]["images"]["scores"][name]["value"] for side in (a, b)]
        assert found["value"] == pytest.approx(values[0] - values[1])
        assert found["low"] < found["value"] < found["high"]
        assert found["method"] == f"paired delta, {method}"
    fewer = json.loads((folders / "b.json").read_text())
    fewer["splits"]["images"]["influence"]["kernel"].pop()
    with pytest.raises(ValueError, match=r"images\.kernel has 24 pictures in .* and 23 in"):
        compare(a, fewer)
    short = json.loads((folders / "b.json").read_text())
    short["splits"]["images"]["per_image"]["clip_score"].pop()
    with pytest.raises(ValueError, match=r"images\.clip_score has 24 pictures in .* and 23 in"):
        compare(a, short)
    main(words(folders, "--metrics", "frechet", "--sizes", "32", out="c.json"))
    capsys.readouterr()
    assert main(["compare", str(folders / "a.json"), str(folders / "c.json")]) == 2
    refused = capsys.readouterr().err
    assert "protocol.sizes: 'equal' and '32'" in refused
    assert "protocol.captions" in refused
    assert "against the same pictures" in refused


def test_statistics_of_another_width_are_refused_by_name_before_any_picture_is_seen(folders, monkeypatch, capsys):
    path = folders / "width.npz"
    np.savez(path, mu=np.zeros(5), sigma=np.eye(5), count=20)
    monkeypatch.setattr(set_comparison, "features_of", None)
    assert main(["images", str(folders / "real"), "--against", str(path), "--extractor", "pixel_statistics"]) == 2
    refused = capsys.readouterr().err
    assert "width.npz holds statistics of 5 features" in refused


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--metrics", "frechett"], "did you mean 'frechet'"),
        (["--metrics", "clip_score"], "clip_score needs captions"),
        (["--extractor", "inceptionfid"], "did you mean 'inception_fid'"),
        (["--sizes", "small"], "sizes must be 'equal', 'any' or a number"),
        (["--captions", "nowhere.txt", "--metrics", "clip_score"], "no captions file nowhere.txt"),
        (
            ["--metrics", "frechet_infinity"],
            "frechet_infinity needs 516 pictures a set for 128 features",
        ),
    ],
)
def test_what_cannot_be_done_is_said_with_exit_code_2(folders, capsys, more, message):
    assert main(words(folders, *more)) == 2
    assert message in capsys.readouterr().err
    assert not (folders / "out.json").exists()


def test_a_place_that_cannot_be_written_to_is_refused_before_any_picture_is_seen(folders, monkeypatch, capsys):
    monkeypatch.setattr(set_comparison, "features_of", None)
    for place, message in ((".", "is a folder"), ("captions.txt/out.json", "captions.txt is a file, not a folder")):
        assert main(words(folders, out=place)) == 2
        assert message in capsys.readouterr().err
    statistics = ["statistics", str(folders / "real"), "--extractor", "tiny_clip", "--out"]
    assert main([*statistics, str(folders / "captions.txt" / "a.npz")]) == 2
    assert "is a file, not a folder" in capsys.readouterr().err


def test_a_disk_that_is_full_is_said_and_leaves_nothing_half_written(folders, monkeypatch, capsys):
    def full(path, *_, **__):
        path.touch()
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    assert main(words(folders)) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not list(folders.glob("*out.json*"))


@pytest.mark.filterwarnings("error")
def test_pictures_of_several_sizes_cost_no_warning(folders):
    Image.new("RGB", (40, 48)).save(folders / "fake" / "000.png")
    torch.set_warn_always(True)  # else only the first one of the process counts
    try:
        assert main(words(folders, "--sizes", "any", "--metrics", "frechet")) == 0
    finally:
        torch.set_warn_always(False)


def test_one_picture_and_an_extractor_without_text_are_refused(scenes):
    one, many = from_array(scenes[0][:1], "one"), from_array(scenes[0], "many")
    with pytest.raises(ValueError, match="one has 1 picture"):
        evaluate_images(one, many, SetOptions("tiny_clip", progress=False))
    options = SetOptions("pixel_statistics", metrics=("clip_score",), progress=False)
    with pytest.raises(ValueError, match="'pixel_statistics' has no text tower"):
        evaluate_images(many, many, options, captions=scenes[2])
    with pytest.raises(ValueError, match="3 captions for 24 pictures"):
        evaluate_images(many, many, options, captions=scenes[2][:3])


def test_an_extractor_of_its_own_judges_clip_score(scenes):
    options = SetOptions("pixel_statistics", clip="tiny_clip", metrics=("frechet", "clip_score"), progress=False)
    found = evaluate_images(from_array(scenes[1]), from_array(scenes[0]), options, captions=scenes[2])
    alone = SetOptions("tiny_clip", metrics=("clip_score",), progress=False)
    other = evaluate_images(from_array(scenes[1]), from_array(scenes[0]), alone, captions=scenes[2])
    scores = [result["splits"]["images"]["per_image"]["clip_score"] for result in (found, other)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    assert found["stamp"]["protocol"]["clip"]["name"] == "tiny_clip"
    with pytest.raises(ValueError, match=r"protocol\.extractor\.name"):
        compare(found, other)


def test_copies_of_the_training_are_found(scenes):
    train, heldout = from_array(scenes[0][:12]), from_array(scenes[0][12:])
    options = SetOptions("pixel_statistics", metrics=("memorisation",), progress=False)
    copies = np.concatenate([scenes[0][:3], 255 - scenes[0][3:12]])
    split = evaluate_images(from_array(copies), heldout, options, train=train)["splits"]["images"]
    assert split["scores"]["copied"]["value"] == 3 / 12
    assert sorted(row["training"] for row in split["details"]["memorisation"]["closest"][:3]) == [0, 1, 2]
    with pytest.raises(ValueError, match="--train FOLDER"):
        evaluate_images(from_array(copies), heldout, options)


def test_captions_come_from_a_column_of_the_table(scenes, folders, tmp_path, capsys):
    import datasets

    rows = [{"bytes": path.read_bytes(), "path": None} for path in sorted((folders / "fake").iterdir())]
    lines = (folders / "captions.txt").read_text().splitlines()
    for name, captions in (("whole", lines), ("broken", [*lines[:-1], None])):
        table = datasets.Dataset.from_dict({"image": rows, "words": captions})
        table.cast_column("image", datasets.Image(decode=False)).to_parquet(tmp_path / f"{name}.parquet")
    shared = ["--against", str(folders / "real"), "--extractor", "tiny_clip", "--metrics", "clip_score", "--quiet"]
    shared += ["--no-cache", "--out", str(tmp_path / "out.json")]
    scores = []
    for more in (
        [str(tmp_path / "whole.parquet"), "--caption-column", "words"],
        [str(folders / "fake"), "--captions", str(folders / "captions.txt")],
    ):
        assert main(["images", *more, *shared]) == 0
        scores.append(json.loads((tmp_path / "out.json").read_text())["splits"]["images"]["per_image"]["clip_score"])
    assert scores[0] == scores[1]
    assert main(["images", str(tmp_path / "broken.parquet"), "--caption-column", "words", *shared]) == 2
    assert "column 'words' holds no caption in 1 of 24 rows, first None for" in capsys.readouterr().err


def test_sets_of_different_size_have_a_value(scenes):
    options = SetOptions("pixel_statistics", metrics=("frechet", "kernel", "cmmd"), progress=False)
    with pytest.warns(UserWarning, match="cmmd on 'pixel_statistics', which is no CLIP"):
        found = evaluate_images(from_array(scenes[1]), from_array(scenes[0][:10]), options)
    assert all(np.isfinite(estimate["value"]) for estimate in found["splits"]["images"]["scores"].values())


def test_statistics_are_written_and_stand_in_for_the_pictures(folders, capsys):
    real, fake, out = (str(folders / name) for name in ("real", "fake", "real.npz"))
    shared = ["--extractor", "pixel_statistics", "--quiet", "--no-cache"]
    assert main(["statistics", real, "--out", out, *shared]) == 0
    assert "24 pictures by pixel_statistics" in capsys.readouterr().out
    for reference, name in ((real, "a"), (out, "b")):
        command = ["images", fake, "--against", reference, "--metrics", "frechet", *shared]
        assert main([*command, "--out", str(folders / f"{name}.json")]) == 0
    a, b = (json.loads((folders / f"{n}.json").read_text())["splits"]["images"]["scores"]["frechet"] for n in "ab")
    assert b["value"] == pytest.approx(a["value"], rel=1e-9)
    assert b["high"] is not None
    capsys.readouterr()
    tiny = ["images", fake, "--against", out, "--extractor", "tiny_clip", "--quiet", "--no-cache"]
    assert main(tiny) == 2
    assert "another extractor" in capsys.readouterr().err
    assert main(["images", out, "--against", real, *shared]) == 2
    assert "holds statistics (mu, sigma), not pictures" in capsys.readouterr().err
    assert main(["statistics", real, "--out", str(folders / "s.txt"), *shared]) == 2
    assert "must end with .npz" in capsys.readouterr().err
    np.savez(folders / "few.npz", mu=np.zeros(51), sigma=np.eye(51))
    assert main(["images", fake, "--against", str(folders / "few.npz"), "--metrics", "kernel", *shared]) == 2
    assert "allow the Fréchet distance alone" in capsys.readouterr().err


def test_a_result_that_is_not_there_is_explained(tmp_path, capsys):
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path)]) == 2
    assert "no result" in capsys.readouterr().err
    (tmp_path / "a.json").write_text('{"splits": {}}')
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")]) == 2
    assert "is no result of scripts/evaluate.py" in capsys.readouterr().err
    assert main([str(tmp_path / "nothing")]) == 2
    assert "no run folder" in capsys.readouterr().err
