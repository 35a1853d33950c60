"""One run of a plain Hugging Face model kept, and parts of it frozen in later runs.

Frozen attention patterns and norm denominators leave a model that is affine in everything but its MLPs. Patterns come
from, and go back in through, the attention interface of transformers: each family's attention module goes on doing
its own projections, and only `softmax(q k) v` is exchanged, so that grouped queries, sliding windows, softcaps and
norms of queries and keys need no code here. Norms are asked what linear map they apply (`FrozenNorm.of`).

A frozen part gives back exactly what was recorded when it is given what it was given then: with everything frozen and
nothing changed, a run equals the recorded one bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clt_plugin.adapters._attention import Call, blocks_of, eager, part_of, take_over
from clt_plugin.adapters._norms import FreezeError, FrozenNorm
from clt_plugin.adapters.huggingface import HostModel, check_runs_once
from clt_plugin.adapters.sites import check_sites, normalise
from clt_plugin.core.wiring import Site


def _check_can_freeze(hf: nn.Module) -> None:
    check_runs_once(hf)
    if hf.training:
        raise FreezeError("the model is in training mode, where dropout makes every run another: call eval() first")


# ---------------------------------------------------------------- recording


@dataclass(frozen=True, eq=False)
class Recording:
    """What one run of a model held.

    Attributes:
        patterns: Each layer's attention pattern, (batch, heads, queries, keys).
        calls: How each layer's attention was called.
        norms: The norms of each block, by layer and by the module's name there.
        own_norms: Where norms ran as linear maps, what their modules put out for the same input, by the same keys and
            ``"final_norm"``.
        final_norm: The norm before the unembedding.
        mlp_out: What each layer's MLP adds to the residual stream, after a post-norm, (batch, position, d).
        sites: The sites that were asked for, (batch, position, d).
        embeddings: The token embeddings, (batch, position, d), as their module returns them; None where the run was
            given embeddings.
        unembedded: The unembedding's output, (batch, position, vocabulary), before a final softcap; None for a model
            without a head, as are the logits.
        logits: The model's logits.
    """

    patterns: dict[int, Tensor]
    calls: dict[int, Call]
    norms: dict[tuple[int, str], FrozenNorm]
    own_norms: dict[Any, Tensor]
    final_norm: FrozenNorm
    mlp_out: dict[int, Tensor]
    sites: dict[Site, Tensor]
    embeddings: Tensor | None
    unembedded: Tensor | None
    logits: Tensor | None


def record(
    hf: nn.Module,
    host: HostModel,
    inputs: Tensor | Mapping[str, Any],
    sites: Iterable[Site] = (),
    *,
    grad: bool = False,
    linear: bool = False,
) -> Recording:
    """Run a model once, with its family's eager attention and without a cache, and keep what `frozen` needs.

    Args:
        hf: The plain Hugging Face model (`plain_model`), in evaluation mode.
        host: What it is.
        inputs: Token ids, (batch, position), or the model's keyword arguments: left padding goes with an
            ``attention_mask``.
        sites: Sites whose values to keep as well.
        grad: Whether what is kept is differentiable.
        linear: Run every norm as the linear map with bias that it applies. It is the norm's output but for rounding,
            and what follows is then linear to the last digits: transformers' RMSNorm computes in float32 whatever it is
            given, which leaves a run in float64 linear to seven digits only.

    Raises:
        FreezeError: The model cannot be recorded; it is as it was.
        AttachError: It has no such site, or runs blocks twice.
    """
    arguments = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    if arguments.get("past_key_values") is not None or arguments.get("use_cache"):
        raise FreezeError("a recorded run is of whole texts: leave out past_key_values and use_cache")
    _check_can_freeze(hf)
    sites = tuple(dict.fromkeys(sites))
    check_sites(host.architecture, host.parallel, [site.name for site in sites])
    with torch.set_grad_enabled(grad):
        with ExitStack() as stack:
            run = _Recorder(stack, hf, host, sites, linear)
            output = hf(**{**arguments, "use_cache": False})
        return run.recording(getattr(output, "logits", None))


class _Recorder:
    """Keeps what passes by in one run.

    Args:
        stack: Undoes everything when it is closed.
        hf: The model.
        host: What it is.
        sites: The sites to keep.
        linear: Whether norms run as linear maps.
    """

    def __init__(self, stack: ExitStack, hf: nn.Module, host: HostModel, sites: tuple[Site, ...], linear: bool) -> None:
        self.stack, self.host, self.hf, self.linear = stack, host, hf, linear
        self.patterns: dict[int, Tensor] = {}
        self.calls: dict[int, Call] = {}
        # Of linear norms what was fitted, and what the modules themselves put out.
        self.fitted: dict[Any, FrozenNorm] = {}
        self.own: dict[Any, Tensor] = {}
        # What modules were given and what they returned, by what they are called here.
        self.seen: dict[Any, tuple[Any, Any]] = {}
        self.norms: dict[Any, nn.Module] = {"final_norm": part_of(hf, host.final_norm)}
        take_over(stack, hf, host, self._attend)
        for layer, block in enumerate(blocks_of(hf, host)):
            for name in host.architecture.norms:
                self.norms[layer, name] = part_of(block, name)
            self._note_call(layer, part_of(block, host.architecture.attention))
        for key, norm in self.norms.items():
            # Before all else that looks at its output.
            self._see(key, norm)
        for layer, block in enumerate(blocks_of(hf, host)):
            self._see(("mlp_out", layer), part_of(block, self._place("mlp_out").module))
        for site in sites:
            if site.layer >= host.n_layers:
                raise FreezeError(f"there is no {site}: the model has layers 0-{host.n_layers - 1}")
            self._see(site, part_of(blocks_of(hf, host)[site.layer], self._place(site.name).module))
        self._see("embeddings", hf.get_input_embeddings())  # type: ignore[operator]
        self._see("unembedded", hf.get_output_embeddings())  # type: ignore[operator]

    def recording(self, logits: Tensor | None) -> Recording:
        """Put together what was seen, once the run is over."""
        lacking = [layer for layer in range(self.host.n_layers) if layer not in self.patterns]
        if lacking:
            raise FreezeError(_unused(f"layer {lacking[0]}'s attention pattern", "seen"))
        for key in self.norms:
            if key not in self.seen:
                raise FreezeError(_unused(_called(key), "seen"))
        norms: dict[Any, FrozenNorm] = {}
        for key, norm in self.norms.items():
            found = self.fitted.get(key)
            norms[key] = FrozenNorm.of(norm, *self.seen[key], name=_called(key)) if found is None else found
        return Recording(
            patterns=self.patterns,
            calls=self.calls,
            final_norm=norms.pop("final_norm"),
            norms=norms,
            own_norms=self.own,
            mlp_out={layer: self.seen["mlp_out", layer][1] for layer in range(self.host.n_layers)},
            sites={key: self._value(key) for key in self.seen if isinstance(key, Site)},
            embeddings=self.seen.get("embeddings", (None, None))[1],
            unembedded=self.seen.get("unembedded", (None, None))[1],
            logits=logits,
        )

    def _attend(self, layer: int, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, pattern = eager(module)(module, *args, **kwargs)
        if pattern is not None:
            self.patterns[layer] = pattern
        return output, pattern

    def _see(self, key: Any, module: nn.Module | None) -> None:
        if module is None:
            return

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            x: Any = args[0] if args else kwargs.get("hidden_states")
            y = _first(output)
            replaced = None
            if self.linear and key in self.norms:
                norm = FrozenNorm.of(module, x, y, name=_called(key))
                self.own[key], y = y, norm.affine(x)
                replaced, self.fitted[key] = y, replace(norm, y=y)
            self.seen[key] = (x, y)
            return replaced

        self.stack.callback(module.register_forward_hook(see, with_kwargs=True).remove)

    def _note_call(self, layer: int, module: nn.Module) -> None:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.calls[layer] = Call.of(args, kwargs)

        self.stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)

    def _place(self, name: str) -> Any:
        return self.host.architecture.places(self.host.parallel)[name]

    def _value(self, site: Site) -> Tensor:
        place = self._place(site.name)
        value = self.seen[site][place.side == "output"]
        if not place.before_gain:
            return value
        if (site.layer, place.module) in self.fitted:
            return self.fitted[site.layer, place.module].normalised(value)
        norm = blocks_of(self.hf, self.host)[site.layer].get_submodule(place.module)
        return normalise(norm, self.host.architecture.centred, value)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _called(key: Any) -> str:
    return "the final norm" if key == "final_norm" else f"layer {key[0]}'s norm {key[1]}"


def _unused(what: str, verb: str) -> str:
    return (
        f"{what} was not {verb}: the pass left its module out, or the module does not run as transformers wrote it "
        "(another library replaced it, or its attention does not ask the config for an implementation)"
    )


# ---------------------------------------------------------------- freezing


def frozen(
    hf: nn.Module,
    host: HostModel,
    recording: Recording,
    patterns: bool | Iterable[int] = True,
    norms: bool | Iterable[int] = True,
    final_norm: bool | None = None,
) -> Frozen:
    """Return a context in which a model's runs use the patterns and denominators of a recorded one.

    The runs are of the recorded positions, with one row a recorded row, or with any number for a recording of one;
    what is not frozen runs with the family's eager attention.

    Args:
        hf: The plain Hugging Face model that was recorded.
        host: What it is.
        recording: Of `record`.
        patterns: The layers whose attention patterns are frozen; True for all, False for none.
        norms: The layers whose norms are frozen.
        final_norm: Whether the norm before the unembedding is; by default where all layers' norms are.

    Raises:
        FreezeError: On entering, a model that cannot be frozen or is already; in a run, other shapes than the recorded
            ones; after a run, a frozen part that it did not use.
    """
    which_norms = _layers(norms, host)
    if final_norm is None:
        final_norm = len(which_norms) == host.n_layers
    return Frozen(hf, host, recording, _layers(patterns, host), which_norms, final_norm)


def _layers(which: bool | Iterable[int], host: HostModel) -> frozenset[int]:
    if isinstance(which, bool):
        return frozenset(range(host.n_layers) if which else ())
    layers = frozenset(which)
    for layer in layers:
        if not 0 <= layer < host.n_layers:
            raise FreezeError(f"layer {layer} cannot be frozen: the model has layers 0-{host.n_layers - 1}")
    return layers


class Frozen:
    """A model with parts of a recorded run in it, as long as the context lasts; see `frozen`.

    Each part that is frozen is checked off in each run, and a run that leaves one out ends in an error.
    """

    def __init__(
        self,
        hf: nn.Module,
        host: HostModel,
        recording: Recording,
        patterns: frozenset[int],
        norms: frozenset[int],
        final_norm: bool,
    ) -> None:
        self.hf, self.host, self.recording, self.patterns = hf, host, recording, patterns
        names = host.architecture.norms
        self.norms: dict[str, tuple[nn.Module, FrozenNorm]] = {}
        for layer in sorted(norms):
            for name in names:
                module = part_of(blocks_of(hf, host)[layer], name)
                self.norms[_called((layer, name))] = (module, recording.norms[layer, name])
        if final_norm:
            self.norms[_called("final_norm")] = (part_of(hf, host.final_norm), recording.final_norm)
        self.promised = [*(f"layer {layer}'s attention pattern" for layer in sorted(patterns)), *self.norms]
        self._used: set[str] = set()
        self._stack = ExitStack()

    def __enter__(self) -> Frozen:
        _check_can_freeze(self.hf)
        with ExitStack() as stack:
            take_over(stack, self.hf, self.host, self._attend)
            for name, (module, norm) in self.norms.items():
                # Ahead of all others: whoever edits this norm's output edits the frozen one's.
                hook = module.register_forward_hook(partial(self._normalise, name, norm), prepend=True)
                stack.callback(hook.remove)
            backbone = self.hf.get_submodule(self.host.backbone)
            stack.callback(backbone.register_forward_pre_hook(self._begin).remove)
            stack.callback(backbone.register_forward_hook(self._check).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._used.clear()

    def _check(self, module: nn.Module, args: Any, output: Any) -> None:
        for name in self.promised:
            if name not in self._used:
                raise FreezeError(_unused(name, "used"))

    def _attend(
        self, layer: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if layer not in self.patterns:
            return eager(module)(module, query, key, value, *args, **kwargs)
        name, pattern = f"layer {layer}'s attention pattern", self.recording.patterns[layer]
        rows = value.shape[0]
        _check_shape(name, tuple(pattern.shape), (rows, pattern.shape[1], query.shape[2], value.shape[2]))
        # A head of values serves several of queries.
        value = value.repeat_interleave(pattern.shape[1] // value.shape[1], dim=1)
        self._used.add(name)
        return (pattern @ value).transpose(1, 2).contiguous(), pattern.expand(rows, -1, -1, -1)

    def _normalise(self, name: str, norm: FrozenNorm, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        _check_shape(name, tuple(norm.x.shape), tuple(args[0].shape))
        self._used.add(name)
        return norm(args[0])


def _check_shape(name: str, recorded: tuple[int, ...], here: tuple[int, ...]) -> None:
    if recorded[0] not in (1, here[0]) or recorded[1:] != here[1:]:
        raise FreezeError(
            f"{name} was recorded with shape {recorded}, but this run has {here}: freeze runs of the recorded "
            "positions alone, with as many rows"
        )
