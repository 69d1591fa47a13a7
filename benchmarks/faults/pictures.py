"""F10: pictures of every kind, and pictures with bytes changed: each is decoded right or left out with a reason."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.faults import Outcome

GIB = 2**30
Kind = tuple[bytes, str | Callable[[np.ndarray], bool]]  # the file; why it is left out, or what must hold


def run_pictures(folder: Path, full: bool) -> Outcome:
    """F10."""
    if full:
        _in_a_process(folder, _make_large, folder / "kinds")
    kinds = _in_a_process(folder, _try_kinds, folder / "kinds", full)
    mutated = _in_a_process(folder, _try_mutations, folder / "mutated", 1000 if full else 120)
    exact = _try_exact()
    deaths = sum(part.get("died", 0) for part in (kinds, mutated))
    peak = max(part.get("peak_gib", 0.0) - part.get("before_gib", 0.0) for part in (kinds, mutated))
    wrong = [*kinds.get("wrong", ()), *mutated.get("wrong", ()), *(name for name, good in exact.items() if not good)]
    return Outcome(
        not wrong and not deaths and peak < 1,
        f"{kinds.get('kinds')} kinds: {kinds.get('decoded')} decoded, {kinds.get('refused')} refused; "
        f"{mutated.get('files')} mutated files: {mutated.get('decoded')} decoded, {mutated.get('refused')} refused "
        f"with path and reason; {deaths} deaths, {len(wrong)} wrong; at most {peak:.2f} GiB more than "
        f"the {kinds.get('before_gib', 0):.2f} of torch; EXIF 1-8 and 16 bit exact",
        {"kinds": kinds, "mutated": mutated, "exact": exact, "wrong": wrong},
    )


def _in_a_process(folder: Path, work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Do something in a forked process, so that its death is a number and its memory its own."""
    answer = folder / f"{work.__name__}.json"
    process = os.fork()
    if process == 0:
        code = 1
        try:
            import mmdit.data.images  # noqa: F401 (what importing costs is no picture's)

            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            before = _peak()
            found = work(*arguments)
            found |= {"before_gib": round(before / GIB, 3), "peak_gib": round(_peak() / GIB, 3)}
            answer.write_text(json.dumps(found))
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(process, 0)
    if status or not answer.is_file():
        return {"died": 1, "status": status, "wrong": [f"{work.__name__} ended with status {status}"]}
    return json.loads(answer.read_text())


