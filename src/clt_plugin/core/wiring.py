"""Who reads and writes what.

Every architecture in scope is a crosscoder: groups of latents, where each group reads some sites of a
model and writes some sites. A `Wiring` is that table and nothing else: no widths, no weights. `Layout`
adds the widths and says which rows or columns of a group's weights belong to which site.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from clt_plugin.core.errors import WiringError

if TYPE_CHECKING:
    from functools import cached_property
else:

    class cached_property:
        """As in functools, where before Python 3.12 it holds a lock: a class with one cannot travel."""

        def __init__(self, compute: Any) -> None:
            self.compute, self.name, self.__doc__ = compute, compute.__name__, compute.__doc__

        def __get__(self, instance: Any, owner: Any = None) -> Any:
            if instance is None:
                return self
            value = instance.__dict__[self.name] = self.compute(instance)
            return value


SITE_NAMES = (
    "resid_pre",  # the residual stream that enters the block
    "attn_out",  # what attention adds to the residual stream
    "resid_mid",  # the residual stream between attention and MLP
    "mlp_in_before_gain",  # the MLP's input: normalised, before the norm's gain and bias
    "mlp_in",  # the MLP's input: normalised, after the gain
    "mlp_out_before_norm",  # the MLP's own output, before a post-norm (where there is one)
    "mlp_out",  # what the MLP adds to the residual stream, after a post-norm
    "resid_post",  # the residual stream that leaves the block
)
"""The places in a block, in the order in which a forward pass reaches them."""

MLP_READS = ("resid_mid", "mlp_in_before_gain", "mlp_in")
MLP_WRITES = ("mlp_out_before_norm", "mlp_out")
MODEL = "model"
"""The name of the model in wirings over a single model."""


@dataclass(frozen=True)
class Site:
    """A place in a model that is read or written.

    Attributes:
        model: Which model, for wirings over several (`Wiring.model_diff`); ``"model"`` otherwise.
        name: One of `SITE_NAMES`.
        layer: The index of the transformer block, from 0.
    """

    model: str
    name: str
    layer: int

    def __post_init__(self) -> None:
        if self.name not in SITE_NAMES:
            raise WiringError(f"no site is called {self.name!r}: the sites are {', '.join(SITE_NAMES)}")
        if not isinstance(self.layer, int) or self.layer < 0:
            raise WiringError(f"a site's layer is a block's index from 0, not {self.layer!r}")

    @property
    def order(self) -> tuple[int, int]:
        """When a forward pass reaches the site: sites compare by it within one model."""
        return (self.layer, SITE_NAMES.index(self.name))

    def __str__(self) -> str:
        prefix = "" if self.model == MODEL else f"{self.model}:"
        return f"{prefix}{self.name}.{self.layer}"


def _as_site(site: Any, default_name: str) -> Site:
    """Accept a Site, a layer's index, or a (name, layer) pair."""
    if isinstance(site, Site):
        return site
    if isinstance(site, int):
        return Site(MODEL, default_name, site)
    if isinstance(site, Sequence) and len(site) == 2:
        return Site(MODEL, site[0], site[1])
    raise WiringError(f"a site is a Site, a layer's index or a (name, layer) pair, not {site!r}")


def _check_count(what: str, n: Any) -> int:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise WiringError(f"{what} must be a whole number of at least 1, not {n!r}")
    return n


