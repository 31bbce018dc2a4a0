"""A copy of a query's raw counts in shuffled Arrow files, which trains many epochs faster than the atlas.

A cache is a folder or an S3 prefix. `shard-N.arrow` has `rows_per_shard` cells in record batches of
`rows_per_block`: joinid, then the columns of `packed.fields` over the query's genes. `order.arrow` has the
joinids of all rows. The cells are in the order of an `EpochPlan`, so each shard is a sample of the whole
query. `manifest.json` is written last; without it there is no cache. An epoch permutes the blocks of all
shards and the rows of the blocks that are read together.

The SHA-256 of each file is in the manifest, and each block has a checksum, which every read compares.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow.fs import FileSelector, FileType, LocalFileSystem

from data_ingest.datasource import CellArrays
from data_ingest.packed import CachedRows, PackedCells
from data_ingest.query import QueryResult
from data_ingest.tasks import map_tasks
from screformer.storage import absolute, filesystem
from screformer.tokenizer import GeneVocabulary

MANIFEST, ORDER = "manifest.json", "order.arrow"
FORMAT = 1
_REMOTE_READS = 16
"""Number of concurrent reads from an object store."""


@dataclass(frozen=True)
class ShardReader:
    """Reads cells of a cache; a `datasource.Reader`."""

    place: str
    rows_per_shard: int
    rows_per_block: int
    version: str
    """Hash of the order; files of another version are not taken for open ones."""

    def __call__(self, arrays: CellArrays, cells: np.ndarray) -> tuple[PackedCells, np.ndarray]:
        """As `Reader`: all cells of the blocks that the given ones are in."""
        assert arrays.cached is not None
        rows = arrays.cached.rows[cells]
        blocks, block_n = np.unique(rows // self.rows_per_block, return_inverse=True)
        row_n = block_n * self.rows_per_block + rows % self.rows_per_block
        batches = [batch for shard in self._by_shard(blocks) for batch in shard]
        parts = [PackedCells.from_table(batch) for batch in batches]
        if (index_g := arrays.cached.index_g) is not None:
            parts = [part.over(index_g, arrays.panels.measured_pg.shape[1]) for part in parts]
        found = PackedCells.joined(parts)
        joinids = np.concatenate([batch["joinid"].to_numpy() for batch in batches])
        if not (joinids[row_n] == arrays.joinids[cells]).all():
            raise ValueError(f"{self.place} has other cells than when training started; it was replaced")
        arrays.check_sums(cells, found.total_n[row_n])
        return found, row_n

    def _by_shard(self, blocks: np.ndarray) -> Iterator[list[pa.RecordBatch]]:
        """The record batches of some blocks, increasing."""
        per_shard = self.rows_per_shard // self.rows_per_block
        shards, firsts = np.unique(blocks // per_shard, return_index=True)
        parts = np.split(blocks % per_shard, firsts[1:])
        read = partial(_read_blocks, self.place, self.version)
        if isinstance(files_of(self.place)[0], LocalFileSystem):
            yield from map(read, shards.tolist(), parts)
            return
        with ThreadPoolExecutor(_REMOTE_READS) as pool:
            yield from pool.map(read, shards.tolist(), parts)


@dataclass(frozen=True, eq=False)
class ShardCache:
    """A complete cache: its manifest and the joinid of each row."""

    reader: ShardReader
    manifest: dict[str, Any]
    joinids: np.ndarray
    """Shape (n,), int64."""

    @classmethod
    def open(cls, place: str) -> ShardCache:
        """Read the manifest and the order of a cache.

        Args:
            place: A path, or a URI such as s3://bucket/prefix.

        Raises:
            ValueError: There is no complete cache, or its files differ from the manifest.
        """
        place = absolute(place)
        manifest = read_manifest(place)
        if manifest is None:
            raise ValueError(
                f"stream.cache={place} has no {MANIFEST}: it is not a shard cache, or writing it was"
                " interrupted; run `screformer shard` (again)"
            )
        if manifest["format"] != FORMAT:
            raise ValueError(
                f"stream.cache={place} has format {manifest['format']}, this version reads {FORMAT}; write it"
                " again with `screformer shard`"
            )
        files, path = files_of(place)
        sizes = {info.base_name: info.size for info in files.get_file_info(FileSelector(path))}
        for name, file in manifest["files"].items():
            if sizes.get(name) != file["bytes"]:
                what = f"has {sizes[name]} bytes, not {file['bytes']}" if name in sizes else "is missing"
                raise ValueError(_damaged(place, f"{name} {what}"))
        with files.open_input_stream(f"{path}/{ORDER}") as stream:
            content = stream.read()
        if hashlib.sha256(content).hexdigest() != manifest["files"][ORDER]["sha256"]:
            raise ValueError(_damaged(place, f"{ORDER} has another SHA-256"))
        version = manifest["files"][ORDER]["sha256"]
        reader = ShardReader(place, manifest["rows_per_shard"], manifest["rows_per_block"], version)
        return cls(reader, manifest, pa.ipc.open_file(content).read_all()["joinid"].to_numpy())

    @property
    def order_hash(self) -> str:
        """SHA-256 of the cells in their order; training can resume only with the same one."""
        return self.reader.version

    def require(self, query: QueryResult) -> None:
        """Refuse a cache that was not written from these cells and genes.

        Raises:
            ValueError: Genes, cells or their counts differ.
        """
        ours, place = identity_of(query), self.reader.place
        for what, name in (("other genes", "feature_ids"), ("other cells or genes", "hash")):
            if self.manifest[name] != ours[name]:
                theirs, here = (str(value)[:12] for value in (self.manifest["hash"], ours["hash"]))
                raise ValueError(
                    f"stream.cache={place} has {what} than this query (hash {theirs}, here {here}); write a"
                    " cache of this query with `screformer shard`, or remove stream.cache"
                )
        same_version = self.manifest["atlas"]["timestamp_ms"] == query.atlas.timestamp_ms
        sums = ours["raw_sums"]
        if not same_version and (not sums or sums != self.manifest["raw_sums"]):
            raise ValueError(
                f"stream.cache={place} was written from version {self.manifest['atlas']['timestamp_ms']} of"
                f" the atlas, this query is of version {query.atlas.timestamp_ms}, and the counts are not"
                " known to be the same; write it again with `screformer shard`"
            )

    def rows_of(self, joinids: np.ndarray) -> np.ndarray:
        """Row of each cell, int64.

        Raises:
            ValueError: A cell is not in the cache.
        """
        by_joinid = np.argsort(self.joinids)
        rows = by_joinid[np.searchsorted(self.joinids, joinids, sorter=by_joinid) % len(by_joinid)]
        absent = joinids[self.joinids[rows] != joinids]
        if len(absent):
            raise ValueError(
                f"stream.cache={self.reader.place} lacks {len(absent)} of {len(joinids)} cells, for example"
                f" {absent[0]}"
            )
        return rows

    def cached(self, rows: np.ndarray, vocabulary: GeneVocabulary, gene_of_var: np.ndarray) -> CachedRows:
        """What read tasks need to know about some cells.

        Args:
            rows: Rows of the cells, increasing.
            vocabulary: Genes to read.
            gene_of_var: Vocabulary index of each var joinid of the atlas, -1 for none.

        Raises:
            ValueError: The cache lacks a gene of the vocabulary that the atlas has.
        """
        index_g = vocabulary.index(self.manifest["feature_ids"])
        absent = np.setdiff1d(gene_of_var[gene_of_var >= 0], index_g)
        if len(absent):
            raise ValueError(
                f"stream.cache={self.reader.place} lacks {len(absent)} of the model's genes, for example"
                f" {vocabulary.feature_ids[absent[0]]}; write a cache without query.var_filter"
            )
        same = len(index_g) == len(vocabulary) and (index_g == np.arange(len(vocabulary))).all()
        return CachedRows(rows, None if same else index_g)

    def verify(self) -> None:
        """Compare the SHA-256 of all files with the manifest, in Ray tasks if Ray is running.

        Raises:
            ValueError: A file is damaged.
        """
        names, place = list(self.manifest["files"]), self.reader.place
        hashes = map_tasks(partial(_file_hash, place), [(name,) for name in names], "verifying", unit="file")
        for name, found in zip(names, hashes, strict=True):
            if found != self.manifest["files"][name]["sha256"]:
                raise ValueError(_damaged(place, f"{name} has another SHA-256"))


def read_manifest(place: str) -> dict[str, Any] | None:
    """The manifest of a cache; None if there is none."""
    files, path = files_of(place)
    try:
        if files.get_file_info(f"{path}/{MANIFEST}").type == FileType.NotFound:
            return None
        with files.open_input_stream(f"{path}/{MANIFEST}") as stream:
            found: dict[str, Any] = json.loads(stream.read())
    except (OSError, ValueError) as error:
        raise ValueError(f"{place}/{MANIFEST} cannot be read ({error}); write the cache again") from error
    return found


def identity_of(query: QueryResult) -> dict[str, Any]:
    """What a cache must have in common with a query."""
    sums = query.raw_sums(np.arange(len(query.obs_joinids)))
    return {
        "hash": query.hash,
        "feature_ids": list(query.feature_ids),
        "raw_sums": "" if sums is None else hashlib.sha256(sums.astype("<f4").tobytes()).hexdigest(),
    }


def _read_blocks(place: str, version: str, shard: int, blocks: np.ndarray) -> list[pa.RecordBatch]:
    name = shard_name(shard)
    batches = []
    try:
        file = _open_shard(place, version, name)
        for block in blocks.tolist():
            found = file.get_batch_with_custom_metadata(block)
            if int(found.custom_metadata[b"crc32"]) != checksum(found.batch):
                raise pa.ArrowInvalid("another checksum")
            batches.append(found.batch)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(_damaged(place, f"{name} cannot be read ({error})")) from error
    return batches


@lru_cache(maxsize=256)
def _open_shard(place: str, version: str, name: str) -> pa.ipc.RecordBatchFileReader:
    """A shard, mapped into memory if it is on a disk, and kept open."""
    files, path = files_of(place)
    local = isinstance(files, LocalFileSystem)
    return pa.ipc.open_file(
        pa.memory_map(f"{path}/{name}") if local else files.open_input_file(f"{path}/{name}")
    )


files_of = lru_cache(maxsize=8)(filesystem)
"""File system and path of a cache."""


def _file_hash(place: str, name: str) -> str:
    files, path = files_of(place)
    digest = hashlib.sha256()
    with files.open_input_stream(f"{path}/{name}") as stream:
        while part := stream.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


def checksum(batch: pa.RecordBatch) -> int:
    """CRC-32 of everything in a block."""
    packed = PackedCells.from_table(batch)
    crc = 0
    for values in (batch["joinid"].to_numpy(), *vars(packed).values()):
        crc = zlib.crc32(np.ascontiguousarray(values).data, crc)
    return crc


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:06d}.arrow"


def _damaged(place: str, what: str) -> str:
    return f"the shard cache {place} is damaged: {what}; delete it and run `screformer shard` again"
