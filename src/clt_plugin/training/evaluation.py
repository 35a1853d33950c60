"""How good a crosscoder is on texts: its reconstruction, its sparsity, and the model with it in the loop.

Of a written site y with reconstruction yhat, the fraction of variance unexplained is::

    FVU = sum over tokens ||y - yhat||^2 / sum over tokens ||y - mean y||^2

and in the loop, where every MLP that the crosscoder writes is replaced by its reconstruction, the model's predictions
are compared with its own: delta loss is the cross-entropy of the replaced model less that of the model itself, KL is
KL(model || replaced), in nats, and top-1 agreement is the share of predictions whose likeliest token is the same.
Sources: Ameisen et al. 2025, "Circuit Tracing" (evaluation of CLTs); Templeton et al. 2024 (dead and dense features).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clt_plugin.adapters._run import Run, group_labels
from clt_plugin.adapters.huggingface import HostModel, check_fits, plain_model
from clt_plugin.core import AttachError, Crosscoder, Site, SparseFeatures
from clt_plugin.training.data.activations import DataError
from clt_plugin.training.data.tokens import Rows
from clt_plugin.training.reading import as_it_runs, models_of, read_texts, tokens_for
from clt_plugin.training.standard import Moments

if TYPE_CHECKING:
    import pandas as pd

DENSE_ABOVE = 0.1
"""A latent that is active on more than this share of tokens is dense."""


@dataclass(frozen=True)
class InLoop:
    """What the model predicts with the reconstruction in place of what the crosscoder writes.

    Attributes:
        n_predictions: How many predictions were compared.
        loss: The cross-entropy of the model as it is, nats a token.
        replaced_loss: That of the replaced model.
        kl: KL(model || replaced), nats a token.
        top1: The share of predictions whose likeliest token is the same.
    """

    n_predictions: int
    loss: float
    replaced_loss: float
    kl: float
    top1: float

    @property
    def delta_loss(self) -> float:
        """How much the replacement adds to the cross-entropy, nats a token."""
        return self.replaced_loss - self.loss


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        n_tokens: How many tokens counted.
        fvu: The fraction of variance unexplained of every written site, by its name, such as ``"mlp_out.3"``.
        l0: How many latents of each group are active a token, by the group's label: its home layer.
        dead: For each group, the share of latents that were active on no token.
        dense: For each group, the share that were active on more than a tenth of them.
        in_loop: What the model predicts with it in the loop; None where it cannot replace anything.
        why_not_in_loop: The reason for that.
    """

    n_tokens: int
    fvu: dict[str, float]
    l0: dict[str, float]
    dead: dict[str, float]
    dense: dict[str, float]
    in_loop: InLoop | None = None
    why_not_in_loop: str | None = None

    @property
    def mean_fvu(self) -> float:
        """The fraction of variance unexplained, averaged over sites: all count alike, as they do in training."""
        return sum(self.fvu.values()) / len(self.fvu)

    @property
    def mean_l0(self) -> float:
        """Active latents a token and group, averaged over groups."""
        return sum(self.l0.values()) / len(self.l0)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, for JSON; `Crosscoder.metadata` takes it as ``"metrics"``."""
        data = asdict(self)
        if self.in_loop is not None:
            data["in_loop"]["delta_loss"] = self.in_loop.delta_loss
        return {**data, "mean_fvu": self.mean_fvu, "mean_l0": self.mean_l0}

    @property
    def table(self) -> pd.DataFrame:
        """One row for each measure of each site and group, with the columns of, measure and value."""
        import pandas

        rows = [(site, "fvu", value) for site, value in self.fvu.items()]
        for measure in ("l0", "dead", "dense"):
            rows += [(f"group {label}", measure, value) for label, value in getattr(self, measure).items()]
        if self.in_loop is not None:
            measures = {**asdict(self.in_loop), "delta_loss": self.in_loop.delta_loss}
            rows += [("model", measure, float(value)) for measure, value in measures.items()]
        return pandas.DataFrame(rows, columns=["of", "measure", "value"])

    def __str__(self) -> str:
        lines = [f"over {self.n_tokens} tokens: FVU {self.mean_fvu:.4f}, L0 {self.mean_l0:.1f} a group"]
        lines += [f"  {site:<12} FVU {value:.4f}" for site, value in self.fvu.items()]
        for label, value in self.l0.items():
            lines.append(
                f"  group {label:<6} L0 {value:.1f}, dead {self.dead[label]:.1%}, dense {self.dense[label]:.1%}"
            )
        if self.in_loop is None:
            return "\n".join([*lines, f"  not in the model's loop: {self.why_not_in_loop}"])
        loop = self.in_loop
        lines.append(
            f"  in the loop: loss {loop.replaced_loss:.4f} (the model's {loop.loss:.4f}, {loop.delta_loss:+.4f}), "
            f"KL {loop.kl:.4f}, top-1 {loop.top1:.1%}"
        )
        return "\n".join(lines)


def evaluate(
    model: Any,
    crosscoder: Crosscoder,
    texts: Any,
    *,
    tokenizer: Any = None,
    max_tokens: int | None = None,
    length: int = 256,
    batch_size: int = 8,
    edits: Any = None,
    in_loop: bool = True,
    bar: bool | None = None,
) -> Evaluation:
    """Evaluate a crosscoder on texts, in one pass over them.

    Each row holds one text or a piece of one. Tokens that the crosscoder excludes (``host.exclude_first``), special
    ones and padding do not count; a prediction counts from a token that counts to a next one that counts. The
    crosscoder is to act on raw activations: one in training is folded first (`clt_plugin.training.standard.fold`).

    Args:
        model: An nnsight model, a TransformerBridge or a transformers model; {name: model} for a wiring over several.
        crosscoder: What to evaluate. It may be lazy; it is evaluated as it runs outside training.
        texts: A `Tokens`, or whatever `Texts.of` reads.
        tokenizer: For models without one of their own.
        max_tokens: No further batch is run once so many tokens have counted.
        length: How many tokens a row has at most.
        batch_size: How many rows run at a time.
        edits: Write masks such as `ablate_cross_layer`, under which it is evaluated.
        in_loop: Whether to run the model with the reconstruction too, which takes most of the time.
        bar: Whether to show progress; by default on a terminal.

    Raises:
        AttachError: The crosscoder does not fit the model.
        DataError: The texts cannot be run as asked, or no token of them counts.
        EditError: The edits are no write masks, or do not fit.
        WiringError: A BatchTopK's thresholds were not measured.
    """
    _check_edits(crosscoder, edits)
    tokens = tokens_for(model, crosscoder, texts, tokenizer, length)
    with as_it_runs(crosscoder), torch.no_grad():
        loop, reason = _loop_of(model, crosscoder, edits) if in_loop else (None, "it was not asked for")
        sums = _Sums(crosscoder, edits)
        settings: dict[str, Any] = {"batch_size": batch_size, "max_tokens": max_tokens, "bar": bar}
        for rows, activations in read_texts(model, crosscoder, tokens, **settings, desc="evaluation"):
            sums.add(activations.by_site())
            if loop is not None:
                loop.add(rows)
    if not sums.n_tokens:
        raise DataError("no token of these texts counts: give longer texts, or see exclude_first and skip_special")
    return sums.evaluation(None if loop is None else loop.result(), reason)


def _check_edits(crosscoder: Crosscoder, edits: Any) -> None:
    from clt_plugin.interventions.edits import EditError

    if edits is None:
        return
    others = {part.edit.kind for part in edits.parts()} - {"ablate_cross_layer"}
    if others:
        raise EditError(f"a crosscoder is evaluated under write masks alone, not under {', '.join(sorted(others))}")
    edits.check(crosscoder)


# ---------------------------------------------------------------- reconstruction and sparsity


class _Sums:
    """What is summed over tokens, in float64."""

    def __init__(self, crosscoder: Crosscoder, edits: Any) -> None:
        self.crosscoder, self.edits = crosscoder, edits
        self.n_tokens = 0
        self.moments = {site: Moments(crosscoder.layout.width[site]) for site in crosscoder.sites.write}
        self.squares = dict.fromkeys(crosscoder.sites.write, 0.0)
        self.active = [torch.zeros(size, dtype=torch.long) for size in crosscoder.group_sizes]

    def add(self, activations: Mapping[Site, Tensor]) -> None:
        """Take in what some tokens have at all sites."""
        reads = {site: activations[site] for site in self.crosscoder.sites.read}
        features = self.crosscoder.encode(reads, sparse=True)
        self.n_tokens += features.shape[0]
        for count, group in zip(self.active, features.groups, strict=True):
            count += torch.bincount(group.latents, minlength=len(count)).cpu()
        for site, y in self._decoded(features, reads).items():
            self.moments[site].update(activations[site])
            self.squares[site] += float((activations[site].double() - y.double()).square().sum())

    def _decoded(self, features: SparseFeatures, reads: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        if self.edits is None:
            return dict(self.crosscoder.decode(features, reads))
        from clt_plugin.interventions.writes import decode

        return dict(decode(self.crosscoder, features, self.edits, reads))

    def evaluation(self, in_loop: InLoop | None, reason: str | None) -> Evaluation:
        """Return what was measured."""
        fvu = {}
        for site, moments in self.moments.items():
            variance = float(moments.deviation.sum())
            # A site that does not vary has nothing to explain.
            fvu[str(site)] = self.squares[site] / variance if variance > 0 else float("nan")
        shares = {
            label: count.double() / self.n_tokens
            for label, count in zip(group_labels(self.crosscoder.wiring), self.active, strict=True)
        }
        return Evaluation(
            n_tokens=self.n_tokens,
            fvu=fvu,
            l0={label: float(share.sum()) for label, share in shares.items()},
            dead={label: float((share == 0).double().mean()) for label, share in shares.items()},
            dense={label: float((share > DENSE_ABOVE).double().mean()) for label, share in shares.items()},
            in_loop=in_loop,
            why_not_in_loop=reason,
        )


# ---------------------------------------------------------------- the model with it in the loop


def _loop_of(model: Any, crosscoder: Crosscoder, edits: Any) -> tuple[_Loop | None, str | None]:
    """Return what runs the model with the crosscoder in it, or the reason why nothing can."""
    if isinstance(model, Mapping) and len(model) > 1:
        return None, "it spans several models"
    (model,) = models_of(model, crosscoder).values()
    with plain_model(model) as hf:
        # What does not fit at all is refused; what fits but cannot replace is only observed.
        check_fits(crosscoder, hf, "observe", together=True)
        if hf.get_output_embeddings() is None:  # type: ignore[operator]
            return None, "the model has no unembedding"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                host = check_fits(crosscoder, hf, "replace")
        except AttachError as error:
            return None, str(error)
    return _Loop(model, host, crosscoder, edits), None


class _Loop:
    """Compares a model's predictions with those it makes with a crosscoder in place of MLPs."""

    def __init__(self, model: Any, host: HostModel, crosscoder: Crosscoder, edits: Any) -> None:
        self.model, self.host, self.crosscoder, self.edits = model, host, crosscoder, edits
        self.n = 0
        self.sums = torch.zeros(4, dtype=torch.float64)

    def add(self, rows: Rows) -> None:
        """Run some rows, with and without the crosscoder."""
        from clt_plugin.interventions._engine import Engine

        with plain_model(self.model) as hf:
            ids = rows.ids.to(next(hf.parameters()).device)
            # Padding comes last, where no token of a causal model sees it.
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
            natural = hf(**inputs).logits
            with Engine(hf, self.host, Run(self.crosscoder, "replace", self.edits)):
                replaced = hf(**inputs).logits
        where = (rows.counted[:, :-1] & rows.counted[:, 1:]).to(ids.device)
        # Row by row: logits are by far the largest thing here, and in float32 larger still.
        for row, kept in enumerate(where):
            if bool(kept.any()):
                following = ids[row, 1:][kept]
                self._compare(natural[row, :-1][kept], replaced[row, :-1][kept], following)

    def _compare(self, natural: Tensor, replaced: Tensor, following: Tensor) -> None:
        """Take in the predictions of some tokens, logits (n, vocabulary), and what came next, (n,)."""
        wide = torch.promote_types(natural.dtype, torch.float32)
        p, q = (F.log_softmax(logits.to(wide), dim=-1) for logits in (natural, replaced))
        next_one = following[:, None]
        losses = (-p.gather(1, next_one), -q.gather(1, next_one))
        kl = (p.exp() * (p - q)).sum(-1)
        same = p.argmax(-1) == q.argmax(-1)
        self.sums += torch.stack([each.double().sum().cpu() for each in (*losses, kl, same)])
        self.n += len(following)

    def result(self) -> InLoop | None:
        """Return the averages, or None where there was nothing to predict."""
        if not self.n:
            return None
        loss, replaced, kl, top1 = (self.sums / self.n).tolist()
        return InLoop(self.n, loss, replaced, kl, top1)
