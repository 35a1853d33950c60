"""The format of ckkissane's model-diffing crosscoder (Kissane et al. 2024), and of its trainer's forks.

``cfg.json`` and ``cc_weights.pt``, a dict of tensors: ``W_enc`` (2, d, F), ``b_enc`` (F,), ``W_dec`` (F, 2, d),
``b_dec`` (2, d), base model first, then chat model::

    a = relu(z_base @ W_enc[0] + z_chat @ W_enc[1] + b_enc)
    reconstruction of z_m = a @ W_dec[:, m] + b_dec[m]

It acts on scaled activations, ``z_m = c_m * x_m`` with ``c_m = sqrt(d) / mean norm of x_m``, and neither file holds the
factors: what is loaded acts on z, which a warning and ``metadata["input_scale"]`` say. `rescale` makes it act on x.
The BOS token's position was left out of training.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from clt_plugin.core import FORMATS, Host, Piece, ReLU, Wiring
from clt_plugin.formats._description import Description, Formula
from clt_plugin.formats._hooks import RESIDUAL_HOOKS, site_of, split_block
from clt_plugin.formats._layers import count, peek
from clt_plugin.hub import Folder

CONFIG, WEIGHTS = "cfg.json", "cc_weights.pt"
MODELS = ("base", "chat")
ITS_KEYS = {"dict_size", "hook_point", "enc_dtype", "dec_init_norm"}

NOT_STORED = (
    "not stored: it acts on each model's activations times sqrt(d) / their mean norm over its training text; for Gemma "
    "2 2B at blocks.14.hook_resid_pre its authors' demo takes 0.2758961493232058 (base) and 0.24422852496546169 (chat)"
)


class ModelDiffPickle:
    """Reads the crosscoder between a base and a chat model."""

    name = "model-diff-crosscoder"

    def sniff(self, folder: Folder) -> bool:
        """Whether a folder is in this format."""
        return CONFIG in folder and (WEIGHTS in folder or peek(folder, CONFIG).keys() >= ITS_KEYS)

    def describe(self, folder: Folder) -> Description:
        """Say which tensor lies where, and warn that it acts on scaled activations."""
        config, where = folder.json(CONFIG), f"{folder.label}/{CONFIG}"
        d, n = count(where, config, "d_in"), count(where, config, "dict_size")
        layer, hook = split_block(str(config.get("hook_point")), where)
        wiring = Wiring.model_diff(MODELS, layer, site_of(hook, RESIDUAL_HOOKS, where))
        file, models = folder.file(WEIGHTS), range(len(MODELS))
        warnings.warn(
            f"{folder.label}: scale the activations, or rescale the crosscoder (clt_plugin.formats.rescale): its "
            f"input_scale is {NOT_STORED}",
            stacklevel=2,
        )
        return Description(
            folder.label,
            self.name,
            wiring,
            d,
            (n,),
            ReLU(),
            # It belongs to two models, of which the config names the base alone.
            Host(exclude_first=1),
            {
                ("W_enc", 0): tuple(Piece(file, "W_enc", (2, d, n), at=(m,), rows_last=True) for m in models),
                ("W_dec", 0): tuple(Piece(file, "W_dec", (n, 2, d), columns=(m, m + 1)) for m in models),
            },
            {("b_enc", 0): Piece(file, "b_enc", (n,))}
            | {("b_dec", m): Piece(file, "b_dec", (2, d), at=(m,)) for m in models},
            metadata={"input_scale": NOT_STORED, "base_model": config.get("model_name")},
        )


def rescale(description: Description, factors: Mapping[str, float]) -> Description:
    """Return the description of a crosscoder that acts on activations, of one that acts on scaled ones.

    ``build(rescale(describe(reference), {"base": 0.28, "chat": 0.24}))`` loads it. Encoders are multiplied with the
    factors, decoders and their biases divided by them; ``b_enc`` and what is active stay as they are. Compare the two
    models' decoder norms before, not after.

    Args:
        description: Whose weights act on factor * activation.
        factors: For each model the factor.
    """
    wiring = description.wiring
    if {*factors} != {*wiring.models} or not all(factor > 0 for factor in factors.values()):
        raise ValueError(f"a factor above 0 is needed for each of {', '.join(wiring.models)}, not {dict(factors)}")
    weights = dict(description.weights)
    for group in range(wiring.n_groups):
        for kind, sites, power in (("W_enc", wiring.reads[group], 1), ("W_dec", wiring.writes[group], -1)):
            pieces = weights[kind, group]
            if len(pieces) != len(sites):
                raise ValueError(f"{description.label} does not store its sites apart: scale its inputs instead")
            by_site = zip(pieces, sites, strict=True)
            weights[kind, group] = tuple(_times(piece, factors[site.model] ** power) for piece, site in by_site)
    vectors = dict(description.vectors)
    for number, site in enumerate(wiring.write_sites):
        vectors["b_dec", number] = _divided(vectors["b_dec", number], factors[site.model])
    metadata = {**description.metadata, "input_scale": {"folded in": dict(factors)}}
    return replace(description, weights=weights, vectors=vectors, metadata=metadata)


def _times(piece: Piece, factor: float) -> Piece:
    return replace(piece, scale=factor if piece.scale is None else piece.scale * factor)


def _divided(bias: Piece | Formula, factor: float) -> Piece | Formula:
    if isinstance(bias, Piece):
        return _times(bias, 1 / factor)

    def of(*tensors: Tensor) -> Tensor:
        return bias.of(*tensors) / factor

    return Formula(of, bias.pieces)


FORMATS.add(ModelDiffPickle.name, ModelDiffPickle())
