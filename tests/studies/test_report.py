"""The report, from made-up files: numbers, words, a page that needs nothing from outside, and damaged input."""

import csv
import io
import json
import os
import re
import unicodedata

import numpy as np
import pytest
import yaml
from mmdit_eval.claims import verdict
from mmdit_eval.comparison import check_comparable, compare, find_result
from mmdit_eval.figures import figures, grids
from mmdit_eval.findings import at_budget, cost_table, equal_budgets, estimate, read_study, seconds_note, spent
from mmdit_eval.mixed import mixed_difference
from mmdit_eval.plots import row_styles
from mmdit_eval.readme import store_study
from mmdit_eval.report import csv_table, html, latex, latex_text, markdown, summary, write_report
from mmdit_eval.scores import SCORES
from mmdit_eval.statistics import mean_interval
from PIL import Image

from tests.studies.made_up import STAMP, widen, write_study


def test_everything_is_written_and_the_page_needs_nothing_from_outside(study):
    page = write_report(study).read_text()
    assert {"report.html", "table.md", "table.csv", "summary.json"} <= {p.name for p in study.iterdir()}
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert links
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert "One seed ranks nothing" in page


def test_claims_stand_in_the_page_the_summary_and_the_table_in_latex(tmp_path):
    study = write_study(tmp_path, seeds=(0, 1, 2, 3, 4))
    page = write_report(study).read_text()
    assert "What was claimed beforehand" in page
    claims = json.loads((study / "summary.json").read_text())["claims"]
    assert [(c["first"], c["second"], c["split"]) for c in claims] == [
        ("unet", "mmdit", s) for s in ("seen", "heldout")
    ]
    assert all(claim["permutation"] is not None and claim["new_prompts"]["df"] > 0 for claim in claims)
    tex = (study / "table.tex").read_text()
    assert tex.startswith("\\begin{tabular}{llrrrrrr}")
    assert tex.count("\\\\") == 3  # heads and two rows
    assert "%" not in tex.replace("\\%", "")


def test_what_was_claimed_and_not_measured_is_said_and_nothing_else_takes_its_place(study):
    book = json.loads((study / "study.json").read_text())
    book["study"]["claims"]["scores"] = ["relation"]
    (study / "study.json").write_text(json.dumps(book))
    said = verdict(read_study(study))
    assert not any("unet" in sentence and "mmdit" in sentence for sentence in said)
    assert "Claimed and not measured on this data: relation." in said


def test_a_row_that_was_let_through_as_confounded_leaves_the_others_their_verdicts(tmp_path):
    study = widen(write_study(tmp_path, seeds=(0, 1, 2)), 3)
    for path in study.glob("row_2-s*/eval/*.json"):
        result = json.loads(path.read_text())
        result["stamp"]["inference"]["sampling.num_steps"] = 50
        path.write_text(json.dumps(result))
    assert verdict(read_study(study))[0].startswith("The rows are not comparable")
    book = json.loads((study / "study.json").read_text())
    book["rows"]["row_2"] = {**book["rows"]["row_2"], "confounded": ["sampling.num_steps"]}
    (study / "study.json").write_text(json.dumps(book))
    said = verdict(read_study(study))
    assert not said[0].startswith("The rows are not comparable")
    assert any("row_2 is confounded" in sentence for sentence in said)
    assert {claim["first"] for claim in summary(read_study(study))["claims"]} == {"unet", "row_2"}


