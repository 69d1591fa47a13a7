"""The loop of the tiny text recipes: what it minimises, its learning rate, and the record it leaves."""

import json

import pytest
import torch
from torch import nn

from mmdit.train.recipe import run_recipe, write_description


def build(factors=(1.0, 0.5)):
    weights = [nn.Parameter(torch.full((2,), 3.0)) for _ in factors]
    groups = [{"params": [w], "factor": f} for w, f in zip(weights, factors, strict=True)]
    return weights, torch.optim.SGD(groups, lr=0.0)


def test_it_minimises_the_sum_of_its_losses_and_records_how():
    weights, optimizer = build()
    record = run_recipe(
        lambda step: {"first": weights[0].square().sum(), "second": (weights[1] - 1).square().sum()},
        weights, optimizer, lr=0.2, steps=200, log=lambda _: None,
    )  # fmt: skip
    assert weights[0].abs().max() < 1e-2
    assert (weights[1] - 1).abs().max() < 1e-2
    assert record["steps"] == 200
    assert record["lr_schedule_by"] == "steps"
    assert set(record["loss"]) == {"first", "second"}
    assert record["loss"]["first"] < 0.1


def test_the_rate_warms_up_falls_on_a_cosine_and_differs_by_group():
    weights, optimizer = build()
    rates, done = [], []

    def losses(step):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return {"loss": weights[0].sum() * 0 + weights[1].sum() * 0}

    run_recipe(losses, weights, optimizer, lr=1.0, steps=100, warmup=10, log=lambda _: None, after=done.append)
    assert rates[0] == pytest.approx([0.1, 0.05])
    assert rates[50][0] == pytest.approx(0.02 + 0.98 * 0.5)
    assert rates[99][0] == pytest.approx(0.02, abs=1e-3)
    assert all(second == pytest.approx(first / 2) for first, second in rates)
    assert done == list(range(1, 101))


def test_a_description_keeps_the_other_parts(tmp_path):
    write_description(tmp_path, "t5", {"config": {"t5": {"d": 1}}, "training": {"steps": 1}, "quality": {"a": 99}})
    write_description(tmp_path, "clip", {"config": {"clip_l": {"d": 2}}, "training": {"steps": 2}, "quality": {}})
    stored = json.loads((tmp_path / "text.json").read_text())
    assert stored["encoders"] == {"t5": {"d": 1}, "clip_l": {"d": 2}}
    assert stored["training"] == {"t5": {"steps": 1}, "clip": {"steps": 2}}
    assert stored["quality"] == {"t5": {"a": 99}, "clip": {}}
