"""Genes are found in every form of their names, and nothing else counts towards the library size."""

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from helpers.tiny_model import tiny_vocabulary
from screformer.gene_names import ensembl_id
from screformer.genes import GeneMatcher

SYMBOLS = ["CD3D", "HLA-DRA", "MT-CO1", "RP11-34P13.7", "7SK", "NKX2-1", "LYZ", "MS4A1"]
IDS = [f"ENSG{i:011d}" for i in range(len(SYMBOLS))]
MATCHER = GeneMatcher(tiny_vocabulary(IDS, SYMBOLS))
ALL = list(range(len(SYMBOLS)))


def found(names: list[str]) -> list[int]:
    return MATCHER.match(names).vocabulary_index.tolist()


@pytest.mark.parametrize(
    "dress",
    [
        lambda i, n: n,
        lambda i, n: i,
        lambda i, n: f"{i}.18",
        lambda i, n: f"{i}.18_PAR_Y",
        lambda i, n: f" {n} ",
        lambda i, n: f"GRCh38_{n}",
        lambda i, n: f"hg19_{i}",
        lambda i, n: f"GRCh38______{n}",
        lambda i, n: f"sample7|{n}",
        lambda i, n: f"{i}_{n}",
        lambda i, n: f"{n}|{i}.3",
        lambda i, n: n.replace("-", ".") if not n[0].isdigit() else f"X{n}",
        lambda i, n: n.replace("-", "_"),
    ],
)
def test_names_in_all_forms_are_found(dress) -> None:
    assert found([dress(i, n) for i, n in zip(IDS, SYMBOLS, strict=True)]) == ALL


def test_columns_with_repeated_names_are_summed() -> None:
    assert found(["CD3D", "LYZ", "CD3D", "CD3D-1", "LYZ.2"]) == [0, 6, 0, 0, 6]
    assert found(["NKX2-1", "LYZ-1"]) == [5, -1], "a suffix is removed only if the name without it exists"
    match = MATCHER.match(["CD3D", "CD3D", "LYZ"])
    cells = match.select(np.array([[1, 2, 3]], dtype=np.uint8))
    assert cells.counts_ng.toarray()[0, [0, 6]].tolist() == [3, 3] and cells.total_n.tolist() == [6]


def test_ids_of_the_pseudoautosomal_regions() -> None:
    assert ensembl_id("ENSG00000182378.15_PAR_Y") == "ENSG00000182378"
    assert ensembl_id("ENSGR0000182378.10") == "ENSG00000182378"
    assert ensembl_id("ENSMUSG00000000001") == ensembl_id("XENSG00000182378") == ""


def test_what_is_not_a_human_gene_does_not_count() -> None:
    others = ["AB_01_TotalSeqC", "ERCC-00002", "ENSSASG00005000002", "ENSMUSG00000000001"]
    with_ids = MATCHER.match([*IDS, *others])
    assert with_ids.counted_v.tolist() == [True] * 8 + [False] * 4
    assert "4 columns are not human genes and are ignored" in str(with_ids)
    symbols = MATCHER.match([*SYMBOLS, "SOMEGENE", *others])
    assert symbols.counted_v.tolist() == [True] * 9 + [False] * 4
    kinds = pd.Categorical(["Gene Expression"] * 8 + ["Antibody Capture"] * 2)
    typed = MATCHER.match_var(pd.DataFrame({"feature_types": kinds}, index=[*SYMBOLS, "CD4", "CD3D"]))
    assert typed.counted_v.tolist() == [True] * 8 + [False] * 2
    assert typed.vocabulary_index.tolist() == [*ALL, -1, -1], "an antibody called CD3D is not the gene"


def test_the_library_size_is_the_same_with_and_without_antibodies() -> None:
    counts = np.arange(1, 9)[None]
    more = np.hstack([counts, [[900, 900]]])
    kinds = ["Gene Expression"] * 8 + ["Antibody Capture"] * 2
    var = pd.DataFrame(
        {"gene_ids": [*IDS, "CD3", "CD19"], "feature_types": kinds}, index=[*SYMBOLS, "a", "b"]
    )
    alone, beside = MATCHER.match(IDS).select(counts), MATCHER.match_var(var).select(sparse.csc_matrix(more))
    assert alone.total_n.tolist() == beside.total_n.tolist() == [36]
    np.testing.assert_array_equal(alone.counts_ng.toarray(), beside.counts_ng.toarray())


def test_lost_expression_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    MATCHER.match([*IDS[:7], "x"]).require(0.1, source="most.h5ad")
    assert not caplog.records
    MATCHER.match([*IDS[:2], "x", "y"]).require(0.1, source="few.h5ad")
    assert "few.h5ad: 2 of the model's 8 genes found" in caplog.text and "'x', 'y', ..." in caplog.text


def test_the_error_shows_names_that_were_not_found() -> None:
    with pytest.raises(ValueError, match=r"too few genes: 0 of .* Not found: 'p0', 'p1', 'p2', 'p3', \.\.\."):
        MATCHER.match([f"p{i}" for i in range(9)]).require(0.1, source="x.h5ad")


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.float16, ">f4", ">i2", np.uint64, "int64"])
def test_sums_do_not_wrap_in_narrow_types(dtype) -> None:
    counts = np.full((1, 8), 100).astype(dtype)
    cells = MATCHER.match([IDS[0]] * 8).select(counts)
    assert cells.counts_ng.toarray()[0, 0] == 800 and cells.total_n[0] == 800
