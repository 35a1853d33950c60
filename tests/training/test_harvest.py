"""What is harvested against full passes of one text at a time, with hooks of the test's own, at every site."""

from __future__ import annotations

import pytest
import torch

import clt_plugin as cp
from clt_plugin.core.errors import AttachError
from clt_plugin.core.wiring import MODEL, SITE_NAMES, Site
from clt_plugin.training.data import DataError, harvest
from support import reference
from support.models import D_MODEL, N_LAYERS, VOCABULARY, bridge_model, make_model, make_tokenizer, nnsight_model

TEXTS = ["w5 w9 w12 w7 w3 w22", "w14", "w8 w8 w31 w40 w2", "w17 w3", "w33 w6 w6 w29 w11 w50 w44 w13"]
FAMILIES = ("gpt2", "llama", "olmo2", "gemma2", "gemma3_multimodal", "gpt_neox", "gpt_neox_sequential")
F64 = torch.float64


def _sites(family, model=MODEL):
    missing = {"gpt_neox": {"resid_mid"}, "olmo2": {"mlp_in_before_gain"}}.get(family, set())
    return [Site(model, name, layer) for layer in range(N_LAYERS) for name in SITE_NAMES if name not in missing]


def _full_pass(hf, ids, sites):
    """{site: (position, d)} of one row, without padding, in a pass to the end."""
    seen, handles = {}, []
    for site in sites:
        module, side = reference._place(hf, reference.blocks_of(hf)[site.layer], site.name)

        def see(module, args, kwargs, output, site=site, side=side):
            value = reference._first(output) if side == "output" else (*args, *kwargs.values())[0]
            seen[site] = (reference._normalised(hf, value) if site.name == "mlp_in_before_gain" else value)[0]

        handles.append(module.register_forward_hook(see, with_kwargs=True))
    with torch.no_grad():
        hf(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))
    for handle in handles:
        handle.remove()
    return seen


def _expected(hf, sites, skip=1):
    rows = [_full_pass(hf, make_tokenizer()(text)["input_ids"], sites) for text in TEXTS]
    return {site: torch.cat([row[site][skip:] for row in rows]) for site in sites}


def _all(chunks):
    chunks = list(chunks)
    first = chunks[0].activations
    return {site: torch.cat([chunk.activations[site] for chunk in chunks]) for site in first.sites}, chunks


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_of_every_family_is_as_in_a_full_pass(family):
    hf, sites = make_model(family, F64), _sites(family)
    found, chunks = _all(
        harvest(hf, TEXTS, sites, tokenizer=make_tokenizer(), batch_size=2, pack=False, length=16, dtype=F64)
    )
    for site, value in _expected(hf, sites).items():
        # transformers' RMSNorm computes in float32, whose last place depends on the batch.
        bound = 1e-10 if family.startswith("gpt") and site.name != "mlp_in_before_gain" else 1e-5
        torch.testing.assert_close(
            found[site], value, rtol=bound, atol=bound / 10, msg=lambda m, site=site: f"{site}: {m}"
        )
    assert torch.cat([chunk.ids for chunk in chunks]).tolist() == [
        int(word[1:]) for text in TEXTS for word in text.split()
    ]


@pytest.mark.parametrize("wrap", [nnsight_model, bridge_model, lambda hf: hf])
def test_the_three_kinds_of_model_give_the_same(wrap):
    hf, wiring = make_model("gpt2", F64), cp.Wiring.clt(N_LAYERS)
    expected = _expected(hf, (*wiring.read_sites, *wiring.write_sites))
    model = wrap(make_model("gpt2", F64))
    tokenizer = None if hasattr(model, "tokenizer") else make_tokenizer()
    settings = {"tokenizer": tokenizer, "pack": False, "length": 16, "batch_size": 3, "dtype": F64}
    found, chunks = _all(harvest(model, TEXTS, wiring, **settings))
    for site, value in expected.items():
        torch.testing.assert_close(found[site], value, rtol=1e-10, atol=1e-12)
    reads = torch.cat([chunk.activations.stacked(wiring.read_sites) for chunk in chunks], dim=1)
    assert torch.equal(reads, torch.stack([found[site] for site in wiring.read_sites]))
    if model is not hf and tokenizer is None:  # what is attached to a model does not act on its harvest
        model.add_clt(cp.Crosscoder(wiring, D_MODEL, 5))
        again, _ = _all(harvest(model, TEXTS, wiring, **settings))
        assert all(torch.equal(again[site], found[site]) for site in found)


