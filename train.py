"""Train every stage of MeanFlow Transformers with representation autoencoders, with one loop.

Paper: arXiv 2511.13019. The stages, and what each starts from, in the folder --out:

    rae        decoder of the representation autoencoder (RAE), whose encoder is frozen; statistics of its latents
    flow       the teacher: velocity by flow matching, from random weights, in the latents of rae
    mid        the student: average velocity by Consistency Mid-Training, from the weights of its teacher, flow
    distill    MeanFlow distillation, from mid: the MeanFlow identity with the teacher's velocity
    bootstrap  MeanFlow training, from distill: the same with e - x instead of the teacher's velocity
    drift      beyond the paper, from flow: one-step samples drift towards the data

    python train.py --toy                                    # all of it on a laptop CPU, on pictures it draws itself
    torchrun --nproc_per_node=8 train.py --stage mid --checkpointing --precision bf16   # ImageNet, published teacher

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
import zlib
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import transforms as T
from torchvision.datasets import ImageFolder
from tqdm import tqdm

import fid
from dit import MODELS, DiTDH, load_network, student_of
from meanflow import (alpha_of, drift_loss, flow_matching_loss, flow_matching_times, guided, mean_flow_loss,
                      mean_flow_times, mid_training_loss, total_derivative)
from rae import (DECODERS, RAE, Adversary, Decoder, Encoder, PerceptualDistance, ToyAutoencoder, center_crop, load_rae,
                 published, published_rae, read_image, reconstruction_loss)
from sample import class_names, make_images, newest_checkpoint, print0, save_picture, seed_of, start_processes

# ----------------------------------------------------------------------------------------------------------------------
# What a stage is trained with. batch_size is global; it counts trajectories in mid, classes in drift. The learning rate
# rises over the share `warmup` of the steps, and falls to lr_end from the share `decay_from` on. Not in a row: clip 1,
# warmup 0, lr_end = lr. "paper" is the paper's recipe, "best" what --recipe best changes; 512 and the toy differ.
TABLE = {
    "paper 256": {  # rae has 16 epochs of ImageNet, flow 800
        "rae": dict(steps=40_036, batch_size=512, lr=2e-4, lr_end=2e-5, warmup=1 / 16, decay="cosine", clip=math.inf,
                    ema=0.9978, noise=0.8, perceptual=1.0, adversarial=0.75, discriminator_from=6 / 16, gan_from=0.5),
        "flow": dict(steps=1_000_911, batch_size=1024, lr=2e-4, lr_end=2e-5, decay_from=40 / 800, ema=0.9995,
                     class_dropout=0.1),
        "mid": dict(steps=27_000, batch_size=8, num_pairs=64, lr=1e-4, ema=0.999, class_dropout=0.1, num_points=17,
                    solver="euler", guidance_scale=1.0, guidance_model="none"),
        "distill": dict(steps=180_000, batch_size=256, lr=1e-4, ema=0.9999, class_dropout=0.1, ratio_r_not_equal_t=0.25,
                        ratio_r_is_0=0.0, adaptive_p=1.0, derivative="jvp", guidance_scale=1.0, guidance_model="none"),
        "bootstrap": dict(steps=10_000, batch_size=256, lr=1e-4, ema=0.9999, class_dropout=0.1,
                          ratio_r_not_equal_t=0.25, ratio_r_is_0=0.0, adaptive_p=1.0, derivative="jvp"),
        "drift": dict(steps=10_000, batch_size=32, samples=256, with_grad=64, lr=3e-5, lr_end=3e-7, ema=0.9995,
                      class_dropout=0.0, reencode=False),  # not the paper's: of arXiv 2606.15553, not tried at 256
    },
    "paper 512": {"mid": dict(num_pairs=8), "distill": dict(steps=20_000, batch_size=128, ema=0.9995),
                  "bootstrap": dict(batch_size=128, ema=0.9995)},
    "paper toy": {  # 32 x 32 pictures, 16 tokens, minutes of two CPU cores
        "rae": dict(steps=1100, batch_size=64, lr=2e-3, lr_end=0.0, warmup=0.05, decay_from=0.3, decay="linear",
                    ema=0.99, noise=1.0, perceptual=0.0, adversarial=0.0),
        "flow": dict(steps=2600, batch_size=64, lr=3e-3, lr_end=2e-4, warmup=0.02, decay_from=0.4, ema=0.995),
        "mid": dict(steps=300, num_pairs=8, lr=1.5e-3, lr_end=2e-4, warmup=0.02, decay_from=0.4, ema=0.99),
        "distill": dict(steps=600, batch_size=64, lr=3e-4, lr_end=5e-5, decay_from=0.5, ema=0.99, adaptive_p=0.0),
        "bootstrap": dict(steps=120, batch_size=64, lr=5e-5, ema=0.99, adaptive_p=0.0),
        "drift": dict(steps=180, batch_size=10, samples=192, with_grad=24, lr=1e-3, lr_end=1e-5, ema=0.98),
    },
    "best 256": dict.fromkeys(("mid", "distill"), dict(guidance_model="published", guidance_scale=1.42)),
    "best 512": dict.fromkeys(("mid", "distill"), dict(guidance_model="published", guidance_scale=1.5)),
    "best toy": dict.fromkeys(("mid", "distill"), dict(guidance_scale=2.0)) | {"drift": dict(reencode=True)},
}
STAGES = dict(paper=("rae", "flow", "mid", "distill", "bootstrap"), best=("rae", "flow", "mid", "drift"))
STARTS_FROM = dict(mid="flow", distill="mid", bootstrap="distill", drift="flow")
TOY_ALPHA = 2.5     # time shift of the toy, tried out; with 0.6, the paper's rule, it learns the classes more slowly
TOY_CLASSES = ("ball", "ring", "square", "triangle", "star", "heart", "moon", "plus", "arrow", "fish")
FLAGS = dict(       # what is also a flag, and its meaning
    steps="optimiser steps",
    batch_size="samples a step, over all processes; of mid, trajectories; of drift, classes",
    lr="peak learning rate",
    perceptual="rae: weight of LPIPS",
    adversarial="rae: weight of the adversarial loss",
    guidance_scale="mid, distill: of the teacher; 1: none",
    guidance_model="mid, distill: a weaker teacher's checkpoint, published, or none: classifier-free guidance",
    ratio_r_not_equal_t="distill, bootstrap: share of samples with r < t",
    ratio_r_is_0="distill, bootstrap: of these, the share with r = 0",
    adaptive_p="distill, bootstrap: 1 is log L, 0 the squared error",
    derivative="distill, bootstrap: du/dt by jvp (exact) or fd (central difference)",
)
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

def draw_step(stage, c, step, latent_shape, num_classes, alpha, device):
    """The random numbers of a step, a function of (seed, stage, step): {name: (B, ...)}, B the whole global batch."""
    g, B = torch.Generator(device).manual_seed(seed_of(c["seed"], stage, step)), c["batch_size"]
    normal = lambda *shape: torch.randn(*shape, generator=g, device=device)
    uniform = lambda *shape: torch.rand(*shape, generator=g, device=device)
    integer = lambda high, *shape: torch.randint(high, shape, generator=g, device=device)
    noise = normal(B, *((c["samples"],) if stage == "drift" else ()), *latent_shape)            # (B, [M,] C, G, G)
    if stage == "rae":                                              # augment: 5 of the decoder, 10 of the discriminator
        return dict(noise=noise * c["noise"] * uniform(B, 1, 1, 1), augment=uniform(B, 15))
    draws = dict(noise=noise, dropped=uniform(B) < c["class_dropout"])                          # (B,)
    if stage == "flow":
        draws["t"] = flow_matching_times(normal(B), alpha)                                      # (B,)
    elif stage == "mid":
        draws["pairs"] = integer(c["num_points"] * (c["num_points"] - 1) // 2, B, c["num_pairs"])   # (B, pairs)
        draws["y"] = integer(num_classes, B)                                                    # (B,)
    elif stage in ("distill", "bootstrap"):                         # not random: r < t in each 4th row, if 0.25
        r_not_equal_t = (torch.arange(B + 1, device=device) * c["ratio_r_not_equal_t"]).floor().diff() > 0
        draws["t"], draws["r"] = mean_flow_times(uniform(2, B), r_not_equal_t, alpha, uniform(B) >= c["ratio_r_is_0"])
    return draws


def train(stage, args, c, data, stop):
    """Train a stage with settings c to its last step, or to a signal in the list `stop`. data: None in stage mid."""
    rank, world, device = args.where                                # set by main, as args.save_to
    path, log = args.save_to / f"{stage}.pt", args.save_to / f"{stage}.jsonl"
    file, state = newest_checkpoint(path)                           # empty: the stage has not begun
    was, step = state.get("config", {}), state.get("step", 0)
    start = step
    for name in c:
        if was.get(name, c[name]) != c[name] and name not in ("steps", "lr", "lr_end"):
            raise SystemExit(f"{file}: made with {name} {was[name]}, not {c[name]}; give that, or another --out")
    if step >= c["steps"] and "rae" in state and path.with_suffix(f".{step:06d}.png").exists():
        return print0(f"{path}: complete, {step} steps")

    # Networks. A random start is a function of (seed, stage).
    torch.manual_seed(seed_of(c["seed"], stage))
    model, rae, teacher, guide, alpha, classes = build(stage, args, c, state, data)
    model.to(device).train().requires_grad_(True)
    model.checkpointing = args.checkpointing
    ema = copy.deepcopy(model).eval().requires_grad_(False)         # average of the weights over many steps
    if stage == "rae":                                              # the RAE that is shown, measured and saved
        rae = RAE(ema.encoder, ema.decoder) if args.toy else RAE(rae.encoder, ema)
    rae, teacher, guide = rae.to(device), teacher and teacher.to(device), guide and guide.to(device)
    params, ema_params, update_ema = [*model.parameters()], [*ema.parameters()], get_ema_multi_avg_fn(c["ema"])
    optimizer = torch.optim.AdamW(params, betas=(0.9, 0.95), weight_decay=0, fused=True)
    perceptual = PerceptualDistance(args.weights).to(device) if c.get("perceptual") else None
    adversary = Adversary(c["resolution"], args.weights, device) if c.get("adversarial") else None
    parts = dict(model=model, ema=ema, optimizer=optimizer)         # what a checkpoint holds, by name
    parts |= dict(discriminator=adversary.heads, d_optimizer=adversary.optimizer) if adversary else {}
    for name in parts if state else ():
        parts[name].load_state_dict(state[name])
    torch.set_float32_matmul_precision("highest" if c.get("derivative") == "fd" else "high")    # high: TF32 on CUDA
    bf16, kind = c["precision"] == "bf16", torch.device(device).type    # no cache: casts under no_grad have no graph
    autocast = partial(torch.autocast, kind, torch.bfloat16, bf16, cache_enabled=False)
    frozen = teacher, guide, perceptual, adversary and adversary.discriminator.net, not args.toy and rae.encoder
    for weight in (w for network in frozen if network for w in network.parameters()) if bf16 else ():
        weight.data = weight.data.bfloat16()                        # half the memory

    # Callables: the losses call the network through DDP, which averages gradients; the derivative has none.
    net, du_dt = model, lambda z, t, r, y, v: total_derivative(model, z, t, r, y, v, c["derivative"])
    if world > 1:
        how = dict(broadcast_buffers=False, gradient_as_bucket_view=True)       # one copy less of the gradients
        net = ddp = torch.nn.parallel.DistributedDataParallel(model, **how)
    if c.get("guidance_scale", 1) != 1:
        teacher = guided(teacher, c["guidance_scale"], len(classes), guide)
    if args.compile:
        net, du_dt, teacher = torch.compile(net), torch.compile(du_dt), teacher and torch.compile(teacher)

    # Batches: a process has its rows of each global batch, and takes micro_batch of them at a time. For example, with
    # batch 64 and micro-batch 16, rank 1 of 2 has micro-batches that start at rows 32 and 48, each of loss_weight 1/2.
    local_batch, micro_batch = c["batch_size"] // world, args.micro_batch or c["batch_size"] // world
    micro_starts = range(rank * local_batch, (rank + 1) * local_batch, micro_batch)
    loss_weight = micro_batch / local_batch
    encoded = stage != "rae" and isinstance(data, TensorDataset)    # images in memory: once, before the first step
    if data:
        samples = Samples(data, classes, (c["seed"], stage), c.get("samples"))
        data.transform = transform(stage, c["resolution"])
        if encoded:
            with autocast():
                z = torch.cat([rae.encode(x.to(device) / 255).cpu() for x in data.tensors[0].split(256)])
            samples.data = TensorDataset(z, data.tensors[1])                                    # (M, C, G, G), (M,)
        numbers = (s * c["batch_size"] + row for s in range(start, c["steps"]) for row in micro_starts)
        batches = iter(samples.load(args, batch_sampler=(range(n, n + micro_batch) for n in numbers)))

    seconds, skipped, skipped_in_a_row = state.get("seconds", 0.0), state.get("skipped", 0), 0
    del state                                                       # else its file stays on the disk once replaced
    scorer = fid.Scorer(args.ref, "inception", args.weights, device, rank, world) if args.ref else None
    if args.wandb and rank == 0:
        import wandb
        wandb.init(project="meanflow-rae", name=f"{args.out.name}-{stage}", config=c)
    if rank == 0:                                                   # lines after the checkpoint go: they come again
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        log.write_text("".join(line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= start))

    def write(line):
        if rank == 0:
            with log.open("a") as file:
                file.write(json.dumps(dict(step=step) | line) + "\n")
            if args.wandb:
                wandb.log(line, step=step)

    def save():
        """Write a temporary file, then rename it; the one before it stays as STAGE.previous.pt. All wait for rank 0."""
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
        if world > 1:
            dist.barrier()

    write(dict(config=c, command=sys.argv, torch=torch.__version__))
    print0(f"{stage}: {sum(w.numel() for w in params):,} parameters, {c['precision']}, {device}; log: {log}")
    bar = tqdm(total=c["steps"], initial=start, desc=stage, disable=rank > 0, mininterval=2)
    while True:
        # Save, score and draw what the steps so far have made.
        done, number = step >= c["steps"], torch.tensor(stop[0] if stop else 0)
        if world > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)              # of a signal that any process has had
        if step > start and (done or number or step % args.save_every == 0):
            save()
        if number:
            print0(f"{stage}: {signal.Signals(int(number)).name}, stopped at step {step}; the same command goes on")
            batches = None                                          # ends the workers that read files
            raise SystemExit(128 + int(number))
        picture = path.with_suffix(f".{step:06d}.png")
        with torch.no_grad(), autocast():
            if done and stage == "rae":
                data.transform = transform("statistics", c["resolution"])
                mine = Samples(data, classes).load(args, batch_size=64, sampler=range(rank, len(data), world))
                rae.measure(rae.encode(x.to(device) / 255) for x, _ in tqdm(mine, "statistics", disable=rank > 0))
                save()
            if (done or step and step % args.sample_every == 0) and (step > start or not picture.exists()):
                if scorer:
                    labels, numbers = torch.arange(NUM_SCORED) % len(classes), torch.arange(NUM_SCORED).chunk(world)
                    made = make_images(ema, rae, alpha, labels, seed=c["seed"], numbers=numbers[rank].tolist())
                    write(dict(scores=scorer(images for _, images in made)))
                if rank == 0:
                    shown = [samples[n][0] for n in range(32)] if stage == "rae" else None
                    save_picture(ema, rae, alpha, len(classes), picture, c["seed"], shown)
        if done:
            break

        # One step: draws, and for each micro-batch a loss and its gradient.
        clock, totals, draws, d = time.perf_counter(), {}, None, None       # else draws were twice in memory
        draws = draw_step(stage, c, step, rae.latent_shape, len(classes), alpha, device)
        use_gan = adversary and step >= int(c["gan_from"] * c["steps"])
        train_discriminator = adversary and step >= int(c["discriminator_from"] * c["steps"])
        for row in micro_starts:
            d = {name: values[row:row + micro_batch] for name, values in draws.items()}
            if data:
                x, y = (values.to(device, non_blocking=True) for values in next(batches))
            if stage != "rae":
                y = torch.where(d["dropped"], len(classes), d["y"] if stage == "mid" else y)    # once per sample
            if world > 1:                                           # DDP averages gradients with the last micro-batch
                ddp.require_backward_grad_sync = row == micro_starts[-1]
            with autocast():
                if data and not encoded:                            # uint8 images; of drift, M of a class in a row
                    x = x / 255 if stage == "rae" else rae.encode(x.flatten(0, -4) / 255).unflatten(0, x.shape[:-3])
                if stage == "rae" and args.toy:
                    loss, metrics = net(x, y, d["noise"])
                elif stage == "rae":
                    z = rae.encode(x)                                                           # (B, C, G, G)
                    judge = partial(adversary.judge, uniform=d["augment"][:, :5]) if use_gan else None
                    loss, metrics = reconstruction_loss(net(z + d["noise"]), x, perceptual, c["perceptual"],
                                                        judge, c["adversarial"], model.head.weight)
                    if train_discriminator:
                        metrics |= adversary.learn(x, model, z, d["augment"][:, 5:], loss_weight)
                elif stage == "flow":
                    loss, metrics = flow_matching_loss(net, x, y, alpha, d["t"], d["noise"])
                elif stage == "mid":
                    loss, metrics = mid_training_loss(net, teacher, d["noise"], y, alpha, c["num_points"],
                                                      pairs=d["pairs"], solver=c["solver"])
                elif stage in ("distill", "bootstrap"):             # bootstrap has no teacher: v is e - x
                    loss, metrics = mean_flow_loss(net, x, y, alpha, teacher, t=d["t"], r=d["r"], noise=d["noise"],
                                                   adaptive_p=c["adaptive_p"], du_dt=du_dt)
                elif stage == "drift":
                    loss, metrics = drift_loss(net, x, y, d["noise"], c["with_grad"], c["reencode"] and rae.reencode)
            (loss * loss_weight).backward()
            for name, value in dict(loss=loss.detach(), **metrics).items():
                totals[name] = totals.get(name, 0) + value * loss_weight
        totals["grad_norm"] = torch.nn.utils.clip_grad_norm_(params, c.get("clip", 1.0))
        values = torch.stack([value.float() for value in totals.values()]) / world
        if world > 1:
            dist.all_reduce(values)
        line = dict(zip(totals, values.tolist()), lr=learning_rate(step, c))                    # waits for the GPU

        # A step whose loss, gradient or another value is not finite changes nothing.
        if all(map(math.isfinite, line.values())):
            skipped_in_a_row = 0
            optimizer.param_groups[0]["lr"] = line["lr"]
            optimizer.step()
            update_ema(ema_params, params, None)
            if train_discriminator:
                adversary.step(learning_rate(step - c["discriminator_from"] * c["steps"], c))
        else:
            skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
            print0(f"{stage}: step {step + 1} skipped, its loss or gradient is not finite: {line}")
        if skipped_in_a_row == 10:
            raise SystemExit(f"\n{stage}: no finite gradient in ten steps; try a smaller --lr or --precision fp32")
        for used in (optimizer, adversary.optimizer) if adversary else (optimizer,):
            used.zero_grad()
        step, taken = step + 1, time.perf_counter() - clock
        seconds += taken
        speed = float(f"{c['batch_size'] * c.get('num_pairs', c.get('with_grad', 1)) / taken:.3g}")
        line |= dict(images_per_s=speed, skipped=skipped, seconds=round(seconds, 2))
        write(line | dict(peak_GiB=round(torch.cuda.max_memory_allocated() / 2**30, 2)))
        bar.set_postfix_str(f"loss {line['loss']:.4g}, grad_norm {line['grad_norm']:.3g}, images/s {speed:g}", False)
        bar.update()


# ----------------------------------------------------------------------------------------------------------------------
# What a stage starts from and goes on from

def settings(stage, args, world=1):
    """The settings of a stage: its row of the table, the flags that were given, and what else identifies the run."""
    size = "toy" if args.toy else "512" if args.resolution >= 512 else "256"
    row = lambda column: TABLE[column].get(stage, {})
    c = row("paper 256") | row(f"paper {size}") | row(f"{args.recipe} {size}")
    changed = dict(steps=4 * c["steps"], reencode=False) if args.toy and args.data else {}  # photographs are harder
    given = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    if args.stage and given.keys() - c.keys():
        raise SystemExit(f"--{min(given.keys() - c.keys())}: stage {stage} has no such setting; it has {', '.join(c)}")
    c |= {name: value for name, value in (changed | given).items() if name in c}
    if args.guidance_model and c.get("guidance_scale") == 1:
        raise SystemExit("--guidance_model: has no effect at guidance scale 1; give --guidance_scale, such as 1.4")
    if c["batch_size"] % (world * (args.micro_batch or 1)):
        raise SystemExit(f"--batch_size {c['batch_size']} of {stage}: no multiple of {world} processes x --micro_batch")
    identity = ("toy", "resolution", "model", "seed", "precision", "encoder", "init", "teacher", "rae")
    return c | dict(stage=stage, **{name: getattr(args, name) for name in identity})


def build(stage, args, c, state, data):
    """-> (network to train, RAE, teacher, its guide, alpha, class names), or None. state: the checkpoint to resume."""
    start, teacher, guide, content, path = None, None, None, state, args.save_to / f"{stage}.pt"
    classes = data.classes if data else class_names()
    if stage == "rae" and args.toy:
        return ToyAutoencoder(32, len(classes)), None, None, None, None, classes
    if stage == "rae":
        encoder = Encoder(args.encoder, args.resolution, weights=args.weights).eval().requires_grad_(False)
        grid = encoder.grid
        decoder = Decoder(encoder.config["channels"], grid, args.resolution // grid, **DECODERS[c["model"]])
        return decoder, RAE(encoder, decoder), None, None, None, classes

    starts_from_teacher = STARTS_FROM.get(stage) == "flow" and not args.init and not state
    if starts_from_teacher or stage in ("mid", "distill"):      # the teacher: given, or the one in OUT, or published
        teacher_path = args.teacher or args.out / "flow.pt"
        if not args.teacher and not args.toy and not teacher_path.exists():
            teacher_path = published("teacher", args.resolution, args.weights)
        teacher, teacher_content = load_network(teacher_path)
        if teacher.average_velocity:
            raise SystemExit(f"--teacher {teacher_path}: has an average velocity; give a checkpoint of stage flow")
        if (name := c.get("guidance_model", "none")) != "none":
            guide, _ = load_network(published("guide", args.resolution, args.weights) if name == "published" else name)

    if state:                                       # the start: where the stage was, or the stage before, or random
        start = DiTDH(**state["network"])
    elif starts_from_teacher:
        start, content, path = teacher, teacher_content, teacher_path
    elif args.init != "none" and (args.init or stage in STARTS_FROM):
        path = args.init or args.out / f"{STARTS_FROM[stage]}.pt"
        start, content = load_network(path)
    if not (state or args.init or args.teacher) and content.get("step", 0) < content.get("config", {}).get("steps", 0):
        raise SystemExit(f"{path}: stopped at step {content['step']}; finish it, or give it with --init or --teacher")
    if start and stage != "flow" and not start.average_velocity:
        start = student_of(start)                   # in distill, without mid-training, it explodes

    if "rae" in content and (state or not args.rae):    # the RAE: of the start, or given, or in OUT, or published
        rae = load_rae(path, content["rae"])
    elif args.rae or args.toy or (args.out / "rae.pt").exists():
        rae = load_rae(args.rae or args.out / "rae.pt")
    else:
        rae = published_rae(args.resolution, args.weights)
    rae = rae if stage == "mid" else rae.fetch_encoder(args.weights)

    channels, grid, _ = rae.latent_shape
    classes = content.get("classes") or (class_names() if start and start.config["num_classes"] == 1000 else classes)
    if start is None:
        start = DiTDH(grid, channels, num_classes=len(classes), average_velocity=stage != "flow", **MODELS[c["model"]])
        if args.toy:                                # the published 0.02 learns classes too slowly for minutes
            torch.nn.init.normal_(start.y_embedder.embedding_table.weight, std=1.0)
    alpha = content.get("alpha") or (TOY_ALPHA if args.toy else alpha_of(channels, grid))
    return start, rae, None if stage == "drift" else teacher, guide, alpha, classes


# ----------------------------------------------------------------------------------------------------------------------
# Data

class Samples(Dataset):
    """Item n is sample n = step * batch_size + row of a stage: x and the label that its class has in the network.

    Which image it is, and what the folder's transforms draw, are functions of (key, n). Without a key it is image n.
    With num, of stage drift, it is num images of one class; the classes come in turn, in another order each time.
    """

    def __init__(self, data, classes, key=None, num=None):
        self.data, self.key, self.num, self.unreadable = data, key, num, set()
        unknown = [name for name in data.classes if name not in classes]
        if unknown:
            raise SystemExit(f"--data: {unknown[0]!r} is no class of the network; give images of its {len(classes)}")
        self.labels, targets = [classes.index(name) for name in data.classes], torch.as_tensor(data.targets)
        self.members = targets.argsort(stable=True).split(targets.bincount(minlength=len(self.labels)).tolist())

    @lru_cache(maxsize=1)
    def order(self, epoch, length):
        return torch.randperm(length, generator=torch.Generator().manual_seed(seed_of(self.key, "epoch", epoch)))

    def __getitem__(self, n):
        if not self.key:
            return self.read(n)
        torch.manual_seed(seed_of(self.key, n))
        epoch, place = divmod(n, len(self.members if self.num else self.data))
        if not self.num:
            return self.read(self.order(epoch, len(self.data))[place])
        members = self.members[self.order(epoch, len(self.members))[place]]                     # images of the class
        images, labels = zip(*(self.read(members[i]) for i in torch.randint(len(members), (self.num,))))
        return torch.stack(images), labels[0]                                                   # (num, ...), label

    def read(self, i):
        while True:
            try:
                x, label = self.data[int(i)]
                return x, self.labels[label]
            except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:  # PIL's
                self.unreadable.add(int(i))
                tqdm.write(f"{self.data.samples[i][0]}: {error}; using the next image instead", file=sys.stderr)
                if len(self.unreadable) > len(self.data) / 1000:
                    raise OSError("--data: over 1 in 1,000 images cannot be read; remove those named above") from None
                i = (i + 1) % len(self.data)

    def load(self, args, **how):
        workers, pinned = 0 if isinstance(self.data, TensorDataset) else args.workers, torch.cuda.is_available()
        return DataLoader(self, num_workers=workers, worker_init_fn=set_up_worker, pin_memory=pinned, **how)


def transform(stage, size):
    """PIL image -> uint8 (3, size, size): random crops in stage rae, flips in later stages, neither for statistics."""
    if stage == "rae":
        return T.Compose([T.Resize(size * 3 // 2, T.InterpolationMode.BICUBIC), T.RandomCrop(size), T.PILToTensor()])
    flip = [T.RandomHorizontalFlip()] if stage != "statistics" else []
    return T.Compose([partial(center_crop, size=size), *flip, T.PILToTensor()])


def set_up_worker(worker):
    """Ctrl-C and SIGUSR1 are for the process that trains; SIGTERM is how it ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setpgrp()                                                    # torchrun sends signals to a group of processes


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
            images = [x] if hidden else [x, x.flip(2)]                                          # and its mirror image
            split[hidden][0].extend(images)
            split[hidden][1].extend([label] * len(images))
        split = [(torch.stack(images), torch.tensor(labels)) for images, labels in split]
    data = [TensorDataset(images, labels) for images, labels in split]                          # (M, 3, 32, 32), (M,)
    data[0].classes = data[1].classes = classes
    data[0].targets = split[0][1]
    return data


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
    parser = argparse.ArgumentParser(usage="train.py --toy, or --stage NAME ...", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    add, file = parser.add_argument, dict(type=os.path.normpath, metavar="CKPT")
    add("--stage", choices=TABLE["paper 256"], help="one stage (default with --toy: all in turn, then a report)")
    add("--toy", action="store_true", help="small networks, 32 x 32 images, a CPU")
    add("--resolution", type=int, default=256, choices=range(32, 2049, 16), metavar="N", help="of images (default 256)")
    add("--recipe", choices=STAGES, help="settings and order of stages (default paper; with --toy: best)")
    add("--data", type=os.path.normpath, metavar="DIR", help="folder of one folder per class (of the toy: optional)")
    add("--model", choices=MODELS, help="size of the network, or in stage rae of the decoder (default XL or toy)")
    add("--out", metavar="DIR", type=Path, help="folder of the checkpoints (default out/toy, out/photographs, out/256)")
    add("--init", **file, help="checkpoint to start the network from, or none: random weights")
    add("--teacher", **file, help="checkpoint of the velocity network, ours or published")
    add("--rae", **file, help="checkpoint with the RAE (default: that of the start)")
    add("--encoder", metavar="NAME", help="stage rae: a vision transformer of timm (default DINOv2-B)")
    add("--weights", metavar="DIR", help="folder laid out like the hub, or random for trials (default: the hub)")
    for name, meaning in FLAGS.items():
        kind = next(type(row[name]) for row in TABLE["paper 256"].values() if name in row)
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
    add("--report", nargs="+", **file, help="no training, a report on checkpoints of the toy")
    add("--dry_run", action="store_true", help="one step of everything, written to OUT/dry_run and deleted")
    args = parser.parse_args()
    args.toy = args.toy or bool(args.report)
    args.recipe = args.recipe or ("best" if args.toy else "paper")
    if not args.stage and not args.toy:
        parser.error("give --stage, or --toy")
    args.stages = [args.stage] if args.stage else STAGES[args.recipe]
    latent = [*TABLE["paper 256"]][1:]
    for flag, users in dict(init=latent, rae=latent, ref=latent, teacher=("mid", "distill"), encoder=("rae",)).items():
        if getattr(args, flag) and args.stage not in users:
            parser.error(f"--{flag} belongs to --stage {' or '.join(users)}")
    for flag in ("data", "init", "teacher", "guidance_model", "rae", "ref", "report"):
        for path in np.atleast_1d(getattr(args, flag) or "none"):
            if path not in ("none", "published") and not os.path.exists(path):
                parser.error(f"--{flag} {path}: no such file or folder")
    if not args.toy and not args.data and args.stage != "mid":
        parser.error(f"--stage {args.stage} needs images: give --data DIR with a folder of images per class")
    args.out = args.out or Path("out", ("photographs" if args.data else "toy") if args.toy else str(args.resolution))
    args.model = args.model or ("toy" if args.toy else "XL")
    args.save_every = args.save_every or (500 if args.toy else 2500)
    args.sample_every = args.sample_every or args.save_every
    args.steps = 1 if args.dry_run else args.steps
    return args


def main():
    args = parse_arguments()
    shutil.rmtree(args.out / "dry_run", ignore_errors=True) if args.dry_run else None   # of one that failed
    rank, world, device = args.where = start_processes(args.device)
    torch.backends.cuda.enable_flash_sdp(device != "cpu")           # despite its name also the CPU's, which is slow
    fast = device == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    args.precision = args.precision or ("bf16" if args.toy and fast else "fp32")
    configs = {stage: settings(stage, args, world) for stage in args.stages}    # refuses before any work
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
        if not dist.is_initialized():                               # a second one ends it at once; torchrun sends two
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, on_signal)
    for stage, c in () if args.report else configs.items():
        try:
            train(stage, args, c, None if stage == "mid" else data, stop)
        except torch.OutOfMemoryError:
            this = f"--stage {stage} --model {args.model} --resolution {args.resolution} --precision {args.precision}"
            raise SystemExit(f"{stage}: out of memory; `python test_all.py --memory {this}` tells what fits")
    if world > 1:
        dist.destroy_process_group()                                # the report is made by one process
    if reporting and rank == 0 and not stop:
        paths = args.report or [args.save_to / f"{stage}.pt" for stage in args.stages[1:]]
        fid.report(paths, data, held_out, args.save_to, device, 300 if args.dry_run else 5000 if args.report else 1000)
    if args.dry_run and rank == 0:
        shutil.rmtree(args.save_to)


if __name__ == "__main__":
    main()
