"""What a training's state takes on paper, against the bytes that a process really holds after a step."""

import pytest
import torch

from mmdit.config import ConfigError, model_config
from mmdit.denoiser import Conditioning
from mmdit.models import build_denoiser
from mmdit.train.background import Background
from mmdit.train.ema import EMAs
from mmdit.train.estimate import kept_for_backward
from mmdit.train.optim import build_optimizer, optimizer_tensors
from mmdit.train.sharding import local, shard, shards_of
from mmdit.train.state_memory import checkpoint_memory, state_memory
from mmdit.train.step import _sync
from mmdit.train.trainer import build_seeded

TWO = {"more_emas": {"short": {"decay": 0.5}}}


def size(tensors):
    return sum(local(t).numel() * t.element_size() for t in tensors)


def step(denoiser, config):
    """Make one update; return optimiser and averages."""
    emas, optimizer = EMAs(denoiser, config.train), build_optimizer(denoiser, config.train)
    conditioning = Conditioning(torch.randn(2, 5, 256), torch.randn(2, 224))
    denoiser(torch.randn(2, 4, 8, 8), torch.full((2,), 500.0), conditioning).square().mean().backward()
    optimizer.step()
    return optimizer, emas


def held(denoiser, optimizer, emas):
    """Bytes this process holds: parameters, gradients, moments, averages."""
    gradients = size(p.grad for p in denoiser.parameters() if p.grad is not None)
    moments = size(value for state in optimizer.state.values() for value in state.values())
    averages = size(average for ema in emas.all.values() for average in ema.averages)
    return size(denoiser.parameters()), gradients, moments, averages


