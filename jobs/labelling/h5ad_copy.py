"""Write a labelled copy of an .h5ad file."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem

from data_ingest.cells import H5adCells
from data_ingest.h5ad import H5adFile, check_counts
from jobs.labelling.shards import label_cells
from jobs.tracking.identity import code_identity
from screformer.calibration import LEVELS, present_labels
from screformer.genes import MIN_GENE_OVERLAP, GeneMatch
from screformer.labelling import MAJORITY_COLUMN, PRESENT_COLUMN, cluster_codes, majority, require_prior
from screformer.predictor import ANSWER_COLUMNS, Predictor

COLUMNS = ANSWER_COLUMNS
"""obs columns that are written."""


PROVENANCE = "screformer"
"""Key in uns that says which model labelled the file."""


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
            f"{self.path}: {self.num_cells:,} cells in {self.seconds:.1f} s"
            f" ({self.num_cells / self.seconds:,.0f} cells/s); {self.genes}"
        ]
        lines += [f"  obs[{name!r}] of the input is kept as {name + '_original'!r}" for name in self.moved]
        if self.num_empty:
            lines.append(empty_cells_text(self.num_empty))
        shown = self.table.assign(
            share=self.table["share"].map("{:.1%}".format),
            mean_confidence=self.table["mean_confidence"].map("{:.3f}".format),
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

    Adds the obs columns `screformer.predictor.ANSWER_COLUMNS` and says in `uns["screformer"]` where they come
    from. Columns of these names that the input already has are kept as `NAME_original`, unless an earlier run
    of this command wrote them. The copy appears under its name only when it is complete; until then the
    labels are kept in the folder `TARGET.labels`, from which an interrupted run goes on.

    Args:
        predictor: The model.
        source: .h5ad file of raw counts. Genes are known by Ensembl id or symbol, in the var index or any
            text column of var.
        target: The copy; its folder is made.
        model: URI of the model for `uns`, with its version.
        layer: Counts are in this layer instead of X.
        raw: Counts are in `raw.X` instead of X.
        min_gene_overlap: Least share of the model's expected expression that the file's genes must carry, in
            [0, 1].
        probabilities: Also write `obsm["screformer_probabilities"]`, float32 (n, k), in the order of the
            label's categories.
        embedding: Also write `obsm["X_screformer"]`, float32 (n, d).
        majority_vote: obs column of clusters, such as `leiden`; also write `majority_label`, the most
            frequent best label of the cell's cluster. Empty writes none.
        drop_absent: Also write `present_label`, the best label among those that the file's cells as a whole
            hold (`screformer.calibration.present_labels`); holds 4 bytes per cell and label in memory.
        overwrite: Replace an existing target.

    Returns:
        What was done, to be printed.

    Raises:
        ValueError: An unreadable file, values that are no raw counts, too few genes, or a target that is
            there already.
    """
    source, target = Path(source), Path(target)
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"--out {target} is the input itself; name another file, the input is never changed")
    if target.exists() and not overwrite:
        raise ValueError(f"--out {target} exists already; name another file or add --overwrite")
    started = time.perf_counter()
    require_prior(predictor, drop_absent)
    cells = H5adCells.open(predictor, source, min_gene_overlap=min_gene_overlap, layer=layer, raw=raw)
    with H5adFile.open(source, layer=layer, raw=raw) as file:
        clusters = cluster_codes(file.obs, majority_vote) if majority_vote else None
        for start, counts in file.chunks(
            64, stop=min(64, file.n_cells)
        ):  # before the copy, which may take long
            check_counts(counts, file=file, start=start)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".tmp")
        try:
            shutil.copyfile(source, partial)
            with h5py.File(partial, "r+") as copy:
                writer = _Writer(
                    copy,
                    predictor,
                    file,
                    probabilities=probabilities,
                    embedding=embedding,
                    drop_absent=drop_absent,
                )
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
        self,
        copy: h5py.File,
        predictor: Predictor,
        file: H5adFile,
        *,
        probabilities: bool,
        embedding: bool,
        drop_absent: bool,
    ) -> None:
        obs = copy["obs"]
        if not isinstance(obs, h5py.Group):
            raise ValueError(
                f"{file.path}: obs is stored as before anndata 0.7; read it with anndata and write it again"
            )
        num_labels, num_cells = len(predictor.label_names), file.n_cells
        length = obs[obs.attrs["_index"]].shape[0]
        if length != num_cells:
            raise ValueError(
                f"{file.path}: obs has {length} rows but {file.source} has {num_cells}; the file is damaged,"
                f" write it again"
            )
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
        self._codes = {
            name: self._categorical(name, values.to_numpy(), num_cells)
            for name, values in self._categories.items()
        }
        self._values = {
            name: self._array(obs, name, (num_cells,), dtype)
            for name, dtype in (
                ("conf_score", np.float32),
                ("unknown_score", np.float32),
                ("unknown", np.bool_),
            )
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
        order = [
            f"{name}_original" if name in self.moved else name
            for name in order
            if name in obs or name in self.moved
        ]
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
        self._add_labels(
            MAJORITY_COLUMN,
            majority(self._codes["best_label"][:], clusters_n, len(self._predictor.label_names)),
        )

    def drop_absent(self) -> None:
        """Add `present_label`: the best label among those that the cells as a whole hold."""
        self._add_labels(
            PRESENT_COLUMN, present_labels(self._probabilities_nk, self._predictor.calibration.prior_k)
        )

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
                raise ValueError(
                    f"obs has {name!r} and {name + '_original'!r} already; rename or drop one of them in the"
                    f" input"
                )
            obs.move(name, f"{name}_original")
            moved.append(name)
        if ours:
            del self._copy["uns"][PROVENANCE]
        return tuple(moved)

    def _array(
        self, group: h5py.Group, name: str, shape: tuple[int, ...], dtype: Any = np.float32
    ) -> h5py.Dataset:
        dataset = group.create_dataset(name, shape=shape, dtype=dtype)
        dataset.attrs["encoding-type"], dataset.attrs["encoding-version"] = "array", "0.2.0"
        return dataset

    def _categorical(self, name: str, categories: np.ndarray, num_cells: int) -> h5py.Dataset:
        group = self._copy["obs"].create_group(name)
        group.attrs["encoding-type"], group.attrs["encoding-version"], group.attrs["ordered"] = (
            "categorical",
            "0.2.0",
            False,
        )
        write_elem(group, "categories", categories.astype(str))
        return self._array(group, "codes", (num_cells,), np.int8 if len(categories) < 128 else np.int16)


def empty_cells_text(count: int) -> str:
    """A line about cells without a known gene."""
    return f"  {count:,} cells have no count in any gene that the model knows; their labels mean nothing"


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
