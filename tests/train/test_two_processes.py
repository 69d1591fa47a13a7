"""Two processes over gloo: the same samples in the same order, the same losses as one process."""

import subprocess
import sys
from pathlib import Path

import pytest

from mmdit.config import to_yaml
from mmdit.train.tracking import read_metrics
from mmdit.train.trainer import train

ROOT = Path(__file__).resolve().parents[2]


def losses(run_dir):
    return [r["loss"] for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["mmdit", "unet"])
def test_two_processes_lose_what_one_loses(tmp_path, micro, micro_unet, backbone):
    tree = {"train": {"validate_every": 24, "sample_every": 24}}
    if backbone == "unet":
        tree["model"] = micro_unet
    train(micro(tree), tmp_path / "one", progress=False)
    (tmp_path / "config.yaml").write_text(to_yaml(micro({**tree, "train": {**tree["train"], "num_processes": 2}})))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command += ["mmdit.train", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "two"), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    validation = [
        [r["loss"] for r in read_metrics(tmp_path / n / "metrics.jsonl") if r["kind"] == "validation"]
        for n in ("one", "two")
    ]
    assert validation[0] == pytest.approx(validation[1], rel=1e-4)
    assert (tmp_path / "two" / "complete.json").is_file()
