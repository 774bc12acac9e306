"""Images from a checkpoint: one step of the average velocity, several steps, or the teacher's ODE.

Paper: arXiv 2511.13019, the one-step and two-step samples in its tables of results.

    python sample.py --ckpt x.pt                                         # a grid of 64 images
    python sample.py --ckpt x.pt --classes "golden retriever" --num 8    # by name or by number
    python sample.py --ckpt x.pt --num 50000 --npz samples.npz           # PNGs, for fid.py
    torchrun --nproc_per_node=8 -- sample.py --ckpt x.pt --num 50000 --npz samples.npz    # shared
    python sample.py --ckpt x.pt --num 6 --teacher flow.pt --out x.gif   # 1 step above 25

Image i is a function of (seed, i) alone, so neither the batch size nor the number of processes
changes it. A PNG that is whole is not drawn again: the same command goes on where a killed one
stopped.
"""
import argparse
import json
import math
import os
import re
import sys
import zipfile
from collections import defaultdict, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
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
from dit import fingerprint, load_file, load_network
from rae import load_rae, published_rae, to_uint8

ASSETS = Path(__file__).resolve().parent / "assets"


# --------------------------------------------------------------------------------------------------
# From noise to images

def noise_of(seed, numbers, shape):
    """Noise (B, C, G, G) of the images `numbers`, each from its own generator.

    The generators are numpy's, on the CPU, so every machine and every batch size sees equal noise.
    """
    noise = []
    for i in numbers:
        generator = np.random.default_rng((seed, int(i)))
        noise.append(generator.standard_normal(shape, np.float32))      # (C, G, G)
    return torch.from_numpy(np.stack(noise))                            # (B, C, G, G)


def run_ahead(function, items, threads):
    """Yield function(item) of each item in order, made by threads while the caller does other work.

    At most `threads` + 1 results wait at a time, and an error in a thread is raised here. Threads
    suffice, because numpy's generators and PIL's PNG code release Python's lock.
    """
    with ThreadPoolExecutor(threads) as pool:
        results = deque()
        for item in items:
            results.append(pool.submit(function, item))
            if len(results) > threads:
                yield results.popleft().result()
        while results:
            yield results.popleft().result()


def default_precision(device):
    """"bf16" on a GPU that multiplies fast in it, of NVIDIA's Ampere or newer, otherwise "fp32"."""
    if torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8:
        return "bf16"
    return "fp32"


@contextmanager
def computing(precision, device):
    """Compute without gradients, in "bf16" by autocast or in full "fp32".

    A caller that trains may be in an autocast of its own and may allow TF32. Images must not depend
    on that, so both are overruled here and restored at the end.
    """
    callers_matmul_precision = torch.get_float32_matmul_precision()
    device = torch.device(device).type
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, precision == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(callers_matmul_precision)


def make_images(network, rae, alpha, labels, steps=None, seed=0, batch_size=64, numbers=None,
                precision="fp32"):
    """Yield (numbers of a batch, its images, uint8 (B, 3, S, S)) for the images `numbers`.

    labels (M,): the class of image i stands at place i. numbers: by default all, 0 to M - 1.
    steps: evaluations of the network per image, by default 1 of a student and 50 of a teacher.
    alpha: time shift of the teacher's ODE.
    """
    device = next(network.parameters()).device
    if steps is None:
        steps = 1 if network.average_velocity else 50
    if numbers is None:
        numbers = range(len(labels))

    batches = [numbers[i:i + batch_size] for i in range(0, len(numbers), batch_size)]
    make_noise = partial(noise_of, seed, shape=rae.latent_shape)
    for batch, noise in zip(batches, run_ahead(make_noise, batches, threads=2)):
        noise = noise.to(device)                                        # (B, C, G, G)
        y = labels[torch.tensor(batch)].to(device)                      # (B,)

        # The context ends before the yield: the caller's code must not run in it.
        with computing(precision, device):
            if network.average_velocity:
                z = meanflow.sample(network, noise, y, steps)           # (B, C, G, G)
            else:
                path, _ = meanflow.solve_flow(network, noise, y, steps, alpha, last_only=True)
                z = path[-1]                                            # (B, C, G, G)
            images = to_uint8(rae.decode(z)).cpu()                      # (B, 3, S, S)
        yield batch, images


