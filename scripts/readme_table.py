"""Write the README's results from results/*/summary.json: python scripts/readme_table.py [--add RUN] [--check].

--add runs/quickstart first copies that study's numbers, figures and report to results/quickstart.
--check changes nothing and exits with 1 where the README is not what the files say.
"""

import argparse
import sys
from pathlib import Path

from mmdit_eval.readme import results_block, rewrite, store_study


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("--add", type=Path, metavar="RUN", help="a finished study's folder, to be stored first")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    if arguments.add is not None:
        try:
            print(f"stored {store_study(arguments.add, arguments.results)}")
        except (FileNotFoundError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
    old = arguments.readme.read_text(encoding="utf-8")
    new = rewrite(old, results_block(arguments.results))
    if old == new:
        return 0
    if arguments.check:
        print(f"{arguments.readme} is not up to date; run: python scripts/readme_table.py", file=sys.stderr)
        return 1
    arguments.readme.write_text(new, encoding="utf-8")
    print(f"wrote the results into {arguments.readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
