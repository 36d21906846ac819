"""Measures accuracy and distortion against bits per parameter, by codec.

  fedftg compression --model=mlp --ftg_preset=robust --seeds=3
  fedftg compression --bases=fed_avg --rates=2 --codecs=uveqfed,top_k

The flags define the setting. Each of --bases is trained without coding, and
with each of --codecs at each of --rates, with the same seeds, partitions and
schedules; uveqfed with each of --lattices. Distortion is the squared norm of
the error divided by that of what was coded, mean over rounds.

In addition, every codec codes a vector of Gaussian numbers. The table shows the
gain of the lattices over integers at the same rate, and their gain in the limit
of many bits, which is the ratio of their cells' second moments.

Finished runs are skipped, so the same command continues with the rest. If a run
diverges, this is noted, and the others continue.

It writes into --workdir: table.md, compression.json, compression.png, and each
run's files in CONFIGURATION/seedK/.
"""

from collections.abc import Iterator, Mapping, Sequence
import itertools
import math
from typing import Any, NamedTuple

from absl import flags as absl_flags
import jax
import jax.numpy as jnp
import numpy as np

from fedftg_jax import uplinks
from fedftg_jax.configuration import folders, resolve
from fedftg_jax.configuration.resolve import Configuration
from fedftg_jax.results import plots, statistics
from fedftg_jax.runs import suite
from fedftg_jax.system import cli, files, progress

CLAIM = {'program': 'compression'}
GAUSSIAN = 'Gaussian vector'
CODECS = tuple(name for name in uplinks.HELP if name != 'none')
# Size of the Gaussian vector: as many entries as a step is found on, see
# `entropy`.
_ENTRIES = 2**16
_DRAWS = 8  # number of times that it is coded

absl_flags.DEFINE_list(
  'bases', ['fed_avg', 'fed_avg+fed_ftg'], 'Methods to train with each codec.'
)
absl_flags.DEFINE_list(
  'codecs',
  list(CODECS),
  'Codecs to compare. They are ' + ', '.join(CODECS) + '.',
)
absl_flags.DEFINE_list(
  'lattices',
  list(uplinks.LATTICES),
  'Lattices of uveqfed. They are ' + ', '.join(uplinks.LATTICES) + '.',
)
absl_flags.DEFINE_list(
  'rates', ['1', '2', '3', '4'], 'Rates, in bits per parameter.'
)
FLAGS = absl_flags.FLAGS


class Coding(NamedTuple):
  """A codec and its rate, as the flags that choose it."""

  uplink: str = 'none'
  rate: float | None = None
  lattice: str | None = None

  @property
  def name(self) -> str:
    """The codec's name, with the lattice if it has one."""
    return f'{self.uplink} {self.lattice}' if self.lattice else self.uplink

  @property
  def flags(self) -> dict[str, Any]:
    """The flags that choose it."""
    values = zip(('uplink', 'uplink_rate', 'uplink_lattice'), self)
    return {flag: value for flag, value in values if value is not None}


class Row(NamedTuple):
  """The results with one codec."""

  source: str  # a method, or GAUSSIAN
  coding: Coding
  # By seed, empty if nothing is trained; None if a run diverged.
  accuracy: list[float] | None  # final, in percent
  rate: float = math.nan  # bits per parameter
  rate_elias: float = math.nan  # likewise, in Elias' gamma code
  distortion: float = math.nan
  megabytes_up: float = math.nan  # of one run


def main() -> None:
  entries = parse(FLAGS.bases, FLAGS.codecs, FLAGS.lattices, FLAGS.rates)
  configs = {name: config for name, (_, _, config) in entries.items()}
  resolve.say_unused(configs.values())
  folder = folders.workdir(
    FLAGS.workdir, resolve.config(), 'compression', *configs
  )
  progress.say(
    f'{len(configs)} configurations, {len(suite.seeds())} seed(s) each'
  )
  with folders.opened(folder, CLAIM):
    results = suite.train_all(folder, CLAIM, configs, tolerant=True)
    if results:
      write_results(entries, results, folder)


