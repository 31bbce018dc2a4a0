import pickle

import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from data_ingest.file_genes import find_file_genes
from data_ingest.h5ad import H5adFile
from data_ingest.tables import read_symbol_table
from helpers.cells import cells, ensembl, write


def read_all(path, **options) -> np.ndarray:
    cells_per_chunk = options.pop("cells_per_chunk", 7)
    with H5adFile.open(path, **options) as file:
        blocks = []
        for start, block in file.chunks(cells_per_chunk):
            assert start == sum(b.shape[0] for b in blocks)
            assert block.dtype == np.float32 and block.has_sorted_indices
            blocks.append(block)
        return sparse.vstack(blocks).toarray()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (sparse.csr_matrix, np.float32),
        (sparse.csr_matrix, np.uint8),
        (sparse.csc_matrix, np.float64),
        (sparse.csc_matrix, np.int64),
        (lambda x: x.toarray(), np.float32),
        (lambda x: x.toarray(), np.int64),
    ],
)
def test_every_storage_gives_the_same_counts(tmp_path, kind, dtype) -> None:
    sample = cells()
    expected = sample.X.toarray()
    sample.X = kind(sample.X.astype(dtype))
    path = write(tmp_path / "a.h5ad", sample, compression="gzip")
    assert np.array_equal(read_all(path), expected)


def test_storage_order_within_a_row_does_not_matter(tmp_path) -> None:
    sample = cells()
    path = write(tmp_path / "a.h5ad", sample)
    with h5py.File(path, "r+") as file:
        pointers, order = file["X/indptr"][:], np.arange(len(file["X/data"]))
        for low, high in zip(pointers[:-1], pointers[1:], strict=True):
            order[low:high] = order[low:high][::-1]
        for name in ("indices", "data"):
            file[f"X/{name}"][...] = file[f"X/{name}"][:][order]
    assert np.array_equal(read_all(path), sample.X.toarray())


def test_layer_and_raw_are_read_with_their_own_genes(tmp_path) -> None:
    sample = cells()
    counts = sample.X.toarray()
    sample.raw = sample.copy()
    sample = sample[:, :10].copy()
    sample.layers["counts"] = sample.X.copy()
    sample.X = sparse.csr_matrix(np.log1p(sample.X.toarray()))
    path = write(tmp_path / "a.h5ad", sample)
    assert np.array_equal(read_all(path, layer="counts"), counts[:, :10])
    assert np.array_equal(read_all(path, raw=True), counts)
    with H5adFile.open(path, raw=True) as file:
        assert file.n_genes == 30 and list(find_file_genes(file).feature_ids) == ensembl(range(100, 130))


def test_chunks_from_the_middle(tmp_path) -> None:
    sample = cells()
    path = write(tmp_path / "a.h5ad", sample)
    with H5adFile.open(path) as file:
        found = [(start, block.shape[0]) for start, block in file.chunks(10, start=15, stop=40)]
        assert found == [(15, 10), (25, 10), (35, 5)]
        assert np.array_equal(next(file.chunks(10, start=15))[1].toarray(), sample.X[15:25].toarray())


