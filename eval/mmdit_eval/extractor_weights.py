"""Weights of feature networks: where they are looked for, what is known of them, and their hash.

Nothing is downloaded. A file is named outright, or stands in one of the folders of `places`; where it is missing, the
error says which file, its hash, where it is published, where to put it, and what works without it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER_VARIABLE = "MMDIT_EVAL_WEIGHTS"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class KnownFile:
    """A published weights file.

    Attributes:
        names: file names under which it is known; any of them with `.safetensors` instead serves as well.
        sha256: of the published file, or None where it is not recorded here.
        size: bytes; 0 is not recorded.
        source: where it is published, in words.
    """

    names: tuple[str, ...]
    sha256: str | None
    size: int
    source: str


KNOWN: dict[str, KnownFile] = {
    "inception": KnownFile(
        ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"),
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        95_628_359,
        "release v0.2.0 of toshas/torch-fidelity, or release fid_weights of mseitzer/pytorch-fid: one file, two names",
    ),
    "dinov2_vits14": KnownFile(
        ("dinov2_vits14_pretrain.pth",),
        "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
        88_283_115,
        "the model zoo of facebookresearch/dinov2",
    ),
    "dinov2_vitb14": KnownFile(
        ("dinov2_vitb14_pretrain.pth",),
        "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
        0,
        "the model zoo of facebookresearch/dinov2",
    ),
    "dinov2_vitl14": KnownFile(
        ("dinov2_vitl14_pretrain.pth",),
        "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
        1_217_586_395,
        "the model zoo of facebookresearch/dinov2",
    ),
}


WORKS_WITHOUT = (
    "Works without: the extractor 'tiny_clip' (ships with the package; knows its shapes and emoji, so its distances "
    "compare with nobody's FID)"
)


def places() -> list[Path]:
    """Return the folders that are searched, in order: $MMDIT_EVAL_WEIGHTS, our cache, torch hub's."""
    given = os.environ.get(FOLDER_VARIABLE)
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return [*([Path(given).expanduser()] if given else []), cache / "mmdit-lab" / "weights", hub_folder()]


def hub_folder() -> Path:
    """Return the folder into which torch hub, and so torch-fidelity and pytorch-fid, download."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def find_weights(extractor: str, known: KnownFile, given: str | Path | None = None) -> Path:
    """Find the weights file of an extractor.

    Args:
        given: the file, or a folder that holds it; None: the folders of `places`.

    Raises:
        FileNotFoundError: nowhere; the message says what to do.
    """
    names = [*known.names, *(str(Path(name).with_suffix(".safetensors")) for name in known.names)]
    folders = [Path(given).expanduser()] if given is not None else places()
    for place in folders:
        if place.is_file():
            return place
        for name in names:
            if (place / name).is_file():
                return place / name
    facts = [f"{known.size:,} bytes"] if known.size else []
    facts += [f"SHA-256 {known.sha256}"] if known.sha256 else []
    raise FileNotFoundError(
        f"extractor {extractor!r} needs {known.names[0]}{' (' + ', '.join(facts) + ')' if facts else ''}, from "
        f"{known.source}. It is not shipped and nothing is downloaded by itself; looked in "
        f"{', '.join(map(str, folders))}. Put it into {places()[-2]}, or name the file or its folder by "
        f"--extractor-weights or ${FOLDER_VARIABLE}. {WORKS_WITHOUT}"
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a state dict from .safetensors, or from a pickle file with weights only.

    Raises:
        ValueError: not readable, or no state dict.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nine kinds of them on damaged files, safetensors one of its own
        kind = "safetensors" if path.suffix == ".safetensors" else "weights"
        raise ValueError(f"{path} cannot be read as {kind} ({error}); copy it again") from error
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds a {type(found).__name__}, not a dictionary of tensors")
    return found


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """Return a short hash of names, shapes and float32 values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def hash_weights(path: Path, tensors: dict[str, Tensor], known: KnownFile | None = None) -> str:
    """Return the hash of a file's tensors, equal for .pth and .safetensors; warn where it is not the published file.

    Both hashes are kept beside the file (`<file>.hash.json`) with its size and time of change, and taken from there
    while these stay.
    """
    stat = path.stat()
    note = path.with_name(path.name + ".hash.json")
    try:
        kept = json.loads(note.read_text(encoding="utf-8"))
        fresh = (kept["size"], kept["changed"]) == (stat.st_size, stat.st_mtime_ns)
    except (OSError, ValueError, KeyError, TypeError):
        fresh = False
    if not fresh:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        kept = {"size": stat.st_size, "changed": stat.st_mtime_ns, "sha256": sha256, "tensors": hash_tensors(tensors)}
        try:
            temporary = note.with_name(f".{note.name}.{os.getpid()}")
            temporary.write_text(json.dumps(kept), encoding="utf-8")
            temporary.replace(note)
        except OSError:  # a folder that cannot be written costs the hash again, nothing else
            pass
    if known is not None and known.sha256 and path.suffix != ".safetensors" and kept["sha256"] != known.sha256:
        _LOG.warning(
            "%s has SHA-256 %s, the published file %s: its numbers do not compare with published ones",
            path, kept["sha256"], known.sha256,
        )  # fmt: skip
    return str(kept["tensors"])
