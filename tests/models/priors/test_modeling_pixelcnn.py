"""PixelCNN: against masked convolutions, its receptive field, and sampling position by position against whole
passes.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from hf_vq.models.autoencoders.configuration_vqvae import VQVAEConfig
from hf_vq.models.autoencoders.modeling_vqvae import VQVAEModel
from hf_vq.models.priors.configuration_pixelcnn import PixelCNNConfig
from hf_vq.models.priors.modeling_pixelcnn import GatedLayer, PixelCNNForCausalLM
from hf_vq.pipelines.code_sampling import draw_codes
from hf_vq.pipelines.pipeline_vq_autoregressive import VQAutoregressivePipeline
from tests.models.model_testing import ModelCase
from tests.models.priors.code_prior_testing import CodePriorTests, classes, make_indices, operations
from tests.pipelines.completing import complete


TINY = {
    "codebook_size": 11,
    "grid_size": (3, 4),
    "hidden_size": 6,
    "num_hidden_layers": 3,
    "kernel_size": 3,
    "head_hidden_size": 10,
}
KINDS = {
    "unconditional": {},
    "class": {"condition_type": "class", "num_classes": 3},
    "weight-norm": {"condition_type": "class", "num_classes": 3, "weight_norm": True},
    "one-layer": {"condition_type": "class", "num_classes": 3, "num_hidden_layers": 1, "kernel_size": 5},
}
SHAPES = [((3, 4), 3, 3), ((5, 3), 5, 2), ((1, 6), 3, 2), ((6, 1), 3, 2), ((4, 4), 7, 2)]  # grid, kernel, layers


def make(kind="class", seed=5, **overrides):
    """
    A tiny model far from uniform and different by position and class; its features pass no ReLU but that of the head's
    hidden layer, which is wide, so that what one depends on is seen.
    """
    model = PixelCNNForCausalLM(PixelCNNConfig(**{**TINY, **KINDS[kind], **overrides})).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        fan_in = 1 if "class" in name or "embedding" in name or parameter.ndim < 2 else parameter[0].numel()
        gain = 1.0 if name == "head.out.weight" else 0.3 if name.endswith("bias") else 2.0
        parameter.data.normal_(std=gain / fan_in**0.5, generator=generator)
    return model


def make_case(kind, **overrides):
    config = PixelCNNConfig(**{**TINY, **KINDS[kind], **overrides})

    def inputs():
        ids = make_indices(PixelCNNForCausalLM(config)).flatten(1)
        ids = torch.cat([torch.tensor([[config.codebook_size], [config.input_vocab_size - 1]]), ids], dim=1)
        return {"input_ids": ids, "labels": ids}

    return ModelCase(PixelCNNForCausalLM, config, inputs, checkpointed=(GatedLayer,))


@pytest.fixture(params=["unconditional", "class", "weight-norm", "dropout"])
def case(request):
    if request.param == "dropout":
        return make_case("class", dropout=0.3, condition_dropout=0.5)
    return make_case(request.param)


class TestPixelCNN(CodePriorTests):
    pass


# ---------------------------------------------------------------------------------------------------- the network


def as_masked(conv, kernel_size, is_vertical):
    """A cropped kernel within the k×k or 1×k kernel of the paper, where what the mask removes is 0."""
    half = kernel_size // 2
    weight = conv.weight
    taps = weight.shape[2 if is_vertical else 3]
    masked = weight.new_zeros(*weight.shape[:2], kernel_size if is_vertical else 1, kernel_size)
    if is_vertical:
        masked[:, :, :taps] = weight
    else:
        masked[..., :taps] = weight
    assert taps in (half, half + 1)
    return masked


def logits_by_masks(model, indices, class_ids):
    """The paper's network in its own terms: masked convolutions of odd size, padded to keep the size of the map."""
    k = model.config.kernel_size
    one_hot = F.one_hot(indices, model.config.codebook_size).to(model.dtype)
    vertical = horizontal = torch.einsum("bhwk,kc->bchw", one_hot, model.code_embedding.weight)
    channels = model.config.hidden_size

    def bias(embedding):
        if class_ids is None or embedding is None:
            return 0.0
        return embedding.weight[torch.tensor(class_ids)][:, :, None, None]

    def gated(x):
        return x[:, :channels].tanh() / (1 + torch.exp(-x[:, channels:]))

    for number, layer in enumerate(model.layers):
        above = F.conv2d(vertical, as_masked(layer.vertical_conv, k, True), layer.vertical_conv.bias, padding=k // 2)
        left = F.conv2d(
            horizontal, as_masked(layer.horizontal_conv, k, False), layer.horizontal_conv.bias, padding=(0, k // 2)
        )
        x = left + layer.vertical_to_horizontal(above) + bias(layer.class_horizontal)
        out = layer.horizontal_out(gated(x))
        horizontal = out if number == 0 else horizontal + out
        vertical = gated(above + bias(layer.class_vertical))
    features = horizontal.permute(0, 2, 3, 1)
    return model.head.out(model.head.hidden(features.clamp_min(0)).clamp_min(0)).flatten(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid, kernel_size, layers", SHAPES)
def test_logits_are_those_of_masked_convolutions(grid, kernel_size, layers, kind):
    model = make(kind, grid_size=grid, kernel_size=kernel_size, num_hidden_layers=layers).double()
    indices, labels = make_indices(model), classes(model)
    expected = logits_by_masks(model, indices, labels)
    assert expected.std(dim=1).min() > 1e-3
    inputs = model.prepare_inputs(indices, labels)
    torch.testing.assert_close(model(inputs["input_ids"][:, :-1]).logits, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-10, rtol=1e-10)
    for length in range(1, expected.shape[1]):
        shorter = model(inputs["input_ids"][:, :length]).logits
        torch.testing.assert_close(shorter, expected[:, :length], atol=1e-10, rtol=1e-10)


def receptive_fields(height, width, kernel_size, layers):
    """For each position the set of positions that its features can know, followed through the layers of the paper."""
    half = kernel_size // 2
    grid = list(itertools.product(range(height), range(width)))
    vertical = horizontal = {place: {place} for place in grid}
    for number in range(layers):
        first = number == 0
        rows, columns = range(1 if first else 0, half + 1), range(-half, half + 1)
        above = {
            (r, c): set().union(*(vertical.get((r - i, c + j), set()) for i in rows for j in columns)) for r, c in grid
        }
        left = {(r, c): set().union(*(horizontal.get((r, c - i), set()) for i in rows)) for r, c in grid}
        horizontal = {place: left[place] | above[place] for place in grid}
        vertical = above
    return [{r * width + c for r, c in horizontal[place]} for place in grid]


@pytest.mark.parametrize("grid, kernel_size, layers", SHAPES)
def test_each_position_knows_its_receptive_field_and_nothing_else(grid, kernel_size, layers):
    model = make("unconditional", grid_size=grid, kernel_size=kernel_size, num_hidden_layers=layers).double()
    fields = receptive_fields(*grid, kernel_size, layers)
    assert all(earlier < place for place, field in enumerate(fields) for earlier in field)
    count = grid[0] * grid[1]
    prefix, codes = model.prepare_condition(), make_indices(model, 1).flatten(1)

    # gradients: of the features of each position with respect to the embedding of each code
    seen = {}
    model.code_embedding.register_forward_hook(lambda module, args, output: seen.update(embedded=output))
    features = model.read_grid(codes.unflatten(1, grid), None).flatten(1, 2)
    for place in range(count):
        (gradient,) = torch.autograd.grad(features[0, place].sum(), seen["embedded"], retain_graph=True)
        moved = gradient[0].flatten(0, 1).abs().sum(-1)
        assert set(moved.nonzero().flatten().tolist()) == fields[place]

    # perturbation: of each code, through the whole model
    with torch.no_grad():
        before = model(torch.cat([prefix, codes[:, :-1]], dim=1)).logits
        for changed in range(count - 1):
            others = codes.clone()
            others[:, changed] = (codes[:, changed] + 1) % 11
            after = model(torch.cat([prefix, others[:, :-1]], dim=1)).logits
            moved = (after - before)[0].abs().sum(-1).nonzero().flatten().tolist()
            assert moved == [place for place in range(count) if changed in fields[place]]


# ---------------------------------------------------------------------------------------------------- sampling


def make_pipeline(prior):
    torch.manual_seed(0)
    vqvae = VQVAEModel(
        VQVAEConfig(
            resolution=8,
            hidden_size=4,
            residual_hidden_size=4,
            num_residual_layers=1,
            embed_dim=4,
            num_embeddings=prior.config.codebook_size,
        )
    )
    pipeline = VQAutoregressivePipeline(vqvae.eval(), prior)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def sample_by_hand(model, codes, keep, labels, guidance_scale, generator, temperature=1.0):
    """A pass over the whole map for each position, in raster order; the codes to keep are copied."""
    height, width = model.config.grid_size
    codes = codes.clone()
    codes[~keep] = 0
    ids = torch.tensor(labels if labels is not None else [0] * len(codes))
    null = torch.full_like(ids, model.config.condition_vocab_size)
    head = model.head

    def log_probs(class_ids, row, column):
        conditional = model.config.condition_type == "class"
        features = model.read_grid(codes, class_ids if conditional else None)
        return head(features[:, row, column]).log_softmax(-1)

    for row, column in itertools.product(range(height), range(width)):
        if keep[:, row, column].all() and not codes_left(keep, row, column):
            continue
        scores = log_probs(ids, row, column)
        if guidance_scale != 1:
            base = log_probs(null, row, column)
            scores = base + guidance_scale * (scores - base)
        drawn = draw_codes(scores / temperature, generator)
        codes[:, row, column] = torch.where(keep[:, row, column], codes[:, row, column], drawn)
    return codes


def codes_left(keep, row, column):
    """Whether a position that is not kept comes before this one: from there on every position is drawn."""
    width = keep.shape[2]
    return not keep.flatten(1)[:, : row * width + column].all()


@pytest.mark.parametrize("kind, guidance_scale", [("unconditional", 1.0), ("class", 1.0), ("weight-norm", 2.5)])
@pytest.mark.parametrize("grid, kernel_size", [((3, 4), 3), ((5, 3), 5), ((1, 5), 3), ((5, 1), 5), ((2, 7), 7)])
@pytest.mark.parametrize("kept", [0, 1, "mask"])
def test_incremental_sampling_equals_whole_passes(kind, guidance_scale, grid, kernel_size, kept):
    model = make(kind, grid_size=grid, kernel_size=kernel_size).double()
    pipeline = make_pipeline(model)
    labels, given = classes(model, 3), make_indices(model, 3)
    keep = torch.zeros(3, *grid, dtype=torch.bool)
    if kept == "mask":
        keep = torch.rand(3, *grid, generator=torch.Generator().manual_seed(4)) < 0.4
    elif kept:
        keep.view(3, -1)[:, : grid[0] * grid[1] // 2 + 1] = True
    expected = sample_by_hand(model, given, keep, labels, guidance_scale, torch.Generator().manual_seed(7), 1.3)
    assert expected.unique().numel() > 3, "the loop must have something to get wrong"
    options = {"class_labels": labels, "guidance_scale": guidance_scale, "temperature": 1.3, "output_type": "indices"}
    for use_cache in (True, False):
        options.update(generator=torch.Generator().manual_seed(7), use_cache=use_cache)
        if kept:
            indices = complete(pipeline, indices=given, keep=keep, **options).indices
        else:
            count = 3 if labels is None else 1
            indices = pipeline(num_images_per_prompt=count, **options).indices
        assert torch.equal(indices, expected), use_cache


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt_length", [1, 2, 4, 5, 8, 12])
def test_every_step_gives_the_logits_of_a_pass(kind, prompt_length):
    model = make(kind).double()
    ids = model.prepare_inputs(make_indices(model), classes(model))["input_ids"][:, :-1]
    expected = model(ids).logits
    output = model(ids[:, :prompt_length], use_cache=True)
    torch.testing.assert_close(output.logits, expected[:, :prompt_length], atol=1e-10, rtol=1e-10)
    cache = output.past_key_values
    assert cache.get_seq_length() == prompt_length
    for place in range(prompt_length, 12):
        if place == 9:  # several at once
            logits = model(ids[:, place:], past_key_values=cache).logits
            torch.testing.assert_close(logits, expected[:, place:], atol=1e-10, rtol=1e-10)
            break
        logits = model(ids[:, place, None], past_key_values=cache).logits
        torch.testing.assert_close(logits[:, 0], expected[:, place], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.8}, {"temperature": 1.5, "guidance_scale": 2.0}])
def test_transformers_own_sampling_is_equal_with_and_without_a_cache(filters):
    model = make().double()
    prompt = model.prepare_condition([0, 2])
    sequences = []
    for use_cache in (True, False):
        set_seed(3)
        options = {"do_sample": True, "num_return_sequences": 2, "top_k": 0, **filters}
        sequences.append(model.generate(prompt, use_cache=use_cache, **options))
    assert sequences[0].shape == (4, 13) and not torch.equal(sequences[0][0], sequences[0][1])
    assert torch.equal(*sequences)


def test_a_returned_cache_goes_on():
    model = make().double()
    prompt = model.prepare_condition([0, 2])
    whole = model.generate(prompt, do_sample=False)
    half = model.generate(prompt, do_sample=False, max_new_tokens=5, return_dict_in_generate=True)
    rest = model.generate(half.sequences, past_key_values=half.past_key_values, do_sample=False)
    assert torch.equal(rest, whole)
    assert torch.equal(model.generate(whole[:, :6], do_sample=False), whole)


@pytest.mark.parametrize(
    "kind, message", [("class", "`inputs` is required"), ("unconditional", "leave a code to sample")]
)
def test_prompts_that_cannot_be_completed(kind, message):
    model = make(kind)
    full = model.prepare_inputs(make_indices(model))["input_ids"]
    with pytest.raises(ValueError, match=message):
        model.generate(None if kind == "class" else full)


def test_unconditional_generation_needs_no_prompt():
    model = make("unconditional").double()
    assert torch.equal(
        model.generate(do_sample=False), model.generate(model.prepare_condition(), do_sample=False, use_cache=False)
    )


def test_beam_search_without_a_cache():
    model = make().double()
    prompt = model.prepare_condition([0, 1])
    greedy = model.extract_indices(model.generate(prompt, do_sample=False))
    beams = model.extract_indices(model.generate(prompt, num_beams=4, do_sample=False, use_cache=False))
    with torch.no_grad():
        assert (model.log_likelihood(beams, [0, 1]) >= model.log_likelihood(greedy, [0, 1]) - 1e-6).all()
    with pytest.raises(ValueError, match="num_beams"):
        model.generate(prompt, num_beams=2, do_sample=False)


@pytest.mark.parametrize("grid, kernel_size", [((8, 8), 3), ((6, 10), 5), ((12, 4), 7)])
def test_a_map_costs_at_most_three_passes(grid, kernel_size):
    model = make(grid_size=grid, kernel_size=kernel_size, hidden_size=16, num_hidden_layers=4)
    prompt, codes = model.prepare_condition([0]), make_indices(model, 1).flatten(1)
    one_pass = operations(lambda: model(torch.cat([prompt, codes[:, :-1]], dim=1)))
    sampled = operations(lambda: model.generate(prompt, do_sample=True))
    assert one_pass < sampled <= 3 * one_pass
    naive = operations(lambda: model.generate(prompt, do_sample=True, use_cache=False))
    assert naive > grid[0] * grid[1] / 4 * one_pass


def test_a_position_costs_the_same_on_any_map():
    def per_position(grid):
        model = make(grid_size=grid, hidden_size=16)
        prompt = model.prepare_condition([0])
        cache = model(prompt, use_cache=True).past_key_values
        rest = make_indices(model, 1).flatten(1)[:, :-1]
        return operations(lambda: model(rest, past_key_values=cache)) / (grid[0] * grid[1])

    small, large = per_position((8, 8)), per_position((24, 24))
    assert large <= 1.15 * small  # of the first row of the smaller map, more was there already


def tensors_of(value):
    if isinstance(value, torch.nn.Module):
        return
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)
    elif hasattr(value, "__dict__"):
        yield from tensors_of(list(vars(value).values()))


def test_the_cache_holds_some_rows_however_high_the_map():
    def held(height):
        model = make(grid_size=(height, 4))
        ids = model.prepare_inputs(make_indices(model), [0, 1])["input_ids"]
        cache = model(ids[:, : 4 * (height - 1) + 2], use_cache=True).past_key_values
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(cache))

    assert held(16) == held(4)