@pytest.mark.parametrize("common", [True, False])
def test_losses_of_different_targets_stand_in_no_table_and_no_figure_together(study, common):
    for row, prediction in (("mmdit", "velocity"), ("unet", "v")):
        tree = {"diffusion": {"prediction": prediction, "schedule": {"name": "rectified_flow", "shift": 3.0}}}
        (study / f"{row}-s0/config.yaml").write_text(yaml.safe_dump(tree))
        for path in (study / f"{row}-s0/eval").glob("*.json"):
            result = json.loads(path.read_text())
            for found in result["splits"].values():
                found["scores"]["validation_loss"] = mean_interval([0.3, 0.4], draws=20)
                if common:
                    found["details"]["common_loss_by_ratio"] = {"0.142857": 0.9, "1.0": 0.4, "7.0": 0.6}
            path.write_text(json.dumps(result))
    files = read_study(study)
    assert "validation_loss" not in files.scores
    [losses] = [f for f in figures(files, row_styles(files.rows)) if f["title"].startswith("Training loss")]
    assert "different targets" in losses["note"]
    assert ("velocity loss at each t" in losses["title"]) == common
    (study / "unet-s0/config.yaml").write_text((study / "mmdit-s0/config.yaml").read_text())
    files = read_study(study)
    assert "validation_loss" in files.scores
    [losses] = [f for f in figures(files, row_styles(files.rows)) if f["title"].startswith("Training loss")]
    assert losses["title"].endswith("validation loss at each t")


@pytest.mark.parametrize(
    ("row", "differs"),
    [
        ({"model": {"depth": 3}}, []),
        ({"encoders": {"t5_length": 32}}, ["text tokens"]),
        ({"encoders": {"vae": "other.safetensors"}}, ["latents"]),
        ({"encoders": {"vae": "other.safetensors", "padding": "mask"}}, ["latents", "text tokens"]),
        ({"diffusion": {"density": {"name": "uniform"}}}, ["objective"]),
        ({"sampling": {"guidance_scale": 3.0}}, ["sampler"]),
        ({"data": {"captions": "long"}, "train": {"lr": 1e-4}}, ["data", "budget"]),
    ],
)
@pytest.mark.parametrize("declared", [True, False])  # else the row was let through as confounded
def test_the_head_calls_equal_only_what_no_row_varies(study, row, differs, declared):
    book = json.loads((study / "study.json").read_text())
    [(name, changed)] = list(row.items())[:1]
    fields = [f"{part}.{field}" for part, tree in row.items() for field in tree]
    book["study"] |= {"rows": {"mmdit": row, "unet": {name: changed}}, "varies": fields if declared else ["seed"]}
    (study / "study.json").write_text(json.dumps(book))
    [said] = re.findall("everything else equal: (.*)", html(read_study(study), drawn=[]))
    every = ["data", "latents", "text tokens", "noise", "objective", "sampler", "budget"]
    assert said.split(", ") == [part for part in every if part not in differs]


@pytest.mark.parametrize(("seeds", "said"), [(5, True), (6, False)])
def test_five_pairs_are_said_to_be_too_few_for_a_small_permutation_p(tmp_path, seeds, said):
    folder = write_study(tmp_path, seeds=tuple(range(seeds)))
    book = json.loads((folder / "study.json").read_text())
    book["study"]["claims"]["pairs"] = "seeds"
    (folder / "study.json").write_text(json.dumps(book))
    page = " ".join(html(read_study(folder), drawn=[]).split())
    assert ("5 pairs of seeds give no permutation p below 0.062" in page) == said
    assert min(claim["permutation"] for claim in summary(read_study(folder))["claims"]) == 2 / 2**seeds


@pytest.mark.parametrize(("rule", "method"), [("seeds", "paired t over seeds"), ("none", "Welch t over seeds")])
def test_what_is_said_of_new_prompts_pairs_seeds_where_the_verdict_does(tmp_path, rule, method):
    folder = write_study(tmp_path, seeds=(0, 1, 2))
    book = json.loads((folder / "study.json").read_text())
    book["study"]["claims"]["pairs"] = rule
    (folder / "study.json").write_text(json.dumps(book))
    tables = [
        [json.loads((folder / f"{row}-s{seed}/eval/tiny-000000003000.json").read_text()) for seed in (0, 1, 2)]
        for row in ("unet", "mmdit")
    ]
    images = [[cell["splits"]["seen"]["per_image"]["all_correct"] for cell in cells] for cells in tables]
    [claim] = [claim for claim in summary(read_study(folder))["claims"] if claim["split"] == "seen"]
    assert claim["new_prompts"] == mixed_difference(*images, pairs=rule == "seeds")
    assert f"Unit: the training seed. {method};" in html(read_study(folder), drawn=[])


