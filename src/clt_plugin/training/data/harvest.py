"""Activations from models: texts run through the plain model up to the last site, and hooks that read the sites."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from clt_plugin.adapters.huggingface import HostModel, check_runs_once, plain_model
from clt_plugin.adapters.sites import check_sites, normalise
from clt_plugin.core.wiring import MODEL, Site, Wiring
from clt_plugin.training.data.activations import (
    Activations,
    Chunk,
    Cursor,
    DataError,
    check_whole,
    columns_of,
    digest,
    sites_of,
)
from clt_plugin.training.data.tokens import Rows, Tokens

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def harvest(
    model: Any,
    texts: Any,
    sites: Wiring | Iterable[Site],
    *,
    tokenizer: Any = None,
    batch_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
    **rows: Any,
) -> Harvest:
    """Harvest activations of a model, or of several models on the same tokens: iterate over what this returns.

    Args:
        model: An nnsight model, a TransformerBridge or a transformers model; or {name: model}, for the models that
            sites name.
        texts: Whatever `Texts.of` reads.
        sites: Which sites; of a wiring all it reads and writes.
        tokenizer: For models without one of their own.
        batch_size: How many rows run at a time.
        dtype: Of the activations: float32, bfloat16 or float64.
        device: Where they are put; the (first) model's device by default.
        **rows: Settings of `Tokens`: ``length``, ``pack``, ``bos``, ``exclude_first``, ``skip_special``, ``epochs``.

    Raises:
        DataError: The models cannot be run as asked.
        AttachError: A model is of no known family, or has no such site.
    """
    models = dict(model) if isinstance(model, Mapping) else {MODEL: model}
    if tokenizer is None:
        tokenizer = next((own for own in map(_tokenizer_of, models.values()) if own is not None), None)
    return Harvest(models, Tokens(texts, tokenizer, **rows), sites, batch_size=batch_size, dtype=dtype, device=device)


class Harvest:
    """Activations at sites of models, a batch of rows at a time: a `Source`.

    Models run as they are without their library, without what is attached to them, and only as far as the last site;
    between two chunks nothing of the harvest is left in them.

    Args:
        models: {name: model}, as sites name them.
        tokens: Which rows to run.
        sites: Which sites; of a wiring all it reads and writes.
        batch_size: How many rows run at a time. A chunk has the tokens of one batch that count.
        dtype: Of the activations: float32, bfloat16 or float64.
        device: Where they are put; the first model's device by default.

    Attributes:
        sites: The sites, in the order of columns.
        widths: Each one's width.
    """

    def __init__(
        self,
        models: Mapping[str, Any],
        tokens: Tokens,
        sites: Wiring | Iterable[Site],
        *,
        batch_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
    ) -> None:
        check_whole("batch_size", batch_size, 1)
        if dtype not in DTYPES:
            # Activations of some models go beyond what float16 holds.
            raise DataError(f"activations are harvested in {', '.join(map(str, DTYPES))}, not in {dtype}")
        self.sites = sites_of(sites)
        self.models = {site.model: _model_of(models, site) for site in self.sites}
        self.tokens, self.batch_size, self.dtype, self.device = tokens, batch_size, dtype, device
        _check_tokenizers(self.models)
        self._hosts = {name: self._host(name) for name in self.models}
        self.widths = tuple(self._hosts[site.model].d_model for site in self.sites)
        self._columns = columns_of(self.sites, self.widths)

    def __iter__(self) -> Iterator[Chunk]:
        """Give all chunks, from the beginning."""
        return self.chunks()

    def chunks(self, start: Cursor | None = None) -> Iterator[Chunk]:
        """Run the models and give what they have at the sites, from a cursor on; see `Source.chunks`."""
        for rows in self.tokens.batches(self.batch_size, start):
            if bool(rows.counted.any()):
                yield Chunk(self._run(rows), rows.ids[rows.counted], rows.after)

    def identity(self) -> dict[str, Any]:
        """Say by plain data what decides which activations come; see `Source.identity`."""
        return {
            "kind": "harvest",
            "models": self._prints,
            "sites": [str(site) for site in self.sites],
            "batch_size": self.batch_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            **self.tokens.identity(),
        }

    # ---------------------------------------------------------------- the run

    @torch.no_grad()
    def _run(self, rows: Rows) -> Activations:
        where = rows.counted.flatten().nonzero()[:, 0]
        flat: Tensor | None = None
        for name, model in self.models.items():
            sites = [site for site in self.sites if site.model == name]
            with plain_model(model) as hf:
                host, device = self._hosts[name], next(hf.parameters()).device
                _check_rows(hf, name, rows.ids)
                if flat is None:
                    flat = torch.empty(len(where), sum(self.widths), dtype=self.dtype, device=self.device or device)
                with contextlib.suppress(_Enough), _reading(hf, host, sites, self._keeper(flat, where)):
                    # Padding comes last, where no token of a causal model sees it. (Without any mask, transformers
                    # would warn of it.) Not the head: its logits are of no use.
                    ids = rows.ids.to(device)
                    base: Any = hf.base_model
                    base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        assert flat is not None
        found = Activations(flat, self.sites, self.widths)
        _check_finite(found)
        return found

    def _keeper(self, flat: Tensor, where: Tensor) -> Callable[[Site, Tensor], None]:
        def keep(site: Site, value: Tensor) -> None:
            # Copied at once: the model may go on to change it in place, and no pass is ever held as a whole.
            rows = value.reshape(-1, value.shape[-1])[where.to(value.device)]
            flat[:, self._columns[site]] = rows.to(flat)

        return keep

    # ---------------------------------------------------------------- what is asked for, and what is there

    def _host(self, name: str) -> HostModel:
        with plain_model(self.models[name]) as hf:
            host = HostModel.of(hf)
            check_runs_once(hf)
            if hf.training:
                raise DataError(f"{name} is in training mode, where dropout makes every run another: call eval() first")
            config: Any = hf.config
            longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        here = [site for site in self.sites if site.model == name]
        check_sites(host.architecture, host.parallel, [site.name for site in here])
        for site in here:
            if site.layer >= host.n_layers:
                raise DataError(f"there is no site {site}: the model has layers 0-{host.n_layers - 1}")
        if longest is not None and self.tokens.length > longest:
            raise DataError(f"{name} takes rows of at most {longest} tokens, not {self.tokens.length}: choose length=")
        return host

    @cached_property
    def _prints(self) -> dict[str, Any]:
        prints = {}
        for name, model in self.models.items():
            with plain_model(model) as hf:
                dtype = str(next(hf.parameters()).dtype).removeprefix("torch.")
                prints[name] = {"name": self._hosts[name].name, "dtype": dtype, "weights": _weights_print(hf)}
        return prints


class _Enough(Exception):  # noqa: N818 - nothing went wrong
    """What ends a pass after the last site."""


@contextlib.contextmanager
def _reading(
    hf: nn.Module, host: HostModel, sites: Iterable[Site], see: Callable[[Site, Tensor], None]
) -> Iterator[None]:
    """Show each site's value, (batch, position, d), as passes reach it; end the pass after the last one."""
    places, blocks = host.architecture.places(host.parallel), hf.get_submodule(host.blocks)
    left = set(sites)

    def reached(site: Site, module: nn.Module, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        see(site, normalise(module, host.architecture.centred, value) if places[site.name].before_gain else value)
        left.discard(site)
        if not left:
            raise _Enough

    with contextlib.ExitStack() as stack:
        for site in sites:
            place = places[site.name]
            module = blocks.get_submodule(f"{site.layer}.{place.module}".rstrip("."))
            if place.side == "input":
                hook: Any = lambda m, args, kwargs, site=site: reached(  # noqa: E731
                    site, m, args[0] if args else next(iter(kwargs.values()))
                )
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                handle = module.register_forward_hook(lambda m, args, output, site=site: reached(site, m, output))
            stack.callback(handle.remove)
        yield


def _tokenizer_of(model: Any) -> Any:
    return getattr(model, "tokenizer", None)


def _model_of(models: Mapping[str, Any], site: Site) -> Any:
    if site.model not in models:
        raise DataError(f"{site} is in the model {site.model!r}: the models given are {', '.join(map(repr, models))}")
    return models[site.model]


def _check_tokenizers(models: Mapping[str, Any]) -> None:
    """Refuse models that would read different texts in the same token ids."""
    known = [(name, _tokenizer_of(model).get_vocab()) for name, model in models.items() if _tokenizer_of(model)]
    for name, vocabulary in known[1:]:
        first = known[0][1]
        # One model may have more tokens than another; those that both have must agree.
        if any(first[token] != number for token, number in vocabulary.items() if token in first):
            raise DataError(
                f"{known[0][0]} and {name} have tokenizers that give the same tokens different ids: models are "
                "harvested together on the same ids alone"
            )


def _check_rows(hf: nn.Module, name: str, ids: Tensor) -> None:
    size = hf.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if int(ids.min()) < 0 or int(ids.max()) >= size:
        wrong = int(ids[(ids < 0) | (ids >= size)][0])
        raise DataError(f"there is no token {wrong}: {name} has tokens 0-{size - 1}")


def _check_finite(found: Activations) -> None:
    # One sum is cheap, and not finite if any value is not; only then are sites looked at.
    if bool(torch.isfinite(found.flat.sum(dtype=torch.float64))):
        return
    wrong = [site for site, value in found.by_site().items() if not bool(torch.isfinite(value).all())]
    if wrong:
        raise DataError(
            f"{min(wrong, key=lambda site: site.order)} has values that are not finite: run the model in a dtype that "
            "holds them (float16 overflows in many models), such as bfloat16"
        )


def _weights_print(hf: nn.Module) -> str:
    """Return a digest of some of every parameter's values: a model that was trained on has another one."""
    some = []
    for name, parameter in hf.named_parameters():
        values = parameter.detach().flatten()
        some.append([name, list(parameter.shape), values[:: max(1, len(values) // 16)][:16].double().tolist()])
    return digest(some)
