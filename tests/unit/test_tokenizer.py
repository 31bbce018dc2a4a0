"""Tokens of known cells, and inputs that the tokenizer rejects."""

import pickle

import numpy as np
import pytest
from scipy import sparse

from screformer.config import TokensConfig
from screformer.counts import CellCounts
from screformer.tokenizer import CLS, NUM_SPECIAL, PAD, CellTokenizer, GeneVocabulary


def vocabulary(mean_expression: list[float]) -> GeneVocabulary:
    names = tuple(f"G{index}" for index in range(len(mean_expression)))
    return GeneVocabulary(
        tuple(f"ENSG{index}" for index in range(len(names))),
        names,
        np.array(mean_expression, dtype=np.float32),
    )


VOCABULARY = vocabulary([0.0] * 6)
GENE_IDS = np.array([0, 2, 5, 1], dtype=np.int32)  # two cells, of three genes and of one
COUNTS = np.array([1, 2, 7, 4], dtype=np.float32)
OFFSETS = np.array([0, 3, 4])


def cells_of(gene_ids, counts, offsets, total=None) -> CellCounts:
    """Cells from their concatenated genes and counts."""
    matrix = sparse.csr_array((counts, gene_ids, offsets), shape=(len(offsets) - 1, len(VOCABULARY)))
    return CellCounts.of(matrix, total_n=total)


def tokenize(*arrays, genes=VOCABULARY, total=None, **settings):
    return CellTokenizer(TokensConfig(**settings), genes)(cells_of(*arrays, total))


def test_detected_genes() -> None:
    tokens = tokenize(GENE_IDS, COUNTS, OFFSETS)
    assert tokens["token_ids"].tolist() == [[CLS, 2, 4, 7], [CLS, 3, PAD, PAD]]
    np.testing.assert_allclose(
        tokens["values"], np.log1p([[0, 1000, 2000, 7000], [0, 10_000, 0, 0]]), rtol=1e-6
    )
    assert tokens["bin_ids"].tolist() == [[0, 1, 1, 1], [0, 1, 0, 0]]
    assert [tokens[name].dtype for name in ("token_ids", "values", "bin_ids")] == [
        np.int32,
        np.float32,
        np.int32,
    ]
    assert tokens["num_cut"] == 0


def test_every_gene() -> None:
    tokens = tokenize(GENE_IDS, COUNTS, OFFSETS, input_mode="all", max_genes=2)
    assert tokens["token_ids"].tolist() == [[CLS, *range(NUM_SPECIAL, NUM_SPECIAL + 6)]] * 2
    np.testing.assert_allclose(tokens["values"][0], np.log1p([0, 1000, 0, 2000, 0, 0, 7000]), rtol=1e-6)
    assert tokens["bin_ids"].tolist() == [[0, 1, 0, 1, 0, 0, 1], [0, 0, 1, 0, 0, 0, 0]]
    assert tokens["num_cut"] == 0


def test_library_size_counts_genes_outside_the_vocabulary() -> None:
    tokens = tokenize(GENE_IDS, COUNTS, OFFSETS, total=np.array([100, 8]))
    np.testing.assert_allclose(tokens["values"], np.log1p([[0, 100, 200, 700], [0, 5000, 0, 0]]), rtol=1e-6)


def test_log2_bins() -> None:
    counts = np.array([1, 3, 7, 100, 9889], dtype=np.float32)  # of 10,000
    tokens = tokenize(np.arange(5), counts, [0, 5], expression="log2_bins", num_bins=16)
    assert tokens["bin_ids"][0].tolist() == [0, 2, 3, 4, 7, 14]
    low = tokenize(np.array([0]), np.array([1]), [0, 1], total=np.array([1e6]), expression="log2_bins")
    assert low["bin_ids"][0, 1] == 1  # far below 1 per 10,000, but detected
    capped = tokenize(np.arange(5), counts, [0, 5], expression="log2_bins", num_bins=4)
    assert capped["bin_ids"][0].tolist() == [0, 2, 3, 3, 3, 3]


def test_quantile_bins_are_within_the_cell_and_ties_share_one() -> None:
    gene_ids = np.array([0, 1, 2, 3, 4, 5, 0, 1])
    counts = np.array([5, 1, 1, 3, 9, 7, 2, 200])
    tokens = tokenize(gene_ids, counts, [0, 6, 8], expression="quantile_bins", num_bins=4)
    assert tokens["bin_ids"].tolist() == [[0, 2, 1, 1, 2, 3, 3], [0, 1, 2, 0, 0, 0, 0]]


