"""Builds methods and combinations of methods by name, as the flags do.

`build('scaffold+fed_ftg', settings)` puts the named parts in the order in which
the server runs them, whatever the order of the names: one part aggregates,
others correct the mean, others refine the model, and one averages models over
rounds. If no part aggregates, `fed_avg` is added.
"""

from collections.abc import Callable, Mapping, Sequence
import difflib
import inspect
import re
from typing import Any, Literal, NamedTuple

import optax

from fedftg_jax import base, distillation, influence, optimizers
from fedftg_jax import models as models_lib
from fedftg_jax.base import Generator, Method, Model
from fedftg_jax.methods import ditto as ditto_lib
from fedftg_jax.methods import fed_align as fed_align_lib
from fedftg_jax.methods import fed_avg as fed_avg_lib
from fedftg_jax.methods import fed_df as fed_df_lib
from fedftg_jax.methods import fed_dm as fed_dm_lib
from fedftg_jax.methods import fed_dyn as fed_dyn_lib
from fedftg_jax.methods import fed_ftg as fed_ftg_lib
from fedftg_jax.methods import fed_gen as fed_gen_lib
from fedftg_jax.methods import fed_lsd as fed_lsd_lib
from fedftg_jax.methods import fed_mr as fed_mr_lib
from fedftg_jax.methods import fed_nova as fed_nova_lib
from fedftg_jax.methods import fed_ntd as fed_ntd_lib
from fedftg_jax.methods import fed_prox as fed_prox_lib
from fedftg_jax.methods import fed_zda as fed_zda_lib
from fedftg_jax.methods import kd_lwof as kd_lwof_lib
from fedftg_jax.methods import moon as moon_lib
from fedftg_jax.methods import p_fed_bred as p_fed_bred_lib
from fedftg_jax.methods import private_fed_avg as private_fed_avg_lib
from fedftg_jax.methods import q_fed_avg as q_fed_avg_lib
from fedftg_jax.methods import remembering as remembering_lib
from fedftg_jax.methods import running_average as running_average_lib
from fedftg_jax.methods import scaffold as scaffold_lib

# The server runs its steps in this order; 'local' parts have no server step.
KINDS = ('local', 'aggregates', 'corrects', 'refines', 'averages')


class Settings(NamedTuple):
  """The settings that the named methods are built from.

  Attributes:
    model: the classifier.
    num_classes: C.
    server_optimizer: of the aggregating part; None for the plain mean.
    generator: for methods that generate images.
    options: by method, the values of its `options` that differ from their
      defaults, with the names of `PARTS` instead of functions.
    cohort: number of clients in every round, for methods that keep one model
      for each.
    batch_size: of local training, for methods that iterate over clients' data.
    learning_rate: of the first round.
    weight_decay: of local training, for students on the server.
    privacy: keyword arguments of `private_fed_avg`; empty for a plain sum.
    build_model: builds a classifier by name, for methods with several models.
    num_clients: N, for the same methods.
    image_shape: (height, width, channels), for methods that make images.
    own: the caller's own parts by name, such as 'part:mine'; see `name_own`.
  """

  model: Model
  num_classes: int
  server_optimizer: optax.GradientTransformation | None = None
  generator: Generator | None = None
  options: Mapping[str, Mapping[str, Any]] = {}
  cohort: int = 0
  batch_size: int = 50
  learning_rate: float = 0.1
  weight_decay: float = 1e-3
  privacy: Mapping[str, Any] = {}
  build_model: Callable[[str], Model] | None = None
  num_clients: int | None = None
  image_shape: tuple[int, ...] = ()
  own: Mapping[str, Method] = {}


