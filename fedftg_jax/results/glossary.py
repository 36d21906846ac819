"""Explains the numbers of a report: meaning, unit and direction.

`METRICS` has what runs measure round by round, by the names that metrics.jsonl
gives them; `TERMS` has what tables say besides. A method that measures
something new is described here.
"""

from collections.abc import Iterable
from typing import NamedTuple

HIGHER, LOWER = 'higher is better', 'lower is better'


class Meaning(NamedTuple):
  """The meaning of a number.

  Attributes:
    text: in a sentence or two.
    unit: such as 'percent'; '' for a plain number.
    better: `HIGHER`, `LOWER`, or '' where neither is better.
  """

  text: str
  unit: str = ''
  better: str = ''

  def __str__(self) -> str:
    """Returns the text with unit and direction."""
    aside = '; '.join(filter(None, (self.unit, self.better)))
    return f'{self.text.removesuffix(".")} ({aside}).' if aside else self.text


def of_metric(name: str) -> Meaning:
  """Returns the meaning of a metric; of an unknown one, its owner."""
  owner, _, _ = name.rpartition('/')
  return METRICS.get(
    name, Meaning(f'Measured by {owner or "the method"}; not described here.')
  )


def of_terms(names: Iterable[str]) -> dict[str, Meaning]:
  """Returns the meanings of these terms, in the order of `TERMS`."""
  wanted = set(names)
  return {name: of for name, of in TERMS.items() if name in wanted}


TERMS = {
  'final': Meaning(
    'Accuracy on the whole test set, as the mean over the evaluations of the '
    'last ten rounds.',
    'percent',
    HIGHER,
  ),
  'best': Meaning(
    'The highest accuracy of any evaluation. It is chosen on the test set, so '
    'it flatters the model.',
    'percent',
    HIGHER,
  ),
  'plain average': Meaning(
    "Final accuracy of the plain average of the clients' models, before the "
    'server changes it.',
    'percent',
    HIGHER,
  ),
  'on validation data': Meaning(
    'Final accuracy on the examples that --validation_share keeps out of '
    'training.',
    'percent',
    HIGHER,
  ),
  'seed': Meaning(
    'The number that the initial model, the batches and all other random '
    'draws of a run come from.'
  ),
  'difference': Meaning(
    "A method's final accuracy less that of the first method, mean over seeds; "
    'both are compared seed by seed.',
    'points',
    HIGHER,
  ),
  '95 % interval': Meaning(
    'Confidence interval of the difference, by Student’s t. It takes the '
    'differences to be normally distributed.',
    'points',
  ),
  'p': Meaning(
    'How likely so large a difference is if the two methods are equally good. '
    'By the exact sign-flip test if there are enough seeds for it (6 for one '
    'comparison, 7 for two), else by a paired t test; two-sided.',
    'probability',
  ),
  'p, corrected': Meaning(
    'The same after Holm’s correction for the number of comparisons. Below '
    '0.05 is called a difference.',
    'probability',
  ),
  'megabytes': Meaning(
    'What the server has sent to the clients and the clients to the server, '
    'since the beginning.',
    '10^6 bytes',
    LOWER,
  ),
  'seconds': Meaning(
    'Time of training since the beginning, without compiling and evaluating. '
    'It depends on the machine and on what else ran there.',
    'seconds',
    LOWER,
  ),
  'Pareto front': Meaning(
    'The evaluations that no other one beats at the same or a lower cost.'
  ),
  'rounds to a target': Meaning(
    'The first evaluated round at this accuracy.', 'rounds', LOWER
  ),
  'worst 10 %': Meaning(
    'Mean accuracy of the tenth of the clients with the lowest accuracy.',
    'percent',
    HIGHER,
  ),
  'best 10 %': Meaning(
    'Mean accuracy of the tenth of the clients with the highest accuracy.',
    'percent',
    HIGHER,
  ),
  'variance': Meaning(
    'Variance of the accuracy over clients.', 'percent squared', LOWER
  ),
  'Jain index': Meaning(
    'Jain’s index of fairness: 1 if all clients have the same accuracy, 1/N if '
    'one of N has all.',
    '0 to 1',
    HIGHER,
  ),
  'clients': Meaning('How many clients have test examples.'),
  'own classes': Meaning(
    'Accuracy on the test set, each class weighted by its share in the '
    'client’s training data.',
    'percent',
    HIGHER,
  ),
  'other classes': Meaning(
    'Accuracy on the test set, classes weighted by what the client’s training '
    'data lack of them.',
    'percent',
    HIGHER,
  ),
  'personalised': Meaning(
    'The broadcast model after one more local training by the client.'
  ),
  'accuracy of a class': Meaning(
    'Share of the test examples of the class that the model classifies '
    'correctly (recall).',
    'percent',
    HIGHER,
  ),
  'confusion': Meaning(
    'Of the test examples of one class (a row), the share that is classified '
    'as each class (a column). Correct ones are on the diagonal.',
    'percent of the row',
  ),
  'largest eigenvalue': Meaning(
    'Of the Hessian of the loss: the curvature in the steepest direction.',
    '',
    LOWER,
  ),
  'trace': Meaning(
    'Of the Hessian of the loss: the sum of the curvatures in all directions.',
    '',
    LOWER,
  ),
  'H_N': Meaning(
    'Mean squared difference of the clients’ curvatures (FedAlign).', '', LOWER
  ),
  'H_D': Meaning(
    'Mean cosine of the clients’ curvatures (FedAlign).', '-1 to 1', HIGHER
  ),
  'rounds per s': Meaning(
    'Rounds in a second of training, without compiling and evaluating.',
    '',
    HIGHER,
  ),
}

