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
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert process.returncode == 0, process.stderr
    return json.loads(log.read_text())


TRAIN = """
from hf_vq.cli import main
systems = ["vqvae", "vqvae2", "vqgan", "pixelcnn", "vq_gpt", "vq_diffusion", "vq_latent_diffusion"]
for system in systems:
    config = "emoji_64.yaml" if system == "vqvae2" else "emoji_32.yaml"
    arguments = ["train", system, f"examples/{{system}}/{{config}}", "--output_dir", {folder!r} + "/" + system]
    arguments += ["--dataset_name_or_path", "examples/data/emoji-64", "--max_samples", "16", "--cpu", "true"]
    arguments += ["--train_batch_size", "4", "--max_train_steps", "1", "--lr_warmup_steps", "0"]
    arguments += ["--lr_scheduler", "constant", "--validation_steps", "0"]
    if system in systems[3:]:
        arguments += ["--tokenizer", "examples/checkpoints/emoji-32-segmentation/vqvae", "--sample_classes", "1"]
    if "diffusion" in system:
        arguments += ["--sample_steps", "2"]
    assert main(arguments) in (0, None), system
"""


@pytest.mark.slow
def test_training_on_local_files(tmp_path):
    """All scripts, with the networks of their perceptual figures, pictures, cards and validations."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN.format(folder=str(tmp_path)))
    assert watched([str(script)], tmp_path) == []


COMMANDS = """
from pathlib import Path
from hf_vq.cli import main
folder = Path({folder!r})
model, image, data = "examples/checkpoints/emoji-64", "examples/data/thinking_face.png", "examples/data/emoji-64"
golden = Path("tests/fixtures/golden/zalando_ema")
(folder / "run").mkdir()
(folder / "run" / "metrics.jsonl").write_text('{{"step": 1, "loss": 2.0}}\\n{{"step": 2, "loss": 1.0}}\\n')
codes = str(folder / "indices.safetensors")
commands = [
    ["info", model],
    ["info", str(folder / "run")],
    ["reconstruct", model, image, "--output", str(folder / "both.png")],
    ["encode", model, image, "--output", codes],
    ["decode", model, codes, "--output", str(folder / "decoded")],
    ["sample", model, "--class-label", "0", "--num-images", "1", "--output", str(folder / "samples.png")],
    *(
        ["show", what, model, image, image, "--output", str(folder / f"{{what}}.png")]
        for what in ("atlas", "usage", "indices", "interpolation")
    ),
    ["show", "nearest", model, image, "--samples", image, "--output", str(folder / "nearest.png")],
    ["show", "curves", str(folder / "run"), "--output", str(folder / "curves.png")],
    ["evaluate", model, "--data", data, "--label-column", "category", "--max-images", "20", "--num-samples", "20"],
    ["convert", "--checkpoint", str(golden / "checkpoint.pt"), "--config", str(golden / "config.json"),
     "--output", str(folder / "converted")],
    ["export", model + "/vqvae", "--output", str(folder / "onnx")],
]
for arguments in commands:
    assert main(arguments) == 0, arguments
"""


@pytest.mark.slow
def test_every_subcommand_on_local_files(tmp_path):
    """`push` goes to the Hub, and `train` has a test of its own."""
    script = tmp_path / "commands.py"
    script.write_text(COMMANDS.format(folder=str(tmp_path)))
    assert watched([str(script)], tmp_path) == []
    names = ("both.png", "indices.safetensors", "decoded", "samples.png", "atlas.png", "converted", "onnx")
    assert all((tmp_path / name).exists() for name in names)
    from hf_vq.cli import build_parser

    (commands,) = (
        action for action in build_parser()._actions if hasattr(action, "choices") and action.dest == "command"
    )
    tried = {line.split('"')[1] for line in COMMANDS.splitlines() if line.lstrip().startswith('["')}
    assert set(commands.choices) == tried | {"show", "push", "train"}


@pytest.mark.slow
def test_a_call_is_seen(tmp_path):
    script = tmp_path / "call.py"
    script.write_text(
        "import socket\ntry:\n    socket.getaddrinfo('huggingface.co', 443)\nexcept OSError:\n    pass\n"
    )
    assert watched([str(script)], tmp_path) == ["socket.getaddrinfo: huggingface.co"]
