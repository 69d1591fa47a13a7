"""The words of `scripts/evaluate.py`: what each command reads, does and prints. Torch is imported after parsing."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdit.config import ConfigError, SuiteConfig, load_suite, parse_overrides, validate
from mmdit_eval.comparison import check_place, compare, find_result, write_result
from mmdit_eval.scores import SCORES, shown, shown_interval

USAGE = """Judge runs and pictures.

  evaluate.py RUN [--suite configs/eval/x.yaml] [--num_images 512 ...]    a run, by a suite
  evaluate.py images FAKE --against REAL [--captions FILE]                pictures against pictures, without a run
  evaluate.py statistics REAL --out real.npz                              mean and covariance, for later
  evaluate.py compare A B                                                 two results, pair by pair
  evaluate.py sweep RUN --scales 0 1 2 4                                  guidance: distance against CLIP-score

Each with --help. A run's result goes to RUN/eval/<suite>-<images_seen>.json and is kept when it is there already. With
overrides the suite is called custom-<suite>, unless --name says otherwise: a study's own results stay as they are.
Several processes: torchrun --nproc_per_node N scripts/evaluate.py ...
"""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit code: 0; 2 for what the user can mend (the message is on stderr); 3 for a damaged checkpoint.
    """
    words = list(sys.argv[1:] if words is None else words)
    command: Callable[[Sequence[str]], int] = run_command
    if words and words[0] in COMMANDS:
        command, words = COMMANDS[words[0]], words[1:]
    as_it_was, warnings.formatwarning = warnings.formatwarning, _plain_warning
    try:
        return command(words)
    except (ValueError, OSError, ModuleNotFoundError) as error:  # ConfigError and DataError are ValueErrors
        print(error, file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "CheckpointError":
            raise
        print(error, file=sys.stderr)
        return 3
    finally:
        warnings.formatwarning = as_it_was


def _plain_warning(message: Warning | str, *_: Any, **__: Any) -> str:
    """Return what a warning says, without the line of code that it comes from."""
    return f"{message}\n"


def run_command(words: Sequence[str]) -> int:
    """Judge a run by a suite."""
    parser = _parser("evaluate.py", USAGE)
    parser.add_argument("run", type=Path, help="run folder")
    suite, arguments = _suite(parser, words)
    from mmdit_eval.distribution import Share
    from mmdit_eval.report import print_result
    from mmdit_eval.suite import evaluate_run  # torch from here on

    share = Share.from_environment()
    result = evaluate_run(arguments.run, suite, arguments.checkpoint, share=share)
    if share.first:
        print_result(result)
    return 0


def sweep_command(words: Sequence[str]) -> int:
    """Judge a run at several guidance scales."""
    parser = _parser("evaluate.py sweep", "Draw distance against CLIP-score over guidance scales.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--scales", type=float, nargs="+", default=[0, 1, 1.5, 2, 3, 4, 6, 8, 12, 20])
    suite, arguments = _suite(parser, words)
    from mmdit_eval.sweep import sweep_run

    plot, table = sweep_run(arguments.run, arguments.scales, suite, arguments.checkpoint)
    print(f"{table}\n{plot}")
    return 0


def images_command(words: Sequence[str]) -> int:
    """Judge pictures against pictures or statistics."""
    parser = _parser("evaluate.py images", "Judge pictures without a run.")
    parser.add_argument("fake", help="folder, list (.txt), table (.parquet), array (.npy, .npz)")
    parser.add_argument("--against", required=True, help="the same, or statistics (.npz with mu and sigma)")
    parser.add_argument("--captions", help="captions of FAKE: .txt, .json, .jsonl, .csv")
    parser.add_argument("--caption-column", help="of FAKE where it is a table: its captions")
    parser.add_argument("--train", help="pictures of the training, for the metric memorisation")
    parser.add_argument(
        "--metrics", nargs="+", default=["frechet", "kernel"],
        help="frechet, frechet_infinity, kernel, cmmd, precision_recall, inception_score, memorisation, clip_score, "
        "retrieval",
    )  # fmt: skip
    parser.add_argument("--clip", help="extractor of CLIP-score and retrieval, where --extractor has no text tower")
    parser.add_argument("--long-captions", default="truncate", choices=["truncate", "error", "chunk"])
    parser.add_argument("--against-sizes", default="any", help="as --sizes, for REAL")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    _add_set_options(parser)
    arguments = parser.parse_args(words)
    from mmdit_eval.distribution import Share
    from mmdit_eval.set_comparison import evaluate_images

    result = evaluate_images(
        arguments.fake,
        arguments.against,
        _set_options(arguments),
        captions=arguments.captions,
        train=arguments.train,
        out=arguments.out,
        share=Share.from_environment(),
    )
    if result is not None:
        print_set(result)
    return 0


def statistics_command(words: Sequence[str]) -> int:
    """Write the statistics of a set of pictures."""
    parser = _parser("evaluate.py statistics", "Write mean and covariance of features (mu, sigma).")
    parser.add_argument("images", help="folder, list (.txt), table (.parquet), array (.npy, .npz)")
    parser.add_argument("--out", type=Path, required=True, help=".npz file")
    _add_set_options(parser)
    arguments = parser.parse_args(words)
    if arguments.out.suffix != ".npz":
        raise ValueError(f"--out must end with .npz, got {arguments.out}")
    from mmdit_eval.distribution import Share
    from mmdit_eval.set_comparison import save_statistics

    share = Share.from_environment()
    count = save_statistics(arguments.images, arguments.out, _set_options(arguments), share=share)
    if share.first:
        print(f"{arguments.out}: {count:,} pictures by {arguments.extractor}")
    return 0


def compare_command(words: Sequence[str]) -> int:
    """Compare two stored results picture by picture."""
    parser = _parser("evaluate.py compare", "Compare two results picture by picture; unlike stamps are refused.")
    parser.add_argument("a", type=Path, help="result (.json), or run folder: that of its last judged checkpoint")
    parser.add_argument("b", type=Path, help="the same; the table shows a - b")
    parser.add_argument("--varies", nargs="*", default=[], help="inference fields that may differ")
    parser.add_argument("--out", type=Path, help="JSON file for the differences")
    arguments = parser.parse_args(words)
    if arguments.out is not None:
        check_place(arguments.out)
    a, b = find_result(arguments.a), find_result(arguments.b)
    found = compare(a, b, arguments.varies)
    if not found:
        raise ValueError("the two results share no score that is known picture by picture, so nothing can be paired")
    print_comparison(a, b, found)
    if arguments.out is not None:
        write_result(arguments.out, {"a": a["run"], "b": b["run"], "varies": arguments.varies, "differences": found})
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "images": images_command,
    "statistics": statistics_command,
    "compare": compare_command,
    "sweep": sweep_command,
}


