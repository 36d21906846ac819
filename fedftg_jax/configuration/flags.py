"""Defines the flags that all programs share."""

from collections.abc import Callable
import inspect
import re
import typing
from typing import Any

from absl import flags as absl_flags

from fedftg_jax import federation, models, recipes, uplinks
from fedftg_jax.data import augment, partition
from fedftg_jax.methods import batch_norm
from fedftg_jax.models import convolution, layers
from fedftg_jax.system import own_flags as flags

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
# By kind: a function of `partition`, and the arguments that flags give to it;
# None if the partition is given.
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
# Options whose default is the value of another flag: the default of their own
# flag, and a text that names the other one.
_ELSEWHERE: dict[str, tuple[Any, str]] = {
  'df_batch_size': (0, '0 for --batch_size.'),
  FTG + 'batch_size': (
    None,
    '0 for --batch_size (code). Default: 10 with --ftg_preset=robust, else 0.',
  ),
  FTG + 'weight_decay': (
    None,
    'Default: 0 with --ftg_preset=robust, else --weight_decay (code). '
    '--prox_to_zero adds --prox_mu to it.',
  ),
}
AUTO = 'auto'  # of --client_chunk
EVALUATE_CLIENTS = ('none', 'final', 'every')
SECTIONS: dict[str, list[str]] = {}  # the flags of each group, for --help
# A description and the flags of each method, for --help.
METHODS: dict[str, tuple[str, list[str]]] = {}
_SERVER = ('server_optimizer', 'server_learning_rate', 'server_eps_root')
_GENERATOR = ('generator_width', 'noise_dim', 'generator_bias')


class IntegerOrAuto(absl_flags.ArgumentParser):
  """Parses an integer of at least 0, or 'auto'."""

  syntactic_help = 'an integer of at least 0, or auto'

  def parse(self, argument):
    if argument == AUTO:
      return AUTO
    parser = absl_flags.IntegerParser(lower_bound=0)
    try:
      return parser.parse(argument)
    except ValueError as error:
      raise ValueError(f'must be {self.syntactic_help}') from error

  def flag_type(self):
    return 'int or auto'


def of_method(method: str) -> dict[str, str]:
  """Maps the names of a method's flags to the names of its options."""
  recipe = recipes.recipe(method)
  return {recipe.prefix + name: name for name in recipe.options}


def is_given(kind: str) -> bool:
  """Returns whether a partition is given, with its number of clients."""
  return kind == 'natural' or kind.startswith('file:')


def _define() -> None:
  """Defines all flags, and records their groups."""
  for title, define in (
    ('Data', _define_data),
    ('Partition', _define_partition),
    ('Federation', _define_federation),
    ('Methods', _define_methods),
    ('Privacy', _define_privacy),
    ('Uplink', _define_uplink),
    ('Training', _define_training),
    ('Generator', _define_single_methods),
    ('Influence', _define_influence),
    ('Output', _define_output),
  ):
    before = set(flags.FLAGS)
    define()
    SECTIONS[title] = [name for name in flags.FLAGS if name not in before]
  SECTIONS['Generator'] = list(_GENERATOR)  # the others are in METHODS
  for name, recipe in recipes.RECIPES.items():
    METHODS[name] = _description(name, recipe), _flags_of(name, recipe)


def _description(name: str, recipe: recipes.Recipe) -> str:
  """Describes a method and the values of other flags that it requires."""
  requires = [
    f'It requires --{flag}='
    f'{" or ".join(str(v) for v in values if v is not None)}: {why}.'
    for flag, values, why in recipe.needs
  ]
  return ' '.join([f'{name}: {recipe.help}.', *requires])


def _flags_of(name: str, recipe: recipes.Recipe) -> list[str]:
  """Returns the flags that have an effect with a method."""
  found = list(of_method(name))
  required = [flag for flag, _, _ in recipe.needs]
  if 'server_optimizer' in recipe.given and 'server_optimizer' not in required:
    found += _SERVER
  if recipe.generates:
    found += _GENERATOR
  return found


