"""Run a study: python scripts/ablate.py configs/studies/quickstart.yaml [--dry-run] [--seeds [0,1,2]] [overrides].

Trains each row and seed as its own process, judges them and writes runs/<study>/report.html. The same command goes on
after Ctrl-C; with more seeds it trains only the new cells. Report only, from files: python scripts/ablate.py
--report-only runs/quickstart. Seeds that a difference needs, from the spread of a study that was run, for its claims:
python scripts/ablate.py power runs/quickstart --metric relation --difference 2 [--split heldout] [--comparisons 16]
"""

import argparse
import shlex
import sys
from pathlib import Path

from mmdit_eval.study import StudyInterrupted, run_study, write_reports

from mmdit.config import ConfigError
from mmdit.registry import unknown


def main() -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain, allow_abbrev=False)
    power = sys.argv[1:2] == ["power"]
    parser.add_argument("study", type=Path, help="YAML of the study; with --report-only or power its folder")
    if power:
        parser.add_argument("--metric", required=True, help="a score of the study: relation, all_correct, frechet, ...")
        parser.add_argument("--difference", type=float, required=True, help="to be found; points for scores in %%")
        parser.add_argument("--split", choices=("seen", "heldout"), help="default: the first that the study claims")
        parser.add_argument("--comparisons", type=int, help="of the planned study; default: as the study claims")
    else:
        parser.add_argument("--out", type=Path, default=Path("runs"), help="where the study's folder is made")
        parser.add_argument("--dry-run", action="store_true", help="print the grid with its cost and stop")
        parser.add_argument("--rate", type=float, help="GFLOP/s of training a worker, for the times of the grid")
        parser.add_argument("--measure", action="store_true", help="measure that rate: a few updates of every row")
        parser.add_argument("--report-only", action="store_true", help="train and judge nothing")
    arguments, overrides = parser.parse_known_args(sys.argv[2:] if power else None)
    try:
        if overrides and (power or arguments.report_only):  # only a run has fields to be set
            flags = [f"--{name.replace('_', '-')}" for name in vars(arguments) if name != "study"]
            raise ConfigError(unknown("flag", overrides[0].partition("=")[0], flags))
        if power:
            from mmdit_eval.pilot import print_power

            wanted = arguments.metric, arguments.difference, arguments.split, arguments.comparisons
            print_power(arguments.study, *wanted)
            return 0
        if arguments.report_only:
            print(f"report: {write_reports(arguments.study, out=arguments.out)}")
            return 0
        rate = arguments.rate * 1e9 if arguments.rate else None
        options = {"out": arguments.out, "dry_run": arguments.dry_run, "rate": rate, "measure": arguments.measure}
        return run_study(arguments.study, overrides, **options)
    except (ConfigError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"the study's folder cannot be written or read ({error}); what is trained is kept", file=sys.stderr)
        return 3
    except StudyInterrupted as stopped:
        print(f"\n{stopped}\ngo on with: python {shlex.join(sys.argv)}", file=sys.stderr)
        return 75


if __name__ == "__main__":
    sys.exit(main())
