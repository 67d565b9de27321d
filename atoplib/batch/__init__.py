"""Many runs: a recipe's notebooks through papermill, each in a process of its own, what they share only once.

    python -m atoplib.batch RECIPE [--dry-run] [--only PATTERN] [--jobs N] [--retry N] [-p NAME VALUE]

``recipe`` reads the YAML and makes jobs of it; ``runner`` asks which are done and gives the others to an
engine, whose ``worker`` executes each; ``checks`` looks at data and sizes before; ``pages`` and ``tables``
show what came out (notebook ``08_report``, too). A second call goes on where the first one stopped. No torch
is imported here.
"""
