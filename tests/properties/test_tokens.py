"""Properties of tokens that hold for any cells."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from screformer.config import TokensConfig
from screformer.counts import CellCounts
from screformer.tokenizer import CLS, NUM_SPECIAL, PAD, CellTokenizer, GeneVocabulary

NUM_GENES = 40
VOCABULARY = GeneVocabulary(
    tuple(f"ENSG{index}" for index in range(NUM_GENES)),
    tuple(f"G{index}" for index in range(NUM_GENES)),
    np.random.default_rng(0).uniform(0, 8, NUM_GENES).astype(np.float32),
)
CELLS = st.lists(
    st.dictionaries(st.integers(0, NUM_GENES - 1), st.integers(0, 300), max_size=NUM_GENES),
    min_size=1,
    max_size=6,
)
CONFIGS = st.builds(
    TokensConfig,
    input_mode=st.sampled_from(["detected", "all"]),
    max_genes=st.integers(1, 50),
    expression=st.sampled_from(["continuous", "log2_bins", "quantile_bins", "binary"]),
    num_bins=st.integers(2, 20),
)


def cells_of(cells):
    gene_ids = np.array([gene for cell in cells for gene in cell], dtype=np.int32)
    counts = np.array([count for cell in cells for count in cell.values()], dtype=np.float32)
    offsets = np.cumsum([0] + [len(cell) for cell in cells])
    return CellCounts.of(sparse.csr_array((counts, gene_ids, offsets), shape=(len(cells), NUM_GENES)))


@given(CELLS, CONFIGS)
@settings(max_examples=150, deadline=None)
def test_tokens_are_the_detected_genes(cells, config) -> None:
    tokens = CellTokenizer(config, VOCABULARY)(cells_of(cells))
    token_ids, values, bins = tokens["token_ids"], tokens["values"], tokens["bin_ids"]
    assert (token_ids[:, 0] == CLS).all()
    np.testing.assert_array_equal(bins == 0, values == 0)
    assert bins.max() < config.num_bins
    num_cut = 0
    for row, cell in enumerate(cells):
        detected = {gene: count for gene, count in cell.items() if count}
        genes = token_ids[row, values[row] > 0] - NUM_SPECIAL
        slots = token_ids[row, 1:]
        assert (np.diff(slots[slots != PAD]) > 0).all()
        assert (slots != PAD).sum() == np.argmax(np.append(slots, PAD) == PAD)  # padding comes last
        if config.input_mode == "all" or len(detected) <= config.max_genes:
            assert set(genes) == set(detected)
        else:
            num_cut += 1
            assert set(genes) <= set(detected)
            assert len(genes) == config.max_genes
            total = sum(detected.values())
            stands_out = {
                g: np.log1p(c * np.float32(1e4 / total)) - VOCABULARY.mean_expression_g[g]
                for g, c in detected.items()
            }
            assert (
                min(stands_out[g] for g in genes)
                >= max(stands_out[g] for g in set(detected) - set(genes)) - 1e-5
            )
        order = np.argsort(values[row], kind="stable")
        assert (np.diff(bins[row, order]) >= 0).all()  # lower expression never gets a higher bin
    assert tokens["num_cut"] == num_cut


@given(CELLS, CONFIGS)
@settings(max_examples=80, deadline=None)
def test_a_cell_does_not_depend_on_its_neighbours(cells, config) -> None:
    tokenizer = CellTokenizer(config, VOCABULARY)
    together = tokenizer(cells_of(cells))
    for row, cell in enumerate(cells):
        alone = tokenizer(cells_of([cell]))
        width = alone["token_ids"].shape[1]
        for name in ("token_ids", "values", "bin_ids"):
            np.testing.assert_array_equal(together[name][row, :width], alone[name][0])
            assert (together[name][row, width:] == 0).all()


@pytest.mark.parametrize("expression", ["log2_bins", "quantile_bins"])
def test_bins_do_not_depend_on_truncation(expression) -> None:
    cell = {gene: gene % 7 + 1 for gene in range(NUM_GENES)}
    whole, cut = (
        CellTokenizer(TokensConfig(expression=expression, max_genes=most), VOCABULARY)(cells_of([cell]))
        for most in (NUM_GENES, 10)
    )
    bin_of = dict(zip(whole["token_ids"][0], whole["bin_ids"][0], strict=True))
    assert [bin_of[token] for token in cut["token_ids"][0]] == cut["bin_ids"][0].tolist()