class Recipe(NamedTuple):
  """A rule that builds a method from its name."""

  kind: str  # one of KINDS
  # Builds the Method. Arguments named like a field of `Settings` get its value.
  # Other arguments with a default are options. Each option becomes a flag named
  # by the prefix and the argument, with the argument's default and its text in
  # the docstring.
  function: Callable
  help: str
  weighting: str = 'examples'  # how clients should be weighted in means
  generates: bool = False  # whether it needs a generator
  prefix: str = ''
  fields: Callable | None = None  # a function whose arguments are options, too
  without: tuple[str, ...] = ()  # arguments that are no options
  # Required values of other flags: (flag, allowed values, reason).
  needs: tuple[tuple[str, tuple, str], ...] = ()
  # What it reveals to the server beyond a private sum.
  reveals: str = ''
  trains: bool = False  # whether it replaces local training
  alone: str = ''  # the reason why it cannot be combined with another part

  @property
  def given(self) -> list[str]:
    """The arguments that come from the settings."""
    arguments = inspect.signature(self.function).parameters
    return [
      name
      for name, argument in arguments.items()
      if name in Settings._fields and argument.kind != argument.VAR_KEYWORD
    ]

  @property
  def options(self) -> dict[str, inspect.Parameter]:
    """The options by name."""
    arguments = dict(inspect.signature(self.function).parameters)
    if self.fields:
      arguments |= inspect.signature(self.fields).parameters
    return {
      name: argument
      for name, argument in arguments.items()
      if argument.default is not argument.empty
      and name not in (*self.given, *self.without)
    }

  def build(self, settings: Settings, **options: Any) -> Method:
    """Builds the method; `options` take precedence over the settings."""
    given = {name: getattr(settings, name) for name in self.given}
    return self.function(**given | options)


# Options that are functions, by the names that flags give them.
PARTS: dict[str, dict[str, Any]] = {
  'gen_step': {'sequential': False, 'joint': True},
  'md': {'l1': fed_ftg_lib.l1, 'kl': fed_ftg_lib.kl},
  'cls_weight': {
    'mean': fed_ftg_lib.mean_times_mean,
    'per_sample': fed_ftg_lib.per_sample,
  },
  'student_reduction': {
    'mean_bc': fed_ftg_lib.over_classes,
    'batchmean': fed_ftg_lib.soft_cross_entropy,
  },
  'teacher_weight': {
    'class': fed_ftg_lib.class_weights,
    'uniform': fed_ftg_lib.uniform_weights,
  },
  'ensemble': distillation.ENSEMBLES,
  'student_bn': distillation.STATISTICS,
  'labels': {
    'quota': distillation.quota_labels,
    'iid': distillation.iid_labels,
  },
  'label_sampling': {
    'customised': lambda draw_labels: draw_labels,
    'uniform': distillation.of_all_classes,
  },
}


class FtgOptions(NamedTuple):
  """FedFTG's options by name; the defaults are those of the released code.

  Attributes:
    iterations: I, outer iterations in a round; 0 switches fine-tuning off.
    generator_steps: I_g, passes of generator updates in an iteration.
    student_steps: I_d, student updates in an iteration.
    batch_size: B, number of generated images in a batch.
    student_lr: learning rate of the student's SGD (here also a function of the
      round).
    generator_lr: learning rate of the generator's Adam (here also a function of
      the round).
    weight_decay: weight decay of the student's SGD (code: that of the clients).
      It shrinks the model by a factor of about 1 - I I_d student_lr
      weight_decay in a round, in addition to all other changes.
    student_clip: largest global norm of the student's gradient in a step,
      before weight decay is added; 0 for no bound (code). Without a bound, a
      deep network that normalises by its running statistics can diverge.
    lambda_cls: weight of the fidelity term.
    lambda_dis: weight of the diversity term.
    gen_step: 'sequential', one Adam step per teacher, in the order of client
      ids, with lambda_dis / K in each (code), or 'joint', one step on the sum
      over teachers with lambda_dis once (paper).
    hard_samples: whether the generator also maximises the discrepancy between
      student and teachers, which makes it look for hard samples (code).
    md: the discrepancy: 'l1' of logits, mean over classes, with the teacher
      held constant (code), or 'kl' of predictions (paper).
    cls_weight: fidelity as mean(CE) * mean(alpha) ('mean', code) or as mean(CE
      * alpha) ('per_sample').
    ensemble: whether the teachers' probabilities ('prob', code) or logits
      ('logit') are averaged.
    teacher_weight: 'class', alpha_k^y = n_k^y / sum_i n_i^y, or 'uniform', 1 /
      K (ablation of the class-level ensemble).
    student_reduction: student loss as a mean over batch and classes ('mean_bc',
      code) or over the batch alone ('batchmean', C times larger).
    student_bn: 'overwrite', the student is distilled in train mode and its
      BatchNorm statistics become those of generated images (code); 'batch', the
      same, but the aggregated statistics are kept; or 'keep', the student also
      normalises by the aggregated statistics.
    labels: 'quota', deterministic class counts in random order (code), or
      'iid', independent draws (paper).
    label_sampling: 'customised', classes as frequent as in the cohort's data,
      or 'uniform' over all classes (ablation).
    memory: discount per round. The broadcast model becomes one more teacher,
      with the discounted class counts of earlier rounds (see `remembering`); 0
      for no such teacher (code).
    eps_root: added under the square root of the generator's Adam. Without it,
      the derivative of the root is 0 / 0 where a gradient is 0, which matters
      for forward mode through a round; 0 in the code.
  """

  iterations: int = 10
  generator_steps: int = 1
  student_steps: int = 5
  batch_size: int = 50
  student_lr: float | Callable = 0.1
  generator_lr: float | Callable = 0.01
  weight_decay: float = 1e-3
  student_clip: float = 0.0
  lambda_cls: float = 1.0
  lambda_dis: float = 1.0
  gen_step: str = 'sequential'
  hard_samples: bool = True
  md: str = 'l1'
  cls_weight: str = 'mean'
  ensemble: str = 'prob'
  teacher_weight: str = 'class'
  student_reduction: str = 'mean_bc'
  student_bn: str = 'overwrite'
  labels: str = 'quota'
  label_sampling: str = 'customised'
  memory: float = 0.0
  eps_root: float = 0.0


