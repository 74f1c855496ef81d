"""What the loop is given: batches from the host, or steps on a set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umae_jax import UserError, feeding, run, sharding, train_step

OBJECTIVE = train_step.Objective(lambda key, batch: batch, None, None)


@pytest.fixture
def made(load_config):
  """Made images, cropped and flipped; the feed is to be set."""
  c = load_config("cifar10", "smoke")
  c.data.update(image_size=(16, 16), crop_scale=(0.2, 1.0), flip=True)
  c.batch_size = 8
  return c


def open_feed(c, start=0, devices=1):
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  source = run.open_source(c, training=True)
  return feeding.open_feed(c, source, mesh, start)


def host_batch(c, start):
  """The batch of step `start` + 1 as the objective gets it."""
  feed = open_feed(c, start)
  assert feed.draw is None and feed.unreadable() == 0
  (batch,), steps = feed.take(start, start + 9)
  assert steps == 1
  feed.close()
  with pytest.raises(StopIteration):
    feed.take(start + 1, start + 9)
  objective = feeding.finish_on_device(OBJECTIVE, c)
  return jax.device_get(objective.randomize(None, batch))


def test_crops_of_the_device_are_those_of_the_host(made):
  """The same windows and flips, within two grey levels."""
  made.data.feed = "host"
  expected = host_batch(made, 5)
  made.data.feed = "device_crop"
  got = host_batch(made, 5)
  assert got["image"].shape == (8, 16, 16, 3)
  assert got["image"].dtype == np.uint8
  np.testing.assert_array_equal(got["label"], expected["label"])
  difference = got["image"].astype(int) - expected["image"]
  assert np.abs(difference).max() <= 2


@pytest.mark.parametrize(
  "batch_size, asked, taken",
  [
    (8, [(0, 9), (9, 99), (64, 65)], [9, 20, 1]),  # 32 steps an epoch.
    (64, [(0, 99), (3, 99), (4, 99)], [8, 5, 8]),  # 4: two epochs at most.
    (256, [(0, 99), (7, 99)], [2, 2]),
  ],
)
def test_a_set_in_memory_is_taken_in_as_many_steps_as_may_be(
  made, batch_size, asked, taken
):
  made.batch_size = batch_size
  feed = open_feed(made)
  assert [feed.take(*pair)[1] for pair in asked] == taken
  assert feed.unreadable() == 0


def test_a_set_in_memory_continues_where_it_stopped(made):
  feed, other = open_feed(made), open_feed(made, 45)
  (data, number), steps = other.take(45, 99)
  assert number == steps and number.dtype == np.int32
  feed.take(0, 20)
  (expected, _), _ = feed.take(45, 99)
  for step in (45, 45 + steps - 1):
    a, b = (
      jax.jit(x.draw)(tree, jnp.int32(step))
      for x, tree in ((feed, expected), (other, data))
    )
    np.testing.assert_array_equal(a["image"], b["image"])
    np.testing.assert_array_equal(a["label"], b["label"])


def test_unreadable_images_in_memory_are_counted_and_limited(made, tmp_path):
  for name in ("a", "b"):
    (tmp_path / "train" / name).mkdir(parents=True)
    for i in range(4):
      (tmp_path / "train" / name / f"{i}.png").write_bytes(b"no image")
  made.data.update(name="folder", directory=str(tmp_path), max_unreadable=1.0)
  assert open_feed(made).unreadable() == 8
  made.data.max_unreadable = 0.5
  with pytest.raises(UserError, match="8 of 8 images do not decode"):
    open_feed(made)
