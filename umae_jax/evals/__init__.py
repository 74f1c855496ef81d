"""Evaluations of frozen features: (features, labels) to numbers."""
