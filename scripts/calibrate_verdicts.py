"""Simulate studies whose truth is known and write how often the verdicts are wrong: results/calibration/verdicts.json.

python scripts/calibrate_verdicts.py [--studies 1000]      about 2 minutes on one core
"""

import argparse
import json
import os
from pathlib import Path

from mmdit_eval.calibration import calibrate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/calibration/verdicts.json"))
    arguments = parser.parse_args()
    command = f"python scripts/calibrate_verdicts.py --studies {arguments.studies} --seed {arguments.seed}"
    found = {"command": command, **calibrate(arguments.studies, arguments.seed)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = arguments.out.with_name(f".{arguments.out.name}.{os.getpid()}")
    temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    temporary.replace(arguments.out)
    for case in found["false_verdicts"]:
        form = case.get("method", "Welch t over seeds")
        if "spread_ratio" in case:
            form += f", spreads 1 to {case['spread_ratio']:g}"
        print(f"A/A, {case['rows']} rows, {case['seeds']} seeds, {form}: {100 * case['share']:.1f} % false verdicts")
    for case in found["other_intervals"]:
        shared = ", shared" if "method" in case else ""
        print(
            f"A/A, 2 rows, {case['seeds']} seeds{shared}: mixed model {100 * case['mixed_model']['share']:.1f} %, "
            f"bootstrap over pictures {100 * case['bootstrap_over_pictures']['share']:.1f} %"
        )
    for case in found["planted_effects"]:
        print(
            f"planted {100 * case['difference']:.1f} points, {case['rows']} rows, {case['seeds']} seeds, "
            f"{case.get('method', 'Welch t over seeds')}: found in {100 * case['share']:.1f} %, promised "
            f"{100 * case['promised']:.1f} %"
        )
    print(arguments.out)


if __name__ == "__main__":
    main()
