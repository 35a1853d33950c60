"""Whether a crosscoder may be believed: skipped hops, handoffs, knock-on effects, and the report of them all."""

from typing import Any

from clt_plugin.analysis.faithfulness._network import LAYOUTS, BooleanNetwork, Layout
from clt_plugin.analysis.faithfulness.absolute import AbsoluteValue, absolute_value
from clt_plugin.analysis.faithfulness.causal import RankAgreement, ablation_against_influence, influence_of, knock_on
from clt_plugin.analysis.faithfulness.diagnosis import Diagnosis, superposition_or_steps
from clt_plugin.analysis.faithfulness.firing import Selectivity, selectivity
from clt_plugin.analysis.faithfulness.handoff_maps import Handoffs, handoffs
from clt_plugin.analysis.faithfulness.memory import MADE_UP_LICENCE, Memorised, memorised
from clt_plugin.analysis.faithfulness.profile import (
    Contributions,
    L0Profile,
    cumulative_contribution,
    l0_profile,
)
from clt_plugin.analysis.faithfulness.replacement import ReplacementError, replacement_error
from clt_plugin.analysis.faithfulness.report import FaithfulnessReport, faithfulness_report
from clt_plugin.analysis.faithfulness.skipping import HopSkip, hop_skip
from clt_plugin.analysis.faithfulness.toy import TABLE_1, BooleanToy, boolean_toy, boolean_toys
from clt_plugin.analysis.faithfulness.toy_study import (
    MITIGATIONS,
    SETTINGS,
    ToyStudy,
    boolean_toy_study,
    mitigations,
)
from clt_plugin.analysis.faithfulness.versus import Versus, clt_against_plt
from clt_plugin.analysis.studies import STUDIES, Study

__all__ = [
    "LAYOUTS",
    "MADE_UP_LICENCE",
    "MITIGATIONS",
    "SETTINGS",
    "TABLE_1",
    "AbsoluteValue",
    "BooleanNetwork",
    "BooleanToy",
    "Contributions",
    "Diagnosis",
    "FaithfulnessReport",
    "Handoffs",
    "HopSkip",
    "L0Profile",
    "Layout",
    "Memorised",
    "RankAgreement",
    "ReplacementError",
    "Selectivity",
    "ToyStudy",
    "Versus",
    "ablation_against_influence",
    "absolute_value",
    "boolean_toy",
    "boolean_toy_study",
    "boolean_toys",
    "clt_against_plt",
    "cumulative_contribution",
    "faithfulness_report",
    "handoffs",
    "hop_skip",
    "influence_of",
    "knock_on",
    "l0_profile",
    "memorised",
    "mitigations",
    "replacement_error",
    "selectivity",
    "superposition_or_steps",
]


def _seeded(study: Any) -> Any:
    """Return a study of seeds as the command line can ask for it: by how many there are."""
    return lambda n_seeds=20, **settings: study(range(n_seeds), **settings)


def _of_one_prompt(model: Any, clt: Any, plt: Any, prompts: Any, **settings: Any) -> Versus:
    if len(prompts) != 1:
        raise ValueError(f"this study is of one prompt, not of {len(prompts)}: give a file of one line")
    return clt_against_plt(model, clt, plt, prompts[0], **settings)


_TEXTS: dict[str, type] = {"batch_size": int, "max_tokens": int}
_GRAPHS: dict[str, type] = {"max_feature_nodes": int}
_ABLATIONS: dict[str, type] = {"n_features": int, "freeze_attention": bool, "seed": int, **_GRAPHS}
_MODEL = ("model", "clt", "prompts")
_TOY: dict[str, type] = {"wiring": str, "seed": int, "layout": str, "norms": str, "span": int, "sites": str}
_LONG: dict[str, type] = {"n_seeds": int, "steps": int}

for _name, _study in {
    "hop-skip": Study(
        hop_skip, ("clt", "model", "texts"), "how much of a layer's reconstruction earlier layers write", _TEXTS
    ),
    "l0-profile": Study(l0_profile, ("clt", "model", "texts", "plt"), "L0 by layer, CLT beside PLT", _TEXTS),
    "cumulative-contribution": Study(
        cumulative_contribution,
        ("model", "clt", "prompts", "plt"),
        "how much of circuits the first layers do, CLT beside PLT",
        {"edges": str, **_GRAPHS},
    ),
    "handoffs": Study(handoffs, ("model", "prompts", "clt"), "handoffs ablated, in the model and with the CLT"),
    "replacement-error": Study(replacement_error, _MODEL, "cosine and error of the local and global replacement"),
    "ablation-against-influence": Study(
        ablation_against_influence, _MODEL, "KL of ablations against influence and baselines", _ABLATIONS
    ),
    "knock-on": Study(knock_on, _MODEL, "influence between features against measured effects", _ABLATIONS),
    "clt-against-plt": Study(
        _of_one_prompt,
        ("model", "clt", "plt", "prompts"),
        "features and paths of a CLT and of a PLT on one prompt",
        {"by": str, "similarity": float, "n_paths": int, **_GRAPHS},
    ),
    "memorised": Study(
        memorised,
        ("model", "clt"),
        "features behind the MIT licence, steered there and on a made-up licence",
        {"n_features": int, "answer": str, "prompt": str, "control": str, **_GRAPHS},
    ),
    "superposition-or-steps": Study(
        superposition_or_steps, _MODEL, "one feature over layers, or steps that are skipped", {"n_neurons": int}
    ),
    "faithfulness-report": Study(
        faithfulness_report,
        _MODEL,
        "all of it: replacement, ablations, knock-on effects, hop-skip, L0, contributions, handoffs",
        {"n_features": int, "n_sources": int, **_GRAPHS},
    ),
    "boolean-toy": Study(boolean_toy, (), "a CLT or PLT of a network whose circuit is known", {**_TOY, "steps": int}),
    "boolean-toy-study": Study(_seeded(boolean_toy_study), (), "the Boolean toy over seeds and settings", _LONG),
    "mitigations": Study(_seeded(mitigations), (), "what is proposed against skipped steps, on the Boolean toy", _LONG),
    "absolute-value": Study(absolute_value, (), "|x| with a repeated data point", {"steps": int, "sparsity": float}),
}.items():
    STUDIES.add(_name, _study)
