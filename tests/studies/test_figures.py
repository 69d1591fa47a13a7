"""Attention maps and guidance in a report: what is drawn, and what is said beside it."""

import json

from mmdit_eval import plots
from mmdit_eval.figures import figures
from mmdit_eval.findings import read_study
from mmdit_eval.plots import row_styles
from mmdit_eval.report import html

from tests.studies.made_up import widen, write_study

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="


def record_maps(study, row, caption, maps, words=()):
    """Leave maps of one prompt in a row's first cell, {word: share}, each everywhere alike."""
    prompt = {"caption": caption, "t": 0.7, "maps": {word: [[share] * 4] * 4 for word, share in maps.items()}}
    stored = {"settings": {"config": {"words": list(words)}}, "prompts": [prompt]}
    (study / f"{row}-s0" / "attention.json").write_text(json.dumps(stored))


def drawn_maps(study, monkeypatch):
    """Return the note of the attention figure, and per row what its panels show: the share, or the words on it."""
    kept = []
    monkeypatch.setattr("mmdit_eval.plots._png", lambda figure: kept.append(figure) or PIXEL)
    files = read_study(study)
    [found] = [f for f in figures(files, row_styles(files.rows)) if f["title"].startswith("What is read from")]
    *axes, bar = kept[-1].axes
    columns = [axis.get_title() for axis in axes if axis.get_title()]
    panels = [axis.images[0].get_array()[0, 0] if axis.images else axis.texts[0].get_text() for axis in axes]
    lines = {
        axis.get_ylabel(): dict(zip(columns, panels[i : i + len(columns)], strict=True))
        for i, axis in enumerate(axes)
        if axis.get_ylabel()
    }
    limits = {axis.images[0].get_clim() for axis in axes if axis.images}
    return found["note"], lines, limits, bar.get_ylabel()


def test_every_row_shows_the_same_words_on_one_colour_scale_also_those_it_does_not_read(study, monkeypatch):
    caption = "it shows a plain grey page and then on it and far below one line there is a white star"
    record_maps(study, "mmdit", caption, {"shows": 0.5, "below": 0.02, "white": 0.1, "star": 0.2})
    record_maps(study, "unet", caption, {"shows": 0.5, "below": 0.05})
    note, lines, limits, bar = drawn_maps(study, monkeypatch)
    assert lines == {
        "mmdit": {"below": 0.02, "white": 0.1, "star": 0.2},
        "unet": {"below": 0.05, "white": "not read", "star": "not read"},
    }
    assert limits == {(0.0, 0.2)}  # the largest share that is shown
    assert bar == "share of attention"
    assert "Left out: 10 other words of the caption." in note
    assert "one colour scale" in note
    assert "Not read: " in note


def test_the_words_that_a_study_names_are_shown_and_a_row_without_text_tokens_has_a_blank_line(study, monkeypatch):
    record_maps(study, "mmdit", "a red circle", {"red": 0.3}, words=("red",))
    record_maps(study, "unet", "a red circle", {}, words=("red",))
    note, lines, limits, _ = drawn_maps(study, monkeypatch)
    assert lines == {"mmdit": {"red": 0.3}, "unet": {"red": "not read"}}
    assert limits == {(0.0, 0.3)}
    assert "Left out" not in note


def test_shares_of_streams_that_are_read_apart_are_said_to_add_up_to_one_each(study, monkeypatch):
    for row in ("mmdit", "unet"):
        record_maps(study, row, "a red circle", {"red": 0.3})
    assert "add up" not in drawn_maps(study, monkeypatch)[0]
    (study / "unet-s0" / "config.yaml").write_text("model: {injection: decoupled}\n")
    note = drawn_maps(study, monkeypatch)[0]
    assert note.endswith(" In unet each stream of text has an attention of its own, whose shares add up to 1.")


