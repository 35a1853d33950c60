"""Training from a model and texts to a saved crosscoder: the loop, from top to bottom."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from clt_plugin.core import Crosscoder, Host, Site, Wiring
from clt_plugin.training import prepare
from clt_plugin.training._stop import asked_to_stop
from clt_plugin.training.config import ConfigError, TrainConfig
from clt_plugin.training.data import Batch, Buffer, Source
from clt_plugin.training.estimation import check_room
from clt_plugin.training.evaluation import Evaluation, evaluate
from clt_plugin.training.host_mlps import HostMLPs
from clt_plugin.training.parallel import (
    Mesh,
    by_first,
    check,
    first_alone,
    put_together,
    sizes_of_share,
    spread,
    start,
)
from clt_plugin.training.run import RunFolder, versions
from clt_plugin.training.thresholds import Conversion, to_jumprelu, to_threshold
from clt_plugin.training.trainer import Metrics, Trainer, TrainError
from clt_plugin.training.watch import Watching

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

T = TypeVar("T")

CONVERTED_ON = 8
"""On how many batches a selection is turned into thresholds, and its loss measured before and after."""


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What a run came to.

    Attributes:
        crosscoder: Folded, so that it acts on raw activations, in evaluation mode.
        config: Of the run.
        report: Plain data: evaluation, conversion, tokens, seconds, versions.
        history: What was watched: a mapping for each step, and for each evaluation.
        folder: Where all of it lies; None where nothing was written.
    """

    crosscoder: Crosscoder
    config: TrainConfig
    report: dict[str, Any]
    history: list[dict[str, Any]] = field(repr=False)
    folder: Path | None = None

    @property
    def table(self) -> pd.DataFrame:
        """The metrics of the steps that were watched, one row a step; L0 and the like are means over groups."""
        from clt_plugin.training.watch.history import table_of

        return table_of(self.history)

    def plot(self) -> Figure:
        """Plot loss, L0, dead latents and evaluations over the run."""
        from clt_plugin.report.training import plot_run

        return plot_run(self.history, self.config.name, self.config.sparsity.target_l0)


def train(
    model: Any,
    data: Any,
    config: TrainConfig,
    *,
    output: str | PathLike[str] | None = None,
    evaluate_on: Any = None,
    tokenizer: Any = None,
) -> TrainResult:
    """Train a crosscoder on a model's activations.

    A run with an output folder can be killed at any moment: called again with the same arguments it goes on from its
    last checkpoint, and ends with the same weights as if it had never stopped. Ctrl-C and SIGTERM end it between two
    steps, with a checkpoint. Called once more after its end, it returns what it ended with.

    Args:
        model: An nnsight model, a TransformerBridge or a transformers model; {name: model} for a wiring over several;
            None where data are activations.
        data: Texts (whatever `Texts.of` reads: files, folders, lists, data sets), or a `Source` of activations.
        config: What to train, and how.
        output: The run's folder: see `clt_plugin.training.run`. None keeps everything in memory.
        evaluate_on: Texts to evaluate on with the model in the loop, held out; the training texts by default.
        tokenizer: For models without one of their own.

    Raises:
        ConfigError: The config cannot be, does not fit, or is not that of the run in the folder.
        DataError: The data cannot be had as asked.
        TrainError: The run cannot go on: a loss that is not finite, too few tokens, or it was asked to stop.
        CheckpointError: A checkpoint cannot be written, or none can be read.
    """
    mesh = start(config)
    if mesh.size > 1 and output is None:
        raise ConfigError("what several processes train is put together in a folder that all of them see: give output=")
    folder = RunFolder(None if output is None else Path(output), config)
    ended = _ended(folder, mesh)
    if ended is not None:
        return ended
    models = prepare.models_of(model)
    wiring = prepare.wiring_of(config, models, data)
    check_room(config, models, data, wiring, folder.path, mesh.size)
    source = prepare.open_source(models, data, wiring, config, tokenizer)
    trainer = _begin(folder, wiring, source, prepare.host_of(models, wiring, source, config), mesh)
    mlps = HostMLPs(model, wiring, config.sparsity.penalties, config.seed)
    if evaluate_on is None and models and not prepare.is_source(data):
        evaluate_on = data

    def evaluated(crosscoder: Crosscoder) -> Evaluation | None:
        return _evaluate(model, crosscoder, evaluate_on, config, tokenizer)

    def evaluated_now(sample: Mapping[Site, Tensor], whole: Crosscoder) -> Evaluation | None:
        return evaluated(trainer.finished(sample, whole))

    with ExitStack() as stack:
        buffer = stack.enter_context(Buffer(source, config.data.buffer, seed=config.seed))
        _go_on(folder, trainer, buffer, mlps)
        watch = Watching(config, folder.path, trainer.n_done) if mesh.is_first else _Unwatched()
        stack.enter_context(watch)
        asked = stack.enter_context(asked_to_stop())
        began, begun_at = time.perf_counter(), trainer.n_done
        while trainer.n_done < config.n_steps:
            batch = _draw(buffer, config, trainer)
            raw = batch.by_site()
            with folder.naming_checkpoint():
                metrics = trainer.step(raw, raw, **mlps.about(raw, trainer.standard))
            watch.step(metrics)
            done = trainer.n_done
            if _due(config.evaluation.every, done) and done < config.n_steps:
                with buffer.paused():
                    found = _by_first(trainer, partial(evaluated_now, raw))
                if found is not None:
                    watch.evaluated(done - 1, found)
            stop = mesh.any(asked())
            if _due(config.checkpoints.every, done) or stop:
                _keep(folder, trainer, buffer, mlps)
            if stop:
                where = f"started again it goes on from there: {folder.path}" if folder.path else "nothing was kept"
                raise TrainError(f"the run was asked to stop, and did after {done} of {config.n_steps} steps; {where}")
        seconds = time.perf_counter() - began
        buffer.close()
        about = {
            "name": config.name,
            "tokens": config.n_steps * config.batch_size,
            "seconds": seconds,
            "tokens_per_second": (config.n_steps - begun_at) * config.batch_size / max(seconds, 1e-9),
            "processes": mesh.size,
            "evaluated_on": "held-out texts" if evaluate_on is not data else "training texts",
        }
        result = _by_first(trainer, lambda whole: _end(folder, trainer, whole, source, evaluated, watch, about))
    if result is None:
        result = _ended(folder, mesh)
        assert result is not None
    return result


