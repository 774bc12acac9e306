"""Train every stage of MeanFlow Transformers with representation autoencoders, with one loop.

Paper: arXiv 2511.13019. The stages, and what each starts from, in the folder --out:

    rae        decoder of the representation autoencoder (RAE), whose encoder is frozen
    flow       the teacher: a velocity network, from random weights, in the latents of rae
    mid        the student: average velocity by Consistency Mid-Training, from flow
    distill    MeanFlow distillation, from mid
    bootstrap  MeanFlow training without a teacher, from distill
    drift      beyond the paper, from flow: one-step samples drift towards the data

    python train.py --toy                                  # all of it on a CPU, on drawn pictures
    torchrun --nproc_per_node=8 train.py --stage mid       # ImageNet, from the published teacher

Every stage but rae is one regression: `draw` makes the random numbers of a row, `target` says at
which inputs the network is evaluated and what its output should be, and train() does the rest.
A stage writes OUT/STAGE.pt, its log OUT/STAGE.jsonl and pictures. The same command again resumes.
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
import zlib
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import is_image_file
from torchvision.transforms import functional as TF
from tqdm import tqdm

import fid
import meanflow
from dit import (MODELS, DamagedFile, DiTDH, fingerprint, load_file, load_network, state_dict_of,
                 student_of)
from meanflow import (alpha_of, drift_target, flow_matching_times, guided, interpolate,
                      mean_flow_target, mean_flow_times, mid_training_target, regression_loss)
from rae import (DECODERS, RAE, Adversary, Decoder, Encoder, PerceptualDistance, ToyAutoencoder,
                 center_crop, load_rae, published, published_rae, read_image, reconstruction_loss)
from sample import (class_names, computing, default_precision, device_name, draw_grid, labels_for,
                    make_images, number, print0, start_processes, write_whole)

# --------------------------------------------------------------------------------------------------
# Settings. A row is a stage. "paper" is the paper's recipe, "best" what --recipe best changes, and
# the columns 512 and toy hold what differs from 256. batch_size is global; it counts trajectories
# in mid and classes in drift. The learning rate rises over the share `warmup` of the steps, stays,
# and falls to lr_end from the share `decay_from` on. Omitted keys: clip=1, warmup=0, lr_end=lr.
TABLE = {
    "paper 256": {
        "rae": dict(  # 16 epochs of ImageNet
            steps=40_036, batch_size=512, lr=2e-4, lr_end=2e-5, warmup=1 / 16, decay="cosine",
            clip=None, ema=0.9978, noise=0.8, perceptual=1.0, adversarial=0.75,
            discriminator_from=6 / 16, gan_from=0.5),
        "flow": dict(  # 800 epochs
            steps=1_000_911, batch_size=1024, lr=2e-4, lr_end=2e-5, decay_from=40 / 800,
            ema=0.9995, class_dropout=0.1, flip=0.5),
        "mid": dict(
            steps=27_000, batch_size=8, num_pairs=64, num_points=17, solver="euler", lr=1e-4,
            ema=0.999, class_dropout=0.1, guidance_scale=1.0, guidance_model="none"),
        "distill": dict(
            steps=180_000, batch_size=256, lr=1e-4, ema=0.9999, class_dropout=0.1, flip=0.5,
            ratio_r_not_equal_t=0.25, ratio_r_is_0=0.0, adaptive_p=1.0, derivative="jvp",
            guidance_scale=1.0, guidance_model="none"),
        "bootstrap": dict(
            steps=10_000, batch_size=256, lr=1e-4, ema=0.9999, class_dropout=0.1, flip=0.5,
            ratio_r_not_equal_t=0.25, ratio_r_is_0=0.0, adaptive_p=1.0, derivative="jvp"),
        "drift": dict(  # arXiv 2606.15553, version 1; not tried at this size by us
            steps=10_000, batch_size=32, samples=256, num_moved=64, lr=3e-5, lr_end=3e-7,
            ema=0.9995, ema_start=0.5, class_dropout=0.0, flip=0.5, reencode=False,
            temperature=(0.02, 0.05, 0.2), per_token=True),
    },
    "paper 512": {
        "flow": dict(  # 400 epochs on the slope of 800, as the published teacher
            steps=500_456, lr_end=1.147e-4, decay_from=40 / 400),
        "mid": dict(num_pairs=8),
        "distill": dict(steps=20_000, batch_size=128, ema=0.9995),
        "bootstrap": dict(batch_size=128, ema=0.9995),
    },
    "paper toy": {  # 32 x 32 pictures, 16 tokens, minutes on two CPU cores
        "rae": dict(
            steps=1100, batch_size=64, lr=2e-3, lr_end=0.0, warmup=0.05, decay_from=0.3,
            decay="linear", ema=0.99, noise=1.0, perceptual=0.0, adversarial=0.0),
        "flow": dict(
            steps=2600, batch_size=64, lr=3e-3, lr_end=2e-4, warmup=0.02, decay_from=0.4,
            ema=0.995),
        "mid": dict(
            steps=300, num_pairs=8, lr=1.5e-3, lr_end=2e-4, warmup=0.02, decay_from=0.4, ema=0.99),
        "distill": dict(
            steps=600, batch_size=64, lr=3e-4, lr_end=5e-5, decay_from=0.5, ema=0.99,
            adaptive_p=0.0),
        "bootstrap": dict(steps=120, batch_size=64, lr=5e-5, ema=0.99, adaptive_p=0.0),
        "drift": dict(
            steps=180, batch_size=10, samples=192, num_moved=24, lr=1e-3, lr_end=1e-5, ema=0.98,
            temperature=0.05, per_token=False),
    },
    "best 256": dict.fromkeys(("mid", "distill"),
                              dict(guidance_model="published", guidance_scale=1.42)),
    "best 512": dict.fromkeys(("mid", "distill"),
                              dict(guidance_model="published", guidance_scale=1.5)),
    "best toy": {
        "mid": dict(guidance_scale=2.0),
        "distill": dict(guidance_scale=2.0),
        "drift": dict(reencode=True),
    },
}
RECIPES = dict(paper=("rae", "flow", "mid", "distill", "bootstrap"),
               best=("rae", "flow", "mid", "drift"))
FREE = ("steps", "lr", "lr_end")  # settings that may change when a stage is resumed
TOY_ALPHA = 2.5  # tried out; with 0.6, by the paper's rule, the toy learns the classes more slowly
NUM_SCORED = 50_000  # samples of a score against --ref


def settings(stage, args, world=1):
    """The settings of a stage: its row of the table, the flags given, and the run's identity."""
    size = "toy" if args.toy else "512" if args.resolution >= 512 else "256"
    c = dict(TABLE["paper 256"][stage])
    for column in (f"paper {size}", f"{args.recipe} {size}"):
        c |= TABLE[column].get(stage, {})
    if args.toy and args.data:                  # photographs are harder, and their RAE loses more
        c["steps"] *= 4
        if "reencode" in c:
            c["reencode"] = False

    given = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    unknown = sorted(given.keys() - c.keys())
    if args.stage and unknown:
        raise SystemExit(f"--{unknown[0]}: no setting of stage {stage}, which has {', '.join(c)}")
    c |= {name: value for name, value in given.items() if name in c}
    if args.guidance_model and c.get("guidance_scale") == 1:
        raise SystemExit("--guidance_model: has no effect at scale 1; give --guidance_scale")
    if c["batch_size"] % world:
        raise SystemExit(f"--batch_size {c['batch_size']} of {stage}: is not divided by {world} "
                         "processes; give a multiple of their number")

    identity = ("toy", "resolution", "seed", "precision", "encoder")
    c |= {name: getattr(args, name) for name in identity}
    model = args.model or ("toy" if args.toy else "XL")
    return c | {"stage": stage, "model": model, "random_weights": args.weights == "random"}


