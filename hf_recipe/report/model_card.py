"""The report as a section of a model card."""

from hf_recipe.core.report import Report


def render_markdown(report: Report) -> str:
    """The report as Markdown."""
    return report.title