def labels_for(classes, counts, num):
    """Labels (num,) of the images 0 to num - 1.

    counts: how many training images each class of the network has, or None. With None or equal
    counts the classes come in turn. Otherwise each image goes to the class that is furthest behind
    its share of the counts, so that any number of first images is close to the shares.
    """
    shares = np.ones(len(classes)) if counts is None else np.array(counts)[classes]
    shares = shares / shares.sum()
    given = np.zeros(len(classes))
    labels = []
    for i in range(num):
        furthest_behind = np.argmax(shares * (i + 1) - given)
        given[furthest_behind] += 1
        labels.append(classes[furthest_behind])
    return torch.tensor(labels)


# --------------------------------------------------------------------------------------------------
# Pictures

def write_whole(path, write):
    """Call write(temporary path), then rename: a file has its final name only when it is whole.

    path: a Path, whose folder is made where there is none. The temporary file lies beside it and
    keeps its ending, from which PIL and numpy tell the format. It is on the disk, and not only in
    memory, before it is renamed.
    """
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write(temporary)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def draw_grid(images, columns=8, titles=("",), cell=64):
    """Images uint8 (B, 3, S, S) -> PIL image, `columns` a row, small ones enlarged to `cell`.

    Each title stands above its share of the rows; all titles have equally many.
    """
    zoom = max(1, cell // images.shape[-1])
    title_height = 24 if any(titles) else 0
    blocks = []
    for title, rows in zip(titles, images.chunk(len(titles))):
        grid = to_pil_image(make_grid(rows, columns, padding=2, pad_value=255))
        grid = ImageOps.scale(grid, zoom, Image.Resampling.NEAREST)
        block = ImageOps.expand(grid, (0, title_height, 0, 0), "white")
        ImageDraw.Draw(block).text((2 * zoom, 4), title, "black", font_size=16)
        blocks.append(block)
    return Image.fromarray(np.vstack(blocks))


def save_grid(sampling_args, labels, columns, path):
    """All images in one picture."""
    batches = make_images(**sampling_args, labels=labels)
    images = torch.cat([images for _, images in tqdm(batches, "batches")])      # (num, 3, S, S)
    write_whole(path, draw_grid(images, columns).save)


def save_walk(sampling_args, teacher, labels, path, stage, steps=25):
    """A moving picture: the student's one step above the teacher's walk, a label a column.

    Both start from the same noise, and each frame is one more evaluation of the teacher.
    labels (B,): on the teacher's device. stage: the name that the student's title has.
    """
    batches = make_images(**sampling_args | {"steps": 1}, labels=labels)
    one_step = torch.cat([images for _, images in batches])                     # (B, 3, S, S)

    rae = sampling_args["rae"]
    noise = noise_of(sampling_args["seed"], range(len(labels)), rae.latent_shape).to(labels.device)
    with computing(sampling_args["precision"], labels.device):
        walk, _ = meanflow.solve_flow(teacher, noise, labels, steps, sampling_args["alpha"])
        walk = [to_uint8(rae.decode(z)).cpu() for z in walk]                    # (B, 3, S, S) each

    frames = []
    for evaluations, images in enumerate(walk):
        titles = [
            f"{stage}, 1 step; network evaluations: {min(evaluations, 1)}",
            f"teacher, {steps} steps; network evaluations: {evaluations}",
        ]
        rows = torch.cat([one_step if evaluations else images, images])         # (2 B, 3, S, S)
        frames.append(draw_grid(rows, len(labels), titles, cell=128))
    durations = [120] * steps + [3000]                                          # milliseconds
    write_whole(path, partial(
        frames[0].save, save_all=True, append_images=frames[1:], duration=durations, loop=0))


# --------------------------------------------------------------------------------------------------
# A folder of PNGs, and an .npz of them

def is_whole(path):
    """Is there a PNG whose every part has its checksum? A killed machine may leave a cut one."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
    except (OSError, SyntaxError):
        return False
    return True


def claim_folder(out, settings, place):
    """Write the settings into a new folder. SystemExit where the folder has others."""
    file = out / "settings.json"
    text = json.dumps(settings)
    if place.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if not any(out.iterdir()):
            write_whole(file, lambda temporary: temporary.write_text(text))
    if place.world > 1:
        dist.barrier()
    if not file.exists() or file.read_text() != text:
        raise SystemExit(
            f"--out {out}: holds images of other settings; give another folder, or remove it")


def write_pngs(files, batch):
    """Write a batch, (numbers, images uint8 (B, 3, S, S)), each image to its number's file."""
    for i, image in zip(*batch):
        png = to_pil_image(image)
        write_whole(files[i], partial(png.save, format="PNG", compress_level=1))


def save_folder(sampling_args, labels, files, place):
    """Draw every image whose file is not there yet, or is not whole.

    The processes share the images. Threads write the PNGs of a batch while the next one is drawn.
    """
    numbers = range(place.rank, len(files), place.world)
    missing = [i for i in numbers if not is_whole(files[i])]
    batches = make_images(**sampling_args, labels=labels, numbers=missing)
    written = run_ahead(partial(write_pngs, files), batches, threads=8)
    num_batches = math.ceil(len(missing) / sampling_args["batch_size"])
    for _ in tqdm(written, "batches", num_batches, disable=place.rank > 0):
        pass                                                # this draws, while the threads write
    if place.world > 1:
        dist.barrier()


def pack_npz(files, class_numbers, image_size, path):
    """PNGs -> .npz of arr_0, uint8 (M, S, S, 3), and arr_1, the numbers of their classes (M,)."""
    def pixels_of(file):
        return Image.open(file).tobytes()

    def write(temporary):
        shape = (len(files), image_size, image_size, 3)
        with zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for pixels in run_ahead(pixels_of, files, threads=8):
                    file.write(pixels)
            with archive.open("arr_1.npy", "w") as file:
                np.save(file, class_numbers)

    write_whole(path, write)


# --------------------------------------------------------------------------------------------------
# Names of classes

def class_names(folders=None):
    """Names of class folders: n01440764 is 'tench, Tinca tinca', others stay. None: ImageNet's."""
    known = ImageNetInfo().label_descriptions(as_dict=True)
    known["n03126707"] = "crane (machine)"                              # plain "crane" is the bird
    return tuple(known.get(name, name) for name in folders or known)


def numbers_of(names):
    """The number of each class: its name where all names are numbers, otherwise its position."""
    if all(map(str.isdecimal, names)):
        return list(map(int, names))
    return list(range(len(names)))


def parse_classes(text, names):
    """'golden retriever, 0, tench' -> [207, 0, 0]. SystemExit on a word for no class or several.

    A name of ImageNet's lists synonyms behind commas, and a full name goes before a synonym:
    "missile" is class 657, though 744 is "projectile, missile".
    """
    full_names = defaultdict(list)
    synonyms = defaultdict(list)
    for i, name in enumerate(names):
        full_names[name.lower()].append(i)
        for word in name.lower().split(", "):
            synonyms[word].append(i)
    numbers = {str(number): [i] for i, number in enumerate(numbers_of(names))}
    meanings = numbers | synonyms | full_names              # of two equal words the last is kept

    text = text.strip().lower()
    words = [text] if text in meanings else re.split(r"\s*,\s*", text)
    classes = []
    for word in words:
        found = meanings.get(word, [])
        if len(found) != 1:
            meaning = ", ".join(f"{i} ({names[i]})" for i in found) or "no class"
            raise SystemExit(f"--classes: {word!r} means {meaning}; give numbers, or full names "
                             f"like {names[0]!r}")
        classes += found
    return classes


# --------------------------------------------------------------------------------------------------
# Checkpoints

def belongings(network, content, path, rae=None, weights=None):
    """What a network needs beside itself, from the content of its checkpoint, or the published.

    rae: another checkpoint to take the RAE from. weights: the folder of published weights, by
    default the hub. -> (RAE, time shift alpha, names of the classes).
    """
    channels = network.config["in_channels"]
    grid = network.config["input_size"]
    if rae:
        rae = load_rae(rae)
    elif "rae" in content:
        rae = load_rae(path, content["rae"])
    else:
        rae = published_rae(16 * grid, weights)
    latent_shape = (channels, grid, grid)
    if rae.latent_shape != latent_shape:
        raise SystemExit(f"{path}: latents {latent_shape}, its RAE's {rae.latent_shape}; "
                         "give another --rae")

    alpha = content.get("alpha") or meanflow.alpha_of(channels, grid)
    num_classes = network.config["num_classes"]
    default_names = class_names() if num_classes == 1000 else map(str, range(num_classes))
    return rae, alpha, content.get("classes") or tuple(default_names)


def load_all(path, rae=None, weights=None, device="cpu"):
    """-> (network, RAE, time shift alpha, names of the classes) of a checkpoint; see belongings."""
    network, content = load_network(path)
    rae, alpha, names = belongings(network, content, path, rae, weights)
    return network.to(device), rae.to(device), alpha, names


def half_precision(state):
    """A state dict without the encoder, which only training needs, in float16."""
    return {
        name: value.half() for name, value in state.items() if not name.startswith("encoder.")}


def release(path, out):
    """Write what sampling needs of a checkpoint, in half precision: a sixth of the file."""
    if out.exists():
        raise SystemExit(f"--release {out}: exists; give a new name")
    content = load_file(path)
    for part in ("network", "ema", "rae"):
        if not content.get(part):
            raise SystemExit(f"{path}: has no {part!r}; give a checkpoint that train.py wrote in a "
                             "stage after rae")

    content["ema"] = half_precision(content["ema"])
    content["rae"]["state"] = half_precision(content["rae"]["state"])
    kept = ("stage", "step", "network", "classes", "class_counts", "alpha", "ema", "rae")
    content = {name: content.get(name) for name in kept}
    write_whole(out, partial(torch.save, content))


# --------------------------------------------------------------------------------------------------
# Processes

Place = namedtuple("Place", ("rank", "world", "device"))    # world: the number of processes


def rank_and_world():
    """This process's rank and the number of processes, as torchrun says.

    Some shells keep a RANK or WORLD_SIZE; without an address to meet at there is one process.
    """
    if not {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"} <= os.environ.keys():
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def print0(text):
    """Print a line beside the progress bars, by the first process alone."""
    if rank_and_world()[0] == 0:
        tqdm.write(text, file=sys.stderr)


def start_processes(device=None):
    """-> Place. Under torchrun the process joins the others, each with a GPU of its own.

    device: "cpu", "cuda", "cuda:N", or None for a GPU if there is one.
    """
    rank, world = rank_and_world()
    num_gpus = torch.cuda.device_count()
    device = device or ("cuda" if num_gpus else "cpu")
    on_gpu = device.startswith("cuda")
    if on_gpu:
        if world > 1 and device != "cuda":
            raise SystemExit(f"--device {device}: each of {world} processes has a GPU of its own; "
                             "give --device cuda")
        if device == "cuda":
            local_rank = os.environ["LOCAL_RANK"] if world > 1 else 0
            device = f"cuda:{local_rank}"
        if torch.device(device).index >= num_gpus:
            raise SystemExit(f"--device {device}: torch finds {num_gpus or 'no'} GPU here; "
                             "leave the flag out, or start fewer processes")
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    return Place(rank, world, device)


# --------------------------------------------------------------------------------------------------
# Command line

def device_name(text):
    """argparse's type of --device."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu, cuda or a GPU such as cuda:1")
    return text


def number(kind, low, high=math.inf):
    """A type for argparse: a number from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value
    parse.__name__ = kind.__name__
    return parse


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint after stage rae, or published DiTDH weights")
    add("--rae", help="checkpoint with another RAE (default: --ckpt, or the published RAE)")
    add("--weights", help="folder laid out like the hub (default: the hub)")
    add("--steps", type=number(int, 1),
        help="evaluations of the network per image (default: student 1, teacher 50)")
    add("--num", type=number(int, 1), default=64, help="number of images (default 64)")
    add("--classes", help="names or numbers, separated by commas (default: all in turn)")
    add("--seed", type=number(int, 0), default=0, help="of the noise, with an image's number")
    add("--out", type=Path,
        help="NAME.png: a grid of all images. NAME.gif: with --teacher. NAME: a folder of PNGs\n"
             "(default: a picture beside --ckpt, or the folder that is called like --npz)")
    add("--npz", type=Path,
        help="also write arr_0, uint8 (N, H, W, 3), and arr_1, class numbers, to this file")
    add("--teacher",
        help="a moving picture: this checkpoint's 25 steps of flow below --ckpt's one step")
    add("--release", type=Path,
        help="no images: write what sampling needs to this file, in half precision")
    add("--batch_size", type=number(int, 1), default=64, help="images at a time (default 64)")
    add("--precision", choices=("fp32", "bf16"),
        help="of the networks (default: bf16 on GPUs of Ampere or newer, else fp32)")
    add("--device", type=device_name, help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    return parser.parse_args()


def output_of(args):
    """Where the images go. SystemExit where --out, --npz and --teacher do not fit together."""
    allowed = [".gif"] if args.teacher else [".png", ""]
    if args.out and args.out.suffix not in allowed:
        raise SystemExit(f"--out {args.out}: give NAME.png for a grid, a NAME without an ending "
                         "for a folder or, with --teacher, NAME.gif")
    if args.npz:
        out = args.out or args.npz.with_suffix("")
        if args.teacher or out.suffix == ".png":
            raise SystemExit(f"--npz {args.npz}: holds the images of a folder; give no picture")
        return out

    default = Path(args.ckpt).with_suffix(".walk.gif" if args.teacher else ".samples.png")
    if default.resolve().parent == ASSETS:                              # git keeps what lies there
        default = Path(default.name)
    return args.out or default


def main():
    args = parse_arguments()
    if args.release:
        return release(args.ckpt, args.release)

    # Refuse what can be refused before gigabytes are read.
    out = output_of(args)
    is_folder = args.npz or not out.suffix
    for path in (args.rae, args.teacher):
        if path and not os.path.isfile(path):
            raise SystemExit(f"{path}: no such file; give the path of a checkpoint")
    place = start_processes(args.device)
    if place.rank > 0 and not is_folder:
        return                                                          # one process is enough

    network, content = load_network(args.ckpt)
    rae, alpha, names = belongings(network, content, args.ckpt, args.rae, args.weights)
    classes = list(range(len(names)))
    if args.classes is not None:
        classes = parse_classes(args.classes, names)
    precision = args.precision or default_precision(place.device)
    options = {"steps": args.steps, "seed": args.seed, "precision": precision}
    sampling_args = {
        "network": network.to(place.device), "rae": rae.to(place.device), "alpha": alpha,
        "batch_size": args.batch_size, **options}
    labels = labels_for(classes, None, args.num)                        # (num,)

    if args.teacher:
        teacher, _ = load_network(args.teacher)
        if teacher.average_velocity or not network.average_velocity:
            raise SystemExit(f"--teacher {args.teacher}: give a checkpoint of flow; "
                             "to --ckpt, a later stage's")
        teacher.to(place.device)
        labels = labels.to(place.device)
        save_walk(sampling_args, teacher, labels, out, content.get("stage") or "student")

    elif not is_folder:
        columns = len(classes) if 4 <= len(classes) <= 12 else 8        # a class a column
        save_grid(sampling_args, labels, columns, out)

    else:
        # A folder is made to be scored, so its classes have the shares of the training images.
        if args.classes is None:
            labels = labels_for(classes, content.get("class_counts"), args.num)
        settings = {
            "stage": content.get("stage"), "step": content.get("step"),
            "fingerprint": fingerprint(network.state_dict()),
            "rae": args.rae, "classes": classes, **options}
        claim_folder(out, settings, place)
        class_numbers = np.array(numbers_of(names))[labels.numpy()]     # (num,)
        files = [out / f"{i:06d}_{number}.png" for i, number in enumerate(class_numbers)]
        save_folder(sampling_args, labels, files, place)
        if args.npz and place.rank == 0:
            pack_npz(files, class_numbers, rae.image_size, args.npz.with_suffix(".npz"))

    print0(f"{out}: {args.num} images")


if __name__ == "__main__":
    main()
