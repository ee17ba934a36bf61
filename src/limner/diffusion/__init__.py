"""Training objectives, noise levels and schedulers."""
