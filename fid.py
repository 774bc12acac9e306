"""
Scores of generated images against real ones: FID, sFID, Inception Score, precision, recall, and the same Frechet
distance in the features of DINOv2, of any timm model, or of the RAE's own encoder. Two commands:

    python fid.py SAMPLES REFERENCE [--features inception|dino|TIMM_NAME] [--weights PATH] [--json]
    python fid.py stats REFERENCE -o reference.npz     # measure once, compare often: reference.npz is a REFERENCE too

SAMPLES, REFERENCE: a folder of images, nested or not; an .npz with arr_0 = uint8 (N, H, W, 3), as sample.py writes it;
a reference .npz of ADM's evaluation suite; or a file made by `stats`. The file is in the order a score is made in, and
train.py measures its samples by the same feature_statistics and frechet_distance (through `distance`) as the commands.
"""
import argparse
import hashlib
import json
import logging
import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.backends import cudnn
from torchvision.models import Inception3
from tqdm import tqdm

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"  # the end of the name is the start of the file's sha256
INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + INCEPTION_FILE
DINO = "vit_large_patch14_dinov2.lvd142m"  # CLS token at 224, the extractor of Stein et al. 2023, arXiv 2306.04675

def need(condition, message):
    """How this file refuses: ValueError("what: what is wrong; what to do"), on the command line one line and status 2."""
    if not condition:
        raise ValueError(" ".join(message.split()))

# --- 1. Inception: torchvision's, with the resize, the pooling and the 1008 outputs of December 2015 ------------------
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
        average = lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)  # torchvision's counts the zero padding
        maximum = lambda x: F.max_pool2d(x, 3, 1, 1)  # an oddity of the last block in 2015
        for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b", "7c"):
            block, pool = getattr(self, "Mixed_" + name), maximum if name == "7c" else average
            # torchvision's block pools its input x in its own way: hand branch_pool the right pooling of x instead
            block.register_forward_pre_hook(lambda block, args: block.__dict__.update(x=args[0]))
            block.branch_pool.register_forward_pre_hook(lambda _, args, b=block, p=pool: p(b.__dict__.pop("x")))
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

# --- 2. Statistics: mean and covariance of a stream -------------------------------------------------------------------
class Statistics:
    """Count, mean (D,) and unbiased covariance (D, D) of features that arrive in batches, float64 on their device.
    update(features (B, D)) adds a batch, merge(other) another process's Statistics; both return self. A batch is centred
    before it is squared, and merged by the rule of Chan et al. 1979, so neither batch size nor order matters beyond
    rounding (1e-12). `extractor` names what made the features. ValueError on NaN, and on another extractor."""
    def __init__(self, extractor=""):
        self.extractor, self.count, self.mean, self.scatter = extractor, 0, None, None

    def update(self, features):
        x = torch.as_tensor(features).detach()
        x = (x.cpu() if x.device.type == "mps" else x).double()  # (B, D); mps has no float64
        need(x.dim() == 2 and x.isfinite().all(), f"features: {tuple(x.shape)} is not (B, D), or has NaN; check weights")
        batch = Statistics(self.extractor)
        batch.count, batch.mean = len(x), x.mean(0)
        batch.scatter = (x - batch.mean).T @ (x - batch.mean)  # (D, D)
        return self.merge(batch)

    def merge(self, other):
        need(self.extractor == other.extractor, f"statistics: {self.extractor} met {other.extractor}; use one extractor")
        if self.count == 0 or other.count == 0:
            vars(self).update(vars(other if other.count else self))
            return self
        total, delta = self.count + other.count, other.mean.to(self.mean.device) - self.mean
        between = torch.outer(delta, delta) * (self.count * other.count / total)  # (D, D)
        self.scatter = self.scatter + other.scatter.to(self.mean.device) + between
        self.count, self.mean = total, self.mean + delta * (other.count / total)
        return self

    @property
    def covariance(self):
        return self.scatter / (self.count - 1)

