"""A suite on a micro run: what is stored, what is skipped, what is refused."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from mmdit_eval import compare, suite
from mmdit_eval.comparison import read_result
from mmdit_eval.suite import evaluate_ceiling, evaluate_run, evaluate_snapshots, load_references

from mmdit.checkpoint import save_checkpoint, tensors_of
from mmdit.config import SamplingConfig, SuiteConfig
from mmdit.models import build_denoiser

ROOT = Path(__file__).resolve().parents[2]
METRICS = ("composition", "frechet", "kernel", "validation_loss")


def small(**fields):
    given = {"name": "s", "metrics": METRICS, "num_images": 6, "extractor": "pixel_statistics", "grid_prompts": 2}
    return SuiteConfig(**{**given, **fields})


def silent(text):
    pass


@pytest.fixture
def run(tmp_path, micro):
    """A run folder with checkpoints at 16, 32 and 48 images."""
    import torch

    config = micro()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = build_denoiser(config.model)
        for images in (16, 32, 48):
            with torch.no_grad():
                for parameter in denoiser.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
            tensors = {"model": tensors_of(denoiser), "ema": tensors_of(denoiser)}
            state = {"images_seen": images, "complete": images == 48, "seconds": 1.0}
            save_checkpoint(tmp_path / "run", images, tensors, state, config)
    return tmp_path / "run"


def test_a_result_holds_values_intervals_settings_and_hashes(run):
    result = evaluate_run(run, small(), say=silent)
    stored = json.loads((run / "eval" / "s-000000000048.json").read_text())
    assert stored == json.loads(json.dumps(result))
    assert set(result["splits"]) == {"seen", "heldout"}
    for split in result["splits"].values():
        assert split["num_images"] == 6
        for score in ("colour", "all_correct", "frechet", "kernel", "validation_loss"):
            estimate = split["scores"][score]
            assert np.isfinite(estimate["value"])
            assert estimate["n"] > 0
        assert len(split["details"]["loss_by_level"]) == len(split["details"]["levels"]) == 8
    assert result["stamp"]["protocol"]["extractor"]["name"] == "pixel_statistics"
    assert result["stamp"]["inference"]["sampling.num_steps"] == 2
    assert len(result["checkpoint_sha256"]) == 64
    assert all((run / file).is_file() for file in result["samples"])
    assert len(result["samples"]) == 4


def test_a_result_that_is_there_is_not_made_again_until_something_changes(run, monkeypatch):
    first = evaluate_run(run, small(), say=silent)
    drawn = []
    draw = suite.draw
    monkeypatch.setattr(suite, "draw", lambda *given: drawn.append(1) or draw(*given))
    assert evaluate_run(run, small(), say=silent) == json.loads(json.dumps(first))
    assert not drawn
    evaluate_run(run, small(num_images=5), say=silent)
    assert len(drawn) == 2
    (run / "eval" / "s-000000000048.json").write_text("{ half a fi")
    evaluate_run(run, small(num_images=5), say=silent)
    assert len(drawn) == 4


def test_results_do_not_depend_on_the_batch_size_and_repeat_exactly(run):
    references = load_references(suite.load_config(run / "checkpoints/000000000048/config.yaml"), small())
    whole = evaluate_run(run, small(), references=references, say=silent)
    parts = evaluate_run(run, small(name="parts", batch_size=4), references=references, say=silent)
    assert whole["stamp"] == parts["stamp"]
    for split, found in whole["splits"].items():
        for score, estimate in found["scores"].items():
            assert parts["splits"][split]["scores"][score]["value"] == pytest.approx(
                estimate["value"], rel=1e-3, abs=1e-4
            )
    again = evaluate_run(run, small(name="again"), say=silent)
    assert again["splits"] == whole["splits"]


def test_snapshots_judge_the_earlier_checkpoints_and_the_last_one_gets_as_many_pictures(run):
    config = small(snapshot_images=4)
    earlier = evaluate_snapshots(run, config, say=silent)
    last = evaluate_run(run, config, say=silent)
    assert [result["images_seen"] for result in earlier] == [16, 32]
    assert all(result["splits"]["seen"]["num_images"] == 4 for result in earlier)
    assert last["prefix"]["seen"]["num_images"] == 4
    prefix, whole = (last[part]["seen"]["per_image"]["validation_loss"] for part in ("prefix", "splits"))
    assert prefix == pytest.approx(whole[:4], abs=1e-5)
    assert earlier[0]["splits"]["seen"]["scores"] != earlier[1]["splits"]["seen"]["scores"]


def test_other_snapshots_give_the_last_point_of_a_curve_as_many_pictures_as_the_others(run):
    assert evaluate_run(run, small(snapshot_images=3), say=silent)["prefix"]["seen"]["num_images"] == 3
    evaluate_snapshots(run, small(snapshot_images=4), say=silent)
    last = evaluate_run(run, small(snapshot_images=4), say=silent)  # the same stamp: this is no part of it
    assert {split: found["num_images"] for split, found in last["prefix"].items()} == {"seen": 4, "heldout": 4}
    assert evaluate_run(run, small(snapshot_images=0), say=silent) == json.loads(json.dumps(last))


def test_a_damaged_snapshot_costs_its_point_alone(run):
    (run / "checkpoints/000000000016/ema.safetensors").write_bytes(b"damaged")
    said = []
    results = evaluate_snapshots(run, small(snapshot_images=4), say=said.append)
    assert [result["images_seen"] for result in results] == [32]
    assert any("left out of the curves" in text for text in said)


def test_the_ceiling_is_judged_like_a_run_and_kept(tmp_path, micro, monkeypatch):
    config = micro()
    out = tmp_path / "ceiling.json"
    ceiling = evaluate_ceiling(config, small(), out)
    found = ceiling["splits"]["seen"]
    assert {"all_correct", "frechet"} <= set(found["scores"])
    assert "validation_loss" not in found["scores"]
    assert all((tmp_path / file).is_file() for files in ceiling["samples"].values() for file in files)
    monkeypatch.setattr(suite, "measure", None)  # a second call must not come so far
    assert evaluate_ceiling(config, small(), out) == read_result(out)


def test_behind_a_perfect_vae_the_ceiling_is_perfect_in_every_score(tmp_path, micro, monkeypatch):
    monkeypatch.setattr(suite, "through_vae", lambda vae, images: images)
    scores = evaluate_ceiling(micro(), small(), tmp_path / "ceiling.json")["splits"]["seen"]["scores"]
    assert scores["all_correct"]["value"] == 1.0
    assert scores["frechet"]["value"] == pytest.approx(0.0, abs=1e-6)


def test_other_settings_give_a_stamp_that_is_refused_unless_the_study_varies_it(run):
    a = evaluate_run(run, small(), say=silent)
    b = evaluate_run(run, small(name="b", sampling=SamplingConfig(num_steps=3, guidance_scale=2.0)), say=silent)
    with pytest.raises(ValueError, match=r"inference\.sampling\.num_steps: 2 and 3"):
        compare(a, b)
    assert compare(a, b, varies=("sampling",))["seen"]["validation_loss"]["value"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match=r"protocol\.references\.seen\.num_images: 6 and 5"):
        compare(a, evaluate_run(run, small(name="c", num_images=5), say=silent))


def test_raw_and_averaged_weights_are_told_apart(run):
    stamps = [evaluate_run(run, small(name=w, weights=w), say=silent)["stamp"]["protocol"] for w in ("ema", "raw")]
    assert [stamp["weights"] for stamp in stamps] == ["ema", "raw"]


@pytest.mark.parametrize(
    ("words", "name"),
    [([], "quickstart"), (["--num_images", "64"], "custom-quickstart"), (["--num_images", "64", "--name", "a"], "a")],
)
def test_judging_with_other_settings_leaves_a_studys_results_alone(tmp_path, monkeypatch, words, name):
    judged = []
    monkeypatch.setattr(suite, "evaluate_run", lambda run, suite, *rest, **options: judged.append(suite.name))
    monkeypatch.setattr("mmdit_eval.report.print_result", lambda result: None)
    (tmp_path / "config.yaml").write_text("{}")
    command = ["evaluate.py", str(tmp_path), "--suite", str(ROOT / "configs/eval/quickstart.yaml"), *words]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts/evaluate.py"), run_name="__main__")
    assert ended.value.code == 0
    assert judged == [name]
