"""Where an atlas is and which version of it: the one door to TileDB-SOMA's handles.

An atlas has the layout of CELLxGENE Census, `URI/census_data/homo_sapiens`, whether it lies in a folder,
behind S3's protocol or is a public release of Census itself.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import tiledbsoma

from screformer.config import AtlasConfig

ORGANISM = "homo_sapiens"
_CENSUS = re.compile(r"census(?::(?P<release>.*))?")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class AtlasLocator:
    """A pinned or not yet pinned atlas; small, hashable, picklable, and free of live handles."""

    uri: str
    """Absolute path, `s3://bucket/prefix`, `census` or `census:YYYY-MM-DD`."""
    measurement: str = "RNA"
    x_layer: str = "raw"
    timestamp_ms: int = 0
    """Version as milliseconds since 1970; 0 is the newest. A Census release is immutable: there it only tells
    the release's date."""
    tiledb_config: tuple[tuple[str, str], ...] = ()
    """TileDB settings in order of their names; credentials come from the environment."""

    def __post_init__(self) -> None:
        """Make a relative path absolute.

        So that another process with another working directory finds the same atlas.

        Raises:
            ValueError: An empty uri or an ill-formed Census release.
        """
        if not self.uri:
            raise ValueError(
                "atlas.uri is empty; give a folder, s3://bucket/prefix, census or census:YYYY-MM-DD"
            )
        release = self.census_release
        if release not in (None, "") and not re.fullmatch(r"\d{4}-\d{2}-\d{2}", release or ""):
            raise ValueError(
                f"atlas.uri={self.uri!r} names no release of Census; write census or census:YYYY-MM-DD, such"
                f" as census:2025-11-08"
            )
        if release is None and not _SCHEME.match(self.uri):
            object.__setattr__(self, "uri", os.path.abspath(os.path.expanduser(self.uri)))
        object.__setattr__(
            self, "tiledb_config", tuple(sorted((str(key), str(value)) for key, value in self.tiledb_config))
        )

    @classmethod
    def from_config(cls, config: AtlasConfig) -> AtlasLocator:
        """The locator that a configuration's `atlas` section describes."""
        return cls(
            config.uri,
            timestamp_ms=config.timestamp_ms,
            tiledb_config=tuple(config.tiledb_config.items()),
        )

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> AtlasLocator:
        """The inverse of `to_dict`."""
        return cls(**{**tree, "tiledb_config": tuple(tree["tiledb_config"].items())})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and for another process."""
        return {**dataclasses.asdict(self), "tiledb_config": dict(self.tiledb_config)}

    @property
    def census_release(self) -> str | None:
        """`YYYY-MM-DD` of a Census release, "" for its newest long-term one.

        None for an atlas that has an address of its own.
        """
        match = _CENSUS.fullmatch(self.uri)
        return (match["release"] or "") if match else None

    def pinned(self) -> AtlasLocator:
        """The same atlas at a version that stays.

        A Census release by its date, any other atlas as it is at this moment.

        Consolidating and vacuuming an atlas after it was pinned can remove the pinned version; a query's hash
        then tells.

        Raises:
            ValueError: Census can't be reached, or has no such release.
        """
        if self.census_release is not None:
            release = _census_release(self.census_release)
            day = datetime.datetime.fromisoformat(release).replace(tzinfo=datetime.UTC)
            return dataclasses.replace(
                self, uri=f"census:{release}", timestamp_ms=int(day.timestamp() * 1000)
            )
        return (
            self if self.timestamp_ms else dataclasses.replace(self, timestamp_ms=time.time_ns() // 1_000_000)
        )

    @contextmanager
    def open(self, threads: int = 0, buffer_bytes: int = 128 * 2**20) -> Iterator[tiledbsoma.Experiment]:
        """Open the human experiment for reading.

        Never call it in a forked process that inherits an open handle: TileDB hangs there.

        Args:
            threads: TileDB's compute threads, and as many for input; 0 is one per core.
            buffer_bytes: Memory of each column that a read returns at a time; TileDB may use about twelve
                times that beside it.

        Raises:
            ValueError: There is no atlas, it has another layout, or lacks the measurement or the X layer.
                Names what there is.
        """
        limits = {
            "soma.init_buffer_bytes": str(buffer_bytes),
            "sm.mem.total_budget": str(max(12 * buffer_bytes, 2**30)),
        }
        if threads:
            limits |= {"sm.compute_concurrency_level": str(threads), "sm.io_concurrency_level": str(threads)}
        root = self._open_root(limits | dict(self.tiledb_config))
        try:
            yield self._experiment(root)
        finally:
            root.close()

    def measured_genes(self, dataset_ids: Sequence[str], var_joinids: np.ndarray) -> np.ndarray:
        """Which genes each dataset measured: a gene that a dataset lacks is not zero there, but unknown.

        Args:
            dataset_ids: Datasets, d of them.
            var_joinids: Genes, (g,), increasing.

        Returns:
            bool (d, g), from the atlas's presence matrix. An atlas that says nothing of a dataset has
            measured all genes there.

        Raises:
            ValueError: As `open`.
        """
        root = self._open_root(dict(self.tiledb_config))
        try:
            measurement = self._experiment(root).ms[self.measurement]
            measured_dg = np.ones((len(dataset_ids), len(var_joinids)), bool)
            if "feature_dataset_presence_matrix" not in measurement or "datasets" not in root.get(
                "census_info", {}
            ):
                return measured_dg
            known = (
                root["census_info"]["datasets"]
                .read(column_names=["soma_joinid", "dataset_id"])
                .concat()
                .to_pydict()
            )
            row_of = dict(zip(known["dataset_id"], known["soma_joinid"], strict=True))
            for index, dataset in enumerate(dataset_ids):
                if dataset in row_of:
                    coords = ([row_of[dataset]], slice(int(var_joinids[0]), int(var_joinids[-1])))
                    found = measurement["feature_dataset_presence_matrix"].read(coords).tables().concat()
                    present = found["soma_dim_1"].to_numpy()[found["soma_data"].to_numpy() > 0]
                    measured_dg[index] = np.isin(var_joinids, present)
            return measured_dg
        finally:
            root.close()

    def _open_root(self, tiledb_config: dict[str, str]) -> Any:
        if self.census_release is not None:
            import cellxgene_census

            release = _census_release(self.census_release)
            context = cellxgene_census.get_default_soma_context(tiledb_config=tiledb_config)
            try:
                return cellxgene_census.open_soma(census_version=release, context=context)
            except (OSError, ValueError, tiledbsoma.SOMAError) as error:
                raise ValueError(
                    f"release {release} of Census could not be opened; is the network there?"
                    f" ({_brief(error)})"
                ) from error
        is_local = not _SCHEME.match(self.uri)
        if is_local and not os.path.exists(self.uri):
            raise ValueError(
                f"atlas.uri={self.uri!r} does not exist; make it with `python -m jobs.ingest --h5ad FILE..."
                f" --atlas {self.uri}`"
            )
        if is_local and os.path.isfile(self.uri):
            raise ValueError(
                f"atlas.uri={self.uri!r} is a file; an atlas is a folder: ingest the file with `python -m"
                f" jobs.ingest --h5ad {self.uri}`"
            )
        context = tiledbsoma.SOMATileDBContext(
            tiledb_config=tiledb_config, timestamp=self.timestamp_ms or None
        )
        try:
            return tiledbsoma.open(self.uri, context=context)
        except (tiledbsoma.SOMAError, OSError) as error:
            when = f" at timestamp_ms={self.timestamp_ms}" if self.timestamp_ms else ""
            remedy = (
                ""
                if is_local
                else "; check the address, atlas.tiledb_config and the credentials in the environment"
            )
            raise ValueError(
                f"atlas.uri={self.uri!r} holds no SOMA atlas{when}{remedy} ({_brief(error)})"
            ) from error

    def _experiment(self, root: Any) -> tiledbsoma.Experiment:
        layout = f"an atlas has the layout of Census, URI/census_data/{ORGANISM}"
        if root.soma_type != "SOMACollection" or "census_data" not in root:
            kind = f"a {root.soma_type}" + (
                f" of {', '.join(sorted(root.keys()))}" if hasattr(root, "keys") else ""
            )
            raise ValueError(f"atlas.uri={self.uri!r} holds {kind}, but {layout}; make one with jobs.ingest")
        if ORGANISM not in root["census_data"]:
            raise ValueError(f"atlas.uri={self.uri!r} holds {_listed(root['census_data'])}, but {layout}")
        experiment = root["census_data"][ORGANISM]
        if self.measurement not in experiment.ms:
            raise ValueError(
                f"atlas.measurement={self.measurement!r} is not in the atlas; there is"
                f" {_listed(experiment.ms)}"
            )
        layers = experiment.ms[self.measurement].X
        if self.x_layer not in layers:
            raise ValueError(
                f"atlas.x_layer={self.x_layer!r} is not in the atlas; there is {_listed(layers)}"
            )
        return experiment


def _census_release(release: str) -> str:
    import cellxgene_census

    try:
        directory = cellxgene_census.get_census_version_directory()
    except OSError as error:  # what requests raises is one, too
        wanted = f"census:{release}" if release else "census"
        raise ValueError(
            f"atlas.uri={wanted!r}: the release directory of CELLxGENE Census could not be reached; is the"
            f" network there? ({_brief(error)})"
        ) from error
    known = {entry["release_build"]: entry for entry in directory.values()}
    if not release:
        return directory["stable"]["release_build"]
    if release not in known:
        raise ValueError(
            f"atlas.uri='census:{release}': there is no such release; there is {', '.join(sorted(known))}"
        )
    return release


def _listed(collection: Any) -> str:
    return ", ".join(sorted(collection.keys())) or "nothing"


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
