"""Scores as `evaluate.Metric` modules that need no hub.

Each file holds one metric: use its class, load the file by its path with `evaluate.load`, or put several
together with `evaluate.combine`. Beside the class stands a function that returns the metric's sufficient
statistics, from which `evaluation.scoring` makes intervals and paired tests.
"""
