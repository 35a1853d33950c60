"""Cross-layer transcoders as a hookable part of your nnsight or TransformerLens model.

After ``import clt_plugin``, nnsight's models and TransformerLens's `TransformerBridge` have the method ``add_clt``.
"""

import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from clt_plugin.adapters import Handle, add_clt, register
from clt_plugin.attribution.graph import Graph
from clt_plugin.attribution.trace import attribute
from clt_plugin.core import (
    AttachError,
    Crosscoder,
    CrossLayerTranscoder,
    FormatError,
    Host,
    HubError,
    Site,
    SparseFeatures,
    Wiring,
    WiringError,
)
from clt_plugin.formats import convert, inspect, load
from clt_plugin.interventions.modes import intervene

if TYPE_CHECKING:
    from clt_plugin import analysis, training
    from clt_plugin.analysis.faithfulness import faithfulness_report
    from clt_plugin.training import TrainConfig, train

__version__ = "0.1.0"

__all__ = [
    "AttachError",
    "CrossLayerTranscoder",
    "Crosscoder",
    "FormatError",
    "Graph",
    "Handle",
    "Host",
    "HubError",
    "Site",
    "SparseFeatures",
    "TrainConfig",
    "Wiring",
    "WiringError",
    "add_clt",
    "analysis",
    "attribute",
    "convert",
    "faithfulness_report",
    "inspect",
    "intervene",
    "load",
    "train",
    "training",
]

register()


def __getattr__(name: str) -> Any:
    """Import what few sessions need when it is asked for: importing the package takes no longer for it."""
    from importlib import import_module

    if name in ("analysis", "training"):
        return import_module(f"clt_plugin.{name}")
    if name in ("TrainConfig", "train"):
        return getattr(import_module("clt_plugin.training"), name)
    if name == "faithfulness_report":
        return getattr(import_module("clt_plugin.analysis.faithfulness"), name)
    raise AttributeError(f"module 'clt_plugin' has no attribute {name!r}")


class _Package(ModuleType):
    """This package, which travels to a remote model that lacks it as the one name that makes sense there."""

    def __reduce__(self) -> Any:
        from cloudpickle.cloudpickle import _PICKLE_BY_VALUE_MODULES

        if __name__ in _PICKLE_BY_VALUE_MODULES:
            return (SimpleNamespace, (), {"add_clt": add_clt})
        return (__import__, (__name__,))


sys.modules[__name__].__class__ = _Package
