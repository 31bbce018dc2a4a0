"""The whole chain in one command.

Ingest, pre-train, fine-tune, evaluate on held-out donors, register, annotate.

Without --h5ad it simulates its data sets first. The result stands beside a logistic regression on the same
cells, and everything is kept in one folder. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import ray
import tiledbsoma
import torch

from cluster.connect import connect
from data_ingest.atlas import MEASUREMENT, X_LAYER, measured_genes, open_atlas
from data_ingest.h5ad import H5adFile
from data_ingest.ingest import ingest
from data_ingest.ingest_files import IngestOptions
from data_ingest.ontology import UNKNOWN, MajorTypes, is_cell_term
from data_ingest.simulate import DATASETS, HELD_OUT, simulate_h5ads
from data_ingest.tables import read_table
from jobs.arguments import split_overrides
from jobs.labelling.h5ad_copy import annotate
from jobs.reports.artifacts import ANNOTATED, log_baselines
from jobs.reports.run_report import SCORES, write_report
from jobs.studies.baseline_cells import BaselineCells, baseline_parts
from jobs.studies.baselines import run_baseline
from jobs.tracking.client import tracking_uri
from jobs.tracking.logged import logged_run
from jobs.tracking.runs import TrackedRun
from jobs.training.cells import TrainingCells, prepare_cells
from jobs.training.run import run_training
from screformer.config import ExperimentConfig
from screformer.metrics import OURS, LabelCounts
from screformer.predictor import Predictor

# Axes: n cells, g genes, k classes.

RECIPE = Path(__file__).parent / "recipes" / "quickstart.yaml"
_MARKER = ".screformer-quickstart"
_MOST_EXPORTED = 5_000


@dataclass(frozen=True, kw_only=True)
class TunedRegression:
    """A logistic regression and what it scored on the held-out cells."""

    c: float
    """Inverse regularisation, chosen by macro-F1 on the validation cells."""
    test: LabelCounts


def logistic_regression(cells: TrainingCells) -> TunedRegression:
    """Fit `logistic_l2` of `jobs.baselines` on the cells and genes that the model gets.

    Ray must be running.
    """
    parts, _ = baseline_parts(cells)
    k = len(cells.labels["names"])
    found = BaselineCells(
        train=parts["train"],
        val=parts["val"],
        test_x_ng=parts["test"].x_ng,
        num_classes=k,
        genes=cells.genes.feature_ids,
    )
    answer, _ = run_baseline("logistic_l2", found, cells.config.train.seed)
    counts = LabelCounts(k)
    counts.add(torch.from_numpy(parts["test"].labels_n), torch.from_numpy(answer.predicted_n))
    return TunedRegression(c=answer.chosen["C"], test=counts)


class _Clock:
    """Prints each stage with the seconds since the start."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def say(self, stage: str, text: str) -> None:
        print(f"[{self.seconds:6.1f} s] {stage:<9} {text}", flush=True)


def _own_major_types(path: Path, labels: Path | None) -> np.ndarray | None:
    """What the file itself says its cells are, as major types ("unknown" where it doesn't).

    Or None if it says nothing. Shape (n,).
    """
    with H5adFile.open(path) as file:
        obs = file.obs
    if "cell_type_major" in obs:
        return obs["cell_type_major"].astype(str).to_numpy()
    terms = (
        obs["cell_type_ontology_term_id"].astype(str).to_numpy()
        if "cell_type_ontology_term_id" in obs
        else np.full(len(obs), UNKNOWN)
    )
    if labels is not None and "cell_type" in obs:
        rows = read_table(labels, "--labels", ("dataset", "cell_type", "cl_id"))
        term_of = {
            (dataset, label): cl_id
            for dataset, label, cl_id in zip(rows["dataset"], rows["cell_type"], rows["cl_id"], strict=True)
        }
        column = next((name for name in ("dataset_id", "dataset") if name in obs), None)
        datasets = obs[column].astype(str) if column else [path.stem] * len(obs)
        found = [term_of.get(pair, "") for pair in zip(datasets, obs["cell_type"].astype(str), strict=True)]
        terms = np.where(np.array(found) != "", found, terms)
    majors = MajorTypes()
    name_of = {
        term: majors.roll_up(term).name if is_cell_term(term) else UNKNOWN for term in np.unique(terms)
    }
    names = np.array([name_of[term] for term in terms])
    return names if (names != UNKNOWN).any() else None


def _agreement(source: Path, annotated: Path, labels: Path | None) -> tuple[float, int] | None:
    """Share of a file's cells whose prediction is what the file itself says of them.

    And how many it says something of.
    """
    own_n = _own_major_types(source, labels)
    if own_n is None:
        return None
    with H5adFile.open(annotated) as file:
        predicted_n = file.obs["predicted_labels"].astype(str).to_numpy()
    known_n = own_n != UNKNOWN
    return float((predicted_n == own_n)[known_n].mean()), int(known_n.sum())


