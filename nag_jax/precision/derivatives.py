"""Derivatives of a buffer in int8, a dtype to which JAX cannot attach them."""

import jax
import jax.numpy as jnp

from nag_jax._types import PyTree


@jax.custom_jvp
def zero_like(x: jax.Array) -> jax.Array:
    """Zeros with the derivative of ``x``, which JAX cannot attach to int8."""
    return jnp.zeros_like(x)


@zero_like.defjvp
def _zero_like_jvp(
    primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    x = primals[0]  # x - x, as JAX before 0.12 forgets a rule in forward over reverse mode
    return jnp.where(jnp.isfinite(x), x - jax.lax.stop_gradient(x), 0), tangents[0]


@jax.custom_jvp
def not_differentiable(x: jax.Array) -> jax.Array:
    """``x``; ValueError where its derivative is taken."""
    return x


@not_differentiable.defjvp
def _not_differentiable_jvp(
    primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    raise ValueError(
        "an int8 buffer cannot keep the derivative of a step that was traced by jit or scan; pass "
        "accumulator_dtype=nag_jax.int8_blocks(differentiable=True), or stochastic_bfloat16()"
    )


def differentiated(tree: PyTree) -> bool:
    """Whether a derivative of some leaf is being taken, as far as that is known here.

    It is not known inside ``jit`` or ``lax.scan`` where the derivative is taken outside.
    """
    seen: list[bool] = []

    @jax.custom_jvp
    def look(x: jax.Array) -> jax.Array:
        return x

    @look.defjvp
    def note(
        primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, jax.Array]:
        seen.append(True)
        return primals[0], tangents[0]

    jax.tree.map(look, tree)
    return bool(seen)
