"""A small encoder with recorded weights, and data that it can see."""

import pathlib
import shutil

import jax
import numpy as np
import pytest

from umae_jax import checkpoint, loop, metrics, run, sharding
from umae_jax import config as config_lib
from umae_jax.data import sources

REFERENCE = pathlib.Path(__file__).parents[1] / "reference"
SIZE = (32, 32)


@pytest.fixture
def config():
  """Of an evaluation of `mae_p8_normpix.safetensors` on made images."""
  c = config_lib.defaults()
  c.task = "linear_probe"
  c.pretrained = str(REFERENCE / "mae_p8_normpix.safetensors")
  c.batch_size = 64
  c.num_epochs = 2.0
  c.data.update(name="made", eval_split="test", image_size=SIZE)
  c.data.crop_scale = (0.5, 1.0)
  c.model.update(patch_size=8, width=32, depth=2, num_heads=4)
  c.model.update(decoder_width=24, decoder_depth=2, decoder_num_heads=3)
  c.optimizer.warmup_epochs = 0.0
  c.evaluation.train_images = 0
  c.probe.update(epochs=(3,), batch_sizes=(64,), draws=3)
  return c


@pytest.fixture(scope="session")
def make_task():
  """Returns (make, config, devices) -> (Task, mesh) on made images."""

  def make_task(make, config, num_devices=8):
    mesh = sharding.make_mesh(devices=jax.devices()[:num_devices])
    train, test = (
      sources.open_source("made", split, image_size=SIZE, channels=3)
      for split in ("train", "test")
    )
    plan = config_lib.plan(config, train.num_examples)
    return make(config, plan, mesh, train, test), mesh

  return make_task


@pytest.fixture
def assert_resumes(tmp_path):
  """A run whose last checkpoint is lost ends as if nothing had been."""

  def assert_resumes(config):
    config.checkpoint.every_steps = 3
    config.log.every_steps = 1
    config.evaluation.every_epochs = 0.0
    whole, other = tmp_path / "whole", tmp_path / "other"
    assert loop.train(run.prepare(config, str(whole)))
    shutil.copytree(whole, other)
    shutil.rmtree(other / "checkpoints" / "8")
    (other / "summary.json").unlink()
    assert loop.train(run.prepare(config, str(other)))
    logs = [metrics.read_log(x / "metrics.jsonl") for x in (whole, other)]
    losses = [[x["loss"] for x in log if "loss" in x] for log in logs]
    assert len(losses[0]) == 8 and losses[0] == losses[1]
    params = [checkpoint.load_params(x)[0] for x in (whole, other)]
    jax.tree.map(np.testing.assert_array_equal, *params)

  return assert_resumes


@pytest.fixture(scope="session")
def train_images():
  """(images (256, 32, 32, 3) uint8, labels (256,))."""
  source = sources.open_source("made", "train", image_size=SIZE, channels=3)
  return source.load(), source.labels