def test_many_rows_stand_down_the_tables_each_with_a_colour_and_mark_of_its_own(tmp_path):
    folder = widen(write_study(tmp_path, seeds=(0, 1)), 9)
    page = write_report(folder).read_text()
    rows = read_study(folder).rows
    styles = row_styles([f"row{i}" for i in range(24)])
    assert len({style.colour for style in list(styles.values())[:12]}) == 12
    assert len(set(styles.values())) == 24
    for row in rows:  # once in the table of each split, of costs, of each budget
        look = row_styles(rows)[row]
        mark = f'<span class="mark" style="color:{look.colour}">{look.character}</span>{row}</td>'
        assert page.count(mark) == 2 + 1 + 3
    assert page.count("crossdit_decoupled") == 0
    assert "row_<wbr>8</th>" in page  # a narrow head breaks and is not cut
    assert "varied: model.name, model.depth" not in page  # the field of `varies`, not its leaves
    assert "varied: model ·" in page
    assert "Held-out combinations only. Lines: means over seeds." in page
    table = markdown(read_study(folder))
    assert table.startswith("Seen combinations:\n\n| | 95 % interval | all correct | CLIP-score | Fréchet |")
    assert len([line for line in table.splitlines() if line.startswith("| row_")]) == 2 * 7
    words = verdict(read_study(folder))
    assert not any(sentence.startswith("All correct, seen") for sentence in words)  # the table says it better


def test_a_few_rows_stand_across_the_table_with_their_values_in_words(study):
    page = html(read_study(study))
    assert 'class="part"' in page
    assert "row_tables" not in page
    assert any(sentence.startswith("All correct, seen") for sentence in verdict(read_study(study)))
    assert "Held-out combinations only" not in page


def test_pictures_of_ones_own_are_not_called_combinations(study):
    book = json.loads((study / "study.json").read_text())
    for kept in book["rows"].values():
        kept["data"] = "images"
    (study / "study.json").write_text(json.dumps(book))
    for file in [*study.glob("*/eval/*.json"), study / "ceiling.json"]:
        result = json.loads(file.read_text())
        for part in ("splits", "prefix"):
            result.get(part, {}).pop("heldout", None)
        file.write_text(json.dumps(result))
    page = html(read_study(study))
    assert "Pictures kept out of training" in page
    assert "combinations" not in re.sub(r"base64,[^\"]*", "", page)


def test_figures_stand_beside_the_report(study):
    write_report(study)
    sizes = {}
    for file in study.glob("*.png"):
        with Image.open(file) as picture:
            picture.load()
            sizes[file.name] = picture.size
    assert {"grid-seen.png", "grid-heldout.png", "figure-1.png", "figure-2.png"} <= sizes.keys()
    assert min(min(size) for size in sizes.values()) > 200


def test_a_finished_study_is_stored_without_weights_and_replaces_what_was_there(study, tmp_path):
    with pytest.raises(FileNotFoundError, match="finish the study first"):
        store_study(study, tmp_path / "results")
    write_report(study)
    (study / "mmdit-s0" / "checkpoints").mkdir()
    (study / "mmdit-s0" / "checkpoints" / "model.safetensors").write_bytes(b"0")
    name = json.loads((study / "summary.json").read_text())["study"]
    old = tmp_path / "results" / name / "old.json"
    old.parent.mkdir(parents=True)
    old.write_text("{}")
    out = store_study(study, tmp_path / "results")
    stored = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    wanted = {"summary.json", "report.html", "grid-seen.png", "mmdit-s0/eval/tiny-000000003000.json"}
    assert wanted | {"unet-s0/metrics.jsonl"} <= stored
    # those that the grid shows
    assert {name.split("/")[0] for name in stored if "/samples/" in name} == {"mmdit-s0", "unet-s0"}
    assert out.joinpath("grid-seen.png").read_bytes() == study.joinpath("grid-seen.png").read_bytes()
    assert "old.json" not in stored
    assert not any(name.endswith(".safetensors") for name in stored)
    assert summary(read_study(out)) == summary(read_study(study))  # the report can be made from what was stored
    assert "100.0 %" in markdown(read_study(out))  # the ceiling
    with pytest.raises(ValueError, match="stored already"):
        store_study(out, tmp_path / "results")
    assert (out / "summary.json").is_file()
    broken = json.loads((study / "summary.json").read_text())
    (study / "summary.json").write_text(json.dumps({**broken, "study": ".."}))
    with pytest.raises(ValueError, match="no folder name"):
        store_study(study, tmp_path / "results")
    assert (out / "summary.json").is_file()


