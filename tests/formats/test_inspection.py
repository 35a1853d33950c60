"""Inspecting: from headers alone, here and on the Hub, and with everything that is wrong."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import clt_plugin as cp
from clt_plugin.cli import app
from clt_plugin.hub import remote
from support.hub_server import HubServer, use


@pytest.fixture
def folder(tmp_path):
    clt = cp.Crosscoder(cp.Wiring.clt(3, read="resid_mid"), 4, 2048, "jumprelu", host=cp.Host("m/n", None, 3, 1))
    clt.save(tmp_path / "clt", format="circuit-tracer")
    return tmp_path / "clt"


def test_what_it_says(folder):
    found = cp.inspect(folder)
    assert found.is_complete
    rows = found.rows()
    assert rows["format"] == "circuit-tracer"
    assert rows["model"] == "m/n"
    assert rows["layers"] == "0 to 2 (3)"
    assert rows["latents"] == "2,048 a group, 6,144 in 3 groups"
    assert rows["d_model"] == "4"
    assert rows["activation"] == "JumpReLU(bandwidth=0.001)"
    assert (rows["reads"], rows["writes"], rows["dtype"]) == ("resid_mid", "mlp_out", "float32")
    assert rows["left out"] == "the first position"
    assert found.size == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert rows["size"] == "337.2 KiB"
    assert "group 1   .   rw  w" in str(found)
    assert "to fetch" not in rows


def test_everything_that_is_wrong(folder):
    (folder / "W_dec_1.safetensors").write_bytes(b"")
    (folder / "W_dec_2.safetensors").write_bytes((folder / "W_dec_0.safetensors").read_bytes())
    found = cp.inspect(folder)
    assert not found.is_complete
    assert any("W_dec_1.safetensors is empty" in problem for problem in found.problems)
    (folder / "W_dec_1.safetensors").unlink()
    found = cp.inspect(folder)
    assert found.description is None
    assert "W_dec_1.safetensors missing" in found.problems[0]
    assert found.rows()["format"] == "circuit-tracer"
    assert "- clt: W_dec_1.safetensors missing" in str(found)


def test_several_problems_at_once(folder):
    for layer in (0, 2):
        path = folder / f"W_enc_{layer}.safetensors"
        tensors = load_file(path)
        save_file(tensors | {f"b_enc_{layer}": tensors[f"b_enc_{layer}"][1:].clone()}, path)
    problems = cp.inspect(folder).problems
    assert len(problems) == 2
    assert "W_enc_0" in problems[0]
    assert "W_enc_2" in problems[1]


def test_one_of_each_is_not_called_several(tmp_path):
    clt = cp.Crosscoder(cp.Wiring.plt(1), 3, 5)
    clt.save(tmp_path / "one")
    rows = cp.inspect(tmp_path / "one").rows()
    assert rows["latents"] == "5 a group, 5 in 1 group"
    assert rows["left out"] == "nothing"


def test_dtypes_that_cannot_be_loaded_as_they_are(folder):
    path = folder / "W_enc_1.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in load_file(path).items()}, path)
    found = cp.inspect(folder)
    (problem,) = found.problems
    assert "mixes the dtypes torch.bfloat16, torch.float32" in problem
    assert not found.is_complete
    with pytest.raises(cp.FormatError, match="mixes the dtypes"):
        cp.load(folder)


def test_on_the_hub_no_weights_are_fetched(folder, tmp_path):
    with HubServer() as hub, use(hub, tmp_path / "machine"):
        commit = hub.add("o/n", folder)
        found = cp.inspect("hf://o/n")
        assert found.is_complete
        assert found.source == f"hf://o/n@{commit}"
        assert found.rows()["to fetch"] == "6 files, 337.2 KiB"
        assert max(hub.fetched("o/n").values()) <= remote.HEADER_BYTES
        cp.load("hf://o/n")
        assert cp.inspect("hf://o/n").not_here == {}


# ---------------------------------------------------------------- the command


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_commands(folder, tmp_path):
    shown = run("inspect", folder)
    assert shown.exit_code == 0
    assert "circuit-tracer" in shown.output
    data = json.loads(run("inspect", folder, "--json").output)
    assert data["host"]["model_name"] == "m/n"
    assert data["n_latents"] == [2048] * 3
    done = run("convert", folder, tmp_path / "native", "--dtype", "bfloat16", "--layer", "1")
    assert done.exit_code == 0, done.output
    assert cp.load(tmp_path / "native").wiring.home == (1,)
    assert "gemma-2-2b-426k" in run("list").output
    assert "gemma-2-2b-426k" not in run("list", "qwen").output


def test_commands_that_fail_say_so_in_a_line(folder, tmp_path):
    cp.load(folder).save(tmp_path / "again")
    (folder / "W_dec_1.safetensors").unlink()
    broken = run("inspect", folder)
    assert broken.exit_code == 1
    assert "W_dec_1.safetensors missing" in broken.output
    failed = run("convert", folder, tmp_path / "native")
    assert failed.exit_code == 2
    assert "W_dec_1.safetensors missing" in failed.output
    assert "Traceback" not in failed.output
    assert not (tmp_path / "native").exists()
    assert run("inspect", tmp_path / "nowhere").exit_code == 2
    (tmp_path / "file").write_text("")
    in_the_way = run("convert", tmp_path / "again", tmp_path / "file" / "x")
    assert in_the_way.exit_code == 2, in_the_way.output
    assert "Traceback" not in in_the_way.output
    assert run("convert", folder, tmp_path / "x", "--dtype", "float8").exit_code == 2
