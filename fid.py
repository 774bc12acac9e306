"""Scores of generated images against real ones: FID, sFID, Inception Score, precision and recall,
the same Frechet distance in other features than Inception's, and the report that ends a toy run.

The paper, arXiv 2511.13019, reports the FID of its samples. Each definition is cited where it is.

    python fid.py SAMPLES REFERENCE                            # a table of scores
    python fid.py SAMPLES REFERENCE --json --features dino     # in DINOv2's features, as JSON
    python fid.py stats REFERENCE --out reference.npz          # measure once, compare often
    torchrun --nproc_per_node=8 -- fid.py SAMPLES REFERENCE    # the processes share the images

SAMPLES and REFERENCE are folders of images of one size, nested or not; .npz files with arr_0 =
uint8 (N, H, W, 3), as sample.py writes them; reference files of ADM's evaluation suite; or files
that `stats` wrote.
"""
import argparse
import hashlib
import json
import os
import sys
import zipfile
import zlib
from collections import namedtuple
from functools import partial
from glob import escape, glob
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.backends import cudnn
from torch.utils.data import DataLoader
from torchvision.datasets.folder import is_image_file
from torchvision.models import Inception3
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms.functional import InterpolationMode, normalize, pil_to_tensor, resize
from tqdm import tqdm

from dit import load_file
from rae import fetch, load_rae, read_image, timm_network
from sample import (
    Place, computing, draw_grid, load_all, make_images, print0, start_processes, write_whole
)

# The end of the file's name is the start of its sha256.
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + INCEPTION_FILE
)

# Stein et al. 2023, arXiv 2306.04675, score with this network's class token at 224 pixels.
DINO = "vit_large_patch14_dinov2.lvd142m"

# What ADM's files of statistics call the mean and the covariance of a part of the features.
MOMENTS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}

ALONE = Place(rank=0, world=1, device="cpu")


