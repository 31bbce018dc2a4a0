"""Say which genes make a model give its labels, for cells of an .h5ad file or of an atlas query.

For a stratified sample of cells, expected gradients (`screformer.explain`) of the logits of the predicted and the true label are computed
in parallel Ray tasks and written to Parquet shards; nothing else is kept in memory, and an interrupted run goes on with the shards that are
missing. Then come the checks of whether to believe them: additivity, deletion and insertion curves against random genes, markers, a
logistic regression's coefficients, other hash seeds, random weights. The last line on stdout is one JSON object.

Axes: n cells, m pairs of cell and class, g genes, k classes.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import resource
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from scipy import sparse
from tqdm import tqdm

from cluster.connect import connect
from jobs.cells import CellSource, H5adCells, query_cells, vocabulary_names
from jobs.figures import bar_figure, beeswarm_figure, curve_figure, heat_figure
from jobs.tracking import pinned_model, resolve_model, start_run
from screformer.config import TrackingConfig
from screformer.explain import NUM_NODES, Attribution, CellTokens, Explainer, cell_tokens, markers, without_genes
from screformer.model import ScReformer
from screformer.predictor import HASH_SEED, MIN_GENE_OVERLAP, Predictor
from screformer.tokenizer import CLS, NUM_SPECIAL, Panels, normalised

ADDITIVITY_BOUND = 0.05
"""Largest median additivity error, as a share of the distance of output and base, that passes without a loud word."""
CELLS_PER_SHARD = 32
TOP_GENES = 20
_CANDIDATES = 2_000
_CHECKED_CELLS = 24
_REPEATED_CELLS = 6
_FRACTIONS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_SHARDS, _BACKGROUND, _GENES, _PLAN = "values", "background.parquet", "genes.parquet", "plan.json"


@dataclass(frozen=True, eq=False, kw_only=True)
class Explanations:
    """What a run of this command saved, as `load_explanations` gives it back."""

    cells: pd.DataFrame
    """m rows: `cell`, `position`, `class`, `predicted`, `true`, `output`, `base`, `additivity_error`, `panel`."""
    values_mg: sparse.csr_matrix
    """Contribution of each gene to the class's logit, float32."""
    genes: pd.DataFrame
    """g rows: `feature_id`, `feature_name`, and `panel_0`, ...: whether the cells of that `panel` measured the gene."""

    def mean(self, label: str) -> pd.Series:
        """Mean contribution of each gene to a class, by gene name, largest first.

        Of a gene that is over the cells predicted to be of the class whose dataset measured it.
        """
        rows = ((self.cells["class"] == label) & (self.cells["predicted"] == label)).to_numpy()
        means = _MeasuredMeans(1, self.genes)
        if rows.any():
            means.add(np.zeros(rows.sum(), np.int64), self.cells["panel"].to_numpy()[rows], self.values_mg[rows])
        return pd.Series(means.mean_kg[0], index=self.genes["feature_name"]).sort_values(ascending=False, kind="stable")


class _MeasuredMeans:
    """Mean of each gene's value by class, over the cells whose dataset measured the gene; shards are added one after another."""

    def __init__(self, num_classes: int, genes: pd.DataFrame) -> None:
        panels = [name for name in genes if name.startswith("panel_")]
        self._measured_pg = genes[panels].to_numpy().T
        self._sums_kg = np.zeros((num_classes, len(genes)))
        self._cells_kp = np.zeros((num_classes, len(panels)), dtype=np.int64)

    def add(self, codes_m: np.ndarray, panels_m: np.ndarray, values_mg: sparse.csr_matrix) -> None:
        entries = values_mg.tocoo()
        measured = self._measured_pg[panels_m[entries.row], entries.col]
        np.add.at(self._sums_kg, (codes_m[entries.row[measured]], entries.col[measured]), entries.data[measured])
        np.add.at(self._cells_kp, (codes_m, panels_m), 1)

    @property
    def mean_kg(self) -> np.ndarray:
        return self._sums_kg / np.maximum(self._cells_kp @ self._measured_pg, 1)

    @property
    def cells_k(self) -> np.ndarray:
        return self._cells_kp.sum(axis=1)