# ---------------------------------------------------------------------------------------------------- training


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_of_all_images_sum_to_one(kind):
    model = make(kind, codebook_size=3, grid_size=(2, 3))
    every = torch.tensor(list(itertools.product(range(3), repeat=6)))
    log_likelihood = model.log_likelihood(every, None if kind == "unconditional" else 1)
    assert log_likelihood.shape == (3**6,) and log_likelihood.std() > 0.5
    assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_the_loss_is_the_mean_over_the_codes():
    model = make()
    indices = make_indices(model)
    inputs = model.prepare_inputs(indices, [0, 1])
    output = model(**inputs)
    torch.testing.assert_close(output.loss, -model.log_likelihood(indices, [0, 1]).mean() / 12)
    torch.testing.assert_close(model(inputs["input_ids"], labels=inputs["input_ids"]).loss, output.loss)
    torch.testing.assert_close(model(**inputs, num_items_in_batch=48).loss, output.loss / 2)
    ignored = inputs["labels"].clone()
    ignored[:, -6:] = -100
    by_hand = F.cross_entropy(output.logits[:, :6].transpose(1, 2), inputs["labels"][:, 1:7])
    torch.testing.assert_close(model(inputs["input_ids"], labels=ignored).loss, by_hand)
    ids = inputs["input_ids"][:, :-1]
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, output.logits[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, output.logits[:, [0, 3]])


