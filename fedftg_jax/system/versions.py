"""Finds the versions that a result depends on."""

import importlib.metadata
import platform

import jax


def current() -> dict[str, str]:
  """Returns the versions of packages and Python, and the device."""
  packages = ('jax', 'jaxlib', 'flax', 'optax', 'numpy')
  return {
    **{p: importlib.metadata.version(p) for p in packages},
    'python': platform.python_version(),
    'device': jax.devices()[0].device_kind,
  }
