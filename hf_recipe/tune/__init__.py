"""Stage 5: tune, then squeeze out the rest."""
