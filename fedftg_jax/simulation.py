"""Trains a federated model in one call.

  run = fedftg_jax.simulate('mnist5k', method='fed_avg+fed_ftg', rounds=20)
  run.plot()
  run.predict(images)  # [M, C]

It runs the code of `fedftg train`: the same arguments give the same bytes.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import inspect
import numbers
import os
import tempfile
from typing import Any, NamedTuple
import weakref

import jax
from upath import UPath

from fedftg_jax import recipes
from fedftg_jax.base import Method
from fedftg_jax.configuration import assembly, folders, resolve
from fedftg_jax.configuration import flags as flags_lib
from fedftg_jax.configuration.assembly import Given
from fedftg_jax.data import datasets
from fedftg_jax.models import modules
from fedftg_jax.runs import comparison, training
from fedftg_jax.runs.callbacks import Callback
from fedftg_jax.runs.run import Run
from fedftg_jax.system import cli, devices, files, own_flags

# Flags of models by name; a module has its own layers.
_OF_NAMED_MODELS = ('norm', 'projection_dim', 'torch_bn')

Data = str | datasets.Dataset | Sequence[Any] | Mapping[str, Any]
Parts = str | Method | Sequence[str | Method]


def simulate(
  dataset: Data | None = None,
  *,
  method: Parts | None = None,
  model: str | modules.Module | None = None,
  callbacks: Sequence[Callback] = (),
  progress: bool = True,
  **flags: Any,
) -> Run:
  """Trains a federated model.

  Example:
    run = fedftg_jax.simulate('mnist5k', method='fed_avg+fed_ftg', rounds=20)
    run.plot()

  Args:
    dataset: a name, as for --dataset (default: mnist5k); arrays (train_x,
      train_y, test_x, test_y), images [M, H, W, channels] of uint8 or float32
      and integer labels [M]; or a mapping with these names and train_client_id,
      the client of each example, for partition='natural'.
    method: a name, as for --method (default: fed_ftg); a `base.Method`; or a
      sequence of both, which is put into the order in which the server works,
      see `recipes.name_own`.
    model: a name, as for --model (default: lenet); a module of flax.linen, see
      `models.from_flax`; or a module of flax.nnx, or a class or function of
      `rngs` that makes one, see `modules.from_nnx`.
    callbacks: called with the row and the run after each evaluation, see
      `callbacks`.
    progress: whether to show a progress bar, in a terminal or a notebook.
    **flags: any flag of `fedftg train`, with the same default; its --help lists
      them. With `workdir`, the run is kept in that folder, and the same call
      resumes it after a stop. Without, the folder is a temporary one without
      checkpoints, which is deleted with the returned object.

  Returns:
    The finished run: metrics, plot(), predict(x), images, report() and more. If
    several processes train together, the first gets it, the others get None.

  Raises:
    TypeError: for an argument that is not a flag.
    ValueError: for a wrong value, with what would be right.
    RuntimeError: if the model diverges.
  """
  named = {'dataset': dataset, 'method': method, 'model': model}
  flags |= {name: value for name, value in named.items() if value is not None}
  with _as_exceptions(), contextlib.ExitStack() as stack:
    flags = _with_files(flags)
    starting = {k: flags.pop(k) for k in devices.Start._fields if k in flags}
    devices.start(devices.Start(**starting))
    values, given = _resolved(flags)
    config = resolve.config(**values)
    resolve.say_unused([config], {name: values[name] for name in flags})
    places = values['data_dir'], values['manual_dir'], given
    experiment = None
    if values['workdir'] is None:
      folder = UPath(stack.enter_context(tempfile.TemporaryDirectory()))
    else:
      if given.model is not None or given.parts:  # identified by their program
        experiment = assembly.build(config, *places)
        digest = assembly.fingerprint(experiment, given)
        config = config.replace(computation=digest)
        experiment = experiment._replace(config=config)
      folder = folders.workdir(values['workdir'], config)
    training.complete(
      folder,
      config,
      lambda: experiment or assembly.build(config, *places),
      training.asked_for(values),
      callbacks,
      quiet=not progress,
    )
    if not devices.is_first():
      return None  # type: ignore[return-value]
    run = Run(folder, given.model)
    weakref.finalize(run, stack.pop_all().close)
    return run


class Comparison(NamedTuple):
  """A finished comparison, from `compare`.

  Attributes:
    folder: with report.html, summary.json and, in METHOD/seedK/, the runs.
    runs: of each method by name, a run for each seed.
    conclusion: what can be concluded, and what not; '' for one seed.
  """

  folder: UPath
  runs: dict[str, list[Run]]
  conclusion: str

  def __repr__(self) -> str:
    """Returns the final accuracy of each run, and the conclusion."""
    lines = []
    for name, runs in self.runs.items():
      finals = [100 * run.summary['final_accuracy'] for run in runs]
      lines.append(f'{name}: ' + ', '.join(f'{x:.2f} %' for x in finals))
    return '\n'.join([*lines, self.conclusion]).strip()

  def report(self) -> UPath:
    """Returns the path of report.html."""
    return self.folder / 'report.html'


def compare(
  methods: Mapping[str, Parts | Mapping[str, Any]],
  *,
  workdir: str | os.PathLike[str],
  seeds: int = 1,
  vary_partition: bool = False,
  callbacks: Sequence[Callback] = (),
  progress: bool = True,
  **flags: Any,
) -> Comparison:
  """Trains several methods with several seeds, as `fedftg compare` does.

  Example:
    compared = fedftg_jax.compare(
      {'FedAvg': 'fed_avg', 'mine': ['fed_avg', pull(0.01)]},
      seeds=3, rounds=20, workdir='runs/mine')
    print(compared)

  Args:
    methods: by name, the argument `method` of `simulate`, or a mapping with all
      of its flags in which this method differs. The first is what the others
      are tested against.
    workdir: folder of the comparison. The same call resumes one that was
      stopped, and skips runs that are finished.
    seeds: number of runs of each method; their seeds are consecutive.
    vary_partition: whether each seed has its own partition and schedule.
    callbacks: as for `simulate`, of every run.
    progress: whether to show a progress bar.
    **flags: flags of `simulate` for all methods.

  Returns:
    The runs, and what can be concluded. Several processes cannot compare.

  Raises:
    TypeError, ValueError, RuntimeError: as for `simulate`. Wrong values are
      found before any training.
  """
  with _as_exceptions():
    calls = _calls(methods, flags)
    if not isinstance(seeds, numbers.Integral) or seeds < 1:
      raise cli.UsageError('seeds', seeds, 'must be an integer of at least 1')
    values = _values_of_all(calls)
    (base, *_) = values.values()
    claim = comparison.claim(resolve.config(**base))
    all_seeds = range(base['seed'], base['seed'] + seeds)
    if not os.fspath(workdir):
      raise cli.UsageError('workdir', workdir, 'must name a folder')
    folder = folders.workdir(os.fspath(workdir), claim)
    with folders.opened(folder, {**claim, **folders.contents(claim)}):
      folders.claim_folder(folder, claim)
      runs = {
        name: [
          simulate(
            **_of_seed(call, values[name], seed, vary_partition),
            workdir=str(folder / folders.folder_name(name) / f'seed{seed}'),
            callbacks=callbacks,
            progress=progress,
          )
          for seed in all_seeds
        ]
        for name, call in calls.items()
      }
      results = {
        name: [comparison.figures(run.folder) for run in of_name]
        for name, of_name in runs.items()
      }
      *_, conclusion = comparison.write(folder, results, claim, all_seeds)
  return Comparison(folder, runs, conclusion)


def _calls(methods, flags) -> dict[str, dict[str, Any]]:
  """Returns the flags of each method by name.

  Raises:
    cli.UsageError: for a name that cannot be a folder of its own, or an
      argument that is not a flag of one method.
  """
  if not isinstance(methods, Mapping) or not methods:
    raise cli.UsageError(
      'methods', methods, 'must map at least one name to a method'
    )
  taken = {'report', *comparison.FILES}
  calls = {}
  for name, own in methods.items():
    place = folders.folder_name(name) if isinstance(name, str) else ''
    if not place.strip('.') or place in taken:
      raise cli.UsageError(
        'methods', name, 'must be a name that can be a folder of its own'
      )
    taken.add(place)
    own = dict(own) if isinstance(own, Mapping) else {'method': own}
    for argument in own.keys() & {'workdir', 'callbacks', 'progress', 'seed'}:
      raise cli.UsageError(
        argument, own[argument], f'must be the same for all methods, not {name}'
      )
    calls[name] = {**flags, **own}
  return calls


def _values_of_all(calls: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Checks and builds all methods, and returns the values of the flags.

  Raises:
    cli.UsageError: for a wrong value, or one that all methods must share.
  """
  values, claims = {}, {}
  for name, call in calls.items():
    call = _with_files({**call, 'workdir': ''})
    call = {k: v for k, v in call.items() if k not in devices.Start._fields}
    values[name], given = _resolved(call)
    config = resolve.config(**values[name])
    claims[name] = comparison.claim(config)
    places = values[name]['data_dir'], values[name]['manual_dir'], given
    assembly.build(config, *places)
  (first, base), *others = claims.items()
  for name, claim in others:
    for flag in sorted(claim.keys() | base.keys()):
      if claim.get(flag) != base.get(flag):
        raise cli.UsageError(
          flag,
          claim.get(flag),
          f'{name} must have the same as {first}, which has {base.get(flag)}',
        )
  return values


