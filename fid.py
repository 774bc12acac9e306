"""Scores of generated images against real ones: FID, sFID, Inception Score, precision, recall, and the same Frechet
distance in the features of DINOv2, of any timm model, or of the RAE's own encoder.

Paper: arXiv 2511.13019 reports FID; the definitions are cited where they are computed.

    python fid.py SAMPLES REFERENCE                                   # a table of scores
    python fid.py SAMPLES REFERENCE --json --features dino            # in DINOv2's features, as a line of JSON
    python fid.py stats REFERENCE -o reference.npz                    # measure once, compare often: this is a REFERENCE too
    torchrun --nproc_per_node=8 -- fid.py SAMPLES REFERENCE           # the processes share the images

SAMPLES, REFERENCE: a folder of images, nested or not; an .npz with arr_0 = uint8 (N, H, W, 3), as sample.py writes it;
a reference .npz of ADM's evaluation suite; or a file made by `stats`. The file is in the order in which a score is made;
train.py scores its samples by the same Scorer as the commands.
"""
import atexit
import hashlib
import json
import math
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Callable, NamedTuple

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.linalg import lapack
from torch.backends import cudnn
from torchvision.models import Inception3
from tqdm import tqdm

from rae import (Parser, ProcessLost, at_least, download, known_to_timm, load_file, load_rae, need, one_line, pick_device, read_image,
                 reading, run_main, timm_network)

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"  # the end of the name is the start of the file's sha256
INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + INCEPTION_FILE
DINO = "vit_large_patch14_dinov2.lvd142m"  # CLS token at 224, the extractor of Stein et al. 2023, arXiv 2306.04675


# ----------------------------------------------------------------------------------------------------------------------
# Inception: torchvision's, with the resize, the pooling and the 1008 outputs of December 2015

def resize_tensorflow1(images, size=299):
    """Bilinear resize as in TensorFlow 1: output pixel i samples the input at i * in / out, no half-pixel centres.
    Float (N, C, H, W), any range -> (N, C, size, size), same range. It shifts the image by up to half a pixel, and that
    is part of what FID means. Source: TF 1's ResizeBilinear, align_corners=False."""
    def taps(length):
        position = torch.arange(size, device=images.device) * torch.tensor(length / size, dtype=torch.float32)
        low = position.long()
        return low, (low + 1).clamp(max=length - 1), (position - low).to(images.dtype)
    top, bottom, down = taps(images.shape[2])
    left, right, across = taps(images.shape[3])
    rows = images[..., left] + (images[..., right] - images[..., left]) * across  # (N, C, H, size)
    return rows[:, :, top] + (rows[:, :, bottom] - rows[:, :, top]) * down[:, None]  # (N, C, size, size)


def use_pooling(block, pool):
    """Give a block's branch_pool pool(x) of the block's input x; torchvision's own average counts the zero padding, ours must not."""
    def remember(block, inputs):
        block.pool_input = inputs[0]

    def replace(branch, inputs):
        x, block.pool_input = block.pool_input, None
        return pool(x)
    block.pool_input = None
    block.register_forward_pre_hook(remember)
    block.branch_pool.register_forward_pre_hook(replace)


