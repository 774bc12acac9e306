"""DiTDH: a diffusion transformer with a wide head, in the layout of the published checkpoints.

Paper: arXiv 2511.13019 uses it unchanged as teacher and student; the wide "DDT head" comes from RAE, arXiv 2510.11690.
A narrow, deep encoder reads the noisy latent and distils it into one condition vector per token; a shallow head, at
least as wide as the latent has channels, reads the same latent again and writes the velocity, token by token.

    teacher  DiTDH(...)(z, t, y)                             velocity v(z, t)
    student  DiTDH(..., average_velocity=True)(z, t, y, r)   average velocity u(z, t, r), one more embedding: of t - r

    python dit.py       # parameters and multiply-accumulates of every size at every resolution

Shapes: B images, C latent channels, G x G = N tokens, D width (of the encoder or of the head), K heads, F = 8/3 D hidden
units. Modules and weights have the names that they have in the published checkpoints.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# (encoder, head). "toy" is ours; the rest are the published sizes.
MODELS = {
    "toy": dict(hidden_size=(128, 128), depth=(4, 2), num_heads=(4, 4)),
    "S": dict(hidden_size=(384, 2048), depth=(12, 2), num_heads=(6, 16)),
    "B": dict(hidden_size=(768, 2048), depth=(12, 2), num_heads=(12, 16)),
    "XL": dict(hidden_size=(1152, 2048), depth=(28, 2), num_heads=(16, 16)),
}


# ----------------------------------------------------------------------------------------------------------------------
# Where a token is: fixed sin-cos positions added once, and rotations of queries and keys in every attention

def sincos_positions(dim, grid):
    """Fixed 2-D sin-cos positions (N, dim): first half of the channels for the column, second half for the row."""
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(grid).double(), torch.arange(grid).double(), indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in (column, row)]                    # 2 x (N, dim / 4)
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()     # (N, dim)


class RotaryPositions(nn.Module):
    """2-D rotary positions: channel pairs (2i, 2i + 1) of a head turn by row (first half) or by column (second half)."""

    def __init__(self, head_dim, grid):
        super().__init__()
        frequency = 10000.0 ** (-torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))
        angle = (torch.arange(grid).float()[:, None] * frequency).repeat_interleave(2, dim=1)   # (G, head_dim / 2)
        angle = torch.cat([angle[:, None].expand(grid, grid, -1), angle[None].expand(grid, grid, -1)], dim=2)   # (G, G, head_dim)
        self.register_buffer("freqs_cos", angle.cos().flatten(0, 1))                            # (N, head_dim)
        self.register_buffer("freqs_sin", angle.sin().flatten(0, 1))

    def forward(self, x):
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)                                         # 2 x (..., N, D / K / 2)
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)                                  # (..., N, D / K)
        return (x * self.freqs_cos + turned * self.freqs_sin).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# What the condition is: time, time gap and class

class TimeEmbedding(nn.Module):
    """Gaussian Fourier features of a time in [0, 1], then two linear layers: (B,) -> (B, D)."""

    def __init__(self, hidden_size):
        super().__init__()
        self.register_buffer("W", torch.randn(256))  # frequencies, drawn once, never trained, saved with the weights
        self.mlp = nn.Sequential(nn.Linear(2 * 256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t):
        angle = 2 * torch.pi * t[:, None] * self.W                                              # (B, 256)
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=1).to(self.mlp[0].weight.dtype))


class ClassEmbedding(nn.Module):
    """One vector per class and a last one for "no class": whoever drops labels passes num_classes as the label."""

    def __init__(self, num_classes, hidden_size):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y):
        return self.embedding_table(y)                                                          # (B,) -> (B, D)


# ----------------------------------------------------------------------------------------------------------------------
# The block

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2)) times a weight a channel: (..., D) -> (..., D)."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Every token looks at every token: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, rotary):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)          # (3, B, K, N, D / K)
        q, k = rotary(qkv[:2])                                                                  # 2 x (B, K, N, D / K)
        x = F.scaled_dot_product_attention(q, k, qkv[2])                                        # (B, K, N, D / K)
        return self.proj(x.transpose(1, 2).flatten(2))                                          # (B, N, D)


class SwiGLU(nn.Module):
    """Two layers whose hidden units are gated: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)                                              # 2 x (B, N, F)
        return self.w3(F.silu(gate) * value)                                                    # (B, N, D)


def modulate(x, shift, scale):
    """x (B, N, D); shift and scale (B, 1, D) or (B, N, D)."""
    return x.to(scale.dtype) * (1 + scale) + shift


class Block(nn.Module):
    """Attention and SwiGLU, each shifted, scaled and gated by the condition c: (B, 1, D) for all tokens, or (B, N, D)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.mlp = SwiGLU(dim, int(2 / 3 * 4 * dim))  # three matrices that cost what the usual two of 4 D would
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, rotary):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)    # 6 x (B, 1 or N, D)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rotary)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """From the head's width to latent channels, again shifted and scaled by the condition."""

    def __init__(self, dim, out_channels):
        super().__init__()
        self.norm_final = RMSNorm(dim)
        self.linear = nn.Linear(dim, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))                          # (B, N, D) -> (B, N, C)


class PatchEmbedding(nn.Module):
    """A linear map of each latent pixel; a 1 x 1 convolution only because the published weights have its shape."""

    def __init__(self, in_channels, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, 1)

    def forward(self, z):
        return F.linear(z.flatten(2).transpose(1, 2), self.proj.weight.flatten(1), self.proj.bias)  # (B, C, G, G) -> (B, N, D)


