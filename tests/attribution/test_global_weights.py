"""Global weights against brute force: every pair of features, over every token, in float64 and plain loops."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from transformers.utils.logging import warning_once

import clt_plugin as cp
from clt_plugin import Wiring
from clt_plugin.attribution.corpus import _virtual
from clt_plugin.attribution.corpus.global_weights import GlobalWeights, global_weights
from clt_plugin.attribution.graph import GraphError
from clt_plugin.core.errors import AttachError
from clt_plugin.interventions.edits import EditError, supernode
from support.crosscoders import make_clt
from support.models import N_LAYERS, bridge_model, make_model, nnsight_model
from support.reference import blocks_of, is_parallel, reference_run

F64 = torch.float64
CHOSEN = {0: [3, 7], 2: [5], 1: [11]}
MEMBERS = [("0", 3), ("0", 7), ("2", 5), ("1", 11)]
IDS = [[0, 5, 9, 12, 7, 3, 22], [0, 14], [0, 8, 8, 31, 40, 2], [17], [0, 33, 6, 6, 29, 11, 50, 44, 13], [0, 21, 3]]
PRE_NORM = {"gpt2": "ln_2", "gpt_neox": "post_attention_layernorm", "llama": "post_attention_layernorm"}


def corpus_activations(hf, clt, texts=IDS):
    """(tokens, all latents), one text at a time, without padding; positions that the crosscoder excludes left out."""
    rows = []
    for ids in texts:
        features = reference_run(hf, torch.tensor([ids]), clt, "observe")["features"]
        rows.append(torch.cat([features[label][0] for label in features], dim=-1)[clt.host.exclude_first :])
    return torch.cat(rows)


def gain_of(hf, layer, name, v):
    """gain * centre(v), from the family's own way of storing the gain."""
    norm = getattr(blocks_of(hf)[layer], name)
    if "LayerNorm" in type(norm).__name__ and hf.config.model_type in ("gpt2", "gpt_neox", "olmo"):
        v = v - v.mean()
    if not hasattr(norm, "weight"):
        return v
    return v * (norm.weight + 1 if hf.config.model_type.startswith("gemma") else norm.weight)


def virtual_weight(hf, clt, source, target):
    """V of one pair, as (group, latent) each: the sum over what is written before what is read."""
    total, kind = 0.0, hf.config.model_type
    for write, columns in clt.layout.write_slices[source[0]].items():
        for read, rows in clt.layout.read_slices[target[0]].items():
            earlier = write.layer < read.layer
            if write.name == "attn_out" and read.name != "resid_pre" and not is_parallel(hf):
                earlier = write.layer <= read.layer
            if not earlier:
                continue
            v = clt.W_dec[source[0]][source[1], columns]
            if write.name == "mlp_out_before_norm" and kind == "gemma2":
                v = gain_of(hf, write.layer, "post_feedforward_layernorm", v)
            if read.name == "mlp_in" and kind != "olmo2":
                v = gain_of(hf, read.layer, PRE_NORM.get(kind, "pre_feedforward_layernorm"), v)
            if read.name == "mlp_in_before_gain" and kind in ("gpt2", "gpt_neox"):
                v = v - v.mean()
            total += float(v @ clt.W_enc[target[0]][rows, target[1]])
    return total


def brute_force(hf, clt, acts, chosen):
    """{(chosen, other): (V, ERA, TWERA) as target, the same as source}, places in groups of equal size."""
    everyone = [(g, i) for g in range(clt.wiring.n_groups) for i in range(clt.group_sizes[g])]
    found = {}
    for (label, latent), (g, i) in itertools.product(chosen, everyone):
        me, other = (int(label), latent), (g, i)
        pair = []
        for source, target in ((other, me), (me, other)):
            s, t = (acts[:, everyone.index(each)] for each in (source, target))
            V = virtual_weight(hf, clt, source, target)
            twera = float((s * t).mean() / t.mean()) * V if float(t.mean()) else 0.0
            pair.append((V, float(((t > 0) * s).mean()) * V, twera))
        found[(label, latent), other] = tuple(pair)
    return found


def assert_equal(result: GlobalWeights, expected):
    for (me, (g, i)), pair in expected.items():
        place = sum(size for _, size in result.groups[:g]) + i
        for as_, values in zip(("target", "source"), pair, strict=True):
            for by, value in zip(("weight", "era", "twera"), values, strict=True):
                assert float(result.measure(me, as_, by)[place]) == pytest.approx(value, rel=1e-6, abs=1e-7)


