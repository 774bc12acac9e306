"""The mathematics: the target of every stage, the solver of the teacher's flow, and the sampler.

Paper: arXiv 2511.13019 (the stages), after MeanFlow, arXiv 2505.13447, and flow matching,
arXiv 2210.02747. The numbers E1 to E8 are this file's own.

    python meanflow.py      # the whole method on a 2-D checkerboard: meanflow.png, meanflow.gif

Every stage is one regression. A network is evaluated at some (z, t, y, r), and its output is
compared with a target that is computed without a gradient. A stage is its target:

    stage      z                           t, r             target
    flow       (1 - t) x + t e             t                e - x
    mid        a point of a solved path    two of its times (z_t - z_r) / (t - r)
    distill    (1 - t) x + t e             t, r             v - (t - r) du/dt, v = teacher(z, t, y)
    bootstrap  (1 - t) x + t e             t, r             the same with v = e - x
    drift      e                           1, 0             e - (s + drift), s = e - u(e, 1, y, 0)

The direction, everywhere:  t = 1 is noise, t = 0 is data, and r <= t.

    x data,  e Gaussian noise,  y class label
    z_t = (1 - t) x + t e                   the latent at time t
    v(z, t, y) = dz/dt                      velocity: on average e - x; the teacher's output
    u(z, t, y, r) = (z_t - z_r) / (t - r)   average velocity on [r, t]: the student's output, where
                                            z_r is the point at time r of the path through z_t;
                                            u(z, t, y, t) = v(z, t, y)
    x = z_1 - u(z_1, 1, y, 0)               one step from noise to data

Nothing here draws a random number, knows what an image is, or asks what a network looks like: v and
u may be any callables, and whoever trains them passes noise, times and labels in.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ADAPTIVE_EPS = 1e-3  # added to the summed squared error of a sample, so that its log stays finite


def expand(t, z):
    """Times (B,) -> (B, 1, ..., 1), to multiply latents z (B, ...)."""
    return t.reshape(-1, *[1] * (z.dim() - 1))


def regression_loss(prediction, target, adaptive_p=0.0):
    """E2: the loss of every stage, of prediction and target (B, ...) -> (loss, mse).

    L is a sample's mean squared error over its D entries. With adaptive_p = 0 the loss is the mean
    of L. With adaptive_p = 1 it is the mean of log(L + 0.001 / D), whose gradient is that of L
    divided by L: MeanFlow's adaptive weighting, which keeps the few samples with a huge error from
    deciding the step. Between them lies L^(1 - p) / (1 - p). mse is the mean of L, for the log.
    """
    squared_error = (prediction - target).square().flatten(1)                   # (B, D)
    error = squared_error.mean(1)                                               # L, (B,)
    mse = error.detach().mean()
    if adaptive_p == 0:
        return error.mean(), mse

    error = error + ADAPTIVE_EPS / squared_error.shape[1]
    if adaptive_p == 1:
        return error.log().mean(), mse
    return (error ** (1 - adaptive_p) / (1 - adaptive_p)).mean(), mse


# --------------------------------------------------------------------------------------------------
# Times. A latent of many dimensions needs more noise before the image in it is hidden, so the times
# of training and of the teacher's solver are pushed towards 1. The student samples at even times.

def shift_time(t, alpha):
    """E1: t' = alpha t / (1 + (alpha - 1) t), which keeps 0 and 1 and their order."""
    return alpha * t / (1 + (alpha - 1) * t)


def alpha_of(channels, grid):
    """The paper's alpha, sqrt(C G G / 4096): 6.93 at 256 (C = 768, G = 16) and 13.86 at 512."""
    return (channels * grid**2 / 4096) ** 0.5


def flow_matching_times(normal, alpha):
    """Standard normal numbers (B,) -> times (B,) of stage flow: logit-normal(0, 1), shifted."""
    return shift_time(normal.sigmoid(), alpha)