# What the presets change besides `fed_ftg.PRESETS`: options that differ from
# the code's, and whether the generator has biases in front of its BatchNorms.
FTG_PRESETS: dict[str, dict[str, Any]] = {
  'official': dict(generator_bias=True),
  'paper': dict(labels='iid', generator_bias=True),
  'intended': dict(generator_bias=False),
  'robust': dict(
    generator_steps=2,
    batch_size=10,
    weight_decay=0.0,
    student_clip=3.0,
    memory=0.9,
    generator_bias=False,
  ),
}


def ftg_options(preset: str = 'official', **changes) -> FtgOptions:
  """Returns the options of a preset of FedFTG, with `changes` on top.

  Args:
    preset: a key of `FTG_PRESETS`.
    **changes: values of `FtgOptions` by name.

  Raises:
    ValueError: for an unknown preset, name or number.
  """
  _check_choice('preset', preset, FTG_PRESETS)
  around = {
    k: v for k, v in FTG_PRESETS[preset].items() if k != 'generator_bias'
  }
  parts = fed_ftg_lib.PRESETS[preset]
  terms: fed_ftg_lib.Terms = parts['terms']
  chosen = {
    'gen_step': parts.get('joint', False),
    'md': terms.discrepancy or fed_ftg_lib.l1,
    'cls_weight': terms.fidelity,
    'student_reduction': terms.distance,
    'ensemble': terms.ensemble,
    'student_bn': parts.get('student_bn', distillation.renewed_statistics),
  }
  names = {
    option: next(name for name, part in PARTS[option].items() if part == value)
    for option, value in chosen.items()
  }
  options = FtgOptions(
    **{
      'hard_samples': terms.discrepancy is not None,
      **names,
      **around,
      **changes,
    }
  )
  for name in options._fields:
    if name in PARTS:
      _check_choice(name, getattr(options, name), PARTS[name])
  return options


def _check_choice(name, value, allowed):
  if value not in allowed:
    raise ValueError(f'{name} must be one of {tuple(allowed)}, got {value!r}.')


def _fed_ftg(model, generator, num_classes, preset='official', **changes):
  """Builds FedFTG from `FtgOptions`.

  Args:
    preset: a preset of options. official: the released code; paper: the
      equations of the paper, as far as they are known; intended: the code with
      its defects fixed; robust: what was found to help, see
      docs/fed_ftg_parts.md.
  """
  o = ftg_options(preset, **changes)
  part = {
    name: PARTS[name][getattr(o, name)] for name in PARTS if name in o._fields
  }
  terms = fed_ftg_lib.Terms(
    part['md'] if o.hard_samples else None,
    part['cls_weight'],
    part['student_reduction'],
    part['ensemble'],
    part['teacher_weight'],
    o.lambda_cls,
    o.lambda_dis,
  )
  return _remembering(
    fed_ftg_lib.fed_ftg(
      model,
      generator,
      num_classes,
      iterations=o.iterations,
      batch_size=o.batch_size,
      generator_optimizer=_at_rate(
        lambda rate: optimizers.adam(rate, eps_root=o.eps_root), o.generator_lr
      ),
      student_optimizer=_at_rate(
        lambda rate: distillation.sgd(rate, o.weight_decay, o.student_clip),
        o.student_lr,
      ),
      draw_labels=part['label_sampling'](part['labels']),
      terms=terms,
      generator_steps=o.generator_steps,
      student_steps=o.student_steps,
      joint=part['gen_step'],
      student_bn=part['student_bn'],
    ),
    num_classes,
    o.memory,
  )


