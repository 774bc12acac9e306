"""Every claim of the code, held against closed forms, slow loops and the real command lines. CPU, some minutes.

    python -m pytest test_all.py            # pip install pytest
    python -m pytest test_all.py -k flow    # only what has "flow" in its name
    python test_all.py --slow -k any        # with the long forms, half an hour
"""
import faulthandler
import inspect
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.ndimage
import timm
import torch
from PIL import Image

import dit
import fid
import meanflow
import rae
import sample
import train

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)  # many tests run processes beside this one: more threads than cores slow all of them tenfold
slow = pytest.mark.skipif("SLOW" not in os.environ, reason="runs under python test_all.py --slow")
SIGMA = 0.6  # of the data of the linear-Gaussian flow


@pytest.fixture
def tmp_path(tmp_path):
    """pytest keeps three runs' folders, and checkpoints are large: what a test has written goes when it is done."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


# --- dit.py -----------------------------------------------------------------------------------------------------------

def small_dit(average_velocity=False, seed=0):
    """A network whose every weight is random: a fresh one is zero everywhere and would hide mistakes."""
    torch.manual_seed(seed)
    net = dit.DiTDH(4, 8, (24, 32), (2, 2), (2, 2), 10, average_velocity=average_velocity)
    for p in net.parameters():
        p.data.normal_(0, 0.2)
    return net


@pytest.mark.parametrize("grid", (16, 32))
@pytest.mark.parametrize("average_velocity", (False, True))
def test_dit_xl_has_the_published_tensors(grid, average_velocity):
    with torch.device("meta"):
        net = dit.DiTDH(grid, 768, num_classes=1000, average_velocity=average_velocity, **dit.MODELS["XL"])
    shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    assert len(shapes) == 382 + 5 * average_velocity
    expected = {"pos_embed": (1, grid**2, 1152), "t_embedder.W": (256,), "y_embedder.embedding_table.weight": (1001, 1152),
                "x_embedder.proj.weight": (2048, 768, 1, 1), "s_embedder.proj.weight": (1152, 768, 1, 1), "s_projector.weight": (2048, 1152),
                "blocks.27.attn.qkv.weight": (3456, 1152), "blocks.28.attn.qkv.weight": (6144, 2048), "blocks.29.mlp.w12.weight": (10922, 2048),
                "blocks.29.adaLN_modulation.1.weight": (12288, 2048), "final_layer.linear.weight": (768, 2048),
                "enc_feat_rope.freqs_cos": (grid**2, 72), "dec_feat_rope.freqs_sin": (grid**2, 128)}
    assert {k: shapes.get(k) for k in expected} == expected
    assert ("r_embedder.mlp.2.weight" in shapes) == average_velocity
    assert dit.infer_config(net.state_dict()) == dict(input_size=grid, in_channels=768, num_classes=1000, average_velocity=average_velocity, **dit.MODELS["XL"])


def test_dit_sizes_are_read_off_the_weights():
    for sizes in dit.MODELS.values():
        with torch.device("meta"):
            state = dit.DiTDH(4, 96, num_classes=10, **sizes).state_dict()
        assert dit.infer_config(state) == dict(input_size=4, in_channels=96, num_classes=10, average_velocity=False, **sizes)


def test_dit_count_is_the_full_count():
    with torch.device("meta"):
        net = dit.DiTDH(16, 768, num_classes=1000, average_velocity=True, **dit.MODELS["XL"])
        t = torch.ones(1)
        parameters, macs = dit.count(net, torch.empty(1, 768, 16, 16), t, torch.zeros(1, dtype=torch.long), t)
    assert (round(parameters / 1e6, 1), round(macs / 1e9, 1)) == (840.3, 161.6)


def test_dit_against_a_plain_forward():
    """One image, token by token and head by head; positions turn queries and keys as complex numbers."""
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
        return torch.view_as_real(torch.view_as_complex(x.unflatten(1, (-1, 2))) * torch.exp(1j * angle)).flatten(1)

    def block(x, c, name):
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(silu(c), f"{name}.adaLN_modulation.1").chunk(6, -1)
        heads = zip(*(a.chunk(2, 1) for a in linear(norm(x, f"{name}.norm1") * (1 + scale1) + shift1, f"{name}.attn.qkv").chunk(3, 1)))
        attended = torch.cat([(turn(q) @ turn(k).T / q.shape[1] ** 0.5).softmax(1) @ v for q, k, v in heads], 1)
        x = x + gate1 * linear(attended, f"{name}.attn.proj")
        gate, value = linear(norm(x, f"{name}.norm2") * (1 + scale2) + shift2, f"{name}.mlp.w12").chunk(2, 1)
        return x + gate2 * linear(silu(gate) * value, f"{name}.mlp.w3")

    time = embed(time, "t_embedder") + embed(time - r, "r_embedder")
    c, tokens = silu(time + p["y_embedder.embedding_table.weight"][y]), z.flatten(1).T                  # (24,), (16, 8)
    s = linear(tokens, "s_embedder.proj") + torch.cat([f(a * frequency(6)) for a in (column, row) for f in (torch.sin, torch.cos)], 1)
    s = linear(silu(block(block(s, c, "blocks.0"), c, "blocks.1") + time), "s_projector")
    x = block(block(linear(tokens, "x_embedder.proj"), s, "blocks.2"), s, "blocks.3")
    shift, scale = linear(silu(s), "final_layer.adaLN_modulation.1").chunk(2, 1)
    x = linear(norm(x, "final_layer.norm_final") * (1 + scale) + shift, "final_layer.linear")
    one = lambda number: torch.tensor([number], dtype=torch.float64)
    assert relative(net(z[None], one(0.8), torch.tensor([y]), one(r))[0].flatten(1).T, x) < 1e-6      # the positions are float32


def test_dit_rotary_scores_depend_on_relative_position_only():
    rotary = dit.RotaryPositions(16, 5)
    q, k = torch.randn(2, 16)
    turned_q, turned_k = rotary(q.expand(1, 1, 25, 16))[0, 0], rotary(k.expand(1, 1, 25, 16))[0, 0]     # (25, 16)
    scores = (turned_q @ turned_k.T).unflatten(0, (5, 5)).unflatten(2, (5, 5))                         # (row, column, row, column)
    assert torch.allclose(scores[0, 1, 2, 3], scores[2, 0, 4, 2], atol=1e-5)
    assert not torch.allclose(scores[0, 1, 2, 3], scores[0, 1, 3, 2], atol=1e-3)


def test_student_starts_as_its_teacher_and_every_weight_learns():
    teacher, student = small_dit(), dit.DiTDH(4, 8, (24, 32), (2, 2), (2, 2), 10, average_velocity=True)
    student.load_state_dict(student.state_dict() | teacher.state_dict())
    z, t, y = torch.randn(6, 8, 4, 4), torch.rand(6), torch.arange(6)
    assert torch.equal(student(z, t, y, t * torch.rand(6)), teacher(z, t, y))
    student(z, t, y, t / 2).square().sum().backward()
    assert [n for n, p in student.named_parameters() if p.grad is None or (not p.grad.any() and "r_embedder.mlp.0" not in n)] == []
    fresh, s = dit.DiTDH(4, 8, (24, 32), (2, 2), (2, 2), 10, class_std=3.0, time_std=2.0), torch.randn(2, 16, 24)
    assert not fresh(z, t, y).any() and not fresh.final_layer.adaLN_modulation[1].weight.any()
    assert torch.equal(fresh.blocks[0](s, torch.randn(2, 1, 24), fresh.enc_feat_rope), s)  # a block starts as the identity
    assert 2 < fresh.y_embedder.embedding_table.weight.std() < 4 and all(1.7 < fresh.t_embedder.mlp[i].weight.std() < 2.3 for i in (0, 2))


# --- meanflow.py, held against two flows with both velocities in closed form; each coordinate of a latent is one ---------
# "gaussian": data ~ N(0, SIGMA^2); "mixture": two Gaussians on a line. move(z, t, r) follows the flow from t to r.

WEIGHT, MEAN, STD = torch.tensor([[0.4, 0.6], [-1.0, 0.8], [0.5, 0.3]], dtype=torch.float64)  # of the two components


def spread(t):
    return ((1 - t) ** 2 * SIGMA**2 + t**2).sqrt()


def gaussian_v(z, t, y):
    t = meanflow.expand(t, z)
    return z * (t - (1 - t) * SIGMA**2) / spread(t) ** 2


def gaussian_move(z, t, r):
    return z * meanflow.expand(spread(r) / spread(t), z)


def mixture(z, t):
    """Distribution function and density of z_t, and the velocity E[e - x | z_t], each like z."""
    z, t = z[..., None], meanflow.expand(t, z)[..., None]
    variance = ((1 - t) * STD) ** 2 + t**2
    offset = z - (1 - t) * MEAN
    mass = WEIGHT * (-offset**2 / (2 * variance)).exp() / (2 * math.pi * variance).sqrt()
    velocity = offset * (t - (1 - t) * STD**2) / variance - MEAN                                       # of each component
    return (WEIGHT * (1 + (offset / (2 * variance).sqrt()).erf()) / 2).sum(-1), mass.sum(-1), (mass * velocity).sum(-1) / mass.sum(-1)


def mixture_v(z, t, y):
    return mixture(z, t)[2]


def mixture_move(z, t, r):
    """On a line no path crosses another: a point keeps its quantile. Bisection, and a Newton step that carries derivatives."""
    quantile, low, high = mixture(z, t)[0], torch.full_like(z, -16), torch.full_like(z, 16)
    for _ in range(50):
        middle = (low + high) / 2
        below = mixture(middle, r)[0] < quantile
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    reached, density, _ = mixture(low, r)
    return low + (quantile - reached) / density


def average_velocity(v, move):
    def u(z, t, y, r):
        gap = meanflow.expand(t - r, z)
        return torch.where(gap == 0, v(z, t, y), (z - move(z, t, r)) / torch.where(gap == 0, 1, gap))
    return u


def exact_data(u, noise):
    return noise - u(noise, times(1.0), None, times(0.0))


FLOWS = {"gaussian": (gaussian_v, average_velocity(gaussian_v, gaussian_move)), "mixture": (mixture_v, average_velocity(mixture_v, mixture_move))}
both_flows = pytest.mark.parametrize("v, u", FLOWS.values(), ids=FLOWS)


def latents(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 2, 2, dtype=torch.float64, generator=generator), torch.zeros(n, dtype=torch.long)


def times(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@both_flows
def test_average_velocity_in_closed_form_is_the_integral_of_the_velocity(v, u):
    z, y = latents(1)
    right_side = lambda t, z: v(torch.from_numpy(z).view(1, 3, 2, 2), times(t), y).flatten().numpy()
    end = scipy.integrate.solve_ivp(right_side, (0.8, 0.1), z.flatten().numpy(), "DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
    assert relative(u(z, times(0.8), y, times(0.1)).flatten(), (z.flatten() - torch.from_numpy(end)) / 0.7) < 1e-11


def test_defaults_are_the_papers():
    defaults = {f: {k: p.default for k, p in inspect.signature(getattr(meanflow, f)).parameters.items()} for f in
                ("total_derivative", "mean_flow_loss", "mid_training_loss", "solve_flow", "sample")}
    expected = dict(total_derivative=dict(method="jvp", delta=5e-3), mean_flow_loss=dict(derivative="jvp", delta=5e-3, gap_share=0.25, power=1),
                    mid_training_loss=dict(num_points=17, num_pairs=64, solver="euler"), solve_flow=dict(solver="euler"), sample=dict(steps=1))
    assert all(expected[f].items() <= defaults[f].items() for f in expected)
    table = dict(clip=1, betas=(0.9, 0.95), label_drop=0.1, gap_share=0.25, power=1, nodes=17, solver="euler", guidance=1, delta=5e-3)
    assert table.items() <= train.DEFAULTS.items()


def test_shift_time():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.equal(meanflow.shift_time(t, 1.0), t)
    assert torch.allclose(meanflow.shift_time(meanflow.shift_time(t, 6.93), 1 / 6.93), t)
    assert round(float(meanflow.shift_time(torch.tensor(15 / 16), 6.93)), 3) == 0.990
    normal = torch.linspace(-4, 4, 9, dtype=torch.float64)
    logit_normal = meanflow.flow_matching_times(torch.special.ndtr(normal), 3.0)
    assert torch.allclose(logit_normal, 3 / (3 + (-normal).exp()), rtol=1e-12)  # the shift adds log(alpha) to the logit


@both_flows
def test_total_derivative_obeys_the_mean_flow_identity(v, u):
    """u + (t - r) du/dt = v: exactly by JVP, and with an error of second order in delta by the central difference."""
    z, y = latents(64)
    t = torch.linspace(0.15, 0.98, 64, dtype=torch.float64)
    z, r = z * meanflow.expand(spread(t), z), t * torch.linspace(0, 0.9, 64, dtype=torch.float64)
    velocity = v(z, t, y)
    exact = (velocity - u(z, t, y, r)) / meanflow.expand(t - r, z)
    assert relative(meanflow.total_derivative(u, z, t, r, y, velocity, "jvp"), exact) < 1e-11
    errors = [relative(meanflow.total_derivative(u, z, t, r, y, velocity, "fd", delta), exact) for delta in (2e-3, 1e-3)]
    assert abs(math.log2(errors[0] / errors[1]) - 2) < 0.01


def test_total_derivative_of_the_network_jvp_agrees_with_differences():
    net, (z, y) = small_dit(True).double(), (torch.randn(4, 8, 4, 4, dtype=torch.float64), torch.arange(4))
    t, r = times(0.9, 0.6, 0.5, 0.3), times(0.1, 0.0, 0.4, 0.2)
    both = [meanflow.total_derivative(net, z, t, r, y, z.flip(0), method, 1e-5) for method in ("jvp", "fd")]
    assert relative(*both) < 1e-4 and not any(derivative.requires_grad for derivative in both)


@both_flows
def test_mean_flow_loss_is_zero_at_the_exact_average_velocity(v, u):
    x, noise, y = exact_data(u, latents(128)[0]), *latents(128, seed=1)
    t = torch.linspace(0.05, 1, 128, dtype=torch.float64)
    r = t * (torch.arange(128) % 5) / 4                                                                # 0, t / 4, ... t
    assert meanflow.mean_flow_loss(u, x, y, 3.0, teacher=v, t=t, r=r, noise=noise)[1]["mse"] < 1e-20
    errors = [meanflow.mean_flow_loss(u, x, y, 3.0, teacher=v, t=t, r=r, noise=noise, derivative="fd", delta=delta)[1]["mse"] for delta in (2e-3, 1e-3)]
    assert abs(math.log2(errors[0] / errors[1]) - 4) < 0.1  # a squared error of second order


@pytest.mark.parametrize("power, derivative", ((1, "jvp"), (0.5, "fd"), (0, "jvp")))
def test_mean_flow_loss_has_the_gradient_of_the_adaptive_weighting(power, derivative):
    """Of |u - target|^2 / w with target and w = (|u - target|^2)^power held fixed, and the target of each sample its own."""
    net, x, y = small_dit(True), torch.randn(5, 8, 4, 4), torch.arange(5)
    t, r = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), torch.tensor([0.9, 0.1, 0.7, 0.2, 0.5])
    noise = torch.randn_like(x)
    loss, metrics = meanflow.mean_flow_loss(net, x, y, 1.0, None, derivative, 0.02, t, r, noise, power=power)
    loss.backward()
    got = net.final_layer.linear.weight.grad.clone()
    net.zero_grad()
    z = (1 - meanflow.expand(t, x)) * x + meanflow.expand(t, x) * noise
    v = noise - x
    target = v - meanflow.expand(t - r, x) * meanflow.total_derivative(net, z, t, r, y, v, derivative, 0.02)
    error = (net(z, t, y, r) - target).square().flatten(1)
    (error.sum(1) / (error.sum(1).detach() + 1e-3) ** power).mean().backward()
    assert relative(got, net.final_layer.linear.weight.grad) < 1e-5
    assert abs(float(metrics["mse"]) / float(error.detach().mean()) - 1) < 1e-5


def test_mean_flow_loss_of_a_perfect_sample_has_no_gradient():
    u, zero = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3)
    meanflow.mean_flow_loss(lambda z, t, y, r: u, zero, None, 1.0, t=zero[:, 0], r=zero[:, 0], noise=zero)[0].backward()
    assert not u.grad.any()  # nor is it 0 / 0


def test_mean_flow_at_r_equal_t_is_flow_matching():
    net, x, y, t, noise = small_dit(True).double(), torch.randn(6, 8, 4, 4).double(), torch.arange(6), torch.rand(6).double(), torch.randn(6, 8, 4, 4).double()
    gradients = []
    for loss, metrics in (meanflow.mean_flow_loss(net, x, y, 1.0, t=t, r=t.clone(), noise=noise, power=0),
                          meanflow.flow_matching_loss(lambda z, t, y: net(z, t, y, t), x, y, 1.0, t, noise)):
        gradients.append((metrics["mse"], *torch.autograd.grad(loss, net.parameters())))
    (mse, *mean_flow), (flow_mse, *flow) = gradients
    assert torch.allclose(mse, flow_mse, rtol=1e-14)
    assert all(torch.allclose(a, b * x[0].numel(), rtol=1e-12, atol=1e-12) for a, b in zip(mean_flow, flow))  # a sum and a mean over a latent


def test_bootstrap_has_the_gradient_of_distillation_in_expectation():
    """E[e - x | z_t] = v, and u - v + (t - r) du/dt is linear in v: so the plain squared error (power 0) has the same mean
    gradient, over data x and noise e, with the one-point estimate as with the exact teacher. The log (power 1) has not.
    Trapezoidal sums over x and e, exact to rounding for functions as smooth as these."""
    x, e = (a.reshape(-1, 1) for a in torch.meshgrid(torch.arange(-50, 51) * times(0.12), torch.arange(-50, 51) * times(0.16), indexing="ij"))
    weight = mixture(x, times(0.0))[1] * (-e**2 / 2).exp()                                              # (10201, 1)
    weight, y = weight / weight.sum(), torch.arange(len(x))
    theta = torch.tensor([0.7, -0.4, 1.3, 0.5, 0.9]).double().repeat(len(x), 1).requires_grad_()        # a copy for each sample

    def student(z, t, y, r):
        a, b, c, d, f = theta[y].unbind(1)
        return ((a * z[:, 0] + b * t).sin() + c * t * z[:, 0] + d * r * z[:, 0] ** 2 + f * (t - r))[:, None]
    for t, r in ((0.9, 0.2), (0.5, 0.0), (0.7, 0.7)):
        for power, same in ((0, True), (1, False)):
            mean = []
            for teacher in (mixture_v, None):
                t_, r_ = times(t).expand(len(x)), times(r).expand(len(x))
                loss, _ = meanflow.mean_flow_loss(student, x, y, 1.0, teacher, t=t_, r=r_, noise=e, power=power)
                mean.append((len(x) * weight * torch.autograd.grad(loss, theta)[0]).sum(0))
            assert relative(*mean) < 1e-12 if same else relative(*mean) > 0.05


def test_mean_flow_times_and_share():
    t, r = meanflow.mean_flow_times(torch.rand(2, 10_000), torch.arange(10_000) % 4 == 0, 5.0)
    assert (r <= t).all() and (r < t).float().mean() == 0.25 and 0 <= r.min() and t.max() <= 1
    assert 0.72 < (t[::4].mean() + r[::4].mean()) / 2 < 0.77  # the mean of 5 t / (1 + 4 t) is 1.25 - 5/16 log 5 = 0.747
    assert torch.equal(t[1::4], r[1::4]) and abs(t[1::4].mean() - t[::4].mean()) < 0.03  # r = t keeps the later of the two times
    seen, x = [], torch.zeros(1000, 1)  # times that are not given are drawn with the same shift and share
    meanflow.mean_flow_loss(lambda z, t, y, r: seen.append((t, r)) or z, x, x, 1e3, gap_share=0.4)
    meanflow.flow_matching_loss(lambda z, t, y: seen.append((t, t)) or z, x, x, 1e3)
    assert [len(t) for t, r in seen[1:]] == [1000, 1000] and all(t.mean() > 0.97 for t, r in seen) and 300 < len(seen[0][0]) < 500
    samples = train.Samples("distill", 0, torch.zeros(50, 1), torch.zeros(50), 10, 32, (1,))
    assert sum(samples[n]["keep_gap"] for n in range(400)) == 100


@pytest.mark.parametrize("derivative, copies", (("jvp", 1), ("fd", 2)))
def test_evaluations_of_a_mean_flow_step(derivative, copies):
    """The teacher once, du/dt without a graph and for the samples with r < t alone, the student once; a label a sample in
    all of them. The published code differentiates all samples with a graph, and drops labels again in each copy."""
    calls, y, t = [], torch.arange(200) % 11, torch.full((200,), 0.8)
    some = torch.arange(200) % 4 == 0

    def spy(name, net):
        return lambda z, t, y, *r: calls.append((name, torch.is_grad_enabled(), y.tolist())) or net(z, t, y, *r)
    student, teacher, x = small_dit(True), small_dit(), torch.randn(200, 8, 4, 4)
    loss, _ = meanflow.mean_flow_loss(spy("student", student), x, y, 1.0, spy("teacher", teacher), derivative, t=t, r=torch.where(some, t / 2, t))
    assert calls == [("teacher", False, y.tolist()), ("student", False, y[some].tolist() * copies), ("student", True, y.tolist())]
    for share in (0.0, 1.0):
        calls.clear()
        meanflow.mean_flow_loss(spy("student", student), x, y, 1.0, derivative=derivative, gap_share=share)
        assert [len(labels) for _, _, labels in calls] == [200 * copies] * (share == 1) + [200]
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())


@both_flows
@pytest.mark.parametrize("solver, order", (("euler", 1), ("heun", 2)))
def test_solver_order_and_number_of_evaluations(solver, order, v, u):
    noise, y = latents(8)
    data = exact_data(u, noise)
    calls = []
    counted = lambda z, t, y: calls.append(float(t[0])) or v(z, t, y)
    errors = []
    for steps in (50, 100):
        calls.clear()
        trajectory, nodes = meanflow.solve_flow(counted, noise, y, steps, 3.0, solver)
        errors.append(relative(trajectory[-1], data))
        assert len(calls) == steps * order and len(trajectory) == len(nodes) == steps + 1
    assert nodes[0] == 1 and nodes[-1] == 0 and calls[0] == 1 and torch.equal(trajectory[0], noise)
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.15
    last, _ = meanflow.solve_flow(counted, noise, y, 100, 3.0, solver, last_only=True)
    assert torch.equal(last, trajectory[-1:])


@both_flows
@pytest.mark.parametrize("solver, order", (("euler", 1), ("heun", 2)))
def test_mid_training_targets_are_as_exact_as_the_trajectory(solver, order, v, u):
    """The published code labels the shifted nodes linspace(0, 1): its error does not go away with smaller steps."""
    noise, y = latents(4)
    errors = []
    for points in (33, 65):
        pairs = torch.arange(points * (points - 1) // 2).expand(4, -1)
        errors.append(float(meanflow.mid_training_loss(u, v, noise, y, 3.0, points, pairs=pairs, solver=solver)[1]["mse"]))
    assert abs(math.log2(errors[0] / errors[1]) / 2 - order) < 0.15 and errors[1] < 1e-3


def test_mid_training_pairs_carry_the_times_that_were_stepped_through():
    noise, y = latents(16)
    y, seen = torch.arange(16), []
    student = lambda z, t, y, r: seen.append((z, t, y, r)) or torch.zeros_like(z)
    meanflow.mid_training_loss(student, gaussian_v, noise, y, 6.93, pairs=torch.tensor([[0, 135]] * 16))
    z, t, labels, r = seen[0]
    trajectory, nodes = meanflow.solve_flow(gaussian_v, noise, y, 16, 6.93)
    assert torch.equal(nodes, meanflow.shift_time(torch.linspace(1, 0, 17, dtype=torch.float64), 6.93))
    assert torch.equal(t, nodes[[0, 15] * 16]) and torch.equal(r, nodes[[1, 16] * 16]) and r[1] == 0
    assert torch.equal(z, trajectory[[0, 15]].transpose(0, 1).flatten(0, 1)) and labels.tolist() == [i // 2 for i in range(32)]
    for _ in range(2):  # drawn pairs
        meanflow.mid_training_loss(student, gaussian_v, noise, y, 6.93)
    (_, t, labels, r), (_, t2, _, _) = seen[1:]
    assert len(t) == 16 * 64 and (t > r).all() and not torch.equal(t, t2) and len(set(zip(t.tolist(), r.tolist()))) > 100


@both_flows
def test_sampling_in_any_number_of_steps_lands_on_the_same_data(v, u):
    noise, y = latents(16)
    data = exact_data(u, noise)
    for steps in (1, 2, 5):
        calls = []
        got = meanflow.sample(lambda *a: calls.append(1) or u(*a), noise, y, steps)
        assert relative(got, data) < 1e-11 and len(calls) == steps
    for sampler in (meanflow.sample, lambda *a: meanflow.solve_flow(*a, alpha=1)):
        with pytest.raises(ValueError, match="at least 1"):
            sampler(u, noise, y, 0)


def test_autocast_keeps_the_students_gradient():
    """Autocast caches a weight's bf16 copy; one made without a graph, for du/dt, must not serve the loss."""
    gradients = []
    for enabled in (False, True):
        net = small_dit(True)

        def u(*inputs):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                return net(*inputs).float()
        x = torch.randn(8, 8, 4, 4, generator=torch.Generator().manual_seed(1))
        t = torch.linspace(0.2, 0.9, 8)
        meanflow.mean_flow_loss(u, x, torch.arange(8), 1.0, t=t, r=t / 2, noise=x.flip(0))[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


# --- rae.py -----------------------------------------------------------------------------------------------------------

def small_rae(num_channels=8):
    torch.manual_seed(0)
    encoder = rae.Encoder("toy", 32, channels=num_channels)
    decoder = rae.Decoder(num_channels, 4, 8, hidden_size=16, depth=1, num_heads=2, mlp_hidden=32)
    return rae.RAE(encoder, decoder, torch.randn(encoder.shape), torch.rand(encoder.shape) + 0.5).eval()


def published_decoder(d, c, tokens, patch, hidden):
    """Random tensors under the names of a published decoder of one block."""
    torch.manual_seed(0)
    p = {"decoder_pos_embed": torch.randn(1, tokens + 1, d), "trainable_cls_token": torch.randn(1, 1, d)}
    shapes = {"decoder_embed": (d, c), "decoder_norm": (d,), "decoder_pred": (3 * patch**2, d)} | {f"decoder_layers.0.{n}": s for n, s in {
        "attention.attention.query": (d, d), "attention.attention.key": (d, d), "attention.attention.value": (d, d), "attention.output.dense": (d, d),
        "intermediate.dense": (hidden, d), "output.dense": (d, hidden), "layernorm_before": (d,), "layernorm_after": (d,)}.items()}
    for name, shape in shapes.items():
        p |= {f"{name}.weight": 0.3 * torch.randn(shape), f"{name}.bias": 0.3 * torch.randn(shape[0])}
    return p


def test_published_rae_from_a_folder_laid_out_like_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(rae.DECODERS, "XL", dict(hidden_size=16, depth=1, num_heads=2, mlp_hidden=40))  # heads cannot be read off tensors
    files = {kind: tmp_path / name for kind, name in rae.HUB_FILES[256].items()}
    for path in files.values():
        path.parent.mkdir(parents=True)
    published = published_decoder(16, 768, 256, 16, 40)
    torch.save({"model": published}, files["decoder"])
    var = torch.rand(768, 16, 16) + 0.5
    torch.save({"var": var}, files["statistics"])  # no mean, as the published file may have none
    model, z = rae.published_rae(256, tmp_path), torch.randn(1, 768, 16, 16)
    assert model.encoder is None and model.decode(z).shape == (1, 3, 256, 256)
    assert torch.equal(model.decode(z), model.decoder(z * (var + 1e-5).sqrt()))
    torch.save({"var": var[:5]}, files["statistics"])
    with pytest.raises(rae.UserError, match=r"'var' is \(5, 16, 16\), but the decoder takes latents \(768, 16, 16\)"):
        rae.published_rae(256, tmp_path)
    torch.save({"mean": var}, files["statistics"])
    with pytest.raises(rae.UserError, match="no latent statistics.* but mean"):
        rae.published_rae(256, tmp_path)


def test_released_files_are_recognised(tmp_path):
    for name, content in (("a published RAE decoder", {"model": published_decoder(16, 6, 4, 8, 40)}), ("latent statistics", {"var": torch.ones(2)}),
                          ("an image encoder", timm.create_model(TINY_VIT).state_dict()), ("a checkpoint without a velocity network", {"x": torch.ones(2)})):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(rae.UserError, match=f"x.pt: {name}; give a checkpoint of flow"):
            sample.load_network(tmp_path / "x.pt")
    for average_velocity, wrap in ((False, lambda state: state), (True, lambda state: {"ema": state}), (True, lambda state: {"model": {f"module.{k}": v for k, v in state.items()}})):
        net = small_dit(average_velocity)
        torch.save(wrap(net.state_dict()), tmp_path / "x.pt")
        loaded, _ = sample.load_network(tmp_path / "x.pt")
        assert (loaded.r_embedder is not None) == average_velocity and all(torch.equal(v, loaded.state_dict()[k]) for k, v in net.state_dict().items())
    for change, named in ((lambda s: s.pop("blocks.1.attn.proj.bias"), "blocks.1.attn.proj.bias"), (lambda s: s.update(extra=torch.ones(1)), "extra")):
        state = dict(small_dit().state_dict())
        change(state)
        torch.save(state, tmp_path / "x.pt")
        with pytest.raises(rae.UserError, match=f"x.pt: .*{named}"):
            sample.load_network(tmp_path / "x.pt")


def test_published_decoder_layout_against_a_plain_forward():
    d, c = 16, 6
    p = published_decoder(d, c, 4, 8, 40)
    decoder = rae.Decoder(c, 2, 8, d, 1, 2, 40)
    decoder.load_state_dict(rae.convert_decoder(p))
    linear = lambda x, name: x @ p[f"{name}.weight"].T + p[f"{name}.bias"]
    norm = lambda x, name: (x - x.mean(-1, keepdim=True)) / x.var(-1, unbiased=False, keepdim=True).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]
    z = torch.randn(1, c, 2, 2)
    x = torch.cat([p["trainable_cls_token"][0], linear(z[0].flatten(1).T, "decoder_embed")]) + p["decoder_pos_embed"][0]     # (5, d)
    layer, h = "decoder_layers.0.", norm(x, "decoder_layers.0.layernorm_before")
    q, k, v = (linear(h, f"{layer}attention.attention.{n}").unflatten(1, (2, 8)).transpose(0, 1) for n in ("query", "key", "value"))
    attended = ((q @ k.transpose(1, 2) / 8**0.5).softmax(-1) @ v).transpose(0, 1).flatten(1)                                  # (5, d)
    x = x + linear(attended, f"{layer}attention.output.dense")
    h = linear(norm(x, f"{layer}layernorm_after"), f"{layer}intermediate.dense")
    x = x + linear(h * (1 + torch.erf(h / 2**0.5)) / 2, f"{layer}output.dense")
    x = linear(norm(x, "decoder_norm"), "decoder_pred")[1:]                                                                   # (4, 192)
    image = torch.zeros(3, 16, 16)
    for token in range(4):
        row, column = 8 * (token // 2), 8 * (token % 2)
        image[:, row:row + 8, column:column + 8] = x[token].view(8, 8, 3).permute(2, 0, 1)
    image = image * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    assert relative(decoder(z)[0], image) < 1e-5
    for change, problem in ((lambda p: p.update(extra=torch.zeros(1)), "Unexpected key.*extra"), (lambda p: p.pop("decoder_pred.bias"), "head.bias"),
                            (lambda p: p.pop("decoder_layers.0.attention.attention.key.bias"), "attention.key.bias")):
        changed = dict(p)
        change(changed)
        with pytest.raises((rae.UserError, RuntimeError), match=problem):
            decoder.load_state_dict(rae.convert_decoder(changed))


def test_rae_encodes_normalised_latents_and_packs_into_a_file(tmp_path):
    model = small_rae()
    images = torch.rand(5, 3, 32, 32)
    z = model.encode(images)
    raw = model.encoder(images)
    assert torch.allclose(raw.mean(1), torch.zeros(5, 4, 4), atol=1e-5)  # the last layer norm is over channels, without affine
    assert torch.allclose(z * (model.var + 1e-5).sqrt() + model.mean, raw, atol=1e-5)
    assert torch.allclose(model.decode(z), model.decoder(raw), atol=1e-5)
    torch.save(dict(rae=model.packed()), tmp_path / "x.pt")
    again = rae.load_rae(tmp_path / "x.pt")
    assert torch.equal(again.encode(images), z) and torch.equal(again.decode(z), model.decode(z))


class Hostile:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_load_file_takes_whole_checkpoints_only(tmp_path):
    content, path = dict(x=torch.randn(300, 9), y=[dict(z=torch.arange(50)), "word", None], step=3), tmp_path / "x.pt"
    torch.save(content, path)
    whole = path.read_bytes()
    for place in [*np.linspace(0, len(whole) - 1, 30, dtype=int), whole.index(content["x"].numpy().tobytes()) + 999]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1:])
        try:
            got = rae.load_file(path)
        except rae.UserError as error:
            assert re.search(r"x.pt: (is damaged|not a readable)", str(error)) and "\n" not in str(error)
        else:  # a byte without a meaning, of padding or of a date
            assert torch.equal(got["x"], content["x"]) and torch.equal(got["y"][0]["z"], content["y"][0]["z"]) and got["y"][1:] == content["y"][1:]
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert torch.equal(rae.load_file(path)["x"], content["x"])  # torch's old format has no checksums
    torch.save(Hostile(), tmp_path / "hostile.pt")
    torch.save([Hostile()], tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name, data in (("empty", b""), ("text", b"no checkpoint"), ("cut", whole[:len(whole) // 2]), ("old_cut", path.read_bytes()[:900]), ("locked", whole)):
        (tmp_path / f"{name}.pt").write_bytes(data)
    np.savez(tmp_path / "zip.npz", np.zeros(3))
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "locked.pt").chmod(0)
    for name, problem in (("hostile.pt", "not a readable"), ("old.pt", "not a readable"), ("empty.pt", "not a readable"), ("text.pt", "not a readable"), ("cut.pt", "not a readable"),
                          ("old_cut.pt", "not a readable"), ("zip.npz", "not a readable"), ("pipe.pt", "is a folder, a pipe or a device"), ("/dev/null", "is a folder, a pipe"),
                          ("none.pt", "no such file"), ("text.pt/x.pt", "not a readable"), (".", "is a folder"), ("locked.pt", "permission denied")):
        if name == "locked.pt" and os.access(tmp_path / name, os.R_OK):
            continue  # root may read anything
        with pytest.raises(rae.UserError, match=f"{name}: {problem}" if name != "." else problem) as refusal:
            rae.load_file(tmp_path / name)
        assert "\n" not in str(refusal.value)


def test_latent_statistics_are_exact_in_any_batches_and_order():
    z = torch.randn(50, 3, 2, 2) * 3 + 100
    results = []
    for order, size in ((torch.arange(50), 50), (torch.randperm(50), 7)):
        statistics = rae.LatentStatistics()
        for batch in z[order].split(size):
            statistics.update(batch)
        results.append(statistics.mean_and_variance())
    expected = z.double().mean(0), z.double().var(0, unbiased=False)
    for mean, variance in results:
        assert relative(mean, expected[0]) < 1e-6 and relative(variance, expected[1]) < 1e-6


@pytest.mark.parametrize("grid", (16, 32))
def test_decoder_xl_has_the_published_tensors(grid):
    with torch.device("meta"):
        decoder = rae.Decoder(768, grid, 16, **rae.DECODERS["XL"])
    d, block = 1152, {"norm1": (1152,), "norm2": (1152,), "attn.qkv": (3456, 1152), "attn.proj": (1152, 1152), "mlp.fc1": (4096, 1152), "mlp.fc2": (1152, 4096)}
    layers = {"embed": (d, 768), "norm": (d,), "head": (768, d)} | {f"blocks.{i}.{name}": shape for i in range(28) for name, shape in block.items()}
    expected = {f"{name}.weight": shape for name, shape in layers.items()} | {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    expected |= {"cls_token": (1, 1, d), "pos_embed": (1, grid**2 + 1, d)}
    assert {key: tuple(value.shape) for key, value in decoder.state_dict().items()} == expected


def test_checkpointing_changes_memory_and_nothing_else():
    decoder, dit = rae.Decoder(6, 2, 8, 16, 2, 2, 40), small_dit(average_velocity=True)
    z, t = torch.randn(2, dit.in_channels, dit.input_size, dit.input_size), torch.tensor([0.3, 0.8])
    for network, inputs in ((decoder, (torch.randn(3, 6, 2, 2),)), (dit, (z, t, torch.tensor([1, 2]), t / 2))):
        gradients = []
        for network.checkpointing in (False, True):
            network.zero_grad()
            kept = []
            with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
                loss = network(*inputs).square().sum()
            loss.backward()
            gradients.append((sum(kept), [p.grad.clone() for p in network.parameters()]))
        assert all(torch.equal(a, b) for a, b in zip(gradients[0][1], gradients[1][1])) and gradients[1][0] < gradients[0][0] / 2


def mutate(content, rng):
    """Delete, retype, reshape or add one thing at a random depth of nested dicts and lists -> a word on what was done."""
    place, path = content, []
    while True:
        key = rng.choice([*place] if isinstance(place, dict) else range(len(place)))
        path.append(str(key))
        if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.15:
            break
        place = place[key]
    value = place[key]
    if torch.is_tensor(value) and rng.random() < 0.6:
        new = rng.choice([lambda x: x[..., :-1], lambda x: x[None], lambda x: x.flatten(), lambda x: x.long(), lambda x: x.bool(), lambda x: x.sum(), lambda x: x.new_zeros(0),
                          lambda x: x.to(torch.complex64), lambda x: x.to_sparse(), lambda x: x.to("meta"), lambda x: x.half(), lambda x: torch.cat([x, x]) if x.dim() else x])(value)
    else:
        new = rng.choice([0, 1, -1, 7, 10**9, 10**400, 0.5, float("nan"), float("inf"), True, None, "", "word", "two\nlines", b"bytes", [], [1], {}, {"weight": 1}, {1: 2}, (3,),
                          torch.zeros(3), torch.zeros(()), torch.arange(4), torch.zeros(0), ["a"] * 10, "hf-hub:someone/model"])
    done = rng.choice(["set", "set", "delete", "add"])
    if done == "set":
        place[key] = new
    elif done == "delete":
        del place[key]
    elif isinstance(place, dict):
        place[rng.choice(["extra", "two\nlines", 5, "decoder.blocks.7.norm1.weight", "blocks.99.norm1.weight", "mean"])] = new
    return f"{done} {'.'.join(path)} {one_line(repr(new))}"


def one_line(text):
    return " ".join(text.split())[:80]


def small_checkpoint(num_classes=10):
    """Of the shape of train.py's: a student and the RAE in whose latents it lives."""
    state = small_dit(average_velocity=True).state_dict()
    return dict(stage="mid", step=4, config=dict(stage="mid"), classes=[f"class {i}" for i in range(num_classes)], alpha=2.5, model=state, ema=state, rae=small_rae().packed())


@pytest.mark.parametrize("seed", range(3))
def test_a_checkpoint_with_anything_in_it_is_read_or_refused_in_one_line(seed, tmp_path, monkeypatch):
    rng, path, outcomes = random.Random(seed), tmp_path / "x.pt", []
    monkeypatch.setattr(sys, "argv", [*map(str, ("sample.py", "--ckpt", path, "--num", 2, "--device", "cpu", "--out", tmp_path / "x.png"))])
    torch.save(small_checkpoint(), path)
    whole = path.read_bytes()
    for trial in range(40):
        content = torch.load(io.BytesIO(whole))
        done = [mutate(content, rng) for _ in range(rng.choice((1, 1, 2)))]
        torch.save(content, path)
        (tmp_path / "x.png").unlink(missing_ok=True)
        for read in (lambda: sample.load_network(path), lambda: rae.load_rae(path), sample.main):
            try:
                read()
                outcomes.append(True)
            except rae.UserError as error:
                outcomes.append(False)
                assert ("x.pt: " in str(error) or "give ours with --rae" in str(error)) and len(str(error).splitlines()) == 1, (done, str(error))
            except Exception as error:
                raise AssertionError(f"{done}: {error!r}") from error
    assert 20 < sum(outcomes) < 110


def test_a_published_decoder_with_anything_in_it_is_read_or_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(rae.DECODERS, "XL", dict(hidden_size=16, depth=1, num_heads=2, mlp_hidden=40))
    decoder, statistics = (tmp_path / rae.HUB_FILES[256][kind] for kind in ("decoder", "statistics"))
    rng, outcomes = random.Random(0), []
    for trial in range(80):
        files = {decoder: {"model": published_decoder(16, 6, 256, 16, 40)}, statistics: dict(mean=torch.zeros(6, 16, 16), var=torch.ones(6, 16, 16))}
        done = mutate(files[rng.choice([decoder, statistics])], rng)
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, path)
        try:
            outcomes.append(rae.published_rae(256, tmp_path).decode(torch.zeros(1, 6, 16, 16)).shape == (1, 3, 256, 256))
        except rae.UserError as error:
            outcomes.append(False)
            assert str(error).startswith(str(tmp_path)) and len(str(error).splitlines()) == 1, (done, str(error))
    assert 5 < sum(outcomes) < 75


def test_no_name_in_a_checkpoint_makes_timm_reach_out(tmp_path, monkeypatch):
    packed = small_rae().packed()
    for name in ("hf-hub:someone/model", "local-dir:.", "timm/vit_base_patch16_224", "vit_base_patch16_224.hf-hub:someone/model", "", 5, None):
        monkeypatch.setattr(timm, "create_model", None)
        with pytest.raises(rae.UserError, match="x.pt: its encoder .* is no model of timm"):
            rae.unpack_rae(packed | dict(encoder=packed["encoder"] | dict(name=name)), with_encoder=True, path="x.pt")
    with pytest.raises(rae.UserError, match="x.pt: its encoder .* is not that of its decoder"):  # a path is no business of the file either
        rae.unpack_rae(packed | dict(encoder=packed["encoder"] | dict(weights="/etc/passwd")), path="x.pt")


TINY_VIT = "test_vit.r160_in1k"  # timm's own, for tests: patches of 16, 64 channels, a class token, pixels scaled to [-1, 1]


def test_encoder_of_any_name_takes_its_facts_from_the_network(tmp_path):
    net = timm.create_model(TINY_VIT, img_size=64)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    encoder = rae.Encoder(TINY_VIT, 64, tmp_path / "w.pth")
    images = torch.rand(2, 3, 64, 64)
    net.norm = torch.nn.LayerNorm(64, eps=1e-6, elementwise_affine=False)
    expected = net.eval().forward_features(2 * images - 1)[:, 1:]                                # (2, 16, 64), without the class token
    assert encoder.shape == (64, 4, 4) and relative(encoder(images).flatten(2).transpose(1, 2), expected) < 1e-5
    random = [rae.Encoder(TINY_VIT, 64, "random") for _ in range(2)]
    assert torch.equal(random[0](images), random[1](images)) and random[0].config["weights"] == "random"
    torch.save({k: v for k, v in net.state_dict().items() if k != "blocks.1.attn.qkv.weight"}, tmp_path / "w.pth")
    with pytest.raises(rae.UserError, match="w.pth .*blocks.1.attn.qkv.weight.*--encoder_weights"):
        rae.Encoder(TINY_VIT, 64, tmp_path / "w.pth")
    for name, problem in (("test_resnet.r160_in1k", "not a plain vision transformer"), ("vit_base_patch14_dinov9", "no model of timm; near it: .*vit_base_patch14_dinov2"),
                          ("hf-hub:someone/model", "no model of timm"), ("local-dir:.", "no model of timm"), (f"{TINY_VIT}9", "no model of timm")):
        with pytest.raises(rae.UserError, match=f"--encoder {name}: {problem}"):
            rae.Encoder(name, 64)


def test_random_crop_reaches_every_corner():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8))    # 1.5 times 32: nothing is resized
    whole = np.asarray(image)
    assert np.array_equal(rae.random_crop(image, 32, 0, 0), whole[:32, :32]) and np.array_equal(rae.random_crop(image, 32, 0.999, 0.999), whole[16:, 16:])
    assert np.array_equal(rae.random_crop(image, 32, 0.5, 0), whole[:32, 8:40])
    assert rae.random_crop(Image.new("L", (500, 333)), 32, 0.3, 0.7).size == (32, 32)


# --- rae.py: the decoder's losses ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def perceptual():
    return rae.PerceptualDistance("random", "random")


def test_perceptual_distance_is_lpips(perceptual, tmp_path, monkeypatch):
    a, b = torch.rand(2, 2, 3, 32, 32)
    x, y = ((2 * images - 1 - torch.tensor([-0.03, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.45]).view(3, 1, 1) for images in (a, b))
    expected, widths = torch.zeros(2), []
    for i, stage in enumerate(perceptual.stages):
        x, y = stage(x), stage(y)
        unit = [f / f.square().sum(1, keepdim=True).sqrt().clamp_min(1e-10) for f in (x, y)]
        for n in range(2):
            expected[n] += sum(getattr(perceptual, f"head{i}")[c, 0, 0] * (unit[0][n, c] - unit[1][n, c]).square().mean() for c in range(x.shape[1]))
        widths.append((x.shape[1], x.shape[2]))
        assert isinstance(stage[-1], torch.nn.ReLU)
    assert widths == [(64, 32), (128, 16), (256, 8), (512, 4), (512, 2)]
    assert relative(perceptual(a, b), expected) < 1e-5 and perceptual(a, a).abs().max() == 0
    black = torch.zeros(1, 3, 32, 32, requires_grad=True)
    perceptual(black, a[:1]).sum().backward()
    assert black.grad.isfinite().all()
    torch.save({f"lin{i}.model.1.weight": torch.full((1, c, 1, 1), i + 1.0) for i, (c, _) in enumerate(widths)}, tmp_path / "heads.pth")
    assert [head.mean().item() for head in rae.lpips_heads(tmp_path / "heads.pth")] == [1, 2, 3, 4, 5]
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **options: 1 / 0)
    with pytest.raises(rae.UserError, match=f"{rae.LPIPS_FILE}: not there.*--lpips_weights"):
        rae.lpips_heads(None)


def test_adversarial_loss_pulls_as_hard_as_its_weight_says():
    """reconstruction = w x: at w = (0, 0), L1's gradient is that of one channel's mean, the discriminator's of another's."""
    images = torch.zeros(1, 3, 2, 2)
    images[:, 0] = 1
    x, w = torch.ones(3, 4), torch.zeros(3, requires_grad=True)
    judge = lambda reconstruction: 5 * reconstruction[:, 1].flatten(1)                          # logits (1, 4)
    def gradient(**options):
        w.grad = None
        reconstruction = (w[:, None] * x).view(1, 3, 2, 2)
        loss, metrics = rae.reconstruction_loss(reconstruction, images, discriminator=judge, last_layer=w, **options)
        loss.backward()
        return loss.item(), metrics, w.grad.tolist()
    # d L1 / dw = (-1/3, 0, 0), as |.| has slope 0 at 0; d GAN / dw = (0, -5, 0): the ratio of the norms is 1/15
    loss, metrics, grad = gradient(adversarial_weight=0.75)
    assert metrics["gan_weight"] == pytest.approx(0.75 / 15, rel=1e-5) and grad == pytest.approx([-1 / 3, -0.25, 0]) and loss == pytest.approx(1 / 3)
    loss, metrics, grad = gradient(adversarial_weight=1.0, perceptual=lambda a, b: (a[:, 2] - 3).mean((1, 2)) + 7)
    assert metrics["lpips"] == 4 and grad == pytest.approx([-1 / 3, -(1 + 1 / 9) ** 0.5, 1]) and loss == pytest.approx(1 / 3 + 4)
    judge = lambda reconstruction: 0 * reconstruction[:, 1].flatten(1) + 2
    loss, metrics, grad = gradient(adversarial_weight=0.5)
    assert metrics["gan_weight"] == pytest.approx(0.5e4) and grad == pytest.approx([-1 / 3, 0, 0]) and loss == pytest.approx(1 / 3 - 1e4)


def test_discriminator_loss_is_the_hinge():
    logits = torch.tensor([[2.0, 0.5], [-3.0, 0.5]], requires_grad=True)                          # real, decoded
    loss, metrics = rae.discriminator_loss(lambda images: logits, torch.zeros(1), torch.zeros(1))
    loss.backward()
    assert loss == ((0 + 0.5) / 2 + (0 + 1.5) / 2) / 2 and metrics["d_accuracy"] == 0.75
    assert logits.grad.tolist() == [[0, -0.25], [0, 0.25]]


def test_discriminator_reads_frozen_dino_features():
    judge = rae.Discriminator(32, "random")
    images, seen = torch.rand(2, 3, 32, 32), []
    for head in judge.heads:
        head[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    logits = judge.train()(images)
    assert logits.shape == (2, 5 * 16)
    x = judge.net.norm_pre(judge.net._pos_embed(judge.net.patch_embed((images - rae.IMAGENET_MEAN) / rae.IMAGENET_STD)))
    expected = [x := block(x) for block in judge.net.blocks]
    for got, tokens in zip(seen, [expected[2], expected[5], expected[8], expected[11], judge.net.norm(expected[11])]):
        assert relative(got.transpose(1, 2), tokens[:, 1:] + tokens[:, :1]) < 1e-5
    assert {name.split(".")[0] for name, p in judge.named_parameters() if p.requires_grad} == {"heads"}
    convolutions = [conv for head in judge.heads for conv in (head[0][0], head[1][0], head[2])]
    assert all(0.95 < torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2) < 1.05 for conv in convolutions[:3])
    before = judge.eval()(images)
    assert torch.equal(judge(images), before) and torch.allclose(judge(images[:1]), before[:1], atol=1e-5)  # in eval mode no batch statistics


def test_augment():
    images, half = torch.rand(2, 3, 32, 32), torch.full((2, 5), 0.5)
    assert torch.allclose(rae.augment(images, half), images, atol=1e-6)
    of = lambda **changed: rae.augment(images, torch.stack([torch.full((2,), changed.get(k, 0.5)) for k in ("brightness", "saturation", "contrast", "down", "across")], 1))
    assert torch.allclose(of(brightness=0.0), images - 0.25, atol=1e-6)
    assert torch.allclose(of(saturation=0.0), images.mean(1, keepdim=True).expand_as(images), atol=1e-6)
    assert torch.allclose(of(contrast=0.0).std((1, 2, 3)), images.std((1, 2, 3)) / 2, rtol=1e-4)
    moved = of(down=0.0, across=0.999)                                                           # shown 4 pixels lower, 4 further left
    assert torch.allclose(moved[:, :, 4:, :-4], images[:, :, :-4, 4:], atol=1e-6) and (moved[:, :, :4] == 0.5).all() and (moved[..., -4:] == 0.5).all()


def test_ssim_against_scipy():
    a = torch.rand(2, 3, 24, 24)
    b = (a + 0.2 * torch.rand(2, 3, 24, 24)).clamp(0, 1)
    blur = lambda x: scipy.ndimage.gaussian_filter(x, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]
    def plain(x, y):
        ux, uy = blur(x), blur(y)
        vx, vy, vxy = blur(x * x) - ux**2, blur(y * y) - uy**2, blur(x * y) - ux * uy
        return np.mean((2 * ux * uy + 1e-4) * (2 * vxy + 9e-4) / ((ux**2 + uy**2 + 1e-4) * (vx + vy + 9e-4)))
    expected = [np.mean([plain(*(i[n, c].double().numpy() for i in (a, b))) for c in range(3)]) for n in range(2)]
    assert rae.ssim(a, b).tolist() == pytest.approx(expected, rel=1e-4) and rae.ssim(a, a).tolist() == pytest.approx([1, 1])


def test_center_crop_of_any_size_and_mode():
    for mode, size in (("L", (500, 333)), ("CMYK", (40, 64)), ("RGBA", (33, 32)), ("P", (20, 90))):
        crop = rae.center_crop(Image.new(mode, size), 32)
        assert crop.size == (32, 32) and crop.mode == "RGB"
    marked = Image.new("RGB", (96, 32))
    marked.paste((255, 255, 255), (32, 0, 64, 32))
    assert np.asarray(rae.center_crop(marked, 32)).min() == 255


# --- Samples: everything random is a function of (seed, stage, n) ------------------------------------------------------

def test_toy_images():
    images, labels = train.make_toy_images(40, seed=3)
    assert images.shape == (40, 32, 32, 3) and images.dtype == np.uint8 and labels.tolist() == list(range(10)) * 4
    again, _ = train.make_toy_images(10, seed=3)
    assert np.array_equal(images[:10], again) and not np.array_equal(images[:10], train.make_toy_images(10, seed=4)[0])
    assert all(len(np.unique(image.reshape(-1, 3), axis=0)) >= 8 for image in images)  # anti-aliased edges


def test_samples_depend_on_their_number_alone():
    make = lambda **k: train.Samples("flow", 1, torch.arange(100).view(100, 1), torch.arange(100) % 10, 10, 32, (2, 3), label_drop=0.1, **k)
    a, b = make(), make()
    _ = [b[n] for n in (950, 3, 420)]
    for n in (3, 150, 949):
        assert all(torch.equal(torch.as_tensor(a[n][k]), torch.as_tensor(b[n][k])) for k in ("x", "noise", "uniform", "label", "keep_gap"))
    epoch = lambda e: [int(a[n]["x"]) for n in range(100 * e, 100 * e + 100)]
    assert sorted(epoch(0)) == sorted(epoch(1)) == list(range(100)) and epoch(0) != epoch(1) != list(range(100))
    many = [a[n] for n in range(3000)]
    assert 0.08 < np.mean([s["label"] == 10 for s in many]) < 0.12
    noise = torch.stack([s["noise"] for s in many])
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03 and noise[:-1].flatten().dot(noise[1:].flatten()).abs() / noise.numel() < 0.03
    assert not torch.equal(many[0]["noise"], train.Samples("mid", 1, None, None, 10, 32, (2, 3))[0]["noise"])


def test_unreadable_photographs_are_named_and_replaced_by_the_next(photographs, tmp_path):
    files, labels, _ = train.list_photographs(photographs)
    (tmp_path / "bad.jpg").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\x05IHDR\0\0")  # PIL has a ValueError for this one
    whole, holed = (train.Samples("rae", 0, f, labels, 3, 32, (1,), 13) for f in (files, [*files]))
    holed.images[whole.index(5)] = str(tmp_path / "bad.jpg")
    assert [holed[n]["bad"] for n in (4, 5, 6)] == ["", f"{tmp_path}/bad.jpg\n", ""] and holed[5]["label"] == whole[6]["label"]
    place = dict(zip(("across", "down"), whole[5]["uniform"][:2]))
    crops = [torch.from_numpy(np.array(rae.random_crop(Image.open(files[whole.index(n)]), 32, **place))).permute(2, 0, 1) for n in (5, 6)]
    for sample_, crop in ((whole[5], crops[0]), (holed[5], crops[1])):                           # the same place and flip, another picture
        assert torch.equal(sample_["x"], crop) or torch.equal(sample_["x"], crop.flip(2))
    train.refuse_unreadable({"a.jpg"}, 1000)
    with pytest.raises(rae.UserError, match="2 of 1999 images cannot be read.*a.jpg, b.jpg"):
        train.refuse_unreadable({"b.jpg", "a.jpg"}, 1999)
    gone = train.Samples("rae", 0, [f"gone{i}.jpg" for i in range(60)], labels, 3, 32, (1,), 13)[0]  # grey, and ten names: the loop stops
    assert gone["bad"].count("gone") == 10 and gone["x"].unique().tolist() == [128]


def test_labels_are_those_of_the_network():
    data = train.Data([], torch.tensor([0, 1, 1, 2]), ("cat", "dog", "fish"))
    assert train.labels_among(("cat", "dog", "fish"), data).tolist() == [0, 1, 1, 2]
    assert train.labels_among(("bird", "dog", "ant", "fish", "cat"), data).tolist() == [4, 1, 1, 3]
    for classes in (("cat", "dog"), ("cat", "dog", "fish", "dog")):
        with pytest.raises(rae.UserError, match=f"trained on {len(classes)} classes"):
            train.labels_among(classes, data)


def test_learning_rate_and_the_papers_table():
    flow = train.DEFAULTS | train.PAPER["flow"]
    assert flow["steps"] == 1_000_911 and [train.learning_rate(s, flow) for s in (0, 50_000)] == [2e-4, 2e-4]
    assert train.learning_rate(flow["steps"], flow) == pytest.approx(2e-5)
    assert train.learning_rate(int(0.525 * flow["steps"]), flow) == pytest.approx(1.1e-4, rel=1e-3)
    decoder = train.DEFAULTS | train.PAPER["rae"]
    assert train.learning_rate(0, decoder) < 1e-6 and train.learning_rate(decoder["steps"] // 16 + 1, decoder) == pytest.approx(2e-4, rel=1e-3)
    assert {s: c["batch_size"] for s, c in train.PAPER.items()} == dict(rae=512, flow=1024, mid=8, distill=256, bootstrap=256)
    assert train.PAPER["mid"]["pairs"] * 8 == 512 and train.PAPER_512["mid"]["pairs"] * 8 == 64


# --- sample.py --------------------------------------------------------------------------------------------------------

def test_class_names():
    names = sample.imagenet_names()
    assert sample.parse_classes("golden retriever", names) == [207]
    assert sample.parse_classes("207, tench, 3-5", names) == [207, 0, 3, 4, 5]
    with pytest.raises(rae.UserError, match="golden retriever"):
        sample.parse_classes("golden retreiver", names)
    with pytest.raises(rae.UserError, match="--classes"):
        sample.parse_classes("1000", names)


def test_noise_is_a_function_of_seed_and_index():
    noise = sample.noise_of(3, range(10), (4, 2, 2))
    assert torch.equal(noise[7:9], sample.noise_of(3, [7, 8], (4, 2, 2)))
    assert not torch.equal(noise, sample.noise_of(4, range(10), (4, 2, 2))) and len(noise.unique()) == noise.numel()


# --- The command lines, on sixty photographs ---------------------------------------------------------------------------

def run(*command, folder=HERE, env=None):
    """A command as a user types it -> (exit status, its output)."""
    command = [str(part) for part in command]
    command = [sys.executable, *(["-m", "torch.distributed.run", *command[1:]] if command[0] == "torchrun" else command)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)} | (env or {})
    done = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout + done.stderr


SERVER = """
import json, os, sys, traceback, torch
torch.set_num_threads(1)
import fid, rae, sample, train
for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        answer = os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1])
    elif (answer := os.fork()) == 0:
        os.environ.update(job["environment"])
        script, *arguments = job["arguments"]
        sys.argv, code = [script, *arguments], 0
        os.dup2(os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        try:
            exec(job["fault"])
            rae.run_main(dict(fid=fid, rae=rae, sample=sample, train=train)[script[:-3]].main)
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(answer, flush=True)
"""


class Forks:
    """Commands as forks of a process that has imported the scripts, so that they start at once; `fault` is Python run before one."""

    def __init__(self, folder):
        self.output, self.ports = folder / "output.txt", iter(range(20_000 + os.getpid() % 20_000, 60_000))
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE,
                                       env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})

    def ask(self, **job):
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def start(self, arguments, world=1, faults=("", ""), script="train.py"):
        """-> process numbers, one for each rank."""
        self.output.write_text("")
        port = next(self.ports)
        ranks = [{} if world == 1 else dict(WORLD_SIZE=world, RANK=r, LOCAL_RANK=r, LOCAL_WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for r in range(world)]
        return [self.ask(arguments=[script, *map(str, arguments)], output=str(self.output), fault=fault, environment={k: str(v) for k, v in rank.items()})
                for rank, fault in zip(ranks, faults)]

    def wait(self, pids):
        return [self.ask(wait=pid) for pid in pids]

    def run(self, *arguments, world=1, faults=("", ""), script="train.py"):
        """-> (exit status of each rank, what they wrote, less the configuration)."""
        status = self.wait(self.start(arguments, world, faults, script))
        return status, [line for line in re.split("[\r\n]+", self.output.read_text()) if line.strip() and not re.match(r"{|\w+: [\d,]+ parameters", line) and "%|" not in line]


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.server.kill()


TINY = ("--batch_size", 8, "--steps", 4, "--precision", "fp32", "--device", "cpu", "--save_every", 2, "--log_every", 1)


def in_process(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    train.main()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    images, labels = train.make_toy_images(60, seed=9)
    for i, (image, label) in enumerate(zip(images, labels)):
        (folder / str(label % 3)).mkdir(exist_ok=True)
        picture = Image.fromarray(image).resize((40, 50))
        picture.convert(("RGB", "L", "CMYK")[i % 3]).save(folder / str(label % 3) / f"{i}.jpg")
    return folder


@pytest.fixture(scope="module")
def trained(photographs, tmp_path_factory):
    """All five stages and the toy's first, four steps each: an OUT folder."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for stage in train.TOY:
            in_process(monkeypatch, "--toy", "--data", photographs, "--out", out, "--stage", stage, *TINY)
    return out


def losses(out, stage):
    lines = [json.loads(line) for line in (out / f"{stage}.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["mse"]) for line in lines if "loss" in line}


def copy_inputs(trained, out, *stages):
    for stage in stages:
        (out / f"{stage}.pt").write_bytes((trained / f"{stage}.pt").read_bytes())


def test_every_stage_writes_checkpoint_log_and_pictures(trained):
    for stage in train.TOY:
        content = rae.load_file(trained / f"{stage}.pt")
        assert content["step"] == 4 and content["config"]["stage"] == stage and content["random"] == dict(seed=0, next_sample=32)
        assert sorted(losses(trained, stage)) == [1, 2, 3, 4]
        assert Image.open(trained / f"{stage}.000004.png").size[0] > 200
        changed = [k for k, v in content["ema"].items() if v.is_floating_point() and not torch.equal(v, content["model"][k])]
        assert changed
    student, teacher = (rae.load_file(trained / f"{s}.pt") for s in ("mid", "flow"))
    assert student["ema"]["r_embedder.mlp.2.weight"].any() and "r_embedder.W" not in teacher["ema"]


@pytest.mark.parametrize("stage", [*train.TOY])
def test_resume_is_bitwise(stage, photographs, trained, tmp_path, monkeypatch):
    copy_inputs(trained, tmp_path, *[s for s in train.TOY if s != stage])
    command = ("--toy", "--data", photographs, "--out", tmp_path, "--stage", stage, *TINY)
    real_save = train.save

    def save_and_stop(content, path):
        real_save(content, path)
        raise KeyboardInterrupt
    with monkeypatch.context() as stopped:
        stopped.setattr(train, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            in_process(stopped, *command)
    assert rae.load_file(tmp_path / f"{stage}.pt")["step"] == 2
    torch.manual_seed(123)  # what ran before must not matter
    in_process(monkeypatch, *command)
    resumed, straight = (rae.load_file(folder / f"{stage}.pt") for folder in (tmp_path, trained))
    for part in ("model", "ema"):
        assert [k for k, v in straight[part].items() if not torch.equal(v, resumed[part][k])] == []
    assert losses(tmp_path, stage) == losses(trained, stage)
    in_process(monkeypatch, *command)  # complete: nothing happens
    assert losses(tmp_path, stage) == losses(trained, stage)


def test_mid_training_reads_and_encodes_no_image(trained, tmp_path, monkeypatch):
    """The published code encodes images of which it uses only the shape."""
    copy_inputs(trained, tmp_path, "rae", "flow")
    for owner, name in ((train, "load_data"), (train, "in_batches"), (rae.Encoder, "forward")):
        monkeypatch.setattr(owner, name, None)
    in_process(monkeypatch, "--toy", "--out", tmp_path, "--stage", "mid", *TINY)
    assert losses(tmp_path, "mid") == losses(trained, "mid")


def test_labels_are_dropped_once_a_sample(photographs, trained, tmp_path, monkeypatch):
    """The published code drops labels twice, the second time independently in each copy of the finite difference."""
    copy_inputs(trained, tmp_path, "rae", "flow", "mid")
    embed, draw, seen, drawn = torch.nn.Embedding.forward, train.Samples.__getitem__, [], []
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda self, y: seen.append(y.tolist()) or embed(self, y))
    monkeypatch.setattr(train.Samples, "__getitem__", lambda self, n: drawn.append(draw(self, n)) or drawn[-1])
    in_process(monkeypatch, "--toy", "--data", photographs, "--out", tmp_path, "--stage", "distill", *TINY, "--batch_size", 100, "--steps", 1, "--derivative", "fd")
    y = [sample["label"] for sample in drawn]
    assert seen[:3] == [y, y[3::4] * 2, y] and 3 in y  # the teacher, both sides of the difference where r < t, the student


def test_a_resumed_stage_minds_the_settings_that_it_uses_and_a_damaged_rae_is_named_by_its_file(photographs, trained, tmp_path, monkeypatch):
    copy_inputs(trained, tmp_path, *train.TOY)
    command = ("--toy", "--data", photographs, "--out", tmp_path, *TINY, "--gap_share", 0.5)
    for stage in ("encoder", "rae", "flow", "mid"):
        in_process(monkeypatch, *command, "--stage", stage)
    with pytest.raises(rae.UserError, match="distill.pt: was made with gap_share 0.25, this run has 0.5"):
        in_process(monkeypatch, *command, "--stage", "distill")
    torch.save(rae.load_file(trained / "mid.pt") | dict(rae={"decoder": {}}), tmp_path / "holed.pt")
    with pytest.raises(rae.UserError, match="holed.pt: its RAE is damaged"):
        in_process(monkeypatch, "--toy", "--data", photographs, "--stage", "bootstrap", "--init", tmp_path / "holed.pt", "--out", tmp_path / "other")
    with pytest.raises(rae.UserError, match="--report .*nowhere.pt: no such file"):
        in_process(monkeypatch, "--toy", "--data", photographs, "--report", tmp_path / "nowhere.pt", "--out", tmp_path / "new")


def test_steps_are_evaluations_of_the_network(trained, tmp_path, monkeypatch):
    """The published sampler's 50 steps are 49 evaluations."""
    forward, seen = dit.DiTDH.forward, []
    monkeypatch.setattr(dit.DiTDH, "forward", lambda self, *inputs: seen.append(len(inputs[0])) or forward(self, *inputs))
    for stage, given, steps in (("flow", (), 50), ("flow", ("--steps", 3), 3), ("distill", (), 1), ("distill", ("--steps", 4), 4)):
        seen.clear()
        arguments = "sample.py", "--device", "cpu", "--ckpt", trained / f"{stage}.pt", "--num", 2, *given, "--out", tmp_path / "x.png"
        monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
        sample.main()
        assert seen == [2] * steps


def test_micro_batches_and_processes_follow_the_same_loss(forks, photographs, trained, tmp_path):
    """Same draws per sample, sums in another order: relative tolerance 1e-4 over four steps in float32."""
    jobs = [(stage, 2, ()) for stage in ("encoder", "flow", "mid", "distill", "bootstrap")] + [(stage, 1, ("--micro_batch", 2)) for stage in ("mid", "distill")]
    for stage, world, extra in jobs:
        out = tmp_path / f"{stage}{world}"
        out.mkdir()
        copy_inputs(trained, out, *[s for s in train.TOY if s != stage])
        status, lines = forks.run("--toy", "--data", photographs, "--out", out, "--stage", stage, *TINY, *extra, world=world)
        assert status == [0] * world, lines
        for step, values in losses(trained, stage).items():
            tolerance = 1e-2 if stage == "encoder" else 1e-4  # its loss has the root of a mean over the process's share of the batch
            assert losses(out, stage)[step] == pytest.approx(values, rel=tolerance), (stage, step)


RANDOM = [part for name in ("encoder", "vgg", "lpips", "dino") for part in (f"--{name}_weights", "random")]


def test_imagenets_path_from_files_to_one_step_with_networks_of_random_weights(photographs, tmp_path, monkeypatch):
    """The rows of ImageNet, small: LPIPS and the adversarial loss come in at their steps and resume; latents come from files."""
    paper = ("--data", photographs, "--resolution", 32, "--model", "toy", *TINY, "--workers", 0)
    decoder = ("--stage", "rae", "--encoder", TINY_VIT, *RANDOM, "--checkpointing", "--steps", 8)
    in_process(monkeypatch, *paper, *decoder, "--out", tmp_path / "a")
    lines = {line["step"]: line for line in map(json.loads, (tmp_path / "a" / "rae.jsonl").read_text().splitlines()) if "step" in line}
    assert [("d_loss" in lines[k], "gan" in lines[k]) for k in range(1, 9)] == 3 * [(False, False)] + [(True, False)] + 4 * [(True, True)]
    assert all(line["lpips"] > 0 and line["loss"] == pytest.approx(line["l1"] + line["lpips"] + line.get("gan_weight", 0) * line.get("gan", 0)) for line in lines.values())
    real_save = train.save

    def save_and_stop(content, path):
        real_save(content, path)
        if content["step"] == 6:
            raise KeyboardInterrupt
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(train, "save", save_and_stop)
        in_process(stopped, *paper, *decoder, "--out", tmp_path / "b")
    in_process(monkeypatch, *paper, *decoder, "--out", tmp_path / "b")
    straight, resumed = (rae.load_file(tmp_path / out / "rae.pt") for out in "ab")
    for part in ("model", "ema", "discriminator"):
        assert [k for k, v in straight[part].items() if not torch.equal(v, resumed[part][k])] == []
    for stage in ("flow", "mid", "distill", "bootstrap"):
        in_process(monkeypatch, *paper, "--stage", stage, "--out", tmp_path / "a", "--checkpointing")
        assert sorted(losses(tmp_path / "a", stage)) == [1, 2, 3, 4]
    network, content = sample.load_network(tmp_path / "a" / "bootstrap.pt")
    images = sample.generate(network, rae.load_rae(tmp_path / "a" / "bootstrap.pt"), sample.noise_of(0, range(2), (64, 2, 2)), torch.tensor([0, 1]), 1, content["alpha"])
    assert images.shape == (2, 3, 32, 32) and content["alpha"] == 0.25 and content["rae"]["encoder"]["name"] == TINY_VIT


def test_a_released_teacher_knows_imagenets_classes_by_name(photographs, trained, tmp_path, monkeypatch):
    teacher = dit.DiTDH(4, 96, num_classes=1000, **dit.MODELS["toy"])
    torch.save({"ema": teacher.state_dict()}, tmp_path / "released.pt")
    copy_inputs(trained, tmp_path, "rae")
    for i, folder in enumerate(("n02099601", "n01440764", "n07753592")):                          # golden retriever 207, tench 0, banana 954
        shutil.copytree(photographs / str(i), tmp_path / "data" / folder)
    released = ("--toy", "--out", tmp_path, "--teacher", tmp_path / "released.pt", *TINY)
    in_process(monkeypatch, *released, "--stage", "mid")
    assert rae.load_file(tmp_path / "mid.pt")["classes"][207] == "golden retriever"
    seen, real = [], train.Samples
    monkeypatch.setattr(train, "Samples", lambda *a, **k: seen.append(k["labels"]) or real(*a, **k))
    in_process(monkeypatch, *released, "--stage", "distill", "--data", tmp_path / "data")
    assert sorted(seen[0].unique().tolist()) == [0, 207, 954]
    with pytest.raises(rae.UserError, match="trained on 1000 classes, and '0' is not"):
        in_process(monkeypatch, *released, "--stage", "distill", "--data", photographs, "--init", tmp_path / "mid.pt", "--rae", tmp_path / "rae.pt", "--out", tmp_path / "b")


def test_two_processes_share_the_decoders_optimiser_and_agree_on_statistics_and_on_bad_files(forks, photographs, tmp_path, monkeypatch):
    """Losses to 1e-4, statistics of the latents to 1e-6; the sharded optimiser's checkpoint is a plain one."""
    paper = ("--data", photographs, "--resolution", 32, "--model", "toy", *TINY, "--workers", 1, "--stage", "rae", "--encoder", TINY_VIT, *RANDOM, "--adversarial", 0, "--perceptual", 0)
    in_process(monkeypatch, *paper, "--out", tmp_path / "one")
    status, lines = forks.run(*paper, "--shard", "--out", tmp_path / "two", world=2)
    assert status == [0, 0], lines
    for step, values in losses(tmp_path / "one", "rae").items():
        assert losses(tmp_path / "two", "rae")[step] == pytest.approx(values, rel=1e-4)
    one, shared = (rae.load_file(tmp_path / out / "rae.pt") for out in ("one", "two"))
    statistics = rae.LatentStatistics()
    encoder = rae.Encoder(TINY_VIT, 32, "random")
    for z in train.in_batches(train.list_photographs(photographs)[0], 32, torch.device("cpu"), encoder, "again", batch_size=7):
        statistics.update(z)
    for key, other in zip(("mean", "var"), statistics.mean_and_variance()):
        scale = one["rae"]["state"]["var"].sqrt() if key == "mean" else one["rae"]["state"]["var"]
        assert all(((value - one["rae"]["state"][key]) / scale).abs().max() < 2e-6 for value in (shared["rae"]["state"][key], other))
        assert relative(shared["rae"]["state"][key], one["rae"]["state"][key]) < 1e-6
    moments = [torch.cat([content["optimizer"]["state"][k]["exp_avg"].flatten() for k in range(55)]) for content in (one, shared)]
    assert relative(moments[1], moments[0]) < 1e-5 and len(one["optimizer"]["state"]) == len(shared["optimizer"]["state"]) == 55
    folder = tmp_path / "photographs"
    shutil.copytree(photographs, folder)
    (folder / "0" / "notes.jpg").write_text("not a picture")
    status, output = forks.run(*paper, "--data", folder, "--out", tmp_path / "three", "--steps", 30, world=2)
    lines = [line for line in output if line.startswith("train.py: ")]
    assert status == [2, 2] and len(lines) == 1 and "1 of 61 images cannot be read" in lines[0] and "notes.jpg" in lines[0], output


def test_published_form_has_the_gradient_of_ours():
    """What --bench holds ours against does the same work: in float64, with the same difference, gradients are equal."""
    net, teacher = small_dit(average_velocity=True).double(), small_dit().double()
    x, noise, y = *torch.randn(2, 8, 8, 4, 4, dtype=torch.float64), torch.arange(8)
    t, r = meanflow.mean_flow_times(torch.rand(2, 8, dtype=torch.float64), torch.arange(8) % 4 == 3, 2.5)
    gradients = []
    for loss in (train.published_mean_flow_loss(net, x, y, 2.5, teacher, t, r, noise), meanflow.mean_flow_loss(net, x, y, 2.5, teacher, "fd", t=t, r=r, noise=noise)[0]):
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()), allow_unused=True) if g is not None]))
    assert relative(*gradients) < 1e-9


