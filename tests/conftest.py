"""Eight CPU devices, strict broadcasting, and float64 on request, for every test."""

import os

import programs

# Before jax starts: fewer threads than this deadlock data-parallel loops on virtual devices.
os.environ.setdefault("PJRT_NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", programs.FLAGS)

import chex
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Runs the test with float64 enabled."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(autouse=True)
def _fresh_trace_counter():
    """chex counts traces by function name, over the whole process."""
    chex.clear_trace_counter()
