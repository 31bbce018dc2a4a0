"""A training run from configuration to model: choose the cells, split them, start the workers, keep and register what they learn.

`jobs.pretrain` and `jobs.finetune` are its two command lines; other jobs call `run_training` and `prepare_cells`.

Axes: n cells of the query, g genes of the vocabulary, k classes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.fs
import ray
import ray.train.torch
import yaml
from scipy import sparse

from cluster.connect import connect
from data_ingest.dataset import CellStream, gene_of_var
from data_ingest.ontology import lineage
from data_ingest.query import QueryResult, run_query
from data_ingest.split import Split, split_cells
from jobs import tracking
from jobs.worker import train_loop_per_worker
from screformer.attention import settle_attention
from screformer.checkpoint import NO_LABELS, LoadedModel, is_complete, load_model, read_position
from screformer.config import ExperimentConfig, Task
from screformer.linear import logistic_start
from screformer.model import ScReformer
from screformer.predictor import Predictor
from screformer.svd import svd_gene_embeddings
from screformer.tokenizer import GeneVocabulary, Panels, normalised
from screformer.training import class_weights

SAMPLE_CELLS = 4096
"""Training cells, at most, from which mean expression and the SVD start are taken."""
SHOWN_CELLS, SHOWN_TOKENS = 2000, 2_000_000
"""Most test cells, and most tokens, whose embeddings a run keeps for its report; the driver, which may have no GPU, computes them."""
MIN_OVERLAP = 0.5
"""Least share of a given model's expected expression that the query's genes must carry."""
SAME_AS_START = ("model.dim", "model.depth", "model.heads", "model.attention", "model.ff_mult", "model.pooling")
SAME_TOKENS = ("tokens.expression", "tokens.num_bins")
HEADS = ("classification_head.", "linear_skip.")
RUN_FILE = "run.json"


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainingCells:
    """Cells, labels and parts of a run. The parts of one configuration are the same for pre-training and fine-tuning."""

    config: ExperimentConfig
    query: QueryResult
    labels: dict[str, Any]
    """`column`, `names` of the k classes, `cl_ids`; without names for pre-training."""
    codes_n: np.ndarray
    """Class of each cell of the query, int64; -1 where it has none."""
    parts: dict[str, np.ndarray]
    """Positions among the query's cells of `train`, `val` and `test`, increasing; a part may be empty, `train` is not."""
    vocabulary: GeneVocabulary
    notes: tuple[str, ...]
    """What a reader of the results must know: cells left out, a split that could not be as wished."""

    @property
    def class_counts_k(self) -> np.ndarray:
        """Training cells of each class, int64."""
        codes = self.codes_n[self.parts["train"]]
        return np.bincount(codes[codes >= 0], minlength=len(self.labels["names"]))

    def stream(self, part: str) -> CellStream:
        """The cells of one part as batches; those of `train` shuffled."""
        positions, config = self.parts[part], self.config
        return CellStream(
            self.query.locator,
            self.query.obs_joinids[positions],
            self.codes_n[positions],
            self.vocabulary,
            config.tokens,
            config.stream,
            global_batch_size=config.train.global_batch_size,
            seed=config.train.seed,
            panels=self._panels.take(positions),
            shuffle=part == "train",
            read_cpus=config.cluster.cpus_per_read_task,
        )

    def groups(self, part: str) -> list[str]:
        """The split's groups (such as donors) in a part."""
        return sorted(set(self.query.obs[self.config.split.group_by].astype(str).to_numpy()[self.parts[part]]))

    def identity(self) -> dict[str, Any]:
        """What has to be kept with a model of these cells."""
        return {
            "query": self.query.identity(),
            "split": {
                "group_by": self.config.split.group_by,
                "cells": {part: len(positions) for part, positions in self.parts.items()},
                "groups": {part: self.groups(part) for part in self.parts},
            },
            "notes": list(self.notes),
        }

    @cached_property
    def _panels(self) -> Panels:
        """Which genes were measured in which cells of the query."""
        return self.query.panels(gene_of_var(self.query.locator, self.vocabulary), len(self.vocabulary))

    @cached_property
    def sample(self) -> sparse.csr_array:
        """log1p of counts per 10,000 of at most `SAMPLE_CELLS` training cells, float32 (cells, g). Ray must be running."""
        found = self.stream("train").sample_counts(SAMPLE_CELLS, self.config.train.seed)
        return normalised(found.counts_ng, found.total_n)


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a training run leaves."""

    run_id: str
    """MLflow run."""
    run_dir: str
    """Folder or URI of checkpoints; `--resume` takes it."""
    model_dir: str
    """Local directory of the best model."""
    metrics: dict[str, float]
    """`best_val/...` and `test/...` of the best model."""
    model_version: int | None
    """Version in the registry; None for pre-training, and where the tracking server is away and `jobs.sync` has to register it."""


def prepare_cells(
    config: ExperimentConfig,
    task: Task,
    *,
    start: LoadedModel | None = None,
    query: QueryResult | None = None,
    split: Split | None = None,
) -> TrainingCells:
    """Run the query, split its cells, and choose classes and genes. Ray is not needed.

    All cells of the query are split, labelled or not, so that pre-training and fine-tuning of one configuration hold out the same groups.
    For fine-tuning, cells without a label, and labels with fewer than `labels.min_cells` training cells, are then left out.

    Args:
        config: The run's settings.
        task: `finetune` needs labels.
        start: A model to start from, whose vocabulary is kept.
        query: The query's result, where it is known.
        split: Parts of the query's cells, such as those of a fold; None splits as `config.split` says.

    Raises:
        ValueError: The query, the split, the labels or the overlap with the start model's genes do not allow training.
    """
    if task == "pretrain" and config.tokens.expression == "binary":
        raise ValueError(
            "tokens.expression='binary' leaves pre-training nothing to learn, as every detected gene has the same expression; choose"
            " another encoding, or fine-tune without pre-training"
        )
    query = query or run_query(config)
    label_codes_n = query.obs["label"].cat.codes.to_numpy().astype(np.int64)
    all_names = [str(name) for name in query.obs["label"].cat.categories]
    if split is None:
        split = split_cells(query.obs[config.split.group_by].astype(str).to_numpy(), label_codes_n, config.split, config.train.seed)
    parts, notes = dict(split), list(split.notes)

    labels, codes_n = dict(NO_LABELS), np.full(len(label_codes_n), -1, dtype=np.int64)
    if task == "finetune":
        counts = np.bincount(label_codes_n[parts["train"]][label_codes_n[parts["train"]] >= 0], minlength=len(all_names))
        kept = [code for code in range(len(all_names)) if counts[code] >= config.labels.min_cells]
        rare = {all_names[code]: int(counts[code]) for code in range(len(all_names)) if code not in kept}
        if len(kept) < 2:
            listed = ", ".join(f"{name} ({count})" for name, count in zip(all_names, counts.tolist(), strict=True)) or "none"
            raise ValueError(
                f"fine-tuning needs at least 2 labels with labels.min_cells={config.labels.min_cells} training cells; labels.column="
                f"{config.labels.column!r} has {listed}; widen the query or lower labels.min_cells"
            )
        if rare:
            notes.append(f"labels with fewer than {config.labels.min_cells} training cells are left out: {rare}")
        new_code = np.full(len(all_names) + 1, -1, dtype=np.int64)
        new_code[kept] = np.arange(len(kept))
        codes_n = new_code[label_codes_n]
        names = [all_names[code] for code in kept]
        labels = {"column": config.labels.column, "names": names, "cl_ids": [query.label_cl_ids.get(name, "") for name in names]}
        for part, positions in parts.items():
            parts[part] = positions[codes_n[positions] >= 0]
        unlabelled = int((label_codes_n < 0).sum())
        if unlabelled:
            notes.append(f"{unlabelled} cells without a label are left out")
    for part in ("val", "test"):
        if not len(parts[part]):
            notes.append(f"no {part} cells")
    if start is None:
        share_g = query.measured_share(parts["train"])
        measured_g = (share_g > 0) & (share_g >= config.query.min_measured)
        if not measured_g.any():
            raise ValueError(
                f"no gene was measured for query.min_measured={config.query.min_measured} of the training cells; lower it, or query"
                " datasets that have genes in common"
            )
        if not measured_g.all():
            notes.append(
                f"{int((~measured_g).sum())} of {len(measured_g)} genes are left out, which were not measured for any training cell, or for"
                f" less than {config.query.min_measured:.0%} of them (query.min_measured)"
            )
        vocabulary = query.vocabulary(measured_g)
    else:
        vocabulary = start.vocabulary
        _check_overlap(query, start)
        theirs = start.meta.get("split", {})
        seen = set(theirs["groups"]["train"]) if theirs.get("group_by") == config.split.group_by else set()
        held_out = query.obs[config.split.group_by].astype(str).to_numpy()[parts["test"]]
        leaked = sorted(seen & set(held_out))
        if leaked:
            notes.append(f"the start model was trained on {len(leaked)} of the test groups ({', '.join(leaked[:5])}): the test flatters it")
    return TrainingCells(config=config, query=query, labels=labels, codes_n=codes_n, parts=parts, vocabulary=vocabulary, notes=tuple(notes))


def run_training(
    config: ExperimentConfig, task: Task, *, init_from: str | None = None, resume: str | None = None, overrides: Sequence[str] = ()
) -> TrainingResult:
    """Train a model with Ray Train; connects to Ray where no connection is.

    Args:
        config: The run's settings. When resuming, those that the run was started with are taken instead, with `overrides`.
        task: `pretrain` or `finetune`.
        init_from: Model to start from: a run id, `runs:/...`, `models:/NAME@ALIAS` or a model directory.
        resume: Run folder of a training that was killed; it goes on after its newest complete checkpoint.
        overrides: Settings that differ when resuming, such as `cluster.num_workers=1`.

    Raises:
        ValueError: Settings, cells, start model or cluster do not allow the run.
        ray.train.TrainingFailedError: A worker failed more often than `cluster.max_failures`.
    """
    saved: dict[str, Any] = {}
    if resume is not None:
        saved = read_run(resume)
        config, task, init_from = ExperimentConfig.from_dict(saved["config"]).merge(overrides), saved["task"], saved["init_from"]
    workers, cpus_per_worker = config.cluster.num_workers, config.cluster.cpus_per_worker
    connect(num_cpus=workers * cpus_per_worker + config.cluster.cpus_per_read_task)
    check_layout(config, ray.nodes())
    start = _load_start(config, init_from) if init_from else None
    cells = prepare_cells(config, task, start=start)
    config, attention = settled(_pinned(config, cells.query), cells, start)
    run = tracking.TrackedRun(**saved["run"]) if saved else tracking.start_run(config, task)
    run_dir = resume or _new_run_dir(config, task, run.run_id)
    run = run.kept_in(run_dir)
    with run:
        checkpoint = None
        if saved:
            if saved["query_hash"] != cells.query.hash:
                raise ValueError(
                    f"{run_dir} was trained on other cells (query hash {saved['query_hash'][:12]}, now {cells.query.hash[:12]})"
                )
            checkpoint = _newest_checkpoint(run_dir)
        else:
            plain = {"config": config.to_dict(), "task": task, "init_from": init_from, "query_hash": cells.query.hash}
            _write_run(run_dir, {**plain, "run": dataclasses.asdict(run)})
            run.log_identity(cells.identity())
        print(attention, flush=True)
        for note in cells.notes:
            print(f"note: {note}", flush=True)
        cells, start_arrays = initial_arrays(cells, start, checkpoint)
        print(f"{task} in {run_dir} (go on after an interruption with --resume {run_dir})", flush=True)
        result = train_on_cluster(config, task, cells, start_arrays, run, run_dir, checkpoint)
        metrics = {name: value for name, value in (result.metrics or {}).items() if isinstance(value, float)}
        with result.checkpoint.as_directory() as folder:
            model_dir = _keep_model(Path(folder) / "model", run_dir)
            version = None
            if task == "finetune":
                _log_test_cells(run, cells, model_dir)
                version = run.register(model_dir, config.tracking.model_name)
            else:
                run.log_file(model_dir)
        run.log_curves()
    return TrainingResult(run_id=run.run_id, run_dir=run_dir, model_dir=str(model_dir), metrics=metrics, model_version=version)


def check_layout(config: ExperimentConfig, nodes: Sequence[dict[str, Any]]) -> None:
    """Refuse what the cluster could never hold: Ray would wait for it for ever.

    Args:
        config: The run's settings.
        nodes: As `ray.nodes()` gives them.

    Raises:
        ValueError: Too few CPUs or GPUs, with the sum.
    """
    cluster = config.cluster
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    cpus, gpus = (sum(float(node.get(kind, 0)) for node in resources) for kind in ("CPU", "GPU"))
    needed = cluster.num_workers * cluster.cpus_per_worker + cluster.cpus_per_read_task
    if needed > cpus:
        raise ValueError(
            f"cluster.num_workers={cluster.num_workers} x cpus_per_worker={cluster.cpus_per_worker:g} + one read task of"
            f" cpus_per_read_task={cluster.cpus_per_read_task:g} = {needed:g} CPUs, but Ray has {cpus:g} on {len(resources)} node(s);"
            " lower one of them or add nodes"
        )
    if cluster.use_gpu and cluster.num_workers > gpus:
        raise ValueError(
            f"cluster.num_workers={cluster.num_workers} need one GPU each, but Ray has {gpus:g}; lower it, or set cluster.use_gpu=false"
        )
    places = sum(
        min(int(node.get("CPU", 0) / cluster.cpus_per_worker), int(node.get("GPU", 0)) if cluster.use_gpu else sys.maxsize)
        for node in resources
    )
    if places < cluster.num_workers:
        raise ValueError(
            f"cluster.cpus_per_worker={cluster.cpus_per_worker:g} lets only {places} workers fit on the nodes"
            f" ({', '.join(format(float(node.get('CPU', 0)), 'g') for node in resources)} CPUs), not {cluster.num_workers}; lower it"
        )


def describe(config: ExperimentConfig, cells: TrainingCells) -> dict[str, Any]:
    """What a run will take: cells, steps, parameters, and a rough estimate of memory per worker in GB."""
    tokens, model, train = config.tokens, config.model, config.train
    network = ScReformer(model, tokens, num_genes=len(cells.vocabulary), num_classes=len(cells.labels["names"]), seed=train.seed)
    num_parameters = sum(param.numel() for param in network.parameters())
    slots = tokens.most_slots(len(cells.vocabulary))
    world_size = config.cluster.num_workers
    # Bytes per parameter in fp32: weights 4, gradients 4, moments 8; ZeRO spreads them from the end.
    spread = {0: 0, 1: 8, 2: 12, 3: 16}[config.zero.stage]
    state = num_parameters * (16 - spread + spread / world_size)
    # One block holds about 14 + 2 ff_mult vectors per token, LSH some more per hash round; reversible blocks hold one at a time.
    hashes = model.attention in ("lsh", "random")
    per_block = 14 + 2 * model.ff_mult + (6 * model.n_hashes if hashes else 0)
    activations = train.micro_batch_size * slots * model.dim * 4 * (6 + per_block * (1 if model.reversible else model.depth))
    if hashes:
        activations += train.micro_batch_size * slots * model.heads * model.n_hashes * 2 * model.bucket_size * 4
    num_train = len(cells.parts["train"])
    return {
        "cells": {part: len(positions) for part, positions in cells.parts.items()},
        "groups": {part: len(cells.groups(part)) for part in cells.parts},
        "genes": len(cells.vocabulary),
        "labels": dict(zip(cells.labels["names"], cells.class_counts_k.tolist(), strict=True)),
        "steps": {"max": train.max_steps, "epochs": round(train.max_steps * train.global_batch_size / max(num_train, 1), 2)},
        "most_tokens_per_cell": slots,
        "parameters": num_parameters,
        "memory_gb_per_worker": {"weights_and_optimizer": round(state / 1e9, 3), "activations": round(activations / 1e9, 3)},
        "notes": list(cells.notes),
    }


def main(task: Task, description: str, argv: Sequence[str] | None = None) -> int:
    """The command line of both training jobs."""
    parser = argparse.ArgumentParser(prog=f"python -m jobs.{task}", description=description)
    parser.add_argument(
        "--config", metavar="FILE", help="YAML recipe, such as jobs/recipes/base.yaml; what it leaves out keeps its default"
    )
    if task == "finetune":
        parser.add_argument(
            "--from", dest="init_from", metavar="MODEL", help="start from a run id, runs:/ID, models:/NAME@ALIAS or a model directory"
        )
    parser.add_argument("--obs-filter", metavar="FILTER", help="same as query.obs_filter=FILTER")
    parser.add_argument("--query", metavar="FILE", help="same as query.file=FILE, a query saved by jobs.query")
    parser.add_argument("--dry-run", action="store_true", help="print configuration, cells, steps and memory, and stop")
    parser.add_argument("--resume", metavar="RUN_DIR", help="go on with a killed run; only settings given beside it change")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings, such as atlas.uri=ATLAS model.n_hashes=8")
    arguments = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("jobs.tracking").setLevel(logging.WARNING)
    overrides: list[str] = list(arguments.overrides)
    try:
        config = ExperimentConfig.from_file(arguments.config) if arguments.config else ExperimentConfig()
        flags = {"query.obs_filter": arguments.obs_filter, "query.file": arguments.query}
        config = config.merge({name: value for name, value in flags.items() if value is not None})
        if arguments.resume is None:
            config = config.merge(overrides)
        init_from = getattr(arguments, "init_from", None)
        if arguments.dry_run:
            if arguments.resume is not None:
                config = ExperimentConfig.from_dict(read_run(arguments.resume)["config"]).merge(overrides)
            start = _load_start(config, init_from) if init_from else None
            cells = prepare_cells(config, task, start=start)
            config, attention = settled(config, cells, start)
            print(yaml.safe_dump(config.to_dict(), sort_keys=False))
            print(yaml.safe_dump(describe(config, cells), sort_keys=False) + attention)
            return 0
        result = run_training(config, task, init_from=init_from, resume=arguments.resume, overrides=overrides)
    except (ValueError, ConnectionError, FileNotFoundError) as error:
        print(f"{parser.prog}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(dataclasses.asdict(result)))
    return 0


def _load_start(config: ExperimentConfig, init_from: str) -> LoadedModel:
    start = load_model(tracking.resolve_model(init_from, config.tracking))
    ours, theirs = config.to_dict(), start.config.to_dict()
    for path in (*SAME_AS_START, *SAME_TOKENS):
        section, name = path.split(".")
        if ours[section][name] not in (theirs[section][name], "auto"):
            raise ValueError(
                f"{path}={ours[section][name]!r}, but the model {init_from} was trained with {theirs[section][name]!r};"
                f" set {path}={theirs[section][name]}, or start from another model"
            )
    return start


def _check_overlap(query: QueryResult, start: LoadedModel) -> None:
    found_g = np.isin(start.vocabulary.feature_ids, query.feature_ids)
    mean_g = start.vocabulary.mean_expression_g
    weight_g = mean_g if mean_g.any() else np.ones(len(found_g))
    share = float(weight_g[found_g].sum() / weight_g.sum())
    text = f"{int(found_g.sum())} of the start model's {len(found_g)} genes are in the query ({share:.0%} of its expected expression)"
    if share < MIN_OVERLAP:
        raise ValueError(f"{text}, fewer than {MIN_OVERLAP:.0%}; check query.var_filter, or train without --from")
    print(text, flush=True)


def initial_arrays(
    cells: TrainingCells, start: LoadedModel | None, checkpoint: ray.train.Checkpoint | None
) -> tuple[TrainingCells, dict[str, Any]]:
    """The cells with their final vocabulary, and the arrays that the network starts from."""
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            saved = load_model(Path(folder) / "model")
        if saved.labels["names"] != cells.labels["names"]:
            raise ValueError(f"the run was started with the labels {saved.labels['names']}, now they are {cells.labels['names']}")
        return dataclasses.replace(cells, vocabulary=saved.vocabulary), {}
    if start is not None:
        same_labels = start.labels["names"] == cells.labels["names"]
        weights = {name: tensor.numpy() for name, tensor in start.model.state_dict().items() if same_labels or not name.startswith(HEADS)}
        return cells, {"weights": weights, **({} if same_labels else _linear_start(cells))}
    sample = cells.sample
    mean_g = np.asarray(sample.mean(axis=0), dtype=np.float32).reshape(-1)
    vocabulary = GeneVocabulary(cells.vocabulary.feature_ids, cells.vocabulary.feature_names, mean_g)
    arrays = {}
    start_from, seed = cells.config.model.gene_embedding, cells.config.train.seed
    if start_from in ("svd", "shuffled"):
        embeddings_gd = svd_gene_embeddings(sample, cells.config.model.dim, seed)
        shuffles = start_from == "shuffled"
        arrays["gene_embeddings"] = np.random.default_rng([seed, 3]).permutation(embeddings_gd) if shuffles else embeddings_gd
    return dataclasses.replace(cells, vocabulary=vocabulary), {**arrays, **_linear_start(cells)}


def _linear_start(cells: TrainingCells) -> dict[str, Any]:
    """`linear` of `jobs.worker.start_from`, or nothing where none is wanted."""
    config = cells.config
    if not (cells.labels["names"] and config.model.linear_skip and config.model.linear_start_cells):
        return {}
    found = cells.stream("train").sample_counts(config.model.linear_start_cells, config.train.seed, even_labels=True)
    values_ng = normalised(found.counts_ng, found.total_n)
    if config.tokens.expression == "binary":
        values_ng.data[:] = 1
    counts_k = np.bincount(found.labels_n, minlength=len(cells.labels["names"]))
    return {"linear": logistic_start(values_ng, found.labels_n, class_weights(counts_k, config.train.class_weighting), found.panels)}


def train_on_cluster(
    config: ExperimentConfig,
    task: Task,
    cells: TrainingCells,
    start_arrays: dict[str, Any],
    run: tracking.TrackedRun,
    run_dir: str,
    checkpoint: ray.train.Checkpoint | None,
) -> ray.train.Result:
    """Train with a group of Ray Train workers; the result holds the last checkpoint, with the best model in its folder `model`."""
    from ray.train.torch import TorchConfig

    # Ray Train's account of itself for each report, rank and dataset would bury ours. Set them to 1 to see it.
    for name in ("CONTROLLER_STRUCTURED_LOGGING", "WORKER_STRUCTURED_LOGGING", "PRINT_PATCH"):
        os.environ.setdefault(f"RAY_TRAIN_ENABLE_{name}", "0")
    # How often Ray Train looks at its workers (2 s by default): each checkpoint, and the end, wait for the next look.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    cluster = config.cluster
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if cluster.use_gpu else {})
    trainer = _Trainer(
        train_loop_per_worker,
        train_loop_config={
            "config": config.to_dict(),
            "task": task,
            "streams": {part: cells.stream(part) for part, positions in cells.parts.items() if len(positions)},
            "labels": cells.labels,
            "lineage": lineage(cells.labels["cl_ids"]).to_json(),
            "class_counts": cells.class_counts_k.tolist(),
            "start": ray.put(start_arrays),
            "meta": {"task": task, **cells.identity(), "code": tracking.code_identity(), "run_id": run.run_id},
            "run": run,
            "resume": checkpoint,
        },
        scaling_config=ray.train.ScalingConfig(num_workers=cluster.num_workers, use_gpu=cluster.use_gpu, resources_per_worker=resources),
        torch_config=TorchConfig(backend="nccl" if cluster.use_gpu else "gloo"),
        run_config=ray.train.RunConfig(
            # A name of its own for each attempt: which checkpoint to go on from is ours to say, by the manifest that is written last.
            name=f"attempt-{len(_attempts(run_dir)):03d}",
            storage_path=run_dir,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    return trainer.fit()


class _Trainer(ray.train.torch.TorchTrainer):
    """Without the watcher that Ray Train starts for a controller that dies: it asks the dashboard.

    A Ray without dashboard is one that ends with this process, so nothing is left to clean up; the watcher would warn every second, or
    fail where another Ray runs on the machine.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        if ray._private.worker.get_dashboard_url():
            return callbacks
        return [callback for callback in callbacks if type(callback).__name__ != "PlacementGroupCleanerCallback"]


