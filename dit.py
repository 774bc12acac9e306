"""DiTDH: a diffusion transformer with a wide head, as teacher (velocity) and as student.

Paper: arXiv 2511.13019 takes it unchanged from RAE, arXiv 2510.11690, which calls the wide head
"DDT head". A narrow, deep encoder reads the noisy latent and writes one condition vector per
token. A shallow, wide head reads the latent again and writes the velocity of each token.

    teacher  DiTDH(...)(z, t, y)                             velocity v(z, t)
    student  DiTDH(..., average_velocity=True)(z, t, y, r)   average velocity u(z, t, r)

    python dit.py       # parameters and multiply-accumulates of every size at every resolution

Shapes: B images, C latent channels, G x G = N tokens, D width (of the encoder or of the head),
K attention heads, F = 8/3 D hidden units. Modules and weights have the names of the published
checkpoints, so that these load without any conversion.
"""
import os
import pickle
import struct
import zipfile
import zlib

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# Each pair is (encoder, head). "toy" is ours, the others are the published sizes.
MODELS = {
    "toy": {"hidden_size": (128, 128), "depth": (4, 2), "num_heads": (4, 4)},
    "S": {"hidden_size": (384, 2048), "depth": (12, 2), "num_heads": (6, 16)},
    "B": {"hidden_size": (768, 2048), "depth": (12, 2), "num_heads": (12, 16)},
    "XL": {"hidden_size": (1152, 2048), "depth": (28, 2), "num_heads": (16, 16)}
}


# --------------------------------------------------------------------------------------------------
# Where a token is: sin-cos positions, added once, and rotations of queries and keys in attention

def grid_angles(num, grid, dtype):
    """Row and column of each token times `num` frequencies, from 1 to nearly 1/10,000 a step."""
    frequency = 10000.0 ** (-torch.arange(num, dtype=dtype) / num)  # (num,)
    angle = torch.outer(torch.arange(grid, dtype=dtype), frequency)             # (G, num)
    return angle.repeat_interleave(grid, 0), angle.repeat(grid, 1)              # 2 x (N, num)


def sincos_positions(dim, grid):
    """Fixed 2-D positions (N, dim): half of the channels encode the column, half the row."""
    row, column = grid_angles(dim // 4, grid, torch.float64)        # 2 x (N, dim / 4)
    return torch.cat(
        [column.sin(), column.cos(), row.sin(), row.cos()], 1       # (N, dim)
    ).float()


class RotaryPositions(nn.Module):
    """Turns each pair of channels (2i, 2i + 1) of an attention head by an angle.

    The angle grows with the token's row in the first half of the channels and with its column in
    the second, so the product of a query and a key depends on how far apart their tokens are.
    """

    def __init__(self, head_dim, grid):
        super().__init__()
        row, column = grid_angles(head_dim // 4, grid, torch.float32)           # 2 x (N, D / 4K)
        angle = torch.cat([row, column], 1).repeat_interleave(2, 1)             # (N, D / K)
        self.register_buffer("freqs_cos", angle.cos())
        self.register_buffer("freqs_sin", angle.sin())

    def forward(self, x):
        """Queries and keys (..., N, D / K) -> the same shape and type."""
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)             # 2 x (..., N, D / 2K)
        quarter_turn = torch.stack([-odd, even], -1).flatten(-2)    # (..., N, D / K)
        return (x * self.freqs_cos + quarter_turn * self.freqs_sin).to(x.dtype)


# --------------------------------------------------------------------------------------------------
# What the condition is: time, time gap and class

class TimeEmbedding(nn.Module):
    """Gaussian Fourier features of a time in [0, 1], then two linear layers: (B,) -> (B, D)."""

    def __init__(self, hidden_size):
        super().__init__()
        # Frequencies are drawn once and never trained; they are saved with the weights.
        self.register_buffer("W", torch.randn(256))
        self.mlp = nn.Sequential(
            nn.Linear(512, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t):
        angle = 2 * torch.pi * t[:, None] * self.W                  # (B, 256)
        features = torch.cat([angle.sin(), angle.cos()], 1)         # (B, 512)
        return self.mlp(features.to(self.mlp[0].weight.dtype))      # (B, D)


class ClassEmbedding(nn.Module):
    """A vector per class, and a last one for "no class", the label num_classes: (B,) -> (B, D)."""

    def __init__(self, num_classes, hidden_size):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y):
        return self.embedding_table(y)


# --------------------------------------------------------------------------------------------------
# The block

class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2)), times a weight per channel, in the precision of x: (..., D) -> same."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Every token looks at every token: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, rotary):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))     # (B, N, 3, K, D / K)
        qkv = qkv.permute(2, 0, 3, 1, 4)                            # (3, B, K, N, D / K)
        q, k = rotary(qkv[:2])                                      # 2 x (B, K, N, D / K)
        x = F.scaled_dot_product_attention(q, k, qkv[2])            # (B, K, N, D / K)
        return self.proj(x.transpose(1, 2).flatten(2))              # (B, N, D)


