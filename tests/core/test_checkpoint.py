"""A checkpoint is whole or not there: atomic writing, verification, walking back, pruning."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

import mmdit.checkpoint as room
from mmdit.checkpoint import (
    CheckpointError,
    find_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    sweep_temporaries,
    tensors_of,
    thin_checkpoint,
    verify_checkpoint,
)
from mmdit.config import RunConfig, load_config

CONFIG = load_config(None, {"name": "saved"})


def tensors(value=0.0):
    return {
        "model": {"weight": torch.full((4, 3), value), "half": torch.ones(2, dtype=torch.bfloat16)},
        "ema": {"weight": torch.full((4, 3), value + 1)},
    }


def save(run, images_seen, value=0.0):
    return save_checkpoint(run, images_seen, tensors(value), {"step": images_seen // 8}, CONFIG)


def test_what_was_saved_is_what_is_loaded(tmp_path):
    path = save(tmp_path, 128, 0.5)
    assert path.name == "000000000128"
    checkpoint = load_checkpoint(path)
    for stem, table in tensors(0.5).items():
        for name, tensor in table.items():
            assert torch.equal(checkpoint.tensors[stem][name], tensor)
            assert checkpoint.tensors[stem][name].dtype == tensor.dtype
    assert checkpoint.state == {"step": 16, "images_seen": 128}
    assert isinstance(checkpoint.config, RunConfig)
    assert checkpoint.config == CONFIG


def test_one_file_of_tensors_can_be_read_alone_and_a_missing_one_is_named(tmp_path):
    path = save(tmp_path, 8)
    assert list(load_checkpoint(path, stems=["ema"]).tensors) == ["ema"]
    with pytest.raises(CheckpointError, match="holds no optimizer"):
        load_checkpoint(path, stems=["optimizer"])


def test_channels_last_tensors_are_saved_with_their_values(tmp_path):
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    path = save_checkpoint(tmp_path, 8, {"model": {"weight": weight}}, {}, CONFIG)
    assert torch.equal(load_checkpoint(path).tensors["model"]["weight"], weight)


@pytest.mark.parametrize("links", [True, False])
def test_a_thinned_checkpoint_keeps_its_weights_alone_and_verifies(tmp_path, monkeypatch, links):
    path = save(tmp_path, 8, 0.5)
    size, sha = (path / "model.safetensors").stat().st_size, room.checkpoint_hash(path, "ema")
    if not links:
        monkeypatch.setattr(os, "link", lambda *given: (_ for _ in ()).throw(OSError("no links here")))
    assert thin_checkpoint(path, ["ema"]) == size
    thinned = load_checkpoint(path)
    assert list(thinned.tensors) == ["ema"]
    assert torch.equal(thinned.tensors["ema"]["weight"], tensors(0.5)["ema"]["weight"])
    assert room.checkpoint_hash(path, "ema") == sha  # results that were judged on them stay valid
    assert thinned.state == {"step": 1, "images_seen": 8, "weights_only": True}
    assert thin_checkpoint(path, ["ema"]) == 0
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [path.name]
    with pytest.raises(CheckpointError, match="holds no raw"):
        thin_checkpoint(path, ["raw"])


def test_a_checkpoint_that_cannot_be_thinned_stays_as_it_was(tmp_path, monkeypatch):
    path = save(tmp_path, 8)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    monkeypatch.setattr(room, "put_in_place", lambda *given: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(CheckpointError, match=r"could not be thinned .*No space left.*as it was"):
        thin_checkpoint(path, ["ema"])
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [path.name]
    damaged = path / "ema.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match=r"ema\.safetensors has changed"):
        thin_checkpoint(path, ["ema"])


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "config.yaml", "manifest.json"])
def test_a_missing_file_is_an_error_with_a_next_step(tmp_path, file):
    path = save(tmp_path, 8)
    (path / file).unlink()
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    assert error.value.path == path
    assert error.value.reason
    assert error.value.next_step


@pytest.mark.parametrize("kind", ["flip", "truncate", "append", "zero", "random", "empty"])
def test_no_mutated_checkpoint_loads(tmp_path, kind):
    whole = save(tmp_path / "whole", 8)
    chance = random.Random(kind)
    files = sorted(p.name for p in whole.iterdir())
    for trial in range(25):
        path = tmp_path / f"{kind}{trial}"
        shutil.copytree(whole, path)
        file = path / chance.choice(files)
        content = bytearray(file.read_bytes())
        place = chance.randrange(len(content))
        if kind == "flip":
            content[place] ^= 1 << chance.randrange(8)
        elif kind == "truncate":
            content = content[:place]
        elif kind == "append":
            content += b"\n" if trial % 2 else bytes([chance.randrange(256)])
        elif kind == "zero":
            content[place] = 1 if content[place] == 0 else 0
        elif kind == "random":
            content = bytearray(chance.randbytes(len(content)))
        else:
            content = bytearray()
        file.write_bytes(content)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


def test_swapped_files_and_a_manifest_pointing_elsewhere_do_not_load(tmp_path):
    path = save(tmp_path, 8)
    model, ema = path / "model.safetensors", path / "ema.safetensors"
    model.rename(path / "x"), ema.rename(model), (path / "x").rename(ema)
    with pytest.raises(CheckpointError, match=r"bytes|SHA-256"):
        load_checkpoint(path)
    other = save(tmp_path, 16)
    manifest = other / "manifest.json"
    manifest.write_text(manifest.read_text().replace("ema.safetensors", "../000000000008/ema.safetensors"))
    with pytest.raises(CheckpointError):
        load_checkpoint(other)


@pytest.mark.parametrize("place", ["model/shard-00001-model-00001-of-00001.safetensors", "more.safetensors"])
def test_tensors_that_no_manifest_speaks_of_are_never_read(tmp_path, place):
    """Readers of shards take every file of a folder: one that was put there later would be loaded with the others."""
    save(tmp_path, 8)
    path = save(tmp_path, 16)
    (path / place).parent.mkdir(exist_ok=True)
    shutil.copy(path / "ema.safetensors", path / place)
    with pytest.raises(CheckpointError, match="was not written with it"):
        load_checkpoint(path)
    assert latest_checkpoint(tmp_path).name == "000000000008"


def test_a_symbolic_link_in_place_of_a_file_does_not_load(tmp_path):
    path = save(tmp_path, 8)
    (path / "ema.safetensors").rename(tmp_path / "elsewhere")
    (path / "ema.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="lacks"):
        load_checkpoint(path)


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path):
    save(tmp_path, 8)
    newest = save(tmp_path, 16)
    (newest / "model.safetensors").write_bytes(b"")
    told = []
    assert latest_checkpoint(tmp_path, told.append).name == "000000000008"
    assert "000000000016" in told[0]
    with pytest.warns(UserWarning, match=r"000000000008 is taken, not the newest.*000000000016"):
        assert find_checkpoint(tmp_path).name == "000000000008"


def test_without_a_whole_checkpoint_there_is_none(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    path = save(tmp_path, 8)
    (path / "manifest.json").unlink()
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match="no checkpoint of this run verifies"):
        find_checkpoint(tmp_path)


def test_a_missing_run_is_answered_with_the_runs_there_are(tmp_path):
    save(tmp_path / "study" / "mmdit-s0", 8)
    (tmp_path / "study" / "mmdit-s0" / "config.yaml").write_text("name: x\n")
    with pytest.raises(FileNotFoundError, match=r"study/mmdit-s0"):
        find_checkpoint(tmp_path / "study" / "mmdit-s1")
    assert find_checkpoint(tmp_path / "study" / "mmdit-s0").name == "000000000008"


# each function that touches the disk while a checkpoint is written; the process dies at its n-th call
HOOKS = ["save_file", "write_text", "sync", "fingerprint", "put_in_place"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it, no cleaning up happens."""


