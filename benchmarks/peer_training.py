"""Training steps beside the plain ones of diffusers' script, rosinality's code, the original VQ-Diffusion and others'
quantizers.

The peers' arithmetic is written out here for the same networks (of VQGAN and VQ-Diffusion with the same weights, of
PixelSNAIL with the same sizes).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


LUCIDRAINS = "vector-quantize-pytorch"


def optimizer_step(loss: torch.Tensor, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------------------------------------------------------
# VQGAN: an update of the tokenizer and one of the discriminator
# ---------------------------------------------------------------------------------------------------------------------


def vqgan_steps(quick: bool, batch: int) -> tuple[Callable, Callable]:
    """Ours, from one reconstruction; and diffusers' two steps, each from its own, with two passes of the critic.

    Without a perceptual network, which would be the same for both.
    """
    from hf_vq import VQGANConfig, VQGANModel
    from hf_vq.training.objectives.discriminator import PatchDiscriminator
    from hf_vq.training.objectives.vqgan_loss import VQGANLoss

    size = {"base_channels": 32, "resolution": 32} if quick else {"base_channels": 32, "resolution": 64}
    config = VQGANConfig(
        **size,
        channel_multiplier=(1, 2) if quick else (1, 2, 2),
        attn_resolutions=(16,),
        num_embeddings=1024,
        quantizer="vq",
        latent_channels=64,
        embed_dim=64,
    )
    models = [VQGANModel(config).train() for _ in range(2)]
    critics = [PatchDiscriminator(num_layers=2 if quick else 3).train() for _ in range(2)]
    for pair in (models, critics):
        pair[1].load_state_dict(pair[0].state_dict())
    images = torch.rand(batch, 3, config.resolution, config.resolution) * 2 - 1
    layout = torch.channels_last if images.is_cuda else torch.contiguous_format  # as the script has it
    models[0].to(memory_format=layout)
    optimizers = [[torch.optim.Adam(module.parameters(), lr=1e-5) for module in pair] for pair in (models, critics)]
    losses = VQGANLoss(None, disc_start=0)

    def ours():
        model, critic = models[0], critics[0]
        pixels = images.contiguous(memory_format=layout)
        output = model(pixels)
        loss, _ = losses.generator_loss(
            pixels, output.sample, output.quantizer_loss, model.get_last_layer(), 0, None, critic
        )
        optimizer_step(loss, list(model.parameters()), optimizers[0][0])
        d_loss, _ = losses.discriminator_loss(pixels, output.sample, 0, None, critic)
        optimizer_step(d_loss, list(critic.parameters()), optimizers[1][0])

    def gradient_norm(loss, weight):
        return torch.autograd.grad(loss, weight, retain_graph=True)[0].norm(p=2)

    def theirs():
        model, critic = models[1], critics[1]
        output = model(images)
        loss = F.l1_loss(output.sample, images)
        adversarial = -critic(output.sample).mean()
        weight = model.get_last_layer()
        adaptive = gradient_norm(loss, weight) / gradient_norm(adversarial, weight).clamp(min=1e-8)
        loss = loss + output.quantizer_loss + adaptive.clamp(max=1e4).detach() * adversarial
        optimizer_step(loss, list(model.parameters()), optimizers[0][1])
        optimizers[1][1].zero_grad(set_to_none=True)
        fake = model(images).sample.detach()
        d_loss = (F.relu(1 - critic(images)) + F.relu(1 + critic(fake))).mean()
        optimizer_step(d_loss, list(critic.parameters()), optimizers[1][1])

    return ours, theirs


# ---------------------------------------------------------------------------------------------------------------------
# VQ-Diffusion
# ---------------------------------------------------------------------------------------------------------------------


class DenseChain:
    """The chain over log-probabilities of all K + 1 states at every position, `(B, K + 1, N)`, as the original's."""

    def __init__(self, num_codes: int, timesteps: int = 100):
        self.num_codes, self.timesteps = num_codes, timesteps
        kept = torch.linspace(0.99999, 0.000009, timesteps, dtype=torch.float64)
        masked = torch.linspace(0.000009, 0.99999, timesteps, dtype=torch.float64)

        def per_step(values, first):
            return torch.cat([values.new_tensor([first]), values])

        kept, unmasked = per_step(kept, 1.0), per_step(1 - masked, 1.0)
        at, ct = kept[1:] / kept[:-1], 1 - unmasked[1:] / unmasked[:-1]
        self.step = self._logs(at, ct)
        self.total = self._logs(kept[1:], 1 - unmasked[1:])

    def _logs(self, stay, mask):
        uniform = ((1 - stay - mask) / self.num_codes).clamp(min=1e-30)
        return [values.clamp(min=1e-30).log().float() for values in (stay, uniform, mask, 1 - mask)]

    def log_onehot(self, indices):
        return F.one_hot(indices, self.num_codes + 1).transpose(1, 2).float().clamp(min=1e-30).log()

    def forward_probabilities(self, log_x, t, table):
        stay, uniform, mask, unmasked = (values[t][:, None, None] for values in table)
        codes = torch.logaddexp(log_x[:, :-1] + stay, uniform)
        return torch.cat([codes, torch.logaddexp(log_x[:, -1:] + unmasked, mask)], dim=1)

    def noised(self, indices, t):
        log_probabilities = self.forward_probabilities(self.log_onehot(indices), t, self.total)
        uniform = torch.rand_like(log_probabilities)
        return (log_probabilities - (-(uniform + 1e-30).log() + 1e-30).log()).argmax(dim=1)

    def posterior(self, log_start, indices, t):
        """log q(x_{t-1} | x_t, x_0), averaged over `log_start` `(B, K + 1, N)`."""
        log_x = self.log_onehot(indices)
        is_mask = (indices == self.num_codes)[:, None]
        of_total, of_step = (
            torch.where(is_mask, table[2][t][:, None, None], self.forward_probabilities(log_x, t, table)[:, :-1])
            for table in (self.total, self.step)
        )
        floor = torch.full_like(log_x[:, -1:], -70.0)
        of_step = torch.cat([of_step, torch.where(is_mask, 0.0, floor)], dim=1)
        quotient = torch.cat([log_start[:, :-1] - of_total, floor], dim=1)
        norm = quotient.logsumexp(dim=1, keepdim=True)
        before = self.forward_probabilities(quotient - norm, (t - 1).clamp(min=0), self.total)
        before = torch.where((t == 0)[:, None, None], quotient - norm, before)
        return (before + of_step + norm).clamp(-70, 0)

    def loss(self, log_prediction, original, noised, t):
        """The bound's term, or at t = 0 the likelihood, with the auxiliary loss."""
        floor = torch.full_like(log_prediction[:, :1], -70.0)
        predicted = torch.cat([log_prediction, floor], dim=1).clamp(-70, 0)
        exact, start = (
            self.posterior(self.log_onehot(original), noised, t),
            self.log_onehot(original),
        )
        model = self.posterior(predicted, noised, t)
        divergence = (exact.exp() * (exact - model)).sum(dim=1)
        likelihood = -(start.exp() * model).sum(dim=1)
        bound = torch.where((t == 0)[:, None], likelihood, divergence).sum(dim=1)
        auxiliary = (start[:, :-1].exp() * (start[:, :-1] - predicted[:, :-1])).sum(dim=(1, 2))
        weight = 5e-4 * (2 - t / self.timesteps)
        return self.timesteps * (bound + weight * auxiliary).sum() / original.numel()


