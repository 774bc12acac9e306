"""Images from a checkpoint: one step of the average velocity, several steps, or the teacher's ODE.

Paper: arXiv 2511.13019, one-step and two-step samples in its tables of results.

    python sample.py --ckpt x.pt                                        # grid of 64 images next to the checkpoint
    python sample.py --ckpt x.pt --classes "golden retriever" --num 8   # classes by name or by number
    python sample.py --ckpt x.pt --num 50000 --out samples --npz s.npz  # a folder of PNGs, and a file for fid.py
    torchrun --nproc_per_node=8 -- sample.py --ckpt x.pt --num 50000 --npz s.npz    # the same by eight processes

Image number i is a function of (seed, i) alone: its noise is drawn on the CPU from a generator of its own, and its
class is i modulo the classes asked for, so that labels are balanced. Neither --batch_size nor --device nor the number of
processes moves a pixel by more than rounding. The same command again goes on where a killed one stopped, and does
nothing where all is done; the bytes are the same.
"""
import difflib
import hashlib
import json
import re
import sys
import time
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo
from torchvision.utils import make_grid
from tqdm import tqdm

import meanflow
from dit import DiTDH, infer_config
from fid import feature_statistics, fingerprint, frechet_distance, join_processes, place
from rae import (Parser, UserError, at_least, fill, load_file, load_weights, need, one_line, pick_device, plural, rae_from, reading,
                 run_main, to_uint8, unpack_rae)

WRITERS = 8  # threads a process that encode and write; with one PNG an image, fewer would keep a fast GPU waiting


# ----------------------------------------------------------------------------------------------------------------------
# What is in a checkpoint

def load_network(path):
    """Any checkpoint that holds a DiTDH, ours or published -> (network with EMA weights, content of the file)."""
    content = load_file(path)
    state = load_weights(path, content)
    if "x_embedder.proj.weight" not in state:
        known = {"decoder_pred.weight": "a published RAE decoder", "var": "latent statistics",
                 "patch_embed.proj.weight": "an image encoder"}
        what = next((name for key, name in known.items() if key in state), "a checkpoint without a velocity network")
        if isinstance(content.get("stage"), str):
            what = f"a checkpoint of the stage {one_line(content['stage'])}, which holds no velocity network"
        raise UserError(f"{path}: {what}; give a checkpoint of flow, mid, distill or bootstrap, or released DiTDH weights")
    with reading(path, "not a DiTDH in the published layout"):
        with torch.device("meta"):
            model = DiTDH(**infer_config(state))
        fill(model, state)
    alpha, classes, rae = (content.get(key) for key in ("alpha", "classes", "rae"))  # released weights have none of them
    if alpha is not None:
        need(isinstance(alpha, (int, float)) and 0 < alpha < 1e4, f"{path}: its time shift is {one_line(alpha)}, not a number above 0")
    if classes is not None:
        names = isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes)
        need(names and len(classes) == model.num_classes, f"{path}: its classes are {one_line(classes)}, not {model.num_classes} names")
    need(model.num_classes > 0, f"{path}: it knows no class; make or fetch it again")
    need(rae is None or isinstance(rae, dict), f"{path}: its RAE is damaged; make or fetch it again")
    return model.eval().requires_grad_(False), content


def imagenet_names():
    """The 1,000 class names in label order, as timm knows them: 'golden retriever', 'tench, Tinca tinca'."""
    from timm.data import ImageNetInfo
    info = ImageNetInfo()
    return [info.index_to_description(i) for i in range(1000)]


def class_names(content, num_classes):
    """The names in a checkpoint; released weights have none of their own: those of ImageNet, or numbers."""
    return content.get("classes") or (imagenet_names() if num_classes == 1000 else [str(i) for i in range(num_classes)])


def load_all(args):
    """-> (network, RAE, time shift alpha, names of the classes), all from the checkpoint as far as they are in it."""
    model, content = load_network(args.ckpt)
    channels, grid = model.in_channels, model.input_size
    own = content.get("rae") and not args.rae
    rae = unpack_rae(content["rae"], path=args.ckpt) if own else rae_from(args.rae, 16 * grid, with_encoder=False)
    need(rae.latent_shape == (channels, grid, grid),
         f"{args.ckpt}: makes latents {(channels, grid, grid)}, but the RAE takes {rae.latent_shape}; give the one it was trained with "
         "as --rae")
    alpha = content.get("alpha") or meanflow.alpha_of(channels, grid)
    return model, rae, alpha, class_names(content, model.num_classes)


