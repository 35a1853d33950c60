"""Each mode of `intervene` against its definition, written out by hand in float64."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import clt_plugin as cp
from clt_plugin import AttachError, Wiring
from clt_plugin import interventions as iv
from clt_plugin.adapters._frozen import FreezeError
from clt_plugin.interventions.result import Intervention, TokenChange
from clt_plugin.report.tokens import plot_token_changes
from interventions.oracle_modes import FAMILIES, Batch, Change, Coder, Hand, Outcome, run_mode, wide
from support.crosscoders import make_clt
from support.models import N_LAYERS, bridge_model, make_model, make_tokenizer, nnsight_model
from support.reference import blocks_of
from support.tracing import left_padded

# Longer than the sliding windows of 4, the second row padded with what would be ordinary tokens otherwise.
IDS = torch.tensor([[0, 5, 17, 33, 60, 2, 41, 8, 22], [7, 8, 0, 9, 9, 58, 3, 30, 12]])
MASK = torch.arange(9) >= torch.tensor([[0], [2]])
PADDED, ONE = Batch(IDS, MASK), Batch(IDS[:1], MASK[:1])
CLOSE = {"rtol": 1e-8, "atol": 1e-8}

MODES: dict[str, dict[str, Any]] = {
    "direct": {"mode": "direct"},
    "constrained, in the middle": {"mode": "constrained", "layers": [1]},
    "constrained, from the start": {"mode": "constrained", "layers": range(2)},
    "constrained, to the end": {"mode": "constrained", "layers": range(1, 3)},
    "constrained, everywhere": {"mode": "constrained", "layers": range(N_LAYERS)},
    "iterative": {"mode": "iterative"},
    "iterative, attention frozen": {"mode": "iterative", "freeze_attention": True},
    "local": {"mode": "local"},
    "local, attention live": {"mode": "local", "freeze_attention": False},
    "replace": {"mode": "replace"},
    "replace, attention frozen": {"mode": "replace", "freeze_attention": True},
}
MAIN = ("direct", "constrained, in the middle", "constrained, everywhere", "iterative", "local", "replace")

CLTS: dict[str, dict[str, Any]] = {
    "clt": {},
    "jumprelu": {"activation": "jumprelu"},
    "reads resid_mid": {"read": "resid_mid"},
    "reads before gain": {"read": "mlp_in_before_gain"},
    "local clt": {"wiring": Wiring.local_clt(N_LAYERS, 2)},
    "plt": {"wiring": Wiring.plt(N_LAYERS)},
    "skips": {"wiring": Wiring.clt(N_LAYERS).with_skips()},
    "skips before gain": {"wiring": Wiring.plt(N_LAYERS, read="mlp_in_before_gain").with_skips()},
    "before the post-norm": {"write": "mlp_out_before_norm"},
    "excludes the first": {"exclude_first": 1},
    "excludes the first, with skips": {"exclude_first": 1, "wiring": Wiring.clt(N_LAYERS).with_skips()},
    "one layer of three": {"wiring": Wiring(*(((cp.Site("model", name, 1),),) for name in ("mlp_in", "mlp_out")))},
}


@cache
def hand_of(family: str) -> Hand:
    hf = make_model(family, torch.float64)
    if family == "gemma2":
        sharpen(hf)
    return Hand(hf)


def sharpen(hf: Any) -> None:
    """Make softcaps matter: at their usual values a tiny model's scores never reach them."""
    hf.config.final_logit_softcapping = 2.0
    for block in blocks_of(hf):
        block.self_attn.attn_logit_softcapping = 0.5


def model_of(family: str, dtype: torch.dtype = torch.float64) -> Any:
    return copy.deepcopy(hand_of(family).hf).to(dtype)


@cache
def clt_of(name: str, dtype: torch.dtype = torch.float64) -> Any:
    return make_clt(**CLTS[name], n_latents=12, scale=1.5).to(dtype)


def natural(hand: Hand, clt: Any, batch: Batch = PADDED) -> dict[int, Tensor]:
    coder = Coder(clt, batch.kept)
    return {layer: acts * batch.kept[..., None] for layer, acts in coder.natural(hand(batch).sites).items()}


def loudest(acts: Tensor, n: int = 4) -> list[int]:
    return acts.sum((0, 1)).topk(n).indices.tolist()


# ---------------------------------------------------------------- edits, and the same by hand

Case = tuple[iv.Edit, list[Change], set[tuple[int, int]]]


def scaled(was: dict[int, Tensor]) -> Case:
    """One feature a layer, everywhere."""
    chosen = {layer: loudest(acts)[0] for layer, acts in was.items()}
    changes = [Change(layer, feature, lambda x: 2.5 * x) for layer, feature in chosen.items()]
    return iv.scale(group=chosen, by=2.5), changes, set()