def test_bench_ends_in_one_json_object(monkeypatch, capsys):
    monkeypatch.setattr(train, "ProcessPoolExecutor", ThreadPoolExecutor)                       # the memory is not looked at here
    in_process(monkeypatch, "--toy", "--bench", "--steps", 1, "--batch_size", 4, "--device", "cpu", "--precision", "fp32")
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = [(row["stage"], row["form"]) for row in last["rows"]]
    assert rows == [("flow", "ours"), ("mid", "ours")] + [(stage, form) for stage in ("distill", "bootstrap") for form in ("ours", "published")]
    assert all(row["ms"] > 0 and row["images_per_s"] > 0 and 0 < row["share_of_peak"] < 2 for row in last["rows"])
    # of the published form's products ours need 1 (teacher) + 3 + a quarter of a JVP, against 1 + 9
    tflop = {(row["stage"], row["form"]): row["tflops"] * row["ms"] for row in last["rows"]}
    assert tflop["distill", "published"] > 2 * tflop["distill", "ours"] and tflop["bootstrap", "published"] > 2.3 * tflop["bootstrap", "ours"]


@pytest.mark.parametrize("stage", ("flow", "mid", "distill"))
def test_compile_goes_through_every_kind_of_loss(stage, photographs, trained, tmp_path, monkeypatch):
    """Captured graphs, forward mode among them, run as they are: without the compiler, which takes minutes and a C++ compiler."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: compiled(net, backend="eager"))
    copy_inputs(trained, tmp_path, *[s for s in train.TOY if s != stage])
    in_process(monkeypatch, "--toy", "--data", photographs, "--out", tmp_path, "--stage", stage, *TINY, "--steps", 2, "--compile")
    for step, values in losses(tmp_path, stage).items():
        assert values == pytest.approx(losses(trained, stage)[step], rel=1e-3)


def test_whole_toy_dry_run_reports_and_leaves_nothing(tmp_path):
    status, output = run("torchrun", "--standalone", "--nproc_per_node=2", HERE / "train.py", "--toy", "--dry_run", "--out", tmp_path / "toy", folder=tmp_path)
    assert status == 0, output
    assert "student after bootstrap" in output and "Frechet distance" in output and list(tmp_path.iterdir()) == []


def test_sample_from_checkpoint(trained, tmp_path, monkeypatch, capsys):
    def go(*arguments):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--device", "cpu", *map(str, arguments)])
        sample.main()
    pictures = []
    for size in (1, 7, 64):
        go("--ckpt", trained / "distill.pt", "--num", 9, "--batch_size", size, "--npz", tmp_path / f"{size}.npz", "--out", tmp_path / "grid.png")
        data = np.load(tmp_path / f"{size}.npz")
        pictures.append(data["arr_0"].astype(int))
        assert data["arr_0"].shape == (9, 32, 32, 3) and data["arr_0"].dtype == np.uint8 and data["arr_1"].tolist() == [0, 1, 2] * 3
    assert all(np.abs(p - pictures[0]).max() <= 1 for p in pictures)
    go("--ckpt", trained / "flow.pt", "--steps", 2, "--num", 4, "--classes", "2,0", "--out", tmp_path / "folder")
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["000000_2.png", "000001_0.png", "000002_2.png", "000003_0.png"]
    go("--ckpt", trained / "mid.pt", "--num", 3)
    assert (trained / "mid.samples.png").exists()
    bare = tmp_path / "bare.pt"  # as published weights come: a state dict, with wrappers' prefixes
    torch.save({"ema": {f"module._orig_mod.{k}": v for k, v in rae.load_file(trained / "flow.pt")["ema"].items()}}, bare)
    go("--ckpt", bare, "--rae", trained / "rae.pt", "--num", 3, "--steps", 1, "--classes", "1", "--out", tmp_path / "bare.png")
    assert (tmp_path / "bare.png").exists()


def test_sample_stopped_and_run_again_gives_the_same_bytes_without_repeating_work(trained, tmp_path, monkeypatch, capsys):
    calls, real = [], sample.generate

    def go(name, *more, stop_after=99):
        def counted(model, rae, noise, *rest):
            if len(calls) == stop_after:
                raise KeyboardInterrupt
            calls.append(len(noise))
            return real(model, rae, noise, *rest)
        calls.clear()
        monkeypatch.setattr(sample, "generate", counted)
        files = () if name == "grid" else ("--npz", tmp_path / f"{name}.npz")
        monkeypatch.setattr(sys, "argv", [*map(str, ("sample.py", "--device", "cpu", "--ckpt", trained / "mid.pt", "--num", 11, "--batch_size", 2, *files,
                                                     "--out", tmp_path / (name if files else "grid.png"), *more))])
        try:
            sample.main()
        except KeyboardInterrupt:
            pass
        return sum(calls)

    def content(name):
        return [path.read_bytes() for path in [tmp_path / f"{name}.npz", *sorted((tmp_path / name).iterdir())]]
    assert go("whole") == 11 and len(content("whole")) == 12
    assert go("stopped", stop_after=2) == 4 and not (tmp_path / "stopped.npz").exists()
    assert go("stopped", "--seed", 1, stop_after=1) == 2  # another command does not go on with it
    assert go("stopped", "--seed", 0) == 9 and content("stopped") == content("whole")  # the other seven, and two written over
    assert go("stopped") == 0 and content("stopped") == content("whole") and "all there already" in capsys.readouterr().out
    assert len(list(tmp_path.glob("stopped.npz.*.partial"))) == 1  # of seed 1
    data = np.load(tmp_path / "whole.npz")
    assert sorted(data.files) == ["arr_0", "arr_1"] and data["arr_1"].dtype == np.int64 and fid.open_source(tmp_path / "whole.npz").count == 11
    assert [np.array_equal(np.asarray(Image.open(path)), image) for path, image in zip(sorted((tmp_path / "whole").iterdir()), data["arr_0"])] == [True] * 11
    assert (go("grid"), go("grid"), go("grid", "--steps", 2)) == (11, 0, 11)


def test_sample_of_two_processes(forks, trained, tmp_path):
    command = ("--ckpt", trained / "mid.pt", "--num", 9, "--batch_size", 2, "--device", "cpu")
    for world, out in ((1, tmp_path / "1"), (2, tmp_path / "2.png")):
        status, lines = forks.run(*command, "--npz", tmp_path / f"{world}.npz", "--out", out, world=world, script="sample.py")
        assert status == [0] * world, lines
    one, two = (np.load(tmp_path / f"{n}.npz") for n in (1, 2))
    assert np.array_equal(one["arr_1"], two["arr_1"]) and np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1
    assert len(list((tmp_path / "1").iterdir())) == 9 and (tmp_path / "2.png").exists() and not list(tmp_path.glob("*.partial"))


def test_frechet_distance_in_the_encoders_features_by_command_line(photographs, trained, tmp_path, monkeypatch, capsys):
    for seed in (0, 1):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--device", "cpu", "--ckpt", str(trained / "flow.pt"), "--steps", "1", "--num", "120", "--seed", str(seed),
                                          "--npz", str(tmp_path / f"{seed}.npz"), "--out", str(tmp_path / "x.png")])
        sample.main()
    fid.main([str(tmp_path / "0.npz"), str(tmp_path / "1.npz"), "--features", "dino", "--weights", str(trained / "flow.pt"), "--json"])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["fd"] >= 0 and record["samples"]["count"] == 120


def test_scores_during_training_are_those_of_sample_and_fid(photographs, trained, tmp_path, monkeypatch, capsys):
    def make(checkpoint, name, seed):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--device", "cpu", "--ckpt", str(checkpoint), "--num", "110", "--seed", str(seed), "--npz", str(tmp_path / name), "--out", str(tmp_path / f"{name}.png")])
        sample.main()
    make(trained / "mid.pt", "reference.npz", 5)
    copy_inputs(trained, tmp_path, "encoder", "rae", "flow", "mid")
    features = ("--features", "dino", "--weights", tmp_path / "rae.pt")
    scoring = ("--eval_every", 3, "--eval_num", 110, "--ref", tmp_path / "reference.npz", *(str(f).replace("--", "--eval_") for f in features))
    in_process(monkeypatch, "--toy", "--data", photographs, "--out", tmp_path, "--stage", "distill", *TINY, *scoring)
    scores = [line for line in map(json.loads, (tmp_path / "distill.jsonl").read_text().splitlines()) if "scores" in line]
    assert [line["step"] for line in scores] == [3, 4] and losses(tmp_path, "distill") == losses(trained, "distill")
    make(tmp_path / "distill.pt", "offline.npz", 0)
    capsys.readouterr()
    fid.main([str(tmp_path / "offline.npz"), str(tmp_path / "reference.npz"), *map(str, features), "--json"])
    offline = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores[1]["scores"]["fd"] == pytest.approx(offline["fd"], rel=1e-6) and scores[1]["scores"]["samples"]["labels"] == offline["samples"]["labels"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--toy", "--stage", "flow", "--eval_every", "5"])
    with pytest.raises(rae.UserError, match="--eval_every: needs --ref"):
        train.main()


def test_bad_input_ends_in_one_line(photographs, trained, tmp_path, monkeypatch, capsys):
    """No such folder, empty folder, text among photographs, one class, wrong stage, cut file, unknown class, ..."""
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "one" / "cat").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "one" / "cat" / "a.png")
    for name in ("a", "b"):
        (tmp_path / "text" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "text" / name / "good.png")
    (tmp_path / "text" / "a" / "notes.jpg").write_text("not a picture")
    (tmp_path / "cut.pt").write_bytes((trained / "distill.pt").read_bytes()[:5000])
    toy = ("train.py", "--toy", "--out", tmp_path / "out")
    files = ("train.py", "--stage", "rae", "--data", photographs, "--resolution", "32", "--model", "toy", "--out", tmp_path / "out")
    table = {
        (*toy, "--data", tmp_path / "nowhere"): "--data .*nowhere: no such folder",
        (*toy, "--data", tmp_path / "empty"): "--data .*empty: .*folder of images for each class",
        (*toy, "--data", tmp_path / "text"): "notes.jpg",
        (*toy, "--data", tmp_path / "one"): "only one class folder, 'cat'",
        (*toy, "--stage", "mid"): "flow.pt: no such file; train the stage flow first, or give its checkpoint with --teacher",
        (*toy, "--stage", "mid", "--teacher", trained / "distill.pt"): "--teacher .*distill.pt: holds an average velocity",
        (*toy, "--stage", "bootstrap", "--data", photographs, "--init", trained / "rae.pt"): "rae.pt: a checkpoint of the stage rae",
        (*toy, "--stage", "flow", "--data", photographs, "--rae", tmp_path / "cut.pt"): "cut.pt: not a readable checkpoint",
        (*toy, "--steps", "0"): "--steps: must be a whole number of at least 1",
        (*toy, "--batch_size", "ten"): "--batch_size",
        ("train.py",): "give --stage, or --toy",
        ("train.py", "--stage", "flow"): "needs images: give --data",
        ("train.py", "--stage", "mid", "--out", tmp_path / "out"): "no teacher for resolution 256: looked for DiTs/.*stage2_model.pt of nyu-visionx.*--teacher",
        ("train.py", "--stage", "mid", "--out", tmp_path / "out", "--resolution", "64"): "no published teacher for resolution 64, only for 256 and 512; .*--teacher",
        ("train.py", "--stage", "mid", "--resolution", "100"): "--resolution 100: must be a multiple of 16",
        ("train.py", "--stage", "mid", "--model", "L"): "--model L: sizes of the transformer are toy, S, B, XL",
        ("train.py", "--stage", "mid", "--encoder", TINY_VIT): "--encoder .*: belongs to --stage rae",
        (*files, "--encoder", "resnet18"): "--encoder resnet18: not a plain vision transformer",
        (*files, "--encoder", TINY_VIT): "no weights for test_vit.r160_in1k: looked for timm/test_vit.r160_in1k .*--encoder_weights",
        (*files, "--encoder", TINY_VIT, "--encoder_weights", "random"): "no weights for vgg16.tv_in1k: .*--vgg_weights",
        (*files, "--encoder", TINY_VIT, *RANDOM, "--lpips_weights", trained / "rae.pt"): "rae.pt: not the linear heads of LPIPS",
        (*files, "--perceptual", "-1"): "--perceptual: must be a number between 0 and 1e",
        (*toy, "--gap_share", "2"): "--gap_share: must be a number between 0 and 1, not '2'",
        ("train.py", "--bench", "--stage", "rae"): "--bench: measures flow",
        ("train.py", "--report", "x.pt", "--stage", "mid"): "--report: needs --toy",
        ("sample.py", "--ckpt", tmp_path / "none.pt"): "none.pt: no such file",
        ("sample.py", "--ckpt", tmp_path / "cut.pt"): "cut.pt: not a readable checkpoint, or cut short",
        ("sample.py", "--ckpt", trained / "rae.pt"): "rae.pt: a checkpoint of the stage rae",
        ("sample.py", "--ckpt", trained / "flow.pt", "--rae", trained / "encoder.pt"): "encoder.pt: holds no RAE",
        ("sample.py", "--ckpt", trained / "mid.pt", "--classes", "unicorn"): "no class 'unicorn' among 3",
        ("sample.py", "--ckpt", trained / "mid.pt", "--npz", tmp_path / "folder.npz"): "--npz .*folder.npz: is a folder",
        ("sample.py", "--ckpt", trained / "mid.pt", "--out", tmp_path / "cut.pt"): "--out .*cut.pt: cannot be made",
        ("sample.py", "--ckpt", trained / "mid.pt", "--steps", "0"): "--steps: must be a whole number of at least 1",
        ("rae.py", tmp_path / "text" / "a" / "notes.jpg", "--rae", trained / "rae.pt"): "notes.jpg: not a readable image",
    }
    for command, expected in table.items():
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        with pytest.raises(SystemExit) as end:
            rae.run_main(dict(train=train, sample=sample, rae=rae)[command[0][:-3]].main)
        lines = [line for line in re.split("[\r\n]+", "".join(capsys.readouterr())) if line.strip() and not re.match(r"read:|\w+: [\d,]+ parameters", line)]
        assert end.value.code == 2 and len(lines) == 1 and re.search(f"^{command[0]}: .*{expected}", lines[0]), (command, lines)
    for command in ((*toy, "--steps", "0"), ("sample.py", "--ckpt", tmp_path / "cut.pt"), ("rae.py", tmp_path / "nothing.png")):  # and as processes
        status, output = run(*command)
        assert status == 2 and len(output.splitlines()) == 1 and output.startswith(f"{command[0]}: "), output


def test_batch_that_the_processes_do_not_divide(forks, photographs, tmp_path):
    status, lines = forks.run("--toy", "--stage", "encoder", "--data", photographs, "--out", tmp_path, "--batch_size", 7, world=2)
    assert status == [2, 2] and lines == ["train.py: --batch_size 7: cannot be divided among 2 processes; give a multiple of 2"]


def test_help_has_a_line_for_each_flag_and_ends_in_examples(monkeypatch, capsys):
    for script in (sample, fid, rae):
        name = f"{script.__name__}.py"
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit):
            script.main()
        text = capsys.readouterr().out
        flags = re.findall(r"^  (-.*)$", text, re.M)[1:]
        assert len(flags) > 4 and all(re.search(r"  \w.*(default|seed|published)", flag) and len(flag) < 140 for flag in flags), text
        assert len(text.split("examples:")[1].strip().splitlines()) >= 4 and f"python {name}" in text.split("examples:")[1]


def test_reconstruction_command(forks, photographs, trained, tmp_path):
    status, output = run(HERE / "rae.py", photographs / "0" / "0.jpg", "--rae", trained / "rae.pt", folder=tmp_path)
    assert status == 0 and "PSNR" in output and (tmp_path / "reconstruction.png").exists()
    status, lines = forks.run(photographs, "--rae", trained / "rae.pt", "--out", tmp_path / "pairs", "--batch_size", 25, script="rae.py")
    output = "\n".join(lines)
    assert status == [0] and len([*(tmp_path / "pairs" / "reconstructions").iterdir()]) == len([*(tmp_path / "pairs" / "originals").iterdir()]) == 60
    a, b = (np.stack([np.asarray(Image.open(p), float) / 255 for p in sorted((tmp_path / "pairs" / f).iterdir())]) for f in ("reconstructions", "originals"))
    assert f"PSNR {np.mean(-10 * np.log10(((a - b) ** 2).mean((1, 2, 3)))):.2f} dB, SSIM" in output and "rFID: python fid.py" in output


# --- faults: what a run survives --------------------------------------------------------------------------------------

AT_STEP = "real, done = train.learning_rate, []\ndef at(step, c):\n    if step == %d and not done:\n        done.append(1)\n        %s\n    return real(step, c)\ntrain.learning_rate = at"


def wait_for(condition):
    end = time.time() + 60
    while not condition():
        assert time.time() < end
        time.sleep(0.001)


def a_run(trained, photographs, out, stage, *more):
    """The command of a short run of a stage, and what it starts from."""
    out.mkdir(exist_ok=True)
    copy_inputs(trained, out, *[s for s in train.TOY if s != stage])
    return ("--toy", "--data", photographs, "--out", out, "--stage", stage, *TINY, "--steps", 6, "--timeout", 1, *more)


def assert_undisturbed(out, straight, stage, steps=6):
    """Weights, EMA and moments bit for bit, and a log with every step once."""
    ours, theirs = (rae.load_file(folder / f"{stage}.pt") for folder in (out, straight))
    for part in ("model", "ema"):
        assert [k for k, v in theirs[part].items() if not torch.equal(v, ours[part][k])] == []
    assert all(torch.equal(a, b) for k in theirs["optimizer"]["state"] for a, b in zip(theirs["optimizer"]["state"][k].values(), ours["optimizer"]["state"][k].values()))
    lines = [[json.loads(line) for line in (folder / f"{stage}.jsonl").read_text().splitlines()] for folder in (out, straight)]
    told = [[(line["step"], line["loss"], line["grad_norm"], line["grad_max"]) for line in log if "loss" in line] for log in lines]
    assert told[0] == told[1] and [step for step, *_ in told[0]] == list(range(1, steps + 1))


@pytest.fixture(scope="module")
def straight(forks, trained, photographs, tmp_path_factory):
    """Folder of an undisturbed run of a stage by so many processes, and how long it took; each is made once."""
    made = {}

    def get(stage="mid", world=1):
        if (stage, world) not in made:
            folder, clock = tmp_path_factory.mktemp("straight"), time.time()
            status, lines = forks.run(*a_run(trained, photographs, folder, stage), world=world)
            assert status == [0] * world, lines
            made[stage, world] = folder, time.time() - clock
        return made[stage, world]
    return get


def kill_and_continue(forks, trained, photographs, straight, folder, stage, kills, world=1, seed=0):
    """`kills` runs killed with SIGKILL, every other one while it saves, each continued to its end -> kills that left a checkpoint half written."""
    draw, saving, (undisturbed, length) = np.random.default_rng(seed), 0, straight(stage, world)
    for i in range(kills):
        out = folder / f"{i}"
        command, temporary, status = a_run(trained, photographs, out, stage), out / f"{stage}.pt.tmp", [0]
        while -9 not in status:                                     # one that was done before it was hit does not count
            shutil.rmtree(out)
            pids = forks.start(a_run(trained, photographs, out, stage), world)
            if i % 2:
                wait_for(temporary.exists)
            time.sleep(draw.uniform(0, 0.02 if i % 2 else length))
            os.kill(pids[draw.integers(world)], 9)
            status = forks.wait(pids)
        assert all(code in (-9, 2) for code in status) and (world == 1 or "another process" in forks.output.read_text() or status == [-9, -9]), forks.output.read_text()
        saving += temporary.exists()
        status, lines = forks.run(*command, world=world)
        assert status == [0] * world, lines
        assert_undisturbed(out, undisturbed, stage)
        shutil.rmtree(out)
    return saving


def test_killed_runs_end_as_undisturbed_ones(forks, trained, photographs, straight, tmp_path):
    assert kill_and_continue(forks, trained, photographs, straight, tmp_path, "mid", kills=4)


@slow
@pytest.mark.parametrize("world", (1, 2))
@pytest.mark.parametrize("stage", [*train.TOY])
def test_chaos(stage, world, forks, trained, photographs, straight, tmp_path):
    saving = kill_and_continue(forks, trained, photographs, straight, tmp_path, stage, kills=20, world=world)
    print(f"{stage}, {world} process(es): 20 of 20 equal, {saving} of them killed with a checkpoint half written")


@pytest.mark.parametrize("moment", (1, 2))
def test_killed_between_the_two_renames_of_saving(moment, forks, trained, photographs, straight, tmp_path):
    """Before the first the old checkpoint is the newest; between them it waits under its second name."""
    die = f"import signal, pathlib\nreal, calls = pathlib.Path.replace, []\ndef replace(*a):\n    calls.append(a)\n    if len(calls) == {1 + moment}: os.kill(os.getpid(), 9)\n    return real(*a)\npathlib.Path.replace = replace"
    command = a_run(trained, photographs, tmp_path / "out", "mid")
    assert forks.run(*command, faults=[die])[0] == [-9]
    assert (tmp_path / "out" / "mid.pt").exists() == (moment == 1) and (tmp_path / "out" / "mid.previous.pt").exists() == (moment == 2)
    status, lines = forks.run(*command)
    assert status == [0] and any("mid.pt: gone; going on from" in line for line in lines) == (moment == 2), lines
    assert_undisturbed(tmp_path / "out", straight("mid", 1)[0], "mid")


@pytest.mark.parametrize("name, world", (("SIGTERM", 1), ("SIGINT", 1), ("SIGUSR1", 1), ("SIGTERM", 2)))
def test_signals_save_and_end(name, world, forks, trained, photographs, straight, tmp_path):
    number = getattr(signal, name)
    command = a_run(trained, photographs, tmp_path / "out", "mid")
    here = AT_STEP % (2, f"os.kill(os.getpid(), {number})")
    status, lines = forks.run(*command, world=world, faults=["", here][-world:])                # of two processes, the second alone hears it
    assert status == [128 + number] * world and f"mid: {name}, saved at step 3; the same command goes on" in lines, lines
    assert rae.load_file(tmp_path / "out" / "mid.pt")["step"] == 3
    assert forks.run(*command, world=world)[0] == [0] * world
    assert_undisturbed(tmp_path / "out", straight("mid", world)[0], "mid")


def test_full_disk_leaves_the_last_checkpoint(forks, trained, photographs, straight, tmp_path):
    command = a_run(trained, photographs, tmp_path, "mid")
    assert forks.run(*command, "--steps", 2)[0] == [0]
    before = (tmp_path / "mid.pt").read_bytes()
    status, lines = forks.run(*command, faults=[f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2},) * 2)"])
    assert status == [2] and len(lines) == 1 and re.search("^train.py: .*mid.pt: step 4 cannot be saved .File too large.*is kept", lines[0].replace("[Errno 27] ", "")), lines
    assert (tmp_path / "mid.pt").read_bytes() == before and not list(tmp_path.glob("*.tmp"))
    (tmp_path / "file").write_text("")
    status, lines = forks.run(*command, "--out", tmp_path / "file", "--rae", tmp_path / "rae.pt", "--teacher", tmp_path / "flow.pt")
    assert status == [2] and len(lines) == 1 and "file: cannot be written" in lines[0], lines


def test_damaged_checkpoints_are_named_and_the_one_before_is_used(forks, trained, photographs, straight, tmp_path):
    command, path = a_run(trained, photographs, tmp_path / "out", "mid"), tmp_path / "out" / "mid.pt"
    assert forks.run(*command, "--steps", 4)[0] == [0]
    whole, evidence = path.read_bytes(), tmp_path / "executed"
    path.write_bytes(whole[:-1000])
    status, lines = forks.run(*command)
    assert status == [0] and re.search("mid.pt: .*; going on from .*mid.previous.pt", lines[0]), lines
    assert_undisturbed(tmp_path / "out", straight("mid", 1)[0], "mid")
    assert path.with_suffix(".damaged.pt").read_bytes() == whole[:-1000]

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {evidence}",)
    for damage in (lambda p: torch.save(Hostile(), p), lambda p: p.write_bytes(b"PK\3\4 not a checkpoint"), lambda p: torch.save({"x": torch.ones(3)}, p)):
        path.with_suffix(".previous.pt").unlink(missing_ok=True)
        damage(path)
        before = path.read_bytes()
        status, lines = forks.run(*command)
        assert status == [2] and len(lines) == 1 and lines[0].startswith(f"train.py: {path}"), lines
        assert path.read_bytes() == before and not evidence.exists()


@pytest.mark.parametrize("world", (1, 2))
def test_a_step_without_finite_gradient_changes_nothing_and_ten_end_the_run(world, forks, trained, photographs, straight, tmp_path):
    """The noise of sample 31, the last of step 4, is not a number; of two processes, one draws it."""
    spoil = "real = train.Samples.__getitem__\ndef draw(self, n):\n    s = real(self, n)\n    if %s: s['noise'].fill_(float('nan'))\n    return s\ntrain.Samples.__getitem__ = draw"
    command = a_run(trained, photographs, tmp_path, "distill", "--save_every", 1)
    status, lines = forks.run(*command, "--steps", 4, world=world, faults=[spoil % "n == 31"] * 2)
    assert status == [0] * world and "distill: skipped" in lines[0], lines
    before, after = (rae.load_file(tmp_path / name) for name in ("distill.previous.pt", "distill.pt"))
    assert (before["step"], before["skipped"], after["step"], after["skipped"]) == (3, 0, 4, 1)
    assert all(torch.equal(v, after["model"][k]) for k, v in before["model"].items())
    assert all(torch.equal(a, b) for k, v in before["optimizer"]["state"].items() for a, b in zip(v.values(), after["optimizer"]["state"][k].values()))
    line = json.loads((tmp_path / "distill.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 4 and line["loss"] is None and line["skipped"][0]["step"] == 4 and line["skipped"][0]["loss"] == "nan"
    low, mean, high = line["skipped"][0]["t"]
    assert 0 < low < mean < high < 1 and all(a <= b for a, b in zip(line["skipped"][0]["r"], line["skipped"][0]["t"]))
    status, lines = forks.run(*command, "--steps", 40, "--log_every", 3, "--save_every", 100, world=world, faults=[spoil % "n > 60"] * 2)
    assert status == [2] * world and "no finite loss and gradient in 10 steps in a row, up to 17" in lines[-1], lines
    assert rae.load_file(tmp_path / "distill.pt")["step"] == 4
    status, lines = forks.run(*command, "--steps", 8, world=world)
    assert status == [0] * world and sorted(losses(tmp_path, "distill")) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_folder_that_vanishes_or_changes(photographs, tmp_path, monkeypatch, capsys):
    shutil.copytree(photographs, tmp_path / "data")
    paper = ("--data", tmp_path / "data", "--resolution", 32, "--model", "toy", *TINY, "--workers", 0, "--stage", "rae", "--encoder", TINY_VIT, *RANDOM,
             "--adversarial", 0, "--perceptual", 0, "--out", tmp_path / "out")
    real = train.learning_rate
    with monkeypatch.context() as vanishing, pytest.raises(rae.UserError, match=r"--data: \d+ of 60 images cannot be read, more than 1 in 1000: .*0.jpg"):
        vanishing.setattr(train, "learning_rate", lambda step, c: (shutil.rmtree(tmp_path / "data", ignore_errors=True) if step == 2 else None, real(step, c))[1])
        in_process(vanishing, *paper)
    assert rae.load_file(tmp_path / "out" / "rae.pt")["step"] == 2
    shutil.copytree(photographs, tmp_path / "data")
    shutil.copy(photographs / "0" / "0.jpg", tmp_path / "data" / "1" / "new.jpg")
    in_process(monkeypatch, *paper)
    assert re.search(r"--data: 60 images \(\w+\) when this stage was started, 61 images", capsys.readouterr().err)


def test_a_hung_process_ends_the_others_wait(forks, trained, photographs, straight, tmp_path):
    command = a_run(trained, photographs, tmp_path, "mid", "--timeout", 0.05)
    pids = forks.start(command, 2, ["", AT_STEP % (3, "__import__('time').sleep(1000)")])
    assert forks.wait(pids[:1]) == [2] and re.search("train.py: process 0: another process is dead, or hung for longer than --timeout", forks.output.read_text())
    os.kill(pids[1], 9)
    assert forks.wait(pids[1:]) == [-9] and rae.load_file(tmp_path / "mid.pt")["step"] == 2
    assert forks.run(*command[:-2], world=2)[0] == [0, 0] and sorted(losses(tmp_path, "mid")) == [1, 2, 3, 4, 5, 6]


def test_torchrun_restarts_after_a_dead_process(forks, trained, photographs, straight, tmp_path):
    script, once = tmp_path / "dies.py", tmp_path / "once"
    fault = AT_STEP % (3, f"os.environ['RANK'] == '1' and not os.path.exists('{once}') and (open('{once}', 'w'), os.kill(os.getpid(), 9))")
    script.write_text(f"import os, rae, train\n{fault}\nrae.run_main(train.main)\n")
    status, output = run("torchrun", "--standalone", "--nproc_per_node=2", "--max_restarts=1", script, *a_run(trained, photographs, tmp_path / "out", "mid"))
    assert status == 0 and once.exists(), output
    assert_undisturbed(tmp_path / "out", straight("mid", 2)[0], "mid")


# --- README -----------------------------------------------------------------------------------------------------------

def test_readme_names_flags_files_and_lines_that_exist():
    text = (HERE / "README.md").read_text()
    flags = {f: set(re.findall(r"add(?:_argument)?\(\s*\"(?:-\w\", \")?(--\w+)", (HERE / f).read_text())) for f in ("train.py", "sample.py", "fid.py", "rae.py", "meanflow.py", "dit.py")}
    launcher = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--max_restarts"}
    known = set().union(*flags.values()) | launcher | {"--help", "--slow", "--signal"}
    assert set(re.findall(r"(?<![\w-])--[a-z]\w+", text)) <= known
    fenced = re.sub(r"\\\n", " ", "\n".join(code for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M) if not language))
    commands = [part for line in fenced.splitlines() for part in line.split("#")[0].split("&&") if ".py" in part] + re.findall(r"`((?:python|torchrun) [^`]*\.py[^`]*)`", text)
    assert len(commands) > 40
    for command in commands:
        script = re.search(r"(\w+\.py)", command)[1]
        if script in flags:
            assert set(re.findall(r"--[a-z]\w+", command.split(script)[1])) <= flags[script] | {"--help"}, command
            assert set(re.findall(r"--[a-z]\w+", command.split(script)[0])) <= launcher, command
    assert {f for f in re.findall(r"\b(\w+\.(?:py|txt))\b", text)} <= {p.name for p in HERE.iterdir()} | {"split.py", "defect.py"}  # which it prints
    assert all((HERE / link).exists() for link in re.findall(r"\]\((?!http|#)([^)#]+)", text))
    headings = {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^##+ (.*)", text, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings
    for name, file, line in re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", text):
        assert re.match(rf"(def|class) {name}\b", (HERE / file).read_text().splitlines()[int(line) - 1]), f"{file}: {name} is not in line {line}"
    tests = Path(__file__).read_text()
    assert all(f"def {name.rstrip('.')}" in tests for name in re.findall(r"`(test_\w+)[.]*`", text))
    setup = [line for line in text.splitlines() if line.startswith("pip install -r requirements.txt && ")]
    assert len(setup) == 2 and "train.py --toy" in setup[0] and "pytest" in setup[1]


def test_readmes_own_programs_run(photographs, trained, tmp_path):
    for code, name in re.findall(r"^```python\n(# (\w+\.py): .*?)^```", (HERE / "README.md").read_text(), re.S | re.M):
        (tmp_path / name).write_text(code.replace("10, y", "3, y"))                             # three classes here, ten in the toy
    toy = ("--toy", "--data", photographs, "--rae", trained / "rae.pt", "--teacher", trained / "flow.pt", "--init", trained / "mid.pt", *TINY)
    for i, command in enumerate((("split.py", *toy, "--stage", "split"), ("defect.py", "twice", *toy, "--stage", "distill", "--derivative", "fd"),
                    ("defect.py", "shift,linspace,random", *toy, "--stage", "mid", "--init", trained / "flow.pt"))):
        status, output = run(tmp_path / command[0], *command[1:], "--out", tmp_path / f"{i}")
        assert status == 0, output
    weight = "blocks.0.attn.qkv.weight"                                                         # the new stage went on from mid
    assert relative(rae.load_file(tmp_path / "0" / "split.pt")["model"][weight], rae.load_file(trained / "mid.pt")["model"][weight]) < 0.1


# --- fid.py: expectations come from a closed form, from scipy, or from a slow loop over the definition -------------------

def random_inception(seed=0):
    """Random weights that keep the signal alive through 90 layers, which the default initialisation does not."""
    torch.manual_seed(seed)
    net = fid.Inception()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.bias.normal_(0, 0.3)
            module.running_mean.normal_(0, 0.3)
    torch.nn.init.normal_(net.fc.bias, 0, 5)
    return net


def test_fid_frechet_distance_of_commuting_gaussians():
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(50, 50)))[0]
    a, b, m = rng.uniform(0.1, 5, 50), rng.uniform(0.1, 5, 50), rng.normal(size=50)
    expected = (m ** 2).sum() + ((a ** 0.5 - b ** 0.5) ** 2).sum()
    assert fid.frechet_distance(m, q * a @ q.T, 0 * m, q * b @ q.T) == pytest.approx(expected, rel=1e-8)
    a[5:], b[:40] = 0, 0  # ranks 5 and 10, of 50, without a common direction
    expected = (m ** 2).sum() + ((a ** 0.5 - b ** 0.5) ** 2).sum()
    assert fid.frechet_distance(m, q * a @ q.T, 0 * m, q * b @ q.T) == pytest.approx(expected, rel=1e-8)
    assert fid.frechet_distance(m, q * a @ q.T, m, q * a @ q.T) == pytest.approx(0, abs=1e-8)


def test_fid_frechet_distance_against_scipy():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(400, 60)) @ rng.normal(size=(60, 60)), rng.normal(size=(400, 60)) + 0.3
    s, t, d = np.cov(x.T), np.cov(y.T), x.mean(0) - y.mean(0)
    expected = d @ d + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)
    value = fid.frechet_distance(torch.from_numpy(x.mean(0)), torch.from_numpy(s), y.mean(0), t)
    assert type(value) is float and value == pytest.approx(expected, rel=1e-8)
    with pytest.raises(ValueError, match="shapes"):
        fid.frechet_distance(x.mean(0)[:-1], s, y.mean(0), t)
    with pytest.raises(ValueError, match="NaN"):
        fid.frechet_distance(x.mean(0) * np.nan, s, y.mean(0), t)
    with pytest.raises(ValueError, match="negative eigenvalues"):
        fid.frechet_distance(x.mean(0), s - 5 * np.eye(60), y.mean(0), t)


@pytest.mark.parametrize("dims, n1, n2", [(50, 10, 200), (50, 60, 60), (400, 100, 150), (400, 350, 2000)])
@pytest.mark.parametrize("decay", [0, -3, -6])
def test_fid_frechet_distance_of_any_rank(dims, n1, n2, decay):
    """With S = X^T X the trace of the root of S1 S2 is the nuclear norm of X1 X2^T: no root of a covariance is needed.
    Eigenvectors scaled by root eigenvalues, the textbook way, are off by 1e-8 where the rank is not full."""
    rng = np.random.default_rng(2)
    turn = np.linalg.qr(rng.normal(size=(dims, dims)))[0] * np.logspace(0, decay, dims) @ np.linalg.qr(rng.normal(size=(dims, dims)))[0]
    x, y = (rng.normal(size=(n, dims)) @ turn for n in (n1, n2))
    x, y = (x - x.mean(0)) / (n1 - 1) ** 0.5, (y - y.mean(0)) / (n2 - 1) ** 0.5
    trace = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    expected = (x**2).sum() + (y**2).sum() - 2 * trace
    assert fid.frechet_distance(np.zeros(dims), x.T @ x, np.zeros(dims), y.T @ y) == pytest.approx(expected, rel=1e-8)


def test_fid_statistics_of_any_batches_in_any_order():
    x = torch.randn(301, 12, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 12) + 1000
    mean, covariance = x.double().numpy().mean(0), np.cov(x.double().numpy().T)
    whole, batched, left, right = fid.Statistics(), fid.Statistics(), fid.Statistics(), fid.Statistics()
    whole.update(x)
    for part in x[torch.randperm(301)].split(7):
        batched.update(part)
    for part in x.split(50):
        (left if len(part) < 50 else right).update(part)
    for s in (whole, batched, left.merge(right), fid.Statistics().merge(whole).merge(fid.Statistics())):
        assert s.count == 301 and s.mean.dtype == torch.float64
        np.testing.assert_allclose(s.mean.numpy(), mean, rtol=1e-12)
        np.testing.assert_allclose(s.covariance.numpy(), covariance, rtol=1e-8, atol=1e-10 * covariance.max())
    with pytest.raises(ValueError, match="NaN"):
        whole.update(x * float("nan"))
    with pytest.raises(ValueError, match="one extractor"):
        whole.merge(fid.Statistics("another"))


def test_fid_one_road_and_its_refusals():
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = []
    extract = lambda x: seen.append((torch.is_grad_enabled(), torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu"))) or x.float().mean((2, 3))
    torch.set_float32_matmul_precision("high")
    with torch.autocast("cpu", torch.bfloat16):
        a, b = fid.feature_statistics(extract, images, batch_size=7), fid.feature_statistics(extract, iter(images.split(16)))
    assert set(seen) == {(False, "highest", False)} and torch.get_float32_matmul_precision() == "high"
    torch.testing.assert_close(a.covariance, torch.from_numpy(np.cov(extract(images).double().numpy().T)))
    assert fid.frechet_distance(a.mean, a.covariance, b.mean, b.covariance) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="uint8"):
        fid.feature_statistics(extract, images.float())
    with pytest.raises(ValueError, match="NaN"):
        fid.feature_statistics(lambda x: extract(x) * float("nan"), images)
    with pytest.raises(ValueError, match=r"\(8, 4\) pixels, not \(8, 8\)"):
        fid.feature_statistics(extract, [images, images[:, :, :4]])
    with pytest.raises(ValueError, match="none for process 0"):
        fid.feature_statistics(extract, [])


@pytest.mark.parametrize("height,width,size", [(5, 9, 13), (13, 8, 5), (7, 7, 7)])
def test_fid_resize_is_tensorflow_1s(height, width, size):
    image = np.random.default_rng(0).uniform(0, 255, (height, width))
    expected = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            y, x = i * height / size, j * width / size
            y0, x0 = int(y), int(x)
            for yy, wy in ((y0, 1 - (y - y0)), (min(y0 + 1, height - 1), y - y0)):
                for xx, wx in ((x0, 1 - (x - x0)), (min(x0 + 1, width - 1), x - x0)):
                    expected[i, j] += wy * wx * image[yy, xx]
    result = fid.resize_tensorflow1(torch.from_numpy(image)[None, None], size)
    np.testing.assert_allclose(result[0, 0].numpy(), expected, rtol=1e-4)


def test_fid_inception():
    net = random_inception()
    state = net.state_dict()
    assert len(state) == 566 and sum(v.numel() for v in state.values()) == 23885486  # pt_inception-2015-12-05's
    assert sum(k.endswith(".conv.weight") for k in state) == 94 and not any("AuxLogits" in k for k in state)
    for name, shape in {"Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Mixed_6d.branch7x7dbl_5.bn.bias": (192,),
                        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7), "fc.weight": (1008, 2048), "fc.bias": (1008,),
                        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1)}.items():
        assert tuple(state[name].shape) == shape
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = {}
    net.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, out: seen.update(spatial=out[:, :7]))
    net.Mixed_5b.branch_pool.register_forward_hook(lambda module, args, out: seen.update(average=args[0]))
    net.Mixed_7c.branch_pool.register_forward_hook(lambda module, args, out: seen.update(maximum=args[0]))
    net.Mixed_5b.register_forward_hook(lambda module, args, out: seen.update(x5=args[0]))
    net.Mixed_7c.register_forward_hook(lambda module, args, out: seen.update(x7=args[0]))
    out = net(images)
    assert {k: tuple(v.shape) for k, v in out.items()} == dict(pool=(2, 2048), spatial=(2, 2023), logits=(2, 1008))
    assert all(v.isfinite().all() and v.std() > 0 and v.dtype == torch.float32 for v in out.values())
    assert (out["pool"] >= 0).all() and (out["spatial"] >= 0).all()  # both follow a ReLU
    assert torch.equal(out["spatial"].view(2, 17, 17, 7)[:, 3, 5], seen["spatial"][:, :, 3, 5])
    torch.testing.assert_close(out["logits"], out["pool"] @ net.fc.weight.T)
    x = seen["x5"]  # a corner has four true neighbours (itself one), not nine
    torch.testing.assert_close(seen["average"][..., 0, 0], x[..., :2, :2].mean((2, 3)))
    assert torch.equal(seen["maximum"][..., 0, 0], seen["x7"][..., :2, :2].amax((2, 3)))
    torch.testing.assert_close(net(images[1:])["pool"], out["pool"][1:], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="uint8"):
        net(images.float())


def test_fid_inception_score_and_precision_recall_against_loops():
    rng = np.random.default_rng(0)
    logits, scores = rng.normal(size=(23, 6)) * 2, []
    for part in (logits[:10], logits[10:20], logits[20:], logits):
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        scores.append(np.exp(np.mean([sum(r * np.log(r / p.mean(0))) for r in p])))
    assert fid.inception_score(torch.from_numpy(logits), 10) == pytest.approx((np.mean(scores[:3]), scores[3]), rel=1e-10)

    a, b = rng.normal(size=(40, 3)), rng.normal(size=(50, 3)) * 0.5 + 0.7

    def inside(points, manifold):
        hits = 0
        for point in points:
            radii = [sorted(np.linalg.norm(manifold - m, axis=1))[3] for m in manifold]  # the zeroth is m itself
            hits += any(np.linalg.norm(point - m) <= r for m, r in zip(manifold, radii))
        return hits / len(points)
    expected = inside(a, b), inside(b, a)
    assert fid.precision_recall(torch.from_numpy(a), torch.from_numpy(b), chunk=7) == expected and expected[0] != expected[1]
    with pytest.raises(ValueError, match="give more"):
        fid.precision_recall(torch.from_numpy(a[:3]), torch.from_numpy(b))


@pytest.fixture(scope="module")
def fid_files(tmp_path_factory):
    """Small inputs of all kinds; the extractor is three channel means, so a dozen images are enough."""
    path, rng = tmp_path_factory.mktemp("fid"), np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        (path / f"folder/{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path / f"folder/{i % 2}/{i}.png")
    np.savez(path / "images.npz", images, np.arange(24) % 4)
    np.savez(path / "other.npz", images // 2)
    np.savez_compressed(path / "few.npz", images[:3])
    np.savez(path / "float.npz", images / 255)
    np.savez(path / "nan.npz", np.full(images.shape, np.nan, np.float32))
    np.savez(path / "labels.npz", images, np.arange(5))
    np.savez(path / "nothing.npz", x=1)
    np.savez(path / "wide.npz", np.zeros((24, 8, 16, 3), np.uint8))
    np.savez(path / "adm.npz", mu=np.zeros(3), sigma=np.eye(3), mu_s=np.zeros(3), sigma_s=np.eye(3))
    np.savez(path / "batch.npz", arr_0=(images // 2)[:10], mu=np.zeros(3), sigma=np.eye(3), mu_s=np.zeros(3), sigma_s=np.eye(3))
    np.savez(path / "odd.npz", mu=np.zeros(3), sigma=np.eye(3), size="wide", extractor="another")
    np.savez(path / "words.npz", mu=np.array(["a", "b", "c"]), sigma=np.eye(3))
    torch.save(torch.zeros(9), path / "weights.pt")
    np.savez(path / "theirs.npz", mu=np.zeros(3), sigma=np.eye(3), count=24, size=(8, 8), extractor="another")
    (path / "empty").mkdir()
    for name in ("mixed", "broken", "deep"):
        (path / name).mkdir()
        for i in range(4):
            Image.fromarray(images[i]).save(path / name / f"a{i}.png")
    Image.fromarray(images[0, :4]).save(path / "mixed/b.png")
    (path / "broken/b.jpg").write_bytes(b"no image")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(path / "deep/b.png")
    (path / "text.npz").write_text("no archive")
    for name, save, where in (("stored", np.savez, 1500), ("deflated", np.savez_compressed, 1500), ("label", np.savez, 24 * 192 + 500)):
        save(path / f"{name}.npz", arr_0=images, arr_1=np.arange(24))
        content = bytearray((path / f"{name}.npz").read_bytes())
        content[where:where + 9] = bytes(9)
        (path / f"{name}.npz").write_bytes(content)
    (path / "cut.npz").write_bytes((path / "images.npz").read_bytes()[:3000])
    np.savez(path / "objects.npz", images, np.array([{}] * 24))
    return path


def channel_means(features="inception", weights=None, device="cpu"):
    means = lambda x: x.float().mean((2, 3))
    return fid.Extractor(lambda x: dict(pool=means(x), spatial=means(x).roll(1, 1), logits=means(x) / 50), "inception-test", "none", 3)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(fid, "make_extractor", channel_means)


def fid_run(folder, capsys, *args):
    """fid.py with names of files in `folder` -> the lines it prints."""
    fid.main([str(folder / a) if (folder / a).exists() or a == "made.npz" else a for a in map(str, args)])
    return capsys.readouterr().out.splitlines()


def test_fid_command_line(fid_files, quick, capsys):
    images = np.load(fid_files / "images.npz")["arr_0"]
    x, y = (torch.from_numpy(i).permute(0, 3, 1, 2).float().mean((2, 3)).double().numpy() for i in (images, images // 2))
    expected = fid.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    fid_run(fid_files, capsys, "stats", "other.npz", "-o", "made.npz")
    records = []
    for samples in ("images.npz", "folder"):
        for reference in ("other.npz", "made.npz"):
            for batch_size in (1, 5, 64):
                line, = fid_run(fid_files, capsys, samples, reference, "--json", "--batch_size", batch_size)
                records.append(json.loads(line))
                assert records[-1]["fid"] == pytest.approx(expected, rel=1e-8) == records[-1]["sfid"]
                assert records[-1]["inception_score_all"] == pytest.approx(records[0]["inception_score_all"], rel=1e-6)  # in any order
                assert ("precision" in records[-1]) == (reference == "other.npz")
                assert [records[-1].get(k) for k in ("precision", "recall")] in ([None, None], [records[0][k] for k in ("precision", "recall")])
    assert [r["samples"]["labels"] for r in records[::6]] == ["4 labels of 6 to 6 images", "2 labels of 12 to 12 images"]
    table = "\n".join(fid_run(fid_files, capsys, "images.npz", "made.npz"))
    for said in ("inception-test", "resize               none", "'count': 24", "4 labels of 6 to 6 images", "'labels': 'unknown'", "as recorded", "made.npz"):
        assert said in table, table
    scores = json.loads(*fid_run(fid_files, capsys, "images.npz", "adm.npz", "--json"))
    assert scores["reference"]["count"] is None
    assert scores["fid"] == pytest.approx(fid.frechet_distance(x.mean(0), np.cov(x.T), np.zeros(3), np.eye(3))) == scores["sfid"]
    scores = json.loads(*fid_run(fid_files, capsys, "images.npz", "batch.npz", "--json"))  # statistics as recorded, manifold of the images
    assert scores["fid"] == pytest.approx(fid.frechet_distance(x.mean(0), np.cov(x.T), np.zeros(3), np.eye(3)))
    assert scores["precision"] == fid.precision_recall(torch.from_numpy(x), torch.from_numpy(y[:10]))[0]


def test_fid_scorer_says_of_images_as_they_are_made_what_the_command_says(fid_files, quick, capsys):
    data = np.load(fid_files / "images.npz")
    images = torch.from_numpy(data["arr_0"]).permute(0, 3, 1, 2)
    for reference in ("other.npz", "made.npz", "batch.npz"):
        record = json.loads(*fid_run(fid_files, capsys, "images.npz", reference, "--json"))
        scorer = fid.Scorer(fid_files / reference)
        for _ in range(2):  # as often as one likes
            online = json.loads(json.dumps(scorer(iter(images.split(7)), data["arr_1"])))
            assert online["samples"].pop("path") == "samples" and online["samples"].items() <= record["samples"].items()
            assert {**online, "samples": 0} == {key: value if isinstance(value, (str, dict)) else pytest.approx(value, rel=1e-12)
                                                for key, value in {**record, "samples": 0}.items()}
    with pytest.raises(ValueError, match="samples: 3 images for 3 features"):
        scorer([images[:3]])
    with pytest.raises(ValueError, match="resize all"):
        scorer([images[:, :, 1:]])


@pytest.mark.parametrize("args,message", [
    ("missing images.npz", "missing: no such"), ("empty images.npz", "empty: no PNG"), ("text.npz folder", "text.npz: no"),
    ("float.npz folder", "float.npz: arr_0 is float64"), ("nan.npz folder", "nan.npz: arr_0 is float32"), ("nothing.npz folder", "nothing.npz: neither"),
    ("labels.npz folder", "labels.npz: arr_1"), ("images.npz few.npz", "few.npz: 3 images for 3 features leave the covariance singular"),
    ("few.npz adm.npz", "few.npz: 3 images"), ("wide.npz folder", "wide.npz: its image size"), ("mixed folder", "b.png: (8, 4)"),
    ("broken folder", "b.jpg: not a readable"), ("deep folder", "b.png: its pixels"), ("images.npz theirs.npz", "theirs.npz: made by another"),
    ("stored.npz folder", "stored.npz: arr_0 is damaged"), ("deflated.npz folder", "deflated.npz: arr_0 is damaged"), ("cut.npz folder", "cut.npz: "), ("images.npz odd.npz", "odd.npz: its contents are damaged"),
    ("images.npz words.npz", "words.npz: its contents are damaged"), ("images.npz weights.pt", "weights.pt: neither arr_0 nor"),
    ("label.npz folder", "label.npz: arr_1 is damaged"), ("objects.npz folder", "objects.npz: arr_1 is damaged"),
    ("images.npz adm.npz --features dino", "adm.npz: no images"), ("stats folder", "--out: belongs"),
    ("stats adm.npz -o x.npz", "adm.npz: no images"), ("stats folder -o no_such_folder/x.npz", "--out no_such_folder/x.npz"),
    ("stats few.npz -o x.npz", "few.npz: 3 images"), ("folder images.npz --batch_size 0", "--batch_size: must be"), ("folder", "required: reference"),
    ("folder images.npz --device foo", "--device foo: ")])
def test_fid_refusals(fid_files, quick, capsys, monkeypatch, args, message):
    monkeypatch.setattr(sys, "argv", ["fid.py", *(str(fid_files / a) if (fid_files / a).exists() else a for a in args.split())])
    with pytest.raises(SystemExit) as stop:
        rae.run_main(fid.main)
    error = capsys.readouterr().err
    error = error[error.index("fid.py: "):]  # after a bar of progress
    assert stop.value.code == 2 and error.count("\n") == 1 and message in error


def test_fid_of_two_processes_is_fid_of_one(forks, tmp_path, quick, capsys):
    """A command, statistics and the scorer, all in one run, with shares that are not equal."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", rng.integers(0, 256, (25, 8, 8, 3), dtype=np.uint8), rng.integers(0, 5, 25))
    np.savez(tmp_path / "b.npz", rng.integers(0, 200, (31, 8, 8, 3), dtype=np.uint8))
    commands = f"""
import numpy as np
os.chdir({str(tmp_path)!r})
means = lambda x: x.float().mean((2, 3))
extract = lambda x: dict(pool=means(x), spatial=means(x).roll(1, 1), logits=means(x) / 50)
fid.make_extractor = lambda *args: fid.Extractor(extract, "inception-test", "none", 3)
fid.main(["a.npz", "b.npz", "--json", "--batch_size", "3", "--device", "cpu"])
fid.main(["stats", "b.npz", "-o", "made.npz", "--device", "cpu"])
rank, data = fid.place()[0], np.load("a.npz")
scores = fid.Scorer("b.npz")(torch.from_numpy(data["arr_0"]).permute(0, 3, 1, 2)[(0, 11)[rank]:(11, 25)[rank]].split(4), data["arr_1"])
assert (scores is None) == (rank == 1)
if rank == 0:
    print(json.dumps(scores))
sys.stdout.flush()
os._exit(0)
"""
    one = json.loads(*fid_run(tmp_path, capsys, "a.npz", "b.npz", "--json"))
    status, _ = forks.run(world=2, faults=[commands] * 2, script="fid.py")
    assert status == [0, 0], forks.output.read_text()
    both = [json.loads(line) for line in forks.output.read_text().splitlines() if line.startswith("{")]
    for got in both:
        for key in ("fid", "sfid", "inception_score", "inception_score_all", "precision", "recall"):
            assert got[key] == pytest.approx(one[key], rel=1e-9), key
        assert got["samples"]["labels"] == one["samples"]["labels"] and got["samples"]["count"] == 25
    assert len(both) == 2 and json.loads(*fid_run(tmp_path, capsys, "a.npz", "made.npz", "--json"))["fid"] == pytest.approx(one["fid"], rel=1e-9)


