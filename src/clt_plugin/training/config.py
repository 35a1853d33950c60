"""What a training run is to be: small frozen values, nested by subject, that are plain data for YAML and JSON.

Sizes are in tokens where users think of tokens, in steps where they think of updates. Activations are trained on in
standard units (mean square 1 a site), and penalties' weights, thresholds and norms are in these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from os import PathLike, fspath
from typing import Any

from clt_plugin.core import Activation, Wiring
from clt_plugin.training import auxiliary  # noqa: F401 - registers its penalties
from clt_plugin.training._yaml import parse_yaml
from clt_plugin.training.errors import ConfigError
from clt_plugin.training.penalties import Penalty, from_settings

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam, and how its learning rate moves.

    Attributes:
        learning_rate: At its highest.
        betas: Of Adam.
        epsilon: Of Adam.
        warm_up: Over how many first steps the learning rate rises.
        falls_over: The share of the run over which it falls to 0 at the end.
        clip: The largest norm that the gradient of the loss may have, all parameters as one vector; None for any.
        accumulate: In how many parts a batch is gone through: memory for activations falls accordingly, and a BatchTopK
            selects within each part.
        threshold_rate: What the learning rate of thresholds is multiplied with.
    """

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    warm_up: int = 50
    falls_over: float = 0.2
    clip: float | None = None
    accumulate: int = 1
    threshold_rate: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        _above("optimizer.learning_rate", self.learning_rate)
        _whole("optimizer.warm_up", self.warm_up, 0)
        _whole("optimizer.accumulate", self.accumulate, 1)
        _share("optimizer.falls_over", self.falls_over)
        if self.clip is not None:
            _above("optimizer.clip", self.clip)


@dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """What keeps latents sparse, and what keeps them alive.

    Attributes:
        penalties: Penalties, or plain data such as ``{"name": "tanh", "weight": 1e-3}``: see `PENALTIES`.
        rise_over: The share of the run over which the weights of sparsity penalties rise.
        target_l0: Active latents a token of all groups together, or one number a group, that a controller shall reach
            by weighing sparsity penalties (`L0Controller`): a number is nearly reached, not a bound. None for weights
            as given.
        dead_after: A latent that fired on none of so many tokens is dead.
    """

    penalties: tuple[Penalty, ...] = ()
    rise_over: float = 1.0
    target_l0: float | tuple[float, ...] | None = None
    dead_after: int = 1_000_000

    def __post_init__(self) -> None:
        object.__setattr__(self, "penalties", from_settings(self.penalties))
        _share("sparsity.rise_over", self.rise_over)
        _whole("sparsity.dead_after", self.dead_after, 1)
        if isinstance(self.target_l0, Sequence):
            object.__setattr__(self, "target_l0", tuple(self.target_l0))


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """How the crosscoder begins; see `clt_plugin.training.start`.

    Attributes:
        threshold: Of every JumpReLU latent, in standard units; None for 0.03.
        firing_rate: The share of tokens on which each latent passes its threshold; None leaves b_enc at 0.
        decoders: ``"random"``; ``"tied"``: along what each latent reads; ``"tokens"``: each latent begins as a token.
        encoder_norm: Of each latent that begins as a token.
        decoder_norm: Of each latent that begins as a token.
        crosscoder: A reference to a trained crosscoder of narrower wiring to begin as, such as a PLT for a CLT; its
            activation and sizes must be the same, and all else here is left out.
    """

    threshold: float | None = None
    firing_rate: float | None = None
    decoders: str = "random"
    encoder_norm: float = 1.0
    decoder_norm: float = 0.6
    crosscoder: str | None = None

    def __post_init__(self) -> None:
        if self.decoders not in ("random", "tied", "tokens"):
            raise ConfigError(f"start.decoders is 'random', 'tied' or 'tokens', not {self.decoders!r}")
        if self.crosscoder is not None:
            object.__setattr__(self, "crosscoder", fspath(self.crosscoder))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where activations come from, on the way to batches.

    Attributes:
        length: How many tokens a row of text has, at most.
        pack: Whether rows are filled with text after text.
        bos: Whether rows begin with BOS; None for: as the tokenizer does it.
        exclude_first: How many first positions of each row are neither trained on nor, later, replaced.
        skip_special: Whether special tokens do not count, wherever they are.
        rows: How many rows the model runs on at a time.
        buffer: How many tokens are mixed at a time, and held.
        dtype: Of the activations held: ``"float32"`` or ``"bfloat16"``.
        cache: A folder to harvest into first, and to train from: for several runs on the same activations, or several
            epochs. None harvests while training.
        cache_dtype: What the cache keeps: ``"float32"``, ``"bfloat16"`` or ``"int8"``.
        cache_tokens: How many tokens it has; None for all of one epoch.
        on_broken: ``"refuse"`` or ``"skip"`` a broken shard of the cache.
        statistics: From how many tokens means and scales are taken, and the start's sample is drawn.
        epochs: How often texts may be read; None for as often as the run needs.
    """

    length: int = 256
    pack: bool = True
    bos: bool | None = None
    exclude_first: int = 1
    skip_special: bool = True
    rows: int = 16
    buffer: int = 2**16
    dtype: str = "float32"
    cache: str | None = None
    cache_dtype: str = "bfloat16"
    cache_tokens: int | None = None
    on_broken: str = "refuse"
    statistics: int = 2**16
    epochs: int | None = None

    def __post_init__(self) -> None:
        if self.cache is not None:
            object.__setattr__(self, "cache", fspath(self.cache))
        if self.dtype not in PRECISIONS:
            raise ConfigError(f"data.dtype is one of {', '.join(PRECISIONS)}, not {self.dtype!r}")
        for name, least in (("length", 2), ("rows", 1), ("buffer", 1), ("statistics", 2)):
            _whole(f"data.{name}", getattr(self, name), least)


@dataclass(frozen=True, kw_only=True)
class StandardConfig:
    """How sites are standardised; see `clt_plugin.training.standard`.

    Attributes:
        enabled: Whether they are at all; else the crosscoder is trained on raw activations.
        centred: Whether means are taken off.
        per_coordinate: Whether each coordinate has its own scale, and not each site one.
    """

    enabled: bool = True
    centred: bool = True
    per_coordinate: bool = False


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is written while a run goes on, in its folder; a run that is started again goes on from the last one.

    Attributes:
        every: After how many steps; None for none but at the end.
        keep: How many of the last ones are kept.
    """

    every: int | None = 1000
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every is not None:
            _whole("checkpoints.every", self.every, 1)
        _whole("checkpoints.keep", self.keep, 1)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation with the model in the loop: see `clt_plugin.training.evaluation`.

    Attributes:
        every: After how many steps; None for at the end only.
        tokens: On how many tokens at most; 0 for no evaluation at all.
    """

    every: int | None = None
    tokens: int = 8192

    def __post_init__(self) -> None:
        if self.every is not None:
            _whole("evaluation.every", self.every, 1)
        _whole("evaluation.tokens", self.tokens, 0)


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """What is seen of a run.

    Attributes:
        every: After how many steps metrics are written.
        console: Whether progress is shown live; None for: on a terminal.
        tensorboard: Whether TensorBoard's files are written, into the run's folder; needs ``tensorboard``.
        wandb: A project of Weights & Biases to report to; needs ``wandb``.
    """

    every: int = 10
    console: bool | None = None
    tensorboard: bool = False
    wandb: str | None = None

    def __post_init__(self) -> None:
        _whole("watch.every", self.every, 1)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How processes share the work, under ``torchrun``: data x latent of them.

    Attributes:
        latent: Over how many processes every group's latents are spread; the rest is data parallel.
    """

    latent: int = 1

    def __post_init__(self) -> None:
        _whole("parallel.latent", self.latent, 1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        n_latents: Of every group, or one number a group.
        wiring: A name such as ``"clt"``, a mapping such as ``{"name": "local_clt", "span": 4}``, or a `Wiring`: see
            `clt_plugin.training.wirings`.
        activation: A name, a mapping such as ``{"name": "topk", "k": 32}``, or an `Activation`.
        tokens: How many tokens are trained on.
        batch_size: Tokens of a step.
        optimizer: See `OptimizerConfig`; so for the others.
        precision: ``"float32"``, or ``"bfloat16"`` for autocast: products in bfloat16, weights in float32.
        path: ``"auto"``, ``"sparse"`` or ``"dense"``: see `clt_plugin.training.sparse.forward_pass`.
        compile: Whether the step is compiled with ``torch.compile``, or the name of its backend; it is dense then.
        to_jumprelu: ``"shared"`` or ``"rates"``: a TopK or BatchTopK becomes a JumpReLU at the end, see
            `clt_plugin.training.thresholds.to_jumprelu`. None leaves it; a BatchTopK gets its per-token threshold.
        device: Where the crosscoder is trained; None for the CPU.
        seed: Of initial weights, of the order of tokens, and of whatever else is drawn.
        name: What the run is called, for people and for the saved crosscoder.
    """

    n_latents: int | tuple[int, ...]
    wiring: Any = "clt"
    activation: Any = "jumprelu"
    tokens: int = 10_000_000
    batch_size: int = 4096
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    start: StartConfig = field(default_factory=StartConfig)
    data: DataConfig = field(default_factory=DataConfig)
    standard: StandardConfig = field(default_factory=StandardConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: str = "float32"
    path: str = "auto"
    compile: bool | str = False
    to_jumprelu: str | None = None
    device: str | None = None
    seed: int = 0
    name: str = "crosscoder"

    def __post_init__(self) -> None:
        for each in fields(self):
            # Nested settings may come as plain data, from YAML or from a keyword's dict.
            value, kind = getattr(self, each.name), _nested(each.name)
            if kind is not None and not isinstance(value, kind):
                object.__setattr__(self, each.name, _from(kind, value, each.name))
        object.__setattr__(self, "activation", _activation(self.activation))
        if not isinstance(self.n_latents, int):
            object.__setattr__(self, "n_latents", tuple(self.n_latents))
        _whole("tokens", self.tokens, 1)
        _whole("batch_size", self.batch_size, 1)
        _whole("seed", self.seed, 0)
        if self.batch_size % self.optimizer.accumulate:
            raise ConfigError(
                f"a batch of {self.batch_size} tokens has no {self.optimizer.accumulate} equal parts: choose another "
                "batch_size or optimizer.accumulate"
            )
        if self.tokens < self.batch_size:
            raise ConfigError(f"{self.tokens} tokens are less than one batch of {self.batch_size}")
        choices: dict[str, tuple[Any, ...]] = {"precision": PRECISIONS, "path": ("auto", "dense", "sparse")}
        choices["to_jumprelu"] = (None, "shared", "rates")
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is one of {', '.join(map(repr, allowed))}, not {getattr(self, name)!r}")

    @property
    def n_steps(self) -> int:
        """How many steps the run has."""
        return self.tokens // self.batch_size

    def but(self, **changes: Any) -> TrainConfig:
        """Return the config with some settings changed; ``optimizer={"clip": None}`` changes one of a nested one."""
        merged: dict[str, Any] = {}
        for name, value in changes.items():
            mine: Any = getattr(self, name, None)
            merged[name] = replace(mine, **value) if _nested(name) and isinstance(value, Mapping) else value
        return replace(self, **merged)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, for JSON and YAML: `from_dict` takes it."""
        data: dict[str, Any] = {}
        for each in fields(self):
            value: Any = getattr(self, each.name)
            data[each.name] = asdict(value) if each.name in NESTED else value
        data["sparsity"]["penalties"] = [penalty.to_dict() for penalty in self.sparsity.penalties]
        data["activation"] = self.activation.to_dict()
        if isinstance(self.wiring, Wiring):
            data["wiring"] = self.wiring.to_dict()
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainConfig:
        """Make one from plain data; what is left out has its default.

        Raises:
            ConfigError: A setting is not known, lacking, or not possible.
        """
        return _from(cls, data, "the config")

    @classmethod
    def from_yaml(cls, path: str | PathLike[str]) -> TrainConfig:
        """Read one from a YAML file."""
        with open(path, encoding="utf-8") as file:
            data = parse_yaml(file.read(), str(path))
        if not isinstance(data, Mapping):
            raise ConfigError(f"{path} holds no settings: it must be a mapping of names to values")
        return cls.from_dict(data)


NESTED: dict[str, Any] = {
    "optimizer": OptimizerConfig,
    "sparsity": SparsityConfig,
    "start": StartConfig,
    "data": DataConfig,
    "standard": StandardConfig,
    "checkpoints": CheckpointConfig,
    "evaluation": EvaluationConfig,
    "watch": WatchConfig,
    "parallel": ParallelConfig,
}


def _nested(name: str) -> Any:
    return NESTED.get(name)


def _from(kind: Any, data: Any, where: str) -> Any:
    """Make a config from plain data, with its settings checked by name."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} is a mapping of settings, not {data!r}")
    known = {each.name: each for each in fields(kind)}
    wrong = sorted(set(data) - set(known))
    if wrong:
        raise ConfigError(f"{where} has no setting {', '.join(wrong)}: it has {', '.join(known)}")
    lacking = [
        name
        for name, each in known.items()
        if name not in data and each.default is MISSING and each.default_factory is MISSING
    ]
    if lacking:
        raise ConfigError(f"{where} needs {', '.join(lacking)}")
    return kind(**data)


def _activation(spec: Any) -> Activation:
    if isinstance(spec, Mapping):
        settings = dict(spec)
        if "name" not in settings:
            raise ConfigError(f"activation has a name, such as 'topk', and settings, such as k: {spec!r} has no name")
        return Activation.make(settings.pop("name"), **settings)
    return Activation.make(spec)


def _whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} is a whole number of at least {least}, not {value!r}")


def _above(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"{name} is a number above 0, not {value!r}")


def _share(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"{name} is a share of the run, from 0 to 1, not {value!r}")