class Inception(Inception3):
    """Inception v3 of 2015-12-05. load_state_dict takes INCEPTION_FILE strictly; until then the weights are random.
    forward: uint8 (N, 3, H, W) -> dict of float32; ValueError on anything else.
      pool     (N, 2048)  mean of the last block ("pool_3:0" in ADM's graph): FID, precision, recall
      logits   (N, 1008)  without the bias, which ADM and the original Inception Score leave out
      spatial  (N, 2023)  7 channels at 17x17 positions, in TensorFlow's order (row, column, channel): sFID. ADM takes
               "mixed_6/conv:0"[..., :7]. The graph's mixed, mixed_1 ... mixed_10 are 5b 5c 5d 6a 6b 6c 6d 6e 7a 7b 7c
               here, so mixed_6 is Mixed_6d; its bare "conv" is the 1x1 branch, and the node of that name the ReLU
               after batch norm. Derived from the names (Keras counts alike), not run against ADM's graph.
    """
    def __init__(self):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
            use_pooling(getattr(self, "Mixed_" + name), lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
        use_pooling(self.Mixed_7c, lambda x: F.max_pool2d(x, 3, 1, 1))  # an oddity of 2015
        self.eval().requires_grad_(False)

    def forward(self, images):
        x = (resize_tensorflow1(check_images(images).float()) - 128) / 128  # (N, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (N, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(x)))  # (N, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.maxpool2(x))))  # (N, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (N, 768, 17, 17), its 1x1 branch first
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # (N, 2023)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (N, 2048, 8, 8)
        pool = x.mean((2, 3))  # (N, 2048)
        return dict(pool=pool, spatial=spatial, logits=pool @ self.fc.weight.T)


def check_images(images):
    good = images.dtype == torch.uint8 and images.dim() == 4 and images.shape[1] == 3
    need(good, f"images: {images.dtype} {tuple(images.shape)} is not uint8 (N, 3, H, W); convert them first")
    return images


# ----------------------------------------------------------------------------------------------------------------------
# Statistics: mean and covariance of a stream

class Statistics:
    """Count, mean (D,) and unbiased covariance (D, D) of features that arrive in batches, float64 on their device.
    update(features (B, D)) adds a batch, merge(other) another process's Statistics; both return self. A batch is centred
    before it is squared, and merged by the rule of Chan et al. 1979, so neither batch size nor order matters beyond
    rounding (1e-12). `extractor` names what made the features. ValueError on NaN, and on another extractor."""
    def __init__(self, extractor="", count=0, mean=None, scatter=None):
        self.extractor, self.count, self.mean, self.scatter = extractor, count, mean, scatter

    def update(self, features):
        x = torch.as_tensor(features).detach()
        x = (x.cpu() if x.device.type == "mps" else x).double()  # (B, D); mps has no float64
        need(x.dim() == 2 and x.isfinite().all(), f"features: {tuple(x.shape)} is not (B, D), or has NaN; check weights")
        mean = x.mean(0)
        return self.merge(Statistics(self.extractor, len(x), mean, (x - mean).T @ (x - mean)))

    def merge(self, other):
        need(self.extractor == other.extractor, f"statistics: {self.extractor} met {other.extractor}; use one extractor")
        if self.count == 0 and other.count:
            self.count, self.mean, self.scatter = other.count, other.mean.clone(), other.scatter.clone()
        elif other.count:
            total, delta = self.count + other.count, other.mean.to(self.mean.device) - self.mean
            self.scatter += other.scatter.to(self.mean.device)
            self.scatter.addr_(delta, delta, alpha=self.count * other.count / total)
            self.count, self.mean = total, self.mean + delta * (other.count / total)
        return self

    @property
    def covariance(self):
        return self.scatter / (self.count - 1)


@contextmanager
def exact(device):
    """No graph and full float32, whatever a training loop has set: no autocast, no TF32. Restores its settings."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False), cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def measure(extract, batches, name="", keep=(), size=None):
    """The one road from images to numbers. extract: uint8 (B, 3, H, W) -> {part: (B, D)}, batches: an iterable of images.
    Returns {part: Statistics}, and {part: features (N, D) in order, on the CPU} for the parts in `keep`.
    ValueError on images that are not uint8, or not of one size (W, H), and on NaN."""
    statistics, kept = {}, {part: [] for part in keep}
    for batch in batches:
        here = check_images(batch).shape[3], batch.shape[2]
        size = size or here
        need(here == size, f"images: {here} pixels, not {size}; resize all to one size")
        with exact(batch.device):
            outputs = extract(batch)
        for part, x in outputs.items():
            if part in keep:
                kept[part].append(x.cpu())
            if part != "logits":
                statistics.setdefault(part, Statistics(name)).update(x)
    need(statistics, "images: none for process {} of {}; give at least one to each".format(*place()))
    return statistics, {part: torch.cat(rows) for part, rows in kept.items() if rows}


def feature_statistics(extract, images, batch_size=64, extractor=""):
    """measure() for one kind of features. extract: uint8 (B, 3, H, W) -> (B, D). images: uint8 (N, 3, H, W), cut into
    batches of batch_size, or an iterable of batches -> Statistics. extractor: its name. Of this process's images alone."""
    batches = images.split(batch_size) if torch.is_tensor(images) else images
    return measure(lambda x: dict(pool=extract(x)), batches, extractor)[0]["pool"]


# ----------------------------------------------------------------------------------------------------------------------
# The scores

def root(sigma):
    """R (D, rank) with R R^T = sigma (D, D), by Cholesky with pivoting: it stops where what is left is rounding, so a
    covariance that is not of full rank costs no accuracy. (Eigenvectors, scaled by the roots of eigenvalues of 1e-16 that
    should be 0, are off by 1e-8, and ten times slower.) ValueError where sigma has clearly negative eigenvalues."""
    tolerance = 50 * np.finfo(float).eps * sigma.diagonal().max()
    lower, order, rank, _ = lapack.dpstrf((sigma + sigma.T) / 2, tol=tolerance, lower=1)
    r = np.empty((len(sigma), rank))
    r[order - 1] = np.tril(lower)[:, :rank]
    need(np.abs((r ** 2).sum() - np.trace(sigma)) <= 1e-3 * np.trace(sigma), "frechet_distance: a matrix that is not a "
         "covariance, it has negative eigenvalues; check where it comes from")
    return torch.from_numpy(r)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), a float >= 0. Means (D,), covariances (D, D).
    The trace of the square root is the sum of the square roots of the eigenvalues of R1^T sigma2 R1, sigma1 = R1 R1^T, a
    symmetric product; with sigma2 = R2 R2^T those roots are the singular values of R1^T R2, and no rounding error is
    square-rooted. Float64; 1e-8 relative for any rank; 2048 dimensions take seconds.
    ValueError on shapes that do not match and on NaN. Source: Heusel et al. 2017, arXiv 1706.08500."""
    mu1, sigma1, mu2, sigma2 = moments = [np.asarray(a.cpu() if torch.is_tensor(a) else a, dtype=np.float64)
                                          for a in (mu1, sigma1, mu2, sigma2)]
    need([a.shape for a in moments] == [(mu1.size,), (mu1.size, mu1.size)] * 2, "frechet_distance: shapes "
         f"{[a.shape for a in moments]} are not (D,), (D, D), (D,), (D, D); use one extractor for both")
    need(all(np.isfinite(a).all() for a in moments), "frechet_distance: NaN or infinity; check the features")
    trace = torch.linalg.svdvals(root(sigma1).T @ root(sigma2)).sum().item()
    return max(float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace), 0.0)


def check_count(count, dims, what):
    need(count > dims, f"{what}: {count} images for {dims} features leave the covariance singular, and the distance "
         f"then measures the number of images; give more than {dims} images, or --features of fewer dimensions")


def inception_score(logits, split_size=5000):
    """exp of the mean KL(p(y|x), p(y)): logits (N, C) -> (mean over ADM's splits of 5,000 in file order, value over all).
    Images sorted by class put few classes into a split, and the first number collapses: quote the second, or shuffle.
    ValueError on NaN. Source: Salimans et al. 2016, arXiv 1606.03498."""
    need(logits.isfinite().all(), "inception_score: NaN or infinity among the logits; check the images and the weights")
    splits = []  # of each: count, sum of p (C,), sum of p log p
    for part in logits.split(split_size):
        logp = part.double().log_softmax(1)  # (n, C)
        splits.append((len(part), logp.exp().sum(0), (logp.exp() * logp).sum()))
    def score(parts):
        count, p, p_log_p = (sum(x) for x in zip(*parts))
        return (torch.special.entr(p / count).sum() + p_log_p / count).exp().item()
    return float(np.mean([score([split]) for split in splits])), score(splits)


def precision_recall(samples, reference, k=3, chunk=500):
    """(Share of samples in the reference's manifold, share of the reference in the samples'). (N, D), (M, D) -> floats.
    A manifold: balls around all points, each as wide as its point's distance to the k-th nearest other point.
    Float64, since a comparison near a ball's edge must not turn on the order of a sum.
    ValueError with k points or fewer. Source: Kynkaanniemi et al. 2019, arXiv 1904.06991; k = 3 as ADM."""
    need(min(len(samples), len(reference)) > k, f"precision_recall: {len(samples)} and {len(reference)} points; give more")
    x, y = samples.double(), reference.double()
    radii_x, radii_y = (torch.cat([torch.cdist(part, z).kthvalue(k + 1).values for part in z.split(chunk)]) for z in (x, y))
    precise, recalled = [], torch.zeros(len(y), dtype=torch.bool, device=y.device)
    for part, radii in zip(x.split(chunk), radii_x.split(chunk)):
        apart = torch.cdist(part, y)  # (n, M)
        precise.append((apart <= radii_y).any(1))
        recalled |= (apart <= radii[:, None]).any(0)
    return torch.cat(precise).double().mean().item(), recalled.double().mean().item()


# ----------------------------------------------------------------------------------------------------------------------
# Processes: each measures its share, the first one puts them together

def join_processes(timeout=timedelta(days=1)):
    """Under torchrun: meet the other processes, and take the GPU of this one's rank.

    Raises UserError where there is none, ProcessLost where the others do not come.
    """
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if gpus:
        need(local < gpus, f"--nproc_per_node: more processes than GPUs ({gpus}); give as many")
        torch.cuda.set_device(local)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        try:
            store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
            store = dist.PrefixStore(f"attempt {attempt}", store)  # else a restart finds dead addresses in it
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timeout, store=store, rank=rank, world_size=world)
        except (RuntimeError, ValueError) as error:
            raise ProcessLost(f"process {os.environ.get('RANK')}: another process did not come, or is dead ({one_line(error)}); "
                              "start all of them, as torchrun does") from None
        atexit.register(dist.destroy_process_group)


def place():
    """-> (rank of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(statistics, kept):
    """What measure() gave each process, as one: on the first, in the order of ranks; (None, None) on the others."""
    rank, world = place()
    if world == 1:
        return statistics, kept
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1))  # a training loop's own may be of GPUs only
    shares = [None] * world if rank == 0 else None
    on_cpu = {part: Statistics(s.extractor, s.count, s.mean.cpu(), s.scatter.cpu()) for part, s in statistics.items()}
    dist.gather_object((on_cpu, kept), shares, group=group)
    dist.destroy_process_group(group)
    if rank > 0:
        return None, None
    for others, _ in shares[1:]:
        for part, s in statistics.items():
            s.merge(others[part])
    return statistics, {part: torch.cat([rows[part] for _, rows in shares]) for part in kept}