def test_condition_dropout_makes_null_classes_in_training():
    model = make(condition_dropout=0.25).train()
    ids = model.prepare_inputs(torch.randint(11, (4000, 3, 4)), torch.randint(3, (4000,)))["input_ids"]
    corrupted = model.corrupt_inputs(ids)
    dropped = corrupted[:, 0] == model.config.null_class_token_id
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(corrupted[~dropped], ids[~dropped]) and torch.equal(corrupted[:, 1:], ids[:, 1:])
    always = make(condition_dropout=1.0)
    inputs = always.prepare_inputs(make_indices(always), [0, 1])
    clean, null = always(**inputs).loss, always(**always.prepare_inputs(make_indices(always))).loss
    assert not torch.equal(clean, null)
    assert torch.equal(always.train()(**inputs).loss, null)


@torch.no_grad()
def test_dropout_acts_in_training_and_keeps_the_mean():
    model = make("one-layer", dropout=0.5)  # features are then linear in what is dropped
    codes, class_ids = make_indices(model, 1).expand(2000, -1, -1), torch.ones(2000, dtype=torch.int64)
    expected = model.read_grid(codes[:1], class_ids[:1])[0]
    set_seed(0)
    drawn = model.train().read_grid(codes, class_ids)
    standard_error = drawn.std(dim=0) / 2000**0.5
    assert standard_error.min() > 0 and ((drawn.mean(dim=0) - expected).abs() < 5 * standard_error).all()