@dataclass(frozen=True)
class Wiring:
    """Which sites each group of latents reads, and which it writes.

    Build one with a named constructor (`Wiring.clt`, `Wiring.plt`, ...), or from the table itself. Two
    wirings add up: ``Wiring.strictly_causal(4) + Wiring.weakly_causal([("attn_out", l) for l in range(4)])``
    has the groups of both.

    Attributes:
        reads: For each group, the sites it reads, in the order of the encoder's rows.
        writes: For each group, the sites it writes, in the order of the decoder's columns.
        skips: Pairs (read site, write site) joined by an affine skip connection.
        name: What the wiring is called, for people; two wirings with other names are equal.
    """

    reads: tuple[tuple[Site, ...], ...]
    writes: tuple[tuple[Site, ...], ...]
    skips: tuple[tuple[Site, Site], ...] = ()
    name: str = field(default="wiring", compare=False)

    def __post_init__(self) -> None:
        for verb in ("reads", "writes"):
            object.__setattr__(self, verb, tuple(tuple(sites) for sites in getattr(self, verb)))
        object.__setattr__(self, "skips", tuple((read, write) for read, write in self.skips))
        if not self.reads:
            raise WiringError("a wiring needs at least one group of latents")
        if len(self.reads) != len(self.writes):
            raise WiringError(f"{len(self.reads)} groups read but {len(self.writes)} write: one entry each")
        for group, (reads, writes) in enumerate(zip(self.reads, self.writes, strict=True)):
            for verb, sites in (("reads", reads), ("writes", writes)):
                if not sites:
                    raise WiringError(f"group {group} {verb} no site")
                twice = sorted({str(site) for site in sites if sites.count(site) > 1})
                if twice:
                    raise WiringError(f"group {group} {verb} {', '.join(twice)} more than once")
        for read, write in self.skips:
            if read not in self.read_sites or write not in self.write_sites:
                raise WiringError(f"a skip joins a read site to a written one: {read} -> {write} does not")
            if [w for _, w in self.skips].count(write) > 1:
                raise WiringError(f"{write} has more than one skip connection")

    # ---------------------------------------------------------------- constructors

    @classmethod
    def sae(cls, site: Any) -> Wiring:
        """Sparse autoencoder: one group that reads and writes one site."""
        site = _as_site(site, "resid_post")
        return cls(((site,),), ((site,),), name=f"sae({site})")

    @classmethod
    def plt(cls, n_layers: int, read: str = "mlp_in", write: str = "mlp_out") -> Wiring:
        """Per-layer transcoders: group l reads layer l's MLP input and writes its output."""
        wiring = cls.local_clt(n_layers, span=1, read=read, write=write)
        return replace(wiring, name=f"plt({n_layers})")

    @classmethod
    def clt(cls, n_layers: int, read: str = "mlp_in", write: str = "mlp_out") -> Wiring:
        """Cross-layer transcoder: group l reads at layer l and writes the MLP outputs of layers l .. L-1."""
        wiring = cls.local_clt(n_layers, span=_check_count("n_layers", n_layers), read=read, write=write)
        return replace(wiring, name=f"clt({n_layers})")

    @classmethod
    def local_clt(cls, n_layers: int, span: int, read: str = "mlp_in", write: str = "mlp_out") -> Wiring:
        """Cross-layer transcoder of limited span: group l writes layers l .. min(l + span - 1, L - 1)."""
        _check_count("n_layers", n_layers)
        _check_count("span", span)
        reads = tuple((Site(MODEL, read, layer),) for layer in range(n_layers))
        writes = tuple(
            tuple(Site(MODEL, write, target) for target in range(layer, min(layer + span, n_layers)))
            for layer in range(n_layers)
        )
        return cls(reads, writes, name=f"local_clt({n_layers}, span={span})")

    @classmethod
    def acausal(cls, sites: Iterable[Any]) -> Wiring:
        """Acausal crosscoder: one group that reads all sites and writes all of them."""
        sites = tuple(_as_site(site, "resid_post") for site in sites)
        return cls((sites,), (sites,), name=f"acausal({len(sites)} sites)")

    @classmethod
    def weakly_causal(cls, sites: Iterable[Any]) -> Wiring:
        """Weakly causal crosscoder: group i reads site i and writes sites i .. last."""
        sites = tuple(_as_site(site, "resid_post") for site in sites)
        orders = [site.order for site in sites]
        if orders != sorted(set(orders)):
            raise WiringError("the sites of a causal wiring are distinct and in the order of the forward pass")
        reads = tuple((site,) for site in sites)
        writes = tuple(sites[i:] for i in range(len(sites)))
        return cls(reads, writes, name=f"weakly_causal({len(sites)} sites)")

    @classmethod
    def strictly_causal(cls, n_layers: int, read: str = "resid_post", write: str = "mlp_out") -> Wiring:
        """Strictly causal crosscoder: group l reads the residual stream of layer l, writes later layers' outputs.

        There is no group for the last layer, after which nothing is left to write.
        """
        if _check_count("n_layers", n_layers) < 2:
            raise WiringError("a strictly causal wiring needs at least two layers: nothing comes after the last")
        reads = tuple((Site(MODEL, read, layer),) for layer in range(n_layers - 1))
        writes = tuple(
            tuple(Site(MODEL, write, target) for target in range(layer + 1, n_layers)) for layer in range(n_layers - 1)
        )
        return cls(reads, writes, name=f"strictly_causal({n_layers})")

    @classmethod
    def pre_post_mlp(cls, layer: int, reads: str = "mlp_in") -> Wiring:
        """Pre/post-MLP crosscoder: one group that writes both sides of one MLP and reads its input, or ``"both"``."""
        before, after = Site(MODEL, "mlp_in", layer), Site(MODEL, "mlp_out", layer)
        choices = {"mlp_in": (before,), "both": (before, after)}
        if reads not in choices:
            raise WiringError(f"reads must be 'mlp_in' or 'both', not {reads!r}")
        return cls((choices[reads],), ((before, after),), name=f"pre_post_mlp({layer})")

    @classmethod
    def model_diff(cls, models: Iterable[str], layer: int, site: str = "resid_post") -> Wiring:
        """Model-diffing crosscoder: one group that reads and writes one layer of several models."""
        models = tuple(models)
        if len(models) < 2 or len(set(models)) != len(models):
            raise WiringError(f"model diffing needs at least two models with different names, not {models!r}")
        sites = tuple(Site(model, site, layer) for model in models)
        return cls((sites,), (sites,), name=f"model_diff({', '.join(models)}, layer {layer})")

    def __add__(self, other: Wiring) -> Wiring:
        """Return the wiring with the groups of both; what they write to the same site adds up."""
        if not isinstance(other, Wiring):
            return NotImplemented
        skips = tuple(dict.fromkeys(self.skips + other.skips))
        return Wiring(self.reads + other.reads, self.writes + other.writes, skips, f"{self.name} + {other.name}")

    def with_skips(self, pairs: Iterable[tuple[Site, Site]] | None = None) -> Wiring:
        """Return the wiring with affine skip connections.

        Args:
            pairs: (read site, write site); by default each written site is paired with the read site of the
                same model and layer, where there is one.
        """
        if pairs is None:
            at = {(read.model, read.layer): read for read in self.read_sites}
            pairs = [(at[w.model, w.layer], w) for w in self.write_sites if (w.model, w.layer) in at]
        return replace(self, skips=tuple(pairs))

    def select(self, groups: Iterable[int]) -> Wiring:
        """Return the wiring of some of its groups, with the skips of the sites that they still write."""
        groups = tuple(groups)
        reads, writes = tuple(self.reads[g] for g in groups), tuple(self.writes[g] for g in groups)
        kept_reads, kept_writes = {s for sites in reads for s in sites}, {s for sites in writes for s in sites}
        skips = tuple((r, w) for r, w in self.skips if r in kept_reads and w in kept_writes)
        return Wiring(reads, writes, skips, f"{self.name}, groups {list(groups)}")

    # ---------------------------------------------------------------- what it holds

    @property
    def n_groups(self) -> int:
        """The number of groups of latents."""
        return len(self.reads)

    @cached_property
    def read_sites(self) -> tuple[Site, ...]:
        """Every site that is read, in the order of first mention: the first axis of stacked inputs."""
        return tuple(dict.fromkeys(site for sites in self.reads for site in sites))

    @cached_property
    def write_sites(self) -> tuple[Site, ...]:
        """Every site that is written, in the order of first mention: the first axis of stacked outputs."""
        return tuple(dict.fromkeys(site for sites in self.writes for site in sites))

    @cached_property
    def models(self) -> tuple[str, ...]:
        """The models that are read or written."""
        return tuple(dict.fromkeys(site.model for site in (*self.read_sites, *self.write_sites)))

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers that are read or written, in order."""
        return tuple(sorted({site.layer for site in (*self.read_sites, *self.write_sites)}))

    @property
    def n_layers(self) -> int:
        """How many layers are read or written; L for a CLT of an L-layer model."""
        return len(self.layers)

    @cached_property
    def home(self) -> tuple[int, ...]:
        """For each group, the layer after whose last read it can be encoded."""
        return tuple(max(reads, key=lambda site: site.order).layer for reads in self.reads)

    def writers(self, site: Site) -> tuple[int, ...]:
        """Return the groups that write a site."""
        return tuple(g for g, writes in enumerate(self.writes) if site in writes)

    @property
    def writes_mlps_only(self) -> bool:
        """Whether every written site is the output of an MLP, as in a transcoder."""
        return all(site.name in MLP_WRITES for site in self.write_sites)

    def why_not_replace(self) -> str | None:
        """Say why this wiring cannot stand in for MLPs in a running model, or None if it can."""
        if len(self.models) > 1:
            return f"it spans the models {', '.join(self.models)}"
        if not self.writes_mlps_only:
            others = sorted({site.name for site in self.write_sites} - set(MLP_WRITES))
            return f"it writes {', '.join(others)}, not MLP outputs alone"
        by_layer = {(site.layer) for site in self.write_sites}
        if len(by_layer) < len(self.write_sites):
            return "it writes an MLP's output both before and after its post-norm"
        for group, (reads, writes) in enumerate(zip(self.reads, self.writes, strict=True)):
            last = max(reads, key=lambda site: site.order)
            early = [site for site in writes if site.order <= last.order]
            if early:
                return f"group {group} writes {early[0]}, which a forward pass reaches before {last} is read"
        for read, write in self.skips:
            if write.order <= read.order:
                return f"the skip {read} -> {write} runs backwards"
        return None

    # ---------------------------------------------------------------- for people and files

    def __repr__(self) -> str:
        skips = f", {len(self.skips)} affine skips" if self.skips else ""
        groups = "1 group" if self.n_groups == 1 else f"{self.n_groups} groups"
        reads, writes = _names(self.read_sites), _names(self.write_sites)
        layers = f"layer {self.layers[0]}" if self.n_layers == 1 else f"layers {self.layers[0]}-{self.layers[-1]}"
        return f"<Wiring {self.name}: {groups}, reads {reads}, writes {writes}, {layers}{skips}>"

    def draw(self) -> str:
        """Draw who reads (r) and who writes (w) which layer, one row a group.

        >>> print(Wiring.clt(3).draw())
        clt(3): reads (r) mlp_in, writes (w) mlp_out
        layer     0   1   2
        group 0   rw  w   w
        group 1   .   rw  w
        group 2   .   .   rw
        """
        columns = sorted({(s.model, s.layer) for s in (*self.read_sites, *self.write_sites)})
        several = len(self.models) > 1
        heads = [f"{model}:{layer}" if several else str(layer) for model, layer in columns]
        width = max(4, *(len(head) + 2 for head in heads))
        margin = len(f"group {self.n_groups - 1}") + 3
        lines = [f"{self.name}: reads (r) {_names(self.read_sites)}, writes (w) {_names(self.write_sites)}"]
        lines.append("layer".ljust(margin) + "".join(head.ljust(width) for head in heads))
        for group in range(self.n_groups):
            reads = {(s.model, s.layer) for s in self.reads[group]}
            writes = {(s.model, s.layer) for s in self.writes[group]}
            cells = [("r" * (c in reads) + "w" * (c in writes)) or "." for c in columns]
            lines.append(f"group {group}".ljust(margin) + "".join(cell.ljust(width) for cell in cells))
        return "\n".join(line.rstrip() for line in lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the wiring as plain data, for JSON."""
        sites = list(dict.fromkeys((*self.read_sites, *self.write_sites)))
        number = {site: i for i, site in enumerate(sites)}
        return {
            "name": self.name,
            "sites": [[site.model, site.name, site.layer] for site in sites],
            "reads": [[number[s] for s in group] for group in self.reads],
            "writes": [[number[s] for s in group] for group in self.writes],
            "skips": [[number[read], number[write]] for read, write in self.skips],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Wiring:
        """Rebuild a wiring from `to_dict`'s data."""
        try:
            sites = [Site(model, name, layer) for model, name, layer in data["sites"]]
            reads = tuple(tuple(sites[i] for i in group) for group in data["reads"])
            writes = tuple(tuple(sites[i] for i in group) for group in data["writes"])
            skips = tuple((sites[r], sites[w]) for r, w in data.get("skips", ()))
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise WiringError(f"not the description of a wiring: {error}") from error
        return cls(reads, writes, skips, data.get("name", "wiring"))


def _names(sites: Iterable[Site]) -> str:
    return "+".join(dict.fromkeys(site.name for site in sites))


@dataclass(frozen=True)
class Layout:
    """A wiring with widths: where each site lies in a group's weights.

    ``W_enc[g]`` has one row per read coordinate and ``W_dec[g]`` one column per written coordinate; a
    site's rows or columns are the slice given here.
    """

    wiring: Wiring
    widths: tuple[tuple[Site, int], ...]

    @classmethod
    def of(cls, wiring: Wiring, d_model: int | Mapping[Any, int]) -> Layout:
        """Lay a wiring out over widths.

        Args:
            wiring: Who reads and writes what.
            d_model: One width for all sites, or widths by model name, or by `Site`.
        """
        widths = []
        for site in dict.fromkeys((*wiring.read_sites, *wiring.write_sites)):
            if isinstance(d_model, Mapping):
                width = d_model.get(site, d_model.get(site.model))
                if width is None:
                    raise WiringError(f"d_model gives no width for {site}: name the site, or its model")
            else:
                width = d_model
            widths.append((site, _check_count(f"the width of {site}", width)))
        return cls(wiring, tuple(widths))

    @cached_property
    def width(self) -> dict[Site, int]:
        """The width of each site."""
        return dict(self.widths)

    @cached_property
    def read_slices(self) -> tuple[dict[Site, slice], ...]:
        """For each group, the rows of ``W_enc[g]`` that belong to each site it reads."""
        return tuple(self._slices(sites) for sites in self.wiring.reads)

    @cached_property
    def write_slices(self) -> tuple[dict[Site, slice], ...]:
        """For each group, the columns of ``W_dec[g]`` that belong to each site it writes."""
        return tuple(self._slices(sites) for sites in self.wiring.writes)

    def read_width(self, group: int) -> int:
        """Return the number of coordinates a group reads."""
        return sum(self.width[site] for site in self.wiring.reads[group])

    def write_width(self, group: int) -> int:
        """Return the number of coordinates a group writes."""
        return sum(self.width[site] for site in self.wiring.writes[group])

    def common_width(self) -> int | None:
        """Return the width that all sites share, or None where they differ."""
        widths = set(self.width.values())
        return widths.pop() if len(widths) == 1 else None

    def _slices(self, sites: Iterable[Site]) -> dict[Site, slice]:
        slices, start = {}, 0
        for site in sites:
            slices[site] = slice(start, start + self.width[site])
            start += self.width[site]
        return slices
