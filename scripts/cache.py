"""Encode a run's data ahead of training: python scripts/cache.py configs/train/quickstart.yaml --cache data/cache.

Rows of a study that train with the same --cache then share it. Config overrides work as in scripts/train.py.
With --statistics it prints the encoders.latent_shift and latent_scale that standardise the latents of the data.
"""

import sys

from mmdit.train.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["--cache-only", *sys.argv[1:]]))
