"""Who reads and writes what: every constructor against a table written by hand, and what is refused."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clt_plugin.core import SITE_NAMES, Layout, Site, Wiring, WiringError


def sites(text: str) -> tuple[Site, ...]:
    """Read "mlp_in.0 chat:mlp_in.1" as sites."""
    found = []
    for word in text.split():
        model, _, rest = word.rpartition(":")
        name, layer = rest.split(".")
        found.append(Site(model or "model", name, int(layer)))
    return tuple(found)


# name: (wiring, [(what a group reads, what it writes)])
TABLES = {
    "sae": (Wiring.sae(2), [("resid_post.2", "resid_post.2")]),
    "sae of a site": (Wiring.sae(("attn_out", 1)), [("attn_out.1", "attn_out.1")]),
    "plt": (Wiring.plt(3), [("mlp_in.0", "mlp_out.0"), ("mlp_in.1", "mlp_out.1"), ("mlp_in.2", "mlp_out.2")]),
    "clt": (
        Wiring.clt(3),
        [
            ("mlp_in.0", "mlp_out.0 mlp_out.1 mlp_out.2"),
            ("mlp_in.1", "mlp_out.1 mlp_out.2"),
            ("mlp_in.2", "mlp_out.2"),
        ],
    ),
    "clt with other sites": (
        Wiring.clt(2, read="resid_mid", write="mlp_out_before_norm"),
        [("resid_mid.0", "mlp_out_before_norm.0 mlp_out_before_norm.1"), ("resid_mid.1", "mlp_out_before_norm.1")],
    ),
    "local_clt": (
        Wiring.local_clt(4, span=2),
        [
            ("mlp_in.0", "mlp_out.0 mlp_out.1"),
            ("mlp_in.1", "mlp_out.1 mlp_out.2"),
            ("mlp_in.2", "mlp_out.2 mlp_out.3"),
            ("mlp_in.3", "mlp_out.3"),
        ],
    ),
    "acausal": (
        Wiring.acausal([0, 2, ("attn_out", 1)]),
        [("resid_post.0 resid_post.2 attn_out.1", "resid_post.0 resid_post.2 attn_out.1")],
    ),
    "weakly_causal": (
        Wiring.weakly_causal([0, 1, 3]),
        [
            ("resid_post.0", "resid_post.0 resid_post.1 resid_post.3"),
            ("resid_post.1", "resid_post.1 resid_post.3"),
            ("resid_post.3", "resid_post.3"),
        ],
    ),
    "strictly_causal": (
        Wiring.strictly_causal(4),
        [
            ("resid_post.0", "mlp_out.1 mlp_out.2 mlp_out.3"),
            ("resid_post.1", "mlp_out.2 mlp_out.3"),
            ("resid_post.2", "mlp_out.3"),
        ],
    ),
    "pre_post_mlp": (Wiring.pre_post_mlp(3), [("mlp_in.3", "mlp_in.3 mlp_out.3")]),
    "pre_post_mlp both": (Wiring.pre_post_mlp(3, reads="both"), [("mlp_in.3 mlp_out.3", "mlp_in.3 mlp_out.3")]),
    "model_diff": (
        Wiring.model_diff(["base", "chat", "code"], layer=5, site="resid_pre"),
        [("base:resid_pre.5 chat:resid_pre.5 code:resid_pre.5", "base:resid_pre.5 chat:resid_pre.5 code:resid_pre.5")],
    ),
    "sum": (
        Wiring.strictly_causal(2) + Wiring.weakly_causal([("attn_out", 0), ("attn_out", 1)]),
        [
            ("resid_post.0", "mlp_out.1"),
            ("attn_out.0", "attn_out.0 attn_out.1"),
            ("attn_out.1", "attn_out.1"),
        ],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_constructors(name):
    wiring, table = TABLES[name]
    assert wiring.reads == tuple(sites(reads) for reads, _ in table)
    assert wiring.writes == tuple(sites(writes) for _, writes in table)
    assert wiring.skips == ()
    assert wiring.n_groups == len(table)
    assert wiring == Wiring(wiring.reads, wiring.writes)


@pytest.mark.parametrize("name", TABLES)
def test_what_a_wiring_holds(name):
    wiring, table = TABLES[name]
    reads, writes = " ".join(r for r, _ in table), " ".join(w for _, w in table)
    assert wiring.read_sites == tuple(dict.fromkeys(sites(reads)))
    assert wiring.write_sites == tuple(dict.fromkeys(sites(writes)))
    layers = sorted({site.layer for site in sites(reads + " " + writes)})
    assert (wiring.layers, wiring.n_layers) == (tuple(layers), len(layers))
    for site in wiring.write_sites:
        assert wiring.writers(site) == tuple(g for g, (_, w) in enumerate(table) if str(site) in w.split())


def test_home_is_the_layer_of_the_last_read():
    assert Wiring.clt(3).home == (0, 1, 2)
    assert Wiring.acausal([0, 2]).home == (2,)
    assert Wiring((sites("mlp_in.4 resid_mid.1"),), (sites("mlp_out.5"),)).home == (4,)
    assert TABLES["sum"][0].home == (0, 0, 1)


def test_sites_are_in_the_order_of_the_forward_pass():
    order = sites(" ".join(f"{name}.{layer}" for layer in (0, 1) for name in SITE_NAMES))
    assert list(order) == sorted(order, key=lambda site: site.order)
    assert (str(order[0]), str(Site("chat", "mlp_in", 3))) == ("resid_pre.0", "chat:mlp_in.3")


# ---------------------------------------------------------------- what is refused

A, B = Site("model", "mlp_in", 0), Site("model", "mlp_out", 0)

REFUSED = {
    "no groups": (lambda: Wiring((), ()), "at least one group"),
    "uneven": (lambda: Wiring(((A,),), ((B,), (B,))), "1 groups read but 2 write"),
    "reads nothing": (lambda: Wiring(((),), ((B,),)), "group 0 reads no site"),
    "writes nothing": (lambda: Wiring(((A,), (A,)), ((B,), ())), "group 1 writes no site"),
    "reads twice": (lambda: Wiring(((A, A),), ((B,),)), r"group 0 reads mlp_in\.0 more than once"),
    "writes twice": (lambda: Wiring(((A,),), ((B, B),)), r"group 0 writes mlp_out\.0 more than once"),
    "skip from nowhere": (lambda: Wiring(((A,),), ((B,),), ((B, A),)), "joins a read site to a written one"),
    "two skips": (lambda: Wiring(((A, B),), ((B,),), ((A, B), (B, B))), r"mlp_out\.0 has more than one skip"),
    "unknown site": (lambda: Site("model", "mlp", 0), "no site is called 'mlp': the sites are resid_pre"),
    "negative layer": (lambda: Site("model", "mlp_in", -1), "a block's index from 0, not -1"),
    "no layers": (lambda: Wiring.clt(0), "n_layers must be a whole number of at least 1, not 0"),
    "no span": (lambda: Wiring.local_clt(3, span=0), "span must be a whole number of at least 1, not 0"),
    "not a site": (lambda: Wiring.sae(1.5), r"a site is a Site, a layer's index or a \(name, layer\) pair, not 1\.5"),
    "nothing to be acausal over": (lambda: Wiring.acausal([]), "group 0 reads no site"),
    "causal out of order": (lambda: Wiring.weakly_causal([1, 0]), "in the order of the forward pass"),
    "causal with a repeat": (lambda: Wiring.weakly_causal([0, 0, 1]), "distinct and in the order"),
    "nothing later": (lambda: Wiring.strictly_causal(1), "needs at least two layers"),
    "odd reads": (lambda: Wiring.pre_post_mlp(0, reads="mlp_out"), "'mlp_in' or 'both', not 'mlp_out'"),
    "one model": (lambda: Wiring.model_diff(["base"], 0), "at least two models with different names"),
    "a model twice": (lambda: Wiring.model_diff(["base", "base"], 0), "at least two models with different names"),
    "not a description": (lambda: Wiring.from_dict({"sites": []}), "not the description of a wiring"),
    "a site that is not there": (
        lambda: Wiring.from_dict({"sites": [["model", "mlp_in", 0]], "reads": [[0]], "writes": [[1]]}),
        "not the description of a wiring",
    ),
    "no width": (lambda: Layout.of(Wiring.plt(1), {A: 4}), r"no width for mlp_out\.0: name the site, or its model"),
    "zero width": (lambda: Layout.of(Wiring.plt(1), 0), r"the width of mlp_in\.0 must be a whole number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(WiringError, match=message):
        make()


def test_adding_something_else():
    with pytest.raises(TypeError, match="unsupported operand"):
        Wiring.clt(2) + "more"


# ---------------------------------------------------------------- sums, skips, selection


def test_sums():
    left, right = Wiring.clt(2).with_skips(), Wiring.plt(2).with_skips()
    both = left + right
    assert both.reads == left.reads + right.reads
    assert both.writes == left.writes + right.writes
    assert both.skips == left.skips
    assert both.name == "clt(2) + plt(2)"
    assert both.writers(Site("model", "mlp_out", 1)) == (0, 1, 3)


def test_skips():
    assert Wiring.clt(2).with_skips().skips == (sites("mlp_in.0 mlp_out.0"), sites("mlp_in.1 mlp_out.1"))
    across = [sites("mlp_in.0 mlp_out.1")]
    assert Wiring.clt(2).with_skips(across).skips == tuple(across)
    # Only layers that are read have a site to start from.
    assert Wiring.strictly_causal(3).with_skips().skips == (sites("resid_post.1 mlp_out.1"),)
    assert Wiring.clt(2).with_skips() != Wiring.clt(2)


def test_select():
    part = Wiring.clt(4).with_skips().select([2, 1])
    assert part.reads == (sites("mlp_in.2"), sites("mlp_in.1"))
    assert part.writes == (sites("mlp_out.2 mlp_out.3"), sites("mlp_out.1 mlp_out.2 mlp_out.3"))
    assert part.skips == (sites("mlp_in.1 mlp_out.1"), sites("mlp_in.2 mlp_out.2"))
    assert part.write_sites == sites("mlp_out.2 mlp_out.3 mlp_out.1")
    assert part.name == "clt(4), groups [2, 1]"
    with pytest.raises(WiringError, match="at least one group"):
        Wiring.clt(4).select([])


# ---------------------------------------------------------------- standing in for MLPs

REPLACES = {
    "plt": Wiring.plt(3),
    "clt": Wiring.clt(3),
    "clt reading resid_mid": Wiring.clt(3, read="resid_mid"),
    "clt writing before the post-norm": Wiring.clt(3, write="mlp_out_before_norm"),
    "clt with skips": Wiring.clt(3).with_skips(),
    "local_clt": Wiring.local_clt(4, 2),
    "strictly_causal": Wiring.strictly_causal(3),
    "several reads": Wiring((sites("mlp_in.0 mlp_in.1"),), (sites("mlp_out.1 mlp_out.2"),)),
}

OBSERVES = {
    "sae": (Wiring.sae(1), "it writes resid_post, not MLP outputs alone"),
    "acausal": (Wiring.acausal(range(2)), "it writes resid_post, not MLP outputs alone"),
    "pre_post_mlp": (Wiring.pre_post_mlp(1), "it writes mlp_in, not MLP outputs alone"),
    "sum": (TABLES["sum"][0], "it writes attn_out, not MLP outputs alone"),
    "model_diff": (Wiring.model_diff(["base", "chat"], 1), "it spans the models base, chat"),
    "late read": (
        Wiring((sites("mlp_in.0 mlp_in.1"),), (sites("mlp_out.0 mlp_out.1"),)),
        "group 0 writes mlp_out.0, which a forward pass reaches before mlp_in.1 is read",
    ),
    "reads what it writes": (
        Wiring.sae(("mlp_out", 1)),
        "group 0 writes mlp_out.1, which a forward pass reaches before mlp_out.1 is read",
    ),
    "both sides of a post-norm": (
        Wiring((sites("mlp_in.0"),), (sites("mlp_out.0 mlp_out_before_norm.0"),)),
        "it writes an MLP's output both before and after its post-norm",
    ),
    "skip backwards": (
        Wiring.strictly_causal(3).with_skips(),
        "the skip resid_post.1 -> mlp_out.1 runs backwards",
    ),
}


@pytest.mark.parametrize("name", REPLACES)
def test_can_replace(name):
    assert REPLACES[name].why_not_replace() is None


@pytest.mark.parametrize("name", OBSERVES)
def test_cannot_replace(name):
    wiring, reason = OBSERVES[name]
    assert wiring.why_not_replace() == reason


# ---------------------------------------------------------------- for people and files


def test_repr():
    assert repr(Wiring.clt(3)) == "<Wiring clt(3): 3 groups, reads mlp_in, writes mlp_out, layers 0-2>"
    assert repr(Wiring.sae(4)) == "<Wiring sae(resid_post.4): 1 group, reads resid_post, writes resid_post, layer 4>"
    assert repr(Wiring.plt(2).with_skips()).endswith("layers 0-1, 2 affine skips>")


def test_draw():
    assert Wiring.local_clt(3, span=2).draw().splitlines() == [
        "local_clt(3, span=2): reads (r) mlp_in, writes (w) mlp_out",
        "layer     0   1   2",
        "group 0   rw  w   .",
        "group 1   .   rw  w",
        "group 2   .   .   rw",
    ]
    assert Wiring.model_diff(["base", "chat"], 7).draw().splitlines()[1:] == [
        "layer     base:7  chat:7",
        "group 0   rw      rw",
    ]


@pytest.mark.parametrize("name", TABLES)
def test_dict_round_trip(name):
    wiring = TABLES[name][0].with_skips()
    back = Wiring.from_dict(json.loads(json.dumps(wiring.to_dict())))
    assert back == wiring
    assert back.name == wiring.name
    assert pickle.loads(pickle.dumps(wiring)) == wiring


SITES = st.builds(Site, st.sampled_from(["model", "chat"]), st.sampled_from(SITE_NAMES), st.integers(0, 3))
GROUPS = st.lists(st.tuples(*[st.lists(SITES, min_size=1, max_size=4, unique=True)] * 2), min_size=1, max_size=4)


@given(GROUPS, st.data())
def test_any_wiring_survives_the_round_trip_and_lays_out_without_gaps(groups, data):
    wiring = Wiring(tuple(tuple(r) for r, _ in groups), tuple(tuple(w) for _, w in groups)).with_skips()
    assert Wiring.from_dict(json.loads(json.dumps(wiring.to_dict()))) == wiring
    widths = {site: data.draw(st.integers(1, 5)) for site in {*wiring.read_sites, *wiring.write_sites}}
    layout = Layout.of(wiring, widths)
    assert layout.width == widths
    for g in range(wiring.n_groups):
        for named, slices, total in (
            (wiring.reads[g], layout.read_slices[g], layout.read_width(g)),
            (wiring.writes[g], layout.write_slices[g], layout.write_width(g)),
        ):
            assert list(slices) == list(named)
            covered = [i for site in named for i in range(total)[slices[site]]]
            assert covered == list(range(total))
            assert all(s.stop - s.start == widths[site] for site, s in slices.items())


def test_layouts_with_widths_by_model():
    wiring = Wiring.model_diff(["base", "chat"], 3)
    base, chat = wiring.read_sites
    layout = Layout.of(wiring, {"base": 3, "chat": 5})
    assert layout.read_slices == ({base: slice(0, 3), chat: slice(3, 8)},)
    assert layout.write_slices == layout.read_slices
    assert (layout.read_width(0), layout.write_width(0), layout.common_width()) == (8, 8, None)
    assert Layout.of(wiring, {"base": 3, "chat": 5, chat: 4}).width == {base: 3, chat: 4}
    assert Layout.of(wiring, 4).common_width() == 4
