"""The representation autoencoder: a frozen vision transformer as encoder, a ViT that inverts it.

Paper: RAE, arXiv 2510.11690, as used by arXiv 2511.13019. The encoder was trained to understand
images, not to compress them, and stays as it is. Stage rae of train.py learns the decoder, then
measures the mean and the variance of every entry of a latent.

    python rae.py IMAGE                          # beside its reconstruction by the published RAE
    python rae.py FOLDER --rae out/toy/rae.pt    # all its images, by the RAE of a checkpoint

Shapes: B images, G x G = N patches (tokens), P pixels a patch side, C latent channels, D width.
Images are float in [0, 1], (B, 3, S, S). Latents are (B, C, G, G) and normalised: each entry has
mean 0 and variance 1 over the training images.
"""
import argparse
import re
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
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image
from tqdm import tqdm

from dit import load_file, load_frozen, run_block, sincos_positions, state_dict_of

IMAGENET_MEAN, IMAGENET_STD = torch.tensor(
    [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
).view(2, 3, 1, 1)
DINOV2 = "vit_base_patch14_reg4_dinov2.lvd142m"
EPSILON = 1e-5  # added to the variance of a latent entry, as published
DECODERS = {
    "toy": {"hidden_size": 192, "depth": 4, "num_heads": 4, "mlp_hidden": 512},
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6, "mlp_hidden": 1536},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12, "mlp_hidden": 3072},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16, "mlp_hidden": 4096}
}


# --------------------------------------------------------------------------------------------------
# Encoder, decoder, and both together

class PixelNorm(nn.Module):
    """Images in [0, 1] -> the mean 0 and variance 1 per colour that a pretrained network expects.

    The constants are buffers, so that they move to the device once, but no file holds them.
    """

    def __init__(self, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__()
        self.register_buffer("mean", mean, persistent=False)        # (3, 1, 1)
        self.register_buffer("std", std, persistent=False)          # (3, 1, 1)

    def forward(self, images):
        return (images - self.mean) / self.std                      # (B, 3, S, S)


class Encoder(nn.Module):
    """Frozen ViT of timm, or "toy": images -> layer-normalised patch vectors (B, C, G, G).

    weights is that of timm_network. Only the toy's encoder takes its number of channels from here.
    """

    def __init__(self, name=None, image_size=256, channels=96, weights=None):
        super().__init__()
        name = name or DINOV2
        if name == "toy":
            self.input_size = image_size
            self.net = VisionTransformer(
                image_size, image_size // 4, embed_dim=channels, depth=4, num_heads=4,
                num_classes=0, class_token=False, global_pool="", embed_layer=ConvStem
            )
            self.pixel_norm = PixelNorm()
        else:
            self.net = timm_network(name, weights)
            # A patch covers 16 pixels of the image, whatever its size in the network.
            self.input_size = image_size // 16 * self.net.patch_embed.patch_size[0]
            self.net.set_input_size(self.input_size)
            config = self.net.pretrained_cfg
            mean_std = torch.tensor([config["mean"], config["std"]]).view(2, 3, 1, 1)
            self.pixel_norm = PixelNorm(*mean_std)

        channels = self.net.embed_dim
        self.net.norm = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.grid = self.net.patch_embed.grid_size[0]
        self.config = {"name": name, "image_size": image_size, "channels": channels}

    def forward(self, images):
        x = self.pixel_norm(images)                                 # (B, 3, S, S)
        x = F.interpolate(x, self.input_size, mode="bicubic")       # 256 -> 224
        x = self.net.forward_features(x)[:, self.net.num_prefix_tokens:]        # (B, N, C)
        return x.transpose(1, 2).unflatten(2, (self.grid, -1)).float()     # (B, C, G, G)


def timm_network(name, weights=None, **options):
    """A frozen network of timm, by a name that timm itself knows, so that no other hub is asked.

    weights as in fetch, of the file timm/NAME/model.safetensors; or "random", for trials.
    """
    if not timm.is_model_pretrained(name):
        raise SystemExit(f"{name}: no model of timm; give one of timm.list_pretrained('vit*')")
    if weights != "random":
        path = fetch("model.safetensors", timm.get_pretrained_cfg(name).hf_hub_id, weights)
        options["pretrained_cfg_overlay"] = {"state_dict": timm.models.load_state_dict(path)}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same "random" weights in every process
        net = timm.create_model(name, pretrained=weights != "random", **options)
    return net.eval().requires_grad_(False)


class ConvStem(nn.Module):
    """Patch embedding of the toy's encoder: (B, 3, S, S) -> (B, N, C).

    Three strided convolutions learn edges sooner than one convolution of 8 x 8 pixels does.
    """

    def __init__(self, img_size, patch_size, in_chans, embed_dim, **unused):
        super().__init__()
        grid = img_size // patch_size
        self.grid_size = grid, grid
        self.num_patches = grid**2

        layers = []
        widths = in_chans, 32, 64, embed_dim
        for inputs, outputs in zip(widths, widths[1:]):
            convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
            layers += [convolution, nn.GroupNorm(8, outputs), nn.GELU()]
        self.net = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 1))

    def forward(self, images):
        return self.net(images).flatten(2).transpose(1, 2)          # (B, N, C)


