"""Solve a backbone's widths for a budget, so that two rows of a study differ in how text enters and not in size.

    target = measure(reference, tokens=24, latent_size=8).parameters
    match = solve(config, target, by="parameters", tokens=24, latent_size=8)      # match.config, match.note

Two knobs, coarse and fine. The width goes in whole attention heads, whose size the config keeps (64 in most presets,
48 in the tiny MMDiT): a step there is some 40 % in parameters. The feed-forward width, in multiples of 8, makes up the
rest: at a given width parameters and FLOP are both linear in it, so two counts give the answer.

The feed-forward ratio is kept between 2 and 6, where it changes a network's size and not its kind. A U-Net's GEGLU has
three matrices where an MLP has two, so its `ff_mult` counts 3/2: 4, as in Stable Diffusion, is a ratio of 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmdit.config import CrossDiTConfig, MMDiTConfig, UNetConfig
from mmdit.denoiser import Conditioning, Streams
from mmdit.models import build_denoiser
from mmdit.models.flops import forward_flops
from mmdit.models.text import even_streams
from mmdit.registry import unknown

Backbone = MMDiTConfig | CrossDiTConfig | UNetConfig
By = Literal["parameters", "flops"]
Count = Callable[[Backbone], int]
RATIOS = (2.0, 6.0)  # least and largest feed-forward ratio
FF_MULTIPLE = 8  # of the feed-forward width


class Size(NamedTuple):
    """What a backbone costs: parameters, and FLOP of one forward of one image."""

    parameters: int
    flops: int


class Match(NamedTuple):
    """A solved config, its counts (parameters; FLOP of one forward of one image), and what was changed, in words."""

    config: Backbone
    parameters: int
    flops: int
    note: str


class NoMatchError(ValueError):
    """No widths bring this backbone to the target; the message names the nearest."""


class _Solution(NamedTuple):
    config: Backbone
    ratio: float  # feed-forward ratio
    value: int  # what `by` counts


def measure(config: Backbone, *, tokens: int | Streams, latent_size: int | tuple[int, int]) -> Size:
    """Count a backbone with torch's own counter, on `meta`: no memory, no time.

    Args:
        tokens: L, text tokens of one image, or the streams they lie in; see `forward_flops`.
        latent_size: H and W, latent pixels.

    Raises:
        ValueError: a size that the backbone cannot take.
    """
    height, width = (latent_size, latent_size) if isinstance(latent_size, int) else latent_size
    with torch.device("meta"):
        denoiser = build_denoiser(config).eval()
        latents = torch.zeros(1, config.in_channels, height, width)
        pooled = None if config.pooled_dim is None else torch.zeros(1, config.pooled_dim)
        streams = even_streams(config, tokens) if isinstance(tokens, int) else tokens
        context = torch.zeros(1, tokens if isinstance(tokens, int) else tokens[-1][2], config.context_dim)
        conditioning = Conditioning(context, pooled, streams=streams)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            denoiser(latents, torch.zeros(1), conditioning)
    return Size(sum(p.numel() for p in denoiser.parameters()), int(counter.get_total_flops()))


def solve(
    config: Backbone,
    target: float,
    by: By = "parameters",
    *,
    tokens: int | Streams,
    latent_size: int | tuple[int, int],
    within: float = 0.01,
) -> Match:
    """Change width and feed-forward width of a backbone until it costs as much as a reference.

    A config that already does is returned as it is. Otherwise, of the widths that can be brought to the target, the
    one whose feed-forward ratio stays nearest to the config's own is taken.

    Args:
        config: the backbone; depth, head size and all else stay.
        target: parameters, or FLOP of one forward of one image: a number of `measure(reference)`.
        tokens, latent_size: of the study; they decide FLOP.
        within: how far off the target the result may be, relative.

    Raises:
        NoMatchError: there is none with a feed-forward ratio in [2, 6]; the nearest is named.
        ValueError: an unknown `by`, or a target or tolerance that is not positive.
    """
    if by not in Size._fields:
        raise ValueError(unknown("budget to match by", by, Size._fields))
    if not (target > 0 and within > 0):
        raise ValueError(f"target and within must be positive, got {target} and {within}")

    def count(candidate: Backbone) -> int:
        if by == "parameters":
            return _parameters(candidate)
        return forward_flops(candidate, tokens=tokens, latent_size=latent_size)

    if abs(count(config) / target - 1) <= within:
        solution = _Solution(config, ff_ratio(config), count(config))
    else:
        found = _candidates(config, target, count)
        fitting = [s for s in found if abs(s.value / target - 1) <= within and _allowed(s.ratio)]
        if not fitting:
            raise NoMatchError(_why_not(config, found, target, by, within))
        solution = min(fitting, key=lambda s: abs(math.log(s.ratio / ff_ratio(config))))
    size = measure(solution.config, tokens=tokens, latent_size=latent_size)
    return Match(solution.config, *size, _note(config, solution, target, by))


def ff_ratio(config: Backbone) -> float:
    """Return the feed-forward ratio as that of an MLP with two matrices."""
    return 1.5 * config.ff_mult if isinstance(config, UNetConfig) else config.mlp_ratio


def _allowed(ratio: float) -> bool:
    return RATIOS[0] - 1e-9 <= ratio <= RATIOS[1] + 1e-9


@lru_cache(maxsize=256)
def _parameters(config: Backbone) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_denoiser(config).parameters())


# --- the two knobs --------------------------------------------------------------------------------------------------


def _width(config: Backbone) -> int:
    return config.model_channels if isinstance(config, UNetConfig) else config.width


def _with(config: Backbone, width: int | None = None, ff_width: int | None = None) -> Backbone | None:
    """Return the config with another width or feed-forward width (a U-Net's at `model_channels`); None: not valid."""
    tree = config.model_dump()
    names = ("model_channels", "ff_mult") if isinstance(config, UNetConfig) else ("width", "mlp_ratio")
    if width is not None:
        tree[names[0]] = width
        if not isinstance(config, UNetConfig):
            tree["num_heads"] = width // (config.width // config.num_heads)
    if ff_width is not None:
        tree[names[1]] = _ratio_of(ff_width, tree[names[0]])
    try:
        return type(config)(**tree)
    except ValueError:
        return None


def _ratio_of(ff_width: int, width: int) -> float:
    """Return a ratio of at most 6 decimals which times `width` gives `ff_width`, rounded or cut off."""
    millionths = -(-ff_width * 10**6 // width)
    while int(width * (millionths / 10**6)) < ff_width:  # 2.3 * 10 is 22.999999999999996
        millionths += 1
    return millionths / 10**6


def _widths(config: Backbone) -> list[int]:
    """The widths around a config's own that whole heads (and norm groups) allow, from an eighth to eight times it."""
    if isinstance(config, UNetConfig):
        step = 8
    else:
        step = config.width // config.num_heads
    own = _width(config)
    every = range(step * math.ceil(own / 8 / step), 8 * own + 1, step)
    return [width for width in every if _with(config, width) is not None]


def _candidates(config: Backbone, target: float, count: Count) -> list[_Solution]:
    """Solve the feed-forward width at every width that could come near the target."""
    widths = _widths(config)
    low, high = 0, len(widths) - 1  # first width whose largest network reaches the target
    while low < high:
        middle = (low + high) // 2
        if count(_ends(config, widths[middle])[1]) < target:
            low = middle + 1
        else:
            high = middle
    found = []
    for width in widths[max(0, low - 1) :]:
        found += _solved(config, width, target, count)
        if count(_ends(config, width)[0]) > target:
            break
    return found


def _ends(config: Backbone, width: int) -> tuple[Backbone, Backbone]:
    """The config at another width, with the least and the largest feed-forward width that is allowed there."""
    unit = FF_MULTIPLE * (1.5 if isinstance(config, UNetConfig) else 1.0) / width  # what one step adds to the ratio
    least = _with(config, width, FF_MULTIPLE * math.ceil(RATIOS[0] / unit - 1e-9))
    largest = _with(config, width, FF_MULTIPLE * math.floor(RATIOS[1] / unit + 1e-9))
    assert least is not None  # `_widths` saw to it
    assert largest is not None
    return least, largest


def _solved(config: Backbone, width: int, target: float, count: Count) -> list[_Solution]:
    """The feed-forward width that comes nearest to the target at this width; and the nearest that is allowed."""
    ends = _ends(config, width)
    values, hidden = [count(end) for end in ends], [_hidden(end) for end in ends]
    slope = (values[1] - values[0]) / (hidden[1] - hidden[0])
    wanted = hidden[0] + (target - values[0]) / slope
    chosen = {FF_MULTIPLE * max(1, round(wanted / FF_MULTIPLE)), hidden[0], hidden[1]}
    solutions = []
    for ff_width in sorted(chosen):
        solved = _with(config, width, ff_width)
        if solved is not None:
            solutions.append(_Solution(solved, ff_ratio(solved), count(solved)))
    return solutions


def _hidden(config: Backbone) -> int:
    """The feed-forward width; of a U-Net that of a stage of `model_channels`."""
    if isinstance(config, UNetConfig):
        return round(config.model_channels * config.ff_mult)
    return int(config.width * config.mlp_ratio)


# --- words ----------------------------------------------------------------------------------------------------------


def _note(before: Backbone, solution: _Solution, target: float, by: By) -> str:
    """Say what was changed and how near it came."""
    after, changes = solution.config, []
    for field in ("width", "num_heads", "mlp_ratio", "model_channels", "ff_mult"):
        old, new = getattr(before, field, None), getattr(after, field, None)
        if old != new:
            changes.append(f"{field} {old:g} -> {new:g}")
    if not changes:
        changes = ["unchanged"]
    return f"{', '.join(changes)}: {_amount(solution.value, by)}, {_off(solution.value, target)}"


def _why_not(config: Backbone, found: list[_Solution], target: float, by: By, within: float) -> str:
    """Name the nearest config that is allowed, and the ratio that would have fitted where there is one."""
    goal = f"{_amount(round(target), by)} within {100 * within:g} %"
    if isinstance(config, UNetConfig):
        head = f", heads of {config.head_dim}" if config.num_heads is None else f", {config.num_heads} heads a stage"
    else:
        head = f", heads of {config.width // config.num_heads}"
    allowed = [s for s in found if _allowed(s.ratio)]
    nearest = min(allowed, key=lambda s: abs(math.log(s.value / target)))
    message = (
        f"no {config.name} (depth and all else as given{head}) has {goal} with a feed-forward ratio between "
        f"{RATIOS[0]:g} and {RATIOS[1]:g}. The nearest: {_note(config, nearest, target, by)}"
    )
    beyond = [s for s in found if not _allowed(s.ratio) and abs(s.value / target - 1) <= within]
    if beyond:
        fit = min(beyond, key=lambda s: abs(math.log(s.ratio / ff_ratio(config))))
        message += f". A ratio of {fit.ratio:.2f} would fit: {_note(config, fit, target, by)}"
    return f"{message}. Change its depth, its heads or the reference, or raise match.within"


def _amount(value: float, by: By) -> str:
    return f"{value:,} parameters" if by == "parameters" else f"{value / 1e9:,.3f} GFLOP a forward"


def _off(value: float, target: float) -> str:
    off = 100 * (value / target - 1)
    return "the target" if value == target else f"{abs(off):.2f} % {'above' if off > 0 else 'below'} the target"
