"""Train the embedded encoders: `python scripts/train_tiny_encoders.py [--part vae|t5|clip|judge|all]`.

Needs data/emoji.parquet (`python scripts/build_emoji.py`). Minutes: vae 25, t5 14, clip 10 (one busy core), judge 5.
Each part writes its files into the package and its record (steps, seed, hardware, measured quality) beside them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Arguments:
    """Train the embedded encoders."""

    part: Literal["vae", "t5", "clip", "judge", "all"] = "all"
    out: Path = Path("mmdit/encoders/tiny")
    emoji: Path = Path("data/emoji.parquet")
    seed: int = 0


def main() -> int:
    arguments = tyro.cli(Arguments, description=__doc__)
    if not arguments.emoji.is_file():
        print(f"{arguments.emoji} is missing: `python scripts/build_emoji.py --out {arguments.emoji}`", file=sys.stderr)
        return 2
    chosen = ("vae", "t5", "clip", "judge") if arguments.part == "all" else (arguments.part,)
    if "vae" in chosen:
        from mmdit_eval.vae_quality import add_quality

        from mmdit.train.tiny_vae import train_vae

        train_vae(arguments.out, emoji_path=arguments.emoji, seed=arguments.seed)
        print(json.dumps(add_quality(arguments.out, arguments.emoji), indent=1))
    if "t5" in chosen or "clip" in chosen:
        from mmdit.train.recipe import write_description
        from mmdit.train.tiny_clip import train_and_measure_clip
        from mmdit.train.tiny_text import train_t5

        trainers = {"t5": train_t5, "clip": train_and_measure_clip}
        for part in (name for name in ("t5", "clip") if name in chosen):  # measuring the pair loads the T5 as well
            result = trainers[part](arguments.out, emoji_path=arguments.emoji, seed=arguments.seed)
            write_description(arguments.out, part, result)
            print(json.dumps(result["quality"], indent=1))
    if "judge" in chosen:
        from mmdit_eval.judge_training import train_judge

        print(json.dumps(train_judge(emoji_path=arguments.emoji, seed=arguments.seed)["quality"], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
