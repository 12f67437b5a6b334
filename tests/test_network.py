"""No call leaves the machine that the user did not ask for."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from hf_vq.training.data.image_datasets import DataArguments, load_image_dataset


ROOT = Path(__file__).resolve().parents[1]

# Runs a script and writes down every address that it looks up or connects to; libraries swallow a refusal.
WATCHED = """
import json, runpy, sys

calls = []

def watch(event, arguments):
    if event in ("socket.getaddrinfo", "socket.connect", "socket.sendto"):
        address = arguments[0] if event == "socket.getaddrinfo" else arguments[-1]
        if not isinstance(address, (str, bytes)) or event == "socket.getaddrinfo":  # else a socket of this machine
            calls.append(f"{event}: {address}")
            raise OSError("no network in this test")

log = sys.argv.pop(1)
sys.addaudithook(watch)
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    with open(log, "w") as file:
        json.dump(calls, file)
"""


def test_a_local_folder_is_not_counted(monkeypatch, tmp_path):
    looked_up = []

    def refuse(*address, **options):
        looked_up.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    arguments = DataArguments(str(ROOT / "examples/data/emoji-64"), resolution=8, max_samples=2)
    assert len(load_image_dataset(arguments)) == 2
    assert not looked_up


def watched(script: list[str], tmp_path: Path) -> list[str]:
    """The calls of a script that believes itself online, with an empty cache."""
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_UPDATE_DOWNLOAD_COUNTS")
    environment = {name: value for name, value in os.environ.items() if name not in offline}
    environment |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = tmp_path / "calls.json"
    command = [sys.executable, "-c", WATCHED, str(log), *script]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return json.loads(log.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vq_gpt", "vq_diffusion"])
def test_training_on_local_files(tmp_path, kind):
    calls = watched(
        [
            f"examples/{kind}/train_{kind}.py", f"examples/{kind}/emoji_32.yaml",
            "--tokenizer", "examples/checkpoints/emoji-32/vqvae", "--dataset_name_or_path", "examples/data/emoji-64",
            "--max_samples", "16", "--train_batch_size", "4", "--max_train_steps", "1", "--cpu", "true",
            "--validation_steps", "0", "--output_dir", str(tmp_path / "run"),
        ],
        tmp_path,
    )  # fmt: skip
    assert calls == []


@pytest.mark.slow
def test_encode_of_the_command_line(tmp_path):
    script = tmp_path / "hf-vq.py"
    script.write_text("from hf_vq.cli import main\nmain()\n")
    command = [str(script), "encode", "examples/checkpoints/emoji-32", "examples/data/thinking_face.png"]
    assert watched([*command, "--output", str(tmp_path / "indices.safetensors")], tmp_path) == []
    assert (tmp_path / "indices.safetensors").exists()


@pytest.mark.slow
def test_a_call_is_seen(tmp_path):
    script = tmp_path / "call.py"
    script.write_text(
        "import socket\ntry:\n    socket.getaddrinfo('huggingface.co', 443)\nexcept OSError:\n    pass\n"
    )
    assert watched([str(script)], tmp_path) == ["socket.getaddrinfo: huggingface.co"]