def mean_flow_times(uniform, alpha, jumps, jumps_to_data):
    """Uniform numbers (B, 2) -> (t, r), each (B,): two shifted times, of which the later one is t.

    Where jumps (B,) is False, r = t: the sample trains the velocity. Where jumps and jumps_to_data
    (B,) are True, r = 0: the jump that one-step sampling makes (the paper has no such rows).
    """
    times = shift_time(uniform, alpha)                                          # (B, 2)
    t = times.amax(1)                                                           # (B,)
    r = times.amin(1).masked_fill(jumps_to_data, 0)                             # (B,)
    return t, torch.where(jumps, r, t)


def interpolate(x, noise, t):
    """z_t = (1 - t) x + t e on the straight path from data x to noise e, both (B, ...), t (B,)."""
    t = expand(t, x)
    return (1 - t) * x + t * noise


# --------------------------------------------------------------------------------------------------
# The teacher's flow. Stage "flow" needs no more than interpolate: its target is e - x. Many pairs
# (x, e) give the same z_t, and the squared error makes the network their average, v(z_t, t).

@torch.no_grad()
def solve_flow(v, noise, y, steps, alpha, solver="euler", last_only=False):
    """E3: integrate dz/dt = v(z, t, y) from noise (t = 1) to data (t = 0) over shifted times.

    Euler evaluates v once a step, Heun twice. Returns (trajectory, times), both from noise to data:
    (steps + 1, B, ...), or (1, B, ...) with last_only, and (steps + 1,). The last time is 0.
    Raises ValueError for steps < 1 and for another solver.
    """
    if steps < 1 or solver not in ("euler", "heun"):
        raise ValueError(f"steps >= 1 and solver euler or heun, not {steps} and {solver!r}")
    times = shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), alpha).to(noise)

    z = noise
    trajectory = [noise]
    for t, t_next in zip(times[:-1], times[1:]):
        velocity = v(z, t.expand(len(z)), y).to(z.dtype)                        # (B, ...)
        if solver == "heun":
            z_ahead = z + (t_next - t) * velocity
            velocity_ahead = v(z_ahead, t_next.expand(len(z)), y).to(z.dtype)
            velocity = (velocity + velocity_ahead) / 2

        z = z + (t_next - t) * velocity
        if last_only:
            trajectory.clear()
        trajectory.append(z)
    return torch.stack(trajectory), times


def guided(v, guidance_scale, num_classes, guide=None):
    """E6: v_weak + w (v - v_weak). A student of this velocity needs no guidance when it samples.

    v_weak is a weaker network, guide(z, t, y): autoguidance, arXiv 2406.02507. Without one it is v
    with the label "no class", num_classes: classifier-free guidance, arXiv 2207.12598. The paper
    has w = 1, no guidance.
    """
    def velocity(z, t, y):
        if guide is None:
            weak = v(z, t, torch.full_like(y, num_classes))                     # (B, ...)
        else:
            weak = guide(z, t, y)
        return weak + guidance_scale * (v(z, t, y) - weak)
    return velocity


# --------------------------------------------------------------------------------------------------
# Stage "mid": Consistency Mid-Training. The student first learns the teacher's finite jumps, read
# off a solved trajectory. These targets are bounded, where those of the next stage would explode.

@torch.no_grad()
def mid_training_target(teacher, noise, y, alpha, num_points=17, num_pairs=64, pairs=None,
                        solver="euler"):
    """E4: (z_t - z_r) / (t - r), of two points of one trajectory of the teacher.

    noise (B, ...) and labels y (B,) start B trajectories, of num_points points each. A trajectory
    gives a row for each of its pairs of points, pairs (B, P): numbers below
    num_points (num_points - 1) / 2. Without them it gives num_pairs that are spread evenly. A pair
    carries the times that the solver stepped through. Returns (z, t, y, r), target: B * P rows.
    """
    trajectory, times = solve_flow(teacher, noise, y, num_points - 1, alpha, solver)
    point_pairs = torch.triu_indices(num_points, num_points, offset=1, device=noise.device)
    if pairs is None:
        spread = torch.arange(num_pairs, device=noise.device) * point_pairs.shape[1] // num_pairs
        pairs = spread.expand(len(noise), -1)                                   # (B, P)

    start, end = point_pairs[:, pairs]                                          # 2 x (B, P): t > r
    row = torch.arange(len(noise), device=noise.device)[:, None]                # (B, 1)
    z_t = trajectory[start, row].flatten(0, 1)                                  # (B P, ...)
    z_r = trajectory[end, row].flatten(0, 1)                                    # (B P, ...)
    t = times[start].flatten()                                                  # (B P,)
    r = times[end].flatten()                                                    # (B P,)
    y = y.repeat_interleave(pairs.shape[1])                                     # (B P,)
    return (z_t, t, y, r), (z_t - z_r) / expand(t - r, z_t)


