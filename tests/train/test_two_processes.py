"""Several processes over gloo: the same samples in the same order, the same losses as one process, sharded or not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mmdit.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint
from mmdit.config import to_yaml
from mmdit.train.tracking import read_metrics
from mmdit.train.trainer import train

ROOT = Path(__file__).resolve().parents[2]


def losses(run_dir):
    return [r["loss"] for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == "train"]


def launch(config, run_dir, processes, *words):
    """Train in so many processes; return the finished command."""
    path = run_dir.with_suffix(".yaml")
    path.write_text(to_yaml(config))
    return subprocess.run(command(path, run_dir, processes, *words), capture_output=True, text=True, cwd=ROOT,
                          timeout=300, check=False)  # fmt: skip


def shard_of(file):
    """Tensors of a safetensors file, and where they lie in the whole."""
    with safe_open(file, framework="pt") as reader:
        return {key: reader.get_tensor(key) for key in reader.keys()}, reader.metadata()  # noqa: SIM118 (no mapping)


def command(path, run_dir, processes, *words):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*launcher, "-m", "mmdit.train", str(path), "--out", str(run_dir), "--quiet", *words]


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["mmdit", "unet"])
@pytest.mark.parametrize("sharding", ["none", "fsdp2", "hsdp"])
def test_two_processes_lose_what_one_loses(tmp_path, micro, micro_unet, backbone, sharding):
    tree = {"train": {"images": 400, "validate_every": 200, "sample_every": 200, "more_emas": {"wide": {"decay": 0.5}}}}
    if backbone == "unet":
        tree["model"] = micro_unet
    train(micro(tree), tmp_path / "one", progress=False)
    several = {**tree, "train": {**tree["train"], "num_processes": 2, "sharding": sharding}}
    if sharding == "hsdp":
        several["train"]["shard_size"] = 1
    done = launch(micro(several), tmp_path / "two", 2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(losses(tmp_path / "two")) == 50
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    validation = [
        [r["loss"] for r in read_metrics(tmp_path / n / "metrics.jsonl") if r["kind"] == "validation"]
        for n in ("one", "two")
    ]
    assert validation[0] == pytest.approx(validation[1], rel=1e-4)
    assert (tmp_path / "two" / "complete.json").is_file()
    a, b = (load_checkpoint(latest_checkpoint(tmp_path / n)) for n in ("one", "two"))
    assert a.tensors.keys() == b.tensors.keys() == {"model", "ema", "ema-wide", "optimizer"}
    for stem, table in a.tensors.items():
        assert table.keys() == b.tensors[stem].keys()
        for name, tensor in table.items():
            torch.testing.assert_close(b.tensors[stem][name], tensor, rtol=1e-3, atol=2e-4, msg=f"{stem}: {name}")


@pytest.mark.slow
def test_pieces_of_a_batch_in_two_processes_that_share_a_model_lose_what_one_loses(tmp_path, micro):
    train(micro({"train": {"images": 160}}), tmp_path / "one", progress=False)
    tree = {"images": 160, "num_processes": 2, "sharding": "fsdp2", "accumulation": 2}
    done = launch(micro({"train": tree}), tmp_path / "two", 2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
def test_a_sharded_checkpoint_goes_on_in_any_number_of_processes_and_back(tmp_path, micro):
    def of(images, processes, sharding):
        tree = {"images": images, "num_processes": processes, "sharding": sharding, "lr_schedule": "constant"}
        return micro({"train": {**tree, "keep_checkpoints": 9, "validate_every": 24}})

    train(of(72, 1, "none"), tmp_path / "one", progress=False)
    run = tmp_path / "run"
    for images, processes, sharding in ((24, 2, "fsdp2"), (48, 1, "none"), (56, 2, "fsdp2"), (64, 4, "fsdp2")):
        done = launch(of(images, processes, sharding), run, processes)
        assert done.returncode == 0, done.stderr[-2000:]
    train(of(72, 1, "none"), run, progress=False)
    assert losses(run) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    sharded = run / "checkpoints" / f"{64:012d}"
    assert len(list((sharded / "model").glob("*.safetensors"))) == 4
    from mmdit.pipeline import TextToImage

    images = TextToImage.load(sharded)(["a red circle"], seed=0)
    assert images.shape[0] == 1
    victim = next((sharded / "ema").glob("shard-00003-*"))
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"ema/shard-00003-.* has changed"):
        load_checkpoint(sharded)


@pytest.mark.slow
def test_a_signal_to_a_sharded_run_saves_within_a_step_and_it_goes_on_to_the_same_bits(tmp_path, micro):
    config = micro({"train": {"images": 4000, "num_processes": 2, "sharding": "fsdp2", "checkpoint_every": 0}})
    assert launch(config, tmp_path / "whole", 2).returncode == 0
    path = tmp_path / "legs.yaml"
    path.write_text(to_yaml(config))
    process = subprocess.Popen(
        command(path, tmp_path / "legs", 2), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(lambda: len(losses(tmp_path / "legs")) > 10)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    stopped = latest_checkpoint(tmp_path / "legs")
    assert stopped is not None
    assert 0 < int(stopped.name) < 4000
    assert launch(config, tmp_path / "legs", 2).returncode == 0
    a, b = (load_checkpoint(latest_checkpoint(tmp_path / n)) for n in ("whole", "legs"))
    for stem, table in a.tensors.items():
        assert all(torch.equal(tensor, b.tensors[stem][name]) for name, tensor in table.items()), stem


@pytest.mark.slow
def test_when_one_process_dies_the_others_end_with_it(tmp_path, micro):
    config = micro({"train": {"images": 80_000, "num_processes": 2, "timeout": 30}})
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config))
    process = subprocess.Popen(
        command(path, tmp_path / "run", 2), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: len(losses(tmp_path / "run")) > 3)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    began = time.monotonic()
    assert process.wait(timeout=90) != 0
    assert time.monotonic() - began < 60
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert latest_checkpoint(tmp_path / "run") is not None
    assert not (tmp_path / "run" / "complete.json").exists()


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not begin"
        time.sleep(0.1)


def children(pid):
    """Process ids of a process's children, oldest first."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_sharding_without_processes_is_refused_in_words(tmp_path, micro):
    from mmdit.config import ConfigError

    with pytest.raises(ConfigError, match="torchrun --nproc_per_node"):
        train(micro({"train": {"sharding": "fsdp2"}}), tmp_path, progress=False)
    with pytest.raises(ConfigError, match="shard_size is read by sharding 'hsdp' only"):
        micro({"train": {"shard_size": 2}})


