"""Studies by name, from what a command line has: strings, and ways to load what a study needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from clt_plugin.analysis.studies import NEEDS, STUDIES, Result, Study

TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def listed() -> str:
    """Return all studies, a line each, with what they need and what may be set."""
    width = max(map(len, STUDIES))
    lines = [f"{'study':<{width}}  what it measures"]
    for name in sorted(STUDIES):
        study = STUDIES[name]
        needs = " ".join(f"--{need}" for need in study.needs)
        settings = "".join(f" [{setting}]" for setting in study.settings)
        lines += [f"{name:<{width}}  {study.about}", f"{'':<{width}}    {needs}{settings}"]
    return "\n".join(lines)


def run_study(name: str, loaders: Mapping[str, Callable[[], Any]], settings: Mapping[str, str]) -> Result:
    """Run a study.

    Args:
        name: Of `STUDIES`.
        loaders: For each of `NEEDS` that is at hand, what loads it; only what the study needs is loaded.
        settings: By name, as strings, which become what the study takes.

    Raises:
        RegistryError: There is no such study.
        ValueError: Something that it needs is not there, or a setting is not known or not possible.
    """
    study = STUDIES[name]
    lacking = [f"--{need} ({NEEDS[need]})" for need in study.needs if need not in loaders]
    if lacking:
        raise ValueError(f"the study {name} needs {', '.join(lacking)}")
    values = {setting: _value(name, study, setting, text) for setting, text in settings.items()}
    # What is not there is told before anything is loaded, which may take long.
    result: Result = study.function(*(loaders[need]() for need in study.needs), **values)
    return result


def _value(name: str, study: Study, setting: str, text: str) -> Any:
    if setting not in study.settings:
        known = ", ".join(study.settings) or "none"
        raise ValueError(f"the study {name} has no setting {setting}; it has {known}")
    kind = study.settings[setting]
    try:
        return TRUTHS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError) as error:
        wanted = "true or false" if kind is bool else f"of type {kind.__name__}"
        raise ValueError(f"the setting {setting} of the study {name} is {wanted}, not {text!r}") from error