# ---------------------------------------------------------------- beginning, and going on


def _ended(folder: RunFolder, mesh: Mesh) -> TrainResult | None:
    """Return what a run came to, where it has ended."""
    ended = folder.result(lazy=not mesh.is_first)
    if ended is None:
        return None
    config = folder.config
    history = Watching(config, folder.path, config.n_steps).history if mesh.is_first else []
    return TrainResult(ended[0], config, ended[1], history, folder.path)


def _begin(folder: RunFolder, wiring: Wiring, source: Source, host: Host, mesh: Mesh) -> Trainer:
    """Make the trainer, in the units of the run."""
    config = folder.config
    check(config, config.activation, mesh)
    own = config.but(n_latents=sizes_of_share(config.n_latents, mesh))
    if folder.was_begun:
        # Its weights come from the checkpoint; statistics are not taken again.
        share = prepare.new_crosscoder(own, wiring, source, host)
        return Trainer(share, config, folder.standard(), mesh)
    # The whole one, of which many processes have a share each, may be too large for the device.
    where = config if mesh.size == 1 else config.but(device=None)
    begun = first_alone(lambda: prepare.begin(where, wiring, source, host))
    standard = by_first(lambda: begun[1] if begun is not None else None)
    share = spread(begun[0] if begun is not None else None, mesh)
    if mesh.is_first:
        folder.keep_standard(standard)
    return Trainer(share, config, standard, mesh)


def _tensors(trainer: Trainer, mlps: HostMLPs) -> dict[str, Tensor]:
    return {**trainer.tensors(), "generator": mlps.generator.get_state()}


def _keep(folder: RunFolder, trainer: Trainer, buffer: Buffer, mlps: HostMLPs) -> None:
    numbers = {"trainer": trainer.numbers(), "buffer": buffer.state_dict()}
    folder.save(trainer.n_done, _tensors(trainer, mlps), numbers)


def _go_on(folder: RunFolder, trainer: Trainer, buffer: Buffer, mlps: HostMLPs) -> None:
    """Take up where the last checkpoint stands, if there is one."""
    tensors = _tensors(trainer, mlps)
    numbers = folder.load(tensors)
    if numbers is not None:
        trainer.load_numbers(numbers["trainer"])
        buffer.load_state_dict(numbers["buffer"])
        mlps.generator.set_state(tensors["generator"])


def _draw(buffer: Buffer, config: TrainConfig, trainer: Trainer) -> Batch:
    batch = buffer.draw(config.batch_size)
    if len(batch) < config.batch_size:
        raise TrainError(
            f"the activations end after {trainer.n_done * config.batch_size + len(batch)} tokens, but the run has "
            f"{config.n_steps * config.batch_size}: lower tokens=, give more texts, or allow more epochs of them"
        )
    return batch


def _due(every: int | None, done: int) -> bool:
    return every is not None and done % every == 0


