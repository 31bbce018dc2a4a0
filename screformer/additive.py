"""Additive encoder: a cell vector is a sum of independent contributions of its genes.

Axes: n cells, l token slots, g genes of the vocabulary, i input genes, p gene panels, d model width, r
responses.

    token of gene g with value v:  E_g * sum_r W_r response_r(v)
    cell:  h = gain * (sum of its tokens - sum over the measured genes of their usual token) / scale + bias
           h + W2 gelu(W1 h)

A gene that was measured but not detected has no token, so it contributes minus its usual token. A gene that
was not measured contributes nothing. Reasons and numbers: docs/log/2026-11-26-additive-encoder.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from screformer.config import ModelConfig
from screformer.tokenizer import NUM_SPECIAL

NUM_RESPONSES = 4
_RESPONSE_STD = 0.3
"""Standard deviation of the random initial weights of all responses but the first."""


def responses(values: Tensor) -> Tensor:
    """Response curves to expression: linear, early saturation, onset at about 1.5, onset at about 3.

    Each is exactly 0 where the value is 0. Shape (..., r).
    """
    steps = [
        torch.sigmoid(4 * (values - at)) - torch.sigmoid(values.new_tensor(-4 * at)) for at in (1.5, 3.0)
    ]
    return torch.stack([values, torch.tanh(2 * values), *steps], dim=-1)


class AdditiveEncoder(nn.Module):
    """Maps the tokens of a cell to its cell vector, without attention.

    Args:
        model: Uses `dim` and `input_genes`.
        num_genes: Size of the vocabulary.
    """

    def __init__(self, model: ModelConfig, num_genes: int):
        super().__init__()
        num_inputs = min(model.input_genes, num_genes)
        self.genes = nn.Embedding(num_inputs, model.dim)
        self.mix = nn.Linear(NUM_RESPONSES, model.dim, bias=False)
        self.affine = _Affine(model.dim)
        self.inner = nn.Linear(model.dim, model.dim)
        self.outer = nn.Linear(model.dim, model.dim)
        self.slots: Tensor
        """Row in `genes` of each gene of the vocabulary, int64 (g,); -1 for a gene that is not an input."""
        self.center: Tensor
        """Usual responses of each input gene, (i, r)."""
        self.scale: Tensor
        slots = torch.arange(num_genes)
        self.register_buffer("slots", torch.where(slots < num_inputs, slots, -1))
        self.register_buffer("center", torch.zeros(num_inputs, NUM_RESPONSES))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """Initialise the parameters outside plain layers: only the first response is active."""
        self.mix.weight.normal_(0, _RESPONSE_STD, generator=generator)
        self.mix.weight[:, 0] = 1
        nn.init.zeros_(self.outer.weight)

    @torch.no_grad()
    def set_start(self, slots_g: Tensor, center_ir: Tensor, genes_id: Tensor, scale: Tensor) -> None:
        """Start from the input genes found by `screformer.additive_start`.

        Raises:
            ValueError: The shapes differ.
        """
        pairs = ((self.slots, slots_g), (self.center, center_ir), (self.genes.weight, genes_id))
        for ours, given in (*pairs, (self.scale, scale)):
            if ours.shape != given.shape:
                raise ValueError(
                    f"additive start has shape {tuple(given.shape)}, the network needs {tuple(ours.shape)}"
                )
            ours.copy_(given)

    def forward(
        self,
        token_ids_nl: Tensor,
        values_nl: Tensor,
        measured_pg: Tensor | None = None,
        panels_n: Tensor | None = None,
    ) -> Tensor:
        """Cell vectors (n, d), equal to `pool(tokens(...))`.

        Matrix products over all input genes make this several times as fast. Explanations need the two steps.
        """
        num_inputs = len(self.center)
        slots_nl = self._slots(token_ids_nl)
        values_ni = values_nl.new_zeros(len(values_nl), num_inputs + 1)
        values_ni.scatter_(1, torch.where(slots_nl < 0, num_inputs, slots_nl), values_nl)
        answers_nir = responses(values_ni[:, :num_inputs]) - self.center
        if measured_pg is not None:
            measured_pi = self._measured(measured_pg).to(values_nl.dtype)
            measured_ni = measured_pi[panels_n] if panels_n is not None else measured_pi
            answers_nir = answers_nir * measured_ni.unsqueeze(-1)
        found_nrd = torch.einsum("nir,id->nrd", answers_nir, self._all_genes())
        mixed_nd = (found_nrd * self.mix(torch.eye(NUM_RESPONSES, device=values_nl.device))).sum(1)
        return self._cell(mixed_nd)

    def tokens(self, token_ids_nl: Tensor, values_nl: Tensor) -> Tensor:
        """Contribution of each token, (n, l, d); 0 for special tokens and genes that are not inputs."""
        slots_nl = self._slots(token_ids_nl)
        answers_nlr = responses(values_nl) * (slots_nl >= 0).unsqueeze(-1)
        return self.genes(slots_nl.clamp(min=0)) * self.mix(answers_nlr)

    def pool(
        self,
        x_nld: Tensor,
        presence_nl: Tensor | None = None,
        measured_pg: Tensor | None = None,
        panels_n: Tensor | None = None,
    ) -> Tensor:
        """Cell vectors, (n, d).

        Args:
            x_nld: Output of `tokens`.
            presence_nl: Weight of each token in [0, 1], for explanations; None is 1.
            measured_pg: Genes of each panel; None if all were measured.
            panels_n: Panel of each cell; None if all cells have the first one.
        """
        usual_id = self._all_genes() * self.mix(self.center)
        if measured_pg is None:
            usual_pd = usual_id.sum(0, keepdim=True)
        else:
            usual_pd = self._measured(measured_pg).to(usual_id.dtype) @ usual_id
        found_nd = (x_nld if presence_nl is None else x_nld * presence_nl.unsqueeze(-1)).sum(1)
        usual_nd = usual_pd if panels_n is None else usual_pd[panels_n]
        return self._cell(found_nd - usual_nd)

    def _cell(self, sum_nd: Tensor) -> Tensor:
        h_nd = self.affine(sum_nd / self.scale.to(sum_nd.dtype))
        return h_nd + self.outer(F.gelu(self.inner(h_nd)))

    def _slots(self, token_ids_nl: Tensor) -> Tensor:
        return F.pad(self.slots, (NUM_SPECIAL, 0), value=-1)[token_ids_nl]

    def _all_genes(self) -> Tensor:
        return self.genes(torch.arange(len(self.center), device=self.center.device))

    def _measured(self, measured_pg: Tensor) -> Tensor:
        """The input genes of each panel, bool (p, i)."""
        genes = torch.nonzero(self.slots >= 0).squeeze(1)
        measured_pi = measured_pg.new_zeros(len(measured_pg), len(self.center))
        measured_pi[:, self.slots[genes]] = measured_pg[:, genes]
        return measured_pi


class _Affine(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x_nd: Tensor) -> Tensor:
        return x_nd * self.gain + self.bias
