"""The scheduler against the original VQ-Diffusion's tables, posteriors, losses, truncation and purity prior."""

import pytest
import torch

from hf_vq.conversion.convert_vq_diffusion import read_model
from hf_vq.conversion.reading import load_checkpoint
from hf_vq.conversion.vq_diffusion_network import convert_transformer
from hf_vq.schedulers.reverse_steps import purity
from hf_vq.schedulers.scheduling_mask_replace import MaskReplaceScheduler
from hf_vq.schedulers.transition_tables import Transition
from tests.conversion.golden import Golden


CASES = ["vqdiff_class", "vqdiff_text_clip", "vqdiff_text_ithq", "vqdiff_uncond"]
AUXILIARY = {"vqdiff_class": 1e-3, "vqdiff_text_clip": 5e-4, "vqdiff_text_ithq": 5e-4, "vqdiff_uncond": 1e-3}
# The original writes a probability of 0 as some number between exp(-70) and exp(-53).
FLOOR = -50.0
# The state of importance sampling, which has its own test; the network and the codec; the original's fast sampling,
# which is wrong; and its truncation to a number of codes, which no pipeline of it reaches.
ELSEWHERE = (
    "logits.",
    "log_x_start.",
    "raw.",
    "null.",
    "guided",
    "cond_emb",
    "cf.",
    "cf_",
    "codec_",
    "patch.",
    "ema_",
)
ELSEWHERE += ("gen.", "fast.", "trunc.top3p", "train.imp_", "train.Lt_", "train.acc_", "train.keep_", "train.grad_")
ELSEWHERE += ("train.loss_mean",)


@pytest.fixture(scope="module", params=CASES)
def golden(request):
    return Golden(request.param)


@pytest.fixture(scope="module")
def scheduler(golden):
    return MaskReplaceScheduler(golden["log_x_start.a"].shape[1] - 1, len(golden["tab.log_at"]))


def load_transformer(golden: Golden):
    params = read_model(golden.folder / "config.yaml", "config")["params"]
    checkpoint = load_checkpoint(golden.folder / "checkpoint.ckpt")
    weights = checkpoint.get("ema") or {
        key.removeprefix("transformer."): value for key, value in checkpoint["model"].items()
    }
    weights = {key: value for key, value in weights.items() if key.startswith("transformer.")}
    weights = {key.removeprefix("transformer."): value for key, value in weights.items()}
    return convert_transformer(params["diffusion_config"]["params"], weights)[0]


def compare_logs(golden: Golden, name: str, probs: torch.Tensor):
    """Probabilities `(B, L, K + 1)` with log-probabilities `(B, K + 1, L)`."""
    golden.tensors[name] = golden[name].clamp_min(FLOOR)
    golden.compare(name, probs.mT.log().clamp_min(FLOOR).float())


def transition(scheduler, s: torch.Tensor, t: torch.Tensor) -> Transition:
    tables = torch.stack([scheduler.alphas_cumprod, scheduler.betas_cumprod, scheduler.gammas_cumprod])
    data = torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64)
    return Transition.between(torch.cat([data, tables], dim=1), s, t)


def forward_probs(scheduler, x0: torch.Tensor, timesteps: torch.Tensor, start=None) -> torch.Tensor:
    """q(x_t | x_s) `(B, L, K + 1)` of codes or masks `x0`, from -1 (the data) or `start`."""
    start = torch.full_like(timesteps, -1) if start is None else start
    chain = transition(scheduler, start, timesteps)
    one_hot = torch.nn.functional.one_hot(x0, scheduler.mask_index + 1).double()
    alpha, beta, gamma = (value[:, None, None] for value in (chain.alpha, chain.beta, chain.gamma))
    codes = alpha * one_hot[..., :-1] + beta
    moved = torch.cat([codes, gamma.expand_as(codes[..., :1])], dim=-1)
    return torch.where((x0 == scheduler.mask_index)[..., None], one_hot, moved)


def gumbel(u: torch.Tensor) -> torch.Tensor:
    return -(-(u + 1e-30).log() + 1e-30).log()


