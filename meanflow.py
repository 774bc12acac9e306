"""The mathematics: flow matching, mid-training, MeanFlow distillation and training, guidance, drifting, the samplers.

Paper: arXiv 2511.13019 (the stages), after MeanFlow, arXiv 2505.13447 (E5), and flow matching, arXiv 2210.02747 (E2).
The numbers E1 to E8 are this file's own. Models are callables: nothing here knows what an image or a network is.

    python meanflow.py      # the whole method on a 2-D checkerboard, in half a minute: meanflow.png and meanflow.gif

The direction, everywhere:  t = 1 is noise, t = 0 is data, and r <= t.

    x data,  e Gaussian noise,  y class label
    z_t = (1 - t) x + t e                   the latent at time t
    v(z, t, y) = dz/dt, on average e - x    velocity: the teacher's output
    u(z, t, y, r) = (z_t - z_r) / (t - r)   average velocity on [r, t]: the student's output; u(z, t, y, t) = v(z, t, y)
                                            z_r: where the solution of dz/dt = v through z_t is at time r
    x = z_1 - u(z_1, 1, y, 0)               one step from noise to data
"""
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ADAPTIVE_EPS = 1e-3  # added to the squared error of a sample, so that its log and 1 / L^p stay finite


def expand(t, z):
    """Times (B,) -> (B, 1, ..., 1), to multiply latents (B, ...)."""
    return t.reshape(-1, *[1] * (z.dim() - 1))


# ----------------------------------------------------------------------------------------------------------------------
# Stage "flow": times and the teacher. More latent dimensions need more noise to hide the same image, so times are
# pushed towards 1 (noise); the student samples at equal ones.

def shift_time(t, alpha):
    """E1: t' = alpha t / (1 + (alpha - 1) t)."""
    return alpha * t / (1 + (alpha - 1) * t)


def alpha_of(channels, grid):
    """The paper's alpha, sqrt(C G G / 4096): 6.93 for ImageNet 256 (768 channels, grid 16), 13.86 for 512."""
    return (channels * grid**2 / 4096) ** 0.5


def flow_matching_times(normal, alpha):
    """Standard normal numbers (B,) -> times (B,) of the teacher's loss: logit-normal(0, 1), then shifted (E1)."""
    return shift_time(normal.sigmoid(), alpha)


def mean_flow_times(uniform, r_not_equal_t, alpha, r_not_0=1):
    """Uniform numbers (2, B) -> (t, r): two shifted times in order. Where r_not_equal_t (B,) is False, r = t.

    Elsewhere, where r_not_0 (B,) is False, r = 0: a jump to data, as in one-step sampling. The paper has none.
    """
    r, t = shift_time(uniform, alpha).sort(dim=0)[0]
    return t, torch.where(r_not_equal_t, r * r_not_0, t)


def flow_matching_loss(model, x, y, alpha, t=None, noise=None):
    """E2: mean of |v(z_t, t, y) - (e - x)|^2.

    x (B, ...) data latents of unit scale, y (B,) labels; t (B,) and noise like x are drawn where not given.
    Returns (loss, metrics); metrics["mse"] is the raw mean squared error, here the loss itself.
    """
    noise = torch.randn_like(x) if noise is None else noise
    t = flow_matching_times(torch.randn(len(x)).to(x), alpha) if t is None else t
    z = (1 - expand(t, x)) * x + expand(t, x) * noise                                           # (B, ...)
    loss = (model(z, t, y) - (noise - x)).square().mean()
    return loss, {"mse": loss.detach()}


@torch.no_grad()
def solve_flow(v, noise, y, steps, alpha, solver="euler", last_only=False):
    """E3: integrate dz/dt = v(z, t, y) from noise (t = 1) to data (t = 0) through `steps` + 1 shifted times.

    Euler evaluates v once a step, Heun twice. Returns (trajectory, times): (steps + 1, B, ...), or (1, B, ...) with
    last_only, and (steps + 1,), both from noise to data. The last time is exactly 0.
    """
    if steps < 1 or solver not in ("euler", "heun"):
        raise ValueError(f"steps must be at least 1 and solver 'euler' or 'heun', not {steps} and {solver!r}")
    times = shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), alpha).to(noise)
    z, trajectory = noise, [noise]
    for t, t_next in zip(times[:-1], times[1:]):
        velocity = v(z, t.expand(len(z)), y).to(z.dtype)
        if solver == "heun":
            ahead = v(z + (t_next - t) * velocity, t_next.expand(len(z)), y).to(z.dtype)
            velocity = (velocity + ahead) / 2
        z = z + (t_next - t) * velocity
        if last_only:
            trajectory.clear()
        trajectory.append(z)
    return torch.stack(trajectory), times


