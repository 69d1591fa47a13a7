"""What a study will run: every cell's config after matching and budget, what it costs, and which rows share a training.

    plan = make_plan(load_study("configs/studies/injection.yaml"))

Nothing is trained here; `scripts/ablate.py --dry-run` prints it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from mmdit.config import (
    Cells,
    ConfigError,
    ImagesConfig,
    ModelConfig,
    RunConfig,
    ShardsConfig,
    StudyConfig,
    SuiteConfig,
    TrainConfig,
    confounded_rows,
    reference_row,
    row_configs,
    to_tree,
    trainings,
)
from mmdit.data import make_dataset
from mmdit.models.matching import By, Match, NoMatchError, solve
from mmdit.registry import lookup
from mmdit_eval.cost import Cost, check_match, cost_of, drawing_cost, latent_size, sampling_meter
from mmdit_eval.metrics import METRICS
from mmdit_eval.scores import SCORES
from mmdit_eval.suite import check_suite, too_few

TRAINING = 3  # FLOP of an update over those of its forward: the backward pass takes two more
STATED_RATE = 150e9  # FLOP/s of training, one worker: what rows of results/injection reached at best is 82e9 to 201e9


class Plan(NamedTuple):
    """A study, worked out.

    Attributes:
        cells: {row: {seed: config}}, widths and budgets solved.
        costs: of each row.
        trained_as: {row: the row whose networks it uses}; itself, unless rows differ in sampling only.
        confounded: {row: fields outside `varies` in which it differs from the reference}.
        notes: {row: what matching changed}.
        remarks: what a reader of the grid should know about budgets and judging.
    """

    cells: Cells
    costs: dict[str, Cost]
    trained_as: dict[str, str]
    confounded: dict[str, list[str]]
    notes: dict[str, str]
    remarks: tuple[str, ...] = ()

    def first(self, row: str) -> RunConfig:
        return next(iter(self.cells[row].values()))

    def training_flops(self, row: str) -> float:
        """FLOP of training one cell; a budget in seconds has none to tell beforehand."""
        images = self.first(row).train.images
        return float("nan") if self.first(row).train.seconds else TRAINING * self.costs[row].flops * images

    def describe(self, row: str) -> dict[str, Any]:
        """Return what study.json keeps of a row."""
        config = self.first(row)
        return {
            **self.costs[row]._asdict(), "backbone": config.model.name, "sampling": to_tree(config.sampling),
            "trained_as": self.trained_as[row], "confounded": self.confounded.get(row, []),
            "match": self.notes.get(row, ""), "data": config.data.name,
        }  # fmt: skip


def make_plan(study: StudyConfig, source: str = "study") -> Plan:
    """Resolve, match and price every row.

    Raises:
        ConfigError: a row that cannot be used, or that no widths bring to the reference; metrics the data cannot serve.
        FileNotFoundError: the data have not been built.
    """
    for score in study.claims.scores:
        try:
            lookup(SCORES, score, "score")
        except ValueError as error:
            raise ConfigError(f"{source}: claims.scores: {error}") from None
    cells = row_configs(study, source)
    confounded = confounded_rows(study, cells)
    for configs in cells.values():
        suite = check_suite(study.suite, next(iter(configs.values())))
        _check_measured(study, suite.metrics, source)
        for split in study.claims.splits:
            if split not in suite.splits:
                raise ConfigError(f"{source}: claims.splits has {split!r}, the suite's splits are {suite.splits}")
    remarks = _remarks_on_targets(study, cells, source)
    cells, notes = _matched(study, cells, source)
    costs = {row: cost_of(next(iter(configs.values()))) for row, configs in cells.items()}
    if study.match is not None:  # solved rows too: they were solved for texts of even streams
        mismatch = check_match(costs, study.match.within, study.match.by)
        if mismatch:
            raise ConfigError(f"{source}: {mismatch}")
    if study.budget is not None and study.budget.by == "flops":
        for row in cells:
            images = study.budget.amount / (TRAINING * costs[row].flops)
            cells[row] = {seed: _with_images(config, images, row) for seed, config in cells[row].items()}
    if study.equal_flops:
        cells = _equal_drawing(study, cells, costs)
    costs = {row: drawing_cost(next(iter(cells[row].values())), cost) for row, cost in costs.items()}
    first = next(iter(next(iter(cells.values())).values()))
    remarks += _remarks_on_warmup(cells) + remarks_on_judging(study.suite, first)
    return Plan(cells, costs, trainings(cells), confounded, notes, remarks)


def _check_measured(study: StudyConfig, metrics: Sequence[str], source: str) -> None:
    """Refuse a claim that no metric of the suite would ever decide."""
    measured = [score for name in metrics for score in METRICS[name].scores]
    for score in study.claims.scores:
        if score not in measured:
            givers = [name for name, metric in METRICS.items() if score in metric.scores]
            raise ConfigError(
                f"{source}: claims.scores has {score!r}, which suite.metrics {list(metrics)} do not measure; add "
                f"{givers[0]!r} to them, or claim one of {measured}"
            )


def _remarks_on_targets(study: StudyConfig, cells: Cells, source: str) -> tuple[str, ...]:
    """Say that losses of different targets do not compare; refuse a claim on them."""
    configs = [next(iter(seeds.values())) for seeds in cells.values()]
    targets = {(config.diffusion.prediction, config.diffusion.schedule.model_dump_json()) for config in configs}
    if len(targets) == 1 or "validation_loss" not in study.suite.for_data(configs[0].data.name).metrics:
        return ()
    told = (
        f"rows are trained on {len(targets)} targets (prediction, schedule), whose validation losses are different "
        f"numbers; 'common_loss' in suite.metrics is one error for all"
    )
    if "validation_loss" in study.claims.scores:
        raise ConfigError(f"{source}: claims.scores has 'validation_loss', but {told}")
    return (f"{told}. The report leaves validation_loss out",)


def _remarks_on_warmup(cells: Cells) -> tuple[str, ...]:
    """Say which rows' budgets end within their warm-up."""
    rows: dict[str, list[str]] = {}
    for row, configs in cells.items():
        warning = next(iter(configs.values())).train.unreached_lr()
        if warning is not None:
            rows.setdefault(warning, []).append(row)
    return tuple(f"{', '.join(named)}: {warning}" for warning, named in rows.items())


