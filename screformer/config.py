"""Every setting of screformer, with its unit, reason and check; one file, because it is the reference.

A configuration is a frozen tree of dataclasses, one section per stage of the flow. It is read from a YAML
recipe, varied by dotted overrides (`model.n_hashes=8`), sent across process borders as a plain dict, and
saved with every checkpoint and run. Fields that go straight to Ray, DeepSpeed, TileDB or the Reformer keep
upstream's names. `docs/settings.md` is made from this file by `make docs/settings.md`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import yaml

from screformer.secrets import refuse_secret_address, refuse_secrets
from screformer.settings import (
    Touch,
    build,
    check_known,
    names,
    parse_override,
    plain,
    require,
    setting,
)

Task = Literal["pretrain", "finetune"]
Command = Literal["pretrain", "finetune", "quickstart", "crossval", "ablate"]
WITHOUT_EFFECT: Mapping[str, tuple[str, ...]] = {
    "pretrain": ("crossval", "search", "ablation"),
    "finetune": ("crossval", "search", "ablation"),
    "quickstart": ("crossval", "search", "ablation"),
    "crossval": ("split", "ablation"),
    "ablate": ("split", "search", "crossval.baselines", "crossval.num_seeds", "crossval.register"),
}
"""Sections and settings that a command does not use, and therefore refuses."""

_RENAMED = {"crossval.split": "crossval.group_by", "search.concurrent_trials": "crossval.concurrent_trials"}
_OLD_GROUPS = {"donor": "donor_id", "dataset": "dataset_id", "random": "none"}
_REMOVED: Mapping[str, Any] = {
    "atlas.measurement": "RNA",
    "atlas.x_layer": "raw",
    "stream.prefetch_batches": None,
    "train.min_lr_ratio": 0.05,
    "train.gene_dropout": 0.0,
    "zero.stage3_param_persistence_threshold": None,
}
"""Settings of earlier versions with the value that is now fixed; None where no result depends on it."""
_KEYS_BELONG = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the variables of your store, in the environment (for"
    " Ray jobs: runtime_env env_vars)"
)
_LAST_WITH_REMOVED = "git commit 2dc0365"


def grad_accum_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Forward passes per optimizer step on each rank.

    Raises:
        ValueError: The global batch is not a multiple of micro-batch x world size.
    """
    size, unit = global_batch_size, micro_batch_size * world_size
    below, above = size // unit * unit, (size // unit + 1) * unit
    remedy = f"{below} or {above}" if below else f"{above}"
    require(
        size % unit == 0,
        f"train.global_batch_size={size} is not a multiple of micro_batch_size x world_size"
        f" ({micro_batch_size} x {world_size} = {unit}); try {remedy}",
    )
    return size // unit


def check_task_size(cells_per_task: int, global_batch_size: int) -> None:
    """Refuse read tasks that hold less than one global batch.

    Raises:
        ValueError: `cells_per_task` is too small.
    """
    require(
        cells_per_task >= global_batch_size,
        f"stream.cells_per_task={cells_per_task} must hold at least one"
        f" train.global_batch_size={global_batch_size}",
    )


@dataclass(frozen=True, kw_only=True)
class AtlasConfig:
    """Which atlas is read, and how TileDB reaches it."""

    uri: str = setting("", "cells")
    """A path, `s3://bucket/prefix`, `census` (latest long-term release) or `census:YYYY-MM-DD`."""
    timestamp_ms: int = setting(0, "cells")
    """Atlas version, in milliseconds since 1970; 0 takes the newest one and pins it in all that is saved."""
    tiledb_config: Mapping[str, str] = setting({}, "cells")
    """Passed to TileDB as it is, for example `vfs.s3.region: eu-west-1`; credentials belong in the
    environment and are refused here."""

    def __post_init__(self) -> None:
        refuse_secret_address("atlas.uri", self.uri, _KEYS_BELONG)
        refuse_secrets("atlas.tiledb_config", self.tiledb_config, _KEYS_BELONG)

    def __hash__(self) -> int:
        return hash((self.uri, self.timestamp_ms, *sorted(self.tiledb_config.items())))


