"""The representation autoencoder: a frozen vision transformer as encoder, a ViT decoder trained to undo it.

Paper: RAE, arXiv 2510.11690, as used by arXiv 2511.13019. The encoder was trained to understand images, not to compress
them, and is never changed; all that is learned here is the decoder, and the mean and variance of every latent entry.

    python rae.py                                # parameters and multiply-accumulates, and what one image costs
    python rae.py IMAGE                          # reconstruction beside the original: DINOv2 encoder, published decoder
    python rae.py IMAGE --rae out/toy/rae.pt     # the same with a checkpoint of `train.py --stage rae`
    python rae.py FOLDER --out pairs             # PSNR and SSIM over all its images, which go to pairs/ for rFID with fid.py

Shapes: B images, G x G = N patches (tokens), P pixels a patch side, C latent channels, D decoder width.
Images are float in [0, 1], (B, 3, S, S); latents (B, C, G, G) are normalised per entry: about mean 0, variance 1.
"""
import argparse
import difflib
import json
import logging
import math
import os
import re
import stat
import sys
import time
import zipfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import Block, VisionTransformer
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import save_image
from tqdm import tqdm

from dit import MODELS, DiTDH, count, run_block, sincos_positions

IMAGENET_MEAN, IMAGENET_STD = ((torch.tensor(c).view(3, 1, 1)) for c in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
DINOV2 = "vit_base_patch14_reg4_dinov2.lvd142m"
DECODERS = {
    "toy": dict(hidden_size=192, depth=4, num_heads=4, mlp_hidden=512),
    "S": dict(hidden_size=384, depth=12, num_heads=6, mlp_hidden=1536),
    "B": dict(hidden_size=768, depth=12, num_heads=12, mlp_hidden=3072),
    "L": dict(hidden_size=1024, depth=24, num_heads=16, mlp_hidden=4096),
    "XL": dict(hidden_size=1152, depth=28, num_heads=16, mlp_hidden=4096),
}


# ----------------------------------------------------------------------------------------------------------------------
# Encoder

class Encoder(nn.Module):
    """Frozen timm vision transformer: images -> one vector a patch, layer-normalised without affine parameters.

    name: any timm ViT (DINOv2, DINOv3, SigLIP2, MAE ...), with weights from its hub, from a local file `weights` or
    "random"; or "toy", a small ViT for 32 x 32 images whose weights come with our checkpoint. image_size: side of the
    images it is given, a multiple of 16. They are resized so that one patch covers 16 pixels: 256 -> 224 for a patch of
    14. Channels, patch, normalisation of pixels and the number of tokens to leave out are read from the network.
    """

    def __init__(self, name=DINOV2, image_size=256, weights=None, channels=96):
        super().__init__()
        mean, std = IMAGENET_MEAN, IMAGENET_STD
        if name == "toy":
            self.net = VisionTransformer(img_size=image_size, patch_size=image_size // 4, embed_dim=channels, depth=4, num_heads=4,
                                         num_classes=0, class_token=False, global_pool="", embed_layer=ConvStem)
            self.input_size = image_size
        else:
            self.input_size = image_size // 16 * patch_size_of(name)
            self.net = timm_network(name, weights, "--encoder_weights", img_size=self.input_size)
            self.net.reset_classifier(0)
            mean, std = (torch.tensor(self.net.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        self.register_buffer("pixel_mean", mean, persistent=False)
        self.register_buffer("pixel_std", std, persistent=False)
        channels = self.net.embed_dim
        self.net.norm = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.grid = self.net.patch_embed.grid_size[0]
        self.shape = (channels, self.grid, self.grid)
        self.config = dict(name=name, image_size=image_size, channels=channels) | (dict(weights="random") if weights == "random" else {})

    def forward(self, images):
        x = (images - self.pixel_mean) / self.pixel_std
        if x.shape[-1] != self.input_size:                                                      # (B, 3, S, S) -> 224 of 256 pixels
            x = F.interpolate(x, (self.input_size, self.input_size), mode="bicubic", align_corners=False)
        x = self.net.forward_features(x)[:, self.net.num_prefix_tokens:]                        # (B, N, C)
        return x.transpose(1, 2).unflatten(2, (self.grid, self.grid)).float()                   # (B, C, G, G)


def timm_network(name, weights, flag, **options):
    """A frozen network of timm, its weights from the hub, from the local file `weights`, or, for trials, "random".

    Raises UserError that names the model, where its weights were looked for, the first tensor that is missing or
    unexpected, and the flag that takes a file.
    """
    random, local = weights == "random", dict(file=str(weights)) if weights else None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it narrates its retries
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # so that "random" means the same network in every stage
        try:
            net = timm.create_model(name, pretrained=not random, pretrained_cfg_overlay=None if random else local, **options)
        except Exception as error:
            config = timm.get_pretrained_cfg(name)
            where = weights or f"{config.hf_hub_id or config.url} on the Hugging Face hub"
            raise UserError(f"no weights for {name}: looked for {where} ({one_line(error)}); give a local file with {flag}") from None
    return net.eval().requires_grad_(False)


def known_to_timm(name):
    """Whether timm itself has this model: not "hf-hub:someone/model" or "local-dir:folder", for which it would go and look.

    The name may come from a checkpoint that somebody else made.
    """
    return isinstance(name, str) and timm.is_model(name) and ("." not in name or name in timm.list_pretrained(name))


def patch_size_of(name):
    """Patch side in pixels of a vision transformer of timm; UserError where `name` is none."""
    if not known_to_timm(name):
        near = difflib.get_close_matches(name, timm.list_models(pretrained=True), n=3, cutoff=0.5)
        raise UserError(f"--encoder {name}: no model of timm" + (f"; near it: {', '.join(near)}" if near else ""))
    with reading(f"--encoder {name}", "timm cannot make it"), torch.device("meta"):
        net = timm.create_model(name)
    need(isinstance(getattr(net, "num_prefix_tokens", None), int) and hasattr(net, "patch_embed"),
         f"--encoder {name}: not a plain vision transformer; give one of timm's ViTs, such as {DINOV2}")
    return net.patch_embed.patch_size[0]


class ConvStem(nn.Module):
    """Patch embedding of the toy's encoder: three strided convolutions learn edges sooner than one 8 x 8 patch does."""

    def __init__(self, img_size, patch_size, in_chans, embed_dim, **unused):
        super().__init__()
        self.grid_size = (img_size // patch_size,) * 2
        self.num_patches = self.grid_size[0] ** 2
        layers = []
        for before, after in ((in_chans, 32), (32, 64), (64, embed_dim)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.GELU()]
        self.net = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 1))

    def forward(self, images):
        return self.net(images).flatten(2).transpose(1, 2)                                      # (B, 3, S, S) -> (B, N, C)


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
        """images (B, 3, S, S), labels (B,), noise (B, C, G, G) on the tokens -> (loss, {"mse": of pixels, "accuracy"}).

        Pixels count by their root mean square, whose gradient does not fade as they get better; its weight was tried out.
        """
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
    checkpointing = False  # as in DiTDH

    def __init__(self, latent_dim, grid, patch_size, hidden_size, depth, num_heads, mlp_hidden):
        super().__init__()
        self.config = dict(latent_dim=latent_dim, grid=grid, patch_size=patch_size, hidden_size=hidden_size, depth=depth,
                           num_heads=num_heads, mlp_hidden=mlp_hidden)
        self.patch_size = patch_size
        self.embed = nn.Linear(latent_dim, hidden_size)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, hidden_size))  # not 0: with this eps, its norm's gradient would be 1e6
        positions = sincos_positions(hidden_size, grid)[None]                                   # (1, N, D)
        self.register_buffer("pos_embed", torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1))
        norm = partial(nn.LayerNorm, eps=1e-12)
        ratio = (mlp_hidden + 0.5) / hidden_size                                                # timm multiplies, and cuts off
        self.blocks = nn.Sequential(*[Block(hidden_size, num_heads, mlp_ratio=ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth)])
        self.norm = norm(hidden_size)
        self.head = nn.Linear(hidden_size, 3 * patch_size**2)

    def forward(self, z):
        x = self.embed(z.flatten(2).transpose(1, 2))                                            # (B, N, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1) + self.pos_embed   # (B, 1 + N, D)
        for block in self.blocks:
            x = run_block(block, x, checkpointing=self.checkpointing)
        x = self.head(self.norm(x))[:, 1:]                                                      # (B, N, 3 P P)
        x = unpatchify(x.float() if x.dtype == torch.bfloat16 else x, self.patch_size)          # (B, 3, S, S)
        return x * IMAGENET_STD.to(x) + IMAGENET_MEAN.to(x)


