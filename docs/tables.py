"""Writes the parts of the pages that come from files or from the code.

  python -m docs.tables          # rewrites every page that is out of date
  python -m docs.tables --check  # names these pages instead; exit status 1

A page marks such a part by two comments. What stands between them is replaced:

  <!-- table: demo -->     docs/results/demo.yaml, with its note and command
  <!-- rows: demo -->      the same table without them
  <!-- measured: moon -->  every measured row of the method, from all files
  <!-- method: moon -->    what the recipe of the method says, and its flags
  <!-- methods: all -->    all methods, linked to their pages
  <!-- methods: percent -->  the same with their accuracy, without their place
  <!-- combinations: all -->  which methods and flags go together
  <!-- ftg_presets: all -->   the presets of FedFTG, option by option
  <!-- presets: all -->    the files in experiments/presets/
  <!-- programs: all -->   the programs
  <!-- descriptions: all -->  what each program is, and its own flags
  <!-- flags: all -->      the flags of all programs, by section
  <!-- end -->
"""

from collections.abc import Callable, Sequence
import functools
import importlib
import os
import pathlib
import re
import sys

from absl import flags as absl_flags
import yaml

from fedftg_jax import programs, recipes
from fedftg_jax.configuration import combinations, flags
from fedftg_jax.system import cli

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / 'docs'
RESULTS = DOCS / 'results'
PRESETS = ROOT / 'experiments' / 'presets'
FIELDS = (
  'title',
  'command',
  'date',
  'commit',
  'versions',
  'machine',
  'note',
  'header',
  'rows',
)
REQUIRED = ('title', 'date', 'commit', 'header', 'rows')

_BLOCK = re.compile(
  r'^<!-- (?P<kind>\w+): (?P<name>\w+) -->\n(?P<text>.*?)^<!-- end -->$',
  re.M | re.S,
)

_PLACES = {
  'local': 'in local training',
  'aggregates': 'aggregates the models',
  'corrects': 'corrects the mean',
  'refines': 'refines the mean on the server',
  'averages': 'averages models over the rounds',
}

_LONG = 300  # letters of a preset's description

# The flags behind the fields of `recipes.Settings` that a recipe asks for.
_GIVEN = {
  'server_optimizer': ('server_optimizer', 'server_learning_rate'),
  'generator': ('generator_width', 'noise_dim', 'generator_bias'),
  'cohort': ('cohort',),
  'batch_size': ('batch_size',),
  'learning_rate': ('learning_rate',),
  'weight_decay': ('weight_decay',),
  'privacy': ('dp_clip', 'dp_noise', 'dp_quantile', 'secure_aggregation'),
}


def pages() -> list[pathlib.Path]:
  """Lists the pages that may have generated parts."""
  found = (p for p in DOCS.rglob('*.md') if RESULTS not in p.parents)
  return [ROOT / 'README.md', *sorted(p for p in found if not p.is_symlink())]


def updated(page: pathlib.Path) -> str:
  """Returns the text of a page with its generated parts made anew.

  Args:
    page: path of a Markdown file.

  Raises:
    ValueError: for a part that nobody can make, or one without an end.
  """
  text = page.read_text()
  marks = re.findall(r'^<!-- (\w+: \w+|end) -->$', text, re.M)
  wanted = ['end' if i % 2 else mark for i, mark in enumerate(marks)]
  if marks != wanted or len(marks) % 2 or 'end' in marks[::2]:
    raise ValueError(f'{page}: a generated part has no <!-- end -->')

  def replace(found: re.Match) -> str:
    kind, name = found['kind'], found['name']
    if kind not in PARTS:
      raise ValueError(f'{page}: no part {kind!r}; must be one of {[*PARTS]}')
    made = PARTS[kind](name, page).strip()
    return f'<!-- {kind}: {name} -->\n\n{made}\n\n<!-- end -->'

  return _BLOCK.sub(replace, text)


def markdown(
  header: Sequence[str], rows: Sequence[Sequence[object]]
) -> list[str]:
  """Formats a table as lines of Markdown; numbers stay with their ±."""
  lines = [header, ['---'] * len(header), *rows]
  return [
    '| '
    + ' | '.join(map(str, line)).replace(
      ' ± ', '\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}'
    )
    + ' |'
    for line in lines
  ]


