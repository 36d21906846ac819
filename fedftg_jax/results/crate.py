"""Provenance: what a folder's files are and where they come from, as RO-Crate.

ro-crate-metadata.json is written by hand after RO-Crate 1.1
(https://w3id.org/ro/crate/1.1) and its profile Process Run Crate 0.5
(https://w3id.org/ro/wfrun/process/0.5): a training is an action with a program,
inputs (the configuration, the data with their fingerprints) and results.
"""

import datetime
import hashlib
import mimetypes
from typing import Any
from urllib import parse

from upath import UPath

from fedftg_jax.results import tables
from fedftg_jax.system import files

NAME = 'ro-crate-metadata.json'
_CONTEXT = [
  'https://w3id.org/ro/crate/1.1/context',
  {'sha256': 'https://w3id.org/ro/terms/workflow-run#sha256'},
]
_CRATE = 'https://w3id.org/ro/crate/1.1'
_PROFILE = 'https://w3id.org/ro/wfrun/process/0.5'
_PAPER = 'https://arxiv.org/abs/2203.09249'  # what the program implements
_LEFT_OUT = ('checkpoints', 'tensorboard')  # folders
# What the files of a run hold, by name.
_ABOUT = {
  'config.json': 'Configuration: all flags that the results depend on',
  'model_input.json': 'Form of the images, classes, fingerprints of the data',
  'metrics.jsonl': 'What each evaluation measured',
  'metrics.csv': 'What each evaluation measured',
  'timings.jsonl': 'Seconds of each stage',
  'classes.json': 'Accuracy on each class, and confusions',
  'clients.json': 'Accuracy of each client',
  'counts.npz': 'Examples of each client and class',
  'partition.npz': 'Which examples each client holds',
  'schedule.npz': 'Which clients take part in each round',
  'params.npz': 'The last model',
  'models.npz': 'Further models that the server keeps',
  'summary.json': 'Figures of the whole',
  'report.html': 'The report',
  'table.md': 'Figures of the whole',
  'curves.png': 'Accuracy over the rounds',
  'generated.npz': 'Generated images over the rounds',
  'images.npz': 'Generated images of each class',
  'nearest.npz': 'Generated images and the nearest real ones',
}
_TYPES = {
  '.jsonl': 'application/jsonlines',
  '.npz': 'application/zip',
  '.md': 'text/markdown',
}


def write(folder: UPath, title: str, verdict: str) -> None:
  """Writes ro-crate-metadata.json into the folder of a run or of several.

  Args:
    folder: with its report.
    title: of the report.
    verdict: a sentence on what came of it.
  """
  files.write_json(folder / NAME, metadata(folder, title, verdict))


def metadata(folder: UPath, title: str, verdict: str) -> dict[str, Any]:
  """Describes a folder; arguments as of `write`.

  Returns:
    The JSON-LD document.
  """
  saved = files.read_json(folder / 'config.json')
  found = [_file(folder, path) for path in _paths(folder)]
  program, environment = _program(saved)
  settings = [
    _value(f'#flag-{parse.quote(name)}', name, tables.text(value))
    for name, value in saved['config'].items()
  ]
  data, figures = _data(folder, saved), _figures(folder)
  done = _time(folder)
  results = [one for one in found if one['@id'] != 'config.json']
  root = {
    '@id': './',
    '@type': 'Dataset',
    'name': title,
    'description': verdict,
    'datePublished': done,
    'license': {'@id': '#license'},
    'conformsTo': {'@id': _PROFILE},
    'hasPart': _references(found),
    'mentions': {'@id': '#training'},
    'variableMeasured': _references(figures),
  }
  action = {
    '@id': '#training',
    '@type': 'CreateAction',
    'name': f'fedftg {saved["config"].get("program", "train")}',
    'description': title,
    'instrument': {'@id': program[0]['@id']},
    'object': [
      {'@id': 'config.json'},
      *_references([*settings, *data, *environment]),
    ],
    'result': _references(results),
    'endTime': done,
  }
  return {
    '@context': _CONTEXT,
    '@graph': [
      {
        '@id': NAME,
        '@type': 'CreativeWork',
        'about': {'@id': './'},
        'conformsTo': {'@id': _CRATE},
      },
      root,
      {'@id': _PROFILE, '@type': 'CreativeWork', 'name': 'Process Run Crate'},
      {
        '@id': '#license',
        '@type': 'CreativeWork',
        'name': 'No licence stated',
        'description': 'Who publishes this folder chooses a licence.',
      },
      action,
      *program,
      *environment,
      *settings,
      *data,
      *figures,
      *found,
    ],
  }


