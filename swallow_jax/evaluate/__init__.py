"""Evaluation: ask a backend or a baseline for labels, write predictions, score them, compare arms in pairs."""