def test_reading_takes_memory_for_a_chunk_only(tmp_path) -> None:
    import tracemalloc

    n, g = 20_000, 300
    rng = np.random.default_rng(0)
    with h5py.File(write(tmp_path / "a.h5ad", cells(4, range(100, 100 + g))), "r+") as file:
        for name in ("X", "obs"):
            del file[name]
        file.create_dataset("X", data=rng.poisson(0.5, (n, g)).astype(np.float32), chunks=(256, g))
        obs = file.create_group("obs")
        obs.attrs.update(
            {
                "encoding-type": "dataframe",
                "encoding-version": "0.2.0",
                "_index": "_index",
                "column-order": [],
            }
        )
        names = obs.create_dataset(
            "_index", data=np.array([f"c{i}" for i in range(n)], dtype=object), dtype=h5py.string_dtype()
        )
        names.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
    tracemalloc.start()
    with H5adFile.open(tmp_path / "a.h5ad") as file:
        total = sum(float(block.sum()) for _, block in file.chunks(256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 0
    assert peak < n * g * 4 / 5


def test_gene_ids_lose_their_version_and_come_from_the_index(tmp_path) -> None:
    sample = cells()
    sample.var = sample.var[[]]
    sample.var_names = [f"{name}.{k}" for k, name in enumerate(ensembl(range(100, 130)))]
    with H5adFile.open(write(tmp_path / "a.h5ad", sample)) as file:
        genes = find_file_genes(file)
    assert list(genes.feature_ids) == ensembl(range(100, 130)) and genes.source == "var index"


def test_symbols_fill_in_missing_ids(tmp_path) -> None:
    sample = cells()
    sample.var.loc[["GENE101", "GENE102"], "feature_id"] = ""
    table = tmp_path / "symbols.tsv"
    table.write_text(
        "symbol\tfeature_id\nGENE101\tENSG00000000101.4\nGENE102\tENSG00000000102\nGENE102\tENSG00000000999\n"
    )
    with H5adFile.open(write(tmp_path / "a.h5ad", sample)) as file:
        assert (find_file_genes(file).feature_ids != "").sum() == 28
        genes = find_file_genes(file, symbols=read_symbol_table(table))
    # GENE102 has two ids in the table, so it is ambiguous.
    assert (
        (genes.feature_ids != "").sum() == 29
        and genes.feature_ids[1] == "ENSG00000000101"
        and genes.feature_ids[2] == ""
    )


def test_real_symbol_table_is_understood(real_data) -> None:
    symbols = read_symbol_table(real_data / "gene_map_human.tsv.gz")
    assert symbols["CD3E"] == "ENSG00000198851" and symbols["MS4A1"] == "ENSG00000156738"


def test_duplicate_genes_are_refused_summed_or_dropped(tmp_path) -> None:
    sample = cells()
    sample.var.loc["GENE101", "feature_id"] = "ENSG00000000100"
    with H5adFile.open(write(tmp_path / "a.h5ad", sample)) as file:
        with pytest.raises(
            ValueError, match="'GENE100' and 'GENE101' are both ENSG00000000100.*--duplicate-genes sum"
        ):
            find_file_genes(file)
        assert (find_file_genes(file, duplicates="sum").feature_ids != "").sum() == 30
        assert (find_file_genes(file, duplicates="drop").feature_ids != "").sum() == 28


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1.0, "-1 at cell 'cell_5', gene 'GENE110': it is negative"),
        (0.5, "0.5 at cell 'cell_5', gene 'GENE110': it is not a whole number"),
        (np.nan, "nan at cell 'cell_5', gene 'GENE110': it is missing or infinite"),
        (np.inf, "inf at cell 'cell_5'"),
        (2.0**24 + 2, "larger than 2\\^24"),
    ],
)
def test_values_that_are_not_counts_are_named(tmp_path, value: float, message: str) -> None:
    sample = cells()
    dense = sample.X.toarray()
    dense[5, 10] = value
    sample.X = sparse.csr_matrix(dense)
    with (
        H5adFile.open(write(tmp_path / "a.h5ad", sample)) as file,
        pytest.raises(ValueError, match=message) as caught,
    ):
        list(file.chunks(4))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_double_precision_fractions_do_not_round_to_counts(tmp_path) -> None:
    sample = cells()
    dense = sample.X.toarray().astype(np.float64)
    dense[5, 10] = 3.000000001
    sample.X = sparse.csr_matrix(dense)
    with (
        H5adFile.open(write(tmp_path / "a.h5ad", sample)) as file,
        pytest.raises(ValueError, match="not a whole number"),
    ):
        list(file.chunks())


def test_a_file_with_hardly_any_matching_genes_is_rejected(tmp_path) -> None:
    sample = cells()
    sample.var = pd.DataFrame(index=[f"{k}" for k in range(30)])
    table = tmp_path / "symbols.tsv"
    table.write_text("symbol\tfeature_id\n7\tENSG00000000107\n")
    with (
        H5adFile.open(write(tmp_path / "a.h5ad", sample)) as file,
        pytest.raises(
            ValueError, match=r"only 1 of 30 columns can be matched.*9\d\.\d% of the counts.*'0', '1'"
        ),
    ):
        find_file_genes(file, symbols=read_symbol_table(table))


def test_a_few_foreign_genes_are_left_out_and_reported(tmp_path) -> None:
    sample = cells()
    sample.var.iloc[3, 0] = "ENSSASG00005000002"
    sample.var.iloc[4, 0] = ""
    with H5adFile.open(write(tmp_path / "a.h5ad", sample)) as file:
        genes = find_file_genes(file)
    assert (genes.feature_ids != "").sum() == 28 and genes.feature_ids[3] == ""
