"""The flags that all programs have."""

from collections.abc import Callable
import functools
import inspect
import re
import typing
from typing import Any

from absl import flags

from fedftg_jax import federation, models, recipes, uplinks
from fedftg_jax.data import augment, partition
from fedftg_jax.methods import batch_norm
from fedftg_jax.models import convolution, layers

CLIENT_STATES = ('device', 'host', 'disk')
CURVATURES = (
  'exact',
  'blocks',
  'lwet',
  'fisher',
  'first_order',
  'none',
  'retraining',
)
PRECISIONS = ('default', 'highest', 'bfloat16')
# By kind: the function of `partition`, and by flag the argument that it gives;
# None where the parts are there already.
PARTITIONS: dict[str, tuple[Callable | None, dict[str, str]]] = {
  'dirichlet': (
    partition.dirichlet,
    {'dirichlet_alpha': 'alpha', 'size_sigma': 'sigma'},
  ),
  'dirichlet_class': (
    partition.dirichlet_class,
    {
      'dirichlet_alpha': 'alpha',
      'min_size': 'min_size',
      'niid_bench': 'niid_bench',
    },
  ),
  'iid': (partition.iid, {'size_sigma': 'sigma'}),
  'quantity': (
    partition.quantity,
    {'size_sigma': 'sigma', 'size_power': 'power', 'min_size': 'min_size'},
  ),
  'shards': (partition.shards, {'shards_per_client': 'shards_per_client'}),
  'classes': (
    partition.classes,
    {'classes_per_client': 'classes_per_client', 'niid_bench': 'niid_bench'},
  ),
  'natural': (None, {}),
  'file:PATH': (None, {}),
}
SCHEDULES = ('exact', 'bernoulli', 'poisson', 'file:PATH')
FTG = 'ftg_'
# Options whose default is another flag's value: that of their own flag, and
# which other one.
_ELSEWHERE: dict[str, tuple[Any, str]] = {
  'batch_size': (0, '0 for --batch_size.'),
  'weight_decay': (
    None,
    'Default: 0 with --ftg_preset=robust, else --weight_decay (code). '
    '--prox_to_zero adds --prox_mu.',
  ),
}
EVALUATE_CLIENTS = ('none', 'final', 'every')
SECTIONS: dict[
  str, list[str]
] = {}  # titles in --help, and the flags under them


def of_method(method: str) -> dict[str, str]:
  """The options of a method by the names of their flags."""
  recipe = recipes.RECIPES[method]
  return {recipe.prefix + name: name for name in recipe.options}


def is_given(kind: str) -> bool:
  """Tells whether a partition is there already, with its number of clients."""
  return kind == 'natural' or kind.startswith('file:')


def _define() -> None:
  """Defines all, and remembers what each is about."""
  for title, define in (
    ('Data', _define_data),
    ('Partition', _define_partition),
    ('Federation', _define_federation),
    ('Privacy', _define_privacy),
    ('Uplink', _define_uplink),
    ('Model and local training', _define_training),
    ('Single methods', _define_methods),
    ('FedFTG', functools.partial(_define_options, 'fed_ftg')),
    ('Influence of clients', _define_influence),
    ('Evaluation and results', _define_results),
  ):
    before = set(flags.FLAGS)
    define()
    SECTIONS[title] = [name for name in flags.FLAGS if name not in before]


def _define_data() -> None:
  """What is learned from, and who holds it."""
  flags.DEFINE_string(
    'dataset',
    'mnist5k',
    'Data set: mnist5k (5,000 real MNIST images that come '
    'with a Python package); mnist, fashion_mnist, kmnist, emnist/*, cifar10 '
    'or cifar100, prepared here from their original files; another '
    'image-classification set of TensorFlow Datasets that is prepared already; '
    'folder:PATH, with images in train/CLASS/ and test/CLASS/; or npz:PATH, an '
    '.npz with train_x, train_y, test_x, test_y (images NHWC, uint8 or '
    'float32) and perhaps train_client_id.',
  )
  flags.DEFINE_string(
    'public_data',
    '',
    'Unlabelled images on the server, for fed_df_public: '
    'train:NUM (taken from the training set before it is shared out) or '
    "npz:PATH (an .npz with x, images like the data set's).",
  )
  flags.DEFINE_string(
    'data_dir',
    None,
    'Where prepared data sets are kept; default: that of '
    'TensorFlow Datasets (~/tensorflow_datasets).',
  )
  flags.DEFINE_string(
    'manual_dir',
    None,
    'Folder with the original files of the data set, as '
    'published, from which it is prepared; default: downloads/manual in '
    '--data_dir, and where a Debian package puts them.',
  )
  flags.DEFINE_integer(
    'train_examples',
    0,
    'So many training examples, of each class the same '
    'share, instead of all; 0 for all.',
    lower_bound=0,
  )
  flags.DEFINE_integer(
    'num_classes',
    0,
    'Number of classes; 0 for one more than the largest training label.',
    lower_bound=0,
    upper_bound=2**20,
  )
  flags.DEFINE_float(
    'validation_share',
    0.0,
    'Share of the training set that is kept apart, the '
    'same of each class, and evaluated beside the test set.',
    lower_bound=0,
  )
  flags.DEFINE_float(
    'client_test_share',
    0.0,
    'Each client keeps this share of its examples as a test set of its own, '
    'drawn at random; the test set is then that of all clients together, '
    'instead of the published one. 0 for the published one.',
    lower_bound=0,
  )
  flags.DEFINE_bool(
    'merge_test',
    False,
    'The published test set is merged into the training set before anything '
    'is kept apart or shared out; needs --client_test_share.',
  )
  flags.DEFINE_enum(
    'augment',
    'none',
    augment.KINDS,
    'Augmentation of training images: '
    'flip_crop mirrors with probability 1/2 and, with probability 1/2, pads by '
    '4 and crops.',
  )