def _fed_df(model, generator, num_classes, weight_decay, memory=0.0, **options):
  """Builds FedDF on generated images.

  Args:
    memory: only on generated images: the broadcast model is one more teacher,
      as with --ftg_memory.
  """
  return _remembering(
    fed_df_lib.fed_df(
      model, generator, num_classes, _df_options(weight_decay, **options)
    ),
    num_classes,
    memory,
  )


def _fed_df_public(model, weight_decay, **options):
  return fed_df_lib.fed_df_public(model, _df_options(weight_decay, **options))


def _df_options(weight_decay, ensemble='prob', **options):
  _check_choice('ensemble', ensemble, distillation.ENSEMBLES)
  return fed_df_lib.Options(
    **options,
    weight_decay=weight_decay,
    ensemble=distillation.ENSEMBLES[ensemble],
  )


def _remembering(part, num_classes, memory):
  return (
    part
    if not memory
    else remembering_lib.remembering(part, num_classes, memory)
  )


def _at_rate(make, rate):
  """Builds an optimiser whose learning rate may be a function of the round."""
  return (lambda round_: make(rate(round_))) if callable(rate) else make(rate)


def _fed_avg(model, cohort, server_optimizer, privacy):
  if not privacy:
    return fed_avg_lib.fed_avg(server_optimizer)
  return private_fed_avg_lib.private_fed_avg(
    model, cohort, server_optimizer=server_optimizer, **privacy
  )


def _fed_mr(server_optimizer, cohort, **options):
  if server_optimizer is not None:
    raise ValueError('fed_mr takes no server optimiser: no mean is trained.')
  return fed_mr_lib.fed_mr(cohort, **options)


def _scaffold(
  batch_size,
  learning_rate,
  option: Literal[1, 2] = 2,
  lr0: bool = False,
  ref_untuned: bool = False,
  paper: bool = False,
):
  """Builds SCAFFOLD.

  Args:
    option: 1, control variates from a gradient over all data, or 2, from the
      mean step.
    lr0: whether to use the first round's learning rate in the control variates,
      as the official codes do.
    ref_untuned: whether control variates are relative to the mean before
      fine-tuning, as in the official FedFTG code.
    paper: whether to leave out the clients' shares of the examples, as the
      paper does. The official codes scale control variates by them.
  """
  rate = learning_rate if lr0 else None
  return scaffold_lib.scaffold(option, rate, ref_untuned, batch_size, not paper)


def _kd_lwof(
  model, build_model, num_clients, models='mlp,lenet,fedavg_cnn', **options
):
  """Builds KD + LwoF from the names of architectures.

  Args:
    models: the clients' architectures, separated by commas; client k has number
      k modulo their count.
  """
  names = models.split(',')
  check_architectures(names, num_clients)
  return kd_lwof_lib.kd_lwof(
    model, {name: build_model(name) for name in names}, **options
  )


def check_architectures(
  names: Sequence[str], num_clients: int | None = None
) -> None:
  """Checks the names of the clients' architectures.

  Args:
    names: the architectures.
    num_clients: N; None if unknown.

  Raises:
    ValueError: for an architecture that does not exist, is named twice, or
      would be used by no client.
  """
  for name in names:
    if name not in models_lib.CLASSIFIERS:
      raise ValueError(
        f'no model {name!r}: must be of {", ".join(models_lib.CLASSIFIERS)}, '
        'joined with commas'
      )
    if names.count(name) > 1:
      raise ValueError(f'{name} is named twice')
  if num_clients is not None and len(names) > num_clients:
    raise ValueError(
      f'{len(names)} architectures for {num_clients} clients: no client would '
      f'have {names[num_clients]}'
    )


# For methods that make images which match BatchNorm's statistics.
_STATISTICS = (
  'batch_norm',
  ('aggregate', 'reset'),
  'its images match the statistics of the model that is sent',
)

