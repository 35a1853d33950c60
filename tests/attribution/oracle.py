"""What an attribution graph is to hold, once more and by brute force in float64: the oracle of attribution's tests.

A model's forward pass, with attention patterns, norm denominators and MLP outputs given, is affine in what is put into
it. So each source's contribution is added to a run in which only the biases are on, one row of a batch a source, and
an edge is the difference that it makes to what a target reads. The patterns are those that transformers reports; the
passage from residual stream to residual stream is written out by hand. Nothing of `clt_plugin.attribution` or
`clt_plugin.adapters` is used; of a crosscoder, its parameters, its wiring's table and its activation's name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clt_plugin import Wiring
from clt_plugin.core.wiring import MODEL, Site
from interventions.oracle_modes import _PARTS, Key, _linear, _norm_parts, wide
from support.crosscoders import make_clt
from support.models import N_LAYERS, make_model
from support.reference import activate, blocks_of, labels_of

_BLOCK = _PARTS | {"qwen3": _PARTS["llama"], "mistral": _PARTS["llama"], "olmo": _PARTS["llama"]}
_PREFIX = {"gpt2": "transformer", "gpt_neox": "gpt_neox", "gemma3": "model.language_model"}
_FINAL = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}


@contextmanager
def exact(hf: nn.Module) -> Iterator[nn.Module]:
    """Have a float64 model of transformers compute in float64 throughout: see `wide`, and OLMo's norms as well."""
    norms = [m for m in hf.modules() if type(m).__name__ == "OlmoLayerNorm"]
    for norm in norms:
        norm.forward = lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-5)
    try:
        with wide(hf):
            yield hf
    finally:
        for norm in norms:
            del norm.forward


@cache
def _model(family: str) -> nn.Module:
    return make_model(family, torch.float64)


