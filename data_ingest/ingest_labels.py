"""Assign Cell Ontology terms and major types to the cells of a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from data_ingest.ingest_files import CheckedFile
from data_ingest.ingest_obs import is_newer_term
from data_ingest.ontology import UNKNOWN, MajorTypes, Outcome, RollUp, is_cell_term
from data_ingest.tables import read_table

_NEWER = RollUp(name=UNKNOWN, cl_id=UNKNOWN, outcome="newer", candidates=())


def read_labels(path: Path) -> dict[tuple[str, str], str]:
    """Read the `--labels` table: (dataset, label) to Cell Ontology term, empty if none fits."""
    table = read_table(path, "--labels", ("dataset", "cell_type", "cl_id"))
    found: dict[tuple[str, str], str] = {}
    for line, (dataset, label, cl_id) in enumerate(
        zip(table["dataset"], table["cell_type"], table["cl_id"], strict=True), start=2
    ):
        dataset, label = " ".join(dataset.split()), " ".join(label.split())
        if cl_id and not is_cell_term(cl_id) and not is_newer_term(cl_id):
            raise ValueError(
                f"{path} (--labels) line {line}: cl_id={cl_id!r} is not a Cell Ontology term such as"
                f" CL:0000084; "
                "leave it empty if none fits"
            )
        if found.setdefault((dataset, label), cl_id) != cl_id:
            raise ValueError(
                f"{path} (--labels) line {line}: ({dataset}, {label}) has cl_id={cl_id!r} here and"
                f" {found[dataset, label]!r} above; "
                "keep one row"
            )
    return found


def label(file: CheckedFile, labels: Mapping[tuple[str, str], str], majors: MajorTypes) -> CheckedFile:
    """The file with terms and major types for its cells.

    Args:
        file: From `check_file`.
        labels: (dataset, label) to term, from `read_labels`; takes precedence over the file's terms.
        majors: Major types to roll up to.
    """
    keys = ["dataset_id", "cell_type", "cell_type_ontology_term_id"]
    codes, triples = pd.MultiIndex.from_frame(file.obs[keys].astype(object)).factorize()
    sizes = np.bincount(codes, minlength=len(triples))
    terms, names, ids = [], [], []
    unmapped: dict[Outcome, Counter[str]] = {}
    terms_of: dict[str, Counter[str]] = {}
    for (dataset, name, own_term), size in zip(triples, sizes, strict=True):
        term = labels.get((dataset, name)) or own_term
        major = _NEWER if is_newer_term(term) else majors.roll_up(term)
        terms.append(term)
        names.append(major.name)
        ids.append(major.cl_id)
        if major.outcome != "mapped":
            unmapped.setdefault(major.outcome, Counter())[name] += int(size)
        if term != UNKNOWN and name != UNKNOWN:
            terms_of.setdefault(name, Counter())[term] += int(size)
    notes = [
        f"cell_type {name!r} has several terms: "
        + ", ".join(f"{term} ({size} cells)" for term, size in found.most_common())
        for name, found in terms_of.items()
        if len(found) > 1
    ]
    columns = {
        "cell_type_ontology_term_id": terms,
        "cell_type_major": names,
        "cell_type_major_ontology_term_id": ids,
    }
    obs = file.obs.assign(
        **{
            column: pd.Categorical(np.array(values, dtype=object)[codes])
            for column, values in columns.items()
        }
    )
    return replace(file, obs=obs, unmapped=unmapped, notes=(*file.notes, *notes))
