"""What comes before the first step: where activations come from, how they are standardised, how a crosscoder begins."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clt_plugin.adapters.huggingface import HostModel, plain_model
from clt_plugin.core import Crosscoder, Host, Site, Wiring
from clt_plugin.training import start
from clt_plugin.training._mesh import first_alone
from clt_plugin.training.config import ConfigError, TrainConfig
from clt_plugin.training.data import ActivationCache, DataError, Harvest, Source, Texts, harvest, write_cache
from clt_plugin.training.standard import Standard, Statistics, unfold
from clt_plugin.training.wirings import make_wiring

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SAMPLE = 4096
"""On how many tokens a firing rate is set."""


def models_of(model: Any) -> dict[str, Any]:
    """Return {name: model}, as sites name them, of one model, several by name, or none."""
    if model is None:
        return {}
    return dict(model) if isinstance(model, Mapping) else {"model": model}


def wiring_of(config: TrainConfig, models: Mapping[str, Any], data: Any) -> Wiring:
    """Make the wiring that a config asks for, for the model, or for the layers of activations given."""
    if models:
        first = next(iter(models.values()))
        with plain_model(first) as hf:
            n_layers = HostModel.of(hf).n_layers
        return make_wiring(config.wiring, n_layers, tuple(models))
    if not is_source(data):
        raise ConfigError("texts are run through a model: give the model, or activations (a Source) instead of texts")
    names = tuple(dict.fromkeys(site.model for site in data.sites))
    return make_wiring(config.wiring, 1 + max(site.layer for site in data.sites), names)


def is_source(data: Any) -> bool:
    """Whether data are activations already, and not texts."""
    return hasattr(data, "chunks") and hasattr(data, "sites")


def open_source(
    models: Mapping[str, Any], data: Any, wiring: Wiring, config: TrainConfig, tokenizer: Any = None
) -> Source:
    """Return where activations come from: a harvest on the fly, or a cache, which is written first if it is missing.

    Args:
        models: {name: model}; empty where data are activations.
        data: A `Source`, or whatever `Texts.of` reads.
        wiring: Which sites are needed.
        config: See `DataConfig`.
        tokenizer: For models without one of their own.
    """
    wanted = config.data
    if is_source(data):
        source: Source = data
    else:
        epochs = 1 if wanted.cache is not None else wanted.epochs
        rows = {key: getattr(wanted, key) for key in ("length", "pack", "bos", "exclude_first", "skip_special")}
        model = dict(models)
        source = harvest(
            model, data, wiring, tokenizer=tokenizer, batch_size=wanted.rows, dtype=DTYPES[wanted.dtype],
            device=config.device, epochs=epochs, **rows,
        )  # fmt: skip
    if wanted.cache is not None and not isinstance(source, ActivationCache):
        whole, folder = source, wanted.cache
        first_alone(lambda: write_cache(whole, folder, dtype=wanted.cache_dtype, max_tokens=wanted.cache_tokens))
        source = ActivationCache(
            Path(wanted.cache), on_broken=wanted.on_broken, shuffle=config.seed, epochs=wanted.epochs,
            dtype=DTYPES[wanted.dtype], device=config.device,
        )  # fmt: skip
    lacking = [str(site) for site in (*wiring.read_sites, *wiring.write_sites) if site not in source.sites]
    if lacking:
        raise DataError(
            f"the activations given lack {', '.join(lacking)}: they have {', '.join(map(str, source.sites))}"
        )
    return source


def from_everywhere(source: Source, seed: int) -> Source:
    """Return a source of the same activations in an order that soon has seen all of it, where that can be had.

    Statistics and samples of the first tokens alone would be those of one document, or of one kind of them.
    """
    if isinstance(source, Harvest):
        texts: Texts = source.tokens.texts
        if texts.shuffle is None and texts.item is not None and texts.count is not None:
            tokens = replace(source.tokens, texts=replace(texts, shuffle=seed))
            again = {"batch_size": source.batch_size, "dtype": source.dtype, "device": source.device}
            return Harvest(source.models, tokens, source.sites, **again)
    if isinstance(source, ActivationCache) and source.shuffle is None:
        return ActivationCache(
            source.folder, on_broken=source.on_broken, chunk_tokens=source.chunk_tokens, shuffle=seed,
            dtype=source.dtype, device=source.device,
        )  # fmt: skip
    return source


def some_activations(source: Source, n_tokens: int) -> Iterator[dict[Site, Tensor]]:
    """Give {site: (tokens, d)} from a source's beginning, so many tokens in all."""
    left = n_tokens
    for chunk in source.chunks():
        flat = chunk.activations
        yield {site: value[:left] for site, value in flat.by_site().items()}
        left -= len(flat)
        if left <= 0:
            return


