"""Train every stage of MeanFlow Transformers with representation autoencoders, with one loop.

Paper: arXiv 2511.13019. The stages, each starting from the checkpoint of the one before it in the folder --out:

    rae        decoder of the representation autoencoder (RAE), whose encoder is frozen; statistics of its latents
    flow       the teacher: velocity by flow matching
    mid        the student: average velocity by Consistency Mid-Training on the teacher's trajectories
    distill    MeanFlow distillation: the MeanFlow identity with the teacher's velocity
    bootstrap  MeanFlow training: the same with the one-point estimate in the teacher's place; optional

    python train.py --toy                                    # all of it on a laptop CPU, on pictures it draws itself
    python train.py --toy --data cifar10/train               # the same on folders of photographs, at 32 x 32
    torchrun --nproc_per_node=8 train.py --stage mid         # ImageNet 256 as in the paper, from the published teacher

Writes OUT/STAGE.pt, its log OUT/STAGE.jsonl and pictures. The same command again resumes.
"""
import argparse
import copy
import fcntl
import json
import math
import os
import shutil
import signal
import sys
import time
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import transforms as T
from torchvision.datasets import ImageFolder
from tqdm import tqdm

import fid
from dit import MODELS, DiTDH, load_file, load_network, student_of
from meanflow import (alpha_of, flow_matching_loss, flow_matching_times, guided, mean_flow_loss, mean_flow_times,
                      mid_training_loss, total_derivative)
from rae import (DECODERS, RAE, Adversary, Decoder, Encoder, PerceptualDistance, ToyAutoencoder, center_crop, load_rae,
                 published, published_rae, read_image, reconstruction_loss)
from sample import class_names, make_images, print0, save_picture, start_processes

# ----------------------------------------------------------------------------------------------------------------------
# What each stage is trained with: a row has all that a stage uses. batch_size is global; of mid it counts trajectories.
# The learning rate rises over the share `warmup` of the steps, and falls to lr_end from the share `decay_from` on.

EPOCH = 1_281_167  # images of ImageNet
PAPER = {  # the paper's, at 256
    "rae": dict(steps=16 * EPOCH // 512, batch_size=512, lr=2e-4, lr_end=2e-5, warmup=1 / 16, decay="cosine",
                clip=math.inf, ema=0.9978, noise=0.8, perceptual=1.0, adversarial=0.75, discriminator_from=6 / 16,
                gan_from=8 / 16),
    "flow": dict(steps=800 * EPOCH // 1024, batch_size=1024, lr=2e-4, lr_end=2e-5, decay_from=40 / 800, ema=0.9995,
                 class_dropout=0.1),
    "mid": dict(steps=27_000, batch_size=8, num_pairs=64, lr=1e-4, ema=0.999, class_dropout=0.1, num_points=17,
                solver="euler", guidance_scale=1.0),
    "distill": dict(steps=180_000, batch_size=256, lr=1e-4, ema=0.9999, class_dropout=0.1, ratio_r_not_equal_t=0.25,
                    adaptive_p=1.0, derivative="jvp", guidance_scale=1.0),
    "bootstrap": dict(steps=10_000, batch_size=256, lr=1e-4, ema=0.9999, class_dropout=0.1, ratio_r_not_equal_t=0.25,
                      adaptive_p=1.0, derivative="jvp"),
}
PAPER_512 = {  # where 512 differs
    "mid": dict(num_pairs=8),
    "distill": dict(steps=20_000, batch_size=128, ema=0.9995),
    "bootstrap": dict(batch_size=128, ema=0.9995),
}
TOY = {  # where the toy differs: 32 x 32 pictures, 16 tokens, minutes of two CPU cores
    "rae": dict(steps=1100, batch_size=64, lr=2e-3, lr_end=0.0, warmup=0.05, decay_from=0.3, decay="linear", ema=0.99,
                noise=1.0, perceptual=0.0, adversarial=0.0),
    "flow": dict(steps=2600, batch_size=64, lr=3e-3, lr_end=2e-4, warmup=0.02, decay_from=0.4, ema=0.995),
    "mid": dict(steps=300, num_pairs=8, lr=1.5e-3, lr_end=2e-4, warmup=0.02, decay_from=0.4, ema=0.99),
    "distill": dict(steps=600, batch_size=64, lr=3e-4, lr_end=5e-5, decay_from=0.5, ema=0.99, adaptive_p=0.0),
    "bootstrap": dict(steps=120, batch_size=64, lr=5e-5, ema=0.99, adaptive_p=0.0),
}
TOY_ALPHA = 2.5     # time shift of the toy, tried out; the paper's rule gives 0.6, and classes are learnt later
FLAGS = dict(       # what is also a flag, and its meaning
    steps="optimiser steps",
    batch_size="samples a step, over all processes; of mid, trajectories",
    lr="peak learning rate",
    perceptual="rae: weight of LPIPS",
    adversarial="rae: weight of the adversarial loss",
    num_points="mid: points of a teacher's trajectory",
    guidance_scale="mid, distill: classifier-free guidance of the teacher; 1: none",
    ratio_r_not_equal_t="distill, bootstrap: share of samples with r < t",
    adaptive_p="distill, bootstrap: 1 is log L, 0 the squared error",
    derivative="distill, bootstrap: du/dt by jvp (exact) or fd (central difference)",
)
STARTS_FROM = {"mid": "flow", "distill": "mid", "bootstrap": "distill"}
NUM_SCORED = 50_000 # samples of a score against --ref


