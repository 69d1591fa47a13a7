"""The config road: merging, presets, widths, and errors that name the right word."""

import subprocess
import sys
import time

import pytest
import yaml

from mmdit.config import (
    ConfigError,
    CrossDiTConfig,
    MMDiTConfig,
    RunConfig,
    UNetConfig,
    differences,
    load_config,
    load_study,
    merge,
    parse_overrides,
    read_yaml,
    resolve,
    row_configs,
    to_tree,
    to_yaml,
)
from mmdit.presets import ENCODER_WIDTHS, PRESETS, VAE_WIDTHS


def test_a_resolved_config_survives_the_trip_through_yaml():
    config = load_config(None, ["--model.name", "unet", "--model.preset", "tiny", "--train.lr", "2e-4"])
    assert resolve(yaml.safe_load(to_yaml(config))) == config
    assert config.train.lr == pytest.approx(2e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_of_every_backbone_resolves_and_takes_the_encoders_widths(name):
    for preset, fields in PRESETS[name].items():
        if "context_dim" in fields:
            continue  # the released sizes state their own widths, which are not the tiny encoders'
        model = load_config(None, {"model": {"name": name, "preset": preset}}).model
        assert model.context_dim == ENCODER_WIDTHS["tiny"]["context_dim"]
        assert model.in_channels == VAE_WIDTHS["tiny"]["channels"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (["--train.lrr", "1"], ["train.lrr", "did you mean 'train.lr'"]),
        (["--trian.lr", "1"], ["trian", "did you mean 'train'"]),
        (["--lr", "1"], ["did you mean 'train.lr'"]),
        (["--sampling.sampler", "eular"], ["sampling.sampler", "'eular'", "did you mean 'euler'"]),
        (["--model.name", "unett"], ["did you mean 'unet'"]),
        (["--model.preset", "tinny"], ["did you mean 'tiny'"]),
        (["--model.depht", "3"], ["did you mean 'model.depth'"]),
        (["--train.lr", "fast"], ["train.lr", "number", "'fast'"]),
        (["--encoders.t5_length", "0"], ["encoders.t5_length", "greater than 0"]),
        (["--data.resolution", "65"], ["data.resolution"]),
        (["--data.name", "emoji", "--data.resolution", "72"], ["latent size 9", "not divisible by 2"]),
        (["--diffusion.schedule.name", "variance_preserving"], ["'velocity' belongs to rectified_flow"]),
        (["--sampling.sampler", "ddpm"], ["'ddpm'", "variance_preserving"]),
        (["--train.batch_size", "7", "--train.accumulation", "2"], ["batch_size 7", "accumulation"]),
        (["--diffusion.density.sale", "1"], ["diffusion.density.sale", "unknown field"]),
        (["--model.context_dim", "300"], ["context_dim is 300", "256"]),
        (["--train.lr"], ["has no value"]),
    ],
)
def test_a_wrong_word_is_refused_with_its_path_and_the_nearest_right_one(override, words):
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["--model.name", "mmdit", "--model.preset", "tiny", *override])
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_changing_the_name_drops_the_old_variants_fields():
    tree = {"model": {"name": "mmdit", "preset": "tiny", "depth": 3}}
    config = load_config(None, merge(tree, parse_overrides(["--model.name", "unet"])))
    assert config.model.name == "unet"


def test_changing_the_backbone_keeps_a_preset_that_both_have_and_drops_others():
    tiny, sd3 = {"model": {"name": "mmdit", "preset": "tiny"}}, {"model": {"name": "mmdit", "preset": "sd3_medium"}}
    unet = {"model": {"name": "unet"}}
    assert merge(tiny, unet)["model"] == {"name": "unet", "preset": "tiny"}
    assert merge(tiny, {"model": {"name": "unet", "preset": "S"}})["model"] == {"name": "unet", "preset": "S"}
    assert merge(sd3, unet)["model"] == {"name": "unet"}
    for words in (["--model.name", "unet"], {"model": {"name": "unet"}}):  # also where no file says anything
        assert load_config(None, words).model.model_channels == PRESETS["unet"]["tiny"]["model_channels"]


def test_changing_the_preset_drops_the_old_presets_fields_but_keeps_the_users(monkeypatch):
    monkeypatch.setitem(PRESETS["mmdit"], "other", {**PRESETS["mmdit"]["tiny"], "depth": 2})
    resolved = to_tree(load_config(None, {"model": {"name": "mmdit", "preset": "tiny", "qk_norm": "rms"}}))
    config = load_config(None, merge(resolved, {"model": {"preset": "other"}}))
    assert config.model.depth == 2
    assert config.model.qk_norm == "rms"


