"""Stage 1: become one with the data."""
