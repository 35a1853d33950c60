"""The errors users see. Each says what is wrong, what was expected and what to do next."""

from __future__ import annotations


class WiringError(ValueError):
    """A wiring that cannot be, or a use that its wiring does not allow."""


class FormatError(ValueError):
    """A folder that does not hold what its format promises. Names the file."""


class HubError(OSError):
    """Something that the Hub cannot give: gated, unknown, out of reach, or not in the cache while offline."""


class AttachError(ValueError):
    """A crosscoder that cannot be attached to this model. The model is as it was."""


class RegistryError(KeyError):
    """A name that no one has registered, or one registered twice."""

    def __str__(self) -> str:
        """Return the message itself, where KeyError would show its repr."""
        return str(self.args[0])
