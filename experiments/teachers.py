"""Measures what a server could distil late in training, and from whom.

  python -m experiments.teachers
  python -m experiments.teachers --bases=scaffold --seeds=1 --rounds=10

In each round it measures the clients' models together, as an ensemble: with
equal weights, with FedFTG's class-level weights by the class that the student
predicts, and with these weights by the true class, which no server knows. With
the same three kinds of weights it distils the mean of the models on images that
no client has, as many as FedFTG generates. The training is not changed. For
each base it writes runs in BASE/seedK/ of --workdir, and means over seeds of
some rounds in teachers.md.
"""

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np
from upath import UPath

import fedftg_jax
from fedftg_jax import base, distillation, models
from fedftg_jax.data import datasets
from fedftg_jax.methods import fed_ftg
from fedftg_jax.results import statistics

_DATASET = flags.DEFINE_string('dataset', 'fashion_mnist', 'Data set.')
_BASES = flags.DEFINE_list(
  'bases', ['fed_avg', 'scaffold', 'fed_dyn'], 'Methods to look at.'
)
_EXAMPLES = flags.DEFINE_integer(
  'train_examples', 12000, 'Training examples; a sixth is kept apart.'
)
_ALPHA = flags.DEFINE_float('dirichlet_alpha', 0.1, 'Label skew.')
_ROUNDS = flags.DEFINE_integer('rounds', 100, 'Rounds.', lower_bound=2)
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Seeds.', lower_bound=1)
_WORKDIR = flags.DEFINE_string('workdir', 'runs/teachers', 'Where to write.')

ITERATIONS, BATCH, STEPS = 10, 50, 5  # as many images and steps as FedFTG
KINDS = 'uniform', 'predicted', 'true'  # where the weights are from


def watching(
  model: base.Model,
  test: tuple[np.ndarray, np.ndarray],
  apart: tuple[np.ndarray, np.ndarray],
  num_classes: int,
) -> base.Method:
  """Builds a part that measures ensembles and students, and changes nothing.

  Args:
    model: the classifier.
    test: images and labels on which ensembles are measured.
    apart: images that no client has, and their labels, for students.
    num_classes: C.
  """
  test, apart = jax.tree.map(jnp.asarray, (test, apart))
  optimizer = distillation.sgd(0.1, 0.0, 3.0)

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

    def target(kind, x, y):
      logits = distillation.teacher_logits(model, teachers, x)
      return distillation.mean_of_logits(
        logits, weights(kind, alpha, variables, x, y)
      )

    def hits(kind):
      def of_batch(xy):
        guess = jnp.argmax(target(kind, *xy), axis=-1)
        return jnp.mean(guess == xy[1])

      batches = jax.tree.map(lambda a: a.reshape(-1, 500, *a.shape[1:]), test)
      return jnp.mean(jax.lax.map(of_batch, batches))

    rows = jax.random.randint(key, (ITERATIONS, BATCH), 0, len(apart[1]))

    def student(kind):
      def iteration(student, rows):
        x, y = apart[0][rows], apart[1][rows]
        wanted = target(kind, x, y)
        student, _ = distillation.distil(
          model,
          student,
          optimizer,
          fed_ftg.soft_cross_entropy,
          lambda step: (x, wanted),
          STEPS,
          forward=distillation.kept_statistics,
        )
        return student, None

      return jax.lax.scan(iteration, variables, rows)[0]

    return (
      variables,
      shared,
      base.Info(
        {f'ensemble/{kind}': hits(kind) for kind in KINDS},
        {f'student_{kind}': student(kind) for kind in KINDS},
      ),
    )

  return base.Method(
    update=update,
    upload=distillation.count_labels(num_classes),
    stacked=lambda sent: (sent.model, sent.message),
  )


def main(argv: list[str]) -> None:
  del argv
  whole = datasets.load(_DATASET.value)
  order = np.random.RandomState(0).permutation(len(whole.train_y))
  order = order[: _EXAMPLES.value]
  rest = order[: len(order) // 6]
  train = order[len(order) // 6 :]
  tests = len(whole.test_y) // 500 * 500
  model = models.build(
    'mlp', whole.image_shape, whole.num_classes, mean=whole.mean, std=whole.std
  )
  part = watching(
    model,
    (whole.test_x[:tests], whole.test_y[:tests]),
    (whole.train_x[rest], whole.train_y[rest]),
    whole.num_classes,
  )
  data = whole._replace(
    train_x=whole.train_x[train], train_y=whole.train_y[train]
  )
  windows = [(5, 10), (30, 50), (80, 100)]
  header = ['method', 'rounds']
  lines = []
  for name in _BASES.value:
    runs = [
      fedftg_jax.simulate(
        data,
        method=[name, part, 'running_average'],
        model='mlp',
        rounds=_ROUNDS.value,
        local_epochs=2,
        dirichlet_alpha=_ALPHA.value,
        eval_every=5,
        evaluate_clients='none',
        checkpoint_every=0,
        seed=seed,
        partition_seed=seed,
        schedule_seed=seed,
        workdir=str(UPath(_WORKDIR.value) / name / f'seed{seed}'),
      )
      for seed in range(_SEEDS.value)
    ]
    for first, last in windows:
      rows = [
        row for run in runs for row in run.rows if first <= row['round'] <= last
      ]
      if not rows:
        continue
      said = {
        'broadcast model': [r['test_accuracy'] for r in rows],
        **{f'ensemble, {k}': [r[f'ensemble/{k}'] for r in rows] for k in KINDS},
        **{
          f'student, {k}': [r['accuracy'][f'student_{k}'] for r in rows]
          for k in KINDS
        },
        'running average': [r['accuracy']['running_average'] for r in rows],
      }
      header = ['method', 'rounds', *said]
      lines.append(
        [name, f'{first} to {last}']
        + [f'{100 * np.mean(values):.2f}' for values in said.values()]
      )
      statistics.write_table(
        UPath(_WORKDIR.value) / 'teachers.md', header, lines
      )
  print((UPath(_WORKDIR.value) / 'teachers.md').read_text())


if __name__ == '__main__':
  app.run(main)
