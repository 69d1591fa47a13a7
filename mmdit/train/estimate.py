"""`--dry-run`: what a run would cost. Only shapes run, on PyTorch's `meta` device, which has no memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mmdit.config import RunConfig, UNetConfig
from mmdit.data import make_dataset
from mmdit.denoiser import Conditioning
from mmdit.models import build_denoiser
from mmdit.pipeline import load_encoders
from mmdit.train.run import count_parameters, total_images
from mmdit.train.sharding import repeated_blocks
from mmdit.train.state_memory import StateMemory, state_memory

_CAPTIONS = 128  # looked at to learn how many text tokens a batch has


class Estimate(NamedTuple):
    """Counts of one run: parameters; FLOP per image; tokens; optimiser updates; bytes."""

    parameters: int
    forward_flop: int
    training_flop: int
    image_tokens: int
    text_tokens: int
    steps: int
    state: StateMemory
    activations: int

    @property
    def memory(self) -> int:
        """Bytes of one process."""
        return self.state.total + self.activations


def estimate(config: RunConfig) -> Estimate:
    """Count what a run costs.

    FLOP are those of matrix products, convolutions and attention, one multiply-add being two; training is forward and
    backward. Memory is that of one process: the training's state (`mmdit.train.state_memory`), and what the backward
    pass keeps of one micro-batch in float32 (bf16 autocast keeps less; with activation checkpointing, the inputs of
    every block and all of the largest): an upper estimate of what the denoiser needs.
    """
    vae, text = load_encoders(config)
    dataset = make_dataset(config.data, "train")
    captions = dataset.captions(np.arange(min(_CAPTIONS, len(dataset))))
    encoded = text.encode(captions, padding=config.encoders.padding)
    length = encoded.context.shape[1]
    side = config.data.resolution // vae.config.factor
    with torch.device("meta"):
        denoiser = build_denoiser(config.model)
        latents = torch.empty(1, vae.config.latent_channels, side, side)
        pooled = None if encoded.pooled is None else torch.empty(1, encoded.pooled.shape[1])
        mask = None if encoded.context_mask is None else torch.empty(1, length, dtype=torch.bool)
        context = torch.empty(1, length, encoded.context.shape[2])
        conditioning = Conditioning(context, pooled, mask, encoded.streams)
        inputs = latents, torch.empty(1), conditioning
        with FlopCounterMode(display=False) as forward:
            output = denoiser(*inputs)
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
        activations = kept_for_backward(denoiser, inputs, config.train.activation_checkpointing)
    train, parameters = config.train, count_parameters(denoiser)
    patch = 1 if isinstance(config.model, UNetConfig) else config.model.patch_size
    return Estimate(
        parameters=parameters,
        forward_flop=forward.get_total_flops(),
        training_flop=forward.get_total_flops() + backward.get_total_flops(),
        image_tokens=(side // patch) ** 2,
        text_tokens=length,
        steps=total_images(config) // train.batch_size,
        state=state_memory(denoiser, train),
        activations=activations * (train.batch_size // train.accumulation // train.num_processes),
    )


def kept_for_backward(denoiser: nn.Module, inputs: tuple[Any, ...], recomputed: bool) -> int:
    """Return the bytes that a forward keeps for its backward pass, beside parameters.

    Args:
        denoiser: on `meta`, or anywhere.
        inputs: of one forward.
        recomputed: every block keeps its inputs only, and one block at a time all that it makes of them.
    """
    outside: dict[Any, int] = {}
    inside: list[dict[Any, int]] = []
    given: dict[Any, int] = {}
    place = [outside]
    owned = {p.untyped_storage()._cdata for p in denoiser.parameters()}

    def note(tensor: Tensor, where: dict[Any, int]) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            where[storage._cdata] = storage.nbytes()
        return tensor

    def enter(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        for tensor in tree_leaves(arguments):
            if isinstance(tensor, Tensor):
                note(tensor, given)
        inside.append({})
        place.append(inside[-1])

    def leave(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        place.pop()

    blocks = repeated_blocks(denoiser) if recomputed else []
    hooks = [block.register_forward_pre_hook(enter) for block in blocks]
    hooks += [block.register_forward_hook(leave) for block in blocks]
    try:
        with torch.enable_grad(), saved_tensors_hooks(lambda t: note(t, place[-1]), lambda t: t):
            output = denoiser(*inputs)  # held, so that no storage is freed and counted under another's address
    finally:
        for hook in hooks:
            hook.remove()
    del output
    return sum({**given, **outside}.values()) + max((sum(block.values()) for block in inside), default=0)


def describe(config: RunConfig) -> str:
    """Return the estimate as lines for people."""
    costs = estimate(config)
    train = config.train
    rows = {
        "run": f"{config.name}, seed {config.seed}",
        "backbone": f"{config.model.name}{f' ({config.model.preset})' if config.model.preset else ''}",
        "parameters": f"{costs.parameters:,}",
        "FLOP per image": f"{costs.forward_flop / 1e9:.3f} GFLOP forward, "
        f"{costs.training_flop / 1e9:.3f} GFLOP training",
        "tokens": f"{costs.image_tokens} image (latent positions for a U-Net), {costs.text_tokens} text in the longest "
        f"of {_CAPTIONS} captions, padding {config.encoders.padding}",
        "steps": f"{costs.steps:,} updates of {train.batch_size} images = {total_images(config):,} images",
        "whole run": f"{costs.training_flop * total_images(config) / 1e12:,.1f} TFLOP",
        "memory": f"about {costs.memory / 2**30:.2f} GiB a process for the denoiser at most: "
        f"{costs.state.total / 2**30:.2f} its state, {costs.activations / 2**30:.2f} activations "
        f"(encoders and data come on top)",
    }
    if (warning := train.unreached_lr()) is not None:
        rows["warning"] = warning
    return "\n".join(f"{key:>15}  {value}" for key, value in rows.items())
