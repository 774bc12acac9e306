"""The representation autoencoder: a frozen vision transformer as encoder, and a ViT decoder that inverts it.

Paper: RAE, arXiv 2510.11690, as used by arXiv 2511.13019. The encoder was trained to understand images, not to compress
them, and stays as it is. Stage rae learns the decoder, and the mean and variance of every latent entry.

    python rae.py IMAGE                          # the image beside its reconstruction by the published RAE
    python rae.py FOLDER --rae out/toy/rae.pt    # all images of a folder, by the RAE of a checkpoint of train.py

Shapes: B images, G x G = N patches (tokens), P pixels a patch side, C latent channels, D decoder width.
Images are float in [0, 1], (B, 3, S, S). Latents (B, C, G, G) are normalised: mean 0 and variance 1 per entry.
"""
import argparse
import sys
from functools import partial
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image
from timm.models.vision_transformer import Block, VisionTransformer
from torchvision.datasets.folder import is_image_file
from torchvision.transforms.v2.functional import normalize, pil_to_tensor
from torchvision.utils import save_image
from tqdm import tqdm

from dit import fill, load_file, run_block, sincos_positions, state_dict_of

IMAGENET_MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
IMAGENET_STD = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
DINOV2 = "vit_base_patch14_reg4_dinov2.lvd142m"
DECODERS = {
    "toy": dict(hidden_size=192, depth=4, num_heads=4, mlp_hidden=512),
    "S": dict(hidden_size=384, depth=12, num_heads=6, mlp_hidden=1536),
    "B": dict(hidden_size=768, depth=12, num_heads=12, mlp_hidden=3072),
    "XL": dict(hidden_size=1152, depth=28, num_heads=16, mlp_hidden=4096),
}


# ----------------------------------------------------------------------------------------------------------------------
# Encoder, decoder, and both together

class Encoder(nn.Module):
    """Frozen ViT of timm, or "toy": images -> layer-normalised patch vectors (B, C, G, G). weights: timm_network."""

    def __init__(self, name=None, image_size=256, channels=96, weights=None):
        super().__init__()
        name, self.pixel_mean, self.pixel_std = name or DINOV2, IMAGENET_MEAN, IMAGENET_STD
        if name == "toy":
            self.input_size = image_size
            self.net = VisionTransformer(image_size, image_size // 4, num_classes=0, embed_dim=channels, depth=4,
                                         num_heads=4, class_token=False, global_pool="", embed_layer=ConvStem)
        else:
            self.net = timm_network(name, weights)
            self.input_size = image_size // 16 * self.net.patch_embed.patch_size[0]             # 16 pixels a patch
            self.net.set_input_size(img_size=self.input_size)
            self.pixel_mean, self.pixel_std = (self.net.pretrained_cfg[key] for key in ("mean", "std"))
        self.net.norm = nn.LayerNorm(self.net.embed_dim, eps=1e-6, elementwise_affine=False)
        self.grid = self.net.patch_embed.grid_size[0]
        self.config = dict(name=name, image_size=image_size, channels=self.net.embed_dim)

    def forward(self, images):
        x = normalize(images, self.pixel_mean, self.pixel_std)
        x = F.interpolate(x, self.input_size, mode="bicubic", align_corners=False)              # 256 -> 224
        x = self.net.forward_features(x)[:, self.net.num_prefix_tokens:]                        # (B, N, C)
        return x.transpose(1, 2).unflatten(2, (self.grid, self.grid)).float()                   # (B, C, G, G)


def timm_network(name, weights=None, **options):
    """A frozen network of timm. weights: as in fetch, of timm/NAME/model.safetensors; or "random", for trials."""
    if not timm.is_model_pretrained(name):                                                      # never another hub
        raise SystemExit(f"{name}: no model of timm; give one of timm.list_pretrained('vit*'), such as {DINOV2}")
    if weights != "random":
        path = fetch("model.safetensors", timm.get_pretrained_cfg(name).hf_hub_id, weights)
        options["pretrained_cfg_overlay"] = dict(state_dict=timm.models.load_state_dict(path))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)                                                                    # for "random"
        net = timm.create_model(name, pretrained=weights != "random", **options)
    return net.eval().requires_grad_(False)


