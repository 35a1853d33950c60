"""Edits given to `add_clt`, in both libraries: as the same done by hand in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from clt_plugin import AttachError, Wiring
from clt_plugin import interventions as iv
from interventions.oracle_modes import Batch, Change, Hand, changed, run_mode
from support.crosscoders import make_clt
from support.models import D_MODEL, N_LAYERS, bridge_model, make_model, nnsight_model
from support.reference import labels_of, reference_greedy, reference_run
from support.tracing import Fingerprint, left_padded

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
STEPS = 4
TEXTS = ["w5 w17 w33 w60 w8", "w9 w3", "w58 w3 w30 w12"]
PADDED = left_padded(TEXTS)
IDS, MASK, POSITIONS = PADDED["ids"], PADDED["attention_mask"], PADDED["position_ids"]
KEPT = MASK.bool()
MODES = ("replace", "replace_with_error")
LIBRARIES = {"nnsight": nnsight_model, "transformer_lens": bridge_model}


class ByHand:
    """The same edit for `support.reference`: features changed entry by entry, dropped writes taken from the sum.

    Args:
        clt: The crosscoder.
        changes: What is done to features.
        dropped: Writes that are left out, (source layer, target layer).
    """

    def __init__(self, clt: Any, changes: Sequence[Change], dropped: Sequence[tuple[int, int]] = ()) -> None:
        self.clt, self.changes, self.dropped = clt, changes, dropped
        self.natural: dict[int, Tensor] = {}
        self.edited: dict[int, Tensor] = {}

    def features(self, layer: int, acts: Tensor) -> Tensor:
        if layer == 0:
            self.natural, self.edited = {}, {}
        self.natural[layer] = acts
        # Generated tokens follow what was given.
        rows, n = acts.shape[:2]
        mask = MASK if rows == len(MASK) else torch.ones(rows, IDS.shape[1])
        kept = torch.cat((mask, torch.ones(rows, n - mask.shape[1])), dim=1) if n > mask.shape[1] else mask
        self.edited[layer] = changed(self.changes, layer, self.natural, kept[:, :n])
        return self.edited[layer]

    def recon(self, layer: int, y: Tensor) -> Tensor:
        for source, target in self.dropped:
            if target == layer:
                column = D_MODEL * [site.layer for site in self.clt.wiring.writes[source]].index(target)
                y = y - self.edited[source] @ self.clt.W_dec[source][:, column : column + D_MODEL]
        return y

    @property
    def edits(self) -> dict[str, Callable]:
        return {"features": self.features, "recon": self.recon}


def run_in(library: str, model: Any, clt: Any) -> tuple[Tensor, dict[Any, Tensor]]:
    """Logits and features of the padded texts."""
    labels = labels_of(clt)
    if library == "transformer_lens":
        logits, cache = model.run_with_cache(TEXTS)
        return logits, {label: cache[f"blocks.{label}.clt.hook_features"] for label in labels}
    with model.trace(TEXTS):
        features = [].save()
        for label in labels:
            features.append(model.clt.layers[label].features.output)
        logits = model.output.logits.save()
    return logits, dict(zip(labels, features, strict=True))


def natural(family: str, clt: Any, mode: str = "replace_with_error") -> dict[int, Tensor]:
    run = reference_run(make_model(family), IDS, clt, mode, attention_mask=MASK, position_ids=POSITIONS)
    return {layer: acts * KEPT[..., None] for layer, acts in run["features"].items()}


Case = tuple[iv.Edit, list[Change], list[tuple[int, int]]]


def operations(was: dict[int, Tensor]) -> Case:
    a, b, c = was[0].sum((0, 1)).topk(3).indices.tolist()
    d, e, _ = was[2].sum((0, 1)).topk(3).indices.tolist()
    edit = iv.chain(
        iv.scale(layer=0, feature=a, by=2.5),
        iv.only(iv.add(layer=0, feature=[b, c], value=[1.2, -0.8]), position=[-1, 1]),
        iv.set_value(layer=1, feature=4, value=1.5),
        iv.only(iv.ablate(layer=2, feature=d), batch=[0, 2]),
        iv.only(iv.clamp(layer=2, feature=e, max=0.3), position=slice(1, None)),
    )
    changes = [
        Change(0, a, lambda x: 2.5 * x),
        Change(0, b, lambda x: x + 1.2, lambda row, p, n, _: p in (1, n - 1)),
        Change(0, c, lambda x: x - 0.8, lambda row, p, n, _: p in (1, n - 1)),
        Change(1, 4, lambda x: 1.5),
        Change(2, d, lambda x: 0.0, lambda row, p, n, _: row != 1),
        Change(2, e, lambda x: min(x, 0.3), lambda row, p, n, _: p >= 1),
    ]
    return edit, changes, []


def conditions(was: dict[int, Tensor]) -> Case:
    a, b = was[0].sum((0, 1)).topk(2).indices.tolist()
    bar = float(was[0][..., a][KEPT].median())
    edit = iv.chain(
        iv.only(iv.add(layer=1, feature=3, value=2.0), where=iv.active(0, a, above=bar)),
        iv.only(iv.add(layer=2, feature=5, value=2.0), where=iv.inactive(0, b, position=2)),
        iv.only(iv.set_value(layer=0, feature=b, value=1.0), tokens=[3, 60]),
    )
    changes = [
        Change(1, 3, lambda x: x + 2.0, lambda row, p, n, now: now[0][p, a] > bar),
        Change(2, 5, lambda x: x + 2.0, lambda row, p, n, now: now[0][2, b] <= 0),
        Change(0, b, lambda x: 1.0, lambda row, p, n, _: int(IDS[row][KEPT[row]][p]) in (3, 60)),
    ]
    return edit, changes, []


def masked(was: dict[int, Tensor]) -> Case:
    edit, changes, _ = operations(was)
    return iv.chain(edit, iv.ablate_cross_layer(pairs=[(0, 2), (1, 2)])), changes, [(0, 2), (1, 2)]


def spanned(was: dict[int, Tensor]) -> Case:
    return iv.only_span(1), [], [(0, 1), (0, 2), (1, 2)]


SKIPS = Wiring.clt(N_LAYERS).with_skips()
CASES = [
    *(("gpt2", settings, case) for settings in ({}, {"exclude_first": 1}) for case in (operations, masked)),
    *(("gemma2", settings, case) for settings in ({}, {"wiring": SKIPS}) for case in (operations, masked)),
    ("gpt2", {"exclude_first": 1}, conditions),
    ("llama", {}, conditions),
    ("gemma2", {"wiring": SKIPS}, spanned),
]


@pytest.mark.parametrize(("family", "settings", "case"), CASES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_attached_edits_are_the_same_by_hand(library, mode, family, settings, case):
    clt, model, hf = make_clt(**settings), LIBRARIES[library](family), make_model(family)
    edit, changes, dropped = case(natural(family, clt, mode))
    padded = {"attention_mask": MASK, "position_ids": POSITIONS}
    expected = reference_run(hf, IDS, clt, mode, edits=ByHand(clt, changes, dropped).edits, **padded)
    wanted, acts = expected["logits"], expected["features"]
    if mode == "replace" and clt.host.exclude_first:
        # There the model's own output stays, and what edits write is added to it, which is not the reference's affair.
        by_hand = Hand(make_model(family, torch.float64))
        outcome = run_mode(by_hand, make_clt(**settings).double(), Batch(IDS, KEPT), changes, mode, dropped=dropped)
        assert case is conditions or not outcome.after.logits[KEPT].allclose(wanted[KEPT].double(), atol=1e-3)
        wanted, acts = outcome.after.logits.float(), {k: v.float() for k, v in outcome.edited.items()}
    unedited = reference_run(hf, IDS, clt, mode, **padded)["logits"]
    assert not wanted[KEPT].allclose(unedited[KEPT], atol=1e-2), "the edit should show"

    handle = model.add_clt(clt, mode=mode, edits=edit)
    logits, features = run_in(library, model, clt)
    assert_close(logits[KEPT], wanted[KEPT], **CLOSE)
    for label, value in features.items():
        assert_close(value[KEPT], acts[label][KEPT], **CLOSE)
    assert torch.equal(run_in(library, model, clt)[0], logits)
    handle.remove()
    model.add_clt(clt, mode=mode)
    assert_close(run_in(library, model, clt)[0][KEPT], unedited[KEPT], **CLOSE)


@pytest.mark.parametrize("library", LIBRARIES)
def test_users_edits_act_on_what_attached_edits_left(library):
    model, clt = LIBRARIES[library]("gpt2"), make_clt()
    model.add_clt(clt, edits=iv.set_value(layer=1, feature=3, value=2.0))

    def by_hand(layer: int, acts: Tensor) -> Tensor:
        if layer == 1:
            acts[..., 3] = 6.0
        return acts

    ids = IDS[:1]
    expected = reference_run(make_model("gpt2"), ids, clt, edit=by_hand)["logits"]
    if library == "nnsight":
        with model.trace(ids):
            model.clt.layers[1].features.output *= 3
            model.clt.layers[1].features.output[..., [f for f in range(24) if f != 3]] /= 3
            logits = model.output.logits.save()
    else:

        def triple(acts: Tensor, hook: Any) -> Tensor:
            acts[..., 3] *= 3
            return acts

        logits = model.run_with_hooks(ids, fwd_hooks=[("blocks.1.clt.hook_features", triple)])
    assert_close(logits, expected, **CLOSE)


# ---------------------------------------------------------------- generation


def lengths() -> list[int]:
    return MASK.sum(1).tolist()


def where_generated(row: int, position: int, length: int, now: Any) -> bool:
    return position >= lengths()[row]


def where_given(row: int, position: int, length: int, now: Any) -> bool:
    return position < lengths()[row]


GENERATION: dict[str, tuple[dict[str, Any], Callable]] = {
    "everywhere": ({}, lambda row, p, n, now: True),
    "prompt": ({"tokens": "prompt"}, where_given),
    "generated": ({"tokens": "generated"}, where_generated),
    "positions": ({"position": [1, 5]}, lambda row, p, n, now: p in (1, 5)),
    "from a position": ({"position": slice(4, None)}, lambda row, p, n, now: p >= 4),
    # The last so far, in each pass: the prompt's last, and each generated token when its turn comes.
    "the last": ({"position": -1}, lambda row, p, n, now: p >= lengths()[row] - 1),
    "rows": ({"batch": 1}, lambda row, p, n, now: row == 1),
    "condition": (
        {"where": iv.active(0, 3, above=0.2), "tokens": "generated"},
        lambda row, p, n, now: p >= lengths()[row] and now[0][p, 3] > 0.2,
    ),
}


def generate(library: str, model: Any, cached: bool = True) -> Tensor:
    if library == "nnsight":
        with model.generate(TEXTS, max_new_tokens=STEPS, do_sample=False, use_cache=cached) as tracer:
            out = tracer.result.save()
        return out
    settings = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    return model.generate(TEXTS, max_new_tokens=STEPS, use_past_kv_cache=cached, **settings)


@pytest.mark.parametrize("where", GENERATION)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_greedy_generation_with_edits(library, mode, where):
    clt, model, hf = make_clt(), LIBRARIES[library]("gpt2"), make_model("gpt2")
    restricted, place = GENERATION[where]
    edit = iv.add(group={0: [3, 5], 1: 2}, value=[4.0, -3.0, 5.0])
    changes = [
        Change(layer, feature, lambda x, value=value: x + value, place)
        for layer, feature, value in ((0, 3, 4.0), (0, 5, -3.0), (1, 2, 5.0))
    ]
    edit = iv.chain(iv.only(edit, **restricted) if restricted else edit, iv.ablate_cross_layer(pairs=[(0, 2)]))
    runs = reference_greedy(hf, IDS, clt, mode, STEPS, MASK, edits=ByHand(clt, changes, [(0, 2)]).edits)
    plain = reference_greedy(hf, IDS, clt, mode, STEPS, MASK, edits=ByHand(clt, [], [(0, 2)]).edits)
    wanted = runs[-1]["ids"]
    assert float((runs[-1]["logits"] - plain[-1]["logits"])[:, -1].abs().max()) > 5e-3
    model.add_clt(clt, mode=mode, edits=edit)
    if library == "nnsight":
        with model.generate(TEXTS, max_new_tokens=STEPS, do_sample=False) as tracer:
            logits = [].save()
            for _step in tracer.iter[:STEPS]:
                logits.append(model.output.logits[:, -1])
            out = tracer.result.save()
    else:
        seen: list[Tensor] = []
        hook = model.original_model.get_output_embeddings().register_forward_hook(lambda m, a, y: seen.append(y[:, -1]))
        out, logits = generate(library, model), seen
        hook.remove()
    assert torch.equal(out[:, -STEPS:], wanted[:, -STEPS:])
    for step, run in enumerate(runs):
        assert_close(logits[step], run["logits"][:, -1], rtol=1e-4, atol=1e-4, msg=lambda text, n=step: f"{n}: {text}")


def test_invokes_keep_their_rows():
    """One run of several invokes is one batch: rows count through all of them."""
    clt, model = make_clt(), nnsight_model("gpt2")
    before = Fingerprint(model)
    edit, changes, dropped = masked(natural("gpt2", clt, "replace"))
    expected = reference_run(
        make_model("gpt2"),
        IDS,
        clt,
        "replace",
        attention_mask=MASK,
        position_ids=POSITIONS,
        edits=ByHand(clt, changes, dropped).edits,
    )
    handle = model.add_clt(clt, edits=edit)
    with model.trace() as tracer:
        with tracer.invoke(TEXTS[0]):
            acts = model.clt.layers[1].features.output.save()
            first = model.output.logits.save()
        with tracer.invoke(TEXTS[1:]):
            rest = model.output.logits.save()
    assert_close(first[KEPT[:1]], expected["logits"][:1][KEPT[:1]], **CLOSE)
    assert_close(rest[KEPT[1:]], expected["logits"][1:][KEPT[1:]], **CLOSE)
    assert_close(acts[KEPT[:1]], expected["features"][1][:1][KEPT[:1]], **CLOSE)
    handle.remove()
    before.assert_unchanged()


def test_the_first_line_of_one_invoke_edits_its_rows_alone():
    clt, model = make_clt(), nnsight_model("gpt2")
    before, hf = Fingerprint(model), make_model("gpt2")
    padded = {"attention_mask": MASK, "position_ids": POSITIONS}
    # Rows count within the invoke, as its points do.
    edit = iv.only(iv.add(layer=0, feature=3, value=4.0), batch=0, position=-1)
    with model.trace() as tracer:
        with tracer.invoke(TEXTS[0]):
            first = model.output.logits.save()
        with tracer.invoke(TEXTS[1:]):
            model.add_clt(clt, edits=edit)
            rest = model.output.logits.save()
    change = Change(0, 3, lambda x: x + 4.0, lambda row, p, n, now: row == 1 and p == n - 1)
    hand = ByHand(clt, [change])
    edited = reference_run(hf, IDS, clt, "replace", edits=hand.edits, **padded)["logits"]
    assert_close(first[KEPT[:1]], hf(IDS, **padded).logits[:1][KEPT[:1]], **CLOSE)
    assert_close(rest[KEPT[1:]], edited[1:][KEPT[1:]], **CLOSE)
    before.assert_unchanged()


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_gradients_in_strengths(library, mode):
    """As in the reference, whose errors are detached too; in replace also as finite differences have it."""
    ids, weights = IDS[:1], torch.randn(61, dtype=torch.float64)
    clt = make_clt(dtype=torch.float64)
    model = LIBRARIES[library](make_model("gpt2", torch.float64))
    add, other = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.7, 1.4))
    edit = iv.chain(
        iv.only(iv.add(layer=0, feature=[3, 5], value=add), position=2), iv.set_value(layer=1, feature=2, value=other)
    )

    def by_hand(add: Any, other: Any) -> Tensor:
        def change(layer: int, acts: Tensor) -> Tensor:
            acts = acts.clone()
            if layer == 0:
                acts[:, 2, [3, 5]] = acts[:, 2, [3, 5]] + add
            if layer == 1:
                acts[..., 2] = other
            return acts

        run = reference_run(make_model("gpt2", torch.float64), ids, clt, mode, edit=change)
        return (run["logits"] @ weights).sum()

    model.add_clt(clt, mode=mode, edits=edit)
    if library == "nnsight":
        with model.trace(ids):
            total = (model.output.logits @ weights).sum().save()
    else:
        total = (model(ids, return_type="logits") @ weights).sum()
    assert_close(total, by_hand(add, other), rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad(total, [add, other])
    assert_close(found, torch.autograd.grad(by_hand(add, other), [add, other]), rtol=1e-8, atol=1e-8)
    assert min(float(gradient.abs()) for gradient in found) > 1e-3
    if mode == "replace":
        eps = 1e-5
        differences = (
            (by_hand(0.7 + eps, 1.4) - by_hand(0.7 - eps, 1.4)) / (2 * eps),
            (by_hand(0.7, 1.4 + eps) - by_hand(0.7, 1.4 - eps)) / (2 * eps),
        )
        assert_close(found, differences, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("edit", "mode", "message"),
    [
        (iv.add(layer=1, feature=24, value=1.0), "replace", "there is no feature 24"),
        (iv.add(layer=5, feature=2, value=1.0), "replace", "no features at layer 5"),
        (iv.ablate_cross_layer(source=2), "replace", None),
        (iv.ablate_cross_layer(target=7), "replace", "target 7"),
        (iv.from_dict(iv.add(layer=0, feature=1, value=1.0).to_dict(make_clt(n_latents=9))), "replace", "saved for"),
        (iv.add(layer=1, feature=2, value=1.0), "observe", "edits would have no effect"),
    ],
)
@pytest.mark.parametrize("library", LIBRARIES)
def test_edits_that_do_not_fit_are_refused_and_nothing_stays(library, edit, mode, message):
    model, clt = LIBRARIES[library]("gpt2"), make_clt()
    if message is None:
        model.add_clt(clt, mode=mode, edits=edit).remove()
        return
    with pytest.raises((iv.EditError, AttachError), match=message):
        model.add_clt(clt, mode=mode, edits=edit)
    assert not hasattr(model, "clt") if library == "nnsight" else "blocks.0.clt.hook_features" not in model.hook_dict
    model.add_clt(clt)
    assert_close(
        run_in(library, model, clt)[0][KEPT],
        reference_run(make_model("gpt2"), IDS, clt, attention_mask=MASK, position_ids=POSITIONS)["logits"][KEPT],
        **CLOSE,
    )
