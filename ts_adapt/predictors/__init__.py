"""Networks that choose the schedule: from the starting noise, or step by step."""
