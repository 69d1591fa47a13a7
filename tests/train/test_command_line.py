"""The command line: what is refused, how fast, with which words and exit code."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from mmdit.config import load_config, to_yaml
from mmdit.data import make_dataset
from mmdit.encoders.vae import latent_statistics, load_run_vae, load_vae, to_pixels
from mmdit.train.__main__ import main, split_overrides
from mmdit.train.sources import build_sources, unusual_latents

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = str(ROOT / "configs" / "train" / "quickstart.yaml")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--train.batchsize", "8"], "did you mean 'train.batch_size'"),
        (["--model.name", "mmditt"], "did you mean 'mmdit'"),
        (["--sampling.sampler", "eular"], "did you mean 'euler'"),
        (["--encoders.t5_length", "0"], "encoders.t5_length"),
        (["--train.lr", "fast"], "train.lr"),
        (["--train.images", "5"], "less than one batch"),
        (["--model.patch_size", "3"], "not divisible by 3"),
        (["--seed"], "has no value"),
    ],
)
def test_a_wrong_config_is_exit_2_with_the_nearest_name(words, told, capsys):
    assert main([QUICKSTART, *words]) == 2
    assert told in capsys.readouterr().err


def test_a_missing_config_names_the_one_beside_it(capsys):
    assert main([QUICKSTART.replace("quickstart", "quickstrat")]) == 2
    assert "quickstart.yaml" in capsys.readouterr().err


def test_a_typo_is_answered_before_torch_is_imported():
    code = "import sys; from mmdit.train.__main__ import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, QUICKSTART, "--train.lrr", "1"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.split() == ["2", "False"]
    assert time.perf_counter() - began < 2
    assert "train.lr" in done.stderr


def test_own_flags_and_overrides_stand_in_any_order():
    own, overrides = split_overrides(
        ["--train.lr", "2e-4", "a.yaml", "--dry-run", "--seed=3", "--out", "runs/x", "train.images=8", "--name", "n"]
    )
    assert own == ["a.yaml", "--dry-run", "--out", "runs/x"]
    assert overrides == ["--train.lr", "2e-4", "--seed=3", "train.images=8", "--name", "n"]


@pytest.fixture
def config_file(tmp_path, micro):
    path = tmp_path / "micro.yaml"
    path.write_text(to_yaml(micro()))
    assert load_config(path) == micro()
    return str(path)


def test_a_dry_run_counts_and_trains_nothing(tmp_path, config_file, micro, capsys):
    import torch

    from mmdit.train.run import count_parameters
    from mmdit.train.trainer import build_seeded

    assert main([config_file, "--dry-run", "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert f"{count_parameters(build_seeded(micro())):,}" in out
    assert "6 updates of 8 images = 48 images" in out
    assert "GFLOP forward" in out
    assert not (tmp_path / "run").exists()
    assert torch.get_default_device().type == "cpu"


def test_counted_flop_are_those_of_the_formula(micro):
    from mmdit.train.estimate import estimate

    config = micro({"model": {"depth": 1, "width": 64}})
    costs = estimate(config)
    N, L, D = costs.image_tokens, costs.text_tokens, 64
    assert N == 16
    block = 2 * D * D * ((3 + 1 + 8) * N + 2 * L)  # image: qkv, proj, mlp; context of the last block: k and v only
    attention = 2 * 2 * N * (N + L) * D
    modulation = 2 * D * D * (6 + 2)
    embed = 2 * N * D * 16 + 2 * L * 256 * D + 2 * (256 * D + D * D) + 2 * (224 * D + D * D)
    last = 2 * D * D * 2 + 2 * N * D * 16
    assert costs.forward_flop == block + attention + modulation + embed + last
    assert 2 < costs.training_flop / costs.forward_flop < 3.01


def test_training_from_the_command_line_ends_with_0_and_sampling_works_on_the_run(tmp_path, config_file, capsys):
    import json

    from PIL import Image

    from mmdit.pipeline import sample_to_folder

    run, out = tmp_path / "run", tmp_path / "out"
    assert main([config_file, "--out", str(run), "--quiet", "--train.images", "16"]) == 0
    assert "done: 16 images" in capsys.readouterr().out
    assert sample_to_folder(run, ["a red circle", "a blue square"], num_images=2, steps=3, seed=5, out=out) == 0
    assert sorted(p.name for p in out.iterdir()) == ["00000.png", "00001.png", "00002.png", "00003.png", "grid.png"]
    with Image.open(out / "00002.png") as picture:
        notes = picture.text
    assert notes["prompt"] == "a blue square"
    assert json.loads(notes["seed"]) == 5
    assert json.loads(notes["index"]) == 2
    assert json.loads(notes["num_steps"]) == 3
    assert notes["sampler"] == "euler"
    manifest = json.loads((run / "checkpoints" / "000000000016" / "manifest.json").read_text())
    assert notes["checkpoint_sha256"] == manifest["files"]["ema.safetensors"]["sha256"]

    assert sample_to_folder(tmp_path / "rum", ["a red circle"]) == 2
    assert str(run) in capsys.readouterr().err
    assert sample_to_folder(run, ["a red circle"], sampler="eular") == 2
    assert "did you mean 'euler'" in capsys.readouterr().err
    assert sample_to_folder(run, ["a red circle"], size=60) == 2
    assert "not a multiple of 16" in capsys.readouterr().err


def test_an_interrupted_run_exits_75_and_says_how_to_go_on(tmp_path, config_file, capsys, monkeypatch):
    import os
    import signal

    import mmdit.train.trainer as room

    original = room.update

    def update(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(room, "update", update)
    assert main([config_file, "--out", str(tmp_path / "run"), "--quiet"]) == 75
    out = capsys.readouterr().out
    assert "go on with: python scripts/train.py" in out
    assert "000000000008" in out


def test_statistics_prints_the_lines_that_standardise_the_latents_of_the_data(config_file, capsys, micro):
    assert main([config_file, "--statistics"]) == 0
    lines = yaml.safe_load(capsys.readouterr().out)
    config = micro({"encoders": lines})
    assert len(config.encoders.latent_shift) == 4
    data = make_dataset(config.data, "train")
    with torch.no_grad():
        latents = load_run_vae(config.encoders).encode(to_pixels(data.pixels(range(len(data)))))
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
    assert main([QUICKSTART, "--encoders.latent_shift", "[0.1, 0.2]"]) == 2
    assert "latent_shift has 2 numbers, the VAE 'tiny' has 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model.in_channels", "16"], "set --model.in_channels 4"),
        (["--model.in_channels", "16", "--cache-only"], "set --model.in_channels 4"),
        (["--encoders.latent_shift", "[0.1, 0.2]"], "latent_shift has 2 numbers"),
    ],
)
def test_encoders_that_do_not_fit_are_refused_before_they_encode_anything(words, told, config_file, tmp_path, capsys):
    words = [config_file, *words, "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache"), "--quiet"]
    assert main(words) == 2
    assert told in capsys.readouterr().err
    assert not list((tmp_path / "cache").glob("*"))


def test_missing_data_is_told_by_statistics_as_well(tmp_path, capsys):
    emoji = str(ROOT / "configs" / "train" / "emoji.yaml")
    assert main([emoji, "--statistics", "--data.path", str(tmp_path / "emoji.parquet")]) == 2
    assert "build_emoji" in capsys.readouterr().err


def test_latents_of_other_pictures_are_remarked_on(tmp_path, micro):
    config = micro()
    odd = micro({"encoders": {"latent_shift": 3.0, "latent_scale": 0.2}})
    notes = [unusual_latents(build_sources(c, tmp_path, progress=False).train) for c in (config, odd)]
    assert "cache.py CONFIG --statistics" in notes[1]
    fitting = "latent_shift", "latent_scale"
    shift, scale = latent_statistics(
        load_vae(config.encoders.vae), [make_dataset(config.data, "train").pixels(range(20))]
    )
    best = micro({"encoders": dict(zip(fitting, (shift, scale), strict=True))})
    assert unusual_latents(build_sources(best, tmp_path, progress=False).train) == ""


def test_the_quickstarts_statistics_are_those_of_its_data():
    config = load_config(QUICKSTART)
    images = make_dataset(config.data, "train").pixels(range(0, 40_000, 200))
    with torch.no_grad():
        latents = load_run_vae(config.encoders).encode(to_pixels(images))
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.1
    assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.1


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "hardware").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_hardware_file_changes_processes_and_nothing_that_is_learnt(path):
    from mmdit.config import differences, load_config, to_tree
    from mmdit.train.trainer import RESUMABLE

    plain = load_config(ROOT / "configs/train/quickstart.yaml", ["--train.batch_size", "64"])
    laid = load_config(ROOT / "configs/train/quickstart.yaml", ["--train.batch_size", "64"], path)
    changed = differences(to_tree(plain), to_tree(laid))
    assert all(field in RESUMABLE for field in changed)
    assert laid.train.num_processes == {"cpu2": 2, "gpu1": 1}.get(path.stem, 8 if "gpu8" in path.stem else 32)


def test_a_hardware_file_that_sets_a_learning_rate_is_refused(tmp_path):
    from mmdit.config import ConfigError, load_config

    (tmp_path / "mine.yaml").write_text("train: {num_processes: 2, lr: 1.0}")
    with pytest.raises(ConfigError, match=r"got train\.lr; put those into the run's own config"):
        load_config(None, {}, tmp_path / "mine.yaml")
