"""Damaged folders: one clear error that names the file. And writing: whole, or not at all."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import clt_plugin as cp
from clt_plugin.formats import _files
from support.hub_server import HubServer, use
from support.layouts import gemma_scope_1

FORMATS = ["native", "circuit-tracer"]
SHARDS = {"native": "group_1.safetensors", "circuit-tracer": "W_enc_1.safetensors"}


@pytest.fixture(params=FORMATS)
def saved(request, tmp_path):
    folder = tmp_path / "saved"
    clt = cp.Crosscoder(cp.Wiring.clt(3, read="resid_mid"), 4, 6, "jumprelu")
    clt.save(folder, format=request.param)
    return folder


@pytest.fixture
def shard(saved):
    return next(path for name in SHARDS.values() if (path := saved / name).exists())


def refused(folder, *words, lazy=(False, True)):
    for choice in lazy:
        with pytest.raises(cp.FormatError) as error:
            cp.load(folder, lazy=choice)
        for word in words:
            assert word in str(error.value), str(error.value)


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def weight_key(tensors, start="W_enc"):
    return next(key for key in tensors if key.startswith(start))


def test_missing_shard(saved, shard):
    shard.unlink()
    refused(saved, shard.name, "missing")


def test_empty_shard(saved, shard):
    shard.write_bytes(b"")
    refused(saved, shard.name, "empty")


@pytest.mark.parametrize("keep", [0.97, 0.5, 0.01])
def test_truncated_shard(saved, shard, keep):
    content = shard.read_bytes()
    shard.write_bytes(content[: int(len(content) * keep)])
    refused(saved, shard.name, "truncated or damaged")


def test_wrong_shape(saved, shard):
    def change(tensors):
        key = weight_key(tensors, "b_enc")
        tensors[key] = tensors[key][:-1].clone()

    rewrite(shard, change)
    refused(saved, shard.name, "(5,)", "(6,)")


def test_missing_tensor(saved, shard):
    rewrite(shard, lambda tensors: tensors.pop(weight_key(tensors, "b_enc")))
    refused(saved, shard.name, "no tensor b_enc")


def test_unknown_tensor(saved, shard):
    rewrite(shard, lambda tensors: tensors.update(extra=torch.zeros(2)))
    refused(saved, shard.name, "extra", "does not know")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("start", ["W_enc", "b_enc", "threshold"])
def test_not_finite(saved, shard, start, bad):
    rewrite(shard, lambda tensors: tensors[weight_key(tensors, start)].view(-1)[-1:].fill_(bad))
    refused(saved, shard.name, "not finite", lazy=[False])
    if start != "W_enc":
        refused(saved, shard.name, "not finite", lazy=[True])
        return
    lazy = cp.load(saved, lazy=True)  # weights are looked at when they are read
    with pytest.raises(cp.FormatError, match=re.escape(shard.name)):
        lazy.encode(torch.zeros(3, 2, 4))


def test_mixed_dtypes(saved, shard):
    rewrite(shard, lambda t: t.update({weight_key(t): t[weight_key(t)].half()}))
    refused(saved, "mixes the dtypes", "dtype=")
    assert cp.load(saved, dtype=torch.float32).dtype == torch.float32


def test_integer_weights(saved, shard):
    rewrite(shard, lambda t: t.update({weight_key(t): t[weight_key(t)].int()}))
    refused(saved, shard.name, "I32", "floats")


def test_some_layers_without_threshold(tmp_path):
    cp.Crosscoder(cp.Wiring.clt(2), 4, 6, "jumprelu").save(tmp_path / "x", format="circuit-tracer")
    rewrite(tmp_path / "x" / "W_enc_1.safetensors", lambda tensors: tensors.pop("threshold_1"))
    refused(tmp_path / "x", "[1]", "no threshold")


def test_missing_layers_at_the_end(tmp_path):
    cp.Crosscoder(cp.Wiring.clt(3), 4, 6).save(tmp_path / "x", format="circuit-tracer")
    for name in ("W_enc_2", "W_dec_2"):
        (tmp_path / "x" / f"{name}.safetensors").unlink()
    refused(tmp_path / "x", "W_enc_2.safetensors", "missing")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["config.json", "JSON"]),
        ("[]", ["config.json", "object"]),
        ('{"format": "something else"}', ["no known format", "native"]),
    ],
)
def test_native_config_damaged(tmp_path, content, words):
    cp.Crosscoder(cp.Wiring.clt(2), 4, 6).save(tmp_path / "x")
    (tmp_path / "x" / "config.json").write_text(content)
    refused(tmp_path / "x", *words)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("schema_version", 99, ["schema version 99", "update clt_plugin"]),
        ("wiring", {"sites": []}, ["config.json", "wiring"]),
        ("activation", {"activation": "sigmoid"}, ["config.json", "sigmoid"]),
        ("n_latents", [6], ["config.json"]),
        ("widths", [4], ["config.json"]),
    ],
)
def test_native_config_wrong(tmp_path, key, value, words):
    cp.Crosscoder(cp.Wiring.clt(2), 4, 6).save(tmp_path / "x")
    path = tmp_path / "x" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    refused(tmp_path / "x", *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: [", ["config.yaml", "YAML"]),
        ("- 1", ["config.yaml", "mapping"]),
        ("model_kind: transcoder_set", ["transcoder_set"]),
        ("feature_input_hook: hook_nowhere", ["hook_nowhere", "hook_resid_mid"]),
    ],
)
def test_circuit_tracer_config_wrong(tmp_path, content, words):
    cp.Crosscoder(cp.Wiring.clt(2), 4, 6).save(tmp_path / "x", format="circuit-tracer")
    (tmp_path / "x" / "config.yaml").write_text(content)
    refused(tmp_path / "x", *words)


def test_no_folder_and_no_format(tmp_path):
    refused(tmp_path / "nowhere", f"no folder {tmp_path / 'nowhere'}", "hf://")
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path, "no known format", "notes.txt")


# ---------------------------------------------------------------- from the Hub


@pytest.fixture(scope="module")
def server():
    with HubServer() as hub:
        yield hub


@pytest.fixture
def hub(server, tmp_path):
    with use(server, tmp_path / "machine"):
        yield server


def refused_from_the_hub(hub, folder, *words):
    repo = f"owner/damaged-{len(hub.repositories)}"
    hub.add(repo, folder)
    refused(f"hf://{repo}", *words)


def with_header(path, change):
    """Rewrite a safetensors file's header, so that the file keeps its size."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header, next(key for key in header if key.startswith("W_enc")))
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def move(header, key, begin, end):
    offsets = header[key]["data_offsets"]
    header[key]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]


