"""The networks: pure functions of (variables, images, noise)."""

from umae_jax.models.classifier import Classifier
from umae_jax.models.mae import MaskedAutoencoder, Output, Removed

__all__ = ["Classifier", "MaskedAutoencoder", "Output", "Removed"]
