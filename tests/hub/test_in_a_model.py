"""From the Hub into a model: the sites that a publication speaks of are those that are read and written."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

import clt_plugin  # noqa: F401 - gives models their add_clt
from support.hub_server import HubServer, use
from support.models import D_MODEL, N_LAYERS, bridge_model, make_model, nnsight_model

F = 24
IDS = torch.tensor([[0, 5, 17, 33, 60, 2]])
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
REPO = "google/gemma-scope-2-1b-pt"
FOLDER = "clt/width_262k_l0_medium_affine"


@pytest.fixture(scope="module")
def tensors():
    torch.manual_seed(1)
    layers = []
    for layer in range(N_LAYERS):
        w_dec = torch.randn(F, N_LAYERS, D_MODEL) * 0.3
        w_dec[:, :layer] = 0
        layers.append(
            {
                "w_enc": torch.randn(D_MODEL, F) / D_MODEL**0.5,
                "b_enc": torch.randn(F) * 0.1,
                "threshold": torch.rand(F) * 0.5,
                "w_dec": w_dec,
                "b_dec": torch.randn(D_MODEL) * 0.1,
                "affine_skip_connection": torch.randn(D_MODEL, D_MODEL) * 0.2,
            }
        )
    return layers


@pytest.fixture
def reference(tensors, tmp_path):
    folder = tmp_path / "published" / FOLDER
    folder.mkdir(parents=True)
    for layer, held in enumerate(tensors):
        save_file(held, folder / f"params_layer_{layer}.safetensors")
    config = {
        "hf_hook_point_in": "model.layers.{all}.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.{all}.post_feedforward_layernorm.output",
        "width": F * N_LAYERS,
        "model_name": "google/gemma-3-1b-pt",
        "architecture": "jump_relu",
        "l0": 10,
        "affine_connection": True,
        "type": "clt",
    }
    (folder / "config.json").write_text(json.dumps(config))
    with HubServer() as hub, use(hub, tmp_path / "machine"):
        hub.add(REPO, tmp_path / "published")
        yield f"hf://{REPO}/{FOLDER}"


def by_hand(tensors):
    """Run Gemma 3 with plain hooks and the files' tensors: features, and logits with every MLP's output replaced.

    Position 0 is the BOS token's: no features there, and the model's own output.
    """
    hf, features, reads = make_model("gemma3"), [], []

    def read(module, args, output):
        held = tensors[len(reads)]
        h = output @ held["w_enc"] + held["b_enc"]
        acts = h * (h > held["threshold"])
        acts[:, 0] = 0
        features.append(acts)
        reads.append(output)

    def write(layer):
        def replace(module, args, output):
            y = tensors[layer]["b_dec"] + reads[layer] @ tensors[layer]["affine_skip_connection"]
            for source in range(layer + 1):
                y = y + features[source] @ tensors[source]["w_dec"][:, layer]
            return torch.cat([output[:, :1], y[:, 1:]], dim=1)

        return replace

    handles = []
    for layer, block in enumerate(hf.model.layers):
        handles.append(block.pre_feedforward_layernorm.register_forward_hook(read))
        handles.append(block.post_feedforward_layernorm.register_forward_hook(write(layer)))
    with torch.no_grad():
        logits = hf(IDS).logits
    for handle in handles:
        handle.remove()
    return logits, features


@pytest.mark.filterwarnings("ignore:this crosscoder was trained for")
def test_nnsight(reference, tensors):
    model = nnsight_model("gemma3")
    plain, features = by_hand(tensors)
    handle = model.add_clt(reference, mode="replace")
    with model.trace(IDS):
        found = [model.clt.layers[layer].features.output for layer in range(N_LAYERS)].save()
        logits = model.output.logits.save()
    handle.remove()
    assert_close(logits, plain, **CLOSE)
    for ours, theirs in zip(found, features, strict=True):
        assert_close(ours, theirs, **CLOSE)


@pytest.mark.filterwarnings("ignore:this crosscoder was trained for")
def test_transformer_lens(reference, tensors):
    bridge = bridge_model("gemma3")
    plain, features = by_hand(tensors)
    handle = bridge.add_clt(reference, mode="replace")
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(IDS)
    handle.remove()
    assert_close(logits, plain, **CLOSE)
    for layer, theirs in enumerate(features):
        assert_close(cache[f"blocks.{layer}.clt.hook_features"], theirs, **CLOSE)
