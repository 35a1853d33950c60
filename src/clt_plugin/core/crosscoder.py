"""The crosscoder: parameters, encode, decode, norms.

For group g with activations f_g, and a written site w::

    f_g = activation(sum over reads r of x_r @ W_enc[g][rows of r] + b_enc[g])
    y_w = b_dec[w] + sum over groups g that write w of f_g @ W_dec[g][:, columns of w]  (+ x_r @ W_skip if affine)

Canonical shapes, where ... is any number of leading axes (batch, position)::

    x            {site: (..., d_site)}, or stacked (n_read_sites, ..., d)
    activations  (..., F_g) a group, or stacked (n_groups, ..., F)
    y            {site: (..., d_site)}, or stacked (n_write_sites, ..., d)
    W_enc[g]     (sum of the widths read, F_g)       b_enc[g]  (F_g,)
    W_dec[g]     (F_g, sum of the widths written)    b_dec[w]  (d_w,)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clt_plugin.core._subset import chosen_groups, subset
from clt_plugin.core.activations import Activation, activate_jointly
from clt_plugin.core.errors import WiringError
from clt_plugin.core.features import (
    SparseFeatures,
    SparseGroup,
    decode_dense_group,
    decode_sparse_group,
    stack_groups,
)
from clt_plugin.core.host import Host, Sites
from clt_plugin.core.persistence import Persistent
from clt_plugin.core.store import KINDS, LazyStore, MemoryStore, Store, product
from clt_plugin.core.wiring import Layout, Site, Wiring

NORM_KINDS = ("concatenated", "separate", "per_write")


class Crosscoder(Persistent, nn.Module):
    """Groups of latents that read and write sites of a model, see `Wiring`.

    Users of transcoders know it as `CrossLayerTranscoder`: the same class, with a wiring that writes MLP outputs.

    Args:
        wiring: Who reads and writes what.
        d_model: The width of every site, or widths by model name, or by `Site`.
        n_latents: The number of latents of every group, or one number a group.
        activation: ``"relu"``, ``"jumprelu"``, ``"topk"``, ``"batchtopk"``, any registered name, or an `Activation`.
        host: The model it belongs to.
        dtype: Of the parameters.
        device: Of the parameters.
        store: Weights that live elsewhere, such as a `LazyStore`; by default parameters are made and initialised.
        **settings: Of the activation, such as ``k=32``.

    Initial weights are uniform, +-1/sqrt(n_latents) for encoders and +-1/sqrt(n_layers * d) for decoders; JumpReLU
    thresholds are 0.03 (Anthropic 2025, "Circuit Tracing", appendix on CLT training).
    """

    def __init__(
        self,
        wiring: Wiring,
        d_model: int | Mapping[Any, int],
        n_latents: int | Sequence[int],
        activation: str | Activation = "relu",
        *,
        host: Host | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        store: LazyStore | None = None,
        **settings: Any,
    ) -> None:
        # Not super().__init__(): a class that travels to a remote model is rebuilt from its source, where the
        # zero-argument form has no class cell to look into.
        nn.Module.__init__(self)
        self.wiring = wiring
        self.layout = Layout.of(wiring, d_model)
        self.activation = Activation.make(activation, **settings)
        self.host = host or Host()
        # Plain data on how it came about, which is saved with it: "recipe", "metrics", "source", "licence".
        self.metadata: dict[str, Any] = {}
        self.group_sizes = _group_sizes(n_latents, wiring.n_groups)
        made: dict[str, Any] = {"dtype": dtype, "device": device}

        def vectors(sizes: Iterable[int], value: float = 0.0, grad: bool = True) -> nn.ParameterList:
            return nn.ParameterList(nn.Parameter(torch.full((n,), value, **made), grad) for n in sizes)

        self.b_enc = vectors(self.group_sizes)
        self.b_dec = vectors(self.layout.width[site] for site in wiring.write_sites)
        self.threshold: nn.ParameterList | None = None
        if self.activation.has_threshold:
            self.threshold = vectors(self.group_sizes, 0.03)
        elif self.activation.has_batch_threshold:
            unmeasured = (torch.full((), math.nan, **made) for _ in self.group_sizes)
            self.threshold = nn.ParameterList(nn.Parameter(value, requires_grad=False) for value in unmeasured)
        # Published decoder norms, where a format stores them; None to measure them on the weights.
        self.stored_norms: nn.ParameterList | None = None
        # What is read lazily is converted to the crosscoder's own dtype and device.
        self._lazy_store = None if store is None else store.moved(self.dtype, self.device)
        if store is None:
            self._make_weights(made)

    def _make_weights(self, made: dict[str, Any]) -> None:
        layout, n_layers = self.layout, self.wiring.n_layers
        groups = list(enumerate(self.group_sizes))
        self.W_enc = nn.ParameterList(_uniform((layout.read_width(g), n), 1 / math.sqrt(n), made) for g, n in groups)
        decoders = []
        for g, n in groups:
            decoder = _uniform((n, layout.write_width(g)), 1.0, made)
            for site, columns in layout.write_slices[g].items():
                decoder.data[:, columns] *= 1 / math.sqrt(n_layers * layout.width[site])
            decoders.append(decoder)
        self.W_dec = nn.ParameterList(decoders)
        skips = [(layout.width[read], layout.width[write]) for read, write in self.wiring.skips]
        self.W_skip = nn.ParameterList(nn.Parameter(torch.zeros(shape, **made)) for shape in skips)

    # ---------------------------------------------------------------- what it is

    @property
    def store(self) -> Store:
        """Where the weights live."""
        if self._lazy_store is not None:
            return self._lazy_store
        return MemoryStore({"W_enc": self.W_enc, "W_dec": self.W_dec, "W_skip": self.W_skip})

    @property
    def is_lazy(self) -> bool:
        """Whether encoders and decoders are read from files when needed."""
        return self._lazy_store is not None

    @property
    def sites(self) -> Sites:
        """Which sites are read and written."""
        return Sites(self.wiring.read_sites, self.wiring.write_sites)

    @property
    def n_layers(self) -> int:
        """How many layers are read or written."""
        return self.wiring.n_layers

    @property
    def d_model(self) -> int:
        """The width that all sites share."""
        width = self.layout.common_width()
        if width is None:
            raise WiringError("the sites differ in width: see layout.width for each")
        return width

    @property
    def n_latents(self) -> int | tuple[int, ...]:
        """The number of latents of every group, or one number a group where they differ."""
        return self.group_sizes[0] if len(set(self.group_sizes)) == 1 else self.group_sizes

    @property
    def has_measured_threshold(self) -> bool:
        """Whether BatchTopK's thresholds were measured, so that it can run outside training."""
        return self.activation.has_batch_threshold and not any(bool(t.isnan()) for t in self.threshold or ())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, in which encoding and decoding are done."""
        return self.b_dec[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.b_dec[0].device

    def extra_repr(self) -> str:
        """Say what it is in a line."""
        lazy = ", lazy" if self.is_lazy else ""
        return f"{self.wiring!r}, n_latents={self.n_latents}, {self.activation}, {self.dtype}{lazy}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    # ---------------------------------------------------------------- encode

    def pre_activations(self, group: int, x: "Float[Tensor, '*batch read']") -> "Float[Tensor, '*batch f']":
        """Return one group's pre-activations.

        Args:
            group: Which group.
            x: What the group reads, its sites side by side, (..., sum of the widths read).

        Returns:
            (..., F_g), in the crosscoder's dtype.
        """
        return product(x.to(self.dtype), self.store, "W_enc", group) + self.b_enc[group]

    def activate(self, group: int, h: "Float[Tensor, '*batch f']") -> "Float[Tensor, '*batch f']":
        """Activate one group's pre-activations, (..., F_g). Not for a jointly selected TopK."""
        if self.activation.joint and (self.training or not self.has_measured_threshold):
            way_out = ", or call estimate_threshold(x) and eval()" if self.activation.has_batch_threshold else ""
            raise WiringError(
                f"{self.activation} selects over all groups together: encode them together with encode(x){way_out}"
            )
        return self.activation(h, self._threshold(group), self._score_scale(group), self.training)

    def encode(self, x: Tensor | Mapping[Site, Tensor], sparse: bool = False) -> Any:
        """Encode what is read into features.

        Args:
            x: Stacked (n_read_sites, ..., d), for a CLT (n_layers, ..., d); or {site: (..., d_site)}. Tensors carry no
                positions: leave out those that ``host.exclude_first`` excludes, as a model with it attached does.
            sparse: Return `SparseFeatures`, which hold the active latents alone: each group is made sparse before
                the next is encoded.

        Returns:
            Stacked (n_groups, ..., F) where the groups are of one size, else one tensor (..., F_g) a group.
        """
        stacked, inputs = self._inputs(x)
        if self.activation.joint:
            every = range(self.wiring.n_groups)
            hs = [self.pre_activations(g, self._read(g, inputs)) for g in every]
            scales = [self._score_scale(g) for g in every]
            acts: Iterable[Tensor] = activate_jointly(self.activation, hs, self._threshold(0), scales, self.training)
        else:
            acts = (self.encode_group(g, self._read(g, inputs)) for g in range(self.wiring.n_groups))
        if not sparse:
            return stack_groups(list(acts)) if stacked else tuple(acts)
        shape = tuple(next(iter(inputs.values())).shape[:-1])
        groups = tuple(SparseGroup.of(act.reshape(-1, act.shape[-1])) for act in acts)
        return SparseFeatures(groups, shape, stacked)

    def encode_group(self, group: int, x: "Float[Tensor, '*batch read']") -> "Float[Tensor, '*batch f']":
        """Encode one group: (..., sum of the widths read) to (..., F_g)."""
        return self.activate(group, self.pre_activations(group, x))

    # ---------------------------------------------------------------- decode

    def decode(
        self,
        features: SparseFeatures | Tensor | Sequence[Tensor],
        x: Tensor | Mapping[Site, Tensor] | None = None,
        path: str = "auto",
    ) -> Any:
        """Decode features into the reconstruction of every written site.

        Args:
            features: What `encode` returned, edited or not: stacked, one tensor a group, or sparse.
            x: What was read; needed only where there are affine skips.
            path: ``"dense"``, ``"sparse"`` (touches active latents' decoder rows only), or ``"auto"``: whichever the
                measured density makes the faster. All give the same result.

        Returns:
            Stacked (n_write_sites, ..., d) where features or x are stacked and all sites are of one width, else
            {site: (..., d_site)}.
        """
        if path not in ("auto", "dense", "sparse"):
            raise ValueError(f"path must be 'auto', 'dense' or 'sparse', not {path!r}")
        groups, shape, stacked = self._features(features)
        total: dict[Site, Tensor] = {}
        for g, acts in enumerate(groups):
            for site, part in self._split(g, self._decode_flat(g, acts, math.prod(shape), path)).items():
                total[site] = total[site] + part if site in total else part
        skips = self._skips(x)
        result = {}
        for site, bias in zip(self.wiring.write_sites, self.b_dec, strict=True):
            y = total[site].reshape(*shape, len(bias)) + bias
            result[site] = y + skips[site] if site in skips else y
        stacked = (stacked or isinstance(x, Tensor)) and self.layout.common_width() is not None
        return torch.stack(list(result.values())) if stacked else result

    def decode_group(self, group: int, acts: Tensor, path: str = "auto") -> dict[Site, Tensor]:
        """Return what one group adds to each site it writes, without biases.

        Args:
            group: Which group.
            acts: (..., F_g).
            path: As in `decode`.

        Returns:
            {site: (..., d_site)}.
        """
        flat = acts.reshape(-1, acts.shape[-1])
        parts = self._split(group, self._decode_flat(group, flat, len(flat), path))
        return {site: part.reshape(*acts.shape[:-1], self.layout.width[site]) for site, part in parts.items()}

    def bias(self, site: Site) -> Tensor:
        """Return the decoder bias of a written site, (d_site,)."""
        return self.b_dec[self.wiring.write_sites.index(site)]

    def skip(self, site: Site, inputs: Mapping[Site, Tensor]) -> Tensor | None:
        """Return what an affine skip adds to a written site, (..., d_site), or None where it has none.

        Args:
            site: The written site.
            inputs: What was read, {site: (..., d_site)}.
        """
        for number, (read, write) in enumerate(self.wiring.skips):
            if write == site:
                return product(inputs[read].to(self.dtype), self.store, "W_skip", number)
        return None

    def forward(self, x: Tensor | Mapping[Site, Tensor]) -> Any:
        """Encode and decode: the reconstruction of every written site, as `decode` returns it."""
        return self.decode(self.encode(x), x)

    # ---------------------------------------------------------------- weights

    def encoder_vectors(self, group: int, latents: Tensor | None = None) -> "Float[Tensor, 'n read']":
        """Return encoder vectors, (n, sum of the widths read), of the latents given or of all."""
        return self.store.get("W_enc", group, latents)

    def decoder_vectors(self, group: int, latents: Tensor | None = None) -> "Float[Tensor, 'n write']":
        """Return decoder vectors, (n, sum of the widths written), of the latents given or of all."""
        return self.store.get("W_dec", group, latents)

    def encoder_view(self, group: int) -> "Float[Tensor, 'reads d f']":
        """Return an encoder as (n_reads, d, F), where the widths read are equal."""
        self._check_equal_widths(self.wiring.reads[group])
        return self.encoder_vectors(group).T.unflatten(0, (len(self.wiring.reads[group]), -1))

    def decoder_view(self, group: int) -> "Float[Tensor, 'f writes d']":
        """Return a decoder as (F, n_writes, d), where the widths written are equal; for a CLT (F, L - l, d)."""
        self._check_equal_widths(self.wiring.writes[group])
        return self.decoder_vectors(group).unflatten(1, (len(self.wiring.writes[group]), -1))

    def decoder_norms(self, group: int, kind: str = "concatenated") -> Tensor:
        """Return the decoder norm of each of a group's latents; differentiable.

        Args:
            group: Which group.
            kind: ``"concatenated"``, the norm of all of a latent's decoder vectors as one, (F,); ``"separate"``, the
                sum of the norms per written site, (F,); ``"per_write"``, those norms themselves, (F, n_writes).
        """
        if kind not in NORM_KINDS:
            raise ValueError(f"kind must be one of {', '.join(NORM_KINDS)}, not {kind!r}")
        weight = self.decoder_vectors(group)
        if kind == "concatenated":
            return weight.norm(dim=-1)
        slices = self.layout.write_slices[group].values()
        norms = torch.stack([weight[:, columns].norm(dim=-1) for columns in slices], dim=1)
        return norms if kind == "per_write" else norms.sum(dim=1)

    def estimate_threshold(self, x: Tensor | Mapping[Site, Tensor]) -> None:
        """Measure BatchTopK's per-token thresholds on inputs, so that it can run outside training.

        The threshold is the smallest score selected over these inputs as one batch: applied to the same inputs
        it selects the same latents.

        Args:
            x: As for `encode`, without excluded positions; more tokens give a better estimate.
        """
        if not self.activation.has_batch_threshold:
            raise WiringError(f"{self.activation} has no measured threshold: only BatchTopK does")
        was_training, self.training = self.training, True
        try:
            # Not as a decorator: a decorated function travels to a remote model without its globals.
            with torch.no_grad():
                acts = self.encode(x)
        finally:
            self.training = was_training
        lowest = []
        for g, act in enumerate(acts):
            scale = self._score_scale(g)
            score = act if scale is None else act * scale
            positive = score[score > 0]
            lowest.append(positive.min() if len(positive) else torch.zeros((), dtype=act.dtype, device=act.device))
        silent = [g for g, value in enumerate(lowest) if not bool(value > 0)]
        if silent and not self.activation.joint:
            warnings.warn(
                f"groups {silent} selected nothing on these inputs, so their threshold is 0: give more inputs, or more "
                "typical ones",
                stacklevel=2,
            )
        if self.activation.joint:
            positive = [value for value in lowest if value > 0] or lowest
            lowest = [torch.stack(positive).min()] * len(lowest)
        for parameter, value in zip(self.threshold or (), lowest, strict=True):
            # Selection is "greater than": step just below the smallest score selected.
            parameter.data.copy_(value.nextafter(torch.zeros_like(value)))

    def materialize(self) -> Crosscoder:
        """Return the same crosscoder with its weights in memory; itself if they are."""
        if not self.is_lazy:
            return self
        return subset(self, self.wiring, range(self.wiring.n_groups), {})

    def select(
        self, layers: Iterable[int] | None = None, features: Mapping[int, Sequence[int]] | None = None
    ) -> Crosscoder:
        """Return a smaller crosscoder, in memory, with some of the groups or latents; what it keeps is exact.

        Encoding, and the change that an edit of a kept feature makes, are those of the whole. The reconstruction
        is not, see `is_partial`, and in a model neither are gradients: paths through what is left out are missing.

        Args:
            layers: Keep the groups at home in these layers.
            features: {layer: latents to keep there, in this order}; layers left out keep all theirs.
        """
        frozen = not self.training and self.has_measured_threshold
        groups, latents = chosen_groups(self.wiring, self.group_sizes, self.activation, frozen, layers, features)
        part = subset(self, self.wiring.select(groups), groups, latents)
        part.is_partial = True
        return part

    is_partial: bool = False
    """Whether groups or latents were left out by `select`, so that its reconstruction is not the whole's."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return all parameters by name. Of a lazy crosscoder this reads every weight into memory."""
        if self.is_lazy:
            return self.materialize().state_dict(*args, **kwargs)
        return nn.Module.state_dict(self, *args, **kwargs)

    def __reduce__(self) -> Any:
        # Lazily read weights are materialised when pickled: files do not travel.
        if self.is_lazy:
            return self.materialize().__reduce__()
        return (_new_crosscoder, (type(self),), self.__dict__)

    def __getattr__(self, name: str) -> Any:
        if name in KINDS and self.__dict__.get("_lazy_store") is not None:
            raise AttributeError(
                f"{name} of a lazy crosscoder is not in memory: use encoder_vectors, decoder_vectors or materialize()"
            )
        return nn.Module.__getattr__(self, name)

    def _apply(self, fn: Any, recurse: bool = True) -> Crosscoder:
        if self._lazy_store is not None:
            probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
            self._lazy_store = self._lazy_store.moved(probe.dtype, probe.device)
        return nn.Module._apply(self, fn, recurse)

    # ---------------------------------------------------------------- inside

    def _check_equal_widths(self, sites: Sequence[Site]) -> None:
        widths = {site: self.layout.width[site] for site in sites}
        if len(set(widths.values())) > 1:
            shown = ", ".join(f"{site} {width}" for site, width in widths.items())
            raise WiringError(f"the sites differ in width ({shown}), so there is no such view: use layout's slices")

    def _threshold(self, group: int) -> Tensor | None:
        return None if self.threshold is None else self.threshold[group]

    def _score_scale(self, group: int) -> Tensor | None:
        if not self.activation.ranks_by_decoder_norm:
            return None
        if self.stored_norms is not None:
            return self.stored_norms[group]
        return self.decoder_norms(group).detach()

    def _inputs(self, x: Tensor | Mapping[Site, Tensor]) -> tuple[bool, Mapping[Site, Tensor]]:
        """Return whether inputs are stacked, and the inputs by site, with their shapes checked."""
        sites, stacked = self.wiring.read_sites, isinstance(x, Tensor)
        if not isinstance(x, Tensor | Mapping):
            raise WiringError(f"inputs are one stacked tensor or a mapping by site, not {type(x).__name__}")
        if isinstance(x, Tensor):
            if x.ndim < 2 or x.shape[0] != len(sites):
                expected = f"({len(sites)}, ..., {self.layout.common_width() or 'd'})"
                raise WiringError(f"stacked inputs have one entry for each site read, {expected}, not {tuple(x.shape)}")
            inputs: Mapping[Site, Tensor] = dict(zip(sites, x, strict=True))
        else:
            inputs = x
        missing = [str(site) for site in sites if site not in inputs]
        if missing:
            raise WiringError(f"inputs for {', '.join(missing)} are missing")
        leading = {tuple(inputs[site].shape[:-1]) for site in sites}
        if len(leading) > 1:
            raise WiringError(f"the inputs' leading shapes differ: {sorted(leading)}")
        for site in sites:
            width, shape = self.layout.width[site], tuple(inputs[site].shape)
            if shape[-1] != width:
                raise WiringError(f"{site} has width {width}, but its input has shape {shape}")
        return stacked, inputs

    def _read(self, group: int, inputs: Mapping[Site, Tensor]) -> Tensor:
        """Return what a group reads, side by side."""
        parts = [inputs[site] for site in self.wiring.reads[group]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _features(self, features: Any) -> tuple[Sequence[Any], tuple[int, ...], bool]:
        """Return features a group (flat or sparse), their leading shape, and whether they were stacked."""
        groups: list[Any] = list(features.groups if isinstance(features, SparseFeatures) else features)
        if isinstance(features, SparseFeatures):
            shape, stacked = features.shape, features.stacked
            sizes = [group.n_latents for group in groups]
        else:
            shape, stacked = (), isinstance(features, Tensor)
            sizes, leading = [acts.shape[-1] for acts in groups], {tuple(acts.shape[:-1]) for acts in groups}
            if len(leading) > 1:
                raise WiringError(f"the features' leading shapes differ: {sorted(leading)}")
            if groups:
                shape = leading.pop()
                groups = [acts.reshape(-1, acts.shape[-1]) for acts in groups]
        if tuple(sizes) != self.group_sizes:
            raise WiringError(f"the groups have {list(self.group_sizes)} latents, but the features have {sizes}")
        return groups, shape, stacked

    def _decode_flat(self, group: int, acts: Tensor | SparseGroup, n_tokens: int, path: str) -> Tensor:
        """Decode one group, (T, F) or sparse, to (T, sum of the widths written)."""
        weight = None if self.is_lazy else self.W_dec[group]

        def read_rows(latents: Tensor | None) -> Tensor:
            return self.store.get("W_dec", group, latents)

        if isinstance(acts, SparseGroup):
            return decode_sparse_group(acts, weight, read_rows, n_tokens)
        return decode_dense_group(acts.to(self.dtype), weight, read_rows, path)

    def _split(self, group: int, y: Tensor) -> dict[Site, Tensor]:
        return {site: y[..., columns] for site, columns in self.layout.write_slices[group].items()}

    def _skips(self, x: Tensor | Mapping[Site, Tensor] | None) -> dict[Site, Tensor]:
        if not self.wiring.skips:
            return {}
        if x is None:
            raise WiringError("this crosscoder has affine skips, which read x: call decode(features, x)")
        _, inputs = self._inputs(x)
        return {write: y for _, write in self.wiring.skips if (y := self.skip(write, inputs)) is not None}


CrossLayerTranscoder = Crosscoder
"""A `Crosscoder` whose wiring writes MLP outputs: what users say and see."""


def _new_crosscoder(cls: type[Crosscoder]) -> Crosscoder:
    """Make an empty instance for unpickling to fill."""
    return cls.__new__(cls)


def _group_sizes(n_latents: int | Sequence[int], n_groups: int) -> tuple[int, ...]:
    sizes = (n_latents,) * n_groups if isinstance(n_latents, int) else tuple(n_latents)
    if len(sizes) != n_groups or any(not isinstance(n, int) or n < 1 for n in sizes):
        raise WiringError(f"n_latents is a number of at least 1, or {n_groups} of them, one a group, not {n_latents!r}")
    return sizes


def _uniform(shape: tuple[int, ...], bound: float, made: Mapping[str, Any]) -> nn.Parameter:
    return nn.Parameter((torch.rand(shape, **made) * 2 - 1) * bound)