def _peak() -> int:
    """Return the most memory this process has held, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- kinds ------------------------------------------------------------------------------------------------------


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """Return a picture as a file of some format."""
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def noisy(width: int = 40, height: int = 30, channels: int = 3) -> np.ndarray:
    """Return uint8 [height, width, channels] with a gradient and noise."""
    values = np.random.default_rng(0).integers(0, 64, (height, width, channels))
    ramp = np.linspace(0, 190, width)[None, :, None]
    return (values + ramp).astype(np.uint8)


def _kinds() -> dict[str, Kind]:
    rgb = noisy()
    picture = Image.fromarray(rgb)
    grey = Image.fromarray(rgb[..., 0])
    alpha = Image.fromarray(np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)]))
    clear = Image.new("RGBA", (40, 30), (10, 20, 30, 0))
    wide = np.arange(1200, dtype=np.uint16).reshape(30, 40) * 54

    def equal(array: np.ndarray) -> bool:
        return np.array_equal(array, rgb)

    def white(array: np.ndarray) -> bool:
        return bool((array == 255).all())

    def near(array: np.ndarray) -> bool:
        return array.shape == rgb.shape and float(np.abs(array.astype(float) - rgb).mean()) < 25

    def grey_equal(array: np.ndarray) -> bool:
        return all(np.array_equal(array[..., c], rgb[..., 0]) for c in range(3))

    def sixteen(array: np.ndarray) -> bool:
        return np.array_equal(array[..., 1], np.rint(wide / 257).astype(np.uint8))

    def shape(array: np.ndarray) -> bool:
        return array.shape == (30, 40, 3)

    png, jpeg = encoded(picture, "PNG"), encoded(picture, "JPEG", quality=90)
    animation = {"save_all": True, "append_images": [Image.new("RGB", (40, 30), "red")]}
    kinds: dict[str, Kind] = {
        "png rgb": (png, equal),
        "png grey": (encoded(grey, "PNG"), grey_equal),
        "png 1 bit": (encoded(grey.convert("1"), "PNG"), lambda a: set(np.unique(a)) <= {0, 255}),
        "png palette": (encoded(picture.quantize(256), "PNG"), near),
        "png palette with transparency": (encoded(clear.quantize(8), "PNG", transparency=0), white),
        "png rgb with a transparent colour": (
            encoded(Image.new("RGB", (40, 30), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
            white,
        ),
        "png rgba opaque": (encoded(alpha, "PNG"), equal),
        "png rgba clear": (encoded(clear, "PNG"), white),
        "png grey with alpha": (encoded(clear.convert("LA"), "PNG"), white),
        "png 16 bit grey": (encoded(Image.fromarray(wide), "PNG"), sixteen),
        "png interlaced": (_interlaced(rgb), equal),
        "png of one pixel": (encoded(Image.new("RGB", (1, 1), "blue"), "PNG"), lambda a: a.tolist() == [[[0, 0, 255]]]),
        "png with a comment": (encoded(picture, "PNG", comment="x" * 1000), equal),
        "jpeg": (jpeg, near),
        "jpeg grey": (encoded(grey, "JPEG"), shape),
        "jpeg cmyk": (encoded(picture.convert("CMYK"), "JPEG", quality=95), near),
        "jpeg progressive": (encoded(picture, "JPEG", progressive=True), near),
        "jpeg 4:1:1": (encoded(picture, "JPEG", subsampling="4:1:1"), shape),
        "jpeg with a broken profile": (encoded(picture, "JPEG", icc_profile=b"not a profile"), shape),
        "jpeg with broken exif": (encoded(picture, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), shape),
        "webp": (encoded(picture, "WEBP"), shape),
        "webp lossless": (encoded(picture, "WEBP", lossless=True), equal),
        "webp with alpha": (encoded(clear, "WEBP", lossless=True), white),
        "webp animated": (encoded(picture, "WEBP", lossless=True, **animation), equal),
        "gif": (encoded(picture.quantize(256), "GIF"), near),
        "gif animated": (encoded(picture.quantize(256), "GIF", **animation), near),
        "gif transparent": (encoded(clear.quantize(4), "GIF", transparency=0), white),
        "bmp": (encoded(picture, "BMP"), equal),
        "tiff": (encoded(picture, "TIFF"), equal),
        "tiff compressed": (encoded(picture, "TIFF", compression="tiff_lzw"), equal),
        "tiff 16 bit grey": (encoded(Image.fromarray(wide), "TIFF"), sixteen),
        "tiff float": (encoded(Image.fromarray(wide.astype(np.float32)), "TIFF"), "known range"),
        "tiff of two pages": (encoded(picture, "TIFF", **animation), equal),
        "ppm": (encoded(picture, "PPM"), equal),
        "avif": (encoded(picture, "AVIF"), shape),
        "empty": (b"", "empty"),
        "a web page": (b"<!doctype html><title>404</title>", "not a picture"),
        "text": (b"a caption, not a picture\n" * 20, "not a picture"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "not a picture"),
        "eps, for which a program would be started": (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "not a pic",
        ),
        "png cut off": (png[: len(png) // 2], "truncated"),
        "jpeg cut off": (jpeg[: len(jpeg) // 2], "truncated"),
        "png of 400 million pixels": (_claims(20_000, 20_000), "exceeds limit"),
        "png of 2^31 pixels a side": (_claims(2**31 - 1, 2**31 - 1), ""),
        "png whose comment is a bomb": (_text_bomb(png), ""),
        "png with a bad checksum": (png[:40] + b"\xff\xff" + png[42:], ""),
    }
    return kinds


_SQUARE = 64  # pixels a side that they become, as they do in training
_SIDE = 7_900  # 62 million pixels: the largest that are let in, and what they cost is the peak


def _make_large(folder: Path) -> dict[str, Any]:
    """Write them, in a process of its own."""
    folder.mkdir()
    for name, picture, options in (
        ("rgba", Image.new("RGBA", (_SIDE, _SIDE), (0, 0, 0, 0)), {}),
        ("16 bit", Image.fromarray(np.full((_SIDE, _SIDE), 257 * 7, np.uint16)), {}),
        ("palette", Image.new("P", (_SIDE, _SIDE)), {"transparency": 0}),
    ):
        picture.save(folder / f"png {name} of 62 million pixels.png", compress_level=1, **options)
    return {}


def _large(folder: Path) -> dict[str, Kind]:
    def filled(value: int) -> Callable[[np.ndarray], bool]:
        return lambda array: array.shape == (_SQUARE, _SQUARE, 3) and bool((array == value).all())

    return {
        file.stem: (file.read_bytes(), filled(7 if "16 bit" in file.stem else 255)) for file in sorted(folder.iterdir())
    }


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(header: bytes, *chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + b"".join(chunks) + _chunk(b"IEND", b"")


def _claims(width: int, height: int) -> bytes:
    """A few bytes that say they are a large picture."""
    rows = zlib.compress(bytes(10_000))
    return _png(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), _chunk(b"IDAT", rows))


def _text_bomb(png: bytes) -> bytes:
    """A comment of 1 GiB of zeros, packed into a megabyte."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(2**20)) for _ in range(1024)) + packer.flush()
    return png[:33] + _chunk(b"zTXt", b"Comment\0\0" + packed) + png[33:]


