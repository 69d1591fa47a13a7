"""Released text encoders: every layout loads, strictly, and gives what diffusers' pipelines give."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from mmdit.config import VAEConfig
from mmdit.encoders.autoencoder import AutoencoderKL
from mmdit.encoders.released import load_tower, our_name, tower_config
from mmdit.encoders.text import load_text_encoders
from mmdit.encoders.tokenizers import TINY
from mmdit.encoders.towers import build_tower
from mmdit.weights.files import WeightsError
from mmdit.weights.text import infer_config, name_sources, to_open_clip
from mmdit.weights.text_files import find_text
from tests.weights import tiny_text as tiny

KEYS = Path(__file__).parent / "keys"
PROMPTS = ["a photo of a cat", "", "word " * 200, "Tom &amp; Jerry, 猫 👩🏽‍🚒", "<|endoftext|> a cat"]
SIZES = torch.tensor([[1024, 768, 0, 16, 512, 640]])
FAMILIES = ("sd3", "sd1.5", "sdxl")


@pytest.fixture(scope="module")
def modules():
    return {family: tiny.build(family) for family in FAMILIES}


@pytest.fixture(scope="module")
def places(modules, tmp_path_factory):
    """{(family, layout): path} of the same encoders in every layout a user may have."""
    found = {}
    for family, encoders in modules.items():
        folder = tmp_path_factory.mktemp(family.replace(".", ""))
        found[family, "original"] = tiny.write_original(folder, family, encoders)
        found[family, "diffusers"] = tiny.write_diffusers(folder / "diffusers", encoders, shard_t5=True)
    found["sd3", "separate"] = tiny.write_separate(tmp_path_factory.mktemp("files") / "text_encoders", modules["sd3"])
    return found


def load(path, family, **options):
    tokenizers = None if family != "sd3" else {"t5": TINY / "spiece.model"}
    names = ("clip_l",) if family == "sd1.5" else ("clip_l", "clip_g")
    heads = {name: tiny.WIDTHS[name] for name in names}
    return load_text_encoders(path, **({"tokenizers": tokenizers} | heads | options))


def theirs(family, modules, t5_length):
    """Run diffusers' own encode_prompt: context and pooled of PROMPTS."""
    pipeline = tiny.pipeline(family, modules)
    with torch.no_grad():
        if family == "sd1.5":
            return pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0], None
        if family == "sdxl":
            context, _, pooled, _ = pipeline.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
            return context, pooled
        context, _, pooled, _ = pipeline.encode_prompt(
            PROMPTS, None, None, "cpu", do_classifier_free_guidance=False, max_sequence_length=t5_length
        )
        return context, pooled


LAYOUTS = [*((family, layout) for family in FAMILIES for layout in ("original", "diffusers")), ("sd3", "separate")]


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_every_layout_gives_what_the_diffusers_pipeline_gives(modules, places, family, layout):
    text = load(places[family, layout], family, t5_length=256)
    assert text.family == family
    assert text.padding == "attend"
    encoded = text.encode(PROMPTS, sizes=SIZES if family == "sdxl" else None)
    context, pooled = theirs(family, modules[family], 256)
    assert context.std() > 0.1  # not a comparison of zeros
    torch.testing.assert_close(encoded.context, context, atol=1e-5, rtol=0)
    if family == "sd1.5":
        assert encoded.pooled is None
    else:
        torch.testing.assert_close(encoded.pooled[:, : pooled.shape[1]], pooled, atol=1e-5, rtol=0)
        assert encoded.pooled.shape[1] == pooled.shape[1] + (1536 if family == "sdxl" else 0) == text.pooled_dim
    assert encoded.context_mask is None


def test_the_null_of_sdxl_is_that_of_its_pipeline(modules, places):
    pipeline = tiny.pipeline("sdxl", modules["sdxl"])
    with torch.no_grad():
        _, context, _, pooled = pipeline.encode_prompt(["a cat"], device="cpu", do_classifier_free_guidance=True)
    null = load(places["sdxl", "original"], "sdxl").null(1, "zeros", sizes=SIZES)
    assert torch.equal(null.context, context)
    assert torch.equal(null.pooled[:, :128], pooled)


