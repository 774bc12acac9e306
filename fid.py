"""Scores of generated images against real ones: FID, sFID, Inception Score, precision, recall, and the Frechet distance
in other features than Inception's. Also the report of the toy.

Paper: arXiv 2511.13019 reports FID; each definition is cited where it is computed.

    python fid.py SAMPLES REFERENCE                                   # a table of scores
    python fid.py SAMPLES REFERENCE --json --features dino            # in DINOv2's features, as a line of JSON
    python fid.py stats REFERENCE --out reference.npz                 # measure once, compare often
    torchrun --nproc_per_node=8 -- fid.py SAMPLES REFERENCE           # the processes share the images

SAMPLES, REFERENCE: a folder of images, nested or not; an .npz with arr_0 = uint8 (N, H, W, 3), as sample.py writes it;
a reference .npz of ADM's evaluation suite; or a file made by `stats`.
"""
import argparse
import hashlib
import json
import os
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.backends import cudnn
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.models import Inception3
from torchvision.transforms.functional import InterpolationMode, normalize, pil_to_tensor, resize
from tqdm import tqdm

from dit import load_file
from rae import fetch, load_rae, read_image, timm_network
from sample import draw_grid, load_all, make_images, reconstruct, start_processes

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"  # the end of the name is the start of the file's sha256
INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + INCEPTION_FILE
ENDS = dict(pool="", spatial="_s")  # behind the names mu and sigma in a file of statistics, as in ADM's
DINO = "vit_large_patch14_dinov2.lvd142m"  # CLS token at 224, the extractor of Stein et al. 2023, arXiv 2306.04675


# ----------------------------------------------------------------------------------------------------------------------
# The scores

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) of means (D,) and covariances (D, D) -> float.

    With sigma = R R^T, the root's trace is the sum of the singular values of R1^T R2. NaN or infinity: ValueError.
    Source: arXiv 1706.08500.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray_chkfinite(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    def root(sigma):
        values, vectors = np.linalg.eigh(sigma)
        return vectors * np.sqrt(values.clip(0))                                                # (D, D)
    trace = np.linalg.svd(root(sigma1).T @ root(sigma2), compute_uv=False).sum()
    return max(float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace), 0.0)


def inception_score(logits, split_size=5000):
    """exp of mean KL(p(y|x), p(y)), arXiv 1606.03498: logits (N, C) -> (mean of ADM's splits of 5,000, over all)."""
    def score(part):
        logp = part.double().log_softmax(1)                                                     # (n, C)
        p = logp.exp()
        return ((p * logp).sum(1).mean() + torch.special.entr(p.mean(0)).sum()).exp().item()
    return float(np.mean([score(part) for part in logits.split(split_size)])), score(logits)


def precision_recall(samples, reference, k=3, chunk=500):
    """(Share of samples (N, D) in the manifold of the reference (M, D), share of the reference in the samples').

    A manifold: balls around all points, as wide as the distance to the k-th nearest other. Source: arXiv 1904.06991.
    """
    x, y = samples.double(), reference.double()
    radius = lambda z: torch.cat([torch.cdist(part, z).kthvalue(k + 1).values for part in z.split(chunk)])
    radii_x, radii_y = radius(x), radius(y)                                                     # (N,), (M,)
    precise, recalled = [], torch.zeros(len(y), dtype=torch.bool, device=y.device)
    for part, radii in zip(x.split(chunk), radii_x.split(chunk)):
        apart = torch.cdist(part, y)                                                            # (n, M)
        precise.append((apart <= radii_y).any(1))
        recalled |= (apart <= radii[:, None]).any(0)
    return torch.cat(precise).double().mean().item(), recalled.double().mean().item()


# ----------------------------------------------------------------------------------------------------------------------
# Inception: torchvision's, with the resize, the pooling and the 1008 outputs of December 2015

def resize_tensorflow1(images, size=299):
    """TensorFlow 1's bilinear resize, part of what FID means: output pixel i samples the input at i * in / out."""
    def taps(length):
        position = torch.arange(size, device=images.device) * torch.tensor(length / size, dtype=torch.float32)
        low = position.long()
        return low, (low + 1).clamp(max=length - 1), (position - low).to(images.dtype)
    top, bottom, down = taps(images.shape[2])
    left, right, across = taps(images.shape[3])
    rows = images[..., left] + (images[..., right] - images[..., left]) * across                # (N, C, H, size)
    return rows[:, :, top] + (rows[:, :, bottom] - rows[:, :, top]) * down[:, None]             # (N, C, size, size)