def _define_partition() -> None:
  """Who holds what."""
  flags.DEFINE_string(
    'partition',
    'dirichlet',
    'Who holds what: dirichlet (class proportions of '
    'each client), dirichlet_class (client proportions of each class), iid, '
    'quantity (unequal sizes), shards (of examples sorted by class), classes '
    '(exactly --classes_per_client each), natural (as the data say), or '
    'file:PATH (an .npz with one index array per client, such as the '
    'partition.npz that every run writes).',
  )
  flags.DEFINE_float(
    'dirichlet_alpha',
    0.1,
    'Concentration of the Dirichlet partitions: the '
    'smaller, the fewer classes a client has.',
  )
  flags.DEFINE_float(
    'size_sigma',
    0.0,
    'dirichlet, iid, quantity: lognormal spread of the client '
    'sizes; 0 for equal ones.',
    lower_bound=0,
  )
  flags.DEFINE_float(
    'size_power',
    0.0,
    'quantity: exponent of a power law of the client sizes.',
    lower_bound=0,
  )
  flags.DEFINE_integer(
    'min_size',
    1,
    'dirichlet_class, quantity: examples that each client has at least.',
    lower_bound=0,
  )
  flags.DEFINE_integer(
    'shards_per_client', 2, 'shards: how many each client has.', lower_bound=1
  )
  flags.DEFINE_integer(
    'classes_per_client', 2, 'classes: how many each client has.', lower_bound=1
  )
  flags.DEFINE_bool(
    'niid_bench',
    False,
    "dirichlet_class, classes: draw as NIID-Bench's code does (also Flower's "
    'baseline and PFLlib). dirichlet_class: a client that holds its even share '
    'gets none of the classes that follow, and all is drawn again until each '
    'client has --min_size examples. classes: each client draws its classes by '
    'itself.',
  )
  flags.DEFINE_integer(
    'partition_seed',
    0,
    'Seed of the partition, and of what is kept apart for validation or tests.',
    lower_bound=0,
    upper_bound=2**31 - 1,
  )
  flags.DEFINE_string(
    'flip_labels',
    '',
    'SHARE,CLIENTS: so many clients, drawn by --partition_seed, train on '
    'labels of which this share is wrong, each another class, drawn uniformly. '
    'Who holds what goes by the true ones.',
  )


