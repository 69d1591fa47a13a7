"""Rows: listed and as a product of axes, named, budgeted, matched, sharing a training; and what is refused."""

import json

import pytest
import yaml
from mmdit_eval.book import FORMAT, read_book
from mmdit_eval.cost import drawing_cost
from mmdit_eval.metrics import METRICS
from mmdit_eval.plan import STATED_RATE, cell_seconds, checkpoints_kept, disk_bytes, make_plan
from mmdit_eval.scores import SCORES
from mmdit_eval.study import run_study

from mmdit.config import (
    CONDITIONING_AXES,
    ConfigError,
    StudyConfig,
    confounded_rows,
    load_study,
    merge,
    parse_overrides,
    row_configs,
    to_tree,
    trainings,
)


@pytest.fixture
def write(tmp_path, micro):
    """A function of changes to a study of one micro run; it gives the study's file."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(to_tree(micro())))

    def write(**changes):
        suite = {"name": "mini", "metrics": ["frechet"], "num_images": 4, "extractor": "pixel_statistics"}
        tree = {"name": "mini", "base": "base.yaml", "rows": {"plain": {}}, "match": None, "suite": suite}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump({**tree, **changes}, sort_keys=False))
        return tmp_path / "study.yaml"

    return write


def load(file, *words):
    return load_study(file, words)


def test_a_factorial_is_the_product_of_its_axes_with_readable_names(write, micro_unet):
    file = write(
        rows={"plain": None},
        factorial={
            "backbone": {"mmdit": {}, "unet": {"model": micro_unet}},
            "encoders.padding": ["mask", "trim"],
            "encoders.t5_length": [16, 24],
        },
    )
    cells = row_configs(load(file))
    assert list(cells)[:3] == ["mmdit+mask+t5_length=16", "mmdit+mask+t5_length=24", "mmdit+trim+t5_length=16"]
    assert len(cells) == 2 * 2 * 2 + 1
    config = cells["unet+trim+t5_length=16"][0]
    assert (config.model.name, config.encoders.padding, config.encoders.t5_length) == ("unet", "trim", 16)
    assert list(cells)[-1] == "plain"


def test_equal_values_of_two_axes_are_told_apart_by_their_fields(write):
    file = write(rows={}, factorial={"diffusion.prediction": ["velocity", "v"], "encoders.padding": ["mask"]})
    assert list(row_configs(load(file))) == ["velocity+mask", "v+mask"]
    both = StudyConfig(name="x", base=file, factorial={"a.b": ["on"], "c.d": ["on"]})
    from mmdit.config import all_rows

    assert list(all_rows(both)) == ["b=on+d=on"]
    assert list(all_rows(StudyConfig(name="x", base=file, factorial={"model.qk_norm": [None, "rms"]}))) == [
        "qk_norm=none", "qk_norm=rms",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": {}, "factorial": {}}, "at least one row"),
        ({"rows": {"a/b": {}}}, "cannot be a folder's"),
        ({"rows": {"mask": {}}, "factorial": {"encoders.padding": ["mask"]}}, "'mask' stands twice"),
        ({"rows": {}, "factorial": {"encoders.padding": []}}, "has no values"),
        ({"rows": {}, "factorial": {"which": {"a": 3}}}, r"factorial\.which\.a: expected overrides"),
        ({"rows": {}, "factorial": {"encoders.paddin": ["mask"]}}, "did you mean 'encoders.padding'"),
        ({"rows": {}, "factorial": {"train.lr": [0.1, 0.2]}}, r"differs from row .* in train\.lr"),
        ({"claims": {"against": "plian"}}, "did you mean 'plain'"),
        ({"match": {"reference": "plian"}}, "did you mean 'plain'"),
        ({"rows": {"a": {"train": {"images": 8}}}, "budget": {"amount": 16}}, "a budget of its own"),
        ({"rows": {"a": {}, "b": None}}, "rows 'a' and 'b' are one and the same config"),
        ({"rows": {"a": {}, "b": {"seed": 0}}, "seeds": [3, 4]}, "rows 'a' and 'b' are one and the same config"),
        ({"rows": {"plain": {}}, "factorial": {"encoders.t5_length": [16, 32]}}, "rows 't5_length=32' and 'plain' are"),
        ({"rows": {"a": {"encoders": {"use": ["t5"], "dropout": {"clip_g": 0.5}}}}}, r"row 'a': .*dropout\.clip_g"),
        (
            {"varies": ["model", "encoders.paddin"]},
            "study.yaml: varies: 'encoders.paddin' is no field of a run; did you mean 'encoders.padding'",
        ),
        ({"varies": ["model.naem"]}, "'model.naem' is no field of a run; did you mean 'model.name'"),
        ({"varies": ["models"]}, "did you mean 'model'"),
        ({"varies": ["padding"]}, r"did you mean 'encoders\.padding'"),
        ({"varies": [""]}, "'' is no field of a run. Sections: name, seed, model, encoders"),
        ({"varies": ["model."]}, "is no field of a run"),
        ({"varies": ["train.more_emas.long.dcay"]}, "is no field of a run; did you mean 'train.more_emas.decay'"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [0, 0]}, "listed twice"),
        ({"seeds": 3}, r"seeds: expected a list, got 3; write --seeds \[0,1,2\]"),
    ],
)
def test_what_cannot_be_a_study_is_refused_in_words(write, changes, message):
    with pytest.raises(ConfigError, match=message):
        row_configs(load(write(**changes)))


def test_a_mistake_in_a_row_names_the_study_and_one_in_the_base_the_base(write, tmp_path):
    file = write(rows={"plain": {}, "other": {"train": {"batch_sise": 4}}})
    for plan in (lambda: row_configs(load(file), str(file)), lambda: make_plan(load(file), str(file))):
        with pytest.raises(ConfigError, match=rf"^{file}, row 'other': train\.batch_sise: unknown field"):
            plan()
    with pytest.raises(ConfigError, match=rf"^{file}, row 'other'"):
        run_study(file, out=tmp_path / "runs", dry_run=True)
    base = yaml.safe_load((tmp_path / "base.yaml").read_text())
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**base, "sed": 3}))
    with pytest.raises(ConfigError, match=rf"^{tmp_path / 'base.yaml'}: sed: unknown field"):
        row_configs(load(file), str(file))


def test_every_field_and_section_of_every_variant_can_be_named_in_varies(write):
    named = ["model.text_stages", "model.dual_attention_layers", "data.val_fraction", "diffusion.density.scale",
             "diffusion.schedule.betas", "sampling.nag.tau", "encoders.dropout.t5", "train",
             "train.more_emas.long.decay"]  # fmt: skip
    for paths in (named, CONDITIONING_AXES):
        assert load(write(varies=list(paths))).varies == tuple(paths)


def test_a_budget_that_ends_within_the_warm_up_is_told_with_the_rows_that_it_concerns(write):
    file = write(rows={"plain": {}, "v": {"diffusion": {"prediction": "v"}}}, budget={"amount": 8})
    told = "plain, v: the budget of 8 images ends within the warm-up of 16, so the learning rate never reaches 0.001"
    assert any(remark.startswith(told) for remark in make_plan(load(file)).remarks)
    assert not any("warm-up" in remark for remark in make_plan(load(file, "--budget.amount", "16")).remarks)
    seconds = make_plan(load(file, "--budget", "{by: seconds, amount: 1}"))
    assert not any("warm-up" in remark for remark in seconds.remarks)


def test_a_field_of_a_run_in_a_study_is_told_its_place(write):
    with pytest.raises(ConfigError, match=r"data belongs to a run, .*overrides: \{data: \.\.\.\}"):
        load(write(data={"name": "shapes"}))


def test_a_row_written_twice_is_refused_by_name(write):
    file = write()
    file.write_text(file.read_text().replace("rows:\n  plain: {}", "rows:\n  plain: {}\n  plain: {}"))
    with pytest.raises(ConfigError, match=rf"{file.name}, line \d+: the key 'plain' stands twice"):
        load(file)


@pytest.mark.parametrize("field", ["depth", "patch_size"])
def test_a_row_of_the_same_backbone_may_not_change_its_size_and_another_backbone_may(write, micro_unet, field):
    file = write(rows={"plain": {}, "unet": {"model": micro_unet}, "shared": {"model": {"weight_sets": 1}}})
    assert confounded_rows(load(file), row_configs(load(file))) == {}
    file = write(rows={"plain": {}, "other": {"model": {field: 1}}})
    with pytest.raises(ConfigError, match=rf"'other' differs from row 'plain' in model\.{field}, which is outside"):
        row_configs(load(file))
    assert list(row_configs(load(file, "--varies", "[model]"))) == ["plain", "other"]


def test_a_claim_that_nothing_would_decide_is_refused(write):
    with pytest.raises(ConfigError, match=r"'same_tone', which suite\.metrics \['frechet'\] do not.*add 'retrieval'"):
        make_plan(load(write(claims={"scores": ["same_tone"]})))
    assert all(set(metric.scores) <= set(SCORES) and metric.scores for metric in METRICS.values())


def test_losses_of_different_targets_are_not_claimed_and_not_silently_compared(write):
    changed = {
        "rows": {"flow": {}, "v": {"diffusion": {"prediction": "v"}}},
        "suite": {"name": "mini", "metrics": ["frechet", "validation_loss"], "num_images": 4,
                  "extractor": "pixel_statistics"},
    }  # fmt: skip
    assert any(
        "2 targets" in remark and "common_loss" in remark for remark in make_plan(load(write(**changed))).remarks
    )
    with pytest.raises(ConfigError, match="'validation_loss', but rows are trained on 2 targets"):
        make_plan(load(write(**changed, claims={"scores": ["validation_loss"]})))


def test_a_confounded_row_is_named_when_it_is_allowed(write):
    file = write(rows={"plain": {}, "fast": {"train": {"lr": 0.01}}}, allow_confounded=True)
    study = load(file)
    assert confounded_rows(study, row_configs(study)) == {"fast": ["train.lr"]}
    assert make_plan(study).describe("fast")["confounded"] == ["train.lr"]


def test_rows_that_differ_in_sampling_only_share_a_training(write):
    rows = {
        "w1": {"sampling": {"guidance_scale": 1.0}},
        "w4": {"sampling": {"guidance_scale": 4.0}},
        "mask": {"encoders": {"padding": "mask"}, "sampling": {"guidance_scale": 4.0}},
    }
    study = load(write(rows=rows))
    assert trainings(row_configs(study)) == {"w1": "w1", "w4": "w1", "mask": "mask"}
    with pytest.raises(ConfigError, match="would judge them all alike"):
        row_configs(load(write(rows=rows), "--suite.sampling.num_steps", "3"))


def test_a_budget_in_images_seconds_or_flops(write):
    images = row_configs(load(write(budget={"amount": 32})))["plain"][0]
    assert images.train.images == 32
    seconds = row_configs(load(write(budget={"by": "seconds", "amount": 2.5})))["plain"][0]
    assert seconds.train.seconds == 2.5
    rows = {"plain": {}, "deep": {"model": {"depth": 4}}}
    plan = make_plan(load(write(rows=rows, varies=["model"], budget={"by": "flops", "amount": 2.0e8})))
    for row in rows:
        spent = 3 * plan.costs[row].flops * plan.first(row).train.images
        assert 0 <= 2.0e8 - spent < 3 * plan.costs[row].flops * plan.first(row).train.batch_size
    assert plan.first("plain").train.images > plan.first("deep").train.images
    with pytest.raises(ConfigError, match="less than one batch"):
        make_plan(load(write(budget={"by": "flops", "amount": 10.0})))


def test_widths_are_solved_until_rows_agree(write):
    rows = {"plain": {"model": {"width": 64, "num_heads": 4}}, "deep": {"model": {"depth": 4}}}
    for by in ("parameters", "flops"):
        plan = make_plan(load(write(rows=rows, varies=["model"], match={"by": by, "within": 0.02, "solve": True})))
        sizes = [getattr(plan.costs[row], by) for row in rows]
        assert abs(sizes[1] / sizes[0] - 1) <= 0.02
        assert "mlp_ratio" in plan.describe("deep")["match"]
        assert all(c.model == plan.first("deep").model for c in plan.cells["deep"].values())
    study = load(write(rows=rows, varies=["model"], match={"within": 1e-6, "solve": True}))
    with pytest.raises(ConfigError, match=r"row 'deep'.*nearest"):
        make_plan(study)


def test_steps_are_solved_for_equal_flops_a_picture(write):
    rows = {
        "guided": {"sampling": {"guidance_scale": 4.0, "num_steps": 10}},
        "plain": {"sampling": {"guidance_scale": 1.0}},
    }
    plan = make_plan(load(write(rows=rows, equal_flops=True)))
    assert [plan.first(row).sampling.num_steps for row in rows] == [10, 20]
    assert [plan.costs[row].evaluations for row in rows] == [20, 20]


def test_evaluations_of_a_picture(write):
    plan = make_plan(load(write()))
    config, cost = plan.first("plain"), plan.costs["plain"]

    def drawn(**sampling):
        changed = config.sampling.model_copy(update=sampling)
        return drawing_cost(config.model_copy(update={"sampling": changed}), cost)

    assert drawn(num_steps=8, guidance_scale=4.0)[3:] == (16, 16 * cost.flops)
    assert drawn(num_steps=8, guidance_scale=1.0).evaluations == 8
    assert drawn(num_steps=8, guidance_scale=1.0, sampler="heun").evaluations == 15
    nag = drawn(num_steps=8, negative_guidance="nag")
    assert nag.evaluations == 8
    assert 8 * cost.flops < nag.image_flops < 16 * cost.flops


def test_time_and_disk_are_told_beforehand(write):
    rows = {"a": {}, "b": {"sampling": {"guidance_scale": 1.0}}}
    plan = make_plan(load(write(rows=rows)))
    assert cell_seconds(plan, "a") == 3 * plan.costs["a"].flops * 48 / STATED_RATE
    assert cell_seconds(plan, "b") == disk_bytes(plan, "b") == 0
    assert disk_bytes(plan, "a") == 16 * plan.costs["a"].parameters * plan.first("a").train.keep_checkpoints
    assert disk_bytes(plan, "a") == 4 * disk_bytes(plan, "a", pruned=True)


# --- books ------------------------------------------------------------------------------------------------------


def test_a_book_of_an_older_version_is_filled_and_a_newer_or_broken_one_refused(write, tmp_path):
    folder = tmp_path / "runs" / "mini"
    folder.mkdir(parents=True)
    old = {
        "study": {"name": "mini", "suite": {}},
        "rows": {"a": {"parameters": 1, "flops": 1, "tokens": 1}},
        "cells": {},
    }
    (folder / "study.json").write_text(json.dumps(old))
    book = read_book(folder / "study.json")
    assert book["rows"]["a"]["trained_as"] == "a"
    assert book["study"]["claims"]["pairs"] == "auto"
    (folder / "study.json").write_text(json.dumps({**old, "format": FORMAT + 1, "mmdit_lab": "9.9"}))
    for attempt in (lambda: run_study(write(), out=tmp_path / "runs"), lambda: read_book(folder / "study.json")):
        with pytest.raises(ConfigError, match=r"newer version \(format 3, mmdit-lab 9\.9\)"):
            attempt()
    for text in ("{", "[]", '{"study": 3}', '{"study": 3, "rows": {}, "cells": {}}'):
        (folder / "study.json").write_text(text)
        with pytest.raises(ConfigError, match="not a study's book"):
            read_book(folder / "study.json")


def test_overrides_of_the_command_line_reach_new_fields(write):
    study = load(write(), "--claims.scores", "[relation]", "--budget.amount", "64")
    assert study.claims.scores == ("relation",)
    assert merge({}, parse_overrides(["--slurm.gpus", "0"])) == {"slurm": {"gpus": 0}}


@pytest.mark.parametrize(
    ("every", "keep", "keep_every"),
    [(16, 1, 16), (16, 2, 0), (24, 3, 12), (0, 2, 20), (0, 1, 0), (8, 2, 48), (8, 9, 8)],
)
def test_as_many_checkpoints_are_counted_as_a_run_keeps(micro, tmp_path, every, keep, keep_every):
    from mmdit.checkpoint import list_checkpoints
    from mmdit.train.trainer import train

    kept = {"checkpoint_every": every, "keep_checkpoints": keep, "keep_every": keep_every}
    config = micro({"train": {"images": 44, "batch_size": 4, "val_images": 1, **kept}})
    train(config, tmp_path, progress=False)
    assert checkpoints_kept(config.train) == len(list_checkpoints(tmp_path))
