"""Recipes: a training run as a short file, in Python or YAML, which ``clt train`` runs.

A recipe in Python defines ``model``, ``data`` and ``config``, and may define ``evaluate_on``, ``output`` and
``tokenizer``. A model is a name (``"demo"``, a folder, or one of the Hub), a model, or a function that returns one;
data is whatever `Texts.of` reads, or a function that returns it. Functions are called when the run begins, so that a
recipe can be read, checked and estimated without a model at hand. One in YAML has the same entries, as plain data::

    model: openai-community/gpt2
    data: {dataset: Skylion007/openwebtext, split: train}
    config: {wiring: clt, n_latents: 10000}

A recipe is a program: run only those that you would run as one.
"""

from __future__ import annotations

import inspect
import runpy
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clt_plugin.training._yaml import parse_yaml
from clt_plugin.training.config import ConfigError, TrainConfig
from clt_plugin.training.estimation import Estimate, estimate, widths_of

if TYPE_CHECKING:
    from clt_plugin.training.loop import TrainResult

ENTRIES = ("model", "data", "config", "evaluate_on", "output", "tokenizer")
NEEDED = ENTRIES[:3]
TEXT_SETTINGS = ("column", "separator", "shuffle")


@dataclass(frozen=True, eq=False)
class Recipe:
    """A training run, before it begins.

    Attributes:
        model: A name, a model, or a function that returns one; {name: either} for a wiring over several models.
        data: Whatever `Texts.of` reads, a `Source` of activations, or a function that returns either.
        config: The run's.
        evaluate_on: As data, held out; None for the data themselves.
        output: The run's folder.
        tokenizer: One, or a function that returns it; None for the model's own.
    """

    model: Any
    data: Any
    config: TrainConfig
    evaluate_on: Any = None
    output: str | PathLike[str] | None = None
    tokenizer: Any = None

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Recipe:
        """Read a recipe.

        Args:
            path: A file that ends in ``.py``, ``.yaml`` or ``.yml``.

        Raises:
            ConfigError: There is no such file, it cannot be run or read, or it lacks something.
        """
        file = Path(path)
        if not file.is_file():
            raise ConfigError(f"there is no recipe {file}: give a file in Python or YAML, as in examples/recipes")
        if file.suffix == ".py":
            entries = _run(file)
        elif file.suffix in (".yaml", ".yml"):
            entries = _plain(file)
        else:
            raise ConfigError(f"a recipe is a file in Python (.py) or YAML (.yaml, .yml), not {file.name}")
        lacking = [name for name in NEEDED if name not in entries]
        if lacking:
            raise ConfigError(f"{file} defines no {', '.join(lacking)}: a recipe needs {', '.join(NEEDED)}")
        if not isinstance(entries["config"], TrainConfig):
            raise ConfigError(f"{file}: config is a TrainConfig, not {type(entries['config']).__name__}")
        return cls(**entries)

    def with_settings(self, settings: Mapping[str, Any]) -> Recipe:
        """Return the recipe with settings of its config changed: ``{"optimizer.learning_rate": 1e-4}``.

        Args:
            settings: By name, with dots between nested names; values as `TrainConfig.from_dict` takes them.

        Raises:
            ConfigError: There is no such setting, or it cannot be so.
        """
        data = self.config.to_dict()
        for name, value in settings.items():
            *path, last = name.split(".")
            inside: Any = data
            for step in path:
                inside = inside.get(step) if isinstance(inside, Mapping) else None
            if not isinstance(inside, dict):
                raise ConfigError(f"the config has no setting {name}: there is nothing nested in {'.'.join(path)}")
            inside[last] = value
        return self._but(TrainConfig.from_dict(data))

    def estimate(self, model: Any = None, world: int = 1) -> Estimate:
        """Estimate what the run needs, without its weights, those of a model named by a string included.

        Args:
            model: A model of the same shape to go by, such as one on PyTorch's device ``meta``; by default the
                recipe's: of a name the config alone is fetched, and a function is called.
            world: Over how many processes the run is spread.

        Raises:
            ConfigError: The run cannot be.
        """
        from clt_plugin.training import prepare

        models = {
            name: _shape_of(each) for name, each in prepare.models_of(self.model if model is None else model).items()
        }
        data = None if models else _called(self.data)
        wiring = prepare.wiring_of(self.config, models, data)
        n_bytes = sum(4 * p.numel() for each in models.values() for p in _parameters(each))
        return estimate(self.config, wiring, widths_of(models, data, wiring), model_bytes=n_bytes, world=world)

    def run(self, output: str | PathLike[str] | None = None, **changes: Any) -> TrainResult:
        """Load the model and the data, and train: see `clt_plugin.training.train`.

        Args:
            output: The run's folder; the recipe's own by default.
            **changes: Of the config: see `TrainConfig.but`.
        """
        from clt_plugin.training.loop import train

        config = self.config.but(**changes)
        model, tokenizer = _loaded(self.model, config.device), _called(self.tokenizer)
        return train(
            model,
            _called(self.data),
            config,
            output=self.output if output is None else output,
            evaluate_on=_called(self.evaluate_on),
            tokenizer=_tokenizer(self.model) if tokenizer is None else tokenizer,
        )

    def _but(self, config: TrainConfig) -> Recipe:
        return Recipe(self.model, self.data, config, self.evaluate_on, self.output, self.tokenizer)


