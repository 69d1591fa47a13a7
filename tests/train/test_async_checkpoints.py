"""`train.async_checkpoints`: the same bytes as written in the step, whatever the training does meanwhile."""

import json
import os
import signal
import threading
from collections import namedtuple

import pytest
import torch

import mmdit.checkpoint as checkpoint_room
import mmdit.train.saving as saving_room
import mmdit.train.step as step_room
from mmdit.checkpoint import CheckpointError, latest_checkpoint, list_checkpoints, load_checkpoint, verify_checkpoint
from mmdit.train.step import NonFiniteLossError
from mmdit.train.tracking import read_metrics
from mmdit.train.trainer import train

EVERY = {"checkpoint_every": 8, "keep_checkpoints": 9, "more_emas": {"short": {"decay": 0.5}}}
ASYNC = {**EVERY, "async_checkpoints": True}


def events(run_dir):
    return [r["event"] for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == "event"]


def content(run_dir):
    """Bytes of all tensors, and the counters, of every checkpoint of a run."""
    found = {}
    for path in list_checkpoints(run_dir):
        verify_checkpoint(path)
        files = {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*.safetensors"))}
        state = json.loads((path / "state.json").read_text())
        found[path.name] = files, {name: value for name, value in state.items() if name != "seconds"}
    return found


@pytest.fixture
def updates(monkeypatch):
    """A count of updates begun, and functions to call at some of them."""
    original, at = step_room.training_loss, {}
    count = {"updates": 0, "changed": threading.Condition()}

    def training_loss(*args):
        with count["changed"]:
            count["updates"] += 1
            count["changed"].notify_all()
        losses = original(*args)
        return at[count["updates"]](losses) if count["updates"] in at else losses

    monkeypatch.setattr(step_room, "training_loss", training_loss)

    def reached(number):
        with count["changed"]:
            return count["changed"].wait_for(lambda: count["updates"] >= number, timeout=20)

    return at, reached


def hold_writes(monkeypatch, until):
    """Let each write wait for `until(number of the write)`; return what it was answered and how many wrote at once."""
    original, seen = saving_room.save_checkpoint, {"answers": [], "at_once": 0, "most": 0, "threads": set()}

    def save_checkpoint(*args):
        seen["at_once"] += 1
        seen["most"] = max(seen["most"], seen["at_once"])
        seen["threads"].add(threading.current_thread() is threading.main_thread())
        seen["answers"].append(until(len(seen["answers"]) + 1))
        try:
            return original(*args)
        finally:
            seen["at_once"] -= 1

    monkeypatch.setattr(saving_room, "save_checkpoint", save_checkpoint)
    return seen


def test_checkpoints_hold_the_same_bytes_as_those_written_in_the_step(tmp_path, micro, monkeypatch):
    train(micro({"train": EVERY}), tmp_path / "step", progress=False)
    seen = hold_writes(monkeypatch, lambda number: threading.Event().wait(0.02))
    assert train(micro({"train": ASYNC}), tmp_path / "background", progress=False).complete
    a, b = content(tmp_path / "step"), content(tmp_path / "background")
    assert list(a) == list(b) == [f"{n:012d}" for n in range(8, 49, 8)]
    assert a == b
    assert events(tmp_path / "background") == ["start", "complete"]
    assert seen["most"] == 1  # the next waits for the one in flight
    assert seen["threads"] == {True, False}  # the last one of a session is written by the session itself


def test_training_goes_on_meanwhile_and_what_is_written_is_the_state_of_its_step(tmp_path, micro, monkeypatch, updates):
    """The checkpoint after update 3 is held until update 5 has begun: the parameters have moved by then."""
    tree = {"checkpoint_every": 24, "keep_checkpoints": 9}
    train(micro({"train": tree}), tmp_path / "step", progress=False)
    _, reached = updates
    seen = hold_writes(monkeypatch, lambda number: number > 1 or reached(6 + 5))
    train(micro({"train": {**tree, "async_checkpoints": True}}), tmp_path / "background", progress=False)
    assert seen["answers"] == [True, True]  # False: training stood still until the write gave up waiting
    a, b = content(tmp_path / "step"), content(tmp_path / "background")
    assert list(b) == [f"{24:012d}", f"{48:012d}"]
    assert a == b


def test_old_ones_are_pruned_by_the_thread(tmp_path, micro):
    train(micro({"train": {**ASYNC, "keep_checkpoints": 2, "keep_every": 16}}), tmp_path, progress=False)
    assert [int(p.name) for p in list_checkpoints(tmp_path)] == [16, 32, 40, 48]


def test_a_full_disk_in_the_background_costs_the_checkpoint_not_the_run(tmp_path, micro, monkeypatch):
    original, calls = checkpoint_room.save_file, 0

    def save_file(tensors, path, *rest, **named):
        nonlocal calls
        calls += 1
        if 5 <= calls <= 6:  # the first tensors of the second and the third checkpoint, of four files each
            raise OSError(28, "No space left on device")
        return original(tensors, path, *rest, **named)

    monkeypatch.setattr(checkpoint_room, "save_file", save_file)
    assert train(micro({"train": ASYNC}), tmp_path, progress=False).complete
    assert events(tmp_path) == ["start", "save_failed", "save_failed", "complete"]
    assert [int(p.name) for p in list_checkpoints(tmp_path)] == [8, 32, 40, 48]
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")]


def test_a_disk_that_stays_full_ends_the_run_as_it_would_in_the_step(tmp_path, micro, monkeypatch, capsys):
    tree = {**ASYNC, "save_retries": 2, "lr_schedule": "constant"}
    train(micro({"train": {**tree, "images": 8}}), tmp_path, progress=False)
    with monkeypatch.context() as patch:

        def refuse(*args, **named):
            raise OSError(28, "No space left on device")

        patch.setattr(checkpoint_room, "save_file", refuse)
        with pytest.raises(CheckpointError, match="No space left"):
            train(micro({"train": tree}), tmp_path, progress=False)
    assert "failure 2 of at most 2 in a row" in capsys.readouterr().out
    assert [int(p.name) for p in list_checkpoints(tmp_path)] == [8]
    assert train(micro({"train": tree}), tmp_path, progress=False).complete


def test_a_save_that_cannot_fit_is_not_begun_in_the_background_either(tmp_path, micro, monkeypatch):
    usage = namedtuple("usage", "total used free")
    tree = {**ASYNC, "lr_schedule": "constant", "save_retries": 0}
    train(micro({"train": {**tree, "images": 8}}), tmp_path, progress=False)
    monkeypatch.setattr(saving_room.shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 1000))
    monkeypatch.setattr(saving_room, "save_checkpoint", lambda *a: pytest.fail("a save was begun"))
    with pytest.raises(CheckpointError, match=r"the disk has 0\.00 GiB free, a checkpoint takes"):
        train(micro({"train": tree}), tmp_path, progress=False)


