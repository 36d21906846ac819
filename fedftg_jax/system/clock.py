"""Measures the time of training, evaluation, checkpoints and compilation."""

import functools
import time

import jax

_COMPILE_EVENT = '/jax/core/compile/'
_compiling = [0.0]  # seconds of compilation in this process


def _count(event: str, duration_secs: float, **_) -> None:
  if event.startswith(_COMPILE_EVENT):
    _compiling[0] += duration_secs


STAGES = ('train', 'evaluate', 'checkpoint', 'compile')


@functools.cache
def _listen() -> None:
  """Makes JAX report its compilations from now on."""
  jax.monitoring.register_event_duration_secs_listener(_count)


class Clock:
  """A clock for training, evaluation, checkpoints and compilation.

  The time of a checkpoint is reported in the row after it.
  """

  def __init__(self, done: int = 0):
    """Starts the clock; `done` is the number of rounds done before."""
    _listen()
    self._seconds = dict.fromkeys(STAGES, 0.0)
    self._first = self._previous = done
    self._last = dict(self._seconds)
    self._start, self._compiled = time.perf_counter(), _compiling[0]

  def lap(self, name: str) -> None:
    """Adds the time since the last lap to `name`, except compilation."""
    now, compiled = time.perf_counter(), _compiling[0]
    compiling = min(compiled - self._compiled, now - self._start)
    self._seconds['compile'] += compiling
    self._seconds[name] += now - self._start - compiling
    self._start, self._compiled = now, compiled

  def rate(self, done: int) -> float:
    """Returns the rounds per second of training so far."""
    return (done - self._first) / max(self._seconds['train'], 1e-9)

  def row(self, done: int, runs: int = 1) -> dict[str, float]:
    """Returns the seconds and the rounds per second since the last row.

    Args:
      done: number of rounds.
      runs: number of runs that are trained at once; each gets its share.
    """
    new = {k: (v - self._last[k]) / runs for k, v in self._seconds.items()}
    rounds, self._previous = done - self._previous, done
    self._last = dict(self._seconds)
    return {
      'round': done,
      **{f'{k}_seconds': round(v, 4) for k, v in new.items()},
      'rounds_per_second': round(rounds / max(new['train'], 1e-9), 4),
    }
