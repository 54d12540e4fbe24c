"""What is kept on disk of work under way."""