def learning_rate(step, c):
    """Learning rate of a step under the settings c: warm-up, plateau, decay."""
    done, warmup = step / c["steps"], c.get("warmup", 0)
    if done < warmup:
        return c["lr"] * min(1, (step + 1) / (warmup * c["steps"]))
    plateau_end = max(c.get("decay_from", 0), warmup)
    fallen = max(0, done - plateau_end) / (1 - plateau_end)
    if c.get("decay") == "cosine":
        fallen = (1 - math.cos(math.pi * fallen)) / 2
    return c["lr"] + (c.get("lr_end", c["lr"]) - c["lr"]) * fallen


# ----------------------------------------------------------------------------------------------------------------------
# One stage, from top to bottom

def seed_of(*key):
    """The seed of a stream of random numbers that is a function of the key alone."""
    return zlib.crc32(repr(key).encode())


def draw_step(stage, c, step, latent_shape, num_classes, alpha, device):
    """All random numbers of a step, a function of (seed, stage, step): {name: (B, ...)} for the whole global batch B.

    Each process and each micro-batch takes its rows, so their number changes no draw, and nothing random is saved.
    """
    g, B = torch.Generator(device).manual_seed(seed_of(c["seed"], stage, step)), c["batch_size"]
    normal = lambda *shape: torch.randn(*shape, generator=g, device=device)
    uniform = lambda *shape: torch.rand(*shape, generator=g, device=device)
    integer = lambda high, *shape: torch.randint(high, shape, generator=g, device=device)
    noise = normal(B, *latent_shape)                                                            # (B, C, G, G)
    if stage == "rae":
        return dict(noise=noise * c["noise"] * uniform(B, 1, 1, 1), augment=uniform(B, 15))
    draws = dict(noise=noise, dropped=uniform(B) < c["class_dropout"])                          # (B,)
    if stage == "flow":
        draws["t"] = flow_matching_times(normal(B), alpha)                                      # (B,)
    elif stage == "mid":
        draws["pairs"] = integer(c["num_points"] * (c["num_points"] - 1) // 2, B, c["num_pairs"])
        draws["y"] = integer(num_classes, B)                                                    # (B,)
    else:
        count = (torch.arange(B + 1, device=device) * c["ratio_r_not_equal_t"]).floor()         # exact in each batch
        draws["t"], draws["r"] = mean_flow_times(uniform(2, B), count.diff() > 0, alpha)        # 2 x (B,)
    return draws


def train(stage, args, data, stop):
    """Train a stage to its last step, or until there is a signal in the list `stop`. data: of mid None."""
    rank, world, device = args.where
    path, log, c = args.save_to / f"{stage}.pt", args.save_to / f"{stage}.jsonl", settings(stage, args, world)
    state = newest_checkpoint(path, c) or {}                        # empty: the stage has not begun
    step = start = state.get("step", 0)
    picture = lambda: path.with_suffix(f".{step:06d}.png")
    if step >= c["steps"] and "rae" in state and picture().exists():
        return print0(f"{path}: complete, {step} steps")

    # Networks. A random start is a function of (seed, stage).
    torch.manual_seed(seed_of(c["seed"], stage))
    model, rae, teacher, alpha, classes = build(stage, args, c, state, data)
    model.to(device).train().requires_grad_(True)
    model.checkpointing = args.checkpointing
    ema = copy.deepcopy(model).eval().requires_grad_(False)         # average of the weights over many steps
    if stage == "rae":                                              # the RAE that is shown, measured and saved
        rae = RAE(ema.encoder, ema.decoder) if args.toy else RAE(rae.encoder, ema)
    rae, teacher = rae.to(device), teacher and teacher.to(device)
    weights, ema_weights, update_ema = [*model.parameters()], [*ema.parameters()], get_ema_multi_avg_fn(c["ema"])
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=0, fused=True)
    perceptual = PerceptualDistance(args.weights).to(device) if c.get("perceptual") else None
    adversary = Adversary(c["resolution"], args.weights, device) if c.get("adversarial") else None
    parts = dict(model=model, ema=ema, optimizer=optimizer)         # what a checkpoint holds, by name
    if adversary:
        parts |= dict(discriminator=adversary.heads, d_optimizer=adversary.optimizer)
    for name, part in parts.items() if state else ():
        part.load_state_dict(state[name])
    if c["precision"] == "bf16":                                    # frozen networks take half the memory
        for frozen in (teacher, perceptual, adversary and adversary.discriminator.net, not args.toy and rae.encoder):
            for weight in frozen.parameters() if frozen else ():
                weight.data = weight.data.bfloat16()
    autocast = partial(torch.autocast, torch.device(device).type, torch.bfloat16, c["precision"] == "bf16", False)

    # Callables: the derivative goes through the bare network, the losses through DDP and compiled ones.
    student, du_dt = model, lambda z, t, r, y, v: total_derivative(model, z, t, r, y, v, c["derivative"])
    if world > 1:
        student = ddp = DistributedDataParallel(model)
    if args.compile:
        student, du_dt, teacher = torch.compile(student), torch.compile(du_dt), teacher and torch.compile(teacher)
    if c.get("guidance_scale", 1) != 1:
        teacher = guided(teacher, c["guidance_scale"], len(classes))

    # Batches: this process has its rows of each global batch, and takes micro_batch of them at a time.
    local_batch, micro_batch = c["batch_size"] // world, args.micro_batch or c["batch_size"] // world
    rows, share = range(rank * local_batch, (rank + 1) * local_batch, micro_batch), micro_batch / local_batch
    encoded = stage != "rae" and isinstance(data, TensorDataset)    # images in memory: once, before the first step
    if data:
        samples = Samples(data, classes, (c["seed"], stage))
        data.transform = transform(stage, c["resolution"])
        if encoded:
            with autocast():
                z = torch.cat([rae.encode(x.to(device) / 255).cpu() for x in data.tensors[0].split(256)])
            samples.data = TensorDataset(z, data.tensors[1])                                    # (M, C, G, G), (M,)
        first = (s * c["batch_size"] + row for s in range(start, c["steps"]) for row in rows)
        batches = iter(samples.load(args, batch_sampler=(range(n, n + micro_batch) for n in first)))

    # Log and checkpoint
    seconds, skipped, in_a_row = state.get("seconds", 0.0), state.get("skipped", 0), 0
    scorer = fid.Scorer(args.ref, "inception", args.weights, device, rank, world) if args.ref else None
    if args.wandb and rank == 0:
        import wandb
        wandb.init(project="meanflow-rae", name=f"{args.out.name}-{stage}", config=c)
    if rank == 0:                                                   # what was logged after the checkpoint is done again
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        log.write_text("".join(line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= start))

    def write(line):
        if rank == 0:
            with log.open("a") as file:
                file.write(json.dumps(dict(step=step) | line) + "\n")
            if args.wandb:
                wandb.log(line, step=step)

    def save():
        """The file gets its name when it is whole; the one before it stays as STAGE.previous.pt."""
        content = dict(stage=stage, config=c, step=step, seconds=seconds, skipped=skipped, classes=classes, alpha=alpha,
                       network=getattr(model, "config", None))
        content |= {name: part.state_dict() for name, part in parts.items()}
        if stage != "rae" or rae.var is not None:                   # of stage rae: when its statistics are measured
            content["rae"] = rae.packed()
        if rank == 0:
            with path.with_suffix(".tmp").open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                path.replace(path.with_suffix(".previous.pt"))
            path.with_suffix(".tmp").replace(path)

    write(dict(config=c, command=sys.argv, torch=torch.__version__))
    print0(f"{stage}: {sum(w.numel() for w in weights):,} parameters, {c['precision']}, {device}; log: {log}")
    every = 0.5 if sys.stderr.isatty() else 10
    bar = tqdm(total=c["steps"], initial=start, desc=stage, disable=rank > 0, mininterval=every)
    while True:
        # Save, score and draw what the steps so far have made.
        last, ending = step >= c["steps"], torch.tensor(stop[0] if stop else 0)
        if world > 1:
            dist.all_reduce(ending, dist.ReduceOp.MAX)              # a signal that any process has had
        if step > start and (last or ending or step % args.save_every == 0):
            save()
        if ending:
            print0(f"{stage}: {signal.Signals(int(ending)).name}, saved at step {step}; the same command goes on")
            raise SystemExit(128 + int(ending))
        with torch.no_grad(), autocast():
            if last and stage == "rae":
                data.transform = transform("statistics", c["resolution"])
                mine = Samples(data, classes).load(args, batch_size=64, sampler=range(rank, len(data), world))
                rae.measure(rae.encode(x.to(device) / 255) for x, _ in tqdm(mine, "statistics", disable=rank > 0))
                save()
            if (last or step and step % args.sample_every == 0) and not picture().exists():
                if scorer:
                    labels, mine = torch.arange(NUM_SCORED) % len(classes), range(rank, NUM_SCORED, world)
                    made = make_images(ema, rae, alpha, labels, seed=c["seed"], numbers=mine)
                    write(dict(scores=scorer(images for _, images in made)))
                if rank == 0:
                    shown = [samples[n][0] for n in range(32)] if stage == "rae" else None
                    save_picture(ema, rae, alpha, len(classes), picture(), c["seed"], shown)
        if last:
            break

        # One step: draws, and for each micro-batch a loss and its gradient.
        clock, totals = time.perf_counter(), {}
        draws = draw_step(stage, c, step, rae.latent_shape, len(classes), alpha, device)
        use_gan = adversary and step >= c["gan_from"] * c["steps"]
        train_discriminator = adversary and step >= c["discriminator_from"] * c["steps"]
        for row in rows:
            d = {name: values[row:row + micro_batch] for name, values in draws.items()}
            if data:
                x, y = (values.to(device, non_blocking=True) for values in next(batches))
            if stage != "rae":
                y = torch.where(d["dropped"], len(classes), d["y"] if stage == "mid" else y)    # once per sample
            with autocast():
                if data and not encoded:
                    x = x / 255 if stage == "rae" else rae.encode(x / 255)                      # images or latents
                if stage == "flow":
                    loss, metrics = flow_matching_loss(student, x, y, alpha, d["t"], d["noise"])
                elif stage == "mid":
                    loss, metrics = mid_training_loss(student, teacher, d["noise"], y, alpha, c["num_points"],
                                                      pairs=d["pairs"], solver=c["solver"])
                elif stage in ("distill", "bootstrap"):
                    loss, metrics = mean_flow_loss(student, x, y, alpha, teacher, t=d["t"], r=d["r"], noise=d["noise"],
                                                   adaptive_p=c["adaptive_p"], du_dt=du_dt)
                elif args.toy:
                    loss, metrics = student(x, y, d["noise"])
                else:
                    z = rae.encode(x)                                                           # (B, C, G, G)
                    judge = partial(adversary.judge, uniform=d["augment"][:, :5]) if use_gan else None
                    loss, metrics = reconstruction_loss(student(z + d["noise"]), x, perceptual, c["perceptual"],
                                                        judge, c["adversarial"], model.head.weight)
                if train_discriminator:
                    metrics |= adversary.learn(x, model, z, d["augment"][:, 5:], share)
            if world > 1:                                           # gradients are averaged after the last micro-batch
                ddp.require_backward_grad_sync = row == rows[-1]
            (loss * share).backward()
            for name, value in dict(loss=loss.detach(), **metrics).items():
                totals[name] = totals.get(name, 0) + value * share
        totals["grad_norm"] = nn.utils.clip_grad_norm_(weights, c.get("clip", 1.0))
        values = torch.stack([value.float() for value in totals.values()]) / world
        if world > 1:
            dist.all_reduce(values)
        line = dict(zip(totals, values.tolist()), lr=learning_rate(step, c))                    # waits for the GPU

        # A step without a finite loss and gradient changes nothing.
        in_a_row = 0 if all(map(math.isfinite, line.values())) else in_a_row + 1
        if in_a_row == 0:
            optimizer.param_groups[0]["lr"] = line["lr"]
            optimizer.step()
            update_ema(ema_weights, weights, None)
            if train_discriminator:
                adversary.step(learning_rate(step - c["discriminator_from"] * c["steps"], c))
        else:
            skipped += 1
            print0(f"{stage}: step {step + 1} skipped, its loss or gradient is not finite: {line}")
        if in_a_row == 10:
            print0(f"{stage}: no finite gradient in ten steps; go on with a smaller --lr or with --precision fp32")
            raise SystemExit(1)
        for used in (optimizer, adversary.optimizer) if adversary else (optimizer,):
            used.zero_grad()
        step, taken = step + 1, time.perf_counter() - clock
        seconds += taken
        speed = float(f"{c['batch_size'] * c.get('num_pairs', 1) / taken:.3g}")
        if device.startswith("cuda"):
            line["peak_GB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        write(line | dict(images_per_s=speed, skipped=skipped, seconds=round(seconds, 2)))
        bar.set_postfix_str(f"loss {line['loss']:.4g}, grad_norm {line['grad_norm']:.3g}, images/s {speed:g}", False)
        bar.update()
    if world > 1:
        dist.barrier()                                              # the next stage reads what rank 0 has written


# ----------------------------------------------------------------------------------------------------------------------
# What a stage starts from

def settings(stage, args, world=1):
    """The settings of a stage: its row of the tables, the flags that were given, and what else identifies the run."""
    c = PAPER[stage] | (TOY[stage] if args.toy else PAPER_512.get(stage, {}) if args.resolution >= 512 else {})
    c["steps"] *= 4 if args.toy and args.data else 1                # photographs are harder than drawings
    given = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    if args.stage and given.keys() - c.keys():
        raise SystemExit(f"--{min(given.keys() - c.keys())}: stage {stage} has no such setting; it has {', '.join(c)}")
    c |= {name: value for name, value in given.items() if name in c} | (dict(steps=1) if args.dry_run else {})
    sizes = DECODERS if stage == "rae" and not args.toy else MODELS
    if args.model not in sizes:
        raise SystemExit(f"--model {args.model}: of stage {stage} it is one of {', '.join(sizes)}")
    if c["batch_size"] % (world * (args.micro_batch or 1)):
        raise SystemExit(f"--batch_size {c['batch_size']} of {stage}: no multiple of {world} processes x --micro_batch")
    identity = ("toy", "resolution", "model", "seed", "precision", "encoder", "init", "teacher", "rae")
    return c | dict(stage=stage, **{name: getattr(args, name) for name in identity})


def build(stage, args, c, state, data):
    """-> (network to train, RAE, teacher or None, time shift alpha, class names). state: the checkpoint to resume."""
    start, teacher, content, path = None, None, state, args.save_to / f"{stage}.pt"
    classes = data.classes if data else class_names()
    if stage == "rae" and args.toy:
        return ToyAutoencoder(32, len(classes)), None, None, None, classes
    if stage == "rae":
        encoder = Encoder(args.encoder, args.resolution, weights=args.weights).eval().requires_grad_(False)
        channels, grid = encoder.config["channels"], encoder.grid
        decoder = Decoder(channels, grid, args.resolution // grid, **DECODERS[c["model"]])
        return decoder, RAE(encoder, decoder), None, None, classes

    if "guidance_scale" in c:                       # the teacher: given, or the one in OUT, or the published one
        teacher_path = args.teacher or args.out / "flow.pt"
        if not args.teacher and not args.toy and not teacher_path.exists():
            teacher_path = published("teacher", args.resolution, args.weights)
        teacher, teacher_content = load_network(teacher_path)
        if teacher.average_velocity:
            raise SystemExit(f"--teacher {teacher_path}: has an average velocity; give a checkpoint of stage flow")

    if state:                                       # the start: where the stage was, or the stage before, or random
        start = DiTDH(**state["network"])
    elif stage == "mid" and not args.init:
        start, content, path = student_of(teacher), teacher_content, teacher_path
    elif args.init != "none" and (args.init or stage in STARTS_FROM):
        path = args.init or args.out / f"{STARTS_FROM[stage]}.pt"
        start, content = load_network(path)
        if stage != "flow" and not start.average_velocity:
            start = student_of(start)               # without mid-training: a baseline that explodes

    if "rae" in content and (state or not args.rae):    # the RAE: in whose latents it was trained, or given, or ...
        rae = load_rae(path, content["rae"])
    elif args.rae or args.toy or (args.out / "rae.pt").exists():
        rae = load_rae(args.rae or args.out / "rae.pt")
    else:
        rae = published_rae(args.resolution, args.weights)
    if stage != "mid":
        rae.fetch_encoder(args.weights)

    (channels, grid, _), classes = rae.latent_shape, content.get("classes") or classes
    if start is None:
        start = DiTDH(grid, channels, num_classes=len(classes), average_velocity=stage != "flow", **MODELS[c["model"]])
        if args.toy:                                # the published 0.02 learns classes too slowly for minutes
            nn.init.normal_(start.y_embedder.embedding_table.weight, std=1.0)
    return start, rae, teacher, content.get("alpha") or (TOY_ALPHA if args.toy else alpha_of(channels, grid)), classes


# ----------------------------------------------------------------------------------------------------------------------
# What a stage goes on from

def newest_checkpoint(path, c):
    """Content of a stage's checkpoint or, where it is damaged, of the one before it. None: the stage has not begun."""
    files = [file for file in (path, path.with_suffix(".previous.pt")) if file.exists()]
    for file in files:
        try:
            with zipfile.ZipFile(file) as archive:
                if archive.testzip():
                    raise zipfile.BadZipFile("a checksum is wrong")
            state = load_file(file)
        except (zipfile.BadZipFile, RuntimeError) as error:
            print0(f"{file}: damaged ({error})")
            continue
        was = state["config"]
        changed = [name for name in c if was.get(name, c[name]) != c[name] and name not in ("steps", "lr", "lr_end")]
        for name in changed:
            raise SystemExit(f"{file}: made with {name} {was[name]}, not {c[name]}; give the same, or another --out")
        return state
    if files:
        raise SystemExit(f"{path}: no whole checkpoint to go on from; to start the stage anew, move it away")


# ----------------------------------------------------------------------------------------------------------------------
# Data

class Samples(Dataset):
    """Item n is sample n = step * batch_size + row of a stage: x and the label that its class has in the network.

    Which image it is, and what the folder's transforms draw, are functions of (key, n). Without a key it is image n.
    """

    def __init__(self, data, classes, key=None):
        self.data, self.key, self.epoch, self.unreadable = data, key, None, set()
        unknown = [name for name in data.classes if name not in classes]
        if unknown:
            raise SystemExit(f"--data: {unknown[0]!r} is no class of the network; give images of its {len(classes)}")
        self.labels = [classes.index(name) for name in data.classes]

    def __getitem__(self, n):
        i = n
        if self.key:
            epoch, i = divmod(n, len(self.data))
            if epoch != self.epoch:
                g = torch.Generator().manual_seed(seed_of(self.key, "epoch", epoch))
                self.epoch, self.order = epoch, torch.randperm(len(self.data), generator=g).tolist()
            i = self.order[i]
            torch.manual_seed(seed_of(self.key, n))
        while True:
            try:
                x, label = self.data[i]
                return x, self.labels[label]
            except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:  # PIL's
                self.unreadable.add(i)
                tqdm.write(f"{self.data.samples[i][0]}: {error}; the next image stands in for it", file=sys.stderr)
                if len(self.unreadable) > len(self.data) / 1000:
                    raise OSError("--data: over 1 in 1,000 images cannot be read; remove those named above") from None
                i = (i + 1) % len(self.data)

    def load(self, args, **how):
        workers, pinned = 0 if isinstance(self.data, TensorDataset) else args.workers, torch.cuda.is_available()
        return DataLoader(self, num_workers=workers, worker_init_fn=set_up_worker, pin_memory=pinned, **how)


def transform(stage, size):
    """PIL image -> uint8 (3, size, size): random crops in stage rae, flips after it, neither for statistics."""
    if stage == "rae":
        return T.Compose([T.Resize(size * 3 // 2, T.InterpolationMode.BICUBIC), T.RandomCrop(size), T.PILToTensor()])
    flip = [T.RandomHorizontalFlip()] if stage != "statistics" else []
    return T.Compose([partial(center_crop, size=size), *flip, T.PILToTensor()])


def set_up_worker(worker):
    """Ctrl-C and SIGUSR1 are for the process that trains; SIGTERM is how it ends its workers."""
    for name, action in (("SIGINT", signal.SIG_IGN), ("SIGUSR1", signal.SIG_IGN), ("SIGTERM", signal.SIG_DFL)):
        signal.signal(getattr(signal, name), action)


def load_data(args):
    """-> (images to train on, images that no stage sees; of ImageNet None)."""
    if not args.data:
        numbers, classes = (300, 300) if args.dry_run else (20_000, 2_000), TOY_CLASSES
        drawn = [make_toy_images(num, seed) for num, seed in zip(numbers, (args.seed, 1_000_001))]
        split = [(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y)) for x, y in drawn]
    else:
        try:
            folder = ImageFolder(args.data, loader=read_image, transform=transform("statistics", 32))
        except FileNotFoundError as error:
            raise SystemExit(f"--data {args.data}: {error}; give a folder that holds a folder of images per class")
        classes = folder.classes = class_names(folder.classes)                                  # n01440764: tench
        if not args.toy:
            return folder, None
        samples, split = Samples(folder, classes), (([], []), ([], []))
        for i, (path, _) in enumerate(tqdm(folder.samples, "read", disable=args.where[0] > 0)):
            x, label = samples[i]
            hidden = zlib.crc32(os.fsencode(os.path.relpath(path, args.data))) % 10 == 0        # by its name alone
            for image in (x,) if hidden else (x, x.flip(2)):                                    # and its mirror image
                split[hidden][0].append(image)
                split[hidden][1].append(label)
        split = [(torch.stack(images), torch.tensor(labels)) for images, labels in split]
    data = [TensorDataset(images, labels) for images, labels in split]                          # (M, 3, 32, 32), (M,)
    data[0].classes = data[1].classes = classes
    return data


TOY_CLASSES = ("ball", "ring", "square", "triangle", "star", "heart", "moon", "plus", "arrow", "fish")


def make_toy_images(num, seed):
    """Draw ten shapes in turn -> uint8 (num, 32, 32, 3), labels int64 (num,). Picture i is a function of (seed, i)."""
    turn = np.linspace(0, 2 * np.pi, 60, endpoint=False)            # outlines are complex: x + i y, y points down
    disc, tenth = np.exp(1j * turn), -1j * np.exp(1j * np.arange(10) * np.pi / 5)
    star = np.where(np.arange(10) % 2, 0.42, 1.1) * tenth
    down = -13 * np.cos(turn) + 5 * np.cos(2 * turn) + 2 * np.cos(3 * turn) + np.cos(4 * turn)
    heart = np.sin(turn) ** 3 + down / 16 * 1j
    box = lambda x, y: np.array([-x - y * 1j, x - y * 1j, x + y * 1j, -x + y * 1j])
    arrow = np.array([-1 - .28j, .1 - .28j, .1 - .8j, 1, .1 + .8j, .1 + .28j, -1 + .28j])
    body, tail, eye = disc.real * 0.75 + disc.imag * 0.55j + 0.25, [-.3, -1 - .6j, -1 + .6j], disc * 0.13 + 0.6 - 0.15j
    shapes = [  # of TOY_CLASSES, in a frame of side 2: outlines to fill (True) and to cut out (False)
        [(True, disc)], [(True, disc), (False, 0.55 * disc)], [(True, 0.85 * box(1, 1))],
        [(True, [-1j, 1 + 0.8j, -1 + 0.8j])], [(True, star)], [(True, heart)],
        [(True, disc), (False, 0.85 * disc + 0.45 - 0.1j)], [(True, box(0.3, 1)), (True, box(1, 0.3))], [(True, arrow)],
        [(True, body), (True, tail), (False, eye)]]
    images, labels = np.empty((num, 32, 32, 3), np.uint8), np.arange(num) % 10
    for i in range(num):
        rng = np.random.default_rng((seed, i))
        angle, size = rng.uniform(-0.3, 0.3), rng.uniform(10, 13)                               # radians, pixels
        place = 16 + 16j + rng.uniform(-1, 1, 2) @ (1, 1j) * (15 - size)
        mask = Image.new("L", (128, 128))
        for fill, outline in shapes[labels[i]]:
            points = 4 * (np.array(outline) * size * np.exp(1j * angle) + place)
            ImageDraw.Draw(mask).polygon([(p.real, p.imag) for p in points], fill=255 * fill)
        mask = np.asarray(mask.resize((32, 32), Image.Resampling.BOX), np.float32)[..., None] / 255
        hue, other, dark = rng.uniform(), rng.uniform(), i // 10 % 2
        colour = lambda h, light: light * (0.62 + 0.38 * np.cos(2 * np.pi * (h + np.array([0, 1 / 3, 2 / 3]))))
        back = colour(other, rng.uniform(0.15, 0.45)) if dark else 1 - colour(other, rng.uniform(0.1, 0.35))
        front = colour(hue, rng.uniform(0.85, 1)) if dark else colour(hue, rng.uniform(0.45, 0.75))
        images[i] = np.round(255 * np.clip(back + mask * (front - back), 0, 1))                 # (32, 32, 3)
    return images, labels


# ----------------------------------------------------------------------------------------------------------------------
# Command line

def parse_arguments():
    title, _, stages, examples, writes = __doc__.strip().split("\n\n")
    parser = argparse.ArgumentParser(usage="train.py --stage STAGE or --toy, and flags; see --help",
                                     description=f"{title}\n\n{stages}", epilog=f"{examples}\n\n{writes}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, file = parser.add_argument, dict(type=os.path.normpath, metavar="CKPT")
    add("--stage", choices=PAPER, help="one stage (default with --toy: all of them in turn, then a report)")
    add("--toy", action="store_true", help="small networks, 32 x 32 images, a CPU")
    add("--resolution", type=int, default=256, choices=range(32, 2049, 16), metavar="N", help="of images (default 256)")
    add("--data", type=os.path.normpath, metavar="DIR", help="folder of one folder per class (of the toy: optional)")
    add("--model", help="size: S, B, XL, of the decoder also L (default XL; with --toy: toy)")
    add("--out", metavar="DIR", type=Path, help="folder of the checkpoints (default out/toy, out/photographs, out/256)")
    add("--init", **file, help="checkpoint to start the network from, or none: random weights")
    add("--teacher", **file, help="checkpoint of the velocity network, ours or published")
    add("--rae", **file, help="checkpoint with the RAE (default: that of the start)")
    add("--encoder", metavar="NAME", help="stage rae: a vision transformer of timm (default DINOv2-B)")
    add("--weights", metavar="DIR", help="folder laid out like the hub, or random for trials (default: the hub)")
    for name, meaning in FLAGS.items():
        kind = next(type(row[name]) for row in PAPER.values() if name in row)
        add(f"--{name}", metavar=kind.__name__.upper(), type=kind, help=f"{meaning} (default: the tables' row)")
    add("--micro_batch", metavar="N", type=int, help="samples at a time on a process; gradients add up (default: all)")
    add("--checkpointing", action="store_true", help="keep no activations inside blocks: less memory, more time")
    add("--precision", choices=("fp32", "bf16"), help="bf16: autocast (default fp32; the toy on a CPU with bf16: bf16)")
    add("--compile", action="store_true", help="torch.compile the networks and the derivative")
    add("--seed", type=int, default=0, help="of all random draws (default 0)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--workers", type=int, default=8, help="processes that read files, on each rank (default 8)")
    add("--save_every", metavar="N", type=int, help="steps between checkpoints (default 2500; with --toy 500)")
    add("--sample_every", metavar="N", type=int, help="steps between pictures and scores (default: as --save_every)")
    add("--ref", type=os.path.normpath, metavar="PATH", help="also score 50,000 samples against it, as fid.py does")
    add("--wandb", action="store_true", help="also log to Weights & Biases")
    add("--report", nargs="+", **file, help="with --toy: no training, a report on checkpoints")
    add("--dry_run", action="store_true", help="one step of everything, written to OUT/dry_run and deleted")
    args = parser.parse_args()
    args.stages = [args.stage] if args.stage else [*PAPER] if args.toy else parser.error("give --stage, or --toy")
    latent = ("flow", "mid", "distill", "bootstrap")
    for flag, users in dict(init=latent, rae=latent, teacher=("mid", "distill"), encoder=("rae",)).items():
        if getattr(args, flag) and args.stage not in users:
            parser.error(f"--{flag} belongs to --stage {' or '.join(users)}")
    for flag in ("data", "init", "teacher", "rae", "ref", "report"):
        missing = [p for p in np.atleast_1d(getattr(args, flag) or "none") if p != "none" and not os.path.exists(p)]
        if missing:
            parser.error(f"--{flag} {missing[0]}: no such file or folder")
    if not args.toy and not args.data and args.stage != "mid":
        parser.error(f"--stage {args.stage} needs images: give --data DIR with a folder of images per class")
    args.out = args.out or Path("out", ("photographs" if args.data else "toy") if args.toy else str(args.resolution))
    args.model = args.model or ("toy" if args.toy else "XL")
    args.save_every = args.save_every or (500 if args.toy else 2500)
    args.sample_every = args.sample_every or args.save_every
    return args


def main():
    args = parse_arguments()
    rank, world, device = args.where = start_processes(args.device)
    if device == "cpu":
        torch.backends.cuda.enable_flash_sdp(False)                 # despite its name also the CPU's, which is slow
    fast = device == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    args.precision = args.precision or ("bf16" if args.toy and fast else "fp32")
    torch.set_float32_matmul_precision("high")                      # TF32 on CUDA
    _ = [settings(stage, args, world) for stage in args.stages]     # refuses before any work
    args.save_to = args.out / "dry_run" if args.dry_run else args.out
    args.out = args.save_to if not args.stage else args.out
    args.save_to.mkdir(parents=True, exist_ok=True)
    lock = open(args.save_to / "lock", "w")                         # it goes with the process
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB) if rank == 0 else None
    except BlockingIOError:
        raise SystemExit(f"--out {args.save_to}: another run is writing there; wait for it, or give another folder")
    data, held_out = load_data(args) if args.stages != ["mid"] or args.report else (None, None)
    reporting = args.toy and (args.report or not args.stage)
    if reporting and len(held_out) <= 256:
        raise SystemExit(f"--data {args.data}: the report needs over 2,570 images and hides a tenth; give more")

    stop = []                                                       # signals: the run ends after the step
    def on_signal(number, frame):
        stop.append(number)
        if world == 1:                                              # a second one ends it at once
            signal.signal(number, signal.SIG_DFL)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        signal.signal(getattr(signal, name), on_signal)
    for stage in () if args.report else args.stages:
        train(stage, args, None if stage == "mid" else data, stop)
    if world > 1:
        dist.destroy_process_group()                                # the report is made by one process
    if reporting and rank == 0:
        paths = [Path(path) for path in args.report or (args.save_to / f"{stage}.pt" for stage in args.stages[1:])]
        fid.report(paths, data, held_out, args.save_to, device, small=args.dry_run)
    if args.dry_run and rank == 0:
        shutil.rmtree(args.save_to)


if __name__ == "__main__":
    main()