# --------------------------------------------------------------------------------------------------
# The scores

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) -> float.

    The means are (D,), the covariances (D, D). Each covariance is split as sigma = R R^T; the
    trace of the root is then the sum of the singular values of R1^T R2, which needs no matrix
    root. A NaN or an infinity raises ValueError. Source: arXiv 1706.08500.
    """
    mu1, sigma1, mu2, sigma2 = [
        np.asarray_chkfinite(moment, np.float64) for moment in (mu1, sigma1, mu2, sigma2)
    ]

    def root(sigma):
        values, vectors = np.linalg.eigh(sigma)
        return vectors * np.sqrt(values.clip(0))                                # (D, D)

    singular_values = np.linalg.svd(root(sigma1).T @ root(sigma2), compute_uv=False)
    squared = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2)
    return max(float(squared - 2 * singular_values.sum()), 0.0)


def inception_score(logits, split_size=5000):
    """exp of the mean KL(p(y|x), p(y)) of logits (N, C) -> (mean over splits, score of all).

    ADM averages the scores of splits of 5,000 images. Source: arXiv 1606.03498.
    """
    def entropy(p):
        return torch.special.entr(p).sum(-1)

    def score(part):
        p = part.double().softmax(1)                                            # (n, C)
        return (entropy(p.mean(0)) - entropy(p).mean()).exp().item()

    split_scores = [score(part) for part in logits.split(split_size)]
    return float(np.mean(split_scores)), score(logits)


def precision_recall(samples, reference, k=3, chunk=500):
    """Precision and recall of samples (N, D) against a reference (M, D), two floats.

    A set's manifold is the union of balls around its points, each as wide as the distance to the
    k-th nearest other point. Precision is the share of the samples in the reference's manifold,
    recall the share of the reference in the samples' manifold. Source: arXiv 1904.06991.
    """
    def share_inside(points, centres):
        # The nearest centre is the point itself, so the k-th other one is number k + 1.
        parts = centres.split(chunk)
        radii = torch.cat([torch.cdist(part, centres).kthvalue(k + 1).values for part in parts])
        inside = [(torch.cdist(part, centres) <= radii).any(1) for part in points.split(chunk)]
        return torch.cat(inside).double().mean().item()

    samples = samples.double()
    reference = reference.double()
    return share_inside(samples, reference), share_inside(reference, samples)


# --------------------------------------------------------------------------------------------------
# Inception: torchvision's, with the resize, the pooling and the 1008 outputs of December 2015

def resize_tensorflow1(images, size=299):
    """Bilinear resize of TensorFlow 1, which is part of what FID means: (N, C, size, size).

    Output pixel i samples the input at i * length / size, without half-pixel centres.
    """
    for _ in range(2):                                                          # across, then down
        length = images.shape[3]
        scale = torch.tensor(length / size, dtype=torch.float32)
        position = torch.arange(size, device=images.device) * scale
        low = position.long()
        left = images[..., low]
        right = images[..., (low + 1).clamp(max=length - 1)]
        images = left + (right - left) * (position - low).to(images.dtype)
        images = images.transpose(2, 3)
    return images


class Inception(Inception3):
    """Inception v3 of 2015-12-05, uint8 (N, 3, H, W) -> a dict of float32:

      pool     (N, 2048)  the mean of the last block, for FID, precision and recall
      logits   (N, 1008)  without the bias, which ADM and the first Inception Score leave out
      spatial  (N, 2023)  for sFID: 7 channels at 17 x 17 positions, ordered as TensorFlow does by
               row, column and channel. ADM's "mixed_6/conv:0"[..., :7] is the 1x1 branch of
               Mixed_6d; we derived this from the names and did not run ADM's graph.

    load_state_dict takes INCEPTION_FILE. Images of another type or layout raise ValueError.
    """

    def __init__(self):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        self.eval().requires_grad_(False)

    def forward(self, images):
        if images.dtype != torch.uint8 or images.shape[1] != 3:
            raise ValueError(
                f"images: {images.dtype} {tuple(images.shape)} is not uint8 (N, 3, H, W); "
                "convert them"
            )

        # torchvision lists the layers in the order in which they run, and at the end its own
        # pooling, dropout and classification, which are not used.
        x = (resize_tensorflow1(images.float()) - 128) / 128                    # (N, 3, 299, 299)
        for name, layer in self.named_children():
            if name == "avgpool":
                break
            if not hasattr(layer, "branch_pool"):
                x = layer(x)                                                    # (N, C, h, w)
                continue

            # The last branch of a block is pooled once more, as in 2015. torchvision's average
            # counts the zeros of the padding, TensorFlow's did not; Mixed_7c took the maximum.
            branches = layer._forward(x)
            if name == "Mixed_7c":
                pooled = F.max_pool2d(x, 3, stride=1, padding=1)
            else:
                pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
            branches[-1] = layer.branch_pool(pooled)
            x = torch.cat(branches, 1)                                          # (N, C, h, w)
            if name == "Mixed_6d":                                              # (N, 768, 17, 17)
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)               # (N, 2023)

        pool = x.mean((2, 3))                                                   # (N, 2048)
        return {"pool": pool, "spatial": spatial, "logits": pool @ self.fc.weight.T}


# --------------------------------------------------------------------------------------------------
# Extractors

# extract: uint8 (B, 3, H, W) -> {"pool": (B, dims)}, of Inception also "spatial" and "logits".
# The name ends in a hash of the weights, so that statistics of two networks never meet.
Extractor = namedtuple("Extractor", "extract name dims spatial_dims", defaults=(None,))


def fingerprint(network):
    """The first 8 hexadecimal digits of the sha256 of a network's weights as float32."""
    digest = hashlib.sha256()
    for _, tensor in sorted(network.state_dict().items()):
        digest.update(tensor.cpu().float().numpy().tobytes())
    return digest.hexdigest()[:8]


def rae_extractor(rae):
    """The mean over positions of the latents of an RAE's encoder, before normalisation."""
    def extract(images):
        return {"pool": rae.encoder(images / 255).mean((2, 3))}                 # (B, C)

    return Extractor(extract, f"rae-{fingerprint(rae.encoder)}", rae.latent_shape[0])


