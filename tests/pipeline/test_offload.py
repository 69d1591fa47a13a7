"""What is in memory when; the pictures are the same at every level."""

import gc
import weakref

import numpy as np
import pytest
import torch

from mmdit.denoiser import Conditioning
from mmdit.pipeline import TextToImage
from mmdit.pipeline.offload import BlockStream, Part, check_level, choose_level, free_memory, stages

CPU = torch.device("cpu")
GIB = 2**30


def test_a_part_is_fetched_once_and_again_after_it_left():
    fetched = []
    part = Part(fetch=lambda: fetched.append(1) or torch.zeros(1))
    assert not part.resident
    assert part.get() is part.get()
    part.put_away()
    assert not part.resident
    part.get()
    assert len(fetched) == 2
    held = Part(torch.zeros(1))
    held.put_away()
    assert held.resident  # nothing could bring it back
    with pytest.raises(ValueError, match="a value or a way"):
        Part()


def test_with_offload_text_encoders_and_denoiser_are_never_in_memory_together(tiny_release, monkeypatch):
    import mmdit.pipeline.released as room

    together, alive = [], {"denoiser": 0, "text": 0}
    whole = TextToImage.load(tiny_release("sd3").folder, dtype="fp32", device="cpu", offload="none")
    expected = whole(["a red circle", "a star"], seed=3, size=(64, 96), num_steps=2, batch_size=1)

    class Watched(Part):
        def get(self):
            value = super().get()
            alive["text" if hasattr(value, "towers") else "denoiser"] = 1
            together.append(sum(alive.values()))
            return value

        def put_away(self):
            if self.resident:
                alive["text" if hasattr(self._value, "towers") else "denoiser"] = 0
            super().put_away()

    monkeypatch.setattr(room, "Part", Watched)
    pipeline = TextToImage.load(tiny_release("sd3").folder, dtype="fp32", device="cpu", offload="encoders")
    assert together == []  # nothing is loaded before it is asked for
    for _ in range(2):
        images = pipeline(["a red circle", "a star"], seed=3, size=(64, 96), num_steps=2, batch_size=1)
        assert np.array_equal(images, expected)
    assert set(together) == {1}


def test_what_is_put_away_is_free_at_once(tiny_release):
    pipeline = TextToImage.load(tiny_release("sd3").folder, dtype="fp32", device="cpu", offload="encoders", tables=True)
    gc.disable()  # nothing may wait for it
    try:
        pipeline(["a star"], size=64, num_steps=1)
        BlockStream(pipeline.denoiser, CPU, torch.clone)
        modules = [pipeline.denoiser, *(tower.module for tower in pipeline.text.towers.values())]
        held = [weakref.ref(parameter) for module in modules for parameter in module.parameters()]
        del modules
        pipeline._denoiser.put_away()
        pipeline._text.put_away()
        assert len(held) > 100
        assert all(parameter() is None for parameter in held)
    finally:
        gc.enable()


@pytest.mark.parametrize("family", ["sd3", "sdxl"])
@torch.no_grad()
def test_streamed_blocks_give_the_same_numbers_and_go_home(tiny_release, family):
    pipeline = TextToImage.load(tiny_release(family).folder, dtype="fp32", device="cpu")
    denoiser, config = pipeline.denoiser, pipeline.model_config
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, config.in_channels, 8, 8, generator=generator)
    conditioning = Conditioning(
        torch.randn(2, 5, config.context_dim, generator=generator),
        torch.randn(2, config.pooled_dim, generator=generator),
    )
    time = torch.tensor([500.0, 500.0])
    expected = denoiser(latents, time, conditioning)

    there, most = set(), [0]

    def bring(tensor):
        copy = tensor.clone()
        there.add(copy.data_ptr())
        return copy

    home = {name: p.data_ptr() for name, p in denoiser.named_parameters()}
    stream = BlockStream(denoiser, CPU, bring)
    outside = {name for name, p in denoiser.named_parameters() if p.data_ptr() != home[name]}
    blocks = {id(p) for block in stages(denoiser) for p in block.parameters()}
    assert all(id(p) not in blocks for name, p in denoiser.named_parameters() if name in outside)

    def count(module, inputs):
        away = [p for n, p in denoiser.named_parameters() if n not in outside and p.data_ptr() != home[n]]
        most[0] = max(most[0], sum(p.nbytes for p in away))

    for block in stages(denoiser):
        block.register_forward_pre_hook(count)
    assert torch.equal(denoiser(latents, time, conditioning), expected)
    assert 0 < most[0] <= stream.largest_block_bytes
    assert all(p.data_ptr() == home[n] for n, p in denoiser.named_parameters() if n not in outside)
    with pytest.raises(ValueError, match="latents have"):
        denoiser(latents[:, :1], time, conditioning)
    stream.end()
    assert torch.equal(denoiser(latents, time, conditioning), expected)


def test_the_level_is_chosen_by_what_fits():
    gpu = torch.device("cuda")
    assert choose_level(10 * GIB, 5 * GIB, gpu, free=24 * GIB) == "none"
    assert choose_level(10 * GIB, 5 * GIB, gpu, free=16 * GIB) == "encoders"
    assert choose_level(10 * GIB, 16 * GIB, gpu, free=16 * GIB) == "blocks"
    assert choose_level(10 * GIB, 16 * GIB, CPU, free=16 * GIB) == "encoders"
    assert 0 < free_memory(CPU) < 2**50


def test_levels_that_are_none_or_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="did you mean 'encoders'"):
        check_level("encoder", CPU)
    with pytest.raises(ValueError, match="both are the same memory"):
        check_level("blocks", CPU)


@pytest.mark.parametrize("offload", ["none", "encoders"])
def test_adaln_tables_draw_the_same_pictures_without_the_weights(tiny_release, offload):
    from mmdit.models.layers import Modulation

    folder = tiny_release("sd3.5_medium").folder
    options = {"seed": 3, "size": (64, 96), "num_steps": 2}
    plain = TextToImage.load(folder, dtype="fp32", device="cpu", offload=offload)
    tabled = TextToImage.load(folder, dtype="fp32", device="cpu", offload=offload, tables=True)
    prompts = ["a red circle", "a star"]
    expected = plain(prompts, **options)
    seen = []

    def look(step):
        seen.append(sum(isinstance(m, Modulation) for m in tabled._denoiser._value.modules()))

    for steps in (2, 3):  # another grid afterwards: the tables are built anew
        options["num_steps"] = steps
        difference = np.abs(tabled(prompts, on_step=look, **options) - plain(prompts, **options).astype(int))
        assert difference.max() <= 1
    assert set(seen) == {0}
    assert np.array_equal(plain(prompts, **(options | {"num_steps": 2})), expected)


def test_tables_larger_than_the_weights_are_not_built(tiny_release):
    from mmdit.models.layers import Modulation

    pipeline = TextToImage.load(tiny_release("sd3").folder, dtype="fp32", device="cpu", tables=True)
    seen = []

    def look(step):
        seen.append(sum(isinstance(m, Modulation) for m in pipeline.denoiser.modules()))

    pipeline([f"{i} stars" for i in range(9)], size=64, num_steps=15, batch_size=9, on_step=look)
    assert set(seen) == {7}