# GPT-NeoX: parallel blocks; Gemma: gains stored less 1, post-norms; OLMo 2: nothing before the MLP.
@pytest.mark.parametrize(
    ("family", "read", "write"),
    [
        ("gpt2", "mlp_in", "mlp_out"),
        ("gpt2", "mlp_in_before_gain", "mlp_out"),
        ("gpt_neox", "mlp_in", "mlp_out"),
        ("gemma2", "mlp_in", "mlp_out_before_norm"),
        ("olmo2", "mlp_in", "mlp_out"),
        ("llama", "resid_mid", "mlp_out"),
    ],
)
def test_every_pair(family, read, write):
    hf, clt = make_model(family, F64), make_clt(read=read, write=write, activation="jumprelu", dtype=F64)
    result = global_weights(hf, IDS, CHOSEN, clt=clt, batch_size=4, bar=False)
    acts = corpus_activations(hf, clt)
    assert result.n_tokens == len(acts) == 28
    torch.testing.assert_close(result.active, (acts > 0).sum(0))
    torch.testing.assert_close(result.total, acts.sum(0), rtol=1e-5, atol=1e-6)
    expected = brute_force(hf, clt, acts, MEMBERS)
    assert_equal(result, expected)
    # The comparison is of something: chosen features have sources and targets.
    assert sum(abs(pair[0][2]) > 1e-3 for pair in expected.values()) > 10
    assert sum(abs(pair[1][1]) > 1e-3 for pair in expected.values()) > 10


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_several_reads_and_writes_of_attention_which_reach_their_own_mlp_in_sequential_blocks_alone(family):
    sites = [(name, layer) for layer in range(N_LAYERS) for name in ("attn_out", "mlp_out")]
    hf = make_model(family, F64)
    reads = tuple(tuple(cp.Site("model", name, layer) for name in ("resid_pre", "mlp_in")) for layer in range(N_LAYERS))
    writes = tuple(tuple(cp.Site("model", *site) for site in sites if site[1] >= layer) for layer in range(N_LAYERS))
    clt = make_clt(Wiring(reads, writes), dtype=F64)
    result = global_weights(hf, IDS, CHOSEN, clt=clt, bar=False)
    assert_equal(result, brute_force(hf, clt, corpus_activations(hf, clt), MEMBERS))


def test_a_pair_that_is_never_active_together_has_a_weight_and_nothing_else():
    hf, clt = make_model("llama", F64), make_clt(read="resid_mid", dtype=F64)
    # One feature for token 20, one for all others: what token embeddings say of it, at any scale.
    for group, latent, sign in ((0, 0, 1.0), (2, 0, -1.0)):
        clt.W_enc[group][:, latent] = 0
        clt.W_enc[group][0, latent] = sign
        clt.b_enc[group][latent] = 0
    blocks = blocks_of(hf)
    for block in blocks:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    table = hf.get_input_embeddings().weight
    table[:, 0] = -table[:, 0].abs() - 0.1
    table[20, 0] = 2.0
    clt.W_dec[0][0] = 0
    clt.W_dec[0][0, :16][0] = 50.0
    texts = [[20, 5, 20, 8], [9, 20]]
    result = global_weights(hf, texts, [(0, 0), (2, 0)], clt=clt, bar=False)
    there = 2 * 24
    assert result.frequency((0, 0)) == pytest.approx(0.5)
    assert result.frequency((2, 0)) == pytest.approx(0.5)
    assert float(result.measure((0, 0), "source", "weight")[there]) == pytest.approx(-50.0)
    assert float(result.measure((0, 0), "source", "era")[there]) == 0
    assert float(result.measure((0, 0), "source", "twera")[there]) == 0
    assert float(result.measure((2, 0), "target", "weight")[0]) == pytest.approx(-50.0)
    assert float(result.measure((2, 0), "target", "era")[0]) == 0
    assert (2, 0) not in {(int(g), f) for g, f in result.targets((0, 0))[["group", "feature"]].itertuples(index=False)}
    weights = result.targets((0, 0), by="weight")
    assert (weights["group"][0], weights["feature"][0]) == ("2", 0)


