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
