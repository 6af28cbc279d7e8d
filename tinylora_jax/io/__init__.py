"""Reading and writing of pretrained models, trained adapters, checkpoints and logs.

Each format has a subpackage: `hf`, `gguf`, `peft`, and `adapter` for this project's 26-byte files.
"""

from tinylora_jax.io._checkpoint import CheckpointError as CheckpointError
from tinylora_jax.io._checkpoint import Checkpoints as Checkpoints
from tinylora_jax.io._dashboards import TENSORBOARD as TENSORBOARD
from tinylora_jax.io._dashboards import log_picture as log_picture
from tinylora_jax.io._dashboards import parse_loggers as parse_loggers
from tinylora_jax.io._mirror import Mirror as Mirror
from tinylora_jax.io._model import Pretrained as Pretrained
from tinylora_jax.io._new_folder import new_folder as new_folder
from tinylora_jax.io._pretrained import OpenedModel as OpenedModel
from tinylora_jax.io._pretrained import load_pretrained as load_pretrained
from tinylora_jax.io._pretrained import model_install_command as model_install_command
from tinylora_jax.io._pretrained import open_pretrained as open_pretrained
from tinylora_jax.io._pretrained import resolve_gguf as resolve_gguf
from tinylora_jax.io._run_log import RunLog as RunLog
from tinylora_jax.io._run_log import WorkdirError as WorkdirError
from tinylora_jax.io._run_log import flat as flat
from tinylora_jax.io._run_objects import fetch_adapter as fetch_adapter
from tinylora_jax.io._run_objects import fetch_run as fetch_run
from tinylora_jax.io._saving import open_trained as open_trained
from tinylora_jax.io._saving import save_trained as save_trained
from tinylora_jax.io._trained import SavedAdapter as SavedAdapter
from tinylora_jax.io._trained import open_adapter as open_adapter
from tinylora_jax.io._trained import open_saved as open_saved
from tinylora_jax.io._trained import policy_together as policy_together
from tinylora_jax.io._trained import read_together as read_together
