"""Locate, pin and open an atlas.

An atlas has the layout of CELLxGENE Census, `URI/census_data/homo_sapiens`. It is a local folder, an S3
prefix, or a public Census release.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import tiledbsoma

from screformer.config import AtlasConfig

ORGANISM = "homo_sapiens"
MEASUREMENT, X_LAYER = "RNA", "raw"
"""Where raw counts are, as in Census."""
PUBLIC_CENSUS = "https://census.cellxgene.cziscience.com/cellxgene-census/v1"
CENSUS_URL = "SCREFORMER_CENSUS_URL"
"""Environment variable for `atlas.census_url`."""
_TRIES, _WAIT_S = 3, 0.5
"""How often to ask for the release directory, and the first pause; each pause is twice as long."""
_CENSUS = re.compile(r"census(?::(?P<release>.*))?")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
END_OF_TIME_MS = 2**62
CLOCK_AHEAD = (
    "was written by a machine whose clock is ahead of this one's, and writes with a future timestamp are"
    " invisible; correct the clocks, then wait until this clock has passed the time of that write"
)


def located(atlas: AtlasConfig) -> AtlasConfig:
    """The same atlas with an absolute path, valid in any working directory, and the directory of Census.

    Raises:
        ValueError: The URI is empty, or the Census release is malformed.
    """
    if not atlas.uri:
        raise ValueError("atlas.uri is empty; use a folder, s3://bucket/prefix, census or census:YYYY-MM-DD")
    release = census_release(atlas)
    if release not in (None, "") and not re.fullmatch(r"\d{4}-\d{2}-\d{2}", release or ""):
        raise ValueError(
            f"atlas.uri={atlas.uri!r} is not a release of Census; write census or census:YYYY-MM-DD, such"
            f" as census:2025-11-08"
        )
    if release is not None:
        return dataclasses.replace(atlas, census_url=atlas.census_url or os.environ.get(CENSUS_URL, ""))
    if _SCHEME.match(atlas.uri):
        return atlas
    return dataclasses.replace(atlas, uri=os.path.abspath(os.path.expanduser(atlas.uri)))


def saved_atlas(tree: Mapping[str, Any]) -> AtlasConfig:
    """The atlas of a saved query, from plain values.

    Raises:
        ValueError: An earlier version saved a measurement or X layer that is no longer supported.
    """
    tree = dict(tree)
    for name, fixed in (("measurement", MEASUREMENT), ("x_layer", X_LAYER)):
        found = tree.pop(name, fixed)
        if found != fixed:
            raise ValueError(f"the saved query has atlas {name}={found!r}; only {fixed!r} is supported now")
    return located(AtlasConfig(**tree))


def census_release(atlas: AtlasConfig) -> str | None:
    """Date of a Census release, "" for the newest long-term release; None for any other atlas."""
    match = _CENSUS.fullmatch(atlas.uri)
    return (match["release"] or "") if match else None


def pinned(atlas: AtlasConfig) -> AtlasConfig:
    """The same atlas, located and at a fixed version: a dated Census release, or the atlas as of now.

    Consolidating and vacuuming an atlas can remove a pinned version; a query's hash then no longer matches.

    Raises:
        ValueError: As for `located`, or Census is unreachable or has no such release.
    """
    atlas = located(atlas)
    release = census_release(atlas)
    if release is not None:
        release = _dated_release(atlas, release)
        day = datetime.datetime.fromisoformat(release).replace(tzinfo=datetime.UTC)
        return dataclasses.replace(atlas, uri=f"census:{release}", timestamp_ms=int(day.timestamp() * 1000))
    return atlas if atlas.timestamp_ms else dataclasses.replace(atlas, timestamp_ms=time.time_ns() // 10**6)


@contextmanager
def open_atlas(
    atlas: AtlasConfig, *, threads: int = 0, buffer_bytes: int = 128 * 2**20
) -> Iterator[tiledbsoma.Experiment]:
    """Open the human experiment for reading.

    Never call this in a forked process that inherits an open handle: TileDB hangs.

    Args:
        atlas: Location and version.
        threads: Number of TileDB compute threads, and of I/O threads; 0 means one per core.
        buffer_bytes: Read buffer per column; TileDB may use about twelve times as much in addition.

    Raises:
        ValueError: There is no atlas, its layout is different, or the measurement or X layer is missing.
            The message lists what exists.
    """
    limits = {
        "soma.init_buffer_bytes": str(buffer_bytes),
        "sm.mem.total_budget": str(max(12 * buffer_bytes, 2**30)),
    }
    if threads:
        limits |= {"sm.compute_concurrency_level": str(threads), "sm.io_concurrency_level": str(threads)}
    root = open_root(atlas, limits | dict(atlas.tiledb_config))
    try:
        with reading(atlas):
            yield experiment_of(atlas, root)
    finally:
        root.close()


@contextmanager
def reading(atlas: AtlasConfig) -> Iterator[None]:
    """Report in one line that an open atlas cannot be read.

    Raises:
        ConnectionError: An object store did not answer, after TileDB has tried several times.
        OSError: Part of the atlas is missing or damaged.
    """
    try:
        yield
    except tiledbsoma.SOMAError as error:
        text = re.split(r"\s*\[(?:Remote IP|Request ID|Headers)", _brief(error, most=1000))[0]
        if "S3:" in text and "NoSuchKey" not in text:
            raise ConnectionError(f"atlas {atlas.uri} cannot be read: {text}") from error
        raise damaged(atlas, text) from error


def damaged(atlas: AtlasConfig, what: str) -> OSError:
    """The error where part of an atlas is missing or has other content than was written."""
    return OSError(
        f"atlas {atlas.uri} cannot be read, because part of it is missing or damaged: {what}; restore or copy"
        f" it again"
    )


def counts_per_cell(atlas: AtlasConfig) -> float:
    """Mean number of stored counts per cell of the atlas."""
    with open_atlas(atlas) as experiment:
        x = experiment.ms[MEASUREMENT].X[X_LAYER]
        return float(x.nnz / max(experiment.obs.count, 1))


def written_ahead(uri: str, context: tiledbsoma.SOMATileDBContext) -> str:
    """An error text if the atlas is only invisible because its writer's clock was ahead of ours; else ""."""
    try:
        tiledbsoma.open(uri, context=context, tiledb_timestamp=END_OF_TIME_MS).close()
    except tiledbsoma.SOMAError:
        return ""
    return f"{uri} {CLOCK_AHEAD}"