def _define_data() -> None:
  """Defines the flags of the data set."""
  flags.DEFINE_string(
    'dataset',
    'mnist5k',
    'Data set: a name, folder:PATH or npz:PATH. mnist5k: 5,000 real MNIST '
    'images that come with a Python package. mnist, fashion_mnist, kmnist, '
    'emnist/*, cifar10 or cifar100: prepared from their original files. '
    'Another name: an image-classification set of TensorFlow Datasets that is '
    'already prepared. folder:PATH: images in train/CLASS/ and test/CLASS/. '
    'npz:PATH: an .npz with train_x, train_y, test_x, test_y (images NHWC, '
    'uint8 or float32) and '
    'optionally train_client_id. synthetic:SETTINGS: made-up images of many '
    'clients for --partition=natural, such as '
    'synthetic:clients=1000,examples=10-30,classes=10,size=8,test=2000.',
  )
  flags.DEFINE_string(
    'public_data',
    '',
    'Unlabelled images on the server, for fed_df_public. train:NUM: taken from '
    'the training set before it is divided among clients. npz:PATH: an .npz '
    'with x, images like those of the data set.',
  )
  flags.DEFINE_string(
    'data_dir',
    None,
    'Folder of prepared data sets. Default: that of TensorFlow Datasets '
    '(~/tensorflow_datasets).',
  )
  flags.DEFINE_string(
    'manual_dir',
    None,
    'Folder with the original files of the data set. They are used as '
    'published to prepare it. Default: downloads/manual in --data_dir, and '
    'where a Debian package puts them.',
  )
  flags.DEFINE_integer(
    'train_examples',
    0,
    'Number of training examples, stratified; 0: all. Every class keeps the '
    'same share.',
    lower_bound=0,
  )
  flags.DEFINE_integer(
    'num_classes',
    0,
    'Number of classes; 0 for one more than the largest training label.',
    lower_bound=0,
    upper_bound=2**20,
  )
  flags.DEFINE_bool(
    'unit_pixels',
    False,
    'Only scale uint8 images to [0, 1]. Otherwise they are normalised by mean '
    'and standard deviation of the training images, or by the customary ones.',
  )
  flags.DEFINE_float(
    'validation_share',
    0.0,
    'Share of the training set for validation. It is the same share of every '
    'class, held out and evaluated in addition to the test set.',
    lower_bound=0,
  )
  flags.DEFINE_float(
    'client_test_share',
    0.0,
    'Share of its examples that each client tests on. They are drawn at '
    "random. The test set then consists of all clients' test examples, instead "
    'of the published one. 0 for the published test set.',
    lower_bound=0,
  )
  flags.DEFINE_bool(
    'merge_test',
    False,
    'Merge the published test set into the training set. This happens before '
    'anything is held out or divided; it needs --client_test_share.',
  )
  flags.DEFINE_enum(
    'augment',
    'none',
    augment.KINDS,
    'Augmentation of training images. flip_crop mirrors with '
    'probability 1/2 and, with probability 1/2, pads by 4 and crops.',
  )


