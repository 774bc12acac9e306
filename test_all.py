"""Tests of every claim of the code: against closed forms, slow loops and the real command lines.

    python -m pytest test_all.py            # pip install pytest; a CPU, some minutes
    python -m pytest test_all.py -k flow    # only the tests with "flow" in their names
    python test_all.py                      # explains --bench, --memory and --gpu

The order is README's: the theory, the networks, the scores, the loop, what a run promises, and the
command lines. The theory is tested on flows of which both velocities are known in closed form.
"""
import argparse
import copy
import fcntl
import gc
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
import zipfile
import zlib
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
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
TINY_VIT = "test_vit.r160_in1k"  # of timm, for tests: patches of 16, 64 channels, a class token
torch.set_num_threads(1)  # the tests also start processes; more threads than cores are slower


@pytest.fixture(autouse=True)
def seed_and_no_files_left(tmp_path):
    torch.manual_seed(0)
    yield
    shutil.rmtree(tmp_path)


def relative(a, b):
    """The relative error of a against b."""
    a = a.detach().double()
    b = b.detach().double()
    return float((a - b).norm() / b.norm())


def saved(content, path, save=torch.save):
    """Save content at path, whose folder need not exist -> path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save(content, path)
    return path


# --------------------------------------------------------------------------------------------------
# The theory: meanflow.py
#
# Both velocities are known in closed form where every coordinate of the data is drawn from the same
# mixture of Gaussians. v is an average of each component's velocity, and u follows from quantiles:
# on a line no path crosses another, so a point keeps its quantile from noise to data. Neither needs
# a network, a step size or this code, so they are the truth: a target of the exact u must be u, and
# a solver must land on z - u. What is left is error of second order where differences are taken.

def times(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def mixture(z, t, weight, mean, std):
    """Of z_t at z: distribution function, density and E[e - x | z_t = z], each like z."""
    z = z[..., None]                                                # (..., components)
    t = meanflow.expand(t, z)
    offset = z - (1 - t) * mean
    variance = ((1 - t) * std) ** 2 + t**2

    below = weight * (1 + (offset / (2 * variance).sqrt()).erf()) / 2
    mass = weight * (-(offset**2) / (2 * variance)).exp() / (2 * math.pi * variance).sqrt()
    velocity = offset * (t - (1 - t) * std**2) / variance - mean    # of each component
    density = mass.sum(-1)
    return below.sum(-1), density, (mass * velocity).sum(-1) / density


def flow_of_a_mixture(*components):
    """(v, u) in closed form, of weights, means and standard deviations."""
    def v(z, t, y):
        return mixture(z, t, *components)[2]

    def point_at(z, t, r):
        """z_r, the point that has at time r the quantile of z at time t: by bisection."""
        quantile, _, _ = mixture(z, t, *components)
        low = torch.full_like(z, -16)
        high = torch.full_like(z, 16)
        for _ in range(50):
            middle = (low + high) / 2
            is_below = mixture(middle, r, *components)[0] < quantile
            low = torch.where(is_below, middle, low)
            high = torch.where(is_below, high, middle)

        reached, density, _ = mixture(low, r, *components)
        return low + (quantile - reached) / density                 # Newton: carries derivatives

    def u(z, t, y, r):
        gap = meanflow.expand(t - r, z)
        average = (z - point_at(z, t, r)) / torch.where(gap == 0, 1, gap)
        return torch.where(gap == 0, v(z, t, y), average)
    return v, u


def latents(num, seed=0):
    """Noise (num, 3, 2, 2) and labels, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num, 3, 2, 2, dtype=torch.float64, generator=generator)
    return noise, torch.zeros(num, dtype=torch.long)


def order_of(errors):
    """The order of a method, from its errors at a step size and at half of it."""
    before, after = errors
    return math.log2(before / after)


def noting(calls, network):
    """The network, which also notes the inputs of every call, and whether it keeps a graph."""
    def noted(z, t, y, r=None):
        calls.append(SimpleNamespace(z=z, t=t, y=y, r=r, keeps_graph=torch.is_grad_enabled()))
        return network(z, t, y) if r is None else network(z, t, y, r)
    return noted


def in_16_bits(z, t, y, r=None):
    """A network that answers as it would under autocast."""
    return z.bfloat16()


WEIGHT = times(0.4, 0.6)
MEAN = times(-1.0, 0.8)
STD = times(0.5, 0.3)
FLOWS = {
    "gaussian": flow_of_a_mixture(times(1.0), times(0.0), times(0.6)),
    "mixture": flow_of_a_mixture(WEIGHT, MEAN, STD),
}
both_flows = pytest.mark.parametrize("v, u", FLOWS.values(), ids=FLOWS)
both_solvers = pytest.mark.parametrize("solver, order", (("euler", 1), ("heun", 2)))


# The truth itself

@both_flows
def test_average_velocity_in_closed_form_is_the_integral_of_the_velocity(v, u):
    z, y = latents(1)

    def right_side(t, z):
        z = torch.from_numpy(z).view(1, 3, 2, 2)
        return v(z, times(t), y).flatten().numpy()

    path = scipy.integrate.solve_ivp(
        right_side, (0.8, 0.1), z.flatten(), "DOP853", rtol=1e-12, atol=1e-13)
    end = torch.from_numpy(path.y[:, -1]).view_as(z)

    assert relative(0.7 * u(z, times(0.8), y, times(0.1)), z - end) < 1e-11


@pytest.mark.parametrize("t", (0.9, 0.7, 0.5))
def test_the_target_of_flow_matching_is_the_velocity_on_average(t):
    """What is left of e - x when v(z_t) is taken from it is orthogonal to every function of z_t."""
    v, _ = FLOWS["mixture"]
    x, e, weight = quadrature()
    t = times(t).expand(len(x))
    z = meanflow.interpolate(x, e, t)

    left = weight * (e - x - v(z, t, None))                         # (M, 1)

    for function in (torch.ones_like, torch.sin, torch.square):
        assert abs((left * function(z)).sum()) < 1e-12


def quadrature():
    """Data x and noise e (M, 1) of the mixture on a grid, and their weights.

    So fine a grid makes a sum of smooth functions exact to rounding.
    """
    steps = torch.arange(-50, 51).double()
    x_and_e = torch.cartesian_prod(0.12 * steps, 0.16 * steps)
    x, e = x_and_e.split(1, dim=1)

    of_components = WEIGHT / STD * (-(((x - MEAN) / STD) ** 2) / 2).exp()
    weight = of_components.sum(1, keepdim=True) * (-(e**2) / 2).exp()
    return x, e, weight / weight.sum()


# The loss

def test_interpolate_goes_straight_from_data_to_noise():
    x, noise = torch.randn(2, 5, 8, 4, 4)
    t = torch.rand(5)

    z = meanflow.interpolate(x, noise, t)
    later = meanflow.interpolate(x, noise, t + 0.25)

    assert torch.equal(meanflow.interpolate(x, noise, torch.zeros(5)), x)
    assert torch.equal(meanflow.interpolate(x, noise, torch.ones(5)), noise)
    assert torch.allclose(z[3], (1 - t[3]) * x[3] + t[3] * noise[3])
    assert relative((later - z) / 0.25, noise - x) < 1e-5           # dz/dt


@pytest.mark.parametrize("adaptive_p, of_error", (
    (0, lambda error: error),
    (0.5, lambda error: 2 * math.sqrt(error + 0.001 / 128)),
    (1, lambda error: math.log(error + 0.001 / 128)),
), ids=("mean", "root", "log"))
def test_loss_is_the_mean_of_a_function_of_each_samples_error(adaptive_p, of_error):
    prediction, target = torch.randn(2, 5, 8, 4, 4, dtype=torch.float64)
    errors = [float(((a - b) ** 2).mean()) for a, b in zip(prediction, target)]
    prediction.requires_grad_()

    loss, mse = meanflow.regression_loss(prediction, target, adaptive_p)

    assert loss.item() == pytest.approx(np.mean([of_error(error) for error in errors]), rel=1e-12)
    assert mse.item() == pytest.approx(np.mean(errors), rel=1e-12)
    assert loss.requires_grad
    assert not mse.requires_grad


@pytest.mark.parametrize("adaptive_p, derivative", ((1, "jvp"), (0.5, "fd"), (0, "jvp")))
def test_loss_has_the_gradient_of_the_adaptive_weighting(adaptive_p, derivative):
    """Of L / (L + 0.001 / D)^p, with the target and the weight of each sample held fixed."""
    net = small_dit(True).double()
    x, noise = torch.randn(2, 5, 8, 4, 4, dtype=torch.float64)
    y = torch.arange(5)
    t = times(0.9, 0.8, 0.7, 0.6, 0.5)
    r = times(0.9, 0.1, 0.7, 0.2, 0.5)
    z = meanflow.interpolate(x, noise, t)
    v = noise - x

    target = meanflow.mean_flow_target(net, z, t, r, y, v, derivative, 0.02)
    loss, mse = meanflow.regression_loss(net(z, t, y, r), target, adaptive_p)

    du_dt = meanflow.total_derivative(net, z, t, r, y, v, derivative, 0.02)
    by_hand = v - meanflow.expand(t - r, x) * du_dt
    error = (net(z, t, y, r) - by_hand).square().flatten(1).mean(1)
    weight = 1 / (error.detach() + 1e-3 / 128) ** adaptive_p
    expected = (weight * error).mean()
    last_layer = net.final_layer.linear.weight
    gradients = [torch.autograd.grad(value, last_layer)[0] for value in (loss, expected)]
    assert relative(*gradients) < 1e-10
    assert mse.item() == pytest.approx(error.mean().item(), rel=1e-10)


@pytest.mark.parametrize("adaptive_p", (0, 0.5, 1))
def test_loss_has_a_finite_value_and_no_gradient_where_the_prediction_is_perfect(adaptive_p):
    target = torch.randn(5, 8, 4, 4)
    prediction = target.clone().requires_grad_()

    loss, mse = meanflow.regression_loss(prediction, target, adaptive_p)
    loss.backward()

    assert loss.isfinite()
    assert mse == 0
    assert not prediction.grad.any()                                # nor is it 0 / 0


def test_adaptive_weighting_keeps_one_huge_error_from_deciding_the_step():
    target = torch.zeros(2, 8)
    prediction = torch.tensor([[1.0], [1000.0]]).expand(2, 8).clone().requires_grad_()

    squared, _ = meanflow.regression_loss(prediction, target, 0)
    log, _ = meanflow.regression_loss(prediction, target, 1)

    ratios = []
    for loss in (squared, log):
        small, huge = torch.autograd.grad(loss, prediction)[0].norm(dim=1).tolist()
        ratios.append(huge / small)
    assert ratios[0] == pytest.approx(1000)
    assert ratios[1] == pytest.approx(1 / 1000, rel=1e-3)


# Times

def test_shift_keeps_0_and_1_and_the_order_of_times():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)

    shifted = meanflow.shift_time(t, 6.93)

    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert (shifted.diff() > 0).all()
    assert torch.allclose(meanflow.shift_time(shifted, 1 / 6.93), t)


def test_shift_is_that_of_the_paper():
    shifted = meanflow.shift_time(torch.tensor(15 / 16), 6.93)

    assert round(float(shifted), 3) == 0.990
    assert round(meanflow.alpha_of(768, 16), 2) == 6.93
    assert round(meanflow.alpha_of(768, 32), 2) == 13.86


def test_times_of_flow_matching_are_logit_normal_and_shifted():
    normal = torch.linspace(-4, 4, 9, dtype=torch.float64)

    t = meanflow.flow_matching_times(normal, 3.0)

    assert torch.allclose(t.logit(), normal + math.log(3), rtol=1e-12)


def test_of_two_shifted_times_the_later_is_t():
    uniform = torch.rand(10_000, 2)
    jumps = torch.arange(10_000) % 4 == 0

    t, r = meanflow.mean_flow_times(uniform, 5.0, jumps, torch.zeros_like(jumps))

    mean_time = 1.25 - 5 / 16 * math.log(5)                         # of 5 t / (1 + 4 t)
    assert r.min() >= 0
    assert t.max() <= 1
    assert torch.equal(r < t, jumps)
    assert torch.equal(r[~jumps], t[~jumps])
    assert torch.equal(t, meanflow.shift_time(uniform, 5.0).amax(1))
    assert torch.equal(r[jumps], meanflow.shift_time(uniform[jumps], 5.0).amin(1))
    assert abs((t + r)[jumps].mean() / 2 - mean_time) < 0.01
    assert abs(t[~jumps].mean() - t[jumps].mean()) < 0.03           # the later of two here as well


def test_only_a_row_that_jumps_jumps_to_data():
    uniform = torch.rand(4, 2)
    jumps = torch.tensor([True, True, False, False])
    jumps_to_data = torch.tensor([True, False, True, False])

    t, r = meanflow.mean_flow_times(uniform, 5.0, jumps, jumps_to_data)

    assert r[0] == 0
    assert 0 < r[1] < t[1]
    assert torch.equal(r[2:], t[2:])


def test_stages_draw_times_with_the_shift_and_the_share():
    """meanflow.py draws nothing: what it is given is drawn by the table of stages."""
    run = SimpleNamespace(
        c={"seed": 0, "ratio_r_not_equal_t": 0.4, "ratio_r_is_0": 0, "derivative": "jvp"},
        rae=SimpleNamespace(latent_shape=(1,)), alpha=1e3, device="cpu",
        row_numbers=lambda step: range(1000), student=lambda z, t, y, r: z)
    x = torch.zeros(1000, 1)
    labels = torch.zeros(1000)

    inputs = {}
    for run.stage in ("flow", "bootstrap"):
        draws = train.draw_rows(run, 0)
        inputs[run.stage], _ = train.STAGES[run.stage].target(run, x, labels, draws)

    _, t, _ = inputs["flow"]
    assert t.shape == (1000,)
    assert t.mean() > 0.97
    _, t, _, r = inputs["bootstrap"]
    assert (r < t).sum() == 400
    assert t.mean() > 0.97


# The teacher's flow

@both_flows
@both_solvers
def test_order_of_the_solver(solver, order, v, u):
    noise, y = latents(8)
    data = noise - u(noise, times(1.0), y, times(0.0))

    errors = []
    for steps in (50, 100):
        trajectory, _ = meanflow.solve_flow(v, noise, y, steps, 3.0, solver)
        errors.append(relative(trajectory[-1], data))

    assert abs(order_of(errors) - order) < 0.15


@both_solvers
@pytest.mark.parametrize("steps", (1, 50))
def test_solver_evaluates_the_velocity_once_a_step_or_twice_with_heun(solver, order, steps):
    v, _ = FLOWS["mixture"]
    noise, y = latents(8)
    calls = []

    trajectory, points = meanflow.solve_flow(noting(calls, v), noise, y, steps, 3.0, solver)

    assert len(calls) == steps * order
    assert not any(call.keeps_graph for call in calls)
    assert len(trajectory) == len(points) == steps + 1
    assert torch.equal(trajectory[0], noise)
    assert calls[0].t.tolist() == [1] * 8
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    assert torch.equal(points, meanflow.shift_time(even, 3.0))
    assert points[0] == 1
    assert points[-1] == 0


@both_solvers
def test_solver_can_keep_the_last_point_only(solver, order):
    v, _ = FLOWS["mixture"]
    noise, y = latents(8)

    trajectory, _ = meanflow.solve_flow(v, noise, y, 100, 3.0, solver)
    last, points = meanflow.solve_flow(v, noise, y, 100, 3.0, solver, last_only=True)

    assert torch.equal(last, trajectory[-1:])
    assert len(points) == 101


@both_solvers
def test_points_have_the_precision_of_the_noise_whatever_the_networks(solver, order):
    """Under autocast a network may answer in 16 bits, and the points must not follow it."""
    noise, y = latents(2)

    trajectory, points = meanflow.solve_flow(in_16_bits, noise.float(), y, 3, 3.0, solver)
    samples = meanflow.sample(in_16_bits, noise, y, 2)

    assert trajectory.dtype == points.dtype == torch.float32
    assert samples.dtype == torch.float64


@pytest.mark.parametrize("steps, solver", ((0, "euler"), (-3, "heun"), (5, "midpoint")))
def test_solver_refuses_no_steps_and_unknown_names(steps, solver):
    noise, y = latents(1)

    with pytest.raises(ValueError):
        meanflow.solve_flow(FLOWS["gaussian"][0], noise, y, steps, 1.0, solver)


@pytest.mark.parametrize("guide", ("no class", "weaker network"))
def test_guided_velocity_is_linear_in_the_scale(guide):
    net = small_dit().double()
    weaker = small_dit().double() if guide == "weaker network" else None
    z = torch.randn(3, 8, 4, 4, dtype=torch.float64)
    y = torch.tensor([0, 1, 10])
    no_class = torch.full((3,), 10)
    t = times(0.2, 0.5, 0.9)

    at = {}
    for scale in (0.0, 1.0, 3.5):
        at[scale] = meanflow.guided(net, scale, 10, weaker)(z, t, y)

    weak = weaker(z, t, y) if weaker else net(z, t, no_class)
    assert torch.equal(at[0.0], weak)
    assert torch.allclose(at[1.0], net(z, t, y), rtol=1e-12)        # no guidance
    step = at[1.0] - at[0.0]
    assert torch.allclose(at[3.5], at[0.0] + 3.5 * step, rtol=1e-12)


def test_a_sample_without_a_class_is_not_guided_by_itself():
    net = small_dit().double()
    z = torch.randn(1, 8, 4, 4, dtype=torch.float64)
    no_class = torch.tensor([10])

    guided = meanflow.guided(net, 3.5, 10)(z, times(0.9), no_class)

    assert torch.equal(guided, net(z, times(0.9), no_class))


# Stage "mid"

@both_flows
@both_solvers
def test_targets_of_mid_training_are_as_exact_as_the_trajectory(solver, order, v, u):
    """The published code labels the shifted points linspace(0, 1): its error stays, however small
    the steps are.
    """
    noise, y = latents(4)

    errors = []
    for points in (33, 65):
        pairs = torch.arange(points * (points - 1) // 2).expand(4, -1)
        inputs, target = meanflow.mid_training_target(
            v, noise, y, 3.0, points, pairs=pairs, solver=solver)
        _, mse = meanflow.regression_loss(u(*inputs), target)
        errors.append(mse.sqrt())

    assert abs(order_of(errors) - order) < 0.15
    assert errors[1] ** 2 < 1e-3


def test_a_pair_carries_the_times_that_the_solver_stepped_through():
    v, _ = FLOWS["mixture"]
    noise, _ = latents(16)
    y = torch.arange(16)
    first_and_last = torch.tensor([[0, 135]] * 16)

    inputs, target = meanflow.mid_training_target(v, noise, y, 6.93, pairs=first_and_last)

    z, t, labels, r = inputs
    trajectory, points = meanflow.solve_flow(v, noise, y, 16, 6.93)
    starts = trajectory[[0, 15]].transpose(0, 1).flatten(0, 1)      # (32, ...)
    ends = trajectory[[1, 16]].transpose(0, 1).flatten(0, 1)
    assert torch.equal(t, points[[0, 15] * 16])
    assert torch.equal(r, points[[1, 16] * 16])
    assert r[1] == 0
    assert torch.equal(z, starts)
    assert torch.equal(target, (starts - ends) / meanflow.expand(t - r, z))
    assert labels.tolist() == [row // 2 for row in range(32)]


@pytest.mark.parametrize("num_points, num_pairs", ((17, 64), (17, 136), (5, 10), (5, 3)))
def test_without_given_pairs_a_trajectory_has_pairs_that_are_spread_evenly(num_points, num_pairs):
    v, _ = FLOWS["mixture"]
    noise, y = latents(2)

    inputs, target = meanflow.mid_training_target(v, noise, y, 6.93, num_points, num_pairs)

    z, t, labels, r = inputs
    pairs = set(zip(t.tolist(), r.tolist()))
    assert len(z) == len(t) == len(labels) == len(r) == len(target) == 2 * num_pairs
    assert (t > r).all()
    assert len(pairs) == num_pairs                                  # no pair twice
    assert len(set(t.tolist())) > min(num_pairs, num_points - 1) / 2            # nor one start


def test_drawn_pairs_reach_all_pairs_of_points():
    """Of stage "mid", for 16 trajectories of 17 points: 1,024 draws of 136 pairs."""
    v, _ = FLOWS["mixture"]
    noise, y = latents(16)
    run = SimpleNamespace(c={"num_points": 17, "num_pairs": 64, "solver": "euler", "seed": 0},
                          rae=SimpleNamespace(latent_shape=(3, 2, 2)), classes=range(10),
                          alpha=6.93, device="cpu", stage="mid", teacher=v,
                          row_numbers=lambda step: range(16 * step, 16 * step + 16))

    drawn = []
    for step in (0, 1):
        (_, t, _, r), _ = train.mid_target(run, None, y, train.draw_rows(run, step))
        drawn.append((t, r))

    t, r = drawn[0]
    assert len(t) == 16 * 64
    assert (t > r).all()
    assert len(set(zip(t.tolist(), r.tolist()))) > 130
    assert not torch.equal(t, drawn[1][0])


# Stages "distill" and "bootstrap": the MeanFlow identity

@both_flows
def test_total_derivative_obeys_the_mean_flow_identity(v, u):
    """u + (t - r) du/dt = v: exact by jvp, of second order by the central difference."""
    z, y = latents(64)
    z = z / 2                                                       # where data are
    t = torch.linspace(0.15, 0.98, 64, dtype=torch.float64)
    r = t * torch.linspace(0, 0.9, 64, dtype=torch.float64)
    velocity = v(z, t, y)
    exact = (velocity - u(z, t, y, r)) / meanflow.expand(t - r, z)

    by_jvp = meanflow.total_derivative(u, z, t, r, y, velocity)
    errors = []
    for delta in (2e-3, 1e-3):
        by_difference = meanflow.total_derivative(u, z, t, r, y, velocity, "fd", delta)
        errors.append(relative(by_difference, exact))

    assert relative(by_jvp, exact) < 1e-11
    assert abs(order_of(errors) - 2) < 0.01


def network_inputs(num=4):
    """A student with random weights, and (z, t, r, y, v) for it, where r < t."""
    z = torch.randn(num, 8, 4, 4, dtype=torch.float64)
    t = torch.linspace(0.9, 0.3, num, dtype=torch.float64)
    r = t * torch.linspace(0.1, 0.8, num, dtype=torch.float64)
    return small_dit(True).double(), z, t, r, torch.arange(num) % 11, z.flip(0)


def test_total_derivative_of_the_network_by_jvp_agrees_with_differences():
    inputs = network_inputs()

    by_jvp = meanflow.total_derivative(*inputs, "jvp")
    by_difference = meanflow.total_derivative(*inputs, "fd", 1e-5)

    assert relative(by_jvp, by_difference) < 1e-4
    assert not by_jvp.requires_grad
    assert not by_difference.requires_grad


def test_difference_is_taken_in_full_precision_inside_autocast():
    net, *inputs = network_inputs()
    plain = meanflow.total_derivative(net, *inputs, "fd", 1e-5)

    with torch.autocast("cpu", torch.bfloat16):
        inside = meanflow.total_derivative(net, *inputs, "fd", 1e-5)

    assert torch.equal(inside, plain)


def test_total_derivative_refuses_an_unknown_method():
    with pytest.raises(ValueError):
        meanflow.total_derivative(*network_inputs(), "backward")


def exact_case(v, u, num=128):
    """(z, t, r, y, v) of noisy data of the flow, with r from 0 to t."""
    noise, y = latents(num, seed=1)
    first, _ = latents(num)
    x = first - u(first, times(1.0), y, times(0.0))                 # as many data
    t = torch.linspace(0.05, 1, num, dtype=torch.float64)
    r = t * (torch.arange(num) % 5) / 4                             # 0, t / 4, ... t
    z = meanflow.interpolate(x, noise, t)
    return z, t, r, y, v(z, t, y)


@both_flows
def test_the_target_at_the_exact_average_velocity_is_the_average_velocity(v, u):
    z, t, r, y, velocity = exact_case(v, u)

    target = meanflow.mean_flow_target(u, z, t, r, y, velocity)

    loss, mse = meanflow.regression_loss(u(z, t, y, r), target)
    assert loss == mse
    assert mse < 1e-20


@both_flows
def test_the_target_by_differences_has_an_error_of_second_order(v, u):
    z, t, r, y, velocity = exact_case(v, u)

    errors = []
    for delta in (2e-3, 1e-3):
        target = meanflow.mean_flow_target(u, z, t, r, y, velocity, "fd", delta)
        errors.append(relative(target, u(z, t, y, r)))

    assert abs(order_of(errors) - 2) < 0.05


@both_flows
def test_the_target_holds_the_error_of_the_derivative_times_the_gap(v, u):
    """That is why training explodes from far away: this student is wrong by 3 t, u + 3 t."""
    z, t, r, y, velocity = exact_case(v, u)

    def wrong(z, t, y, r):
        return u(z, t, y, r) + 3 * meanflow.expand(t, z)

    target = meanflow.mean_flow_target(wrong, z, t, r, y, velocity)

    exact = u(z, t, y, r)
    assert relative(target, exact - 3 * meanflow.expand(t - r, z)) < 1e-10


def test_target_where_r_is_t_is_the_velocity_and_no_derivative_is_computed():
    net, z, t, r, y, v = network_inputs()
    calls = []

    target = meanflow.mean_flow_target(noting(calls, net), z, t, t.clone(), y, v)

    assert torch.equal(target, v)
    assert calls == []


@pytest.mark.parametrize("derivative, copies", (("jvp", 1), ("fd", 2)))
def test_derivative_is_computed_in_one_call_for_the_rows_with_r_before_t(derivative, copies):
    """A quarter of 200 rows. The published code computes it for all, with a graph."""
    net, z, t, r, y, v = network_inputs(200)
    r = torch.where(torch.arange(200) % 4 == 0, r, t)
    calls = []

    target = meanflow.mean_flow_target(noting(calls, net), z, t, r, y, v, derivative)

    assert len(calls) == 1
    assert calls[0].y.tolist() == y[r < t].tolist() * copies        # both points see equal labels
    assert not calls[0].keeps_graph
    assert torch.equal(target[r == t], v[r == t])
    du_dt = meanflow.total_derivative(
        net, *[values[r < t] for values in (z, t, r, y, v)], derivative)
    gap = meanflow.expand(t - r, z)[r < t]
    assert relative(target[r < t], v[r < t] - gap * du_dt) < 1e-12


def test_a_step_of_distillation_evaluates_the_teacher_once_and_the_student_once_in_its_target():
    net, z, t, r, y, _ = network_inputs(20)
    run = SimpleNamespace(c={"derivative": "jvp"}, alpha=1.0)
    draws = {
        "noise": z,
        "uniform": torch.stack([t, r], 1),
        "jumps": torch.arange(20) % 2 == 0,
        "jumps_to_data": torch.zeros(20, dtype=torch.bool),
    }
    of_teacher = []
    of_student = []
    run.teacher = noting(of_teacher, small_dit().double().requires_grad_(False))
    run.student = noting(of_student, net)

    inputs, target = train.distill_target(run, z, y, draws)

    assert [call.y.tolist() for call in of_teacher] == [y.tolist()]
    assert [call.y.tolist() for call in of_student] == [y[::2].tolist()]
    assert not target.requires_grad


def test_where_r_is_t_mean_flow_is_flow_matching():
    """Also in its gradient: a student with r = t is a velocity network, and e - x its target."""
    net = small_dit(True).double()
    y = torch.arange(6)
    t = torch.rand(6).double()
    x, noise = torch.randn(2, 6, 8, 4, 4, dtype=torch.float64)
    z = meanflow.interpolate(x, noise, t)

    target = meanflow.mean_flow_target(net, z, t, t.clone(), y, noise - x)
    mean_flow, mse = meanflow.regression_loss(net(z, t, y, t.clone()), target)

    flow = (net(z, t, y, t) - (noise - x)).square().mean()
    assert torch.allclose(mse, flow, rtol=1e-14)
    gradients = [torch.autograd.grad(loss, net.parameters()) for loss in (mean_flow, flow)]
    for a, b in zip(*gradients):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


class BootstrapCase:
    """A student of five numbers, at points of the mixture that stand for all (x, e)."""

    def __init__(self, t, r):
        self.x, self.e, self.weight = quadrature()
        self.t = times(t).expand(len(self.x))
        self.r = times(r).expand(len(self.x))
        self.row = torch.arange(len(self.x))
        theta = times(0.7, -0.4, 1.3, 0.5, 0.9)
        self.theta = theta.repeat(len(self.x), 1).requires_grad_()  # one for each sample

    def student(self, z, t, y, r):
        a, b, c, d, f = self.theta[y].unbind(1)
        z = z[:, 0]
        wave = (a * z + b * t).sin()
        return (wave + c * t * z + d * r * z**2 + f * (t - r))[:, None]

    def mean_gradient(self, teacher, adaptive_p):
        """The gradient of the five numbers in expectation, of distillation or bootstrapping."""
        z = meanflow.interpolate(self.x, self.e, self.t)
        v = teacher(z, self.t, self.row) if teacher else self.e - self.x
        target = meanflow.mean_flow_target(self.student, z, self.t, self.r, self.row, v)
        prediction = self.student(z, self.t, self.row, self.r)
        loss, _ = meanflow.regression_loss(prediction, target, adaptive_p)
        gradient = torch.autograd.grad(loss, self.theta)[0]
        return (len(self.x) * self.weight * gradient).sum(0)


@pytest.mark.parametrize("t, r", ((0.9, 0.2), (0.5, 0.0), (0.7, 0.7)))
def test_bootstrap_has_the_gradient_of_distillation_in_expectation(t, r):
    """E[e - x | z_t] = v, and the error is linear in v: so it holds where the loss is quadratic."""
    case = BootstrapCase(t, r)
    teacher, _ = FLOWS["mixture"]

    distilled = case.mean_gradient(teacher, adaptive_p=0)
    bootstrapped = case.mean_gradient(None, adaptive_p=0)

    assert relative(distilled, bootstrapped) < 1e-12


@pytest.mark.parametrize("t, r", ((0.9, 0.2), (0.5, 0.0), (0.7, 0.7)))
def test_bootstrap_and_distillation_differ_under_the_adaptive_weighting(t, r):
    case = BootstrapCase(t, r)
    teacher, _ = FLOWS["mixture"]

    distilled = case.mean_gradient(teacher, adaptive_p=1)
    bootstrapped = case.mean_gradient(None, adaptive_p=1)

    assert relative(distilled, bootstrapped) > 0.05


def test_autocast_keeps_the_derivative():
    x = torch.randn(8, 8, 4, 4)
    t = torch.linspace(0.2, 0.9, 8)
    net = small_dit(True)

    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):            # as in train.py
        by_jvp, by_difference = (
            meanflow.total_derivative(net, x, t, t / 2, torch.arange(8), x.flip(0), method)
            for method in ("jvp", "fd"))

    assert relative(by_jvp, by_difference) < 0.1


def test_autocast_keeps_the_students_gradient():
    x = torch.randn(8, 8, 4, 4)
    noise = x.flip(0)
    y = torch.arange(8)
    net = small_dit(True)
    t = torch.linspace(0.2, 0.9, 8)
    z = meanflow.interpolate(x, noise, t)

    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled, cache_enabled=False):
            target = meanflow.mean_flow_target(net, z, t, t / 2, y, noise - x)
            loss, _ = meanflow.regression_loss(net(z, t, y, t / 2), target, adaptive_p=1)
        gradient = torch.autograd.grad(loss, net.parameters())
        gradients.append(torch.cat([values.flatten() for values in gradient]))

    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


# All targets

def test_no_target_has_a_graph():
    """The loss of a stage follows the network's output alone, without "stopgrad"."""
    net, z, t, r, y, v = network_inputs()
    teacher = small_dit().double()                                  # its weights want gradients
    v = teacher(z, t, y)
    x = torch.randn(4, 3, 8, 4, 4, dtype=torch.float64, requires_grad=True)

    _, of_mid = meanflow.mid_training_target(teacher, z, y, 2.0, 3, 3)
    by_jvp = meanflow.mean_flow_target(net, z, t, r, y, v)
    by_difference = meanflow.mean_flow_target(net, z, t, r, y, v, "fd")
    _, of_drift = meanflow.drift_target(net, x, y, torch.randn_like(x), num_moved=2)

    assert v.requires_grad
    assert not of_mid.requires_grad
    assert not by_jvp.requires_grad
    assert not by_difference.requires_grad
    assert not of_drift.requires_grad


def test_target_where_r_is_t_has_no_graph_though_the_velocity_has_one():
    net, z, t, _, y, v = network_inputs()
    v.requires_grad_()

    target = meanflow.mean_flow_target(net, z, t, t, y, v)

    assert torch.equal(target, v)
    assert not target.requires_grad


@pytest.mark.parametrize("derivative", ("jvp", "fd"))
def test_mean_flow_target_has_the_precision_of_the_latents_whatever_the_networks(derivative):
    _, z, t, r, y, v = network_inputs()

    target = meanflow.mean_flow_target(in_16_bits, z, t, r, y, v.bfloat16(), derivative)

    assert target.dtype == torch.float64


def test_target_of_drift_has_the_precision_of_the_latents_whatever_the_networks():
    y, noise, x = drift_case()

    _, target = meanflow.drift_target(in_16_bits, x, y, noise, 2, torch.Tensor.bfloat16)

    assert target.dtype == torch.float64


# Sampling

@both_flows
@pytest.mark.parametrize("steps", (1, 2, 5))
def test_sampling_in_any_number_of_steps_lands_on_the_same_data(steps, v, u):
    noise, y = latents(16)
    data = noise - u(noise, times(1.0), y, times(0.0))
    calls = []

    samples = meanflow.sample(noting(calls, u), noise, y, steps)

    assert relative(samples, data) < 1e-11
    assert len(calls) == steps                                      # theirs: 49 in "50 steps"
    assert not any(call.keeps_graph for call in calls)