class Decoder(nn.Module):
    """Vision transformer from latents (B, C, G, G), not normalised, to images (B, 3, G P, G P).

    The images lie about [0, 1] and are not clamped.
    """
    checkpointing = False  # as in DiTDH

    def __init__(self, latent_dim, grid, patch_size, hidden_size, depth, num_heads, mlp_hidden):
        super().__init__()
        self.config = {
            "latent_dim": latent_dim,
            "grid": grid,
            "patch_size": patch_size,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_hidden": mlp_hidden
        }
        self.embed = nn.Linear(latent_dim, hidden_size)
        # Not zero: the variance of a zero vector makes the gradient of its LayerNorm explode.
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, hidden_size))
        # Published training starts from these positions and trains them; here they stay fixed.
        positions = F.pad(sincos_positions(hidden_size, grid), (0, 0, 1, 0))        # (1 + N, D)
        self.register_buffer("pos_embed", positions[None])          # (1, 1 + N, D)

        layer_norm = partial(nn.LayerNorm, eps=1e-12)
        mlp_ratio = (mlp_hidden + 0.5) / hidden_size  # timm rounds the product down
        self.blocks = nn.ModuleList([
            Block(hidden_size, num_heads, mlp_ratio, qkv_bias=True, norm_layer=layer_norm)
            for _ in range(depth)
        ])
        self.norm = layer_norm(hidden_size)
        self.head = nn.Linear(hidden_size, 3 * patch_size**2)
        self.patches = grid, grid, patch_size, patch_size, 3
        self.pixel_norm = PixelNorm()

    def forward(self, z):
        x = self.embed(z.flatten(2).transpose(1, 2))                # (B, N, D)
        cls = self.cls_token.expand(len(x), -1, -1).to(x.dtype)     # (B, 1, D)
        x = torch.cat([cls, x], 1) + self.pos_embed             # (B, 1 + N, D)
        for block in self.blocks:
            x = run_block(block, x, checkpointing=self.checkpointing)

        x = self.head(self.norm(x))[:, 1:]                          # (B, N, 3 P P)
        x = x.reshape(-1, *self.patches).permute(0, 5, 1, 3, 2, 4)  # (B, 3, G, P, G, P)
        x = x.flatten(4, 5).flatten(2, 3)                           # (B, 3, G P, G P)
        return x * self.pixel_norm.std + self.pixel_norm.mean       # float32 under autocast too