def test_fid_streams_the_share_of_a_process(fid_files):
    images = np.load(fid_files / "images.npz")["arr_0"]
    share = torch.cat([*fid.npz_batches(fid_files / "images.npz", 10, 21, 4)]).permute(0, 2, 3, 1)
    assert np.array_equal(share.numpy(), images[10:21])
    with pytest.raises(ValueError, match="stored.npz: arr_0 is damaged"):  # before its share: the checksum still tells
        list(fid.npz_batches(fid_files / "stored.npz", 20, 24, 4))


def test_fid_refusals_of_weights(fid_files, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ValueError, match=f"{fid.INCEPTION_FILE}.*--weights"):
        fid.make_extractor()
    with pytest.raises(ValueError, match="not_there.pth: no such file"):
        fid.make_extractor(weights="not_there.pth")
    torch.save(dict(fc=torch.zeros(3)), tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match="wrong.pth"):
        fid.make_extractor(weights=str(tmp_path / "wrong.pth"))
    with pytest.raises(ValueError, match="no_such_model"):
        fid.make_extractor("no_such_model")
    net = random_inception()
    torch.save(net.state_dict(), tmp_path / "right.pth")
    name = fid.make_extractor(weights=str(tmp_path / "right.pth")).name
    assert name == "inception-" + fid.fingerprint(net) and name != "inception-" + fid.fingerprint(random_inception(1))


