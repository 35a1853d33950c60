"""What a crosscoder does in a model, once more and plainly: the oracle of the adapters' tests.

Torch hooks on the Hugging Face model and loops over groups and sites; nothing of `clt_plugin.adapters` is used.
Only the parameters, the wiring's table and the name of the activation are taken from the crosscoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Edit = Callable[[int, Tensor], Tensor]

# model type: pre-norm, MLP, norm after the MLP, attention or the norm after it, and whether norms are LayerNorms
_BLOCKS = {
    "gpt2": ("ln_2", "mlp", None, "attn", True),
    "gpt_neox": ("post_attention_layernorm", "mlp", None, "attention", True),
    "olmo": ("post_attention_layernorm", "mlp", None, "self_attn", True),
    "olmo2": (None, "mlp", "post_feedforward_layernorm", "post_attention_layernorm", False),
    "gemma2": ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm", "post_attention_layernorm", False),
    "llama": ("post_attention_layernorm", "mlp", None, "self_attn", False),
}
_LIKE = {"gemma3_text": "gemma2", "gemma3": "gemma2", "qwen3": "llama", "mistral": "llama"}


def model_type(hf: nn.Module) -> str:
    kind = hf.config.model_type
    return _LIKE.get(kind, kind)


def blocks_of(hf: nn.Module) -> list[nn.Module]:
    """The transformer blocks: the largest list of modules that hold an MLP, outside any vision tower."""
    lists = [m for name, m in hf.named_modules() if isinstance(m, nn.ModuleList) and "vision" not in name]
    return list(next(m for m in lists if len(m) and hasattr(m[0], "mlp")))


def is_parallel(hf: nn.Module) -> bool:
    return hf.config.model_type == "gpt_neox" and hf.config.use_parallel_residual


def read_sites(hf: nn.Module) -> tuple[str, ...]:
    """The sites before the MLP that a crosscoder can read in this model."""
    prenorm = _BLOCKS[model_type(hf)][0]
    names = ["resid_pre", "mlp_in"]
    if not is_parallel(hf):
        names.append("resid_mid")
    if prenorm:
        names.append("mlp_in_before_gain")
    return tuple(names)


def _place(hf: nn.Module, block: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module at whose input or output a site is found."""
    prenorm, mlp, postnorm, attention, _ = _BLOCKS[model_type(hf)]
    module, side = {
        "resid_pre": ("", "input"),
        "attn_out": (attention, "output"),
        "resid_mid": (prenorm or mlp, "input"),
        "mlp_in_before_gain": (prenorm, "input"),
        "mlp_in": (mlp, "input"),
        "mlp_out_before_norm": (mlp, "output"),
        "mlp_out": (postnorm or mlp, "output"),
        "resid_post": ("", "output"),
    }[name]
    return (getattr(block, module) if module else block), side


def _normalised(hf: nn.Module, x: Tensor) -> Tensor:
    """What a norm's input is before gain and bias."""
    config = hf.config.get_text_config()
    names = [name for name in ("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps") if hasattr(config, name)]
    eps = getattr(config, names[0]) if names else 1e-5
    function = F.layer_norm if _BLOCKS[model_type(hf)][4] else F.rms_norm
    return function(x.float(), (x.shape[-1],), eps=eps).to(x.dtype)


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def activate(clt: Any, group: int, h: Tensor) -> Tensor:
    """ReLU, JumpReLU and TopK of a group's pre-activations."""
    if clt.activation.name == "relu":
        return torch.where(h > 0, h, 0.0)
    if clt.activation.name == "jumprelu":
        return torch.where(h > clt.threshold[group].detach(), h, 0.0)
    if clt.activation.name == "topk":
        # A threshold for each token, half-way to the first that is left out.
        ranked = h.detach().relu().sort(dim=-1, descending=True).values
        k = clt.activation.k
        return torch.where(h.relu() > (ranked[..., k - 1 : k] + ranked[..., k : k + 1]) / 2, h, 0.0)
    raise NotImplementedError(clt.activation.name)


