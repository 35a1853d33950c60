"""How near a replaced model stays to the model, layer by layer: the local and the global replacement."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_plugin.analysis.faithfulness._texts import fitting, on_terminal, several
from clt_plugin.core import Crosscoder, Site
from clt_plugin.core.wiring import MODEL

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

COLUMNS = ("layer", "replacement", "site", "cosine", "error")


@dataclass(frozen=True)
class ReplacementError:
    """How far replacements are from the model.

    Attributes:
        rows: One a layer, replacement (``"local"``: each layer reconstructed from what the model itself holds;
            ``"global"``: every MLP replaced, errors adding up) and site (``"mlp_out"``, what is written, or
            ``"resid_post"``, the residual stream after the layer): the mean ``cosine`` over tokens, and the ``error``,
            ``sum ||yhat - y||^2 / sum ||y||^2``.
        n_tokens: How many tokens counted.
    """

    rows: tuple[tuple[int, str, str, float, float], ...]
    n_tokens: int

    @property
    def table(self) -> pd.DataFrame:
        """The rows, with the columns layer, replacement, site, cosine and error."""
        import pandas as pd

        return pd.DataFrame(list(self.rows), columns=list(COLUMNS))

    def plot(self) -> Figure:
        """Draw cosine and error over layers."""
        from clt_plugin.report.faithfulness import plot_replacement

        return plot_replacement(self.table, self.n_tokens)


class _Sums:
    """Sums over tokens that cosine and error are made of."""

    def __init__(self) -> None:
        self.sums: dict[tuple[int, str, str], Tensor] = {}

    def add(self, layer: int, replacement: str, site: str, found: Tensor, true: Tensor) -> None:
        y, yhat = true.double(), found.double()
        cosine = torch.nn.functional.cosine_similarity(yhat, y, dim=-1).sum()
        new = torch.stack([cosine, (yhat - y).square().sum(), y.square().sum()]).cpu()
        key = (layer, replacement, site)
        self.sums[key] = self.sums[key] + new if key in self.sums else new

    def rows(self, n: int) -> tuple[tuple[int, str, str, float, float], ...]:
        order = {"local": 0, "global": 1}
        keys = sorted(self.sums, key=lambda key: (order[key[1]], key[2], key[0]))
        return tuple((*key, float(self.sums[key][0]) / n, float(self.sums[key][1] / self.sums[key][2])) for key in keys)


def replacement_error(model: Any, clt: Any, prompts: Iterable[Any], *, bar: bool | None = None) -> ReplacementError:
    """Measure layer by layer how near the local and the global replacement stay to the model itself.

    The cosine and the normalised squared error of Ameisen et al. 2025, "Circuit Tracing" (evaluation of the local
    replacement model), here of what MLPs write and of the residual stream. A local error says how good the dictionary
    is; a global one says what becomes of it when every later layer reads what earlier ones got wrong.

    Args:
        model: An nnsight model, a TransformerBridge, or a transformers model.
        clt: A crosscoder that can stand for MLPs, or a reference.
        prompts: Texts, or token ids (position,).
        bar: Whether to show progress; by default on a terminal.
    """
    from tqdm.auto import tqdm

    from clt_plugin.adapters.huggingface import check_fits, plain_model
    from clt_plugin.interventions.modes import read_prompt

    crosscoder, prompts, sums, n = fitting(model, clt), several(prompts), _Sums(), 0
    for prompt in tqdm(prompts, "replacements", disable=not on_terminal(bar)):
        inputs, _ = read_prompt(model, prompt)
        with plain_model(model) as hf, torch.no_grad():
            host = check_fits(crosscoder, hf, "replace")
            n += _measure(sums, hf, host, crosscoder, inputs)
    if not n:
        raise ValueError("no token counts: give prompts with tokens beyond those that the crosscoder excludes")
    return ReplacementError(sums.rows(n), n)


def _measure(sums: _Sums, hf: Any, host: Any, crosscoder: Crosscoder, inputs: dict[str, Any]) -> int:
    """Add one prompt's sums; return how many of its tokens count."""
    from clt_plugin.adapters._frozen import record
    from clt_plugin.adapters._run import Run
    from clt_plugin.adapters.huggingface import excluded_positions
    from clt_plugin.interventions._engine import Engine

    device = next(hf.parameters()).device
    inputs = {key: each.to(device) if isinstance(each, Tensor) else each for key, each in inputs.items()}
    shape = tuple(inputs["input_ids"].shape)
    excluded = excluded_positions(crosscoder.host.exclude_first, inputs, shape)
    counted = torch.ones(shape, dtype=torch.bool) if excluded is None else ~excluded.cpu()
    after = {layer: Site(MODEL, "resid_post", layer) for layer in range(host.n_layers)}
    own = record(hf, host, inputs, (*crosscoder.sites.read, *crosscoder.sites.write, *after.values()))
    with Engine(hf, host, Run(crosscoder, "replace")):
        replaced = record(hf, host, inputs, (*crosscoder.sites.write, *after.values()))
    reads = {site: own.sites[site][counted].to(crosscoder.device) for site in crosscoder.sites.read}
    recon = crosscoder.decode(tuple(crosscoder.encode(reads)), reads)
    for site in crosscoder.sites.write:
        true = own.sites[site][counted]
        sums.add(site.layer, "local", "mlp_out", recon[site].to(true), true)
        sums.add(site.layer, "global", "mlp_out", replaced.sites[site][counted], true)
    for layer, site in after.items():
        sums.add(layer, "global", "resid_post", replaced.sites[site][counted], own.sites[site][counted])
    return int(counted.sum())