# --------------------------------------------------------------------------------------------------
# Stages "distill" and "bootstrap": the MeanFlow identity. Differentiate (t - r) u = z_t - z_r in t
# along the path, where dz/dt = v and r and z_r stay:  u + (t - r) du/dt = v. The result holds at
# every point z and every r <= t, so in training any noisy latent z_t will do.

@torch.no_grad()
def total_derivative(u, z, t, r, y, v, method="jvp", delta=5e-3):
    """du/dt = v ∂u/∂z + ∂u/∂t: the derivative along the path dz/dt = v, with r fixed. (B, ...)

    "jvp" is exact: one forward pass that carries tangents. Fused attention has no forward mode,
    hence the math backend. "fd" is the central difference over t +- delta, whose error is of second
    order in delta: two plain passes, in full precision, since rounding would drown the difference.
    Raises ValueError for another method.
    """
    if method == "jvp":
        def along_the_path(z, t, r):
            return u(z, t, y, r)
        dz_dt = v.to(z.dtype)
        dt_dt = torch.ones_like(t)
        dr_dt = torch.zeros_like(r)
        with sdpa_kernel(SDPBackend.MATH):
            _, du_dt = torch.func.jvp(along_the_path, (z, t, r), (dz_dt, dt_dt, dr_dt))
        return du_dt.to(z.dtype)

    if method == "fd":
        z_both = torch.cat([z + delta * v, z - delta * v])                      # (2 B, ...)
        t_both = torch.cat([t + delta, t - delta])                              # (2 B,)
        with torch.autocast(z.device.type, enabled=False):
            u_both = u(z_both, t_both, y.repeat(2), r.repeat(2)).to(z.dtype)    # (2 B, ...)
        after, before = u_both.chunk(2)                                         # 2 x (B, ...)
        return (after - before) / (2 * delta)

    raise ValueError(f"method must be 'jvp' or 'fd', not {method!r}")


@torch.no_grad()
def mean_flow_target(student, z, t, r, y, v, derivative="jvp", delta=5e-3):
    """E5: v - (t - r) du/dt, with z and v (B, ...), and t, r and y (B,) -> (B, ...).

    v is the teacher's velocity at z_t (distillation) or e - x, one noisy sample of it
    (bootstrapping). Where r = t the target is v, and no derivative is computed. While the network
    is wrong, du/dt is wrong too: the target holds this error times (t - r), and the network learns
    it. That is why training explodes from a start that is far from the solution.
    """
    target = v.detach().to(z.dtype)
    jumps = (r < t).nonzero()[:, 0]                                             # (K,), of B rows
    if len(jumps) == 0:
        return target

    z, t, r, y = z[jumps], t[jumps], r[jumps], y[jumps]
    du_dt = total_derivative(student, z, t, r, y, target[jumps], derivative, delta)
    return target.index_add(0, jumps, expand(r - t, z) * du_dt)


# --------------------------------------------------------------------------------------------------
# Stage "drift", beyond the paper (arXiv 2606.15553): each one-step sample is pulled towards data of
# its class and pushed away from other samples, near ones most. When both sets are alike, nothing
# moves. There is no time and no derivative, and no teacher in the target.

def kernel_weights(s, points, T):
    """softmax(-distance / T) of s (K, n, D) over points (K, m, D) -> (K, n, m).

    A point at distance 0 has no weight, so that a sample does not push itself.
    """
    distance = torch.cdist(s, points, compute_mode="donot_use_mm_for_euclid_dist")  # exact zeros
    return (-distance / T).masked_fill(distance == 0, -torch.inf).softmax(-1)


