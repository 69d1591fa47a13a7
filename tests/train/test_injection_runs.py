"""Runs whose text enters in another way: from the config through training and a checkpoint to a picture."""

import copy

import numpy as np
import pytest
import torch

from mmdit.config import ConfigError, model_config
from mmdit.denoiser import Conditioning
from mmdit.models import build_denoiser
from mmdit.pipeline import TextToImage
from mmdit.train.sharding import prepare_blocks, shard
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


STREAMS = {"text_streams": {"clip": 20, "t5": 24}}
SMALL = {"depth": 2, "width": 32, "num_heads": 4, "pos_embed_max_size": 8, "pos_embed_base_size": 4}


@pytest.fixture
def alone(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("how", ["sharded", "recomputed"])
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mmdit", {"weight_sets": 3, **STREAMS}),
        ("crossdit", {"injection": "decoupled", **STREAMS}),
        ("unet", {"injection": "joint", "weight_sets": 1}),
        ("unet", {"injection": "decoupled", **STREAMS}),
    ],
)
def test_blocks_that_pass_text_on_can_be_sharded_and_recomputed(alone, micro, micro_unet, name, fields, how):
    size = {key: value for key, value in micro_unet.items() if key != "name"} if name == "unet" else SMALL
    widths = {"in_channels": 4, "out_channels": 4, "context_dim": 24, "pooled_dim": 20}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = build_denoiser(model_config(name, **{**size, **widths, **fields}))
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        streams = (("clip", 0, 2, 20), ("t5", 2, 6, 24))
        text = Conditioning(torch.randn(2, 6, 24), torch.randn(2, 20), streams=streams)
        inputs = torch.randn(2, 4, 8, 8), torch.tensor([5.0, 900.0]), text
    other = copy.deepcopy(plain)
    if how == "sharded":
        shard(other, micro({"train": {"sharding": "fsdp2"}}).train, torch.device("cpu"))
    else:
        prepare_blocks(other, micro({"train": {"activation_checkpointing": True}}).train)
    for denoiser in (plain, other):
        denoiser.train()(*inputs).square().mean().backward()
    for (key, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
        if a.grad is not None:
            grad = b.grad.full_tensor() if how == "sharded" else b.grad
            torch.testing.assert_close(grad, a.grad, rtol=1e-4, atol=1e-4 * a.grad.abs().max().item(), msg=key)
