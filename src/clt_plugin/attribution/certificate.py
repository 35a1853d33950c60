"""The certificate of a graph: what was checked of it, and how closely it held."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


class CertificateError(ArithmeticError):
    """A graph that does not add up: it is not returned."""


@dataclass(frozen=True)
class Certificate:
    """What `attribute` checked before it returned a graph.

    A row's relative residual is ``|sum_s A[t, s] - value_t| / sum_s |A[t, s]|``, over every source, the bias node and
    features that a node budget left out included; the value is the feature's pre-activation, or the target's value, in
    the recorded run. The bias node is what the biases do, pushed through the frozen map, never the remainder.

    Attributes:
        max_relative_residual: The largest of all rows.
        median_relative_residual: The median.
        checked_residual: The largest once absolute sums below a tenth of the median are counted as that: a row that
            reads next to nothing shows how the model rounds what it read. This one has to stay below the tolerance.
        worst: The id of the node with that.
        column_residual: The largest difference between what the edges say and what a direct run through the model's own
            modules shows, relative to the largest change there: for a few random features alone, and for all sources
            together with random signs, so that an edge from the wrong source does not pass; nan if not asked for.
        columns: The ids of the features that were taken alone.
        reconstruction_residual: The largest difference between what features, biases and skips write and what the
            crosscoder makes of the same run by itself, encoding anew, relative to the latter's largest entry.
        embedding_residual: The largest difference, relative to the largest embedding, between what the bias node writes
            into the first residual stream here and what other tokens at the same positions leave for it: none, unless
            embeddings are off by a factor or lack a part.
        norm_residual: The largest difference between a norm's linear form, with which the run was recorded, and what
            its module puts out, relative to the latter's largest entry. transformers' RMSNorm computes in float32
            whatever it is given.
        run_residual: The largest difference between the recorded run's logits and those of the model as it runs by
            itself, with whatever attention it is set to, relative to the largest logit; and between its logits and
            what the unembedding puts out, where no softcap is configured.
        layer_residuals: For each layer, the largest difference between its frozen attention and what the model's own
            put out, relative to the latter's largest entry; the last entry is the final norm's and the unembedding's.
        tolerances: What each check had to stay below, by its name.
        dtype: In which the edges were computed.
        model_dtype: In which the model ran.
    """

    max_relative_residual: float
    median_relative_residual: float
    checked_residual: float
    worst: str
    column_residual: float
    columns: tuple[str, ...]
    reconstruction_residual: float
    embedding_residual: float
    norm_residual: float
    run_residual: float
    layer_residuals: tuple[float, ...]
    tolerances: Mapping[str, float]
    dtype: str
    model_dtype: str

    @property
    def holds(self) -> bool:
        """Whether every check stayed below its tolerance."""
        return not self.failures()

    def failures(self) -> list[str]:
        """Say what did not hold, and where; nothing of a certificate that holds."""
        last = len(self.layer_residuals) - 1
        checks = [("run", self.run_residual, "the recorded run is not the model's own: logits differ")]
        for layer, residual in enumerate(self.layer_residuals):
            where = "the final norm or the unembedding" if layer == last else f"layer {layer}'s attention"
            checks.append(("layers", residual, f"{where} is not the model's own: it differs"))
        checks += [
            ("norms", self.norm_residual, "a norm's linear form is not its module's: it differs"),
            (
                "embeddings",
                self.embedding_residual,
                "what the token embeddings leave to the bias node depends on the tokens: it differs",
            ),
            (
                "reconstruction",
                self.reconstruction_residual,
                "what features and biases write is not the crosscoder's reconstruction: it differs",
            ),
            (
                "rows",
                self.checked_residual,
                f"the edges into {self.worst} do not add up to its value: of their absolute sum, they are off",
            ),
            ("median row", self.median_relative_residual, "half of all rows do not add up: they are off"),
        ]
        if not math.isnan(self.column_residual):
            alone = f"{', '.join(self.columns)}, or all together, " if self.columns else "all sources together "
            what = f"the edges from {alone}are not what a direct run shows: they differ"
            checks.append(("columns", self.column_residual, what))
        return [
            f"{what} by {residual:.1e} (tolerance {self.tolerances[name]:.0e})"
            for name, residual, what in checks
            if not residual <= self.tolerances[name]
        ]

    def check(self) -> None:
        """Raise `CertificateError`, with what failed and where, unless it holds."""
        failed = self.failures()
        if failed:
            raise CertificateError(
                f"this graph fails its certificate ({self.model_dtype} model, {self.dtype} edges): " + "; ".join(failed)
            )

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, for JSON: nan becomes None."""
        data = asdict(self)
        if math.isnan(self.column_residual):
            data["column_residual"] = None
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Certificate:
        """Rebuild it from `to_dict`'s data."""
        column = data["column_residual"]
        return cls(
            **{
                **data,
                "column_residual": math.nan if column is None else column,
                "columns": tuple(data["columns"]),
                "layer_residuals": tuple(data["layer_residuals"]),
                "tolerances": dict(data["tolerances"]),
            }
        )

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "FAILS"
        others = {
            "columns": self.column_residual,
            "reconstruction": self.reconstruction_residual,
            "layers": max(self.layer_residuals),
            "norms": self.norm_residual,
            "embeddings": self.embedding_residual,
            "run": self.run_residual,
        }
        shown = ", ".join(f"{name} {value:.1e}" for name, value in others.items() if not math.isnan(value))
        return (
            f"certificate {verdict}: rows {self.max_relative_residual:.1e} at most, "
            f"{self.median_relative_residual:.1e} median; {shown}"
        )
