from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.tiny_model import write_tiny_model
from screformer.cell_tokens import CellTokens, cell_tokens, without_genes
from screformer.counts import CellCounts
from screformer.explain import Explainer
from screformer.layers import LINEAR_SCALE
from screformer.markers import markers
from screformer.predictor import Predictor


def _cells(predictor: Predictor, num_cells: int, *, seed: int) -> list[CellTokens]:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(2.0, (num_cells, 40)) * (rng.random((num_cells, 40)) < 0.6)
    cells = CellCounts.of(counts)
    return cell_tokens(predictor.tokenizer(cells), cells.panels)


@pytest.mark.parametrize(
    "settings",
    [
        {"model.attention": "full"},
        {"model.attention": "none", "model.pooling": "mean", "tokens.expression": "log2_bins"},
        {"model.attention": "full", "model.pooling": "cls", "model.linear_skip": False},
    ],
    ids=["full", "none, bins", "cls"],
)
def test_values_sum_to_the_whole_logit(tmp_path: Path, settings: dict[str, object]) -> None:
    predictor = Predictor.load(write_tiny_model(tmp_path, **settings), device="cpu")
    background = _cells(predictor, 3, seed=1)
    explainer = Explainer(predictor.model, background, num_nodes=24)
    base_k = explainer.logits(background).mean(axis=0)
    for cell in _cells(predictor, 3, seed=2):
        assert set(cell.token_ids) != set(background[0].token_ids), "the cells have different genes"
        for found in explainer.attribute(cell, [0, 2]):
            assert found.output == pytest.approx(explainer.logits([cell])[0, found.label], abs=1e-5)
            assert found.base == pytest.approx(base_k[found.label], abs=1e-5)
            assert found.additivity_error < 0.01 * max(1.0, abs(found.output - found.base))
            assert len(found.genes) == len(found.values) and np.abs(found.values).max() > 0.01
            assert set(found.genes) == {
                *(cell.token_ids[1:] - 2),
                *(gene for other in background for gene in other.token_ids[1:] - 2),
            }


def test_a_gene_measured_on_only_one_side_gets_its_share(tmp_path: Path) -> None:
    predictor = Predictor.load(write_tiny_model(tmp_path, **{"model.attention": "full"}), device="cpu")
    assert predictor.model.linear_skip is not None
    predictor.model.linear_skip.center.copy_(torch.linspace(0.1, 2.0, 40))
    background = _cells(predictor, 2, seed=1)
    (cell,) = _cells(predictor, 1, seed=2)
    lacking = without_genes(cell, np.array([3, 4]))
    narrow = replace(lacking, measured_g=~np.isin(np.arange(40), [3, 4]))
    explainer = Explainer(predictor.model, background, num_nodes=24)
    as_zero, unknown = (explainer.attribute(one, [1])[0] for one in (lacking, narrow))
    assert unknown.additivity_error < 0.01 * max(1.0, abs(unknown.output - unknown.base))
    differs = unknown.values - as_zero.values
    weights = predictor.model.linear_skip.weight.weight[2:, 1].detach().numpy()
    np.testing.assert_allclose(
        differs[np.isin(unknown.genes, [3, 4])],
        (torch.linspace(0.1, 2.0, 40).numpy() * weights)[3:5],
        atol=1e-4,
    )
    np.testing.assert_allclose(differs[~np.isin(unknown.genes, [3, 4])], 0, atol=1e-6)


def test_an_lsh_model_is_nearly_additive_and_reports_the_error(tmp_path: Path) -> None:
    predictor = Predictor.load(write_tiny_model(tmp_path, **{"model.bucket_size": 64}), device="cpu")
    explainer = Explainer(predictor.model, _cells(predictor, 3, seed=1), num_nodes=16)
    for cell in _cells(predictor, 3, seed=2):
        found = explainer.attribute(cell, [1])[0]
        distance = found.output - found.base
        assert found.additivity_error == pytest.approx(abs(found.values.sum() - distance), abs=1e-4)
        assert found.additivity_error < 0.1 * max(1.0, abs(distance))


