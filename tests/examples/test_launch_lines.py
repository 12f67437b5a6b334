"""The commands of examples/README.md: shells and launchers take them, and so do the scripts."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from hf_vq.training.data.image_datasets import DataArguments
from hf_vq.training.run_arguments import RunArguments, parse_arguments
from hf_vq.training.scripts.train_vq_gpt import VQGPTArguments
from tests.examples.runs import ROOT


TEXT = (ROOT / "examples" / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_shell_reads_the_block(block):
    checked = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
    assert checked.returncode == 0 and not checked.stderr, checked.stderr


def launches() -> list[list[str]]:
    """The words of each `accelerate launch` of the blocks; a node's number is filled in."""
    text = "\n".join(BLOCKS).replace("\\\n", " ").replace("$SLURM_NODEID", "1").replace("$HOST", "10.0.0.1")
    lines = re.findall(r"accelerate launch ([^'\n]*)", text)
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("options", [[], ["--use_fsdp", "--fsdp_version", "2"]], ids=["as they are", "fsdp"])
def test_the_launcher_and_the_script_take_the_lines(options):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    assert len(launches()) == 2
    for rank, words in enumerate(launches()):
        if options:
            words = [*options, *(word for word in words if word != "--multi_gpu")]
        parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
        assert (parsed.num_machines, parsed.num_processes, parsed.machine_rank) == (2, 16, rank)
        assert (parsed.main_process_ip, parsed.main_process_port) == ("10.0.0.1", 29500)
        assert parsed.use_fsdp == bool(options) and Path(ROOT, parsed.training_script).is_file()
        assert parsed.training_script_args.pop(0) == "CONFIG.yaml"
        given = [str(ROOT / "examples/vq_gpt/emoji_32.yaml"), *parsed.training_script_args]
        run, _, _ = parse_arguments((RunArguments, DataArguments, VQGPTArguments), given)
        assert run.mixed_precision == "bf16" and run.output_dir == "/shared/run"


def test_a_job_is_queued_again_only_if_it_got_further(tmp_path):
    """The end of the SLURM script, with `scontrol` and `srun` in its place."""
    (script,) = (block for block in BLOCKS if "#SBATCH" in block)
    run = tmp_path / "run"
    run.mkdir()
    stand_ins = 'scontrol() { if [ "$1" = requeue ]; then echo "again $2"; else echo host; fi; }\n'

    def submit(effect):
        code = stand_ins + f"srun() {{ {effect}; }}\n" + script.replace("/shared/run", str(run))
        environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a", "PATH": "/usr/bin:/bin"}
        return subprocess.run(["bash"], input=code, text=True, capture_output=True, env=environment).stdout.strip()

    assert submit("false") == ""  # a mistake in the command
    assert submit(f"mkdir {run}/checkpoint-9; false") == "again 7"
    assert submit(f"mkdir {run}/checkpoint-10; false") == "again 7"
    assert submit("false") == ""
    assert submit(f"mkdir {run}/checkpoint-20 {run}/pipeline") == ""
