"""Labels of a query's cells, from an obs column or rolled up to major types."""

from __future__ import annotations

import numpy as np
import pandas as pd

from data_ingest.ontology import MajorTypes, is_cell_term

MAJOR = "cell_type_major"
UNKNOWN = ("", "unknown", "na", "nan")
"""Values of a label column that mean "no label"; Census writes `unknown`."""
ANY_CELL = (
    "cell",
    "native cell",
    "eukaryotic cell",
    "animal cell",
    "nucleate cell",
    "single nucleate cell",
    "motile cell",
)
"""Names of Cell Ontology terms that do not describe a cell's type."""


def labels_of(obs: pd.DataFrame, column: str) -> tuple[pd.Categorical, dict[str, str]]:
    """The label of each cell, without unused categories, and the Cell Ontology id of each label.

    Cells whose value is in `UNKNOWN` or `ANY_CELL` get no label.

    Args:
        obs: Cells with the label column, or with `cell_type_ontology_term_id` to roll up.
        column: Label column.
    """
    if column in obs:
        names = obs[column].astype("category")
        companion = f"{column}_ontology_term_id"
        cl_ids: dict[str, str] = {}
        if companion in obs:
            pairs = obs[[column, companion]].drop_duplicates().dropna()
            cl_ids = dict(zip(pairs[column].astype(str), pairs[companion].astype(str), strict=True))
        of_category = {category: str(category) for category in names.cat.categories}
    else:
        names, major = obs["cell_type_ontology_term_id"].astype("category"), MajorTypes()
        # A Census release may use terms that our copy of the ontology does not have.
        rolled = {term: major.roll_up(str(term)) for term in names.cat.categories if is_cell_term(str(term))}
        of_category = {
            term: rolled[term].name if term in rolled else "unknown" for term in names.cat.categories
        }
        cl_ids = {found.name: found.cl_id for found in rolled.values()}
    no_type = {*UNKNOWN, *ANY_CELL}
    known = sorted({name for name in of_category.values() if name.lower() not in no_type})
    code_of = {name: code for code, name in enumerate(known)}
    codes_of_category = np.array(
        [code_of.get(of_category[category], -1) for category in names.cat.categories] + [-1]
    )
    codes = codes_of_category[names.cat.codes.to_numpy()]
    used = np.unique(codes[codes >= 0])
    renumbered = np.searchsorted(used, codes)
    labels = pd.Categorical.from_codes(
        np.where(codes >= 0, renumbered, -1), categories=[known[code] for code in used]
    )
    return labels, {name: cl_ids.get(name, "") for name in labels.categories}
