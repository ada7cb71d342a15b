"""Every method as its paper writes it: plain NumPy, float64, no kernel, no shared buffer.

Each function takes ``gradient(y)``, the start , ``learning_rate(t)``, ``momentum(t)``, and returns
the query points ``y_0 .. y_n`` and the iterates ``x_0 .. x_n``, both stacked.
"""

import numpy as np


def sutskever(gradient, start, learning_rate, momentum, steps):
    """Sutskever et al. 2013, equations 3-4: v' = mu v - lr grad(x + mu v); x' = x + v'."""
    x, v = np.array(start, dtype=np.float64), np.zeros_like(start, dtype=np.float64)
    ys, xs = [x + momentum(0) * v], [x]
    for t in range(steps):
        v = momentum(t) * v - learning_rate(t) * gradient(x + momentum(t) * v)
        x = x + v
        xs.append(x)
        ys.append(x + momentum(t + 1) * v)
    return np.stack(ys), np.stack(xs)


def torch_sgd(gradient, start, learning_rate, momentum, steps, weight_decay=0.0):
    """torch.optim.SGD(nesterov=True), as its documentation states it (dampening 0)."""
    y, buffer = np.array(start, dtype=np.float64), np.zeros_like(start, dtype=np.float64)
    ys, xs = [y], [y]
    for t in range(steps):
        g = gradient(y) + weight_decay * y
        buffer = momentum(t) * buffer + g
        xs.append(y - learning_rate(t) * g)
        y = y - learning_rate(t) * (g + momentum(t) * buffer)
        ys.append(y)
    return np.stack(ys), np.stack(xs)


def decoupled_sutskever(gradient, start, learning_rate, momentum, steps, weight_decay):
    """Nesterov's two sequences, with both points shrunk by lr*weight_decay*y each step."""
    x = y = np.array(start, dtype=np.float64)
    ys, xs = [y], [x]
    for t in range(steps):
        shrink = learning_rate(t) * weight_decay(t) * y
        x_plain = y - learning_rate(t) * gradient(y)
        y = x_plain + momentum(t + 1) * (x_plain - x) - shrink
        x = x_plain - shrink
        ys.append(y)
        xs.append(x)
    return np.stack(ys), np.stack(xs)


def _two_points(gradient, start, learning_rate, steps, next_point):
    """x' = y - lr grad(y) and y' = next_point(t, x', x, y); what most papers below write."""
    x = y = np.array(start, dtype=np.float64)
    ys, xs = [y], [x]
    for t in range(steps):
        x_old, x = x, y - learning_rate(t) * gradient(y)
        y = next_point(t, x, x_old, y)
        ys.append(y)
        xs.append(x)
    return np.stack(ys), np.stack(xs)


def t_sequence(steps):
    """t_0 = 1, t' = (1 + sqrt(1 + 4 t^2))/2."""
    ts = [1.0]
    for _ in range(steps):
        ts.append((1 + np.sqrt(1 + 4 * ts[-1] ** 2)) / 2)
    return ts


def fista(gradient, start, learning_rate, steps):
    """Beck & Teboulle 2009, equations 4.1-4.3, without the prox."""
    ts = t_sequence(steps)
    ahead = lambda t, x, x_old, y: x + (ts[t] - 1) / ts[t + 1] * (x - x_old)
    return _two_points(gradient, start, learning_rate, steps, ahead)


def chambolle_dossal(gradient, start, learning_rate, steps, a):
    ts = [(k + a) / a for k in range(steps + 1)]
    ahead = lambda t, x, x_old, y: x + (ts[t] - 1) / ts[t + 1] * (x - x_old)
    return _two_points(gradient, start, learning_rate, steps, ahead)


def strongly_convex(gradient, start, learning_rate, steps, q):
    momentum = (1 - np.sqrt(q)) / (1 + np.sqrt(q))
    ahead = lambda t, x, x_old, y: x + momentum * (x - x_old)
    return _two_points(gradient, start, learning_rate, steps, ahead)


