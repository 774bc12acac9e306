"""Images from a checkpoint: one step of the average velocity, several steps, or the teacher's ODE.

Paper: arXiv 2511.13019, one-step and two-step samples in its tables of results.

    python sample.py --ckpt x.pt                                        # a grid of 64 images next to the checkpoint
    python sample.py --ckpt x.pt --classes "golden retriever" --num 8   # classes by name or by number
    python sample.py --ckpt x.pt --num 50000 --npz samples.npz          # PNGs in a folder, and one file for fid.py
    torchrun --nproc_per_node=8 -- sample.py --ckpt x.pt --num 50000 --npz samples.npz    # the same by eight processes

Image i is a function of (seed, i) alone. Its class is i modulo the number of classes asked for, so labels are balanced.
A PNG that exists is not made again: the same command goes on where a killed one stopped.
"""
import argparse
import json
import os
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from timm.data import ImageNetInfo
from torchvision.utils import make_grid
from tqdm import tqdm

import meanflow
from dit import load_network
from rae import load_rae, published_rae, to_uint8


# ----------------------------------------------------------------------------------------------------------------------
# From noise to images

def noise_of(seed, numbers, shape):
    """Noise (B, C, G, G) of the images `numbers`, each from a generator of its own: equal on every machine."""
    draw = lambda i: np.random.default_rng((seed, int(i))).standard_normal(shape, np.float32)
    return torch.from_numpy(np.stack([draw(i) for i in numbers]))


@torch.no_grad()
def generate(network, rae, noise, labels, steps, alpha):
    """Noise (B, C, G, G), labels (B,) -> images (B, 3, S, S) in [0, 1]. A student samples, a teacher solves the ODE."""
    if network.average_velocity:
        z = meanflow.sample(network, noise, labels, steps)
    else:
        z = meanflow.solve_flow(network, noise, labels, steps, alpha, last_only=True)[0][-1]
    return rae.decode(z).clamp(0, 1)


def make_images(network, rae, alpha, labels, steps=None, seed=0, batch_size=64, numbers=None):
    """Yield (numbers of a batch, its images uint8 (B, 3, S, S)) for the images `numbers`, default all of labels (M,).

    steps: evaluations of the network, by default 1 of a student and 50 of a teacher.
    """
    device, steps = next(network.parameters()).device, steps or (1 if network.average_velocity else 50)
    numbers = range(len(labels)) if numbers is None else numbers
    for first in range(0, len(numbers), batch_size):
        batch = numbers[first:first + batch_size]
        noise = noise_of(seed, batch, rae.latent_shape).to(device)                              # (B, C, G, G)
        y = labels[torch.tensor(batch)].to(device)                                              # (B,)
        yield batch, to_uint8(generate(network, rae, noise, y, steps, alpha))


@torch.no_grad()
def reconstruct(rae, images, batch_size=250):
    """uint8 (M, 3, S, S) -> what the RAE makes of them, uint8 (M, 3, S, S)."""
    device = next(rae.decoder.parameters()).device
    return torch.cat([to_uint8(rae.decode(rae.encode(x.to(device) / 255))).cpu() for x in images.split(batch_size)])


