"""Write a released denoiser's file with random weights: python scripts/make_random_release.py OUT.safetensors.

Names, shapes and size are the release's (SD3-medium in fp16: 4.2 GB); what it draws is noise. For measuring how a file
of this size loads and runs (benchmarks/released.py), and for trying scripts on a machine that has no release.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

RELEASES = {"sd3_medium": "mmdit", "sd3.5_medium": "mmdit", "sd3.5_large": "mmdit", "sd1.5": "unet", "sdxl": "unet"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("out", type=Path, help="a .safetensors file")
    parser.add_argument("--release", choices=RELEASES, default="sd3_medium")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16", "fp8"), default="fp16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-size", help="largest file, such as 2GB; default: one file")
    arguments = parser.parse_args()
    import torch

    from mmdit import rng
    from mmdit.config import model_config
    from mmdit.weights.convert import DTYPES
    from mmdit.weights.empty import empty_denoiser
    from mmdit.weights.sd3 import PREFIX
    from mmdit.weights.writing import Lazy, write_weights

    def draw(number: int, shape: tuple[int, ...]) -> torch.Tensor:
        scale = 0.05 if len(shape) == 1 else (torch.Size(shape[1:]).numel()) ** -0.5  # keeps activations near 1
        return torch.from_numpy(rng.normal(arguments.seed, "init", [number], shape)[0]) * scale

    state = empty_denoiser(model_config(RELEASES[arguments.release], arguments.release)).state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    tensors = {
        PREFIX + key: Lazy(shape, DTYPES[arguments.dtype], partial(draw, number, shape))
        for number, (key, shape) in enumerate(shapes.items())
    }
    try:
        for file in write_weights(tensors, arguments.out, shard_size=arguments.shard_size):
            print(f"{file}: {file.stat().st_size:,} bytes")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
