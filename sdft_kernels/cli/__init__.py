"""Command line of the package: one module per sub-command, each with ``HELP``, ``add_arguments`` and ``run``.

A sub-command module imports torch and everything above it inside ``run``, so that ``--help`` is instant.
"""