def _define_federation() -> None:
  """Who takes part, and what the server does."""
  flags.DEFINE_integer('num_clients', 20, 'Number of clients.', lower_bound=1)
  flags.DEFINE_integer(
    'cohort',
    5,
    'Clients per round (on average, with --schedule=bernoulli or poisson).',
    lower_bound=1,
  )
  flags.DEFINE_string(
    'schedule',
    'exact',
    'Participation: exact (always --cohort clients), '
    'bernoulli (each client on its own, never none), poisson (each client on '
    'its own, perhaps none), or file:PATH (.npy of '
    'client ids [rounds, cohort], -1 for padding, or the schedule.npz that '
    'every run writes, with dropouts and stragglers).',
  )
  flags.DEFINE_integer(
    'schedule_seed',
    0,
    'Seed of the participation.',
    lower_bound=0,
    upper_bound=2**31 - 1,
  )
  flags.DEFINE_float(
    'dropout_rate',
    0.0,
    'Share of the selected clients that do not arrive.',
    lower_bound=0,
    upper_bound=1,
  )
  flags.DEFINE_bool(
    'dropout_after_work',
    False,
    'Clients that drop out have trained all the same, and keep what they '
    'learnt for themselves (control variates, previous models).',
  )
  flags.DEFINE_bool(
    'train_all',
    False,
    'All clients train in every round and keep what they learn for themselves, '
    "as in pFedMe's code; only the selected ones send it. Takes --num_clients "
    '/ --cohort times as long.',
  )
  flags.DEFINE_float(
    'straggler_rate',
    0.0,
    'Share of the selected clients that do only some of '
    'their local steps, a number drawn anew each time.',
    lower_bound=0,
    upper_bound=1,
  )
  flags.DEFINE_float(
    'min_availability',
    1.0,
    'Each client can be reached with a probability of '
    'its own, drawn once between this and 1.',
    lower_bound=0,
    upper_bound=1,
  )
  flags.DEFINE_string(
    'leave_out',
    '',
    'Clients that never take part, as ids with commas between them: a cohort '
    'that has one goes on without it.',
  )
  flags.DEFINE_integer('rounds', 30, 'Communication rounds.', lower_bound=1)
  flags.DEFINE_integer(
    'num_devices',
    None,
    'Devices that share the clients of a round, 0 for all; '
    'default: one on a CPU, else all.',
    lower_bound=0,
  )
  flags.DEFINE_integer(
    'client_chunk',
    None,
    'Clients stacked at once, 0 for all; default: 1 on a CPU, else all.',
    lower_bound=0,
  )
  flags.DEFINE_enum(
    'client_state',
    'device',
    CLIENT_STATES,
    'Where what clients keep between '
    "rounds lies: on the device, in the host's memory, or in files of the "
    "run's folder (disk) that are mapped into it; off the device only the "
    'clients of the coming --eval_every rounds are on it.',
  )
  known = '; '.join(f'{k}: {r.help}' for k, r in recipes.RECIPES.items())
  flags.DEFINE_string(
    'method', 'fed_ftg', 'A method, or several joined with +. ' + known
  )
  flags.DEFINE_enum(
    'weighting',
    None,
    federation.WEIGHTINGS,
    "How clients count in the mean; default: the method's own.",
  )
  flags.DEFINE_enum(
    'server_optimizer',
    'sgd',
    list(recipes.SERVER_OPTIMIZERS),
    "Optimiser on the mean of the clients' changes; sgd with rate "
    '1 is FedAvg, adam FedAdam, momentum (0.9) FedAvgM.',
  )
  rates = ', '.join(
    f'{k} {rate:g}' for k, (_, rate) in recipes.SERVER_OPTIMIZERS.items()
  )
  flags.DEFINE_float(
    'server_learning_rate', None, f'Of the server optimiser; default: {rates}.'
  )
  flags.DEFINE_float(
    'server_eps_root',
    0.0,
    'adam: added under its root, whose derivative is else 0 / 0 where a mean '
    'change is 0: for forward mode through a round.',
    lower_bound=0,
  )


def _define_privacy() -> None:
  """What the server may learn of a client; of fed_avg and local parts."""
  flags.DEFINE_float(
    'dp_clip',
    0.0,
    "Largest norm of a client's change of the model; 0 for no bound.",
    lower_bound=0,
  )
  flags.DEFINE_float(
    'dp_noise',
    0.0,
    'Deviation of the Gaussian noise on the sum of changes over --dp_clip; 0 '
    'for none. Needs --schedule=poisson.',
    lower_bound=0,
  )
  flags.DEFINE_float(
    'dp_delta',
    1e-5,
    'Delta of the (epsilon, delta) differential privacy that metrics say.',
  )
  flags.DEFINE_float(
    'dp_quantile',
    0.0,
    'Share of clients that --dp_clip is moved to leave as they are; 0 to keep '
    'it as it is.',
    lower_bound=0,
  )
  flags.DEFINE_bool(
    'secure_aggregation',
    False,
    'The server sees sums only: changes are sent masked, in fixed point.',
  )


def _define_uplink() -> None:
  """What becomes of the models that clients send."""
  known = '; '.join(f'{name}: {text}' for name, text in uplinks.HELP.items())
  flags.DEFINE_enum(
    'uplink',
    'none',
    list(uplinks.HELP),
    f"How clients' changes of the model are coded. {known}.",
  )
  flags.DEFINE_float(
    'uplink_rate', 2.0, 'Bits per parameter, of every --uplink but none.'
  )
  flags.DEFINE_enum(
    'uplink_lattice',
    'a2',
    list(uplinks.LATTICES),
    "uveqfed: the lattice; a2, the hexagonal one, is the paper's.",
  )


