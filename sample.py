"""Images from a checkpoint: one step of the average velocity, several steps, or the teacher's ODE.

Paper: arXiv 2511.13019, one-step and two-step samples in its tables of results.

    python sample.py --ckpt x.pt                                        # grid of 64 images next to the checkpoint
    python sample.py --ckpt x.pt --classes "golden retriever" --num 8   # classes by name or by number
    python sample.py --ckpt x.pt --num 50000 --out samples --npz s.npz  # a folder of PNGs, and a file for fid.py

Image number i is a function of (seed, i) alone: its noise is drawn on the CPU from a generator of its own, and its
class is i modulo the classes asked for, so that labels are balanced. Neither --batch_size nor --device moves a pixel by
more than rounding.
"""
import argparse
import re
from pathlib import Path

import numpy as np
import torch
from torchvision.utils import make_grid
from PIL import Image
from tqdm import tqdm

import meanflow
from dit import DiTDH, infer_config
from rae import Parser, UserError, at_least, load_file, load_rae, load_weights, one_line, pick_device, published_rae, run_main, unpack_rae


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


def to_uint8(images):
    """Images in [0, 1] -> uint8, rounded to nearest: the one rounding rule of this project."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def save_grid(images, path, columns=8):
    """Images uint8 (B, 3, S, S) -> one PNG, `columns` a row."""
    grid = make_grid(images, nrow=columns, padding=2, pad_value=255)   # (3, height, width)
    scale = max(1, 64 // images.shape[-1])                                                      # small pictures are shown larger
    image = Image.fromarray(grid.permute(1, 2, 0).numpy())                                      # (height, width, 3)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path)


def load_network(path):
    """Any checkpoint that holds a DiTDH, ours or published -> (network with EMA weights, content of the file)."""
    content = load_file(path)
    state = load_weights(path, content)
    if "x_embedder.proj.weight" not in state:
        stage = f"of the stage {content['stage']}, which" if isinstance(content.get("stage"), str) else "that"
        raise UserError(f"{path}: a checkpoint {stage} holds no velocity network; give one of flow, mid, distill or bootstrap")
    try:
        model = DiTDH(**infer_config(state))
        model.load_state_dict(state)
    except (RuntimeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a DiTDH in the published layout ({' '.join(str(error).split())[:160]})") from None
    return model.eval().requires_grad_(False), content


def imagenet_names():
    """The 1,000 class names in label order, as timm knows them: 'golden retriever', 'tench, Tinca tinca'."""
    from timm.data import ImageNetInfo
    info = ImageNetInfo()
    return [info.index_to_description(i) for i in range(1000)]


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
        numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if part in lookup:
            chosen.append(lookup[part])
        elif numbers and int(numbers[1]) <= int(numbers[2] or numbers[1]) < len(names):
            chosen += range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1)
        else:
            import difflib
            near = difflib.get_close_matches(part, lookup, n=3)
            raise UserError(f"--classes: no class {part!r} among {len(names)}; " + (f"near it: {', '.join(near)}" if near else
                            f"give numbers below {len(names)} or names such as {names[0]!r}"))
    return chosen


def main():
    parser = Parser(description="Images from a checkpoint of train.py or a published one.", epilog=__doc__.split("\n\n")[2],
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="checkpoint of flow, mid, distill or bootstrap, or published DiTDH weights")
    parser.add_argument("--steps", type=at_least(1), help="evaluations of the network an image (default: student 1, teacher 50)")
    parser.add_argument("--num", type=at_least(1), help="number of images (default 64)", default=64)
    parser.add_argument("--classes", help="names, numbers and ranges, separated by commas (default: all)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="image i is a function of (seed, i) (default 0)")
    parser.add_argument("--out", help="grid PNG of the first 64, or a folder for one PNG an image (default: CKPT with the ending .samples.png)")
    parser.add_argument("--npz", help="also write arr_0 (uint8 N,H,W,3) and arr_1 (labels) here")
    parser.add_argument("--batch_size", type=at_least(1), default=64, help="images at a time (default 64)")
    parser.add_argument("--rae", help="for published weights: our RAE checkpoint or a folder like the hub's (default: the hub)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    args = parser.parse_args()
    args.device = pick_device(args.device)

    model, content = load_network(args.ckpt)
    channels, grid = model.in_channels, model.input_size
    alpha = content.get("alpha") or (channels * grid * grid / 4096) ** 0.5
    if args.rae and Path(args.rae).is_file():
        rae = load_rae(args.rae, with_encoder=False)
    elif args.rae or not content.get("rae"):
        rae = published_rae(16 * grid, args.rae)
    else:
        rae = unpack_rae(content["rae"])
    names = content.get("classes") or imagenet_names()
    classes = parse_classes(args.classes, names) if args.classes else list(range(len(names)))
    steps = args.steps or (1 if model.r_embedder is not None else 50)
    model, rae = model.to(args.device), rae.to(args.device)

    labels = torch.tensor(classes).repeat(-(-args.num // len(classes)))[:args.num]              # (num,)
    out = Path(args.out) if args.out else Path(args.ckpt).with_suffix(".samples.png")
    as_folder = out.suffix.lower() not in (".png", ".jpg")
    try:
        (out if as_folder else out.parent).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({one_line(error)})") from None
    pictures = []
    for first in tqdm(range(0, args.num, args.batch_size), desc=f"{steps} step{'s' * (steps > 1)}", unit="batch"):
        indices = range(first, min(first + args.batch_size, args.num))
        noise = noise_of(args.seed, indices, (channels, grid, grid)).to(args.device)            # (B, C, H, W)
        images = to_uint8(generate(model, rae, noise, labels[indices[0]:indices[-1] + 1].to(args.device), steps, alpha)).cpu()
        if as_folder:
            for i, image in zip(indices, images):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(out / f"{i:06d}_{labels[i]}.png")
        pictures.append(images)
    pictures = torch.cat(pictures)                                                              # (num, 3, S, S)
    if not as_folder:
        save_grid(pictures[:64], out)
    if args.npz:
        np.savez(args.npz, arr_0=pictures.permute(0, 2, 3, 1).numpy(), arr_1=labels.numpy())
    print(f"{args.num} images, {steps} evaluation{'s' * (steps > 1)} each: {out}" + (f", {args.npz}" if args.npz else ""))


if __name__ == "__main__":
    run_main(main)