def _of_seed(call, values, seed: int, vary_partition: bool) -> dict[str, Any]:
  """Returns the arguments of one seed's run, see `suite.of_seed`."""
  if not vary_partition:
    return {**call, 'seed': seed}
  return {**call, **comparison.varied(values, seed), 'seed': seed}


def load_run(
  folder: files.PathLike, model: modules.Module | None = None
) -> Run:
  """Opens the folder of a finished run, of `simulate` or of a program.

  Args:
    folder: folder of one run; a comparison has one in METHOD/seedK.
    model: the module that was trained, if the model has no name.

  Returns:
    The run.

  Raises:
    ValueError: if it is not the folder of a finished run.
  """
  with _as_exceptions():
    return Run(folder, model)


def _with_files(flags: Mapping[str, Any]) -> dict[str, Any]:
  """Adds the flags of `preset` and `config`; those that are given win."""
  flags = dict(flags)
  named = {name: flags.pop(name, None) for name in ('preset', 'config')}
  argv = [
    'simulate',
    *(f'--{k}={v}' for k, v in named.items() if v is not None),
  ]
  return {**cli.values_of(argv), **flags}


def _resolved(flags: Mapping[str, Any]) -> tuple[dict[str, Any], Given]:
  """Returns the values of all flags, and the objects given instead of names."""
  plain = {k: v for k, v in flags.items() if not _is_object(k, v)}
  values = resolve.from_arguments(plain)
  if values['workdir'] is None and 'checkpoint_every' not in flags:
    values['checkpoint_every'] = 0  # no later call can find the folder
  dataset, module, parts = None, None, {}
  if 'dataset' not in plain and 'dataset' in flags:
    dataset = datasets.from_arrays(flags['dataset'], values['num_classes'])
    values['dataset'] = f'arrays:{datasets.fingerprint(dataset)}'
  if 'method' not in plain and 'method' in flags:
    values['method'], parts = _method(flags['method'])
  if 'model' not in plain and 'model' in flags:
    module = flags['model']
    values['model'] = f'module:{modules.name_of(module)}'
    for name in _OF_NAMED_MODELS:
      if name in flags:
        raise cli.UsageError(
          name, flags[name], 'is a flag of models by name, not of modules'
        )
    values['norm'] = _norm(values, dataset, module)
  return values, Given(dataset, module, parts)


