"""Targeting: do decoder vectors point where later heads or neurons read, more than directions by chance do?

Source: "Cross-Layer Connections in Cross-Layer Transcoders: An Empirical Investigation", experiments 7b and 7c, and its
own list of reasons why they may be wrong, from which the nulls and the statistics here are made:

- It compares the largest of a layer's strengths with the percentile of a single one, which by chance alone 6 to 7% of
  vectors pass at 8 heads. Here each unit is compared with its own percentile, and maxima with maxima.
- It compares with random vectors alone. Here are six nulls, five of which keep each vector's norm, by looking at its
  direction alone.
- It sets what is written at a layer's MLP output against that layer's own query and gate rows, which have run by then.
  Here later layers read by default, and ``read_by="same"`` is what the document does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from clt_plugin.adapters.huggingface import HostModel
from clt_plugin.analysis.studies import STUDIES, Study
from clt_plugin.analysis.weights import _readers
from clt_plugin.analysis.weights._readers import Units
from clt_plugin.analysis.weights._scan import Settings, scan
from clt_plugin.analysis.weights.targeted import Targeting
from clt_plugin.core.crosscoder import Crosscoder


def attention_targeting(
    clt: Crosscoder,
    model: Any,
    *,
    part: str = "q",
    vectors: str = "cross",
    read_by: str = "next",
    gains: bool = True,
    nulls: Sequence[str] | None = None,
    draws: int = 4999,
    fdr: float = 0.05,
    seed: int = 0,
    bar: bool | None = None,
) -> Targeting:
    """Scan all decoder vectors against the heads of later layers: ``|W_Q^h v|`` (experiment 7b).

    W_Q is what the attention module makes of basis vectors, with grouped queries, fused projections and norms of
    queries and keys seen to, and with the gains and the centring of the norm before it folded in (or not). Vectors are
    read once, layer by layer, and brought to length 1: then a direction drawn at random is compared with a vector as if
    it had that vector's norm. The nulls are

    - ``"isotropic"``: random directions, all with the vectors' root mean square norm, beside vectors with their own:
      what long vectors do counts as targeting. The document's.
    - ``"norm"``: random directions with the vector's norm.
    - ``"covariance"``: normal directions with the mean and covariance of what is written to the same target by any
      source (a sample of 2,048), with the vector's norm: beyond the subspace that decoders share.
    - ``"shuffled"``: what the same sources write to other targets, with the vector's norm: is it this layer they point
      at?
    - ``"untrained"``: decoders as a crosscoder is initialised, with the vector's norm.
    - ``"base"``: what the neurons of the target's own MLP write, with the vector's norm: is it the CLT, or the model?

    Each limit is an order statistic that one more draw would exceed with a probability of exactly
    ``floor((draws + 1) / 100) / (draws + 1)``. For false discoveries (Benjamini and Hochberg 1995, over every vector
    and unit) an empirical p-value is the share of the null's draws, pooled over units after standardising each by its
    null's median and 99th percentile, that reach as far: pooling is what lets p-values below one over ``draws`` be told
    apart, and it supposes that tails of different units have one shape.

    Args:
        clt: A crosscoder that adds to the residual stream of one model, in memory or lazy; `untrained` and `own_writes`
            make others to set beside it.
        model: An nnsight model, a TransformerBridge, or a transformers model.
        part: What heads read for: ``"q"``, ``"k"`` or ``"v"``.
        vectors: ``"cross"``: those to other layers than a feature's own; ``"same"``; ``"all"``.
        read_by: ``"next"``: the first layer that sees what is written; ``"later"``: that and all after it;
            ``"same"``: the layer written, which has read by then.
        gains: Whether gains and centring of norms are folded in.
        nulls: Which of the nulls, the first of which tables and plots show; by default all that there can be, with
            ``"covariance"`` first.
        draws: How many directions each null draws for each target.
        fdr: The false-discovery rate.
        seed: Of all that is drawn.
        bar: Whether to show progress; by default on a terminal.

    Raises:
        AttachError: The crosscoder does not fit the model.
        WiringError: It adds nothing to the residual stream, or nothing that is read.
        ValueError: A setting, or a null that cannot be drawn.
    """
    settings = Settings("head", vectors, read_by, gains, nulls, draws, fdr, seed, bar)

    def units(hf: nn.Module, host: HostModel) -> Units:
        return _readers.heads(hf, host, part, gains)

    return scan(clt, model, settings, units, part)


def mlp_targeting(
    clt: Crosscoder,
    model: Any,
    *,
    vectors: str = "cross",
    read_by: str = "next",
    gains: bool = True,
    nulls: Sequence[str] | None = None,
    draws: int = 4999,
    fdr: float = 0.05,
    seed: int = 0,
    bar: bool | None = None,
) -> Targeting:
    """Scan all decoder vectors against the neurons of later layers: the cosine with their rows (experiment 7c).

    A neuron's row is that of the gate in a gated MLP and of the input projection in a plain one: the input of the
    activation function. Magnitudes are compared, and the sign of what is above a limit counted. Cosines know no norms,
    so that ``"norm"`` is ``"isotropic"`` and left out. For all else see `attention_targeting`.

    Args:
        clt: As there.
        model: As there.
        vectors: As there.
        read_by: As there.
        gains: Whether the gain and centring of the norm before the MLP are folded into the rows.
        nulls: As there, but for ``"norm"``.
        draws: As there.
        fdr: As there.
        seed: As there.
        bar: As there.
    """
    settings = Settings("neuron", vectors, read_by, gains, nulls, draws, fdr, seed, bar)

    def units(hf: nn.Module, host: HostModel) -> Units:
        return _readers.neurons(hf, host, gains)

    return scan(clt, model, settings, units, "")


_SETTINGS = {"vectors": str, "read_by": str, "gains": bool, "draws": int, "fdr": float, "seed": int}
STUDIES.add(
    "attention-targeting",
    Study(
        attention_targeting,
        ("clt", "model"),
        "do decoder vectors point at the heads of later layers, against six nulls",
        {"part": str, **_SETTINGS},
    ),
)
STUDIES.add(
    "mlp-targeting",
    Study(
        mlp_targeting,
        ("clt", "model"),
        "do decoder vectors point at the neurons of later layers: hubs, sign",
        _SETTINGS,
    ),
)