class ConvStem(nn.Module):
    """Patch embedding of the toy's encoder: three strided convolutions learn edges sooner than one 8 x 8 patch does."""

    def __init__(self, img_size, patch_size, in_chans, embed_dim, **unused):
        super().__init__()
        self.grid_size, self.num_patches, layers = (img_size // patch_size,) * 2, (img_size // patch_size) ** 2, []
        for before, after in ((in_chans, 32), (32, 64), (64, embed_dim)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.GELU()]
        self.net = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 1))

    def forward(self, images):
        return self.net(images).flatten(2).transpose(1, 2)                                      # (B, N, C)


class Decoder(nn.Module):
    """Vision transformer from latents (B, C, G, G), not normalised, to images (B, 3, G P, G P) of about [0, 1]."""
    checkpointing = False  # as in DiTDH

    def __init__(self, latent_dim, grid, patch_size, hidden_size, depth, num_heads, mlp_hidden):
        super().__init__()
        self.config = dict(latent_dim=latent_dim, grid=grid, patch_size=patch_size, hidden_size=hidden_size,
                           depth=depth, num_heads=num_heads, mlp_hidden=mlp_hidden)
        self.patches = (grid, grid, patch_size, patch_size, 3)
        self.embed = nn.Linear(latent_dim, hidden_size)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, hidden_size))                    # at 0 its norm explodes
        positions = sincos_positions(hidden_size, grid)                                         # (N, D)
        self.register_buffer("pos_embed", F.pad(positions, (0, 0, 1, 0))[None])                 # (1, 1 + N, D)
        norm, ratio = partial(nn.LayerNorm, eps=1e-12), (mlp_hidden + 0.5) / hidden_size        # timm rounds down
        self.blocks = nn.Sequential(*[Block(hidden_size, num_heads, mlp_ratio=ratio, qkv_bias=True, norm_layer=norm)
                                      for _ in range(depth)])
        self.norm = norm(hidden_size)
        self.head = nn.Linear(hidden_size, 3 * patch_size**2)

    def forward(self, z):
        x = self.embed(z.flatten(2).transpose(1, 2))                                            # (B, N, D)
        cls = self.cls_token.expand(len(x), -1, -1).to(x.dtype)                                 # (B, 1, D)
        x = torch.cat([cls, x], dim=1) + self.pos_embed                                         # (B, 1 + N, D)
        for block in self.blocks:
            x = run_block(block, x, checkpointing=self.checkpointing)
        x = self.head(self.norm(x))[:, 1:]                                                      # (B, N, 3 P P)
        x = x.reshape(-1, *self.patches).permute(0, 5, 1, 3, 2, 4)                              # (B, 3, G, P, G, P)
        x = x.flatten(4, 5).flatten(2, 3)                                                       # (B, 3, G P, G P)
        return x * IMAGENET_STD.to(x.device) + IMAGENET_MEAN.to(x.device)                       # bfloat16 -> float32


def convert_decoder(state):
    """State dict of a published RAE decoder (names of transformers' ViTMAE) -> of Decoder."""
    renamed = {"trainable_": "", "decoder_layers": "blocks", "decoder_pred": "head", "decoder_": "",
               "attention.attention": "attn", "attention.output.dense": "attn.proj", "intermediate.dense": "mlp.fc1",
               "output.dense": "mlp.fc2", "layernorm_before": "norm1", "layernorm_after": "norm2"}
    for theirs, ours in renamed.items():
        state = {name.replace(theirs, ours): tensor for name, tensor in state.items()}
    for query in [name for name in state if "attn.query" in name]:
        parts = [state.pop(query.replace("query", part)) for part in ("query", "key", "value")]
        state[query.replace("query", "qkv")] = torch.cat(parts)                                 # (3 D, D), (3 D,)
    return state


