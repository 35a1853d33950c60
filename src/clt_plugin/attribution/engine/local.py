"""The local replacement model of one prompt: everything that edges are found from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clt_plugin.attribution.engine.linear import FrozenMap
from clt_plugin.attribution.engine.readings import Readings, of_features
from clt_plugin.attribution.engine.resolve import known_sites
from clt_plugin.attribution.engine.sources import Sources, sources_of
from clt_plugin.attribution.graph import GraphError
from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.wiring import Site

if TYPE_CHECKING:
    from clt_plugin.adapters.huggingface import HostModel


@dataclass(frozen=True, eq=False)
class LocalReplacement:
    """The local replacement model of one prompt: the frozen map, and the sources that the MLPs were split into.

    Attributes:
        frozen: The map.
        crosscoder: The crosscoder.
        sources: The sources.
        inputs: The model's keyword arguments.
        acting: Positions at which the crosscoder acts and that are not zeroed, (position,) of bool.
    """

    frozen: FrozenMap
    crosscoder: Crosscoder
    sources: Sources
    inputs: dict[str, Any]
    acting: Tensor

    @classmethod
    def of(
        cls,
        hf: nn.Module,
        crosscoder: Crosscoder,
        inputs: dict[str, Any],
        *,
        zero_bos: bool = False,
        sites_for: Sequence[Any] = (),
        dtype: torch.dtype | None = None,
    ) -> LocalReplacement:
        """Record a run of the plain model, and split what its MLPs wrote.

        Args:
            hf: The plain Hugging Face model.
            crosscoder: The crosscoder.
            inputs: The model's keyword arguments, one row of token ids.
            zero_bos: As for `attribute`.
            sites_for: Targets whose sites to record as well.
            dtype: As for `attribute`.
        """
        from clt_plugin.adapters.huggingface import check_fits, excluded_positions

        device = next(hf.parameters()).device
        inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        ids = inputs.get("input_ids")
        if ids is None or ids.ndim != 2 or len(ids) != 1:
            shape = None if ids is None else tuple(ids.shape)
            raise GraphError(f"a graph is of one prompt: give text, or ids (position,) or (1, position), not {shape}")
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and not bool(mask.bool().all()):
            raise GraphError("a graph's prompt has no padding: leave it out")
        if crosscoder.is_partial:
            raise GraphError(
                "this crosscoder is a selection of layers or features: its features are numbered anew, and what those "
                "left out do would pass for error. Take the whole; max_feature_nodes= keeps a graph small"
            )
        host = check_fits(crosscoder, hf, "replace_with_error", together=True)
        _check_prompt(hf, ids)
        n = ids.shape[1]
        sites = (*crosscoder.sites.read, *crosscoder.sites.write, *known_sites(sites_for, host.n_layers))
        _check_outputs_before_norms(host, crosscoder, sites)
        frozen = FrozenMap.of(hf, inputs, tuple(dict.fromkeys(sites)), dtype)
        excluded = excluded_positions(crosscoder.host.exclude_first, inputs, (1, n))
        out = torch.zeros(n, dtype=torch.bool, device=device) if excluded is None else excluded[0].to(device)
        zeroed = torch.zeros_like(out)
        if zero_bos:
            zeroed[: max(1, crosscoder.host.exclude_first)] = True
        sources = sources_of(crosscoder, frozen, out, zeroed)
        return cls(frozen, crosscoder, sources, inputs, ~(out | zeroed))

    def readings(self, nodes: Tensor | None = None) -> Readings:
        """Return what the pre-activations of some features, or of all, read."""
        features = self.sources.features
        nodes = torch.arange(len(features), device=self.frozen.device) if nodes is None else nodes
        return of_features(self.crosscoder, self.frozen, features, nodes)

    def to(self, device: torch.device) -> LocalReplacement:
        """Return it on another device."""
        return replace(self, frozen=self.frozen.to(device), sources=self.sources.to(device))


def _check_outputs_before_norms(host: HostModel, crosscoder: Crosscoder, sites: Sequence[Site]) -> None:
    """Refuse to read an MLP's output before its post-norm where only what comes after the norm is split."""
    for site in sites:
        split = site in crosscoder.sites.write or host.architecture.post_mlp_norm is None
        if site.name == "mlp_out_before_norm" and not split:
            raise GraphError(
                f"{site} cannot be read in a graph: what the crosscoder writes, and errors, are parts of what the norm "
                "after that MLP puts out, not of what it is given. Read mlp_out, or use a crosscoder that writes "
                "mlp_out_before_norm"
            )


def _check_prompt(hf: nn.Module, ids: Tensor) -> None:
    """Refuse tokens, or positions, that the model does not have."""
    rows = len(hf.get_input_embeddings().weight)  # type: ignore[operator,arg-type]
    if bool((ids < 0).any()) or bool((ids >= rows).any()):
        beyond = ids[(ids < 0) | (ids >= rows)][0]
        raise GraphError(f"there is no token {int(beyond)}: the model has tokens 0 to {rows - 1}")
    text: Any = hf.config.get_text_config()  # type: ignore[union-attr,operator]
    if text.model_type == "gpt2" and ids.shape[1] > text.n_positions:
        raise GraphError(f"the prompt has {ids.shape[1]} tokens, but the model has {text.n_positions} positions")