def vq_diffusion_transformer(num_codes: int, side: int, layers: int) -> nn.Module:
    """diffusers' denoiser of codes, 256 wide, over texts of width 64."""
    from diffusers import Transformer2DModel

    return Transformer2DModel(
        num_attention_heads=8,
        attention_head_dim=32,
        num_layers=layers,
        cross_attention_dim=64,
        attention_bias=True,
        sample_size=side,
        num_vector_embeds=num_codes + 1,
        activation_fn="geglu-approximate",
        num_embeds_ada_norm=100,
        norm_type="ada_norm",
    )


def vq_diffusion_steps(quick: bool, batch: int) -> tuple[Callable, Callable]:
    """The transformer of diffusers with the dense chain, and ours with the same weights."""
    from hf_vq import MaskReplaceScheduler
    from hf_vq.pipelines.vq_diffusion_from_diffusers import convert_transformer
    from hf_vq.training.objectives.mask_replace_objective import MaskReplaceObjective

    num_codes, side, layers = (64, 4, 2) if quick else (2048, 16, 6)
    peer = vq_diffusion_transformer(num_codes, side, layers).train()
    model = convert_transformer(peer, text_length=16).train()
    optimizers = [torch.optim.AdamW(network.parameters(), lr=1e-5) for network in (model, peer)]
    scheduler, chain = MaskReplaceScheduler(num_codes), DenseChain(num_codes)
    objective = MaskReplaceObjective(scheduler)
    codes, text = torch.randint(num_codes, (batch, side, side)), torch.randn(batch, 16, 64)
    timesteps = torch.full((batch,), 50)  # diffusers' network takes one for the whole batch
    probabilities = torch.full((batch,), 0.01)

    def ours():
        noised = scheduler.add_noise(codes, timesteps)
        output = model(noised, timesteps, encoder_hidden_states=text).sample
        loss = objective(output, codes, noised, timesteps, probabilities).loss
        optimizer_step(loss, list(model.parameters()), optimizers[0])

    def theirs():
        flat = codes.flatten(1)
        noised = chain.noised(flat, timesteps)
        output = peer(noised, encoder_hidden_states=text, timestep=timesteps[0], return_dict=False)[0]
        optimizer_step(chain.loss(output, flat, noised, timesteps), list(peer.parameters()), optimizers[1])

    return ours, theirs


