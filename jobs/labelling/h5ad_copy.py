"""Write a labelled copy of an .h5ad file."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem, write_elem

from data_ingest.cells import H5adCells
from data_ingest.h5ad import H5adFile
from jobs.labelling.shards import LabelledCells, label_cells
from jobs.tracking.identity import code_identity
from screformer.genes import GeneMatch
from screformer.labelling import (
    EMBEDDING_KEY,
    PROBABILITIES_KEY,
    PROVENANCE,
    answers,
    cluster_codes,
    fingerprint,
    kept_as,
    provenance,
    require_prior,
)
from screformer.predictor import ANSWER_COLUMNS, Predictor


@dataclass(frozen=True, eq=False, kw_only=True)
class Annotation:
    """Result of annotating one file."""

    path: Path
    """The labelled copy."""
    table: pd.DataFrame
    """One row per label: `label`, `cl_id`, `cells`, `share`, `mean_confidence`; most frequent first."""
    genes: GeneMatch
    """Match between the genes of the file and of the model."""
    num_cells: int
    """Number of labelled cells."""
    num_empty: int
    """Number of cells with too few counts to be labelled."""
    moved: Mapping[str, str]
    """Input columns whose names are used here, and the new names they are kept under."""
    seconds: float
    """Time for reading, labelling and writing."""

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.num_cells:,} cells in {self.seconds:.1f} s"
            f" ({self.num_cells / self.seconds:,.0f} cells/s); {self.genes}"
        ]
        lines += [f"  obs[{name!r}] of the input is kept as {kept!r}" for name, kept in self.moved.items()]
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
    cells: H5adCells,
    target: str | Path,
    *,
    model: str,
    probabilities: bool = False,
    embedding: bool = False,
    majority_vote: str = "",
    drop_absent: bool = False,
    overwrite: bool = False,
) -> Annotation:
    """Copy an .h5ad file and label its cells.

    Adds the obs columns `screformer.predictor.ANSWER_COLUMNS` and records their provenance in
    `uns["screformer"]`. Input columns with the same names are kept as `NAME_original`, unless an earlier run
    of this command wrote them. The copy gets its final name only when it is complete. Until then, labels are
    kept in the folder `TARGET.labels`, and an interrupted run resumes from there.

    Args:
        predictor: The model.
        cells: The file.
        target: Path of the copy; its folder is created.
        model: Model URI with version number, for `uns`.
        probabilities: Also write `obsm["screformer_probabilities"]`, float32 (n, k), with columns in
            the order of the label categories.
        embedding: Also write `obsm["X_screformer"]`, float32 (n, d).
        majority_vote: obs column of clusters, for example `leiden`; also write `majority_label`, the most
            frequent best label of the cell's cluster. Empty writes none.
        drop_absent: Also write `present_label`, the best label among the types estimated to be present in
            the file (`screformer.composition.present_labels`); needs 4 bytes of memory per cell and label.
        overwrite: Replace an existing target.

    Returns:
        A summary to print.

    Raises:
        ValueError: The values are not raw counts, or the target already exists.
    """
    target = Path(target)
    if target.exists() and target.samefile(cells.path):
        raise ValueError(f"--out {target} is the input file, which is never changed; give another path")
    if target.exists() and not overwrite:
        raise ValueError(f"--out {target} already exists; give another path or add --overwrite")
    started = time.perf_counter()
    require_prior(predictor, drop_absent)
    with H5adFile.open(cells.path, layer=cells.layer, raw=cells.raw) as file:
        source = file.source
        clusters_n = cluster_codes(file.obs, majority_vote) if majority_vote else None
        next(file.chunks(64))  # checks the first counts before the copy, which can take long
    target.parent.mkdir(parents=True, exist_ok=True)
    with _copy_of(cells.path, target) as copy:
        labelled = label_cells(
            predictor,
            cells,
            target.with_name(target.name + ".labels"),
            model=model,
            probabilities=probabilities or drop_absent,
            embedding=embedding,
            scratch=True,
        )
        streamed = {PROBABILITIES_KEY: "probability: "} if probabilities else {}
        streamed |= {EMBEDDING_KEY: "embedding_"} if embedding else {}
        _write_matrices(copy, labelled, cells.num_cells, streamed)
        probabilities_nk = _matrix(labelled, "probability: ") if drop_absent else None
        parts = [shard[list(ANSWER_COLUMNS)] for shard in labelled.shards()]
        table = answers(predictor, parts, clusters_n, probabilities_nk)
        moved = _write_columns(copy, table)
        record = provenance(predictor, table, match=cells.match, counts=source)
        record |= {"model": model, "code": {key: str(code_identity()[key]) for key in ("screformer", "git")}}
        write_elem(copy["uns"], PROVENANCE, record)
    labelled.discard()
    return Annotation(
        path=target,
        table=labelled.table,
        genes=cells.match,
        num_cells=cells.num_cells,
        num_empty=labelled.num_empty,
        moved=moved,
        seconds=time.perf_counter() - started,
    )


@contextmanager
def _copy_of(source: Path, target: Path) -> Iterator[h5py.File]:
    """A copy of a file, open for writing; it gets its final name if the block ends without an error."""
    partial = target.with_name(target.name + ".tmp")
    try:
        shutil.copyfile(source, partial)
        partial.chmod(0o644)
        with h5py.File(partial, "r+") as copy:
            if not isinstance(copy["obs"], h5py.Group):
                raise ValueError(
                    f"{source}: obs has the format of anndata before 0.7; read it with anndata and write it"
                    f" again"
                )
            for key in ("uns", "obsm"):
                if key not in copy:
                    write_elem(copy, key, {})
            yield copy
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _write_columns(copy: h5py.File, table: pd.DataFrame) -> dict[str, str]:
    """Write columns to obs; rename input columns of the same name, unless an earlier run wrote them.

    Returns:
        The renamed columns and their new names.
    """
    obs = copy["obs"]
    record = read_elem(copy["uns"][PROVENANCE]) if PROVENANCE in copy["uns"] else {}
    written = record.get("columns", {}) if isinstance(record, dict) else {}
    order = [name.decode() if isinstance(name, bytes) else str(name) for name in obs.attrs["column-order"]]
    moved: dict[str, str] = {}
    for name in [*table, *(name for name in written if name not in table)]:
        if name not in obs:
            continue
        if name in written and fingerprint(pd.Series(read_elem(obs[name]))) == written[name]:
            del obs[name]
            order.remove(name)
        elif name in table:
            moved[name] = kept_as(name, obs)
            obs.move(name, moved[name])
            order[order.index(name)] = moved[name]
    for name in table:
        write_elem(
            obs, name, table[name].array if table[name].dtype == "category" else table[name].to_numpy()
        )
    obs.attrs.create("column-order", [*order, *table], dtype=h5py.string_dtype())
    return moved


def _write_matrices(
    copy: h5py.File, labelled: LabelledCells, num_cells: int, prefixes: Mapping[str, str]
) -> None:
    """Copy columns of the shards to obsm, shard by shard, because they may not fit in memory."""
    datasets: dict[str, h5py.Dataset] = {}
    start = 0
    for shard in labelled.shards() if prefixes else ():
        for key, prefix in prefixes.items():
            values = shard.filter(regex=f"^{prefix}")
            if start == 0:
                copy["obsm"].pop(key, None)
                shape = (num_cells, values.shape[1])
                datasets[key] = copy["obsm"].create_dataset(key, shape=shape, dtype=np.float32)
                datasets[key].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
            datasets[key][start : start + len(shard)] = values
        start += len(shard)


def _matrix(labelled: LabelledCells, prefix: str) -> np.ndarray:
    return np.concatenate(
        [shard.filter(regex=f"^{prefix}").to_numpy(np.float32) for shard in labelled.shards()]
    )


def empty_cells_text(count: int) -> str:
    """A line about cells that are unknown because they have too few counts."""
    return f"  {count:,} cells have too few counts to classify and are labelled unknown"
