"""A copy of CELLxGENE Census on an S3 server: two small releases, the release directory and the mirrors."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tiledbsoma

from helpers.servers import S3

STABLE, LATER = "2025-01-30", "2025-06-02"
RELABELLED, REMOVED = slice(100, 107), slice(200, 205)
"""Rows of obs that are labelled otherwise in the later release, and rows that it lacks."""
_CENSUS, _ON_DISK = "census", "census-on-disk"


@dataclasses.dataclass(frozen=True)
class Census:
    """A copy of Census."""

    url: str
    """Folder on the web with the release directory (`atlas.census_url`)."""
    tiledb_config: dict[str, str]
    s3: S3
    disk_url: str
    """The same with the releases on the disk, which need no TileDB settings."""

    @property
    def words(self) -> list[str]:
        """TileDB's settings as words of a command line."""
        return ["--tiledb", *(f"{name}={value}" for name, value in self.tiledb_config.items())]

    def through(self, endpoint: str) -> "Census":
        """The same copy, through another server."""
        reach = {"vfs.s3.endpoint_override": endpoint.removeprefix("http://")}
        url = self.url.replace(self.s3.endpoint, endpoint)
        return dataclasses.replace(self, url=url, tiledb_config={**self.tiledb_config, **reach})


def publish(s3: S3, atlas: str, scratch: Path) -> Census:
    """Put an atlas on a server as the stable release of Census, with a later one."""
    server = client(s3)
    for release in (STABLE, LATER):
        folder = _release(atlas, scratch / release / "soma", later=release == LATER)
        upload(server, s3.bucket, folder, f"{_CENSUS}/{release}/soma")
    releases: dict[str, Any] = {"stable": STABLE, "latest": LATER}
    for release in (STABLE, LATER):
        place = {"relative_uri": f"{release}/soma/", "s3_region": "us-east-1"}
        releases[release] = {
            "release_build": release,
            "release_date": None,
            "soma": {"uri": f"{s3.uri}/{_CENSUS}/{release}/soma/", **place},
            "h5ads": {"uri": f"{s3.uri}/{_CENSUS}/{release}/h5ads/", "s3_region": "us-east-1"},
            "flags": {"lts": release == STABLE},
        }
    for folder, provider, base in (
        (_CENSUS, "S3", f"{s3.uri}/{_CENSUS}/"),
        (_ON_DISK, "file", f"{scratch}/"),
    ):
        mirror = {"provider": provider, "base_uri": base, "region": "us-east-1"}
        for name, tree in (("release", releases), ("mirrors", {"default": "here", "here": mirror})):
            body, key = json.dumps(tree).encode(), f"{folder}/{name}.json"
            server.put_object(Bucket=s3.bucket, Key=key, Body=body, ACL="public-read")
    # The real one is public; this server wants signatures.
    settings = {**s3.tiledb_config, "vfs.s3.no_sign_request": "false"}
    urls = [f"{s3.endpoint}/{s3.bucket}/{folder}" for folder in (_CENSUS, _ON_DISK)]
    return Census(urls[0], settings, s3, urls[1])


def _release(atlas: str, target: Path, *, later: bool) -> Path:
    """A copy of an atlas with obs as in Census: no roll-up, and cells named by `observation_joinid`.

    Its lung cells are said to be of the brain.

    In the later release, some cells are labelled otherwise, and some are left out.
    """
    shutil.copytree(atlas, target)
    obs = str(target / "census_data/homo_sapiens/obs")
    with tiledbsoma.DataFrame.open(obs) as table:
        rows = table.read().concat()
    rows = rows.drop_columns(["cell_type_major", "cell_type_major_ontology_term_id"])
    rows = rows.rename_columns({"obs_id": "observation_joinid"})
    tissues = ["brain" if tissue == "lung" else tissue for tissue in rows["tissue_general"].to_pylist()]
    column = rows.schema.get_field_index("tissue_general")
    rows = rows.set_column(
        column, rows.schema.field(column), pa.array(tissues, rows.schema.field(column).type)
    )
    schema, domain = rows.schema, ((0, rows.num_rows - 1),)
    if later:
        columns = {name: rows[name].to_pylist() for name in rows.column_names}
        for name, value in (("cell_type", "neuron"), ("cell_type_ontology_term_id", "CL:0000540")):
            columns[name][RELABELLED] = [value] * (RELABELLED.stop - RELABELLED.start)
        kept = np.ones(rows.num_rows, bool)
        kept[REMOVED] = False
        rows = pa.table(columns, schema=schema).filter(pa.array(kept))
    shutil.rmtree(obs)
    with tiledbsoma.DataFrame.create(obs, schema=schema, domain=domain) as table:
        table.write(rows)
    return target


def client(s3: S3) -> Any:
    """A client of the server."""
    import boto3

    return boto3.client("s3", endpoint_url=s3.endpoint, region_name="us-east-1")


def upload(server: Any, bucket: str, folder: Path, prefix: str) -> None:
    """Copy a folder to a server, file by file; an atlas refers to its parts by relative names."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            server.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder)}")
