"""Whether the tensors of a file are those a network needs; if not, which, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmdit.weights.header import WeightsError

Shapes = Mapping[str, tuple[int, ...]]


def check_shapes(what: str, source: object, expected: Shapes, found: Shapes, cause: str = "") -> None:
    """Compare names and shapes, all of them, before anything is read.

    Args:
        what: the network, for the message.
        source: the file.
        expected, found: {name: shape}.
        cause: the likely one, where the caller knows it.

    Raises:
        WeightsError: counts what is missing, unexpected or of another shape, and names the first ten of each.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    wrong = [
        f"{name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    lists = ((missing, "missing"), (unexpected, "unexpected"), (wrong, "of another shape"))
    faults = [f"{len(names)} {kind}: {_listed(names)}" for names, kind in lists if names]
    if faults:
        raise WeightsError(
            f"{source} does not fit {what} ({len(expected)} tensors): {'; '.join(faults)}. Likely cause: "
            f"{cause or _guess(missing, unexpected, wrong, len(expected))}"
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _guess(missing: Sequence[str], unexpected: Sequence[str], wrong: Sequence[str], count: int) -> str:
    if any("lora" in name.lower() for name in unexpected):
        return "a LoRA was saved together with the weights; merge it first, or load the base model"
    if any(name.endswith((".scale_weight", ".weight_scale", "scaled_fp8", ".scale_input")) for name in unexpected):
        return "the weights are scaled fp8, which is not read; use the fp16 or bf16 file, or the plain fp8_e4m3fn one"
    if wrong:
        return "the config or the overrides are those of another model"
    if len(missing) > max(10, count // 10) and not unexpected:
        return "this is a part of a sharded set; give the folder, or the index.json"
    if unexpected:
        return "the file is of a variant or another family that has the same names in part"
    return "the file is incomplete; take it from the release again"
