"""Predicts what no GPU here can measure, from counted work and datasheets: docs/gpu.md.

python -m benchmarks.prediction
"""
