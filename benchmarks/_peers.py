"""Environments of other tools, each made from its own list of pinned versions in ``peers/``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console

PEERS = Path(__file__).parent / "peers"


def add_environment(parser: argparse.ArgumentParser, peer: str) -> None:
    """Add the option that says where a peer is."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    where = f"where {peer} is, or is installed; by default a folder in the user's cache"
    parser.add_argument("--environment", type=Path, default=cache / "clt_plugin" / "peers" / peer, help=where)


def environment(peer: str, folder: Path, console: Console) -> Path:
    """Return the interpreter of a peer's environment, made if it is missing or of other versions."""
    folder, pins = folder.absolute(), PEERS / f"{peer}.txt"
    python, ready = folder / "bin" / "python", folder / "pins"
    if python.exists() and ready.exists() and ready.read_text() == pins.read_text():
        return python
    console.print(f"Installing {peer} in {folder} ...")
    torch_pin = next(line for line in pins.read_text().splitlines() if line.startswith("torch=="))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch by itself first, as in the Makefile.
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, torch_pin],
        [*pip, "--requirement", str(pins)],
        [str(python), "-m", "pip", "check"],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    ready.write_text(pins.read_text())
    return python