class RAE(nn.Module):
    """encode: images -> normalised latents. decode: back. mean, var: (C, G, G), or None for 0 and no scaling."""

    def __init__(self, encoder, decoder, mean=None, var=None):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.encoder_config = getattr(encoder, "config", None)
        self.register_buffer("mean", mean)
        self.register_buffer("var", var)
        self.latent_shape = tuple(decoder.config[key] for key in ("latent_dim", "grid", "grid"))
        self.image_size = decoder.config["grid"] * decoder.config["patch_size"]

    @torch.no_grad()
    def encode(self, images):
        """Images (B, 3, S, S) in [0, 1] -> (B, C, G, G)."""
        z = self.encoder(images)
        z = z if self.mean is None else z - self.mean
        return z if self.var is None else z / (self.var + 1e-5).sqrt()                          # the published 1e-5

    def decode(self, z):
        """Normalised latents (B, C, G, G) -> images (B, 3, S, S), about [0, 1], not clamped."""
        z = z if self.var is None else z * (self.var + 1e-5).sqrt()
        return self.decoder(z if self.mean is None else z + self.mean)

    def reencode(self, z):
        """Latents (B, C, G, G) -> those of the images that they decode to: without what the decoder does not draw."""
        return self.encode(self.decode(z).clamp(0, 1))

    def fetch_encoder(self, weights=None):
        """Load the public encoder. Only who encodes needs it; sampling and stage mid do not. -> self"""
        if self.encoder is None:
            if self.encoder_config["name"] == "toy":
                raise SystemExit("a released checkpoint of the toy has no encoder; give that of a training run")
            self.encoder = Encoder(**self.encoder_config, weights=weights)
        return self

    @torch.no_grad()
    def measure(self, latents):
        """Set mean and variance to those of batches (B, C, G, G), over all processes; exact in any sizes and order."""
        sums = 0
        for z in latents:
            z = z.double()
            sums = sums + torch.stack([torch.ones_like(z), z, z.square()]).sum(1)               # (3, C, G, G)
        if dist.is_initialized():
            dist.all_reduce(sums)
        mean, mean_square = sums[1:] / sums[0]
        self.mean, self.var = mean.float(), (mean_square - mean**2).clamp_min(0).float()

    def packed(self):
        """All that load_rae needs, except the weights of a public encoder."""
        keep_encoder = self.encoder_config["name"] == "toy"
        state = {k: v for k, v in self.state_dict().items() if keep_encoder or not k.startswith("encoder.")}
        return dict(encoder=self.encoder_config, decoder=self.decoder.config, state=state)


def load_rae(path, packed=None):
    """The RAE in a checkpoint of ours, or what `packed` holds, frozen; without a public encoder, see fetch_encoder."""
    packed = packed or load_file(path).get("rae")
    if packed is None:
        raise SystemExit(f"{path}: holds no RAE; give a finished checkpoint of train.py")
    state, config = packed["state"], packed["encoder"]
    with torch.device("meta"):
        encoder = Encoder(**config) if any(name.startswith("encoder.") for name in state) else None
        rae = RAE(encoder, Decoder(**packed["decoder"]), state.get("mean"), state.get("var"))
    rae.encoder_config = config
    return fill(rae, state, path)


# ----------------------------------------------------------------------------------------------------------------------
# Stage "rae": L1 + LPIPS + an adversarial loss whose discriminator reads frozen DINO features

def reconstruction_loss(reconstruction, images, perceptual=None, perceptual_weight=1.0, discriminator=None,
                        adversarial_weight=0.75, last_layer=None):
    """L1 + perceptual_weight LPIPS + adversarial_weight w GAN, of images (B, 3, S, S) in [0, 1] -> (loss, metrics).

    perceptual(a, b) -> (B,). discriminator(reconstruction) -> logits; GAN is minus their mean. w, at most 1e4, makes
    the gradients of both sides at the decoder's last_layer equally long.
    """
    mse, l1 = (reconstruction - images).square().mean().detach(), (reconstruction - images).abs().mean()
    loss, metrics = l1, {"mse": mse, "psnr": -10 * mse.clamp_min(1e-10).log10(), "l1": l1.detach()}
    if perceptual is not None:
        lpips = perceptual(reconstruction, images).mean()
        loss, metrics["lpips"] = loss + perceptual_weight * lpips, lpips.detach()
    if discriminator is not None:
        gan = -discriminator(reconstruction).mean()
        gradient = [torch.autograd.grad(term, last_layer, retain_graph=True)[0].norm() for term in (loss, gan)]
        weight = adversarial_weight * (gradient[0] / (gradient[1] + 1e-6)).clamp(max=1e4)
        loss, metrics["gan"], metrics["gan_weight"] = loss + weight * gan, gan.detach(), weight
    return loss, metrics


