"""The ways of bringing text in against each other: which weights make two one network, and what differs."""

import pytest
import torch

from mmdit.config import ConfigError, load_config, model_config, num_blocks, resolve, to_tree
from mmdit.denoiser import AttentionGuidance, Conditioning, record_attention, skip_layers
from mmdit.diffusion import build_schedule, training_loss
from mmdit.models import build_denoiser
from mmdit.sampling import GRIDS, SAMPLERS, guided_denoise

WIDTHS = {"in_channels": 4, "out_channels": 4, "context_dim": 24, "pooled_dim": 20}
STREAMS = {"text_streams": {"clip": 20, "t5": 24}}
TRANSFORMER = {
    **WIDTHS, "depth": 3, "width": 32, "num_heads": 4, "pos_embed_max_size": 8, "pos_embed_base_size": 4,
}  # fmt: skip
UNET = {
    **WIDTHS, "model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "transformer_depth": (1, 1),
    "head_dim": 8, "linear_projection": True, "norm_groups": 4,
}  # fmt: skip
AXES = {
    "mmdit": [
        {}, {"weight_sets": 1}, {"weight_sets": 3, **STREAMS}, {"injection": "pooled"}, {"pooled_dim": None},
        {"text_projection": "per_encoder", **STREAMS},
    ],
    "crossdit": [
        {}, {"injection": "decoupled", **STREAMS}, {"injection": "pooled"}, {"pooled_dim": None},
        {"text_projection": "per_encoder", **STREAMS},
    ],
    "unet": [
        {}, {"injection": "decoupled", **STREAMS}, {"injection": "joint"}, {"injection": "joint", "weight_sets": 1},
        {"injection": "joint", "weight_sets": 3, **STREAMS}, {"injection": "pooled"}, {"text_stages": (1,)},
        {"text_in_query": True}, {"text_projection": "per_encoder", **STREAMS},
    ],
}  # fmt: skip
VALUES = [pytest.param(name, value, id=f"{name}-{i}") for name in AXES for i, value in enumerate(AXES[name])]
NO_TRANSFORMERS = {"transformer_depth": [0, 0, 0], "middle_transformer_depth": 0}
QUICK = ("mmdit-2", "unet-4")  # three sets of joint attention; compiling takes seconds
COMPILED = [pytest.param(*v.values, id=v.id, marks=[] if v.id in QUICK else pytest.mark.slow) for v in VALUES]


