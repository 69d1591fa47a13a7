"""Who may import whom: the rooms of the house, kept by reading the imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# room: the rooms of ours it may import (itself is always allowed)
ROOMS = {
    "mmdit": {"config", "denoiser", "encoders", "models", "pipeline", "presets", "weights"},
    "presets": set(),
    "registry": set(),
    "rng": set(),
    "untrusted": set(),
    "stopping": set(),
    "config": {"registry", "presets", "rng", "untrusted"},
    "denoiser": {"config", "registry", "rng"},
    "models": {"config", "registry", "rng", "denoiser"},
    "diffusion": {"config", "registry", "rng", "denoiser"},
    "sampling": {"config", "registry", "rng", "denoiser", "diffusion"},
    "releases": {"config", "registry", "rng", "denoiser", "diffusion", "sampling"},
    "encoders": {"config", "presets", "registry", "rng", "untrusted", "denoiser", "weights"},
    "weights": {"config", "presets", "registry", "rng", "untrusted", "denoiser", "models", "encoders", "checkpoint"},
    "data": {"config", "presets", "registry", "rng", "untrusted", "denoiser", "encoders", "weights"},
    "checkpoint": {"config", "registry", "untrusted"},
    "pipeline": {
        "config",
        "registry",
        "rng",
        "untrusted",
        "denoiser",
        "models",
        "diffusion",
        "sampling",
        "releases",
        "encoders",
        "weights",
        "data",
        "checkpoint",
    },
}
EVERYTHING = set(ROOMS) | {"train"}
ROOMS["train"] = EVERYTHING
ROOMS["mmdit_eval"] = (EVERYTHING - {"train"}) | {"mmdit"}

# heavy packages and the only rooms that may name them; True: only inside a function (lazily)
HEAVY = {
    "torch": (
        {
            "denoiser",
            "models",
            "diffusion",
            "sampling",
            "encoders",
            "weights",
            "data",
            "checkpoint",
            "pipeline",
            "train",
            "mmdit_eval",
        },
        False,
    ),
    "transformers": ({"encoders", "mmdit_eval"}, True),
    "datasets": ({"data"}, True),
    "accelerate": ({"train"}, False),
    "diffusers": (set(), True),
    "tensorboard": ({"train"}, True),
    "open_clip": ({"mmdit_eval"}, True),
    "torch_fidelity": ({"mmdit_eval"}, True),
    "timm": ({"mmdit_eval"}, True),
    "matplotlib": ({"mmdit_eval"}, True),
}


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "eval":
        return "mmdit_eval"
    return "mmdit" if parts[1] == "__init__" else parts[1]


def imports(path: Path):
    """Yield (module, inside a function or TYPE_CHECKING) of each import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))

    def walk(node, lazy):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, lazy
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import; write the room's full name"
                yield child.module, lazy
                for alias in child.names:
                    yield f"{child.module}.{alias.name}", lazy
            else:
                checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                yield from walk(child, lazy or inside or checking)

    yield from walk(tree, False)


FILES = sorted([*(ROOT / "mmdit").rglob("*.py"), *(ROOT / "eval").rglob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_the_rooms_below_it(path):
    room = room_of(path)
    for module, lazy in imports(path):
        top, *rest = module.split(".")
        if top == "mmdit" and rest and (ROOT / "mmdit" / rest[0]).with_suffix("").name in EVERYTHING:
            other = rest[0]
            assert other == room or other in ROOMS[room], f"{path}: {room} may not import mmdit.{other}"
        if top == "mmdit_eval":
            assert room == "mmdit_eval", f"{path}: the library may not import mmdit_eval"
        if top in HEAVY:
            allowed, lazily = HEAVY[top]
            assert room in allowed, f"{path}: {room} may not import {top}"
            assert lazy or not lazily, f"{path}: import {top} inside the function that needs it"


def test_scripts_are_imported_by_nobody():
    for path in [*FILES, *(ROOT / "scripts").glob("*.py")]:
        assert not any(module.split(".")[0] == "scripts" for module, _ in imports(path)), path


def test_importing_the_library_costs_neither_torch_nor_transformers():
    code = (
        "import sys, mmdit, mmdit.config; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_a_wrong_public_name_is_an_attribute_error():
    import mmdit

    with pytest.raises(AttributeError, match="no attribute 'Condishoning'"):
        mmdit.Condishoning  # noqa: B018