class SwiGLU(nn.Module):
    """Two layers whose hidden units are gated: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)                      # 2 x (B, N, F)
        return self.w3(F.silu(gate) * value)                        # (B, N, D)


def modulate(x, shift, scale):
    """x (B, N, D); shift and scale (B, 1, D) or (B, N, D)."""
    return x.to(scale.dtype) * (1 + scale) + shift


class Block(nn.Module):
    """Attention and SwiGLU, each shifted, scaled and gated by the condition c.

    c is (B, 1, D), the same for all tokens of an image, or (B, N, D), one for each token.
    """

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = RMSNorm(dim, 1e-6)
        self.norm2 = RMSNorm(dim, 1e-6)
        self.attn = Attention(dim, num_heads)
        # At this width, SwiGLU's three matrices cost what the usual two with 4 D units would.
        self.mlp = SwiGLU(dim, int(2 / 3 * 4 * dim))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, rotary):
        # 6 x (B, 1 or N, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, -1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rotary)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """From the head's width to latent channels, again shifted and scaled by the condition."""

    def __init__(self, dim, out_channels):
        super().__init__()
        self.norm_final = RMSNorm(dim, 1e-6)
        self.linear = nn.Linear(dim, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)         # 2 x (B, N, D)
        return self.linear(modulate(self.norm_final(x), shift, scale))              # (B, N, C)


class PatchEmbedding(nn.Module):
    """A linear map of each latent pixel, (B, C, G, G) -> (B, N, D).

    The published checkpoints keep its weights in the shape of a 1 x 1 convolution.
    """

    def __init__(self, in_channels, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, 1)

    def forward(self, z):
        tokens = z.flatten(2).transpose(1, 2)                       # (B, N, C)
        return F.linear(tokens, self.proj.weight.flatten(1), self.proj.bias)        # (B, N, D)


