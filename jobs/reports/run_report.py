"""The report of a run: what was run on what, what came out beside the baselines, and pictures of it.

Everything comes from what the run logged, so a report can be made again at any time. A section appears where
its artifacts are found; tables and pictures that jobs log under a folder of `FOLDERS` appear without being
known here.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml

from jobs.reports.figures import confusion_figure, learning_figure, reliability_figure
from jobs.reports.page import Report
from jobs.tracking.runs import LoggedRun
from screformer.config import ExperimentConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Axes: n cells, d model width.

FOLDERS = {
    "calibration": "Calibration",
    "explanations": "Genes behind the predictions",
    "annotated": "Annotated cells",
}
"""Artifact folder to section. In it, CSV files are tables, PNG and SVG files pictures, and Markdown is
text."""


OWN_REPORT = "report.md"
"""A run that logged this (a cross-validation, an ablation) has made its report itself, with `report.html`
beside it."""


OURS = "scReformer-BERT"


CELLS, BASELINES, PER_CLASS, CONFUSION = (
    "test/cells.parquet",
    "test/baselines.csv",
    "test/per_class.csv",
    "test/confusion.csv",
)


RELIABILITY = "calibration/reliability.csv"


SCORES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    "weighted_f1": "weighted F1",
}
"""Name among the metrics, and for people."""


_CURVES = {"loss": "Loss", "macro_f1": "Macro-F1 on validation cells", "lr": "Learning rate"}


_MOST_ROWS = 40


_MOST_LETTERS = 80


_MOST_COLOURS = 20


_MOST_ON_MAP = 4_000
"""More cells make no better map, and from 4,096 on UMAP compiles a search for neighbours, which takes half a
minute."""


_FEWEST_FOR_UMAP = 250
"""Fewer cells have no neighbourhoods worth the 20 s of CPU that UMAP's compilation takes in each process."""


def run_report(run: LoggedRun, *others: LoggedRun) -> Report:
    """Build the report of a run; see the module.

    Args:
        run: The run.
        others: Runs whose folders of artifacts belong into the same report, such as that of `jobs.explain`.
    """
    builder = _Builder(run)
    builder.build(others)
    return builder.report


