"""Time travel, co-activation and the effect of ablation: against plain loops, planted and absent."""

import pytest
import torch

import clt_plugin as cp
from clt_plugin.adapters.huggingface import HostModel
from clt_plugin.analysis import weights
from clt_plugin.analysis.weights import _readers
from clt_plugin.core import WiringError
from support.crosscoders import make_clt
from support.models import D_MODEL, make_model, nnsight_model

SCAN = {"draws": 999, "bar": False}


def texts(n=12, length=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 61, (length,), generator=generator) for _ in range(n)]


# ---------------------------------------------------------------- time travel


@pytest.mark.parametrize("gains", [True, False])
def test_time_travel_equals_dense_logits(gains, tmp_path):
    model, clt = make_model("gpt2", torch.float64), make_clt(dtype=torch.float64)
    clt.save(tmp_path / "clt")
    found = weights.time_travel(cp.load(tmp_path / "clt", lazy=True), model, n_features=24, gains=gains, bar=False)
    head = model.lm_head.weight
    if gains:
        scaled = head * model.transformer.ln_f.weight
        head = scaled - scaled.mean(1, keepdim=True)
    cosines, equal = [], 0
    for g in range(2):
        for i in range(24):
            vectors = clt.W_dec[g][i].view(-1, D_MODEL)
            logits = vectors @ head.T
            logits = logits - logits.mean(1, keepdim=True)
            for j in range(1, 3 - g):
                cosines.append(float(torch.cosine_similarity(logits[0], logits[j], dim=0)))
                equal += int(logits[0].argmax() == logits[j].argmax())
    assert found.cosine[0] == pytest.approx(sum(cosines) / len(cosines), rel=1e-6)
    assert found.same_token == pytest.approx(equal / len(cosines))
    assert found.cosine[1] < found.cosine[0] < found.cosine[2]
    assert len(found.examples) == len(cosines)


def test_writes_that_foretell_are_seen_and_random_ones_not():
    clt = make_clt(n_latents=400)
    for g in range(2):
        view = clt.W_dec[g].view(400, 3 - g, D_MODEL)
        view[:, 1:] = 0.5 * view[:, :1]
    found = weights.time_travel(clt, nnsight_model("llama"), bar=False)
    assert found.cosine[0] == pytest.approx(1, abs=1e-4)
    assert found.same_token == 1
    assert found.same_by_chance < 0.2
    assert found.plot().axes
    random = weights.time_travel(weights.untrained(clt, 400), nnsight_model("llama"), bar=False)
    assert abs(random.cosine[0]) < 0.05
    assert random.same_token < 0.2
    with pytest.raises(WiringError, match="nothing travels"):
        weights.time_travel(make_clt(cp.Wiring.plt(3)), make_model("llama"))


# ---------------------------------------------------------------- validation on text


def scanned(clt, model, kind="head"):
    scan = weights.attention_targeting if kind == "head" else weights.mlp_targeting
    return scan(clt, model, nulls=["isotropic"], **SCAN)


