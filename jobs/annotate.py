"""Label the cells of .h5ad files, or of an atlas query, with a registered model.

The output of a file is a copy of it with new obs columns (X and everything else stay as they are, byte by byte), or a folder of
Parquet; that of an atlas query is a folder of Parquet, or new obs columns of the atlas. Cells are labelled into shards of Parquet first
(`jobs.labelling`), so memory does not grow with their number, many are labelled in parallel, and an interrupted run goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem

from data_ingest.h5ad import H5adFile, check_counts
from jobs.cells import AtlasCells, CellSource, H5adCells, query_cells
from jobs.labelling import OBS_PREFIX, PLAN, label_cells, write_to_atlas
from jobs.tracking import code_identity, pinned_model, resolve_model
from screformer.calibration import LEVELS, present_labels
from screformer.config import TrackingConfig
from screformer.predictor import ANSWER_COLUMNS, MIN_GENE_OVERLAP, GeneMatch, Predictor

logger = logging.getLogger(__name__)

COLUMNS = ANSWER_COLUMNS
"""obs columns that are written."""
MAJORITY_COLUMN = "majority_label"
PRESENT_COLUMN = "present_label"
PROVENANCE = "screformer"
"""Key in uns that says which model labelled the file."""

_CELLS_PER_CHUNK = 2048


@dataclass(frozen=True, eq=False, kw_only=True)
class Annotation:
    """What was done to one file."""

    path: Path
    """The annotated copy."""
    table: pd.DataFrame
    """One row per answer: `label`, `cl_id`, `cells`, `share`, `mean_confidence`; most frequent first."""
    genes: GeneMatch
    """Which genes of the model the file has."""
    num_cells: int
    """Cells labelled."""
    num_empty: int
    """Cells without a count in any gene that the model knows; their label means nothing."""
    moved: tuple[str, ...]
    """Columns of the input that stood where ours go; they are kept as NAME_original."""
    seconds: float
    """Time for reading, labelling and writing."""

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.num_cells:,} cells in {self.seconds:.1f} s ({self.num_cells / self.seconds:,.0f} cells/s); {self.genes}"
        ]
        lines += [f"  obs[{name!r}] of the input is kept as {name + '_original'!r}" for name in self.moved]
        if self.num_empty:
            lines.append(_empty_cells(self.num_empty))
        shown = self.table.assign(
            share=self.table["share"].map("{:.1%}".format), mean_confidence=self.table["mean_confidence"].map("{:.3f}".format)
        )
        lines += ["  " + line for line in shown.to_string(index=False).splitlines()]
        return "\n".join(lines)


def annotate(
    predictor: Predictor,
    source: str | Path,
    target: str | Path,
    *,
    model: str,
    layer: str | None = None,
    raw: bool = False,
    min_gene_overlap: float = MIN_GENE_OVERLAP,
    probabilities: bool = False,
    embedding: bool = False,
    majority_vote: str = "",
    drop_absent: bool = False,
    overwrite: bool = False,
) -> Annotation:
    """Copy an .h5ad file and label its cells.

    Adds the obs columns `screformer.predictor.ANSWER_COLUMNS` and says in `uns["screformer"]` where they come from. Columns of these names
    that the input already has are kept as `NAME_original`, unless an earlier run of this command wrote them. The copy appears under its
    name only when it is complete; until then the labels are kept in the folder `TARGET.labels`, from which an interrupted run goes on.

    Args:
        predictor: The model.
        source: .h5ad file of raw counts. Genes are known by Ensembl id or symbol, in the var index or any text column of var.
        target: The copy; its folder is made.
        model: URI of the model for `uns`, with its version.
        layer: Counts are in this layer instead of X.
        raw: Counts are in `raw.X` instead of X.
        min_gene_overlap: Least share of the model's expected expression that the file's genes must carry, in [0, 1].
        probabilities: Also write `obsm["screformer_probabilities"]`, float32 (n, k), in the order of the label's categories.
        embedding: Also write `obsm["X_screformer"]`, float32 (n, d).
        majority_vote: obs column of clusters, such as `leiden`; also write `majority_label`, the most frequent best label of the cell's
            cluster. Empty writes none.
        drop_absent: Also write `present_label`, the best label among those that the file's cells as a whole hold
            (`screformer.calibration.present_labels`); holds 4 bytes per cell and label in memory.
        overwrite: Replace an existing target.

    Returns:
        What was done, to be printed.

    Raises:
        ValueError: An unreadable file, values that are no raw counts, too few genes, or a target that is there already.
    """
    source, target = Path(source), Path(target)
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"--out {target} is the input itself; name another file, the input is never changed")
    if target.exists() and not overwrite:
        raise ValueError(f"--out {target} exists already; name another file or add --overwrite")
    started = time.perf_counter()
    _require_prior(predictor, drop_absent)
    cells = H5adCells.open(predictor, source, min_gene_overlap=min_gene_overlap, layer=layer, raw=raw)
    with H5adFile.open(source, layer=layer, raw=raw) as file:
        clusters = _clusters(file.obs, majority_vote) if majority_vote else None
        for start, counts in file.chunks(64, stop=min(64, file.n_cells)):  # before the copy, which may take long
            check_counts(counts, file=file, start=start)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".tmp")
        try:
            shutil.copyfile(source, partial)
            with h5py.File(partial, "r+") as copy:
                writer = _Writer(copy, predictor, file, probabilities=probabilities, embedding=embedding, drop_absent=drop_absent)
                labelled = label_cells(
                    predictor,
                    cells,
                    target.with_name(target.name + ".labels"),
                    model=model,
                    probabilities=probabilities or drop_absent,
                    embedding=embedding,
                    scratch=True,
                )
                for shard in labelled.shards():
                    writer.write(shard)
                writer.finish(model=model, file=file, match=cells.match)
                if clusters is not None:
                    writer.vote(clusters)
                if drop_absent:
                    writer.drop_absent()
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    labelled.discard()
    return Annotation(
        path=target,
        table=labelled.table,
        genes=cells.match,
        num_cells=file.n_cells,
        num_empty=labelled.num_empty,
        moved=writer.moved,
        seconds=time.perf_counter() - started,
    )


class _Writer:
    """Adds our columns to an open copy, chunk by chunk."""

    def __init__(
        self, copy: h5py.File, predictor: Predictor, file: H5adFile, *, probabilities: bool, embedding: bool, drop_absent: bool
    ) -> None:
        obs = copy["obs"]
        if not isinstance(obs, h5py.Group):
            raise ValueError(f"{file.path}: obs is stored as before anndata 0.7; read it with anndata and write it again")
        num_labels, num_cells = len(predictor.label_names), file.n_cells
        length = obs[obs.attrs["_index"]].shape[0]
        if length != num_cells:
            raise ValueError(f"{file.path}: obs has {length} rows but {file.source} has {num_cells}; the file is damaged, write it again")
        self._copy, self._predictor = copy, predictor
        self._probabilities_nk = np.zeros((num_cells if drop_absent else 0, num_labels), np.float32)
        self._num_written = 0
        self.moved = self._make_room()
        self._categories = {
            "predicted_labels": pd.Index(predictor.answer_names),
            "cell_type_ontology_term_id": pd.Index(np.unique(predictor.answer_cl_ids.astype(str))),
            "label_level": pd.Index(LEVELS),
            "best_label": pd.Index(predictor.label_names),
        }
        self._codes = {name: self._categorical(name, values.to_numpy(), num_cells) for name, values in self._categories.items()}
        self._values = {
            name: self._array(obs, name, (num_cells,), dtype)
            for name, dtype in (("conf_score", np.float32), ("unknown_score", np.float32), ("unknown", np.bool_))
        }
        for key in ("uns", "obsm"):
            if key not in copy:
                write_elem(copy, key, {})
        self._obsm: dict[str, h5py.Dataset] = {}
        for key, width in (
            ("screformer_probabilities", num_labels * probabilities),
            ("X_screformer", predictor.config.model.dim * embedding),
        ):
            if width:
                copy["obsm"].pop(key, None)
                self._obsm[key] = self._array(copy["obsm"], key, (num_cells, width))

    def write(self, shard: pd.DataFrame) -> None:
        """Store the labels of the cells that come next."""
        rows = slice(self._num_written, self._num_written + len(shard))
        self._num_written = rows.stop
        for name, codes in self._codes.items():
            codes[rows] = self._categories[name].get_indexer(shard[name])
        for name, values in self._values.items():
            values[rows] = shard[name]
        found = {
            "screformer_probabilities": shard.filter(regex="^probability: "),
            "X_screformer": shard.filter(regex="^embedding_"),
        }
        if len(self._probabilities_nk):
            self._probabilities_nk[rows] = found["screformer_probabilities"]
        for key, matrix in self._obsm.items():
            matrix[rows] = found[key]

    def finish(self, *, model: str, file: H5adFile, match: GeneMatch) -> None:
        """List the new columns in obs, and say where they come from."""
        obs = self._copy["obs"]
        order = [_text(name) for name in obs.attrs["column-order"]]
        order = [f"{name}_original" if name in self.moved else name for name in order if name in obs or name in self.moved]
        order += [name for name in COLUMNS if name not in order]
        obs.attrs.create("column-order", order, dtype=h5py.string_dtype())
        write_elem(
            self._copy["uns"],
            PROVENANCE,
            {
                "model": model,
                "label_column": self._predictor.label_column,
                "labels": self._predictor.label_names.astype(str),
                "counts": file.source,
                "genes_found": match.num_found,
                "genes_of_model": match.num_model_genes,
                "expression_share": match.expression_share,
                "trained_on": json.dumps(self._predictor.meta, default=str),
                "code": {key: str(code_identity()[key]) for key in ("screformer", "git")},
            },
        )

    def vote(self, clusters_n: np.ndarray) -> None:
        """Add `majority_label`: of each cluster (codes >= 0), the best label that most of its cells have."""
        self._add_labels(MAJORITY_COLUMN, majority(self._codes["best_label"][:], clusters_n, len(self._predictor.label_names)))

    def drop_absent(self) -> None:
        """Add `present_label`: the best label among those that the cells as a whole hold."""
        self._add_labels(PRESENT_COLUMN, present_labels(self._probabilities_nk, self._predictor.calibration.prior_k))

    def _add_labels(self, column: str, codes_n: np.ndarray) -> None:
        obs = self._copy["obs"]
        obs.pop(column, None)
        self._categorical(column, self._predictor.label_names, len(codes_n))[:] = codes_n
        order = [_text(name) for name in obs.attrs["column-order"]]
        obs.attrs.create("column-order", [*order, column], dtype=h5py.string_dtype())

    def _make_room(self) -> tuple[str, ...]:
        """Rename columns of the input that have our names; those of an earlier run go."""
        obs = self._copy["obs"]
        ours = "uns" in self._copy and PROVENANCE in self._copy["uns"]
        moved = []
        for name in (*COLUMNS, MAJORITY_COLUMN, PRESENT_COLUMN):
            if name not in obs:
                continue
            if ours:
                del obs[name]
                continue
            if f"{name}_original" in obs:
                raise ValueError(f"obs has {name!r} and {name + '_original'!r} already; rename or drop one of them in the input")
            obs.move(name, f"{name}_original")
            moved.append(name)
        if ours:
            del self._copy["uns"][PROVENANCE]
        return tuple(moved)

    def _array(self, group: h5py.Group, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> h5py.Dataset:
        dataset = group.create_dataset(name, shape=shape, dtype=dtype)
        dataset.attrs["encoding-type"], dataset.attrs["encoding-version"] = "array", "0.2.0"
        return dataset

    def _categorical(self, name: str, categories: np.ndarray, num_cells: int) -> h5py.Dataset:
        group = self._copy["obs"].create_group(name)
        group.attrs["encoding-type"], group.attrs["encoding-version"], group.attrs["ordered"] = "categorical", "0.2.0", False
        write_elem(group, "categories", categories.astype(str))
        return self._array(group, "codes", (num_cells,), np.int8 if len(categories) < 128 else np.int16)


def annotate_adata(
    adata: Any,
    model: str | Path,
    *,
    layer: str = "",
    majority_vote: str = "",
    drop_absent: bool = False,
    tracking_uri: str = "",
) -> Any:
    """Label the cells of an AnnData.

    Args:
        adata: Raw counts in X, genes by Ensembl id or symbol. It is not changed.
        model: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `runs:/RUN_ID` or a model directory.
        layer: Counts are in this layer instead of X.
        majority_vote: obs column of clusters; adds `majority_label`.
        drop_absent: Adds `present_label`, the best label among those that the cells as a whole hold.
        tracking_uri: Where models are kept; empty takes MLFLOW_TRACKING_URI, else ./mlflow.db.

    Returns:
        A copy with the obs columns `screformer.predictor.ANSWER_COLUMNS` (those of these names are replaced) and
        `obsm["X_screformer"]`, float32 (n, d).

    Raises:
        ValueError: No such model or layer, too few genes, or values that are no raw counts.
    """
    predictor = Predictor.load(resolve_model(str(model), TrackingConfig(uri=tracking_uri)))
    if layer and layer not in adata.layers:
        raise ValueError(f"adata has no layer {layer!r}; it has {', '.join(adata.layers) or 'none'}")
    counts = adata.layers[layer] if layer else adata.X
    match = predictor.match_var(adata.var)
    match.require(MIN_GENE_OVERLAP, source="adata")
    _require_prior(predictor, drop_absent)
    tables, codes, embeddings, probabilities = [], [], [], []
    for start in range(0, adata.n_obs, _CELLS_PER_CHUNK):
        rows = slice(start, start + _CELLS_PER_CHUNK)
        found = predictor.predict_counts(counts[rows], match, source="adata")
        tables.append(found.table(adata.obs_names[rows]))
        codes.append(found.label_codes)
        embeddings.append(found.embedding_nd)
        if drop_absent:
            probabilities.append(found.probabilities_nk)
    labelled = adata.copy()
    table = pd.concat(tables)
    for name in COLUMNS:
        labelled.obs[name] = table[name].astype("category") if table[name].dtype == object else table[name]
    labelled.obsm["X_screformer"] = np.concatenate(embeddings)
    if majority_vote:
        voted = majority(np.concatenate(codes), _clusters(adata.obs, majority_vote), len(predictor.label_names))
        labelled.obs[MAJORITY_COLUMN] = pd.Categorical.from_codes(voted, categories=predictor.label_names.tolist())
    if drop_absent:
        present = present_labels(np.concatenate(probabilities), predictor.calibration.prior_k)
        labelled.obs[PRESENT_COLUMN] = pd.Categorical.from_codes(present, categories=predictor.label_names.tolist())
    return labelled


def majority(codes_n: np.ndarray, clusters_n: np.ndarray, num_labels: int) -> np.ndarray:
    """The most frequent label code of each cell's cluster (ties: the first label); a cell without cluster (-1) keeps its own."""
    inside = clusters_n >= 0
    votes = np.zeros((int(clusters_n.max(initial=-1)) + 1, num_labels), dtype=np.int64)
    np.add.at(votes, (clusters_n[inside], codes_n[inside]), 1)
    voted = codes_n.copy()
    voted[inside] = votes.argmax(axis=1)[clusters_n[inside]]
    return voted