def _pinned(config: ExperimentConfig, query: QueryResult) -> ExperimentConfig:
    """The configuration that finds the same cells again at any time."""
    return config.merge({"atlas.uri": query.locator.uri, "atlas.timestamp_ms": query.locator.timestamp_ms})


def settled(config: ExperimentConfig, cells: TrainingCells, start: LoadedModel | None) -> tuple[ExperimentConfig, str]:
    """The configuration with its attention named: the start model's, whose weights fit no other one, or the faster one."""
    if start is not None and config.model.attention == "auto":
        config = config.merge({"model.attention": start.config.model.attention})
    model, says = settle_attention(config.model, config.tokens.most_slots(len(cells.vocabulary)))
    return dataclasses.replace(config, model=model), says


def _new_run_dir(config: ExperimentConfig, task: Task, run_id: str) -> str:
    name, storage = f"{task}-{run_id[:8]}-{uuid.uuid4().hex[:4]}", config.cluster.storage_path
    return f"{storage.rstrip('/')}/{name}" if "://" in storage else str(Path(storage or "runs").resolve() / name)


def _filesystem(run_dir: str) -> tuple[pyarrow.fs.FileSystem, str]:
    return pyarrow.fs.FileSystem.from_uri(run_dir if "://" in run_dir else Path(run_dir).resolve().as_uri())


