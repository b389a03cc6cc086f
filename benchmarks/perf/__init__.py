"""Parts of `performance.py`: what is timed, and how."""
