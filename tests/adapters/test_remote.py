"""A crosscoder sent to a remote model: everything needed travels, and the results are those of the local run.

One process writes requests as nnsight's remote backend would post them; another, in which this project cannot be
imported, runs each against a fresh model. What a server's own rules would allow is not tried.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import clt_plugin
from support.tracing import assert_close

TESTS = Path(__file__).parents[1]
SOURCES = Path(clt_plugin.__file__).parent
CASES = (
    "applied",
    "persistent",
    "edits",
    "persistent_lazy",
    "function",
    "function_of_the_package",
    "selection",
    "one_invoke_of_two",
    "gradient",
    "generation",
    "session",
)


def python(script: str, folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{SOURCES.parent}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "error", str(TESTS / "support" / script), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    python("remote_sender.py", folder)
    python("remote_server.py", folder)
    return folder


def test_every_case_is_sent(folder: Path) -> None:
    assert sorted(path.stem for path in folder.glob("*.request")) == sorted(CASES)


@pytest.mark.parametrize("case", CASES)
def test_results_of_the_remote_run_are_those_of_the_local_one(folder: Path, case: str) -> None:
    failure = folder / f"{case}.failure"
    assert not failure.exists(), failure.read_text()
    expected = torch.load(folder / f"{case}.expected", weights_only=False)
    results = torch.load(folder / f"{case}.results", weights_only=False)
    assert set(expected) <= set(results)
    for name, value in expected.items():
        if isinstance(value, list):
            assert len(results[name]) == len(value)
            for step, (ours, theirs) in enumerate(zip(results[name], value, strict=True)):
                assert_close(ours, theirs, f"{name} {step}")
        else:
            assert_close(results[name], value, name)


def test_neither_the_model_nor_what_a_selection_leaves_out_travels(folder: Path) -> None:
    # The crosscoder of the selection has 4 MB of weights.
    for case in CASES:
        assert (folder / f"{case}.request").stat().st_size < 400_000, case


TRAVELLING = (
    *(SOURCES / "core").glob("*.py"),
    *(SOURCES / "adapters" / f"{name}.py" for name in ("_handle", "_pass", "_run", "huggingface", "nnsight", "sites")),
    *(SOURCES / "interventions" / f"{name}.py" for name in ("_apply", "_edit", "_places", "edits", "hooks", "writes")),
)
DECORATORS = {"property", "classmethod", "staticmethod", "cached_property", "dataclass", "runtime_checkable"}


@pytest.mark.parametrize("path", TRAVELLING, ids=lambda path: path.name)
def test_what_travels_is_written_so_that_it_can(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super":
            assert node.args, f"line {node.lineno}: super() has no class cell to look into once its class has travelled"
        for decorator in getattr(node, "decorator_list", ()):
            name = decorator.func if isinstance(decorator, ast.Call) else decorator
            assert ast.unparse(name) in DECORATORS, (
                f"line {node.lineno}: a decorated function travels without its globals"
            )