_RECOGNISED = {
  'recognised': Meaning(
    'Probability that the ensemble of the clients’ models gives a generated '
    'image its label.',
    'probability',
    HIGHER,
  ),
  'ensemble_ce': Meaning(
    'Cross-entropy of the ensemble with the labels of the generated images.',
    'nats',
    LOWER,
  ),
  'ensemble_entropy': Meaning(
    'Entropy of the ensemble’s answer to a generated image: 0 if it is sure.',
    'nats',
  ),
  'gap': Meaning(
    'Kullback-Leibler divergence of the student from the ensemble, before the '
    'student’s steps: what it can learn from the images.',
    'nats',
  ),
  'gap_left': Meaning(
    'The same divergence after the student’s steps: what it has not learned.',
    'nats',
    LOWER,
  ),
  'moved': Meaning(
    'How far the server step moves the parameters, as a share of their norm.'
  ),
  'stats_moved': Meaning(
    'How far the server step moves the BatchNorm statistics, as a share of '
    'their norm.'
  ),
}
_GENERATOR = {
  'cls': Meaning(
    'Generator’s fidelity loss: cross-entropy of the clients’ models with the '
    'labels of the images.',
    'nats',
    LOWER,
  ),
  'dis': Meaning(
    'Generator’s diversity loss: 1 if all images are alike, smaller if they '
    'differ.',
    '0 to 1',
    LOWER,
  ),
}
_ZERO_SHOT = {
  'cross_entropy': Meaning(
    'Cross-entropy of the model with the labels of the images that are made '
    'of it.',
    'nats',
    LOWER,
  ),
  'gap': Meaning(
    'Difference between the BatchNorm statistics of these images and those '
    'that the model keeps.',
    '',
    LOWER,
  ),
}

METRICS = {
  'train_loss': Meaning(
    'Cross-entropy during local training, mean over the clients’ examples and '
    'steps.',
    'nats',
    LOWER,
  ),
  'test_loss': Meaning(
    'Cross-entropy of the broadcast model on the test set.', 'nats', LOWER
  ),
  **{f'fed_ftg/{name}': of for name, of in _GENERATOR.items()},
  'fed_ftg/md': Meaning(
    'Generator’s discrepancy loss: minus the difference between student and '
    'clients’ models. The lower, the harder the images are for the student.'
  ),
  'fed_ftg/student': Meaning(
    'Loss of the student against the ensemble on generated images.', '', LOWER
  ),
  **{f'fed_ftg/{name}': of for name, of in _RECOGNISED.items()},
  **{f'fed_df/{name}': of for name, of in _GENERATOR.items()},
  'fed_df/student': Meaning(
    'Loss of the student against the ensemble of the clients’ models.',
    '',
    LOWER,
  ),
  'fed_gen/teacher': Meaning(
    'Cross-entropy of the clients’ last layers with the labels of generated '
    'features.',
    'nats',
    LOWER,
  ),
  'fed_gen/diversity': Meaning(
    'Generator’s diversity loss: 1 if all features are alike.', '0 to 1', LOWER
  ),
  'fed_gen/student': Meaning(
    'Difference between the server’s and the clients’ answers to generated '
    'features, which the generator raises.'
  ),
  **{f'fed_zdac/{name}': of for name, of in _ZERO_SHOT.items()},
  **{f'fed_zdas/{name}': of for name, of in _ZERO_SHOT.items()},
  'fed_zdas/tuning': Meaning(
    'Loss of the model on these images while the server trains it.',
    'nats',
    LOWER,
  ),
  'fed_dm/matching': Meaning(
    'Distance of the synthetic images’ features from those of the clients’ '
    'real images.',
    '',
    LOWER,
  ),
  'fed_dm/images': Meaning(
    'Synthetic images that the server receives in a round.', 'images'
  ),
  'fed_dm/server_loss': Meaning(
    'Cross-entropy of the server’s model on the synthetic images.',
    'nats',
    LOWER,
  ),
  'fed_mr/spread': Meaning(
    'Squared distance of the models that are kept from their mean.'
  ),
  'kd_lwof/own_train_loss': Meaning(
    'Cross-entropy of the clients’ own models during local training.',
    'nats',
    LOWER,
  ),
  'dp/epsilon': Meaning(
    'Privacy spent so far: epsilon of (epsilon, delta) differential privacy, '
    'with the delta of --dp_delta.',
    '',
    LOWER,
  ),
  'dp/clip': Meaning('Largest norm of a client’s change that is not cut.'),
  'dp/clipped': Meaning('Share of the clients whose change is cut.', '0 to 1'),
  'uplink/rate': Meaning(
    'Length of a client’s message for each parameter, as billed.', 'bits', LOWER
  ),
  'uplink/rate_elias': Meaning(
    'The same if the entries are coded by Elias’ gamma code.', 'bits', LOWER
  ),
  'uplink/distortion': Meaning(
    'Squared error of the coded change, as a share of its squared norm.',
    '',
    LOWER,
  ),
  'influence/size': Meaning(
    'Length of the estimated change of the model without a client, as a share '
    'of the model’s norm; mean over the tracked clients.'
  ),
  'influence/truncated': Meaning(
    'Share of the arrays of parameters that are truncated.', '0 to 1'
  ),
}
