"""The representation autoencoder: a frozen vision transformer as encoder, a ViT decoder trained to undo it.

Paper: RAE, arXiv 2510.11690, as used by arXiv 2511.13019. The encoder was trained to understand images, not to compress
them, and is never changed; all that is learned here is the decoder, and the mean and variance of every latent entry.

    python rae.py IMAGE                          # reconstruction beside the original: DINOv2 encoder, published decoder
    python rae.py IMAGE --rae out/toy/rae.pt     # the same with a checkpoint of `train.py --stage rae`

Shapes: B images, G x G = N patches (tokens), P pixels a patch side, C latent channels, D decoder width.
Images are float in [0, 1], (B, 3, S, S); latents (B, C, G, G) are normalised per entry: about mean 0, variance 1.
"""
import argparse
import json
import os
import re
import sys
import time
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import Block, VisionTransformer

from dit import sincos_positions

IMAGENET_MEAN, IMAGENET_STD = ((torch.tensor(c).view(3, 1, 1)) for c in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
DINOV2 = "vit_base_patch14_reg4_dinov2.lvd142m"
DECODERS = {
    "toy": dict(hidden_size=192, depth=4, num_heads=4, mlp_hidden=512),
    "XL": dict(hidden_size=1152, depth=28, num_heads=16, mlp_hidden=4096),
}
HUB = "nyu-visionx/RAE-collections"  # Hugging Face repository of the published weights, and where each file lies in it
HUB_FILES = {
    256: dict(decoder="decoders/dinov2/wReg_base/ViTXL_n08/model.pt", statistics="stats/dinov2/wReg_base/imagenet1k/stat.pt",
              teacher="DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt"),
    512: dict(decoder="decoders/dinov2/wReg_base/ViTXL_n08_i512/model.pt", statistics="stats/dinov2/wReg_base/imagenet1k_512/stat.pt",
              teacher="DiTs/Dinov2/wReg_base/ImageNet512/DiTDH-XL_ep400/stage2_model.pt"),
}


class UserError(ValueError):
    """Something the user can mend: its text is one line that names the file or flag, and it is all that is printed."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def at_least(minimum):
    """The type of a flag: a whole number of at least `minimum`."""
    def parse(text):
        if not text.isdigit() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, not {text!r}")
        return int(text)
    return parse


def pick_device(name):
    """What --device names, or a GPU if there is one, or the CPU. Raises UserError where torch has no such device."""
    try:
        return str(torch.zeros(1, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not to be had ({one_line(error)}); leave the flag out to use what there is") from None


def run_main(main):
    """Run a script's main(): what a user can mend ends it in one line (of the first process only) and exit status 2."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError) as error:
        line = f"{Path(sys.argv[0]).name}: {error}"
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(line, file=sys.stderr, flush=True)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun ends with a report of its own: let it name the reason too
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(
                json.dumps({"message": {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}}))
        sys.exit(2)


# ----------------------------------------------------------------------------------------------------------------------
# Encoder

class ConvStem(nn.Module):
    """Patch embedding of the toy's encoder: three strided convolutions learn edges sooner than one 8 x 8 patch does."""

    def __init__(self, img_size, patch_size, in_chans, embed_dim, **unused):
        super().__init__()
        self.grid_size = (img_size // patch_size,) * 2
        self.num_patches = self.grid_size[0] ** 2
        widths = (in_chans, 32, 64, embed_dim)
        self.net = nn.Sequential(*[layer for i in range(3) for layer in (nn.Conv2d(widths[i], widths[i + 1], 3, 2, 1), nn.GroupNorm(8, widths[i + 1]), nn.GELU())],
                                 nn.Conv2d(embed_dim, embed_dim, 1))

    def forward(self, images):
        return self.net(images).flatten(2).transpose(1, 2)                                      # (B, 3, S, S) -> (B, N, C)


class Encoder(nn.Module):
    """Frozen timm vision transformer: images -> one vector a patch, layer-normalised without affine parameters.

    name: any timm ViT, with weights from its hub or from a local file `weights`; or "toy", a small ViT for 32 x 32 images
    whose weights come with our checkpoint. image_size: side of the images it is given. Images are resized to a whole
    number of patches at the network's own scale: 256 -> 224 for a patch of 14, so that the grid is 16.
    """

    def __init__(self, name=DINOV2, image_size=256, weights=None, channels=96):
        super().__init__()
        self.config = dict(name=name, image_size=image_size, channels=channels)
        if name == "toy":
            self.net = VisionTransformer(img_size=image_size, patch_size=image_size // 4, embed_dim=channels, depth=4, num_heads=4,
                                         num_classes=0, class_token=False, global_pool="avg", embed_layer=ConvStem)
            self.input_size = image_size
        else:
            self.input_size = image_size // 16 * 14
            try:
                self.net = timm.create_model(name, pretrained=True, img_size=self.input_size, num_classes=0,
                                             pretrained_cfg_overlay=dict(file=str(weights)) if weights else None)
            except Exception as error:
                where = weights or f"{timm.get_pretrained_cfg(name).hf_hub_id} on the Hugging Face hub"
                raise UserError(f"no weights for the encoder {name}: looked for {where} ({one_line(error)}); "
                                "give a local file with --encoder_weights") from None
        channels = self.net.embed_dim
        self.net.norm = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.grid = self.net.patch_embed.grid_size[0]
        self.shape = (channels, self.grid, self.grid)

    def forward(self, images):
        x = (images - IMAGENET_MEAN.to(images)) / IMAGENET_STD.to(images)                       # (B, 3, S, S)
        if x.shape[-1] != self.input_size:
            x = F.interpolate(x, (self.input_size, self.input_size), mode="bicubic", align_corners=False)
        x = self.net.forward_features(x)[:, self.net.num_prefix_tokens:]                        # (B, N, C)
        return x.transpose(1, 2).unflatten(2, (self.grid, self.grid)).float()                   # (B, C, G, G)


class EncoderPretraining(nn.Module):
    """How the toy's encoder gets a representation: together, and under noise, its tokens name the class and can be drawn from.

    The class alone leaves nothing to draw from; pixels alone leave classes entangled. ImageNet needs none of this:
    there DINOv2 brings both.
    """

    def __init__(self, encoder, num_classes, patch_size):
        super().__init__()
        self.encoder = encoder
        self.classify = nn.Linear(encoder.shape[0], num_classes)
        self.draw = Decoder(encoder.shape[0], encoder.grid, patch_size, **DECODERS["toy"])

    def forward(self, images, labels, noise, noise_level, pixel_weight=10.0):
        """images (B, 3, S, S), labels (B,), noise (B, C, G, G) on the tokens -> (loss, {"mse": of pixels, "accuracy"})."""
        z = self.encoder(images) + noise_level * noise                                          # (B, C, G, G)
        scores = self.classify(z.mean((2, 3)))                                                  # (B, classes)
        mse = (self.draw(z) - images).square().mean()
        loss = F.cross_entropy(scores, labels, label_smoothing=0.1) + pixel_weight * mse.sqrt()
        return loss, {"mse": mse.detach(), "accuracy": (scores.argmax(1) == labels).float().mean()}


# ----------------------------------------------------------------------------------------------------------------------
# Decoder

def unpatchify(x, patch_size):
    """(B, N, P * P * 3) -> (B, 3, G P, G P)."""
    grid = int(x.shape[1] ** 0.5)
    x = x.unflatten(2, (patch_size, patch_size, 3)).unflatten(1, (grid, grid))                  # (B, G, G, P, P, 3)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)                              # (B, 3, G P, G P)


class Decoder(nn.Module):
    """Vision transformer from latents (B, C, G, G), not normalised, to images (B, 3, G P, G P) of about [0, 1]."""

    def __init__(self, latent_dim, grid, patch_size, hidden_size, depth, num_heads, mlp_hidden):
        super().__init__()
        self.config = dict(latent_dim=latent_dim, grid=grid, patch_size=patch_size, hidden_size=hidden_size, depth=depth,
                           num_heads=num_heads, mlp_hidden=mlp_hidden)
        self.patch_size = patch_size
        self.embed = nn.Linear(latent_dim, hidden_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        positions = sincos_positions(hidden_size, grid)[None]                                   # (1, N, D)
        self.register_buffer("pos_embed", torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1))
        norm = partial(nn.LayerNorm, eps=1e-12)
        self.blocks = nn.Sequential(*[Block(hidden_size, num_heads, mlp_ratio=(mlp_hidden + 0.5) / hidden_size, qkv_bias=True,
                                            norm_layer=norm) for _ in range(depth)])
        self.norm = norm(hidden_size)
        self.head = nn.Linear(hidden_size, 3 * patch_size**2)

    def forward(self, z):
        x = self.embed(z.flatten(2).transpose(1, 2))                                            # (B, N, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1) + self.pos_embed
        x = self.head(self.norm(self.blocks(x)))[:, 1:]                                         # (B, N, 3 P P)
        x = unpatchify(x.float() if x.dtype == torch.bfloat16 else x, self.patch_size)          # (B, 3, S, S)
        return x * IMAGENET_STD.to(x) + IMAGENET_MEAN.to(x)


def convert_decoder(published):
    """State dict of a published RAE decoder (transformers' ViTMAE names) -> state dict of Decoder.

    Query, key and value are stacked into one matrix; everything else is renamed. Raises UserError on other tensors.
    """
    p = dict(published)
    try:
        state = {"cls_token": p.pop("trainable_cls_token"), "pos_embed": p.pop("decoder_pos_embed")}
        for theirs, ours in (("decoder_embed", "embed"), ("decoder_norm", "norm"), ("decoder_pred", "head")):
            for kind in ("weight", "bias"):
                state[f"{ours}.{kind}"] = p.pop(f"{theirs}.{kind}")
        for i in range(len({key.split(".")[1] for key in p if key.startswith("decoder_layers.")})):
            for kind in ("weight", "bias"):
                take = lambda name: p.pop(f"decoder_layers.{i}.{name}.{kind}")
                state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([take(f"attention.attention.{n}") for n in ("query", "key", "value")])
                for theirs, ours in (("attention.output.dense", "attn.proj"), ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"),
                                     ("layernorm_before", "norm1"), ("layernorm_after", "norm2")):
                    state[f"blocks.{i}.{ours}.{kind}"] = take(theirs)
    except KeyError as missing:
        raise UserError(f"not a published RAE decoder: tensor {missing} is missing") from None
    if p:
        raise UserError(f"not a published RAE decoder: unexpected tensor {sorted(p)[0]}")
    return state


def reconstruction_loss(decoder, images, latents, noise, noise_level):
    """L1 between images (B, 3, S, S) and the decoding of noised, not yet normalised latents (B, C, G, G).

    noise_level (B,) makes the decoder forgive what a generator gets slightly wrong. Returns (loss, {"mse", "psnr"}).
    LPIPS and the adversarial loss add their terms here.
    """
    reconstruction = decoder(latents + noise_level.view(-1, 1, 1, 1) * noise)                   # (B, 3, S, S)
    mse = (reconstruction - images).square().mean().detach()
    return (reconstruction - images).abs().mean(), {"mse": mse, "psnr": -10 * mse.log10()}


# ----------------------------------------------------------------------------------------------------------------------
# Both together

class LatentStatistics:
    """Exact mean and variance of every latent entry: float64 sums, whatever the batch size and the order."""

    def __init__(self):
        self.count = self.total = self.squares = 0

    def update(self, z):
        z = z.double()                                                                          # (B, C, G, G)
        self.count, self.total, self.squares = self.count + len(z), self.total + z.sum(0), self.squares + z.square().sum(0)

    def mean_and_variance(self):
        """-> mean, variance (C, G, G) over all processes' latents."""
        sums = torch.stack([self.total, self.squares, torch.full_like(self.total, self.count)])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        mean, variance = sums[0] / sums[2], (sums[1] - sums[0] ** 2 / sums[2]) / sums[2]
        return mean.float(), variance.clamp_min(0).float()


class RAE(nn.Module):
    """encode: images -> normalised latents; decode: back. mean, var: (C, G, G) or None (mean 0; without var, no scaling)."""

    def __init__(self, encoder, decoder, mean=None, var=None):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.encoder_config = getattr(encoder, "config", None)
        self.register_buffer("mean", mean)
        self.register_buffer("var", var)

    def normalise(self, z):
        z = z if self.mean is None else z - self.mean
        return z if self.var is None else z / (self.var + 1e-5).sqrt()

    @torch.no_grad()
    def encode(self, images):
        """Images (B, 3, S, S) in [0, 1] -> (B, C, G, G)."""
        return self.normalise(self.encoder(images))

    def decode(self, z):
        """Normalised latents (B, C, G, G) -> images (B, 3, S, S), about [0, 1], not clamped."""
        z = z if self.var is None else z * (self.var + 1e-5).sqrt()
        return self.decoder(z if self.mean is None else z + self.mean)

    @torch.no_grad()
    def features(self, images):
        """Images (B, 3, S, S) in [0, 1] -> (B, C): the mean over patches, for Frechet distances and classifiers."""
        return self.encoder(images).mean((2, 3))

    def packed(self):
        """All that another script needs to rebuild this RAE. Weights of a public encoder stay where they came from."""
        keep_encoder = self.encoder_config["name"] == "toy"
        state = {k: v.detach().cpu() for k, v in self.state_dict().items() if keep_encoder or not k.startswith("encoder.")}
        return dict(encoder=self.encoder_config, decoder=self.decoder.config, state=state)


def unpack_rae(packed, with_encoder=False, encoder_weights=None):
    """Undo RAE.packed(). A public encoder is fetched only where with_encoder asks for it."""
    state = packed["state"]
    encoder = Encoder(**packed["encoder"], weights=encoder_weights) if with_encoder or packed["encoder"]["name"] == "toy" else None
    rae = RAE(encoder, Decoder(**packed["decoder"]), state.get("mean"), state.get("var"))
    rae.encoder_config = packed["encoder"]  # known even where the encoder itself is not needed
    missing, odd = rae.load_state_dict(state, strict=False)
    missing = [k for k in missing if not k.startswith("encoder.") or packed["encoder"]["name"] == "toy"]
    if missing or odd:
        raise UserError(f"the RAE in this checkpoint is damaged: tensor {(missing + odd)[0]} is {'missing' if missing else 'unexpected'}")
    return rae.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# Files

def one_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def load_file(path):
    """torch.load of a checkpoint, on the CPU, tensors and plain containers only. Raises UserError naming the file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a checkpoint file") from None
    except Exception as error:
        raise UserError(f"{path}: not a readable checkpoint, or cut short ({type(error).__name__}); make or fetch it again") from None


def load_weights(path, content=None):
    """State dict of a file that holds it bare or under "ema" / "model", with or without wrappers' prefixes."""
    content = load_file(path) if content is None else content
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no state dict")
    state = content.get("ema") or content.get("model") or content
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in state.items()}


def fetch(kind, resolution, flag):
    """Path of a published file ("decoder", "statistics" or "teacher"), downloaded to the hub's cache on first use."""
    from huggingface_hub import hf_hub_download
    name = HUB_FILES[resolution][kind]
    try:
        return hf_hub_download(HUB, name)
    except Exception as error:
        raise UserError(f"no {kind} for resolution {resolution}: looked for {name} of {HUB} in the local cache and on the Hugging Face "
                        f"hub ({type(error).__name__}); give a local path with {flag}") from None


def published_rae(resolution, folder=None, with_encoder=False, encoder_weights=None):
    """The published RAE of a resolution, from the hub or from a folder laid out like it."""
    paths = {}
    for kind in ("decoder", "statistics"):
        paths[kind] = Path(folder) / HUB_FILES[resolution][kind] if folder else fetch(kind, resolution, "--rae")
    state = convert_decoder(load_weights(paths["decoder"]))
    statistics = load_weights(paths["statistics"])
    if "var" not in statistics:
        raise UserError(f"{paths['statistics']}: no tensor 'var' in the latent statistics")
    config = dict(latent_dim=768, grid=resolution // 16, patch_size=16, **DECODERS["XL"])
    state = {f"decoder.{k}": v for k, v in state.items()} | {k: statistics[k] for k in ("mean", "var") if statistics.get(k) is not None}
    encoder = dict(name=DINOV2, image_size=resolution, channels=768)
    return unpack_rae(dict(encoder=encoder, decoder=config, state=state), with_encoder, encoder_weights)


def load_rae(path, device="cpu", with_encoder=True, encoder_weights=None):
    """The RAE inside any checkpoint of ours. Raises UserError naming the file."""
    content = load_file(path)
    if not isinstance(content, dict) or not content.get("rae"):
        raise UserError(f"{path}: holds no RAE; give a checkpoint of train.py from the stage rae or later")
    return unpack_rae(content["rae"], with_encoder, encoder_weights).to(device)


def center_crop(image, size):
    """ADM's crop: halve by box filter while twice too large, bicubic to the shorter side, cut out the middle. RGB."""
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def main():
    parser = Parser(description="Reconstruct an image: original left, reconstruction right.")
    parser.add_argument("image", help="image file of any size; its centre is used")
    parser.add_argument("--rae", help="checkpoint of train.py, or a folder laid out like the hub repository (default: the hub)")
    parser.add_argument("--resolution", type=int, default=256, choices=(256, 512), help="of the published RAE (default 256)")
    parser.add_argument("--encoder_weights", help="local file with the encoder's weights (default: timm's hub)")
    parser.add_argument("--out", default="reconstruction.png", help="where to write (default reconstruction.png)")
    args = parser.parse_args()
    from torchvision.transforms.functional import to_tensor
    from torchvision.utils import save_image
    if args.rae and Path(args.rae).is_file():
        rae = load_rae(args.rae, encoder_weights=args.encoder_weights)
    else:
        rae = published_rae(args.resolution, args.rae, with_encoder=True, encoder_weights=args.encoder_weights)
    try:
        image = Image.open(args.image)
        image = to_tensor(center_crop(image, rae.encoder.config["image_size"]))[None]
    except OSError as error:
        raise UserError(f"{args.image}: not a readable image ({one_line(error)})") from None
    with torch.no_grad():
        reconstruction = rae.decode(rae.encode(image)).clamp(0, 1)
    save_image(torch.cat([image, reconstruction]), args.out)
    print(f"{args.out}: PSNR {-10 * (image - reconstruction).square().mean().log10():.1f} dB")


if __name__ == "__main__":
    run_main(main)
