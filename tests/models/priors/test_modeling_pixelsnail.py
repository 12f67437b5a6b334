"""PixelSNAIL: against dense masked computations, its receptive field, and sampling position by position against
passes.
"""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.parametrize import is_parametrized
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from hf_vq.hub import save_with_code
from hf_vq.models.priors.configuration_pixelsnail import PixelSNAILConfig
from hf_vq.models.priors.modeling_pixelsnail import PixelSNAILForCausalLM
from hf_vq.models.priors.pixelsnail_blocks import CausalConv, GatedResidualBlock
from tests.models.model_testing import ModelCase
from tests.models.priors.code_prior_testing import CodePriorTests, classes, draw, make_indices, operations


TINY = {
    "codebook_size": 11,
    "grid_size": (4, 6),
    "hidden_size": 8,
    "res_channels": 6,
    "kernel_size": 3,
    "num_blocks": 2,
    "num_res_blocks": 2,
    "num_attention_heads": 2,
    "conditioning_channels": 5,
    "dropout": 0.0,
}
BELOW = {"attention": False, "conditioning_codebook_size": 7, "conditioning_grid_size": (2, 3)}
KINDS = {
    "top": {},
    "class": {"condition_type": "class", "num_classes": 3, "num_output_res_blocks": 1},
    "bottom": {**BELOW, "num_conditioning_res_blocks": 1},
    "class-bottom": {
        **BELOW,
        "condition_type": "class",
        "num_classes": 3,
        "kernel_size": 5,
        "num_output_res_blocks": 2,
    },
    "attentive-bottom": {**BELOW, "attention": True, "num_res_blocks": 1, "num_conditioning_res_blocks": 2},
}


def random_shapes(count=6):
    """Grids, kernel sizes, blocks, residual blocks in each, and attention."""
    random = np.random.default_rng(10)
    for number in range(count):
        grid = tuple(int(side) for side in random.integers(1, 7, 2))
        kernel, blocks, res_blocks = random.choice([3, 5, 7]), random.integers(1, 3), random.integers(0, 3)
        yield grid, int(kernel), int(blocks), int(res_blocks), number % 2 == 0


SHAPES = [*random_shapes(), ((3, 7), 5, 2, 0, True)]


def make(kind="class", seed=6, **overrides):
    """A tiny model far from uniform, whose distributions differ by position, class and upper codes."""
    model = PixelSNAILForCausalLM(PixelSNAILConfig(**{**TINY, **KINDS[kind], **overrides})).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("original0"):
            parameter.data.uniform_(1.0, 2.0, generator=generator)
        elif name.endswith("bias"):
            parameter.data.normal_(std=0.1, generator=generator)
        else:
            parameter.data.normal_(generator=generator)
    model.head.out.parametrizations.weight.original0.data.div_(2)
    return model


def upper(model, batch_size=2, seed=3):
    """The argument `condition_indices`, where the model takes it."""
    config = model.config
    if config.conditioning_grid_size is None:
        return {}
    codes = draw(config.conditioning_codebook_size, batch_size, *config.conditioning_grid_size, seed=seed)
    return {"condition_indices": codes}


def make_case(kind, **overrides):
    config = PixelSNAILConfig(**{**TINY, **KINDS[kind], **overrides})

    def inputs():
        model = PixelSNAILForCausalLM(config)
        return {**model.prepare_inputs(make_indices(model), classes(model)), **upper(model)}

    return ModelCase(PixelSNAILForCausalLM, config, inputs, checkpointed=(GatedResidualBlock,))


@pytest.fixture(params=["class", "class-bottom", "attentive-bottom", "dropout"])
def case(request):
    if request.param == "dropout":
        return make_case("class", dropout=0.3, condition_dropout=0.5)
    return make_case(request.param)


class TestPixelSNAIL(CodePriorTests):
    pass


# ---------------------------------------------------------------------------------------------------- the network