def estimate_sequence(gradient, start, learning_rate, strong_convexity, steps):
    """Nesterov 2004, scheme 2.2.6, three sequences; alpha_0 = 1 after a first gradient step."""
    x = y = v = np.array(start, dtype=np.float64)
    ys, xs, alphas = [y], [x], [1.0]
    gamma = 1 / learning_rate(0)
    for t in range(steps):
        g = gradient(y)
        # The first step of alpha = 1 lands v where x lands.
        a = alphas[-1]
        if t == 0:
            v = y - learning_rate(0) * g
        else:
            mu = strong_convexity(t)
            new = (1 - a) * gamma + a * mu
            v = ((1 - a) * gamma * v + a * mu * y - a * g) / new
            gamma = new
        x = y - learning_rate(t) * g
        lr, mu = learning_rate(t + 1), strong_convexity(t + 1)
        alphas.append(np.roots([1 / lr, gamma - mu, -gamma]).max())
        a = alphas[-1]
        y = (a * gamma * v + ((1 - a) * gamma + a * mu) * x) / (gamma + a * mu)
        ys.append(y)
        xs.append(x)
    return np.stack(ys), np.stack(xs), np.array(alphas)


def ogm(gradient, start, learning_rate, steps, horizon=None):
    """Kim & Fessler 2014, algorithm OGM1; with a horizon the last x is y itself."""
    ts = t_sequence(steps) if horizon is None else optimized_t(horizon)
    ahead = lambda t, x, x_old, y: (
        x + (ts[t] - 1) / ts[t + 1] * (x - x_old) + ts[t] / ts[t + 1] * (x - y)
    )
    ys, xs = _two_points(gradient, start, learning_rate, steps, ahead)
    return ys, xs if horizon is None else np.concatenate([xs[:-1], ys[-1:]])


def ogm_g_thetas(horizon):
    thetas = np.ones(horizon + 1)
    for k in reversed(range(horizon)):
        thetas[k] = (1 + np.sqrt(1 + (8 if k == 0 else 4) * thetas[k + 1] ** 2)) / 2
    return thetas


def ogm_g(gradient, start, learning_rate, steps):
    """Kim & Fessler 2018; the evaluated iterate is y."""
    th = ogm_g_thetas(steps)

    def ahead(t, x, x_old, y):
        first = (th[t] - 1) * (2 * th[t + 1] - 1) / (th[t] * (2 * th[t] - 1))
        return x + first * (x - x_old) + (2 * th[t + 1] - 1) / (2 * th[t] - 1) * (x - y)

    ys, _ = _two_points(gradient, start, learning_rate, steps, ahead)
    return ys, ys


def optimized_t(horizon):
    """OGM's t_0 .. t_N, whose last step is longer."""
    ts = t_sequence(horizon - 1)
    return [*ts, (1 + np.sqrt(1 + 8 * ts[-1] ** 2)) / 2]


def pogm(gradient, prox, start, learning_rate, steps):
    """Kim & Fessler 2017, algorithm POGM, three sequences; a changing rate goes with its prox."""
    th = optimized_t(steps)
    x = w = z = np.array(start, dtype=np.float64)
    xs, last = [x], 1.0
    for i in range(1, steps + 1):
        lr = learning_rate(i - 1)
        ratio = (2 * th[i - 1] + th[i] - 1) / th[i]
        w_old, w = w, x - lr * gradient(x)
        ahead = w + (th[i - 1] - 1) / th[i] * (w - w_old) + th[i - 1] / th[i] * (w - x)
        z = ahead + (th[i - 1] - 1) / (last * th[i]) * (z - x)
        x, last = prox(z, ratio * lr), ratio
        xs.append(x)
    return np.stack(xs)


def optista(gradient, prox, start, learning_rate, steps):
    """Jang, Das Gupta, Ryu 2023, three sequences; returns x and y."""
    th = optimized_t(steps)
    x = y = z = np.array(start, dtype=np.float64)
    xs, ys = [x], [y]
    for i in range(steps):
        gamma = 2 * th[i] / th[-1] ** 2 * (th[-1] ** 2 - 2 * th[i] ** 2 + th[i])
        size = gamma * learning_rate(i)
        y_old, z_old = y, z
        y = prox(y - size * gradient(x), size)
        z = x + (y - y_old) / gamma
        x = z + (th[i] - 1) / th[i + 1] * (z - z_old) + th[i] / th[i + 1] * (z - x)
        xs.append(x)
        ys.append(y)
    return np.stack(xs), np.stack(ys)


def xi_form(gradient, start, step, steps, beta, gamma, delta):
    """xi' = (1+beta) xi - beta xi_ - step grad(y); y = (1+gamma) xi - gamma xi_; x with delta."""
    old = xi = y = np.array(start, dtype=np.float64)
    ys, xs = [y], [xi]
    for t in range(steps):
        old, xi = xi, (1 + beta) * xi - beta * old - step(t) * gradient(y)
        y = (1 + gamma) * xi - gamma * old
        ys.append(y)
        xs.append((1 + delta) * xi - delta * old)
    return np.stack(ys), np.stack(xs)


