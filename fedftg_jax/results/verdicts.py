"""The sentences of a report: what came of it, and what can be concluded."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedftg_jax.configuration import flags
from fedftg_jax.results import rows, statistics, tables


def of_sweep(summary, num_ended) -> str:
  """Names the best configuration, and says what it was chosen on."""
  best = summary['configurations'][0]
  final = statistics.percent(best['final_accuracy'])
  if summary['sorted_by'] != 'final_accuracy':
    chosen = statistics.percent(best[summary['sorted_by']])
    return (
      f'{best["name"]} ends highest on the validation data, at {chosen} %. '
      f'On the test set it has {final} %.'
    )
  text = f'{best["name"]} ends highest, at {final} % test accuracy.'
  return (
    text
    if num_ended == 1
    else (
      f'{text} It was chosen on the test set, as the best of {num_ended}, '
      'which flatters it; --validation_share keeps data apart to choose on.'
    )
  )


def of_influence(summary) -> str:
  """Says how well estimates rank, and whether leaving clients out helps."""
  sentences = []
  ranked = {
    name: found['spearman']
    for name, found in summary.get('fil', {}).items()
    if found['spearman'] is not None
  }
  if ranked:
    best = max(ranked, key=lambda name: ranked[name])
    sentences.append(
      f'{best} ranks the clients as retraining without each of them does, with '
      f'a rank correlation of {ranked[best]:.2f}.'
    )
  areas = {
    name: found['mean']
    for name, found in summary.get('auc', {}).items()
    if found['mean'] is not None
  }
  if areas:
    best = max(areas, key=lambda name: areas[name])
    sentences.append(
      f'Clients with wrong labels are found best by {best}: area under the ROC '
      f'curve {areas[best]:.2f}.'
    )
  if 'cleansing' in summary:
    before, *others = summary['cleansing'].items()
    best, after = max(
      others, key=lambda item: item[1]['final_accuracy']['mean']
    )
    gain = 100 * (
      after['final_accuracy']['mean'] - before[1]['final_accuracy']['mean']
    )
    sentences.append(
      f'Without the worst by {best} the model ends {abs(gain):.2f} points '
      f'{"higher" if gain > 0 else "lower"} than with all clients.'
    )
  return ' '.join(sentences) or (
    f'What {len(summary["clients"])} clients contribute, estimated by '
    + ', '.join(summary['scores'])
    + '.'
  )


def of_run(run) -> str:
  """Says what accuracy a run ends at, and what the server step adds."""
  final = rows.summarise(run.rows)['final_accuracy_of']
  last = run.rows[-1]
  num = sum(r['round'] > last['round'] - rows.FINAL_ROUNDS for r in run.rows)
  text = (
    f'{tables.percent(final["broadcast"])} % test accuracy (mean of the '
    f'{num} evaluations in the last {rows.FINAL_ROUNDS} rounds) after '
    f'{last["round"]} rounds and '
    f'{rows.megabytes(last):,.0f} MB.'
  )
  if 'fine_tuned' in final:
    gain = tables.points(final['broadcast'] - final['average'])
    text += (
      " The plain average of the clients' models has "
      f'{tables.percent(final["average"])} %, so the server step changes it by '
      f'{gain} points.'
    )
  return text


def of_comparison(entries: tables.Entries) -> str:
  """Names the method that ends highest, and the next one."""
  finals = {
    name: tables.final_accuracies(of_name) for name, of_name in entries.items()
  }
  first, *others = sorted(finals, key=lambda name: -np.mean(finals[name]))
  best = f'at {tables.mean_text(finals[first])} % test accuracy'
  if not others:
    return f'{first} ends {best}.'
  gap = 100 * (np.mean(finals[first]) - np.mean(finals[others[0]]))
  return f'{first} ends highest, {best}, {gap:.2f} points above {others[0]}.'


def conclusion(
  finals: Mapping[str, Sequence[float]], configs: Sequence[Mapping[str, Any]]
) -> str:
  """Says which differences from the first method are shown, and which are not.

  Args:
    finals: by method the final accuracies of all seeds, in the same order.
    configs: the configurations of all runs.

  Returns:
    A few sentences; '' for a single method.
  """
  base, *others = finals
  num = len(finals[base])
  if not others:
    return ''
  if num == 1:
    return (
      'Nothing can be concluded from one seed: the differences may be chance. '
      f'--seeds={statistics.exact_seeds(len(others))} or more allow an exact '
      'test.'
    )
  tests = statistics.against(finals)
  found: dict[str, list[str]] = {'higher': [], 'lower': [], '': []}
  for name, test in tests.items():
    shown = test.adjusted < statistics.LEVEL
    side = ('higher' if test.mean > 0 else 'lower') if shown else ''
    found[side].append(
      f'{name} ({tables.points(test.mean)} points, {_p(test.adjusted)})'
    )
  said = [
    f'{_and(names)} {"ends" if len(names) == 1 else "end"} {side}'
    for side, names in found.items()
    if names and side
  ]
  if found['']:
    said.append(
      f'for {_and(found[""])} no difference is shown, which does not mean that '
      'there is none'
    )
  return ' '.join(
    (
      f'Compared with {base} over {num} seeds, {"; ".join(said)}.',
      _method(num, len(others)),
      _scope(configs),
    )
  )


def _method(num_seeds: int, num_tests: int) -> str:
  enough = statistics.exact_seeds(num_tests)
  exact = num_seeds >= enough
  text = 'Exact sign-flip test' if exact else 'Paired t test'
  text += f'{"s" if num_tests > 1 else ""}, two-sided, at the 5 % level'
  if num_tests > 1:
    text += (
      f', corrected after Holm for {num_tests} comparisons; other pairs were '
      'not tested'
    )
  if exact:
    return text + '.'
  return (
    f'{text}. With fewer than {enough} seeds this takes the differences to be '
    'normally distributed.'
  )


def _scope(configs: Sequence[Mapping[str, Any]]) -> str:
  """Says which of partition and schedule all seeds share.

  A given one is shared, since its flags have no seed.
  """
  drawn = {
    name
    for name in ('partition', 'schedule')
    if _is_drawn(configs[0], name)
    and len({config[f'{name}_seed'] for config in configs}) > 1
  }
  if drawn == {'partition', 'schedule'}:
    return 'Each seed has a partition and a schedule of its own.'
  if drawn:
    (own,) = drawn
    (shared,) = {'partition', 'schedule'} - drawn
    return (
      f'Each seed has a {own} of its own. All seeds share one {shared}, so it '
      'holds for this one.'
    )
  return (
    'All seeds share one partition and one schedule, so it holds for these; '
    '--vary_partition draws others.'
  )


def _is_drawn(config: Mapping[str, Any], name: str) -> bool:
  return f'{name}_seed' in config and not flags.is_given(config[name])


def _p(value: float) -> str:
  return 'p < 0.001' if value < 0.001 else f'p = {value:.2g}'


def _and(names: Sequence[str]) -> str:
  *first, last = names
  return f'{", ".join(first)} and {last}' if first else last
