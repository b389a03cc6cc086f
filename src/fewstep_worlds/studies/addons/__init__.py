"""Add-ons to a checkpoint, trained on the base teacher and used with students that were not trained on them.

- `scenes`: pictures, prompts and measures of the world, the only module that imports one
- `measures`: measures of pictures alone
- `pipelines`: the base and students in diffusers' pipelines
- `training`, `ip_adapter`: how add-ons are trained and written
- `tasks`: the add-ons and uses
- `figure`: the study
"""