def open_root(atlas: AtlasConfig, tiledb_config: dict[str, str]) -> Any:
    """Open the root collection; the caller closes it. Raises as `open_atlas` does."""
    atlas = located(atlas)
    release = census_release(atlas)
    if release is not None:
        release, client = _dated_release(atlas, release), _census_client(atlas)
        context = client.get_default_soma_context(tiledb_config=tiledb_config)
        try:
            return _asked(lambda: client.open_soma(census_version=release, context=context))
        except (OSError, ValueError, tiledbsoma.SOMAError) as error:
            raise ValueError(
                f"release {release} of Census could not be opened; check the network ({_brief(error)})"
            ) from error
    is_local = not _SCHEME.match(atlas.uri)
    if is_local and not os.path.exists(atlas.uri):
        raise ValueError(
            f"atlas.uri={atlas.uri!r} does not exist; create it with `python -m jobs.ingest --h5ad FILE..."
            f" --atlas {atlas.uri}`"
        )
    if is_local and os.path.isfile(atlas.uri):
        raise ValueError(
            f"atlas.uri={atlas.uri!r} is a file; an atlas is a folder: ingest the file with `python -m"
            f" jobs.ingest --h5ad {atlas.uri}`"
        )
    context = tiledbsoma.SOMATileDBContext(tiledb_config=tiledb_config, timestamp=atlas.timestamp_ms or None)
    try:
        return tiledbsoma.open(atlas.uri, context=context)
    except (tiledbsoma.SOMAError, OSError) as error:
        if not atlas.timestamp_ms and (ahead := written_ahead(atlas.uri, context)):
            raise ValueError(f"atlas.uri: {ahead}") from error
        when = f" at timestamp_ms={atlas.timestamp_ms}" if atlas.timestamp_ms else ""
        remedy = (
            ""
            if is_local
            else "; check the address, atlas.tiledb_config and the credentials in the environment"
        )
        raise ValueError(
            f"atlas.uri={atlas.uri!r} is not a SOMA atlas{when}{remedy} ({_brief(error)})"
        ) from error