def test_classes_matter():
    model = make()
    indices = make_indices(model, 1).expand(4, -1, -1)
    with torch.no_grad():
        likelihoods = model.log_likelihood(indices, [0, 1, 2, 0])
        null = model.log_likelihood(indices[:1])
    assert likelihoods[0] == likelihoods[3]
    assert torch.cat([likelihoods[:3], null]).unique().numel() == 4


@pytest.mark.parametrize("weight_norm", [False, True])
def test_a_few_steps_learn_an_image(weight_norm):
    set_seed(0)
    kind = {**TINY, **KINDS["class"], "hidden_size": 16, "weight_norm": weight_norm}
    model = PixelCNNForCausalLM(PixelCNNConfig(**kind)).train()
    indices = make_indices(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        loss = model(**model.prepare_inputs(indices, [0, 2])).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    sequences = model.eval().generate(model.prepare_condition([0, 2]), do_sample=False)
    assert torch.equal(model.extract_indices(sequences), indices)


@pytest.mark.parametrize("weight_norm", [False, True])
def test_it_starts_near_the_uniform_distribution(weight_norm):
    set_seed(0)
    model = PixelCNNForCausalLM(PixelCNNConfig(codebook_size=64, grid_size=8, hidden_size=32, weight_norm=weight_norm))
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            assert module.weight.std().item() == pytest.approx(module.weight[0].numel() ** -0.5, rel=0.1)
            assert not module.bias.any()
    loss = model(**model.prepare_inputs(make_indices(model, 16))).loss.item()
    assert loss == pytest.approx(math.log(64), rel=0.05)
    if weight_norm:
        conv = model.layers[3].vertical_conv
        torch.testing.assert_close(conv.weight, conv.parametrizations.weight.original1)


# ---------------------------------------------------------------------------------------------------- saving, errors


def test_low_precision_samples_and_is_close():
    model = make()
    for parameter in model.head.out.parameters():
        parameter.data.div_(10)
    indices = make_indices(model)
    with torch.no_grad():
        expected = model.log_likelihood(indices, [0, 1])
        result = model.to(torch.bfloat16).log_likelihood(indices, [0, 1])
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, atol=0.5, rtol=0)
    assert model.generate(model.prepare_condition([0, 1]), do_sample=True)[:, 1:].max() < 11


