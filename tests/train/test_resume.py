"""Stopping and going on: bit-exact over three legs, by budget, by signal and after damage."""

import json
import os
import signal

import pytest
import torch

from mmdit.checkpoint import latest_checkpoint, list_checkpoints, load_checkpoint
from mmdit.config import ConfigError
from mmdit.train.tracking import read_metrics
from mmdit.train.trainer import train


def newest(run_dir):
    return load_checkpoint(latest_checkpoint(run_dir))


def assert_bit_equal(run_a, run_b):
    a, b = newest(run_a), newest(run_b)
    assert a.state["images_seen"] == b.state["images_seen"]
    for stem in ("model", "ema", "optimizer"):
        assert a.tensors[stem].keys() == b.tensors[stem].keys()
        for name, tensor in a.tensors[stem].items():
            assert torch.equal(tensor, b.tensors[stem][name]), f"{stem}: {name}"


def stop_at(monkeypatch, step, number=signal.SIGINT):
    """Send this process a signal in the middle of update `step` (1-based, of this session)."""
    import mmdit.train.trainer as room

    original, calls = room.update, 0

    def update(*args):
        nonlocal calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), number)
        return original(*args)

    monkeypatch.setattr(room, "update", update)


@pytest.mark.parametrize("backbone", ["mmdit", "unet"])
@pytest.mark.parametrize("changes", [{}, {"accumulation": 2, "precision": "bf16"}], ids=["plain", "accumulated-bf16"])
def test_three_legs_give_the_bits_of_one_run(tmp_path, micro, micro_unet, monkeypatch, backbone, changes):
    model = {"model": micro_unet} if backbone == "unet" else {}
    config = micro({**model, "train": changes})
    whole = train(config, tmp_path / "whole", progress=False)
    assert whole.complete

    legs = tmp_path / "legs"
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        first = train(config, legs, progress=False)
    with monkeypatch.context() as patch:
        stop_at(patch, 3, signal.SIGTERM)
        second = train(config, legs, progress=False)
    third = train(config, legs, progress=False)
    assert [first.complete, second.complete, third.complete] == [False, False, True]
    assert [first.images_seen, second.images_seen, third.images_seen] == [16, 40, 48]
    assert first.seconds < second.seconds < third.seconds
    assert_bit_equal(tmp_path / "whole", legs)
    a, b = (
        [r["loss"] for r in read_metrics(d / "metrics.jsonl") if r["kind"] == "train" and r["images_seen"] > 8]
        for d in (tmp_path / "whole", legs)
    )
    assert a == b


def test_after_a_kill_the_steps_since_the_checkpoint_are_repeated_and_their_records_replaced(
    tmp_path, micro, monkeypatch
):
    import mmdit.train.trainer as room

    config = micro()
    train(config, tmp_path / "whole", progress=False)

    class Killed(BaseException):
        pass

    original, calls = room.update, 0

    def update(*args):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Killed
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(room, "update", update)
        with pytest.raises(Killed):
            train(config, tmp_path / "killed", progress=False)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "ste')  # torn by the kill
    assert train(config, tmp_path / "killed", progress=False).complete
    assert_bit_equal(tmp_path / "whole", tmp_path / "killed")
    seen = [r["images_seen"] for r in read_metrics(tmp_path / "killed" / "metrics.jsonl") if r["kind"] == "train"]
    assert seen == sorted(set(seen))
    seconds = [r["seconds"] for r in read_metrics(tmp_path / "killed" / "metrics.jsonl")]
    assert seconds == sorted(seconds)


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path, micro):
    config = micro({"train": {"keep_checkpoints": 5}})
    train(config, tmp_path / "run", progress=False)
    before = newest(tmp_path / "run")
    (list_checkpoints(tmp_path / "run")[-1] / "ema.safetensors").write_bytes(b"gone")
    assert train(config, tmp_path / "run", progress=False).complete
    after = newest(tmp_path / "run")
    assert all(torch.equal(before.tensors["model"][n], t) for n, t in after.tensors["model"].items())


def test_a_finished_run_leaves_its_marker_and_is_not_trained_again(tmp_path, micro, monkeypatch):
    config = micro()
    train(config, tmp_path, progress=False)
    record = json.loads((tmp_path / "complete.json").read_text())
    assert record["images_seen"] == 48
    assert record["parameters"] > 0
    assert record["seconds"] > 0
    assert newest(tmp_path).state["complete"] is True

    import mmdit.train.trainer as room

    monkeypatch.setattr(room, "build_run", lambda *a: pytest.fail("a finished run was built again"))
    assert train(config, tmp_path, progress=False).complete


def test_a_finished_run_goes_on_with_a_larger_budget_and_refuses_another_config(tmp_path, micro):
    train(micro({"train": {"lr_schedule": "constant"}}), tmp_path, progress=False)
    longer = micro({"train": {"lr_schedule": "constant", "images": 64}})
    assert train(longer, tmp_path, progress=False).images_seen == 64
    with pytest.raises(ConfigError, match=r"another config: train\.lr was [0-9.e-]+ and is 0\.5 now"):
        train(micro({"train": {"lr_schedule": "constant", "lr": 0.5}}), tmp_path, progress=False)
    with pytest.raises(ConfigError, match="already holds checkpoints"):
        train(longer, tmp_path, resume="never", progress=False)


def test_a_signal_during_validation_saves_and_the_next_session_validates(tmp_path, micro, monkeypatch):
    import mmdit.train.validation as room

    config = micro({"train": {"validate_every": 24}})
    original = room.loss_by_level

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(room, "loss_by_level", interrupted)
        result = train(config, tmp_path, progress=False)
    assert result == (False, 24, result.seconds, result.checkpoint)
    assert newest(tmp_path).state["evaluation_pending"] is True
    assert train(config, tmp_path, progress=False).complete
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "validation"]
    assert [r["images_seen"] for r in records] == [24, 48]


def test_a_second_signal_obeys_at_once():
    import subprocess
    import sys

    code = (
        "import os, signal\n"
        "from types import SimpleNamespace\n"
        "from mmdit.train.trainer import interruptible\n"
        "with interruptible(SimpleNamespace(num_processes=1)) as should_stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert should_stop()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGTERM
    assert "still here" not in done.stdout
    assert "once more to stop at once" in done.stdout
