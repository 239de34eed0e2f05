"""Findings, checks, exhibits, the report and the settings: the standard library alone."""
