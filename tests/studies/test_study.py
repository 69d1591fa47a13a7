"""A study from its YAML to its report, with micro runs; and what happens when a cell fails or somebody stops it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from mmdit_eval import executor, study
from mmdit_eval.executor import EXIT_INTERRUPTED, run_queue
from mmdit_eval.study import StudyInterrupted, run_study

from mmdit.config import ConfigError, load_config, to_tree
from tests.studies.stand_ins import Ended, in_process, silent

ROOT = Path(__file__).resolve().parents[2]


def instead(monkeypatch, run):
    """Have cells run by `run(command)` -> exit code instead of by processes."""
    monkeypatch.setattr(executor, "start", lambda command, environment: Ended(run(command)))


@pytest.fixture
def study_file(tmp_path, micro, micro_unet):
    tree = to_tree(micro())
    tree["train"]["cache_dir"] = None
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tree))
    definition = {
        "name": "mini",
        "base": "base.yaml",
        "rows": {"mmdit": {}, "unet": {"model": micro_unet}},
        "match": None,
        "overrides": {"train": {"checkpoint_every": 24, "keep_every": 24}},
        "suite": {
            "name": "mini", "metrics": ["composition", "frechet", "validation_loss"], "num_images": 4,
            "snapshot_images": 3, "extractor": "pixel_statistics", "grid_prompts": 2,
        },
    }  # fmt: skip
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(definition))
    return path


def test_a_study_trains_judges_and_reports_and_does_nothing_twice(study_file, tmp_path, monkeypatch):
    started = []
    instead(monkeypatch, lambda command: started.append(command[3]) or in_process(command))
    assert run_study(study_file, out=tmp_path / "runs", say=silent) == 0
    folder = tmp_path / "runs" / "mini"
    assert len(started) == 2
    for row in ("mmdit", "unet"):
        assert (folder / f"{row}-s0" / "config.yaml").is_file()
        names = sorted(p.name for p in (folder / f"{row}-s0" / "eval").iterdir())
        assert names == ["mini-000000000024.json", "mini-000000000048.json"]
    assert (folder / "ceiling.json").is_file()
    assert any((folder / "cache").iterdir())
    configs = [load_config(folder / f"{row}-s0" / "config.yaml") for row in ("mmdit", "unet")]
    assert configs[0].train == configs[1].train
    assert configs[0].train.cache_dir == folder / "cache"
    page = (folder / "report.html").read_text()
    assert "One seed ranks nothing" in page
    assert page.count("data:image/png;base64,") >= 2 + 2 * 2 * 4  # figures; prompts x splits x (true, VAE, two rows)
    numbers = json.loads((folder / "summary.json").read_text())
    assert set(numbers["rows"]) == {"mmdit", "unet"}
    assert numbers["rows"]["mmdit"]["parameters"] > 0

    times = {path: path.stat().st_mtime_ns for path in folder.glob("*/eval/*.json")}
    assert run_study(study_file, ["--seeds", "[0,1]"], out=tmp_path / "runs", say=silent) == 0
    assert len(started) == 4  # only the new seed
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    assert json.loads((folder / "summary.json").read_text())["rows"]["unet"]["seeds"] == 2


def test_a_failed_cell_does_not_stop_the_others_and_is_named(study_file, tmp_path, monkeypatch):
    instead(monkeypatch, lambda command: -signal.SIGKILL if "mmdit-s0" in command[3] else in_process(command))
    said = []
    assert run_study(study_file, out=tmp_path / "runs", say=said.append) == 1
    cells = json.loads((tmp_path / "runs/mini/study.json").read_text())["cells"]
    assert cells["mmdit-s0"]["status"] == "failed"
    assert cells["unet-s0"]["status"] == "done"
    assert any("failed: mmdit-s0" in text and "SIGKILL" in text for text in said)
    assert "SIGKILL" in (tmp_path / "runs/mini/report.html").read_text()


def test_an_interrupted_cell_ends_the_study_and_the_next_call_goes_on(study_file, tmp_path, monkeypatch):
    instead(monkeypatch, lambda command: EXIT_INTERRUPTED)
    with pytest.raises(StudyInterrupted, match="interrupted; mmdit-s0 saved its state"):
        run_study(study_file, out=tmp_path / "runs", say=silent)
    book = json.loads((tmp_path / "runs/mini/study.json").read_text())
    assert [cell["status"] for cell in book["cells"].values()] == ["interrupted", "waiting"]
    called = []
    instead(monkeypatch, lambda command: called.append(Path(command[3]).stem) or 0)
    monkeypatch.setattr(study, "judge", lambda *given: None)
    assert run_study(study_file, out=tmp_path / "runs", say=silent) == 0
    assert called == ["mmdit-s0", "unet-s0"]
    said = []
    assert run_study(study_file, ["--seeds", "[1]"], out=tmp_path / "runs", say=said.append) == 0
    assert any("not in this study any more, and not in its report: mmdit-s0, unet-s0." in text for text in said)


def test_finished_cells_keep_their_weights_alone_where_the_study_says_so(study_file, tmp_path, monkeypatch):
    from mmdit.checkpoint import CheckpointError, list_checkpoints, load_checkpoint
    from mmdit.train.trainer import train

    started, said = [], []
    instead(monkeypatch, lambda command: started.append(command[3]) or in_process(command))
    words = ["--prune_finished", "true", "--suite.metrics", "[validation_loss]"]
    assert run_study(study_file, words, out=tmp_path / "runs", say=said.append) == 0
    folder = tmp_path / "runs" / "mini"
    assert sum("pruned to its weights" in text for text in said) == 2
    for row in ("mmdit", "unet"):
        paths = list_checkpoints(folder / f"{row}-s0")
        assert len(paths) == 2
        assert all(list(load_checkpoint(path).tensors) == ["ema"] for path in paths)
        assert len(list((folder / f"{row}-s0" / "eval").glob("*.json"))) == 2  # snapshots were judged from them too
    assert run_study(study_file, words, out=tmp_path / "runs", say=said.append) == 0
    assert len(started) == 2  # they count as finished
    config = load_config(folder / "mmdit-s0" / "config.yaml")
    longer = config.model_copy(update={"train": config.train.model_copy(update={"images": 96})})
    with pytest.raises(CheckpointError, match="keeps nothing but weights"):
        train(longer, folder / "mmdit-s0", progress=False)


@pytest.mark.parametrize("code", executor.EXITS_UNBEGUN)
def test_a_cell_stopped_before_its_first_update_has_not_failed_and_no_other_begins(
    study_file, tmp_path, monkeypatch, code
):
    started = []
    instead(monkeypatch, lambda command: started.append(command) or code)
    with pytest.raises(StudyInterrupted, match="interrupted; no cell saved its state"):
        run_study(study_file, out=tmp_path / "runs", say=silent)
    assert len(started) == 1
    book = json.loads((tmp_path / "runs/mini/study.json").read_text())
    assert [cell["status"] for cell in book["cells"].values()] == ["waiting", "waiting"]


def test_a_dry_run_prints_the_grid_and_makes_nothing(study_file, tmp_path, capsys):
    assert run_study(study_file, out=tmp_path / "runs", dry_run=True, say=silent) == 0
    printed = capsys.readouterr().out
    assert "mmdit" in printed
    assert "GFLOP" in printed
    assert not (tmp_path / "runs").exists()


def test_rows_of_unequal_size_are_refused_with_both_counts(study_file, tmp_path):
    with pytest.raises(ConfigError, match=r"parameters, row '.*% more, the study allows 5 %"):
        run_study(study_file, ["--match.within", "0.05"], out=tmp_path / "runs", say=silent)
    assert not (tmp_path / "runs").exists()


def test_a_row_that_changes_more_than_the_study_varies_is_refused(study_file, tmp_path):
    with pytest.raises(ConfigError, match=r"row 'unet' differs from row 'mmdit' in train\.lr"):
        run_study(study_file, ["--rows.unet.train.lr", "0.5"], out=tmp_path / "runs", say=silent)


SHIPPED = sorted((ROOT / "configs/studies").glob("*.yaml"))


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[pytest.mark.slow] if p.stem.startswith("emoji_") else []) for p in SHIPPED],
    ids=[path.stem for path in SHIPPED],
)
def test_every_shipped_study_passes_a_dry_run(path, monkeypatch):
    """With a text length in place of the data's own: emoji have to be built, and captions take time to encode."""
    from mmdit_eval import cost
    from mmdit_eval.plan import make_plan

    from mmdit.config import load_study

    def shape(config):
        widths = config.model.context_dim, config.model.pooled_dim
        return 24, *widths, (("clip", 0, 12, 224), ("t5", 12, 24, 256))

    monkeypatch.setattr(cost, "text_shape", shape)
    loaded = load_study(path)
    plan = make_plan(loaded, str(path))
    within = loaded.match.within if loaded.match else 1.0
    sizes = [found.parameters for found in plan.costs.values()]
    assert max(sizes) <= min(sizes) * (1 + 2 * within)
    assert not plan.confounded
    for word in ("Question", "Cost", "Found", "Command"):
        assert f"# {word}: " in path.read_text(encoding="utf-8")
    if len({config.diffusion.model_dump_json() for config in map(plan.first, plan.cells)}) > 1:
        assert not any("targets" in remark for remark in plan.remarks)


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in SHIPPED if not p.stem.startswith("emoji")], ids=lambda path: path.stem)
def test_every_shipped_study_of_shapes_passes_a_dry_run_with_its_own_captions(path, tmp_path, capsys):
    assert run_study(path, out=tmp_path, dry_run=True, say=silent) == 0
    assert "GFLOP" in capsys.readouterr().out