def test_pictures_are_stored_of_the_seed_that_the_grid_shows(tmp_path):
    study = write_study(tmp_path / "pretend", seeds=(3, 1))
    write_report(study)
    out = store_study(study, tmp_path / "results")
    assert {file.parts[-4] for file in out.glob("*/samples/*/*.png")} == {"mmdit-s3", "unet-s3"}
    shown = {str(grid) for grid in grids(read_study(study))}
    assert shown == {str(grid) for grid in grids(read_study(out))}
    drawn = [line["pictures"][2:] for grid in grids(read_study(out)) for line in grid["lines"]]
    assert all(picture for pictures in drawn for _, picture in pictures)


def judge_otherwise(run, suite, guidance, seen=3000):
    """Leave a result of another suite in a run's folder, as a guidance sweep does, and the sweep's own table."""
    result = json.loads((run / "eval" / "tiny-000000003000.json").read_text())
    result.update(suite=suite, images_seen=seen)
    result["stamp"] = {**STAMP, "inference": {**STAMP["inference"], "sampling.guidance_scale": guidance}}
    for split in result["splits"].values():
        split["scores"]["all_correct"]["value"] = 0.123
    (run / "eval" / f"{suite}-{seen:012d}.json").write_text(json.dumps(result))
    table = {"run": run.name, "images_seen": seen, "splits": {"seen": {"num_images": 40}}, "stamp": STAMP, "points": []}
    (run / "eval" / f"tiny-sweep-{seen:012d}.json").write_text(json.dumps(table))


def test_what_a_sweep_or_another_suite_left_in_a_cell_enters_neither_report_nor_store(study, tmp_path):
    before = summary(read_study(study))
    for run in (study / "mmdit-s0", study / "unet-s0"):
        judge_otherwise(run, "tiny-guidance-8", 8.0)
        judge_otherwise(run, "zz", 1.0)
    assert summary(read_study(study)) == before
    write_report(study)
    out = store_study(study, tmp_path / "results")
    assert (out / "mmdit-s0" / "samples" / "tiny-000000003000" / "seen-000.png").is_file()


def test_a_run_folder_is_compared_by_its_last_checkpoint_whatever_file_is_newest(study):
    run = study / "mmdit-s0"
    files = sorted((run / "eval").glob("*.json"))
    os.utime(files[0], (2e9, 2e9))  # a snapshot that a checkout or a copy has put down last
    assert find_result(run)["images_seen"] == 3000
    judge_otherwise(run, "tiny-guidance-8", 8.0, seen=2000)
    os.utime(run / "eval" / "tiny-sweep-000000002000.json", (2e9, 2e9))  # a sweep's table is no result of one run
    assert find_result(run)["suite"] == "tiny"


def test_a_split_smaller_than_a_snapshot_keeps_its_last_point_and_its_own_count(study):
    for file in study.glob("*/eval/tiny-000000003000.json"):  # as where there are few held-out combinations
        result = json.loads(file.read_text())
        del result["prefix"]["heldout"]
        result["splits"]["heldout"]["num_images"] = 12
        file.write_text(json.dumps(result))
    files = read_study(study)
    assert [images for images, _, splits in files.judged[0].points if "heldout" in splits] == [1000, 2000, 3000]
    page = html(files)
    assert "40 pictures of seen combinations, 12 pictures of held-out combinations" in page
    values = [line["values"]["heldout.all_correct"] for table in equal_budgets(files) for line in table["rows"]]
    assert len(values) == 6
    assert None not in values


