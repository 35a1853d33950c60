"""Studies of faithfulness on models made by hand and on tiny random ones, beside brute force and planted structure."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from clt_plugin import Wiring, attribute, intervene
from clt_plugin import interventions as iv
from clt_plugin.analysis import faithfulness
from clt_plugin.analysis.faithfulness import _statistics as statistics
from clt_plugin.analysis.faithfulness.versus import _nearest
from clt_plugin.analysis.studies import STUDIES
from clt_plugin.attribution import scores
from support.crosscoders import make_clt
from support.models import D_MODEL, N_LAYERS, make_model, nnsight_model
from support.toys import CONSTANT, Toy, _directions, _empty_clt, boolean_toy, written_twice

PROMPTS = ["w3 w9 w14 w27 w5", "w8 w2 w2 w31"]


@pytest.fixture(scope="module")
def tiny():
    return nnsight_model("gpt2")


def prompts_of(toy: Toy) -> list[torch.Tensor]:
    return list(toy.ids)


def skipping_toy() -> Toy:
    """The Boolean toy with a perfect CLT that looks layer 1's output up in the inputs."""
    toy = boolean_toy()
    clt, directions = _empty_clt((8, 1)), _directions()
    clt.W_enc[0][:, :4], clt.b_enc[0][:4], clt.W_dec[0][:4] = toy.clt.W_enc[0], toy.clt.b_enc[0], toy.clt.W_dec[0]
    there = clt.layout.write_slices[0][clt.wiring.write_sites[1]]
    answer = toy.hf.transformer.h[1].mlp.c_proj.weight[0]
    for latent, token in enumerate(toy.answers.nonzero().flatten().tolist(), start=4):
        signs = torch.tensor([1.0 if token >> bit & 1 else -1.0 for bit in range(4)]).double()
        clt.W_enc[0][:, latent] = signs @ directions[:4] - 3 * directions[CONSTANT]
        clt.W_dec[0][latent, there] = answer
    return Toy(toy.hf, clt, toy.ids, toy.answers)


# ---------------------------------------------------------------- statistics


def test_rank_correlations_are_those_of_pandas():
    random = np.random.default_rng(0)
    one = random.integers(0, 5, 60).astype(float)
    other = one + random.normal(size=60)
    assert statistics.ranks([3, 1, 3, 2]).tolist() == pd.Series([3, 1, 3, 2]).rank().tolist()
    wanted = pd.DataFrame({"a": one, "b": other}).corr(method="spearman").loc["a", "b"]
    assert abs(statistics.spearman(one, other) - wanted) < 1e-12
    assert np.isnan(statistics.spearman([1, 1, 1], [1, 2, 3]))


def test_intervals_hold_what_they_should():
    random = np.random.default_rng(1)
    x = random.normal(size=200)
    centre, low, high = statistics.spearman_interval([(x, x + random.normal(size=200)), (x, -x[::-1])], resamples=200)
    assert low < centre < high
    related, noise = [(x, x + random.normal(size=200))] * 2, [(x, random.normal(size=200))] * 2
    assert statistics.spearman_interval(related, resamples=200)[1] > 0
    _, low, high = statistics.spearman_interval(noise, resamples=200)
    assert low < 0 < high
    assert np.isnan(statistics.spearman_interval([([1, 1, 1], [1, 2, 3])])[0])
    # Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I: 81 of 263, 0 of 20.
    assert_close(statistics.wilson(81, 263), (0.2553, 0.3662), rtol=0, atol=1e-4)
    assert_close(statistics.wilson(0, 20), (0.0, 0.1611), rtol=0, atol=1e-4)
    assert statistics.interval([2.0]) == (2.0, 2.0)


# ---------------------------------------------------------------- hop-skip, L0, contributions


def test_hop_skip_is_the_dense_sum():
    clt = make_clt(dtype=torch.float64)
    x = torch.randn(N_LAYERS, 11, D_MODEL).double()
    acts = clt.encode(x)
    found = faithfulness.hop_skip(clt, x=x).table.set_index(["target", "source"])
    for target in range(N_LAYERS):
        parts = torch.stack(
            [acts[source] @ clt.decoder_view(source)[:, target - source] for source in range(target + 1)]
        )
        whole, centred = parts.sum(0), parts - parts.mean(1, keepdim=True)
        norms, aligned = parts.square().sum((1, 2)), (parts * whole).sum((1, 2))
        varied = (centred * centred.sum(0)).sum((1, 2))
        for source in range(target + 1):
            row = found.loc[(target, source)]
            wanted = [float(each[source] / each.sum()) for each in (norms, aligned, varied)]
            assert_close(row[["norm", "aligned", "variance"]].tolist(), wanted, rtol=1e-9, atol=1e-9)