def _define_partition() -> None:
  """Defines the flags that divide the data among clients."""
  flags.DEFINE_string(
    'partition',
    'dirichlet',
    'How the data are divided among clients. dirichlet: class proportions of '
    'each client are drawn. dirichlet_class: client proportions of each class '
    'are drawn. iid: at random. quantity: at random, with unequal sizes. '
    'shards: shards of examples sorted by class. classes: exactly '
    '--classes_per_client classes each. natural: as the data name the client '
    'of each example. file:PATH: an .npz with one array of rows per client, or '
    'the partition.npz that every run writes.',
  )
  flags.DEFINE_float(
    'dirichlet_alpha',
    0.1,
    'Concentration of the Dirichlet partitions. The smaller it is, the fewer '
    'classes a client has.',
  )
  flags.DEFINE_float(
    'size_sigma',
    0.0,
    'dirichlet, iid, quantity: standard deviation of the logarithm of the '
    'client sizes; 0 for equal sizes.',
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
    'dirichlet_class, quantity: smallest number of examples of a client.',
    lower_bound=0,
  )
  flags.DEFINE_integer(
    'shards_per_client',
    2,
    'shards: number of shards of each client.',
    lower_bound=1,
  )
  flags.DEFINE_integer(
    'classes_per_client',
    2,
    'classes: number of classes of each client.',
    lower_bound=1,
  )
  flags.DEFINE_bool(
    'niid_bench',
    False,
    "dirichlet_class, classes: draw as NIID-Bench's code does (also Flower's "
    'baseline and PFLlib). dirichlet_class: a client that holds its even share '
    'gets none of the following classes, and everything is drawn again until '
    'each client has --min_size examples; after 1,000 draws examples are '
    'moved to clients that lack some. classes: clients draw their classes '
    'independently. In the settings of the presets niid_bench and pfllib '
    "clients have the class counts of the baseline's published runs and of "
    "PFLlib's script.",
  )
  flags.DEFINE_integer(
    'partition_seed',
    0,
    'Seed of the partition. It is also the seed of what is held out for '
    'validation or tests.',
    lower_bound=0,
    upper_bound=2**31 - 1,
  )
  flags.DEFINE_string(
    'flip_labels',
    '',
    'SHARE,CLIENTS: wrong labels on some clients. That number of clients, '
    'drawn by --partition_seed, train on labels of which that share is changed '
    'to another class, drawn uniformly. The partition uses the true labels.',
  )


def _define_federation() -> None:
  """Defines the flags of clients and rounds."""
  flags.DEFINE_integer('num_clients', 20, 'Number of clients.', lower_bound=1)
  flags.DEFINE_integer(
    'cohort',
    5,
    'Clients per round. It is the average with --schedule=bernoulli or '
    'poisson.',
    lower_bound=1,
  )
  flags.DEFINE_string(
    'schedule',
    'exact',
    'Sampling of the clients of a round. exact: always '
    '--cohort clients. bernoulli: each client independently, at least one. '
    'poisson: each client independently, possibly none. file:PATH: a .npy of '
    'client ids [rounds, cohort], with -1 for padding, or the schedule.npz '
    'that every run writes, with dropouts and stragglers.',
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
    'Share of the selected clients that drop out.',
    lower_bound=0,
    upper_bound=1,
  )
  flags.DEFINE_bool(
    'dropout_after_work',
    False,
    'Clients that drop out train before they do so. They keep what they learn '
    'for themselves (control variates, previous models).',
  )
  flags.DEFINE_bool(
    'train_all',
    False,
    "All clients train in every round, as in pFedMe's code. They keep what "
    'they learn for themselves; only the selected ones send it. It takes '
    '--num_clients / --cohort times as long.',
  )
  flags.DEFINE_float(
    'straggler_rate',
    0.0,
    'Share of the selected clients that are stragglers. A straggler takes only '
    'some of its local steps, a number drawn anew in each round.',
    lower_bound=0,
    upper_bound=1,
  )
  flags.DEFINE_float(
    'min_availability',
    1.0,
    'Smallest probability that a client is available. Each client has a '
    'probability of its own, drawn once between this and 1.',
    lower_bound=0,
    upper_bound=1,
  )
  flags.DEFINE_string(
    'leave_out',
    '',
    'Ids of clients that never take part, separated by commas. Cohorts that '
    'include such a client continue without it; that it receives the model is '
    'still counted.',
  )
  flags.DEFINE_integer(
    'rounds', 30, 'Number of communication rounds.', lower_bound=1
  )
  flags.DEFINE_integer(
    'num_devices',
    None,
    'Devices that share the clients of a round, 0 for all. A CPU is divided '
    'into as many. Default: one on a CPU, else all.',
    lower_bound=0,
  )
  flags.DEFINE(
    IntegerOrAuto(),
    'client_chunk',
    None,
    'Clients that are stacked at once, 0 for all; auto: as many as fit the '
    "device's memory, estimated before the run (1 on a CPU). Default: 1 on a "
    'CPU, else all.',
    serializer=absl_flags.ArgumentSerializer(),
  )
  flags.DEFINE_enum(
    'client_state',
    'device',
    CLIENT_STATES,
    "Where the clients' state is kept between rounds. device: on the device. "
    "host: in the host's memory. disk: in memory-mapped files in the run's "
    'folder. With host and disk, only the state of the clients of the next '
    '--eval_every rounds is on the device.',
  )