def tmm(gradient, start, learning_rate, steps, q):
    """Van Scoy, Freeman, Lynch 2018; learning_rate is 1/L."""
    rho = 1 - np.sqrt(q)
    return xi_form(
        gradient, start, lambda t: (1 + rho) * learning_rate(t), steps,
        beta=rho**2 / (2 - rho),
        gamma=rho**2 / ((1 + rho) * (2 - rho)),
        delta=rho**2 / (1 - rho**2),
    )  # fmt: skip


def robust_momentum(gradient, start, learning_rate, steps, q, robustness):
    """Cyrus et al. 2017; learning_rate is 1/L."""
    kappa = 1 / q
    rho = robustness * (1 - 1 / kappa) + (1 - robustness) * (1 - 1 / np.sqrt(kappa))
    alpha = kappa * (1 - rho) ** 2 * (1 + rho)
    return xi_form(
        gradient, start, lambda t: alpha * learning_rate(t), steps,
        beta=kappa * rho**3 / (kappa - 1),
        gamma=rho**3 / ((kappa - 1) * (1 - rho) ** 2 * (1 + rho)),
        delta=0.0,
    )  # fmt: skip


def item_sequence(q, steps):
    a = [0.0]
    for _ in range(steps + 1):
        root = np.sqrt((1 + a[-1]) * (1 + q * a[-1]))
        a.append(((1 + q) * a[-1] + 2 * (1 + root)) / (1 - q) ** 2)
    return a


def item(gradient, start, learning_rate, steps, q):
    """Taylor & Drori 2021, three sequences; the evaluated iterate is z."""
    a = item_sequence(q, steps)
    b = [a[k] / ((1 - q) * a[k + 1]) for k in range(steps + 1)]
    x = y = z = np.array(start, dtype=np.float64)
    ys, zs = [y], [z]
    for k in range(steps):
        delta = ((1 - q) ** 2 * a[k + 1] - (1 + q) * a[k]) / 2 / (1 + q + q * a[k])
        step = learning_rate(k) * gradient(y)
        x = y - step
        z = (1 - q * delta) * z + q * delta * y - delta * step
        y = (1 - b[k + 1]) * z + b[k + 1] * x
        ys.append(y)
        zs.append(z)
    return np.stack(ys), np.stack(zs)


def sc_ogm(gradient, start, learning_rate, steps, q):
    """Park, Salas, Ryu 2021: an OGM step with constant coefficients."""
    gamma = (np.sqrt(8 / q + 1) + 3) / (2 / q - 2)
    ahead = lambda t, x, x_old, y: x + ((x - x_old) + (x - y)) / (2 * gamma + 1)
    return _two_points(gradient, start, learning_rate, steps, ahead)


def heavy_ball(gradient, start, learning_rate, momentum, steps):
    """x' = x - lr grad(x) + momentum (x - x_)."""
    old = x = np.array(start, dtype=np.float64)
    xs = [x]
    for t in range(steps):
        old, x = x, x - learning_rate(t) * gradient(x) + momentum(t) * (x - old)
        xs.append(x)
    return np.stack(xs), np.stack(xs)


def qhm(gradient, start, learning_rate, momentum, nu, steps):
    """Ma & Yarats 2018, equations 3-4: the average is of gradients."""
    x, average = np.array(start, dtype=np.float64), 0.0
    xs = [x]
    for t in range(steps):
        g = gradient(x)
        average = momentum(t) * average + (1 - momentum(t)) * g
        x = x - learning_rate(t) * ((1 - nu(t)) * g + nu(t) * average)
        xs.append(x)
    return np.stack(xs), np.stack(xs)


def primal_averaging(base_step, start, c, interpolation, steps):
    """z' = z + base_step(y), x' = (1-c) x + c z', y = interpolation x + (1-interpolation) z."""
    x = y = z = np.array(start, dtype=np.float64)
    ys, xs = [y], [x]
    for t in range(steps):
        z = z + base_step(t, y)
        x = (1 - c(t)) * x + c(t) * z
        y = interpolation * x + (1 - interpolation) * z
        ys.append(y)
        xs.append(x)
    return np.stack(ys), np.stack(xs)


