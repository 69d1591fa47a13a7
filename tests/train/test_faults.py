"""What a run does when something breaks under it: numbers, disk, memory."""

import json
import os
import subprocess
import sys
from collections import namedtuple

import pytest
import torch

import mmdit.checkpoint as checkpoint_room
import mmdit.train.ownership as ownership
import mmdit.train.saving as saving_room
import mmdit.train.step as step_room
import mmdit.train.trainer as room
from mmdit.checkpoint import CheckpointError, latest_checkpoint, list_checkpoints, load_checkpoint
from mmdit.train.__main__ import main
from mmdit.train.memory import OutOfMemoryError
from mmdit.train.step import NonFiniteLossError
from mmdit.train.tracking import read_metrics
from mmdit.train.trainer import train


def events(run_dir):
    return [r["event"] for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == "event"]


def break_losses(monkeypatch, bad_calls, value=float("nan")):
    """Let the loss of one sample be `value` in the given calls (1-based)."""
    original, calls = step_room.training_loss, 0

    def training_loss(*args):
        nonlocal calls
        calls += 1
        losses = original(*args)
        if calls in bad_calls:
            losses = torch.cat([losses[:1] * value, losses[1:]])
        return losses

    monkeypatch.setattr(step_room, "training_loss", training_loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("first", [1, 3, 6])
def test_a_bad_loss_costs_its_update_where_skips_are_allowed(tmp_path, micro, monkeypatch, value, first):
    break_losses(monkeypatch, {first}, value)
    result = train(micro({"train": {"max_skips": 1}}), tmp_path, progress=False)
    assert result.complete
    state = load_checkpoint(latest_checkpoint(tmp_path))
    assert state.state["step"] == 5  # one of six left out; its images count as seen
    assert state.state["images_seen"] == 48
    assert all(torch.isfinite(t).all() for stem in state.tensors.values() for t in stem.values())
    assert events(tmp_path) == ["start", "skipped", "complete"]


def test_more_bad_losses_in_a_row_than_allowed_stop_the_run_and_name_the_samples(tmp_path, micro, monkeypatch):
    config = micro({"train": {"max_skips": 2, "checkpoint_every": 8}})
    break_losses(monkeypatch, {2, 4, 5, 6})
    with pytest.raises(NonFiniteLossError, match=r"samples with a non-finite loss: \[\d+\]"):
        train(config, tmp_path, progress=False)
    assert events(tmp_path) == ["start", "skipped", "skipped", "skipped", "non_finite"]
    good = load_checkpoint(latest_checkpoint(tmp_path))
    assert good.state["skipped"] == 2  # a resumed run goes on counting
    assert all(torch.isfinite(t).all() for stem in good.tensors.values() for t in stem.values())


def test_a_bad_gradient_is_skipped_like_a_bad_loss(tmp_path, micro, monkeypatch):
    original, calls = step_room.training_loss, 0

    def training_loss(denoiser, *args):
        nonlocal calls
        calls += 1
        losses = original(denoiser, *args)
        if calls == 2:
            losses.register_hook(lambda gradient: gradient * float("inf"))
        return losses

    monkeypatch.setattr(step_room, "training_loss", training_loss)
    assert train(micro({"train": {"max_skips": 1}}), tmp_path, progress=False).complete
    assert "skipped" in events(tmp_path)


def test_a_full_disk_costs_the_checkpoint_not_the_run(tmp_path, micro, monkeypatch):
    original, calls = checkpoint_room.save_file, 0

    def save_file(tensors, path, *rest, **named):
        nonlocal calls
        calls += 1
        if 4 <= calls <= 5:  # the first tensors of the second and the third checkpoint
            raise OSError(28, "No space left on device")
        return original(tensors, path, *rest, **named)

    monkeypatch.setattr(checkpoint_room, "save_file", save_file)
    config = micro({"train": {"checkpoint_every": 8, "keep_checkpoints": 9}})
    assert train(config, tmp_path, progress=False).complete
    assert events(tmp_path) == ["start", "save_failed", "save_failed", "complete"]
    assert [int(p.name) for p in list_checkpoints(tmp_path)] == [8, 32, 40, 48]


def test_a_disk_that_stays_full_ends_the_run_with_its_last_checkpoint_whole(tmp_path, micro, monkeypatch, capsys):
    def refuse(*args, **named):
        raise OSError(28, "No space left on device")

    config = micro({"train": {"checkpoint_every": 8, "save_retries": 2}})
    train(micro({"train": {"images": 8, "checkpoint_every": 8, "lr_schedule": "constant"}}), tmp_path, progress=False)
    config = micro({"train": {"checkpoint_every": 8, "save_retries": 2, "lr_schedule": "constant"}})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_room, "save_file", refuse)
        with pytest.raises(CheckpointError, match="No space left"):
            train(config, tmp_path, progress=False)
    assert "failure 2 of at most 2 in a row" in capsys.readouterr().out
    assert [int(p.name) for p in list_checkpoints(tmp_path)] == [8]
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")]
    assert train(config, tmp_path, progress=False).complete


