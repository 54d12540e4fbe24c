"""Learning inside any pipeline of diffusers: its own loop is the few-step solve."""
