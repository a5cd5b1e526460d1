"""The commands of `python -m boft`, one module each: NAME, HELP, `add_arguments(parser)` and `run(arguments)`.

A command's module imports nothing heavy at its top: `--help` and a mistyped flag are answered at once.
"""