def test_rows_are_told_apart_by_their_parameters():
    from mmdit_eval.cost import Cost, check_match

    assert check_match({"a": Cost(100, 1, 1), "b": Cost(104, 1, 1)}, 0.05) is None
    assert "'b' has 106" in check_match({"a": Cost(100, 1, 1), "b": Cost(106, 1, 1)}, 0.05)
    assert "'b' has 3 FLOP" in check_match({"a": Cost(1, 2, 1), "b": Cost(1, 3, 1)}, 0.05, "flops")


def test_the_quickstart_rows_have_equal_parameters():
    from mmdit_eval.cost import check_match, cost_of

    from mmdit.config import load_study, row_configs

    loaded = load_study(ROOT / "configs/studies/three_backbones.yaml")
    costs = {row: cost_of(next(iter(configs.values()))) for row, configs in row_configs(loaded).items()}
    assert check_match(costs, loaded.match.within) is None
    assert all(cost.flops > 1e8 for cost in costs.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/studies/quickstart.yaml", "--rows.unet.model.headdim", "3"], "did you mean 'model.head_dim'"),
        (["configs/studies/quickstartt.yaml"], "did you mean configs/studies/quickstart.yaml"),
        (["configs/studies/quickstart.yaml", "--suite.num_imges", "3"], "did you mean 'suite.num_images'"),
        (["configs/studies/quickstart.yaml", "--seeds", "3"], "write --seeds [0,1,2]"),
        (
            ["power", "results/injection", "--metric", "relation", "--difference", "2", "--comparisions", "16"],
            "unknown flag '--comparisions'; did you mean '--comparisons'?",
        ),
        (["results/injection", "--report-only", "--outt=x"], "unknown flag '--outt'; did you mean '--out'?"),
    ],
)
def test_a_mistake_on_the_command_line_costs_neither_time_nor_a_traceback(arguments, message):
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "scripts/ablate.py", *arguments], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'eval'}"},
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert time.perf_counter() - began < 10  # under 2 s on a quiet machine


