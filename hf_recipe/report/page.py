"""The report as one self-contained page."""

from hf_recipe.core.report import Report


def render_page(report: Report) -> str:
    """The report as HTML."""
    return report.title
