"""What a crosscoder's weights say on their own: scans that stream them, layer pair by layer pair."""

from clt_plugin.analysis.weights.coactivation import Coactivation, coactivation
from clt_plugin.analysis.weights.effect import TargetingEffect, targeting_effect
from clt_plugin.analysis.weights.lens import TimeTravel, time_travel
from clt_plugin.analysis.weights.norms import DecoderNorms, decoder_norms
from clt_plugin.analysis.weights.populations import own_writes, untrained
from clt_plugin.analysis.weights.spread import (
    CrossLayerFeatures,
    Distance,
    FeatureSpan,
    cross_layer_features,
    distance,
    feature_span,
)
from clt_plugin.analysis.weights.targeted import Targeting
from clt_plugin.analysis.weights.targeting import attention_targeting, mlp_targeting

__all__ = [
    "Coactivation",
    "CrossLayerFeatures",
    "DecoderNorms",
    "Distance",
    "FeatureSpan",
    "Targeting",
    "TargetingEffect",
    "TimeTravel",
    "attention_targeting",
    "coactivation",
    "cross_layer_features",
    "decoder_norms",
    "distance",
    "feature_span",
    "mlp_targeting",
    "own_writes",
    "targeting_effect",
    "time_travel",
    "untrained",
]