# ----------------------------------------------------------------------------------------------------------------------
# Extractors: uint8 (B, 3, H, W) -> dict(pool=(B, D)[, spatial, logits])

def fingerprint(net):
    """Eight hex digits of the weights themselves, so that statistics of two networks never meet under one name."""
    digest = hashlib.sha256()
    for _, tensor in sorted(net.state_dict().items()):
        digest.update(tensor.cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


class Extractor(NamedTuple):
    extract: Callable  # uint8 (B, 3, H, W) -> {part: (B, D)}
    name: str
    resize: str  # in words
    dims: int  # of the part "pool"


def inception_extractor(weights, device):
    net, path = Inception(), weights or download(INCEPTION_URL, INCEPTION_FILE, "--weights")
    with reading(path, f"not {INCEPTION_FILE}"):
        net.load_state_dict(load_file(path))
    if torch.device(device).type == "cpu":
        net.to(memory_format=torch.channels_last)  # nearly twice as fast there
    return Extractor(net.to(device), "inception-" + fingerprint(net), "TensorFlow-1 bilinear to 299x299", 2048)


def timm_extractor(name, weights, device):
    net = timm_network(name, weights, "--weights", **(dict(img_size=224) if name == DINO else {})).to(device)
    net.reset_classifier(0)  # not asked for at the start: then timm would load any file without a word
    config = timm.data.resolve_model_data_config(net)
    size, mode = config["input_size"][1:], "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    mean, std = (torch.tensor(config[key], device=device).view(1, 3, 1, 1) for key in ("mean", "std"))
    def extract(x):
        x = F.interpolate(x.float(), size, mode=mode, antialias=True).round().clamp(0, 255)  # (B, 3, *size), as PIL
        return dict(pool=net((x / 255 - mean) / std).flatten(1))  # (B, D)
    return Extractor(extract, f"{name}-{fingerprint(net)}", f"{mode} with antialias to {size[0]}x{size[1]}", net.num_features)


def make_extractor(features="inception", weights=None, device="cpu"):
    """-> Extractor. features: inception, dino or a timm name. weights: their file, else they are downloaded; for dino a
    checkpoint of ours, whose RAE encoder then gives the features. ValueError without."""
    need(not weights or os.path.isfile(weights), f"--weights {weights}: no such file; give the path of a weights file")
    if features == "inception":
        return inception_extractor(weights, device)
    if features == "dino" and weights:
        rae = load_rae(weights, device)
        return Extractor(lambda x: dict(pool=rae.features(x.float() / 255)), "rae-encoder-" + fingerprint(rae.encoder),
                         "the RAE encoder's own", rae.encoder.shape[0])
    name = DINO if features == "dino" else features
    need(known_to_timm(name), f"--features {features}: no such model; give inception, dino or one of timm.list_models()")
    return timm_extractor(name, weights, device)


# ----------------------------------------------------------------------------------------------------------------------
# Images

def image_tensor(path, size=None):
    """uint8 (3, H, W), RGB. ValueError when unreadable, not 8-bit, or not of `size` (W, H)."""
    image = read_image(path)
    need(size in (None, image.size), f"{path}: {image.size} pixels, the first image has {size}; resize all to one size")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def folder_batches(files, size, batch_size, num_workers):
    with ThreadPoolExecutor(num_workers) as threads:  # one batch is read ahead
        submit = lambda i: [threads.submit(image_tensor, file, size) for file in files[i:i + batch_size]]
        ahead = submit(0)
        for i in range(0, len(files), batch_size):
            now, ahead = ahead, submit(i + batch_size)
            yield torch.stack([job.result() for job in now])  # (B, 3, H, W)


def npy_header(file):
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)  # shape, whether in Fortran order, dtype


