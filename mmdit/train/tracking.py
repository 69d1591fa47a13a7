"""What a run leaves behind besides weights: metrics.jsonl always, TensorBoard by choice, environment.json."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("mmdit-lab", "torch", "transformers", "accelerate", "datasets", "safetensors", "numpy", "pillow")


class Metrics:
    """Append records to `metrics.jsonl`; numbers go to TensorBoard as well.

    Args:
        run_dir: the run's folder.
        resumed_at: images_seen of the checkpoint that training goes on from, or None for a fresh start; records of
            later images belong to steps that are about to be repeated and are dropped.
        tensorboard: write event files into `<run>/tensorboard`.
    """

    def __init__(self, run_dir: str | Path, resumed_at: int | None = None, tensorboard: bool = False) -> None:
        self.path = Path(run_dir) / "metrics.jsonl"
        kept = [r for r in read_metrics(self.path) if resumed_at is not None and r.get("images_seen", 0) <= resumed_at]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        temporary.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # a second of imports, only where it is wanted

            self._board = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=resumed_at)

    def write(self, kind: str, **values: Any) -> None:
        """Append one record: `train`, `validation` or `event`. `images_seen` is the x axis in TensorBoard."""
        self._file.write(json.dumps({"kind": kind, **values}) + "\n")
        self._file.flush()
        if self._board is not None and kind != "event":
            for name, value in values.items():
                if isinstance(value, int | float) and name != "images_seen":
                    self._board.add_scalar(f"{kind}/{name}", value, values["images_seen"])

    def close(self) -> None:
        """Flush and close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`; a last line torn by a kill is left out."""
    path = Path(path)
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def describe_environment() -> dict[str, Any]:
    """Return commit, versions, hardware and command: what one needs to run this again."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    folder = Path(__file__).resolve().parents[2]
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _git(folder, "rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "versions": versions,
        "hardware": {
            "system": platform.system(),
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def write_environment(run_dir: str | Path, **extra: Any) -> None:
    """Write `environment.json`: the newest session on top, every session's beginning in `sessions`."""
    path = Path(run_dir) / "environment.json"
    now = {**describe_environment(), **extra}
    try:
        sessions = json.loads(path.read_text(encoding="utf-8"))["sessions"]
    except (OSError, ValueError, KeyError, TypeError):
        sessions = []
    sessions.append({key: now[key] for key in ("time", "commit", "dirty", "command")})
    path.write_text(json.dumps({**now, "sessions": sessions}, indent=1), encoding="utf-8")


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def processor() -> str:
    """Name the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