@pytest.fixture
def eight():
    """Be the first of eight processes whose others do nothing: shards are real, what is gathered is not."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("backbone", ["mmdit", "unet"])
@pytest.mark.parametrize(
    ("sharding", "size_of_shard", "ways"), [("none", None, 1), ("fsdp2", None, 8), ("hsdp", 4, 4), ("hsdp", 2, 2)]
)
def test_the_state_on_paper_is_what_a_process_holds(
    micro, micro_unet, request, backbone, sharding, size_of_shard, ways
):
    train = {**TWO, "num_processes": 8, "sharding": sharding, "shard_size": size_of_shard}
    config = micro({"train": train, **({"model": micro_unet} if backbone == "unet" else {})})
    unmade = denoiser_on_meta(config)
    paper = state_memory(unmade, config.train)
    denoiser = build_seeded(config)
    if sharding != "none":
        request.getfixturevalue("eight")
        shard(denoiser, config.train, torch.device("cpu"))
    optimizer, emas = step(denoiser, config)
    # what the last block's text would ask of the image has no gradient, hence no moments: paper counts it all the same
    idle = [p.detach() for p in denoiser.parameters() if p.grad is None]
    parameters, gradients, moments, averages = held(denoiser, optimizer, emas)
    assert shards_of(config.train, 8) == ways
    assert paper.parameters == parameters
    assert paper.gradients == gradients + size(idle)
    assert paper.moments == moments + 2 * size(idle) + 4 * len(idle)
    assert paper.averages == averages
    tables = {"model": denoiser.state_dict(), "optimizer": optimizer_tensors(optimizer, denoiser)}
    staged = Background().stage(tables | {stem: ema.state_dict(denoiser) for stem, ema in emas.all.items()})
    copied = size(tensor for table in staged.values() for tensor in table.values())
    assert checkpoint_memory(unmade, config.train) == copied + 2 * size(idle) + 4 * len(idle)


def test_pieces_of_a_batch_leave_no_whole_gradients_in_a_process_that_holds_a_shard(micro, eight):
    """Until the last piece torch would keep them whole beside the shards where it is told to sum before it spreads."""
    config = micro({"train": {"num_processes": 8, "sharding": "fsdp2", "accumulation": 1}})
    denoiser = shard(build_seeded(config), config.train, torch.device("cpu"))
    conditioning = Conditioning(torch.randn(2, 5, 256), torch.randn(2, 224))
    for last in (False, True):
        with _sync(None, denoiser, last):
            denoiser(torch.randn(2, 4, 8, 8), torch.full((2,), 500.0), conditioning).square().mean().backward()
        paper = state_memory(denoiser_on_meta(config), config.train)
        idle = [p.detach() for p in denoiser.parameters() if p.grad is None]
        assert size(p.grad for p in denoiser.parameters() if p.grad is not None) == paper.gradients - size(idle)
        assert len(idle) < 6


def denoiser_on_meta(config):
    with torch.device("meta"):
        return build_denoiser(config.model)


def test_the_released_sizes_take_twenty_bytes_a_parameter_and_shards_their_part_of_it(micro):
    config = micro({"train": {"num_processes": 8, "sharding": "fsdp2"}}).train
    for preset, parameters in (("sd3_medium", 2.03e9), ("sd3.5_large", 8.06e9)):
        with torch.device("meta"):
            denoiser = build_denoiser(model_config("mmdit", preset))
        alone = state_memory(denoiser, config.model_copy(update={"sharding": "none"}))
        spread = state_memory(denoiser, config)
        assert alone.copies == 0  # float32 on one process
        assert alone.total == pytest.approx(20 * parameters, rel=0.01)
        assert spread.total - spread.copies == pytest.approx(alone.total / 8, rel=1e-3)


def test_a_shard_size_that_does_not_divide_is_refused(micro):
    config = micro({"train": {"num_processes": 8, "sharding": "hsdp", "shard_size": 3}}).train
    with pytest.raises(ConfigError, match="shard_size 3 does not divide the 8 processes"):
        shards_of(config, 8)


@pytest.mark.parametrize(("gpus", "processes", "ways"), [(0, 8, 8), (4, 8, 4), (8, 32, 8), (8, 4, 4)])
def test_hsdp_without_a_size_counts_memory_as_it_shards_by_the_gpus_of_a_machine(
    micro, monkeypatch, gpus, processes, ways
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = micro({"train": {"num_processes": processes, "batch_size": 32, "sharding": "hsdp"}}).train
    assert shards_of(config, processes) == ways
    wide = torch.nn.Sequential(torch.nn.Linear(3, 64, device="meta"))
    wide.middle_block = wide[0]
    assert state_memory(wide, config).parameters == 4 * 4 * 64 // ways


def test_recomputed_blocks_keep_their_inputs_and_one_block_at_a_time(micro):
    """Two blocks more cost two inputs where blocks are recomputed, and all that two blocks make where not."""
    kept = {}
    for depth in (4, 6):
        config = micro({"model": {"depth": depth}})
        inputs = torch.empty(1, 4, 8, 8), torch.empty(1), Conditioning(torch.empty(1, 9, 256), torch.empty(1, 224))
        with torch.device("meta"):
            denoiser = build_denoiser(config.model)
            inputs = tuple(x.to("meta") for x in inputs)
        for recomputed in (False, True):
            kept[depth, recomputed] = kept_for_backward(denoiser, inputs, recomputed)
    whole, recomputed = (kept[6, r] - kept[4, r] for r in (False, True))
    tokens, width = 4 * 4 + 9, 32
    assert recomputed == 2 * tokens * width * 4  # image and text tokens in float32; the modulation's input is shared
    assert whole > 10 * recomputed


def test_encoders_leave_the_device_once_everything_is_encoded_and_stay_where_it_is_encoded_anew(
    micro, tmp_path, monkeypatch
):
    """A T5-XXL takes 10 to 19 GB of each GPU that no update needs."""
    from mmdit.encoders.text import TextEncoders
    from mmdit.train.sources import build_sources

    places, original = [], TextEncoders.to
    monkeypatch.setattr(TextEncoders, "to", lambda self, place: (places.append(str(place)), original(self, place))[1])
    for precompute, expected in ((True, ["cpu:0", "cpu"]), (False, ["cpu:0"])):
        places.clear()
        config = micro({"train": {"precompute": precompute}})
        build_sources(config, tmp_path, torch.device("cpu:0"), progress=False)
        assert places == expected