def test_sampling_takes_even_steps_from_1_to_0():
    _, u = FLOWS["gaussian"]
    noise, y = latents(2)
    calls = []

    meanflow.sample(noting(calls, u), noise, y, 4)

    intervals = [(call.t.unique().item(), call.r.unique().item()) for call in calls]
    assert intervals == [(1, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0)]


def test_sampling_refuses_no_steps():
    _, u = FLOWS["gaussian"]
    noise, y = latents(2)

    with pytest.raises(ValueError):
        meanflow.sample(u, noise, y, 0)


# Stage "drift"

def kernel_mean(point, places, points, T):
    """The mean of points by softmax(-distance / T) of their places, one at a time."""
    weighted = torch.zeros_like(point)
    total = 0.0
    for place, value in zip(places, points):
        distance = float((point - place).norm())
        if distance > 0:                                            # a sample leaves itself out
            weight = math.exp(-distance / T)
            weighted += weight * value
            total += weight
    return weighted / total


def slow_drift(s, data, samples, temperature, jitter=None):
    """drift_field by a slow loop: s (n, D), data and samples (m, D) -> (n, D)."""
    T = temperature * np.mean([float((a - b).norm()) for a in s for b in data])
    places = data if jitter is None else data + T * jitter
    rows = [kernel_mean(a, places, data, T) - kernel_mean(a, samples, samples, T) for a in s]
    return torch.stack(rows)


def drift_inputs():
    """s, data and samples (2, n, 5), where s are the first three of four samples."""
    samples, data = torch.randn(2, 2, 4, 5, dtype=torch.float64)
    return samples[:, :3].clone(), data, samples


def test_drift_is_that_of_a_slow_loop():
    s, data, samples = drift_inputs()

    V = meanflow.drift_field(s, data, samples, 0.3)

    for kernel in (0, 1):                                           # they know nothing of another
        expected = slow_drift(s[kernel], data[kernel], samples[kernel], 0.3)
        assert relative(V[kernel], expected) < 1e-10


def test_jitter_moves_the_data_in_the_distances_alone():
    s, data, samples = drift_inputs()
    jitter = torch.randn(2, 4, 5, dtype=torch.float64)

    V = meanflow.drift_field(s, data, samples, 0.3, jitter)

    for kernel in (0, 1):
        expected = slow_drift(s[kernel], data[kernel], samples[kernel], 0.3, jitter[kernel])
        assert relative(V[kernel], expected) < 1e-10


def test_drift_is_nothing_where_both_sets_are_alike():
    s, _, samples = drift_inputs()

    V = meanflow.drift_field(s, samples, samples.flip(1), 0.3)

    assert V.abs().max() < 1e-15


def test_drift_follows_a_translation_and_no_order():
    s, data, samples = drift_inputs()

    V = meanflow.drift_field(s, data, samples, 0.3)
    moved = meanflow.drift_field(s + 7, data.flip(1) + 7, samples.roll(1, 1) + 7, 0.3)

    assert relative(moved, V) < 1e-10


def test_drift_points_to_data_and_away_from_samples():
    def at(*places):
        return torch.tensor([[[place, 0.0] for place in places]], dtype=torch.float64)

    V = meanflow.drift_field(at(0), at(3), at(0, -1), 0.05)

    assert torch.equal(V, at(4))                                    # to 3, and away from -1


def test_drift_is_in_full_precision_inside_autocast():
    inputs = [points.float() for points in drift_inputs()]
    plain = meanflow.drift_field(*inputs, 0.3)

    with torch.autocast("cpu", torch.bfloat16):
        inside = meanflow.drift_field(*inputs, 0.3)

    assert torch.equal(inside, plain)


def halved(z, t, y, r):
    """A student of which the samples are s = e / 2."""
    return z / 2


def drift_case(num_samples=6, num_data=6):
    """Labels, noise (2, M, 3, 2, 2) and data (2, m, 3, 2, 2) of two classes."""
    noise = torch.randn(2, num_samples, 3, 2, 2, dtype=torch.float64)
    x = torch.randn(2, num_data, 3, 2, 2, dtype=torch.float64)
    return torch.tensor([0, 1]), noise, x


def test_rows_of_drift_are_the_moved_samples_at_their_noise():
    y, noise, x = drift_case()
    calls = []

    inputs, target = meanflow.drift_target(noting(calls, halved), x, y, noise, num_moved=2)

    z, t, labels, r = inputs
    assert torch.equal(z, noise[:, :2].flatten(0, 1))
    assert t.tolist() == [1] * 4
    assert r.tolist() == [0] * 4
    assert labels.tolist() == [0, 0, 1, 1]
    assert target.shape == z.shape
    [call] = calls                                                  # all samples at once
    assert call.y.tolist() == [0] * 6 + [1] * 6
    assert call.t.unique().tolist() == [1]
    assert call.r.unique().tolist() == [0]
    assert not call.keeps_graph


def unit_drift(temperatures, *points, is_token):
    """The mean over temperatures of slow_drift, of length 1 in a token, or of rms 1 in a latent."""
    total = 0
    for T in temperatures:
        V = slow_drift(*points[:3], T, points[3])                   # (n, D)
        length = V.norm(dim=1) if is_token else V.square().mean(1).sqrt()
        total += V / length[:, None]
    return total / len(temperatures)


several_temperatures = pytest.mark.parametrize("temperatures", ((0.3,), (0.05, 0.2, 1.0)))
with_or_without_jitter = pytest.mark.parametrize("jittered", (False, True))


@several_temperatures
@with_or_without_jitter
def test_target_of_drift_is_that_of_a_slow_loop(temperatures, jittered):
    y, noise, x = drift_case(num_samples=5, num_data=4)
    jitter = torch.randn_like(x) if jittered else None

    (e, *_), target = meanflow.drift_target(
        halved, x, y, noise, 2, None, temperatures, False, jitter)

    drift = (e - target - e / 2).view(2, 2, -1)                     # what is added to s
    for row in (0, 1):
        s = noise[row].flatten(1) / 2
        moves = jitter[row].flatten(1) if jittered else None
        expected = unit_drift(
            temperatures, s[:2], x[row].flatten(1), s, moves, is_token=False)
        assert relative(drift[row], expected) < 1e-6


@several_temperatures
@with_or_without_jitter
def test_target_of_drift_per_token_is_that_of_a_slow_loop(temperatures, jittered):
    y, noise, x = drift_case(num_samples=5, num_data=4)
    jitter = torch.randn_like(x) if jittered else None

    (e, *_), target = meanflow.drift_target(
        halved, x, y, noise, 2, None, temperatures, True, jitter)

    drift = (e - target - e / 2).view(2, 2, 3, 2, 2)                # what is added to s
    for row, i, j in np.ndindex(2, 2, 2):                           # a kernel for each token
        s = noise[row, :, :, i, j] / 2
        moves = jitter[row, :, :, i, j] if jittered else None
        expected = unit_drift(
            temperatures, s[:2], x[row, :, :, i, j], s, moves, is_token=True)
        assert relative(drift[row, :, :, i, j], expected) < 1e-6


@pytest.mark.parametrize("temperature", (0.25, torch.tensor(0.25)), ids=("number", "tensor"))
def test_one_temperature_may_be_a_number(temperature):
    y, noise, x = drift_case()

    _, target = meanflow.drift_target(halved, x, y, noise, 2, temperature=temperature)

    _, expected = meanflow.drift_target(halved, x, y, noise, 2, temperature=(0.25,))
    assert torch.equal(target, expected)


def test_drift_of_a_latent_has_a_root_mean_square_of_1():
    y, noise, x = drift_case()

    inputs, target = meanflow.drift_target(halved, x, y, noise, num_moved=2)

    _, mse = meanflow.regression_loss(halved(*inputs), target)
    assert mse.item() == pytest.approx(1, rel=1e-12)


def test_drift_per_token_has_the_length_1_in_each_token():
    y, noise, x = drift_case()

    inputs, target = meanflow.drift_target(halved, x, y, noise, num_moved=2, per_token=True)

    length = (halved(*inputs) - target).norm(dim=1)                 # (B n, G, G)
    assert torch.allclose(length, torch.ones_like(length), rtol=1e-12)


@pytest.mark.parametrize("per_token", (False, True))
def test_a_student_whose_samples_are_the_data_is_the_fixed_point_of_drift(per_token):
    y, noise, _ = drift_case()
    data = noise.flip(1) / 2                                        # the samples, in another order

    inputs, target = meanflow.drift_target(halved, data, y, noise, 6, per_token=per_token)

    assert relative(target, halved(*inputs)) < 1e-6


def test_drift_keeps_classes_apart():
    y, noise, x = drift_case()
    others = x.clone()
    others[1] += 5                                                  # data of the second class

    _, before = meanflow.drift_target(halved, x, y, noise, num_moved=2)
    _, after = meanflow.drift_target(halved, others, y, noise, num_moved=2)

    assert torch.equal(before[:2], after[:2])
    assert not torch.equal(before[2:], after[2:])


def test_samples_that_are_not_moved_push_those_that_are():
    y, noise, x = drift_case()
    others = noise.clone()
    others[:, 2:] += 0.5

    _, before = meanflow.drift_target(halved, x, y, noise, num_moved=2)
    _, after = meanflow.drift_target(halved, x, y, others, num_moved=2)

    assert before.shape == after.shape == (4, 3, 2, 2)
    assert not torch.equal(before, after)


def test_loss_of_drift_with_reencode_has_the_drift_and_what_the_decoder_loses_as_its_gradient():
    y, noise, x = drift_case()
    shift = torch.zeros(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)

    def reencode(z):
        return 0.8 * z.flip(1)

    inputs, target = meanflow.drift_target(halved, x, y, noise, 2, reencode)
    prediction = halved(*inputs) - shift                            # s = e / 2 + shift
    loss, _ = meanflow.regression_loss(prediction, target)
    loss.backward()

    drifts = []
    for row in (0, 1):
        samples = noise[row].flatten(1) / 2                         # (M, D)
        points = samples[:2], x[row].flatten(1), samples, None
        drifts.append(unit_drift([0.05], *points, is_token=False))
    s = (noise[:, :2] / 2).flatten(0, 1)
    V = torch.cat(drifts).view(s.shape)
    expected = -2 * (V + reencode(s) - s) / s.numel()
    assert relative(shift.grad, expected) < 1e-6


# The demo

def test_points_of_the_checkerboard_fill_its_dark_squares():
    points = meanflow.checkerboard(200, 100)

    on_dark, variation = meanflow.fit(points.flatten(0, 1))

    assert points.shape == (200, 100, 2)
    assert points.abs().max() <= 2
    assert on_dark == pytest.approx(1)
    assert variation < 0.05


def test_fit_of_points_that_are_elsewhere():
    points = meanflow.checkerboard(20_000)

    beside = points + torch.tensor([1.0, 0.0])                      # on the light squares
    far = points + 100

    assert meanflow.fit(beside)[0] < 0.01
    assert meanflow.fit(beside)[1] > 0.95
    assert meanflow.fit(far) == pytest.approx((0, 1))


def test_student_of_the_demo_starts_as_its_teacher_and_ends_frozen():
    model = meanflow.MLP()
    z = torch.randn(50, 2)
    t = torch.rand(50)

    def batch_of(model):
        return (z, t, None, t / 3), z

    velocity = model(z, t, None)
    average_velocity = model(z, t, None, t / 3)
    trained = meanflow.train_demo("a stage", model, batch_of, 2, 1e-3)

    assert torch.equal(velocity, average_velocity)
    assert trained is model
    assert not any(p.requires_grad for p in trained.parameters())
    assert not torch.equal(trained(z, t, None), trained(z, t, None, t / 3))


def test_drifting_points_of_the_demo_get_nearer_to_the_data():
    student = meanflow.MLP()
    noise = torch.randn(4000, 2)
    y = torch.zeros(4000)

    def drift_batch(u):
        noise = torch.randn(1, 256, 2)
        return meanflow.drift_target(u, meanflow.checkerboard(1, 256), y[:1], noise, 64)

    before = meanflow.fit(meanflow.sample(student, noise, y))
    student = meanflow.train_demo("drift", student, drift_batch, 60, 3e-3)
    after = meanflow.fit(meanflow.sample(student, noise, y))

    assert after[0] > before[0] + 0.1                               # on the dark squares
    assert after[1] < before[1] - 0.1                               # variation from the data


def test_the_demo_draws_its_panels():
    points = meanflow.checkerboard(500)
    lines = {"crimson": torch.randn(3, 5, 2)}

    picture = meanflow.draw({"data": (points, {}), "lines": (points, lines)}, columns=2, side=64)
    colours = picture.getcolors(picture.width * picture.height)

    assert picture.size == (2 * (64 + 16), 64 + 40)
    assert len(colours) > 50


# --------------------------------------------------------------------------------------------------
# The networks: dit.py

def small_dit(average_velocity=False, hidden_size=(24, 32), depth=(2, 2), num_heads=(2, 2)):
    """Every weight is random: a fresh network is zero everywhere, which would hide mistakes."""
    net = dit.DiTDH(4, 8, hidden_size, depth, num_heads, 10, average_velocity)
    for weight in net.parameters():
        weight.data.normal_(0, 0.2)
    return net


both_grids = pytest.mark.parametrize("grid, average_velocity", ((16, False), (32, True)))


def published_xl(grid, average_velocity):
    """DiTDH-XL of the device "meta", which has shapes alone."""
    with torch.device("meta"):
        return dit.DiTDH(grid, 768, num_classes=1000, average_velocity=average_velocity,
                         **dit.MODELS["XL"])


@pytest.mark.parametrize("grid, average_velocity, cost", (
    (16, False, (838.4, 161.6)),
    (32, True, (840.3, 702.8)),
))
def test_dit_xl_costs_what_is_published(grid, average_velocity, cost):
    net = published_xl(grid, average_velocity)
    with torch.device("meta"):
        z = torch.empty(1, 768, grid, grid)
        t = torch.ones(1)
        y = torch.zeros(1, dtype=torch.long)

    parameters, macs = dit.parameters_and_macs(net, z, t, y, t)

    assert (round(parameters / 1e6, 1), round(macs / 1e9, 1)) == cost


def test_cost_includes_the_products_of_attention():
    """Queries by keys, and weights by values: two of 9 x 9 x 8 for 9 tokens of 8 channels."""
    with torch.device("meta"):
        attention = dit.Attention(8, 2)
        rotary = dit.RotaryPositions(4, 3)
        tokens = torch.empty(1, 9, 8)

    parameters, macs = dit.parameters_and_macs(attention, tokens, rotary)

    assert parameters == 8 * 24 + 24 + 8 * 8 + 8
    assert macs == 9 * (8 * 24 + 8 * 8) + 2 * 9 * 9 * 8


@both_grids
def test_dit_xl_has_the_published_tensors(grid, average_velocity):
    state = published_xl(grid, average_velocity).state_dict()

    expected = {
        "pos_embed": (1, grid**2, 1152),
        "enc_feat_rope.freqs_cos": (grid**2, 72),
        "dec_feat_rope.freqs_sin": (grid**2, 128),
        "t_embedder.W": (256,),
        "y_embedder.embedding_table.weight": (1001, 1152),
        "x_embedder.proj.weight": (2048, 768, 1, 1),
        "s_embedder.proj.weight": (1152, 768, 1, 1),
        "s_projector.weight": (2048, 1152),
        "final_layer.linear.weight": (768, 2048),
        "blocks.27.attn.qkv.weight": (3456, 1152),
        "blocks.28.attn.qkv.weight": (6144, 2048),
        "blocks.29.mlp.w12.weight": (10922, 2048),
        "blocks.29.adaLN_modulation.1.weight": (12288, 2048),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected
    assert len(state) == 382 + 5 * average_velocity
    assert ("r_embedder.mlp.2.weight" in state) == average_velocity


class PlainForward:
    """DiTDH for one image, token by token and head by head, from its weights alone.

    Positions turn queries and keys as complex numbers.
    """

    def __init__(self, net):
        self.weights = net.state_dict()
        tokens = torch.arange(16).double()[:, None]
        self.row = tokens // 4
        self.column = tokens % 4

    def linear(self, x, name):
        weight = self.weights[f"{name}.weight"].flatten(1)
        return x @ weight.T + self.weights[f"{name}.bias"]

    def norm(self, x, name):
        root_mean_square = (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return x / root_mean_square * self.weights[f"{name}.weight"]

    @staticmethod
    def silu(x):
        return x / (1 + (-x).exp())

    @staticmethod
    def frequency(num):
        return 10000.0 ** (-torch.arange(num).double() / num)

    def embed(self, t, name):
        angle = 2 * math.pi * t * self.weights[f"{name}.W"]
        features = torch.cat([angle.sin(), angle.cos()])
        return self.linear(self.silu(self.linear(features, f"{name}.mlp.0")), f"{name}.mlp.2")

    def turn(self, x):
        frequency = self.frequency(x.shape[1] // 4)
        angle = torch.cat([self.row * frequency, self.column * frequency], 1)
        turned = torch.view_as_complex(x.unflatten(1, (-1, 2))) * torch.exp(1j * angle)
        return torch.view_as_real(turned).flatten(1)

    def attention(self, x, name):
        parts = self.linear(x, f"{name}.qkv").chunk(3, 1)
        outputs = []
        for q, k, v in zip(*[part.chunk(2, 1) for part in parts]):  # two heads
            similarity = self.turn(q) @ self.turn(k).T / q.shape[1] ** 0.5
            outputs.append(similarity.softmax(1) @ v)
        return self.linear(torch.cat(outputs, 1), f"{name}.proj")

    def block(self, x, c, name):
        modulation = self.linear(self.silu(c), f"{name}.adaLN_modulation.1")
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)

        h = self.norm(x, f"{name}.norm1") * (1 + scale1) + shift1
        x = x + gate1 * self.attention(h, f"{name}.attn")

        h = self.norm(x, f"{name}.norm2") * (1 + scale2) + shift2
        gate, value = self.linear(h, f"{name}.mlp.w12").chunk(2, 1)
        return x + gate2 * self.linear(self.silu(gate) * value, f"{name}.mlp.w3")

    def positions(self):
        angles = [axis * self.frequency(6) for axis in (self.column, self.row)]
        return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)

    def __call__(self, z, t, y, r):
        tokens = z.flatten(1).T                                     # (16, 8)
        times = self.embed(t, "t_embedder") + self.embed(t - r, "r_embedder")   # (24,)
        c = self.silu(times + self.weights["y_embedder.embedding_table.weight"][y])

        s = self.linear(tokens, "s_embedder.proj") + self.positions()
        s = self.block(self.block(s, c, "blocks.0"), c, "blocks.1")
        s = self.linear(self.silu(s + times), "s_projector")

        x = self.linear(tokens, "x_embedder.proj")
        x = self.block(self.block(x, s, "blocks.2"), s, "blocks.3")
        shift, scale = self.linear(self.silu(s), "final_layer.adaLN_modulation.1").chunk(2, 1)
        h = self.norm(x, "final_layer.norm_final") * (1 + scale) + shift
        return self.linear(h, "final_layer.linear")                 # (16, 8)


def test_dit_against_a_plain_forward():
    net = small_dit(True).double().requires_grad_(False)
    z = torch.randn(8, 4, 4, dtype=torch.float64)

    by_net = net(z[None], times(0.8), torch.tensor([7]), times(0.3))

    expected = PlainForward(net)(z, 0.8, 7, 0.3)
    assert relative(by_net[0].flatten(1).T, expected) < 1e-6


def test_norm_answers_in_the_precision_of_its_input():
    norm = dit.RMSNorm(8, 1e-6)

    assert norm(torch.randn(3, 8).bfloat16()).dtype == torch.bfloat16
    assert norm(torch.randn(3, 8)).dtype == torch.float32


def test_product_of_query_and_key_depends_on_how_far_apart_their_tokens_are():
    rotary = dit.RotaryPositions(8, 4).double()
    q, k = torch.randn(2, 1, 8, dtype=torch.float64).expand(2, 16, 8)

    product = rotary(q) @ rotary(k).T                               # (N, N)

    by_row_and_column = product.view(4, 4, 4, 4)
    assert torch.allclose(by_row_and_column[:3, :, :3], by_row_and_column[1:, :, 1:])
    assert torch.allclose(by_row_and_column[:, :3, :, :3], by_row_and_column[:, 1:, :, 1:])
    assert product.std() > 0.1


def test_teacher_ignores_r():
    net = small_dit()
    z = torch.randn(3, 8, 4, 4)
    t = torch.rand(3)
    y = torch.arange(3)

    assert torch.equal(net(z, t, y), net(z, t, y, t / 2))


def is_uniform(weights, bound):
    """Whether weights look drawn from between -bound and bound."""
    largest = weights.abs().max()
    return bool(0.8 * bound < largest <= bound and abs(weights.mean()) < 0.2 * bound)


def fresh_dit():
    return dit.DiTDH(4, 48, (64, 96), (2, 2), (2, 2), 100, average_velocity=True)


def test_a_fresh_dit_is_zero():
    net = fresh_dit()

    z = torch.randn(2, 48, 4, 4)
    u = net(z, torch.rand(2), torch.arange(2), torch.zeros(2))

    assert not u.any()


def test_initial_weights_of_modulations_and_last_layers_are_zero():
    net = fresh_dit()

    layers = [module for name, module in net.named_modules()
              if "adaLN" in name and isinstance(module, torch.nn.Linear)]
    layers += [net.final_layer.linear, net.r_embedder.mlp[2]]

    assert len(layers) == 5 + 2
    for layer in layers:
        assert not layer.weight.any()
        assert not layer.bias.any()


def test_initial_weights_of_other_linear_layers_are_pytorchs():
    net = fresh_dit()
    zeros = "final_layer.linear", "r_embedder.mlp.2"

    layers = {name: module for name, module in net.named_modules()
              if isinstance(module, torch.nn.Linear) and "adaLN" not in name and name not in zeros}

    for name, layer in layers.items():
        bound = layer.in_features**-0.5
        assert is_uniform(layer.bias, bound), name
        assert is_uniform(layer.weight, bound) != name.startswith("t_embedder"), name


def test_initial_weights_of_embeddings():
    net = fresh_dit()

    for embedder in (net.x_embedder, net.s_embedder):               # Xavier
        weight = embedder.proj.weight
        assert is_uniform(weight, (6 / sum(weight.shape[:2])) ** 0.5)
        assert not embedder.proj.bias.any()
    for layer in (net.y_embedder.embedding_table, net.t_embedder.mlp[0], net.t_embedder.mlp[2]):
        assert 0.019 < layer.weight.std() < 0.021                   # normal
        assert layer.weight.abs().max() > 0.05
    assert 0.8 < net.t_embedder.W.std() < 1.2                       # standard normal
    assert net.r_embedder.W.min() < -1


def test_student_starts_as_its_teacher():
    teacher = small_dit()
    z = torch.randn(6, 8, 4, 4)
    t = torch.rand(6)
    y = torch.arange(6)

    student = dit.student_of(teacher)

    assert torch.equal(student(z, t, y, t * torch.rand(6)), teacher(z, t, y))
    assert student.config == teacher.config | {"average_velocity": True}


def test_every_weight_of_a_student_learns():
    student = dit.student_of(small_dit())
    t = torch.rand(6)

    u = student(torch.randn(6, 8, 4, 4), t, torch.arange(6), t / 2)
    u.square().sum().backward()

    still = {name for name, weight in student.named_parameters() if not weight.grad.any()}
    before_a_zero_layer = {"r_embedder.mlp.0.weight", "r_embedder.mlp.0.bias"}
    assert still == before_a_zero_layer


def small_decoder():
    return rae.Decoder(6, 2, 8, 16, 2, 2, 40)


def gradients_and_memory(net, inputs):
    """The gradients of a network, and the numbers that the forward pass keeps for them."""
    sizes = []

    def keep(x):
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = net(*inputs).square().sum()
    return torch.autograd.grad(loss, list(net.parameters())), sum(sizes)


@pytest.mark.parametrize("kind", ("network", "decoder"))
def test_checkpointing_changes_memory_and_nothing_else(kind):
    t = torch.tensor([0.3, 0.8])
    if kind == "network":
        net = small_dit(True)
        inputs = torch.randn(2, 8, 4, 4), t, torch.tensor([1, 2]), t / 2
    else:
        net = small_decoder()
        inputs = [torch.randn(3, 6, 2, 2)]

    plain, kept = gradients_and_memory(net, inputs)
    net.checkpointing = True
    again, kept_less = gradients_and_memory(net, inputs)

    assert all(torch.equal(a, b) for a, b in zip(plain, again))
    assert kept_less < kept / 2


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("with_gradient", (False, True))
def test_activations_are_computed_again_only_where_a_gradient_needs_them(
        checkpointing, with_gradient, monkeypatch):
    calls = []

    def checkpoint(block, *inputs, **_):
        calls.append(block)
        return block(*inputs)

    monkeypatch.setattr(dit, "checkpoint", checkpoint)
    net = small_dit()
    net.checkpointing = checkpointing

    with torch.set_grad_enabled(with_gradient):
        net(torch.randn(1, 8, 4, 4), torch.rand(1), torch.arange(1))

    assert len(calls) == (4 if checkpointing and with_gradient else 0)


# Networks from files

def error_of(call, *arguments):
    """The SystemExit with which a call refuses its arguments: one line."""
    with pytest.raises(SystemExit) as refused:
        call(*arguments)

    assert isinstance(refused.value.code, str)
    assert "\n" not in refused.value.code.strip()
    return refused.value


def assert_loads_as(content, net, path):
    """A file of the content gives the network, frozen, and the content."""
    loaded, in_file = dit.load_network(saved(content, path))

    z = torch.randn(3, 8, 4, 4)
    t = torch.rand(3)
    y = torch.arange(3)
    assert torch.equal(loaded(z, t, y, t / 2), net(z, t, y, t / 2))
    assert loaded.config == net.config
    assert in_file.keys() == content.keys()
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())


def test_a_network_loads_from_its_own_checkpoint_with_the_averaged_weights(tmp_path):
    own = small_dit(False, (64, 64), (5, 3), (4, 2))
    content = {"model": small_dit().state_dict(), "ema": own.state_dict(), "network": own.config}

    assert_loads_as(content, own, tmp_path / "x.pt")


@pytest.mark.parametrize("average_velocity", (False, True))
@pytest.mark.parametrize("key", (None, "ema", "model"))
def test_a_network_loads_from_published_weights(key, average_velocity, tmp_path):
    """They come without the network's sizes, which are read off their shapes."""
    net = small_dit(average_velocity, **dit.MODELS["toy"])
    content = {key: net.state_dict()} if key else net.state_dict()

    assert_loads_as(content, net, tmp_path / "x.pt")


def test_weights_in_half_precision_load_in_full(tmp_path):
    net = small_dit()
    in_half = {name: value.half() for name, value in net.state_dict().items()}

    loaded, _ = dit.load_network(saved({"ema": in_half, "network": net.config}, tmp_path / "x.pt"))

    assert all(weight.dtype == torch.float32 for weight in loaded.parameters())


@pytest.mark.parametrize("content", (
    {"model": {"decoder_pred.weight": torch.ones(2, 2)}},           # a published decoder
    {"model": small_decoder().state_dict()},
    {"var": torch.ones(2)},                                         # published statistics
), ids=("published decoder", "decoder", "statistics"))
def test_a_file_without_a_network_is_refused_by_name(content, tmp_path):
    path = saved(content, tmp_path / "x.pt")

    assert str(path) in str(error_of(dit.load_network, path))


def test_published_weights_of_unknown_widths_are_refused(tmp_path):
    path = saved(small_dit().state_dict(), tmp_path / "x.pt")

    refused = str(error_of(dit.load_network, path))

    assert str(path) in refused
    assert "(24, 32)" in refused


def with_entry(state, name, value):
    return state | {name: value}


def without_entry(state, name):
    return {key: value for key, value in state.items() if key != name}


BIAS = "s_projector.bias"


@pytest.mark.parametrize("damage", (
    lambda state: with_entry(state, BIAS, torch.full((32,), float("nan"))),
    lambda state: with_entry(state, BIAS, torch.full((32,), -float("inf"))),
    lambda state: with_entry(state, BIAS, torch.full((32,), 1e11)),             # a flipped bit
    lambda state: with_entry(state, BIAS, torch.zeros(31)),
    lambda state: with_entry(state, BIAS, "a string"),
    lambda state: without_entry(state, BIAS),
), ids=("nan", "infinite", "huge", "another shape", "no tensor", "missing"))
def test_a_damaged_entry_is_named_with_its_file(damage, tmp_path):
    net = small_dit()
    content = {"ema": damage(net.state_dict()), "network": net.config}
    path = saved(content, tmp_path / "x.pt")

    refused = error_of(dit.load_network, path)

    assert isinstance(refused, dit.DamagedFile)
    assert str(path) in str(refused)
    assert BIAS in str(refused)


def test_an_unknown_entry_is_named_with_its_file(tmp_path):
    net = small_dit()
    state = with_entry(net.state_dict(), "extra.bias", torch.zeros(3))
    path = saved({"ema": state, "network": net.config}, tmp_path / "x.pt")

    refused = error_of(dit.load_network, path)

    assert isinstance(refused, dit.DamagedFile)
    assert str(path) in str(refused)
    assert "extra.bias" in str(refused)


# Files

CONTENT = {"a": torch.arange(6.0), "b": [1, 2, {"c": "x"}]}


def test_a_file_is_read_as_it_was_saved(tmp_path):
    path = saved(CONTENT, tmp_path / "x.pt")

    content = dit.load_file(path)

    assert content.keys() == CONTENT.keys()
    assert torch.equal(content["a"], CONTENT["a"])
    assert content["b"] == CONTENT["b"]


def test_a_file_of_before_pytorch_1_6_is_read(tmp_path):
    save = partial(torch.save, _use_new_zipfile_serialization=False)
    path = saved(CONTENT, tmp_path / "x.pt", save)

    assert torch.equal(dit.load_file(path)["a"], CONTENT["a"])


def test_a_missing_file_is_refused_but_not_damaged(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):                   # a folder is no file
        refused = error_of(dit.load_file, path)

        assert str(path) in str(refused)
        assert not isinstance(refused, dit.DamagedFile)


def assert_damaged(path):
    refused = error_of(dit.load_file, path)

    assert isinstance(refused, dit.DamagedFile)
    assert str(path) in str(refused)


