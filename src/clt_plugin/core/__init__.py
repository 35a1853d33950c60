"""Tensors only: wirings, crosscoders, activations, sparse features, stores. Imports no framework but torch."""

from clt_plugin.core.activations import ACTIVATIONS, Activation, BatchTopK, JumpReLU, ReLU, TopK, jumprelu, step
from clt_plugin.core.crosscoder import Crosscoder, CrossLayerTranscoder
from clt_plugin.core.errors import AttachError, FormatError, HubError, RegistryError, WiringError
from clt_plugin.core.features import SparseFeatures, SparseGroup
from clt_plugin.core.files import File
from clt_plugin.core.host import Host, Sites
from clt_plugin.core.registry import FORMATS, SERVICES, Registry
from clt_plugin.core.store import LazyStore, MemoryStore, Piece, Store
from clt_plugin.core.wiring import MODEL, SITE_NAMES, Layout, Site, Wiring

__all__ = [
    "ACTIVATIONS",
    "FORMATS",
    "MODEL",
    "SERVICES",
    "SITE_NAMES",
    "Activation",
    "AttachError",
    "BatchTopK",
    "CrossLayerTranscoder",
    "Crosscoder",
    "File",
    "FormatError",
    "Host",
    "HubError",
    "JumpReLU",
    "Layout",
    "LazyStore",
    "MemoryStore",
    "Piece",
    "ReLU",
    "Registry",
    "RegistryError",
    "Site",
    "Sites",
    "SparseFeatures",
    "SparseGroup",
    "Store",
    "TopK",
    "Wiring",
    "WiringError",
    "jumprelu",
    "step",
]