@pytest.mark.parametrize("hook", HOOKS)
def test_a_death_at_any_point_of_saving_leaves_a_whole_newest_checkpoint(tmp_path, monkeypatch, hook):
    call = 0
    while True:
        call += 1
        run = tmp_path / f"{hook}{call}"
        save(run, 8, 1.0)
        done, original = 0, getattr(room, hook)

        def dying(*args, _original=original, _call=call):
            nonlocal done
            done += 1
            if done == _call:
                raise Killed
            return _original(*args)

        monkeypatch.setattr(room, hook, dying)
        try:
            save(run, 16, 2.0)
        except Killed:
            pass
        else:
            monkeypatch.setattr(room, hook, original)
            break  # the hook is called fewer times than this: every point has been tried
        monkeypatch.setattr(room, hook, original)
        newest = latest_checkpoint(run)
        value = {"000000000008": 1.0, "000000000016": 2.0}[newest.name]
        assert torch.equal(load_checkpoint(newest).tensors["model"]["weight"], torch.full((4, 3), value))
        sweep_temporaries(run)
        assert all(p.name.isdigit() for p in (run / "checkpoints").iterdir())
    assert call > 1


def test_a_death_between_the_renames_of_a_replacement_gives_the_old_one_back(tmp_path):
    path = save(tmp_path, 8, 1.0)
    path.rename(path.with_name(".old-000000000008-abcd"))
    sweep_temporaries(tmp_path)
    assert float(load_checkpoint(path).tensors["model"]["weight"][0, 0]) == 1.0