@pytest.mark.parametrize(("name", "layer"), [("resid_pre", 0), ("mlp_in", 1), ("mlp_out", 1), ("resid_post", 2)])
def test_the_pass_stops_at_the_last_site_and_leaves_nothing_behind(name, layer):
    hf, ran = make_model("llama"), []
    before = [dict(module._forward_hooks) | dict(module._forward_pre_hooks) for module in hf.modules()]
    watches = [
        module.register_forward_hook(lambda m, args, output, label=label: ran.append(label))
        for label, module in hf.named_modules()
        if label.endswith(("mlp", "self_attn")) or label == "lm_head"
    ]
    next(iter(harvest(hf, [[4, 5, 6]], [Site(MODEL, "resid_pre", 0), Site(MODEL, name, layer)], length=8)))
    for watch in watches:
        watch.remove()
    parts = [f"model.layers.{n}.{part}" for n in range(N_LAYERS) for part in ("self_attn", "mlp")]
    # An MLP's own hook comes before the one that the harvest adds at its output.
    assert ran == parts[: {"resid_pre": 0, "mlp_in": 3, "mlp_out": 4, "resid_post": 6}[name]]
    assert [dict(m._forward_hooks) | dict(m._forward_pre_hooks) for m in hf.modules()] == before
    ids = torch.tensor([[4, 5, 6]])
    assert torch.equal(hf(ids).logits, make_model("llama")(ids).logits)


def test_two_models_run_on_the_same_tokens():
    base, chat = make_model("gpt2", F64), make_model("llama", F64)
    wiring = cp.Wiring.model_diff(["base", "chat"], layer=1)
    models = {"base": nnsight_model(base), "chat": chat}
    found, _ = _all(harvest(models, TEXTS, wiring, pack=False, length=16, dtype=F64, batch_size=2))
    for hf, site in zip((base, chat), wiring.read_sites, strict=True):
        torch.testing.assert_close(found[site], _expected(hf, [site])[site], rtol=1e-5, atol=1e-6)
    other = make_tokenizer()
    other = type(other)(tokenizer_object=type(other.backend_tokenizer).from_str(
        other.backend_tokenizer.to_str().replace('"w2":2', '"w2":3').replace('"w3":3', '"w3":2')
    ), bos_token="<bos>")  # fmt: skip
    chat.tokenizer = other
    with pytest.raises(DataError, match="base and chat have tokenizers that give the same tokens different ids"):
        harvest(models, TEXTS, wiring, length=16)


def test_chunks_go_on_from_every_cursor_bit_by_bit():
    source = harvest(
        make_model("gemma2"), TEXTS, cp.Wiring.plt(N_LAYERS), tokenizer=make_tokenizer(), length=6, batch_size=2
    )
    chunks = list(source.chunks())
    assert len(chunks) > 2
    for number, chunk in enumerate(chunks):
        again = list(source.chunks(chunk.after))
        assert len(again) == len(chunks) - number - 1
        for one, other in zip(again, chunks[number + 1 :], strict=True):
            assert torch.equal(one.activations.flat, other.activations.flat)
            assert torch.equal(one.ids, other.ids)
            assert one.after == other.after
    # Activations do not depend on whether gradients were asked for, and carry none.
    assert not chunks[0].activations.flat.requires_grad


def test_what_decides_activations_is_in_their_identity():
    def identity(model="gpt2", sites=None, changed=False, **settings):
        hf = make_model(model)
        if changed:
            hf.lm_head.weight.data[3] += 1e-3
        settings = {"length": 16, "tokenizer": make_tokenizer(), **settings}
        return harvest(hf, TEXTS, sites or cp.Wiring.plt(1), **settings).identity()

    assert identity() == identity()
    others = [{"model": "llama"}, {"sites": [Site(MODEL, "mlp_in", 1)]}, {"changed": True}, {"batch_size": 3}]
    others += [{"dtype": torch.bfloat16}, {"length": 8}]
    assert all(identity(**other) != identity() for other in others)


def test_what_cannot_be_harvested_is_refused():
    site, hf = Site(MODEL, "mlp_in", 0), make_model("gpt2")
    broken = make_model("gpt2")
    reference.blocks_of(broken)[1].mlp.c_proj.bias.data[2] = float("inf")
    calls = [
        (DataError, "is in the model 'chat': the models given are 'model'", hf, [Site("chat", "mlp_in", 0)], {}),
        (DataError, "no site mlp_in.3: the model has layers 0-2", hf, [Site(MODEL, "mlp_in", 3)], {}),
        (DataError, "no site is asked for", hf, [], {}),
        (DataError, "sites are Site values", hf, ["mlp_in"], {}),
        (DataError, "rows of at most 64 tokens, not 65", hf, [site], {"length": 65}),
        (DataError, "training mode", make_model("gpt2").train(), [site], {}),
        (DataError, "not in torch.float16", hf, [site], {"dtype": torch.float16}),
        (DataError, f"there is no token 61: model has tokens 0-{VOCABULARY - 1}", hf, [site], {"texts": [[2, 61]]}),
        (DataError, "mlp_out.1 has values that are not finite", broken, cp.Wiring.plt(3), {"texts": [[2, 3]]}),
        (AttachError, "have no site 'resid_mid'", make_model("gpt_neox"), [Site(MODEL, "resid_mid", 0)], {}),
    ]
    for error, message, model, sites, settings in calls:
        texts = settings.pop("texts", [[2, 3, 4]])
        with pytest.raises(error, match=message):
            list(harvest(model, texts, sites, **{"length": 16, **settings}))
