"""Writes the changelist of a folder of statics, for a shimmercat elsewhere."""