class PerceptualDistance(nn.Module):
    """LPIPS 0.1 (arXiv 1801.03924): weighted squared differences of VGG-16's features. 2 x (B, 3, S, S) -> (B,)."""

    def __init__(self, weights=None):
        super().__init__()
        vgg = timm_network("vgg16.tv_in1k", weights).features
        self.stages = nn.ModuleList([vgg[:4], vgg[4:9], vgg[9:16], vgg[16:23], vgg[23:30]])
        learned = None if weights == "random" else load_file(fetch(LPIPS_FILE, LPIPS_URL, weights))
        for i, width in enumerate((64, 128, 256, 512, 512)):
            head = learned[f"lin{i}.model.1.weight"] if learned else torch.rand(width)
            self.register_buffer(f"head{i}", head.view(width, 1, 1))                            # (C, 1, 1)

    def forward(self, images, references):
        x, y = (normalize(image, IMAGENET_MEAN, IMAGENET_STD) for image in (images, references))
        distance = 0
        for i, stage in enumerate(self.stages):
            x, y = stage(x), stage(y)                                                           # 2 x (B, C, h, w)
            a, b = (F.normalize(features.float(), dim=1, eps=1e-10) for features in (x, y))
            distance = distance + ((a - b).square() * getattr(self, f"head{i}")).sum(1).mean((1, 2))
        return distance                                                                         # (B,)


