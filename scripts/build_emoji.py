"""Draw the emoji data set: `python scripts/build_emoji.py [--out data/emoji.parquet]`, some ten seconds.

Needs Debian's packages fonts-noto-color-emoji and unicode-data, or their files by --font and --names.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from mmdit.data.emoji import FONT, NAMES, build_emoji


@dataclass(frozen=True)
class Arguments:
    """Draw the emoji data set into one parquet file."""

    out: Path = Path("data/emoji.parquet")
    font: Path = FONT
    names: Path = NAMES


def main() -> int:
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        counts = build_emoji(arguments.out, arguments.font, arguments.names)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"{arguments.out}: {counts['images']:,} images of {counts['sequences']:,} sequences "
        f"({counts['duplicates']} drawn alike left out); {counts['seen']:,} seen, {counts['heldout']:,} held out; "
        f"{counts['toned']:,} with skin tones over {counts['bases']} bases"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
