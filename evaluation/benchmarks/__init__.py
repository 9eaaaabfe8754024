"""Measurements of the evaluation itself, for the list of targets."""
