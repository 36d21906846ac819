"""Measures what a server could distil late in training, and from whom.

  python -m experiments.teachers
  python -m experiments.teachers --bases=scaffold --seeds=1 --rounds=10
  python -m experiments.teachers --model=lenet --rounds=60
  python -m experiments.teachers --broadcast=mean,true,labels

Every 5 rounds it measures the clients' models together, as an ensemble: with
equal weights, with FedFTG's class-level weights by the class that the student
predicts, and with these weights by the true class, which no server knows. With
the same three kinds of weights it distils the mean of the models on images that
no client has, as many as FedFTG generates with its preset `official`. A fourth
student learns their labels and asks no teacher. The training is not changed,
unless --broadcast names the student that the next round's clients get. With
several names each is trained and compared with the first, paired by seed, with
a 95 % interval (Student's t).

For each base it writes runs in BASE/seedK/ of --workdir, and means over seeds:
of some rounds in teachers.md and, with several --broadcast, in broadcast.md;
and how far each is above the broadcast model, by round, in teachers.png.
"""

import functools
import sys
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
from upath import UPath

import fedftg_jax
from fedftg_jax import base, distillation, models, recipes
from fedftg_jax.configuration import folders
from fedftg_jax.data import datasets
from fedftg_jax.methods import fed_ftg
from fedftg_jax.results import plots, rows, statistics
from fedftg_jax.system import cli, files

KINDS = 'uniform', 'predicted', 'true'  # where the weights are from
STUDENTS = *KINDS, 'labels'  # 'labels' learns the labels, without a teacher
EVERY = 5  # rounds from one measurement to the next

_DATASET = flags.DEFINE_string('dataset', 'fashion_mnist', 'Data set.')
_DATA_DIR = flags.DEFINE_string(
  'data_dir', None, 'Where prepared data sets are kept, as of `fedftg train`.'
)
_BASES = flags.DEFINE_list(
  'bases', ['fed_avg', 'scaffold', 'fed_dyn'], 'Methods to look at.'
)
_MODEL = flags.DEFINE_enum('model', 'mlp', list(models.CLASSIFIERS), 'Model.')
_EXAMPLES = flags.DEFINE_integer(
  'train_examples', 12000, 'Training examples; a sixth is kept apart.'
)
_ALPHA = flags.DEFINE_float('dirichlet_alpha', 0.1, 'Label skew.')
_ROUNDS = flags.DEFINE_integer(
  'rounds', 100, f'Rounds, a multiple of {EVERY}.', lower_bound=EVERY
)
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Seeds.', lower_bound=1)
_BROADCAST = flags.DEFINE_list(
  'broadcast',
  ['mean'],
  f'What is broadcast: mean, or a student ({", ".join(STUDENTS)}).',
)
_WORKDIR = flags.DEFINE_string('workdir', 'runs/teachers', 'Where to write.')
flags.register_validator(
  'rounds', lambda n: n % EVERY == 0, f'must be a multiple of {EVERY}'
)
flags.register_validator('bases', bool, 'must name methods')
flags.register_validator(
  'broadcast',
  lambda names: names and {*names} <= {'mean', *STUDENTS},
  f'must be some of mean, {", ".join(STUDENTS)}',
)

ITERATIONS, BATCH, STEPS = 10, 50, 5  # as FedFTG's preset `official`
BATCH_OF_TESTS = 500
# Rounds of the table, as shares of all rounds.
WINDOWS = (0.05, 0.1), (0.3, 0.5), (0.8, 1.0)
# In the picture; an ensemble that knows the true class is far above them.
SHOWN = (
  'running average',
  'ensemble, uniform',
  'ensemble, predicted',
  'student, uniform',
)


