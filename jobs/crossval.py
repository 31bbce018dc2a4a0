"""Cross-validate scReformer-BERT beside its baselines on the same folds, or search for its settings.

One parent run in MLflow holds the folds (`folds.parquet`) and the report; each fold of each configuration is a child run. A test fold is
never seen before its end: validation cells out of the other folds choose the step and the settings of baselines.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import yaml

from cluster.connect import connect
from data_ingest.folds import FILE
from jobs import tracking
from jobs.baselines import BASELINES, check_names
from jobs.comparison import fold_scores, scores, verdict, write_crossval_report
from jobs.study import OURS, STUDY, Study, StudyConfig, open_study, read_baseline_cells, register_final, results_of, run_baseline_fold
from jobs.tune import BASELINE_CPUS, check_study_layout, count_trials, fold_bundle, num_cpus, run_trials, search_space
from screformer.attention import settle_attention
from screformer.config import ExperimentConfig
from screformer.model import ScReformer, classification_loss
from screformer.tokenizer import NUM_SPECIAL


def run_crossval(config: StudyConfig, *, folds_from: str | None = None, resume: str | None = None) -> dict[str, Any]:
    """Run all folds of all configurations and baselines, and write the report; connects to Ray where no connection is.

    Args:
        config: The recipe with its overrides; when resuming, that of the interrupted study.
        folds_from: Where to take folds from, as `open_study`.
        resume: Folder of a study that was interrupted; finished folds are not run again.

    Returns:
        `run_id`, `run_dir`, `report` (its path), `scores` (mean of each metric, ours), `baselines` (macro-F1 by name), `skipped`,
        `model_version` (of `crossval.register`, else None).

    Raises:
        ValueError: Settings, cells, folds or cluster do not allow it.
        RuntimeError: A fold or a baseline failed; the others' results are kept.
    """
    with opened(config, "crossval", folds_from=folds_from, resume=resume) as study:
        assert study.run is not None
        config = study.config
        skipped = study.missing_baselines()
        notes = study.notes()
        notes += [
            f"{BASELINES[name].title} was skipped: it needs {', '.join(missing)}; pip install 'screformer[baselines]'"
            for name, missing in skipped.items()
        ]
        for note in notes:
            print(f"note: {note}", flush=True)
        wanted = [name for name in check_names(config.crossval.baselines) if name not in skipped]
        beside = _Beside(lambda: _run_baselines(study, wanted))
        drawn = config.search.algorithm != "grid" and bool(config.search.space)
        settings = run_trials(study, search_space(config), num_samples=config.search.num_samples if drawn else 1)
        beside.join()
        found = [(setting, results_of(study.trial_folder(setting), len(study.folds))) for setting in settings]
        trials = [
            {"settings": ", ".join(f"{name}={value}" for name, value in setting.items()) or "the recipe's", "folds": len(results)}
            | {"macro-F1": float(np.mean([_macro_f1(result, study) for result in results]))}
            for setting, results in found
            if results
        ]
        whole = [(setting, results) for setting, results in found if len(results) == len(study.folds)]
        best, ours = max(whole, key=lambda pair: np.mean([_macro_f1(result, study) for result in pair[1]]))
        if len(trials) > 1:
            notes.append(
                f"scReformer-BERT is the best of {len(trials)} configurations, chosen on these test folds: its score flatters ({best})"
            )
        methods = {OURS: ours} | {name: results_of(study.baseline_folder(name), len(study.folds)) for name in wanted}
        tree = write_crossval_report(study, methods, trials, notes)
        log_report(study, tree["methods"])
        print(verdict(tree["methods"]), flush=True)
        version = None
        if config.crossval.register:
            bundle = fold_bundle(config)
            task = ray.remote(register_final).options(num_cpus=bundle.get("CPU", 0), num_gpus=bundle.get("GPU", 0))
            version = ray.get(task.remote(study, best, fold_scores(study, ours)))
        macro_f1 = {name: entry["metrics"]["macro_f1"]["mean"] for name, entry in tree["methods"].items()}
        return {
            "run_id": study.run.run_id,
            "run_dir": str(study.run_dir),
            "report": str(study.run_dir / "report.html"),
            "scores": {name: entry["mean"] for name, entry in tree["methods"][OURS]["metrics"].items()},
            "baselines": {name: value for name, value in macro_f1.items() if name != OURS},
            "skipped": sorted(skipped),
            "model_version": version,
        }


@contextmanager
def opened(config: StudyConfig, job: str, *, folds_from: str | None = None, resume: str | None = None) -> Iterator[Study]:
    """A running study: Ray connected, the layout checked, folder and parent run made or taken up again.

    Args:
        config: The recipe; when resuming, that of the interrupted study is taken instead.
        job: `crossval` or `ablate`.
        folds_from: As `open_study`.
        resume: Folder of the interrupted study.

    Raises:
        ValueError: Settings, cells, folds or cluster do not allow it.
    """
    saved = read_study(resume) if resume else {}
    config = StudyConfig.from_dict(saved["config"]) if saved else config
    storage = config.cluster.storage_path or "runs"
    if "://" in storage:
        raise ValueError(f"cluster.storage_path={storage!r}: a study needs a folder that all nodes see, not a URI")
    connect(num_cpus=num_cpus(config))
    check_study_layout(config, ray.nodes())
    search_space(config)
    run_dir = Path(resume or Path(storage) / f"{job}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}").resolve()
    study = open_study(config, run_dir=run_dir, folds_from=folds_from, resume=bool(saved))
    if saved and saved["query_hash"] != study.query.hash:
        raise ValueError(f"{run_dir} was begun on other cells (query hash {saved['query_hash'][:12]}, now {study.query.hash[:12]})")
    run = tracking.TrackedRun(**saved["run"]) if saved else tracking.start_run(study.config.experiment, job)
    study = dataclasses.replace(study, run=run)
    with run:
        if not saved:
            run_dir.mkdir(parents=True, exist_ok=True)
            study.folds.save(run_dir / FILE, study.query.obs_joinids)
            plain = {"config": study.config.to_dict(), "query_hash": study.query.hash, "job": job, "run": dataclasses.asdict(run)}
            (run_dir / STUDY).write_text(json.dumps(plain, indent=2))
            run.log_identity({"query": study.query.identity(), "split": study.folds.kind})
            run.log_file(run_dir / FILE)
        print(f"{job} in {run_dir} (go on after an interruption with --resume {run_dir})", flush=True)
        yield study


def read_study(run_dir: str) -> dict[str, Any]:
    """What was written when a study began.

    Raises:
        ValueError: There is none.
    """
    try:
        tree: dict[str, Any] = json.loads((Path(run_dir) / STUDY).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--resume {run_dir}: no {STUDY} there ({error}); give the folder that the study printed when it started"
        ) from error
    return tree


def log_report(study: Study, methods: Mapping[str, Any]) -> None:
    """Put a study's report and its mean scores into the parent run."""
    assert study.run is not None
    for name in ("report.md", "report.html", "report.json", "report_files"):
        if (study.run_dir / name).exists():
            study.run.log_file(study.run_dir / name)
    metrics = {}
    for name, entry in methods.items():
        prefix = "cv" if name == OURS else f"baseline/{name}"
        for metric, scored in entry["metrics"].items():
            metrics[f"{prefix}/{metric}"] = scored["mean"]
            if scored["sd"] is not None:
                metrics[f"{prefix}/{metric}_sd"] = scored["sd"]
    study.run.log_metrics(metrics, step=0)


