"""Cells judged by several processes: the same numbers, and what happens when one fails, dies or is stopped."""

import json
import os
import signal
import subprocess
import sys

import pytest
import yaml
from mmdit_eval import executor, judging
from mmdit_eval.study import StudyInterrupted, run_study

from mmdit.config import to_tree
from tests.studies import stand_ins
from tests.studies.stand_ins import Ended, silent

REAL = executor.start


def instead(monkeypatch, judge):
    """Train in this process; have the commands that judge run by `judge(study_dir, cells)` -> exit code."""

    def start(command, environment):
        if command[2] == "mmdit.train":
            if "--cache-only" not in command:
                stand_ins.in_process(command)
            return Ended(0)
        assert command[1:3] == ["-m", "mmdit_eval.judging"]
        return REAL(command, environment) if judge is None else Ended(judge(command[3], command[4:]))

    monkeypatch.setattr(executor, "start", start)


@pytest.fixture
def study_file(tmp_path, micro):
    tree = to_tree(micro())
    tree["train"]["cache_dir"] = None
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tree))
    definition = {
        "name": "mini",
        "base": "base.yaml",
        "rows": {"plain": {}, "free": {"sampling": {"negative_guidance": "none"}}, "other": {"model": {"depth": 1}}},
        "varies": ["model", "sampling"],
        "match": None,
        "seeds": [0, 1],
        "overrides": {"train": {"checkpoint_every": 24, "keep_every": 24}},
        "suite": {
            "name": "mini", "metrics": ["composition", "frechet", "validation_loss"], "num_images": 4,
            "snapshot_images": 3, "extractor": "pixel_statistics", "grid_prompts": 2,
        },
    }  # fmt: skip
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(definition))
    return path


def results(folder):
    found = {}
    for file in sorted(folder.glob("*/eval/*.json")):
        result = json.loads(file.read_text())
        found[str(file.relative_to(folder))] = result["splits"], result["stamp"]
    return found


def statuses(folder):
    return {name: cell["status"] for name, cell in json.loads((folder / "study.json").read_text())["cells"].items()}


def in_process(study_dir, cells):
    return judging.main([study_dir, *cells])


@pytest.mark.parametrize("judge", [in_process, pytest.param(None, id="real", marks=pytest.mark.slow)])
def test_two_processes_judge_as_one_does(study_file, tmp_path, monkeypatch, judge):
    instead(monkeypatch, judge)
    assert run_study(study_file, ["--seeds", "[0]"], out=tmp_path / "alone", say=silent) == 0
    assert run_study(study_file, ["--seeds", "[0]", "--workers", "2"], out=tmp_path / "apart", say=silent) == 0
    alone, apart = results(tmp_path / "alone/mini"), results(tmp_path / "apart/mini")
    assert len(alone) == 2 * 2 + 1  # two checkpoints of each training; `plain` shares that of `free`
    assert apart == alone
    for name in ("ceiling.json", "other-s0/attention.json", "report.html"):
        assert (tmp_path / "apart/mini" / name).is_file()
    assert set(statuses(tmp_path / "apart/mini").values()) == {"done"}


def test_what_fails_in_a_process_is_told_with_its_reason_and_judged_again(study_file, tmp_path, monkeypatch):
    folder, said = tmp_path / "runs/mini", []

    def judge(study_dir, cells):
        for checkpoint in (folder / "other-s1/checkpoints").glob("*/ema.safetensors"):
            checkpoint.write_bytes(b"")
        return -signal.SIGKILL if "plain-s1" in cells else in_process(study_dir, cells)

    instead(monkeypatch, judge)
    assert run_study(study_file, ["--workers", "6"], out=tmp_path / "runs", say=said.append) == 1
    found = statuses(folder)
    assert found == {
        "plain-s0": "done", "plain-s1": "failed", "free-s0": "done", "free-s1": "done", "other-s0": "done",
        "other-s1": "failed",
    }  # fmt: skip
    assert any("plain-s1" in text and "SIGKILL" in text for text in said)
    assert any("other-s1: evaluation failed" in text and "ema.safetensors" in text for text in said)


def test_a_stop_while_judging_asks_the_processes_and_goes_on_later(study_file, tmp_path, monkeypatch):
    instead(monkeypatch, lambda study_dir, cells: executor.EXIT_INTERRUPTED)
    with pytest.raises(StudyInterrupted, match="while judging"):
        run_study(study_file, ["--workers", "2"], out=tmp_path / "runs", say=silent)
    assert set(statuses(tmp_path / "runs/mini").values()) == {"trained", "waiting"}
    instead(monkeypatch, in_process)
    assert run_study(study_file, ["--workers", "2"], out=tmp_path / "runs", say=silent) == 0
    assert set(statuses(tmp_path / "runs/mini").values()) == {"done"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_was_started_in_the_background_can_be_asked_to_stop(study_file, tmp_path, monkeypatch, number):
    asked = []

    def judge_cell(task, *arguments, **options):
        asked.append(task.name)
        os.kill(os.getpid(), number)

    def judge(study_dir, cells):
        monkeypatch.setattr(judging, "judge_cell", judge_cell)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell leaves it to what it starts with "&"
        try:
            with pytest.raises(KeyboardInterrupt):
                in_process(study_dir, cells)
        finally:
            signal.signal(signal.SIGINT, before)
        return executor.EXIT_INTERRUPTED

    instead(monkeypatch, judge)
    with pytest.raises(StudyInterrupted, match="while judging"):
        run_study(study_file, ["--workers", "2"], out=tmp_path / "runs", say=silent)
    assert len(asked) == 2  # the first cell of each process, and no second


def test_a_folder_that_holds_no_study_is_exit_code_2_in_words(tmp_path):
    command = [sys.executable, "-m", "mmdit_eval.judging", str(tmp_path), "plain-s0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "study.json is missing" in done.stderr
