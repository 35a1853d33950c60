"""Studies: what cross-layer connections do, when a CLT is unfaithful, and what crosscoders share."""

from clt_plugin.analysis import activations, crosscoders, faithfulness, weights
from clt_plugin.analysis.studies import NEEDS, STUDIES, Result, Study

__all__ = ["NEEDS", "STUDIES", "Result", "Study", "activations", "crosscoders", "faithfulness", "weights"]