def make_extractor(features="inception", weights=None, device="cpu"):
    """The extractor "inception", "dino" or "rae".

    weights: as in fetch; of inception also its file; of rae a checkpoint.
    """
    if features == "rae":
        if weights is None:
            raise SystemExit("--features rae: give --weights, a checkpoint that holds the RAE")
        return rae_extractor(load_rae(weights).fetch_encoder().to(device))

    if features == "inception":
        if not weights or not Path(weights).is_file():
            weights = fetch(INCEPTION_FILE, INCEPTION_URL, weights)
        network = Inception()
        network.load_state_dict(load_file(weights))
        return Extractor(network.to(device), f"inception-{fingerprint(network)}", 2048, 2023)

    network = timm_network(DINO, weights, img_size=224).to(device)

    def extract(images):
        x = resize(images, (224, 224), InterpolationMode.BICUBIC)               # as PIL resizes
        config = network.pretrained_cfg
        x = normalize(x / 255, config["mean"], config["std"])                   # (B, 3, 224, 224)
        x = network.forward_features(x)                                         # (B, N, D)
        return {"pool": network.forward_head(x, pre_logits=True)}               # (B, D)

    return Extractor(extract, f"dino-{fingerprint(network)}", network.num_features)


# --------------------------------------------------------------------------------------------------
# Statistics of images

# moments: {part: (mean (D,), covariance (D, D))}. features: {part: (N, D)}, empty where no image
# was seen. image_size: as "(256, 256)", height and width, or "" where a file does not say.
Statistics = namedtuple("Statistics", "moments features image_size")


