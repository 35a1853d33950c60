"""YAML as users write it: with ``1e-4`` for a number."""

from __future__ import annotations

import re
from typing import Any

from clt_plugin.training.errors import ConfigError

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def parse_yaml(text: str, what: str) -> Any:
    """Return what YAML says. Numbers such as ``1e-4``, which YAML 1.1 takes for words, are numbers.

    Raises:
        ConfigError: It is no YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(NUMBER.pattern + r"\Z"), list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} is no YAML: {' '.join(str(error).split())}") from error