def test_clip_g_is_what_open_clip_computes_from_the_same_tensors(places):
    """The packed matrices and the transposed projection, against the library they come from."""
    from open_clip.model import CLIPTextCfg, _build_text_tower

    tower = _build_text_tower(128, CLIPTextCfg(width=128, heads=2, layers=3))
    ours = load(places["sdxl", "original"], "sdxl")
    prefix = "conditioner.embedders.1.model."
    stored = load_file(places["sdxl", "original"])
    state = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    state = {key: value for key, value in state.items() if key != "logit_scale"}
    for i in range(3):  # its feed-forward is 4 times wide, ours here 96
        for key in ("c_fc.weight", "c_fc.bias", "c_proj.weight"):
            name = f"transformer.resblocks.{i}.mlp.{key}"
            padding = (0, 512 - 96) if key == "c_proj.weight" else (0, 0) * (state[name].ndim - 1) + (0, 512 - 96)
            state[name] = torch.nn.functional.pad(state[name], padding)
    tower.load_state_dict(state, strict=False)
    ids = ours.tokenize(PROMPTS[:4])["clip_g"]
    pooled = ours.encode(PROMPTS[:4], sizes=SIZES).pooled[:, :128]
    with torch.no_grad():
        torch.testing.assert_close(pooled, tower.eval()(ids), atol=1e-5, rtol=0)


def test_a_t5_length_of_77_is_a_cut_of_the_tokens_not_of_the_states(places):
    text = load(places["sd3", "original"], "sd3")
    assert text.encode(PROMPTS).context.shape == (5, 154, 256)
    ids = text.tokenize(PROMPTS)
    assert ids["clip_g"][0, -1] == 0
    assert ids["clip_l"][0, -1] == 49_407
    assert ids["t5"][2, -1] == 1


# --- subsets, dtypes, tokenizers ------------------------------------------------------------------------------------


def test_a_subset_leaves_zeros_in_the_place_of_the_others(places):
    whole = load(places["sd3", "original"], "sd3").encode(PROMPTS)
    subset = load(places["sd3", "original"], "sd3", use=["clip_g"], t5={"d_model": 256}, clip_l={"hidden_size": 64})
    encoded = subset.encode(PROMPTS)
    assert list(subset.towers) == ["clip_g"]
    assert encoded.context.shape == whole.context.shape
    torch.testing.assert_close(encoded.context[:, :77, 64:192], whole.context[:, :77, 64:192], atol=1e-6, rtol=0)
    torch.testing.assert_close(encoded.pooled[:, 64:], whole.pooled[:, 64:], atol=1e-6, rtol=0)
    rest = encoded.context.clone()
    rest[:, :77, 64:192] = 0
    assert rest.abs().max() == 0 == encoded.pooled[:, :64].abs().max()


def test_without_t5_its_tokens_are_zeros_of_width_4096(places, tmp_path):
    folder = places["sd3", "separate"]
    text = load_text_encoders(
        {"clip_l": folder / "clip_l.safetensors", "clip_g": folder / "clip_g.safetensors"}, **tiny.WIDTHS, t5_length=256
    )
    encoded = text.encode(["a cat"])
    assert encoded.context.shape == (1, 77 + 256, 4096)
    assert encoded.context[:, 77:].abs().max() == 0


def test_a_t5_without_tokenizer_loads_and_only_tokenising_raises(places, tmp_path):
    text = load_text_encoders(places["sd3", "original"], **tiny.WIDTHS)
    ids = text.tokenize(PROMPTS)
    assert set(ids) == {"clip_l", "clip_g"}
    text.encode_ids({**ids, "t5": torch.ones(5, 77, dtype=torch.long)})
    with pytest.raises(ValueError, match=r"no tokenizer for t5.*spiece\.model.*use=\('clip_l', 'clip_g'\)"):
        text.encode(PROMPTS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_files_of_every_dtype_load_and_a_target_dtype_is_obeyed(modules, tmp_path, dtype):
    path = tiny.write_original(tmp_path, "sd3", modules["sd3"], dtype)
    text = load(path, "sd3")
    weight = modules["sd3"]["t5"].shared.weight
    assert torch.equal(text.towers["t5"].module.shared.weight, weight.to(dtype).float())
    half = load(path, "sd3", dtype=torch.float16)
    kept = {name for name, p in half.towers["t5"].module.named_parameters() if p.dtype == torch.float32}
    assert kept == {f"encoder.block.{i}.layer.1.DenseReluDense.wo.weight" for i in range(2)}
    assert {p.dtype for name in ("clip_l", "clip_g") for p in half.towers[name].module.parameters()} == {torch.float16}
    context, expected = half.encode(PROMPTS[:2]).context, text.encode(PROMPTS[:2]).context
    assert context.dtype == torch.float32
    assert (context - expected).norm() / expected.norm() < 5e-3


def test_a_network_does_not_run_in_fp8(places):
    with pytest.raises(ValueError, match="cannot run in"):
        load(places["sd3", "original"], "sd3", dtype=torch.float8_e4m3fn)


def test_the_tied_table_of_t5_is_one_tensor(places):
    for layout in ("original", "diffusers"):
        module = load(places["sd3", layout], "sd3").towers["t5"].module
        assert module.shared.weight is module.encoder.embed_tokens.weight
        assert not any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])


