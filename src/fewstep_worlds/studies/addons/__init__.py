"""Add-ons to a checkpoint, trained on the base teacher and used with students that were not trained on them."""
