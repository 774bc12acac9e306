"""Tests of every claim of the code: against closed forms, slow loops and the real command lines. CPU, some minutes.
    python -m pytest test_all.py            # pip install pytest
    python -m pytest test_all.py -k flow    # only the tests with "flow" in their names
"""
import argparse
import copy
import fcntl
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import time
import weakref
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import timm
import torch
import torch.nn.functional as F
from PIL import EpsImagePlugin, Image
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import dit
import fid
import meanflow
import rae
import sample
import train

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)  # the tests also start processes, and more threads than cores are slower
TINY_VIT = "test_vit.r160_in1k"  # of timm, for tests: patches of 16, 64 channels, a class token, pixels in [-1, 1]

@pytest.fixture(autouse=True)
def seed_and_no_files_left(tmp_path):
    torch.manual_seed(0)
    yield
    shutil.rmtree(tmp_path)

def relative(a, b):
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())

def saved(content, path, save=torch.save):
    path.parent.mkdir(parents=True, exist_ok=True)
    save(content, path)
    return path

# --- dit.py -----------------------------------------------------------------------------------------------------------

def small_dit(average_velocity=False, hidden_size=(24, 32), depth=(2, 2), num_heads=(2, 2)):
    """Every weight is random: a fresh network is zero everywhere, which would hide mistakes."""
    net = dit.DiTDH(4, 8, hidden_size, depth, num_heads, 10, average_velocity)
    for p in net.parameters():
        p.data.normal_(0, 0.2)
    return net

@pytest.mark.parametrize("grid, average_velocity, cost", ((16, False, (838.4, 161.6)), (32, True, (840.3, 702.8))))
def test_dit_xl_has_the_published_tensors_and_the_full_cost(grid, average_velocity, cost):
    with torch.device("meta"):
        net = dit.DiTDH(grid, 768, num_classes=1000, average_velocity=average_velocity, **dit.MODELS["XL"])
        t, y = torch.ones(1), torch.zeros(1, dtype=torch.long)
        parameters, macs = dit.count(net, torch.empty(1, 768, grid, grid), t, y, t)
    assert (round(parameters / 1e6, 1), round(macs / 1e9, 1)) == cost
    shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    expected = {"pos_embed": (1, grid**2, 1152), "enc_feat_rope.freqs_cos": (grid**2, 72), "t_embedder.W": (256,),
                "dec_feat_rope.freqs_sin": (grid**2, 128), "y_embedder.embedding_table.weight": (1001, 1152),
                "x_embedder.proj.weight": (2048, 768, 1, 1), "s_embedder.proj.weight": (1152, 768, 1, 1),
                "s_projector.weight": (2048, 1152), "final_layer.linear.weight": (768, 2048),
                "blocks.27.attn.qkv.weight": (3456, 1152), "blocks.28.attn.qkv.weight": (6144, 2048),
                "blocks.29.mlp.w12.weight": (10922, 2048), "blocks.29.adaLN_modulation.1.weight": (12288, 2048)}
    assert {k: shapes.get(k) for k in expected} == expected
    assert len(shapes) == 382 + 5 * average_velocity and ("r_embedder.mlp.2.weight" in shapes) == average_velocity

