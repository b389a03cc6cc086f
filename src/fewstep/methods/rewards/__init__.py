"""The former place of `fewstep.scorers`, for imports that have not moved yet."""
