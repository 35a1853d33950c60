"""The certificate of a graph: what was checked of it, and how closely it held."""

from __future__ import annotations

import math
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
        tolerance: What every check had to stay below; `norm_residual`, at least 1e-5.
        column_residual: The largest difference between a few random columns and the changes that a direct run through
            the model's own modules gives, relative to the column's largest entry; nan where there are no columns.
        columns: The ids of those sources.
        reconstruction_residual: The largest difference between what features, biases and skips write and what the
            crosscoder makes of the same run by itself, encoding anew, relative to the latter's largest entry.
        embedding_residual: The largest difference, relative to the largest embedding, between what the bias node writes
            into the first residual stream here and what other tokens at the same positions leave for it: none, unless
            embeddings are off by a factor or lack a part.
        norm_residual: The largest difference between a norm's linear form, with which the run was recorded, and what
            its module puts out, relative to the latter's largest entry. transformers' RMSNorm computes in float32
            whatever it is given.
        layer_residuals: For each layer, the largest difference between its frozen attention and what the model's own
            put out, relative to the latter's largest entry; the last entry is the final norm's and the unembedding's.
        dtype: In which the edges were computed.
        model_dtype: In which the model ran.
    """

    max_relative_residual: float
    median_relative_residual: float
    checked_residual: float
    worst: str
    tolerance: float
    column_residual: float
    columns: tuple[str, ...]
    reconstruction_residual: float
    embedding_residual: float
    norm_residual: float
    layer_residuals: tuple[float, ...]
    dtype: str
    model_dtype: str

    @property
    def holds(self) -> bool:
        """Whether every check stayed below the tolerance."""
        return not self.failures()

    def failures(self) -> list[str]:
        """Say what did not hold, and where; nothing of a certificate that holds."""
        failed = []
        for layer, residual in enumerate(self.layer_residuals):
            if not residual <= self.tolerance:
                last = layer == len(self.layer_residuals) - 1
                where = "the final norm or the unembedding" if last else f"layer {layer}'s attention"
                failed.append(f"{where} is not the model's own: it differs by {residual:.1e}")
        if not self.reconstruction_residual <= self.tolerance:
            failed.append(
                "what features and biases write is not the crosscoder's reconstruction: it differs by "
                f"{self.reconstruction_residual:.1e}"
            )
        if not self.embedding_residual <= self.tolerance:
            failed.append(
                "what the token embeddings leave to the bias node depends on the tokens: it differs by "
                f"{self.embedding_residual:.1e}"
            )
        if not self.norm_residual <= max(self.tolerance, 1e-5):
            failed.append(f"a norm's linear form is not its module's: it differs by {self.norm_residual:.1e}")
        if not self.checked_residual <= self.tolerance:
            failed.append(
                f"the edges into {self.worst} do not add up to its value: they are off by "
                f"{self.checked_residual:.1e} of their absolute sum"
            )
        if self.columns and not self.column_residual <= self.tolerance:
            failed.append(
                f"the edges from {', '.join(self.columns)} are not what a direct run shows: they differ by "
                f"{self.column_residual:.1e}"
            )
        return failed

    def check(self) -> None:
        """Raise `CertificateError`, with what failed and where, unless it holds."""
        failed = self.failures()
        if failed:
            raise CertificateError(
                f"this graph fails its certificate (tolerance {self.tolerance:.0e} for {self.model_dtype}): "
                + "; ".join(failed)
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
            }
        )

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "FAILS"
        columns = "no columns" if not self.columns else f"{len(self.columns)} columns {self.column_residual:.1e}"
        return (
            f"certificate {verdict} (tolerance {self.tolerance:.0e}): rows {self.max_relative_residual:.1e} at most, "
            f"{self.median_relative_residual:.1e} median; {columns}; reconstruction "
            f"{self.reconstruction_residual:.1e}; layers {max(self.layer_residuals):.1e}"
        )