def _is_object(name: str, value: Any) -> bool:
  """Returns whether an argument is an object instead of a flag's value."""
  return name in ('dataset', 'method', 'model') and not isinstance(value, str)


def _method(method: Method | Sequence[str | Method]) -> tuple[str, dict]:
  """Returns the name of a method, and the caller's own parts by name."""
  parts = [method] if isinstance(method, Method) else list(method)
  wrong = [p for p in parts if not isinstance(p, str | Method)]
  if wrong or not parts:
    raise cli.UsageError(
      'method',
      wrong[0] if wrong else parts,
      'must be a name, a base.Method, or a sequence of these',
    )
  own = recipes.name_own([part for part in parts if isinstance(part, Method)])
  names = iter(own)
  return '+'.join(p if isinstance(p, str) else next(names) for p in parts), own


def _norm(values, dataset, module) -> str:
  """Returns 'batch' if a module has BatchNorm statistics, else 'none'."""
  config = resolve.Configuration(values)
  loaded = dataset or assembly.load(
    config, values['data_dir'], values['manual_dir']
  )
  model = assembly.make_model(config, loaded, module)
  variables = jax.eval_shape(model.init, jax.random.key(0))
  return 'batch' if jax.tree.leaves(variables.stats) else 'none'


@contextlib.contextmanager
def _as_exceptions() -> Iterator[None]:
  """Turns the errors of programs into Python's own exceptions."""
  try:
    yield
  except cli.UnknownFlag as error:
    raise TypeError(str(error)) from None
  except cli.UsageError as error:
    raise ValueError(str(error)) from None
  except cli.RunError as error:
    raise RuntimeError(str(error)) from None
  except cli.Terminated as stop:  # SIGTERM, which ends a process
    raise SystemExit(143) from stop


def _signature() -> inspect.Signature:
  """Makes the signature of `simulate` with every flag, for help and editors."""
  parameters = dict(inspect.signature(simulate).parameters)
  del parameters['flags']
  for names in flags_lib.SECTIONS.values():
    for name in names:
      default = own_flags.FLAGS[name].default
      if name in parameters:
        parameters[name] = parameters[name].replace(default=default)
      else:
        parameters[name] = inspect.Parameter(
          name, inspect.Parameter.KEYWORD_ONLY, default=default
        )
  return inspect.Signature(list(parameters.values()), return_annotation=Run)


simulate.__signature__ = _signature()  # type: ignore[attr-defined]