# For methods with two models on each client.
_ONE_MOMENTUM = (
  ('keep_momentum', (False,), 'one momentum does not fit two models'),
)
# For methods whose local steps follow a rule of their own.
_OWN_STEPS = (('momentum', (0.0,), 'its local steps have no momentum'),)

RECIPES = {
  'fed_avg': Recipe(
    'aggregates', _fed_avg, 'weighted mean, or FedOpt with --server_optimizer'
  ),
  'fed_nova': Recipe(
    'aggregates',
    fed_nova_lib.fed_nova,
    'mean normalised by how far local steps lead',
    reveals='sends how far its steps lead',
  ),
  'q_fed_avg': Recipe(
    'aggregates',
    q_fed_avg_lib.q_fed_avg,
    'fair mean, in which clients with a larger loss count more',
    prefix='fair_',
    reveals='sends losses',
  ),
  'fed_prox': Recipe(
    'local',
    fed_prox_lib.fed_prox,
    'a proximal term pulls local models to the received model',
    prefix='prox_',
  ),
  'moon': Recipe(
    'local',
    moon_lib.moon,
    'features are contrasted with those of the received and the last model',
    prefix='moon_',
  ),
  'fed_dyn': Recipe(
    'corrects',
    fed_dyn_lib.fed_dyn,
    'dynamic regularisation',
    weighting='uniform',
    prefix='dyn_',
    reveals='adds up dual variables',
  ),
  'scaffold': Recipe(
    'corrects',
    _scaffold,
    'control variates',
    weighting='uniform',
    prefix='scaffold_',
    reveals='sends control variates',
  ),
  'fed_ntd': Recipe(
    'local',
    fed_ntd_lib.fed_ntd,
    'distils the received model, except for the true class',
    prefix='ntd_',
  ),
  'fed_lsd': Recipe(
    'local',
    fed_lsd_lib.fed_lsd,
    'distils the received model, for all classes',
    prefix='lsd_',
  ),
  'fed_align': Recipe(
    'local',
    fed_align_lib.fed_align,
    'the slimmed last stage is regularised towards the full one',
    prefix='align_',
    needs=(
      (
        'model',
        ('resnet20', 'resnet18_cifar', 'resnet18', 'resnet56'),
        'it aligns the last stage of a residual network',
      ),
    ),
  ),
  'fed_zdac': Recipe(
    'local',
    fed_zda_lib.fed_zdac,
    "zero-shot images of the model augment the clients' data",
    prefix='zda_',
    needs=(_STATISTICS,),
  ),
  'fed_zdas': Recipe(
    'refines',
    fed_zda_lib.fed_zdas,
    "the mean is trained further on zero-shot images of the clients' models",
    prefix='zda_',
    needs=(_STATISTICS,),
    reveals="reads every client's model",
  ),
  'fed_gen': Recipe(
    'local',
    fed_gen_lib.fed_gen,
    'a feature generator, trained on the server, guides local training',
    prefix='gen_',
    reveals="reads every client's last layer",
  ),
  'fed_mr': Recipe(
    'aggregates',
    _fed_mr,
    'keeps one model per client of a round, and recombines their layers',
    weighting='uniform',
    prefix='mr_',
    fields=fed_mr_lib.fed_mr,
    needs=(
      ('schedule', ('exact',), 'its rounds have as many clients as models'),
      ('train_all', (False,), 'its rounds have as many clients as models'),
      (
        'server_optimizer',
        ('sgd',),
        'it has no mean that could be trained further',
      ),
      (
        'server_learning_rate',
        (None, 1.0),
        'it has no mean that could be trained further',
      ),
      ('weighting', (None, 'uniform'), 'its models have equal weights'),
    ),
    reveals="keeps every client's model",
  ),
  'p_fed_me': Recipe(
    'local',
    p_fed_bred_lib.p_fed_me,
    'personal models near the common model',
    prefix='me_',
    needs=_OWN_STEPS,
    trains=True,
  ),
  'p_fed_bred': Recipe(
    'local',
    p_fed_bred_lib.p_fed_bred,
    'personal models near the mean of a prior around the common model',
    prefix='me_',
    needs=_OWN_STEPS,
    trains=True,
  ),
  'ditto': Recipe(
    'local',
    ditto_lib.ditto,
    'personal models that are pulled towards the common model',
    prefix='ditto_',
    needs=_ONE_MOMENTUM,
    trains=True,
  ),
  'kd_lwof': Recipe(
    'local',
    _kd_lwof,
    'clients have models of several architectures, distilled with a common one',
    prefix='lwof_',
    fields=kd_lwof_lib.kd_lwof,
    needs=_ONE_MOMENTUM,
    trains=True,
  ),
  'fed_dm': Recipe(
    'aggregates',
    fed_dm_lib.fed_dm,
    'clients send images that represent their data, and no model',
    prefix='dm_',
    needs=(
      ('uplink', ('none',), 'no model is sent'),
      ('batch_norm', ('aggregate',), 'clients train no statistics'),
      ('momentum', (0.0,), 'clients train no model (see --dm_server_momentum)'),
      ('augment', ('none',), 'clients train no model'),
      (
        'server_optimizer',
        ('sgd',),
        'it has no mean that could be trained further',
      ),
      (
        'server_learning_rate',
        (None, 1.0),
        'it has no mean that could be trained further',
      ),
    ),
    reveals='sends images of its data',
    alone='its clients train no model and send none',
  ),
  'fed_df': Recipe(
    'refines',
    _fed_df,
    'ensemble distillation on generated images',
    generates=True,
    prefix='df_',
    fields=fed_df_lib.Options,
    reveals="reads every client's model",
  ),
  'fed_df_public': Recipe(
    'refines',
    _fed_df_public,
    'ensemble distillation on unlabelled --public_data',
    prefix='df_',
    fields=fed_df_lib.Options,
    without=('generator_steps', 'generator_lr', 'lambda_dis', 'eps_root'),
    reveals="reads every client's model",
  ),
  'fed_ftg': Recipe(
    'refines',
    _fed_ftg,
    'data-free fine-tuning of the mean on the server',
    generates=True,
    prefix='ftg_',
    fields=FtgOptions,
    reveals="reads every client's model and class counts",
  ),
  'running_average': Recipe(
    'averages',
    running_average_lib.running_average,
    'evaluates a running average of the broadcast models, too',
    prefix='average_',
  ),
}

