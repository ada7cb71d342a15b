"""NAG for noisy gradients with nothing to tune: steps from distance, gradients and progress."""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from nag_jax import rules
from nag_jax._arithmetic import (
    as_arrays,
    cast_like,
    copied,
    filled,
    map_gradients,
    mix,
    ratio,
    real_like,
    root,
    trained,
    wide,
)
from nag_jax._checks import check_choice, check_range, given_params
from nag_jax._reductions import inner_products
from nag_jax._types import (
    AxisName,
    BufferDType,
    DTypeLike,
    Evaluate,
    Params,
    Updates,
    transformation,
)
from nag_jax.kernel import AccelerateState, accelerate
from nag_jax.methods.averaged import averaged
from nag_jax.precision import storage
from nag_jax.rules.rule import at_step, check_momentum

_FIRST = 0.01  # the first distance, in units of 1 + the norm of the parameters
_PACE = 10.0  # effective step in units of distance / norm of all gradients
_GROWTH = 4.0  # the distance grows at most like this power of the sum of squared gradients
_SHARE = 0.2  # of the way gone, what counts even where noise has gone it
_MOST = 0.5  # of the first norm of the parameters, the longest way that counts like that


class AutoState(NamedTuple):
    """State of :func:`nag_auto`; the last entry of each vector is that of all leaves together."""

    steps: jax.Array  # shape=(), int32
    start: Params  # y_0, like params
    distance: jax.Array  # d, shape=(leaves + 1,), default float dtype
    squares: jax.Array  # G, shape=(leaves + 1,), default float dtype
    progress: jax.Array  # (1 - mu) a, shape=(leaves + 1,), default float dtype
    learning_rate: jax.Array  # of the last step, |u| / |g| over all leaves, shape=(), default float
    inner: AccelerateState  # of the momentum

    def iterate(self, params: Params) -> Params:
        """Returns x, for :func:`eval_params`."""
        return self.inner.iterate(params)


