"""Whole studies of micro runs: shared trainings, budgets in seconds, jobs of a cluster, power from a pilot."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml
from mmdit_eval import executor, slurm, study
from mmdit_eval.pilot import plan_from_pilot
from mmdit_eval.power import seeds_needed
from mmdit_eval.slurm import run_jobs, submit
from mmdit_eval.study import run_study

from mmdit.config import ConfigError, SlurmConfig, to_tree
from mmdit.train.optim import lr_at
from mmdit.train.trainer import train
from tests.studies.made_up import write_study
from tests.studies.stand_ins import Ended, in_process


@pytest.fixture
def write(tmp_path, micro):
    tree = to_tree(micro())
    tree["train"].update(images=16, cache_dir=None)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tree))

    def write(**changes):
        suite = {"name": "mini", "metrics": ["composition"], "num_images": 6, "extractor": "pixel_statistics"}
        common = {"name": "mini", "base": "base.yaml", "match": None, "suite": suite, "attention": None}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump({**common, **changes}, sort_keys=False))
        return tmp_path / "study.yaml"

    return write


def test_rows_of_one_training_are_trained_once_and_judged_under_their_own_sampling(write, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(
        executor, "start", lambda command, environment: Ended(started.append(command[5]) or in_process(command))
    )
    rows = {f"w{w}": {"sampling": {"guidance_scale": float(w)}} for w in (1, 3)}
    assert run_study(write(rows=rows, seeds=[0, 1, 2]), out=tmp_path / "runs", say=lambda _: None) == 0
    folder = tmp_path / "runs" / "mini"
    assert len(started) == 3  # one training a seed, not one a cell
    assert not (folder / "w3-s0" / "checkpoints").exists()
    one, three = (json.loads(next((folder / f"{row}-s1" / "eval").glob("*.json")).read_text()) for row in ("w1", "w3"))
    assert one["checkpoint_sha256"] == three["checkpoint_sha256"]
    assert [r["stamp"]["inference"]["sampling.guidance_scale"] for r in (one, three)] == [1.0, 3.0]
    assert three["run"] == "w3-s1"
    summary = json.loads((folder / "summary.json").read_text())
    assert {cell["status"] for cell in summary["cells"].values()} == {"done"}
    assert all(claim["method"] == "paired t over seeds" for claim in summary["claims"])
    assert summary["rows"]["w3"]["seconds"] == summary["rows"]["w1"]["seconds"]
    assert run_study(tmp_path / "study.yaml", out=tmp_path / "runs", say=lambda _: None) == 0
    assert len(started) == 3
    # what a finished run's checkpoint says of sampling is of its training's day; the study says how it is judged
    words = ["--overrides.sampling.num_steps", "3", "--seeds", "[1]"]
    assert run_study(tmp_path / "study.yaml", words, out=tmp_path / "runs", say=lambda _: None) == 0
    again = (json.loads(next((folder / f"{row}-s1" / "eval").glob("*.json")).read_text()) for row in ("w1", "w3"))
    assert [found["stamp"]["inference"]["sampling.num_steps"] for found in again] == [3, 3]


def test_a_failed_training_takes_the_rows_that_share_it_along_and_says_so(write, tmp_path, monkeypatch):
    monkeypatch.setattr(executor, "start", lambda command, environment: Ended(1))
    rows = {f"w{w}": {"sampling": {"guidance_scale": float(w)}} for w in (1, 3)}
    assert run_study(write(rows=rows), out=tmp_path / "runs", say=lambda _: None) == 1
    cells = json.loads((tmp_path / "runs/mini/study.json").read_text())["cells"]
    assert cells["w3-s0"]["status"] == "failed"
    assert cells["w3-s0"]["reason"] == "needs w1-s0"


# --- seconds ----------------------------------------------------------------------------------------------------


def test_a_run_stops_at_its_seconds_and_goes_on_with_more(micro, tmp_path):
    budget = {"images": 10**9, "seconds": 0.4, "checkpoint_every": 0}
    result = train(micro({"train": budget}), tmp_path / "run", progress=False)
    assert result.complete
    assert 0.4 <= result.seconds < 5
    assert 0 < result.images_seen < 10**6
    again = train(micro({"train": budget}), tmp_path / "run", progress=False)
    assert again.images_seen == result.images_seen  # nothing left to do
    more = train(micro({"train": {**budget, "seconds": result.seconds + 0.3}}), tmp_path / "run", progress=False)
    assert more.images_seen > result.images_seen
    assert more.seconds >= result.seconds + 0.3


def test_the_learning_rate_falls_with_the_seconds(micro):
    config = micro({"train": {"images": 10**9, "seconds": 100.0, "lr": 1.0, "warmup_images": 16}}).train
    assert lr_at(config, 8, 1.0) == pytest.approx(0.5)
    assert lr_at(config, 10_000, 50.0) == pytest.approx(0.5)
    assert lr_at(config, 10_000, 100.0) == pytest.approx(0.0, abs=1e-12)


# --- where cells run --------------------------------------------------------------------------------------------


def test_workers_take_the_gpus_in_turn():
    assert executor.environment(4, 2, ["0", "3"])["CUDA_VISIBLE_DEVICES"] == "0"
    assert executor.environment(4, 3, ["0", "3"])["CUDA_VISIBLE_DEVICES"] == "3"


def test_visible_gpus_are_those_that_the_environment_names(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-5")
    assert executor.visible_devices() == ["2", "GPU-5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert executor.visible_devices() == []


def commands(**codes):
    return {name: [sys.executable, "-c", f"import sys; sys.exit({code})"] for name, code in codes.items()}


def test_jobs_are_run_through_submitit_and_their_exit_codes_come_back(tmp_path):
    begun, ended = [], {}
    config = SlurmConfig(cluster="local", gpus=0, minutes=2)
    assert run_jobs(commands(good=0, bad=3), config, tmp_path, begun.append, ended.__setitem__, poll=0.1)
    assert begun == ["good", "bad"]
    assert ended == {"good": 0, "bad": 3}


def test_jobs_are_cancelled_where_what_became_of_one_cannot_be_written_down(tmp_path, monkeypatch):
    cancelled = []

    class Job:
        def __init__(self, name):
            self.name = name

        def done(self):
            return self.name == "first"

        def result(self):
            return 0

        def cancel(self, check):
            cancelled.append(self.name)

    def full(name, code):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(slurm, "submit", lambda commands, config, folder: {name: Job(name) for name in commands})
    with pytest.raises(OSError, match="No space left"):
        run_jobs({"first": ["a"], "second": ["b"]}, SlurmConfig(), tmp_path, lambda name: None, full)
    assert "second" in cancelled


def test_a_study_runs_on_a_cluster_by_one_word(write, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "judge", lambda *given: None)
    monkeypatch.setattr(study, "cell_command", lambda name, config, folder: commands(cell=0)["cell"])
    file = write(rows={"plain": {}}, executor="slurm", slurm={"cluster": "debug", "gpus": 0})
    assert run_study(file, out=tmp_path / "runs", say=lambda _: None) == 0
    cells = json.loads((tmp_path / "runs/mini/study.json").read_text())["cells"]
    assert cells["plain-s0"]["status"] == "trained"


def test_a_machine_without_slurm_and_unknown_options_are_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no SLURM here"):
        submit(commands(a=0), SlurmConfig(), tmp_path)
    with pytest.raises(ConfigError, match="does not take the study's jobs"):
        submit(commands(a=0), SlurmConfig(cluster="debug", options={"partitionn": "x"}), tmp_path)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"pip install 'mmdit-lab\[cluster\]'"):
        submit(commands(a=0), SlurmConfig(cluster="local"), tmp_path)


# --- power from a pilot -----------------------------------------------------------------------------------------


def test_power_plans_from_a_pilots_spread(tmp_path, request):
    folder = write_study(tmp_path, seeds=(0, 1, 2))
    found = plan_from_pilot(folder, "all_correct", 5.0)
    spread = found["spread"]
    assert spread["df"] == 4
    lines = {line["pictures"]: line for line in found["lines"]}
    deviation = (spread["training"] ** 2 + spread["sample"] ** 2 / 1024) ** 0.5
    assert lines[1024]["seeds"] == seeds_needed(0.05, (deviation, deviation))
    assert all(line["careful"] is None or line["careful"] >= line["seeds"] for line in found["lines"])
    assert plan_from_pilot(folder, "frechet", 0.1)["spread"]["sample"] == 0.0
    assert not found["pairs"]
    book = json.loads((folder / "study.json").read_text())
    book["study"]["claims"]["pairs"] = "seeds"  # the spread of the differences, and Student's test of them
    (folder / "study.json").write_text(json.dumps(book))
    found = plan_from_pilot(folder, "frechet", 0.05)
    assert found["pairs"]
    assert found["spread"]["df"] == pytest.approx(2)
    rows = [
        [json.loads((folder / f"{row}-s{seed}/eval/tiny-000000003000.json").read_text()) for seed in range(3)]
        for row in ("mmdit", "unet")
    ]
    values = [[cell["splits"]["seen"]["scores"]["frechet"]["value"] for cell in cells] for cells in rows]
    apart = float(np.std(np.subtract(*values), ddof=1))
    assert found["spread"]["training"] == pytest.approx(apart, rel=1e-9)
    assert found["lines"][0]["seeds"] == seeds_needed(0.05, (found["spread"]["training"],))
    assert plan_from_pilot(folder, "all_correct", 5.0)["spread"]["sample"] > 0
    book["study"]["claims"]["pairs"] = "auto"
    (folder / "study.json").write_text(json.dumps(book))
    for arguments, message in ((("relatio", 2.0), "unknown score"), (("all_correct", 0.0), "above 0")):
        with pytest.raises(ConfigError, match=message):
            plan_from_pilot(folder, *arguments)
    command = [sys.executable, "scripts/ablate.py", "power", str(folder), "--metric", "all_correct"]
    done = subprocess.run(
        [*command, "--difference", "5"], cwd=request.config.rootpath, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": f"{request.config.rootpath}:{request.config.rootpath / 'eval'}"},
    )  # fmt: skip
    assert "seeds a row" in done.stdout
    (tmp_path / "one").mkdir()
    one = write_study(tmp_path / "one")
    with pytest.raises(ConfigError, match="one seed a row"):
        plan_from_pilot(one, "all_correct", 5.0)
