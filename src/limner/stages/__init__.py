"""The stages: one module a command, each with `run(config)`; they hand over folders and never import each other."""
