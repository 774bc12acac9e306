"""Train every stage of MeanFlow Transformers with representation autoencoders, with one loop.

Paper: arXiv 2511.13019. The stages, each starting from the checkpoint of the one before it in the folder --out:

    rae        decoder of the representation autoencoder, whose encoder is frozen, and the latents' mean and variance
    flow       the teacher: velocity by flow matching
    mid        the student: average velocity by Consistency Mid-Training on the teacher's trajectories
    distill    MeanFlow distillation: the MeanFlow identity with the teacher's velocity
    bootstrap  MeanFlow training: the same with the one-point estimate in the teacher's place; optional

    python train.py --toy                                    # all of it on a laptop CPU, on pictures it draws itself;
                                                             # a stage "encoder" comes first: the toy has no DINOv2
    python train.py --toy --data cifar10/train               # the same on folders of photographs, at 32 x 32
    torchrun --nproc_per_node=8 train.py --stage mid         # ImageNet 256 as in the paper, from the published teacher

Writes OUT/STAGE.pt, OUT/STAGE.jsonl and OUT/STAGE.NNNNNN.png. The same command again resumes.
"""
import copy
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image, ImageDraw
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import fid
from dit import MODELS, DiTDH, infer_config
from meanflow import (alpha_of, expand, flow_matching_loss, flow_matching_times, guided, mean_flow_loss, mean_flow_times, mid_training_loss,
                      shift_time)
from rae import (DECODERS, DINOV2, RAE, Decoder, Discriminator, Encoder, EncoderPretraining, LatentStatistics, Parser, PerceptualDistance,
                 ProcessLost, UserError, at_least, augment, between, center_crop, discriminator_loss, fetch, load_file, need, one_line,
                 pick_device, plain, rae_from, random_crop, read_image, reading, reconstruction_loss, run_main, to_uint8, unpack_rae)
from sample import class_names, generate, imagenet_names, load_network, noise_of, save_grid, side_by_side, train_classifier

# ----------------------------------------------------------------------------------------------------------------------
# What each stage is trained with. batch_size is global; for mid it counts trajectories, each giving `pairs` pairs. ema is the
# share of the averaged weights that stays in a step; noise is how much the latents of encoder and, at most, rae are noised.
# The learning rate rises over the share `warmup` of the steps and falls to lr_end after the share decay_from of them;
# after the shares discriminator_from and gan_from, the rae stage trains its discriminator and listens to it.

EPOCH = 1_281_167  # images of ImageNet
PAPER = {  # the paper's, at 256
    "rae": dict(batch_size=512, steps=16 * EPOCH // 512, lr=2e-4, lr_end=2e-5, decay="cosine", warmup=1 / 16, ema=0.9978, clip=None,
                noise=0.8, perceptual=1.0, adversarial=0.75, discriminator_from=6 / 16, gan_from=8 / 16),
    "flow": dict(batch_size=1024, steps=800 * EPOCH // 1024, lr=2e-4, lr_end=2e-5, decay_from=40 / 800, ema=0.9995),
    "mid": dict(batch_size=8, pairs=64, steps=27_000, lr=1e-4, ema=0.999),
    "distill": dict(batch_size=256, steps=180_000, lr=1e-4, ema=0.9999),
    "bootstrap": dict(batch_size=256, steps=10_000, lr=1e-4, ema=0.9999),
}
PAPER_512 = {  # where 512 differs
    "mid": dict(pairs=8),
    "distill": dict(batch_size=128, steps=20_000, ema=0.9995),
    "bootstrap": dict(batch_size=128, ema=0.9995),
}
TOY = {  # ours: 32 x 32 pictures, 16 tokens, ten minutes of two CPU cores; small batches and many steps learn most in them
    "encoder": dict(batch_size=64, steps=1000, lr=2e-3, lr_end=0, warmup=0.05, decay_from=0.3, ema=0.99, noise=0.5),
    "rae": dict(batch_size=64, steps=300, lr=1e-3, lr_end=0, warmup=0.05, decay_from=0.3, ema=0.99, clip=None, noise=0.5),
    "flow": dict(batch_size=64, steps=2600, lr=3e-3, lr_end=2e-4, warmup=0.02, decay_from=0.4, ema=0.995),
    "mid": dict(batch_size=8, pairs=8, steps=300, lr=1.5e-3, lr_end=2e-4, warmup=0.02, decay_from=0.4, ema=0.99),
    "distill": dict(batch_size=64, steps=600, lr=3e-4, lr_end=5e-5, decay_from=0.5, ema=0.99, power=0.0),
    "bootstrap": dict(batch_size=64, steps=120, lr=5e-5, ema=0.99, power=0.0),
}
PHOTOGRAPHS = 4        # --toy --data: this many times the toy's steps
TOY_CHANNELS = 96      # latent channels of the toy's encoder
TOY_ALPHA = 2.5        # time shift of the toy, tried out: at 1 the classes are learnt later, and the paper's rule gives 0.6
TOY_START = dict(class_std=1.0, time_std=None)  # larger than the published 0.02, which learns classes too slowly for ten minutes
DEFAULTS = dict(            # where a row says nothing
    lr_end=None,            # learning rate at the end; None: it stays
    decay="linear",         # how it gets there; or cosine
    decay_from=0.0,
    warmup=0.0,
    clip=1.0,               # largest gradient norm; None: any
    betas=(0.9, 0.95),      # of AdamW, without weight decay
    label_drop=0.1,         # share of labels replaced by "no class"
    nodes=17,               # of a teacher's trajectory in mid: 16 steps
    solver="euler",         # of these trajectories
    guidance=1.0,           # of the teacher in mid and distill; 1: none
    gap_share=0.25,         # distill and bootstrap: share of samples with r < t
    delta=5e-3,             # step of the central difference, if that is chosen
    power=1.0,              # p of the adaptive weighting 1 / L^p
    perceptual=0.0,         # rae: weights of LPIPS and of the adversarial loss
    adversarial=0.0,
    discriminator_from=0.0,
    gan_from=0.0,
)
ON_IMAGES = ("encoder", "rae")  # these stages train on images, the others on latents
STARTS_FROM = {"mid": "flow", "distill": "mid", "bootstrap": "distill"}
UNUSED = (  # by these stages, of these settings: they may change while a stage is resumed
    dict.fromkeys(("gap_share", "power", "delta", "derivative"), ("encoder", "rae", "flow", "mid"))
    | dict.fromkeys(("nodes", "solver"), ("encoder", "rae", "flow", "distill", "bootstrap"))
    | dict.fromkeys(("perceptual", "adversarial"), ("encoder", "flow", "mid", "distill", "bootstrap"))
    | {"guidance": ("encoder", "rae", "flow", "bootstrap")})
MAX_SKIPPED = 10       # steps in a row without a finite loss and gradient end the run


def learning_rate(step, c):
    """Learning rate of a step under the configuration c: warm-up, plateau, decay."""
    done, plateau_end = step / c["steps"], max(c["decay_from"], c["warmup"])
    if done < c["warmup"]:
        return c["lr"] * min(1, (step + 1) / (c["warmup"] * c["steps"]))
    if c["lr_end"] is None or done < plateau_end:
        return c["lr"]
    done = (done - plateau_end) / (1 - plateau_end)
    if c["decay"] == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return c["lr"] + (c["lr_end"] - c["lr"]) * done


# ----------------------------------------------------------------------------------------------------------------------
# Data

@dataclass
class Data:
    images: object          # uint8 (M, 3, S, S) in memory, or a list of M files
    labels: torch.Tensor    # (M,)
    classes: tuple          # their names
    listing: str = "drawn"  # how many files and a checksum of their names: whether a folder has changed since
    held_out: tuple = None  # other images and their labels, which no stage sees: uint8 (., 3, S, S), (.,)
    latents: object = None  # (M, C, G, G): of images in memory, encoded once


TOY_CLASSES = ("ball", "ring", "square", "triangle", "star", "heart", "moon", "plus", "arrow", "fish")


def make_toy_images(num, seed):
    """Draw `num` pictures of ten shapes -> uint8 (num, 32, 32, 3), labels int64 (num,) = 0..9 in turn.

    Place, size, angle and colours differ; edges are anti-aliased. Picture i is a function of (seed, i).
    """
    turn = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    disc = np.stack([np.cos(turn), np.sin(turn)], 1)                                            # (60, 2), y points down
    tenth = np.arange(10) * np.pi / 5
    spikes = np.where(np.arange(10) % 2, 0.42, 1.1)[:, None] * np.stack([np.sin(tenth), -np.cos(tenth)], 1)     # (10, 2)
    down = -13 * np.cos(turn) + 5 * np.cos(2 * turn) + 2 * np.cos(3 * turn) + np.cos(4 * turn)
    heart = np.stack([16 * np.sin(turn) ** 3, down], 1) / 16                                    # (60, 2)
    shapes = [  # outlines to fill (+) and to cut out (-), in a frame of side 2
        [(+1, disc)], [(+1, disc), (-1, 0.55 * disc)], [(+1, 0.85 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]))],
        [(+1, np.array([(0, -1), (1, 0.8), (-1, 0.8)]))], [(+1, spikes)], [(+1, heart)], [(+1, disc), (-1, 0.85 * disc + (0.45, -0.1))],
        [(+1, np.array([(-.3, -1), (.3, -1), (.3, 1), (-.3, 1)])), (+1, np.array([(-1, -.3), (1, -.3), (1, .3), (-1, .3)]))],
        [(+1, np.array([(-1, -.28), (.1, -.28), (.1, -.8), (1, 0), (.1, .8), (.1, .28), (-1, .28)]))],
        [(+1, disc * (0.75, 0.55) + (0.25, 0)), (+1, np.array([(-.3, 0), (-1, -.6), (-1, .6)])), (-1, disc * 0.13 + (0.6, -0.15))],
    ]
    images = np.empty((num, 32, 32, 3), np.uint8)
    labels = np.arange(num) % 10
    for i in range(num):
        rng = np.random.default_rng((seed, i))
        angle, size = rng.uniform(-0.3, 0.3), rng.uniform(10, 13)                            # radians, pixels
        place = 16 + rng.uniform(-1, 1, 2) * (15 - size)
        rotate = size * np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
        mask = Image.new("L", (128, 128))
        for sign, outline in shapes[labels[i]]:
            ImageDraw.Draw(mask).polygon([tuple(p) for p in 4 * (outline @ rotate + place)], fill=255 * (sign > 0))
        mask = np.asarray(mask.resize((32, 32), Image.Resampling.BOX), np.float32)[..., None] / 255   # (32, 32, 1)
        hue, other = rng.uniform(), rng.uniform()
        colour = lambda h, light: light * (0.62 + 0.38 * np.cos(2 * np.pi * (h + np.array([0, 1 / 3, 2 / 3]))))
        back = colour(other, rng.uniform(0.15, 0.45)) if i // 10 % 2 else 1 - colour(other, rng.uniform(0.1, 0.35))
        front = colour(hue, rng.uniform(0.85, 1)) if i // 10 % 2 else colour(hue, rng.uniform(0.45, 0.75))
        images[i] = np.round(255 * np.clip(back + mask * (front - back), 0, 1))
    return images, labels


