"""A run's folder: what it was asked to be, where it stands, and what it ended with.

Where several processes train, it is one folder that all of them see; checkpoints they write together, the rest the
first of them.

config.json           the config
standard.safetensors  means and scales of the sites
metrics.jsonl         a line for each step that was watched, and for each evaluation
checkpoints/          where it stands: see `clt_plugin.training.checkpoints`
crosscoder/           once it has ended: the crosscoder, folded, as `cp.load` reads it
run.png               once it has ended: loss, FVU, L0, dead latents and evaluations over the run
report.json           once it has ended: evaluation, conversion, time and versions
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_plugin.core import Crosscoder, Site
from clt_plugin.core.aside import written_aside
from clt_plugin.training import checkpoints
from clt_plugin.training._mesh import first_alone
from clt_plugin.training.config import ConfigError, TrainConfig
from clt_plugin.training.standard import Scaling, Standard
from clt_plugin.training.trainer import TrainError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAY_DIFFER = ("checkpoints", "evaluation", "watch", "device", "parallel", "name")
"""Settings that do not change what a run comes to: a run may be gone on with under others."""


class RunFolder:
    """Where a run keeps what it must not lose.

    Args:
        path: The folder; made if missing. None for a run that is kept in memory only.
        config: The run's.

    Raises:
        ConfigError: The folder holds a run of another config, or something else.
    """

    def __init__(self, path: Path | None, config: TrainConfig) -> None:
        self.path, self.config = path, config
        if path is not None:
            first_alone(lambda: self._open(path))

    def _open(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        mine, file = _plain(self.config.to_dict()), path / "config.json"
        if file.exists():
            _check_same(json.loads(file.read_text("utf-8")), mine, path)
        elif any(path.iterdir()):
            raise ConfigError(f"{path} holds something that is no training run: give an empty folder, or a new one")
        with written_aside(file) as aside:
            aside.write_text(json.dumps(mine, indent=1) + "\n", "utf-8")

    # ---------------------------------------------------------------- where it stands

    @property
    def was_begun(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self.path is not None and bool(checkpoints.found(self.path / "checkpoints"))

    def save(self, step: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Write a checkpoint."""
        if self.path is not None:
            checkpoints.save(self.path / "checkpoints", step, tensors, numbers, self.config.checkpoints.keep)

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Load the last checkpoint into tensors, in place, and return its numbers; None where there is none."""
        return None if self.path is None else checkpoints.load_latest(self.path / "checkpoints", tensors)

    @contextlib.contextmanager
    def naming_checkpoint(self) -> Iterator[None]:
        """Have an error that ends the run name the last good checkpoint, where there is one."""
        try:
            yield
        except TrainError as error:
            last = [] if self.path is None else checkpoints.found(self.path / "checkpoints")
            if not last:
                raise
            raise TrainError(
                f"{error}. The last good checkpoint is {last[-1]}: started again as it is, the run goes on from there; "
                "with another learning rate it is a new run, and begins in a folder of its own"
            ) from error

    def keep_standard(self, standard: Standard | None) -> None:
        """Write how sites are standardised."""
        if self.path is None or standard is None:
            return
        from safetensors.torch import save_file

        tensors = {}
        for site, scaling in standard.sites.items():
            key = f"{site.model}/{site.name}/{site.layer}"
            tensors[f"{key}/mean"], tensors[f"{key}/scale"] = scaling.mean.cpu(), scaling.scale.cpu().contiguous()
        with written_aside(self.path / "standard.safetensors") as aside:
            save_file(tensors, aside)

    def standard(self) -> Standard | None:
        """Read how sites are standardised; None where they are not."""
        if self.path is None or not (self.path / "standard.safetensors").exists():
            return None
        from safetensors.torch import load_file

        found: dict[Site, dict[str, Tensor]] = {}
        for key, value in load_file(self.path / "standard.safetensors").items():
            model, name, layer, what = key.rsplit("/", 3)
            found.setdefault(Site(model, name, int(layer)), {})[what] = value
        return Standard({site: Scaling(parts["mean"], parts["scale"]) for site, parts in found.items()})

    # ---------------------------------------------------------------- what it ended with

    def result(self, lazy: bool = False) -> tuple[Crosscoder, dict[str, Any]] | None:
        """Read the crosscoder, lazily if asked to, and the report of a run that has ended; None of one that has not."""
        if self.path is None or not (self.path / "report.json").exists():
            return None
        from clt_plugin.formats import load

        report: dict[str, Any] = json.loads((self.path / "report.json").read_text("utf-8"))
        return load(self.path / "crosscoder", lazy=lazy), report

    def end(self, crosscoder: Crosscoder, report: Mapping[str, Any], plot: Callable[[], Figure]) -> None:
        """Write the crosscoder, a plot of the run, and then the report, which says that all is there."""
        if self.path is None:
            return
        crosscoder.save(self.path / "crosscoder", overwrite=True)
        with written_aside(self.path / "run.png") as aside:
            plot().savefig(aside, dpi=120, format="png")
        with written_aside(self.path / "report.json") as aside:
            aside.write_text(json.dumps(_plain(report), indent=1, default=str) + "\n", "utf-8")


def _plain(data: Any) -> Any:
    """Return data as JSON gives them back: tuples as lists."""
    return json.loads(json.dumps(data, default=str))


def _check_same(theirs: dict[str, Any], mine: dict[str, Any], path: Path) -> None:
    differing = [
        f"{name} was {theirs.get(name)} and is now {mine.get(name)}"
        for name in mine
        if name not in MAY_DIFFER and theirs.get(name) != mine.get(name)
    ]
    if differing:
        raise ConfigError(
            f"{path} holds another run: {'; '.join(differing)}. Give the same config to go on with it, or another "
            "folder for a new one"
        )


def versions() -> dict[str, str]:
    """Return the versions that a report names."""
    import transformers

    from clt_plugin import __version__

    return {"clt_plugin": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
