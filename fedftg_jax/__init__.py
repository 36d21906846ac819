"""A vectorised federated-learning simulator, built around FedFTG."""

from fedftg_jax import federation
from fedftg_jax import models
from fedftg_jax import recipes
from fedftg_jax import solvers
from fedftg_jax.base import Batch
from fedftg_jax.base import chain
from fedftg_jax.base import Cohort
from fedftg_jax.base import Data
from fedftg_jax.base import Federation
from fedftg_jax.base import Generator
from fedftg_jax.base import Info
from fedftg_jax.base import Local
from fedftg_jax.base import Method
from fedftg_jax.base import Model
from fedftg_jax.base import Objective
from fedftg_jax.base import Output
from fedftg_jax.base import Received
from fedftg_jax.base import Sent
from fedftg_jax.base import State
from fedftg_jax.base import Variables
from fedftg_jax.base import View
from fedftg_jax.evaluation import evaluate
from fedftg_jax.federation import over_seeds
from fedftg_jax.federation import run
