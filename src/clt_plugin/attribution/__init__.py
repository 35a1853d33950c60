"""Attribution graphs: exact, certified, and to be looked at."""

from clt_plugin.attribution.certificate import Certificate, CertificateError
from clt_plugin.attribution.examples import top_examples
from clt_plugin.attribution.graph import Graph, GraphError, GraphInfo
from clt_plugin.attribution.targets import difference, direction, feature, logit
from clt_plugin.attribution.trace import attribute

__all__ = [
    "Certificate",
    "CertificateError",
    "Graph",
    "GraphError",
    "GraphInfo",
    "attribute",
    "difference",
    "direction",
    "feature",
    "logit",
    "top_examples",
]
