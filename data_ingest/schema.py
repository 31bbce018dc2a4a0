"""Schema of an atlas: that of CELLxGENE Census, so the public Census client can open it.

    ROOT / census_info / summary, datasets
         / census_data / homo_sapiens / obs
                                      / ms / RNA / var, X / raw, feature_dataset_presence_matrix

X is laid out for reading random runs of cells: tiles have 64 cells and all genes, so reading a run of 64
neighbours reads little else.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import tiledbsoma as soma

from data_ingest.atlas import MEASUREMENT, X_LAYER, written_ahead

EXPERIMENT = "census_data/homo_sapiens"
OBS = f"{EXPERIMENT}/obs"
VAR = f"{EXPERIMENT}/ms/{MEASUREMENT}/var"
X = f"{EXPERIMENT}/ms/{MEASUREMENT}/X/{X_LAYER}"
PRESENCE = f"{EXPERIMENT}/ms/{MEASUREMENT}/feature_dataset_presence_matrix"
DATASETS = "census_info/datasets"
SUMMARY = "census_info/summary"
ORGANISM = "Homo sapiens"
CELL_TILE = 64
"""Cells per tile of X; the stream's run length should match it."""
_GENE_TILE = 1 << 17
"""Genes per tile of X: more than the human annotation has, so all genes of a run share a tile."""
_CAPACITY = 65_536
"""Stored values per data tile, the unit of decompression; about 64 cells at 1,000 genes each."""
MARKER = "screformer_schema"
"""Metadata key of the root collection; its value is the version of this schema."""
SCHEMA_VERSION = "1"

OBS_COLUMNS: dict[str, pa.DataType] = {
    "dataset_id": pa.large_string(),
    "obs_id": pa.large_string(),
    "donor_id": pa.large_string(),
    "cell_type": pa.large_string(),
    "cell_type_ontology_term_id": pa.large_string(),
    "cell_type_major": pa.large_string(),
    "cell_type_major_ontology_term_id": pa.large_string(),
    "tissue": pa.large_string(),
    "tissue_general": pa.large_string(),
    "assay": pa.large_string(),
    "disease": pa.large_string(),
    "sex": pa.large_string(),
    "study": pa.large_string(),
    "is_primary_data": pa.bool_(),
    "raw_sum": pa.float64(),
    "nnz": pa.int64(),
}
"""Columns of obs in addition to `soma_joinid`. (dataset_id, obs_id) identifies a cell. `raw_sum` and `nnz`
describe its row of X.

Strings are plain, not enumerated, so value filters on unseen values and appends with new values need no
schema change.
"""
VAR_COLUMNS: dict[str, pa.DataType] = {
    "feature_id": pa.large_string(),
    "feature_name": pa.large_string(),
    "feature_length": pa.int64(),
    "nnz": pa.int64(),
    "n_measured_obs": pa.int64(),
}
"""Columns of var in addition to `soma_joinid`: `nnz` is the number of cells that express the gene,
`n_measured_obs` the number of cells whose file had it."""
DATASET_COLUMNS: dict[str, pa.DataType] = {
    "dataset_id": pa.large_string(),
    "dataset_title": pa.large_string(),
    "dataset_h5ad_path": pa.large_string(),
    "dataset_total_cell_count": pa.int64(),
}
SUMMARY_COLUMNS: dict[str, pa.DataType] = {"label": pa.large_string(), "value": pa.large_string()}

_ZSTD = {"_type": "ZstdFilter", "level": 9}


def soma_context(
    tiledb_config: Mapping[str, str] | None = None, *, threads: int = 1, buffer_bytes: int = 128 << 20
) -> soma.SOMATileDBContext:
    """A SOMA context with limits; by default each process would use all cores and 1 GiB buffers per column.

    Args:
        tiledb_config: Passed to TileDB unchanged; overrides the limits.
        threads: Number of compute and of I/O threads.
        buffer_bytes: Read buffer, per column.
    """
    bounds = {
        "sm.compute_concurrency_level": str(threads),
        "sm.io_concurrency_level": str(threads),
        "soma.init_buffer_bytes": str(buffer_bytes),
    }
    return soma.SOMATileDBContext(tiledb_config=bounds | dict(tiledb_config or {}))


def is_remote(uri: str) -> bool:
    """Whether the URI is in an object store rather than a local path."""
    return "://" in uri and not uri.startswith("file://")


def atlas_place(text: str) -> str:
    """Normalise the location of an atlas to an absolute path, or an object store URI without trailing slash.

    Args:
        text: A path (may start with `~`), `file://...` or `s3://...`.

    Raises:
        ValueError: TileDB would misinterpret the path.
    """
    if is_remote(text):
        return text.rstrip("/")
    path = os.path.abspath(os.path.expanduser(text.removeprefix("file://")))
    odd = next((character for character in "#?;%" if character in path), None)
    if odd:
        raise ValueError(
            f"--atlas {text}: TileDB cannot open a path with {odd!r} in it; choose a different folder"
        )
    return path