def test_fid_as_a_process(fid_files):
    command = [sys.executable, str(Path(fid.__file__)), str(fid_files / "broken/b.jpg"), str(fid_files / "folder")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("fid.py: ") and "Traceback" not in result.stderr


# --- fuzzing ----------------------------------------------------------------------------------------------------------

class Hang(BaseException):
    """Not an Exception: nothing on the way may take it for bad input."""


def fault_of(script, arguments):
    """Run a script's main() in this process, for a minute and in 8 GB at most -> (exit status, its last line, what is wrong with that or "")."""
    def alarm(*_):
        raise Hang
    output, status, fault, before = io.StringIO(), None, "", signal.signal(signal.SIGALRM, alarm)
    limits, pages = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0])
    faulthandler.dump_traceback_later(150, exit=True, file=sys.__stderr__)                      # where the alarm is not heard
    try:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**33, limits[1]))     # so that it fails, and takes nobody else's memory
        signal.setitimer(signal.ITIMER_REAL, 60)
        with redirect_stdout(io.StringIO()), redirect_stderr(output), pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
            rae.run_main(globals()[script].main)
    except SystemExit as end:
        status = end.code or None
    except BaseException as error:
        where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        fault = f"{type(error).__name__}: {' '.join(str(error).split())[:300]} at {' '.join(where[-8:])}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)
    lines = [line for line in re.split("[\r\n]+", output.getvalue()) if line.strip() and not re.search(r"\d+/\d+ \[", line)] or [""]     # but progress bars
    said = [line for line in lines if line.startswith(f"{script}.py: ")]
    named = any(name and name in lines[-1] for name in ("--", *(part.rpartition("=")[2].replace("\n", " ") for part in arguments)))     # a flag, or what was given
    if not fault and (status not in (None, 2) or status == 2 and not (said == lines[-1:] and named)):
        fault = f"exit status {status}, {lines[-5:]}"
    return status, lines[-1], fault


