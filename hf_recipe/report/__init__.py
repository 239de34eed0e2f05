"""Renderers: console, page, JSON, SARIF, W&B. They know `core` alone."""