class RAE(nn.Module):
    """encode: images -> normalised latents; decode: the way back.

    mean and var are (C, G, G), or None: mean 0, no scaling. `measured` says whether they are known.
    Sampling needs no encoder: it may be None, with the encoder_config that fetch_encoder needs.
    """

    def __init__(self, encoder, decoder, mean=None, var=None, encoder_config=None):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.encoder_config = encoder.config if encoder else encoder_config
        grid = decoder.config["grid"]
        self.latent_shape = decoder.config["latent_dim"], grid, grid
        self.image_size = grid * decoder.config["patch_size"]

        self.measured = var is not None
        if mean is None:
            mean = torch.zeros(self.latent_shape)
        if var is None:  # var + EPSILON is then 1 exactly
            var = torch.full(self.latent_shape, 1 - EPSILON)
        self.register_buffer("mean", mean)
        self.register_buffer("var", var)

    @torch.no_grad()
    def encode(self, images):
        """Images (B, 3, S, S) in [0, 1] -> normalised latents (B, C, G, G)."""
        return (self.encoder(images) - self.mean) / (self.var + EPSILON).sqrt()

    def decode(self, z):
        """Normalised latents (B, C, G, G) -> images (B, 3, S, S), about [0, 1], not clamped."""
        return self.decoder(z * (self.var + EPSILON).sqrt() + self.mean)

    def reencode(self, z):
        """Latents (B, C, G, G) -> those of the images that they decode to.

        What the decoder does not draw is gone from the result.
        """
        return self.encode(self.decode(z).clamp(0, 1))

    @torch.no_grad()
    def reconstruct(self, images, batch_size=250):
        """Images uint8 (M, 3, S, S) -> what the RAE makes of them, the same, on the CPU."""
        return torch.cat([
            to_uint8(self.decode(self.encode(batch.to(self.mean.device) / 255))).cpu()
            for batch in images.split(batch_size)                   # (batch_size, 3, S, S)
        ])

    def fetch_encoder(self, weights=None):
        """Load the public encoder, which only encoding needs. Returns self."""
        if self.encoder is None:
            if self.encoder_config["name"] == "toy":
                raise SystemExit("the released toy has no encoder; give a checkpoint of train.py")
            self.encoder = Encoder(**self.encoder_config, weights=weights)
        return self

    @torch.no_grad()
    def measure(self, latents):
        """Set mean and var to those of batches (B, C, G, G), over all processes.

        Sums in float64 make the result independent of the sizes and the order of the batches.
        """
        sums = 0
        for z in latents:
            z = z.double()
            # (3, C, G, G)
            sums = sums + torch.stack([torch.ones_like(z), z, z.square()]).sum(1)
        if dist.is_initialized():
            dist.all_reduce(sums)

        mean, mean_square = sums[1:] / sums[0]                      # 2 x (C, G, G)
        self.mean = mean.float()
        self.var = (mean_square - mean**2).clamp_min(0).float()
        self.measured = True

    def packed(self):
        """All that load_rae needs, except the weights of a public encoder."""
        state = {
            name: value for name, value in self.state_dict().items()
            if self.encoder_config["name"] == "toy" or not name.startswith("encoder.")
        }
        return {
            "encoder": self.encoder_config,
            "decoder": self.decoder.config,
            "measured": self.measured,
            "state": state
        }


def load_rae(path, packed=None):
    """The RAE in a checkpoint of ours, or the one `packed` from the file `path`, frozen.

    It comes without a public encoder: see fetch_encoder. SystemExit where there is no RAE.
    """
    packed = packed or load_file(path).get("rae")
    if packed is None:
        raise SystemExit(f"{path}: holds no RAE; give a finished checkpoint of train.py")

    state = packed["state"]
    config = packed["encoder"]
    has_encoder = any(name.startswith("encoder.") for name in state)
    with torch.device("meta"):
        encoder = Encoder(**config) if has_encoder else None
        decoder = Decoder(**packed["decoder"])
    rae = RAE(encoder, decoder, encoder_config=config)
    rae.measured = packed.get("measured", "var" in state)
    return load_frozen(rae, {"mean": rae.mean, "var": rae.var, **state}, path)


# --------------------------------------------------------------------------------------------------
# Stage rae: L1 + LPIPS + an adversarial loss whose discriminator reads frozen DINO features

def reconstruction_loss(reconstruction, images, perceptual=None, perceptual_weight=1.0,
                        discriminator=None, adversarial_weight=0.75, last_layer=None):
    """L1 + perceptual_weight LPIPS + adversarial_weight w GAN -> (loss, metrics).

    Both images are (B, 3, S, S) in [0, 1]; perceptual(a, b) -> (B,); discriminator(reconstruction)
    -> logits, and GAN is minus their mean. w, at most 1e4, makes the gradients of both sides at
    the decoder's last_layer equally long.
    """
    error = reconstruction - images                                 # (B, 3, S, S)
    mse = error.square().mean().detach()
    loss = error.abs().mean()
    metrics = {"mse": mse, "psnr": -10 * mse.clamp_min(1e-10).log10(), "l1": loss.detach()}

    if perceptual is not None:
        lpips = perceptual(reconstruction, images).mean()
        loss = loss + perceptual_weight * lpips
        metrics["lpips"] = lpips.detach()

    if discriminator is not None:
        gan = -discriminator(reconstruction).mean()
        loss_norm, gan_norm = (
            torch.autograd.grad(term, last_layer, retain_graph=True)[0].norm()
            for term in (loss, gan)
        )
        weight = adversarial_weight * (loss_norm / (gan_norm + 1e-6)).clamp(max=1e4)
        loss = loss + weight * gan
        metrics |= {"gan": gan.detach(), "gan_weight": weight}
    return loss, metrics


