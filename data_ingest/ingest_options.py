"""How the files of an ingest are read and joined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_ingest import schema
from data_ingest.file_genes import Duplicates

DERIVED = ("obs_id", "cell_type_major", "cell_type_major_ontology_term_id", "raw_sum", "nnz")


@dataclass(frozen=True, kw_only=True)
class IngestOptions:
    """How files are read and joined."""

    obs_map: Mapping[str, str] = field(default_factory=dict)
    """Atlas column to the file's obs column, such as `donor_id: patient`."""
    constants: Mapping[str, str] = field(default_factory=dict)
    """Atlas column to the value for files that lack it, such as `tissue_general: blood`."""
    layer: str | None = None
    """Layer that holds the counts; X by default."""
    use_raw: bool = False
    """Take counts from raw.X."""
    feature_id_column: str | None = None
    """var column of Ensembl gene ids; found by its usual names by default."""
    symbol_table: Path | None = None
    """Tab-separated table (symbol, feature_id) for genes without an Ensembl id."""
    duplicate_genes: Duplicates = "error"
    """What to do with several genes of one id in a file: refuse, `sum` their counts, or `drop` them."""
    labels: Path | None = None
    """Tab-separated table (dataset, cell_type, cl_id) for labels without a Cell Ontology term; wins over the
    file's own terms."""
    major_types: Path | None = None
    """Tab-separated table (name, cl_id, also, before) that replaces the default major types."""
    tiledb_config: Mapping[str, str] = field(default_factory=dict)
    """Passed to TileDB as it is."""
    dry_run: bool = False
    """Check and plan, write nothing."""
    cells_per_chunk: int = 4096
    """Cells read together; bounds each task's memory."""
    values_per_fragment: int = 1 << 24
    """Most stored counts written by one task, into one fragment of X (at least one cell); 20 bytes of memory
    each."""

    def __post_init__(self) -> None:
        for option, mapping in (("--obs-map", self.obs_map), ("--set", self.constants)):
            for name in mapping:
                if name in DERIVED or name not in schema.OBS_COLUMNS:
                    allowed = ", ".join(column for column in schema.OBS_COLUMNS if column not in DERIVED)
                    raise ValueError(
                        f"{option} {name}={mapping[name]}: {name!r} is not a column that can be given; choose"
                        f" from {allowed}"
                    )
        both = sorted(set(self.obs_map) & set(self.constants))
        if both:
            raise ValueError(f"{both[0]!r} is in --obs-map and in --set; a column has one source")