@pytest.mark.parametrize("kind", KINDS)
def test_auto_classes_load_it(kind, tmp_path):
    model = make(kind)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is PixelCNNForCausalLM and loaded.config.grid_size == [3, 4]
    assert type(AutoConfig.from_pretrained(tmp_path)) is PixelCNNConfig
    prompt = model.prepare_condition(classes(model), batch_size=2)
    assert torch.equal(loaded.generate(prompt, do_sample=False), model.generate(prompt, do_sample=False))


def test_a_cache_carries_no_gradient():
    model = make().train()
    ids = model.prepare_inputs(make_indices(model), [0, 1])["input_ids"]
    output = model(ids[:, :5], use_cache=True)
    cache = output.past_key_values
    kept = [cache.row, *(getattr(steps, name) for steps in cache.layers for name in ("rows", "columns", "from_above"))]
    assert output.logits.requires_grad and not any(tensor.requires_grad for tensor in kept)
    model(ids[:, 5:7], past_key_values=cache).logits.sum().backward()
    assert model.layers[0].vertical_conv.bias.grad is None and model.head.out.bias.grad is not None


def test_bad_inputs():
    model = make()
    indices, prompt = make_indices(model), model.prepare_condition([0, 1])
    inputs = model.prepare_inputs(indices, [0, 1])
    ids = inputs["input_ids"]
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    for call, message in (
        (lambda: model(ids.float()), "input_ids"),
        (lambda: model(ids[0]), "input_ids"),
        (lambda: model(ids, use_cache=True), "the model has 12"),
        (lambda: model(ids[:, -1:], past_key_values=cache), "the model has 12"),
        (lambda: model(ids[:1, :1], past_key_values=cache), "2 rows"),
        (lambda: model(ids[:, :1], past_key_values=[]), "past_key_values"),
        (lambda: model(ids[:, :2], labels=ids[:, :2], past_key_values=cache), "exclude each other"),
        (lambda: model(ids, labels=ids[:, 1:]), "labels"),
        (lambda: model(ids[:, :3], attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]])), "attention_mask"),
        (lambda: model(ids[:, :3], condition_indices=indices), "condition_indices"),
        (lambda: model.generate(prompt, condition_indices=indices), "condition_indices"),
        (lambda: model.generate(prompt, cache_implementation="static"), "cache_implementation"),
        (lambda: model.generate(prompt, max_new_tokens=13), "max_new_tokens"),
        (lambda: model.generate(torch.tensor([[3]])), r"`inputs\[:, 0\]` must lie in 11 … 14 .*prepare_condition"),
        (lambda: model.generate(torch.tensor([[12, 12]])), r"`inputs\[:, 1:\]` must lie in 0 … 10"),
        (lambda: model.generate(torch.tensor([[15]])), "11 … 14"),
        (lambda: model.prepare_condition([3]), "0 … 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"condition_type": "codes"}, "condition_type"),
        ({"condition_type": "class"}, "condition_vocab_size"),
        ({"num_classes": 3}, "condition_vocab_size"),
        ({"condition_dropout": 0.1}, "condition_dropout"),
        ({"condition_type": "class", "num_classes": 3, "condition_dropout": 1.5}, "condition_dropout"),
        ({"condition_type": "class", "num_classes": 3, "id2label": {0: "a", 1: "b"}}, "id2label"),
        ({"grid_size": (1, 2, 3)}, "grid_size"),
        ({"grid_size": 0}, "grid_size"),
        ({"codebook_size": 0}, "codebook_size"),
        ({"kernel_size": 4}, "kernel_size"),
        ({"kernel_size": 1}, "kernel_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_configurations(arguments, message):
    with pytest.raises(ValueError, match=message):
        PixelCNNConfig(**{**TINY, **arguments})


def test_configuration_round_trip(tmp_path):
    config = PixelCNNConfig(
        codebook_size=5,
        grid_size=4,
        condition_type="class",
        num_classes=2,
        id2label={0: "a", 1: "b"},
        weight_norm=True,
    )
    assert (config.vocab_size, config.input_vocab_size) == (5, 8)
    assert (config.null_class_token_id, config.image_seq_length) == (7, 16)
    config.save_pretrained(tmp_path)
    loaded = PixelCNNConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.grid_size == [4, 4] and loaded.id2label == {0: "a", 1: "b"} and loaded.num_classes == 2
