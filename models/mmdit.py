"""MMDiT with or without REG's class-token slot, for captions.

Two streams, image and text, with weights of their own and one joint attention (SD3, arXiv 2403.03206), in the size that
REPA trains on COCO (arXiv 2410.06940). The class token is token 0 of the image stream: the text stream has no output.

Shape letters: B batch, C latent channels, H W latent size, P patch, N = HW/P^2, T = tokens (1+N with a slot, else N),
L text states, D width, E encoder width.
"""

import re
from functools import partial

import torch
from torch import nn

from models import sit
from models.hub import HubNetwork


class MMDiT(nn.Module, HubNetwork):
    """The velocity network for captions; `cls_token_dim=None` removes the class-token slot, `z_dims=()` the projectors.

    All layers keep PyTorch's initialisation, the modulations and heads included.

    Args:
        input_size: latent height = width H; a multiple of `patch_size`.
        context_dim: width of the text encoder's states.
        encoder_depth: the block (counted from 1) whose output is projected.
        z_dims: encoder width E of each alignment target.
        cls_token_dim: encoder width E of the class token in the slot.
        qk_norm: normalise queries and keys by LayerNorm, in both streams.
    """

    def __init__(self, *, input_size: int, patch_size: int, in_channels: int, hidden_size: int, depth: int,
                 num_heads: int, context_dim: int, encoder_depth: int = 8, z_dims: tuple[int, ...] = (768,),
                 projector_dim: int = 2048, cls_token_dim: int | None = 768, qk_norm: bool = False):
        from diffusers.models.attention import JointTransformerBlock  # slow to import, and needed for captions only

        super().__init__()
        sit.require_possible(input_size, patch_size, z_dims, encoder_depth, depth)
        assert hidden_size % num_heads == 0, "the width must be a multiple of the number of heads"
        # What rebuilds this model; it travels in the checkpoint.
        self.config = dict(input_size=input_size, patch_size=patch_size, in_channels=in_channels,
                           hidden_size=hidden_size, depth=depth, num_heads=num_heads, context_dim=context_dim,
                           encoder_depth=encoder_depth, z_dims=tuple(z_dims), projector_dim=projector_dim,
                           cls_token_dim=cls_token_dim, qk_norm=qk_norm)
        self.in_channels, self.patch_size, self.input_size = in_channels, patch_size, input_size
        self.context_dim, self.cls_token_dim, self.encoder_depth = context_dim, cls_token_dim, encoder_depth
        self.checkpointing = False                                # activation checkpointing, set for training

        self.x_embedder = sit.PatchEmbedder(patch_size, in_channels, hidden_size)
        self.t_embedder = sit.TimestepEmbedder(hidden_size)
        self.context_embedder = nn.Linear(context_dim, hidden_size)
        if cls_token_dim is not None:
            self.cls_embedder = nn.Linear(cls_token_dim, hidden_size)
            self.cls_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        slot = torch.zeros(int(cls_token_dim is not None), hidden_size)                   # (1, D) or (0, D)
        table = sit.position_table(hidden_size, input_size // patch_size).to(slot.device)  # (N, D)
        self.pos_embed = nn.Parameter(torch.cat([slot, table])[None], requires_grad=False)                # (1, T, D)
        block = partial(JointTransformerBlock, hidden_size, num_heads, hidden_size // num_heads,
                        qk_norm="layer_norm" if qk_norm else None)
        # The last block's text stream gives only keys, queries and values: nothing reads its output.
        self.blocks = nn.ModuleList(block(context_pre_only=number == depth) for number in range(1, depth + 1))
        self.projectors = nn.ModuleList(sit.build_projector(hidden_size, projector_dim, z_dim) for z_dim in z_dims)
        self.final_layer = sit.FinalLayer(hidden_size, patch_size**2 * in_channels, cls_token_dim)

    def forward(self, x, t, context, cls_token=None):
        """The velocity of the pair (latents, class token) at time t.

        Args:
            x: noised latents (B, C, H, W).      t: times (B,) in [0, 1].
            context: text states (B, L, context_dim), all attended; those of the empty caption are the null condition.
            cls_token: noised class token (B, E); required with a slot, forbidden without.
        Returns:
            velocity (B, C, H, W), [projected tokens (B, T, E) per encoder], velocity of the class token (B, E) or None.
        """
        tokens = sit.embed_pair(self, x, cls_token)                                       # (B, T, D)
        text = self.context_embedder(context.to(self.context_embedder.weight.dtype))      # (B, L, D)
        time = self.t_embedder(t)                                                         # (B, D)

        projected = []
        for depth, block in enumerate(self.blocks, start=1):
            text, tokens = sit.run_block(block, tokens, text, time, keep=not self.checkpointing)  # (B, L, D), (B, T, D)
            if depth == self.encoder_depth:
                projected = [projector(tokens) for projector in self.projectors]          # (B, T, E) each
        velocity, cls_velocity = self.final_layer(tokens, time)                           # (B, N, P*P*C), (B, E)
        return sit.unpatchify(velocity, self.patch_size, self.in_channels), projected, cls_velocity


# "/2" is REPA's for COCO, 24 blocks of 24 heads; T is ours, for laptops.
MMDiT_models = {
    "MMDiT/2": partial(MMDiT, depth=24, hidden_size=768, num_heads=24, encoder_depth=8, patch_size=2),
    "MMDiT-T/2": partial(MMDiT, depth=4, hidden_size=128, num_heads=4, encoder_depth=4, patch_size=2),
}

# ------------------------------------------------------------------------------------------- names in released files

# Names in a block of REPA's and HASTE's files -> diffusers', of the image stream ("x_block") and of the text's; of the
# rows of qkv, three.
_RELEASED = {
    "adaLN_modulation.1": ("norm1.linear", "norm1_context.linear"),
    "attn.qkv": ("attn.to_q attn.to_k attn.to_v", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"),
    "attn.proj": ("attn.to_out.0", "attn.to_add_out"),
    "attn.ln_q": ("attn.norm_q", "attn.norm_added_q"),
    "attn.ln_k": ("attn.norm_k", "attn.norm_added_k"),
    "mlp.fc1": ("ff.net.0.proj", "ff_context.net.0.proj"),
    "mlp.fc2": ("ff.net.2", "ff_context.net.2"),
}


def rename_released(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a released MMDiT (`joint_blocks.*`) under our names; other names are kept.

    Queries, keys and values are split. In the last block, whose text stream has no output, the text's modulation is
    (shift, scale); diffusers' is (scale, shift).
    """
    found = {}
    for name, weight in weights.items():
        match = re.fullmatch(r"joint_blocks\.(\d+)\.(x|context)_block\.(.+)\.(weight|bias)", name)
        if match is None or match[3] not in _RELEASED or not weight.ndim:
            found[name] = weight
            continue
        number, stream, inside, kind = match.groups()
        ours = _RELEASED[inside][stream == "context"].split()
        if ours == ["norm1_context.linear"] and f"joint_blocks.{number}.context_block.mlp.fc1.weight" not in weights:
            weight = weight.roll(len(weight) // 2, 0)
        for part, rows in zip(ours, weight.chunk(len(ours)), strict=False):   # too few: load_weights names the absent
            found[f"blocks.{number}.{part}.{kind}"] = rows
    return found
