"""Write what the stored studies found into the README and the studies: python scripts/readme_table.py [--add RUN].

From results/*/summary.json come the README's results and the `# Found:` lines in the heads of configs/studies/*.yaml.
--add runs/quickstart first copies that study's numbers, figures and report to results/quickstart.
--check changes nothing and exits with 1 where the README or a head is not what the files say.
"""

import argparse
import sys
from pathlib import Path

from mmdit_eval.readme import results_block, rewrite, stale_heads, store_study


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("--add", type=Path, metavar="RUN", help="a finished study's folder, to be stored first")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--studies", type=Path, default=Path("configs/studies"), help="whose heads say what was found")
    arguments = parser.parse_args()
    if arguments.add is not None:
        try:
            print(f"stored {store_study(arguments.add, arguments.results)}")
        except (FileNotFoundError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
    stale = stale_heads(arguments.results, arguments.studies)
    old = arguments.readme.read_text(encoding="utf-8")
    new = rewrite(old, results_block(arguments.results))
    if old != new:
        stale[arguments.readme] = new
    for file, text in stale.items():
        if arguments.check:
            print(f"{file} is not up to date; run: python scripts/readme_table.py", file=sys.stderr)
        else:
            file.write_text(text, encoding="utf-8")
            print(f"wrote what was found into {file}")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