class _Beside:
    """Something that runs in a thread beside the trials; `join` gives its exception."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._error: BaseException | None = None

        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - raised again by join
                self._error = error

        self._thread = threading.Thread(target=run, name="baselines", daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error


def _run_baselines(study: Study, names: Sequence[str]) -> None:
    """Fit the baselines of all folds, one at a time; a fold's cells are read once and lie in the object store meanwhile."""
    task = ray.remote(num_cpus=BASELINE_CPUS)(run_baseline_fold)
    shared = ray.put(study)
    failed = []
    for fold in range(len(study.folds)):
        missing = [name for name in names if not (study.baseline_folder(name) / f"fold-{fold}.json").is_file()]
        if not missing:
            continue
        cells, joinids, labels, known = read_baseline_cells(study, fold)
        reference = ray.put(cells)
        del cells
        for name in missing:
            try:
                ray.get(task.remote(shared, name, fold, reference, joinids, labels, known))
                print(f"fold {study.folds.names[fold]}: {BASELINES[name].title}", flush=True)
            except ray.exceptions.RayTaskError as error:
                failed.append(f"{name} in fold {study.folds.names[fold]}: {error.cause or error}")
    if failed:
        raise RuntimeError(f"{len(failed)} baselines failed, the others' results are kept: {failed[0]}")


def _macro_f1(result: Any, study: Study) -> float:
    return scores(result, study)["macro_f1"]


def train_seconds_per_cell(config: ExperimentConfig, num_genes: int, num_classes: int) -> float:
    """Seconds that a training step takes per cell on this machine, measured on two steps of one micro-batch of full length."""
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    model = ScReformer(config.model, config.tokens, num_genes=num_genes, num_classes=num_classes, seed=0)
    slots = num_genes if config.tokens.input_mode == "all" else min(config.tokens.max_genes, num_genes)
    size, generator = config.train.micro_batch_size, torch.Generator().manual_seed(0)
    genes = torch.rand(size, num_genes, generator=generator).argsort(1)[:, :slots].sort(1).values + NUM_SPECIAL
    batch = {
        "token_ids": genes,
        "values": torch.rand(size, slots, generator=generator) * 4,
        "bin_ids": torch.ones(size, slots, dtype=torch.int64),
        "labels": torch.zeros(size, dtype=torch.int64),
    }
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        logits = model(batch, task="finetune", hash_seed=0).logits_nk
        classification_loss(logits, batch["labels"], None)[0].backward()
        seconds.append(time.perf_counter() - start)
    return min(seconds) / size