def infer_decoder(state):
    """The arguments of Decoder that its state dict was made with, read off its shapes: all but num_heads."""
    hidden, channels = state["embed.weight"].shape
    grid, patch_size = round((state["pos_embed"].shape[1] - 1) ** 0.5), round((len(state["head.bias"]) / 3) ** 0.5)
    depth, mlp_hidden = sum(key.endswith("norm1.weight") for key in state), len(state["blocks.0.mlp.fc1.bias"])
    return dict(latent_dim=channels, grid=grid, patch_size=patch_size, hidden_size=hidden, depth=depth, mlp_hidden=mlp_hidden)


def convert_decoder(published, path="this file"):
    """State dict of a published RAE decoder (transformers' ViTMAE names) -> state dict of Decoder: all is renamed, and
    query, key and value become one matrix. Raises UserError where one of these is missing; other mistakes show on loading."""
    renamed = {"trainable_cls_token": "cls_token", "decoder_pos_embed": "pos_embed", "decoder_embed": "embed", "decoder_norm": "norm",
               "decoder_pred": "head", "decoder_layers": "blocks", "attention.output.dense": "attn.proj", "intermediate.dense": "mlp.fc1",
               "output.dense": "mlp.fc2", "layernorm_before": "norm1", "layernorm_after": "norm2"}
    state = {}
    for name, tensor in published.items():
        for theirs, ours in renamed.items():
            name = name.replace(theirs, ours)
        state[name] = tensor
    with reading(path, "not a published RAE decoder"):
        for query in [name for name in state if "attention.attention.query" in name]:
            parts = [state.pop(query.replace("query", part)) for part in ("query", "key", "value")]            # 3 x (D, D) or (D,)
            state[query.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)                   # (3 D, D) or (3 D,)
    return state


