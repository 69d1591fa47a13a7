"""Work split over processes: whole, sorted, the same for every world and batch size; resumed where it stopped."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mmdit_eval import feature_cache, suite
from mmdit_eval.distribution import Share, draw_batches, join
from mmdit_eval.feature_cache import extract_set
from mmdit_eval.features import load_extractor
from mmdit_eval.frechet import frechet_distance
from mmdit_eval.image_sets import from_array
from mmdit_eval.suite import evaluate_run

from mmdit import rng
from mmdit.checkpoint import save_checkpoint, tensors_of
from mmdit.config import SuiteConfig
from mmdit.models import build_denoiser

ROOT = Path(__file__).resolve().parents[2]


def draw(rows):
    """Pictures that depend on their id alone, as a sampler's do."""
    noise = rng.normal(0, "sample_noise", range(rows.start, rows.stop), (8, 8, 3))
    return np.clip(127 + 60 * noise, 0, 255).astype(np.uint8)


def drawn_by(world, count, batch_size, folder):
    shares = [Share(rank, world) for rank in range(world)]
    parts = [draw_batches(draw, count, batch_size, folder / str(world), share) for share in shares]
    return join([(ids, [pictures]) for ids, pictures in parts], count)[0]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 101, 256])
def test_pictures_and_features_do_not_depend_on_processes_and_batches(count, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "CHUNK", 16)
    extractor = load_extractor("pixel_statistics")
    pictures = draw(slice(0, count))
    expected, _ = extract_set(extractor, from_array(pictures), batch_size=256)
    for world in (1, 2, 3, 4):
        for batch_size in (1, 5, 64):
            found = drawn_by(world, count, batch_size, tmp_path / f"{batch_size}")
            assert np.array_equal(found, pictures)
            parts = [
                extract_set(extractor, from_array(found), batch_size=batch_size, rank=rank, world=world)
                for rank in range(world)
            ]
            features = join([(ids, [values]) for values, ids in parts], count)[0]
            assert np.linalg.norm(features - expected) <= 1e-6 * np.linalg.norm(expected)
    if count > 2:
        other = draw(slice(1000, 1000 + count))
        others, _ = extract_set(extractor, from_array(other))
        assert frechet_distance(features, others) == pytest.approx(frechet_distance(expected, others), rel=1e-6)


def test_the_network_extractor_does_not_depend_on_batches():
    extractor = load_extractor("tiny_clip")
    pictures = from_array(draw(slice(0, 12)))
    expected, _ = extract_set(extractor, pictures, batch_size=12)
    for batch_size in (1, 7):
        found, _ = extract_set(extractor, pictures, batch_size=batch_size)
        assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("ids", "message"),
    [([0, 1, 3], "1 missing [2]"), ([0, 1, 2, 2, 3], "1 there more than once [2]"), ([0, 1, 2, 3, 4], "0 missing")],
)
def test_samples_that_are_missing_double_or_foreign_are_refused(ids, message):
    with pytest.raises(RuntimeError) as error:
        join([(np.array(ids[:2]), [np.zeros(2)]), (np.array(ids[2:]), [np.zeros(len(ids) - 2)])], 4)
    assert message in str(error.value)


def test_rows_come_back_in_the_order_of_their_ids():
    parts = [(np.array([4, 0, 2]), [np.array([40, 0, 20])]), (np.array([1, 3]), [np.array([10, 30])])]
    assert join(parts, 5)[0].tolist() == [0, 10, 20, 30, 40]


def test_finished_batches_are_taken_and_damaged_ones_drawn_again(tmp_path, caplog):
    drawn = []

    def counted(rows):
        drawn.append(rows.start)
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return draw(rows)

    with pytest.raises(KeyboardInterrupt):
        draw_batches(counted, 20, 4, tmp_path, Share())
    assert drawn == [0, 4, 8, 12]
    assert sorted(path.name for path in tmp_path.iterdir())[0] == "000000000-000000004.npy"
    (tmp_path / "000000004-000000008.npy").write_bytes(b"\x93NUMPY half")
    with caplog.at_level(logging.WARNING):
        ids, pictures = draw_batches(counted, 20, 4, tmp_path, Share())
    assert drawn[4:] == [4, 12, 16]
    assert "damaged" in caplog.text
    assert ids.tolist() == list(range(20))
    assert np.array_equal(pictures, draw(slice(0, 20)))


def test_a_rank_outside_the_world_and_a_world_without_address_are_refused(monkeypatch):
    for name, value in (("RANK", "2"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="RANK is 2 and WORLD_SIZE 2"):
        Share.from_environment()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="torchrun --nproc_per_node 2"):
        Share.from_environment()


@pytest.fixture
def run(tmp_path, micro):
    """A run folder with one checkpoint."""
    import torch

    config = micro({"data": {"num_images": 40}})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        denoiser = build_denoiser(config.model)
        for parameter in denoiser.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tensors = {"model": tensors_of(denoiser), "ema": tensors_of(denoiser)}
    folder = tmp_path / "run"
    save_checkpoint(folder, 48, tensors, {"images_seen": 48, "complete": True, "seconds": 1.0}, config)
    (folder / "config.yaml").write_text((folder / "checkpoints/000000000048/config.yaml").read_text())
    return folder


SMALL = {"name": "s", "metrics": ("frechet", "clip_score"), "splits": ("seen",), "num_images": 11, "batch_size": 2,
         "extractor": "pixel_statistics", "grid_prompts": 1}  # fmt: skip


def test_an_interrupted_run_goes_on_with_the_finished_batches(run, monkeypatch):
    drawn = []
    real = suite.draw

    def interrupted(pipeline, reference, config):
        drawn.append(len(reference.indices))
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return real(pipeline, reference, config)

    monkeypatch.setattr(suite, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(run, SuiteConfig(**SMALL), say=lambda text: None)
    assert len(list(run.rglob("*.npy"))) == 3
    resumed = evaluate_run(run, SuiteConfig(**SMALL), say=lambda text: None)
    assert drawn == [2, 2, 2, 2, 2, 2, 1]
    assert not list(run.rglob("*.npy"))
    monkeypatch.setattr(suite, "draw", real)
    fresh = evaluate_run(run, SuiteConfig(**{**SMALL, "name": "fresh"}), say=lambda text: None)
    assert resumed["splits"] == fresh["splits"]


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(run):
    metrics = ("frechet", "clip_score", "retrieval", "kernel", "memorisation", "validation_loss", "common_loss")
    given = {**SMALL, "metrics": metrics}
    alone = evaluate_run(run, SuiteConfig(**given), say=lambda text: None)
    words = [f"--{key}={json.dumps(value)}" for key, value in {**given, "name": "two"}.items()]
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'eval'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, str(ROOT / "scripts/evaluate.py"), str(run), *words],
        capture_output=True, text=True, env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    both = json.loads((run / "eval" / "two-000000000048.json").read_text())
    assert both["stamp"] == alone["stamp"]
    for name, estimate in alone["splits"]["seen"]["scores"].items():
        assert both["splits"]["seen"]["scores"][name]["value"] == pytest.approx(estimate["value"], rel=1e-6)
    assert both["splits"]["seen"]["per_image"] == alone["splits"]["seen"]["per_image"]
    assert done.stdout.count("CLIP-score") == 1  # one table, not one a process