def test_a_budget_that_one_row_alone_was_judged_at_is_left_out(study):
    log = study / "mmdit-s0/metrics.jsonl"  # as where the machine did other work in between
    lines = [json.loads(line) for line in log.read_text().splitlines()[:-1]]
    log.write_text("\n".join(json.dumps({**line, "seconds": line["seconds"] + 1_000}) for line in lines))
    assert [table["axis"] for table in equal_budgets(read_study(study))] == ["images", "flops"]
    assert "1,000 s of training" not in html(read_study(study))


def test_prompts_are_escaped(study):
    page = html(read_study(study))
    assert "a &lt;b&gt;blue&lt;/b&gt; star &amp; more" in page
    assert "<b>blue" not in page


def test_the_table_shows_the_stored_values_and_the_ceiling(study):
    files = read_study(study)
    stored = json.loads((study / "mmdit-s0/eval/tiny-000000003000.json").read_text())
    value = stored["splits"]["seen"]["scores"]["all_correct"]["value"]
    line = next(line for line in markdown(files).splitlines() if line.startswith("| all correct"))
    assert f"{100 * value:.1f} %" in line
    assert "100.0 %" in line
    assert summary(files)["scores"]["mmdit"]["seen"]["all_correct"]["value"] == value


def test_the_csv_holds_every_number_unrounded(study):
    rows = list(csv.DictReader(io.StringIO(csv_table(read_study(study)))))
    assert len(rows) == 2 * 3 * 2 * 3  # rows of the study, checkpoints, splits, scores
    stored = json.loads((study / "unet-s0/eval/tiny-000000001000.json").read_text())
    found = [r for r in rows if r["row"] == "unet" and r["images_seen"] == "1000" and r["score"] == "frechet"]
    assert float(found[0]["value"]) == stored["splits"]["seen"]["scores"]["frechet"]["value"]


def test_seconds_come_from_the_log_and_budgets_from_the_slower_row(study):
    files = read_study(study)
    assert [point[1] for point in files.judged[0].points] == pytest.approx([1000 / 700, 2000 / 700, 3000 / 700])
    images, flops, seconds = equal_budgets(files)
    assert images["budget"] == 3000
    assert flops["budget"] == 3 * 300_000_000 * 3000
    assert flops["rows"] == images["rows"]  # both rows cost the same a forward
    assert seconds["budget"] == pytest.approx(3000 / 700)
    unet = files.of("unet")[0]
    first, second = (unet.points[i][2]["seen"]["scores"]["all_correct"]["value"] for i in (0, 1))
    assert at_budget(files, unet, "seen", "all_correct", "seconds", 1500 / 350) == pytest.approx((first + second) / 2)
    assert at_budget(files, unet, "seen", "all_correct", "images", 500) is None
    assert cost_table(files)[1]["images_per_second"] == pytest.approx(350)


def slow(study, name, factor):
    """Make a cell's training take longer, as beside other work."""
    log = study / name / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    log.write_text("\n".join(json.dumps({**line, "seconds": line["seconds"] * factor}) for line in lines))