# Parts that a caller has made: by the first word of their name.
_OWN = {
  prefix: Recipe(kind, lambda: None, '', reveals='may send anything')
  for prefix, kind in (('part', 'corrects'), ('method', 'aggregates'))
}

# Optimisers and their default learning rates; the last three are not tuned.
SERVER_OPTIMIZERS = {
  'sgd': (optax.sgd, 1.0),
  'momentum': (lambda rate: optax.sgd(rate, momentum=0.9), 1.0),
  'adam': (lambda rate, **root: optimizers.adam(rate, eps=1e-3, **root), 0.01),
  'yogi': (optax.yogi, 0.01),
  'adagrad': (optax.adagrad, 0.1),
}


def recipe(part: str) -> Recipe:
  """Returns the recipe of a part, also of one that `name_own` has named.

  Raises:
    KeyError: for an unknown part.
  """
  kind, is_own, _ = part.partition(':')
  return _OWN[kind] if is_own else RECIPES[part]


def name_own(parts: Sequence[Method]) -> dict[str, Method]:
  """Names methods of the caller, for `parse` and `build`.

  A method is named after the function that made it: 'part:memory', or
  'method:memory' if it aggregates. The server runs a part after the parts that
  correct the mean and before the parts that refine the model.

  Args:
    parts: the methods.

  Returns:
    The methods by name.
  """
  named: dict[str, Method] = {}
  for part in parts:
    hooks = (
      hook
      for hook, default in zip(part, Method._field_defaults.values())
      if callable(hook) and hook is not default
    )
    names = (getattr(hook, '__qualname__', '') for hook in hooks)
    word = next((n.split('.')[0] for n in names if n.split('.')[0]), 'own')
    word = re.sub(r'\W', '', word) or 'own'
    name = plain = ('method:' if part.aggregates else 'part:') + word
    number = 1
    while name in named:
      number += 1
      name = f'{plain}{number}'
    named[name] = part
  return named