def _program(saved) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """Describes the program with its packages, and what else it ran on."""
  versions, code = saved.get('versions', {}), saved.get('code', {})
  packages = [
    {
      '@id': f'pkg:{"generic" if name == "python" else "pypi"}/{name}@'
      + parse.quote(str(version)),
      '@type': 'SoftwareApplication',
      'name': name,
      'softwareVersion': version,
    }
    for name, version in versions.items()
    if name != 'device'
  ]
  environment = [
    _value(f'#{name}', name, value)
    for name, value in (
      ('device', versions.get('device')),
      ('commit', code.get('commit')),
    )
    if value
  ]
  version = str(code.get('version', 'unknown'))
  program: dict[str, Any] = {
    '@id': f'pkg:generic/fedftg_jax@{parse.quote(version)}',
    '@type': 'SoftwareApplication',
    'name': 'fedftg_jax',
    'softwareVersion': version,
    'url': _PAPER,
    'softwareRequirements': _references(packages),
  }
  if 'commit' in code:
    program['identifier'] = {'@id': '#commit'}
  return [program, *packages], environment


def _data(folder, saved) -> list[dict[str, Any]]:
  """Describes the data by their fingerprints."""
  found = {
    f'#data-{parse.quote(name)}': {
      'name': name,
      'description': f'begins with {digest}',
    }
    for name, digest in saved.get('contents', {}).items()
  }
  for path in _paths(folder):
    if path.name != 'model_input.json':
      continue
    described = files.read_json(path).get('data')
    if not described:  # of an earlier version
      continue
    for split in ('train', 'test'):
      digest = described[split]['sha256']
      found[f'#data-{split}-{digest[:16]}'] = {
        'name': f'{split} split, {described[split]["examples"]} examples',
        'sha256': digest,
      }
  return [
    {'@id': identity, '@type': 'CreativeWork', **about}
    for identity, about in found.items()
  ]


def _figures(folder) -> list[dict[str, Any]]:
  """Describes the final accuracies."""
  path = folder / 'summary.json'
  summary = files.read_json(path) if path.exists() else {}
  accuracies = {'': summary.get('final_accuracy')}
  if 'methods' in summary:
    accuracies = {
      name: figures['final_accuracy']['mean']
      for name, figures in summary['methods'].items()
      if figures
    }
  for row in summary.get('configurations', ()):
    accuracies[row['name']] = row.get('final_accuracy', {}).get('mean')
  return [
    _value(
      f'#final_accuracy-{parse.quote(name)}',
      f'final test accuracy {name}'.strip(),
      value,
    )
    for name, value in accuracies.items()
    if value is not None
  ]


def _paths(folder: UPath) -> list[UPath]:
  """Lists the files of a folder without links, checkpoints and hidden files."""
  found = []
  for path in folder.rglob('*'):
    *places, name = _relative(folder, path).split('/')
    hidden = any(part.startswith('.') for part in (*places, name))
    if hidden or name == NAME or set(places) & set(_LEFT_OUT):
      continue
    if files.is_link(path):
      continue
    if path.is_file():
      found.append(path)
  return sorted(found, key=str)


def _relative(folder, path) -> str:
  return path.path.removeprefix(folder.path).strip('/')


def _file(folder, path) -> dict[str, Any]:
  """Describes a file: its size and, for local files, its digest."""
  kind = _TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0]
  entity = {
    '@id': parse.quote(_relative(folder, path)),
    '@type': 'File',
    'name': path.name,
    'encodingFormat': kind or 'application/octet-stream',
    'contentSize': str(path.stat().st_size),
  }
  if path.name in _ABOUT:
    entity['description'] = _ABOUT[path.name]
  if files.is_local(path):
    with path.open('rb') as file:
      entity['sha256'] = hashlib.file_digest(file, 'sha256').hexdigest()
  return entity


def _time(folder) -> str:
  """Returns when the last figures were written; now if that is unknown."""
  try:
    seconds = (folder / 'summary.json').stat().st_mtime
  except (OSError, AttributeError, TypeError):
    return _iso(datetime.datetime.now(datetime.UTC))
  return _iso(datetime.datetime.fromtimestamp(seconds, datetime.UTC))


def _iso(time: datetime.datetime) -> str:
  return time.isoformat(timespec='seconds')


def _references(entities) -> list[dict[str, str]]:
  return [{'@id': entity['@id']} for entity in entities]


def _value(identity: str, name: str, value: Any) -> dict[str, Any]:
  return {
    '@id': identity,
    '@type': 'PropertyValue',
    'name': name,
    'value': value,
  }
