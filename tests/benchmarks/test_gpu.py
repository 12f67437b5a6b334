"""The stages of `make gpu`: what each runs, and that one may fail, be skipped or be out of time alone."""

import json
import sys
import tarfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import gpu


def option(command, name):
    return command[command.index(f"--{name}") + 1]


def test_a_stage_that_fails_stops_no_other_and_a_finished_one_is_skipped(tmp_path, monkeypatch, capfd):
    done = []

    def command(stage, work, seconds, quick):
        done.append(stage)
        return [sys.executable, "-c", f"print('this is {stage}'); raise SystemExit({int(stage == 'vqvae2')})"]

    monkeypatch.setattr(gpu, "command", command)
    arguments = ["--output", str(tmp_path), "--stages", "vqvae2", "top"]
    assert gpu.main(arguments) == 1
    state = json.loads((tmp_path / "results.json").read_text())
    assert not state["vqvae2"]["finished"] and "this is vqvae2" in state["vqvae2"]["log"] and state["top"]["finished"]
    assert "this is top" in (tmp_path / "logs.txt").read_text()
    assert "ended with 1" in capfd.readouterr().out
    assert gpu.main(arguments) == 1
    assert done == ["vqvae2", "top", "vqvae2"]


def test_a_stage_ends_with_its_time(tmp_path):
    found = gpu.run([sys.executable, "-c", "import time; time.sleep(30)"], "speed", tmp_path, 0.5, False)
    assert found["error"] == "ended with the time limit"


def test_schedules_end_with_the_time_and_quick_runs_are_short(tmp_path):
    command = gpu.command("prior", tmp_path, gpu.IMPORTS + 60, quick=False)
    assert option(command, "max_train_minutes") == "1.000" and option(command, "max_train_steps") == "1200"
    assert option(command, "tokenizer") == str(gpu.SHIPPED_TOKENIZER)
    (tmp_path / "vqgan/tokenizer").mkdir(parents=True)
    command = gpu.command("prior", tmp_path, 60, quick=True)
    assert option(command, "tokenizer") == str(tmp_path / "vqgan/tokenizer")
    assert option(command, "max_train_steps") == "2" and option(command, "mixed_precision") == "no"


@pytest.mark.parametrize("stage", gpu.TRAININGS)
def test_every_training_names_files_that_exist(stage, tmp_path):
    _, script, config, *_ = gpu.command(stage, tmp_path, 60, quick=False)
    assert (gpu.ROOT / script).is_file() and (gpu.ROOT / config).is_file()


def test_the_archive_holds_the_pipelines_in_half_precision(tmp_path):
    folder = tmp_path / "work/vq_gpt/pipeline/prior"
    folder.mkdir(parents=True)
    (folder.parent / "model_index.json").write_text("{}")
    weights = {"weight": torch.tensor([1.0, 1 / 3]), "counts": torch.tensor([70000])}
    save_file(weights, folder / "model.safetensors")
    (tmp_path / "work/vq_gpt.png").write_bytes(b"picture")
    gpu.collect(tmp_path / "work", tmp_path)
    assert (tmp_path / "vq_gpt.png").read_bytes() == b"picture"
    with tarfile.open(tmp_path / "pipelines.tar") as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    found = load_file(tmp_path / "unpacked/vq_gpt/prior/model.safetensors")
    assert torch.equal(found["weight"], weights["weight"].half()) and torch.equal(found["counts"], weights["counts"])
    assert torch.equal(load_file(folder / "model.safetensors")["weight"], weights["weight"])


def test_table_has_a_line_for_each_figure():
    state = {"evaluate": {"finished": True, "seconds": 1.5, "vq_gpt": {"psnr": 28.65331, "levels": [1, 2]}}}
    assert gpu.table(state).splitlines() == [
        "evaluate         finished, 1.5 s",
        "    vq_gpt, psnr: 28.65",
        "    vq_gpt, levels: 1",
        "    vq_gpt, levels: 2",
    ]


@pytest.mark.slow
def test_rehearsal_on_the_cpu(tmp_path):
    """Every stage, with networks that are hardly trained."""
    assert gpu.main(["--quick", "--minutes", "20", "--output", str(tmp_path)]) == 0
    state = json.loads((tmp_path / "results.json").read_text())
    assert list(state) == list(gpu.STAGES)
    assert set(state["evaluate"]) >= {"vq_gpt", "vq_diffusion", "latent_diffusion", "vqvae2"}
    assert "passed" in state["checks"]["tests"][-1]
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert len(files) <= 8 and sum(path.stat().st_size for path in files) < 60e6