def test_dit_against_a_plain_forward():
    """One image, token by token and head by head. Positions turn queries and keys as complex numbers."""
    net = small_dit(True).double().requires_grad_(False)
    p, z, time, r, y = net.state_dict(), torch.randn(8, 4, 4, dtype=torch.float64), 0.8, 0.3, 7
    linear = lambda x, name: x @ p[f"{name}.weight"].flatten(1).T + p[f"{name}.bias"]
    silu = lambda x: x / (1 + (-x).exp())
    norm = lambda x, name: x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() * p[f"{name}.weight"]
    row, column = torch.arange(16).double()[:, None] // 4, torch.arange(16).double()[:, None] % 4
    frequency = lambda num: 10000.0 ** (-torch.arange(num).double() / num)
    def embed(time, name):
        angle = 2 * math.pi * time * p[f"{name}.W"]
        return linear(silu(linear(torch.cat([angle.sin(), angle.cos()]), f"{name}.mlp.0")), f"{name}.mlp.2")
    def turn(x):
        angle = torch.cat([row * frequency(x.shape[1] // 4), column * frequency(x.shape[1] // 4)], 1)
        turned = torch.view_as_complex(x.unflatten(1, (-1, 2))) * torch.exp(1j * angle)
        return torch.view_as_real(turned).flatten(1)
    def block(x, c, name):
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(silu(c), f"{name}.adaLN_modulation.1").chunk(6, -1)
        h = norm(x, f"{name}.norm1") * (1 + scale1) + shift1
        heads = zip(*(a.chunk(2, 1) for a in linear(h, f"{name}.attn.qkv").chunk(3, 1)))        # 2 x (q, k, v)
        attended = [(turn(q) @ turn(k).T / q.shape[1] ** 0.5).softmax(1) @ v for q, k, v in heads]
        x = x + gate1 * linear(torch.cat(attended, 1), f"{name}.attn.proj")
        h = norm(x, f"{name}.norm2") * (1 + scale2) + shift2
        gate, value = linear(h, f"{name}.mlp.w12").chunk(2, 1)
        return x + gate2 * linear(silu(gate) * value, f"{name}.mlp.w3")
    embedded = embed(time, "t_embedder") + embed(time - r, "r_embedder")                        # (24,)
    c, tokens = silu(embedded + p["y_embedder.embedding_table.weight"][y]), z.flatten(1).T      # (24,), (16, 8)
    positions = torch.cat([f(axis * frequency(6)) for axis in (column, row) for f in (torch.sin, torch.cos)], 1)
    s = block(block(linear(tokens, "s_embedder.proj") + positions, c, "blocks.0"), c, "blocks.1")
    s = linear(silu(s + embedded), "s_projector")
    x = block(block(linear(tokens, "x_embedder.proj"), s, "blocks.2"), s, "blocks.3")
    shift, scale = linear(silu(s), "final_layer.adaLN_modulation.1").chunk(2, 1)
    x = linear(norm(x, "final_layer.norm_final") * (1 + scale) + shift, "final_layer.linear")
    assert relative(net(z[None], times(time), torch.tensor([y]), times(r)).flatten(2)[0].T, x) < 1e-6

def test_dit_initial_weights():
    net = dit.DiTDH(4, 48, (64, 96), (2, 2), (2, 2), 100, average_velocity=True)
    uniform = lambda p, bound: 0.8 * bound < p.abs().max() <= bound and abs(p.mean()) < 0.2 * bound
    for name, layer in net.named_modules():
        if "adaLN" in name and hasattr(layer, "weight") or name in ("final_layer.linear", "r_embedder.mlp.2"):
            assert not layer.weight.any() and not layer.bias.any(), name
        elif isinstance(layer, torch.nn.Linear):                                                # PyTorch's default
            assert uniform(layer.bias, layer.in_features**-0.5), name
            assert uniform(layer.weight, layer.in_features**-0.5) != name.startswith("t_embedder"), name
        elif isinstance(layer, torch.nn.Conv2d):                                                # Xavier
            assert uniform(layer.weight, (6 / sum(layer.weight.shape[:2])) ** 0.5) and not layer.bias.any(), name
    for layer in (net.y_embedder.embedding_table, net.t_embedder.mlp[0], net.t_embedder.mlp[2]):
        assert 0.019 < layer.weight.std() < 0.021 and layer.weight.abs().max() > 0.05           # normal
    assert 0.8 < net.t_embedder.W.std() < 1.2 and net.r_embedder.W.min() < -1                   # standard normal
    assert not net(torch.randn(2, 48, 4, 4), torch.rand(2), torch.arange(2), torch.zeros(2)).any()

def test_student_starts_as_its_teacher_and_every_weight_learns():
    teacher, z, t, y = small_dit(), torch.randn(6, 8, 4, 4), torch.rand(6), torch.arange(6)
    student = dit.student_of(teacher)
    assert torch.equal(student(z, t, y, t * torch.rand(6)), teacher(z, t, y))
    student(z, t, y, t / 2).square().sum().backward()
    still = {name for name, p in student.named_parameters() if not p.grad.any()}
    assert still == {"r_embedder.mlp.0.weight", "r_embedder.mlp.0.bias"}                        # before a zero layer

def test_checkpointing_changes_memory_and_nothing_else():
    decoder, network, t = rae.Decoder(6, 2, 8, 16, 2, 2, 40), small_dit(True), torch.tensor([0.3, 0.8])
    inputs = torch.randn(2, 8, 4, 4), t, torch.tensor([1, 2]), t / 2
    for net, inputs in ((decoder, [torch.randn(3, 6, 2, 2)]), (network, inputs)):
        gradients, kept = [], []
        for net.checkpointing in (False, True):
            sizes = []
            with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
                loss = net(*inputs).square().sum()
            gradients.append(torch.autograd.grad(loss, list(net.parameters())))
            kept.append(sum(sizes))
        assert all(torch.equal(a, b) for a, b in zip(*gradients)) and kept[1] < kept[0] / 2

def test_a_network_loads_from_its_own_checkpoint_and_from_published_weights(tmp_path):
    own = small_dit(False, (64, 64), (5, 3), (4, 2))
    contents = [(own, {"model": small_dit().state_dict(), "ema": own.state_dict(), "network": own.config})]
    for average_velocity in (False, True):
        net = small_dit(average_velocity, **dit.MODELS["toy"])
        contents += [(net, net.state_dict()), (net, {"ema": net.state_dict()}), (net, {"model": net.state_dict()})]
    z, t, y = torch.randn(3, 8, 4, 4), torch.rand(3), torch.arange(3)
    for number, (net, content) in enumerate(contents):
        loaded, read = dit.load_network(saved(content, tmp_path / f"{number}.pt"))
        assert loaded.config == net.config and read.keys() == content.keys()
        assert torch.equal(loaded(z, t, y, t / 2), net(z, t, y, t / 2))
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())

def test_a_file_without_a_usable_network_is_refused_by_name(tmp_path):
    state = small_dit().state_dict()
    diverged = {"ema": state | {"s_projector.bias": torch.full((32,), float("nan"))}, "network": small_dit().config}
    for content, problem in (({"model": published_decoder(16, 6, 4, 8, 40)}, "holds no velocity network"),
                             ({"var": torch.ones(2)}, "holds no velocity network"),
                             (state, r"widths \(24, 32\)"),
                             (diverged, "s_projector.bias is not finite")):
        with pytest.raises(SystemExit, match=f"x.pt: {problem}"):
            dit.load_network(saved(content, tmp_path / "x.pt"))

# --- meanflow.py, against flows with both velocities in closed form ---------------------------------------------------

def times(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)

def flow_of_a_mixture(weight, mean, std):
    """(v, u) in closed form. Every coordinate of a latent is drawn from the same mixture of Gaussians."""
    def mixture(z, t):
        """Distribution function and density of z_t, and the velocity E[e - x | z_t], each like z."""
        z, t = z[..., None], meanflow.expand(t, z)[..., None]
        variance, offset = ((1 - t) * std) ** 2 + t**2, z - (1 - t) * mean
        below = weight * (1 + (offset / (2 * variance).sqrt()).erf()) / 2
        mass = weight * (-offset**2 / (2 * variance)).exp() / (2 * math.pi * variance).sqrt()
        velocity = offset * (t - (1 - t) * std**2) / variance - mean                            # of each component
        return below.sum(-1), mass.sum(-1), (mass * velocity).sum(-1) / mass.sum(-1)
    def move(z, t, r):
        """z_r. On a line no path crosses another, so a point keeps its quantile."""
        quantile, low, high = mixture(z, t)[0], torch.full_like(z, -16), torch.full_like(z, 16)
        for _ in range(50):
            middle = (low + high) / 2
            below = mixture(middle, r)[0] < quantile
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        reached, density, _ = mixture(low, r)
        return low + (quantile - reached) / density                                             # carries derivatives
    def u(z, t, y, r):
        gap = meanflow.expand(t - r, z)
        return torch.where(gap == 0, v(z, t, y), (z - move(z, t, r)) / torch.where(gap == 0, 1, gap))
    v = lambda z, t, y: mixture(z, t)[2]
    return v, u

def latents(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 2, 2, dtype=torch.float64, generator=generator), torch.zeros(n, dtype=torch.long)

WEIGHT, MEAN, STD = times(0.4, 0.6), times(-1.0, 0.8), times(0.5, 0.3)
FLOWS = {"gaussian": flow_of_a_mixture(times(1.0), times(0.0), times(0.6)),
         "mixture": flow_of_a_mixture(WEIGHT, MEAN, STD)}
both_flows = pytest.mark.parametrize("v, u", FLOWS.values(), ids=FLOWS)
both_solvers = pytest.mark.parametrize("solver, order", (("euler", 1), ("heun", 2)))

@both_flows
def test_average_velocity_in_closed_form_is_the_integral_of_the_velocity(v, u):
    z, y = latents(1)
    right_side = lambda t, z: v(torch.from_numpy(z).view(1, 3, 2, 2), times(t), y).flatten().numpy()
    end = scipy.integrate.solve_ivp(right_side, (0.8, 0.1), z.flatten(), "DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
    assert relative(0.7 * u(z, times(0.8), y, times(0.1)), z - torch.from_numpy(end).view_as(z)) < 1e-11

def test_times_are_shifted_and_of_two_the_later_is_t():
    t, normal = torch.linspace(0, 1, 101, dtype=torch.float64), torch.linspace(-4, 4, 9, dtype=torch.float64)
    assert torch.allclose(meanflow.shift_time(meanflow.shift_time(t, 6.93), 1 / 6.93), t)
    assert round(float(meanflow.shift_time(torch.tensor(15 / 16), 6.93)), 3) == 0.990
    assert [round(meanflow.alpha_of(768, grid), 2) for grid in (16, 32)] == [6.93, 13.86]
    assert torch.allclose(meanflow.flow_matching_times(normal, 3.0).logit(), normal + math.log(3), rtol=1e-12)
    t, r = meanflow.mean_flow_times(torch.rand(2, 10_000), torch.arange(10_000) % 4 == 0, 5.0)
    assert (r <= t).all() and (r < t).float().mean() == 0.25 and 0 <= r.min() and t.max() <= 1
    assert abs((t + r)[::4].mean() / 2 - (1.25 - 5 / 16 * math.log(5))) < 0.01                  # of 5 t / (1 + 4 t)
    assert torch.equal(t[1::4], r[1::4]) and abs(t[1::4].mean() - t[::4].mean()) < 0.03         # the later of the two

def test_times_that_are_not_given_are_drawn_with_the_shift_and_the_share():
    seen, x = [], torch.zeros(1000, 1)
    spy = lambda z, t, *others: seen.append(t) or z                                             # model and du/dt
    meanflow.flow_matching_loss(spy, x, x, 1e3)
    meanflow.mean_flow_loss(spy, x, x, 1e3, ratio_r_not_equal_t=0.4, du_dt=spy)
    assert [round(len(t), -2) for t in seen] == [1000, 400, 1000]
    assert all(t.mean() > 0.97 for t in seen)

@both_flows
def test_total_derivative_obeys_the_mean_flow_identity(v, u):
    """u + (t - r) du/dt = v: exactly by jvp, and with an error of second order by the central difference."""
    (z, y), t = latents(64), torch.linspace(0.15, 0.98, 64, dtype=torch.float64)
    z, r = z / 2, t * torch.linspace(0, 0.9, 64, dtype=torch.float64)                           # where data are
    exact = (v(z, t, y) - u(z, t, y, r)) / meanflow.expand(t - r, z)
    derivative = lambda *how: meanflow.total_derivative(u, z, t, r, y, v(z, t, y), *how)
    assert relative(derivative("jvp"), exact) < 1e-11
    errors = [relative(derivative("fd", delta), exact) for delta in (2e-3, 1e-3)]
    assert abs(math.log2(errors[0] / errors[1]) - 2) < 0.01

def test_total_derivative_of_the_network_by_jvp_agrees_with_differences():
    net, z, y = small_dit(True).double(), torch.randn(4, 8, 4, 4, dtype=torch.float64), torch.arange(4)
    t, r = times(0.9, 0.6, 0.5, 0.3), times(0.1, 0.0, 0.4, 0.2)
    both = [meanflow.total_derivative(net, z, t, r, y, z.flip(0), method, 1e-5) for method in ("jvp", "fd")]
    assert relative(*both) < 1e-4 and not any(derivative.requires_grad for derivative in both)

@both_flows
def test_mean_flow_loss_is_zero_at_the_exact_average_velocity(v, u):
    (z, y), (noise, _) = latents(128), latents(128, seed=1)
    x = z - u(z, times(1.0), y, times(0.0))                                                     # as many data
    t = torch.linspace(0.05, 1, 128, dtype=torch.float64)
    r = t * (torch.arange(128) % 5) / 4                                                         # 0, t / 4, ... t
    mse = lambda **how: meanflow.mean_flow_loss(u, x, y, 3.0, teacher=v, t=t, r=r, noise=noise, **how)[1]["mse"]
    assert mse() < 1e-20
    errors = [mse(derivative="fd", delta=delta) for delta in (2e-3, 1e-3)]
    assert abs(math.log2(errors[0] / errors[1]) - 4) < 0.1                                # of second order, squared

@pytest.mark.parametrize("adaptive_p, derivative", ((1, "jvp"), (0.5, "fd"), (0, "jvp")))
def test_mean_flow_loss_has_the_gradient_of_the_adaptive_weighting(adaptive_p, derivative):
    """Of |u - target|^2 / w, with the target and the weight w = (|u - target|^2)^p of each sample held fixed."""
    net, (x, noise), y = small_dit(True).double(), torch.randn(2, 5, 8, 4, 4, dtype=torch.float64), torch.arange(5)
    t, r, weight = times(0.9, 0.8, 0.7, 0.6, 0.5), times(0.9, 0.1, 0.7, 0.2, 0.5), net.final_layer.linear.weight
    loss, metrics = meanflow.mean_flow_loss(net, x, y, 1.0, None, derivative, 0.02, t, r, noise, adaptive_p=adaptive_p)
    z, v = (1 - meanflow.expand(t, x)) * x + meanflow.expand(t, x) * noise, noise - x
    du_dt = meanflow.total_derivative(net, z, t, r, y, v, derivative, 0.02)
    error = (net(z, t, y, r) - (v - meanflow.expand(t - r, x) * du_dt)).square().flatten(1)
    expected = (error.sum(1) / (error.sum(1).detach() + 1e-3) ** adaptive_p).mean()
    assert relative(*(torch.autograd.grad(value, weight)[0] for value in (loss, expected))) < 1e-10
    assert metrics["mse"].item() == pytest.approx(error.mean().item(), rel=1e-10)

def test_mean_flow_at_r_equal_t_is_flow_matching():
    net, y, t = small_dit(True).double(), torch.arange(6), torch.rand(6).double()
    x, noise = torch.randn(2, 6, 8, 4, 4, dtype=torch.float64)
    mean_flow, one = meanflow.mean_flow_loss(net, x, y, 1.0, t=t, r=t.clone(), noise=noise, adaptive_p=0)
    flow, other = meanflow.flow_matching_loss(lambda z, t, y: net(z, t, y, t), x, y, 1.0, t, noise)
    assert torch.allclose(one["mse"], other["mse"], rtol=1e-14)
    for a, b in zip(*(torch.autograd.grad(loss, net.parameters()) for loss in (mean_flow, flow))):
        assert torch.allclose(a, b * x[0].numel(), rtol=1e-12, atol=1e-12)                      # a sum, not a mean
    perfect = (noise - x).requires_grad_()
    loss, _ = meanflow.mean_flow_loss(lambda *inputs: perfect, x, y, 1.0, t=t, r=t.clone(), noise=noise)
    assert not torch.autograd.grad(loss, perfect)[0].any()                                      # nor is it 0 / 0

@pytest.mark.parametrize("t, r", ((0.9, 0.2), (0.5, 0.0), (0.7, 0.7)))
def test_bootstrap_has_the_gradient_of_distillation_in_expectation(t, r):
    """E[e - x | z_t] = v, and the error is linear in v. So it holds at p = 0, where the loss is quadratic; not at 1."""
    points = [step * torch.arange(-50, 51).double() for step in (0.12, 0.16)]                   # sums exact to rounding
    x, e = torch.cartesian_prod(*points).split(1, dim=1)                                        # 2 x (10201, 1)
    density = (WEIGHT / STD * (-((x - MEAN) / STD) ** 2 / 2).exp()).sum(1, keepdim=True) * (-e**2 / 2).exp()
    weight, y = density / density.sum(), torch.arange(len(x))
    theta = times(0.7, -0.4, 1.3, 0.5, 0.9).repeat(len(x), 1).requires_grad_()                  # one for each sample
    def student(z, t, y, r):
        (a, b, c, d, f), z = theta[y].unbind(1), z[:, 0]
        return ((a * z + b * t).sin() + c * t * z + d * r * z**2 + f * (t - r))[:, None]
    def mean_gradient(teacher, adaptive_p):
        drawn = dict(t=times(t).expand(len(x)), r=times(r).expand(len(x)), noise=e)
        loss, _ = meanflow.mean_flow_loss(student, x, y, 1.0, teacher, adaptive_p=adaptive_p, **drawn)
        return (len(x) * weight * torch.autograd.grad(loss, theta)[0]).sum(0)
    assert relative(mean_gradient(FLOWS["mixture"][0], 0), mean_gradient(None, 0)) < 1e-12
    assert relative(mean_gradient(FLOWS["mixture"][0], 1), mean_gradient(None, 1)) > 0.05

@pytest.mark.parametrize("derivative, copies", (("jvp", 1), ("fd", 2)))
def test_evaluations_of_a_mean_flow_step(derivative, copies):
    """The teacher once, du/dt without a graph for the samples with r < t, the student once. All see the same labels."""
    calls, x, y, t = [], torch.randn(200, 8, 4, 4), torch.arange(200) % 11, torch.full((200,), 0.8)
    student, teacher, r = small_dit(True), small_dit(), torch.where(torch.arange(200) % 4 == 0, t / 2, t)
    note = lambda name, y: calls.append((name, torch.is_grad_enabled(), y.tolist()))
    spy = lambda name, net: lambda z, t, y, *r: note(name, y) or net(z, t, y, *r)
    loss_of = lambda *nets, **how: meanflow.mean_flow_loss(nets[0], x, y, 1.0, nets[1], noise=x, t=t, r=r, **how)[0]
    loss = loss_of(spy("student", student), spy("teacher", teacher), derivative=derivative)
    assert calls == [("teacher", False, y.tolist()), ("student", False, y[r < t].tolist() * copies),
                     ("student", True, y.tolist())]
    given = lambda z, t, r, y, v: meanflow.total_derivative(student, z, t, r, y, v, derivative)
    assert torch.equal(loss_of(student, teacher, du_dt=given), loss)

@both_flows
@both_solvers
def test_solver_order_and_number_of_evaluations(solver, order, v, u):
    (noise, y), errors, calls = latents(8), [], []
    data = noise - u(noise, times(1.0), y, times(0.0))
    counted = lambda z, t, y: calls.append(float(t[0])) or v(z, t, y)
    for steps in (50, 100):
        calls.clear()
        trajectory, points = meanflow.solve_flow(counted, noise, y, steps, 3.0, solver)
        errors.append(relative(trajectory[-1], data))
        assert len(calls) == steps * order and len(trajectory) == len(points) == steps + 1
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.15
    assert points[0] == 1 and points[-1] == 0 and calls[0] == 1 and torch.equal(trajectory[0], noise)
    last, _ = meanflow.solve_flow(counted, noise, y, 100, 3.0, solver, last_only=True)
    assert torch.equal(last, trajectory[-1:])

def test_guided_velocity_is_linear_in_the_scale():
    (net, weaker), z = (small_dit().double() for _ in range(2)), torch.randn(3, 8, 4, 4, dtype=torch.float64)
    y, no_class, t = torch.tensor([0, 1, 10]), torch.full((3,), 10), times(0.2, 0.5, 0.9)
    for guide, weak in ((None, net(z, t, no_class)), (weaker, weaker(z, t, y))):
        at = lambda w: meanflow.guided(net, w, 10, guide)(z, t, y)
        assert torch.allclose(at(1.0), net(z, t, y), rtol=1e-12) and torch.equal(at(0.0), weak)
        assert torch.allclose(at(3.5), at(0.0) + 3.5 * (at(1.0) - at(0.0)), rtol=1e-12)
    assert torch.equal(meanflow.guided(net, 3.5, 10)(z, t, y)[2], net(z, t, y)[2])              # it has no class

@both_flows
@both_solvers
def test_mid_training_targets_are_as_exact_as_the_trajectory(solver, order, v, u):
    """The published code labels the shifted points linspace(0, 1): its error stays as the steps get smaller."""
    errors, (noise, y) = [], latents(4)
    for points in (33, 65):
        pairs = torch.arange(points * (points - 1) // 2).expand(4, -1)
        _, metrics = meanflow.mid_training_loss(u, v, noise, y, 3.0, points, pairs=pairs, solver=solver)
        errors.append(metrics["mse"].item())
    assert abs(math.log2(errors[0] / errors[1]) / 2 - order) < 0.15 and errors[1] < 1e-3

def test_mid_training_pairs_carry_the_times_that_were_stepped_through():
    v, (noise, _), y, seen = FLOWS["mixture"][0], latents(16), torch.arange(16), []
    student = lambda z, t, y, r: seen.append((z, t, y, r)) or torch.zeros_like(z)
    for pairs in (torch.tensor([[0, 135]] * 16), None, None):                                   # the first and the last
        meanflow.mid_training_loss(student, v, noise, y, 6.93, pairs=pairs)
    (z, t, labels, r), (_, t1, _, r1), (_, t2, _, _) = seen
    trajectory, points = meanflow.solve_flow(v, noise, y, 16, 6.93)
    assert torch.equal(points, meanflow.shift_time(torch.linspace(1, 0, 17, dtype=torch.float64), 6.93))
    assert torch.equal(t, points[[0, 15] * 16]) and torch.equal(r, points[[1, 16] * 16]) and r[1] == 0
    assert torch.equal(z, trajectory[[0, 15]].transpose(0, 1).flatten(0, 1))
    assert labels.tolist() == [i // 2 for i in range(32)]
    assert len(t1) == 16 * 64 and (t1 > r1).all() and not torch.equal(t1, t2)                   # drawn pairs
    assert len(set(zip(t1.tolist(), r1.tolist()))) > 130                                        # of 136

@both_flows
def test_sampling_in_any_number_of_steps_lands_on_the_same_data(v, u):
    noise, y = latents(16)
    data = noise - u(noise, times(1.0), y, times(0.0))
    for steps in (1, 2, 5):
        calls = []
        got = meanflow.sample(lambda *a: calls.append(1) or u(*a), noise, y, steps)
        assert relative(got, data) < 1e-11 and len(calls) == steps
    for sampler in (meanflow.sample, lambda *a: meanflow.solve_flow(*a, alpha=1)):
        with pytest.raises(ValueError, match="at least 1"):
            sampler(u, noise, y, 0)

def test_drift_is_that_of_a_slow_loop_and_points_from_samples_to_data():
    s, data, samples = torch.randn(2, 3, 5).double(), torch.randn(2, 4, 5).double(), torch.randn(2, 4, 5).double()
    samples[:, :3] = s                                                                          # each without itself
    V = meanflow.drift(s, data, samples, 0.3)
    for k, i in np.ndindex(2, 3):
        width = 0.3 * np.mean([(a - b).norm() for a in s[k] for b in data[k]])
        means = []
        for points in (data[k], [q for j, q in enumerate(samples[k]) if j != i]):
            weights = [math.exp(-(s[k, i] - point).norm() / width) for point in points]
            means.append(sum(w * point for w, point in zip(weights, points)) / sum(weights))
        assert relative(V[k, i], means[0] - means[1]) < 1e-10
    assert meanflow.drift(s, samples, samples.flip(1), 0.3).abs().max() < 1e-15                 # both sets are alike
    moved = meanflow.drift(s + 7, data.flip(1) + 7, samples.roll(1, 1) + 7, 0.3)                # and in another order
    assert relative(moved, V) < 1e-10
    at = lambda x: torch.tensor([[[x, 0.0]]], dtype=torch.float64)
    by_hand = meanflow.drift(at(0), at(3), torch.cat([at(0), at(-1)], 1), 0.05)                 # to 3, away from -1
    assert torch.equal(by_hand, at(4))

def test_drift_loss_has_the_drift_as_its_gradient_and_keeps_classes_apart():
    calls, y, noise, x = [], torch.tensor([0, 1]), torch.randn(2, 6, 2, 2, 2), torch.randn(2, 6, 2, 2, 2)
    shift = torch.zeros(4, 2, 2, 2, requires_grad=True)
    def student(e, t, y, r):
        calls.append((torch.is_grad_enabled(), y.tolist(), t.unique().tolist(), r.unique().tolist()))
        return e / 2 - (shift if torch.is_grad_enabled() else 0)                                # s = e / 2 + shift
    loss, metrics = meanflow.drift_loss(student, x, y, noise, with_grad=2, reencode=lambda z: 0.8 * z.flip(1))
    loss.backward()
    assert calls == [(grad, [0, 0, 1, 1], [1], [0]) for grad in (True, False, False)]           # M = 6 in parts of 2
    samples = (noise / 2).flatten(2)                                                            # (B, M, D)
    V = meanflow.drift(samples[:, :2], x.flatten(2), samples, 0.05)
    unit, s = V / V.square().mean(2, keepdim=True).sqrt(), noise[:, :2] / 2
    expected = -2 * (unit.view(s.shape) + 0.8 * s.flip(2) - s) / s.numel()
    assert relative(shift.grad, expected.reshape(4, 2, 2, 2)) < 1e-5
    assert torch.isclose(metrics["mse"], V.square().mean())
    assert meanflow.drift_loss(student, x, y, noise, with_grad=2)[0].item() == pytest.approx(1, rel=1e-4)

def test_drifting_points_of_the_demo_get_nearer_to_the_data():
    student, noise, y = meanflow.MLP(), torch.randn(4000, 2), torch.zeros(4000)
    before = meanflow.fit(meanflow.sample(student, noise, y))
    loss_of = lambda u: meanflow.drift_loss(u, meanflow.checkerboard(1, 256), y[:1], torch.randn(1, 256, 2), 64)
    student = meanflow.train_demo("drift", student, loss_of, 60, 3e-3)
    after = meanflow.fit(meanflow.sample(student, noise, y))
    assert after[0] > before[0] + 0.1 and after[1] < before[1] - 0.1

def test_autocast_keeps_the_students_gradient_and_its_derivative():
    gradients, x, t, net = [], torch.randn(8, 8, 4, 4), torch.linspace(0.2, 0.9, 8), small_dit(True)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):                            # as in train.py
        both = [meanflow.total_derivative(net, x, t, t / 2, torch.arange(8), x.flip(0), how) for how in ("jvp", "fd")]
    assert relative(*both) < 0.1
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled, cache_enabled=False):               # as in train.py
            loss, _ = meanflow.mean_flow_loss(net, x, torch.arange(8), 1.0, t=t, r=t / 2, noise=x.flip(0))
        gradients.append(torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, net.parameters())]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99

# --- rae.py -----------------------------------------------------------------------------------------------------------

def small_rae(encoder="toy"):
    size, channels, weights = (32, 8, None) if encoder == "toy" else (64, 64, "random")
    decoder = rae.Decoder(channels, 4, size // 4, hidden_size=16, depth=1, num_heads=2, mlp_hidden=32)
    mean, var = torch.randn(channels, 4, 4), torch.rand(channels, 4, 4) + 0.5
    return rae.RAE(rae.Encoder(encoder, size, channels, weights), decoder, mean, var).eval()

def published_decoder(d, c, tokens, patch, hidden):
    """Random tensors under the names of a published decoder of one block."""
    layers = {"attention.attention.query": (d, d), "attention.attention.key": (d, d), "attention.output.dense": (d, d),
              "attention.attention.value": (d, d), "intermediate.dense": (hidden, d), "output.dense": (d, hidden),
              "layernorm_before": (d,), "layernorm_after": (d,)}
    shapes = {"decoder_embed": (d, c), "decoder_norm": (d,), "decoder_pred": (3 * patch**2, d)}
    shapes |= {f"decoder_layers.0.{name}": shape for name, shape in layers.items()}
    p = {"decoder_pos_embed": torch.randn(1, tokens + 1, d), "trainable_cls_token": torch.randn(1, 1, d)}
    for name, shape in shapes.items():
        p |= {f"{name}.weight": 0.3 * torch.randn(shape), f"{name}.bias": 0.3 * torch.randn(shape[0])}
    return p

def test_published_decoder_against_a_plain_forward():
    d, c, layer, z = 16, 6, "decoder_layers.0.", torch.randn(1, 6, 2, 2)
    p, decoder = published_decoder(d, c, 4, 8, 40), rae.Decoder(c, 2, 8, d, 1, 2, 40)
    decoder.load_state_dict(rae.convert_decoder(p))
    linear = lambda x, name: x @ p[f"{name}.weight"].T + p[f"{name}.bias"]
    norm = lambda x, name: F.layer_norm(x, (d,), p[f"{name}.weight"], p[f"{name}.bias"], eps=1e-12)
    x = torch.cat([p["trainable_cls_token"][0], linear(z[0].flatten(1).T, "decoder_embed")])
    x = x + p["decoder_pos_embed"][0]                                                           # (5, d)
    h, names = norm(x, f"{layer}layernorm_before"), ("query", "key", "value")
    q, k, v = (linear(h, f"{layer}attention.attention.{name}").view(5, 2, 8).transpose(0, 1) for name in names)
    attended = ((q @ k.transpose(1, 2) / 8**0.5).softmax(-1) @ v).transpose(0, 1).flatten(1)    # (5, d)
    x = x + linear(attended, f"{layer}attention.output.dense")
    h = linear(norm(x, f"{layer}layernorm_after"), f"{layer}intermediate.dense")
    x = x + linear(h * (1 + torch.erf(h / 2**0.5)) / 2, f"{layer}output.dense")                 # GELU
    x = linear(norm(x, "decoder_norm"), "decoder_pred")[1:]                                     # (4, 192)
    image = torch.cat([torch.cat([*row.view(2, 8, 8, 3)], 1) for row in x.split(2)]).permute(2, 0, 1)
    std, mean = (torch.tensor(a).view(3, 1, 1) for a in ((0.229, 0.224, 0.225), (0.485, 0.456, 0.406)))
    assert relative(decoder(z)[0], image * std + mean) < 1e-5

@pytest.mark.parametrize("grid", (16, 32))
def test_decoder_xl_has_the_published_tensors(grid):
    with torch.device("meta"):
        decoder, d = rae.Decoder(768, grid, 16, **rae.DECODERS["XL"]), 1152
    shapes = {key: tuple(value.shape) for key, value in decoder.state_dict().items()}
    expected = {"cls_token": (1, 1, d), "pos_embed": (1, grid**2 + 1, d), "embed.weight": (d, 768), "norm.bias": (d,),
                "head.weight": (768, d), "blocks.27.norm1.weight": (d,), "blocks.0.attn.qkv.weight": (3 * d, d),
                "blocks.0.mlp.fc1.weight": (4096, d), "blocks.27.mlp.fc2.weight": (d, 4096)}
    assert {key: shapes.get(key) for key in expected} == expected and len(shapes) == 2 + 2 * (3 + 28 * 6)

def test_published_rae_from_a_folder_laid_out_like_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(rae.DECODERS, "XL", dict(hidden_size=16, depth=1, num_heads=2, mlp_hidden=40))
    hub, var, z = tmp_path / "nyu-visionx/RAE-collections", torch.rand(768, 16, 16) + 0.5, torch.randn(1, 768, 16, 16)
    saved({"model": published_decoder(16, 768, 256, 16, 40)}, hub / "decoders/dinov2/wReg_base/ViTXL_n08/model.pt")
    saved({"var": var}, hub / "stats/dinov2/wReg_base/imagenet1k/stat.pt")                      # perhaps without a mean
    model = rae.published_rae(256, tmp_path)
    assert model.encoder is None and (model.latent_shape, model.image_size) == ((768, 16, 16), 256)
    assert torch.equal(model.decode(z), model.decoder(z * (var + 1e-5).sqrt()))

def test_a_published_file_that_cannot_be_fetched_is_named(tmp_path, monkeypatch):
    offline = lambda *args, **options: open(tmp_path / "none")                                  # an OSError
    monkeypatch.setattr(rae, "hf_hub_download", offline)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    for read, problem in (
            (lambda: rae.published_rae(512), "nyu-visionx/RAE-collections decoders/.*_i512/model.pt.*--weights"),
            (lambda: rae.timm_network(TINY_VIT), f"timm/{TINY_VIT} model.safetensors.*--weights"),
            (lambda: rae.fetch(rae.LPIPS_FILE, rae.LPIPS_URL), "https://.*vgg.pth lpips-vgg.*--weights"),
            (lambda: rae.published_rae(256, tmp_path), f"{tmp_path}/.*/model.pt: no such file"),
            (lambda: rae.timm_network(TINY_VIT, tmp_path), "model.safetensors: no such file")):
        with pytest.raises(SystemExit, match=problem):
            read()

@pytest.mark.parametrize("encoder", ("toy", TINY_VIT))
def test_rae_encodes_normalised_latents_and_packs_into_a_file(encoder, tmp_path):
    model = small_rae(encoder)
    images, packed = torch.rand(5, 3, model.image_size, model.image_size), model.packed()
    z, raw = model.encode(images), model.encoder(images)
    assert raw.mean(1).abs().max() < 1e-5                                                       # a norm over channels
    assert torch.allclose(z * (model.var + 1e-5).sqrt() + model.mean, raw, atol=1e-5)
    assert torch.allclose(model.decode(z), model.decoder(raw), atol=1e-5)
    assert any(name.startswith("encoder.") for name in packed["state"]) == (encoder == "toy")
    again = rae.load_rae(saved(dict(rae=packed), tmp_path / "x.pt"))
    assert (again.encoder is None) == (encoder != "toy") and again.latent_shape == model.latent_shape
    assert torch.equal(again.fetch_encoder("random").encode(images), z)
    assert torch.equal(again.decode(z), model.decode(z))
    packed["state"]["mean"][0, 0, 0] = float("inf")
    for content, problem in ((dict(step=3), "holds no RAE"), (dict(rae=packed), "mean is not finite")):
        with pytest.raises(SystemExit, match=f"y.pt: {problem}"):
            rae.load_rae(saved(content, tmp_path / "y.pt"))

def test_encoder_against_a_plain_forward_of_timm(tmp_path):
    state = timm.create_model(TINY_VIT).state_dict() | {"norm.weight": torch.rand(64)}
    net = timm.create_model(TINY_VIT, img_size=64).eval()
    saved(state, tmp_path / "timm" / TINY_VIT / "model.safetensors", save_file)
    images, encoder = torch.rand(2, 3, 96, 96), rae.Encoder(TINY_VIT, 64, weights=tmp_path)
    old = state["pos_embed"][:, 1:].transpose(1, 2).unflatten(2, (10, 10))                      # for images of 160
    new = F.interpolate(old, (4, 4), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    net.load_state_dict(state | dict(pos_embed=torch.cat([state["pos_embed"][:, :1], new], 1)))
    net.norm = torch.nn.LayerNorm(64, eps=1e-6, elementwise_affine=False)
    expected = net.forward_features(F.interpolate(2 * images - 1, (64, 64), mode="bicubic"))
    assert relative(encoder(images).flatten(2).transpose(1, 2), expected[:, 1:]) < 1e-5         # no class token
    assert not encoder.net.training and not any(p.requires_grad for p in encoder.parameters())
    dinov2 = rae.Encoder(image_size=112, weights="random")                                      # 7 patches of 14
    assert dinov2.input_size == 98 and dinov2(images).shape == (2, 768, 7, 7)

def test_read_image_opens_few_formats_in_8_bits(tmp_path, monkeypatch):
    for mode, kind in (("L", "png"), ("1", "png"), ("CMYK", "jpg"), ("RGBA", "png"), ("P", "bmp"), ("RGB", "webp")):
        Image.new(mode, (50, 33)).save(tmp_path / f"x.{kind}")
        assert rae.read_image(tmp_path / f"x.{kind}").mode == "RGB"
    Image.new("I;16", (9, 9)).save(tmp_path / "x.png")
    with pytest.raises(OSError, match="not 8-bit"):
        rae.read_image(tmp_path / "x.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "x.jpg", "EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)                                    # a call: TypeError
    with pytest.raises(OSError):
        rae.read_image(tmp_path / "x.jpg")
    Image.fromarray(np.uint8(abs(np.arange(20_000) - 9999.5) < 4)[None]).save(tmp_path / "x.png")   # of a sliver
    assert np.array_equal(rae.read_image(tmp_path / "x.png"), np.ones((1, 8, 3)))                # the middle is read

def test_center_crop_is_that_of_adm():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 129, 3), np.uint8))
    halved = image.resize((64, 150), Image.Resampling.BOX).resize((32, 75), Image.Resampling.BOX)
    assert np.array_equal(np.asarray(rae.center_crop(image, 32)), np.asarray(halved)[21:53])
    assert rae.center_crop(image.crop((0, 0, 50, 40)), 32).size == (32, 32)

class Hostile:
    def __reduce__(self):  # what unpickling it does
        return os.mkdir, ("evidence",)

def test_reading_a_file_runs_no_code_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, read in (("x.pt", dit.load_file),
                       (f"timm/{TINY_VIT}/model.safetensors", lambda path: rae.timm_network(TINY_VIT, tmp_path))):
        with pytest.raises(Exception):
            read(saved([torch.ones(2), Hostile()], tmp_path / name))
    assert "evidence" not in os.listdir()

def test_timm_network_knows_the_names_of_timm_alone(tmp_path, monkeypatch):
    assert torch.equal(*(rae.timm_network(TINY_VIT, "random").head.weight for _ in range(2)))
    monkeypatch.setattr(timm, "create_model", None)
    for name in ("hf-hub:someone/model", "local-dir:.", "timm/vit_base_patch16_224", f"{TINY_VIT}9", "vit_*", ""):
        with pytest.raises(SystemExit, match="no model of timm"):
            rae.timm_network(name, tmp_path)

def test_perceptual_distance_is_lpips(tmp_path, monkeypatch):
    vgg, (a, b), expected, sizes = rae.timm_network("vgg16.tv_in1k", "random"), torch.rand(2, 2, 3, 32, 32), 0, []
    heads = [torch.rand(1, width, 1, 1) for width in (64, 128, 256, 512, 512)]
    saved({f"lin{i}.model.1.weight": head for i, head in enumerate(heads)}, tmp_path / "lpips-vgg-a78928a0.pth")
    monkeypatch.setattr(rae, "timm_network", lambda *key: vgg)                                  # 0.5 GB as a file
    perceptual = rae.PerceptualDistance(tmp_path)
    shift, scale = (torch.tensor(c).view(3, 1, 1) for c in ((-0.03, -0.088, -0.188), (0.458, 0.448, 0.45)))
    x, y = ((2 * images - 1 - shift) / scale for images in (a, b))
    for stage, head in zip(perceptual.stages, heads):
        x, y = stage(x), stage(y)
        unit = [f / f.square().sum(1, keepdim=True).sqrt().clamp_min(1e-10) for f in (x, y)]
        expected = expected + (head * (unit[0] - unit[1]).square()).sum(1).mean((1, 2))
        sizes.append((x.shape[1], x.shape[2]))
        assert isinstance(stage[-1], torch.nn.ReLU)
    assert sizes == [(64, 32), (128, 16), (256, 8), (512, 4), (512, 2)]
    assert relative(perceptual(a, b), expected) < 1e-5 and perceptual(a, a).abs().max() == 0
    black = torch.zeros(1, 3, 32, 32, requires_grad=True)
    assert torch.autograd.grad(perceptual(black, a[:1]), black)[0].isfinite().all()

def test_adversarial_loss_pulls_as_hard_as_its_weight_says():
    """The decoder's only weights w are the colour of its image: L1, GAN and LPIPS each pull at one of the three."""
    image_of = lambda colour: colour.view(1, 3, 1, 1).expand(1, 3, 2, 2)
    images, w = image_of(torch.tensor([1.0, 0, 0])), torch.zeros(3, requires_grad=True)
    def gradient(slope, **options):
        judge = lambda reconstruction: slope * reconstruction[:, 1].flatten(1) + 2              # logits (1, 4)
        loss, metrics = rae.reconstruction_loss(image_of(w), images, discriminator=judge, last_layer=w, **options)
        return loss.item() - 1 / 3, metrics, torch.autograd.grad(loss, w)[0].tolist()           # L1 is 1/3
    # d L1 / dw = (-1/3, 0, 0), as |.| has slope 0 at 0. d GAN / dw = (0, -5, 0), so the ratio of the norms is 1/15.
    loss, metrics, grad = gradient(5, adversarial_weight=0.75)
    assert metrics["gan_weight"].item() == pytest.approx(0.75 / 15, rel=1e-5) and loss == pytest.approx(-2 * 0.75 / 15)
    assert grad == pytest.approx([-1 / 3, -0.25, 0]) and metrics["psnr"].item() == pytest.approx(10 * math.log10(3))
    lpips = lambda a, b: (a[:, 2] - 3).mean((1, 2)) + 7
    loss, metrics, grad = gradient(5, adversarial_weight=1.0, perceptual=lpips, perceptual_weight=2.0)
    length = (4 + 1 / 9) ** 0.5                                                                 # of (-1/3, 0, 2)
    assert metrics["lpips"] == 4 and loss == pytest.approx(8 - 2 * length / 5)
    assert grad == pytest.approx([-1 / 3, -length, 2])
    loss, metrics, grad = gradient(0, adversarial_weight=0.5)                                   # the weight has a bound
    assert metrics["gan_weight"] == pytest.approx(0.5e4) and loss == pytest.approx(-1e4)
    assert grad == pytest.approx([-1 / 3, 0, 0])

def test_discriminator_against_a_plain_forward():
    """Five heads read the patch tokens of blocks 11, 2, 5, 8 and 11, without the class token and the last norm."""
    judge, images, expected = rae.Discriminator(32, "random").eval(), torch.rand(2, 3, 36, 36), []
    place = ((torch.arange(32) + 0.5) * 36 / 32 - 0.5)[:, None]                                 # in the image of 36
    matrix = (1 - (place - torch.arange(36)).abs()).clamp_min(0)                                # (32, 36): bilinear
    for p in judge.heads.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x = judge.net._pos_embed(judge.net.patch_embed((matrix @ images @ matrix.T - rae.IMAGENET_MEAN) / rae.IMAGENET_STD))
    tokens = [x := block(x) for block in judge.net.blocks]
    for (one, nine, logit), number in zip(judge.heads, (11, 2, 5, 8, 11)):
        for x in tokens[number][:, 1:]:                                                         # (N, D) of an image
            for (convolution, norm, _), reach in ((one, 0), (nine, 4)):
                shifted = [x.roll(reach - i, 0) @ convolution.weight[:, :, i].T for i in range(2 * reach + 1)]
                h = sum(shifted) + convolution.bias
                h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-6).sqrt() * norm.weight + norm.bias
                h = torch.where(h > 0, h, 0.2 * h)
                x = (x + h) / 2**0.5 if reach else h
            expected.append(x @ logit.weight[0, :, 0] + logit.bias)                             # (N,)
    assert relative(judge(images), torch.stack(expected).view(5, 2, 16).transpose(0, 1).flatten(1)) < 1e-4
    assert {name.split(".")[0] for name, p in judge.named_parameters() if p.requires_grad} == {"heads"}

