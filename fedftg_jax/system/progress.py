"""Shows a run on the screen: progress bar, lines and tables."""

import contextlib
import html

from rich import console as rich_console
from rich import progress as rich_progress
from rich import table as rich_table

from fedftg_jax.system import devices


class Progress(contextlib.AbstractContextManager):
  """A progress bar with round, accuracy and speed.

  It is a bar in a terminal and in a notebook, and lines elsewhere.
  """

  def __init__(
    self, label: str, num_rounds: int, done: int = 0, quiet: bool = False
  ):
    self._label, self._num_rounds, self._done = label, num_rounds, done
    self._quiet = quiet or not devices.is_first()
    console = rich_console.Console(quiet=self._quiet)
    self._bar = self._cell = None
    if console.is_jupyter and not self._quiet:
      self._cell = _Cell()
    elif console.is_terminal:
      self._bar = rich_progress.Progress(
        '{task.description}',
        rich_progress.BarColumn(),
        'round {task.completed}/{task.total}',
        '{task.fields[score]}',
        rich_progress.TimeRemainingColumn(),
        console=console,
      )

  def __enter__(self):
    if self._bar:
      self._bar.start()
      self._task = self._bar.add_task(
        self._label,
        total=self._num_rounds,
        completed=self._done,
        score='compiling',
      )
    else:
      self._show(self._done, 'compiling')
    return self

  def __exit__(self, *_):
    if self._bar:
      self._bar.stop()

  def update(self, done: int, accuracy: float, rate: float) -> None:
    """Shows the rounds done, the accuracy, and the rounds per second."""
    score = f'accuracy {100 * accuracy:.2f} %  {rate:.2f} rounds/s'
    if self._bar:
      self._bar.update(self._task, completed=done, score=score)
    else:
      self._show(done, score)

  def _show(self, done: int, score: str) -> None:
    text = f'{self._label}: round {done}/{self._num_rounds}  {score}'
    if self._cell:
      self._cell.show(text, done / self._num_rounds)
    elif not self._quiet:
      say(text if score != 'compiling' else f'{self._label}: compiling')


class _Cell:
  """An output of a notebook's cell with a bar and a line, updated in place."""

  def __init__(self):
    self._display = None

  def show(self, text: str, share: float) -> None:
    from IPython import display  # always installed in a notebook

    shown = {
      'text/plain': text,
      'text/html': f'<progress value="{share:.4f}"></progress> '
      f'<code>{html.escape(text)}</code>',
    }
    if self._display is None:
      self._display = display.display(shown, raw=True, display_id=True)
    else:
      self._display.update(shown, raw=True)


def say(text: str) -> None:
  """Prints a line at once; of several processes only the first prints."""
  if devices.is_first():
    print(text, flush=True)


def show(header: list[str], rows: list[list[str]]) -> None:
  """Prints a table; off a terminal it is as wide as necessary."""
  console = rich_console.Console()
  if not console.is_terminal:
    console = rich_console.Console(width=200)
  screen = rich_table.Table()
  for title in header:
    screen.add_column(title, overflow='fold')
  for row in rows:
    screen.add_row(*row)
  console.print(screen)
