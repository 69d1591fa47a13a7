"""Hostile arrays, caches, shards, pictures and configs for F4."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.hostile_cases import (
    GIB,
    Case,
    Trap,
    apart,
    chunk,
    hole,
    npy,
    npy_header,
    npz_bomb,
    packed_zeros,
    padded,
    png,
    tar,
    tar_head,
    write,
    zipped,
)

Cases = dict[str, Case]


def archives(folder: Path, trap: Trap) -> Cases:
    """Statistics (.npz of mu and sigma) and arrays of pictures, for the distances."""
    from mmdit_eval.image_sets import open_images
    from mmdit_eval.moments import Moments
    from mmdit_eval.set_comparison import is_statistics

    extractor = {"name": "tiny_clip"}
    good = {"mu.npy": npy(np.zeros(2)), "sigma.npy": npy(np.eye(2))}

    def npz(name: str, **members: bytes) -> Case:
        return stored(write(folder / name, zipped({**good, **{f"{key}.npy": v for key, v in members.items()}})))

    def stored(path: Path) -> Case:
        return Case(lambda: Moments.load(path, extractor) if is_statistics(path) else open_images(path), (path.name,))

    def pictured(path: Path) -> Case:
        return Case(lambda: open_images(path), (path.name,))

    def claims(shape: tuple[int, ...]) -> bytes:
        return npy_header({"descr": "<f8", "fortran_order": False, "shape": shape}) + bytes(64)

    locked = bytearray(zipped(good))
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        locked[locked.index(mark) + place] |= 1  # encrypted
    strange = bytearray(zipped(good))
    for mark, place in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        strange[strange.index(mark) + place] = 97  # a method nobody has
    up = zipped({"../../mu.npy": good["mu.npy"], "/etc/sigma.npy": good["sigma.npy"]})
    mean = {"mu": good["mu.npy"]}
    zeros = {"mu": good["mu.npy"], "sigma": good["sigma.npy"]}
    return {
        "objects for mu": npz("a.npz", mu=trap.npy),
        "a bomb for sigma": stored(npz_bomb(folder / "b.npz", "sigma", "<f8", (trap.bomb // 2**13, 2**10), mean)),
        "objects as pictures": pictured(write(folder / "c.npy", trap.npy)),
        "a bomb for features": stored(npz_bomb(folder / "d.npz", "features", "|u1", (2, trap.bomb // 2), zeros)),
        "objects as pictures, in an .npz": pictured(write(folder / "e.npz", zipped({"arr_0.npy": trap.npy}))),
        "a bomb as pictures": pictured(npz_bomb(folder / "f.npz", "arr_0", "|u1", (trap.bomb // 3 >> 20, 2**20, 3))),
        "objects for the extractor": npz("g.npz", extractor=trap.npy),
        "a bomb for the extractor": stored(npz_bomb(folder / "h.npz", "extractor", f"<U{trap.bomb // 4}", (1,), zeros)),
        "a mean of 4 TB": npz("i.npz", mu=claims((2**39,))),
        "a mean of 2^70": npz("j.npz", mu=claims((2**35, 2**35))),
        "a mean of less than nothing": npz("k.npz", mu=claims((-(2**40),))),
        "features of a width of 10^5": stored(npz_bomb(folder / "l.npz", "features", "<f4", (2, 100_000), zeros)),
        "statistics of a width of 10^5, without a bomb": npz("m.npz", mu=npy(np.zeros(100_000))),
        "code in an array's head": npz("n.npz", mu=npy_header(f"__import__('os').system({trap.shell!r})")),
        "brackets in an array's head": npz("o.npz", mu=npy_header("(" * 9_000)),
        "brackets for the extractor": npz("p.npz", extractor=npy(np.array("[" * 100_000))),
        "a list for the extractor": npz("q.npz", extractor=npy(np.array("[1]"))),
        "a count that is none": npz("r.npz", count=npy(np.array("many"))),
        "locked members": stored(write(folder / "s.npz", bytes(locked))),
        "members packed as nobody packs": stored(write(folder / "t.npz", bytes(strange))),
        "members that lead out of the folder": stored(write(folder / "u.npz", up)),
        "60,000 members": Case(
            partial(Moments.load, write(folder / "v.npz", zipped({**good, **{f"x{i}": b"" for i in range(60_000)}}))),
            None,
        ),
        "a pickle": stored(write(folder / "w.npz", trap.pickle)),
        "a zip cut in half": stored(write(folder / "x.npz", zipped(good)[:400])),
        "an array of 8 GB of holes": pictured(
            hole(folder / "y.npy", 8 * GIB, npy_header({"descr": "|u1", "fortran_order": False, "shape": (2**33,)}))
        ),
    }  # fmt: skip


# --- caches -------------------------------------------------------------------------------------------------------


def caches(folder: Path, trap: Trap) -> Cases:
    """A cache that somebody else has made: whatever it holds, what is read are the numbers that were encoded."""
    from mmdit.data import parts

    honest = np.arange(12, dtype=np.float16).reshape(4, 3)

    def encode(rows: np.ndarray) -> dict[str, np.ndarray]:
        return {"latents": honest[rows]}

    def case(name: str, content: bytes | None = None, record: Any = None) -> Case:
        place = folder / name.replace(" ", "-")
        parts.build(place, {"k": 1}, 4, 4, encode, say=lambda line: None)
        if content is not None:
            write(place / "00000.latents.npy", content)
            entry = (len(content), hashlib.sha256(content).hexdigest())
            write(place / "00000.json", json.dumps({"files": {"00000.latents.npy": entry}}))
        if record is not None:
            write(place / "00000.json", record if isinstance(record, str) else json.dumps(record))

        def load() -> None:
            rows = parts.build(place, {"k": 1}, 4, 4, encode, say=lambda line: None)
            assert np.array_equal(rows.take("latents", np.arange(4)), honest)

        return Case(load, None)

    def claims(shape: tuple[int, ...], descr: str = "<f2") -> bytes:
        return npy_header({"descr": descr, "fortran_order": False, "shape": shape})

    secret = write(folder / "secret.npy", npy(honest * 0))
    entry = (secret.stat().st_size, hashlib.sha256(secret.read_bytes()).hexdigest())
    linked = case("linked")
    (folder / "linked" / "00000.latents.npy").unlink()
    (folder / "linked" / "00000.latents.npy").symlink_to("/dev/zero")
    piped = case("piped")
    (folder / "piped" / "00000.json").unlink()
    os.mkfifo(folder / "piped" / "00000.json")
    holes = case("holes")
    hole(folder / "holes" / "00000.json", 8 * GIB)
    return {
        "objects": case("objects", trap.npy),
        "a record that leads out of the folder": case("out", None, {"files": {"../secret.npy": entry}}),
        "a record of brackets": case("deep", None, "[" * 1_000_000),
        "an array of 4 TB": case("large", claims((2**41,))),
        "an array of fewer rows": case("rows", npy(honest[:1])),
        "code in an array's head": case("code", npy_header(f"__import__('os').system({trap.shell!r})")),
        "a record of another array alone": case(
            "other", None, {"files": {str(secret): entry}}
        ),
        "a record of nothing": case("nothing", None, {"files": {}}),
        "an array that is a link to /dev/zero": linked,
        "a record that is a pipe": piped,
        "a record of 8 GB of holes": holes,
        "a pickle": case("pickle", trap.pickle),
        "links in the places of new files": _elsewhere(folder, case("links")),
    }  # fmt: skip


def _elsewhere(folder: Path, case: Case) -> Case:
    """Put links that lead to a file of the user's where a cache is written, and look at that file afterwards."""
    mine = write(folder / "mine", "mine")
    place = folder / "links"
    (place / "00000.json").unlink()
    for name in (".lock", ".lock-00000", ".parts.json.tmp", "..parts.json.tmp", ".00000.latents.npy.tmp",
                 ".00000.json.tmp", "00000.json", "parts.json"):  # fmt: skip
        (place / name).unlink(missing_ok=True)
        (place / name).symlink_to(mine)

    def load() -> None:
        case.load()
        assert mine.read_text() == "mine"

    return Case(load, None)


