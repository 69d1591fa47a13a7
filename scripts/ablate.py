"""Run a study: python scripts/ablate.py configs/studies/quickstart.yaml [--dry-run] [--seeds [0,1,2]] [overrides].

Trains each row and seed as its own process, judges them and writes runs/<study>/report.html. The same command goes on
after Ctrl-C. Report only, from files: python scripts/ablate.py --report-only runs/quickstart
"""

import argparse
import shlex
import sys
from pathlib import Path

from mmdit_eval.study import StudyInterrupted, run_study, write_reports

from mmdit.config import ConfigError


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("study", type=Path, help="YAML of the study; with --report-only also its folder")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where the study's folder is made")
    parser.add_argument("--dry-run", action="store_true", help="print the grid and stop")
    parser.add_argument("--report-only", action="store_true", help="train and judge nothing")
    arguments, overrides = parser.parse_known_args()
    try:
        if arguments.report_only:
            print(f"report: {write_reports(arguments.study, out=arguments.out)}")
            return 0
        return run_study(arguments.study, overrides, out=arguments.out, dry_run=arguments.dry_run)
    except (ConfigError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    except StudyInterrupted as stopped:
        print(f"\n{stopped}\ngo on with: python {shlex.join(sys.argv)}", file=sys.stderr)
        return 75


if __name__ == "__main__":
    sys.exit(main())
