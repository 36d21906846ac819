"""A drawing of one round: what is sent, trained, returned and made of it.

It is made of a run's configuration: of its method's parts, in the order in
which the server works, and of the flags of local training, participation,
uplink and privacy.
"""

from collections.abc import Iterable, Mapping
import textwrap
from typing import Any, NamedTuple

import markupsafe

from fedftg_jax import recipes, uplinks
from fedftg_jax.results import svg, tables

_WIDTH = 360  # of the drawing; a phone shows it in its full size
_LETTERS = 41  # of a line
_LINE = 18  # height of a line
_EDGE = 12  # between a box and its text
_ARROW = 26  # length of an arrow without its text


class Part(NamedTuple):
  """A part's share of a round; '{FLAG}' stands for the value of a flag.

  Attributes:
    down: what the server sends besides the model.
    local: what clients do in or around local training.
    keeps: what a client keeps until its next round.
    up: what a client sends besides its model.
    server: what the server does.
    stores: what the server keeps besides the model.
  """

  down: str = ''
  local: str = ''
  keeps: str = ''
  up: str = ''
  server: str = ''
  stores: str = ''


_COUNTS = 'its number of examples of each class'

PARTS = {
  'fed_avg': Part(server='averages the models, {weighting}'),
  'fed_nova': Part(
    up='its number of steps',
    server='averages the changes of the models, each divided by its number of '
    'steps',
  ),
  'q_fed_avg': Part(
    up='two numbers, of its loss',
    server='averages the changes; clients with a higher loss count more '
    '(q = {fair_q})',
  ),
  'fed_prox': Part(
    local='adds a penalty on the distance from the received model to its loss '
    '(mu = {prox_mu})'
  ),
  'moon': Part(
    local='contrasts its features with those of the received model and of its '
    'own last one',
    keeps='its last model',
  ),
  'fed_dyn': Part(
    local='adds a dynamic regulariser to its loss (alpha = {dyn_alpha})',
    keeps='its dual variable',
    server='corrects the mean by the dual variables',
    stores='mean of the dual variables',
  ),
  'scaffold': Part(
    down='the server’s control variate',
    local='corrects each step by the two control variates',
    keeps='its control variate',
    up='the change of its control variate',
    server='updates its control variate',
    stores='control variate',
  ),
  'fed_ntd': Part(
    local='distils what the received model says of all classes but the true one'
  ),
  'fed_lsd': Part(local='distils what the received model says of all classes'),
  'fed_align': Part(
    local='aligns a slimmed copy of the last stage with the full one'
  ),
  'fed_zdac': Part(
    local='makes images from the received model and trains on them, too, for '
    'the classes that it lacks',
    stores='some of the images, to show',
  ),
  'fed_zdas': Part(
    up=_COUNTS,
    server='makes images from the models of the clients and trains the mean on '
    'them',
    stores='some of the images, to show',
  ),
  'fed_gen': Part(
    down='a generator of features',
    local='trains its last layers on generated features, too',
    up=_COUNTS,
    server='trains the generator against the clients’ last layers',
    stores='generator and its optimiser',
  ),
  'fed_mr': Part(
    server='keeps a model for each client of a round and exchanges layers '
    'between them at random; the mean is evaluated',
    stores='these models',
  ),
  'p_fed_me': Part(
    local='trains a personal model near the common one',
    keeps='its personal model',
  ),
  'p_fed_bred': Part(
    local='trains a personal model near what a prior makes of the common one',
    keeps='its personal model',
  ),
  'ditto': Part(
    local='trains a model of its own, too, pulled to the received one',
    keeps='its own model',
  ),
  'kd_lwof': Part(
    local='trains a model of its own architecture, too; both distil each other',
    keeps='its own model',
  ),
  'fed_dm': Part(
    up='synthetic images instead of a model',
    server='trains the model on the images of all clients',
    stores='some of the images, to show',
  ),
  'fed_df': Part(
    up=_COUNTS,
    server='trains a generator of images, and distils the ensemble of the '
    'clients’ models into the mean',
    stores='generator',
  ),
  'fed_df_public': Part(
    server='distils the ensemble of the clients’ models into the mean, on '
    'public images',
    stores='public images',
  ),
  'fed_ftg': Part(
    up=_COUNTS,
    server='fine-tunes the mean, {ftg_iterations} times over: the generator '
    'learns to make hard images (passes over the clients’ models: '
    '{ftg_generator_steps}), then the mean learns what their ensemble says of '
    'such images (steps: {ftg_student_steps})',
    stores='generator',
  ),
  'running_average': Part(
    server='averages the models of all rounds so far, to evaluate '
    '({average_decay} for a round less)',
    stores='this average',
  ),
}


class Round(NamedTuple):
  """The steps of a round, each a list of sentences without a full stop."""

  down: list[str]
  local: list[str]
  up: list[str]
  server: list[str]