# ----------------------------------------------------------------------------------------------------------------------
# What the decoder is trained with: L1 + LPIPS + an adversarial loss whose discriminator reads frozen DINO features

def lpips_heads(path, widths=(64, 128, 256, 512, 512)):
    """The weights of VGG's channels in LPIPS, 5 x (C,), downloaded unless `path` is a file or the word "random"."""
    if path == "random":
        return [torch.rand(width, generator=torch.Generator().manual_seed(width)) for width in widths]
    path = path or download(LPIPS_URL, LPIPS_FILE, "--lpips_weights")
    state = load_weights(path)
    names = [f"lin{i}.model.1.weight" for i in range(5)]
    need(sorted(state) == names and all(plain(state[name]) and state[name].numel() == width for name, width in zip(names, widths)),
         f"{path}: not the linear heads of LPIPS on VGG (tensors {names[0]} to {names[-1]} of {widths} numbers)")
    return [state[name].flatten() for name in names]


class PerceptualDistance(nn.Module):
    """LPIPS, version 0.1 on VGG-16 (Zhang et al. 2018, arXiv 1801.03924): images in [0, 1], twice (B, 3, S, S) -> (B,).

    Features after the last ReLU of VGG's five stages, scaled to unit length at each position; squared differences,
    weighted per channel by learned numbers >= 0, averaged over positions and summed over stages.
    """

    def __init__(self, vgg_weights=None, lpips_weights=None):
        super().__init__()
        features = timm_network("vgg16.tv_in1k", vgg_weights, "--vgg_weights").features
        self.stages = nn.ModuleList([features[start:end] for start, end in ((0, 4), (4, 9), (9, 16), (16, 23), (23, 30))])
        for i, head in enumerate(lpips_heads(lpips_weights)):
            self.register_buffer(f"head{i}", head.view(-1, 1, 1))                               # (C, 1, 1)

    def features(self, images):
        x = (images - IMAGENET_MEAN.to(images)) / IMAGENET_STD.to(images)
        for stage in self.stages:
            x = stage(x)                                                                        # (B, C, h, w), each stage half as high
            yield F.normalize(x.float(), dim=1, eps=1e-10)

    def forward(self, images, references):
        with torch.no_grad():
            references = [*self.features(references)]
        return sum(((a - b).square() * getattr(self, f"head{i}")).sum(1).mean((1, 2))
                   for i, (a, b) in enumerate(zip(self.features(images), references)))


