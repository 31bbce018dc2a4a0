"""Attribute a cell's label to its genes with expected gradients.

Each gene gets one value. A cell is compared with background cells, and the difference between the two logits
is divided among genes. A background cell has different genes, and undetected genes have no token. So the path
between two cells uses the tokens of both. At each end it equals one of the cells; in between, three things
change linearly:

- the embedding of each token (gene and expression together), if both cells have the gene;
- the presence of each token (0 or 1 at the ends), which is its weight as a key and in pooling;
- the expression value that is input to the linear skip.

For each of these, the gradient times the change is summed per gene, integrated over the path by
Gauss-Legendre quadrature, and averaged over the background. Genes that only the background has also get a
value, because their absence is evidence. So do genes measured on only one side, if the background's datasets
measured different genes. This is expected gradients with quadrature instead of random points, which needs
fewer passes for the same error. The values of a cell sum to its logit minus the background's mean logit, up
to `additivity_error`: the quadrature error plus jumps of LSH attention when a hash changes along the path.

`shap.GradientExplainer` cannot be used here. It needs inputs of one shape for cell and background, without
presence, and its `(model, layer)` mode multiplies gradients by the interpolated activation instead of the
difference, so the sums are wrong. If neither matters (a network in which every gene is a token), both agree;
tests/unit/test_explain.py checks this.

Everything runs in eval mode, with the ordinary (not reversible) backward pass and the hashes of `HASH_SEED`.

Axes: n cells, r rows (pairs of background cell and node of the path), l token slots, g genes, d model width,
k classes.

Source: Erion et al., Improving performance of deep learning models with axiomatic attribution priors and
expected gradients, 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from screformer.attention import LocalSelfAttention
from screformer.cell_tokens import CellTokens
from screformer.model import HASH_SEED, ScReformer
from screformer.tokenizer import NUM_SPECIAL

NUM_NODES = 3
"""Points on the path per background cell. Sums are accurate to about 2 % with 2 points and 0.2 % with 4
(blood cells, LSH attention)."""
_TOKENS_AT_ONCE = 16_384


@dataclass(frozen=True, eq=False, kw_only=True)
class Attribution:
    """Explanation of one cell's logit of one class."""

    genes: np.ndarray
    """Vocabulary indices of the genes of the cell and the background, increasing, int32."""
    values: np.ndarray
    """Contribution of each gene to the logit, float32."""
    label: int
    """The class."""
    output: float
    """The cell's logit."""
    base: float
    """Mean logit of the background."""

    @property
    def additivity_error(self) -> float:
        """Absolute difference between the summed values and output minus base."""
        return abs(float(self.values.sum(dtype=np.float64)) - (self.output - self.base))