def test_augment():
    images, columns = torch.rand(2, 3, 32, 32), ("down", "across", "brightness", "saturation", "contrast")
    of = lambda **changed: rae.augment(images, torch.tensor([[changed.get(name, 0.5) for name in columns]] * 2))
    close = lambda a, b: torch.allclose(a, b, atol=1e-6)
    mean, moved = images.mean((1, 2, 3), keepdim=True), of(down=0.0, across=0.999)              # 4 lower, 4 to the left
    assert close(of(), images) and close(of(brightness=0.0), images - 0.25)
    assert close(of(saturation=0.0), images.mean(1, keepdim=True).expand_as(images))
    assert close(of(contrast=0.2), mean + 0.7 * (images - mean))
    assert close(moved[:, :, 4:, :-4], images[:, :, :-4, 4:])
    assert (moved[:, :, :4] == 0.5).all() and (moved[..., -4:] == 0.5).all()
    assert close(of(down=0.0, across=0.999, brightness=0.0), moved - 0.25)                      # the border as well
    uniform = torch.rand(2, 5)
    assert close(rae.augment(images, uniform)[1:], rae.augment(images[1:], uniform[1:]))        # each by its own row

def test_adversary_learns_the_hinge_loss_from_decoded_images_of_8_bits():
    adversary, shown = rae.Adversary(32, "random", "cpu"), []
    logits = torch.tensor([[2.0, 0.5], [-3.0, 0.5]], requires_grad=True)                        # real, decoded
    adversary.discriminator = lambda both: shown.append(both) or logits
    images, z, half = torch.rand(1, 3, 32, 32), 3 * torch.rand(1, 3, 32, 32) - 1, torch.full((1, 10), 0.5)
    metrics = adversary.learn(images, lambda z: z, z, half, share=0.5)
    assert metrics["d_loss"] == ((0 + 0.5) / 2 + (0 + 1.5) / 2) / 2 and metrics["d_accuracy"] == 0.75
    assert logits.grad.tolist() == [[0, -0.125], [0, 0.125]]
    assert torch.allclose(shown[0], torch.cat([images, (255 * z).round().clamp(0, 255) / 255]), atol=1e-6)
    adversary = rae.Adversary(32, "random", "cpu")                                              # judges images alone
    adversary.judge(images.requires_grad_(), half[:, :5]).sum().backward()
    assert images.grad.any() and all(p.grad is None and p.requires_grad for p in adversary.heads.parameters())