def test_a_seed_that_trained_beside_other_work_moves_no_time_and_is_told(tmp_path):
    study = write_study(tmp_path, seeds=(0, 1, 2))
    own = "Training seconds: the median over seeds, and where they differ their range."
    assert seconds_note(read_study(study)) == own
    slow(study, "mmdit-s1", 1.45)
    assert seconds_note(read_study(study)) == own  # less than half as long again
    slow(study, "mmdit-s1", 16 / 1.45)
    slow(study, "mmdit-s2", 1.2)
    files = read_study(study)
    mmdit, unet = cost_table(files)
    alone = 3000 / 700
    assert mmdit["seconds"] == pytest.approx(1.2 * alone)  # a mean would be 6 times as long
    assert mmdit["seconds_range"] == pytest.approx([alone, 16 * alone])
    assert mmdit["images_per_second"] == pytest.approx(700 / 1.2)
    assert mmdit["images_per_second_range"] == pytest.approx([700 / 16, 700])
    assert unet["seconds_range"] == pytest.approx([3000 / 350] * 2)
    for cell in files.of("mmdit"):  # the figure's clock, and that of equal budgets
        assert [cost for cost, _ in spent(files, cell, "seconds")] == pytest.approx(
            [0.4 * alone, 0.8 * alone, 1.2 * alone]
        )
    assert equal_budgets(files)[2]["budget"] == pytest.approx(1.2 * alone)
    told = (
        "Seconds of one row differ up to 16 times between seeds: the machine did other work; they do not compare rows."
    )
    page = html(files)
    assert '<td>5<span class="interval">4 – 69</span></td>' in page
    assert '<td>9<span class="interval"></span></td>' in page
    assert page.count(told) == 2 + 2  # costs, equal budgets, a figure each of all correct and Fréchet
    assert summary(files)["seconds_note"] == f"{own} {told}"


def test_one_seed_has_no_range_of_seconds(study):
    files = read_study(study)
    assert cost_table(files)[0]["seconds_range"] is None
    assert seconds_note(files) == ""
    assert '<td>4<span class="interval"></span></td>' in html(files, drawn=[])


def test_a_row_that_reads_the_pooled_vector_alone_has_no_text_tokens(study):
    for row, injection in (("mmdit", "joint"), ("unet", "pooled")):
        (study / f"{row}-s0/config.yaml").write_text(yaml.safe_dump({"model": {"injection": injection}}))
    assert [line["tokens"] for line in cost_table(read_study(study))] == [20, 0]


def test_each_row_says_what_its_intervals_are_over(tmp_path):
    folder = write_study(tmp_path, seeds=(0, 1, 2))
    for seed in (1, 2):
        for path in (folder / f"unet-s{seed}/eval").glob("*.json"):
            path.write_text("{ damaged")
    files = read_study(folder)
    assert markdown(files).splitlines()[2] == "| 95 % interval |" + 2 * (
        " 3 seeds | between samples only | between samples only |"
    )
    lines = latex(files).splitlines()
    assert lines[2].startswith(r" & 95 \% interval & all correct, seen & ")
    assert lines[4].startswith("mmdit & 3 seeds & ")
    assert lines[5].startswith("unet & between samples only & ")
    page = html(files)
    over = re.search(r'<tr class="over">(.*?)</tr>', page).group(1)
    assert re.findall(r"<td[^>]*>(.*?)</td>", over) == [
        "95 % interval",
        *2 * ["3 seeds", *2 * ["between samples only"]],
    ]
    assert "its 95 % interval, over training seeds; of unet between samples only (one seed)." in page
    wide = widen(write_study(tmp_path / "wide", seeds=(0, 1)), 9)
    for path in (wide / "row_3-s1/eval").glob("*.json"):
        path.unlink()
    table = markdown(read_study(wide))
    assert table.startswith("Seen combinations:\n\n| | 95 % interval | all correct |")
    assert table.count("| row_2 | 2 seeds | ") == table.count("| row_3 | between samples only | ") == 2
    assert table.count("| ceiling | between samples only | ") == 2
    page = html(read_study(wide), drawn=[])
    assert page.count('row_3</td>\n<td class="quiet">between samples only</td>') == 2