class Discriminator(nn.Module):
    """Real or decoded? Five small heads on frozen DINO features: images in [0, 1], (B, 3, S, S) -> logits (B, 5 N).

    Features of blocks 2, 5, 8, 11 and of the last norm of DINO ViT-S/8; the CLS token is added to every patch token.
    A head is spectrally normalised convolutions along the tokens: of one, of nine (circular, residual), and the logit.
    Its batch norm sees real and decoded images in one batch; in eval mode (the decoder's turn) it uses running means.
    """

    def __init__(self, image_size=256, weights=None):
        super().__init__()
        self.size = min(224, image_size // 8 * 8)
        self.net = timm_network("vit_small_patch8_224.dino", weights, "--dino_weights", img_size=self.size)
        norm = nn.utils.parametrizations.spectral_norm
        conv = lambda width: nn.Conv1d(self.net.embed_dim, self.net.embed_dim, width, padding=width // 2, padding_mode="circular")
        block = lambda width: nn.Sequential(norm(conv(width)), nn.BatchNorm1d(self.net.embed_dim), nn.LeakyReLU(0.2))
        self.heads = nn.ModuleList([nn.ModuleList([block(1), block(9), norm(nn.Conv1d(self.net.embed_dim, 1, 1))]) for _ in range(5)])

    def forward(self, images):
        x = (images - IMAGENET_MEAN.to(images)) / IMAGENET_STD.to(images)
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="area" if x.shape[-1] > self.size else "bicubic")
        last, features = self.net.forward_intermediates(x, indices=[2, 5, 8, 11], return_prefix_tokens=True, output_fmt="NLC")
        features = [patches + cls for patches, cls in features] + [last[:, 1:] + last[:, :1]]   # 5 x (B, N, D)
        logits = []
        for (one, nine, logit), x in zip(self.heads, features):
            x = one(x.transpose(1, 2))                                                          # (B, D, N)
            logits.append(logit((x + nine(x)) / 2**0.5).flatten(1))                             # (B, N)
        return torch.cat(logits, 1).float()                                                     # (B, 5 N)


def augment(images, uniform):
    """DiffAug (Zhao et al. 2020, arXiv 2006.10738), colour and translation: differentiable, so that it may stand between
    decoder and discriminator. images (B, 3, S, S) in [0, 1], uniform (B, 5) in [0, 1) -> (B, 3, S, S)."""
    brightness, saturation, contrast, down, across = uniform.T.reshape(5, -1, 1, 1, 1)          # 5 x (B, 1, 1, 1)
    x = images + (brightness - 0.5) / 2
    for factor, over in ((2 * saturation, 1), (0.5 + contrast, (1, 2, 3))):
        grey = x.mean(over, keepdim=True)
        x = grey + factor * (x - grey)
    side, reach = x.shape[-1], x.shape[-1] // 8                                                 # shifts of up to an eighth, over mid-grey
    x = F.pad(x, [reach] * 4, value=0.5)                                                        # (B, 3, S + 2 reach, S + 2 reach)
    row, column = ((torch.arange(side, device=x.device) + (u.flatten(1) * (2 * reach + 1)).long()) for u in (down, across))  # 2 x (B, S)
    return x[torch.arange(len(x), device=x.device)[:, None, None], :, row[:, :, None], column[:, None]].permute(0, 3, 1, 2)  # (B, 3, S, S)


def reconstruction_loss(reconstruction, images, perceptual=None, perceptual_weight=1.0, discriminator=None, adversarial_weight=0.75,
                        last_layer=None):
    """L1 + perceptual_weight LPIPS + adversarial_weight w GAN, of reconstruction and images (B, 3, S, S) in [0, 1].

    perceptual(a, b) -> (B,); discriminator(reconstruction) -> logits, and GAN is their mean, negated. w makes both
    sides pull equally: the ratio of the norms of their gradients at the decoder's last_layer, at most 1e4; of several
    processes or micro-batches each has its own.
    Returns (loss, metrics); metrics: "mse", "psnr" (dB), "l1" and, of the parts in use, "lpips", "gan", "gan_weight".
    """
    mse, l1 = (reconstruction - images).square().mean().detach(), (reconstruction - images).abs().mean()
    loss, metrics = l1, {"mse": mse, "psnr": -10 * mse.log10(), "l1": l1.detach()}
    if perceptual is not None:
        lpips = perceptual(reconstruction, images).mean()
        loss, metrics["lpips"] = loss + perceptual_weight * lpips, lpips.detach()
    if discriminator is None:
        return loss, metrics
    gan = -discriminator(reconstruction).mean()
    # d loss / d decoder = (d loss / d image) (d image / d decoder). The first factor of both terms is taken once, here at the
    # image; `pull` then has the gradient of the whole loss, and the last line gives it the loss's value.
    pulls = [torch.autograd.grad(term, reconstruction)[0] for term in (loss, gan)]              # 2 x (B, 3, S, S)
    norms = [torch.autograd.grad(reconstruction, last_layer, pull, retain_graph=True)[0].norm() for pull in pulls]
    weight = adversarial_weight * (norms[0] / (norms[1] + 1e-6)).clamp(max=1e4)
    pull = (reconstruction * (pulls[0] + weight * pulls[1])).sum()
    loss = (loss + weight * gan).detach() + pull - pull.detach()
    return loss, metrics | {"gan": gan.detach(), "gan_weight": weight}


def discriminator_loss(discriminator, images, reconstruction):
    """Hinge loss: logits of images above 1, of reconstructions below -1. Returns (loss, {"d_loss", "d_accuracy"})."""
    real, fake = discriminator(torch.cat([images, reconstruction])).chunk(2)                    # 2 x (B, 5 N)
    loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return loss, {"d_loss": loss.detach(), "d_accuracy": ((real > 0).float().mean() + (fake < 0).float().mean()) / 2}


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of images (B, 3, S, S) in [0, 1], S >= 11 -> (B,).

    Gaussian window of 11, sigma 1.5, wholly inside the image; each colour alone, averaged. In float64: variances are
    differences of near numbers.
    """
    a, b = a.double(), b.double()
    line = torch.exp(-(torch.arange(11, device=a.device) - 5.0) ** 2 / (2 * 1.5**2)).double()
    window = (line[:, None] * line / line.sum() ** 2)[None, None]                               # (1, 1, 11, 11)
    blur = lambda x: F.conv2d(x.flatten(0, 1)[:, None], window)                                 # (B, 3, S, S) -> (3 B, 1, S - 10, S - 10)
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, covariance = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (var_a + var_b + 0.03**2)
    return (luminance * structure).view(len(a), -1).mean(1).float()                             # (B,)


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
    """encode: images -> normalised latents; decode: back. mean, var: (C, G, G) or None (mean 0; without var, no scaling).

    1e-5 under the root is the published RAE's.
    """

    def __init__(self, encoder, decoder, mean=None, var=None):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.encoder_config = getattr(encoder, "config", None)
        self.register_buffer("mean", mean)
        self.register_buffer("var", var)

    @property
    def latent_shape(self):
        return self.decoder.config["latent_dim"], self.decoder.config["grid"], self.decoder.config["grid"]

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


def unpack_rae(packed, with_encoder=False, encoder_weights=None, path="this checkpoint"):
    """Undo RAE.packed(). A public encoder is fetched only where with_encoder asks for it. Raises UserError that names `path`.

    The file may be anybody's, so sizes are read off its tensors, and the encoder must be one that timm knows by name.
    """
    with reading(path, "its RAE is damaged"):
        state, given, num_heads = packed["state"], packed["encoder"], packed["decoder"]["num_heads"]
        config = infer_decoder({key.removeprefix("decoder."): value for key, value in state.items() if key.startswith("decoder.")})
        shape = (config["latent_dim"], config["grid"], config["grid"])
        encoder = dict(name=given["name"], image_size=config["grid"] * config["patch_size"], channels=shape[0])
        encoder |= dict(weights="random") if "weights" in given else {}
        need(encoder["name"] == "toy" or known_to_timm(encoder["name"]),
             f"{path}: its encoder {one_line(encoder['name'])} is no model of timm")
        need(encoder == given, f"{path}: its encoder {one_line(given)} is not that of its decoder, {encoder}")
        need(type(num_heads) is int and num_heads > 0, f"{path}: num_heads of its decoder is {one_line(num_heads)}; make or fetch it again")
        with torch.device("meta"):
            moments = [torch.empty(shape) if key in state else None for key in ("mean", "var")]
            rae = RAE(Encoder(**encoder) if encoder["name"] == "toy" else None, Decoder(**config, num_heads=num_heads), *moments)
        fill(rae, state)
    rae.encoder_config = encoder  # known even where the encoder itself is not needed
    if with_encoder and rae.encoder is None:
        rae.encoder = Encoder(encoder["name"], encoder["image_size"], encoder_weights or encoder.get("weights"))
        need(rae.encoder.shape == shape, f"{path}: its decoder takes latents {shape}, but {encoder['name']} gives {rae.encoder.shape}")
    return rae.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# Images

def read_image(path):
    """An image file -> PIL image, RGB. Raises UserError where it cannot be read, or has more than eight bits a channel."""
    with reading(path, "not a readable image"), Image.open(path) as image:
        need(image.mode[0] not in "IF", f"{path}: its pixels ({image.mode}) are not 8-bit; convert it to 8-bit RGB")
        return image.convert("RGB")


def to_uint8(images):
    """Images in [0, 1] -> uint8, rounded to nearest: the one rounding rule of this project."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def shrink(image, side):
    """As ADM resizes, RGB: halve by box filter while twice too large, then bicubic until the shorter side is `side`."""
    image = image.convert("RGB")
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def center_crop(image, size):
    """ADM's crop, (size, size) in RGB: shrink the shorter side to it, cut out the middle."""
    image = shrink(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image, size, across, down):
    """The decoder's training crop: shorter side to 1.5 size (384 for 256), then the window at shares across, down of the room."""
    image = shrink(image, size * 3 // 2)
    left, top = int(across * (image.width - size + 1)), int(down * (image.height - size + 1))
    return image.crop((left, top, left + size, top + size))


# ----------------------------------------------------------------------------------------------------------------------
# Files: whatever is wrong with one ends in one line that names it

class UserError(ValueError):
    """Something the user can mend: its text is one line that names the file or flag, and it is all that is printed."""


class ProcessLost(UserError):
    """Another process is dead or hung. Every process that is left says so: the first one may be the one that is gone."""


def one_line(error):
    """An exception, or anything else that may be long, in at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def plural(number, noun):
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def need(condition, message):
    """How files and flags are refused: "what: what is wrong; what to do"."""
    if not condition:
        raise UserError(" ".join(message.split()))


@contextmanager
def reading(path, what):
    """Whatever a damaged file makes its reader raise becomes one line that names it: PIL, zipfile, torch and numpy have dozens of kinds."""
    try:
        yield
    except UserError:
        raise
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"{path}: {error.strerror.lower()}") from None
    except Exception as error:
        kind, detail = type(error).__name__, one_line(error).split(". ")[0]  # a first sentence is enough
        reason = kind if detail == kind else f"{kind}: {detail}"
        raise UserError(f"{path}: {what} ({reason}); make or fetch it again") from None


def load_file(path):
    """torch.load of a checkpoint, on the CPU, tensors and plain containers only. Raises UserError naming the file.

    torch.load ignores the checksums in a file of its own, and would take a tensor with a flipped byte: they are checked first.
    """
    with reading(path, "not a readable checkpoint, or cut short"):
        regular = stat.S_ISREG(os.stat(path).st_mode)  # a pipe might never end
        need(regular, f"{path}: is a folder, a pipe or a device, not a checkpoint file")
        if zipfile.is_zipfile(path):  # else it may be of torch's old format, which has no checksums
            with zipfile.ZipFile(path) as archive:
                need(archive.testzip() is None, f"{path}: is damaged, it does not match its own checksums; make or fetch it again")
        return torch.load(path, map_location="cpu", weights_only=True)


def load_weights(path, content=None):
    """State dict of a file that holds it bare or under "ema" / "model", with or without wrappers' prefixes."""
    content = load_file(path) if content is None else content
    need(isinstance(content, dict), f"{path}: holds no state dict, but {type(content).__name__}")
    state = next((content[key] for key in ("ema", "model") if content.get(key) is not None), content)
    need(isinstance(state, dict), f"{path}: holds no state dict, but {type(state).__name__}")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", str(key)): value for key, value in state.items() if value is not None}


def plain(x):
    """Whether x is a tensor of real numbers in memory, as weights are: a file may also hold sparse, quantised or empty ones."""
    return torch.is_tensor(x) and x.is_floating_point() and x.layout == torch.strided and x.device.type == "cpu" and not x.is_nested


def fill(net, state):
    """Give a network made on the "meta" device its weights: no time or memory goes into random ones. To be called within reading()."""
    for key, value in state.items():
        if not plain(value):
            raise ValueError(f"{key} is no tensor of real numbers")
    net.load_state_dict({key: value.float().contiguous() for key, value in state.items()}, assign=True)


# ----------------------------------------------------------------------------------------------------------------------
# Published weights

LPIPS_URL = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth"
LPIPS_FILE = "lpips-vgg-a78928a0.pth"  # ends in the first digits of its sha256, which the download is held against
HUB = "nyu-visionx/RAE-collections"  # Hugging Face repository of the published weights, and where each file lies in it
HUB_REVISION = "main"  # a commit hash pins it; which one could not be looked up without a network
HUB_FILES = {
    256: dict(decoder="decoders/dinov2/wReg_base/ViTXL_n08/model.pt", statistics="stats/dinov2/wReg_base/imagenet1k/stat.pt",
              teacher="DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt"),
    512: dict(decoder="decoders/dinov2/wReg_base/ViTXL_n08_i512/model.pt", statistics="stats/dinov2/wReg_base/imagenet1k_512/stat.pt",
              teacher="DiTs/Dinov2/wReg_base/ImageNet512/DiTDH-XL_ep400/stage2_model.pt"),
}


def download(url, name, flag):
    """Path of a file in torch's cache, fetched on first use and held against the start of its sha256, with which its name ends."""
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, path, path.stem[-8:], progress=sys.stderr.isatty())
        except Exception as error:
            raise UserError(f"{path}: not there, nor to be had from {url} ({one_line(error)}); give a local file with {flag}") from None
    return path


def fetch(kind, resolution, flag, folder=None):
    """Path of a published file ("decoder", "statistics" or "teacher"): in `folder`, laid out like the hub's repository, or
    downloaded to the hub's cache on first use."""
    need(resolution in HUB_FILES, f"no published {kind} for resolution {resolution}, only for 256 and 512; give ours with {flag}")
    name = HUB_FILES[resolution][kind]
    if folder:
        return Path(folder) / name
    from huggingface_hub import hf_hub_download
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return hf_hub_download(HUB, name, revision=HUB_REVISION)
    except Exception as error:
        raise UserError(f"no {kind} for resolution {resolution}: looked for {name} of {HUB} in the local cache and on the Hugging Face "
                        f"hub ({type(error).__name__}); give a local path with {flag}") from None


def published_rae(resolution, folder=None, with_encoder=False, encoder_weights=None):
    """The published RAE of a resolution, from the hub or from a folder laid out like it."""
    path, moments_path = (fetch(kind, resolution, "--rae", folder) for kind in ("decoder", "statistics"))
    published = load_weights(path)
    with reading(path, "not a published RAE decoder"):
        decoder = convert_decoder(published, path)
        channels, grid, hidden = (infer_decoder(decoder)[key] for key in ("latent_dim", "grid", "hidden_size"))
    heads = next((size["num_heads"] for size in DECODERS.values() if size["hidden_size"] == hidden), hidden // 64)
    with reading(moments_path, "no latent statistics"):
        moments = load_weights(moments_path)
        need("var" in moments and {"mean", "var"} >= set(moments),
             f"{moments_path}: no latent statistics, tensors 'var' and perhaps 'mean', but {one_line(', '.join(sorted(moments)))}")
        for key, value in moments.items():
            need(plain(value) and value.numel() == channels * grid * grid,
                 f"{moments_path}: '{key}' is {tuple(value.shape)}, but the decoder takes latents {(channels, grid, grid)} of real numbers")
    state = {f"decoder.{key}": value for key, value in decoder.items()}
    state |= {key: value.reshape(channels, grid, grid) for key, value in moments.items()}
    encoder = dict(name=DINOV2, image_size=resolution, channels=channels)
    return unpack_rae(dict(encoder=encoder, decoder=dict(num_heads=heads), state=state), with_encoder, encoder_weights, path)


def load_rae(path, device="cpu", with_encoder=True, encoder_weights=None):
    """The RAE inside any checkpoint of ours. Raises UserError naming the file."""
    content = load_file(path)
    need(isinstance(content, dict) and content.get("rae") is not None,
         f"{path}: holds no RAE; give a checkpoint of train.py from the stage rae or later")
    return unpack_rae(content["rae"], with_encoder, encoder_weights, path).to(device)


def rae_from(given, resolution, with_encoder=True, encoder_weights=None):
    """What a flag --rae names: a checkpoint of ours, or a folder laid out like the hub; None: the hub itself."""
    if given and not Path(given).is_dir():
        return load_rae(given, with_encoder=with_encoder, encoder_weights=encoder_weights)
    return published_rae(resolution, given, with_encoder, encoder_weights)


# ----------------------------------------------------------------------------------------------------------------------
# Command line

MEANFLOW_GMACS = 118.6, 311.1  # MeanFlow XL/2 (675.4M) and the SD-VAE's decoder (49.5M) at 256, all matrix products and convolutions


class Parser(argparse.ArgumentParser):
    """Its help has one line a flag; a mistake is a UserError."""

    def __init__(self, **options):
        super().__init__(**dict(formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=27, width=140)) | options)

    def error(self, message):
        unknown = re.search(r"unrecognized arguments: (--\w+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1) if unknown else []
        raise UserError(f"{message} ({f'is it {near[0]}? ' if near else ''}see --help)")


def at_least(minimum, most=10**12):
    """The type of a flag: a whole number of at least `minimum`, and at most `most`: more is a slip, and would fill the memory."""
    def parse(text):
        if text.isdecimal() and (len(text) > 15 or int(text) > most):
            raise argparse.ArgumentTypeError(f"must be at most {most}")
        if not text.isdigit() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, not {text!r}")
        return int(text)
    return parse


def between(low, high):
    """The type of a flag: a number between low and high."""
    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a number between {low:g} and {high:g}, not {text!r}")
        return value
    return parse


def pick_device(name):
    """What --device names, or a GPU if there is one, or the CPU. Raises UserError where torch has no such device."""
    try:
        number = torch.zeros(1, device=name or ("cuda" if torch.cuda.is_available() else "cpu"))
        number.item()  # the device "meta" holds none
        return str(number.device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name}: not to be had ({one_line(error)}); leave the flag out to use what there is") from None


def run_main(main):
    """Run a script's main(): what a user can mend ends it in one line (of the first process only) and exit status 2."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError):
            text = f"{one_line(error)}; give a smaller --batch_size or, to train.py, --micro_batch and --checkpointing"
        line = " ".join(f"{Path(sys.argv[0]).name}: {text}".splitlines())  # a name may hold a line break
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, ProcessLost):
            tqdm.write(line, file=sys.stderr)  # a line of its own, also while a progress bar is shown
        if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun ends with a report of its own: let it name the reason too
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(
                json.dumps({"message": {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}}))
        sys.exit(2)


def print_costs():
    """Parameters and multiply-accumulates (MACs) of one image, and how one step compares with one in the latents of a VAE."""
    one, label, rows = torch.ones(1, device="meta"), torch.zeros(1, dtype=torch.long, device="meta"), {}
    with torch.device("meta"):
        for size in (256, 512):
            latent = torch.empty(1, 768, size // 16, size // 16)
            pixels = size // 16 * 14
            rows[f"encoder DINOv2-B, {size}"] = count(timm.create_model(DINOV2, img_size=pixels), torch.empty(1, 3, pixels, pixels))
            for name in ("S", "B", "L", "XL"):
                rows[f"decoder {name}, {size}"] = count(Decoder(768, size // 16, 16, **DECODERS[name]), latent)
            student = DiTDH(size // 16, 768, num_classes=1000, average_velocity=True, **MODELS["XL"])
            rows[f"DiTDH XL, {size}"] = count(student, latent, one, label, one)
    print("MACs of one image, all matrix products and convolutions counted\n")
    for name, (parameters, macs) in rows.items():
        print(f"{name:24} {parameters / 1e6:8.1f}M {macs / 1e9:8.1f} G")
    ours, theirs = (rows["DiTDH XL, 256"][1] + rows["decoder XL, 256"][1]) / 1e9, sum(MEANFLOW_GMACS)
    print(f"\none step at 256: {ours:.1f} G here, {theirs:.1f} G for MeanFlow XL/2 with the SD-VAE: {1 - ours / theirs:.0%} less")
    print("(the paper: 263 against 424, 38%; it leaves out attention in some rows)")


@torch.no_grad()
def reconstruct(rae, files, args):
    """Yield originals and reconstructions of image files, uint8 (B, 3, S, S), a batch at a time."""
    for first in tqdm(range(0, len(files), args.batch_size), desc="reconstruct", unit="batch", disable=len(files) == 1):
        crops = [center_crop(read_image(path), rae.encoder_config["image_size"]) for path in files[first:first + args.batch_size]]
        originals = torch.stack([pil_to_tensor(crop) for crop in crops]).to(args.device)        # (B, 3, S, S)
        yield originals, to_uint8(rae.decode(rae.encode(originals / 255)))


def main():
    what_it_does = "Reconstruct an image, or score the reconstructions of a folder; without either, print what the networks cost."
    parser = Parser(description=what_it_does, epilog="examples:\n" + __doc__.split("\n\n")[2])
    what, how = parser.add_argument_group("what to reconstruct"), parser.add_argument_group("with what")
    what.add_argument("image", nargs="?", help="image of any size, of which the centre is used; or a folder of images")
    what.add_argument("--out", metavar="PATH", help="the picture of an image (default reconstruction.png), the folder for a folder's pairs")
    how.add_argument("--rae", metavar="PATH", help="checkpoint of train.py, or folder laid out like the hub (default: the hub)")
    how.add_argument("--resolution", type=int, default=256, choices=(256, 512), help="side in pixels of the published RAE (default 256)")
    how.add_argument("--encoder_weights", metavar="FILE", help="the encoder's weights, or the word random (default: timm's hub)")
    how.add_argument("--batch_size", metavar="N", type=at_least(1), default=32, help="images at a time (default 32)")
    how.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    args = parser.parse_args()
    if not args.image:
        return print_costs()
    args.device, image = pick_device(args.device), Path(args.image)
    files = sorted(path for path in image.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS) if image.is_dir() else [image]
    need(files, f"{image}: no images in this folder")
    rae = rae_from(args.rae, args.resolution, encoder_weights=args.encoder_weights).to(args.device)
    folders = [Path(args.out) / name for name in ("originals", "reconstructions")] if image.is_dir() and args.out else []
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    scores = []
    for pair in reconstruct(rae, files, args):
        for folder, images in zip(folders, pair):
            for i, one in enumerate(images.cpu(), len(scores) * args.batch_size):
                to_pil_image(one).save(folder / f"{i:06d}.png")
        a, b = (images / 255 for images in pair)                                                # 2 x (B, 3, S, S)
        psnr = -10 * (a - b).square().mean((1, 2, 3)).clamp_min(1e-10).log10()                  # (B,)
        scores.append(torch.stack([psnr, ssim(a, b)]).cpu())                                    # (2, B)
    psnr, similarity = torch.cat(scores, 1).mean(1)
    if not image.is_dir():
        try:
            save_image(torch.cat([a, b]), args.out or "reconstruction.png")
        except (OSError, ValueError) as error:
            raise UserError(f"--out {args.out}: cannot be written ({one_line(error)}); give a name that ends in .png") from None
        print(f"{args.out or 'reconstruction.png'}: the image and its reconstruction")
    print(f"{image}: {plural(len(files), 'image')}, PSNR {psnr:.2f} dB, SSIM {similarity:.4f}")
    if folders:
        print(f"rFID: python fid.py {folders[1]} {folders[0]}")


if __name__ == "__main__":
    run_main(main)
