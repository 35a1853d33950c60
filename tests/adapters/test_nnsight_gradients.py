"""Gradients through a crosscoder in an nnsight model, against the same gradients in a plain torch model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support.crosscoders import make_clt
from support.models import N_LAYERS, make_model, nnsight_model
from support.reference import reference_run
from support.tracing import assert_close, left_padded, token_ids

LAYERS = range(N_LAYERS)
REPLACING = ["replace", "replace_with_error"]


def loss_of(logits: Tensor) -> Tensor:
    return (logits[:, -1, 5] - logits[:, -1, 7] + logits[:, 2, 3].square()).sum()


def watched(kept: dict[int, Tensor]):
    """An edit that changes nothing, and keeps the features as nodes of the graph."""

    def edit(layer: int, acts: Tensor) -> Tensor:
        kept[layer] = acts if acts.requires_grad else acts.requires_grad_()
        kept[layer].retain_grad()
        return kept[layer]

    return edit


def reference_gradients(hf, ids, clt, mode, point="features", **inputs) -> dict[int, Tensor]:
    kept: dict[int, Tensor] = {}
    run = reference_run(hf, ids, clt, mode, edits={point: watched(kept)}, **inputs)
    loss_of(run["logits"]).backward()
    return {layer: value.grad for layer, value in kept.items()}


@pytest.mark.parametrize("mode", REPLACING)
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox"])
def test_features_of_a_frozen_model(family: str, mode: str) -> None:
    clt, model, ids = make_clt(), nnsight_model(family), token_ids()
    expected = reference_gradients(make_model(family), ids, clt, mode)
    model.add_clt(clt, mode)
    with model.trace(ids):
        acts = {}
        for layer in LAYERS:
            acts[layer] = model.clt.layers[layer].features.output
            acts[layer].requires_grad_()
        loss = loss_of(model.output.logits)
        with loss.backward():
            gradients = {layer: acts[layer].grad for layer in reversed(LAYERS)}.save()
    for layer in LAYERS:
        assert_close(gradients[layer], expected[layer], f"layer {layer}")
        assert gradients[layer].abs().max() > 1e-3


@pytest.mark.parametrize("k", [1, 50])
def test_inactive_features_have_their_gradient_too(k: int) -> None:
    # 1 of 100 is decoded sparsely, 50 of 100 densely: the gradient is the same dense one.
    clt, model, ids = make_clt(activation="topk", k=k, n_latents=100), nnsight_model("gpt2"), token_ids()
    expected = reference_gradients(make_model("gpt2"), ids, clt, "replace_with_error")
    model.add_clt(clt, "replace_with_error")
    with model.trace(ids):
        acts = model.clt.layers[1].features.output.requires_grad_().save()
        loss = loss_of(model.output.logits)
        with loss.backward():
            gradient = acts.grad.save()
    assert_close(gradient, expected[1])
    inactive = acts == 0
    assert inactive.float().mean() >= 0.4
    assert gradient[inactive].abs().max() > 1e-3


@pytest.mark.parametrize("mode", REPLACING)
@pytest.mark.parametrize("point", ["enc_in", "pre_acts", "recon"])
def test_the_other_points_of_a_frozen_model(point: str, mode: str) -> None:
    clt, model, ids = make_clt(activation="jumprelu"), nnsight_model("gpt2"), token_ids()
    expected = reference_gradients(make_model("gpt2"), ids, clt, mode, point)
    model.add_clt(clt, mode)
    with model.trace(ids):
        value = getattr(model.clt.layers[1], point).output.requires_grad_()
        loss = loss_of(model.output.logits)
        with loss.backward():
            gradient = value.grad.save()
    assert_close(gradient, expected[1])
    assert gradient.any()


def test_the_error_is_a_source_of_gradient_but_passes_none_on() -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    expected = reference_gradients(make_model("gpt2"), ids, clt, "replace_with_error", "error")
    model.add_clt(clt, "replace_with_error")
    with model.trace(ids):
        model.clt.layers[0].features.output.requires_grad_()
        error = model.clt.layers[1].error.output
        attached = [error.requires_grad].save()
        error.requires_grad_()
        loss = loss_of(model.output.logits)
        with loss.backward():
            gradient = error.grad.save()
    assert attached == [False], "though it was computed from what depends on the features of layer 0"
    assert_close(gradient, expected[1])


@pytest.mark.parametrize("mode", ["replace", "replace_with_error", "observe"])
def test_embeddings_of_a_frozen_model(mode: str) -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    hf, kept = make_model("gpt2"), {}

    def watch(module: torch.nn.Module, args: tuple, output: Tensor) -> Tensor:
        kept["embedding"] = output.requires_grad_()
        kept["embedding"].retain_grad()
        return output

    hf.transformer.wte.register_forward_hook(watch)
    loss_of(reference_run(hf, ids, clt, mode)["logits"]).backward()
    model.add_clt(clt, mode)
    with model.trace(ids):
        embedding = model.transformer.wte.output.requires_grad_()
        loss = loss_of(model.output.logits)
        with loss.backward():
            gradient = embedding.grad.save()
    assert_close(gradient, kept["embedding"].grad)


def test_a_feature_differentiated_while_observing() -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    hf, kept = make_model("gpt2"), {}
    hf.transformer.wte.register_forward_hook(
        lambda module, args, output: kept.setdefault("embedding", output.requires_grad_())
    )
    acts = reference_run(hf, ids, clt, "observe")["features"][2]
    (expected,) = torch.autograd.grad(acts[:, -1, :5].sum(), kept["embedding"])
    with model.trace(ids):
        model.add_clt(clt, "observe")
        embedding = model.transformer.wte.output.requires_grad_()
        target = model.clt.layers[2].features.output[:, -1, :5].sum()
        with target.backward():
            gradient = embedding.grad.save()
    assert_close(gradient, expected)
    assert gradient.any()


@pytest.mark.parametrize("mode", REPLACING)
@pytest.mark.parametrize(
    "made", [{"activation": "relu"}, {"activation": "jumprelu"}, {"activation": "topk", "k": 1, "n_latents": 100}]
)
def test_a_trainable_model_and_crosscoder(made: dict, mode: str) -> None:
    clt, reference_clt = (make_clt(**made).requires_grad_() for _ in range(2))
    hf, ids = make_model("gpt2").requires_grad_(), token_ids()
    model = nnsight_model(make_model("gpt2").requires_grad_())
    if clt.threshold is not None:  # the reference's steps have no straight-through estimate
        clt.threshold.requires_grad_(False)
    expected = reference_gradients(hf, ids, reference_clt, mode)
    model.add_clt(clt, mode)
    with model.trace(ids):
        acts = {layer: model.clt.layers[layer].features.output for layer in LAYERS}
        loss = loss_of(model.output.logits)
        with loss.backward():
            gradients = {layer: acts[layer].grad for layer in reversed(LAYERS)}.save()
    for layer in LAYERS:
        assert_close(gradients[layer], expected[layer], f"layer {layer}")
    ours, theirs = dict(model._module.named_parameters()), dict(hf.named_parameters())
    ours |= dict(clt.named_parameters(prefix="clt"))
    theirs |= dict(reference_clt.named_parameters(prefix="clt"))
    for name, parameter in theirs.items():
        if parameter.grad is None:
            assert ours[name].grad is None or not ours[name].grad.any(), name
        else:
            assert_close(ours[name].grad, parameter.grad, name, tolerance=1e-4)
    assert ours["clt.W_enc.0"].grad.any()


@pytest.mark.parametrize("mode", REPLACING)
@pytest.mark.parametrize("point", ["enc_in", "pre_acts", "features", "recon"])
def test_an_edit_in_place_of_what_autograd_keeps(point: str, mode: str) -> None:
    # JumpReLU keeps its input for the backward pass, ReLU its output.
    clt = make_clt(activation="relu" if point == "features" else "jumprelu").requires_grad_()
    ids, model = token_ids(), nnsight_model(make_model("gpt2").requires_grad_())

    def change(layer: int, value: Tensor) -> Tensor:
        if layer == 1:
            value[:, -1] *= 2
        return value

    hf = make_model("gpt2").requires_grad_()
    loss_of(reference_run(hf, ids, clt, mode, edits={point: change})["logits"]).backward()
    model.add_clt(clt, mode)
    with model.trace(ids):
        getattr(model.clt.layers[1], point).output[:, -1] *= 2
        loss_of(model.output.logits).backward()
    expected, gradient = hf.transformer.wte.weight.grad, model._module.transformer.wte.weight.grad
    assert_close(gradient, expected, tolerance=1e-4)


def test_an_edited_gradient_flows_on() -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    kept: dict[int, Tensor] = {}

    def edit(layer: int, acts: Tensor) -> Tensor:
        acts = watched(kept)(layer, acts)
        if layer == 2:
            acts.register_hook(lambda gradient: gradient * 0)
        return acts

    loss_of(reference_run(make_model("gpt2"), ids, clt, edit=edit)["logits"]).backward()
    model.add_clt(clt)
    with model.trace(ids):
        first = model.clt.layers[0].features.output.requires_grad_()
        last = model.clt.layers[2].features.output
        loss = loss_of(model.output.logits)
        with loss.backward():
            last.grad = last.grad * 0
            gradient = first.grad.save()
    assert_close(gradient, kept[0].grad)


def test_features_in_the_rows_of_an_invoke() -> None:
    prompts = ("w2 w3 w4", "w5 w6 w7 w8")
    clt, model, inputs = make_clt(), nnsight_model(make_model("gpt2").requires_grad_()), left_padded(prompts)
    kept: dict[int, Tensor] = {}
    hf = make_model("gpt2").requires_grad_()
    run = reference_run(hf, clt=clt, edit=watched(kept), **inputs)
    loss_of(run["logits"][1:]).backward()
    with model.trace() as tracer:
        with tracer.invoke(prompts[0]):
            pass
        with tracer.invoke(prompts[1]):
            model.add_clt(clt)
            acts = model.clt.layers[1].features.output
            loss = loss_of(model.output.logits)
            with loss.backward():
                gradient = acts.grad.save()
    assert_close(gradient, kept[1].grad[1:])


def test_no_gradient_is_kept_where_none_is_asked_for() -> None:
    model, ids = nnsight_model("gpt2"), token_ids()
    model.add_clt(make_clt(), "replace_with_error")
    with model.trace(ids):
        acts = model.clt.layers[1].features.output.save()
        logits = model.output.logits.save()
    assert not acts.requires_grad
    assert not logits.requires_grad
