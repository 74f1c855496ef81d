import subprocess

import pytest

from umae_jax.benchmark import figures


def test_ratio_and_spread_by_hand():
  assert figures.spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {
    "median": 3,
    "min": 1,
    "lower_quartile": 2,
    "upper_quartile": 4,
  }
  # Medians 4 and 2; the rounds' own ratios are 1, 2 and 3.
  got = figures.ratio([2.0, 4.0, 6.0], [2.0, 2.0, 2.0])
  assert got == {"of_medians": 2, "lower_quartile": 1.5, "upper_quartile": 2.5}
  assert figures.ratio([3.0], [2.0])["upper_quartile"] == 1.5


def test_throughput_by_hand():
  got = figures.throughput([0.5, 0.5, 9.0], batch_size=8, flops=1e9, peak=4e10)
  assert got["images_per_second"] == 16
  assert got["step_ms"]["median"] == 500
  assert got["mfu"] == pytest.approx(0.4)
  none = figures.throughput([0.5], batch_size=8, flops=1e9, peak=None)
  assert dict(figures.rows({"a": none}))["a.mfu"].startswith("no known peak")


def test_commit_tells_of_changes(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
  assert figures.commit() is None
  (tmp_path / "a").write_text("1")
  who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
  for arguments in (["init", "-q"], ["add", "a"], [*who, "commit", "-qm", "a"]):
    subprocess.run(["git", *arguments], check=True)
  clean = figures.commit()
  assert len(clean) == 40
  (tmp_path / "a").write_text("2")
  assert figures.commit() == f"{clean}+changes"