class Discriminator(nn.Module):
    """Real or decoded? Five heads on frozen DINO ViT-S/8: images in [0, 1], (B, 3, S, S) -> logits (B, 5 N)."""

    def __init__(self, image_size=256, weights=None):
        super().__init__()
        self.size = min(224, image_size // 8 * 8)
        self.net = timm_network("vit_small_patch8_224.dino", weights)
        self.net.set_input_size(img_size=self.size)
        dim, spectral_norm = self.net.embed_dim, nn.utils.parametrizations.spectral_norm
        conv = lambda *size: spectral_norm(nn.Conv1d(dim, *size, padding="same", padding_mode="circular"))
        norm = lambda: nn.InstanceNorm1d(dim, eps=1e-6, affine=True)                            # over an image's tokens
        block = lambda kernel: nn.Sequential(conv(dim, kernel), norm(), nn.LeakyReLU(0.2))
        self.heads = nn.ModuleList([nn.ModuleList([block(1), block(9), conv(1, 1)]) for _ in range(5)])

    def forward(self, images):
        x = normalize(images, IMAGENET_MEAN, IMAGENET_STD)
        x = F.interpolate(x, self.size, mode="bilinear", align_corners=False)
        _, layers = self.net.forward_intermediates(x, indices=[2, 5, 8, 11], output_fmt="NLC")  # 4 x (B, N, D)
        logits = []
        for (one, nine, logit), tokens in zip(self.heads, [layers[3], *layers]):                # blocks 11, 2, 5, 8, 11
            x = one(tokens.transpose(1, 2))                                                     # (B, D, N)
            logits.append(logit((x + nine(x)) / 2**0.5).flatten(1))                             # (B, N)
        return torch.cat(logits, 1).float()                                                     # (B, 5 N)


def augment(images, uniform):
    """DiffAug (arXiv 2006.10738): translation, brightness, saturation, contrast, from uniform (B, 5). (B, 3, S, S)"""
    down, across, brightness, saturation, contrast = uniform.T.reshape(5, -1, 1, 1, 1)          # 5 x (B, 1, 1, 1)
    side, reach = images.shape[-1], images.shape[-1] // 8                                       # an eighth at most
    window, image = (torch.arange(n, device=images.device) for n in (side, len(images)))        # (S,), (B,)
    row, column = (window + (u.flatten(1) * (2 * reach + 1)).long() for u in (down, across))    # 2 x (B, S)
    x = F.pad(images, [reach] * 4, value=0.5)                                                   # grey around it
    x = x[image[:, None, None], :, row[:, :, None], column[:, None]].permute(0, 3, 1, 2)        # (B, 3, S, S)
    x = x + (brightness - 0.5) / 2
    for factor, dims in ((2 * saturation, 1), (0.5 + contrast, (1, 2, 3))):
        mean = x.mean(dims, keepdim=True)
        x = mean + factor * (x - mean)
    return x


class Adversary:
    """The discriminator and its optimiser: judge() is for the decoder's loss, learn() and step() train it."""

    def __init__(self, image_size, weights, device):
        self.discriminator = Discriminator(image_size, weights).to(device).eval()
        self.heads = self.discriminator.heads
        self.optimizer = torch.optim.AdamW(self.heads.parameters(), betas=(0.9, 0.95), weight_decay=0)

    def judge(self, images, uniform):
        """Logits of augmented images. Their gradient is for the images alone."""
        weights = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        return torch.func.functional_call(self.discriminator, weights, (augment(images, uniform),))

    def learn(self, images, decoder, z, uniform, share):
        """Gradient of the hinge loss for a micro-batch, `share` of the step -> metrics. uniform: (B, 10)."""
        with torch.no_grad():                                                                   # no noise, 8 bits
            decoded = to_uint8(decoder(z)) / 255                                                # (B, 3, S, S)
        both = torch.cat([augment(images, uniform[:, :5]), augment(decoded, uniform[:, 5:])])
        real, fake = self.discriminator(both).chunk(2)                                          # 2 x (B, 5 N)
        margin = torch.cat([real, -fake])                                                       # positive if right
        loss = F.relu(1 - margin).mean()
        (loss * share).backward()
        return {"d_loss": loss.detach(), "d_accuracy": (margin > 0).float().mean()}

    def step(self, lr):
        """One step of AdamW, and one power iteration of the spectral norms, whatever the number of micro-batches."""
        if dist.is_initialized():
            for weight in self.heads.parameters():
                dist.all_reduce(weight.grad)
                weight.grad /= dist.get_world_size()
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.heads.train()
        _ = [module.weight for module in self.heads.modules() if isinstance(module, nn.Conv1d)]
        self.heads.eval()


class ToyAutoencoder(nn.Module):
    """Stage rae of the toy, which has no DINOv2: from tokens under noise, name the class and draw the image again."""

    def __init__(self, image_size, num_classes, channels=96):
        super().__init__()
        self.encoder = Encoder("toy", image_size, channels)
        self.decoder = Decoder(channels, self.encoder.grid, image_size // self.encoder.grid, **DECODERS["toy"])
        self.classify = nn.Linear(channels, num_classes)

    def forward(self, images, labels, noise):
        """images (B, 3, S, S), labels (B,), noise (B, C, G, G) on the tokens -> (loss, metrics)."""
        z = self.encoder(images) + noise                                                        # (B, C, G, G)
        scores = self.classify(z.mean((2, 3)))                                                  # (B, classes)
        mse = (self.decoder(z) - images).square().mean()
        loss = F.cross_entropy(scores, labels, label_smoothing=0.1) + 10 * mse.sqrt()
        return loss, {"mse": mse.detach(), "accuracy": (scores.argmax(1) == labels).float().mean()}


# ----------------------------------------------------------------------------------------------------------------------
# Images and published weights

def read_image(path):
    """An image file -> PIL image in RGB, of a sliver its middle. Other formats are not tried: EPS starts a program."""
    with Image.open(path, formats=("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")) as image:
        if image.mode[0] in "IF":
            raise OSError(f"{path}: its pixels ({image.mode}) are not 8-bit; convert it to 8-bit RGB")
        left, top = (max(0, side - 8 * min(image.size)) // 2 for side in image.size)
        return image.convert("RGB").crop((left, top, image.width - left, image.height - top))


def center_crop(image, size):
    """ADM's crop: halve by box filter while twice too large, resize the shorter side to `size`, cut out the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    width, height = (round(side * size / min(image.size)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_uint8(images):
    """Images in [0, 1] -> uint8, rounded to nearest: the one rounding rule of this project."""
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8)


LPIPS_FILE = "lpips-vgg-a78928a0.pth"  # ends in the first digits of its sha256
LPIPS_URL = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth"
HUB = "nyu-visionx/RAE-collections"  # repository of the Hugging Face hub, and where each published file lies in it
HUB_FILES = {
    256: dict(decoder="decoders/dinov2/wReg_base/ViTXL_n08/model.pt",
              statistics="stats/dinov2/wReg_base/imagenet1k/stat.pt",
              teacher="DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt",
              guide="DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-S_ep14/stage2_model.pt"),
    512: dict(decoder="decoders/dinov2/wReg_base/ViTXL_n08_i512/model.pt",
              statistics="stats/dinov2/wReg_base/imagenet1k_512/stat.pt",
              teacher="DiTs/Dinov2/wReg_base/ImageNet512/DiTDH-XL_ep400/stage2_model.pt",
              guide="DiTs/Dinov2/wReg_base/ImageNet512/DiTDH-S_ep20/stage2_model.pt"),
}


def fetch(name, source, weights=None):
    """Path of a published file: of a repository of the Hugging Face hub, or of a URL; or in the folder `weights`."""
    if weights is not None:
        path = Path(weights, "" if "://" in source else source, name)
        return path if path.is_file() else sys.exit(f"{path}: no such file; lay --weights out like the hub")
    try:
        if "://" not in source:
            return hf_hub_download(source, name)
        torch.hub.load_state_dict_from_url(source, file_name=name, check_hash=True, weights_only=True)
        return Path(torch.hub.get_dir(), "checkpoints", name)
    except OSError as error:
        raise SystemExit(f"{source} {name}: not in the cache, no network ({type(error).__name__}); give --weights DIR")


def published(kind, resolution, weights=None):
    """Path of the published "decoder", "statistics", "teacher" or "guide" of 256 or 512. weights: as in fetch."""
    if resolution not in HUB_FILES:
        raise SystemExit(f"--resolution {resolution}: published weights are for 256 and 512; give --rae and --teacher")
    return fetch(HUB_FILES[resolution][kind], HUB, weights)


def published_rae(resolution, weights=None):
    """The published RAE of 256 or 512, without its encoder."""
    path, moments = (published(kind, resolution, weights) for kind in ("decoder", "statistics"))
    state = {f"decoder.{key}": value for key, value in convert_decoder(state_dict_of(load_file(path))).items()}
    grid = resolution // 16
    state |= {key: value.reshape(768, grid, grid) for key, value in load_file(moments).items()}
    encoder = dict(name=DINOV2, image_size=resolution, channels=768)
    decoder = dict(latent_dim=768, grid=grid, patch_size=16, **DECODERS["XL"])
    return load_rae(path, dict(encoder=encoder, decoder=decoder, state=state))


# ----------------------------------------------------------------------------------------------------------------------
# Command line

@torch.no_grad()
def main():
    title, _, examples = __doc__.split("\n\n")[:3]
    parser = argparse.ArgumentParser(description=title, epilog=examples, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("image", type=Path, help="image of any size, whose centre is used, or a folder")
    parser.add_argument("--rae", metavar="CKPT", help="checkpoint of train.py (default: the published RAE)")
    parser.add_argument("--weights", metavar="DIR", help="folder laid out like the hub (default: the hub)")
    parser.add_argument("--resolution", type=int, default=256, choices=HUB_FILES, help="published RAE (default 256)")
    parser.add_argument("--out", type=Path, default="pairs", help="folder to write (default pairs)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: a GPU)")
    args = parser.parse_args()
    files = sorted(path for path in (args.image, *args.image.rglob("*")) if path.is_file() and is_image_file(path.name))
    if not files or args.out.exists():
        raise SystemExit(f"{args.image}: holds no image" if not files else f"--out {args.out}: exists; give a new name")
    rae = load_rae(args.rae) if args.rae else published_rae(args.resolution, args.weights)
    rae.fetch_encoder(args.weights).to(args.device)
    psnr = []
    for i, path in enumerate(tqdm(files, "reconstruct")):
        image = pil_to_tensor(center_crop(read_image(path), rae.image_size))[None].to(args.device) / 255  # (1, 3, S, S)
        decoded = to_uint8(rae.decode(rae.encode(image))) / 255                                 # (1, 3, S, S)
        psnr.append(reconstruction_loss(decoded, image)[1]["psnr"].item())
        for name, shown in dict(originals=image, reconstructions=decoded, both=torch.cat([image, decoded])).items():
            (args.out / name).mkdir(parents=True, exist_ok=True)
            save_image(shown, args.out / name / f"{i:06d}.png")
    print(f"{args.out}: {len(files)} pairs, PSNR {sum(psnr) / len(psnr):.2f} dB; rFID: "
          f"python fid.py {args.out}/reconstructions {args.out}/originals")


if __name__ == "__main__":
    main()