# ---------------------------------------------------------------------------------------------------------------------
# PixelSNAIL
# ---------------------------------------------------------------------------------------------------------------------


def normed_conv(in_channels: int, out_channels: int, kernel: tuple[int, int] | int, **options: int) -> nn.Conv2d:
    return weight_norm(nn.Conv2d(in_channels, out_channels, kernel, **options))


class MaskedConv(nn.Module):
    """A window that ends with the position, whose own tap is set to zero before every use."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int):
        super().__init__()
        self.half, self.kernel = kernel // 2, kernel
        self.conv = normed_conv(in_channels, out_channels, kernel)

    def forward(self, features):
        self.conv.parametrizations.weight.original1.data[:, :, -1, self.half :].zero_()
        return self.conv(F.pad(features, (self.half, self.half, self.kernel - 1, 0)))


class PlainGatedBlock(nn.Module):
    def __init__(self, channels: int, inner: int, conv: Callable, dropout: float, auxiliary: int = 0):
        super().__init__()
        self.conv1, self.conv2, self.dropout = conv(channels, inner), conv(inner, 2 * channels), nn.Dropout(dropout)
        self.auxiliary = normed_conv(auxiliary, inner, 1) if auxiliary else None

    def forward(self, features, auxiliary=None):
        hidden = self.conv1(F.elu(features))
        if auxiliary is not None:
            hidden = hidden + self.auxiliary(F.elu(auxiliary))
        return features + F.glu(self.conv2(self.dropout(F.elu(hidden))), dim=1)


class PlainAttention(nn.Module):
    """All scores at once, the later ones overwritten, and the first position's result set to zero."""

    def __init__(self, query_channels: int, key_channels: int, channels: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.query, self.key, self.value = (
            weight_norm(nn.Linear(width, channels)) for width in (query_channels, key_channels, key_channels)
        )

    def forward(self, queries, memory):
        size, length = queries.shape, queries.shape[-2] * queries.shape[-1]
        query, key, value = (
            layer(inputs.flatten(2).transpose(1, 2)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, inputs in ((self.query, queries), (self.key, memory), (self.value, memory))
        )
        seen = torch.ones(length, length, device=queries.device).tril(-1)
        scores = (query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])).masked_fill(seen == 0, -1e4)
        weights = scores.softmax(dim=3) * (torch.arange(length, device=queries.device) > 0).float()[:, None]
        return (self.dropout(weights) @ value).transpose(2, 3).reshape(size[0], -1, *size[2:])