def guided(v, guidance_scale, num_classes, guide=None):
    """E6: v_weak + w (v - v_weak). A student distilled from this velocity needs no guidance when it samples.

    v_weak is a weaker network, guide(z, t, y): autoguidance, arXiv 2406.02507. Without one it is v with the label "no
    class", num_classes: classifier-free guidance, arXiv 2207.12598. The paper: w = 1.
    """
    def velocity(z, t, y):
        weak = guide(z, t, y) if guide else v(z, t, torch.full_like(y, num_classes))            # (B, ...)
        return weak + guidance_scale * (v(z, t, y) - weak)
    return velocity


# ----------------------------------------------------------------------------------------------------------------------
# Stage "mid": Consistency Mid-Training. The student first learns the teacher's finite jumps, read off a solved
# trajectory. This is a plain regression with bounded targets, where E5 from a random or a teacher's start explodes.

def mid_training_loss(student, teacher, noise, y, alpha, num_points=17, num_pairs=64, pairs=None, solver="euler"):
    """E4: mean of |u(z_t, t, y, r) - (z_t - z_r) / (t - r)|^2, z_t and z_r two points of one teacher trajectory.

    noise (B, ...) starts B trajectories of num_points points. Each gives num_pairs pairs of points, numbered by
    pairs (B, num_pairs) in 0 .. num_points (num_points - 1) / 2 - 1, drawn where not given. No data, no weighting; each
    pair carries the times that the solver stepped through. Returns (loss, {"mse"}).
    """
    trajectory, times = solve_flow(teacher, noise, y, num_points - 1, alpha, solver)            # (P, B, ...), (P,)
    points = torch.triu_indices(num_points, num_points, offset=1, device=noise.device)          # (2, P (P - 1) / 2)
    if pairs is None:
        pairs = torch.randint(points.shape[1], (len(noise), num_pairs), device=noise.device)
    start, end = points[:, pairs]                                                               # 2 x (B, pairs): t > r
    row = torch.arange(len(noise), device=noise.device)[:, None]                                # (B, 1)
    z_t, z_r = (trajectory[point, row].flatten(0, 1) for point in (start, end))                 # 2 x (B * pairs, ...)
    t, r = times[start].flatten(), times[end].flatten()                                         # 2 x (B * pairs,)
    y = y.repeat_interleave(start.shape[1])                                                     # (B * pairs,)
    loss = (student(z_t, t, y, r) - (z_t - z_r) / expand(t - r, z_t)).square().mean()
    return loss, {"mse": loss.detach()}


# ----------------------------------------------------------------------------------------------------------------------
# Stages "distill" and "bootstrap": the MeanFlow identity. Differentiate (t - r) u(z_t, t, r) = z_t - z_r along the
# flow, with r fixed and dz/dt = v:   u + (t - r) du/dt = v,   so   u = v - (t - r) du/dt.

@torch.no_grad()
def total_derivative(u, z, t, r, y, v, method="jvp", delta=5e-3):
    """du/dt = v ∂u/∂z + ∂u/∂t: the total derivative along the flow dz/dt = v, with r fixed. No graph.

    "jvp" is exact: one forward pass that carries tangents. Fused attention has no forward mode, hence the math backend.
    "fd" is the central difference over t +- delta, of second order in delta: two plain passes, with fused attention.
    """
    if method == "jvp":
        dz_dt, dt_dt, dr_dt = v.to(z.dtype), torch.ones_like(t), torch.zeros_like(r)
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(lambda z, t, r: u(z, t, y, r), (z, t, r), (dz_dt, dt_dt, dr_dt))[1].to(z.dtype)
    if method == "fd":
        z_both = torch.cat([z + delta * v, z - delta * v])                                      # (2 B, ...)
        t_both = torch.cat([t + delta, t - delta])                                              # (2 B,)
        with torch.autocast(z.device.type, enabled=False):          # in bf16 the difference would be rounding errors
            after, before = u(z_both, t_both, y.repeat(2), r.repeat(2)).to(z.dtype).chunk(2)    # 2 x (B, ...)
        return (after - before) / (2 * delta)
    raise ValueError(f"method must be 'jvp' or 'fd', not {method!r}")


