"""Packaging of tinylora_jax; `pip install -e '.[demo]'` or `'.[test]'`."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.editable_wheel import editable_wheel
from setuptools.command.sdist import sdist

LIBRARY = Path(__file__).parent / "tinylora_jax" / "__init__.py"


class WholeSource(sdist):
    """An sdist with the commands, tests and notebooks, which no wheel contains."""

    def make_distribution(self):
        for folder in ("tinylora_jax", "experiments", "tests", "colab"):
            self.filelist.graft(folder)
        self.filelist.global_exclude("*.py[co]")
        super().make_distribution()


class WithCommands(editable_wheel):
    """`pip install -e`, with which the commands of the checkout run in any folder.

    A wheel holds only the library: everyone's environment would otherwise get a package named `experiments`.
    """

    def finalize_options(self):
        self.distribution.packages += find_packages(include=["experiments*"])
        super().finalize_options()


setup(
    cmdclass={"sdist": WholeSource, "editable_wheel": WithCommands},
    name="tinylora_jax",
    version=re.search(r'^__version__ = "([^"]+)"', LIBRARY.read_text(encoding="utf-8"), re.MULTILINE)[1],
    description="TinyLoRA in JAX/Flax: reinforcement learning of language models in 13 parameters",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["tinylora_jax*"]),
    package_data={"tinylora_jax": ["py.typed", "io/adapter/ADAPTER_FORMAT.md"]},
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10",
        "flax>=0.12.8",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11",
        "transformers>=5.0",
        "datasets>=3.0",
        "grain>=0.2.12",
        "absl-py>=2.1",
        "ml_collections>=1.0",
        "jaxtyping>=0.3",
        "numpy>=2.0",
        "safetensors>=0.4",
        "gguf>=0.17",
        "jinja2>=3.1",
        "tensorboardX>=2.6",
        "scipy>=1.13",
        "threadpoolctl>=3.1",
        "matplotlib>=3.8",  # what a run is drawn with at its end
    ],
    extras_require={
        # The demo needs nothing beyond the base; the name is kept so that the command says what it is for.
        "demo": [],
        "tpu": ["jax[tpu]>=0.10"],
        # The rewards `math` and `minerva`. Not in the base: its ANTLR runtime is one that hydra and omegaconf exclude.
        "eval": ["math-verify>=0.9"],
        # Workdirs, adapters, models and questions in object stores: gs://… and s3://….
        "gcs": ["gcsfs>=2024.2"],
        "s3": ["s3fs>=2024.2"],
        "reasoning-gym": ["reasoning-gym>=0.1.19"],
        # Dashboards of `config.logger`; TensorBoard's files need nothing beyond the base.
        "wandb": ["wandb>=0.20"],
        "trackio": ["trackio>=0.20"],
        "tensorboard": ["tensorboard>=2.18"],  # shows the files
        # Clients and emulators of object stores. Apart from `test`, because they bring a hundred megabytes.
        "test-stores": ["s3fs>=2024.2", "gcsfs>=2024.2", "moto[server]>=5", "gcp-storage-emulator>=2024.8"],
        # Oracles of the tests: transformers' own models run on torch. The pin keeps pip from
        # replacing a CPU build with the newest CUDA one.
        "test": [
            "pytest>=8",
            "pytest-xdist>=3",
            "mypy>=1.15",
            "beartype>=0.19",
            "hypothesis>=6",
            "torch==2.13.0",
            "accelerate>=1.0",
            "peft>=0.19",
            "compressed-tensors>=0.20",
            "equinox>=0.13",
            "reasoning-gym>=0.1.19",
            "math-verify>=0.9",
            # A Jupyter kernel, which the notebooks of colab/ are run with.
            "nbclient>=0.10",
            "ipykernel>=6.29",
            # XLA's compiler for TPUs, which needs none of them; it exists for Linux alone.
            "jax[tpu]>=0.10; sys_platform == 'linux' and platform_machine == 'x86_64'",
        ],
    },
)
