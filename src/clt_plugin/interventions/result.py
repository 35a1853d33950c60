"""What `intervene` returns: logits and features before and after, to print and to plot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clt_plugin.core.features import SparseFeatures
from clt_plugin.interventions.edits import Edit, EditError


@dataclass(frozen=True)
class TokenChange:
    """One token's probability before and after.

    Attributes:
        id: The token.
        text: As the tokenizer shows it.
        before: Its probability in the unedited run.
        after: Its probability with the edits.
    """

    id: int
    text: str
    before: float
    after: float


@dataclass(frozen=True, eq=False)
class Intervention:
    """One prompt, run with and without edits.

    Its methods count positions as edits do: each row's real tokens, from 0, or from its end where negative.

    Attributes:
        logits: With the edits, (batch, position, vocabulary); differentiable in strengths that require a gradient.
        baseline: Of the unedited run, of the same shape.
        before: The features of the unedited run; None without a crosscoder.
        after: The features with the edits, themselves included.
        edits: What was done.
        mode: How.
        ids: The prompt's tokens, (batch, position).
        mask: Which of them are real, (batch, position); None for all.
        tokenizer: The model's, or None.
    """

    logits: Tensor
    baseline: Tensor
    before: SparseFeatures | None
    after: SparseFeatures | None
    edits: Edit | None
    mode: str
    ids: Tensor | None
    mask: Tensor | None
    tokenizer: Any

    def top_tokens(self, k: int = 5, position: int = -1, batch: int = 0) -> list[TokenChange]:
        """Return the k likeliest tokens before and the k likeliest after, by how likely they were before.

        Args:
            k: How many of each.
            position: After which token; the last by default.
            batch: Which row.
        """
        column = self._column(batch, position)
        before, after = (self._probabilities(x[batch, column]) for x in (self.baseline, self.logits))
        k = min(k, len(before))
        ids = {*before.topk(k).indices.tolist(), *after.topk(k).indices.tolist()}
        changes = [TokenChange(i, self._text(i), float(before[i]), float(after[i])) for i in sorted(ids)]
        return sorted(changes, key=lambda change: -change.before)

    def probability_change(self, token: int | str, position: int = -1, batch: int = 0) -> TokenChange:
        """Return one token's probability before and after; a text must be one token."""
        i, column = self._id(token), self._column(batch, position)
        before, after = (self._probabilities(x[batch, column])[i] for x in (self.baseline, self.logits))
        return TokenChange(i, self._text(i), float(before), float(after))

    def kl(self, position: int = -1) -> Tensor:
        """Return the Kullback-Leibler divergence of the edited from the unedited prediction, (batch,), in nats."""
        columns = [self._column(row, position) for row in range(len(self.logits))]
        at = [x[range(len(columns)), columns].detach().double() for x in (self.baseline, self.logits)]
        before, after = (F.log_softmax(x, dim=-1) for x in at)
        return (before.exp() * (before - after)).sum(-1)

    def changed_features(self, k: int = 10) -> list[tuple[int, int, int, int, float, float]]:
        """Return the features that changed most: (group, batch, position, latent, before, after), k at most."""
        if self.before is None or self.after is None:
            return []
        found = []
        for g in range(len(self.before.groups)):
            before, after = self.before.dense(g), self.after.dense(g)
            change = (after - before).abs()
            values, flat = change.flatten().topk(min(k, change.numel()))
            for value, i in zip(values.tolist(), flat.tolist(), strict=True):
                if value > 0:
                    b, p, f = (int(each) for each in torch.unravel_index(torch.tensor(i), change.shape))
                    found.append((g, b, p, f, float(before[b, p, f]), float(after[b, p, f])))
        return sorted(found, key=lambda entry: -abs(entry[5] - entry[4]))[:k]

    def plot(self, k: int = 8, position: int = -1, batch: int = 0) -> Any:
        """Plot the probabilities of the top tokens before and after; returns matplotlib's figure."""
        from clt_plugin.report.tokens import plot_token_changes

        return plot_token_changes(self.top_tokens(k, position, batch), title=f"{self._done}, {self.mode}")

    def __str__(self) -> str:
        rows = len(self.logits)
        row = f"row 0 of {rows}, " if rows > 1 else ""
        lines = [
            self._done,
            f"mode {self.mode}, {row}KL {float(self.kl()[0].detach()):.4f} nats at the last token",
        ]
        changes = self.top_tokens()
        width = max(len(repr(change.text)) for change in changes)
        lines += [
            f"  {c.text!r:<{width}}  {c.before:.4f} -> {c.after:.4f}  ({c.after - c.before:+.4f})" for c in changes
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Intervention {self._done}, mode={self.mode!r}, logits {tuple(self.logits.shape)}>"

    @property
    def _done(self) -> str:
        return "no edit" if self.edits is None else repr(self.edits)

    def _column(self, row: int, position: int) -> int:
        """Return where in a row of logits a position is: padding, on either side, does not count."""
        kept = torch.ones(self.logits.shape[1]) if self.mask is None else self.mask[row]
        real = kept.nonzero().flatten().tolist()
        if not -len(real) <= position < len(real):
            raise EditError(f"row {row} has {len(real)} tokens: there is no position {position}")
        return real[position]

    def _probabilities(self, logits: Tensor) -> Tensor:
        return logits.detach().float().softmax(-1)

    def _text(self, i: int) -> str:
        return str(i) if self.tokenizer is None else self.tokenizer.decode([i])

    def _id(self, token: int | str) -> int:
        if isinstance(token, int):
            if not 0 <= token < self.logits.shape[-1]:
                raise ValueError(f"there is no token {token}: the vocabulary has 0 to {self.logits.shape[-1] - 1}")
            return token
        if self.tokenizer is None:
            raise ValueError("there is no tokenizer: give the token's id")
        ids = self.tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(
                f"{token!r} is {len(ids)} tokens: give one token, such as {self.tokenizer.decode(ids[:1])!r}"
            )
        return ids[0]
