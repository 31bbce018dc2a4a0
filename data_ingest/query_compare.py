"""Compare what one query finds in two versions of an atlas: cells added, removed and relabelled."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from data_ingest.query import QueryResult
from data_ingest.query_counts import count_values

CELL_NAMES = ("observation_joinid", "obs_id")
"""obs columns that name a cell within its data set, in Census and in our atlases. Joinids differ between
releases."""
_NONE = "no label"


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What differs in a later version."""

    added: dict[str, int]
    """Cells that only the later version has, by label."""
    removed: dict[str, int]
    """Cells that only the earlier one has, by label."""
    relabelled: dict[str, int]
    """Cells of both whose label changed, by `old -> new`."""
    unchanged: int

    def words(self) -> str:
        """A few lines that list the changes, most frequent first."""
        lines = [f"  {self.unchanged:>11,}  cells are in both, with the same label"]
        for name in ("added", "removed", "relabelled"):
            counts: dict[str, int] = getattr(self, name)
            lines.append(f"  {sum(counts.values()):>11,}  {name}")
            lines += [f"  {count:>11,}    {label}" for label, count in counts.items()]
        return "\n".join(lines)


def changes(earlier: QueryResult, later: QueryResult) -> Changes:
    """Match the cells of two results by data set and name.

    Args:
        earlier: A result with one of the columns of `CELL_NAMES`.
        later: The same query in the later version, with the same column.

    Raises:
        ValueError: The two have no such column in common.
    """
    name = next((name for name in CELL_NAMES if name in earlier.obs and name in later.obs), None)
    if name is None:
        raise ValueError(
            f"cells of {earlier.atlas.uri} and {later.atlas.uri} cannot be matched: obs of both must have"
            f" {' or '.join(CELL_NAMES)}"
        )
    before, after = (_labels(result, name) for result in (earlier, later))
    both = before.index.intersection(after.index)
    old, new = before[both], after[both]
    changed = (old != new).to_numpy()
    return Changes(
        added=count_values(after[after.index.difference(both)]),
        removed=count_values(before[before.index.difference(both)]),
        relabelled=count_values(old[changed] + " -> " + new[changed]),
        unchanged=int((~changed).sum()),
    )


def _labels(result: QueryResult, name: str) -> pd.Series:
    index = pd.MultiIndex.from_arrays([result.obs["dataset_id"].astype(str), result.obs[name].astype(str)])
    labels = result.obs["label"].astype(object)
    return pd.Series(labels.where(labels.notna(), _NONE).to_numpy(dtype=object), index=index)