def test_the_table_in_latex_holds_no_sign_that_pdflatex_does_not_know(study):
    assert latex_text("Fréchet, N → ∞ × −1 & 5 % of a_b #2") == (
        r"Fréchet, N $\to$ $\infty$ $\times$ $-$1 \& 5 \% of a\_b \#2"
    )
    assert latex_text("90.1 – 96.0") == "90.1--96.0"
    for file in study.glob("*/eval/*.json"):  # every score there is, some of it below zero
        result = json.loads(file.read_text())
        value = {"value": -0.5, "low": -0.6, "high": 0.4, "n": 9, "method": "t"}
        for split in result["splits"].values():
            split["scores"] = {score: value for score in SCORES}  # noqa: C420
        file.write_text(json.dumps(result))
    text = latex(read_study(study))
    assert r"Fréchet, N $\to$ $\infty$, seen" in text
    assert "$-$50.0 \\% [$-$60.0--40.0]" in text
    strange = {sign for sign in text if ord(sign) > 127}
    assert strange == {"é"}
    assert all(unicodedata.name(sign).startswith("LATIN") and sign.isalpha() for sign in strange)
    assert not re.search(r"(?<!\\)[%#_]", text)
    for line in text.splitlines()[2:-2]:
        assert line == r"\midrule" or line.count("&") == 1 + 2 * len(SCORES)


def test_one_seed_ranks_nothing_and_several_are_compared_seed_by_seed(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "three").mkdir()
    one = verdict(read_study(write_study(tmp_path / "one")))
    three = verdict(read_study(write_study(tmp_path / "three", seeds=(0, 1, 2))))
    assert any("One seed ranks nothing" in sentence for sentence in one)
    assert not any("One seed ranks nothing" in sentence for sentence in three)
    assert three[0].startswith("No difference shown between unet and mmdit")
    assert "3 seeds" in three[0]
    assert "this study could have shown" in three[0]
    assert any("between samples only" in sentence for sentence in one)
    files = read_study(tmp_path / "three")
    values = [cell.result["splits"]["seen"]["scores"]["all_correct"]["value"] for cell in files.of("mmdit")]
    assert estimate(files.of("mmdit"), "seen", "all_correct")["value"] == pytest.approx(np.mean(values))
    assert estimate(files.of("mmdit"), "seen", "all_correct")["n"] == 3


def test_a_failed_cell_is_listed_and_the_others_are_shown(tmp_path):
    page = write_report(write_study(tmp_path, failed="unet-s0")).read_text()
    assert "training ended with exit code 1" in page
    assert summary(read_study(tmp_path))["cells"]["unet-s0"]["status"] == "failed"


@pytest.mark.parametrize(("padding", "said"), [("mask", True), ("attend", False)])
def test_a_masked_null_is_said_to_leave_little_to_subtract(study, padding, said):
    [file] = (study / "unet-s0" / "eval").glob("tiny-000000003000.json")
    result = json.loads(file.read_text())
    settings = {"sampling.negative_guidance": "kv_subtract", "encoders.padding": padding}
    result["stamp"] = {**result["stamp"], "inference": {**result["stamp"]["inference"], **settings}}
    file.write_text(json.dumps(result))
    book = json.loads((study / "study.json").read_text())
    book["study"]["varies"] = list(settings)
    (study / "study.json").write_text(json.dumps(book))
    assert any(line.startswith("The negative text of unet is") for line in verdict(read_study(study))) == said


def test_no_verdict_stands_on_a_failed_cell(tmp_path):
    """Its results may be of another config: of the study before a field was changed."""
    folder = write_study(tmp_path, seeds=(0, 1, 2))
    book = json.loads((folder / "study.json").read_text())
    for seed in (1, 2):
        book["cells"][f"unet-s{seed}"].update(status="failed", reason="holds a run with another config")
    (folder / "study.json").write_text(json.dumps(book))
    files = read_study(folder)
    assert [cell.folder.name for cell in files.of("unet")] == ["unet-s0"]
    [claim] = [claim for claim in summary(files)["claims"] if claim["split"] == "seen"]
    assert (claim["verdict"], claim["seeds"]) == ("one seed", (1, 3))
    assert any("Not judged: unet-s1, unet-s2" in line for line in verdict(files))
    assert "holds a run with another config" in html(files, drawn=[])


