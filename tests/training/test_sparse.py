from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from clt_plugin import Crosscoder, Site, Wiring
from clt_plugin.core import ReLU
from clt_plugin.training import _entries, _selection, sparse
from clt_plugin.training.auxiliary import PreActivation
from clt_plugin.training.forward import ForwardPass
from clt_plugin.training.penalties import L1, Quadratic, Tanh
from clt_plugin.training.sparse import forward_pass

N_TOKENS, N_LATENTS, WIDTH = 13, 32, 5
TOLERANCE = 1e-10

RESID = [Site("", "resid_post", layer) for layer in range(3)]
WIRINGS = {
    "clt": (Wiring.clt(3), WIDTH),
    "plt with skips": (Wiring.plt(3).with_skips(), WIDTH),
    "local clt": (Wiring.local_clt(4, span=2), WIDTH),
    "acausal": (Wiring.acausal(RESID), WIDTH),
    "strictly causal": (Wiring.strictly_causal(3), WIDTH),
    # Written sites that do not lie side by side, in another order, and of different widths.
    "scattered": (
        Wiring(((RESID[0],), (RESID[2], RESID[0])), ((RESID[1], RESID[2], RESID[0]), (RESID[0], RESID[1]))),
        {RESID[0]: 3, RESID[1]: 4, RESID[2]: 6},
    ),
}
ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("relu", {}),
    "jumprelu": ("jumprelu", {"bandwidth": 0.4}),
    "topk": ("topk", {"k": 3}),
    "topk unrectified": ("topk", {"k": 25, "rectify": False}),
    "topk of few positive": ("topk", {"k": 25}),
    "topk by norm": ("topk", {"k": 3, "score": "decoder_norm"}),
    "topk joint": ("topk", {"k": 2, "scope": "joint"}),
    "topk joint by norm": ("topk", {"k": 2, "scope": "joint", "score": "decoder_norm"}),
    "batchtopk": ("batchtopk", {"k": 3}),
    "batchtopk by norm": ("batchtopk", {"k": 3, "score": "decoder_norm"}),
    "batchtopk joint": ("batchtopk", {"k": 2, "scope": "joint"}),
}


def make(wiring: str = "clt", activation: str = "jumprelu", n_latents: Any = N_LATENTS) -> Crosscoder:
    table, width = WIRINGS[wiring]
    name, settings = ACTIVATIONS[activation]
    crosscoder = Crosscoder(table, width, n_latents, name, dtype=torch.float64, **settings)
    for key, parameter in crosscoder.named_parameters():
        if key.startswith("threshold"):
            parameter.data.uniform_(0.1, 0.6)
        else:
            parameter.data.normal_(std=0.6)
    return crosscoder


def batch(crosscoder: Crosscoder, n_tokens: int = N_TOKENS) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
    def of(sites: Any) -> dict[Site, Tensor]:
        return {site: torch.randn(n_tokens, crosscoder.layout.width[site], dtype=torch.float64) for site in sites}

    x = {site: value.requires_grad_() for site, value in of(crosscoder.wiring.read_sites).items()}
    return x, of(crosscoder.wiring.write_sites)


