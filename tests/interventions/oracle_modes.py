"""What `intervene` is to compute, once more and by hand: the oracle of the modes.

Each family's forward pass is written out in float64 from its weights, with attention patterns and norm denominators
computed or given; each mode is the sentence that defines it. Nothing of `clt_plugin.adapters` or
`clt_plugin.interventions` is used; of a crosscoder, its parameters, its wiring's table and its activation's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.reference import activate, blocks_of

FAMILIES = ("gpt2", "llama", "gemma2", "gemma3", "olmo2", "gpt_neox")

Key = tuple[str, int]
"""A norm's or a site's name, and its layer; the final norm is of layer -1."""

# attention, and the norms before and after it and the MLP, in each family's names
_PARTS = {
    "gpt2": ("attn", "ln_1", None, "ln_2", None),
    "llama": ("self_attn", "input_layernorm", None, "post_attention_layernorm", None),
    "olmo2": ("self_attn", None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "gpt_neox": ("attention", "input_layernorm", None, "post_attention_layernorm", None),
    "gemma2": (
        "self_attn",
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
_PARTS["gemma3_text"] = _PARTS["gemma2"]
_FINAL_NORM = {"gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}
_EMBEDDING = {"gpt2": "transformer.wte", "gpt_neox": "gpt_neox.embed_in"}


@dataclass
class Batch:
    """Token ids, and which of them are real, (batch, position) both."""

    ids: Tensor
    kept: Tensor

    @property
    def positions(self) -> Tensor:
        return (self.kept.long().cumsum(-1) - 1).clamp(min=0)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """A transformers model's keyword arguments."""
        return {"input_ids": self.ids, "attention_mask": self.kept.long(), "position_ids": self.positions}


@dataclass
class Seen:
    """What one forward pass held."""

    patterns: dict[int, Tensor] = field(default_factory=dict)
    scales: dict[Key, Tensor] = field(default_factory=dict)
    sites: dict[Key, Tensor] = field(default_factory=dict)
    unembedded: Tensor = field(default_factory=lambda: torch.empty(0))
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


Write = Callable[[Key, Tensor, Mapping[Key, Tensor]], Tensor]
"""What takes a written site's place, given what it would hold and all sites so far."""


# ---------------------------------------------------------------- the model


def _norm_parts(norm: nn.Module) -> tuple[Tensor, Tensor | float, float, bool]:
    """Gain, bias, epsilon, and whether the mean is subtracted."""
    if isinstance(norm, nn.LayerNorm):
        return norm.weight, norm.bias, norm.eps, True
    if "Gemma" in type(norm).__name__:
        return 1 + norm.weight, 0.0, norm.eps, False
    return norm.weight, 0.0, norm.variance_epsilon, False