class PerceptualDistance(nn.Module):
    """LPIPS 0.1 (arXiv 1801.03924): weighted squared differences of VGG-16's unit features.

    Two times images (B, 3, S, S) in [0, 1] -> (B,). weights as in timm_network.
    """

    def __init__(self, weights=None):
        super().__init__()
        vgg = timm_network("vgg16.tv_in1k", weights).features
        self.stages = nn.ModuleList([
            vgg[:4], vgg[4:9], vgg[9:16], vgg[16:23], vgg[23:30]
        ])
        self.pixel_norm = PixelNorm()
        if weights != "random":
            learned = load_file(fetch(LPIPS_FILE, LPIPS_URL, weights))
        for i in range(5):
            head = torch.ones(1) if weights == "random" else learned[f"lin{i}.model.1.weight"]
            self.register_buffer(f"head{i}", head.view(-1, 1, 1))   # (C, 1, 1)

    def forward(self, images, references):
        x = self.pixel_norm(images)
        y = self.pixel_norm(references)
        distance = 0
        for i, stage in enumerate(self.stages):
            x = stage(x)                                            # (B, C, h, w)
            y = stage(y)                                            # (B, C, h, w)
            a, b = (F.normalize(features.float(), eps=1e-10) for features in (x, y))
            weighted = (a - b).square() * getattr(self, f"head{i}")             # (B, C, h, w)
            distance = distance + weighted.sum(1).mean((1, 2))      # (B,)
        return distance


def spectral_conv(inputs, outputs, kernel_size):
    """Circular convolution of tokens, whose matrix is divided by its largest singular value."""
    return nn.utils.parametrizations.spectral_norm(
        nn.Conv1d(inputs, outputs, kernel_size, padding="same", padding_mode="circular")
    )


def conv_block(dim, kernel_size):
    """(B, D, N) -> (B, D, N). The norm is over the tokens of one image, whatever the batch."""
    return nn.Sequential(
        spectral_conv(dim, dim, kernel_size),
        nn.InstanceNorm1d(dim, eps=1e-6, affine=True),
        nn.LeakyReLU(0.2)
    )