def use_pooling(block, pool):
    """Give a block's branch_pool pool(x) of the block's input x. torchvision's own average counts the zero padding."""
    pooled = []
    block.register_forward_pre_hook(lambda block, inputs: pooled.append(pool(inputs[0])))
    block.branch_pool.register_forward_pre_hook(lambda branch, inputs: pooled.pop())            # in place of its input


class Inception(Inception3):
    """Inception v3 of 2015-12-05; load_state_dict takes INCEPTION_FILE. uint8 (N, 3, H, W) -> dict of float32:

      pool     (N, 2048)  mean of the last block: FID, precision, recall
      logits   (N, 1008)  without the bias, which ADM and the original Inception Score leave out
      spatial  (N, 2023)  for sFID: 7 channels at 17x17 positions, in TensorFlow's order (row, column, channel). ADM's
               "mixed_6/conv:0"[..., :7] is the 1x1 branch of Mixed_6d: derived from the names, not run in ADM's graph.
    """

    def __init__(self):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
            use_pooling(getattr(self, "Mixed_" + name), lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
        use_pooling(self.Mixed_7c, lambda x: F.max_pool2d(x, 3, 1, 1))                          # an oddity of 2015
        self.eval().requires_grad_(False)

    def forward(self, images):
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images: {images.dtype} {tuple(images.shape)} is not uint8 (N, 3, H, W); convert them")
        x = (resize_tensorflow1(images.float()) - 128) / 128                                    # (N, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))                       # (N, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(x)))                            # (N, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.maxpool2(x))))                       # (N, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))                       # (N, 768, 17, 17)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)                                       # (N, 2023), 1x1 branch
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))                       # (N, 2048, 8, 8)
        pool = x.mean((2, 3))                                                                   # (N, 2048)
        return dict(pool=pool, spatial=spatial, logits=pool @ self.fc.weight.T)


# ----------------------------------------------------------------------------------------------------------------------
# Extractors: uint8 (B, 3, H, W) -> {"pool": (B, D)}, Inception's with "spatial" and "logits". The name has a hash of
# the weights, so that statistics of two networks never meet under one name. dims: D.

Extractor = namedtuple("Extractor", ("extract", "name", "dims"))


def fingerprint(net):
    digest = hashlib.sha256()
    for _, tensor in sorted(net.state_dict().items()):
        digest.update(tensor.cpu().float().numpy().tobytes())
    return digest.hexdigest()[:8]


def rae_extractor(rae):
    extract = lambda x: dict(pool=rae.encoder(x.float() / 255).mean((2, 3)))                    # (B, C)
    return Extractor(extract, f"rae-{fingerprint(rae.encoder)}", rae.latent_shape[0])


def make_extractor(features="inception", weights=None, device="cpu"):
    """features: inception, dino or rae. weights: as in fetch; or Inception's file; of rae, a checkpoint."""
    if features == "inception":
        net, file = Inception(), weights and Path(weights).is_file()
        net.load_state_dict(load_file(weights if file else fetch(INCEPTION_FILE, INCEPTION_URL, weights)))
        return Extractor(net.to(device), f"inception-{fingerprint(net)}", 2048)
    if features == "rae":
        return rae_extractor(load_rae(weights).fetch_encoder().to(device))
    net = timm_network(DINO, weights, img_size=224).to(device)
    def extract(x):
        x = resize(x, (224, 224), InterpolationMode.BICUBIC)                                    # as PIL resizes
        x = normalize(x / 255, net.pretrained_cfg["mean"], net.pretrained_cfg["std"])           # (B, 3, 224, 224)
        return dict(pool=net.forward_head(net.forward_features(x), pre_logits=True))            # (B, D)
    return Extractor(extract, f"dino-{fingerprint(net)}", net.num_features)


