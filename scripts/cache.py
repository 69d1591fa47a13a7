"""Look after what a run learns from: python scripts/cache.py configs/train/quickstart.yaml [--cache DIR].

Encodes the data into --cache (default <run>/cache), which training then reads. Other jobs: --statistics prints a
fitting encoders.latent_shift and latent_scale; --validate looks at every picture and writes the bad ones to a file.
"""

import sys

from mmdit.train.__main__ import main

if __name__ == "__main__":
    words = sys.argv[1:]
    chosen = {"--statistics", "--validate", "--help", "-h"} & set(words)
    sys.exit(main(words if chosen else [*words, "--cache-only"]))
