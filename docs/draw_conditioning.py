"""Draw docs/conditioning.svg: the ways text enters, and its way through a U-Net with joint attention.

The lower half is read off the network's own plan (`TextRoute`), so that the picture cannot say anything else.

    python docs/draw_conditioning.py
"""

from __future__ import annotations

from pathlib import Path

from mmdit.config import UNetConfig, model_config
from mmdit.models.unet_text import TextRoute, TextStop

IMAGE, TEXT, SHARED, POOLED, INK = "#c9dcf2", "#f7d9b0", "#e3e3e3", "#d5ecd0", "#222222"
WIDTH, HEIGHT = 1120, 770


class Canvas:
    """An SVG as a list of elements."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, words: str, color: str) -> None:
        """A filled box with one line of words, or several parted by |."""
        self.parts.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="5" fill="{color}" stroke="{INK}"/>')
        lines = words.split("|")
        for i, line in enumerate(lines):
            self.words(x + w / 2, y + h / 2 + 4 + 14 * (i - (len(lines) - 1) / 2), line)

    def words(self, x: float, y: float, words: str, size: int = 12, anchor: str = "middle", bold: bool = False) -> None:
        """One line of words."""
        weight = ' font-weight="bold"' if bold else ""
        style = f'font-size="{size}" text-anchor="{anchor}"{weight} fill="{INK}"'
        self.parts.append(f'<text x="{x}" y="{y}" {style}>{words}</text>')

    def arrow(self, *points: tuple[float, float], color: str = INK) -> None:
        """A line through points, with a head at its end."""
        path = " ".join(f"{x},{y}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5" marker-end="url(#head)"/>'
        )

    def svg(self) -> str:
        """The file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'font-family="Helvetica, Arial, sans-serif"><defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" '
            f'markerWidth="7" markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>'
        )
        return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *self.parts, "</svg>", ""])


def draw_injections(canvas: Canvas) -> None:
    """The four values of `model.injection`, side by side."""
    columns = {"joint": "mmdit, unet", "cross": "crossdit, unet", "decoupled": "crossdit, unet", "pooled": "all three"}
    for i, (name, where) in enumerate(columns.items()):
        x = 20 + 275 * i
        canvas.words(x + 115, 30, name, 16, bold=True)
        canvas.words(x + 115, 48, where, 11)
        canvas.box(x + 10, 210, 90, 34, "image tokens", IMAGE)
        canvas.arrow((x + 55, 210), (x + 55, 164 if name == "joint" else 122))
        if name == "joint":
            canvas.box(x + 130, 210, 90, 34, "text tokens", TEXT)
            canvas.arrow((x + 175, 210), (x + 175, 164))
            canvas.words(x + 50, 190, "QKV", 11, "end"), canvas.words(x + 182, 190, "QKV", 11, "start")
            canvas.box(x + 10, 130, 210, 34, "one attention over both", SHARED)
            canvas.arrow((x + 55, 130), (x + 55, 104)), canvas.arrow((x + 175, 130), (x + 175, 104))
            canvas.box(x + 10, 70, 90, 34, "feed-forward", IMAGE), canvas.box(x + 130, 70, 90, 34, "feed-forward", TEXT)
            continue
        canvas.box(x + 10, 150, 90, 34, "self-attention", IMAGE)
        canvas.box(x + 10, 70, 90, 52, "feed-forward" if name == "pooled" else "reads text,|feed-forward", IMAGE)
        if name == "cross":
            canvas.box(x + 130, 210, 90, 34, "CLIP + T5", TEXT)
            canvas.arrow((x + 175, 210), (x + 175, 96), (x + 100, 96))
            canvas.words(x + 182, 150, "KV", 11, "start")
        if name == "decoupled":
            canvas.box(x + 122, 210, 48, 34, "CLIP", TEXT), canvas.box(x + 178, 210, 48, 34, "T5", TEXT)
            canvas.arrow((x + 146, 210), (x + 146, 108), (x + 100, 108))
            canvas.arrow((x + 202, 210), (x + 202, 84), (x + 100, 84))
            canvas.words(x + 152, 150, "KV", 11, "start"), canvas.words(x + 208, 150, "KV", 11, "start")
            canvas.words(x + 150, 76, "summed", 11)
        if name == "pooled":
            canvas.box(x + 130, 210, 90, 34, "pooled text", POOLED)
            canvas.arrow((x + 175, 210), (x + 175, 134), (x + 58, 134))
            canvas.words(x + 150, 126, "with time", 11)
    canvas.words(20, 268, "The pooled vector joins time in every column unless pooled_dim is null.", 12, "start")


