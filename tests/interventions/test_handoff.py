"""Handoff ablation: against plain hooks in float64, on models whose circuits are known, and as a value."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from clt_plugin import Wiring
from clt_plugin import interventions as iv
from clt_plugin.adapters._attention import IMPLEMENTATION
from clt_plugin.core.errors import AttachError
from clt_plugin.core.wiring import MODEL, Site
from clt_plugin.interventions import EditError, ablate_handoff, chain, handoff_scan, only
from clt_plugin.interventions.modes import intervene
from support.crosscoders import make_clt
from support.models import D_MODEL, N_LAYERS, bridge_model, make_model, nnsight_model
from support.toys import boolean_toy, written_twice

FAMILIES = ("gpt2", "llama", "gemma2", "gemma3", "olmo2", "gpt_neox", "gpt_neox_sequential")
# Longer than the sliding windows of 4, the second row padded.
IDS = torch.tensor([[0, 5, 17, 33, 60, 2, 41, 8, 22], [1, 1, 0, 9, 9, 58, 3, 30, 12]])
MASK = (torch.arange(9) >= torch.tensor([[0], [2]])).long()
# With the positions that `intervene` itself would give, for the oracle's runs.
INPUTS = {"input_ids": IDS, "attention_mask": MASK, "position_ids": (MASK.cumsum(-1) - 1).clamp(min=0)}
# Most families' norms and softmax round to float32 whatever their input.
CLOSE = {"rtol": 0, "atol": 2e-6}
EXACT = {"rtol": 0, "atol": 1e-12}

# family: norm before the MLP, MLP, what its output passes last, attention's output, what the norm adds to its weight
_BLOCKS = {
    "gpt2": ("ln_2", "mlp", "mlp", "attn", 0),
    "llama": ("post_attention_layernorm", "mlp", "mlp", "self_attn", 0),
    "gemma2": ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm", "post_attention_layernorm", 1),
    "gemma3": ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm", "post_attention_layernorm", 1),
    "olmo2": (None, "mlp", "post_feedforward_layernorm", "post_attention_layernorm", 0),
    "gpt_neox": ("post_attention_layernorm", "mlp", "mlp", "attention", 0),
    "gpt_neox_sequential": ("post_attention_layernorm", "mlp", "mlp", "attention", 0),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def model_of(family: str) -> nn.Module:
    hf = make_model(family, torch.float64)
    # Eager, but with a mask that keeps padded rows from becoming NaN in float64.
    hf.set_attn_implementation(IMPLEMENTATION)
    return hf


def blocks(hf: nn.Module) -> nn.ModuleList:
    return (
        hf.transformer.h if hasattr(hf, "transformer") else getattr(hf, "model", getattr(hf, "gpt_neox", None)).layers
    )


# ---------------------------------------------------------------- the oracle

Remove = Callable[[int, int, dict[int, Tensor], dict[int, Tensor]], Tensor]


class Seen(dict):
    """What a run held, (name, layer) -> (batch, position, d)."""


def watch(hf: nn.Module, family: str, runs: list[Seen]) -> list:
    """Note attention's output, MLPs' inputs and outputs and the residual stream of every run to come."""
    handles = [hf.register_forward_pre_hook(lambda m, a, k: runs.append(Seen()), with_kwargs=True)]
    _, mlp, mlp_out, attention, _ = _BLOCKS[family]

    def note(name: str, layer: int) -> Callable:
        return lambda m, a, out: runs[-1].__setitem__((name, layer), out[0] if isinstance(out, tuple) else out)

    def note_input(layer: int) -> Callable:
        return lambda m, a: runs[-1].__setitem__(("mlp_in", layer), a[0])

    for layer, block in enumerate(blocks(hf)):
        handles.append(getattr(block, attention).register_forward_hook(note("attn_out", layer)))
        handles.append(getattr(block, mlp).register_forward_pre_hook(note_input(layer)))
        handles.append(getattr(block, mlp_out).register_forward_hook(note("mlp_out", layer)))
        handles.append(block.register_forward_hook(note("resid_post", layer)))
    return handles


def frozen_norm(norm: nn.Module, family: str, plain: Tensor, x: Tensor) -> Tensor:
    """A norm's output at x with the denominators that it has at another input."""
    centred = isinstance(norm, nn.LayerNorm)
    centre = (lambda t: t - t.mean(-1, keepdim=True)) if centred else (lambda t: t)
    eps = next(getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name))
    rstd = (centre(plain).pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    return centre(x) * rstd * (norm.weight + _BLOCKS[family][4]) + getattr(norm, "bias", torch.tensor(0.0))


def encode(clt, layer: int, x: Tensor) -> Tensor:
    return torch.relu(x @ clt.W_enc[layer] + clt.b_enc[layer])


def decode(clt, layer: int, features: dict[int, Tensor]) -> Tensor:
    """A CLT's reconstruction of one layer's MLP output."""
    total = clt.b_dec[layer].clone()
    for source, f in features.items():
        if source <= layer:
            total = total + f @ clt.W_dec[source][:, (layer - source) * D_MODEL : (layer - source + 1) * D_MODEL]
    return total


def oracle(
    family: str,
    pairs: list[tuple[int, int]],
    remove: Remove,
    where: Tensor | None = None,
    norm: str = "live",
    clt=None,
    read: str = "mlp_in",
    replace: bool = False,
) -> tuple[Tensor, Seen]:
    """Run a model with its MLPs given other inputs: hooks on MLPs alone, beside the norms that feed them."""
    where = MASK.bool() if where is None else where & MASK.bool()
    hf, plain_runs, runs, mids = model_of(family), [], [], []
    pre_norm, mlp, mlp_out, _, _ = _BLOCKS[family]
    norms = [copy.deepcopy(getattr(block, pre_norm)) if pre_norm else None for block in blocks(hf)]
    state: dict[str, dict[int, Tensor]] = {}

    def take_mid(layer: int) -> Callable:
        return lambda m, a: state["mid"].__setitem__(layer, a[0])

    def enter(layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple) -> tuple | None:
            if not pre_norm:
                state["mid"][layer] = args[0]
            if not state["ablating"]:
                return None
            x = state["mid"][layer]
            for source, target in pairs:
                if target == layer:
                    removed = remove(source, target, state["wrote"], state["features"])
                    x = x - torch.where(where[..., None], removed, 0.0)
            if not pre_norm:
                value = x
            elif norm == "frozen" and any(target == layer for _, target in pairs):
                value = frozen_norm(norms[layer], family, mids[0][layer], x)
            else:
                value = norms[layer](x)
            if clt is not None:
                seen = {"mlp_in": value, "resid_mid": x, "resid_pre": state.get("pre", {}).get(layer)}[read]
                state["features"][layer] = encode(clt, layer, seen)
            return (value,)

        return hook

    def leave(layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
            new = decode(clt, layer, state["features"]) if replace and state["ablating"] else None
            state["wrote"][layer] = out if new is None else new
            return new

        return hook

    for layer, block in enumerate(blocks(hf)):
        if pre_norm:
            getattr(block, pre_norm).register_forward_pre_hook(take_mid(layer))
        getattr(block, mlp).register_forward_pre_hook(enter(layer))
        getattr(block, mlp_out).register_forward_hook(leave(layer))
    for ablating, into in ((False, plain_runs), (True, runs)):
        state = {"mid": {}, "wrote": {}, "features": {}, "ablating": ablating}
        handles = watch(hf, family, into)
        logits = hf(**INPUTS, use_cache=False).logits
        mids.append(state["mid"])
        for handle in handles:
            handle.remove()
    return logits, runs[0]


def projector(rows: Tensor) -> Tensor:
    return rows.T @ torch.linalg.inv(rows @ rows.T) @ rows


def real(x: Tensor) -> Tensor:
    """Only what stands at tokens, not at padding."""
    return x[MASK.bool()]


# ---------------------------------------------------------------- whole outputs, in the original model

SUBSPACE = torch.randn(3, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
MEAN = torch.randn(D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
MEANS = {0: MEAN, 1: 2 * MEAN.flip(0)}
TRIANGLE = [(0, 1), (0, 2), (1, 2)]

WHOLE = {
    "one pair": (ablate_handoff(0, 1), [(0, 1)], lambda s, t, wrote, f: wrote[s], {}),
    "over a layer": (ablate_handoff(0, 2), [(0, 2)], lambda s, t, wrote, f: wrote[s], {}),
    "all pairs": (ablate_handoff([0, 1], [1, 2]), TRIANGLE, lambda s, t, wrote, f: wrote[s], {}),
    "frozen norm": (ablate_handoff(0, 1, norm="frozen"), [(0, 1)], lambda s, t, wrote, f: wrote[s], {"norm": "frozen"}),
    "frozen norms": (
        ablate_handoff(pairs=TRIANGLE, norm="frozen"),
        TRIANGLE,
        lambda s, t, wrote, f: wrote[s],
        {"norm": "frozen"},
    ),
    "subspace": (
        ablate_handoff(0, 2, subspace=SUBSPACE),
        [(0, 2)],
        lambda s, t, wrote, f: wrote[s] @ projector(SUBSPACE),
        {},
    ),
    "mean": (ablate_handoff(1, 2, baseline="mean", mean=MEAN), [(1, 2)], lambda s, t, wrote, f: wrote[s] - MEAN, {}),
    "means in a subspace": (
        ablate_handoff([0, 1], [1, 2], None, SUBSPACE, "mean", MEANS),
        TRIANGLE,
        lambda s, t, wrote, f: (wrote[s] - MEANS[s]) @ projector(SUBSPACE),
        {},
    ),
    "a position": (
        only(ablate_handoff(0, 1), position=-1),
        [(0, 1)],
        lambda s, t, wrote, f: wrote[s],
        {"where": torch.arange(9) == torch.tensor([[8], [8]])},
    ),
    "positions of a row": (
        only(ablate_handoff(0, 2), position=slice(1, 4), batch=1),
        [(0, 2)],
        lambda s, t, wrote, f: wrote[s],
        {"where": torch.stack((torch.zeros(9, dtype=torch.bool), (torch.arange(9) >= 3) & (torch.arange(9) < 6)))},
    ),
    "a token": (
        only(ablate_handoff(0, 1), tokens=9),
        [(0, 1)],
        lambda s, t, wrote, f: wrote[s],
        {"where": IDS == 9},
    ),
}


@pytest.mark.parametrize("case", WHOLE)
def test_whole_outputs_equal_the_oracle(family, case):
    edit, pairs, remove, settings = WHOLE[case]
    wanted, _ = oracle(family, pairs, remove, **settings)
    result = intervene(model_of(family), INPUTS, edit)
    assert_close(real(result.logits), real(wanted), **CLOSE)
    assert (real(result.logits) - real(result.baseline)).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_norm_is_frozen_only_where_a_handoff_with_a_frozen_norm_acts(family):
    """Two into one layer, each with its own norm; elsewhere the norm follows what changed before it."""
    edit = chain(
        only(ablate_handoff(0, 1), position=slice(0, 2)),
        only(ablate_handoff(0, 2), position=slice(0, 2)),
        only(ablate_handoff(0, 2, norm="frozen"), position=slice(2, 4)),
        only(ablate_handoff(1, 2, norm="frozen"), position=slice(2, 4)),
    )
    hf, runs, mids = model_of(family), [], []
    watch(hf, family, runs)
    norm = getattr(blocks(hf)[2], _BLOCKS[family][0])
    norm.register_forward_pre_hook(lambda m, a: mids.append(a[0]))
    intervene(hf, INPUTS, edit)
    ablated, (plain_mid, mid) = runs[1], mids
    position = MASK.cumsum(-1) - 1
    live = (position < 2) & MASK.bool()
    frozen = (position >= 2) & (position < 4)
    x = mid - (live | frozen)[..., None] * ablated["mlp_out", 0] - frozen[..., None] * ablated["mlp_out", 1]
    norm = copy.deepcopy(norm)
    norm._forward_pre_hooks.clear()
    wanted = torch.where(frozen[..., None], frozen_norm(norm, family, plain_mid, x), norm.forward(x))
    assert_close(real(ablated["mlp_in", 2]), real(wanted), **CLOSE)
    elsewhere = ~(live | frozen) & MASK.bool()
    assert (mid - plain_mid)[elsewhere].abs().max() > 1e-6
    assert (norm.forward(x) - frozen_norm(norm, family, plain_mid, x))[elsewhere].abs().max() > 5e-6


@pytest.mark.parametrize("norm", ["live", "frozen"])
def test_only_the_targets_mlp_reads_less(family, norm):
    hf, runs = model_of(family), []
    watch(hf, family, runs)
    intervene(hf, INPUTS, ablate_handoff(0, 1, norm=norm))
    plain, ablated = runs
    for name, layer in plain:
        if layer < 1 or (layer == 1 and name == "attn_out"):
            assert_close(ablated[name, layer], plain[name, layer], rtol=0, atol=0)
    change = {key: real(ablated[key] - plain[key]) for key in plain}
    assert change["mlp_in", 1].abs().max() > 1e-2
    assert change["mlp_out", 1].abs().max() > 1e-3
    # The stream goes on as it was, but for what that MLP adds to it.
    assert_close(change["resid_post", 1], change["mlp_out", 1], **EXACT)
    assert change["attn_out", 2].abs().max() > 1e-6


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_both_runs_attend_by_the_same_means(family):
    """Whichever means the model has by itself: else the comparison would show them too."""
    hf, runs = make_model(family, torch.float64), []
    watch(hf, family, runs)
    intervene(hf, INPUTS, ablate_handoff(1, 2))
    plain, ablated = runs
    for layer in range(2):
        assert torch.equal(plain["attn_out", layer], ablated["attn_out", layer])
        assert torch.equal(plain["resid_post", layer], ablated["resid_post", layer])


def test_a_hook_of_the_users_sees_what_the_mlp_reads():
    """As in the adapters, the MLP's own input is the ablated one, so that nothing lies about what was read."""
    hf, runs = model_of("llama"), []
    watch(hf, "llama", runs)
    _, wanted = oracle("llama", [(0, 1)], lambda s, t, wrote, f: wrote[s])
    intervene(hf, INPUTS, ablate_handoff(0, 1))
    assert_close(real(runs[1]["mlp_in", 1]), real(wanted["mlp_in", 1]), **CLOSE)


# ---------------------------------------------------------------- features

FEATURES = {0: [3, 7, 11], 1: [0, 5]}
F_MEANS = [0.5, -1.0, 2.0, 0.25, 1.5]


def writes_of(clt, means: dict[int, Tensor] | None = None, chosen: dict[int, list[int]] = FEATURES) -> Remove:
    """The sum over layers from the source to before the target, one feature and one layer at a time."""

    def remove(source: int, target: int, wrote: dict, features: dict[int, Tensor]) -> Tensor:
        total = torch.zeros(*MASK.shape, D_MODEL, dtype=torch.float64)
        for layer in range(source, target):
            for i, feature in enumerate(chosen[source]):
                f = features[source][..., feature, None] - (0.0 if means is None else means[source][i])
                total = total + f * clt.W_dec[source][feature, (layer - source) * D_MODEL :][:D_MODEL]
        return total

    return remove


def of_source(source: int) -> dict[int, list[int]]:
    return {source: FEATURES[source]}


FEATURE_CASES = {
    "one pair": (ablate_handoff(0, 1, FEATURES[0]), [(0, 1)], None, None, "live"),
    "two writes": (ablate_handoff(0, 2, FEATURES[0]), [(0, 2)], None, None, "live"),
    "all pairs": (ablate_handoff(target=[1, 2], features=FEATURES), TRIANGLE, None, None, "live"),
    "means": (
        ablate_handoff(target=[1, 2], features=FEATURES, baseline="mean", mean=F_MEANS),
        TRIANGLE,
        {0: F_MEANS[:3], 1: F_MEANS[3:]},
        None,
        "live",
    ),
    "frozen norm": (ablate_handoff(1, 2, FEATURES[1], norm="frozen"), [(1, 2)], None, None, "frozen"),
    "subspace": (ablate_handoff(0, 2, FEATURES[0], SUBSPACE), [(0, 2)], None, SUBSPACE, "live"),
}


@pytest.mark.parametrize("mode", ["iterative", "replace"])
@pytest.mark.parametrize("case", FEATURE_CASES)
def test_features_equal_the_oracle(family, case, mode):
    edit, pairs, means, subspace, norm = FEATURE_CASES[case]
    read = "mlp_in" if family == "gpt_neox" or case == "subspace" else "resid_mid"
    clt = make_clt(read=read, dtype=torch.float64, scale=1.5)
    remove = writes_of(clt, means)
    if subspace is not None:
        whole, projection = remove, projector(subspace)
        remove = lambda *args: whole(*args) @ projection  # noqa: E731
    settings = {"norm": norm, "clt": clt, "read": read, "replace": mode == "replace"}
    wanted, _ = oracle(family, pairs, remove, **settings)
    without, _ = oracle(family, [], remove, **settings)
    result = intervene(model_of(family), INPUTS, edit, mode, clt=clt)
    assert_close(real(result.logits), real(wanted), **CLOSE)
    assert (real(wanted) - real(without)).abs().max() > 1e-3


def test_whole_outputs_in_the_replacement_model(family):
    """There a layer's whole output is its reconstruction."""
    clt = make_clt(dtype=torch.float64, scale=1.5)
    wanted, _ = oracle(family, [(0, 2)], lambda s, t, wrote, f: wrote[s], clt=clt, replace=True)
    result = intervene(model_of(family), INPUTS, ablate_handoff(0, 2), "replace", clt=clt)
    assert_close(real(result.logits), real(wanted), **CLOSE)


@pytest.mark.parametrize("what", ["features", "whole"])
def test_the_local_replacement_model(family, what):
    """With everything frozen, the target's MLP input falls by what the frozen norm makes of what is removed."""
    read = "mlp_in" if family == "gpt_neox" else "resid_mid"
    clt, hf, runs = make_clt(read=read, dtype=torch.float64, scale=1.5), model_of(family), []
    edit = ablate_handoff(0, 1, FEATURES[0] if what == "features" else None)
    watch(hf, family, runs)
    result = intervene(hf, INPUTS, edit, "local", clt=clt)
    plain, ablated = runs
    change = {key: real(ablated[key] - plain[key]) for key in plain}
    assert_close(change["resid_post", 0], torch.zeros_like(change["resid_post", 0]), **CLOSE)
    # Layer 1's features respond, and no others before them.
    moved = result.after.dense(1) - result.before.dense(1)
    assert_close(change["resid_post", 1], real(moved @ clt.W_dec[1][:, :D_MODEL]), **CLOSE)
    assert change["resid_post", 1].abs().max() > 1e-3
    # Without a handoff the local model is the model; so what is seen here is the handoff alone.
    _, seen = oracle(
        family,
        [(0, 1)],
        writes_of(clt) if what == "features" else lambda s, t, wrote, f: wrote[s],
        norm="frozen",
        clt=clt,
        read=read,
    )
    assert_close(real(ablated["mlp_in", 1]), real(seen["mlp_in", 1]), **CLOSE)


def test_writes_that_are_dropped_were_not_handed_over():
    clt = make_clt(dtype=torch.float64, scale=1.5)
    wanted = intervene(model_of("gpt2"), INPUTS, iv.only_span(1), "replace", clt=clt).logits
    # Layer 0's feature writes layers 0 and 1; the second write is dropped, and the first is left in place.
    only_first = clt.W_dec[0][FEATURES[0], :D_MODEL]
    alone = make_clt(Wiring.local_clt(N_LAYERS, span=1), dtype=torch.float64)
    with torch.no_grad():
        for g in range(N_LAYERS):
            alone.W_enc[g].copy_(clt.W_enc[g])
            alone.b_enc[g].copy_(clt.b_enc[g])
            alone.W_dec[g].copy_(clt.W_dec[g][:, :D_MODEL])
            alone.b_dec[g].copy_(clt.b_dec[g])
    assert_close(alone.W_dec[0][FEATURES[0]], only_first)
    assert_close(intervene(model_of("gpt2"), INPUTS, None, "replace", clt=alone).logits, wanted, **EXACT)
    handoff = ablate_handoff(0, 2, FEATURES[0])
    got = intervene(model_of("gpt2"), INPUTS, chain(handoff, iv.only_span(1)), "replace", clt=clt)
    assert_close(got.logits, intervene(model_of("gpt2"), INPUTS, handoff, "replace", clt=alone).logits, **EXACT)


@pytest.mark.parametrize("family", ["llama", "olmo2", "gpt_neox"])
def test_a_crosscoder_that_reads_the_blocks_input_reads_less_too(family):
    """It stands for the MLP, so a handoff is taken from what it reads."""
    clt = make_clt(read="resid_pre", dtype=torch.float64, scale=1.5)
    edit = ablate_handoff(0, 1, FEATURES[0])
    result = intervene(model_of(family), INPUTS, edit, "replace", clt=clt)
    plain = intervene(model_of(family), INPUTS, None, "replace", clt=clt)
    before, after = plain.after.dense(1), result.after.dense(1)
    written = plain.after.dense(0)[..., FEATURES[0]] @ clt.W_dec[0][FEATURES[0], :D_MODEL]
    assert_close(real(plain.after.dense(0)), real(result.after.dense(0)), **EXACT)
    hf, runs = model_of(family), []
    handle = blocks(hf)[1].register_forward_pre_hook(
        lambda m, a, k: runs.append(a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    intervene(hf, INPUTS, None, "replace", clt=clt)
    handle.remove()
    assert_close(real(before), real(encode(clt, 1, runs[-1])), **CLOSE)
    assert_close(real(after), real(encode(clt, 1, runs[-1] - written)), **CLOSE)


# ---------------------------------------------------------------- both libraries


@pytest.mark.parametrize("make", [nnsight_model, bridge_model])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox"])
def test_both_libraries_give_the_same(make, family):
    clt = make_clt()
    for edit, mode in (
        (ablate_handoff(0, 2), "iterative"),
        (ablate_handoff(0, 1, FEATURES[0]), "replace"),
        (ablate_handoff(1, 2, FEATURES[1], norm="frozen"), "local"),
    ):
        wanted = intervene(make_model(family), INPUTS, edit, mode, clt=clt).logits
        got = intervene(make(family), INPUTS, edit, mode, clt=clt).logits
        assert_close(real(got), real(wanted), rtol=0, atol=1e-5)


# ---------------------------------------------------------------- known circuits

MODES = ("original", "iterative", "local", "replace")


def answers(toy, edit, mode: str) -> Tensor:
    extra = {} if mode == "original" else {"mode": mode, "clt": toy.clt}
    return intervene(toy.hf, toy.ids, edit, **extra).logits[:, -1].argmax(-1)


def of_all_features(toy, mode: str):
    return ablate_handoff(0, 1, None if mode == "original" else list(range(toy.clt.group_sizes[0])))


TOYS = {
    "boolean": boolean_toy,
    "twice": written_twice,
    "twice, two features": lambda: written_twice(one_feature=False),
    "passed on": lambda: written_twice(from_layer_0=True),
    "passed on, two features": lambda: written_twice(from_layer_0=True, one_feature=False),
}


@pytest.mark.parametrize("toy", TOYS)
def test_toys_are_right_and_their_crosscoders_perfect(toy):
    toy = TOYS[toy]()
    assert 0 < toy.answers.sum() < len(toy.answers)
    plain = toy.hf(toy.ids).logits
    assert torch.equal(plain[:, -1].argmax(-1), toy.answers)
    assert_close(intervene(toy.hf, toy.ids, None, "replace", clt=toy.clt).logits, plain, **EXACT)


def test_both_layers_of_the_twice_written_are_needed():
    """Else a handoff that leaves the answer alone would say nothing."""
    for layer in (0, 1):
        toy = written_twice()
        toy.hf.transformer.h[layer].mlp.c_proj.weight.zero_()
        assert not torch.equal(toy.hf(toy.ids).logits[:, -1].argmax(-1), toy.answers)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_circuit_of_two_steps_breaks(mode, whole):
    toy = boolean_toy()
    edit = ablate_handoff(0, 1) if whole else of_all_features(toy, mode)
    assert torch.equal(answers(toy, edit, mode), torch.zeros(16, dtype=torch.long))


@pytest.mark.parametrize("one_feature", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_feature_written_twice_survives(mode, one_feature):
    toy = written_twice(one_feature=one_feature)
    assert torch.equal(answers(toy, of_all_features(toy, mode), mode), toy.answers)
    assert torch.equal(answers(toy, ablate_handoff(0, 1), mode), toy.answers)


def test_models_alike_in_all_they_say_are_told_apart():
    """One crosscoder is perfect for both, and only the handoff in the model itself says which it is."""
    kept, passed_on = written_twice(), written_twice(from_layer_0=True)
    assert_close(kept.hf(kept.ids).logits, passed_on.hf(kept.ids).logits, **EXACT)
    for mode in ("original", "iterative"):
        assert torch.equal(answers(kept, ablate_handoff(0, 1), mode), kept.answers)
        assert torch.equal(answers(passed_on, ablate_handoff(0, 1), mode), torch.zeros(4, dtype=torch.long))
    # A crosscoder that follows the neurons shows it too.
    faithful = written_twice(from_layer_0=True, one_feature=False)
    assert torch.equal(answers(faithful, ablate_handoff(0, 1, 0), "replace"), torch.zeros(4, dtype=torch.long))


def test_part_of_a_handoff_breaks_part_of_the_answer():
    """e is on where a and not b: without it, only inputs with b and not a are recognised."""
    toy = boolean_toy()
    for mode in ("iterative", "replace"):
        got = answers(toy, ablate_handoff(0, 1, features=0), mode)
        wanted = toy.answers * torch.tensor([int(not (t & 1 and not t >> 1 & 1)) for t in range(16)])
        assert torch.equal(got, wanted)
    # The direction that e is written along does the same in the model itself.
    direction = toy.hf.transformer.h[0].mlp.c_proj.weight[0]
    assert torch.equal(answers(toy, ablate_handoff(0, 1, subspace=direction), "original"), wanted)
    # Where all that is removed is put back on average, no input is below the threshold by as much.
    mean = toy.clt.encode(torch.stack([toy.hf.transformer.wte.weight] * 2))[0].mean(0)
    restored = ablate_handoff(0, 1, features=[0, 1, 2, 3], baseline="mean", mean=mean)
    logits = intervene(toy.hf, toy.ids, restored, "replace", clt=toy.clt).logits
    assert_close(
        logits[:, -1, 1], torch.full((16,), max(0.0, float(4 * (mean.sum() - 1))).__float__()).double(), **EXACT
    )


# ---------------------------------------------------------------- scans


def test_scan_measures_every_pair():
    hf, clt = model_of("gemma2"), make_clt(dtype=torch.float64, scale=1.5)
    scan = handoff_scan(hf, INPUTS)
    assert scan.effects.shape == (N_LAYERS, N_LAYERS)
    before = hf(**INPUTS).logits[:, -1].log_softmax(-1)
    for source in range(N_LAYERS):
        for target in range(N_LAYERS):
            if source >= target:
                assert math.isnan(scan.effects[source, target])
                continue
            after, _ = oracle("gemma2", [(source, target)], lambda s, t, wrote, f: wrote[s])
            after = after[:, -1].log_softmax(-1)
            wanted = (before.exp() * (before - after)).sum(-1).mean()
            assert_close(scan.effects[source, target], wanted, rtol=1e-3, atol=1e-8)
    assert scan.baseline == 0.0
    # In the replacement model, the effect is on the replacement model.
    replaced = handoff_scan(hf, INPUTS, features=FEATURES, clt=clt, mode="replace", mean=F_MEANS)
    assert replaced.effects.isnan().sum() == 9 - 3
    plain = intervene(hf, INPUTS, None, "replace", clt=clt).logits[:, -1].log_softmax(-1)
    edit = ablate_handoff(1, 2, FEATURES[1], baseline="mean", mean=F_MEANS[3:])
    after = intervene(hf, INPUTS, edit, "replace", clt=clt).logits[:, -1].log_softmax(-1)
    assert_close(replaced.effects[1, 2], (plain.exp() * (plain - after)).sum(-1).mean(), rtol=1e-6, atol=0)


def test_scan_of_a_metric_and_of_chosen_pairs():
    def fifth(logits: Tensor) -> Tensor:
        return logits[:, -1, 5].mean()

    hf = model_of("llama")
    scan = handoff_scan(hf, INPUTS, fifth, pairs=[(0, 2)], mean={0: MEAN}, position=-1)
    assert scan.baseline == pytest.approx(float(fifth(hf(**INPUTS).logits)), abs=1e-6)
    edit = only(ablate_handoff(0, 2, baseline="mean", mean=MEAN), position=-1)
    wanted = float(fifth(intervene(hf, INPUTS, edit).logits)) - scan.baseline
    assert float(scan.effects[0, 2]) == pytest.approx(wanted, rel=1e-6)
    assert int((~scan.effects.isnan()).sum()) == 1
    assert "change of fifth" in str(scan)
    with pytest.raises(EditError, match="one number"):
        handoff_scan(hf, INPUTS, lambda logits: logits, pairs=[(0, 1)])
    with pytest.raises(EditError, match="source 1 has no features"):
        handoff_scan(hf, INPUTS, features={0: 3}, clt=make_clt(), pairs=[(1, 2)])


def test_scan_takes_the_last_real_token_of_each_row():
    hf, right = model_of("gpt2"), {"input_ids": IDS[:1, :6], "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}
    padded, alone = handoff_scan(hf, right), handoff_scan(hf, IDS[:1, :4])
    assert_close(padded.effects, alone.effects, rtol=1e-6, atol=0, equal_nan=True)


def test_scan_is_shown(capsys):
    toy = boolean_toy()
    scan = handoff_scan(toy.hf, toy.ids, bar=False)
    assert capsys.readouterr().err == ""
    assert str(scan).splitlines()[0] == "KL (nats) by handoff, mode iterative; without ablation 0.0000"
    assert str(scan).splitlines()[1].split()[:3] == ["0", "->", "1"]
    assert repr(scan) == "<HandoffScan KL (nats), 1 pairs of 2 layers>"
    frame = scan.to_pandas()
    assert list(frame.columns) == ["source", "target", "effect"]
    assert frame.values.tolist() == [[0, 1, float(scan.effects[0, 1])]]
    figure = scan.plot()
    (image,) = figure.axes[0].images
    assert_close(torch.as_tensor(image.get_array().filled(math.nan)), scan.effects, equal_nan=True)
    handoff_scan(toy.hf, toy.ids, bar=True)
    assert "handoffs" in capsys.readouterr().err


# ---------------------------------------------------------------- as a value

SHOWN = {
    "ablate_handoff(source=0, target=3)": ablate_handoff(0, 3),
    "ablate_handoff(source=[0, 1], target=[1, 2])": ablate_handoff(pairs=[(1, 2), (0, 2), (0, 1), (0, 1)]),
    "ablate_handoff(pairs=[(0, 1), (2, 3)])": ablate_handoff(pairs=[(2, 3), (0, 1)]),
    "ablate_handoff(source=2, target=3, features=[811, 42], norm='frozen')": ablate_handoff(
        2, 3, [811, 42], norm="frozen"
    ),
    "ablate_handoff(source=2, target=3, features=7, baseline='mean', mean=0.5)": ablate_handoff(
        2, 3, {2: 7}, baseline="mean", mean=0.5
    ),
    "ablate_handoff(source=[0, 1], target=2, features={0: [1], 1: [4, 5]})": ablate_handoff(
        target=2, features={0: 1, 1: [4, 5]}
    ),
    "ablate_handoff(source=1, target=2, features=supernode('Texas', {1: [4]}))": ablate_handoff(
        target=2, features=iv.supernode("Texas", {1: 4})
    ),
}


@pytest.mark.parametrize("shown", SHOWN)
def test_it_is_shown_as_the_code_that_makes_it(shown):
    edit = SHOWN[shown]
    assert repr(edit) == shown
    assert eval(shown, vars(iv)) == edit


def test_tensors_are_shown_by_their_size():
    edit = ablate_handoff([0, 1], 2, subspace=SUBSPACE, baseline="mean", mean=MEANS)
    assert repr(edit) == (
        "ablate_handoff(source=[0, 1], target=2, subspace=<3 of 16 directions>, baseline='mean', "
        "mean={0: <16 numbers>, 1: <16 numbers>})"
    )


@pytest.mark.parametrize(
    "edit",
    [
        *SHOWN.values(),
        ablate_handoff(0, 1, subspace=SUBSPACE.float()),
        ablate_handoff(0, 1, [4, 5], baseline="mean", mean=torch.tensor([0.1, 0.2])),
        ablate_handoff(0, 1, baseline="mean", mean=MEAN.float()),
        ablate_handoff([0, 1], 2, baseline="mean", mean=MEANS, norm="frozen"),
        chain(only(ablate_handoff(0, 1), position=slice(2, None), batch=0), iv.scale(1, 4, by=2.0)),
    ],
    ids=repr,
)
def test_it_goes_to_json_and_back(edit, tmp_path):
    assert iv.from_json(edit.to_json(tmp_path / "edit.json")) == edit
    assert iv.from_json(tmp_path / "edit.json") == edit
    assert iv.from_dict(json.loads(json.dumps(edit.to_dict()))).data() == edit.data()
    assert hash(iv.from_dict(edit.to_dict())) == hash(edit)


def test_equal_where_it_does_the_same():
    assert ablate_handoff(0, 1) != ablate_handoff(0, 2)
    assert ablate_handoff(0, 1) != ablate_handoff(0, 1, norm="frozen")
    assert ablate_handoff(0, 1, 4) != ablate_handoff(0, 1)
    assert ablate_handoff(0, 1, baseline="mean", mean=MEAN) != ablate_handoff(0, 1, baseline="mean", mean=2 * MEAN)
    assert ablate_handoff(0, 1, baseline="mean", mean=MEAN) == ablate_handoff(0, 1, baseline="mean", mean=MEAN.tolist())


def test_a_saved_one_remembers_its_crosscoder():
    clt, other = make_clt(), make_clt(n_latents=12)
    saved = iv.from_dict(ablate_handoff(0, 1, 4).to_dict(clt))
    saved.check(clt)
    with pytest.raises(EditError, match="another crosscoder"):
        saved.check(other)


def test_a_subspace_is_a_span():
    """However it is given: in any length, twice over, or as one direction."""
    x = torch.randn(2, 5, D_MODEL, dtype=torch.float64)
    wanted = x @ projector(SUBSPACE)
    for rows in (SUBSPACE, 1e-3 * SUBSPACE, torch.cat((SUBSPACE, SUBSPACE[:1] + SUBSPACE[1:2])), SUBSPACE.tolist()):
        edit = ablate_handoff(0, 1, subspace=rows)
        assert edit.subspace.shape == (3, D_MODEL)
        assert_close(edit.of_output(0, x), wanted, **EXACT)
    assert_close(ablate_handoff(0, 1, subspace=SUBSPACE[0]).of_output(0, x), x @ projector(SUBSPACE[:1]), **EXACT)
    assert ablate_handoff(0, 1).of_output(0, x.bfloat16()).dtype == torch.float32


CLASHES = {
    "both remove layer 0's output from what layer 2 reads": (ablate_handoff(0, 2), ablate_handoff([0, 1], 2)),
    "both remove layer 1's output": (ablate_handoff(1, 2), ablate_handoff(1, 2, features=3)),
    "both remove feature 2 of layer 0": (ablate_handoff(0, 1, [1, 2]), ablate_handoff(0, [1, 2], [2, 3])),
    "layer 2's norm as 'live' and as 'frozen'": (ablate_handoff(0, 2), ablate_handoff(1, 2, norm="frozen")),
}


@pytest.mark.parametrize("message", CLASHES)
def test_handoffs_that_clash_are_refused(message):
    one, other = CLASHES[message]
    for pair in (
        (one, other),
        (other, iv.scale(1, 4, by=2.0), one),
        (chain(only(one, position=[0, 1]), iv.scale(1, 4, by=2.0)), only(other, position=[1, 2])),
    ):
        with pytest.raises(EditError, match=message):
            chain(*pair)
    # At other places they are two.
    chain(only(one, position=0), only(other, position=1))
    chain(only(one, batch=0), only(other, batch=1))


def test_handoffs_apart_add_up():
    """Other pairs, or other features of one pair: each is subtracted once."""
    clt = make_clt(dtype=torch.float64, scale=1.5)
    for edits, one in (
        ((ablate_handoff(0, 2), ablate_handoff(1, 2)), ablate_handoff([0, 1], 2)),
        ((ablate_handoff(0, 2, [3, 7]), ablate_handoff(0, 2, 11)), ablate_handoff(0, 2, [3, 7, 11])),
    ):
        got = intervene(model_of("gpt2"), INPUTS, chain(*edits), clt=clt).logits
        assert_close(got, intervene(model_of("gpt2"), INPUTS, one, clt=clt).logits, **EXACT)


REFUSED = {
    "source comes before": lambda: ablate_handoff(pairs=[(2, 1)]),
    "source 3 has no partner in target 1": lambda: ablate_handoff(3, 1),
    "target 0 has no partner in source 1": lambda: ablate_handoff(1, [0, 3]),
    "source= and target=, or pairs=": lambda: ablate_handoff(0),
    "instead of source= and target=": lambda: ablate_handoff(0, 1, pairs=[(0, 1)]),
    "no such pair": lambda: ablate_handoff(pairs=[]),
    "a pair is": lambda: ablate_handoff(pairs=[(0, 1, 2)]),
    "no layer -1": lambda: ablate_handoff(-1, 1),
    "whole number": lambda: ablate_handoff(0.5, 1),
    "'zero' or 'mean'": lambda: ablate_handoff(0, 1, baseline="none"),
    "goes with mean=": lambda: ablate_handoff(0, 1, baseline="mean"),
    "give both": lambda: ablate_handoff(0, 1, mean=MEAN),
    "'live' or 'frozen'": lambda: ablate_handoff(0, 1, norm="cold"),
    "give features by layer": lambda: ablate_handoff([0, 1], 2, features=[3]),
    "layer 1 is a source without features": lambda: ablate_handoff([0, 1], 2, features={0: 3}),
    "layer 1 is no source": lambda: ablate_handoff(0, 2, features={0: 3, 1: 3}),
    "first group": lambda: ablate_handoff(target=4, features={"3_1": 3}),
    "none for source 1": lambda: ablate_handoff([0, 1], 2, baseline="mean", mean={0: MEAN}),
    "2 numbers for 3 features": lambda: ablate_handoff(0, 1, [1, 2, 3], baseline="mean", mean=[0.0, 1.0]),
    "of shape": lambda: ablate_handoff(0, 1, baseline="mean", mean=0.5),
    "mean holds a number that is not finite": lambda: ablate_handoff(0, 1, baseline="mean", mean=[math.nan] * D_MODEL),
    "subspace holds": lambda: ablate_handoff(0, 1, subspace=[math.inf] * D_MODEL),
    "no direction": lambda: ablate_handoff(0, 1, subspace=torch.zeros(2, D_MODEL)),
    "given by its directions": lambda: ablate_handoff(0, 1, subspace=torch.ones(1, 2, D_MODEL)),
    "tensor of numbers": lambda: ablate_handoff(0, 1, subspace="xy"),
    "cannot be restricted by where": lambda: only(ablate_handoff(0, 1), where=iv.active(0, 1)),
    "cannot be restricted by layer": lambda: only(ablate_handoff(0, 1), layer=0),
    "not the description": lambda: iv.from_dict({"edit": "ablate_handoff"}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused(message):
    with pytest.raises(EditError, match=message):
        REFUSED[message]()


def test_what_does_not_fit_is_refused_before_the_model_runs():
    hf, clt, runs = model_of("gpt2"), make_clt(), []
    hf.register_forward_pre_hook(lambda *a: runs.append(1))
    wide = torch.ones(2, D_MODEL + 1)
    plt = make_clt(Wiring.local_clt(N_LAYERS, span=1))
    for edit, settings, message in (
        (ablate_handoff(0, 3), {}, "no layer 3"),
        (ablate_handoff(0, 1, subspace=wide), {}, "subspace has width 17"),
        (ablate_handoff(0, 1, baseline="mean", mean=wide[0]), {}, "mean has width 17"),
        (ablate_handoff(0, 1, 24), {"clt": clt}, "no feature 24"),
        (ablate_handoff(0, 1, 3), {"clt": clt, "mode": "direct"}, "do not respond"),
        (only(ablate_handoff(0, 1), position=9), {}, "beyond the 9"),
        (only(ablate_handoff(0, 1), batch=2), {}, "beyond the 2"),
    ):
        with pytest.raises(EditError, match=message):
            intervene(hf, INPUTS, edit, **settings)
    assert not runs
    ablate_handoff(0, 2, 3).check(plt)
    late = make_clt(Wiring(((Site(MODEL, "mlp_in", 0),),), ((Site(MODEL, "mlp_out", 1), Site(MODEL, "mlp_out", 2)),)))
    ablate_handoff(0, 2, 3).check(late)
    with pytest.raises(EditError, match="layer 0 write layers 1, 2, nothing of which layer 1 could read"):
        ablate_handoff(0, 1, 3).check(late)
    stream = make_clt(write="resid_post")
    with pytest.raises(EditError, match="writes resid_post: ablate handoffs of whole outputs"):
        ablate_handoff(0, 1, 3).check(stream)


@pytest.mark.parametrize("mode", ["local", "replace"])
def test_the_replacement_model_needs_a_crosscoder(mode):
    with pytest.raises(AttachError, match="attach one with add_clt, or pass clt="):
        intervene(model_of("gpt2"), INPUTS, ablate_handoff(0, 1), mode)


def test_whole_outputs_take_no_notice_of_a_crosscoder_that_is_attached():
    edit, wanted = ablate_handoff(0, 1), intervene(bridge_model("gpt2"), INPUTS, ablate_handoff(0, 1))
    bridge = bridge_model("gpt2")
    bridge.add_clt(make_clt(Wiring.plt(N_LAYERS), read="resid_post", write="resid_post"), mode="observe")
    result = intervene(bridge, INPUTS, edit)
    assert_close(result.logits, wanted.logits, rtol=0, atol=0)
    assert result.before is None
    assert iv.generate(bridge, IDS[0], edit, max_new_tokens=2).ids.shape == (1, 11)
    # Where one is given, or no edits are, its features are shown.
    assert intervene(bridge_model("gpt2"), INPUTS, edit, clt=make_clt()).before is not None
    bridge = bridge_model("gpt2")
    bridge.add_clt(make_clt(), mode="observe")
    assert intervene(bridge, INPUTS).before is not None


def test_without_edits_and_crosscoder_the_model_runs_as_it_is():
    hf = model_of("llama")
    result = intervene(hf, INPUTS, None)
    assert torch.equal(result.logits, result.baseline)
    assert_close(real(result.logits), real(hf(**INPUTS).logits), **CLOSE)
    assert result.before is None
    assert torch.equal(
        iv.generate(hf, IDS[0], max_new_tokens=3).ids,
        hf.generate(IDS[:1], attention_mask=MASK[:1], max_new_tokens=3, do_sample=False, pad_token_id=0),
    )
    for mode in ("direct", "local", "replace"):
        with pytest.raises(AttachError, match="none is attached"):
            intervene(hf, INPUTS, None, mode)


def test_features_written_before_a_post_norm_are_no_part_of_the_stream():
    clt = make_clt(write="mlp_out_before_norm")
    with pytest.raises(EditError, match="before the norm post_feedforward_layernorm"):
        intervene(model_of("gemma2"), INPUTS, ablate_handoff(0, 1, 3), clt=clt)
    # Where there is no such norm, the two are the same.
    got = intervene(model_of("llama"), INPUTS, ablate_handoff(0, 1, 3), clt=clt).logits
    same = intervene(model_of("llama"), INPUTS, ablate_handoff(0, 1, 3), clt=make_clt()).logits
    assert_close(got, same, **EXACT)


@pytest.mark.parametrize("features", [None, [3, 7]])
def test_a_gradient_reaches_the_mean(features):
    start = torch.tensor([0.3, -0.2] if features else MEAN.tolist(), dtype=torch.float64)
    settings = {"mode": "replace", "clt": make_clt(dtype=torch.float64)} if features else {}

    def loss(mean: Tensor) -> Tensor:
        edit = ablate_handoff(0, 1, features, baseline="mean", mean=mean)
        return intervene(model_of("gpt2"), INPUTS, edit, **settings).logits[:, -1, 3].sum()

    (grad,) = torch.autograd.grad(loss(start.requires_grad_()), start)
    for i, step in enumerate(1e-6 * torch.eye(len(start), dtype=torch.float64)[:2]):
        measured = (loss(start.detach() + step) - loss(start.detach() - step)) / 2e-6
        assert_close(grad[i], measured.detach(), rtol=1e-5, atol=1e-8)
