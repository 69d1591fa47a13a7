"""What tests of several rooms share: no network, a small random VAE, the tiny text encoders, a micro run's config."""

import importlib.util
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # micro models: threads cost more than they give

import pytest

GUARD = Path(__file__).parent / "guard"


def _guard_the_network() -> Path:
    """Refuse connections to other machines here and in every process that a test starts; return the list of tries."""
    if "MMDIT_NETWORK_LOG" not in os.environ:
        descriptor, log = tempfile.mkstemp(prefix="network-", suffix=".log")
        os.close(descriptor)
        os.environ["MMDIT_NETWORK_LOG"] = log
        os.environ["PYTHONPATH"] = os.pathsep.join([str(GUARD), *filter(None, [os.environ.get("PYTHONPATH")])])
        spec = importlib.util.spec_from_file_location("network_guard", GUARD / "sitecustomize.py")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return Path(os.environ["MMDIT_NETWORK_LOG"])


TRIES = _guard_the_network()


@pytest.fixture(autouse=True)
def offline(request):
    """Fail a test during which a process of it tried to reach another machine."""
    before = TRIES.stat().st_size if TRIES.exists() else 0
    yield
    if TRIES.exists() and TRIES.stat().st_size > before:
        lines = TRIES.read_text(encoding="utf-8").splitlines()
        mine = [line for line in lines if line.startswith(request.node.nodeid)]
        assert not mine, f"tests are offline, but this one tried to connect: {mine}"


@pytest.fixture(scope="session")
def vae_file(tmp_path_factory):
    """A random f8 VAE with 4 channels, as a file that `load_vae` reads."""
    import torch
    from safetensors.torch import save_file

    from mmdit.config import VAEConfig
    from mmdit.encoders.vae import AutoencoderKL

    config = VAEConfig(
        block_channels=(8, 8, 8),
        num_res_blocks=1,
        latent_channels=4,
        mid_attention=False,
        norm_groups=4,
        stem_patch=2,
        shift=0.1,
        scale=2.0,
        clamp=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(config)
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in vae.state_dict().items()}
    save_file(tensors, path, metadata={"config": config.model_dump_json()})
    return path


@pytest.fixture(scope="session")
def vae(vae_file):
    from mmdit.encoders.vae import load_vae

    return load_vae(vae_file)


@pytest.fixture(scope="session")
def text():
    from mmdit.encoders.text import load_text_encoders

    return load_text_encoders("tiny", t5_length=32)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """One cache of the micro run's data for all tests of a session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def micro(vae_file, cache_dir):
    """A function of overrides (a tree) giving a run of 6 steps of 8 images that takes a second."""
    from mmdit.config import load_config, merge

    tree = {
        "name": "micro",
        "model": {
            "name": "mmdit", "depth": 2, "width": 32, "num_heads": 2, "in_channels": 4, "out_channels": 4,
            "pos_embed_max_size": 8, "pos_embed_base_size": 4,
        },
        "encoders": {"vae": str(vae_file), "t5_length": 32},
        "data": {"num_images": 20},
        "sampling": {"num_steps": 2, "guidance_scale": 2.0},
        "train": {
            "images": 48, "batch_size": 8, "lr": 1.0e-3, "warmup_images": 16, "precision": "fp32",
            "cache_dir": str(cache_dir), "val_images": 8, "val_levels": 2, "log_every": 8, "validate_every": 0,
            "sample_every": 0, "checkpoint_every": 16, "tensorboard": False, "ema_decay": 0.9,
        },
    }  # fmt: skip

    def build(changes=None):
        return load_config(None, merge(tree, changes or {}))

    return build


UNET = {
    "name": "unet", "model_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "transformer_depth": [1, 1],
    "head_dim": 8, "linear_projection": True, "norm_groups": 8, "in_channels": 4, "out_channels": 4,
}  # fmt: skip


@pytest.fixture
def micro_unet():
    """The model tree of a micro U-Net."""
    return dict(UNET)
