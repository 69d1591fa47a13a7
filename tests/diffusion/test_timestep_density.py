"""Densities of t: what is drawn has the distribution whose formula the paper prints."""

import math

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from mmdit.config import CosMapConfig, LogitNormalConfig, ModeConfig, UniformConfig
from mmdit.diffusion import DENSITIES, RectifiedFlow, VariancePreserving, pdf, sample_t

CONFIGS = [
    UniformConfig(),
    LogitNormalConfig(),
    LogitNormalConfig(mean=0.5, std=0.6),
    LogitNormalConfig(mean=-1.0, std=2.2),
    ModeConfig(scale=1.29),
    ModeConfig(scale=1.7),
    ModeConfig(scale=-1.0),
    CosMapConfig(),
]
every_density = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: str(c).replace(" ", ","))


def density(config):
    return lambda t: pdf(config, torch.tensor([t], dtype=torch.float64)).item()


def integral(config, high):
    points = [point for point in (0.1, 0.5, 0.9) if point < high]
    return quad(density(config), 0, high, points=points or None, epsabs=1e-8, epsrel=1e-8, limit=200)[0]


def test_the_list_of_configs_covers_every_density():
    assert {config.name for config in CONFIGS} == set(DENSITIES)


@every_density
def test_the_formula_integrates_to_one(config):
    assert integral(config, 1.0) == pytest.approx(1.0, abs=1e-6)


@every_density
def test_the_distribution_function_of_the_drawn_t_is_u(config):
    for u in (0.01, 0.3, 0.9):
        t = sample_t(config, torch.tensor([u], dtype=torch.float64)).item()
        assert integral(config, t) == pytest.approx(u, abs=1e-6)


@every_density
def test_t_rises_with_u_and_stays_inside_the_unit_interval_at_both_ends(config):
    u = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    t = sample_t(config, u)
    assert (torch.diff(t) >= 0).all()
    assert torch.isfinite(t).all()
    assert t[0].item() == pytest.approx(0, abs=1e-12)
    assert t[-1].item() == pytest.approx(1, abs=1e-12)


@every_density
def test_each_t_depends_on_its_own_u_alone(config):
    u = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sample_t(config, u)[2:4], sample_t(config, u[2:4]), rtol=0, atol=1e-15)
    assert sample_t(config, u).dtype == torch.float64
    assert sample_t(config, u.float()).dtype == torch.float32


def test_logit_normal_is_the_sigmoid_of_a_normal_and_a_positive_mean_prefers_noise():
    u = torch.tensor([0.025, 0.5, 0.8], dtype=torch.float64)
    expected = [1 / (1 + math.exp(-(0.5 + 0.6 * norm.ppf(p)))) for p in u.tolist()]
    assert sample_t(LogitNormalConfig(mean=0.5, std=0.6), u).tolist() == pytest.approx(expected, abs=1e-12)
    assert sample_t(LogitNormalConfig(mean=1.0), u)[1] > 0.5


def test_mode_sampling_is_the_papers_function_read_from_the_other_end():
    config = ModeConfig(scale=1.29)
    for u in (0.0, 0.2, 0.7, 1.0):
        papers = 1 - u - config.scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u)
        assert sample_t(config, torch.tensor([1 - u]).double()).item() == pytest.approx(papers, abs=1e-7)


def test_cosmap_matches_the_log_signal_to_noise_ratio_of_the_cosine_schedule():
    u = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    t = sample_t(CosMapConfig(), u)
    # Eq. 21: 2 log(cos(pi u / 2) / sin(pi u / 2)) = 2 log((1 - t) / t)
    torch.testing.assert_close((1 - t) / t, 1 / torch.tan(math.pi * u / 2), rtol=1e-12, atol=0)
    torch.testing.assert_close(t, 1 - 1 / (torch.tan(math.pi * u / 2) + 1), rtol=1e-12, atol=0)


def test_uniform_on_the_chain_draws_every_index_alike():
    schedule = VariancePreserving(num_steps=10)
    u = torch.tensor([0.0, 0.0999, 0.1001, 0.55, 0.9999], dtype=torch.float64)
    t = sample_t(UniformConfig(), u, schedule)
    assert schedule.timestep(t).tolist() == pytest.approx([0, 0, 1, 5, 9], abs=1e-9)
    assert torch.equal(sample_t(UniformConfig(), u, RectifiedFlow()), u)


@every_density
def test_on_the_chain_every_density_gives_indices_of_the_table(config):
    schedule = VariancePreserving()
    u = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    k = schedule.timestep(sample_t(config, u, schedule))
    torch.testing.assert_close(k, k.round(), rtol=0, atol=1e-9)
    assert k.min() >= 0
    assert k.max() <= 999


def test_what_is_no_uniform_is_refused():
    with pytest.raises(ValueError, match=r"u must lie in \[0, 1\]"):
        sample_t(UniformConfig(), torch.tensor([0.5, 1.5]))
