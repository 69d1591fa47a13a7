"""adaLN by table: for known prompts and a known grid, a third of SD3's weights need not be there while sampling.

Every modulation of a transformer backbone is a linear map of c = time + pooled text, and nothing else reaches it. Over
one trajectory c takes T x S values (T times, S different pooled texts), so all modulations can be computed before the
first step, and the maps (12 D^2 of a joint block's 36 D^2 numbers) put away.

    with modulation_tables(denoiser, timesteps, pooled) as tables:
        ...                                  # the denoiser as always, for these times and these pooled texts only

The denoiser's code does not change: its `Modulation` modules are replaced by look-ups while the context lasts. Which
row is looked up is read where time and pooled text enter, so a call with another time or text is refused, not
answered wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmdit.models.layers import Modulation, timestep_embedding

Keep = Literal["place", "host", "nowhere"]
_SAME_TIME = 1e-5  # of embeddings in [-1, 1]; two times 0.001 apart of 1000 differ by 1e-3


class ModulationTables:
    """The look-ups in place of a denoiser's modulations; made and ended by `modulation_tables`, or by hand.

    Args:
        denoiser: a backbone with adaLN: MMDiT or CrossDiT.
        timesteps: network times that will be asked for, [T].
        pooled: pooled texts that will be asked for, [S, G]; equal rows are stored once. None where the backbone reads
            none.
        keep: where the replaced weights stay: `place`, on their device; `host`, in CPU memory; `nowhere`, freed, and
            `restore` needs them given.

    Tables are computed in the precision the denoiser would use: build them under the same autocast.

    Attributes:
        steps, rows: T and the number of different pooled texts.
        table_bytes, weight_bytes: of the tables, and of the weights they stand for.

    Raises:
        ValueError: the denoiser has no modulations, its tables are in place already, or shapes do not fit.
    """

    def __init__(self, denoiser: nn.Module, timesteps: Tensor, pooled: Tensor | None, keep: Keep = "place") -> None:
        names = [name for name, module in denoiser.named_modules() if isinstance(module, Modulation)]
        if any(isinstance(module, _LookUp) for module in denoiser.modules()):
            raise ValueError("this denoiser's modulations are tables already; restore them before building others")
        if not names or not hasattr(denoiser, "t_embedder"):
            raise ValueError(f"a {type(denoiser).__name__} has no adaLN modulations to tabulate; leave the tables out")
        if timesteps.ndim != 1 or not len(timesteps):
            raise ValueError(f"timesteps must be [T], at least one, got shape {list(timesteps.shape)}")
        self.denoiser, self.keep = denoiser, keep
        device = next(denoiser.parameters()).device
        self._place = _Place(timestep_embedding(timesteps.float().to(device)), _distinct(denoiser, pooled, device))
        self.steps = len(self._place.times)
        self.rows = 1 if self._place.pooled is None else len(self._place.pooled)
        self._replaced: dict[str, nn.Module] = {}
        self.table_bytes = self.weight_bytes = 0
        with torch.no_grad():
            c = self._vectors()  # [T S, D]
            for name in names:
                self._tabulate(name, c)
        for name, kind in (("t_embedder", _TimeEntrance), ("y_embedder", _PooledEntrance)):
            if getattr(denoiser, name, None) is not None:
                self._replace(name, kind(getattr(denoiser, name), self._place))

    def _vectors(self) -> Tensor:
        time: Tensor = self.denoiser.t_embedder(self._place.times)
        if self._place.pooled is None:
            return time
        text: Tensor = self.denoiser.y_embedder(self._place.pooled)
        return (time[:, None] + text[None]).flatten(0, 1)

    def _tabulate(self, name: str, c: Tensor) -> None:
        module = self.denoiser.get_submodule(name)
        assert isinstance(module, Modulation)
        table = torch.cat(module(c), dim=-1).reshape(self.steps, self.rows, -1)  # [T, S, count D]
        self.table_bytes += table.nbytes
        self.weight_bytes += sum(parameter.nbytes for parameter in module.parameters())
        self._replace(name, _LookUp(table, module.count, self._place))
        if self.keep == "host":
            module.to("cpu")
        elif self.keep == "nowhere":
            module.to("meta")

    def _replace(self, name: str, module: nn.Module) -> None:
        self._replaced[name] = self.denoiser.get_submodule(name)
        self.denoiser.set_submodule(name, module)

    def restore(self, weights: Mapping[str, Tensor] | None = None) -> None:
        """Put the modulations back where they were.

        Args:
            weights: the denoiser's state, or the modulations' part of it; needed with `keep="nowhere"`.

        Raises:
            ValueError: the weights are nowhere and are not given.
        """
        modulations = {name: module for name, module in self._replaced.items() if isinstance(module, Modulation)}
        wanted = [f"{name}.{key}" for name, module in modulations.items() for key in module.state_dict()]
        if self.keep == "nowhere":
            missing = [key for key in wanted if key not in (weights or {})]
            if missing:
                raise ValueError(
                    f"the weights of {len(modulations)} modulations were freed and {len(missing)} tensors of them are "
                    f"not given, first {missing[0]}; pass the denoiser's state, or load the denoiser again"
                )
        device = self._place.times.device
        for name, module in self._replaced.items():
            if name in modulations and weights is not None:
                state = {key: weights[f"{name}.{key}"].to(device) for key in module.state_dict()}
                module.load_state_dict(state, assign=True)
            elif self.keep == "host":
                module.to(device)
            self.denoiser.set_submodule(name, module)
        self._replaced = {}


@contextmanager
def modulation_tables(
    denoiser: nn.Module, timesteps: Tensor, pooled: Tensor | None, *, keep: Keep = "host"
) -> Iterator[ModulationTables]:
    """Answer the modulations of `denoiser` from tables while the context lasts; see `ModulationTables`.

    With `keep="nowhere"` they are not put back: the denoiser is good for these times and texts only.
    """
    tables = ModulationTables(denoiser, timesteps, pooled, keep)
    try:
        yield tables
    finally:
        if keep != "nowhere":
            tables.restore()


def table_bytes(denoiser: nn.Module, steps: int, rows: int, itemsize: int) -> tuple[int, int]:
    """Return (bytes of the tables, bytes of the weights they would stand for), before building anything."""
    modules = [module for module in denoiser.modules() if isinstance(module, Modulation)]
    numbers = sum(module[1].weight.shape[0] for module in modules)
    return steps * rows * numbers * itemsize, sum(p.nbytes for module in modules for p in module.parameters())


class _Place:
    """What the tables are for, and the row of each sample in the forward that is running."""

    def __init__(self, times: Tensor, pooled: Tensor | None) -> None:
        self.times, self.pooled = times, pooled  # [T, 256], [S, G]
        self.time: Tensor | None = None  # int64 [B], of the last times that came in
        self.text: Tensor | int = 0  # int64 [B]

    def find_time(self, embedded: Tensor) -> None:
        gap = (embedded[:, None] - self.times[None]).abs().amax(dim=-1)  # [B, T]
        nearest = gap.min(dim=1)
        if bool((nearest.values > _SAME_TIME).any()):
            raise ValueError(
                f"the modulation tables hold {len(self.times)} times, and this is none of them: they were built for "
                f"another grid. Build them for this one, or restore the modulations"
            )
        self.time = nearest.indices

    def find_text(self, pooled: Tensor) -> None:
        assert self.pooled is not None
        same = (pooled.to(self.pooled)[:, None] == self.pooled[None]).all(dim=-1)  # [B, S]
        if not bool(same.any(dim=1).all()):
            raise ValueError(
                f"the modulation tables hold {len(self.pooled)} pooled texts, and this is none of them: they were "
                f"built for other prompts. Build them for these, or restore the modulations"
            )
        self.text = same.int().argmax(dim=1)


class _TimeEntrance(nn.Module):
    """In place of `t_embedder`: notes which time came in."""

    def __init__(self, inner: nn.Module, place: _Place) -> None:
        super().__init__()
        self.inner, self.place = inner, place

    def forward(self, embedded: Tensor) -> Tensor:
        self.place.find_time(embedded)
        return self.inner(embedded)


class _PooledEntrance(_TimeEntrance):
    """In place of `y_embedder`: notes which pooled text came in."""

    def forward(self, pooled: Tensor) -> Tensor:
        self.place.find_text(pooled)
        return self.inner(pooled)


class _LookUp(nn.Module):
    """In place of a `Modulation`."""

    table: Tensor

    def __init__(self, table: Tensor, count: int, place: _Place) -> None:
        super().__init__()
        self.register_buffer("table", table, persistent=False)
        self.count, self.place = count, place

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        """[B, D], not read -> `count` tensors [B, 1, D]."""
        if self.place.time is None:
            raise ValueError("a modulation was asked for before a time came in; call the denoiser, not its parts")
        return self.table[self.place.time, self.place.text].unsqueeze(1).chunk(self.count, dim=-1)


def _distinct(denoiser: Any, pooled: Tensor | None, device: torch.device) -> Tensor | None:
    """Return the different rows of `pooled`, in the dtype the denoiser reads them in."""
    embedder = getattr(denoiser, "y_embedder", None)
    if embedder is None:
        return None
    if pooled is None or pooled.ndim != 2:
        got = "none" if pooled is None else f"shape {list(pooled.shape)}"
        raise ValueError(f"this denoiser reads a pooled text: pooled must be [S, G], got {got}")
    rows = pooled.to(device=device, dtype=next(embedder.parameters()).dtype)
    return torch.unique(rows, dim=0)
