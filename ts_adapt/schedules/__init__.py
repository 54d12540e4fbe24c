"""Schedules by their names, and as they are kept in files."""
