import csv

import matplotlib.image
import numpy as np
import pytest

from umae_jax.analysis import mask_ratio

SEEDS = 2


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """The command's directory, and its rows by ratio, falling."""
  path = tmp_path_factory.mktemp("exact") / "new"
  assert mask_ratio.main([str(path), f"--seeds={SEEDS}"]) == 0
  with (path / "mask_ratio.csv").open() as file:
    records = list(csv.DictReader(file))
  rows = [
    mask_ratio.Row(**{k: float(x) for k, x in record.items()})
    for record in records
  ]
  assert len(rows) == SEEDS * len(mask_ratio.RATIOS)
  return path, rows


def test_labels_and_connections_pull_apart(written):
  """Every seed by itself, as the ratio falls."""
  _, rows = written
  for seed in range(SEEDS):
    chosen = [row for row in rows if row.seed == seed]
    assert [row.mask_ratio for row in chosen] == [
      k / 16 for k in (15, 14, 13, 12, 10, 8, 6, 4, 2)
    ]
    alpha = np.array([row.labelling_error for row in chosen])
    residual = np.array([row.residual for row in chosen])
    assert (np.diff(alpha) <= 0).all()
    assert (np.diff(residual) >= 0).all()
    # Figures of another implementation, and of other masks.
    want = [0.74, 0.61, 0.43, 0.31, 0.14, 0.03, 0.01, 0.0, 0.0]
    np.testing.assert_allclose(alpha, want, atol=0.06)
    want = [0, 0, 0.01, 0.04, 0.25, 1.0, 2.4, 6.6, 30]
    np.testing.assert_allclose(residual, want, rtol=0.15, atol=0.02)


def test_the_probe_is_best_in_between(written):
  _, rows = written
  means = {k: x.probe_error for k, (x, _) in mask_ratio.summarize(rows).items()}
  assert list(means) == sorted(means, reverse=True)
  best = min(means, key=means.get)
  assert 0.3 < best < 0.9
  assert means[best] < 0.11
  assert means[15 / 16] > 1.3 * means[best]
  assert means[2 / 16] > 1.2 * means[best]


def test_bounds_hold_and_are_vacuous_where_the_table_says_so(written):
  _, rows = written
  for row in rows:
    assert row.view_error <= row.view_bound
    total = row.labelling_error + row.target_labelling_error
    assert row.disagreement <= 2 * total
  table = mask_ratio.format_rows(rows)
  assert table.count("vacuous") == len(mask_ratio.RATIOS)
  useful = [row._replace(view_bound=0.5) for row in rows]
  assert "vacuous" not in mask_ratio.format_rows(useful)


def test_means_and_deviations_are_over_the_seeds(written):
  _, rows = written
  first, second = (
    row for row in rows if row.mask_ratio == 0.5
  )  # Two seeds: |a - b| / sqrt(2).
  mean, deviation = mask_ratio.summarize(rows)[0.5]
  a, b = first.probe_error, second.probe_error
  assert mean.probe_error == pytest.approx((a + b) / 2)
  assert deviation.probe_error == pytest.approx(abs(a - b) / 2**0.5)


def test_a_picture_is_drawn(written):
  path, _ = written
  image = matplotlib.image.imread(path / "mask_ratio.png")
  assert image.shape[0] > 900
  assert image.shape[1] > 900
  blue = (np.abs(image[..., :3] - [0, 0x72 / 255, 0xB2 / 255]) < 0.02).all(-1)
  third = len(image) // 3
  for panel in range(3):  # Each has its line.
    assert blue[panel * third : (panel + 1) * third].sum() > 300


def test_nothing_is_overwritten(written, capsys):
  path, _ = written
  before = (path / "mask_ratio.csv").read_bytes()
  assert mask_ratio.main([str(path)]) == 2
  assert f"{path}/mask_ratio.csv exists" in capsys.readouterr().err
  assert (path / "mask_ratio.csv").read_bytes() == before


@pytest.mark.parametrize("seeds", ["0", "many", "-1"])
def test_seeds_that_are_no_number_are_refused(seeds, tmp_path, capsys):
  with pytest.raises(SystemExit) as exit_info:
    mask_ratio.main([str(tmp_path / "x"), f"--seeds={seeds}"])
  assert exit_info.value.code == 2
  assert f"'{seeds}' is not a positive number" in capsys.readouterr().err
  assert not (tmp_path / "x").exists()


def test_least_squares_learns_from_the_first_rows_alone():
  features = np.array([[1.0, 0], [1, 1], [1, 0], [1, 0], [1, 1]])
  labels = np.array([0, 1, 1, 1, 1])
  assert mask_ratio.least_squares_error(features, labels, 2) == 2 / 3