def _write_run(run_dir: str, tree: dict[str, Any]) -> None:
    files, path = _filesystem(run_dir)
    files.create_dir(path, recursive=True)
    with files.open_output_stream(f"{path}/{RUN_FILE}") as out:
        out.write(json.dumps(tree, indent=2).encode())


def read_run(run_dir: str, *, option: str = "--resume") -> dict[str, Any]:
    """What a run wrote into its folder when it started: `config`, `task`, `init_from`, `query_hash` and `run`.

    Raises:
        ValueError: No such folder; the message names the command's option.
    """
    files, path = _filesystem(run_dir)
    try:
        with files.open_input_stream(f"{path}/{RUN_FILE}") as source:
            return json.loads(source.read())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{option} {run_dir}: no {RUN_FILE} there ({error}); give the folder that the run printed when it started"
        ) from error


def _attempts(run_dir: str) -> list[str]:
    files, path = _filesystem(run_dir)
    found = files.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))
    return sorted(info.path for info in found if info.type == pyarrow.fs.FileType.Directory and info.base_name.startswith("attempt-"))


def _newest_checkpoint(run_dir: str) -> ray.train.Checkpoint | None:
    """The last checkpoint that was written to its end, or None where there is none yet.

    Raises:
        ValueError: The run is finished.
    """
    files, _ = _filesystem(run_dir)
    for attempt in reversed(_attempts(run_dir)):
        folders = [info for info in files.get_file_info(pyarrow.fs.FileSelector(attempt)) if info.base_name.startswith("checkpoint_")]
        for info in sorted(folders, key=lambda info: info.base_name, reverse=True):
            checkpoint = ray.train.Checkpoint(info.path, filesystem=files)
            with checkpoint.as_directory() as folder:
                if not is_complete(folder):
                    continue
                if read_position(folder)["finished"]:
                    raise ValueError(f"--resume {run_dir}: that run is finished; its model is in {folder}/model")
                return checkpoint
    print(f"{run_dir} has no complete checkpoint yet: starting from its beginning", flush=True)
    return None