def save_picture(network, rae, alpha, num_classes, path, seed=0, images=None):
    """Picture of a training run: samples with a class per column, or images (32 x (3, S, S)) and reconstructions."""
    if images is not None:
        shown = torch.stack(images)                                                             # uint8 (32, 3, S, S)
        rows = torch.stack([x.unflatten(0, (-1, 8)) for x in (shown, reconstruct(rae, shown))], 1)  # (4, 2, 8, 3, S, S)
        return save_grid(rows.flatten(0, 2), path)
    columns, steps = num_classes if num_classes <= 12 else 8, 1 if network.average_velocity else 25
    labels = (torch.arange(columns) * (num_classes // columns)).repeat(4)                       # (4 columns,)
    made = make_images(network, rae, alpha, labels, steps, seed)
    save_grid(torch.cat([images for _, images in made]), path, columns)


# ----------------------------------------------------------------------------------------------------------------------
# What is in a checkpoint

def class_names(folders=None):
    """Names of class folders: n01440764 is 'tench, Tinca tinca', others stay. By default ImageNet's 1,000."""
    info = ImageNetInfo()
    known = {info.index_to_label_name(i): info.index_to_description(i) for i in range(1000)}
    return tuple(known.get(name, name) for name in folders or known)


def load_all(path, rae=None, weights=None):
    """-> (network, RAE, time shift alpha, names of the classes). Published weights hold the network alone."""
    network, content = load_network(path)
    channels, grid, classes = (network.config[key] for key in ("in_channels", "input_size", "num_classes"))
    if rae or "rae" in content:
        rae = load_rae(rae or path)
    else:
        rae = published_rae(16 * grid, weights)
    if rae.latent_shape != (channels, grid, grid):
        raise SystemExit(f"{path}: makes latents {(channels, grid, grid)}, the RAE takes {rae.latent_shape}; "
                         "give the one it was trained with as --rae")
    names = content.get("classes") or (class_names() if classes == 1000 else [str(i) for i in range(classes)])
    return network, rae, content.get("alpha") or meanflow.alpha_of(channels, grid), names


def parse_classes(text, names):
    """'golden retriever, 0, tench' -> [207, 0, 0]. A name may list synonyms behind commas."""
    lookup = {str(i): i for i in range(len(names))}
    lookup |= {word.strip().lower(): i for i, name in enumerate(names) for word in (name, *name.split(","))}
    words = [text] if text.strip().lower() in lookup else text.split(",")
    unknown = [word.strip() for word in words if word.strip().lower() not in lookup]
    if unknown:
        raise SystemExit(f"--classes: no class {unknown[0]!r} among {len(names)}; "
                         f"give numbers below {len(names)} or names such as {names[0]!r}")
    return [lookup[word.strip().lower()] for word in words]


# ----------------------------------------------------------------------------------------------------------------------
# Files

def save_grid(images, path, columns=8, titles=()):
    """Images uint8 (B, 3, S, S) -> one PNG, `columns` a row. Titles stand to the left, each beside as many rows."""
    grid = make_grid(images.cpu(), columns, padding=2, pad_value=255)                           # (3, height, width)
    image, scale = Image.fromarray(grid.permute(1, 2, 0).numpy()), max(1, 64 // images.shape[-1])
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    if titles:
        image = ImageOps.expand(image, (190, 0, 0, 0), "white")
    for i, title in enumerate(titles):
        ImageDraw.Draw(image).text((8, (i + 0.35) * image.height / len(titles)), title, "black", font_size=15)
    image.save(path)


def save_png(image, path):
    """uint8 (3, S, S) -> PNG. It gets its name when it is whole, so a file that exists is complete."""
    temporary = path.with_suffix(".tmp")
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(temporary, "PNG", compress_level=1)
    temporary.replace(path)


def pack_npz(files, labels, path):
    """PNGs -> .npz of arr_0, uint8 (M, S, S, 3), and arr_1, labels (M,). It gets its name when it is whole."""
    temporary, (height, width, _) = path.with_suffix(".tmp"), np.asarray(Image.open(files[0])).shape
    with zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = dict(descr="|u1", fortran_order=False, shape=(len(files), height, width, 3))
            np.lib.format.write_array_header_1_0(file, header)
            for name in files:
                file.write(np.asarray(Image.open(name)).tobytes())
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, labels)
    temporary.replace(path)


def settings_of(ckpt, **settings):
    """What a folder of samples was made with, as text. A checkpoint is known by the checksums inside it."""
    with zipfile.ZipFile(ckpt) as archive:
        checksum = zlib.crc32(repr([(file.filename, file.CRC) for file in archive.infolist()]).encode())
    return json.dumps(dict(checkpoint=f"{checksum:08x}", **settings))


# ----------------------------------------------------------------------------------------------------------------------
# Processes and command line

def print0(text):
    """Print a line beside the progress bars, by the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text, file=sys.stderr)


def start_processes(device=None):
    """-> (rank, number of processes, device). Under torchrun it joins the others, each with a GPU of its own."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise SystemExit(f"--device {device}: torch finds no GPU here; leave the flag out")
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return (dist.get_rank() if world > 1 else 0), world, device


def main():
    title, _, examples = __doc__.split("\n\n")[:3]
    parser = argparse.ArgumentParser(description=title, epilog=examples, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint of flow, mid, distill or bootstrap, or published DiTDH weights")
    add("--rae", metavar="CKPT", help="another RAE (default: that of --ckpt, or the published one)")
    add("--weights", metavar="DIR", help="folder laid out like the hub (default: the hub)")
    add("--steps", type=int, help="evaluations of the network per image (default: student 1, teacher 50)")
    add("--num", type=int, default=64, help="number of images (default 64)")
    add("--classes", help="names or numbers, separated by commas (default: all in turn)")
    add("--seed", type=int, default=0, help="image i is a function of (seed, i) (default 0)")
    add("--out", type=Path, help="a .png: grid of all images; else a folder (default CKPT.samples.png, or as --npz)")
    add("--npz", type=Path, help="also write arr_0, uint8 (N, H, W, 3), and arr_1, labels, to this file")
    add("--batch_size", type=int, default=64, help="images at a time (default 64)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    args = parser.parse_args()
    if min(args.num, args.batch_size, args.steps or 1) < 1 or args.seed < 0:
        raise SystemExit("--num, --batch_size, --steps: at least 1; --seed: at least 0")
    rank, world, device = start_processes(args.device)
    network, rae, alpha, names = load_all(args.ckpt, args.rae, args.weights)
    network, rae = network.to(device), rae.to(device)
    classes = parse_classes(args.classes, names) if args.classes else list(range(len(names)))
    labels = torch.tensor([classes[i % len(classes)] for i in range(args.num)])                 # (num,)
    how = dict(steps=args.steps, seed=args.seed, batch_size=args.batch_size)
    out = args.out or (args.npz.with_suffix("") if args.npz else Path(args.ckpt).with_suffix(".samples.png"))

    if args.npz and (out.suffix == ".png" or not args.npz.absolute().parent.is_dir()):
        raise SystemExit(f"--npz {args.npz}: needs a folder that exists, and an --out that is a folder")
    if out.suffix == ".png":
        out.parent.mkdir(parents=True, exist_ok=True)
        batches = tqdm(make_images(network, rae, alpha, labels, **how), total=-(-args.num // args.batch_size))
        columns = len(classes) if 4 <= len(classes) <= 12 else 8                                # a class a column
        save_grid(torch.cat([images.cpu() for _, images in batches]), out, columns)
        return print(out)

    out.mkdir(parents=True, exist_ok=True)
    settings = settings_of(args.ckpt, rae=args.rae or args.weights, steps=args.steps, seed=args.seed, classes=classes)
    file = out / "settings.json"
    if rank == 0 and not file.exists() and not any(out.iterdir()):
        file.write_text(settings)
    if world > 1:
        dist.barrier()
    if not file.exists() or file.read_text() != settings:
        raise SystemExit(f"--out {out}: holds images of other settings; give another folder, or remove it")
    files = [out / f"{i:06d}_{label}.png" for i, label in enumerate(labels.tolist())]
    todo = [i for i in range(rank, args.num, world) if not files[i].exists()]
    with ThreadPoolExecutor(8) as writers, tqdm(total=len(todo), unit="image", disable=rank > 0) as bar:
        writing = []
        for numbers, images in make_images(network, rae, alpha, labels, numbers=todo, **how):
            for job in writing:                                                                 # of the batch before
                job.result()
            writing = [writers.submit(save_png, image, files[i]) for i, image in zip(numbers, images.cpu())]
            bar.update(len(numbers))
        for job in writing:
            job.result()
    if world > 1:
        dist.barrier()
    if rank == 0:
        if args.npz:
            pack_npz(files, labels.numpy(), args.npz.with_suffix(".npz"))
        print(f"{out}: {args.num} images", args.npz or "")


if __name__ == "__main__":
    main()
