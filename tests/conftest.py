"""What all tests share: offline, seeded, few threads, and shapes checked at run time."""

from __future__ import annotations

import os
import random
import sys

# Before anything imports huggingface_hub, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import beartype  # noqa: F401 - before nnsight, after whose import it fails
import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# jaxtyping's annotations are checked in tests alone: a check costs milliseconds a call.
if "clt_plugin.core" in sys.modules:
    raise RuntimeError("clt_plugin.core was imported before its shape checks were installed")
install_import_hook("clt_plugin.core", "beartype.beartype")

torch.set_num_threads(1)  # on matrices this small, a second thread mostly waits
settings.register_profile("tidy", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("tidy")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    torch.manual_seed(0)