def measure(extractor, batches, device, keep=()):
    """This process's share of the images, batches uint8 (B, 3, H, W), to the numbers of all processes' images:

    ({part: (mean, covariance)}, {part: features (N, D)} of the parts in keep). SystemExit with D images or fewer.
    """
    sums, kept, moments = {}, {part: [] for part in keep}, {}
    before = torch.get_float32_matmul_precision()                   # of a training loop; here it is full float32
    torch.set_float32_matmul_precision("highest")
    no_autocast = torch.autocast(torch.device(device).type, enabled=False)
    for images in batches:
        with torch.no_grad(), no_autocast, cudnn.flags(enabled=cudnn.enabled, allow_tf32=False):
            features = extractor.extract(images.to(device))
        for part in kept.keys() & features.keys():
            kept[part].append(features[part].cpu())
        for part in features.keys() - {"logits"}:
            x = F.pad(features[part].double(), (0, 1), value=1.0)                               # (B, D + 1)
            sums[part] = sums.get(part, 0) + x.T @ x                                            # (D + 1, D + 1)
    torch.set_float32_matmul_precision(before)
    shares = [{part: torch.cat(rows) for part, rows in kept.items() if rows}]
    if dist.is_initialized():
        for part in sorted(sums):
            dist.all_reduce(sums[part])
        shares = shares * dist.get_world_size()
        dist.all_gather_object(shares, shares[0])
    for part, products in sums.items():
        count, mean = products[-1, -1], products[-1, :-1] / products[-1, -1]
        if count <= extractor.dims:
            raise SystemExit(f"{count:.0f} images for {extractor.dims} features: give more than {extractor.dims}")
        covariance = (products[:-1, :-1] - count * mean[:, None] * mean) / (count - 1)
        moments[part] = mean.cpu().numpy(), covariance.cpu().numpy()
    return moments, {part: torch.cat([share[part] for share in shares]) for part in shares[0]}


def stack_images(files):
    return torch.stack([pil_to_tensor(read_image(file)) for file in files])                     # (B, 3, H, W)


def folder_images(path, rank, world, batch_size):
    """This process's share of a folder's images, uint8 (B, 3, H, W)."""
    found = [Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names]
    files = sorted(file for file in found if file.suffix.lower() in IMG_EXTENSIONS)
    if not files:
        raise SystemExit(f"{path}: no image in this folder; give one that holds images")
    files = np.array_split(np.random.RandomState(0).permutation(files), world)[rank]        # in random order
    return DataLoader(files, batch_size, num_workers=min(4, os.cpu_count()), collate_fn=stack_images)