CHILD = """
import signal, sys, time, pathlib
note = pathlib.Path(sys.argv[1])
def stop(number, _):
    told = 'hung up, ' if number == signal.SIGHUP else ''
    time.sleep(0.3); note.write_text(note.read_text() + told + 'saved '); sys.exit(75)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGHUP, stop)
note.write_text('ready ')
time.sleep(20)
"""


@pytest.fixture
def heard():
    """Let SIGINT be heard, as in a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interruption_is_passed_on_once_to_all_that_run_and_waited_for(tmp_path, heard):
    """A child saves after the first SIGINT; a second one would end it at once. What waits does not begin."""
    notes = {name: tmp_path / name for name in ("first", "second", "third")}

    def interrupt():
        while not all(notes[n].exists() and "ready" in notes[n].read_text() for n in ("first", "second")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    commands = {name: [sys.executable, "-c", CHILD, str(note)] for name, note in notes.items()}
    codes = {}
    assert run_queue(commands, 2, lambda name: None, codes.__setitem__) is False
    thread.join()
    assert codes == {"first": 75, "second": 75}
    assert notes["second"].read_text() == "ready saved "
    assert not notes["third"].exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interruption_amid_a_start_leaves_no_process_that_nobody_knows_of(tmp_path, monkeypatch, heard, number):
    from mmdit_eval import executor

    from mmdit import stopping

    monkeypatch.setattr(stopping, "let_go_of_terminal", lambda: None)  # pytest's
    note, begin, before = tmp_path / "note", executor.start, signal.getsignal(number)

    def start(command, environment):
        process = begin(command, environment)
        while not note.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)  # before anybody has taken the process down
        return process

    monkeypatch.setattr(executor, "start", start)
    codes = {}
    assert (
        run_queue({"one": [sys.executable, "-c", CHILD, str(note)]}, 1, lambda name: None, codes.__setitem__) is False
    )
    assert codes == {"one": 75}
    # a closed terminal is theirs too: they must know not to print there
    assert note.read_text() == ("ready hung up, saved " if number == signal.SIGHUP else "ready saved ")
    assert signal.getsignal(number) is before


def test_one_that_was_interrupted_from_outside_stops_the_others_after_they_saved(tmp_path):
    note = tmp_path / "note"
    wait = f"import pathlib, time, sys\nwhile not pathlib.Path({str(note)!r}).exists(): time.sleep(0.02)\nsys.exit(75)"
    commands = {"saving": [sys.executable, "-c", CHILD, str(note)], "told": [sys.executable, "-c", wait]}
    codes = {}
    assert run_queue(commands, 2, lambda name: None, codes.__setitem__) is False
    assert codes == {"told": 75, "saving": 75}


def test_what_cannot_be_written_down_leaves_no_training_behind_that_nobody_watches(tmp_path):
    note = tmp_path / "note"
    wait = f"import pathlib, time\nwhile not pathlib.Path({str(note)!r}).exists(): time.sleep(0.02)"
    commands = {"saving": [sys.executable, "-c", CHILD, str(note)], "done": [sys.executable, "-c", wait]}

    def full(name, code):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        run_queue(commands, 2, lambda name: None, full)
    assert note.read_text() == "ready saved "


def test_workers_share_the_cores_and_run_everything_in_order(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    seen, begun, codes = {}, [], {}
    running = {"now": 0, "most": 0}

    class Process(Ended):
        def __init__(self):
            super().__init__(None)
            self.looks = 0
            running["now"] += 1
            running["most"] = max(running["most"], running["now"])

        def poll(self):
            self.looks += 1
            if self.looks < 3:
                return None
            running["now"] -= 1
            return 0

    def start(command, environment):
        seen[command[0]] = environment["OMP_NUM_THREADS"], environment["TQDM_POSITION"]
        return Process()

    monkeypatch.setattr(executor, "start", start)
    names = list("abcde")
    assert run_queue({n: [n] for n in names}, 2, begun.append, codes.__setitem__, poll=0.001) is True
    assert begun == names
    assert codes == dict.fromkeys(names, 0)
    assert running["most"] == 2
    assert {threads for threads, _ in seen.values()} == {"4"}
    assert {place for _, place in seen.values()} == {"0", "1"}


def test_cells_trained_side_by_side_encode_their_data_once_and_before(study_file, tmp_path, monkeypatch):
    called = []
    instead(monkeypatch, lambda command: called.append((Path(command[3]).stem, "--cache-only" in command)) or 0)
    monkeypatch.setattr(study, "judge", lambda *given: None)
    assert run_study(study_file, ["--workers", "2"], out=tmp_path / "runs", say=silent) == 0
    assert called == [("mmdit-s0", True), ("mmdit-s0", False), ("unet-s0", False)]
