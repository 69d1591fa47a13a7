"""Train one run: python scripts/train.py configs/train/quickstart.yaml [--out DIR] [--train.lr 2e-4 ...].

Run the same command again to go on after Ctrl-C. --dry-run says how large the run is; --help lists the flags.
On several processes: torchrun --nproc_per_node 2 scripts/train.py CONFIG --train.num_processes 2.
"""

import sys

from mmdit.train.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