# --- shards -------------------------------------------------------------------------------------------------------


def shards(folder: Path, trap: Trap) -> Cases:
    """Tar and parquet shards."""
    from mmdit.config import ShardsConfig
    from mmdit.data.shards import ShardsDataset, _units

    def opened(path: Path) -> None:
        _units.cache_clear()
        data = ShardsDataset(ShardsConfig(source=str(path), resolution=8, val_fraction=0.0, lanes=1))
        assert data.captions(range(len(data))) == ["one"] * len(data)
        assert (data.pixels(range(len(data))) == 77).all()
        assert not (folder.parent / "escaped.png").exists()

    def case(name: str, content: bytes, *words: str | None) -> Case:
        path = write(folder / name.partition(".")[0] / name, content)
        return Case(lambda: opened(path), None if None in words else (name, *words))

    picture, pair = png(), (("good.png", png()), ("good.txt", b"one"))
    end = bytes(1024)

    def info(name: str, kind: bytes, target: str = "", size: int = 0) -> tuple[tarfile.TarInfo, bytes]:
        found = tarfile.TarInfo(name)
        found.type, found.linkname, found.size = kind, target, size
        return found, b""

    body = b"".join(tar_head(name, b"%011o\0" % len(data)) + padded(data) for name, data in pair)

    def pax(record: bytes, kind: bytes = b"x") -> bytes:
        return tar_head("pax", b"%011o\0" % len(record), kind) + padded(record)

    def binary(times: int) -> bytes:  # so many times 4 GB
        return b"\x80" + (times << 32).to_bytes(11, "big")

    def line(key: str, value: str) -> bytes:
        text = f" {key}={value}\n"
        length = len(text) + len(str(len(text) + len(str(len(text)))))
        return f"{length}{text}".encode()

    links = (info("a.png", tarfile.SYMTYPE, "/etc/passwd"), info("a.txt", tarfile.LNKTYPE, "/etc/passwd"),
             info("b.png", tarfile.CHRTYPE), info("c.png", tarfile.FIFOTYPE),
             info("d.png", tarfile.DIRTYPE))  # fmt: skip
    hollow = write(folder / "hollow" / "hollow.tar", b"")
    size = 3 * GIB
    with hollow.open("r+b") as file:  # a caption of 3 GB of holes
        file.write(
            tar_head("x.png", b"%011o\0" % len(picture)) + padded(picture) + tar_head("x.txt", b"%011o\0" % size)
        )
        file.truncate(file.tell() + size + 1024)
    index = write(folder / "indexed" / "indexed.tar", tar(*pair))
    npz_bomb(folder / "indexed" / "indexed.tar.index.npz", "keys", f"<U{trap.bomb // 4}", (1,))
    objects = write(folder / "objects" / "objects.tar", tar(*pair))
    write(folder / "objects" / "objects.tar.index.npz", zipped({"keys.npy": trap.npy, "stamp.npy": trap.npy}))
    (folder / "pipes").mkdir()
    os.mkfifo(folder / "pipes" / "pipe.tar")
    (folder / "pipes" / "zero.parquet").symlink_to("/dev/zero")
    return {
        "names that lead out of the folder": case(
            "names.tar", tar(("../../escaped.png", picture), ("../../escaped.txt", b"one"), ("/etc/x.png", picture),
                             ("/etc/x.txt", b"one")), None,
        ),
        "a member of a negative size": case("negative.tar", tar_head("a.png", b"\xff" * 10 + b"\xfe\x00") + body + end),
        "a parquet bomb": Case(partial(opened, _parquet(folder / "bomb", trap)), ("bomb.parquet",)),
        "links, pipes and devices": case("links.tar", tar(*links, *pair), None),
        "a parquet whose type is a pickle": Case(
            partial(opened, _parquet(folder / "typed", trap, trap.pickle)), None
        ),
        "a member of 10^30 bytes": case("vast.tar", pax(line("size", "9" * 30)) + body + end),
        "a member of 8 GB that is not there": case("absent.tar", tar_head("a.png", binary(2))),
        "a head of 4 GB": case("head.tar", tar_head("a", binary(1), b"x") + body + end),
        "a name of 4 GB": case("long.tar", tar_head("a", binary(1), b"L") + body + end),
        "5,000 heads in each other": case("nested.tar", pax(line("path", "good.png")) * 5_000 + body + end, None),
        "a head of digits": case("digits.tar", pax(b"1" * 1_000_000) + body + end),
        "a sparse member of 1 TB": case(
            "sparse.tar", pax(line("GNU.sparse.major", "1") + line("GNU.sparse.realsize", str(2**40))) + body + end,
        ),
        "a caption of 3 GB of holes": Case(lambda: opened(hollow), ("hollow.tar",)),
        "a zipped tar": case("zipped.tar", zipped({"a.png": picture}, zipfile.ZIP_DEFLATED)),
        "an index beside it that is a bomb": Case(lambda: opened(index), None),
        "an index beside it of objects": Case(lambda: opened(objects), None),
        "pipes and devices for shards": Case(lambda: opened(folder / "pipes"), ("pipes",)),
        "a parquet of one value two thousand times": Case(partial(opened, _repeated(folder)), ("repeated.parquet",)),
        "a parquet with a foot of 2 GB": case("foot.parquet", b"PAR1" + struct.pack("<I", 2**31 - 1) + b"PAR1"),
        "a caption of brackets": case("deep.tar", tar(("a.png", picture), ("a.json", b"[" * 100_000)), "a"),
    }  # fmt: skip