@functools.cache
def result(name: str) -> dict:
  """Reads docs/results/NAME.yaml; every value is a text, or a list of texts.

  Raises:
    ValueError: for a field that is unknown or missing, or a row of another
      length than the header.
  """
  path = RESULTS / f'{name}.yaml'
  read = yaml.load(path.read_text(), yaml.BaseLoader)
  unknown = [field for field in read if field not in FIELDS]
  missing = [field for field in REQUIRED if field not in read]
  if unknown or missing:
    raise ValueError(f'{path.name}: unknown {unknown}, missing {missing}')
  for row in read['rows']:
    if len(row) != len(read['header']):
      raise ValueError(f'{path.name}: the header does not fit the row {row}')
  return read


@functools.cache
def shown_on() -> dict[str, pathlib.Path]:
  """Maps each measured table to the page below docs/ that shows it in full."""
  return {
    found['name']: page
    for page in pages()
    for found in _BLOCK.finditer(page.read_text())
    if found['kind'] == 'table'
  }


def _anchor(name: str) -> str:
  return 'table-' + name.replace('_', '-')


def _rows(name: str, page: pathlib.Path) -> str:
  del page
  read = result(name)
  return '\n'.join(markdown(read['header'], read['rows']))


def _table(name: str, page: pathlib.Path) -> str:
  read = result(name)
  where = [
    f'Commit: {read["commit"]}.',
    *(
      f'{read[k][:1].upper()}{read[k][1:]}.'
      for k in ('versions', 'machine')
      if k in read
    ),
    f'{read["date"]}.',
  ]
  parts = [
    f'<a id="{_anchor(name)}"></a>**{read["title"]}**',
    _rows(name, page),
    read.get('note', '').strip(),
    f'*{" ".join(where)}*',
  ]
  if 'command' in read:
    parts.append(f'```\n{read["command"].strip()}\n```')
  return '\n\n'.join(part for part in parts if part)


def _parts_of(cell: str) -> list[str]:
  """Names the parts of the method at the beginning of a cell, if it is one."""
  found = re.match(r'[a-z_]+(\+[a-z_]+)*', cell.strip('`* '))
  parts = found[0].split('+') if found else []
  return parts if parts and all(p in recipes.RECIPES for p in parts) else []


def _measured(name: str, page: pathlib.Path) -> str:
  """Collects the final accuracies of a method from all measured tables."""
  rows, is_shown_here = [], False
  for path in sorted(RESULTS.glob('*.yaml')):
    read = result(path.stem)
    if read['header'][0] != 'method' or 'final accuracy' not in read['header']:
      continue
    if shown_on().get(path.stem) == page:
      is_shown_here = True
      continue
    column = read['header'].index('final accuracy')
    finals = {row[0]: row[column] for row in read['rows']}
    setting = read['title']
    if path.stem in shown_on():
      target = os.path.relpath(shown_on()[path.stem], page.parent)
      setting = f'[{setting}]({target}#{_anchor(path.stem)})'
    rows += [
      (setting, f'`{row[0]}`', row[column], _base(finals, row[0]))
      for row in read['rows']
      if name in _parts_of(row[0])
    ]
  if not rows:
    return 'See the tables here.' if is_shown_here else 'Not measured yet.'
  header = ['setting', 'method', 'final accuracy']
  if name == 'fed_avg':
    return '\n'.join(markdown(header, [row[:3] for row in rows]))
  return '\n'.join(markdown([*header, '`fed_avg` there'], rows))


def _base(finals: dict[str, str], run: str) -> str:
  """Returns FedAvg's final accuracy, with the run's options if it is there."""
  options = run.partition(':')[1:]
  return finals.get(''.join(['fed_avg', *options]), finals.get('fed_avg', ''))


def _method(name: str, page: pathlib.Path) -> str:
  del page
  recipe = recipes.RECIPES[name]
  given = [f for field in recipe.given for f in _GIVEN.get(field, ())]
  facts = [
    f'Place: {_PLACES[recipe.kind]}.',
    'Clients count '
    + {'examples': 'by their numbers of examples', 'uniform': 'all alike'}[
      recipe.weighting
    ]
    + ' (`--weighting` changes it).',
  ]
  facts += [
    f'Needs {_code(flag, allowed)}: {_text(why)}.'
    for flag, allowed, why in recipe.needs
  ]
  if recipe.alone:
    facts.append(f'Goes with no other method: {recipe.alone}.')
  if recipe.trains:
    others = [
      f'`{n}`' for n, r in recipes.RECIPES.items() if r.trains and n != name
    ]
    facts.append(
      'Goes with no other method that changes the local steps: '
      f'{", ".join(others)}.'
    )
  facts.append(
    'Differential privacy (`--dp_clip`) and `--secure_aggregation` cannot '
    f'protect it: it {recipe.reveals}.'
    if recipe.reveals
    else 'Goes with differential privacy (`--dp_clip`) and '
    '`--secure_aggregation` where the model has no BatchNorm.'
  )
  if given:
    facts.append(f'Also reads {", ".join(f"`--{f}`" for f in given)}.')
  lines = [f'- {fact}' for fact in facts]
  own = list(flags.of_method(name))
  if own:
    lines += ['', *_flags_table(own, name)]
  else:
    lines += ['', 'It has no flags of its own.']
  return '\n'.join(lines)


