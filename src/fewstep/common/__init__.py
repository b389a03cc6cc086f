"""What every part may use: text that people write. Knows nothing else of the project."""
