"""What a crosscoder says of the model it was trained for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from clt_plugin.core.wiring import Site


@dataclass(frozen=True)
class Host:
    """What the model must be that a crosscoder was trained for, and how to run in it.

    Attributes:
        model_name: The model's name on the Hub, or None where it is not known.
        model_revision: Its revision.
        n_layers: How many layers it has; None where it is not known.
        exclude_first: How many first positions (the BOS token's, usually) it was not trained on. There,
            features are 0 and the model's own MLP output is kept.
    """

    model_name: str | None = None
    model_revision: str | None = None
    n_layers: int | None = None
    exclude_first: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the host as plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Sites:
    """Which sites a crosscoder reads and writes.

    Attributes:
        read: Every site read; the first axis of stacked inputs.
        write: Every site written; the first axis of stacked outputs.
    """

    read: tuple[Site, ...]
    write: tuple[Site, ...]

    @property
    def read_name(self) -> str:
        """The name of the sites read, such as ``"resid_mid"``; joined with + where there are several."""
        return "+".join(dict.fromkeys(site.name for site in self.read))

    @property
    def write_name(self) -> str:
        """The name of the sites written, such as ``"mlp_out"``."""
        return "+".join(dict.fromkeys(site.name for site in self.write))
