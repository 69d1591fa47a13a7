"""Judge a run: python scripts/evaluate.py runs/mine [--suite configs/eval/quickstart.yaml] [--num_images 512 ...].

Other words in the run's place: images FAKE --against REAL; statistics REAL --out real.npz; compare A B; sweep RUN
--scales 0 1 2 4. Each with --help.
"""

import sys

from mmdit_eval.commands import main

if __name__ == "__main__":
    sys.exit(main())