def _parquet(folder: Path, trap: Trap, pickled: bytes | None = None) -> Path:
    """Write a parquet of one good row and a bomb; or one whose type is a pickle, as old readers ran it."""
    path = write(folder / f"{folder.name}.parquet", b"")
    apart(lambda: _write_parquet(path, trap.bomb, pickled))
    return path


def _write_parquet(path: Path, bomb: int, pickled: bytes | None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [png()] if pickled is not None else [png(), *[bytes(bomb >> 4)] * 16]
    kind = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickled or b""}
    schema = pa.schema(
        [pa.field("image", pa.binary(), metadata=kind if pickled else None), pa.field("text", pa.string())]
    )
    table = pa.table([pa.array(images, pa.binary()), pa.array(["one"] * len(images))], schema=schema)
    pq.write_table(table, path, compression="zstd", use_dictionary=False)


def _repeated(folder: Path) -> Path:
    """Write a parquet of one picture of 1 MiB, in a dictionary, and two thousand numbers of it."""
    path = write(folder / "repeated" / "repeated.parquet", b"")
    apart(lambda: _write_repeated(path))
    return path


def _write_repeated(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # 2 GB in half a kilobyte, and no schema that says it is a dictionary
    values = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2000, np.int32)), pa.array([png() + bytes(1 << 20)]))
    pq.write_table(pa.table({"image": values, "text": pa.array(["one"] * 2000)}), path, compression="zstd",
                   dictionary_pagesize_limit=1 << 30, store_schema=False)  # fmt: skip