def fuzz(rounds, seed, one_round):
    """rounds x one_round(rng), which returns a script and its arguments to run. All faults are shown, each with its round's number."""
    faults, ends, state = [], Counter(), torch.get_rng_state()
    for number in range(rounds):
        script, *arguments = map(str, one_round(random.Random(f"{seed} {number}")))
        status, line, fault = fault_of(script, arguments)
        ends["refused" if status else "done"] += 1
        faults += [f"{number}: {script} {arguments}: {fault}"] * bool(fault)
        if "SLOW" in os.environ:
            print(f"{number}: {script} {arguments}: {fault or status and line or 'done'}", file=sys.__stderr__, flush=True)
    torch.set_rng_state(state)
    assert not faults, "\n".join([f"{len(faults)} of {rounds} rounds, seed {seed}, {dict(ends)}", *faults])


def damaged_bytes(data, rng):
    data, a = bytearray(data), int(rng.choice((rng.random(), 0, 1 - 1e-4 * rng.random())) * len(data))  # anywhere, in the first file or in the table at the end
    length = rng.choice((1, 8, 500, 100_000))
    match rng.choice(("flip", "zero", "random", "cut", "insert", "drop", "swap", "header")):
        case "flip": data[min(a, len(data) - 1)] ^= 1 << rng.randrange(8)
        case "zero": data[a:a + length] = bytes(len(data[a:a + length]))
        case "random": data[a:a + length] = rng.randbytes(len(data[a:a + length]))
        case "cut": del data[a:]
        case "insert": data[a:a] = rng.randbytes(length)
        case "drop": del data[a:a + length]
        case "swap": data = data[length:2 * length] + data[:length] + data[2 * length:]
        case "header": data[:8] = rng.choice((b"PK\3\4", b"\x80\2}q\0.", b"\x89PNG\r\n\x1a\n", b"", b"\0" * 8))
    return bytes(data)