def watching(
  model: base.Model,
  test: tuple[np.ndarray, np.ndarray],
  apart: tuple[np.ndarray, np.ndarray],
  num_classes: int,
  broadcast: str = 'mean',
) -> base.Method:
  """Builds a part that measures ensembles and students.

  Args:
    model: the classifier.
    test: images and labels on which ensembles are measured.
    apart: images that no client has, and their labels, for students.
    num_classes: C.
    broadcast: 'mean', which changes nothing, or the one of `STUDENTS` that is
      broadcast instead.
  """
  test, apart = jax.tree.map(jnp.asarray, (test, apart))
  optimizer = distillation.sgd(0.1, 0.0, 3.0)
  not_broadcast = [kind for kind in STUDENTS if kind != broadcast]

  def weights(kind, alpha, variables, x, y):
    """Returns the weight of each teacher for each image, [K, B]."""
    if kind == 'uniform':
      return jnp.full((len(alpha), len(x)), 1 / len(alpha))
    if kind == 'predicted':
      y = jnp.argmax(model.apply(variables, x).logits, axis=-1)
    return alpha[:, y]

  def update(variables, shared, received, key):
    teachers, counts = received.stacked
    alpha = fed_ftg.class_weights(counts, received.arrived)

    def targets(kinds, x, y):
      logits = distillation.teacher_logits(model, teachers, x)
      return {
        kind: jax.nn.one_hot(y, num_classes)
        if kind == 'labels'
        else distillation.mean_of_logits(
          logits, weights(kind, alpha, variables, x, y)
        )
        for kind in kinds
      }

    def hits(xy):
      return {
        f'ensemble/{kind}': jnp.mean(jnp.argmax(target, axis=-1) == xy[1])
        for kind, target in targets(KINDS, *xy).items()
      }

    def ensembles():
      size = min(BATCH_OF_TESTS, len(test[1]))
      batches = jax.tree.map(
        lambda a: a[: len(a) // size * size].reshape(-1, size, *a.shape[1:]),
        test,
      )
      return jax.tree.map(jnp.mean, jax.lax.map(hits, batches))

    chosen = jax.random.randint(key, (ITERATIONS, BATCH), 0, len(apart[1]))

    def students(kinds):
      def iteration(trained, chosen):
        x = apart[0][chosen]
        wanted = targets(kinds, x, apart[1][chosen])
        for kind in kinds:
          trained[kind], _ = distillation.distil(
            model,
            trained[kind],
            optimizer,
            fed_ftg.soft_cross_entropy,
            lambda step, kind=kind: (x, wanted[kind]),
            STEPS,
            forward=distillation.kept_statistics,
          )
        return trained, None

      return jax.lax.scan(iteration, dict.fromkeys(kinds, variables), chosen)[0]

    is_evaluated = (received.round + 1) % EVERY == 0
    metrics, made = jax.lax.cond(
      is_evaluated,
      lambda: (ensembles(), students(not_broadcast)),
      lambda: (
        {f'ensemble/{kind}': jnp.nan for kind in KINDS},
        dict.fromkeys(not_broadcast, variables),
      ),
    )
    if broadcast in STUDENTS:
      made |= students([broadcast])
    return (
      made.get(broadcast, variables),
      shared,
      base.Info(metrics, {f'student_{kind}': x for kind, x in made.items()}),
    )

  return base.Method(
    update=update,
    upload=distillation.count_labels(num_classes),
    stacked=lambda sent: (sent.model, sent.message),
  )


def main() -> None:
  for name in _BASES.value:
    try:
      recipes.parse(f'{name}+running_average')
    except ValueError as error:
      raise cli.UsageError('bases', name, str(error)) from error
  try:
    whole = datasets.load(_DATASET.value, _DATA_DIR.value)
  except ValueError as error:
    raise cli.UsageError('dataset', _DATASET.value, str(error)) from error
  order = np.random.RandomState(0).permutation(len(whole.train_y))
  order = order[: _EXAMPLES.value]
  rest = order[: len(order) // 6]
  train = order[len(order) // 6 :]
  data = whole._replace(
    train_x=whole.train_x[train], train_y=whole.train_y[train]
  )
  part = functools.partial(
    watching,
    models.build(
      _MODEL.value,
      whole.image_shape,
      whole.num_classes,
      mean=whole.mean,
      std=whole.std,
    ),
    (whole.test_x, whole.test_y),
    (whole.train_x[rest], whole.train_y[rest]),
    whole.num_classes,
  )
  folder = UPath(_WORKDIR.value)
  runs = {
    (method, broadcast): _train(
      data,
      [method, part(broadcast), 'running_average'],
      folder / folders.folder_name(_label(method, broadcast)),
    )
    for method in _BASES.value
    for broadcast in _BROADCAST.value
  }
  means = {key: _means(seeds) for key, seeds in runs.items()}
  _write(folder / 'teachers.md', *_teachers_table(means))
  if len(_BROADCAST.value) > 1:
    _write(folder / 'broadcast.md', *_broadcast_table(means))
  with files.replacing(folder / 'teachers.png') as temporary:
    panels = [_panel(_label(*key), seeds) for key, seeds in runs.items()]
    plots.panels(temporary, panels, 'round')


def _train(data, method, folder) -> list[list[dict[str, Any]]]:
  """Trains all seeds, and returns the evaluations of each."""
  return [
    fedftg_jax.simulate(
      data,
      method=method,
      model=_MODEL.value,
      rounds=_ROUNDS.value,
      local_epochs=2,
      dirichlet_alpha=_ALPHA.value,
      eval_every=EVERY,
      evaluate_clients='none',
      checkpoint_every=0,
      seed=seed,
      partition_seed=seed,
      schedule_seed=seed,
      workdir=str(folder / f'seed{seed}'),
    ).rows
    for seed in range(_SEEDS.value)
  ]


def _label(method: str, broadcast: str) -> str:
  return method if broadcast == 'mean' else f'{method}, {broadcast} student'


def _write(path: UPath, header, lines) -> None:
  """Writes a table, and prints it."""
  statistics.write_table(path, (header, lines))
  print(path.read_text())


def _teachers_table(means) -> tuple[list[str], list[list[str]]]:
  """Makes the table of what could be distilled: means of some rounds.

  Args:
    means: by method and what is broadcast, the result of `_means`.
  """
  header, lines = [], []
  for key, of_rounds in means.items():
    for rounds, measures in of_rounds.items():
      header = ['method', 'rounds', *measures]
      cells = (f'{np.mean(values):.2f}' for values in measures.values())
      lines.append([_label(*key), rounds, *cells])
  return header, lines


def _broadcast_table(means) -> tuple[list[str], list[list[str]]]:
  """Makes the table that compares each broadcast model with the first.

  Args:
    means: as for `_teachers_table`.
  """
  shown = 'broadcast model', 'running average'
  header = ['base', 'rounds', 'broadcast']
  for kind in shown:
    header += [kind, 'difference']
  first = _BROADCAST.value[0]
  lines = []
  for (method, broadcast), of_rounds in means.items():
    for rounds, measures in of_rounds.items():
      line = [method, rounds, broadcast]
      for kind in shown:
        base = means[method, first][rounds][kind]
        gains = np.subtract(measures[kind], base)
        gain = '' if broadcast == first else statistics.with_interval(gains)
        line += [f'{np.mean(measures[kind]):.2f}', gain]
      lines.append(line)
  return header, lines


def _means(seeds) -> dict[str, dict[str, list[float]]]:
  """Averages each measure over the evaluations in some rounds.

  Args:
    seeds: the evaluations of each seed.

  Returns:
    By rounds, such as '80 to 100', and name of the measure: each seed's mean in
    percent. Rounds without an evaluation are left out.
  """
  means = {}
  for window in WINDOWS:
    first, last = (round(_ROUNDS.value * share) for share in window)
    some = [
      [_measures(row) for row in rows if first <= row['round'] <= last]
      for rows in seeds
    ]
    if some[0]:
      means[f'{first} to {last}'] = {
        kind: [100 * np.mean([row[kind] for row in one]) for one in some]
        for kind in some[0][0]
      }
  return means


def _measures(row) -> dict[str, float]:
  """Returns the accuracies of one evaluation by name."""
  return {
    'broadcast model': rows.accuracy(row),
    **{f'ensemble, {k}': row[f'ensemble/{k}'] for k in KINDS},
    **{f'student, {k}': rows.accuracy(row, f'student_{k}') for k in STUDENTS},
    'running average': rows.accuracy(row, 'running_average'),
  }


def _panel(name, seeds) -> plots.Panel:
  """Makes the panel of a base: points above the broadcast model, by round."""
  evaluated = [row for rows in seeds for row in rows]
  series = {}
  for done in sorted({row['round'] for row in evaluated}):
    some = [_measures(row) for row in evaluated if row['round'] == done]
    for kind in SHOWN:
      gain = np.mean([r[kind] - r['broadcast model'] for r in some])
      series.setdefault(kind, []).append((done, 100 * gain))
  return plots.Panel(name, 'points above the broadcast model', series)


if __name__ == '__main__':
  cli.launch(sys.modules[__name__], shared=False)
