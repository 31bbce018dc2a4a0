"""The Reformer paper's duplication task for bidirectional attention: copy a symbol from the other half.

A sequence is a random word, repeated. Some positions of the second half are hidden, and the network has to
predict their symbols. This requires attention to the same position in the first half; without it, the
accuracy is one in `SYMBOLS`. As a program, this file also trains the library's network with the same recipe
and prints a table.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from screformer.attention import LSHSelfAttention
from screformer.config import ModelConfig
from screformer.reversible import ReversibleEncoder

SYMBOLS = 16
HIDDEN = SYMBOLS
CONFIG = ModelConfig(dim=64, depth=1, heads=2, attention="lsh", n_hashes=4, bucket_size=8)


class Copier(nn.Module):
    """Symbols and axial positions (half, place in the half) in, symbols out."""

    def __init__(self, kind: str, half: int) -> None:
        super().__init__()
        dim = CONFIG.dim
        self.kind, self.half = kind, half
        self.symbol, self.place, self.side = (
            nn.Embedding(SYMBOLS + 1, dim),
            nn.Embedding(half, dim),
            nn.Embedding(2, dim),
        )
        self.encoder: nn.Module = ReversibleEncoder(CONFIG) if kind == "ours" else library_encoder()
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, SYMBOLS))

    def forward(self, tokens_nl: Tensor, seed: int) -> Tensor:
        slot = torch.arange(2 * self.half)
        x = self.symbol(tokens_nl) + self.place(slot % self.half) + self.side(slot // self.half)
        if self.kind == "ours":
            return self.out(self.encoder(x, torch.ones_like(tokens_nl, dtype=torch.bool), hash_seed=seed))
        return self.out(self.encoder(x))

    def set_rounds(self, n_hashes: int) -> None:
        for module in self.encoder.modules():
            if isinstance(module, LSHSelfAttention):
                module.eval_n_hashes = n_hashes
            elif type(module).__name__ == "LSHAttention":
                module.n_hashes = n_hashes


def library_encoder() -> nn.Module:
    from reformer_pytorch import Reformer

    size = CONFIG.bucket_size
    return Reformer(
        CONFIG.dim,
        CONFIG.depth,
        heads=CONFIG.heads,
        bucket_size=size,
        n_hashes=CONFIG.n_hashes,
        ff_chunks=1,
        attn_chunks=1,
    )


def draw(generator: torch.Generator, cells: int, half: int) -> tuple[Tensor, Tensor, Tensor]:
    word = torch.randint(SYMBOLS, (cells, half), generator=generator)
    truth = torch.cat([word, word], 1)
    hidden = (torch.rand(cells, 2 * half, generator=generator) < 0.5) & (torch.arange(2 * half) >= half)
    return truth.masked_fill(hidden, HIDDEN), truth, hidden


def learn(kind: str, steps: int, half: int, seed: int = 0) -> Copier:
    torch.manual_seed(seed)
    model, generator = Copier(kind, half), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for step in range(steps):
        tokens, truth, hidden = draw(generator, 16, half)
        loss = F.cross_entropy(model(tokens, step)[hidden], truth[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Copier, n_hashes: int) -> float:
    model.set_rounds(n_hashes)
    torch.manual_seed(1)
    tokens, truth, hidden = draw(torch.Generator().manual_seed(99), 128, model.half)
    return float((model(tokens, 12345).argmax(-1) == truth)[hidden].float().mean())


def test_the_task_is_learned_and_more_rounds_at_evaluation_do_no_harm() -> None:
    model = learn("ours", 150, 32)
    found = {n_hashes: accuracy(model, n_hashes) for n_hashes in (1, 4, 16)}
    assert found[4] > 0.95, found
    assert found[16] > found[4] - 0.01 > found[1], found


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train both networks and print their accuracy by hash rounds at evaluation."
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--half", type=int, default=64, help="symbols of a word")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    print(f"{'network':>8}{'seed':>6}{'seconds':>9}" + "".join(f"{rounds:>8}" for rounds in (1, 2, 4, 8, 16)))
    for seed in range(args.seeds):
        for kind in ("ours", "library"):
            start = time.process_time()
            model = learn(kind, args.steps, args.half, seed)
            seconds = time.process_time() - start
            row = "".join(f"{accuracy(model, rounds):>8.3f}" for rounds in (1, 2, 4, 8, 16))
            print(f"{kind:>8}{seed:>6}{seconds:>9.1f}{row}", flush=True)


if __name__ == "__main__":
    main()
