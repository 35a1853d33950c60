"""One suite over nnsight and TransformerLens: the same crosscoder does in each what it does in plain torch.

The oracle is `support.reference`, which is itself held against `Crosscoder.encode` and `decode` here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from clt_plugin import Crosscoder, Wiring
from support.crosscoders import make_clt
from support.models import FAMILIES, N_LAYERS, bridge_model, make_model, nnsight_model
from support.reference import labels_of, read_sites, reference_run

MODES = ("replace", "replace_with_error", "observe")
POST_NORM = ("olmo2", "gemma2", "gemma3", "gemma3_multimodal")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]])
BATCHES = {
    "plain": {"input_ids": torch.tensor([[0, 5, 17, 33, 60, 2, 41], [0, 9, 9, 58, 3, 30, 12]])},
    # The second row is two tokens shorter, and padded on the left with what would be ordinary tokens otherwise.
    "padded": {
        "input_ids": torch.tensor([[0, 5, 17, 33, 60, 2, 41], [7, 8, 0, 58, 3, 30, 12]]),
        "attention_mask": MASK,
        "position_ids": (MASK.cumsum(-1) - 1).clamp(min=0),
    },
}

# Logits, and features by the label of their group: its layer, or "1_1" for a second group there.
Outcome = tuple[Tensor, dict[int | str, Tensor]]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads cost more than they save on models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def model_in(backend: str, family: str):
    return {"torch": make_model, "nnsight": nnsight_model, "transformer_lens": bridge_model}[backend](family)


clt_of = cache(make_clt)


@cache
def run_torch(family: str, clt: Crosscoder | None, mode: str, batch: str = "plain") -> Outcome:
    model, inputs = model_in("torch", family), dict(BATCHES[batch])
    if clt is None:
        return model(use_cache=False, **inputs).logits, {}
    run = reference_run(model, inputs.pop("input_ids"), clt, mode, **inputs)
    return run["logits"], run["features"]


def run_nnsight(family: str, clt: Crosscoder | None, mode: str, batch: str = "plain") -> Outcome:
    model = model_in("nnsight", family)
    # In the order in which a forward pass reaches them.
    labels = [] if clt is None else sorted(labels_of(clt), key=lambda label: [int(n) for n in str(label).split("_")])
    handle = None if clt is None else model.add_clt(clt, mode=mode)
    try:
        features = []
        with model.trace(BATCHES[batch]):
            for label in labels:
                features.append(model.clt.layers[label].features.output.save())
            logits = model.output.logits.save()
    finally:
        if handle is not None:
            handle.remove()
    return logits, dict(zip(labels, features, strict=True))


def run_bridge(family: str, clt: Crosscoder | None, mode: str, batch: str = "plain") -> Outcome:
    bridge, inputs = model_in("transformer_lens", family), dict(BATCHES[batch])
    ids = inputs.pop("input_ids")
    if clt is None:
        return bridge(ids, **inputs), {}
    names = {label: "blocks.{}.clt{}{}.hook_features".format(*str(label).partition("_")) for label in labels_of(clt)}
    with bridge.add_clt(clt, mode=mode):
        logits, seen = bridge.run_with_cache(ids, names_filter=list(names.values()), **inputs)
    return logits, {label: seen[name] for label, name in names.items()}


RUN: dict[str, Callable[..., Outcome]] = {"nnsight": run_nnsight, "transformer_lens": run_bridge}
BACKENDS = tuple(RUN)


def compare(backend: str, family: str, clt: Crosscoder, batch: str = "plain") -> None:
    """Compare a backend with the reference in every mode, at the positions that are no padding."""
    real = MASK.bool() if batch == "padded" else torch.ones_like(MASK).bool()
    for mode in MODES:
        expected_logits, expected = run_torch(family, clt, mode, batch)
        logits, features = RUN[backend](family, clt, mode, batch)
        assert_close(logits[real], expected_logits[real], **CLOSE)
        assert features.keys() == expected.keys()
        for label, acts in features.items():
            assert acts.shape == (*real.shape, clt.group_sizes[0])
            assert_close(acts[real], expected[label][real], **CLOSE)


@cache
def plain_logits(backend: str, family: str) -> Tensor:
    """What a model computes before any crosscoder is attached to it."""
    logits = RUN[backend](family, None, "")[0]
    assert_close(logits, run_torch(family, None, "")[0], **CLOSE)
    return logits


SITES = [
    (family, read, write)
    for family in FAMILIES
    for read in read_sites(make_model(family))
    for write in ("mlp_out_before_norm", "mlp_out")
    # Without a post-norm the two are one place: once is enough.
    if write == "mlp_out" or read == "mlp_in" or family in POST_NORM
]


@pytest.mark.parametrize("exclude_first", [0, 1])
@pytest.mark.parametrize(("family", "read", "write"), SITES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_site(backend, family, read, write, exclude_first):
    before = plain_logits(backend, family)
    compare(backend, family, clt_of(read=read, write=write, exclude_first=exclude_first))
    assert torch.equal(RUN[backend](family, None, "")[0], before)


@pytest.mark.parametrize("exclude_first", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_left_padding(backend, family, exclude_first):
    compare(backend, family, clt_of(exclude_first=exclude_first), "padded")


WIRINGS = {
    "plt": Wiring.plt(N_LAYERS),
    "local_clt": Wiring.local_clt(N_LAYERS, span=2, read="mlp_in_before_gain"),
    "skips": Wiring.clt(N_LAYERS, read="resid_mid").with_skips(),
    "strictly_causal": Wiring.strictly_causal(N_LAYERS),
    "two_groups_a_layer": Wiring.clt(N_LAYERS) + Wiring.plt(N_LAYERS, read="resid_mid"),
}
ACTIVATIONS = {"relu": {}, "jumprelu": {}, "topk": {"k": 4}}


@cache
def clt_with(wiring: str, activation: str) -> Crosscoder:
    return make_clt(WIRINGS[wiring], activation=activation, **ACTIVATIONS[activation])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_wiring_and_activation(backend, family, wiring, activation):
    compare(backend, family, clt_with(wiring, activation))


# ---------------------------------------------------------------- the reference itself


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_the_reference_agrees_with_the_core(wiring, activation, mode):
    clt = clt_with(wiring, activation)
    run = reference_run(model_in("torch", "gemma2"), BATCHES["plain"]["input_ids"], clt, mode)
    reads, labels = clt.wiring.reads, labels_of(clt)
    x = {sites[0]: run["enc_in"][label] for sites, label in zip(reads, labels, strict=True)}
    features = clt.encode(x)
    for label, acts in zip(labels, features, strict=True):
        assert_close(run["features"][label], acts, **CLOSE)
    if mode != "observe":
        for site, y in clt.decode(features, x).items():
            assert_close(run["recon"][site.layer], y, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_modes_leave_and_change_the_output(family):
    """What the modes promise, so that no suite passes for a crosscoder that does nothing."""
    plain, _ = run_torch(family, None, "")
    for mode in MODES:
        logits, features = run_torch(family, clt_of(read="mlp_in", write="mlp_out", exclude_first=0), mode)
        changed = (logits - plain).abs().amax()
        assert changed > 0.05 if mode == "replace" else changed < 1e-4
        for acts in features.values():
            assert 0.1 < (acts != 0).float().mean() < 0.9
