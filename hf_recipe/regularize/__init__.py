"""Stage 4: give up some training loss for validation loss."""
