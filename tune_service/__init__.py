"""What one study does."""
