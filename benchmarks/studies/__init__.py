"""One file a study. Each has ``study``, whose signature is its command line, and most have ``render``.

``study`` makes the runs that its output folder lacks; ``render`` writes tables and figures from the rows alone.
"""
