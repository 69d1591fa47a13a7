"""How text tokens travel through the stages of a U-Net with joint attention. Ours; docs/conditioning.md draws it.

A level is a stage by its resolution, down and up, and each has its own width. Where text comes to a level whose width
is another, it goes through a `TextEntry`:

    at first     text = W states
    going down   text = W LayerNorm(text of the level before)
    going up     text = W LayerNorm(text of the level before) + text as the way down left this level

The encoders' states are read again, at their full width, by every block beside what travels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmdit.config import UNetConfig
from mmdit.models.text import Text, project, text_projection

MIDDLE = "middle"


class TextStop(NamedTuple):
    """What one transformer has to do with text.

    Attributes:
        level: the stage, or "middle".
        reads: its blocks read text tokens.
        joint: and update them.
        down: it stands on the way down, so that it leaves its text for the way up.
        enters: text comes from another level, or from the encoders.
        carried: width of the text that comes, or None where there is none yet.
        last: no later transformer reads the text.
    """

    level: int | str
    reads: bool
    joint: bool = False
    down: bool = False
    enters: bool = False
    carried: int | None = None
    last: bool = False


class TextRoute:
    """Hands out the stops in the order in which the network runs; bookkeeping while it is built, no module."""

    def __init__(self, config: UNetConfig) -> None:
        self.config = config
        self.reading = config.reading_stages
        self.widths = [mult * config.model_channels for mult in config.channel_mult]
        self.at: int | str | None = None  # the level at which the text is
        self.width: int | None = None
        stages = [stage for stage in self.reading if isinstance(stage, int)]
        self.final: int | str = min(stages) if stages else MIDDLE

    def down(self, stage: int) -> TextStop:
        """Return the stop of a transformer in `input_blocks`."""
        return self._stop(stage, self.widths[stage], down=True)

    def middle(self) -> TextStop:
        """Return the stop of the middle block, which belongs to the deepest level where that has text."""
        deepest = len(self.widths) - 1
        return self._stop(MIDDLE, self.widths[-1], joined=deepest, last=self.final == MIDDLE)

    def up(self, stage: int, last_of_stage: bool) -> TextStop:
        """Return the stop of a transformer in `output_blocks`."""
        return self._stop(stage, self.widths[stage], last=last_of_stage and self.final == stage)

    def _stop(
        self,
        place: int | str,
        width: int,
        *,
        joined: int | None = None,
        down: bool = False,
        last: bool = False,
    ) -> TextStop:
        reads, joint = place in self.reading, self.config.injection == "joint"
        if not (reads and joint):
            return TextStop(place, reads)
        level = self.at if joined is not None and self.at == joined else place
        enters, carried = level != self.at, self.width
        self.at, self.width = level, width
        return TextStop(level, True, True, down, enters, carried if enters else None, last)


class TextEntry(nn.Module):
    """Text comes to a level: the encoders' states, or the text of the level before, on the way up with the skip."""

    def __init__(self, config: UNetConfig, width: int, stop: TextStop) -> None:
        super().__init__()
        if stop.carried is None:
            self.states = text_projection(config, width)
        else:
            self.norm = nn.LayerNorm(stop.carried)
            self.carried = nn.Linear(stop.carried, width)

    def forward(self, states: Text, text: Text | None, left: Text | None) -> Text:
        """Return the text in this level's width, [B, L, D].

        Args:
            states: the encoders', [B, L, E].
            text: of the level before, [B, L, D'], or None at the first level.
            left: what the way down left at this level, [B, L, D]; read on the way up.
        """
        if text is None:
            return project(self.states, states)
        carried = text.map(self._carry)
        return carried if left is None else left.combine(carried, torch.add)

    def _carry(self, text: Tensor) -> Tensor:
        return self.carried(self.norm(text))
