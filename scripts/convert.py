"""Convert weights: python scripts/convert.py IN OUT --layout diffusers [--dtype bf16] [--shard-size 2GB] [--part all].

IN is a .safetensors file, a diffusers folder, or a run of ours; OUT a .safetensors file or a folder. Without --dtype
every weight keeps its bits. python scripts/convert.py --inspect IN says what is in a file and writes nothing.
"""

import argparse
import sys
from pathlib import Path

from mmdit.weights.header import WeightsError, refuse_unreadable


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", type=Path, help="what to read")
    parser.add_argument("out", type=Path, nargs="?", help="what to write")
    parser.add_argument("--inspect", action="store_true", help="print what is in the source, write nothing")
    parser.add_argument("--layout", choices=("original", "diffusers"), help="names to write under")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16", "fp8"), help="default: each tensor's own")
    parser.add_argument("--shard-size", help="largest file, such as 2GB; default: one file")
    parser.add_argument("--part", choices=("denoiser", "vae", "text", "all"), default="denoiser")
    arguments = parser.parse_args()
    if not arguments.inspect and (arguments.out is None or arguments.layout is None):
        parser.error("give OUT and --layout, or --inspect")
    try:
        refuse_unreadable(arguments.source)
    except WeightsError as error:
        print(error, file=sys.stderr)
        return 2
    from mmdit.weights.convert import DTYPES, convert  # torch from here on
    from mmdit.weights.inspect import inspect_weights, print_inspection

    try:
        if arguments.inspect:
            print_inspection(inspect_weights(arguments.source))
            return 0
        dtype, options = DTYPES.get(arguments.dtype), {"shard_size": arguments.shard_size, "part": arguments.part}
        for file in convert(arguments.source, arguments.out, arguments.layout, dtype=dtype, **options):
            print(file)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