def npz_batches(path, first, last, batch_size):
    """Images first to last - 1 of arr_0: a stream, never the whole array in memory."""
    with reading(path, "arr_0 is damaged"), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        n, h, w, _ = npy_header(file)[0]
        for i in range(first):  # read and drop: what jumps over them drops the check of the archive's checksum too
            file.read(h * w * 3)
        for i in range(first, last, batch_size):
            batch = bytearray(file.read(min(batch_size, last - i) * h * w * 3))
            yield torch.frombuffer(batch, dtype=torch.uint8).view(-1, h, w, 3).permute(0, 3, 1, 2)  # (B, 3, H, W)
        need(last < n or not file.read(1), f"{path}: arr_0 is longer than it says; write the file again")


@dataclass
class Source:
    """One side of a comparison: images, recorded moments, or both."""
    path: str
    count: int = None
    size: tuple = None  # (W, H)
    balance: str = None  # of the labels, in words
    batches: Callable = None  # (first, last, batch_size, num_workers) -> an iterable of uint8 (B, 3, H, W)
    moments: dict = field(default_factory=dict)  # {"pool": (mean, covariance)[, "spatial": ...]}
    features: dict = field(default_factory=dict)  # {"pool": (N, D), "logits": (N, 1008)}, those that were kept
    extractor: str = None  # of recorded moments
    resize: str = None


