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

    Returns:
        float32 `(B, L, K + 1)`, the mask last.
    """
    num_embeddings = probs.shape[-1]
    per_sample = transition.for_samples(sample)
    masked = sample == num_embeddings
    own = sample.clamp_max(num_embeddings - 1)[..., None]
    own_prob = probs.gather(-1, own).squeeze(-1)
    beta_s = per_sample(transition.beta_s)
    spread = 1 - own_prob + own_prob * per_sample(transition.replaced_share)  # S β̄_t
    scale = torch.where(masked, per_sample(transition.mask_appears), per_sample(transition.code_appears))
    codes = torch.where(masked, beta_s, beta_s * spread)[..., None] + per_sample(transition.alpha_s)[..., None] * probs
    codes = codes * scale[..., None]
    kept = (transition.alpha + transition.beta) * transition.alpha_s / (transition.alpha_t + transition.beta_t)
    stays = per_sample(kept) * own_prob + per_sample(transition.replaced_code_stays) * spread
    codes = codes.scatter(-1, own, torch.where(masked[..., None], codes.gather(-1, own), stays[..., None]))
    mask = torch.where(masked, per_sample(transition.mask_stays), 0.0)
    return torch.cat([codes, mask[..., None]], dim=-1)


def posterior_kl(
    log_probs: torch.FloatTensor, originals: torch.LongTensor, sample: torch.LongTensor, transition: Transition
) -> torch.FloatTensor:
    """
    KL(q(x_s | x_t, x_0) || p(x_s | x_t)) in nats; -log p(x_0) where s is the data.

    The posterior given x_0 = i takes one value at code i, one at x_t, and one at all the other codes, so that only the
    prediction needs a sum over codes, and only where codes are replaced at s.

    Args:
        log_probs (float32 `(B, L, K)`): log p(x_0), normalised.
        originals, sample (int64 `(B, L)`): x_0 and x_t.

    Returns:
        float32 `(B, L)`.
    """
    num_embeddings = log_probs.shape[-1]
    tiny = torch.finfo(log_probs.dtype).tiny
    per_sample = transition.for_samples(sample)
    masked, same = sample == num_embeddings, sample == originals
    log_p0 = log_probs.gather(-1, originals[..., None]).squeeze(-1)
    log_own = log_probs.gather(-1, sample.clamp_max(num_embeddings - 1)[..., None]).squeeze(-1)
    share = per_sample(transition.replaced_share)
    # S β̄_t of `posterior_probs`, for the prediction and for certainty about x_0
    spread = torch.where(masked, 1.0, log_own.exp() * share - torch.expm1(log_own)).clamp_min(tiny)
    true_spread = torch.where(same, share, 1.0)
    alpha_s, beta_s = per_sample(transition.alpha_s), per_sample(transition.beta_s)
    log_floor = beta_s.log() + spread.log()
    floor = beta_s * true_spread
    scale = torch.where(masked, per_sample(transition.mask_appears), per_sample(transition.code_appears))

    # x_s = x_0, which is not x_t
    log_at_original = torch.logaddexp(alpha_s.log() + log_p0, log_floor)
    at_original = torch.where(same, 0.0, scale * (alpha_s + floor) * ((alpha_s + floor).log() - log_at_original))
    # x_s = x_t, a code
    kept = (transition.alpha + transition.beta) * transition.alpha_s / (transition.alpha_t + transition.beta_t)
    replaced = per_sample(transition.replaced_code_stays)
    stays = torch.where(same, per_sample(transition.clean_code_stays), replaced)
    log_stays = torch.logaddexp(per_sample(kept).log() + log_own, replaced.log() + spread.log())
    at_own = torch.where(masked, 0.0, torch.xlogy(stays, stays) - stays * log_stays)
    if not (transition.beta_s > 0).any():
        return at_original + at_own
    # the other codes
    floor_p = (beta_s * spread)[..., None]
    log_all = (alpha_s[..., None] * log_probs.exp() + floor_p).clamp_min(tiny).log().sum(dim=-1)
    log_at_own = torch.logaddexp(alpha_s.log() + log_own, log_floor)
    excluded = torch.where(same, 0.0, log_at_original) + torch.where(masked, 0.0, log_at_own)
    others = num_embeddings - 1 - (~masked & ~same).float()
    at_others = scale * (torch.xlogy(others * floor, floor) - floor * (log_all - excluded))
    return at_original + at_own + torch.where(beta_s > 0, at_others, 0.0)


__all__ = ["posterior_kl", "posterior_probs"]