def model_of(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Make a fresh copy of a family's tiny model."""
    return copy.deepcopy(_model(family)).to(dtype)


# ---------------------------------------------------------------- the frozen model


@dataclass
class Run:
    """What one pass held; the first axis is that of the rows of the batch."""

    sites: dict[Key, Tensor] = field(default_factory=dict)
    scales: dict[Key, Tensor] = field(default_factory=dict)
    unembedded: Tensor = field(default_factory=lambda: torch.empty(0))


Put = Callable[[int, Tensor, Mapping[Key, Tensor]], Tensor]
"""What is put in place of a layer's MLP output, where the crosscoder writes, given that output and the sites so far."""

Read = Callable[[Run], Tensor]
"""What a target reads in a run, (rows,): affine in what is put into it."""


class FrozenModel:
    """A model's pass from embeddings to unembedded logits, with the attention patterns of one prompt.

    Args:
        hf: The model, in float64; it is left as it is.
        ids: (position,).
    """

    def __init__(self, hf: nn.Module, ids: Tensor) -> None:
        self.hf = hf = copy.deepcopy(hf)
        self.config = hf.config.get_text_config()
        self.kind = self.config.model_type
        self.blocks = blocks_of(hf)
        self.parallel = self.kind == "gpt_neox" and self.config.use_parallel_residual
        hf.set_attn_implementation("eager")
        with exact(hf), torch.no_grad():
            out = hf(input_ids=ids[None], use_cache=False, output_attentions=True, output_hidden_states=True)
        self.patterns, self.logits = out.attentions, out.logits[0]
        # What each position's token adds to the residual stream: scaled, where the family does.
        self.embedded = hf.transformer.wte.weight[ids[None]] if self.kind == "gpt2" else out.hidden_states[0]
        n = len(ids)
        self.position_embeddings = hf.transformer.wpe.weight[:n] if self.kind == "gpt2" else torch.zeros(n, 1).double()

    def __call__(
        self, embedded: Tensor, put: Put, written: Mapping[int, str], scales: Mapping[Key, Tensor] | None = None
    ) -> Run:
        """Run it.

        Args:
            embedded: What tokens add to the residual stream, (rows, position, d).
            put: What replaces MLP outputs.
            written: By layer, the site at which `put` acts; ``mlp_out`` where none is named.
            scales: The norms' scales, or None to compute them, and the MLPs' outputs with them.
        """
        run, live, x = Run(), scales is None, embedded + self.position_embeddings
        sites = run.sites

        def norm(name: str | None, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
            """The input once normalised, and the norm's output."""
            if name is None:
                return x, x
            module = self.blocks[layer] if layer >= 0 else self.hf
            gain, bias, eps, centred = _norm(module.get_submodule(name))
            x = x - x.mean(-1, keepdim=True) if centred else x
            scale = (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() if live else scales[name, layer]
            run.scales[name, layer] = scale
            return x * scale, gain * (x * scale) + bias

        for layer, block in enumerate(self.blocks):
            attention, before_attention, after_attention, before_mlp, after_mlp = _BLOCK[self.kind]
            sites["resid_pre", layer] = x
            attended = self._attend(layer, block.get_submodule(attention), norm(before_attention, layer, x)[1])
            sites["attn_out", layer] = attended = norm(after_attention, layer, attended)[1]
            middle = sites["resid_mid", layer] = x if self.parallel else x + attended
            sites["mlp_in_before_gain", layer], sites["mlp_in", layer] = norm(before_mlp, layer, middle)
            y = block.mlp(sites["mlp_in", layer]) if live else torch.zeros_like(x)
            early = written.get(layer) == "mlp_out_before_norm"
            y = sites["mlp_out_before_norm", layer] = put(layer, y, sites) if early else y
            # A frozen norm's output of nothing is 0 as well: what is put there stands alone.
            y = norm(after_mlp, layer, y)[1]
            y = sites["mlp_out", layer] = y if early else put(layer, y, sites)
            x = sites["resid_post", layer] = x + attended + y
        prefix = _PREFIX.get(self.hf.config.model_type, "model")
        x = sites["final", -1] = norm(f"{prefix}.{_FINAL.get(self.kind, 'norm')}", -1, x)[1]
        run.unembedded = _linear(self.hf.get_output_embeddings(), x)
        return run

    def _attend(self, layer: int, module: nn.Module, x: Tensor) -> Tensor:
        pattern, heads = self.patterns[layer], self.config.num_attention_heads
        if self.kind == "gpt2":
            value = (x @ module.c_attn.weight + module.c_attn.bias).chunk(3, dim=-1)[2].unflatten(-1, (heads, -1))
        elif self.kind == "gpt_neox":
            value = _linear(module.query_key_value, x).unflatten(-1, (heads, -1)).chunk(3, dim=-1)[2]
        else:
            value = _linear(module.v_proj, x).unflatten(-1, (self.config.num_key_value_heads, -1))
            value = value.repeat_interleave(heads // value.shape[-2], dim=-2)
        mixed = torch.einsum("bhqk,rkhd->rqhd", pattern, value).flatten(2)
        if self.kind == "gpt2":
            return mixed @ module.c_proj.weight + module.c_proj.bias
        return _linear(module.dense if self.kind == "gpt_neox" else module.o_proj, mixed)


def _norm(norm: nn.Module) -> tuple[Tensor | float, Tensor | float, float, bool]:
    """Gain, bias, epsilon, and whether the mean is subtracted."""
    return (1.0, 0.0, 1e-5, True) if type(norm).__name__ == "OlmoLayerNorm" else _norm_parts(norm)


# ---------------------------------------------------------------- the graph


class Oracle:
    """The graph of one prompt, entry by entry.

    Sources come in the contract's order, with its ids: features, errors, embeddings, the bias.

    Args:
        hf: The model, in float64.
        clt: The crosscoder, in float64.
        ids: The prompt, (position,).
        zero_bos: As for `attribute`.
    """

    def __init__(self, hf: nn.Module, clt: Any, ids: Tensor, *, zero_bos: bool = False) -> None:
        self.model, self.clt, self.wiring, self.ids = FrozenModel(hf, ids), clt, clt.wiring, ids
        self.n, self.n_layers, excluded = len(ids), len(self.model.blocks), clt.host.exclude_first
        place = torch.arange(self.n)
        self.excluded = place < excluded
        self.zeroed = place < (max(1, excluded) if zero_bos else 0)
        self.written = {site.layer: site for site in self.wiring.write_sites}
        self.labels = [str(label) for label in labels_of(clt)]
        with torch.no_grad():
            self.true = self.model(self.model.embedded, lambda layer, y, sites: y, self._names())
            self.features = self._features()
            self.errors, self.constant = self._errors()
            self.nodes = self._nodes()
            self.run = self._run()

    def _names(self) -> dict[int, str]:
        return {layer: site.name for layer, site in self.written.items()}

    # ---------------------------------------------------------------- what there is

    def reads(self, group: int, run: Run) -> Tensor:
        return torch.cat([run.sites[site.name, site.layer] for site in self.wiring.reads[group]], dim=-1)

    def _features(self) -> list[Tensor]:
        """Each group's activations, (position, F)."""
        groups = range(self.wiring.n_groups)
        hs = [self.reads(group, self.true)[0] @ self.clt.W_enc[group] + self.clt.b_enc[group] for group in groups]
        if getattr(self.clt.activation, "scope", "group") == "joint":
            together = torch.cat(hs, dim=-1).relu()
            worst = together.sort(dim=-1, descending=True).values[:, len(hs) * self.clt.activation.k - 1]
            acts = list((together * (together >= worst[:, None])).split([h.shape[-1] for h in hs], dim=-1))
        else:
            acts = [activate(self.clt, group, h) for group, h in enumerate(hs)]
        return [each * ~(self.excluded | self.zeroed)[:, None] for each in acts]

    def decoder(self, group: int, layer: int) -> Tensor | None:
        """What a group's latents write at a layer, (F, d), or None."""
        writes = self.wiring.writes[group]
        if self.written.get(layer) not in writes:
            return None
        start = self.clt.d_model * writes.index(self.written[layer])
        return self.clt.W_dec[group][:, start : start + self.clt.d_model]

    def _skip(self, layer: int, sites: Mapping[Key, Tensor]) -> Tensor | float:
        """What skips add at a layer, (rows, position, d)."""
        total: Tensor | float = 0.0
        for number, (read, write) in enumerate(self.wiring.skips):
            if write == self.written.get(layer):
                total = total + sites[read.name, read.layer] @ self.clt.W_skip[number]
        return total * ~self.excluded[:, None]

    def _errors(self) -> tuple[Tensor, Tensor]:
        """Errors, and what stands at each layer in every run, both (layer, position, d)."""
        errors, constants = [], []
        for layer in range(self.n_layers):
            site = self.written.get(layer)
            mlp = self.true.sites["mlp_out" if site is None else site.name, layer][0]
            skip = self._skip(layer, self.true.sites)
            skip = skip[0] if isinstance(skip, Tensor) and skip.ndim == 3 else skip
            bias = torch.zeros_like(mlp)
            if site is not None:
                bias = self.clt.b_dec[self.wiring.write_sites.index(site)] * ~self.excluded[:, None]
            decoders = [self.decoder(group, layer) for group in range(self.wiring.n_groups)]
            sums = [acts @ rows for acts, rows in zip(self.features, decoders, strict=True) if rows is not None]
            error = mlp - sum(sums, bias) - skip
            errors.append(torch.where(self.zeroed[:, None], 0.0, error))
            constants.append(torch.where(self.zeroed[:, None], mlp - skip, bias))
        return torch.stack(errors), torch.stack(constants)

    def _nodes(self) -> list[tuple[str, str, Any]]:
        """(id, kind, what it is) of every source."""
        place = lambda group: (max(site.layer for site in self.wiring.reads[group]), group)  # noqa: E731
        features = [
            (f"{self.labels[group]}_{latent}_{position}", "feature", (group, position, latent))
            for group in sorted(range(self.wiring.n_groups), key=place)
            for position, latent in self.features[group].nonzero().tolist()
        ]
        every = [(layer, position) for layer in range(self.n_layers) for position in range(self.n)]
        return [
            *features,
            *((f"{layer}_-1_{position}", "error", (layer, position)) for layer, position in every),
            *((f"E_{token}_{position}", "embedding", position) for position, token in enumerate(self.ids.tolist())),
            ("bias", "bias", None),
        ]

    def _run(self) -> Run:
        """One run in which the biases alone are on, the last row, and beside them one source a row."""
        d, rows = self.clt.d_model, len(self.nodes)
        embedded = torch.zeros(rows, self.n, d).double()
        puts = [constant.expand(rows, -1, -1).clone() for constant in self.constant]
        for row, (_, kind, what) in enumerate(self.nodes):
            if kind == "feature":
                group, position, latent = what
                for layer in range(self.n_layers):
                    if (decoder := self.decoder(group, layer)) is not None:
                        puts[layer][row, position] += self.features[group][position, latent] * decoder[latent]
            elif kind == "error":
                layer, position = what
                puts[layer][row, position] += self.errors[layer, position]
            elif kind == "embedding":
                embedded[row, what] = self.model.embedded[0, what]
        put = lambda layer, y, sites: puts[layer] + self._skip(layer, sites)  # noqa: E731
        return self.model(embedded, put, self._names(), self.true.scales)

    # ---------------------------------------------------------------- targets

    @property
    def ids_of_sources(self) -> list[str]:
        return [name for name, _, _ in self.nodes]

    def edges(self, read: Read) -> Tensor:
        """What every source adds to what a target reads, (sources,)."""
        seen = read(self.run)
        return torch.cat((seen[:-1] - seen[-1], seen[-1:]))

    def value(self, read: Read) -> float:
        """What a target reads in the model's own run."""
        return float(read(self.true))

    def feature(self, group: int, position: int, latent: int) -> Read:
        """A pre-activation."""
        encoder, bias = self.clt.W_enc[group][:, latent], self.clt.b_enc[group][latent]
        return lambda run: self.reads(group, run)[:, position] @ encoder + bias

    def logit(self, token: int, position: int = -1) -> Read:
        """A logit less the mean logit, before any softcap."""
        return lambda run: run.unembedded[:, position, token] - run.unembedded[:, position].mean(-1)

    def difference(self, a: int, b: int, position: int = -1) -> Read:
        """One logit less another."""
        return lambda run: run.unembedded[:, position, a] - run.unembedded[:, position, b]

    def direction(self, vector: Tensor, site: Key, position: int = -1) -> Read:
        """A site's component along a vector, which is not normalised."""
        return lambda run: run.sites[site][:, position] @ vector

    def reads_of_features(self) -> dict[str, Read]:
        return {name: self.feature(*what) for name, kind, what in self.nodes if kind == "feature"}

    def logits(self, tokens: list[int], position: int | None = None) -> dict[str, Read]:
        """Logits by their nodes' ids."""
        position = self.n - 1 if position is None else position
        return {f"{self.n_layers + 1}_{token}_{position}": self.logit(token, position) for token in tokens}

    def likeliest(self, most: int = 10, share: float = 0.95) -> list[int]:
        """The fewest next tokens that hold a share of probability, but no more than a number."""
        probabilities = self.model.logits[-1].softmax(-1)
        ranked, total = [], 0.0
        for token in probabilities.argsort(descending=True).tolist():
            if total >= share or len(ranked) == most:
                break
            ranked.append(token)
            total += float(probabilities[token])
        return ranked

    def adjacency(self, targets: Mapping[str, Read]) -> Tensor:
        """The whole matrix, (N, N): rows of errors, embeddings and the bias are empty."""
        n = len(self.nodes)
        rows = torch.zeros(n + len(targets), n + len(targets)).double()
        for row, (_, kind, what) in enumerate(self.nodes):
            if kind == "feature":
                rows[row, :n] = self.edges(self.feature(*what))
        for row, read in enumerate(targets.values()):
            rows[n + row, :n] = self.edges(read)
        return rows


def agree(graph: Any, oracle: Oracle, targets: Mapping[str, Read], close: float) -> None:
    """Compare a graph with the oracle's, entry by entry, to a share of the largest.

    Args:
        graph: What `attribute` returned.
        oracle: Of the same prompt.
        targets: What each of its targets reads, by the node's id, in their order.
        close: The largest difference, as a share of the largest edge, or of the largest value.
    """
    nodes, reads = graph.nodes, {**oracle.reads_of_features(), **targets}
    assert list(nodes["id"]) == [*oracle.ids_of_sources, *targets]
    assert list(nodes["kind"]) == [*(kind for _, kind, _ in oracle.nodes), *["target"] * len(targets)]
    wanted, found = oracle.adjacency(targets), graph.adjacency.double()
    assert float(wanted.abs().max()) > 0.1
    assert float((found - wanted).abs().max()) <= close * float(wanted.abs().max())
    assert not found[~graph.of_kind("feature", "target")].any()
    assert not found[:, graph.of_kind("target")].any()
    _near(nodes["value"][nodes["id"].isin(reads)], [oracle.value(read) for read in reads.values()], close)
    acts = [oracle.features[g][p, i] for g, p, i in (what for _, kind, what in oracle.nodes if kind == "feature")]
    _near(nodes["activation"][nodes["kind"] == "feature"], acts, close)


def _near(found: Any, wanted: list[Any], close: float) -> None:
    found, expected = torch.tensor(found.to_numpy()).double(), torch.tensor(wanted, dtype=torch.float64)
    assert found.shape == expected.shape
    assert not len(wanted) or float((found - expected).abs().max()) <= close * float(expected.abs().max())


# ---------------------------------------------------------------- crosscoders

_TWO_READS = Wiring(
    reads=(
        (Site(MODEL, "mlp_in", 0),),
        (Site(MODEL, "resid_pre", 0), Site(MODEL, "mlp_in", 1)),
        (Site(MODEL, "attn_out", 1), Site(MODEL, "resid_mid", 2)),
    ),
    writes=tuple(tuple(Site(MODEL, "mlp_out", layer) for layer in range(group, N_LAYERS)) for group in range(N_LAYERS)),
)
_MLPS_READ = Wiring.strictly_causal(N_LAYERS, read="mlp_out", write="mlp_out_before_norm")
_MLPS_READ_EARLY = Wiring.plt(N_LAYERS, write="mlp_out_before_norm") + Wiring.strictly_causal(
    N_LAYERS, read="mlp_out_before_norm", write="mlp_out_before_norm"
)
_FAR_SKIP = Wiring.plt(N_LAYERS).with_skips([(Site(MODEL, "mlp_in", 0), Site(MODEL, "mlp_out", 2))])

CLTS: dict[str, dict[str, Any]] = {
    "clt": {},
    "jumprelu": {"activation": "jumprelu"},
    "topk": {"activation": "topk", "k": 3},
    "joint topk": {"activation": "topk", "k": 3, "scope": "joint"},
    "reads resid_mid": {"read": "resid_mid"},
    "reads before gain": {"read": "mlp_in_before_gain"},
    "reads resid_pre": {"read": "resid_pre"},
    "local clt": {"wiring": Wiring.local_clt(N_LAYERS, 2)},
    "plt": {"wiring": Wiring.plt(N_LAYERS)},
    "strictly causal": {"wiring": Wiring.strictly_causal(N_LAYERS)},
    "reads MLPs": {"wiring": _MLPS_READ},
    "reads MLPs before the post-norm": {"wiring": _MLPS_READ_EARLY},
    "two reads": {"wiring": _TWO_READS},
    "a sum": {"wiring": Wiring.strictly_causal(N_LAYERS, read="attn_out") + Wiring.clt(N_LAYERS)},
    "skips": {"wiring": Wiring.clt(N_LAYERS).with_skips()},
    "skips before gain": {"wiring": Wiring.plt(N_LAYERS, read="mlp_in_before_gain").with_skips()},
    "a far skip": {"wiring": _FAR_SKIP},
    "before the post-norm": {"write": "mlp_out_before_norm"},
    "before the post-norm, with skips": {"wiring": Wiring.clt(N_LAYERS, write="mlp_out_before_norm").with_skips()},
    "one layer of three": {"wiring": Wiring(*(((Site(MODEL, name, 1),),) for name in ("mlp_in", "mlp_out")))},
    "excludes two": {"exclude_first": 2},
    "excludes two, with skips": {"exclude_first": 2, "wiring": Wiring.clt(N_LAYERS).with_skips()},
}


@cache
def clt_of(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """Make one of the crosscoders."""
    return make_clt(**CLTS[name], n_latents=12, scale=1.5, dtype=dtype)
