"""Reports: records as one HTML page that needs nothing else, or as Markdown."""

from bench.report.prose import markdown
from bench.report.web import page

__all__ = ["markdown", "page"]
