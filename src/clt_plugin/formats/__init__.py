"""On-disk formats: one file each, recognised from the content of a folder.

A format is an object with a ``name`` and the methods ``sniff(folder)``, ``describe(folder)`` and, where it writes,
``save(crosscoder, folder, overwrite)``; `FORMATS.add` makes it known. Describing is saying which tensor lies where:
`build` does the checks, the fetching and the reading for all of them.
"""

from clt_plugin.core import FORMATS
from clt_plugin.formats import circuit_tracer as circuit_tracer  # each registers itself
from clt_plugin.formats import clt_forge as clt_forge
from clt_plugin.formats import clt_training as clt_training
from clt_plugin.formats import crosslayer_coding as crosslayer_coding
from clt_plugin.formats import crosslayer_transcoder as crosslayer_transcoder
from clt_plugin.formats import dictionary_learning as dictionary_learning
from clt_plugin.formats import gemma_scope_1 as gemma_scope_1
from clt_plugin.formats import gemma_scope_2 as gemma_scope_2
from clt_plugin.formats import gpt2_sweep as gpt2_sweep
from clt_plugin.formats import listing as listing
from clt_plugin.formats import model_diff_pickle as model_diff_pickle
from clt_plugin.formats import native as native
from clt_plugin.formats import saelens as saelens
from clt_plugin.formats import sparsify as sparsify
from clt_plugin.formats import transcoder_bundle as transcoder_bundle
from clt_plugin.formats._description import Description, Formula, build, join
from clt_plugin.formats.conversion import convert
from clt_plugin.formats.inspection import Inspection, inspect
from clt_plugin.formats.loading import describe, load, recognise
from clt_plugin.formats.model_diff_pickle import rescale
from clt_plugin.formats.publish import model_card, push_to_hub

__all__ = [
    "FORMATS",
    "Description",
    "Formula",
    "Inspection",
    "build",
    "convert",
    "describe",
    "inspect",
    "join",
    "load",
    "model_card",
    "push_to_hub",
    "recognise",
    "rescale",
]