def feature_statistics(extract, images, batch_size=64, extractor=""):
    """The one road from images to Statistics. extract: uint8 (B, 3, H, W) -> (B, D). images: uint8 (N, 3, H, W), cut into
    batches of batch_size, or an iterable of batches. extractor: its name. ValueError on other images, or NaN features."""
    statistics = Statistics(extractor)
    for batch in images.split(batch_size) if torch.is_tensor(images) else images:  # float32, whatever a training loop set
        with torch.no_grad(), torch.autocast(batch.device.type, enabled=False), cudnn.flags(enabled=True, allow_tf32=False):
            statistics.update(extract(check_images(batch)))
    return statistics

# --- 3. The scores ----------------------------------------------------------------------------------------------------
def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), a float >= 0. Means (D,), covariances (D, D).
    With sigma = R R^T for each, the trace of the square root is the sum of the singular values of R1^T R2. R comes from
    an eigendecomposition, so a covariance that is not of full rank is no special case (a general matrix square root may
    fail on one), and rounding errors are not square-rooted. Float64; 2048 dimensions take seconds.
    ValueError on shapes that do not match and on NaN. Source: Heusel et al. 2017, arXiv 1706.08500."""
    mu1, sigma1, mu2, sigma2 = moments = [np.asarray(a.cpu() if torch.is_tensor(a) else a, dtype=np.float64)
                                          for a in (mu1, sigma1, mu2, sigma2)]
    need([a.shape for a in moments] == [(mu1.size,), (mu1.size, mu1.size)] * 2, "frechet_distance: shapes "
         f"{[a.shape for a in moments]} are not (D,), (D, D), (D,), (D, D); use one extractor for both")
    need(all(np.isfinite(a).all() for a in moments), "frechet_distance: NaN or infinity; check the features")

    def root(sigma):
        values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
        return vectors * np.sqrt(values.clip(min=0))  # (D, D), root root^T = sigma
    trace = np.linalg.svd(root(sigma1).T @ root(sigma2), compute_uv=False).sum()
    return max(float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace), 0.0)

def check_count(count, dims, what):
    need(count > dims, f"{what}: {count} images for {dims} features leave the covariance singular, and the distance "
         f"then measures the number of images; give more than {dims} images, or --features of fewer dimensions")

def distance(a, b):
    """Frechet distance of two Statistics. ValueError: other extractor, or not more samples than features."""
    need(a.extractor == b.extractor, f"statistics: {a.extractor} met {b.extractor}; use one extractor")
    for s in (a, b):
        check_count(s.count, len(s.mean) if s.count else 0, "statistics")
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)

def inception_score(logits, split_size=5000):
    """exp of the mean KL(p(y|x), p(y)): logits (N, C) -> (mean over ADM's splits of 5,000 in file order, value over all).
    Images sorted by class put few classes into a split, and the first number collapses: quote the second, or shuffle.
    ValueError on NaN. Source: Salimans et al. 2016, arXiv 1606.03498."""
    def score(part):
        logp = part.double().log_softmax(1)  # (n, C)
        return (logp.exp() * (logp - logp.exp().mean(0).log())).sum(1).mean().exp().item()
    need(logits.isfinite().all(), "inception_score: NaN or infinity among the logits; check the images and the weights")
    return float(np.mean([score(part) for part in logits.split(split_size)])), score(logits)

def precision_recall(samples, reference, k=3, chunk=1000):
    """(Share of samples in the reference's manifold, share of the reference in the samples'). (N, D), (M, D) -> floats.
    A manifold: balls around all points, each as wide as its point's distance to the k-th nearest other point.
    ValueError with k points or fewer. Source: Kynkaanniemi et al. 2019, arXiv 1904.06991; k = 3 as ADM."""
    need(min(len(samples), len(reference)) > k, f"precision_recall: {len(samples)} and {len(reference)} points; give more")
    x, y = samples - reference.mean(0), reference - reference.mean(0)  # same distances, less rounding
    radii = lambda z: torch.cat([torch.cdist(c, z).kthvalue(k + 1).values for c in z.split(chunk)])  # (N,)
    inside = lambda z, w, r: torch.cat([(torch.cdist(c, w) <= r).any(1) for c in z.split(chunk)]).double().mean().item()
    return inside(x, y, radii(y)), inside(y, x, radii(x))

# --- 4. Extractors: uint8 (B, 3, H, W) -> dict(pool=(B, D)[, spatial, logits]) ----------------------------------------
def fingerprint(net):
    """Eight hex digits of the weights themselves, so that statistics of two networks never meet under one name."""
    digest = hashlib.sha256()
    for _, tensor in sorted(net.state_dict().items()):
        digest.update(tensor.cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]

def make_extractor(features="inception", weights=None, device="cpu"):
    """-> (extract, its name, its resize in words). features: inception, dino or a timm name. weights: their file, else
    they are downloaded; for dino a checkpoint of ours, whose RAE encoder then gives the features. ValueError without."""
    need(not weights or os.path.isfile(weights), f"--weights {weights}: no such file; give the path of a weights file")
    if features == "inception":
        net, path = Inception(), weights or os.path.join(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)
        try:
            if not os.path.exists(path):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                torch.hub.download_url_to_file(INCEPTION_URL, path, "6726825d", progress=sys.stderr.isatty())
            net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:
            need(False, f"{path}: no such Inception there" + f" or at {INCEPTION_URL}" * (not weights) +
                 f" ({str(error)[:150]}); give the path of {INCEPTION_FILE} with --weights")
        return net.to(device), "inception-" + fingerprint(net), "TensorFlow-1 bilinear to 299x299"
    if features == "dino" and weights:
        from rae import load_rae
        rae = load_rae(weights, device)
        name = "rae-encoder-" + fingerprint(rae.encoder)
        return (lambda x: dict(pool=rae.features(x.float() / 255))), name, "the RAE encoder's own"
    import timm
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it narrates its retries
    name = DINO if features == "dino" else features
    need(timm.is_model(name), f"--features {features}: no such model; give inception, dino or one of timm.list_models()")
    try:
        net = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=weights) if weights else None,
                                num_classes=0, **(dict(img_size=224) if name == DINO else {})).eval().to(device)
    except Exception as error:  # the hub's client raises a dozen kinds
        need(False, f"--features {features}: no weights of {name} from {weights or 'the Hugging Face cache or hub'} "
             f"({str(error)[:150]}); give --features {name} and their file with --weights")
    config = timm.data.resolve_model_data_config(net)
    size, mode = config["input_size"][1:], "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    mean, std = (torch.tensor(config[key], device=device).view(1, 3, 1, 1) for key in ("mean", "std"))
    def extract(x):
        x = F.interpolate(x.float(), size, mode=mode, antialias=True).round().clamp(0, 255)  # (B, 3, *size), as PIL
        return dict(pool=net((x / 255 - mean) / std).flatten(1))  # (B, D)
    return extract, f"{name}-{fingerprint(net)}", f"{mode} with antialias to {size[0]}x{size[1]}"

# --- 5. Images and the command line -----------------------------------------------------------------------------------
def read_image(path, size=None):
    """uint8 (3, H, W), RGB. ValueError when unreadable, not 8-bit, or not of `size` (W, H)."""
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))  # (H, W, 3)
    except Exception as error:  # PIL raises many kinds on a damaged file
        need(False, f"{path}: not a readable image ({error}); remove or replace it")
    need(image.mode[0] not in "IF", f"{path}: its pixels ({image.mode}) are not 8-bit; convert it to 8-bit RGB")
    need(size in (None, image.size), f"{path}: {image.size} pixels, the first image has {size}; resize all to one size")
    return torch.from_numpy(pixels).permute(2, 0, 1)

def folder_batches(files, size, batch_size, num_workers):
    with ThreadPoolExecutor(max(num_workers, 1)) as threads:  # one batch is read ahead
        submit = lambda i: [threads.submit(read_image, file, size) for file in files[i:i + batch_size]]
        ahead = submit(0)
        for i in range(0, len(files), batch_size):
            now, ahead = ahead, submit(i + batch_size)
            yield torch.stack([job.result() for job in now])  # (B, 3, H, W)

def npy_header(file):
    np.lib.format.read_magic(file)
    return np.lib.format.read_array_header_1_0(file)  # shape, whether in Fortran order, dtype

def npz_batches(path, batch_size):
    with np.load(path) as data, data.zip.open("arr_0.npy") as file:  # a stream: never the whole array in memory
        n, h, w, _ = npy_header(file)[0]
        for i in range(0, n, batch_size):
            batch = bytearray(file.read(min(batch_size, n - i) * h * w * 3))
            yield torch.frombuffer(batch, dtype=torch.uint8).view(-1, h, w, 3).permute(0, 3, 1, 2)  # (B, 3, H, W)

def open_source(path):
    """One side: path, count (None: unknown), size (W, H), labels, batches(batch_size, num_workers) -> uint8 (B, 3, H, W);
    where the file holds statistics, moments {"pool": (mean, covariance)[, "spatial"]} and their extractor."""
    s = SimpleNamespace(path=path, count=None, size=None, labels=None, batches=None, extractor=None, moments={}, features={})
    if os.path.isdir(path):
        files = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names
                       if name.lower().endswith((".png", ".jpg", ".jpeg", ".webp")))
        need(files, f"{path}: no PNG, JPEG or WebP image in this folder; give one that holds images")
        s.count, s.size = len(files), tuple(read_image(files[0]).shape[:0:-1])
        np.random.RandomState(0).shuffle(files)  # in order of class folders, inception_score's splits would collapse
        s.batches = lambda *args: folder_batches(files, s.size, *args)
        return s
    need(zipfile.is_zipfile(path), f"{path}: no such folder, and no such .npz; give a folder of images or an .npz")
    with np.load(path) as data:
        s.moments = {part: (data["mu" + end], data["sigma" + end]) for part, end in (("pool", ""), ("spatial", "_s"))
                     if "mu" + end in data and "sigma" + end in data}
        s.extractor = "inception" if s.moments else None  # ADM's reference
        if "extractor" in data:
            s.extractor, s.count, s.size = str(data["extractor"]), int(data["count"]), tuple(data["size"].tolist())
        elif "arr_0" in data:
            with data.zip.open("arr_0.npy") as file:
                shape, fortran, dtype = npy_header(file)
            need(dtype == np.uint8 and len(shape) == 4 and shape[3] == 3 and shape[0] and not fortran,
                 f"{path}: arr_0 is {dtype} {shape}, not uint8 (N, H, W, 3); convert to 0..255 before saving")
            s.count, s.size, s.batches = shape[0], shape[2:0:-1], lambda size, _: npz_batches(path, size)
            s.labels = data["arr_1"] if "arr_1" in data else None
            need(s.labels is None or s.labels.shape == shape[:1], f"{path}: arr_1 is not one label an image; save it anew")
    need(s.moments or s.batches, f"{path}: neither arr_0 nor mu and sigma inside; give images or statistics")
    return s

def measure(s, extract, name, device, args):
    outputs = []
    def keep(images):
        outputs.append(extract(images))
        if not s.moments:
            check_count(s.count, outputs[0]["pool"].shape[1], s.path)
        return outputs[-1]["pool"]
    bar = tqdm(s.batches(args.batch_size, args.num_workers), s.path, -(-s.count // args.batch_size), disable=None)
    statistics = dict(pool=feature_statistics(keep, (batch.to(device) for batch in bar), extractor=name))
    s.features = {part: torch.cat([output[part] for output in outputs]) for part in outputs[0]}  # (N, D) each
    if "spatial" in s.features:
        statistics["spatial"] = Statistics(name).update(s.features.pop("spatial"))
    s.moments = {part: (x.mean, x.covariance) for part, x in statistics.items()} | s.moments

def run(args):
    making = args.samples == "stats"
    need(making == bool(args.out), "--out: belongs to stats, and stats needs it; python fid.py stats REFERENCE -o FILE")
    need(os.path.isdir(os.path.dirname(args.out or "") or "."), f"--out {args.out}: no such folder; make it first")
    need(args.batch_size > 0, f"--batch_size {args.batch_size}: not positive; give 1 or more")
    need(args.device != "cuda" or torch.cuda.is_available(), "--device cuda: torch finds no GPU; give --device cpu")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sources = [open_source(path) for path in ([] if making else [args.samples]) + [args.reference]]
    for s in sources:
        if s.extractor == "inception" != args.features:
            s.moments, s.extractor = {}, None
        need(s.batches or s.moments and not making, f"{s.path}: no images in it, only statistics; give images")
    sizes = {s.size for s in sources if s.size}
    need(len(sizes) < 2, f"{args.samples}: its image size is not the reference's ({sizes}); resize one side")
    extract, name, resize = None, max((s.extractor or "" for s in sources), key=len), "as recorded"
    if any(s.batches for s in sources):
        extract, name, resize = make_extractor(args.features, args.weights, device)
    for s in sorted(sources, key=lambda s: s.count or 0):  # the smaller first: it may be refused
        need(s.extractor in (None, name, name[:9]), f"{s.path}: made by {s.extractor}, not by {name}; use one extractor")
        if s.batches:
            measure(s, extract, name, device, args)
    if making:
        arrays = {key + "_s" * (part == "spatial"): value.cpu().numpy()
                  for part, pair in s.moments.items() for key, value in zip(("mu", "sigma"), pair)}
        with open(args.out, "wb") as file:
            np.savez(file, **arrays, count=s.count, size=s.size, extractor=name)
        return print(f"{args.out}: statistics of {s.count} images, extractor {name}, resize {resize}")
    a, b = sources
    scores = {title: frechet_distance(*a.moments[part], *b.moments[part])
              for part, title in (("pool", "fid" if name.startswith("inception") else "fd"), ("spatial", "sfid"))
              if part in a.moments and part in b.moments}
    if "logits" in a.features:
        scores["inception_score"], scores["inception_score_all"] = inception_score(a.features["logits"])
    if a.features and b.features:
        scores["precision"], scores["recall"] = precision_recall(a.features["pool"], b.features["pool"])
    record = dict(scores, extractor=name, resize=resize)
    for role, s in (("samples", a), ("reference", b)):
        images = [] if s.labels is None else np.unique(s.labels, return_counts=True)[1]  # of each label
        labels = f"{len(images)} labels of {min(images)} to {max(images)} images" if len(images) else None
        record[role] = dict(path=s.path, count=s.count, size=s.size, labels=labels)
    print("\n".join(f"{key:20s} {value}" for key, value in record.items()))
    if args.json:
        print(json.dumps(record))

def main(argv=None):
    parser = argparse.ArgumentParser(prog="fid.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = lambda message: need(False, f"arguments: {message}; see python fid.py --help")
    add = parser.add_argument
    add("samples", help="folder, .npz or statistics; or the word stats")
    add("reference", help="folder, .npz or statistics")
    add("--features", default="inception", help="inception, dino or a timm model's name (default inception)")
    add("--weights", help="the extractor's file; with dino, a checkpoint of train.py (default: download)")
    add("-o", "--out", help="with stats: the .npz to write (default none)")
    add("--json", action="store_true", help="end with one line of JSON (default off)")
    add("--batch_size", type=int, default=64, help="images at once, no influence on scores (default 64)")
    add("--num_workers", type=int, default=4, help="threads that read images (default 4)")
    add("--device", choices=("cpu", "cuda", "mps"), help="(default cuda where there is one, else cpu)")
    try:
        run(parser.parse_args(argv))
    except (ValueError, OSError, zipfile.BadZipFile, MemoryError, torch.OutOfMemoryError) as error:
        print("fid.py:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2)

if __name__ == "__main__":
    main()
