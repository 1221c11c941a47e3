"""Runs of every shape while processes die, brokers stop and disks fill; then a checker reads the topics.

See docs/faults.md. ``python -m chaos --help`` in ``tests``, or ``make chaos``.
"""
