"""The posterior q(x_s | x_t, x_0) of mask-and-replace diffusion, averaged over a prediction of x_0."""

import torch

from .transition_tables import Transition


def posterior_probs(probs: torch.FloatTensor, sample: torch.LongTensor, transition: Transition) -> torch.FloatTensor:
    """
    p(x_s | x_t) = Σ_i p(x_0 = i) q(x_s | x_t, x_0 = i) (Gu et al. 2022, equations 5 and 11, for any s < t).

    With x_t the mask: γ/γ̄_t (ᾱ_s p_j + β̄_s) for code j, and γ̄_s/γ̄_t for the mask. With x_t = k, a code:
    (α [j = k] + β) (ᾱ_s p_j / (ᾱ_t [j = k] + β̄_t) + β̄_s S), where S = (1 - p_k)/β̄_t + p_k/(ᾱ_t + β̄_t).

    Args:
        probs (float32 `(B, L, K)`): p(x_0), normalised.
        sample (int64 `(B, L)`): x_t.
        transition: between s and t.

    Returns:
        float32 `(B, L, K + 1)`, the mask last.
    """
    num_embeddings = probs.shape[-1]
    chain = transition.for_positions(sample.device)
    masked = sample == num_embeddings
    own = sample.clamp_max(num_embeddings - 1)[..., None]
    own_prob = probs.gather(-1, own).squeeze(-1)
    spread = 1 - own_prob + own_prob * chain.right_code_replaced  # S β̄_t
    scale = torch.where(masked, chain.mask_from_code, chain.code_from_other)
    floor = chain.beta_s * torch.where(masked, 1.0, spread)
    codes = scale[..., None] * (chain.alpha_s[..., None] * probs + floor[..., None])
    stays = own_prob * chain.code_stays_unreplaced + spread * chain.wrong_code_stays
    codes = codes.scatter(-1, own, torch.where(masked[..., None], codes.gather(-1, own), stays[..., None]))
    mask = torch.where(masked, chain.mask_stays, 0.0)
    return torch.cat([codes, mask[..., None]], dim=-1)


def posterior_kl(
    log_probs: torch.FloatTensor, originals: torch.LongTensor, sample: torch.LongTensor, transition: Transition
) -> torch.FloatTensor:
    """
    KL(q(x_s | x_t, x_0) || p(x_s | x_t)) in nats; -log p(x_0) where s is the data.

    The posterior given x_0 has one value at x_0, one at x_t, and one at all other codes, so that only the prediction
    needs a sum over codes, and that only where codes are replaced until s.

    Args:
        log_probs (float32 `(B, L, K)`): log p(x_0), normalised.
        originals, sample (int64 `(B, L)`): x_0 and x_t.
        transition: between s and t.

    Returns:
        float32 `(B, L)`.
    """
    num_embeddings, tiny = log_probs.shape[-1], torch.finfo(log_probs.dtype).tiny
    chain = transition.for_positions(sample.device)
    masked, same = sample == num_embeddings, sample == originals
    log_original = log_probs.gather(-1, originals[..., None]).squeeze(-1)
    log_own = log_probs.gather(-1, sample.clamp_max(num_embeddings - 1)[..., None]).squeeze(-1)
    # S β̄_t of `posterior_probs`, for the prediction and for certainty about x_0
    spread = torch.where(masked, 1.0, log_own.exp() * chain.right_code_replaced - log_own.expm1()).clamp_min(tiny)
    true_spread = torch.where(same, chain.right_code_replaced, 1.0)
    log_floor, true_floor = chain.beta_s.log() + spread.log(), chain.beta_s * true_spread
    scale = torch.where(masked, chain.mask_from_code, chain.code_from_other)

    # x_s = x_0, not x_t
    log_at_original = torch.logaddexp(chain.alpha_s.log() + log_original, log_floor)
    true = chain.alpha_s + true_floor
    at_original = torch.where(same, 0.0, scale * true * (true.log() - log_at_original))
    # x_s = x_t, a code
    true = torch.where(same, chain.right_code_stays, chain.wrong_code_stays)
    log_stays = torch.logaddexp(
        chain.code_stays_unreplaced.log() + log_own, chain.wrong_code_stays.log() + spread.log()
    )
    at_own = torch.where(masked, 0.0, torch.xlogy(true, true) - true * log_stays)
    if not (transition.beta_s > 0).any():
        return at_original + at_own
    # x_s = another code
    floor = (chain.beta_s * spread)[..., None]
    log_all = (chain.alpha_s[..., None] * log_probs.exp() + floor).clamp_min(tiny).log().sum(dim=-1)
    log_at_own = torch.logaddexp(chain.alpha_s.log() + log_own, log_floor)
    log_others = log_all - torch.where(same, 0.0, log_at_original) - torch.where(masked, 0.0, log_at_own)
    others = num_embeddings - 1 - (~masked & ~same).float()
    at_others = scale * (others * torch.xlogy(true_floor, true_floor) - true_floor * log_others)
    return at_original + at_own + torch.where(chain.beta_s > 0, at_others, 0.0)


__all__ = ["posterior_kl", "posterior_probs"]