# --- fid.py: expectations come from a closed form, from scipy, or from a slow loop over the definition ----------------

def test_frechet_distance_is_that_of_scipys_matrix_root():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 60)) @ rng.normal(size=(60, 60)), rng.normal(size=(400, 60)) + 0.3
    s, t, d = np.cov(x.T), np.cov(y.T), x.mean(0) - y.mean(0)
    expected = d @ d + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)
    assert fid.frechet_distance(x.mean(0), torch.from_numpy(s), y.mean(0), t) == pytest.approx(expected, rel=1e-8)
    with pytest.raises(ValueError, match="NaN"):
        fid.frechet_distance(x.mean(0) * np.nan, s, y.mean(0), t)

@pytest.mark.parametrize("dims, n1, n2", [(50, 10, 200), (50, 60, 60), (200, 50, 75), (200, 175, 1000)])
@pytest.mark.parametrize("decay", [0, -3, -6])
def test_frechet_distance_of_any_rank_is_the_nuclear_norm(dims, n1, n2, decay):
    """With S = X^T X, the trace of the root of S1 S2 is the nuclear norm of X1 X2^T."""
    rng = np.random.default_rng(2)
    left, right = (np.linalg.qr(rng.normal(size=(dims, dims)))[0] for _ in range(2))
    x, y = (rng.normal(size=(n, dims)) @ (left * np.logspace(0, decay, dims) @ right) for n in (n1, n2))
    x, y = (x - x.mean(0)) / (n1 - 1) ** 0.5, (y - y.mean(0)) / (n2 - 1) ** 0.5
    expected = (x**2).sum() + (y**2).sum() - 2 * np.linalg.svd(x @ y.T, compute_uv=False).sum()
    value = fid.frechet_distance(np.zeros(dims), x.T @ x, np.zeros(dims), y.T @ y)
    assert value == pytest.approx(expected, rel=1e-8 if min(n1, n2) > dims else 1e-5)

def test_mean_and_covariance_are_numpys_in_any_batches_and_order():
    x = 0.4 + 0.3 * torch.randn(301, 12, generator=torch.Generator().manual_seed(0)).abs()     # like Inception's
    for batches in ([x], x.split(7), x.flip(0).split(50)):
        with torch.autocast("cpu", torch.bfloat16):
            extractor = fid.Extractor(lambda x: dict(pool=x), "identity", 12)
            moments, features = fid.measure(extractor, batches, "cpu", keep=("pool",))
        np.testing.assert_allclose(moments["pool"][0], x.double().numpy().mean(0), rtol=1e-9)
        np.testing.assert_allclose(moments["pool"][1], np.cov(x.double().numpy().T), rtol=1e-9, atol=1e-12)
        assert torch.equal(features["pool"], torch.cat([*batches]))

@pytest.mark.parametrize("height, width, size", [(5, 9, 13), (13, 8, 5), (7, 7, 7)])
def test_resize_is_tensorflow_1s(height, width, size):
    """Pixel i is the linear interpolation at i * length / size, at most the last pixel."""
    def weights(length):
        position = np.minimum(np.arange(size) * length / size, length - 1)
        return np.maximum(0, 1 - abs(position[:, None] - np.arange(length)))                    # (size, length)
    image = np.random.default_rng(0).uniform(0, 255, (height, width))
    result = fid.resize_tensorflow1(torch.from_numpy(image)[None, None], size)
    np.testing.assert_allclose(result[0, 0].numpy(), weights(height) @ image @ weights(width).T, rtol=1e-4)