@torch.no_grad()
def drift_field(s, data, samples, temperature, jitter=None):
    """E8: the mean of data minus the mean of samples, as seen from s, by the weights of the kernel.

    s (K, n, D), data and samples (K, m, D) -> (K, n, D), for K kernels that know nothing of each
    other. T is `temperature` times the mean distance from s to data. jitter (K, m, D), in units of
    T, moves the data in the distances alone: a kernel that is less peaked than a single softmax.
    """
    with torch.autocast(s.device.type, enabled=False):
        T = temperature * torch.cdist(s, data).mean((1, 2), keepdim=True)       # (K, 1, 1)
        places = data if jitter is None else data + T * jitter                  # (K, m, D)
        pull = kernel_weights(s, places, T) @ data                              # (K, n, D)
        push = kernel_weights(s, samples, T) @ samples                          # (K, n, D)
    return pull - push


@torch.no_grad()
def drift_target(student, x, y, noise, num_moved, reencode=None, temperature=0.05,
                 per_token=False, jitter=None):
    """E8: e - (s + drift), where s = e - u(e, 1, y, 0) is the student's one-step sample now.

    A row is a class: labels y (B,), noise (B, M, ...) of M samples, and real latents x (B, m, ...).
    Of each row the first num_moved samples are moved; the others only push them. The drift is
    V = drift_field, divided by its root mean square over a latent, so it keeps its size and the
    learning rate must fall. With several temperatures it is the mean over them.

    per_token: a kernel for each of the G x G tokens, and V divided by its length, as in the source.
    jitter, like x: see drift_field. reencode: z (N, ...) -> E(D(z)), the latents of the image that
    z decodes to. With it s loses what the decoder does not draw, which helps where the RAE loses
    little of data. Returns (z, t, y, r), target: B * num_moved rows.
    """
    y_all = y.repeat_interleave(noise.shape[1])                                 # (B M,)
    e = noise.flatten(0, 1)                                                     # (B M, ...)
    t = torch.ones(len(e), device=e.device, dtype=e.dtype)                      # (B M,)
    s = e - student(e, t, y_all, torch.zeros_like(t)).to(e.dtype)               # (B M, ...)
    samples = s.view_as(noise)                                                  # (B, M, ...)
    moved = samples[:, :num_moved]                                              # (B, n, ...)

    def points(latents):
        if per_token:
            return latents.flatten(2).permute(2, 0, 1)                          # (N, m, C)
        return latents.flatten(1)[None]                                         # (1, m, D)

    temperatures = np.atleast_1d(temperature).tolist()
    drift = torch.zeros_like(moved)                                             # (B, n, ...)
    for row, (real, fake) in enumerate(zip(x, samples)):
        directions = None if jitter is None else points(jitter[row])
        for T in temperatures:
            V = drift_field(points(moved[row]), points(real), points(fake), T, directions)
            length = V.norm(dim=2, keepdim=True).clamp(min=1e-9)                # (K, n, 1)
            if per_token:
                step = (V / length).permute(1, 2, 0)                            # (n, C, N)
            else:
                step = V / length * V.shape[2] ** 0.5                           # (1, n, D)
            drift[row] += step.reshape(moved[row].shape) / len(temperatures)

    moved = moved.flatten(0, 1)                                                 # (B n, ...)
    here = moved if reencode is None else reencode(moved).to(moved.dtype)
    e = noise[:, :num_moved].flatten(0, 1)                                      # (B n, ...)
    t = torch.ones(len(e), device=e.device, dtype=e.dtype)                      # (B n,)
    y = y.repeat_interleave(num_moved)                                          # (B n,)
    return (e, t, y, torch.zeros_like(t)), e - (here + drift.flatten(0, 1))


