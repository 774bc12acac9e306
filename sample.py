"""Images from a checkpoint: one step of the average velocity, several steps, or the teacher's ODE.

Paper: arXiv 2511.13019, one-step and two-step samples in its tables of results.

    python sample.py --ckpt x.pt                                        # a grid of 64 images next to the checkpoint
    python sample.py --ckpt x.pt --classes "golden retriever" --num 8   # classes by name or by number
    python sample.py --ckpt x.pt --num 50000 --npz samples.npz          # PNGs in a folder, and one file for fid.py
    torchrun --nproc_per_node=8 -- sample.py --ckpt x.pt --num 50000 --npz samples.npz    # the same by eight processes
    python sample.py --ckpt x.pt --num 6 --teacher flow.pt --out x.gif  # the teacher's 25 steps below the student's 1

Image i is a function of (seed, i) alone. Its class is i modulo the number of classes asked for, so labels are balanced.
A PNG that exists is not made again: the same command goes on where a killed one stopped.
"""
import argparse
import json
import os
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from timm.data import ImageNetInfo
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

import meanflow
from dit import load_file, load_network
from rae import load_rae, published_rae, to_uint8


# ----------------------------------------------------------------------------------------------------------------------
# From noise to images

def seed_of(*key):
    """The seed of a stream of random numbers that is a function of the key alone."""
    return zlib.crc32(repr(key).encode())


def noise_of(seed, numbers, shape):
    """Noise (B, C, G, G) of the images `numbers`, each from a generator of its own: equal on every machine."""
    draw = lambda i: np.random.default_rng((seed, int(i))).standard_normal(shape, np.float32)
    return torch.from_numpy(np.stack([draw(i) for i in numbers]))


@torch.no_grad()
def make_images(network, rae, alpha, labels, steps=None, seed=0, batch_size=64, numbers=None):
    """Yield (numbers of a batch, its images uint8 (B, 3, S, S)) for the images `numbers`, default all of labels (M,).

    steps: evaluations of the network. A student samples, by default in 1; a teacher solves the ODE, by default in 50.
    """
    device, steps = next(network.parameters()).device, steps or (1 if network.average_velocity else 50)
    numbers = range(len(labels)) if numbers is None else numbers
    for first in range(0, len(numbers), batch_size):
        batch = numbers[first:first + batch_size]
        noise = noise_of(seed, batch, rae.latent_shape).to(device)                              # (B, C, G, G)
        y = labels[torch.tensor(batch)].to(device)                                              # (B,)
        if network.average_velocity:
            z = meanflow.sample(network, noise, y, steps)                                       # (B, C, G, G)
        else:
            z = meanflow.solve_flow(network, noise, y, steps, alpha, last_only=True)[0][-1]     # (B, C, G, G)
        yield batch, to_uint8(rae.decode(z)).cpu()


@torch.no_grad()
def reconstruct(rae, images, batch_size=250):
    """uint8 (M, 3, S, S) -> what the RAE makes of them, uint8 (M, 3, S, S)."""
    device = next(rae.decoder.parameters()).device
    return torch.cat([to_uint8(rae.decode(rae.encode(x.to(device) / 255))).cpu() for x in images.split(batch_size)])


