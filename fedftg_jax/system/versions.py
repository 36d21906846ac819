"""Finds the versions and the code that a result depends on."""

import functools
import importlib.metadata
import json
import pathlib
import platform
import subprocess

import jax

import fedftg_jax

_ROOT = pathlib.Path(__file__).parents[2]


def current() -> dict[str, str]:
  """Returns the versions of packages and Python, and the device."""
  packages = ('jax', 'jaxlib', 'flax', 'optax', 'numpy')
  return {
    **{p: importlib.metadata.version(p) for p in packages},
    'python': platform.python_version(),
    'device': jax.devices()[0].device_kind,
  }


@functools.cache
def code() -> dict[str, str]:
  """Returns this package's version and, where it is known, its commit.

  The commit is known in a checkout, where '+' behind it says that files were
  changed since, and of a package that pip installed from a repository.
  """
  commit = _of_checkout() or _of_installation()
  return {
    'version': fedftg_jax.__version__,
    **({'commit': commit} if commit else {}),
  }


def _of_checkout() -> str:
  if not (_ROOT / '.git').exists():
    return ''
  commit = _git('rev-parse', 'HEAD')
  changed = _git('status', '--porcelain', '--untracked-files=no')
  return commit + ('+' if commit and changed else '')


def _git(*arguments: str) -> str:
  """Returns the output of git; '' if git is missing or refuses."""
  try:
    return subprocess.run(
      ['git', '-C', str(_ROOT), *arguments],
      capture_output=True,
      text=True,
      timeout=10,
      check=True,
    ).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return ''


def _of_installation() -> str:
  """Returns the commit that pip installed, see PEP 610; '' if none."""
  try:
    installed = importlib.metadata.distribution('fedftg_jax')
    text = installed.read_text('direct_url.json') or '{}'
    return str(json.loads(text)['vcs_info']['commit_id'])
  except (importlib.metadata.PackageNotFoundError, ValueError, KeyError):
    return ''