def test_missing_cells_do_not_make_the_correction_milder(tmp_path):
    folder = widen(write_study(tmp_path, seeds=(0, 1, 2)), 5)
    whole = {(c["first"], c["split"]): c for c in summary(read_study(folder))["claims"]}
    assert len(whole) == 8
    for path in folder.glob("row_[34]-s?/eval/*.json"):
        path.unlink()
    files = read_study(folder)
    rest = {(c["first"], c["split"]): c for c in summary(files)["claims"]}
    assert len(rest) == 4
    smallest = min(rest.values(), key=lambda claim: claim["p"])
    assert smallest["p_holm"] == pytest.approx(min(1.0, 8 * smallest["p"]))
    assert smallest["detectable"] == pytest.approx(whole[smallest["first"], smallest["split"]]["detectable"])
    assert any(
        line.startswith("8 comparisons were stated beforehand") and "4 of them could not be tested" in line
        for line in verdict(files)
    )


def test_a_cell_that_was_judged_before_its_training_ended_is_named(study):
    assert not any("was judged at" in line for line in verdict(read_study(study)))
    last = study / "unet-s0" / "eval" / "tiny-000000003000.json"  # as where the last checkpoint is damaged: the one
    judged = {**json.loads(last.read_text()), "images_seen": 2000}  # before it is judged in full, under an equal stamp
    last.with_name("tiny-000000002000.json").write_text(json.dumps(judged))
    last.unlink()
    assert any("unet-s0 was judged at 2,000 of its 3,000 images" in line for line in verdict(read_study(study)))


def test_a_study_without_any_result_still_has_a_report(tmp_path):
    write_study(tmp_path)
    for result in tmp_path.glob("*/eval/*.json"):
        result.write_text("{ damaged")
    assert "No cell of this study has been judged yet" in write_report(tmp_path).read_text()


def test_unlike_stamps_are_refused_by_name(study):
    a, b = (json.loads((study / f"{row}-s0/eval/tiny-000000003000.json").read_text()) for row in ("mmdit", "unet"))
    b["stamp"] = {"protocol": {**STAMP["protocol"], "seed": 2}, "inference": {"sampling.num_steps": 50}}
    with pytest.raises(ValueError, match=r"protocol.seed: 1 and 2.*inference.sampling.num_steps: 20 and 50"):
        check_comparable(a, b)
    with pytest.raises(ValueError, match=r"protocol\.seed") as refused:
        check_comparable(a, b, varies=("sampling", "protocol"))  # a protocol cannot be varied
    assert "num_steps" not in str(refused.value)
    (study / "unet-s0/eval/tiny-000000003000.json").write_text(json.dumps(b))
    assert any("not comparable" in sentence for sentence in verdict(read_study(study)))


@pytest.mark.parametrize("version", [2, 3])
def test_kernel_distances_of_before_partners_were_left_out_are_named_so(study, version):
    for file in study.glob("*/eval/tiny-000000003000.json"):
        result = json.loads(file.read_text())
        result["stamp"]["protocol"]["version"] = version
        for split in result["splits"].values():
            split["scores"]["kernel"] = split["scores"]["frechet"]
        file.write_text(json.dumps(result))
    told = [line for line in verdict(read_study(study)) if line.startswith("Kernel distances are those of protocol 2")]
    assert len(told) == (version == 2)


def test_a_comparison_is_paired_by_prompt(study):
    a, b = (json.loads((study / f"{row}-s0/eval/tiny-000000003000.json").read_text()) for row in ("mmdit", "unet"))
    found = compare(a, b)["seen"]["all_correct"]
    x, y = (np.array(r["splits"]["seen"]["per_image"]["all_correct"]) for r in (a, b))
    assert found["value"] == pytest.approx((x - y).mean())
    assert found["low"] <= found["value"] <= found["high"]
    assert compare(a, a)["seen"]["all_correct"]["value"] == 0


def test_a_folder_without_a_study_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the study first"):
        read_study(tmp_path)


def test_the_study_in_the_page_can_be_run_again(study):
    page = html(read_study(study))
    text = re.search(r"<summary>Study</summary><pre>(.*?)</pre>", page, re.S).group(1)
    assert yaml.safe_load(text)["rows"]["unet"] == {"model": {"name": "unet"}}