def _define_training() -> None:
  """The model and the clients' local training."""
  flags.DEFINE_enum('model', 'lenet', list(models.CLASSIFIERS), 'Classifier.')
  flags.DEFINE_enum(
    'norm',
    None,
    layers.NORMS,
    'Normalisation after the '
    'convolutions; default: batch for resnet*, vgg11 and fedgen_cnn, '
    'instance for convnet, else none.',
  )
  flags.DEFINE_enum(
    'batch_norm',
    'aggregate',
    batch_norm.POLICIES,
    'BatchNorm '
    'statistics: aggregate (averaged with the model), local '
    '(each client keeps its own), or reset (a client estimates '
    'them on its data before it trains).',
  )
  flags.DEFINE_bool(
    'torch_bn', True, "Running variances are unbiased, as PyTorch's."
  )
  flags.DEFINE_integer(
    'projection_dim',
    0,
    'Width of a projection head in front '
    "of the last layer (MOON's paper: 256); 0 for none.",
    lower_bound=0,
  )
  flags.DEFINE_enum(
    'conv',
    None,
    convolution.IMPLEMENTATIONS,
    'How convolutions '
    'are computed; the results agree. Default: winograd on a '
    'CPU, else matmul.',
  )
  flags.DEFINE_enum(
    'precision',
    'default',
    PRECISIONS,
    'default: float32, with '
    'the matrix products that the device is made for (TF32 on a '
    'recent GPU, bfloat16 on a TPU); highest: float32 products; '
    'bfloat16: layers compute in it, while weights, sums, norms, '
    'last layer and losses stay float32.',
  )
  flags.DEFINE_integer(
    'local_epochs', 5, 'Epochs per client and round.', lower_bound=1
  )
  flags.DEFINE_integer(
    'local_steps',
    0,
    'Steps per client and round instead of epochs; 0 for epochs.',
    lower_bound=0,
  )
  flags.DEFINE_integer(
    'batch_size', 50, 'Examples per local step.', lower_bound=1
  )
  flags.DEFINE_float('learning_rate', 0.1, 'Of local SGD.', lower_bound=0)
  flags.DEFINE_float(
    'momentum', 0.0, 'Heavy ball of local SGD; 0 for none.', lower_bound=0
  )
  flags.DEFINE_bool('nesterov', False, "Nesterov's momentum in its place.")
  flags.DEFINE_bool(
    'keep_momentum',
    False,
    'Clients keep their momentum from round to round, instead of beginning '
    'each without; needs memory for one model per client.',
  )
  flags.DEFINE_float(
    'lr_decay',
    0.998,
    'Factor of all learning rates per round.',
    lower_bound=0,
    upper_bound=1,
  )
  flags.DEFINE_float(
    'weight_decay',
    1e-3,
    'Of local SGD, of students on the '
    "server (but see --ftg_weight_decay), and of FedDF's "
    'generator.',
    lower_bound=0,
  )
  flags.DEFINE_float(
    'clip_norm',
    10.0,
    'Largest norm of a local gradient, before weight decay; 0 for no clip.',
    lower_bound=0,
  )


def _define_methods() -> None:
  """The flags of single methods, but for FedFTG's."""
  for name in recipes.RECIPES:
    if name != 'fed_ftg':
      _define_options(name)
  flags.DEFINE_integer(
    'generator_width',
    16,
    "Channels of the generator's last block (64 in FedFTG's official code).",
    lower_bound=1,
  )
  flags.DEFINE_integer(
    'noise_dim', 100, "Length of the generator's noise.", lower_bound=1
  )
  flags.DEFINE_bool(
    'generator_bias',
    None,
    "Biases in front of the generator's "
    "BatchNorms, as in FedFTG's official code; they do nothing but "
    "take part in Adam's rounding. Default: --ftg_preset's (no in "
    'intended and robust, else yes).',
  )


def _described(documented: Any) -> dict[str, str]:
  """The texts of a docstring's arguments or attributes, by name."""
  found = re.findall(
    r'^ {2}(\w+): (.*?)(?=^ {0,2}\S|\Z)',
    inspect.cleandoc(documented.__doc__ or ''),
    re.M | re.S,
  )
  return {name: ' '.join(text.split()) for name, text in found}