def _encode(clt: Any, group: int, inputs: list[Tensor]) -> Tensor:
    """Pre-activations: each read site through its own rows of the encoder."""
    h, row = clt.b_enc[group], 0
    for x in inputs:
        h = h + x.to(clt.dtype) @ clt.W_enc[group][row : row + x.shape[-1]]
        row += x.shape[-1]
    return h


def _decode(clt: Any, site: Any, features: dict[int, Tensor], inputs: dict[Any, Tensor], like: Tensor) -> Tensor:
    """The reconstruction of one site from the groups encoded so far, (batch, position, d)."""
    bias = clt.b_dec[clt.wiring.write_sites.index(site)]
    y = bias.expand(*like.shape[:-1], -1)
    for group, acts in features.items():
        column = 0
        for written in clt.wiring.writes[group]:
            width = clt.layout.width[written]
            if written == site:
                y = y + acts @ clt.W_dec[group][:, column : column + width]
            column += width
    for number, (read, write) in enumerate(clt.wiring.skips):
        if write == site and read in inputs:
            y = y + inputs[read].to(clt.dtype) @ clt.W_skip[number]
    return y


def labels_of(clt: Any) -> list[int | str]:
    """A group's key in the results: the layer of its last read; "1_1" for a second group there."""
    labels: list[int | str] = []
    for reads in clt.wiring.reads:
        layer = max(site.layer for site in reads)
        earlier = sum(label == layer or str(label).startswith(f"{layer}_") for label in labels)
        labels.append(f"{layer}_{earlier}" if earlier else layer)
    return labels


@dataclass
class _State:
    inputs: dict[Any, Tensor] = field(default_factory=dict)
    natural: dict[int, Tensor] = field(default_factory=dict)
    edited: dict[int, Tensor] = field(default_factory=dict)
    excluded: Tensor | None = None


