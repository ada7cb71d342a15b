"""Eight CPU devices, a compilation cache, and float64 on request, for every test."""

import os
import shutil
import tempfile

import programs

# Before jax starts: fewer threads than this deadlock data-parallel loops on virtual devices.
os.environ.setdefault("PJRT_NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", programs.FLAGS)
# Many tests compile the same programs. The workers and the processes of a session share a cache.
_own_cache = "JAX_COMPILATION_CACHE_DIR" not in os.environ
if _own_cache:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="nag_jax_tests_")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import chex
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_unconfigure():
    """Removes the cache, in the process that made it."""
    if _own_cache:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


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
