"""Inception v3 as FID knows it: the network of the 2015 TensorFlow graph, 2,048 features and 1,008 logits.

The logits are without the last layer's bias, as the Inception score's own code computes them and every published score.

It differs from torchvision's network of the same name: average pools do not count the padding, the last block pools
by maximum, and there are 1,008 classes. Source: Szegedy et al. 2015, arXiv:1512.00567; Heusel et al. 2017,
arXiv:1706.08500 (which weights).

Made for speed at equal numbers (1e-6): batch norms are folded into the convolutions, tensors stay channels-last, the
1x1 convolutions that open the branches of a block are one product, and an average pool follows its 1x1 convolution
instead of preceding it (both are linear, so they commute) and then runs on a quarter of the channels or fewer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit_eval.resizing import resize_tensorflow1

SIDE = 299  # pixels
FEATURES, CLASSES = 2_048, 1_008
_BATCH_NORM_EPS = 1e-3

# a convolution: its name in checkpoints, channels out, kernel height and width
Step = tuple[str, int, int, int]

STEM: tuple[Step, ...] = (
    ("Conv2d_1a_3x3", 32, 3, 3),  # 299 -> 149
    ("Conv2d_2a_3x3", 32, 3, 3),  # 147
    ("Conv2d_2b_3x3", 64, 3, 3),  # 147, then a pool to 73
    ("Conv2d_3b_1x1", 80, 1, 1),
    ("Conv2d_4a_3x3", 192, 3, 3),  # 71, then a pool to 35
)


@dataclass(frozen=True)
class Block:
    """One block: branches side by side, their outputs joined.

    Attributes:
        name: its prefix in checkpoints.
        opening: (name, channels) of the 1x1 convolution that begins each branch; an empty name: it has none.
        branches: the steps of each branch after that.
        pooled: channels of the 1x1 convolution of the pooling branch; 0: it has none, and the block halves the size.
        pool: `average` or `maximum`.
        forked: the last two steps of each branch read one input, and both outputs count.
    """

    name: str
    opening: tuple[tuple[str, int], ...]
    branches: tuple[tuple[Step, ...], ...]
    pooled: int = 0
    pool: str = "average"
    forked: bool = False

    def convolutions(self, channels: int) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
        """Yield (name, weight shape) of every convolution, for an input of so many channels."""
        for (name, width), steps in zip(self.opening, self.branches, strict=True):
            before = width if name else channels
            if name:
                yield f"{self.name}.{name}", (width, channels, 1, 1)
            for i, (part, out, height, length) in enumerate(steps):
                yield f"{self.name}.{part}", (out, before, height, length)
                before = before if self.forked and i >= len(steps) - 2 else out
        if self.pooled:
            yield f"{self.name}.branch_pool", (self.pooled, channels, 1, 1)

    def width(self, channels: int) -> int:
        """Channels that leave the block."""
        ends = 2 if self.forked else 1
        total = self.pooled or channels
        for (_, width), steps in zip(self.opening, self.branches, strict=True):
            total += sum(out for _, out, *_ in steps[-ends:]) if steps else width
        return total


def _fine(name: str, pooled: int) -> Block:  # 35 x 35
    return Block(
        name,
        (("branch1x1", 64), ("branch5x5_1", 48), ("branch3x3dbl_1", 64)),
        ((), (("branch5x5_2", 64, 5, 5),), (("branch3x3dbl_2", 96, 3, 3), ("branch3x3dbl_3", 96, 3, 3))),
        pooled,
    )


def _long(name: str, c: int) -> Block:  # 17 x 17, kernels 1x7 and 7x1
    single = (("branch7x7_2", c, 1, 7), ("branch7x7_3", 192, 7, 1))
    double = (
        ("branch7x7dbl_2", c, 7, 1),
        ("branch7x7dbl_3", c, 1, 7),
        ("branch7x7dbl_4", c, 7, 1),
        ("branch7x7dbl_5", 192, 1, 7),
    )
    return Block(name, (("branch1x1", 192), ("branch7x7_1", c), ("branch7x7dbl_1", c)), ((), single, double), 192)


def _wide(name: str, pool: str) -> Block:  # 8 x 8, kernels 1x3 and 3x1 side by side
    single = (("branch3x3_2a", 384, 1, 3), ("branch3x3_2b", 384, 3, 1))
    double = (("branch3x3dbl_2", 384, 3, 3), ("branch3x3dbl_3a", 384, 1, 3), ("branch3x3dbl_3b", 384, 3, 1))
    opening = (("branch1x1", 320), ("branch3x3_1", 384), ("branch3x3dbl_1", 448))
    return Block(name, opening, ((), single, double), 192, pool, forked=True)


BLOCKS: tuple[Block, ...] = (
    _fine("Mixed_5b", 32),
    _fine("Mixed_5c", 64),
    _fine("Mixed_5d", 64),
    Block(  # 35 -> 17
        "Mixed_6a",
        (("", 0), ("branch3x3dbl_1", 64)),
        ((("branch3x3", 384, 3, 3),), (("branch3x3dbl_2", 96, 3, 3), ("branch3x3dbl_3", 96, 3, 3))),
    ),
    _long("Mixed_6b", 128),
    _long("Mixed_6c", 160),
    _long("Mixed_6d", 160),
    _long("Mixed_6e", 192),
    Block(  # 17 -> 8
        "Mixed_7a",
        (("branch3x3_1", 192), ("branch7x7x3_1", 192)),
        (
            (("branch3x3_2", 320, 3, 3),),
            (("branch7x7x3_2", 192, 1, 7), ("branch7x7x3_3", 192, 7, 1), ("branch7x7x3_4", 192, 3, 3)),
        ),
    ),
    _wide("Mixed_7b", "average"),
    _wide("Mixed_7c", "maximum"),
)


def convolutions() -> dict[str, tuple[int, int, int, int]]:
    """Return {name in checkpoints: weight shape} of the 94 convolutions."""
    found: dict[str, tuple[int, int, int, int]] = {}
    channels = 3
    for name, out, height, width in STEM:
        found[name] = (out, channels, height, width)
        channels = out
    for block in BLOCKS:
        found.update(block.convolutions(channels))
        channels = block.width(channels)
    return found


def check_state(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not this network's.

    Raises:
        ValueError: keys that are missing or not known, or shapes that differ.
    """
    wanted: dict[str, tuple[int, ...]] = {"fc.weight": (CLASSES, FEATURES), "fc.bias": (CLASSES,)}
    for name, shape in convolutions().items():
        wanted[f"{name}.conv.weight"] = shape
        wanted |= {f"{name}.bn.{part}": shape[:1] for part in ("weight", "bias", "running_mean", "running_var")}
    given = {key: tuple(tensor.shape) for key, tensor in tensors.items() if not key.endswith("num_batches_tracked")}
    missing, unexpected = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    other = [f"{key} {list(given[key])} for {list(wanted[key])}" for key in wanted.keys() & given.keys()
             if given[key] != wanted[key]]  # fmt: skip
    if missing or unexpected or other:
        raise ValueError(
            f"these are not the weights of FID's Inception (1,008 classes): {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, {len(other)} of another shape {sorted(other)[:3]}; "
            f"torchvision's inception_v3 is another network"
        )


