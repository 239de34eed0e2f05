"""Stage 3: complexify one thing at a time, until the model (over)fits."""
