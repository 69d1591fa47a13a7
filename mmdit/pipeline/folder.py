"""Prompts to a folder of pictures: what scripts/sample.py does."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mmdit.checkpoint import MANIFEST, CheckpointError, weights_stem
from mmdit.config import ConfigError
from mmdit.pipeline.machine import configure_cpu
from mmdit.pipeline.pictures import image_grid, save_image
from mmdit.pipeline.released import plan_released
from mmdit.pipeline.request import Sizes
from mmdit.pipeline.sources import is_released
from mmdit.pipeline.text_to_image import TextToImage
from mmdit.registry import unknown
from mmdit.sampling import SAMPLERS
from mmdit.weights.denoiser import FOLDERS
from mmdit.weights.files import open_weights

OK, WRONG_INPUT, BAD_CHECKPOINT, OUT_OF_MEMORY, INTERRUPTED = 0, 2, 3, 4, 130  # exit codes


def sample_to_folder(
    run: Path | None,
    prompt: Sequence[str],
    negative: str | None = None,
    seed: int = 0,
    num_images: int = 1,
    steps: int | None = None,
    sampler: str | None = None,
    guidance: float | None = None,
    negative_guidance: str | None = None,
    size: str | int | None = None,
    weights: str = "ema",
    out: Path = Path("samples"),
    device: str | None = None,
    batch_size: int | None = None,
    dry_run: bool = False,
    skip_layer: bool = False,
    original_size: str | None = None,
    crop: str | None = None,
    target_size: str | None = None,
    **released: Any,
) -> int:
    """Draw `num_images` images of each prompt into a folder, settings in each PNG.

    Args:
        run: run folder or checkpoint; None: `weights` is the path of released weights.
        size, original_size, target_size, crop: "HEIGHTxWIDTH" in pixels (crop: "TOPxLEFT"), or one number.
        released: of released weights: vae, text, spiece, family, dtype, offload, tables, t5_length; None and False are
            left out.

    Returns:
        Exit code: 0; 2 for a run, file, name or size that is not there or does not fit (the message is on stderr); 3
        for a bad checkpoint; 4 where memory did not suffice; 130 where interrupted: finished pictures are kept.
    """
    if sampler is not None and sampler not in SAMPLERS:  # before anything is loaded
        print(unknown("sampler", sampler, SAMPLERS), file=sys.stderr)
        return WRONG_INPUT
    logging.basicConfig(format="%(message)s")
    try:
        configure_cpu()
        path, kind = _what(run, weights)
        given = {name: value for name, value in released.items() if value not in (None, False, ())}
        if "text" in given:
            given["text"] = parse_text(given["text"])
        if dry_run:
            _print_plan(path, device, given)
            return OK
        sizes = _sizes(original_size, crop, target_size)
        options = {
            "seed": seed, "num_steps": steps, "sampler": sampler, "guidance_scale": guidance,
            "negative_guidance": negative_guidance, "size": parse_pair(size, "size"),
        }  # fmt: skip
        if run is None:
            given["lazy"] = True  # a wrong size is told before gigabytes are read
        pipeline = TextToImage.load(path, kind, device=device, **given)
        more = {"batch_size": batch_size, "skip_layer": skip_layer, "sizes": sizes}
        return _draw(pipeline, [text for text in prompt for _ in range(num_images)], negative, out, options, more)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return BAD_CHECKPOINT
    except (FileNotFoundError, NotADirectoryError, ValueError, ConfigError) as error:
        print(error, file=sys.stderr)
        return WRONG_INPUT
    except (torch.OutOfMemoryError, MemoryError) as error:
        print(
            f"memory did not suffice ({error}). Try --offload encoders or blocks, --dtype bf16, a smaller --size or "
            f"--batch-size; --dry-run says what each part takes",
            file=sys.stderr,
        )
        return OUT_OF_MEMORY
    except KeyboardInterrupt:
        print(f"interrupted; finished pictures are in {out}", file=sys.stderr)
        return INTERRUPTED


def _draw(
    pipeline: TextToImage,
    prompts: Sequence[str],
    negative: str | None,
    out: Path,
    options: Mapping[str, Any],
    more: Mapping[str, Any],
) -> int:
    """Draw and save batch by batch; the bar counts pictures of a run, and sampling steps of a release."""
    steps = options["num_steps"] or pipeline.sampling.num_steps
    batch_size = more["batch_size"] or pipeline.batch_size
    batches = -(-len(prompts) // batch_size)
    count = {"total": batches * steps, "unit": " steps"} if pipeline.release else {"unit": " images"}
    drawn: list[np.ndarray] = []

    def update(count: int) -> None:
        bar.update(1 if pipeline.release else count)

    report: dict[str, Any] = {"on_step" if pipeline.release else "progress": update}
    coming = pipeline.images(prompts, negative, **options, **more, **report)  # checks what is asked: no bar before that
    bar = tqdm(**{"total": len(prompts), **count})
    with bar:
        for images in coming:
            for image in images:
                index = len(drawn)
                note = pipeline.settings(
                    prompt=prompts[index], negative_prompt=negative, index=index, **options, **_notes(more)
                )
                save_image(image, out / f"{index:05d}.png", note)
                drawn.append(image)
    if len(drawn) > 1:
        note = pipeline.settings(prompts=list(dict.fromkeys(prompts)), **options, **_notes(more))
        save_image(image_grid(np.stack(drawn)), out / "grid.png", note)
    print(f"{len(drawn)} image(s) in {out}")
    return OK


def _notes(more: Mapping[str, Any]) -> dict[str, Any]:
    """Return of the further options what decides a picture."""
    sizes = more["sizes"]
    notes = {"skip_layer": True} if more["skip_layer"] else {}
    return notes if sizes is None else {**notes, "sizes": sizes._asdict()}


def _what(run: Path | None, weights: str) -> tuple[Path, str]:
    """Return what to load and, of a run, which weights.

    Raises:
        ValueError: both are given, or neither; or released weights that are none.
        FileNotFoundError: nothing at the path of released weights.
    """
    if run is not None:
        try:
            weights_stem(weights)
        except ValueError as error:
            hint = "with a run, --weights is ema or raw; the path of released weights stands there without a run"
            raise ValueError(f"{error}; {hint}") from None
        return run, weights
    if weights in ("ema", "raw"):
        raise ValueError("nothing to draw with: give a run folder, or --weights FILE of a released model")
    path = Path(weights)
    if not is_released(path):
        if (path / "checkpoints").is_dir() or (path / MANIFEST).is_file():
            raise ValueError(f"{path} is a run of ours, not released weights: give it without --weights")
        open_weights(path, FOLDERS)  # says what is the matter
    return path, "ema"


def _print_plan(path: Path, device: str | None, given: Mapping[str, Any]) -> None:
    if not is_released(path):
        raise ValueError("--dry-run tells the memory of released weights; give their path by --weights")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    known = {name: given[name] for name in ("vae", "text", "family", "dtype", "offload") if name in given}
    plan, level = plan_released(path, device=place, **known)
    print(plan.table(level))


def parse_pair(value: str | int | None, name: str) -> int | tuple[int, int] | None:
    """Read "HEIGHTxWIDTH" or one number.

    Raises:
        ValueError: it is neither.
    """
    if value is None or isinstance(value, int):
        return value
    match = re.fullmatch(r"(\d+)(?:[xX](\d+))?", value.strip())
    if match is None:
        raise ValueError(f"--{name} is one number or HEIGHTxWIDTH such as 768x1344, got {value!r}")
    return int(match[1]) if match[2] is None else (int(match[1]), int(match[2]))


def parse_text(values: Sequence[str] | str) -> str | dict[str, str]:
    """Read one path, or clip_l=PATH clip_g=PATH t5=PATH.

    Raises:
        ValueError: a mixture, or several paths without names.
    """
    values = [values] if isinstance(values, str) else list(values)
    named = dict(value.split("=", 1) for value in values if "=" in value)
    if len(values) == 1 and not named:
        return values[0]
    if len(named) != len(values):
        raise ValueError(f"--text is one path, or clip_l=PATH clip_g=PATH t5=PATH, got {' '.join(values)}")
    return named


def _sizes(original: str | None, crop: str | None, target: str | None) -> Sizes | None:
    if original is None and crop is None and target is None:
        return None

    def pair(value: str | None, name: str) -> tuple[int, int] | None:
        read = parse_pair(value, name)
        return (read, read) if isinstance(read, int) else read

    return Sizes(pair(original, "original-size"), pair(crop, "crop") or (0, 0), pair(target, "target-size"))
