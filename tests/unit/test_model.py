"""The network: shapes, determinism, independence of padding and neighbours, heads, losses, starts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

from screformer.config import ModelConfig, TokensConfig
from screformer.counts import CellCounts
from screformer.layers import LINEAR_SCALE
from screformer.model import ScReformer, classification_loss, expression_loss
from screformer.start import svd_gene_embeddings
from screformer.tokenizer import NUM_SPECIAL, CellTokenizer, GeneVocabulary

GOLDEN = Path(__file__).parents[1] / "golden"
NUM_GENES, NUM_CLASSES = 60, 5
TINY = {"dim": 16, "depth": 2, "heads": 2, "attention": "lsh", "n_hashes": 2, "bucket_size": 4}
VOCABULARY = GeneVocabulary(
    tuple(f"ENSG{index:03}" for index in range(NUM_GENES)),
    tuple(f"G{index}" for index in range(NUM_GENES)),
    np.random.default_rng(1).uniform(0, 2, NUM_GENES).astype(np.float32),
)


def counts_of_cells(num_cells: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.poisson(rng.gamma(0.5, 2.0, (num_cells, NUM_GENES))) * (
        rng.random((num_cells, NUM_GENES)) < rng.uniform(0.2, 1, (num_cells, 1))
    )


def tokenize(counts_ng: np.ndarray, tokens: TokensConfig) -> dict[str, np.ndarray]:
    return CellTokenizer(tokens, VOCABULARY)(CellCounts.of(counts_ng))


def batch_of(counts_ng: np.ndarray, tokens: TokensConfig | None = None) -> dict[str, torch.Tensor]:
    arrays = tokenize(counts_ng, tokens or TokensConfig())
    batch = {name: torch.from_numpy(arrays[name]).long() for name in ("token_ids", "bin_ids")}
    return {
        **batch,
        "values": torch.from_numpy(arrays["values"]),
        "labels": torch.arange(len(counts_ng)) % NUM_CLASSES,
    }


def fresh_network(
    tokens: TokensConfig | None = None, *, classes: int = NUM_CLASSES, seed: int = 0, **model
) -> ScReformer:
    return ScReformer(
        ModelConfig(**{**TINY, **model}),
        tokens or TokensConfig(),
        num_genes=NUM_GENES,
        num_classes=classes,
        seed=seed,
    )


def network(*args, **kwargs) -> ScReformer:
    made = fresh_network(*args, **kwargs)
    if made.linear_skip is not None:  # it starts at zero, which would hide errors
        torch.nn.init.normal_(made.linear_skip.weight.weight, generator=torch.Generator().manual_seed(1))
    return made


def padded(batch: dict[str, torch.Tensor], extra: int) -> dict[str, torch.Tensor]:
    return {
        name: torch.nn.functional.pad(tensor, (0, extra)) if tensor.ndim == 2 else tensor
        for name, tensor in batch.items()
    }


@pytest.mark.parametrize(
    ("attention", "pooling"),
    [("lsh", "attention"), ("full", "mean"), ("local", "cls"), ("random", "mean"), ("none", "attention")],
)
def test_padding_and_neighbours_change_rounding_only(attention: str, pooling: str) -> None:
    counts = counts_of_cells(7)
    model = network(attention=attention, pooling=pooling).eval()
    with torch.no_grad():
        together = model(batch_of(counts), task="finetune", hash_seed=3)
        more = model(padded(batch_of(counts), 9), task="finetune", hash_seed=3)
        torch.testing.assert_close(more, together)
        for row in range(7):
            alone = model(batch_of(counts[row : row + 1]), task="finetune", hash_seed=3)
            torch.testing.assert_close(alone.logits_nk[0], together.logits_nk[row])
            torch.testing.assert_close(alone.embedding_nd[0], together.embedding_nd[row])


@pytest.mark.parametrize("attention", ["lsh", "full", "local", "random", "none"])
def test_rows_of_padding_are_finite_and_change_nothing(attention: str) -> None:
    batch = batch_of(counts_of_cells(3))
    empty = {name: torch.cat([tensor, torch.zeros_like(tensor[:2])]) for name, tensor in batch.items()}
    model = network(attention=attention)
    output, expected = (model(each, task="finetune", hash_seed=1).logits_nk for each in (empty, batch))
    assert output.isfinite().all()
    torch.testing.assert_close(output[:3], expected)
    classification_loss(output, torch.tensor([0, 1, 2, -1, -1]), None)[0].backward()
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)


def test_evaluation_repeats_to_the_bit_whatever_the_global_generator() -> None:
    model, batch = network(dropout=0.3).eval(), batch_of(counts_of_cells(4))
    with torch.no_grad():
        torch.manual_seed(1)
        first = model(batch, task="finetune", hash_seed=5).logits_nk
        torch.manual_seed(2)
        second = model(batch, task="finetune", hash_seed=5).logits_nk
        other = model(batch, task="finetune", hash_seed=6).logits_nk
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_weights_depend_only_on_the_seed() -> None:
    torch.manual_seed(1)
    first, state = network(seed=7), torch.random.get_rng_state()
    torch.manual_seed(2)
    second, third = network(seed=7), network(seed=8)
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())
    for (name, a), b, c in zip(
        first.named_parameters(), second.parameters(), third.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert (
            a.ndim < 2
            or name.startswith(("linear_skip", "expression_embedding.to_bins"))
            or not torch.equal(a, c)
        ), name


@pytest.mark.parametrize("expression", ["continuous", "log2_bins", "quantile_bins"])
def test_hidden_expression_cannot_be_seen(expression: str) -> None:
    tokens = TokensConfig(expression=expression, num_bins=8)
    batch = batch_of(counts_of_cells(5), tokens)
    hidden = (batch["values"] > 0) & (
        torch.rand(batch["values"].shape, generator=torch.Generator().manual_seed(0)) < 0.3
    )
    other = {
        **batch,
        "values": batch["values"] + hidden * 1.5,
        "bin_ids": torch.where(hidden, 7 - batch["bin_ids"], batch["bin_ids"]),
    }
    model = network(tokens, classes=0)
    output, changed = (model(each, task="pretrain", hidden=hidden, hash_seed=0) for each in (batch, other))
    assert torch.equal(output.expression, changed.expression)
    assert output.expression.shape == (
        (int(hidden.sum()),) if expression == "continuous" else (int(hidden.sum()), 8)
    )
    assert output.logits_nk is None
    loss, count = expression_loss(output, batch, hidden)
    if expression == "continuous":
        expected = ((output.expression - batch["values"][hidden]) ** 2).sum()
    else:
        expected = -output.expression.log_softmax(1)[
            torch.arange(len(output.expression)), batch["bin_ids"][hidden]
        ].sum()
    torch.testing.assert_close(loss, expected)
    assert count == hidden.sum()


def test_nothing_hidden_still_reaches_every_parameter() -> None:
    """All ranks must use the same modules, even a rank whose cells happen to hide nothing."""
    model, batch = network(classes=0), batch_of(counts_of_cells(2))
    for hidden in (torch.zeros_like(batch["token_ids"], dtype=torch.bool), batch["values"] > 0):
        model.zero_grad(set_to_none=True)
        loss, _ = expression_loss(model(batch, task="pretrain", hidden=hidden, hash_seed=0), batch, hidden)
        loss.backward()
        assert [name for name, param in model.named_parameters() if param.grad is None] == []


@pytest.mark.parametrize("attention", ["lsh", "none"])
@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_both_tasks_can_be_learned(task: str, attention: str) -> None:
    batch = batch_of(counts_of_cells(10))
    hidden = (batch["values"] > 0) & (batch["token_ids"] % 4 == 0) if task == "pretrain" else None
    model = fresh_network(attention=attention, dim=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(40):
        output = model(batch, task=task, hidden=hidden, hash_seed=step)
        if hidden is None:
            loss, weight = classification_loss(output.logits_nk, batch["labels"], None)
        else:
            loss, weight = expression_loss(output, batch, hidden)
        optimizer.zero_grad()
        (loss / weight).backward()
        optimizer.step()
        losses.append((loss / weight).item())
    assert losses[-1] < 0.3 * losses[0]


def test_classification_loss_is_a_sum_that_parts_add_up_to() -> None:
    logits = torch.randn(9, NUM_CLASSES, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, -1, 4, 4, 2, -1, 0, 3])
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5])
    loss, weight = classification_loss(logits, labels, weights)
    parts = [classification_loss(logits[rows], labels[rows], weights) for rows in (slice(0, 3), slice(3, 9))]
    torch.testing.assert_close(loss, parts[0][0] + parts[1][0])
    torch.testing.assert_close(weight, parts[0][1] + parts[1][1])
    kept = labels >= 0
    torch.testing.assert_close(
        loss / weight, torch.nn.functional.cross_entropy(logits[kept], labels[kept], weight=weights)
    )
    assert classification_loss(logits, labels, None)[1] == 7
    assert classification_loss(logits[:0], labels[:0], weights)[0] == 0


def test_linear_skip_is_linear_in_scaled_values_and_starts_at_zero() -> None:
    batch = batch_of(counts_of_cells(4))
    fresh = fresh_network()
    assert fresh.linear_skip is not None
    skipped = fresh.linear_skip(batch["token_ids"], batch["values"])
    assert torch.equal(skipped, torch.zeros(4, NUM_CLASSES))
    skip = network().linear_skip
    doubled = skip(batch["token_ids"], batch["values"] * 2)
    torch.testing.assert_close(doubled, skip(batch["token_ids"], batch["values"]))
    dense = torch.zeros(4, NUM_GENES + 2).scatter_(1, batch["token_ids"], batch["values"])
    expected = LINEAR_SCALE * torch.nn.functional.normalize(dense, dim=1) @ skip.weight.weight
    torch.testing.assert_close(doubled, expected)
    assert network(linear_skip=False).linear_skip is None


def test_network_starts_as_a_given_linear_classifier() -> None:
    batch = batch_of(counts_of_cells(4))
    generator = torch.Generator().manual_seed(2)
    weights, bias = (
        torch.randn(NUM_GENES, NUM_CLASSES, generator=generator),
        torch.randn(NUM_CLASSES, generator=generator),
    )
    center = torch.rand(NUM_GENES, generator=generator)
    model = fresh_network()
    model.set_linear_start(weights, bias, center)
    dense = torch.zeros(4, NUM_GENES + NUM_SPECIAL).scatter_(1, batch["token_ids"], batch["values"])[
        :, NUM_SPECIAL:
    ]
    logits = model(batch, task="finetune").logits_nk
    scaled = LINEAR_SCALE * torch.nn.functional.normalize(dense, dim=1)
    torch.testing.assert_close(logits, (scaled - center) @ weights + bias)
    measured, panels = torch.rand(2, NUM_GENES, generator=generator) < 0.5, torch.tensor([0, 1, 1, 0])
    in_part = model(batch | {"measured": measured, "panels": panels}, task="finetune").logits_nk
    torch.testing.assert_close(in_part, (scaled - measured[panels] * center) @ weights + bias)
    classification_loss(logits, batch["labels"], None)[0].backward()
    assert model.classification_head.weight.grad.abs().max() > 0  # the encoder still gets gradients
    with pytest.raises(
        ValueError,
        match=r"linear start has shapes \[\(60, 4\), \(5,\), \(60,\)\], the network needs \[\(60, 5\), ",
    ):
        model.set_linear_start(weights[:, 1:], bias, center)
    with pytest.raises(ValueError, match="a linear start needs model.linear_skip=true and labels"):
        network(linear_skip=False).set_linear_start(weights, bias, center)


def test_without_gene_embeddings_the_encoder_cannot_distinguish_genes() -> None:
    batch = batch_of(counts_of_cells(4))
    genes = batch["token_ids"] >= NUM_SPECIAL
    renamed = {
        **batch,
        "token_ids": torch.where(
            genes, NUM_GENES + 2 * NUM_SPECIAL - 1 - batch["token_ids"], batch["token_ids"]
        ),
    }
    for embedding, same in (("none", True), ("random", False)):
        model = network(gene_embedding=embedding, attention="full").eval()
        with torch.no_grad():
            first, second = (model(each, task="finetune") for each in (batch, renamed))
        assert torch.equal(first.embedding_nd, second.embedding_nd) == same
        assert not torch.equal(first.logits_nk, second.logits_nk)  # the linear part still sees genes
    assert network(gene_embedding="none").gene_embedding.weight.shape == (1 + NUM_SPECIAL, TINY["dim"])


def test_task_and_heads_must_fit() -> None:
    batch = batch_of(counts_of_cells(2))
    assert network(classes=0)(batch, task="embed").embedding_nd.shape == (2, TINY["dim"])
    with pytest.raises(AssertionError, match="has no classes"):
        network(classes=0)(batch, task="finetune")
    with pytest.raises(AssertionError, match="task pretrain with hidden=None"):
        network()(batch, task="pretrain")


def test_all_genes_mode_runs_and_hides_detected_genes_only() -> None:
    tokens = TokensConfig(input_mode="all")
    batch = batch_of(counts_of_cells(3), tokens)
    model = network(tokens, attention="lsh")
    assert batch["token_ids"].shape == (3, NUM_GENES + 1)
    output = model(batch, task="pretrain", hidden=batch["values"] > 0, hash_seed=0)
    assert len(output.expression) == (batch["values"] > 0).sum()


def test_bfloat16_weights_run_close_to_float32() -> None:
    batch = batch_of(counts_of_cells(4))
    exact = network(attention="full").eval()
    rounded = network(attention="full").to(torch.bfloat16).eval()
    with torch.no_grad():
        a, b = (model(batch, task="finetune", hash_seed=0).logits_nk for model in (exact, rounded))
    assert b.dtype == torch.bfloat16
    assert (a.softmax(1) - b.float().softmax(1)).abs().max() < 0.1


def test_svd_start() -> None:
    counts = sparse.csr_matrix(counts_of_cells(50).astype(np.float32))
    counts.data = np.log1p(counts.data)
    embeddings = svd_gene_embeddings(counts, 8, seed=3)
    assert embeddings.dtype == np.float32
    np.testing.assert_array_equal(embeddings, svd_gene_embeddings(counts, 8, seed=3))
    np.testing.assert_allclose(
        embeddings, svd_gene_embeddings(counts, 8, seed=4), atol=0.05
    )  # another sketch, the same vectors
    vectors = np.linalg.svd(counts.toarray(), full_matrices=False)[2][:3]
    cosines = np.abs((embeddings[:, :3].T * vectors).sum(1)) / np.linalg.norm(embeddings[:, :3], axis=0)
    np.testing.assert_allclose(cosines, 1, atol=1e-2)
    model = network(dim=8)
    random_rms = model.gene_embedding.weight.square().mean().sqrt().item()
    assert np.sqrt(np.mean(embeddings**2)) == pytest.approx(random_rms, rel=0.1)
    model.set_gene_embeddings(torch.from_numpy(embeddings))
    np.testing.assert_array_equal(model.gene_embedding.weight[2:].detach().numpy(), embeddings)
    with pytest.raises(
        ValueError, match=r"gene embeddings have shape \(60, 4\), the network needs \(60, 8\)"
    ):
        model.set_gene_embeddings(torch.zeros(NUM_GENES, 4))
    wide = svd_gene_embeddings(counts[:5], 16, seed=0)
    assert np.isfinite(wide).all()
    assert (np.abs(wide).max(axis=0) > 0).all()


def golden_outputs() -> dict:
    """Tokens of ten cells, and the output of a seeded tiny network for them."""
    tokens = TokensConfig(max_genes=20, expression="quantile_bins", num_bins=6)
    counts = counts_of_cells(10, seed=42)
    arrays = tokenize(counts, tokens)
    logits = {}
    for attention in ("lsh", "full"):
        model = network(TokensConfig(max_genes=20), attention=attention, seed=11).eval()
        with torch.no_grad():
            logits[attention] = model(
                batch_of(counts, TokensConfig(max_genes=20)), task="finetune", hash_seed=5
            ).logits_nk.tolist()
    return {
        "token_ids": arrays["token_ids"].tolist(),
        "bin_ids": arrays["bin_ids"].tolist(),
        "values": np.round(arrays["values"].astype(float), 5).tolist(),
        "logits": {name: np.round(rows, 5).tolist() for name, rows in logits.items()},
    }


def test_golden_outputs() -> None:
    expected, found = json.loads((GOLDEN / "tiny_model.json").read_text()), golden_outputs()
    assert found["token_ids"] == expected["token_ids"]
    assert found["bin_ids"] == expected["bin_ids"]
    np.testing.assert_allclose(found["values"], expected["values"], atol=2e-5)
    for name, rows in expected["logits"].items():
        np.testing.assert_allclose(found["logits"][name], rows, atol=1e-3, err_msg=name)


if __name__ == "__main__":
    (GOLDEN / "tiny_model.json").write_text(json.dumps(golden_outputs()) + "\n")