def save_picture(network, rae, alpha, num_classes, path, seed=0, images=None):
    """Picture of a training run: samples with a class per column, or images (32 x (3, S, S)) and reconstructions."""
    if images is not None:
        rows = [row for x in torch.stack(images).split(8) for row in (x, reconstruct(rae, x))]  # 8 x (8, 3, S, S)
        return draw_grid(torch.cat(rows)).save(path)
    columns, steps = min(num_classes, 10), 1 if network.average_velocity else 25
    labels = (torch.arange(columns) * (num_classes // columns)).repeat(4)                       # (4 columns,)
    made = make_images(network, rae, alpha, labels, steps, seed)
    draw_grid(torch.cat([images for _, images in made]), columns).save(path)


@torch.no_grad()
def save_walk(student, teacher, rae, alpha, labels, path, seed=0, steps=25):
    """A moving picture: the student's one step above the teacher's walk from the same noise, a label a column."""
    noise = noise_of(seed, range(len(labels)), rae.latent_shape).to(labels.device)              # (B, C, G, G)
    walk, _ = meanflow.solve_flow(teacher, noise, labels, steps, alpha)                         # (1 + steps, B, ...)
    drawn, frames = torch.cat([x for _, x in make_images(student, rae, alpha, labels, 1, seed)]), []
    for step, z in enumerate(walk):
        images = to_uint8(rae.decode(z)).cpu()                                                  # (B, 3, S, S)
        titles = f"student: {min(step, 1)} of 1 step", f"teacher: {step} of {steps} steps"
        frames.append(draw_grid(torch.cat([drawn if step else images, images]), len(labels), titles))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[*steps * [120], 3000], loop=0)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints, names of classes, grids and .npz files

def class_names(folders=None):
    """Names of class folders: n01440764 is 'tench, Tinca tinca', others stay. By default ImageNet's 1,000."""
    known = ImageNetInfo().label_descriptions(as_dict=True) | {"n03126707": "crane (machine)"}  # "crane" is the bird
    return tuple(known.get(name, name) for name in folders or known)


def newest_checkpoint(path):
    """(file, content) of a checkpoint or, where it is damaged, of the one before it; (path, {}) where there is none."""
    files = [file for file in (path, path.with_suffix(".previous.pt")) if file.exists()]
    for file in files:
        try:
            if zipfile.ZipFile(file).testzip():
                raise RuntimeError("a checksum is wrong")
            return file, load_file(file)
        except (zipfile.BadZipFile, RuntimeError) as error:
            print0(f"{file}: damaged ({error})")
    if files:
        raise SystemExit(f"{path}: no whole checkpoint to go on from; to start the stage anew, move it away")
    return path, {}


def load_all(path, rae=None, weights=None, device="cpu"):
    """-> (network, RAE, time shift alpha, names of the classes). Published weights hold the network alone."""
    network, content = load_network(path)
    channels, grid, classes = (network.config[key] for key in ("in_channels", "input_size", "num_classes"))
    rae = load_rae(rae or path) if rae or "rae" in content else published_rae(16 * grid, weights)
    if rae.latent_shape != (channels, grid, grid):
        raise SystemExit(f"{path}: latents {(channels, grid, grid)}, its RAE's {rae.latent_shape}; give another --rae")
    names = content.get("classes") or (class_names() if classes == 1000 else [str(i) for i in range(classes)])
    return network.to(device), rae.to(device), content.get("alpha") or meanflow.alpha_of(channels, grid), names


def release(path, out):
    """Write what sampling needs of a checkpoint, in half precision: a sixth of the file."""
    if os.path.exists(out) or not {"rae", "network"} <= (content := load_file(path)).keys():
        raise SystemExit(f"--release {out}: needs a new name, and a --ckpt of a stage after rae")
    half = lambda state: {name: value.half() for name, value in state.items() if not name.startswith("encoder.")}
    content |= dict(ema=half(content["ema"]), rae=content["rae"] | dict(state=half(content["rae"]["state"])))
    torch.save({name: content[name] for name in ("stage", "step", "network", "classes", "alpha", "ema", "rae")}, out)


def parse_classes(text, names):
    """'golden retriever, 0, tench' -> [207, 0, 0]. A name may list synonyms behind commas."""
    lookup = {str(i): i for i in range(len(names))}
    lookup |= {word.strip().lower(): i for i, name in enumerate(names) for word in (name, *name.split(","))}
    text = text.strip().lower()
    words = [text] if text in lookup else [word.strip() for word in text.split(",")]
    unknown = [word for word in words if word not in lookup]
    if unknown:
        raise SystemExit(f"--classes: no class {unknown[0]!r} of {len(names)}; give numbers or names like {names[0]!r}")
    return [lookup[word] for word in words]


def draw_grid(images, columns=8, titles=()):
    """Images uint8 (B, 3, S, S) -> PIL image, `columns` a row. Titles stand to the left, each beside as many rows."""
    grid = make_grid(images, columns, padding=2, pad_value=255)                                 # (3, height, width)
    image = ImageOps.scale(to_pil_image(grid), max(1, 64 // images.shape[-1]), Image.Resampling.NEAREST)
    image = ImageOps.expand(image, (190 if titles else 0, 0, 0, 0), "white")
    for i, title in enumerate(titles):
        ImageDraw.Draw(image).text((8, (i + 0.35) * image.height / len(titles)), title, "black", font_size=15)
    return image


def pack_npz(files, labels, path):
    """PNGs -> .npz of arr_0, uint8 (M, S, S, 3), and arr_1, labels (M,). It gets its name when it is whole."""
    temporary, (width, height) = path.with_suffix(".tmp"), Image.open(files[0]).size
    with zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = dict(descr="|u1", fortran_order=False, shape=(len(files), height, width, 3))
            np.lib.format.write_array_header_1_0(file, header)
            for name in files:
                file.write(Image.open(name).tobytes())
        with archive.open("arr_1.npy", "w") as file:
            np.save(file, labels)
    temporary.replace(path)


# ----------------------------------------------------------------------------------------------------------------------
# Processes and command line

def print0(text):
    """Print a line beside the progress bars, by the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text, file=sys.stderr)


def start_processes(device=None):
    """-> (rank, number of processes, device). Under torchrun it joins the others, each with a GPU of its own."""
    world, found = int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.is_available()
    device = device or ("cuda" if found else "cpu")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if device.startswith("cuda"):
        if not found:
            raise SystemExit(f"--device {device}: torch finds no GPU here; leave the flag out")
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return int(os.environ.get("RANK", 0)), world, device


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint of any stage after rae, or published DiTDH weights")
    add("--rae", metavar="CKPT", help="another RAE (default: that of --ckpt, or the published one)")
    add("--weights", metavar="DIR", help="folder laid out like the hub (default: the hub)")
    add("--steps", type=int, help="evaluations of the network per image (default: student 1, teacher 50)")
    add("--num", type=int, default=64, help="number of images (default 64)")
    add("--classes", help="names or numbers, separated by commas (default: all in turn)")
    add("--seed", type=int, default=0, help="image i is a function of (seed, i) (default 0)")
    add("--out", type=Path, help="a .png: grid of all images; else a folder (default CKPT.samples.png, or as --npz)")
    add("--npz", type=Path, help="also write arr_0, uint8 (N, H, W, 3), and arr_1, labels, to this file")
    add("--teacher", metavar="CKPT", help="a moving picture: this teacher's 25 steps below the student's one")
    add("--release", metavar="FILE", help="no images: write what sampling needs, in half precision")
    add("--batch_size", type=int, default=64, help="images at a time (default 64)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    args = parser.parse_args()
    if args.release:
        return release(args.ckpt, args.release)
    rank, world, device = start_processes(args.device)
    network, rae, alpha, names = load_all(args.ckpt, args.rae, args.weights, device)
    classes = parse_classes(args.classes, names) if args.classes else list(range(len(names)))
    labels = torch.from_numpy(np.resize(classes, args.num))                                     # (num,), in turn
    if args.teacher:
        teacher = load_network(args.teacher)[0].to(device)
        if teacher.average_velocity or not network.average_velocity:
            raise SystemExit(f"--teacher {args.teacher}: give a checkpoint of flow; to --ckpt, a later stage's")
    asked = network, rae, alpha, labels, args.steps, args.seed, args.batch_size
    suffix = ".walk.gif" if args.teacher else ".samples.png"
    out = args.out or (args.npz.with_suffix("") if args.npz else Path(args.ckpt).with_suffix(suffix))
    if args.npz and (out.suffix == ".png" or args.teacher or not args.npz.absolute().parent.is_dir()):
        raise SystemExit(f"--npz {args.npz}: needs a folder that exists, and an --out that is a folder")
    (out.parent if out.suffix in (".png", ".gif") else out).mkdir(parents=True, exist_ok=True)
    if args.teacher:
        save_walk(network, teacher, rae, alpha, labels.to(device), out, args.seed)
        return print0(f"{out}: the student's step and the teacher's walk")
    if out.suffix == ".png":
        images = torch.cat([images for _, images in tqdm(make_images(*asked), total=-(-args.num // args.batch_size))])
        draw_grid(images, len(classes) if 4 <= len(classes) <= 12 else 8).save(out)             # a class a column
        return print0(f"{out}: {args.num} images")

    checkpoint, file = os.stat(args.ckpt), out / "settings.json"
    settings = json.dumps(dict(checkpoint=[checkpoint.st_size, checkpoint.st_mtime_ns], rae=args.rae or args.weights,
                               steps=args.steps, seed=args.seed, classes=classes))
    if rank == 0 and not any(out.iterdir()):
        file.write_text(settings)
    if world > 1:
        dist.barrier()
    if not file.exists() or file.read_text() != settings:
        raise SystemExit(f"--out {out}: holds images of other settings; give another folder, or remove it")
    files = [out / f"{i:06d}_{label}.png" for i, label in enumerate(labels.tolist())]
    todo = [i for i in range(rank, args.num, world) if not files[i].exists()]
    for numbers, images in tqdm(make_images(*asked, todo), total=-(-len(todo) // args.batch_size), disable=rank > 0):
        for i, image in zip(numbers, images):
            temporary = files[i].with_suffix(".tmp")                # a file gets its name when it is whole
            to_pil_image(image).save(temporary, "PNG", compress_level=1)
            temporary.replace(files[i])
    if world > 1:
        dist.barrier()
    if args.npz and rank == 0:
        pack_npz(files, labels.numpy(), args.npz.with_suffix(".npz"))
    print0(f"{out}: {args.num} images")


if __name__ == "__main__":
    main()
