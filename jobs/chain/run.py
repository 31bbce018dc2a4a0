"""Ingest, pre-train, fine-tune, test, register, annotate and report, all in one folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from cluster.connect import connect
from data_ingest.cells import H5adCells
from data_ingest.ingest import ingest
from data_ingest.ingest_options import IngestOptions
from data_ingest.simulate import DATASETS, HELD_OUT, simulate_h5ads
from jobs.chain.scores import logistic_regression, score_table, score_text
from jobs.chain.unseen import agreement_text, write_test_cells
from jobs.labelling.h5ad_copy import annotate
from jobs.reports.artifacts import ANNOTATED, log_baselines
from jobs.reports.run_report import write_report
from jobs.tracking.client import tracking_uri
from jobs.tracking.logged import logged_run
from jobs.tracking.runs import TrackedRun
from jobs.training.prepare import prepare_cells
from jobs.training.run import run_training
from screformer.config import ExperimentConfig
from screformer.genes import MIN_GENE_OVERLAP
from screformer.predictor import Predictor

_MARKER = ".screformer-quickstart"
_FEWEST_UNSEEN = 40


def run_chain(
    config: ExperimentConfig,
    out: Path,
    *,
    files: Sequence[Path] = (),
    labels: Path | None = None,
    unseen: Path | None = None,
    pretrain_steps: int = 100,
    simulated_cells: int = 2400,
) -> dict[str, Any]:
    """Run all stages, printing a line for each.

    Args:
        config: Settings of all stages, with `atlas.uri`, `tracking` and `cluster.storage_path`.
        out: Folder for everything else. An atlas from an earlier run is replaced; models and runs are kept.
        files: .h5ad files with raw counts; if empty, simulated ones.
        labels: As `IngestOptions.labels`.
        unseen: File to label at the end; None uses test cells of one dataset, or a simulated dataset.
        pretrain_steps: Pre-training steps; 0 skips pre-training.
        simulated_cells: Cells to simulate.

    Returns:
        `model`, `version`, `test` and `baseline` (scores), `annotated` (a path), `seconds`.

    Raises:
        ValueError: Files, donors or settings that cannot be used.
    """
    clock, out = _Clock(), out.resolve()
    _fresh_folder(out)
    if not files:
        seed = config.train.seed
        files = simulate_h5ads(out / "simulated", num_cells=simulated_cells, seed=seed)
        held_out = simulate_h5ads(
            out / "simulated",
            num_cells=max(_FEWEST_UNSEEN, simulated_cells // 6),
            seed=seed,
            datasets=(HELD_OUT,),
        )
        unseen = unseen or held_out[0]
        if config.split.group_by == "donor_id" and not config.split.test_groups:
            last_donors = [f"{dataset.name}_donor{dataset.donors}" for dataset in DATASETS]
            config = config.merge({"split.test_groups": last_donors})
        clock.say("simulate", f"{simulated_cells:,} cells in {len(files)} .h5ad files -> {out / 'simulated'}")
    layout, ray_was_there = config.cluster, ray.is_initialized()
    connect(num_cpus=layout.num_workers * layout.cpus_per_worker + layout.cpus_per_read_task)
    try:
        return _stages(config, out, clock, files, labels, unseen, pretrain_steps)
    finally:
        if not ray_was_there:
            ray.shutdown()


def _stages(
    config: ExperimentConfig,
    out: Path,
    clock: _Clock,
    files: Sequence[Path],
    labels: Path | None,
    unseen: Path | None,
    pretrain_steps: int,
) -> dict[str, Any]:
    # In older files, two symbols often belong to one Ensembl gene; their counts are summed.
    added = ingest(files, config.atlas.uri, IngestOptions(labels=labels, duplicate_genes="sum"))
    for file in added.files:
        clock.detail("\n".join(file.lines()))
    clock.say("ingest", f"{added.cells_added:,} cells, {added.genes_total:,} genes -> {added.atlas_uri}")

    cells = prepare_cells(config, "finetune")
    if not len(cells.parts["test"]):
        raise ValueError(
            "no cells are held out for testing; set --test-donors, or split.test_fraction above 0"
        )
    sizes = ", ".join(f"{part} {len(positions):,}" for part, positions in cells.parts.items())
    clock.say(
        "query",
        f"{len(cells.labels['names'])} major types; cells: {sizes};"
        f" held-out {config.split.group_by}: {', '.join(cells.groups('test'))}",
    )

    start = None
    if pretrain_steps:
        pretrained = run_training(config.merge({"train.max_steps": pretrain_steps}), "pretrain")
        start, loss = pretrained.model_dir, pretrained.metrics.get("best_val/loss", float("nan"))
        clock.say("pretrain", f"{pretrain_steps} steps, loss {loss:.4f} on validation cells")

    tuned = run_training(config, "finetune", init_from=start)
    assert tuned.model_version is not None
    model = f"models:/{config.tracking.model_name}/{tuned.model_version}"
    macro_f1 = tuned.metrics["best_val/macro_f1"]
    clock.say("finetune", f"{config.train.max_steps} steps, macro-F1 {macro_f1:.3f} on validation cells")
    clock.say("register", f"{model} (alias candidate)")

    baseline = logistic_regression(cells)
    clock.say(
        "evaluate",
        f"logistic regression on the same cells, C = {baseline.c:g} chosen on the validation cells",
    )

    if unseen is None:
        unseen = out / "held_out_donors.h5ad"
        write_test_cells(cells, unseen)
    target = out / f"{unseen.stem}.annotated.h5ad"
    predictor = Predictor.load(tuned.model_dir)
    unseen_cells = H5adCells.open(predictor, unseen, min_gene_overlap=MIN_GENE_OVERLAP)
    annotation = annotate(predictor, unseen_cells, target, model=model, overwrite=True)
    clock.detail(str(annotation))
    scores = score_table(cells, tuned.metrics, baseline)
    run = TrackedRun(tracking_uri=tracking_uri(config.tracking), run_id=tuned.run_id)
    run.log_table(annotation.table, f"{ANNOTATED}/{unseen.stem}.csv")
    log_baselines(run, scores.iloc[1:])
    agreement = agreement_text(unseen, target, labels)
    clock.say("annotate", f"{annotation.num_cells:,} cells of {unseen.name}{agreement}")

    page = out / "report.html"
    write_report(logged_run(tuned.run_id, config.tracking), (), page)
    clock.say("report", str(page))
    print(score_text(scores, cells))
    print(_where_to_look(out, config.tracking.model_name))
    return {
        "model": model,
        "version": tuned.model_version,
        "test": {name: tuned.metrics[f"test/{name}"] for name in ("accuracy", "macro_f1")},
        "baseline": {
            "name": "logistic regression",
            "c": baseline.c,
            "accuracy": baseline.test.accuracy,
            "macro_f1": baseline.test.macro_f1,
        },
        "annotated": str(target),
        "seconds": round(clock.seconds, 1),
    }


class _Clock:
    """Prints each stage with the seconds since the start."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def say(self, stage: str, text: str) -> None:
        print(f"[{self.seconds:6.1f} s] {stage:<9} {text}", flush=True)

    @staticmethod
    def detail(text: str) -> None:
        print("\n".join(f"             {line}" for line in text.splitlines()))


def _fresh_folder(out: Path) -> None:
    """Create the folder, and remove the atlas of an earlier run.

    Raises:
        ValueError: The folder has an atlas that this command did not create.
    """
    out.mkdir(parents=True, exist_ok=True)
    atlas = out / "atlas"
    if atlas.exists():
        if not (out / _MARKER).exists():
            raise ValueError(f"--out {out} holds an atlas that quickstart did not create; use another folder")
        shutil.rmtree(atlas)
    (out / _MARKER).touch()


def _where_to_look(out: Path, model_name: str) -> str:
    def short(path: Path) -> Path:
        return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path

    store = f"sqlite:///{short(out / 'mlflow.db')}"
    return f"""
the report, for any browser:                {short(out / "report.html")}
runs, curves, per-type scores, confusion:   mlflow ui --backend-store-uri {store}
label your own cells:                       screformer annotate --tracking-uri {store} \\
                                                --model models:/{model_name}@candidate \\
                                                --h5ad YOURS.h5ad --out labelled.h5ad
"""