def parse_classes(text, names):
    """'207, tench, 3-5' -> [207, 0, 3, 4, 5]. names[i] may list synonyms behind commas. Raises UserError."""
    lookup = {}
    for i, name in reversed(list(enumerate(names))):
        for synonym in [name, *name.split(",")]:
            lookup[synonym.strip().lower()] = i
    if text.strip().lower() in lookup:  # a name may contain a comma itself
        return [lookup[text.strip().lower()]]
    chosen = []
    for part in text.split(","):
        part = part.strip().lower()
        numbers = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        if part in lookup:
            chosen.append(lookup[part])
        elif numbers and int(numbers[1]) <= int(numbers[2] or numbers[1]) < len(names):
            chosen += range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1)
        else:
            near = difflib.get_close_matches(part, lookup, n=3)
            raise UserError(f"--classes: no class {part!r} among {len(names)}; " + (f"near it: {', '.join(near)}" if near else
                            f"give numbers below {len(names)} or names such as {names[0]!r}"))
    return chosen


# ----------------------------------------------------------------------------------------------------------------------
# From noise to an image

def noise_of(seed, indices, shape):
    """Noise (B, C, H, W) of the images `indices`: one CPU generator an image, equal on every machine and in every batch."""
    start = seed * 1_000_003  # streams of other seeds stay apart until a million images
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed((start + int(i)) % 2**32)) for i in indices])


@torch.no_grad()
def generate(model, rae, noise, labels, steps, alpha):
    """Noise (B, C, H, W) and labels (B,) -> images (B, 3, S, S) in [0, 1]. A student samples, a teacher solves the ODE."""
    if model.r_embedder is not None:
        z = meanflow.sample(model, noise, labels, steps)
    else:
        z = meanflow.solve_flow(model, noise, labels, steps, alpha, last_only=True)[0][-1]
    return rae.decode(z).clamp(0, 1)


def make_images(model, rae, alpha, steps, output, todo, args):
    """Make the batches that start at the numbers `todo`. Noise is drawn two batches ahead, and images are written behind."""
    labels = torch.tensor(output.labels)                                                        # (num,)

    def draw(first):
        return noise_of(args.seed, range(first, min(first + args.batch_size, args.num)), rae.latent_shape)

    with ThreadPoolExecutor(2) as drawers, ThreadPoolExecutor(WRITERS) as writers:
        drawn, writing = deque(drawers.submit(draw, first) for first in todo[:2]), deque()
        for k, first in enumerate(tqdm(todo, desc=plural(steps, "step"), unit="batch", disable=place()[0] > 0)):
            noise = drawn.popleft().result().to(args.device)                                    # (B, C, H, W)
            drawn.extend(drawers.submit(draw, later) for later in todo[k + 2:k + 3])
            y = labels[first:first + len(noise)].to(args.device)                                # (B,)
            writing.append(writers.submit(output.write, first, to_uint8(generate(model, rae, noise, y, steps, alpha))))
            if len(writing) > 2 * WRITERS:  # the disk is behind: wait, rather than fill the memory
                writing.popleft().result()
        for job in writing:
            job.result()


# ----------------------------------------------------------------------------------------------------------------------
# Files: nothing is made twice, and nothing half made is taken for whole

def save_png(image, path, settings, **how):
    """With a word on what made it, which settings_of reads."""
    info = PngInfo()
    info.add_text("settings", settings)
    image.save(path, pnginfo=info, **how)


def settings_of(path):
    """What a finished .npz or PNG of ours was made with, as it says itself; None of any other file."""
    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                return archive.comment.decode()
        with Image.open(path) as image:
            return image.info.get("settings")
    except (OSError, ValueError, zipfile.BadZipFile):
        return None