def learning_rate(step, c):
    """Learning rate of a step under the settings c: warm-up, plateau, decay."""
    done = step / c["steps"]
    warmup = c.get("warmup", 0)
    if done < warmup:
        return c["lr"] * min(1, (step + 1) / (warmup * c["steps"]))

    plateau_end = max(c.get("decay_from", 0), warmup)
    decayed = max(0, done - plateau_end) / (1 - plateau_end)
    if c.get("decay") == "cosine":
        decayed = (1 - math.cos(math.pi * decayed)) / 2
    return c["lr"] + (c.get("lr_end", c["lr"]) - c["lr"]) * decayed


def ema_decay(step, c):
    """The EMA's decay rises to its final value, so that the average soon forgets the start."""
    if "ema_start" in c:                        # of drift's source: from .5 up in 1,000 steps
        rising = c["ema_start"] * (c["ema"] / c["ema_start"]) ** (step / 1000)
    else:
        rising = (1 + step) / (10 + step)
    return min(c["ema"], rising)


# --------------------------------------------------------------------------------------------------
# The stages. `draw` makes the random numbers of row n, a function of (seed, stage, n) alone;
# `target` turns those of all rows of this process into the network's inputs and its target,
# without a gradient. Latents x are (B, C, G, G); of drift (B, M, C, G, G), M images of each row's
# class.

def seed_of(*key):
    """The seed of a stream of random numbers that is a function of the key alone."""
    return zlib.crc32(repr(key).encode())


def draw_rae(run, n):
    noise = torch.randn(run.rae.latent_shape) * torch.rand(()) * run.c["noise"]     # (C, G, G)
    return {"noise": noise, "augment": torch.rand(15)}                          # see rae_gradients


def draw_flow(run, n):
    return {"noise": torch.randn(run.rae.latent_shape), "normal": torch.randn(())}


def flow_target(run, x, y, draws):
    t = flow_matching_times(draws["normal"], run.alpha)                         # (B,)
    z = interpolate(x, draws["noise"], t)
    return (z, t, y), draws["noise"] - x


