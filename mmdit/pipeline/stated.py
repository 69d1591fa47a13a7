"""What the files of a released model state about its noise: fine-tunes change what their family has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmdit.config import DiffusionConfig
from mmdit.registry import lookup
from mmdit.releases import Release
from mmdit.untrusted import read_json
from mmdit.weights.files import WeightFiles

# diffusers' names and ours
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
_STEPS = 1000  # of every family's training
# what would change the noise and is not known here: field of a scheduler_config.json -> what it means
_UNKNOWN = {
    "use_dynamic_shifting": "a shift that grows with the picture",
    "rescale_betas_zero_snr": "noise that drowns the picture wholly at its end",
    "trained_betas": "a table of betas of its own",
}


def follow_stated(release: Release, path: Path, files: WeightFiles) -> Release:
    """Take schedule and prediction from a diffusers folder's scheduler, or from the marks in a single file.

    Args:
        path: what the user gave.
        files: the denoiser's.

    Raises:
        ValueError: something is stated that is not known here; the message names the file and the field.
    """
    scheduler = path / "scheduler" / "scheduler_config.json"
    return _follow_folder(release, scheduler) if scheduler.is_file() else _follow_marks(release, files)


def _follow_folder(release: Release, file: Path) -> Release:
    try:
        stated = read_json(file)
    except ValueError as error:
        raise ValueError(f"{error}; download it again") from error
    if not isinstance(stated, dict):
        raise ValueError(f"{file} is a {type(stated).__name__}, not a table; download it again")
    for name, meaning in _UNKNOWN.items():
        if stated.get(name):
            raise ValueError(f"{file} states {name} ({meaning}), which no released family has and is not known here")
    kind = str(stated.get("_class_name", ""))
    if kind.startswith("EDM"):
        raise ValueError(f"{file} states {kind}: noise scaled as in EDM, which no released family has")
    if stated.get("num_train_timesteps", _STEPS) != _STEPS:
        steps = stated["num_train_timesteps"]
        raise ValueError(f"{file} states num_train_timesteps {steps!r}; every released family has {_STEPS}")
    tree = release.diffusion.model_dump()
    if tree["schedule"]["name"] == "rectified_flow":
        tree["schedule"]["shift"] = _number(file, stated, "shift", tree["schedule"]["shift"])
    else:
        tree["prediction"] = _known(file, stated, "prediction_type", PREDICTIONS, "epsilon")
        tree["schedule"]["betas"] = _known(file, stated, "beta_schedule", BETAS, "scaled_linear")
        for name in ("beta_start", "beta_end"):
            tree["schedule"][name] = _number(file, stated, name, tree["schedule"][name])
    return _changed(release, tree, file)


def _follow_marks(release: Release, files: WeightFiles) -> Release:
    """Read what tools write into single files: the empty tensors `v_pred` and `ztsnr`, modelspec in the header."""
    tree = release.diffusion.model_dump()
    if tree["schedule"]["name"] == "rectified_flow":
        return release
    strange = next((key for key in files if key == "ztsnr" or key.startswith("edm_")), None)
    if strange is not None:
        what = _UNKNOWN["rescale_betas_zero_snr"] if strange == "ztsnr" else "noise scaled as in EDM"
        raise ValueError(f"{files.path} is marked {strange!r} ({what}), which no released family has")
    if "v_pred" not in files and files.metadata.get("modelspec.prediction_type") != "v":
        return release
    return _changed(release, {**tree, "prediction": "v"}, files.path)


def _known(file: Path, stated: Mapping[str, Any], field: str, table: Mapping[str, str], default: str) -> str:
    try:
        return lookup(table, str(stated.get(field) or default), field)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _number(file: Path, stated: Mapping[str, Any], field: str, default: float) -> float:
    value = stated.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{file} states {field} {value!r}, which is no number; download it again")
    return value


def _changed(release: Release, tree: Mapping[str, Any], file: Path) -> Release:
    try:
        return replace(release, diffusion=DiffusionConfig.model_validate(tree))
    except ValueError as error:
        raise ValueError(f"{file} states noise that makes no sense: {error}") from error