def run_block(block, *inputs, checkpointing=False):
    """block(*inputs). With checkpointing, the backward pass computes its activations again."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)


# --------------------------------------------------------------------------------------------------
# The network

class DiTDH(nn.Module):
    """Velocity v(z, t, y), or with average_velocity=True average velocity u(z, t, y, r) on [r, t].

    input_size is the side G of the latent grid; hidden_size, depth and num_heads are pairs
    (encoder, head), as in MODELS.
    """
    checkpointing = False  # True saves memory: see run_block

    def __init__(self, input_size, in_channels, hidden_size, depth, num_heads, num_classes,
                 average_velocity=False):
        super().__init__()
        self.config = {
            "input_size": input_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "num_classes": num_classes,
            "average_velocity": average_velocity
        }
        self.average_velocity = average_velocity
        self.num_encoder_blocks, num_head_blocks = depth
        width, head_width = hidden_size

        self.register_buffer("pos_embed", sincos_positions(width, input_size)[None])  # (1, N, D)
        self.x_embedder = PatchEmbedding(in_channels, head_width)
        self.s_embedder = PatchEmbedding(in_channels, width)
        self.s_projector = nn.Linear(width, head_width) if width != head_width else nn.Identity()
        self.t_embedder = TimeEmbedding(width)
        self.r_embedder = TimeEmbedding(width) if average_velocity else None
        self.y_embedder = ClassEmbedding(num_classes, width)
        self.enc_feat_rope = RotaryPositions(width // num_heads[0], input_size)
        self.dec_feat_rope = RotaryPositions(head_width // num_heads[1], input_size)

        encoder = [Block(width, num_heads[0]) for _ in range(self.num_encoder_blocks)]
        head = [Block(head_width, num_heads[1]) for _ in range(num_head_blocks)]
        self.blocks = nn.ModuleList(encoder + head)
        self.final_layer = FinalLayer(head_width, in_channels)
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self):
        """The published start; layers that are not named here keep PyTorch's own."""
        for embedder in (self.x_embedder, self.s_embedder):
            nn.init.xavier_uniform_(embedder.proj.weight.flatten(1))
            nn.init.zeros_(embedder.proj.bias)

        for layer in (
            self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]
        ):
            nn.init.normal_(layer.weight, std=0.02)

        # Zeros make each block start as the identity, and leave the embedding of t - r without
        # effect: a student that has its teacher's weights starts as u(z, t, r) = v(z, t).
        zeros = [module.adaLN_modulation[1] for module in (*self.blocks, self.final_layer)]
        zeros.append(self.final_layer.linear)
        if self.average_velocity:
            zeros.append(self.r_embedder.mlp[2])
        for layer in zeros:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, z, t, y, r=None):
        """Latents z (B, C, G, G) -> velocity or average velocity (B, C, G, G).

        Times t and r are (B,), 0 <= r <= t <= 1; the teacher ignores r. Labels y are (B,), in
        0..num_classes, where num_classes means "no class".
        """
        time = self.t_embedder(t)                                   # (B, D)
        if self.average_velocity:
            time = time + self.r_embedder(t - r)
        c = F.silu(time + self.y_embedder(y))[:, None]              # (B, 1, D)

        s = self.s_embedder(z) + self.pos_embed                     # (B, N, D)
        for block in self.blocks[:self.num_encoder_blocks]:
            s = run_block(block, s, c, self.enc_feat_rope, checkpointing=self.checkpointing)
        s = self.s_projector(F.silu(s + time[:, None]))             # (B, N, D of the head)

        x = self.x_embedder(z)                                      # (B, N, D of the head)
        for block in self.blocks[self.num_encoder_blocks:]:
            x = run_block(block, x, s, self.dec_feat_rope, checkpointing=self.checkpointing)
        x = self.final_layer(x, s)                                  # (B, N, C)
        return x.transpose(1, 2).unflatten(2, z.shape[2:])          # (B, C, G, G)


# --------------------------------------------------------------------------------------------------
# A network from a checkpoint, a student from its teacher, the cost of a network

class DamagedFile(SystemExit):
    """A file that is there but cannot be used. Where nobody catches it, its text is one line."""


# What torch.load and zipfile raise for cut files and flipped bits: seen by trying every position.
READ_ERRORS = (
    AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError,
    TypeError, ValueError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile, zlib.error
)


def load_file(path):
    """Dictionary in a .pt file: tensors and plain containers alone, so that no code in it runs.

    Tensors stay on the disk until they are used. SystemExit where there is no such file,
    DamagedFile where it is something else, is cut off, or fails its archive's checksums.
    """
    if not os.path.isfile(path):
        raise SystemExit(f"{path}: no such file; give the path of a checkpoint")

    with open(path, "rb") as file:
        head = file.read(32)
    if head.startswith(b"version https://git-lfs"):
        raise DamagedFile(f"{path}: a Git LFS pointer, not the weights; run git lfs pull")
    if head.lstrip().startswith(b"<"):
        raise DamagedFile(f"{path}: a web page, not weights; download the file that it links to")
    if head[8:9] == b"{":
        raise DamagedFile(f"{path}: a safetensors file; give a .pt file of the same weights")

    is_archive = head.startswith(b"PK")  # files that PyTorch wrote before version 1.6 are not
    try:
        # torch.load ignores the checksums, and one process of eight is enough to read 15 GB.
        is_first = os.environ.get("RANK", "0") == "0"
        if is_archive and is_first and zipfile.ZipFile(path).testzip():
            raise zipfile.BadZipFile("wrong checksum")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
        return dict(content)  # a TypeError where it is a tensor or a list
    except READ_ERRORS as error:
        raise DamagedFile(f"{path}: damaged, or no dictionary of tensors and plain containers "
                          f"({error!r:.60}); copy it again, or take another") from error


