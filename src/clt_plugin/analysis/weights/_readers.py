"""What heads and neurons read of the residual stream, and what neurons write to it, by asking the model's modules.

The attention module is fed basis vectors and its queries, keys and values are seen as they arrive at transformers'
attention interface, at position 0, where rotary embedding turns nothing; of the MLP the input of its activation
function is seen: the gate in a gated MLP, the only pre-activation in a plain one. So fused projections, grouped
queries and norms of queries and keys need no code here. Denominators of norms, which differ from token to token, are
left out; gains and centring are folded in, or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from clt_plugin.adapters._attention import Call, blocks_of, part_of, take_over
from clt_plugin.adapters._frozen import record
from clt_plugin.adapters._norms import FrozenNorm
from clt_plugin.adapters.huggingface import HostModel
from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.errors import AttachError
from clt_plugin.core.wiring import Site

PARTS = ("q", "k", "v")
"""What of a head is read for."""
ADDED = ("attn_out", "mlp_out_before_norm", "mlp_out")
"""The sites whose writes are added to the residual stream."""
AT_A_TIME = 512
"""So many basis vectors are fed at a time."""


@dataclass(frozen=True, eq=False)
class Units:
    """Heads, or neurons, of every layer, as what they read.

    Attributes:
        kind: ``"head"`` or ``"neuron"``.
        weights: For each layer (units * width, d): a head's rows one after another; a neuron's single row, of length 1.
        width: How many rows a unit has.
        biases: For each layer what is added to it, (units * width,): of the projection, not of the norm before it.
    """

    kind: str
    weights: tuple[Tensor, ...]
    width: int
    biases: tuple[Tensor, ...]

    def count(self, layer: int) -> int:
        """Return how many units a layer has."""
        return len(self.weights[layer]) // self.width

    def strengths(self, layer: int, vectors: Tensor) -> Tensor:
        """Return ``|W v|`` for each head, or the product with each neuron's row, with its sign, (n, units).

        Args:
            layer: Whose units.
            vectors: (n, d).
        """
        read = vectors @ self.weights[layer].T
        return read if self.kind == "neuron" else read.unflatten(1, (-1, self.width)).norm(dim=2)

    def first_after(self, site: Site, parallel: bool) -> int:
        """Return the first layer whose units see what is added at a site; it may be one too many.

        Attention reads what enters its block, the MLP what attention has left; in parallel blocks both read the former.
        """
        beside = self.kind == "neuron" and site.name == "attn_out" and not parallel
        return site.layer if beside else site.layer + 1


@torch.no_grad()
def heads(hf: nn.Module, host: HostModel, part: str = "q", gains: bool = True) -> Units:
    """Find what every layer's heads read for their queries, keys or values.

    Args:
        hf: The plain model, in evaluation mode.
        host: What it is.
        part: ``"q"``, ``"k"`` or ``"v"``; of keys and values there may be fewer than of queries.
        gains: Whether to fold in the gain and the centring of the norm before attention, and the gains of norms of
            queries and keys.
    """
    if part not in PARTS:
        raise ValueError(f"heads read for one of {', '.join(PARTS)}, not {part!r}")
    one = torch.zeros(1, 1, dtype=torch.long, device=_device(hf))
    calls = record(hf, host, {"input_ids": one, "attention_mask": one + 1}).calls
    seen: dict[str, Tensor] = {}

    def act(layer: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        seen.update(q=query, k=key, v=value)
        return value.new_zeros(*query.transpose(1, 2).shape[:3], value.shape[-1]), None

    weights, biases, width = [], [], 1
    with ExitStack() as stack:
        take_over(stack, hf, host, act)
        for layer, block in enumerate(blocks_of(hf, host)):
            module, call = part_of(block, host.architecture.attention), calls[layer]
            for name, norm in module.named_modules():
                if "norm" in type(norm).__name__.lower():
                    stack.callback(norm.register_forward_hook(_linear(name, gains), prepend=True).remove)

            def ask(x: Tensor, module: nn.Module = module, call: Call = call) -> Tensor:
                call.repeat(module, x[:, None])
                return seen[part][:, :, 0].flatten(1)

            weight, bias = _asked(ask, host.d_model, hf)
            biases.append(bias)
            width = seen[part].shape[-1]
            weights.append(_folded(block, host.architecture.pre_attention_norm, weight, gains))
    return Units("head", tuple(weights), width, tuple(biases))


@torch.no_grad()
def neurons(hf: nn.Module, host: HostModel, gains: bool = True, normalised: bool = True) -> Units:
    """Find what every layer's neurons read: the gate's rows in a gated MLP, the input projection's in a plain one.

    Args:
        hf: The plain model.
        host: What it is.
        gains: Whether to fold in the gain and the centring of the norm before the MLP.
        normalised: Whether rows are brought to length 1, so that products with unit vectors are cosines.
    """
    weights, biases = [], []
    for block in blocks_of(hf, host):
        mlp = part_of(block, host.architecture.mlp)
        with Within(mlp) as within:
            weight, bias = within.rows(hf, host.d_model)
        weight = _folded(block, host.architecture.pre_mlp_norm, weight, gains)
        scale = weight.norm(dim=1).clamp_min(torch.finfo(weight.dtype).tiny) if normalised else torch.ones_like(bias)
        weights.append(weight / scale[:, None])
        biases.append(bias / scale)
    return Units("neuron", tuple(weights), 1, tuple(biases))


@torch.no_grad()
def unembedding(hf: nn.Module, host: HostModel, gains: bool = True) -> Tensor:
    """Return what each token's logit reads, (vocabulary, d), less the mean over tokens, which a softmax does not see.

    Args:
        hf: The plain model.
        host: What it is.
        gains: Whether to fold in the gain and centring of the final norm.
    """
    head = hf.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise AttachError(f"{type(hf).__name__} has no unembedding: load it with its language modelling head")
    weight = head.weight.detach().to(**_like(hf))
    if gains:
        norm = norm_of(part_of(hf, host.final_norm), weight, "the final norm")
        weight = norm.transposed(weight, norm.scale)
    return weight - weight.mean(0)


@torch.no_grad()
def neuron_writes(hf: nn.Module, host: HostModel) -> Iterator[Tensor]:
    """Yield what each neuron of each layer adds to the residual stream at activation 1, (d_mlp, d), layer by layer.

    A norm after the MLP is taken along without its denominator.
    """
    for block in blocks_of(hf, host):
        with Within(part_of(block, host.architecture.mlp)) as within:
            weight = within.writes(hf, host.d_model)
        name = host.architecture.post_mlp_norm
        yield weight if name is None else norm_of(part_of(block, name), weight, name).linear(weight)


def norm_of(module: nn.Module, like: Tensor, name: str) -> FrozenNorm:
    """Return a norm as a linear map with denominators of 1, in a tensor's dtype and on its device."""
    parameter = next(module.parameters(), like)
    probe = torch.linspace(-1, 1, like.shape[-1], dtype=parameter.dtype, device=parameter.device)[None, None]
    norm = FrozenNorm.of(module, probe, probe, name).to(like.dtype, like.device)
    return replace(norm, scale=torch.ones_like(norm.gain))


