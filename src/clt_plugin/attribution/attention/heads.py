"""Head loadings: which attention heads an edge goes through.

A path from a source to a target may pass several heads, so that "the share that passes head h" would count some paths
twice. Split by the **last** head that is passed before the target reads, plus a part that passes none, the parts add
up to the edge. What attention's own biases write starts at the bias node, behind the heads of its layer: it passes
those of later layers only. Source: Kamath et al. 2025, "Tracing Attention Computation Through Feature Interactions",
on head loadings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_plugin.attribution.graph import GraphError
from clt_plugin.attribution.targets import Target

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class HeadLoadings:
    """The edges into one target, split by the last head that they pass.

    Attributes:
        target: The target's id.
        value: Its value in the run.
        nodes: The sources, one row each, as in a graph's table of nodes.
        edges: What each source adds to the target, (S,).
        direct: The part that passes no head, (S,).
        loadings: The part whose last head is each, (layer, head, S); 0 for layers behind the target.
        residual: How far sums of parts are from what they should be, relative to absolute sums.
        tolerance: What that had to stay below.
    """

    target: str
    value: float
    nodes: pd.DataFrame
    edges: Tensor
    direct: Tensor
    loadings: Tensor
    residual: float
    tolerance: float

    def of(self, source: int | str) -> Tensor:
        """Return one source's loadings, (layer, head), given its id or its place among the sources."""
        return self.loadings[:, :, self.index(source)]

    def index(self, source: int | str) -> int:
        """Return a source's place, given its id, or that place itself."""
        if isinstance(source, int):
            if not -len(self.nodes) <= source < len(self.nodes):
                raise GraphError(f"there is no source {source}: there are {len(self.nodes)}")
            return source % len(self.nodes)
        found = self.nodes.index[self.nodes["id"] == source]
        if len(found) == 0:
            raise GraphError(f"there is no source {source!r}: ids are such as {', '.join(self.nodes['id'][:3])}")
        return int(found[0])

    def top(self, k: int = 20, source: int | str | None = None) -> pd.DataFrame:
        """Return the k largest parts in magnitude, of all sources or of one.

        Args:
            k: How many at most.
            source: The source's id, or its place among the sources; None for all.

        Returns:
            ``source`` (its id), ``layer`` and ``head`` (-1 for the part that passes none), ``part``, and ``edge``, the
            whole of which it is a part.
        """
        n_layers, n_heads, _ = self.loadings.shape
        places = torch.arange(len(self.nodes)) if source is None else torch.tensor([self.index(source)])
        parts = torch.cat((self.loadings.flatten(0, 1), self.direct[None]))[:, places]
        best = parts.abs().flatten().topk(min(k, parts.numel())).indices
        rows, columns = best // len(places), places[best % len(places)]
        none = rows == n_layers * n_heads
        table = {
            "source": self.nodes["id"].iloc[columns.tolist()].tolist(),
            "layer": torch.where(none, -1, rows // n_heads).tolist(),
            "head": torch.where(none, -1, rows % n_heads).tolist(),
            "part": parts.flatten()[best].tolist(),
            "edge": self.edges[columns].tolist(),
        }
        import pandas as pd

        return pd.DataFrame(table)

    def plot(self, source: int | str | None = None) -> Figure:
        """Plot loadings by layer and head: one source's, or the sum of all sources'."""
        from clt_plugin.report.attention import plot_loadings

        what = f"all sources to {self.target}" if source is None else f"{source} to {self.target}"
        at = slice(None) if source is None else slice(self.index(source), self.index(source) + 1)
        direct = float(self.direct[at].sum())
        return plot_loadings(self.loadings[:, :, at].sum(-1), f"{what}, by last head; passing none: {direct:.3g}")

    def __str__(self) -> str:
        first = f"into {self.target}, value {self.value:.3f}, by the last head passed; residual {self.residual:.1e}"
        return f"{first}\n{self.top(10).to_string(index=False)}"

    def __repr__(self) -> str:
        n_layers, n_heads, n = self.loadings.shape
        return f"<HeadLoadings of {n} sources into {self.target}, over {n_layers} x {n_heads} heads>"


def head_loadings(
    model: Any,
    prompt: Any,
    target: Target | int | str,
    *,
    clt: Any = None,
    zero_bos: bool = False,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    bar: bool = True,
    name: str = "clt",
) -> HeadLoadings:
    """Split the edges into one target by the last head that they pass.

    Args:
        model: An nnsight model, a TransformerBridge, or a transformers model.
        prompt: Text, or token ids (position,) or (1, position).
        target: A token, or what `clt_plugin.attribution.targets` makes.
        clt: The crosscoder, or a reference; by default the one that is attached to the model.
        zero_bos: As for `attribute`.
        dtype: In which to compute; by default the model's, float32 at least.
        tolerance: What residuals must stay below; by default what suits the coarsest dtype.
        bar: Whether to show progress.
        name: The name under which the crosscoder is attached.

    Raises:
        CertificateError: The parts do not add up to the edges, or the edges not to the target's value.
        FreezeError: The model cannot be recorded or frozen.
        AttachError: The crosscoder does not fit the model, or cannot stand for its MLPs.
        GraphError: The prompt or the target cannot be.
    """
    from clt_plugin.adapters.huggingface import plain_model
    from clt_plugin.attribution.attention._by_head import split
    from clt_plugin.attribution.attention._parts import check_sums, pulled, source_nodes
    from clt_plugin.attribution.engine.local import LocalReplacement
    from clt_plugin.attribution.engine.resolve import Resolver
    from clt_plugin.interventions.modes import find_crosscoder, read_prompt

    crosscoder = find_crosscoder(model, clt, name, None, "attribute")
    assert crosscoder is not None
    inputs, tokenizer = read_prompt(model, prompt)
    with plain_model(model) as hf, torch.no_grad():
        local = LocalReplacement.of(hf, crosscoder, inputs, zero_bos=zero_bos, sites_for=[target], dtype=dtype)
        resolver = Resolver(local.frozen, crosscoder, local.sources.features, tokenizer)
        resolved = resolver.resolve([target])[0]
        readings = resolved.readings
        edges = pulled(local, readings)
        direct, loadings, sums = split(local, readings, bar)
        whole = direct + loadings.sum((0, 1))
        # Rounding is relative to the largest parts: an edge may be what is left of many that cancel.
        largest = (direct.abs() + loadings.abs().sum((0, 1))).amax().expand_as(whole)
        sums += [
            ("the sum of the parts of an edge", whole, edges[0], largest),
            ("the sum of the edges", edges.sum(1), readings.values, edges.abs().sum(1)),
        ]
        residual, tolerance = check_sums(local, next(hf.parameters()).dtype, sums, tolerance)
    return HeadLoadings(
        target=resolved.node["id"],
        value=float(readings.values[0]),
        nodes=source_nodes(local, tokenizer),
        edges=edges[0].cpu(),
        direct=direct.cpu(),
        loadings=loadings.cpu(),
        residual=residual,
        tolerance=tolerance,
    )