def draw_route(canvas: Canvas, config: UNetConfig, top: float) -> None:
    """The way of the text through a U-Net, stop by stop."""
    title = "Text on its way through a U-Net with joint attention (preset tiny: widths 64, 128, 192)"
    canvas.words(20, top, title, 16, "start", bold=True)
    route, deepest = TextRoute(config), len(config.channel_mult) - 1
    stops = [route.down(stage) for stage in range(deepest + 1)] + [route.middle()]
    for stage in range(deepest, -1, -1):
        stops += [route.up(stage, i == config.num_res_blocks) for i in range(config.num_res_blocks + 1)]
    places: dict[int, tuple[float, float]] = {}
    widths = [mult * config.model_channels for mult in config.channel_mult]
    canvas.box(20, top + 28, 96, 34, "encoder states", TEXT)
    for i, stop in enumerate(stops):
        level = stop.level if isinstance(stop.level, int) else deepest
        x, y = 150 + 96 * i, top + 60 + 130 * level
        places[i] = (x, y)
        _stop(canvas, stop, x, y, widths[level], "middle" if i == deepest + 1 else "")
        earlier = (j for j, other in enumerate(stops[:i]) if stop.enters and other.level == stop.level)
        left = next(earlier, None)  # where the way down has left text for this level
        if i and not stop.enters:
            canvas.arrow((x - 18, y + 51), (x, y + 51)), canvas.arrow((x - 18, y + 17), (x, y + 17))
        elif i and left is not None:
            before = places[i - 1]
            canvas.arrow((before[0] + 39, before[1]), (before[0] + 39, y + 51), (x, y + 51))
            canvas.words(before[0] + 33, y + 100, "norm, W", 11, "end")
        elif i:
            before = places[i - 1]
            canvas.arrow((before[0] + 39, before[1] + 68), (before[0] + 39, y + 51), (x, y + 51))
            canvas.words(before[0] + 33, y + 44, "norm, W", 11, "end")
        if left is not None:
            canvas.arrow((places[left][0] + 78, y + 64), (x, y + 64))
            canvas.words((places[left][0] + 78 + x) / 2, y + 78, "text as the way down left it", 11)
            canvas.arrow((places[left][0] + 78, y + 17), (x, y + 17), color="#7a93b3")
    canvas.arrow((116, top + 45), (133, top + 45), (133, top + 111), (150, top + 111))
    canvas.words(128, top + 130, "W states", 11)
    legend = (
        "Blue: features with their transformer (skips as in every U-Net). Orange: text tokens, in that level's width; "
        "beside them every block reads W states. The last one does not update the text."
    )
    canvas.words(20, top + 440, legend, 12, "start")


def _stop(canvas: Canvas, stop: TextStop, x: float, y: float, width: int, name: str) -> None:
    """One transformer: features above, text below, one attention over both."""
    canvas.box(x, y, 78, 34, f"{width}", IMAGE)
    canvas.box(x, y + 34, 78, 34, "read only" if stop.last else f"{width}", TEXT)
    if name:
        canvas.words(x + 39, y - 6, name, 11)


def draw() -> str:
    """Return the picture as SVG."""
    canvas = Canvas()
    draw_injections(canvas)
    config = model_config("unet", "tiny", injection="joint", context_dim=256, pooled_dim=224)
    assert isinstance(config, UNetConfig)
    draw_route(canvas, config, 310)
    return canvas.svg()


if __name__ == "__main__":
    Path(__file__).with_suffix("").with_name("conditioning.svg").write_text(draw(), encoding="utf-8")
