"""The start of a run through `attach`: faulty losses and heads, and what must stay silent."""