def _log_test_cells(run: tracking.TrackedRun, cells: TrainingCells, model_dir: Path) -> None:
    """Log what the model says of some test cells, with their embeddings, for the pictures of `jobs.report`."""
    if not len(cells.parts["test"]):
        return
    predictor = Predictor.load(model_dir)
    most_cells = min(SHOWN_CELLS, SHOWN_TOKENS // cells.config.tokens.most_slots(len(cells.vocabulary)))
    found = cells.stream("test").sample_counts(most_cells, cells.config.train.seed)
    counts = found.counts_ng
    offsets = counts.indptr.astype(np.int64)
    said = predictor.predict(counts.indices, counts.data, offsets, total_counts=found.total_n, panels=found.panels)
    position = np.searchsorted(cells.query.obs_joinids, found.joinids_n)
    groups = {name: cells.query.obs[name].astype(str).to_numpy()[position] for name in ("dataset_id", "donor_id")}
    table = pd.DataFrame(
        {
            "joinid": found.joinids_n,
            **groups,
            "label": np.array(cells.labels["names"], dtype=object)[found.labels_n],
            "prediction": said.best_labels,
            "confidence": said.probabilities_nk.max(axis=1),
            "said": said.labels,
            "embedding": list(said.embedding_nd),
        }
    )
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "cells.parquet"
        table.to_parquet(path, index=False)
        run.log_file(path, folder="test")


def _keep_model(source: Path, run_dir: str) -> Path:
    """Copy the model to where it outlives the checkpoints: the run folder, or a temporary one where that is remote."""
    target = Path(tempfile.mkdtemp(prefix="screformer-model-")) / "model" if "://" in run_dir else Path(run_dir) / "model"
    shutil.copytree(source, target, dirs_exist_ok=True)
    return target
