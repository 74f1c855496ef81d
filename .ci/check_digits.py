"""Checks what the README's main job left in its work directory."""

import json
import pathlib
import sys

KEYS = (
  "effective_rank",
  "participation_ratio",
  "knn_accuracy",
  "linear_accuracy",
  "reconstruction_loss",
  "uniformity_loss",
)


def main(directory: str) -> None:
  """Fails with a message unless the run in `directory` is a good one."""
  path = pathlib.Path(directory)
  summary = json.loads((path / "summary.json").read_text())
  missing = set(KEYS) - set(summary)
  assert not missing, f"summary.json lacks {missing}"
  assert summary["linear_accuracy"] > 0.9, summary
  assert summary["knn_accuracy"] > 0.9, summary
  assert summary["effective_rank"] > 33, summary
  for name in ("reconstructions", "spectrum", "curves"):
    header = (path / f"{name}.png").read_bytes()[:8]
    assert header == b"\x89PNG\r\n\x1a\n", f"{name}.png is no picture"
  lines = (path / "metrics.jsonl").read_text().splitlines()
  losses = [
    record["loss"]
    for record in map(json.loads, lines)
    if record["split"] == "train"
  ]
  assert losses[-1] < 0.7 * losses[0], (losses[0], losses[-1])
  print(f"{directory}: {json.dumps(summary)}")


if __name__ == "__main__":
  main(sys.argv[1])
