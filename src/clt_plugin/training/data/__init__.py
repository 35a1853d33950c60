"""Where training data comes from: texts, activations of models at sites, a cache on disk, a shuffle buffer."""

from clt_plugin.training.data.activations import Activations, Chunk, Cursor, DataError, Source
from clt_plugin.training.data.buffer import Batch, Buffer, mixing
from clt_plugin.training.data.cache import ActivationCache, write_cache
from clt_plugin.training.data.harvest import Harvest, harvest
from clt_plugin.training.data.texts import Texts, texts_from_hub
from clt_plugin.training.data.tokens import Rows, Tokens

__all__ = [
    "ActivationCache",
    "Activations",
    "Batch",
    "Buffer",
    "Chunk",
    "Cursor",
    "DataError",
    "Harvest",
    "Rows",
    "Source",
    "Texts",
    "Tokens",
    "harvest",
    "mixing",
    "texts_from_hub",
    "write_cache",
]
