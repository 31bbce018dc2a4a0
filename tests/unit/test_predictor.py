from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

from helpers.tiny_model import LABELS, tiny_vocabulary, write_tiny_model
from screformer.counts import CellCounts, raw_counts
from screformer.predictor import TOKENS_PER_BATCH, Predictor


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def predictor(model_dir: Path) -> Predictor:
    return Predictor.load(model_dir, device="cpu")


@pytest.fixture(scope="module")
def counts() -> sparse.csr_matrix:
    """70 cells with very different numbers of the model's 40 genes; one has none."""
    rng = np.random.default_rng(3)
    dense = rng.poisson(3.0, size=(70, 40)) * (rng.random((70, 40)) < rng.random((70, 1)))
    dense[11] = 0
    return sparse.csr_matrix(dense.astype(np.float32))


def test_a_cells_result_does_not_depend_on_other_cells(
    predictor: Predictor, counts: sparse.csr_matrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    match = predictor.genes.match(predictor.vocabulary.feature_ids)
    whole = predictor.predict(match.select(counts))
    assert len(set(whole.labels)) > 1, "constant labels would test nothing"
    again = predictor.predict(match.select(counts))
    np.testing.assert_array_equal(whole.probabilities_nk, again.probabilities_nk)

    order = np.random.default_rng(0).permutation(70)
    shuffled = predictor.predict(match.select(counts[order]))
    np.testing.assert_allclose(shuffled.probabilities_nk, whole.probabilities_nk[order], atol=1e-5)
    monkeypatch.setitem(TOKENS_PER_BATCH, "cpu", 50)
    narrow = predictor.predict(match.select(counts))
    np.testing.assert_allclose(narrow.probabilities_nk, whole.probabilities_nk, atol=1e-5)
    np.testing.assert_allclose(narrow.embedding_nd, whole.embedding_nd, atol=1e-4)
    for cell in (0, 11, 69):
        alone = predictor.predict(match.select(counts[[cell]]))
        np.testing.assert_allclose(alone.probabilities_nk[0], whole.probabilities_nk[cell], atol=1e-5)


@pytest.mark.parametrize("budget", [1, 37, 100_000])
def test_batches_hold_each_cell_once_within_the_budget(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    monkeypatch.setitem(TOKENS_PER_BATCH, "cpu", budget)
    lengths = np.random.default_rng(1).integers(0, 65, size=600)
    batches = list(predictor.batches(lengths))
    assert sorted(np.concatenate(batches)) == list(range(600))
    slots = 1 + lengths
    assert all(len(batch) == 1 or len(batch) * slots[batch].max() <= budget for batch in batches)
    assert max(map(len, batches)) <= 256


def test_results_fit_together(predictor: Predictor, counts: sparse.csr_matrix) -> None:
    found = predictor.predict(predictor.genes.match(predictor.vocabulary.feature_ids).select(counts))
    assert (
        len(found) == 70 and found.probabilities_nk.shape == (70, 4) and found.embedding_nd.shape == (70, 16)
    )
    np.testing.assert_allclose(found.probabilities_nk.sum(axis=1), 1, rtol=1e-5)
    enough = np.asarray(counts.sum(axis=1)).ravel() >= 2  # one count in twenty of the 40 genes
    np.testing.assert_array_equal(found.unknown, ~enough)
    np.testing.assert_array_equal(found.confidence[enough], found.probabilities_nk.max(axis=1)[enough])
    assert (found.confidence[~enough] == 0).all() and (~enough).any()
    table = found.table()
    assert set(table["unknown_reason"][~enough]) == {"too few counts"} and set(table["unknown_reason"]) == {
        "",
        "too few counts",
    }
    names, cl_ids = LABELS["names"], [*LABELS["cl_ids"][:3], "unknown"]
    best = found.probabilities_nk.argmax(axis=1)
    assert [names[code] for code in best[enough]] == found.labels[enough].tolist()
    assert [cl_ids[code] for code in best[enough]] == found.cl_ids[enough].tolist()
    none = predictor.predict(predictor.genes.match(predictor.vocabulary.feature_ids).select(counts[:0]))
    assert len(none) == 0 and none.probabilities_nk.shape == (0, 4)


def test_the_library_size_counts_genes_that_the_model_does_not_know(
    predictor: Predictor, counts: sparse.csr_matrix
) -> None:
    ids = list(predictor.vocabulary.feature_ids)
    alone = predictor.predict(predictor.genes.match(ids).select(counts))
    more = sparse.hstack([np.full((70, 1), 500.0), counts]).tocsr()
    match = predictor.genes.match(["ENSG99999999999", *ids])
    diluted = predictor.predict(match.select(more))
    assert np.abs(diluted.probabilities_nk - alone.probabilities_nk).max() > 1e-3
    total = np.asarray(counts.sum(axis=1)).ravel() + 500
    flat = predictor.predict(CellCounts.of(counts, total_n=total))
    np.testing.assert_allclose(flat.probabilities_nk, diluted.probabilities_nk, atol=1e-6)


def test_droplets_with_few_counts_of_many_genes_are_unknown(tmp_path: Path) -> None:
    vocabulary = tiny_vocabulary([f"ENSG{i:011d}" for i in range(3_000)])
    predictor = Predictor.load(write_tiny_model(tmp_path, vocabulary), device="cpu")
    rng = np.random.default_rng(0)
    sizes = np.array([0, 1, 5, 20, 50, 99, 100, 1_000])
    droplets = np.array([rng.multinomial(size, np.full(3_000, 1 / 3_000)) for size in sizes])
    found = predictor.predict(predictor.genes.match(vocabulary.feature_ids).select(droplets))
    assert found.unknown.tolist() == (sizes < 100).tolist()
    panel = predictor.genes.match(vocabulary.feature_ids[:100]).select(droplets[:, :100] + 1)
    assert not predictor.predict(panel).unknown.any(), "a panel of 100 genes has few counts"


def test_genes_missing_from_the_input_are_not_zeros(predictor: Predictor, counts: sparse.csr_matrix) -> None:
    ids = list(predictor.vocabulary.feature_ids)
    skip = predictor.model.linear_skip
    assert skip is not None
    skip.center.copy_(torch.linspace(0.1, 2.0, 40))
    without = counts.toarray()
    without[:, 5:9] = 0
    zero = predictor.predict(predictor.genes.match(ids).select(without))
    kept = [*range(5), *range(9, 40)]
    lacking = predictor.predict(predictor.genes.match([ids[gene] for gene in kept]).select(without[:, kept]))
    with torch.no_grad():
        usual_k = (skip.center[5:9, None] * skip.weight.weight[7:11]).sum(0).numpy()
    ratio = np.log(lacking.probabilities_nk) - np.log(zero.probabilities_nk)
    np.testing.assert_allclose(ratio - ratio[:, :1], np.tile(usual_k - usual_k[0], (70, 1)), atol=1e-3)
    skip.center.zero_()


def test_columns_in_any_order_and_type(predictor: Predictor, counts: sparse.csr_matrix) -> None:
    ids = np.array(predictor.vocabulary.feature_ids)
    expected = predictor.predict(predictor.genes.match(ids.tolist()).select(counts)).probabilities_nk
    order = np.random.default_rng(5).permutation(40)
    for matrix in (
        counts[:, order],
        counts[:, order].tocsc(),
        counts[:, order].toarray().astype(np.int64),
        counts[:, order].astype(np.uint16),
    ):
        found = predictor.predict(predictor.genes.match(ids[order].tolist()).select(matrix))
        np.testing.assert_allclose(found.probabilities_nk, expected, atol=1e-6)


def test_columns_of_one_gene_are_summed(predictor: Predictor, counts: sparse.csr_matrix) -> None:
    ids = list(predictor.vocabulary.feature_ids)
    expected = predictor.predict(predictor.genes.match(ids).select(counts)).probabilities_nk
    part = counts.multiply(counts > 2).tocsr()
    match = predictor.genes.match([*ids, *(f"{name}.3" for name in ids)])
    assert match.num_by_id == 40 and match.expression_share == pytest.approx(1)
    found = predictor.predict(match.select(sparse.hstack([part, counts - part]).tocsr()))
    np.testing.assert_allclose(found.probabilities_nk, expected, atol=1e-6)


def test_genes_are_found_by_id_then_by_name(tmp_path: Path) -> None:
    names = ["CD3D", "MS4A1", "LYZ", "TWIN", "TWIN", *(f"G{i}" for i in range(5, 10))]
    vocabulary = tiny_vocabulary([f"ENSG{i:011d}" for i in range(10)], names)
    predictor = Predictor.load(write_tiny_model(tmp_path, vocabulary), device="cpu")
    weight = vocabulary.mean_expression_g

    def index(ids: list[str], symbols: list[str] | None = None) -> list[int]:
        return predictor.genes.match(ids, symbols).vocabulary_index.tolist()

    assert index(["ENSG00000000001.7", "ENSG00000000000", "other"]) == [1, 0, -1]
    assert index(["CD3D", "LYZ", "cd3d"]) == [0, 2, -1]
    assert index(["", "ENSG00000000002"], ["CD3D", "MS4A1"]) == [0, 2], "the id decides"
    assert index(["TWIN", "ENSG00000000003"]) == [-1, 3], "a name shared by two genes is ambiguous"
    assert index(["CD3D", "CD3D", "LYZ"]) == [0, 0, 2], "columns with the same name are one gene"
    assert index(["ENSG00000000000.1", "ENSG00000000000.2", "LYZ"]) == [0, 0, 2]
    assert index(["ENSG00000000000", "CD3D"]) == [0, -1], "a gene is matched once, by id"

    match = predictor.genes.match(["ENSG00000000001", "LYZ", "TWIN", "CD3D", "CD3D", "other"])
    assert (
        match.num_by_id,
        match.num_by_name,
        match.num_ambiguous,
        match.num_found,
        match.num_model_genes,
    ) == (1, 2, 1, 3, 10)
    assert match.expression_share == pytest.approx(weight[:3].sum() / weight.sum())
    assert str(match).startswith(
        "3 of the model's 10 genes found (1 by id, 2 by name, 1 ambiguous ones left out), "
    )
    match.require(0.2, source="input")
    with pytest.raises(
        ValueError, match=r"input: too few genes: 3 of the model's 10 genes found .*at least 90.0% .*Ensembl"
    ):
        match.require(0.9, source="input")
    with pytest.raises(
        ValueError, match="mouse.h5ad: too few genes: 0 of the model's 10 genes found .*another species"
    ):
        predictor.genes.match(["ENSMUSG00000000001"], ["Cd3d"]).require(0.0, source="mouse.h5ad")
    with pytest.raises(ValueError, match="2 gene ids but 1 names"):
        predictor.genes.match(["a", "b"], ["a"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1.0, "-1 at row 3, column 5: it is negative"),
        (1.5, r"1.5 at row 3, column 5: it is not a whole number.*raw counts"),
        (np.nan, "nan at row 3, column 5: it is missing"),
        (np.inf, "inf at row 3, column 5: it is missing"),
    ],
)
def test_only_raw_counts_are_taken(
    predictor: Predictor, counts: sparse.csr_matrix, value: float, message: str
) -> None:
    bad = counts.toarray()
    bad[3, 5] = value
    with pytest.raises(ValueError, match=f"file has {message}"):
        predictor.predict(predictor.genes.match(predictor.vocabulary.feature_ids).select(bad, source="file"))


def test_counts_must_be_numbers_and_fit_the_genes(predictor: Predictor, counts: sparse.csr_matrix) -> None:
    for bad, kind in ((np.array([["a"]], dtype=object), "object"), (np.ones((1, 1), bool), "bool")):
        with pytest.raises(ValueError, match=f"input: values are of type {kind}"):
            raw_counts(bad, source="input")
    with pytest.raises(ValueError, match="counts have 40 columns, but genes were matched for 2"):
        predictor.predict(predictor.genes.match(["a", "b"]).select(counts))


def test_a_model_without_labels_is_refused(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "pretrained", has_labels=False)
    with pytest.raises(
        ValueError, match=r"has no labels because it was only pre-trained; .*jobs.finetune --from"
    ):
        Predictor.load(directory)


@pytest.mark.parametrize(
    "overrides", [{"tokens.input_mode": "all"}, {"model.attention": "none", "tokens.expression": "log2_bins"}]
)
def test_other_kinds_of_models_predict(
    tmp_path: Path, counts: sparse.csr_matrix, overrides: dict[str, object]
) -> None:
    predictor = Predictor.load(write_tiny_model(tmp_path, **overrides), device="cpu")
    match = predictor.genes.match(predictor.vocabulary.feature_ids)
    whole = predictor.predict(match.select(counts))
    part = predictor.predict(match.select(counts[60:]))
    np.testing.assert_allclose(part.probabilities_nk, whole.probabilities_nk[60:], atol=1e-5)
