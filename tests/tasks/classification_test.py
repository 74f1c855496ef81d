import io

import numpy as np
import pytest

from umae_jax.tasks import classification


def test_figures_of_a_known_case():
  scores = np.log([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
  labels = np.array([0, 1, 2], np.int32)
  names = ("ant", "bee", "cat")
  result = classification.judge(scores, labels, names)
  assert result.scalars["top1_accuracy"] == pytest.approx(2 / 3)
  assert result.scalars["top5_accuracy"] == 1
  assert result.scalars["mean_class_accuracy"] == pytest.approx(2 / 3)
  assert result.scalars["test_images"] == 3
  np.testing.assert_allclose(
    result.scalars["cross_entropy_loss"],
    -np.log([0.7, 0.25, 0.8]).mean(),
  )
  file = io.BytesIO()
  result.files["per_class.csv"](file)
  assert file.getvalue().decode().splitlines()[2].startswith("bee,1,0.0000,ant")


def test_large_scores_do_not_overflow():
  scores = np.array([[1e30, 0.0], [1e4, -1e4]], np.float32)
  result = classification.judge(scores, np.array([0, 1]), ("a", "b"))
  np.testing.assert_allclose(result.scalars["cross_entropy_loss"], 1e4)


def test_the_picture_is_drawn(tmp_path):
  result = classification.judge(np.eye(3), np.arange(3), ("a", "b", "c"))
  image = result.pictures["confusion"](tmp_path / "confusion.png")
  assert image.shape[-1] == 3
  assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
