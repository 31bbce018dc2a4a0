"""The encoder against reformer_pytorch.Reformer and against itself without reversibility."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from reformer_pytorch import Reformer

from screformer.attention import LSHSelfAttention
from screformer.config import ModelConfig
from screformer.reversible import ReversibleEncoder

CONFIG = ModelConfig(dim=32, depth=3, heads=2, n_hashes=2, bucket_size=8)


def run(config, *, batch=None, calls=1, train=True):
    torch.manual_seed(0)
    encoder = ReversibleEncoder(config).train(train)
    x = torch.randn(3, 37, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mask = torch.arange(37) < torch.tensor([37, 20, 0])[:, None]
    loss = sum(((encoder(x * (call + 1), mask, hash_seed=call) * mask[..., None]) ** 2).sum() for call in range(calls))
    loss.backward()
    return loss.item(), [x.grad, *(parameter.grad for parameter in encoder.parameters())]


@pytest.mark.parametrize("kind", ["lsh", "full", "local", "none"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("calls", [1, 2])
def test_reversible_on_and_off_give_equal_losses_and_gradients(kind, dropout, calls):
    config = replace(CONFIG, attention=kind, dropout=dropout)
    loss, grads = run(config, calls=calls)
    other_loss, other_grads = run(replace(config, reversible=False), calls=calls)
    assert loss == pytest.approx(other_loss, rel=1e-6)
    for grad, other in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()) + 1e-7)


def test_feed_forward_in_slices_changes_nothing():
    loss, grads = run(CONFIG)
    other_loss, other_grads = run(replace(CONFIG, ff_chunks=5))
    assert loss == pytest.approx(other_loss, rel=1e-6)
    for grad, other in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_gradients_flow_in_eval_mode_and_equal_those_of_training_without_dropout():
    loss, grads = run(replace(CONFIG, dropout=0.3), train=False)
    other_loss, other_grads = run(CONFIG)
    assert loss == pytest.approx(other_loss, rel=1e-6)
    torch.testing.assert_close(grads[0], other_grads[0], rtol=1e-4, atol=1e-3)


def test_blocks_learn_from_an_input_that_asks_for_no_gradient():
    encoder = ReversibleEncoder(CONFIG)
    encoder(torch.randn(2, 20, 32), torch.ones(2, 20, dtype=torch.bool), hash_seed=0).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_frozen_blocks_pass_the_gradient_on():
    encoder = ReversibleEncoder(CONFIG).requires_grad_(False)
    x = torch.randn(2, 20, 32, requires_grad=True)
    encoder(x, torch.ones(2, 20, dtype=torch.bool), hash_seed=0).square().sum().backward()
    assert x.grad.abs().sum() > 0 and all(parameter.grad is None for parameter in encoder.parameters())


def test_weights_in_bfloat16_keep_the_recomputation_exact():
    def gradient(reversible):
        torch.manual_seed(0)
        encoder = ReversibleEncoder(replace(CONFIG, reversible=reversible, depth=6)).bfloat16()
        x = torch.randn(2, 40, 32, dtype=torch.bfloat16, requires_grad=True)
        encoder(x, torch.ones(2, 40, dtype=torch.bool), hash_seed=0).float().square().sum().backward()
        return x.grad.float()

    on, off = gradient(True), gradient(False)
    assert (on - off).norm() / off.norm() < 0.01


def copy_weights(ours, library):
    for block, theirs in zip(ours.blocks, library.layers.blocks, strict=True):
        attention, feed_forward = theirs.f.net, theirs.g.net
        block.f.norm.load_state_dict(attention.norm.state_dict())
        block.f.attention.load_state_dict(attention.fn.state_dict())
        block.g.norm.load_state_dict(feed_forward.norm.state_dict())
        block.g.w1.load_state_dict(feed_forward.fn.fn.w1.state_dict())
        block.g.w2.load_state_dict(feed_forward.fn.fn.w2.state_dict())


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("n_hashes", [1, 4])
def test_encoder_equals_the_librarys_reformer_for_equal_hashes(reversible, n_hashes, monkeypatch):
    torch.manual_seed(0)
    config = replace(CONFIG, n_hashes=n_hashes, reversible=reversible)
    ours = ReversibleEncoder(config)
    library = Reformer(
        32, 3, heads=2, bucket_size=8, n_hashes=n_hashes, ff_chunks=1, attn_chunks=1, reverse_thres=0 if reversible else 10**6
    )
    copy_weights(ours, library)
    # Both hash by position alone, differently in each round: the same buckets without sharing any random state.
    length, rounds = 64, torch.arange(n_hashes)
    buckets = (torch.arange(length) * 7 + rounds[:, None] * 13) % 61 % 8

    def library_buckets(self, n_buckets, vectors, **kwargs):
        return (buckets + rounds[:, None] * 8).flatten().expand(vectors.shape[0], -1)

    def our_buckets(qk, lengths, *, bucket_size, n_hashes, seed):
        return buckets.expand(qk.shape[0], qk.shape[2], -1, -1)

    monkeypatch.setattr("reformer_pytorch.reformer_pytorch.LSHAttention.hash_vectors", library_buckets)
    monkeypatch.setattr("screformer.attention.hash_buckets", our_buckets)
    x = torch.randn(2, length, 32, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    mine, theirs = ours(x, torch.ones(2, length, dtype=torch.bool), hash_seed=0), library(y)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(mine)
    (mine * weight).sum().backward()
    (theirs * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)
    for block, other in zip(ours.blocks, library.layers.blocks, strict=True):
        for name in ("toqk", "tov", "to_out"):
            grad, other_grad = getattr(block.f.attention, name).weight.grad, getattr(other.f.net.fn, name).weight.grad
            torch.testing.assert_close(grad, other_grad, rtol=1e-4, atol=1e-5)


def test_attention_can_take_more_rounds_at_evaluation():
    encoder = ReversibleEncoder(CONFIG).eval()
    for module in encoder.modules():
        if isinstance(module, LSHSelfAttention):
            module.n_hashes = 8
    assert encoder(torch.randn(1, 50, 32), torch.ones(1, 50, dtype=torch.bool), hash_seed=0).shape == (1, 50, 32)


def test_memory_of_training_hardly_grows_with_depth():
    from jobs.benchmark.attention import peak_activation_mb

    assert peak_activation_mb(depth=12, length=4096) < 1.25 * peak_activation_mb(depth=2, length=4096)


def test_import_needs_nothing_but_torch():
    code = (
        "import sys, screformer.reversible; assert not {'ray', 'mlflow', 'tiledbsoma', 'reformer_pytorch', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
