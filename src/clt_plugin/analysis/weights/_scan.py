"""The scan behind `attention_targeting` and `mlp_targeting`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clt_plugin.adapters._run import group_labels
from clt_plugin.adapters.huggingface import HostModel, check_fits, plain_model
from clt_plugin.analysis.weights import _readers
from clt_plugin.analysis.weights._blocks import Block, blocks, check_one_model
from clt_plugin.analysis.weights._nulls import FEWEST, NULLS, Bank, Nulls, unit_writes
from clt_plugin.analysis.weights._readers import ADDED, Units
from clt_plugin.analysis.weights._tally import Above, Tally
from clt_plugin.analysis.weights.targeted import REPLICATES, Targeting, bootstrap, interval
from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.errors import WiringError
from clt_plugin.core.wiring import Site

if TYPE_CHECKING:
    import pandas as pd

VECTORS = ("cross", "same", "all")
READ_BY = ("next", "later", "same")


@dataclass(frozen=True)
class Settings:
    """What is scanned for, and how: see `attention_targeting`."""

    kind: str
    vectors: str
    read_by: str
    gains: bool
    nulls: Sequence[str] | None
    draws: int
    fdr: float
    seed: int
    bar: bool | None

    def __post_init__(self) -> None:
        for name, value, known in (("vectors", self.vectors, VECTORS), ("read_by", self.read_by, READ_BY)):
            if value not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {value!r}")
        if unknown := [name for name in self.nulls or () if name not in self.known]:
            raise ValueError(f"the nulls of {self.kind}s are {', '.join(self.known)}, not {', '.join(unknown)}")
        if self.draws < FEWEST:
            raise ValueError(f"a 99th percentile needs at least {FEWEST} draws, not {self.draws}")

    @property
    def known(self) -> tuple[str, ...]:
        """The nulls that there are for this kind of unit."""
        return tuple(name for name in NULLS if self.kind == "head" or name != "norm")


@torch.no_grad()
def scan(
    clt: Crosscoder, model: Any, settings: Settings, units_of: Callable[[nn.Module, HostModel], Units], part: str
) -> Targeting:
    """Scan a crosscoder's vectors against units.

    Args:
        clt: The crosscoder.
        model: The model, in any of the three forms.
        settings: How.
        units_of: Finds the units of the plain model.
        part: What heads read for; empty for neurons.
    """
    check_one_model(clt)
    chance = torch.Generator().manual_seed(settings.seed)
    with plain_model(model) as hf:
        host = check_fits(clt, hf, "observe")
        units = units_of(hf, host)
        through = _readers.to_stream(clt, hf, host, units.weights[0])
        asked = settings.nulls is None or "base" in settings.nulls
        # As many as will be drawn: all neurons of all layers would take as much memory again as the rows they read.
        own = [unit_writes(each, settings.draws, chance) for each in _readers.neuron_writes(hf, host)] if asked else []
    readers = _readers_of(clt, host, units, settings)
    pairs = _pairs(clt, settings.vectors)
    if not any(readers[site] for sites in pairs.values() for site in sites):
        raise WiringError(
            f"no {settings.vectors} vectors of this crosscoder are read by a {settings.kind}: it writes none to layers "
            f"that others follow, or adds to none of {', '.join(ADDED)}; see vectors= and read_by="
        )
    bank = Bank.of(clt, pairs, through, chance)
    nulls = Nulls(units, bank, pairs, own, settings.draws, chance)
    names = _drawable(nulls, settings)
    tallies = {name: Tally(clt.group_sizes, tuple(map(units.count, range(host.n_layers)))) for name in names}
    sites = list(clt.wiring.write_sites)
    n_vectors = 0
    for block in blocks(clt, settings.bar, f"{settings.kind}s"):
        for site in pairs.get(block.group, ()):
            if readers[site]:
                n_vectors += _add(block, site, sites.index(site), readers[site], units, nulls, tallies, through)
    folded = "folded in" if settings.gains else "left out"
    what = {"q": "queries", "k": "keys", "v": "values"}.get(part, "neurons")
    about = f"{settings.vectors} vectors, {what} of {settings.read_by} layers, gains {folded}"
    return Targeting(
        kind=settings.kind,
        part=part,
        table=_table(tallies, settings),
        fdr=settings.fdr,
        vectors=n_vectors,
        about=about,
        null=names[0],
        _tallies=tallies,
        _labels=group_labels(clt.wiring),
        _sources=clt.wiring.home,
        _sites=tuple(sites),
        _seed=settings.seed,
    )


def _add(
    block: Block,
    site: Site,
    number: int,
    layers: Sequence[int],
    units: Units,
    nulls: Nulls,
    tallies: dict[str, Tally],
    through: Callable[[Site, Tensor], Tensor],
) -> int:
    """Count a block's vectors to one target against all nulls; return how many there are."""
    written = through(site, block.vectors[site])
    norms = written.norm(dim=1)
    alive = norms > 0
    latents = torch.arange(block.rows.start, block.rows.stop)[alive.cpu()]
    vectors, norms = written[alive] / norms[alive, None], norms[alive]
    for layer in layers:
        strengths = units.strengths(layer, vectors)
        limits = {name: nulls.limits(name, site, layer) for name in tallies}
        # The document's null knows one norm, so that vectors are compared with it at their own.
        long = {name for name in tallies if name == "isotropic" and units.kind == "head"}
        scaled = strengths * (norms / nulls.bank.scale)[:, None] if long else strengths
        for names, shown in ((long, scaled), (tallies.keys() - long, strengths)):
            if names:
                above = Above.of(shown, [limits[name] for name in names])
                for name in names:
                    tallies[name].add(above, limits[name], (block.group, number, layer), latents)
    return len(vectors)


