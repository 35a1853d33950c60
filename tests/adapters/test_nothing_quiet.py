"""What would be quietly wrong: made right, or said, alike in both libraries."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.testing import assert_close

from clt_plugin import AttachError
from support.crosscoders import make_clt
from support.models import bridge_model, nnsight_model
from support.tracing import token_ids

IDS = token_ids()


def edited_nnsight(clt, mode, point, edit):
    """Return the first layer's MLP output and the logits after an edit of a point of layer 0."""
    model = nnsight_model("gpt2")
    with model.add_clt(clt, mode=mode), torch.no_grad():
        with model.trace(IDS):
            place = getattr(model.clt.layers[0], point)
            place.output = edit(place.output)
            mlp = model.transformer.h[0].mlp.output.save()
            logits = model.output.logits.save()
    return mlp, logits


def edited_bridge(clt, mode, point, edit):
    bridge = bridge_model("gpt2")
    hook = {"features": "hook_features", "recon": "hook_recon", "error": "hook_error"}[point]
    kept = {}
    hooks = [
        (f"blocks.0.clt.{hook}", lambda value, hook: edit(value)),
        ("blocks.0.mlp.hook_out", lambda value, hook: kept.update(mlp=value.clone())),
    ]
    with bridge.add_clt(clt, mode=mode), torch.no_grad():
        logits = bridge.run_with_hooks(IDS, fwd_hooks=hooks)
    return kept["mlp"], logits


BOTH = pytest.mark.parametrize("edited", [edited_nnsight, edited_bridge])


@BOTH
@pytest.mark.parametrize("mode", ["replace", "replace_with_error"])
def test_an_edit_at_an_excluded_position_acts_on_the_models_own_output(edited, mode):
    clt = make_clt(exclude_first=1)

    def switch_on(acts):
        acts = acts.clone()
        acts[:, 0, 5] = 2.0
        return acts

    own, _ = edited(clt, mode, "features", lambda acts: acts)
    mlp, _ = edited(clt, mode, "features", switch_on)
    assert_close(mlp[:, 0], own[:, 0] + 2 * clt.decoder_view(0)[5, 0], rtol=1e-5, atol=1e-5)
    assert_close(mlp[:, 1:], own[:, 1:])

    moved, _ = edited(clt, mode, "recon", lambda y: y + 1)
    assert_close(moved, own + 1, rtol=1e-5, atol=1e-5)


@BOTH
@pytest.mark.parametrize(
    ("point", "edit"),
    [
        ("features", lambda value: value[..., :1]),
        ("features", lambda value: value[0]),
        ("recon", lambda value: value[..., :1]),
        ("recon", lambda value: value[:, :1]),
        ("error", lambda value: value[..., :1]),
        ("error", lambda value: 0.0),
    ],
)
def test_an_edit_of_another_shape_is_refused(edited, point, edit):
    with pytest.raises(AttachError, match=f"{point} has shape"):
        edited(make_clt(), "replace_with_error", point, edit)


@pytest.mark.parametrize("host", [nnsight_model, bridge_model])
def test_batchtopk_put_into_training_after_attaching_is_refused(host):
    model, clt = host("gpt2"), make_clt(activation="batchtopk", k=4)
    clt.estimate_threshold(torch.randn(3, 6, 16))

    def run():
        if host is bridge_model:
            model(IDS)
            return
        with model.trace(IDS):
            _ = model.output.logits.save()

    with model.add_clt(clt, mode="observe"):
        run()
        clt.train()
        with pytest.raises(AttachError, match=r"eval\(\)"):
            run()


def gradient(**selection):
    model, clt = nnsight_model("llama"), make_clt(scale=1.0)
    with model.add_clt(clt, mode="replace_with_error", **selection):
        with model.trace(IDS):
            acts = model.clt.layers[0].features.output
            acts.requires_grad_()
            logit = model.output.logits[0, -1, 5]
            with logit.backward():
                grad = acts.grad.save()
    return grad


def test_gradients_through_a_selection_are_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = gradient()
    with pytest.warns(UserWarning, match="lack the paths through what was left out"):
        part = gradient(layers=[0])
    assert float((whole - part).abs().max()) > 0.1 * float(whole.abs().max())
