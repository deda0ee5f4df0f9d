"""Measure: ladders, load, tuning, comparison, reports."""
