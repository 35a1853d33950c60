"""Models made by hand, whose circuits are known, each with a crosscoder that is perfect for it.

Tokens are the inputs: token t stands for the bits of t, as +-1, on orthogonal directions. Attention does nothing and
there are no norms, so that each position is a text of its own. The answer is the likeliest of the tokens 0 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

from clt_plugin import Crosscoder, Wiring

D_MODEL = 12
CONSTANT = 11
"""The direction in which every token has 1."""


@dataclass
class Toy:
    """A model and what it should say.

    Attributes:
        hf: The model.
        clt: A crosscoder without any error.
        ids: Every input, a text of one token each, (n, 1).
        answers: What the model should answer, 0 or 1, (n,).
    """

    hf: nn.Module
    clt: Crosscoder
    ids: Tensor
    answers: Tensor

    def right(self, logits: Tensor) -> float:
        """The share of right answers, for logits at every input, (n, 1, vocabulary)."""
        return float((logits[:, -1].argmax(-1).cpu() == self.answers).double().mean())


def _directions() -> Tensor:
    """Orthonormal rows, along no axis: a mix-up of axes would show."""
    return torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(3)).double())[0]


def _model(n_bits: int, n_neurons: int) -> nn.Module:
    """A GPT-2 of two layers that has only its embedding."""
    config = transformers.GPT2Config(
        vocab_size=2**n_bits, n_embd=D_MODEL, n_layer=2, n_head=1, n_inner=n_neurons, n_positions=8,
        activation_function="relu", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    hf = transformers.GPT2LMHeadModel(config).eval().double().requires_grad_(False)
    for parameter in hf.parameters():
        parameter.zero_()
    for block in hf.transformer.h:
        block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
    hf.transformer.ln_f = nn.Identity()
    bits = torch.tensor([[1.0 if token >> bit & 1 else -1.0 for bit in range(n_bits)] for token in range(2**n_bits)])
    directions = _directions()
    hf.transformer.wte.weight.copy_(bits.double() @ directions[:n_bits] + directions[CONSTANT])
    return hf


def _neuron(hf: nn.Module, layer: int, neuron: int, reads: dict[int, float], bias: float, writes: int) -> None:
    """Have a neuron compute ReLU(sum of weighted directions + bias) and write it along a direction."""
    mlp, directions = hf.transformer.h[layer].mlp, _directions()
    mlp.c_fc.weight[:, neuron] = sum(weight * directions[i] for i, weight in reads.items())
    mlp.c_fc.bias[neuron] = bias
    mlp.c_proj.weight[neuron] = directions[writes]


def _answer(hf: nn.Module, direction: int, threshold: float) -> None:
    """Let token 1 win where a direction exceeds a threshold, else token 0."""
    directions = _directions()
    head = hf.lm_head.weight
    head.copy_(-4 * directions[CONSTANT].expand_as(head))
    head[0] = 4 * threshold * directions[CONSTANT]
    head[1] = 4 * directions[direction]


def _empty_clt(sizes: tuple[int, int]) -> Crosscoder:
    clt = Crosscoder(Wiring.clt(2, read="resid_mid"), D_MODEL, sizes, "relu").double().eval().requires_grad_(False)
    for parameter in clt.parameters():
        parameter.zero_()
    return clt


def _latent(clt: Crosscoder, hf: nn.Module, layer: int, neuron: int, latent: int, targets: tuple[int, ...]) -> None:
    """Have a latent do what a neuron does, and write it at several layers."""
    mlp = hf.transformer.h[layer].mlp
    clt.W_enc[layer][:, latent] = mlp.c_fc.weight[:, neuron]
    clt.b_enc[layer][latent] = mlp.c_fc.bias[neuron]
    for site, columns in clt.layout.write_slices[layer].items():
        if site.layer in targets:
            clt.W_dec[layer][latent, columns] = mlp.c_proj.weight[neuron]


def _toy(hf: nn.Module, clt: Crosscoder, answers: list[int], dtype: torch.dtype) -> Toy:
    ids = torch.arange(len(answers))[:, None]
    return Toy(hf.to(dtype), clt.to(dtype), ids, torch.tensor(answers))


def boolean_toy(dtype: torch.dtype = torch.float64) -> Toy:
    """(a XOR b) AND (c XOR d): layer 0 finds the differences, and layer 1 computes from what layer 0 wrote.

    Layer 0 has e, f = ReLU(+-(a - b) - 1) and g, h likewise on c, d; layer 1 has i = ReLU(e + f + g + h - 1).
    """
    hf = _model(n_bits=4, n_neurons=4)
    for neuron, (bit, sign) in enumerate([(0, 1.0), (0, -1.0), (2, 1.0), (2, -1.0)]):
        _neuron(hf, 0, neuron, {bit: sign, bit + 1: -sign}, -1.0, writes=4 + neuron)
    _neuron(hf, 1, 0, dict.fromkeys(range(4, 8), 1.0), -1.0, writes=8)
    _answer(hf, 8, 0.5)
    clt = _empty_clt((4, 1))
    for neuron in range(4):
        _latent(clt, hf, 0, neuron, neuron, targets=(0,))
    _latent(clt, hf, 1, 0, 0, targets=(1,))
    answers = [int((t & 1) != (t >> 1 & 1) and (t >> 2 & 1) != (t >> 3 & 1)) for t in range(16)]
    return _toy(hf, clt, answers, dtype)


def written_twice(from_layer_0: bool = False, one_feature: bool = True, dtype: torch.dtype = torch.float64) -> Toy:
    """a AND b, written at layer 0 and again at layer 1; the answer needs both.

    Layer 1 computes it from the embedding, as layer 0 does. The two models that ``from_layer_0`` makes do the same on
    every input.

    Args:
        from_layer_0: Have layer 1 compute it from what layer 0 wrote instead.
        one_feature: Whether the crosscoder has one feature, which writes at both layers and is perfect for both
            models, or one in each layer, that does what the neuron does.
        dtype: Of the weights.
    """
    hf = _model(n_bits=2, n_neurons=1)
    _neuron(hf, 0, 0, {0: 1.0, 1: 1.0}, -1.0, writes=4)
    if from_layer_0:
        _neuron(hf, 1, 0, {4: 1.0}, 0.0, writes=4)
    else:
        _neuron(hf, 1, 0, {0: 1.0, 1: 1.0}, -1.0, writes=4)
    _answer(hf, 4, 1.5)
    clt = _empty_clt((1, 1))
    _latent(clt, hf, 0, 0, 0, targets=(0, 1) if one_feature else (0,))
    if one_feature:
        clt.b_enc[1][0] = -1.0  # nothing is left for layer 1's to do
    else:
        _latent(clt, hf, 1, 0, 0, targets=(1,))
    return _toy(hf, clt, [0, 0, 0, 1], dtype)