def test_saving_the_same_images_seen_again_replaces(tmp_path):
    save(tmp_path, 8, 1.0)
    path = save(tmp_path, 8, 2.0)
    assert float(load_checkpoint(path).tensors["model"]["weight"][0, 0]) == 2.0
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["000000000008"]


def test_a_full_disk_keeps_the_old_checkpoint_and_leaves_nothing_behind(tmp_path, monkeypatch):
    save(tmp_path, 8)

    def full(table, path):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save(tmp_path, 16)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["000000000008"]
    verify_checkpoint(tmp_path / "checkpoints" / "000000000008")


def test_every_file_is_synced_before_the_rename(tmp_path, monkeypatch):
    synced = []
    sync, place = room.sync, room.put_in_place
    monkeypatch.setattr(room, "sync", lambda path: (synced.append(path.name), sync(path)))
    monkeypatch.setattr(room, "put_in_place", lambda a, b: (synced.append("RENAME"), place(a, b)))
    save(tmp_path, 8)
    before = synced[: synced.index("RENAME")]
    files = {"model.safetensors", "ema.safetensors", "state.json", "config.yaml", "manifest.json"}
    assert files <= set(before)
    assert before[-2] == "manifest.json"  # written last, then its folder
    assert synced[-1] == "checkpoints"


def test_what_is_replaced_goes_only_once_the_new_names_are_on_the_disk(tmp_path, monkeypatch):
    """A disk may keep a removal and forget the renames before it: only an fsync of their folder puts them in order."""
    path, done = save(tmp_path, 8), []
    (path / "ema").mkdir()  # as in a sharded checkpoint
    (path / "ema.safetensors").rename(path / "ema" / "shard-00001-model.safetensors")
    text = (path / "manifest.json").read_text().replace("ema.safetensors", "ema/shard-00001-model.safetensors")
    (path / "manifest.json").write_text(room.manifest_text(json.loads(text)["files"]))
    sync, rename, remove = room.sync, Path.rename, shutil.rmtree
    monkeypatch.setattr(room, "sync", lambda at: (done.append(("sync", Path(at).name)), sync(at)))
    monkeypatch.setattr(Path, "rename", lambda at, to: (done.append(("rename", Path(to).name)), rename(at, to))[1])
    monkeypatch.setattr(shutil, "rmtree", lambda at, **_: (done.append(("remove", Path(at).name)), remove(at)))
    thin_checkpoint(path, ["ema"])
    visible = done.index(("rename", path.name))
    removed = next(i for i, (what, name) in enumerate(done) if what == "remove" and name.startswith(".old-"))
    assert ("sync", "checkpoints") in done[visible:removed]
    assert ("sync", "ema") in done[:visible]
    verify_checkpoint(path)


def test_pruning_keeps_the_newest_and_the_marked(tmp_path):
    for images_seen in (8, 16, 24, 32, 40):
        save(tmp_path, images_seen)
    prune_checkpoints(tmp_path, 2, kept=lambda images_seen: images_seen == 16)
    assert [int(p.name) for p in list_checkpoints(tmp_path)] == [16, 32, 40]


def test_a_damaged_later_checkpoint_never_costs_the_good_one_that_was_just_written(tmp_path):
    for images_seen in (8, 16, 24):
        save(tmp_path, images_seen)
    damaged = tmp_path / "checkpoints" / f"{24:012d}" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    save(tmp_path, 20)  # resumed from 16, since 24 does not verify
    prune_checkpoints(tmp_path, 1, newest=20)
    assert [int(path.name) for path in list_checkpoints(tmp_path)] == [20, 24]
    assert latest_checkpoint(tmp_path).name == f"{20:012d}"


def test_non_finite_parameters_are_never_saved():
    module = torch.nn.Linear(2, 2)
    with torch.no_grad():
        module.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight holds non-finite"):
        tensors_of(module)


def test_nothing_in_the_room_can_run_code_from_a_file():
    source = Path(room.__file__).read_text(encoding="utf-8")
    assert "pickle" not in source.replace("never pickle", "").replace("Nothing here pickles", "")
    assert "torch.load" not in source