def mean_flow_loss(student, x, y, alpha, teacher=None, derivative="jvp", delta=5e-3, t=None, r=None, noise=None,
                   ratio_r_not_equal_t=0.25, adaptive_p=1.0, du_dt=None):
    """E5: mean over samples of log L, L = |u(z_t, t, y, r) - stopgrad(v - (t - r) du/dt)|^2 + 0.001 over a latent.

    v is teacher(z_t, t, y) (MeanFlow distillation) or, without a teacher, the one-point estimate e - x (MeanFlow
    training). log L has the gradient of the paper's adaptive weighting 1 / L^p with p = 1. Another adaptive_p gives
    L^(1 - p) / (1 - p): at p = 0 a plain squared error, but summed over a latent where E2 and E4 average.
    Where r = t the target is v alone, and no derivative is computed. t, r (B,) and noise like x are drawn where not
    given, with r < t for the share ratio_r_not_equal_t. du_dt(z, t, r, y, v) may replace total_derivative of student.
    Returns (loss, metrics); metrics["mse"] is the raw mean squared error before weighting.
    """
    noise = torch.randn_like(x) if noise is None else noise
    if t is None:
        uniform, r_not_equal_t = torch.rand(2, len(x)).to(x), torch.rand(len(x)).to(x.device) < ratio_r_not_equal_t
        t, r = mean_flow_times(uniform, r_not_equal_t, alpha)
    z = (1 - expand(t, x)) * x + expand(t, x) * noise                                           # (B, ...)
    with torch.no_grad():
        some = (r < t).nonzero()[:, 0]                                                          # (K,), of B samples
        target = noise - x if teacher is None else teacher(z, t, y).to(x.dtype)                 # v, (B, ...)
        if len(some):
            inputs = z[some], t[some], r[some], y[some], target[some]
            change = du_dt(*inputs) if du_dt else total_derivative(student, *inputs, derivative, delta)
            target = target.index_add(0, some, expand((r - t)[some], x) * change)               # v - (t - r) du/dt
    error = (student(z, t, y, r) - target).square().flatten(1)                                  # (B, C G G)
    total = error.sum(1) + ADAPTIVE_EPS                                                         # L, (B,)
    loss = (total.log() if adaptive_p == 1 else total ** (1 - adaptive_p) / (1 - adaptive_p)).mean()
    return loss, {"mse": error.detach().mean()}


# ----------------------------------------------------------------------------------------------------------------------
# Stage "drift", beyond the paper: the student's own one-step samples move towards data, and away from each other. There
# is no time and no derivative, nor a teacher in the loss. It starts from a teacher's weights, or from any student.

@torch.no_grad()
def drift(s, data, samples, temperature):
    """E8: V, the mean of data minus the mean of samples around each of s, both weighted by softmax(-distance / T).

    s (K, n, D), data and samples (K, m, D) -> (K, n, D). T is `temperature` times the mean distance from s to data.
    A point at distance 0 has no weight, so a sample leaves itself out. V is zero where both sets are alike.
    """
    def mean_around(points):
        distance = torch.cdist(s, points, compute_mode="donot_use_mm_for_euclid_dist")          # (K, n, m), exact zeros
        return (-distance / T).masked_fill(distance == 0, -torch.inf).softmax(-1) @ points      # (K, n, D)
    with torch.autocast(s.device.type, enabled=False):
        T = temperature * torch.cdist(s, data).mean((1, 2), keepdim=True)                       # (K, 1, 1)
        return mean_around(data) - mean_around(samples)