def toy_tensors(num, seed):
    """make_toy_images as tensors: uint8 (num, 3, 32, 32), int64 (num,)."""
    images, labels = make_toy_images(num, seed)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def list_photographs(folder):
    """A folder of class folders -> (files, labels (M,), class names), in torchvision's ImageFolder order."""
    from timm.data import ImageNetInfo
    from torchvision.datasets import ImageFolder
    try:
        found = ImageFolder(folder)
    except FileNotFoundError as error:
        problem = one_line(error).rstrip(".") if Path(folder).is_dir() else "no such folder"
        raise UserError(f"--data {folder}: {problem}; give a folder that holds one folder of images for each class") from None
    need(len(found.classes) > 1, f"--data {folder}: only one class folder, {found.classes[0]!r}; give two or more")
    names = dict(zip(ImageNetInfo().label_names(), imagenet_names()))                           # n02099601 is shown as golden retriever
    return [path for path, _ in found.samples], torch.tensor(found.targets), tuple(names.get(name, name) for name in found.classes)


def labels_among(classes, data):
    """Labels (M,) of the data as the network counts its classes, by their names. Raises UserError on a name it does not know."""
    if tuple(data.classes) == tuple(classes):
        return data.labels
    for name in data.classes:
        need(list(classes).count(name) == 1,
             f"--data: the network was trained on {len(classes)} classes, and {name!r} is not exactly one of them; give images it knows")
    return torch.tensor([list(classes).index(name) for name in data.classes])[data.labels]


def read_photograph(path, size, place=None):
    """-> uint8 (3, size, size): ADM's centre crop, or the random crop at `place`. Raises UserError where the file is no readable image."""
    image = read_image(path)
    with reading(path, "not a readable image"):
        cropped = center_crop(image, size) if place is None else random_crop(image, size, *place)
    return torch.from_numpy(np.array(cropped)).permute(2, 0, 1)                                 # (3, S, S)


def refuse_unreadable(bad, total):
    """A few damaged files are skipped, more than 1 in 1000 end the run. bad: their names."""
    need(len(bad) <= total / 1000, f"--data: {len(bad)} of {total} images cannot be read, more than 1 in 1000: "
         f"{', '.join(sorted(bad)[:20])}{' ...' if len(bad) > 20 else ''}; remove or replace them")


def name_unreadable(bad, named, total, say):
    """Name those of the unreadable files `bad` that are not in `named` yet; all processes stop, or none. -> all known so far."""
    bad = everyones(bad)
    for name in sorted(bad - named):
        say(f"--data: skipped {name}: cannot be read")
    refuse_unreadable(bad, total)
    return bad


def everyones(names):
    """The union of all processes' sets, so that all of them decide alike."""
    gathered = [names] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(gathered, names)
    return set().union(*gathered)


def load_data(args):
    """The toy's pictures or a folder's photographs, in memory at 32 x 32; for ImageNet the list of its files."""
    if args.toy and not args.data:
        images, labels = toy_tensors(300 if args.dry_run else 20_000, args.seed)
        return Data(images, labels, TOY_CLASSES, held_out=toy_tensors(300 if args.dry_run else 2_000, args.seed + 1))
    need(args.data, f"--stage {args.stage} needs images: give --data FOLDER with one folder of images for each class, or --toy")
    files, labels, classes = list_photographs(args.data)
    names = " ".join(os.path.relpath(path, args.data) for path in files)
    listing = f"{len(files)} images ({zlib.crc32(names.encode()):08x})"
    if not args.toy:
        return Data(files, labels, classes, listing)
    images, good, bad = [], [], []
    with tqdm(files, desc="read", disable=fid.place()[0] > 0, mininterval=2, leave=False) as bar:
        for i, path in enumerate(bar):
            try:
                images.append(read_photograph(path, 32))
                good.append(i)
            except UserError:
                bad.append(path)
    refuse_unreadable(bad, len(files))
    if bad:
        print(f"skipped {len(bad)} unreadable: {', '.join(bad)}", file=sys.stderr)
    images, labels = torch.stack(images), labels[good]                                          # (M, 3, 32, 32), (M,)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    out, kept = order[:min(2000, len(images) // 10)], order[min(2000, len(images) // 10):]
    images, labels, held_out = images[kept], labels[kept], (images[out], labels[out])
    return Data(torch.cat([images, images.flip(3)]), labels.repeat(2), classes, listing, held_out)       # each image and its mirror image


@dataclass
class Samples(Dataset):
    """Sample n of a run, n = step * batch size + position in the global batch: a function of (seed, stage, n) alone.

    Its image, flip, noise, times and dropped label come from one generator of its own; epochs are permutations. So a
    resumed run, other micro-batches and other numbers of processes all see the same samples.
    """
    stage: str
    seed: int
    images: object                   # like Data.images or Data.latents; None: labels alone
    labels: object
    num_classes: int
    size: int                        # side of images read from files, which are flipped at random and, for rae, cropped at random
    noise_shape: tuple
    num_uniform: int = 2             # t, r; of mid one a pair; of rae crop 0 1, noise level 2, augment decoded 3..7 and real ones 8..12
    label_drop: float = 0.0
    gap_share: float = DEFAULTS["gap_share"]

    def __post_init__(self):
        self.stream, self.epoch = zlib.crc32(f"{self.stage} {self.seed}".encode()), None

    def index(self, n):
        epoch, place = divmod(n, len(self.images))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.stage} {self.seed} epoch {epoch}".encode()))
            self.epoch, self.order = epoch, torch.randperm(len(self.images), generator=generator)
        return int(self.order[place])

    def __getitem__(self, n):
        generator = torch.Generator().manual_seed((self.stream + n) % 2**32)
        drop, flip, which, *uniform = torch.rand(3 + self.num_uniform, generator=generator).unbind()
        keep_gap = math.floor((n + 1) * self.gap_share) > math.floor(n * self.gap_share)        # r < t: of 0.25, every fourth sample
        sample = dict(noise=torch.randn(self.noise_shape, generator=generator), uniform=torch.stack(uniform), keep_gap=keep_gap, bad="")
        if self.images is None:
            label = int(which * self.num_classes)
        elif torch.is_tensor(self.images):
            i = self.index(n)
            label, sample["x"] = int(self.labels[i]), self.images[i]
        else:
            x = torch.full((3, self.size, self.size), 128, dtype=torch.uint8)  # if the disk is gone: the loop stops when it has counted
            for i in (self.index(n + k) for k in range(10)):  # the next in order stands in for a file that cannot be read
                label = int(self.labels[i])
                try:
                    x = read_photograph(self.images[i], self.size, uniform[:2] if self.stage == "rae" else None)
                    break
                except UserError:  # named and counted by the loop
                    sample["bad"] += f"{self.images[i]}\n"
            sample["x"] = x.flip(2) if flip < 0.5 else x                                        # (3, S, S)
        return sample | dict(label=self.num_classes if drop < self.label_drop else label)