def _define_options(method: str) -> None:
  """Defines a flag for each option of a method that has none yet.

  Where one option is a preset, the default of the others is the preset's.
  """
  recipe = recipes.RECIPES[method]
  help_of = _described(recipe.function) | _described(recipe.fields)
  for name, option in recipe.options.items():
    flag = recipe.prefix + name
    if flag in flags.FLAGS:
      continue
    parts = {'preset': recipes.FTG_PRESETS, **recipes.PARTS}.get(name, {})
    default: Any = next(
      (k for k, part in parts.items() if part is option.default), option.default
    )
    choices = list(parts)
    if typing.get_origin(option.annotation) is typing.Literal:
      choices = list(typing.get_args(option.annotation))
    text = help_of[name].replace(' (here also a function of the round)', '')
    text = f'{method}: {text}'
    if name in _ELSEWHERE:
      default, which = _ELSEWHERE[name]
      text += ' ' + which
    elif 'preset' in recipe.options and name != 'preset':
      text += f" Default: the preset's ({default} in the code's)."
      default = None
    if isinstance(option.default, bool):
      flags.DEFINE_bool(flag, default, text)
    elif choices and isinstance(choices[0], str):
      flags.DEFINE_enum(flag, default, choices, text)
    elif isinstance(option.default, str):
      flags.DEFINE_string(flag, default, text)
    else:
      define = (
        flags.DEFINE_integer
        if isinstance(option.default, int)
        else flags.DEFINE_float
      )
      define(
        flag,
        default,
        text,
        lower_bound=min(choices, default=0),
        upper_bound=max(choices, default=None),
      )


def _define_influence() -> None:
  """Who is tracked, and how."""
  flags.DEFINE_string(
    'track',
    '',
    'Clients whose influence on the model is tracked: all, or ids with commas '
    'between them; default: none. Costs about two rounds for each of them '
    'and round, and a copy of the state for each.',
  )
  flags.DEFINE_enum(
    'curvature',
    'exact',
    CURVATURES,
    'How what a client has changed is carried through the next rounds: exact, '
    'by their derivative; blocks, array by array; lwet, so, truncated where '
    'it grows (--truncation); fisher, with the empirical Fisher '
    'matrix for the Hessian; first_order in the learning rate; none, as it is; '
    'or retraining without each client, of which the others are estimates.',
  )
  flags.DEFINE_float(
    'truncation',
    None,
    'An array of the parameters is truncated for a client as soon as a round '
    'makes its change more than so many times as long; default: 1 with '
    '--curvature=lwet, else never.',
    lower_bound=0,
  )
  flags.DEFINE_bool(
    'through_server',
    True,
    'Influence goes through what refines the model on the server (fed_ftg, '
    'fed_df); otherwise it is that of the clients, with what the server adds '
    'held fixed.',
  )
  flags.DEFINE_integer(
    'track_at_once', 1, 'Tracked clients stacked at once.', lower_bound=1
  )


def _define_results() -> None:
  """What is evaluated, when, and what is kept of it."""
  flags.DEFINE_integer(
    'eval_every', 2, 'Rounds between evaluations.', lower_bound=1
  )
  flags.DEFINE_bool(
    'evaluate_all',
    False,
    'Also evaluate the mean over ALL '
    "clients' last models, as official plots do; needs memory "
    'for one model per client.',
  )
  flags.DEFINE_enum(
    'evaluate_clients',
    'final',
    EVALUATE_CLIENTS,
    'When the broadcast model is '
    'evaluated client by client, each on test examples with its class shares: '
    'never, after the last round, or at every evaluation.',
  )
  flags.DEFINE_bool(
    'personalise',
    False,
    'Where clients are evaluated, also after local '
    'training by each of them; takes as long as --num_clients / --cohort '
    'rounds of local training.',
  )
  flags.DEFINE_bool(
    'clients_by_class',
    False,
    "Where clients are evaluated, each client's models also on each class of "
    'the whole test set: accuracy in and out of their distribution.',
  )
  flags.DEFINE_bool(
    'save_personal',
    True,
    "At the end, write the clients' personal models, of methods that have any, "
    'to personal.npz.',
  )
  flags.DEFINE_bool(
    'tensorboard',
    False,
    'Also write scalars and generated images for TensorBoard.',
  )
  flags.DEFINE_integer(
    'seed',
    0,
    'Seed of models, batches and generated images.',
    lower_bound=0,
    upper_bound=2**31 - 1,
  )
  flags.DEFINE_integer(
    'checkpoint_every',
    10,
    'Rounds between checkpoints, '
    'rounded up to whole --eval_every; 0 for none. The same '
    'command goes on from the last one.',
    lower_bound=0,
  )
  flags.DEFINE_integer(
    'keep_checkpoints', 2, 'How many checkpoints stay.', lower_bound=1
  )
  flags.DEFINE_string(
    'workdir',
    None,
    'Where to write; default: a folder in runs/ named after the configuration.',
  )


_define()