def _code(flag: str, allowed: Sequence) -> str:
  """Formats the values of a flag that a method goes with."""
  shown = [
    f'`--{"" if value else "no"}{flag}`'
    if isinstance(value, bool)
    else f'`--{flag}={value:g}`'
    if isinstance(value, float)
    else f'`--{flag}={value}`'
    for value in allowed
    if value is not None
  ]
  return ' or '.join(shown)


def _text(help_text: str) -> str:
  """Makes Markdown of a flag's help: flags as code, no accidental markup."""
  text = help_text.replace('|', '\\|').replace('<', '&lt;').replace('*', '\\*')
  return re.sub(r"(--[a-z_]+\*?(=[\w.:/']*\w)?)", r'`\1`', text)


def _flags_table(names: Sequence[str], method: str = '') -> list[str]:
  return markdown(
    ['flag', 'default', 'meaning'], [_flag(name, method) for name in names]
  )


def _flag(name: str, method: str) -> list[str]:
  flag = absl_flags.FLAGS[name]
  default = flag.default
  if isinstance(default, bool):
    default = 'yes' if default else 'no'
  elif isinstance(default, list):
    default = ','.join(map(str, default))
  elif isinstance(default, float):
    default = f'{default:g}'
  text = re.sub(r'^<.*?>: |;\s+repeat this option .*$', '', flag.help)
  if method:  # or another one with the same flag
    text = re.sub(rf'^({"|".join(recipes.RECIPES)}): ', '', text)
  if re.match('[a-z]{2,} ', text):
    text = text[0].upper() + text[1:]
  choices = getattr(flag.parser, 'enum_values', None)
  text = _text(text)
  if choices:
    text += ' Choices: ' + ', '.join(f'`{c}`' for c in choices) + '.'
  shown = '' if default in (None, '') else f'`{default}`'
  return [f'`--{name}`', shown, ' '.join(text.split())]


def _title(path: pathlib.Path) -> str:
  return path.read_text().partition('\n')[0].removeprefix('# ')


def _methods(name: str, page: pathlib.Path) -> str:
  percent = _side_by_side() if name == 'percent' else {}
  rows = []
  for method, recipe in sorted(
    recipes.RECIPES.items(), key=lambda item: recipes.KINDS.index(item[1].kind)
  ):
    path = DOCS / 'methods' / f'{method}.md'
    source = path.read_text().partition('## Source')[2]
    paper = re.search(r'https://arxiv.org/abs/([\d.]+\d)', source)
    target = os.path.relpath(path, page.parent)
    rows.append(
      [
        f'[{_title(path)}]({target})',
        f'`{method}`',
        percent.get(method, '') if percent else _PLACES[recipe.kind],
        _text(recipe.help),
        f'[{paper[1]}]({paper[0]})' if paper else '',
      ]
    )
  third = 'percent' if percent else 'place'
  return '\n'.join(
    markdown(['method', '`--method`', third, 'what it does', 'arXiv'], rows)
  )


def _side_by_side() -> dict[str, str]:
  """Returns the accuracies of the methods in the two tables of all methods.

  A method's first row in a table counts; '-' stands for no row.
  """
  tables = []
  for name in ('methods_all_005', 'methods_all_03'):
    tables.append({})
    for run, accuracy, *_ in result(name)['rows']:
      method = run.split(':')[0].removeprefix('fed_avg+')
      tables[-1].setdefault(method, accuracy.split()[0])
  return {
    method: ', '.join(table.get(method, '-') for table in tables)
    for method in {**tables[0], **tables[1]}
  }


def _combinations(name: str, page: pathlib.Path) -> str:
  del name, page
  return combinations.table()


