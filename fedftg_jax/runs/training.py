"""Trains runs: rounds, evaluations between them, and checkpoints."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import functools
import pathlib
import shutil
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from upath import UPath

from fedftg_jax import evaluation, federation, influence
from fedftg_jax.configuration import assembly, flags
from fedftg_jax.configuration import folders as folders_lib
from fedftg_jax.configuration.assembly import Experiment
from fedftg_jax.configuration.resolve import Configuration
from fedftg_jax.runs import callbacks as callbacks_lib
from fedftg_jax.runs import resume, scoring
from fedftg_jax.runs.writer import RunWriter
from fedftg_jax.system import cli, devices, files, lock, progress
from fedftg_jax.system import clock as clock_lib
from fedftg_jax.system.own_flags import FLAGS

CLIENTS = '.clients'  # in a run's folder: slots of clients, mapped


class Keeping(NamedTuple):
  """Checkpoints, trackers and models to keep; see the flags of these names."""

  tensorboard: bool = False
  wandb: str = ''
  mlflow: str = ''
  checkpoint_every: int = 10
  keep_checkpoints: int = 2
  save_personal: bool = True

  def trackers(self) -> list[callbacks_lib.Callback]:
    """Makes the trackers of one run."""
    asked = (
      (self.tensorboard, callbacks_lib.TensorBoard),
      (self.wandb, functools.partial(callbacks_lib.WandB, self.wandb)),
      (self.mlflow, functools.partial(callbacks_lib.MLflow, self.mlflow)),
    )
    return [make() for is_asked, make in asked if is_asked]


def asked_for(values: Mapping[str, Any] | None = None) -> Keeping:
  """Reads `Keeping` from the flags, or from `values` by their names."""
  values = values or {name: FLAGS[name].value for name in Keeping._fields}
  return Keeping(**{name: values[name] for name in Keeping._fields})


def complete(
  folder: UPath,
  config: Configuration,
  build: Callable[[], Experiment],
  keeping: Keeping = Keeping(),
  callbacks: Sequence[callbacks_lib.Callback] = (),
  quiet: bool = False,
) -> None:
  """Trains one run in its folder, unless all of its rounds are done there.

  Args:
    folder: folder of the run.
    config: its configuration.
    build: builds its parts; called only if there is something to train.
    keeping: as for `train`.
    callbacks: as for `train`.
    quiet: as for `train`.

  Raises:
    cli.UsageError: if the folder holds another run, or more rounds.
  """
  identity = folders_lib.identity(config)
  folders_lib.check_folder(folder, identity)
  if _is_finished(folder, config, quiet):
    return
  with folders_lib.opened(folder, identity):
    if _is_finished(folder, config, quiet):  # by another, since
      return
    seeds, label = [config['seed']], config['method']
    train(build(), seeds, [folder], label, keeping, callbacks, quiet)


def _is_finished(folder, config, quiet) -> bool:
  """Returns whether all rounds are done; nothing is written then."""
  done = int(devices.agree(folders_lib.rounds_finished(folder)))
  if done > config['rounds']:
    raise cli.UsageError(
      'rounds',
      config['rounds'],
      f'{folder} holds {done} rounds; must be at least so many, or choose '
      'another folder',
    )
  if done == config['rounds'] and not quiet:
    progress.say(f'already finished: {folder}')
  return done == config['rounds']


def train(
  experiment: Experiment,
  seeds: Sequence[int],
  folders: Sequence[UPath],
  label: str,
  keeping: Keeping = Keeping(),
  callbacks: Sequence[callbacks_lib.Callback] = (),
  quiet: bool = False,
) -> None:
  """Trains all seeds at once, and writes each run into its folder.

  Runs resume from the last checkpoint that all of them have.

  Args:
    experiment: from `build`.
    seeds: of the training; several are a mapped axis of one program.
    folders: one per seed.
    label: name of the run on the screen.
    keeping: checkpoints, and what the runs are logged to.
    callbacks: called after each evaluation of each run, see `callbacks`.
    quiet: whether to hide the progress.

  Raises:
    cli.RunError: if a model is no longer finite.
    cli.Terminated: after SIGTERM, when a checkpoint has been written or all
      rounds are done.
  """
  config = experiment.config
  put = functools.partial(devices.put, num_devices=config['num_devices'])
  simulation, schedule = experiment.simulation, experiment.problem.schedule
  data = put(experiment.problem.data)
  several = len(seeds) > 1
  fed = simulation.of_seeds if several else simulation.federation
  key = (
    jnp.stack([jax.random.key(s) for s in seeds])
    if several
    else (jax.random.key(seeds[0]))
  )
  key_init, key_run = (
    jnp.moveaxis(_split(key), -1, 0) if several else _split(key)
  )
  key_run = put(key_run)
  of_seed = functools.partial(_one_seed, several=several)

  with (
    _all_held(folders),
    assembly.matmul_precision(config),
    resume.listening() as asked,
    _slots(config, folders[0]) as place,
    contextlib.ExitStack() as stack,
  ):
    state = fed.init(key_init, *place)
    first, state = _go_on(experiment, seeds, folders, state, several)
    runs = [
      RunWriter(experiment, folder, seed, first)
      for folder, seed in zip(folders, seeds)
    ]
    calls: list[list[callbacks_lib.Callback]] = [[] for _ in runs]
    if devices.is_first():
      calls = [[*callbacks, *keeping.trackers()] for _ in runs]
    for run, of_run in zip(runs, calls):
      stack.enter_context(
        callbacks_lib.following(of_run, run.context(), run.context)
      )
    score = scoring.scorer(experiment, data, put)
    evaluated = scoring.evaluated_clients(experiment)
    if evaluated is not None and config['evaluate_clients'] != 'none':
      progress.say(
        f'{len(evaluated):,} of {len(experiment.problem.parts):,} clients are '
        'evaluated one by one (--evaluated_clients)'
      )
    if config['client_chunk'] == flags.AUTO and not quiet:
      progress.say(f'--client_chunk=auto: {simulation.client_chunk}')
    clock = clock_lib.Clock(first)
    bar = progress.Progress(label, config['rounds'], first, quiet)

    def after_chunk(new, state, info):
      done = first + new
      jax.block_until_ready(state)
      clock.lap('train')
      for r, run in enumerate(runs):
        one, models, key = of_seed((state, info.models, key_run), r)
        scores = score(done, one, models, info.same, key)
        metrics = {k: v[r] if several else v for k, v in info.metrics.items()}
        run.add(done, metrics, scores)
      clock.lap('evaluate')
      timing = clock.row(done, len(runs))
      for r, (run, of_run) in enumerate(zip(runs, calls)):
        run.add_timing(timing)
        if of_run:
          variables = influence.untracked(of_seed(state, r)).variables
          context = run.context(variables)
          for callback in of_run:
            callback(context.rows[-1], context)
          clock.lap('evaluate')  # in the next row
      bar.update(
        done, np.mean([run.accuracy for run in runs]), clock.rate(done)
      )
      stop = devices.any_of(asked.is_set()) and done < config['rounds']
      if resume.is_due(done, config, keeping.checkpoint_every) or stop:
        for r, (seed, folder) in enumerate(zip(seeds, folders)):
          resume.save(folder, experiment, seed, done, of_seed(state, r))
        for folder in folders:  # after all: a kill leaves them one in common
          resume.prune(folder, done, keeping.keep_checkpoints)
        clock.lap('checkpoint')
      if stop:
        raise cli.Terminated(f'round {done} of {config["rounds"]} is kept')

    with bar:
      state, _ = federation.run(
        fed,
        state,
        data,
        jax.tree.map(lambda a: a[first:], schedule),
        key_run,
        every=min(config['eval_every'], config['rounds']),
        callback=after_chunk,
      )
    for r, run in enumerate(runs):
      one, key = of_seed((state, key_run), r)
      models = evaluation.personal_models(
        simulation.federation,
        one,
        data,
        key,
        chunk=scoring.at_once(experiment),
        ids=evaluated,
      )
      run.finish(one, models if keeping.save_personal else ())
    if devices.any_of(asked.is_set()):
      raise cli.Terminated(
        f'all {config["rounds"]} rounds of this run are done'
      )


@contextlib.contextmanager
def _all_held(folders) -> Iterator[None]:
  """Locks the folder of every run."""
  with contextlib.ExitStack() as locks:
    for folder in folders:
      locks.enter_context(lock.held(folder))
    yield


@contextlib.contextmanager
def _slots(config, folder) -> Iterator[list[pathlib.Path]]:
  """Makes a folder for clients' slots on disk, and removes it afterwards.

  Yields its path as a further argument of `init`: no path if the slots are not
  on disk.
  """
  if config['client_state'] != 'disk':
    yield []
    return
  if files.is_local(folder):
    prefix = f'{CLIENTS}{jax.process_index()}-'
    for left_by_a_kill in pathlib.Path(folder).glob(prefix + '*'):
      shutil.rmtree(left_by_a_kill, ignore_errors=True)
    place = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
  else:
    place = pathlib.Path(tempfile.mkdtemp())
  try:
    yield [place]
  finally:
    shutil.rmtree(place, ignore_errors=True)


def _go_on(experiment, seeds, folders, state, several):
  """Returns (rounds done, state) of the last checkpoint; else (0, `state`).

  The first process reads it, because the others may not see its disk.
  """
  states = [_one_seed(state, r, several) for r in range(len(seeds))]
  done, saved = 0, states
  if devices.is_first():
    done, saved = resume.newest(folders, experiment, seeds, states)
  done = int(devices.agree(done))
  if not done:
    return 0, state
  progress.say(f'going on after round {done}')
  if not devices.is_first():
    saved = [resume.blank(experiment, done, one) for one in states]
  saved = devices.from_first(saved)
  if several:
    return done, jax.tree.map(lambda *a: jnp.stack(a), *saved)
  return done, resume.put_back(experiment, done, state, saved[0])


def _split(key):
  return jax.vmap(jax.random.split)(key) if key.ndim else jax.random.split(key)


def _one_seed(tree, r, several):
  return jax.tree.map(lambda a: a[r], tree) if several else tree
