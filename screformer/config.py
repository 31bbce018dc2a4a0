"""All settings, with units, reasons and checks; one long file, because it is the reference.

A configuration is a frozen tree of dataclasses, one section per stage of the pipeline. It is read from a YAML
recipe, modified by dotted overrides (`model.n_hashes=8`), sent to other processes as a plain dict, and saved
with every checkpoint and run. Fields passed unchanged to Ray, DeepSpeed, TileDB or the Reformer keep their
upstream names. `make docs/settings.md` generates `docs/settings.md` from this file.
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
    "ablate": ("split", "search", "crossval.baselines", "crossval.num_seeds", "crossval.register")
    + ("crossval.start", "crossval.cells_per_type"),
}
"""Sections and settings that a command does not use and therefore rejects."""

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
"""Settings of earlier versions, with their value that is now fixed; None if no result depends on it."""
_KEYS_BELONG = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the variables of your store, in the environment (for"
    " Ray jobs: runtime_env env_vars)"
)
_LAST_WITH_REMOVED = "git commit 2dc0365"


def grad_accum_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Number of forward passes per optimizer step on each rank.

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
    """Reject read tasks with less than one global batch.

    Raises:
        ValueError: `cells_per_task` is too small.
    """
    require(
        cells_per_task >= global_batch_size,
        f"stream.cells_per_task={cells_per_task} must be at least"
        f" train.global_batch_size={global_batch_size}",
    )


@dataclass(frozen=True, kw_only=True)
class AtlasConfig:
    """The atlas to read, and TileDB settings to access it."""

    uri: str = setting("", "cells")
    """A path, `s3://bucket/prefix`, `census` (latest long-term release) or `census:YYYY-MM-DD`."""
    timestamp_ms: int = setting(0, "cells")
    """Atlas version, in milliseconds since 1970; 0 uses the newest version and pins it in all saved files."""
    tiledb_config: Mapping[str, str] = setting({}, "cells")
    """Passed to TileDB unchanged, for example `vfs.s3.region: eu-west-1`. Credentials are rejected; put them
    in the environment."""
    census_url: str = setting("", "cells")
    """Folder on the web with `release.json` and `mirrors.json` of a copy of Census; empty uses
    SCREFORMER_CENSUS_URL, or else the public one."""

    def __post_init__(self) -> None:
        refuse_secret_address("atlas.uri", self.uri, _KEYS_BELONG)
        refuse_secret_address("atlas.census_url", self.census_url, _KEYS_BELONG)
        refuse_secrets("atlas.tiledb_config", self.tiledb_config, _KEYS_BELONG)

    def __hash__(self) -> int:
        return hash((self.uri, self.timestamp_ms, self.census_url, *sorted(self.tiledb_config.items())))


@dataclass(frozen=True, kw_only=True)
class QueryConfig:
    """The cells and genes of the atlas to use, as SOMA value filters."""

    obs_filter: str = setting("", "cells")
    """For example `tissue_general == 'blood' and assay != 'Smart-seq2'`; empty selects all cells."""
    var_filter: str = setting("", "cells")
    """For example `feature_id in ['ENSG00000156738']`; empty selects all genes."""
    is_primary_data: bool = setting(True, "cells")
    """Exclude cells that Census marks as copies of cells in another dataset."""
    min_measured: float = setting(0.0, "pretraining")
    """Use only genes measured in at least this share of the training cells; 0 uses all genes measured in any
    dataset. With values near 1, one small panel among large ones makes training and prediction faster, but
    loses the genes not on that panel."""
    file: str = setting("", "cells")
    """A query saved by `jobs.query`; replaces the filters. Its hash is checked against the atlas."""

    def __post_init__(self) -> None:
        require(0.0 <= self.min_measured <= 1.0, f"query.min_measured={self.min_measured} must be in [0, 1]")
        require(
            not (self.file and (self.obs_filter or self.var_filter)),
            f"query.file={self.file!r} already has filters; drop query.obs_filter and query.var_filter, or"
            f" query.file",
        )


@dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """The labels to predict."""

    column: str = setting("cell_type_major", "cells")
    """obs column of labels. `cell_type_major` is a first-tier roll-up along the Cell Ontology; any other obs
    column works too."""
    min_cells: int = setting(10)
    """Labels with fewer training cells are excluded from training and reported by the run."""
    max_cells: int = setting(0)
    """Fine-tuning uses at most this many random cells per label and data set, so large ones do not crowd out
    the rest; 0 uses all."""
    exclude: tuple[str, ...] = setting(())
    """Labels that are not learned, for example a type that only one donor has, which a network cannot tell
    from that donor. In a test, their cells count as errors; a start model keeps the labels it has."""

    def __post_init__(self) -> None:
        require(self.min_cells >= 1, f"labels.min_cells={self.min_cells} must be at least 1")
        require(
            self.max_cells == 0 or self.max_cells >= self.min_cells,
            f"labels.max_cells={self.max_cells} must be 0 or at least labels.min_cells={self.min_cells}",
        )


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Division into training, validation and test cells. No group is in more than one part."""

    group_by: str = setting("donor_id", "cells")
    """obs column whose groups stay together, for example `donor_id` or `dataset_id`."""
    test_groups: tuple[str, ...] = setting((), "cells")
    """Groups held out for testing; if empty, they are chosen by `test_fraction`."""
    test_fraction: float = setting(0.2, "cells")
    """Share of cells to hold out for testing if `test_groups` is empty; 0 for none."""
    val_fraction: float = setting(0.1, "cells")
    """Share of the remaining cells used to select the best step; whole groups if the labels allow it."""

    def __post_init__(self) -> None:
        for name in ("test_fraction", "val_fraction"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, f"split.{name}={value} must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """How a cell becomes tokens."""

    input_mode: Literal["detected", "all"] = setting("detected", "pretraining")
    """`detected`: one token per detected gene; `all`: one per gene of the vocabulary, including zeros."""
    max_genes: int = setting(1024, "pretraining")
    """Maximum number of gene tokens per cell in `detected` mode. Longer cells keep the genes that most exceed
    their mean expression over the training cells. The run reports how many cells were truncated."""
    expression: Literal["continuous", "log2_bins", "quantile_bins", "binary"] = setting(
        "continuous", "pretraining", "weights"
    )
    """`continuous`: log1p of counts per 10,000, softly binned by the model; `log2_bins`: floor of log2(1 +
    counts per 10,000) as in scBERT; `quantile_bins`: per-cell quantiles of the detected genes as in scGPT;
    `binary`: detected or not, a control that leaves pre-training nothing to learn."""
    num_bins: int = setting(16, "pretraining", "weights")
    """Number of expression bins, including bin 0 (not detected); soft bins if `expression` is continuous."""

    def __post_init__(self) -> None:
        require(self.max_genes >= 1, f"tokens.max_genes={self.max_genes} must be at least 1")
        require(
            2 <= self.num_bins <= 1024,
            f"tokens.num_bins={self.num_bins} must be in [2, 1024]; bin 0 means not detected",
        )

    def most_slots(self, num_genes: int) -> int:
        """Token slots of the longest possible cell, including [CLS], with a vocabulary of `num_genes`."""
        return 1 + (num_genes if self.input_mode == "all" else min(self.max_genes, num_genes))


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How cells are read and shuffled."""

    run_length: int = setting(64, "pretraining")
    """Number of neighbouring cells read together; these runs are shuffled over the whole query. Should match
    the atlas's tile size."""
    cells_per_task: int = setting(16384, "pretraining")
    """Number of cells shuffled together in a read task; 256 runs of 64 give about 99 % of the entropy of a
    full shuffle."""
    cache: str = setting("", "pretraining")
    """Path or URI of a shard cache of the query (`screformer shard`), from which training cells are then read
    instead of from the atlas; much faster, in another order."""

    def __post_init__(self) -> None:
        refuse_secret_address("stream.cache", self.cache, _KEYS_BELONG)
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
    """The network. The defaults are the base recipe."""

    encoder: Literal["reformer", "additive"] = setting("reformer", "pretraining", "weights")
    """`additive`: a sum of learned responses over genes, then one hidden layer; values are scaled by the
    genes that were measured. Faster, and better with few studies. Of the settings below it uses only `dim`
    and `input_genes`; needs `linear_skip=false` and no pre-training."""
    input_genes: int = setting(1024, "pretraining", "weights")
    """Additive encoder: number of genes that become tokens, chosen as the best at separating labels in any
    data set. For blood, 300 are too few, and 2,048 are no better than 1,024."""
    dim: int = setting(128, "pretraining", "weights")
    """Width of the residual streams."""
    depth: int = setting(4, "pretraining", "weights")
    """Number of Reformer blocks, each with attention and feed-forward."""
    heads: int = setting(4, "pretraining", "weights")
    """Number of attention heads; the head width is dim / heads."""
    attention: Literal["auto", "lsh", "full", "local", "random", "none"] = setting(
        "auto", "pretraining", "weights"
    )
    """`lsh`: Reformer's; `full`: PyTorch's scaled dot product; `auto`: the faster of the two for the longest
    cell, chosen when a run starts; `local`: only neighbouring tokens. Two controls: `random`, lsh with random
    buckets, and `none`, no attention."""
    n_hashes: int = setting(4, "pretraining")
    """Number of hash rounds of `lsh` and `random`."""
    eval_n_hashes: int = setting(0)
    """For ablation. Hash rounds outside training: validation, prediction, explanations; 0 uses `n_hashes`."""
    bucket_size: int = setting(64, "pretraining")
    """Tokens per bucket of `lsh` and `random`, and per window of `local`."""
    reversible: bool = setting(True, "pretraining")
    """Recompute activations in the backward pass, so memory does not grow with depth."""
    ff_mult: int = setting(4, "pretraining", "weights")
    """Width of the feed-forward layer, as a multiple of dim."""
    ff_chunks: int = setting(1, "pretraining")
    """For ablation and very long cells. Number of slices of the sequence that pass through the feed-forward
    layer one after another: less memory, same result."""
    dropout: float = setting(0.0, "pretraining")
    """Dropout after attention and feed-forward."""
    gene_embedding: Literal["random", "svd", "shuffled", "none"] = setting("svd", "pretraining")
    """Initial gene embeddings: `random`, or `svd`, the truncated SVD of the training cells (much better with
    few cells). Two controls: `shuffled` gives each gene the SVD vector of another gene; `none` gives all
    genes the same vector."""
    pooling: Literal["cls", "mean", "attention"] = setting("attention", "pretraining", "weights")
    """How token vectors are combined into a cell vector for the classification head."""
    linear_skip: bool = setting(True)
    """Add the output of a linear classifier on the cell's expression values to the logits (wide and deep)."""
    linear_start_cells: int = setting(8192)
    """Initialise `linear_skip` with a logistic regression on at most this many training cells, spread evenly
    over labels. The network starts as good as the regression, which then stays fixed (training it further
    was worse on other data sets). With 0, `linear_skip` starts at zero and is trained."""

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
    """Random seed of weights, cell order, masks, hashes and dropout."""
    max_steps: int = setting(1000)
    """Number of optimizer steps."""
    global_batch_size: int = setting(64, "pretraining")
    """Number of cells per optimizer step, over all ranks and accumulation steps."""
    micro_batch_size: int = setting(16, "pretraining")
    """Number of cells per forward pass on each rank. Lower it if memory runs out; the result is the same."""
    lr: float = setting(1e-3, "pretraining")
    """Peak learning rate of AdamW."""
    warmup_steps: int = setting(50, "pretraining")
    """Number of steps of linear warm-up."""
    weight_decay: float = setting(0.01, "pretraining")
    """AdamW weight decay of matrices; biases, norms and embeddings do not decay."""
    gradient_clipping: float = setting(1.0, "pretraining")
    """Maximum global gradient norm; 0 disables clipping."""
    precision: Literal["auto", "fp32", "bf16"] = setting("auto", "pretraining")
    """`auto` is bf16 on GPUs that support it and fp32 elsewhere."""
    mask_rate: float = setting(0.3, "pretraining")
    """Pre-training: share of a cell's detected genes whose expression is hidden."""
    class_weighting: Literal["none", "sqrt", "sqrt_dataset", "balanced"] = setting("sqrt")
    """Fine-tuning: weight of a cell in the loss by the frequency of its label: 1, frequency^-1/2 or
    frequency^-1 (normalised to mean 1). `sqrt_dataset` uses the frequency within the cell's data set, so no
    single study dominates a label."""
    prior_shift: float = setting(0.0)
    """Fine-tuning: how far to shift the finished network's label frequencies from the weighted loss (0) to
    the training cells (1). Weighting finds rare labels but predicts them too often; 0.75 was best on held-out
    donors."""
    thinned_share: float = setting(0.0)
    """Fine-tuning: share of the cells in each epoch whose counts are thinned to 25 to 100 %, as in a
    shallower experiment."""
    panel_share: float = setting(0.0)
    """Fine-tuning: share of the cells in each epoch that keep only 15 to 100 % of their genes. The other
    genes count as not measured, as with a smaller gene panel."""
    weight_average: float = setting(0.0, "pretraining")
    """Decay per step of a moving average of the weights, which is validated and saved; 0 uses the weights
    themselves."""
    replay_share: float = setting(0.5)
    """Fine-tuning from a model with labels: cells of the model's own query that are trained on again, per
    cell of the new query, and at least 2,000, so that known types are not forgotten. They need to be in the
    same atlas. 0 trains on none."""
    freeze_encoder: bool = setting(False)
    """Fine-tuning: train only the heads."""
    eval_every_steps: int = setting(200, "pretraining")
    """Number of steps between validations (and checkpoints)."""
    checkpoint_every_minutes: float = setting(10.0)
    """Minutes between additional checkpoints; 0 saves checkpoints only after validations."""
    log_every_steps: int = setting(20)
    """Number of steps between log lines; metrics are copied from the device only then."""
    patience_evals: int = setting(0)
    """Stop after this many validations without improvement in macro-F1 (pre-training: loss); 0 never stops
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
        require(self.replay_share >= 0, f"train.replay_share={self.replay_share} must not be negative")
        for name in ("prior_shift", "thinned_share", "panel_share"):
            value = getattr(self, name)
            require(0.0 <= value <= 1.0, f"train.{name}={value} must be in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """DeepSpeed's ZeRO settings, with their upstream names."""

    stage: Literal[0, 1, 2, 3] = setting(0)
    """What is partitioned over ranks: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters."""
    offload_optimizer: Literal["none", "cpu"] = setting("none")
    """Keep optimizer state in host memory."""

    def __post_init__(self) -> None:
        require(
            self.offload_optimizer == "none" or self.stage >= 1,
            f"zero.offload_optimizer={self.offload_optimizer!r} needs zero.stage >= 1, not {self.stage}",
        )


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Resources of a job."""

    num_workers: int = setting(1)
    """Number of Ray Train workers, which is DeepSpeed's world size."""
    use_gpu: bool = setting(False)
    """Use one GPU per worker."""
    cpus_per_worker: float = setting(1.0)
    """CPUs that Ray reserves per worker; without GPUs also its number of threads."""
    cpus_per_read_task: float = setting(0.5)
    """CPUs assumed per task that reads the atlas; limits how many run at a time."""
    storage_path: str = setting("")
    """Folder or URI for checkpoints, visible to all nodes; empty means `runs/` in the working directory."""
    max_failures: int = setting(2)
    """Number of restarts from the last checkpoint after losing a worker; -1 for no limit."""
    min_workers: int = setting(1)
    """Fewest workers to go on with after a node is lost, until it comes back. Set it to `num_workers` if the
    number of workers must not change, for example because fewer have too little memory."""
    wait_for_nodes_minutes: float = setting(20.0)
    """How long to wait for nodes on which `min_workers` fit; then the run ends and can be resumed."""

    def __post_init__(self) -> None:
        refuse_secret_address("cluster.storage_path", self.storage_path, _KEYS_BELONG)
        require(self.num_workers >= 1, f"cluster.num_workers={self.num_workers} must be at least 1")
        require(self.cpus_per_worker > 0, f"cluster.cpus_per_worker={self.cpus_per_worker} must be positive")
        require(
            self.cpus_per_read_task > 0,
            f"cluster.cpus_per_read_task={self.cpus_per_read_task} must be positive",
        )
        require(self.max_failures >= -1, f"cluster.max_failures={self.max_failures} must be -1 or more")
        require(
            1 <= self.min_workers <= self.num_workers,
            f"cluster.min_workers={self.min_workers} must be at least 1 and at most num_workers"
            f"={self.num_workers}",
        )
        require(
            self.wait_for_nodes_minutes > 0,
            f"cluster.wait_for_nodes_minutes={self.wait_for_nodes_minutes} must be positive",
        )


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where MLflow stores runs and models."""

    uri: str = setting("")
    """Tracking server; empty uses MLFLOW_TRACKING_URI or else a SQLite file `mlflow.db` in the working
    directory. An address with a password is rejected; put it in MLFLOW_TRACKING_URI."""
    experiment: str = setting("screformer")
    """MLflow experiment."""
    run_name: str = setting("")
    """Name of the run; defaults to the command, the atlas and the date."""
    model_name: str = setting("screformer")
    """Registered model to which fine-tuning adds a version."""

    def __post_init__(self) -> None:
        refuse_secret_address(
            "tracking.uri",
            self.uri,
            "set the whole address in the environment as MLFLOW_TRACKING_URI, or user and password as"
            " MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (for Ray jobs: runtime_env env_vars)",
        )
        require(
            self.model_name.strip() != "" and not set(self.model_name) & set("/:@"),
            f"tracking.model_name={self.model_name!r} must be a name without '/', ':' or '@', for example"
            f" screformer",
        )


@dataclass(frozen=True, kw_only=True)
class CrossvalConfig:
    """How to divide cells for cross-validation, and what to compare. Ablations use the same folds."""

    group_by: str = setting("donor_id", "cells")
    """Which cells stay in one fold: those of a donor (`donor_id`); those with one value of another obs
    column, for example `dataset_id` or `study`, where each value is a fold; or none (`none`: random cells,
    which gives optimistic scores)."""
    num_folds: int = setting(5, "cells")
    """Number of folds of donors or random cells; with another column, each of its values is a fold."""
    val_fraction: float = setting(0.1, "cells")
    """Share of a fold's training cells used to choose the best step and the baselines' settings; whole donors
    if the labels allow it."""
    max_cells: int = setting(0, "cells")
    """Use about this many cells of the query, the same share of each donor and label; 0 uses all."""
    pretrain: Literal["fold", "once", "none"] = setting("fold", "pretraining")
    """Pre-train in each fold without its test cells, once on all cells (optimistic scores), or not at all.
    Additive encoders are never pre-trained."""
    pretrain_steps: int = setting(100, "pretraining")
    """Number of optimizer steps of pre-training, instead of `train.max_steps`."""
    start: str = setting("")
    """Model that training starts from in each fold, instead of pre-training; same as `--from`."""
    cells_per_type: tuple[int, ...] = setting(())
    """Learning curve, e.g. `[1, 5, 20, 100]`: train every method on so many random cells of each type of a
    fold's training donors, without validation cells. With `crossval.start`, our model is trained with and
    without it. Empty for no curve."""
    baselines: tuple[str, ...] = setting(("all",))
    """Names of methods to compare with; empty for none."""
    num_seeds: int = setting(1)
    """Number of seeds of our model, starting at `train.seed`; all use the same folds and baselines. A search
    uses one, then repeats its best configuration."""
    concurrent_folds: int = setting(1)
    """Number of folds of a configuration trained at the same time."""
    concurrent_trials: int = setting(1)
    """Number of configurations of a search or ablation trained at the same time."""
    register: bool = setting(False)
    """Finally train the (best) configuration on the cells of all folds and register it as
    `tracking.model_name` with its cross-validation scores."""

    def __post_init__(self) -> None:
        for name in ("pretrain_steps", "num_seeds", "concurrent_folds", "concurrent_trials"):
            require(getattr(self, name) >= 1, f"crossval.{name}={getattr(self, name)} must be at least 1")
        require(
            all(size >= 1 for size in self.cells_per_type),
            f"crossval.cells_per_type={list(self.cells_per_type)}: each number must be at least 1",
        )
        require(self.num_folds >= 2, f"crossval.num_folds={self.num_folds} must be at least 2")
        require(
            0 < self.val_fraction < 1,
            f"crossval.val_fraction={self.val_fraction} must be between 0 and 1: validation cells choose the"
            f" best step",
        )
        require(
            self.max_cells >= 0,
            f"crossval.max_cells={self.max_cells} must not be negative; 0 uses all cells",
        )


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Configurations that a cross-validation tries; with an empty space, only the recipe's."""

    space: Mapping[str, Any] = setting({})
    """Setting to its values: a list (`[2, 4]`), `uniform(a, b)`, `loguniform(a, b)` or `randint(a, b)` (b
    excluded)."""
    algorithm: Literal["grid", "random", "optuna"] = setting("grid")
    """`grid` tries every combination of lists; the others sample `num_samples` configurations."""
    num_samples: int = setting(8)
    """Number of configurations that `random` and `optuna` try."""
    scheduler: Literal["none", "asha"] = setting("none")
    """`asha` stops worse configurations after their first folds."""

    def __post_init__(self) -> None:
        require(self.num_samples >= 1, f"search.num_samples={self.num_samples} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """What an ablation varies."""

    axes: Mapping[str, Any] = setting({})
    """Name of a group to a list of variants, each with settings as on the command line:
    `[model.attention=none, ...]`."""
    num_seeds: int = setting(1)
    """Number of seeds per variant, starting at `train.seed`; all use the same folds."""

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
        """Number of forward passes per optimizer step on each of `world_size` ranks; raises ValueError."""
        return grad_accum_steps(self.train.global_batch_size, self.train.micro_batch_size, world_size)

    def worker_counts(self) -> list[int]:
        """Numbers of workers that a run may have: `cluster.num_workers`, and fewer after a loss of nodes.

        The global batch stays the same, so it must be a multiple of micro-batch x workers.
        """
        cluster, micro_batches = self.cluster, self.train.global_batch_size // self.train.micro_batch_size
        counts = range(cluster.min_workers, cluster.num_workers + 1)
        return [count for count in counts if micro_batches % count == 0]

    @classmethod
    def from_file(cls, path: str | Path, *, command: Command | None = None) -> Self:
        """Read a YAML recipe; missing settings keep their defaults.

        Args:
            path: The recipe.
            command: Reject settings that have no effect in this command; None accepts all.

        Raises:
            ValueError: The recipe is not a mapping, or a field is unknown, rejected or of the wrong type. The
                message suggests the closest known field.
        """
        tree = yaml.safe_load(Path(path).read_text())
        tree = {} if tree is None else tree  # only comments, as in recipes/base.yaml: all defaults
        require(isinstance(tree, dict), f"{path} is a {type(tree).__name__}, not the sections {names(cls)}")
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
        """Build from settings saved with a model or run by this or an earlier version.

        Args:
            tree: Nested plain values; settings that no longer exist are dropped.
            resume: Training will continue, so dropped settings must have the value that is now fixed.

        Raises:
            ValueError: A dropped setting has another value; the message names the version that supports it.
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
        """Nested plain values (str, int, float, bool, list, dict), suitable for YAML, JSON and pickling.

        Args:
            command: Leave out settings without effect in this command. None, and commands not in
                `WITHOUT_EFFECT`, include all.
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
                `{"model.n_hashes": 8}`. For a mapping, the rest of the name is the key:
                `atlas.tiledb_config.vfs.s3.region=eu-west-1`.
            command: As in `from_file`.

        Raises:
            ValueError: An override has no `=`, a field is unknown or rejected, or a value is invalid.
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
        """Our values of all settings that differ from those in `other`, by name (`model.dim`)."""
        ours, theirs = _paths(plain(self)), _paths(plain(other))
        return {path: value for path, value in ours.items() if value != theirs[path]}


def touching(touch: Touch) -> list[str]:
    """Names of all settings that affect something (see `Touch`), for example `model.dim`."""
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
    """The setting that an override's name refers to, without a mapping's key: `atlas.tiledb_config`."""
    return ".".join(path.split(".")[:2])


def _paths(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of nested values by name; anything that is not a section is skipped (`build` rejects it)."""
    return {
        f"{section}.{name}": value
        for section, fields in tree.items()
        if isinstance(fields, Mapping)
        for name, value in fields.items()
    }


def _check_current(path: str, value: Any) -> None:
    """Reject names and values of earlier versions, and report their replacement."""
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
                "; crossval.group_by, crossval.num_folds and crossval.val_fraction control what is held out"
                if path.startswith("split.")
                else ""
            )
            raise ValueError(f"{path} has no effect in {command}, so remove it{held_out}")