def load_explanations(out: str | Path) -> Explanations:
    """Read the folder that the command wrote.

    Raises:
        ValueError: There is none, or it is not finished.
    """
    out = Path(out)
    if not (out / "summary.json").is_file():
        raise ValueError(
            f"{out} holds no finished explanations; run `python -m jobs.explain ... --out {out}` again, it goes on where it stopped"
        )
    genes = pd.read_parquet(out / _GENES)
    frames, rows = [], []
    for table in _shards(out):
        frames.append(table.drop(columns=["genes", "values"]))
        rows.append(_matrix(table, len(genes)))
    return Explanations(cells=pd.concat(frames, ignore_index=True), values_mg=sparse.vstack(rows, format="csr"), genes=genes)


def explain(
    predictor: Predictor, model_dir: Path, source: CellSource, out: Path, *, num_cells: int, num_background: int, num_nodes: int, seed: int
) -> dict[str, Any]:
    """Explain a sample of cells and check the explanations.

    Args:
        predictor: The model.
        model_dir: Its directory, which Ray tasks load it from.
        source: The cells.
        out: Folder for everything; an interrupted run of the same cells and settings goes on in it.
        num_cells: Cells to explain, evenly over the predicted labels.
        num_background: Background cells, evenly over the predicted labels, none of them explained.
        num_nodes: Points of each path.
        seed: Of the choice of cells.

    Returns:
        The summary, which is also `summary.json`.

    Raises:
        ValueError: `out` holds explanations of other cells or settings.
    """
    plan = _plan(predictor, source, num_cells=num_cells, num_background=num_background, num_nodes=num_nodes, seed=seed)
    chosen, background = np.array(plan["cells"]), np.array(plan["background"])
    panels = source.panels(chosen)
    _prepare(out, plan, predictor, panels)
    background_tokens = _tokens(predictor, source, background)
    pq.write_table(
        pa.table(
            {
                "cell": source.names(background).astype(str),
                "position": background,
                "token_ids": [cell.token_ids for cell in background_tokens],
                "values": [cell.values for cell in background_tokens],
                "bin_ids": [cell.bin_ids for cell in background_tokens],
                "measured": [cell.measured_g for cell in background_tokens],
            }
        ),
        out / _BACKGROUND,
    )
    peaks = _run_tasks(model_dir, source, chosen, panels.panels_n, background_tokens, num_nodes, out)
    summary = _summarise(predictor, source, out, background_tokens, plan, num_nodes)
    summary["memory_gb"] = {"task_peak": max(peaks, default=0.0), "driver_peak": _peak_gb()}
    (out / "summary.md").write_text("\n\n".join(line.strip() for line in _said(summary)) + "\n")
    scratch = out / "summary.json.part"
    scratch.write_text(json.dumps(summary, indent=2))
    os.replace(scratch, out / "summary.json")
    return summary


def _plan(predictor: Predictor, source: CellSource, *, num_cells: int, num_background: int, num_nodes: int, seed: int) -> dict[str, Any]:
    """Which cells: background and explained ones, each taken from the predicted labels in turn.

    Both come from at most 2,000 random cells that the model labels first.
    """
    rng = np.random.default_rng(seed)
    most = max(_CANDIDATES, num_cells + num_background)
    candidates = np.arange(source.num_cells)
    if source.num_cells > most:
        candidates = np.sort(rng.choice(source.num_cells, most, replace=False))
    codes = []
    for start in range(0, len(candidates), 512):
        flat = source.read(candidates[start : start + 512])
        codes.append(predictor.predict(*flat).label_codes)
    order = _in_turn(np.concatenate(codes), rng)
    background, cells = np.sort(candidates[order[:num_background]]), np.sort(candidates[order[num_background : num_background + num_cells]])
    if not len(cells):
        raise ValueError(f"{source.num_cells} cells are too few for a background of {num_background}; lower --background")
    settings = {"num_nodes": num_nodes, "seed": seed, "background": background.tolist(), "cells": cells.tolist()}
    weights = hashlib.sha256(b"".join(value.cpu().numpy().tobytes() for value in predictor.model.state_dict().values())).hexdigest()
    return {**settings, "candidates": candidates.tolist(), "model": weights, "source": source.identity()}


