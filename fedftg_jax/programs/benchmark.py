"""Times a round of this package and of alternatives, side by side.

  fedftg benchmark --workloads=W1,W3 --repeat=5
  fedftg benchmark --peer_python=bench/bin/python
  fedftg benchmark --workloads=W2 --cohorts=1,2,4,8 --against=torch
  fedftg benchmark --precisions=default,bfloat16 --minutes=9 --resume

Each contestant runs in a process of its own. It takes turns with ours, round by
round, while the other waits, so that a change in the machine's load affects
both. The table shows medians, the ratio of each to ours in the same turns, and
the peak memory of the process (on an accelerator, of its device). A contestant
whose package is missing, that cannot do a workload, that fails, or that runs on
another device than ours, is left out, with the reason.

The peers are separate packages (requirements-bench.txt), some of which need
other versions than this package; --peer_python names the interpreter of an
environment that has them. To compare per core, pin the program: taskset -c 0
python -m ...

Three contestants tell how near to the limits of the device the others are.
matmul is a large matrix product, and the column "of matmul" is the share of its
speed. copy reads and writes a large array. one_step is one local step of all
clients, with the bytes that XLA counts for it.

Ours, centralised and one_step have options: candidates that may be faster.
--against takes ours:conv=pallas:client_chunk=2 like any other contestant. Those
of the server step tell what its parts take: ours:student_steps=0 has only the
generator's steps, ours:generator_steps=0 only the teachers' answers and the
student's steps.

It writes --out (JSON) after every round of a contestant, and at the end a
picture of the same name. A run that was stopped, by --minutes or otherwise,
goes on with --resume: with the rounds that are missing, and without what was
left out. Then ours is prepared again, to take turns.
"""

from collections.abc import Callable
import contextlib
import functools
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags as absl_flags
import numpy as np
from rich import console as rich_console

from fedftg_jax.contestants import options, workloads
from fedftg_jax.results import plots
from fedftg_jax.system import cli, devices, files, progress

