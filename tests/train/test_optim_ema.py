"""The optimiser's groups, curve and state; the EMA against torch's own."""

import math

import pytest
import torch
from torch import nn

from mmdit.checkpoint import CheckpointError
from mmdit.config import TrainConfig
from mmdit.train.ema import EMA
from mmdit.train.optim import build_optimizer, load_optimizer, lr_at, optimizer_tensors


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(4, 6, 3)
        self.norm = nn.GroupNorm(2, 6)
        self.linear = nn.Linear(6, 2)
        self.table = nn.Parameter(torch.zeros(2, 6))
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.linear(self.norm(self.conv(x)).mean((2, 3)) + self.table.sum(0))


def step(net, optimizer, seed):
    torch.manual_seed(seed)
    net(torch.randn(3, 4, 5, 5)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def test_weight_decay_spares_norms_biases_embeddings_and_tables():
    net = Net()
    optimizer = build_optimizer(net, TrainConfig(weight_decay=0.1))
    names = {id(p): n for n, p in net.named_parameters()}
    decayed = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {"conv.weight", "linear.weight"}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(names)


def test_moments_saved_and_loaded_go_on_bit_for_bit_in_channels_last():
    torch.manual_seed(0)
    net, twin = Net(), Net()
    config = TrainConfig(lr=0.01, weight_decay=0.1)
    optimizer, again = build_optimizer(net, config), build_optimizer(twin, config)
    for i in range(3):
        step(net, optimizer, i)
    twin.load_state_dict(net.state_dict())
    # what a file gives back is row-major; the moments must not be
    saved = {n: t.contiguous().clone() for n, t in optimizer_tensors(optimizer, net).items()}
    load_optimizer(again, twin, saved)
    assert again.state[twin.conv.weight]["exp_avg"].stride() == twin.conv.weight.stride()
    for i in range(3, 6):
        step(net, optimizer, i), step(twin, again, i)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_moments_of_another_model_are_refused():
    net = Net()
    optimizer = build_optimizer(net, TrainConfig())
    step(net, optimizer, 0)
    saved = optimizer_tensors(optimizer, net)
    with pytest.raises(CheckpointError, match="unknown parameters"):
        load_optimizer(build_optimizer(net, TrainConfig()), net, {**saved, "exp_avg.other": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="do not fit"):
        load_optimizer(build_optimizer(net, TrainConfig()), net, {**saved, "exp_avg.norm.bias": torch.zeros(7)})


def test_the_learning_rate_warms_up_in_images_and_decays_to_the_end():
    config = TrainConfig(images=1000, batch_size=10, lr=1.0, warmup_images=100)
    assert lr_at(config, 10) == pytest.approx(0.1)
    assert lr_at(config, 100) == pytest.approx(1.0)
    assert lr_at(config, 560) == pytest.approx(0.5)  # the update that begins half way between 100 and 1000
    assert 0 < lr_at(config, 1000) < 0.001
    assert lr_at(config, 1000) == pytest.approx(0.5 * (1 + math.cos(math.pi * 890 / 900)))
    linear = config.model_copy(update={"lr_schedule": "linear"})
    assert lr_at(linear, 1000) == pytest.approx(10 / 900)
    assert lr_at(config.model_copy(update={"lr_schedule": "constant"}), 1000) == 1.0
    rates = [lr_at(config, n) for n in range(10, 1001, 10)]
    assert max(rates) == 1.0
    assert rates.index(1.0) == 9


def test_the_ema_is_the_formula_with_warm_up():
    net = nn.Linear(3, 2)
    ema = EMA(net, decay=0.9)
    expected = net.weight.detach().clone()
    for n in range(200):
        with torch.no_grad():
            net.weight.add_(torch.randn_like(net.weight, dtype=torch.float32))
        ema.update()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * net.weight.detach()
    torch.testing.assert_close(ema.averages[0], expected, rtol=0, atol=2e-6)


def test_after_its_warm_up_the_ema_is_torchs():
    torch.manual_seed(0)
    net = Net()
    ema = EMA(net, decay=0.5)
    ema.updates = 1000  # past the warm-up
    oracle = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    oracle.update_parameters(net)  # its first update is a copy
    for _ in range(10):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        ema.update(), oracle.update_parameters(net)
    for ours, theirs in zip(ema.averages, oracle.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-6)


def test_the_module_runs_on_the_averages_inside_and_on_its_parameters_after():
    net = Net()
    ema = EMA(net, decay=0.5)
    for average in ema.averages:
        average.zero_()
    before = [p.clone() for p in net.parameters()]
    with ema.swapped():
        assert all(not p.any() for p in net.parameters())
    assert all(torch.equal(a, p) for a, p in zip(before, net.parameters(), strict=True))
    assert all(not a.any() for a in ema.averages)
    state = ema.state_dict(net)
    assert state.keys() == net.state_dict().keys()
    assert not state["conv.weight"].any()


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_power_average_weighs_past_parameters_by_their_time_to_the_gamma(sigma_rel, gamma):
    """Gammas as published (arXiv:2312.02696, section 3.1); weights from the closed form, in float64."""
    from mmdit.train.ema import power_of

    assert power_of(sigma_rel) == pytest.approx(gamma, abs=0.01)
    exact = power_of(sigma_rel)
    net = nn.Linear(1, 1, bias=False).double()
    ema = EMA(net, sigma_rel=sigma_rel)
    seen = []
    for _ in range(60):
        with torch.no_grad():
            net.weight.copy_(torch.randn(1, 1, dtype=torch.float64))
        seen.append(float(net.weight.detach()))
        ema.update()
    weights = []
    for n in range(60):  # update n enters with 1 - decay_n and is shrunk by every later decay
        later = [(1 - 1 / (m + 1)) ** (exact + 1) for m in range(n + 1, 60)]
        weights.append((1 - (1 - 1 / (n + 1)) ** (exact + 1)) * math.prod(later))
    assert sum(weights) == pytest.approx(1.0)
    assert float(ema.averages[0]) == pytest.approx(sum(w * x for w, x in zip(weights, seen, strict=True)), abs=1e-12)
    # the continuous profile: share of the weight before time u is u^(gamma + 1)
    assert sum(weights[:48]) == pytest.approx((48 / 60) ** (exact + 1), abs=1e-9)


def test_an_average_that_says_both_or_nothing_is_refused():
    from mmdit.config import ConfigError, load_config

    with pytest.raises(ConfigError, match="give one of decay"):
        load_config(None, {"train": {"more_emas": {"a": {}}}})
    with pytest.raises(ConfigError, match="a-z, 0-9"):
        load_config(None, {"train": {"more_emas": {"a b": {"decay": 0.9}}}})
    with pytest.raises(ValueError, match="sigma_rel must lie between"):
        EMA(Net(), sigma_rel=0.3)