def _interlaced(rgb: np.ndarray) -> bytes:
    """Adam7, which Pillow reads and does not write."""
    height, width, _ = rgb.shape
    data = b""
    for left, top, across, down in (
        (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)
    ):  # fmt: skip
        part = rgb[top::down, left::across]
        data += b"".join(b"\0" + row.tobytes() for row in part if row.size)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)
    return _png(header, _chunk(b"IDAT", zlib.compress(data)))


def _try_kinds(folder: Path, full: bool) -> dict[str, Any]:
    """Decode one file of each kind by the training's and the evaluation's road."""
    from mmdit.data.images import decode, square

    wrong, decoded, refused = [], 0, 0
    kinds = _kinds() | (_large(folder) if full else {})
    for name, (data, expected) in kinds.items():
        try:
            picture = decode(data)
            array = square(picture, _SQUARE) if "million" in name else np.asarray(picture)
            del picture
        except ValueError as error:
            refused += 1
            if not isinstance(expected, str) or expected not in str(error) or not str(error):
                wrong.append(f"{name}: refused with {error!s:.90}")
            continue
        except BaseException as error:  # the finding
            wrong.append(f"{name}: {type(error).__name__}: {error!s:.90}")
            continue
        decoded += 1
        if isinstance(expected, str):
            wrong.append(f"{name}: decoded")
        elif not expected(array):
            wrong.append(f"{name}: decoded to other pixels")
        del array
    return {"kinds": len(kinds), "decoded": decoded, "refused": refused, "wrong": wrong}


