"""What a format says of a folder, and how a crosscoder is made of it: checked first, then fetched, then read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from clt_plugin.core import Activation, Crosscoder, File, FormatError, Host, Layout, LazyStore, Piece, Wiring
from clt_plugin.core.files import Header
from clt_plugin.core.store import ABOUT_ZERO, is_finite, read_piece
from clt_plugin.hub import fetch, read_headers

LAZY_SHARE = 0.4
"""With ``lazy="auto"``, weights larger than this share of the free memory stay on disk."""

SAMPLED_ROWS = 8
"""Of a decoder with entries that must be about 0, how many rows are looked at when it is loaded."""

FEW_ROWS = 256
"""Up to how many latents of a group are fetched row by row from the Hub, instead of with the file they lie in."""


@dataclass(frozen=True)
class Formula:
    """A small tensor that is computed from stored ones, such as the exponential of a logarithm.

    Attributes:
        of: What computes it, given each piece's tensor as it is stored.
        pieces: What it is computed from.
    """

    of: Callable[..., Tensor]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Description:
    """A crosscoder on disk: what it is, and which tensor lies where.

    Attributes:
        label: What messages call the folder.
        format: The format's name.
        wiring: Who reads and writes what.
        d_model: Widths, as for `Crosscoder`.
        n_latents: The number of latents of each group.
        activation: The activation.
        host: The model it belongs to.
        weights: For each (kind, number), the pieces that make ``W_enc``, ``W_dec`` or ``W_skip``, rows first.
        vectors: For each (``"b_enc"``, ``"b_dec"``, ``"threshold"`` or ``"stored_norms"``, number), its piece or
            formula. An absent bias is 0, an absent threshold of BatchTopK not measured.
        ignored: Keys that may be there and are rightly not read, by the file's name in messages.
        metadata: See `Crosscoder.metadata`.
        is_partial: Whether it is a selection of a larger one.
    """

    label: str
    format: str
    wiring: Wiring
    d_model: Any
    n_latents: tuple[int, ...]
    activation: Activation
    host: Host
    weights: Mapping[tuple[str, int], tuple[Piece, ...]]
    vectors: Mapping[tuple[str, int], Piece | Formula]
    ignored: Mapping[str, frozenset[str]] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    is_partial: bool = False

    @property
    def weight_files(self) -> list[File]:
        """The files of weights."""
        return list(dict.fromkeys(piece.file for pieces in self.weights.values() for piece in pieces))

    @property
    def files(self) -> list[File]:
        """Every file."""
        return list(dict.fromkeys(piece.file for piece in self.pieces))

    @property
    def pieces(self) -> list[Piece]:
        """Every piece."""
        of_vectors = (v.pieces if isinstance(v, Formula) else (v,) for v in self.vectors.values())
        return [piece for pieces in (*self.weights.values(), *of_vectors) for piece in pieces]

    @property
    def has_measured_threshold(self) -> bool:
        """Whether it is a BatchTopK whose thresholds were measured."""
        return self.activation.has_batch_threshold and ("threshold", 0) in self.vectors

    def select(self, groups: Sequence[int]) -> Description:
        """Return the description of some groups: what the others need is not looked at."""
        wiring = self.wiring.select(groups)
        number = {
            "b_dec": [self.wiring.write_sites.index(site) for site in wiring.write_sites],
            "W_skip": [self.wiring.skips.index(pair) for pair in wiring.skips],
        }

        def kept(held: Mapping[tuple[str, int], Any]) -> dict[tuple[str, int], Any]:
            kinds = dict.fromkeys(kind for kind, _ in held)
            pairs = ((kind, new, old) for kind in kinds for new, old in enumerate(number.get(kind, groups)))
            return {(kind, new): held[kind, old] for kind, new, old in pairs if (kind, old) in held}

        ignored = {file: set(keys) for file, keys in self.ignored.items()}
        for piece in self.pieces:  # known, if not needed
            ignored.setdefault(str(piece.file), set()).add(piece.key)
        sizes = tuple(self.n_latents[g] for g in groups)
        width = Layout.of(self.wiring, self.d_model).width
        return replace(
            self,
            wiring=wiring,
            d_model=width,
            n_latents=sizes,
            weights=kept(self.weights),
            vectors=kept(self.vectors),
            ignored={file: frozenset(keys) for file, keys in ignored.items()},
            is_partial=True,
        )


def join(descriptions: Sequence[Description], label: str, format: str, name: str) -> Description:
    """Return the description of several crosscoders side by side, such as a transcoder a layer.

    Args:
        descriptions: Those of disjoint sites, of one activation; they are put in the order of their layers.
        label: What messages call the whole.
        format: The format's name.
        name: The wiring's name; ``{n}`` stands for the number of groups.
    """
    parts = sorted(descriptions, key=lambda part: part.wiring.home)
    if not parts:
        raise FormatError(f"{label} names no files")
    homes = [home for part in parts for home in part.wiring.home]
    twice = sorted({home for home in homes if homes.count(home) > 1})
    if twice:
        at = [part.label for part in parts if set(part.wiring.home) & set(twice)]
        raise FormatError(
            f"{label} holds layer {twice[0]} more than once ({', '.join(at[:4])}): name one for each layer"
        )
    settings = list(dict.fromkeys(part.activation for part in parts))
    if len(settings) > 1:
        raise FormatError(f"{label} mixes activations ({', '.join(map(str, settings))}): load the layers one by one")
    hosts = list(dict.fromkeys(part.host for part in parts))
    if len(hosts) > 1:
        raise FormatError(f"{label} mixes hosts ({', '.join(map(str, hosts))}): load the layers one by one")
    weights, vectors, start = {}, {}, {"group": 0, "b_dec": 0, "W_skip": 0}
    for part in parts:
        for (kind, number), pieces in part.weights.items():
            weights[kind, number + start["W_skip" if kind == "W_skip" else "group"]] = pieces
        for (kind, number), vector in part.vectors.items():
            vectors[kind, number + start["b_dec" if kind == "b_dec" else "group"]] = vector
        start["group"] += part.wiring.n_groups
        start["b_dec"] += len(part.wiring.write_sites)
        start["W_skip"] += len(part.wiring.skips)
    wiring: Wiring = replace(reduce(add, (part.wiring for part in parts)), name=name.format(n=len(parts)))
    widths = {site: width for part in parts for site, width in Layout.of(part.wiring, part.d_model).widths}
    return replace(
        parts[0],
        label=label,
        format=format,
        wiring=wiring,
        d_model=widths,
        n_latents=tuple(n for part in parts for n in part.n_latents),
        weights=weights,
        vectors=vectors,
        ignored={file: keys for part in parts for file, keys in part.ignored.items()},
    )


def build(
    description: Description,
    lazy: bool | str = "auto",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    latents: Mapping[int, Tensor] | None = None,
) -> Crosscoder:
    """Check every header, fetch what is not here, then make the crosscoder: nothing is made of what does not fit.

    Args:
        description: What lies where.
        lazy: Leave encoders and decoders on disk; ``"auto"`` does where they exceed `LAZY_SHARE` of free memory.
        dtype: Convert to it; None keeps the files', which must then agree.
        device: Where to put parameters, and what is read later.
        latents: For groups that do not keep all their latents, which they keep.
    """
    if lazy not in (True, False, "auto"):
        raise ValueError(f"lazy must be True, False or 'auto', not {lazy!r}")
    latents = dict(latents or {})
    dtypes = check(description)
    if dtype is None:
        if len(dtypes) > 1:
            names = ", ".join(sorted(str(d) for d in dtypes))
            raise FormatError(f"{description.label} mixes the dtypes {names}: say which you want with dtype=")
        (dtype,) = dtypes
    device = torch.device(device or "cpu")
    # What a few latents are taken of need not be fetched whole, nor what only a bias is taken of.
    fetch(_files_in_full(description, latents))
    _check_early_targets(description, latents)
    n_latents = tuple(len(latents[g]) if g in latents else n for g, n in enumerate(description.n_latents))
    crosscoder = Crosscoder(
        description.wiring,
        description.d_model,
        n_latents,
        description.activation,
        host=description.host,
        dtype=dtype,
        device=device,
        store=LazyStore(description.weights, dtype, device, latents),
    )
    crosscoder.metadata = dict(description.metadata)
    crosscoder.is_partial = description.is_partial or bool(latents)
    if any(name == "stored_norms" for name, _ in description.vectors):
        empty = (torch.zeros(n, dtype=dtype, device=device) for n in n_latents)
        crosscoder.stored_norms = nn.ParameterList(nn.Parameter(norms, requires_grad=False) for norms in empty)
    with torch.no_grad():
        for (name, number), vector in description.vectors.items():
            parameter = getattr(crosscoder, name)[number]
            value = read_vector(vector)
            if name != "b_dec" and number in latents and value.ndim:
                value = value[latents[number]]
            if value.shape != parameter.shape:
                raise FormatError(
                    f"{description.label}: {name} {number} has shape {tuple(value.shape)}, where "
                    f"{tuple(parameter.shape)} was expected"
                )
            parameter.copy_(value)
    crosscoder.eval().requires_grad_(False)
    keep_on_disk = _is_large(crosscoder, dtype, device) if lazy == "auto" else lazy
    return crosscoder if keep_on_disk else crosscoder.materialize()


def _files_in_full(description: Description, latents: Mapping[int, Tensor]) -> list[File]:
    """Return the files to fetch: those of weights, without those of which only a few rows are needed."""
    needed = []
    for (kind, number), pieces in description.weights.items():
        few = kind != "W_skip" and number in latents and len(latents[number]) <= FEW_ROWS
        needed += [piece.file for piece in pieces if not few or piece.rows_last]
    return list(dict.fromkeys(needed))


def _check_early_targets(description: Description, latents: Mapping[int, Tensor]) -> None:
    """Read a few rows of each decoder whose early targets must be about 0: refused here, not at its first use."""
    for (_, number), pieces in description.weights.items():
        for piece in pieces:
            if piece.zeros is None:
                continue
            kept = latents.get(number, torch.arange(piece.shape[len(piece.at)]))
            rows = kept[torch.linspace(0, len(kept) - 1, SAMPLED_ROWS).long().unique()]
            try:
                read_piece(piece, rows)
            except FormatError as error:
                _explain_if_relative(piece, rows, error)
                raise


def _explain_if_relative(piece: Piece, rows: Tensor, error: FormatError) -> None:
    """Say so of a decoder that counts targets from its source: its last targets are 0, not its first."""
    largest = piece.file.read(piece.key, piece.at, rows).abs().amax(dim=(0, 2))
    assert piece.zeros is not None
    n_early = piece.zeros[1] - piece.zeros[0]
    if bool(largest[-n_early:].max() <= ABOUT_ZERO * largest.max()):
        raise FormatError(
            f"{piece.file}: {piece.key} is 0 at its last {n_early} targets, not at its first: it seems to count "
            "targets from its source on, where this format counts from the first layer, so it is refused"
        ) from error


def _is_large(crosscoder: Crosscoder, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights exceed `LAZY_SHARE` of what is free where they would go."""
    widths = crosscoder.layout
    groups = enumerate(crosscoder.group_sizes)
    n_weights = sum(n * (widths.read_width(g) + widths.write_width(g)) for g, n in groups)
    n_weights += sum(widths.width[read] * widths.width[write] for read, write in crosscoder.wiring.skips)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    return n_weights * dtype.itemsize > LAZY_SHARE * free


