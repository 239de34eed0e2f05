"""The glue to the Trainer."""
