"""The real training scripts, all seven: ended by SIGTERM, on two processes, sharded, and on two "machines"."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest

from tests.examples.runs import ROOT, finish, fork, rows, script, start
from tests.process_groups import in_processes


pytestmark = pytest.mark.slow

TOKENIZER = ["--tokenizer", "examples/checkpoints/emoji-32-segmentation/vqvae"]
COMMON = [
    "--dataset_name_or_path", "examples/data/emoji-64", "--max_samples", "64", "--cpu", "true", "--seed", "3",
    "--train_batch_size", "8", "--logging_steps", "1", "--validation_steps", "0", "--checkpointing_steps", "1000",
]  # fmt: skip
QUICK_TOKENIZER = ["--validation_perceptual", "none"]
QUICK_PRIOR = [*TOKENIZER, "--sample_classes", "1"]
QUICK_DIFFUSION = [*QUICK_PRIOR, "--sample_steps", "2"]
SCRIPTS = {
    "vqvae": ["examples/vqvae/train_vqvae.py", "examples/vqvae/emoji_32.yaml", *QUICK_TOKENIZER],
    "vqvae2": ["examples/vqvae2/train_vqvae2.py", "examples/vqvae2/emoji_64.yaml", *QUICK_TOKENIZER],
    "vqgan": ["examples/vqgan/train_vqgan.py", "examples/vqgan/emoji_32.yaml", "--disc_start_fraction", "0.2"],
    "vq_gpt": ["examples/vq_gpt/train_vq_gpt.py", "examples/vq_gpt/emoji_32.yaml", *QUICK_PRIOR, "--pkeep", "1.0"],
    "pixelcnn": ["examples/pixelcnn/train_pixelcnn.py", "examples/pixelcnn/emoji_32.yaml", *QUICK_PRIOR],
    "vq_diffusion": [
        "examples/vq_diffusion/train_vq_diffusion.py", "examples/vq_diffusion/emoji_32.yaml",
        *QUICK_DIFFUSION, "--validation_timesteps", "2",
    ],
    "vq_latent_diffusion": [
        "examples/vq_latent_diffusion/train_vq_latent_diffusion.py", "examples/vq_latent_diffusion/emoji_32.yaml",
        *QUICK_DIFFUSION,
    ],
}  # fmt: skip
UNDISTURBED = {  # what each process draws for itself
    "vqvae2": ["--level_dropout", "0"],
    "vq_gpt": ["--dropout", "0", "--attention_dropout", "0", "--condition_dropout", "0"],
    "pixelcnn": ["--dropout", "0", "--condition_dropout", "0", "--guidance_scale", "1"],
    "vq_diffusion": ["--dropout", "0"],
    "vq_latent_diffusion": ["--dropout", "0"],
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize(("signum", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 0)])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_signal_loses_no_step(name, signum, code, tmp_path):
    process = fork([*SCRIPTS[name], *COMMON, "--max_train_steps", "3000"], tmp_path)
    wait_for_rows(3, process, tmp_path)
    os.kill(process.pid, getattr(signal, signum))
    process.join(240)
    assert process.exitcode == code
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{rows(tmp_path)[-1]['step']}"


def test_the_program_ends_as_its_run_does(tmp_path):
    """`python train_vqvae.py`: the line and the exit code, and a second signal, which leaves nothing."""
    command = [*SCRIPTS["vqvae"], *COMMON, "--max_train_steps", "3000"]
    process = start(command, tmp_path)
    wait_for_rows(2, process, tmp_path)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(240) == 0
    process.stderr.close()
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{rows(tmp_path)[-1]['step']}"


def wait_for_rows(count: int, process, output_dir: Path) -> None:
    def has_ended():
        return process.poll() is not None if isinstance(process, subprocess.Popen) else not process.is_alive()

    while not has_ended() and len(rows(output_dir)) < count:
        time.sleep(0.02)


def launch(command: list[str], output_dir: Path, *, processes: int = 2, options: tuple[str, ...] = ()):
    """By torchrun."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), *options]
    launcher += [] if options else ["--master_port", str(free_port())]
    return start_launcher([*launcher, *command], output_dir)