HEADERS = {
    "no shape": (lambda h, k: h[k].pop("shape"), "lacks a dtype, shape or offsets"),
    "no dtype": (lambda h, k: h[k].pop("dtype"), "lacks a dtype, shape or offsets"),
    "no offsets": (lambda h, k: h[k].pop("data_offsets"), "lacks a dtype, shape or offsets"),
    "not a mapping": (lambda h, k: h.update({k: 1}), "lacks a dtype, shape or offsets"),
    "too wide": (lambda h, k: h[k].update(shape=[6, 5]), "where (6, 5) of F32 was expected"),
    "below 0": (lambda h, k: h[k].update(shape=[-6, -4]), "of shape (-6, -4)"),
    "a gap": (lambda h, k: [move(h, name, 4, 4) for name in h if name != "__metadata__"], "after byte 0"),
    "an overlap": (lambda h, k: [move(h, name, -4, -4) for name in [*h][1:]], "is said to lie at"),
    "numbers": (lambda h, k: h[k].update(shape=[6.0, 4]), "of shape (6.0, 4)"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_contradict_themselves(hub, saved, shard, name):
    """By ranges of bytes as from a whole copy: no tensor is read from where another one lies."""
    change, words = HEADERS[name]
    with_header(shard, change)
    refused_from_the_hub(hub, saved, shard.name, "truncated or damaged on the Hub", words)
    refused(saved, shard.name)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xff", (2**62).to_bytes(8, "little"), b"x" * 100])
def test_what_is_no_safetensors(hub, saved, shard, content):
    shard.write_bytes(content if len(content) >= 8 else len(content).to_bytes(8, "little") + content)
    refused_from_the_hub(hub, saved, shard.name, "truncated or damaged on the Hub")
    refused(saved, shard.name)


@pytest.mark.parametrize("keep", [0.97, 0.5, 0.01])
def test_truncated_on_the_hub(hub, saved, shard, keep):
    content = shard.read_bytes()
    shard.write_bytes(content[: int(len(content) * keep)])
    refused_from_the_hub(hub, saved, shard.name, "truncated or damaged on the Hub")


def big_endian(path):
    np.savez(path, **{key: value.astype(value.dtype.newbyteorder(">")) for key, value in np.load(path).items()})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "truncated or damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[30:]), "truncated or damaged"),
        (lambda path: path.write_bytes(b"garbage" * 100), "truncated or damaged"),
        (big_endian, "weights are floats"),
    ],
)
def test_npz_on_the_hub(hub, tmp_path, damage, words):
    folder = tmp_path / "layer_5" / "width_16k" / "average_l0_87"
    gemma_scope_1.write(folder)
    damage(folder / "params.npz")
    name = "layer_5/width_16k/average_l0_87"
    hub.add("google/gemma-scope-2b-pt-transcoders", {f"{name}/params.npz": folder / "params.npz"})
    refused(f"hf://google/gemma-scope-2b-pt-transcoders/{name}", "params.npz", words)


