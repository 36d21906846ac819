"""Trains named configurations with several seeds, for `compare` and `sweep`.

Each run is like one of `train`, in NAME/seedK/ of the folder. Finished runs are
left alone, stopped ones resume.
"""

from collections.abc import Mapping
from typing import Any

from absl import flags as absl_flags
import jax
from upath import UPath

from fedftg_jax.configuration import assembly, flags, folders
from fedftg_jax.configuration.resolve import Configuration
from fedftg_jax.results import statistics
from fedftg_jax.runs import comparison, training
from fedftg_jax.system import cli, devices, files, progress

absl_flags.DEFINE_integer(
  'seeds', 1, 'Runs per method or configuration.', lower_bound=1
)
absl_flags.DEFINE_integer(
  'seeds_at_once',
  1,
  'Seeds to train at once, as a mapped axis of one program. Memory must '
  'suffice for all of them.',
  lower_bound=1,
)
absl_flags.DEFINE_bool(
  'vary_partition',
  False,
  'Give each seed its own partition and schedule. The seed is added to theirs; '
  'seeds are trained one by one.',
)
absl_flags.DEFINE_float(
  'target_accuracy',
  None,
  'Accuracy to count the rounds to. Default: the highest multiple of 0.05 that '
  'all methods (of a sweep: half of the configurations) reach.',
  lower_bound=0,
  upper_bound=1,
)
FLAGS = absl_flags.FLAGS


def train_all(
  folder: UPath,
  claim: dict[str, Any],
  configs: Mapping[str, Configuration],
  tolerant: bool = False,
) -> statistics.Results:
  """Trains what is not finished yet, every configuration with every seed.

  Args:
    folder: folder of all runs, which this process has locked.
    claim: identity of the folder, for its config.json.
    configs: from `resolve.config`, by name.
    tolerant: whether to go on after a run that diverges. It is remembered, and
      not tried again.

  Returns:
    `figures_of` every run; {} in processes other than the first.

  Raises:
    cli.UsageError: before any training, if a configuration is wrong.
    cli.Diverged: if a run diverges, unless `tolerant`.
  """
  _check(configs)
  places = {
    name: [
      folder / folders.folder_name(name) / f'seed{seed}' for seed in seeds()
    ]
    for name in configs
  }
  of_place: dict[str, str] = {}
  for name in configs:
    place = folders.folder_name(name)
    if of_place.setdefault(place, name) != name:
      raise cli.ArgumentError(
        folder / place,
        f'would hold both {of_place[place]} and {name}; these must differ in '
        'letters, digits, or one of _+=.,-',
      )
  left = {
    name: _groups(config, places[name], tolerant)
    for name, config in configs.items()
  }
  left = {name: groups for name, groups in left.items() if groups}
  # Everything is built once before anything is trained, and again when its turn
  # comes: each holds the data, and there may be many.
  for name, groups in left.items():
    _build(configs[name], groups[0][0][0])
  folders.claim_folder(folder, claim)
  for i, (name, groups) in enumerate(left.items()):
    label = f'{i + 1} of {len(left)}: {name}' if len(left) > 1 else name
    _train(label, configs[name], groups, tolerant)
    jax.clear_caches()  # the next compiles a program of its own
  if not devices.is_first():
    return {}
  return {
    name: [figures_of(place, configs[name]['rounds']) for place in of_name]
    for name, of_name in places.items()
  }


def train_one(
  label: str, folder: UPath, config: Configuration, seed: int
) -> dict[str, Any]:
  """Trains one seed's run, unless it is finished; returns `figures_of` it."""
  if not devices.agree(_is_over(folder, of_seed(config, seed), False)):
    _train_group(label, _build(config, seed), [(seed, folder)], False)
  return figures_of(folder, config['rounds']) or {}


def seeds() -> range:
  """Returns the seeds that the flags ask for."""
  return range(FLAGS.seed, FLAGS.seed + FLAGS.seeds)


def of_seed(config: Configuration, seed: int) -> Configuration:
  """Returns the configuration of one seed's run."""
  varied = comparison.varied(config, seed) if FLAGS.vary_partition else {}
  return config.replace(
    seed=seed, **{k: v for k, v in varied.items() if k in config}
  )