class Discriminator(nn.Module):
    """Real or decoded? Five heads on frozen DINO ViT-S/8: (B, 3, S, S) in [0, 1] -> (B, 5 N)."""

    def __init__(self, image_size=256, weights=None):
        super().__init__()
        self.size = min(224, image_size // 8 * 8)
        # The published discriminator runs DINO with the tanh form of GELU.
        self.net = timm_network("vit_small_patch8_224.dino", weights, act_layer="gelu_tanh")
        self.net.set_input_size(self.size)
        self.pixel_norm = PixelNorm()

        dim = self.net.embed_dim
        self.heads = nn.ModuleList()
        for _ in range(5):
            self.heads.append(nn.ModuleList(
                [conv_block(dim, 1), conv_block(dim, 9), spectral_conv(dim, 1, 1)]
            ))

    def forward(self, images):
        x = self.pixel_norm(images)
        x = F.interpolate(x, self.size, mode="bilinear")
        _, layers = self.net.forward_intermediates(
            x, indices=[2, 5, 8, 11], output_fmt="NLC"              # 4 x (B, N, D)
        )
        logits = []
        # Block 11 is read twice, in this order: 11, 2, 5, 8, 11.
        for (first, second, last), tokens in zip(self.heads, [layers[3], *layers]):
            x = first(tokens.transpose(1, 2))                       # (B, D, N)
            x = (x + second(x)) / 2**0.5                            # (B, D, N)
            logits.append(last(x).flatten(1))                       # (B, N)
        return torch.cat(logits, 1).float()                         # (B, 5 N)


def augment(images, uniform):
    """DiffAug (arXiv 2006.10738): translation, brightness, saturation and contrast, in this order.

    images (B, 3, S, S) and numbers uniform (B, 5) in [0, 1) -> (B, 3, S, S).
    """
    side = images.shape[-1]
    reach = side // 8  # pixels, at most, in each direction
    down, across = (uniform[:, :2] * (2 * reach + 1)).long().T.tolist()         # 2 x B numbers
    padded = F.pad(images, [reach] * 4, value=0.5)                  # grey around it
    x = torch.stack([                                               # (B, 3, S, S)
        image[:, top:top + side, left:left + side]
        for image, top, left in zip(padded, down, across)
    ])

    brightness, saturation, contrast = uniform[:, 2:].T.reshape(3, -1, 1, 1, 1)
    x = x + (brightness - 0.5) / 2
    grey = x.mean(1, keepdim=True)                                  # (B, 1, S, S)
    x = grey + 2 * saturation * (x - grey)
    mean = x.mean((1, 2, 3), keepdim=True)                          # (B, 1, 1, 1)
    return mean + (0.5 + contrast) * (x - mean)


class Adversary:
    """The discriminator and its optimiser, with everything that only the two of them need.

    judge is for the decoder's loss. A step of the discriminator is learn, once per micro-batch,
    then average_gradients, and then step, which is to be left out where finite() is False.
    """

    def __init__(self, image_size, weights, device):
        self.discriminator = Discriminator(image_size, weights).to(device).eval()
        self.heads = self.discriminator.heads
        self.optimizer = torch.optim.AdamW(
            self.heads.parameters(), betas=(0.9, 0.95), weight_decay=0
        )

    def judge(self, images, uniform):
        """Logits (B, 5 N) of augmented images, whose gradient reaches the images alone.

        uniform is (B, 5), as in augment.
        """
        self.heads.requires_grad_(False)
        logits = self.discriminator(augment(images, uniform))       # (B, 5 N)
        self.heads.requires_grad_(True)
        return logits

    def learn(self, images, decoded, uniform, share):
        """Add the gradient of the hinge loss of a micro-batch, `share` of the step -> metrics.

        images and decoded are (B, 3, S, S), decoded from latents without noise and without a
        gradient; uniform is (B, 10). The published code decodes them after the decoder's own step;
        here they come from the weights before it, so that both steps belong to one iteration.
        """
        decoded = to_uint8(decoded) / 255  # as the real images, which were files
        both = torch.cat([images, decoded])                         # (2 B, 3, S, S)
        numbers = torch.cat(uniform.split(5, 1))                    # (2 B, 5)
        real, fake = self.discriminator(augment(both, numbers)).chunk(2)        # 2 x (B, 5 N)
        margin = torch.cat([real, -fake])                           # (2 B, 5 N), positive if right
        loss = F.relu(1 - margin).mean()
        (loss * share).backward()
        return {"d_loss": loss.detach(), "d_accuracy": (margin > 0).float().mean()}

    def average_gradients(self):
        """Average the gradients over all processes."""
        if dist.is_initialized():
            for weight in self.heads.parameters():
                dist.all_reduce(weight.grad)
                weight.grad /= dist.get_world_size()

    def finite(self):
        """Whether all gradients are finite: the same answer in all processes, once averaged."""
        return all(weight.grad.isfinite().all() for weight in self.heads.parameters())

    def step(self, lr):
        """One step of AdamW. The caller clears the gradients."""
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()

        # In training mode, computing a spectral norm improves its singular vectors by one power
        # iteration. Here that is one a step, however many micro-batches the step has (published:
        # two, one for each pass of the discriminator).
        self.heads.train()
        for module in self.heads.modules():
            if isinstance(module, nn.Conv1d):
                module.parametrizations.weight()
        self.heads.eval()


class ToyAutoencoder(nn.Module):
    """Stage rae of the toy, which has no DINOv2: it trains an encoder and a decoder together.

    From tokens under noise, it names the class and draws the image again.
    """

    def __init__(self, image_size, num_classes, channels=96):
        super().__init__()
        self.encoder = Encoder("toy", image_size, channels)
        grid = self.encoder.grid
        self.decoder = Decoder(channels, grid, image_size // grid, **DECODERS["toy"])
        self.classify = nn.Linear(channels, num_classes)

    def forward(self, images, labels, noise):
        """images (B, 3, S, S), labels (B,), noise (B, C, G, G) on the tokens -> (loss, metrics)."""
        z = self.encoder(images) + noise                            # (B, C, G, G)
        scores = self.classify(z.mean((2, 3)))                      # (B, classes)
        mse = (self.decoder(z) - images).square().mean()
        loss = F.cross_entropy(scores, labels, label_smoothing=0.1) + 10 * mse.sqrt()
        correct = scores.argmax(1) == labels                        # (B,)
        return loss, {"mse": mse.detach(), "accuracy": correct.float().mean()}


# --------------------------------------------------------------------------------------------------
# Images

def read_image(path):
    """An image file -> PIL image in RGB, of a sliver its middle. OSError names a file that fails.

    Transparent pixels are seen on white. EXIF's orientation is ignored, as it is in ADM's pipeline,
    which made the reference statistics.
    """
    try:
        # For formats that are not listed, such as EPS, PIL would start another program.
        with Image.open(path, formats=["BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP"]) as image:
            # PIL shows 16-bit colour as if it had 8 bits, and only its decoder's arguments differ:
            # ('RGB;16B', ...), or for a PPM its largest value, ('RGB', 65535).
            deep = re.search(r";16[BLN]|', (?!255)\d{3,5}\)", str(image.tile))
            if deep or image.mode[0] in "IF":
                raise ValueError("its pixels are not 8-bit; convert it to 8-bit RGB")
            image.load()
    except (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"{path}: {error}") from error

    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    left, top = (max(0, side - 8 * min(image.size)) // 2 for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top)).convert("RGB")


def center_crop(image, size):
    """ADM's crop of a PIL image to size x size pixels.

    Halve by a box filter while it is twice too large, resize the shorter side to `size`, cut out
    the middle.
    """
    while min(image.size) >= 2 * size:
        image = image.resize([side // 2 for side in image.size], Image.BOX)
    sides = [round(side * size / min(image.size)) for side in image.size]
    image = image.resize(sides, Image.BICUBIC)
    left, top = ((side - size) // 2 for side in sides)
    return image.crop((left, top, left + size, top + size))


def to_uint8(images):
    """Images in [0, 1] -> uint8, rounded to nearest: the one rounding rule of this project."""
    return (images.float() * 255).round().clamp(0, 255).byte()


# --------------------------------------------------------------------------------------------------
# Published weights

LPIPS_FILE = "lpips-vgg-a78928a0.pth"  # ends in the first digits of its sha256
LPIPS_URL = ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/"
             "master/lpips/weights/v0.1/vgg.pth")
HUB = "nyu-visionx/RAE-collections"  # repository of the Hugging Face hub; below, its files
HUB_FILES = {
    256: {
        "decoder": "decoders/dinov2/wReg_base/ViTXL_n08/model.pt",
        "statistics": "stats/dinov2/wReg_base/imagenet1k/stat.pt",
        "teacher": "DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt",
        "guide": "DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-S_ep14/stage2_model.pt"
    },
    512: {
        "decoder": "decoders/dinov2/wReg_base/ViTXL_n08_i512/model.pt",
        "statistics": "stats/dinov2/wReg_base/imagenet1k_512/stat.pt",
        "teacher": "DiTs/Dinov2/wReg_base/ImageNet512/DiTDH-XL_ep400/stage2_model.pt",
        "guide": "DiTs/Dinov2/wReg_base/ImageNet512/DiTDH-S_ep20/stage2_model.pt"
    }
}


def fetch(name, source, weights=None):
    """Path of a published file, downloaded on first use.

    source is a repository of the Hugging Face hub, or a URL. With weights, a folder, the file is
    WEIGHTS/SOURCE/NAME (WEIGHTS/NAME of a URL) and nothing is downloaded.
    """
    if weights is not None:
        path = Path(weights, "" if "://" in source else source, name)
        if not path.is_file():
            raise SystemExit(f"{path}: no such file; lay --weights out like the hub")
        return path

    try:
        if "://" not in source:
            return hf_hub_download(source, name)
        torch.hub.load_state_dict_from_url(
            source, file_name=name, check_hash=True, weights_only=True
        )
        return Path(torch.hub.get_dir(), "checkpoints", name)
    except OSError as error:
        raise SystemExit(f"{source} {name}: neither in the cache nor to be downloaded "
                         f"({type(error).__name__}); give --weights DIR") from error


def published(kind, resolution, weights=None):
    """Path of the published "decoder", "statistics", "teacher" or "guide" of 256 or 512."""
    if resolution not in HUB_FILES:
        raise SystemExit(f"no published weights for {resolution} pixels; give --rae and --teacher")
    return fetch(HUB_FILES[resolution][kind], HUB, weights)


def convert_decoder(state):
    """State dict of a published decoder (names of transformers' ViTMAE) -> of Decoder."""
    renamed = {
        "trainable_": "",
        "decoder_layers": "blocks",
        "decoder_pred": "head",
        "decoder_": "",
        "attention.attention": "attn",
        "attention.output.dense": "attn.proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2"
    }
    for theirs, ours in renamed.items():
        state = {name.replace(theirs, ours): tensor for name, tensor in state.items()}

    for query in [name for name in state if "attn.query" in name]:
        names = [query.replace("query", part) for part in ("query", "key", "value")]
        # (3 D, D) or (3 D,)
        state[query.replace("query", "qkv")] = torch.cat([state.pop(name) for name in names])
    return state


def published_rae(resolution, weights=None):
    """The published RAE of 256 or 512, without its encoder."""
    path = published("decoder", resolution, weights)
    decoder = convert_decoder(state_dict_of(load_file(path)))
    state = {f"decoder.{name}": value for name, value in decoder.items()}

    grid = resolution // 16
    statistics = published("statistics", resolution, weights)
    for name, value in load_file(statistics).items():
        if name not in ("mean", "var"):
            raise SystemExit(f"{statistics}: {name} is neither mean nor var; give another file")
        if value is not None:
            state[name] = value.reshape(768, grid, grid)

    return load_rae(path, {
        "encoder": {"name": DINOV2, "image_size": resolution, "channels": 768},
        "decoder": {"latent_dim": 768, "grid": grid, "patch_size": 16, **DECODERS["XL"]},
        "state": state
    })


# --------------------------------------------------------------------------------------------------
# Command line

@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("image", type=Path, help="image of any size, whose centre is used, or a folder")
    add("--rae", help="checkpoint of train.py (default: the published RAE)")
    add("--weights", help="folder laid out like the hub (default: the hub)")
    add("--resolution", type=int, default=256, choices=HUB_FILES,
        help="pixels a side of the published RAE (default 256)")
    add("--out", type=Path, default="pairs", help="new folder to write (default pairs)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default: a GPU if there is one)")
    args = parser.parse_args()

    files = sorted(
        path for path in (args.image, *args.image.rglob("*"))
        if path.is_file() and is_image_file(path.name)
    )
    if not files:
        raise SystemExit(f"{args.image}: holds no image; give an image or a folder of images")
    if args.out.exists():
        raise SystemExit(f"--out {args.out}: exists; give a new name")

    rae = load_rae(args.rae) if args.rae else published_rae(args.resolution, args.weights)
    rae.fetch_encoder(args.weights).to(args.device)
    psnr = []
    for i, path in enumerate(tqdm(files)):
        image = pil_to_tensor(center_crop(read_image(path), rae.image_size))[None]  # (1, 3, S, S)
        decoded = rae.reconstruct(image) / 255                      # (1, 3, S, S)
        image = image / 255
        psnr.append(reconstruction_loss(decoded, image)[1]["psnr"])
        both = torch.cat([image, decoded])                          # (2, 3, S, S)
        for name, picture in {
            "originals": image, "reconstructions": decoded, "both": both
        }.items():
            folder = args.out / name
            folder.mkdir(parents=True, exist_ok=True)
            save_image(picture, folder / f"{i:06d}.png")
    print(f"{args.out}: {len(files)} pairs, PSNR {sum(psnr) / len(psnr):.2f} dB; rFID: "
          f"python fid.py {args.out}/reconstructions {args.out}/originals")


if __name__ == "__main__":
    main()
