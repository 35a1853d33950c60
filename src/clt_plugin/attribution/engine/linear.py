"""The frozen linear map of one run: what carries a vector from the residual stream of one layer to later ones.

Attention patterns and norm denominators are those of the run. Then each layer's attention is, for head h with the
values of head j = h // r, ``x -> P_h x W_V[:, j] W_O[h]``, into which the norms before and after it are folded: gain
and centring into the weights, denominators into a scale for each key and query position. What a layer adds whatever it
reads is its `constant`.

Canonical shapes, in which a state of many sources or targets is carried::

    x, g    (positions, rows, d)   positions first, so that all rows at one position are a matrix
    W_V     (d, value heads, d_head)
    W_O     (heads, d_head, d)
    pattern (heads, queries, keys)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from clt_plugin.adapters._attention import ValueOutput, value_outputs
from clt_plugin.adapters._frozen import Recording, record
from clt_plugin.adapters._norms import FrozenNorm
from clt_plugin.adapters.huggingface import HostModel
from clt_plugin.attribution.engine._vectors import by_position
from clt_plugin.core.wiring import MODEL, Site

STATES = ("resid_pre", "attn_out", "resid_mid", "mlp_out_before_norm", "mlp_out", "resid_post")
"""What a layer holds, in the order in which a forward pass reaches it."""


@dataclass(frozen=True, eq=False)
class Spread:
    """What one attention makes of rows that are each at one position: a vector a head, in shares at other positions.

    What is linear in it costs as much as that of a few vectors, not of as many as there are positions.

    Attributes:
        heads: Each head's vectors, (heads, rows, d).
        shares: For rows at the same position: the first position that they reach, which they are, and how much of
            each head's vector arrives there and at each position that follows, (positions reached, heads).
    """

    heads: Tensor
    shares: Sequence[tuple[int, slice, Tensor]]

    def add_to(self, out: Tensor, start: int) -> None:
        """Add it to states at positions from start on, (m, rows, d)."""
        for first, rows, share in self.shares:
            into = out[first - start : first - start + len(share), rows]
            into.view(len(into), -1).addmm_(share, self.heads[:, rows].flatten(1))


@dataclass(frozen=True, eq=False)
class FrozenLayer:
    """One layer of the frozen map.

    Attributes:
        W_V: What attention reads, the norm before it folded in, (d, value heads, d_head).
        W_O: What it writes, a norm after it folded in, (heads, d_head, d).
        pattern: (heads, queries, keys).
        key_scale: One over the denominator of the norm before attention, (position,), or None.
        query_scale: That of the norm after it, or None.
        constant: What attention adds whatever it reads, (position, d).
        mlp_in: The norm between the residual stream and the MLP, or None.
        mlp_out: The norm between the MLP and the residual stream, or None.
    """

    W_V: Tensor
    W_O: Tensor
    pattern: Tensor
    key_scale: Tensor | None
    query_scale: Tensor | None
    constant: Tensor
    mlp_in: FrozenNorm | None
    mlp_out: FrozenNorm | None

    @classmethod
    def of(
        cls, found: ValueOutput, pattern: Tensor, norms: Mapping[str, FrozenNorm | None], dtype: torch.dtype
    ) -> FrozenLayer:
        """Fold a layer's norms into its attention.

        Args:
            found: What the attention module does to values.
            pattern: (heads, queries, keys).
            norms: ``before`` and ``after`` attention, ``mlp_in`` and ``mlp_out``.
            dtype: Of the map.
        """
        W_V, W_O, bias = found.W_V, found.W_O, found.value_bias
        before, after = norms["before"], norms["after"]
        pattern = pattern.to(dtype)
        if before is not None:
            bias = bias + torch.einsum("d,djk->jk", before.bias, W_V)
            W_V = _folded(before, W_V.flatten(1).T).T.reshape(W_V.shape)
        rows = pattern.sum(-1).unflatten(0, (len(bias), -1))  # (value heads, heads each, queries)
        constant = torch.einsum("jrq,jk,jrkd->qd", rows, bias, W_O.unflatten(0, (len(bias), -1))) + found.output_bias
        if after is not None:
            constant = after.linear(constant)[0] + after.bias
            W_O = after.gain * (W_O - W_O.mean(-1, keepdim=True) if after.centred else W_O)
        return cls(
            W_V=W_V,
            W_O=W_O,
            pattern=pattern,
            key_scale=None if before is None else before.scale[0, :, 0],
            query_scale=None if after is None else after.scale[0, :, 0],
            constant=constant,
            mlp_in=norms["mlp_in"],
            mlp_out=norms["mlp_out"],
        )

    def attend(self, x: Tensor, start: int, out: Tensor) -> None:
        """Carry states through attention, and add the result.

        Args:
            x: At positions start to start + m, all zero before: (m, rows, d).
            start: The first position.
            out: Where to add, of the same shape; may be x itself.
        """
        self.put_out(self.mix(self.values(x), start), out)

    @cached_property
    def shares(self) -> Tensor:
        """How much of each key's value arrives at each query, the norms' scales included, (heads, queries, keys)."""
        shares = self.pattern if self.key_scale is None else self.pattern * self.key_scale
        return shares if self.query_scale is None else shares * self.query_scale[:, None]

    def values(self, x: Tensor) -> Tensor:
        """Return the values of vectors, but for the key scale: (..., value heads * d_head) for (..., d)."""
        return x @ self.W_V.flatten(1)

    def mix(self, values: Tensor, start: int) -> Tensor:
        """Return what heads make of values, (m, rows, heads * d_head).

        Args:
            values: Of `values`, at positions start to start + m, (m, rows, value heads * d_head).
            start: The first position.
        """
        (m, rows, _), (kv, d_head) = values.shape, self.W_V.shape[1:]
        here = slice(start, start + m)
        values = values.view(m, rows, kv, d_head).permute(2, 0, 1, 3).reshape(kv, m, rows * d_head)
        mixed = torch.bmm(self.shares[:, here, here].reshape(kv, -1, m), values).view(-1, m, rows, d_head)
        return mixed.permute(1, 2, 0, 3).reshape(m, rows, -1)

    def put_out(self, mixed: Tensor, out: Tensor) -> None:
        """Add to ``out``, (m, rows, d), what heads write of ``mixed``, of `mix`."""
        weight = self.W_O.flatten(0, 1)
        out.view(-1, out.shape[-1]).addmm_(mixed.view(-1, len(weight)), weight)

    def spread(self, x: Tensor, places: Iterable[tuple[int, slice]]) -> Spread:
        """Return what attention makes of vectors that are each at one position.

        Args:
            x: (rows, d).
            places: Positions, and which rows are there.
        """
        group = len(self.W_O) // self.W_V.shape[1]
        values = self.values(x).view(len(x), -1, self.W_V.shape[-1])
        heads = torch.bmm(values.repeat_interleave(group, 1).transpose(0, 1), self.W_O)
        return Spread(heads, [(at, rows, self.shares[:, at:, at].T) for at, rows in places])

    def attend_transposed(self, g: Tensor, out: Tensor) -> None:
        """Carry gradients back through attention, and add the result.

        Args:
            g: At the first m positions, (m, rows, d).
            out: Where to add, of the same shape; may be g itself.
        """
        self.take_in(self.unmix(self.put_out_transposed(g)), out)

    @cached_property
    def _taken_out(self) -> Tensor:
        """``W_O`` transposed, (heads, d, d_head)."""
        return self.W_O.transpose(1, 2).contiguous()

    def put_out_transposed(self, g: Tensor) -> Tensor:
        """Return gradients at heads' outputs, but for the query scale: (heads, ..., d_head) for (..., d).

        Heads come first, so that `unmix` need not move them there.
        """
        flat = g.reshape(-1, g.shape[-1])
        return torch.bmm(flat.expand(len(self.W_O), -1, -1), self._taken_out).unflatten(1, g.shape[:-1])

    def unmix(self, mixed: Tensor) -> Tensor:
        """Return gradients at values, but for their weights, (m, rows, value heads * d_head).

        Args:
            mixed: Of `put_out_transposed`, at the first m positions, (heads, m, rows, d_head).
        """
        (_, m, rows, d_head), kv = mixed.shape, self.W_V.shape[1]
        shares = self.shares[:, :m, :m].reshape(kv, -1, m)
        values = torch.bmm(shares.transpose(1, 2), mixed.view(kv, -1, rows * d_head)).view(kv, m, rows, d_head)
        return values.permute(1, 2, 0, 3).reshape(m, rows, -1)

    def take_in(self, values: Tensor, out: Tensor) -> None:
        """Add to ``out``, (m, rows, d), the gradients at what is read for those at values, of `unmix`."""
        weight = self.W_V.flatten(1)
        out.view(-1, out.shape[-1]).addmm_(values.view(-1, weight.shape[1]), weight.T)

    def attend_from_transposed(self, g: Tensor, at: Tensor, out: Tensor) -> Spread | None:
        """Carry gradients that are each at one position back through attention, and add the result.

        Args:
            g: (rows, d).
            at: Where each is, (rows,).
            out: Where to add, (m, rows, d).

        Returns:
            What was added; None where that is not so simple.
        """
        group = len(self.W_O) // self.W_V.shape[1]
        mixed = self.put_out_transposed(g)
        back = self.W_V.permute(1, 2, 0).repeat_interleave(group, 0)  # (heads, d_head, d)
        shares = [(0, rows, self.shares[:, here, : here + 1].T) for here, rows in by_position(at)]
        spread = Spread(torch.bmm(mixed, back), shares)
        spread.add_to(out, 0)
        return spread

    def to(self, device: torch.device) -> FrozenLayer:
        """Return the layer on another device."""
        return replace(self, **{each.name: moved(getattr(self, each.name), device) for each in fields(self)})


def _folded(norm: FrozenNorm, vectors: Tensor) -> Tensor:
    """Fold a norm's gain and centring, but not its scale, into functionals of its output, (n, d)."""
    return norm.transposed(vectors, torch.ones((), dtype=vectors.dtype, device=vectors.device))


