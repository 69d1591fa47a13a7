"""What a study is made of: rows over one base, seeds, budget, matching, and the claims it will be judged by."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from mmdit.config.errors import check_path
from mmdit.config.parts import Config
from mmdit.config.run import RunConfig, SuiteConfig

# What a study varies unless it says otherwise: how text enters, and what the network is asked for. Dotted prefixes.
# Where `model.name` varies and two rows differ in it, all else of `model` may differ too: it has no counterpart.
CONDITIONING_AXES = (
    "model.name",
    "model.injection",
    "model.weight_sets",
    "model.text_projection",
    "model.text_streams",
    "model.text_stages",
    "model.text_in_query",
    "model.context_dim",
    "model.pooled_dim",
    "model.qk_norm",
    "diffusion",
    "encoders.use",
    "encoders.absent",
    "encoders.pooled",
    "encoders.pooled_at",
    "encoders.padding",
    "encoders.t5_length",
    "encoders.dropout",
    "sampling.guidance_scale",
    "sampling.guidance_interval",
    "sampling.negative_guidance",
    "sampling.skip_layer",
    "sampling.kv_subtract",
    "sampling.nag",
)
_ROW_NAME = re.compile(r"\w[\w.+=,-]{0,119}")


class MatchConfig(Config):
    """How near the rows of a study must be to each other.

    `solve` changes each row's widths until it agrees with the reference; else rows that disagree are refused. FLOPs are
    those of one forward of one image at the study's resolution and text length.
    """

    by: Literal["parameters", "flops"] = "parameters"
    within: Annotated[float, Field(gt=0.0, le=1.0)] = 0.05
    reference: str | None = None  # a row; None: the first one
    solve: bool = False


class BudgetConfig(Config):
    """What every cell may spend on training.

    `images`: images seen. `flops`: FLOP of forward and backward (counted as three forwards), turned into images row by
    row. `seconds`: training time on this machine; the learning rate then falls with the seconds.
    """

    by: Literal["images", "flops", "seconds"] = "images"
    amount: PositiveFloat


class ClaimsConfig(Config):
    """What a study gives verdicts on, stated before it runs: every claim goes through one correction.

    `pairs`: `auto` compares seed by seed where rows share their trained networks (they differ in `sampling` only),
    `seeds` everywhere (rows share data order and noise, and that is expected to pay), `none` nowhere.
    """

    scores: tuple[str, ...] = ()  # empty: the study's headline score
    splits: tuple[Literal["seen", "heldout"], ...] = ()  # empty: all that the suite has
    against: str | None = None  # a row; None: the first one; "all": every pair of rows
    pairs: Literal["auto", "seeds", "none"] = "auto"


class SlurmConfig(Config):
    """What a cell asks of a cluster, handed to submitit. `cluster: local` and `debug` run on this machine."""

    cluster: Literal["slurm", "local", "debug"] = "slurm"
    minutes: PositiveInt = 240
    gpus: NonNegativeInt = 1
    cpus: PositiveInt = 8
    memory_gb: PositiveInt = 32
    options: dict[str, Any] = Field(default_factory=dict)  # submitit's own names: slurm_partition, slurm_account, ...


class AttentionConfig(Config):
    """Which words' attention the report shows; empty: the words of the first caption that name something."""

    prompts: PositiveInt = 1
    words: tuple[str, ...] = ()
    t: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.7  # noise level at which the network is looked at


class StudyConfig(Config):
    """Named rows of overrides over one base, and the seeds to run each with.

    Rows are listed (`rows`), or the product of axes (`factorial`: a dotted field with a list of values, or any label
    with {name: overrides}), or both. Rows that differ in `sampling` only share one training.
    """

    name: str
    base: Path
    rows: dict[str, dict[str, Any]] = Field(default_factory=dict)
    factorial: dict[str, list[Any] | dict[str, Any]] = Field(default_factory=dict)
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0,)
    workers: PositiveInt = 1  # cells trained at the same time; each gets its share of the cores
    devices: tuple[NonNegativeInt, ...] | None = None  # GPUs to spread the workers over; None: all that are visible
    executor: Literal["local", "slurm"] = "local"
    slurm: SlurmConfig = SlurmConfig()
    varies: tuple[str, ...] = CONDITIONING_AXES  # dotted prefixes a row may change
    allow_confounded: bool = False
    match: MatchConfig | None = MatchConfig()
    budget: BudgetConfig | None = None  # None: the base's train.images
    equal_flops: bool = False  # solve sampling.num_steps: every row draws an image with the FLOPs of the reference row
    claims: ClaimsConfig = ClaimsConfig()
    attention: AttentionConfig | None = AttentionConfig()
    prune_finished: bool = False  # a trained cell keeps only the weights that are judged: a quarter of the disk
    overrides: dict[str, Any] = Field(default_factory=dict)  # for every row: the study's own base
    suite: SuiteConfig = SuiteConfig()

    @field_validator("rows", mode="before")
    @classmethod
    def _empty_rows(cls, rows: Any) -> Any:
        """`mmdit:` without anything after it is the base as it stands."""
        return {name: {} if row is None else row for name, row in rows.items()} if isinstance(rows, dict) else rows

    @field_validator("seeds", mode="before")
    @classmethod
    def _listed_seeds(cls, seeds: Any) -> Any:
        """A number alone could be a seed or how many."""
        if isinstance(seeds, int | str):
            raise ValueError(f"expected a list, got {seeds!r}; write --seeds [0,1,2], or seeds: [0, 1, 2] in the study")
        return seeds

    @field_validator("varies")
    @classmethod
    def _fields_of_a_run(cls, varies: tuple[str, ...]) -> tuple[str, ...]:
        for path in varies:
            check_path(RunConfig, path)
        return varies

    @model_validator(mode="after")
    def _fits(self) -> StudyConfig:
        if not self.rows and not self.factorial:
            raise ValueError("a study needs at least one row under 'rows:', or axes under 'factorial:'")
        for row in self.rows:
            check_row_name(row)
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds are listed twice: {list(self.seeds)}")
        for axis, values in self.factorial.items():
            if not values:
                raise ValueError(f"factorial: the axis {axis!r} has no values")
        return self


def check_row_name(row: str) -> None:
    """Refuse a name that cannot be a folder's.

    Raises:
        ValueError: with the characters that may be used.
    """
    if not _ROW_NAME.fullmatch(row):
        raise ValueError(
            f"the row name {row!r} cannot be a folder's; use letters, digits and . _ + = , - , beginning with a letter "
            f"or digit, at most 120"
        )