def test_a_signal_waits_for_the_checkpoint_in_flight_then_saves_and_the_run_goes_on_to_the_same_bits(
    tmp_path, micro, monkeypatch, updates
):
    tree = {**ASYNC, "checkpoint_every": 16}
    train(micro({"train": tree}), tmp_path / "whole", progress=False)
    at, _ = updates

    def interrupt(losses):
        os.kill(os.getpid(), signal.SIGTERM)
        return losses

    at[6 + 3] = interrupt  # in the third update of the second run; the checkpoint of 16 images is in flight
    with monkeypatch.context() as patch:
        hold_writes(patch, lambda number: threading.Event().wait(0.3))
        result = train(micro({"train": tree}), tmp_path / "legs", progress=False)
    assert not result.complete
    assert result.images_seen == 24
    assert list(content(tmp_path / "legs")) == [f"{16:012d}", f"{24:012d}"]
    assert train(micro({"train": tree}), tmp_path / "legs", progress=False).complete
    whole, legs = content(tmp_path / "whole"), content(tmp_path / "legs")
    assert legs[f"{48:012d}"] == whole[f"{48:012d}"]


def test_a_run_that_stops_on_its_numbers_names_the_checkpoint_that_was_in_flight(tmp_path, micro, monkeypatch, updates):
    at, _ = updates
    at[3] = lambda losses: losses * float("nan")
    hold_writes(monkeypatch, lambda number: threading.Event().wait(0.3))
    with pytest.raises(NonFiniteLossError, match=r"Last good checkpoint: .*000000000016"):
        train(micro({"train": {**ASYNC, "checkpoint_every": 16}}), tmp_path, progress=False)
    assert latest_checkpoint(tmp_path).name == f"{16:012d}"


def test_an_error_of_our_own_in_the_thread_is_not_taken_for_a_full_disk(tmp_path, micro, monkeypatch):
    def broken(*args):
        raise KeyError("a mistake")

    monkeypatch.setattr(saving_room, "save_checkpoint", broken)
    with pytest.raises(KeyError, match="a mistake"):
        train(micro({"train": ASYNC}), tmp_path, progress=False)


def test_the_state_of_a_diverged_run_is_refused_in_the_step(tmp_path, micro, monkeypatch):
    """A parameter that is not finite must never replace a good checkpoint, nor wait for a thread to be found."""
    original = saving_room.tensors_of

    def tensors_of(module):
        next(iter(module.parameters())).data[0] = float("nan")
        return original(module)

    monkeypatch.setattr(saving_room, "tensors_of", tensors_of)
    with pytest.raises(CheckpointError, match="non-finite"):
        train(micro({"train": {**ASYNC, "save_retries": 0}}), tmp_path, progress=False)
    assert list_checkpoints(tmp_path) == []


def test_the_switch_may_change_on_resume(tmp_path, micro):
    tree = {"lr_schedule": "constant", **EVERY}
    train(micro({"train": tree}), tmp_path / "whole", progress=False)
    train(micro({"train": {**tree, "images": 24}}), tmp_path / "legs", progress=False)
    train(micro({"train": {**tree, "async_checkpoints": True}}), tmp_path / "legs", progress=False)
    a, b = (load_checkpoint(latest_checkpoint(tmp_path / n)) for n in ("whole", "legs"))
    for stem, table in a.tensors.items():
        assert all(torch.equal(tensor, b.tensors[stem][name]) for name, tensor in table.items()), stem
