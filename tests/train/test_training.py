"""The loop: what it learns from, what it writes down, what it refuses."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import mmdit.train.step as step_room
from mmdit.checkpoint import latest_checkpoint, list_checkpoints, load_checkpoint
from mmdit.config import ConfigError
from mmdit.train.estimate import describe
from mmdit.train.step import NonFiniteLossError, micro_positions
from mmdit.train.tracking import read_metrics
from mmdit.train.trainer import build_seeded, train


def final(run_dir):
    return load_checkpoint(latest_checkpoint(run_dir))


def test_a_run_leaves_plain_files_from_which_everything_can_be_told(tmp_path, micro):
    config = micro({"train": {"validate_every": 24, "sample_every": 48, "tensorboard": True}})
    result = train(config, tmp_path, progress=False)
    assert result.complete
    assert result.images_seen == 48
    records = read_metrics(tmp_path / "metrics.jsonl")
    training = [r for r in records if r["kind"] == "train"]
    assert [r["images_seen"] for r in training] == [8, 16, 24, 32, 40, 48]
    for key in ("step", "seconds", "loss", "lr", "grad_norm", "images_per_second"):
        assert all(np.isfinite(r[key]) for r in training)
    validation = [r for r in records if r["kind"] == "validation"]
    assert [r["images_seen"] for r in validation] == [24, 48]
    assert validation[0]["levels"] == [0.5, 1.0]
    assert validation[0]["loss"] == pytest.approx(validation[0]["loss_by_level"][0])
    with Image.open(tmp_path / "samples" / "000000000048.png") as picture:
        assert json.loads(picture.text["num_steps"]) == 2
        assert picture.size == (4 * 66 - 2, 4 * 66 - 2)
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert {"commit", "dirty", "versions", "hardware", "command", "sessions", "settings"} <= environment.keys()
    assert list((tmp_path / "tensorboard").iterdir())
    assert (tmp_path / "config.yaml").read_text() == (result.checkpoint / "config.yaml").read_text()


@pytest.mark.parametrize(("images", "told"), [(8, True), (15, True), (16, False)])
def test_a_budget_that_ends_within_the_warm_up_is_told_at_the_start_and_in_a_dry_run(
    tmp_path, micro, capsys, images, told
):
    config = micro({"train": {"images": images}})
    train(config, tmp_path, progress=False)
    told_at_start = "ends within the warm-up of 16, so the learning rate never reaches 0.001" in capsys.readouterr().out
    assert told_at_start == ("ends within the warm-up" in describe(config)) == told
    rates = [r["lr"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
    assert (max(rates) < config.train.lr) == told


def test_the_loss_falls(tmp_path, micro):
    config = micro({"train": {"images": 960, "warmup_images": 80, "lr": 5e-3, "log_every": 80, "checkpoint_every": 0}})
    train(config, tmp_path, progress=False)
    losses = [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
    assert np.mean(losses[-3:]) < 0.8 * losses[0]


def test_two_backbones_see_the_same_images_noise_t_and_dropout(tmp_path, micro, micro_unet, monkeypatch):
    import mmdit.train.trainer as room

    seen = {}
    original = room.update

    def update(denoiser, optimizer, accelerator, batches, schedule, config, *watching):
        taken = [take() for take in batches]
        seen.setdefault(config.model.name, []).append(taken[0])
        return original(denoiser, optimizer, accelerator, [lambda b=b: b for b in taken], schedule, config, *watching)

    monkeypatch.setattr(room, "update", update)
    for name, changes in (("mmdit", {}), ("unet", {"model": micro_unet})):
        train(micro({**changes, "train": {"images": 24}}), tmp_path / name, progress=False)
    for a, b in zip(seen["mmdit"], seen["unet"], strict=True):
        assert np.array_equal(a.indices, b.indices)
        assert torch.equal(a.noise, b.noise)
        assert torch.equal(a.t, b.t)
        assert torch.equal(a.latents, b.latents)
        assert torch.equal(a.conditioning.context, b.conditioning.context)
    indices = np.concatenate([b.indices for b in seen["mmdit"]])
    assert sorted(indices[:20]) == list(range(20))  # the first epoch of 20 images


def test_caching_or_not_is_the_same_run(tmp_path, micro):
    """The same losses over 24 updates: both ways round latents and text states to fp16, alike but for rounding."""
    losses = {}
    for name, precompute in (("cached", True), ("live", False)):
        train(micro({"train": {"images": 192, "precompute": precompute}}), tmp_path / name, progress=False)
        records = read_metrics(tmp_path / name / "metrics.jsonl")
        losses[name] = [r["loss"] for r in records if r["kind"] == "train"]
    assert len(losses["cached"]) == 24
    assert losses["live"] == pytest.approx(losses["cached"], rel=1e-5)


def test_accumulation_changes_nothing_but_rounding(tmp_path, micro):
    for accumulation in (1, 4):
        config = micro({"train": {"images": 16, "accumulation": accumulation}})
        train(config, tmp_path / str(accumulation), progress=False)
    a, b = (
        [r["loss"] for r in read_metrics(tmp_path / n / "metrics.jsonl") if r["kind"] == "train"] for n in ("1", "4")
    )
    assert a == pytest.approx(b, rel=1e-5)


def test_positions_of_accumulation_and_processes_cover_the_batch_once(micro):
    config = micro({"train": {"accumulation": 2, "num_processes": 2}})
    pieces = [p for rank in range(2) for p in micro_positions(config, 16, rank)]
    assert [len(p) for p in pieces] == [2, 2, 2, 2]
    assert sorted(np.concatenate(pieces)) == list(range(16, 24))


def test_the_seed_decides_the_parameters_and_nothing_else_does(micro):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build_seeded(micro()).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, other = build_seeded(micro()).state_dict(), build_seeded(micro({"seed": 1})).state_dict()
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


def poison(monkeypatch, at_call, row=3):
    """Make one sample's loss NaN in the n-th forward."""
    original, calls = step_room.training_loss, 0

    def training_loss(*args):
        nonlocal calls
        calls += 1
        losses = original(*args)
        return losses * torch.where(torch.arange(len(losses)) == row, float("nan"), 1.0) if calls == at_call else losses

    monkeypatch.setattr(step_room, "training_loss", training_loss)


