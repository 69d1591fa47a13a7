"""The table of released families: numbers that the releases' own code and configs give."""

import pytest

from mmdit.diffusion import build_schedule
from mmdit.releases import RELEASES, find_release
from mmdit.sampling import GRIDS, SAMPLERS


def sigmas(name, num_steps=None):
    release = find_release(name)
    schedule = build_schedule(release.diffusion.schedule)
    grid = GRIDS[release.sampling.grid](schedule, num_steps or release.sampling.num_steps)
    return schedule, grid


def test_sd3_walks_the_double_shifted_grid():
    schedule, grid = sigmas("sd3")
    levels = schedule.sigma(grid).tolist()
    assert len(levels) == 29
    assert levels[:3] == pytest.approx([1, 0.987381, 0.974108], abs=1e-6)
    assert levels[-3:] == pytest.approx([0.110906, 0.008929, 0], abs=1e-6)


@pytest.mark.parametrize("name", ["sd1.5", "sdxl"])
def test_the_unets_walk_981_961_to_1(name):
    schedule, grid = sigmas(name, 50)
    assert schedule.timestep(grid[:-1]).tolist() == pytest.approx(list(range(981, 0, -20)), abs=1e-9)
    assert float(schedule.betas[0]) == pytest.approx(0.00085)
    assert float(schedule.betas[-1]) == pytest.approx(0.012)


def test_turbo_takes_four_steps_without_guidance():
    release = find_release("sd3.5_large_turbo")
    assert (release.sampling.num_steps, release.sampling.guidance_scale) == (4, 1.0)
    assert len(sigmas("sd3.5_large_turbo")[1]) == 5


@pytest.mark.parametrize("release", RELEASES.values(), ids=lambda r: r.name)
def test_every_row_is_whole(release):
    assert release.sampling.sampler in SAMPLERS
    assert set(release.files) == {"denoiser", "vae", *release.towers}
    assert set(release.optional) <= set(release.towers)
    assert release.encoders.padding == "attend"
    assert release.null == ("zeros" if release.name == "sdxl" else "empty_caption")


def test_only_sd35_medium_has_skip_layer_guidance_of_its_own():
    assert [r.name for r in RELEASES.values() if r.skip_layer] == ["sd3.5_medium"]
    assert find_release("sd3.5_medium").skip_layer == (2.5, (7, 8, 9), 0.01, 0.2)


def test_a_wrong_family_names_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean 'sd3\.5_large'"):
        find_release("sd3.5_lage")
