"""SiT with or without REG's class-token slot (arXiv 2507.01467, section 3).

Backbone: arXiv 2401.08740. Projectors: arXiv 2410.06940.

Shape letters: B batch, C latent channels, H W latent size, P patch, N = HW/P^2, T = tokens (1+N with a slot, else N),
D width, E encoder width.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.hub import HubNetwork
from runtime.messages import UserError

SINUSOID_WIDTH = 256         # of a time: 128 cosines, then 128 sines
MAX_PERIOD = 10_000


def position_table(width: int, side: int) -> torch.Tensor:
    """Fixed 2-D sine-cosine table (side * side, width): first half of the width for the column, second for the row."""
    assert width % 4 == 0, "a 2-D sine-cosine table needs a width divisible by 4"
    omega = MAX_PERIOD ** (-torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4))  # (D/4,)
    angle = torch.arange(side, dtype=torch.float64, device="cpu")[:, None] * omega                         # (side, D/4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)                                                    # (side, D/2)
    column = axis[None, :, :].expand(side, side, -1)
    row = axis[:, None, :].expand(side, side, -1)
    return torch.cat([column, row], dim=2).flatten(0, 1).float()                                                # (N, D)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x (B, T, D), shift and scale (B, D) -> x * (1 + scale) + shift."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PatchEmbedder(nn.Module):
    """Latents (B, C, H, W) -> tokens (B, N, D), row by row."""

    def __init__(self, patch_size: int, in_channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)                                    # (B, N, D)


class TimestepEmbedder(nn.Module):
    """t (B,) in [0, 1], unscaled -> (B, D), through a sinusoid in float32 and a two-layer MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOID_WIDTH, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        half = SINUSOID_WIDTH // 2
        omega = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angle = t.float()[:, None] * omega                                                # (B, 128)
        sinusoid = torch.cat([angle.cos(), angle.sin()], dim=1)                           # (B, 256)
        return self.mlp(sinusoid.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Labels (B,) -> (B, D). In training each becomes the null label, the last row, with probability `dropout_prob`."""

    def __init__(self, num_classes: int, width: int, dropout_prob: float):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, labels):
        if self.training and self.dropout_prob > 0:
            drop = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
            labels = torch.where(drop, self.num_classes, labels)
        return self.embedding_table(labels)


class Attention(nn.Module):
    """Multi-head self-attention. `fused` uses the backend's kernels; without it the same sums are written out."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool, fused: bool):
        super().__init__()
        assert width % num_heads == 0, "the width must be a multiple of the number of heads"
        self.num_heads = num_heads
        self.fused = fused
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // num_heads, eps=1e-5) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // num_heads, eps=1e-5) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        # (B, heads, T, D/heads) each
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)                     # (B, heads, T, T)
            x = weights.softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))                                    # (B, T, D)


class MLP(nn.Module):
    """D -> hidden -> D with GELU in its tanh form."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiTBlock(nn.Module):
    """Attention and MLP, each behind a norm that the condition modulates and gates (adaLN-Zero, arXiv 2212.09748)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, qk_norm: bool, fused_attn: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads, qk_norm, fused_attn)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, condition):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=1)  # (B, D) each
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))   # (B, T, D)
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """One modulated norm for all tokens, then a velocity head for the patches and one for the class token."""

    def __init__(self, width: int, patch_width: int, cls_token_dim: int | None):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, patch_width)
        self.linear_cls = None if cls_token_dim is None else nn.Linear(width, cls_token_dim)

    def forward(self, x, condition):
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        x = modulate(self.norm_final(x), shift, scale)                                    # (B, T, D)
        if self.linear_cls is None:
            return self.linear(x), None                                                   # (B, N, P*P*C), None
        return self.linear(x[:, 1:]), self.linear_cls(x[:, 0])                            # (B, N, P*P*C), (B, E)


def build_projector(width: int, projector_dim: int, z_dim: int) -> nn.Sequential:
    """REPA's three-layer projector, D -> projector_dim -> projector_dim -> E."""
    return nn.Sequential(nn.Linear(width, projector_dim), nn.SiLU(),
                         nn.Linear(projector_dim, projector_dim), nn.SiLU(),
                         nn.Linear(projector_dim, z_dim))


def unpatchify(tokens: torch.Tensor, patch: int, channels: int) -> torch.Tensor:
    """Tokens (B, N, P*P*C) -> latents (B, C, H, W); within a token the order is row, column, channel."""
    side = math.isqrt(tokens.shape[1])
    grid = tokens.view(-1, side, side, patch, patch, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, side * patch, side * patch)


def run_block(block: nn.Module, *inputs: torch.Tensor, keep: bool):
    """Run a block. Unless `keep`, keep only its inputs for the backward pass, which runs it again."""
    if keep or not torch.is_grad_enabled():
        return block(*inputs)
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)      # a block draws nothing


def embed_pair(network: nn.Module, x: torch.Tensor, cls_token: torch.Tensor | None) -> torch.Tensor:
    """Tokens (B, T, D) of the pair latents (B, C, H, W), class token (B, E), which comes first; with positions.

    Raises ValueError unless the class token is given to a network with a slot for it, and to no other.
    """
    if (cls_token is None) != (network.cls_token_dim is None):
        raise ValueError("a model with a class-token slot needs cls_token (cls_latents in the samplers), "
                         "a model without takes none")
    tokens = network.x_embedder(x)                                                        # (B, N, D)
    if cls_token is not None:
        slot = network.cls_norm(network.cls_embedder(cls_token)).unsqueeze(1)             # (B, 1, D)
        tokens = torch.cat([slot.to(tokens.dtype), tokens], dim=1)                        # (B, 1+N, D)
    return tokens + network.pos_embed                                                     # (B, T, D)


