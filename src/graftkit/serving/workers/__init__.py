"""Programs that run in an engine's own Python, one a file. They import nothing of graftkit, which is not there.

``launch.py`` reads a job from a folder, starts the engine's ``start(job, folder)``, and writes what it computes.
"""