def remarks_on_judging(suite: SuiteConfig, config: RunConfig) -> tuple[str, ...]:
    """Say where pictures of one's own are fewer than the suite asks for, or are not what its judge knows.

    Raises:
        ConfigError: a split of fewer than two pictures.
    """
    if not isinstance(config.data, ImagesConfig | ShardsConfig):
        return ()
    found, suite = [], suite.for_data(config.data.name)
    for split in suite.splits:
        count = len(make_dataset(config.data, split))
        if count < 2:
            raise ConfigError(too_few(split, count))
        if count < suite.num_images:
            found.append(
                f"judged on {count:,} pictures ({split}), suite.num_images asks for {suite.num_images:,}: "
                f"data.val_fraction {config.data.val_fraction:g} keeps no more out of training"
            )
    if suite.extractor == "tiny_clip":
        found.append(
            "distances stand on the features of tiny_clip, which knows shapes and emoji only; for other pictures set "
            "suite.extractor (inception_fid, dinov2_vitl14, ...: docs/metrics.md)"
        )
    return tuple(found)


def _matched(study: StudyConfig, cells: Cells, source: str) -> tuple[Cells, dict[str, str]]:
    """Solve each row's widths for the reference row's parameters or FLOPs, where the study asks for it."""
    if study.match is None or not study.match.solve:
        return cells, {}
    reference = reference_row(study, cells)
    target = getattr(cost_of(next(iter(cells[reference].values()))), study.match.by)
    solved: Cells = {}
    notes: dict[str, str] = {}
    for row, configs in cells.items():
        config = next(iter(configs.values()))
        if row == reference:
            solved[row] = configs
            continue
        try:
            tokens, size = cost_of(config).tokens, latent_size(config)
            match = _solved(config.model, target, study.match.by, tokens, size, study.match.within)
        except NoMatchError as error:
            raise ConfigError(f"{source}: row {row!r}: {error}") from None
        notes[row] = match.note
        solved[row] = {seed: c.model_copy(update={"model": match.config}) for seed, c in configs.items()}
    return solved, notes


@lru_cache(maxsize=64)
def _solved(
    model: ModelConfig,
    target: int,
    by: By,
    tokens: int,
    size: tuple[int, int],
    within: float,
) -> Match:
    """Solve one backbone; rows that share it need no second look."""
    return solve(model, target, by, tokens=tokens, latent_size=size, within=within)


def _with_images(config: RunConfig, images: float, row: str) -> RunConfig:
    """Give a run whole batches of at most `images`."""
    whole = int(images) // config.train.batch_size * config.train.batch_size
    if not whole:
        raise ConfigError(f"row {row!r}: the budget in FLOP is less than one batch of {config.train.batch_size} images")
    return config.model_copy(update={"train": config.train.model_copy(update={"images": whole})})


def _equal_drawing(study: StudyConfig, cells: Cells, costs: Mapping[str, Cost]) -> Cells:
    """Solve every row's sampling steps: a picture costs what it costs the reference row, or nearly."""
    reference = reference_row(study, cells)
    budget = drawing_cost(next(iter(cells[reference].values())), costs[reference]).image_flops
    solved: Cells = {}
    for row, configs in cells.items():
        config = next(iter(configs.values()))
        try:
            sampling = sampling_meter(config).solve_steps(config.sampling, budget)
        except ValueError as error:
            raise ConfigError(f"row {row!r}: equal_flops: {error}") from None
        solved[row] = {seed: c.model_copy(update={"sampling": sampling}) for seed, c in configs.items()}
    return solved


# --- what it will take --------------------------------------------------------------------------------------------


def disk_bytes(plan: Plan, row: str, pruned: bool = False) -> int:
    """Return the bytes of one trained cell: parameters, average and two moments in float32, each kept checkpoint.

    Args:
        pruned: of the four the judged one alone is kept (`prune_finished`).
    """
    if plan.trained_as[row] != row:
        return 0
    return (1 if pruned else 4) * 4 * plan.costs[row].parameters * checkpoints_kept(plan.first(row).train)