def ema_nesterov(base_step, start, decay, lookahead, steps):
    """Yau et al. 2026: x' = A(x + b m), m' = decay m + (1 - decay) (x' - x), A(y) = y + step(y)."""
    x = np.array(start, dtype=np.float64)
    m = np.zeros_like(x)
    ys, xs = [x], [x]
    for t in range(steps):
        y = x + lookahead(t) * m
        old, x = x, y + base_step(t, y)
        m = decay * m + (1 - decay) * (x - old)
        ys.append(x + lookahead(t + 1) * m)
        xs.append(x)
    return np.stack(ys), np.stack(xs)


def agnes(gradient, start, learning_rate, momentum, ratio, steps):
    """Gupta et al. 2023; velocity in parameter units: alpha = ratio*learning_rate."""
    y = x = np.array(start, dtype=np.float64)
    v = np.zeros_like(y)
    ys, xs = [y], [x]
    for t in range(steps):
        g = gradient(y)
        x = y - learning_rate(t) * g
        v = momentum(t) * (v - ratio(t) * learning_rate(t) * g)
        y = x + v
        ys.append(y)
        xs.append(x)
    return np.stack(ys), np.stack(xs)


def mass(gradient, start, learning_rate, steps, alpha, kappa):
    """Liu & Belkin 2018, the authors' three sequences."""
    y = w = v = np.array(start, dtype=np.float64)
    ys, xs = [y], [w]
    for t in range(steps):
        g = gradient(y)
        w = y - learning_rate(t) * g
        v = (1 - alpha) * v + alpha * y - learning_rate(t) / (alpha * kappa) * g
        y = alpha / (1 + alpha) * v + w / (1 + alpha)
        ys.append(y)
        xs.append(w)
    return np.stack(ys), np.stack(xs)


def accsgd(gradient, start, learning_rate, steps, kappa, xi, small_const):
    """Kidambi et al. 2018, as the authors' code writes it."""
    beta = 1 - small_const**2 * xi / kappa
    zeta = small_const / (small_const + beta)
    y = w = np.array(start, dtype=np.float64)
    ys, xs = [y], [y]
    for t in range(steps):
        g = gradient(y)
        long_step = learning_rate(t) * kappa / small_const
        w = beta * ((1 / beta - 1) * w - long_step * g + y)
        x = y - learning_rate(t) * g
        y = zeta * x + (1 - zeta) * w
        ys.append(y)
        xs.append(x)
    return np.stack(ys), np.stack(xs)


def srsgd(gradient, start, learning_rate, period, steps):
    """Wang et al. 2020, as the authors' code writes it."""
    iteration = 1
    y = old = np.array(start, dtype=np.float64)
    ys, xs = [y], [y]
    for t in range(steps):
        x = y - learning_rate(t) * gradient(y)
        y = x + (iteration - 1) / (iteration + 2) * (x - old)
        old = x
        iteration += 1
        if iteration >= period(t):
            iteration = 1
        ys.append(y)
        xs.append(x)
    return np.stack(ys), np.stack(xs)


def fista_backtracking(
    value, gradient, start, steps, *, initial=1.0, grow=(1.25, 1.05), shrink=0.5, restart=True,
    prox=None
):  # fmt: skip
    """Scheinberg, Goldfarb, Bai 2014: a failed test shortens the step and moves the query point.

    A shorter step from the same query point does not count as a retry. It is taken where there is
    no momentum, and as long as lr t^2 does not decrease. Without momentum the step is also
    lengthened, as far as the test allows. The growth is grow[0] until the first retry.
    Returns (query point, iterate, learning rate tried next, certificate, event) after each
    gradient; the certificate is 1/(2 lr t^2), None where there was no step.
    """
    x, y = (np.array(start, dtype=np.float64) for _ in range(2))
    eps, trace = np.finfo(np.float64).eps, []
    lr, mass, before, v, retried = initial, 0.0, 1.0, np.zeros_like(x), False
    corrected = lambda mass, lr: (1 + np.sqrt(1 + 4 * mass / lr)) / 2
    for k in range(steps):
        g, f = gradient(y), value(y)
        slack = 4 * eps * (abs(f) + np.sum(np.abs(g * y)))

        def proposed(lr, y=y, g=g):
            return -lr * g if prox is None else prox(y - lr * g, lr) - y

        def passes(lr, f=f, g=g, y=y, slack=slack, proposed=proposed):
            u = proposed(lr)
            model = u @ u / (2 * lr)
            return model <= 8 * slack or value(y + u) <= f + g @ u + model + slack

        telling = lambda lr, slack=slack, proposed=proposed: (
            proposed(lr) @ proposed(lr) / (2 * lr) > 8 * slack
        )
        t, still = corrected(mass, lr), before == 1
        floor = 0.0 if still else lr * (t - 1) / t
        while still and passes(lr) and (telling(lr) or k == 0):
            lr /= shrink
        while not passes(lr) and lr * shrink >= floor:
            lr *= shrink
        if still:
            t = corrected(mass, lr)
        if not passes(lr):
            lr, retried = lr * shrink, True
            y = x + (before - 1) / corrected(mass, lr) * v
            trace.append((y, x, lr, None, "retry"))
            continue
        u = proposed(lr)
        v, x, event = y + u - x, y + u, "step"
        certificate = 1 / (2 * lr * t**2)
        if restart and u @ v < 0:
            t, event = 1.0, "restart"
        before, mass = t, t * t * lr
        lr = lr * grow[retried] if telling(lr) else lr
        y = x + (t - 1) / corrected(mass, lr) * v
        trace.append((y, x, lr, certificate, event))
    return trace


