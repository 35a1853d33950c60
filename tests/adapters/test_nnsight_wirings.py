"""Every wiring in an nnsight model, first positions that are excluded, and selections of layers and features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clt_plugin import AttachError, Crosscoder, Site, Wiring
from support.crosscoders import make_clt
from support.models import N_LAYERS, make_model, nnsight_model
from support.reference import labels_of, reference_run
from support.tracing import MODES, Fingerprint, assert_close, assert_points, inner, left_padded, read_points, token_ids

PROMPTS = ("w2 w3 w4 w5 w6", "w7 w8", "w9 w10 w11")

# ---------------------------------------------------------------- wirings

ATTENTION = [("attn_out", layer) for layer in range(N_LAYERS)]
WIRINGS = {
    "sae on the residual stream": Wiring.sae(("resid_post", 1)),
    "sae on an MLP's output": Wiring.sae(("mlp_out", 1)),
    "sae on attention's output": Wiring.sae(("attn_out", 2)),
    "acausal": Wiring.acausal(range(N_LAYERS)),
    "acausal over kinds of sites": Wiring.acausal([("resid_pre", 0), ("mlp_in", 1), ("mlp_out", 1), ("resid_post", 2)]),
    "weakly causal": Wiring.weakly_causal(range(N_LAYERS)),
    "weakly causal within a block": Wiring.weakly_causal([("attn_out", 1), ("mlp_in", 1), ("mlp_out", 1)]),
    "both sides of an MLP": Wiring.pre_post_mlp(1, "both"),
    "both sides of an MLP from one": Wiring.pre_post_mlp(1),
    "strictly causal": Wiring.strictly_causal(N_LAYERS),
    "a sum": Wiring.strictly_causal(N_LAYERS) + Wiring.weakly_causal(ATTENTION),
}


def recorded(hf: torch.nn.Module, clt: Crosscoder, ids: Tensor) -> dict:
    """What a plain run holds at every site that is read."""
    sites = Wiring.acausal(clt.wiring.read_sites)
    together = Crosscoder(sites, clt.d_model, 1)
    run = reference_run(hf, ids, together, "observe")
    (values,) = run["enc_in"].values()
    return dict(zip(clt.wiring.read_sites, values.split(clt.d_model, dim=-1), strict=True))


@pytest.mark.parametrize("name", WIRINGS)
def test_any_wiring_observes(name: str) -> None:
    family = "gpt2" if "stream" in name or name.endswith("causal") else "gemma2"
    clt, model, hf, ids = (
        make_clt(WIRINGS[name]),
        nnsight_model(family),
        make_model(family),
        token_ids(),
    )
    expected = clt.encode(recorded(hf, clt, ids))
    model.add_clt(clt, "observe")
    labels = labels_of(clt)
    with model.trace(ids) as tracer:
        cache = tracer.cache(modules=[model.clt.layers[label].features for label in labels])
        logits = model.output.logits.save()
    for group, label in enumerate(labels):
        assert_close(cache[f"model.clt.layers.{label}.features"].output, expected[group], str(label))
    assert torch.equal(logits, model._module(ids).logits)


def test_what_cannot_replace_is_refused_in_the_other_modes() -> None:
    model = nnsight_model("gpt2")
    before = Fingerprint(model)
    for name in ("sae on the residual stream", "acausal", "weakly causal", "both sides of an MLP"):
        for mode in ("replace", "replace_with_error"):
            with pytest.raises(AttachError, match="only be attached with mode='observe'"):
                model.add_clt(make_clt(WIRINGS[name]), mode)
    before.assert_unchanged()


@pytest.mark.parametrize("read", ["resid_post", "mlp_out", "mlp_in"])
@pytest.mark.parametrize("mode", ["replace", "replace_with_error"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_strictly_causal_replaces(family: str, mode: str, read: str) -> None:
    clt, model, ids = make_clt(Wiring.strictly_causal(N_LAYERS, read=read)), nnsight_model(family), token_ids()
    edit = lambda layer, acts: acts * 2 if layer == 1 else acts  # noqa: E731
    expected = reference_run(make_model(family), ids, clt, mode, edit=edit)
    model.add_clt(clt, mode)
    with model.trace(ids):
        first = model.clt.layers[0].features.output.save()
        if read == "mlp_in":
            model.clt.layers[1].features.output *= 2
            recon = model.clt.layers[1].recon.output.save()
        else:
            recon = model.clt.layers[1].recon.output.save()
            model.clt.layers[1].features.output *= 2
        last = model.clt.layers[2].recon.output.save()
        logits = model.output.logits.save()
    assert_close(first, expected["features"][0])
    assert_close(recon, expected["recon"][1])
    assert_close(last, expected["recon"][2])
    assert_close(logits, expected["logits"])


def test_two_groups_at_home_in_one_layer() -> None:
    wiring = Wiring.clt(N_LAYERS) + Wiring.plt(N_LAYERS, read="attn_out")
    clt, model, ids = make_clt(wiring), nnsight_model("gpt2"), token_ids()
    edit = lambda label, acts: acts * 2 if label == "1_1" else acts  # noqa: E731
    expected = reference_run(make_model("gpt2"), ids, clt, edit=edit)
    model.add_clt(clt)
    with model.trace(ids):
        first = model.clt.layers[1].features.output.save()
        model.clt.layers["1_1"].features.output *= 2
        recon = model.clt.layers[1].recon.output.save()
        logits = model.output.logits.save()
    assert_close(first, expected["features"][1])
    assert_close(recon, expected["recon"][1])
    assert_close(logits, expected["logits"])


@pytest.mark.parametrize("skipped", [0, 1])
def test_a_group_that_misses_one_of_its_reads_is_silent(skipped: int) -> None:
    reads = [Site("model", "mlp_in", layer) for layer in (0, 1)]
    writes = [Site("model", "mlp_out", layer) for layer in (1, 2)]
    clt = make_clt(Wiring((tuple(reads),), (tuple(writes),)))
    model, ids, hf = nnsight_model("gpt2"), token_ids(), make_model("gpt2")
    inner(hf, skipped).forward = lambda x, *args, **kwargs: x
    expected = reference_run(hf, ids, clt)
    assert expected["features"] == {}
    model.add_clt(clt)
    with model.trace(ids):
        model.transformer.h[skipped].skip(model.transformer.h[skipped].input)
        recon = model.clt.layers[2].recon.output.save()
        logits = model.output.logits.save()
    assert_close(recon, clt.bias(writes[1]).expand_as(recon))
    assert_close(logits, expected["logits"])


def test_observing_decodes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = nnsight_model("gpt2"), token_ids()
    monkeypatch.setattr(Crosscoder, "decode_group", lambda *_: pytest.fail("decoded for nothing"))
    model.add_clt(make_clt(), "observe")
    with model.trace(ids):
        acts = model.clt.layers[1].features.output.save()
    assert acts.any()


def test_groups_of_different_sizes() -> None:
    clt = Crosscoder(Wiring.clt(N_LAYERS), 16, (5, 9, 13)).requires_grad_(False)
    model, ids = nnsight_model("gpt2"), token_ids()
    expected = reference_run(make_model("gpt2"), ids, clt)
    model.add_clt(clt)
    with model.trace(ids):
        seen = read_points(model.clt, "replace").save()
    assert_points(seen, expected)


# ---------------------------------------------------------------- first positions


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_excluded_positions_under_left_padding(family: str, mode: str) -> None:
    clt, model, hf = make_clt(exclude_first=1), nnsight_model(family), make_model(family)
    inputs = left_padded(PROMPTS)
    expected = reference_run(hf, clt=clt, mode=mode, **inputs)
    model.add_clt(clt, mode)
    with model.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            first = read_points(model.clt, mode).save()
        with tracer.invoke(list(PROMPTS[1:])):
            others = read_points(model.clt, mode).save()
        with tracer.invoke():
            outputs = model.get("transformer.h.0.mlp" if family == "gpt2" else "model.layers.0.mlp").output.save()
            logits = model.output.logits.save()
    assert_points(first, expected, slice(0, 1))
    assert_points(others, expected, slice(1, 3))
    assert_close(logits, expected["logits"])
    for row, position in enumerate(inputs["attention_mask"].argmax(-1).tolist()):
        acts = torch.cat((first["features"][0], others["features"][0]))
        assert not acts[row, position].any()
        assert acts[row, position + 1].any()
        if family == "gpt2":
            true = reference_run(hf, clt=clt, mode="replace", **inputs)["true"][0]
            assert_close(outputs[row, position], true[row, position])


@pytest.mark.parametrize("mode", ["replace", "replace_with_error"])
def test_excluded_positions_in_the_rows_of_one_invoke(mode: str) -> None:
    clt, model, hf = make_clt(exclude_first=2), nnsight_model("gemma2"), make_model("gemma2")
    inputs = left_padded(PROMPTS)
    expected = reference_run(hf, clt=clt, mode=mode, **inputs)
    plain = reference_run(hf, clt=clt, mode="observe", **inputs)
    with model.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            logits = model.output.logits.save()
        with tracer.invoke(list(PROMPTS[1:])):
            model.add_clt(clt, mode)
            acts = model.clt.layers[1].features.output.save()
            other_logits = model.output.logits.save()
    assert_close(acts, expected["features"][1][1:])
    assert_close(logits, plain["logits"][:1])
    assert_close(other_logits, expected["logits"][1:])


def test_excluded_positions_without_a_mask() -> None:
    from nnsight import NNsight

    clt, ids = make_clt(exclude_first=3), token_ids()
    model = NNsight(make_model("gpt2"))
    expected = reference_run(make_model("gpt2"), ids, clt)
    model.add_clt(clt)
    with model.trace(ids):
        acts = model.clt.layers[1].features.output.save()
        logits = model.output.logits.save()
    assert_close(acts, expected["features"][1])
    assert not acts[:, :3].any()
    assert_close(logits, expected["logits"])


def test_excluded_positions_of_embeddings_given_directly() -> None:
    clt, ids, hf = make_clt(exclude_first=1), token_ids(), make_model("gpt2")
    model = nnsight_model("gpt2")
    expected = reference_run(hf, ids, clt)
    model.add_clt(clt)
    with model.trace(inputs_embeds=hf.transformer.wte(ids)):
        acts = model.clt.layers[1].features.output.save()
        logits = model.output.logits.save()
    assert_close(acts, expected["features"][1])
    assert_close(logits, expected["logits"])


def test_no_position_is_excluded_but_the_first_ones() -> None:
    clt, model, ids = make_clt(exclude_first=100), nnsight_model("gpt2"), token_ids()
    model.add_clt(clt)
    with model.trace(ids):
        logits = model.output.logits.save()
    assert_close(logits, make_model("gpt2")(ids).logits)


# ---------------------------------------------------------------- selections


def doubled(layer: int, latents: list[int]):
    def edit(at: int, acts: Tensor) -> Tensor:
        if at == layer:
            acts[..., latents] = acts[..., latents] * 2 + 1
        return acts

    return edit


@pytest.mark.parametrize("where", ["before", "first line"])
def test_an_edit_in_a_selection_of_layers_acts_as_in_the_whole(where: str) -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    expected = reference_run(make_model("gpt2"), ids, clt, "replace_with_error", edit=doubled(1, [3, 7]))
    if where == "before":
        handle = model.add_clt(clt, "replace_with_error", layers=[1])
        assert list(handle.layers._module) == ["1", "2"], "it writes layer 2 as well"
    with model.trace(ids):
        if where == "first line":
            model.add_clt(clt, "replace_with_error", layers=[1])
        acts = model.clt.layers[1].features.output
        acts[..., [3, 7]] = acts[..., [3, 7]] * 2 + 1
        logits = model.output.logits.save()
        kept = acts.save()
    assert_close(kept, expected["features"][1])
    assert_close(logits, expected["logits"])


def test_an_edit_in_a_selection_of_features_acts_as_in_the_whole() -> None:
    clt, model, ids = make_clt(activation="jumprelu"), nnsight_model("gemma2"), token_ids()
    expected = reference_run(make_model("gemma2"), ids, clt, "replace_with_error", edit=doubled(1, [7]))
    model.add_clt(clt, "replace_with_error", layers=[0, 1], features={1: [7, 3]})
    with model.trace(ids):
        acts = model.clt.layers[1].features.output
        acts[..., 0] = acts[..., 0] * 2 + 1
        kept = acts.save()
        logits = model.output.logits.save()
    assert kept.shape[-1] == 2
    assert_close(kept, expected["features"][1][..., [7, 3]])
    assert_close(logits, expected["logits"])


def test_a_selection_observes_and_does_not_replace() -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    before = Fingerprint(model)
    with pytest.raises(AttachError, match="selection"):
        model.add_clt(clt, layers=[1])
    with pytest.raises(ValueError, match="layer"):
        model.add_clt(clt, "observe", layers=[N_LAYERS])
    before.assert_unchanged()
    model.add_clt(clt, "observe", features={2: [5]})
    with model.trace(ids):
        whole = model.clt.layers[0].features.output.save()
        part = model.clt.layers[2].features.output.save()
    expected = reference_run(make_model("gpt2"), ids, clt, "observe")["features"]
    assert_close(whole, expected[0])
    assert_close(part, expected[2][..., [5]])