def parse_setting(text: str) -> tuple[str, Any]:
    """Return a setting's name and value from ``name=value``, the value as in YAML.

    >>> parse_setting("optimizer.learning_rate=1e-4"), parse_setting("wiring={name: local_clt, span: 4}")
    (('optimizer.learning_rate', 0.0001), ('wiring', {'name': 'local_clt', 'span': 4}))
    """
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ConfigError(f"a setting is given as name=value, such as tokens=1000000, not {text!r}")
    return name.strip(), parse_yaml(value, f"the value of {name.strip()}")


# ---------------------------------------------------------------- files


def _run(file: Path) -> dict[str, Any]:
    """Run a recipe in Python and return what it defines."""
    try:
        names = runpy.run_path(str(file))
    except Exception as error:
        raise ConfigError(f"{file} cannot be run: {type(error).__name__}: {error}") from error
    return {name: names[name] for name in ENTRIES if name in names}


def _plain(file: Path) -> dict[str, Any]:
    """Read a recipe in YAML."""
    data = parse_yaml(file.read_text("utf-8"), str(file))
    if not isinstance(data, Mapping):
        raise ConfigError(f"{file} holds no recipe: it must be a mapping with {', '.join(NEEDED)}")
    unknown = [str(name) for name in data if name not in ENTRIES]
    if unknown:
        raise ConfigError(f"{file}: a recipe has no {', '.join(unknown)}; it has {', '.join(ENTRIES)}")
    entries = dict(data)
    for name in ("data", "evaluate_on"):
        if entries.get(name) is not None:
            entries[name] = _texts(entries[name], file, name)
    if "config" in entries:
        entries["config"] = TrainConfig.from_dict(entries["config"])
    return entries


def _texts(spec: Any, file: Path, entry: str) -> Any:
    """Return a function that opens the texts of a recipe in YAML: its own files, a data set, or the demo's corpus."""
    if spec == "demo":
        from clt_plugin.demo import load_corpus

        return load_corpus
    if not isinstance(spec, Mapping) or ("files" in spec) == ("dataset" in spec):
        raise ConfigError(
            f"{file}: {entry} is demo, or a mapping with either files (paths, as seen from the recipe) or dataset "
            f"(of the Hub), not {spec!r}"
        )
    settings = dict(spec)
    if "dataset" in settings:
        from clt_plugin.training.data import texts_from_hub

        name, stream = settings.pop("dataset"), settings.pop("streaming", True)
        return lambda: texts_from_hub(name, stream=stream, **settings)
    given = settings.pop("files")
    paths = [file.parent / path for path in ([given] if isinstance(given, str) else given)]
    wrong = [str(name) for name in settings if name not in TEXT_SETTINGS]
    if wrong:
        raise ConfigError(f"{file}: {entry} from files has no {', '.join(wrong)}: it takes {', '.join(TEXT_SETTINGS)}")
    from clt_plugin.training.data import Texts

    return lambda: Texts.of(paths, **settings)


# ---------------------------------------------------------------- models


def _called(entry: Any) -> Any:
    """Return what a recipe's function returns; whatever is none, and a generator function, which `Texts.of` reads."""
    return entry() if inspect.isfunction(entry) and not inspect.isgeneratorfunction(entry) else entry


def _loaded(model: Any, device: Any) -> Any:
    """Return the model, or {name: model}, that a recipe names, makes or holds, ready to run."""
    if isinstance(model, Mapping):
        return {name: _loaded(each, device) for name, each in model.items()}
    if not isinstance(model, str):
        return _called(model)
    if model == "demo":
        from clt_plugin.demo import load_nnsight

        return load_nnsight()
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    return loaded.to(device or "cpu").eval().requires_grad_(False)


def _tokenizer(model: Any) -> Any:
    """Return the tokenizer of a model named by a string, the first of several; None where the model brings its own."""
    if isinstance(model, Mapping):
        model = next(iter(model.values()), None)
    if not isinstance(model, str) or model == "demo":
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def _shape_of(model: Any) -> Any:
    """Return a model as far as its shape goes: of a name its modules without weights, from its config alone."""
    if not isinstance(model, str) or model == "demo":
        return _loaded(model, None)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))


def _parameters(model: Any) -> list[Any]:
    from clt_plugin.adapters.huggingface import plain_model

    with plain_model(model) as hf:
        return list(hf.parameters())
