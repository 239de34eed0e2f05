"""Stage 2: set up the skeleton and get trustworthy baselines."""