def _require_prior(predictor: Predictor, drop_absent: bool) -> None:
    if drop_absent and not predictor.calibration.prior_k:
        raise ValueError(
            "--drop-absent needs a model that knows its labels' shares in training; this one is older, or had no validation cells"
        )


def _clusters(obs: pd.DataFrame, column: str) -> np.ndarray:
    if column not in obs:
        raise ValueError(f"--majority-vote {column}: obs has no such column; it has {', '.join(map(str, obs.columns)) or 'none'}")
    return obs[column].astype("category").cat.codes.to_numpy().astype(np.int64)


def _empty_cells(count: int) -> str:
    return f"  {count:,} cells have no count in any gene that the model knows; their labels mean nothing"


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m jobs.annotate", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID or a model directory")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--h5ad", nargs="+", type=Path, metavar="IN", help=".h5ad files of raw counts")
    where.add_argument("--atlas", metavar="URI", help="atlas whose cells are labelled")
    parser.add_argument("--obs-filter", default="", metavar="FILTER", help="which cells of the atlas")
    parser.add_argument(
        "--out",
        type=Path,
        help="the annotated copy; NAME.parquet for a folder of Parquet files; for several files, or with --parquet, a folder for them",
    )
    parser.add_argument("--parquet", action="store_true", help="write Parquet instead of .h5ad copies")
    parser.add_argument("--write-obs", action="store_true", help="also write the labels into obs of the atlas, as screformer_...")
    parser.add_argument("--majority-vote", default="", metavar="COLUMN", help="obs column of clusters; adds majority_label")
    parser.add_argument(
        "--drop-absent", action="store_true", help="adds present_label: the best label among those that the file as a whole holds"
    )
    counts = parser.add_mutually_exclusive_group()
    counts.add_argument("--layer", help="take counts from this layer instead of X")
    counts.add_argument("--use", choices=("X", "raw"), default="X", help="take counts from X (default) or raw.X")
    parser.add_argument(
        "--min-gene-overlap",
        type=float,
        default=MIN_GENE_OVERLAP,
        metavar="SHARE",
        help="least share of the model's expected expression that a file's genes must carry (default %(default)s)",
    )
    parser.add_argument("--probabilities", action="store_true", help="also write obsm['screformer_probabilities']")
    parser.add_argument("--embedding", action="store_true", help="also write obsm['X_screformer']")
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")
    parser.add_argument("--resume", action="store_true", help="keep the .h5ad copies that an interrupted run finished (labels always are)")
    parser.add_argument("--tracking-uri", default="", help="where models are kept (default MLFLOW_TRACKING_URI, else ./mlflow.db)")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU where there is one)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        tracking = TrackingConfig(uri=args.tracking_uri)
        targets = _targets(args)
        model = pinned_model(args.model, tracking)
        model_dir = resolve_model(model, tracking)
        predictor = Predictor.load(model_dir, device=args.device)
        print(f"model {model}: {len(predictor.label_names)} labels, {len(predictor.vocabulary):,} genes")
        for source, target in targets:
            if target.suffix == ".parquet":
                _to_parquet(predictor, source, target, model, args)
                continue
            if args.resume and target.exists():
                print(f"{target} is there already, as an earlier run made it")
                continue
            done = annotate(
                predictor,
                source,
                target,
                model=model,
                layer=args.layer,
                raw=args.use == "raw",
                min_gene_overlap=args.min_gene_overlap,
                probabilities=args.probabilities,
                embedding=args.embedding,
                majority_vote=args.majority_vote,
                drop_absent=args.drop_absent,
                overwrite=args.overwrite,
            )
            print(done)
    except (ValueError, OSError) as error:
        print(f"annotate: {error}", file=sys.stderr)
        return 1
    return 0