class Inception(nn.Module):
    """The network, ready to use: folded, channels-last, without gradients.

    Args:
        tensors: a state dict under the names that torch-fidelity and pytorch-fid share.

    Raises:
        ValueError: other tensors than this network's.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        check_state(tensors)
        folded = {name: _fold(tensors, name) for name in convolutions()}
        self._names: dict[str, str] = {}
        for name, *_ in STEM:
            self._keep(name, *folded[name])
        for block in BLOCKS:
            opening = [f"{block.name}.{name}" for name, _ in block.opening if name]
            # a maximum does not commute with a convolution
            if block.pooled and block.pool == "average":
                opening.append(f"{block.name}.branch_pool")
            weights, biases = zip(*(folded.pop(name) for name in opening), strict=True)
            self._keep(block.name, torch.cat(weights), torch.cat(biases))
            for name in [name for name in folded if name.startswith(block.name + ".")]:
                self._keep(name, *folded[name])
        self.register_buffer("fc_weight", tensors["fc.weight"].float())

    def _keep(self, name: str, weight: Tensor, bias: Tensor) -> None:
        self._names[name] = name.replace(".", "_")
        self.register_buffer(self._names[name] + "_weight", weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer(self._names[name] + "_bias", bias)

    def to_bf16(self) -> Inception:
        """Compute the convolutions in bfloat16: three times as fast and off by 5e-3, so not for published numbers."""
        for name, tensor in self.named_buffers():
            if not name.startswith("fc_"):
                setattr(self, name, tensor.bfloat16())
        return self

    def _conv(self, x: Tensor, name: str, stride: int = 1, same: bool = True, relu: bool = True) -> Tensor:
        weight: Tensor = getattr(self, self._names[name] + "_weight")
        padding = (weight.shape[2] // 2, weight.shape[3] // 2) if same else 0
        x = F.conv2d(x, weight, getattr(self, self._names[name] + "_bias"), stride, padding)
        return x.relu_() if relu else x

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [B, 2048] and logits without bias [B, 1008] (float32).

        Args:
            pixels: float [B, 3, 299, 299] in 0 ... 255, after the resizing of the protocol.
        """
        dtype = getattr(self, self._names["Conv2d_1a_3x3"] + "_weight").dtype
        x = ((pixels - 128) / 128).to(dtype, memory_format=torch.channels_last)  # [B, 3, 299, 299]
        x = self._conv(x, "Conv2d_1a_3x3", stride=2, same=False)  # [B, 32, 149, 149]
        x = self._conv(x, "Conv2d_2a_3x3", same=False)  # [B, 32, 147, 147]
        x = F.max_pool2d(self._conv(x, "Conv2d_2b_3x3"), 3, 2)  # [B, 64, 73, 73]
        x = self._conv(x, "Conv2d_3b_1x1")  # [B, 80, 73, 73]
        x = F.max_pool2d(self._conv(x, "Conv2d_4a_3x3", same=False), 3, 2)  # [B, 192, 35, 35]
        for block in BLOCKS:
            x = self._block(x, block)  # [B, 288, 35, 35], [B, 768, 17, 17], [B, 2048, 8, 8]
        features = x.float().mean((2, 3))
        return features, F.linear(features, self.fc_weight)

    def _block(self, x: Tensor, block: Block) -> Tensor:
        opened = self._conv(x, block.name, relu=False)
        widths = [width for name, width in block.opening if name]
        pooled_after = block.pooled > 0 and block.pool == "average"
        *parts, pool = opened.split([*widths, block.pooled if pooled_after else 0], dim=1)  # one a branch
        outputs = []
        for (name, _), steps in zip(block.opening, block.branches, strict=True):
            y = parts.pop(0).relu() if name else x
            for i, (part, *_) in enumerate(steps):
                last = len(steps) - 1 - i
                if block.forked and last == 1:
                    outputs.append(self._conv(y, f"{block.name}.{part}"))
                else:
                    halves = not block.pooled and last == 0
                    y = self._conv(y, f"{block.name}.{part}", stride=2 if halves else 1, same=not halves)
            outputs.append(y)
        if pooled_after:
            outputs.append(F.avg_pool2d(pool, 3, 1, 1, count_include_pad=False).relu_())
        elif block.pooled:
            outputs.append(self._conv(F.max_pool2d(x, 3, 1, 1), f"{block.name}.branch_pool"))
        else:
            outputs.append(F.max_pool2d(x, 3, 2))
        return torch.cat(outputs, dim=1)


def _fold(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Fold a batch norm into its convolution, in float64: (weight, bias), float32."""
    mean, variance, scale, shift = (
        tensors[f"{name}.bn.{part}"].double() for part in ("running_mean", "running_var", "weight", "bias")
    )
    factor = scale / (variance + _BATCH_NORM_EPS).sqrt()
    weight = tensors[f"{name}.conv.weight"].double() * factor[:, None, None, None]
    return weight.float(), (shift - mean * factor).float()


def legacy_pixels(pixels: Tensor) -> Tensor:
    """Resize [B, 3, H, W] in 0 ... 255 as published FIDs do."""
    return resize_tensorflow1(pixels, SIDE)
