"""What shimmercat.py can do without: companions and the native engine."""
