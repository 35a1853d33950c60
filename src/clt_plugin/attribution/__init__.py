"""Attribution graphs: exact, certified, and to be looked at."""

from clt_plugin.attribution.attention.heads import HeadLoadings, head_loadings
from clt_plugin.attribution.attention.qk import QKAttribution, qk_attribution
from clt_plugin.attribution.certificate import Certificate, CertificateError
from clt_plugin.attribution.corpus.examples import top_examples
from clt_plugin.attribution.corpus.global_weights import GlobalWeights, global_weights
from clt_plugin.attribution.graph import Graph, GraphError, GraphInfo
from clt_plugin.attribution.targets import difference, direction, feature, logit
from clt_plugin.attribution.trace import attribute

__all__ = [
    "Certificate",
    "CertificateError",
    "GlobalWeights",
    "Graph",
    "GraphError",
    "GraphInfo",
    "HeadLoadings",
    "QKAttribution",
    "attribute",
    "difference",
    "direction",
    "feature",
    "global_weights",
    "head_loadings",
    "logit",
    "qk_attribution",
    "top_examples",
]