@torch.no_grad()
def sample(u, noise, y, steps=1):
    """E7: z_r = z_t - (t - r) u(z_t, t, y, r) over equal intervals from t = 1 to 0 -> x (B, ...).

    `steps` is the number of evaluations of u. Raises ValueError for steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).to(noise)
    z = noise
    for t, r in zip(times[:-1], times[1:]):
        z = z - (t - r) * u(z, t.expand(len(z)), y, r.expand(len(z))).to(z.dtype)
    return z


# --------------------------------------------------------------------------------------------------
# The demo, `python meanflow.py`: every stage in turn, on points of a 4 x 4 checkerboard over
# [-2, 2]^2. It trains by the same few lines as the loop of train.py.

class MLP(torch.nn.Module):
    """v(z, t, y), and u(z, t, y, r) by one more input, t - r, that starts without effect.

    z and the output are (B, 2). Sines and cosines of z keep the edges of the squares sharp.
    """

    def __init__(self, width=128, depth=5):
        super().__init__()
        self.register_buffer("frequencies", torch.pi * torch.tensor([0.5, 1, 2]))
        self.first = torch.nn.Linear(2 + 1 + 6 + 6, width)                      # z, t, sin, cos
        self.gap = torch.nn.Linear(1, width, bias=False)
        torch.nn.init.zeros_(self.gap.weight)
        self.hidden = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(depth - 1))
        self.last = torch.nn.Linear(width, 2)

    def forward(self, z, t, y, r=None):
        gap = torch.zeros_like(t) if r is None else t - r                       # (B,)
        waves = (z[..., None] * self.frequencies).flatten(-2)                   # (B, 6)
        x = torch.cat([z, t[:, None], waves.sin(), waves.cos()], dim=1)         # (B, 15)
        x = self.first(x) + self.gap(gap[:, None])                              # (B, width)
        for layer in self.hidden:
            x = layer(F.silu(x))
        return self.last(F.silu(x))                                             # (B, 2)


def checkerboard(*shape):
    """Points that are uniform on the dark squares: (*shape, 2)."""
    column = torch.randint(4, shape)
    row = 2 * torch.randint(2, shape) + column % 2
    corner = torch.stack([column, row], dim=-1) - 2
    return corner + torch.rand(*shape, 2)


def train_demo(stage, model, batch_of, steps, lr, adaptive_p=0.0):
    """The regression of a stage: batch_of(model) -> inputs, target. Returns the model, frozen.

    Adam with a learning rate that falls to zero, in place of an average of the weights.
    """
    from tqdm import tqdm
    optimizer = torch.optim.Adam(model.parameters())
    bar = tqdm(range(steps), stage)
    for step in bar:
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        inputs, target = batch_of(model)
        loss, mse = regression_loss(model(*inputs), target, adaptive_p)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            bar.set_postfix(mse=f"{mse:.4f}")
    return model.requires_grad_(False)


def fit(points):
    """Points (M, 2) -> (share on the dark squares, total variation from the data in 0..1).

    Both are of a histogram with bins of side 0.2, on [-2.8, 2.8]^2.
    """
    dark = torch.arange(4)[:, None] % 2 == torch.arange(4) % 2                  # (4, 4) squares
    density = torch.kron(dark / 8, torch.ones(5, 5) / 25)                       # (20, 20)
    density = F.pad(density, [4] * 4)                                           # (28, 28)
    counts, _ = torch.histogramdd(points, [28, 28], [-2.8, 2.8, -2.8, 2.8])     # (28, 28)
    share = counts / len(points)
    outside = 1 - share.sum()
    on_dark = share[density > 0].sum().item()
    return on_dark, ((share - density).abs().sum() + outside).item() / 2


def cloud(points, side):
    """Points (M, 2) -> PIL image (side, side) of their density, from white over blue to black."""
    from PIL import Image, ImageOps
    counts, _ = torch.histogramdd(points, [112, 112], [-2.8, 2.8, -2.8, 2.8])   # (112, 112)
    level = 3200 * counts.T.flip(0) / len(points)                               # 1 where data are
    level = F.avg_pool2d(level[None], 3, 1, 1)[0].clamp(max=1.5) / 1.5          # less grain
    image = Image.fromarray((255 * level).byte().numpy())
    image = ImageOps.colorize(image, "white", "midnightblue", mid="cornflowerblue")
    return image.resize((side, side), Image.Resampling.BICUBIC)


def draw(panels, columns=4, side=224):
    """A picture of panels, {title: (points, lines)}: a cloud of points (M, 2) in each, and over it
    lines, {colour: (points, lines, 2)}. Drawn at twice its size, so that lines are smooth.
    """
    from PIL import Image, ImageDraw
    rows = -(-len(panels) // columns)
    big = 2 * side
    picture = Image.new("RGB", (columns * (big + 32), rows * (big + 80)), "white")
    pen = ImageDraw.Draw(picture)

    for number, (title, (points, lines)) in enumerate(panels.items()):
        row, column = divmod(number, columns)
        corner = torch.tensor([column * (big + 32) + 16, row * (big + 80) + 64])
        left, top = corner.tolist()
        pen.text((left, top - 48), title, "black", font_size=32)
        picture.paste(cloud(points, big), (left, top))
        for colour, curves in lines.items():
            pixels = (curves * torch.tensor([1, -1]) + 2.8) * big / 5.6 + corner
            for curve in pixels.transpose(0, 1):
                pen.line(curve.flatten().tolist(), colour, 4)
                pen.circle(curve[-1].tolist(), 7, colour)
    return picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)


def demo():
    import copy
    torch.manual_seed(0)
    noise = torch.randn(20_000, 2)
    y = torch.zeros(20_000)                                                     # one class
    samples = {"data": checkerboard(20_000)}

    def flow_batch(v):
        x, e = checkerboard(512), torch.randn(512, 2)
        t = flow_matching_times(torch.randn(512), alpha=1)
        return (interpolate(x, e, t), t, y[:512]), e - x

    teacher = train_demo("teacher", MLP(), flow_batch, 3000, 5e-3)

    def mid_batch(u):
        pairs = torch.randint(136, (64, 8))
        return mid_training_target(teacher, torch.randn(64, 2), y[:64], alpha=1, pairs=pairs)

    def bootstrap_batch(u, teacher=None):
        x, e = checkerboard(512), torch.randn(512, 2)
        jumps = torch.arange(512) % 2 == 0                                      # half have r < t
        t, r = mean_flow_times(torch.rand(512, 2), 1, jumps, torch.zeros_like(jumps))
        z = interpolate(x, e, t)
        v = teacher(z, t, y[:512]) if teacher else e - x
        return (z, t, y[:512], r), mean_flow_target(u, z, t, r, y[:512], v)

    def distill_batch(u):
        return bootstrap_batch(u, teacher)

    def drift_batch(u):
        return drift_target(u, checkerboard(1, 256), y[:1], torch.randn(1, 256, 2), num_moved=64)

    walk, _ = solve_flow(teacher, noise, y, 25, alpha=1)                        # (26, M, 2)
    samples["teacher, 25 steps"] = walk[-1]
    samples["teacher, 1 step"] = sample(teacher, noise, y)
    student = teacher
    for stage, batch_of, steps, lr in (
        ("mid", mid_batch, 1500, 3e-3),
        ("distill", distill_batch, 1500, 1e-3),
        ("bootstrap", bootstrap_batch, 400, 3e-4),
        ("drift", drift_batch, 2000, 1e-3),
    ):
        student = copy.deepcopy(student).requires_grad_(True)
        student = train_demo(stage, student, batch_of, steps, lr)
        samples[f"{stage}, 1 step"] = sample(student, noise, y)

    print(f"\n{'':20}on dark squares    total variation from the data")
    for title, points in samples.items():
        on_dark, variation = fit(points)
        print(f"{title:20}{on_dark:15.1%}{variation:35.1%}")

    jumped = samples["drift, 1 step"]                                           # (M, 2)
    lines = {"royalblue": walk[:, :14], "crimson": torch.stack([noise[:14], jumped[:14]])}
    panels = {title: (points, {}) for title, points in samples.items()}
    panels["teacher (blue), drift (red)"] = samples["data"], lines
    draw(panels).save("meanflow.png")

    frames = []
    for step, points in enumerate(walk):
        panels = {f"teacher: {step} of 25 steps": (points, {}),
                  f"drift: {min(step, 1)} of 1 step": (jumped if step else noise, {})}
        frames.append(draw(panels, columns=2))
    milliseconds = [120] * 25 + [3000]
    frames[0].save("meanflow.gif", save_all=True, append_images=frames[1:],
                   duration=milliseconds, loop=0)
    print("\nWrote meanflow.png, a panel for each stage, and meanflow.gif, 25 steps of the\n"
          "teacher beside one step of drift.")


if __name__ == "__main__":
    demo()
