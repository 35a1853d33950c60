"""What connects crosscoders to nnsight and TransformerLens: one table of sites, one engine, two thin adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import wrapt

from clt_plugin.adapters._handle import Handle
from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.errors import AttachError

__all__ = ["Handle", "add_clt", "attached_to", "register"]


def _same(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


class _AddCLT:
    """`add_clt` for whichever library the model is of; neither is imported before it is needed."""

    def __call__(
        self,
        model: Any,
        clt: Any,
        mode: str = "replace",
        name: str = "clt",
        *,
        layers: Iterable[int] | None = None,
        features: Mapping[int, Sequence[int]] | None = None,
        edits: Any = None,
    ) -> Handle:
        """Make a crosscoder part of a model: ``model.add_clt(clt, ...)`` as a function.

        Args:
            model: An nnsight model, or a TransformerBridge.
            clt: A `Crosscoder`, a folder, or an ``hf://`` reference.
            mode: ``"replace"``, ``"replace_with_error"`` or ``"observe"``.
            name: The name under which its points are found.
            layers: Attach the groups of these layers alone.
            features: Attach these features alone, by layer.
            edits: What to edit in every run, see `clt_plugin.interventions`.

        Returns:
            A handle; ``handle.remove()`` leaves the model as it was.
        """
        adapter = _adapter(model)
        if adapter is None:
            raise AttachError(
                f"add_clt takes an nnsight model or a TransformerBridge, not {type(model).__name__}: wrap a "
                "transformers model in nnsight.modeling.transformers.TransformersModel(model, tokenizer=...) first"
            )
        return adapter.add_clt(model, clt, mode, name, layers=layers, features=features, edits=edits)

    def __reduce__(self) -> Any:
        # Only nnsight runs code on other machines: what travels is its function alone.
        from clt_plugin.adapters.nnsight import add_clt

        return (_same, (add_clt,))


add_clt = _AddCLT()


def attached_to(model: Any) -> dict[str, Crosscoder]:
    """Return the crosscoders that are attached to a model, by name; none to a model of neither library."""
    adapter = _adapter(model)
    return {} if adapter is None else adapter.attached(model)


def _adapter(model: Any) -> Any:
    """Return the adapter of the library that a model is of, or None."""
    libraries = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    if "transformer_lens" in libraries:
        from clt_plugin.adapters import transformer_lens

        return transformer_lens
    if "nnsight" in libraries:
        from clt_plugin.adapters import nnsight

        return nnsight
    return None


def register() -> None:
    """Give both libraries' models the method ``add_clt``, as soon as each is imported."""

    def method(*classes: str) -> Callable[[Any], None]:
        def give(module: Any) -> None:
            for name in classes:
                # A plain function, so that it binds to the model as any method does.
                setattr(getattr(module, name), "add_clt", _method)  # noqa: B010

        return give

    wrapt.when_imported("nnsight.modeling.base")(method("NNsight"))
    wrapt.when_imported("nnsight.modeling.transformers")(method("TransformersModel"))
    wrapt.when_imported("transformer_lens.model_bridge")(method("TransformerBridge"))


def _method(self: Any, clt: Any, mode: str = "replace", name: str = "clt", **selection: Any) -> Handle:
    """Make a crosscoder part of this model; see `clt_plugin.add_clt`."""
    return add_clt(self, clt, mode, name, **selection)