def test_either_name_of_the_t5_table_is_enough(modules, tmp_path):
    for left in ("shared.weight", "encoder.embed_tokens.weight"):
        tensors = tiny.original("sd3", modules["sd3"])
        del tensors[f"text_encoders.t5xxl.transformer.{left}"]
        save_file(tensors, tmp_path / "release.safetensors")
        table = load(tmp_path / "release.safetensors", "sd3").towers["t5"].module.shared.weight
        assert torch.equal(table, modules["sd3"]["t5"].shared.weight)


def test_prompts_are_read_as_the_release_reads_them(places):
    prompt = ["Tom &amp; Jerry"]
    ids = load(places["sd1.5", "diffusers"], "sd1.5").tokenize(prompt)["clip_l"].tolist()
    assert ids == tiny.clip_tokenizer("<|endoftext|>")(prompt, padding="max_length")["input_ids"]
    assert ids != load_text_encoders("tiny").tokenize(prompt)["clip_l"].tolist()


# --- names and shapes ---------------------------------------------------------------------------------------------


class OnlyShapes:
    """Stands for opened files of a full-size release of which only the key list is here."""

    path, config = "release", None

    def __init__(self, shapes):
        self.shapes = shapes

    def shape(self, key):
        return self.shapes[key]


def released_shapes(name):
    lines = gzip.decompress((KEYS / f"{name}.tsv.gz").read_bytes()).decode().splitlines()
    pairs = (line.split("\t") for line in lines)
    return {key: tuple(int(n) for n in shape.strip("()").split(",") if n.strip()) for key, shape in pairs}


FULL_SIZE = [("clip_l", "clip_l", 123_060_480), ("clip_g", "clip_g", 694_659_840), ("t5", "t5xxl", 4_762_310_656)]


@pytest.mark.parametrize(("encoder", "file", "count"), FULL_SIZE)
def test_the_full_size_key_lists_fit_without_missing_or_unexpected_keys(encoder, file, count):
    shapes = released_shapes(file)
    for wrapped in (True, False) if encoder == "clip_l" else (True,):
        named = {key if wrapped else key.removeprefix("text_model."): shape for key, shape in shapes.items()}
        sources = name_sources(encoder, named)
        found = {name: source.shape(OnlyShapes(named)) for name, source in sources.items()}
        with torch.device("meta"):
            module = build_tower(encoder, infer_config(encoder, found, file))
        found.pop("text_projection.weight", None) if encoder == "clip_l" else None
        ours = {our_name(key): tuple(tensor.shape) for key, tensor in module.state_dict().items()}
        ours.pop("encoder.embed_tokens.weight", None)
        assert ours == found
        assert sum(p.numel() for p in module.parameters()) == count
    config = module.config
    heads = config.num_heads if encoder == "t5" else config.num_attention_heads
    assert heads == {"clip_l": 12, "clip_g": 20, "t5": 64}[encoder]
    if encoder != "t5":
        assert config.hidden_act == {"clip_l": "quick_gelu", "clip_g": "gelu"}[encoder]
    else:
        assert (config.d_kv, config.feed_forward_proj, config.relative_attention_max_distance) == (
            64,
            "gated-gelu",
            128,
        )


def test_open_clips_names_and_back_are_bit_equal(modules):
    state = modules["sdxl"]["clip_g"].state_dict()
    packed = to_open_clip(state)
    assert packed.keys() == tiny.open_clip_names(state).keys() - {"logit_scale"}
    sources = name_sources("clip_g", packed)
    assert sources.keys() == state.keys()

    class Held(OnlyShapes):
        def read(self, key, dtype, device):
            return packed[key]

    for name, source in sources.items():
        assert torch.equal(source.read(Held({}), torch.float32, "cpu"), state[name])


