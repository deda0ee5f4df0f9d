"""Fit, evaluate and export an image classifier."""
