"""What the tests of nnsight models share: inputs, points read in one go, and what a model must be like afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from support.models import N_LAYERS, VOCABULARY, make_tokenizer

POINTS = {
    "observe": ("enc_in", "pre_acts", "features"),
    "replace": ("enc_in", "pre_acts", "features", "recon"),
    "replace_with_error": ("enc_in", "pre_acts", "features", "recon", "error"),
}
"""The points that fire in each mode, in the order of a forward pass."""

MODES = tuple(POINTS)


def token_ids(rows: int = 2, length: int = 7, seed: int = 1) -> Tensor:
    """Random token ids, (rows, length), none of them special."""
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(prompts: Sequence[str]) -> dict[str, Tensor]:
    """What a transformers model is given for texts of different lengths."""
    encoded = make_tokenizer()(list(prompts), padding=True, return_tensors="pt")
    mask = encoded["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"ids": encoded["input_ids"], "attention_mask": mask, "position_ids": positions}


def read_points(points: Any, mode: str, layers: Sequence[int] = range(N_LAYERS)) -> dict[str, dict[int, Tensor]]:
    """Read every point of a crosscoder in a trace's body: {point: {layer: value}}."""
    seen: dict[str, dict[int, Tensor]] = {name: {} for name in POINTS[mode]}
    for layer in layers:
        for name in POINTS[mode]:
            seen[name][layer] = getattr(points.layers[layer], name).output
    return seen


def assert_close(actual: Tensor, expected: Tensor, what: str = "", tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


def assert_points(seen: Mapping[str, Mapping[int, Tensor]], reference: Mapping[str, Any], rows: slice = slice(None)):
    """Compare what was read in a trace with the reference, point by point."""
    for name, by_layer in seen.items():
        for layer, value in by_layer.items():
            assert_close(value, reference[name][layer][rows], f"{name} of layer {layer}")


class Fingerprint:
    """What must be as before once a crosscoder is gone."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.before = self._look()

    def _look(self) -> dict[str, Any]:
        model, hf = self.model, self.model._module
        return {
            "modules": [(name, id(module)) for name, module in hf.named_modules()],
            "state": [(key, value.data_ptr()) for key, value in hf.state_dict().items()],
            "children": [id(child) for child in model._children],
            "envoys": [path for path, _ in model.named_modules()],
            "attributes": sorted(model.__dict__),
            "edits": [id(edit) for edit in model._edits],
            "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in hf.modules()],
            "workers": list(model.interleaver.mediators),
        }

    def assert_unchanged(self) -> None:
        now = self._look()
        for what, value in self.before.items():
            assert now[what] == value, f"the model's {what} changed: {value} -> {now[what]}"


def inner(hf: nn.Module, layer: int, name: str = "") -> nn.Module:
    """A module inside a block of a plain model."""
    from support.reference import blocks_of

    block = blocks_of(hf)[layer]
    return getattr(block, name) if name else block