def sum_over_processes(tensor):
    """Add up a tensor of all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_rows(rows):
    """The rows (n, D) of all processes, in the order of their ranks: (N, D)."""
    if not dist.is_initialized():
        return rows

    counts = [0] * dist.get_world_size()
    dist.all_gather_object(counts, len(rows))
    first = sum(counts[:dist.get_rank()])

    everything = rows.new_zeros(sum(counts), rows.shape[1])                     # (N, D)
    everything[first:first + len(rows)] = rows
    return sum_over_processes(everything)


def measure(extractor, batches, device, keep=()):
    """Statistics of the images of all processes, from this process's share of them.

    batches: uint8 (B, 3, H, W), or a sentence where an image cannot be used. keep: the parts whose
    features are kept. The moments are exact: sums in float64, which do not depend on the size of
    the batches. SystemExit where there are too few images for a covariance of full rank.
    """
    count = 0
    sums = {}
    kept = {}
    for images in batches:
        if isinstance(images, str):
            raise SystemExit(images)

        # A training run calls this too, but scores are always in full float32, without autocast
        # and without cuDNN's TF32, which is on by default.
        with computing("fp32", device), cudnn.flags(enabled=cudnn.enabled, allow_tf32=False):
            features = extractor.extract(images.to(device))

        count += len(images)
        for part, rows in features.items():
            if part in keep:
                kept.setdefault(part, []).append(rows)
            if part != "logits":
                # The product of a last column of ones with x holds the count and the sum.
                x = F.pad(rows.double(), (0, 1), value=1.0)                     # (B, D + 1)
                sums[part] = sums.get(part, 0) + x.T @ x                        # (D + 1, D + 1)

    count = int(sum_over_processes(torch.tensor(count, device=device)))
    if count <= extractor.dims:
        raise SystemExit(
            f"{count} images for {extractor.dims} features: give more than {extractor.dims} images"
        )

    moments = {}
    for part, products in sums.items():
        products = sum_over_processes(products).cpu().numpy()
        mean = products[-1, :-1] / count                                        # (D,)
        scatter = products[:-1, :-1] - count * mean[:, None] * mean             # (D, D)
        moments[part] = mean, scatter / (count - 1)

    features = {part: gather_rows(torch.cat(rows)) for part, rows in kept.items()}
    return Statistics(moments, features, f"{tuple(images.shape[2:])}")


def read_batch(files, first):
    """Image files -> uint8 (B, 3, H, W), or a sentence on one that cannot be used.

    A process that loads data cannot end the program, so it returns a sentence. `first` is the
    folder's first image, whose size all others must have.
    """
    try:
        reference, *images = [read_image(file) for file in (first, *files)]
    except OSError as error:
        return str(error)
    for file, image in zip(files, images):
        if image.size != reference.size:
            return (
                f"{file}: {image.width} x {image.height} pixels, but {first} has "
                f"{reference.width} x {reference.height}; give images of one size"
            )
    return torch.stack([pil_to_tensor(image) for image in images])


def folder_images(path, place, batch_size):
    """This process's share of a folder's images, uint8 (B, 3, H, W), in a fixed random order.

    glob leaves out names that begin with a dot, which are not the user's images but copies that
    other programs keep, such as ._x.jpg.
    """
    files = sorted(filter(is_image_file, glob(f"{escape(str(path))}/**", recursive=True)))
    if not files:
        raise SystemExit(f"{path}: no image in this folder; give one that holds images")

    shuffled = np.random.RandomState(0).permutation(files)
    return DataLoader(
        np.array_split(shuffled, place.world)[place.rank],
        batch_size,
        num_workers=min(4, os.cpu_count()),
        collate_fn=partial(read_batch, first=files[0])
    )


def npz_images(path, place, batch_size):
    """This process's share of an .npz's arr_0, uint8 (B, 3, H, W), read as a stream."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        np.lib.format.read_magic(file)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype != np.uint8 or fortran_order or shape[3:] != (3,) or min(shape) < 1:
            raise SystemExit(
                f"{path}: arr_0 is {dtype} {shape}, not one or more images as uint8 (N, H, W, 3); "
                "round floats to uint8 before saving"
            )

        num, height, width, _ = shape
        size = height * width * 3
        found = archive.getinfo("arr_0.npy").file_size - file.tell()
        if found != num * size:
            raise SystemExit(
                f"{path}: arr_0 holds {found} bytes, but its header promises {num * size}, "
                f"{shape}; make the file again"
            )

        first = num * place.rank // place.world
        last = num * (place.rank + 1) // place.world
        file.seek(first * size, os.SEEK_CUR)
        for i in range(first, last, batch_size):
            content = bytearray(file.read(min(batch_size, last - i) * size))
            pixels = torch.frombuffer(content, dtype=torch.uint8)
            yield pixels.view(-1, height, width, 3).permute(0, 3, 1, 2)         # (B, 3, H, W)


def recorded_moments(path, archive, extractor):
    """The moments in an open .npz; none where they are of another network."""
    moments = {}
    # ADM's files do not name their network, which is Inception.
    if not extractor.name.startswith(str(archive.get("extractor", "inception"))):
        return moments

    expected = {"pool": extractor.dims, "spatial": extractor.spatial_dims}
    for part, (mu, sigma) in MOMENTS.items():
        if mu in archive:
            moments[part] = archive[mu], archive[sigma]
            dims = len(archive[mu])
            if dims != (expected[part] or dims):
                raise SystemExit(
                    f"{path}: {mu} has {dims} dimensions, but {extractor.name} has "
                    f"{expected[part]}; give images, or statistics of this network"
                )
    return moments


def statistics_of(path, extractor, keep, place, batch_size=32):
    """Statistics of a folder, an .npz or batches. Recorded moments come before measured ones."""
    if not isinstance(path, (str, Path)):
        return measure(extractor, path, place.device, keep)

    moments = {}
    image_size = ""
    batches = None
    try:
        if Path(path).is_dir():
            batches = folder_images(path, place, batch_size)
        elif zipfile.is_zipfile(path):
            with np.load(path) as archive:                                      # reads on demand
                moments = recorded_moments(path, archive, extractor)
                image_size = str(archive.get("image_size", ""))
                if "arr_0" in archive:
                    batches = npz_images(path, place, batch_size)

        if batches:
            measured = measure(
                extractor, tqdm(batches, str(path), disable=place.rank > 0), place.device, keep
            )
            return measured._replace(moments=measured.moments | moments)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise SystemExit(f"{path}: damaged ({error}); make or copy it again") from error

    if not moments:
        raise SystemExit(f"{path}: neither images nor statistics of {extractor.name}; give images")
    return Statistics(moments, {}, image_size)