# ---------------------------------------------------------------- writing


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else None


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch, format, existing):
    clt = cp.Crosscoder(cp.Wiring.clt(3, read="resid_mid"), 4, 6)
    folder = tmp_path / "x"
    if existing:
        clt.save(folder, format=format)
    before, calls = snapshot(folder), []

    write = _files._write

    def full_disk(file, key, rows):
        calls.append(key)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        write(file, key, rows)

    monkeypatch.setattr(_files, "_write", full_disk)
    with pytest.raises(OSError, match="No space left"):
        clt.save(folder, format=format, overwrite=True)
    assert len(calls) == 3
    assert snapshot(folder) == before
    assert os.listdir(tmp_path) == (["x"] if existing else [])


def test_a_failed_swap_leaves_what_was_there(tmp_path, monkeypatch):
    clt = cp.Crosscoder(cp.Wiring.clt(2), 4, 6)
    clt.save(tmp_path / "x")
    before = snapshot(tmp_path / "x")
    rename = _files.Path.rename

    def failing(self, target):
        if self.suffix == ".partial":
            raise OSError("the disk went away")
        return rename(self, target)

    monkeypatch.setattr(_files.Path, "rename", failing)
    with pytest.raises(OSError, match="went away"):
        clt.save(tmp_path / "x", overwrite=True)
    assert snapshot(tmp_path / "x") == before
    assert os.listdir(tmp_path) == ["x"]


def test_nothing_is_overwritten_unasked(tmp_path):
    clt = cp.Crosscoder(cp.Wiring.clt(2), 4, 6)
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        clt.save(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(FileExistsError, match="is a file"):
        clt.save(tmp_path / "thesis.tex")
    (tmp_path / "empty").mkdir()
    clt.save(tmp_path / "empty")
    assert cp.load(tmp_path / "empty").n_layers == 2


@pytest.mark.parametrize(
    ("crosscoder", "held"),
    [(False, "thesis.tex"), (False, "config.json"), (False, "a/b.txt"), (True, "a/b.txt"), (True, ".git/HEAD")],
)
def test_only_crosscoders_are_overwritten(tmp_path, held, crosscoder):
    clt, folder = cp.Crosscoder(cp.Wiring.clt(2), 4, 6), tmp_path / "x"
    if crosscoder:
        clt.save(folder)
    (folder / held).parent.mkdir(parents=True, exist_ok=True)
    (folder / held).write_text("{}")
    with pytest.raises(FileExistsError, match=r"overwrite=True does not replace"):
        clt.save(folder, overwrite=True)
    assert (folder / held).read_text() == "{}"


def test_onto_a_link(tmp_path):
    clt = cp.Crosscoder(cp.Wiring.clt(2), 4, 6)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "clt", target_is_directory=True)
    for n_layers in (2, 3):
        clt = cp.Crosscoder(cp.Wiring.clt(n_layers), 4, 6)
        clt.save(tmp_path / "link", overwrite=True)
        assert (tmp_path / "link").is_symlink()
        assert cp.load(tmp_path / "disk" / "clt").n_layers == cp.load(tmp_path / "link").n_layers == n_layers
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"]
    assert os.listdir(tmp_path / "disk") == ["clt"]