def damaged_tree(tree, rng, depth=0):
    """The same containers and tensors with one of them deleted, or another in its place."""
    if isinstance(tree, (dict, list, tuple)) and tree and (depth == 0 or rng.random() < 0.9):
        items = dict(tree if isinstance(tree, dict) else enumerate(tree))
        key = rng.choice([*items])
        value = items.pop(key)
        items |= {key: damaged_tree(value, rng, depth + 1)} if rng.random() < 0.85 else {}
        return items if isinstance(tree, dict) else type(tree)(items.values())
    if torch.is_tensor(tree) and rng.random() < 0.7:
        return rng.choice((tree[..., :-1] if tree.dim() else tree[None], tree[None], tree.flatten(), tree.double(), tree.half(), tree.int(), tree + 1j, tree * math.nan, -tree,
                           tree * 1e30, tree.to_sparse(), tree.to("meta"), torch.zeros(1).expand(10**12), tree.new_zeros((0, *tree.shape[1:]))))
    return rng.choice((None, True, -1, 0, 3, 10**30, -0.5, math.nan, math.inf, "", "é\n🜁", b"x", [], (), {}, {"x": 1}, [tree], torch.zeros(2, 3), torch.tensor(7), torch.tensor(math.nan)))


@pytest.mark.parametrize("rounds, seed", [(15, 0), pytest.param(1000, 1, marks=slow)])
def test_any_damage_to_a_checkpoint_ends_in_one_line(rounds, seed, trained, photographs, tmp_path):
    def one_round(rng):
        stage, into, out = rng.choice([*train.TOY]), rng.choice([*train.TOY]), tmp_path / "out"
        source, victim = trained / f"{stage}.pt", out / f"{stage}.pt"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for other in {*train.TOY} - {stage}:  # links: no run writes into a checkpoint that is there
            (out / f"{other}.pt").symlink_to(trained / f"{other}.pt")
        if rng.random() < 0.4:
            victim.write_bytes(damaged_bytes(source.read_bytes(), rng))
        else:
            torch.save(damaged_tree(rae.load_file(source), rng), victim)
        if rng.random() < 0.1:
            (out / f"{stage}.previous.pt").symlink_to(source)
        toy, role = ("train", "--toy", "--data", photographs, "--out", out, *TINY), rng.choice(((), ("--init", victim), ("--teacher", victim), ("--rae", victim)))
        return rng.choice((*[(*toy, "--stage", stage, "--steps", 5)] * 2, (*toy, "--stage", into, "--dry_run", *role), ("sample", "--ckpt", victim, "--num", 2, "--steps", 1, "--device", "cpu"),
                           ("rae", photographs / "0" / "0.jpg", "--rae", victim, "--out", out / "x.png", "--device", "cpu")))
    fuzz(rounds, seed, one_round)


