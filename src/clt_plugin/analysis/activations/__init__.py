"""Studies of what features do on text: what cross-layer writes add, where they point, what features are active on."""

from clt_plugin.analysis.activations.ablation import Evaluations, cross_layer_ablation, reconstruction
from clt_plugin.analysis.activations.alignment import Alignment, gradient_alignment, residual_alignment
from clt_plugin.analysis.activations.browser import feature_browser
from clt_plugin.analysis.activations.cards import FeatureBrowser, FeatureCard
from clt_plugin.analysis.activations.examples import Examples, top_tokens
from clt_plugin.analysis.studies import STUDIES, Study

__all__ = [
    "Alignment",
    "Evaluations",
    "Examples",
    "FeatureBrowser",
    "FeatureCard",
    "cross_layer_ablation",
    "feature_browser",
    "gradient_alignment",
    "reconstruction",
    "residual_alignment",
    "top_tokens",
]

_ON_TEXT: dict[str, type] = {"max_tokens": int, "length": int, "batch_size": int}

STUDIES.add(
    "cross-layer-ablation",
    Study(
        cross_layer_ablation,
        ("clt", "model", "texts"),
        "FVU, added loss and KL with and without cross-layer writes",
        _ON_TEXT,
    ),
)
STUDIES.add(
    "reconstruction",
    Study(
        reconstruction,
        ("clt", "model", "plt", "texts"),
        "FVU, L0, added loss and KL of a CLT and of per-layer transcoders",
        _ON_TEXT,
    ),
)
STUDIES.add(
    "residual-alignment",
    Study(
        residual_alignment,
        ("clt", "model", "texts"),
        "cosine of decoder vectors with what the residual stream gains from source to target",
        {**_ON_TEXT, "seed": int},
    ),
)
STUDIES.add(
    "gradient-alignment",
    Study(
        gradient_alignment,
        ("clt", "model", "texts"),
        "cosine of decoder vectors with minus the loss's gradient at the target",
        {**_ON_TEXT, "seed": int},
    ),
)
STUDIES.add(
    "top-tokens",
    Study(
        top_tokens,
        ("clt", "model", "texts"),
        "the tokens and passages on which features are most active",
        {"features": str, "n": int, "k": int, "context": int, "seed": int},
    ),
)
STUDIES.add(
    "feature-browser",
    Study(
        feature_browser,
        ("clt", "model", "texts"),
        "top examples, histograms, densities and promoted tokens of every feature",
        {**_ON_TEXT, "k": int, "context": int, "n_tokens": int},
    ),
)