def test_a_base_file_lies_underneath_and_only_one_level_deep(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {lr: 1e-3, batch_size: 64}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\ntrain: {lr: 5e-4}\n")
    (tmp_path / "c.yaml").write_text("base: b.yaml\n")
    config = load_config(tmp_path / "b.yaml")
    assert (config.train.lr, config.train.batch_size) == (5e-4, 64)
    with pytest.raises(ConfigError, match="may not have a base of its own"):
        load_config(tmp_path / "c.yaml")


def test_a_missing_file_names_the_nearest_one(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"did you mean .*quickstart\.yaml"):
        load_config(tmp_path / "quikstart.yaml")


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "train: {lr: 1}\ntrain: {lr: 2}\n"])
def test_what_is_no_mapping_of_unique_keys_is_refused(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_config(path)


@pytest.mark.parametrize("word", ["no", "yes", "off", "true"])
@pytest.mark.parametrize("field", ["sampling.guidance_scale", "train.lr", "train.log_every", "train.betas", "seed"])
def test_a_switch_is_no_number(field, word):
    """YAML reads `guidance_scale: no` as False, which Python would take for a scale of 0: no prompt at all."""
    value = f"[{word}, 0.9]" if field == "train.betas" else word
    with pytest.raises(ConfigError, match=rf"{field}: got (False|True), but this is no switch"):
        load_config(None, [f"--{field}", value])
    assert load_config(None, ["--train.compile", word]).train.compile is (word in ("yes", "true"))


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize("field", ["train.lr", "diffusion.density.mean", "encoders.latent_shift"])
def test_only_finite_numbers_are_numbers(field, value):
    with pytest.raises(ConfigError, match=rf"{field}\S*: Input should be"):
        load_config(None, [f"--{field}={value}"])


@pytest.mark.parametrize(
    "field", ["model.name", "model.preset", "encoders.vae", "data.name", "diffusion.schedule.name"]
)
@pytest.mark.parametrize("value", ["[1, [2]]", "{a: 1}", "3", "null"])
def test_a_choice_that_is_no_word_is_a_config_error(field, value):
    if (field, value) == ("model.preset", "null"):
        return  # no preset: the fields' own defaults
    with pytest.raises(ConfigError, match=field.partition(".")[0]):
        load_config(None, [f"--{field}", value])


def test_a_field_below_a_name_of_the_users_own_is_recognised():
    with pytest.raises(
        ConfigError, match=r"did you mean 'train\.more_emas\.long\.decay'\? Valid here: decay, sigma_rel"
    ):
        load_config(None, {"train": {"more_emas": {"long": {"dcay": 0.9}}}})


def test_a_row_that_changes_more_than_the_study_varies_is_refused(tmp_path):
    (tmp_path / "base.yaml").write_text("model: {name: mmdit, preset: tiny}\n")
    study = tmp_path / "study.yaml"
    study.write_text(
        "name: s\nbase: base.yaml\nrows:\n  a: {}\n  b: {model: {name: unet, preset: tiny}, train: {lr: 3e-4}}\n"
    )
    with pytest.raises(ConfigError, match=r"row 'b' differs from row 'a' in train\.lr"):
        row_configs(load_study(study))
    cells = row_configs(load_study(study, ["--allow_confounded", "true"]))
    assert differences(to_tree(cells["a"][0]), to_tree(cells["b"][0]))[0] == "name"
    assert isinstance(cells["b"][0], RunConfig)


def test_a_typo_exits_before_torch_is_imported():
    code = (
        "import sys; from mmdit.config import load_config, ConfigError\n"
        "try: load_config(None, ['--train.lrr', '1'])\n"
        "except ConfigError: pass\n"
        "print('torch' in sys.modules)"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
    assert time.perf_counter() - start < 20  # a hang, not a speed test


def test_another_data_set_drops_the_fields_of_the_default_one():
    config = load_config(None, {"data": {"name": "images", "source": "x"}})
    assert config.data.name == "images"
    from mmdit.config import merge
    from mmdit.config.reading import _default_names

    tree = merge(_default_names({"data": {"num_images": 20}}), {"data": {"name": "images", "source": "x"}})
    assert tree == {"data": {"name": "images", "source": "x"}}


def test_a_field_of_another_variant_is_not_answered_with_itself():
    with pytest.raises(
        ConfigError, match=r"data\.num_images: unknown field of images: it is one of shapes\. "
    ) as caught:
        load_config(None, {"data": {"name": "images", "source": "x", "num_images": 3}})
    assert "did you mean" not in str(caught.value)


def test_a_row_of_another_backbone_does_not_lose_what_the_study_gives_to_every_row(tmp_path):
    (tmp_path / "base.yaml").write_text("model: {name: mmdit, preset: tiny}\n")
    text = "name: s\nbase: base.yaml\nrows:\n  a: {}\n  b: {model: {name: unet%s}}\noverrides: {model: {%s}}\n"
    (tmp_path / "lost.yaml").write_text(text % ("", "qk_norm: rms, injection: joint"))
    with pytest.raises(
        ConfigError, match=r"row 'b' changes model\.name, which drops model\.qk_norm, model\.injection of"
    ):
        row_configs(load_study(tmp_path / "lost.yaml"))
    (tmp_path / "kept.yaml").write_text(text % (", injection: joint", "injection: joint"))
    (tmp_path / "other.yaml").write_text(text % ("", "name: crossdit, qk_norm: rms"))
    assert row_configs(load_study(tmp_path / "kept.yaml"))["b"][0].model.injection == "joint"
    assert row_configs(load_study(tmp_path / "other.yaml"))["a"][0].model.qk_norm == "rms"


BACKBONES = {cls.model_fields["name"].default: cls for cls in (MMDiTConfig, CrossDiTConfig, UNetConfig)}
FOREIGN = [
    (name, field)
    for name, cls in BACKBONES.items()
    for field in dict.fromkeys(f for other in BACKBONES.values() for f in other.model_fields)
    if field not in cls.model_fields
]


@pytest.mark.parametrize(("name", "field"), FOREIGN)
def test_every_field_that_only_another_backbone_has_is_refused_with_the_backbones_that_have_it(name, field):
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"model": {"name": name, "preset": "tiny", field: 1}})
    owners = [other for other, cls in BACKBONES.items() if field in cls.model_fields]
    told = f"model.{field}: unknown field of {name}: it is one of {' and '.join(owners)}. "
    assert told in str(caught.value)
    assert f"Remove it, or set model.name: {' or '.join(owners)}." in str(caught.value)
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    "study",
    [
        {"rows": {"a": {}, "b": {"model": {"name": "crossdit", "text_in_query": True}}}},
        {"rows": {"a": {}, "b": {"model": {"text_in_query": True}}}},
        {"factorial": {"model.text_in_query": [True], "model.name": ["unet", "mmdit"]}},
        {"factorial": {"model.name": ["unet", "mmdit"], "model.text_in_query": [True]}},
        {"rows": {"a": {}}, "overrides": {"model": {"text_in_query": True}}},
    ],
    ids=str,
)
def test_a_row_of_a_backbone_without_a_field_is_refused_with_the_backbone_that_has_it(tmp_path, study):
    (tmp_path / "base.yaml").write_text("model: {name: mmdit, preset: tiny}\n")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"name": "s", "base": "base.yaml", **study}, sort_keys=False))
    with pytest.raises(ConfigError, match=r"row '.*': model\.text_in_query: unknown field of .*: it is one of unet\. "):
        row_configs(load_study(tmp_path / "study.yaml"))


