"""Measure: batch sweeps, load, tuning, comparison, reports; what only we run is in `studies`."""