def _pairs(clt: Crosscoder, vectors: str) -> dict[int, list[Site]]:
    """Return for each group the targets whose vectors are scanned."""
    wiring = clt.wiring

    def wanted(group: int, site: Site) -> bool:
        return site.name in ADDED and (vectors == "all" or (site.layer == wiring.home[group]) == (vectors == "same"))

    chosen = {g: [site for site in sites if wanted(g, site)] for g, sites in enumerate(wiring.writes)}
    return {g: sites for g, sites in chosen.items() if sites}


def _readers_of(clt: Crosscoder, host: HostModel, units: Units, settings: Settings) -> dict[Site, list[int]]:
    """Return for each target the layers whose units read it."""
    found = {}
    for site in clt.wiring.write_sites:
        first = site.layer if settings.read_by == "same" else units.first_after(site, host.parallel)
        last = host.n_layers if settings.read_by == "later" else first + 1
        found[site] = list(range(first, min(last, host.n_layers)))
    return found


def _drawable(nulls: Nulls, settings: Settings) -> list[str]:
    """Return the nulls' names, those shown first at the front; refuse one that was asked for and cannot be drawn."""
    names = settings.known if settings.nulls is None else settings.nulls
    why_not = {name: reason for name in names if (reason := nulls.can_draw(name))}
    if settings.nulls is not None and why_not:
        name, reason = next(iter(why_not.items()))
        raise ValueError(f"the null {name!r} cannot be drawn: {reason}; leave it out of nulls=")
    kept = [name for name in names if name not in why_not]
    return sorted(kept, key=lambda name: name != "covariance") if settings.nulls is None else kept


def _table(tallies: dict[str, Tally], settings: Settings) -> pd.DataFrame:
    import numpy as np
    import pandas as pd

    rows = []
    for name, tally in tallies.items():
        tests, n = tally.tests, int(tally.vectors.sum())
        hits = int(torch.cat(tally.hits).sum())
        low, high = interval(bootstrap(tally, settings.seed).sum(1) / max(tests, 1))
        chance = np.random.default_rng(settings.seed)
        of_vectors = [tally.largest / max(n, 1), tally.naive / max(n, 1)]
        ends = np.percentile(chance.binomial(n, of_vectors[0], REPLICATES) / max(n, 1), [2.5, 97.5])
        discoveries = tally.discoveries(settings.fdr)
        rows.append(
            {
                "null": name,
                "tests": tests,
                "share": hits / max(tests, 1),
                "low": float(low),
                "high": float(high),
                "by_chance": tally.by_chance / max(tests, 1),
                "share_largest": of_vectors[0],
                "low_largest": float(ends[0]),
                "high_largest": float(ends[1]),
                "naive": of_vectors[1],
                "naive_by_chance": tally.naive_by_chance / max(n, 1),
                "discoveries": discoveries,
                "discovered": discoveries / max(tests, 1),
            }
        )
    return pd.DataFrame(rows)
