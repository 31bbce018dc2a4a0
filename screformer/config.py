"""Every setting of screformer, with its unit, its reason and its check.

A configuration is a frozen tree of dataclasses, one section per stage of the flow. It is read from a YAML
recipe, varied by dotted overrides (`model.n_hashes=8`), sent across process borders as a plain dict, and
saved beside every checkpoint and run. Fields that go straight to Ray, DeepSpeed, TileDB or the Reformer keep
upstream's names.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import yaml

Task = Literal["pretrain", "finetune"]


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class AtlasConfig:
    """Which atlas is read, and how TileDB reaches it."""

    uri: str = ""
    """A path, `s3://bucket/prefix`, `census` (latest long-term release) or `census:YYYY-MM-DD`."""
    measurement: str = "RNA"
    """Measurement that holds X; Census calls it RNA."""
    x_layer: str = "raw"
    """X layer of raw counts."""
    timestamp_ms: int = 0
    """Atlas version, in milliseconds since 1970; 0 takes the newest one and pins it in all that is saved."""
    tiledb_config: Mapping[str, str] = field(default_factory=dict)
    """Passed to TileDB as it is, for example `vfs.s3.region: eu-west-1`; credentials belong in the
    environment."""


@dataclass(frozen=True, kw_only=True)
class QueryConfig:
    """Which cells and genes of the atlas take part, in SOMA's value-filter language."""

    obs_filter: str = ""
    """Such as `tissue_general == 'blood' and assay != 'Smart-seq2'`; empty takes every cell."""
    var_filter: str = ""
    """Such as `feature_id in ['ENSG00000156738']`; empty takes every gene."""
    is_primary_data: bool = True
    """Drop cells that Census marks as copies of cells in another dataset."""
    min_measured: float = 0.0
    """Least share of the training cells whose dataset measured a gene, for the gene to take part; 0 takes
    every gene that any did. Near 1 a small panel among large ones makes training and prediction faster, at
    the cost of the genes that it lacks."""
    file: str = ""
    """A query saved by `jobs.query`; replaces the filters, and its hash is checked against the atlas."""

    def __post_init__(self) -> None:
        _require(
            0.0 <= self.min_measured <= 1.0, f"query.min_measured={self.min_measured} must lie in [0, 1]"
        )
        _require(
            not (self.file and (self.obs_filter or self.var_filter)),
            f"query.file={self.file!r} already holds filters; drop query.obs_filter and query.var_filter, or"
            f" query.file",
        )


@dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """What is predicted."""

    column: str = "cell_type_major"
    """obs column of labels. `cell_type_major` is the first-tier roll-up made from the Cell Ontology; any
    other obs column works."""
    min_cells: int = 10
    """Labels with fewer training cells are left out of training and counted in the run."""

    def __post_init__(self) -> None:
        _require(self.min_cells >= 1, f"labels.min_cells={self.min_cells} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Which cells train, which choose the model, which are only looked at in the end.

    No group is on two sides.
    """

    group_by: str = "donor_id"
    """obs column whose groups stay together: `donor_id` or `dataset_id`."""
    test_groups: tuple[str, ...] = ()
    """Groups held out for the test; when empty, `test_fraction` chooses them."""
    test_fraction: float = 0.2
    """Share of cells to hold out for the test where `test_groups` is empty; 0 holds none out."""
    val_fraction: float = 0.1
    """Share of the remaining cells, by whole groups where the labels allow it, that selects the best step."""

    def __post_init__(self) -> None:
        for name in ("test_fraction", "val_fraction"):
            value = getattr(self, name)
            _require(0.0 <= value < 1.0, f"split.{name}={value} must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """How a cell becomes tokens."""

    input_mode: Literal["detected", "all"] = "detected"
    """`detected`: one token per detected gene; `all`: one per gene of the vocabulary, zeros included."""
    max_genes: int = 1024
    """Most gene tokens per cell in `detected` mode. Longer cells keep the genes that stand out most from the
    gene's mean expression over the training cells, and the run says how many were cut."""
    expression: Literal["continuous", "log2_bins", "quantile_bins", "binary"] = "continuous"
    """`continuous`: log1p of counts per 10,000, softly binned by the model; `log2_bins`: floor of log2(1 +
    counts per 10,000) as in scBERT; `quantile_bins`: per-cell quantiles of the detected genes as in scGPT;
    `binary`: detected or not, a control that leaves pre-training nothing to learn."""
    num_bins: int = 16
    """Expression bins, bin 0 (not detected) included; soft bins when `expression` is continuous."""

    def __post_init__(self) -> None:
        _require(self.max_genes >= 1, f"tokens.max_genes={self.max_genes} must be at least 1")
        _require(
            2 <= self.num_bins <= 1024,
            f"tokens.num_bins={self.num_bins} must lie in [2, 1024]; bin 0 means not detected",
        )

    def most_slots(self, num_genes: int) -> int:
        """Token slots of the longest possible cell, the [CLS] included, with a vocabulary of `num_genes`."""
        return 1 + (num_genes if self.input_mode == "all" else min(self.max_genes, num_genes))


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How cells travel from the atlas to a training step."""

    run_length: int = 64
    """Neighbouring cells read together; the unit that is permuted over the whole query. Match the atlas
    tile."""
    cells_per_task: int = 16384
    """Cells that meet in one read task and are mixed there; 256 runs of 64 give about 99 % of the entropy of
    a full shuffle."""
    prefetch_batches: int = 4
    """Batches prepared ahead of the step, per rank."""

    def __post_init__(self) -> None:
        for name in ("run_length", "cells_per_task", "prefetch_batches"):
            value = getattr(self, name)
            _require(value >= 1, f"stream.{name}={value} must be at least 1")
        _require(
            self.cells_per_task >= self.run_length,
            f"stream.cells_per_task={self.cells_per_task} must be at least"
            f" stream.run_length={self.run_length}",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. Defaults are the base recipe."""

    dim: int = 128
    """Width of the residual streams."""
    depth: int = 4
    """Reformer blocks, each attention and feed-forward."""
    heads: int = 4
    """Attention heads; the head width is dim / heads."""
    attention: Literal["auto", "lsh", "full", "local", "random", "none"] = "auto"
    """`lsh`: Reformer's; `full`: PyTorch's scaled dot product; `auto`: the faster of these two for the
    longest cell, settled when a run starts; `local`: neighbouring tokens only; and two controls, `random`:
    lsh with random buckets, `none`: without attention."""
    n_hashes: int = 4
    """Hash rounds of `lsh` and `random`."""
    eval_n_hashes: int = 0
    """Hash rounds where the network is not trained: validation, prediction, explanations; 0 takes
    `n_hashes`."""
    bucket_size: int = 64
    """Tokens per bucket of `lsh` and `random`, and per window of `local`."""
    reversible: bool = True
    """Recompute activations in the backward pass, so that memory does not grow with depth."""
    ff_mult: int = 4
    """Width of the feed-forward layer over dim."""
    ff_chunks: int = 1
    """Slices of the sequence that pass through the feed-forward layer one after another; more only where
    memory asks for it."""
    dropout: float = 0.0
    """Dropout after attention and feed-forward."""
    gene_embedding: Literal["random", "svd", "shuffled", "none"] = "svd"
    """Start of the gene embeddings: `random`, or `svd`, the truncated SVD of the training cells (much better
    on few cells). Two controls:
    `shuffled` gives each gene the SVD vector of another one, `none` gives all genes one vector."""
    pooling: Literal["cls", "mean", "attention"] = "attention"
    """How token vectors become a cell vector for the classification head."""
    linear_skip: bool = True
    """Add a linear classifier on the cell's expression values to the logits (wide and deep)."""
    linear_start_cells: int = 8192
    """Training cells, at most and evenly over the labels, on which a logistic regression is fitted to be the
    `linear_skip`: the network begins as good as that, and trains the rest beside it (trained on, it lost on
    other data sets). 0 starts at zero and trains it."""

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "heads", "n_hashes", "bucket_size", "ff_mult", "ff_chunks"):
            value = getattr(self, name)
            _require(value >= 1, f"model.{name}={value} must be at least 1")
        for name in ("linear_start_cells", "eval_n_hashes"):
            _require(getattr(self, name) >= 0, f"model.{name}={getattr(self, name)} must not be negative")
        _require(
            self.dim % self.heads == 0,
            f"model.dim={self.dim} is not a multiple of model.heads={self.heads}; try"
            f" model.dim={-(-self.dim // self.heads) * self.heads}",
        )
        _require(0.0 <= self.dropout < 1.0, f"model.dropout={self.dropout} must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run, pre-training or fine-tuning."""

    seed: int = 0
    """Fixes weights, order of cells, masks, hashes and dropout."""
    max_steps: int = 1000
    """Optimizer steps."""
    global_batch_size: int = 64
    """Cells per optimizer step, over all ranks and accumulation steps."""
    micro_batch_size: int = 16
    """Cells per rank per forward; lower it when memory runs out, the result stays the same."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    min_lr_ratio: float = 0.05
    """Final learning rate over the peak, at the end of the cosine."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """AdamW weight decay of matrices; biases, norms and embeddings have none."""
    gradient_clipping: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is bf16 on GPUs that have it and fp32 elsewhere."""
    mask_rate: float = 0.3
    """Pre-training: share of a cell's detected genes whose expression is hidden."""
    class_weighting: Literal["none", "sqrt", "balanced"] = "sqrt"
    """Fine-tuning: weight of a cell in the loss by the frequency of its label: 1, frequency^-1/2,
    frequency^-1 (normalised to mean 1)."""
    freeze_encoder: bool = False
    """Fine-tuning: train the heads only."""
    gene_dropout: float = 0.0
    """Fine-tuning: share of a cell's tokens left out at random in each step, against differences between
    protocols and panels."""
    eval_every_steps: int = 200
    """Steps between validations (and checkpoints)."""
    log_every_steps: int = 20
    """Steps between log lines; metric values leave the device only then."""
    patience_evals: int = 0
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
            _require(value >= 1, f"train.{name}={value} must be at least 1")
        _require(self.lr > 0, f"train.lr={self.lr} must be positive")
        for name in ("warmup_steps", "weight_decay", "gradient_clipping", "patience_evals", "seed"):
            value = getattr(self, name)
            _require(value >= 0, f"train.{name}={value} must not be negative")
        for name in ("min_lr_ratio", "mask_rate", "gene_dropout"):
            value = getattr(self, name)
            _require(0.0 <= value < 1.0, f"train.{name}={value} must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """DeepSpeed's ZeRO, in its own words."""

    stage: Literal[0, 1, 2, 3] = 0
    """What is partitioned over ranks: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters."""
    stage3_param_persistence_threshold: int = 100_000
    """Stage 3: parameters with fewer elements stay whole on every rank."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Keep optimizer state in host memory."""

    def __post_init__(self) -> None:
        _require(
            self.offload_optimizer == "none" or self.stage >= 1,
            f"zero.offload_optimizer={self.offload_optimizer!r} needs zero.stage >= 1, not {self.stage}",
        )


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where the job runs and how much of it."""

    num_workers: int = 1
    """Ray Train workers, which is DeepSpeed's world size."""
    use_gpu: bool = False
    """One GPU for each worker."""
    cpus_per_worker: float = 1.0
    """CPUs that Ray reserves for each worker; on CPU also its number of threads."""
    cpus_per_read_task: float = 0.5
    """CPUs that Ray reserves for each task that reads the atlas."""
    storage_path: str = ""
    """Folder or URI, seen by all nodes, for checkpoints; empty is `runs/` in the working directory."""
    max_failures: int = 2
    """Restarts from the last checkpoint after a lost worker; -1 never gives up."""

    def __post_init__(self) -> None:
        _require(self.num_workers >= 1, f"cluster.num_workers={self.num_workers} must be at least 1")
        _require(self.cpus_per_worker > 0, f"cluster.cpus_per_worker={self.cpus_per_worker} must be positive")
        _require(
            self.cpus_per_read_task > 0,
            f"cluster.cpus_per_read_task={self.cpus_per_read_task} must be positive",
        )
        _require(self.max_failures >= -1, f"cluster.max_failures={self.max_failures} must be -1 or more")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where MLflow keeps runs and models."""

    uri: str = ""
    """Tracking server; empty takes MLFLOW_TRACKING_URI, else a SQLite file `mlflow.db` in the working
    directory."""
    experiment: str = "screformer"
    """MLflow experiment."""
    run_name: str = ""
    """Name of the run; empty lets MLflow choose."""
    model_name: str = "screformer"
    """Registered model that fine-tuning adds a version to."""


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """The whole of a run's settings."""

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

    def __post_init__(self) -> None:
        self.grad_accum_steps(self.cluster.num_workers)
        _require(
            self.stream.cells_per_task >= self.train.global_batch_size,
            f"stream.cells_per_task={self.stream.cells_per_task} must hold at least one"
            f" train.global_batch_size={self.train.global_batch_size}",
        )

    def grad_accum_steps(self, world_size: int) -> int:
        """Forward passes per optimizer step on each of `world_size` ranks.

        Raises:
            ValueError: The global batch is not a multiple of micro-batch x world size.
        """
        size, unit = self.train.global_batch_size, self.train.micro_batch_size * world_size
        below, above = size // unit * unit, (size // unit + 1) * unit
        remedy = f"{below} or {above}" if below else f"{above}"
        _require(
            size % unit == 0,
            f"train.global_batch_size={size} is not a multiple of micro_batch_size x world_size"
            f" ({self.train.micro_batch_size} x {world_size} = {unit}); try {remedy}",
        )
        return size // unit

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a YAML recipe; what it leaves out keeps its default.

        Raises:
            ValueError: Not a mapping, or an unknown or ill-typed field (named, with the nearest known one).
        """
        tree = yaml.safe_load(Path(path).read_text())
        tree = {} if tree is None else tree  # comments alone, such as recipes/base.yaml: all defaults
        _require(
            isinstance(tree, dict), f"{path} holds {type(tree).__name__}, not the sections {_names(cls)}"
        )
        return cls.from_dict(tree)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Self:
        """Build from nested plain values, the inverse of `to_dict`."""
        return _build(cls, tree, where="")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values (str, int, float, bool, list, dict), fit for YAML, JSON and another process."""
        return _plain(dataclasses.asdict(self))

    def merge(self, overrides: Iterable[str] | Mapping[str, Any]) -> Self:
        """A copy with some fields replaced.

        Args:
            overrides: `["model.n_hashes=8", "split.test_groups=[A, B]"]`, values in YAML, or
                `{"model.n_hashes": 8}`. What follows the field of a mapping is its key:
                `atlas.tiledb_config.vfs.s3.region=eu-west-1`.

        Raises:
            ValueError: An override without `=`, an unknown field, or a value that fails its check.
        """
        if not isinstance(overrides, Mapping):
            overrides = dict(_parse_override(text) for text in overrides)
        tree = self.to_dict()
        for path, value in overrides.items():
            section, _, rest = path.partition(".")
            name, _, key = rest.partition(".")
            _require(
                bool(section and name),
                f"override {path!r} must read section.field, with a section of {_names(type(self))}",
            )
            _known(section, _names(type(self)), where="")
            _known(name, _names(type(getattr(self, section))), where=f"{section}.")
            if key:
                _require(
                    isinstance(tree[section][name], dict),
                    f"{section}.{name} is no mapping, so {path!r} names nothing",
                )
                tree[section][name][key] = value
            else:
                tree[section][name] = value
        return type(self).from_dict(tree)


def _parse_override(text: str) -> tuple[str, Any]:
    path, equals, value = text.partition("=")
    _require(bool(equals), f"override {text!r} must read section.field=value")
    return path.strip(), yaml.safe_load(value) if value else ""


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _known(name: str, names: list[str], *, where: str) -> None:
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {where}{near[0]}?" if near else f"; known are {', '.join(names)}"
    _require(name in names, f"unknown setting {where}{name}{hint}")


def _build(cls: type, tree: Mapping[str, Any], *, where: str) -> Any:
    hints = typing.get_type_hints(cls)
    for name in tree:
        _known(str(name), _names(cls), where=where)
    values = {}
    for name, value in tree.items():
        kind, path = hints[name], f"{where}{name}"
        if dataclasses.is_dataclass(kind):
            _require(
                isinstance(value, Mapping),
                f"{path}={value!r} must be a section of {_names(typing.cast(type, kind))}",
            )
            values[name] = _build(typing.cast(type, kind), value, where=f"{path}.")
        else:
            values[name] = _checked(kind, value, path)
    return cls(**values)


def _checked(kind: Any, value: Any, path: str) -> Any:
    """The value in the field's own type; YAML's `1e-3` is a string and its `4` may stand for a float."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        matches = [choice for choice in choices if choice == value and type(choice) is type(value)]
        _require(bool(matches), f"{path}={value!r} must be one of {', '.join(map(str, choices))}")
        return value
    if origin is tuple:
        _require(isinstance(value, list | tuple), f"{path}={value!r} must be a list, such as [A, B]")
        return tuple(str(item) for item in value)
    if origin is not None and issubclass(origin, Mapping):
        _require(isinstance(value, Mapping), f"{path}={value!r} must be a mapping")
        return {
            str(key): str(item).lower() if isinstance(item, bool) else str(item)
            for key, item in value.items()
        }  # TileDB's true
    assert not isinstance(kind, types.UnionType), (
        f"{path} has a type that the configuration does not read: {kind}"
    )
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError as error:
            raise ValueError(f"{path}={value!r} must be a number") from error
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    _require(type(value) is kind, f"{path}={value!r} must be of type {kind.__name__}")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
