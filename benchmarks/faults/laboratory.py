"""What the tests of training share: a micro run, sessions of it in forked processes, and the comparison of two runs.

A session is the command line's own `main` in a fork of this process, which has everything imported and the encoders
loaded: a hundred sessions cost no hundred imports. What is to go wrong in a session (`sabotage`) is done in the fork.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

import mmdit.train.__main__ as command_line
import mmdit.train.sources as sources_room
from mmdit.checkpoint import Checkpoint, latest_checkpoint, list_checkpoints, load_checkpoint
from mmdit.config import RunConfig, load_config, merge, to_yaml
from mmdit.train.tracking import read_metrics

BATCH = 8
TREE: dict[str, Any] = {
    "name": "micro",
    "model": {"name": "mmdit", "depth": 2, "width": 32, "num_heads": 2, "pos_embed_max_size": 8,
              "pos_embed_base_size": 4},
    "encoders": {"t5_length": 32},
    "data": {"num_images": 20},
    "sampling": {"num_steps": 2, "guidance_scale": 2.0},
    "train": {
        "images": 48, "batch_size": BATCH, "lr": 1.0e-3, "warmup_images": 16, "precision": "fp32", "val_images": 8,
        "val_levels": 2, "log_every": BATCH, "validate_every": 0, "sample_every": 0, "checkpoint_every": 5 * BATCH,
        "tensorboard": False, "ema_decay": 0.9, "sample_prompts": ["a red circle"], "timeout": 30,
    },
}  # fmt: skip
UNET: dict[str, Any] = {
    "name": "unet", "model_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "transformer_depth": [1, 1],
    "head_dim": 8, "linear_projection": True, "norm_groups": 8,
}  # fmt: skip
Sabotage = Callable[[], None]


def micro(folder: Path, train: dict[str, Any] | None = None, backbone: str = "mmdit", **changes: Any) -> RunConfig:
    """Return a run of 6 steps of 8 images; its cache stands in `folder`."""
    tree = {key: value for key, value in TREE.items() if key != "model" or backbone == "mmdit"}
    model = {"model": UNET} if backbone == "unet" else {}
    cache = {"train": {"cache_dir": str(folder / "cache")}}
    return load_config(None, merge(merge({**tree, **model}, cache), {**changes, "train": train or {}}))


@functools.cache
def warm() -> None:
    """Import what a session imports and keep the frozen encoders, so that forks find them ready."""
    import PIL.PngImagePlugin  # noqa: F401 (samples are PNG)
    import torch.distributed.checkpoint
    import torch.utils.tensorboard  # noqa: F401

    import mmdit.train.trainer  # noqa: F401
    from mmdit.data import make_dataset
    from mmdit.pipeline import load_encoders

    config = load_config(None, TREE)
    vae, text = load_encoders(config)
    make_dataset(config.data, "val")

    def ready(run_config: RunConfig) -> Any:
        same = run_config.encoders == config.encoders
        return load_encoders(run_config, vae=vae, text=text) if same else load_encoders(run_config)

    sources_room.load_encoders = ready  # type: ignore[assignment]


@dataclass
class Session:
    """One or more forked processes of one run; the first is rank 0."""

    run_dir: Path
    pids: list[int]
    log: Path
    codes: list[int] = field(default_factory=list)

    def wait(self, seconds: float = 240.0) -> int:
        """Return the exit code (negative: a signal) of rank 0 once all processes have ended; kill what hangs."""
        end = time.monotonic() + seconds
        for pid in self.pids[len(self.codes) :]:
            while True:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    break
                if time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
                    raise TimeoutError(f"{self.run_dir} hung:\n{self.output()[-2000:]}")
                time.sleep(0.005)
            self.codes.append(os.waitstatus_to_exitcode(status))
        return self.codes[0]

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Signal every process that has not been waited for."""
        for pid in self.pids[len(self.codes) :]:
            os.kill(pid, number)

    def output(self) -> str:
        """Return what the processes printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def begin(config: RunConfig, run_dir: Path, sabotage: Sabotage | None = None, processes: int = 1) -> Session:
    """Fork a session of a run: `python -m mmdit.train CONFIG --out RUN --quiet`, in so many processes."""
    warm()
    path, log = run_dir.with_suffix(".yaml"), run_dir.with_suffix(".log")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_yaml(config), encoding="utf-8")
    sys.stdout.flush(), sys.stderr.flush()
    port, pids = free_port() if processes > 1 else 0, []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            _session([str(path), "--out", str(run_dir), "--quiet"], log, sabotage, rank, processes, port)
        pids.append(pid)
    return Session(run_dir, pids, log)


def run(config: RunConfig, run_dir: Path, sabotage: Sabotage | None = None, processes: int = 1) -> Session:
    """Run a session to its end."""
    session = begin(config, run_dir, sabotage, processes)
    session.wait()
    return session


def forked(work: Callable[[], None], log: Path, wait: bool = True) -> int:
    """Do something in a fork; return its exit code, or its process id where it is not waited for."""
    sys.stdout.flush(), sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _redirect(log)
        _leave(lambda: (work(), 0)[1])
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if wait else pid


def _session(words: list[str], log: Path, sabotage: Sabotage | None, rank: int, processes: int, port: int) -> None:
    """Be one process of a session; never returns."""
    _redirect(log)
    AcceleratorState._reset_state(reset_partial_state=True)  # of a training that this process itself has done before
    if processes > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {name: str(value) for name, value in numbers.items()}

    def work() -> int:
        if sabotage is not None:
            sabotage()
        return command_line.main(words)

    _leave(work)


def _redirect(log: Path) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)


def _leave(work: Callable[[], int]) -> None:
    """Do the work and end this process, whatever happens."""
    code = 1
    try:
        code = work()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush(), sys.stderr.flush()
        finally:
            os._exit(code)


def rank() -> int:
    """Return the rank of this forked process."""
    return int(os.environ.get("RANK", "0"))


def free_port() -> int:
    """Return a port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> bool:
    """Poll; return whether it came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def newest(run_dir: Path) -> Checkpoint:
    """Read the newest verified checkpoint whole."""
    path = latest_checkpoint(run_dir)
    assert path is not None, f"{run_dir} has no checkpoint that verifies"
    return load_checkpoint(path)


def steps_saved(run_dir: Path) -> int:
    """Return the step of the newest verified checkpoint, by its name; 0 without one."""
    path = latest_checkpoint(run_dir)
    return 0 if path is None else int(path.name) // BATCH


def steps_logged(run_dir: Path) -> int:
    """Return the step of the last record of training."""
    seen = [r["images_seen"] for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == "train"]
    return seen[-1] // BATCH if seen else 0


def losses(run_dir: Path) -> list[float]:
    """Return the loss of each step."""
    return [r["loss"] for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == "train"]


def events(run_dir: Path) -> list[str]:
    """Return the events of a run in order."""
    return [r["event"] for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == "event"]


def unequal(run_a: Path, run_b: Path) -> list[str]:
    """Name what differs between the newest checkpoints of two runs: tensors by a single bit, counters by anything."""
    a, b = newest(run_a), newest(run_b)
    found = [key for key in ("images_seen", "step", "ema_updates", "complete") if a.state[key] != b.state[key]]
    for stem in sorted(a.tensors.keys() | b.tensors.keys()):
        mine, theirs = a.tensors.get(stem, {}), b.tensors.get(stem, {})
        for name in sorted(mine.keys() | theirs.keys()):
            if name not in mine or name not in theirs or not torch.equal(mine[name], theirs[name]):
                found.append(f"{stem}: {name}")
    return found


def temporaries(run_dir: Path) -> list[str]:
    """Name what interrupted writing has left anywhere in a run folder."""
    stale = re.compile(r"\.(tmp|old)-|\.tmp$")
    return sorted(str(p.relative_to(run_dir)) for p in run_dir.rglob("*") if stale.search(p.name))


def finite(checkpoints: Iterable[Path]) -> bool:
    """Say whether every number in these checkpoints is finite."""
    for path in checkpoints:
        for table in load_checkpoint(path).tensors.values():
            if not all(bool(torch.isfinite(t).all()) for t in table.values() if t.is_floating_point()):
                return False
    return True


def all_finite(run_dir: Path) -> bool:
    """Say whether every number in every checkpoint of a run is finite."""
    return finite(list_checkpoints(run_dir))