def _check(configs):
  if FLAGS.target_accuracy is not None and not FLAGS.target_accuracy <= 1:
    raise cli.UsageError(
      'target_accuracy', FLAGS.target_accuracy, 'must be a number in [0, 1]'
    )
  for config in configs.values():
    if FLAGS.seeds_at_once > 1 and config['client_state'] != 'device':
      raise cli.UsageError(
        'seeds_at_once',
        FLAGS.seeds_at_once,
        'must be 1 without --client_state=device',
      )
    if FLAGS.seeds_at_once > 1 and config['client_chunk'] == flags.AUTO:
      raise cli.UsageError(
        'seeds_at_once',
        FLAGS.seeds_at_once,
        'must be 1 with --client_chunk=auto',
      )


def _groups(config, places, tolerant) -> list[list[tuple[int, UPath]]]:
  """Groups the seeds that are trained at once; drops finished groups.

  Groups do not depend on which seeds are finished, because a group resumes from
  a checkpoint that all of its seeds have.
  """
  at_once = 1 if FLAGS.vary_partition else FLAGS.seeds_at_once
  runs = list(zip(seeds(), places))
  groups = [runs[i : i + at_once] for i in range(0, len(runs), at_once)]
  left = [
    group
    for group in groups
    if not all(
      [
        devices.agree(_is_over(place, of_seed(config, seed), tolerant))
        for seed, place in group
      ]
    )
  ]
  for _, place in (one for group in left for one in group):
    if folders.rounds_finished(place) > config['rounds']:
      raise cli.UsageError(
        'seeds_at_once',
        FLAGS.seeds_at_once,
        f'{place} has more than {config["rounds"]} rounds, which training with '
        'other seeds would replace; choose 1, or another --workdir',
      )
  return left


def _is_over(place, config, tolerant) -> bool:
  """Returns whether nothing is left to train.

  Raises:
    cli.UsageError: if the folder holds another run.
  """
  if folders.is_finished(place, config):
    figures_of(place, config['rounds'])  # no error after all training
    return True
  return tolerant and _diverged(place, config['rounds'])


def _diverged(place, rounds) -> bool:
  """Returns whether the run is known to diverge within so many rounds."""
  try:
    known = files.read_json(place / folders.DIVERGED)['rounds']
  except (OSError, ValueError, KeyError, TypeError):  # none, or damaged
    return False
  return isinstance(known, int) and known <= rounds


def _build(config, seed) -> assembly.Experiment:
  return assembly.build(of_seed(config, seed), FLAGS.data_dir, FLAGS.manual_dir)


def _train(label, config, groups, tolerant) -> None:
  """Trains groups of seeds."""
  experiment = _build(config, groups[0][0][0])
  for i, group in enumerate(groups):
    if FLAGS.vary_partition and i:
      one = of_seed(config, group[0][0])
      experiment = experiment._replace(
        config=one,
        problem=assembly.make_problem(one, FLAGS.data_dir, FLAGS.manual_dir),
      )
    _train_group(label, experiment, group, tolerant)


def _train_group(label, experiment, group, tolerant) -> None:
  """Trains seeds at once; if one diverges, trains each by itself."""
  group_seeds, places = zip(*group)
  try:
    training.train(
      experiment,
      group_seeds,
      places,
      f'{label} seed {",".join(map(str, group_seeds))}',
      training.asked_for(),
    )
  except cli.Diverged as error:
    if not tolerant:
      raise
    if len(group) == 1:
      files.write_json(
        places[0] / folders.DIVERGED,
        {'rounds': experiment.config['rounds'], 'error': str(error)},
      )
      progress.say(f'{label}: {error}')
      return
    for one in group:
      _train_group(label, experiment, [one], tolerant)


def figures_of(folder: UPath, rounds: int) -> dict[str, Any] | None:
  """Reads a run's rows and figures up to `rounds`; None if it diverged.

  Raises:
    cli.UsageError: if it has no evaluation up to there.
  """
  if _diverged(folder, rounds) and folders.rounds_finished(folder) < rounds:
    return None
  try:
    found = comparison.figures(folder, rounds)
  except ValueError as error:  # a longer one, evaluated less often
    raise cli.UsageError('rounds', rounds, str(error)) from error
  if found['rounds'] != rounds:
    raise cli.UsageError(
      'rounds',
      rounds,
      f'{folder} was evaluated after round {found["rounds"]} and not after '
      f'round {rounds}; choose {found["rounds"]}',
    )
  return found
