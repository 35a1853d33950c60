"""Cross-layer transcoders as a hookable part of your nnsight or TransformerLens model."""
from clt_plugin.core import *  # provisional
