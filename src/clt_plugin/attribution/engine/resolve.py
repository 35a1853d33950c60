"""What targets are in one run: which vectors are read where, and what their values were."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clt_plugin.attribution.engine.linear import FrozenMap
from clt_plugin.attribution.engine.readings import Reading, Readings, of_features
from clt_plugin.attribution.engine.sources import ActiveFeatures
from clt_plugin.attribution.graph import GraphError
from clt_plugin.attribution.targets import Direction, Feature, Logit, Target, logit
from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.wiring import MODEL, SITE_NAMES, Site


@dataclass(frozen=True, eq=False)
class Resolved:
    """A target in one run.

    Attributes:
        readings: What it reads, as the only target.
        node: Its row in the table of nodes.
        coefficients: {token id: coefficient} of a sum of logits, else empty.
        site: The site of a direction, or None; ``"final_norm"`` is none of the sites.
        vector: A direction's vector.
    """

    readings: Readings
    node: dict[str, Any]
    coefficients: dict[int, float]
    site: Site | None = None
    vector: Tensor | None = None


class Resolver:
    """Finds what targets are in one run.

    Args:
        frozen: The map, with its recording.
        crosscoder: The crosscoder.
        features: The active features.
        tokenizer: The model's, or None.
    """

    def __init__(
        self, frozen: FrozenMap, crosscoder: Crosscoder, features: ActiveFeatures, tokenizer: Any = None
    ) -> None:
        self.frozen, self.crosscoder, self.features, self.tokenizer = frozen, crosscoder, features, tokenizer
        self._mean: Tensor | None = None

    def top_logits(self, max_n_logits: int, desired_logit_prob: float) -> list[Logit]:
        """Return the likeliest next tokens: as few as have the probability together, at most so many."""
        p = self._probabilities(-1)
        top = p.topk(min(max_n_logits, len(p)))
        short = top.values.cumsum(0) < desired_logit_prob
        return [logit(int(token)) for token in top.indices[: int(short.sum()) + 1]]

    def resolve(self, targets: Sequence[Target | int | str]) -> list[Resolved]:
        """Find the targets; logits come first, the likeliest first."""
        found = [self._resolve(target) for target in targets]
        return sorted(found, key=lambda one: (not one.node["id"][0].isdigit(), -one.node["weight"]))

    def _resolve(self, target: Any) -> Resolved:
        if isinstance(target, str) or (hasattr(target, "__index__") and not isinstance(target, bool)):
            target = logit(target if isinstance(target, str) else operator.index(target))
        weight = getattr(target, "weight", None)
        if weight is not None and not 0 < weight < math.inf:
            raise GraphError(f"a target's weight is a number above 0, not {weight!r}")
        if isinstance(target, Logit):
            return self._logit(target)
        if isinstance(target, Direction):
            return self._direction(target)
        if isinstance(target, Feature):
            return self._feature(target)
        raise GraphError(
            f"a target is a token, or made by logit, difference, direction or feature, not {type(target).__name__}"
        )

    def _logit(self, target: Logit) -> Resolved:
        recording, frozen = self.frozen.recording, self.frozen
        if recording.unembedded is None or frozen.unembedding is None:
            raise GraphError(
                "this model has no unembedding: load it with its language modelling head, or target a site"
            )
        position = self._position(target.position)
        coefficients: dict[int, float] = {}
        for token, coefficient in target.tokens:
            i = self._token(token)
            coefficients[i] = coefficients.get(i, 0.0) + coefficient
        if not any(coefficients.values()):
            raise GraphError("a difference is of two different tokens")
        ids = torch.tensor(list(coefficients), device=frozen.unembedding.device)
        factors = torch.tensor(list(coefficients.values()), dtype=frozen.dtype, device=frozen.device)
        vector = factors @ frozen.unembedding[ids].to(frozen.device, frozen.dtype) - factors.sum() * self._mean_column()
        shift = torch.zeros((), dtype=frozen.dtype, device=frozen.device)
        if frozen.unembedding_bias is not None:
            bias = frozen.unembedding_bias.to(frozen.device, frozen.dtype)
            shift = factors @ bias[ids] - factors.sum() * bias.mean()
        logits = recording.unembedded[0, position].to(frozen.device, frozen.dtype)
        value = factors @ logits[ids] - factors.sum() * logits.mean()
        one = len(coefficients) == 1 and target.tokens[0][1] == 1.0
        (first, *_), name = coefficients, "_".join(map(str, coefficients))
        probability = float(self._probabilities(position)[first]) if one else 1.0
        node = {
            "id": f"{frozen.n_layers + 1}_{first}_{position}" if one else f"target_logits_{name}_{position}",
            "layer": frozen.n_layers,
            "position": position,
            "token": self._text(first) if one else " - ".join(self._text(i) for i in coefficients),
            "token_id": first if one else -1,
            "value": float(value),
            "weight": probability if target.weight is None else target.weight,
        }
        return Resolved(self._reading(None, vector, position, shift, value), node, coefficients)

    def _direction(self, target: Direction) -> Resolved:
        frozen, position = self.frozen, self._position(target.position)
        vector = target.vector.detach().to(frozen.device, frozen.dtype)
        if tuple(vector.shape) != (frozen.d_model,):
            raise GraphError(f"a direction has shape ({frozen.d_model},), not {tuple(vector.shape)}")
        layer = frozen.n_layers - 1 if target.layer is None else target.layer
        if not 0 <= layer < frozen.n_layers:
            raise GraphError(f"there is no layer {layer}: the model has layers 0-{frozen.n_layers - 1}")
        site = None
        if target.site != "final_norm":
            places = frozen.host.architecture.places(frozen.parallel)
            if target.site not in places:
                raise GraphError(
                    f"this model has no site {target.site!r}: possible are {', '.join(places)}, final_norm"
                )
            site = Site(MODEL, target.site, layer)
        at, state, norm = self._state(site)
        x = frozen.value(at, state)[position]
        if norm is not None:
            x = norm.at(x[None], torch.tensor([position]))[0] + norm.bias
        value = vector @ x
        node = {
            "id": f"target_{target.name}_{target.site}_{layer}_{position}",
            "layer": frozen.n_layers if site is None else layer,
            "position": position,
            "token": target.name,
            "token_id": -1,
            "value": float(value),
            "weight": target.weight,
        }
        zero = torch.zeros((), dtype=frozen.dtype, device=frozen.device)
        return Resolved(self._reading(site, vector, position, zero, value), node, {}, site, vector)

    def _feature(self, target: Feature) -> Resolved:
        frozen, labels, position = self.frozen, self.features.labels, self._position(target.position)
        label = str(target.layer)
        if label not in labels:
            raise GraphError(f"the crosscoder has no features at layer {label}: it has them at {', '.join(labels)}")
        g = labels.index(label)
        if not 0 <= target.feature < self.crosscoder.group_sizes[g]:
            raise GraphError(f"layer {label} has features 0-{self.crosscoder.group_sizes[g] - 1}, not {target.feature}")
        sites = frozen.recording.sites
        x = torch.cat([sites[site][0, position] for site in self.crosscoder.wiring.reads[g]])
        value = self.crosscoder.pre_activations(g, x.to(self.crosscoder.device))[target.feature]
        group, place, latent = (torch.tensor([each], device=frozen.device) for each in (g, position, target.feature))
        number = value.detach().to(frozen.device, frozen.dtype)[None]
        table = ActiveFeatures(group, place, latent, number, number, labels, self.features.home)
        node = {
            "id": f"target_{label}_{target.feature}_{position}",
            "layer": self.features.home[g],
            "position": position,
            "token": f"feature {label}.{target.feature}",
            "token_id": -1,
            "value": float(value),
            "weight": target.weight,
        }
        readings = of_features(self.crosscoder, frozen, table, torch.zeros(1, dtype=torch.long, device=frozen.device))
        return Resolved(readings, node, {})

    def _state(self, site: Site | None) -> Any:
        if site is None:
            return self.frozen.n_layers - 1, "resid_post", self.frozen.final_norm
        return self.frozen.state(site)

    def _reading(self, site: Site | None, vector: Tensor, position: int, constant: Tensor, value: Tensor) -> Readings:
        layer, state, norm = self._state(site)
        if norm is not None:
            constant = constant + vector @ norm.bias
            vector = norm.transposed(vector, norm.scale[0, position])
        row = torch.zeros(1, dtype=torch.long, device=vector.device)
        reading = Reading(layer, state, row, row + position, vector[None])
        return Readings((reading,), constant[None], value[None], row + position, row + reading.order)

    def _position(self, position: int) -> int:
        n = self.frozen.n_positions
        if isinstance(position, bool) or not hasattr(position, "__index__"):
            raise GraphError(f"a position is a whole number, not {position!r}")
        if not -n <= position < n:
            raise GraphError(f"the prompt has {n} tokens: there is no position {position}")
        return position % n

    def _token(self, token: int | str) -> int:
        assert self.frozen.unembedding is not None
        size = len(self.frozen.unembedding)
        if isinstance(token, str):
            if self.tokenizer is None:
                raise GraphError("there is no tokenizer: give the token's id")
            ids = self.tokenizer(token, add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                raise GraphError(f"{token!r} is {len(ids)} tokens: a target is one token")
            return int(ids[0])
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise GraphError(f"a token is its id, or text, not {token!r}")
        if not 0 <= token < size:
            raise GraphError(f"there is no token {token}: the vocabulary has 0 to {size - 1}")
        return token

    def _text(self, token: int) -> str:
        return str(token) if self.tokenizer is None else self.tokenizer.decode([token])

    def _probabilities(self, position: int) -> Tensor:
        logits = self.frozen.recording.logits
        if logits is None:
            raise GraphError("this model has no unembedding: load it with its language modelling head, or give targets")
        wide = torch.promote_types(logits.dtype, torch.float32)
        return logits[0, position].to(wide).softmax(-1)

    def _mean_column(self) -> Tensor:
        if self._mean is None:
            assert self.frozen.unembedding is not None
            self._mean = self.frozen.unembedding.mean(0, dtype=self.frozen.dtype).to(self.frozen.device)
        return self._mean


def known_sites(targets: Iterable[Any], n_layers: int) -> list[Site]:
    """Return the sites that directions name, so that they are recorded."""
    layers = [
        (one.site, n_layers - 1 if one.layer is None else one.layer) for one in targets if isinstance(one, Direction)
    ]
    return [Site(MODEL, name, layer) for name, layer in layers if name in SITE_NAMES and 0 <= layer < n_layers]
