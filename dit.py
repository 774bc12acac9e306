"""DiTDH: a diffusion transformer with a wide head, as teacher (velocity) and as student (average velocity).

Paper: arXiv 2511.13019 takes it unchanged from RAE, arXiv 2510.11690, whose name for the wide head is "DDT head".
A narrow, deep encoder reads the noisy latent and writes one condition vector per token. A shallow, wide head reads the
latent again and writes the velocity of each token.

    teacher  DiTDH(...)(z, t, y)                             velocity v(z, t)
    student  DiTDH(..., average_velocity=True)(z, t, y, r)   average velocity u(z, t, r), one more embedding: of t - r

    python dit.py       # parameters and multiply-accumulates of every size at every resolution

Shapes: B images, C latent channels, G x G = N tokens, D width (of the encoder or of the head), K heads, F = 8/3 D
hidden units. Modules and weights have the names of the published checkpoints.
"""
import zipfile
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# (encoder, head). "toy" is ours, the rest are the published sizes.
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
    """2-D rotary positions: channel pairs (2i, 2i + 1) of a head turn by row (first half) or column (second half)."""

    def __init__(self, head_dim, grid):
        super().__init__()
        frequency = 10000.0 ** (-torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))
        angle = (torch.arange(grid).float()[:, None] * frequency).repeat_interleave(2, dim=1)   # (G, head_dim / 2)
        row, column = angle[:, None].expand(grid, grid, -1), angle[None].expand(grid, grid, -1)
        angle = torch.cat([row, column], dim=2)                                                 # (G, G, head_dim)
        self.register_buffer("freqs_cos", angle.cos().flatten(0, 1))                            # (N, head_dim)
        self.register_buffer("freqs_sin", angle.sin().flatten(0, 1))

    def forward(self, x):
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)                                         # 2 x (..., N, D / 2K)
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
    """One vector per class, and a last one for "no class", the label num_classes: (B,) -> (B, D)."""

    def __init__(self, num_classes, hidden_size):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y):
        return self.embedding_table(y)


# ----------------------------------------------------------------------------------------------------------------------
# The block

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2)) times a weight a channel: (..., D) -> (..., D)."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

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
    """Attention and SwiGLU, shifted, scaled and gated by the condition c: (B, 1, D) for all tokens, or (B, N, D)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.mlp = SwiGLU(dim, int(2 / 3 * 4 * dim))  # three matrices that cost what the usual two of 4 D would
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, rotary):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)  # 6 x (B, 1 or N, D)
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
    """A linear map of each latent pixel, (B, C, G, G) -> (B, N, D), in the shape of a 1 x 1 convolution."""

    def __init__(self, in_channels, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, 1)

    def forward(self, z):
        tokens = z.flatten(2).transpose(1, 2)                                                   # (B, N, C)
        return F.linear(tokens, self.proj.weight.flatten(1), self.proj.bias)                    # (B, N, D)


def run_block(block, *inputs, checkpointing=False):
    """block(*inputs). With checkpointing its activations are computed again in the backward pass, not kept."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)


# ----------------------------------------------------------------------------------------------------------------------
# The network

class DiTDH(nn.Module):
    """Velocity v(z, t, y), or with average_velocity=True the average velocity u(z, t, y, r) over [r, t].

    input_size: side of the latent grid. hidden_size, depth, num_heads: (encoder, head).
    """
    checkpointing = False  # True: the backward pass computes the blocks' activations again instead of keeping them

    def __init__(self, input_size, in_channels, hidden_size, depth, num_heads, num_classes, average_velocity=False):
        super().__init__()
        self.config = dict(input_size=input_size, in_channels=in_channels, hidden_size=hidden_size, depth=depth,
                           num_heads=num_heads, num_classes=num_classes, average_velocity=average_velocity)
        width, head_width = hidden_size
        self.average_velocity, self.num_encoder_blocks = average_velocity, depth[0]
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
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self):
        """The published start; layers that are not named here keep PyTorch's own."""
        for layer in (self.x_embedder.proj, self.s_embedder.proj):
            nn.init.xavier_uniform_(layer.weight.flatten(1))
            nn.init.zeros_(layer.bias)
        for layer in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        # Zero: each block starts as the identity, and the embedding of t - r without effect, u(z, t, r) = v(z, t).
        zero = [self.final_layer.linear] + ([self.r_embedder.mlp[2]] if self.average_velocity else [])
        for layer in zero + [module.adaLN_modulation[1] for module in (*self.blocks, self.final_layer)]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, z, t, y, r=None):
        """z (B, C, G, G), times t and r (B,) in [0, 1] with r <= t, labels y (B,) in 0..num_classes -> (B, C, G, G)."""
        time = self.t_embedder(t)                                                               # (B, D)
        if self.average_velocity:
            time = time + self.r_embedder(t - r)
        c = F.silu(time + self.y_embedder(y))[:, None]                                          # (B, 1, D)
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


