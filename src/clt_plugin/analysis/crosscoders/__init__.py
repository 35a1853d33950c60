"""Studies of crosscoders: where latents write, whether they rotate, and what layers, models and MLPs share."""

from clt_plugin.analysis.crosscoders.effects import Effects, direct_effects
from clt_plugin.analysis.crosscoders.geometry import Geometry, decoder_geometry
from clt_plugin.analysis.crosscoders.mlp import FeatureInputs, feature_inputs
from clt_plugin.analysis.crosscoders.norms import NormProfiles, Rotation, norm_profiles, rotation
from clt_plugin.analysis.crosscoders.saes import AgainstSAEs, against_saes
from clt_plugin.analysis.crosscoders.scaling import LatentScaling, latent_scaling
from clt_plugin.analysis.crosscoders.sharing import Sharing, relative_norm, shared_latents
from clt_plugin.analysis.studies import STUDIES, Study

__all__ = [
    "AgainstSAEs",
    "Effects",
    "FeatureInputs",
    "Geometry",
    "LatentScaling",
    "NormProfiles",
    "Rotation",
    "Sharing",
    "against_saes",
    "decoder_geometry",
    "direct_effects",
    "feature_inputs",
    "latent_scaling",
    "norm_profiles",
    "relative_norm",
    "rotation",
    "shared_latents",
]

STUDIES.add(
    "norm-profiles",
    Study(
        norm_profiles,
        ("clt",),
        "where each latent's decoder norm peaks, how it decays, how far it spans",
        {"strong": float},
    ),
)
STUDIES.add(
    "rotation",
    Study(rotation, ("clt",), "cosines between a latent's decoder vectors at the sites it writes", {"strong": float}),
)
STUDIES.add(
    "shared-latents",
    Study(shared_latents, ("clt",), "latents shared between two models, or the sides of an MLP, by decoder norm"),
)
STUDIES.add(
    "decoder-geometry",
    Study(
        decoder_geometry,
        ("clt",),
        "whether shared latents lie to each other alike in two models",
        {"max_latents": int, "seed": int},
    ),
)