def test_coactivation_equals_a_plain_loop():
    model, clt = make_model("llama"), make_clt(n_latents=60, exclude_first=1)
    found = weights.coactivation(clt, model, texts(), scanned(clt, model, "neuron"), k=10, controls=5, bar=False)
    assert len(found.table) + found.silent == 10
    acts, reads, gates = [], {}, {}
    for layer, block in enumerate(model.model.layers):
        keep = lambda m, args, layer=layer: reads.__setitem__(layer, args[0])  # noqa: E731
        gate = lambda m, args, out, layer=layer: gates.__setitem__(layer, out)  # noqa: E731
        block.mlp.register_forward_pre_hook(keep)
        block.mlp.gate_proj.register_forward_hook(gate)
    levels = []
    for ids in texts():
        model(ids[None])
        acts.append(clt.encode(torch.stack([reads[layer][0, 1:] for layer in range(3)])))
        levels.append(torch.stack([gates[layer][0, 1:] for layer in range(3)]))
    acts, levels = torch.cat(acts, dim=1), torch.cat(levels, dim=1).double()
    assert found.tokens == acts.shape[1]
    signs = {
        (r["group"], r["feature"], r["layer"], r["neuron"]): 1 if r["strength"] > 0 else -1
        for r in scanned(clt, model, "neuron").top(k=200).to_dict("records")
    }

    def effect(g, i, level):
        on = acts[g, :, i] > 0
        return float((level[on].mean() - level[~on].mean()) / level.std(correction=0))

    for row in found.table.to_dict("records"):
        g = int(row["group"])
        level = levels[row["layer"], :, row["neuron"]]
        sign = signs[row["group"], row["feature"], row["layer"], row["neuron"]]
        counts = (acts[g] > 0).sum(0)
        assert row["tokens"] == counts[row["feature"]]
        assert row["effect"] == pytest.approx(sign * effect(g, row["feature"], level), rel=1e-3, abs=1e-5)
        usable = [i for i in range(60) if i != row["feature"] and 10 <= counts[i] <= acts.shape[1] - 10]
        far = sorted(abs(float(counts[i]) / row["tokens"] - 1) for i in usable)
        assert len(far) >= 5
        beside = sorted(usable, key=lambda i: abs(torch.log(counts[i] / row["tokens"])))[:5]
        ties = abs(torch.log(counts[beside[-1]] / row["tokens"]))
        if sum(abs(torch.log(counts[i] / row["tokens"])) <= ties for i in usable) == 5:
            expected = sum(sign * effect(g, i, level) for i in beside) / 5
            assert row["control"] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert found.plot().axes


def planted():
    """Plant features of layer 0 that write to layer 1 along rows of neurons of layer 2, and nothing else much."""
    model, clt = make_model("gpt2"), make_clt(n_latents=80, exclude_first=1)
    rows = _readers.neurons(model, HostModel.of(model)).weights[2]
    for decoder in clt.W_dec:
        decoder.mul_(0.02)
    view = clt.W_dec[0].view(80, 3, D_MODEL)
    # Controls of the same size that point elsewhere.
    view[:, 1] = torch.nn.functional.normalize(torch.randn(80, D_MODEL), dim=1)
    signs = torch.tensor([1.0, -1.0]).repeat(10)[:, None]
    view[:20, 1] = signs * torch.nn.functional.normalize(rows[:20], dim=1)
    return model, clt


def test_ablating_what_points_at_a_neuron_changes_it():
    model, clt = planted()
    found = weights.targeting_effect(clt, model, texts(), scanned(clt, model, "neuron"), k=12, bar=False)
    assert set(found.table["layer"]) == {2}
    assert found.log2_ratio[1] > 1  # more than twice as much, surely
    assert found.table["as_foretold"].mean() > 0.9
    assert (found.table["size"] / found.table["control_size"]).median() == pytest.approx(1, abs=0.2)
    assert found.plot().axes


def test_ablation_equals_two_runs_by_hand():
    model, clt = planted()
    target = scanned(clt, model, "head")
    found = weights.targeting_effect(clt, model, texts(1, 12), target, k=3, places=1, bar=False)
    assert len(found.table)
    ids = texts(1, 12)[0]
    for row in found.table.to_dict("records"):
        seen = []
        hook = model.transformer.h[row["layer"]].attn.c_attn.register_forward_hook(
            lambda m, a, y, seen=seen: seen.append(y)
        )
        acts = cp.intervene(model, ids, None, clt=clt).before
        group = int(row["group"])
        values = acts.dense(group)[0, :, row["feature"]]
        place = int(values.argmax())
        seen.clear()
        from clt_plugin import interventions as iv

        edit = iv.only(iv.ablate(layer=group, feature=row["feature"]), position=place)
        cp.intervene(model, ids, edit, clt=clt)
        hook.remove()
        before, after = (each[0, place, 8 * row["head"] : 8 * row["head"] + 8] for each in seen)
        assert row["effect"] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3)
        size = sum(clt.W_dec[group][row["feature"]].view(-1, D_MODEL)[: row["layer"] - group]).norm() * values[place]
        assert row["size"] == pytest.approx(float(size), rel=1e-4)


def test_nothing_to_validate_is_said():
    model, clt = make_model("gpt2"), make_clt()
    found = scanned(clt, model)
    for tally in found._tallies.values():
        tally.top = tally.top[:0]
    with pytest.raises(ValueError, match="no vector above a limit"):
        weights.coactivation(clt, model, texts(1), found)
