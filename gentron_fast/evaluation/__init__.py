"""Evaluation as the paper did it: benchmarks' folders, their scores, people's choices, video."""