def _define_methods() -> None:
  """Defines the flags that choose a method."""
  known = '; '.join(f'{k}: {r.help}' for k, r in recipes.RECIPES.items())
  flags.DEFINE_string(
    'method',
    'fed_ftg',
    f'A method, or several joined with +. Methods are {known}.',
  )
  flags.DEFINE_enum(
    'weighting',
    None,
    federation.WEIGHTINGS,
    'How clients are weighted in means. examples: by their number of examples. '
    "uniform: equally. Default: as the method's authors do.",
  )
  flags.DEFINE_enum(
    'server_optimizer',
    'sgd',
    list(recipes.SERVER_OPTIMIZERS),
    "Optimiser on the mean of the clients' changes. sgd with rate 1 is FedAvg, "
    'adam is FedAdam, momentum (0.9) is FedAvgM.',
  )
  rates = ', '.join(
    f'{k} {rate:g}' for k, (_, rate) in recipes.SERVER_OPTIMIZERS.items()
  )
  flags.DEFINE_float(
    'server_learning_rate',
    None,
    f'Learning rate of the server optimiser. Default: {rates}.',
  )
  flags.DEFINE_float(
    'server_eps_root',
    0.0,
    'adam: added under its square root. Without it, the derivative of the root '
    'is 0 / 0 where a mean change is 0, which matters for forward mode through '
    'a round.',
    lower_bound=0,
  )


def _define_privacy() -> None:
  """Defines the flags of differential privacy and secure aggregation."""
  flags.DEFINE_float(
    'dp_clip',
    0.0,
    "Largest norm of a client's change of the model; 0 for no bound. For "
    'fed_avg, alone or with methods that only change local training.',
    lower_bound=0,
  )
  flags.DEFINE_float(
    'dp_noise',
    0.0,
    'Noise multiplier; 0 for no noise. It is the standard deviation of the '
    'Gaussian noise on the sum of the changes, divided by --dp_clip. It needs '
    '--schedule=poisson.',
    lower_bound=0,
  )
  flags.DEFINE_float(
    'dp_delta',
    1e-5,
    'Delta of the reported (epsilon, delta) differential privacy.',
  )
  flags.DEFINE_float(
    'dp_quantile',
    0.0,
    'Share of clients whose change --dp_clip should leave unclipped. --dp_clip '
    'is adapted to it; 0 keeps it as it is.',
    lower_bound=0,
  )
  flags.DEFINE_bool(
    'secure_aggregation',
    False,
    'Let the server see only sums. Changes are sent masked, in fixed point. '
    'For fed_avg, alone or with methods that only change local training.',
  )


def _define_uplink() -> None:
  """Defines the flags of the codecs for what clients send."""
  known = '; '.join(f'{name}: {text}' for name, text in uplinks.HELP.items())
  flags.DEFINE_enum(
    'uplink',
    'none',
    list(uplinks.HELP),
    f"Codec for the clients' changes of the model. Codecs are {known}.",
  )
  flags.DEFINE_float(
    'uplink_rate', 2.0, 'Bits per parameter, for every --uplink but none.'
  )
  flags.DEFINE_enum(
    'uplink_lattice',
    'a2',
    list(uplinks.LATTICES),
    "uveqfed: the lattice. a2, the hexagonal lattice, is the paper's.",
  )