def checkpoints_kept(train: TrainConfig) -> int:
    """Return how many checkpoints a finished run keeps: the newest few, and those at multiples of `keep_every`."""
    if train.seconds:
        return train.keep_checkpoints  # nobody knows how many images it will see
    batches = train.images // train.batch_size

    def at_multiples(every: int, last: int | None = None) -> set[int]:
        """Batches that reach a multiple of `every` images, of all multiples or the last so many."""
        count = batches * train.batch_size // every if every else 0
        begin = 0 if last is None else max(0, count - last)
        return {-(-every * (i + 1) // train.batch_size) for i in range(begin, count)}

    newest = {batches}.union(
        *(at_multiples(n, train.keep_checkpoints) for n in (train.checkpoint_every, train.keep_every))
    )
    return len(at_multiples(train.keep_every).union(sorted(newest)[-train.keep_checkpoints :]))


def cell_seconds(plan: Plan, row: str, rate: float | None = None) -> float:
    """Return the seconds of training one cell at `rate` FLOP/s (None: STATED_RATE); 0 where it shares another's."""
    if plan.trained_as[row] != row:
        return 0.0
    limit = plan.first(row).train.seconds
    return limit if limit is not None else plan.training_flops(row) / (rate or STATED_RATE)


def measured_rate(plan: Plan, row: str, steps: int = 5) -> float:
    """Return FLOP/s of training this row here: a few updates on noise, after one that warms up."""
    import torch

    from mmdit.denoiser import Conditioning
    from mmdit.models import build_denoiser
    from mmdit_eval.cost import text_shape

    config, cost = plan.first(row), plan.costs[row]
    tokens, width, pooled, streams = text_shape(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    denoiser = build_denoiser(config.model).to(device).train()
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-6, fused=True)
    count, (height, wide) = config.train.batch_size, latent_size(config)
    latents = torch.randn(count, config.model.in_channels, height, wide, device=device)
    conditioning = Conditioning(
        torch.randn(count, tokens, width), None if pooled is None else torch.randn(count, pooled), streams=streams
    ).to(device)
    timestep = torch.full((count,), 500.0, device=device)
    began = 0.0
    for step in range(steps + 1):
        if step == 1:
            began = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.train.precision == "bf16"):
            loss = denoiser(latents, timestep, conditioning).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())  # waits for the device
    return TRAINING * cost.flops * count * steps / max(time.perf_counter() - began, 1e-9)


def print_plan(study: StudyConfig, plan: Plan, *, rate: float | None = None, measure: bool = False) -> None:
    """Print the grid: parameters, FLOPs, tokens, images, steps, network evaluations, time and disk."""
    from rich.console import Console
    from rich.table import Table

    title = f"study {study.name}: {len(plan.cells)} rows x {len(study.seeds)} seed(s); GFLOP: one forward of one image"
    table = Table(title=title, title_justify="left")
    for column in ("row", "backbone", "parameters", "GFLOP", "tokens", "images", "steps", "draws", "minutes", "GB"):
        table.add_column(column, justify="left" if column in ("row", "backbone") else "right")
    seconds, disk = 0.0, 0
    for row, configs in plan.cells.items():
        config, cost = plan.first(row), plan.costs[row]
        own = measured_rate(plan, row) if measure and plan.trained_as[row] == row else rate
        shared, needs = plan.trained_as[row] != row, cell_seconds(plan, row, own)
        seconds, disk = (
            seconds + needs * len(configs),
            disk + disk_bytes(plan, row, study.prune_finished) * len(configs),
        )
        limited = config.train.seconds is not None
        table.add_row(
            row + (" (confounded)" if row in plan.confounded else ""),
            config.model.name,
            f"{cost.parameters / 1e6:.2f} M",
            f"{cost.flops / 1e9:.3f}",
            str(cost.tokens),
            f"as {plan.trained_as[row]}" if shared else "–" if limited else f"{config.train.images:,}",
            "" if shared or limited else f"{-(-config.train.images // config.train.batch_size):,}",
            f"{cost.evaluations} forwards",
            "" if shared else f"{needs / 60:.1f}",
            "" if shared else f"{disk_bytes(plan, row, study.prune_finished) / 1e9:.2f}",
        )
    console = Console(width=None if Console().is_terminal else 140)
    console.print(table)
    for row, note in plan.notes.items():
        console.print(f"  {row}: {note}", highlight=False)
    for remark in plan.remarks:
        console.print(f"  {remark}", highlight=False)
    how = "measured here" if measure else f"at {(rate or STATED_RATE) / 1e9:,.0f} GFLOP/s a worker"
    console.print(
        f"  {len(study.seeds)} seed(s), {study.workers} cell(s) at a time: {seconds / study.workers / 60:,.0f} minutes "
        f"of training ({how}; judging comes on top), {disk / 1e9:.1f} GB of checkpoints",
        highlight=False,
    )