def check(description: Description) -> set[torch.dtype]:
    """Compare every file's header with what is expected of it; return the dtypes found, or say what is wrong."""
    headers, by_file = read_headers(description.files), _by_file(description.pieces)
    dtypes = set()
    for file, pieces in by_file.items():
        dtypes |= _check_file(file, headers[file], pieces, description.ignored.get(str(file), frozenset()))
    return dtypes


def check_files(description: Description) -> tuple[set[torch.dtype], list[str]]:
    """Do the same and go on: return the dtypes found, and everything that is wrong."""
    dtypes: set[torch.dtype] = set()
    problems = []
    with contextlib.suppress(FormatError):  # each is met again below
        read_headers(description.files)  # several at a time
    for file, pieces in _by_file(description.pieces).items():
        try:
            dtypes |= _check_file(file, file.header(), pieces, description.ignored.get(str(file), frozenset()))
        except FormatError as error:
            problems.append(str(error))
    return dtypes, problems


def _check_file(file: File, header: Header, pieces: Iterable[Piece], ignored: frozenset[str]) -> set[torch.dtype]:
    dtypes = set()
    for piece in pieces:
        if piece.key not in header:
            found = ", ".join(sorted(header)) or "nothing"
            raise FormatError(f"{file} has no tensor {piece.key}: it holds {found}")
        shape, dtype = header[piece.key]
        if shape != piece.shape:
            raise FormatError(f"{file}: {piece.key} has shape {shape}, where {piece.shape} was expected")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise FormatError(
                f"{file}: {piece.key} is of dtype {dtype}: weights are floats (float16 to float64, bfloat16)"
            )
        dtypes.add(dtype)
    unknown = sorted(set(header) - {piece.key for piece in pieces} - ignored)
    if unknown:
        raise FormatError(
            f"{file} holds {', '.join(unknown)}, which this format does not know: reading on would ignore "
            "weights, so it is refused"
        )
    return dtypes


def _by_file(pieces: Iterable[Piece]) -> dict[File, list[Piece]]:
    by_file: dict[File, list[Piece]] = {}
    for piece in pieces:
        by_file.setdefault(piece.file, []).append(piece)
    return by_file


def read_vector(vector: Piece | Formula) -> Tensor:
    """Read a small tensor whole, or compute it; refuse what is not finite."""
    if isinstance(vector, Formula):
        tensor, where = vector.of(*(read_vector(piece) for piece in vector.pieces)), vector.pieces[0]
    else:
        tensor, where = vector.file.read(vector.key, vector.at), vector
        if vector.scale is not None:
            tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * vector.scale
    if not is_finite(tensor):
        raise FormatError(f"{where.file}: {where.key} holds values that are not finite (nan or inf)")
    return tensor