def balance(labels):
    if labels is not None:
        counts = np.unique(labels, return_counts=True)[1]
        return f"{len(counts)} labels of {min(counts)} to {max(counts)} images"


def open_folder(path):
    files = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names
                   if name.lower().endswith((".png", ".jpg", ".jpeg", ".webp")))
    need(files, f"{path}: no PNG, JPEG or WebP image in this folder; give one that holds images")
    size, labels = read_image(files[0]).size, [os.path.dirname(file) for file in files]
    np.random.RandomState(0).shuffle(files)  # in order of class folders, inception_score's splits would collapse
    return Source(path, count=len(files), size=size, balance=balance(labels) if len(set(labels)) > 1 else None,
                  batches=lambda first, last, *how: folder_batches(files[first:last], size, *how))


def open_source(path):
    """A folder, or an .npz of any of the kinds above -> Source. ValueError on anything else."""
    if os.path.isdir(path):
        return open_folder(path)
    need(zipfile.is_zipfile(path), f"{path}: no such folder, and no such .npz; give a folder of images or an .npz")
    data = {}
    with reading(path, "its contents are damaged"), np.load(path) as archive:
        for name in archive.files:
            with reading(path, f"{name} is damaged"):  # the images are read later, as a stream
                data[name] = archive[name] if name != "arr_0" else npy_header(archive.zip.open("arr_0.npy"))
        moments = {part: [data[key].astype(float) for key in ("mu" + end, "sigma" + end)]
                   for part, end in (("pool", ""), ("spatial", "_s")) if {"mu" + end, "sigma" + end} <= set(data)}
        if "extractor" in data:  # a file of ours
            return Source(path, moments=moments, count=int(data["count"]), size=tuple(data["size"].tolist()),
                          **{key: str(data[key]) for key in ("extractor", "resize", "balance") if key in data})
    need(moments or "arr_0" in data, f"{path}: neither arr_0 nor mu and sigma inside; give images or statistics")
    s = Source(path, moments=moments, extractor="inception" if moments else None)  # with moments: a reference of ADM's
    if "arr_0" in data:
        shape, fortran, dtype = data["arr_0"]
        need(dtype == np.uint8 and len(shape) == 4 and shape[3] == 3 and shape[0] and not fortran,
             f"{path}: arr_0 is {dtype} {shape}, not uint8 (N, H, W, 3); round to 0..255 before saving")
        labels = data.get("arr_1")
        need(labels is None or labels.shape == shape[:1], f"{path}: arr_1 is not one label an image; save it anew")
        s.count, s.size, s.balance = shape[0], (shape[2], shape[1]), balance(labels)
        s.batches = lambda first, last, batch_size, _: npz_batches(path, first, last, batch_size)
    return s


