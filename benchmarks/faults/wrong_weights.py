"""F17: weights that do not fit: missing, extra, misshapen, misnamed, of another family; none loads in part."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.faults import Outcome

Table = dict[str, Tensor]
DIT = {
    "width": 128,
    "num_heads": 2,
    "depth": 3,
    "in_channels": 16,
    "out_channels": 16,
    "context_dim": 24,
    "pooled_dim": 20,
    "pos_embed_max_size": 12,
    "pos_embed_base_size": 4,
}
UNET = {
    "model_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "transformer_depth": (1, 1),
    "norm_groups": 8,
    "num_heads": 4,
    "in_channels": 4,
    "out_channels": 4,
    "context_dim": 24,
    "pooled_dim": None,
}
FIRST = "x_embedder.proj.weight"
BLOCK = "joint_blocks.1.x_block.attn.qkv.weight"


class Case(NamedTuple):
    """What is loaded, and the words that its refusal must hold; None: it must load with every bit of the denoiser."""

    path: Path
    words: tuple[str, ...] | None
    overrides: Mapping[str, Any] = MappingProxyType({})
    load: str = "load_denoiser"
    of: str = "sd3"


def run_wrong(folder: Path, full: bool) -> Outcome:
    """F17."""
    import mmdit

    makers = _denoisers()
    files = {name: folder / f"{name}.safetensors" for name in makers}
    for name, denoiser in makers.items():
        mmdit.save_denoiser(denoiser, files[name])
    vae = _vae()
    mmdit.save_vae(vae, folder / "vae.safetensors")
    cases = {**_of_denoisers(folder, files), **_of_folders(folder, makers), **_of_vaes(folder)}
    wrong, refused, loaded = [], 0, 0
    for name, case in cases.items():
        try:
            found = getattr(mmdit, case.load)(case.path, **case.overrides)
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            lacking = [word for word in case.words or () if word not in str(error)]
            if case.words is None or lacking:
                wrong.append(f"{name}: the refusal lacks {lacking}: {error!s:.300}")
            continue
        except Exception as error:  # the finding
            wrong.append(f"{name}: {type(error).__name__}: {error!s:.200}")
            continue
        loaded += 1
        if case.words is not None:
            wrong.append(f"{name}: loaded")
        elif not _equal(found, makers[case.of]):
            wrong.append(f"{name}: loaded other numbers")
    trips = _round_trips(folder, makers)
    wrong += [f"round trip of {name} is not bit-equal" for name, good in trips.items() if not good]
    return Outcome(
        not wrong and len(cases) >= 30,
        f"{len(cases)} cases: {refused} refused, {loaded} (names that are told apart, other dtypes) loaded bit-equal, "
        f"{len(wrong)} wrong; {len(trips)} round trips bit-equal",
        {"cases": len(cases), "refused": refused, "loaded": loaded, "round_trips": len(trips), "wrong": wrong},
    )


def _denoisers() -> dict[str, nn.Module]:
    from mmdit import build_denoiser
    from mmdit.config import model_config

    configs = {
        "sd3": model_config("mmdit", **DIT),
        "sd3.5_medium": model_config("mmdit", **DIT, qk_norm="rms", dual_attention_layers=(0, 1)),
        "sd3.5_large": model_config("mmdit", **DIT, qk_norm="rms"),
        "sd1.5": model_config("unet", **UNET),
        "sdxl": model_config(
            "unet",
            **{**UNET, "num_heads": None, "head_dim": 16, "linear_projection": True, "transformer_depth": (0, 2)}
            | {"middle_transformer_depth": 2, "pooled_dim": 80},
        ),
    }
    generator, found = torch.Generator().manual_seed(0), {}
    for name, config in configs.items():
        denoiser = build_denoiser(config).eval()
        with torch.no_grad():
            for tensor in denoiser.state_dict().values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
        found[name] = denoiser
    return found


def _vae() -> nn.Module:
    from mmdit.config import VAEConfig
    from mmdit.encoders.vae import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(VAEConfig(block_channels=(32, 32), num_res_blocks=1, latent_channels=4, norm_groups=8))


def _equal(found: nn.Module, wanted: nn.Module) -> bool:
    """Compare names, and numbers as the found one's dtype can hold them."""
    a, b = found.state_dict(), wanted.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name].to(a[name].dtype)) for name in a)


