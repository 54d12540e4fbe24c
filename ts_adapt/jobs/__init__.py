"""The jobs of the command line, as functions of a `Config`: learn, teach, search, train, quantize, prune,
evaluate, sample, export, import.

Each reads what the job before it left in the experiment's workspace and says in one sentence what is missing.
"""
