"""NAG for noisy gradients with nothing to tune: steps from distance, gradients and progress."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nag_jax import rules
from nag_jax._arithmetic import (
    applied,
    as_arrays,
    cast_like,
    filled,
    map_gradients,
    mix,
    ratio,
    real_like,
    root,
    trained,
    wide,
    wide_zeros,
)
from nag_jax._checks import check_choice, check_range, given_params
from nag_jax._reductions import inner_products
from nag_jax.kernel import accelerate
from nag_jax.methods.averaged import averaged
from nag_jax.precision import storage as _storage
from nag_jax.rules.rule import at_step, check_momentum

_FIRST = 0.01  # the first distance, in units of 1 + the norm of the parameters
_PACE = 10.0  # effective step in units of distance / norm of all gradients
_GROWTH = 4.0  # the distance grows at most like this power of the sum of squared gradients
_SHARE = 0.2  # of the way gone, what counts even where noise has gone it
_MOST = 0.5  # of the first norm of the parameters, the longest way that counts like that


class AutoState(NamedTuple):
    """The steps of :func:`nag_auto`; the last entry of each vector is that of all leaves."""

    steps: jax.Array  # shape=(), int32
    moved: optax.Updates  # params - those of the first update, like params; float32 at least
    size: jax.Array  # |y_0|, shape=(leaves + 1,), default float dtype
    distance: jax.Array  # d, shape=(leaves + 1,), default float dtype
    squares: jax.Array  # sum of |g|^2, shape=(leaves + 1,), default float dtype
    progress: jax.Array  # sum of <lr*g, -moved>, shape=(leaves + 1,), default float dtype
    learning_rate: jax.Array  # of the last step, |u| / |g| over all leaves, shape=(), default float
    kernel: Any  # the AccelerateState of the momentum

    def iterate(self, params: optax.Params) -> optax.Params:
        """Returns x, for :func:`eval_params`."""
        return self.kernel.iterate(params)


def nag_auto(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    momentum: optax.ScalarOrSchedule = 0.9,
    *,
    evaluate: str = "average",
    axis_name: Any = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""NAG without a learning rate to tune, for stochastic gradients.

    From the start :math:`y_0` it estimates how far to go and divides by the gradients seen so
    far, for each leaf of params and for all of them together. With the effective steps
    :math:`s_j = \eta_j/(1 - \mu)`, :math:`a = \sum_{j<k} \langle s_j g_j, y_0 - y_j \rangle` and
    :math:`b = |\sum_{j<k} s_j g_j|`, which the kernel's buffer gives without one of its own,
    and :math:`G_k = \sum_{j \le k} |g_j|^2`,

    .. math::
        d_k = \min\Bigl(\max\Bigl(d_{k-1}, \frac{2 a}{b}, \frac{\min(b, |y_0|/2)}{5}\Bigr),
        \Bigl(1 + \frac{4 |g_k|^2}{G_k}\Bigr) d_{k-1}\Bigr), \qquad
        s_k = 10 \epsilon \sqrt{\frac{d_k^{\mathrm{leaf}}}{\sqrt{G_k^{\mathrm{leaf}}}}
        \frac{d_k^{\mathrm{all}}}{\sqrt{G_k^{\mathrm{all}}}}}

    with :math:`\epsilon` the ``learning_rate`` and :math:`d_0 = (1 + |y_0|)/100`; a leaf counts
    from its first gradient on that is not 0. The step :math:`-\eta_k g_k` goes through
    ``rules.nesterov``. On a straight way :math:`2a/b = b`, the way gone; noise moves y but makes no
    progress, so it makes a no larger. A fifth of the way counts in any case, up to half of the
    size that the parameters began with. (DoG takes the whole way for d, which grows with noise
    until it diverges.)

    Args:
      learning_rate: a factor on the steps found, at least 0, or a schedule of it: leave it at 1,
        or give the shape of a schedule, such as ``optax.cosine_decay_schedule(1.0, steps)``.
      momentum: in [0, 1), or a schedule; the steps are scaled to it.
      evaluate: what ``eval_params`` gives. "average": of params (:func:`averaged`), which takes
        the place of a decay of the learning rate, at the price of a buffer. "iterate": x, as for
        ``nag``; meant for a learning rate that decays to 0.
      axis_name: as in ``accelerate``, where leaves are sharded inside ``shard_map``.
      accumulator_dtype: floating dtype of the momentum, or a storage that needs less memory, such
        as ``nag_jax.int8_blocks()``; None: the dtype of each parameter.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose update needs ``params``. Its state holds
      two buffers, the way gone and the momentum, and a third for the average. What it found is
      ``optax.tree.get(state, "learning_rate")``, without ``inject_hyperparams``.

    Raises:
      ValueError: for numbers out of range; from init, if a parameter is neither floating-point nor
        complex; from update, without params.

    G forgets no gradient: after one a thousand times too large all steps are as much smaller, so
    clip where such come (``optax.clip_by_global_norm`` before it). One whose square overflows, in
    float32 from a norm of 1.8e19 on, is left out.

    Weight decay in the gradient: ``optax.chain(optax.add_decayed_weights(5e-4), nag_auto())``. Its
    accuracy beside tuned optimizers is in benchmarks/README.md.

    The point: losses of any scale, with nothing changed.

    >>> optimizer = nag_jax.nag_auto()
    >>> target = jnp.linspace(-1.0, 1.0, 50)
    >>> def error(scale):
    ...     def step(carry, noise):
    ...         params, state = carry
    ...         gradient = scale * (params - target + noise)
    ...         updates, state = optimizer.update(gradient, state, params)
    ...         return (optax.apply_updates(params, updates), state), None
    ...     noise = 0.3 * jax.random.normal(jax.random.key(0), (500, 50))
    ...     carry = jnp.zeros(50), optimizer.init(jnp.zeros(50))
    ...     (params, state), _ = jax.lax.scan(step, carry, noise)
    ...     return jnp.linalg.norm(nag_jax.eval_params(params, state) - target)
    >>> print(*[f"{error(scale):.2f}" for scale in (1e-3, 1.0, 1e3)], "of", f"{error(0):.2f}")
    0.20 0.20 0.20 of 4.16

    References:
      The estimate of the distance without noise: Mishchenko, Defazio, Prodigy: an expeditiously
      adaptive parameter-free learner, 2023, arXiv:2306.06101, algorithm 1. Distance over
      gradients, for all and for each layer: Ivgi, Hinder, Carmon, DoG is SGD's best friend, 2023,
      arXiv:2302.12022, equations 1-2. That they are mixed, the momentum and the factors are of
      this library, chosen on the tasks of benchmarks/auto.py, the MLP and the quadratics of
      benchmarks/speedup.
    """
    check_range("learning_rate", learning_rate, 0.0, schedule=True)
    check_momentum(momentum)
    check_choice("evaluate", evaluate, ("average", "iterate"))
    kernel = accelerate(rules.nesterov(momentum), accumulator_dtype=accumulator_dtype)

    def init(params: optax.Params) -> AutoState:
        vector = lambda: jnp.zeros(len(jax.tree.leaves(params)) + 1, float)
        return AutoState(
            steps=jnp.zeros([], jnp.int32),
            moved=wide_zeros(params),
            size=vector(),
            distance=vector(),
            squares=vector(),
            progress=vector(),
            learning_rate=jnp.zeros([], float),
            kernel=kernel.init(params),
        )

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, AutoState]:
        del extra_args
        state = as_arrays(state)
        params = trained(given_params("nag_auto", params), state.moved)
        real = state.distance.dtype
        mu = jnp.asarray(at_step(momentum, state.steps), real)
        factor = jnp.asarray(at_step(learning_rate, state.steps), real)
        g = jax.tree.map(lambda p, g: jnp.zeros_like(p) if g is None else g, params, updates)

        def dots(a: Any, b: Any) -> jax.Array:
            each = [product.astype(real) for product in inner_products(a, b, axis_name)]
            return jnp.stack([*each, sum(each, jnp.zeros([], real))])

        # Where params would come to rest without further steps: start + all steps/(1 - mu).
        ahead = lambda d, m: mix(1.0, d, mu / (1 - mu), m)
        velocity = _storage.read(state.kernel.m, state.kernel.storage)
        rest = jax.tree.map(ahead, state.moved, velocity)
        way = root(dots(rest, rest))
        energy = dots(g, g)
        # A finite gradient with an infinite square must not end in the state; NaN stays NaN.
        overflow = jnp.isinf(energy[-1])
        energy = jnp.where(overflow, 0, energy)
        squares = jnp.minimum(state.squares + energy, jnp.finfo(real).max)
        # A leaf counts from its first gradient on, so that frozen ones change nothing.
        fresh = state.squares == 0
        sizes = jnp.where(fresh & (energy > 0), root(dots(params, params)), state.size)[:-1]
        size = jnp.append(sizes, root(jnp.sum(sizes**2)))
        straight = ratio(2 * state.progress, (1 - mu) * way)
        reach = jnp.maximum(straight, _SHARE * jnp.minimum(way, _MOST * size))
        growth = 1 + _GROWTH * ratio(energy, squares)
        grown = jnp.clip(reach, state.distance, growth * state.distance)
        distance = jnp.where(fresh, _FIRST * (1 + size), grown)
        rate = _PACE * (1 - mu) * ratio(distance, root(squares))
        rates = jnp.where(overflow, 0, factor * root(rate[:-1] * rate[-1]))
        along = dots(g, state.moved)[:-1]
        # Orders the sums before the first change of a buffer: else XLA copies what is donated.
        rates = jnp.where(jnp.isnan(along), along, rates)

        each = jax.tree.unflatten(jax.tree.structure(params), _elements(rates, state.steps))
        steps = map_gradients(
            lambda g, lr: cast_like(-real_like(lr, g) * wide(g), g), updates, each
        )
        gains = jnp.where(overflow, 0, -rates * along)
        length = jnp.sum(rates**2 * energy[:-1])
        updates, memory = kernel.update(steps, state.kernel)
        further = lambda u, d, p: (wide(d) + applied(u, p)).astype(d.dtype)
        moved = filled(map_gradients(further, updates, state.moved, params), state.moved)
        return updates, AutoState(
            steps=jnp.asarray(optax.safe_increment(state.steps)),
            moved=moved,
            size=size,
            distance=distance,
            squares=squares,
            progress=state.progress + jnp.append(gains, jnp.sum(gains)),
            learning_rate=root(ratio(length, energy[-1])),
            kernel=memory,
        )

    optimizer = optax.GradientTransformationExtraArgs(init, update)
    return averaged(optimizer) if evaluate == "average" else optimizer


def _elements(vector: jax.Array, steps: jax.Array) -> list[jax.Array]:
    """As scalars. XLA does not know the indices before it runs, nor that steps are no less than 0:
    so the loops of leaves of one shape are the same program, and compiled once."""
    zero = jnp.minimum(steps, 0)
    indices = [(np.array([i, 0], np.int32) + zero)[0] for i in range(len(vector))]
    return [jax.lax.dynamic_index_in_dim(vector, i, keepdims=False) for i in indices]