@pytest.mark.parametrize("extra", ["vision_model.post_layernorm.weight", "logit_scale", "visual_projection.weight"])
def test_a_whole_clip_gives_its_text_tower(modules, tmp_path, extra):
    tensors = {f"text_model.{k}": v for k, v in modules["sd1.5"]["clip_l"].state_dict().items()}
    save_file({**tensors, extra: torch.zeros(1)}, tmp_path / "clip.safetensors")
    text = load_text_encoders({"clip_l": tmp_path / "clip.safetensors"}, clip_l={"num_heads": 1}, family="sd1.5")
    assert text.encode(["a cat"]).context.shape == (1, 77, 64)


# --- families and refusals ----------------------------------------------------------------------------------------


def test_a_folder_tells_its_family_by_its_pipeline_or_by_its_encoders(modules, places, tmp_path):
    assert {family: find_text(places[family, "diffusers"]).family for family in FAMILIES} == {f: f for f in FAMILIES}
    folder = tiny.write_diffusers(tmp_path / "xl", {k: modules["sdxl"][k] for k in ("clip_l", "clip_g")})
    for name, family in (("StableDiffusion3Pipeline", "sd3"), ("StableDiffusionXLImg2ImgPipeline", "sdxl"),
                         ("StableDiffusionInpaintPipeline", "sd1.5")):  # fmt: skip
        (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
        assert find_text(folder).family == family
    assert list(find_text(folder).parts) == ["clip_l"]
    assert find_text(folder, "sdxl").family == "sdxl"


def test_one_encoder_alone_loads_from_its_file_or_folder(places, modules):
    folder = places["sd3", "diffusers"]
    assert list(find_text(folder / "text_encoder_3").parts) == ["t5"]
    assert list(find_text(places["sd3", "separate"] / "t5xxl_fp16.safetensors").parts) == ["t5"]
    with pytest.raises(WeightsError, match="say which it is"):
        find_text(folder / "text_encoder_2")
    text = load_text_encoders({"clip_g": folder / "text_encoder_2"}, clip_l={"hidden_size": 64}, t5={"d_model": 256})
    assert text.encode(["a"]).context.shape == (1, 154, 256)


def test_what_does_not_fit_is_named(modules, tmp_path):
    tensors = tiny.original("sd1.5", modules["sd1.5"])
    key = "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.bias"
    strange = "cond_stage_model.transformer.text_model.strange"
    path = tmp_path / "release.safetensors"
    save_file({**{k: v for k, v in tensors.items() if k != key}, strange: torch.zeros(2)}, path)
    with pytest.raises(WeightsError, match=r"1 missing: text_model\.encoder\.layers\.1\.mlp\.fc1\.bias; 1 unexpected: "
                       r"text_model\.strange"):  # fmt: skip
        load(path, "sd1.5")
    save_file({**tensors, key: torch.zeros(7)}, path)
    with pytest.raises(WeightsError, match=r"1 of another shape: text_model\S+ is \[7\], expected \[96\]"):
        load(path, "sd1.5")
    del tensors["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"]
    save_file(tensors, path)
    with pytest.raises(WeightsError, match="does not hold clip_l whole"):
        load(path, "sd1.5")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["joint_blocks.0.x"], "holds no text encoder.*text_encoders/"),
        (["cond_stage_model.model.transformer.resblocks.0.ln_1.weight"], "SD2"),
        (["conditioner.embedders.0.model.ln_final.weight"], "refiner"),
        (["lora_te_text_model_encoder_layers_0.alpha"], "LoRA"),
    ],
)
def test_files_without_our_encoders_say_what_they_are(tmp_path, keys, message):
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "file.safetensors")
    with pytest.raises(WeightsError, match=message):
        load_text_encoders(tmp_path / "file.safetensors")