def find_atlas(uri: str, context: soma.SOMATileDBContext) -> bool:
    """Whether an atlas of this schema exists; False for nothing or an interrupted creation.

    Raises:
        ValueError: Something else exists at this location.
    """
    if not is_remote(uri) and not os.path.exists(uri):
        return False
    if not is_remote(uri) and not os.path.isdir(uri):
        raise ValueError(f"--atlas {uri} is a file; use a directory or an s3:// prefix")
    try:
        with soma.open(uri, context=context) as found:
            version, kind, members = (
                found.metadata.get(MARKER),
                found.soma_type,
                set(found) if hasattr(found, "keys") else {"?"},
            )
    except soma.DoesNotExistError as e:
        if ahead := written_ahead(uri, context):
            raise ValueError(f"--atlas {ahead}") from e
        if is_remote(uri) or not os.listdir(uri):
            return False
        raise ValueError(
            f"--atlas {uri} is a directory with other contents, not an atlas; choose a new directory"
        ) from e
    if version is None and is_remote(uri) and members <= {"census_info", "census_data"}:
        return False
    if version is None:
        raise ValueError(
            f"--atlas {uri} is a {kind} with a different schema, so it cannot be appended to; choose a new"
            f" location"
        )
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"--atlas {uri} has schema version {version}, this program writes version {SCHEMA_VERSION};"
            f" create a new atlas from the files"
        )
    return True


def create_atlas(uri: str, context: soma.SOMATileDBContext) -> None:
    """Create an empty atlas.

    A local atlas is created under a temporary name and then renamed, so it appears in one step. Object stores
    cannot rename, so an interrupted creation is completed instead.

    Args:
        uri: Location; empty, or with an interrupted creation.
        context: TileDB context.
    """
    if is_remote(uri):
        _create_tree(uri.rstrip("/"), context)
        return
    target = os.path.abspath(uri.removeprefix("file://"))
    unfinished = f"{target}.creating"
    shutil.rmtree(unfinished, ignore_errors=True)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    _create_tree(unfinished, context)
    os.rename(unfinished, target)


def _create_tree(root: str, context: soma.SOMATileDBContext) -> None:
    with _collection(soma.Collection, root, None, context) as top:
        with _collection(soma.Collection, f"{root}/census_info", top, context) as info:
            _dataframe(f"{root}/census_info/summary", SUMMARY_COLUMNS, info, context)
            _dataframe(f"{root}/census_info/datasets", DATASET_COLUMNS, info, context)
        base = f"{root}/{EXPERIMENT}"
        with (
            _collection(soma.Collection, f"{root}/census_data", top, context) as data,
            _collection(soma.Experiment, base, data, context) as experiment,
            _collection(soma.Collection, f"{base}/ms", experiment, context) as ms,
            _collection(soma.Measurement, f"{base}/ms/RNA", ms, context) as rna,
            _collection(soma.Collection, f"{base}/ms/RNA/X", rna, context) as layers,
        ):
            _dataframe(f"{base}/obs", OBS_COLUMNS, experiment, context)
            _dataframe(f"{base}/ms/RNA/var", VAR_COLUMNS, rna, context)
            _array(f"{base}/ms/RNA/X/raw", pa.float32(), _x_layout(), layers, context)
            _array(f"{base}/ms/RNA/feature_dataset_presence_matrix", pa.uint8(), {}, rna, context)
        # Written last: an atlas with the marker is complete.
        top.metadata[MARKER] = SCHEMA_VERSION


def _collection(kind: Any, uri: str, parent: Any, context: soma.SOMATileDBContext) -> Any:
    made = (
        kind.open(uri, "w", context=context)
        if kind.exists(uri, context=context)
        else kind.create(uri, context=context)
    )
    _link(parent, uri, made)
    return made


def _dataframe(
    uri: str, columns: Mapping[str, pa.DataType], parent: Any, context: soma.SOMATileDBContext
) -> None:
    if not soma.DataFrame.exists(uri, context=context):
        schema = pa.schema([("soma_joinid", pa.int64()), *columns.items()])
        platform = {
            "tiledb": {
                "create": {
                    "attrs": {name: {"filters": [{"_type": "ZstdFilter", "level": 3}]} for name in columns}
                }
            }
        }
        soma.DataFrame.create(
            uri, schema=schema, domain=((0, 0),), platform_config=platform, context=context
        ).close()
    with soma.DataFrame.open(uri, context=context) as made:
        _link(parent, uri, made)


def _array(
    uri: str, kind: pa.DataType, layout: dict[str, Any], parent: Any, context: soma.SOMATileDBContext
) -> None:
    if not soma.SparseNDArray.exists(uri, context=context):
        soma.SparseNDArray.create(
            uri, type=kind, shape=(1, 1), platform_config={"tiledb": {"create": layout}}, context=context
        ).close()
    with soma.SparseNDArray.open(uri, context=context) as made:
        _link(parent, uri, made)


def _link(parent: Any, uri: str, member: Any) -> None:
    name = uri.rsplit("/", 1)[1]
    if parent is not None and name not in parent:
        parent.set(name, member, use_relative_uri=True)


def _x_layout() -> dict[str, Any]:
    return {
        "capacity": _CAPACITY,
        "tile_order": "row-major",
        "cell_order": "row-major",
        "allows_duplicates": False,
        "dims": {
            "soma_dim_0": {"tile": CELL_TILE, "filters": [_ZSTD]},
            "soma_dim_1": {"tile": _GENE_TILE, "filters": ["ByteShuffleFilter", _ZSTD]},
        },
        "attrs": {"soma_data": {"filters": ["ByteShuffleFilter", _ZSTD]}},
    }