def test_a_non_finite_loss_stops_the_run_before_the_update(tmp_path, micro, monkeypatch):
    config = micro()
    poison(monkeypatch, at_call=4)
    with pytest.raises(NonFiniteLossError) as error:
        train(config, tmp_path, progress=False)
    from mmdit.data.order import data_order

    culprit = int(data_order(config.seed, 20, [3 * 8 + 3])[0])
    assert "step 4 (images 24 to 32)" in str(error.value)
    assert f"samples with a non-finite loss: [{culprit}]" in str(error.value)
    assert "000000000016" in str(error.value)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["000000000016"]
    assert any(r.get("event") == "non_finite" for r in read_metrics(tmp_path / "metrics.jsonl"))
    monkeypatch.undo()
    assert train(config, tmp_path, progress=False).complete


def test_a_non_finite_gradient_changes_no_parameter_and_no_moment(micro):
    from types import SimpleNamespace

    import mmdit.train.optim as optim
    from mmdit.denoiser import Conditioning
    from mmdit.diffusion import build_schedule
    from mmdit.train.step import Batch, update

    config = micro()
    denoiser = build_seeded(config)
    optimizer = optim.build_optimizer(denoiser, config.train)
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        np.arange(2), np.array([7, 9]), torch.randn(2, 4, 8, 8, generator=generator),
        Conditioning(torch.randn(2, 3, 256, generator=generator), torch.zeros(2, 224)),
        torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([0.5, 0.6], dtype=torch.float64),
    )  # fmt: skip
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), backward=lambda loss: (loss * 1e30).backward(), reduce=lambda x, how: x
    )
    schedule = build_schedule(config.diffusion.schedule)
    before = {n: p.clone() for n, p in denoiser.named_parameters()}
    with torch.no_grad():
        next(denoiser.parameters()).register_hook(lambda g: g * float("inf"))
    with pytest.raises(NonFiniteLossError, match=r"samples of the batch: \[7, 9\]"):
        update(denoiser, optimizer, accelerator, [lambda: batch], schedule, config)
    assert all(torch.equal(before[n], p) for n, p in denoiser.named_parameters())
    assert not optimizer.state


def test_the_wrong_number_of_processes_is_refused(tmp_path, micro):
    with pytest.raises(ConfigError, match="torchrun --nproc_per_node 2"):
        train(micro({"train": {"num_processes": 2}}), tmp_path, progress=False)


def test_snapshots_at_multiples_of_keep_every_are_not_pruned(tmp_path, micro):
    config = micro({"train": {"checkpoint_every": 8, "keep_checkpoints": 1, "keep_every": 16}})
    train(config, tmp_path, progress=False)
    assert [int(p.name) for p in list_checkpoints(tmp_path)] == [16, 32, 48]


DDPM = {"schedule": {"name": "variance_preserving"}}
AXES = {
    "mask": {"encoders": {"padding": "mask"}},
    "attend": {"encoders": {"padding": "attend"}},
    "empty caption": {"encoders": {"null": "empty_caption", "dropout": {"caption": 0.5}}},
    "dropout per encoder": {"encoders": {"dropout": {"caption": 0.0, "clip_l": 0.464, "clip_g": 0.464, "t5": 0.464}}},
    "ddpm": {"diffusion": {**DDPM, "prediction": "epsilon"}, "sampling": {"sampler": "ddpm", "grid": "leading"}},
    "v": {"diffusion": {**DDPM, "prediction": "v", "density": {"name": "uniform"}}, "sampling": {"sampler": "ddim"}},
    "linear": {"train": {"weight_decay": 0.1, "clip_norm": None, "lr_schedule": "linear"}},
}


@pytest.mark.parametrize("axis", AXES)
def test_the_axes_of_the_product_train_and_sample(tmp_path, micro, axis):
    from mmdit.config import merge

    short = {"train": {"images": 16, "sample_every": 16, "validate_every": 16, "sample_prompts": ["a red circle"]}}
    result = train(micro(merge(short, AXES[axis])), tmp_path, progress=False)
    assert result.complete
    assert (tmp_path / "samples" / "000000000016.png").is_file()
