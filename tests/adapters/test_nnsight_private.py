"""What the adapter relies on in nnsight without its being promised: where one of these fails, nnsight has changed."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clt_plugin
from clt_plugin.adapters import nnsight as adapter
from support.models import nnsight_model
from support.tracing import token_ids

# After clt_plugin: nnsight gives every object a method, over which the import of the tests' type checker stumbles.
from nnsight import Envoy, NNsight  # isort: skip
from nnsight.intervention.interleaver import Interleaver, Mediator, OutOfOrderError  # isort: skip
from nnsight.intervention.tracer import InterleavingTracer  # isort: skip
from nnsight.modeling.transformers import TransformersModel  # isort: skip


class Twice(nn.Module):
    """One child, called twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.child(self.child(x) + 1)


def start(function: Callable[[], None], model: Envoy, first: bool) -> Mediator:
    """Start a worker in a run, as the adapter does, without its loop."""
    worker = Mediator(compile("function()", "<test>", "exec"), {}, {"function": function})
    others = list(model.interleaver.mediators)
    model.interleaver.mediators = [worker, *others] if first else [*others, worker]
    worker.start(model.interleaver)
    return worker


@pytest.fixture
def model() -> NNsight:
    return NNsight(Twice())


X = torch.zeros(2, 3)


def test_names() -> None:
    owned = {
        Envoy: ("get", "skip", "edit", "root", "input", "inputs", "output", "__getstate__"),
        Mediator: ("current", "value", "start"),
        InterleavingTracer: ("execute",),
    }
    for cls, names in owned.items():
        for name in names:
            assert name in cls.__dict__, f"{cls.__name__} has no {name}"
    assert list(inspect.signature(Mediator).parameters)[:3] == ["code", "glbls", "lcls"]
    assert {"path", "interleaver", "envoys"} <= set(inspect.signature(Envoy).parameters)
    assert "inplace" in inspect.signature(Envoy.edit).parameters
    assert "hook" in inspect.signature(Envoy.__call__).parameters


def test_attributes(model: NNsight) -> None:
    assert model.path == "model"
    assert isinstance(model._module, Twice)
    assert model._children == [model.child]
    assert model._edits == []
    assert isinstance(model.interleaver, Interleaver)
    assert model.interleaver.mediators == []
    assert model.interleaver.batcher is None
    worker = Mediator(compile("", "<test>", "exec"), {}, {})
    assert (worker.pending, worker.iteration, worker.batch_group) == (None, 0, None)


def test_which_classes_get_the_method() -> None:
    for cls in (NNsight, TransformersModel):
        assert cls.__dict__["add_clt"] is NNsight.__dict__["add_clt"]
    assert not hasattr(Envoy, "add_clt"), "every submodule would have it"


def test_the_worker_that_runs_is_known(model: NNsight) -> None:
    assert adapter._worker() is None
    with pytest.raises(ValueError, match="outside of interleaving"):
        Mediator.current("anything")
    with model.trace(X):
        worker = adapter._worker()
        early = [worker.pending].save()
        value = model.child.output
        late = [worker.pending].save()
        value = [worker is Mediator.current("anything"), worker.batch_group, value.shape].save()
    assert early == [None], "nothing was asked for yet"
    assert late != [None]
    assert value[:2] == [True, [0, 1]]


def test_a_module_offers_its_input_then_its_skip_gate_then_its_output(model: NNsight) -> None:
    order: list[str] = []

    def see(what: str) -> None:
        value = Mediator.value(f"model.child.{what}")
        order.append(what)
        if what == "input":
            args, kwargs = value
            assert torch.equal(args[0], X)
            assert kwargs == {}

    def begin() -> None:
        for what in ("output", "skip", "input"):
            start(lambda what=what: see(what), model, first=True)

    with model.trace(X):
        begin()
        out = model.output.save()
    assert order == ["input", "skip", "output"]
    assert torch.equal(out, X + 1)


def test_workers_are_served_in_the_order_of_the_list(model: NNsight) -> None:
    seen: dict[str, Tensor] = {}

    def note(name: str) -> None:
        seen[name] = Mediator.value("model.child.output").clone()

    def begin() -> None:
        start(lambda: note("first"), model, first=True)
        start(lambda: note("last"), model, first=False)

    with model.trace(X):
        begin()
        model.child.output = model.child.output + 5
        out = model.output.save()
    assert torch.equal(seen["first"], X)
    assert torch.equal(seen["last"], X + 5), "the last sees what the user's edit has made of it"
    assert torch.equal(out, X + 6)


