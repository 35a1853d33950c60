"""What features do together, added up over the tokens of a data set: the accumulators of `global_weights`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clt_plugin.attribution.corpus._virtual import Chosen
from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.features import SparseGroup


class Sums:
    """What is added up over tokens; see `GlobalWeights`.

    Args:
        crosscoder: The crosscoder.
        chosen: The chosen features.
        targets: Whether these are targets.
        sources: Whether they are sources.
    """

    def __init__(self, crosscoder: Crosscoder, chosen: list[Chosen], targets: bool, sources: bool) -> None:
        self.crosscoder, self.chosen, self.n_tokens = crosscoder, chosen, 0
        self.n_chosen = sum(len(part.latents) for part in chosen)
        n = sum(crosscoder.group_sizes)
        self.active = torch.zeros(n, dtype=torch.long, device=crosscoder.device)
        self.total = torch.zeros(n, dtype=torch.float64, device=crosscoder.device)
        self.together = self.total.new_zeros(n, self.n_chosen)
        self.under_chosen = torch.zeros_like(self.together) if targets else None
        self.over_chosen = torch.zeros_like(self.together) if sources else None

    def add(self, found: Mapping[int, SparseGroup], n_tokens: int) -> None:
        """Add what was active in some tokens, by group."""
        self.n_tokens += n_tokens
        acts = self._chosen_activations(found, n_tokens)
        # Few tokens have a chosen feature active: sums over pairs need no others.
        used, on = acts.any(dim=1), (acts > 0).double()
        start = 0
        for group, size in enumerate(self.crosscoder.group_sizes):
            rows, entries = slice(start, start + size), found[group]
            values = entries.values.double()
            self.active[rows] += torch.bincount(entries.latents[values > 0], minlength=size)
            self.total[rows] += torch.bincount(entries.latents, weights=values, minlength=size)
            within = used[entries.tokens]
            places = torch.stack((entries.latents[within], entries.tokens[within]))
            if places.shape[1]:
                shape = (size, n_tokens)
                others = torch.sparse_coo_tensor(places, values[within], shape, check_invariants=False)
                self.together[rows] += torch.sparse.mm(others, acts)
                if self.under_chosen is not None:
                    self.under_chosen[rows] += torch.sparse.mm(others, on)
                if self.over_chosen is not None:
                    others_on = (values[within] > 0).double()
                    others = torch.sparse_coo_tensor(places, others_on, shape, check_invariants=False)
                    self.over_chosen[rows] += torch.sparse.mm(others, acts)
            start += size

    def _chosen_activations(self, found: Mapping[int, SparseGroup], n_tokens: int) -> Tensor:
        """Return the activations of the chosen features, (tokens, n), in float64."""
        acts = self.total.new_zeros(n_tokens, self.n_chosen)
        for part in self.chosen:
            entries = found[part.group]
            column = torch.full((entries.n_latents,), -1, device=acts.device)
            column[part.latents] = part.columns
            at = column[entries.latents]
            is_chosen = at >= 0
            acts[entries.tokens[is_chosen], at[is_chosen]] = entries.values[is_chosen].double()
        return acts