def parse(
  bases: Sequence[str],
  codecs: Sequence[str],
  lattices: Sequence[str],
  rates: Sequence[str],
) -> dict[str, tuple[str, Coding, Configuration]]:
  """Makes the configurations to train, by name; arguments as in the flags.

  Raises:
    cli.UsageError: for an unknown codec or lattice, a rate that is not a number
      or out of range, or a method that cannot be trained with a codec.
  """
  for flag, names, known in (
    ('codecs', codecs, CODECS),
    ('lattices', lattices, tuple(uplinks.LATTICES)),
  ):
    wrong = [name for name in names if name not in known]
    if wrong:
      raise cli.UsageError(flag, wrong[0], 'must be of ' + ', '.join(known))
  numbers = [resolve.parse_value('uplink_rate', text) for text in rates]
  codings = [Coding(), *all_codings(codecs, lattices, numbers)]
  if not (bases and codings[1:]):
    raise cli.UsageError(
      'bases', ','.join(bases), 'needs a method, a codec and a rate'
    )
  entries = {}
  for base, coding in itertools.product(bases, codings):
    named = [f'{k}={v}' for k, v in coding.flags.items()]
    config = resolve.config(method=base, **coding.flags)
    entries[','.join([base, *named])] = base, coding, config
  return entries


def all_codings(
  codecs: Sequence[str], lattices: Sequence[str], rates: Sequence[float]
) -> Iterator[Coding]:
  """Yields each codec, uveqfed with each lattice, at each rate."""
  for codec in codecs:
    for lattice in lattices if codec == 'uveqfed' else [None]:
      for rate in rates:
        yield Coding(codec, rate, lattice)


def write_results(
  entries: Mapping[str, tuple[str, Coding, Configuration]],
  results: statistics.Results,
  folder,
) -> None:
  """Writes and prints the results."""
  codings = dict.fromkeys(coding for _, coding, _ in entries.values())
  rows = [of_gaussian(coding) for coding in codings if coding.rate]
  rows += [
    of_runs(base, coding, results[name])
    for name, (base, coding, _) in entries.items()
  ]
  files.write_json(
    folder / 'compression.json',
    {
      'seeds': list(suite.seeds()),
      'rows': [as_json(row, rows) for row in rows],
    },
  )
  header, lines = result_table(rows)
  statistics.write_table(folder / 'table.md', (header, lines))
  with files.replacing(folder / 'compression.png') as temporary:
    plots.panels(temporary, pictures(rows), 'bits per parameter')
  progress.show(header, lines)
  print(f'table: {folder}/table.md; picture: {folder}/compression.png')


def of_gaussian(coding: Coding) -> Row:
  """Codes a vector of independent Gaussian numbers several times."""
  vector = jax.random.normal(jax.random.key(0), (_ENTRIES,))
  codec = uplinks.build(coding.uplink, coding.rate, coding.lattice)  # type: ignore[arg-type]
  assert codec is not None  # 'none' has no rate

  @jax.jit
  def code(key):
    decoded, state = codec.update(vector, codec.init(vector), key=key)
    error = jnp.sum((decoded - vector) ** 2) / jnp.sum(vector**2)
    return error, state.columns

  error, columns = jax.tree.map(
    lambda *draws: float(np.mean(draws)),
    *map(code, jax.random.split(jax.random.key(1), _DRAWS)),
  )
  return Row(
    GAUSSIAN, coding, [], columns['rate'], columns['rate_elias'], error
  )


def of_runs(base: str, coding: Coding, runs: Sequence[Any]) -> Row:
  """Averages figures of `suite.figures_of` over seeds and rounds."""
  if any(run is None for run in runs):
    return Row(base, coding, None)
  accuracy = [100 * run['final_accuracy'] for run in runs]
  megabytes = runs[0]['bytes_up'] / 1e6
  if not coding.rate:
    return Row(base, coding, accuracy, 32.0, 32.0, 0.0, megabytes)

  def mean(column):
    values = [row[f'uplink/{column}'] for run in runs for row in run['rows']]
    return float(np.mean([v for v in values if v is not None] or [np.nan]))

  return Row(
    base,
    coding,
    accuracy,
    mean('rate'),
    mean('rate_elias'),
    mean('distortion'),
    megabytes,
  )