def test_workers_started_from_an_edit_ride_along(model: NNsight) -> None:
    seen: list[Tensor] = []
    read = lambda: seen.append(Mediator.value("model.child.output").clone())  # noqa: E731
    with model.edit(inplace=True):
        start(read, model, first=False)
    assert seen == [], "an edit is stored and not run"
    assert [type(edit) for edit in model._edits] == [Mediator]
    for _ in range(2):
        with model.trace(X):
            model.child.output = model.child.output + 5
    assert len(seen) == 2
    assert torch.equal(seen[1], X + 5)
    assert model.interleaver.mediators == []


def test_a_pinned_worker_is_served_once_a_visit(model: NNsight) -> None:
    seen: list[tuple[int, float]] = []

    def follow() -> None:
        visits = iter(range(10))
        adapter._forever(lambda: seen.append((next(visits), float(model.child.output.max()))), None)

    with model.trace(X):
        start(follow, model, first=True)
        out = model.output.save()
    assert seen == [(0, 0.0), (1, 1.0)]
    assert torch.equal(out, X + 1)


def test_a_worker_left_waiting_is_told_so(model: NNsight) -> None:
    ends: list[type[BaseException]] = []

    def wait() -> None:
        try:
            Mediator.value("what no module offers")
        except BaseException as error:
            ends.append(type(error))

    with model.trace(X):
        start(wait, model, first=False)
        out = model.output.save()
    assert ends == [OutOfOrderError]
    assert torch.equal(out, X + 1)
    with model.trace(X) as tracer:
        start(wait, model, first=False)
        out = model.child.output.save()
        tracer.stop()
    assert len(ends) == 2

    def fail() -> None:
        with model.trace(X):
            start(wait, model, first=False)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert len(ends) == 3


def test_an_envoy_of_ones_own_shows_values(model: NNsight) -> None:
    envoy = Envoy(nn.ModuleDict({"a": nn.Identity()}), path="model.mine", interleaver=model.interleaver)
    model._children.append(envoy)
    object.__setattr__(model, "mine", envoy)

    def show() -> None:
        hidden = model.child.output
        value = model.mine.a(torch.ones(2), hook=True)
        model.child.output = hidden + value.sum()

    with model.edit(inplace=True):
        show()
    with model.trace(X):
        model.mine.a.output[:] = 4
        out = model.output.save()
    assert torch.equal(out, X + 9)
    assert list(model._module._modules) == ["child"]
    assert "model.mine.a" in [path for path, _ in model.named_modules()]


def test_whether_invokes_share_the_batch() -> None:
    model, ids = nnsight_model("gpt2"), token_ids()
    flags: list[Any] = []
    with model.trace(ids):
        flags.append((model.interleaver.batcher.batching, adapter._worker().batch_group))
    with model.trace() as tracer:
        with tracer.invoke(ids[:1]):
            flags.append((model.interleaver.batcher.batching, adapter._worker().batch_group))
        with tracer.invoke(ids):
            flags.append((model.interleaver.batcher.batching, adapter._worker().batch_group))
        with tracer.invoke():
            flags.append((model.interleaver.batcher.batching, adapter._worker().batch_group))
    assert flags == [(False, [0, 2]), (True, [0, 1]), (True, [1, 2]), (True, None)]


def test_the_body_that_collects_invokes_is_known() -> None:
    model, ids = nnsight_model("gpt2"), token_ids()
    flags = {"outside": adapter._collecting_invokes()}
    with model.trace() as tracer:
        flags["collecting"] = adapter._collecting_invokes()
        with tracer.invoke(ids):
            flags["running"] = adapter._worker() is not None
    with model.session():
        flags["session"] = adapter._collecting_invokes()
        with model.trace(ids):
            flags["in a session"] = adapter._worker() is not None
    assert flags == {"outside": False, "collecting": True, "running": True, "session": False, "in a session": True}


def test_a_module_registered_to_travel_is_known_to_cloudpickle() -> None:
    import nnsight
    from cloudpickle import unregister_pickle_by_value
    from cloudpickle.cloudpickle import _PICKLE_BY_VALUE_MODULES

    assert clt_plugin.__reduce__() == (__import__, ("clt_plugin",))
    nnsight.register(clt_plugin)
    try:
        assert "clt_plugin" in _PICKLE_BY_VALUE_MODULES
        assert clt_plugin.__reduce__()[2] == {"add_clt": clt_plugin.add_clt}
    finally:
        unregister_pickle_by_value(clt_plugin)
    assert sys.modules["clt_plugin"] is clt_plugin