def options_of(script):
    """The options that a script's own parser knows, but for those that take minutes: {"--flag": its action}."""
    found = {}
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(KeyError):
        monkeypatch.setattr(rae.Parser, "parse_args", lambda self, *_: found.update(self._option_string_actions) or {}["stop"])
        globals()[script].main()
    return {flag: action for flag, action in found.items() if flag not in ("--bench", "--compile")}


@pytest.mark.parametrize("rounds, seed", [(25, 0), pytest.param(1000, 1, marks=slow)])
def test_any_command_line_ends_in_one_line(rounds, seed, trained, photographs, fid_files, tmp_path, monkeypatch):
    import huggingface_hub
    make, options, work = fid.make_extractor, {script: options_of(script) for script in ("train", "sample", "rae", "fid")}, tmp_path / "work"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(fid, "make_extractor", lambda features, weights, device: (channel_means if (features, weights) == ("inception", None) else make)(features, weights, device))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: {}["no network"])
    numbers = ("2", "3", "1e-30", *["1e30", str(10**12)] * 3, "0", "1", "7", "16", "-1", "0.5", "9" * 40, "9" * 5000, "nan", "inf", "-inf", "²", "٣", "1_0", " 4", "0x10", "4.0")
    words = ("", " ", "é🜁\u202e", "none", "random", *["meta"] * 3, "cpu", "mps", "cuda:7", "dino", "inception", TINY_VIT, "resnet18", "0-2", "2,0", "5-1", ",", "x" * 300, "a\nb", "-", "%s", "stats")
    own = [work, *(work / name for name in ("empty", "text.pt", "new", "new.png", "new.npz", "text.pt/x"))]                 # may be written to
    given = ["/dev/null", photographs, photographs / "0", photographs / "0" / "0.jpg", trained, *(trained / f"{stage}.pt" for stage in train.TOY), *sorted(fid_files.iterdir())]

    def one_round(rng):
        shutil.rmtree(work, ignore_errors=True)
        (work / "empty").mkdir(parents=True)
        (work / "text.pt").write_text("not a checkpoint")
        monkeypatch.chdir(work)                                                                 # for names without a folder
        any_value = lambda paths: rng.choice((rng.choice(numbers), rng.choice(words), rng.choice(paths)))
        network = rng.choice((*[("--toy", "--stage", rng.choice([*train.TOY]))] * 4, ("--stage", "rae", "--resolution", 32, "--model", "toy", "--encoder", TINY_VIT, *RANDOM, "--perceptual", 0,
                                                                                      "--adversarial", 0, "--workers", 0)))
        script, *command = rng.choice((*[("train", *network, "--data", photographs, "--out", trained, "--batch_size", 4, "--precision", "fp32")] * 2,
                                       ("sample", "--ckpt", trained / f"{rng.choice(('flow', 'mid', 'distill'))}.pt", "--num", 2, "--steps", 1, "--out", work / "x.png"),
                                       ("rae", photographs / "0" / "0.jpg", "--rae", trained / "rae.pt", "--out", work / "x.png"),
                                       ("fid", fid_files / rng.choice(("folder", "images.npz")), fid_files / rng.choice(("other.npz", "adm.npz")))))
        command = [str(part) for part in (*command, "--device", "cpu")]
        if rng.random() < 0.15:                                                                 # one in the place of another, or in between
            a = rng.randrange(len(command))
            command[a:a + rng.randrange(2)] = [any_value(own)]
        for _ in range(rng.randint(1, 3)):
            flag = rng.choice([*options[script]])
            action = options[script][flag]
            value = rng.choice((rng.choice(numbers), any_value(own))) if action.type else any_value(own + given * (flag not in ("--out", "-o", "--npz")))
            if action.choices and rng.random() < 0.8:
                value = rng.choice([*action.choices][:1 if flag == "--model" else None])        # the small one
            style = rng.random()
            command += [flag] if action.nargs == 0 or style < 0.05 else [f"{flag}={value}"] if style < 0.5 else [flag, value]
        return script, *command, *["--dry_run"] * (script == "train")
    fuzz(rounds, seed, one_round)


if __name__ == "__main__":
    if "--slow" in sys.argv:
        os.environ["SLOW"] = "1"
    sys.exit(pytest.main([__file__, *(argument for argument in sys.argv[1:] if argument != "--slow")]))