def compare(found, reference, names):
    """The scores of Statistics that both sides allow; the others are missing.

    names: {part: what its Frechet distance is called}.
    """
    scores = {}
    for part, name in names.items():
        if part in found.moments and part in reference.moments:
            scores[name] = frechet_distance(*found.moments[part], *reference.moments[part])

    if "pool" in found.features and "pool" in reference.features:
        scores["precision"], scores["recall"] = precision_recall(
            found.features["pool"], reference.features["pool"]
        )
    return scores


class Scorer:
    """Scorer(reference, ...)(samples) -> a dict of scores on rank 0, an empty one elsewhere.

    reference: a path. samples: a path, or batches uint8 (B, 3, H, W) of this process's share of
    the images. features and weights: as in make_extractor. place: sample.Place.
    """

    def __init__(
        self, reference, features="inception", weights=None, place=ALONE, batch_size=32
    ):
        self.rank = place.rank
        self.extractor = make_extractor(features, weights, place.device)
        self.statistics_of = partial(
            statistics_of, extractor=self.extractor, place=place, batch_size=batch_size
        )
        self.reference = self.statistics_of(reference, keep=["pool"])

    def __call__(self, samples):
        found = self.statistics_of(samples, keep=["logits", *self.reference.features])
        if self.rank > 0:
            return {}
        if len({found.image_size, self.reference.image_size} - {""}) > 1:
            print0(
                f"the samples are {found.image_size} pixels large, but the reference's images "
                f"{self.reference.image_size}: published scores compare images of one size"
            )

        scores = {"extractor": self.extractor.name}
        pool = "fid" if self.extractor.name.startswith("inception") else "fd"
        scores |= compare(found, self.reference, {"pool": pool, "spatial": "sfid"})

        if "logits" in found.features:
            scores["inception_score"], scores["inception_score_all"] = inception_score(
                found.features["logits"]
            )
        return scores


# --------------------------------------------------------------------------------------------------
# The report of the toy: teachers and students in 1, 2, ... steps

# What pictures call a checkpoint, by the stem of its file, and the numbers of steps they show.
TITLES = {
    "flow": "teacher",
    "mid": "paper's student (mid)",
    "distill": "paper's student (distill)",
    "bootstrap": "paper's student (bootstrap)"
}
SHOWN_STEPS = {None: "", 1: ", 1 step", 25: ", 25 steps"}


def train_classifier(images, labels, num_classes, device, steps=250):
    """A small convolutional network, trained on uint8 (M, 3, 32, 32) and labels (M,).

    It says whether a sample shows the class that was asked for.
    """
    torch.manual_seed(0)
    conv = partial(Conv2dNormActivation, bias=True)                             # 3 x 3
    network = nn.Sequential(
        conv(3, 32),
        conv(32, 64, stride=2),
        conv(64, 128, stride=2),
        conv(128, 256, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(256, num_classes)
    ).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)

    for chosen in tqdm(torch.randint(len(images), (steps, 128)), "classifier"):
        logits = network(images[chosen].to(device) / 255)                       # (128, classes)
        F.cross_entropy(logits, labels[chosen].to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return network.eval()


def with_classifier(encoder, classifier):
    """An extractor of the encoder's features, the classifier's last ones and its logits."""
    def extract(images):
        hidden = classifier[:-1](images / 255)                                  # (B, 256)
        return encoder.extract(images) | {
            "classifier": hidden,
            "logits": classifier[-1](hidden)                                    # (B, classes)
        }

    return Extractor(extract, encoder.name, 256)


def score_row(found, reference, labels):
    """Scores of the Statistics of images of the labels (N,), as columns of the table."""
    scores = compare(found, reference, {"pool": "fd_encoder", "classifier": "fd_classifier"})
    predicted = found.features["logits"].argmax(1).cpu()                        # (N,)
    scores["accuracy"] = (predicted == labels).float().mean().item()
    return scores


def print_row(row):
    """A line of the table; pictures that no network drew have no number of steps."""
    print(
        f"{row['name']:20} {row['steps'] or '':>5} {row['fd_encoder']:11.3f} "
        f"{row['precision']:10.3f} {row['recall']:7.3f} {row['fd_classifier']:14.2f} "
        f"{row['accuracy']:9.1%}",
        flush=True
    )


def never():
    return False


def report(paths, data, held_out, out, device, num, precision, stopped=never):
    """Score checkpoints of the toy -> a table, which is printed and saved, a chart and a picture.

    data: images and labels for the classifier. held_out: those that no stage has seen, nor the
    classifier, with .images uint8 (M, 3, 32, 32) and .targets (M,); num samples are scored against
    them. The files go to the folder out, but none is written once stopped() is true after a row.
    """
    # At least 250 steps of 128 images, but at most ten passes over few images.
    num_images = len(data.images)
    steps = min(max(250, num_images // 90), num_images // 12)
    classifier = train_classifier(data.images, data.targets, len(data.classes), device, steps)

    # Held-out images by class, and samples that have the classes of evenly spaced ones: the shares
    # of the classes are the same. The picture shows the first sample of each class.
    real = held_out.images
    real_labels = held_out.targets
    order = real_labels.argsort(stable=True)
    real = real[order]                                                          # (M, 3, 32, 32)
    evenly = torch.arange(num) * len(real) // num                               # (num,)
    labels = real_labels[order][evenly]                                         # (num,)
    columns = np.unique(labels, return_index=True)[1][:10]

    rows = []
    pictures = {}
    references = {}                                         # of the held-out images, by encoder

    def images_to_score():
        """Yield name, title and steps of a row, its images uint8 (N, 3, 32, 32), and their RAE."""
        for path in map(Path, paths):
            network, rae, alpha, names = load_all(path, device=device)
            if rae.encoder is None or len(names) != len(data.classes):
                raise SystemExit(
                    f"{path}: not of the toy, or of other classes; give a checkpoint of this data"
                )

            if not rows:                                    # with the first checkpoint
                yield "held-out pictures", "held-out pictures", None, real, rae
                with computing(precision, device):
                    decoded = rae.reconstruct(real)
                yield "reconstructions", "reconstructions", None, decoded, rae

            name = path.stem
            title = TITLES.get(name, name)
            if path.parent != out:
                name = f"{path.parent.name}/{name}"
                title = f"{title} of {path.parent.name}"
            for steps in (1, 2, 4) if network.average_velocity else (25, 4, 1):
                batches = make_images(
                    network, rae, alpha, labels, steps, batch_size=250, precision=precision
                )
                images = torch.cat([images for _, images in batches])           # (num, 3, 32, 32)
                yield name, title, steps, images, rae

    print(f"\n{'':20} steps  FD encoder  precision  recall  FD classifier  accuracy")
    for name, title, steps, images, rae in images_to_score():
        extractor = with_classifier(rae_extractor(rae), classifier)
        if extractor.name not in references:
            references[extractor.name] = measure(extractor, real.split(500), device, ["pool"])
        found = measure(extractor, images.split(500), device, ["pool", "logits"])
        row = {"name": name, "title": title, "steps": steps}
        row |= score_row(found, references[extractor.name], labels if steps else real_labels[order])
        print_row(row)
        rows.append(row)

        if steps in SHOWN_STEPS:
            first = columns if steps else evenly[columns]
            pictures[title + SHOWN_STEPS[steps]] = images[first]                # (10, 3, 32, 32)
        if stopped():
            return

    write_whole(out / "report.json", lambda file: file.write_text(json.dumps(rows, indent=1)))
    write_whole(out / "report.png", draw_chart(rows[2:]).save)
    write_whole(
        out / "comparison.png",
        draw_grid(torch.cat([*pictures.values()]), len(columns), [*pictures]).save
    )
    print(
        f"\nFD is the Frechet distance of {num} samples to {len(real)} held-out images; precision "
        f"and recall are those of the encoder's features.\n{out}: report.json (the table), "
        "report.png (its curves), comparison.png (samples side by side)"
    )


# --------------------------------------------------------------------------------------------------
# The chart of the report

def draw_chart(rows):
    """Frechet distance against steps, a curve a network, both axes logarithmic: a PIL image.

    It is drawn in triple size, 2400 x 1200 pixels, and scaled down, which smooths the lines.
    """
    picture = Image.new("RGB", (2400, 1200), "white")
    pen = ImageDraw.Draw(picture)
    write = partial(pen.text, fill="black", font_size=42, anchor="mm")
    distances = [row["fd_encoder"] for row in rows]
    low = min(distances) / 1.5
    high = max(distances) * 1.5

    def x_of(steps):
        return 300 + 350 * np.log(steps)

    def y_of(distance):
        return 1050 - 1000 * np.log(distance / low) / np.log(high / low)

    pen.rectangle((200, 50, 1500, 1050), outline="black", width=4)
    write((850, 1160), "steps (evaluations of the network)")
    write((1930, 110), "Frechet distance to held-out pictures,\nin the encoder's features")
    for steps in (1, 2, 4, 25):
        write((x_of(steps), 1090), f"{steps}")
    for third in np.logspace(-3, 6, 28):
        tick = float(f"{third:.1g}")                        # 1, 2, 5, 10, 20, ...
        if low < tick < high:
            write((130, y_of(tick)), f"{tick:g}")

    for i, (title, curve) in enumerate(groupby(rows, lambda row: row["title"])):
        points = [(x_of(row["steps"]), y_of(row["fd_encoder"])) for row in curve]
        colour = f"hsl({220 + 80 * i}, 80%, 40%)"
        pen.line(points, colour, 8)
        for point in points:
            pen.circle(point, 12, colour)
        write((1560, 300 + 60 * i), title, fill=colour, anchor="lm")
    return picture.resize((800, 400), Image.Resampling.LANCZOS)


# --------------------------------------------------------------------------------------------------
# Command line

def existing(path):
    if not Path(path).exists():
        raise SystemExit(f"{path}: no such file or folder; give images or statistics")
    return path


def write_statistics(args, place):
    """As ADM's files, but with the network's name and the images' size."""
    if not args.out or args.out.exists() or args.out.suffix != ".npz":
        raise SystemExit(f"--out {args.out}: give the name of a new file that ends in .npz")

    extractor = make_extractor(args.features, args.weights, place.device)
    found = statistics_of(args.reference, extractor, (), place)
    content = {"extractor": extractor.name, "image_size": found.image_size}
    for part, moments in found.moments.items():
        content |= zip(MOMENTS[part], moments)

    if place.rank == 0:
        write_whole(args.out, partial(np.savez, **content))
    print0(f"{args.out}: statistics of {args.reference}, {extractor.name}")


def main(argv=None):
    argv = argv or sys.argv[1:]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    stats = argv[:1] == ["stats"]
    if stats:
        argv = argv[1:]
        add("--out", metavar="FILE", type=Path, help="the .npz to write")
    else:
        add("samples", type=existing, help="folder of images, .npz of images, or statistics")
        add("--json", action="store_true", help="print a line of JSON, not a table")
    add("reference", type=existing, help="folder of images, .npz of images, or statistics")
    add("--features", default="inception", choices=("inception", "dino", "rae"),
        help="the network whose features are compared (default inception)")
    add("--weights", metavar="PATH",
        help="folder laid out like the hub, Inception's file or, for rae, a checkpoint")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    args = parser.parse_args(argv)

    place = start_processes(args.device)
    if stats:
        return write_statistics(args, place)
    scores = Scorer(args.reference, args.features, args.weights, place)(args.samples)
    if args.json and scores:
        print(json.dumps(scores))
    else:
        for name, score in scores.items():
            print(f"{name:20} {score}")


if __name__ == "__main__":
    main()