HOLDER = """
import fcntl, os, sys, time
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(descriptor, fcntl.LOCK_EX)
os.pwrite(descriptor, b"process 1 on elsewhere", 0)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_trainer_waits_for_the_first_to_save_and_then_refuses_the_folder(tmp_path, micro, monkeypatch, capsys):
    """It would sweep away the checkpoint that the first one is writing."""
    (tmp_path / "checkpoints" / ".tmp-000000000008-abcd").mkdir(parents=True)
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ownership.LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"held\n"
        monkeypatch.setattr(ownership, "PATIENCE", 0.3)
        with pytest.raises(CheckpointError, match=r"another process is training .*process 1 on elsewhere"):
            train(micro(), tmp_path, progress=False)
        assert (tmp_path / "checkpoints" / ".tmp-000000000008-abcd").is_dir()
        assert "waiting for it to end" in capsys.readouterr().out
        first.kill()
    with ownership.sole_trainer(tmp_path, patience=0):  # whoever died has let go of it
        pass


def test_a_save_that_cannot_fit_is_not_begun(tmp_path, micro, monkeypatch):
    usage = namedtuple("usage", "total used free")
    train(micro({"train": {"images": 8, "lr_schedule": "constant"}}), tmp_path, progress=False)
    monkeypatch.setattr(saving_room.shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 1000))
    monkeypatch.setattr(saving_room, "save_checkpoint", lambda *a: pytest.fail("a save was begun"))
    with pytest.raises(CheckpointError, match=r"the disk has 0\.00 GiB free, a checkpoint takes"):
        train(micro({"train": {"lr_schedule": "constant", "save_retries": 0}}), tmp_path, progress=False)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 68719476736 bytes"),
        MemoryError("no room"),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_a_full_memory_says_what_to_change_and_keeps_the_last_checkpoint(tmp_path, micro, monkeypatch, error):
    original, calls = step_room.training_loss, 0

    def training_loss(*args):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise error
        return original(*args)

    monkeypatch.setattr(step_room, "training_loss", training_loss)
    with pytest.raises(OutOfMemoryError, match=r"8 images a process.*--train\.accumulation 2.*000000000016"):
        train(micro(), tmp_path, progress=False)
    assert events(tmp_path)[-1] == "out_of_memory"


def test_another_runtime_error_is_not_taken_for_a_full_memory(tmp_path, micro, monkeypatch):
    def training_loss(*args):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(step_room, "training_loss", training_loss)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(micro(), tmp_path, progress=False)


def test_exit_codes_tell_memory_disk_and_numbers_apart(tmp_path, micro, monkeypatch, capsys):
    from mmdit.config import to_yaml

    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(micro()))
    codes = {OutOfMemoryError("too large"): 4, NonFiniteLossError("nan"): 1, CheckpointError("x", "y", "z"): 3}
    for error, code in codes.items():

        def fail(*args, error=error, **named):
            raise error

        monkeypatch.setattr(room, "train", fail)
        assert main([str(path), "--out", str(tmp_path / "run")]) == code
        assert str(error) in capsys.readouterr().err


def test_resuming_with_more_accumulation_is_allowed_and_changes_only_rounding(tmp_path, micro, monkeypatch):
    """The advice of the out-of-memory message works on the same folder."""
    tree = {"lr_schedule": "constant", "checkpoint_every": 8}
    train(micro({"train": {**tree, "images": 24}}), tmp_path / "run", progress=False)
    assert train(micro({"train": {**tree, "accumulation": 4}}), tmp_path / "run", progress=False).complete
    train(micro({"train": tree}), tmp_path / "whole", progress=False)
    a, b = (
        [r["loss"] for r in read_metrics(tmp_path / n / "metrics.jsonl") if r["kind"] == "train"]
        for n in ("run", "whole")
    )
    assert a == pytest.approx(b, rel=1e-5)


def test_a_run_without_write_permission_says_so(tmp_path, micro):
    if os.geteuid() == 0:
        (tmp_path / "run").write_text("a file where the folder should be")
        with pytest.raises((FileExistsError, NotADirectoryError)):
            train(micro(), tmp_path / "run", progress=False)
        return
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        train(micro(), tmp_path / "run", progress=False)


def test_further_averages_are_saved_resumed_and_sampled_from(tmp_path, micro, monkeypatch):
    from mmdit.pipeline import TextToImage

    averages = {"short": {"decay": 0.5}, "power": {"sigma_rel": 0.1}}
    tree = {"more_emas": averages, "lr_schedule": "constant", "checkpoint_every": 24}
    train(micro({"train": tree}), tmp_path / "whole", progress=False)
    train(micro({"train": {**tree, "images": 24}}), tmp_path / "legs", progress=False)
    train(micro({"train": tree}), tmp_path / "legs", progress=False)
    a, b = (load_checkpoint(latest_checkpoint(tmp_path / n)) for n in ("whole", "legs"))
    assert {"model", "ema", "ema-short", "ema-power", "optimizer"} == set(a.tensors)
    for stem, table in a.tensors.items():
        assert all(torch.equal(tensor, b.tensors[stem][name]) for name, tensor in table.items()), stem
    last = {stem: table["final_layer.linear.weight"] for stem, table in a.tensors.items() if stem != "optimizer"}
    assert not any(torch.equal(last["model"], last[stem]) for stem in ("ema", "ema-short", "ema-power"))
    pipeline = TextToImage.load(tmp_path / "whole", weights="ema-power")
    assert torch.equal(pipeline.denoiser.state_dict()["final_layer.linear.weight"], last["ema-power"])
    with pytest.raises(CheckpointError, match=r"holds no ema-wide.*ema-power"):
        TextToImage.load(tmp_path / "whole", weights="ema-wide")


def test_blocks_recomputed_in_the_backward_pass_change_nothing(tmp_path, micro, micro_unet):
    for model in ({}, {"model": micro_unet}):
        found = []
        for switch in (False, True):
            run = tmp_path / f"{bool(model)}-{switch}"
            train(micro({**model, "train": {"activation_checkpointing": switch}}), run, progress=False)
            found.append(load_checkpoint(latest_checkpoint(run)).tensors["model"])
        for name, tensor in found[0].items():
            torch.testing.assert_close(found[1][name], tensor, rtol=0, atol=1e-6, msg=name)


def test_recomputing_keeps_less(micro):
    """Bytes kept for the backward pass fall by at least half on a deep model."""
    from mmdit.config import RunConfig
    from mmdit.denoiser import Conditioning
    from mmdit.train.sharding import prepare_blocks
    from mmdit.train.trainer import build_seeded

    kept = []
    for switch in (False, True):
        tree = {"model": {"depth": 6}, "train": {"activation_checkpointing": switch}}
        config: RunConfig = micro(tree)
        denoiser = build_seeded(config).train()
        prepare_blocks(denoiser, config.train)
        seen = {}

        def keep(tensor, seen=seen):
            seen[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            denoiser(torch.randn(4, 4, 8, 8), torch.ones(4), Conditioning(torch.randn(4, 9, 256), torch.randn(4, 224)))
        owned = {p.untyped_storage()._cdata for p in denoiser.parameters()}
        kept.append(sum(size for storage, size in seen.items() if storage not in owned))
    assert kept[1] < 0.5 * kept[0]


def test_records_tell_speed_waiting_memory_loss_by_t_and_gradients_by_part(tmp_path, micro, micro_unet):
    for name, model in (("mmdit", {}), ("unet", {"model": micro_unet})):
        train(micro({**model, "train": {"peak_tflops": 1.0}}), tmp_path / name, progress=False)
        records = [r for r in read_metrics(tmp_path / name / "metrics.jsonl") if r["kind"] == "train"]
        for record in records:
            assert 0 <= record["data_wait"] <= 1
            assert record["memory_gib"] > 0.05
            assert record["mfu"] == pytest.approx(record["tflops_per_device"], abs=1e-3)
            filled = [x for x in record["loss_by_t"] if x is not None]
            assert len(record["loss_by_t"]) == 8
            assert min(filled) <= record["loss"] <= max(filled)
            parts = record["grad_norm_by_part"]
            assert sum(n**2 for n in parts.values()) ** 0.5 == pytest.approx(record["grad_norm"], rel=1e-5)
        wanted = {"mmdit": {"joint_blocks.x_block", "joint_blocks.context_block"}, "unet": {"middle_block"}}[name]
        assert wanted <= parts.keys()


def test_the_environment_holds_what_the_code_differs_in(tmp_path, monkeypatch):
    import mmdit.train.tracking as tracking

    answers = {"rev-parse": "abc", "status": " M mmdit/rng.py", "diff": "-old\n+new"}
    monkeypatch.setattr(tracking, "_git", lambda folder, *words: answers[words[0]])
    tracking.write_environment(tmp_path)
    assert json.loads((tmp_path / "environment.json").read_text())["dirty"] is True
    assert "+new" in (tmp_path / "dirty.diff").read_text()


def test_a_disk_that_refuses_records_and_pictures_costs_those_alone(tmp_path, micro, monkeypatch, capsys):
    import mmdit.train.validation as validation_room

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, text):
            raise OSError(28, "No space left on device")

        def flush(self):
            self.file.flush()

        def close(self):
            self.file.close()

    original = room.Metrics

    def metrics(*args):
        made = original(*args)
        made._file = Full(made._file)
        return made

    def save_image(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, "Metrics", metrics)
    monkeypatch.setattr(validation_room, "save_image", save_image)
    assert train(micro({"train": {"sample_every": 24}}), tmp_path, progress=False).complete
    said = capsys.readouterr().out
    assert said.count("records may be missing") == 1
    assert "the samples of image 24 cannot be written" in said


def test_a_finished_run_whose_marker_was_lost_gets_it_back_and_keeps_its_bits(tmp_path, micro):
    train(micro(), tmp_path, progress=False)
    before = load_checkpoint(latest_checkpoint(tmp_path)).tensors["model"]
    (tmp_path / "complete.json").unlink()
    assert train(micro(), tmp_path, progress=False).complete
    assert json.loads((tmp_path / "complete.json").read_text())["images_seen"] == 48
    after = load_checkpoint(latest_checkpoint(tmp_path)).tensors["model"]
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_memory_full_between_updates_names_what_may_be_left_out(tmp_path, micro, monkeypatch):
    import mmdit.train.validation as validation_room

    def no_room(*args):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(validation_room, "loss_by_level", no_room)
    with pytest.raises(OutOfMemoryError, match=r"--train\.validate_every 0 .*000000000016"):
        train(micro({"train": {"validate_every": 24}}), tmp_path, progress=False)


def test_a_termination_before_the_first_update_asks_for_the_same_command_again(tmp_path, micro, monkeypatch, capsys):
    import signal

    from mmdit.config import to_yaml

    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(micro()))
    monkeypatch.setattr(room, "build_run", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert main([str(path), "--out", str(tmp_path / "run")]) == 75
    assert "run the same command again" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