def fingerprint(state):
    """A number that tells two state dicts apart: a checksum of the first values of each tensor."""
    checksum = 0
    for name in sorted(state):
        values = state[name].flatten()[:1024].float().cpu().numpy()
        checksum = zlib.crc32(values.tobytes(), checksum)
    return checksum


def state_dict_of(content):
    """The weights in the content of a file: under "ema" or "model", or bare."""
    for key in ("ema", "model"):
        if key in content:
            return content[key]
    return content


def load_frozen(network, state, path):
    """Give a network on the device "meta" the state dict of the file `path` -> it, frozen.

    DamagedFile names the file and the first entry that is no tensor, not finite, beyond 1e10,
    missing, unknown or of another shape.
    """
    weights = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise DamagedFile(f"{path}: {name} is no tensor; give a checkpoint")
        weights[name] = value.float()
        # No training reaches 1e10, but one wrong bit in an exponent does.
        if not (weights[name].abs() <= 1e10).all():
            raise DamagedFile(f"{path}: {name} is not finite, or beyond 1e10: the training has "
                              "diverged or the file is damaged; take an earlier checkpoint")

    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:  # names or shapes that are not the network's
        problem = " ".join(str(error).split())
        raise DamagedFile(f"{path}: {problem:.160}; give a checkpoint of this network") from error
    return network.eval().requires_grad_(False)


def load_network(path):
    """The DiTDH of any checkpoint, ours or published -> (network, content of the file).

    The network is frozen and has the EMA weights. SystemExit names a file that holds none.
    """
    content = load_file(path)
    state = state_dict_of(content)
    if "x_embedder.proj.weight" not in state:
        raise SystemExit(f"{path}: holds no velocity network; give a checkpoint of a later stage "
                         "than rae")

    with torch.device("meta"):
        network = DiTDH(**content.get("network") or published_config(state, path))
    return load_frozen(network, state, path), content


def published_config(state, path):
    """Arguments of DiTDH for published weights, which come without them: read off the shapes."""
    widths = len(state["s_embedder.proj.bias"]), len(state["x_embedder.proj.bias"])
    for size in MODELS.values():
        if size["hidden_size"] == widths:
            return {
                **size,
                "input_size": round(state["pos_embed"].shape[1] ** 0.5),
                "in_channels": state["x_embedder.proj.weight"].shape[1],
                "num_classes": len(state["y_embedder.embedding_table.weight"]) - 1,
                "average_velocity": "r_embedder.W" in state
            }
    raise SystemExit(f"{path}: widths {widths} are of no published DiTDH; add its size to MODELS "
                     "in dit.py")


def student_of(teacher):
    """A student that starts as its teacher: its weights, and no effect of t - r yet."""
    student = DiTDH(**teacher.config | {"average_velocity": True})
    student.load_state_dict(student.state_dict() | teacher.state_dict())
    return student


def parameters_and_macs(model, *inputs):
    """(parameters, multiply-accumulates) of model(*inputs), attention's products included."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


if __name__ == "__main__":
    from rae import DECODERS, Decoder  # not above, because rae.py imports this file

    print("Average-velocity networks. A GMAC is a billion multiply-accumulates, in matrix\n"
          "products, of one evaluation for one image, or of decoding one image.\n\n"
          "model  image      latent  parameters   GMACs  decoder's")
    torch.set_default_device("meta")  # shapes alone, without numbers
    for image, channels, grid, sizes in (
        (32, 96, 4, ["toy"]),
        (256, 768, 16, ["S", "B", "XL"]),
        (512, 768, 32, ["S", "B", "XL"])
    ):
        z = torch.empty(1, channels, grid, grid)
        t = torch.ones(1)
        decoder = Decoder(channels, grid, image // grid, **DECODERS[sizes[-1]])
        _, decoder_macs = parameters_and_macs(decoder.to("meta"), z)
        for size in sizes:
            model = DiTDH(grid, channels, num_classes=1000, average_velocity=True, **MODELS[size])
            parameters, macs = parameters_and_macs(model, z, t, t.long(), t)
            print(f"{size:6} {image:5} {channels:4}x{grid:2}x{grid:2}  {parameters / 1e6:9.1f}M "
                  f"{macs / 1e9:7.2f} {decoder_macs / 1e9:10.2f}")