def experiment_of(atlas: AtlasConfig, root: Any) -> tiledbsoma.Experiment:
    """The human experiment of an open atlas. Raises as `open_atlas` does."""
    layout = f"an atlas has the layout of Census, URI/census_data/{ORGANISM}"
    if root.soma_type != "SOMACollection" or "census_data" not in root:
        kind = f"a {root.soma_type}" + (
            f" of {', '.join(sorted(root.keys()))}" if hasattr(root, "keys") else ""
        )
        raise ValueError(f"atlas.uri={atlas.uri!r} is {kind}, but {layout}; create one with jobs.ingest")
    if ORGANISM not in root["census_data"]:
        raise ValueError(f"atlas.uri={atlas.uri!r} contains {_listed(root['census_data'])}, but {layout}")
    experiment = root["census_data"][ORGANISM]
    if MEASUREMENT not in experiment.ms:
        raise ValueError(
            f"atlas.uri={atlas.uri!r} has no measurement {MEASUREMENT!r}; it has {_listed(experiment.ms)}"
        )
    layers = experiment.ms[MEASUREMENT].X
    if X_LAYER not in layers:
        raise ValueError(f"atlas.uri={atlas.uri!r} has no X layer {X_LAYER!r}; it has {_listed(layers)}")
    return experiment


def _census_client(atlas: AtlasConfig) -> Any:
    """The client of Census, which reads the directory that the atlas names."""
    import cellxgene_census
    from cellxgene_census import _release_directory as addresses

    folder = (atlas.census_url or PUBLIC_CENSUS).rstrip("/")
    addresses.CELL_CENSUS_RELEASE_DIRECTORY_URL = f"{folder}/release.json"
    addresses.CELL_CENSUS_MIRRORS_DIRECTORY_URL = f"{folder}/mirrors.json"
    return cellxgene_census


def _dated_release(atlas: AtlasConfig, release: str) -> str:
    client = _census_client(atlas)
    wanted = f"atlas.uri={f'census:{release}' if release else 'census'!r}"
    try:
        directory = _asked(client.get_census_version_directory)
    except (OSError, ValueError) as error:  # includes errors from requests
        where = f" at atlas.census_url={atlas.census_url}" if atlas.census_url else ""
        raise ValueError(
            f"{wanted}: the release directory of CELLxGENE Census{where} could not be reached; check the"
            f" network ({_brief(error)})"
        ) from error
    known = {entry["release_build"]: entry for entry in directory.values()}
    if not release and "stable" not in directory:
        raise ValueError(f"{wanted}: no release is named stable; use one of {_releases(known)}")
    if not release:
        return str(directory["stable"]["release_build"])
    if release not in known:
        raise ValueError(f"{wanted}: no such release; use one of {_releases(known)}")
    return release


def _asked(request: Callable[[], Any]) -> Any:
    """The answer to a request over HTTP, which is repeated if the server is busy or the connection fails."""
    for turn in range(1, _TRIES):
        try:
            return request()
        except OSError as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status is not None and status < 500:
                raise
        time.sleep(_WAIT_S * 2 ** (turn - 1))
    return request()


def _releases(known: Iterable[str]) -> str:
    return ", ".join(f"census:{release}" for release in sorted(known)) or "none"


def _listed(collection: Any) -> str:
    return ", ".join(sorted(collection.keys())) or "nothing"


def _brief(error: Exception, most: int = 200) -> str:
    return str(error).splitlines()[0][:most] if str(error) else type(error).__name__