def _write_test_cells(cells: TrainingCells, path: Path) -> None:
    """Write test cells as an .h5ad of raw counts, as a laboratory would have it.

    Those of one dataset, with the genes that it measured.

    It is the dataset with the most test cells; very many are thinned out evenly.
    """
    datasets_n = cells.query.obs["dataset_id"].astype(str).to_numpy()[cells.parts["test"]]
    names, sizes = np.unique(datasets_n, return_counts=True)
    chosen = names[sizes.argmax()]
    positions = cells.parts["test"][datasets_n == chosen]
    positions = positions[:: -(-len(positions) // _MOST_EXPORTED)]
    atlas = cells.query.atlas
    wanted = tiledbsoma.AxisQuery(coords=(cells.query.obs_joinids[positions],))
    with open_atlas(atlas) as experiment, experiment.axis_query(MEASUREMENT, obs_query=wanted) as query:
        found: anndata.AnnData = query.to_anndata(X_LAYER)
    found = found[:, measured_genes(atlas, [chosen], found.var["soma_joinid"].to_numpy())[0]].copy()
    found.obs_names = (
        found.obs["dataset_id"].astype(str) + ":" + found.obs_names.astype(str)
    )  # tiledbsoma takes obs_id as the index
    found.var_names = found.var["feature_id"].astype(str)
    found.write_h5ad(path, compression="gzip")


def _fresh_folder(out: Path) -> None:
    """Make the folder, without the atlas of an earlier run; models and runs stay.

    Raises:
        ValueError: There is an atlas that this command did not make.
    """
    out.mkdir(parents=True, exist_ok=True)
    atlas = out / "atlas"
    if atlas.exists():
        if not (out / _MARKER).exists():
            raise ValueError(f"--out {out} holds an atlas that quickstart did not make; name another folder")
        shutil.rmtree(atlas)
    (out / _MARKER).touch()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Do all stages; the result is what the last line on stdout says.

    Raises:
        ValueError: Files, donors or settings that cannot be used.
    """
    clock, out = _Clock(), args.out.resolve()
    simulates = not args.h5ad
    settings: dict[str, Any] = {
        "atlas.uri": str(out / "atlas"),
        "tracking.uri": f"sqlite:///{out / 'mlflow.db'}",
        "tracking.experiment": "quickstart",
        "cluster.storage_path": str(out / "runs"),
    }
    test_donors = args.test_donors or (
        [f"{dataset.name}_donor{dataset.donors}" for dataset in DATASETS] if simulates else []
    )
    if test_donors:
        settings |= {"split.group_by": "donor_id", "split.test_groups": test_donors}
    config = ExperimentConfig.from_file(args.config).merge(settings).merge(args.overrides)
    for path in (
        *args.h5ad,
        *([args.annotate] if args.annotate else []),
        *([args.labels] if args.labels else []),
    ):
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
    _fresh_folder(out)

    if simulates:
        args.h5ad = simulate_h5ads(out / "simulated", num_cells=args.cells, seed=config.train.seed)
        held_out = simulate_h5ads(
            out / "simulated",
            num_cells=max(40, args.cells // 6),
            seed=config.train.seed,
            datasets=(HELD_OUT,),
        )
        args.annotate = args.annotate or held_out[0]
        clock.say("simulate", f"{args.cells:,} cells in {len(args.h5ad)} .h5ad files -> {out / 'simulated'}")

    connect(
        num_cpus=config.cluster.num_workers * config.cluster.cpus_per_worker
        + config.cluster.cpus_per_read_task
    )
    try:
        # Two symbols of one Ensembl gene are common in older files, and their counts belong together.
        report = ingest(args.h5ad, config.atlas.uri, IngestOptions(labels=args.labels, duplicate_genes="sum"))
        for file in report.files:
            print("\n".join(f"             {line}" for line in file.lines()))
        clock.say(
            "ingest", f"{report.cells_added:,} cells, {report.genes_total:,} genes -> {report.atlas_uri}"
        )

        cells = prepare_cells(config, "finetune")
        if not len(cells.parts["test"]):
            raise ValueError(
                "no cells are held out for the test; give --test-donors, or split.test_fraction above 0"
            )
        held = ", ".join(cells.groups("test"))
        sizes = ", ".join(f"{part} {len(positions):,}" for part, positions in cells.parts.items())
        clock.say(
            "query",
            f"{len(cells.labels['names'])} major types; cells: {sizes}; held-out {config.split.group_by}:"
            f" {held}",
        )

        start = None
        if args.pretrain_steps:
            pretrained = run_training(config.merge({"train.max_steps": args.pretrain_steps}), "pretrain")
            start, loss = pretrained.model_dir, pretrained.metrics.get("best_val/loss", float("nan"))
            clock.say("pretrain", f"{args.pretrain_steps} steps, loss {loss:.4f} on validation cells")

        tuned = run_training(config, "finetune", init_from=start)
        assert tuned.model_version is not None
        model = f"models:/{config.tracking.model_name}/{tuned.model_version}"
        clock.say(
            "finetune",
            f"{config.train.max_steps} steps, macro-F1 {tuned.metrics['best_val/macro_f1']:.3f} on validation"
            f" cells",
        )
        clock.say("register", f"{model} (alias candidate)")

        baseline = logistic_regression(cells)
        clock.say(
            "evaluate",
            f"logistic regression on the same cells, C = {baseline.c:g} chosen on the validation cells",
        )

        source = args.annotate
        if source is None:
            source = out / "held_out_donors.h5ad"
            _write_test_cells(cells, source)
        target = out / f"{source.stem}.annotated.h5ad"
        annotation = annotate(Predictor.load(tuned.model_dir), source, target, model=model, overwrite=True)
        print("\n".join(f"             {line}" for line in str(annotation).splitlines()))
        run = TrackedRun(tracking_uri=tracking_uri(config.tracking), run_id=tuned.run_id)
        run.log_table(annotation.table, f"{ANNOTATED}/{source.stem}.csv")
        log_baselines(run, _scores(cells, tuned.metrics, baseline).iloc[1:])
        agreement = _agreement(source, target, args.labels)
        says = (
            f"; {agreement[0]:.1%} of {agreement[1]:,} agree with the file's own labels" if agreement else ""
        )
        clock.say("annotate", f"{annotation.num_cells:,} cells of {source.name}{says}")
        page = out / "report.html"
        write_report(logged_run(tuned.run_id, config.tracking), (), page)
        clock.say("report", str(page))
    finally:
        ray.shutdown()

    scores = {name: tuned.metrics[f"test/{name}"] for name in ("accuracy", "macro_f1")}
    print(_table(cells, tuned.metrics, baseline))
    print(_where_to_look(out, config.tracking.model_name))
    return {
        "model": model,
        "version": tuned.model_version,
        "test": scores,
        "baseline": {
            "name": "logistic regression",
            "c": baseline.c,
            "accuracy": baseline.test.accuracy,
            "macro_f1": baseline.test.macro_f1,
        },
        "annotated": str(target),
        "seconds": round(clock.seconds, 1),
    }


def _scores(cells: TrainingCells, metrics: dict[str, float], baseline: TunedRegression) -> pd.DataFrame:
    """Test scores of the model, the logistic regression and the most frequent type.

    A row each with `model` and the names of `SCORES`.
    """
    majority = LabelCounts(len(cells.labels["names"]))
    truth = torch.from_numpy(cells.codes_n[cells.parts["test"]])
    majority.add(truth, torch.full_like(truth, int(cells.class_counts_k.argmax())))
    rows = [{"model": OURS} | {score: metrics[f"test/{score}"] for score in SCORES}]
    for name, counts in (("logistic regression", baseline.test), ("most frequent type", majority)):
        rows.append({"model": name} | {score: getattr(counts, score) for score in SCORES})
    return pd.DataFrame(rows)


def _table(cells: TrainingCells, metrics: dict[str, float], baseline: TunedRegression) -> str:
    donors = ", ".join(cells.groups("test"))
    lines = [
        "",
        f"{len(cells.parts['test']):,} cells of held-out donors ({donors})",
        f"{'':<22}accuracy  macro-F1",
    ]
    scores = _scores(cells, metrics, baseline)
    return "\n".join(
        lines + [f"{row.model:<22}{row.accuracy:8.3f}{row.macro_f1:10.3f}" for row in scores.itertuples()]
    )


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


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the last line on stdout is one JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.quickstart", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--h5ad",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="your .h5ad files of raw counts; default: simulated",
    )
    parser.add_argument(
        "--labels",
        type=Path,
        help="tab-separated table (dataset, cell_type, cl_id) for labels without a Cell Ontology term",
    )
    parser.add_argument(
        "--test-donors",
        nargs="+",
        default=[],
        metavar="DONOR",
        help="donors to hold out; default: a fifth of the cells",
    )
    parser.add_argument(
        "--annotate",
        type=Path,
        metavar="FILE",
        help=".h5ad to label in the end; default: held-out cells of one dataset",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("quickstart"),
        help="folder for all that is made (default ./quickstart)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=RECIPE,
        metavar="RECIPE",
        help="settings (default jobs/recipes/quickstart.yaml)",
    )
    parser.add_argument(
        "--pretrain-steps",
        type=int,
        default=100,
        metavar="N",
        help="steps of pre-training; 0 leaves it out (default %(default)s)",
    )
    parser.add_argument(
        "--cells", type=int, default=2400, metavar="N", help="cells to simulate (default %(default)s)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="settings that differ from the recipe"
    )
    words, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args([*words, *(["--", *overrides] if overrides else [])])
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        result = run(args)
    except ValueError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
