"""Files that are not what they should be: each is one line that says which file, what it is and what to do."""

import argparse
import io
import re
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_vq.conversion.reading import Options, load_checkpoint, load_state_dict, read_config, read_model


WEIGHTS = {"conv.weight": torch.arange(6.0).reshape(2, 3)}


def saved(value, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def an_archive(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "def forward(self): ...")
    return buffer.getvalue()


class Stranger:
    """What no list of safe classes has."""


WRONG = {
    "html": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is an HTML page.*download the file"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is an HTML page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer.*git lfs pull"),
    "empty": (b"", r"is empty \(0 bytes\)"),
    "cut": (saved(WEIGHTS)[:200], "beginning of a file of `torch.save` .200 bytes.*cut off"),
    "cut_legacy": (saved(WEIGHTS, _use_new_zipfile_serialization=False)[:200], "damaged or was cut off"),
    "list": (saved([torch.zeros(1)]), "must hold a dict of weights, got a list"),
    "tensor": (saved(torch.zeros(1)), "must hold a dict of weights, got a Tensor"),
    "inner_list": (saved({"state_dict": [1]}), "entry 'state_dict', must hold a dict of weights, got a list"),
    "no_weights": (saved({"epoch": 3}), "'epoch' is a int"),
    "nothing": (saved({"state_dict": {}}), "it is empty"),
    "nan": (saved({"a": torch.tensor([1.0, float("nan")])}), "has NaN in a"),
    "class": (saved({"a": Stranger()}), "of the class .*Stranger, which is not on the list that is safe to read"),
    "function": (saved({"a": re.compile}), "of the class re.compile"),
    "script": (an_archive("model/code/__torch__.py"), "TorchScript archive"),
    "zip": (an_archive("weights.bin"), "a zip archive, not a checkpoint"),
    "gzip": (b"\x1f\x8b" + bytes(30), "gzip archive, to be unpacked"),
    "text": (b"hello " * 20, "a file of an unknown format"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files(case, tmp_path):
    content, message = WRONG[case]
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_state_dict(path)
    text = str(caught.value)
    assert text.startswith(f"`checkpoint` {path}") and "\n" not in text and "weights_only" not in text


@pytest.mark.parametrize("length", [4, 20, -4])
def test_cut_safetensors(length, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=f"`checkpoint` {path} is not a whole safetensors file"):
        load_state_dict(path)


def test_missing_files(tmp_path):
    for path, message in ((tmp_path / "no.pt", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(ValueError, match=f"`top` .*{message}"):
            load_checkpoint(path, "top")
    with pytest.raises(ValueError, match="`config` .* does not exist"):
        read_config(tmp_path / "no.yaml")


def test_right_files(tmp_path):
    """Whatever the extension says; with what trainers save beside the weights."""
    beside = {"args": argparse.Namespace(lr=1e-4), "best": np.float64(0.5), "epoch": np.int64(3)}
    for name, content in (
        ("new.ckpt", saved({"state_dict": WEIGHTS, **beside})),
        ("old.pth", saved({"state_dict": WEIGHTS, **beside}, _use_new_zipfile_serialization=False)),
        ("plain.bin", saved(WEIGHTS)),
    ):
        (tmp_path / name).write_bytes(content)
        assert torch.equal(load_state_dict(tmp_path / name)["conv.weight"], WEIGHTS["conv.weight"])
    save_file(WEIGHTS, tmp_path / "weights.ckpt")
    assert torch.equal(load_state_dict(tmp_path / "weights.ckpt")["conv.weight"], WEIGHTS["conv.weight"])


def test_names_of_distributed_training(tmp_path):
    """All of them have the prefix; a part of a model may be called so too."""
    other = {"module.a": torch.zeros(1), "b": torch.ones(1)}
    for name, content in (("all", {f"module.{key}": value for key, value in WEIGHTS.items()}), ("some", other)):
        torch.save({"state_dict": content}, tmp_path / f"{name}.ckpt")
    assert list(load_state_dict(tmp_path / "all.ckpt")) == list(WEIGHTS)
    assert load_state_dict(tmp_path / "some.ckpt") == other


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_become_float32(kind, tmp_path, caplog):
    """Half precision exactly, double rounded to the nearest, and said so where that is another number."""
    third = torch.tensor([1 / 3, -2.5, 6e4], dtype=torch.float64)
    content = {"a": third.to(kind), "exact": torch.ones(2).to(kind), "n": torch.arange(3)}
    torch.save(content, tmp_path / "last.ckpt")
    found = load_state_dict(tmp_path / "last.ckpt")
    assert found["a"].dtype == found["exact"].dtype == torch.float32 and found["n"].dtype == torch.int64
    assert found["a"].tolist() == np.float32(content["a"].tolist()).tolist()
    said = f"`checkpoint` {tmp_path / 'last.ckpt'} has a in float64, rounded to float32."
    assert [record.getMessage() for record in caplog.records] == ([said] if kind == torch.float64 else [])


def test_double_weights_beyond_float32(tmp_path):
    torch.save({"state_dict": {"a": torch.tensor([1e39], dtype=torch.float64)}}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="entry 'state_dict', has values in a that float32 cannot hold"):
        load_state_dict(tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: !!python/object/apply:os.system ['true']", "holds what is not plain data"),
        ("model: [1, 2", "line 1 is wrong"),
        ("- 1\n- 2\n", "must hold a mapping of names to values, got a list"),
        ("data:\n  x: 1\n", r"must have the section `model`, got \['data'\]"),
        ("model:\n  params: {}\n", "must have `target` and `params` in its section `model`"),
        ("model: VQModel\n", "must have the section `model`"),
        ("<!doctype html>", "is an HTML page"),
        ("", "must hold a mapping of names to values, got a NoneType"),
    ],
)
def test_wrong_configurations(text, message, tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"`config` {path} .*{message}"):
        read_model(path)


def test_right_configurations(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("model:\n  target: a.B\n  params:\n    size: !!python/tuple [2, 3]\n")
    assert read_model(path) == {"target": "a.B", "params": {"size": (2, 3)}}


def test_every_option_is_read():
    stage = {"target": "a.b.C", "params": {"width": 2}, "base_learning_rate": 1e-4}
    options = Options({"depth": 3, "stage": stage, "lr": 1}, "model.params")
    assert options.take("depth") == 3 and options.take("dropout", 0.1) == 0.1
    target, stage = options.node("stage")
    assert target == "C" and stage.only("width", 2, 4) == 2
    stage.finish()
    with pytest.raises(ValueError, match=r"`config` has options in model.params that are not known: \['lr'\]"):
        options.finish()
    options.training_only("lr")
    options.finish()
    with pytest.raises(ValueError, match="`config` lacks width in model.params"):
        options.take("width")
    with pytest.raises(ValueError, match="must have depth=1 or 2 in model.params, got 3"):
        options.only("depth", 1, 2)
    with pytest.raises(ValueError, match="must have a section model.params.depth, got 3"):
        options.section("depth")