def launch_fsdp(command: list[str], output_dir: Path, processes: int = 2):
    """By `accelerate launch` with the FSDP configuration of the examples."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "examples/fsdp2.yaml"]
    launcher += ["--num_processes", str(processes), "--main_process_port", str(free_port())]
    return start_launcher([*launcher, *command], output_dir)


def start_launcher(command: list[str], output_dir: Path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *command, "--output_dir", str(output_dir)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


def losses(output_dir: Path) -> list[float]:
    name = "generator_loss" if "generator_loss" in rows(output_dir)[0] else "loss"
    return [row[name] for row in rows(output_dir) if name in row]


def run_script(command: list[str], output_dir: Path) -> None:
    os.chdir(ROOT)
    script(Path(command[0]).stem.removeprefix("train_")).main([*command[1:], "--output_dir", str(output_dir)])


@pytest.fixture(scope="module")
def losses_of_one(tmp_path_factory):
    """The losses of a script on one process, by its name."""
    found = {}

    def get(name: str, command: list[str]) -> list[float]:
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            process = fork(command, folder)
            process.join()
            assert process.exitcode == 0
            found[name] = losses(folder)
        return found[name]

    return get


@pytest.mark.parametrize("sharded", [False, True], ids=["data_parallel", "fsdp"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_have_the_losses_of_one(name, sharded, losses_of_one, tmp_path):
    """Few steps: the longer a tokenizer trains, the likelier rounding decides the code of a latent between two."""
    command = [*SCRIPTS[name], *COMMON, *UNDISTURBED.get(name, []), "--max_train_steps", "4"]
    one = losses_of_one(name, command)
    in_processes(2, tmp_path, run_script, [*command, *(["--fsdp", "full_shard"] if sharded else [])], tmp_path / "two")
    two = losses(tmp_path / "two")
    differences = [abs(a - b) / abs(a) for a, b in zip(one, two, strict=True)]
    print(f"{name} {'fsdp' if sharded else 'ddp'}: largest relative difference of the losses {max(differences):.2e}")
    assert len(one) == 4 and max(differences) < 2e-5
    assert list((tmp_path / "two").glob("*/**/*.safetensors"))
    is_to_be_sharded = sharded and name != "vqgan"
    assert bool(list((tmp_path / "two").glob("checkpoint-4/sharded"))) == is_to_be_sharded


def test_a_sharded_run_is_killed_and_continued(tmp_path):
    """By as many processes, by fewer, by more."""
    command = [*SCRIPTS["vq_gpt"], *COMMON, *UNDISTURBED["vq_gpt"], "--max_train_steps", "12"]
    command += ["--checkpointing_steps", "2", "--learning_rate", "1e-4"]
    finish(command, tmp_path / "one")
    process = launch_fsdp(command, tmp_path / "two")
    while process.poll() is None and len(rows(tmp_path / "two")) < 5:
        time.sleep(0.02)
    workers = children_of(process.pid)
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    process.communicate(timeout=60)
    steps = [int(path.name.split("-")[1]) for path in (tmp_path / "two").glob("checkpoint-*")]
    assert process.returncode != 0 and steps and max(steps) < 12
    for processes in (2, 1, 4):
        shutil.copytree(tmp_path / "two", tmp_path / str(processes))
        wait_for(launch_fsdp(command, tmp_path / str(processes), processes))
        assert losses(tmp_path / str(processes)) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_a_stream_on_two_processes_is_killed_and_continued(tmp_path):
    """To the bit by two processes, and by one at the next blocks, with a line that says so."""
    (tmp_path / "data").mkdir()
    images = datasets.Dataset.from_parquet(str(ROOT / "examples/data/emoji-64/train.parquet")).select(range(64))
    for shard in range(4):
        images.shard(4, shard).to_parquet(tmp_path / "data" / f"train-{shard:05d}-of-00004.parquet")
    images.select(range(8)).to_parquet(tmp_path / "data" / "validation.parquet")
    command = [*SCRIPTS["vqvae"], *COMMON, "--dataset_name_or_path", str(tmp_path / "data"), "--streaming", "true"]
    command += ["--cache_images", "false", "--shuffle_block", "6", "--crop", "random", "--max_train_steps", "12"]
    command += ["--checkpointing_steps", "2"]
    in_processes(2, tmp_path, run_script, command, tmp_path / "unbroken")

    process = launch(command, tmp_path / "killed")
    wait_for_rows(5, process, tmp_path / "killed")
    os.kill(children_of(process.pid)[1], signal.SIGKILL)
    process.communicate(timeout=60)
    steps = [int(path.name.split("-")[1]) for path in (tmp_path / "killed").glob("checkpoint-*")]
    assert process.returncode != 0 and steps and max(steps) < 12
    shutil.copytree(tmp_path / "killed", tmp_path / "by-one")

    in_processes(2, tmp_path, run_script, command, tmp_path / "killed")
    assert len(losses(tmp_path / "killed")) == 12 and rows(tmp_path / "killed") == rows(tmp_path / "unbroken")
    output = wait_for(launch(command, tmp_path / "by-one", processes=1))
    assert "The stream was read in 2 parts and is now read in 1: it goes on at the next block of each." in output
    assert [row["step"] for row in rows(tmp_path / "by-one") if "loss" in row] == list(range(1, 13))


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_two_machines_on_loopback(tmp_path):
    """Two launchers, as two nodes have them, that share the output folder."""
    command = [*SCRIPTS["vq_gpt"], *COMMON, *UNDISTURBED["vq_gpt"], "--max_train_steps", "4"]
    finish(command, tmp_path / "one")
    port = str(free_port())
    machines = []
    for rank in ("0", "1"):
        options = ("--nnodes", "2", "--node_rank", rank, "--master_addr", "127.0.0.1", "--master_port", port)
        machines.append(launch(command, tmp_path / "two", processes=1, options=options))
    for machine in machines:
        wait_for(machine)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-4)
