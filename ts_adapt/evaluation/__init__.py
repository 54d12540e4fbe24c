"""The comparison of schedules: metrics, the runs, the report."""