@dataclass(frozen=True, kw_only=True)
class QueryConfig:
    """Which cells and genes of the atlas are used, in SOMA's value-filter language."""

    obs_filter: str = setting("", "cells")
    """For example `tissue_general == 'blood' and assay != 'Smart-seq2'`; empty takes every cell."""
    var_filter: str = setting("", "cells")
    """For example `feature_id in ['ENSG00000156738']`; empty takes every gene."""
    is_primary_data: bool = setting(True, "cells")
    """Drop cells that Census marks as copies of cells in another dataset."""
    min_measured: float = setting(0.0, "pretraining")
    """Least share of the training cells whose dataset measured a gene, for the gene to be used; 0 uses
    every gene that any dataset measured. Near 1 a small panel among large ones makes training and prediction
    faster, at the cost of the genes that it lacks."""
    file: str = setting("", "cells")
    """A query saved by `jobs.query`; replaces the filters, and its hash is checked against the atlas."""

    def __post_init__(self) -> None:
        require(0.0 <= self.min_measured <= 1.0, f"query.min_measured={self.min_measured} must be in [0, 1]")
        require(
            not (self.file and (self.obs_filter or self.var_filter)),
            f"query.file={self.file!r} already holds filters; drop query.obs_filter and query.var_filter, or"
            f" query.file",
        )


@dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """What is predicted."""

    column: str = setting("cell_type_major", "cells")
    """obs column of labels. `cell_type_major` is the first-tier roll-up made from the Cell Ontology; any
    other obs column works."""
    min_cells: int = setting(10)
    """Labels with fewer training cells are left out of training and counted in the run."""
    max_cells: int = setting(0)
    """Fine-tuning trains on at most so many cells of each label in each data set, chosen at random, so that
    large ones do not crowd out the rest; 0 takes all."""

    def __post_init__(self) -> None:
        require(self.min_cells >= 1, f"labels.min_cells={self.min_cells} must be at least 1")
        require(
            self.max_cells == 0 or self.max_cells >= self.min_cells,
            f"labels.max_cells={self.max_cells} must be 0 or at least labels.min_cells={self.min_cells}",
        )


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """The training, validation and test cells. No group is in more than one part."""

    group_by: str = setting("donor_id", "cells")
    """obs column whose groups stay together, such as `donor_id` or `dataset_id`."""
    test_groups: tuple[str, ...] = setting((), "cells")
    """Groups held out for the test; when empty, `test_fraction` chooses them."""
    test_fraction: float = setting(0.2, "cells")
    """Share of cells to hold out for the test where `test_groups` is empty; 0 holds none out."""
    val_fraction: float = setting(0.1, "cells")
    """Share of the remaining cells, in whole groups if the labels allow it, used to select the best step."""

    def __post_init__(self) -> None:
        for name in ("test_fraction", "val_fraction"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, f"split.{name}={value} must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """How a cell becomes tokens."""

    input_mode: Literal["detected", "all"] = setting("detected", "pretraining")
    """`detected`: one token per detected gene; `all`: one per gene of the vocabulary, zeros included."""
    max_genes: int = setting(1024, "pretraining")
    """Most gene tokens per cell in `detected` mode. Longer cells keep the genes that stand out most from the
    gene's mean expression over the training cells, and the run reports how many were cut."""
    expression: Literal["continuous", "log2_bins", "quantile_bins", "binary"] = setting(
        "continuous", "pretraining", "weights"
    )
    """`continuous`: log1p of counts per 10,000, softly binned by the model; `log2_bins`: floor of log2(1 +
    counts per 10,000) as in scBERT; `quantile_bins`: per-cell quantiles of the detected genes as in scGPT;
    `binary`: detected or not, a control that leaves pre-training nothing to learn."""
    num_bins: int = setting(16, "pretraining", "weights")
    """Expression bins, bin 0 (not detected) included; soft bins when `expression` is continuous."""

    def __post_init__(self) -> None:
        require(self.max_genes >= 1, f"tokens.max_genes={self.max_genes} must be at least 1")
        require(
            2 <= self.num_bins <= 1024,
            f"tokens.num_bins={self.num_bins} must be in [2, 1024]; bin 0 means not detected",
        )

    def most_slots(self, num_genes: int) -> int:
        """Token slots of the longest possible cell, the [CLS] included, with a vocabulary of `num_genes`."""
        return 1 + (num_genes if self.input_mode == "all" else min(self.max_genes, num_genes))


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How cells travel from the atlas to a training step."""

    run_length: int = setting(64, "pretraining")
    """Neighbouring cells read together; the unit that is permuted over the whole query. Match the atlas
    tile."""
    cells_per_task: int = setting(16384, "pretraining")
    """Cells that meet in one read task and are mixed there; 256 runs of 64 give about 99 % of the entropy of
    a full shuffle."""

    def __post_init__(self) -> None:
        for name in ("run_length", "cells_per_task"):
            value = getattr(self, name)
            require(value >= 1, f"stream.{name}={value} must be at least 1")
        require(
            self.cells_per_task >= self.run_length,
            f"stream.cells_per_task={self.cells_per_task} must be at least"
            f" stream.run_length={self.run_length}",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. Defaults are the base recipe."""

    encoder: Literal["reformer", "additive"] = setting("reformer", "pretraining", "weights")
    """`additive`: a sum over genes of learned responses, then one hidden layer; values are scaled by the
    genes that were measured. The better one on few studies, and the faster one; of the settings below it uses
    `dim` and `input_genes`. Without pre-training, and without `linear_skip`."""
    input_genes: int = setting(1024, "pretraining", "weights")
    """Of the additive encoder: genes that become tokens, those that tell labels apart best in any data set.
    300 are too few for blood, 2,048 no better than 1,024."""
    dim: int = setting(128, "pretraining", "weights")
    """Width of the residual streams."""
    depth: int = setting(4, "pretraining", "weights")
    """Reformer blocks, each attention and feed-forward."""
    heads: int = setting(4, "pretraining", "weights")
    """Attention heads; the head width is dim / heads."""
    attention: Literal["auto", "lsh", "full", "local", "random", "none"] = setting(
        "auto", "pretraining", "weights"
    )
    """`lsh`: Reformer's; `full`: PyTorch's scaled dot product; `auto`: the faster of these two for the
    longest cell, settled when a run starts; `local`: neighbouring tokens only; and two controls, `random`:
    lsh with random buckets, `none`: without attention."""
    n_hashes: int = setting(4, "pretraining")
    """Hash rounds of `lsh` and `random`."""
    eval_n_hashes: int = setting(0)
    """For ablation. Hash rounds where the network is not trained: validation, prediction, explanations; 0
    takes `n_hashes`."""
    bucket_size: int = setting(64, "pretraining")
    """Tokens per bucket of `lsh` and `random`, and per window of `local`."""
    reversible: bool = setting(True, "pretraining")
    """Recompute activations in the backward pass, so that memory does not grow with depth."""
    ff_mult: int = setting(4, "pretraining", "weights")
    """Width of the feed-forward layer over dim."""
    ff_chunks: int = setting(1, "pretraining")
    """For ablation, and for very long cells. Slices of the sequence that pass through the feed-forward layer
    one after another: less memory, the same result."""
    dropout: float = setting(0.0, "pretraining")
    """Dropout after attention and feed-forward."""
    gene_embedding: Literal["random", "svd", "shuffled", "none"] = setting("svd", "pretraining")
    """Start of the gene embeddings: `random`, or `svd`, the truncated SVD of the training cells (much better
    on few cells). Two controls:
    `shuffled` gives each gene the SVD vector of another one, `none` gives all genes one vector."""
    pooling: Literal["cls", "mean", "attention"] = setting("attention", "pretraining", "weights")
    """How token vectors become a cell vector for the classification head."""
    linear_skip: bool = setting(True)
    """Add a linear classifier on the cell's expression values to the logits (wide and deep)."""
    linear_start_cells: int = setting(8192)
    """Training cells, at most and evenly over the labels, on which a logistic regression is fitted to be
    the `linear_skip`: the network starts as good as that, and trains the rest next to it (trained further,
    it lost on other data sets). 0 starts at zero and trains it."""

    def __post_init__(self) -> None:
        for name in (
            "dim",
            "depth",
            "heads",
            "n_hashes",
            "bucket_size",
            "ff_mult",
            "ff_chunks",
            "input_genes",
        ):
            value = getattr(self, name)
            require(value >= 1, f"model.{name}={value} must be at least 1")
        for name in ("linear_start_cells", "eval_n_hashes"):
            require(getattr(self, name) >= 0, f"model.{name}={getattr(self, name)} must not be negative")
        require(
            self.dim % self.heads == 0,
            f"model.dim={self.dim} is not a multiple of model.heads={self.heads}; try"
            f" model.dim={-(-self.dim // self.heads) * self.heads}",
        )
        require(0.0 <= self.dropout < 1.0, f"model.dropout={self.dropout} must be in [0, 1)")
        require(
            not (self.encoder == "additive" and self.linear_skip),
            "model.encoder=additive has no linear part; set model.linear_skip=false",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run, pre-training or fine-tuning."""

    seed: int = setting(0, "pretraining")
    """Fixes weights, order of cells, masks, hashes and dropout."""
    max_steps: int = setting(1000)
    """Optimizer steps."""
    global_batch_size: int = setting(64, "pretraining")
    """Cells per optimizer step, over all ranks and accumulation steps."""
    micro_batch_size: int = setting(16, "pretraining")
    """Cells per rank per forward; lower it when memory runs out, the result stays the same."""
    lr: float = setting(1e-3, "pretraining")
    """Peak learning rate of AdamW."""
    warmup_steps: int = setting(50, "pretraining")
    """Steps of linear warm-up."""
    weight_decay: float = setting(0.01, "pretraining")
    """AdamW weight decay of matrices; biases, norms and embeddings have none."""
    gradient_clipping: float = setting(1.0, "pretraining")
    """Largest global gradient norm; 0 turns clipping off."""
    precision: Literal["auto", "fp32", "bf16"] = setting("auto", "pretraining")
    """`auto` is bf16 on GPUs that have it and fp32 elsewhere."""
    mask_rate: float = setting(0.3, "pretraining")
    """Pre-training: share of a cell's detected genes whose expression is hidden."""
    class_weighting: Literal["none", "sqrt", "sqrt_dataset", "balanced"] = setting("sqrt")
    """Fine-tuning: weight of a cell in the loss by the frequency of its label: 1, frequency^-1/2,
    frequency^-1 (normalised to mean 1). `sqrt_dataset` takes the frequency within the cell's data set, so
    that no study decides alone what a label looks like."""
    prior_shift: float = setting(0.0)
    """Fine-tuning: how far the finished network's label frequencies are moved from those of the weighted loss
    to those of the training cells; 0 not, 1 all the way. Weighting finds rare labels, and calls them too
    often; 0.75 was best on held-out donors."""
    thinned_share: float = setting(0.0)
    """Fine-tuning: share of the cells of an epoch whose counts are thinned to 25 to 100 %, as a shallower
    experiment would have found them."""
    panel_share: float = setting(0.0)
    """Fine-tuning: share of the cells of an epoch that keep 15 to 100 % of their genes; the others count as
    not measured, as with a smaller gene panel."""
    weight_average: float = setting(0.0, "pretraining")
    """Decay per step of a moving average of the weights, which is what is validated and kept; 0 keeps the
    weights themselves."""
    freeze_encoder: bool = setting(False)
    """Fine-tuning: train the heads only."""
    eval_every_steps: int = setting(200, "pretraining")
    """Steps between validations (and checkpoints)."""
    checkpoint_every_minutes: float = setting(10.0)
    """Minutes after which a checkpoint is saved between validations; 0 saves them with validations alone."""
    log_every_steps: int = setting(20)
    """Steps between log lines; metric values leave the device only then."""
    patience_evals: int = setting(0)
    """Stop after so many validations without a better macro-F1 (or loss in pre-training); 0 never stops
    early."""

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "global_batch_size",
            "micro_batch_size",
            "eval_every_steps",
            "log_every_steps",
        ):
            value = getattr(self, name)
            require(value >= 1, f"train.{name}={value} must be at least 1")
        require(self.lr > 0, f"train.lr={self.lr} must be positive")
        for name in (
            "warmup_steps",
            "weight_decay",
            "gradient_clipping",
            "patience_evals",
            "checkpoint_every_minutes",
            "seed",
        ):
            value = getattr(self, name)
            require(value >= 0, f"train.{name}={value} must not be negative")
        for name in ("mask_rate", "weight_average"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, f"train.{name}={value} must be in [0, 1)")
        for name in ("prior_shift", "thinned_share", "panel_share"):
            value = getattr(self, name)
            require(0.0 <= value <= 1.0, f"train.{name}={value} must be in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """DeepSpeed's ZeRO, in its own words."""

    stage: Literal[0, 1, 2, 3] = setting(0)
    """What is partitioned over ranks: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters."""
    offload_optimizer: Literal["none", "cpu"] = setting("none")
    """Keep optimizer state in host memory."""

    def __post_init__(self) -> None:
        require(
            self.offload_optimizer == "none" or self.stage >= 1,
            f"zero.offload_optimizer={self.offload_optimizer!r} needs zero.stage >= 1, not {self.stage}",
        )


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where the job runs and how much of it."""

    num_workers: int = setting(1)
    """Ray Train workers, which is DeepSpeed's world size."""
    use_gpu: bool = setting(False)
    """One GPU for each worker."""
    cpus_per_worker: float = setting(1.0)
    """CPUs that Ray reserves for each worker; on CPU also its number of threads."""
    cpus_per_read_task: float = setting(0.5)
    """CPUs that Ray reserves for each task that reads the atlas."""
    storage_path: str = setting("")
    """Folder or URI, seen by all nodes, for checkpoints; empty is `runs/` in the working directory."""
    max_failures: int = setting(2)
    """Restarts from the last checkpoint after a lost worker; -1 never gives up."""

    def __post_init__(self) -> None:
        refuse_secret_address("cluster.storage_path", self.storage_path, _KEYS_BELONG)
        require(self.num_workers >= 1, f"cluster.num_workers={self.num_workers} must be at least 1")
        require(self.cpus_per_worker > 0, f"cluster.cpus_per_worker={self.cpus_per_worker} must be positive")
        require(
            self.cpus_per_read_task > 0,
            f"cluster.cpus_per_read_task={self.cpus_per_read_task} must be positive",
        )
        require(self.max_failures >= -1, f"cluster.max_failures={self.max_failures} must be -1 or more")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where MLflow keeps runs and models."""

    uri: str = setting("")
    """Tracking server; empty takes MLFLOW_TRACKING_URI, else a SQLite file `mlflow.db` in the working
    directory. One with a password belongs in MLFLOW_TRACKING_URI and is refused here."""
    experiment: str = setting("screformer")
    """MLflow experiment."""
    run_name: str = setting("")
    """Name of the run; if empty, the command, the atlas and the date."""
    model_name: str = setting("screformer")
    """Registered model that fine-tuning adds a version to."""

    def __post_init__(self) -> None:
        refuse_secret_address(
            "tracking.uri",
            self.uri,
            "put the whole address into the environment as MLFLOW_TRACKING_URI, or user and password as"
            " MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (for Ray jobs: runtime_env env_vars)",
        )
        require(
            self.model_name.strip() != "" and not set(self.model_name) & set("/:@"),
            f"tracking.model_name={self.model_name!r} must be a name without '/', ':' and '@', such as"
            f" screformer",
        )


@dataclass(frozen=True, kw_only=True)
class CrossvalConfig:
    """How a cross-validation divides cells, and what it compares. An ablation uses the same folds."""

    group_by: str = setting("donor_id", "cells")
    """What a fold keeps together: `donor_id`; another obs column, such as `dataset_id` or `study`, each value
    of which is a fold; or nothing (`none`: random cells, which gives optimistic scores)."""
    num_folds: int = setting(5, "cells")
    """Folds of donors or random cells; of another column there are as many as values."""
    val_fraction: float = setting(0.1, "cells")
    """Share of a fold's training cells that choose the step and the settings of baselines; whole donors where
    the labels allow it."""
    max_cells: int = setting(0, "cells")
    """Use at most this many cells of the query, the same share of each donor and label; 0 uses all."""
    pretrain: Literal["fold", "once", "none"] = setting("fold", "pretraining")
    """Pre-train in each fold without its test cells, once on all (optimistic scores), or not at all.
    An additive encoder is never pre-trained."""
    pretrain_steps: int = setting(100, "pretraining")
    """Optimizer steps of pre-training, in place of `train.max_steps`."""
    baselines: tuple[str, ...] = setting(("all",))
    """Methods to compare with, by name; empty compares with none."""
    num_seeds: int = setting(1)
    """Seeds of our model, counted up from `train.seed`; folds and baselines are the same for all. A search
    takes one, then repeats its best configuration."""
    concurrent_folds: int = setting(1)
    """Folds of a configuration that are trained at a time."""
    concurrent_trials: int = setting(1)
    """Configurations of a search or an ablation that are trained at a time."""
    register: bool = setting(False)
    """At the end, train the (best) configuration on the cells of all folds, and add it to
    `tracking.model_name` with its folds' scores."""

    def __post_init__(self) -> None:
        for name in ("pretrain_steps", "num_seeds", "concurrent_folds", "concurrent_trials"):
            require(getattr(self, name) >= 1, f"crossval.{name}={getattr(self, name)} must be at least 1")
        require(self.num_folds >= 2, f"crossval.num_folds={self.num_folds} must be at least 2")
        require(
            0 < self.val_fraction < 1,
            f"crossval.val_fraction={self.val_fraction} must be between 0 and 1: something has to choose the"
            f" step",
        )
        require(
            self.max_cells >= 0,
            f"crossval.max_cells={self.max_cells} must not be negative; 0 uses all cells",
        )


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Which configurations a cross-validation tries. With an empty space, only the recipe's."""

    space: Mapping[str, Any] = setting({})
    """Setting to its values: a list (`[2, 4]`), or `uniform(a, b)`, `loguniform(a, b)`, `randint(a, b)`,
    without b."""
    algorithm: Literal["grid", "random", "optuna"] = setting("grid")
    """`grid` takes every combination of lists; the others draw `num_samples`."""
    num_samples: int = setting(8)
    """Configurations that `random` and `optuna` try."""
    scheduler: Literal["none", "asha"] = setting("none")
    """`asha` stops the worse configurations after their first folds."""

    def __post_init__(self) -> None:
        require(self.num_samples >= 1, f"search.num_samples={self.num_samples} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """What an ablation varies."""

    axes: Mapping[str, Any] = setting({})
    """Name of a group to its list of variants, each some settings as on the command line:
    `[model.attention=none, ...]`."""
    num_seeds: int = setting(1)
    """Seeds of each variant, counted up from `train.seed`; folds are the same for all."""

    def __post_init__(self) -> None:
        require(self.num_seeds >= 1, f"ablation.num_seeds={self.num_seeds} must be at least 1")
        for axis, listed in self.axes.items():
            require(
                isinstance(listed, list) and bool(listed),
                f"ablation.axes.{axis}={listed} must be a list such as [model.attention=none,"
                f" model.attention=full]",
            )


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """All settings."""

    atlas: AtlasConfig = field(default_factory=AtlasConfig)
    query: QueryConfig = field(default_factory=QueryConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    crossval: CrossvalConfig = field(default_factory=CrossvalConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    ablation: AblationConfig = field(default_factory=AblationConfig)

    def __post_init__(self) -> None:
        self.grad_accum_steps(self.cluster.num_workers)
        check_task_size(self.stream.cells_per_task, self.train.global_batch_size)
        if self.model.encoder == "additive":
            for name, needed in (("input_mode", "detected"), ("expression", "continuous")):
                value = getattr(self.tokens, name)
                require(value == needed, f"model.encoder=additive needs tokens.{name}={needed}, not {value}")
        require(
            not (self.train.weight_average and self.zero.stage == 3),
            "train.weight_average needs whole parameters on each rank; set zero.stage to 2 or less",
        )

    def grad_accum_steps(self, world_size: int) -> int:
        """Forward passes per optimizer step on each of `world_size` ranks; raises as the function does."""
        return grad_accum_steps(self.train.global_batch_size, self.train.micro_batch_size, world_size)

    @classmethod
    def from_file(cls, path: str | Path, *, command: Command | None = None) -> Self:
        """Read a YAML recipe; what it leaves out keeps its default.

        Args:
            path: The recipe.
            command: Refuse settings that have no effect in this command; None takes all.

        Raises:
            ValueError: Not a mapping, or an unknown, ill-typed or refused field (named, with the nearest
                known one).
        """
        tree = yaml.safe_load(Path(path).read_text())
        tree = {} if tree is None else tree  # comments alone, such as recipes/base.yaml: all defaults
        require(isinstance(tree, dict), f"{path} holds {type(tree).__name__}, not the sections {names(cls)}")
        if command is not None:
            _check_effect(command, _paths(tree))
        return cls.from_dict(tree)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Self:
        """Build from nested plain values, the inverse of `to_dict`."""
        for path, value in _paths(tree).items():
            _check_current(path, value)
        return build(cls, tree)

    @classmethod
    def from_saved(cls, tree: Mapping[str, Any], *, resume: bool = False) -> Self:
        """Build from what this or an earlier version saved with a model or a run.

        Args:
            tree: Nested plain values, perhaps with settings that exist no more; they are dropped.
            resume: The training will continue, so a dropped setting must have the value that is now fixed.

        Raises:
            ValueError: Another value; the message names the version that has that setting.
        """
        tree = {section: dict(fields) for section, fields in tree.items()}
        for path, fixed in _REMOVED.items():
            section, name = path.split(".")
            value = tree.get(section, {}).pop(name, fixed)
            require(
                not resume or fixed is None or value == fixed,
                f"{path}={value!r} of this run is always {fixed!r} now; resume the run with"
                f" {_LAST_WITH_REMOVED}, the last version that has the setting",
            )
        return cls.from_dict(tree)

    def to_dict(self, command: str | None = None) -> dict[str, Any]:
        """Nested plain values (str, int, float, bool, list, dict), fit for YAML, JSON and another process.

        Args:
            command: Leave out what has no effect in this command; None, and a command that
                `WITHOUT_EFFECT` does not list, give all.
        """
        tree = plain(self)
        for path in WITHOUT_EFFECT.get(command or "", ()):
            section, _, name = path.partition(".")
            if name:
                del tree[section][name]
            else:
                del tree[section]
        return tree

    def merge(self, overrides: Iterable[str] | Mapping[str, Any], *, command: Command | None = None) -> Self:
        """A copy with some fields replaced.

        Args:
            overrides: `["model.n_hashes=8", "split.test_groups=[A, B]"]`, values in YAML, or
                `{"model.n_hashes": 8}`. What follows the field of a mapping is its key:
                `atlas.tiledb_config.vfs.s3.region=eu-west-1`.
            command: As `from_file`.

        Raises:
            ValueError: An override without `=`, an unknown or refused field, or a value that fails its check.
        """
        if not isinstance(overrides, Mapping):
            overrides = dict(parse_override(text) for text in overrides)
        tree = self.to_dict()
        for path, value in overrides.items():
            section, _, rest = path.partition(".")
            name, _, key = rest.partition(".")
            require(
                bool(section and name),
                f"override {path!r} must read section.field, with a section of {names(type(self))}",
            )
            _check_current(f"{section}.{name}", value)
            check_known(section, names(type(self)), where="")
            check_known(name, names(type(getattr(self, section))), where=f"{section}.")
            if key:
                require(
                    isinstance(tree[section][name], dict),
                    f"{section}.{name} is not a mapping, so {path!r} is not a setting",
                )
                tree[section][name][key] = value
            else:
                tree[section][name] = value
        if command is not None:
            _check_effect(command, overrides)
        return type(self).from_dict(tree)

    def differences(self, other: ExperimentConfig) -> dict[str, Any]:
        """This one's values where they differ from those of `other`, by name (`model.dim`)."""
        ours, theirs = _paths(plain(self)), _paths(plain(other))
        return {path: value for path, value in ours.items() if value != theirs[path]}


def touching(touch: Touch) -> list[str]:
    """Names of all settings that touch something, such as `model.dim`."""
    return [
        f"{section}.{item.name}"
        for section, cls in sections().items()
        for item in dataclasses.fields(cls)
        if touch in item.metadata["touches"]
    ]


def sections() -> dict[str, Any]:
    """Section to its dataclass, in order."""
    return {item.name: item.default_factory for item in dataclasses.fields(ExperimentConfig)}


def setting_name(path: str) -> str:
    """The setting of an override's name, without the key of a mapping: `atlas.tiledb_config`."""
    return ".".join(path.split(".")[:2])


def _paths(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of nested values by name; anything that is not a section is left out (`build` refuses it)."""
    return {
        f"{section}.{name}": value
        for section, fields in tree.items()
        if isinstance(fields, Mapping)
        for name, value in fields.items()
    }


def _check_current(path: str, value: Any) -> None:
    """Refuse names and words of earlier versions, and say what took their place."""
    require(path not in _RENAMED, f"{path} is called {_RENAMED.get(path)} now")
    require(
        path not in _REMOVED,
        f"{path} is no longer a setting"
        + (f"; it is always {_REMOVED[path]!r}" if _REMOVED.get(path) else ""),
    )
    if path.endswith(".group_by") and isinstance(value, str):
        new = _OLD_GROUPS.get(value)
        require(new is None, f"{path}={value!r} is not a column; write {path}={new}")


def _check_effect(command: Command, paths: Iterable[str]) -> None:
    for path in paths:
        if setting_name(path) in WITHOUT_EFFECT[command] or path.split(".")[0] in WITHOUT_EFFECT[command]:
            held_out = (
                "; crossval.group_by, crossval.num_folds and crossval.val_fraction say what is held out"
                if path.startswith("split.")
                else ""
            )
            raise ValueError(f"{path} has no effect in {command}, so remove it{held_out}")
