"""What a run leaves behind besides weights: metrics.jsonl always, TensorBoard by choice, environment.json."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mmdit.checkpoint import write_whole
from mmdit.config import ConfigError, RunConfig, to_tree

PACKAGES = ("mmdit-lab", "torch", "transformers", "accelerate", "datasets", "safetensors", "numpy", "pillow")


class Metrics:
    """Append records to `metrics.jsonl`; numbers go to TensorBoard as well.

    Args:
        run_dir: the run's folder.
        resumed_at: images_seen of the checkpoint that training goes on from, or None for a fresh start; records of
            later images belong to steps that are about to be repeated and are dropped.
        tensorboard: write event files into `<run>/tensorboard`.
        wandb: report to Weights & Biases as well; WANDB_MODE=offline keeps it in `<run>/wandb`.
        config: told to wandb.

    Raises:
        ConfigError: wandb is wanted and not installed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        resumed_at: int | None = None,
        tensorboard: bool = False,
        wandb: bool = False,
        config: RunConfig | None = None,
    ) -> None:
        self.path = Path(run_dir) / "metrics.jsonl"
        kept = [r for r in read_metrics(self.path) if resumed_at is not None and r.get("images_seen", 0) <= resumed_at]
        write_whole(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._told = False
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # a second of imports, only where it is wanted

            self._board = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=resumed_at)
        self._wandb = _begin_wandb(Path(run_dir), config) if wandb else None

    def write(self, kind: str, **values: Any) -> None:
        """Append one record: `train`, `validation` or `event`. `images_seen` is the x axis in TensorBoard."""
        try:
            self._file.write(json.dumps({"kind": kind, **values}) + "\n")
            self._file.flush()
            self._report(kind, values)
        except OSError as error:  # a full disk costs records, not the run; what is buffered is written once it can be
            if not self._told:
                print(
                    f"\n{self.path} cannot be written ({error}); training goes on, records may be missing", flush=True
                )
            self._told = True

    def _report(self, kind: str, values: Mapping[str, Any]) -> None:
        """Tell the numbers of a record to TensorBoard and wandb."""
        if kind == "event" or (self._board is None and self._wandb is None):
            return
        scalars = {f"{kind}/{name}": value for name, value in flat(values) if name != "images_seen"}
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, values["images_seen"])
        if self._wandb is not None:
            self._wandb.log({**scalars, "images_seen": values["images_seen"]})

    def close(self) -> None:
        """Flush and close the files."""
        with suppress(OSError):  # told by `write`
            self._file.close()
        if self._board is not None:
            with suppress(OSError):
                self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def flat(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers among values, those in a dictionary or list under name/key."""
    for name, value in values.items():
        if isinstance(value, int | float):
            yield name, value
        elif isinstance(value, dict | list):
            inner = value if isinstance(value, dict) else dict(enumerate(value))
            yield from flat({f"{name}/{key}": item for key, item in inner.items()})


def _begin_wandb(run_dir: Path, config: RunConfig | None) -> Any:
    """Begin, or go on with, the wandb run of a run folder."""
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            'train.wandb is true, but wandb is not installed: pip install "mmdit-lab[wandb]", or --train.wandb false '
            "(metrics.jsonl and TensorBoard are written anyway)"
        ) from error
    tree = None if config is None else to_tree(config)
    name = run_dir.name
    identity = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
    project = "mmdit-lab"
    return wandb.init(project=project, name=name, id=identity, dir=str(run_dir), config=tree, resume="allow")


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
    """Write `environment.json`: the newest session on top, every session's beginning in `sessions`.

    Where the code differs from its commit, `dirty.diff` holds the difference.
    """
    path = Path(run_dir) / "environment.json"
    now = {**describe_environment(), **extra}
    if now["dirty"]:
        diff = _git(Path(__file__).resolve().parents[2], "diff", "HEAD") or ""
        (Path(run_dir) / "dirty.diff").write_text(diff + "\n", encoding="utf-8")
    try:
        sessions = json.loads(path.read_text(encoding="utf-8"))["sessions"]
    except (OSError, ValueError, KeyError, TypeError):
        sessions = []
    sessions.append({key: now[key] for key in ("time", "commit", "dirty", "command")})
    write_whole(path, json.dumps({**now, "sessions": sessions}, indent=1))


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