def build(name, seed=0, fill=True, **fields):
    """A micro backbone; filled, every parameter is small and random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = build_denoiser(model_config(name, **{**(UNET if name == "unet" else TRANSFORMER), **fields})).eval()
        if fill:
            with torch.no_grad():
                for parameter in denoiser.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape))
    return denoiser


def draw(clip=3, t5=4, seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    context = randn(batch, clip + t5, 24)
    context[:, :clip, 20:] = 0
    mask = torch.ones(batch, clip + t5, dtype=torch.bool)
    mask[0, clip - 1], mask[1, -1] = False, False
    streams = (("clip", 0, clip, 20), ("t5", clip, clip + t5, 24))
    text = Conditioning(context, randn(batch, 20), mask, streams)
    return randn(batch, 4, 8, 8), torch.tensor([7.5, 900.0, 420.0])[:batch], text


def predict(denoiser, *inputs):
    with torch.no_grad():
        return denoiser(*inputs)


def copied(source, target, rename):
    """Give `target` the parameters of `source`: rename(key of target) is the key of source, or a tensor."""
    state = source.state_dict()
    found = {key: rename(key) for key in target.state_dict()}
    target.load_state_dict({key: state[value] if isinstance(value, str) else value for key, value in found.items()})
    return target


# --- joint attention ------------------------------------------------------------------------------------------------


def test_two_sets_are_the_mmdit_of_the_paper_and_its_default():
    plain, named = build("mmdit"), build("mmdit", injection="joint", weight_sets=2)
    assert plain.state_dict().keys() == named.state_dict().keys()
    assert torch.equal(predict(plain, *draw()), predict(named, *draw()))


@pytest.mark.parametrize("qk_norm", [None, "rms"])
def test_three_sets_with_equal_text_weights_are_two_sets(qk_norm):
    two = build("mmdit", qk_norm=qk_norm)
    three = build("mmdit", seed=1, weight_sets=3, qk_norm=qk_norm, **STREAMS)
    copied(two, three, lambda key: key.replace("context_block.clip.", "context_block.").replace(".t5.", "."))
    torch.testing.assert_close(predict(three, *draw()), predict(two, *draw()), rtol=0, atol=1e-5)
    with torch.no_grad():
        three.joint_blocks[0].context_block["t5"].attn.qkv.weight.add_(0.1)
    assert (predict(three, *draw()) - predict(two, *draw())).abs().max() > 1e-3


def test_one_set_is_two_sets_with_the_same_weights():
    one = build("mmdit", weight_sets=1)
    state = one.state_dict()

    def shared(key):
        source = key.replace("context_block", "x_block")
        tensor = state[source]
        return tensor[: 2 * 32] if "joint_blocks.2.context_block.adaLN" in key else source  # shift and scale alone

    two = copied(one, build("mmdit", seed=1), shared)
    torch.testing.assert_close(predict(one, *draw()), predict(two, *draw()), rtol=0, atol=1e-5)
    assert sum(p.numel() for p in one.parameters()) < 0.65 * sum(p.numel() for p in two.parameters())


@pytest.mark.parametrize("sets", [1, 3])
def test_the_sets_of_the_unets_joint_attention_differ_only_in_their_weights(sets):
    other = build("unet", injection="joint", weight_sets=sets, **STREAMS)
    two = build("unet", seed=1, injection="joint")
    text = ".image." if sets == 1 else ".text.clip."
    copied(other, two, lambda key: key.replace(".text.", text))
    if sets == 3:
        copied(two, other, lambda key: key.replace(".text.clip.", ".text.").replace(".text.t5.", ".text."))
    torch.testing.assert_close(predict(other, *draw()), predict(two, *draw()), rtol=0, atol=1e-5)


def texts_of(denoiser, *inputs):
    """What each transformer of a U-Net gets to read, [B, L, D], by module path."""
    seen = {}

    def watch(name):
        return lambda _, arguments: seen.update({name: arguments[1].context})

    handles = [
        module.register_forward_pre_hook(watch(name))
        for name, module in denoiser.named_modules()
        if name.endswith("transformer_blocks.0")
    ]
    predict(denoiser, *inputs)
    for handle in handles:
        handle.remove()
    return seen


def test_in_the_unet_text_is_updated_from_block_to_block_by_joint_attention_only():
    latents, timestep, text = draw()
    for injection in ("cross", "joint"):
        denoiser = build("unet", injection=injection)
        here, there = texts_of(denoiser, latents, timestep, text), texts_of(denoiser, latents.flip(0), timestep, text)
        first, *others = here
        assert torch.equal(here[first], there[first])  # nothing of the image has reached it yet
        assert all(torch.equal(here[name], there[name]) == (injection == "cross") for name in others)


@pytest.mark.parametrize(("sets", "zero"), [(1, False), (2, True), (3, True)])
def test_in_the_unet_text_weights_of_its_own_begin_to_update_it_from_zero(sets, zero):
    latents, timestep, text = draw()
    fresh = build("unet", fill=False, injection="joint", weight_sets=sets, **STREAMS)
    here, there = texts_of(fresh, latents, timestep, text), texts_of(fresh, latents.flip(0), timestep, text)
    assert all(torch.equal(here[name], there[name]) for name in here) == zero  # nothing of the image has reached it


def test_in_the_unet_every_block_of_joint_attention_reads_the_encoders_states_anew():
    latents, timestep, text = draw()
    denoiser = build("unet", injection="joint")
    before = predict(denoiser, latents, timestep, text)
    blocks = [name for name, _ in denoiser.named_modules() if name.endswith("transformer_blocks.0")]
    for name in blocks:
        changed = copied(denoiser, build("unet", seed=1, injection="joint"), lambda key: key)
        with torch.no_grad():
            changed.get_submodule(f"{name}.states").weight.add_(0.5)
        assert (predict(changed, latents, timestep, text) - before).abs().max() > 1e-4
    assert len(blocks) == 7


def test_text_takes_the_width_of_each_level_and_comes_back_up_with_what_was_left_there():
    denoiser = build("unet", injection="joint")
    seen = texts_of(denoiser, *draw())
    assert [states.shape[2] for states in seen.values()] == [16, 32, 32, 32, 32, 16, 16]
    entries = {name for name, module in denoiser.named_modules() if name.endswith("text_entry")}
    assert entries == {"input_blocks.1.1.text_entry", "input_blocks.3.1.text_entry", "output_blocks.2.1.text_entry"}
    up = denoiser.output_blocks[2][1].text_entry
    with torch.no_grad():
        up.carried.weight.zero_(), up.carried.bias.zero_()
        left = []
        denoiser.input_blocks[1][1].register_forward_hook(lambda _, __, out: left.append(out[1].text.context))
        back = texts_of(denoiser, *draw())["output_blocks.2.1.transformer_blocks.0"]
    assert torch.equal(back, left[0])


def test_the_last_block_with_text_has_no_weights_that_nobody_would_read():
    for stages, last in ((None, "output_blocks.3.1"), (("middle",), "middle_block.1"), ((1,), "output_blocks.1.1")):
        denoiser = build("unet", injection="joint", text_stages=stages)
        names = [name for name, _ in denoiser.get_submodule(f"{last}.transformer_blocks.0.text").named_parameters()]
        assert {name.split(".")[0] for name in names} == {"attn", "norm1"}
        assert not any("to_q" in name or "to_out" in name for name in names)


# --- cross-attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["crossdit", "unet"])
def test_decoupled_over_one_stream_is_cross_attention(name):
    cross = build(name)
    decoupled = build(name, seed=1, injection="decoupled", text_streams={"t5": 24})
    copied(cross, decoupled, lambda key: key.replace("cross_attn.t5.", "cross_attn.").replace("attn2.t5.", "attn2."))
    inputs = draw()
    for streams in (None, (("t5", 0, 7, 24),)):
        text = inputs[2]._replace(streams=streams)
        assert torch.equal(predict(decoupled, *inputs[:2], text), predict(cross, *inputs[:2], text))


@pytest.mark.parametrize("name", ["crossdit", "unet"])
@pytest.mark.parametrize(("present", "part"), [("clip", slice(0, 3)), ("t5", slice(3, 7))])
def test_decoupled_without_one_stream_is_cross_attention_to_the_other(name, present, part):
    decoupled = build(name, injection="decoupled", **STREAMS)
    state = decoupled.state_dict()

    def of_the_other(key):
        for prefix in ("cross_attn.", "attn2."):
            key = key.replace(prefix, f"{prefix}{present}.")
        narrow = present == "clip" and "attn2" in key and key.endswith(("to_k.weight", "to_v.weight"))
        return torch.nn.functional.pad(state[key], (0, 4)) if narrow else key

    cross = copied(decoupled, build(name, seed=1), of_the_other)
    latents, timestep, text = draw()
    width = dict(decoupled.config.text_streams)[present]
    length = part.stop - part.start
    alone = Conditioning(text.context[:, part], text.pooled, text.context_mask[:, part], ((present, 0, length, width),))
    expected = predict(cross, latents, timestep, alone)
    torch.testing.assert_close(predict(decoupled, latents, timestep, alone), expected, rtol=0, atol=1e-5)
    assert (predict(decoupled, latents, timestep, text) - expected).abs().max() > 1e-3


def test_a_projection_for_each_encoder_is_the_shared_one_where_its_columns_are_equal():
    shared = build("mmdit")
    weight, bias = shared.context_embedder.weight, shared.context_embedder.bias
    mine = {"clip.weight": weight[:, :20], "clip.bias": bias, "t5.weight": weight, "t5.bias": bias}
    each = build("mmdit", seed=1, text_projection="per_encoder", **STREAMS)
    copied(shared, each, lambda key: mine[key.split(".", 1)[1]] if key.startswith("context_embedder.") else key)
    torch.testing.assert_close(predict(each, *draw()), predict(shared, *draw()), rtol=0, atol=1e-5)


# --- U-Net: stages, queries -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("injection", ["cross", "decoupled", "joint"])
def test_only_the_named_stages_read_text(injection):
    every = build("unet", injection=injection, text_stages=(0, 1, "middle"), **STREAMS)
    assert torch.equal(predict(every, *draw()), predict(build("unet", injection=injection, **STREAMS), *draw()))
    places = {0: ["input_blocks.1", "output_blocks.2", "output_blocks.3"], "middle": ["middle_block"],
              1: ["input_blocks.3", "output_blocks.0", "output_blocks.1"]}  # fmt: skip
    for stage, blocks in places.items():
        denoiser = build("unet", injection=injection, text_stages=(stage,), **STREAMS)
        with record_attention(denoiser) as records:
            predict(denoiser, *draw())
        assert sorted(name.split(".1.transformer")[0] for name in records) == sorted(blocks)
        assert sum(p.numel() for p in denoiser.parameters()) < sum(p.numel() for p in every.parameters())


@pytest.mark.parametrize("injection", ["cross", "decoupled", "joint"])
def test_text_in_the_query_begins_as_the_plain_unet_and_then_shifts_what_is_read(injection):
    plain = build("unet", injection=injection, **STREAMS)
    with_text = build("unet", seed=1, injection=injection, text_in_query=True, **STREAMS)
    fresh = build("unet", fill=False, injection=injection, text_in_query=True, **STREAMS).state_dict()
    assert all(not fresh[key].any() for key in fresh if "to_q_text" in key)
    copied(plain, with_text, lambda key: fresh[key] if "to_q_text" in key else key)
    torch.testing.assert_close(predict(with_text, *draw()), predict(plain, *draw()), rtol=0, atol=1e-6)
    with torch.no_grad():
        for key, parameter in with_text.named_parameters():
            if "to_q_text" in key:
                parameter.fill_(0.3)
    with record_attention(plain) as before, record_attention(with_text) as after:
        predict(plain, *draw()), predict(with_text, *draw())
    assert all((after[key][0] - before[key][0]).abs().max() > 1e-3 for key in before)


# --- every value ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "fields"), VALUES)
def test_every_value_trains_and_samples(name, fields):
    denoiser = build(name, fill=False, **fields).train()
    schedule = build_schedule(load_config().diffusion.schedule)
    latents, _, text = draw(batch=3)
    t = torch.tensor([0.3, 0.6, 0.9])
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = training_loss(denoiser, latents, text, latents.flip(0), t, schedule, "velocity").mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    denoise = guided_denoise(denoiser.eval(), schedule, "velocity", text, text.index([1, 2, 0]), 3.0)
    with torch.no_grad():
        drawn = SAMPLERS["euler"](denoise, latents, schedule, GRIDS["linear"](schedule, 3))
    assert drawn.isfinite().all()
    assert (drawn - latents).abs().max() > 0.1


@pytest.mark.parametrize(("name", "fields"), VALUES)
def test_the_blocks_that_can_be_skipped_are_as_many_as_the_config_says(name, fields):
    denoiser = build(name, **fields)
    assert denoiser.num_blocks == num_blocks(denoiser.config)
    plain = predict(denoiser, *draw())
    for block in range(denoiser.num_blocks):
        with skip_layers(denoiser, [block]):
            assert (predict(denoiser, *draw()) - plain).abs().max() > 1e-5


@pytest.mark.parametrize(("name", "fields"), COMPILED)
def test_a_block_compiles_whole_and_gives_the_same(name, fields):
    denoiser = build(name, **fields)
    text = draw()[2]
    if fields.get("injection") != "pooled":
        text = text._replace(negative=text.context.flip(0), guidance=AttentionGuidance("nag", 3.0))
    inputs = (*draw()[:2], text)
    plain = predict(denoiser, *inputs)
    torch._dynamo.reset()
    if name == "unet":
        module = denoiser.output_blocks[1]
        module.compile(backend="eager", fullgraph=True)
    else:
        blocks = denoiser.joint_blocks if name == "mmdit" else denoiser.blocks
        blocks[1].compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(predict(denoiser, *inputs), plain, rtol=0, atol=1e-6)


# --- configs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"injection": "cross"}, "crossdit"),
        ({"injection": "decoupled"}, "weight_sets: 3"),
        ({"injection": "pooled", "pooled_dim": None}, "nothing to read"),
        ({"injection": "pooled", "text_projection": "per_encoder"}, "has none"),
        ({"injection": "pooled", "weight_sets": 1}, "sets of joint attention"),
        ({"weight_sets": 1, "dual_attention_layers": [0]}, "an attention of its own"),
        ({"weight_sets": 3, "text_streams": {"clip": 224, "t5": 200}}, "leave it out to take theirs"),
        ({"name": "crossdit", "preset": "tiny", "injection": "joint"}, "model.name: mmdit"),
        ({"name": "unet", "preset": "tiny", "weight_sets": 3}, "injection is 'cross'"),
        ({"name": "unet", "preset": "tiny", "text_stages": []}, "is injection: pooled"),
        ({"name": "unet", "preset": "tiny", "text_stages": [0, 7]}, r"\[7\] have no transformers"),
        ({"name": "unet", "preset": "tiny", "text_in_query": True, "pooled_dim": None}, "pooled_dim is None"),
        ({"name": "unet", "preset": "tiny", "injection": "pooled", "text_in_query": True}, "no queries read text"),
        ({"name": "unet", "preset": "tiny", "injection": "joint", **NO_TRANSFORMERS}, "is 0"),
        ({"name": "unet", "preset": "tiny", "injection": "decoupled", "text_projection": "per_encoder"}, "in a U-Net"),
    ],
)  # fmt: skip
def test_combinations_that_make_no_sense_are_refused_with_the_reason(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_config(None, {"model": overrides})


def test_a_run_that_no_text_would_reach_is_refused():
    silent = {"model": {"injection": "pooled"}, "encoders": {"use": ["t5"]}}
    with pytest.raises(ConfigError, match="nothing of the text would reach the denoiser"):
        load_config(None, silent)
    load_config(None, {**silent, "encoders": {"use": ["t5"], "pooled": "clip+t5"}})


def test_streams_must_be_named_where_the_encoders_are_unknown():
    with pytest.raises(ConfigError, match="text_streams must name each stream"):
        model_config("crossdit", injection="decoupled")
    with pytest.raises(ConfigError, match="two text streams"):
        model_config("mmdit", weight_sets=3, text_streams={"t5": 24})
    with pytest.raises(ConfigError, match="wider than context_dim"):
        model_config("mmdit", text_projection="per_encoder", context_dim=20, text_streams={"t5": 24})


def test_a_run_takes_the_streams_of_encoders_it_knows_and_keeps_them_through_yaml():
    config = load_config(None, {"model": {"name": "unet", "injection": "decoupled"}})
    assert dict(config.model.text_streams) == {"clip": 224, "t5": 256}
    tree = to_tree(config)
    assert tree["model"]["text_streams"] == {"clip": 224, "t5": 256}
    assert resolve(tree) == config
    assert hash(config.model) == hash(resolve(tree).model)
    assert load_config().model.text_streams is None
