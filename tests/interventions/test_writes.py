"""Write masks against dense loops in float64, and against a crosscoder with decoder entries zeroed by hand."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from clt_plugin import SparseFeatures, Wiring, WiringError
from clt_plugin import interventions as iv
from clt_plugin.core.features import SparseGroup
from clt_plugin.interventions.writes import decode, drops
from core.oracle import build, inputs, random_features
from core.test_lazy import on_disk

EXACT = {"rtol": 1e-12, "atol": 1e-12}

# name: the mask, and which (source, target) it drops, said once more
MASKS = {
    "all": (iv.ablate_cross_layer(), lambda s, t: s != t),
    "pairs": (iv.ablate_cross_layer(pairs=[(0, 1), (1, 2)]), lambda s, t: (s, t) in [(0, 1), (1, 2)]),
    "distance": (iv.ablate_cross_layer(min_distance=2), lambda s, t: t - s >= 2),
    "source": (iv.ablate_cross_layer(source=0), lambda s, t: s == 0 and t != 0),
    "target": (iv.ablate_cross_layer(target=[1, 2]), lambda s, t: t in (1, 2) and s != t),
    "both": (iv.ablate_cross_layer(source=0, target=2, min_distance=2), lambda s, t: (s, t) == (0, 2)),
    "span": (iv.only_span(2), lambda s, t: t - s >= 2),
    "whole span": (iv.only_span(9), lambda s, t: False),
    "chained": (
        iv.chain(iv.only_span(2), iv.ablate_cross_layer(target=1), iv.ablate(layer=0, feature=1)),
        lambda s, t: t - s >= 2 or (t == 1 and s != 1),
    ),
}
CASES = [(wiring, mask) for wiring in ("clt", "skips", "ragged_latents", "strictly_causal", "sum") for mask in MASKS]
CASES += [("local_clt", mask) for mask in ("all", "pairs", "source", "target", "span")]
CASES += [("plt", mask) for mask in ("all", "distance", "source", "target", "whole span")]


def dense_loops(cc, features, dropped, x):
    """Sum over groups, sites, latents and tokens, one write at a time: {site: (T, d)}."""
    result = {}
    for number, site in enumerate(cc.wiring.write_sites):
        y = cc.b_dec[number].detach().expand(len(features[0]), -1).clone()
        for g, acts in enumerate(features):
            column, source = 0, max((read.order, read.layer) for read in cc.wiring.reads[g])[1]
            for written in cc.wiring.writes[g]:
                width = cc.layout.width[written]
                if written == site and not dropped(source, site.layer):
                    for token in range(len(acts)):
                        for latent in range(acts.shape[-1]):
                            y[token] += acts[token, latent] * cc.W_dec[g][latent, column : column + width].detach()
                column += width
        for n, (read, write) in enumerate(cc.wiring.skips):
            if write == site:
                y = y + x[read] @ cc.W_skip[n].detach()
        result[site] = y
    return result


def zeroed(cc, dropped):
    """A copy with the decoder entries of dropped writes at zero."""
    other = copy.deepcopy(cc)
    for g, writes in enumerate(cc.wiring.writes):
        for site in writes:
            if dropped(cc.wiring.home[g], site.layer):
                other.W_dec[g].data[:, cc.layout.write_slices[g][site]] = 0
    return other


def as_sparse(features):
    return SparseFeatures(tuple(SparseGroup.of(acts) for acts in features), (len(features[0]),), stacked=False)


@pytest.mark.parametrize("lazy", [False, True], ids=["in memory", "lazy"])
@pytest.mark.parametrize(("wiring", "mask"), CASES)
def test_decode_without_dropped_writes(wiring, mask, lazy, tmp_path):
    edit, dropped = MASKS[mask]
    cc = build(wiring).requires_grad_(False)
    if wiring == "plt" and mask == "distance":
        edit.check(cc)
    x, features = inputs(cc, (4,)), [f.detach() for f in random_features(cc, (4,))]
    expected, by_hand = dense_loops(cc, features, dropped, x), zeroed(cc, dropped).decode(features, x)
    held = [w.clone() for w in cc.W_dec]
    subject = on_disk(cc, tmp_path) if lazy else cc
    for given_features in (features, as_sparse(features)):
        y = decode(subject, given_features, edit, x)
        assert list(y) == list(expected)
        for site, value in expected.items():
            assert_close(y[site], value, **EXACT)
            assert_close(y[site], by_hand[site], **EXACT)
    assert subject.is_lazy == lazy
    assert all(torch.equal(now, before) for now, before in zip(cc.W_dec, held, strict=True))
    some = {(g, site) for g, sites in enumerate(cc.wiring.writes) for site in sites}
    assert drops(edit, cc.wiring) == {(g, s) for g, s in some if dropped(cc.wiring.home[g], s.layer)}


@pytest.mark.parametrize("shape", [(3,), (2, 3), (0,)])
@pytest.mark.parametrize("wiring", ["clt", "skips", "ragged_latents"])
def test_results_have_the_form_of_decode(wiring, shape):
    cc = build(wiring).requires_grad_(False)
    x = torch.stack(list(inputs(cc, shape).values()))
    for sparse in (False, True):
        features = cc.encode(x, sparse=sparse)
        for edit in (iv.ablate_cross_layer(), iv.only_span(9)):
            got, like = decode(cc, features, edit, x), cc.decode(features, x)
            assert type(got) is type(like)
            assert got.shape == like.shape
        assert_close(decode(cc, features, iv.only_span(9), x), cc.decode(features, x), **EXACT)


def test_gradients_reach_features_and_weights_that_are_kept():
    cc = build("clt")
    features = torch.stack([f.requires_grad_() for f in random_features(cc, (4,))])
    other = zeroed(cc, MASKS["all"][1])
    got = torch.autograd.grad(decode(cc, features, MASKS["all"][0]).square().sum(), [features, *cc.W_dec])
    expected = torch.autograd.grad(other.decode(features).square().sum(), [features, *other.W_dec])
    assert_close(got[0], expected[0], **EXACT)
    for g, (ours, theirs) in enumerate(zip(got[1:], expected[1:], strict=True)):
        for site, columns in cc.layout.write_slices[g].items():
            kept = site.layer == cc.wiring.home[g]
            assert_close(ours[:, columns], theirs[:, columns] * kept, **EXACT)


def test_the_fvu_of_an_ablated_clt_rises():
    # A crosscoder that reconstructs exactly what it wrote: without its cross-layer writes it does not.
    cc = build("clt").requires_grad_(False)
    features = torch.stack([f.abs() for f in random_features(cc, (50,))])
    y = cc.decode(features)

    def fvu(found):
        return ((found - y).square().sum((1, 2)) / (y - y.mean(1, keepdim=True)).square().sum((1, 2))).tolist()

    first, *later = fvu(decode(cc, features, iv.ablate_cross_layer()))
    assert first == pytest.approx(0, abs=1e-20)
    assert min(later) > 0.1
    assert fvu(decode(cc, features, iv.chain())) == [0, 0, 0]


layers = st.none() | st.lists(st.integers(0, 4), min_size=1, max_size=3)
pairs = st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(lambda pair: pair[0] != pair[1])
masks = st.one_of(
    st.builds(iv.ablate_cross_layer, source=layers, target=layers, min_distance=st.integers(1, 4)),
    st.builds(iv.ablate_cross_layer, pairs=st.lists(pairs, min_size=1, max_size=3), min_distance=st.integers(1, 3)),
    st.builds(iv.only_span, st.integers(1, 5)),
)


@given(masks, masks)
def test_a_write_survives_if_every_mask_keeps_it(a, b):
    wiring = Wiring.clt(5)
    assert drops(iv.chain(a, b), wiring) == drops(a, wiring) | drops(b, wiring)
    assert all(a.keeps(layer, layer) for layer in range(5))
    assert iv.from_json(iv.chain(a, b).to_json()) == iv.chain(a, b)
    assert eval(repr(a), {"ablate_cross_layer": iv.ablate_cross_layer}) == a


@given(st.integers(1, 6), st.integers(1, 6))
def test_only_span_leaves_the_writes_of_a_local_clt(k, n_layers):
    dropped = drops(iv.only_span(k), Wiring.clt(n_layers))
    kept = [tuple(s for s in sites if (g, s) not in dropped) for g, sites in enumerate(Wiring.clt(n_layers).writes)]
    assert tuple(kept) == Wiring.local_clt(n_layers, span=k).writes


def test_wirings_with_writes_to_earlier_layers():
    # One group, at home where it last reads: every other layer is another layer.
    acausal = Wiring.acausal(range(3))
    assert {site.layer for _, site in drops(iv.ablate_cross_layer(), acausal)} == {0, 1}
    assert {site.layer for _, site in drops(iv.only_span(2), acausal)} == {0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: iv.only_span(0), "the least distance is 1, not 0"),
        (lambda: iv.ablate_cross_layer(min_distance=1.5), "the distance is a whole number, not 1.5"),
        (lambda: iv.ablate_cross_layer(pairs=[]), "at least one"),
        (lambda: iv.ablate_cross_layer(pairs=[(0, 1)], target=1), "instead of source= and target="),
        (lambda: iv.ablate_cross_layer(pairs=[(1, 1)]), "two different layers, not (1, 1)"),
        (lambda: iv.ablate_cross_layer(pairs=[0, 1]), "two different layers, not 0"),
        (lambda: iv.ablate_cross_layer(source=["a"]), "a source layer is a whole number, not 'a'"),
    ],
)
def test_masks_that_cannot_be(make, message):
    with pytest.raises(iv.EditError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("edit", "wiring", "message"),
    [
        (iv.ablate_cross_layer(source=3), "clt", "no write of this crosscoder has source 3: there are 0, 1, 2"),
        (iv.ablate_cross_layer(target=-1), "clt", "has target -1"),
        (iv.ablate_cross_layer(pairs=[(1, 2), (2, 1)]), "clt", "layer 2 does not write layer 1 in this crosscoder"),
        (iv.ablate_cross_layer(pairs=[(0, 2)]), "local_clt", "layer 0 does not write layer 2"),
    ],
)
def test_masks_that_do_not_fit(edit, wiring, message):
    cc = build(wiring)
    for refused in (lambda: edit.check(cc), lambda: decode(cc, torch.zeros(3, 2, 6), iv.chain(edit))):
        with pytest.raises(iv.EditError, match=re.escape(message)):
            refused()


def test_features_that_do_not_fit():
    cc = build("skips")
    with pytest.raises(WiringError, match="3 groups, but the features have 2"):
        decode(cc, torch.zeros(2, 4, 6), iv.ablate_cross_layer())
    with pytest.raises(WiringError, match="group 0 has 6 latents, but its features have 5"):
        decode(cc, torch.zeros(3, 4, 5), iv.ablate_cross_layer())
    with pytest.raises(WiringError, match="affine skips, which read x"):
        decode(cc, torch.zeros(3, 4, 6, dtype=cc.dtype), iv.ablate_cross_layer())
