"""LSH attention compared with reformer_pytorch for equal hashes, and independence of other cells."""

import pytest
import torch
from reformer_pytorch.reformer_pytorch import LSHAttention
from reformer_pytorch.reformer_pytorch import LSHSelfAttention as LibrarySelfAttention

from screformer.attention import CROSSOVER_TOKENS, LSHSelfAttention, make_attention, resolve_attention
from screformer.config import ModelConfig
from screformer.lsh import hash_buckets, lsh_attention, random_buckets, sort_tokens

CASES = [
    # Bucket size and lengths of the cells: full cells, odd lengths, a last bucket without tokens, a cell with
    # few tokens, and one without any.
    (8, [128, 128]),
    (8, [131, 77, 3]),
    (16, [33, 0, 65]),
    (64, [200, 256]),
]


def library_for(buckets_hrl, lengths, bucket_size, n_hashes, most=10**6):
    """The library's attention with our hashes; padding is in the last bucket, so it sorts last."""
    attention = LSHAttention(bucket_size=bucket_size, n_hashes=n_hashes)
    padded = -(-lengths // (2 * bucket_size)) * 2 * bucket_size
    full = torch.full((*buckets_hrl.shape[:2], padded), most - 1)
    full[..., :lengths] = buckets_hrl[..., :lengths]
    full += torch.arange(n_hashes)[:, None] * most
    attention.hash_vectors = lambda *args, **kwargs: full.flatten(1)
    return attention, padded


@pytest.mark.parametrize("n_hashes", [1, 2, 4, 8])
@pytest.mark.parametrize(("bucket_size", "lengths"), CASES)
def test_outputs_and_gradients_equal_the_library_for_equal_hashes(n_hashes, bucket_size, lengths):
    generator = torch.Generator().manual_seed(n_hashes)
    n, length, heads, width = len(lengths), max(lengths), 2, 16
    qk, v, weight = (torch.randn(n, length, heads, width, generator=generator) for _ in range(3))
    weight *= (torch.arange(length) < torch.tensor(lengths)[:, None])[..., None, None]
    buckets = hash_buckets(qk, lengths, bucket_size=bucket_size, n_hashes=n_hashes, seed=3)
    qk.requires_grad_()
    v.requires_grad_()
    ours = lsh_attention(qk, v, sort_tokens(buckets, lengths), bucket_size=bucket_size)
    (ours * weight).sum().backward()
    assert not ours[weight == 0].any() and not qk.grad[weight == 0].any()
    for cell, own in enumerate(lengths):
        if own == 0:
            continue
        library, padded = library_for(buckets[cell].long(), own, bucket_size, n_hashes)
        theirs_qk, theirs_v = (torch.zeros(heads, padded, width) for _ in range(2))
        theirs_qk[:, :own], theirs_v[:, :own] = (x[cell, :own].detach().transpose(0, 1) for x in (qk, v))
        theirs_qk.requires_grad_()
        theirs_v.requires_grad_()
        out, _, _ = library(theirs_qk, theirs_v, input_mask=(torch.arange(padded) < own).expand(heads, -1))
        out = out[:, :own].transpose(0, 1)
        (out * weight[cell, :own]).sum().backward()
        torch.testing.assert_close(ours[cell, :own], out, rtol=1e-5, atol=1e-5)
        for mine, theirs in ((qk, theirs_qk), (v, theirs_v)):
            torch.testing.assert_close(
                mine.grad[cell, :own], theirs.grad[:, :own].transpose(0, 1), rtol=1e-5, atol=1e-5
            )


def test_self_attention_equals_the_library_with_its_weights_and_its_own_hashes():
    torch.manual_seed(0)
    ours = LSHSelfAttention(32, 4, bucket_size=16, n_hashes=4)
    library = LibrarySelfAttention(32, heads=4, bucket_size=16, n_hashes=4)
    # The library's bias-free projections have the same names, so the state dict can be loaded.
    ours.load_state_dict(library.state_dict())
    x = torch.randn(3, 96, 32)
    drawn = {}
    original = library.lsh_attn.hash_vectors

    def remember(n_buckets, vectors, **kwargs):
        drawn["buckets"] = original(n_buckets, vectors, **kwargs)
        return drawn["buckets"]

    library.lsh_attn.hash_vectors = remember
    theirs = library(x)
    buckets = drawn["buckets"].view(3, 4, 4, 96) - torch.arange(4)[:, None] * (96 // 16)
    qk, v = (layer(x).unflatten(-1, (4, -1)) for layer in (ours.toqk, ours.tov))
    mine = ours.to_out(lsh_attention(qk, v, sort_tokens(buckets, [96] * 3), bucket_size=16).flatten(2))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_gradients_match_finite_differences():
    torch.manual_seed(0)
    qk, v = (torch.randn(2, 21, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    lengths = [21, 1]
    tokens = sort_tokens(hash_buckets(qk.detach(), lengths, bucket_size=4, n_hashes=2, seed=0), lengths)
    assert torch.autograd.gradcheck(
        lambda a, b: lsh_attention(a, b, tokens, bucket_size=4), (qk, v), atol=1e-5
    )


@pytest.mark.parametrize("lengths", [[96, 96], [71, 0]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_equals_the_fused_kernel(lengths, dtype, tolerance, monkeypatch):
    """Outputs and gradients of the GPU path, run eagerly, and of the CPU path; both compared with the CPU
    path in float32."""
    # PyTorch rejects gradients of FlexAttention on CPUs, because its compiled kernel has none there; the
    # eager reference does.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    torch.manual_seed(0)
    qk, v, weight = (torch.randn(2, 96, 2, 16).to(dtype) for _ in range(3))
    tokens = sort_tokens(hash_buckets(qk, lengths, bucket_size=16, n_hashes=3, seed=0), lengths)

    def run(kernel, dtype):
        leaves = [part.to(dtype).requires_grad_() for part in (qk, v)]
        out = lsh_attention(*leaves, tokens, bucket_size=16, kernel=kernel)
        return out, *torch.autograd.grad(out, leaves, weight.to(dtype))

    exact = run("fused", torch.float32)
    for kernel in ("fused", "flex"):
        for found, expected in zip(run(kernel, dtype), exact, strict=True):
            assert found.dtype == dtype
            assert (found.float() - expected).norm() <= tolerance * expected.norm(), kernel


@pytest.mark.parametrize("kind", ["lsh", "full", "local", "random", "none"])
def test_a_cell_depends_neither_on_padding_nor_on_its_neighbours(kind):
    torch.manual_seed(0)
    attention = make_attention(ModelConfig(dim=32, heads=2, bucket_size=16, n_hashes=4, attention=kind))
    cell, neighbours = torch.randn(1, 75, 32), torch.randn(3, 300, 32)
    alone = attention(cell, torch.ones(1, 75, dtype=torch.bool), hash_seed=5)
    for garbage in (0.0, 1e3):
        batch = torch.cat([neighbours, torch.full((1, 300, 32), garbage)])
        batch[3, :75] = cell
        mask = torch.arange(300) < torch.tensor([300, 17, 160, 75])[:, None]
        together = attention(batch, mask, hash_seed=5)[3, :75]
        torch.testing.assert_close(together, alone[0], rtol=1e-5, atol=1e-5)


def test_equal_seeds_give_equal_bits_and_different_seeds_different_hashes():
    torch.manual_seed(0)
    attention = LSHSelfAttention(32, 2, bucket_size=16, n_hashes=2)
    x, mask = torch.randn(2, 200, 32), torch.ones(2, 200, dtype=torch.bool)
    state = torch.get_rng_state()
    assert torch.equal(attention(x, mask, hash_seed=1), attention(x, mask, hash_seed=1))
    assert not torch.equal(attention(x, mask, hash_seed=1), attention(x, mask, hash_seed=2))
    assert torch.equal(torch.get_rng_state(), state)


def test_hashes_put_near_vectors_together_and_use_all_buckets():
    torch.manual_seed(0)
    centres = torch.randn(64, 1, 32)
    vectors = (centres + 0.05 * torch.randn(64, 64, 32)).view(1, 4096, 1, 32)
    buckets = hash_buckets(vectors, [4096], bucket_size=64, n_hashes=4, seed=0)[0, 0].view(4, 64, 64)
    same = (buckets[:, :, :1] == buckets[:, :, 1:]).float().mean()
    assert same > 0.7
    random = hash_buckets(torch.randn(1, 4096, 1, 32), [4096], bucket_size=64, n_hashes=1, seed=0)
    assert 48 <= random.unique().numel() <= 80


def test_more_rounds_are_closer_to_attention_over_all_tokens():
    torch.manual_seed(0)
    qk, v = (torch.randn(1, 512, 1, 32) for _ in range(2))
    score = qk[0, :, 0] @ torch.nn.functional.normalize(qk[0, :, 0], dim=-1).T / 32**0.5
    exact = score.fill_diagonal_(-5e4).softmax(-1) @ v[0, :, 0]
    errors = []
    for n_hashes in (1, 4, 16):
        tokens = sort_tokens(hash_buckets(qk, [512], bucket_size=32, n_hashes=n_hashes, seed=0), [512])
        errors.append(
            float((lsh_attention(qk, v, tokens, bucket_size=32)[0, :, 0] - exact).norm() / exact.norm())
        )
    assert errors[0] > errors[1] > errors[2]


def test_random_buckets_have_the_layout_of_lsh_without_its_hashes():
    torch.manual_seed(0)
    lsh, random = (
        make_attention(ModelConfig(dim=32, heads=2, bucket_size=16, n_hashes=2, attention=kind))
        for kind in ("lsh", "random")
    )
    random.load_state_dict(lsh.state_dict())
    x, mask = torch.randn(1, 16, 32).repeat(1, 16, 1), torch.ones(1, 256, dtype=torch.bool)
    # In one round, two buckets contain all 32 tokens, so there is nothing to choose.
    lsh.n_hashes = random.n_hashes = 1
    torch.testing.assert_close(
        lsh(x[:, :32], mask[:, :32], hash_seed=0), random(x[:, :32], mask[:, :32], hash_seed=0)
    )
    # There are sixteen copies of each token: hashing brings them together, shuffling does not.
    qk = lsh.toqk(x).unflatten(-1, (2, -1))
    hashed = hash_buckets(qk, [256], bucket_size=16, n_hashes=2, seed=0)
    shuffled = random_buckets(qk, n_hashes=2, seed=0)
    assert (hashed.view(1, 2, 2, 16, 16).diff(dim=3) == 0).all()
    assert (shuffled.view(1, 2, 2, 16, 16).diff(dim=3) != 0).any()
    orders = [sort_tokens(random_buckets(qk, n_hashes=2, seed=seed), [256]).order_nhrl for seed in (0, 0, 1)]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0][:, :, 0], orders[0][:, :, 1]), "rounds shuffle differently"


@pytest.mark.parametrize(
    ("overrides", "most_slots", "kind", "line"),
    [
        (
            {},
            CROSSOVER_TOKENS - 1,
            "full",
            f"attention: full (auto: cells have up to {CROSSOVER_TOKENS - 1:,} tokens; lsh is",
        ),
        (
            {},
            CROSSOVER_TOKENS,
            "lsh",
            f"attention: lsh (auto: cells have up to {CROSSOVER_TOKENS:,} tokens; lsh is faster from",
        ),
        ({"attention": "lsh", "n_hashes": 8}, 10, "lsh", "attention: lsh"),
        (
            {"attention": "full", "n_hashes": 8, "bucket_size": 32},
            10**4,
            "full",
            "n_hashes=8 and model.bucket_size=32 without effect",
        ),
        (
            {"attention": "local", "n_hashes": 8, "bucket_size": 32},
            10**4,
            "local",
            "attention: local; model.n_hashes=8 without effect",
        ),
        ({"n_hashes": 2}, 10, "full", f"from {CROSSOVER_TOKENS:,} tokens); model.n_hashes=2 without effect"),
    ],
)
def test_auto_is_resolved_by_length_and_logged(overrides, most_slots, kind, line):
    settled, says = resolve_attention(ModelConfig(**overrides), most_slots)
    assert settled.attention == kind
    assert line in says and ("without effect" in says) == ("without effect" in line)
    assert resolve_attention(settled, 10**6 - most_slots)[0] == settled