def gradients(crosscoder: Crosscoder, run: ForwardPass, x: dict[Site, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss with every kind of penalty that the activation allows, and its gradients."""
    penalties: list[Any] = [Tanh(0.3), L1(0.2)]
    if crosscoder.threshold is not None and crosscoder.activation.has_threshold:
        penalties += [Quadratic(0.1, target=4.0), PreActivation(0.1)]
    loss = run.error() + sum(penalty.weight * penalty(run) for penalty in penalties)
    names = [name for name, p in crosscoder.named_parameters() if p.requires_grad]
    tensors = [p for p in crosscoder.parameters() if p.requires_grad] + list(x.values())
    found = torch.autograd.grad(loss, tensors)
    return loss.detach(), dict(zip([*names, *map(str, x)], found, strict=True))


def assert_equal(crosscoder: Crosscoder, path: str = "sparse") -> ForwardPass:
    """The path given equals the dense oracle: outputs, loss, every gradient. Returns its pass."""
    x, y = batch(crosscoder)
    oracle, run = ForwardPass.of(crosscoder, x, y), forward_pass(crosscoder, x, y, path)
    for site in crosscoder.wiring.write_sites:
        torch.testing.assert_close(run.outputs[site], oracle.outputs[site], rtol=TOLERANCE, atol=TOLERANCE)
    for mine, theirs in zip(run.groups, oracle.groups, strict=True):
        torch.testing.assert_close(mine.dense(mine.acts), theirs.acts, rtol=TOLERANCE, atol=TOLERANCE)
    (loss, found), (expected_loss, expected) = gradients(crosscoder, run, x), gradients(crosscoder, oracle, x)
    torch.testing.assert_close(loss, expected_loss, rtol=TOLERANCE, atol=TOLERANCE)
    for name, gradient in expected.items():
        assert bool(gradient.abs().sum() > 0), name
        torch.testing.assert_close(found[name], gradient, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, n=name: n + m)
    return run


# ---------------------------------------------------------------- equal to the dense pass


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_sparse_equals_dense(wiring: str, activation: str) -> None:
    crosscoder = make(wiring, activation)
    run = assert_equal(crosscoder)
    assert all(group.latents is not None for group in run.groups)
    assert all(group.complete != crosscoder.activation.ranks for group in run.groups)


@pytest.mark.parametrize("activation", ["jumprelu", "topk", "batchtopk joint"])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_sums_in_pieces_equal_dense(wiring: str, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_entries, "PIECE", 2)
    monkeypatch.setattr(_entries, "OFTEN", 0)
    monkeypatch.setattr(_entries, "_ROWS_AT_ONCE", 3)
    assert_equal(make(wiring, activation))


@pytest.mark.parametrize(("often", "widths"), [(3, {1, 2}), (4, {5, 10, 15})])
def test_sums_are_in_pieces_where_latents_are_often_active(
    often: int, widths: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_entries, "PIECE", 2)
    monkeypatch.setattr(_entries, "OFTEN", often)
    seen: set[int] = set()
    sum_rows = sparse.sum_rows
    monkeypatch.setattr(sparse, "sum_rows", lambda rows, *rest: seen.add(rows.shape[1]) or sum_rows(rows, *rest))
    crosscoder = make("clt", "topk")
    # As many tokens as latents, of which each token has 3 active.
    forward_pass(crosscoder, *batch(crosscoder, N_LATENTS), "sparse")
    assert seen == widths


def test_columns_are_cut_on_a_cpu_only() -> None:
    assert _entries.cut([5, 130], torch.device("cpu")) == [
        [slice(0, 5)],
        [slice(5, 69), slice(69, 133), slice(133, 135)],
    ]
    assert _entries.cut([5, 130], torch.device("cuda")) == [[slice(0, 5)], [slice(5, 135)]]


def test_one_group_may_be_dense_beside_sparse_ones() -> None:
    crosscoder = make("clt", "jumprelu", (20, 32, 12))
    for threshold, value in zip(crosscoder.threshold or (), (5.0, 0.2, 5.0), strict=True):
        threshold.data.fill_(value)
    crosscoder.b_enc[0].data[0] = crosscoder.b_enc[2].data[3] = 9.0
    run = assert_equal(crosscoder, "auto")
    assert [group.latents is None for group in run.groups] == [False, True, False]


def test_batchtopk_with_a_measured_threshold() -> None:
    crosscoder = make("clt", "batchtopk")
    crosscoder.estimate_threshold({site: value.detach() for site, value in batch(crosscoder)[0].items()})
    assert_equal(crosscoder.eval())


def test_nothing_active() -> None:
    crosscoder = make("clt", "jumprelu")
    for threshold in crosscoder.threshold or ():
        threshold.data.fill_(1e3)
    x, y = batch(crosscoder)
    run, oracle = forward_pass(crosscoder, x, y), ForwardPass.of(crosscoder, x, y)
    run.error().backward()
    found = [p.grad for p in crosscoder.parameters()]
    crosscoder.zero_grad()
    oracle.error().backward()
    for mine, parameter in zip(found, crosscoder.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)


def test_unknown_activation_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Squared(ReLU):
        def __call__(self, h: Tensor, threshold: Any, scale: Any, training: bool) -> Tensor:
            return h.relu().square()

    crosscoder = Crosscoder(Wiring.clt(2), WIDTH, N_LATENTS, Squared(), dtype=torch.float64)
    run = assert_equal(crosscoder)
    assert all(group.latents is None for group in run.groups)


def test_density_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    crosscoder = make("clt", "topk")
    x, y = batch(crosscoder)
    for limit, is_sparse in ((3 / 32 + 1e-9, True), (3 / 32, False)):
        monkeypatch.setattr(sparse, "SPARSE_BELOW", limit)
        assert all((g.latents is not None) == is_sparse for g in forward_pass(crosscoder, x, y).groups)
    assert forward_pass(crosscoder, x, y, "sparse").groups[0].latents is not None
    with pytest.raises(ValueError, match="path must be one of auto, dense, sparse, not 'quick'"):
        forward_pass(crosscoder, x, y, "quick")


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "batchtopk"])
def test_what_is_not_a_number_shows_in_the_loss(activation: str) -> None:
    crosscoder = make("clt", activation)
    x, y = batch(crosscoder)
    with torch.no_grad():
        x[crosscoder.wiring.read_sites[1]][2] = torch.nan
    assert bool(forward_pass(crosscoder, x, y, "sparse").error().isnan())


def test_no_dense_array_is_kept_for_the_backward_pass() -> None:
    crosscoder = make("clt", "topk")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        forward_pass(crosscoder, *batch(crosscoder), "sparse").error()
    assert kept
    assert not [t for t in kept if t.shape == (N_TOKENS, N_LATENTS)]


# ---------------------------------------------------------------- selection


@pytest.mark.parametrize("n", [8, 60, 64, 97, 256, 1024])
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_of_rows_and_of_all(n: int, k: int, dtype: torch.dtype) -> None:
    scores = torch.randn(7, n).to(dtype)
    flat = _selection.top_of_rows(scores, k)
    assert torch.equal(flat, flat.sort().values)
    assert torch.equal(flat // n, torch.arange(7).repeat_interleave(k))
    found = scores.view(-1)[flat].view(7, k).sort(-1, descending=True).values
    assert torch.equal(found, scores.topk(k).values)
    assert len(flat.unique()) == 7 * k

    flat = _selection.top_of_all(scores, 7 * k)
    assert torch.equal(flat, flat.unique())
    assert torch.equal(scores.view(-1)[flat].sort(descending=True).values, scores.view(-1).topk(7 * k).values)


def test_equal_scores_count_once_each() -> None:
    scores = torch.randn(5, 256).round()
    flat = _selection.top_of_rows(scores, 6)
    assert torch.equal(scores.view(-1)[flat].view(5, 6).sort(-1, descending=True).values, scores.topk(6).values)
    assert len(flat.unique()) == 30
    assert len(_selection.top_of_all(scores, 30).unique()) == 30
    assert len(_selection.top_of_all(torch.zeros(5, 256), 30).unique()) == 30


def test_what_is_not_a_number_counts_as_largest() -> None:
    scores = torch.randn(4, 256)
    scores[1, 7] = scores[2, :] = torch.nan
    rows = _selection.top_of_rows(scores, 6)
    assert torch.equal(rows // 256, torch.arange(4).repeat_interleave(6))
    assert 256 + 7 in rows
    assert bool(scores.view(-1)[rows].view(4, 6)[2].isnan().all())
    assert len(rows.unique()) == 24
    every = _selection.top_of_all(scores, 300)
    assert set(scores.view(-1).isnan().nonzero().squeeze(1).tolist()) <= set(every.tolist())
