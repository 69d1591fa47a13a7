"""Judge a run: python scripts/evaluate.py runs/mine [--suite configs/eval/quickstart.yaml] [--num_images 512 ...].

Writes runs/mine/eval/<suite>-<images_seen>.json, prints its scores, and keeps a result that is there already. With
overrides the suite is called custom-<suite>, unless --name says otherwise: a study's own results stay as they are.
"""

import argparse
import sys
from pathlib import Path

from mmdit.config import ConfigError, SuiteConfig, load_suite, parse_overrides, validate


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--suite", type=Path, help="YAML of the suite; default: every field's default")
    parser.add_argument("--checkpoint", type=Path, help="one checkpoint of the run; default: the newest")
    arguments, overrides = parser.parse_known_args()
    try:
        tree = parse_overrides(overrides)
        suite = load_suite(arguments.suite, overrides) if arguments.suite else validate(SuiteConfig, tree, "overrides")
        if tree and "name" not in tree:
            suite = suite.model_copy(update={"name": f"custom-{suite.name}"})
        if not (arguments.run / "config.yaml").is_file():
            raise FileNotFoundError(f"{arguments.run} is no run folder: it has no config.yaml; give runs/<study>/<run>")
        from mmdit_eval.report import print_result
        from mmdit_eval.suite import evaluate_run

        from mmdit.checkpoint import CheckpointError  # torch from here on

        try:
            print_result(evaluate_run(arguments.run, suite, arguments.checkpoint))
        except CheckpointError as error:
            print(error, file=sys.stderr)
            return 3
    except (ConfigError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