def save_grid(images, path, columns=8, settings="", titles=()):
    """Images uint8 (B, 3, S, S) -> one PNG, `columns` a row, with a title to the left of every two rows or so."""
    grid = make_grid(images, nrow=columns, padding=2, pad_value=255)   # (3, height, width)
    scale = max(1, 64 // images.shape[-1])                                                      # small pictures are shown larger
    image = Image.fromarray(grid.permute(1, 2, 0).numpy())                                      # (height, width, 3)
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    if titles:
        image = ImageOps.expand(image, (190, 0, 0, 0), "white")
    for i, title in enumerate(titles):
        ImageDraw.Draw(image).text((8, (i + 0.35) * image.height / len(titles)), title, "black", font_size=15)
    save_png(image, path, settings)


def save_curves(charts, path, width=600, height=400):
    """Line charts with logarithmic y, and x where it is a handful of numbers -> one PNG. charts: {title: {name: (xs, ys)}}."""
    picture = Image.new("RGB", (width * len(charts), height), "white")
    draw, colours = ImageDraw.Draw(picture), ("royalblue", "crimson", "seagreen", "darkorange", "purple", "teal", "black", "gray")
    for k, (title, curves) in enumerate(charts.items()):
        curves = {name: [np.array(values, float) for values in xy] for name, xy in curves.items()}
        xs, ys = (np.unique(np.concatenate([curve[i] for curve in curves.values()])) for i in (0, 1))
        if not len(xs):
            continue
        spacing = next(n * 10**power for power in range(9) for n in (1, 2, 5) if xs[-1] - xs[0] <= 6 * n * 10**power)
        scale, x_ticks = (np.log, xs) if len(xs) < 10 else (float, np.arange(spacing, xs[-1] + 1, spacing))
        ticks = [n * 10.0**power for power in range(-9, 20) for n in ((1, 2, 5) if ys[-1] < 100 * ys[0] else (1,))]
        ticks = [tick for i, tick in enumerate(ticks) if ticks[i + 1:] and ticks[i + 1] > ys[0] and ticks[max(0, i - 1)] < ys[-1]]
        low, high = np.log10(ticks[0]), np.log10(ticks[-1])
        to_x = lambda x: k * width + 60 + (width - 90) * (scale(x) - scale(xs[0])) / max(scale(xs[-1]) - scale(xs[0]), 1e-9)
        to_y = lambda y: height - 40 - (height - 80 - 16 * len(curves)) * (np.log10(y) - low) / (high - low)
        draw.text((k * width + 60, 8), title, "black", font_size=16)
        for x in x_ticks:
            draw.text((to_x(x), height - 32), f"{x:g}", "black", font_size=13, anchor="ma")
        for tick in ticks:
            draw.line([(k * width + 60, to_y(tick)), ((k + 1) * width - 30, to_y(tick))], "lightgray")
            draw.text((k * width + 52, to_y(tick)), f"{tick:g}", "black", font_size=13, anchor="rm")
        for i, (name, (x, y)) in enumerate(curves.items()):
            draw.line([(to_x(a), to_y(b)) for a, b in zip(x, y)], colours[i % len(colours)], 2)
            draw.text((k * width + 70, 32 + 16 * i), name, colours[i % len(colours)], font_size=13)
    picture.save(path)


class Store:
    """Images on disk until all are made. The file holds a byte an image (1: done), then the pixels of the first `keep`.

    A killed run leaves it behind and the same command goes on from it. Threads and processes write to it at once.
    """

    def __init__(self, path, num, keep, size):
        self.path, self.num, self.shape, self.bytes = path, num, (keep, size, size, 3), size * size * 3
        with open(path, "ab") as file:
            file.truncate(num + keep * self.bytes)  # zeros; changes nothing where another run or process was first

    def write(self, first, pixels):
        """pixels: uint8 array (B, S, S, 3) of the images first, first + 1, ... Marks them as done, when they are."""
        with open(self.path, "r+b") as file:
            file.seek(self.num + first * self.bytes)
            file.write(pixels[:max(0, self.shape[0] - first)].tobytes())
            file.flush()
            file.seek(first)
            file.write(b"\1" * len(pixels))

    def read(self, first, last):
        """-> uint8 array (last - first, S, S, 3), or fewer at the end."""
        count = min(last, self.shape[0]) - first
        return np.fromfile(self.path, np.uint8, count * self.bytes, offset=self.num + first * self.bytes).reshape(-1, *self.shape[1:])

    def pack(self, path, labels, settings):
        """Write a normal .npz: arr_0 (M, S, S, 3), arr_1 (M,); a piece at a time, and in place only when it is whole."""
        whole = path.with_name(f"{path.name}.writing")
        with zipfile.ZipFile(whole, "w") as archive:
            archive.comment = settings.encode()
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=self.shape))
                piece = max(1, 2**26 // self.bytes)
                for first in range(0, self.num, piece):
                    file.write(self.read(first, first + piece).tobytes())
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, labels)
        whole.replace(path)


