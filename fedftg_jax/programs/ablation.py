"""Measures when FedFTG helps, one factor at a time, paired by seed.

  fedftg ablation --budget_hours=2 --seeds=5
  fedftg ablation --factors=dirichlet_alpha,switch --seeds=3

The flags define the centre. In every cell one factor has another value, and
--base is trained with and without FedFTG, with the same seeds, partitions and
schedules. Data, model, participation and base are varied with each of
--presets, FedFTG's own options are varied around --ftg_preset. An effect is the
mean over seeds of the difference of the final accuracies, with a 95 % interval
(Student's t). Cells are trained in the order of the table until --budget_hours
are used up; the same command continues with the rest.

Beside each effect are FedFTG's own measurements (means over all rounds): how
well the ensemble recognises the images, how far student and ensemble are apart
before and after, and how far the student moves. Their rank correlations with
the effect, and that of the base's accuracy, over cells and seeds, show what
goes together with the effect; this does not prove a cause.

It writes into --workdir: table.md, effects.json, effects.png, explained.png,
and each run's files in CONFIGURATION/seedK/.
"""

from collections.abc import Mapping, Sequence
import time
from typing import Any, NamedTuple

from absl import flags as absl_flags
from etils import epy
import numpy as np

from fedftg_jax import recipes
from fedftg_jax.configuration import folders, resolve
from fedftg_jax.configuration.resolve import Configuration
from fedftg_jax.results import plots, statistics
from fedftg_jax.results import rows as rows_lib
from fedftg_jax.runs import suite
from fedftg_jax.system import cli, files, progress

with epy.lazy_imports():
  from scipy import stats

CENTRE = 'centre'
CLAIM = {'program': 'ablation'}
# By factor, the flags of `train` that each cell changes; `base` is --base.
SETTINGS: Mapping[str, list[dict[str, Any]]] = {
  'norm': [
    dict(norm='group'),
    dict(norm='batch'),
    dict(norm='batch', ftg_student_bn='keep'),
    dict(norm='batch', ftg_student_bn='overwrite'),
    dict(norm='batch', batch_norm='local'),
    dict(norm='batch', batch_norm='reset'),
  ],
  'dirichlet_alpha': [dict(dirichlet_alpha=a) for a in (0.05, 0.1, 0.3, 1.0)],
  'local_epochs': [dict(local_epochs=n) for n in (1, 5, 20)],
  'cohort': [dict(cohort=n) for n in (2, 5, 20)],
  'dataset': [
    dict(dataset='fashion_mnist', train_examples=10_000),
    dict(dataset='fashion_mnist'),
  ],
  'base': [
    dict(base=name) for name in ('scaffold', 'fed_dyn', 'fed_prox', 'moon')
  ],
}
OWN: Mapping[str, list[dict[str, Any]]] = {
  'preset': [dict(ftg_preset=name) for name in recipes.FTG_PRESETS],
  'switch': [
    dict(ftg_hard_samples=True),
    dict(ftg_hard_samples=False),
    dict(ftg_memory=0.0),
    dict(ftg_weight_decay=0.0),
    dict(
      ftg_weight_decay=0.001
    ),  # the clients', if --weight_decay is its default
    dict(ftg_ensemble='prob'),
    dict(ftg_ensemble='logit'),
    dict(ftg_student_reduction='mean_bc'),
    dict(ftg_student_reduction='batchmean'),
    dict(ftg_generator_steps=0),
    dict(ftg_generator_steps=1),
    dict(ftg_generator_steps=5),
    dict(ftg_label_sampling='uniform'),
    dict(ftg_teacher_weight='uniform'),
    dict(ftg_lambda_dis=0.0),
    dict(ftg_lambda_cls=0.0),
    dict(ftg_generator_lr=0.001),
    dict(ftg_student_lr=0.01),
  ],
}
FACTORS = {**SETTINGS, **OWN}
# Possible explanations of an effect: the base's accuracy, and FedFTG's own
# measurements, see `diagnostics.of_images`.
BASE = 'accuracy of the base'
DIAGNOSTICS = (
  'recognised',
  'ensemble_entropy',
  'gap',
  'gap_left',
  'dis',
  'moved',
)

