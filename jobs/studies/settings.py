"""Settings of a study: cross-validation, search, ablation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from data_ingest.folds import FoldKind
from jobs.studies.baselines import check_names
from screformer.config import ExperimentConfig


@dataclass(frozen=True, kw_only=True)
class CrossvalConfig:
    """How a cross-validation divides and compares."""

    split: FoldKind = "donor"
    """What a fold keeps together: `donor`; `dataset`, each of which is a fold; or nothing (`random` cells,
    which flatters)."""
    num_folds: int = 5
    """Folds, where `split` does not fix their number."""
    val_fraction: float = 0.1
    """Share of a fold's training cells that choose the step and the settings of baselines; whole donors where
    that works out."""
    max_cells: int = 0
    """Use so many cells of the query only, the same share of each donor and label; 0 uses all."""
    pretrain: Literal["fold", "once", "none"] = "fold"
    """Pre-train in each fold without its test cells, once on all of them (which flatters), or not at all."""
    pretrain_steps: int = 100
    """Optimizer steps of pre-training."""
    baselines: tuple[str, ...] = ("all",)
    """Methods to compare with, by name; empty compares with none."""
    concurrent_folds: int = 1
    """Folds of a configuration that are trained at a time."""
    register: bool = False
    """In the end train the (best) configuration on the cells of all folds, and add it to
    `tracking.model_name` with its folds' scores."""

    def __post_init__(self) -> None:
        check_names(self.baselines)
        for name in ("pretrain_steps", "concurrent_folds"):
            if getattr(self, name) < 1:
                raise ValueError(f"crossval.{name}={getattr(self, name)} must be at least 1")
        if self.num_folds < 2:
            raise ValueError(f"crossval.num_folds={self.num_folds} must be at least 2")
        if not 0 < self.val_fraction < 1:
            raise ValueError(
                f"crossval.val_fraction={self.val_fraction} must lie between 0 and 1: something has to choose"
                f" the step"
            )
        if self.max_cells < 0:
            raise ValueError(f"crossval.max_cells={self.max_cells} must not be negative; 0 uses all cells")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Which configurations are tried. With an empty space it is the recipe's alone."""

    space: Mapping[str, str] = field(default_factory=dict)
    """Setting to its values: a list (`[2, 4]`), or `uniform(a, b)`, `loguniform(a, b)`, `randint(a, b)` with
    b left out."""
    algorithm: Literal["grid", "random", "optuna"] = "grid"
    """`grid` takes every combination of lists; the others draw `num_samples`."""
    num_samples: int = 8
    """Configurations that `random` and `optuna` try."""
    scheduler: Literal["none", "asha"] = "none"
    """`asha` stops the worse configurations after their first folds."""
    concurrent_trials: int = 1
    """Configurations that are tried at a time."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "concurrent_trials"):
            if getattr(self, name) < 1:
                raise ValueError(f"search.{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """What an ablation varies."""

    axes: Mapping[str, str] = field(default_factory=dict)
    """Name of a group to its list of variants, each some settings as on the command line:
    `[model.attention=none, ...]`."""
    num_seeds: int = 1
    """Seeds of each variant, counted up from `train.seed`; folds are the same for all."""

    def __post_init__(self) -> None:
        if self.num_seeds < 1:
            raise ValueError(f"ablation.num_seeds={self.num_seeds} must be at least 1")


@dataclass(frozen=True)
class StudyConfig(ExperimentConfig):
    """A recipe of a study: the settings of its runs, and how they are compared."""

    crossval: CrossvalConfig = field(default_factory=CrossvalConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    ablation: AblationConfig = field(default_factory=AblationConfig)

    @property
    def experiment(self) -> ExperimentConfig:
        """The settings of a single run."""
        names = [item.name for item in dataclasses.fields(ExperimentConfig)]
        tree = self.to_dict()
        return ExperimentConfig.from_dict({name: tree[name] for name in names})