def to_stream(clt: Crosscoder, hf: nn.Module, host: HostModel, like: Tensor) -> Callable[[Site, Tensor], Tensor]:
    """Return what takes vectors from where they are written to the residual stream: through a norm after the MLP.

    Args:
        clt: Whose vectors they are.
        hf: The plain model.
        host: What it is.
        like: In whose dtype and on whose device to return them.
    """
    name = host.architecture.post_mlp_norm
    norms = {
        site: norm_of(hf.get_submodule(f"{host.blocks}.{site.layer}.{name}"), like, name)
        for site in clt.wiring.write_sites
        if name is not None and site.name == "mlp_out_before_norm"
    }

    def through(site: Site, vectors: Tensor) -> Tensor:
        vectors = vectors.to(like)
        return norms[site].linear(vectors) if site in norms else vectors

    return through


def _folded(block: nn.Module, name: str | None, weight: Tensor, gains: bool) -> Tensor:
    """Return rows, (n, d), as what they read before a norm; in models that have none there they stay as they are."""
    if name is None or not gains:
        return weight
    norm = norm_of(part_of(block, name), weight, name)
    return norm.transposed(weight, norm.scale)


def _linear(name: str, gains: bool) -> Callable[..., Tensor]:
    """Return a hook that puts a norm's linear part, with denominators of 1, or nothing, in its place."""

    def normalise(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return norm_of(module, args[0], name).linear(args[0]) if gains else args[0]

    return normalise


def _asked(ask: Callable[[Tensor], Tensor], width: int, hf: nn.Module) -> tuple[Tensor, Tensor]:
    """Return an affine map's matrix, (outputs, width), and constant, by feeding it nothing, then basis vectors."""
    nothing = ask(torch.zeros(1, width, **_like(hf)))
    columns = []
    for start in range(0, width, AT_A_TIME):
        n = min(AT_A_TIME, width - start)
        rows = torch.zeros(n, width, **_like(hf))
        rows[:, start : start + n].fill_diagonal_(1)
        columns.append(ask(rows) - nothing)
    return torch.cat(columns).T.contiguous(), nothing[0]


def _like(hf: nn.Module) -> dict[str, Any]:
    return {"dtype": torch.promote_types(next(hf.parameters()).dtype, torch.float32), "device": _device(hf)}


def _device(hf: nn.Module) -> torch.device:
    return next(hf.parameters()).device


class Within:
    """An MLP whose pre-activations are seen, run by run, and whose projections are known.

    Its activation function is the first of its parts without parameters that runs, its output projection the last with.

    Attributes:
        runs: What the activation function was given in each run, the last one last.
    """

    def __init__(self, mlp: nn.Module) -> None:
        self.mlp, self._stack = mlp, ExitStack()
        self.runs: list[Tensor] = []
        self._first: nn.Module | None = None
        self._feeding: nn.Module | None = None
        # The part with parameters that ran last, what it was given and what it made of it.
        self._last: nn.Module | None = None
        self._made: dict[int, tuple[nn.Module, Tensor, Tensor]] = {}
        self._given: Tensor | None = None

    def __enter__(self) -> Within:
        for part in self.mlp.modules():
            if part is self.mlp or next(part.children(), None) is not None:
                continue
            if next(part.parameters(), None) is None:
                self._stack.callback(part.register_forward_pre_hook(self._see).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def rows(self, hf: nn.Module, d_model: int) -> tuple[Tensor, Tensor]:
        """Return what neurons read of the MLP's input, (d_mlp, d_model), and their biases, (d_mlp,)."""
        self._look(hf, d_model)
        bias = self._pre_activations(torch.zeros(1, d_model, **_like(hf)))[0]
        weight = None if self._feeding is None else _matrix(self._feeding)
        if weight is None:
            weight = _asked(self._pre_activations, d_model, hf)[0]
        return weight.to(bias), bias

    def writes(self, hf: nn.Module, d_model: int) -> Tensor:
        """Return what the output projection makes of one neuron's activation of 1, (d_mlp, d_model)."""
        d_mlp = self._look(hf, d_model).shape[-1]
        assert self._last is not None
        weight, last = _matrix(self._last), self._last
        if weight is None:
            return _asked(lambda x: Call((), {}).repeat(last, x[None]), d_mlp, hf)[0].T
        return weight.T.to(**_like(hf))

    def _look(self, hf: nn.Module, d_model: int) -> Tensor:
        """Run once, and find which projection feeds the activation function, and which comes last."""
        self._given = torch.zeros(1, d_model, **_like(hf))
        with ExitStack() as stack:
            for part in self.mlp.modules():
                if (
                    part is not self.mlp
                    and next(part.children(), None) is None
                    and next(part.parameters(), None) is not None
                ):
                    stack.callback(part.register_forward_hook(self._keep).remove)
            seen = self._pre_activations(self._given)
        made = self._made.get(id(seen))
        # Only where nothing comes between the MLP's input, this projection, and the activation function.
        self._feeding = made[0] if made is not None and made[1] is self._given else None
        self._made.clear()
        return seen

    def _pre_activations(self, x: Tensor) -> Tensor:
        self.runs.clear()
        Call((), {}).repeat(self.mlp, x)
        if not self.runs:
            raise AttachError(
                f"{type(self.mlp).__name__} has no activation function as a module of its own, so that its neurons "
                "cannot be told from the rest"
            )
        return self.runs.pop()

    def _see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._first = self._first or module
        if module is self._first:
            self.runs.append(args[0])

    def _keep(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        # Kept alive, so that no other tensor takes its place and its number.
        self._last, self._made[id(output)] = module, (module, args[0], output)


def _matrix(module: nn.Module) -> Tensor | None:
    """Return a plain projection's matrix, (outputs, inputs); None of another kind of module, which is to be asked."""
    from transformers.pytorch_utils import Conv1D

    if type(module) is nn.Linear:
        return module.weight.detach()
    if isinstance(module, Conv1D):
        return module.weight.detach().T
    return None