def nag_auto(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    momentum: optax.ScalarOrSchedule = 0.9,
    *,
    evaluate: Evaluate = "average",
    axis_name: AxisName | None = None,
    accumulator_dtype: BufferDType = None,
) -> optax.GradientTransformationExtraArgs:
    r"""NAG without a learning rate to tune, for stochastic gradients.

    It estimates the distance to go from the start :math:`y_0`, and divides it by the gradients seen
    so far, for each leaf of params and for all leaves together. Let
    :math:`s_j = \eta_j/(1 - \mu)` be the effective steps,
    :math:`a = \sum_{j<k} \langle s_j g_j, y_0 - y_j \rangle` the progress,
    :math:`b = |\sum_{j<k} s_j g_j|` the way gone, which follows from params and the kernel's
    buffer, and :math:`G_k = \sum_{j \le k} |g_j|^2`. Then

    .. math::
        d_k = \min\Bigl(\max\Bigl(d_{k-1}, \frac{2 a}{b}, \frac{\min(b, |y_0|/2)}{5}\Bigr),
        \Bigl(1 + \frac{4 |g_k|^2}{G_k}\Bigr) d_{k-1}\Bigr), \qquad
        s_k = 10 \epsilon \sqrt{\frac{d_k^{\mathrm{leaf}}}{\sqrt{G_k^{\mathrm{leaf}}}}
        \frac{d_k^{\mathrm{all}}}{\sqrt{G_k^{\mathrm{all}}}}}

    where :math:`\epsilon` is the ``learning_rate`` and :math:`d_0 = (1 + |y_0|)/100`. A leaf counts
    from its first gradient on that is not 0. The step :math:`-\eta_k g_k` goes through
    ``rules.nesterov``.

    On a straight line :math:`2a/b = b`, the way gone. Noise moves y but makes no progress on
    average, so it does not increase a. A fifth of the way counts in any case, up to half of the
    size that the parameters began with. (DoG takes the whole way as d, which grows with noise until
    it diverges.)

    G forgets no gradient: after one that is a thousand times too large, all steps are that much
    smaller, so clip such gradients (``optax.clip_by_global_norm`` before it). A gradient whose
    square overflows, in float32 from a norm of 1.8e19 on, is left out.

    For weight decay in the gradient: ``optax.chain(optax.add_decayed_weights(5e-4), nag_auto())``.
    benchmarks/README.md compares its accuracy with that of tuned optimizers.

    Args:
      learning_rate: :math:`\epsilon`, a dimensionless factor on the steps found, at least 0, or a
        schedule of it. Leave it at 1, or give the shape of a schedule, such as
        ``optax.cosine_decay_schedule(1.0, steps)``.
      momentum: :math:`\mu`, dimensionless, in [0, 1), or a schedule; the steps are scaled to it.
      evaluate: what ``eval_params`` returns. "average": an average of params (:func:`averaged`),
        which replaces a decay of the learning rate and costs one more buffer. "iterate": x, as
        with ``nag``; for a learning rate that decays to 0.
      axis_name: as in ``accelerate``, where leaves are sharded inside ``shard_map``.
      accumulator_dtype: floating dtype of the momentum, or a storage that needs less memory, such
        as ``nag_jax.int8_blocks()``; None: the dtype of each parameter.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its update needs ``params``. Its state has two
      buffers, the first params and the momentum, and a third for the average. The learning rate it
      found is ``optax.tree.get(state, "learning_rate")``, without ``inject_hyperparams``.

    Raises:
      ValueError: if a number is out of range; from init, if a parameter is neither floating-point
        nor complex; from update, without params.

    Example:
      A loss of any scale, with nothing changed:

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

    def init(params: Params) -> AutoState:
        vector = lambda: jnp.zeros(len(jax.tree.leaves(params)) + 1, float)
        inner = cast(AccelerateState, kernel.init(params))  # checks the dtypes of params
        return AutoState(
            steps=jnp.zeros([], jnp.int32),
            start=copied(params),
            distance=vector(),
            squares=vector(),
            progress=vector(),
            learning_rate=jnp.zeros([], float),
            inner=inner,
        )

    def update(
        updates: Updates, state: AutoState, params: Params | None = None, **extra_args: object
    ) -> tuple[Updates, AutoState]:
        del extra_args
        state = as_arrays(state)
        params = trained(given_params("nag_auto", params), state.start)
        real = state.distance.dtype
        mu = jnp.asarray(at_step(momentum, state.steps), real)
        factor = jnp.asarray(at_step(learning_rate, state.steps), real)
        dots = lambda a, b: _with_sum(inner_products(a, b, axis_name), real)

        # The first pass over the arrays makes all sums. The second one could make those of the way
        # and the progress for the next step. But XLA on GPU copies what is donated where more than
        # one sum is in the pass that changes it.
        g = filled(updates, jax.tree.map(jnp.zeros_like, params))
        gone, rest = _ways(params, state, mu)
        energy, overflow = _finite(dots(g, g))
        squares = _sum_of_squares(state.squares, energy)
        size = _size(dots(state.start, state.start), squares)
        reach = _reach(state.progress, root(dots(rest, rest)), size, mu)
        distance = _distance(state.distance, reach, size, energy, state.squares, squares)
        rates = factor * (1 - mu) * _effective_steps(distance, squares)
        # As arrays that XLA cannot take apart: otherwise it repeats the sums over all leaves in the
        # loop of each leaf, and compiles for minutes. On a GPU it also merges the kernels of small
        # leaves if they read the same array.
        rates, along = jax.lax.optimization_barrier(
            (jnp.where(overflow, 0, rates), dots(g, gone)[:-1])
        )

        each = jax.tree.unflatten(jax.tree.structure(params), list(rates))
        steps = map_gradients(
            lambda g, lr: cast_like(-real_like(lr, g) * wide(g), g), updates, each
        )
        updates, inner = kernel.update(steps, state.inner)
        gains = jnp.where(overflow, 0, -rates * along)
        lengths = rates * root(energy[:-1])
        return updates, AutoState(
            steps=jnp.asarray(optax.safe_increment(state.steps)),
            start=state.start,
            distance=distance,
            squares=squares,
            progress=state.progress + jnp.append(gains, jnp.sum(gains)),
            learning_rate=ratio(root(jnp.sum(lengths**2)), root(energy[-1])),
            inner=cast(AccelerateState, inner),
        )

    optimizer = transformation(init, update)
    return averaged(optimizer) if evaluate == "average" else optimizer


def _with_sum(terms: list[jax.Array], dtype: DTypeLike) -> jax.Array:
    """The terms as a vector, and their sum as its last entry."""
    # Like the rates an array that XLA cannot take apart and compute again wherever it is used.
    each = jax.lax.optimization_barrier(jnp.stack([term.astype(dtype) for term in terms]))
    return jnp.append(each, jnp.sum(each))


def _finite(energy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """|g|^2, or 0 for all leaves if it overflows, and whether it does. NaN stays NaN."""
    overflow = jnp.isinf(energy[-1])
    return jnp.where(overflow, 0, energy), overflow


def _sum_of_squares(squares: jax.Array, energy: jax.Array) -> jax.Array:
    """G_k = G_{k-1} + |g_k|^2, finite."""
    return jnp.minimum(squares + energy, jnp.finfo(squares.dtype).max)


def _ways(params: Params, state: AutoState, mu: jax.Array) -> tuple[Params, Params]:
    """y_k - y_0, and -(sum of s_j g_j): how far params come without further steps."""
    velocity = storage.read(state.inner.m, state.inner.storage)
    gone = jax.tree.map(lambda p, start: wide(p) - wide(start), params, state.start)
    return gone, jax.tree.map(lambda gone, m: mix(1.0, gone, mu / (1 - mu), m), gone, velocity)


def _size(square: jax.Array, squares: jax.Array) -> jax.Array:
    """|y_0|. A leaf counts from its first gradient on, so that frozen ones change nothing."""
    square = jnp.where(squares > 0, square, 0)[:-1]
    return root(jnp.append(square, jnp.sum(square)))


def _reach(progress: jax.Array, way: jax.Array, size: jax.Array, mu: jax.Array) -> jax.Array:
    """max(2a/b, min(b, |y_0|/2)/5); ``progress`` is (1 - mu) a."""
    straight = ratio(2 * progress, (1 - mu) * way)
    return jnp.maximum(straight, _SHARE * jnp.minimum(way, _MOST * size))


def _distance(
    last: jax.Array,
    reach: jax.Array,
    size: jax.Array,
    energy: jax.Array,
    last_squares: jax.Array,
    squares: jax.Array,
) -> jax.Array:
    """d_k = min(max(d_{k-1}, reach), (1 + 4 |g_k|^2/G_k) d_{k-1}), or d_0 = (1 + |y_0|)/100."""
    grown = jnp.clip(reach, last, (1 + _GROWTH * ratio(energy, squares)) * last)
    return jnp.where(last_squares == 0, _FIRST * (1 + size), grown)


def _effective_steps(distance: jax.Array, squares: jax.Array) -> jax.Array:
    """s_k/epsilon of each leaf: 10 times the geometric mean of its d/sqrt(G) and that of all."""
    pace = _PACE * ratio(distance, root(squares))
    return root(pace[:-1] * pace[-1])
