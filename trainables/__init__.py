"""What one trial does. Importing this package imports neither torch nor ray."""

from trainables.report import Context, Report

__all__ = ["Context", "Report"]