KILLED = """
import os, sys
import clt_plugin as cp
from clt_plugin.formats import _files

def die(*_):
    os.kill(os.getpid(), 9)

if sys.argv[2] == "writing":
    _files._write = die
else:  # between the two renames
    rename = _files.Path.rename
    _files.Path.rename = lambda self, to: die() if self.suffix == ".partial" else rename(self, to)
cp.Crosscoder(cp.Wiring.clt(3), 4, 6).save(sys.argv[1], overwrite=True)
"""


@pytest.mark.parametrize("when", ["writing", "swapping"])
def test_after_a_run_that_was_killed(tmp_path, when):
    """What it left goes with the next save to the same folder; a folder it had moved away comes back."""
    clt, folder = cp.Crosscoder(cp.Wiring.clt(2), 4, 6), tmp_path / "x"
    clt.save(folder)
    clt.save(tmp_path / "y")
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), when], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert folder.exists() == (when == "writing")
    left = {name for name in os.listdir(tmp_path) if name.startswith(".x.")}
    assert {name.rpartition(".")[2] for name in left} == ({"partial"} if when == "writing" else {"partial", "old"})
    living = f"{_files._beside(folder)}{os.getppid()}.abc.partial"
    (tmp_path / living).mkdir()
    clt.save(tmp_path / "y", overwrite=True)
    assert left < {*os.listdir(tmp_path)}  # of another folder
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        clt.save(folder)
    assert cp.load(folder).n_layers == 2
    assert sorted(os.listdir(tmp_path)) == [living, "x", "y"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    clt = cp.Crosscoder(cp.Wiring.clt(2), 4, 6)
    clt.W_dec[1].data[0, 0] = float("nan")
    with pytest.raises(cp.FormatError, match="W_dec"):
        clt.save(tmp_path / "x")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: cp.Crosscoder(cp.Wiring.plt(2), 4, 6), "wiring is plt"),
        (lambda: cp.Crosscoder(cp.Wiring.clt(2).with_skips(), 4, 6), "affine skips"),
        (lambda: cp.Crosscoder(cp.Wiring.clt(2), 4, 6, "topk", k=2), "TopK"),
        (lambda: cp.Crosscoder(cp.Wiring.acausal([0, 1]), 4, 6), "resid_post"),
        (lambda: cp.Crosscoder(cp.Wiring.clt(2), 4, (6, 7)), r"different numbers of latents, \[6, 7\]"),
        (lambda: cp.Crosscoder(cp.Wiring.clt(2), 4, 6, host=cp.Host(n_layers=9)), "2 layers of a model of 9"),
        (lambda: cp.Crosscoder(cp.Wiring.clt(2), 4, 6).select(features={0: [1]}), "selection"),
    ],
)
def test_what_circuit_tracer_cannot_hold(tmp_path, make, reason):
    with pytest.raises(cp.FormatError, match=reason):
        make().save(tmp_path / "x", format="circuit-tracer")
    assert os.listdir(tmp_path) == []


def test_lazy_is_yes_no_or_auto(tmp_path):
    cp.Crosscoder(cp.Wiring.clt(2), 4, 6).save(tmp_path / "x")
    with pytest.raises(ValueError, match="lazy must be True, False or 'auto', not 'never'"):
        cp.load(tmp_path / "x", lazy="never")


@pytest.mark.parametrize("lazy", [False, True])
def test_what_is_loaded_is_frozen(tmp_path, lazy):
    cp.Crosscoder(cp.Wiring.clt(2).with_skips(), 4, 6, "jumprelu").save(tmp_path / "x")
    clt = cp.load(tmp_path / "x", lazy=lazy)
    assert not any(parameter.requires_grad for parameter in (*clt.parameters(), *clt.materialize().parameters()))


def test_lazy_weights_say_where_to_find_them(tmp_path):
    cp.Crosscoder(cp.Wiring.clt(2), 4, 6).save(tmp_path / "x")
    with pytest.raises(AttributeError, match="decoder_vectors or materialize"):
        _ = cp.load(tmp_path / "x", lazy=True).W_dec