class Explainer:
    """Attributes a model's logits to genes, against a fixed background.

    Args:
        model: A network with classes, in eval mode; any attention except local.
        background: Cells to compare with.
        num_nodes: Number of points on each path.
        hash_seed: Seed of the LSH hashes; change it only to measure the influence of the hashes.

    Raises:
        ValueError: The model has local attention, or the background is empty.
    """

    def __init__(
        self,
        model: ScReformer,
        background: Sequence[CellTokens],
        *,
        num_nodes: int = NUM_NODES,
        hash_seed: int = HASH_SEED,
    ):
        if not background:
            raise ValueError("the background has no cells; pass at least one")
        if any(isinstance(layer, LocalSelfAttention) for layer in model.modules()):
            raise ValueError(
                "a model with model.attention='local' cannot be explained; any other attention can"
            )
        self._model = model
        self._device = next(model.parameters()).device
        self._hash_seed = hash_seed
        self._background = list(background)
        nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
        self._nodes, self._weights = (nodes + 1) / 2, weights / 2
        self._background_measured_g = np.sum([other.measured_g for other in self._background], axis=0)
        self._base_bk = np.concatenate([self.logits([cell]) for cell in self._background])

    def logits(self, cells: Sequence[CellTokens]) -> np.ndarray:
        """The network's logits of cells, float32 (n, k)."""
        with torch.no_grad():
            output = self._model(self._batch(cells), task="finetune", hash_seed=self._hash_seed)
        assert output.logits_nk is not None
        return output.logits_nk.float().cpu().numpy()

    def attribute(self, cell: CellTokens, labels: Sequence[int]) -> list[Attribution]:
        """The contribution of each gene to the cell's logits for the given classes."""
        num_genes = self._model.num_genes
        sums = np.zeros((len(labels), num_genes + NUM_SPECIAL))
        seen = np.zeros(num_genes + NUM_SPECIAL, dtype=bool)
        pairs = [_Pair.of(cell, other) for other in self._background]
        for group in _groups(pairs, len(self._nodes)):
            ids, gradients = self._integrate(group, labels, cell.measured_g)
            for row, token_ids in enumerate(ids):
                seen[token_ids] = True
                for index in range(len(labels)):
                    sums[index, token_ids] += gradients[index][row][: len(token_ids)]
        self._add_panels(cell, labels, sums, seen)
        seen[:NUM_SPECIAL] = False
        genes = np.flatnonzero(seen)
        output = self.logits([cell])[0]
        return [
            Attribution(
                genes=(genes - NUM_SPECIAL).astype(np.int32),
                values=(sums[index, genes] / len(self._background)).astype(np.float32),
                label=int(label),
                output=float(output[label]),
                base=float(self._base_bk[:, label].mean()),
            )
            for index, label in enumerate(labels)
        ]

    def _add_panels(
        self, cell: CellTokens, labels: Sequence[int], sums: np.ndarray, seen: np.ndarray
    ) -> None:
        """Add the effect of differences between the cell's and the background's gene panels.

        Exact, because this part is linear.
        """
        skip = self._model.linear_skip
        if skip is None:
            return
        moved_g = (
            len(self._background) * cell.measured_g - self._background_measured_g
        ) * skip.center.double().cpu().numpy()
        weights_gk = skip.weight.weight[NUM_SPECIAL:, list(labels)].detach().double().cpu().numpy()
        sums[:, NUM_SPECIAL:] -= (moved_g[:, None] * weights_gk).T
        seen[NUM_SPECIAL:] |= moved_g != 0

    def _batch(self, cells: Sequence[CellTokens]) -> dict[str, Tensor]:
        arrays = {
            name: [getattr(cell, name) for cell in cells] for name in ("token_ids", "values", "bin_ids")
        }
        padded = {name: torch.from_numpy(_pad(rows)) for name, rows in arrays.items()}
        batch = {name: tensor if name == "values" else tensor.long() for name, tensor in padded.items()}
        batch |= {
            "measured": torch.from_numpy(np.stack([cell.measured_g for cell in cells])),
            "panels": torch.arange(len(cells)),
        }
        return {name: tensor.to(self._device) for name, tensor in batch.items()}

    def _integrate(
        self, pairs: Sequence[_Pair], labels: Sequence[int], measured_g: np.ndarray
    ) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
        """Token ids of each pair, and by class and pair the integrated gradient times change of each token.

        The whole path uses the cell's panel. With an additive encoder, the sums are therefore correct only if
        the background has the same panel.
        """
        model, device, count = self._model, self._device, len(self._nodes)
        ids = torch.from_numpy(_pad([pair.token_ids for pair in pairs])).long().to(device)
        ends = {}
        with torch.no_grad():
            for side in ("cell", "other"):
                values = torch.from_numpy(_pad([getattr(pair, f"{side}_values") for pair in pairs])).to(
                    device
                )
                bins = (
                    torch.from_numpy(_pad([getattr(pair, f"{side}_bins") for pair in pairs]))
                    .long()
                    .to(device)
                )
                present = torch.from_numpy(_pad([getattr(pair, f"{side}_present") for pair in pairs])).to(
                    device
                )
                ends[side] = [model.embed_tokens(ids, values, bins), present, values]
            # Tokens that only one cell has change in presence, not in embedding.
            for side, else_side in (("cell", "other"), ("other", "cell")):
                lacks = (ends[side][1] == 0).unsqueeze(-1)
                ends[side][0] = torch.where(lacks, ends[else_side][0], ends[side][0])
        changes = [to - start for to, start in zip(ends["cell"], ends["other"], strict=True)]
        node_r = torch.tensor(np.repeat(self._nodes, len(pairs)), dtype=torch.float32, device=device)
        weight_r = torch.tensor(np.repeat(self._weights, len(pairs)), dtype=torch.float32, device=device)
        points = []
        for start, change in zip(ends["other"], changes, strict=True):
            shape = (-1,) + (1,) * (change.ndim - 1)
            tiled = [part.repeat(count, *(1,) * (part.ndim - 1)) for part in (start, change)]
            points.append((tiled[0] + node_r.view(shape) * tiled[1]).requires_grad_())
        with torch.enable_grad():
            x_rld, presence_rl, values_rl = points
            measured_pg = torch.from_numpy(measured_g[None]).to(device)
            batch = {"token_ids": ids.repeat(count, 1), "values": values_rl, "measured": measured_pg}
            output = model.forward_embedded(
                x_rld, batch, task="finetune", hash_seed=self._hash_seed, presence_nl=presence_rl
            )
        logits = output.logits_nk
        assert logits is not None
        found: list[list[np.ndarray]] = []
        for index, label in enumerate(labels):
            last = index == len(labels) - 1
            grads = torch.autograd.grad(
                (logits[:, label] * weight_r).sum(), points, retain_graph=not last, allow_unused=True
            )
            total = torch.zeros(ids.shape, device=device)
            for grad, change in zip(grads, changes, strict=True):
                if (
                    grad is None
                    # None for values if there is no linear skip, and for presence if there is no attention or
                    # pooling over tokens.
                ):
                    continue
                part = grad.unflatten(0, (count, len(pairs))).sum(0) * change
                total += part.sum(-1) if part.ndim == 3 else part
            summed = total.cpu().numpy()
            found.append(list(summed))
        return [pair.token_ids for pair in pairs], found