# ----------------------------------------------------------------------------------------------------------------------
# Two sides, and the command line

def prepare(sources, features, weights, device):
    """The extractor that the sources share. ValueError where they cannot be compared, before anything is measured."""
    for s in sources:
        if s.extractor == "inception" and features != "inception":
            s.moments, s.extractor = {}, None  # what ADM recorded is of no use here
        need(s.batches or s.moments, f"{s.path}: no images in it, only Inception's statistics; give images")
    sizes = {s.size for s in sources if s.size}
    need(len(sizes) < 2, f"{sources[0].path}: its image size is not the reference's ({sizes}); resize one side")
    if any(s.batches for s in sources):
        x = make_extractor(features, weights, device)
    else:  # moments on both sides; "inception" is ADM's, without the hash that ours have
        recorded = sorted({s.extractor for s in sources})
        x = Extractor(None, recorded[-1], sources[-1].resize or "as recorded", 0)
    for s in sources:
        need(s.extractor in (None, x.name, x.name.split("-")[0]), f"{s.path}: made by {s.extractor}, not by {x.name}; use one extractor")
        if s.batches and s.count and not s.moments:
            check_count(s.count, x.dims, s.path)
    return x


def measure_source(s, x, keep, device, batch_size=32, num_workers=4):
    """Fill in the moments and the kept features of a source with images, on the first process. ValueError if too few."""
    (rank, world), n = place(), s.count or 0
    batches = s.batches(n * rank // world, n * (rank + 1) // world, batch_size, num_workers)
    bar = tqdm(batches, s.path, math.ceil(n / world / batch_size) or None, disable=rank > 0 or None)
    statistics, s.features = gather(*measure(x.extract, (batch.to(device) for batch in bar), x.name, keep, s.size))
    if rank == 0:
        s.count = statistics["pool"].count
        if not s.moments:
            check_count(s.count, x.dims, s.path)
        s.moments = {part: (m.mean, m.covariance) for part, m in statistics.items()} | s.moments


def compare(a, b, x, device):
    """All scores that samples `a` and reference `b` give, and what they were made from -> a dict, ready for JSON."""
    title = dict(pool="fid" if x.name.startswith("inception") else "fd", spatial="sfid")
    record = {title[part]: frechet_distance(*a.moments[part], *b.moments[part]) for part in title
              if part in a.moments and part in b.moments}
    if "logits" in a.features:
        record["inception_score"], record["inception_score_all"] = inception_score(a.features["logits"])
    if a.features and b.features:
        pools = (s.features["pool"].to("cpu" if str(device) == "mps" else device) for s in (a, b))  # mps has no float64
        record["precision"], record["recall"] = precision_recall(*pools)
    record |= dict(extractor=x.name, resize=x.resize)
    for role, s in (("samples", a), ("reference", b)):
        record[role] = dict(path=str(s.path), count=s.count, size=s.size, labels=s.balance or "unknown")
        record[role]["statistics"] = "as recorded" if s.extractor else "of these images"
    return record


class Scorer:
    """Scores against one reference, which is measured first: a bad one is refused before the work starts. Under
    torch.distributed all processes make and call it; if each brings a consecutive share, in the order of ranks, the
    Inception Score has the splits of a file, too.

        scorer = Scorer("reference.npz", device="cuda")
        scores = scorer(batches, labels)   # an iterable of uint8 (B, 3, H, W); labels (N,) of all, or None
    """
    def __init__(self, reference, features="inception", weights=None, device="cpu", batch_size=32, num_workers=4, samples=None):
        self.reference, self.device, self.reading = open_source(reference), device, (batch_size, num_workers)
        self.extractor = prepare([samples or Source("samples", batches=lambda *_: ()), self.reference], features, weights, device)
        if self.reference.batches:
            measure_source(self.reference, self.extractor, ("pool",), device, *self.reading)

    def __call__(self, batches, labels=None):
        return self.score(Source("samples", size=self.reference.size, balance=balance(labels), batches=lambda *_: batches))

    def score(self, samples):
        """A Source -> a dict of scores on the first process, None on the others."""
        if samples.batches:
            keep = ("logits", "pool") if self.reference.batches else ("logits",)  # precision and recall compare images
            measure_source(samples, self.extractor, keep, self.device, *self.reading)
        return compare(samples, self.reference, self.extractor, self.device) if place()[0] == 0 else None


def write_statistics(args):
    """The command stats: what a comparison needs of a reference, in a small file."""
    s = open_source(args.reference)
    need(s.batches, f"{args.reference}: no images in it, only statistics; give images")
    x = prepare([s], args.features, args.weights, args.device)
    measure_source(s, x, (), args.device, args.batch_size, args.num_workers)
    if place()[0] == 0:
        arrays = {}
        for part, (mean, covariance) in s.moments.items():
            end = "_s" if part == "spatial" else ""
            arrays |= {"mu" + end: torch.as_tensor(mean).cpu().numpy(), "sigma" + end: torch.as_tensor(covariance).cpu().numpy()}
        with open(args.out, "wb") as file:
            np.savez(file, **arrays, count=s.count, size=s.size, extractor=x.name, resize=x.resize, balance=s.balance or "")
        print(f"{args.out}: statistics of {s.count} images, extractor {x.name}, resize {x.resize}")


def main(argv=None):
    title, _, examples = __doc__.strip().split("\n\n")[:3]
    parser = Parser(prog="fid.py", description=title, epilog="examples:\n" + examples, allow_abbrev=False)
    what, how, out = (parser.add_argument_group(title) for title in ("what to compare", "how", "output"))
    what.add_argument("samples", help="folder, .npz or statistics; or the word stats, to measure REFERENCE for later")
    what.add_argument("reference", help="folder, .npz or statistics")
    how.add_argument("--features", metavar="NAME", default="inception", help="inception, dino or a timm model's name (default inception)")
    how.add_argument("--weights", metavar="FILE", help="the extractor's; with dino, a checkpoint of ours: its encoder (default: download)")
    how.add_argument("--batch_size", metavar="N", type=at_least(1), default=32, help="images at once, no influence on scores (default 32)")
    how.add_argument("--num_workers", metavar="N", type=at_least(1), default=4, help="threads that read images (default 4)")
    how.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    out.add_argument("-o", "--out", metavar="FILE", help="with stats: the .npz to write (default none)")
    out.add_argument("--json", action="store_true", help="print one line of JSON instead of a table (default off)")
    args = parser.parse_args(argv)
    join_processes()
    args.device = pick_device(args.device)
    need((args.samples == "stats") == bool(args.out), "--out: belongs to stats, and stats needs it; python fid.py stats REFERENCE -o FILE")
    need(os.path.isdir(os.path.dirname(args.out or "") or "."), f"--out {args.out}: no such folder; make it first")
    if args.out:
        return write_statistics(args)
    samples = open_source(args.samples)
    record = Scorer(args.reference, args.features, args.weights, args.device, args.batch_size, args.num_workers, samples).score(samples)
    if record:
        print(json.dumps(record) if args.json else "\n".join(f"{key:20s} {value}" for key, value in record.items()))


if __name__ == "__main__":
    run_main(main)
