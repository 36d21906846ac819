"""The sentences of a report: what was compared, and what it says."""

import numpy as np

from fedftg_jax.results import rows, statistics, tables


def of_sweep(summary, num_ended) -> str:
  """The best, and what its rank says."""
  best = summary['configurations'][0]
  final = statistics.percent(best['final_accuracy'])
  if summary['sorted_by'] != 'final_accuracy':
    chosen = statistics.percent(best[summary['sorted_by']])
    return (
      f'{best["name"]} ends highest on what is kept apart, at {chosen} %; '
      f'on the test set it has {final} %.'
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
  """How well estimates rank, and whether leaving clients out helps."""
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
  final = rows.summarise(run.rows)['final_accuracy_of']
  last = run.rows[-1]
  text = (
    f'{tables.percent(final["broadcast"])} % test accuracy (mean over the last '
    f'{rows.FINAL_ROUNDS} rounds) after {last["round"]} rounds and '
    f'{rows.megabytes(last):,.0f} MB.'
  )
  if 'fine_tuned' in final:
    gain = 100 * (final['broadcast'] - final['average'])
    text += (
      f" The plain average of the clients' models has "
      f'{tables.percent(final["average"])} %: what the server adds to it is '
      f'worth {gain:+.2f} points.'.replace('-', '−')
    )
  return text


def of_comparison(entries) -> str:
  """Who ends highest, and whether that is more than the spread over seeds."""
  finals = {
    name: tables.final_accuracies(of_name) for name, of_name in entries.items()
  }
  order = sorted(finals, key=lambda name: -np.mean(finals[name]))
  best = finals[order[0]]
  text = f'{order[0]} ends highest, at {tables.mean_text(best)} % test accuracy'
  if len(order) == 1:
    return f'{order[0]} ends at {tables.mean_text(best)} % test accuracy.'
  second = finals[order[1]]
  gap = 100 * (np.mean(best) - np.mean(second))
  text += f', {gap:.2f} points above {order[1]}'
  if len(best) == 1:
    return text + '. One seed each: whether that is chance cannot be said.'
  spread = 100 * max(np.std(best, ddof=1), np.std(second, ddof=1))
  return text + (
    f', {"more" if gap > spread else "no more"} than the spread over '
    f'{len(best)} seeds ({spread:.2f}).'
  )