def _parser(program: str, text: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=program, description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def _suite(parser: argparse.ArgumentParser, words: Sequence[str]) -> tuple[SuiteConfig, argparse.Namespace]:
    """Parse what commands on a run share: the suite, its overrides, the checkpoint."""
    parser.add_argument("--suite", type=Path, help="YAML of the suite; default: every field's default")
    parser.add_argument("--checkpoint", type=Path, help="one checkpoint of the run; default: the newest")
    arguments, overrides = parser.parse_known_args(words)
    tree = parse_overrides(overrides)
    suite = load_suite(arguments.suite, overrides) if arguments.suite else validate(SuiteConfig, tree, "overrides")
    if tree and "name" not in tree:
        suite = suite.model_copy(update={"name": f"custom-{suite.name}"})
    if not (arguments.run / "config.yaml").is_file():
        known = ", ".join(COMMANDS)
        raise ConfigError(
            f"{arguments.run} is no run folder: it has no config.yaml; give runs/<study>/<run>, or a command ({known})"
        )
    return suite, arguments


def _add_set_options(parser: argparse.ArgumentParser) -> None:
    known = "inception_fid, inception_clean, dinov2_vitl14, timm:NAME, clip:FOLDER, openclip:NAME, tiny_clip"
    parser.add_argument("--extractor", default="inception_fid", help=f"{known}; @FILE behind it names its weights")
    parser.add_argument("--extractor-weights", help="file or folder of its weights; default: $MMDIT_EVAL_WEIGHTS")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="bf16: not to be published")
    parser.add_argument("--sizes", default="equal", help="equal, any, or pixels: the middle square resized to that")
    parser.add_argument("--split", default="train", help="of a table")
    parser.add_argument("--image-column", default="image", help="of a table")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of random subsets")
    parser.add_argument("--cache", type=Path, help="folder of kept features; default: $MMDIT_EVAL_CACHE")
    parser.add_argument("--no-cache", action="store_true", help="keep no features")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _set_options(arguments: argparse.Namespace) -> Any:
    from mmdit_eval.set_comparison import SetOptions, cache_folder

    given = vars(arguments)
    return SetOptions(
        extractor=arguments.extractor,
        weights=arguments.extractor_weights,
        precision=arguments.precision,
        clip=given.get("clip"),
        metrics=tuple(given.get("metrics", ())),
        long_captions=given.get("long_captions", "truncate"),
        sizes=arguments.sizes,
        against_sizes=given.get("against_sizes", "any"),
        split=arguments.split,
        image_column=arguments.image_column,
        caption_column=given.get("caption_column"),
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        cache=cache_folder(arguments.cache, not arguments.no_cache),
        progress=not arguments.quiet,
    )


def print_set(result: Mapping[str, Any]) -> None:
    """Print the scores of a set of pictures."""
    split, protocol = result["splits"]["images"], result["stamp"]["protocol"]
    _say(f"{split['num_images']:,} pictures of {result['run']} against {result['against']}")
    table = _table("value", "interval")
    for name, estimate in split["scores"].items():
        table.add_row(_label(name), shown(name, estimate["value"]), _interval(name, estimate))
    _console().print(table)
    extractor = protocol["extractor"]
    _say(f"  {extractor['name']} ({extractor['hash']}, {extractor['precision']}); {extractor['resize']}")


def print_comparison(a: Mapping[str, Any], b: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Print two results and their difference, score by score."""
    _say(f"a: {_judged(a)}    b: {_judged(b)}    paired by picture")
    table = _table("split", "a", "b", "a − b", "interval")
    for split, scores in found.items():
        for name, estimate in scores.items():
            values = [side["splits"][split]["scores"].get(name, {}).get("value") for side in (a, b)]
            shown_values = [shown(name, value) for value in (*values, estimate["value"])]
            table.add_row(_label(name), split, *shown_values, _interval(name, estimate))
    _console().print(table)


def _judged(result: Mapping[str, Any]) -> str:
    """Name what was judged; of a run also the checkpoint and the suite."""
    if "suite" not in result:
        return str(result["run"])
    return f"{result['run']} at {result['images_seen']:,} images by {result['suite']}"


def _label(name: str) -> str:
    return SCORES[name].label if name in SCORES else name


def _interval(name: str, estimate: Mapping[str, Any]) -> str:
    return shown_interval(name, estimate["low"], estimate["high"]) or f"– ({estimate['method']})"


def _say(line: str) -> None:
    _console().print(line, highlight=False, soft_wrap=True)


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table()
    table.add_column("score")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if Console().is_terminal else 120)
