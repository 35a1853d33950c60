"""The core imports no framework but torch, and this check can fail."""

from __future__ import annotations

import subprocess
import sys

import pytest

FRAMEWORKS = ("nnsight", "transformer_lens", "transformers")

CHECK = """
import sys
{first}
import clt_plugin.core
found = [name for name in {frameworks} if name in sys.modules]
sys.exit(f"clt_plugin.core imports {{', '.join(found)}}" if found else 0)
"""


def check(first: str = "") -> subprocess.CompletedProcess:
    program = CHECK.format(first=first, frameworks=FRAMEWORKS)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


def test_core_imports_no_framework():
    result = check()
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("framework", ["transformers"])
def test_the_check_can_fail(framework):
    result = check(f"import {framework}")
    assert result.returncode == 1
    assert f"clt_plugin.core imports {framework}" in result.stderr
