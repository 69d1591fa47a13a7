"""A study on a folder of one's own pictures: what it is judged by, what is refused before training, what is said."""

import json

import numpy as np
import pytest
import yaml
from mmdit_eval.plan import make_plan
from mmdit_eval.study import run_study
from PIL import Image

from mmdit.config import ConfigError, SuiteConfig, load_study, to_tree
from tests.studies.stand_ins import Ended, in_process


@pytest.fixture
def study_file(tmp_path, micro):
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(random.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i % 7} of noise")
    tree = to_tree(micro())
    tree["data"] = {"name": "images", "source": str(folder), "resolution": 64, "val_fraction": 0.3}
    tree["train"].update(cache_dir=None, val_images=4, checkpoint_every=48)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tree))
    suite = {"num_images": 6, "extractor": "pixel_statistics", "grid_prompts": 2}
    rows = {"mmdit": {}, "wide": {"model": {"mlp_ratio": 3.0}}}
    path = tmp_path / "study.yaml"
    study = {"name": "own", "base": "base.yaml", "rows": rows, "varies": ["model"], "match": None, "suite": suite}
    path.write_text(yaml.safe_dump(study))
    return path


def test_empty_metrics_and_splits_are_what_the_data_can_serve():
    shapes, emoji, own = (SuiteConfig().for_data(name) for name in ("shapes", "emoji", "images"))
    common = ("clip_score", "frechet", "kernel", "validation_loss")
    assert shapes.metrics == ("composition", *common)
    assert emoji.metrics == ("retrieval", *common)
    assert own.metrics == common[1:]  # the tiny CLIP pair knows nothing of other pictures
    assert SuiteConfig(clip="openclip:ViT-B-32").for_data("shards").metrics == common
    assert shapes.splits == emoji.splits == ("seen", "heldout")
    assert own.splits == ("seen",)
    given = SuiteConfig(metrics=("cmmd",), splits=("heldout",))
    assert given.for_data("shapes") == given


def test_a_study_of_own_pictures_runs_with_a_suite_that_names_neither_metrics_nor_splits(
    study_file, tmp_path, monkeypatch
):
    from mmdit_eval import executor

    monkeypatch.setattr(executor, "start", lambda command, environment: Ended(in_process(command)))
    said = []
    assert run_study(study_file, out=tmp_path / "runs", say=said.append) == 0
    assert any("judging: 6 seen pictures" in text for text in said)
    result = json.loads(next((tmp_path / "runs/own/mmdit-s0/eval").glob("*.json")).read_text())
    assert list(result["splits"]) == ["seen"]
    assert result["stamp"]["protocol"]["metrics"] == ["frechet", "kernel", "validation_loss"]
    page = (tmp_path / "runs/own/report.html").read_text()
    assert "Pictures kept out of training" in page
    assert "held-out combinations" not in page


def test_what_the_data_cannot_serve_is_refused_before_training(study_file):
    with pytest.raises(ConfigError, match=r"suite.splits: 'heldout' needs data whose combinations are known.*\[seen\]"):
        make_plan(load_study(study_file, ["--suite.splits", "[seen, heldout]"]))
    with pytest.raises(ConfigError, match=r"claims.splits has 'heldout', the suite's splits are \('seen',\)"):
        make_plan(load_study(study_file, ["--claims.splits", "[heldout]"]))
    with pytest.raises(ConfigError, match=r"'composition' needs data.name 'shapes'.*then it is \['frechet'"):
        make_plan(load_study(study_file, ["--suite.metrics", "[composition]"]))


def test_few_pictures_and_a_judge_of_other_pictures_are_said_beside_the_grid(study_file):
    assert make_plan(load_study(study_file)).remarks == ()
    study = load_study(study_file, ["--suite.num_images", "500", "--suite.extractor", "tiny_clip"])
    few, judge = make_plan(study).remarks
    assert few.endswith("suite.num_images asks for 500: data.val_fraction 0.3 keeps no more out of training")
    assert "tiny_clip, which knows shapes and emoji only" in judge