@pytest.mark.parametrize("head", (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 3\n",
    b"<!DOCTYPE html><html><head></head></html>",
    b"\n  <html></html>",
    b"",
    b"PK",
    b"PK\x03\x04 not an archive",
    b"not weights at all",
    bytes(1000),
), ids=("lfs", "page", "blank page", "empty", "two bytes", "fake archive", "text", "zeros"))
def test_a_file_of_another_kind_is_named(head, tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(head)

    assert_damaged(path)


def test_a_safetensors_file_is_named(tmp_path):
    path = saved({"weight": torch.ones(3)}, tmp_path / "x.pt", save_file)

    assert_damaged(path)


@pytest.mark.parametrize("content", (torch.ones(3), [torch.ones(3)], "text"),
                         ids=("tensor", "list", "text"))
def test_a_file_that_holds_no_dictionary_is_named(content, tmp_path):
    assert_damaged(saved(content, tmp_path / "x.pt"))


@pytest.mark.parametrize("is_archive", (True, False), ids=("archive", "before 1.6"))
def test_a_file_that_is_cut_off_anywhere_is_named(is_archive, tmp_path):
    save = partial(torch.save, _use_new_zipfile_serialization=is_archive)
    path = saved(CONTENT, tmp_path / "x.pt", save)
    whole = path.read_bytes()

    for length in range(0, len(whole), 5):
        path.write_bytes(whole[:length])

        assert_damaged(path)


def test_one_wrong_bit_anywhere_is_named_or_changes_nothing(tmp_path):
    """torch.load would read most of them as numbers, without a word."""
    path = saved(CONTENT, tmp_path / "x.pt")
    whole = path.read_bytes()

    num_damaged = 0
    for position in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            content = dit.load_file(path)
        except dit.DamagedFile as error:
            num_damaged += 1
            assert str(path) in str(error)
            continue
        assert torch.equal(content["a"], CONTENT["a"])              # it was between the records
        assert content["b"] == CONTENT["b"]

    assert num_damaged > 50


def test_one_process_of_several_reads_the_checksums(tmp_path, monkeypatch):
    path = saved(CONTENT, tmp_path / "x.pt")
    whole = path.read_bytes()
    numbers = CONTENT["a"].numpy().tobytes()
    place = whole.index(numbers) + 7                                # an exponent
    flipped = bytearray(whole)
    flipped[place] ^= 1
    path.write_bytes(flipped)

    monkeypatch.setenv("RANK", "1")
    content = dit.load_file(path)

    assert not torch.equal(content["a"], CONTENT["a"])
    monkeypatch.setenv("RANK", "0")
    assert_damaged(path)


TINY = ("--batch_size", 8, "--steps", 4, "--precision", "fp32", "--device", "cpu",
        "--save_every", 2)
STAGES = [*train.TABLE["paper 256"]]
PAPER = copy.deepcopy(train.TABLE)
for column in ("paper 256", "paper toy"):
    train.TABLE[column]["drift"].update(samples=4, num_moved=2)
    train.TABLE[column]["mid"].update(num_pairs=2, num_points=5)


def in_process(monkeypatch, *arguments):
    """Run train.py's main() in this process; its signal handlers go when it is done."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in numbers}
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    try:
        train.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start(folder, work, world=1):
    """Call work(rank) in forks of this process, in one process group if several -> processes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def child(rank):
        place = dict(WORLD_SIZE=world, RANK=rank, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1",
                     MASTER_PORT=port)
        if world > 1:
            os.environ.update({name: str(value) for name, value in place.items()})
        log = (folder / f"rank{rank}.txt").open("w", buffering=1)  # noqa: SIM115 - while it runs
        sys.stdout = sys.stderr = log
        torch.set_num_threads(1)
        work(rank)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=child, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def finish(folder, processes, seconds=120):
    """Wait for processes -> (their exit codes, the lines that they wrote)."""
    for process in processes:
        process.join(seconds)
        assert not process.is_alive() or process.kill()
    text = "\n".join(path.read_text() for path in sorted(folder.glob("rank*.txt")))
    lines = re.split("[\r\n]+", text)
    return ([process.exitcode for process in processes],
            [line for line in lines if line.strip() and "%|" not in line])


def training(arguments, fault=None):
    """The work of a process that runs train.py. fault(rank) is called first."""
    def work(rank):
        sys.argv = ["train.py", *map(str, arguments)]
        if fault:
            fault(rank)
        train.main()
    return work


def run(folder, *arguments, world=1, fault=None):
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
            in_process(monkeypatch, "--toy", "--data", photographs, "--out", out,
                       "--stage", stage, *TINY)
    return out


def copy_inputs(trained, out, *stages):
    out.mkdir(exist_ok=True)
    for stage in stages:
        (out / f"{stage}.pt").write_bytes((trained / f"{stage}.pt").read_bytes())


def a_run(trained, photographs, out, stage, *more):
    """The command of a short run of a stage, and in OUT what it starts from."""
    copy_inputs(trained, out, *[other for other in STAGES if other != stage])
    return ("--toy", "--data", photographs, "--out", out, "--stage", stage, *TINY,
            "--steps", 6, *more)


def lines_of(out, stage):
    return [json.loads(line) for line in (out / f"{stage}.jsonl").read_text().splitlines()]


def losses(out, stage):
    return {line["step"]: (line["loss"], line["mse"]) for line in lines_of(out, stage)
            if "loss" in line}


def assert_equal_runs(out, straight, stage):
    """Weights, EMA and moments bit for bit, and a log with every step once."""
    ours, theirs = (dit.load_file(folder / f"{stage}.pt") for folder in (out, straight))
    for part in ("model", "ema", "discriminator"):
        for name, value in theirs.get(part, {}).items():
            assert torch.equal(value, ours[part][name]), name
    for part in ("optimizer", "d_optimizer"):
        for k, moments in theirs.get(part, {}).get("state", {}).items():
            for name in moments:
                assert torch.equal(moments[name], ours[part]["state"][k][name])
    told = [[(line["step"], line["loss"], line["grad_norm"]) for line in lines_of(folder, stage)
             if "loss" in line] for folder in (out, straight)]
    assert told[0] == told[1] and [step for step, *_ in told[0]] == [*range(1, len(told[0]) + 1)]


# --------------------------------------------------------------------------------------------------
# The representation autoencoder: rae.py

def assert_one_line_with(error, *words):
    """An error's text is one line that has all the words."""
    line = str(error).strip()
    assert "\n" not in line
    for word in words:
        assert str(word) in line


def small_rae(encoder="toy"):
    """An RAE of random weights and statistics: 4 x 4 latents of images of 32 or 64 pixels."""
    if encoder == "toy":
        encoder = rae.Encoder("toy", image_size=32, channels=8)
    else:
        encoder = rae.Encoder(encoder, image_size=64, weights="random")
    channels = encoder.config["channels"]
    patch = encoder.config["image_size"] // 4
    decoder = rae.Decoder(channels, 4, patch, hidden_size=16, depth=1, num_heads=2, mlp_hidden=32)
    mean = torch.randn(channels, 4, 4)
    var = torch.rand(channels, 4, 4) + 0.5
    return rae.RAE(encoder, decoder, mean, var).eval()


both_encoders = pytest.mark.parametrize("encoder", ("toy", TINY_VIT))


# The decoder and its published weights

def published_decoder(d, c, tokens, patch, hidden):
    """Random tensors under the names of a published decoder of one block."""
    shapes = {
        "decoder_embed": (d, c),
        "decoder_norm": (d,),
        "decoder_pred": (3 * patch**2, d),
    }
    layers = {
        "attention.attention.query": (d, d),
        "attention.attention.key": (d, d),
        "attention.attention.value": (d, d),
        "attention.output.dense": (d, d),
        "intermediate.dense": (hidden, d),
        "output.dense": (d, hidden),
        "layernorm_before": (d,),
        "layernorm_after": (d,),
    }
    shapes |= {f"decoder_layers.0.{name}": shape for name, shape in layers.items()}

    state = {
        "decoder_pos_embed": torch.randn(1, tokens + 1, d),
        "trainable_cls_token": torch.randn(1, 1, d),
    }
    for name, shape in shapes.items():
        state[f"{name}.weight"] = 0.3 * torch.randn(shape)
        state[f"{name}.bias"] = 0.3 * torch.randn(shape[0])
    return state


class PlainDecoder:
    """The forward pass of a published decoder of one block, on its own tensors, for one image."""

    def __init__(self, state, d, num_heads):
        self.state = state
        self.d = d
        self.num_heads = num_heads

    def linear(self, x, name):
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, x, name):
        weight = self.state[f"{name}.weight"]
        return F.layer_norm(x, (self.d,), weight, self.state[f"{name}.bias"], eps=1e-12)

    def attention(self, x):
        layer = "decoder_layers.0.attention"
        q, k, v = (
            self.linear(x, f"{layer}.attention.{name}").unflatten(1, (self.num_heads, -1))
            for name in ("query", "key", "value"))                  # (N, H, D / H)
        scores = torch.einsum("nhd, mhd -> hnm", q, k) / (self.d / self.num_heads) ** 0.5
        attended = torch.einsum("hnm, mhd -> nhd", scores.softmax(-1), v)
        return self.linear(attended.flatten(1), f"{layer}.output.dense")

    def mlp(self, x):
        h = self.linear(x, "decoder_layers.0.intermediate.dense")
        gelu = h * (1 + torch.erf(h / 2**0.5)) / 2
        return self.linear(gelu, "decoder_layers.0.output.dense")

    def patches(self, tokens):
        """(N, C) -> (N, 3 P P): pixels of the normalised image, by row, column and colour."""
        embedded = self.linear(tokens, "decoder_embed")
        x = torch.cat([self.state["trainable_cls_token"][0], embedded])         # (1 + N, D)
        x = x + self.state["decoder_pos_embed"][0]
        x = x + self.attention(self.norm(x, "decoder_layers.0.layernorm_before"))
        x = x + self.mlp(self.norm(x, "decoder_layers.0.layernorm_after"))
        return self.linear(self.norm(x, "decoder_norm"), "decoder_pred")[1:]


def test_published_decoder_against_a_plain_forward():
    state = published_decoder(d=16, c=6, tokens=4, patch=8, hidden=40)
    decoder = rae.Decoder(6, 2, 8, hidden_size=16, depth=1, num_heads=2, mlp_hidden=40)
    decoder.load_state_dict(rae.convert_decoder(state))
    z = torch.randn(1, 6, 2, 2)
    std = torch.tensor([0.229, 0.224, 0.225])
    mean = torch.tensor([0.485, 0.456, 0.406])

    patches = PlainDecoder(state, d=16, num_heads=2).patches(z[0].flatten(1).T)
    patches = patches.view(4, 8, 8, 3) * std + mean
    upper = torch.cat([patches[0], patches[1]], 1)                  # (8, 16, 3)
    lower = torch.cat([patches[2], patches[3]], 1)
    image = torch.cat([upper, lower])                               # (16, 16, 3)

    assert relative(decoder(z)[0].permute(1, 2, 0), image) < 1e-5


@pytest.mark.parametrize("grid", (16, 32))
def test_decoder_xl_has_the_published_tensors(grid):
    d = 1152
    expected = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, grid**2 + 1, d),
        "embed.weight": (d, 768),
        "norm.bias": (d,),
        "head.weight": (768, d),
        "blocks.0.attn.qkv.weight": (3 * d, d),
        "blocks.0.mlp.fc1.weight": (4096, d),
        "blocks.27.norm1.weight": (d,),
        "blocks.27.mlp.fc2.weight": (d, 4096),
    }

    with torch.device("meta"):
        decoder = rae.Decoder(768, grid, 16, **rae.DECODERS["XL"])
    shapes = {name: tuple(value.shape) for name, value in decoder.state_dict().items()}

    assert {name: shapes.get(name) for name in expected} == expected
    assert len(shapes) == 2 + 2 * (3 + 28 * 6)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder laid out like the hub, with a decoder of one block in the place of the largest."""
    small = dict(hidden_size=16, depth=1, num_heads=2, mlp_hidden=40)
    monkeypatch.setitem(rae.DECODERS, "XL", small)
    folder = tmp_path / "nyu-visionx" / "RAE-collections"
    decoder = published_decoder(d=16, c=768, tokens=256, patch=16, hidden=40)
    saved({"model": decoder}, folder / "decoders/dinov2/wReg_base/ViTXL_n08/model.pt")
    return folder


STATISTICS = "stats/dinov2/wReg_base/imagenet1k/stat.pt"


@pytest.mark.parametrize("content", (
    {"var": torch.full((768, 16, 16), 0.5)},
    {"var": torch.full((768, 16, 16), 0.5), "mean": None},
), ids=("without a mean", "mean None"))
def test_published_statistics_without_a_mean_have_mean_0(hub, tmp_path, content):
    saved(content, hub / STATISTICS)
    z = torch.randn(1, 768, 16, 16)

    model = rae.published_rae(256, tmp_path)

    assert model.measured
    assert torch.equal(model.decode(z), model.decoder(z * (content["var"] + 1e-5).sqrt()))


def test_published_statistics_may_have_a_mean_and_one_dimension_more(hub, tmp_path):
    mean = torch.randn(1, 768, 16, 16)
    var = torch.rand(1, 768, 16, 16) + 0.5
    saved({"mean": mean, "var": var}, hub / STATISTICS)

    model = rae.published_rae(256, tmp_path)

    assert torch.equal(model.mean, mean[0])
    assert torch.equal(model.var, var[0])


def test_published_statistics_of_another_key_are_refused(hub, tmp_path):
    var = torch.ones(768, 16, 16)
    path = saved({"var": var, "scale": var}, hub / STATISTICS)

    error = error_of(rae.published_rae, 256, tmp_path)

    assert_one_line_with(error, path, "scale")


def test_published_rae_comes_without_its_encoder(hub, tmp_path):
    saved({"var": torch.ones(768, 16, 16)}, hub / STATISTICS)

    model = rae.published_rae(256, tmp_path)

    assert model.encoder is None
    assert model.latent_shape == (768, 16, 16)
    assert model.image_size == 256
    assert not any(weight.requires_grad for weight in model.parameters())


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Every download fails as it does without a network."""
    def download(*_, **__):
        raise ConnectionError
    monkeypatch.setattr(rae, "hf_hub_download", download)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)


@pytest.mark.parametrize("call, arguments, words", (
    (rae.published_rae, [512], ["nyu-visionx/RAE-collections", "_i512/model.pt"]),
    (rae.timm_network, [TINY_VIT], [f"timm/{TINY_VIT}", "model.safetensors"]),
    (rae.fetch, [rae.LPIPS_FILE, rae.LPIPS_URL], ["https://", "vgg.pth", rae.LPIPS_FILE]),
), ids=("RAE", "timm", "LPIPS"))
def test_a_published_file_that_cannot_be_downloaded_is_named(offline, call, arguments, words):
    error = error_of(call, *arguments)

    assert_one_line_with(error, "--weights", *words)


@pytest.mark.parametrize("call, arguments, file", (
    (rae.published_rae, [256], "nyu-visionx/RAE-collections/decoders/dinov2/wReg_base/"
                               "ViTXL_n08/model.pt"),
    (rae.timm_network, [TINY_VIT], f"timm/{TINY_VIT}/model.safetensors"),
    (rae.fetch, [rae.LPIPS_FILE, rae.LPIPS_URL], rae.LPIPS_FILE),
), ids=("RAE", "timm", "LPIPS"))
def test_a_published_file_that_the_folder_lacks_is_named(tmp_path, call, arguments, file):
    error = error_of(call, *arguments, tmp_path)

    assert_one_line_with(error, "--weights", tmp_path / file)


def test_a_resolution_without_published_weights_is_refused():
    error = error_of(rae.published_rae, 64)

    assert_one_line_with(error, 64, "--rae")


# Encoding, statistics and files

@both_encoders
def test_encoder_ends_with_a_norm_over_channels(encoder):
    model = small_rae(encoder)

    raw = model.encoder(torch.rand(5, 3, model.image_size, model.image_size))

    assert raw.mean(1).abs().max() < 1e-5
    assert relative(raw.var(1, unbiased=False), torch.ones(5, 4, 4)) < 1e-3


@both_encoders
def test_latents_are_normalised_and_decoding_takes_that_back(encoder):
    model = small_rae(encoder)
    images = torch.rand(5, 3, model.image_size, model.image_size)
    raw = model.encoder(images)

    z = model.encode(images)

    assert torch.allclose(z * (model.var + 1e-5).sqrt() + model.mean, raw, atol=1e-5)
    assert torch.allclose(model.decode(z), model.decoder(raw), atol=1e-5)


def test_without_statistics_nothing_is_scaled_and_none_are_known():
    known = small_rae()
    model = rae.RAE(known.encoder, known.decoder)
    images = torch.rand(2, 3, 32, 32)
    raw = known.encoder(images)

    z = model.encode(images)

    assert torch.equal(z, raw)
    assert torch.equal(model.decode(z), model.decoder(raw))
    assert known.measured and not model.measured


@pytest.mark.parametrize("size", (1, 7, 20))
def test_measured_statistics_are_those_of_every_entry_over_all_latents(size):
    model = rae.RAE(small_rae().encoder, small_rae().decoder)
    latents = 3 + 0.1 * torch.randn(20, 8, 4, 4)

    model.measure(latents.split(size))

    assert model.measured
    assert torch.allclose(model.mean, latents.mean(0))
    assert torch.allclose(model.var, latents.var(0, unbiased=False))


def test_an_entry_that_never_varies_has_variance_0_and_a_finite_latent():
    model = small_rae()

    model.measure([torch.full((3, 8, 4, 4), 0.1)])

    assert (model.var == 0).all()
    assert model.encode(torch.rand(1, 3, 32, 32)).isfinite().all()


def test_reencoded_latents_are_those_of_the_image_that_is_seen():
    model = small_rae()
    model.decoder.head.weight.data *= 9                             # far beyond [0, 1]
    z = torch.randn(2, 8, 4, 4)
    decoded = model.decode(z)

    reencoded = model.reencode(z)

    assert torch.equal(reencoded, model.encode(decoded.clamp(0, 1)))
    assert relative(reencoded, model.encode(decoded)) > 0.01


@pytest.mark.parametrize("batch_size", (2, 250))
def test_reconstructed_images_are_the_decoded_latents_in_8_bits(batch_size):
    model = small_rae()
    images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    decoded = model.decode(model.encode(images / 255))

    result = model.reconstruct(images, batch_size)

    assert result.dtype == torch.uint8
    assert (result - 255 * decoded.clamp(0, 1)).abs().max() < 0.501


@both_encoders
def test_a_packed_rae_comes_back_from_its_file(encoder, tmp_path):
    model = small_rae(encoder)
    path = saved({"rae": model.packed()}, tmp_path / "x.pt")
    images = torch.rand(2, 3, model.image_size, model.image_size)
    z = model.encode(images)

    again = rae.load_rae(path).fetch_encoder("random")

    assert again.latent_shape == model.latent_shape
    assert again.measured
    assert torch.equal(again.encode(images), z)
    assert torch.equal(again.decode(z), model.decode(z))


@both_encoders
def test_a_file_holds_the_encoder_only_of_the_toy(encoder, tmp_path):
    packed = small_rae(encoder).packed()
    in_file = any(name.startswith("encoder.") for name in packed["state"])

    again = rae.load_rae(saved({"rae": packed}, tmp_path / "x.pt"))

    assert in_file == (encoder == "toy")
    assert (again.encoder is not None) == in_file


def test_a_file_says_whether_its_statistics_were_measured(tmp_path):
    model = rae.RAE(small_rae().encoder, small_rae().decoder)

    again = rae.load_rae(saved({"rae": model.packed()}, tmp_path / "x.pt"))

    assert not again.measured


def test_a_file_without_that_entry_was_measured_where_it_has_a_variance(tmp_path):
    packed = small_rae().packed()
    del packed["measured"]
    with_var = rae.load_rae(saved({"rae": packed}, tmp_path / "x.pt"))
    del packed["state"]["mean"], packed["state"]["var"]

    without = rae.load_rae(saved({"rae": packed}, tmp_path / "y.pt"))

    assert with_var.measured and not without.measured
    assert (without.mean == 0).all()


def test_a_file_without_an_rae_is_refused(tmp_path):
    path = saved({"step": 3}, tmp_path / "y.pt")

    assert_one_line_with(error_of(rae.load_rae, path), path, "RAE")


def test_an_rae_that_is_not_finite_is_refused(tmp_path):
    packed = small_rae().packed()
    packed["state"]["mean"][0, 0, 0] = math.inf
    path = saved({"rae": packed}, tmp_path / "y.pt")

    assert_one_line_with(error_of(rae.load_rae, path), path, "mean")


def test_a_released_toy_without_its_encoder_cannot_encode(tmp_path):
    packed = small_rae().packed()
    for name in [*packed["state"]]:
        if name.startswith("encoder."):
            del packed["state"][name]
    model = rae.load_rae(saved({"rae": packed}, tmp_path / "x.pt"))

    assert_one_line_with(error_of(model.fetch_encoder), "encoder")


# Networks of timm

def test_encoder_against_a_plain_forward_of_timm(tmp_path):
    state = timm.create_model(TINY_VIT).state_dict()
    state["norm.weight"] = torch.rand(64)                           # the encoder's norm has none
    saved(state, tmp_path / "timm" / TINY_VIT / "model.safetensors", save_file)
    images = torch.rand(2, 3, 96, 96)
    encoder = rae.Encoder(TINY_VIT, 64, weights=tmp_path)

    cls, positions = state["pos_embed"].split([1, 100], 1)          # of images of 160 pixels
    positions = positions.transpose(1, 2).unflatten(2, (10, 10))    # (1, 64, 10, 10)
    positions = F.interpolate(positions, (4, 4), mode="bicubic", antialias=True)
    positions = positions.flatten(2).transpose(1, 2)                # (1, 16, 64)
    net = timm.create_model(TINY_VIT, img_size=64).eval()
    net.load_state_dict(state | {"pos_embed": torch.cat([cls, positions], 1)})
    net.norm = torch.nn.LayerNorm(64, eps=1e-6, elementwise_affine=False)
    resized = F.interpolate(2 * images - 1, (64, 64), mode="bicubic")
    without_class_token = net.forward_features(resized)[:, 1:]

    z = encoder(images)

    assert relative(z.flatten(2).transpose(1, 2), without_class_token) < 1e-5


def test_encoder_is_frozen():
    encoder = rae.Encoder(TINY_VIT, 64, weights="random")

    assert not encoder.net.training
    assert not any(weight.requires_grad for weight in encoder.parameters())


def test_dinov2_sees_14_pixels_of_every_16():
    encoder = rae.Encoder(image_size=112, weights="random")

    z = encoder(torch.rand(2, 3, 112, 112))

    assert encoder.input_size == 98
    assert z.shape == (2, 768, 7, 7)


def test_random_weights_are_equal_in_all_processes_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    first = rae.timm_network(TINY_VIT, "random")
    after = torch.get_rng_state()
    torch.manual_seed(1)

    second = rae.timm_network(TINY_VIT, "random")

    assert torch.equal(first.head.weight, second.head.weight)
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", (
    "hf-hub:someone/model", "local-dir:.", "timm/vit_base_patch16_224", f"{TINY_VIT}9", "vit_*", ""
))
def test_timm_network_knows_the_names_of_timm_alone(tmp_path, monkeypatch, name):
    monkeypatch.setattr(timm, "create_model", None)                 # would be the error if called

    error = error_of(rae.timm_network, name, tmp_path)

    assert_one_line_with(error, name, "timm")


class Hostile:
    """Unpickling it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("evidence",)


def test_reading_a_checkpoint_runs_no_code_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = saved({"ema": torch.ones(2), "x": Hostile()}, tmp_path / "x.pt")

    assert_one_line_with(error_of(dit.load_file, path), path)

    assert not Path("evidence").exists()


def test_reading_weights_of_timm_runs_no_code_in_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved([torch.ones(2), Hostile()], tmp_path / "timm" / TINY_VIT / "model.safetensors")

    with pytest.raises(Exception):                                  # noqa: B017 - of safetensors
        rae.timm_network(TINY_VIT, tmp_path)

    assert not Path("evidence").exists()


# Images

@pytest.mark.parametrize("mode, kind", (
    ("L", "png"), ("1", "png"), ("CMYK", "jpg"), ("RGBA", "png"), ("P", "bmp"), ("RGB", "webp"),
    ("RGB", "ppm"), ("RGB", "tiff"), ("LA", "png")
))
def test_read_image_makes_rgb_of_every_mode(tmp_path, mode, kind):
    path = tmp_path / f"x.{kind}"
    Image.new(mode, (50, 33)).save(path)

    image = rae.read_image(path)

    assert image.mode == "RGB"
    assert image.size == (50, 33)


@pytest.mark.parametrize("alpha, expected", (
    (0, [255, 255, 255]), (255, [100, 0, 50]), (51, [224, 204, 214])
))
def test_transparent_pixels_are_seen_on_white(tmp_path, alpha, expected):
    Image.new("RGBA", (4, 3), (100, 0, 50, alpha)).save(tmp_path / "x.png")

    pixels = np.asarray(rae.read_image(tmp_path / "x.png"))

    assert np.array_equal(pixels, np.full((3, 4, 3), expected))


def test_a_transparent_colour_of_a_palette_is_seen_on_white(tmp_path):
    image = Image.new("P", (4, 3))
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.putpixel((1, 2), 1)
    image.save(tmp_path / "x.png", transparency=0)

    pixels = np.asarray(rae.read_image(tmp_path / "x.png"))

    assert (pixels[2, 1] == 9).all()
    assert (pixels == 255).sum() == 11 * 3


def png_of_16_bits(colour_type, channels):
    """The bytes of a PNG of 2 x 2 pixels with 16 bits a channel, which PIL cannot write."""
    def chunk(kind, content):
        checksum = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + checksum

    header = bytes([0, 0, 0, 2, 0, 0, 0, 2, 16, colour_type, 0, 0, 0])
    rows = zlib.compress(bytes(2 * (1 + 2 * 2 * channels)))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows)
            + chunk(b"IEND", b""))


@pytest.mark.parametrize("content", (
    png_of_16_bits(colour_type=0, channels=1),
    png_of_16_bits(colour_type=2, channels=3),
    png_of_16_bits(colour_type=4, channels=2),
    png_of_16_bits(colour_type=6, channels=4),
    b"P6 2 2 65535\n" + bytes(24),
    b"P5 2 2 65535\n" + bytes(8),
    b"P6 2 2 1023\n" + bytes(24),
), ids=("grey", "RGB", "grey with alpha", "RGBA", "PPM", "grey PPM", "PPM of 10 bits"))
def test_pixels_of_more_than_8_bits_are_refused(tmp_path, content):
    path = tmp_path / "x.png"
    path.write_bytes(content)

    with pytest.raises(OSError) as refused:
        rae.read_image(path)

    assert_one_line_with(refused.value, path, "8-bit")


def write_text(path):
    path.write_text("no image")


def write_half(path):
    Image.effect_noise((40, 40), 99).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:700])


def write_eps(path):
    Image.new("RGB", (9, 9)).save(path, "EPS")


def write_huge(path):
    Image.new("1", (20_000, 10_000)).save(path, "PNG")              # PIL fears a bomb


@pytest.mark.parametrize("write", (write_text, write_half, write_eps, write_huge))
def test_an_image_that_cannot_be_read_is_named(tmp_path, monkeypatch, write):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)        # a call would be a TypeError
    path = tmp_path / "x.jpg"
    write(path)

    with pytest.raises(OSError) as refused:
        rae.read_image(path)

    assert_one_line_with(refused.value, path)


def test_of_a_sliver_the_middle_is_read(tmp_path):
    row = np.abs(np.arange(20_000) - 9999.5) < 4                    # eight ones, in the middle
    Image.fromarray(np.uint8(row)[None]).save(tmp_path / "x.png")

    image = rae.read_image(tmp_path / "x.png")

    assert np.array_equal(np.asarray(image), np.ones((1, 8, 3)))


def test_the_orientation_in_exif_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[274] = 6                                                   # "turn by 90 degrees"
    Image.new("RGB", (50, 33)).save(tmp_path / "x.jpg", exif=exif)

    assert rae.read_image(tmp_path / "x.jpg").size == (50, 33)


def test_center_crop_is_that_of_adm():
    pixels = np.random.default_rng(0).integers(0, 255, (300, 129, 3), np.uint8)
    image = Image.fromarray(pixels)
    halved = image.resize((64, 150), Image.Resampling.BOX)
    quartered = halved.resize((32, 75), Image.Resampling.BOX)

    cropped = rae.center_crop(image, 32)

    assert np.array_equal(np.asarray(cropped), np.asarray(quartered)[21:53])


@pytest.mark.parametrize("sides", ((50, 40), (40, 50), (7, 5), (63, 64), (33, 500), (1, 8)))
def test_a_crop_is_square_whatever_the_image(sides):
    assert rae.center_crop(Image.new("RGB", sides), 32).size == (32, 32)


def test_an_image_of_the_right_size_is_not_changed_by_its_crop():
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)

    cropped = rae.center_crop(Image.fromarray(pixels), 32)

    assert np.array_equal(np.asarray(cropped), pixels)


def test_pixels_are_rounded_to_the_nearest_of_256_values():
    images = torch.tensor([-0.2, 0.0, 0.4999 / 255, 0.5001 / 255, 0.5, 254.6 / 255, 1.0, 1.3])

    assert rae.to_uint8(images).tolist() == [0, 0, 0, 1, 128, 255, 255, 255]


# The losses of the decoder

@pytest.fixture(scope="module")
def vgg():
    return rae.timm_network("vgg16.tv_in1k", "random")


@pytest.fixture
def perceptual(vgg, tmp_path, monkeypatch):
    """LPIPS with random heads, from a file, on a VGG of random weights: its own file is large."""
    monkeypatch.setattr(rae, "timm_network", lambda *_: vgg)
    heads = {
        f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1)
        for i, width in enumerate((64, 128, 256, 512, 512))}
    saved(heads, tmp_path / rae.LPIPS_FILE)
    return SimpleNamespace(heads=[*heads.values()], distance=rae.PerceptualDistance(tmp_path))


def vgg_input(images):
    """LPIPS's own two steps: to [-1, 1], and then its constants."""
    shift = torch.tensor([-0.03, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.45]).view(3, 1, 1)
    return (2 * images - 1 - shift) / scale


def unit(features):
    return features / features.square().sum(1, keepdim=True).sqrt().clamp_min(1e-10)


def test_perceptual_distance_is_lpips(perceptual):
    a, b = torch.rand(2, 2, 3, 32, 32)
    x = vgg_input(a)
    y = vgg_input(b)
    expected = 0
    for stage, head in zip(perceptual.distance.stages, perceptual.heads):
        x = stage(x)
        y = stage(y)
        difference = (unit(x) - unit(y)).square()                   # (B, C, h, w)
        expected = expected + (head * difference).sum(1).mean((1, 2))

    distance = perceptual.distance(a, b)

    assert relative(distance, expected) < 1e-5


def test_stages_of_lpips_end_in_the_relu_before_each_pooling(perceptual):
    x = torch.rand(1, 3, 32, 32)
    sizes = []
    for stage in perceptual.distance.stages:
        x = stage(x)
        sizes.append((x.shape[1], x.shape[2]))
        assert isinstance(stage[-1], torch.nn.ReLU)

    assert sizes == [(64, 32), (128, 16), (256, 8), (512, 4), (512, 2)]


def test_perceptual_distance_of_equal_images_is_0(perceptual):
    images = torch.rand(2, 3, 32, 32)

    assert perceptual.distance(images, images).abs().max() == 0


def test_gradient_of_the_perceptual_distance_is_finite_at_black(perceptual):
    black = torch.zeros(1, 3, 32, 32, requires_grad=True)

    distance = perceptual.distance(black, torch.rand(1, 3, 32, 32))

    assert torch.autograd.grad(distance, black)[0].isfinite().all()


def image_of(colour):
    """An image (1, 3, 2, 2) of one colour (3,)."""
    return colour.view(1, 3, 1, 1).expand(1, 3, 2, 2)


def decoder_loss(slope, **options):
    """The loss of a decoder whose only weights w, zeros, are the colour of its image.

    The image should be red. Each loss pulls at one of the three weights, by hand:
    d L1 / dw = (-1/3, 0, 0), since |.| has slope 0 at 0, d GAN / dw = (0, -slope, 0) and, of LPIPS,
    (0, 0, 1). -> (loss without L1, which is 1/3; metrics; gradient).
    """
    w = torch.zeros(3, requires_grad=True)

    def judge(reconstruction):
        return slope * reconstruction[:, 1].flatten(1) + 2          # logits (1, 4)

    loss, metrics = rae.reconstruction_loss(
        image_of(w), image_of(torch.tensor([1.0, 0, 0])), discriminator=judge, last_layer=w,
        **options)
    gradient, = torch.autograd.grad(loss, w)
    return loss.item() - 1 / 3, metrics, gradient.tolist()


def lpips_of_blue(a, b):
    return (a[:, 2] - 3).mean((1, 2)) + 7                           # 4 where a is black


def test_adversarial_loss_pulls_as_hard_as_its_weight_says():
    loss, metrics, gradient = decoder_loss(5, adversarial_weight=0.75)

    assert metrics["gan_weight"].item() == pytest.approx(0.75 / 15, rel=1e-5)
    assert loss == pytest.approx(-2 * 0.75 / 15)
    assert gradient == pytest.approx([-1 / 3, -0.25, 0])            # 0.75 of 1/3


def test_adversarial_loss_is_balanced_against_l1_and_lpips_together():
    length = (4 + 1 / 9) ** 0.5                                     # of (-1/3, 0, 2)

    loss, metrics, gradient = decoder_loss(
        5, adversarial_weight=1.0, perceptual=lpips_of_blue, perceptual_weight=2.0)

    assert metrics["lpips"] == 4
    assert loss == pytest.approx(8 - 2 * length / 5)
    assert gradient == pytest.approx([-1 / 3, -length, 2])


def test_weight_of_the_adversarial_loss_is_bounded():
    loss, metrics, gradient = decoder_loss(0, adversarial_weight=0.5)

    assert metrics["gan_weight"] == pytest.approx(0.5e4)
    assert loss == pytest.approx(-1e4)
    assert gradient == pytest.approx([-1 / 3, 0, 0])


def test_psnr_is_in_decibels_of_the_mean_squared_error():
    _, metrics, _ = decoder_loss(5)

    assert metrics["mse"].item() == pytest.approx(1 / 3)
    assert metrics["psnr"].item() == pytest.approx(10 * math.log10(3))


# The discriminator

@pytest.fixture(scope="module")
def new_adversary():
    return rae.Adversary(32, "random", "cpu")


@pytest.fixture
def adversary(new_adversary):
    return copy.deepcopy(new_adversary)


def bilinear_matrix(size, length):
    """(size, length): resizes a row without antialias, corners not aligned; size <= length."""
    position = (torch.arange(size) + 0.5) * length / size - 0.5
    return (1 - (position[:, None] - torch.arange(length)).abs()).clamp_min(0)


def plain_head(head, x):
    """A head of the discriminator on the tokens (N, D) of one image -> logits (N,)."""
    for (convolution, norm, _), reach in zip(head[:2], (0, 4)):
        shifted = [
            x.roll(reach - i, 0) @ convolution.weight[:, :, i].T for i in range(2 * reach + 1)]
        h = sum(shifted) + convolution.bias                         # circular
        h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-6).sqrt()
        h = h * norm.weight + norm.bias
        h = torch.where(h > 0, h, 0.2 * h)
        x = (x + h) / 2**0.5 if reach else h
    return x @ head[2].weight[0, :, 0] + head[2].bias


def test_discriminator_against_a_plain_forward(adversary):
    """Five heads read blocks 11, 2, 5, 8 and 11, without the class token and the last norm."""
    judge = adversary.discriminator
    for weight in judge.heads.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    images = torch.rand(2, 3, 36, 36)
    matrix = bilinear_matrix(32, 36)

    x = (matrix @ images @ matrix.T - rae.IMAGENET_MEAN) / rae.IMAGENET_STD
    x = judge.net._pos_embed(judge.net.patch_embed(x))
    tokens = []
    for block in judge.net.blocks:
        x = block(x)
        tokens.append(x[:, 1:])                                     # (2, 16, D)
    expected = []
    for i in range(2):
        logits = [
            plain_head(head, tokens[number][i])
            for head, number in zip(judge.heads, (11, 2, 5, 8, 11))]
        expected.append(torch.cat(logits))                          # (80,)

    assert relative(judge(images), torch.stack(expected)) < 1e-4


def test_discriminator_runs_dino_with_the_tanh_form_of_gelu(adversary):
    x = torch.linspace(-3, 3, 101)

    for block in adversary.discriminator.net.blocks:
        assert torch.equal(block.mlp.act(x), F.gelu(x, approximate="tanh"))