def run_block(block, *inputs, checkpointing=False):
    """block(*inputs). With checkpointing its activations are not kept for the backward pass but computed again there."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)


# ----------------------------------------------------------------------------------------------------------------------
# The network

class DiTDH(nn.Module):
    """Velocity v(z, t, y), or with average_velocity=True the average velocity u(z, t, y, r) over [r, t].

    input_size: latent grid side. hidden_size, depth, num_heads: (encoder, head). class_std, time_std: standard
    deviations of the initial class table and time MLP; the published recipe has 0.02 for both, time_std None means Xavier.
    """
    checkpointing = False  # True: blocks' activations are computed twice instead of kept

    def __init__(self, input_size, in_channels, hidden_size, depth, num_heads, num_classes, average_velocity=False,
                 class_std=0.02, time_std=0.02):
        super().__init__()
        width, head_width = hidden_size
        self.input_size, self.in_channels, self.num_classes = input_size, in_channels, num_classes
        self.num_encoder_blocks = depth[0]
        self.register_buffer("pos_embed", sincos_positions(width, input_size)[None])            # (1, N, D)
        self.x_embedder = PatchEmbedding(in_channels, head_width)
        self.s_embedder = PatchEmbedding(in_channels, width)
        self.s_projector = nn.Linear(width, head_width) if width != head_width else nn.Identity()
        self.t_embedder = TimeEmbedding(width)
        self.r_embedder = TimeEmbedding(width) if average_velocity else None
        self.y_embedder = ClassEmbedding(num_classes, width)
        self.enc_feat_rope = RotaryPositions(width // num_heads[0], input_size)
        self.dec_feat_rope = RotaryPositions(head_width // num_heads[1], input_size)
        self.blocks = nn.ModuleList([Block(width, num_heads[0]) for _ in range(depth[0])]
                                    + [Block(head_width, num_heads[1]) for _ in range(depth[1])])
        self.final_layer = FinalLayer(head_width, in_channels)
        self.initialize_weights(class_std, time_std)

    @torch.no_grad()
    def initialize_weights(self, class_std, time_std):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=class_std)
        if time_std is not None:
            for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
                nn.init.normal_(layer.weight, std=time_std)
        # Each block starts as the identity and the network as zero.
        for module in [*(b.adaLN_modulation[1] for b in self.blocks), self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(module.weight)
        # The time gap starts without effect: u(z, t, r) = v(z, t), so a student can take its teacher's weights as they are.
        if self.r_embedder is not None:
            nn.init.zeros_(self.r_embedder.mlp[2].weight)

    def forward(self, z, t, y, r=None):
        """z (B, C, G, G), times t and r (B,) in [0, 1] with r <= t, labels y (B,) in 0..num_classes -> (B, C, G, G)."""
        time = self.t_embedder(t)                                                               # (B, D)
        if self.r_embedder is not None:
            time = time + self.r_embedder(t - r)
        c = F.silu(time + self.y_embedder(y))[:, None]                                          # (B, 1, D); SiLU once more in each block
        encoder, head = self.blocks[:self.num_encoder_blocks], self.blocks[self.num_encoder_blocks:]

        s = self.s_embedder(z) + self.pos_embed                                                 # (B, N, D)
        for block in encoder:
            s = run_block(block, s, c, self.enc_feat_rope, checkpointing=self.checkpointing)
        s = self.s_projector(F.silu(s + time[:, None]))                                         # (B, N, D of the head)

        x = self.x_embedder(z)                                                                  # (B, N, D of the head)
        for block in head:
            x = run_block(block, x, s, self.dec_feat_rope, checkpointing=self.checkpointing)
        x = self.final_layer(x, s)                                                              # (B, N, C)
        return x.transpose(1, 2).unflatten(2, z.shape[2:])                                      # (B, C, G, G)


def infer_config(state):
    """The arguments of DiTDH that a state dict in the published layout was made with, read off its shapes."""
    width, head_width = len(state["s_embedder.proj.bias"]), len(state["x_embedder.proj.bias"])
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})  # a count: a number in a key may be any
    head_depth = 2  # of all sizes here; where the head is wider than the encoder, its blocks can be counted
    if width != head_width:
        head_depth = sum(len(state[f"blocks.{i}.norm1.weight"]) == head_width for i in range(depth))
    return dict(input_size=round(state["pos_embed"].shape[1] ** 0.5), in_channels=state["x_embedder.proj.weight"].shape[1],
                hidden_size=(width, head_width), depth=(depth - head_depth, head_depth),
                num_heads=(width // state["enc_feat_rope.freqs_cos"].shape[1], head_width // state["dec_feat_rope.freqs_cos"].shape[1]),
                num_classes=len(state["y_embedder.embedding_table.weight"]) - 1, average_velocity="r_embedder.W" in state)


def count(model, *inputs):
    """(parameters, multiply-accumulates) of one call; meta tensors will do. Counts every matrix product, attention's
    two included; leaves out element-wise work, norms and look-ups."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


if __name__ == "__main__":
    import argparse
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()     # --help alone
    print("average-velocity network; MACs of one evaluation of one image, all matrix products counted\n")
    print(f"{'model':6} {'image':>5} {'latent':>11} {'parameters':>11} {'GMACs':>7}")
    with torch.device("meta"):
        for name, grid, channels, image in [("toy", 4, 96, 32)] + [(n, g, 768, 16 * g) for g in (16, 32) for n in ("S", "B", "XL")]:
            model = DiTDH(input_size=grid, in_channels=channels, num_classes=1000, average_velocity=True, **MODELS[name])
            t = torch.ones(1)
            parameters, macs = count(model, torch.empty(1, channels, grid, grid), t, torch.zeros(1, dtype=torch.long), t)
            print(f"{name:6} {image:5} {channels:4}x{grid:2}x{grid:2}  {parameters / 1e6:10.1f}M {macs / 1e9:7.1f}")
