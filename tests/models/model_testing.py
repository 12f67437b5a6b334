"""The checks that every model of the package passes: a test class inherits `ModelTests` and gives a `case` fixture."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from diffusers import ModelMixin
from transformers import PreTrainedModel, set_seed


@dataclass
class ModelCase:
    """A tiny configuration and inputs.

    Args:
        inputs: makes the keyword arguments of `forward`, in float32 and always the same ones.
        stays_float32: does the tensor of this name keep float32 when the model is loaded in half precision?
        without_gradient: does the parameter of this name rightly have a gradient of 0?
        checkpointed: the classes of the layers that gradient checkpointing runs twice.
    """

    model_class: type[PreTrainedModel] | type[ModelMixin]
    config: object
    inputs: Callable[[], dict]
    stays_float32: Callable[[str], bool] = lambda name: False
    without_gradient: Callable[[str], bool] = lambda name: False
    checkpointed: tuple[type, ...] = ()

    def build(self) -> PreTrainedModel | ModelMixin:
        config = copy.deepcopy(self.config)  # a dict of arguments for a model of diffusers
        return self.model_class(**config) if isinstance(config, dict) else self.model_class(config)

    def make(self) -> PreTrainedModel | ModelMixin:
        set_seed(0)
        return self.build().eval()


def cast_inputs(inputs: dict, dtype: torch.dtype) -> dict:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def assert_equal_tensors(actual: dict, expected: dict):
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name


def config_dict(model) -> dict:
    """The configuration without the folder that it comes from, as a file would hold it."""
    config = dict(model.config) if isinstance(model, ModelMixin) else model.config.to_dict()
    hidden = ("_name_or_path", "_use_default_values")  # the second is diffusers' record of how it was built
    return json.loads(json.dumps({name: value for name, value in config.items() if name not in hidden}))


def all_tensors(model) -> dict:
    """Parameters and buffers, those that are not saved included."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_equal_outputs(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def training_step(model, inputs) -> tuple[dict, dict]:
    """Outputs and gradients of one pass in training mode, drawn from a fixed seed."""
    model.train()
    model.zero_grad()
    set_seed(1)
    output = model(**inputs)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return output, gradients


def enable_checkpointing(model):
    # transformers', that of its older versions, and diffusers'
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable", "enable_gradient_checkpointing")
    getattr(model, next(name for name in names if hasattr(model, name)))()


class ModelTests:
    """A subclass defines the fixture `case`, a `ModelCase`."""

    def test_saved_and_loaded_model_is_equal_to_the_bit(self, case, tmp_path):
        model = case.make()
        # one step moves every statistic away from its initial value
        training_step(model, case.inputs())
        model.eval().save_pretrained(tmp_path)
        loaded, info = case.model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        assert not loaded.training
        assert_equal_tensors(all_tensors(loaded), all_tensors(model))
        assert_equal_outputs(loaded(**case.inputs()), model(**case.inputs()), atol=0, rtol=0)
        assert config_dict(loaded) == config_dict(model)

    def test_sharded_save_is_equal_to_the_bit(self, case, tmp_path):
        model = case.make()
        model.save_pretrained(tmp_path, max_shard_size="4KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        assert_equal_tensors(all_tensors(case.model_class.from_pretrained(tmp_path)), all_tensors(model))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_load(self, case, dtype, tmp_path):
        model = case.make()
        model.save_pretrained(tmp_path)
        loaded, info = case.model_class.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
        assert not any(info.values()), info
        expected = {}
        for name, value in all_tensors(model).items():
            cast = value.is_floating_point() and not case.stays_float32(name)
            expected[name] = value.to(dtype) if cast else value
        assert_equal_tensors(all_tensors(loaded), expected)
        assert loaded.dtype == dtype
        output = loaded(**cast_inputs(case.inputs(), dtype))
        assert torch.isfinite(output.loss)

    def test_same_seed_same_weights(self, case):
        assert_equal_tensors(all_tensors(case.make()), all_tensors(case.make()))

    def test_evaluation_is_deterministic_and_changes_nothing(self, case):
        model = case.make()
        before = copy.deepcopy(all_tensors(model))
        first = model(**case.inputs())
        assert_equal_outputs(model(**case.inputs()), first, atol=0, rtol=0)
        assert_equal_tensors(all_tensors(model), before)

    def test_gradients_reach_every_parameter(self, case):
        _, gradients = training_step(case.make(), case.inputs())
        for name, gradient in gradients.items():
            assert gradient is not None, name
            assert torch.isfinite(gradient).all(), name
            assert gradient.any() or case.without_gradient(name), name

    def test_gradient_checkpointing_changes_nothing(self, case):
        plain, checkpointed = case.make(), case.make()
        enable_checkpointing(checkpointed)
        calls = []
        for module in checkpointed.modules():
            if isinstance(module, case.checkpointed):
                next(module.children()).register_forward_hook(lambda child, args, output: calls.append(child))
        output, gradients = training_step(plain, case.inputs())
        again, gradients_again = training_step(checkpointed, case.inputs())
        assert len(calls) == 2 * len(set(calls)) > 0
        assert_equal_outputs(again, output, atol=0, rtol=0)
        assert_equal_tensors(gradients_again, gradients)
        assert_equal_tensors(dict(checkpointed.named_buffers()), dict(plain.named_buffers()))

    def test_model_is_built_on_the_meta_device(self, case):
        with torch.device("meta"):
            empty = case.build().eval()
        assert all(tensor.is_meta for tensor in all_tensors(empty).values())
        model = case.make()
        empty.load_state_dict(model.state_dict(), assign=True)
        assert_equal_outputs(empty(**case.inputs()), model(**case.inputs()), atol=0, rtol=0)

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", ["eval", "train"])
    def test_compiles_to_one_graph(self, case, mode):
        model, other = case.make(), case.make()
        torch._dynamo.reset()
        compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
        if mode == "eval":
            assert_equal_outputs(compiled(**case.inputs()), model(**case.inputs()), atol=1e-5, rtol=1e-5)
            return
        for eager in (model, other):  # the first batch sets codes by k-means, which looks at the numbers
            training_step(eager, case.inputs())
        output, gradients = training_step(model, case.inputs())
        other.zero_grad()
        inputs = case.inputs()  # which may draw numbers
        set_seed(1)
        output_again = compiled(**inputs)
        output_again.loss.backward()
        assert_equal_outputs(output_again, output, atol=1e-5, rtol=1e-5)
        for name, parameter in other.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(other.get_buffer(name), buffer, atol=1e-5, rtol=1e-5)
