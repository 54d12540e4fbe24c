"""Mutated files for every reader of the package: `python -m fuzzing`, or `make fuzz`.

    mutations   valid bytes -> damaged or hostile ones, by the kind of file
    corpus      valid files of every kind, made by the package itself
    of_*        how each kind is read, and what has to hold of what was accepted
    checks      what has to hold of everything
    readers     all of them by name
    runner      the loop: limits of time and memory, failures written out to be replayed
    guided      another loop, atheris's: `make fuzz-guided`

A reader may accept a mutated file, or refuse it by a TsAdaptError. Everything else is a failure: another exception, a
crash, a hang, memory beyond the limit, or an accepted value that breaks what its reader promises.
"""