def _in_turn(codes_n: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order in which the classes come in turn, as long as each lasts."""
    shuffled = rng.permutation(len(codes_n))
    turn = pd.Series(codes_n[shuffled]).groupby(codes_n[shuffled]).cumcount().to_numpy()
    return shuffled[np.lexsort((codes_n[shuffled], turn))]


def _prepare(out: Path, plan: dict[str, Any], predictor: Predictor, panels: Panels) -> None:
    (out / _SHARDS).mkdir(parents=True, exist_ok=True)
    text = json.dumps(plan)
    if (out / _PLAN).exists() and (out / _PLAN).read_text() != text:
        raise ValueError(f"--out {out} holds explanations of other cells, another model or other settings; name another folder")
    (out / _PLAN).write_text(text)
    vocabulary = predictor.vocabulary
    genes = {"feature_id": list(vocabulary.feature_ids), "feature_name": vocabulary_names(vocabulary)}
    genes |= {f"panel_{index}": measured_g for index, measured_g in enumerate(panels.measured_pg)}
    pd.DataFrame(genes).to_parquet(out / _GENES)


def _tokens(predictor: Predictor, source: CellSource, positions: np.ndarray) -> list[CellTokens]:
    flat = source.read(positions)
    return cell_tokens(predictor.tokenizer(flat.gene_ids, flat.counts, flat.offsets, total_counts=flat.total_counts), flat.panels)


def _run_tasks(
    model_dir: Path,
    source: CellSource,
    chosen: np.ndarray,
    panels_n: np.ndarray,
    background: list[CellTokens],
    num_nodes: int,
    out: Path,
) -> list[float]:
    """Explain the cells of each shard that is missing; at most as many at a time as Ray has CPUs. Returns peaks of memory in GB."""
    shards = {start: out / _SHARDS / f"{start:08d}.parquet" for start in range(0, len(chosen), CELLS_PER_SHARD)}
    missing = [start for start, path in shards.items() if not path.exists()]
    shared, remote = ray.put((str(model_dir), source, background, num_nodes)), ray.remote(num_cpus=1)(_explain_shard)
    at_once = max(1, int(ray.cluster_resources().get("CPU", 1)))
    peaks: list[float] = []
    running: dict[ray.ObjectRef, int] = {}
    done = len(chosen) - sum(len(chosen[start : start + CELLS_PER_SHARD]) for start in missing)
    with tqdm(total=len(chosen), initial=done, unit="cell", desc="explain", disable=None) as progress:
        while missing or running:
            while missing and len(running) < at_once:
                start = missing.pop(0)
                cells, panels = (array[start : start + CELLS_PER_SHARD] for array in (chosen, panels_n))
                running[remote.remote(shared, cells, panels, str(shards[start]))] = len(cells)
            (finished,), _ = ray.wait(list(running), num_returns=1)
            peaks.append(ray.get(finished))
            progress.update(running.pop(finished))
    return peaks


def _explain_shard(shared: tuple[str, CellSource, list[CellTokens], int], cells: np.ndarray, panels: np.ndarray, path: str) -> float:
    model_dir, source, background, num_nodes = shared
    predictor = _predictor(model_dir)
    explainer = Explainer(predictor, background, num_nodes=num_nodes)
    names, known = predictor.label_names.tolist(), source.labels(cells)
    rows: list[dict[str, Any]] = []
    told = zip(cells, panels, source.names(cells), known, _tokens(predictor, source, cells), strict=True)
    for position, panel, name, label, tokens in told:
        predicted = int(explainer.logits([tokens])[0].argmax())
        wanted = dict.fromkeys([predicted] + ([names.index(label)] if label in names else []))
        for found in explainer.attribute(tokens, list(wanted)):
            rows.append(
                {
                    "cell": str(name),
                    "position": int(position),
                    "class": names[found.label],
                    "predicted": names[predicted],
                    "true": label,
                    "output": found.output,
                    "base": found.base,
                    "additivity_error": found.additivity_error,
                    "panel": int(panel),
                    "genes": found.genes,
                    "values": found.values,
                }
            )
    pd.DataFrame(rows).to_parquet(f"{path}.part")
    os.replace(f"{path}.part", path)
    return _peak_gb()


_LOADED: dict[str, Predictor] = {}


def _predictor(model_dir: str) -> Predictor:
    if model_dir not in _LOADED:
        _LOADED[model_dir] = Predictor.load(model_dir)
    return _LOADED[model_dir]


def _shards(out: Path) -> Iterator[pd.DataFrame]:
    for path in sorted((out / _SHARDS).glob("*.parquet")):
        yield pd.read_parquet(path)


def _matrix(table: pd.DataFrame, num_genes: int) -> sparse.csr_matrix:
    offsets = np.concatenate([[0], np.cumsum([len(genes) for genes in table["genes"]])])
    columns, values = np.concatenate(table["genes"].tolist()), np.concatenate(table["values"].tolist())
    return sparse.csr_matrix((values, columns, offsets), shape=(len(table), num_genes))


def _summarise(
    predictor: Predictor, source: CellSource, out: Path, background: list[CellTokens], plan: dict[str, Any], num_nodes: int
) -> dict[str, Any]:
    names, num_genes = predictor.label_names.tolist(), len(predictor.vocabulary)
    means = _MeasuredMeans(len(names), pd.read_parquet(out / _GENES))
    relative: list[np.ndarray] = []
    for table in _shards(out):
        relative.append((table["additivity_error"] / (table["output"] - table["base"]).abs().clip(lower=1e-6)).to_numpy())
        own = table[table["class"] == table["predicted"]]
        means.add(np.array([names.index(label) for label in own["class"]]), own["panel"].to_numpy(), _matrix(own, num_genes))
    errors, mean_kg = np.concatenate(relative), means.mean_kg
    gene_names = vocabulary_names(predictor.vocabulary)
    frame = pd.DataFrame(mean_kg, index=names, columns=list(predictor.vocabulary.feature_ids)).rename_axis("class")
    frame.to_parquet(out / "mean_by_class.parquet")
    explained = np.flatnonzero(means.cells_k).tolist()

    candidates = _Candidates.read(predictor, source, np.array(plan["candidates"]))
    more_kg, regression = candidates.expressed_more(len(names)), candidates.regression_top()
    order_kg = np.argsort(-mean_kg, axis=1, kind="stable")
    # Genes that speak for a class by being there, and genes that do by being lacked.
    top, lacking = (
        {code: [gene for gene in order_kg[code].tolist() if side_kg[code, gene]][:TOP_GENES] for code in explained}
        for side_kg in (more_kg, ~more_kg)
    )
    table = markers()
    rows = []
    for code in explained:
        known = table[(table["cl_id"] == predictor.label_cl_ids[code]) | (table["cell_type"] == names[code])]
        ids = [predictor.vocabulary.feature_ids[gene] for gene in top[code]]
        hits = [symbol for symbol, feature_id in zip(known["symbol"], known["feature_id"], strict=True) if feature_id in ids]
        shared = len(set(top[code]) & regression[code]) / TOP_GENES if code in regression else float("nan")
        rows.append(
            {
                "label": names[code],
                "cells": int(means.cells_k[code]),
                "markers": ", ".join(hits),
                "markers_listed": len(known),
                "markers_in_model": int(known["feature_id"].isin(predictor.vocabulary.feature_ids).sum()),
                "shared_with_regression": shared,
                "top_genes": ", ".join(gene_names[top[code]]),
                "top_lacking": ", ".join(gene_names[lacking[code]]),
            }
        )
    classes = pd.DataFrame(rows)
    classes.to_csv(out / "classes.csv", index=False)
    summary = {
        "cells": len(plan["cells"]),
        "background": len(plan["background"]),
        "additivity_error": {
            "median": float(np.median(errors)),
            "p95": float(np.quantile(errors, 0.95)),
            "bound": ADDITIVITY_BOUND,
            "holds": bool(np.median(errors) <= ADDITIVITY_BOUND),
        },
        "curves": _curves(predictor, source, out),
        **_sanity(predictor, source, out, background, num_nodes),
        "classes": [{key: value for key, value in row.items() if value == value} for row in rows],
    }
    _draw(out, names, gene_names, mean_kg, top)
    return summary


@dataclass(frozen=True, eq=False)
class _Candidates:
    """The cells that the explained ones were chosen from."""

    x_ng: sparse.csr_matrix
    """log1p of counts per 10,000."""
    codes_n: np.ndarray
    """What the model says of them."""
    panels: Panels

    @classmethod
    def read(cls, predictor: Predictor, source: CellSource, positions: np.ndarray) -> _Candidates:
        flat = source.read(positions)
        counts_ng = sparse.csr_matrix((flat.counts, flat.gene_ids, flat.offsets), shape=(len(positions), len(predictor.vocabulary)))
        x_ng = sparse.csr_matrix(normalised(counts_ng, flat.total_counts))
        return cls(x_ng, predictor.predict(*flat).label_codes, flat.panels)

    def expressed_more(self, num_classes: int) -> np.ndarray:
        """Which genes a class expresses more than the other classes do on average, of the cells that measured them; bool (k, g)."""
        num_panels, (num_cells, num_genes) = len(self.panels.measured_pg), self.x_ng.shape
        group_n = self.codes_n * num_panels + self.panels.panels_n
        groups = sparse.csr_matrix((np.ones(num_cells), (group_n, np.arange(num_cells))), shape=(num_classes * num_panels, num_cells))
        sums_kg = (groups @ self.x_ng).toarray().reshape(num_classes, num_panels, num_genes).sum(axis=1)
        cells_kg = np.bincount(group_n, minlength=num_classes * num_panels).reshape(num_classes, num_panels) @ self.panels.measured_pg
        mean_kg, seen_kg = sums_kg / np.maximum(cells_kg, 1), cells_kg > 0
        others_kg = (mean_kg.sum(axis=0) - mean_kg) / np.maximum(seen_kg.sum(axis=0) - seen_kg, 1)
        return mean_kg > others_kg

    def regression_top(self) -> dict[int, set[int]]:
        """Genes with the largest coefficients of a logistic regression that predicts the model's labels, by class."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        if len(np.unique(self.codes_n)) < 3:  # two classes have one row of coefficients; a comparison of tops needs more
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LogisticRegression(C=0.01, class_weight="balanced", max_iter=100).fit(self.x_ng, self.codes_n)
        return {int(code): set(np.argsort(-row)[:TOP_GENES].tolist()) for code, row in zip(model.classes_, model.coef_, strict=True)}


def _curves(predictor: Predictor, source: CellSource, out: Path) -> dict[str, Any]:
    """Areas under curves of the predicted label's probability over the share of genes taken away (deletion) or put in alone (insertion).

    Genes go by their value, largest first, and in random order for comparison.
    """
    rng = np.random.default_rng(0)
    every = np.ones(len(predictor.vocabulary), bool)
    nothing = CellTokens(token_ids=np.array([CLS]), values=np.zeros(1, np.float32), bin_ids=np.zeros(1, int), measured_g=every)
    explainer = Explainer(predictor, [nothing])
    cells = _some_rows(out)
    curves: dict[str, list[np.ndarray]] = {"deletion": [], "deletion, random": [], "insertion": [], "insertion, random": []}
    for (_, row), tokens in zip(cells.iterrows(), _tokens(predictor, source, cells["position"].to_numpy()), strict=True):
        code, own = predictor.label_names.tolist().index(row["class"]), tokens.token_ids[1:] - NUM_SPECIAL
        value_of = dict(zip(row["genes"].tolist(), row["values"].tolist(), strict=True))
        ranked = own[np.argsort([-value_of.get(gene, 0.0) for gene in own.tolist()], kind="stable")]
        for suffix, order in (("", ranked), (", random", rng.permutation(own))):
            steps = [round(fraction * len(order)) for fraction in _FRACTIONS]
            for kind, removed in (("deletion", [order[:step] for step in steps]), ("insertion", [order[step:] for step in steps])):
                logits = explainer.logits([without_genes(tokens, genes) for genes in removed])
                curves[kind + suffix].append(predictor.calibration.probabilities(logits)[:, code])
    means = {name: np.mean(values, axis=0) for name, values in curves.items()}
    frame = pd.DataFrame(means, index=pd.Index(_FRACTIONS, name="share_of_genes"))
    frame.to_csv(out / "curves.csv")
    curve_figure(frame).savefig(out / "curves.png", dpi=120)
    return {name: float(np.trapezoid(values, _FRACTIONS)) for name, values in means.items()}


def _some_rows(out: Path) -> pd.DataFrame:
    """Evenly chosen rows of cells with their predicted class; of the others only the positions are ever in memory."""
    positions = []
    for path in sorted((out / _SHARDS).glob("*.parquet")):
        table = pd.read_parquet(path, columns=["position", "class", "predicted"])
        positions.append(table["position"][table["class"] == table["predicted"]].to_numpy())
    every = np.concatenate(positions)
    wanted = set(every[np.unique(np.linspace(0, len(every) - 1, _CHECKED_CELLS).astype(int))].tolist())
    kept = [table[(table["class"] == table["predicted"]) & table["position"].isin(wanted)] for table in _shards(out)]
    return pd.concat(kept, ignore_index=True).sort_values("position")


def _sanity(predictor: Predictor, source: CellSource, out: Path, background: list[CellTokens], num_nodes: int) -> dict[str, float]:
    """Correlation of a few cells' values with those under another hash seed, and with those of a network with random weights.

    The first should be near 1, the second near 0.
    """
    table = next(_shards(out))
    positions = np.unique(table["position"])[:_REPEATED_CELLS]
    tokens = _tokens(predictor, source, positions)
    explainer = Explainer(predictor, background, num_nodes=num_nodes)
    other = Explainer(predictor, background, num_nodes=num_nodes, hash_seed=HASH_SEED + 1)
    config = predictor.config
    untrained = ScReformer(
        config.model, config.tokens, num_genes=len(predictor.vocabulary), num_classes=len(predictor.label_names), seed=config.train.seed + 1
    )
    trained = predictor.model
    hashes, weights = [], []
    for cell in tokens:
        code = int(explainer.logits([cell])[0].argmax())
        own = explainer.attribute(cell, [code])[0]
        hashes.append(_correlation(own, other.attribute(cell, [code])[0]))
        predictor.model = untrained.to(predictor.device).eval()
        try:
            weights.append(_correlation(own, Explainer(predictor, background, num_nodes=num_nodes).attribute(cell, [code])[0]))
        finally:
            predictor.model = trained
    return {"correlation_other_hash_seed": float(np.mean(hashes)), "correlation_random_weights": float(np.mean(weights))}


def _correlation(one: Attribution, other: Attribution) -> float:
    values = pd.concat([pd.Series(found.values, index=found.genes) for found in (one, other)], axis=1).fillna(0)
    return float(np.corrcoef(values.to_numpy().T)[0, 1])


def _draw(out: Path, names: list[str], gene_names: np.ndarray, mean_kg: np.ndarray, top: dict[int, list[int]]) -> None:
    """Beeswarm and bar picture of each class, heat map of classes by top genes."""
    pictures = out / "pictures"
    pictures.mkdir(exist_ok=True)
    for code, genes in top.items():
        rows = []
        for table in _shards(out):
            own = table[(table["class"] == names[code]) & (table["predicted"] == names[code])]
            if len(own):
                rows.append(_matrix(own, len(gene_names))[:, genes].toarray())
        stem = "".join(letter if letter.isalnum() else "_" for letter in names[code])
        bar_figure(gene_names[genes], mean_kg[code, genes], names[code]).savefig(pictures / f"bar_{stem}.png", dpi=100)
        beeswarm_figure(gene_names[genes], np.concatenate(rows), names[code]).savefig(pictures / f"beeswarm_{stem}.png", dpi=100)
    shown = list(dict.fromkeys(int(gene) for genes in top.values() for gene in genes[:8]))
    heat_figure(mean_kg[np.ix_(list(top), shown)], [names[code] for code in top], gene_names[shown]).savefig(pictures / "heat.png", dpi=100)


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _said(summary: dict[str, Any]) -> list[str]:
    error = summary["additivity_error"]
    lines = [
        f"{summary['cells']} cells against {summary['background']} background cells",
        f"additivity error {error['median']:.2%} of the explained difference (median), {error['p95']:.2%} (95th percentile)",
    ]
    if not error["holds"]:
        lines.append(
            f"WARNING: the median additivity error is above {error['bound']:.0%}: do not trust these values; raise --nodes or --background"
        )
    curves = summary["curves"]
    lines += [
        f"deletion curve {curves['deletion']:.3f} (random genes {curves['deletion, random']:.3f}; lower is better),"
        f" insertion {curves['insertion']:.3f} (random {curves['insertion, random']:.3f}; higher is better)",
        f"correlation with another hash seed {summary['correlation_other_hash_seed']:.3f}, with random weights"
        f" {summary['correlation_random_weights']:.3f}",
        f"memory: {summary['memory_gb']['task_peak']:.2f} GB in a task, {summary['memory_gb']['driver_peak']:.2f} GB in the driver",
    ]
    for row in summary["classes"]:
        known = f"{row['markers_in_model']} of the {row['markers_listed']} listed for it are among the model's genes"
        found = row["markers"] or f"none; {known}"
        lines.append(f"  {row['label']} ({row['cells']} cells), markers among the top {TOP_GENES}: {found}")
        lines.append(f"    by being expressed: {row['top_genes']}")
        lines.append(f"    by being lacked: {row['top_lacking']}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the last line on stdout is one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m jobs.explain", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID or a model directory")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--h5ad", type=Path, metavar="FILE", help=".h5ad file of raw counts")
    where.add_argument("--atlas", metavar="URI", help="atlas whose cells are explained")
    parser.add_argument("--obs-filter", default="", metavar="FILTER", help="which cells of the atlas")
    parser.add_argument("--layer", help="take the counts of the .h5ad from this layer instead of X")
    parser.add_argument("--out", required=True, type=Path, help="folder for values, tables and pictures")
    parser.add_argument("--cells", type=int, default=200, metavar="N", help="cells to explain (default %(default)s)")
    parser.add_argument("--background", type=int, default=8, metavar="N", help="background cells (default %(default)s)")
    parser.add_argument("--nodes", type=int, default=NUM_NODES, metavar="N", help="points of each path (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of cells")
    parser.add_argument("--min-gene-overlap", type=float, default=MIN_GENE_OVERLAP, metavar="SHARE", help="as of annotate")
    parser.add_argument("--tracking-uri", default="", help="where models and runs are kept (default MLFLOW_TRACKING_URI, else ./mlflow.db)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        for name in ("cells", "background", "nodes"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
        tracking = TrackingConfig(uri=args.tracking_uri)
        model = pinned_model(args.model, tracking)
        model_dir = resolve_model(model, tracking)
        predictor = Predictor.load(model_dir)
        source: CellSource
        if args.h5ad:
            source = H5adCells.open(
                predictor, args.h5ad, min_gene_overlap=args.min_gene_overlap, layer=args.layer, label_column=predictor.label_column
            )
        else:
            resumed = args.out / _PLAN
            source = query_cells(predictor, args.atlas, args.obs_filter, min_gene_overlap=args.min_gene_overlap, resumed=resumed)
        connect()
        config = predictor.config.merge({"tracking.uri": args.tracking_uri})
        run = start_run(dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, run_name="")), "explain")
        with run:
            run.log_identity({"model": model, "source": source.identity()})
            out = args.out.resolve()
            summary = explain(
                predictor,
                model_dir,
                source,
                out,
                num_cells=args.cells,
                num_background=args.background,
                num_nodes=args.nodes,
                seed=args.seed,
            )
            numbers = {
                "explain/additivity_error": summary["additivity_error"]["median"],
                "explain/deletion_area": summary["curves"]["deletion"],
                "explain/deletion_area_random": summary["curves"]["deletion, random"],
                "explain/insertion_area": summary["curves"]["insertion"],
                "explain/correlation_other_hash_seed": summary["correlation_other_hash_seed"],
                "explain/correlation_random_weights": summary["correlation_random_weights"],
            }
            run.log_metrics(numbers, step=0)
            for path in sorted(out.iterdir()):
                run.log_file(path, folder="explanations")
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print("\n".join(_said(summary)))
    print(json.dumps({"out": str(out), "run": run.run_id, **{key: value for key, value in summary.items() if key != "classes"}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