def test_hop_skip_of_texts_leaves_out_what_does_not_count(tiny):
    clt = make_clt(exclude_first=1)
    found = faithfulness.hop_skip(clt, tiny, PROMPTS)
    run = intervene(tiny, PROMPTS, None, clt=clt, mode="local")
    x = []
    for g in range(N_LAYERS):
        acts = run.before.dense(g)
        x.append(acts[run.mask & (torch.as_tensor(run.ids) != 0)])
    written = [x[source] @ clt.decoder_view(source)[:, 2 - source] for source in range(3)]
    norms = torch.stack([part.double().square().sum() for part in written])
    shares = found.table.query("target == 2")["norm"].tolist()
    assert_close(shares, (norms / norms.sum()).tolist(), rtol=1e-5, atol=1e-6)
    # The L0 profile counts the same features.
    l0 = faithfulness.l0_profile(clt, tiny, PROMPTS, make_clt(Wiring.plt(N_LAYERS), seed=1))
    assert_close(list(l0.l0["clt"].values()), [float((each > 0).sum(1).double().mean()) for each in x])
    assert l0.table.columns.tolist() == ["layer", "clt", "plt"]
    assert l0.plot().axes
    assert found.plot("variance").axes


def test_per_layer_transcoders_skip_nothing():
    plt = make_clt(Wiring.plt(N_LAYERS), dtype=torch.float64)
    found = faithfulness.hop_skip(plt, x=torch.randn(N_LAYERS, 5, D_MODEL).double())
    assert found.fractions() == dict.fromkeys(range(N_LAYERS), 0.0)


def test_contributions_are_the_means_of_graphs(tiny):
    clt = make_clt()
    found = faithfulness.cumulative_contribution(tiny, clt, PROMPTS)
    curves = [
        attribute(tiny, p, clt=clt, max_n_logits=1).cumulative_contribution().table["cumulative"] for p in PROMPTS
    ]
    assert_close(found.table["cumulative"].tolist(), np.mean(curves, axis=0).tolist())
    assert (found.table["low"] <= found.table["cumulative"]).all()
    assert found.plot().axes


# ---------------------------------------------------------------- replacement


def test_a_perfect_dictionary_replaces_without_error():
    toy = boolean_toy()
    prompts = prompts_of(toy)[4:7]
    found = faithfulness.replacement_error(toy.hf, toy.clt, prompts).table
    assert (found["error"] < 1e-20).all()
    toy.clt.W_dec[1].mul_(0.5)
    worse = faithfulness.replacement_error(toy.hf, toy.clt, prompts)
    at = worse.table.set_index(["layer", "replacement", "site"])["error"]
    # Half of what layer 1 writes is a quarter of its square; layer 0 is as it was.
    assert_close(float(at[1, "local", "mlp_out"]), 0.25)
    assert at[0, "global", "resid_post"] < 1e-20 < at[1, "global", "resid_post"]
    assert worse.plot().axes