def test_aliases_mean_what_they_say_and_those_that_grow_are_refused(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("x: &prompts [a red circle]\ntrain: {sample_prompts: *prompts}\n")
    assert read_yaml(file)["train"] == {"sample_prompts": ["a red circle"]}
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))]
    file.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"a\.yaml has more than 50,000 values with its aliases written out"):
        read_yaml(file)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: [a, b]", "base: expected the path of a config"),
        ("name: 2024-99-99", "not valid YAML: month must be in"),
        ("? [a]\n: b", "not valid YAML: unhashable"),
        ("train: {images: 1" + ":59" * 30 + "}", "whole number of more than 64 bits"),
        ("[" * 5_000, "nested too deeply"),
        ("# " + "x" * 300_000, "300,002 bytes; more than 262,144 are not read"),
    ],
)
def test_a_file_that_is_no_config_is_refused_by_name(tmp_path, text, words):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(tmp_path / "a.yaml")
    assert "a.yaml" in str(caught.value)


def test_of_many_problems_the_first_fifty_are_told():
    with pytest.raises(ConfigError) as caught:
        load_config(None, {f"field{i}": 1 for i in range(70)})
    lines = str(caught.value).splitlines()
    assert len(lines) == 51
    assert lines[-1].endswith("and 20 more problems")