# ----------------------------------------------------------------------------------------------------------------------
# A network from a checkpoint, a student from its teacher, the cost of a network

def load_file(path):
    """Content of a .pt file, tensors and plain containers alone. Tensors stay on the disk until they are used."""
    if not Path(path).is_file():
        raise SystemExit(f"{path}: no such file; give the path of a checkpoint")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def state_dict_of(content):
    """The weights in the content of a file: under "ema" or "model", or bare."""
    return next((content[key] for key in ("ema", "model") if key in content), content)


def fill(network, state, path):
    """Give a network on the device "meta" the weights of a state dict -> the network, frozen. SystemExit on NaN."""
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise SystemExit(f"{path}: {name} is not finite; the training has diverged, take an earlier checkpoint")
    network.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    return network.eval().requires_grad_(False)


def load_network(path):
    """Any checkpoint that holds a DiTDH, ours or published -> (network with the EMA weights, content of the file)."""
    content = load_file(path)
    state = state_dict_of(content)
    if "x_embedder.proj.weight" not in state:
        raise SystemExit(f"{path}: holds no velocity network; give a checkpoint of a stage after rae")
    with torch.device("meta"):
        network = DiTDH(**content.get("network") or published_config(state, path))
    return fill(network, state, path), content


def published_config(state, path):
    """Arguments of DiTDH for published weights, which come without them: a size of MODELS, the rest from shapes."""
    widths = len(state["s_embedder.proj.bias"]), len(state["x_embedder.proj.bias"])
    sizes = [size for size in MODELS.values() if size["hidden_size"] == widths]
    if not sizes:
        raise SystemExit(f"{path}: widths {widths} are of no published DiTDH; add its size to MODELS in dit.py")
    return dict(sizes[0], input_size=round(state["pos_embed"].shape[1] ** 0.5),
                in_channels=state["x_embedder.proj.weight"].shape[1], average_velocity="r_embedder.W" in state,
                num_classes=len(state["y_embedder.embedding_table.weight"]) - 1)


def student_of(teacher):
    """A student that starts as its teacher: all its weights, and an embedding of t - r without effect."""
    student = DiTDH(**teacher.config | dict(average_velocity=True))
    student.load_state_dict(student.state_dict() | teacher.state_dict())
    return student


def count(model, *inputs):
    """(parameters, multiply-accumulates) of one call: every matrix product, attention's two included, nothing else."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


if __name__ == "__main__":
    print("average-velocity network; GMACs of one evaluation of one image, all matrix products counted\n")
    print("model  image      latent  parameters   GMACs")
    for name, image in [("toy", 32)] + [(name, image) for image in (256, 512) for name in ("S", "B", "XL")]:
        channels, grid = (96, 4) if name == "toy" else (768, image // 16)
        with torch.device("meta"):
            model = DiTDH(grid, channels, num_classes=1000, average_velocity=True, **MODELS[name])
            t, y = torch.ones(1), torch.zeros(1, dtype=torch.long)
            parameters, macs = count(model, torch.empty(1, channels, grid, grid), t, y, t)
        print(f"{name:6} {image:5} {channels:4}x{grid:2}x{grid:2}  {parameters / 1e6:9.1f}M {macs / 1e9:7.1f}")
