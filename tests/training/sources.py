"""A source whose every value says which token and column it is of, so that nothing can be mistaken for another."""

from __future__ import annotations

import threading

import torch

from clt_plugin.core.wiring import Site
from clt_plugin.training.data import Activations, Chunk, Cursor

SITES = (Site("a", "mlp_in", 0), Site("b", "mlp_out", 2))
WIDTHS = (3, 2)


class Numbers:
    """Tokens 0, 1, 2, ...: token t has id t and, in column c, the value t + c / 8.

    Args:
        n: How many tokens.
        sizes: How many tokens chunks have, in turn.
        fail: The chunk at which the source fails, with `error`.
        gate: Held up where this is not set.
    """

    sites, widths = SITES, WIDTHS

    def __init__(self, n=100, sizes=(7, 4, 1, 9), fail=None, error=None, gate=None, name="numbers"):
        self.n, self.sizes, self.fail, self.error, self.gate, self.name = n, sizes, fail, error, gate, name
        self.made, self.threads = 0, set()
        self.closed = 0

    def identity(self):
        return {"name": self.name, "n": self.n}

    def chunks(self, start=None):
        at, number = (start.offset, start.item) if start else (0, 0)
        try:
            while at < self.n:
                if self.gate is not None:
                    self.gate.wait(10)
                if number == self.fail:
                    raise self.error
                end = min(self.n, at + self.sizes[number % len(self.sizes)])
                ids = torch.arange(at, end)
                flat = ids[:, None] + torch.arange(sum(WIDTHS)) / 8
                self.made += 1
                self.threads.add(threading.current_thread())
                at, number = end, number + 1
                yield Chunk(Activations(flat, SITES, WIDTHS), ids, Cursor(0, number, at))
        finally:
            self.closed += 1