def drift_loss(student, x, y, noise, with_grad, reencode=None, temperature=0.05):
    """E8: mean of |s - stopgrad(E(D(s)) + V / rms(V))|^2 over one-step samples s = e - u(e, 1, y, 0).

    A row is a class: labels y (B,), noise (B, M, ...) of M samples, and M data latents x (B, M, ...) of unit scale. Of
    each row the first with_grad < M samples are moved; the others only push them. rms(V) is over a latent.

    reencode: z (N, ...) -> E(D(z)), the latents of the image that z decodes to: s loses what the decoder does not draw.
    That helps where E(D(x)) is near x for data. None: s in place of E(D(s)), as in the source, arXiv 2606.15553.
    Returns (loss, metrics); metrics["mse"] is the mean of V^2, which falls.
    """
    def one_step(e):
        z = e.flatten(0, 1)                                                                     # (B n, ...)
        t = torch.ones(len(z)).to(z)
        u = student(z, t, y.repeat_interleave(e.shape[1]), torch.zeros_like(t))
        return (z - u.to(z.dtype)).view(*e.shape[:2], -1)                                       # (B, n, D)
    s = one_step(noise[:, :with_grad])                                                          # (B, n, D)
    with torch.no_grad():
        others = map(one_step, noise[:, with_grad:].split(with_grad, 1))        # in parts, for memory and caches
        samples = torch.cat([s, *others], 1)                                                    # (B, M, D)
        V = drift(s, x.flatten(2), samples, temperature)                                        # (B, n, D)
        seen = reencode(s.view(-1, *x.shape[2:])).reshape(s.shape).to(s) if reencode else s     # (B, n, D)
        target = seen + V / V.square().mean(2, keepdim=True).sqrt().clamp(min=1e-9)             # (B, n, D)
    return (s - target).square().mean(), {"mse": V.square().mean()}


