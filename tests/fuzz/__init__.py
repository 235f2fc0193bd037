"""Damage files and command lines, and check that commands end with a message: python -m tests.fuzz --seed 1

Each case damages one copy of something valid, with its checksums made right again, and runs one command on it. The
command must end with exit code 0, 1 or 2, without a traceback, in bounded time and memory. A case is a pure function of
(seed, number).

    isolate     run a function in a forked process with limits
    specimens   valid files: a dataset, a run, third-party checkpoints
    mutators    damage the content of one kind of file each
    kinds       choose the file, its mutator, what is sealed again, and the command that reads it
"""