def _ftg_presets(name: str, page: pathlib.Path) -> str:
  """Lists the options of FedFTG in which its presets differ."""
  del name, page
  presets = {p: recipes.ftg_options(p)._asdict() for p in recipes.FTG_PRESETS}
  for preset, options in presets.items():
    options['generator_bias'] = recipes.FTG_PRESETS[preset]['generator_bias']
    if preset != 'robust':  # see `configuration.resolve.config`
      options |= dict.fromkeys(('batch_size', 'weight_decay'), "the clients'")

  def cell(value):
    if isinstance(value, bool):
      return 'yes' if value else 'no'
    return f'{value:g}' if isinstance(value, float) else value

  rows = []
  for option, code in presets['official'].items():
    values = [options[option] for options in presets.values()]
    if any(value != code for value in values):
      flag = option if option == 'generator_bias' else flags.FTG + option
      shown = [cell(v) if v == code else f'**{cell(v)}**' for v in values]
      rows.append([f'`--{flag}`', *shown])
  return '\n'.join(markdown(['flag', *(f'`{p}`' for p in presets)], rows))


def _presets(name: str, page: pathlib.Path) -> str:
  """Lists the presets by the comments at their top."""
  del name, page
  rows = []
  for path in sorted(PRESETS.glob('*.flags')):
    lines = [
      line[1:].strip()
      for line in path.read_text().splitlines()
      if line.startswith('#')
    ]
    command, *rest = lines
    program = command.partition('experiments.')[2].partition(' ')[0]
    text, _, measured = ' '.join(rest).partition('Time: ')
    text = text.partition('Expected')[0]  # published.yaml has the figures
    time, _, score = measured.partition('Score: ')
    if len(text) > _LONG:  # its first sentence; the file says more
      text = re.split(r'(?<=\.) (?=[A-Z])', text)[0]
    cells = (_text(cell.strip(' .')) for cell in (text, time, score))
    rows.append([f'`{path.stem}`', f'`{program}`', *cells])
  return '\n'.join(
    markdown(['preset', 'program', 'what', 'time', 'score'], rows)
  )


def _programs(name: str, page: pathlib.Path) -> str:
  del name
  target = os.path.relpath(DOCS / 'programs.md', page.parent)
  rows = [
    [f'[`fedftg {program}`]({target}#fedftg-{program})', what]
    for program, what in programs.NAMES.items()
  ]
  return '\n'.join(markdown(['command', 'what it does'], rows))


def _descriptions(name: str, page: pathlib.Path) -> str:
  del name, page
  by_module = absl_flags.FLAGS.flags_by_module_dict()
  parts = []
  for program in programs.NAMES:
    module = f'fedftg_jax.programs.{program}'
    text = (importlib.import_module(module).__doc__ or '').strip()
    parts.append(f'## fedftg {program}\n\n```text\n{text}\n```')
    own = [flag.name for flag in by_module.get(module, [])]
    if own:
      parts.append('\n'.join(_flags_table(own)))
  return '\n\n'.join(parts)


def _flags(name: str, page: pathlib.Path) -> str:
  """Lists the flags that all programs have but those of single methods."""
  del name, page
  of_methods = {f for m in recipes.RECIPES for f in flags.of_method(m)}
  by_module = absl_flags.FLAGS.flags_by_module_dict()
  sections = {
    **flags.SECTIONS,
    'Several runs': [f.name for f in by_module['fedftg_jax.runs.suite']],
    'Devices and processes': [
      f.name for f in by_module['fedftg_jax.system.devices']
    ],
    'Presets': [f.name for f in by_module['fedftg_jax.system.cli']],
  }
  parts = []
  for title, names in sections.items():
    names = [n for n in names if n not in of_methods]
    if names:
      parts.append(f'## {title}\n\n' + '\n'.join(_flags_table(names)))
  return '\n\n'.join(parts)


PARTS: dict[str, Callable[[str, pathlib.Path], str]] = {
  'table': _table,
  'rows': _rows,
  'measured': _measured,
  'method': _method,
  'methods': _methods,
  'combinations': _combinations,
  'ftg_presets': _ftg_presets,
  'presets': _presets,
  'programs': _programs,
  'descriptions': _descriptions,
  'flags': _flags,
}


def define_flags() -> None:
  """Has the flags of every program defined and parsed, at their defaults."""
  for program in programs.NAMES:
    importlib.import_module(f'fedftg_jax.programs.{program}')
  cli.parse(['docs'])


def stale() -> dict[pathlib.Path, str]:
  """Maps each page that is out of date to the text that it should have."""
  made = {page: updated(page) for page in pages()}
  return {p: text for p, text in made.items() if text != p.read_text()}


def main(argv: list[str]) -> int:
  define_flags()
  found = stale()
  for page, text in found.items():
    print(page.relative_to(ROOT), 'is out of date' if '--check' in argv else '')
    if '--check' not in argv:
      page.write_text(text)
  return int(bool(found) and '--check' in argv)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
