"""A guidance sweep on a micro run: one result a scale, kept, a table and a plot."""

import json

import numpy as np
import pytest
from mmdit_eval import plots
from mmdit_eval import suite as suites
from mmdit_eval.sweep import sweep_run
from PIL import Image

from mmdit.checkpoint import save_checkpoint, tensors_of
from mmdit.config import ConfigError, SuiteConfig
from mmdit.models import build_denoiser

SMALL = {"name": "s", "metrics": ("clip_score", "frechet"), "num_images": 8, "extractor": "pixel_statistics",
         "grid_prompts": 1}  # fmt: skip


@pytest.fixture
def run(tmp_path, micro):
    """A run folder with one checkpoint."""
    import torch

    config = micro()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        denoiser = build_denoiser(config.model)
        for parameter in denoiser.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    tensors = {"model": tensors_of(denoiser), "ema": tensors_of(denoiser)}
    save_checkpoint(tmp_path / "run", 48, tensors, {"images_seen": 48, "complete": True, "seconds": 1.0}, config)
    return tmp_path / "run"


def test_a_sweep_writes_a_point_a_scale_and_goes_on_where_it_was(run, monkeypatch):
    plot, table = sweep_run(run, [4.0, 0.0], SuiteConfig(**SMALL), say=lambda text: None)
    found = json.loads(table.read_text())
    assert [point["guidance_scale"] for point in found["points"]] == [0.0, 4.0]
    values = [point["scores"]["seen"]["frechet"]["value"] for point in found["points"]]
    assert values[0] != values[1]
    assert found["best"]["seen"] == found["points"][values.index(min(values))]["guidance_scale"]
    assert "sampling.guidance_scale" not in found["stamp"]["inference"]
    assert Image.open(plot).width > 1000
    drawn = []
    draw = suites.draw
    monkeypatch.setattr(suites, "draw", lambda *given: drawn.append(1) or draw(*given))
    sweep_run(run, [0, 1, 4], SuiteConfig(**SMALL), say=lambda text: None)
    assert len(drawn) == 2  # the new scale alone, two splits
    assert len(json.loads(table.read_text())["points"]) == 3


def test_scales_and_metrics_that_make_no_sweep_are_refused(run):
    for scales in ([], [1, 1], [-1]):
        with pytest.raises(ConfigError, match="--scales"):
            sweep_run(run, scales, SuiteConfig(**SMALL))
    with pytest.raises(ConfigError, match="a sweep draws a distance"):
        sweep_run(run, [1], SuiteConfig(**{**SMALL, "metrics": ("clip_score",)}))


def test_labels_of_points_that_nearly_coincide_stand_apart():
    from matplotlib import pyplot

    figure, axis = pyplot.subplots()
    points = np.array([[0.0, 0.0], [1.0, 1.0], [1.02, 1.0], [1.0, 1.03]])
    axis.plot(*points.T, "o")
    figure.canvas.draw()
    plots._label_apart(axis, points, ["0", "1.5", "2", "3"])
    boxes = [text.get_window_extent() for text in axis.texts]
    pyplot.close(figure)
    assert len(boxes) == 4
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
