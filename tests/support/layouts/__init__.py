"""Every published layout, written as that tool writes it, with that tool's own formula as the oracle.

A `Layout` writes a folder of small random weights, non-symmetric and of unequal sizes, so that no transposition
passes, and returns the oracle: a function from what is read to what is written that is computed from the file's
tensors in that tool's own orientation. `tests/formats/test_readers.py` runs every layout through the same tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

import clt_plugin as cp

Oracle = Callable[[list[Tensor]], list[Tensor]]
"""From one (tokens, d) a read site to one (tokens, d) a written site, each in the order of the wiring's sites."""


@dataclass(frozen=True)
class Layout:
    """A layout on disk.

    Attributes:
        name: What the test is called.
        format: The name of the format that must recognise it, and no other.
        write: Writes a folder and returns the oracle.
        wiring: What must be found.
        activation: What must be found.
        host: What must be found.
        reference: What to load, relative to the folder written; with ``*`` for a set of folders.
        damageable: A file of weights, relative to the folder, that the damage tests break.
        required: Whether removing that file is an error (else it is a smaller crosscoder).
        optional_keys: Tensors that are not read, or whose absence means something else than damage.
        tolerance: How far from the oracle rounding may lead, relative to the largest value.
    """

    name: str
    format: str
    write: Callable[[Path], Oracle]
    wiring: cp.Wiring
    activation: str
    host: cp.Host
    damageable: str
    reference: str = ""
    required: bool = True
    optional_keys: frozenset[str] = field(default_factory=frozenset)
    tolerance: float = 2e-6

    def __str__(self) -> str:
        return self.name