class Output:
    """Where the images of one command go: a grid or a folder of PNGs, an .npz, and beside them what a killed run left."""

    def __init__(self, args, labels, settings):
        self.num, self.labels, self.settings = args.num, labels, settings
        self.out = Path(args.out) if args.out else Path(args.ckpt).with_suffix(".samples.png")
        self.npz = args.npz and Path(args.npz if args.npz.endswith(".npz") else args.npz + ".npz")
        self.as_folder = self.out.suffix.lower() not in (".png", ".jpg")
        self.files = [self.out / f"{i:06d}_{label}.png" for i, label in enumerate(labels)] if self.as_folder else [self.out]
        self.target = self.npz or self.out
        self.partial = self.target.with_name(f"{self.target.name}.{settings}.partial")
        folders = {"--out": self.out if self.as_folder else self.out.parent, "--npz": self.npz.parent if self.npz else Path()}
        for flag, folder in folders.items():
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{flag} {folder}: cannot be made ({one_line(error)})") from None
        need(not (self.npz and self.npz.is_dir()), f"--npz {self.npz}: is a folder; give the name of a file")

    def complete(self):
        return not self.partial.exists() and all(settings_of(path) == self.settings for path in [self.npz or self.files[0], *self.files])

    def open(self, size):
        """Ready to write -> which images are done already, bool (num,)."""
        keep = min(64, self.num)                                                                # pixels for a grid
        if self.npz:
            keep = self.num
        elif self.as_folder:
            keep = 0
        self.store = Store(self.partial, self.num, keep, size)
        return np.fromfile(self.partial, bool, self.num) & [not self.as_folder or settings_of(path) == self.settings for path in self.files]

    def write(self, first, images):
        """images: uint8 (B, 3, S, S), of which the first one has the number `first`."""
        pixels = images.cpu().permute(0, 2, 3, 1).numpy()                                       # (B, S, S, 3)
        if self.as_folder:
            for image, path in zip(pixels, self.files[first:first + len(pixels)]):
                save_png(Image.fromarray(image), path, self.settings, compress_level=1)         # 7% larger, three times as fast
        self.store.write(first, pixels)

    def finish(self):
        if not self.as_folder:
            classes = len(set(self.labels[:64]))                                                # a class a column, if they are few
            columns = classes if 4 <= classes <= 12 else 8
            save_grid(torch.from_numpy(self.store.read(0, 64)).permute(0, 3, 1, 2), self.out, columns, self.settings)
        if self.npz:
            self.store.pack(self.npz, np.array(self.labels), self.settings)
        self.partial.unlink()


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints side by side: the verdict at the end of `train.py --toy`, and `train.py --toy --report CKPT ...`

