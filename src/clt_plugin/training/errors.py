"""What a training run may refuse."""

from __future__ import annotations


class ConfigError(ValueError):
    """A config that no run can have. Says which setting, and what it may be."""