def parse(name: str) -> list[str]:
  """Splits 'a+b' into parts, in the order in which the server runs them.

  Args:
    name: names of methods, joined with +.

  Returns:
    The names, including 'fed_avg' if no other part aggregates.

  Raises:
    ValueError: for an unknown or repeated part, two parts that aggregate or
      that replace local training, or a part that cannot be combined.
  """
  parts = name.split('+')
  for part in parts:
    if part not in RECIPES and part.partition(':')[0] not in _OWN:
      like = part.lower().replace('_', '').replace('-', '')
      names = {name.replace('_', ''): name for name in RECIPES}
      close = difflib.get_close_matches(like, names, 1)
      hint = f' (did you mean {names[close[0]]}?)' if close else ''
      raise ValueError(
        f'no method {part!r}{hint}: must be one of '
        f'{", ".join(sorted(RECIPES))}, or several joined with +'
      )
    if parts.count(part) > 1:
      raise ValueError(f'{part} is named twice')
  kinds = [recipe(part).kind for part in parts]
  if kinds.count('aggregates') > 1:
    both = [p for p, k in zip(parts, kinds) if k == 'aggregates']
    raise ValueError(f'only one part can aggregate, got {" and ".join(both)}')
  for part in parts:
    if recipe(part).alone and len(parts) > 1:
      others = ' and '.join(p for p in parts if p != part)
      raise ValueError(
        f'{part} goes with no other part, got {others}: {recipe(part).alone}'
      )
  both = [part for part in parts if recipe(part).trains]
  if len(both) > 1:
    raise ValueError(
      f'only one part can train in its own way, got {" and ".join(both)}'
    )
  if 'aggregates' not in kinds:
    parts.append('fed_avg')
  return sorted(parts, key=lambda part: KINDS.index(recipe(part).kind))


def build(
  name: str, settings: Settings, *further: Method, refining: bool = True
) -> Method:
  """Builds the chain of the parts in `name`, such as 'scaffold+fed_ftg'.

  Args:
    name: see `parse`.
    settings: the settings that the parts are built from.
    *further: parts to add at the end. The random draws of the others do not
      depend on them.
    refining: whether parts that refine the model do so; if False they only keep
      their slots, see `influence.client_stage`.

  Returns:
    The method.

  Raises:
    ValueError: for a wrong name or option, or a part that a private sum does
      not protect.
  """
  if settings.privacy:
    check_private(name)
  parts = []
  for part in parse(name):
    how = recipe(part)
    if ':' in part:
      made = _own(part, settings)
    else:
      made = how.build(settings, **settings.options.get(part, {}))
    if how.kind == 'refines' and not refining:
      made = influence.client_stage(made)
    parts.append(made)
  return base.chain(*parts, *further)


def _own(part, settings) -> Method:
  if part not in settings.own:
    raise ValueError(f'{part} is known only to the program that made it')
  return settings.own[part]


def check_private(name: str) -> None:
  """Checks that the method called `name` reveals no more than a sum.

  Raises:
    ValueError: names the part that reveals more, and what.
  """
  for part in parse(name):
    if recipe(part).reveals:
      raise ValueError(f'cannot protect {part}, which {recipe(part).reveals}')


def weighting(name: str) -> str:
  """Returns how the method called `name` weights clients in means."""
  wanted = [recipe(part).weighting for part in parse(name)]
  return 'uniform' if 'uniform' in wanted else 'examples'


def refines(name: str) -> bool:
  """Returns whether the method called `name` has a part that refines."""
  return any(recipe(part).kind == 'refines' for part in parse(name))


def generates(name: str) -> bool:
  """Returns whether the method called `name` needs a generator."""
  return any(recipe(part).generates for part in parse(name))


def server_optimizer(
  name: str, learning_rate: float | None = None, eps_root: float = 0.0
) -> optax.GradientTransformation | None:
  """Builds a server optimiser by name; None for the plain mean (SGD of rate 1).

  Args:
    name: a key of `SERVER_OPTIMIZERS`.
    learning_rate: None for the default of the table.
    eps_root: of Adam, see `FtgOptions.eps_root`; must be 0 for the others.

  Returns:
    The optimiser, or None.

  Raises:
    ValueError: for an unknown name, or an `eps_root` without Adam.
  """
  if name not in SERVER_OPTIMIZERS:
    raise ValueError(
      f'server optimiser must be one of {sorted(SERVER_OPTIMIZERS)}, got '
      f'{name!r}.'
    )
  make, default = SERVER_OPTIMIZERS[name]
  rate = default if learning_rate is None else learning_rate
  if eps_root:
    if name != 'adam':
      raise ValueError(
        f'eps_root must be 0 with {name}, got {eps_root}; only adam has it.'
      )
    return make(rate, eps_root=eps_root)
  return None if (name, rate) == ('sgd', 1.0) else make(rate)
