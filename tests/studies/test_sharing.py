"""Whole studies of micro runs: shared trainings, budgets in seconds, jobs of a cluster, power from a pilot."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from mmdit_eval import executor, slurm, study
from mmdit_eval.claims import judge_claims
from mmdit_eval.findings import read_study
from mmdit_eval.pilot import plan_from_pilot, print_power
from mmdit_eval.power import Spread, seeds_needed
from mmdit_eval.slurm import run_jobs, stop, submit
from mmdit_eval.study import StudyInterrupted, run_study

from mmdit.config import ConfigError, SlurmConfig, to_tree
from mmdit.train.optim import lr_at
from mmdit.train.trainer import train
from tests.studies.made_up import widen, write_study
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


LOCAL = SlurmConfig(cluster="local", gpus=0, minutes=2)
# saves where it is asked to stop, longer than submitit's own cancelling waits; a second wish ends it at once
TRAINING = """
import os, pathlib, signal, sys, time
note, once = pathlib.Path(sys.argv[1]), sys.argv[2:] == ['once']
def stop(number, _):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(1.5)
    with note.open('a') as file: file.write(' saved')
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
again = note.exists() and once
with note.open('a') as file: file.write(f' {os.getpid()},{os.getppid()}')
if again: sys.exit(0)
time.sleep(60)
"""


def training(note, *words):
    return [sys.executable, "-c", TRAINING, str(note), *words]


def pids_of(note, sessions=1):
    """Wait for so many sessions of a training to begin; return (its process, its job's) of the newest."""
    while True:
        found = [word for word in (note.read_text().split() if note.exists() else []) if "," in word]
        if len(found) >= sessions:
            own, job = map(int, found[-1].split(","))
            return own, job
        time.sleep(0.05)


def kinds(note):
    return ["begun" if "," in word else word for word in note.read_text().split()]


@pytest.fixture
def meanwhile():
    """Run a function beside the test; what goes wrong in it fails the test."""
    threads, wrong = [], []

    def run(act):
        def watched():
            try:
                act()
            except Exception as error:
                wrong.append(error)

        threads.append(threading.Thread(target=watched))
        threads[-1].start()

    yield run
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.fixture
def heard():
    """Let SIGINT be heard, as in a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def controller_of(job):
    return int(Path(f"/proc/{job}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_study_waits_for_its_jobs_to_save(tmp_path, heard, meanwhile, capsys, number):
    notes, codes = {name: tmp_path / name for name in ("first", "second")}, {}

    def interrupt():
        for note in notes.values():
            _, job = pids_of(note)
            for process in (job, controller_of(job)):  # Ctrl-C reaches all that a terminal started
                os.kill(process, signal.SIGINT)
        os.kill(os.getpid(), number)

    meanwhile(interrupt)
    whole = run_jobs(
        {name: training(note) for name, note in notes.items()}, LOCAL, tmp_path / "jobs", lambda name: None,
        codes.__setitem__, poll=0.1,
    )  # fmt: skip
    assert whole is False
    assert codes == {"first": 75, "second": 75}
    assert all(kinds(note) == ["begun", "saved"] for note in notes.values())
    assert "stopping 2 job(s): what is being trained saves its state" in capsys.readouterr().out


def test_a_job_that_is_still_starting_is_stopped_too(tmp_path):
    note, codes = tmp_path / "note", {}
    jobs = submit({"one": training(note)}, LOCAL, tmp_path / "jobs")
    stop(jobs, LOCAL, codes.__setitem__, poll=0.1)
    assert codes in ({"one": 130}, {"one": 75})
    assert jobs["one"].done()


def test_a_job_that_does_not_end_is_named_and_not_waited_for(tmp_path, capsys):
    note, codes = tmp_path / "note", {}
    script = f"import os, pathlib, signal, time; signal.signal(15, signal.SIG_IGN); pathlib.Path({str(note)!r})"
    script += ".write_text(f' {os.getpid()},{os.getppid()}'); time.sleep(60)"
    jobs = submit({"deaf": [sys.executable, "-c", script]}, LOCAL, tmp_path / "jobs")
    training, _ = pids_of(note)
    stop(jobs, LOCAL, codes.__setitem__, poll=0.1, patience=0.5)
    assert codes == {"deaf": 130}
    assert "deaf: still running after 0 seconds, no longer waited for" in capsys.readouterr().out
    os.kill(training, signal.SIGKILL)
    while not jobs["deaf"].done():
        time.sleep(0.1)


def test_at_its_time_limit_a_job_saves_and_goes_on_by_itself(tmp_path, meanwhile):
    note, codes = tmp_path / "note", {}

    def limit():
        for process in pids_of(note):  # some clusters send it to the training too
            os.kill(process, signal.SIGUSR2)

    meanwhile(limit)
    commands = {"long": training(note, "once")}
    assert run_jobs(commands, LOCAL, tmp_path / "jobs", lambda name: None, codes.__setitem__, poll=0.1) is True
    assert codes == {"long": 0}
    assert kinds(note) == ["begun", "saved", "begun"]


def test_a_job_that_reaches_its_limit_too_often_leaves_a_cell_that_goes_on(
    write, tmp_path, monkeypatch, meanwhile, capsys
):
    note = tmp_path / "note"
    monkeypatch.setattr(study, "cell_command", lambda name, config, folder: training(note))

    def limits():
        for session in range(1, 5):  # submitit starts a job again three times
            os.kill(pids_of(note, session)[1], signal.SIGUSR2)

    meanwhile(limits)
    file = write(rows={"plain": {}}, executor="slurm", slurm={"cluster": "local", "gpus": 0, "minutes": 7})
    with pytest.raises(StudyInterrupted, match="interrupted; plain-s0 saved its state"):
        run_study(file, out=tmp_path / "runs", say=lambda _: None)
    assert kinds(note) == ["begun", "saved"] * 4
    told = "plain-s0: stopped at the job's time limit of 7 minutes; state saved; run the same command to go on"
    assert told in capsys.readouterr().out
    cells = json.loads((tmp_path / "runs/mini/study.json").read_text())["cells"]
    assert cells["plain-s0"]["status"] == "interrupted"


def test_an_interruption_of_jobs_in_this_process_stops_the_study(tmp_path, heard, meanwhile):
    note, codes = tmp_path / "note", {}
    meanwhile(lambda: (pids_of(note), os.kill(os.getpid(), signal.SIGINT)))
    config = SlurmConfig(cluster="debug", gpus=0)
    jobs = {"first": training(note), "second": training(tmp_path / "other")}
    assert run_jobs(jobs, config, tmp_path / "jobs", lambda name: None, codes.__setitem__) is False
    assert codes == {"first": 75, "second": 130}
    assert not (tmp_path / "other").exists()


class Job:
    """What stands for a job of SLURM: over after it was asked to save once, or never."""

    def __init__(self, folder, number, result, over=True):
        self.job_id, self.found, self.over, self.paths = number, result, over, self
        self.result_pickle, self.stdout, self.killed = folder / f"{number}.pkl", folder / f"{number}.out", False
        if result is not None:
            self.result_pickle.touch()

    def done(self, force_check=False):
        return self.over

    def result(self):
        return self.found

    def cancel(self, check):
        self.killed = True


@pytest.fixture
def scancel(tmp_path, monkeypatch):
    """Stand for SLURM's command; returns the file of what it was called with."""
    calls, folder = tmp_path / "calls", tmp_path / "bin"
    folder.mkdir()
    (folder / "scancel").write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    (folder / "scancel").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return calls


def test_slurm_is_asked_to_signal_what_runs_and_to_cancel_what_waits(tmp_path, scancel):
    codes = {}
    jobs = {
        "running": Job(tmp_path, "7", (75, signal.SIGTERM)), "waiting": Job(tmp_path, "8", None),
        "endless": Job(tmp_path, "9", None, over=False),
    }  # fmt: skip
    stop(jobs, SlurmConfig(), codes.__setitem__, poll=0.01, patience=0.3)
    assert codes == {"running": 75, "waiting": 130, "endless": 130}
    assert scancel.read_text().splitlines()[:2] == ["--state=PENDING 7 8 9", "--signal=TERM 7 8 9"]
    assert [job.killed for job in jobs.values()] == [False, False, True]  # SLURM's own cancelling comes last


def test_jobs_are_stopped_where_what_became_of_one_cannot_be_written_down(tmp_path, monkeypatch, scancel):
    jobs = {"first": Job(tmp_path, "1", (0, None)), "second": Job(tmp_path, "2", None, over=False)}

    def full(name, code):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(slurm, "submit", lambda commands, config, folder: jobs)
    with pytest.raises(OSError, match="No space left"):
        run_jobs({}, SlurmConfig(), tmp_path, lambda name: None, full, poll=0.01, patience=0.1)
    assert "--signal=TERM 2" in scancel.read_text()
    assert jobs["second"].killed


def test_a_study_runs_on_a_cluster_by_one_word(write, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "judge", lambda *given: None)
    monkeypatch.setattr(study, "cell_command", lambda name, config, folder: commands(cell=0)["cell"])
    file = write(rows={"plain": {}}, executor="slurm", slurm={"cluster": "debug", "gpus": 0})
    assert run_study(file, out=tmp_path / "runs", say=lambda _: None) == 0
    cells = json.loads((tmp_path / "runs/mini/study.json").read_text())["cells"]
    assert cells["plain-s0"]["status"] == "trained"


def test_a_dry_run_says_that_its_machine_has_no_slurm(write, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    said, file = [], write(rows={"plain": {}}, executor="slurm")
    assert run_study(file, out=tmp_path / "runs", dry_run=True, say=said.append) == 0
    assert any("warning: the study could not be started here: no SLURM here (srun is missing)" in text for text in said)
    said.clear()
    assert run_study(file, ["--slurm.cluster", "local"], out=tmp_path / "runs", dry_run=True, say=said.append) == 0
    assert said == []


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
    # without claims of its own it decides one score on both splits
    assert (found["split"], found["comparisons"]) == ("seen", 2)
    assert lines[1024]["seeds"] == seeds_needed(0.05, (deviation, deviation), alpha=0.025)
    assert all(line["careful"] is None or line["careful"] >= line["seeds"] for line in found["lines"])
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
    assert found["lines"][0]["seeds"] == seeds_needed(0.05, (found["spread"]["training"],), alpha=0.025)
    assert plan_from_pilot(folder, "all_correct", 5.0)["spread"]["sample"] > 0
    book["study"]["claims"]["pairs"] = "auto"
    (folder / "study.json").write_text(json.dumps(book))
    for arguments, message in ((("relatio", 2.0), "unknown score"), (("all_correct", 0.0), "above 0")):
        with pytest.raises(ConfigError, match=message):
            plan_from_pilot(folder, *arguments)
    for comparisons in (0, -3):
        with pytest.raises(ConfigError, match=f"a study has 1 comparison or more, got {comparisons}"):
            plan_from_pilot(folder, "all_correct", 5.0, comparisons=comparisons)
    command = [sys.executable, "scripts/ablate.py", "power", str(folder), "--metric", "all_correct"]
    done = subprocess.run(
        [*command, "--difference", "5"], cwd=request.config.rootpath, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": f"{request.config.rootpath}:{request.config.rootpath / 'eval'}"},
    )  # fmt: skip
    assert "seeds a row" in done.stdout
    assert "split: seen combinations (as the pilot claims; or --split)" in done.stdout
    assert "corrected for 2 comparison(s) (as the pilot claims; or --comparisons)" in done.stdout
    (tmp_path / "one").mkdir()
    one = write_study(tmp_path / "one")
    with pytest.raises(ConfigError, match="one seed a row"):
        plan_from_pilot(one, "all_correct", 5.0)


def test_power_plans_for_the_claims_of_the_pilot_unless_told_otherwise(tmp_path, capsys):
    folder = write_study(tmp_path, seeds=(0, 1, 2))
    widen(folder, 4)
    book = json.loads((folder / "study.json").read_text())
    book["study"]["claims"].update(scores=["all_correct", "clip_score"], splits=["heldout"])
    (folder / "study.json").write_text(json.dumps(book))
    found = plan_from_pilot(folder, "all_correct", 5.0)
    assert (found["split"], found["comparisons"]) == ("heldout", 3 * 1 * 2)
    assert found["comparisons"] == len(judge_claims(read_study(folder)))
    spread = (found["spread"]["training"] ** 2 + found["spread"]["sample"] ** 2 / 4096) ** 0.5
    assert found["lines"][-1]["seeds"] == seeds_needed(0.05, (spread, spread), alpha=0.05 / 6)
    print_power(folder, "all_correct", 5.0, "seen", 16)
    printed = capsys.readouterr().out
    assert "split: seen combinations (as given)" in printed
    assert "corrected for 16 comparison(s) (as given)" in printed
    assert "the score applies to" not in printed


def test_power_counts_all_pictures_of_a_split_also_those_to_which_a_score_does_not_apply(tmp_path, capsys):
    folder = write_study(tmp_path, seeds=(0, 1, 2))
    for file in folder.glob("*/eval/tiny-000000003000.json"):
        result = json.loads(file.read_text())
        hits = result["splits"]["seen"]["per_image"]["all_correct"]
        result["splits"]["seen"]["per_image"]["all_correct"] = hits[:10] + [None] * 30
        file.write_text(json.dumps(result))
    found = plan_from_pilot(folder, "all_correct", 5.0)  # 10 of the 40 pictures
    assert found["share"] == 0.25
    assert found["spread"]["pictures"] == 10
    assert [line["pictures"] for line in found["lines"]] == [40, 256, 512, 1024, 2048, 4096]
    assert found["spread"]["sample"] > 0
    for line in found["lines"]:
        spread = (found["spread"]["training"] ** 2 + found["spread"]["sample"] ** 2 / (line["pictures"] / 4)) ** 0.5
        assert line["seeds"] == seeds_needed(0.05, (spread, spread), alpha=0.025)
    print_power(folder, "all_correct", 5.0, None, None)
    assert "the score applies to 25 % of the pictures; below, all are counted" in capsys.readouterr().out


def test_power_says_where_nothing_is_known_about_single_pictures(tmp_path, capsys):
    folder = write_study(tmp_path, seeds=(0, 1, 2))
    found = plan_from_pilot(folder, "frechet", 0.1)
    assert found["spread"]["sample"] is None
    assert [line["pictures"] for line in found["lines"]] == [40]
    print_power(folder, "frechet", 0.1, None, None)
    printed = capsys.readouterr().out
    assert "not known, so only the pilot's number of them can be planned with" in printed
    assert "of one picture" not in printed
    with pytest.raises(ValueError, match="the pilot's 40 pictures only, got 80"):
        Spread(**found["spread"]).at(80)