def _define_training() -> None:
  """Defines the flags of the model and the clients' local training."""
  flags.DEFINE_enum(
    'model',
    'lenet',
    list(models.CLASSIFIERS),
    'Classifier, such as mlp, lenet or resnet20.',
  )
  flags.DEFINE_enum(
    'norm',
    None,
    layers.NORMS,
    'Normalisation layers of the classifier. Default: batch for resnet*, vgg11 '
    'and fedgen_cnn, instance for convnet, else none.',
  )
  flags.DEFINE_enum(
    'batch_norm',
    'aggregate',
    batch_norm.POLICIES,
    "Policy for BatchNorm's running statistics. aggregate: they are averaged "
    'with the model. local: each client keeps its own. reset: a client '
    'estimates them on its data before it trains.',
  )
  flags.DEFINE_bool(
    'torch_bn', True, "Running variances are unbiased, as PyTorch's."
  )
  flags.DEFINE_integer(
    'projection_dim',
    0,
    "Width of a projection head before the last layer; 0 for none. MOON's "
    'paper: 256.',
    lower_bound=0,
  )
  flags.DEFINE_enum(
    'conv',
    None,
    convolution.IMPLEMENTATIONS,
    'Implementation of convolutions; results agree. Default: winograd on a '
    'CPU, else matmul.',
  )
  flags.DEFINE_enum(
    'precision',
    'default',
    PRECISIONS,
    'Numerical precision. default: float32, with the fast matrix products of '
    'the device (TF32 on a recent GPU, bfloat16 on a TPU). highest: float32 '
    'products. bfloat16: layers compute in bfloat16, while weights, sums, '
    'norms, last layer and losses stay float32.',
  )
  flags.DEFINE_integer(
    'local_epochs', 5, 'Epochs per client and round.', lower_bound=1
  )
  flags.DEFINE_integer(
    'local_steps',
    0,
    'Steps per client and round, instead of epochs; 0 for epochs.',
    lower_bound=0,
  )
  flags.DEFINE_integer(
    'batch_size', 50, 'Examples per local step.', lower_bound=1
  )
  flags.DEFINE_float(
    'learning_rate',
    0.1,
    "Learning rate of the clients' SGD (first round).",
    lower_bound=0,
  )
  flags.DEFINE_float(
    'momentum', 0.0, "Momentum of the clients' SGD.", lower_bound=0
  )
  flags.DEFINE_bool(
    'nesterov', False, "Use Nesterov's momentum instead of the heavy ball."
  )
  flags.DEFINE_bool(
    'keep_momentum',
    False,
    'Clients keep their momentum from round to round. Otherwise it starts at '
    '0 in each round. This needs memory for one model per client.',
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
    "Weight decay of the clients' SGD. It is also that of students on the "
    "server (but see --ftg_weight_decay) and of FedDF's generator.",
    lower_bound=0,
  )
  flags.DEFINE_float(
    'clip_norm',
    10.0,
    'Largest norm of a local gradient; 0 for no clipping. Weight decay is '
    'added after clipping.',
    lower_bound=0,
  )


def _define_single_methods() -> None:
  """Defines the flags of each method, and of the image generator."""
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
    'noise_dim', 100, "Length of the generator's noise vector.", lower_bound=1
  )
  flags.DEFINE_bool(
    'generator_bias',
    None,
    "Give the generator biases before its BatchNorms, as in FedFTG's official "
    "code. They have no effect except on Adam's rounding errors. Default: that "
    'of --ftg_preset (no in intended and robust, else yes).',
  )
  _define_options('fed_ftg')


def _described(documented: Any) -> dict[str, str]:
  """Parses the texts of a docstring's arguments or attributes, by name."""
  found = re.findall(
    r'^ {2}(\w+): (.*?)(?=^ {0,2}\S|\Z)',
    inspect.cleandoc(documented.__doc__ or ''),
    re.M | re.S,
  )
  return {name: ' '.join(text.split()) for name, text in found}