class _OfEmbeddings(torch.nn.Module):
    """The network as a function of its tokens' embeddings and values, which all cells have, as needed by
    shap."""

    def __init__(self, predictor: Predictor, token_ids: torch.Tensor):
        super().__init__()
        self.model, self.token_ids = predictor.model, token_ids

    def forward(self, x_nld: torch.Tensor, values_nl: torch.Tensor) -> torch.Tensor:
        ids_nl = self.token_ids.expand(len(x_nld), -1)
        embedding = self.model.pooling(self.model.encoder(x_nld, ids_nl > 0, hash_seed=0), ids_nl > 0)
        assert self.model.classification_head is not None and self.model.linear_skip is not None
        scaled = torch.nn.functional.normalize(values_nl, dim=1) * LINEAR_SCALE
        logits_nk = (
            self.model.classification_head(embedding)
            + scaled @ self.model.linear_skip.weight.weight[self.token_ids[0]]
        )
        return logits_nk[:, [0, 3]]


@pytest.mark.filterwarnings("ignore")
def test_agreement_with_shap_where_every_gene_is_a_token(tmp_path: Path) -> None:
    import shap

    predictor = Predictor.load(
        write_tiny_model(tmp_path, **{"tokens.input_mode": "all", "model.attention": "full"}), device="cpu"
    )
    background, (cell,) = _cells(predictor, 4, seed=1), _cells(predictor, 1, seed=2)
    ours = Explainer(predictor.model, background, num_nodes=16).attribute(cell, [0, 3])

    def inputs(cells: list[CellTokens]) -> list[torch.Tensor]:
        batch = Explainer(predictor.model, cells)._batch(cells)
        with torch.no_grad():
            return [
                predictor.model.embed_tokens(batch["token_ids"], batch["values"], batch["bin_ids"]),
                batch["values"],
            ]

    wrapped = _OfEmbeddings(predictor, torch.from_numpy(cell.token_ids).long()[None])
    np.testing.assert_allclose(wrapped(*inputs([cell])).detach()[0, 0], ours[0].output, atol=1e-4)
    reference = shap.GradientExplainer(wrapped, inputs(background)).shap_values(
        inputs([cell]), nsamples=2_000, rseed=0
    )
    for place, found in enumerate(ours):
        theirs = reference[0][0, 1:, :, place].sum(axis=1) + reference[1][0, 1:, place]
        assert np.corrcoef(theirs, found.values)[0, 1] > 0.99
        np.testing.assert_allclose(theirs, found.values, atol=0.1 * np.abs(found.values).max())


def test_what_is_refused(tmp_path: Path) -> None:
    predictor = Predictor.load(write_tiny_model(tmp_path, **{"model.attention": "local"}), device="cpu")
    with pytest.raises(ValueError, match="model.attention='local' cannot be explained"):
        Explainer(predictor.model, _cells(predictor, 1, seed=0))
    with pytest.raises(ValueError, match="background has no cells"):
        Explainer(predictor.model, [])


def test_genes_can_be_removed(tmp_path: Path) -> None:
    predictor = Predictor.load(write_tiny_model(tmp_path), device="cpu")
    (cell,) = _cells(predictor, 1, seed=0)
    genes = cell.token_ids[1:4] - 2
    less = without_genes(cell, genes)
    assert len(less.token_ids) == len(cell.token_ids) - 3 and less.token_ids[0] == 1
    assert not set(genes + 2) & set(less.token_ids)


def test_the_marker_table_is_sound() -> None:
    table = markers()
    assert (
        table.columns.tolist() == ["cell_type", "cl_id", "symbol", "feature_id"]
        and not table.isna().any().any()
    )
    assert (
        table["feature_id"].str.fullmatch(r"ENSG\d{11}").all()
        and table["cl_id"].str.fullmatch(r"CL:\d{7}").all()
    )
    assert not table.duplicated(["cell_type", "symbol"]).any()
    assert (table.groupby("symbol")["feature_id"].nunique() == 1).all()
    assert table.groupby("cell_type").size().min() >= 5