def test_replacement_errors_are_the_dense_ones(tiny):
    clt = make_clt(exclude_first=1)
    found = faithfulness.replacement_error(tiny, clt, PROMPTS[:1]).table.set_index(["layer", "replacement", "site"])
    hf, seen = make_model("gpt2"), {}
    for layer, block in enumerate(hf.transformer.h):
        block.mlp.register_forward_hook(lambda module, args, out, layer=layer: seen.update({layer: (args[0], out)}))
    ids = torch.tensor(tiny.tokenizer(PROMPTS[0])["input_ids"])[None]
    hf(ids)
    recon = clt(torch.stack([seen[layer][0][0, 1:] for layer in range(N_LAYERS)]))
    for layer in range(N_LAYERS):
        y = seen[layer][1][0, 1:]
        error = float((recon[layer] - y).square().sum() / y.square().sum())
        assert_close(float(found.loc[(layer, "local", "mlp_out"), "error"]), error, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- causal


def test_influence_between_nodes_is_the_dense_inverse(tiny, monkeypatch):
    graph = attribute(tiny, PROMPTS[0], clt=make_clt())
    monkeypatch.setattr(scores, "BLOCK", 9 * len(graph))  # some rows at a time, as of a large graph
    a = graph.adjacency.double().abs()
    a[:, graph.of_kind("bias")] = 0
    a[~graph.of_kind("feature", "target")] = 0
    share = a / a.sum(1, keepdim=True).clamp(min=1e-300)
    dense = torch.linalg.inv(torch.eye(len(graph)).double() - share) - torch.eye(len(graph)).double()
    places = graph.of_kind("feature").nonzero().flatten()[::7].tolist()
    found = faithfulness.influence_of(graph, places)
    assert_close(found, dense[:, places], rtol=1e-9, atol=1e-12)
    weights = torch.tensor(graph.nodes["weight"].to_numpy())
    assert_close(weights @ found, scores.influence(graph)[places], rtol=1e-9, atol=1e-12)


def test_effects_are_those_of_single_interventions(tiny):
    clt = make_clt()
    kl = faithfulness.ablation_against_influence(tiny, clt, PROMPTS, n_features=6)
    on = faithfulness.knock_on(tiny, clt, PROMPTS, n_features=3)
    graph = attribute(tiny, PROMPTS[1], clt=clt)
    of = kl.pairs[kl.pairs["prompt"] == 1]
    assert len(of) == 6
    assert of["influence"].iloc[0] == float(graph.influence()[graph.of_kind("feature")].max())
    for row in of.itertuples():
        group, latent, position = map(int, row.source.split("_"))
        run = intervene(tiny, PROMPTS[1], iv.only(iv.ablate(group, latent), position=position), clt=clt)
        assert_close(row.effect, float(run.kl()[0]), rtol=1e-3, atol=1e-7)
        for pair in on.pairs[(on.pairs["prompt"] == 1) & (on.pairs["source"] == row.source)].itertuples():
            there, other, at = map(int, pair.target.split("_"))
            before, after = (each.dense(there)[0, at, other] for each in (run.before, run.after))
            assert_close(pair.effect, float((after - before).abs() / before), rtol=1e-3, atol=1e-5)
    assert set(on.table["pairs"]) == {"all", "indirect"}
    assert on.plot().axes
    assert kl.plot().axes


# ---------------------------------------------------------------- handoffs, superposition or steps


def test_a_handoff_that_matters_is_told_from_one_that_does_not():
    toy, skipping = boolean_toy(), skipping_toy()
    found = faithfulness.handoffs(toy.hf, prompts_of(toy), toy.clt, skipping.clt)
    row = found.table.iloc[0]
    assert row["model"] > 0.1
    assert abs(row["model"] - row["clt"]) < 1e-9
    assert abs(row["plt"]) < 1e-9  # a replacement that skips the step does not need the handoff
    assert found.plot().axes
    twice = written_twice()
    assert abs(faithfulness.handoffs(twice.hf, prompts_of(twice)).table["model"].iloc[0]) < 1e-9


def test_skipped_steps_are_told_from_superposition():
    toy = skipping_toy()
    steps = faithfulness.superposition_or_steps(toy.hf, toy.clt, prompts_of(toy))
    assert steps.silent() == [1]
    assert steps.table["handoff"].iloc[0] > 0.1
    assert abs(steps.table["cosine"].iloc[0]) < 0.3
    assert steps.plot().axes
    twice = written_twice()
    one = faithfulness.superposition_or_steps(twice.hf, twice.clt, prompts_of(twice))
    assert_close(one.table["cosine"].iloc[0], 1.0)
    assert one.table[["one_direction", "orthogonal"]].iloc[0].tolist() == [1, 0]
    assert abs(one.table["handoff"].iloc[0]) < 1e-9


def test_silencing_all_neurons_is_ablating_what_they_write(tiny):
    found = faithfulness.superposition_or_steps(tiny, make_clt(), PROMPTS[:1], n_neurons=10**6).layers
    hf = make_model("gpt2")
    ids = torch.tensor(tiny.tokenizer(PROMPTS[0])["input_ids"])[None]
    before = hf(ids).logits[0, -1].double().log_softmax(-1)
    hf.transformer.h[1].mlp.c_proj.weight.zero_()
    after = hf(ids).logits[0, -1].double().log_softmax(-1)
    wanted = float((before.exp() * (before - after)).sum())
    assert_close(found[["all_neurons", "top_neurons"]].iloc[1].tolist(), [wanted] * 2, rtol=1e-4, atol=1e-7)


# ---------------------------------------------------------------- two crosscoders, features


def test_features_renamed_are_found_again_and_strangers_are_not(tiny):
    clt, renamed = make_clt(), make_clt()
    order = torch.randperm(renamed.n_latents)
    for g in range(N_LAYERS):
        renamed.W_enc[g].copy_(clt.W_enc[g][:, order])
        renamed.b_enc[g].copy_(clt.b_enc[g][order])
        renamed.W_dec[g].copy_(clt.W_dec[g][order])
    found = faithfulness.clt_against_plt(tiny, clt, renamed, PROMPTS[0], texts=PROMPTS[1:])
    for row in found.matches.itertuples():
        (group, one), (other_group, other) = (map(int, each.split(".")) for each in (row.clt, row.plt))
        assert (group, one) == (other_group, int(order[other]))
    assert (found.matches["similarity"] > 0.9999).all()
    assert found.table.loc["matched", "clt"] == found.table.loc["features", "clt"]
    assert (found.comparison.nodes["where"] == "both").all()
    assert_close(found.table.loc["hops", "clt"], found.table.loc["hops", "plt"], rtol=1e-4, atol=0)
    assert found.plot().axes
    assert found.paths["clt"][0].nodes[0].startswith("E_")
    stranger = make_clt(Wiring.plt(N_LAYERS), seed=5)
    alone = faithfulness.clt_against_plt(tiny, clt, stranger, PROMPTS[0], by="decoder", similarity=0.95)
    assert len(alone.matches) == 0


def test_only_features_that_are_nearest_to_each_other_match():
    alike = torch.tensor([[0.9, 0.8], [0.95, 0.1], [0.2, 0.3]])
    assert _nearest(alike, 0.5) == [(1, 0)]
    assert _nearest(alike[:, :0], 0.5) == []


def test_steering_a_memorised_word_is_setting_its_features(tiny):
    clt = make_clt()
    found = faithfulness.memorised(tiny, clt, PROMPTS[0], PROMPTS[1], n_features=2, strengths=(-1.0,))
    held = found.features["memorised"].tolist()
    assert len(held) == 2
    assert min(held) > 0
    edit = iv.only(iv.set_value(group=found.group, value=[-value for value in held]), position=-1)
    run = intervene(tiny, PROMPTS[1], edit, clt=clt)
    row = found.table[(found.table["text"] == "control") & (found.table["strength"] == -1)].iloc[0]
    assert_close(float(row["kl"]), float(run.kl()[0]), rtol=1e-4, atol=1e-7)
    assert (found.table[found.table["run"] == "unedited"]["kl"].abs() < 1e-9).all()
    assert found.plot().axes


def test_selectivity_counts_where_features_fire():
    toy = boolean_toy()
    acts = toy.clt.encode(torch.stack([toy.hf.transformer.wte.weight] * 2))[0]
    fires = acts[:, 0] > 0
    should, should_not = toy.ids[fires], toy.ids[~fires]
    found = faithfulness.selectivity(toy.hf, toy.clt, {0: 0}, list(should), list(should_not)).table.iloc[0]
    assert (found["hits"], found["n_should"], found["false_alarms"], found["auc"]) == (4, 4, 0, 1.0)
    mixed = faithfulness.selectivity(toy.hf, toy.clt, {0: [0, 1]}, list(toy.ids[:8]), list(toy.ids[8:]))
    table = mixed.table.set_index("feature")
    assert table.loc["0.0", "hits"] == int(fires[:8].sum())
    either = (acts[:, :2] > 0).any(1)
    assert table.loc["any", ["hits", "false_alarms"]].tolist() == [int(either[:8].sum()), int(either[8:].sum())]
    assert mixed.plot().axes


# ---------------------------------------------------------------- the report


def test_the_report_is_one_page_that_fetches_nothing(tiny, tmp_path):
    prompts = [torch.tensor([0, 7, 9, 11]), torch.tensor([0, 5, 5, 8, 2])]
    clt, plt = make_clt(), make_clt(Wiring.plt(N_LAYERS), seed=2)
    report = faithfulness.faithfulness_report(tiny, clt, prompts, plt=plt, n_features=4, n_sources=2)
    parts = {"replacement", "ablation", "knock-on", "hop-skip", "L0", "cumulative contribution"}
    assert set(report.table["part"]) == parts
    page = report.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml;base64,") == len(report.parts()) == page.count("<table")
    assert "default-src 'none'" in page
    assert not re.search(r"<script|https?://(?!www.w3.org)", page)
    assert str(report).startswith("Model: tiny/gpt2")
    assert "&lt;Wiring clt(3)" in page


def test_refusals(tiny):
    clt = make_clt()
    with pytest.raises(ValueError, match="give one as"):
        faithfulness.replacement_error(tiny, clt, PROMPTS[0])
    with pytest.raises(ValueError, match="no prompts"):
        faithfulness.knock_on(tiny, clt, [])
    with pytest.raises(ValueError, match="give model and texts"):
        faithfulness.hop_skip(clt, tiny)
    with pytest.raises(ValueError, match="matched by both"):
        faithfulness.clt_against_plt(tiny, clt, clt, PROMPTS[0], by="name")
    with pytest.raises(ValueError, match="not one"):
        faithfulness.hop_skip(clt, x=torch.randn(N_LAYERS, 3, D_MODEL)).fraction(9)
    with pytest.raises(ValueError, match="no value at position 0"):
        faithfulness.selectivity(tiny, make_clt(exclude_first=1), {0: 0}, PROMPTS, PROMPTS, position=0)


def test_every_study_is_registered():
    names = {"hop-skip", "l0-profile", "cumulative-contribution", "handoffs", "knock-on", "faithfulness-report"}
    assert names | {"boolean-toy", "mitigations", "memorised", "clt-against-plt", "absolute-value"} <= set(STUDIES)
    study = STUDIES["boolean-toy-study"].function(n_seeds=1, steps=1, settings=("PLT",))
    assert len(study.runs) == 1