absl_flags.DEFINE_string(
  'base', 'fed_avg', 'The method to which FedFTG is added.'
)
absl_flags.DEFINE_list(
  'presets',
  [],
  'Presets of FedFTG; empty for --ftg_preset. Data, model, participation and '
  'base are varied with each of them.',
)
absl_flags.DEFINE_list(
  'factors',
  list(FACTORS),
  'Factors to vary. They are ' + ', '.join(FACTORS) + '.',
)
absl_flags.DEFINE_float(
  'budget_hours',
  1.0,
  'Hours after which no cell is started. Finished cells take no time.',
  lower_bound=0,
)
FLAGS = absl_flags.FLAGS


class Cell(NamedTuple):
  """One setting, with and without FedFTG."""

  factor: str
  value: str
  preset: str
  base: tuple[str, Configuration]  # name and configuration
  tuned: tuple[str, Configuration]


class Effect(NamedTuple):
  """The effect of FedFTG in a cell; accuracies in points, by seed."""

  final: list[float]  # difference of final accuracies
  early: list[float]  # mean over the first third of the evaluations
  # Broadcast model minus the aggregated model, mean over all evaluations.
  step: list[float]
  base: list[float]  # final accuracy without FedFTG
  said: dict[str, list[float]]  # DIAGNOSTICS


Effects = Sequence[tuple[Cell, Effect | None]]  # None if a run diverged


def main() -> None:
  cells = make_cells(FLAGS.base, FLAGS.factors, FLAGS.presets)
  pairs = [pair for cell in cells for pair in (cell.base, cell.tuned)]
  names = [name for name, _ in pairs]
  resolve.say_unused(config for _, config in pairs)
  folder = folders.workdir(FLAGS.workdir, resolve.config(), 'ablation', *names)
  with folders.opened(folder, CLAIM):
    _train(cells, folder)


def _train(cells, folder) -> None:
  """Trains cell by cell, until the budget is used up."""
  end = time.monotonic() + 3600 * FLAGS.budget_hours
  effects = []
  for i, cell in enumerate(cells):
    if time.monotonic() > end:
      progress.say(
        f'{len(cells) - i} of {len(cells)} cells are left for the next '
        'time: the budget is used up'
      )
      break
    progress.say(
      f'cell {i + 1} of {len(cells)}: {cell.factor} {cell.value}, {cell.preset}'
    )
    results = suite.train_all(
      folder, CLAIM, dict((cell.base, cell.tuned)), tolerant=True
    )
    if results:
      effects.append(
        (cell, effect(results[cell.base[0]], results[cell.tuned[0]]))
      )
      write_results(effects, folder)  # so that results survive an interruption
  if effects:
    progress.show(*result_table(effects))
    print(f'pictures: {folder}/effects.png, {folder}/explained.png')


def make_cells(base: str, factors: list[str], presets: list[str]) -> list[Cell]:
  """Makes the centre, and a cell for each value that differs from it.

  Raises:
    cli.UsageError: for an unknown factor or preset, or a wrong configuration of
      any cell.
  """
  for factor in factors:
    if factor not in FACTORS:
      raise cli.UsageError(
        'factors', factor, 'must be of ' + ', '.join(FACTORS)
      )
  if 'fed_ftg' in base.split('+'):
    raise cli.UsageError('base', base, 'must be without fed_ftg')
  wrong = [name for name in presets if name not in recipes.FTG_PRESETS]
  if wrong:
    raise cli.UsageError(
      'presets', wrong[0], 'must be of ' + ', '.join(recipes.FTG_PRESETS)
    )
  around = [dict(ftg_preset=name) for name in presets or [FLAGS.ftg_preset]]
  asked = [(CENTRE, preset) for preset in [{}, *around]]
  for factor in factors:
    asked += [
      (factor, {**preset, **changes})
      for changes in FACTORS[factor]
      for preset in (around if factor in SETTINGS else [{}])
    ]
  cells = []
  for factor, changes in asked:
    cell = make_cell(factor, base, changes)
    if all(cell.tuned[1] != other.tuned[1] for other in cells):
      cells.append(cell)
  return cells


def make_cell(factor: str, base: str, changes: Mapping[str, Any]) -> Cell:
  """Makes a cell: the centre with some flags changed."""
  changes = {'ftg_preset': FLAGS.ftg_preset, **changes}
  base, preset = changes.pop('base', base), changes['ftg_preset']

  def named(*first, without=(), among=changes):
    return ','.join(
      [
        *first,
        *(
          f'{k}={statistics.value_text(v)}'
          for k, v in changes.items()
          if k in among and k not in without
        ),
      ]
    )

  def of_method(method):
    config = resolve.config(method=method, **changes)
    return named(method, among=config), config

  return Cell(
    factor,
    named(without=['ftg_preset']) or base,
    preset,
    of_method(base),
    of_method(f'{base}+fed_ftg'),
  )