def npz_images(path, rank, world, batch_size):
    """This process's share of an .npz's arr_0, as a stream: uint8 (B, 3, H, W)."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype != np.uint8 or shape[3:] != (3,) or fortran:
            raise SystemExit(f"{path}: arr_0 is {dtype} {shape}, not uint8 (N, H, W, 3); round it before saving")
        first, last, size = shape[0] * rank // world, shape[0] * (rank + 1) // world, shape[1] * shape[2] * 3
        file.seek(first * size, os.SEEK_CUR)
        for i in range(first, last, batch_size):
            batch = bytearray(file.read(min(batch_size, last - i) * size))
            yield torch.frombuffer(batch, dtype=torch.uint8).view(-1, *shape[1:]).permute(0, 3, 1, 2)


def statistics_of(path, extractor, keep, device, rank=0, world=1, batch_size=32):
    """A folder or .npz -> ({part: (mean, covariance)}, recorded or else measured, {part: features of its images})."""
    moments, batches = {}, None
    if Path(path).is_dir():
        batches = folder_images(path, rank, world, batch_size)
    elif zipfile.is_zipfile(path):
        with np.load(path) as archive:                                                          # reads on demand
            if extractor.name.startswith(str(archive.get("extractor", "inception"))):           # without: ADM's
                moments = {part: (archive["mu" + end], archive["sigma" + end]) for part, end in ENDS.items()
                           if "mu" + end in archive}
            batches = npz_images(path, rank, world, batch_size) if "arr_0" in archive else None
    if batches is None:
        if not moments:
            raise SystemExit(f"{path}: neither images nor statistics of {extractor.name}; give images")
        return moments, {}
    measured, features = measure(extractor, tqdm(batches, str(path), disable=rank > 0), device, keep)
    return measured | moments, features


class Scorer:
    """Scorer(reference)(samples) -> dict of scores. samples: a path, or batches uint8 (B, 3, H, W) of this process."""

    def __init__(self, reference, features="inception", weights=None, device="cpu", rank=0, world=1, batch_size=32):
        self.where = device, rank, world, batch_size
        self.extractor = make_extractor(features, weights, device)
        self.moments, self.features = statistics_of(reference, self.extractor, ("pool",), *self.where)

    def __call__(self, samples):
        keep = ("pool", "logits") if self.features else ("logits",)
        if isinstance(samples, (str, Path)):
            moments, features = statistics_of(samples, self.extractor, keep, *self.where)
        else:
            moments, features = measure(self.extractor, samples, self.where[0], keep)
        scores, inception = dict(extractor=self.extractor.name), self.extractor.name.startswith("inception")
        names = dict(pool="fid" if inception else "fd", spatial="sfid")
        for part in [part for part in names if part in moments and part in self.moments]:
            scores[names[part]] = frechet_distance(*moments[part], *self.moments[part])
        if "logits" in features:
            scores["inception_score"], scores["inception_score_all"] = inception_score(features["logits"])
        if features and self.features:
            pools = (pool.to(self.where[0]) for pool in (features["pool"], self.features["pool"]))
            scores["precision"], scores["recall"] = precision_recall(*pools)
        return scores


# ----------------------------------------------------------------------------------------------------------------------
# The report of the toy: teachers and students in 1, 2, ... steps

def train_classifier(images, labels, num_classes, device, steps=250):
    """A small convolutional network on uint8 (M, 3, 32, 32): does a sample show the class that was asked for?"""
    torch.manual_seed(0)
    conv = lambda i, o, stride: [nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o), nn.ReLU()]
    net = nn.Sequential(*conv(3, 32, 1), *conv(32, 64, 2), *conv(64, 128, 2), *conv(128, 256, 2),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, num_classes))
    net.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in tqdm(range(steps), "classifier"):
        pick = torch.randint(len(images), (128,))
        x = images[pick].to(device, memory_format=torch.channels_last).float() / 255            # (128, 3, 32, 32)
        F.cross_entropy(net(x), labels[pick].to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return net.eval()


def save_chart(rows, path):
    """Frechet distance against steps, both logarithmic, a line per name -> PNG."""
    picture = Image.new("RGB", (560, 360), "white")
    pen, colours = ImageDraw.Draw(picture), ("royalblue", "crimson", "seagreen", "darkorange", "purple", "black")
    points = np.log([(row["steps"], row["fd_encoder"]) for row in rows])                        # (rows, 2)
    low, high = points.min(0), points.max(0) + 1e-9
    points = (points - low) / (high - low) * (470, -200) + (40, 320)                            # in pixels
    for i, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        line, colour = [(row, tuple(p)) for row, p in zip(rows, points) if row["name"] == name], colours[i % 6]
        pen.text((60, 8 + 16 * i), f"{name}: Frechet distance against steps", colour, font_size=13)
        pen.line([point for _, point in line], colour, 2)
        for row, (x, y) in line:
            pen.text((x, y), f"{row['fd_encoder']:.2f}", colour, font_size=13)
            pen.text((x, 336), f"{row['steps']}", "black", font_size=13)
    picture.save(path)


def report(paths, data, held_out, out, device, num):
    """Print a table of checkpoints of the toy; save it, a chart and a picture, equal noise a column, in the folder out.

    FD: Frechet distance from num samples to the images held_out, which no stage has seen, nor the classifier.
    """
    classes, (real, real_labels) = len(data.classes), held_out.tensors
    classifier = train_classifier(*data.tensors, classes, device, 2 if num < 1000 else max(250, len(data) // 90))
    rows, shown, references, columns = [], {}, {}, range(min(classes, 10))
    print(f"\n{'':20} steps  FD encoder  precision  recall  FD classifier  accuracy")

    def add(name, steps, images, labels, encoder):
        def extract(x):
            seen = classifier[:-1](x.float() / 255)                                             # (B, 256)
            return encoder.extract(x) | dict(classifier=seen, logits=classifier[-1](seen))
        extractor, row = Extractor(extract, encoder.name, 256), dict(name=name, steps=steps)
        if encoder.name not in references:
            references[encoder.name] = measure(extractor, real.split(500), device, ("pool",))
        wanted, real_features = references[encoder.name]
        made, features = measure(extractor, images.split(500), device, ("pool", "logits"))
        for space, part in dict(encoder="pool", classifier="classifier").items():
            row[f"fd_{space}"] = frechet_distance(*made[part], *wanted[part])
        row["precision"], row["recall"] = precision_recall(features["pool"], real_features["pool"])
        row["accuracy"] = (features["logits"].argmax(1) == labels).float().mean().item()
        rows.append(row)
        first = [(labels == k).int().argmax() for k in columns]                                 # of each class
        shown[f"{name}, {steps} step{'s' * (steps > 1)}" if steps else name] = images[torch.stack(first)]
        print("{name:20} {steps:>5} {fd_encoder:11.3f} {precision:10.3f} {recall:7.3f} {fd_classifier:14.2f} "
              "{accuracy:9.1%}".format(**row), flush=True)

    for path in map(Path, paths):
        network, rae, alpha, names = load_all(path, device=device)
        if rae.encoder is None or len(names) != classes:
            raise SystemExit(f"{path}: not of the toy, or of other classes; give a checkpoint of this data")
        name = path.stem if path.parent == out else f"{path.parent.name}/{path.stem}"
        encoder = rae_extractor(rae)
        if not rows:
            add("held-out images", "", real, real_labels, encoder)
            add("reconstructions", "", reconstruct(rae, real), real_labels, encoder)
        labels = torch.arange(num) % classes
        for steps in (1, 2, 4) if network.average_velocity else (25, 4, 1):
            made = make_images(network, rae, alpha, labels, steps, batch_size=250)
            add(name, steps, torch.cat([images for _, images in made]), labels, encoder)

    (out / "report.json").write_text(json.dumps(rows, indent=1))
    save_chart(rows[2:], out / "report.png")
    titles = [title for title in shown if not title.endswith((", 2 steps", ", 4 steps"))]
    if len(titles) > 6:                                             # six rows are read at a glance
        titles = [title for title in titles if not title.endswith("flow, 1 step")]
    draw_grid(torch.cat([shown[title] for title in titles]), len(columns), titles).save(out / "comparison.png")
    print(f"\nFD: Frechet distance of {num} samples to {len(real)} held-out ones. Precision, recall: of the encoder's\n"
          f"features. {out}: report.json (the table), report.png (its curves), comparison.png (samples side by side)")


# ----------------------------------------------------------------------------------------------------------------------
# Command line

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("samples", help="folder, .npz or statistics; or the word stats, to measure REFERENCE for later")
    add("reference", help="folder, .npz or statistics")
    add("--features", default="inception", choices=("inception", "dino", "rae"), help="(default inception)")
    add("--weights", metavar="PATH", help="folder laid out like the hub, Inception's file or, for rae, a checkpoint")
    add("--out", metavar="FILE", type=Path, help="with stats: the .npz to write")
    add("--json", action="store_true", help="print one line of JSON instead of a table")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    args = parser.parse_args(argv)
    rank, world, device = start_processes(args.device)
    if args.samples == "stats" and (not args.out or args.out.exists()):
        raise SystemExit("stats needs --out FILE, the name of a new .npz")
    for path in {args.samples, args.reference, args.weights if args.features == "rae" else "stats"} - {"stats"}:
        if not path or not Path(path).exists():
            raise SystemExit(f"{path}: no such file or folder; give samples, a reference and, for rae, a checkpoint")
    scorer = Scorer(args.reference, args.features, args.weights, device, rank, world)
    if args.samples != "stats":
        scores = scorer(args.samples)
        text = json.dumps(scores) if args.json else "\n".join(f"{key:20} {value}" for key, value in scores.items())
        print(text) if rank == 0 else None
    elif rank == 0:                                                 # a file gets its name when it is whole
        moments = {name + ENDS[part]: values for part, pair in scorer.moments.items()
                   for name, values in zip(("mu", "sigma"), pair)}
        np.savez(args.out.with_suffix(".tmp.npz"), **moments, extractor=scorer.extractor.name)
        args.out.with_suffix(".tmp.npz").replace(args.out)
        print(f"{args.out}: statistics of {args.reference}, {scorer.extractor.name}")


if __name__ == "__main__":
    main()