class _Reference:
    """One crosscoder in one forward pass."""

    def __init__(self, hf: nn.Module, clt: Any, mode: str, edits: Mapping[str, Edit], excluded: Tensor | None) -> None:
        self.hf, self.clt, self.mode, self.edits = hf, clt, mode, edits
        self.state = _State(excluded=excluded)
        self.labels = labels_of(clt)
        self.results: dict[str, dict] = {n: {} for n in ("enc_in", "pre_acts", "features", "recon", "error", "true")}
        self.handles: list[Any] = []

    def attach(self) -> None:
        blocks, wiring = blocks_of(self.hf), self.clt.wiring
        if self.mode != "observe":
            for site in wiring.write_sites:
                module, _ = _place(self.hf, blocks[site.layer], site.name)
                self.handles.append(module.register_forward_hook(self._writer(site)))
        # After the writers, so that who reads an MLP's output reads what took its place.
        for site in wiring.read_sites:
            module, side = _place(self.hf, blocks[site.layer], site.name)
            if side == "input":
                self.handles.append(module.register_forward_pre_hook(self._reader(site), with_kwargs=True))
            else:
                self.handles.append(module.register_forward_hook(lambda m, a, out, site=site: self._read(site, out)))

    def _reader(self, site: Any) -> Callable:
        def read(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._read(site, args[0] if args else kwargs["hidden_states"])

        return read

    def _read(self, site: Any, value: Any) -> None:
        value = _first(value)
        self.state.inputs[site] = _normalised(self.hf, value) if site.name == "mlp_in_before_gain" else value

    def _show(self, point: str, label: int | str, value: Tensor) -> Tensor:
        """Edit a copy of a point's value, and note the result."""
        if point in self.edits:
            value = self.edits[point](label, value.clone())
        self.results[point][label] = value
        return value

    def _activate(self, group: int, h: Tensor) -> Tensor:
        acts = activate(self.clt, group, h)
        excluded = self.state.excluded
        return acts if excluded is None else torch.where(excluded[..., None], 0.0, acts)

    def encode(self) -> None:
        """Encode every group whose reads are complete."""
        state, clt = self.state, self.clt
        for group, reads in enumerate(clt.wiring.reads):
            if group in state.natural or any(site not in state.inputs for site in reads):
                continue
            inputs = [state.inputs[site] for site in reads]
            widths = [x.shape[-1] for x in inputs]
            label = self.labels[group]
            state.natural[group] = self._activate(group, _encode(clt, group, inputs))
            seen = self._show("enc_in", label, torch.cat(inputs, dim=-1))
            h = self._show("pre_acts", label, _encode(clt, group, list(seen.split(widths, dim=-1))))
            state.edited[group] = self._show("features", label, self._activate(group, h))

    def _writer(self, site: Any) -> Callable:
        def write(module: nn.Module, args: tuple, true: Tensor) -> Tensor | None:
            self.encode()
            state = self.state
            if not state.inputs:
                return None
            recon = self._show("recon", site.layer, _decode(self.clt, site, state.edited, state.inputs, true))
            self.results["true"][site.layer] = true
            if self.mode == "replace_with_error":
                natural = _decode(self.clt, site, state.natural, state.inputs, true)
                error = (true.to(torch.promote_types(natural.dtype, torch.float32)) - natural).detach()
                return (recon + self._show("error", site.layer, error)).to(true.dtype)
            if state.excluded is not None:
                return torch.where(state.excluded[..., None], true, recon.to(true.dtype))
            return recon.to(true.dtype)

        return write


def first_positions(ids: Tensor, attention_mask: Tensor | None, first: int) -> Tensor | None:
    """The first positions that are not padding, (batch, position)."""
    if not first:
        return None
    excluded = torch.zeros(ids.shape, dtype=torch.bool)
    for row in range(ids.shape[0]):
        real = range(ids.shape[1]) if attention_mask is None else attention_mask[row].nonzero().flatten().tolist()
        for position in list(real)[:first]:
            excluded[row, position] = True
    return excluded


def reference_run(
    hf: nn.Module,
    ids: Tensor,
    clt: Any,
    mode: str = "replace",
    edit: Edit | None = None,
    attention_mask: Tensor | None = None,
    edits: Mapping[str, Edit] | None = None,
    **inputs: Any,
) -> dict[str, Any]:
    """Run a plain Hugging Face model with a crosscoder in it.

    Args:
        hf: The model; hooks that the caller put on it act before those of the crosscoder.
        ids: (batch, position).
        clt: A crosscoder in memory, of any wiring that can be replaced, or any at all in ``"observe"``.
        mode: ``"replace"``, ``"replace_with_error"`` or ``"observe"``.
        edit: ``edit(layer, features) -> features``.
        attention_mask: (batch, position).
        edits: The same for other points, by name: ``{"pre_acts": edit, ...}``.
        **inputs: More for the model, such as ``position_ids``.

    Returns:
        ``logits`` (for a model without a head, the last hidden state), and by layer ``enc_in``, ``pre_acts``,
        ``features`` (as edited), ``recon``, ``error`` and ``true``, the MLP's own output.
    """
    edits = {**(edits or {}), **({} if edit is None else {"features": edit})}
    run = _Reference(hf, clt, mode, edits, first_positions(ids, attention_mask, clt.host.exclude_first))
    run.attach()
    try:
        out = hf(input_ids=ids, attention_mask=attention_mask, use_cache=False, **inputs)
    finally:
        for handle in run.handles:
            handle.remove()
    run.encode()
    logits = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return {"logits": logits, **run.results}


def reference_greedy(
    hf: nn.Module, ids: Tensor, clt: Any, mode: str, steps: int, attention_mask: Tensor | None = None, **kwargs: Any
) -> list[dict[str, Any]]:
    """Decode greedily without a cache: one `reference_run` over the whole text a step, with its ``ids`` so far."""
    runs = []
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    for _ in range(steps):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        run = reference_run(hf, ids, clt, mode, attention_mask=mask, position_ids=positions, **kwargs)
        ids = torch.cat((ids, run["logits"][:, -1:].argmax(-1)), dim=1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
        runs.append(run | {"ids": ids})
    return runs


@contextmanager
def reference_attached(hf: nn.Module, clt: Any, mode: str) -> Iterator[nn.Module]:
    """Keep a crosscoder in a plain model, for calls such as ``generate`` that run it many times."""
    run = _Reference(hf, clt, mode, {}, None)
    run.attach()
    run.handles.append(hf.register_forward_pre_hook(lambda *_: setattr(run, "state", _State())))
    try:
        yield hf
    finally:
        for handle in run.handles:
            handle.remove()
