"""Trainer callbacks and the MLflow logger."""
