"""TinyLoRA in JAX/Flax: reinforcement learning of language models in as few as 13 parameters."""

from tinylora_jax.adapters import AdaptedKernel as AdaptedKernel
from tinylora_jax.adapters import Factors as Factors
from tinylora_jax.adapters import Policy as Policy
from tinylora_jax.adapters import Target as Target
from tinylora_jax.adapters import TinyLoRA as TinyLoRA
from tinylora_jax.adapters import apply as apply
from tinylora_jax.adapters import delta as delta
from tinylora_jax.adapters import factorize as factorize
from tinylora_jax.adapters import init as init
from tinylora_jax.adapters import matmul as matmul
from tinylora_jax.adapters import merge as merge
