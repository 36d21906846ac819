"""What a person sees while a run goes on, and where the time goes."""

import contextlib
import importlib.metadata
import platform
import time

import jax
from rich import console as rich_console
from rich import progress as rich_progress
from rich import table as rich_table

from experiments import devices

_COMPILE_EVENT = '/jax/core/compile/'


class Progress(contextlib.AbstractContextManager):
  """A bar with round, accuracy and rounds per second; lines off a terminal."""

  def __init__(self, label: str, num_rounds: int, done: int = 0):
    self._label, self._num_rounds, self._done = label, num_rounds, done
    console = rich_console.Console(quiet=not devices.is_first())
    self._bar = None
    if console.is_terminal:
      self._bar = rich_progress.Progress(
          '{task.description}', rich_progress.BarColumn(),
          'round {task.completed}/{task.total}', '{task.fields[score]}',
          rich_progress.TimeRemainingColumn(), console=console)

  def __enter__(self):
    if self._bar:
      self._bar.start()
      self._task = self._bar.add_task(
          self._label, total=self._num_rounds, completed=self._done,
          score='compiling')
    else:
      say(f'{self._label}: compiling')
    return self

  def __exit__(self, *_):
    if self._bar:
      self._bar.stop()

  def update(self, done: int, accuracy: float, rate: float) -> None:
    score = f'accuracy {accuracy:.3f}  {rate:.2f} rounds/s'
    if self._bar:
      self._bar.update(self._task, completed=done, score=score)
    else:
      say(f'{self._label}: round {done}/{self._num_rounds}  {score}')


def say(text: str) -> None:
  """Prints a line, at once; of several processes the first speaks."""
  if devices.is_first():
    print(text, flush=True)


def show(header: list[str], rows: list[list[str]]) -> None:
  """Prints a table, as wide as it needs to be where nobody's screen wraps it."""
  console = rich_console.Console()
  if not console.is_terminal:
    console = rich_console.Console(width=200)
  screen = rich_table.Table()
  for title in header:
    screen.add_column(title, overflow='fold')
  for row in rows:
    screen.add_row(*row)
  console.print(screen)


_compiling = [0.]  # seconds of compilation, of the whole process


def _listen(event: str, seconds: float, **_) -> None:
  if event.startswith(_COMPILE_EVENT):
    _compiling[0] += seconds


jax.monitoring.register_event_duration_secs_listener(_listen)


class Clock:
  """Seconds of training, evaluation, checkpoints (in the row after them) and
  compilation, each by itself."""

  def __init__(self, done: int = 0):
    """`done`: rounds that are done already."""
    self._seconds = dict.fromkeys(
        ('train', 'evaluate', 'checkpoint', 'compile'), 0.)
    self._first = self._previous = done
    self._last = dict(self._seconds)
    self._start, self._compiled = time.perf_counter(), _compiling[0]

  def lap(self, name: str) -> None:
    """Books the time since the last lap under `name`, compilation apart."""
    now, compiled = time.perf_counter(), _compiling[0]
    compiling = min(compiled - self._compiled, now - self._start)
    self._seconds['compile'] += compiling
    self._seconds[name] += now - self._start - compiling
    self._start, self._compiled = now, compiled

  def rate(self, done: int) -> float:
    """Rounds per second of training so far."""
    return (done - self._first) / max(self._seconds['train'], 1e-9)

  def row(self, done: int) -> dict[str, float]:
    """Seconds since the last row, and rounds per second in them."""
    new = {k: v - self._last[k] for k, v in self._seconds.items()}
    rounds, self._previous = done - self._previous, done
    self._last = dict(self._seconds)
    return {'round': done, **{f'{k}_seconds': round(v, 4) for k, v in new.items()},
            'rounds_per_second': round(rounds / max(new['train'], 1e-9), 4)}


def versions() -> dict[str, str]:
  """What a figure depends on: packages, Python, device."""
  packages = ('jax', 'jaxlib', 'flax', 'optax', 'numpy')
  return {**{p: importlib.metadata.version(p) for p in packages},
          'python': platform.python_version(),
          'device': jax.devices()[0].device_kind}