def compare_tables(golden: Golden, scheduler):
    """The original keeps logarithms, and the data in the last entry of the cumulative ones."""
    tables = {
        "a": (scheduler.alphas_cumprod, 1.0),
        "b": (scheduler.betas_cumprod, 0.0),
        "c": (scheduler.gammas_cumprod, 0.0),
    }
    for letter, (table, of_data) in tables.items():
        cumulative = torch.cat([table, table.new_tensor([of_data])])
        name = f"tab.log_cumprod_{letter}t"
        assert golden[name][-1] == torch.tensor(of_data).log()
        golden.compared.add(name)
        # the manifest has no tolerance for a table with log 0
        torch.testing.assert_close(cumulative.log().float(), golden[name], atol=4.2e-5, rtol=0)
    golden.compare("tab.log_1_min_cumprod_ct", (1 - torch.cat([tables["c"][0], torch.zeros(1)])).log().float())
    t = torch.arange(len(scheduler.timesteps))
    step = transition(scheduler, t - 1, t)
    for name, value in (("at", step.alpha), ("bt", step.beta), ("ct", step.gamma), ("1_min_ct", 1 - step.gamma)):
        golden.compare(f"tab.log_{name}", value.log().float())


def test_tables(golden, scheduler):
    compare_tables(golden, scheduler)


@pytest.mark.parametrize("which", ["a", "b"])
def test_forward_chain(golden, scheduler, which):
    x0, x, t = golden["x0"], golden[f"x_t.{which}"], golden[f"t.{which}"]
    probs = forward_probs(scheduler, x0, t)
    compare_logs(golden, f"q_pred.{which}", probs)
    one_step = forward_probs(scheduler, x, t, t - 1)
    # the original's formula is for codes; from the mask it leads to codes, too, which its posterior does not use
    masked = x == scheduler.mask_index
    one_step[masked] = golden[f"q_pred_one.{which}"].mT[masked].double().exp()
    assert not masked.all()
    compare_logs(golden, f"q_pred_one.{which}", one_step)
    before = torch.where((t > 0)[:, None, None], forward_probs(scheduler, x0, (t - 1).clamp_min(0)), 0.0)
    before[t == 0] = torch.nn.functional.one_hot(x0[t == 0], scheduler.mask_index + 1).double()
    compare_logs(golden, f"q_pred_tm1.{which}", before)
    golden.compare(f"q_sample.{which}", (probs.log().mT + gumbel(golden["u"])).argmax(dim=1))


@pytest.mark.parametrize("which", ["a", "b"])
def test_posterior_and_bound(golden, scheduler, which):
    x0, x, t = golden["x0"], golden[f"x_t.{which}"], golden[f"t.{which}"]
    logits = golden[f"log_x_start.{which}"][:, :-1].mT
    posterior = scheduler.q_posterior(scheduler.predict_original(logits), x, t, t - 1)
    for name in ("q_posterior_pred", "p_pred"):
        compare_logs(golden, f"{name}.{which}", posterior)
    one_hot = torch.nn.functional.one_hot(x0, scheduler.mask_index).float()
    true = scheduler.q_posterior(one_hot, x, t, t - 1)
    compare_logs(golden, f"q_posterior_true.{which}", true)
    golden.compare(f"decoder_nll.{which}", -posterior.gather(-1, x0[..., None]).squeeze(-1).log())
    golden.compare(f"kl.{which}", scheduler.vlb_terms(logits, x0, x, t))
    floored = posterior.log().clamp_min(-70).mT
    golden.compare(f"p_sample.{which}", (floored + gumbel(golden["u"])).argmax(dim=1))


@pytest.mark.parametrize("rate", [0.85, 0.5, 1.0])
def test_truncation(golden, scheduler, rate):
    """The same codes are kept; the original leaves their mass as it was."""
    name = f"trunc.top{rate}r"
    probs = scheduler.predict_original(golden["log_x_start.b"][:, :-1].mT, rate)
    mass = golden[name][:, :-1].exp().sum(dim=1)[..., None]
    assert rate == 1 or (mass < 0.99).any()
    expected = golden[name].clone()
    expected[:, -1] = -70  # no mask
    golden.tensors[name] = expected
    golden.compare(name, torch.cat([probs * mass, torch.zeros_like(mass)], dim=-1).log().clamp_min(-70).mT)


