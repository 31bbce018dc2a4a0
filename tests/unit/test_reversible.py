"""The encoder compared with reformer_pytorch.Reformer and with itself without reversibility."""

from dataclasses import replace

import pytest
import torch

from helpers.library_twin import LibraryEncoder, give_equal_hashes
from screformer.config import ModelConfig
from screformer.reversible import ReversibleEncoder

CONFIG = ModelConfig(dim=32, depth=3, heads=2, attention="lsh", n_hashes=2, bucket_size=8)


def run(config, *, batch=None, calls=1, train=True):
    torch.manual_seed(0)
    encoder = ReversibleEncoder(config).train(train)
    x = torch.randn(3, 37, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mask = torch.arange(37) < torch.tensor([37, 20, 0])[:, None]
    loss = sum(
        ((encoder(x * (call + 1), mask, hash_seed=call) * mask[..., None]) ** 2).sum()
        for call in range(calls)
    )
    loss.backward()
    return loss.item(), [x.grad, *(parameter.grad for parameter in encoder.parameters())]


@pytest.mark.parametrize(
    ("kind", "dropout", "calls"),
    [("lsh", 0.0, 1), *((kind, 0.2, 2) for kind in ("lsh", "full", "local", "random", "none"))],
)
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


def test_blocks_learn_from_an_input_that_needs_no_gradient():
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


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("n_hashes", [1, 4])
@pytest.mark.parametrize("length", [64, 51])
def test_encoder_equals_the_librarys_reformer_for_equal_hashes(reversible, n_hashes, length, monkeypatch):
    torch.manual_seed(0)
    config = replace(CONFIG, n_hashes=n_hashes, reversible=reversible)
    ours, library = ReversibleEncoder(config), LibraryEncoder(config)
    library.copy_weights(ours)
    give_equal_hashes(monkeypatch.setattr, length, config)
    x = torch.randn(2, 70, 32)
    mask = (torch.arange(70) < length).expand(2, -1)
    weight = torch.randn_like(x) * mask[..., None]
    outputs, gradients = [], []
    # Ours is padded to 70 slots; the library pads itself to a multiple of two buckets.
    for encoder, slots in ((ours, 70), (library, length)):
        leaf = x[:, :slots].clone().requires_grad_()
        out = encoder(leaf, mask[:, :slots], hash_seed=0)
        (out * weight[:, :slots]).sum().backward()
        outputs.append(out[:, :length])
        gradients.append(leaf.grad[:, :length])
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    for theirs, own in library.pairs(ours):
        for (name, parameter), other in zip(own.named_parameters(), theirs.parameters(), strict=True):
            assert (parameter.grad - other.grad).norm() <= 1e-5 * other.grad.norm(), name


ROUNDS = ({"n_hashes": 2}, {"n_hashes": 2, "eval_n_hashes": 6}, {"n_hashes": 6})


def test_a_trained_network_uses_more_rounds_at_evaluation():
    plain, more, both = (ReversibleEncoder(replace(CONFIG, **rounds)) for rounds in ROUNDS)
    for encoder in (more, both):
        encoder.load_state_dict(plain.state_dict())
    x, mask = torch.randn(1, 50, 32), torch.ones(1, 50, dtype=torch.bool)
    trained = [encoder(x, mask, hash_seed=0) for encoder in (plain, more, both)]
    found = [encoder.eval()(x, mask, hash_seed=0) for encoder in (plain, more, both)]
    assert torch.equal(trained[0], trained[1]) and not torch.equal(trained[1], trained[2])
    assert torch.equal(found[1], found[2]) and not torch.equal(found[0], found[1])


def test_memory_of_training_hardly_grows_with_depth_and_in_line_with_length():
    from jobs.benchmark.timing import peak_activation_mb

    shallow = peak_activation_mb(depth=2, length=4096)
    assert peak_activation_mb(depth=12, length=4096) < 1.25 * shallow
    assert peak_activation_mb(depth=2, length=8192) < 2.1 * shallow, "memory is linear in the tokens"
