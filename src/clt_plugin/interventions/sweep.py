"""What `steer_sweep` returns: the text at every strength, as a table and as a plot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Sweep:
    """Features steered at several strengths.

    Attributes:
        what: The features.
        kind: ``"by"``: strengths are factors; ``"value"``: values.
        mode: As for `generate`.
        prompt: What was continued.
        strengths: The strengths.
        texts: The text generated at each.
        kl: At each, how far the prediction right after the prompt is from the unedited one: the Kullback-Leibler
            divergence of the edited from the unedited, in nats.
        probabilities: For each token watched, its probability right after the prompt at each strength.
        unedited_text: The text generated without edits.
        unedited_probabilities: For each token watched, its probability without edits.
        seed: Where sampling started; None without sampling.
    """

    what: str
    kind: str
    mode: str
    prompt: str
    strengths: tuple[float, ...]
    texts: tuple[str, ...]
    kl: tuple[float, ...]
    probabilities: dict[str, tuple[float, ...]]
    unedited_text: str
    unedited_probabilities: dict[str, float]
    seed: int | None = None

    def to_pandas(self) -> Any:
        """Return a table of one row a strength: the strength, KL, the probabilities as ``p(token)``, the text."""
        import pandas as pd

        chances = {f"p({token})": list(values) for token, values in self.probabilities.items()}
        return pd.DataFrame({self.kind: self.strengths, "kl": self.kl, **chances, "text": self.texts})

    def plot(self) -> Any:
        """Plot probabilities and KL over strengths; returns matplotlib's figure."""
        from clt_plugin.report.steering import plot_sweep

        return plot_sweep(
            self.strengths,
            self.probabilities,
            self.unedited_probabilities,
            self.kl,
            title=f"{self.what} steered, mode {self.mode}",
            label="factor" if self.kind == "by" else "value",
        )

    def __str__(self) -> str:
        rows = [[self.kind, "KL", *(repr(token) for token in self.probabilities), "text"]]
        unedited = [f"{p:.4f}" for p in self.unedited_probabilities.values()]
        rows.append(["unedited", "", *unedited, repr(self.unedited_text)])
        for i, (strength, kl, text) in enumerate(zip(self.strengths, self.kl, self.texts, strict=True)):
            chances = [f"{values[i]:.4f}" for values in self.probabilities.values()]
            rows.append([f"{strength:g}", f"{kl:.4f}", *chances, repr(text)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
        lines = [f"steer({self.what}), mode {self.mode}", repr(self.prompt)]
        for *cells, text in rows:
            lines.append("  ".join(["", *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)), text]))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Sweep of {self.what} over {len(self.strengths)} strengths, mode={self.mode!r}>"
