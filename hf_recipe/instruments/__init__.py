"""What probes and monitors are made of; no verdicts."""
