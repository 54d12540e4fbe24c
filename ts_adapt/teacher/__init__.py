"""The teacher: fine solves from known noises, generated once and kept."""