def test_order_and_batches_do_not_matter_and_parts_add_up():
    hf, clt = make_model("gemma3", F64), make_clt(activation="jumprelu", dtype=F64)
    whole = global_weights(hf, iter(IDS), CHOSEN, clt=clt, batch_size=1, bar=False)
    backwards = global_weights(hf, IDS[::-1], CHOSEN, clt=clt, batch_size=4, bar=False)
    parts = [global_weights(hf, part, CHOSEN, clt=clt, batch_size=3, bar=False) for part in (IDS[:2], IDS[2:], [])]
    for other in (backwards, parts[0] + parts[1] + parts[2]):
        assert other.n_tokens == whole.n_tokens
        for name in ("active", "total", "together", "under_chosen", "over_chosen", "into_chosen", "out_of_chosen"):
            torch.testing.assert_close(getattr(other, name), getattr(whole, name), rtol=1e-5, atol=1e-6)
    assert parts[2].n_tokens == 0
    assert float(parts[2].measure((0, 3), "target").abs().max()) == 0
    another = make_clt(activation="jumprelu", dtype=F64, seed=1)
    with pytest.raises(GraphError, match="not two parts of one data set"):
        whole + global_weights(hf, IDS, CHOSEN, clt=another, bar=False)


def test_special_tokens_excluded_positions_and_padding_do_not_count():
    model = nnsight_model("llama")
    texts = ["w5 w9 w12 w7", "", "w14", "w8 w8 w31 w40 w2 w6"]
    ids = [model.tokenizer(text)["input_ids"] for text in texts]
    clt = make_clt(dtype=torch.float32)
    kept = corpus_activations(model._module, clt, ids)
    special = torch.tensor([token in (0, 1) for row in ids for token in row])
    result = global_weights(model, texts, CHOSEN, clt=clt, batch_size=3, bar=False)
    assert result.n_tokens == 11
    torch.testing.assert_close(result.total, kept[~special].sum(0).double(), rtol=1e-4, atol=1e-4)
    with_special = global_weights(model, texts, CHOSEN, clt=clt, skip_special=False, bar=False)
    assert with_special.n_tokens == 14  # an empty text has no token, not even a BOS
    excluding = make_clt(dtype=torch.float32, exclude_first=2)
    result = global_weights(model, texts, CHOSEN, clt=excluding, skip_special=False, bar=False)
    assert result.n_tokens == 14 - 6
    torch.testing.assert_close(
        result.total, corpus_activations(model._module, excluding, ids).sum(0).double(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("make", [nnsight_model, bridge_model])
def test_either_library_and_the_model_stays_as_it_is(make):
    plain, clt = make_model("gemma2"), make_clt()
    model = make(make_model("gemma2"))
    expected = corpus_activations(plain, clt, [[0, 5, 9, 12, 7], [0, 14, 3]])[[1, 2, 3, 4, 6, 7]]  # without BOS
    texts = ["w5 w9 w12 w7", "w14 w3"]
    handle = model.add_clt(clt)  # in place of every MLP, but not in these runs
    attached = global_weights(model, texts, supernode("mine", CHOSEN), bar=False)
    handle.remove()
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model._module.modules())  # noqa: E731
    before = hooks() if make is nnsight_model else 0
    given = global_weights(model, texts, CHOSEN, clt=clt, bar=False)
    for result in (attached, given):
        torch.testing.assert_close(result.total, expected.sum(0).double(), rtol=1e-4, atol=1e-4)
    assert before == (hooks() if make is nnsight_model else 0)


def test_a_multimodal_models_text_runs_without_its_head():
    hf, clt = make_model("gemma3_multimodal", F64), make_clt(dtype=F64)
    head = hf.get_output_embeddings()
    handle = head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    result = global_weights(hf, IDS, CHOSEN, clt=clt, bar=False)
    handle.remove()
    torch.testing.assert_close(result.total, corpus_activations(hf, clt).sum(0), rtol=1e-5, atol=1e-6)


def test_weights_are_read_a_few_rows_at_a_time(tmp_path, monkeypatch):
    hf, clt = make_model("llama"), make_clt()
    in_memory = global_weights(hf, IDS, CHOSEN, clt=clt, bar=False)
    clt.save(tmp_path)
    lazy = cp.load(tmp_path, lazy=True)
    assert lazy.is_lazy
    read, get = [], type(lazy.store).get

    def seen(store, kind, group, rows=None):
        weight = get(store, kind, group, rows)
        if kind == "W_dec":
            read.append(weight.shape[0])
        return weight

    monkeypatch.setattr(type(lazy.store), "get", seen)
    monkeypatch.setattr(_virtual, "ENTRIES", 16 * 3 * 5)
    from_files = global_weights(hf, IDS, CHOSEN, clt=lazy, bar=False)
    assert read
    assert max(read) <= 15  # five rows of three targets, or as many of fewer
    for name in ("total", "together", "into_chosen", "out_of_chosen"):
        torch.testing.assert_close(getattr(from_files, name), getattr(in_memory, name))


def test_tables_and_plots():
    hf, clt = make_model("llama", F64), make_clt(dtype=F64)
    result = global_weights(hf, IDS, CHOSEN, clt=clt, bar=False)
    sources = result.sources((2, 5), k=6)
    assert list(sources.columns) == ["group", "feature", "weight", "era", "twera", "frequency", "mean"]
    assert len(sources) == 6
    strengths = result.measure((2, 5), "target").abs()
    assert sources["twera"].abs().tolist() == sorted(strengths.tolist(), reverse=True)[:6]
    acts = corpus_activations(hf, clt)
    for row in sources.itertuples():
        place = int(row.group) * 24 + row.feature
        assert row.twera == float(result.measure((2, 5), "target")[place])
        assert row.weight == float(result.measure((2, 5), "target", "weight")[place])
        assert row.frequency == pytest.approx(float((acts[:, place] > 0).double().mean()))
        assert row.mean == pytest.approx(float(acts[:, place].mean()), rel=1e-5)
    assert len(result.sources((0, 3))) == 0  # nothing is written before layer 0 reads
    assert set(result.targets((1, 11), by="era")["group"]) == {"2"}
    left, right = result.plot((0, 3), by="era", k=4).axes
    assert left.get_title() == "no sources"
    assert [bar.get_width() for bar in right.patches] == result.targets((0, 3), "era", 4)["era"].tolist()
    only = global_weights(hf, IDS, CHOSEN, clt=clt, as_="targets", bar=False)
    assert len(only.plot().axes) == 1
    assert only.out_of_chosen is None
    assert only.over_chosen is None
    assert "strongest sources of 0.3:\nnone" in str(only)
    assert "strongest targets of 0.3:\ngroup" in str(result)
    with pytest.raises(GraphError, match="as_='both'"):
        only.targets((0, 3))


def test_what_does_not_fit_is_said_before_anything_runs():
    hf, clt = make_model("llama"), make_clt()
    ran = hf.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    for features, error in (
        ({7: [1]}, "no features at layer 7"),
        ([(0, 99)], "features 0 to 23"),
        ([(0, 3), (0, 3)], "given twice"),
        ([3], "pairs"),
    ):
        with pytest.raises(EditError, match=error):
            global_weights(hf, IDS, features, clt=clt, bar=False)
    with pytest.raises(GraphError, match="several"):
        global_weights(hf, "w5", CHOSEN, clt=clt, bar=False)
    with pytest.raises(GraphError, match="as_"):
        global_weights(hf, IDS, CHOSEN, clt=clt, as_="target", bar=False)
    writes_the_stream = make_clt(Wiring.weakly_causal([("resid_post", layer) for layer in range(N_LAYERS)]))
    with pytest.raises(AttachError, match="writes resid_post"):
        global_weights(hf, IDS, CHOSEN, clt=writes_the_stream, bar=False)
    with pytest.raises(AttachError, match="no crosscoder is attached"):
        global_weights(hf, IDS, CHOSEN, bar=False)
    ran.remove()
    with pytest.raises(EditError, match="no tokenizer"):
        global_weights(hf, ["w5"], CHOSEN, clt=clt, bar=False)
    with pytest.raises(EditError, match="shape"):
        global_weights(hf, torch.ones(2, 3, 4), CHOSEN, clt=clt, bar=False)
    for nothing in ([], {}):
        with pytest.raises(GraphError, match="no features were chosen"):
            global_weights(hf, IDS, nothing, clt=clt, bar=False)
    result = global_weights(hf, IDS[:1], CHOSEN, clt=clt, bar=False)
    with pytest.raises(GraphError, match="was not chosen"):
        result.sources((0, 4))


def test_nothing_is_said_of_padding(caplog):
    model = nnsight_model("gpt2")
    model._module.config.pad_token_id = 0  # the BOS token, as in many models: transformers would take it for padding
    warning_once.cache_clear()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING, "transformers"):  # libraries that are loaded may have silenced it
            global_weights(model, ["w5 w9 w3", "w7"], CHOSEN, clt=make_clt(), bar=False)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
