"""Options for reading and joining the files of an ingest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_ingest import schema
from data_ingest.file_genes import Duplicates

DERIVED = ("obs_id", "cell_type_major", "cell_type_major_ontology_term_id", "raw_sum", "nnz")


@dataclass(frozen=True, kw_only=True)
class IngestOptions:
    """How to read and join files."""

    obs_map: Mapping[str, str] = field(default_factory=dict)
    """Atlas column to the file's obs column, for example `donor_id: patient`."""
    constants: Mapping[str, str] = field(default_factory=dict)
    """Atlas column to the value for files that lack it, for example `tissue_general: blood`."""
    layer: str | None = None
    """Layer with the counts; X by default."""
    use_raw: bool = False
    """Read counts from raw.X."""
    feature_id_column: str | None = None
    """var column of Ensembl gene ids; found by its usual names by default."""
    symbol_table: Path | None = None
    """Tab-separated table (symbol, feature_id) for genes without an Ensembl id."""
    duplicate_genes: Duplicates = "error"
    """What to do if several genes of a file share an id: reject the file, `sum` their counts, or `drop`
    them."""
    labels: Path | None = None
    """Tab-separated table (dataset, cell_type, cl_id) for labels without a Cell Ontology term; takes
    precedence over the file's terms."""
    major_types: Path | None = None
    """Tab-separated table (name, cl_id, also, before) that replaces the default major types."""
    tiledb_config: Mapping[str, str] = field(default_factory=dict)
    """Passed to TileDB unchanged."""
    dry_run: bool = False
    """Check and plan without writing anything."""
    cells_per_chunk: int = 4096
    """Cells read together; bounds each task's memory."""
    values_per_fragment: int = 1 << 24
    """Maximum stored counts per task, which writes one fragment of X (at least one cell). Each count takes 20
    bytes of memory."""

    def __post_init__(self) -> None:
        for option, mapping in (("--obs-map", self.obs_map), ("--set", self.constants)):
            for name in mapping:
                if name in DERIVED or name not in schema.OBS_COLUMNS:
                    allowed = ", ".join(column for column in schema.OBS_COLUMNS if column not in DERIVED)
                    raise ValueError(
                        f"{option} {name}={mapping[name]}: {name!r} is not a column you can set; choose"
                        f" from {allowed}"
                    )
        both = sorted(set(self.obs_map) & set(self.constants))
        if both:
            raise ValueError(f"{both[0]!r} is in both --obs-map and --set; use one of them")
