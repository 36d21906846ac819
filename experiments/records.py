"""What a run writes into its folder, and what its rows come to."""

import pathlib
from typing import Any

import numpy as np

from experiments import cli
from experiments import devices
from experiments import files
from experiments import folders
from experiments import plots
from experiments.assembly import Experiment
from fedftg_jax.data import partition
from fedftg_jax.data import schedules

FINAL_ROUNDS = 10  # the final accuracy is the mean over so many last rounds

class Run:
  """What one seed's run writes into its folder."""

  def __init__(self, experiment: Experiment, folder: pathlib.Path, seed: int,
               traffic: tuple[int, int]):
    """`traffic`: bits down and up for one client and round."""
    self._experiment, self._folder, self._seed = experiment, folder, seed
    self._bits_down, self._bits_up = traffic
    self._rows, self._timings = [], []
    self._down = self._up = 0  # bytes so far
    config = {**experiment.config, 'seed': seed}
    folders.claim_folder(folder, config)
    if devices.is_first():
      (folder / 'summary.json').unlink(missing_ok=True)
    with files.replacing(folder / 'partition.npz') as temporary:
      partition.save(temporary, experiment.parts)
    with files.replacing(folder / 'schedule.npz') as temporary:
      schedules.save(temporary, experiment.schedule, len(experiment.parts))

  @property
  def accuracy(self) -> float:
    return self._rows[-1]['test_accuracy']

  @property
  def rounds(self) -> int:
    return self._rows[-1]['round'] if self._rows else 0

  def add(self, done, metrics, scores) -> None:
    """Adds the evaluation after `done` rounds and rewrites metrics.jsonl.

    `metrics` are those of the rounds since the last evaluation.
    """
    if not np.isfinite(scores['broadcast']['loss']):
      raise cli.RunError(
          f'{self._folder}: the model is no longer finite after a round between '
          f'{self.rounds + 1} and {done}; the rows up to round {self.rounds} are '
          'kept. A smaller --learning_rate or --clip_norm may help')
    self._down += int(metrics.pop('num_selected').sum()) * self._bits_down // 8
    self._up += int(metrics.pop('num_arrived').sum()) * self._bits_up // 8
    losses = {k: _number(np.nanmean(v) if np.isfinite(v).any() else np.nan)
              for k, v in metrics.items()}
    self._rows.append({
        'round': done, 'train_loss': losses.pop('train_loss'),
        'test_loss': _number(scores['broadcast']['loss']),
        'test_accuracy': _number(scores['broadcast']['accuracy']),
        'accuracy': {k: _number(v['accuracy']) for k, v in scores.items()},
        'bytes_up': self._up, 'bytes_down': self._down, **losses})
    files.write_jsonl(self._folder / 'metrics.jsonl', self._rows)

  def add_timing(self, timing) -> None:
    self._timings.append(timing)
    files.write_jsonl(self._folder / 'timings.jsonl', self._timings)

  def finish(self, state, clock) -> None:
    """Writes the model, the pictures and, last, the summary."""
    experiment, folder = self._experiment, self._folder
    files.write_tree(folder / 'params.npz', state.variables._asdict())
    if experiment.method.synthesise is not None:
      with files.replacing(folder / 'generated.png') as temporary:
        plots.generated(
            temporary, experiment.method.synthesise, state.shared,
            experiment.dataset.num_classes)
    with files.replacing(folder / 'curves.png') as temporary:
      plots.curves(temporary, {
          name: [[(row['round'], megabytes(row), row['accuracy'][name])
                  for row in self._rows]]
          for name in self._rows[-1]['accuracy']}, 'test accuracy')
    files.write_json(folder / 'summary.json', {
        'method': experiment.config['method'], 'seed': self._seed,
        **summarise(self._rows),
        'bits_down_per_client': self._bits_down,
        'bits_up_per_client': self._bits_up, **clock.total()})


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """The figures of a run, from the rows of its metrics.jsonl."""
  last = rows[-1]
  tail = [r for r in rows if r['round'] > last['round'] - FINAL_ROUNDS]
  validation = {} if 'validation_accuracy' not in last else {
      'final_validation_accuracy': _number(
          np.mean([r['validation_accuracy'] for r in tail]))}
  return {
      'rounds': last['round'],
      'final_accuracy': _number(np.mean([r['test_accuracy'] for r in tail])),
      'best_accuracy': max(r['test_accuracy'] for r in rows),
      'final_accuracy_of': {
          name: _number(np.mean([r['accuracy'][name] for r in tail]))
          for name in last['accuracy']}, **validation,
      'bytes_up': last['bytes_up'], 'bytes_down': last['bytes_down']}


def megabytes(row: dict[str, Any]) -> float:
  """What has been sent, up and down, by a row of metrics.jsonl."""
  return (row['bytes_up'] + row['bytes_down']) / 1e6


def _number(value) -> float | None:
  """A float of six digits, None (JSON's null) if it is not finite."""
  return float(f'{value:.6g}') if np.isfinite(value) else None
