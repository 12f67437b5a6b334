"""FSDP2 on the CPU: processes that hold parts of a VQGPT train as one that holds all of it."""

import logging
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from hf_vq import VQGPTConfig, VQGPTForCausalLM
from hf_vq.training.checkpointing import find_checkpoints
from hf_vq.training.run import RunArguments, TrainingRun
from hf_vq.training.sharding import local, take_launchers_wish
from tests.process_groups import in_processes
from tests.training.toy_run import Interrupted, rows


class Codes:
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return {"indices": torch.arange(16).reshape(4, 4) * (index + 1) % 7}


def train(folder, fsdp="full_shard", stop_at=None, steps=6, **arguments):
    """A run of a small GPT; returns the number of elements of parameters, averages and optimizer on this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    options = {"train_batch_size": 12, "logging_steps": 1, "checkpointing_steps": 2, "ema_decay": 0.9}
    options |= {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "validation_steps": 3, "learning_rate": 3e-3}
    run = TrainingRun(RunArguments(str(folder), fsdp=fsdp, max_train_steps=steps, cpu=True, **(options | arguments)))
    undisturbed = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = VQGPTConfig(codebook_size=7, grid_size=(4, 4), n_layer=2, n_embd=16, n_head=2, **undisturbed)
    prior = VQGPTForCausalLM(config)
    model = run.add_model("model", prior, ema=True)
    optimizer = run.add_optimizer("optimizer", torch.optim.AdamW(prior.parameters(), lr=run.arguments.learning_rate))

    @run.on_validation
    def validate():
        figure = -prior.log_likelihood(Codes()[3]["indices"][None]).sum()  # as often as this process wants
        for _ in range(run.accelerator.process_index):
            assert torch.equal(figure, -prior.log_likelihood(Codes()[3]["indices"][None]).sum())
        return {"nats": figure}

    run.start()
    for batch in run.batches(Codes()):
        with run.accumulate(model):
            loss = model(**prior.prepare_inputs(batch["indices"])).loss
            run.backward(loss)
            if run.global_step + 1 == stop_at:
                raise Interrupted
            run.step(optimizer)
            run.log({"loss": loss.detach()})
        run.finish_step()
    held = sum(local(value).numel() for value in [*prior.parameters(), *run.emas["model"].averages.values()])
    for state in optimizer.state.values():
        held += sum(local(value).numel() for value in state.values() if value.ndim)
    with run.trained_model("model") as trained:
        if run.is_main_process:
            trained.save_pretrained(Path(folder, "trained"))
    return held


def stopped(folder, **arguments):
    with pytest.raises(Interrupted):
        train(folder, **arguments)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    held = train(folder, "no")
    return rows(folder, validation=True), VQGPTForCausalLM.from_pretrained(folder / "trained").state_dict(), held


def assert_alike(folder, whole):
    found = rows(folder, validation=True)
    assert len(found) == len(whole[0]) == 8
    for one, other in zip(whole[0], found, strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    weights = VQGPTForCausalLM.from_pretrained(Path(folder) / "trained").state_dict()
    assert weights.keys() == whole[1].keys()
    for name, value in whole[1].items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)


def test_two_processes_train_as_one_and_hold_half(whole, tmp_path):
    folder = tmp_path / "run"
    held = in_processes(2, tmp_path, train, folder)
    assert_alike(folder, whole)
    assert sum(held) == pytest.approx(whole[2], rel=0.02) and max(held) < 0.55 * whole[2]
    assert not (folder / "checkpoint-6/model.safetensors").exists() and (folder / "trained/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 2), (2, 3), (3, 1)])
def test_a_stopped_run_is_continued_by_any_number_of_processes(whole, tmp_path, first, then):
    folder = tmp_path / "run"
    in_processes(first, tmp_path, lambda: stopped(folder, stop_at=5))
    assert list(find_checkpoints(folder)) == [2, 4]
    in_processes(then, tmp_path, train, folder)
    assert_alike(folder, whole)


@pytest.mark.slow
def test_bf16(tmp_path, whole):
    in_processes(2, tmp_path, lambda: train(tmp_path / "run", mixed_precision="bf16"))
    losses = [[row["loss"] for row in found if "loss" in row] for found in (rows(tmp_path / "run"), whole[0])]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2) and losses[0] != losses[1]


def test_another_way_of_storing_is_refused(whole, tmp_path):
    train(tmp_path, "no", steps=2)
    with pytest.raises(ValueError, match="was written without fsdp=full_shard"):
        train(tmp_path, steps=4)


def test_what_a_launcher_may_ask_for(monkeypatch):
    assert not take_launchers_wish()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    with pytest.raises(ValueError, match="must have `fsdp_version: 2`, got '1'"):
        take_launchers_wish()
    monkeypatch.setenv("FSDP_VERSION", "2")
    for name, value, message in (
        ("OFFLOAD_PARAMS", "true", "must have `fsdp_offload_params: false`, got 'true'"),
        ("RESHARD_AFTER_FORWARD", "false", "must have `fsdp_reshard_after_forward: true`, got 'false'"),
        ("AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "`fsdp_auto_wrap_policy: transformer_based_wrap`"),
        ("TRANSFORMER_CLS_TO_WRAP", "Block", "no `fsdp_transformer_layer_cls_to_wrap`, got 'Block': .* names itself"),
        ("STATE_DICT_TYPE", "FULL_STATE_DICT", "`fsdp_state_dict_type: sharded_state_dict`"),
    ):
        monkeypatch.setenv(f"FSDP_{name}", value)
        with pytest.raises(ValueError, match=message):
            take_launchers_wish()
        monkeypatch.delenv(f"FSDP_{name}")
    assert take_launchers_wish() and not take_launchers_wish()
    for name, message in (
        ("MEGATRON_LM", "Megatron-LM is not supported"),
        ("PARALLELISM_CONFIG", "`parallelism_config` is not supported"),
        ("DEEPSPEED", "DeepSpeed is not supported: use FSDP2"),
    ):
        monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
        with pytest.raises(ValueError, match=message):
            take_launchers_wish()
        monkeypatch.delenv(f"ACCELERATE_USE_{name}")


def test_the_defaults_of_the_launcher_are_taken(monkeypatch):
    """What `accelerate launch` sets for our configuration file, and without one."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    file = str(Path(__file__).resolve().parents[2] / "examples" / "fsdp2.yaml")
    for options in (["--config_file", file], ["--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"]):
        parsed = launch_command_parser().parse_args([*options, "train.py"])
        parsed, _, _ = _validate_launch_command(parsed)
        environment = prepare_multi_gpu_env(parsed)
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                if name.startswith(("FSDP", "ACCELERATE")):
                    patch.setenv(name, value)
            assert take_launchers_wish()


def test_models_without_blocks_stay_whole(tmp_path, capsys, caplog):
    run = TrainingRun(RunArguments(str(tmp_path), fsdp="full_shard", cpu=True))
    with caplog.at_level(logging.WARNING):
        run.add_model("critic", torch.nn.Linear(2, 2))
    assert "'critic' is kept whole on every process" in capsys.readouterr().out