def of_config(
  config: Mapping[str, Any], traffic: tuple[float, float] | None = None
) -> Round:
  """Describes a round of a run.

  Args:
    config: the run's.
    traffic: megabytes that are sent down and up in a round; None if unknown.

  Raises:
    ValueError: for a method that is not known.
  """
  flags = _Flags(config)
  names = recipes.parse(config['method'])
  parts = [PARTS[name] for name in names if name in PARTS]

  def said(field: str) -> list[str]:
    texts = (getattr(part, field) for part in parts)
    return [text.format_map(flags) for text in texts if text]

  def amount(way: int) -> str:
    return f' ({traffic[way]:.3g} MB)' if traffic else ''

  images_only = 'fed_dm' in names
  change = [] if images_only else [f'the change of its model{_coded(config)}']
  return Round(
    [
      f'sends to {_cohort(flags)}{amount(0)}:',
      *_listed([f'the model ({flags["model"]})', *said('down')]),
    ],
    _listed(
      [
        *_training(config, flags, images_only),
        *said('local'),
        *_kept(said('keeps') + _kept_statistics(config)),
      ]
    ),
    [f'sends back{amount(1)}:', *_listed(change + said('up'))],
    _listed(
      [
        *_arrivals(config),
        *_made(names, config, flags),
        *_kept(said('stores'), besides='the model'),
        f'evaluates the model every {_th(flags["eval_every"])}',
      ]
    ),
  )


class _Flags(dict):
  """The values of flags as text; '?' for one that a folder does not name."""

  def __init__(self, config):
    values = {name: tables.text(value) for name, value in config.items()}
    by_examples = config.get('weighting', 'examples') == 'examples'
    values['weighting'] = (
      'weighted by their numbers of examples'
      if by_examples
      else 'all with the same weight'
    )
    super().__init__(values)

  def __missing__(self, name):
    return '?'


def _listed(texts: Iterable[str]) -> list[str]:
  return [f'– {text}' for text in texts]


def _kept(things: list[str], besides: str = '') -> list[str]:
  if not things:
    return []
  *first, last = [besides, *things] if besides else things
  return ['keeps ' + (f'{", ".join(first)} and {last}' if first else last)]


def _cohort(flags) -> str:
  if 'cohort' not in flags:
    return 'the clients of the schedule'
  about = '' if flags.get('schedule', 'exact') == 'exact' else 'about '
  of_all = f' of {flags["num_clients"]}' if 'num_clients' in flags else ''
  return f'{about}{flags["cohort"]}{of_all} clients'


def _training(config, flags, images_only) -> list[str]:
  if images_only:
    return ['makes images whose features match those of its own examples']
  steps = config.get('local_steps')
  length = (
    f'{tables.text(steps)} steps' if steps else _epochs(flags['local_epochs'])
  )
  momentum = config.get('momentum')
  with_ = f', momentum {tables.text(momentum)}' if momentum else ''
  return [
    f'trains the model for {length} of SGD: batches of {flags["batch_size"]}, '
    f'learning rate {flags["learning_rate"]}{with_}'
  ]


def _epochs(number: str) -> str:
  return '1 epoch' if number == '1' else f'{number} epochs'


def _th(number: str) -> str:
  return 'round' if number == '1' else f'{number} rounds'


def _kept_statistics(config) -> list[str]:
  local = config.get('batch_norm') == 'local'
  return ['its BatchNorm statistics'] if local else []


def _coded(config) -> str:
  """Says how the change is made private and short."""
  said = []
  if config.get('dp_clip'):
    said.append(f'cut to the norm {tables.text(config["dp_clip"])}')
  if config.get('secure_aggregation'):
    said.append('masked')
  uplink = config.get('uplink', 'none')
  if uplink != 'none':
    rate = tables.text(config.get('uplink_rate', '?'))
    help_ = uplinks.HELP.get(uplink, uplink)
    said.append(f'coded with {rate} bits a parameter by {help_}')
  return f', {", ".join(said)}' if said else ''


def _arrivals(config) -> list[str]:
  return [
    f'receives {what} from {100 * config[flag]:g} % of the clients ({who})'
    for flag, what, who in (
      ('dropout_rate', 'nothing', 'dropouts'),
      ('straggler_rate', 'models of fewer steps', 'stragglers'),
    )
    if config.get(flag)
  ]