class _Builder:
    def __init__(self, run: LoggedRun) -> None:
        self.run = run
        self.config: dict[str, Any] = self._yaml("config.yaml")
        self.identity: dict[str, Any] = self._json("identity.json")
        self.report = Report(self._title(), subtitle=self._subtitle())
        self.used = {"config.yaml", "identity.json"}

    def build(self, others: Sequence[LoggedRun]) -> None:
        self._summary()
        self._results()
        self._learning()
        self._confidence()
        self._cells()
        for source in (self.run, *others):
            for folder, title in FOLDERS.items():
                self._folder(source, folder, title)
        self._what_was_run()

    def _title(self) -> str:
        job = self.run.tags.get("job", "run")
        names = {
            "pretrain": "Pre-training",
            "finetune": "Fine-tuning",
            "crossval": "Cross-validation",
            "ablate": "Ablation",
        }
        model_name = self.config.get("tracking", {}).get("model_name")
        return f"{names.get(job, job.capitalize())}: {model_name or self.run.name}"

    def _subtitle(self) -> str:
        started = datetime.fromtimestamp(self.run.started_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
        lasted = (
            f", {_duration((self.run.ended_ms - self.run.started_ms) / 1000)}" if self.run.ended_ms else ""
        )
        return f"Run {self.run.name}, {self.run.status.lower()}, {started}{lasted}"

    def _summary(self) -> None:
        report, split = self.report, self._split()
        cells, groups = split.get("cells", {}), split.get("groups", {})
        facts = {
            name: f"{self.run.metrics[f'test/{key}']:.3f}"
            for key, name in SCORES.items()
            if f"test/{key}" in self.run.metrics
        }
        facts = {
            f"{name} on test cells": value
            for name, value in facts.items()
            if name in ("macro-F1", "accuracy")
        }
        if not facts and "best_val/loss" in self.run.metrics:
            facts = {"loss on validation cells": f"{self.run.metrics['best_val/loss']:.4f}"}
        if cells:
            facts |= {
                "cells to learn from": f"{cells.get('train', 0):,}",
                "cells of the test": f"{cells.get('test', 0):,}",
            }
        if facts:
            report.facts(facts)
        test_groups = groups.get("test", [])
        if test_groups:
            kind = _plural(split["group_by"].removesuffix("_id"))
            report.text(
                f"The test is on {cells['test']:,} cells of {len(test_groups)} {kind} that the model never"
                f" saw"
                f" ({_listed(test_groups)}). Its best step was chosen on {cells.get('val', 0):,} other cells."
            )
        if self.run.status in ("FAILED", "KILLED"):
            report.warning(f"The run did not end well: {self.run.tags.get('error', self.run.status)}")
        for note in self.identity.get("notes", []):
            report.warning(note)
        if 0 < len(test_groups) < 3 and split["group_by"] == "donor_id":
            report.warning(
                f"The test has only {len(test_groups)} donors; the scores may be far from those on others."
            )
        num_cut = self.run.metrics.get("data/cells_cut", 0)
        if num_cut:
            report.warning(
                f"{num_cut:,.0f} cells, counted each time they were read, have more genes than"
                f" `tokens.max_genes` and were cut to those"
                " that stand out most."
            )

    def _results(self) -> None:
        if f"test/{next(iter(SCORES))}" not in self.run.metrics and not self._has(PER_CLASS):
            return
        report = self.report
        report.section("Results")
        ours = {name: self.run.metrics.get(f"test/{key}") for key, name in SCORES.items()}
        rows = [{"model": OURS, **ours}]
        if self._has(BASELINES):
            baselines = self._table(BASELINES)
            rows += [
                {"model": row["model"]} | {name: row.get(key) for key, name in SCORES.items()}
                for _, row in baselines.iterrows()
            ]
            best = baselines.loc[baselines["macro_f1"].idxmax()]
            difference = self.run.metrics["test/macro_f1"] - best["macro_f1"]
            verdict = "above" if difference > 0 else "below" if difference < 0 else "the same as"
            report.text(
                f"Macro-F1 is **{abs(difference):.3f} {verdict}** the best baseline on the same cells"
                f" ({best['model']},"
                f" {best['macro_f1']:.3f}). One split says little about small differences; cross-validation"
                f" says more."
            )
        table = pd.DataFrame(rows)
        caption = "Macro-F1 weighs every type alike, however rare it is; accuracy weighs every cell alike."
        report.table("Test scores", table.dropna(axis="columns", how="all"), caption)
        if self._has(PER_CLASS):
            per_class = (
                self._table(PER_CLASS)
                .rename(columns={"label": "type", "f1": "F1"})
                .sort_values("cells", ascending=False)
            )
            weak = per_class[(per_class["cells"] > 0) & (per_class["F1"] < 0.5)]["type"].tolist()
            if weak:
                report.warning(f"F1 below 0.5: {_listed(weak)}.")
            report.table(
                "Each type",
                per_class,
                "Test cells of each true type; a type without test cells has no recall.",
            )
        if self._has(CONFUSION):
            confusion = self._table(CONFUSION)
            names = confusion["true_label"].astype(str).tolist()
            counts_kk = confusion.drop(columns="true_label").to_numpy()
            report.figure(
                "What is taken for what",
                confusion_figure(counts_kk, names),
                "Rows are true types (with their cells), columns predictions; each row sums to 1.",
                _confusion_alt(counts_kk, names),
            )
        self.used.add("test/confusion.png")

    def _learning(self) -> None:
        histories: dict[str, dict[str, list[tuple[int, float]]]] = {}
        for key in self.run.metrics:
            part, _, name = key.rpartition("/")
            if name in _CURVES and part in ("train", "val"):
                points = self.run.history(key)
                if len(points) > 1:
                    histories.setdefault(name, {})[key] = points
        if not histories:
            return
        self.report.section("Learning curves")
        best = self.run.metrics.get("best_step")
        for name, title in _CURVES.items():
            if name not in histories:
                continue
            figure = learning_figure(name, histories[name])
            if best is not None and name != "lr":
                figure.axes[0].axvline(best, color="grey", linewidth=1, linestyle=":")
            ends = "; ".join(
                f"{key} goes from {points[0][1]:.4g} to {points[-1][1]:.4g}"
                for key, points in histories[name].items()
            )
            dotted = (
                f" The dotted line is step {best:.0f}, the best on the validation cells."
                if best is not None and name != "lr"
                else ""
            )
            self.report.figure(title, figure, f"By optimizer step.{dotted}", f"{title} by step: {ends}.")

    def _confidence(self) -> None:
        if not self._has(CELLS) and not self._has(RELIABILITY):
            return
        self.report.section("How far to trust a score")
        if self._has(RELIABILITY):
            table = self._table(RELIABILITY)
        else:
            table = reliability_bins(self._table(CELLS)).assign(part="test", calibration="without")
        self.used.add("calibration/reliability.png")
        errors = {
            f"{part} cells {state} calibration": (
                rows["cells"] * (rows["confidence"] - rows["accuracy"]).abs()
            ).sum()
            / rows["cells"].sum()
            for (part, state), rows in table.groupby(["part", "calibration"], sort=False)
        }
        said = "; ".join(f"{name} {error:.3f}" for name, error in errors.items())
        self.report.figure(
            "Reliability",
            reliability_figure(table),
            "Cells in bins of their score: on the dashed line 90 of 100 cells with score 0.9 are right; below"
            " it the model is too sure of"
            f" itself. Expected calibration error: {said}.",
            f"Share of right predictions by score. Expected calibration error: {said}.",
        )

    def _cells(self) -> None:
        if not self._has(CELLS):
            return
        cells = self._table(CELLS)
        if len(cells) < 3:
            return
        wrong, unsure = (
            float((cells["label"] != cells["prediction"]).mean()),
            float((cells["said"] != cells["prediction"]).mean()),
        )
        which = f"{len(cells):,} test cells"
        if len(cells) > _MOST_ON_MAP:
            cells, which = (
                cells.sample(_MOST_ON_MAP, random_state=0).sort_index(),
                f"{_MOST_ON_MAP:,} of {which}, drawn at random",
            )
        points_n2, how = layout(np.stack(cells["embedding"].to_list()))
        self.report.section("Map of the cells")
        self.report.text(
            f"{how} of the model's embeddings of {which}. Cells that the model sees as alike lie together;"
            f" distances"
            " between far groups mean little."
        )
        for column, title, caption in (
            ("label", "By true type", "Each point is a cell."),
            (
                "prediction",
                "By prediction",
                f"The same cells by best label, wrong for {wrong:.1%}; of {unsure:.1%} the model says less:"
                f" unknown, or a broader term.",
            ),
            ("donor_id", "By donor", "Donors that stay apart within a type would be a batch effect."),
        ):
            counts = cells[column].value_counts()
            # True types and predictions share their colours.
            names = cells["label"].value_counts().index.tolist() if column == "prediction" else []
            names += [name for name in counts.index if name not in names]
            biggest = ", ".join(f"{name} {count:,}" for name, count in counts.head(5).items())
            self.report.figure(
                title,
                _map_figure(points_n2, cells[column], names),
                caption,
                f"Map of cells {title.lower()}: {biggest}.",
            )

    def _folder(self, source: LoggedRun, folder: str, title: str) -> None:
        used = self.used if source is self.run else set()
        paths = [path for path in source.artifacts if path.startswith(f"{folder}/") and path not in used]
        shown = [path for path in paths if path.endswith((".csv", ".png", ".svg", ".md"))]
        if not shown:
            return
        report = self.report
        report.section(title)
        for path in sorted(
            shown, key=lambda path: (not path.endswith(".md"), path.endswith((".png", ".svg")), path)
        ):
            name = path.removeprefix(f"{folder}/").rpartition(".")[0].replace("_", " ").replace("/", ": ")
            if path.endswith(".md"):
                # Its tables and pictures lie beside it as files of their own.
                lines = source.file(path).read_text(encoding="utf-8").splitlines()
                report.text("\n".join(line for line in lines if not line.startswith(("|", "#", "!["))))
            elif path.endswith((".png", ".svg")):
                report.picture(name, source.file(path), "", f"{title}: {name}")
            else:
                table = pd.read_csv(source.file(path))
                note = (
                    f"The first {_MOST_ROWS} of {len(table):,} rows; all are in the artifact `{path}`."
                    if len(table) > _MOST_ROWS
                    else ""
                )
                report.table(name, table.head(_MOST_ROWS).map(_shortened), note)

    def _what_was_run(self) -> None:
        report, identity = self.report, self.identity
        query, split, code = identity.get("query", {}), self._split(), identity.get("code", {})
        atlas = query.get("atlas", {})
        report.section("What was run, on what")
        rows = {"job": self.run.tags.get("job"), "run": self.run.run_id, "tracking store": self.run.store}
        if query:
            filters = query.get("obs_filter") or "every cell"
            if query.get("is_primary_data"):
                filters += ", primary data only"
            version = atlas.get("timestamp_ms")
            rows |= {
                "atlas": atlas.get("uri"),
                "atlas version": datetime.fromtimestamp(version / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
                if version
                else None,
                "cells": filters,
                "genes": query.get("var_filter") or "every gene",
                "query hash": query.get("hash"),
            }
        for part, number in split.get("cells", {}).items():
            rows[f"{part} cells"] = (
                f"{number:,} ({split['group_by']}: {_listed(split['groups'].get(part, []))})"
            )
        if code:
            rows |= {
                "screformer": f"{code['screformer']} ({code['git']})",
                "Python": code["python"],
                "machine": _machine(code["host"]),
            }
        named = [(name, str(value)) for name, value in rows.items() if value not in (None, "")]
        report.table("", pd.DataFrame(named, columns=["what", "value"]))
        changed = changed_settings(self.config)
        if len(changed):
            report.table("Settings that differ from the defaults", changed)
        if code.get("packages"):
            report.table(
                "Packages", pd.DataFrame(sorted(code["packages"].items()), columns=["package", "version"])
            )

    def _split(self) -> dict[str, Any]:
        split = self.identity.get("split")
        return split if isinstance(split, dict) else {}  # a study names the kind of its folds there

    def _has(self, path: str) -> bool:
        return path in self.run.artifacts

    def _table(self, path: str) -> pd.DataFrame:
        self.used.add(path)
        file = self.run.file(path)
        return pd.read_parquet(file) if path.endswith(".parquet") else pd.read_csv(file)

    def _yaml(self, path: str) -> dict[str, Any]:
        return yaml.safe_load(self.run.file(path).read_text()) if self._has(path) else {}

    def _json(self, path: str) -> dict[str, Any]:
        return json.loads(self.run.file(path).read_text()) if self._has(path) else {}


def _shortened(value: Any) -> Any:
    """A list of many names would make a row as high as the screen; the artifact has it whole."""
    return textwrap.shorten(value, _MOST_LETTERS, placeholder=" …") if isinstance(value, str) else value


def changed_settings(config: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Settings of a plain configuration that differ from today's defaults: `setting`, `value`, `default`."""
    defaults = ExperimentConfig().to_dict()
    rows = [
        (f"{section}.{name}", str(value), str(defaults.get(section, {}).get(name, "no longer a setting")))
        for section, fields in config.items()
        for name, value in fields.items()
        if value != defaults.get(section, {}).get(name)
    ]
    return pd.DataFrame(rows, columns=["setting", "value", "default"])


def reliability_bins(cells: pd.DataFrame, *, num_bins: int = 10) -> pd.DataFrame:
    """Cells in equal bins of their score.

    Mean `confidence`, `accuracy` and number of `cells` of each bin that has any.

    Args:
        cells: `label`, `prediction` and `confidence` of each.
        num_bins: Bins of [0, 1].
    """
    bins_n = np.minimum((cells["confidence"].to_numpy() * num_bins).astype(int), num_bins - 1)
    right = pd.DataFrame(
        {"bin": bins_n, "confidence": cells["confidence"], "right": cells["label"] == cells["prediction"]}
    )
    grouped = right.groupby("bin")
    return pd.DataFrame(
        {
            "confidence": grouped["confidence"].mean(),
            "accuracy": grouped["right"].mean(),
            "cells": grouped.size(),
        }
    )


def layout(embedding_nd: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, str]:
    """Put cells on a plane: UMAP, or principal components where there are too few cells for it.

    Args:
        embedding_nd: Cell embeddings, (n, d).
        seed: Of UMAP.

    Returns:
        Points (n, 2), and which method it was.
    """
    if len(embedding_nd) < _FEWEST_FOR_UMAP:
        from sklearn.decomposition import PCA

        return PCA(n_components=2, random_state=seed).fit_transform(embedding_nd), "Principal components"
    from umap import UMAP

    return UMAP(init="pca", random_state=seed, n_jobs=1).fit_transform(embedding_nd), "UMAP"


def _map_figure(points_n2: np.ndarray, groups_n: pd.Series, names: list[str]) -> Figure:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    if len(names) > _MOST_COLOURS:
        names = names[: _MOST_COLOURS - 1]
    # Strong colours first, the pale ones of the pairs after them.
    colours = colormaps["tab20"]([*range(0, _MOST_COLOURS, 2), *range(1, _MOST_COLOURS, 2)])
    figure = Figure(figsize=(5.4, 4.4 + 0.2 * ((len(names) + 2) // 2)), layout="constrained")
    axes = figure.add_subplot()
    other_n = ~groups_n.isin(names).to_numpy()
    size = float(np.clip(6000 / len(points_n2), 3, 24))
    if other_n.any():
        axes.scatter(
            points_n2[other_n, 0], points_n2[other_n, 1], s=size, color="0.7", linewidths=0, label="others"
        )
    for name, colour in zip(names, colours, strict=False):
        chosen_n = (groups_n == name).to_numpy()
        axes.scatter(
            points_n2[chosen_n, 0],
            points_n2[chosen_n, 1],
            s=size,
            color=colour,
            linewidths=0,
            label=name,
            alpha=0.85,
        )
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("0.8")
    figure.legend(
        loc="outside lower center", ncols=2, fontsize=10, markerscale=(40 / size) ** 0.5, frameon=False
    )
    return figure


def _confusion_alt(counts_kk: np.ndarray, names: list[str]) -> str:
    wrong_kk = counts_kk * (1 - np.eye(len(counts_kk), dtype=counts_kk.dtype))
    pairs = [
        np.unravel_index(flat, wrong_kk.shape) for flat in np.argsort(-wrong_kk, axis=None, kind="stable")[:3]
    ]
    said = "; ".join(
        f"{names[row]} taken for {names[column]} {wrong_kk[row, column]} times"
        for row, column in pairs
        if wrong_kk[row, column]
    )
    right = f"{np.trace(counts_kk):,} of {counts_kk.sum():,} cells are right"
    return f"Confusion matrix of {len(names)} types; {right}. {said or 'No mistakes'}."


def _machine(host: Mapping[str, Any]) -> str:
    gpus = f", {len(host['gpus'])} x {host['gpus'][0]}" if host.get("gpus") else ""
    return f"{host['platform']}, {host['cpus']} CPUs, {host['memory_gb']} GB{gpus}"


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(str(name) for name in names[:most]) + more


def _plural(noun: str) -> str:
    return noun if noun.endswith("s") else f"{noun}s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