GROUPS = ()  # of common flags in --help
OURS = 'ours'
# Contestants that run in our environment; the others use --peer_python.
HOME = (OURS, 'plain_jax', 'centralised', 'one_step', 'matmul', 'copy')
PEERS = (
  'torch',
  'torch_vmap',
  'torch_central',
  'torch_compiled',
  'fedjax',
  'pfl',
  *HOME[1:],
)
LIMITS = HOME[3:]  # no rounds: what the device and a step can do
PRECISIONS = ('default', 'bfloat16')
ENVIRONMENT = {**os.environ, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
Cell = tuple[str, int, str]  # workload, number of clients, precision
Rows = dict[tuple[str, int, str, str], dict[str, Any]]  # by cell and contestant

_WORKLOADS = absl_flags.DEFINE_list(
  'workloads',
  ['W1', 'W2', 'W3', 'W4', 'W5', 'W6'],
  'Workloads to time. They are '
  + '; '.join(f'{k}: {w.help}' for k, w in workloads.WORKLOADS.items())
  + '.',
)
_AGAINST = absl_flags.DEFINE_list(
  'against',
  [peer for peer in PEERS if peer not in LIMITS],
  'Contestants to compare with. They are '
  + ', '.join(PEERS)
  + '; and with options '
  + '; '.join(f'{k}: {", ".join(v)}' for k, v in options.OPTIONS.items())
  + '.',
)
_REPEAT = absl_flags.DEFINE_integer(
  'repeat', 5, 'Number of timed rounds. A first one compiles.', lower_bound=1
)
_COHORTS = absl_flags.DEFINE_list(
  'cohorts',
  [],
  'Numbers of clients to time with. They replace those of the workloads.',
)
_PEER_PYTHON = absl_flags.DEFINE_string(
  'peer_python',
  '',
  "Python interpreter with the peers' packages; empty for the one that runs "
  'this program.',
)
_PRECISIONS = absl_flags.DEFINE_list(
  'precisions',
  ['default'],
  'Precisions to time. default is float32 with the fast matrix products of the '
  'device; in bfloat16 layers compute in it, and weights are float32.',
)
_MINUTES = absl_flags.DEFINE_float(
  'minutes',
  0.0,
  'Minutes after which no contestant is prepared and no round is begun; 0 for '
  'no limit. What is being prepared then is not cut off, and still gets one '
  'round.',
  lower_bound=0,
)
_RESUME = absl_flags.DEFINE_bool(
  'resume', False, 'Keep the figures that are in --out, and add the others.'
)
_OUT = absl_flags.DEFINE_string(
  'out', 'runs/benchmark.json', 'Where to write the figures.'
)


def main() -> None:
  for flag, known in (
    (_WORKLOADS, workloads.WORKLOADS),
    (_AGAINST, PEERS),
    (_PRECISIONS, PRECISIONS),
  ):
    for name in flag.value:
      who, has_options, _ = name.partition(':')
      if who not in known and (who != OURS or not has_options):
        raise cli.UsageError(
          flag.name, name, 'must be one of ' + ', '.join(known)
        )
      try:
        options.parse(name)
      except ValueError as error:
        raise cli.UsageError(flag.name, name, str(error)) from error
  if shutil.which(_PEER_PYTHON.value or sys.executable) is None:
    raise cli.UsageError(
      'peer_python', _PEER_PYTHON.value, 'must be a Python interpreter'
    )
  for cohort in _COHORTS.value:
    if not (cohort.isdigit() and int(cohort)):
      raise cli.UsageError('cohorts', cohort, 'must be positive integers')
  out = pathlib.Path(_OUT.value)
  if out.suffix != '.json':
    raise cli.UsageError('out', out, 'must end in .json')
  console = rich_console.Console(stderr=True)
  deadline = time.monotonic() + 60 * (_MINUTES.value or float('inf'))
  rows = _resumed(out) if _RESUME.value else {}
  names, repeat = list(dict.fromkeys([OURS, *_AGAINST.value])), _REPEAT.value
  for cell in _cells():
    time_cell(
      cell,
      names,
      repeat,
      rows,
      save=lambda: write_figures(rows, out),
      late=lambda: time.monotonic() > deadline,
      console=console,
    )
  left = [
    (*cell, name)
    for cell in _cells()
    for name in names
    if not _is_done(rows.get((*cell, name)), repeat)
  ]
  if left:
    console.print(
      f'{len(left)} of {len(names) * len(_cells())} are left: the same command '
      'with --resume goes on'
    )
  draw(rows, out)
  progress.show(*result_table(rows))
  for row in rows.values():
    if 'left_out' in row:
      print(f'left out: {_title(row)} {row["who"]}: {row["left_out"]}')
  print(f'figures: {out}, {out.with_suffix(".png")}')


def _cells() -> list[Cell]:
  """Lists what is timed."""
  return [
    (name, int(cohort), precision)
    for name in _WORKLOADS.value
    for cohort in _COHORTS.value or [str(workloads.WORKLOADS[name].cohort)]
    for precision in _PRECISIONS.value
  ]


def _resumed(out: pathlib.Path) -> Rows:
  """Reads the figures of a benchmark that was stopped; {} if there are none.

  Raises:
    cli.UsageError: if the file is damaged, or of another machine.
  """
  if not out.exists():
    return {}
  try:
    saved = files.read_json(out)
    where = saved['machine']
    rows = {
      (r['workload'], r['cohort'], r['precision'], r['who']): r
      for r in saved['rows']
    }
    result_table(rows)
  except (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ZeroDivisionError,
  ) as error:
    raise cli.UsageError(
      'out', out, f'is damaged ({type(error).__name__}: {error})'
    ) from error
  if where != machine():
    raise cli.UsageError(
      'out', out, 'has figures of another machine, accelerator or XLA_FLAGS'
    )
  return rows


class LeftOut(Exception):
  """The reason why a contestant cannot go on."""


class Contestant:
  """A process that trains a round on request."""

  def __init__(self, name: str, workload: str, cohort: int, precision: str):
    peer_python = _PEER_PYTHON.value or sys.executable
    home = name.split(':')[0] in HOME
    python = sys.executable if home else peer_python
    self._errors = tempfile.TemporaryFile('w+')
    # The other environment should find this package, but no package that is
    # installed next to it.
    self._place = tempfile.TemporaryDirectory()
    package = pathlib.Path(__file__).parents[1]
    pathlib.Path(self._place.name, package.name).symlink_to(package)
    self._process = subprocess.Popen(
      [
        python,
        '-m',
        'fedftg_jax.contestants.worker',
        name,
        workload,
        str(cohort),
        precision,
      ],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._errors,
      text=True,
      cwd=self._place.name,
      env=ENVIRONMENT,
    )

  def answer(self) -> dict[str, Any]:
    """Reads an answer: first the one of a contestant that is ready.

    Raises:
      LeftOut: if there is none.
    """
    line = self._process.stdout.readline()  # type: ignore[union-attr]
    if not line:
      self._process.wait()
      self._errors.seek(0)
      last = [line for line in self._errors if line.strip()][-1:]
      raise LeftOut(
        ''.join(last).strip() or f'ended with status {self._process.returncode}'
      )
    answer = json.loads(line)
    if 'left_out' in answer:
      raise LeftOut(answer['left_out'])
    return answer

  def run(self) -> dict[str, Any]:
    """Trains a round; returns its seconds and the peak memory so far.

    Raises:
      LeftOut: if the contestant fails.
    """
    with contextlib.suppress(BrokenPipeError):  # then the answer is the reason
      self._process.stdin.write('\n')  # type: ignore[union-attr]
      self._process.stdin.flush()  # type: ignore[union-attr]
    return self.answer()

  def close(self) -> None:
    """Ends the process."""
    self._process.kill()
    self._process.communicate()
    self._errors.close()
    self._place.cleanup()


def time_cell(
  cell: Cell,
  names: list[str],
  repeat: int,
  rows: Rows,
  *,
  save: Callable[[], None],
  late: Callable[[], bool],
  console: rich_console.Console,
) -> None:
  """Times the contestants of a cell that are not done.

  Args:
    cell: workload, number of clients, precision.
    names: contestants, ours first.
    repeat: number of timed rounds.
    rows: all figures so far, to which those of the cell are added.
    save: is called when `rows` has changed.
    late: returns whether time is up. It is asked before a contestant is
      prepared, and between rounds.
    console: where it is said what is done.
  """
  todo = [n for n in names if not _is_done(rows.get((*cell, n)), repeat)]
  ours_can = 'left_out' not in rows.get((*cell, OURS), {})
  if any(map(_is_round, todo)) and OURS not in todo and ours_can:
    todo = [OURS, *todo]
  if not todo or late():
    return
  console.print(f'{cell[0]}: {workloads.WORKLOADS[cell[0]].help}')
  console.print(f' {cell[1]} clients, {cell[2]}')
  ours = None
  with contextlib.ExitStack() as at_end:
    for name in todo:
      if late():
        return
      key = (*cell, name)
      with contextlib.ExitStack() as now:
        one = Contestant(name, *cell)
        (at_end if name == OURS else now).callback(one.close)
        try:
          _take_turns(
            one,
            ours if _is_round(name) else None,
            key,
            repeat,
            rows,
            save,
            late,
          )
        except LeftOut as error:
          console.print(f'  {name} left out: {error}')
          if not _is_done(rows.get(key), repeat):
            rows[key] = {**_named(key), 'left_out': str(error)}
            save()
        else:
          ours = one if name == OURS else ours
          if key in rows:
            console.print(f'  {name}: {rows[key]["seconds"]:.3g} s')


def _take_turns(
  one: Contestant,
  ours: Contestant | None,
  key: tuple[str, int, str, str],
  repeat: int,
  rows: Rows,
  save: Callable[[], None],
  late: Callable[[], bool],
) -> None:
  """Times the rounds that a contestant lacks, each after a round of ours.

  Raises:
    LeftOut: if the contestant fails, or runs on another device than ours. If
      ours fails, the other goes on alone.
  """
  first = one.answer()
  if first['device'] != accelerator():
    raise LeftOut(f'runs on {first["device"]}, ours on {accelerator()}')
  row = rows.get(key) or {**_named(key), 'all_seconds': [], 'ours_seconds': []}
  while len(row['all_seconds']) < repeat:
    if ours:
      try:
        row['ours_seconds'].append(ours.run()['seconds'])
      except LeftOut:
        ours = None
    answer = one.run()
    row['all_seconds'].append(answer['seconds'])
    median = float(np.median(row['all_seconds']))
    row |= {
      'device': first['device'],
      'peak_bytes': answer['peak_bytes'],
      'seconds': median,
      'compile_seconds': max(first['first_seconds'] - median, 0.0),
      'cost': first['cost'],
      'versions': first['versions'],
    }
    rows[key] = row
    save()
    if late():
      return


def _named(key: tuple[str, int, str, str]) -> dict[str, Any]:
  return dict(zip(('workload', 'cohort', 'precision', 'who'), key))


def _is_round(name: str) -> bool:
  return name.split(':')[0] not in LIMITS


def _is_done(row: dict[str, Any] | None, repeat: int) -> bool:
  """Returns whether a contestant has all its rounds, or was left out."""
  return row is not None and (
    'left_out' in row or len(row['all_seconds']) >= repeat
  )


def result_table(rows: Rows) -> tuple[list[str], list[list[str]]]:
  """Formats the results: header and rows, as text."""
  timed = [row for row in rows.values() if 'left_out' not in row]
  limits = {_title(r): r for r in timed if r['who'] == 'matmul'}
  lines = []
  for r in timed:
    title, speed = _title(r), _gflop_per_second(r)
    moved = r['cost'].get('gbyte')
    lines.append(
      [
        title,
        r['who'],
        r['device'],
        f'{r["seconds"]:.3g}',
        f'{min(r["all_seconds"]):.3g} - {max(r["all_seconds"]):.3g}',
        f'{r["seconds"] / np.median(r["ours_seconds"]):.2f}'
        if r['ours_seconds']
        else '',
        f'{speed:.0f}' if speed else '',
        f'{100 * speed / _gflop_per_second(limits[title]):.1f} %'
        if speed and title in limits
        else '',
        f'{moved / r["seconds"]:.0f}' if moved else '',
        f'{r["peak_bytes"] / 1e9:.2f}',
        f'{r["compile_seconds"]:.1f}',
      ]
    )
  return [
    'workload',
    'who',
    'device',
    's per round',
    'range',
    'times ours',
    'GFLOP/s',
    'of matmul',
    'GB/s',
    'peak GB',
    'compile s',
  ], lines


def _gflop_per_second(row: dict[str, Any]) -> float:
  """Returns the speed of a row, 0 if its operations are not counted."""
  own = workloads.WORKLOADS[row['workload']]
  gflop = own.gflop and own.gflop * row['cohort'] / own.cohort
  return (row['cost'].get('gflop') or gflop or 0.0) / row['seconds']


def _title(row: dict[str, Any]) -> str:
  name, cohort = row['workload'], row['cohort']
  if cohort != workloads.WORKLOADS[name].cohort:
    name += f' x {cohort}'
  return name if row['precision'] == 'default' else f'{name} {row["precision"]}'


def write_figures(rows: Rows, out: pathlib.Path) -> None:
  """Writes the figures."""
  files.write_json(out, {'machine': machine(), 'rows': [*rows.values()]})


def draw(rows: Rows, out: pathlib.Path) -> None:
  """Draws the picture beside the figures."""
  groups = {}
  for r in rows.values():
    if 'left_out' not in r and _is_round(r['who']):
      groups.setdefault(_title(r), {})[r['who']] = r['seconds']
  if groups:
    with files.replacing(out.with_suffix('.png')) as temporary:
      plots.bars(temporary, groups, 'seconds per round')


def machine() -> dict[str, Any]:
  """Describes the machine."""
  return {
    'platform': platform.platform(),
    'processor': devices.processor(),
    'cores': len(os.sched_getaffinity(0)),
    'accelerator': accelerator(),
    'xla_flags': os.environ.get('XLA_FLAGS', ''),
  }


@functools.cache
def accelerator() -> str:
  """Returns the name of the device that JAX uses here, 'cpu' if it is none.

  It is asked in a process of its own, which leaves the device to contestants.
  """
  code = 'import jax; print(jax.devices()[0].device_kind)'
  asked = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    env=ENVIRONMENT,
  )
  if asked.returncode:
    raise cli.RunError(
      'JAX has no device: ' + ''.join(asked.stderr.splitlines()[-1:])
    )
  return asked.stdout.splitlines()[-1]