@dataclass(frozen=True, eq=False)
class _Pair:
    """The combined tokens of a cell and a background cell, in vocabulary order, [CLS] first."""

    token_ids: np.ndarray
    cell_values: np.ndarray
    cell_bins: np.ndarray
    cell_present: np.ndarray
    other_values: np.ndarray
    other_bins: np.ndarray
    other_present: np.ndarray

    @classmethod
    def of(cls, cell: CellTokens, other: CellTokens) -> _Pair:
        token_ids = np.union1d(cell.token_ids, other.token_ids)
        sides = []
        for one in (cell, other):
            place = np.searchsorted(token_ids, one.token_ids)
            for source in (one.values, one.bin_ids, np.ones(len(place), dtype=np.float32)):
                whole = np.zeros(len(token_ids), dtype=source.dtype)
                whole[place] = source
                sides.append(whole)
        return cls(token_ids, *sides)


def _groups(pairs: Sequence[_Pair], num_nodes: int) -> list[list[_Pair]]:
    """Group pairs of similar length, with a limit on tokens per group."""
    ordered = sorted(pairs, key=lambda pair: len(pair.token_ids))
    groups: list[list[_Pair]] = [[]]
    for pair in ordered:
        if groups[-1] and len(pair.token_ids) * (len(groups[-1]) + 1) * num_nodes > _TOKENS_AT_ONCE:
            groups.append([])
        groups[-1].append(pair)
    return groups


def _pad(rows: Sequence[np.ndarray]) -> np.ndarray:
    padded = np.zeros((len(rows), max(map(len, rows))), dtype=rows[0].dtype)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded
