"""Random weights for feature networks, once a session: no published file is read."""

import pytest


def random_inception(seed=0):
    """A state dict of FID's Inception whose activations stay of order one."""
    import torch
    from mmdit_eval.inception import CLASSES, FEATURES, convolutions

    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = {"fc.weight": 0.02 * normal(CLASSES, FEATURES), "fc.bias": 0.1 * normal(CLASSES)}
    for name, (out, channels, height, width) in convolutions().items():
        tensors[f"{name}.conv.weight"] = normal(out, channels, height, width) * (2 / (channels * height * width)) ** 0.5
        tensors[f"{name}.bn.weight"] = 1 + 0.1 * normal(out)
        tensors[f"{name}.bn.bias"] = 0.1 * normal(out)
        tensors[f"{name}.bn.running_mean"] = 0.1 * normal(out)
        tensors[f"{name}.bn.running_var"] = 1 + 0.2 * torch.rand(out, generator=generator)
        tensors[f"{name}.bn.num_batches_tracked"] = torch.tensor(1)
    return tensors


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Random weights of FID's Inception under the published file's name."""
    import torch

    path = tmp_path_factory.mktemp("weights") / "weights-inception-2015-12-05-6726825d.pth"
    torch.save(random_inception(), path)
    return path