@dataclass
class Pictures(Dataset):
    """Images in order, uint8 (3, S, S), without any randomness; None where a file cannot be read."""
    images: object
    size: int

    def __getitem__(self, i):
        try:
            return read_photograph(self.images[i], self.size) if isinstance(self.images, list) else self.images[i]
        except UserError:
            return None


def stack_readable(batch):
    readable = [image for image in batch if image is not None]
    return torch.stack(readable) if readable else None                                          # (B, 3, S, S)


@torch.no_grad()
def in_batches(images, size, device, function, what, workers=0, rank=0, world=1, batch_size=256):
    """Yield function(images in [0, 1]) for all images, or for every world-th of them."""
    mine = range(rank, len(images), world)
    batches = DataLoader(Pictures(images, size), batch_size, sampler=mine, num_workers=workers, collate_fn=stack_readable)
    quiet = rank > 0 or len(batches) == 1
    for batch in tqdm(batches, desc=what, leave=False, disable=quiet, mininterval=0.5 if sys.stderr.isatty() else 10):
        if batch is not None:
            yield function(batch.to(device).float() / 255)                                      # of (B, 3, S, S)


def originals_and(redraw, images, size, device):
    """Rows of images, each above its reconstructions -> (2 x 32, 3, S, S), images a row."""
    images = images if torch.is_tensor(images) else images[::max(1, len(images) // 32)]         # files come class by class
    shown = next(in_batches(images[:32], size, device, lambda x: x, "show"))
    columns = min(8, len(shown))
    shown = shown[:len(shown) // columns * columns]                                             # (32, 3, S, S)
    return torch.stack([x.unflatten(0, (-1, columns)) for x in (shown, redraw(shown).clamp(0, 1))], 1).flatten(0, 2), columns


# ----------------------------------------------------------------------------------------------------------------------
# What a stage starts from

def resolve(stage, args):
    """The stage's configuration: the table's row, then the flags that were given."""
    c = DEFAULTS | (TOY[stage] if args.toy else PAPER[stage] | (PAPER_512.get(stage, {}) if args.resolution >= 512 else {}))
    c["steps"] *= PHOTOGRAPHS if args.toy and args.data else 1
    given = ("batch_size", "steps", "lr", "perceptual", "adversarial", "nodes", "solver", "guidance", "gap_share", "power", "delta")
    c |= {key: getattr(args, key) for key in given if getattr(args, key) is not None}
    c |= dict(stage=stage, toy=args.toy, resolution=32 if args.toy else args.resolution, model=args.model or ("toy" if args.toy else "XL"))
    c |= {key: getattr(args, key) for key in ("seed", "data", "encoder", "init", "teacher", "rae", "derivative", "precision")}
    what, sizes = ("decoder", DECODERS) if stage in ON_IMAGES else ("transformer", MODELS)
    need(c["model"] in sizes, f"--model {c['model']}: sizes of the {what} are {', '.join(sizes)}")
    return c | (dict(steps=1) if args.dry_run else {})


def find(stage, flag, given, out, required=True):
    """Path of the checkpoint that a flag names, or else of the stage in OUT, or None if that is not required. Raises UserError."""
    path = Path(given) if given else out / f"{stage}.pt"
    need(not given or path.exists(), f"{flag} {given}: no such file")
    need(path.exists() or not required, f"{path}: no such file; train the stage {stage} first, or give its checkpoint with {flag}")
    return path if path.exists() else None


def load_role(path, flag, average_velocity):
    """A network for a role: the teacher has a velocity, the student an average velocity (None: either). -> (network, file's content)"""
    network, content = load_network(path)
    if average_velocity is not None and (network.r_embedder is not None) != average_velocity:
        needed = "average velocity (a checkpoint of mid, distill or bootstrap)" if average_velocity else "velocity (a checkpoint of flow)"
        raise UserError(f"{flag} {path}: holds {'a' if average_velocity else 'an average'} velocity, needed is {needed}")
    return network, content


def student_of(teacher):
    """A student that starts as its teacher: all its weights, and a time-gap embedding without effect."""
    state = teacher.state_dict()
    student = DiTDH(**infer_config(state) | dict(average_velocity=True))
    student.load_state_dict(student.state_dict() | state)
    return student


def build_autoencoder(stage, args, c, out, classes):
    """Stages encoder and rae -> (module to train, RAE or None, no teacher, no alpha, class names)."""
    if stage == "encoder":
        encoder = Encoder("toy", 32, channels=TOY_CHANNELS)
        return EncoderPretraining(encoder, len(classes), 32 // encoder.grid), None, None, None, classes
    if args.toy:
        path, encoder = out / "encoder.pt", Encoder("toy", 32, channels=TOY_CHANNELS)
        need(path.exists(), f"{path}: no such file; train the stage encoder first, or give the folder that holds it as --out")
        pretraining = EncoderPretraining(encoder, len(classes), 32 // encoder.grid)
        with reading(path, f"no encoder of {len(classes)} classes"):
            pretraining.load_state_dict(load_file(path)["ema"])
    else:
        encoder = Encoder(args.encoder or DINOV2, args.resolution, args.encoder_weights)
    size = encoder.config["image_size"]
    decoder = Decoder(encoder.shape[0], encoder.grid, size // encoder.grid, **DECODERS[c["model"]])
    if args.toy and c["model"] == "toy":  # its pretraining has trained such a decoder already, and ten minutes are short
        decoder.load_state_dict(pretraining.draw.state_dict())
    return decoder, RAE(encoder.eval().requires_grad_(False), decoder), None, None, classes


def build_flow(stage, args, c, out, classes):
    """Stages in latent space -> (network to train, RAE, teacher or None, alpha, class names)."""
    trained, teacher, content = None, None, {}
    if stage in ("mid", "distill"):
        path = find("flow", "--teacher", args.teacher, out, required=args.toy) or fetch("teacher", args.resolution, "--teacher")
        teacher, content = load_role(path, "--teacher", average_velocity=False)
    if stage == "mid" and args.init != "none":
        trained = student_of(load_role(args.init, "--init", average_velocity=False)[0] if args.init else teacher)
    elif stage == "flow" and args.init not in (None, "none"):
        path = find("flow", "--init", args.init, out)
        trained, content = load_role(path, "--init", average_velocity=False)
    elif stage in STARTS_FROM and args.init != "none":
        path = find(STARTS_FROM[stage], "--init", args.init, out)
        trained, content = load_role(path, "--init", average_velocity=None if args.init else True)
        if trained.r_embedder is None:                              # without mid-training, the paper's "flow start": a baseline
            trained = student_of(trained)

    options = dict(with_encoder=stage != "mid", encoder_weights=args.encoder_weights)
    if content.get("rae") and not args.rae:                         # the one in whose latents the network was trained
        rae = unpack_rae(content["rae"], path=path, **options)
    else:
        rae = rae_from(find("rae", "--rae", args.rae, out, required=args.toy), args.resolution, **options)
    channels, grid, _ = rae.latent_shape

    if trained is None:
        classes = content.get("classes") or classes or imagenet_names()
        start = TOY_START if args.toy else {}                       # how wide the first weights spread
        trained = DiTDH(grid, channels, num_classes=len(classes), average_velocity=stage != "flow", **start, **MODELS[c["model"]])
    else:
        classes = class_names(content, trained.num_classes)
    for what, network in (("student", trained), ("teacher", teacher)):
        if network is not None:
            has = network.in_channels, network.input_size, network.num_classes
            need(has == (channels, grid, len(classes)),
                 f"the {what} has {has[0]} channels, grid {has[1]} and {has[2]} classes, but the RAE and the data have {channels}, "
                 f"{grid} and {len(classes)}; check --init, --teacher, --rae and --data")
    alpha = content.get("alpha") or (TOY_ALPHA if args.toy else alpha_of(channels, grid))
    return trained.requires_grad_(True), rae, teacher, alpha, tuple(classes)


def evaluated(net, device, precision):
    """A network as the losses call it: evaluated in the chosen precision, answering in float32."""
    def call(*inputs):
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            result = net(*inputs)
        return result.float() if isinstance(result, torch.Tensor) else result
    return call


def images_to_score(network, rae, args, num_classes, alpha, device, rank, world):
    """Yield this process's share of images 0 .. eval_num - 1, uint8 (B, 3, S, S): those that sample.py makes of the checkpoint."""
    first, last = (args.eval_num * r // world for r in (rank, rank + 1))
    for start in tqdm(range(first, last, 64), desc="evaluate", leave=False, disable=rank > 0):
        indices = range(start, min(start + 64, last))
        noise = noise_of(args.seed, indices, rae.latent_shape).to(device)
        labels = torch.tensor(indices, device=device) % num_classes
        yield to_uint8(generate(network, rae, noise, labels, 1 if network.r_embedder is not None else 50, alpha))


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves behind, so that it can be ended at any moment and go on

def previous(path):
    """The checkpoint before this one: mid.pt -> mid.previous.pt."""
    return path.with_suffix(".previous.pt")


def save(content, path):
    """Write beside the target, flush to the disk, read back; only then take the place of the checkpoint before, which is kept.

    Raises UserError where that cannot be done; what was there before is as it was.
    """
    temporary = path.with_suffix(".pt.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        with zipfile.ZipFile(temporary) as archive:
            if archive.testzip():                                   # a checksum for every tensor
                raise OSError("it does not read back as it was written")
        if path.exists():
            path.replace(previous(path))
        temporary.replace(path)
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:    # torch turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: step {content['step']} cannot be saved ({one_line(error.__context__ or error)}); "
                        "the checkpoint before it is kept; make room, and give the same command again") from None


def newest(path, say):
    """-> (content, path) of a stage's checkpoint or, said aloud, of the one before it where this is damaged or gone.

    The content is None where neither is there. Raises UserError where there are only damaged ones: they are not written over.
    """
    damage = None
    for candidate in (path, previous(path)):
        if candidate.exists():
            try:
                content = load_file(candidate)
            except UserError as error:
                damage = damage or error
                continue
            if candidate != path:
                say(f"{damage or f'{path}: gone'}; going on from {candidate}")
            return content, candidate
    if damage:
        raise UserError(f"{damage}; to start the stage anew, move it away")
    return None, path


def progress_of(state, path, c):
    """What a checkpoint says of the run so far: (steps done, seconds, steps skipped). Raises UserError where it is another run's.

    All that shapes the rest of a run must be the same; its length and its learning rate may change.
    """
    for key in sorted(set(c) - {"steps", "lr", "init", "teacher", "rae"}):
        if c["stage"] in UNUSED.get(key, ()):
            continue
        before = state["config"].get(key)
        need(repr(before) == repr(c[key]),
             f"{path}: was made with {key} {one_line(before)}, this run has {c[key]}; give the same --{key}, or another --out")
    step, seconds, skipped = (state.get(key) for key in ("step", "seconds", "skipped"))
    need(type(step) is type(skipped) is int and type(seconds) is float and 0 < step and 0 <= skipped and 0 <= seconds < math.inf,
         f"{path}: its counts are damaged ({one_line((step, seconds, skipped))}); to start the stage anew, move it away")
    return step, seconds, skipped


def load_moments(optimizer, state):
    """Take the moments of a checkpoint; the settings stay this run's. Raises ValueError where they are of other weights."""
    group = optimizer.param_groups[0]
    for i, weight in enumerate(group["params"] if state["state"] else ()):                      # without any: before the first step
        moments = [state["state"][i][key] for key in ("exp_avg", "exp_avg_sq", "step")]
        if not all(map(plain, moments)) or [m.shape for m in moments] != [weight.shape, weight.shape, ()] or not moments[2] >= 0:
            raise ValueError(f"the moments of weight {i} are not of its shape {tuple(weight.shape)}")
    settings = {key: value for key, value in group.items() if key != "params"} | dict(params=[*range(len(group["params"]))])
    optimizer.load_state_dict(dict(state=state["state"], param_groups=[settings]))
    for moments in getattr(optimizer, "optim", optimizer).state.values():                       # sharded, it leaves them on the CPU
        moments["step"] = moments["step"].float().to(group["params"][0].device)


def load_parts(state, path, parts):
    """Networks and optimisers of a run, by the names they have in its checkpoint, take what it holds. Raises UserError."""
    try:
        for name, part in parts.items():
            if isinstance(part, torch.optim.Optimizer):
                load_moments(part, state[name])
            else:
                part.load_state_dict(state[name])
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: this run cannot go on from it ({type(error).__name__}: {one_line(error)}); "
                        "to start the stage anew, move it away") from None


def resume(path, c, parts, listing, keep_precision, say):
    """Take up a run where its checkpoint left it, if there is one, and with keep_precision in the precision that it had.

    -> (steps done, seconds, steps skipped, its packed RAE or None, the file that was used). Raises UserError.
    """
    state, used = newest(path, say)
    if state is None:
        return 0, 0.0, 0, None, path
    need(isinstance(state, dict) and isinstance(state.get("config"), dict),
         f"{used}: no checkpoint of train.py that could go on; name released weights with --teacher or --init, or give another --out")
    if keep_precision and state["config"].get("precision") in ("fp32", "bf16"):
        c["precision"] = state["config"]["precision"]
    start, seconds, skipped = progress_of(state, used, c)
    if start < c["steps"]:
        load_parts(state, used, parts)
    if repr(state.get("listing")) != repr(listing):
        say(f"--data: {one_line(state.get('listing'))} when this stage was started, {listing} now: from here on their order is another")
    return start, seconds, skipped, state.get("rae"), used


def cut_log(path, start):
    """End a log after the lines of step `start`: what comes later was not saved, and is done again."""
    kept = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                if not line.endswith(b"\n") or json.loads(line).get("step", 0) > start:
                    break
            except (ValueError, AttributeError):                    # a line that was cut, or was never ours
                break
            kept += len(line)
    os.truncate(path, kept)


def open_log(path, used, start, header):
    """Before the first step: the folder, a damaged checkpoint out of the way, the log up to `start` and, in it, what this run is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if used != path and path.exists():                          # the next save would keep it as the good one
            path.replace(path.with_suffix(".damaged.pt"))
        if path.with_suffix(".jsonl").exists():
            cut_log(path.with_suffix(".jsonl"), start)
        add_to_log(path, header)
    except OSError as error:
        raise UserError(f"--out {path.parent}: cannot be written ({one_line(error)})") from None


def add_to_log(path, line, safely=False):
    with path.with_suffix(".jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
        if safely:                                                  # no checkpoint without the lines that lead to it
            log.flush()
            os.fsync(log.fileno())


class Recent:
    """The steps since the last line of the log. Their numbers stay on the device until it is written: nothing else waits for a GPU."""

    def __init__(self, stage, batch_size, seconds, skipped):
        self.stage, self.batch_size, self.skipped, self.in_a_row, self.steps = stage, batch_size, skipped, 0, []
        self.since = time.perf_counter()
        self.start = self.since - seconds                           # as if the run had never been interrupted

    def add(self, step, values, times):
        """values: {name: tensor} with "loss" and "grad_norm"; times: (t, r) of each micro-batch, on the CPU, for steps that go wrong."""
        spread = {}
        for name, values_of in zip(("t", "r"), zip(*times)):
            every = torch.cat(values_of)
            spread[name] = [round(value.item(), 4) for value in (every.min(), every.mean(), every.max())]
        self.steps.append((step, torch.stack([v.float() for v in values.values()]), spread))
        self.names = [*values]

    def line(self, lr, say):
        """-> the log's line for the last step, with the largest gradient norm and the skipped steps since the line before.

        Raises UserError after MAX_SKIPPED steps in a row that were skipped for want of a finite loss and gradient.
        """
        lost, norms, rows = [], [], torch.stack([values for _, values, _ in self.steps]).tolist()
        for (step, _, times), row in zip(self.steps, rows):
            if all(map(math.isfinite, row)):
                self.in_a_row = 0
                norms.append(row[self.names.index("grad_norm")])
                continue
            self.in_a_row, self.skipped = self.in_a_row + 1, self.skipped + 1
            lost.append(dict(step=step, **{name: str(value) for name, value in zip(self.names, row)}, **times))
            say(f"{self.stage}: skipped {json.dumps(lost[-1])}")
            need(self.in_a_row < MAX_SKIPPED, f"{self.stage}: no finite loss and gradient in {MAX_SKIPPED} steps in a row, up to {step}; "
                 "they changed no weight, and the last checkpoint is kept; give a smaller --lr or --precision fp32")
        line = dict(step=self.steps[-1][0])
        line |= {name: value if math.isfinite(value) else None for name, value in zip(self.names, rows[-1])}
        line["grad_max"] = max(norms, default=None)
        if lost:
            line["skipped"] = lost
        now = time.perf_counter()
        speed = len(self.steps) * self.batch_size / (now - self.since)
        line |= dict(lr=lr, images_per_s=round(speed, 1), seconds=round(now - self.start, 2))
        if torch.cuda.is_initialized():
            line["peak_GB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.steps, self.since = [], now
        return line

    def shown(self, line):
        """What of it stands beside the progress bar."""
        names = dict(loss="loss", mse="mse", grad="grad_norm", grad_max="grad_max")
        shown = {name: "nan" if line[key] is None else f"{line[key]:.4g}" for name, key in names.items()}
        return shown | dict(img_s=line["images_per_s"]) | (dict(skipped=self.skipped) if self.skipped else {})


class Stop:
    """Hears the wish to save and leave: SIGTERM, SIGINT (Ctrl-C) or SIGUSR1, which SLURM sends ahead of the end of a job.

    Without other processes, a second one ends the run at once.
    """
    def __enter__(self):
        self.signal, names = 0, ("SIGTERM", "SIGINT", "SIGUSR1")
        self.before = {n: signal.signal(n, self.heard) for n in (getattr(signal, name) for name in names if hasattr(signal, name))}
        return self

    def heard(self, number, frame):
        if self.signal and not dist.is_initialized():               # torchrun passes a Ctrl-C on that its processes have had already
            self.__exit__()
            return os.kill(os.getpid(), number)
        self.signal = number
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.write(2, f"\n{signal.Signals(number).name}: saves after this step, then ends\n".encode())

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self):
        """The signal that any process has had, or 0; on all processes alike. Waiting for one that hangs ends in ProcessLost."""
        number = torch.tensor(self.signal)
        if dist.is_initialized():
            dist.all_reduce(number, dist.ReduceOp.MAX)              # on the CPU: nothing waits for the GPU
        return int(number)


def deaf(worker):
    """Processes that read images leave such signals to the one that trains."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def lost_process(error):
    """What an error says of the other processes or of memory, or None where it is about something else."""
    words = " ".join(str(error).split())
    if "can't allocate memory" in words:                            # on the CPU torch raises no OutOfMemoryError
        words = re.sub(".*DefaultCPUAllocator: ", "", words)
        return UserError(f"out of memory ({words[:150]}); give a smaller --batch_size, --micro_batch or --model")
    if re.search(r"DataLoader worker .*(exited|killed)", words):
        return UserError(f"--workers: a process that reads images was killed, for want of memory perhaps ({words[:150]}); give fewer")
    if dist.is_initialized() and re.search(r"timed? ?out|peer|socket|gloo|NCCL|TCPStore", words, re.IGNORECASE):
        return ProcessLost(f"process {dist.get_rank()}: another process is dead, or hung for longer than --timeout ({words[:150]}); "
                           "the last checkpoint is kept: give the same command again, or torchrun --max_restarts")


# ----------------------------------------------------------------------------------------------------------------------
# One stage, from top to bottom. Before it, what it shows and measures on the way.

def draw(stage, ema, rae, encode, data, num_classes, alpha, c, device):
    """The picture of a step: images above their reconstructions, or samples, a class a column -> (images (B, 3, S, S), images a row)."""
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=c["precision"] == "bf16"):
        if stage in ON_IMAGES:
            redraw = lambda x: ema.draw(ema.encoder(x)) if stage == "encoder" else ema(encode(x))
            return originals_and(redraw, data.images, c["resolution"], device)
        columns = num_classes if num_classes <= 12 else 8
        labels = (torch.arange(columns) * (num_classes // columns)).repeat(4).to(device)                            # (4 columns,)
        noise = noise_of(c["seed"], range(len(labels)), rae.latent_shape).to(device)                                # (4 columns, C, G, G)
        return generate(ema, rae, noise, labels, 25 if stage == "flow" else 1, alpha), columns


def measure_latents(rae, encode, data, c, device, workers):
    """The mean and variance of the latents of all images, over all processes, into the RAE: the last act of the stage rae."""
    rank, world = fid.place()
    statistics = LatentStatistics()
    for z in in_batches(data.images, c["resolution"], device, encode, "statistics", workers, rank, world):
        statistics.update(z)                                        # (B, C, G, G)
    rae.mean, rae.var = statistics.mean_and_variance()              # 2 x (C, G, G)


def open_scorer(args, c):
    """What --eval_every asks for, or None. A reference that does not fit is refused before the first step."""
    if not args.eval_every:
        return None
    scorer = fid.Scorer(args.ref, args.eval_features, args.eval_weights, args.device)
    fid.check_count(args.eval_num, scorer.extractor.dims, "--eval_num")
    need(scorer.reference.size in (None, (c["resolution"],) * 2),
         f"--ref {args.ref}: images of {scorer.reference.size}, samples of {c['resolution']}; give a reference of that size")
    return scorer


def train(stage, args, data, stop):
    """One stage, up to its last step or a signal. data: None for mid, which needs none. stop: a Stop."""
    rank, world = fid.place()
    device, path = torch.device(args.device), Path(args.save_to) / f"{stage}.pt"
    say = (lambda text: tqdm.write(text, file=sys.stderr)) if rank == 0 else (lambda text: None)
    c = resolve(stage, args)
    need(c["batch_size"] % world == 0,
         f"--batch_size {c['batch_size']}: cannot be divided among {world} processes; give a multiple of {world}")
    local_batch = c["batch_size"] // world                          # samples of a step on this process
    micro = min(args.micro_batch or local_batch, local_batch)       # of these, so many at a time
    need(local_batch % micro == 0, f"--micro_batch {micro}: does not divide the {local_batch} samples of each process")

    # Networks. A random start is a function of (seed, stage).
    torch.manual_seed(zlib.crc32(f"{stage} {args.seed} start".encode()))
    build = build_autoencoder if stage in ON_IMAGES else build_flow
    trained, rae, teacher, alpha, classes = build(stage, args, c, Path(args.out), data and data.classes)
    latent_shape = rae.latent_shape if rae else trained.encoder.shape
    trained.to(device).train()
    ema = copy.deepcopy(trained).requires_grad_(False).eval()
    rae, teacher = (net if net is None else net.to(device) for net in (rae, teacher))
    trained.checkpointing = args.checkpointing
    weights, ema_weights = list(trained.parameters()), list(ema.parameters())
    adamw = dict(lr=c["lr"], betas=c["betas"], weight_decay=0, fused=True)
    if args.shard and world > 1:                                    # each process keeps the moments of its share of the weights
        optimizer = ZeroRedundancyOptimizer(weights, torch.optim.AdamW, **adamw)
    else:
        optimizer = torch.optim.AdamW(weights, **adamw)
    perceptual = discriminator = None
    if stage == "rae" and c["perceptual"]:
        perceptual = PerceptualDistance(args.vgg_weights, args.lpips_weights).to(device)
    if stage == "rae" and c["adversarial"]:
        discriminator = Discriminator(c["resolution"], args.dino_weights).to(device)
        d_optimizer = torch.optim.AdamW(discriminator.heads.parameters(), **adamw)
    parts = dict(model=trained, ema=ema, optimizer=optimizer)       # what a checkpoint holds, by name
    parts |= dict(discriminator=discriminator.heads, d_optimizer=d_optimizer) if discriminator else {}

    # Resume
    listing = data.listing if data else ""
    start, seconds, skipped, packed, used = resume(path, c, parts, listing, args.keep_precision, say)
    if start >= c["steps"]:
        return say(f"{path}: complete, {start} steps")
    if start and stage not in ON_IMAGES:                            # the RAE that it was started with
        rae = unpack_rae(packed, stage != "mid", args.encoder_weights, used).to(device)
        need(rae.latent_shape == latent_shape, f"{used}: its RAE has latents of another shape")
    need(len(everyones({(start, listing)})) == 1,                   # before the first one writes
         f"{path}, --data {args.data}: not the same on all processes; --out and --data must be folders that all of them see")
    parameters = sum(p.numel() for p in weights)
    say(f"{stage}: {parameters:,} parameters, steps {start} to {c['steps']} of {c['batch_size']} samples, learning rate {c['lr']}, "
        f"{c['precision']}, {device}; all settings: {path.with_suffix('.jsonl')}")
    if rank == 0:
        open_log(path, used, start, dict(config=c, start=start, parameters=parameters, processes=world, micro_batch=micro, command=sys.argv,
                                         torch=torch.__version__))
    wandb_run = start_wandb(args, c) if args.wandb and rank == 0 else None
    scorer = open_scorer(args, c)

    # Networks as the losses call them
    in_precision = partial(evaluated, device=device.type, precision=c["precision"])
    wrapped, d_wrapped = torch.compile(trained) if args.compile else trained, discriminator
    if world > 1:
        wrapped = DistributedDataParallel(wrapped, broadcast_buffers=False, gradient_as_bucket_view=True)
        d_wrapped = discriminator and DistributedDataParallel(discriminator, broadcast_buffers=False)
    student, teacher, perceptual = in_precision(wrapped), teacher and in_precision(teacher), perceptual and in_precision(perceptual)
    if teacher and c["guidance"] != 1:
        teacher = guided(teacher, c["guidance"], null=len(classes))
    if stage != "encoder":                                          # rae, whose end is to measure them, has no statistics to normalise with
        encode = in_precision(rae.encoder if stage == "rae" else rae.encode)

    # Samples
    images = None if stage == "mid" else data.images
    encoded = stage not in ON_IMAGES and torch.is_tensor(images)    # in memory: once, before the first step
    if encoded:
        if data.latents is None:
            data.latents = torch.cat([z.cpu() for z in in_batches(images, c["resolution"], device, encode, "encode")])
        images = data.latents                                       # (M, C, G, G)
    samples = Samples(stage, args.seed, images, labels=data and labels_among(classes, data), num_classes=len(classes), size=c["resolution"],
                      noise_shape=latent_shape, num_uniform=dict(mid=c.get("pairs"), rae=13).get(stage, 2),
                      label_drop=0.0 if stage in ON_IMAGES else c["label_drop"], gap_share=c["gap_share"])
    def numbers():
        """Of each micro-batch of this process, the numbers of its samples."""
        for step in range(start, c["steps"]):
            first = step * c["batch_size"] + rank * local_batch
            yield from (range(first + done, first + done + micro) for done in range(0, local_batch, micro))
    workers = args.workers if isinstance(images, list) else 0
    batches = iter(DataLoader(samples, batch_sampler=numbers(), num_workers=workers, worker_init_fn=deaf, pin_memory=device.type == "cuda",
                              prefetch_factor=4 if workers else None))

    recent = Recent(stage, c["batch_size"], seconds, skipped)
    bad, named = set(), set()                                       # unreadable files, and those of them that the log has named
    step, ending = start, 0
    bar = tqdm(total=c["steps"], initial=start, desc=stage, disable=rank > 0, mininterval=0.5 if sys.stderr.isatty() else 10)
    while step < c["steps"] and not ending:
        judged = discriminator and step >= c["discriminator_from"] * c["steps"]                 # the discriminator learns
        opposed = discriminator and step >= c["gan_from"] * c["steps"]                          # the decoder listens to it
        for group in optimizer.param_groups + (d_optimizer.param_groups if discriminator else []):
            group["lr"] = learning_rate(step, c)
        totals, times = {}, []
        for first in range(0, local_batch, micro):
            batch = next(batches)
            for net in (wrapped, d_wrapped):                        # processes add up their gradients after the last micro-batch
                if isinstance(net, DistributedDataParallel):
                    net.require_backward_grad_sync = first + micro == local_batch
            bad.update("".join(batch["bad"]).splitlines())
            y, noise = (batch[key].to(device, non_blocking=True) for key in ("label", "noise"))     # (B,), (B, C, G, G)
            if stage != "mid":
                x = batch["x"].to(device, non_blocking=True)
                if x.dtype == torch.uint8:
                    x = x.float() / 255                                                             # (B, 3, S, S)
                if stage not in ON_IMAGES and not encoded:
                    x = encode(x)                                                                   # (B, C, G, G)
            if stage == "flow":
                t = r = flow_matching_times(batch["uniform"][:, 0], alpha)                          # (B,) on the CPU; r for the log alone
                loss, metrics = flow_matching_loss(student, x, y, alpha, t, noise)
            elif stage == "mid":
                pairs = (batch["uniform"] * (c["nodes"] * (c["nodes"] - 1) // 2)).long()            # (B, pairs)
                nodes = torch.triu_indices(c["nodes"], c["nodes"], 1)[:, pairs] / (c["nodes"] - 1)
                t, r = shift_time(1 - nodes, alpha)                                                 # 2 x (B, pairs), for the log
                loss, metrics = mid_training_loss(student, teacher, noise, y, alpha, c["nodes"], pairs=pairs, solver=c["solver"])
            elif stage not in ON_IMAGES:                                                            # distill, bootstrap
                t, r = mean_flow_times(batch["uniform"].T, batch["keep_gap"], alpha)                # (B,), (B,) on the CPU
                loss, metrics = mean_flow_loss(student, x, y, alpha, teacher, c["derivative"],
                                               c["delta"], t, r, noise, power=c["power"])
            elif stage == "encoder":
                loss, metrics = student(x, y, noise, c["noise"])
            else:                                                                                   # rae
                uniform = batch["uniform"].to(device, non_blocking=True)                            # (B, 13): see Samples
                level = c["noise"] * uniform[:, 2].view(-1, 1, 1, 1)                                # (B, 1, 1, 1)
                decoded = student(encode(x) + level * noise)                                        # (B, 3, S, S); no normalisation yet
                judge = lambda images: in_precision(discriminator.eval())(augment(images, uniform[:, 3:8]))
                loss, metrics = reconstruction_loss(decoded, x, perceptual, c["perceptual"], judge if opposed else None, c["adversarial"],
                                                    trained.head.weight)
            (loss * micro / local_batch).backward()
            if judged:
                d_loss, d_metrics = discriminator_loss(in_precision(d_wrapped.train()), augment(x, uniform[:, 8:13]),
                                                       augment(decoded.detach(), uniform[:, 3:8]))
                (d_loss * micro / local_batch).backward()
                metrics |= d_metrics
            for key, value in (("loss", loss.detach()), *metrics.items()):
                totals[key] = totals.get(key, 0) + value.float() * micro / local_batch
            if stage not in ON_IMAGES:
                times.append((t, r))
        grad_norm = nn.utils.clip_grad_norm_(weights, c["clip"] or math.inf)
        if judged:
            totals["d_grad_norm"] = nn.utils.clip_grad_norm_(discriminator.heads.parameters(), math.inf)
        values = torch.stack([*totals.values(), grad_norm])
        if world > 1:
            dist.all_reduce(values)
            values /= world
        broken = ~values.sum().isfinite()                           # the same on all processes; such a step changes no weight and no moment
        for one in (optimizer, d_optimizer) if judged else (optimizer,):
            getattr(one, "optim", one).found_inf = broken.float()   # what a GradScaler sets; the fused AdamW reads it on the device
            one.step()
            one.zero_grad()
        if judged and world > 1:                                    # the running means of its batch norms are the first process's
            for buffer in discriminator.heads.buffers():
                dist.broadcast(buffer, 0)
        # EMA, a moving average of the weights over many steps: what is sampled from, steadier than the last step's weights
        torch._foreach_lerp_(ema_weights, [w.detach() for w in weights], 1 - c["ema"])
        step += 1
        bar.update()

        # Log, save, draw, score: in this order, so that no score costs a checkpoint
        recent.add(step, dict(zip([*totals, "grad_norm"], values)), times)
        ending, last = stop.agreed(), step == c["steps"]
        scoring = scorer and not ending and (last or step % args.eval_every == 0)
        saving = last or scoring or ending or step % args.save_every == 0
        if saving or step % args.log_every == 0 or step == 1:
            line = recent.line(learning_rate(step - 1, c), say)
            if isinstance(images, list):
                named = name_unreadable(bad, named, len(images), say)
            bar.set_postfix(recent.shown(line), refresh=False)
            if rank == 0:
                add_to_log(path, line, safely=saving)
            if wandb_run:
                wandb_run.log(line, step=step)
        clock = time.perf_counter()
        if saving:
            if stage == "rae" and last:
                measure_latents(rae, encode, data, c, device, workers)
                rae.decoder, data.latents = ema, None
            if args.shard and world > 1:
                optimizer.consolidate_state_dict(to=0)
            if rank == 0:
                content = dict(stage=stage, config=c, step=step, seconds=time.perf_counter() - recent.start, skipped=recent.skipped,
                               random=dict(seed=args.seed, next_sample=step * c["batch_size"]), listing=listing,
                               classes=classes, alpha=alpha)
                content |= {name: part.state_dict() for name, part in parts.items()}
                if stage != "encoder" and (stage != "rae" or last):
                    content["rae"] = rae.packed()
                save(content, path)
        if rank == 0 and (last or step % args.sample_every == 0):
            pictures, columns = draw(stage, ema, rae, encode if rae else None, data, len(classes), alpha, c, device)
            save_grid(to_uint8(pictures.float()).cpu(), path.with_suffix(f".{step:06d}.png"), columns)
        if scoring:
            made = images_to_score(ema, rae, args, len(classes), alpha, device, rank, world)
            scores = scorer(made, torch.arange(args.eval_num) % len(classes))
            if rank == 0:
                say(f"{stage}, step {step}: {json.dumps(scores)}")
                add_to_log(path, dict(step=step, scores=scores))
        recent.since += time.perf_counter() - clock                 # images/s leave out what is not training
    bar.close()
    if ending:
        say(f"{stage}: {signal.Signals(ending).name}, saved at step {step}; the same command goes on")
        raise SystemExit(128 + ending)
    if world > 1:
        dist.barrier()                                              # the next stage reads what the first process has just written


# ----------------------------------------------------------------------------------------------------------------------
# The toy's verdict

def report(args, data):
    """Table and pictures of the toy's stages, or of the checkpoints that --report names."""
    if args.data:
        images, labels, steps = data.images, data.labels, 250 * PHOTOGRAPHS
    else:                                                           # pictures that no stage has seen
        images, labels = toy_tensors(500 if args.dry_run else 10_000, args.seed + 2)
        steps = 250
    for path in args.report or ():
        need(Path(path).is_file(), f"--report {path}: no such file")
    Path(args.save_to).mkdir(parents=True, exist_ok=True)
    classifier = train_classifier(images, labels, len(data.classes), 2 if args.dry_run else steps, args.device)
    side_by_side(args.report or args.save_to, data.held_out, data.classes, classifier, args.save_to, args.device, args.seed, args.precision,
                 num=100 if args.dry_run else 1000)


# ----------------------------------------------------------------------------------------------------------------------
# --bench: what a step costs, beside the form of the same step that the published code has

def published_mean_flow_loss(student, x, y, alpha, teacher, t, r, noise, delta=5e-3):
    """E5 as published: all samples, three copies of each with a graph, most of which is then thrown away. For --bench alone."""
    z, v = (1 - expand(t, x)) * x + expand(t, x) * noise, noise - x
    v = v if teacher is None else teacher(z, t, y)
    three_z, three_t = torch.cat([z, z + delta * v, z - delta * v]), torch.cat([t, t + delta, t - delta])       # (3 B, C, G, G), (3 B,)
    u, after, before = student(three_z, three_t, y.repeat(3), r.repeat(3)).chunk(3)
    target = (v - expand(t - r, x) * (after - before) / (2 * delta)).detach()
    return ((u - target).square().flatten(1).sum(1) + 1e-3).log().mean()


def bench_step(stage, form, args):
    """-> (a function that does one optimiser step on synthetic latents, samples a step). form: "ours" or "published"."""
    c, device = resolve(stage, args), torch.device(args.device)
    grid, channels = (4, TOY_CHANNELS) if args.toy else (args.resolution // 16, 768)
    torch.manual_seed(0)
    size = dict(input_size=grid, in_channels=channels, num_classes=1000, **MODELS[c["model"]])
    trained = DiTDH(**size, average_velocity=stage != "flow").to(device).train()
    teacher = DiTDH(**size).to(device).requires_grad_(False) if stage in ("mid", "distill") else None
    trained.checkpointing = args.checkpointing
    ema = copy.deepcopy(trained).requires_grad_(False)
    weights, ema_weights = list(trained.parameters()), list(ema.parameters())
    optimizer = torch.optim.AdamW(weights, lr=c["lr"], betas=c["betas"], weight_decay=0, fused=True)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()                                                # so that the moments are there before anything is measured
    optimizer.zero_grad()
    compiled = torch.compile if args.compile else lambda net: net
    student, teacher = (net and evaluated(compiled(net), device.type, args.precision) for net in (trained, teacher))
    num, alpha = c["batch_size"], alpha_of(768, 16)
    x, noise, y = *torch.randn(2, num, channels, grid, grid, device=device), torch.randint(1000, (num,), device=device)
    t, r = mean_flow_times(torch.rand(2, num), torch.arange(num) % 4 == 3, alpha)               # (num,), (num,): a quarter has r < t
    pairs = torch.randint(136, (num, c.get("pairs", 1)), device=device)

    def step():
        if stage == "flow":
            loss = flow_matching_loss(student, x, y, alpha, t, noise)[0]
        elif stage == "mid":
            loss = mid_training_loss(student, teacher, noise, y, alpha, pairs=pairs)[0]
        elif form == "ours":
            loss = mean_flow_loss(student, x, y, alpha, teacher, args.derivative, t=t, r=r, noise=noise)[0]
        else:
            loss = published_mean_flow_loss(student, x, y, alpha, teacher, t.to(device), r.to(device), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, c["clip"])
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(ema_weights, [w.detach() for w in weights], 1 - c["ema"])
    return step, num * c.get("pairs", 1)


def bench_memory(stage, form, args):
    """Peak memory in GB of a step in a process of its own: (in all, what the step added to networks, moments and EMA)."""
    set_backends(args)
    if args.device == "cpu":
        gigabytes = lambda what: int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20
        held, peak = partial(gigabytes, "VmRSS"), partial(gigabytes, "VmHWM")
    else:
        held, peak = (lambda: torch.cuda.memory_allocated() / 2**30), (lambda: torch.cuda.max_memory_allocated() / 2**30)
    step, _ = bench_step(stage, form, args)
    before = held()
    step()
    return peak(), peak() - before


def bench(args):
    """Milliseconds, images/s, memory and FLOP/s of a step, ours and the published form in turn; the last line is JSON."""
    device, sync = torch.device(args.device), torch.cuda.synchronize if args.device != "cpu" else lambda: None
    def seconds(function):
        sync()
        clock = time.perf_counter()
        function()
        sync()
        return time.perf_counter() - clock
    size, dtype = (1024 if args.device == "cpu" else 8192), torch.bfloat16 if args.precision == "bf16" else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    peak = 2 * size**3 / min(seconds(lambda: a @ a) for _ in range(20)) / 1e12
    say, model = partial(tqdm.write, file=sys.stdout), args.model or ("toy" if args.toy else "XL")
    say(f"{model}, {32 if args.toy else args.resolution}, {args.precision}, {args.device}; matrix product of {size}: {peak:.2f} TFLOP/s\n")
    say(f"{'stage':10} {'form':10} {'ms/step':>9} {'images/s':>9} {'peak GB':>8} {'of a step':>10} {'TFLOP/s':>8} {'of peak':>8} "
        f"{'time x':>7} {'memory x':>9}")
    rows = []
    for stage in [args.stage] if args.stage else ["flow", "mid", "distill", "bootstrap"]:
        forms = ["ours", "published"] if stage in ("distill", "bootstrap") else ["ours"]
        steps, flops, times = {form: bench_step(stage, form, args) for form in forms}, {}, {form: [] for form in forms}
        for form in forms:
            with FlopCounterMode(display=False) as counter:
                steps[form][0]()
            flops[form] = counter.get_total_flops()
        for _ in tqdm(range(args.steps or 10), desc=stage, leave=False):
            for form in forms:                                      # in turn, so that a slow minute slows both
                times[form].append(seconds(steps[form][0]))
        samples = steps["ours"][1]
        del steps                                                   # the memory is that of fresh processes
        for form in forms:
            torch.cuda.empty_cache()
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                total, above = fresh.submit(bench_memory, stage, form, args).result()
            second = float(np.median(times[form]))
            row = dict(stage=stage, form=form, ms=1000 * second, images_per_s=samples / second, peak_GB=total, step_GB=above,
                       tflops=flops[form] / second / 1e12, share_of_peak=flops[form] / second / 1e12 / peak)
            text = "{stage:10} {form:10} {ms:9.1f} {images_per_s:9.1f} {peak_GB:8.2f} {step_GB:10.2f} {tflops:8.3f} {share_of_peak:8.1%}"
            if form == "published":
                row |= dict(time_ratio=row["ms"] / rows[-1]["ms"], memory_ratio=above / rows[-1]["step_GB"])
                text += " {time_ratio:7.2f} {memory_ratio:9.2f}"
            rows.append(row)
            say(text.format(**row))
    settings = {key: getattr(args, key) for key in ("device", "batch_size", "precision", "derivative", "compile")}
    say(json.dumps(dict(settings, model=model, matmul_tflops=peak, torch=torch.__version__, rows=rows)))


# ----------------------------------------------------------------------------------------------------------------------
# Command line

def bf16_pays():
    """Whether this CPU has instructions for bf16; without them it is slower than float32."""
    return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))


def start_wandb(args, c):
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb: the package wandb is not installed; pip install wandb, or leave the flag out") from None
    return wandb.init(project="meanflow-rae", name=f"{Path(args.out).name}-{c['stage']}", config=c)


def set_backends(args):
    torch.set_float32_matmul_precision("high")                         # TF32 on CUDA
    if args.device == "cpu":
        torch.backends.cuda.enable_flash_sdp(False)                    # despite the name also the CPU's, slow at few tokens


def build_parser():
    title, paper, stages, examples, writes = __doc__.strip().split("\n\n")
    parser = Parser(description=f"{title}\n\n{stages}", epilog=f"examples:\n{examples}\n\n{writes}")
    add = parser.add_argument_group("what to train").add_argument
    add("--stage", metavar="STAGE", choices=[*TOY], help="one stage (default with --toy: all of them in turn, then a report)")
    add("--toy", action="store_true", help="small networks, 32 x 32 images, a CPU")
    add("--resolution", metavar="N", type=at_least(32, 4096), default=256, help="side of the images, a multiple of 16 pixels (default 256)")
    add("--data", metavar="DIR", help="folder with one folder of images for each class (default with --toy: drawn pictures)")
    add("--model", metavar="SIZE", choices=[*{**DECODERS, **MODELS}], help="S, B, XL, of the decoder also L (default XL; with --toy: toy)")
    add("--out", metavar="DIR", help="folder of the checkpoints (default out/toy, out/photographs, out/256 or out/512)")
    add = parser.add_argument_group("what to start from (default: the checkpoints in OUT, then the published weights)").add_argument
    add("--init", metavar="PATH", help="checkpoint to start the network from, or none: random")
    add("--teacher", metavar="PATH", help="checkpoint of the velocity network, ours or published")
    add("--rae", metavar="PATH", help="checkpoint with the RAE, or a folder laid out like the hub repository")
    add("--encoder", metavar="NAME", help=f"for the stage rae: a vision transformer of timm (default {DINOV2})")
    add("--encoder_weights", metavar="FILE", help="local file with the encoder's weights, or random (default: timm's hub)")
    add("--vgg_weights", metavar="FILE", help="the same for VGG-16, whose features LPIPS compares")
    add("--lpips_weights", metavar="FILE", help="the same for the linear heads of LPIPS")
    add("--dino_weights", metavar="FILE", help="the same for DINO ViT-S/8, on which the discriminator stands")
    add = parser.add_argument_group("how (defaults: the tables at the top of train.py)").add_argument
    add("--steps", metavar="N", type=at_least(1), help="optimiser steps of a stage (default: the tables' row)")
    add("--batch_size", metavar="N", type=at_least(1, 10**6), help="samples a step, all processes; of mid, trajectories (default: row)")
    add("--micro_batch", metavar="N", type=at_least(1), help="samples at a time on a process, gradients add up (default: all)")
    add("--lr", metavar="X", type=between(1e-12, 1e3), help="peak learning rate (default: the tables' row)")
    add("--derivative", choices=("jvp", "fd"), default="jvp", help="du/dt: exact, or central difference (default jvp)")
    add("--precision", choices=("fp32", "bf16"), help="bf16: autocast (default: fp32; on a CPU that is fast at it, bf16)")
    add("--delta", metavar="X", type=between(1e-12, 1), help="step of the central difference (default 0.005)")
    add("--gap_share", metavar="X", type=between(0, 1), help="share of samples with r < t (default 0.25)")
    add("--power", metavar="X", type=between(0, 1), help="of the weighting: 1 is log L, 0 the squared error (default 1; toy 0)")
    add("--nodes", metavar="N", type=at_least(3, 1000), help="points of a teacher's trajectory in mid (default 17)")
    add("--solver", choices=("euler", "heun"), help="of these trajectories; heun: two evaluations a step (default euler)")
    add("--guidance", metavar="X", type=between(0, 1e3), help="classifier-free, of the teacher in mid and distill (default 1: none)")
    add("--perceptual", metavar="X", type=between(0, 1e6), help="weight of LPIPS in the stage rae (default 1; 0 leaves it out)")
    add("--adversarial", metavar="X", type=between(0, 1e6), help="the same of the adversarial loss (default 0.75)")
    add("--checkpointing", action="store_true", help="keep no activations inside blocks: less memory, a third more time")
    add("--shard", action="store_true", help="divide the optimiser's moments among the processes")
    add("--compile", action="store_true", help="torch.compile the trained network")
    add("--seed", metavar="N", type=at_least(0), default=0, help="of all random draws (default 0)")
    add("--device", metavar="NAME", help="cpu or cuda (default: a GPU if there is one)")
    add("--workers", metavar="N", type=at_least(0, 1000), help="processes a rank that read files (default: 8, if there are cores)")
    add("--timeout", metavar="X", type=between(1e-3, 1e6), default=30, help="minutes to wait for a process that hangs (default 30)")
    add = parser.add_argument_group("what to write").add_argument
    add("--save_every", metavar="N", type=at_least(1), help="steps between checkpoints (default 2500; with --toy 500)")
    add("--sample_every", metavar="N", type=at_least(1), help="steps between pictures (default 2500; with --toy 500)")
    add("--log_every", metavar="N", type=at_least(1), help="steps between lines of the log (default 50; with --toy 10)")
    add("--eval_every", metavar="N", type=at_least(1), help="steps between scores of samples against --ref (default: never)")
    add("--ref", metavar="PATH", help="reference of the scores: folder, npz or statistics, as fid.py takes it")
    add("--eval_num", metavar="N", type=at_least(1, 10**7), default=50_000, help="samples to score (default 50000)")
    add("--eval_features", metavar="NAME", default="inception", help="as fid.py's --features (default inception)")
    add("--eval_weights", metavar="FILE", help="as fid.py's --weights")
    add("--wandb", action="store_true", help="also log to Weights & Biases")
    add("--bench", action="store_true", help="train nothing: time and memory of a step, beside the published form of it")
    add("--report", nargs="+", metavar="CKPT", help="with --toy: train nothing, print the table's rows of these checkpoints")
    add("--dry_run", action="store_true", help="one step of everything, written to a temporary folder and deleted")
    return parser


def parse_arguments():
    """The flags, held against each other. Raises UserError."""
    args = build_parser().parse_args()
    need(bool(args.eval_every) == bool(args.ref) and not (args.eval_every and args.stage in (None, *ON_IMAGES)),
         "--eval_every: needs --ref, and --stage flow, mid, distill or bootstrap")
    need(args.toy or not args.report, "--report: needs --toy; sample.py and fid.py score other checkpoints")
    need(not args.bench or args.stage not in ON_IMAGES, f"--bench: measures flow, mid, distill and bootstrap, not {args.stage}")
    need(args.stage or args.toy or args.bench, "give --stage, or --toy for all stages on a CPU (see --help)")
    need(args.toy or args.stage != "encoder", "--stage encoder belongs to --toy; at ImageNet size the encoder is DINOv2, as it is")
    need(not args.encoder or args.stage == "rae" and not args.toy,
         f"--encoder {args.encoder}: belongs to --stage rae without --toy; later stages use the encoder of their RAE")
    need(args.resolution % 16 == 0, f"--resolution {args.resolution}: must be a multiple of 16")
    if not args.out:
        args.out = ("out/photographs" if args.data else "out/toy") if args.toy else f"out/{args.resolution}"
    for flag, toy, paper in (("save_every", 500, 2500), ("sample_every", 500, 2500), ("log_every", 10, 50)):
        setattr(args, flag, getattr(args, flag) or (toy if args.toy else paper))
    if args.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        args.workers = max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    return args


def main():
    for words in ("torch.jit.script", "broadcast_buffers"):            # told about torch's own insides, not about this run
        warnings.filterwarnings("ignore", message=f".*{words}.*")
    args = parse_arguments()
    fid.join_processes(timedelta(minutes=args.timeout))
    args.device = pick_device(args.device)
    args.keep_precision = args.precision is None
    args.precision = args.precision or ("bf16" if args.device == "cpu" and args.toy and bf16_pays() else "fp32")
    set_backends(args)
    if args.bench:
        return bench(args)
    if args.report:
        args.save_to = args.out
        return report(args, load_data(args))
    try:
        temporary = tempfile.TemporaryDirectory() if args.dry_run else nullcontext(args.out)
        with temporary as folder:
            shared = [str(folder)]
            if dist.is_initialized():
                dist.broadcast_object_list(shared)
            args.save_to = shared[0]
            if args.dry_run and not args.stage:
                args.out = args.save_to
            data = load_data(args) if args.stage != "mid" else None
            clock = time.perf_counter()
            if not args.stage and fid.place()[0] == 0:
                print(f"the stages {', '.join(TOY)}, then a report; pictures, logs and checkpoints go to {args.save_to}", file=sys.stderr)
            for stage in [args.stage] if args.stage else TOY:
                with Stop() as stop:
                    train(stage, args, data, stop)
            if fid.place()[0] == 0:
                if args.toy and not args.stage:
                    report(args, data)
                tqdm.write(f"{(time.perf_counter() - clock) / 60:.1f} minutes", file=sys.stderr)
    except RuntimeError as error:
        raise lost_process(error) or error from None


if __name__ == "__main__":
    run_main(main)
