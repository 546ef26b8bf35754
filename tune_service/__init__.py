"""What one study does."""

__version__ = "0.1.0"