# --- mutations --------------------------------------------------------------------------------------------------


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Change a file: flipped bits, other bytes, a piece cut out, doubled or zeroed, a number set to its limit."""
    content = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        place, kind = chance.randrange(len(content)), chance.randrange(6)
        span = chance.choice((1, 2, 4, 16, 64))
        if kind == 0:
            content[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            content[place : place + span] = chance.randbytes(min(span, len(content) - place))
        elif kind == 2 and len(content) > span + 8:
            del content[place : place + span]
        elif kind == 3:
            content[place:place] = content[place : place + span]
        elif kind == 4:
            content[place : place + span] = bytes(min(span, len(content) - place))
        else:
            content[place : place + 4] = chance.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0"))
    return bytes(content)


def _try_mutations(folder: Path, count: int) -> dict[str, Any]:
    """Put mutated files with captions into a folder and walk through it as training and evaluation do."""
    from mmdit_eval.image_sets import open_images

    from mmdit.config import ImagesConfig
    from mmdit.data.images import DataError, decode, validate

    warnings.simplefilter("ignore")
    folder.mkdir()
    chance = random.Random(10)
    picture = Image.fromarray(noisy())
    with_exif = Image.Exif()
    with_exif[0x0112] = 6
    animation = {"save_all": True, "append_images": [Image.new("RGB", (40, 30), "red")]}
    sources = {
        "png": [encoded(picture, "PNG"), encoded(picture.quantize(64), "PNG"), encoded(picture, "PNG", exif=with_exif)],
        "jpg": [encoded(picture, "JPEG", exif=with_exif), encoded(picture, "JPEG", progressive=True)],
        "webp": [encoded(picture, "WEBP"), encoded(picture, "WEBP", lossless=True, **animation)],
        "gif": [encoded(picture.quantize(64), "GIF", **animation)],
        "tiff": [encoded(picture, "TIFF"), encoded(picture, "TIFF", compression="tiff_lzw", exif=with_exif)],
        "avif": [encoded(picture, "AVIF")],
        "bmp": [encoded(picture, "BMP")],
    }
    suffixes = ["png", "jpg", "webp", "gif"] * 5 + ["tiff", "avif", "bmp"]
    wrong, by_kind, good, bad = [], {}, set(), set()
    for i in range(count):
        suffix = suffixes[i % len(suffixes)]
        data = mutated(chance.choice(sources[suffix]), chance)
        name = f"{i:04d}.{suffix}"
        (folder / name).write_bytes(data)
        (folder / f"{i:04d}.txt").write_text("a picture")
        try:
            decode(data)
            good.add(name)
        except ValueError as error:
            bad.add(name)
            kind = str(error).partition(":")[0][:40]
            by_kind[kind] = by_kind.get(kind, 0) + 1
        except BaseException as error:  # the finding
            wrong.append(f"{name}: {type(error).__name__}: {error!s:.90}")
    if wrong:
        return {"files": count, "decoded": len(good), "refused": len(bad), "wrong": wrong}
    rejects = folder.parent / "rejects.jsonl"
    seen, refused = validate(ImagesConfig(source=str(folder), resolution=16), rejects)
    lines = [json.loads(line) for line in rejects.read_text().splitlines()]
    if seen != count or refused != len(bad) or {line["item"] for line in lines} != bad:
        wrong.append(f"validate named {refused} of {len(bad)} files among {seen}")
    wrong += [f"{line['item']}: no reason" for line in lines if not line["reason"].strip()]
    try:
        for batch in open_images(folder, sizes="16").batches(64):
            assert all(array.shape == (16, 16, 3) for array in batch)
        if bad:
            wrong.append("the evaluation took a folder with broken pictures")
    except DataError as error:
        if not any(name in str(error) for name in bad):
            wrong.append(f"the evaluation named no broken picture: {error!s:.200}")
    reasons = dict(sorted(by_kind.items(), key=lambda item: -item[1])[:12])
    return {"files": count, "decoded": len(good), "refused": len(bad), "wrong": wrong, "reasons": reasons}


# --- exactness --------------------------------------------------------------------------------------------------


def _try_exact() -> dict[str, bool]:
    """Compare turned pictures and 16-bit ones with what numpy says they are, pixel by pixel."""
    from mmdit.data.images import decode

    upright = noisy()
    stored = {  # orientation: what lies in the file of an upright picture
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright, 1), 7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }  # fmt: skip
    found = {}
    for orientation, array in stored.items():
        for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
            exif = Image.Exif()
            exif[0x0112] = orientation
            data = encoded(Image.fromarray(np.ascontiguousarray(array)), kind, exif=exif, **options)
            found[f"EXIF {orientation} {kind}"] = np.array_equal(np.asarray(decode(data)), upright)
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for kind in ("PNG", "TIFF"):
        array = np.asarray(decode(encoded(Image.fromarray(every), kind)))
        found[f"16 bit {kind}"] = np.array_equal(array[..., 0], np.rint(every / 257).astype(np.uint8))
    return found


RUNS = {"F10": run_pictures}
