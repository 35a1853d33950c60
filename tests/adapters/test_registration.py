"""``import clt_plugin`` imports neither library, and gives both their ``add_clt`` whichever comes first."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from support.crosscoders import make_clt
from support.models import bridge_model, make_model, make_tokenizer, nnsight_model
from support.reference import reference_run

FRAMEWORKS = ("nnsight", "transformer_lens", "transformers")

IMPORTS = """
import sys
{first}
import clt_plugin
found = [name for name in {frameworks} if name in sys.modules]
sys.exit(f"clt_plugin imports {{', '.join(found)}}" if found else 0)
"""

METHODS = """
import importlib
for name in {order}:
    importlib.import_module(name)
classes = dict(
    nnsight=("nnsight.NNsight", "nnsight.LanguageModel", "nnsight.modeling.transformers.TransformersModel"),
    transformer_lens=("transformer_lens.model_bridge.TransformerBridge",),
)
for library in {order}:
    for path in classes.get(library, ()):
        module, _, name = path.rpartition(".")
        method = getattr(importlib.import_module(module), name).add_clt
        assert method.__module__ == "clt_plugin.adapters"
"""


def run(program: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)


def test_importing_the_package_imports_no_framework():
    result = run(IMPORTS.format(first="", frameworks=FRAMEWORKS))
    assert result.returncode == 0, result.stderr


def test_the_import_check_can_fail():
    result = run(IMPORTS.format(first="import transformers", frameworks=FRAMEWORKS))
    assert result.returncode == 1
    assert "clt_plugin imports transformers" in result.stderr


@pytest.mark.parametrize(
    "order",
    [
        ("nnsight", "clt_plugin", "transformer_lens"),
        ("transformer_lens", "clt_plugin", "nnsight"),
    ],
    ids=" ".join,
)
def test_models_have_the_method_whatever_is_imported_first(order):
    result = run(METHODS.format(order=order))
    assert result.returncode == 0, result.stderr


def test_the_method_check_can_fail():
    result = run(METHODS.format(order=("nnsight",)))
    assert result.returncode == 1
    assert "has no attribute 'add_clt'" in result.stderr


def test_parts_of_a_model_have_no_method():
    model = nnsight_model("gpt2")
    assert hasattr(model, "add_clt")
    # On Envoy, of which both are, every one of these would have it too.
    for part in (model.transformer, model.transformer.h[0], model.transformer.h[0].mlp, model.lm_head):
        assert not hasattr(part, "add_clt")
    bridge = bridge_model("gpt2")
    assert hasattr(bridge, "add_clt")
    assert not hasattr(bridge.blocks[0], "add_clt")


@pytest.mark.filterwarnings("ignore:LanguageModel is deprecated")
@pytest.mark.parametrize("cls", ["NNsight", "LanguageModel"])
def test_nnsights_other_classes(cls):
    import nnsight

    ids, clt = torch.tensor([[0, 5, 17, 33]]), make_clt()
    settings = {"tokenizer": make_tokenizer()} if cls == "LanguageModel" else {}
    model = getattr(nnsight, cls)(make_model("gpt2"), **settings)
    with model.add_clt(clt), model.trace(ids):
        logits = model.output.logits.save()
    assert_close(logits, reference_run(make_model("gpt2"), ids, clt)["logits"], rtol=1e-5, atol=1e-5)
