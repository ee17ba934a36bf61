"""Sources, checks, dataset folders and the latent cache."""