def everything(was: dict[int, Tensor]) -> Case:
    """All operations, on several layers and positions, and both kinds of mask."""
    features = {layer: loudest(acts) for layer, acts in was.items()}
    first, last = min(features), max(features)
    a, b, c, d = features[first]
    e, f, g, _ = features[last] if last != first else features[first][::-1]
    edits = [
        iv.scale(layer=first, feature=a, by=-1.5),
        iv.only(iv.add(layer=first, feature=[b, c], value=[0.7, -0.4]), position=[-1, 2]),
        iv.only(iv.clamp(layer=last, feature=e, max=0.2), position=slice(1, 4)),
        iv.only(iv.set_value(layer=last, feature=f, value=1.3), batch=1),
        iv.ablate(layer=last, feature=g, mean=0.4),
        iv.only(iv.ablate(layer=first, feature=d), where=iv.active(first, b, above=0.1)),
        iv.only(iv.add(layer=last, feature=e, value=0.9), where=iv.inactive(first, a, position=3)),
    ]
    middle = sorted(features)[len(features) // 2]
    if middle != last:
        edits.append(iv.add(layer=middle, feature=features[middle][:2], value=0.8))
    changes = [
        *(Change(middle, feature, lambda x: x + 0.8) for feature in features[middle][:2] if middle != last),
        Change(first, a, lambda x: -1.5 * x),
        Change(first, b, lambda x: x + 0.7, lambda row, p, n, _: p in (2, n - 1)),
        Change(first, c, lambda x: x - 0.4, lambda row, p, n, _: p in (2, n - 1)),
        Change(last, e, lambda x: min(x, 0.2), lambda row, p, n, _: 1 <= p < 4),
        Change(last, f, lambda x: 1.3, lambda row, p, n, _: row == 1),
        Change(last, g, lambda x: 0.4),
        Change(first, d, lambda x: 0.0, lambda row, p, n, now: now[first][p, b] > 0.1),
        Change(last, e, lambda x: x + 0.9, lambda row, p, n, now: now[first][3, a] <= 0),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return iv.chain(*edits), changes, set()


def masked(was: dict[int, Tensor]) -> Case:
    """Features scaled, and writes dropped."""
    edit, changes, _ = scaled(was)
    return iv.chain(edit, iv.ablate_cross_layer(pairs=[(0, 1), (1, 2)])), changes, {(0, 1), (1, 2)}


def spanned(was: dict[int, Tensor]) -> Case:
    """Writes dropped, and nothing else."""
    pairs = {(source, target) for source in range(N_LAYERS) for target in range(source + 2, N_LAYERS)}
    return iv.only_span(2), [], pairs


def check(run: Intervention, oracle: Outcome, kept: Tensor = MASK, close: dict[str, float] = CLOSE) -> None:
    """Compare all but padding."""
    wanted = oracle.after.logits[kept]
    assert_close(run.logits[kept].double(), wanted, **close)
    assert_close(run.baseline[kept].double(), oracle.before.logits[kept], **close)
    for group, (before, after) in enumerate(zip(oracle.natural.values(), oracle.edited.values(), strict=True)):
        assert_close(run.before.dense(group)[kept].double(), before[kept], **close)
        assert_close(run.after.dense(group)[kept].double(), after[kept], **close)


def compare(family: str, clt_name: str, mode: str, case: Callable[[Any], Case], batch: Batch = PADDED) -> None:
    hand, clt, hf = hand_of(family), clt_of(clt_name), model_of(family)
    edit, changes, dropped = case(natural(hand, clt, batch))
    oracle = run_mode(hand, clt, batch, changes, dropped=dropped, **MODES[mode])
    with wide(hf):
        run = cp.intervene(hf, batch.inputs, edit, clt=clt, **MODES[mode])
    check(run, oracle, batch.kept)
    moved = float((oracle.after.logits - oracle.before.logits).abs().max())
    # The only write that is dropped there is of the last layer.
    nothing = case is spanned and N_LAYERS - 1 not in MODES[mode].get("layers", range(N_LAYERS))
    assert moved < 1e-12 if nothing else moved > 1e-3, "the edit should show"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_is_the_model(family):
    hand = hand_of(family)
    for batch in (PADDED, ONE):
        with wide(model_of(family)) as hf:
            hf.set_attn_implementation("eager")
            # Masks of transformers are infinite in float64 where padding sees nothing, which makes it NaN.
            plain = hf(**batch.inputs, use_cache=False).logits
        assert_close(hand(batch).logits[batch.kept], plain[batch.kept], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_modes_in_every_family(family, mode):
    compare(family, "clt", mode, everything)


@pytest.mark.parametrize("mode", MAIN)
@pytest.mark.parametrize(
    ("family", "clt"),
    [
        *(("gemma2", name) for name in CLTS if name != "clt"),
        *(("gpt2", name) for name in ("skips before gain", "excludes the first, with skips", "one layer of three")),
    ],
)
def test_modes_with_every_crosscoder(family, clt, mode):
    compare(family, clt, mode, everything)


@pytest.mark.parametrize(
    ("clt", "case"), [("skips", scaled), ("clt", masked), ("excludes the first", masked), ("skips", spanned)]
)
@pytest.mark.parametrize("mode", MAIN)
def test_write_masks_and_features(mode, clt, case):
    compare("gemma3", clt, mode, case)


@pytest.mark.parametrize("mode", MAIN)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_close(family, mode):
    hand, clt = hand_of(family), clt_of("clt")
    edit, changes, _ = everything(natural(hand, clt))
    oracle = run_mode(hand, clt, PADDED, changes, **MODES[mode])
    model, clt = model_of(family, torch.float32), clt_of("clt", torch.float32)
    run = cp.intervene(model, PADDED.inputs, edit, clt=clt, **MODES[mode])
    assert run.logits.dtype == torch.float32
    # Some modes leave the model's usual range: rounding goes by the largest logit.
    largest = float(oracle.after.logits[MASK].abs().max())
    check(run, oracle, close={"rtol": 1e-5, "atol": 1e-5 * max(1.0, largest)})


@pytest.mark.parametrize("clt", ["clt", "skips", "one layer of three"])
@pytest.mark.parametrize("mode", [name for name in MODES if not name.startswith("replace")])
def test_without_edits_nothing_changes(mode, clt):
    """To the last bit, but where a reconstruction and its error are added."""
    hf, clt = model_of("gemma2", torch.float32), clt_of(clt, torch.float32)
    run = cp.intervene(hf, PADDED.inputs, clt=clt, **MODES[mode])
    exact = mode.startswith(("direct", "constrained", "iterative"))
    assert_close(run.logits, run.baseline, **({"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-5}))
    assert run.changed_features() == [] or not exact
    assert_close(run.kl(), torch.zeros(2).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["direct", "constrained, everywhere", "iterative"])
def test_a_selection_of_layers_does_what_the_whole_does(mode):
    hf = model_of("llama", torch.float32)
    edit = iv.add(layer=1, feature=[2, 5], value=1.5)
    whole = cp.intervene(hf, IDS, edit, clt=clt_of("clt", torch.float32), **MODES[mode])
    part = cp.intervene(hf, IDS, edit, clt=clt_of("clt", torch.float32).select(layers=[1]), **MODES[mode])
    assert_close(part.logits, whole.logits, rtol=1e-5, atol=1e-5)
    assert not part.logits.allclose(part.baseline, atol=1e-2)


# ---------------------------------------------------------------- linearity and gradients


def before_softcap(hf: Any, logits: Tensor) -> Tensor:
    cap = getattr(hf.config, "final_logit_softcapping", None)
    return cap * torch.atanh(logits / cap) if cap else logits


@pytest.mark.parametrize("clt", ["clt", "skips", "before the post-norm"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["direct", "constrained, everywhere"])
def test_direct_effects_are_linear_in_the_strength(family, clt, mode):
    hf, clt = model_of(family), clt_of(clt)
    with wide(hf):

        def run(strength: float) -> Tensor:
            edit = iv.only(iv.add(group={0: 3, 1: [1, 4]}, value=strength), position=slice(1, 6))
            return before_softcap(hf, cp.intervene(hf, PADDED.inputs, edit, clt=clt, **MODES[mode]).logits)[MASK]

        nothing, once, twice = run(0.0), run(0.7), run(1.4)
    assert_close(twice - nothing, 2 * (once - nothing), rtol=1e-8, atol=1e-8)
    assert float((once - nothing).abs().max()) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_a_direct_effect_is_a_column_of_the_linear_map(family):
    """The decoder's columns, times the gradient of the frozen model where they are written."""
    hand, clt, hf, feature, position = hand_of(family), clt_of("clt"), model_of(family), 3, 2
    base = hand(ONE)
    written = {layer: torch.zeros_like(base.sites["mlp_out", layer]).requires_grad_() for layer in range(N_LAYERS)}

    def write(key: tuple[str, int], value: Tensor, sites: Any) -> Tensor:
        return base.sites[key] + written[key[1]] if key[0] == "mlp_out" else value

    frozen = hand(ONE, write, base.patterns, base.scales)
    delta = 1.7 - natural(hand, clt, ONE)[0][0, position, feature]
    with wide(hf):
        edit = iv.only(iv.set_value(layer=0, feature=feature, value=1.7), position=position)
        run = cp.intervene(hf, ONE.inputs, edit, "direct", clt=clt)
    moved = before_softcap(hf, run.logits) - before_softcap(hf, run.baseline)
    columns = clt.W_dec[0][feature].unflatten(-1, (N_LAYERS, -1))
    for token in (4, 17, 60):
        gradients = torch.autograd.grad(
            frozen.unembedded[0, -1, token], list(written.values()), retain_graph=True, materialize_grads=True
        )
        effect = sum(delta * columns[layer] @ grad[0, position] for layer, grad in enumerate(gradients))
        assert_close(moved[0, -1, token], effect, rtol=1e-7, atol=1e-8)
        assert abs(effect) > 1e-3


@pytest.mark.parametrize("clt", ["clt", "jumprelu", "skips", "excludes the first", "one layer of three"])
@pytest.mark.parametrize("mode", MAIN)
def test_gradients_in_strengths_are_those_of_finite_differences(mode, clt):
    hand, clt, hf = hand_of("gemma2"), clt_of(clt), model_of("gemma2")
    was = natural(hand, clt)
    first, last = min(was), max(was)
    (a, b, c), weights = loudest(was[first], 3), torch.randn(hand.config.vocab_size).double()

    def summary(logits: Tensor) -> Tensor:
        return (logits[MASK] @ weights).sum()

    def by_hand(by: float, value: float, other: float, high: float) -> Tensor:
        changes = [
            Change(first, a, lambda x: by * x),
            Change(first, b, lambda x: x + value, lambda row, p, n, _: p == 2),
            Change(last, c, lambda x: other, lambda row, p, n, _: p == n - 1),
            Change(last, a, lambda x: min(x, high)) if last != first else Change(first, a, lambda x: x),
        ]
        return summary(run_mode(hand, clt, PADDED, changes, **MODES[mode]).after.logits)

    at = [1.3, 0.6, 0.8, 0.3]
    by, value, other, high = strengths = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in at]
    edits = [
        iv.scale(layer=first, feature=a, by=by),
        iv.only(iv.add(layer=first, feature=b, value=value), position=2),
        iv.only(iv.set_value(layer=last, feature=c, value=other), position=-1),
    ]
    if last != first:
        edits.append(iv.clamp(layer=last, feature=a, max=high))
    with wide(hf):
        run = cp.intervene(hf, PADDED.inputs, iv.chain(*edits), clt=clt, **MODES[mode])
    assert not run.baseline.requires_grad
    assert_close(summary(run.logits).detach(), by_hand(*at), rtol=1e-8, atol=1e-8)
    gradients = torch.autograd.grad(summary(run.logits), strengths, allow_unused=True, materialize_grads=True)
    eps = 1e-5
    for i, gradient in enumerate(gradients):
        up, down = ([x + sign * eps * (j == i) for j, x in enumerate(at)] for sign in (1, -1))
        difference = (by_hand(*up) - by_hand(*down)) / (2 * eps)
        assert_close(gradient, difference, rtol=1e-5, atol=1e-6)
    assert float(torch.stack(gradients).abs().max()) > 0.01


def test_gradients_cost_nothing_where_none_is_asked_for():
    hf, clt = model_of("gpt2", torch.float32), clt_of("clt", torch.float32)
    assert not cp.intervene(hf, IDS, iv.add(layer=0, feature=1, value=1.0), clt=clt).logits.requires_grad
    strength = torch.tensor(1.0, requires_grad=True)
    edit = iv.add(layer=0, feature=1, value=strength)
    assert cp.intervene(hf, IDS, edit, clt=clt).logits.requires_grad
    with torch.no_grad():
        assert not cp.intervene(hf, IDS, edit, clt=clt).logits.requires_grad


# ---------------------------------------------------------------- both libraries

LIBRARIES = {"nnsight": nnsight_model, "transformer_lens": bridge_model}
TEXTS = ["w2 w3 w4 w5 w6", "w7 w8"]
EDIT = iv.chain(
    iv.add(group={0: [1, 3], 1: 2}, value=1.5), iv.only(iv.set_value(layer=2, feature=4, value=2.0), position=-1)
)


def plain_of(model: Any) -> Any:
    return model.original_model if hasattr(model, "original_model") else model._module


def logits_of(model: Any, ids: Tensor = IDS) -> Tensor:
    """By the library's own means."""
    if hasattr(model, "original_model"):
        return model(ids, return_type="logits")
    with model.trace(ids):
        logits = model.output.logits.save()
    return logits


def state_of(model: Any) -> dict[str, Any]:
    hf = plain_of(model)
    modules = [model, *hf.modules()] if isinstance(model, torch.nn.Module) else list(hf.modules())
    return {
        "modules": [(name, id(module)) for name, module in hf.named_modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules],
        "forwards": ["forward" in vars(module) for module in modules],
        "attention": [
            m.config._attn_implementation
            for m in hf.modules()
            if hasattr(getattr(m, "config", None), "_attn_implementation")
        ],
        "weights": [(name, value.data_ptr()) for name, value in hf.state_dict().items()],
        "mode": [module.training for module in hf.modules()],
        "edits": len(getattr(model, "_edits", [])),
    }


@pytest.mark.parametrize(
    ("family", "found"),
    [
        ("gemma2", "attached"),
        ("gpt2", "attached in observe"),
        ("gpt2", "by another name"),
        ("llama", "given"),
    ],
)
@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_do_what_the_plain_model_does(library, family, found):
    model, clt = LIBRARIES[library](family), make_clt()
    prompt = {key: value for key, value in left_padded(TEXTS).items() if key != "ids"}
    prompt |= {"input_ids": left_padded(TEXTS)["ids"]}
    kept = prompt["attention_mask"].bool()
    arguments: dict[str, Any] = {}
    if found == "given":
        arguments["clt"] = clt
    elif found == "by another name":
        model.add_clt(make_clt(seed=5), mode="observe")
        model.add_clt(clt, mode="observe", name="other")
        arguments["name"] = "other"
    else:
        model.add_clt(clt, mode="observe" if found.endswith("observe") else "replace")
    before, state = logits_of(model), state_of(model)
    for mode in ("direct", "constrained, in the middle", "iterative", "local", "replace"):
        expected = cp.intervene(make_model(family), prompt, EDIT, clt=clt, **MODES[mode])
        # Texts are padded on the left.
        run = cp.intervene(model, TEXTS, EDIT, **MODES[mode], **arguments)
        assert_close(run.logits[kept], expected.logits[kept], rtol=1e-5, atol=1e-5)
        assert_close(run.baseline[kept], expected.baseline[kept], rtol=1e-5, atol=1e-5)
        assert_close(run.after.to_dense()[:, kept], expected.after.to_dense()[:, kept], rtol=1e-5, atol=1e-5)
        assert torch.equal(run.ids, prompt["input_ids"])
        assert run.tokenizer is model.tokenizer
        assert state_of(model) == state
    assert torch.equal(logits_of(model), before)
    assert state_of(model) == state


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_run_that_fails_leaves_the_model_as_it_was(library):
    model, clt = LIBRARIES[library]("gemma2"), make_clt()
    handle = model.add_clt(clt)
    before, state = logits_of(model), state_of(model)
    late = iv.only(iv.add(layer=1, feature=2, value=1.0), tokens=[5])
    embeddings = {"inputs_embeds": torch.randn(1, 4, 16)}
    for mode in ("direct", "iterative", "local", "replace"):
        with pytest.raises(iv.EditError, match="starts from embeddings"):
            cp.intervene(model, embeddings, late, **MODES[mode])
        with pytest.raises(IndexError):
            cp.intervene(model, [2, 3, 61], EDIT, **MODES[mode])
        assert state_of(model) == state
    assert torch.equal(logits_of(model), before)
    handle.remove()
    assert torch.equal(logits_of(model), logits_of(LIBRARIES[library]("gemma2")))


def test_what_is_attached_takes_no_part():
    model, clt = bridge_model("gpt2"), make_clt()
    plain = cp.intervene(make_model("gpt2"), IDS, EDIT, "iterative", clt=clt)
    model.add_clt(clt, mode="replace", edits=iv.ablate(layer=0, feature=list(range(24))))
    model.add_hook("blocks.0.hook_resid_pre", lambda x, hook: x * 2)
    assert_close(cp.intervene(model, IDS, EDIT).logits, plain.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompt", ["w2 w3 w4", [0, 2, 3, 4], [[0, 2, 3, 4]], torch.tensor([0, 2, 3, 4])])
def test_prompts(prompt):
    model, clt = nnsight_model("gpt2"), make_clt()
    expected = cp.intervene(make_model("gpt2"), {"input_ids": torch.tensor([[0, 2, 3, 4]])}, EDIT, clt=clt)
    run = cp.intervene(model, prompt, EDIT, clt=clt)
    assert torch.equal(run.logits, expected.logits)
    assert run.ids.tolist() == [[0, 2, 3, 4]]


# ---------------------------------------------------------------- what is refused


class Forwards:
    """Counts how often a model's embeddings are looked up."""

    def __init__(self, hf: Any) -> None:
        self.count = 0
        hf.get_input_embeddings().register_forward_pre_hook(self._note)

    def _note(self, module: Any, args: Any) -> None:
        self.count += 1


SAVED = iv.from_dict(iv.scale(layer=1, feature=3, by=2.0).to_dict(clt=make_clt(n_latents=7)))
POISONED = torch.tensor(1.0)
REFUSED = {
    "feature": ({"edits": iv.add(layer=1, feature=24, value=1.0)}, "features 0 to 23: there is no feature 24"),
    "layer": ({"edits": iv.add(layer=3, feature=2, value=1.0)}, "no features at layer 3: it has them at 0, 1, 2"),
    "position": ({"edits": iv.only(EDIT, position=9)}, "position 9"),
    "negative position": ({"edits": iv.only(EDIT, position=-10)}, "position -10"),
    "row": ({"edits": iv.only(EDIT, batch=2)}, "batch 2"),
    "condition's feature": ({"edits": iv.only(EDIT, where=iv.active(0, 30))}, "there is no feature 30"),
    "condition's position": ({"edits": iv.only(EDIT, where=iv.active(0, 3, position=9))}, "position 9"),
    "another crosscoder's": ({"edits": SAVED}, "saved for another crosscoder"),
    "NaN since": ({"edits": iv.add(layer=1, feature=3, value=POISONED)}, "finite"),
    "no edit": ({"edits": lambda acts: acts}, "edits are made by functions"),
    "mode": ({"mode": "iterativ"}, "mode must be one of direct, constrained"),
    "no layers": ({"mode": "constrained"}, "layers= says which"),
    "empty layers": ({"mode": "constrained", "layers": []}, "names no layer"),
    "layers elsewhere": ({"mode": "direct", "layers": [1]}, "layers= says which"),
    "layers beyond": ({"mode": "constrained", "layers": range(2, 5)}, "no layer 3: the model has layers 0-2"),
    "layers below": ({"mode": "constrained", "layers": [-1]}, "no layer -1"),
    "text": ({"prompt": "w2 w3"}, "no tokenizer"),
    "texts": ({"prompt": ["w2 w3", "w4"]}, "no tokenizer"),
    "empty": ({"prompt": []}, "a prompt is text, or token ids"),
    "empty row": ({"prompt": torch.zeros(1, 0, dtype=torch.long)}, "a prompt is text, or token ids"),
    "empty arguments": ({"prompt": {"input_ids": torch.zeros(1, 0, dtype=torch.long)}}, "no tokens"),
    "no ids": ({"prompt": {"attention_mask": torch.ones(1, 3)}}, "neither input_ids nor inputs_embeds"),
    "floats": ({"prompt": [1.5, 2.0]}, "a prompt is text, or token ids"),
    "cube": ({"prompt": torch.zeros(1, 2, 3, dtype=torch.long)}, "a prompt is text, or token ids"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_before_the_model_runs(name):
    hf = make_model("gpt2")
    forwards, state = Forwards(hf), None
    arguments, message = REFUSED[name]
    arguments = {"prompt": IDS, "edits": EDIT, "clt": make_clt(), **arguments}
    state = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules()]
    POISONED.fill_(float("nan"))
    try:
        with pytest.raises(iv.EditError, match=message) as raised:
            cp.intervene(hf, **arguments)
    finally:
        POISONED.fill_(1.0)
    assert isinstance(raised.value, ValueError)
    assert forwards.count == 0
    assert state == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules()]
    assert hf.config._attn_implementation == make_model("gpt2").config._attn_implementation
    cp.intervene(hf, IDS, EDIT, clt=make_clt())
    assert forwards.count == 2


def test_a_strength_that_is_not_finite_is_refused_at_once():
    with pytest.raises(iv.EditError, match="finite"):
        iv.scale(layer=1, feature=2, by=float("nan"))


@pytest.mark.parametrize("library", ["plain", *LIBRARIES])
def test_no_crosscoder(library):
    model = {"plain": make_model, **LIBRARIES}[library]("gpt2")
    with pytest.raises(AttachError, match="no crosscoder is attached as 'clt' \\(none is attached\\)"):
        cp.intervene(model, IDS, EDIT)
    if library != "plain":
        model.add_clt(make_clt(), name="other")
        with pytest.raises(AttachError, match="attached are other"):
            cp.intervene(model, IDS, EDIT)


def test_models_that_cannot_be_compared():
    hf, clt = make_model("gpt2"), make_clt()
    with pytest.raises(iv.EditError, match="GPT2Model has no unembedding"):
        cp.intervene(hf.transformer, IDS, EDIT, clt=clt)
    with pytest.raises(FreezeError, match="training mode"):
        cp.intervene(hf.train(), IDS, EDIT, clt=clt)
    narrow = cp.Crosscoder(Wiring.clt(N_LAYERS), 8, 24, "relu")
    with pytest.raises(AttachError, match="width 8"):
        cp.intervene(make_model("gpt2"), IDS, EDIT, clt=narrow)
    with pytest.raises(AttachError, match="selection"):
        cp.intervene(make_model("gpt2"), IDS, EDIT, "replace", clt=clt.select(layers=[0, 1]))


@pytest.mark.parametrize("mode", ["direct", "iterative", "local", "replace"])
def test_an_inactive_feature_that_is_scaled_is_warned_of(mode):
    hf, clt = make_model("gpt2"), make_clt()
    acts = cp.intervene(hf, IDS[:1], EDIT, clt=clt).before.dense(0)
    silent = (acts.amax((0, 1)) == 0).nonzero().flatten().tolist()[0]
    with pytest.warns(UserWarning, match=f"feature {silent} of layer 0 at 0, inactive"):
        run = cp.intervene(hf, IDS[:1], iv.scale(layer=0, feature=silent, by=2.0), mode, clt=clt)
    assert run.logits.shape == (1, 9, 61)


# ---------------------------------------------------------------- the result


def an_intervention(tokenizer: Any = None, **fields: Any) -> Intervention:
    """Two rows of two positions over a vocabulary of four, whose probabilities are known."""
    before = (
        torch.tensor([[[1, 1, 1, 1], [5, 3, 1, 1]], [[1, 1, 1, 1], [1, 1, 1, 7]]]) / torch.tensor([4.0, 10.0])[:, None]
    )
    after = (
        torch.tensor([[[1, 1, 1, 1], [2, 2, 2, 4]], [[1, 1, 1, 1], [1, 1, 1, 7]]]) / torch.tensor([4.0, 10.0])[:, None]
    )
    values: dict[str, Any] = {"before": None, "after": None, "ids": None, "mask": None}
    values |= {"edits": iv.scale(layer=1, feature=2, by=2.0), "mode": "direct", "tokenizer": tokenizer}
    return Intervention(logits=after.log(), baseline=before.log(), **(values | fields))


def near(*changes: TokenChange) -> list[tuple[Any, ...]]:
    return [(c.id, c.text, pytest.approx(c.before, abs=1e-6), pytest.approx(c.after, abs=1e-6)) for c in changes]


def as_tuples(changes: list[TokenChange]) -> list[tuple[Any, ...]]:
    return [(c.id, c.text, c.before, c.after) for c in changes]


def test_top_tokens():
    run = an_intervention()
    # The likeliest two before, and the likeliest after that was not among them.
    first, second, fourth = TokenChange(0, "0", 0.5, 0.2), TokenChange(1, "1", 0.3, 0.2), TokenChange(3, "3", 0.1, 0.4)
    assert as_tuples(run.top_tokens(1)) == near(first, fourth)
    assert as_tuples(run.top_tokens(4)) == near(first, second, TokenChange(2, "2", 0.1, 0.2), fourth)
    assert as_tuples(run.top_tokens(1, batch=1)) == near(TokenChange(3, "3", 0.7, 0.7))
    assert {(c.before, c.after) for c in run.top_tokens(2, position=0)} == {(0.25, 0.25)}
    assert as_tuples(run.top_tokens(10)) == as_tuples(run.top_tokens(4))


def test_probability_change():
    run = an_intervention(make_tokenizer())
    assert as_tuples([run.probability_change(3)]) == near(TokenChange(3, "w3", 0.1, 0.4))
    assert run.probability_change("w3") == run.probability_change(3)
    assert run.probability_change("w3", position=0, batch=1) == TokenChange(3, "w3", 0.25, 0.25)
    with pytest.raises(ValueError, match="2 tokens"):
        run.probability_change("w2 w3")
    with pytest.raises(ValueError, match="no tokenizer"):
        an_intervention().probability_change("w3")
    with pytest.raises(ValueError, match="no token 4"):
        run.probability_change(4)


def test_kl():
    run = an_intervention()
    before, after = torch.tensor([0.5, 0.3, 0.1, 0.1]).double(), torch.tensor([0.2, 0.2, 0.2, 0.4]).double()
    expected = (before * (before / after).log()).sum()
    assert_close(run.kl(), torch.stack((expected, torch.zeros(()).double())), rtol=1e-6, atol=1e-7)
    assert_close(run.kl(position=0), torch.zeros(2).double(), rtol=0, atol=1e-7)


def test_changed_features():
    hf, clt = make_model("gpt2"), make_clt()
    edit = iv.only(iv.add(group={0: 3, 2: 7}, value=[2.0, -3.0]), position=4)
    run = cp.intervene(hf, IDS, edit, "direct", clt=clt)
    assert an_intervention().changed_features() == []
    before = run.before.to_dense()
    expected = [(2, row, 4, 7, float(before[2, row, 4, 7]), float(before[2, row, 4, 7] - 3)) for row in (0, 1)] + [
        (0, row, 4, 3, float(before[0, row, 4, 3]), float(before[0, row, 4, 3] + 2)) for row in (0, 1)
    ]
    found = run.changed_features()
    assert sorted(entry[:4] for entry in found) == sorted(entry[:4] for entry in expected)
    assert [entry[0] for entry in found] == [2, 2, 0, 0]
    values = {entry[:4]: entry[4:] for entry in found}
    for entry in expected:
        assert values[entry[:4]] == pytest.approx(entry[4:], abs=1e-5)
    assert len(run.changed_features(3)) == 3


def test_printed():
    run = an_intervention(make_tokenizer())
    assert str(run).splitlines() == [
        "scale(layer=1, feature=2, by=2.0)",
        f"mode direct, row 0 of 2, KL {float(run.kl()[0]):.4f} nats at the last token",
        "  '<bos>'  0.5000 -> 0.2000  (-0.3000)",
        "  '<eos>'  0.3000 -> 0.2000  (-0.1000)",
        "  'w2'     0.1000 -> 0.2000  (+0.1000)",
        "  'w3'     0.1000 -> 0.4000  (+0.3000)",
    ]
    assert repr(run) == "<Intervention scale(layer=1, feature=2, by=2.0), mode='direct', logits (2, 2, 4)>"
    assert str(an_intervention(edits=None)).startswith("no edit\n")


def test_plotted(tmp_path):
    figure = an_intervention(make_tokenizer()).plot(k=1)
    (axes,) = figure.axes
    before, after = axes.containers
    assert [bar.get_width() for bar in before] == pytest.approx([0.5, 0.1])
    assert [bar.get_width() for bar in after] == pytest.approx([0.2, 0.4])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["'<bos>'", "'w3'"]
    assert axes.get_title() == "scale(layer=1, feature=2, by=2.0), direct"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["before", "after"]
    assert axes.yaxis_inverted()
    assert all(b.get_y() < a.get_y() for b, a in zip(before, after, strict=True))
    figure.savefig(tmp_path / "changes.png")


def test_a_dollar_is_a_dollar(tmp_path):
    figure = plot_token_changes([TokenChange(1, "$x$", 0.1, 0.2)], title="$ $")
    figure.savefig(tmp_path / "changes.png")
    assert figure.axes[0].get_yticklabels()[0].get_text() == r"'\$x\$'"


# ---------------------------------------------------------------- padding does not count

ROW, PAD = [0, 5, 9], [1, 1]
LEFT = {"input_ids": torch.tensor([PAD + ROW]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
RIGHT = {"input_ids": torch.tensor([ROW + PAD]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [LEFT, RIGHT], ids=["left", "right"])
def test_padded_arguments_give_what_the_row_alone_does(padded, family):
    model, clt, edit = model_of(family), clt_of("clt"), iv.only(EDIT, position=-1)
    alone = cp.intervene(model, [ROW], edit, clt=clt)
    run = cp.intervene(model, padded, edit, clt=clt)
    kept = padded["attention_mask"].bool()
    assert_close(run.baseline[kept], alone.baseline[0], **CLOSE)
    assert_close(run.logits[kept], alone.logits[0], **CLOSE)
    assert float(alone.kl()) > 1e-3
    for position in (-1, -3, 0, 2):
        assert_close(run.kl(position), alone.kl(position), **CLOSE)
        assert run.top_tokens(position=position) == near_tokens(alone.top_tokens(position=position))
        expected = alone.probability_change(7, position)
        assert near_tokens([expected]) == [run.probability_change(7, position)]
    assert str(run) == str(alone)


def near_tokens(changes: list[TokenChange]) -> list[TokenChange]:
    return [
        TokenChange(c.id, c.text, pytest.approx(c.before, abs=1e-5), pytest.approx(c.after, abs=1e-5)) for c in changes
    ]


def test_positions_given_are_kept():
    model, given = model_of("gpt2"), torch.tensor([[0, 0, 4, 5, 6]])
    run = cp.intervene(model, {**LEFT, "position_ids": given}, clt=clt_of("clt"))
    expected = model(**LEFT, position_ids=given).logits[:, 2:]
    assert_close(run.baseline[:, 2:], expected, **CLOSE)


def test_a_position_that_a_row_lacks():
    run = an_intervention(mask=torch.tensor([[0, 1], [1, 1]]))
    assert run.top_tokens(position=0) == run.top_tokens(position=-1)
    for position in (1, -2):
        with pytest.raises(iv.EditError, match=f"row 0 has 1 tokens: there is no position {position}"):
            run.kl(position)
    run.top_tokens(position=-2, batch=1)


def test_the_row_shown_is_named():
    assert f"mode direct, row 0 of 2, KL {float(an_intervention().kl()[0]):.4f} nats" in str(an_intervention())
    one = cp.intervene(make_model("gpt2"), IDS[:1], EDIT, clt=make_clt())
    assert " of 1" not in str(one)


BEYOND = {
    "position": (iv.only(iv.add(layer=1, feature=3, value=1.0), position=4), "position 4 is beyond the 3 there are"),
    "from the end": (iv.only(iv.add(layer=1, feature=3, value=1.0), position=-4), "position -4 is beyond the 3"),
    "slice": (iv.only(iv.add(layer=1, feature=3, value=1.0), position=slice(3, None)), "selects none of the 3"),
    "token": (iv.only(iv.add(layer=1, feature=3, value=1.0), tokens=99999), "no token 99999: the model has tokens 0"),
}


@pytest.mark.parametrize("padded", [LEFT, RIGHT], ids=["left", "right"])
@pytest.mark.parametrize("name", BEYOND)
def test_padding_is_no_room_for_positions(name, padded):
    hf = make_model("gpt2")
    forwards, (edit, message) = Forwards(hf), BEYOND[name]
    with pytest.raises(iv.EditError, match=message):
        cp.intervene(hf, padded, edit, clt=make_clt())
    assert forwards.count == 0
    # The longest row decides.
    longer = {"input_ids": torch.tensor([PAD + ROW, [2, *ROW, 7]])}
    longer["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    if name != "token":
        cp.intervene(hf, longer, edit, clt=make_clt())


def test_a_row_of_padding_is_refused():
    with pytest.raises(iv.EditError, match="all padding"):
        cp.intervene(make_model("gpt2"), {**LEFT, "attention_mask": torch.zeros(1, 5).long()}, clt=make_clt())
