"""Runs whose text enters in another way: from the config through training and a checkpoint to a picture."""

import numpy as np
import pytest

from mmdit.config import ConfigError
from mmdit.pipeline import TextToImage
from mmdit.train.tracking import read_metrics
from mmdit.train.trainer import train

RUNS = {
    "three sets": {"model": {"weight_sets": 3}},
    "pooled": {"model": {"injection": "pooled"}},
    "unet joint": {"model": {"injection": "joint", "text_projection": "per_encoder"}},
    "unet decoupled": {"model": {"injection": "decoupled", "text_in_query": True}},
}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_trains_is_saved_and_draws(tmp_path, micro, micro_unet, text, run):
    changes = RUNS[run]
    if run.startswith("unet"):
        changes = {"model": {**micro_unet, **changes["model"]}}
    config = micro({**changes, "train": {"images": 16}})
    train(config, tmp_path, progress=False)
    assert all(np.isfinite(r["loss"]) for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "train")
    pipeline = TextToImage.load(tmp_path, text=text)
    assert pipeline.denoiser.config == config.model
    images = pipeline(["a red circle", "a blue square above a green circle"], seed=3)
    assert images.shape == (2, 64, 64, 3)


def test_streams_that_the_encoders_do_not_give_are_refused_before_training(tmp_path, micro, monkeypatch):
    import mmdit.config.run as room

    monkeypatch.setattr(room, "STREAM_WIDTHS", {})  # as for encoders of which the config knows nothing
    config = micro({"model": {"weight_sets": 3, "text_streams": {"clip": 96, "t5": 256}}})
    with pytest.raises(ConfigError, match=r"set --model.text_streams \"{'clip': 224, 't5': 256}\""):
        train(config, tmp_path, progress=False)
