"""Search of schedules: one grid for all samples, one for each, and without gradients; labels on disk."""
