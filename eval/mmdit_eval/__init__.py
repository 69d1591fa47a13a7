"""Evaluation of diffusion runs: features, distances, scores, studies, report."""
