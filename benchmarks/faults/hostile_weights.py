"""Hostile weights, release folders, checkpoints and tokenizers for F4."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import runpy
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.faults.hostile_cases import GIB, Case, Trap, header, hole, tensor, write, zipped
from mmdit.checkpoint import CheckpointError, fingerprint, load_checkpoint, manifest_text, save_checkpoint
from mmdit.config import load_config

ROOT = Path(__file__).resolve().parents[2]
Cases = dict[str, Case]
SUFFIX = ".safetensors"


def weights(folder: Path, trap: Trap) -> Cases:
    """Single files, for the loader of denoisers."""
    import mmdit

    def case(name: str, content: bytes, *words: str) -> Case:
        path = write(folder / name, content)
        return Case(lambda: mmdit.load_denoiser(path), (name, *words))

    joint = "joint_blocks.{}.x_block.attn.qkv.weight"
    flat = {"x_embedder.proj.weight": tensor([64, 16, 2, 2], 0, 0), "pos_embed": tensor([1, 2**30, 64], 0, 0)}
    names = {joint.format(number): tensor([0, 64], 0, 0) for number in (0, 10**9)}
    many = {f"t{i}": tensor([0], 0, 0) for i in range(2 * trap.many)}
    table = json.dumps({"__metadata__": {f"k{i}": "" for i in range(8 * trap.many)}}).encode()
    pt = write(folder / "bomb.pt", zipped({"archive/data.pkl": bytes(64 << 20)}, zipfile.ZIP_DEFLATED))
    os.mkfifo(folder / f"pipe{SUFFIX}")
    (folder / f"zeros{SUFFIX}").symlink_to("/dev/zero")
    return {
        "a pickle as .ckpt": case("a.ckpt", trap.torch_zip, "pickle"),
        "a pickle as .safetensors": case(f"b{SUFFIX}", trap.pickle, "pickle"),
        "a header of 2^63 bytes": case(f"c{SUFFIX}", (2**63).to_bytes(8, "little") + b"{}", "claims a header"),
        "a zipped pickle as .safetensors": case(f"d{SUFFIX}", trap.torch_zip, "pickle"),
        "a pickle as .pt, for the extractors": Case(_extractor(write(folder / "e.pt", trap.torch_zip)), ("e.pt",)),
        "a bare pickle as .pth, for the extractors": Case(_extractor(write(folder / "e.pth", trap.pickle)), ("e.pth",)),
        "a zip bomb as .pt": Case(lambda: mmdit.load_denoiser(pt), ("bomb.pt", "pickle")),
        "a pickle, to be converted": Case(_convert(folder / "a.ckpt", folder / "out"), ("a.ckpt", "pickle")),
        "a pickle, to be looked at": Case(_convert(folder / f"d{SUFFIX}", None), (f"d{SUFFIX}", "pickle")),
        "a header of 10^8 bytes of holes": Case(
            partial(mmdit.load_denoiser, hole(folder / f"f{SUFFIX}", 10**8 + 8, (10**8).to_bytes(8, "little"))),
            (f"f{SUFFIX}",),
        ),
        "a header of brackets": case(f"g{SUFFIX}", header(b'{"a":' + b"[" * trap.many * 100), "100,000 tensors"),
        "a header of empty lists": case(
            f"h{SUFFIX}", header(b'{"a":[' + b"[]," * trap.many * 60 + b"[]]}"), "100,000 tensors"
        ),
        "a header of metadata": case(f"i{SUFFIX}", header(table)),
        "200,000 tensors": case(f"j{SUFFIX}", header(many), "100,000 tensors"),
        "a tensor of 4 TB": case(f"k{SUFFIX}", header({"x": tensor([2**40], 0, 2**42)}), "cut off"),
        "two tensors in one place": case(
            f"l{SUFFIX}", header({n: tensor([1], 0, 4) for n in "ab"}, b"1234"), "overlaps"
        ),
        "bytes before the file": case(f"m{SUFFIX}", header({"x": tensor([1], -4, 0)}, b"1234"), "-4"),
        "a number that is none": case(f"n{SUFFIX}", header({"x": tensor([math.nan], 0, 4)}, b"1234"), "nan"),
        "a shape of 2^200": case(f"o{SUFFIX}", header({"x": tensor([2**200, 0], 0, 0)}), "denoiser"),
        "a block of number 10^9": case(f"p{SUFFIX}", header({**flat, **names})),
        "a position table of 2^30 rows of nothing": case(
            f"q{SUFFIX}", header({**flat, "pos_embed": tensor([1, 2**30, 0], 0, 0), **dict([*names.items()][:1])})
        ),
        "a U-Net of 10^8 stages": case(
            f"r{SUFFIX}",
            header({f"input_blocks.{i}.0.weight": tensor([0, 4, 3, 3], 0, 0) for i in (0, 10**8)}
                   | {"input_blocks.1.0.in_layers.2.weight": tensor([0, 320, 3, 3], 0, 0)}),
        ),
        "a web page": case(f"s{SUFFIX}", b"<!DOCTYPE html><script>alert(1)</script>", "web page"),
        "a pipe": Case(lambda: mmdit.load_denoiser(folder / f"pipe{SUFFIX}"), (f"pipe{SUFFIX}",)),
        "a link to /dev/zero": Case(lambda: mmdit.load_denoiser(folder / f"zeros{SUFFIX}"), (f"zeros{SUFFIX}",)),
        "a name of 10 MB": case(f"t{SUFFIX}", header({"x" * 10**7: tensor([1], 0, 4)}, b"1234"), "10,000,000 ch"),
    }  # fmt: skip


def _extractor(path: Path) -> Callable[[], object]:
    from mmdit_eval.extractor_weights import read_tensors

    return lambda: read_tensors(path)


def _convert(source: Path, out: Path | None) -> Callable[[], object]:
    """Call scripts/convert.py as the command line does; its exit code 2 and its words are a refusal."""
    words = ["--inspect", str(source)] if out is None else [str(source), str(out), "--layout", "diffusers"]

    def load() -> None:
        sys.argv = ["convert.py", *words]
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                runpy.run_path(str(ROOT / "scripts" / "convert.py"), run_name="__main__")
            except SystemExit as ended:
                if ended.code == 2 and not (out and out.exists()):
                    raise ValueError(said.getvalue()) from None

    return load


def releases(folder: Path, trap: Trap) -> Cases:
    """Folders as diffusers writes them, with indices, configs and pickles beside the weights."""
    import mmdit

    def index(name: str, table: Any) -> Path:
        write(folder / name / f"model{SUFFIX}", header({"x": tensor([1], 0, 4)}, b"1234"))
        return write(
            folder / name / f"model{SUFFIX}.index.json", table if isinstance(table, str) else json.dumps(table)
        )

    def text(name: str, config: str) -> Path:
        keys = {"text_model.embeddings.token_embedding.weight": torch.zeros(8, 768)}
        write(folder / name / "config.json", config)
        save_file(keys, folder / name / f"model{SUFFIX}")
        return folder / name

    def t5(name: str, **fields: Any) -> Path:
        block = "encoder.block.0.layer.{}.weight"
        keys = {"shared.weight": torch.zeros(8, 4), block.format("0.SelfAttention.q"): torch.zeros(4, 4)}
        write(folder / name / "config.json", json.dumps({"d_model": 4, "vocab_size": 8, **fields}))
        save_file(keys, folder / name / f"model{SUFFIX}")
        return folder / name

    pickled = folder / "pickled"
    write(pickled / "diffusion_pytorch_model.bin", trap.torch_zip)
    write(pickled / "config.json", json.dumps({"_class_name": "Evil", "auto_map": {"AutoModel": "evil.Evil"}}))
    write(pickled / "evil.py", trap.python)
    honest = mmdit.save_vae(mmdit.load_vae("tiny"), folder / f"honest{SUFFIX}")
    own = {"latent_channels": 4, "scale": 1.0}

    def vae(name: str, config: Any) -> Case:
        path = folder / f"{name}{SUFFIX}"
        save_file(load_file(honest), path, {"config": config if isinstance(config, str) else json.dumps(own | config)})
        return Case(lambda: mmdit.load_vae(path), (path.name,))

    hole(folder / "hole" / f"model{SUFFIX}.index.json", 8 * GIB)
    scheduler = write(folder / "scheduled" / "scheduler" / "scheduler_config.json", "[" * 200_000)
    up = {"weight_map": {"x": "../../../../etc/passwd"}}
    return {
        "pickles and code in a diffusers folder": Case(lambda: mmdit.load_denoiser(pickled), ("pickle", ".bin")),
        "an index that leads out of the folder": _open(index("up", up), "../"),
        "an index with an absolute path": _open(index("root", {"weight_map": {"x": f"/etc/x{SUFFIX}"}}), "/etc/x"),
        "an index of brackets": _open(index("deep", "[" * 1_000_000), "index.json"),
        "an index of 8 GB of holes": _open(folder / "hole" / f"model{SUFFIX}.index.json", "index.json"),
        "an index that is a list of lists": _open(index("list", {"weight_map": {"x": ["../a"]}}), "weight_map"),
        "a config of brackets": Case(
            partial(mmdit.load_text_encoders, text("brackets", "[" * 1_000_000)), ("config.json",)
        ),
        "a config of 8 GB of holes": Case(
            partial(mmdit.load_text_encoders, hole(text("hollow", "{}") / "config.json", 8 * GIB).parent),
            ("config.json",),
        ),
        "a CLIP of 10^9 layers": Case(
            partial(mmdit.load_text_encoders, text("layers", '{"num_hidden_layers": 1000000000, "hidden_size": 768}')),
            ("layers",),
        ),
        "a T5 of 10^9 layers": Case(
            partial(mmdit.load_text_encoders, t5("t5-layers", num_layers=10**9, num_heads=1, d_kv=4)), ("t5-layers",)
        ),
        "a T5 of 10^15 hidden units": Case(
            partial(mmdit.load_text_encoders, t5("t5-wide", d_ff=10**15, num_layers=1, num_heads=1, d_kv=4)),
            ("t5-wide",),
        ),
        "a T5 whose width is a word": Case(
            partial(mmdit.load_text_encoders, t5("t5-word", d_ff="os.system", num_layers="all")), ("t5-word",)
        ),
        "a VAE whose header wants 10^11 blocks": vae(
            "vae", {"block_channels": [32] * 100_000, "num_res_blocks": 10**6}
        ),
        "a VAE whose header wants 10^15 channels": vae("channels", {"block_channels": [10**15, 32]}),
        "a VAE whose header's config is brackets": vae("nested", '{"block_channels":' + "[" * 100_000),
        "a VAE whose header's config is of other types": vae("odd", {"block_channels": 3, "scale": "x"}),
        "a scheduler of brackets": Case(_scheduled(scheduler), ("scheduler_config.json",)),
        "a scheduler of 8 GB of holes": Case(
            _scheduled(hole(folder / "hollow2" / "scheduler" / "scheduler_config.json", 8 * GIB)),
            ("scheduler_config.json",),
        ),
    }  # fmt: skip


def _open(path: Path, *words: str) -> Case:
    from mmdit.weights.files import open_weights

    return Case(lambda: open_weights(path.parent), words)


def _scheduled(file: Path) -> Callable[[], object]:
    from mmdit.pipeline.stated import follow_stated
    from mmdit.releases import RELEASES

    return lambda: follow_stated(RELEASES["sd3"], file.parents[1], None)  # type: ignore[arg-type]


# --- checkpoints --------------------------------------------------------------------------------------------------


def checkpoints(folder: Path, trap: Trap) -> Cases:
    """Folders of checkpoints, their manifests made to fit where hashes would tell."""
    tables = {"model": {"weight": torch.ones(4, 4)}}
    config = load_config(None, {"name": "hostile"})

    def case(name: str, change: Callable[[Path], None], *words: str | None, fit: bool = True) -> Case:
        path = save_checkpoint(folder / name.replace(" ", "-"), 8, tables, {"step": 1}, config)
        change(path)
        if fit:
            files = sorted(p for p in path.iterdir() if p.suffix in (SUFFIX, ".json", ".yaml") and p.stem != "manifest")
            (path / "manifest.json").write_text(manifest_text({p.name: fingerprint(p) for p in files}))
        return Case(lambda: load_checkpoint(path), None if None in words else (path.name, *words), (CheckpointError,))

    def put(name: str, content: bytes | str) -> Callable[[Path], None]:
        return lambda path: write(path / name, content) and None

    def pickles(path: Path) -> None:
        for name in ("random_states_0.pkl", "optimizer.bin", "model.pt", "scheduler.bin"):
            write(path / name, trap.pickle)
        write(path / "custom_code.py", trap.python)

    def listed(name: str) -> Callable[[Path], None]:
        entry = {"size": 4, "sha256": "0" * 64}
        return lambda path: write(path / "manifest.json", manifest_text({name: entry})) and None

    def link(path: Path) -> None:
        (path / f"model{SUFFIX}").unlink()
        (path / f"model{SUFFIX}").symlink_to("/etc/passwd")

    def pipe(path: Path) -> None:
        (path / "manifest.json").unlink()
        os.mkfifo(path / "manifest.json")

    return {
        "pickles beside the weights": case("pickles", pickles, None),
        "a pickle for weights": case("pickle", put(f"model{SUFFIX}", trap.pickle)),
        "Python in the config": case("python", put("config.yaml", f"name: {trap.yaml}\n")),
        "a torch.save file for weights": case("torch", put(f"model{SUFFIX}", trap.torch_zip)),
        "a header of 2^63 bytes": case("header", put(f"model{SUFFIX}", (2**63).to_bytes(8, "little") + b"{}")),
        "a tensor of 4 TB": case("large", put(f"model{SUFFIX}", header({"x": tensor([2**40], 0, 2**42)}))),
        "a manifest that leads out": case("out", listed("../../../../../etc/passwd"), "passwd", fit=False),
        "a manifest with an absolute path": case("root", listed("/etc/passwd"), "passwd", fit=False),
        "a link out of the folder": case("link", link, fit=False),
        "a manifest that is a pipe": case("pipe", pipe, "manifest.json", fit=False),
        "a manifest of 8 GB of holes": case(
            "hole", lambda path: hole(path / "manifest.json", 8 * GIB) and None, "manifest.json", fit=False
        ),
        "a state of brackets": case("state", put("state.json", "[" * 1_000_000)),
        "a state of 64 MB": case(
            "big", put("state.json", b'{"step": [' + b"[]," * trap.many * 200 + b"[]]}"), "state.json"
        ),
        "a config of 20 MB": case("long", put("config.yaml", "name: x\n" + "# y\n" * trap.many * 50), "config.yaml"),
    }


# --- tokenizers ---------------------------------------------------------------------------------------------------


def tokenizers(folder: Path, trap: Trap) -> Cases:
    """Sentencepiece files, and tokenizer folders as transformers writes them."""
    from mmdit.encoders.tokenizers import TINY, ClipTokenizer, ReleasedT5Tokenizer, T5Tokenizer

    real = (TINY / "spiece.model").read_bytes()
    clip = folder / "clip"
    ClipTokenizer(cleaned=False).save(clip)
    honest = {file.name: file.read_bytes() for file in clip.iterdir()}

    def piece(name: str, content: bytes, reader: Any = T5Tokenizer) -> Case:
        path = write(folder / name / "spiece.model", content)
        return Case(lambda: reader(path), (name,))

    def of_clip(name: str, harmless: bool, **files: bytes | str) -> Case:
        for file, content in {**honest, **{key.replace("__", "."): value for key, value in files.items()}}.items():
            write(folder / name / file, content)

        def load() -> None:
            assert ClipTokenizer(folder / name)(["a photo of a cat"])[0][1] == 320

        return Case(load, None if harmless else (name,))

    def config(**fields: Any) -> str:
        return json.dumps(json.loads(honest["tokenizer_config.json"]) | fields)

    mapped = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil",
              "custom_pipelines": {"x": {"impl": "evil.Evil"}}}  # fmt: skip
    jinja = "{% for x in ().__class__.__base__.__subclasses__() %}{{ x('" + trap.shell + "') }}{% endfor %}"
    t5 = write(folder / "t5-json" / "tokenizer.json", "[" * 200_000)
    return {
        "code beside a tokenizer, named by its config": of_clip(
            "code", True, tokenizer_config__json=config(**mapped), evil__py=trap.python, chat_template__jinja=jinja
        ),
        "a pickle for spiece.model": piece("pickle", trap.pickle),
        "a pickle for tokenizer.json": of_clip("pickled", False, tokenizer__json=trap.pickle, vocab__json=trap.pickle),
        "a pickle for spiece.model, of a release": piece("pickle2", trap.pickle, ReleasedT5Tokenizer),
        "an spiece.model of 8 GB of holes": Case(
            partial(T5Tokenizer, hole(folder / "hole" / "spiece.model", 8 * GIB, real)), ("hole",)
        ),
        "an spiece.model of 8 GB of holes, of a release": Case(
            lambda: ReleasedT5Tokenizer(folder / "hole" / "spiece.model"), ("hole",)
        ),
        "an spiece.model cut in half": piece("half", real[: len(real) // 2]),
        "an spiece.model that claims 2^60 pieces": piece("claims", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x0f" + real),
        "an empty spiece.model": piece("empty", b""),
        "a tokenizer.json of brackets": of_clip("deep", False, tokenizer__json="[" * 200_000),
        "a tokenizer.json of brackets, of a T5": Case(lambda: ReleasedT5Tokenizer(t5), ("t5-json",)),
        "a tokenizer_config.json of brackets": of_clip("deep2", False, tokenizer_config__json="[" * 200_000),
        "a vocabulary of 2^62": of_clip("ids", False, vocab__json='{"a": 4611686018427387904}', tokenizer__json="{}"),
        "a tokenizer.json of 8 GB of holes": Case(
            partial(ClipTokenizer, hole(folder / "hole2" / "tokenizer.json", 8 * GIB).parent), ("hole2",)
        ),
    }  # fmt: skip
