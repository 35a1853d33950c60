"""Wirings by name, for configs: a recipe says ``wiring="clt"`` before any model is there that has layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clt_plugin.core import Registry, Wiring, WiringError

WIRINGS: Registry[Callable[..., Wiring]] = Registry("wiring")
"""Functions of (n_layers, models, **settings) that make a wiring; a third party adds its own."""


def make_wiring(spec: str | Mapping[str, Any] | Wiring, n_layers: int, models: Sequence[str] = ("model",)) -> Wiring:
    """Make a wiring from its name, or from plain data such as ``{"name": "local_clt", "span": 4}``.

    Args:
        spec: The name; or the name with settings, of which ``skips=True`` adds affine skips; or the wiring itself.
        n_layers: How many layers the model has.
        models: The models' names, for wirings over several.

    >>> make_wiring({"name": "local_clt", "span": 2}, 4)
    <Wiring local_clt(4, span=2): 4 groups, reads mlp_in, writes mlp_out, layers 0-3>
    """
    if isinstance(spec, Wiring):
        return spec
    settings = {"name": spec} if isinstance(spec, str) else dict(spec)
    if "reads" in settings:
        return Wiring.from_dict(settings)
    if not isinstance(settings.get("name"), str):
        raise WiringError(f"a wiring is a name, a mapping with a name and settings, or a Wiring, not {spec!r}")
    name, skips = settings.pop("name"), settings.pop("skips", False)
    try:
        wiring = WIRINGS[name](n_layers, tuple(models), **settings)
    except TypeError as error:
        raise WiringError(f"the wiring {name!r} does not take {settings}: {error}") from error
    return wiring.with_skips() if skips else wiring


def _layers(n_layers: int, layers: Sequence[int] | None) -> Sequence[int]:
    return range(n_layers) if layers is None else layers


@WIRINGS.register("sae")
def _sae(n_layers: int, models: Sequence[str], *, layer: int, site: str = "resid_post") -> Wiring:
    return Wiring.sae((site, layer))


@WIRINGS.register("plt")
def _plt(n_layers: int, models: Sequence[str], **settings: Any) -> Wiring:
    return Wiring.plt(n_layers, **settings)


@WIRINGS.register("clt")
def _clt(n_layers: int, models: Sequence[str], **settings: Any) -> Wiring:
    return Wiring.clt(n_layers, **settings)


@WIRINGS.register("local_clt")
def _local_clt(n_layers: int, models: Sequence[str], **settings: Any) -> Wiring:
    return Wiring.local_clt(n_layers, **settings)


@WIRINGS.register("acausal")
def _acausal(
    n_layers: int, models: Sequence[str], *, site: str = "resid_post", layers: Sequence[int] | None = None
) -> Wiring:
    return Wiring.acausal([(site, layer) for layer in _layers(n_layers, layers)])


@WIRINGS.register("weakly_causal")
def _weakly_causal(
    n_layers: int, models: Sequence[str], *, site: str = "resid_post", layers: Sequence[int] | None = None
) -> Wiring:
    return Wiring.weakly_causal([(site, layer) for layer in _layers(n_layers, layers)])


@WIRINGS.register("strictly_causal")
def _strictly_causal(n_layers: int, models: Sequence[str], **settings: Any) -> Wiring:
    return Wiring.strictly_causal(n_layers, **settings)


@WIRINGS.register("pre_post_mlp")
def _pre_post_mlp(n_layers: int, models: Sequence[str], **settings: Any) -> Wiring:
    return Wiring.pre_post_mlp(**settings)


@WIRINGS.register("model_diff")
def _model_diff(n_layers: int, models: Sequence[str], **settings: Any) -> Wiring:
    return Wiring.model_diff(models, **settings)