def gain(row: Row, rows: Sequence[Row]) -> float:
  """Computes by how many decibels distortion is below that of integers.

  The comparison is at the same rate; NaN if there is none.
  """
  integers = row.coding._replace(lattice='z')
  for other in rows:
    if row.coding.lattice and (other.source, other.coding) == (
      row.source,
      integers,
    ):
      return 10 * math.log10(other.distortion / row.distortion)
  return math.nan


def limit(lattice: str | None) -> float:
  """Computes `gain` in the limit of many bits."""
  if lattice is None:
    return math.nan
  moments = (uplinks.LATTICES[name].second_moment for name in ('z', lattice))
  return 10 * math.log10(next(moments) / next(moments))


def as_json(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
  """Formats a row of compression.json, with null where there is no number."""
  values = {
    **row._asdict(),
    'coding': row.coding.flags,
    'gain': gain(row, rows),
    'limit': limit(row.coding.lattice),
  }
  return {
    k: None if isinstance(v, float) and math.isnan(v) else v
    for k, v in values.items()
  }


def result_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
  """Formats the results: header and rows, as text."""

  def number(value, form):
    return '–' if math.isnan(value) else format(value, form)

  lines = []
  for row in rows:
    accuracy = row.accuracy
    lines.append(
      [
        row.source,
        row.coding.name,
        f'{row.coding.rate:g}' if row.coding.rate else '–',
        number(row.rate, '.3f'),
        number(row.rate_elias, '.3f'),
        number(row.distortion, '.3g'),
        number(gain(row, rows), '+.2f'),
        number(limit(row.coding.lattice), '+.2f'),
        'diverged'
        if accuracy is None
        else statistics.percent(
          statistics.mean_and_std([a / 100 for a in accuracy])
        )
        if accuracy
        else '–',
        number(row.megabytes_up, '.1f'),
      ]
    )
  return [
    'of',
    'codec',
    'asked bits',
    'bits',
    'bits, Elias',
    'distortion',
    'gain over z, dB',
    'in the limit',
    'final accuracy',
    'MB up',
  ], lines


def pictures(rows: Sequence[Row]) -> list[plots.Panel]:
  """Makes the panels: accuracy and distortion by method, then lattice gains."""
  trained = [row for row in rows if row.source != GAUSSIAN and row.accuracy]
  sources = list(dict.fromkeys(row.source for row in trained))
  found = []
  for source in sources:
    of_source = [row for row in trained if row.source == source]
    plain = [row for row in of_source if not row.coding.rate]
    coded = [row for row in of_source if row.coding.rate]
    found.append(
      plots.Panel(
        source,
        'final test accuracy, percent',
        _curves(coded, _mean_accuracy),
        {row.coding.name: _mean_accuracy(row) for row in plain},
      )
    )
    found.append(
      plots.Panel(
        source,
        'distortion',
        _curves(coded, lambda row: row.distortion),
        log=True,
      )
    )
  lattices = [
    row for row in rows if row.source == GAUSSIAN and row.coding.lattice
  ]
  return [
    *found,
    plots.Panel(
      f'{GAUSSIAN}; dotted: limits',
      'gain over z, dB',
      _curves(
        [row for row in lattices if not math.isnan(gain(row, rows))],
        lambda row: gain(row, rows),
      ),
      {row.coding.name: limit(row.coding.lattice) for row in lattices},
    ),
  ]


def _mean_accuracy(row) -> float:
  return float(np.mean(row.accuracy))


def _curves(rows, value) -> dict[str, list[tuple[float, float]]]:
  """Collects the points (bits, value) by codec."""
  series = {}
  for row in rows:
    series.setdefault(row.coding.name, []).append((row.rate, value(row)))
  return {name: sorted(points) for name, points in series.items()}
