"""What the hostile files of F4 are made of: cases, code that leaves a mark where it is run, and bombs."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmdit.checkpoint import CheckpointError

GIB = 2**30


class Case(NamedTuple):
    """A file that means harm.

    Attributes:
        load: what a user does with it.
        words: that its refusal holds, the file's name among them; None: it does no harm and loads, and `load` itself
            looks at what was loaded.
        refusals: how a refusal may come.
    """

    load: Callable[[], object]
    words: tuple[str, ...] | None
    refusals: tuple[type[Exception], ...] = (ValueError, FileNotFoundError, CheckpointError)


class Trap:
    """Code in the forms in which files carry it; where one is run, the canary is there.

    Attributes:
        canary: a file that is not there.
        bomb: bytes that a bomb unpacks to.
        many: a number of tensors that is too large (not in the short form, which loads none of those).
    """

    def __init__(self, canary: Path, full: bool) -> None:
        self.canary = canary
        self.bomb, self.many = (GIB, 100_001) if full else (66 << 20, 1_000)

    @property
    def shell(self) -> str:
        return f"touch {self.canary}"

    @property
    def pickle(self) -> bytes:
        """A pickle that calls posix.system when it is loaded."""
        return b"\x80\x02cposix\nsystem\n(X" + struct.pack("<I", len(self.shell)) + self.shell.encode() + b"tR."

    @property
    def torch_zip(self) -> bytes:
        """The same as torch.save would wrap it."""
        return zipped({"archive/data.pkl": self.pickle, "archive/version": b"3\n", "archive/byteorder": b"little"})

    @property
    def npy(self) -> bytes:
        """An .npy of objects."""
        return npy_header({"descr": "|O", "fortran_order": False, "shape": (1,)}) + self.pickle

    @property
    def python(self) -> str:
        return f"import pathlib\npathlib.Path({str(self.canary)!r}).touch()\n"

    @property
    def yaml(self) -> str:
        return f"!!python/object/apply:os.system [{json.dumps(self.shell)}]"


def write(path: Path, content: bytes | str) -> Path:
    """Write a file, its folders too; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def hole(path: Path, size: int, start: bytes = b"") -> Path:
    """Write a file that claims many bytes and takes no disk."""
    with write(path, start).open("r+b") as file:
        file.truncate(size)
    return path


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def npy_header(described: dict[str, Any] | str) -> bytes:
    """Return the head of an .npy that says this; a text is taken as it is."""
    text = (described if isinstance(described, str) else repr(described)).encode() + b"\n"
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text


def npy(array: np.ndarray) -> bytes:
    """Return an honest .npy."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def npz_bomb(path: Path, name: str, dtype: str, shape: tuple[int, ...], beside: dict[str, bytes] | None = None) -> Path:
    """Write an .npz with one array of zeros, packed two hundredfold."""
    head = npy_header({"descr": dtype, "fortran_order": False, "shape": shape})
    left = int(np.prod(shape)) * np.dtype(dtype).itemsize
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
            member.write(head)
            for _ in range(left >> 20):
                member.write(bytes(1 << 20))
            member.write(bytes(left & (1 << 20) - 1))
        for other, content in (beside or {}).items():
            archive.writestr(f"{other}.npy", content)
    return path


def header(described: Any, body: bytes = b"") -> bytes:
    """Return a .safetensors file with this header."""
    text = described if isinstance(described, bytes) else json.dumps(described).encode()
    return len(text).to_bytes(8, "little") + text + body


def tensor(shape: list[Any], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    """Return one entry of such a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def png(array: np.ndarray | None = None, *chunks: bytes) -> bytes:
    """Return a small PNG, with further chunks behind its head."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.full((20, 20, 3), 77, np.uint8) if array is None else array).save(buffer, "PNG")
    data = buffer.getvalue()
    return data[:33] + b"".join(chunks) + data[33:]


def chunk(name: bytes, data: bytes) -> bytes:
    """Return one chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def packed_zeros(size: int) -> bytes:
    """Return zeros, packed two hundredfold."""
    packer = zlib.compressobj(1)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()


def apart(work: Callable[[], object]) -> None:
    """Do something in a process of its own: memory that it takes is not that of the cases, which are forks of this."""
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(process, 0)


def tar(*members: tuple[tarfile.TarInfo | str, bytes]) -> bytes:
    """Return a tar of these members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for member, content in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = len(content) or info.size
            archive.addfile(info, io.BytesIO(content) if content else None)
    return buffer.getvalue()


def tar_head(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """Return a tar header whose size field is these 12 bytes."""
    head = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    head[124:136], head[156:157], head[148:156] = size, kind, b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def padded(content: bytes) -> bytes:
    """Fill a member's content up to a block of a tar."""
    return content + bytes(-len(content) % 512)