def weight_of(layer):
    """Length and direction, written out."""
    length, direction = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    return torch.stack([g * v / v.square().sum().sqrt() for g, v in zip(length, direction, strict=True)])


def pointwise(layer, x):
    weight = weight_of(layer)
    bias = 0.0 if layer.bias is None else layer.bias[:, None, None]
    return torch.einsum("oc,bchw->bohw", weight.flatten(1), x) + bias


def causal(layer, x):
    """A k×k convolution in the middle of a (2k - 1)×k window, and a mask over the position's row and those below."""
    k = layer.kernel_size
    above, left = weight_of(layer.above), weight_of(layer.left)
    full = above.new_zeros(*above.shape[:2], 2 * k - 1, k)
    full[:, :, : k - 1] = above
    full[:, :, k - 1, : k // 2] = left[:, :, 0]
    return F.conv2d(x, full, layer.above.bias, padding=(k - 1, k // 2))


def one_hot(codes, size):
    return F.one_hot(codes, size).movedim(-1, 1).double()


def gated(block, x, conv, auxiliary=None, condition=None):
    elu = F.elu
    inner = conv(block.conv1, elu(x))
    if auxiliary is not None:
        inner = inner + pointwise(block.auxiliary, elu(auxiliary))
    outer = conv(block.conv2, elu(inner))
    if condition is not None:
        outer = outer + pointwise(block.condition, condition)
    half = x.shape[1]
    return x + outer[:, :half] * outer[:, half:].sigmoid()


def attend(attention, queries, memory):
    """Position by position, and head by head."""
    batch_size, _, height, width = queries.shape
    query, key, value = (
        pointwise(layer, features).flatten(2).unflatten(1, (attention.num_heads, -1))
        for layer, features in ((attention.query, queries), (attention.key, memory), (attention.value, memory))
    )
    result = torch.zeros_like(query)
    for b, head in itertools.product(range(batch_size), range(attention.num_heads)):
        for place in range(1, height * width):
            scores = key[b, head, :, :place].T @ query[b, head, :, place] / query.shape[2] ** 0.5
            result[b, head, :, place] = value[b, head, :, :place] @ scores.softmax(0)
    return result.flatten(1, 2).unflatten(2, (height, width))


def dense_condition(model, class_ids, above):
    condition = 0.0
    if above is not None:
        size, stack = model.config.conditioning_codebook_size, model.conditioning
        weight = weight_of(stack.codes).unflatten(2, (3, 3))
        condition = F.conv2d(one_hot(above, size), weight, stack.codes.bias, padding=1)
        for block in stack.residual_blocks:
            condition = gated(block, condition, lambda c, x: F.conv2d(x, weight_of(c.conv), c.conv.bias, padding=1))
        condition = F.interpolate(condition, size=tuple(model.config.grid_size), mode="nearest")
    if class_ids is not None:
        condition = condition + model.class_embedding.weight[torch.tensor(class_ids)][:, :, None, None]
    return condition if torch.is_tensor(condition) else None


def dense_logits(model, indices, class_ids=None, condition_indices=None):
    """The network in the paper's terms: one-hot codes, masked kernels, shifted maps, all positions of the
    attention.
    """
    config, (height, width), k = model.config, model.config.grid_size, model.config.kernel_size
    half, codes = k // 2, one_hot(indices, config.codebook_size)
    above = weight_of(model.stem.above).unflatten(2, (half, k))
    above = F.conv2d(F.pad(codes, (half, half, half - 1, 0)), above, model.stem.above.bias)
    left = weight_of(model.stem.left).unflatten(2, (half + 1, half))
    left = F.conv2d(F.pad(codes, (half - 1, 0, half, 0)), left, model.stem.left.bias)
    x = torch.zeros_like(above)
    x[:, :, 1:] += above[:, :, :-1]
    x[:, :, :, 1:] += left[:, :, :, :-1]

    condition = dense_condition(model, class_ids, condition_indices)
    where = [[[(r - height / 2) / height, (c - width / 2) / width] for c in range(width)] for r in range(height)]
    where = torch.tensor(where, dtype=torch.float64).movedim(-1, 0).expand(len(indices), -1, -1, -1)
    for block in model.blocks:
        out = x
        for residual in block.residual_blocks:
            out = gated(residual, out, causal, condition=condition)
        if not config.attention:
            x = pointwise(block.out, torch.cat([out, where], 1))
            continue
        memory = gated(block.key_block, torch.cat([x, out, where], 1), pointwise)
        queries = gated(block.query_block, torch.cat([out, where], 1), pointwise)
        x = gated(block.out_block, out, pointwise, auxiliary=attend(block.attention, queries, memory))
    for block in model.output_blocks:
        x = gated(block, x, pointwise)
    return pointwise(model.head.out, F.elu(x)).flatten(2).transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_dense_computation(kind):
    model = make(kind).double()
    indices, labels, above = make_indices(model), classes(model), upper(model)
    expected = dense_logits(model, indices, labels, **above)
    assert expected.std(dim=1).min() > 0.1
    inputs = model.prepare_inputs(indices, labels)
    torch.testing.assert_close(model(**inputs, **above).logits, expected, atol=1e-9, rtol=1e-9)
    for length in (1, 5, 6, 7, 23, 24):
        shorter = model(inputs["input_ids"][:, :length], **above).logits
        torch.testing.assert_close(shorter, expected[:, :length], atol=1e-9, rtol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("grid, kernel_size, blocks, res_blocks, attention", SHAPES)
def test_any_grid_and_kernel(grid, kernel_size, blocks, res_blocks, attention):
    sizes = {"grid_size": grid, "kernel_size": kernel_size, "num_blocks": blocks, "num_res_blocks": res_blocks}
    model = make("top", attention=attention, **sizes).double()
    indices = make_indices(model)
    logits = model(**model.prepare_inputs(indices)).logits
    torch.testing.assert_close(logits, dense_logits(model, indices), atol=1e-9, rtol=1e-9)


def receptive_fields(height, width, kernel_size, blocks, res_blocks, attention):
    """For each position the set of positions whose codes it can know, followed through the layers."""
    half, grid = kernel_size // 2, list(itertools.product(range(height), range(width)))

    def union(fields, offsets):
        return {(r, c): set().union(*(fields.get((r + i, c + j), set()) for i, j in offsets)) for r, c in grid}

    own = {place: {place} for place in grid}
    rows_above = set(itertools.product(range(-half, 0), range(-half, half + 1)))
    fields = union(own, rows_above | set(itertools.product(range(-half, 1), range(-half, 0))))
    taps = {(i, j) for i in range(1 - kernel_size, 1) for j in range(-half, half + 1) if (i, j) < (0, 0)}
    for _ in range(blocks):
        for _ in range(res_blocks):
            around = union(union(fields, taps), taps)
            fields = {place: fields[place] | around[place] for place in grid}
        if attention:
            before = [set().union(*(fields[earlier] for earlier in grid[:count])) for count in range(len(grid))]
            fields = {place: fields[place] | before[count] for count, place in enumerate(grid)}
    return [{r * width + c for r, c in fields[place]} for place in grid]


@pytest.mark.parametrize("grid, kernel_size, blocks, res_blocks, attention", SHAPES)
def test_each_position_knows_its_receptive_field_and_nothing_else(grid, kernel_size, blocks, res_blocks, attention):
    fields = receptive_fields(*grid, kernel_size, blocks, res_blocks, attention)
    assert all(earlier < place for place, field in enumerate(fields) for earlier in field)
    count = grid[0] * grid[1]
    sizes = {"grid_size": grid, "kernel_size": kernel_size, "num_blocks": blocks, "num_res_blocks": res_blocks}
    model = make("top", attention=attention, codebook_size=count + 1, **sizes).double()
    # every position has a code of its own, so that the gradient of a code's column is that of a position
    codes = torch.randperm(count, generator=torch.Generator().manual_seed(0))

    tables = [conv.table().detach().requires_grad_() for conv in (model.stem.above, model.stem.left)]
    handle = model.stem.register_forward_pre_hook(lambda module, args: (args[0], tables))
    features = model.read_grid(codes.view(1, *grid), None).flatten(1, 2)
    handle.remove()
    for place in range(count):
        gradients = torch.autograd.grad(features[0, place].sum(), tables, retain_graph=True)
        by_code = sum(each.abs().sum(1).unflatten(0, (-1, count + 2)).sum(0) for each in gradients)
        assert set(by_code[codes].nonzero().flatten().tolist()) == fields[place]

    with torch.no_grad():
        ids = torch.cat([model.prepare_condition(), codes[None]], dim=1)
        before = model(ids[:, :-1]).logits
        for changed in range(count - 1):
            others = ids.clone()
            others[:, changed + 1] = count
            moved = (model(others[:, :-1]).logits - before)[0].abs().sum(-1).nonzero().flatten().tolist()
            assert moved == [place for place in range(count) if changed in fields[place]]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bottom", "class-bottom"])
def test_all_positions_may_see_the_level_above(kind):
    model = make(kind).double()
    inputs, above = model.prepare_inputs(make_indices(model), classes(model)), upper(model)["condition_indices"]
    before = model(**inputs, condition_indices=above).logits
    reach = 1 + 2 * model.config.num_conditioning_res_blocks
    for row, column in itertools.product(range(2), range(3)):
        others = above.clone()
        others[:, row, column] = (above[:, row, column] + 1) % 7
        moved = (model(**inputs, condition_indices=others).logits - before).abs().amax((0, 2)) > 1e-12
        # positions under the codes that the stack mixes it into, later than it or not
        rows, columns = torch.arange(4)[:, None] // 2, torch.arange(6) // 2
        sees = ((rows - row).abs() <= reach) & ((columns - column).abs() <= reach)
        assert moved.view(4, 6)[sees].all()
        assert moved[0] or not sees[0, 0]


# ---------------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def sample_by_hand(model, prompt, guidance_scale=1.0, do_sample=True, **above):
    """A whole pass for each code."""
    sequence, null = prompt, prompt.clone()
    null[:, 0] = model.config.null_class_token_id
    for _ in range(model.config.image_seq_length + 1 - prompt.shape[1]):
        logits = model(sequence, **above).logits[:, -1].log_softmax(-1)
        if guidance_scale != 1:
            base = model(torch.cat([null[:, :1], sequence[:, 1:]], dim=1), **above).logits[:, -1].log_softmax(-1)
            logits = base + guidance_scale * (logits - base)
        code = logits.softmax(-1).multinomial(1) if do_sample else logits.argmax(-1, keepdim=True)
        sequence = torch.cat([sequence, code], dim=1)
    return sequence


@pytest.mark.parametrize("kept", [0, 1, 9])
@pytest.mark.parametrize(
    "kind, guidance_scale",
    [*((kind, 1.0) for kind in KINDS), *((kind, 2.5) for kind in KINDS if "condition_type" in KINDS[kind])],
)
def test_incremental_sampling_equals_whole_passes(kind, guidance_scale, kept):
    model = make(kind).double()
    above = upper(model, 3)
    prompt = model.prepare_condition(classes(model, 3), batch_size=3)
    prompt = torch.cat([prompt, make_indices(model, 3).flatten(1)[:, :kept]], dim=1)
    set_seed(6)
    expected = sample_by_hand(model, prompt, guidance_scale, **above)
    assert expected[:, kept + 1 :].unique().numel() > 3, "the loop must have something to get wrong"
    for use_cache in (True, False):
        set_seed(6)
        options = {"do_sample": True, "top_k": 0, "guidance_scale": guidance_scale, "use_cache": use_cache}
        assert torch.equal(model.generate(prompt, **options, **above), expected), use_cache


@pytest.mark.parametrize("grid, kernel_size, blocks, res_blocks, attention", SHAPES)
def test_incremental_sampling_on_any_grid(grid, kernel_size, blocks, res_blocks, attention):
    sizes = {"grid_size": grid, "kernel_size": kernel_size, "num_blocks": blocks, "num_res_blocks": res_blocks}
    model = make("top", attention=attention, **sizes).double()
    prompt = model.prepare_condition(batch_size=2)
    set_seed(1)
    expected = sample_by_hand(model, prompt)
    set_seed(1)
    assert torch.equal(model.generate(prompt, do_sample=True, top_k=0), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["class", "class-bottom", "attentive-bottom"])
@pytest.mark.parametrize("parts", [[1] * 24, [24], [3, 2, 8, 1, 10], [6, 6, 12]])
def test_every_step_gives_the_logits_of_a_pass(kind, parts):
    model = make(kind).double()
    above = upper(model)
    ids = model.prepare_inputs(make_indices(model), classes(model))["input_ids"][:, :-1]
    expected = model(ids, **above).logits
    first, *others = ids.split(parts, dim=1)
    output = model(first, use_cache=True, **above)
    logits, cache = [output.logits], output.past_key_values
    for part in others:
        logits.append(model(part, past_key_values=cache).logits)
    assert cache.get_seq_length() == 24
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind, grid", [("top", (8, 8)), ("class-bottom", (6, 12)), ("attentive-bottom", (12, 4))])
def test_a_map_costs_at_most_three_passes(kind, grid):
    coarse = {} if kind == "top" else {"conditioning_grid_size": (grid[0] // 2, grid[1] // 2)}
    model = make(kind, grid_size=grid, hidden_size=16, res_channels=16, kernel_size=5, **coarse)
    prompt, above = model.prepare_condition(classes(model, 1)), upper(model, 1)
    codes = make_indices(model, 1).flatten(1)
    one_pass = operations(lambda: model(torch.cat([prompt, codes[:, :-1]], dim=1), **above))
    sampled = operations(lambda: model.generate(prompt, do_sample=True, **above))
    # less than a pass: no masked taps, and attention to earlier positions only
    assert 0.8 * one_pass < sampled <= 3 * one_pass


def test_a_position_costs_the_same_on_any_map():
    def per_position(grid):
        model = make("top", attention=False, grid_size=grid, hidden_size=16)
        cache = model(model.prepare_condition(), use_cache=True).past_key_values
        rest = make_indices(model, 1).flatten(1)[:, :-1]
        return (
            operations(lambda: [model(code[:, None], past_key_values=cache) for code in rest.unbind(1)]) / rest.numel()
        )

    small, large = per_position((6, 6)), per_position((14, 14))
    assert large <= 1.15 * small  # of the first row of the smaller map, more was there already


# ---------------------------------------------------------------------------------------------------- training


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_of_all_images_sum_to_one(kind):
    coarse = {"conditioning_grid_size": (1, 3)} if "bottom" in kind else {}
    model = make(kind, codebook_size=3, grid_size=(2, 3), **coarse)
    every = torch.tensor(list(itertools.product(range(3), repeat=6)))
    above = {name: codes.expand(3**6, -1, -1) for name, codes in upper(model, 1).items()}
    log_likelihood = model.log_likelihood(every, classes(model, 1), **above)
    assert log_likelihood.shape == (3**6,) and log_likelihood.std() > 0.5
    assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-5)
    loss = model(**model.prepare_inputs(every, classes(model, 1)), **above).loss
    torch.testing.assert_close(loss, -log_likelihood.mean() / 6)


@torch.no_grad()
@pytest.mark.parametrize("part", ["gated block", "attention"])
def test_dropout_acts_in_training_and_keeps_the_mean(part):
    block = make("top", num_blocks=1, dropout=0.5).double().blocks[0]
    generator = torch.Generator().manual_seed(0)
    if part == "gated block":
        layer = block.residual_blocks[0]
        inputs = [torch.randn(1, 3, 3, 8, generator=generator)]
        linear = layer.conv2  # what comes out of it is linear in what is dropped
    else:
        linear = layer = block.attention
        sizes = [projection.in_features for projection in (layer.query, layer.key)]
        inputs = [torch.randn(1, 9, size, generator=generator) for size in sizes]
    seen = []
    linear.register_forward_hook(lambda module, args, output: seen.append(output))
    layer(*(each.double() for each in inputs))
    set_seed(0)
    layer.train()(*(each.double().expand(2000, *each.shape[1:]) for each in inputs))
    expected, drawn = seen[0][0], seen[1]
    standard_error = drawn.std(dim=0) / 2000**0.5
    assert ((drawn.mean(dim=0) - expected).abs() <= 5 * standard_error + 1e-12).all()
    # the first position sees nothing that could be dropped
    assert (standard_error.flatten(0, -2)[1:] > 0).all()


@torch.no_grad()
def test_classes_and_upper_codes_matter():
    model = make("class-bottom")
    indices = make_indices(model, 1).expand(4, -1, -1)
    above = upper(model, 1)["condition_indices"].expand(4, -1, -1)
    by_class = model.log_likelihood(indices, [0, 1, 2, 0], condition_indices=above)
    null = model.log_likelihood(indices[:1], condition_indices=above[:1])
    other = model.log_likelihood(indices[:1], [0], **upper(model, 1, seed=8))
    assert by_class[0] == by_class[3]
    assert torch.cat([by_class[:3], null, other]).unique().numel() == 5


@pytest.mark.parametrize("kind", ["class", "class-bottom"])
def test_a_few_steps_learn_an_image(kind):
    set_seed(0)
    config = PixelSNAILConfig(**{**TINY, **KINDS[kind], "hidden_size": 16, "res_channels": 16, "dropout": 0.05})
    model = PixelSNAILForCausalLM(config).train()
    indices, above = make_indices(model), upper(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(**model.prepare_inputs(indices, [0, 2]), **above).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3
    sequences = model.eval().generate(model.prepare_condition([0, 2]), do_sample=False, **above)
    assert torch.equal(model.extract_indices(sequences), indices)


def test_weights_start_as_those_of_torch():
    set_seed(0)
    model = PixelSNAILForCausalLM(PixelSNAILConfig(codebook_size=64, grid_size=8, hidden_size=32, num_blocks=1))
    fans = {}
    for name, module in model.named_modules():
        if isinstance(module, CausalConv):  # as one convolution over all its taps
            fan_in = sum(part.weight[0].numel() for part in (module.above, module.left))
            fans |= {module.above: fan_in, module.left: fan_in}
        if not is_parametrized(module, "weight"):
            continue
        direction = module.parametrizations.weight.original1
        fan_in = fans.get(module, direction[0].numel())
        torch.testing.assert_close(module.weight, direction, msg=name)
        assert module.weight.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.1), name
        assert module.bias is None or module.bias.abs().max() <= fan_in**-0.5, name


# ---------------------------------------------------------------------------------------------------- saving, errors


def test_low_precision_samples_and_is_close():
    model = make("class-bottom")
    model.head.out.parametrizations.weight.original0.data.div_(8)
    indices, above = make_indices(model), upper(model)
    with torch.no_grad():
        expected = model.log_likelihood(indices, [0, 1], **above)
        result = model.to(torch.bfloat16).log_likelihood(indices, [0, 1], **above)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, atol=1.0, rtol=0)
    assert model.generate(model.prepare_condition([0, 1]), do_sample=True, **above)[:, 1:].max() < 11


@pytest.mark.parametrize("kind", ["top", "class-bottom"])
def test_auto_classes_load_it_with_its_code(kind, tmp_path):
    model = make(kind)
    save_with_code(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is PixelSNAILForCausalLM and loaded.config.grid_size == [4, 6]
    assert type(AutoConfig.from_pretrained(tmp_path)) is PixelSNAILConfig
    foreign = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    prompt = model.prepare_condition(classes(model), batch_size=2)
    expected = model.generate(prompt, do_sample=False, **upper(model))
    for other in (loaded, foreign):
        assert torch.equal(other.generate(prompt, do_sample=False, **upper(model)), expected)


def test_a_cache_carries_no_gradient():
    model = make("class").train()
    ids = model.prepare_inputs(make_indices(model), [0, 1])["input_ids"]
    output = model(ids[:, :5], use_cache=True)
    assert output.logits.requires_grad
    model(ids[:, 5:7], past_key_values=output.past_key_values).logits.sum().backward()
    assert model.blocks[0].residual_blocks[0].conv1.above.bias.grad is None and model.head.out.bias.grad is not None


def test_bad_inputs():
    model, top = make("class-bottom"), make("class")
    indices, above = make_indices(model), upper(model)["condition_indices"]
    inputs, prompt = model.prepare_inputs(indices, [0, 1]), model.prepare_condition([0, 1])
    for call, message in (
        (lambda: model(**inputs), "condition_indices"),
        (lambda: model(**inputs, condition_indices=above.float()), "condition_indices"),
        (lambda: model(**inputs, condition_indices=above[:1]), "condition_indices"),
        (lambda: model(**inputs, condition_indices=above[:, :, :2]), "condition_indices"),
        (lambda: model(**inputs, condition_indices=above + 7), "`condition_indices`.*0 … 6"),
        (lambda: model(**inputs, condition_indices=above.tolist()), "condition_indices.*got list"),
        (lambda: model.generate(prompt), "condition_indices"),
        (lambda: model.log_likelihood(indices, [0, 1], condition_indices=above - 7), "0 … 6"),
        (lambda: top(**inputs, condition_indices=above), "must be None"),
        (lambda: top.generate(prompt, condition_indices=above), "must be None"),
        (lambda: top.generate(prompt, cache_implementation="static"), "cache_implementation"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"condition_type": "codes"}, "condition_type"),
        ({"grid_size": (0, 3)}, "grid_size"),
        ({"kernel_size": 4}, "kernel_size"),
        ({"kernel_size": 1}, "kernel_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 6}, "num_attention_heads"),
        ({"num_res_blocks": -1}, "num_res_blocks"),
        ({"conditioning_channels": 0}, "conditioning_channels"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": 1.0, "num_attention_heads": 3}, "dropout"),
        ({"conditioning_grid_size": 2}, "given together"),
        ({"conditioning_codebook_size": 7}, "given together"),
        ({"conditioning_codebook_size": 0, "conditioning_grid_size": 2}, "conditioning_codebook_size"),
        ({"conditioning_codebook_size": 7, "conditioning_grid_size": 4}, "multiple"),
        ({"num_conditioning_res_blocks": 1}, "level above"),
    ],
)
def test_bad_configurations(arguments, message):
    with pytest.raises(ValueError, match=message):
        PixelSNAILConfig(**{**TINY, **arguments})


def test_configuration_round_trip(tmp_path):
    config = PixelSNAILConfig(
        codebook_size=5,
        grid_size=4,
        condition_type="class",
        num_classes=2,
        id2label={0: "a", 1: "b"},
        conditioning_codebook_size=3,
        conditioning_grid_size=2,
        num_hidden_layers=3,
    )
    assert (config.vocab_size, config.input_vocab_size) == (5, 8)
    assert (config.null_class_token_id, config.num_blocks) == (7, 3)
    config.save_pretrained(tmp_path)
    loaded = PixelSNAILConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.grid_size == [4, 4] and loaded.conditioning_grid_size == [2, 2] and loaded.num_classes == 2