def _of_denoisers(folder: Path, files: dict[str, Path]) -> dict[str, Case]:
    """Single files: one change each."""
    from mmdit.weights import sd3

    sd, unet = load_file(files["sd3"]), load_file(files["sd1.5"])
    prefix = sd3.PREFIX
    odd = next(key for key in unet if key.endswith("input_blocks.1.0.in_layers.2.weight"))

    def write(name: str, table: Table, metadata: dict[str, str] | None = None) -> Path:
        path = folder / "cases" / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file({key: tensor.contiguous() for key, tensor in table.items()}, path, metadata)
        return path

    def changed(table: Table, drop: Callable[[str], bool] = lambda key: False, **new: Tensor) -> Table:
        return {key: tensor for key, tensor in table.items() if not drop(key)} | new

    def named(rename: Callable[[str], str], table: Table = sd) -> Table:
        return {rename(key): tensor for key, tensor in table.items()}

    def cast(dtype: torch.dtype) -> Table:
        return {key: tensor.to(dtype) for key, tensor in sd.items()}

    block, first = prefix + BLOCK, prefix + FIRST
    plain = {key.removeprefix(prefix): tensor for key, tensor in sd.items()}
    scaled = {key: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor for key, tensor in sd.items()}
    lora = {f"lora_unet_{key}.lora_up.weight": torch.zeros(4, 4) for key in ("a", "b")}
    averaged = {f"model_ema.{key.removeprefix('model.').replace('.', '')}": tensor for key, tensor in unet.items()}
    return {
        "one tensor missing": Case(write("a1", changed(sd, lambda key: key == block)), ("1 missing", BLOCK)),
        "half missing": Case(write("a2", dict(list(sd.items())[: len(sd) // 2])), ("missing",)),
        "a bias missing": Case(
            write("a3", changed(sd, lambda k: k.endswith("1.x_block.attn.qkv.bias"))), ("qkv.bias",)
        ),
        "one tensor more": Case(write("a4", changed(sd, **{f"{prefix}new.weight": torch.ones(2)})), ("new.weight",)),
        "a LoRA beside the weights": Case(
            write("a5", changed(sd, **{f"{block}.lora_A": torch.ones(2)})), ("unexpected", "LoRA")
        ),
        "another shape": Case(write("a6", changed(sd, **{block: torch.ones(384, 64)})), (BLOCK, "[384, 64]")),
        "a matrix transposed": Case(write("a7", changed(sd, **{block: sd[block].T})), (BLOCK, "[128, 384]")),
        "a vector as a matrix": Case(
            write("a8", changed(sd, **{block.replace("weight", "bias"): torch.ones(384, 1)})), ("[384, 1]",)
        ),
        "a name misspelt": Case(
            write(
                "a9",
                named(lambda key: key.replace("joint_blocks.1.x_block.attn.qkv", "joint_blocks.1.x_block.attn.qvk")),
            ),
            ("qvk.weight", "missing"),
        ),
        "a block misnumbered": Case(
            write("b1", named(lambda key: key.replace("joint_blocks.2.", "joint_blocks.7."))), ("joint_blocks.",)
        ),
        "the last block missing": Case(
            write("b2", changed(sd, lambda key: "joint_blocks.2." in key)), ("joint_blocks.",)
        ),
        "SD3.5 without its norms": Case(
            write("b3", changed(load_file(files["sd3.5_large"]), lambda key: ".1.x_block.attn.ln_q" in key)), ("ln_q",)
        ),
        "SD3.5-medium without one second attention": Case(
            write("b4", changed(load_file(files["sd3.5_medium"]), lambda key: "0.x_block.attn2.proj.weight" in key)),
            ("attn2.proj",),
        ),
        "SD3 as SD3.5": Case(files["sd3"], ("missing", "ln_"), {"qk_norm": "rms"}),
        "SD3.5 as SD3": Case(files["sd3.5_large"], ("unexpected", "ln_"), {"qk_norm": None}),
        "SD3 with other heads": Case(files["sd3"], ("heads",), {"num_heads": 5}),
        "SD3 with a field misspelt": Case(files["sd3"], ("num_head",), {"num_head": 2}),
        "SD3 of another depth": Case(files["sd3"], ("joint_blocks.",), {"depth": 4}),
        "a U-Net with a tensor missing": Case(
            write("b5", changed(unet, lambda key: key == odd)),
            ("in_layers.2.weight",),
            {"num_heads": 4, "norm_groups": 8},
        ),
        "a U-Net with a kernel of another size": Case(
            write("b6", changed(unet, **{odd: torch.ones(32, 32, 1, 1)})),
            ("in_layers.2.weight", "[32, 32, 1, 1]"),
            {"num_heads": 4, "norm_groups": 8},
        ),
        "only the average of a U-Net, misnamed": Case(write("b7", averaged), ("model_ema",)),
        "a LoRA alone": Case(write("b8", lora), ("LoRA",)),
        "a VAE": Case(folder / "vae.safetensors", ("denoiser",)),
        "a text encoder": Case(
            write("b9", {"text_model.embeddings.token_embedding.weight": torch.zeros(9, 4)}), ("denoiser",)
        ),
        "no tensor at all": Case(write("c1", {}), ("denoiser",)),
        "scaled fp8": Case(write("c2", changed(scaled, **{f"{prefix}scaled_fp8": torch.zeros(2)})), ("fp8",)),
        "integers": Case(write("c3", {k: (t * 100).to(torch.int8) for k, t in sd.items()}), ("int",)),
        "no prefix": Case(write("d1", plain), None),
        "prefix of a wrapper": Case(write("d2", {f"net.{k}": t for k, t in plain.items()}), None),
        "prefix of DDP": Case(write("d3", {f"module.{k}": t for k, t in plain.items()}), None),
        "prefix of a compiled module": Case(write("d4", {f"_orig_mod.{k}": t for k, t in plain.items()}), None),
        "float16": Case(write("d5", cast(torch.float16)), None),
        "bfloat16": Case(write("d6", cast(torch.bfloat16)), None),
        "an average of SD3 in float32": Case(files["sd3"], None),
        "a first convolution flattened": Case(write("c4", changed(sd, **{first: sd[first].flatten(1)})), (FIRST,)),
    }


def _of_folders(folder: Path, makers: dict[str, nn.Module]) -> dict[str, Case]:
    """Folders of diffusers' layout."""
    import mmdit

    def made(name: str, shard_size: str | None = None) -> Path:
        mmdit.save_denoiser(makers["sd3"], folder / name, "diffusers", shard_size=shard_size)
        return folder / name

    whole, cut, lying, other, stray = made("e1"), made("e2", "200KB"), made("e3", "200KB"), made("e4"), made("e5")
    sorted(cut.glob("*-of-*.safetensors"))[1].unlink()
    index = next(lying.glob("*.index.json"))
    table = json.loads(index.read_text())
    names = sorted(set(table["weight_map"].values()))
    key = next(k for k, v in table["weight_map"].items() if v == names[0])
    index.write_text(json.dumps(table | {"weight_map": table["weight_map"] | {key: names[1]}}))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_layers": 5}))
    file = next(stray.glob("*.safetensors"))
    save_file({**load_file(file), "stranger.weight": torch.zeros(2)}, file)
    return {
        "a folder of diffusers": Case(whole, None),
        "a folder that lacks a shard": Case(cut, ("lacks", "-of-")),
        "a folder whose index lies": Case(lying, ("do not belong together", key)),
        "a folder with the config of another depth": Case(other, None),  # shapes decide
        "a folder with a tensor more": Case(stray, ("stranger.weight",)),
    }


def _of_vaes(folder: Path) -> dict[str, Case]:
    """The VAE's loader, with the same faults."""
    table = load_file(folder / "vae.safetensors")
    key = next(name for name in table if name.endswith("decoder.conv_in.weight"))

    def write(name: str, changed: Table) -> Path:
        path = folder / "cases" / f"vae-{name}.safetensors"
        save_file(changed, path)
        return path

    known = {"norm_groups": 8, "scale": 1.0, "shift": 0.0}
    return {
        "a VAE with a tensor missing": Case(
            write("1", {k: t for k, t in table.items() if k != key}), ("decoder.conv_in.weight",), known, "load_vae"
        ),
        "a VAE with a tensor more": Case(
            write("2", {**table, "decoder.new": torch.zeros(1)}), ("decoder.new",), known, "load_vae"
        ),
        "a VAE with another shape": Case(
            write("3", {**table, key: torch.zeros(32, 7, 3, 3)}), ("of another shape",), known, "load_vae"
        ),
        "a denoiser for a VAE": Case(folder / "sd3.safetensors", ("VAE",), {}, "load_vae"),
        "a denoiser for text encoders": Case(folder / "sd3.safetensors", ("text encoder",), {}, "load_text_encoders"),
    }


def _round_trips(folder: Path, makers: dict[str, nn.Module]) -> dict[str, bool]:
    """Save and load every family in both layouts, and convert one layout's file to the other and back."""
    import mmdit

    found = {}
    for name, denoiser in makers.items():
        given = {"num_heads": 4, "norm_groups": 8} if name == "sd1.5" else {}
        given = {"head_dim": 16, "norm_groups": 8} if name == "sdxl" else given
        path = folder / "trips" / name / "original.safetensors"
        mmdit.save_denoiser(denoiser, path)
        once = mmdit.load_denoiser(path, **given)
        mmdit.save_denoiser(once, path.parent / "diffusers", "diffusers", shard_size="300KB")
        twice = mmdit.load_denoiser(path.parent / "diffusers")
        found[f"{name}, original"] = _equal(once, denoiser)
        found[f"{name}, diffusers"] = _equal(twice, denoiser)
    return found


RUNS = {"F17": run_wrong}
