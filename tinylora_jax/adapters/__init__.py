"""Pure transforms of any pytree of weights: no model and no Flax inside."""

from tinylora_jax.adapters.kernel import AdaptedKernel as AdaptedKernel
from tinylora_jax.adapters.kernel import FusedKernel as FusedKernel
from tinylora_jax.adapters.kernel import fuse as fuse
from tinylora_jax.adapters.kernel import fused_matmul as fused_matmul
from tinylora_jax.adapters.kernel import matmul as matmul
from tinylora_jax.adapters.kernel import select_rows as select_rows
from tinylora_jax.adapters.policy import Policy as Policy
from tinylora_jax.adapters.rebase import CombinationError as CombinationError
from tinylora_jax.adapters.rebase import combine as combine
from tinylora_jax.adapters.rebase import own_triplets as own_triplets
from tinylora_jax.adapters.svd import truncated_svd as truncated_svd
from tinylora_jax.adapters.targets import Module as Module
from tinylora_jax.adapters.targets import Target as Target
from tinylora_jax.adapters.targets import select as select
from tinylora_jax.adapters.targets import tie_groups as tie_groups
from tinylora_jax.adapters.tinylora import Factors as Factors
from tinylora_jax.adapters.tinylora import TinyLoRA as TinyLoRA
from tinylora_jax.adapters.tinylora import apply as apply
from tinylora_jax.adapters.tinylora import delta as delta
from tinylora_jax.adapters.tinylora import exchange as exchange
from tinylora_jax.adapters.tinylora import factorize as factorize
from tinylora_jax.adapters.tinylora import init as init
from tinylora_jax.adapters.tinylora import merge as merge
