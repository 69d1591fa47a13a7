"""Files of weights: read lazily and exactly, written all or nothing, and every bad one refused in words."""

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mmdit.weights.files import WeightsError, open_weights
from mmdit.weights.writing import Lazy, parse_size, write_weights

SCRIPTS = Path(__file__).parents[2] / "scripts"
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (5, 3), "b.bias": (7,), "c": (2, 1, 4), "scalar": (), "empty": (0, 3)}
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(start=0, stop=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_safetensors_writes_is_read_bit_for_bit(tmp_path, dtype):
    state = tensors(dtype)
    safetensors.torch.save_file(state, tmp_path / "m.safetensors", metadata={"made": "here"})
    files = open_weights(tmp_path / "m.safetensors")
    assert set(files.keys()) == set(state)
    assert files.metadata == {"made": "here"}
    for key, tensor in state.items():
        assert (files.shape(key), files.dtype(key)) == (tuple(tensor.shape), dtype)
        assert torch.equal(bits(files.read(key)), bits(tensor))


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reading_into_another_dtype_is_the_cast_of_torch(tmp_path, dtype, wanted, monkeypatch):
    monkeypatch.setattr("mmdit.weights.files._PIECE", 8)  # several pieces a tensor
    state = tensors(dtype)
    safetensors.torch.save_file(state, tmp_path / "m.safetensors")
    files = open_weights(tmp_path / "m.safetensors")
    for key, tensor in state.items():
        assert torch.equal(files.read(key, wanted), tensor.to(wanted))
        if tensor.ndim == 2 and tensor.numel():
            target = torch.empty(tensor.shape[::-1], dtype=wanted).T
            assert torch.equal(files.read_into(key, target), tensor.to(wanted))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_size", [None, 40, "0.05KB"])
def test_what_is_written_safetensors_reads_bit_for_bit(tmp_path, dtype, shard_size):
    state = {**tensors(dtype), "ids": torch.arange(3)}
    written = write_weights(state, tmp_path / "m.safetensors", shard_size=shard_size, metadata={"config": "{}"})
    parts = [file for file in written if file.suffix == ".safetensors"]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(file.name for file in written)
    back = {}
    for file in parts:
        part = safetensors.torch.load_file(file)
        with safetensors.safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt", "config": "{}"}
        assert len(part) == 1 or shard_size is None or sum(t.nbytes for t in part.values()) <= parse_size(shard_size)
        back.update(part)
    assert back.keys() == state.keys()
    assert all(torch.equal(bits(back[key]), bits(state[key])) for key in state)
    again = open_weights(tmp_path)
    assert all(torch.equal(bits(again.read(key)), bits(state[key])) for key in state)
    assert (len(parts) == 1) == (shard_size is None)


def test_shards_are_named_and_indexed_as_diffusers_does(tmp_path):
    state = {f"t{i}": torch.full((10,), float(i)) for i in range(3)}
    written = write_weights(state, tmp_path / "diffusion_pytorch_model.safetensors", shard_size=80)
    assert [file.name for file in written] == [
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00002-of-00002.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
    ]
    index = json.loads(written[-1].read_text())
    assert index["metadata"]["total_size"] == 120
    assert index["weight_map"]["t2"] == "diffusion_pytorch_model-00002-of-00002.safetensors"
    for path in (tmp_path, written[-1]):
        assert open_weights(path).read("t2").tolist() == [2.0] * 10
    written[-1].unlink()
    assert open_weights(tmp_path).read("t2").tolist() == [2.0] * 10  # whole without its index, too


def test_writing_again_under_the_same_name_leaves_one_set(tmp_path):
    state = {f"t{i}": torch.full((10,), float(i)) for i in range(3)}
    (tmp_path / "mine.safetensors").write_bytes(b"untouched")
    write_weights(state, tmp_path / "model.safetensors", shard_size=40)
    write_weights(state, tmp_path / "model.safetensors")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.safetensors", "model.safetensors"]
    write_weights(state, tmp_path / "model.safetensors", shard_size=80)
    assert len(list(tmp_path.glob("model-*"))) == 2
    assert not (tmp_path / "model.safetensors").exists()


def test_an_interrupted_save_leaves_what_was_there(tmp_path):
    write_weights({"a": torch.zeros(3)}, tmp_path / "m.safetensors")

    def fail():
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_weights({"a": torch.ones(3), "b": Lazy((2,), torch.float32, fail)}, tmp_path / "m.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]
    assert open_weights(tmp_path / "m.safetensors").read("a").tolist() == [0.0] * 3


def test_lazy_tensors_are_made_one_at_a_time(tmp_path):
    alive, most = [], []

    def make(value):
        alive.append(1)
        most.append(len(alive))
        tensor = torch.full((4,), float(value))
        alive.pop()
        return tensor

    lazy = {f"t{i}": Lazy((4,), torch.float32, lambda i=i: make(i)) for i in range(5)}
    write_weights(lazy, tmp_path / "m.safetensors", dtype=torch.bfloat16)
    files = open_weights(tmp_path / "m.safetensors")
    assert max(most) == 1
    assert [files.read(f"t{i}", torch.float32)[0].item() for i in range(5)] == [0, 1, 2, 3, 4]
    assert files.dtype("t0") == torch.bfloat16


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("2GiB", 2**31), ("1.5 mb", 1_500_000), (7, 7), ("7", 7)]
)
def test_shard_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-1GB", "0"])
def test_other_shard_sizes_are_refused(text):
    with pytest.raises(WeightsError, match="shard size"):
        parse_size(text)