def test_inception_has_the_published_tensors_and_the_pooling_of_2015(tmp_path):
    net, seen = fid.Inception(), {}
    state = net.state_dict()
    for weight in state.values():
        if weight.dim() == 4:
            torch.nn.init.kaiming_normal_(weight)           # torch's default loses the signal in 90 layers
    assert len(state) == 566 and sum(v.numel() for v in state.values()) == 23885486             # of INCEPTION_FILE
    for name in ("Mixed_5b", "Mixed_5b.branch_pool", "Mixed_7c", "Mixed_7c.branch_pool", "Mixed_6e"):
        net.get_submodule(name).register_forward_hook(lambda _, inputs, out, name=name: seen.update({name: inputs[0]}))
    out = net(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    assert {k: tuple(v.shape) for k, v in out.items()} == dict(pool=(2, 2048), spatial=(2, 2023), logits=(2, 1008))
    assert all(v.isfinite().all() and v.std() > 0 and v.dtype == torch.float32 for v in out.values())
    assert torch.equal(out["spatial"].view(2, 17, 17, 7)[:, 3, 5], seen["Mixed_6e"][:, :7, 3, 5])
    torch.testing.assert_close(out["logits"], out["pool"] @ net.fc.weight.T)                    # no bias
    corner = seen["Mixed_5b"][..., :2, :2]                  # a pixel in the corner has four neighbours, not nine
    torch.testing.assert_close(seen["Mixed_5b.branch_pool"][..., 0, 0], corner.mean((2, 3)))
    assert torch.equal(seen["Mixed_7c.branch_pool"][..., 0, 0], seen["Mixed_7c"][..., :2, :2].amax((2, 3)))
    torch.save(state, tmp_path / fid.INCEPTION_FILE)
    file, folder = (fid.make_extractor(weights=path) for path in (tmp_path / fid.INCEPTION_FILE, str(tmp_path)))
    net.fc.bias += 1
    assert file.name == folder.name != "inception-" + fid.fingerprint(net)

def test_inception_score_and_precision_and_recall_are_those_of_loops():
    rng = np.random.default_rng(0)
    logits, scores = rng.normal(size=(23, 6)) * 2, []
    for part in (logits[:10], logits[10:20], logits[20:], logits):
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        scores.append(np.exp(np.mean([sum(row * np.log(row / p.mean(0))) for row in p])))
    expected = pytest.approx((np.mean(scores[:3]), scores[3]), rel=1e-10)
    assert fid.inception_score(torch.from_numpy(logits), 10) == expected
    def inside(points, manifold):
        radii = [sorted(np.linalg.norm(manifold - m, axis=1))[3] for m in manifold]             # the zeroth is m itself
        return np.mean([any(np.linalg.norm(manifold - point, axis=1) <= radii) for point in points])
    a, b = rng.normal(size=(40, 3)), rng.normal(size=(50, 3)) + 1
    precision, recall = inside(a, b), inside(b, a)
    assert precision != recall and max(precision, recall) < 1
    assert fid.precision_recall(torch.from_numpy(a), torch.from_numpy(b), chunk=7) == pytest.approx((precision, recall))

def test_features_of_dino_are_those_of_images_that_pil_resizes(monkeypatch):
    monkeypatch.setattr(fid, "DINO", TINY_VIT)
    extractor = fid.make_extractor("dino", "random")
    images = np.random.default_rng(0).integers(0, 256, (3, 300, 260, 3), dtype=np.uint8)
    net = rae.timm_network(TINY_VIT, "random", img_size=224)
    digest = fid.fingerprint(net)
    net.reset_classifier(0)
    resized = [np.array(Image.fromarray(x).resize((224, 224), Image.Resampling.BICUBIC)) for x in images]
    expected = net((torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
    found = extractor.extract(torch.from_numpy(images).permute(0, 3, 1, 2))["pool"]
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert extractor.name == f"dino-{digest}" and extractor.dims == expected.shape[1]

@pytest.fixture
def fid_files(tmp_path, monkeypatch):
    """A current folder with inputs of all kinds. The extractor is three channel means: few images are enough."""
    means = lambda x: x.float().mean((2, 3))
    extract = lambda x: dict(pool=means(x), spatial=2 * means(x), logits=means(x) / 50)
    monkeypatch.setattr(fid, "make_extractor", lambda *_: fid.Extractor(extract, "inception-test", 3))
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (25, 8, 8, 3), dtype=np.uint8)
    for folder in ("empty", "folder/png", "folder/bmp", "elsewhere"):
        Path(folder).mkdir(parents=True)
    Path("folder/link").symlink_to(tmp_path / "elsewhere")
    for i, image in enumerate(images):
        Image.fromarray(image).save(("folder/png/{}.png", "folder/bmp/{}.bmp", "folder/link/{}.png")[i % 3].format(i))
    recorded = dict(mu=np.zeros(3), sigma=np.eye(3), mu_s=np.ones(3), sigma_s=2 * np.eye(3))    # ADM's names
    for name, content in dict(images=dict(arr_0=images), half=dict(arr_0=images // 2), float=dict(arr_0=images / 255),
                              few=dict(arr_0=images[:3]), recorded=recorded, adm=dict(arr_0=images // 2, **recorded),
                              another=dict(extractor="another-12345678", **recorded)).items():
        (np.savez_compressed if name == "half" else np.savez)(f"{name}.npz", **content)
    return images

def test_scores_of_files_are_those_of_the_definitions(fid_files, capsys):
    x, y = (a.mean((1, 2), dtype=np.float32).astype(np.float64) for a in (fid_files, fid_files // 2))
    split, whole = fid.inception_score(torch.from_numpy(x) / 50)
    manifold = dict(zip(("precision", "recall"), fid.precision_recall(torch.from_numpy(x), torch.from_numpy(y))))
    distance = fid.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    measured = dict(fid=distance, sfid=4 * distance, inception_score=split, inception_score_all=whole)
    recorded = measured | dict(fid=fid.frechet_distance(x.mean(0), np.cov(x.T), np.zeros(3), np.eye(3)),
                               sfid=fid.frechet_distance(2 * x.mean(0), 4 * np.cov(x.T), np.ones(3), 2 * np.eye(3)))
    fid.main("stats half.npz --out made.npz --device cpu".split())
    assert "inception-test" in capsys.readouterr().out
    for reference, expected in {"half.npz": measured | manifold, "made.npz": measured, "recorded.npz": recorded,
                                "adm.npz": recorded | manifold}.items():
        expected = expected | dict(extractor="inception-test")
        for samples in ("images.npz", "folder"):
            assert fid.Scorer(reference)(samples) == pytest.approx(expected)
        fid.main(["images.npz", reference, "--device", "cpu"])
        assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == expected.keys()

@pytest.mark.parametrize("arguments, message", [
    ("missing images.npz", "missing: no such file"), ("empty images.npz", "empty: no image"),
    ("float.npz images.npz", "float.npz: arr_0 is float64"), ("images.npz few.npz", "3 images for 3 features"),
    ("images.npz another.npz", "another.npz: neither images nor statistics of inception-test"),
    ("stats images.npz", "--out"), ("stats images.npz --out images.npz", "--out")])
def test_bad_input_of_fid_is_refused_in_one_line_and_stays_as_it_was(fid_files, arguments, message):
    before = Path("images.npz").read_bytes()
    with pytest.raises(SystemExit, match=message) as refusal:
        fid.main([*arguments.split(), "--device", "cpu"])
    assert "\n" not in str(refusal.value) and Path("images.npz").read_bytes() == before

def test_scores_of_two_processes_and_of_batches_are_those_of_one_process(fid_files):
    def work(rank):
        for command in ("half.npz images.npz --json", "folder images.npz --json", "stats images.npz --out made.npz"):
            fid.main([*command.split(), "--device", "cpu"])
        share = torch.from_numpy(fid_files // 2).permute(0, 3, 1, 2)[(0, 11)[rank]:(11, 25)[rank]]
        print(json.dumps(fid.Scorer("images.npz", rank=rank, world=2)(share.split(4))))
    assert finish(Path(), start(Path(), work, world=2))[0] == [0, 0]
    printed = [Path(f"rank{rank}.txt").read_text().splitlines() for rank in range(2)]
    (*lines, third), (fourth,) = ([line for line in lines if line.startswith("{")] for lines in printed)
    half, folder = (fid.Scorer("images.npz")(samples) for samples in ("half.npz", "folder"))
    for line, expected in zip((*lines, third, fourth), (half, folder, half, half), strict=True):
        for name, score in json.loads(line).items():
            assert score == expected[name] or score == pytest.approx(expected[name], rel=1e-9)
    assert len(half) == 7 and fid.Scorer("made.npz")("half.npz")["fid"] == pytest.approx(half["fid"], rel=1e-9)

# --- sample.py --------------------------------------------------------------------------------------------------------

@pytest.fixture
def sample_run(tmp_path, monkeypatch):
    """sample.py in a folder of checkpoints -> number of evaluations of the network, those of an image added up."""
    monkeypatch.chdir(tmp_path)
    for name in ("student", "teacher", "nan"):
        torch.manual_seed(0)
        network, autoencoder = small_dit(name != "teacher"), small_rae()
        state = network.state_dict()
        state["final_layer.linear.bias"][0] = np.nan if name == "nan" else 0
        torch.save(dict(stage="mid", step=4, classes=tuple("abcdefghij"), alpha=2.5, model=state, ema=state,
                        network=network.config, rae=autoencoder.packed()), f"{name}.pt")
    forward, calls = dit.DiTDH.forward, []
    monkeypatch.setattr(dit.DiTDH, "forward", lambda *inputs: calls.append(len(inputs[1])) or forward(*inputs))
    def run(arguments):
        calls.clear()
        monkeypatch.setattr(sys, "argv", ["sample.py", "--device", "cpu", "--batch_size", "2", *arguments.split()])
        sample.main()
        return sum(calls)
    return run

def test_noise_is_a_function_of_seed_and_number():
    assert torch.equal(sample.noise_of(3, range(9), (4, 2, 2))[7:], sample.noise_of(3, [7, 8], (4, 2, 2)))
    assert len(torch.cat([sample.noise_of(seed, range(12), (4, 2, 2)) for seed in (0, 1)]).unique()) == 2 * 12 * 16

def test_an_image_of_one_step_is_noise_minus_average_velocity_in_batches_of_any_size():
    network, autoencoder = small_dit(True).eval(), small_rae()
    noise, one, labels = sample.noise_of(3, range(9), (8, 4, 4)), torch.ones(9), torch.arange(9) % 4
    with torch.no_grad():
        expected = autoencoder.decode(noise - network(noise, one, labels, 0 * one)).clamp(0, 1) * 255
    for size, numbers in ((9, range(9)), (2, range(9)), (1, range(9)), (2, [5, 2, 8])):
        batches = [*sample.make_images(network, autoencoder, 2.5, labels, None, 3, size, numbers)]
        assert [i for batch, _ in batches for i in batch] == [*numbers]
        assert (torch.cat([images for _, images in batches]) - expected[[*numbers]]).abs().max() <= 1
    assert (expected[0] - expected[4]).abs().max() > 5      # images differ by more than the tolerance

def test_steps_are_evaluations_of_the_network(sample_run):
    expected = {"student.pt": 1, "student.pt --steps 4": 4, "teacher.pt": 50, "teacher.pt --steps 3": 3}
    assert {arguments: sample_run(f"--num 3 --ckpt {arguments}") / 3 for arguments in expected} == expected
    assert Image.open("student.samples.png").size == Image.open("teacher.samples.png").size == (2 * 104, 2 * 36)

def test_classes_have_names_synonyms_and_numbers(sample_run):
    names = sample.class_names()
    assert len(set(names)) == 1000 and sample.class_names(["n01440764", "cats"]) == ("tench, Tinca tinca", "cats")
    texts = {"Golden Retriever, 0,tench": [207, 0, 0], "tench, Tinca tinca": [0]}
    assert {text: sample.parse_classes(text, names) for text in texts} == texts
    assert sample.parse_classes("7, 1", ["1", "7", "2"]) == [1, 0]                              # names before numbers
    for text in ("golden retreiver", "1000", "-1", "tench,"):
        with pytest.raises(SystemExit, match="--classes: no class"):
            sample.parse_classes(text, names)
    assert sample.load_all("student.pt")[2:] == (2.5, tuple("abcdefghij"))

def test_an_interrupted_folder_goes_on_with_equal_bytes_and_takes_no_images_of_other_settings(sample_run):
    content = lambda: {path.name: path.read_bytes() for path in Path("x").iterdir()}
    assert sample_run("--ckpt student.pt --num 9 --classes c,a --npz x.npz") == 9
    whole, names = content(), [f"{i:06d}_{'20'[i % 2]}.png" for i in range(9)]
    assert sorted(whole) == [*names, "settings.json"]
    images = [np.asarray(Image.open(f"x/{name}")) for name in names]
    for name in (names[1], names[6]):
        Path("x", name).unlink()
    assert sample_run("--ckpt student.pt --num 9 --classes 2,0 --npz x.npz") == 2 and content() == whole
    assert np.array_equal(np.load("x.npz")["arr_0"], images) and np.load("x.npz")["arr_1"].tolist() == [2, 0] * 4 + [2]
    for other in ("student.pt", "student.pt --classes c,a --seed 1", "student.pt --classes c,a --steps 2",
                  "teacher.pt --classes c,a"):
        with pytest.raises(SystemExit, match="--out x: holds images of other settings.*$"):
            sample_run(f"--num 12 --out x --ckpt {other}")
    assert content() == whole

def test_a_released_checkpoint_draws_the_same_and_a_walk_has_all_its_frames(sample_run):
    sample_run("--ckpt student.pt --release small.pt")
    for name in ("student", "small"):
        sample_run(f"--ckpt {name}.pt --num 4")
    student, small = (np.asarray(Image.open(f"{name}.samples.png"), int) for name in ("student", "small"))
    assert abs(student - small).max() <= 3 and os.stat("small.pt").st_size < os.stat("student.pt").st_size / 2
    assert sample_run("--ckpt small.pt --teacher teacher.pt --num 4 --out x.gif") == 4 * 26
    assert Image.open("x.gif").n_frames == 26

def test_the_released_toy_draws_the_classes_that_are_asked_for():
    network, autoencoder, alpha, names = sample.load_all(HERE / "assets" / "toy.pt")
    labels, (drawn, known) = torch.arange(300) % 10, map(torch.from_numpy, train.make_toy_images(6000, seed=0))
    classifier = fid.train_classifier(drawn.permute(0, 3, 1, 2), known, 10, "cpu", 150)
    images = torch.cat([x for _, x in sample.make_images(network, autoencoder, alpha, labels)])
    assert names == train.TOY_CLASSES and (classifier(images / 255).argmax(1) == labels).float().mean() > 0.8

def test_images_of_two_processes_are_those_of_one(sample_run):
    def work(rank):                                         # one process is late
        sample.to_pil_image = lambda image: time.sleep(rank / 9) or Image.fromarray(image.permute(1, 2, 0).numpy())
        sample_run("--ckpt student.pt --num 9 --npz two.npz")
    sample_run("--ckpt student.pt --num 9 --npz one.npz")
    assert finish(Path(), start(Path(), work, world=2))[0] == [0, 0]
    assert np.abs(np.load("one.npz")["arr_0"].astype(int) - np.load("two.npz")["arr_0"]).max() <= 1
    assert sorted(os.listdir("one")) == sorted(os.listdir("two"))

def test_frechet_distance_in_the_features_of_an_encoder_is_named_fd(sample_run):
    sample_run("--ckpt student.pt --num 9 --npz x.npz")
    extractor, x = fid.make_extractor("rae", "student.pt"), torch.full((1, 3, 32, 32), 204, dtype=torch.uint8)
    assert torch.equal(extractor.extract(x)["pool"], rae.load_rae("student.pt").encoder(x / 255).mean((2, 3)))
    scores = fid.Scorer("x.npz", "rae", "student.pt")("x.npz")
    assert scores == pytest.approx(dict(extractor=extractor.name, fd=0, precision=1, recall=1), abs=1e-6)

@pytest.mark.parametrize("arguments, message", [
    ("--ckpt nan.pt", "nan.pt: final_layer.linear.bias is not finite"), ("--ckpt student.pt --classes z", "class 'z'"),
    ("--ckpt student.pt --release nan.pt", "needs a new name"), ("--ckpt student.pt --device cuda", "finds no GPU")])
def test_bad_input_of_sample_is_refused_before_an_image_is_drawn(sample_run, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=message) as refusal:
        sample_run(f"{arguments} --out x")
    assert "\n" not in str(refusal.value) and not Path("x").exists()

# --- train.py: recipes, data, one stage after the other -------------------------------------------------------------

TINY = ("--batch_size", 8, "--steps", 4, "--precision", "fp32", "--device", "cpu", "--save_every", 2)
STAGES, PAPER = [*train.TABLE["paper 256"]], copy.deepcopy(train.TABLE)
for column in ("paper 256", "paper toy"):
    train.TABLE[column]["drift"].update(samples=4, with_grad=2)

def in_process(monkeypatch, *arguments):
    """train.py's main() in this process; its signal handlers go when it is done."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    try:
        train.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

def start(folder, work, world=1):
    """Call work(rank) in forks of this process, in one process group if there are several -> processes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    def child(rank):
        place = dict(WORLD_SIZE=world, RANK=rank, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        os.environ.update({name: str(value) for name, value in place.items()} if world > 1 else {})
        sys.stdout = sys.stderr = open(folder / f"rank{rank}.txt", "w", buffering=1)
        torch.set_num_threads(1)                            # a forked process hangs in a pool of threads
        work(rank)
    processes = [multiprocessing.get_context("fork").Process(target=child, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes

def finish(folder, processes, seconds=120):
    """Wait for processes -> (their exit codes, the lines that they wrote)."""
    for process in processes:
        process.join(seconds)
        assert not process.is_alive() or process.kill()
    lines = re.split("[\r\n]+", "\n".join(path.read_text() for path in sorted(folder.glob("rank*.txt"))))
    return [process.exitcode for process in processes], [line for line in lines if line.strip() and "%|" not in line]

def training(arguments, fault=""):
    """The work of a process that runs train.py. fault: Python that runs first."""
    def work(rank):
        sys.argv = ["train.py", *map(str, arguments)]
        exec(fault[rank] if isinstance(fault, list) else fault, globals())
        train.main()
    return work

def run(folder, *arguments, world=1, fault=""):
    return finish(folder, start(folder, training(arguments, fault), world))

@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Sixty drawings as JPEGs of three classes, in three colour modes."""
    folder = tmp_path_factory.mktemp("photographs")
    images, labels = train.make_toy_images(60, seed=9)
    for i, (image, label) in enumerate(zip(images, labels)):
        (folder / str(label % 3)).mkdir(exist_ok=True)
        picture = Image.fromarray(image).resize((40, 50))
        picture.convert(("RGB", "L", "CMYK")[i % 3]).save(folder / str(label % 3) / f"{i}.jpg")
    return folder

@pytest.fixture(scope="module")
def trained(photographs, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for stage in STAGES:
            in_process(monkeypatch, "--toy", "--data", photographs, "--out", out, "--stage", stage, *TINY)
    return out

def copy_inputs(trained, out, *stages):
    out.mkdir(exist_ok=True)
    for stage in stages:
        (out / f"{stage}.pt").write_bytes((trained / f"{stage}.pt").read_bytes())

def a_run(trained, photographs, out, stage, *more):
    """The command of a short run of a stage, and in OUT what it starts from."""
    copy_inputs(trained, out, *[s for s in STAGES if s != stage])
    return ("--toy", "--data", photographs, "--out", out, "--stage", stage, *TINY, "--steps", 6, *more)

def lines_of(out, stage):
    return [json.loads(line) for line in (out / f"{stage}.jsonl").read_text().splitlines()]

def losses(out, stage):
    return {line["step"]: (line["loss"], line["mse"]) for line in lines_of(out, stage) if "loss" in line}

def assert_equal_runs(out, straight, stage):
    """Weights, EMA and moments bit for bit, and a log with every step once."""
    ours, theirs = (dit.load_file(folder / f"{stage}.pt") for folder in (out, straight))
    for part in ("model", "ema", "discriminator"):
        assert [k for k, v in theirs.get(part, {}).items() if not torch.equal(v, ours[part][k])] == []
    for part in ("optimizer", "d_optimizer"):
        for k, moments in theirs.get(part, {}).get("state", {}).items():
            assert all(torch.equal(moments[name], ours[part]["state"][k][name]) for name in moments)
    told = [[(line["step"], line["loss"], line["grad_norm"]) for line in lines_of(folder, stage) if "loss" in line]
            for folder in (out, straight)]
    assert told[0] == told[1] and [step for step, *_ in told[0]] == list(range(1, len(told[0]) + 1))

def test_toy_images():
    images, labels = train.make_toy_images(40, seed=3)
    assert images.shape == (40, 32, 32, 3) and images.dtype == np.uint8 and labels.tolist() == list(range(10)) * 4
    assert all(len(np.unique(image.reshape(-1, 3), axis=0)) >= 8 for image in images)           # anti-aliased edges
    few, other = train.make_toy_images(10, seed=3)[0], train.make_toy_images(10, seed=4)[0]
    assert np.array_equal(images[:10], few) and not np.array_equal(few, other)

def test_the_papers_table_and_learning_rates():
    (decoder, flow, mid, distill, bootstrap, _), rate = train.TABLE["paper 256"].values(), train.learning_rate
    assert [row["batch_size"] for row in (decoder, flow, mid, distill, bootstrap)] == [512, 1024, 8, 256, 256]
    assert mid["num_pairs"] * 8 == 512 and train.TABLE["paper 512"]["mid"]["num_pairs"] * 8 == 64
    assert mid["num_points"] == 17 and mid["guidance_scale"] == distill["guidance_scale"] == 1
    for row in (distill, bootstrap):
        assert (row["ratio_r_not_equal_t"], row["adaptive_p"], row["derivative"]) == (0.25, 1, "jvp")
    assert all(row["class_dropout"] == 0.1 and "clip" not in row for row in (flow, mid, distill, bootstrap))
    assert flow["steps"] == 1_000_911 and rate(0, flow) == rate(50_000, flow) == 2e-4 and rate(26_999, mid) == 1e-4
    assert [rate(int(done * flow["steps"]), flow) for done in (0.525, 1)] == pytest.approx([1.1e-4, 2e-5], rel=1e-3)
    epochs = [rate(int(done * decoder["steps"] / 16) + 1, decoder) for done in (0, 1, 8.5, 16)] # warm-up, then cosine
    assert epochs == pytest.approx([1e-7, 2e-4, 1.1e-4, 2e-5], rel=1e-2, abs=1e-7)

def tensors(count):
    data = torch.utils.data.TensorDataset(torch.arange(count).view(count, 1), torch.arange(count) % 10)
    data.classes, data.targets = tuple("abcdefghij"), data.tensors[1].tolist()
    return data

def test_samples_are_functions_of_seed_stage_and_number(photographs):
    of = lambda stage, numbers: [train.Samples(tensors(100), "abcdefghij", (1, stage))[n] for n in numbers]
    assert of("flow", (950, 3, 420))[1:] == of("flow", (3, 420))
    epochs = [[int(x) for x, _ in of("flow", range(100 * e, 100 * e + 100))] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(100)) and epochs[0] != epochs[1] != list(range(100))
    assert epochs[0] != [int(x) for x, _ in of("mid", range(100))]
    of_class = train.Samples(tensors(100), "abcdefghij", (1, "drift"), 30)                      # 30 images of a class
    drawn, again = ([of_class[n] for n in numbers] for numbers in (range(20), range(19, -1, -1)))
    assert all(x.shape == (30, 1) and (x % 10 == label).all() for x, label in drawn)
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(drawn, again[::-1]))
    first, second = ([label for _, label in drawn[i:i + 10]] for i in (0, 10))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second               # in another order
    assert len({int(i) for x, _ in drawn for i in x}) > 90                                      # of 100
    folder = train.ImageFolder(photographs, loader=rae.read_image)
    folder.transform = train.transform("statistics", 32)
    plain = torch.stack([x for x, _ in folder])                                                 # (60, 3, 32, 32)
    folder.transform, samples = train.transform("flow", 32), train.Samples(folder, folder.classes, (0, "flow"))
    seen = [samples[n][0] for n in range(240)]
    torch.manual_seed(5)                                                                        # this changes nothing
    assert torch.equal(samples[77][0], seen[77])
    straight, mirrored = (sum(any(torch.equal(x, y) for y in z) for x in seen) for z in (plain, plain.flip(3)))
    assert straight + mirrored >= 240 and 80 < mirrored < 160                                   # stage flow flips half

def test_draws_of_a_step_do_not_depend_on_the_rows_that_a_process_takes():
    c = dict(train.TABLE["paper 256"]["distill"], seed=3, batch_size=16)
    a, b, other = [train.draw_step("distill", c, step, (4, 2, 2), 10, 6.93, "cpu") for step in (5, 5, 6)]
    assert all(torch.equal(a[name], b[name]) for name in a) and not torch.equal(a["noise"], other["noise"])
    assert (a["r"] < a["t"]).nonzero().flatten().tolist() == [3, 7, 11, 15]
    many = train.draw_step("distill", dict(c, batch_size=20_000, ratio_r_is_0=0.4), 0, (1, 1, 1), 10, 6.93, "cpu")
    shares = [share.float().mean() for share in (many["r"] < many["t"], many["r"] == 0, many["dropped"])]
    assert shares == pytest.approx([0.25, 0.1, 0.1], abs=0.01)                                  # 0.4 of 0.25 jump to 0
    row = train.TABLE["paper 256"]
    mid = train.draw_step("mid", dict(row["mid"], seed=0, batch_size=500), 0, (1, 1, 1), 10, 6.93, "cpu")
    assert mid["pairs"].unique().tolist() == list(range(136)) and mid["y"].unique().tolist() == list(range(10))
    decoder = train.draw_step("rae", dict(row["rae"], seed=0), 0, (9, 8, 8), 10, None, "cpu")
    level = decoder["noise"].std((1, 2, 3))                                                     # one per image
    assert 0.35 < level.mean() < 0.45 and level.min() < 0.05 and 0.75 < level.max() < 0.85

def test_held_out_images_are_chosen_by_their_names(tmp_path):
    for i, image in enumerate(train.make_toy_images(120, seed=9)[0]):
        (tmp_path / str(i % 2)).mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / str(i % 2) / f"{i}.png")
    args = argparse.Namespace(data=str(tmp_path), toy=True, dry_run=False, seed=0, resolution=256, where=(0, 1, "cpu"))
    sets = lambda: [{x.numpy().tobytes() for x in part.tensors[0]} for part in train.load_data(args)]
    seen, hidden = sets()
    assert 4 < len(hidden) < 24 and len(seen) == 2 * (120 - len(hidden))                        # and mirror images
    for name in ("0/0.png", "1/37.png"):
        (tmp_path / name).unlink()
    seen_later, hidden_later = sets()
    assert hidden_later <= hidden and not seen_later & hidden

def test_unreadable_images_are_named_and_replaced_and_too_many_end_the_run(photographs, tmp_path, capsys):
    bad = tmp_path / "bad.jpg"
    folder = train.ImageFolder(photographs, train.transform("statistics", 32), loader=rae.read_image)
    bad.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\x05IHDR\0\0")
    folder.samples = folder.samples * 20                                                        # 1,200 images
    expected, folder.samples[7] = folder[8], (str(bad), 0)
    samples = train.Samples(folder, folder.classes)
    assert torch.equal(samples[7][0], expected[0]) and samples[7][1] == expected[1]
    assert f"{bad}: " in capsys.readouterr().err
    folder.samples[9] = (str(tmp_path / "gone.jpg"), 0)
    with pytest.raises(OSError, match="over 1 in 1,000 images cannot be read"):
        samples[9]

def test_every_stage_writes_checkpoint_log_and_picture(trained):
    for stage in STAGES:
        content = dit.load_file(trained / f"{stage}.pt")
        assert content["step"] == 4 and content["config"]["stage"] == content["stage"] == stage
        assert sorted(losses(trained, stage)) == [1, 2, 3, 4] and "config" in lines_of(trained, stage)[0]
        assert {"lr", "images_per_s", "grad_norm", "seconds"} <= lines_of(trained, stage)[1].keys()
        assert Image.open(trained / f"{stage}.000004.png").size[0] > 150
        assert any(not torch.equal(v, content["model"][k]) for k, v in content["ema"].items())
        assert content["rae"]["state"]["var"].shape == (96, 4, 4) and len(content["classes"]) == 3

Stopped = type("Stopped", (Exception,), {})                 # ends a run at a moment of a test's choice

def stop_after_saving(monkeypatch, step):
    """The run ends as soon as the checkpoint of a step has its name."""
    real = Path.replace
    def replace(self, target):
        result = real(self, target)
        if str(target).endswith(".pt") and ".previous" not in str(target) and dit.load_file(target)["step"] == step:
            raise Stopped
        return result
    monkeypatch.setattr(Path, "replace", replace)

@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_bitwise(stage, photographs, trained, tmp_path, monkeypatch):
    copy_inputs(trained, tmp_path, *[s for s in STAGES if s != stage])
    command = ("--toy", "--data", photographs, "--out", tmp_path, "--stage", stage, *TINY)
    with monkeypatch.context() as stopped, pytest.raises(Stopped):
        stop_after_saving(stopped, 2)
        in_process(stopped, *command)
    torch.manual_seed(123)                                                                      # this changes nothing
    if stage in ("distill", "bootstrap", "drift"):
        (tmp_path / f"{train.STARTS_FROM[stage]}.pt").unlink()                                  # was for the start
    in_process(monkeypatch, *command)
    assert_equal_runs(tmp_path, trained, stage)
    before = (tmp_path / f"{stage}.pt").stat().st_mtime_ns
    in_process(monkeypatch, *command)                                                           # nothing is left to do
    assert (tmp_path / f"{stage}.pt").stat().st_mtime_ns == before

@pytest.mark.parametrize("changed, refused", (
    (("--seed", 1), "seed 0, not 1"), (("--recipe", "paper"), "guidance_scale 2.0, not 1.0"),
    (("--lr", 1e-5, "--micro_batch", 2, "--steps", 5), None)))
def test_resume_refuses_settings_that_shape_the_run(changed, refused, photographs, trained, tmp_path, monkeypatch):
    copy_inputs(trained, tmp_path, *STAGES)
    command = ("--toy", "--out", tmp_path, "--stage", "mid", *TINY, *changed)                   # mid needs no --data
    if refused:
        with pytest.raises(SystemExit, match=f"mid.pt: made with .*{refused}"):
            in_process(monkeypatch, *command)
    else:
        in_process(monkeypatch, *command)
        assert dit.load_file(tmp_path / "mid.pt")["step"] == 5

def test_mid_training_reads_and_encodes_no_image(trained, tmp_path, monkeypatch):
    copy_inputs(trained, tmp_path, "rae", "flow")
    for owner, name in ((train, "load_data"), (train, "Samples"), (rae.Encoder, "forward")):
        monkeypatch.setattr(owner, name, None)
    in_process(monkeypatch, "--toy", "--out", tmp_path, "--stage", "mid", *TINY)
    assert losses(tmp_path, "mid") == losses(trained, "mid")

def test_labels_are_dropped_once_per_sample(photographs, trained, tmp_path, monkeypatch):
    copy_inputs(trained, tmp_path, "rae", "flow", "mid")
    embed, seen = torch.nn.Embedding.forward, []
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda self, y: seen.append(y.tolist()) or embed(self, y))
    in_process(monkeypatch, "--toy", "--data", photographs, "--out", tmp_path, "--stage", "distill", *TINY,
               "--batch_size", 100, "--steps", 1, "--derivative", "fd", "--recipe", "paper")
    y = seen[0]                                                                                 # of the teacher
    assert seen[:3] == [y, y[3::4] * 2, y] and 2 < y.count(3) < 25                              # 3: no class

def test_micro_batches_and_processes_follow_the_same_loss(photographs, trained, tmp_path):
    """The same draws, sums in another order: 1e-4 over four steps in float32."""
    jobs = [(stage, 2, ()) for stage in ("flow", "mid", "distill", "drift")]
    jobs += [(stage, world, ("--micro_batch", 2)) for world in (1, 2) for stage in STAGES[1:]]
    for stage, world, extra in jobs:
        out = tmp_path / f"{stage}{world}{len(extra)}"
        command = a_run(trained, photographs, out, stage, "--steps", 4, *extra)
        status, lines = run(tmp_path, *command, world=world)
        assert status == [0] * world, lines
        for step, values in losses(trained, stage).items():
            assert losses(out, stage)[step] == pytest.approx(values, rel=1e-4), (stage, step)

RANDOM = ("--resolution", 32, "--model", "toy", "--weights", "random", "--workers", 0)

def test_the_path_of_imagenet_with_networks_of_random_weights(photographs, tmp_path, monkeypatch):
    """LPIPS and the adversarial loss come in at their steps and resume; latents come from files; one step samples."""
    paper, step, rates = ("--data", photographs, *TINY, *RANDOM), rae.Adversary.step, []
    monkeypatch.setattr(rae.Adversary, "step", lambda self, lr: rates.append(lr) or step(self, lr))
    decoder = (*paper, "--stage", "rae", "--encoder", TINY_VIT, "--checkpointing", "--steps", 8)
    in_process(monkeypatch, *decoder, "--out", tmp_path / "a")
    lines = {line["step"]: line for line in lines_of(tmp_path / "a", "rae") if "loss" in line}
    assert [("d_loss" in lines[k], "gan" in lines[k]) for k in range(1, 9)] == (
        3 * [(False, False)] + [(True, False)] + 4 * [(True, True)])
    assert rates == [lines[k]["lr"] for k in range(1, 6)]                                       # a schedule of its own
    for line in lines.values():
        parts = line["l1"] + line["lpips"] + line.get("gan_weight", 0) * line.get("gan", 0)
        assert line["lpips"] > 0 and line["loss"] == pytest.approx(parts, rel=1e-4)
    with monkeypatch.context() as stopped, pytest.raises(Stopped):
        stop_after_saving(stopped, 6)
        in_process(stopped, *decoder, "--out", tmp_path / "b")
    in_process(monkeypatch, *decoder, "--out", tmp_path / "b")
    assert_equal_runs(tmp_path / "b", tmp_path / "a", "rae")
    in_process(monkeypatch, *decoder, "--out", tmp_path / "c", "--micro_batch", 2)
    for step in range(4, 6):                                                                    # norms are per sample
        assert lines_of(tmp_path / "c", "rae")[step]["d_loss"] == pytest.approx(lines[step]["d_loss"], rel=1e-3)
    for stage in STAGES[1:]:
        in_process(monkeypatch, *paper, "--stage", stage, "--out", tmp_path / "a")
        assert sorted(losses(tmp_path / "a", stage)) == [1, 2, 3, 4]
    network, model, alpha, names = sample.load_all(tmp_path / "a" / "bootstrap.pt")
    (_, images), = sample.make_images(network, model, alpha, torch.tensor([0, 1]))
    assert images.shape == (2, 3, 32, 32) and alpha == 0.25 and model.encoder_config["name"] == TINY_VIT

def test_statistics_of_two_processes_are_those_of_one(photographs, tmp_path, monkeypatch):
    command = ("--data", photographs, *TINY, *RANDOM, "--stage", "rae", "--encoder", TINY_VIT, "--perceptual", 0)
    in_process(monkeypatch, *command, "--out", tmp_path / "one")
    status, lines = run(tmp_path, *command, "--out", tmp_path / "two", world=2)
    assert status == [0, 0], lines
    one, two = (lines_of(tmp_path / out, "rae")[1:] for out in ("one", "two"))
    loss = lambda lines: [line["loss"] for line in lines]
    assert loss(two) == pytest.approx(loss(one), rel=0.02)                                      # w is a process's own
    assert loss(two[:2]) == pytest.approx(loss(one[:2]), rel=1e-4)
    assert two[2]["d_loss"] == pytest.approx(one[2]["d_loss"], rel=1e-4)
    one, two = (dit.load_file(tmp_path / out / "rae.pt")["rae"]["state"] for out in ("one", "two"))
    folder = train.ImageFolder(photographs, loader=rae.read_image, transform=train.transform("statistics", 32))
    encoder = rae.Encoder(TINY_VIT, 32, weights="random")
    z = torch.cat([encoder(x[None] / 255) for x, _ in folder]).double()
    for state in (one, two):
        assert relative(state["var"], z.var(0, unbiased=False)) < 1e-5
        assert ((state["mean"] - z.mean(0)) / z.std(0)).abs().max() < 1e-4

def test_a_released_teacher_knows_imagenets_classes_by_name(photographs, trained, tmp_path, monkeypatch):
    teacher = dit.DiTDH(4, 96, num_classes=1000, **dit.MODELS["toy"])
    torch.save({"ema": teacher.state_dict()}, tmp_path / "released.pt")
    copy_inputs(trained, tmp_path, "rae")
    for i, folder in enumerate(("n02099601", "n01440764", "n07753592")):                        # 207, 0 and 954
        shutil.copytree(photographs / str(i), tmp_path / "data" / folder)
    file, common = tmp_path / "released.pt", ("--toy", "--out", tmp_path, *TINY)
    in_process(monkeypatch, *common, "--stage", "mid", "--teacher", file)
    assert dit.load_file(tmp_path / "mid.pt")["classes"][207] == "golden retriever"
    seen, real = [], train.Samples.__getitem__
    monkeypatch.setattr(train.Samples, "__getitem__", lambda self, n: seen.append(real(self, n)) or seen[-1])
    in_process(monkeypatch, *common, "--stage", "distill", "--teacher", file, "--data", tmp_path / "data")
    assert {int(label) for _, label in seen[-32:]} == {0, 207, 954}
    with pytest.raises(SystemExit, match="--data: '0' is no class of the network"):
        in_process(monkeypatch, *common, "--stage", "drift", "--data", photographs, "--init", file)

@pytest.mark.parametrize("stage, derivative, callables", (
    ("distill", "jvp", 3), ("distill", "fd", 3), ("bootstrap", "jvp", 2), ("mid", None, 2)))
def test_compiled_steps_run_compiled(stage, derivative, callables, photographs, trained, tmp_path, monkeypatch):
    """A backend counts graphs and runs: teacher, student and derivative run once each in a step."""
    graphs, runs, compile = [], [], torch.compile
    def backend(graph, inputs):
        graphs.append(graph)
        return lambda *values: runs.append(len(graphs)) or graph(*values)
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda target: compile(target, backend=backend))
    command = a_run(trained, photographs, tmp_path, stage, "--steps", 3, "--compile", "--sample_every", 99)
    in_process(monkeypatch, *command, *(("--derivative", derivative) if derivative else ()))
    evaluations = dict(mid=17).get(stage, callables)                                            # mid: 16 of the teacher
    assert len(graphs) >= callables and len(runs) == 3 * evaluations, (len(graphs), len(runs))
    if derivative != "fd":
        for step in (1, 2, 3):
            assert losses(tmp_path, stage)[step] == pytest.approx(losses(trained, stage)[step], rel=1e-3)

def test_scores_during_training_are_those_of_sample_and_fid(photographs, trained, tmp_path, monkeypatch, capsys):
    extractor = lambda *_: fid.Extractor(lambda x: dict(pool=x.float().mean((2, 3))), "inception-test", 3)
    monkeypatch.setattr(fid, "make_extractor", extractor)
    monkeypatch.setattr(train, "NUM_SCORED", 40)
    copy_inputs(trained, tmp_path, *STAGES[:3])
    np.savez(tmp_path / "ref.npz", train.make_toy_images(30, seed=2)[0])
    command = ("--toy", "--data", photographs, "--out", tmp_path, "--stage", "distill", *TINY, "--sample_every", 3)
    in_process(monkeypatch, *command, "--ref", tmp_path / "ref.npz")
    (tmp_path / "distill.previous.pt").replace(tmp_path / "distill.pt")                         # as if killed after 3
    in_process(monkeypatch, *command, "--ref", tmp_path / "ref.npz")
    scores = {line["step"]: line["scores"] for line in lines_of(tmp_path, "distill") if "scores" in line}
    assert [*scores] == [3, 4] and losses(tmp_path, "distill") == losses(trained, "distill")
    command = f"sample.py --ckpt {tmp_path}/distill.pt --num 40 --device cpu --npz {tmp_path}/made.npz"
    monkeypatch.setattr(sys, "argv", command.split())
    sample.main()
    capsys.readouterr()
    fid.main([str(tmp_path / "made.npz"), str(tmp_path / "ref.npz"), "--json", "--device", "cpu"])
    offline = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores[4].pop("extractor") == offline.pop("extractor") and scores[4] == pytest.approx(offline, rel=1e-6)

def test_the_whole_toy_in_two_processes_reports_and_a_dry_run_leaves_nothing(tmp_path):
    status, lines = run(tmp_path, "--toy", "--dry_run", "--out", tmp_path / "toy", "--device", "cpu", world=2)
    assert status == [0, 0], lines
    rows = [line.split()[:2] for line in lines if line.startswith(("flow ", "mid ", "drift "))]
    assert rows == [["flow", n] for n in ("25", "4", "1")] + [[s, n] for s in ("mid", "drift") for n in ("1", "2", "4")]
    assert not (tmp_path / "toy" / "dry_run").exists()

# --- what a run promises --------------------------------------------------------------------------------------------

AT_STEP = """
real, done = train.learning_rate, []
def at(step, c):
    if step == %d and not done:
        done.append(1)
        %s
    return real(step, c)
train.learning_rate = at
"""

@pytest.fixture(scope="module")
def straight(trained, photographs, tmp_path_factory):
    """Folder of an undisturbed run of mid with six steps, by one or two processes; each is made once."""
    made = {}
    def get(world=1):
        if world not in made:
            made[world] = tmp_path_factory.mktemp("straight")
            status, lines = run(made[world], *a_run(trained, photographs, made[world], "mid"), world=world)
            assert status == [0] * world, lines
        return made[world]
    return get

def test_a_killed_run_goes_on_bit_for_bit(trained, photographs, straight, tmp_path):
    """Killed in a step, while it writes a checkpoint, and between the two renames that put it in place."""
    kill = "os.kill(os.getpid(), 9)"
    writing = ("save = torch.save\ndef write(content, file):\n    save(content, file)\n    file.flush()\n"
               f"    if content['step'] == 4: file.truncate(999), {kill}\ntorch.save = write")
    rename = ("import pathlib\nreal, calls = pathlib.Path.replace, []\ndef replace(*a):\n    calls.append(a)\n"
              f"    if len(calls) == 3: {kill}\n    return real(*a)\npathlib.Path.replace = replace")
    for i, fault in enumerate((AT_STEP % (3, kill), writing, rename)):
        command = a_run(trained, photographs, tmp_path / f"{i}", "mid")
        assert run(tmp_path, *command, fault=fault)[0] == [-9]
        status, lines = run(tmp_path, *command)
        assert status == [0], lines
        assert_equal_runs(tmp_path / f"{i}", straight(), "mid")

@pytest.mark.parametrize("name, world", (("SIGTERM", 1), ("SIGINT", 1), ("SIGUSR1", 1), ("SIGTERM", 2)))
def test_signals_save_and_end(name, world, trained, photographs, straight, tmp_path):
    number = getattr(signal, name)
    command = a_run(trained, photographs, tmp_path / "out", "mid")
    fault = AT_STEP % (2, f"os.kill(os.getpid(), {int(number)})")
    status, lines = run(tmp_path, *command, world=world, fault=["", fault][-world:])            # of two, the second
    assert status == [128 + number] * world, lines
    assert f"mid: {name}, stopped at step 3; the same command goes on" in lines
    assert dit.load_file(tmp_path / "out" / "mid.pt")["step"] == 3
    assert run(tmp_path, *command, world=world)[0] == [0] * world
    assert_equal_runs(tmp_path / "out", straight(world), "mid")

def test_the_last_step_is_saved_before_its_statistics_and_scores(photographs, trained, tmp_path, monkeypatch):
    command = ("--toy", "--data", photographs, "--out", tmp_path, "--stage", "rae", *TINY)
    with monkeypatch.context() as stopped, pytest.raises(Stopped):
        stopped.setattr(rae.RAE, "measure", lambda *_: (_ for _ in ()).throw(Stopped()))
        in_process(stopped, *command)
    content = dit.load_file(tmp_path / "rae.pt")
    assert content["step"] == 4 and "rae" not in content
    in_process(monkeypatch, *command)
    assert torch.equal(dit.load_file(tmp_path / "rae.pt")["rae"]["state"]["var"],
                       dit.load_file(trained / "rae.pt")["rae"]["state"]["var"])

def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(trained, photographs, straight, tmp_path):
    command, path = a_run(trained, photographs, tmp_path / "out", "mid"), tmp_path / "out" / "mid.pt"
    assert run(tmp_path, *command, "--steps", 4)[0] == [0]
    whole = path.read_bytes()
    place = len(whole) // 2
    for damaged in (whole[:-1000], whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:]):
        shutil.copytree(tmp_path / "out", tmp_path / "copy")
        (tmp_path / "copy" / "mid.pt").write_bytes(damaged)
        status, lines = run(tmp_path, *command, "--out", tmp_path / "copy")
        assert status == [0] and any("mid.pt: damaged" in line for line in lines), lines
        assert_equal_runs(tmp_path / "copy", straight(), "mid")
        shutil.rmtree(tmp_path / "copy")
    path.write_bytes(whole[:-1000])
    (tmp_path / "out" / "mid.previous.pt").write_bytes(whole[:9])
    status, lines = run(tmp_path, *command)
    assert status == [1] and "mid.pt: no whole checkpoint to go on from" in lines[-1]
    assert path.read_bytes() == whole[:-1000]

@pytest.mark.parametrize("world", (1, 2))
def test_a_step_without_finite_gradient_changes_nothing_and_ten_end_the_run(world, trained, photographs, tmp_path):
    """The noise of the last sample is not a number; of two processes, the second one draws it."""
    spoil = ("real = train.draw_step\ndef draw(stage, c, step, *more):\n    d = real(stage, c, step, *more)\n"
             "    if %s: d['noise'][-1] = float('nan')\n    return d\ntrain.draw_step = draw")
    command = a_run(trained, photographs, tmp_path / "out", "distill", "--save_every", 1)
    status, lines = run(tmp_path, *command, "--steps", 4, world=world, fault=spoil % "step == 3")
    assert status == [0] * world and any("distill: step 4 skipped" in line for line in lines), lines
    before, after = (dit.load_file(tmp_path / "out" / name) for name in ("distill.previous.pt", "distill.pt"))
    assert (before["step"], before["skipped"], after["step"], after["skipped"]) == (3, 0, 4, 1)
    for part in ("model", "ema"):
        assert all(torch.equal(v, after[part][k]) for k, v in before[part].items())
    for k, moments in before["optimizer"]["state"].items():
        assert all(torch.equal(moments[name], after["optimizer"]["state"][k][name]) for name in moments)
    command = (*command, "--steps", 40, "--save_every", 100)
    status, lines = run(tmp_path, *command, world=world, fault=spoil % "step > 6")
    assert status == [1] * world and any("no finite gradient in ten steps" in line for line in lines), lines
    assert dit.load_file(tmp_path / "out" / "distill.pt")["step"] == 4
    status, lines = run(tmp_path, *command, "--steps", 8, world=world)
    assert status == [0] * world and sorted(losses(tmp_path / "out", "distill")) == [1, 2, 3, 4, 5, 6, 7, 8]

def test_a_crash_with_workers_that_read_files_ends_the_run(photographs, tmp_path):
    """Workers must end on SIGTERM, with which the loader ends them: before, such a run hung for ever."""
    fault = AT_STEP % (1, "raise IndexError('a bug in the loop')")
    command = ("--data", photographs, *TINY, *RANDOM, "--stage", "rae", "--encoder", TINY_VIT, "--perceptual", 0,
               "--adversarial", 0, "--workers", 2, "--out", tmp_path / "out")
    status, lines = finish(tmp_path, start(tmp_path, training(command, fault)), seconds=60)
    assert status == [1] and "a bug in the loop" in "\n".join(lines)
    command = (*command[:-1], tmp_path / "group")           # as torchrun does it: the workers must not end first
    status, lines = run(tmp_path, *command, fault="os.setsid()\n" + AT_STEP % (2, "os.killpg(0, signal.SIGTERM)"))
    assert status == [143] and dit.load_file(tmp_path / "group" / "rae.pt")["step"] == 3, lines

def test_two_runs_never_share_a_folder(trained, photographs, tmp_path, monkeypatch):
    command = a_run(trained, photographs, tmp_path, "mid")
    with open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="another run is writing there"):
            in_process(monkeypatch, *command)
    in_process(monkeypatch, *command)                                                           # the lock went with it

def test_common_mistakes_end_in_one_line_before_any_work(photographs, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rae, "hf_hub_download", lambda *_: (_ for _ in ()).throw(OSError()))
    (tmp_path / "empty").mkdir()
    toy, out = ("train.py", "--toy", "--out", tmp_path / "out"), ("--out", tmp_path / "out")
    torch.save(dit.load_file(trained / "flow.pt") | dict(step=3), tmp_path / "empty" / "flow.pt")
    table = {
        ("train.py",): "give --stage, or --toy",
        (*toy, "--data", tmp_path / "nowhere"): "--data .*nowhere: no such file or folder",
        (*toy, "--data", tmp_path / "empty"): "--data .*empty: .*a folder of images per class",
        (*toy, "--data", photographs): "the report needs over 2,570 images",
        (*toy, "--stage", "mid"): "flow.pt: no such file",
        (*toy, "--stage", "mid", "--teacher", trained / "distill.pt"): "--teacher .*: has an average velocity",
        (*toy, "--stage", "bootstrap", "--data", photographs, "--init", trained / "rae.pt"): "rae.pt: holds no",
        (*toy, "--stage", "rae", "--init", trained / "mid.pt"): "--init belongs to --stage flow",
        (*toy, "--stage", "flow", "--adaptive_p", "0"): "--adaptive_p: stage flow has no such setting",
        (*toy, "--stage", "mid", "--recipe", "paper", "--guidance_model", trained): "no effect at guidance scale 1",
        ("train.py", "--toy", "--stage", "mid", "--out", tmp_path / "empty"): "flow.pt: stopped at step 3; finish it",
        (*toy, "--micro_batch", "7"): "--batch_size 64 of rae: no multiple of",
        ("train.py", "--stage", "mid", *out): "stage2_model.pt: not in the cache.*--weights",
        ("train.py", "--stage", "mid", "--resolution", "64", *out): "--resolution 64: published weights are for",
        ("train.py", "--stage", "rae", "--data", photographs, "--encoder", "hf-hub:a/b", *out): "no model of timm",
    }
    for command, expected in table.items():
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        with pytest.raises(SystemExit) as end:
            train.main()
        written = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]
        line = end.value.code if isinstance(end.value.code, str) else written[-1]               # the rest is argparse's
        assert end.value.code not in (0, None) and re.search(expected, line) and len(written) <= 2, (command, written)
        assert not [*tmp_path.glob("out/*.pt")]
    monkeypatch.setattr(train, "train", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(SystemExit, match="mid: out of memory; .*--memory"):
        in_process(monkeypatch, "--toy", "--out", tmp_path / "other", "--stage", "mid")

def test_readme_names_flags_files_and_lines_that_exist():
    text, flags = (HERE / "README.md").read_text(), {"test_all.py": BENCH_FLAGS, "meanflow.py": set(), "dit.py": set()}
    for script in ("train.py", "sample.py", "fid.py", "rae.py"):
        flags[script] = set(re.findall(r"add(?:_argument)?\(\s*\"(--\w+)", (HERE / script).read_text()))
    flags["train.py"] |= {f"--{name}" for name in train.FLAGS}
    launcher = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--max_restarts", "--signal"}
    assert set(re.findall(r"(?<![\w-])--[a-z]\w+", text)) <= launcher.union(*flags.values())
    fenced = "\n".join(re.findall(r"^```\n(.*?)^```$", text, re.S | re.M)).replace("\\\n", " ")
    commands = [part for line in fenced.splitlines() for part in line.split("#")[0].split("&&") if ".py" in part]
    commands += re.findall(r"`((?:python|torchrun) [^`]*\.py[^`]*)`", text)
    assert len(commands) > 10
    for command in commands:
        before, script, after = re.match(r"(.*?)(\w+\.py)(.*)", command).groups()
        assert set(re.findall(r"--[a-z]\w+", after)) <= flags.get(script, set()), command
        assert set(re.findall(r"--[a-z]\w+", before)) <= launcher, command
    assert all((HERE / link).exists() for link in re.findall(r"\]\((?!http|#)([^)#]+)", text))
    headings = [re.sub(r"[^\w -]", "", heading).strip().lower() for heading in re.findall(r"^##+ (.*)", text, re.M)]
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= {heading.replace(" ", "-") for heading in headings}
    for name, file, line in re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", text):
        found = (HERE / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"(def|class) {name}\b", found), f"{file}: {name} is not in line {line}"
    assert all(f"def {name}" in Path(__file__).read_text() for name in re.findall(r"`(test_\w+)[.]*`", text))
    setup = [line for line in text.splitlines() if line.startswith("pip install -r requirements.txt && ")]
    assert len(setup) >= 2 and "train.py --toy" in setup[0] and "pytest" in setup[1]

# --- python test_all.py --bench: time and memory of a step of each stage; --memory: which micro-batch fits a GPU ------

BENCH = dict(model="toy", resolution=256, batch_size=8, precision="fp32", derivative="jvp", stage="all",
             device="cuda" if torch.cuda.is_available() else "cpu")
BENCH_FLAGS = {"--bench", "--memory", "--compile", "--checkpointing", *(f"--{name}" for name in BENCH)}

class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and their peak."""
    def __init__(self, now):
        super().__init__()
        self.alive, self.now, self.bytes = set(), now, now
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for storage in [tensor.untyped_storage() for tensor in tree_leaves(result) if torch.is_tensor(tensor)]:
            if storage._cdata not in self.alive:
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.bytes = max(self.bytes, self.now)
        return result
    def free(self, key, size):
        self.alive.remove(key)
        self.now -= size

def bench_networks(args, stage):
    """The networks that no stage trains: the encoder, and in stage rae those of its losses -> (them, their bytes)."""
    toy = args.model == "toy"
    nets = [rae.Encoder("toy" if toy else None, 32 if toy else args.resolution, weights="random").to(args.device)]
    if stage == "rae":
        nets += rae.Adversary(args.resolution, "random", args.device), rae.PerceptualDistance("random").to(args.device)
    frozen = [net.discriminator.net if isinstance(net, rae.Adversary) else net.requires_grad_(False) for net in nets]
    for weight in (weight for net in frozen for weight in net.parameters() if args.precision == "bf16"):
        weight.data = weight.data.bfloat16()
    return nets, sum(weight.nbytes for net in frozen for weight in net.state_dict().values())

def bench_step(args, stage, encoder, adversary=None, perceptual=None):
    """A function that takes one step of a stage on random numbers, beside all that train.py keeps in memory."""
    toy, grid, channels, B = args.model == "toy", encoder.grid, encoder.config["channels"], args.batch_size
    c = PAPER["paper 256"][stage] | PAPER["paper toy" if toy else f"paper {args.resolution}"].get(stage, {})
    network = lambda average: dit.DiTDH(grid, channels, num_classes=1000, average_velocity=average,
                                        **dit.MODELS[args.model])
    decoder = lambda size: rae.Decoder(channels, grid, 8 if toy else 16, **rae.DECODERS[size])
    with torch.device(args.device):
        model = decoder(args.model) if stage == "rae" else network(stage != "flow")
        kept = copy.deepcopy(model), None if stage == "rae" else decoder("toy" if toy else "XL")
        teacher = network(False).requires_grad_(False) if stage in ("mid", "distill") else None
        x, noise = torch.randn(2, B, channels, grid, grid)
        t, r = meanflow.mean_flow_times(torch.rand(2, B), torch.arange(B) % 4 == 3, 6.93)
        y, pairs = torch.zeros(B, dtype=torch.long), torch.zeros(B, c.get("num_pairs", 0), dtype=torch.long)
        many = torch.randn(2, B, c.get("samples", 0), channels, grid, grid)
        images, uniform = torch.rand(B, 3, args.resolution, args.resolution), torch.rand(B, 15)
    for weight in teacher.parameters() if teacher and args.precision == "bf16" else ():
        weight.data = weight.data.bfloat16()
    model.checkpointing = args.checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0, fused=True)
    net, du_dt = model, lambda z, t, r, y, v: meanflow.total_derivative(model, z, t, r, y, v, args.derivative)
    if args.compile:
        net, du_dt, teacher = torch.compile(net), torch.compile(du_dt), teacher and torch.compile(teacher)
    def decode():
        z, judge = encoder(images), partial(adversary.judge, uniform=uniform[:, :5])
        adversary.learn(images, model, z, uniform[:, 5:], 1)
        return rae.reconstruction_loss(net(z + noise), images, perceptual, 1, judge, 0.75, model.head.weight)
    losses = dict(
        rae=decode, flow=lambda: meanflow.flow_matching_loss(net, x, y, 6.93, t, noise),
        mid=lambda: meanflow.mid_training_loss(net, teacher, noise, y, 6.93, pairs=pairs),
        distill=lambda: meanflow.mean_flow_loss(net, x, y, 6.93, teacher, t=t, r=r, noise=noise, du_dt=du_dt),
        bootstrap=lambda: meanflow.mean_flow_loss(net, x, y, 6.93, t=t, r=r, noise=noise, du_dt=du_dt),
        drift=lambda: meanflow.drift_loss(net, many[0], y, many[1], c["with_grad"]))
    def step(micro_batches=1, kept=kept):
        for _ in range(micro_batches):
            with torch.autocast(torch.device(args.device).type, torch.bfloat16, args.precision == "bf16", False):
                loss, _ = losses[stage]()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step

def peak_bytes(args, stage, nets, frozen):
    with Peak(frozen) as peak:
        step = bench_step(args, stage, *nets)
        step(2)
        step(2)
    return peak.bytes

def predicted_bytes(args, stage, batch_size):
    """Peak memory of a stage with micro-batches of batch_size, from shapes alone: nothing is computed or allocated."""
    args = argparse.Namespace(**vars(args) | dict(batch_size=batch_size, device="cpu"))
    networks = bench_networks(args, stage)
    some = lambda mask: torch.arange(max(1, batch_size // 4))[:, None]                          # rows with r < t
    with FakeTensorMode(allow_non_fake_inputs=True), mock.patch("torch.Tensor.nonzero", some):
        return peak_bytes(args, stage, *networks)

def memory(args):
    """Table of the largest micro-batch that fits, from two predictions; 2 GB are left to CUDA itself."""
    print(f"{'':10} GiB of one, of each more, largest micro-batch on 24, 40, 80, 141 GB")
    for stage in STAGES if args.stage == "all" else [args.stage]:
        n = 1 if stage in ("mid", "drift") else 4                                               # r < t in each fourth
        first, second = (predicted_bytes(args, stage, size) / 2**30 for size in (n, 2 * n))
        more = (second - first) / n
        c = PAPER["paper 256"][stage] | PAPER[f"paper {args.resolution}"].get(stage, {})
        draws = c["batch_size"] * c.get("samples", 1) * 768 * (args.resolution / 16) ** 2 * 4 / 2**30   # all noise
        largest = [min(c["batch_size"], max(0, int(n + (gb - 2 - draws - first) / more))) for gb in (24, 40, 80, 141)]
        print(f"{stage:10} {first - (n - 1) * more:10.2f} {more:13.3f}   {largest}", flush=True)

def bench(args):
    """Milliseconds, FLOP/s and, on CUDA, peak memory of a step of each stage."""
    cpu = args.device == "cpu"
    def seconds(function):
        clock = time.perf_counter()
        function()
        None if cpu else torch.cuda.synchronize()
        return time.perf_counter() - clock
    size, dtype = 1024 if cpu else 8192, torch.bfloat16 if args.precision == "bf16" else torch.float32
    a, rows = torch.randn(size, size, device=args.device, dtype=dtype), []
    peak = 2 * size**3 / min(seconds(lambda: a @ a) for _ in range(20)) / 1e12
    for stage in STAGES[args.model == "toy":] if args.stage == "all" else [args.stage]:
        None if cpu else torch.cuda.reset_peak_memory_stats()
        step = bench_step(args, stage, *bench_networks(args, stage)[0])
        with FlopCounterMode(display=False) as counter:
            step()
        second = float(np.median([seconds(step) for _ in range(5)]))
        row = dict(stage=stage, ms=1000 * second, tflop=counter.get_total_flops() / 1e12)
        row |= dict(share_of_peak=row["tflop"] / second / peak)
        rows.append(row | ({} if cpu else dict(peak_GiB=torch.cuda.max_memory_allocated() / 2**30)))
        print("  ".join(f"{value:.4g} {key}" if isinstance(value, float) else value for key, value in rows[-1].items()))
    print(json.dumps(dict(vars(args), matmul_tflops=peak, torch=torch.__version__, rows=rows)))

def measure(argv):
    parser = argparse.ArgumentParser()
    for flag, default in BENCH.items():
        parser.add_argument(f"--{flag}", type=type(default), default=default)
    for flag in ("bench", "memory", "compile", "checkpointing"):
        parser.add_argument(f"--{flag}", action="store_true")
    args = parser.parse_args(argv)
    memory(args) if args.memory else bench(args)

def test_bench_ends_in_one_json_object(capsys):
    measure(["--bench", "--device", "cpu", "--stage", "distill"])
    row, = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert row["ms"] > 0 and row["share_of_peak"] > 0

def test_predicted_memory_is_that_of_the_steps_themselves():
    args = argparse.Namespace(**BENCH | dict(device="cpu", batch_size=4), compile=False, checkpointing=False)
    for stage in STAGES[1:]:
        real = peak_bytes(args, stage, *bench_networks(args, stage))
        assert predicted_bytes(args, stage, args.batch_size) == pytest.approx(real, rel=0.01), stage

if __name__ == "__main__":
    sys.exit(measure(sys.argv[1:]) if {"--bench", "--memory"} & {*sys.argv} else pytest.main(sys.argv))
