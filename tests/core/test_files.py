"""Files of tensors: the same values whichever kind of file they lie in, and only what is asked for is read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from clt_plugin.core import File, FormatError
from clt_plugin.core.files import read_npz

KINDS = ("safetensors", "npz", "compressed.npz", "fortran.npz", "pt")


def write(folder: Path, kind: str, tensors: dict[str, torch.Tensor]) -> File:
    path = folder / f"file.{kind}"
    arrays = {key: value.numpy() for key, value in tensors.items()}
    if kind == "safetensors":
        save_file(tensors, path)
    elif kind == "pt":
        torch.save(tensors, path)
    elif kind == "compressed.npz":
        np.savez_compressed(path, **arrays)
    else:
        np.savez(path, **{key: np.array(a, order="F") if "fortran" in kind else a for key, a in arrays.items()})
    return File(str(path))


@pytest.fixture
def tensors():
    return {"cube": torch.randn(3, 5, 7), "flat": torch.randn(11), "number": torch.tensor(2.5, dtype=torch.float64)}


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_headers(tmp_path, kind, tensors):
    file = write(tmp_path, kind, tensors)
    assert file.header() == {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}
    for key, value in tensors.items():
        assert torch.equal(file.tensor(key), value)
    rows = torch.tensor([4, 0, 4])
    assert torch.equal(file.read("cube", (2,), rows), tensors["cube"][2][rows])
    assert torch.equal(file.read("cube", (1, 3)), tensors["cube"][1, 3])
    assert torch.equal(file.read("cube", rows=slice(1, 3)), tensors["cube"][1:3])


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_stays_as_it_is(tmp_path, kind, tensors):
    file = write(tmp_path, kind, tensors)
    before = Path(file.path).read_bytes()
    file.tensor("cube").zero_()
    assert Path(file.path).read_bytes() == before
    assert torch.equal(file.tensor("cube"), tensors["cube"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.95])
def test_damage(tmp_path, kind, tensors, keep):
    file = write(tmp_path, kind, tensors | {"long": torch.randn(4000)})
    whole = Path(file.path).read_bytes()
    Path(file.path).write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(FormatError, match=rf"^{re.escape(Path(file.path).name)} .*(is empty|truncated or damaged)"):
        file.header()
    with pytest.raises(FormatError, match=r"cannot read long"):
        file.read("long")
    with pytest.raises(FormatError, match="is missing"):
        File(str(tmp_path / "nowhere.safetensors")).header()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_there(tmp_path, kind, tensors):
    file = write(tmp_path, kind, tensors)
    with pytest.raises(FormatError, match="cannot read other"):
        file.read("other")
    with pytest.raises(FormatError, match="cannot read cube"):
        file.read("cube", (7,))


def test_integers_are_named_in_headers(tmp_path):
    counts = {"count": torch.tensor([1, 2], dtype=torch.int32)}
    assert write(tmp_path, "safetensors", counts).header() == {"count": ((2,), "I32")}
    assert write(tmp_path, "npz", counts).header() == {"count": ((2,), torch.int32)}


def test_objects_are_never_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    np.savez(tmp_path / "evil.npz", x=np.array([Evil()], dtype=object))
    for name in ("evil.pt", "evil.npz"):
        with pytest.raises(FormatError):
            File(str(tmp_path / name)).read("x")
    assert not (tmp_path / "touched").exists()


def test_a_pickle_of_something_else(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(FormatError, match="a dict of tensors was expected"):
        File(str(tmp_path / "list.pt")).header()


def test_npz_headers_need_no_data(tmp_path):
    """The directory and each entry's header are enough: data that are not there are not missed."""
    file = write(tmp_path, "npz", {"a": torch.zeros(4, 5), "b": torch.ones(3)})

    class Counting:
        def __init__(self, path):
            self.file, self.read_bytes = open(path, "rb"), 0  # noqa: SIM115 - closed with the test

        def read(self, n=-1):
            data = self.file.read(n)
            self.read_bytes += len(data)
            return data

        def __getattr__(self, name):
            return getattr(self.file, name)

    large = write(tmp_path, "fortran.npz", {"a": torch.zeros(500, 500)})
    for path, entries in ((file.path, {"a", "b"}), (large.path, {"a"})):
        counting = Counting(path)
        assert set(read_npz(counting)) == entries
        assert counting.read_bytes < 20_000
        counting.file.close()
    with zipfile.ZipFile(file.path) as archive:
        assert read_npz(file.path)["b"].offset > archive.getinfo("b.npy").header_offset


PROGRAM = """
import json, re, sys
import torch
from clt_plugin.core import File

def resident():
    status = open("/proc/self/status").read()
    return sum(int(re.search(rf"{kind}:\\s+(\\d+) kB", status)[1]) for kind in ("RssAnon", "RssFile")) * 1024

file = File(sys.argv[1])
File(sys.argv[2]).read("W", rows=torch.tensor([0]))  # what libraries need is loaded
before = resident()
held = file.read("W", rows=torch.tensor([5, 40_000]))
rows = resident() - before
whole = file.tensor("W")
total = float(whole.sum())
print(json.dumps({"rows": rows, "whole": resident() - before, "sum": total}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("kind", ["safetensors", "npz", "pt"])
def test_rows_are_read_and_no_others(tmp_path, kind):
    weight = torch.randn(50_000, 500)  # 100 MB
    file = write(tmp_path, kind, {"W": weight})
    (tmp_path / "small").mkdir()
    small = write(tmp_path / "small", kind, {"W": torch.randn(2, 2)})
    run = subprocess.run([sys.executable, "-c", PROGRAM, file.path, small.path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["rows"] < 20e6
    assert found["whole"] > 90e6  # and this would tell
    assert found["sum"] == pytest.approx(float(weight.sum()), rel=1e-3)
    Path(file.path).unlink()