def _to_parquet(predictor: Predictor, path: Path, target: Path, model: str, args: argparse.Namespace) -> None:
    """Label one file, or the atlas query, into a folder of Parquet files, and print the summary."""
    started = time.perf_counter()
    source: CellSource
    if args.atlas:
        resumed = None if args.overwrite else target / PLAN
        source = query_cells(predictor, args.atlas, args.obs_filter, min_gene_overlap=args.min_gene_overlap, resumed=resumed)
    else:
        source = H5adCells.open(predictor, path, min_gene_overlap=args.min_gene_overlap, layer=args.layer, raw=args.use == "raw")
    labelled = label_cells(
        predictor,
        source,
        target,
        model=model,
        probabilities=args.probabilities,
        embedding=args.embedding,
        overwrite=args.overwrite,
    )
    seconds = time.perf_counter() - started
    print(f"{target}: {source.num_cells:,} cells in {seconds:.1f} s ({source.num_cells / seconds:,.0f} cells/s)")
    if labelled.num_empty:
        print(_empty_cells(labelled.num_empty))
    print(labelled.table.to_string(index=False))
    if args.write_obs:
        assert isinstance(source, AtlasCells)
        write_to_atlas(source, target)
        print(f"obs of {args.atlas} has the columns {', '.join(OBS_PREFIX + name for name in COLUMNS)}")