def describe_study(study: Study, configs: Sequence[ExperimentConfig], *, repeats: int = 1) -> dict[str, Any]:
    """What a study will take: folds, notes, and hours by a measured training step and the baselines' known speed.

    The step is measured with as many tokens as a cell can have, so cells with fewer detected genes take less.

    Args:
        study: Opened, not begun.
        configs: Its configurations; at most three different steps are measured.
        repeats: How often each runs, such as once per seed.
    """
    crossval, folds = study.config.crossval, len(study.folds)
    sizes = [{part: len(positions) for part, positions in study.split(fold).items()} for fold in range(folds)]
    num_genes, k = len(study.query.feature_ids), len(study.label_names)
    measured: dict[str, float] = {}
    seconds = 0.0
    for config in configs:
        key = json.dumps([config.model.__dict__, config.tokens.__dict__, config.train.micro_batch_size], default=str)
        if key not in measured:
            config = dataclasses.replace(config, model=settle_attention(config.model, config.tokens.most_slots(num_genes))[0])
            measured[key] = train_seconds_per_cell(config, num_genes, k)
        steps = config.train.max_steps + (crossval.pretrain_steps if crossval.pretrain != "none" else 0)
        evaluations = config.train.max_steps // config.train.eval_every_steps + 2
        for size in sizes:
            # A forward pass alone is about a third of a step.
            cells = steps * config.train.global_batch_size + (evaluations * size["val"] + size["test"]) / 3
            seconds += repeats * cells * measured[key] / config.cluster.num_workers
    parallel = study.config.search.concurrent_trials * crossval.concurrent_folds
    names = [name for name in check_names(crossval.baselines) if not BASELINES[name].missing]
    baselines_s = sum(BASELINES[name].seconds_per_1000_cells * size["train"] / 1000 for name in names for size in sizes)
    return {
        "cells": len(study.labels_n),
        "genes": num_genes,
        "labels": {name: int((study.labels_n == code).sum()) for code, name in enumerate(study.label_names)},
        "folds": [{"name": name, **size} for name, size in zip(study.folds.names, sizes, strict=True)],
        "notes": study.notes(),
        "configurations": len(configs) * repeats,
        "minutes": {"ours": round(seconds / parallel / 60, 1), "baselines, beside": round(baselines_s / 60, 1)},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the last line on stdout is one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m jobs.crossval", description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--split", choices=["donor", "dataset", "random"], help="same as crossval.split=...: what a fold keeps together")
    arguments = parser.parse_intermixed_args(argv)

    def dry_run(config: StudyConfig) -> dict[str, Any]:
        study = open_study(config, folds_from=arguments.folds)
        return describe_study(study, [config.experiment] * count_trials(config))

    overrides = [f"crossval.split={arguments.split}"] if arguments.split else []
    return run_command(parser, arguments, overrides, dry_run, run_crossval)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that studies share."""
    parser.add_argument("--config", metavar="FILE", help="YAML recipe, such as jobs/recipes/crossval.yaml")
    parser.add_argument("--folds", metavar="RUN", help="take the folds of an earlier study: its folder, folds.parquet or MLflow run id")
    parser.add_argument("--dry-run", action="store_true", help="print settings, folds, what is to be known and how long it takes, and stop")
    parser.add_argument("--resume", metavar="RUN_DIR", help="go on with an interrupted study; finished folds are not run again")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="settings, such as atlas.uri=ATLAS crossval.num_folds=3"
    )


def run_command(
    parser: argparse.ArgumentParser,
    arguments: argparse.Namespace,
    overrides: Sequence[str],
    dry_run: Callable[[StudyConfig], dict[str, Any]],
    run: Callable[..., dict[str, Any]],
) -> int:
    """Run a study's command: read the recipe, look ahead or run, print the result."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        if arguments.resume and (arguments.overrides or overrides or arguments.config or arguments.folds):
            raise ValueError("--resume goes on with the settings of the interrupted study; give nothing beside it")
        config = StudyConfig.from_file(arguments.config) if arguments.config else StudyConfig()
        config = config.merge([*arguments.overrides, *overrides])
        if arguments.dry_run:
            print(yaml.safe_dump(config.to_dict(), sort_keys=False))
            print(yaml.safe_dump(dry_run(config), sort_keys=False), end="")
            return 0
        result = run(config, folds_from=arguments.folds, resume=arguments.resume)
    except (ValueError, ConnectionError, FileNotFoundError, RuntimeError) as error:
        print(f"{parser.prog}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