def test_rows_under_several_guidances_are_drawn_against_each_other(study):

    book = json.loads((study / "study.json").read_text())
    titles = [f["title"] for f in figures(read_study(study), row_styles(list(book["rows"])))]
    assert "What guidance buys, and what it costs" not in titles
    for row, scale in zip(book["rows"], (1.0, 4.0), strict=True):
        book["rows"][row]["sampling"] = {"guidance_scale": scale}
    book["rows"]["unet"]["confounded"] = ["train.lr"]
    (study / "study.json").write_text(json.dumps(book))
    titles = [f["title"] for f in figures(read_study(study), row_styles(list(book["rows"])))]
    assert "What guidance buys, and what it costs" in titles
    page = html(read_study(study))
    assert "(confounded)" in page
    assert "unet is confounded: it differs from the reference in train.lr too" in page


def test_strengths_of_one_kind_of_guidance_are_joined_and_no_others(tmp_path, monkeypatch):
    study = widen(write_study(tmp_path), 9)
    book = json.loads((study / "study.json").read_text())
    kinds = [
        *({"negative_guidance": "cfg", "guidance_scale": scale} for scale in (1.0, 4.0)),
        *({"negative_guidance": "nag", "nag": {"scale": scale, "tau": 2.5}} for scale in (2.0, 5.0)),
        {"negative_guidance": "nag", "nag": {"scale": 9.0, "tau": 1.0}},  # differs in more than its strength
        *({"negative_guidance": "kv_subtract", "kv_subtract": {"weight": weight}} for weight in (0.3, 0.1)),
        {"negative_guidance": "none"},
        {"negative_guidance": "skip_layer", "guidance_scale": 4.0, "skip_layer": {"scale": 1.0}},
    ]
    every = {"guidance_scale": 2.5, "nag": {"scale": 5.0, "tau": 2.5}, "kv_subtract": {"weight": 0.5}}
    for kept, kind in zip(book["rows"].values(), kinds, strict=True):
        kept.update(sampling={"num_steps": 20, **every, **kind}, trained_as="mmdit")
    (study / "study.json").write_text(json.dumps(book))
    found = []
    monkeypatch.setattr("mmdit_eval.plots.guidance_figure", lambda points, *_: found.extend(points) or PIXEL)
    figures(read_study(study), row_styles(list(book["rows"])))
    curves = {}
    for point in found:
        if point["split"] == "seen":
            curves.setdefault(point["curve"] or point["row"], []).append((point["row"], point["scale"]))
    assert list(curves.values()) == [
        [("mmdit", 1.0), ("unet", 4.0)],
        [("row_2", 2.0), ("row_3", 5.0)],
        [("row_4", 9.0)],
        [("row_5", 0.3), ("row_6", 0.1)],
        [("row_7", 0.0)],
        [("row_8", 1.0)],
    ]


def test_labels_of_rows_that_nearly_coincide_hide_neither_each_other_nor_a_point(monkeypatch):
    kept = []
    monkeypatch.setattr(plots, "_png", kept.append)
    places = {"cfg": (6.0, 0.516), "skip_layer": (6.01, 0.52), "none": (14.2, 0.28), "kv_subtract": (14.9, 0.27)}
    points = [
        {"row": row, "label": row, "split": "seen", "scale": 1.0, "curve": None,
         "x": {"value": x, "low": x - 1, "high": x + 1}, "y": {"value": y, "low": y - 0.05, "high": y + 0.05}}
        for row, (x, y) in places.items()
    ]  # fmt: skip
    plots.guidance_figure(points, ("frechet", "all_correct"), row_styles(list(places)), {"seen": "seen"})
    [axis] = kept[0].axes
    boxes = {text.get_text(): text.get_bbox_patch() or text.get_window_extent() for text in axis.texts}
    assert boxes.keys() == places.keys()
    frame, found = axis.get_window_extent(), list(boxes.values())
    assert not any(a.overlaps(b) for i, a in enumerate(found) for b in found[:i])
    dots = axis.transData.transform([(x, 100 * y) for x, y in places.values()])
    assert not any(box.contains(*dot) for box in found for dot in dots)
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in found)