def require_possible(input_size: int, patch_size: int, z_dims: tuple[int, ...], encoder_depth: int, depth: int) -> None:
    """Raise UserError for latents that cannot be cut into patches, and for a projected block that does not exist."""
    if input_size % patch_size:
        raise UserError(f"latents of {input_size}x{input_size} cannot be cut into patches of "
                        f"{patch_size}: use a smaller patch")
    if z_dims and not 1 <= encoder_depth <= depth:
        raise UserError(f"encoder_depth is {encoder_depth}, but the model has {depth} blocks: use 1 to {depth}")


class SiT(nn.Module, HubNetwork):
    """The velocity network of REG; `cls_token_dim=None` removes the class-token slot, `z_dims=()` the projectors.

    Args:
        input_size: latent height = width H; a multiple of `patch_size`.
        encoder_depth: the block (counted from 1) whose output is projected.
        class_dropout_prob: share of labels replaced by the null label (`num_classes`) in training.
        z_dims: encoder width E of each alignment target.
        cls_token_dim: encoder width E of the class token in the slot.
    """

    def __init__(self, *, input_size: int, patch_size: int, in_channels: int, hidden_size: int, depth: int,
                 num_heads: int, mlp_ratio: float = 4.0, encoder_depth: int = 8, class_dropout_prob: float = 0.1,
                 num_classes: int = 1000, z_dims: tuple[int, ...] = (768,), projector_dim: int = 2048,
                 cls_token_dim: int | None = 768, qk_norm: bool = False, fused_attn: bool = True):
        super().__init__()
        require_possible(input_size, patch_size, z_dims, encoder_depth, depth)
        # What rebuilds this model; it travels in the checkpoint.
        self.config = dict(input_size=input_size, patch_size=patch_size, in_channels=in_channels,
                           hidden_size=hidden_size, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio,
                           encoder_depth=encoder_depth, class_dropout_prob=class_dropout_prob, num_classes=num_classes,
                           z_dims=tuple(z_dims), projector_dim=projector_dim, cls_token_dim=cls_token_dim,
                           qk_norm=qk_norm, fused_attn=fused_attn)
        self.in_channels, self.patch_size, self.input_size = in_channels, patch_size, input_size
        self.num_classes = num_classes                                                    # also the null label
        self.cls_token_dim = cls_token_dim
        self.encoder_depth = encoder_depth
        self.checkpointing = False                                # activation checkpointing, set for training

        self.x_embedder = PatchEmbedder(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        if cls_token_dim is not None:
            self.cls_embedder = nn.Linear(cls_token_dim, hidden_size)
            self.cls_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        tokens = (input_size // patch_size) ** 2 + (cls_token_dim is not None)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(SiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm, fused_attn)
                                    for _ in range(depth))
        self.projectors = nn.ModuleList(build_projector(hidden_size, projector_dim, z_dim) for z_dim in z_dims)
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels, cls_token_dim)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Initialise as DiT: Xavier linears, zero biases, zero gates and heads (every block starts as the identity)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        proj = self.x_embedder.proj
        nn.init.xavier_uniform_(proj.weight.data.view(proj.weight.shape[0], -1))  # as the linear layer that it is
        nn.init.zeros_(proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        heads = [self.final_layer.linear] + ([] if self.cls_token_dim is None else [self.final_layer.linear_cls])
        modulations = [part.adaLN_modulation[1] for part in (*self.blocks, self.final_layer)]
        for layer in [*modulations, *heads]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            table = position_table(self.pos_embed.shape[-1], self.input_size // self.patch_size)
            self.pos_embed[0, -len(table):] = table.to(self.pos_embed.device)             # a slot, token 0, keeps zero

    def forward(self, x, t, y, cls_token=None):
        """The velocity of the pair (latents, class token) at time t.

        Args:
            x: noised latents (B, C, H, W).      t: times (B,) in [0, 1].      y: labels (B,), `num_classes` = null
            label.
            cls_token: noised class token (B, E); required with a slot, forbidden without.
        Returns:
            velocity (B, C, H, W), [projected tokens (B, T, E) per encoder], velocity of the class token (B, E) or None.
        """
        tokens = embed_pair(self, x, cls_token)                                           # (B, T, D)
        condition = self.t_embedder(t) + self.y_embedder(y)                               # (B, D)

        projected = []
        for depth, block in enumerate(self.blocks, start=1):
            tokens = run_block(block, tokens, condition, keep=not self.checkpointing)     # (B, T, D)
            if depth == self.encoder_depth:
                projected = [projector(tokens) for projector in self.projectors]          # (B, T, E) each
        velocity, cls_velocity = self.final_layer(tokens, condition)                      # (B, N, P*P*C), (B, E)
        return unpatchify(velocity, self.patch_size, self.in_channels), projected, cls_velocity


# depth, width, heads, and the block after which REPA and REG align (their `--encoder-depth`). T is ours, for laptops.
SIZES = {
    "T": (6, 128, 4, 4),
    "S": (12, 384, 6, 4),
    "B": (12, 768, 12, 4),
    "L": (24, 1024, 16, 8),
    "XL": (28, 1152, 16, 8),
}
SiT_models = {
    f"SiT-{size}/{patch}": partial(SiT, depth=depth, hidden_size=width, num_heads=heads, encoder_depth=encoder_depth,
                                   patch_size=patch)
    for size, (depth, width, heads, encoder_depth) in SIZES.items()
    for patch in (1, 2, 4, 8)
}