def _define_options(method: str) -> None:
  """Defines a flag for each option of a method that has no flag yet.

  If one option is a preset, the default of the others is that of the preset.
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
    if flag in _ELSEWHERE:
      default, which = _ELSEWHERE[flag]
      text += ' ' + which
    elif 'preset' in recipe.options and name != 'preset':
      text += f' Default: that of the preset ({default} in official).'
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
  """Defines the flags that track the influence of clients."""
  flags.DEFINE_string(
    'track',
    '',
    'Clients whose influence on the model is tracked. all, or ids separated by '
    'commas; empty for none. In each round it costs about two rounds for each '
    'tracked client, and the memory of one state for each.',
  )
  flags.DEFINE_enum(
    'curvature',
    'exact',
    CURVATURES,
    "How a client's influence is carried through later rounds. exact: by their "
    'derivative. blocks: without coupling between arrays. lwet: as blocks, '
    'truncated where it grows (--truncation). fisher: with the empirical '
    'Fisher matrix instead of the Hessian. first_order: in the learning rate. '
    'none: unchanged. retraining: the model is trained without each client, '
    'which the others estimate.',
  )
  flags.DEFINE_float(
    'truncation',
    None,
    'Growth at which an array is truncated for a client. This is the factor by '
    'which a round makes the change of the array longer. Default: 1 with '
    '--curvature=lwet, else never.',
    lower_bound=0,
  )
  flags.DEFINE_bool(
    'through_server',
    True,
    'Influence includes the refinement on the server (fed_ftg, fed_df). '
    'Otherwise it is that of the clients, and what the server adds is held '
    'constant.',
  )
  flags.DEFINE_integer(
    'track_at_once',
    1,
    'Tracked clients that are stacked at once.',
    lower_bound=1,
  )


def _define_output() -> None:
  """Defines the flags of evaluation and of what is written."""
  flags.DEFINE_integer(
    'eval_every', 2, 'Rounds between evaluations.', lower_bound=1
  )
  flags.DEFINE_bool(
    'evaluate_all',
    False,
    "Also evaluate the mean over ALL clients' last models, as official plots "
    'do. This needs memory for one model per client.',
  )
  flags.DEFINE_enum(
    'evaluate_clients',
    'final',
    EVALUATE_CLIENTS,
    'When to evaluate client by client. The broadcast model '
    "is evaluated on test examples with the client's class shares: never, "
    'after the last round, or at every evaluation.',
  )
  flags.DEFINE_integer(
    'evaluated_clients',
    10_000,
    'Largest number of clients to evaluate; 0 for all. They are evenly spaced '
    'among the clients with test examples. Personal models are written only '
    'for as many clients.',
    lower_bound=0,
  )
  flags.DEFINE_bool(
    'personalise',
    False,
    'Evaluate clients also after local training. It takes as long as '
    '--num_clients / --cohort rounds of local training.',
  )
  flags.DEFINE_bool(
    'clients_by_class',
    False,
    "Evaluate each client's models also on each class of the whole test set. "
    'This gives accuracy in and out of their distribution.',
  )
  flags.DEFINE_bool(
    'save_personal',
    True,
    "Write the clients' personal models to personal.npz at the end. Only "
    'methods with personal models have any.',
  )
  flags.DEFINE_bool(
    'tensorboard', False, 'Write scalars and images for TensorBoard, too.'
  )
  flags.DEFINE_string(
    'wandb', '', 'Also log each run to this project of Weights & Biases.'
  )
  flags.DEFINE_string(
    'mlflow', '', 'Also log each run to this experiment of MLflow.'
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
    'Rounds between checkpoints; 0 for none. They are rounded up to a multiple '
    'of --eval_every. The same command continues from the last checkpoint.',
    lower_bound=0,
  )
  flags.DEFINE_integer(
    'keep_checkpoints', 2, 'Number of checkpoints that are kept.', lower_bound=1
  )
  flags.DEFINE_string(
    'workdir',
    None,
    'Folder for the results. Default: a folder in runs/ named after the '
    'configuration.',
  )


_define()