# --- pictures -----------------------------------------------------------------------------------------------------


def pictures(folder: Path, trap: Trap) -> Cases:
    """Folders and tables of pictures, and pictures themselves."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from mmdit.config import ImagesConfig
    from mmdit.data.images import ImagesDataset, _check, decode

    def opened(place: Path) -> None:
        _check.cache_clear()
        data = ImagesDataset(ImagesConfig(source=str(place), resolution=8, val_fraction=0.0))
        assert (data.pixels(range(len(data))) == 77).all()

    def place(name: str, **files: bytes | str) -> Path:
        for file, content in {
            "good.png": png(),
            "good.txt": "one",
            **{k.replace("__", "."): v for k, v in files.items()},
        }.items():
            write(folder / name / file, content)
        return folder / name

    def bad(name: str, change: Callable[[Path], object], *words: str) -> Case:
        there = place(name, bad__txt="one")
        change(there)
        return Case(lambda: opened(there), ("bad", *words))

    def table(name: str, cell: Any) -> Path:
        path = write(folder / f"{name}.parquet", b"")
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        pq.write_table(pa.table({"image": pa.array([cell], kind), "text": ["one"]}), path)
        return path

    def file(name: str, content: bytes) -> Case:
        def load() -> None:
            try:
                decode(content)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

        return Case(load, (name,))

    listed = place("listed", metadata__jsonl=json.dumps({"file_name": "../../../../../../etc/passwd", "text": "one"}))
    packed = packed_zeros(trap.bomb)
    tiff = b"II*\0\x08\0\0\0" + b"\xff\xff" + b"\xff" * 100
    loop = struct.pack("<2sHIHHHIIHHIII", b"II", 42, 8, 2, 256, 4, 1, 9, 257, 4, 1, 9, 8)
    return {
        "code beside pictures": Case(
            partial(opened, place("code", code__py=trap.python, dataset_infos__json="{}")), None
        ),
        "a picture that is a pipe": bad("pipe", lambda p: os.mkfifo(p / "bad.png")),
        "a picture that is a link to /dev/zero": bad("zero", lambda p: (p / "bad.png").symlink_to("/dev/zero")),
        "a picture of 8 GB of holes": bad("hole", lambda p: hole(p / "bad.png", 8 * GIB)),
        "a caption of 8 GB of holes": bad(
            "caption", lambda p: (write(p / "bad.png", png()), hole(p / "bad.txt", 8 * GIB))
        ),
        "a link to a file of the system": bad("passwd", lambda p: (p / "bad.png").symlink_to("/etc/passwd"), "not a"),
        "names in metadata that lead out": Case(lambda: opened(listed), ("listed",)),
        "metadata of brackets": Case(
            partial(opened, place("deep", metadata__jsonl="[" * 100_000)), ("deep",)
        ),
        "a path in a table that leads to /dev/zero": Case(
            partial(opened, table("device", {"bytes": None, "path": "/dev/zero"})), ("device.parquet", "zero")
        ),
        "a path in a table that leads out": Case(
            partial(opened, table("out", {"bytes": None, "path": "../../../../../etc/passwd"})), ("out.parquet",)
        ),
        "a parquet bomb": Case(partial(opened, _parquet(folder / "bomb", trap)), ("bomb.parquet",)),
        "a parquet of one value two thousand times": Case(partial(opened, _repeated(folder)), ("repeated.parquet",)),
        "a program in PostScript": file(
            "eps", f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%{trap.shell}) (w) file\n".encode()
        ),
        "a profile of 1 GiB": file("iccp", png(None, chunk(b"iCCP", b"x\0\0" + packed))),
        "a comment of 1 GiB": file("ztxt", png(None, chunk(b"zTXt", b"x\0\0" + packed))),
        "an international comment of 1 GiB": file("itxt", png(None, chunk(b"iTXt", b"x\0\1\0\0\0" + packed))),
        "10^9 pixels": file("wide", b"P6 50000 20000 255\n"),
        "a GIF of 65535 x 65535": file(
            "gif", b"GIF89a\xff\xff\xff\xff\x80" + bytes(8) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02L\x01\0;"
        ),
        "a TIFF of 65535 tags": file("tiff", tiff),
        "a TIFF that goes round": file("loop", loop),
        "a BMP of 2^31 rows": file(
            "bmp", b"BM" + struct.pack("<IHHIIiiHHIIiiII", 70, 0, 0, 54, 40, 2**20, 1 - 2**31, 1, 24, *[0] * 6) + png()
        ),
        "an SVG that reads a file": file("svg", b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><svg>&e;</svg>'),
    }  # fmt: skip


# --- configs ------------------------------------------------------------------------------------------------------


def configs(folder: Path, trap: Trap) -> Cases:
    """YAML of runs, suites and studies, and overrides of the command line."""
    from mmdit.config import load_config, load_study, load_suite

    def case(name: str, text: str, load: Callable[[Path], object] = load_config, *words: str) -> Case:
        path = write(folder / f"{name}.yaml", text)
        return Case(lambda: load(path), words or (path.name,))

    def laughs(kind: str, opening: str) -> str:
        lines = [f"a0: &a0 {opening.format('x', 'x')}"]
        for i in range(1, 12):
            inner = ", ".join([f"*a{i - 1}"] * 9) if kind == "list" else ", ".join(f"k{j}: *a{i - 1}" for j in range(9))
            lines.append(f"a{i}: &a{i} " + (f"[{inner}]" if kind == "list" else f"{{{inner}}}"))
        return "\n".join(lines) + "\n"

    bomb, tables = laughs("list", "[{0}, {1}]"), laughs("mapping", "{{k0: {0}}}")
    base = write(folder / "below.yaml", tables + "train: {more_emas: *a11}\n")
    override = lambda text: lambda: load_config(None, ["--train.lr", text])  # noqa: E731
    return {
        "Python in a field": case("python", f"name: {trap.yaml}\n"),
        "Python in a study": case("study", f"name: x\nrows: {trap.yaml}\n", load_study),
        "lists that grow ninefold, eleven times": case("bomb", bomb),
        "Python in a suite": case("suite", f"name: {trap.yaml}\n", load_suite),
        "Python in an override": Case(override(trap.yaml), ("train.lr",)),
        "a new Python object": case("new", f"train: !!python/object/new:subprocess.Popen [[touch, {trap.canary}]]\n"),
        "a Python name": case("name", "name: !!python/name:os.system\n"),
        "lists that grow, in a field": case("field", bomb + "train: {sample_prompts: *a11}\n"),
        "lists that grow, for a number": case("number", bomb + "train: {lr: *a11}\n"),
        "tables that grow, in a field": case("tables", tables + "train: *a11\n"),
        "tables that grow, merged": case("merge", tables + "train: {<<: *a11}\n"),
        "tables that grow, in a base": case("over", f"base: {base.name}\ntrain: {{}}\n", load_config, base.name),
        "tables that grow, in a suite": case("suite2", tables + "metrics: *a11\n", load_suite),
        "tables that grow, in a study": case("study2", tables + "rows: *a11\nfactorial: *a11\n", load_study),
        "a table that holds itself": case("self", "train: &a {more_emas: *a}\n"),
        "a list that holds itself": case("self2", "train: {sample_prompts: &a [*a]}\n"),
        "brackets": case("deep", "[" * 100_000),
        "braces": case("braces", "name: " + "{a: " * 20_000),
        "a day that is none": case("day", "name: 2024-99-99\n"),
        "a number that is none": case("float", "train: {lr: !!float x}\n"),
        "a key that is a list": case("key", "? [a]\n: b\n"),
        "a key that is a table": case("key2", "{{a: b}: c}\n"),
        "a number of 250,000 digits": case("digits", "train: {images: " + "1" * 250_000 + "}\n"),
        "a number in sixties": case("sixties", "train: {images: 1" + ":59" * 80_000 + "}\n"),
        "a base that is a list": case("base", "base: [a, b]\n"),
        "a base that is a device": case("base2", "base: /dev/zero\n", load_config, "/dev/zero"),
        "a file of 8 GB of holes": Case(partial(load_config, hole(folder / "hole.yaml", 8 * GIB)), ("hole.yaml",)),
        "20 MB of notes": case("notes", "name: x\n" + "# y\n" * trap.many * 50),
        "10,000 fields that there are not": case("fields", "".join(f"field{i}: 1\n" for i in range(10_000))),
        "a field of 200,000 characters": case("letters", "train: {? " + "a" * 200_000 + " : 1}\n"),
        "brackets in an override": Case(override("[" * 5_000), ("train.lr",)),
        "a day that is none in an override": Case(override("2024-99-99"), ("train.lr",)),
    }  # fmt: skip