def draw_mid(run, n):
    num_points = run.c["num_points"]
    pairs = torch.randint(num_points * (num_points - 1) // 2, (run.c["num_pairs"],))
    label = torch.randint(len(run.classes), ())
    return {"noise": torch.randn(run.rae.latent_shape), "pairs": pairs, "y": label}


def mid_target(run, x, y, draws):
    return mid_training_target(run.teacher, draws["noise"], y, run.alpha, run.c["num_points"],
                               pairs=draws["pairs"], solver=run.c["solver"])


def draw_mean_flow(run, n):
    ratio = run.c["ratio_r_not_equal_t"]        # deterministic: at 0.25, every fourth row has r < t
    return {"noise": torch.randn(run.rae.latent_shape),
            "uniform": torch.rand(2),
            "jumps": torch.full((), int((n + 1) * ratio) > int(n * ratio)),
            "jumps_to_data": torch.rand(()) < run.c["ratio_r_is_0"]}


def noised(run, x, draws):
    """-> (z, t, r) of distill and bootstrap: latents between x and noise, and two times."""
    t, r = mean_flow_times(draws["uniform"], run.alpha, draws["jumps"], draws["jumps_to_data"])
    return interpolate(x, draws["noise"], t), t, r


def distill_target(run, x, y, draws):
    z, t, r = noised(run, x, draws)
    v = run.teacher(z, t, y)                                                    # (B, C, G, G)
    return (z, t, y, r), mean_flow_target(run.student, z, t, r, y, v, run.c["derivative"])


def bootstrap_target(run, x, y, draws):
    z, t, r = noised(run, x, draws)
    v = draws["noise"] - x                                                      # (B, C, G, G)
    return (z, t, y, r), mean_flow_target(run.student, z, t, r, y, v, run.c["derivative"])


def draw_drift(run, n):
    shape = run.c["samples"], *run.rae.latent_shape                             # (M, C, G, G)
    draws = {"noise": torch.randn(shape)}
    if run.c["per_token"]:                      # directions of a random, Laplacian length
        direction = F.normalize(torch.randn(shape), dim=1)
        draws["jitter"] = direction * torch.empty(shape[0], 1, *shape[2:]).exponential_()
    return draws


def drift_inputs_and_target(run, x, y, draws):
    reencode = run.reencode if run.c["reencode"] else None
    return drift_target(run.student, x, y, draws["noise"], run.c["num_moved"], reencode,
                        run.c["temperature"], run.c["per_token"], draws.get("jitter"))


class Stage(NamedTuple):
    """What the loop has to know about a stage."""
    draw: callable                              # (run, n) -> the random numbers of row n
    target: callable                            # (run, x, y, draws) -> inputs, target
    starts_from: str = None                     # the stage whose weights it takes
    needs_images: bool = True
    needs_teacher: bool = False
    average_velocity: bool = True               # False: it trains a velocity, a teacher


STAGES = {
    "rae": Stage(draw_rae, None),
    "flow": Stage(draw_flow, flow_target, average_velocity=False),
    "mid": Stage(draw_mid, mid_target, "flow", needs_images=False, needs_teacher=True),
    "distill": Stage(draw_mean_flow, distill_target, "mid", needs_teacher=True),
    "bootstrap": Stage(draw_mean_flow, bootstrap_target, "distill"),
    "drift": Stage(draw_drift, drift_inputs_and_target, "flow"),
}


def draw_rows(run, step):
    """The random numbers of this process's rows of a step: {name: (B, ...)}."""
    generator = torch.default_generator         # a hundred times faster than torch.manual_seed
    if run.device.startswith("cuda"):
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
    rows = []
    with torch.device(run.device):              # where the numbers are made
        for n in run.row_numbers(step):
            generator.manual_seed(seed_of(run.c["seed"], run.stage, n))
            row = STAGES[run.stage].draw(run, n)
            row["dropped"] = torch.rand(()) < run.c.get("class_dropout", 0)
            rows.append(row)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def in_parts(network, rows):
    """The same function of a batch, evaluated `rows` rows at a time.

    Targets are made of the whole batch, and their memory must not grow with it.
    """
    def evaluate(*inputs):
        parts = zip(*[values.split(rows) for values in inputs])
        return torch.cat([network(*part) for part in parts])
    return evaluate


# --------------------------------------------------------------------------------------------------
# One stage, from top to bottom

def train(stage, args, c, data, stop, place):
    """Train a stage with the settings c to its last step, or until a signal is in the list `stop`.

    data: the images to train on, or None in a stage that needs none.
    """
    run = Run(stage, args, c, data, place)
    if run.is_complete():
        return print0(f"{run.path}: complete, {run.step} steps")
    run.build(data)
    batches = run.load(data) if data else None
    scorer = fid.Scorer(args.ref, weights=args.weights, place=place) if args.ref else None
    start = run.step
    bar = tqdm(total=c["steps"], initial=start, desc=stage, disable=place.rank > 0, mininterval=2)

    while True:
        # Save, score and draw what the steps so far have made. The picture comes last: a log that
        # names it says that all of this was done.
        done = run.step >= c["steps"]
        signal_number = agreed_signal(stop, place)
        due = done or (run.step > 0 and run.step % args.sample_every == 0)
        if run.step > start and (done or signal_number or run.step % args.save_every == 0):
            run.save()
        if signal_number:
            batches = None                      # ends the workers that read files
            name = signal.Signals(signal_number).name
            print0(f"{stage}: {name}, stopped at step {run.step}; run the same command to resume")
            raise SystemExit(128 + signal_number)
        if done and stage == "rae":
            run.measure_statistics(data)
        if due and not run.is_shown():
            if scorer:
                run.score(scorer)
            run.draw_picture(data)
        if done:
            break

        # The batch of this process, and its random numbers.
        clock = time.perf_counter()
        draws = draw_rows(run, run.step)
        x, y = next(batches) if data else (None, draws["y"])

        if stage == "rae":                      # the one stage that is no regression
            sums = rae_gradients(run, x, y, draws)
        else:
            # Inputs and target of the whole batch. Labels are dropped once per row.
            y = torch.where(draws["dropped"], len(run.classes), y.to(run.device))
            with torch.no_grad(), run.autocast():
                x = run.latents(x) if data else None
                inputs, target = STAGES[stage].target(run, x, y, draws)

            # The gradient, a micro-batch at a time.
            sums = {}
            for rows, share in run.micro_batches(len(target)):
                with run.autocast():
                    prediction = run.net(*[values[rows] for values in inputs])
                    loss, mse = regression_loss(prediction, target[rows], c.get("adaptive_p", 0))
                (loss * share).backward()
                add(sums, {"loss": loss, "mse": mse}, share)

        clip = c.get("clip", 1) or math.inf
        sums["grad_norm"] = torch.nn.utils.clip_grad_norm_(run.params, clip)
        line = average(sums, place)             # waits for the GPU

        # A step whose loss, gradient or another value is not finite changes nothing.
        line["lr"] = learning_rate(run.step, c)
        if all(math.isfinite(value) for value in line.values()):
            run.optimizer.param_groups[0]["lr"] = line["lr"]
            run.optimizer.step()
            update_ema = get_ema_multi_avg_fn(ema_decay(run.step, c))
            update_ema(run.ema_params, run.params, None)
            if run.trains_discriminator():
                run.adversary.step(learning_rate(run.step - run.discriminator_from, c))
            run.skipped_in_a_row = 0
        else:
            run.skip(line)
        for optimizer in run.optimizers:
            optimizer.zero_grad()

        run.step += 1
        seconds = time.perf_counter() - clock
        run.seconds += seconds
        speed = (len(x) if stage == "rae" else len(target)) * place.world / seconds
        peak = torch.cuda.max_memory_allocated() / 2**30
        run.write(line | {"images_per_s": round(speed, 2), "skipped": run.skipped,
                          "seconds": round(run.seconds, 2), "peak_GiB": round(peak, 2)})
        bar.set_postfix_str(f"loss {line['loss']:.4g}, grad_norm {line['grad_norm']:.3g}, "
                            f"images/s {speed:.3g}", refresh=False)
        bar.update()


def rae_gradients(run, images, labels, draws):
    """Gradients of stage rae for the batch of this process -> sums for the log.

    L1 + LPIPS + GAN of images decoded from latents under noise, micro-batch by micro-batch; and the
    discriminator's hinge loss. The published code shows the discriminator the decoder after its
    step; here it sees the one before it, which saves a pass.
    """
    c = run.c
    sums = {}
    use_gan = run.adversary and run.step >= int(c["gan_from"] * c["steps"])
    for rows, share in run.micro_batches(len(images)):
        x = images[rows].to(run.device) / 255                                   # (B, 3, S, S)
        noise = draws["noise"][rows]                                            # (B, C, G, G)
        augment = draws["augment"][rows]                                        # (B, 15)
        with run.autocast():
            if run.args.toy:
                loss, metrics = run.net(x, labels[rows].to(run.device), noise)
            else:
                z = run.rae.encode(x)                                           # (B, C, G, G)
                judge = partial(run.adversary.judge, uniform=augment[:, :5]) if use_gan else None
                loss, metrics = reconstruction_loss(
                    run.net(z + noise), x, run.perceptual, c["perceptual"], judge,
                    c["adversarial"], run.model.head.weight)
                if run.trains_discriminator():
                    with torch.no_grad():
                        clean = run.model(z)                                    # (B, 3, S, S)
                    metrics |= run.adversary.learn(x, clean, augment[:, 5:], share)
        (loss * share).backward()
        add(sums, {"loss": loss} | metrics, share)

    if run.trains_discriminator():              # its norm is logged, so its gradient is guarded too
        run.adversary.average_gradients()
        heads = run.adversary.heads.parameters()
        sums["d_grad_norm"] = torch.nn.utils.clip_grad_norm_(heads, math.inf)
    return sums


def add(sums, values, share):
    """Add the values of a micro-batch, `share` of the batch, to the sums for the log."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0) + value.detach().float() * share


def average(sums, place):
    """{name: tensor} -> {name: float}, the mean over processes."""
    values = torch.stack([value.float() for value in sums.values()]) / place.world
    if place.world > 1:
        dist.all_reduce(values)
    return dict(zip(sums, values.tolist()))


def agreed_signal(stop, place):
    """The number of a signal that any process has had, or 0."""
    number = torch.tensor(stop[0] if stop else 0)
    if place.world > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


class Run:
    """A stage in training: its settings c, its files, its place in them, and its networks."""

    def __init__(self, stage, args, c, data, place):
        self.stage = stage
        self.args = args
        self.c = c
        self.place = place
        self.device = place.device
        self.path = args.out / f"{stage}.pt"
        self.log = args.out / f"{stage}.jsonl"
        if data:
            c |= {"num_images": len(data.targets), "data_classes": tuple(data.classes)}

        self.file, self.state = newest_checkpoint(self.path)                    # {}: not begun
        refuse_changes(self.file, self.state.get("config", {}), c)
        self.step = self.state.get("step", 0)
        self.seconds = self.state.get("seconds", 0.0)
        self.skipped = self.state.get("skipped", 0)
        self.skipped_in_a_row = 0
        self.lines = read_log(self.log, self.step)

    def is_shown(self):
        """Whether the log says that the picture of this step is made; it comes after the scores."""
        return any("picture" in line and line["step"] == self.step for line in self.lines[-3:])

    def is_complete(self):
        return self.step >= self.c["steps"] and self.is_shown()

    def build(self, data):
        """Networks and optimiser, with the weights of the checkpoint. Says what it found."""
        args, c, device = self.args, self.c, self.device
        torch.manual_seed(seed_of(c["seed"], self.stage))                       # of a random start
        self.teacher = self.guide = self.adversary = self.perceptual = None
        if self.stage == "rae":
            choose_autoencoder(self, data)
        else:
            choose_networks(self, data)
        self.model.to(device).train().requires_grad_(True)
        self.model.checkpointing = args.checkpointing
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.params = [*self.model.parameters()]
        self.ema_params = [*self.ema.parameters()]
        if self.stage == "rae":                 # the RAE that is drawn, measured and saved
            self.rae = (RAE(self.ema.encoder, self.ema.decoder) if args.toy
                        else RAE(self.rae.encoder, self.ema))
        self.rae.to(device)

        frozen = [self.teacher, self.guide]
        if not args.toy:
            frozen.append(self.rae.encoder)
        if c.get("perceptual"):
            self.perceptual = PerceptualDistance(args.weights)
            frozen.append(self.perceptual)
        if c.get("adversarial"):
            self.adversary = Adversary(c["resolution"], args.weights, device)
            self.discriminator_from = int(c["discriminator_from"] * c["steps"])
            frozen.append(self.adversary.discriminator.net)
        for network in frozen:
            if network:
                network.to(device)
                if c["precision"] == "bf16":    # half the memory
                    for weight in network.parameters():
                        weight.data = weight.data.bfloat16()

        self.optimizer = torch.optim.AdamW(
            self.params, betas=(0.9, 0.95), weight_decay=0, fused=True)
        self.optimizers = [self.optimizer]
        self.parts = {"model": self.model, "ema": self.ema, "optimizer": self.optimizer}
        if self.adversary:
            self.optimizers.append(self.adversary.optimizer)
            self.parts["discriminator"] = self.adversary.heads
            self.parts["d_optimizer"] = self.adversary.optimizer
        for name, part in self.parts.items():
            if self.state:
                part.load_state_dict(self.state[name])
        self.state = None                       # else a file that was replaced stays on the disk
        self.micro_batch = args.micro_batch or default_micro_batch(self)
        self.set_callables()
        self.describe(data)

    def set_callables(self):
        """net trains, through DDP, which averages gradients. student and teacher make targets."""
        args, c = self.args, self.c
        exact = c.get("derivative") == "fd"     # differences of TF32 products are rounding errors
        torch.set_float32_matmul_precision("highest" if exact else "high")
        self.net = self.ddp = self.model
        if self.place.world > 1:                # the second option spares a copy of the gradients
            self.net = self.ddp = torch.nn.parallel.DistributedDataParallel(
                self.model, broadcast_buffers=False, gradient_as_bucket_view=True)
        if args.compile:                        # the derivative as a whole, with the network inside
            self.net = torch.compile(self.net)
            self.teacher = self.teacher and torch.compile(self.teacher)
            meanflow.total_derivative = torch.compile(meanflow.total_derivative)

        self.student = in_parts(self.model, self.micro_batch)
        self.encode = in_parts(lambda images: self.rae.encode(images / 255), self.micro_batch)
        self.reencode = in_parts(self.rae.reencode, self.micro_batch)
        if self.teacher is not None:            # a compiled network has a length
            self.teacher = in_parts(self.teacher, self.micro_batch)
        if self.guide is not None:
            self.guide = in_parts(self.guide, self.micro_batch)
        if c.get("guidance_scale", 1) != 1:
            self.teacher = guided(self.teacher, c["guidance_scale"], len(self.classes), self.guide)

    def autocast(self):
        """bf16 where the stage has it. No cache: weights cast without a gradient have no graph."""
        kind = self.device.split(":")[0]
        enabled = self.c["precision"] == "bf16"
        return torch.autocast(kind, torch.bfloat16, enabled, cache_enabled=False)

    def describe(self, data):
        """Say what was found, and begin this run's part of the log."""
        found = "no images"
        if data:
            found = f"{len(data.targets):,} images of the classes {brief(tuple(data.classes))}"
        start = f"resumes at step {self.step:,}" if self.step else f"starts from {self.origin}"
        weights = sum(weight.numel() for weight in self.params)
        print0(f"{self.stage}: {found}; {start}; {weights:,} parameters; {self.device}, "
               f"{self.c['precision']} ({self.args.precision_reason}); "
               f"{len(self.row_numbers(0))} rows a process, {self.micro_batch} samples at a time")
        if self.place.rank == 0:
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            write_whole(self.log, lambda path: path.write_text(text))
            if self.args.wandb:
                import wandb
                name = f"{self.args.out.name}-{self.stage}"
                wandb.init(project="meanflow-rae", name=name, config=self.c)
        self.write({"config": self.c, "command": sys.argv, "torch": torch.__version__})

    # Rows and batches

    def row_numbers(self, step):
        """Numbers n = step * batch_size + row of this process's rows of a step."""
        local = self.c["batch_size"] // self.place.world
        first = step * self.c["batch_size"] + self.place.rank * local
        return range(first, first + local)

    def load(self, data):
        """Batches of this process from this step on: x (B, ...), labels (B,)."""
        self.encoded = self.stage != "rae" and isinstance(data, InMemory)
        if self.encoded:                        # images in memory: once, before the first step
            with torch.no_grad(), self.autocast():
                z = [self.encode(x.to(self.device)).cpu() for x in data.images.split(256)]
            data = data._replace(images=torch.cat(z))                           # (M, C, G, G)
        rows = (self.row_numbers(step) for step in range(self.step, self.c["steps"]))
        return iter(loader(Samples(data, self.classes, self.c), self.args, batch_sampler=rows))

    def latents(self, x):
        """Images or latents of a batch (B, [M,] ...) -> latents (B, [M,] C, G, G)."""
        x = x.to(self.device, non_blocking=True)
        if self.encoded:
            return x
        return self.encode(x.flatten(0, -4)).unflatten(0, x.shape[:-3])

    # Pieces of a step

    def micro_batches(self, rows):
        """Slices of the rows, each with its share of them. DDP averages gradients with the last."""
        for first in range(0, rows, self.micro_batch):
            last = min(first + self.micro_batch, rows)
            self.ddp.require_backward_grad_sync = last == rows
            yield slice(first, last), (last - first) / rows

    def trains_discriminator(self):
        return self.adversary and self.step >= self.discriminator_from

    def skip(self, line):
        self.skipped += 1
        self.skipped_in_a_row += 1
        print0(f"{self.stage}: step {self.step + 1} skipped, a value is not finite: {line}")
        if self.skipped_in_a_row == 10:
            raise SystemExit(f"\n{self.stage}: no finite gradient in ten steps; try a smaller "
                             "--lr, or --precision fp32")

    def write(self, line):
        """Append a line to the log: strict JSON, in which a number that is not finite is null."""
        if self.place.rank > 0:
            return
        line = {"step": self.step} | line
        for name, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                line[name] = None
        self.lines.append(line)
        with self.log.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        if self.args.wandb:
            import wandb
            wandb.log(line, step=self.step)

    def save(self):
        """Write OUT/STAGE.pt; the one before stays as STAGE.previous.pt. All wait for rank 0."""
        names = "stage", "step", "seconds", "skipped", "classes", "alpha"
        content = {name: getattr(self, name) for name in names} | {"config": self.c}
        content["network"] = getattr(self.model, "config", None)
        content |= {name: part.state_dict() for name, part in self.parts.items()}
        if self.rae.measured:                   # of stage rae: after the last step
            content["rae"] = self.rae.packed()
        if self.place.rank == 0:
            whole = self.path.with_suffix(".next.pt")
            write_whole(whole, partial(torch.save, content))
            if self.path.exists():
                self.path.replace(self.path.with_suffix(".previous.pt"))
            whole.replace(self.path)
        if self.place.world > 1:
            dist.barrier()

    def measure_statistics(self, data):
        """Mean and variance of every latent entry, over all images, each once; then save them."""
        images = Samples(data, self.classes, self.c | {"stage": "statistics"})
        mine = range(self.place.rank, len(data.targets), self.place.world)
        batches = loader(images, self.args, batch_size=64, sampler=mine)
        bar = tqdm(batches, "statistics", disable=self.place.rank > 0)
        with torch.no_grad(), self.autocast():
            self.rae.measure(self.encode(x.to(self.device)) for x, _ in bar)
        self.save()

    def samples(self, labels, **options):
        """Batches of images of the EMA weights, which are those of sample.py to the last bit."""
        batches = make_images(self.ema, self.rae, self.alpha, labels, seed=self.c["seed"],
                              precision=default_precision(self.device), **options)
        return (images for _, images in batches)

    def score(self, scorer):
        """Scores of 50,000 samples: those of sample.py and fid.py."""
        labels = labels_for(range(len(self.classes)), None, NUM_SCORED)
        mine = torch.arange(NUM_SCORED).chunk(self.place.world)[self.place.rank].tolist()
        self.write({"scores": scorer(self.samples(labels, numbers=mine))})

    def draw_picture(self, data):
        """OUT/STAGE.STEP.png: samples, a class a column; of stage rae, reconstructions."""
        path = self.path.with_suffix(f".{self.step:06d}.png")
        columns = 8 if self.stage == "rae" else min(len(self.classes), 10)
        if self.place.rank == 0:
            if self.stage == "rae":
                samples = Samples(data, self.classes, self.c)
                images = torch.stack([samples[n][0] for n in range(32)])        # (32, 3, S, S)
                with computing(default_precision(self.device), self.device):
                    pairs = images.split(8), self.rae.reconstruct(images).split(8)
                batches = [row for pair in zip(*pairs) for row in pair]         # 8 x (8, 3, S, S)
            else:
                labels = torch.arange(columns) * (len(self.classes) // columns)
                steps = 1 if self.ema.average_velocity else 25
                batches = self.samples(labels.repeat(4), steps=steps)
            grid = draw_grid(torch.cat([*batches]), columns)
            write_whole(path, partial(grid.save, format="PNG"))
        self.write({"picture": path.name})


def read_log(path, last_step):
    """The lines of a log up to a step, without what comes after the last whole line."""
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    return [line for line in lines if line["step"] <= last_step]


def newest_checkpoint(path):
    """(file, content) of a checkpoint or, if it is damaged, of the one before; else (path, {}).

    The first process alone reads the checksums, so the others take the file that it says.
    """
    files = [file for file in (path, path.with_suffix(".previous.pt")) if file.exists()]
    whole = [None]                              # a list, to be sent
    contents = {}
    for file in files:
        try:
            contents[file] = load_file(file)
            whole = [file]
            break
        except DamagedFile as error:
            print0(str(error))
    if dist.is_initialized():
        dist.broadcast_object_list(whole)
    file = whole[0]
    if file:
        return file, contents.get(file) or load_file(file)
    if files:
        raise SystemExit(f"{path}: no whole checkpoint is left; to begin anew, move it away")
    return path, {}


def refuse_changes(file, before, c):
    """A run goes on with the settings it began with; steps and learning rates may change."""
    for name in c:                              # in one order, the same in all processes
        if name not in before or before[name] == c[name]:
            continue
        if name not in FREE:
            raise SystemExit(f"{file}: made with {name} {brief(before[name])}, not "
                             f"{brief(c[name])}; give that, or another --out")
        print0(f"{file}: {name} was {before[name]}, goes on with {c[name]}")


def brief(value):
    """A value for a message; of many names the first and the last."""
    if isinstance(value, tuple) and len(value) > 3:
        return f"{value[0]} ... {value[-1]} ({len(value)})"
    return value


def default_micro_batch(run):
    """All rows on a CPU; on a GPU the largest power of two whose activations fit into its memory.

    Activations take 70 bytes (fp32: 130, --checkpointing: 10) for each token, layer and unit of
    width, by `test_all.py --memory`; gradients and moments take 12 a parameter.
    """
    rows = len(run.row_numbers(0)) * run.c.get("num_pairs", run.c.get("num_moved", 1))
    if not run.device.startswith("cuda"):
        return rows
    channels, grid, _ = run.rae.latent_shape
    layers = sum(weight.shape[0] for weight in run.params if weight.dim() == 2) / 16
    size = 10 if run.args.checkpointing else 70 if run.c["precision"] == "bf16" else 130
    if run.adversary:                           # and LPIPS, beside the decoder
        size += 80
    free, _ = torch.cuda.mem_get_info()
    free -= 2**31 + 12 * sum(weight.numel() for weight in run.params)
    fits = int(free / (size * grid**2 * layers))
    if fits < 1:
        raise SystemExit(f"{run.stage}: one sample does not fit this GPU; give --checkpointing, or "
                         "a smaller --model")
    return min(rows, 2 ** (fits.bit_length() - 1))


# --------------------------------------------------------------------------------------------------
# What a stage starts from: networks, each a part with the content of the file that it came from

def latent_fingerprint(packed):
    """The same of what makes the latents of an RAE: its statistics, and the toy's encoder."""
    state = packed["state"]
    return fingerprint({name: state[name] for name in state if not name.startswith("decoder.")})


class Part(NamedTuple):
    path: str
    network: DiTDH
    content: dict


def load_part(path, kind=None):
    """The network in a file. kind: "velocity" refuses a student."""
    part = Part(path, *load_network(path))
    if kind == "velocity" and part.network.average_velocity:
        raise SystemExit(f"{path}: holds an average velocity; give a checkpoint of stage flow")
    return part


def choose_autoencoder(run, data):
    """Stage rae: a decoder to train on a frozen encoder; of the toy, both."""
    args = run.args
    run.classes = tuple(data.classes)
    run.alpha = None
    run.origin = "random weights"
    if args.toy:
        run.model = ToyAutoencoder(32, len(data.classes))
        return
    encoder = Encoder(args.encoder, args.resolution, weights=args.weights)
    encoder.eval().requires_grad_(False)
    run.model = Decoder(encoder.config["channels"], encoder.grid, args.resolution // encoder.grid,
                        **DECODERS[run.c["model"]])
    run.rae = RAE(encoder, run.model)


def choose_networks(run, data):
    """Start, teacher, guide and RAE of a stage in latent space, all of which fit together."""
    args, c, kind = run.args, run.c, STAGES[run.stage]
    parts = {}
    if kind.needs_teacher:
        parts["teacher"] = pick_teacher(args)
        if (name := c["guidance_model"]) != "none":
            if name == "published":
                name = published("guide", args.resolution, args.weights)
            parts["guide"] = load_part(name, "velocity")
    start = pick_start(run, parts.get("teacher"))
    run.origin = start.path
    run.rae = pick_rae(args, start)
    if kind.needs_images:
        run.rae.fetch_encoder(args.weights)

    channels, grid, _ = run.rae.latent_shape
    names = data.classes if data else class_names()
    if start.network and start.network.config["num_classes"] == 1000:
        names = class_names()                   # published weights are ImageNet's
    run.classes = tuple(start.content.get("classes", names))
    run.alpha = start.content.get("alpha") or (TOY_ALPHA if args.toy else alpha_of(channels, grid))
    if start.network:
        parts["start"] = start
    refuse_strangers(run, parts)
    c["parts"] = refuse_other_parts(run, parts, start)

    run.model = start.network
    if run.model is None:
        run.model = DiTDH(grid, channels, num_classes=len(run.classes),
                          average_velocity=kind.average_velocity, **MODELS[c["model"]])
        if args.toy:                            # the published 0.02 learns classes too slowly
            torch.nn.init.normal_(run.model.y_embedder.embedding_table.weight, std=1.0)
    elif kind.average_velocity and not run.model.average_velocity:
        run.model = student_of(run.model)       # in distill, without mid-training, it explodes
    if "teacher" in parts:
        run.teacher = parts["teacher"].network
    if "guide" in parts:
        run.guide = parts["guide"].network


def pick_teacher(args):
    """The velocity network: given, or flow.pt beside the start, or the published one."""
    path = args.teacher or args.starts / "flow.pt"
    if not args.teacher and not args.toy and not path.exists():
        path = published("teacher", args.resolution, args.weights)
    return load_part(path, "velocity")


def pick_start(run, teacher):
    """Where the weights come from: the own checkpoint, --init, the stage before, or chance."""
    args, kind = run.args, STAGES[run.stage]
    if run.state:
        return Part(run.file, DiTDH(**run.state["network"]), run.state)
    if args.init == "none" or not (args.init or kind.starts_from):
        return Part("random weights", None, {})
    if args.init:
        return load_part(args.init, None if kind.average_velocity else "velocity")
    if kind.starts_from == "flow":
        start = teacher or pick_teacher(args)
    else:
        start = load_part(args.starts / f"{kind.starts_from}.pt")
    step = start.content.get("step", 0)
    if step < start.content.get("config", {}).get("steps", 0) and not args.teacher:
        raise SystemExit(f"{start.path}: stopped at step {step}; finish it, or give it with --init")
    return start


def pick_rae(args, start):
    """The RAE: given, or that of the start, or rae.pt beside it, or the published one."""
    if not args.rae and "rae" in start.content:
        return load_rae(start.path, start.content["rae"])
    path = args.rae or args.starts / "rae.pt"
    if args.rae or args.toy or path.exists():
        return load_rae(path)
    return published_rae(args.resolution, args.weights)


def refuse_strangers(run, parts):
    """All parts must be of the same latents and classes. Published weights have shapes alone."""
    channels, grid, _ = run.rae.latent_shape
    wanted = {"latents": (channels, grid), "number of classes": len(run.classes),
              "classes": run.classes, "RAE": latent_fingerprint(run.rae.packed())}
    if run.rae.image_size != run.args.resolution:
        raise SystemExit(f"--resolution {run.args.resolution}: the RAE makes images of "
                         f"{run.rae.image_size}; give that, or another --rae")
    for name, (path, network, content) in parts.items():
        found = {"latents": (network.config["in_channels"], network.config["input_size"]),
                 "number of classes": network.config["num_classes"]}
        if "classes" in content:
            found["classes"] = tuple(content["classes"])
        if "rae" in content:
            found["RAE"] = latent_fingerprint(content["rae"])
        for what, value in found.items():
            if value != wanted[what]:
                raise SystemExit(f"{path}: {what} of this {name}: {brief(value)}, of the run: "
                                 f"{brief(wanted[what])}; give parts that belong together")
    size = run.args.model
    if size and "start" in parts:
        widths = parts["start"].network.config["hidden_size"]
        if tuple(widths) != MODELS[size]["hidden_size"]:
            raise SystemExit(f"--model {size}: not the size of {parts['start'].path}; leave it out")


def refuse_other_parts(run, parts, start):
    """-> fingerprints of the parts, for the checkpoint. What a stage began with, it goes on with;
    and a teacher that no flag names must be the one that the start was trained with."""
    prints = {name: fingerprint(state_dict_of(part.content)) for name, part in parts.items()}
    prints["rae"] = latent_fingerprint(run.rae.packed())
    before = start.content.get("config", {}).get("parts", {})
    if run.state:                               # its start is itself: keep what it began with
        del prints["start"]
        prints = before | prints
    for name in prints if run.state else ["teacher"]:
        known = name in before and (run.state or not run.args.teacher)
        if known and prints.get(name, before[name]) != before[name]:
            flag = "guidance_model" if name == "guide" else name
            raise SystemExit(f"{start.path}: was trained with another {name} than this run finds; "
                             f"give --{flag}, or the --out that it belongs to")
    return prints


# --------------------------------------------------------------------------------------------------
# Data

SPLITS = {"train", "test", "val", "valid", "validation"}


class UnreadableImages(Exception):
    """More than 1 in 1,000 images cannot be read."""


class Photographs(ImageFolder):
    """A folder of one folder per class. Hidden files are ignored, files of other kinds counted."""

    def __init__(self, root):
        self.ignored = 0
        super().__init__(root, is_valid_file=self.is_image)
        self.classes = class_names(self.classes)                                # n01440764: tench
        if self.ignored:
            print0(f"--data {root}: {self.ignored} files are no images that are read here, such as "
                   ".jpg and .png; ignored")

    def is_image(self, path):
        name = os.path.basename(path)
        valid = is_image_file(name) and not name.startswith(".")
        self.ignored += not valid
        return valid

    def find_classes(self, directory):
        folders = [entry.name for entry in os.scandir(directory) if entry.is_dir()]
        folders = sorted(name for name in folders if not name.startswith("."))
        if not folders:
            raise SystemExit(f"--data {directory}: holds no folder; each class needs a folder")
        if SPLITS.issuperset(folders):
            raise SystemExit(f"--data {directory}: holds {' and '.join(folders)}, which are no "
                             f"classes; give {Path(directory, folders[-1])}")
        return folders, {name: i for i, name in enumerate(folders)}


class InMemory(NamedTuple):
    """Images uint8 (M, 3, S, S), or latents (M, C, G, G), and what ImageFolder has beside them."""
    images: torch.Tensor
    targets: torch.Tensor
    classes: tuple


class Samples(Dataset):
    """Item n is row n of a stage: an image or latents, and the label of its class in the network.

    Which image it is, its crop and its flip are functions of (seed, stage, n). Each image comes
    once an epoch. With c["samples"], of drift, an item is that many images of one class, and the
    classes come in turn. In stage "statistics" item n is image n.
    """

    def __init__(self, data, classes, c):
        unknown = [name for name in data.classes if name not in classes]
        if unknown:
            raise SystemExit(f"--data: {unknown[0]!r} is no class of the network; give images of "
                             f"its {len(classes)} classes")
        self.data = data
        self.num = len(data.targets)
        self.c = c
        self.key = c["seed"], c["stage"]
        self.labels = [classes.index(name) for name in data.classes]
        targets = torch.as_tensor(data.targets)
        counts = targets.bincount(minlength=len(data.classes))
        self.members = targets.argsort(stable=True).split(counts.tolist())      # images of a class
        self.unreadable = set()

    @lru_cache(maxsize=2)  # noqa: B019 - a data set lives as long as its stage
    def order(self, epoch, length):
        random = torch.Generator().manual_seed(seed_of(*self.key, "epoch", epoch))
        return torch.randperm(length, generator=random).tolist()

    def __getitem__(self, n):
        random = torch.Generator().manual_seed(seed_of(*self.key, "image", n))
        if self.c["stage"] == "statistics":
            return self.read(n, random)
        if "samples" not in self.c:
            epoch, place = divmod(n, self.num)
            return self.read(self.order(epoch, self.num)[place], random)

        epoch, place = divmod(n, len(self.members))
        members = self.members[self.order(epoch, len(self.members))[place]]
        picks = torch.randint(len(members), (self.c["samples"],), generator=random)
        images, labels = zip(*[self.read(i, random) for i in members[picks].tolist()])
        return torch.stack(images), labels[0]                                   # (M, ...), label

    def read(self, i, random):
        """Image i -> (uint8 (3, S, S) or latents, label). For an unreadable file, the next one."""
        if isinstance(self.data, InMemory):
            return self.data.images[i], self.labels[self.data.targets[i]]
        path, label = self.data.samples[i]
        try:
            return self.prepare(read_image(path), random), self.labels[label]
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            # PIL's errors for files that are cut or broken
            self.unreadable.add(i)
            tqdm.write(f"{path}: {error}; using the next image of its class", file=sys.stderr)
        if len(self.unreadable) > self.num / 1000:
            raise UnreadableImages("--data: over 1 in 1,000 images are unreadable; remove them")
        members = self.members[label].tolist()
        return self.read(members[(members.index(i) + 1) % len(members)], random)

    def prepare(self, image, random):
        """PIL image -> uint8 (3, S, S): a random crop in stage rae, later ADM's crop and a flip."""
        size = self.c["resolution"]
        if self.c["stage"] == "rae":
            image = TF.resize(image, size * 3 // 2, TF.InterpolationMode.BICUBIC)
            width, height = image.size
            top = int(torch.randint(height - size + 1, (), generator=random))
            left = int(torch.randint(width - size + 1, (), generator=random))
            image = TF.crop(image, top, left, size, size)
        else:
            image = center_crop(image, size)
        if torch.rand((), generator=random) < self.c.get("flip", 0):
            image = TF.hflip(image)
        return TF.pil_to_tensor(image)


def loader(samples, args, **options):
    """A DataLoader of samples, with processes that read files, where there are files."""
    workers = 0 if isinstance(samples.data, InMemory) else args.workers
    return DataLoader(samples, num_workers=workers, worker_init_fn=set_up_worker,
                      pin_memory=args.place.device.startswith("cuda"), **options)


def set_up_worker(worker):
    """Ctrl-C and SIGUSR1 are for the process that trains; SIGTERM is how it ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setpgrp()                                # torchrun sends signals to a group of processes


def load_data(args):
    """-> (images to train on, images that no stage sees: a tenth of the toy's, else None)."""
    if not args.data:
        train, held_out = (300, 300) if args.dry_run else (20_000, 2_000)
        return drawn_data(train, args.seed), drawn_data(held_out, 1_000_001)
    try:
        folder = Photographs(args.data)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SystemExit(f"--data {args.data}: {error}; each class needs images") from None
    if not args.toy:
        return folder, None

    # The toy's photographs stay in memory. A tenth is held out, chosen by the names alone.
    samples = Samples(folder, folder.classes, {"seed": 0, "stage": "statistics", "resolution": 32})
    numbers = range(len(folder))
    images = [samples[i][0] for i in tqdm(numbers, "read", disable=args.place.rank > 0)]
    images = torch.stack(images)                                                # (M, 3, 32, 32)
    labels = torch.tensor(folder.targets)
    names = [os.fsencode(os.path.relpath(path, args.data)) for path, _ in folder.samples]
    hidden = torch.tensor([zlib.crc32(name) % 10 == 0 for name in names])
    held_out = InMemory(images[hidden], labels[hidden], folder.classes)
    images, labels = images[~hidden], labels[~hidden]
    missing = labels.bincount(minlength=len(folder.classes)) == 0
    if missing.any():
        name = folder.classes[int(missing.int().argmax())]
        raise SystemExit(f"--data {args.data}: all images of {name!r} are held out; give more")
    if args.flip != 0:                          # and the mirror images
        images = torch.cat([images, images.flip(3)])
        labels = labels.repeat(2)
    return InMemory(images, labels, folder.classes), held_out


def drawn_data(num, seed):
    images, labels = make_toy_images(num, seed)
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()          # (M, 3, 32, 32)
    return InMemory(images, torch.from_numpy(labels), TOY_CLASSES)


# --------------------------------------------------------------------------------------------------
# The pictures of the toy: ten shapes, in a frame of side 2 whose y points down

TURN = np.linspace(0, 2 * np.pi, 60, endpoint=False)
FILL, CUT = 255, 0  # an outline is filled, or cut out of what is there


def circle(width, height, x=0.0, y=0.0):
    return np.stack([x + width * np.cos(TURN), y + height * np.sin(TURN)], axis=1)      # (60, 2)


def rectangle(x, y):
    return [(-x, -y), (x, -y), (x, y), (-x, y)]


def star():
    radius = np.where(np.arange(10) % 2, 0.42, 1.1)
    turn = np.arange(10) * np.pi / 5 - np.pi / 2
    return np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=1)     # (10, 2)


def heart():
    up = 13 * np.cos(TURN) - 5 * np.cos(2 * TURN) - 2 * np.cos(3 * TURN) - np.cos(4 * TURN)
    return np.stack([np.sin(TURN) ** 3, -up / 16], axis=1)                      # (60, 2)


ARROW = [(-1, -0.28), (0.1, -0.28), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.28), (-1, 0.28)]
SHAPES = {
    "ball": [(FILL, circle(1, 1))],
    "ring": [(FILL, circle(1, 1)), (CUT, circle(0.55, 0.55))],
    "square": [(FILL, rectangle(0.85, 0.85))],
    "triangle": [(FILL, [(0, -1), (1, 0.8), (-1, 0.8)])],
    "star": [(FILL, star())],
    "heart": [(FILL, heart())],
    "moon": [(FILL, circle(1, 1)), (CUT, circle(0.85, 0.85, 0.45, -0.1))],
    "plus": [(FILL, rectangle(0.3, 1)), (FILL, rectangle(1, 0.3))],
    "arrow": [(FILL, ARROW)],
    "fish": [
        (FILL, circle(0.75, 0.55, 0.25)),
        (FILL, [(-0.3, 0), (-1, -0.6), (-1, 0.6)]),
        (CUT, circle(0.13, 0.13, 0.6, -0.15)),
    ],
}
TOY_CLASSES = tuple(SHAPES)


def colour(hue, light):
    """A colour of the hue, 0 to 1, and the lightness, 0 to 1: (3,)."""
    return light * (0.62 + 0.38 * np.cos(2 * np.pi * (hue + np.array([0, 1 / 3, 2 / 3]))))


def make_toy_images(num, seed):
    """Draw ten shapes in turn -> uint8 (num, 32, 32, 3), labels int64 (num,).

    Picture i is a function of (seed, i): place, size, angle, and one colour for the shape and one
    for the ground, one of which is dark.
    """
    images = np.empty((num, 32, 32, 3), np.uint8)
    labels = np.arange(num) % len(SHAPES)
    for i in range(num):
        random = np.random.default_rng((seed, i))
        angle = random.uniform(-0.3, 0.3)                                       # radians
        size = random.uniform(10, 13)                                           # pixels
        middle = 16 + random.uniform(-1, 1, 2) * (15 - size)                    # (x, y)
        turn = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
        mask = Image.new("L", (128, 128))       # four times as large, for smooth edges
        for fill, outline in SHAPES[TOY_CLASSES[labels[i]]]:
            points = 4 * (np.array(outline) @ turn * size + middle)             # (points, 2)
            ImageDraw.Draw(mask).polygon(points.flatten().tolist(), fill=fill)
        mask = np.asarray(mask.resize((32, 32), Image.Resampling.BOX), np.float32)[..., None] / 255

        hue, ground_hue = random.uniform(), random.uniform()
        if i // 10 % 2:
            ground = colour(ground_hue, random.uniform(0.15, 0.45))
            shape = colour(hue, random.uniform(0.85, 1))
        else:
            ground = 1 - colour(ground_hue, random.uniform(0.1, 0.35))
            shape = colour(hue, random.uniform(0.45, 0.75))
        image = ground + mask * (shape - ground)                                # (32, 32, 3)
        images[i] = np.round(255 * np.clip(image, 0, 1))
    return images, labels


# --------------------------------------------------------------------------------------------------
# Command line

def existing(text):
    """A type for argparse: a path that exists, or the words none and published."""
    if text not in ("none", "published") and not os.path.exists(text):
        raise argparse.ArgumentTypeError(f"{text!r}: no such file or folder")
    return text


def folder(text):
    """A type for argparse: a folder, which need not exist."""
    if not text or os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no folder")
    return Path(text)


positive = number(int, 1)
share = number(float, 0, 1)
FLAGS = {  # settings of the table that are also flags
    "steps": (positive, "optimiser steps"),
    "batch_size": (positive, "rows a step over all processes: images, trajectories (mid) or "
                             "classes (drift)"),
    "lr": (number(float, 1e-12), "peak learning rate"),
    "flip": (share, "share of training images that are mirrored"),
    "perceptual": (number(float, 0), "rae: weight of LPIPS"),
    "adversarial": (number(float, 0), "rae: weight of the adversarial loss"),
    "guidance_scale": (number(float, 0), "mid, distill: guidance of the teacher, 1 is none"),
    "guidance_model": (existing, "mid, distill: a weaker teacher's checkpoint, or published, or "
                                 "none: classifier-free guidance"),
    "ratio_r_not_equal_t": (share, "distill, bootstrap: share of rows with r < t"),
    "ratio_r_is_0": (share, "distill, bootstrap: of these rows, the share with r = 0"),
    "adaptive_p": (share, "distill, bootstrap: 1 minimises log L, 0 the squared error L"),
    "derivative": (str, "distill, bootstrap: du/dt by jvp (exact) or fd (central difference)"),
}


def parse_arguments():
    parser = argparse.ArgumentParser(
        usage="train.py --toy, or --stage NAME ...", description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=STAGES, help="one stage (default with --toy: all, then a report)")
    add("--toy", action="store_true", help="small networks, 32 x 32 images, a CPU")
    add("--resolution", type=int, default=256, choices=range(32, 2049, 16), metavar="N",
        help="side of the images in pixels (default 256)")
    add("--recipe", choices=RECIPES, help="settings and stages (default paper; with --toy: best)")
    add("--data", type=existing, metavar="DIR",
        help="folder with a folder of images per class (of the toy: optional)")
    add("--model", choices=MODELS, help="size of a network from random weights (default XL or toy)")
    add("--out", metavar="DIR", type=folder,
        help="folder of the checkpoints (default out/toy, out/photographs, out/RESOLUTION)")
    add("--init", type=existing, metavar="CKPT", help="start from it, or none: random weights")
    add("--teacher", type=existing, metavar="CKPT",
        help="velocity network (default OUT/flow.pt, or the published)")
    add("--rae", type=existing, metavar="CKPT", help="the RAE (default: that of the start)")
    add("--encoder", metavar="NAME", help="rae: a vision transformer of timm (default DINOv2-B)")
    add("--weights", metavar="DIR",
        help="folder laid out like the hub, or random, for trials of rae (default: the hub)")
    for name, (kind, meaning) in FLAGS.items():
        values = {str(row[name]) for row in TABLE["paper 256"].values() if name in row}
        add(f"--{name}", type=kind, metavar=kind.__name__.upper(),
            help=f"{meaning} (at 256: {', '.join(sorted(values))})")
    add("--micro_batch", metavar="N", type=positive,
        help="samples through the network at a time; gradients add up (default: what fits)")
    add("--checkpointing", action="store_true",
        help="keep no activations inside blocks: an eighth of the memory, more time")
    add("--precision", choices=("fp32", "bf16"),
        help="bf16: autocast (default where a GPU has it, and for the toy where a CPU has it)")
    add("--compile", action="store_true", help="torch.compile the networks and the derivative")
    add("--seed", type=number(int, 0), default=0, help="seed of all random draws (default 0)")
    add("--device", type=device_name, help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--workers", type=number(int, 0), default=8, help="processes that read files (default 8)")
    add("--save_every", metavar="N", type=positive,
        help="steps between checkpoints (default 2500; with --toy 500)")
    add("--sample_every", metavar="N", type=positive,
        help="steps between pictures and scores (default: as --save_every)")
    add("--ref", type=existing, metavar="PATH", help="score 50,000 samples against it, as fid.py")
    add("--wandb", action="store_true", help="also log to Weights & Biases")
    add("--report", nargs="+", type=existing, metavar="CKPT",
        help="no training, a report on checkpoints of the toy")
    add("--dry_run", action="store_true", help="a step of everything, in OUT/dry_run, then deleted")
    args = parser.parse_args()
    check_arguments(parser, args)
    return args


def check_arguments(parser, args):
    """Refuse what does not go together; fill in the defaults that depend on other flags."""
    args.toy = args.toy or bool(args.report)
    args.recipe = args.recipe or ("best" if args.toy else "paper")
    args.stages = [args.stage] if args.stage else RECIPES[args.recipe]
    if not args.stage and not args.toy:
        parser.error("give --stage, or --toy")
    latent = [stage for stage in STAGES if stage != "rae"]
    taught = [stage for stage in STAGES if STAGES[stage].needs_teacher]
    users = {"init": latent, "rae": latent, "ref": latent, "teacher": taught, "encoder": ["rae"]}
    for flag, stages in users.items():
        if getattr(args, flag) and args.stage not in stages:
            parser.error(f"--{flag} belongs to --stage {' or '.join(stages)}")
    if not args.toy and not args.data and STAGES[args.stage].needs_images:
        parser.error(f"--stage {args.stage} needs images: give --data DIR with a folder per class")
    if args.derivative not in (None, "jvp", "fd"):
        parser.error(f"--derivative {args.derivative}: give jvp or fd")

    name = str(args.resolution)
    if args.toy:
        args.resolution = 32
        name = "photographs" if args.data else "toy"
    args.out = args.starts = args.out or Path("out", name)          # starts: where they lie
    if args.dry_run:
        args.steps = 1
        args.out = args.out / "dry_run"
        args.starts = args.starts if args.stage else args.out
    args.save_every = args.save_every or (500 if args.toy else 2500)
    args.sample_every = args.sample_every or args.save_every


def choose_precision(args):
    """-> (precision, why)."""
    if args.precision:
        return args.precision, "as --precision says"
    if args.place.device.startswith("cuda"):
        precision = default_precision(args.place.device)
        return precision, "this GPU has bf16" if precision == "bf16" else "this GPU has no bf16"
    cpu = Path("/proc/cpuinfo")
    if args.toy and cpu.exists() and "avx512_bf16" in cpu.read_text():
        return "bf16", "this CPU has bf16 products; a GPU would get bf16 too"
    return "fp32", "a CPU; a GPU of Ampere or newer would get bf16"


def lock(folder):
    """Refuse a second run in a folder -> the open file, which holds the lock of this process.

    The lock is this process's alone, so that workers of a killed run do not keep it.
    """
    file = (folder / "lock").open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise SystemExit(f"--out {folder}: another run is writing there; wait for it, or give "
                         "another folder") from None
    except OSError as error:                    # Lustre and others without locks
        print0(f"{folder}: no lock on this file system ({error}); keep other runs away from it")
    return file


def listen_to_signals():
    """A list to which SIGTERM, SIGINT and SIGUSR1 append: the run saves and ends after its step."""
    stop = []

    def on_signal(signal_number, frame):
        stop.append(signal_number)
        if not dist.is_initialized():           # a second one ends it at once; torchrun sends two
            signal.signal(signal_number, signal.SIG_DFL)
    for signal_number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(signal_number, on_signal)
    return stop


def main():
    args = parse_arguments()
    args.place = place = start_processes(args.device)
    torch.backends.cuda.enable_flash_sdp(place.device != "cpu")     # its name hides that it is the
    args.precision, args.precision_reason = choose_precision(args)  # CPU's too, where it is slow
    configs = {stage: settings(stage, args, place.world) for stage in args.stages}
    if args.dry_run and place.rank == 0:
        shutil.rmtree(args.out, ignore_errors=True)                 # of one that failed
    args.out.mkdir(parents=True, exist_ok=True)
    held_lock = lock(args.out) if place.rank == 0 else None         # noqa: F841 - kept open

    needs_images = args.report or any(STAGES[stage].needs_images for stage in args.stages)
    data, held_out = load_data(args) if needs_images else (None, None)
    reports = args.toy and (args.report or not args.stage)
    if reports and len(held_out.targets) <= 256:
        raise SystemExit(f"--data {args.data}: the report hides a tenth, and needs over 2,570 "
                         "images; give more")
    stop = listen_to_signals()
    for stage, c in configs.items():
        if args.report:
            break
        try:
            train(stage, args, c, data if STAGES[stage].needs_images else None, stop, place)
        except torch.OutOfMemoryError:
            raise SystemExit(f"{stage}: out of memory; give a smaller --micro_batch, or "
                             "--checkpointing") from None
        except UnreadableImages as error:       # a worker's message has its traceback before it
            raise SystemExit(str(error).strip().splitlines()[-1]) from None
    if place.world > 1:
        dist.destroy_process_group()            # the report is made by one process
    if reports and place.rank == 0 and not stop:
        paths = args.report or [args.out / f"{stage}.pt" for stage in args.stages[1:]]
        samples = 300 if args.dry_run else 5000 if args.report else 1000
        fid.report(paths, data, held_out, args.out, place.device, samples,
                   default_precision(place.device), stopped=lambda: bool(stop))
    if args.dry_run and place.rank == 0:
        shutil.rmtree(args.out)
    if stop:
        raise SystemExit(128 + stop[0])


if __name__ == "__main__":
    main()
