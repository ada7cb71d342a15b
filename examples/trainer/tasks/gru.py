"""A character model with gated recurrent units (GRU), in flax.nnx.

Each gate has its own arrays, because XLA on CPU does not vectorize a loop over slices of one array.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Gates = tuple[jax.Array, ...]  # of reset, update and candidate


class GRU(nnx.Module):
    """Maps codes ``[batch, time]`` and a state to logits and a new state (Cho et al. 2014)."""

    def __init__(self, symbols: int, embedding: int, hidden: int, *, rngs: nnx.Rngs):
        self.hidden = hidden
        self.embed = nnx.Embed(symbols, embedding, rngs=rngs)
        self.inputs = nnx.Linear(embedding, 3 * hidden, rngs=rngs)
        orthogonal = nnx.initializers.orthogonal()
        self.recurrent = nnx.Linear(
            hidden, 3 * hidden, use_bias=False, kernel_init=orthogonal, rngs=rngs
        )
        self.recurrent_bias = nnx.Param(jnp.zeros(3 * hidden))
        self.logits = nnx.Linear(hidden, symbols, rngs=rngs)

    def initial_state(self, batch: int) -> jax.Array:
        return jnp.zeros((batch, self.hidden))

    def __call__(self, codes: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = self.embed(codes.T)  # time comes first from here on
        assert self.inputs.bias is not None
        gates = _affine(x, _split(self.inputs.kernel[...]), _split(self.inputs.bias[...]))
        kernels, biases = _split(self.recurrent.kernel[...]), _split(self.recurrent_bias[...])
        hidden = recurrence(kernels, biases, gates, state)
        return self.logits(hidden).swapaxes(0, 1), hidden[-1]


@jax.custom_vjp
def recurrence(kernels: Gates, biases: Gates, gates: Gates, state: jax.Array) -> jax.Array:
    """States ``[time, batch, hidden]``, from ``gates`` of that shape each and a first ``state``.

    The gradient of the kernels is one product over all times; JAX would add one product per time.
    Like every ``jax.custom_vjp`` it has no forward mode, and so no product with the Hessian.
    """
    return _forward(kernels, biases, gates, state)[0]


def _forward(kernels: Gates, biases: Gates, gates: Gates, state: jax.Array) -> tuple[Any, Any]:
    def step(h: jax.Array, gate: Gates) -> tuple[jax.Array, Any]:
        mixed = _affine(h, kernels, biases)
        new = _cell(h, gate, mixed)
        return new, (h, mixed, new)

    _, (before, mixed, hidden) = jax.lax.scan(step, state, gates)
    return hidden, (kernels, gates, before, mixed)


def _backward(saved: Any, slopes: jax.Array) -> tuple[Gates, Gates, Gates, jax.Array]:
    kernels, gates, before, mixed = saved
    transposed = tuple(kernel.T for kernel in kernels)

    def step(slope: jax.Array, inputs: Any) -> tuple[jax.Array, tuple[Gates, Gates]]:
        h, gate, mix, here = inputs
        past, of_gate, of_mixed = jax.vjp(_cell, h, gate, mix)[1](slope + here)
        for of, kernel in zip(of_mixed, transposed, strict=True):
            past += of @ kernel
        return past, (of_gate, of_mixed)

    last = jnp.zeros_like(slopes[0])
    inputs = (before, gates, mixed, slopes)
    first, (of_gates, of_mixed) = jax.lax.scan(step, last, inputs, reverse=True)
    of_kernels = tuple(jnp.einsum("tbh,tbk->hk", before, of) for of in of_mixed)
    return of_kernels, tuple(of.sum((0, 1)) for of in of_mixed), of_gates, first


recurrence.defvjp(_forward, _backward)


def _cell(h: jax.Array, gate: Gates, mixed: Gates) -> jax.Array:
    """The next state, from the contributions of the inputs and of the last state to the gates."""
    reset, update = nnx.sigmoid(gate[0] + mixed[0]), nnx.sigmoid(gate[1] + mixed[1])
    # The recurrent bias of the candidate is inside the reset gate, as in cuDNN and PyTorch.
    new = jnp.tanh(gate[2] + reset * mixed[2])
    return new + update * (h - new)


def _affine(x: jax.Array, kernels: Gates, biases: Gates) -> Gates:
    each = lambda kernel, bias: x @ kernel + jnp.broadcast_to(bias, (*x.shape[:-1], len(bias)))
    return tuple(map(each, kernels, biases))


def _split(x: jax.Array) -> Gates:
    return tuple(jnp.split(x, 3, -1))