def moved(value: Any, device: torch.device) -> Any:
    """Return a value with all tensors in it, or in what its fields and parts hold, on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, FrozenNorm):
        return value.to(value.gain.dtype, device)
    if isinstance(value, dict):
        return {key: moved(each, device) for key, each in value.items()}
    if isinstance(value, tuple) and value and not isinstance(value[0], int | str):
        return tuple(moved(each, device) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: moved(getattr(value, each.name), device) for each in fields(value)})
    return value


@dataclass(frozen=True, eq=False)
class FrozenMap:
    """The frozen linear map of one prompt.

    Attributes:
        layers: The layers.
        final_norm: The norm before the unembedding.
        parallel: Whether attention and MLP read the same, so that the MLP's norm reads ``resid_pre``.
        recording: The run, whose sites, embeddings and logits were kept.
        host: What the model is.
        unembedding: (vocabulary, d), in the model's own dtype; None without a head.
        unembedding_bias: (vocabulary,), or None.
        dtype: In which the map is.
    """

    layers: tuple[FrozenLayer, ...]
    final_norm: FrozenNorm
    parallel: bool
    recording: Recording
    host: HostModel
    unembedding: Tensor | None
    unembedding_bias: Tensor | None
    dtype: torch.dtype

    @classmethod
    def of(
        cls, hf: nn.Module, inputs: Mapping[str, Any], sites: Sequence[Site] = (), dtype: torch.dtype | None = None
    ) -> FrozenMap:
        """Run a model once and keep what is linear of it.

        Args:
            hf: The plain Hugging Face model (`plain_model`), in evaluation mode.
            inputs: Its keyword arguments, one row.
            sites: Sites whose values to keep beside those that are needed here.
            dtype: Of the map; the model's by default, float32 at least.

        Raises:
            FreezeError: The model cannot be recorded, or has norms that are not linear once frozen.
        """
        host = HostModel.of(hf)
        needed = [Site(MODEL, "resid_pre", layer) for layer in range(host.n_layers)]
        needed += [Site(MODEL, "attn_out", layer) for layer in range(host.n_layers)]
        needed += [Site(MODEL, "resid_post", host.n_layers - 1)]
        kept = record(hf, host, inputs, (*needed, *sites), linear=True)
        if dtype is None:
            dtype = torch.promote_types(kept.sites[needed[0]].dtype, torch.float32)
        asked = torch.promote_types(dtype, torch.float32)
        found = value_outputs(hf, host, kept.calls, kept.patterns, asked)
        names = host.architecture

        def norm(layer: int, name: str | None) -> FrozenNorm | None:
            return None if name is None else kept.norms[layer, name].to(asked, kept.patterns[layer].device)

        layers = []
        for layer in range(host.n_layers):
            norms = {
                "before": norm(layer, names.pre_attention_norm),
                "after": norm(layer, names.post_attention_norm),
                "mlp_in": norm(layer, names.pre_mlp_norm),
                "mlp_out": norm(layer, names.post_mlp_norm),
            }
            layers.append(FrozenLayer.of(found[layer], kept.patterns[layer][0], norms, asked))
        head: Any = hf.get_output_embeddings()  # type: ignore[operator]
        frozen = cls(
            layers=tuple(layers),
            final_norm=kept.final_norm.to(asked, kept.final_norm.gain.device),
            parallel=host.parallel,
            recording=kept,
            host=host,
            unembedding=None if head is None else head.weight.detach(),
            unembedding_bias=None if getattr(head, "bias", None) is None else head.bias.detach(),
            dtype=dtype,
        )
        return frozen if dtype == asked else frozen._in(dtype)

    @property
    def n_layers(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    @property
    def n_positions(self) -> int:
        """How many positions the prompt has."""
        return self.layers[0].pattern.shape[-1]

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return self.layers[0].W_V.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the map is."""
        return self.layers[0].W_V.device

    def state(self, site: Site) -> tuple[int, str, FrozenNorm | None]:
        """Return what a site's value is a function of: (layer, one of `STATES`, the norm in between or None)."""
        layer = self.layers[site.layer]
        stream = "resid_pre" if self.parallel else "resid_mid"
        if site.name == "mlp_in":
            return site.layer, stream, layer.mlp_in
        if site.name == "mlp_in_before_gain":
            assert layer.mlp_in is not None
            ones = torch.ones_like(layer.mlp_in.gain)
            return site.layer, stream, replace(layer.mlp_in, gain=ones, bias=torch.zeros_like(ones))
        if site.name == "mlp_out_before_norm" and layer.mlp_out is None:
            return site.layer, "mlp_out", None
        return site.layer, site.name, None

    def value(self, layer: int, state: str) -> Tensor:
        """Return what one of a layer's `STATES` held in the recorded run, (position, d)."""
        kept = self.recording.sites

        def at(name: str, layer: int = layer) -> Tensor:
            return kept[Site(MODEL, name, layer)][0].to(self.device, self.dtype)

        if state == "resid_mid":
            return at("resid_pre") + at("attn_out")
        if state == "resid_post" and layer + 1 < self.n_layers:
            return at("resid_pre", layer + 1)
        if state == "mlp_out":
            return self.recording.mlp_out[layer][0].to(self.device, self.dtype)
        return at(state)

    def to(self, device: torch.device) -> FrozenMap:
        """Return the map on another device; the recording stays where it is."""
        if device == self.device:
            return self
        layers = tuple(layer.to(device) for layer in self.layers)
        return replace(self, layers=layers, final_norm=moved(self.final_norm, device))

    def _in(self, dtype: torch.dtype) -> FrozenMap:
        """Return the map in a narrower dtype than it was made in."""

        def narrow(value: Any) -> Any:
            if isinstance(value, FrozenNorm):
                return value.to(dtype, value.gain.device)
            return value.to(dtype) if isinstance(value, Tensor) else value

        layers = (replace(one, **{n.name: narrow(getattr(one, n.name)) for n in fields(one)}) for one in self.layers)
        return replace(self, layers=tuple(layers), final_norm=narrow(self.final_norm), dtype=dtype)