def adanag(value, gradient, start, steps, probe=None):
    """Suh and Ma 2025 with c = 12, in three sequences; the first gradient only gives L_0.

    Returns (iterate, learning rate, A_k) before each step.
    """
    tau = lambda k: (k + 14) / 12
    alpha = lambda k: (tau(k + 1) - 1) ** 2 / tau(k) ** 2 / 2
    mass = lambda k: alpha(k + 1) * tau(k + 1) * (tau(k + 1) - 1) if k >= 0 else 0.0
    ratio = lambda k: (tau(k) - 1) ** 2 / (alpha(k - 1) * tau(k - 1) ** 2)
    other = lambda k: (alpha(k) * tau(k)) ** 2 * (ratio(k) - 1)

    def curvature(x, old):
        change = gradient(x) - gradient(old)
        return change @ change / 2 / (gradient(x) @ (x - old) - value(x) + value(old))

    x = z = np.array(start, dtype=np.float64)
    g = gradient(x)
    if probe is None:
        probe = 1e-3 * abs(value(x)) / (g @ g)
    r = 27 / (2 * 15 * (2 * 144 + 96 + 17))
    s = mass(0) * r / (alpha(0) * tau(0) * alpha(1) * curvature(x - probe * g, x))
    trace = []
    for k in range(steps):
        trace.append((x, s, mass(k)))
        g, old = gradient(x), x
        z = z - s * alpha(k) * tau(k) * g
        x = (1 - 1 / tau(k + 1)) * (x - s * g) + z / tau(k + 1)
        sizes = mass(k) / other(k), (other(k + 1) + (alpha(k + 1) * tau(k + 1)) ** 2) / mass(k)
        grown = (mass(k - 1) + alpha(k) * tau(k)) / mass(k) * s
        new = curvature(x, old)
        s = min(grown, 1 / (sum(sizes) * new)) if new > 0 else grown
    return trace


def diloco(
    gradients, start, steps, *, every, learning_rate, momentum, rate, betas, weight_decay, eps=1e-8
):
    """Douillard et al. 2023, algorithm 1: AdamW inside, PyTorch's SGD(nesterov=True) outside.

    With one worker it is what AlgoPerf's submission "Single Worker DiLoCo" computes. ``rate(t)`` is
    the learning rate of AdamW.

    Returns the workers' parameters and the shared ones after each step.
    """
    shared = np.array(start, dtype=np.float64)
    buffer, count = np.zeros_like(shared), len(gradients)
    local = np.stack([shared] * count)
    first, second = np.zeros_like(local), np.zeros_like(local)
    locals_, shareds = [local.copy()], [shared]
    for t in range(1, steps + 1):
        for i in range(count):
            g = gradients[i](local[i])
            first[i] = betas[0] * first[i] + (1 - betas[0]) * g
            second[i] = betas[1] * second[i] + (1 - betas[1]) * g**2
            m, v = first[i] / (1 - betas[0] ** t), second[i] / (1 - betas[1] ** t)
            local[i] -= rate(t - 1) * (m / (np.sqrt(v) + eps) + weight_decay * local[i])
        if t % every == 0:
            delta = np.mean([shared - local[i] for i in range(count)], axis=0)
            buffer = momentum * buffer + delta
            shared = shared - learning_rate * (delta + momentum * buffer)
            local[:] = shared
        locals_.append(local.copy())
        shareds.append(shared)
    return np.stack(locals_), np.stack(shareds)