def test_binary_shows_only_detected_genes_and_truncates_like_the_others() -> None:
    tokens = tokenize(GENE_IDS, COUNTS, OFFSETS, expression="binary")
    assert tokens["values"].tolist() == [[0, 1, 1, 1], [0, 1, 0, 0]]
    assert tokens["bin_ids"].tolist() == [[0, 1, 1, 1], [0, 1, 0, 0]]
    every = tokenize(GENE_IDS, COUNTS, OFFSETS, expression="binary", input_mode="all")
    assert every["values"].tolist() == [[0, 1, 0, 1, 0, 0, 1], [0, 0, 1, 0, 0, 0, 0]]
    cut, expected = (
        tokenize(GENE_IDS, COUNTS, OFFSETS, expression=name, max_genes=2) for name in ("binary", "continuous")
    )
    assert cut["token_ids"].tolist() == expected["token_ids"].tolist()


def test_long_cell_keeps_the_genes_that_stand_out_and_their_order() -> None:
    genes = vocabulary([9.0, 0.0, 1.0, 0.0, 9.0, 0.0])
    counts = np.array([500, 3, 2, 1, 400, 1])
    tokens = tokenize(np.arange(6), counts, [0, 6], genes=genes, max_genes=3)
    assert tokens["token_ids"].tolist() == [[CLS, 1 + NUM_SPECIAL, 3 + NUM_SPECIAL, 5 + NUM_SPECIAL]]
    np.testing.assert_allclose(tokens["values"][0, 1:], np.log1p(np.array([3, 1, 1]) * 1e4 / 907), rtol=1e-6)
    assert tokens["num_cut"] == 1
    ties = tokenize(np.arange(6), np.ones(6), [0, 6], max_genes=4)
    assert ties["token_ids"].tolist() == [[CLS, 2, 3, 4, 5]]


def test_zeros_are_not_genes_and_entry_order_does_not_matter() -> None:
    shuffled = tokenize(np.array([5, 3, 0, 2, 1]), np.array([7, 0, 1, 2, 4]), [0, 4, 5])
    expected = tokenize(GENE_IDS, COUNTS, OFFSETS)
    for name in ("token_ids", "values", "bin_ids"):
        np.testing.assert_array_equal(shuffled[name], expected[name])


def test_cells_without_genes() -> None:
    tokens = tokenize(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32), [0, 0, 0])
    assert tokens["token_ids"].tolist() == [[CLS], [CLS]]
    tokens = tokenize(GENE_IDS, COUNTS, [0, 0, 3, 3, 4, 4])
    assert (tokens["token_ids"] >= NUM_SPECIAL).sum(axis=1).tolist() == [0, 3, 0, 1, 0]
    assert np.isfinite(tokens["values"]).all()
    assert tokenize(np.zeros(0, dtype=int), np.zeros(0), [0])["token_ids"].shape == (0, 1)


def test_refusals() -> None:
    tokenizer = CellTokenizer(TokensConfig(), VOCABULARY)
    with pytest.raises(ValueError, match="counts have 5 genes, but the vocabulary has 6"):
        tokenizer(CellCounts.of(np.ones((2, 5))))
    cells = cells_of(GENE_IDS, COUNTS, OFFSETS)
    cells.counts_ng.indices = cells.counts_ng.indices[::-1].copy()
    with pytest.raises(ValueError, match="genes are not in increasing order in each cell; build counts with"):
        tokenizer(cells)


def test_pickled_tokenizer_gives_the_same(tmp_path) -> None:
    tokenizer = CellTokenizer(TokensConfig(max_genes=2), VOCABULARY)
    first, second = (
        each(cells_of(GENE_IDS, COUNTS, OFFSETS))
        for each in (tokenizer, pickle.loads(pickle.dumps(tokenizer)))
    )
    np.testing.assert_array_equal(first["token_ids"], second["token_ids"])


def test_vocabulary_finds_genes_and_survives_a_file(tmp_path) -> None:
    genes = vocabulary([0.1, 1 / 3, 2.5])
    assert genes.index(["ENSG2", "ENSG9", "ENSG0"]).tolist() == [2, -1, 0]
    assert genes.index([]).dtype == np.int32
    genes.save(tmp_path / "vocabulary.json")
    loaded = GeneVocabulary.load(tmp_path / "vocabulary.json")
    assert (loaded.feature_ids, loaded.feature_names) == (genes.feature_ids, genes.feature_names)
    np.testing.assert_array_equal(loaded.mean_expression_g, genes.mean_expression_g)
    assert loaded.mean_expression_g.dtype == np.float32
    assert len(loaded) == 3


@pytest.mark.parametrize(
    ("ids", "names", "message"),
    [
        (("A", "B", "A"), ("a", "b", "c"), "feature id 'A' appears twice"),
        (("A", "B"), ("a",), "2 feature ids, 1 names and 2 mean expressions"),
        ((), (), "the vocabulary has no genes; check query.var_filter"),
    ],
)
def test_bad_vocabulary(ids, names, message) -> None:
    with pytest.raises(ValueError, match=message):
        GeneVocabulary(ids, names, np.zeros(len(ids), dtype=np.float32))
    with pytest.raises(ValueError, match="a vocabulary lacks mean_expression"):
        GeneVocabulary.from_json({"feature_ids": ["A"], "feature_names": ["a"]})
