"""What is kept on disk: where, in which formats, written how."""