@torch.no_grad()
def test_training_loss(golden, scheduler):
    transformer = load_transformer(golden)
    x0, t, probability = golden["x0"], golden["train_t"], golden["train_pt"]
    x = (forward_probs(scheduler, x0, t).log().mT + gumbel(golden["u"])).argmax(dim=1)
    condition = {}
    if golden.name == "vqdiff_class":
        condition["class_labels"] = golden["label"]
    elif "text" in golden.name:
        condition["encoder_hidden_states"] = golden["cond_emb"]
    logits = transformer(x.view(2, 4, 4), t, **condition).sample.flatten(1, 2)
    posterior = scheduler.q_posterior(scheduler.predict_original(logits), x, t, t - 1)
    compare_logs(golden, "train.log_model_prob", posterior)
    terms = scheduler.vlb_terms(logits, x0, x, t).sum(dim=1) / probability
    auxiliary = scheduler.auxiliary_loss(logits, x0, t).sum(dim=1) / probability
    golden.compare("train.vb_loss_noaux", terms)
    golden.compare("train.vb_loss", terms + AUXILIARY[golden.name] * auxiliary)


def test_nothing_is_left_out(golden):
    if "train.vb_loss" not in golden.compared:
        pytest.skip("the tests above have not run")
    outputs = {name for name, entry in golden.manifest.items() if entry["role"] != "input"}
    golden.assert_all_compared({name for name in outputs if name.startswith(ELSEWHERE)})


@pytest.mark.parametrize(
    "revealed, tolerance",
    [([1, 10] + [11, 10, 10] * 32 + [11, 11], 1), ([69] + [102] * 8 + [139], 69)],  # by timestep, for 1024 positions
)
def test_number_of_positions_that_the_purity_prior_reveals(revealed, tolerance):
    """What is masked after each step, beside the original's tables for 100 and 10 steps."""
    scheduler = MaskReplaceScheduler(4, len(revealed))
    x = scheduler.initial_sample((1, 32, 32))
    for t in scheduler.timesteps[:-1]:
        x = scheduler.step(torch.zeros(1, 32, 32, 4), t, x, prior_rule=1).prev_sample
        assert abs(int((x == 4).sum()) - sum(revealed[:t])) <= tolerance, t


@torch.no_grad()
def test_purity_prior():
    """A whole chain, each call from the original's state: what it scores, what it draws from, and what it draws."""
    golden = Golden("vqdiff_purity")
    scheduler, transformer = MaskReplaceScheduler(15, 10), load_transformer(golden)
    compare_tables(golden, scheduler)

    def predict(x, t):
        logits = transformer(x.view(1, 32, 32), t).sample.flatten(1, 2)
        score = purity(logits[0])
        return logits, score / score.max()

    def drawn_from(logits, score):
        """With a probability of 0 for the mask."""
        probs = (logits * (1 + score[:, None])).softmax(dim=-1)
        return torch.cat([probs, torch.zeros_like(probs[..., :1])], dim=-1)

    states, before, timesteps = [], scheduler.initial_sample((1, 1024)), []
    for call, t in enumerate(range(9, -1, -1)):
        timesteps.append(t)
        logits, score = predict(before, t)
        if t > 0:
            probs = drawn_from(logits, score)
            selected = golden["selections"][call]
            selected = selected[selected >= 0]
            step = {"prev_timestep": t - 1, "prior_rule": 2, "prior_weight": 1.0, "prior_count": len(selected)}
            own = scheduler.step(logits, t, before, **step).prev_sample
            assert ((own != before).sum(), (before[0, selected] == 15).all()) == (len(selected), True)
        else:
            probs = scheduler.q_posterior(scheduler.predict_original(logits), before, t, -1)
            selected = torch.arange(1024)
        if call == 1:
            compare_logs(golden, "prob_call2", probs)
        drawn = (probs.log().clamp_min(-70).mT + gumbel(golden["uniforms"][call])).argmax(dim=1)
        after = before.clone()
        after[0, selected] = drawn[0, selected]
        assert torch.equal(after[0], golden["tokens_after_call"][call]), call
        states.append(after)
        before = after
    golden.compare("tokens_after_call", torch.cat(states))
    golden.compare("tokens", states[-1])
    golden.compare("calls_t", torch.tensor(timesteps))

    x, t = golden["score_x_t"], golden["score_t"]
    logits, score = predict(x, t)
    masked = x[0] == 15
    golden.compare("score_masked", score * masked)
    compare_logs(golden, "score_prob", drawn_from(logits, score))
    probs = scheduler.predict_original(logits)
    compare_logs(golden, "score_log_x_recon", torch.cat([probs, torch.zeros_like(probs[..., :1])], dim=-1))
    compare_logs(golden, "score_p_pred", scheduler.q_posterior(probs, x, t, t - 1))
    # bookkeeping of the original's calls
    golden.assert_all_compared({"score_n", "calls_sampled_before"})