class Hand:
    """A model's forward pass, by hand.

    Args:
        hf: The model, in float64; only its config and weights are used.
    """

    def __init__(self, hf: nn.Module) -> None:
        self.hf, self.config = hf, hf.config
        self.kind = self.config.model_type
        self.blocks = blocks_of(hf)
        self.parallel = self.kind == "gpt_neox" and self.config.use_parallel_residual

    def __call__(
        self,
        batch: Batch,
        write: Write = lambda site, value, sites: value,
        patterns: Mapping[int, Tensor] | None = None,
        scales: Mapping[Key, Tensor] | None = None,
    ) -> Seen:
        """Run it, with some attention patterns and some of the norms' scales given."""
        seen, patterns, scales = Seen(), patterns or {}, scales or {}
        sites = seen.sites

        def norm(name: str | None, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
            """The input once normalised, and the norm's output."""
            if name is None:
                return x, x
            owner = self.blocks[layer] if layer >= 0 else self.hf
            gain, bias, eps, centred = _norm_parts(owner.get_submodule(name))
            x = x - x.mean(-1, keepdim=True) if centred else x
            scale = (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
            scale = seen.scales[name, layer] = scales.get((name, layer), scale)
            return x * scale, gain * (x * scale) + bias

        x = self._embed(batch)
        for layer, block in enumerate(self.blocks):
            attention, before_attention, after_attention, before_mlp, after_mlp = _PARTS[self.kind]
            sites["resid_pre", layer] = x
            attended = self._attend(
                layer, block.get_submodule(attention), norm(before_attention, layer, x)[1], batch, patterns, seen
            )
            sites["attn_out", layer] = attended = norm(after_attention, layer, attended)[1]
            middle = x if self.parallel else x + attended
            sites["resid_mid", layer] = middle
            sites["mlp_in_before_gain", layer], sites["mlp_in", layer] = norm(before_mlp, layer, middle)
            y = write(("mlp_out_before_norm", layer), self._mlp(block.mlp, sites["mlp_in", layer]), sites)
            sites["mlp_out_before_norm", layer] = y
            y = write(("mlp_out", layer), norm(after_mlp, layer, y)[1], sites)
            sites["mlp_out", layer] = y
            x = sites["resid_post", layer] = x + attended + y
        x = norm(_FINAL_NORM.get(self.kind, "model.norm"), -1, x)[1]
        seen.unembedded = x @ self.hf.get_output_embeddings().weight.T
        cap = getattr(self.config, "final_logit_softcapping", None)
        seen.logits = cap * torch.tanh(seen.unembedded / cap) if cap else seen.unembedded
        return seen

    def _embed(self, batch: Batch) -> Tensor:
        x = self.hf.get_submodule(_EMBEDDING.get(self.kind, "model.embed_tokens")).weight[batch.ids]
        if self.kind == "gpt2":
            return x + self.hf.transformer.wpe.weight[batch.positions]
        return x * math.sqrt(self.config.hidden_size) if "gemma" in self.kind else x

    def _mlp(self, mlp: nn.Module, x: Tensor) -> Tensor:
        if self.kind == "gpt2":
            return F.gelu(x @ mlp.c_fc.weight + mlp.c_fc.bias, approximate="tanh") @ mlp.c_proj.weight + mlp.c_proj.bias
        if self.kind == "gpt_neox":
            return _linear(mlp.dense_4h_to_h, F.gelu(_linear(mlp.dense_h_to_4h, x)))
        gate = _linear(mlp.gate_proj, x)
        gate = F.gelu(gate, approximate="tanh") if "gemma" in self.kind else gate * torch.sigmoid(gate)
        return _linear(mlp.down_proj, gate * _linear(mlp.up_proj, x))

    def _attend(
        self, layer: int, module: nn.Module, x: Tensor, batch: Batch, patterns: Mapping[int, Tensor], seen: Seen
    ) -> Tensor:
        query, key, value = self._queries_keys_values(layer, module, x, batch)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        if layer not in patterns:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            scores = query @ key.transpose(-1, -2)
            scores = scores / math.sqrt(getattr(self.config, "query_pre_attn_scalar", query.shape[-1]))
            cap = getattr(module, "attn_logit_softcapping", None)
            scores = cap * torch.tanh(scores / cap) if cap else scores
            # Padding sees nothing, and nothing sees it: anything will do there but NaN.
            pattern = scores.masked_fill(~self._visible(layer, batch), -1e30).softmax(-1)
        else:
            pattern = patterns[layer]
        seen.patterns[layer] = pattern
        mixed = (pattern @ value).transpose(1, 2).flatten(2)
        if self.kind == "gpt2":
            return mixed @ module.c_proj.weight + module.c_proj.bias
        return _linear(module.dense if self.kind == "gpt_neox" else module.o_proj, mixed)

    def _visible(self, layer: int, batch: Batch) -> Tensor:
        """Which keys each query sees, (batch, 1, queries, keys)."""
        n = batch.ids.shape[1]
        back = torch.arange(n)[:, None] - torch.arange(n)
        visible = back >= 0
        kinds = getattr(self.config, "layer_types", None)
        if kinds and kinds[layer] == "sliding_attention":
            visible = visible & (back < self.config.sliding_window)
        return (visible & batch.kept.bool()[:, None, :])[:, None]

    def _queries_keys_values(self, layer: int, module: nn.Module, x: Tensor, batch: Batch) -> list[Tensor]:
        """Each (batch, heads, position, d_head)."""
        heads = self.config.num_attention_heads
        if self.kind == "gpt2":
            together = x @ module.c_attn.weight + module.c_attn.bias
            return [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in together.chunk(3, dim=-1)]
        if self.kind == "gpt_neox":
            each = _linear(module.query_key_value, x).unflatten(-1, (heads, -1)).transpose(1, 2)
            query, key, value = each.chunk(3, dim=-1)
        else:
            query, key, value = (_linear(getattr(module, f"{part}_proj"), x) for part in "qkv")
            if self.kind == "olmo2":
                query, key = _plain_norm(module.q_norm, query), _plain_norm(module.k_norm, key)
            query, key, value = (
                part.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2) for part in (query, key, value)
            )
            if self.kind == "gemma3_text":
                query, key = _plain_norm(module.q_norm, query), _plain_norm(module.k_norm, key)
        return [self._rotate(layer, query, batch), self._rotate(layer, key, batch), value]

    def _rotate(self, layer: int, x: Tensor, batch: Batch) -> Tensor:
        rope = self.config.rope_parameters
        rope = rope.get(self.config.layer_types[layer], rope) if self.kind == "gemma3_text" else rope
        n = int(x.shape[-1] * rope.get("partial_rotary_factor", 1))
        # In float32, as in transformers whatever the model's dtype.
        frequencies = 1 / rope["rope_theta"] ** (torch.arange(0, n, 2).float() / n)
        angles = (batch.positions[..., None].float() * frequencies)[:, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second, rest = x[..., : n // 2], x[..., n // 2 : n], x[..., n:]
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def _linear(module: nn.Module, x: Tensor) -> Tensor:
    y = x @ module.weight.T
    return y if module.bias is None else y + module.bias


def _plain_norm(norm: nn.Module, x: Tensor) -> Tensor:
    gain, _, eps, _ = _norm_parts(norm)
    return gain * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


@contextmanager
def wide(hf: nn.Module) -> Iterator[nn.Module]:
    """Have a float64 model of transformers compute in float64 where it would in float32: norms, and the softmax."""
    softmax, norms = F.softmax, [m for m in hf.modules() if type(m).__name__.endswith("RMSNorm")]
    for norm in norms:
        norm.forward = lambda x, norm=norm: _plain_norm(norm, x)
    F.softmax = nn.functional.softmax = lambda x, dim=-1, dtype=None, **kwargs: softmax(x, dim=dim)
    try:
        yield hf
    finally:
        F.softmax = nn.functional.softmax = softmax
        for norm in norms:
            del norm.forward


# ---------------------------------------------------------------- edits


@dataclass
class Change:
    """One feature's new activation, wherever ``where(row, position, length, natural)`` says, by the row's real tokens.

    ``natural`` holds the group's own activations and those before it at that row's real tokens: {layer: (length, F)}.
    """

    layer: int
    feature: int
    new: Callable[[Tensor], Any]
    where: Callable[[int, int, int, dict[int, Tensor]], bool] = lambda row, position, length, natural: True


def changed(changes: Sequence[Change], layer: int, natural: dict[int, Tensor], kept: Tensor) -> Tensor:
    """A layer's activations, entry by entry."""
    acts = natural[layer]
    entries = {index: acts[index] for index in [(b, p, c.feature) for c in changes for b, p in _all(kept)]}
    for change in (change for change in changes if change.layer == layer):
        for row, columns in enumerate(kept.bool()):
            real = columns.nonzero().flatten().tolist()
            here = {other: value[row, real] for other, value in natural.items()}
            for position, column in enumerate(real):
                if change.where(row, position, len(real), here):
                    index = (row, column, change.feature)
                    entries[index] = torch.as_tensor(change.new(entries[index]), dtype=acts.dtype)
    if not entries:
        return acts
    place = tuple(torch.tensor(part) for part in zip(*entries, strict=True))
    return acts.index_put(place, torch.stack(list(entries.values())))


def _all(kept: Tensor) -> Iterable[tuple[int, int]]:
    return [(b, p) for b in range(kept.shape[0]) for p in range(kept.shape[1])]


# ---------------------------------------------------------------- the crosscoder


class Coder:
    """A crosscoder's parameters; one group a layer."""

    def __init__(self, clt: Any, kept: Tensor) -> None:
        self.clt, self.wiring, self.kept = clt, clt.wiring, kept
        self.layers = [max(site.layer for site in reads) for reads in self.wiring.reads]
        self.excluded = kept.bool() & (kept.long().cumsum(-1) <= clt.host.exclude_first)
        self.written = {(site.name, site.layer): site for site in self.wiring.write_sites}

    def encode(self, group: int, sites: Mapping[Key, Tensor]) -> Tensor:
        x = torch.cat([sites[site.name, site.layer] for site in self.wiring.reads[group]], dim=-1)
        acts = activate(self.clt, group, x @ self.clt.W_enc[group] + self.clt.b_enc[group])
        return torch.where(self.excluded[..., None], 0.0, acts)

    def natural(self, sites: Mapping[Key, Tensor]) -> dict[int, Tensor]:
        """The activations of all groups that have read all they read, by layer."""
        ready = [g for g, reads in enumerate(self.wiring.reads) if all((s.name, s.layer) in sites for s in reads)]
        return {self.layers[g]: self.encode(g, sites) for g in ready}

    def decode(self, site: Any, acts: Mapping[int, Tensor], dropped: Iterable[tuple[int, int]] = ()) -> Tensor | float:
        """What features write to a site, but for dropped (source, target) writes."""
        total: Tensor | float = 0.0
        for group, writes in enumerate(self.wiring.writes):
            layer = self.layers[group]
            if site not in writes or layer not in acts or (layer, site.layer) in dropped:
                continue
            width = self.clt.d_model
            column = width * writes.index(site)
            total = total + acts[layer] @ self.clt.W_dec[group][:, column : column + width]
        return total

    def skip(self, site: Any, sites: Mapping[Key, Tensor]) -> Tensor | float:
        total: Tensor | float = 0.0
        for number, (read, write) in enumerate(self.wiring.skips):
            if write == site:
                total = total + sites[read.name, read.layer] @ self.clt.W_skip[number]
        return total

    def bias(self, site: Any) -> Tensor:
        return self.clt.b_dec[self.wiring.write_sites.index(site)]


# ---------------------------------------------------------------- the modes


@dataclass
class Outcome:
    """Runs before and with edits, and the features of both by layer."""

    before: Seen
    after: Seen
    natural: dict[int, Tensor]
    edited: dict[int, Tensor]


def run_mode(
    hand: Hand,
    clt: Any,
    batch: Batch,
    changes: Sequence[Change],
    mode: str,
    *,
    dropped: Iterable[tuple[int, int]] = (),
    layers: Iterable[int] | None = None,
    freeze_attention: bool | None = None,
) -> Outcome:
    """Run a mode as its definition says.

    Args:
        hand: The model.
        clt: The crosscoder, in float64.
        batch: The prompt.
        changes: What is edited.
        mode: As for `intervene`.
        dropped: Writes that are left out, (source layer, target layer).
        layers: As for `intervene`.
        freeze_attention: As for `intervene`.
    """
    coder, dropped = Coder(clt, batch.kept), set(dropped)
    every = set(range(len(hand.blocks)))
    base = hand(batch)
    was = coder.natural(base.sites)
    edit = lambda natural: {layer: changed(changes, layer, natural, batch.kept) for layer in natural}  # noqa: E731
    inside = every if layers is None else set(layers)
    covered = {site.layer for site in coder.written.values()}

    def frozen_outputs(key: Key, value: Tensor, sites: Mapping[Key, Tensor]) -> Tensor:
        """The unedited run's output, and what edits of its features write."""
        layer = key[1]
        if layer not in inside:
            return value
        if layer not in covered:
            return base.sites[key]
        if key not in coder.written:
            return value
        site = coder.written[key]
        change = coder.decode(site, edit(was), dropped) - coder.decode(site, was)
        return base.sites[key] + change + response(site, sites)

    def response(site: Any, sites: Mapping[Key, Tensor]) -> Tensor | float:
        """What a skip makes of what changed; at excluded positions the MLP's output is held."""
        moved = coder.skip(site, sites) - coder.skip(site, base.sites)
        return torch.where(coder.excluded[..., None], 0.0, moved) if isinstance(moved, Tensor) else moved

    def recon(key: Key, sites: Mapping[Key, Tensor], lost: Iterable[tuple[int, int]], edited: bool) -> Tensor:
        site, now = coder.written[key], coder.natural(sites)
        acts = edit(now) if edited else now
        return coder.bias(site) + coder.decode(site, acts, lost) + coder.skip(site, sites)

    def live(key: Key, value: Tensor, sites: Mapping[Key, Tensor]) -> Tensor:
        """The MLP's own output, and what edits of features as they are now write."""
        if key not in coder.written:
            return value
        return value + recon(key, sites, dropped, True) - recon(key, sites, (), False)

    def with_frozen_errors(key: Key, value: Tensor, sites: Mapping[Key, Tensor]) -> Tensor:
        if key[1] not in covered:
            return base.sites[key]
        if key not in coder.written:
            return value
        site = coder.written[key]
        change = coder.decode(site, edit(coder.natural(sites)), dropped) - coder.decode(site, was)
        return base.sites[key] + change + response(site, sites)

    def replaced(key: Key, value: Tensor, sites: Mapping[Key, Tensor]) -> Tensor:
        if key not in coder.written:
            return value
        return torch.where(
            coder.excluded[..., None], live(key, value, sites), recon(key, sites, dropped, True).to(value)
        )

    write, frozen = {
        "direct": (frozen_outputs, every),
        "constrained": (frozen_outputs, inside),
        "iterative": (live, set()),
        "local": (with_frozen_errors, every),
        "replace": (replaced, set()),
    }[mode]
    norms = mode in ("direct", "local") or (mode == "constrained" and inside == every)
    if freeze_attention is not None:
        frozen = every if freeze_attention else set()
    patterns = {layer: base.patterns[layer] for layer in frozen}
    after = hand(batch, write, patterns, base.scales if norms else {})
    fixed = mode in ("direct", "constrained")
    return Outcome(base, after, was, edit(was if fixed else coder.natural(after.sites)))
