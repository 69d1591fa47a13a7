"""Grids: descending t that ends in 0, and the releases' own levels to their published digits."""

import pytest
import torch

from mmdit.diffusion import RectifiedFlow, VariancePreserving
from mmdit.sampling import GRIDS

FLOW, SHIFTED, CHAIN = RectifiedFlow(), RectifiedFlow(3.0), VariancePreserving()
VALID = [
    ("linear", FLOW),
    ("linear", SHIFTED),
    ("linear", CHAIN),
    ("release", FLOW),
    ("release", SHIFTED),
    ("release", CHAIN),
    ("leading", CHAIN),
    ("karras", FLOW),
    ("karras", SHIFTED),
    ("karras", CHAIN),
]
REFUSED = [("leading", FLOW), ("leading", SHIFTED)]


def test_the_tables_cover_every_grid():
    assert {name for name, _ in VALID} == set(GRIDS)


@pytest.mark.parametrize(("name", "schedule"), VALID)
@pytest.mark.parametrize("num_steps", [1, 2, 28, 50, 999, 1000])
def test_a_grid_descends_strictly_from_at_most_one_to_exactly_zero(name, schedule, num_steps):
    grid = GRIDS[name](schedule, num_steps)
    assert grid.shape == (num_steps + 1,)
    assert grid.dtype == torch.float64
    assert grid[-1].item() == 0.0
    assert grid[0].item() <= 1.0
    assert (torch.diff(grid) < 0).all()
    if name in ("linear", "karras"):
        assert grid[0].item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("name", "schedule"), REFUSED)
def test_a_grid_that_the_schedule_cannot_have_is_refused(name, schedule):
    with pytest.raises(ValueError, match="'leading' is for variance_preserving"):
        GRIDS[name](schedule, 10)


@pytest.mark.parametrize("name", GRIDS)
def test_impossible_numbers_of_steps_are_refused(name):
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        GRIDS[name](CHAIN, 0)
    with pytest.raises(ValueError, match="the chain has 1000"):
        GRIDS[name](CHAIN, 1001)


def test_the_release_grid_of_sd3_is_the_double_shifted_one():
    sigma = SHIFTED.sigma(GRIDS["release"](SHIFTED, 28)).tolist()
    assert len(sigma) == 29
    assert sigma[:3] == pytest.approx([1.0, 0.987381, 0.974108], abs=5e-7)
    assert sigma[-3:] == pytest.approx([0.110906, 0.008929, 0.0], abs=5e-7)


def test_the_release_grid_without_shift_is_evenly_spaced_to_one_thousandth():
    grid = GRIDS["release"](FLOW, 5)
    torch.testing.assert_close(grid[:5], torch.linspace(1, 0.001, 5, dtype=torch.float64))


def test_the_leading_grid_is_that_of_stable_diffusion():
    index = CHAIN.timestep(GRIDS["leading"](CHAIN, 50)[:-1])
    assert index.tolist() == pytest.approx([981 - 20 * i for i in range(50)], abs=1e-9)
    assert CHAIN.timestep(GRIDS["leading"](CHAIN, 30)[:-1])[[0, -1]].tolist() == pytest.approx([958, 1], abs=1e-9)
    assert CHAIN.timestep(GRIDS["leading"](CHAIN, 1000)[:-1])[[0, -1]].tolist() == pytest.approx([999, 0], abs=1e-9)
    assert torch.equal(GRIDS["release"](CHAIN, 50), GRIDS["leading"](CHAIN, 50))


@pytest.mark.parametrize("schedule", [FLOW, SHIFTED, CHAIN])
def test_the_karras_grid_is_even_in_the_seventh_root_of_tau(schedule):
    root = schedule.tau(GRIDS["karras"](schedule, 20)[:-1]) ** (1 / 7)
    torch.testing.assert_close(torch.diff(root), torch.diff(root).mean().expand(19), rtol=1e-6, atol=1e-9)