def test_only_the_heads_of_the_discriminator_learn(adversary):
    weights = adversary.discriminator.named_parameters()

    learning = {name.split(".")[0] for name, weight in weights if weight.requires_grad}

    assert learning == {"heads"}


@pytest.mark.parametrize("image_size, expected", ((512, 224), (60, 56)))
def test_discriminator_sees_whole_patches_of_8_and_at_most_224_pixels(image_size, expected):
    assert rae.Discriminator(image_size, "random").size == expected


def augmented(images, **changed):
    """Images augmented with the same numbers: 0.5, which changes nothing, but for the given."""
    columns = ("down", "across", "brightness", "saturation", "contrast")
    uniform = torch.tensor([changed.get(name, 0.5) for name in columns])
    return rae.augment(images, uniform.expand(len(images), 5))


def test_numbers_of_one_half_change_no_image():
    images = torch.rand(2, 3, 32, 32)

    assert torch.allclose(augmented(images), images, atol=1e-6)


def test_brightness_is_added():
    images = torch.rand(2, 3, 32, 32)

    assert torch.allclose(augmented(images, brightness=0.0), images - 0.25, atol=1e-6)


def test_without_saturation_an_image_is_grey():
    images = torch.rand(2, 3, 32, 32)
    grey = images.mean(1, keepdim=True).expand_as(images)

    assert torch.allclose(augmented(images, saturation=0.0), grey, atol=1e-6)


def test_contrast_is_about_the_mean_of_an_image():
    images = torch.rand(2, 3, 32, 32)
    mean = images.mean((1, 2, 3), keepdim=True)
    expected = mean + 0.7 * (images - mean)

    assert torch.allclose(augmented(images, contrast=0.2), expected, atol=1e-6)


def test_an_image_moves_by_an_eighth_and_leaves_grey():
    images = torch.rand(2, 3, 32, 32)

    moved = augmented(images, down=0.0, across=0.999)               # 4 lower, 4 to the left

    assert torch.allclose(moved[:, :, 4:, :-4], images[:, :, :-4, 4:], atol=1e-6)
    assert (moved[:, :, :4] == 0.5).all()
    assert (moved[..., -4:] == 0.5).all()


def test_an_image_moves_before_its_colours_change():
    images = torch.rand(2, 3, 32, 32)
    moved = augmented(images, down=0.0, across=0.999)

    darker = augmented(images, down=0.0, across=0.999, brightness=0.0)

    assert torch.allclose(darker, moved - 0.25, atol=1e-6)          # the grey border as well


def test_each_image_is_augmented_by_its_own_numbers():
    images = torch.rand(2, 3, 32, 32)
    uniform = torch.rand(2, 5)

    both = rae.augment(images, uniform)

    assert torch.allclose(both[1:], rae.augment(images[1:], uniform[1:]), atol=1e-6)


def test_discriminator_learns_the_hinge_loss(adversary):
    logits = torch.tensor([[2.0, 0.5], [-3.0, 0.5]], requires_grad=True)    # real, decoded

    def judge(images):
        return logits
    adversary.discriminator = judge
    images = torch.rand(1, 3, 32, 32)

    metrics = adversary.learn(images, images, torch.full((1, 10), 0.5), share=0.5)

    assert metrics["d_loss"] == ((0 + 0.5) / 2 + (0 + 1.5) / 2) / 2
    assert metrics["d_accuracy"] == 0.75
    assert logits.grad.tolist() == [[0, -0.125], [0, 0.125]]


def test_discriminator_sees_decoded_images_in_8_bits_as_real_ones(adversary):
    calls = []

    def judge(images):
        calls.append(images)
        return torch.zeros(2, 5, requires_grad=True)
    adversary.discriminator = judge
    images = torch.rand(1, 3, 32, 32)
    decoded = 3 * torch.rand(1, 3, 32, 32) - 1

    adversary.learn(images, decoded, torch.full((1, 10), 0.5), share=1)

    rounded = (255 * decoded).round().clamp(0, 255) / 255
    assert torch.allclose(calls[0], torch.cat([images, rounded]), atol=1e-6)


def test_real_and_decoded_images_have_augmentations_of_their_own(adversary):
    calls = []

    def judge(images):
        calls.append(images)
        return torch.zeros(4, 5, requires_grad=True)
    adversary.discriminator = judge
    images = torch.randint(256, (2, 3, 32, 32)) / 255
    uniform = torch.rand(2, 10)

    adversary.learn(images, images, uniform, share=1)

    real, decoded = calls[0].chunk(2)
    assert torch.allclose(real, rae.augment(images, uniform[:, :5]), atol=1e-6)
    assert torch.allclose(decoded, rae.augment(images, uniform[:, 5:]), atol=1e-6)


def gradients_of(heads):
    return torch.cat([weight.grad.flatten() for weight in heads.parameters()])


def test_gradients_of_micro_batches_add_up_to_those_of_the_batch(adversary):
    images = torch.rand(4, 3, 32, 32)
    decoded = torch.rand(4, 3, 32, 32)
    uniform = torch.rand(4, 10)
    adversary.learn(images, decoded, uniform, share=1)
    whole = gradients_of(adversary.heads)
    adversary.optimizer.zero_grad()

    for rows in (slice(0, 3), slice(3, 4)):
        share = len(images[rows]) / 4
        adversary.learn(images[rows], decoded[rows], uniform[rows], share)

    assert relative(gradients_of(adversary.heads), whole) < 1e-4


def test_gradient_of_a_judgement_reaches_the_images_alone(adversary):
    images = torch.rand(1, 3, 32, 32, requires_grad=True)

    adversary.judge(images, torch.full((1, 5), 0.5)).sum().backward()

    assert images.grad.any()
    assert all(weight.grad is None for weight in adversary.heads.parameters())
    assert all(weight.requires_grad for weight in adversary.heads.parameters())


class PlainAdam:
    """Adam for one weight, from its definition (arXiv 1412.6980), in float64."""

    def __init__(self, weight):
        self.weight = weight.detach().double()
        self.first = 0
        self.second = 0
        self.steps = 0

    def step(self, gradient, lr):
        gradient = gradient.double()
        self.steps += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.95 * self.second + 0.05 * gradient**2
        mean = self.first / (1 - 0.9**self.steps)
        mean_square = self.second / (1 - 0.95**self.steps)
        self.weight = self.weight - lr * mean / (mean_square.sqrt() + 1e-8)


def test_a_step_of_the_discriminator_is_one_of_adam(adversary):
    weights = [*adversary.heads.parameters()]
    plain = [PlainAdam(weight) for weight in weights]

    for lr in (1e-3, 3e-4):
        for weight, adam in zip(weights, plain):
            weight.grad = torch.randn_like(weight)
            adam.step(weight.grad, lr)
        adversary.step(lr)

    for weight, adam in zip(weights, plain):
        assert torch.allclose(weight.double(), adam.weight, rtol=1e-5, atol=1e-6)


def spectral_norms_of(heads):
    """The spectral norms of the convolutions and their matrices (outputs, the rest)."""
    for module in heads.modules():
        if isinstance(module, torch.nn.Conv1d):
            parametrization = module.parametrizations.weight
            yield parametrization[0], parametrization.original.detach().flatten(1)


def test_a_step_of_the_discriminator_is_one_power_iteration(adversary):
    before = [norm._v.clone() for norm, _ in spectral_norms_of(adversary.heads)]
    for weight in adversary.heads.parameters():
        weight.grad = torch.randn_like(weight)

    adversary.step(1e-3)

    assert len(before) == 15
    for v, (norm, matrix) in zip(before, spectral_norms_of(adversary.heads)):
        u = F.normalize(matrix @ v, dim=0)                          # the matrix after Adam's step
        assert torch.allclose(norm._u, u, atol=1e-5)
        assert torch.allclose(norm._v, F.normalize(matrix.T @ u, dim=0), atol=1e-5)


def test_learning_and_judging_make_no_power_iteration(adversary):
    before = [norm._u.clone() for norm, _ in spectral_norms_of(adversary.heads)]
    images = torch.rand(1, 3, 32, 32)

    adversary.learn(images, images, torch.rand(1, 10), share=1)
    adversary.judge(images, torch.rand(1, 5))

    for u, (norm, _) in zip(before, spectral_norms_of(adversary.heads)):
        assert torch.equal(norm._u, u)


def test_gradients_of_the_discriminator_are_averaged_over_processes(adversary, tmp_path):
    def work(rank):
        sample.start_processes("cpu")
        for i, weight in enumerate(adversary.heads.parameters()):
            weight.grad = torch.full_like(weight, i + 2.0 * rank)
        adversary.average_gradients()
        averages = [float(weight.grad.mean()) for weight in adversary.heads.parameters()]
        print(averages == [i + 1 for i in range(len(averages))])

    status, lines = finish(tmp_path, start(tmp_path, work, world=2))

    assert status == [0, 0], lines
    assert [line for line in lines if line in ("True", "False")] == ["True", "True"]


def test_gradients_of_one_process_are_its_own(adversary):
    for weight in adversary.heads.parameters():
        weight.grad = torch.full_like(weight, 3)

    adversary.average_gradients()

    assert (gradients_of(adversary.heads) == 3).all()


@pytest.mark.parametrize("value, expected", ((0.0, True), (math.nan, False), (math.inf, False)))
def test_a_discriminator_knows_whether_its_gradients_are_finite(adversary, value, expected):
    for weight in adversary.heads.parameters():
        weight.grad = torch.zeros_like(weight)

    weight.grad.flatten()[-1] = value

    assert adversary.finite() == expected


# The command line of rae.py

@pytest.fixture
def rae_command(tmp_path, monkeypatch):
    """rae.py in a folder of two images and a checkpoint."""
    monkeypatch.chdir(tmp_path)
    Path("images/more").mkdir(parents=True)
    Path("empty").mkdir()
    for path in ("images/a.png", "images/more/b.jpg"):
        Image.effect_noise((40, 50), 99).save(path)
    torch.save({"rae": small_rae().packed()}, "x.pt")

    def command(*arguments):
        flags = ("--rae", "x.pt", "--device", "cpu")
        monkeypatch.setattr(sys, "argv", ["rae.py", *arguments, *flags])
        rae.main()
    return command


def test_rae_writes_the_images_beside_their_reconstructions(rae_command, capsys):
    rae_command("images")

    assert "pairs" in capsys.readouterr().out
    for folder, size in (("originals", (32, 32)), ("reconstructions", (32, 32))):
        pictures = sorted(Path("pairs", folder).iterdir())
        assert [path.name for path in pictures] == ["000000.png", "000001.png"]
        assert all(Image.open(path).size == size for path in pictures)
    assert Image.open("pairs/both/000001.png").size == (70, 36)     # a grid has a border


def test_rae_draws_what_the_autoencoder_reconstructs(rae_command):
    rae_command("images/a.png")

    original = np.array(Image.open("pairs/originals/000000.png"))
    image = torch.from_numpy(original).permute(2, 0, 1)[None]
    expected = rae.load_rae("x.pt").reconstruct(image)[0].permute(1, 2, 0)
    drawn = np.asarray(Image.open("pairs/reconstructions/000000.png"))
    assert np.array_equal(drawn, expected.numpy())


@pytest.mark.parametrize("arguments, word", (
    (["empty"], "empty"), (["nowhere"], "nowhere"), (["images", "--out", "images"], "--out")
))
def test_bad_input_of_rae_is_refused_in_one_line(rae_command, arguments, word):
    assert_one_line_with(error_of(rae_command, *arguments), word)


# --------------------------------------------------------------------------------------------------
# The scores: fid.py
#
# What is expected comes from a closed form, from scipy, or from a slow loop over the definition.

def moments_of(rows):
    """Mean and covariance of rows (N, D), by numpy in float64."""
    rows = np.asarray(rows, np.float64)
    return rows.mean(0), np.cov(rows.T)


def test_frechet_distance_is_that_of_scipys_matrix_root():
    rng = np.random.default_rng(0)
    mu1, sigma1 = moments_of(rng.normal(size=(400, 60)) @ rng.normal(size=(60, 60)))
    mu2, sigma2 = moments_of(rng.normal(size=(400, 60)) + 0.3)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)

    distance = fid.frechet_distance(mu1, torch.from_numpy(sigma1), mu2, sigma2)

    assert distance == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_frechet_distance_refuses_a_mean_that_is_not_finite(value):
    with pytest.raises(ValueError):
        fid.frechet_distance(np.full(3, value), np.eye(3), np.zeros(3), np.eye(3))


@pytest.mark.parametrize("dims, n1, n2", ((50, 10, 200), (50, 60, 60), (200, 50, 75),
                                          (200, 175, 1000)))
@pytest.mark.parametrize("decay", (0, -3, -6))
def test_frechet_distance_of_any_rank_is_the_nuclear_norm(dims, n1, n2, decay):
    """With S = X^T X, the trace of the root of S1 S2 is the nuclear norm of X1 X2^T."""
    rng = np.random.default_rng(2)
    left = np.linalg.qr(rng.normal(size=(dims, dims)))[0]
    right = np.linalg.qr(rng.normal(size=(dims, dims)))[0]
    spread = left * np.logspace(0, decay, dims) @ right

    def centred(n):
        x = rng.normal(size=(n, dims)) @ spread
        return (x - x.mean(0)) / (n - 1) ** 0.5

    x = centred(n1)
    y = centred(n2)
    nuclear_norm = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    expected = (x**2).sum() + (y**2).sum() - 2 * nuclear_norm
    full_rank = min(n1, n2) > dims

    distance = fid.frechet_distance(np.zeros(dims), x.T @ x, np.zeros(dims), y.T @ y)

    assert distance == pytest.approx(expected, rel=1e-8 if full_rank else 1e-5)


def test_inception_score_is_that_of_a_loop():
    logits = np.random.default_rng(0).normal(size=(23, 6)) * 2
    scores = []
    for part in (logits[:10], logits[10:20], logits[20:], logits):
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        divergences = [sum(row * np.log(row / p.mean(0))) for row in p]
        scores.append(np.exp(np.mean(divergences)))

    of_splits, of_all = fid.inception_score(torch.from_numpy(logits), split_size=10)

    assert of_splits == pytest.approx(np.mean(scores[:3]), rel=1e-10)
    assert of_all == pytest.approx(scores[3], rel=1e-10)


def share_inside(points, centres):
    """The share of points within a ball around a centre that reaches its third other centre."""
    radii = []
    for centre in centres:
        distances = np.linalg.norm(centres - centre, axis=1)
        radii.append(sorted(distances)[3])                          # the zeroth is the centre's own

    inside = [any(np.linalg.norm(centres - point, axis=1) <= radii) for point in points]
    return np.mean(inside)


def test_precision_and_recall_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(40, 3))
    reference = rng.normal(size=(50, 3)) + 1
    precision = share_inside(samples, reference)
    recall = share_inside(reference, samples)

    found = fid.precision_recall(torch.from_numpy(samples), torch.from_numpy(reference), chunk=7)

    assert found == pytest.approx((precision, recall))
    assert precision != recall
    assert max(precision, recall) < 1


# Means and covariances of features

IDENTITY = fid.Extractor(lambda x: {"pool": x}, "identity", dims=12)


@pytest.mark.parametrize("split", (
    lambda x: [x], lambda x: x.split(7), lambda x: x.flip(0).split(50)
), ids=("whole", "batches of 7", "backwards"))
def test_mean_and_covariance_are_numpys_in_any_batches_and_order(split):
    x = 0.4 + 0.3 * torch.randn(301, 12).abs()                      # like Inception's
    batches = split(x)
    mean, covariance = moments_of(x)

    measured = fid.measure(IDENTITY, batches, "cpu", keep=("pool",))

    np.testing.assert_allclose(measured.moments["pool"][0], mean, rtol=1e-9)
    np.testing.assert_allclose(measured.moments["pool"][1], covariance, rtol=1e-9, atol=1e-12)
    assert torch.equal(measured.features["pool"], torch.cat([*batches]))


def modes():
    """What decides in which precision a product is computed, and whether it keeps a graph."""
    return {
        "autocast": torch.is_autocast_enabled("cpu"),
        "matmul": torch.get_float32_matmul_precision(),
        "TF32 of cuDNN": torch.backends.cudnn.allow_tf32,
        "gradient": torch.is_grad_enabled(),
    }


@pytest.fixture
def training_modes():
    """A caller that trains: products in bf16 or TF32, and a graph."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    with torch.autocast("cpu", torch.bfloat16), torch.backends.cudnn.flags(allow_tf32=True):
        yield
    torch.set_float32_matmul_precision(precision)


def test_features_are_computed_in_full_precision_whatever_the_caller_uses(training_modes):
    calls = []
    matrix = torch.randn(12, 12)

    def extract(x):
        calls.append(modes())
        return {"pool": x @ matrix}
    x = torch.randn(20, 12)
    extractor = fid.Extractor(extract, "product", 12)

    features = fid.measure(extractor, [x], "cpu", keep=("pool",)).features["pool"]

    full = {"autocast": False, "matmul": "highest", "TF32 of cuDNN": False, "gradient": False}
    assert calls == [full]
    assert features.dtype == torch.float32
    assert relative(features, x.double() @ matrix.double()) < 1e-6


def test_measuring_restores_the_precision_and_the_autocast_of_the_caller(training_modes):
    before = modes()

    fid.measure(IDENTITY, [torch.randn(20, 12)], "cpu")

    assert modes() == before
    assert before["autocast"] and before["gradient"] and before["matmul"] == "medium"


def test_an_error_of_the_extractor_restores_the_modes_of_the_caller(training_modes):
    before = modes()

    def extract(x):
        raise FloatingPointError
    with pytest.raises(FloatingPointError):
        fid.measure(fid.Extractor(extract, "broken", 12), [torch.randn(20, 12)], "cpu")

    assert modes() == before


@pytest.mark.parametrize("num", (3, 12))
def test_too_few_images_for_the_covariance_are_refused(num):
    error = error_of(fid.measure, IDENTITY, [torch.randn(num, 12)], "cpu")

    assert_one_line_with(error, num, 12)


def test_features_of_two_processes_are_gathered_in_the_order_of_their_ranks(tmp_path):
    rows = torch.randn(17, 5)

    def work(rank):
        sample.start_processes("cpu")
        share = rows[:11] if rank == 0 else rows[11:]
        print(torch.equal(fid.gather_rows(share), rows))

    status, lines = finish(tmp_path, start(tmp_path, work, world=2))

    assert status == [0, 0], lines
    assert [line for line in lines if line in ("True", "False")] == ["True", "True"]


# Inception

@pytest.mark.parametrize("height, width, size", ((5, 9, 13), (13, 8, 5), (7, 7, 7)))
def test_resize_is_tensorflow_1s(height, width, size):
    """Pixel i is the linear interpolation at i * length / size, at most the last pixel."""
    def matrix(length):
        position = np.minimum(np.arange(size) * length / size, length - 1)
        distance = abs(position[:, None] - np.arange(length))
        return np.maximum(0, 1 - distance)                          # (size, length)

    image = np.random.default_rng(0).uniform(0, 255, (height, width))
    expected = matrix(height) @ image @ matrix(width).T

    resized = fid.resize_tensorflow1(torch.from_numpy(image)[None, None], size)

    np.testing.assert_allclose(resized[0, 0].numpy(), expected, rtol=1e-4)


@pytest.fixture(scope="module")
def inception():
    """Inception of random weights, its features of two images, and what some layers were given."""
    network = fid.Inception()
    generator = torch.Generator().manual_seed(0)
    for weight in network.state_dict().values():
        if weight.dim() == 4:                       # with torch's default, 90 layers fade to 0
            fan_in = weight[0].numel()
            weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator)

    inputs = {}

    def note(name):
        def hook(_, arguments, output):
            inputs[name] = arguments[0]
        return hook

    # The first branch of a block is given the input of its block, the last what was pooled.
    for block in ("Mixed_5b", "Mixed_6e", "Mixed_7c"):
        for branch in ("branch1x1", "branch_pool"):
            name = f"{block}.{branch}"
            network.get_submodule(name).register_forward_hook(note(name))
    images = torch.randint(256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return SimpleNamespace(network=network, features=network(images), inputs=inputs)


def test_inception_has_the_published_tensors(inception):
    state = inception.network.state_dict()

    assert len(state) == 566
    assert sum(value.numel() for value in state.values()) == 23885486       # of INCEPTION_FILE


def test_inceptions_features_are_finite_and_vary(inception):
    shapes = {part: tuple(rows.shape) for part, rows in inception.features.items()}

    assert shapes == {"pool": (2, 2048), "spatial": (2, 2023), "logits": (2, 1008)}
    for rows in inception.features.values():
        assert rows.dtype == torch.float32
        assert rows.isfinite().all()
        assert rows.std() > 0


def test_spatial_features_are_seven_channels_of_mixed_6d(inception):
    spatial = inception.features["spatial"].view(2, 17, 17, 7)
    mixed_6d = inception.inputs["Mixed_6e.branch1x1"]               # (2, 768, 17, 17)

    assert torch.equal(spatial[:, 3, 5], mixed_6d[:, :7, 3, 5])


def test_logits_of_inception_have_no_bias(inception):
    expected = inception.features["pool"] @ inception.network.fc.weight.T

    torch.testing.assert_close(inception.features["logits"], expected)


def test_average_pooling_of_inception_does_not_count_the_padding(inception):
    pooled = inception.inputs["Mixed_5b.branch_pool"][..., 0, 0]    # in the corner
    corner = inception.inputs["Mixed_5b.branch1x1"][..., :2, :2]    # four neighbours, not nine

    torch.testing.assert_close(pooled, corner.mean((2, 3)))


def test_the_last_block_of_inception_takes_the_maximum(inception):
    pooled = inception.inputs["Mixed_7c.branch_pool"][..., 0, 0]
    corner = inception.inputs["Mixed_7c.branch1x1"][..., :2, :2]

    assert torch.equal(pooled, corner.amax((2, 3)))


@pytest.mark.parametrize("images", (
    torch.rand(2, 3, 32, 32), torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
), ids=("float", "colours last"))
def test_inception_refuses_images_of_another_type_or_layout(inception, images):
    with pytest.raises(ValueError):
        inception.network(images)


def test_inception_comes_from_its_file_or_from_a_folder_that_holds_it(inception, tmp_path):
    path = saved(inception.network.state_dict(), tmp_path / fid.INCEPTION_FILE)

    of_file = fid.make_extractor(weights=path).name
    of_folder = fid.make_extractor(weights=str(tmp_path)).name

    assert of_file == of_folder == f"inception-{fid.fingerprint(inception.network)}"


def test_fingerprint_tells_weights_from_others():
    network = torch.nn.Linear(3, 3)
    other = copy.deepcopy(network)
    before = fid.fingerprint(network)
    other.bias.data[2] += 1e-6

    assert fid.fingerprint(network) == before
    assert fid.fingerprint(other) != before


# Other features

@pytest.fixture
def small_dino(monkeypatch):
    monkeypatch.setattr(fid, "DINO", TINY_VIT)
    return fid.make_extractor("dino", "random")


def test_features_of_dino_are_those_of_images_that_pil_resizes(small_dino):
    images = np.random.default_rng(0).integers(0, 256, (3, 300, 260, 3), dtype=np.uint8)
    resized = []
    for image in images:
        picture = Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)
        resized.append(torch.from_numpy(np.array(picture)))
    network = rae.timm_network(TINY_VIT, "random", img_size=224)
    network.reset_classifier(0)
    x = torch.stack(resized).permute(0, 3, 1, 2)                    # (3, 3, 224, 224)
    expected = network((x / 255 - 0.5) / 0.5)

    features = small_dino.extract(torch.from_numpy(images).permute(0, 3, 1, 2))["pool"]

    torch.testing.assert_close(features, expected, rtol=1e-2, atol=1e-2)
    assert small_dino.dims == expected.shape[1]


def test_name_of_dino_has_a_hash_of_its_weights(small_dino):
    network = rae.timm_network(TINY_VIT, "random", img_size=224)

    assert small_dino.name == f"dino-{fid.fingerprint(network)}"


def test_features_of_an_rae_are_means_of_latents_before_normalisation(tmp_path):
    model = small_rae()
    path = saved({"rae": model.packed()}, tmp_path / "x.pt")
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    expected = model.encoder(images / 255).mean((2, 3))

    extractor = fid.make_extractor("rae", path)

    assert torch.allclose(extractor.extract(images)["pool"], expected)
    assert extractor.dims == 8
    assert extractor.name == f"rae-{fid.fingerprint(model.encoder)}"


def test_features_of_an_rae_need_its_file():
    assert_one_line_with(error_of(fid.make_extractor, "rae"), "--weights")


# Files of images and of statistics

RECORDED = {  # by ADM's names
    "mu": np.zeros(3),
    "sigma": np.eye(3),
    "mu_s": np.ones(3),
    "sigma_s": 2 * np.eye(3),
}


def mean_colours_of(images):
    """An extractor's features: three dimensions, so that few images are enough."""
    mean = images.float().mean((2, 3))                              # (B, 3)
    return {"pool": mean, "spatial": 2 * mean, "logits": mean / 50}


def write_folder(images):
    """Images in subfolders, one of them a link, of two formats, and files that are none."""
    for folder in ("folder/png", "folder/bmp", "elsewhere"):
        Path(folder).mkdir(parents=True)
    Path("folder/link").symlink_to(Path("elsewhere").resolve())

    places = ("folder/png/{}.png", "folder/bmp/{}.bmp", "folder/link/{}.png")
    for i, image in enumerate(images):
        Image.fromarray(image).save(places[i % 3].format(i))
    Path("folder/labels.txt").write_text("no image")