def effect(base: Sequence, tuned: Sequence) -> Effect | None:
  """Computes the differences by seed; None if a run diverged.

  Args:
    base: figures and rows of each seed's run, see `suite.figures_of`.
    tuned: likewise, with FedFTG.
  """
  if any(run is None for run in (*base, *tuned)):
    return None

  def points(run, model='broadcast'):
    return 100 * np.array(
      [rows_lib.accuracy(row, model) for row in run['rows']]
    )

  def early(run):
    return 100 * rows_lib.early_accuracy(run['rows'])

  pairs = list(zip(base, tuned))
  return Effect(
    [100 * (b['final_accuracy'] - a['final_accuracy']) for a, b in pairs],
    [early(b) - early(a) for a, b in pairs],
    [float(np.mean(points(b) - points(b, 'aggregated'))) for b in tuned],
    [100 * a['final_accuracy'] for a in base],
    {name: [_mean_said(run, name) for run in tuned] for name in DIAGNOSTICS},
  )


def _mean_said(run, name) -> float:
  values = [row.get(f'fed_ftg/{name}') for row in run['rows']]
  return float(np.mean([v for v in values if v is not None] or [np.nan]))


def correlations(effects: Effects) -> dict[str, float]:
  """Computes Spearman's rank correlations with the effect on final accuracy.

  They are those of each diagnostic, and of the base's final accuracy, over
  cells and seeds.
  """
  found = {}
  for name in (BASE, *DIAGNOSTICS):
    pairs = np.array(_pairs(effects, name))
    if len(pairs) > 2 and (np.ptp(pairs, axis=0) > 0).all():
      found[name] = float(stats.spearmanr(pairs[:, 0], pairs[:, 1])[0])
  return {name: value for name, value in found.items() if np.isfinite(value)}


def _pairs(effects, name):
  """Returns pairs (diagnostic, effect) of all cells and seeds."""
  return [
    pair
    for _, e in effects
    if e
    for pair in zip(e.base if name == BASE else e.said[name], e.final)
    if np.isfinite(pair).all()
  ]


def result_table(effects: Effects) -> tuple[list[str], list[list[str]]]:
  """Formats the effects: header and rows, as text."""
  rows = []
  for cell, found in effects:
    if found is None:
      rows.append([cell.factor, cell.value, cell.preset, 'diverged'] + [''] * 6)
      continue
    rows.append(
      [
        cell.factor,
        cell.value,
        cell.preset,
        f'{np.mean(found.base):.2f}',
        statistics.with_interval(found.final),
        *(f'{np.mean(v):+.2f}' for v in (found.early, found.step)),
        *(
          f'{np.mean(found.said[name]):.3g}'
          for name in ('recognised', 'gap', 'moved')
        ),
      ]
    )
  return [
    'factor',
    'value',
    'preset',
    'base',
    'effect in the end',
    'early',
    'of fine-tuning',
    'recognised',
    'gap',
    'moved',
  ], rows


def write_results(effects: Effects, folder) -> None:
  """Writes the table, the figures and the pictures."""
  found = [(cell, e) for cell, e in effects if e]
  related = correlations(effects)
  files.write_json(
    folder / 'effects.json',
    {
      'seeds': list(suite.seeds()),
      'rank_correlations': related,
      'cells': [
        {
          'factor': cell.factor,
          'value': cell.value,
          'preset': cell.preset,
          **(_finite(e._asdict()) if e else {'diverged': True}),
        }
        for cell, e in effects
      ],
    },
  )
  header, rows = result_table(effects)
  statistics.write_table(folder / 'table.md', (header, rows))
  if not found:
    return
  with files.replacing(folder / 'effects.png') as temporary:
    plots.effects(
      temporary,
      [
        (
          cell.preset,
          f'{cell.factor}: {cell.value}',
          *statistics.interval(e.final),
        )
        for cell, e in found
      ],
    )
  if related:
    with files.replacing(folder / 'explained.png') as temporary:
      plots.scatters(
        temporary,
        {
          f'{name} (rank correlation {value:+.2f})': _pairs(effects, name)
          for name, value in related.items()
        },
        'effect, points',
      )


def _finite(value):
  """Replaces numbers that are not finite by None, for JSON."""
  if isinstance(value, dict):
    return {k: _finite(v) for k, v in value.items()}
  if isinstance(value, list):
    return [v if np.isfinite(v) else None for v in value]
  return value
