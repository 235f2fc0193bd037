"""Whatever is done to a file or a command line, a command ends in words: `python -m tests.fuzz --seed 1 --cases 2000`.

Each case damages one copy of something valid, with its checksums made right again, and runs one command on it. The
command must end with exit code 0, 1 or 2, without a traceback, in bounded time and memory. A case is a pure function of
(seed, number).

    isolate     run a function in a forked process with limits
    specimens   what is valid: a dataset, a run, checkpoints of other houses
    mutators    one for each kind of file
    kinds       which file is damaged how, what is sealed again, and which command reads it
"""