class _Unwatched(AbstractContextManager["_Unwatched"]):
    """What processes but the first tell: nobody."""

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []

    def step(self, metrics: Metrics) -> None:
        """Hear of a step."""

    def evaluated(self, step: int, evaluation: Any) -> None:
        """Hear of an evaluation."""

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""


# ---------------------------------------------------------------- ending


def _by_first(trainer: Trainer, function: Callable[[Crosscoder], T]) -> T | None:
    """Have the first process do something with the whole crosscoder while the others wait; None for these."""
    whole = put_together(trainer.crosscoder, trainer.mesh)
    return first_alone(lambda: function(cast(Crosscoder, whole)))


def _end(
    folder: RunFolder,
    trainer: Trainer,
    whole: Crosscoder,
    source: Source,
    evaluated: Callable[[Crosscoder], Evaluation | None],
    watch: Watching | _Unwatched,
    about: Mapping[str, Any],
) -> TrainResult:
    """Make of the last weights what a run comes to, and write it."""
    config = folder.config
    crosscoder, conversion = finish(trainer, source, whole)
    evaluation = evaluated(crosscoder)
    if evaluation is not None:
        watch.evaluated(config.n_steps - 1, evaluation)
    report = {
        **about,
        "evaluation": None if evaluation is None else evaluation.to_dict(),
        "conversion": None if conversion is None else _numbers_of(conversion),
        "versions": versions(),
    }
    crosscoder.metadata |= {"recipe": config.to_dict(), "metrics": report["evaluation"]}
    result = TrainResult(crosscoder, config, report, watch.history, folder.path)
    folder.end(crosscoder, report, result.plot)
    return result


def finish(
    trainer: Trainer, source: Source, crosscoder: Crosscoder | None = None
) -> tuple[Crosscoder, Conversion | None]:
    """Return the crosscoder as it will be used: with thresholds where a batch selected, folded, in evaluation mode.

    Args:
        trainer: After its last step.
        source: For batches on which thresholds are measured.
        crosscoder: The whole one, where the trainer has a share.

    Returns:
        The crosscoder, and what becoming thresholds did to loss and L0; None where nothing became any.
    """
    config, conversion = trainer.config, None
    crosscoder = trainer.crosscoder if crosscoder is None else crosscoder
    if crosscoder.activation.has_batch_threshold or config.to_jumprelu is not None:
        batches = _Again(source, trainer, crosscoder.device)
        if config.to_jumprelu is not None:
            conversion = to_jumprelu(crosscoder, batches, config.to_jumprelu)
        else:
            # Not the one that is trained; one that was put together of shares is a copy already.
            own = copy.deepcopy(crosscoder) if crosscoder is trainer.crosscoder else crosscoder
            conversion = to_threshold(own, batches)
    return trainer.folded(crosscoder if conversion is None else conversion.crosscoder), conversion


class _Again:
    """Batches in units of training, harvested again each time they are gone through, so that few are held."""

    def __init__(self, source: Source, trainer: Trainer, device: torch.device) -> None:
        # Not the tokens that come first in training, nor those of the statistics.
        self.source = prepare.from_everywhere(source, trainer.config.seed + 1)
        self.trainer, self.device = trainer, device

    def __iter__(self) -> Iterator[tuple[dict[Site, Tensor], dict[Site, Tensor]]]:
        size = self.trainer.config.batch_size
        held: list[dict[Site, Tensor]] = []
        for some in prepare.some_activations(self.source, CONVERTED_ON * size):
            held.append(some)
            if sum(len(next(iter(part.values()))) for part in held) >= size:
                whole = {site: torch.cat([part[site] for part in held]) for site in some}
                batch = self.trainer.standardised({site: value[:size] for site, value in whole.items()})
                batch = {site: value.to(self.device) for site, value in batch.items()}
                yield batch, batch
                held = [{site: value[size:] for site, value in whole.items()}]


def _evaluate(model: Any, crosscoder: Crosscoder, texts: Any, config: TrainConfig, tokenizer: Any) -> Evaluation | None:
    wanted = config.evaluation
    if texts is None or model is None or wanted.tokens == 0:
        return None
    settings: dict[str, Any] = {
        "max_tokens": wanted.tokens,
        "length": config.data.length,
        "batch_size": config.data.rows,
    }
    # Shares are put together in the CPU's memory.
    crosscoder = crosscoder.to(config.device or "cpu")
    return evaluate(model, crosscoder, texts, tokenizer=tokenizer, bar=False, **settings)


def _numbers_of(conversion: Conversion) -> Mapping[str, Any]:
    return {key: value for key, value in vars(conversion).items() if key != "crosscoder"}