def streaming_diloco(
    gradients,
    start,
    steps,
    *,
    rate,
    every,
    fragments,
    delay=0,
    mixing=0.0,
    learning_rate=1.0,
    momentum=0.0,
    weights=None,
):
    """Douillard et al. 2025, algorithm 2, with SGD inside and PyTorch's SGD(nesterov=True) outside.

    ``fragments`` are slices of the parameters, ``weights(t)`` those of the workers in step t. A
    fragment does not move in a round of which all weights are 0.

    Returns the workers' parameters and the shared ones after each step, and the skipped rounds.
    """  # fmt: skip
    count = len(gradients)
    weights = weights or (lambda t: np.ones(count))
    shared = np.array(start, dtype=np.float64)
    buffer, local = np.zeros_like(shared), np.stack([shared] * count)
    on_the_way, skipped = {}, 0
    locals_, shareds = [local.copy()], [shared.copy()]
    for t in range(1, steps + 1):
        for i in range(count):
            local[i] -= rate * gradients[i](local[i])
        w = np.asarray(weights(t), float)
        for p, part in enumerate(fragments):
            first = (p + 1) * every // len(fragments)
            if t >= first and (t - first) % every == 0:
                moved = [shared[part] - local[i][part] for i in range(count)]
                kept = sum(w[i] * moved[i] for i in range(count) if w[i] > 0)
                on_the_way[p] = kept / w.sum() if w.sum() > 0 else None
            if t - delay >= first and (t - delay - first) % every == 0:
                delta = on_the_way.pop(p)
                if delta is None:
                    skipped += 1
                else:
                    buffer[part] = momentum * buffer[part] + delta
                    shared[part] -= learning_rate * (delta + momentum * buffer[part])
                for i in range(count):
                    share = mixing if w[i] > 0 else 0.0
                    local[i][part] = share * local[i][part] + (1 - share) * shared[part]
        locals_.append(local.copy())
        shareds.append(shared.copy())
    return np.stack(locals_), np.stack(shareds), skipped


def nag_auto(gradients, start, momentum, steps, power=8.0):
    """Step by step as in the docstring, z and all sums written out; start is a list of leaves.

    ``gradients(k, y)`` gives a list. Returns the params and their averages, steps + 1 rows each.
    """
    y, x, average = ([np.array(leaf, float) for leaf in start] for _ in range(3))
    y0, leaves = [leaf.copy() for leaf in y], len(y)
    # One row for each leaf, and a last one for all leaves as one vector.
    groups = [[i] for i in range(leaves)] + [list(range(leaves))]
    join = lambda trees, group: np.concatenate([np.ravel(trees[i]) for i in group])
    size = [np.linalg.norm(join(y0, group)) for group in groups]
    distance = [0.01 * (1 + norm) for norm in size]
    squares, progress = np.zeros(leaves + 1), np.zeros(leaves + 1)
    total = [np.zeros_like(leaf) for leaf in y]
    rows, averages = [y], [average]
    for k in range(steps):
        g = gradients(k, y)
        for j, group in enumerate(groups):
            way = np.linalg.norm(join(total, group)) / (1 - momentum)
            energy = np.sum(join(g, group) ** 2)
            squares[j] += energy
            if way > 0:
                straight = 2 * progress[j] / (1 - momentum) / way
                reach = max(distance[j], straight, min(way, size[j] / 2) / 5)
                distance[j] = min(reach, (1 + 4 * energy / squares[j]) * distance[j])
        rate = 10 * (1 - momentum) * np.array(distance) / np.sqrt(squares)
        lr = np.sqrt(rate[:-1] * rate[-1])
        for i in range(leaves):
            gain = lr[i] * np.sum(g[i] * (y0[i] - y[i]))
            progress[i] += gain
            progress[-1] += gain
        total = [t + lr[i] * g[i] for i, t in enumerate(total)]
        x_new = [y[i] - lr[i] * g[i] for i in range(leaves)]
        y = [new + momentum * (new - old) for new, old in zip(x_new, x, strict=True)]
        x, weight = x_new, (1 + power) / (k + 1 + power)
        average = [a + weight * (b - a) for a, b in zip(average, y, strict=True)]
        rows.append(y)
        averages.append(average)
    return rows, averages