def train_classifier(images, labels, num_classes, steps, device, seed=0):
    """A small convolutional network, trained on (M, 3, 32, 32) uint8: whether a sample shows the class it was asked for."""
    torch.manual_seed(seed)
    half = lambda i, o: [nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU()]
    net = nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU(), *half(32, 64), *half(64, 128), *half(128, 256),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, num_classes)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="classifier", mininterval=0.5 if sys.stderr.isatty() else 10):
        pick = torch.randint(len(images), (128,))
        x = images[pick].to(device, memory_format=torch.channels_last).float() / 255            # (128, 3, 32, 32)
        F.cross_entropy(net(x), labels[pick].to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return net.eval()


@torch.no_grad()
def rate(images, labels, wanted, measure, classifier, device):
    """How near images are to real ones in the features of the RAE's encoder, and whether each shows its class.

    images (M, 3, S, S) uint8, labels (M,); measure(images) -> their fid.Statistics, and wanted those of the real ones.
    -> dict(frechet, agreement in 0..1).
    """
    made = measure(images)
    named = torch.cat([classifier(x.to(device).float() / 255).argmax(1).cpu() for x in images.split(500)])      # (M,)
    return dict(frechet=frechet_distance(made.mean, made.covariance, wanted.mean, wanted.covariance),
                agreement=(named == labels).float().mean().item())


@torch.no_grad()
def in_steps(network, rae, alpha, steps, seed, num, device, precision):
    """`num` samples, classes in turn, in so many steps -> images uint8 (num, 3, S, S), labels (num,), seconds."""
    noise = noise_of(seed, range(num), (network.in_channels, network.input_size, network.input_size)).to(device)    # (num, C, G, G)
    labels = (torch.arange(num) % network.num_classes).to(device)
    clock = time.perf_counter()
    with torch.autocast(str(device), torch.bfloat16, enabled=precision == "bf16"):
        batches = [generate(network, rae, z, y, steps, alpha).float() for z, y in zip(noise.split(250), labels.split(250))]
    return to_uint8(torch.cat(batches)).cpu(), labels.cpu(), time.perf_counter() - clock


def curves_of(rows, logs):
    """What save_curves draws of the rows, and of the logs {name: path} of their training."""
    quality, norms = {}, {}
    for name, log in logs.items():
        quality[name] = zip(*sorted((row["steps"], row["frechet"]) for row in rows if row["name"] == name))
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        points = [(line["step"], line.get("grad_max") or line["grad_norm"]) for line in lines if line.get("grad_norm")]
        norms[name] = zip(*points) if points else ((), ())
    return {"Frechet distance against number of steps": quality, "gradient norm against training step": norms}


def save_comparison(rows, num_classes, path):
    """Two lines of pictures a row, a class a column: real, reconstructed, the teacher's in 25 steps and in one, the students' in one."""
    shown = [row for row in rows if row["steps"] in ("", 25, 1)]
    columns = torch.linspace(0, num_classes - 1, min(10, num_classes)).long()
    lines = []
    for row in shown:
        for which in (0, 1):                                                                    # the first of a class, the second
            found = [(row["labels"] == k).nonzero()[:, 0] for k in columns]
            blank = torch.full_like(row["images"][0], 255)                                      # for a class that is not among them
            lines.append(torch.stack([row["images"][i[min(which, len(i) - 1)]] if len(i) else blank for i in found]))
    titles = [f"{row['name']},\n{plural(row['steps'], 'step')}" if row["steps"] else row["name"] for row in shown]
    save_grid(torch.cat(lines), path, columns=len(columns), titles=titles)


def side_by_side(checkpoints, held_out, names, classifier, out, device, seed, precision, num=1000):
    """Print how teachers and students do in 1, 2, ... steps; save the table as report.json and its curves as report.png.

    checkpoints: their paths, or the folder of the toy's stages, which adds real images, reconstructions and a picture
    of all, comparison.png. held_out: images uint8 (M, 3, 32, 32) and labels (M,) that no stage has seen.
    """
    out, (real, real_labels), rows, whole = Path(out), held_out, [], not isinstance(checkpoints, list)
    if whole:
        called = {"teacher": "flow", "student after mid": "mid", "student after distill": "distill", "student after bootstrap": "bootstrap"}
        checkpoints = {name: Path(checkpoints) / f"{stage}.pt" for name, stage in called.items()}
    else:
        checkpoints = {str(path): Path(path) for path in checkpoints}
    say = partial(tqdm.write, file=sys.stdout)
    say(f"\n{'':24} {'steps':>5} {'Frechet distance':>17} {'class agreement':>16} {'s per 1000':>11}")

    def add(name, steps, images, labels, seconds=None):
        row = dict(name=name, steps=steps, **rate(images, labels, wanted, measure, classifier, device), seconds=seconds)
        rows.append(row | dict(images=images, labels=labels))
        say(f"{name:24} {steps:>5} {row['frechet']:17.3f} {row['agreement']:15.1%} " + (f"{seconds * 1000 / num:11.1f}" if seconds else ""))

    for name, path in checkpoints.items():
        network, content = load_network(path)
        need(content.get("rae") and network.num_classes == len(names),
             f"{path}: holds no RAE, or knows {network.num_classes} classes where the images have {len(names)}; "
             "give a checkpoint of ours, and the --data that it was trained on")
        network, rae = network.to(device), unpack_rae(content["rae"], path=path).to(device)
        measure = partial(feature_statistics, lambda x: rae.features(x.to(device).float() / 255), batch_size=500)
        wanted = measure(real)                                                                  # of each RAE once
        if whole and not rows:
            add("real images, held out", "", real, real_labels)
            with torch.no_grad():
                decoded = torch.cat([to_uint8(rae.decode(rae.encode(x.to(device).float() / 255))).cpu() for x in real.split(250)])
            add("their reconstructions", "", decoded, real_labels)
        for steps in (1, 2, 4) if network.r_embedder is not None else (25, 4, 1):
            add(name, steps, *in_steps(network, rae, content.get("alpha") or 1.0, steps, seed, num, device, precision))
    table = [{key: value for key, value in row.items() if key not in ("images", "labels")} for row in rows]
    (out / "report.json").write_text(json.dumps(table, indent=1))
    save_curves(curves_of(rows, {name: path.with_suffix(".jsonl") for name, path in checkpoints.items()}), out / "report.png")
    if whole:
        save_comparison(rows, len(names), out / "comparison.png")
    say(f"\nFrechet distance: in the encoder's features, to {len(real)} held-out images. Agreement: a classifier that no stage has seen.\n"
        f"{out / 'report.json'} holds the table, {out / 'report.png'} its curves")
    if whole:
        say(f"{out / 'comparison.png'} shows real images, reconstructions and samples side by side")


# ----------------------------------------------------------------------------------------------------------------------
# Command line

def parse_arguments():
    parser = Parser(description="Images from a checkpoint of train.py or a published one.", epilog="examples:\n" + __doc__.split("\n\n")[2])
    add = parser.add_argument_group("what to sample").add_argument
    add("--ckpt", metavar="FILE", required=True, help="checkpoint of flow, mid, distill or bootstrap, or published DiTDH weights")
    add("--rae", metavar="PATH", help="another RAE: our checkpoint, or a folder like the hub's (default: that of CKPT, or the hub's)")
    add("--steps", metavar="N", type=at_least(1, 10**5), help="evaluations of the network an image (default: student 1, teacher 50)")
    add("--num", metavar="N", type=at_least(1, 10**7), default=64, help="number of images (default 64)")
    add("--classes", metavar="LIST", help="names, numbers and ranges, separated by commas (default: all in turn)")
    add("--seed", metavar="N", type=at_least(0), default=0, help="image i is a function of (seed, i) (default 0)")
    add = parser.add_argument_group("output").add_argument
    add("--out", metavar="PATH", help="grid PNG of the first 64, or a folder for a PNG an image (default: CKPT's name with .samples.png)")
    add("--npz", metavar="FILE", help="also write arr_0 (uint8 N,H,W,3) and arr_1 (labels) here (default: none)")
    add = parser.add_argument_group("how").add_argument
    add("--batch_size", metavar="N", type=at_least(1), default=64, help="images at a time (default 64)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    return parser.parse_args()


def main():
    args = parse_arguments()
    join_processes()
    rank, world = place()
    args.device = pick_device(args.device)
    model, rae, alpha, names = load_all(args)
    classes = parse_classes(args.classes, names) if args.classes else list(range(len(names)))
    steps = args.steps or (1 if model.r_embedder is not None else 50)
    labels = [classes[i % len(classes)] for i in range(args.num)]
    made_with = (fingerprint(model), fingerprint(rae), steps, alpha, args.seed, labels)
    output = Output(args, labels, settings=hashlib.sha256(repr(made_with).encode()).hexdigest()[:16])
    report = f"{plural(args.num, 'image')}, {plural(steps, 'evaluation')} each: {output.out}" + (f", {output.npz}" if output.npz else "")
    if output.complete():
        return print(f"{report}: all there already") if rank == 0 else None
    try:
        done = output.open(rae.decoder.patch_size * rae.decoder.config["grid"])
        todo = [first for first in range(0, args.num, args.batch_size)[rank::world] if not done[first:first + args.batch_size].all()]
        make_images(model.to(args.device), rae.to(args.device), alpha, steps, output, todo, args)
        if world > 1:
            dist.barrier()
        if rank == 0:
            output.finish()
            print(report)
    except OSError as error:
        raise UserError(f"{output.target}: cannot be written ({one_line(error)})") from None


if __name__ == "__main__":
    run_main(main)