def test_shards_are_put_together_whatever_their_number(tmp_path):
    from safetensors.torch import save_file

    from mmdit.checkpoint import _read_stem

    whole = torch.arange(35.0).reshape(7, 5)
    folder = tmp_path / "model"
    folder.mkdir()
    for rank, rows in enumerate(((0, 3), (3, 6), (6, 7))):
        places = {"w": {"saved_offsets": [rows[0], 0]}}
        tensors = {"w": whole[slice(*rows)].clone()}
        if rank == 0:
            tensors["step"], places["step"] = torch.tensor(3.0), {"saved_offsets": []}
        name = folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
        save_file(tensors, name, metadata={"DCP_SHARDING_INFO": json.dumps(places)})
    files = [f"model/{file.name}" for file in folder.iterdir()]
    found = _read_stem(tmp_path, "model", files)
    assert torch.equal(found["w"], whole)
    assert found["step"] == 3
    with pytest.raises(ValueError, match="hold 20 of 35 numbers"):
        _read_stem(tmp_path, "model", [name for name in files if "shard-00002" not in name])


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_checkpoints_in_the_background_hold_the_same_bytes_in_two_processes(tmp_path, micro, sharding):
    tree = {"num_processes": 2, "sharding": sharding, "checkpoint_every": 8, "keep_checkpoints": 9}
    for name, switch in (("step", False), ("background", True)):
        done = launch(micro({"train": {**tree, "async_checkpoints": switch}}), tmp_path / name, 2)
        assert done.returncode == 0, done.stderr[-2000:]
    for here in sorted((tmp_path / "step" / "checkpoints").iterdir()):
        there = tmp_path / "background" / "checkpoints" / here.name
        files = sorted(str(f.relative_to(here)) for f in here.rglob("*.safetensors"))
        assert files == sorted(str(f.relative_to(there)) for f in there.rglob("*.safetensors"))
        assert len(files) == (3 if sharding == "none" else 6)
        for name in files:  # not bytes: safetensors writes several metadata entries in any order
            (a, places_a), (b, places_b) = (shard_of(folder / name) for folder in (here, there))
            assert places_a == places_b
            assert a.keys() == b.keys()
            assert all(torch.equal(tensor, b[key]) for key, tensor in a.items())
        load_checkpoint(there)


@pytest.mark.slow
def test_a_process_that_cannot_write_its_shards_in_the_background_costs_all_the_checkpoint_and_none_the_run(
    tmp_path, micro
):
    """Process 1 refuses to write while the second checkpoint is in flight; both count the failure and go on."""
    breaker = tmp_path / "sitecustomize.py"
    breaker.write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import torch.distributed.checkpoint as dcp\n"
        "    class Refusing(dcp.HuggingFaceStorageWriter):\n"
        "        def write_data(self, plan, planner):\n"
        "            if '/.tmp-000000000016-' in str(self.path):\n"
        "                raise OSError(28, 'No space left on device')\n"
        "            return super().write_data(plan, planner)\n"
        "    dcp.HuggingFaceStorageWriter = Refusing\n"
    )
    tree = {"num_processes": 2, "sharding": "fsdp2", "checkpoint_every": 8, "keep_checkpoints": 9, "timeout": 60}
    config = micro({"train": {**tree, "async_checkpoints": True}})
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config))
    places = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command(path, tmp_path / "run", 2), capture_output=True, text=True, cwd=ROOT, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": places},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "No space left" in done.stdout
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [f"{n:012d}" for n in (8, 24, 32, 40, 48)]
    for name in kept:
        load_checkpoint(tmp_path / "run" / "checkpoints" / name)