@torch.no_grad()
def sample(u, noise, y, steps=1):
    """E7: z_r = z_t - (t - r) u(z_t, t, y, r) over equal intervals from t = 1 to 0: `steps` evaluations of u."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    times, z = torch.linspace(1, 0, steps + 1, dtype=torch.float64).to(noise), noise
    for t, r in zip(times[:-1], times[1:]):
        z = z - (t - r) * u(z, t.expand(len(z)), y, r.expand(len(z))).to(z.dtype)
    return z


# ----------------------------------------------------------------------------------------------------------------------
# The demo, `python meanflow.py`: every stage in turn on points of a 4 x 4 checkerboard over [-2, 2]^2

class MLP(torch.nn.Module):
    """v(z, t, y), and u(z, t, y, r) with the same weights and one more input, t - r. z, v and u: (B, ..., 2)."""

    def __init__(self, width=128, depth=5):
        super().__init__()
        self.register_buffer("frequencies", torch.pi * torch.tensor([0.5, 1, 2]))              # else edges blur
        self.first = torch.nn.Linear(2 + 1 + 6 + 6, width)                                      # z, t, waves of z
        self.gap = torch.nn.Linear(1, width, bias=False)
        torch.nn.init.zeros_(self.gap.weight)                                                   # a new student: u = v
        hidden = [layer for _ in range(depth - 1) for layer in (torch.nn.Linear(width, width), torch.nn.SiLU())]
        self.rest = torch.nn.Sequential(torch.nn.SiLU(), *hidden, torch.nn.Linear(width, 2))

    def forward(self, z, t, y, r=None):
        t, r = (expand(a, z).expand_as(z[..., :1]) for a in (t, t if r is None else r))         # 2 x (B, ..., 1)
        waves = (z[..., None] * self.frequencies).flatten(-2)                                   # (B, ..., 6)
        return self.rest(self.first(torch.cat([z, t, waves.sin(), waves.cos()], -1)) + self.gap(t - r))


def checkerboard(*shape):
    """Points uniform on the dark squares: (*shape, 2)."""
    column, row = torch.randint(4, shape), torch.randint(2, shape)
    return torch.stack([column, 2 * row + column % 2], -1) + torch.rand(*shape, 2) - 2


def train_demo(stage, model, loss_of, steps, lr):
    """Adam with a learning rate that falls to zero, in place of an average of weights."""
    from tqdm import tqdm
    optimizer, bar = torch.optim.Adam(model.parameters()), tqdm(range(steps), stage)
    for step in bar:
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss, metrics = loss_of(model)
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            bar.set_postfix(mse=f"{metrics['mse']:.4f}")
    return model.requires_grad_(False)


def fit(points):
    """Points (M, 2) -> (share on the dark squares, total variation from the data, 0 to 1), in bins of 0.2."""
    dark = torch.arange(4)[:, None] % 2 == torch.arange(4) % 2                                  # (4, 4) squares
    density = torch.kron(dark / 8, torch.ones(5, 5) / 25)                                       # (20, 20) on [-2, 2]^2
    density = torch.nn.functional.pad(density, [4] * 4)                                         # (28, 28), wider
    share = torch.histogramdd(points, [28, 28], [-2.8, 2.8, -2.8, 2.8])[0] / len(points)        # (28, 28)
    outside = 1 - share.sum()
    return share[density > 0].sum().item(), ((share - density).abs().sum() + outside).item() / 2


def draw(panels, paths=(), columns=4, side=224):
    """panels {title: points (M, 2)} as clouds, then paths [(title, {colour: lines (points, lines, 2)})] -> picture."""
    from PIL import Image, ImageDraw
    rows = -(-(len(panels) + len(paths)) // columns)
    picture = Image.new("RGB", (columns * (side + 16), rows * (side + 40)), "white")
    pen = ImageDraw.Draw(picture)
    for number, (title, shown) in enumerate([*panels.items(), *paths]):
        left, top = number % columns * (side + 16) + 8, number // columns * (side + 40) + 32
        pen.text((left, top - 24), title, "black", font_size=16)
        if torch.is_tensor(shown):
            count = torch.histogramdd(shown, [56, 56], [-2.8, 2.8, -2.8, 2.8])[0].T.flip(0)     # (56, 56), y points up
            darkness = (800 * count / len(shown)).clamp(max=1.5)                                # 1 where data are
            cloud = Image.fromarray((255 - 170 * darkness).byte().numpy())
            picture.paste(cloud.resize((side, side), Image.Resampling.NEAREST), (left, top))
            continue
        for colour, lines in shown.items():
            pixels = (lines * torch.tensor([1, -1]) + 2.8) * side / 5.6 + torch.tensor([left, top])
            for line in pixels.transpose(0, 1).tolist():
                pen.line([tuple(point) for point in line], colour, 2)
                pen.circle(line[-1], 3, colour)
    return picture


def demo():
    import copy
    torch.manual_seed(0)
    noise, y = torch.randn(20_000, 2), torch.zeros(20_000)
    panels = {"data": checkerboard(20_000)}
    flow_loss = lambda v: flow_matching_loss(v, checkerboard(512), y[:512], alpha=1)
    teacher = train_demo("teacher", MLP(), flow_loss, 3000, 5e-3)
    for steps, title in ((25, "teacher, 25 steps"), (1, "teacher, 1 step")):
        panels[title] = solve_flow(teacher, noise, y, steps, alpha=1, last_only=True)[0][0]
    # For E5 a sample is a cloud of 8 points: with the 2 dimensions of one point, the log pulls u away from the mean.
    mid = lambda u: mid_training_loss(u, teacher, torch.randn(64, 2), y[:64], alpha=1, num_pairs=8)
    distill = lambda u: mean_flow_loss(u, checkerboard(64, 8), y[:64], alpha=1, teacher=teacher)
    bootstrap = lambda u: mean_flow_loss(u, checkerboard(64, 8), y[:64], alpha=1)
    drift = lambda u: drift_loss(u, checkerboard(1, 256), y[:1], torch.randn(1, 256, 2), with_grad=64)
    stages = {"mid": (mid, 2000, 3e-3), "distill": (distill, 600, 2e-4), "bootstrap": (bootstrap, 200, 1e-4),
              "drift": (drift, 2000, 1e-3)}
    student = teacher
    for stage, (loss_of, steps, lr) in stages.items():
        student = train_demo(stage, copy.deepcopy(student).requires_grad_(True), loss_of, steps, lr)
        panels[f"{stage}, 1 step"] = sample(student, noise, y)
    print(f"\n{'':20}on dark squares    total variation from the data")
    for title, points in panels.items():
        print("{:20}{:15.1%}{:35.1%}".format(title, *fit(points)))
    walk, jumped = solve_flow(teacher, noise, y, 25, alpha=1)[0], panels["drift, 1 step"]       # (26, M, 2), (M, 2)
    lines = {"royalblue": walk[:, :14], "crimson": torch.stack([noise[:14], jumped[:14]])}
    draw(panels, [("teacher (blue), drift (red)", lines)]).save("meanflow.png")
    titles = "teacher: {} of 25 steps", "student: {} of 1 step"
    frames = [draw({titles[0].format(k): points, titles[1].format(min(k, 1)): jumped if k else noise}, columns=2)
              for k, points in enumerate(walk)]
    frames[0].save("meanflow.gif", save_all=True, append_images=frames[1:], duration=[*25 * [120], 3000], loop=0)
    print("\nmid comes before distill, whose target contains du/dt of the student: far from the solution its errors\n"
          "return enlarged, and in many dimensions training explodes. The targets of mid are bounded.\n"
          "meanflow.png: each stage; meanflow.gif: 25 steps of the teacher beside one step of the student")


if __name__ == "__main__":
    demo()