BAD = {
    "empty": (b"", "0 bytes"),
    "short": (b"abc", "3 bytes"),
    "html": (b"<!DOCTYPE html><html><body>Sign in", "web page"),
    "html with a space": (b"\n\n  <HTML>", "web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", "git lfs pull"),
    "zip pickle": (b"PK\x03\x04" + b"\0" * 80, "pickle"),
    "old pickle": (b"\x80\x02}q\x00X" + b"\0" * 80, "pickle"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 80, "GGUF"),
    "bomb": (struct.pack("<Q", 2**62) + b'{"a":', "claims a header"),
    "header larger than file": (struct.pack("<Q", 5000) + b'{"a":', "cut off"),
    "json": (b'{"error":"Repository not found"}', "not a safetensors file"),
    "no json": (struct.pack("<Q", 8) + b'{"a": 1,', "damaged header"),
    "list": (struct.pack("<Q", 8) + b"[1, 2, 3", "not a safetensors file"),
    "deep": (struct.pack("<Q", 150_000) + b'{"a":' + b"[" * 149_995, "damaged header"),
    "many": (struct.pack("<Q", 400_000) + b'{"a":' + b"[" * 399_995, "more than 100,000 tensors"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_words_and_at_once(tmp_path, name):
    content, words = BAD[name]
    file = tmp_path / "m.safetensors"
    file.write_bytes(content)
    start = time.process_time()
    with pytest.raises(WeightsError, match=words) as caught:
        open_weights(file)
    assert time.process_time() - start < 2
    assert str(file) in str(caught.value)


HEADERS = {
    "overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "overlaps"),
    "hole": ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "4 bytes unused"),
    "cut off": ({"a": entry(0, 4000, (1000,))}, 100, "cut off"),
    "too long": ({"a": entry(0, 4)}, 40, "36 bytes more"),
    "short offsets": ({"a": entry(0, 2)}, 2, "occupies"),
    "negative": ({"a": entry(-4, 0)}, 4, "bytes -4 to 0"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, 4, "without dtype"),
    "huge shape": ({"a": entry(0, 4, (2**62, 2**62))}, 4, "occupies"),
    "shape of floats": ({"a": entry(0, 4, (1.0,))}, 4, "shape"),
    "odd dtype": ({"a": entry(0, 1, (1,), "F4")}, 1, "'F4'"),
    "not a table": ({"a": 3}, 4, "without dtype"),
    "dtype no name": ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, 4, "holds 'a' as"),
    "metadata": ({"__metadata__": {"a": 1}}, 0, "table of strings"),
    "twice": (b'{"a":%s,"a":%s}' % ((b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}',) * 2), 0, "twice"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused(tmp_path, name):
    header, size, words = HEADERS[name]
    with pytest.raises(WeightsError, match=words):
        open_weights(raw(tmp_path / "m.safetensors", header, b"\0" * size))


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_begins_like_a_pickle_is_read(tmp_path, length):
    text = json.dumps({"a": entry()}).encode()
    file = raw(tmp_path / "m.safetensors", text + b" " * (length - len(text)), struct.pack("<f", 2.5))
    assert open_weights(file).read("a").tolist() == [2.5]


@pytest.mark.parametrize("name", ["v1-5-pruned.ckpt", "model.pt", "pytorch_model.bin", "folder"])
def test_a_pickle_is_never_opened(tmp_path, name):
    file = tmp_path / name
    if name == "folder":
        file.mkdir()
        (file / "diffusion_pytorch_model.bin").write_bytes(b"x")
    else:
        file.write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"any code.*safetensors\.torch\.save_file"):
        open_weights(file)


def test_half_a_shard_set_is_refused(tmp_path):
    state = {f"t{i}": torch.zeros(10) for i in range(3)}
    first, second, index = write_weights(state, tmp_path / "model.safetensors", shard_size=80)
    with pytest.raises(WeightsError, match="part 1 of 2"):
        open_weights(first)
    second.unlink()
    for path in (tmp_path, index):
        with pytest.raises(FileNotFoundError, match=r"lacks 1 of the 2 parts.*model-00002-of-00002"):
            open_weights(path)
    index.unlink()
    with pytest.raises(FileNotFoundError, match="1 of the 2 parts of model; missing: part 2"):
        open_weights(tmp_path)


def test_an_index_that_does_not_fit_its_parts_is_refused(tmp_path):
    state = {f"t{i}": torch.zeros(10) for i in range(3)}
    *_, index = write_weights(state, tmp_path / "model.safetensors", shard_size=80)
    tree = json.loads(index.read_text())
    index.write_text(json.dumps({**tree, "weight_map": {**tree["weight_map"], "ghost": "../../etc/x.safetensors"}}))
    with pytest.raises(WeightsError, match="beside the index"):
        open_weights(index)
    moved = {**tree["weight_map"], "t0": tree["weight_map"]["t2"]}
    index.write_text(json.dumps({**tree, "weight_map": moved}))
    with pytest.raises(WeightsError, match="do not belong together"):
        open_weights(index)
    index.write_text("{")
    with pytest.raises(WeightsError, match="not JSON"):
        open_weights(index)


def test_folders_are_searched_as_diffusers_lays_them_out(tmp_path):
    for part in ("transformer", "vae"):
        write_weights({part: torch.zeros(1)}, tmp_path / part / "diffusion_pytorch_model.safetensors")
        write_weights({part: torch.zeros(1)}, tmp_path / part / "diffusion_pytorch_model.fp16.safetensors")
    (tmp_path / "vae" / "config.json").write_text('{"latent_channels": 16}')
    assert open_weights(tmp_path, ("transformer", "unet")).keys() == ["transformer"]
    assert open_weights(tmp_path, ("vae",)).config == {"latent_channels": 16}
    assert open_weights(tmp_path / "transformer").config is None
    with pytest.raises(FileNotFoundError, match="its folders transformer, vae do"):
        open_weights(tmp_path)
    for name in ("one", "two"):
        write_weights({name: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    assert open_weights(tmp_path, ("transformer",)).keys() == ["transformer"]
    with pytest.raises(WeightsError, match=r"2 sets of weights \(one, two\)"):
        open_weights(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    assert open_weights(tmp_path, ("vae",)).keys() == ["one"]
    (tmp_path / "model_index.json").write_text("{}")
    assert open_weights(tmp_path, ("vae",)).keys() == ["vae"]


def test_what_is_not_there_is_named_with_its_neighbour(tmp_path):
    file = tmp_path / "sd3_medium.safetensors"
    write_weights(tensors(), file)
    with pytest.raises(FileNotFoundError, match=r"did you mean .*sd3_medium\.safetensors"):
        open_weights(tmp_path / "sd3_medum.safetensors")
    with pytest.raises(WeightsError, match=r"did you mean 'a\.weight'"):
        open_weights(file).read("a.weigth")
    with pytest.raises(WeightsError, match=r"\[5, 3\].*expected \[3, 5\]"):
        open_weights(file).read_into("a.weight", torch.empty(3, 5))


def test_scaled_fp8_is_refused_and_only_where_it_is_scaled(tmp_path):
    weight = torch.randn(4, 4).to(torch.float8_e4m3fn)
    state = {
        "a.weight": weight,
        "a.scale_weight": torch.ones(()),
        "b.weight": weight.clone(),
        "c.weight": torch.ones(2),
    }
    write_weights(state, tmp_path / "m.safetensors")
    files = open_weights(tmp_path / "m.safetensors")
    with pytest.raises(WeightsError, match="scaled fp8"):
        files.read("a.weight", torch.float32)
    assert torch.equal(files.read("b.weight", torch.float32), weight.float())
    assert files.read("c.weight").tolist() == [1, 1]


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path):
    write_weights({"a": torch.zeros(1000)}, tmp_path / "m.safetensors")
    files = open_weights(tmp_path / "m.safetensors")
    os.truncate(tmp_path / "m.safetensors", 500)
    with pytest.raises(WeightsError, match="shorter"):
        files.read("a")


@pytest.mark.parametrize("script", ["sample.py --prompt x --weights", "convert.py --inspect"])
def test_scripts_refuse_a_file_that_is_none_before_they_wait_for_torch(tmp_path, script):
    page, pickled = tmp_path / "page.safetensors", tmp_path / "model.ckpt"
    page.write_text("<!doctype html><title>accept the licence</title>")
    pickled.write_bytes(b"PK\x03\x04")
    script, *rest = script.split()
    for file, words in ((page, "web page"), (pickled, "pickle")):
        code = f"import runpy, sys; sys.argv = {[script, *rest, str(file)]!r}\n"
        code += f"try: runpy.run_path({str(SCRIPTS / script)!r}, run_name='__main__')\n"
        code += "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert words in done.stderr
        assert done.stdout.split() == ["2", "False"]