def _made(names, config, flags) -> list[str]:
  """Lists what the server does with what it receives, part by part."""
  optimizer = config.get('server_optimizer', 'sgd')
  rate = config.get('server_learning_rate', 1.0)
  steps = []
  for name in names:
    aggregates = recipes.recipe(name).kind == 'aggregates'
    if aggregates and config.get('dp_noise'):
      steps.append(
        f'adds noise to the sum ({flags["dp_noise"]} times the norm)'
      )
    if name in PARTS and PARTS[name].server:
      steps.append(PARTS[name].server.format_map(flags))
    elif name not in PARTS:
      steps.append(f'applies {name.partition(":")[2]}, an own method')
    if aggregates and (optimizer, rate) != ('sgd', 1.0):
      steps.append(
        f'takes a step of {optimizer} along the mean change (learning rate '
        f'{flags["server_learning_rate"]})'
      )
  return steps


def draw(steps: Round, color: str) -> svg.Picture:
  """Draws a round as boxes from top to bottom.

  Args:
    steps: from `of_config`.
    color: of the arrows.
  """
  shapes, top = [], 4
  for title, lines, label in (
    ('1  The server', steps.down, []),
    ('2  Each of these clients', steps.local, steps.up),
  ):
    box, top = _box(title, lines, top, stacked=bool(label))
    arrow, top = _arrow(label, top, color)
    shapes += [box, arrow]
  box, bottom = _box('3  The server', steps.server, top)
  shapes += [box, _next_round(bottom, color)]
  height = bottom + 8
  label = markupsafe.escape(_in_words(steps))

  def element(size=''):
    return (
      f'<svg xmlns="http://www.w3.org/2000/svg" {size} '
      f'viewBox="0 0 {_WIDTH} {height}" font-size="12.5" role="img" '
      f'aria-label="{label}" fill="{svg.INK}">{"".join(shapes)}</svg>'
    )

  size = f'width="{_WIDTH}" height="{height}" font-family="sans-serif"'
  return svg.Picture(svg.themed(element()), element(size))


def _in_words(steps: Round) -> str:
  """Puts the drawing into words, for those who do not see it."""
  return ' '.join(
    f'{who} {"; ".join(line.removeprefix("– ") for line in lines)}.'
    for who, lines in (
      ('The server', steps.down),
      ('Each client', steps.local),
      ('It', steps.up),
      ('The server', steps.server),
    )
  )


def _wrapped(lines: Iterable[str]) -> list[str]:
  return [
    part
    for line in lines
    for part in textwrap.wrap(
      line, _LETTERS, subsequent_indent='  ' if line.startswith('–') else ''
    )
  ]


def _words(lines, left: float, top: float) -> str:
  return ''.join(
    f'<text x="{left + 10 * line.startswith("  ")}" '
    f'y="{top + _LINE * (i + 1) - 5}">{markupsafe.escape(line.strip())}</text>'
    for i, line in enumerate(lines)
  )


def _box(title, lines, top, stacked=False) -> tuple[str, float]:
  """Draws a box with a title; returns also where it ends."""
  lines = _wrapped(lines)
  height = 2 * _EDGE - 4 + _LINE * (len(lines) + 1)
  width = _WIDTH - 34
  frames = (
    f'<rect x="4" y="{top}" width="{width}" height="{height}" rx="8" '
    f'fill-opacity=".05" stroke="{svg.INK}" stroke-opacity=".45"/>'
  )
  for shift in (4, 8) if stacked else ():  # more clients behind it
    frames += (
      f'<path d="M{8 + shift} {top + height + shift}h{width - 12}'
      f'q8 0 8-8v{12 - height}" fill="none" stroke="{svg.INK}" '
      'stroke-opacity=".3"/>'
    )
  left, first = 4 + _EDGE, top + _EDGE - 6
  return (
    frames
    + f'<text x="{left}" y="{first + _LINE - 5}" font-weight="600">'
    + f'{markupsafe.escape(title)}</text>'
    + _words(lines, left, first + _LINE),
    top + height + 8 * stacked,
  )


def _arrow(lines, top, color) -> tuple[str, float]:
  """Draws an arrow down with its text; returns also where it ends."""
  lines = _wrapped(lines)
  length = max(_ARROW, _LINE * len(lines) + 10)
  end = top + length
  return (
    f'<path d="M26 {top + 3}V{end - 7}" fill="none" style="stroke: {color}" '
    f'stroke-width="3"/><path d="M20 {end - 9}h12l-6 8z" '
    f'style="fill: {color}"/>' + _words(lines, 42, top + 4),
    end,
  )


def _next_round(bottom, color) -> str:
  """Draws the arrow from the last box back to the first."""
  right = _WIDTH - 14
  return (
    f'<path d="M{_WIDTH - 28} {bottom - 16}H{right}V22H{_WIDTH - 22}" '
    f'fill="none" style="stroke: {color}" stroke-width="2" '
    'stroke-dasharray="5 4" stroke-linejoin="round"/>'
    f'<path d="M{_WIDTH - 21} 16v12l-8-6z" style="fill: {color}"/>'
    f'<text transform="translate({_WIDTH - 4} {bottom / 2 + 28}) rotate(-90)" '
    'font-size="11">next round</text>'
  )
