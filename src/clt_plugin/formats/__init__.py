"""On-disk formats: one file each, recognised from the content of a folder.

A format is an object with a ``name`` and the methods ``sniff(folder)``, ``describe(folder)`` and, where it writes,
``save(crosscoder, folder, overwrite)``; `FORMATS.add` makes it known. Describing is saying which tensor lies where:
`build` does the checks, the fetching and the reading for all of them.
"""

from clt_plugin.core import FORMATS
from clt_plugin.formats import circuit_tracer as circuit_tracer  # each registers itself
from clt_plugin.formats import native as native
from clt_plugin.formats._description import Description, Formula, build, join
from clt_plugin.formats.loading import describe, load, recognise

__all__ = ["FORMATS", "Description", "Formula", "build", "describe", "join", "load", "recognise"]