@pytest.fixture
def fid_files(tmp_path, monkeypatch):
    """A current folder with inputs of all kinds -> its images (25, 8, 8, 3)."""
    extractor = fid.Extractor(mean_colours_of, "inception-test", 3, 3)
    monkeypatch.setattr(fid, "make_extractor", lambda *_: extractor)
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (25, 8, 8, 3), dtype=np.uint8)
    write_folder(images)
    Path("empty").mkdir()

    np.savez("images.npz", arr_0=images)
    np.savez_compressed("half.npz", arr_0=images // 2)
    np.savez("few.npz", arr_0=images[:3])
    np.savez("float.npz", arr_0=images / 255)
    np.savez("none.npz", arr_0=images[:0])
    np.savez("grey.npz", arr_0=images[..., :1])
    np.savez("large.npz", arr_0=images.repeat(2, axis=1))
    np.savez("recorded.npz", **RECORDED)
    np.savez("adm.npz", arr_0=images // 2, **RECORDED)
    np.savez("another.npz", extractor="another-12345678", **RECORDED)
    np.savez("wide.npz", mu=np.zeros(5), sigma=np.eye(5))
    return images


@pytest.fixture
def colours(fid_files):
    """Features of the images of images.npz and of those of half.npz, in float64."""
    return SimpleNamespace(
        images=fid_files.mean((1, 2), dtype=np.float32).astype(np.float64),
        half=(fid_files // 2).mean((1, 2), dtype=np.float32).astype(np.float64))


def scores_by_definition(samples, reference):
    """The scores of features (N, 3) against reference ones, both known image by image."""
    distance = fid.frechet_distance(*moments_of(samples), *moments_of(reference))
    of_splits, of_all = fid.inception_score(torch.from_numpy(samples) / 50)
    precision, recall = fid.precision_recall(
        torch.from_numpy(samples), torch.from_numpy(reference))
    return {
        "extractor": "inception-test",
        "fid": distance,
        "sfid": 4 * distance,                                       # of features twice as long
        "inception_score": of_splits,
        "inception_score_all": of_all,
        "precision": precision,
        "recall": recall,
    }


def scores_against_recorded(samples, reference):
    """The same where the moments of the reference were recorded."""
    mu, sigma = moments_of(samples)
    scores = scores_by_definition(samples, reference)
    scores["fid"] = fid.frechet_distance(mu, sigma, RECORDED["mu"], RECORDED["sigma"])
    scores["sfid"] = fid.frechet_distance(
        2 * mu, 4 * sigma, RECORDED["mu_s"], RECORDED["sigma_s"])
    return scores


def assert_equal_scores(found, expected):
    """To the rounding of sums in another order."""
    assert found["extractor"] == expected["extractor"]
    assert found.keys() == expected.keys()
    for name in found.keys() - {"extractor"}:
        assert found[name] == pytest.approx(expected[name], rel=1e-9), name


def without_manifold(scores):
    """Precision and recall need the images of both sides."""
    return {name: scores[name] for name in scores if name not in ("precision", "recall")}


both_samples = pytest.mark.parametrize("samples", ("images.npz", "folder"))


@both_samples
def test_scores_of_images_are_those_of_the_definitions(colours, samples):
    expected = scores_by_definition(colours.images, colours.half)

    assert fid.Scorer("half.npz")(samples) == pytest.approx(expected)


@both_samples
def test_scores_against_statistics_are_those_against_their_images(colours, samples):
    fid.main(["stats", "half.npz", "--out", "made.npz", "--device", "cpu"])
    expected = without_manifold(scores_by_definition(colours.images, colours.half))

    assert fid.Scorer("made.npz")(samples) == pytest.approx(expected)


@both_samples
def test_scores_against_a_file_of_adm_are_those_of_its_recorded_moments(colours, samples):
    expected = without_manifold(scores_against_recorded(colours.images, colours.half))

    assert fid.Scorer("recorded.npz")(samples) == pytest.approx(expected)


@both_samples
def test_recorded_moments_come_before_measured_ones(colours, samples):
    expected = scores_against_recorded(colours.images, colours.half)

    assert fid.Scorer("adm.npz")(samples) == pytest.approx(expected)


def test_scores_of_two_files_of_statistics_are_distances_alone(fid_files):
    found = fid.Scorer("recorded.npz")("recorded.npz")

    assert found == pytest.approx({"extractor": "inception-test", "fid": 0, "sfid": 0}, abs=1e-9)


@pytest.mark.parametrize("reference", ("half.npz", "recorded.npz", "adm.npz", "folder"))
def test_the_table_has_a_line_a_score(fid_files, capsys, reference):
    expected = fid.Scorer(reference)("images.npz")

    fid.main(["images.npz", reference, "--device", "cpu"])

    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [[k, str(v)] for k, v in expected.items()]


def test_json_has_the_same_scores_in_a_line(fid_files, capsys):
    expected = fid.Scorer("half.npz")("images.npz")

    fid.main(["images.npz", "half.npz", "--json", "--device", "cpu"])

    assert json.loads(capsys.readouterr().out) == expected


def test_statistics_say_of_which_network_and_of_which_size_they_are(fid_files, capsys):
    fid.main(["stats", "large.npz", "--out", "made.npz", "--device", "cpu"])

    assert "inception-test" in capsys.readouterr().err
    with np.load("made.npz") as made:
        assert str(made["extractor"]) == "inception-test"
        assert str(made["image_size"]) == "(16, 8)"


def test_images_of_other_sizes_than_the_references_are_named_and_scored(fid_files, capsys):
    fid.main(["stats", "large.npz", "--out", "made.npz", "--device", "cpu"])
    capsys.readouterr()

    scores = fid.Scorer("made.npz")("images.npz")

    said = capsys.readouterr().err
    assert "(8, 8)" in said and "(16, 8)" in said
    assert scores["fid"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", (".hidden.png", ".thumbnails/x.png", "png/._1.png"))
def test_hidden_files_of_a_folder_are_left_out(fid_files, name):
    before = fid.Scorer("half.npz")("folder")
    Path("folder", name).parent.mkdir(exist_ok=True)
    Path("folder", name).write_bytes(b"no image")

    assert fid.Scorer("half.npz")("folder") == before


def test_a_folder_may_have_any_name(fid_files):
    expected = fid.Scorer("half.npz")("folder")
    Path("folder").rename("a [1]*?")

    assert fid.Scorer("half.npz")("a [1]*?") == expected


@pytest.mark.parametrize("arguments, words", (
    ("missing images.npz", ["missing"]),
    ("empty images.npz", ["empty"]),
    ("float.npz images.npz", ["float.npz", "float64"]),
    ("none.npz images.npz", ["none.npz", "(0, 8, 8, 3)"]),
    ("grey.npz images.npz", ["grey.npz", "(25, 8, 8, 1)"]),
    ("few.npz images.npz", ["3 images"]),
    ("images.npz few.npz", ["3 images"]),
    ("images.npz another.npz", ["another.npz", "inception-test"]),
    ("images.npz wide.npz", ["wide.npz", "5", "inception-test"]),
    ("stats images.npz", ["--out"]),
    ("stats images.npz --out images.npz", ["--out", "images.npz"]),
    ("stats images.npz --out made.txt", ["--out", "made.txt"]),
))
def test_bad_input_of_fid_is_refused_in_one_line_and_stays_as_it_was(fid_files, arguments, words):
    before = Path("images.npz").read_bytes()

    error = error_of(fid.main, [*arguments.split(), "--device", "cpu"])

    assert_one_line_with(error, *words)
    assert Path("images.npz").read_bytes() == before
    assert not Path("made.txt").exists()


def score_on_cpu(samples, reference="images.npz"):
    fid.main([samples, reference, "--device", "cpu"])


def test_images_of_two_sizes_in_a_folder_are_refused(fid_files):
    Image.new("RGB", (9, 7)).save("folder/png/wide.png")

    error = error_of(score_on_cpu, "folder")

    assert_one_line_with(error, "wide.png", "9 x 7", "8 x 8")


def test_an_unreadable_image_of_a_folder_is_named(fid_files):
    Path("folder/png/text.png").write_text("no image")

    assert_one_line_with(error_of(score_on_cpu, "folder"), "text.png")


@pytest.mark.parametrize("part", (0.5, 0.98))
def test_an_npz_that_is_cut_short_is_refused(fid_files, part):
    content = Path("half.npz").read_bytes()
    Path("half.npz").write_bytes(content[:int(part * len(content))])

    assert_one_line_with(error_of(score_on_cpu, "half.npz"), "half.npz")


@pytest.mark.parametrize("name", ("images.npz", "half.npz"))
def test_an_npz_with_a_wrong_byte_is_refused(fid_files, name):
    content = bytearray(Path(name).read_bytes())
    content[len(content) // 2] ^= 255                               # stored, and compressed
    Path("damaged.npz").write_bytes(content)

    assert_one_line_with(error_of(score_on_cpu, "damaged.npz"), "damaged.npz")


@pytest.mark.parametrize("change", (-1, 1))
def test_an_npz_of_fewer_or_more_bytes_than_its_header_says_is_refused(fid_files, change):
    with zipfile.ZipFile("images.npz") as archive:
        content = archive.read("arr_0.npy")
    content = content[:-1] if change < 0 else content + b"\0"
    with zipfile.ZipFile("wrong.npz", "w") as archive:
        archive.writestr("arr_0.npy", content)

    assert_one_line_with(error_of(score_on_cpu, "wrong.npz"), "wrong.npz", "(25, 8, 8, 3)")


def in_two_processes(work):
    """work(rank) in two processes -> the lines of JSON that each of them printed."""
    status, lines = finish(Path(), start(Path(), work, world=2))
    assert status == [0, 0], lines
    printed = [Path(f"rank{rank}.txt").read_text().splitlines() for rank in range(2)]
    return [[json.loads(line) for line in lines if line.startswith("{")] for lines in printed]


@pytest.mark.parametrize("samples", ("half.npz", "folder"))
def test_scores_of_two_processes_are_those_of_one(fid_files, samples):
    expected = fid.Scorer("images.npz")(samples)

    def work(rank):
        fid.main([samples, "images.npz", "--json", "--device", "cpu"])

    first, second = in_two_processes(work)

    assert_equal_scores(*first, expected)
    assert second == []
    assert len(expected) == 7


def test_scores_of_batches_of_two_processes_are_those_of_one(fid_files):
    images = torch.from_numpy(fid_files // 2).permute(0, 3, 1, 2)
    shares = images.split([11, 14])

    def work(rank):
        place = sample.start_processes("cpu")
        scorer = fid.Scorer("images.npz", place=place)
        print(json.dumps(scorer(shares[rank].split(4))))

    first, second = in_two_processes(work)

    expected = fid.Scorer("images.npz")("half.npz")
    assert_equal_scores(*first, expected)
    assert second == [{}]


def test_statistics_of_two_processes_are_those_of_one(fid_files):
    def work(rank):
        fid.main(["stats", "images.npz", "--out", "made.npz", "--device", "cpu"])

    in_two_processes(work)

    expected = fid.Scorer("images.npz")("half.npz")
    found = fid.Scorer("made.npz")("half.npz")
    assert_equal_scores(found, without_manifold(expected))


# The report of the toy

def coloured(labels):
    """Images uint8 (N, 3, 4, 4) whose red says their class, with noise in green and blue."""
    images = torch.randint(256, (len(labels), 3, 4, 4), dtype=torch.uint8)
    images[:, 0] = 20 * labels.view(-1, 1, 1)
    return images


class ByRed(torch.nn.Module):
    """The last layer of a classifier: the class with the nearest red wins."""

    def forward(self, hidden):
        red = 255 / 20 * hidden[:, :1]                              # (B, 1)
        return -(red - torch.arange(10)).square()                   # (B, 10)


@pytest.fixture
def reporting(tmp_path, monkeypatch):
    """report() on networks that draw the colour of their label, judged by a perfect classifier.

    calls: what it draws and shows. Five classes of ten are held out, in unequal shares.
    """
    shares = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1])
    classes = torch.tensor([2, 3, 5, 7, 8])
    targets = classes[shares.multinomial(400, replacement=True)]
    held_out = SimpleNamespace(images=coloured(targets), targets=targets)
    everything = torch.arange(600) % 10
    data = SimpleNamespace(images=coloured(everything), targets=everything, classes="abcdefghij")
    calls = SimpleNamespace(labels=[], steps=[], grids=[])

    def make_images(network, autoencoder, alpha, labels, steps, **options):
        calls.labels.append(labels)
        calls.steps.append(steps)
        yield range(len(labels)), coloured(labels)

    def load_all(path, device):
        network = SimpleNamespace(average_velocity=path.stem != "flow")
        autoencoder = SimpleNamespace(
            encoder=torch.nn.Identity(), latent_shape=(3, 1, 1), reconstruct=lambda images: images)
        return network, autoencoder, 2.5, "abcdefghij"

    def draw_grid(images, columns, titles):
        calls.grids.append((images, columns, titles))
        return sample.draw_grid(images, columns, titles)

    pool = torch.nn.AdaptiveAvgPool2d(1)
    classifier = torch.nn.Sequential(pool, torch.nn.Flatten(), ByRed())
    monkeypatch.setattr(fid, "train_classifier", lambda *_: classifier)
    monkeypatch.setattr(fid, "load_all", load_all)
    monkeypatch.setattr(fid, "make_images", make_images)
    monkeypatch.setattr(fid, "draw_grid", draw_grid)

    def run(*names, num=300, **options):
        out = tmp_path / "out"
        paths = [out / f"{name}.pt" for name in names]
        fid.report(paths, data, held_out, out, "cpu", num, "fp32", **options)
        return json.loads((out / "report.json").read_text())
    return SimpleNamespace(run=run, calls=calls, held_out=held_out, data=data, out=tmp_path / "out")


def test_labels_of_the_report_have_the_shares_of_the_held_out_classes(reporting):
    reporting.run("flow")

    labels = reporting.calls.labels[0]
    held_out = reporting.held_out.targets
    assert len(labels) == 300
    for label in range(10):
        share = (held_out == label).sum() * 300 / 400
        assert (labels == label).sum() == pytest.approx(share, abs=1)


def test_every_row_of_the_report_compares_images_with_their_own_labels(reporting):
    rows = reporting.run("flow", "mid")

    assert {row["accuracy"] for row in rows} == {1}


def test_report_has_a_row_for_every_number_of_steps(reporting):
    rows = reporting.run("flow", "mid", "other/drift")

    students = [(name, steps) for name in ("mid", "other/drift") for steps in (1, 2, 4)]
    assert [(row["name"], row["steps"]) for row in rows] == [
        ("held-out pictures", None), ("reconstructions", None),
        ("flow", 25), ("flow", 4), ("flow", 1), *students]
    assert reporting.calls.steps == [row["steps"] for row in rows[2:]]


def test_distances_of_the_report_are_0_of_the_held_out_images_alone(reporting):
    first, _, *rows = reporting.run("flow")

    assert first["fd_encoder"] == pytest.approx(0, abs=1e-9)
    assert first["precision"] == first["recall"] == 1
    assert min(row["fd_encoder"] for row in rows) > 1e-9


def test_comparison_shows_an_image_of_each_held_out_class_a_column(reporting):
    reporting.run("flow", "mid")

    (images, columns, titles), = reporting.calls.grids
    assert columns == 5
    assert len(titles) == 2 + 2 + 1                                 # 25 steps and 1, and 1
    labels = images[:, 0, 0, 0] // 20
    assert labels.view(len(titles), columns).tolist() == len(titles) * [[2, 3, 5, 7, 8]]


def test_report_writes_pictures(reporting):
    reporting.run("flow", "mid")

    assert Image.open(reporting.out / "report.png").size == (800, 400)
    assert Image.open(reporting.out / "comparison.png").size[0] > 5 * 64


def test_a_stopped_report_writes_nothing(reporting):
    with pytest.raises(FileNotFoundError):                          # of the file that run() reads
        reporting.run("flow", stopped=lambda: True)

    assert not reporting.out.exists()
    assert reporting.calls.labels == []


def test_report_refuses_a_checkpoint_of_other_classes(reporting):
    reporting.data.classes = "abc"

    assert_one_line_with(error_of(reporting.run, "flow"), "flow.pt", "classes")


def chart_of(*distances):
    """The chart of a teacher, and of a student if there are four distances or more."""
    titles = ("teacher", "teacher", "student", "student")
    rows = [
        {"title": title, "steps": steps, "fd_encoder": distance}
        for title, steps, distance in zip(titles, (1, 25, 1, 4), distances)]
    return fid.draw_chart(rows)


def test_the_chart_is_a_picture_with_a_curve_a_network():
    def num_colours(picture):
        hues = np.asarray(picture.convert("HSV"))
        strong = hues[hues[..., 1] > 150][:, 0]
        return len(np.unique(strong // 16))

    one = chart_of(9, 3)
    both = chart_of(9, 3, 5, 2)

    assert one.size == both.size == (800, 400)
    assert num_colours(both) > num_colours(one) > 0


def test_a_classifier_learns_its_classes():
    labels = torch.arange(500) % 10
    images = coloured(labels)

    classifier = fid.train_classifier(images, labels, 10, "cpu", steps=100)

    assert not classifier.training
    accuracy = (classifier(images / 255).argmax(1) == labels).float().mean()
    assert accuracy > 0.9


# --------------------------------------------------------------------------------------------------
# sample.py: from a checkpoint to images

CLASSES = tuple("abcdefghij")


def small_checkpoint(average_velocity=True, **changes):
    """The content of a file that train.py might have written, of small networks."""
    torch.manual_seed(0)
    network = small_dit(average_velocity)
    state = network.state_dict()
    content = dict(stage="mid", step=4, classes=CLASSES, alpha=2.5, model=state, ema=state,
                   network=network.config, rae=small_rae().packed())
    return content | changes


@pytest.fixture
def sample_run(tmp_path, monkeypatch):
    """A function that runs sample.py in a folder of checkpoints. It returns the number of
    evaluations of the network, where a batch counts as many as it has images."""
    monkeypatch.chdir(tmp_path)
    torch.save(small_checkpoint(), "student.pt")
    torch.save(small_checkpoint(average_velocity=False), "teacher.pt")
    evaluations = []
    forward = dit.DiTDH.forward

    def count(network, z, *inputs):
        evaluations.append(len(z))
        return forward(network, z, *inputs)
    monkeypatch.setattr(dit.DiTDH, "forward", count)

    def run_sample(arguments):
        evaluations.clear()
        argv = ["sample.py", "--device", "cpu", "--batch_size", "2", *arguments.split()]
        monkeypatch.setattr(sys, "argv", argv)
        sample.main()
        return sum(evaluations)
    return run_sample


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def files_of(folder):
    """{name: content} of a folder's files."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def images_of(*arguments, **options):
    """All images of make_images in one tensor."""
    return torch.cat([images for _, images in sample.make_images(*arguments, **options)])


# Noise and images

def test_noise_is_a_function_of_seed_and_number():
    noise = sample.noise_of(3, range(9), (4, 2, 2))

    assert torch.equal(noise[7:], sample.noise_of(3, [7, 8], (4, 2, 2)))


def test_noise_of_every_seed_and_number_is_another():
    noise = torch.stack([sample.noise_of(seed, range(12), (4, 2, 2)) for seed in range(2)])

    assert len(noise.unique()) == noise.numel()
    assert abs(noise.mean()) < 0.2
    assert noise.std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("batch_size, numbers", (
    (9, range(9)), (2, range(9)), (1, range(9)), (2, [5, 2, 8])))
def test_an_image_of_one_step_is_noise_minus_average_velocity_in_batches_of_any_size(
        batch_size, numbers):
    network = small_dit(True).eval()
    autoencoder = small_rae()
    noise = sample.noise_of(3, range(9), (8, 4, 4))
    labels = torch.arange(9) % 4
    with torch.no_grad():
        u = network(noise, torch.ones(9), labels, torch.zeros(9))
        expected = autoencoder.decode(noise - u).clamp(0, 1) * 255

    batches = [*sample.make_images(network, autoencoder, 2.5, labels, seed=3,
                                   batch_size=batch_size, numbers=numbers)]

    images = torch.cat([images for _, images in batches])
    assert [i for batch, _ in batches for i in batch] == [*numbers]
    assert images.dtype == torch.uint8
    assert (images - expected[[*numbers]]).abs().max() <= 1
    assert (expected[0] - expected[4]).abs().max() > 5          # more than the tolerance


def test_images_do_not_depend_on_the_autocast_of_the_caller():
    """Scores during training must be those of sample.py, whatever the training computes in."""
    arguments = (small_dit(True), small_rae(), 2.5, torch.arange(4))
    expected = images_of(*arguments)

    with torch.autocast("cpu", torch.bfloat16):
        in_autocast = images_of(*arguments)

    assert torch.equal(in_autocast, expected)
    assert not torch.equal(images_of(*arguments, precision="bf16"), expected)


@pytest.mark.parametrize("precision, dtype", (("fp32", torch.float32), ("bf16", torch.bfloat16)))
@pytest.mark.parametrize("callers", (False, True))
def test_computing_overrules_autocast_and_gradients_and_restores_them(precision, dtype, callers):
    weight = torch.ones(2, 2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=callers):
        with sample.computing(precision, "cpu"):
            inside = weight @ weight
        outside = weight @ weight

    assert inside.dtype == dtype
    assert not inside.requires_grad
    assert outside.dtype == (torch.bfloat16 if callers else torch.float32)
    assert outside.requires_grad


def test_computing_has_full_float32_products_and_restores_the_callers_also_after_an_error(
        monkeypatch):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(ZeroDivisionError), sample.computing("fp32", "cpu"):
            inside = torch.get_float32_matmul_precision()
            raise ZeroDivisionError
        outside = torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)

    assert inside == "highest"
    assert outside == "medium"


def test_the_code_that_receives_images_runs_outside_of_the_context_of_sampling():
    weight = torch.ones(2, 2, requires_grad=True)
    for _ in sample.make_images(small_dit(True), small_rae(), 2.5, torch.arange(3), batch_size=1,
                                precision="bf16"):
        product = weight @ weight

        assert product.requires_grad
        assert product.dtype == torch.float32


@pytest.mark.parametrize("arguments, steps", (
    ("student.pt", 1), ("student.pt --steps 4", 4),
    ("teacher.pt", 50), ("teacher.pt --steps 3", 3)))
def test_steps_are_evaluations_of_the_network(arguments, steps, sample_run):
    evaluations = sample_run(f"--num 3 --ckpt {arguments}")

    assert evaluations == 3 * steps


def test_results_of_threads_come_in_order_and_few_wait():
    begun = []

    def slow(item):
        begun.append(item)
        time.sleep(0.002 * (5 - item % 5))      # later items are faster
        return 10 * item

    for i, result in enumerate(sample.run_ahead(slow, range(20), threads=3)):
        assert result == 10 * i
        assert len(begun) <= i + 4              # the one that is returned, and three ahead


def test_an_error_in_a_thread_is_raised_where_its_result_is_taken():
    results = sample.run_ahead(lambda divisor: 6 // divisor, [3, 2, 0, 1], threads=2)

    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)


# Classes

def test_imagenets_classes_have_1000_names():
    names = sample.class_names()

    assert len(set(names)) == 1000
    assert names[0] == "tench, Tinca tinca"


def test_folders_of_imagenet_have_names_and_other_folders_keep_theirs():
    names = sample.class_names(["n01440764", "cats"])

    assert names == ("tench, Tinca tinca", "cats")


def test_every_full_name_of_imagenet_is_its_own_class():
    names = sample.class_names()

    assert [sample.parse_classes(name, names) for name in names] == [[i] for i in range(1000)]


@pytest.mark.parametrize("text, classes", (
    ("Golden Retriever, 0,tench", [207, 0, 0]),
    (" tench, Tinca tinca ", [0]),
    ("missile", [657]),                         # its full name; 744 is "projectile, missile"
    ("crane", [134]), ("crane (machine)", [517]), ("999", [999])))
def test_classes_are_named_by_full_names_synonyms_and_numbers(text, classes):
    assert sample.parse_classes(text, sample.class_names()) == classes


@pytest.mark.parametrize("text", ("golden retreiver", "1000", "-1", "tench,", "", "tench,,0"))
def test_a_word_for_no_class_is_refused(text):
    wrong_word = text.split(",")[0 if "," not in text else 1]

    error = error_of(sample.parse_classes, text, sample.class_names())

    assert "--classes" in error.code
    assert repr(wrong_word) in error.code


@pytest.mark.parametrize("word, numbers", (
    ("panther", (286, 290)), ("horn", (513, 566)), ("tub", (435, 876))))
def test_a_synonym_that_classes_share_is_refused_with_their_list(word, numbers):
    names = sample.class_names()

    error = error_of(sample.parse_classes, f"tench, {word}", names)

    assert "--classes" in error.code
    for i in numbers:
        assert f"{i} ({names[i]})" in error.code


def test_folders_that_are_called_by_numbers_are_asked_for_by_these():
    names = ("1", "7", "2")

    assert sample.parse_classes("7, 1", names) == [1, 0]
    assert sample.numbers_of(names) == [1, 7, 2]
    assert "'0'" in error_of(sample.parse_classes, "0", names).code


def test_names_that_are_not_all_numbers_are_numbered_by_position():
    names = ("7", "x", "0")

    assert sample.numbers_of(names) == [0, 1, 2]
    assert sample.parse_classes("7, 1", names) == [0, 1]
    assert sample.parse_classes("0", names) == [2]              # a name goes before a number


def test_a_checkpoint_has_its_time_shift_and_the_names_of_its_classes(sample_run):
    assert sample.load_all("student.pt")[2:] == (2.5, CLASSES)


def test_published_weights_have_the_papers_time_shift_and_numbers_for_classes(sample_run):
    content = small_checkpoint()
    torch.save({name: content[name] for name in ("ema", "network")}, "published.pt")

    alpha, names = sample.load_all("published.pt", rae="student.pt")[2:]

    assert alpha == meanflow.alpha_of(8, 4)
    assert names == tuple("0123456789")


@pytest.mark.parametrize("counts", (None, (7, 7, 7)))
def test_classes_of_equal_counts_come_in_turn(counts):
    assert sample.labels_for([0, 1, 2], counts, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert sample.labels_for([2, 0], counts, 5).tolist() == [2, 0, 2, 0, 2]


@pytest.mark.parametrize("counts", ((1, 3), (5, 3, 2), (600, 30, 5, 1)))
def test_any_number_of_first_images_has_the_shares_of_the_training_images(counts):
    labels = sample.labels_for(range(len(counts)), counts, 100)

    one_hot = F.one_hot(labels, len(counts))                                    # (100, classes)
    given = one_hot.cumsum(0)
    shares = torch.tensor(counts) / sum(counts)
    expected = torch.arange(1, 101)[:, None] * shares
    assert (given - expected).abs().max() < 1


# Pictures

def test_a_grid_enlarges_small_images_and_beside_the_checkpoint_it_has_its_name(sample_run):
    sample_run("--ckpt student.pt --num 3")

    # Three images of 32 pixels in a row, each with a margin of two, all twice as large.
    assert pixels_of("student.samples.png").shape == (2 * 36, 2 * 104, 3)


@pytest.mark.parametrize("classes, columns", (("a,b,c,d,e", 5), ("a,b", 8)))
def test_a_few_classes_have_a_column_each(classes, columns, sample_run):
    sample_run(f"--ckpt student.pt --classes {classes} --num 16 --out x.png")

    assert pixels_of("x.png").shape[1] == 2 * (columns * 34 + 2)


def test_a_picture_of_a_released_checkpoint_lies_in_the_folder_of_the_user(
        sample_run, tmp_path, monkeypatch):
    """What lies in assets/ belongs to git."""
    assets = tmp_path / "assets"
    assets.mkdir()
    shutil.copy("student.pt", assets)
    monkeypatch.setattr(sample, "ASSETS", assets)

    sample_run(f"--ckpt {assets}/student.pt --num 2")

    assert (tmp_path / "student.samples.png").exists()
    assert os.listdir(assets) == ["student.pt"]


def test_titles_stand_above_their_rows():
    images = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)

    grid = np.asarray(sample.draw_grid(images, 2, ("first", "second")))

    title_height = 24
    block = grid[:len(grid) // 2]
    assert len(grid) == 2 * (title_height + 64 + 2 * 2)
    assert block[:title_height].min() < 128     # letters on white
    assert (block[title_height + 2:-2, 2:66] == 0).all()


def test_a_walk_has_a_frame_for_every_evaluation_of_the_teacher(sample_run):
    evaluations = sample_run("--ckpt student.pt --teacher teacher.pt --num 4 --out x.gif")

    assert evaluations == 4 * (1 + 25)
    assert Image.open("x.gif").n_frames == 1 + 25


# A folder of PNGs

def test_a_folder_has_an_image_a_file_and_its_npz_the_same(sample_run):
    evaluations = sample_run("--ckpt student.pt --num 9 --classes c,a --npz x.npz")

    names = [f"{i:06d}_{'20'[i % 2]}.png" for i in range(9)]
    images = [pixels_of(f"x/{name}") for name in names]
    content = np.load("x.npz")
    assert evaluations == 9
    assert sorted(os.listdir("x")) == [*names, "settings.json"]
    assert np.array_equal(content["arr_0"], images)
    assert content["arr_1"].tolist() == [2, 0, 2, 0, 2, 0, 2, 0, 2]


def test_files_and_npz_have_the_numbers_by_which_folders_of_classes_are_called(sample_run):
    torch.save(small_checkpoint(classes=tuple("9876543210")), "numbers.pt")

    sample_run("--ckpt numbers.pt --num 3 --npz x")

    names = ["000000_9.png", "000001_8.png", "000002_7.png"]
    assert sorted(os.listdir("x")) == [*names, "settings.json"]
    assert np.load("x.npz")["arr_1"].tolist() == [9, 8, 7]


def test_a_folder_has_the_shares_of_the_training_images_unless_classes_are_asked_for(sample_run):
    torch.save(small_checkpoint(class_counts=(6, 2) + (0,) * 8), "counts.pt")

    sample_run("--ckpt counts.pt --num 8 --npz x.npz")
    sample_run("--ckpt counts.pt --num 8 --npz y.npz --classes a,b")

    assert np.bincount(np.load("x.npz")["arr_1"]).tolist() == [6, 2]
    assert np.bincount(np.load("y.npz")["arr_1"]).tolist() == [4, 4]


def test_an_interrupted_folder_goes_on_with_equal_bytes(sample_run):
    sample_run("--ckpt student.pt --num 9 --classes c,a --out x")
    whole = files_of("x")
    for name in ("000001_0.png", "000006_2.png"):
        Path("x", name).unlink()

    evaluations = sample_run("--ckpt student.pt --num 9 --classes 2,0 --out x")

    assert evaluations == 2
    assert files_of("x") == whole


@pytest.mark.parametrize("damage", ("cut", "empty", "flipped bit", "other format"))
def test_a_file_that_is_no_whole_png_is_drawn_again(damage, sample_run):
    sample_run("--ckpt student.pt --num 3 --out x")
    whole = files_of("x")
    file = Path("x/000001_1.png")
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[:-20])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "flipped bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        Image.open(file).save(file, format="JPEG")

    evaluations = sample_run("--ckpt student.pt --num 3 --out x")

    assert evaluations == 1
    assert files_of("x") == whole


@pytest.mark.parametrize("other", (
    "student.pt", "student.pt --classes c,a --seed 1", "student.pt --classes c,a --steps 2",
    "student.pt --classes c,a --precision bf16", "teacher.pt --classes c,a"))
def test_a_folder_takes_no_images_of_other_settings(other, sample_run):
    sample_run("--ckpt student.pt --num 3 --classes c,a --out x")
    whole = files_of("x")

    error = error_of(sample_run, f"--num 12 --out x --ckpt {other}")

    assert "--out x" in error.code
    assert files_of("x") == whole


def test_a_folder_takes_no_images_of_other_weights(sample_run):
    sample_run("--ckpt student.pt --num 3 --out x")
    content = small_checkpoint()
    content["ema"]["final_layer.linear.weight"] += 0.01
    torch.save(content, "student.pt")

    error = error_of(sample_run, "--ckpt student.pt --num 3 --out x")

    assert "--out x" in error.code


def test_a_folder_of_other_files_is_refused(sample_run):
    saved("mine", Path("x/letter.txt"), lambda text, path: path.write_text(text))

    error = error_of(sample_run, "--ckpt student.pt --num 3 --out x")

    assert "--out x" in error.code
    assert os.listdir("x") == ["letter.txt"]


# Several processes

def test_images_of_two_processes_are_those_of_one(sample_run):
    def late(rank):
        """The second process writes its images late: the first has to wait for them."""
        to_pil_image = sample.to_pil_image

        def convert(image):
            time.sleep(rank / 9)
            return to_pil_image(image)
        sample.to_pil_image = convert
        sample_run("--ckpt student.pt --num 9 --npz two.npz")
    sample_run("--ckpt student.pt --num 9 --npz one.npz")

    status, lines = finish(Path(), start(Path(), late, world=2))

    one, two = (np.load(f"{name}.npz")["arr_0"].astype(int) for name in ("one", "two"))
    assert status == [0, 0], lines
    assert np.abs(one - two).max() <= 1
    assert sorted(os.listdir("one")) == sorted(os.listdir("two"))


def test_one_of_two_processes_draws_a_picture(sample_run):
    def work(rank):
        evaluations = sample_run("--ckpt student.pt --num 3 --out x.png")
        assert evaluations == (3 if rank == 0 else 0)
        sys.exit(0)                             # without the others, which have no images

    status, lines = finish(Path(), start(Path(), work, world=2))

    assert status == [0, 0], lines
    assert Path("x.png").exists()


def test_a_rank_that_a_shell_has_left_over_starts_one_process(sample_run, monkeypatch):
    for name, value in dict(RANK="3", WORLD_SIZE="8").items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    evaluations = sample_run("--ckpt student.pt --num 3 --npz x.npz")

    assert sample.start_processes("cpu") == sample.Place(0, 1, "cpu")
    assert evaluations == 3
    assert len(np.load("x.npz")["arr_0"]) == 3


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(sample.dist, "init_process_group", lambda backend: None)
    place = dict(RANK="6", WORLD_SIZE="8", LOCAL_RANK="2", MASTER_ADDR="x", MASTER_PORT="1")
    for name, value in place.items():
        monkeypatch.setenv(name, value)

    assert sample.start_processes() == sample.Place(6, 8, "cuda:2")
    assert "--device cuda:1" in error_of(sample.start_processes, "cuda:1").code


# Released files

def test_a_released_checkpoint_draws_the_same_from_less_than_half_of_the_file(sample_run):
    sample_run("--ckpt student.pt --release small.pt")

    sample_run("--ckpt student.pt --num 4")
    sample_run("--ckpt small.pt --num 4")

    student, small = (pixels_of(f"{name}.samples.png") for name in ("student", "small"))
    assert abs(student - small).max() <= 3
    assert os.stat("small.pt").st_size < os.stat("student.pt").st_size / 2


@pytest.mark.parametrize("part", ("network", "ema", "rae"))
def test_a_checkpoint_that_cannot_sample_is_not_released(part, sample_run):
    content = small_checkpoint()
    del content[part]
    torch.save(content, "partial.pt")

    error = error_of(sample_run, "--ckpt partial.pt --release x.pt")

    assert "partial.pt" in error.code
    assert repr(part) in error.code
    assert not Path("x.pt").exists()


def test_the_released_toy_draws_the_classes_that_are_asked_for():
    network, autoencoder, alpha, names = sample.load_all(HERE / "assets" / "toy.pt")
    labels = torch.arange(300) % 10
    drawn = train.drawn_data(3000, seed=0)
    classifier = fid.train_classifier(drawn.images, drawn.targets, 10, "cpu", steps=100)

    images = images_of(network, autoencoder, alpha, labels)

    recognised = classifier(images / 255).argmax(1)
    assert names == train.TOY_CLASSES
    assert (recognised == labels).float().mean() > 0.8


# Scores in the features of an encoder

def test_features_of_an_rae_are_the_means_of_its_encoder_over_positions(sample_run):
    extractor = fid.make_extractor("rae", "student.pt")
    images = torch.full((1, 3, 32, 32), 204, dtype=torch.uint8)

    features = extractor.extract(images)["pool"]

    encoder = rae.load_rae("student.pt").encoder
    assert torch.equal(features, encoder(images / 255).mean((2, 3)))


def test_frechet_distance_in_the_features_of_an_encoder_is_named_fd(sample_run):
    sample_run("--ckpt student.pt --num 9 --npz x.npz")
    scorer = fid.Scorer("x.npz", "rae", "student.pt")

    scores = scorer("x.npz")

    assert scores.pop("extractor") == fid.make_extractor("rae", "student.pt").name
    assert scores == pytest.approx(dict(fd=0, precision=1, recall=1), abs=1e-6)


# Mistakes

@pytest.mark.parametrize("arguments, words", (
    ("--ckpt nan.pt", ("nan.pt", "final_layer.linear.bias")),
    ("--ckpt nowhere.pt", ("nowhere.pt",)),
    ("--ckpt student.pt --classes z", ("--classes", "'z'")),
    ("--ckpt student.pt --release teacher.pt", ("--release teacher.pt",)),
    ("--ckpt student.pt --device cuda", ("--device cuda:0",)),
    ("--ckpt student.pt --device cuda:7", ("--device cuda:7",)),
    ("--ckpt student.pt --rae nowhere.pt", ("nowhere.pt",)),
    ("--ckpt student.pt --rae large.pt", ("student.pt", "--rae"))))
def test_bad_input_of_sample_is_refused_before_an_image_is_drawn(
        arguments, words, sample_run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with_nan = small_checkpoint()
    with_nan["ema"]["final_layer.linear.bias"][0] = math.nan
    torch.save(with_nan, "nan.pt")
    torch.save(small_checkpoint(rae=small_rae(TINY_VIT).packed()), "large.pt")
    before = {path: path.stat().st_mtime_ns for path in Path().iterdir()}

    error = error_of(sample_run, f"{arguments} --out x")

    assert all(word in error.code for word in words), error.code
    assert before == {path: path.stat().st_mtime_ns for path in Path().iterdir()}


@pytest.mark.parametrize("arguments, word", (
    ("--out x.jpg", "--out x.jpg"), ("--out x.npz", "--out x.npz"), ("--out x.gif", "--out x.gif"),
    ("--teacher teacher.pt --out x.png", "--out x.png"),
    ("--teacher teacher.pt --out x", "--out x"),
    ("--npz x.npz --out y.png", "--npz x.npz"), ("--npz x.npz --teacher teacher.pt", "--npz x.npz"),
    ("--teacher student.pt", "--teacher student.pt"), ("--teacher nowhere.pt", "nowhere.pt")))
def test_outputs_that_do_not_fit_together_are_refused(arguments, word, sample_run):
    error = error_of(sample_run, f"--ckpt student.pt --num 2 {arguments}")

    assert word in error.code
    assert sorted(os.listdir()) == ["student.pt", "teacher.pt"]


def test_a_teacher_has_no_teacher(sample_run):
    error = error_of(sample_run, "--ckpt teacher.pt --num 2 --teacher teacher.pt")

    assert "--teacher" in error.code
    assert sorted(os.listdir()) == ["student.pt", "teacher.pt"]


@pytest.mark.parametrize("flag, value", (
    ("--steps", "0"), ("--steps", "two"), ("--num", "0"), ("--num", "-3"), ("--seed", "-1"),
    ("--batch_size", "0"), ("--device", "gpu"), ("--device", "cuda:"), ("--precision", "fp16")))
def test_values_that_sampling_cannot_have_are_refused(flag, value, sample_run, capsys):
    with pytest.raises(SystemExit) as end:
        sample_run(f"--ckpt student.pt {flag} {value}")

    line = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2
    assert flag in line
    assert value in line


def test_sampling_needs_a_checkpoint(sample_run, capsys):
    with pytest.raises(SystemExit):
        sample_run("--num 3")

    assert "--ckpt" in capsys.readouterr().err.splitlines()[-1]


# --------------------------------------------------------------------------------------------------
# train.py: settings, draws and data

def settings_of(monkeypatch, stage, *flags, world=1):
    """The settings that train.py has for a stage with the flags."""
    argv = ["train.py", "--stage", stage, *map(str, flags)]
    monkeypatch.setattr(sys, "argv", argv)
    return train.settings(stage, train.parse_arguments(), world)


# The table of stages, and the recipes

def test_stages_are_those_of_the_table_of_settings():
    assert [*train.STAGES] == STAGES
    for stages in train.RECIPES.values():
        assert set(stages) <= set(STAGES)


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_a_recipe_trains_what_a_stage_starts_from_before_the_stage(recipe):
    stages = train.RECIPES[recipe]

    for i, stage in enumerate(stages):
        kind = train.STAGES[stage]
        assert kind.starts_from is None or kind.starts_from in stages[:i]
        assert not kind.needs_teacher or "flow" in stages[:i]


def test_every_stage_but_rae_is_a_regression_to_a_target():
    assert [stage for stage in STAGES if train.STAGES[stage].target is None] == ["rae"]


def test_stages_that_need_a_teacher_and_stages_that_need_no_images():
    kinds = train.STAGES.items()

    assert [stage for stage, kind in kinds if kind.needs_teacher] == ["mid", "distill"]
    assert [stage for stage, kind in kinds if not kind.needs_images] == ["mid"]


def test_columns_of_the_table_change_settings_of_the_first_and_add_few():
    added = set()
    for column in ("paper 512", "paper toy", "best 256", "best 512", "best toy"):
        for stage, row in PAPER[column].items():
            added |= row.keys() - PAPER["paper 256"][stage].keys()

    assert added <= {"decay", "decay_from", "warmup", "lr_end"}


def test_the_papers_batches():
    row = PAPER["paper 256"]

    sizes = {stage: row[stage]["batch_size"] for stage in train.RECIPES["paper"]}
    assert sizes == dict(rae=512, flow=1024, mid=8, distill=256, bootstrap=256)


def test_the_papers_mid_training():
    mid = PAPER["paper 256"]["mid"]

    assert mid["num_pairs"] * mid["batch_size"] == 512
    assert PAPER["paper 512"]["mid"]["num_pairs"] * mid["batch_size"] == 64
    assert mid["num_points"] == 17
    assert mid["guidance_scale"] == 1


@pytest.mark.parametrize("stage", ("distill", "bootstrap"))
def test_the_papers_mean_flow(stage):
    row = PAPER["paper 256"][stage]

    assert row["ratio_r_not_equal_t"] == 0.25
    assert row["ratio_r_is_0"] == 0
    assert row["adaptive_p"] == 1
    assert row["derivative"] == "jvp"
    assert row.get("guidance_scale", 1) == 1


@pytest.mark.parametrize("stage", ("flow", "mid", "distill", "bootstrap"))
def test_the_paper_drops_a_tenth_of_the_labels_and_clips_at_1(stage):
    row = PAPER["paper 256"][stage]

    assert row["class_dropout"] == 0.1
    assert "clip" not in row                    # then it is 1


# Learning rates

def rates(row, *done):
    """Learning rates when these shares of the steps are done."""
    return [train.learning_rate(int(share * row["steps"]), row) for share in done]


def test_the_learning_rate_of_flow_stays_and_then_falls_in_a_straight_line():
    flow = PAPER["paper 256"]["flow"]

    assert flow["steps"] == 1_000_911
    assert rates(flow, 0, 0.05) == [2e-4, 2e-4]
    assert rates(flow, 0.525, 1) == pytest.approx([1.1e-4, 2e-5], rel=1e-3)


def test_the_learning_rate_of_rae_rises_in_an_epoch_and_falls_as_a_cosine():
    decoder = PAPER["paper 256"]["rae"]
    epoch = decoder["steps"] / 16

    found = [train.learning_rate(int(epochs * epoch) + 1, decoder)
             for epochs in (0, 1, 4.75, 8.5, 16)]

    cosine = (1 + math.cos(math.pi / 4)) / 2    # after a quarter of the fall
    expected = [1e-7, 2e-4, 2e-5 + 1.8e-4 * cosine, 1.1e-4, 2e-5]
    assert found == pytest.approx(expected, rel=1e-2, abs=1e-7)


def test_the_learning_rate_of_mid_is_constant():
    assert rates(PAPER["paper 256"]["mid"], 0, 0.5, 0.99999) == [1e-4] * 3


@pytest.mark.parametrize("stage", ("rae", "flow", "mid", "distill", "bootstrap"))
def test_learning_rates_of_the_toy_are_never_0_and_at_most_the_peak(stage):
    row = PAPER["paper 256"][stage] | PAPER["paper toy"][stage]

    found = [train.learning_rate(step, row) for step in range(row["steps"])]

    assert min(found) > 0
    assert max(found) == pytest.approx(row["lr"])
    assert found[-1] == pytest.approx(row.get("lr_end", row["lr"]), abs=0.01 * row["lr"])


# Settings

def test_settings_are_the_row_of_the_size_then_the_recipe_then_the_flags(monkeypatch):
    paper = settings_of(monkeypatch, "mid", "--resolution", 512)
    best = settings_of(monkeypatch, "mid", "--resolution", 512, "--recipe", "best")
    flagged = settings_of(monkeypatch, "mid", "--resolution", 512, "--recipe", "best",
                          "--guidance_scale", 3, "--lr", 0.5, "--steps", 7)

    assert (paper["num_pairs"], paper["guidance_scale"], paper["lr"]) == (8, 1, 1e-4)
    assert (best["guidance_model"], best["guidance_scale"]) == ("published", 1.5)
    assert flagged == best | dict(guidance_scale=3, lr=0.5, steps=7)


def test_the_toy_has_the_best_recipe_unless_the_papers_is_asked_for(monkeypatch):
    best = settings_of(monkeypatch, "mid", "--toy")
    paper = settings_of(monkeypatch, "mid", "--toy", "--recipe", "paper")

    assert (best["guidance_scale"], paper["guidance_scale"]) == (2, 1)
    assert best["steps"] == PAPER["paper toy"]["mid"]["steps"]


def test_photographs_have_four_times_the_steps_of_drawings_and_are_not_reencoded(
        photographs, monkeypatch):
    drawings = settings_of(monkeypatch, "drift", "--toy")

    of_photographs = settings_of(monkeypatch, "drift", "--toy", "--data", photographs)

    assert drawings["reencode"]
    assert of_photographs == drawings | dict(steps=4 * drawings["steps"], reencode=False)


def test_settings_hold_what_tells_runs_apart(monkeypatch):
    c = settings_of(monkeypatch, "mid", "--toy", "--seed", 5, "--precision", "bf16")

    identity = dict(stage="mid", model="toy", toy=True, resolution=32, seed=5, precision="bf16",
                    random_weights=False)
    assert identity.items() <= c.items()


def test_settings_of_a_run_leave_the_table_as_it_is(monkeypatch):
    row = train.TABLE["paper toy"]["drift"]
    before = dict(row)

    settings_of(monkeypatch, "drift", "--toy", "--lr", 0.5)["samples"] = 0

    assert row == before


# The number of rows at a time

def test_in_parts_is_the_same_function_in_smaller_calls():
    calls = []

    def add(a, b):
        calls.append(len(a))
        return a + b
    a, b = torch.randn(2, 7, 3)

    total = train.in_parts(add, 3)(a, b)

    assert torch.equal(total, a + b)
    assert calls == [3, 3, 1]


def run_of_memory(rows, precision="bf16", checkpointing=False, device="cuda:0", **c):
    """What default_micro_batch needs of a run. A sample has 16 tokens, and its network one layer
    of 16 units and 55 parameters."""
    return SimpleNamespace(
        stage="mid", device=device, c=c | {"precision": precision},
        row_numbers=lambda step: range(rows), adversary=None,
        args=SimpleNamespace(checkpointing=checkpointing),
        rae=SimpleNamespace(latent_shape=(8, 4, 4)),
        params=[torch.zeros(16, 3), torch.zeros(7)])


@pytest.mark.parametrize("c, samples", (
    ({}, 6), (dict(num_pairs=8), 48), (dict(num_moved=4), 24)))
def test_a_cpu_takes_all_samples_at_once(c, samples):
    assert train.default_micro_batch(run_of_memory(6, device="cpu", **c)) == samples


@pytest.mark.parametrize("options, size", (
    ({}, 70), (dict(precision="fp32"), 130), (dict(checkpointing=True), 10)))
def test_a_gpu_takes_the_largest_power_of_two_that_fits(options, size, monkeypatch):
    four_samples = 2**31 + 12 * 55 + 4 * size * 16              # bytes
    free = iter((four_samples, four_samples, four_samples - 1))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (next(free), 0))

    assert train.default_micro_batch(run_of_memory(64, **options)) == 4
    assert train.default_micro_batch(run_of_memory(3, **options)) == 3
    assert train.default_micro_batch(run_of_memory(64, **options)) == 2


def test_a_network_of_which_no_sample_fits_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**31, 2**31))

    error = error_of(train.default_micro_batch, run_of_memory(64))

    assert "--checkpointing" in error.code


# Drawn pictures

def test_toy_images_are_ten_classes_in_turn():
    images, labels = train.make_toy_images(40, seed=3)

    assert images.shape == (40, 32, 32, 3)
    assert images.dtype == np.uint8
    assert labels.tolist() == list(range(10)) * 4
    assert len(train.TOY_CLASSES) == 10


def test_toy_images_have_smooth_edges():
    images, _ = train.make_toy_images(40, seed=3)

    for image in images:
        colours = np.unique(image.reshape(-1, 3), axis=0)
        assert len(colours) >= 8


def test_a_toy_image_is_a_function_of_seed_and_number():
    images, _ = train.make_toy_images(40, seed=3)

    few, _ = train.make_toy_images(10, seed=3)
    other, _ = train.make_toy_images(10, seed=4)

    assert np.array_equal(images[:10], few)
    assert not np.array_equal(few, other)


def test_toy_images_are_those_with_which_the_released_toy_was_trained():
    """The mean of every picture is that of the first version, up to the rounding of a library."""
    images, _ = train.make_toy_images(20, seed=0)

    bright = [175.50, 167.70, 181.73, 191.99, 195.97, 195.48, 187.16, 191.20, 190.13, 186.99]
    dark = [76.91, 70.97, 95.26, 75.67, 73.55, 81.94, 49.00, 76.06, 63.68, 61.93]
    assert images.mean((1, 2, 3)) == pytest.approx(bright + dark, abs=0.1)


# Samples: images and labels of rows

def rows_of(stage, numbers, num=100, **c):
    """Rows of a stage with `num` images, each of which is its number, of ten classes in turn."""
    images = torch.arange(num).view(num, 1)
    data = train.InMemory(images, torch.arange(num) % 10, CLASSES)
    samples = train.Samples(data, CLASSES, dict(seed=1, stage=stage, **c))
    return [samples[n] for n in numbers]


def images_in(rows):
    return [int(x) for x, _ in rows]


def test_the_image_of_a_row_is_a_function_of_its_number():
    assert rows_of("flow", (950, 3, 420))[1:] == rows_of("flow", (3, 420))


def test_each_epoch_has_every_image_once_in_an_order_of_its_own():
    first = images_in(rows_of("flow", range(100)))
    second = images_in(rows_of("flow", range(100, 200)))

    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    assert list(range(100)) not in (first, second)


@pytest.mark.parametrize("other", (dict(stage="bootstrap"), dict(stage="flow", seed=2)))
def test_another_stage_or_seed_has_another_order(other):
    data = train.InMemory(torch.arange(100).view(100, 1), torch.arange(100) % 10, CLASSES)
    samples = train.Samples(data, CLASSES, dict(seed=1) | other)

    assert images_in(samples[n] for n in range(100)) != images_in(rows_of("flow", range(100)))


def test_statistics_see_the_images_in_their_order():
    assert images_in(rows_of("statistics", range(100))) == list(range(100))


def test_a_row_of_drift_is_many_images_of_one_class():
    rows = rows_of("drift", range(20), samples=30)

    numbers = {int(i) for x, _ in rows for i in x}
    for x, label in rows:
        assert x.shape == (30, 1)
        assert (x % 10 == label).all()
    assert len(numbers) > 90                    # of 100 images


def test_rows_of_drift_do_not_depend_on_those_before():
    forward = rows_of("drift", range(20), samples=30)

    backward = rows_of("drift", range(19, -1, -1), samples=30)

    for (x, label), (x_again, label_again) in zip(forward, backward[::-1]):
        assert torch.equal(x, x_again)
        assert label == label_again


def test_classes_of_drift_come_once_a_round_in_an_order_of_its_own():
    labels = [label for _, label in rows_of("drift", range(20), samples=3)]

    assert sorted(labels[:10]) == sorted(labels[10:]) == list(range(10))
    assert labels[:10] != labels[10:]


def test_labels_are_the_positions_of_the_classes_in_the_network():
    data = train.InMemory(torch.zeros(4, 1), torch.tensor([0, 1, 1, 0]), ("d", "b"))

    samples = train.Samples(data, CLASSES, dict(seed=0, stage="statistics"))

    assert [samples[n][1] for n in range(4)] == [3, 1, 1, 3]


def test_classes_that_the_network_does_not_have_are_refused():
    data = train.InMemory(torch.zeros(4, 1), torch.tensor([0, 1, 1, 0]), ("d", "wolf"))

    error = error_of(train.Samples, data, CLASSES, dict(seed=0, stage="flow"))

    assert "--data" in error.code
    assert "'wolf'" in error.code


def samples_of(photographs, stage, **c):
    folder = train.Photographs(photographs)
    return train.Samples(folder, folder.classes, dict(seed=0, stage=stage, resolution=32, **c))


def test_half_of_the_images_are_mirrored(photographs):
    plain = samples_of(photographs, "statistics")
    plain = torch.stack([plain[n][0] for n in range(60)])                       # (60, 3, 32, 32)
    samples = samples_of(photographs, "flow", flip=0.5)

    rows = [samples[n][0] for n in range(240)]

    straight = 0
    mirrored = 0
    for x in rows:
        straight += (x == plain).flatten(1).all(1).any()
        mirrored += (x == plain.flip(3)).flatten(1).all(1).any()
    assert straight + mirrored >= 240           # none is anything else
    assert 80 < mirrored < 160


def test_crops_and_flips_of_a_row_do_not_depend_on_torchs_generator(photographs):
    samples = [samples_of(photographs, stage, flip=0.5) for stage in ("rae", "flow")]
    expected = [of_stage[77][0] for of_stage in samples]

    torch.manual_seed(5)

    for of_stage, x in zip(samples, expected):
        assert torch.equal(of_stage[77][0], x)


def test_stage_rae_sees_other_crops_of_an_image_in_every_epoch(photographs):
    samples = samples_of(photographs, "rae")
    rows = [60 * epoch + samples.order(epoch, 60).index(0) for epoch in range(20)]

    crops = torch.stack([samples[n][0] for n in rows])                          # of image 0

    assert crops.shape == (20, 3, 32, 32)
    assert crops.dtype == torch.uint8
    assert len(crops.unique(dim=0)) > 10


# Draws: the random numbers of rows

def draws_of(stage, step=0, world=1, rank=0, latent_shape=(1, 1, 1), **changes):
    """The draws of a stage for the rows of one of several processes."""
    run = object.__new__(train.Run)
    run.c = train.TABLE["paper 256"][stage] | {"seed": 3} | changes
    run.stage = stage
    run.device = "cpu"
    run.place = sample.Place(rank, world, "cpu")
    run.classes = CLASSES
    run.rae = SimpleNamespace(latent_shape=latent_shape)
    return train.draw_rows(run, step)


def test_draws_are_functions_of_seed_stage_and_row():
    options = dict(batch_size=16, latent_shape=(4, 2, 2))
    draws = draws_of("distill", 5, **options)

    torch.manual_seed(5)                        # this changes nothing
    again = draws_of("distill", 5, **options)
    others = (draws_of("distill", 6, **options), draws_of("bootstrap", 5, **options),
              draws_of("distill", 5, **options, seed=4))

    for name, values in draws.items():
        assert torch.equal(values, again[name])
    noise = torch.stack([draws["noise"], *[other["noise"] for other in others]])
    assert len(noise.unique()) == noise.numel()


@pytest.mark.parametrize("stage", STAGES)
def test_the_owner_of_a_row_makes_its_draws(stage):
    options = dict(batch_size=16, latent_shape=(4, 2, 2))
    whole = draws_of(stage, 5, **options)

    halves = [draws_of(stage, 5, world=2, rank=rank, **options) for rank in range(2)]

    for name, values in whole.items():
        assert len(values) == 16
        assert torch.equal(values, torch.cat([half[name] for half in halves]))


def test_rows_of_distill_with_r_below_t_are_every_fourth():
    draws = draws_of("distill", batch_size=16)

    t, r = meanflow.mean_flow_times(
        draws["uniform"], 6.93, draws["jumps"], draws["jumps_to_data"])

    assert (r < t).nonzero().flatten().tolist() == [3, 7, 11, 15]


def test_shares_of_the_draws_of_distill():
    draws = draws_of("distill", batch_size=8000, ratio_r_is_0=0.4)

    t, r = meanflow.mean_flow_times(
        draws["uniform"], 6.93, draws["jumps"], draws["jumps_to_data"])

    assert (r < t).float().mean() == pytest.approx(0.25, abs=0.01)
    assert (r == 0).float().mean() == pytest.approx(0.4 * 0.25, abs=0.01)
    assert draws["dropped"].float().mean() == pytest.approx(0.1, abs=0.01)


def test_draws_of_mid_reach_every_pair_and_label():
    draws = draws_of("mid", batch_size=500, num_pairs=64, num_points=17)

    assert draws["pairs"].unique().tolist() == list(range(136))                 # 17 * 16 / 2
    assert draws["y"].unique().tolist() == list(range(10))


def test_noise_of_stage_rae_has_a_level_of_its_own_for_each_image():
    draws = draws_of("rae", latent_shape=(9, 8, 8))

    level = draws["noise"].std((1, 2, 3))                                       # (512,)
    assert 0.35 < level.mean() < 0.45           # levels are uniform up to 0.8
    assert level.min() < 0.05
    assert 0.75 < level.max() < 0.85


# Folders of images

def load_toy_data(folder, flip=None):
    args = argparse.Namespace(data=str(folder), toy=True, dry_run=False, seed=0, flip=flip,
                              place=sample.Place(0, 1, "cpu"))
    return train.load_data(args)


def contents(data):
    return {image.numpy().tobytes() for image in data.images}


@pytest.fixture
def drawings(tmp_path):
    """A folder of 120 PNGs of two classes."""
    for i, image in enumerate(train.make_toy_images(120, seed=9)[0]):
        path = tmp_path / "drawings" / str(i % 2) / f"{i}.png"
        saved(Image.fromarray(image), path, Image.Image.save)
    return tmp_path / "drawings"


def test_held_out_images_are_chosen_by_their_names(drawings):
    seen, hidden = map(contents, load_toy_data(drawings))
    for name in ("0/0.png", "1/37.png"):
        (drawings / name).unlink()

    seen_later, hidden_later = map(contents, load_toy_data(drawings))

    assert 4 < len(hidden) < 24
    assert not seen & hidden
    assert hidden_later <= hidden
    assert not seen_later & hidden


def test_the_toy_sees_photographs_and_their_mirror_images(drawings):
    seen, hidden = load_toy_data(drawings)
    plain, hidden_again = load_toy_data(drawings, flip=0)

    num = 120 - len(hidden.images)
    assert len(plain.images) == num
    assert torch.equal(seen.images, torch.cat([plain.images, plain.images.flip(3)]))
    assert torch.equal(seen.targets, plain.targets.repeat(2))
    assert torch.equal(hidden.images, hidden_again.images)
    assert seen.classes == hidden.classes == ("0", "1")


def test_a_class_of_which_all_images_are_held_out_is_refused(drawings):
    (drawings / "2").mkdir()
    shutil.copy(drawings / "0" / "0.png", drawings / "2" / "30.png")   # a name of those held out

    error = error_of(load_toy_data, drawings)

    assert "--data" in error.code
    assert "'2'" in error.code


def test_the_drawn_pictures_of_training_and_of_the_report_are_different():
    args = argparse.Namespace(data=None, dry_run=True, seed=0)

    seen, hidden = train.load_data(args)

    assert len(contents(seen)) == len(contents(hidden)) == 300
    assert not contents(seen) & contents(hidden)
    assert seen.images.shape == (300, 3, 32, 32)
    assert seen.classes == train.TOY_CLASSES


# Unreadable images

@pytest.fixture
def many_photographs(photographs):
    """A folder as if it had each photograph twenty times: 1,200 images."""
    folder = train.Photographs(photographs)
    folder.samples = folder.samples * 20
    folder.targets = folder.targets * 20
    return folder


def damaged_png(path):
    path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\x05IHDR\0\0")
    return str(path)


def in_order(folder):
    return train.Samples(folder, folder.classes,
                         dict(seed=0, stage="statistics", resolution=32))


def test_an_unreadable_image_is_named_and_replaced_by_the_next(many_photographs, tmp_path, capsys):
    next_image, next_label = in_order(many_photographs)[8]
    file = damaged_png(tmp_path / "bad.jpg")
    many_photographs.samples[7] = (file, 0)

    image, label = in_order(many_photographs)[7]

    assert torch.equal(image, next_image)
    assert label == next_label == 0
    assert file in capsys.readouterr().err


def test_an_unreadable_image_is_replaced_by_one_of_its_class(many_photographs, tmp_path):
    assert many_photographs.targets[23:25] == [0, 1]            # the next file is of another
    first_of_next_round, _ = in_order(many_photographs)[60]
    many_photographs.samples[23] = (damaged_png(tmp_path / "bad.jpg"), 0)

    image, label = in_order(many_photographs)[23]

    assert label == 0
    assert torch.equal(image, first_of_next_round)


def test_over_1_in_1000_unreadable_images_end_the_run(many_photographs, tmp_path):
    many_photographs.samples[7] = (damaged_png(tmp_path / "bad.jpg"), 0)
    many_photographs.samples[9] = (str(tmp_path / "gone.jpg"), 0)
    samples = in_order(many_photographs)
    for _ in range(3):
        samples[7]                              # one image, however often it is read

    with pytest.raises(train.UnreadableImages):
        samples[9]


# A run of every stage

@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_writes_a_checkpoint(stage, trained):
    content = dit.load_file(trained / f"{stage}.pt")

    assert content["step"] == 4
    assert content["stage"] == content["config"]["stage"] == stage
    assert content["classes"] == ("0", "1", "2")
    assert content["rae"]["state"]["var"].shape == (96, 4, 4)
    assert content["ema"].keys() == content["model"].keys()
    assert any(not torch.equal(value, content["model"][name])
               for name, value in content["ema"].items())


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_writes_a_log(stage, trained):
    settings, *lines = lines_of(trained, stage)

    assert settings["config"]["stage"] == stage
    assert sorted(losses(trained, stage)) == [1, 2, 3, 4]
    for line in lines:
        if "loss" in line:
            assert {"lr", "images_per_s", "grad_norm", "seconds", "skipped"} <= line.keys()


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_draws_pictures_and_logs_them(stage, trained):
    pictures = [line["picture"] for line in lines_of(trained, stage) if "picture" in line]

    assert pictures == [f"{stage}.000002.png", f"{stage}.000004.png"]
    for name in pictures:
        assert Image.open(trained / name).size[0] > 150


# --------------------------------------------------------------------------------------------------
# What a run promises: the loop, whatever happens to it

class Stopped(Exception):
    """Ends a run at a moment of a test's choice."""


def stop(*_, **__):
    raise Stopped


def stop_after_saving(monkeypatch, step):
    """The run ends as soon as the checkpoint of a step has its name."""
    save = train.Run.save

    def save_and_stop(run):
        save(run)
        if run.step == step:
            raise Stopped
    monkeypatch.setattr(train.Run, "save", save_and_stop)


def stopped_run(monkeypatch, step, *arguments):
    """A run in this process that ends after it has saved a step."""
    with monkeypatch.context() as stopped, pytest.raises(Stopped):
        stop_after_saving(stopped, step)
        in_process(stopped, *arguments)


def refusal(monkeypatch, capsys, *arguments):
    """The one line in which train.py refuses a command, by argparse or by SystemExit."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        in_process(monkeypatch, *arguments)

    code = end.value.code
    if code == 2:                               # argparse: the usage, and the line
        usage, line = capsys.readouterr().err.splitlines()
        return line
    assert isinstance(code, str)
    assert "\n" not in code.strip()
    return code


def step_lines(out, stage):
    return {line["step"]: line for line in lines_of(out, stage) if "lr" in line}


def some_line(lines, *words):
    """Whether a line has all the words."""
    return any(all(word in line for word in words) for line in lines)


def at_step(number, act):
    """A fault: act() at the beginning of the step that follows step `number`."""
    def fault(rank):
        draw_rows = train.draw_rows

        def draw_and_act(run, step):
            if step == number:
                act()
            return draw_rows(run, step)
        train.draw_rows = draw_and_act
    return fault


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def straight(trained, photographs, tmp_path_factory):
    """{number of processes: folder} of undisturbed runs of bootstrap; that of one is `trained`."""
    out = tmp_path_factory.mktemp("straight")
    command = a_run(trained, photographs, out, "bootstrap", "--steps", 4)
    status, lines = run(out, *command, world=2)
    assert status == [0, 0], lines
    return {1: trained, 2: out}


# Resuming

@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_bitwise(stage, photographs, trained, tmp_path, monkeypatch):
    command = a_run(trained, photographs, tmp_path, stage, "--steps", 4)
    stopped_run(monkeypatch, 2, *command)
    torch.manual_seed(123)                      # this changes nothing
    starts_from = train.STAGES[stage].starts_from
    if starts_from and not train.STAGES[stage].needs_teacher:
        (tmp_path / f"{starts_from}.pt").unlink()               # was for the start alone

    in_process(monkeypatch, *command)

    assert_equal_runs(tmp_path, trained, stage)


def test_a_complete_stage_is_left_alone(photographs, trained, tmp_path, monkeypatch):
    copy_inputs(trained, tmp_path, *STAGES)
    shutil.copy(trained / "drift.jsonl", tmp_path)
    before = (tmp_path / "drift.pt").stat().st_mtime_ns

    in_process(monkeypatch, "--toy", "--data", photographs, "--out", tmp_path,
               "--stage", "drift", *TINY)

    assert (tmp_path / "drift.pt").stat().st_mtime_ns == before
    assert (tmp_path / "drift.jsonl").read_text() == (trained / "drift.jsonl").read_text()


@pytest.mark.parametrize("flag, value, name", (
    ("--seed", 1, "seed"), ("--recipe", "paper", "guidance_scale"),
    ("--batch_size", 4, "batch_size")))
def test_resume_refuses_settings_that_shape_the_run(
        flag, value, name, trained, tmp_path, monkeypatch, capsys):
    copy_inputs(trained, tmp_path, *STAGES)

    line = refusal(monkeypatch, capsys, "--toy", "--out", tmp_path, "--stage", "mid", *TINY,
                   flag, value)

    assert f"{tmp_path}/mid.pt" in line
    assert name in line


def test_resume_allows_other_steps_learning_rates_and_micro_batches(
        trained, tmp_path, monkeypatch):
    copy_inputs(trained, tmp_path, *STAGES)

    in_process(monkeypatch, "--toy", "--out", tmp_path, "--stage", "mid", *TINY,
               "--steps", 5, "--lr", 1e-5, "--micro_batch", 2)

    content = dit.load_file(tmp_path / "mid.pt")
    assert content["step"] == 5
    assert content["config"]["lr"] == 1e-5


# Draws and labels

def test_mid_training_reads_and_encodes_no_image(trained, tmp_path, monkeypatch):
    copy_inputs(trained, tmp_path, "rae", "flow")
    monkeypatch.setattr(train, "load_data", None)
    monkeypatch.setattr(train, "Samples", None)
    monkeypatch.setattr(rae.Encoder, "forward", None)

    in_process(monkeypatch, "--toy", "--out", tmp_path, "--stage", "mid", *TINY)

    assert losses(tmp_path, "mid") == losses(trained, "mid")


def test_labels_are_dropped_once_per_row(photographs, trained, tmp_path, monkeypatch):
    """The teacher, both points of the difference quotient and the student see equal labels."""
    embed = torch.nn.Embedding.forward
    labels = []

    def embed_and_note(self, y):
        labels.append(y.tolist())
        return embed(self, y)
    monkeypatch.setattr(torch.nn.Embedding, "forward", embed_and_note)

    command = a_run(trained, photographs, tmp_path, "distill", "--batch_size", 100, "--steps", 1)
    in_process(monkeypatch, *command, "--derivative", "fd", "--recipe", "paper")

    teacher, derivative, student = labels[:3]
    assert student == teacher
    assert derivative == teacher[3::4] * 2      # every fourth row has r < t
    assert 2 < teacher.count(3) < 25            # 3 is "no class"; a tenth is expected


RANDOM = ("--resolution", 32, "--model", "toy", "--weights", "random", "--workers", 0)
@pytest.fixture(scope="module")
def lpips():
    """LPIPS of random weights is made once, since its VGG takes two seconds."""
    network = rae.PerceptualDistance("random")

    def copy_of_it(weights):
        assert weights == "random"
        return copy.deepcopy(network)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train, "PerceptualDistance", copy_of_it)
        yield


def leave():
    raise SystemExit(0)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_micro_batches_and_processes_follow_one_loss(stage, photographs, trained, tmp_path):
    """The same draws, and sums in another order: 1e-4 over three steps in float32."""
    command = a_run(trained, photographs, tmp_path / "starts", stage, "--steps", 4)

    for world, micro_batch in ((1, 1), (1, 4), (2, 99), (2, 3)):
        out = tmp_path / f"{world}_{micro_batch}"
        shutil.copytree(tmp_path / "starts", out)
        status, lines = run(tmp_path, *command, "--out", out, "--micro_batch", micro_batch,
                            "--save_every", 99, world=world, fault=at_step(3, leave))

        assert status == [0] * world, lines
        assert sorted(losses(out, stage)) == [1, 2, 3]
        for step, values in losses(out, stage).items():
            assert values == pytest.approx(losses(trained, stage)[step], rel=1e-4), (out, step)


def test_micro_batches_and_processes_follow_one_loss_in_stage_rae(photographs, lpips, tmp_path):
    """L1 and LPIPS. The GAN's weight is that of a process: see the test of two processes."""
    command = ("--data", photographs, *TINY, *RANDOM, "--stage", "rae", "--encoder", TINY_VIT,
               "--adversarial", 0, "--batch_size", 4, "--save_every", 99)
    expected = None

    for world, micro_batch in ((1, 4), (1, 1), (1, 3), (2, 2)):
        out = tmp_path / f"{world}_{micro_batch}"
        status, lines = run(tmp_path, *command, "--out", out, "--micro_batch", micro_batch,
                            world=world, fault=at_step(2, leave))
        assert status == [0] * world, lines
        parts = [line[name] for line in step_lines(out, "rae").values()
                 for name in ("loss", "l1", "lpips")]
        assert len(parts) == 6
        expected = expected or parts

        assert parts == pytest.approx(expected, rel=1e-4), (world, micro_batch)


def reencoding(monkeypatch):
    """Stage drift with reencode, which the toy has for its own drawings alone."""
    settings = train.settings

    def with_reencode(stage, *arguments):
        c = settings(stage, *arguments)
        return c | {"reencode": True} if stage == "drift" else c
    monkeypatch.setattr(train, "settings", with_reencode)


def test_drift_with_reencode_resumes_and_follows_one_loss_in_two_processes(
        photographs, trained, tmp_path, monkeypatch):
    reencoding(monkeypatch)
    calls = []
    reencode = rae.RAE.reencode

    def reencode_and_count(self, z):
        calls.append(len(z))
        return reencode(self, z)
    monkeypatch.setattr(rae.RAE, "reencode", reencode_and_count)
    one, two, resumed = (tmp_path / name for name in ("one", "two", "resumed"))
    command = a_run(trained, photographs, one, "drift", "--steps", 4)
    for out in (two, resumed):
        copy_inputs(trained, out, "rae", "flow")

    in_process(monkeypatch, *command)
    assert calls == [16] * 4                    # of 8 classes two samples are moved
    stopped_run(monkeypatch, 2, *command, "--out", resumed)
    in_process(monkeypatch, *command, "--out", resumed)
    status, lines = run(tmp_path, *command, "--out", two, world=2)

    assert status == [0, 0], lines
    assert_equal_runs(resumed, one, "drift")
    assert losses(one, "drift") != losses(trained, "drift")
    for step, values in losses(one, "drift").items():
        assert losses(two, "drift")[step] == pytest.approx(values, rel=1e-4)


# The exponential moving average

@pytest.mark.parametrize("step, decay", ((0, 0.1), (1, 2 / 11), (90, 0.91), (10**6, 0.9999)))
def test_the_decay_of_the_average_rises_so_that_the_start_is_soon_forgotten(step, decay):
    assert train.ema_decay(step, {"ema": 0.9999}) == pytest.approx(decay)


def test_the_decay_of_drift_rises_from_a_half_to_its_value_in_1000_steps():
    c = PAPER["paper 256"]["drift"]

    decays = [train.ema_decay(step, c) for step in range(2000)]

    assert decays[0] == 0.5
    assert decays[500] == pytest.approx((0.5 * c["ema"]) ** 0.5)
    assert decays[1000:] == [c["ema"]] * 1000
    assert decays == sorted(decays)


def test_after_its_first_step_the_average_is_a_tenth_of_the_start(trained, tmp_path, monkeypatch):
    copy_inputs(trained, tmp_path, "rae", "flow")
    before = dit.load_file(tmp_path / "flow.pt")["ema"]         # of the start, but what reads r

    in_process(monkeypatch, "--toy", "--out", tmp_path, "--stage", "mid", *TINY, "--steps", 1)

    content = dit.load_file(tmp_path / "mid.pt")
    for name, value in before.items():
        expected = 0.1 * value + 0.9 * content["model"][name]
        assert torch.allclose(content["ema"][name], expected, rtol=1e-5, atol=1e-7), name
    assert relative(content["model"]["final_layer.linear.weight"],
                    before["final_layer.linear.weight"]) > 1e-4         # the step changed something


# The path of ImageNet, with networks of random weights

DECODER = (*TINY, *RANDOM, "--stage", "rae", "--encoder", TINY_VIT, "--checkpointing",
           "--batch_size", 4, "--save_every", 1, "--sample_every", 2)


@pytest.fixture(scope="module")
def paper_decoder(photographs, lpips, tmp_path_factory):
    """Folder of a stage rae of four steps, with LPIPS and a GAN: see DECODER."""
    out = tmp_path_factory.mktemp("paper")
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_process(monkeypatch, "--data", photographs, *DECODER, "--out", out)
    return out


def test_discriminator_and_gan_come_in_at_their_steps(paper_decoder):
    lines = step_lines(paper_decoder, "rae")

    learns = [step for step in lines if "d_loss" in lines[step]]
    judges = [step for step in lines if "gan" in lines[step]]

    assert learns == [2, 3, 4]                  # after 6/16 of the steps
    assert judges == [3, 4]                     # after 1/2


def test_loss_of_the_decoder_is_the_sum_of_its_parts(paper_decoder):
    for line in step_lines(paper_decoder, "rae").values():
        parts = line["l1"] + line["lpips"] + line.get("gan_weight", 0) * line.get("gan", 0)

        assert line["lpips"] > 0
        assert line["loss"] == pytest.approx(parts, rel=1e-4)


def test_the_decoder_and_its_discriminator_resume_bitwise(
        paper_decoder, photographs, tmp_path, monkeypatch):
    """The crops of its images too, and the schedule of the discriminator, which is its own."""
    command = ("--data", photographs, *DECODER, "--out", tmp_path)
    rates = []
    step = rae.Adversary.step

    def step_and_note(self, lr):
        rates.append(lr)
        step(self, lr)
    monkeypatch.setattr(rae.Adversary, "step", step_and_note)
    stopped_run(monkeypatch, 3, *command)

    in_process(monkeypatch, *command)

    assert_equal_runs(tmp_path, paper_decoder, "rae")
    lines = step_lines(tmp_path, "rae")
    assert rates == [lines[step]["lr"] for step in (1, 2, 3)]   # it began a step after the decoder
    picture = "rae.000004.png"
    assert (tmp_path / picture).read_bytes() == (paper_decoder / picture).read_bytes()


def test_pictures_of_stage_rae_show_equal_crops_before_and_after_the_statistics(paper_decoder):
    rows = []
    for step in (2, 4):
        picture = np.asarray(Image.open(paper_decoder / f"rae.{step:06d}.png"))
        rows.append(picture[4:].reshape(8, 68, -1))             # 2 x (32 and a border of 2) pixels

    originals_before, originals_after = rows[0][::2], rows[1][::2]
    decoded_before, decoded_after = rows[0][1::2], rows[1][1::2]

    assert np.array_equal(originals_before, originals_after)
    assert not np.array_equal(decoded_before, decoded_after)


@pytest.mark.parametrize("change, name", (("names", "classes"), ("number", "num_images")))
def test_other_data_under_the_same_out_are_refused(
        change, name, paper_decoder, photographs, tmp_path, monkeypatch, capsys):
    """Else the run reports steps and scores of a network that has never met these images."""
    out = tmp_path / "out"
    copy_inputs(paper_decoder, out, "rae")
    data = tmp_path / "data"
    shutil.copytree(photographs, data)
    if change == "names":
        (data / "2").rename(data / "3")
    else:
        next((data / "2").iterdir()).unlink()

    line = refusal(monkeypatch, capsys, "--data", data, *DECODER, "--out", out)

    assert f"{out}/rae.pt" in line
    assert name in line


def test_micro_batches_do_not_change_the_loss_of_the_discriminator(
        paper_decoder, photographs, tmp_path, monkeypatch):
    """Each image is normalised by itself. Later the decoder's GAN weight is a micro-batch's own."""
    expected = step_lines(paper_decoder, "rae")

    stopped_run(monkeypatch, 3, "--data", photographs, *DECODER, "--out", tmp_path,
                "--micro_batch", 2)

    lines = step_lines(tmp_path, "rae")
    for step in (2, 3):
        assert lines[step]["d_loss"] == pytest.approx(expected[step]["d_loss"], rel=1e-3)


def test_the_stages_of_the_paper_train_one_after_the_other_and_sample_in_one_step(
        paper_decoder, photographs, tmp_path, monkeypatch):
    """Latents come from files, through the encoder, in every stage but mid."""
    monkeypatch.setitem(train.TABLE["paper 256"]["mid"], "num_pairs", 4)
    copy_inputs(paper_decoder, tmp_path, "rae")

    for stage in STAGES[1:]:
        in_process(monkeypatch, "--data", photographs, *TINY, *RANDOM, "--stage", stage,
                   "--out", tmp_path, "--steps", 2)
        assert sorted(losses(tmp_path, stage)) == [1, 2]

    network, autoencoder, alpha, names = sample.load_all(tmp_path / "bootstrap.pt")
    (_, images), = sample.make_images(network, autoencoder, alpha, torch.tensor([0, 1]))
    assert images.shape == (2, 3, 32, 32)
    assert alpha == 0.25                        # sqrt(64 * 2 * 2 / 4096)
    assert names == ("0", "1", "2")
    assert autoencoder.encoder_config["name"] == TINY_VIT


@pytest.fixture(scope="module")
def decoder_of_two(photographs, lpips, tmp_path_factory):
    """Folder of the same stage rae as paper_decoder's, by two processes."""
    out = tmp_path_factory.mktemp("two")
    status, lines = run(out, "--data", photographs, *DECODER, "--out", out, world=2)
    assert status == [0, 0], lines
    return out


def test_losses_of_two_processes_with_a_gan_are_about_those_of_one(paper_decoder, decoder_of_two):
    one = step_lines(paper_decoder, "rae")
    two = step_lines(decoder_of_two, "rae")

    for step in (1, 2, 3, 4):                   # from step 3 on the GAN's weight is a process's own
        tolerance = 1e-4 if step < 3 else 0.02
        assert two[step]["loss"] == pytest.approx(one[step]["loss"], rel=tolerance)
    assert two[2]["d_loss"] == pytest.approx(one[2]["d_loss"], rel=1e-4)
    assert two[3]["d_loss"] == pytest.approx(one[3]["d_loss"], rel=1e-4)


def test_statistics_of_one_and_of_two_processes_are_those_of_all_images(
        paper_decoder, decoder_of_two, photographs):
    folder = train.Photographs(photographs)
    c = {"seed": 0, "stage": "statistics", "resolution": 32}
    samples = train.Samples(folder, folder.classes, c)
    encoder = rae.Encoder(TINY_VIT, 32, weights="random")
    z = torch.cat([encoder(samples[i][0][None] / 255) for i in range(60)]).double()

    for out in (paper_decoder, decoder_of_two):
        state = dit.load_file(out / "rae.pt")["rae"]["state"]
        assert relative(state["var"], z.var(0, unbiased=False)) < 1e-5
        assert ((state["mean"] - z.mean(0)) / z.std(0)).abs().max() < 1e-4


# A released teacher, which knows ImageNet's classes

@pytest.fixture(scope="module")
def released(trained, photographs, tmp_path_factory):
    """A folder with a teacher of 1,000 classes, mid.pt trained from it, and images of three."""
    folder = tmp_path_factory.mktemp("released")
    teacher = dit.DiTDH(4, 96, num_classes=1000, **dit.MODELS["toy"])
    torch.save({"ema": teacher.state_dict()}, folder / "teacher.pt")
    copy_inputs(trained, folder, "rae")
    for i, name in enumerate(("n02099601", "n01440764", "n07753592")):
        shutil.copytree(photographs / str(i), folder / "data" / name)
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_process(monkeypatch, "--toy", "--out", folder, *TINY, "--stage", "mid",
                   "--teacher", folder / "teacher.pt")
    return folder


def test_the_student_of_a_released_teacher_has_imagenets_names(released):
    classes = dit.load_file(released / "mid.pt")["classes"]

    assert tuple(classes) == sample.class_names()
    assert classes[207] == "golden retriever"


def test_images_have_the_released_teachers_labels(released, monkeypatch):
    get = train.Samples.__getitem__
    labels = []

    def get_and_note(self, n):
        item = get(self, n)
        labels.append(int(item[1]))
        return item
    monkeypatch.setattr(train.Samples, "__getitem__", get_and_note)

    in_process(monkeypatch, "--toy", "--out", released, *TINY, "--stage", "distill",
               "--teacher", released / "teacher.pt", "--data", released / "data")

    assert set(labels[-32:]) == {0, 207, 954}   # tench, golden retriever, banana


def test_images_of_no_class_of_the_network_are_refused(
        released, photographs, monkeypatch, capsys):
    line = refusal(monkeypatch, capsys, "--toy", "--out", released, *TINY, "--stage", "drift",
                   "--data", photographs, "--init", released / "teacher.pt")

    assert "--data" in line
    assert "'0'" in line


# --compile, scores, and the whole toy

MID_STEPS = train.TABLE["paper 256"]["mid"]["num_points"] - 1      # of the solver, a trajectory


@pytest.mark.parametrize("stage, derivative, callables, evaluations", (
    ("distill", "jvp", 3, 4), ("distill", "fd", 3, 4), ("bootstrap", "jvp", 2, 2),
    ("mid", None, 2, 2 * MID_STEPS + 1)))
def test_compiled_steps_run_compiled(
        stage, derivative, callables, evaluations, photographs, trained, tmp_path, monkeypatch):
    """A backend counts graphs and runs: a step runs the network and the derivative once.

    The guided teacher runs twice for a velocity, in stage mid in each step of its solver.
    """
    graphs = []
    runs = []
    compile_ = torch.compile

    def backend(graph, inputs):
        graphs.append(graph)

        def call(*values):
            runs.append(graph)
            return graph(*values)
        return call
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda target: compile_(target, backend=backend))
    monkeypatch.setattr(meanflow, "total_derivative", meanflow.total_derivative)    # restored
    command = a_run(trained, photographs, tmp_path, stage, "--steps", 2, "--sample_every", 99)

    in_process(monkeypatch, *command, "--compile",
               *(("--derivative", derivative) if derivative else ()))

    assert len(graphs) >= callables
    assert len(runs) == 2 * evaluations
    if derivative != "fd":
        for step in (1, 2):
            expected = losses(trained, stage)[step]
            assert losses(tmp_path, stage)[step] == pytest.approx(expected, rel=1e-3)


def mean_colours(*_):
    """In place of Inception: an extractor whose features are the means of the three channels."""
    def extract(images):
        return {"pool": images.float().mean((2, 3))}
    return fid.Extractor(extract, "inception-test", 3)


@pytest.fixture
def scored(photographs, trained, tmp_path, monkeypatch):
    """A function that runs bootstrap with --ref at steps 3 and 4, scores of 40 samples."""
    monkeypatch.setattr(fid, "make_extractor", mean_colours)
    monkeypatch.setattr(train, "NUM_SCORED", 40)
    np.savez(tmp_path / "ref.npz", train.make_toy_images(30, seed=2)[0])

    def run_bootstrap(*more):
        command = a_run(trained, photographs, tmp_path, "bootstrap", "--steps", 4)
        in_process(monkeypatch, *command, "--sample_every", 3, "--ref", tmp_path / "ref.npz",
                   *more)
    return run_bootstrap


def scores_of(out, stage):
    return {line["step"]: line["scores"] for line in lines_of(out, stage) if "scores" in line}


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_scores_during_training_are_those_of_sample_and_fid(
        precision, scored, tmp_path, monkeypatch, capsys):
    """Sampling knows nothing of the training's autocast and of its precision of products."""
    scored("--precision", precision)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--ckpt", f"{tmp_path}/bootstrap.pt",
                                      "--num", "40", "--npz", f"{tmp_path}/made.npz",
                                      "--device", "cpu"])
    sample.main()
    capsys.readouterr()

    fid.main([f"{tmp_path}/made.npz", f"{tmp_path}/ref.npz", "--json", "--device", "cpu"])

    offline = json.loads(capsys.readouterr().out.splitlines()[-1])
    scores = scores_of(tmp_path, "bootstrap")
    assert [*scores] == [3, 4]
    assert scores[4].pop("extractor") == offline.pop("extractor")
    assert scores[4] == pytest.approx(offline, rel=1e-6)


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_pictures_during_training_are_those_of_sample(
        precision, photographs, trained, tmp_path, monkeypatch):
    command = a_run(trained, photographs, tmp_path, "bootstrap", "--steps", 4)
    in_process(monkeypatch, *command, "--precision", precision, "--sample_every", 99)

    network, autoencoder, alpha, _ = sample.load_all(tmp_path / "bootstrap.pt")
    (_, images), = sample.make_images(network, autoencoder, alpha, torch.arange(3).repeat(4))

    picture = Image.open(tmp_path / "bootstrap.000004.png")
    assert np.array_equal(np.asarray(picture), np.asarray(sample.draw_grid(images, 3)))


def test_scores_come_again_after_a_kill_and_change_no_step(scored, trained, tmp_path):
    scored()
    first = scores_of(tmp_path, "bootstrap")
    previous = tmp_path / "bootstrap.previous.pt"
    previous.replace(tmp_path / "bootstrap.pt")                 # as if killed after step 2

    scored()

    assert scores_of(tmp_path, "bootstrap") == first
    assert losses(tmp_path, "bootstrap") == losses(trained, "bootstrap")


def test_the_whole_toy_in_two_processes_reports_and_a_dry_run_leaves_nothing(tmp_path):
    def quick_report(rank):
        """Its samples are thirty, each ten times, and its classifier takes one step."""
        make_images = fid.make_images
        train_classifier = fid.train_classifier

        def thirty_images(network, autoencoder, alpha, labels, steps, **options):
            few = make_images(network, autoencoder, alpha, labels[:30], steps, **options)
            for numbers, images in few:
                yield numbers, images.repeat(10, 1, 1, 1)

        def one_step(images, labels, num_classes, device, steps):
            return train_classifier(images, labels, num_classes, device, steps=1)
        fid.make_images = thirty_images
        fid.train_classifier = one_step

    status, lines = run(tmp_path, "--toy", "--dry_run", "--out", tmp_path / "toy",
                        "--batch_size", 8, "--device", "cpu", world=2, fault=quick_report)

    assert status == [0, 0], lines
    stages = ("flow ", "mid ", "drift ")
    rows = [line.split()[:2] for line in lines if line.startswith(stages)]
    students = [[stage, steps] for stage in ("mid", "drift") for steps in ("1", "2", "4")]
    assert rows == [["flow", "25"], ["flow", "4"], ["flow", "1"], *students]
    assert not (tmp_path / "toy" / "dry_run").exists()


# Kills, signals, full disks and damaged files

def killed_while_writing(rank):
    """A fault: killed when half of the checkpoint of step 4 is on the disk."""
    save = torch.save

    def write(content, path):
        save(content, path)
        if content["step"] == 4:
            os.truncate(path, 999)
            kill()
    torch.save = write


def killed_between_renames(rank):
    """A fault: killed when the checkpoint of step 2 has moved away for that of step 4."""
    replace = Path.replace

    def rename(self, target):
        target = Path(target)
        if target.suffix == ".pt" and target.with_suffix(".previous.pt").exists():
            kill()
        return replace(self, target)
    Path.replace = rename


@pytest.mark.parametrize("fault", (
    at_step(3, kill), killed_while_writing, killed_between_renames),
    ids=("in_a_step", "while_writing", "between_renames"))
def test_a_killed_run_goes_on_bit_for_bit(fault, trained, photographs, tmp_path):
    command = a_run(trained, photographs, tmp_path / "out", "bootstrap", "--steps", 4)
    status, lines = run(tmp_path, *command, fault=fault)
    assert status == [-signal.SIGKILL], lines

    status, lines = run(tmp_path, *command)

    assert status == [0], lines
    assert_equal_runs(tmp_path / "out", trained, "bootstrap")


@pytest.mark.parametrize("name, world", (
    ("SIGTERM", 1), ("SIGINT", 1), ("SIGUSR1", 1), ("SIGTERM", 2)))
def test_signals_save_and_end_and_the_same_command_goes_on(
        name, world, trained, photographs, straight, tmp_path):
    number = getattr(signal, name)
    command = a_run(trained, photographs, tmp_path / "out", "bootstrap", "--steps", 4)

    def send():
        os.kill(os.getpid(), number)

    def fault(rank):
        if rank == world - 1:                   # of two processes, the second alone has it
            at_step(2, send)(rank)

    status, lines = run(tmp_path, *command, world=world, fault=fault)

    assert status == [128 + number] * world, lines
    assert some_line(lines, "bootstrap", name, "step 3")
    assert dit.load_file(tmp_path / "out" / "bootstrap.pt")["step"] == 3
    assert run(tmp_path, *command, world=world)[0] == [0] * world
    assert_equal_runs(tmp_path / "out", straight[world], "bootstrap")


def test_the_last_step_is_saved_before_its_statistics(
        photographs, trained, tmp_path, monkeypatch):
    command = a_run(trained, photographs, tmp_path, "rae", "--steps", 4)
    with monkeypatch.context() as stopped, pytest.raises(Stopped):
        stopped.setattr(rae.RAE, "measure", stop)
        in_process(stopped, *command)
    content = dit.load_file(tmp_path / "rae.pt")
    assert content["step"] == 4
    assert "rae" not in content

    in_process(monkeypatch, *command)

    ours, theirs = (dit.load_file(out / "rae.pt")["rae"]["state"] for out in (tmp_path, trained))
    assert torch.equal(ours["mean"], theirs["mean"])
    assert torch.equal(ours["var"], theirs["var"])


def test_the_last_step_is_saved_before_its_scores(scored, tmp_path, monkeypatch):
    with monkeypatch.context() as stopped, pytest.raises(Stopped):
        stopped.setattr(train.Run, "score", stop)
        scored("--sample_every", 99)
    assert dit.load_file(tmp_path / "bootstrap.pt")["step"] == 4

    scored("--sample_every", 99)

    assert [*scores_of(tmp_path, "bootstrap")] == [4]


def test_a_full_disk_ends_the_run_and_the_checkpoint_before_stays_whole(
        trained, photographs, tmp_path, monkeypatch):
    command = a_run(trained, photographs, tmp_path, "bootstrap", "--steps", 4)
    save = torch.save

    def write(content, path):
        save(content, path)
        if content["step"] == 4:
            os.truncate(path, 999)
            raise OSError("No space left on device")
    with monkeypatch.context() as full, pytest.raises(OSError, match="No space"):
        full.setattr(torch, "save", write)
        in_process(full, *command)
    assert dit.load_file(tmp_path / "bootstrap.pt")["step"] == 2

    in_process(monkeypatch, *command)

    assert_equal_runs(tmp_path, trained, "bootstrap")


def test_an_error_of_writing_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("before")

    def write(temporary):
        temporary.write_text("ha")
        raise OSError("No space left on device")
    with pytest.raises(OSError, match="No space"):
        sample.write_whole(path, write)

    assert path.read_text() == "before"


def cut(content):
    return content[:-1000]


def flip_a_bit(content):
    middle = len(content) // 2
    flipped = bytes([content[middle] ^ 1])
    return content[:middle] + flipped + content[middle + 1:]


@pytest.mark.parametrize("damage", (cut, flip_a_bit))
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
        damage, trained, photographs, tmp_path, monkeypatch, capsys):
    command = a_run(trained, photographs, tmp_path, "bootstrap", "--steps", 4)
    stopped_run(monkeypatch, 4, *command)
    path = tmp_path / "bootstrap.pt"
    path.write_bytes(damage(path.read_bytes()))
    capsys.readouterr()

    in_process(monkeypatch, *command)

    assert some_line(capsys.readouterr().err.splitlines(), f"{path}:", "damaged")
    assert_equal_runs(tmp_path, trained, "bootstrap")


def test_without_a_whole_checkpoint_a_run_is_refused_and_nothing_is_overwritten(
        trained, photographs, tmp_path, monkeypatch, capsys):
    command = a_run(trained, photographs, tmp_path, "bootstrap", "--steps", 4)
    files = [tmp_path / "bootstrap.pt", tmp_path / "bootstrap.previous.pt"]
    for file in files:
        file.write_bytes(cut((trained / "bootstrap.pt").read_bytes()))
    before = files[0].read_bytes()

    line = refusal(monkeypatch, capsys, *command)

    assert f"{files[0]}" in line
    assert [file.read_bytes() for file in files] == [before, before]


# Steps that are not finite

def spoiled(is_spoiled):
    """A fault: the noise of the last row of a step is no number; the last process draws it."""
    def fault(rank):
        draw_rows = train.draw_rows

        def draw(run, step):
            draws = draw_rows(run, step)
            if is_spoiled(step) and run.place.rank == run.place.world - 1:
                draws["noise"][-1] = math.nan
            return draws
        train.draw_rows = draw
    return fault


def assert_nothing_learnt(before, after):
    """Equal weights, averages and moments, the discriminator's too."""
    assert after["step"] == before["step"] + 1
    assert after["skipped"] == before["skipped"] + 1
    for part in ("model", "ema", "discriminator"):
        for name, value in before.get(part, {}).items():
            assert torch.equal(value, after[part][name]), name
    for part in {"optimizer", "d_optimizer"} & before.keys():
        for k, moments in before[part]["state"].items():
            for name, value in moments.items():
                assert torch.equal(value, after[part]["state"][k][name]), name


@pytest.mark.parametrize("world", (1, 2))
def test_a_step_without_finite_gradient_changes_nothing(world, trained, photographs, tmp_path):
    out = tmp_path / "out"
    command = a_run(trained, photographs, out, "distill", "--save_every", 1, "--steps", 4)

    status, lines = run(tmp_path, *command, world=world, fault=spoiled(lambda step: step == 3))

    assert status == [0] * world, lines
    assert some_line(lines, "distill", "step 4")
    before, after = (dit.load_file(out / f"distill{end}.pt") for end in (".previous", ""))
    assert (before["step"], before["skipped"]) == (3, 0)
    assert_nothing_learnt(before, after)


def test_a_discriminator_without_finite_gradient_changes_nothing(
        photographs, lpips, tmp_path, monkeypatch):
    """The decoder's loss and gradient are finite in this step, and yet it does not learn either."""
    learn = rae.Adversary.learn

    def learn_badly(self, *arguments):
        metrics = learn(self, *arguments)
        next(self.heads.parameters()).grad.fill_(math.nan)
        return metrics
    monkeypatch.setattr(rae.Adversary, "learn", learn_badly)

    stopped_run(monkeypatch, 2, "--data", photographs, *DECODER, "--out", tmp_path)

    before, after = (dit.load_file(tmp_path / f"rae{end}.pt") for end in (".previous", ""))
    assert (before["step"], before["skipped"]) == (1, 0)        # it learns from the second on
    assert_nothing_learnt(before, after)


@pytest.mark.parametrize("world", (1, 2))
def test_ten_steps_without_finite_gradient_end_the_run(world, trained, photographs, tmp_path):
    out = tmp_path / "out"
    command = a_run(trained, photographs, out, "bootstrap", "--steps", 40, "--save_every", 2,
                    "--sample_every", 99)

    status, lines = run(tmp_path, *command, world=world, fault=spoiled(lambda step: step > 0))

    assert status == [1] * world
    assert some_line(lines, "bootstrap", "ten steps")
    content = dit.load_file(out / "bootstrap.pt")
    assert content["step"] == 10
    status, lines = run(tmp_path, *command, "--steps", 12, world=world)
    assert status == [0] * world, lines
    assert sorted(losses(out, "bootstrap")) == [*range(1, 13)]


def test_the_log_is_strict_json_also_after_a_skipped_step(trained, photographs, tmp_path):
    out = tmp_path / "out"
    command = a_run(trained, photographs, out, "bootstrap", "--steps", 2)

    status, lines = run(tmp_path, *command, fault=spoiled(lambda step: step == 0))

    assert status == [0], lines
    text = (out / "bootstrap.jsonl").read_text()
    log = [json.loads(line, parse_constant=stop) for line in text.splitlines()]     # NaN, Infinity
    steps = [line for line in log if "lr" in line]
    assert [line["loss"] is None for line in steps] == [True, False]
    assert [line["skipped"] for line in steps] == [1, 1]


# Processes: workers that read files, and other runs

WITH_WORKERS = (*TINY, *RANDOM, "--stage", "rae", "--encoder", TINY_VIT, "--perceptual", 0,
                "--adversarial", 0, "--workers", 2)


def test_a_crash_with_workers_that_read_files_ends_the_run(photographs, tmp_path):
    """The loader ends its workers with SIGTERM. With the handler of the run they would ignore it,
    and the run would wait for them for ever."""
    def crash():
        raise IndexError("a bug in the loop")
    command = ("--data", photographs, *WITH_WORKERS, "--out", tmp_path / "out")

    processes = start(tmp_path, training(command, at_step(1, crash)))
    status, lines = finish(tmp_path, processes, seconds=60)

    assert status == [1]
    assert some_line(lines, "a bug in the loop")


def test_a_signal_to_the_group_saves_although_the_workers_get_it_too(photographs, tmp_path):
    """As torchrun sends it: workers that ended first would end the run before it has saved."""
    def signal_the_group():
        os.killpg(0, signal.SIGTERM)

    def fault(rank):
        os.setsid()
        at_step(2, signal_the_group)(rank)
    command = ("--data", photographs, *WITH_WORKERS, "--out", tmp_path / "out")

    status, lines = run(tmp_path, *command, fault=fault)

    assert status == [128 + signal.SIGTERM], lines
    assert dit.load_file(tmp_path / "out" / "rae.pt")["step"] == 3


def wait_for(condition, seconds=60):
    for _ in range(20 * seconds):
        if condition():
            return
        time.sleep(0.05)
    raise TimeoutError


def test_two_runs_never_share_a_folder(trained, photographs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = a_run(trained, photographs, out, "bootstrap", "--steps", 2)

    def wait():
        (tmp_path / "running").touch()
        wait_for((tmp_path / "go").exists)
    processes = start(tmp_path, training(command, at_step(1, wait)))
    wait_for((tmp_path / "running").exists)

    line = refusal(monkeypatch, capsys, *command)
    (tmp_path / "go").touch()
    status, lines = finish(tmp_path, processes)

    assert "--out" in line
    assert f"{out}" in line
    assert status == [0], lines
    assert sorted(losses(out, "bootstrap")) == [1, 2]
    in_process(monkeypatch, *command)           # the lock went with the process


def test_workers_of_a_killed_run_do_not_keep_its_lock(tmp_path):
    worker_file = tmp_path / "worker"

    def work(rank):
        held_lock = train.lock(tmp_path)        # noqa: F841 - kept open
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        worker_file.write_text(str(worker))
        kill()
    process, = start(tmp_path, work)
    wait_for(lambda: not process.is_alive())    # join would wait for the worker too
    worker = int(worker_file.read_text())
    os.kill(worker, 0)                          # it lives

    train.lock(tmp_path).close()                # SystemExit, if it were held

    os.kill(worker, signal.SIGKILL)


def test_a_file_system_without_locks_is_named_and_used(tmp_path, monkeypatch, capsys):
    def no_lock(*_):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(fcntl, "lockf", no_lock)

    train.lock(tmp_path).close()

    line, = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}" in line


# Parts that do not belong together

def stranger(path, what, out):
    """A checkpoint like that of `path`, but of other classes, latents, or of another RAE -> out."""
    content = dit.load_file(path)
    if what == "classes":
        content["classes"] = ("a", "b", "c")
    elif what == "RAE":
        state = content["rae"]["state"]
        state["var"] = 2 * state["var"]
    else:
        name, value = dict(latents=("in_channels", 48), number=("num_classes", 5))[what]
        content["network"][name] = value
        content["ema"] = dit.DiTDH(**content["network"]).state_dict()
        content.pop("classes")
    return saved(content, out)


@pytest.mark.parametrize("what", ("classes", "number", "latents", "RAE"))
@pytest.mark.parametrize("flag, stage", (
    ("--teacher", "flow"), ("--guidance_model", "flow"), ("--init", "mid")))
def test_parts_of_other_classes_latents_or_another_rae_are_refused(
        flag, stage, what, trained, photographs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = a_run(trained, photographs, out, "distill")
    (out / "distill.pt").unlink(missing_ok=True)
    file = stranger(trained / f"{stage}.pt", what, tmp_path / "stranger.pt")

    line = refusal(monkeypatch, capsys, *command, flag, file)

    assert what in line
    assert any(f"{path}" in line for path in (file, out / "flow.pt"))
    assert not (out / "distill.pt").exists()


def test_another_rae_than_the_teachers_is_refused(
        trained, photographs, tmp_path, monkeypatch, capsys):
    command = a_run(trained, photographs, tmp_path / "out", "distill")
    file = stranger(trained / "rae.pt", "RAE", tmp_path / "rae.pt")

    line = refusal(monkeypatch, capsys, *command, "--rae", file)

    assert "RAE" in line
    assert not (tmp_path / "out" / "distill.pt").exists()


def test_a_resolution_that_is_not_the_raes_is_refused(
        trained, photographs, tmp_path, monkeypatch, capsys):
    copy_inputs(trained, tmp_path, "rae")

    line = refusal(monkeypatch, capsys, "--stage", "flow", "--data", photographs, *TINY, *RANDOM,
                   "--out", tmp_path, "--resolution", 64)

    assert "--resolution" in line
    assert "64" in line and "32" in line
    assert not (tmp_path / "flow.pt").exists()


def other_weights(path, out):
    """A checkpoint like that of `path` whose weights are others -> out."""
    content = dit.load_file(path)
    content["ema"] = {name: 1.01 * value for name, value in content["ema"].items()}
    return saved(content, out)


@pytest.mark.parametrize("flag, part", (("--teacher", "teacher"), ("--guidance_model", "guide")))
def test_a_resumed_run_refuses_another_teacher_or_guide(
        flag, part, trained, photographs, tmp_path, monkeypatch, capsys):
    file = tmp_path / "network.pt"
    shutil.copy(trained / "flow.pt", file)
    command = a_run(trained, photographs, tmp_path / "out", "distill", flag, file)
    stopped_run(monkeypatch, 2, *command)
    file.unlink()
    other_weights(trained / "flow.pt", file)

    line = refusal(monkeypatch, capsys, *command)

    assert f"{tmp_path}/out/distill.pt" in line
    assert part in line
    assert dit.load_file(tmp_path / "out" / "distill.pt")["step"] == 2


@pytest.fixture
def published_teacher(trained, tmp_path, monkeypatch):
    """What the hub would give where OUT has no teacher: another one of the same shapes."""
    file = other_weights(trained / "flow.pt", tmp_path / "published.pt")
    monkeypatch.setattr(train, "published", lambda *_: file)
    return file


def test_the_published_teacher_is_taken_where_there_is_no_own(
        published_teacher, trained, tmp_path, monkeypatch):
    monkeypatch.setitem(train.TABLE["paper 256"]["mid"], "num_pairs", 4)
    copy_inputs(trained, tmp_path, "rae")

    in_process(monkeypatch, "--stage", "mid", *TINY, *RANDOM, "--out", tmp_path, "--steps", 1)

    config = dit.load_file(tmp_path / "mid.pt")["config"]
    ours, theirs = (dit.load_file(file)["ema"] for file in (published_teacher, trained / "flow.pt"))
    assert config["parts"]["teacher"] == train.fingerprint(ours)
    assert config["parts"]["teacher"] != train.fingerprint(theirs)


def test_a_vanished_teacher_is_not_replaced_by_the_published_one_at_the_start(
        published_teacher, trained, photographs, tmp_path, monkeypatch, capsys):
    """mid.pt was trained with flow.pt, so distill must not begin with another teacher."""
    copy_inputs(trained, tmp_path, "rae", "mid")

    line = refusal(monkeypatch, capsys, "--stage", "distill", "--data", photographs, *TINY,
                   *RANDOM, "--out", tmp_path)

    assert "teacher" in line
    assert not (tmp_path / "distill.pt").exists()


def test_a_vanished_teacher_is_not_replaced_by_the_published_one_on_resume(
        published_teacher, trained, photographs, tmp_path, monkeypatch, capsys):
    copy_inputs(trained, tmp_path, "rae", "flow", "mid")
    command = ("--stage", "distill", "--data", photographs, *TINY, *RANDOM, "--out", tmp_path)
    stopped_run(monkeypatch, 2, *command)
    (tmp_path / "flow.pt").unlink()

    line = refusal(monkeypatch, capsys, *command)

    assert "teacher" in line
    assert dit.load_file(tmp_path / "distill.pt")["step"] == 2


# Common mistakes end in one line, before any work

MISTAKES = (  # arguments, words of the line
    ("", "--stage", "--toy"),
    ("--toy --data {tmp}/nowhere", "--data", "nowhere"),
    ("--toy --data {tmp}/empty", "--data", "empty", "folder"),
    ("--toy --data {data}", "--data", "2,570"),
    ("--toy --stage mid", "out/flow.pt"),
    ("--toy --stage mid --teacher {trained}/distill.pt", "distill.pt", "average velocity"),
    ("--toy --stage bootstrap --data {data} --init {trained}/rae.pt", "rae.pt"),
    ("--toy --stage rae --init {trained}/mid.pt", "--init", "flow"),
    ("--toy --stage flow --adaptive_p 0", "--adaptive_p", "flow"),
    ("--toy --stage mid --recipe paper --guidance_model {trained}", "--guidance_model"),
    ("--toy --stage mid --ref {tmp}/nowhere", "--ref", "nowhere"),
    ("--report {tmp}/nowhere.pt", "--report", "nowhere"),
    ("--toy --stage mid --starts {tmp}/unfinished", "unfinished/flow.pt", "step 3"),
    ("--stage mid", "stage2_model.pt", "--weights"),
    ("--stage mid --resolution 64", "64", "--teacher"),
    ("--stage flow", "--data"),
    ("--stage rae --data {data} --encoder hf-hub:a/b", "hf-hub:a/b"),
    ("--toy --device cuda", "--device"),
)


@pytest.mark.parametrize("arguments, words", [(text, words) for text, *words in MISTAKES])
def test_common_mistakes_end_in_one_line_before_any_work(
        arguments, words, photographs, trained, tmp_path, monkeypatch, capsys):
    def no_network(*_):
        raise OSError
    monkeypatch.setattr(rae, "hf_hub_download", no_network)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    if "--starts" in arguments:                 # OUT holds a teacher that is not finished
        out = tmp_path / "unfinished"
        unfinished = dit.load_file(trained / "flow.pt") | {"step": 3}
        saved(unfinished, out / "flow.pt")
        arguments = arguments.partition("--starts")[0]
    places = dict(tmp=tmp_path, data=photographs, trained=trained)
    command = arguments.format(**places).split()

    line = refusal(monkeypatch, capsys, *command, "--out", out)

    assert some_line([line], *words), line
    assert not [path for path in out.glob("*.pt") if path.name != "flow.pt"]


@pytest.mark.parametrize("flag, value", (
    ("--steps", "0"), ("--steps", "x"), ("--steps", "1.5"), ("--batch_size", "-1"),
    ("--micro_batch", "0"), ("--lr", "0"), ("--lr", "nan"), ("--flip", "1.5"), ("--flip", "-0.1"),
    ("--guidance_scale", "-1"), ("--ratio_r_is_0", "2"), ("--ratio_r_not_equal_t", "-1"),
    ("--adaptive_p", "1.1"), ("--perceptual", "-1"), ("--adversarial", "-1"), ("--seed", "-1"),
    ("--workers", "-1"), ("--save_every", "0"), ("--sample_every", "0"), ("--resolution", "100"),
    ("--derivative", "exact"), ("--device", "gpu"), ("--precision", "fp16"), ("--model", "L")))
def test_values_that_no_run_can_have_are_refused(flag, value, tmp_path, monkeypatch, capsys):
    line = refusal(monkeypatch, capsys, "--toy", "--stage", "mid", "--out", tmp_path / "out",
                   f"{flag}={value}")

    assert flag in line
    assert value in line
    assert not (tmp_path / "out").exists()


def test_a_batch_that_the_processes_do_not_divide_is_refused(trained, photographs, tmp_path):
    command = a_run(trained, photographs, tmp_path / "out", "bootstrap", "--batch_size", 7)

    status, lines = run(tmp_path, *command, world=2)

    assert status == [1, 1]
    assert some_line(lines, "--batch_size", "7", "2")


def test_out_of_memory_ends_in_one_line_that_names_what_helps(
        trained, photographs, tmp_path, monkeypatch, capsys):
    def too_much(*_):
        raise torch.OutOfMemoryError
    monkeypatch.setattr(train, "train", too_much)

    line = refusal(monkeypatch, capsys, "--toy", "--out", tmp_path, "--stage", "mid")

    assert some_line([line], "mid", "--micro_batch", "--checkpointing")


def test_hidden_folders_are_no_classes(photographs, tmp_path):
    """Notebooks leave .ipynb_checkpoints beside the classes."""
    data = tmp_path / "data"
    shutil.copytree(photographs, data)
    shutil.copytree(photographs / "0", data / ".ipynb_checkpoints")

    folder = train.Photographs(data)

    assert tuple(folder.classes) == ("0", "1", "2")
    assert len(folder) == 60


@pytest.mark.parametrize("names", (("train", "test"), ("train", "val"), ("validation",)))
def test_a_folder_of_train_and_test_is_no_folder_of_classes(
        names, photographs, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    for name in names:
        shutil.copytree(photographs, data / name)

    line = refusal(monkeypatch, capsys, "--toy", "--stage", "rae", "--data", data,
                   "--out", tmp_path / "out")

    assert "--data" in line
    assert f"{data / names[-1]}" in line or f"{data / names[0]}" in line
    assert not (tmp_path / "out" / "rae.pt").exists()


# --------------------------------------------------------------------------------------------------
# README

README = HERE / "README.md"
LAUNCHER = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--max_restarts",
            "--signal"}


def flags_of_scripts():
    """{script: its flags}, read off the calls of add_argument."""
    flags = {}
    for script in HERE.glob("*.py"):
        calls = re.findall(r"add(?:_argument)?\(\s*\"(--\w+)", script.read_text())
        flags[script.name] = set(calls)
    flags["train.py"] |= {f"--{name}" for name in train.FLAGS}
    return flags


def commands_of_readme():
    """The commands that run a script, from README's blocks of code and its lines."""
    text = README.read_text()
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```$", text, re.S | re.M))
    lines = blocks.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.split("#")[0].split("&&")]
    inline = re.findall(r"`((?:python|torchrun) [^`]*\.py[^`]*)`", text)
    return [part for part in parts if re.search(r"(python3?|torchrun) .*\.py", part)] + inline


def test_flags_that_readme_names_exist():
    known = LAUNCHER.union(*flags_of_scripts().values())

    named = set(re.findall(r"(?<![\w-])--[a-z]\w+", README.read_text()))

    assert named <= known


def test_commands_of_readme_have_flags_of_their_scripts():
    flags = flags_of_scripts()
    commands = commands_of_readme()
    assert len(commands) > 10

    for command in commands:
        before, script, after = re.match(r"(.*?)(\w+\.py)(.*)", command).groups()
        assert script in flags, command
        assert set(re.findall(r"--[a-z]\w+", after)) <= flags[script], command
        assert set(re.findall(r"--[a-z]\w+", before)) <= LAUNCHER, command


def test_files_and_headings_that_readme_links_exist():
    text = README.read_text()
    files = re.findall(r"\]\((?!http|#)([^)#]+)", text)
    anchors = re.findall(r"\]\(#([^)]+)\)", text)

    headings = re.findall(r"^##+ (.*)", text, re.M)
    plain = [re.sub(r"[^\w -]", "", heading).strip().lower() for heading in headings]

    assert [file for file in files if not (HERE / file).exists()] == []
    assert set(anchors) <= {heading.replace(" ", "-") for heading in plain}


def test_lines_that_readme_links_hold_the_functions_that_it_names():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README.read_text())

    for name, file, number in links:
        line = (HERE / file).read_text().splitlines()[int(number) - 1]
        assert re.match(rf"\s*(def|class) {name}\b|{name} = ", line), f"{file}#L{number}: {name}"


def test_tests_that_readme_names_exist():
    names = re.findall(r"`(test_\w+)[.]*`", README.read_text())

    tests = Path(__file__).read_text()

    assert [name for name in names if name != "test_all" and f"def {name}" not in tests] == []


def test_readme_has_the_two_commands_that_set_up():
    beginning = "pip install -r requirements.txt && "
    lines = README.read_text().splitlines()

    set_up = [line for line in lines if line.startswith(beginning)]

    assert len(set_up) >= 2
    assert "train.py --toy" in set_up[0]
    assert "pytest" in set_up[1]


# --------------------------------------------------------------------------------------------------
# What a step costs: `python test_all.py --bench`, --memory and --gpu
#
# A stage is built by train.Run itself, but of networks with random weights, and a step is made of
# the pieces that train.train() is made of. So there is no second implementation of a stage here.

WEIGHT_NOISE = 0.02  # added to all weights, since a layer of zeros hides every layer before it
NUM_GPUS = 8  # on which a stage trains; a measurement has the rows of one of them


class RandomRun(train.Run):
    """A stage as train.Run builds it, but of random weights, without files and without images."""

    def __init__(self, args, stage):
        toy = args.model == "toy"
        self.args = stage_arguments(args, stage)
        self.c = stage_settings(args, stage)
        self.stage = stage
        self.place = sample.Place(rank=0, world=1, device=args.device)
        self.device = args.device
        self.step = self.c["steps"] - 1                     # the discriminator trains by now
        self.state = {}
        self.encoded = toy and stage != "rae"               # the toy's latents lie in memory

        data = SimpleNamespace(classes=range(10 if toy else 1000))
        networks = mock.patch.object(train, "choose_networks", random_networks)
        with networks, torch.device(self.device):
            self.build(data)

    def describe(self, data):
        """Nothing is written: there is no folder."""

    def set_callables(self):
        with torch.no_grad():
            for network in filter(None, [self.model, self.teacher]):
                for weight in network.parameters():
                    weight += WEIGHT_NOISE * torch.randn_like(weight)
        super().set_callables()

    def batch(self):
        """-> random images, of the toy latents, and labels, as Run.load yields them."""
        B = self.c["batch_size"]
        size = self.args.resolution
        rows = (B, self.c["samples"]) if "samples" in self.c else (B,)
        with torch.device(self.device):
            y = torch.zeros(B, dtype=torch.long)                                # (B,)
            if self.encoded:
                return torch.randn(*rows, *self.rae.latent_shape), y            # (B, [M,] C, G, G)
            return torch.randint(256, (*rows, 3, size, size), dtype=torch.uint8), y

    def activation_units(self):
        """Tokens times layers times width of one sample, as in train.default_micro_batch."""
        matrices = [weight for weight in self.params if weight.dim() == 2]
        layers = sum(weight.shape[0] for weight in matrices) / 16
        return self.rae.latent_shape[1] ** 2 * layers


def stage_arguments(args, stage):
    """What the command line of train.py would give for a stage, of the size args.model."""
    toy = args.model == "toy"
    given = {
        "stage": stage, "toy": toy, "resolution": 32 if toy else args.resolution, "seed": 0,
        "recipe": "paper", "data": None, "model": args.model, "encoder": None, "weights": "random",
        "wandb": False,
    }
    for name in ("batch_size", "micro_batch", "precision", "compile", "checkpointing"):
        given[name] = getattr(args, name)
    if stage in ("distill", "bootstrap"):
        given["derivative"] = args.derivative
    return argparse.Namespace(**dict.fromkeys(train.FLAGS) | given)


def stage_settings(args, stage):
    """The settings of a stage, whose batch is by default that of one of eight GPUs."""
    c = train.settings(stage, stage_arguments(args, stage))
    if args.model != "toy" and args.batch_size is None:
        c["batch_size"] //= NUM_GPUS
    return c


def num_samples(c):
    """How many samples go through the network with a gradient, in a step of these settings."""
    return c["batch_size"] * c.get("num_pairs", c.get("num_moved", 1))


def random_networks(run, data):
    """In place of train.choose_networks: an RAE, the start of the stage, and its teacher."""
    toy = run.args.toy
    size = run.args.resolution
    stage = train.STAGES[run.stage]
    encoder = rae.Encoder("toy" if toy else None, size, weights="random").eval()
    channels = encoder.config["channels"]
    grid = encoder.grid
    decoder = rae.Decoder(channels, grid, size // grid, **rae.DECODERS["toy" if toy else "XL"])
    run.rae = rae.RAE(encoder, decoder).requires_grad_(False)
    run.alpha = meanflow.alpha_of(channels, grid)
    run.classes = tuple(data.classes)

    def network(average_velocity):
        return dit.DiTDH(grid, channels, num_classes=len(run.classes),
                         average_velocity=average_velocity, **dit.MODELS[run.args.model])

    run.model = network(stage.average_velocity)
    if stage.needs_teacher:
        run.teacher = network(False).requires_grad_(False)


def take_step(run, x, y, lap=lambda piece: None):
    """The step of train.train(), without its log. lap is called after each piece, with its name."""
    draws = train.draw_rows(run, run.step)
    lap("draws")

    if run.stage == "rae":
        train.rae_gradients(run, x, y, draws)
    else:
        stage = train.STAGES[run.stage]
        y = torch.where(draws["dropped"], len(run.classes), draws.get("y", y))
        with torch.no_grad(), run.autocast():
            x = run.latents(x) if stage.needs_images else None
            lap("encode")
            inputs, target = stage.target(run, x, y, draws)
        lap("target")
        for rows, share in run.micro_batches(len(target)):
            with run.autocast():
                prediction = run.net(*[values[rows] for values in inputs])
                loss, _ = meanflow.regression_loss(
                    prediction, target[rows], run.c.get("adaptive_p", 0))
            (loss * share).backward()
    lap("gradient")

    torch.nn.utils.clip_grad_norm_(run.params, 1)
    run.optimizer.step()
    update_ema = train.get_ema_multi_avg_fn(0.999)
    update_ema(run.ema_params, run.params, None)
    if run.trains_discriminator():
        run.adversary.step(1e-4)
    for optimizer in run.optimizers:
        optimizer.zero_grad()
    lap("update")


@contextmanager
def process_restored():
    """Undo what a run changes for its whole process: TF32, and a compiled derivative."""
    matmul_precision = torch.get_float32_matmul_precision()
    try:
        with mock.patch.object(meanflow, "total_derivative", meanflow.total_derivative):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul_precision)


# --------------------------------------------------------------------------------------------------
# --bench: time

def is_gpu(device):
    return device.startswith("cuda")


def seconds_of(function, device="cpu"):
    """How long a call of a function takes, with all that it leaves to the GPU."""
    synchronize(device)
    clock = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - clock


def synchronize(device):
    if is_gpu(device):
        torch.cuda.synchronize()


class Laps:
    """Milliseconds of each piece of each step."""

    def __init__(self, device):
        self.device = device
        self.steps = []

    def start(self):
        self.steps.append({})
        synchronize(self.device)
        self.clock = time.perf_counter()

    def __call__(self, piece):
        """What went by since the last call was this piece of the step."""
        synchronize(self.device)
        now = time.perf_counter()
        pieces = self.steps[-1]
        pieces[piece] = pieces.get(piece, 0) + 1000 * (now - self.clock)
        self.clock = now

    def apart(self, network):
        """The same network, whose time is the piece "network" and no longer part of "target"."""
        def evaluate(*inputs):
            self("target")
            output = network(*inputs)
            self("network")
            return output
        return evaluate

    def medians(self):
        pieces = {}
        for piece in self.steps[0]:
            pieces[piece] = float(np.median([step[piece] for step in self.steps]))
        return {"ms": sum(pieces.values())} | pieces


def tflops_of_products(device, dtype):
    """TFLOP/s of a large matrix product, which is the most that a network can reach."""
    size = 8192 if is_gpu(device) else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    fastest = min(seconds_of(lambda: a @ a, device) for _ in range(20))
    return 2 * size**3 / fastest / 1e12


def peak_tflops(args):
    return tflops_of_products(
        args.device, torch.bfloat16 if args.precision == "bf16" else torch.float32)


def bench_stage(args, stage, peak, repeats=5):
    """-> a dictionary: milliseconds of each piece of a step, images/s, on CUDA GiB, and so on.

    "network" is the teacher in "target", and in drift the student, whose samples are moved.
    """
    run = RandomRun(args, stage)
    x, y = run.batch()
    laps = Laps(args.device)
    in_target = "student" if stage == "drift" else "teacher"
    if getattr(run, in_target):
        setattr(run, in_target, laps.apart(getattr(run, in_target)))

    def step():
        laps.start()
        take_step(run, x, y, laps)

    row = {"stage": stage, "micro_batch": run.micro_batch}
    if is_gpu(args.device):
        row["predicted_GiB"] = predicted_gpu_bytes(run) / 2**30
    row["first_s"] = seconds_of(step, args.device)          # with --compile, of compiling too
    if not args.compile:                                    # whose operations the counter misses
        with FlopCounterMode(display=False) as counter:
            step()
        row["tflop"] = counter.get_total_flops() / 1e12

    if is_gpu(args.device):
        torch.cuda.reset_peak_memory_stats()
    laps.steps.clear()
    for _ in range(repeats):
        step()
    row |= laps.medians()
    row["images_per_s"] = 1000 * num_samples(run.c) / row["ms"]
    if "tflop" in row:
        row["share_of_peak"] = share_of_peak(row, row["tflop"], peak)
    if is_gpu(args.device):
        row["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def share_of_peak(row, tflop, peak):
    return 1000 * tflop / row["ms"] / peak


def predicted_gpu_bytes(run):
    """The most that a run will hold, by the rule of train.default_micro_batch, before a step."""
    size = 10 if run.args.checkpointing else 70 if run.c["precision"] == "bf16" else 130
    weights = sum(weight.numel() for weight in run.params)
    activations = run.micro_batch * size * run.activation_units()
    return torch.cuda.memory_allocated() + 12 * weights + activations


def short(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def rounded(row):
    """A row whose numbers have four digits, as they are printed."""
    return {name: float(short(value)) if isinstance(value, float) else value
            for name, value in row.items()}


def print_row(row):
    print("  ".join(f"{name} {short(value)}" for name, value in row.items()), flush=True)


def bench(args):
    """A line for each stage; the last line is one JSON object."""
    peak = peak_tflops(args)
    rows = []
    for stage in train.STAGES if args.stage == "all" else [args.stage]:
        with process_restored():
            rows.append(bench_stage(args, stage, peak))
        print_row(rows[-1])
    result = {"matmul_tflops": peak, "torch": torch.__version__, "rows": rows}
    print(json.dumps(vars(args) | result))


# --------------------------------------------------------------------------------------------------
# --memory: which micro-batch fits, from shapes alone

class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.alive = set()
        self.now = 0
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if torch.is_tensor(value):
                self.count(value.untyped_storage())
        self.bytes = max(self.bytes, self.now)
        return result

    def count(self, storage):
        key = storage._cdata
        if key not in self.alive:
            self.alive.add(key)
            self.now += storage.nbytes()
            weakref.finalize(storage, self.free, key, storage.nbytes())

    def free(self, key, size):
        self.alive.remove(key)
        self.now -= size


def peak_bytes(args, stage):
    """The most bytes that two steps hold, of which the second has moments -> (bytes, the run)."""
    with process_restored(), Peak() as peak:
        run = RandomRun(args, stage)
        x, y = run.batch()
        for _ in range(2):
            take_step(run, x, y)
    return peak.bytes, run


def predicted_bytes(args, stage):
    """The same from shapes alone: nothing is computed, and nothing is allocated.

    What depends on values is given: a fourth of the rows have r < t, and a number is 0, except in
    the optimiser, which divides by numbers if it is not fused.
    """
    args = argparse.Namespace(**vars(args) | {"device": "cpu"})
    fused = partial(torch.optim.AdamW, fused=True)

    def a_fourth(mask):
        return torch.arange(max(1, len(mask) // 4))[:, None]

    def zero(number):
        return 0

    def stay(module, device):                               # and real constants become shapes
        for part in module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, buffer.clone())
        return module

    with FakeTensorMode(allow_non_fake_inputs=True), \
            mock.patch.object(torch.Tensor, "nonzero", a_fourth), \
            mock.patch.object(torch.Tensor, "item", zero), \
            mock.patch.object(torch.optim, "AdamW", fused), \
            mock.patch.object(torch.nn.Module, "to", stay):
        return peak_bytes(args, stage)


def memory(args):
    """Table of the largest micro-batch that fits a GPU, from two predictions of each stage."""
    gpus = 24, 40, 80, 141
    print("GiB of a step without the activations of its samples; GiB of those of one sample, and\n"
          "their bytes for each token, layer and unit of width; the largest micro-batch on GPUs\n"
          f"of {', '.join(map(str, gpus))} GB, of which 2 are left to CUDA\n\n"
          f"{'stage':10} {'samples':>8} {'GiB':>7} {'GiB each':>9} {'bytes':>6}  largest")
    for stage in train.STAGES if args.stage == "all" else [args.stage]:
        samples = num_samples(stage_settings(args, stage))
        few = max(1, samples // 4)
        at_few, run = predicted_bytes(with_micro_batch(args, few), stage)
        at_many, run = predicted_bytes(with_micro_batch(args, 2 * few), stage)
        each = (at_many - at_few) / few
        fixed = at_few - few * each
        fits = [int((gb * 1e9 - 2e9 - fixed) / each) for gb in gpus]
        largest = [min(samples, max(0, number)) for number in fits]
        unit = each / run.activation_units()
        print(f"{stage:10} {samples:8} {fixed / 2**30:7.2f} {each / 2**30:9.3f} {unit:6.1f}  "
              f"{largest}", flush=True)


def with_micro_batch(args, micro_batch):
    return argparse.Namespace(**vars(args) | {"micro_batch": micro_batch})


# --------------------------------------------------------------------------------------------------
# --gpu: all that a GPU has to show, in one call that keeps to its time

class Late(BaseException):
    """The time of a part is over. It is no Exception, which code in between might catch."""


@contextmanager
def deadline(seconds):
    """Raise Late in the block when it takes longer, and again where something swallowed it."""
    def on_alarm(number, frame):
        raise Late

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 20)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def gpu_versions(args):
    name = torch.cuda.get_device_name(args.device) if is_gpu(args.device) else "none"
    yield {"torch": torch.__version__, "timm": timm.__version__, "cuda": torch.version.cuda,
           "gpu": name, "matmul_tflops": args.peak}
    for matmul_precision in ("high", "highest"):
        torch.set_float32_matmul_precision(matmul_precision)
        yield {"float32_matmul_precision": matmul_precision,
               "matmul_tflops": tflops_of_products(args.device, torch.float32)}


def gpu_step(args, stage, compiled=False):
    """A step of one of eight GPUs; of drift, of one class, which is a fourth of that."""
    batch_size = 2 if args.small else 1 if stage == "drift" else None
    changes = {"batch_size": batch_size, "compile": compiled}
    args = argparse.Namespace(**vars(args) | changes)
    row = bench_stage(args, stage, args.peak, repeats=1 if args.small else 8)
    args.tflop.setdefault(stage, row.get("tflop"))
    if compiled and args.tflop[stage]:                      # counted in the step as it was before
        row["share_of_peak"] = share_of_peak(row, args.tflop[stage], args.peak)
    yield row


def random_student(args):
    """-> a run whose EMA is a student of random weights; noise (B, C, G, G) and labels for it."""
    args = argparse.Namespace(**vars(args) | {"batch_size": 2})
    run = RandomRun(args, "bootstrap")
    run.ema.load_state_dict(run.model.state_dict())         # now with the noise
    B = 2 if args.small else 64
    noise = torch.randn(B, *run.rae.latent_shape, device=args.device)
    return run, noise, torch.arange(B, device=args.device) % len(run.classes)


def gpu_derivative(args):
    """How far each way to compute du/dt is from jvp in full precision, with the same weights."""
    run, noise, y = random_student(args)
    z = noise[:8]
    y = y[:8]
    t = torch.linspace(0.3, 0.9, len(z), device=args.device)                    # (B,)
    with torch.no_grad():
        v = run.ema(z, t, y, t)                                                 # (B, C, G, G)

    def derivative(method, matmul_precision, autocast=False):
        torch.set_float32_matmul_precision(matmul_precision)
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, autocast):
            return meanflow.total_derivative(run.ema, z, t, t / 2, y, v, method)

    exact = derivative("jvp", "highest")
    yield {
        "size": float(exact.square().mean().sqrt()),
        "jvp_tf32": relative(derivative("jvp", "high"), exact),
        "jvp_bf16": relative(derivative("jvp", "high", autocast=True), exact),
        "fd": relative(derivative("fd", "highest"), exact),
        "fd_tf32": relative(derivative("fd", "high"), exact),
    }


def gpu_sampling(args):
    """Images/s of one step and the decoder, and how far other precisions are from full."""
    run, noise, y = random_student(args)

    def draw(precision):
        with sample.computing("bf16" if precision == "bf16" else "fp32", args.device):
            if precision == "tf32":
                torch.set_float32_matmul_precision("high")
            return run.rae.decode(meanflow.sample(run.ema, noise, y))           # (B, 3, S, S)

    exact = draw("fp32")
    for precision in ("fp32", "tf32", "bf16"):
        difference = relative(draw(precision), exact)
        fastest = min(seconds_of(partial(draw, precision), args.device) for _ in range(3))
        yield {"precision": precision, "images_per_s": len(noise) / fastest,
               "from_fp32": difference}

    labels = y.cpu().repeat(4)

    def draw_all():
        for _ in sample.make_images(run.ema, run.rae, run.alpha, labels, precision="bf16"):
            pass
    yield {"precision": "bf16, sample.make_images",
           "images_per_s": len(labels) / seconds_of(draw_all, args.device)}


def gpu_scores(args):
    """Speed of Inception, of random weights, and of the scores."""
    images, points, dims = (2, 64, 16) if args.small else (64, 50_000, 2048)
    with torch.device(args.device):
        batch = torch.randint(256, (images, 3, 256, 256), dtype=torch.uint8)
        network = fid.Inception()
        features = torch.randn(2, points, dims)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.02)

    def extract():
        with sample.computing("fp32", args.device):
            network(batch)
    first, *later = [seconds_of(extract, args.device) for _ in range(2 if args.small else 4)]
    yield {"score": "Inception", "images_per_s": images / min(later)}

    second = seconds_of(lambda: fid.precision_recall(*features), args.device)
    yield {"score": f"precision_recall, {points} x {dims}", "seconds": second}

    mean = np.zeros(dims)
    covariance = np.cov(np.random.default_rng(0).normal(size=(dims, 2 * dims)))
    second = seconds_of(lambda: fid.frechet_distance(mean, covariance, mean, np.eye(dims)))
    yield {"score": f"frechet_distance, {dims}", "seconds": second}


def gpu_toy(args, steps=300):
    """train.py --toy, and the time of its steps by its own logs."""
    with tempfile.TemporaryDirectory() as folder:
        def toy(*flags):
            command = [sys.executable, Path(train.__file__).resolve(), "--toy", *flags]
            result = subprocess.run([*command, "--device", args.device, "--out", folder],
                                    capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(result.stderr.strip().splitlines()[-1])

        stage = ["--stage", "rae"] if args.small else []
        yield {"toy": "--dry_run", "seconds": seconds_of(lambda: toy("--dry_run", *stage))}
        if args.small:
            return
        many = ["--steps", str(steps)]
        second = seconds_of(lambda: toy("--recipe", "paper", *many))
        yield {"toy": "five stages and the report", "seconds": second}
        toy("--stage", "drift", *many)
        for log in sorted(Path(folder).glob("*.jsonl")):
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            seconds = [line["seconds"] for line in lines if "seconds" in line]
            half = len(seconds) // 2                        # the first step takes far longer
            yield {"toy": log.stem, "ms": 1000 * (seconds[-1] - seconds[half - 1]) / half}


GPU_PARTS = {  # name: (a generator of rows, the seconds that it may take)
    "versions": (gpu_versions, 30),
    **{stage: (partial(gpu_step, stage=stage), 45)
       for stage in ("distill", "mid", "flow", "drift", "bootstrap")},
    **{f"compiled_{stage}": (partial(gpu_step, stage=stage, compiled=True), 130)
       for stage in ("distill", "mid", "flow")},
    "derivative": (gpu_derivative, 40),
    "sampling": (gpu_sampling, 40),
    "scores": (gpu_scores, 60),
    "toy": (gpu_toy, 150),
}


def parts_of(args):
    if args.parts:
        return args.parts.split(",")
    if args.small:                                          # to compile takes a CPU minutes
        return [name for name in GPU_PARTS if not name.startswith("compiled")]
    return list(GPU_PARTS)


def gpu(args):
    """Each part until its deadline. Prints rows as they come, then tables, then one JSON object."""
    end = time.monotonic() + 60 * args.minutes
    args.model = "toy" if args.small else "XL"
    args.precision = sample.default_precision(args.device)
    args.peak = peak_tflops(args)
    args.tflop = {}
    found = {}
    for name in parts_of(args):
        part, limit = GPU_PARTS[name]
        found[name] = rows = []
        start = time.monotonic()
        try:
            with process_restored(), deadline(min(limit, end - start)):
                for row in part(args):
                    rows.append(rounded(row))
                    print_row({"part": name} | row)
        except Late:
            rows.append(rounded({"late_s": time.monotonic() - start}))
            print_row({"part": name} | rows[-1])
        except (Exception, SystemExit) as error:            # the next part may well work
            message = " ".join(f"{type(error).__name__}: {error}".split())
            rows.append({"error": message[:300]})
            print_row({"part": name} | rows[-1])
        print_row({"part": name, "took_s": time.monotonic() - start})
        torch._dynamo.reset()
        gc.collect()
        if is_gpu(args.device):
            torch.cuda.empty_cache()

    print_tables(found)
    print(json.dumps(found), flush=True)


def print_tables(found):
    """A table of the steps, a row a part; the other rows a line each."""
    columns = {}
    for rows in found.values():
        for row in rows:
            if "stage" in row:
                columns |= dict.fromkeys(row)
    print(" ".join(f"{name:>13}" for name in ["part", *columns]))
    for part, rows in found.items():
        for row in rows:
            if "stage" in row:
                values = [part[:13], *[short(row.get(name, "-")) for name in columns]]
                print(" ".join(f"{value:>13}" for value in values))
    for part, rows in found.items():
        for row in rows:
            if "stage" not in row:
                print_row({"part": part} | row)


# --------------------------------------------------------------------------------------------------
# The command line of this file, and the tests of it

def measure(argv):
    parser = argparse.ArgumentParser(
        description="The tests run with `python -m pytest test_all.py`. This command measures: "
                    "give --bench, --memory or --gpu.")
    add = parser.add_argument
    add("--bench", action="store_true", help="time of a step of each stage, and of its pieces")
    add("--memory", action="store_true", help="which micro-batch fits a GPU, from shapes alone")
    add("--gpu", action="store_true", help="both of the published size on a GPU, and much more")
    add("--model", choices=dit.MODELS, default="toy", help="size of the networks (default toy)")
    add("--resolution", metavar="N", type=int, default=256, help="side of the images (default 256)")
    add("--stage", choices=["all", *train.STAGES], default="all", help="one stage (default all)")
    add("--batch_size", metavar="N", type=int,
        help="rows a step (default: the toy's, or those of one of eight GPUs)")
    add("--micro_batch", metavar="N", type=int, help="as in train.py")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="as in train.py")
    add("--derivative", choices=["jvp", "fd"], default="jvp", help="as in train.py")
    add("--checkpointing", action="store_true", help="as in train.py")
    add("--compile", action="store_true", help="as in train.py")
    add("--device", help="as in train.py", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--minutes", type=float, default=9, help="--gpu: time for all its parts (default 9)")
    add("--parts", metavar="A,B", help=f"--gpu: only some of {', '.join(GPU_PARTS)}")
    add("--small", action="store_true", help="--gpu: at the size of the toy, for a test")
    args = parser.parse_args(argv)
    for name in ("bench", "memory", "gpu"):
        if getattr(args, name):
            return globals()[name](args)
    return parser.print_help()


def command(line):
    """Run `python test_all.py` with the flags in the line."""
    measure(line.split())


def last_json(capsys):
    """The JSON object in the last line of what was printed."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def shallow_toy(monkeypatch):
    """A toy of one layer in the encoder and one in the head, to be quick."""
    monkeypatch.setitem(dit.MODELS, "toy", dit.MODELS["toy"] | {"depth": (1, 1)})


def measuring(**changes):
    """The arguments of a measurement of the toy on the CPU."""
    defaults = {
        "model": "toy", "resolution": 256, "batch_size": 2, "micro_batch": None, "device": "cpu",
        "precision": "fp32", "derivative": "jvp", "compile": False, "checkpointing": False,
    }
    return argparse.Namespace(**defaults | changes)


def test_this_file_without_arguments_explains_what_it_measures(capsys):
    command("")

    text = capsys.readouterr().out
    assert "pytest" in text
    assert all(flag in text for flag in ("--bench", "--memory", "--gpu"))


def test_bench_ends_in_one_json_object(capsys, shallow_toy):
    command("--bench --device cpu --stage distill --batch_size 4")

    row, = last_json(capsys)["rows"]
    pieces = ["draws", "encode", "network", "target", "gradient", "update"]
    assert row["ms"] == pytest.approx(sum(row[piece] for piece in pieces))
    assert row["images_per_s"] == pytest.approx(4000 / row["ms"])
    assert row["share_of_peak"] > 0


def test_a_measured_step_trains_the_network(shallow_toy):
    run = RandomRun(measuring(), "distill")
    before = [weight.clone() for weight in run.params]

    take_step(run, *run.batch())

    changed = [not torch.equal(old, new) for old, new in zip(before, run.params)]
    assert sum(changed) > 0.9 * len(changed)


@pytest.mark.parametrize("stage", train.STAGES)
def test_predicted_memory_is_that_of_the_steps_themselves(stage, shallow_toy):
    """In several micro-batches, with a first step that makes the moments and one that has them."""
    sizes = {"mid": (1, 4), "drift": (1, 16)}
    batch_size, micro_batch = sizes.get(stage, (4, 2))
    args = measuring(batch_size=batch_size, micro_batch=micro_batch)

    real, _ = peak_bytes(args, stage)
    predicted, _ = predicted_bytes(args, stage)

    assert predicted == pytest.approx(real, rel=0.01)


def test_predicted_memory_grows_with_the_micro_batch(shallow_toy):
    few, _ = predicted_bytes(measuring(batch_size=64, micro_batch=16), "flow")
    many, run = predicted_bytes(measuring(batch_size=64, micro_batch=32), "flow")

    assert (many - few) / 16 > 4 * 10 * run.activation_units()


def test_memory_prints_the_micro_batch_that_fits(capsys, shallow_toy):
    command("--memory --device cpu --stage flow --batch_size 8")

    row = capsys.readouterr().out.splitlines()[-1]
    assert row.split()[:2] == ["flow", "8"]
    assert row.endswith("[8, 8, 8, 8]")


def test_all_parts_of_gpu_run_on_a_cpu_in_small(capsys, shallow_toy):
    command("--gpu --small --device cpu")

    found = last_json(capsys)
    assert found.keys() == {name for name in GPU_PARTS if "compiled" not in name}
    for part, rows in found.items():
        assert rows, part
        assert not any({"error", "late_s"} & row.keys() for row in rows), rows


def test_gpu_goes_on_after_a_part_that_is_late_or_raises(capsys, monkeypatch):
    def late(args):
        yield {"value": 1}
        time.sleep(60)

    def raises(args):
        yield 1 / 0

    def works(args):
        yield {"value": 2}

    parts = {"late": (late, 0.1), "raises": (raises, 9), "works": (works, 9)}
    monkeypatch.setattr(sys.modules[__name__], "GPU_PARTS", parts)

    command("--gpu --small --device cpu")

    found = last_json(capsys)
    assert found["late"][0] == {"value": 1}
    assert 0.1 <= found["late"][1]["late_s"] < 30
    assert "ZeroDivisionError" in found["raises"][0]["error"]
    assert found["works"] == [{"value": 2}]


def test_gpu_skips_what_its_minutes_do_not_suffice_for(capsys, monkeypatch):
    def endless(args):
        time.sleep(60)
        yield {}

    monkeypatch.setattr(sys.modules[__name__], "GPU_PARTS", {"endless": (endless, 60)})

    command("--gpu --small --device cpu --minutes 0.001")

    row, = last_json(capsys)["endless"]
    assert row["late_s"] < 30


if __name__ == "__main__":
    measure(sys.argv[1:])
