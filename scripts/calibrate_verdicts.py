"""Simulate studies whose truth is known and write how often the verdicts are wrong: results/calibration/verdicts.json.

python scripts/calibrate_verdicts.py [--studies 1000] [--page docs/studies.md]      about 8 minutes on one core
"""

import argparse
import json
import os
from pathlib import Path

from mmdit_eval.calibration import calibrate, markdown
from mmdit_eval.readme import rewrite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/calibration/verdicts.json"))
    parser.add_argument("--page", type=Path, help="also write the tables into this page, docs/studies.md")
    arguments = parser.parse_args()
    command = f"python scripts/calibrate_verdicts.py --studies {arguments.studies} --seed {arguments.seed}"
    found = {"command": command, **calibrate(arguments.studies, arguments.seed)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = arguments.out.with_name(f".{arguments.out.name}.{os.getpid()}")
    temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    temporary.replace(arguments.out)
    block = markdown(found)
    print(block)
    if arguments.page is not None:
        page = rewrite(arguments.page.read_text(encoding="utf-8"), block, "calibration")
        arguments.page.write_text(page, encoding="utf-8")
    print(arguments.out)


if __name__ == "__main__":
    main()