def test_wrong_arguments_are_refused_in_words(places, tmp_path):
    path = places["sd1.5", "original"]
    with pytest.raises(WeightsError, match=r"of sd1\.5, not of sdxl"):
        load_text_encoders(path, family="sdxl")
    with pytest.raises(ValueError, match=r"did you mean 'sdxl'"):
        load_text_encoders(path, family="sdlx")
    with pytest.raises(ValueError, match=r"did you mean 'clip_l'"):
        load_text_encoders(path, use=["clip-l"])
    with pytest.raises(WeightsError, match="use names clip_g"):
        load_text_encoders({"clip_l": places["sd3", "separate"] / "clip_l.safetensors"}, use=["clip_g"])
    with pytest.raises(ValueError, match=r"did you mean 'num_hidden_layers'"):
        load_text_encoders(path, clip_l={"num_hiden_layers": 2})
    with pytest.raises(WeightsError, match=r"did you mean 'clip_g'"):
        load_text_encoders({"clipg": path})
    with pytest.raises(FileNotFoundError, match=r"clip_l\*\.safetensors"):
        load_text_encoders(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_text_encoders(tmp_path / "nowhere.safetensors")
    (tmp_path / "t5xxl_fp16.safetensors").write_bytes(b"")
    (tmp_path / "t5xxl_fp8.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match="holds 2 files of t5"):
        load_text_encoders(tmp_path)


def test_one_released_clip_is_not_taken_for_the_other(tmp_path):
    for name, width in (("clip_l", 768), ("clip_g", 1280)):
        state = {"text_model.embeddings.token_embedding.weight": torch.zeros(2, width)}
        save_file(state, tmp_path / f"{name}.safetensors")
    swapped = {"clip_l": tmp_path / "clip_g.safetensors", "clip_g": tmp_path / "clip_l.safetensors"}
    with pytest.raises(WeightsError, match=r"given as clip_l and is clip_g: it is 1280 wide; exchange the paths"):
        load_text_encoders(swapped)


def test_a_width_that_does_not_tell_its_heads_asks_for_them():
    shapes = released_shapes("clip_l")
    narrow = {key: tuple(96 if n == 768 else n for n in shape) for key, shape in shapes.items()}
    part = find_part(narrow)
    with pytest.raises(WeightsError, match=r"clip_l=\{'num_heads': N\}"):
        tower_config(part, {})
    assert tower_config(part, {"num_heads": 3})["num_attention_heads"] == 3
    with pytest.raises(WeightsError):
        load_tower(part, "sd3", {}, torch.float32, torch.device("cpu"))


def find_part(shapes):
    from mmdit.weights.text_files import TextPart

    return TextPart("clip_l", OnlyShapes(shapes), name_sources("clip_l", shapes))


MEMORY = """
import re, sys, torch
from pathlib import Path
import transformers.models.t5.modeling_t5, transformers.models.clip.modeling_clip  # imports, before the baseline
from mmdit.encoders.text import load_text_encoders
from mmdit.encoders.tokenizers import ClipTokenizer
from mmdit.encoders.vae import load_vae

def peak():  # of this process alone; ru_maxrss begins with its parent's
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

kept, dtype = ClipTokenizer(cleaned=False), getattr(torch, sys.argv[2])
torch.randn(64, 64) @ torch.randn(64, 64)
before = peak()
if sys.argv[3] == "vae":
    modules = [load_vae(sys.argv[1], dtype=dtype)]
else:
    modules = [tower.module for tower in load_text_encoders(sys.argv[1], dtype=dtype).towers.values()]
print((peak() - before) / sum(parameter.nbytes for module in modules for parameter in module.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux' /proc")
@pytest.mark.slow  # a process each, which imports torch and transformers
@pytest.mark.parametrize(
    ("part", "stored", "wanted"),
    [("t5", "float16", "bfloat16"), ("sdxl", "float16", "float16"), ("vae", "float16", "float32")],
)
def test_loading_takes_little_more_memory_than_the_weights(part, stored, wanted, tmp_path):
    with torch.device("meta"):
        if part == "vae":
            module = AutoencoderKL(VAEConfig(block_channels=(128, 256, 512, 512)))
        elif part == "t5":
            module = T5EncoderModel(T5Config(**{**tiny.T5, "d_model": 2048, "d_ff": 5120, "num_layers": 3}))
        else:
            wide = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
            module = CLIPTextModelWithProjection(CLIPTextConfig(**{**tiny.CLIP_G, **wide}))
    state = module.to(getattr(torch, stored)).to_empty(device="cpu").state_dict()
    if part == "sdxl":
        state = {f"conditioner.embedders.1.model.{k}": v for k, v in tiny.open_clip_names(state).items()}
    state.pop("encoder.embed_tokens.weight", None)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "m.safetensors")
    code = [sys.executable, "-c", MEMORY, str(tmp_path / "m.safetensors"), wanted, part]
    ratio = float(subprocess.run(code, capture_output=True, text=True, check=True).stdout)
    assert 0.9 < ratio < 1.15
