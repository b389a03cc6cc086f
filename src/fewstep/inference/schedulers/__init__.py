"""The samplers as schedulers for diffusers pipelines."""
