"""Eight CPU devices, a compilation cache, and float64 on request, for every test."""

import os
import shutil

import programs

# Before jax starts: fewer threads than this deadlock data-parallel loops on virtual devices.
os.environ.setdefault("PJRT_NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", programs.FLAGS)
# Many tests compile the same programs. The workers and the processes of a session share a cache.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", programs.CACHE)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import chex
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_unconfigure():
    shutil.rmtree(programs.CACHE, ignore_errors=True)  # in a worker there is none of this name


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """JAX keeps every program, which would take gigabytes by the end of a session."""
    yield
    jax.clear_caches()


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