def measure(source: Source, config: TrainConfig, n_sample: int) -> tuple[Standard | None, dict[Site, Tensor]]:
    """Take means and scales, and draw a sample, in one pass over some tokens from everywhere.

    Returns:
        The standardisation, None where none is wanted; and the sample, {site: (n_sample or fewer, d)}, raw.
    """
    statistics, drawn = Statistics(), []
    share = n_sample / config.data.statistics
    generator = torch.Generator().manual_seed(config.seed)
    for batch in some_activations(from_everywhere(source, config.seed), config.data.statistics):
        statistics.update(batch)
        n_tokens = len(next(iter(batch.values())))
        taken = torch.randperm(n_tokens, generator=generator)[: math.ceil(share * n_tokens)]
        drawn.append({site: value[taken.to(value.device)] for site, value in batch.items()})
    if not drawn:
        raise DataError("the source has no tokens that count: see its texts, and which tokens are excluded")
    sample = {site: torch.cat([part[site] for part in drawn])[:n_sample] for site in drawn[0]}
    wanted = config.standard
    standard = statistics.standard(wanted.centred, wanted.per_coordinate) if wanted.enabled else None
    return standard, sample


def host_of(models: Mapping[str, Any], wiring: Wiring, source: Source, config: TrainConfig) -> Host:
    """Return what the crosscoder says of its model: name, layers, and which first positions it was not trained on."""
    tokens = getattr(source, "tokens", None)
    exclude_first = tokens.exclude_first if tokens is not None else config.data.exclude_first
    if not models or len(wiring.models) > 1:
        return Host(exclude_first=exclude_first)
    with plain_model(next(iter(models.values()))) as hf:
        host = HostModel.of(hf)
    return Host(host.name or None, n_layers=host.n_layers, exclude_first=exclude_first)


def new_crosscoder(config: TrainConfig, wiring: Wiring, source: Source, host: Host) -> Crosscoder:
    """Make the crosscoder with its random weights, which the seed decides."""
    widths = dict(zip(source.sites, source.widths, strict=True))
    needed = {site: widths[site] for site in (*wiring.read_sites, *wiring.write_sites)}
    # A generator of torch's own, given back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        crosscoder = Crosscoder(wiring, needed, config.n_latents, config.activation, host=host)
    return crosscoder.to(config.device or "cpu")


def begin(config: TrainConfig, wiring: Wiring, source: Source, host: Host) -> tuple[Crosscoder, Standard | None]:
    """Make a crosscoder as a config has it begin, in the units in which it will be trained, and these units."""
    crosscoder = new_crosscoder(config, wiring, source, host)
    wanted = config.start
    at_tokens = max(crosscoder.group_sizes) if wanted.decoders == "tokens" else 0
    standard, raw = measure(source, config, n_sample=at_tokens + SAMPLE)
    if wanted.crosscoder is not None:
        from clt_plugin.formats import load

        trained = load(wanted.crosscoder, dtype=torch.float32, lazy=False)
        start.start_from(crosscoder, trained if standard is None else unfold(trained, standard))
        return crosscoder, standard
    sample = {site: value.to(crosscoder.device, crosscoder.dtype) for site, value in raw.items()}
    sample = sample if standard is None else standard.standardise(sample)
    if wanted.threshold is not None:
        start.set_threshold(crosscoder, wanted.threshold)
    if wanted.decoders == "tied":
        start.tie_decoders(crosscoder)
    elif wanted.decoders == "tokens":
        tokens = {site: value[:at_tokens] for site, value in sample.items()}
        generator = torch.Generator().manual_seed(config.seed)
        start.start_at_tokens(crosscoder, tokens, tokens, wanted.encoder_norm, wanted.decoder_norm, generator)
    if wanted.firing_rate is not None:
        # On other tokens than those that latents begin as, each of which its own latent would count.
        start.set_firing_rate(crosscoder, {s: v[at_tokens:] for s, v in sample.items()}, wanted.firing_rate)
    return crosscoder, standard
