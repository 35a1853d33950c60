"""Configs with values of kinds that no tool writes: refused for what they are, never with an error of Python's own."""

from __future__ import annotations

import importlib
import json
import pkgutil
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

import clt_plugin as cp
from clt_plugin.formats import FORMATS
from clt_plugin.hub import open_folders
from support import layouts

ODD = [None, True, -1, 2.5, float("inf"), 10**30, "a.{}", [[]], {"x": ["x"]}]
MODULES = [
    importlib.import_module(f"{layouts.__name__}.{info.name}") for info in pkgutil.iter_modules(layouts.__path__)
]
BY_FORMAT = {layout.format: layout for module in MODULES for layout in module.LAYOUTS}


def places(value: Any, place: tuple = ()) -> Iterator[tuple]:
    """Return where a config has values, the whole of it first."""
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield from places(below, (*place, key))


def changed(value: Any, place: tuple, odd: Any) -> Any:
    """Return a config with another value at a place."""
    if not place:
        return odd
    copy = value.copy()
    copy[place[0]] = changed(value[place[0]], place[1:], odd)
    return copy


@pytest.mark.parametrize("format", BY_FORMAT)
def test_odd_values_are_refused_or_not_asked_for(format, tmp_path):
    layout, raw = BY_FORMAT[format], []
    layout.write(tmp_path)
    for config in [*tmp_path.rglob("*.json"), *tmp_path.rglob("*.yaml")]:
        text = config.read_text()
        parse, write = (json.loads, json.dumps) if config.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
        for place in places(parse(text)):
            for odd in ODD:
                config.write_text(write(changed(parse(text), place, odd)))
                if error := describe(FORMATS[format], str(tmp_path / layout.reference)):
                    raw.append((place, odd, error))
        config.write_text(text)
    assert not raw


def describe(format: Any, reference: str) -> Exception | None:
    """Describe a folder; return the error that comes of it unless it is a FormatError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for folder in open_folders(reference):
                if format.sniff(folder):
                    str(format.describe(folder))
    except cp.FormatError:
        pass
    except Exception as error:
        return error
    return None