def _targets(args: argparse.Namespace) -> list[tuple[Path, Path]]:
    """Each input and where its output goes: the file itself for one input, a folder for several."""
    sources, out = args.h5ad or [], args.out
    if out is None:
        raise ValueError("--out is missing; name the annotated copy, or NAME.parquet")
    if args.atlas:
        if args.majority_vote:
            raise ValueError("--majority-vote works on .h5ad files, whose clusters stand in obs; drop it or --atlas")
        if args.drop_absent:
            raise ValueError("--drop-absent writes into .h5ad copies; drop it or --atlas")
        return [(Path(), out if out.suffix == ".parquet" else out.with_name(out.name + ".parquet"))]
    if args.write_obs:
        raise ValueError("--write-obs writes into an atlas; give --atlas instead of --h5ad")
    if args.parquet or out.suffix == ".parquet":
        for flag, given in (("--majority-vote", args.majority_vote), ("--drop-absent", args.drop_absent)):
            if given:
                raise ValueError(f"{flag} writes into .h5ad copies; drop it or --parquet")
        if len(sources) == 1 and out.suffix == ".parquet":
            return [(sources[0], out)]
        return [(source, out / f"{source.stem}.parquet") for source in sources]
    if len(sources) == 1:
        return [(sources[0], out / sources[0].name if out.is_dir() else out)]
    if out.suffix == ".h5ad" or out.is_file():
        raise ValueError(f"--out {out} is one file, but there are {len(sources)} inputs; name a folder")
    names = [source.name for source in sources]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled:
        raise ValueError(f"two inputs are called {doubled}, and both would go to {out / doubled}; annotate them one by one")
    return [(source, out / source.name) for source in sources]


if __name__ == "__main__":
    sys.exit(main())
