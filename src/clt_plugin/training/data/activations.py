"""What training data is made of: activations of tokens at sites, and sources that give them chunk by chunk.

Activations are kept as (tokens, width), every site's coordinates side by side: sites may differ in width, and a token
moves through buffers and files as one row. Whoever wants sites gets views of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from clt_plugin.core.wiring import Site, Wiring


class DataError(ValueError):
    """Training data that cannot be had as asked. Says what to do next."""


@dataclass(frozen=True)
class Cursor:
    """Where in a source to go on: plain numbers, so that a run that is resumed finds the same tokens.

    Attributes:
        epoch: How often the source was read to its end before.
        item: How many texts of it were finished (of a cache: how many chunks).
        offset: How many tokens of the next text were used.
    """

    epoch: int = 0
    item: int = 0
    offset: int = 0

    def to_list(self) -> list[int]:
        """Return it as plain data, for JSON."""
        return list(astuple(self))


@dataclass(frozen=True, eq=False)
class Activations:
    """What tokens have at sites.

    Attributes:
        flat: (tokens, sum of the sites' widths), the sites side by side.
        sites: The sites, in the order of their columns.
        widths: Each one's width.
    """

    flat: Tensor
    sites: tuple[Site, ...]
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.flat.ndim != 2 or self.flat.shape[1] != sum(self.widths) or len(self.sites) != len(self.widths):
            raise DataError(
                f"activations are (tokens, {sum(self.widths)}) for sites of widths {self.widths}, not "
                f"{tuple(self.flat.shape)}"
            )

    def __len__(self) -> int:
        return len(self.flat)

    @cached_property
    def columns(self) -> dict[Site, slice]:
        """Which columns of `flat` belong to each site."""
        return columns_of(self.sites, self.widths)

    def __getitem__(self, site: Site) -> Tensor:
        """Return what the tokens have at one site, (tokens, d): a view."""
        if site not in self.columns:
            raise DataError(f"{site} was not harvested: the sites are {', '.join(map(str, self.sites))}")
        return self.flat[:, self.columns[site]]

    def by_site(self, sites: Iterable[Site] | None = None) -> dict[Site, Tensor]:
        """Return {site: (tokens, d)}, views, as crosscoders take them.

        Args:
            sites: Which sites, such as ``wiring.read_sites``; all by default.
        """
        return {site: self[site] for site in (self.sites if sites is None else sites)}

    def stacked(self, sites: Iterable[Site] | None = None) -> Tensor:
        """Return (sites, tokens, d), a view where the sites lie side by side; all must be of one width.

        Args:
            sites: Which sites, in which order; all by default.
        """
        parts = self.by_site(sites)
        if not parts or len({part.shape[1] for part in parts.values()}) > 1:
            widths = [part.shape[1] for part in parts.values()]
            raise DataError(f"sites of widths {widths} cannot be stacked: ask for them by_site")
        slices = [self.columns[site] for site in parts]
        if all(a.stop == b.start for a, b in pairwise(slices)):
            side_by_side = self.flat[:, slices[0].start : slices[-1].stop]
            return side_by_side.unflatten(1, (len(slices), -1)).transpose(0, 1)
        return torch.stack(list(parts.values()))

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Activations:
        """Return them on another device or in another dtype."""
        return replace(self, flat=self.flat.to(device=device, dtype=dtype))


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some tokens in a row, as a source gives them.

    Attributes:
        activations: What they have at the source's sites.
        ids: Which tokens they are, (tokens,), on the CPU.
        after: Where the next chunk begins.
    """

    activations: Activations
    ids: Tensor
    after: Cursor


class Source(Protocol):
    """Whatever gives activations: a `Harvest` from models, an `ActivationCache` from a folder, or one of your own."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites, in the order of columns."""
        ...

    @property
    def widths(self) -> tuple[int, ...]:
        """Each site's width."""
        ...

    def chunks(self, start: Cursor = ...) -> Iterator[Chunk]:
        """Give chunks from a cursor on: the same ones whenever it is called with the same cursor."""
        ...

    def identity(self) -> dict[str, Any]:
        """Say by plain data what decides which activations come: two sources of equal identity give the same."""
        ...


# ---------------------------------------------------------------- what sources share


def sites_of(sites: Wiring | Iterable[Site]) -> tuple[Site, ...]:
    """Return the sites that are asked for; of a wiring all it reads and writes, each once."""
    if isinstance(sites, Wiring):
        sites = (*sites.read_sites, *sites.write_sites)
    found = tuple(sites)
    for site in found:
        if not isinstance(site, Site):
            raise DataError(f"sites are Site values or a Wiring, not {site!r}")
    if not found:
        raise DataError("no site is asked for: give a Wiring, or Site values")
    return tuple(dict.fromkeys(found))


def columns_of(sites: Iterable[Site], widths: Iterable[int]) -> dict[Site, slice]:
    """Return which columns belong to each site."""
    columns, start = {}, 0
    for site, width in zip(sites, widths, strict=True):
        columns[site] = slice(start, start + width)
        start += width
    return columns


def digest(data: Any) -> str:
    """Return the SHA-256 of plain data, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def permutation(n: int, *seeds: int | str) -> Tensor:
    """Return the numbers below n in an order drawn from seeds, (n,); the same seeds give the same order."""
    # Hashed, so that neighbouring seeds have nothing in common.
    generator = torch.Generator().manual_seed(int(digest(seeds)[:15], 16))
    return torch.randperm(n, generator=generator)


def check_whole(name: str, value: Any, least: int) -> None:
    """Refuse what is not a whole number of at least so much."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise DataError(f"{name} is a whole number of at least {least}, not {value!r}")
