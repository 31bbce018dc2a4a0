"""Lock an atlas for writing, on a local disk, a shared disk, or an object store."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from pyarrow import fs

from data_ingest import schema
from data_ingest.claims import only_writer


def locked(atlas_uri: str, tiledb_config: Mapping[str, str]) -> AbstractContextManager[None]:
    """Hold the write lock of an atlas.

    Args:
        atlas_uri: An absolute path, or `s3://...`; the atlas need not exist yet.
        tiledb_config: TileDB settings; the lock uses their `vfs.s3` part too.

    Raises:
        ValueError: Another process is writing the atlas, or the location is not writable.
    """
    files, path = _folder(atlas_uri, tiledb_config)
    return only_writer(files, path, f"--atlas {atlas_uri}")


def _folder(atlas_uri: str, tiledb_config: Mapping[str, str]) -> tuple[fs.FileSystem, str]:
    if not schema.is_remote(atlas_uri):
        return fs.LocalFileSystem(), f"{atlas_uri}.writing"
    if not atlas_uri.startswith("s3://"):
        files, path = fs.FileSystem.from_uri(atlas_uri)
        return files, f"{path}/__writing"
    s3 = {name.removeprefix("vfs.s3."): value for name, value in tiledb_config.items()}
    names = {
        "region": "region",
        "scheme": "scheme",
        "endpoint_override": "endpoint_override",
        "aws_access_key_id": "access_key",
        "aws_secret_access_key": "secret_key",
        "aws_session_token": "session_token",
    }
    options: dict[str, Any] = {ours: s3[theirs] for theirs, ours in names.items() if s3.get(theirs)}
    if s3.get("use_virtual_addressing") == "true" and "endpoint_override" in options:
        options["force_virtual_addressing"] = True
    return fs.S3FileSystem(**options), f"{atlas_uri.removeprefix('s3://')}/__writing"