class PlainPixelSNAIL(nn.Module):
    """Of the sizes of a `PixelSNAILConfig`, over one-hot codes, channels first."""

    def __init__(self, config):
        super().__init__()
        width, kernel, self.num_codes = config.hidden_size, config.kernel_size, config.codebook_size
        half, dropout = kernel // 2, config.dropout
        self.kernel = kernel
        self.above = normed_conv(self.num_codes, width, (half, kernel), padding=0)
        self.left = normed_conv(self.num_codes, width, ((kernel + 1) // 2, half), padding=0)

        def causal(c_in, c_out):
            return MaskedConv(c_in, c_out, kernel)

        def pointwise(c_in, c_out):
            return normed_conv(c_in, c_out, 1)

        self.blocks = nn.ModuleList()
        for _ in range(config.num_blocks):
            block = nn.Module()
            block.residual = nn.ModuleList(
                PlainGatedBlock(width, config.res_channels, causal, dropout) for _ in range(config.num_res_blocks)
            )
            block.key = PlainGatedBlock(2 * width + 2, width, pointwise, dropout)
            block.query = PlainGatedBlock(width + 2, width, pointwise, dropout)
            block.attention = PlainAttention(width + 2, 2 * width + 2, width // 2, config.num_attention_heads, dropout)
            block.out = PlainGatedBlock(width, width, pointwise, dropout, auxiliary=width // 2)
            self.blocks.append(block)
        self.head = normed_conv(width, self.num_codes, 1)
        rows, columns = config.grid_size
        grid = torch.meshgrid(torch.arange(rows) / rows - 0.5, torch.arange(columns) / columns - 0.5, indexing="ij")
        self.register_buffer("positions", torch.stack(grid)[None])

    def forward(self, codes):
        onehot = F.one_hot(codes, self.num_codes).permute(0, 3, 1, 2).float()
        half, height, width = self.kernel // 2, *codes.shape[1:]
        above = self.above(F.pad(onehot, (half, half, half, 0)))[:, :, :height]
        left = self.left(F.pad(onehot, (half, 0, (self.kernel + 1) // 2 - 1, 0)))[:, :, :, :width]
        hidden = above + left
        positions = self.positions.expand(len(codes), -1, -1, -1)
        for block in self.blocks:
            start = hidden
            for layer in block.residual:
                hidden = layer(hidden)
            key = block.key(torch.cat([start, hidden, positions], dim=1))
            query = block.query(torch.cat([hidden, positions], dim=1))
            hidden = block.out(hidden, block.attention(query, key))
        return self.head(F.elu(hidden))


def pixelsnail_steps(quick: bool, batch: int) -> tuple[Callable, Callable]:
    from hf_vq import PixelSNAILConfig, PixelSNAILForCausalLM

    size = {"num_blocks": 1, "num_res_blocks": 1, "hidden_size": 32, "grid_size": 4} if quick else {}
    size = size or {"num_blocks": 3, "num_res_blocks": 4, "hidden_size": 128, "grid_size": 32}
    config = PixelSNAILConfig(codebook_size=512, res_channels=size["hidden_size"], **size)
    model, peer = PixelSNAILForCausalLM(config).train(), PlainPixelSNAIL(config).train()
    optimizers = [torch.optim.Adam(network.parameters(), lr=1e-4) for network in (model, peer)]
    codes = torch.randint(512, (batch, *config.grid_size))

    def ours():
        optimizer_step(model(**model.prepare_inputs(codes)).loss, list(model.parameters()), optimizers[0])

    def theirs():
        optimizer_step(F.cross_entropy(peer(codes), codes), list(peer.parameters()), optimizers[1])

    return ours, theirs


# ---------------------------------------------------------------------------------------------------------------------
# Quantizers
# ---------------------------------------------------------------------------------------------------------------------


class TamingQuantizer(nn.Module):
    """The original VQGAN's arithmetic: the distances of all latents to all codes at once."""

    def __init__(self, num_codes: int, channels: int):
        super().__init__()
        self.embedding = nn.Embedding(num_codes, channels)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        moved = latents.permute(0, 2, 3, 1).contiguous()
        flat, codes = moved.view(-1, latents.shape[1]), self.embedding.weight
        distances = flat.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * flat @ codes.t()
        indices = distances.argmin(dim=1)
        quantized = self.embedding(indices).view(moved.shape)
        loss = 0.25 * (quantized.detach() - moved).square().mean() + (quantized - moved.detach()).square().mean()
        quantized = moved + (quantized - moved).detach()
        return quantized.permute(0, 3, 1, 2).contiguous(), loss, indices


def quantizer_steps(peer: str, num_codes: int, num_latents: int, channels: int = 256) -> tuple[Callable, Callable]:
    """Forward and backward of ours and of `peer`: "taming", "diffusers" or `LUCIDRAINS`. Both give the indices."""
    from hf_vq import EMAVectorQuantizer, VectorQuantizer

    latents = torch.randn(num_latents // 64, channels, 8, 8, requires_grad=True)

    def step(module: nn.Module, call: Callable) -> torch.Tensor:
        quantized, loss, indices = call(latents)
        torch.autograd.backward([quantized, loss.sum()], [torch.ones_like(quantized), None])
        latents.grad = None
        module.zero_grad(set_to_none=True)
        return indices.flatten()

    if peer == LUCIDRAINS:
        from vector_quantize_pytorch import VectorQuantize

        ours = EMAVectorQuantizer(num_codes, channels, kmeans_init=False)
        theirs = VectorQuantize(
            dim=channels,
            codebook_size=num_codes,
            decay=0.99,
            threshold_ema_dead_code=2,
            rotation_trick=False,
            accept_image_fmap=True,
        )

        def their_call(z: torch.Tensor):
            quantized, indices, loss = theirs(z)
            return quantized, loss, indices

    else:
        ours = VectorQuantizer(num_codes, channels)
        if peer == "taming":
            theirs = their_call = TamingQuantizer(num_codes, channels)
        else:
            from diffusers.models.autoencoders.vae import VectorQuantizer as Theirs

            theirs = Theirs(num_codes, channels, beta=0.25, legacy=False)

            def their_call(z: torch.Tensor):
                quantized, loss, (_, _, indices) = theirs(z)
                return quantized, loss, indices

        theirs.embedding.load_state_dict(ours.embedding.state_dict())

    def our_call(z: torch.Tensor):
        output = ours(z)
        return output.quantized, output.loss, output.indices

    return lambda: step(ours.train(), our_call), lambda: step(theirs.train(), their_call)
